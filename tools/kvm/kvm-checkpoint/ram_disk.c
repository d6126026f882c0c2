// SPDX-License-Identifier: GPL-2.0-only
/*
 * The RAM that a standby holds: the guest's disks, which are part of its epochs.
 *
 * Images stay where they are; in the directory of the RAM there are links to them, disk0, disk1, ...
 * Until QEMU gets them they are locked as QEMU locks images that it writes to, so that nobody starts
 * the guest with them meanwhile.  They are written, not mapped: a file system that is full is an
 * error then, and what could not be applied is in redo still.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "image.h"
#include "ram_internal.h"

static void link_name(char name[16], unsigned int disk)
{
	snprintf(name, 16, "disk%u", disk);
}

int kc_ram_set_disks(struct kc_ram *ram, const char *const *paths, unsigned int nr,
		     struct kc_err *err)
{
	unsigned int i;

	if (ram->has_guest && nr != ram->guest.nr_disks)
		return kc_fail(err, EINVAL, "the guest in %s has %u disks: say --disk PATH %u times",
			       ram->path, ram->guest.nr_disks, ram->guest.nr_disks);
	for (i = 0; i < nr; i++) {
		char *path, *is;
		int fd;

		/* One that is not there is made when its size is known */
		fd = open(paths[i], O_RDWR | O_CREAT | O_CLOEXEC, 0600);
		if (fd < 0)
			return kc_fail(err, errno, "cannot open disk image %s: %s", paths[i],
				       strerror(errno));
		close(fd);
		path = realpath(paths[i], NULL);
		if (!path)
			return kc_fail(err, errno, "cannot open disk image %s: %s", paths[i],
				       strerror(errno));
		is = ram->disk_path[i];
		if (ram->has_guest && is && strcmp(is, path)) {
			int rc = kc_fail(err, EEXIST,
					 "disk %u of the guest in %s is %s, not %s: give the standby another --ram-dir, or remove its old one",
					 i, ram->path, is, path);
			free(path);
			return rc;
		}
		/* With epochs it has those that they are of */
		if (ram->has_guest && (is || ram->epoch)) {
			free(path);
			continue;
		}
		free(is);
		ram->disk_path[i] = path;
	}
	ram->nr_paths = nr;
	return 0;
}

/* @new: it is no one's disk yet */
static int open_image(struct kc_ram *ram, unsigned int i, bool new, struct kc_err *err)
{
	uint64_t want = ram->guest.disks[i].npages * KC_PAGE_SIZE;
	const char *path = ram->disk_path[i];
	int64_t size;
	int fd, rc;

	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return kc_fail(err, errno, "cannot open disk image %s: %s", path, strerror(errno));
	rc = kc_image_lock(fd, path, err);
	size = kc_image_size(fd);
	if (!rc && new && !size && ftruncate(fd, want))
		rc = kc_fail(err, errno, "cannot make disk image %s: %s", path, strerror(errno));
	else if (!rc && new && !size)
		size = want;
	if (!rc && new && !kc_image_is_raw(fd))
		rc = kc_fail(err, EOPNOTSUPP,
			     "disk image %s is not raw: only raw images and block devices are kept at a standby",
			     path);
	if (!rc && size != (int64_t)want)
		rc = kc_fail(err, EOPNOTSUPP,
			     "disk image %s has %" PRId64 " bytes, and the guest's disk %s %" PRIu64,
			     path, size, ram->guest.disks[i].name, want);
	if (rc) {
		close(fd);
		return rc;
	}
	ram->disk[i] = fd;
	return 0;
}

/* It is this one from now on */
static int new_disk(struct kc_ram *ram, unsigned int i, struct kc_err *err)
{
	char name[16];
	int rc;

	rc = open_image(ram, i, true, err);
	if (rc)
		return rc;
	link_name(name, i);
	unlinkat(ram->dir, name, 0);
	if (symlinkat(ram->disk_path[i], ram->dir, name))
		return kc_ram_fail(err, ram, "make a link to a disk image");
	return 0;
}

void kc_ram_leave_disks_out(struct kc_ram *ram)
{
	ram->without_disks = true;
}

int kc_ram_new_disks(struct kc_ram *ram, struct kc_err *err)
{
	unsigned int i;
	int rc = 0;

	if (ram->without_disks)
		return 0;
	if (ram->nr_paths != ram->guest.nr_disks)
		return kc_fail(err, EOPNOTSUPP,
			       "the guest has %u disks that are part of its epochs, and the standby was given %u images by --disk PATH",
			       ram->guest.nr_disks, ram->nr_paths);
	for (i = 0; i < ram->guest.nr_disks && !rc; i++)
		rc = new_disk(ram, i, err);
	return rc;
}

int kc_ram_open_disks(struct kc_ram *ram, struct kc_err *err)
{
	char name[16], path[4096];
	unsigned int i;
	ssize_t n;
	int rc;

	for (i = 0; i < ram->guest.nr_disks; i++) {
		if (ram->disk[i] >= 0)
			continue;
		link_name(name, i);
		n = readlinkat(ram->dir, name, path, sizeof(path) - 1);
		/* It was left out, and who opens this may not have said yet which it is */
		if (n < 0 && errno == ENOENT && !ram->epoch) {
			if (!ram->disk_path[i])
				continue;
			rc = new_disk(ram, i, err);
			if (!rc)
				rc = kc_ram_sync_dir(ram, err);
			if (rc)
				return rc;
			continue;
		}
		if (n < 0)
			return kc_ram_fail(err, ram, "read the link to a disk image");
		path[n] = '\0';
		free(ram->disk_path[i]);
		ram->disk_path[i] = strdup(path);
		rc = ram->disk_path[i] ? open_image(ram, i, false, err) :
		     kc_fail(err, ENOMEM, "out of memory");
		if (rc)
			return rc;
	}
	return 0;
}

void kc_ram_close_disks(struct kc_ram *ram)
{
	unsigned int i;

	for (i = 0; i < KC_MAX_DISKS; i++) {
		if (ram->disk[i] >= 0)
			close(ram->disk[i]);
		ram->disk[i] = -1;
	}
}

const char *kc_ram_disk_path(const struct kc_ram *ram, unsigned int disk)
{
	return ram->disk_path[disk];
}

int kc_ram_sync_disks(struct kc_ram *ram, struct kc_err *err)
{
	unsigned int i;

	for (i = 0; i < ram->guest.nr_disks; i++) {
		if (ram->disk[i] >= 0 && fdatasync(ram->disk[i]))
			return kc_fail(err, errno, "cannot sync disk image %s: %s",
				       ram->disk_path[i], strerror(errno));
	}
	return 0;
}
