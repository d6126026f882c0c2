// SPDX-License-Identifier: GPL-2.0-only
/*
 * Guests that must not be protected, as what an epoch does not have would be lost.
 */
#include <errno.h>
#include <fnmatch.h>
#include <stdio.h>
#include <string.h>

#include "guest.h"

/*
 * Devices whose state is all in QEMU and is migrated.  If they have storage, query-block knows of
 * it.
 */
static const char * const known[] = {
	/* Buses and bridges */
	"pcie-root-port", "pcie-pci-bridge", "pci-bridge*", "pxb*", "ioh3420", "x3130-upstream",
	"xio3130-downstream", "i82801b11-bridge", "virtio-iommu-*", "intel-iommu", "amd-iommu",
	"usb-hub", "qemu-xhci", "nec-usb-xhci", "usb-ehci", "ich9-usb-*", "piix?-usb-uhci",
	/* Storage with a drive, and its controllers */
	"virtio-blk-*", "virtio-scsi-*", "scsi-hd", "scsi-cd", "ide-hd", "ide-cd", "nvme", "nvme-ns",
	"usb-storage", "ahci", "ich9-ahci", "piix?-ide*", "lsi53c*", "megasas*", "mptsas*", "pvscsi",
	"sdhci-pci", "sd-card", "floppy", "isa-fdc", "usb-uas", "virtserialport", "virtconsole",
	/* Networks */
	"virtio-net-*", "e1000*", "igb", "rtl8139", "ne2k_*", "pcnet", "vmxnet3", "tulip", "i8255*",
	"usb-net",
	/* What people see, hear and touch */
	"VGA", "secondary-vga", "bochs-display", "cirrus-vga", "isa-vga", "ramfb", "vmware-svga",
	"qxl*", "virtio-vga", "virtio-gpu-*", "virtio-keyboard-*", "virtio-mouse-*",
	"virtio-tablet-*", "usb-kbd", "usb-mouse", "usb-tablet", "intel-hda", "ich9-intel-hda",
	"hda-*", "AC97", "ES1370", "virtio-snd-*",
	/* All the rest */
	"virtio-serial-*", "virtio-rng-*", "virtio-balloon-*", "virtio-mem-*", "pc-dimm",
	"*-x86_64-cpu", "*-arm-cpu", "isa-serial", "isa-parallel", "pci-serial*", "isa-debugcon",
	"isa-debug-exit", "pvpanic*", "i6300esb", "ib700", "vmcoreinfo", "vmgenid", "tpm-tis*",
	"tpm-crb", "pci-testdev",
};

/* What they store is somewhere else, and no disk of query-block */
static const char * const stores[] = {
	"vhost-user-blk*", "vhost-user-scsi*", "vhost-scsi*", "vhost-user-fs*", "virtio-9p-*",
	"virtio-pmem*", "nvdimm", "usb-mtp",
};

static bool is_one_of(const char *type, const char * const *patterns, size_t n)
{
	while (n--) {
		if (!fnmatch(patterns[n], type, 0))
			return true;
	}
	return false;
}

#define IS_ONE_OF(type, list)	is_one_of(type, list, sizeof(list) / sizeof((list)[0]))

static int check_device(const struct guest_opts *opts, const char *name, const char *type,
			struct kc_err *err)
{
	if (IS_ONE_OF(type, known) ||
	    is_one_of(type, opts->trusted_devices, opts->nr_trusted_devices))
		return 0;
	if (!IS_ONE_OF(type, stores))
		return kc_fail(err, EOPNOTSUPP,
			       "device %s is a %s, which may have a state that is not in an epoch.  If you know that it has none, say --trust-device %s",
			       name, type, type);
	if (opts->external_disks)
		return 0;
	return kc_fail(err, EOPNOTSUPP,
		       "device %s is a %s: what it stores is not replicated, and a guest that is resumed from an epoch would find it as of later.  Say --disk external if storage goes back to the same epoch by other means",
		       name, type);
}

/* Those that were not part of the machine anyway: of -device, -drive and the like, and plugged */
static int check_peripherals(struct guest *g, const char *path, struct kc_err *err)
{
	struct json_object *args = json_object_new_object(), *list = NULL;
	char type[200];
	size_t i;
	int rc;

	json_object_object_add(args, "path", json_object_new_string(path));
	rc = qmp_call(&g->qmp, "qom-list", args, &list, err);
	if (rc)
		return rc;
	if (!json_object_is_type(list, json_type_array))
		rc = kc_fail(err, EPROTO, "QEMU's answer to qom-list makes no sense");
	for (i = 0; !rc && i < json_object_array_length(list); i++) {
		struct json_object *o = json_object_array_get_idx(list, i);

		if (sscanf(qmp_str(o, "type"), "child<%199[^>]>", type) != 1)
			continue;
		rc = check_device(&g->opts, qmp_str(o, "name"), type, err);
		g->has_balloon |= !strncmp(type, "virtio-balloon", strlen("virtio-balloon"));
	}
	json_object_put(list);
	return rc;
}

