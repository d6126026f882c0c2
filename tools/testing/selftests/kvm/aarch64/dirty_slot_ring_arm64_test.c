// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings: what only arm64 has.  Tables of the GIC that KVM saves into guest
 * memory for userspace, memory tags, stolen time.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <linux/sizes.h>

#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"

/* These want the types of the library. */
#include "gic.h"
#include "gic_v3.h"
#include "gic_v3_its.h"
#include "vgic.h"

#include "dirty_slot_ring_test.h"

/* The GIC's memory, at the start of TEST_SLOT: 64 KiB for each. */
enum { DEVICES, COLLECTIONS, COMMANDS, TRANSLATIONS, CONFIG, PENDING, NR_AREAS };

#define AREA_PAGES	(SZ_64K / PG)
#define AREA(a)		((a) * SZ_64K)
#define NR_EVENTS	16
#define FIRST_LPI	8192

static void guest_its(void)
{
	void *commands = (void *)(TEST_GVA + AREA(COMMANDS));
	int event;

	gic_init(GIC_V3, 1);
	gic_rdist_enable_lpis(TEST_GPA + AREA(CONFIG), SZ_64K, TEST_GPA + AREA(PENDING));
	its_init(TEST_GPA + AREA(COLLECTIONS), SZ_64K, TEST_GPA + AREA(DEVICES), SZ_64K,
		 TEST_GPA + AREA(COMMANDS), SZ_64K);
	its_send_mapc_cmd(commands, 0, 0, true);
	its_send_mapd_cmd(commands, 0, TEST_GPA + AREA(TRANSLATIONS), SZ_64K, true);
	for (event = 0; event < NR_EVENTS; event++)
		its_send_mapti_cmd(commands, 0, event, 0, FIRST_LPI + event);
	its_send_invall_cmd(commands, 0);
	guest_exit();
}

/* No vCPU runs when userspace has the GIC's tables saved. */
TEST(gic_tables_without_a_vcpu)
{
	struct dsr *v = dsr_new(.npages = NR_AREAS * AREA_PAGES, .entries = 64, .max_vcpus = 1);
	uint8_t *mem = addr_gpa2hva(v->vm, TEST_GPA), *want = set_new(v);
	struct kvm_msi msi = {
		.address_lo = GITS_BASE_GPA + GITS_TRANSLATER, .flags = KVM_MSI_VALID_DEVID,
	};
	int gic, its, i;

	v->vcpu[0] = vm_vcpu_add(v->vm, 0, guest_its);
	gic = vgic_v3_setup(v->vm, 1, 64);
	if (gic < 0)
		SKIP(return, "no GICv3");
	its = vgic_its_setup(v->vm);
	memset(mem + AREA(CONFIG), 0xa0 | LPI_PROP_GROUP1 | LPI_PROP_ENABLED, SZ_64K);
	CHECK(run_vcpu(v->vcpu[0]), "exit on a full ring nobody asked for");
	/* The commands. */
	set_add(want, COMMANDS * AREA_PAGES, 1, 1);
	expect_set(v, want);

	memset(want, 0, v->npages);
	set_add(want, DEVICES * AREA_PAGES, 1, 1);
	set_add(want, COLLECTIONS * AREA_PAGES, 1, 1);
	set_add(want, TRANSLATIONS * AREA_PAGES, 1, 1);
	for (i = 0; i < 3; i++) {
		kvm_device_attr_set(its, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_ITS_SAVE_TABLES,
				    NULL);
		expect_set(v, want);
		CHECK(*(uint64_t *)(mem + AREA(DEVICES)), "no entry in the table of devices");
	}

	/* An interrupt that waits for its vCPU. */
	expect_nothing(v);
	CHECK_EQ(__vm_ioctl(v->vm, KVM_SIGNAL_MSI, &msi), 1);
	kvm_device_attr_set(gic, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES,
			    NULL);
	CHECK_EQ(mem[AREA(PENDING) + FIRST_LPI / 8], 1);
	expect(v, PENDING * AREA_PAGES, 1);

	free(want);
	close(its);
	close(gic);
	dsr_free(v);
}

static long copy_tags(struct dsr *v, uint64_t page, void *tags, uint64_t flags)
{
	struct kvm_arm_copy_mte_tags args = {
		.guest_ipa = TEST_GPA + page * PG, .length = PG, .addr = tags, .flags = flags,
	};

	return ioctl(v->vm->fd, KVM_ARM_MTE_COPY_TAGS, &args);
}

/*
 * Tags are no page's contents that a log could tell of: KVM lets nobody but the guest
 * write them while a memslot logs.
 */
TEST(tags_are_not_written_beside_a_log)
{
	uint8_t tags[PG / 16], more[PG / 16];
	struct dsr *v;

	if (!kvm_has_cap(KVM_CAP_ARM_MTE))
		SKIP(return, "no memory tags");

	v = dsr_new(.entries = 64, .no_log = true);
	vm_enable_cap(v->vm, KVM_CAP_ARM_MTE, 0);
	memset(tags, 5, sizeof(tags));
	CHECK_EQ(copy_tags(v, 7, tags, 0), PG);

	dsr_log(v, true);
	dsr_reopen(v);
	CHECK_ERR(copy_tags(v, 7, tags, 0), EBUSY);
	memset(more, 0, sizeof(more));
	CHECK_EQ(copy_tags(v, 7, more, KVM_ARM_TAGS_FROM_GUEST), PG);
	CHECK(!memcmp(tags, more, sizeof(tags)), "other tags were read than written");
	expect_nothing(v);

	dsr_log(v, false);
	CHECK_EQ(copy_tags(v, 7, tags, 0), PG);
	dsr_free(v);
}

/* KVM writes a vCPU's stolen time when it enters the guest, each time it was not there. */
TEST(write_by_kvm_stolen_time)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	uint64_t *mem = addr_gpa2hva(v->vm, TEST_GPA), last;
	int i;

	if (!guest_set_steal_time(v->vcpu[0], TEST_GPA + 200 * PG))
		SKIP(return, "no stolen time here");
	for (i = 0; i < 3; i++) {
		last = mem[200 * PG / 8 + 1];
		guest_run(v, 0, (struct mailbox){ .op = OP_NONE });
		expect(v, 200, 1);
		CHECK(mem[200 * PG / 8 + 1] >= last, "stolen time runs backwards");
	}
	dsr_free(v);
}

int main(int argc, char *argv[])
{
	return dsr_test_main(argc, argv);
}