/* json-c does not ask twice */
int guest_call_list(struct guest *g, const char *command, struct json_object **list,
		     struct kc_err *err)
{
	int rc = qmp_call(&g->qmp, command, NULL, list, err);

	if (rc || json_object_is_type(*list, json_type_array))
		return rc;
	json_object_put(*list);
	return kc_fail(err, EPROTO, "QEMU's answer to %s makes no sense", command);
}

/* By which it is known in the epochs: the same each time QEMU is started */
static const char *disk_name(struct json_object *d, struct json_object *inserted)
{
	const char *name = qmp_str(d, "device");

	if (!*name)
		name = qmp_str(d, "qdev");
	return *name ? name : qmp_str(inserted, "node-name");
}

static bool is_chosen(const struct guest_opts *opts, struct json_object *d,
		      struct json_object *inserted)
{
	unsigned int i;

	for (i = 0; i < opts->nr_disks; i++) {
		if (!strcmp(opts->disks[i], qmp_str(d, "device")) ||
		    !strcmp(opts->disks[i], qmp_str(d, "qdev")) ||
		    !strcmp(opts->disks[i], qmp_str(inserted, "node-name")))
			return true;
	}
	return !opts->nr_disks;
}

/* One more that is part of epochs */
static int add_disk(struct guest *g, struct json_object *d, struct json_object *inserted,
		    struct kc_err *err)
{
	const char *name = disk_name(d, inserted);
	struct json_object *image = NULL;
	uint64_t size;
	struct kc_disk *is;

	json_object_object_get_ex(inserted, "image", &image);
	size = image ? qmp_u64(image, "virtual-size") : 0;
	if (!size || size % KC_PAGE_SIZE)
		return kc_fail(err, EOPNOTSUPP,
			       "disk %s has %lu bytes: only disks whose size is a multiple of %u can be part of epochs; say --disk external if it is taken care of",
			       name, size, KC_PAGE_SIZE);
	if (g->id.nr_disks == KC_MAX_DISKS)
		return kc_fail(err, EOPNOTSUPP, "the guest has more than %u writable disks",
			       KC_MAX_DISKS);
	snprintf(g->disk_nodes[g->id.nr_disks], sizeof(g->disk_nodes[0]), "%s",
		 *qmp_str(d, "device") ? qmp_str(d, "device") : qmp_str(inserted, "node-name"));
	is = &g->disk_ids[g->id.nr_disks++];
	is->npages = size / KC_PAGE_SIZE;
	snprintf(is->name, sizeof(is->name), "%s", name);
	return 0;
}

static int check_disks(struct guest *g, struct kc_err *err)
{
	struct json_object *disks = NULL, *inserted;
	uint32_t before = g->id.nr_disks;
	size_t i;
	int rc;

	if (g->opts.external_disks)
		return 0;
	g->id.nr_disks = 0;
	rc = guest_call_list(g, "query-block", &disks, err);
	if (rc)
		return rc;
	for (i = 0; !rc && i < json_object_array_length(disks); i++) {
		struct json_object *d = json_object_array_get_idx(disks, i);

		if (!json_object_object_get_ex(d, "inserted", &inserted) ||
		    qmp_bool(inserted, "ro") || !is_chosen(&g->opts, d, inserted))
			continue;
		rc = add_disk(g, d, inserted, err);
	}
	json_object_put(disks);
	if (!rc && g->id.nr_disks < g->opts.nr_disks)
		rc = kc_fail(err, EOPNOTSUPP, "the guest has only %u of the %u disks of --disk node=NAME",
			     g->id.nr_disks, g->opts.nr_disks);
	if (!rc && g->generation && g->id.nr_disks != before)
		rc = kc_fail(err, ESTALE, "the guest has %u writable disks, and had %u: protect it anew",
			     g->id.nr_disks, before);
	return rc;
}

int guest_check_attached(struct guest *g, struct kc_err *err)
{
	int rc = check_disks(g, err);

	if (!rc)
		rc = check_peripherals(g, "/machine/peripheral", err);
	return rc ? rc : check_peripherals(g, "/machine/peripheral-anon", err);
}
