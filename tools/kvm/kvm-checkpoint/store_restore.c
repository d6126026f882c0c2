// SPDX-License-Identifier: GPL-2.0-only
/*
 * Writing an epoch of a directory to files of RAM, device state and disks.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "image.h"
#include "store_internal.h"

struct restore {
	const char *out;
	const char *const *disks;
	int dir;
	int fd[KC_MAX_INDEX];		/* by kc_block_index() */
	bool made[KC_MAX_DISKS];	/* the image, and not found */
	bool made_state;
	struct kc_devices state;
};

static int restore_error(struct restore *r, struct kc_err *err)
{
	return kc_fail(err, errno, "cannot write to %s: %s", r->out, strerror(errno));
}

static int disk_error(struct restore *r, uint32_t disk, struct kc_err *err)
{
	return kc_fail(err, errno, "cannot write to %s: %s", r->disks[disk], strerror(errno));
}

static int restore_bytes(struct restore *r, uint16_t block, uint64_t at, const void *data,
			 size_t len, struct kc_err *err)
{
	ssize_t n = pwrite(r->fd[kc_block_index(block)], data, len, at);

	if (n >= 0 && n != (ssize_t)len)
		errno = ENOSPC;
	if (n == (ssize_t)len)
		return 0;
	return block < KC_DISK_BLOCK ? restore_error(r, err) :
				       disk_error(r, block - KC_DISK_BLOCK, err);
}

static int restore_page(void *ctx, size_t file, uint64_t offset, uint16_t block, uint64_t page,
			const void *data, struct kc_err *err)
{
	(void)file;
	(void)offset;
	return restore_bytes(ctx, block, page * KC_PAGE_SIZE, data, KC_PAGE_SIZE, err);
}

static int restore_zero(void *ctx, uint16_t block, uint64_t page, uint64_t n, struct kc_err *err)
{
	static const uint8_t zeros[KC_PAGE_SIZE];
	struct restore *r = ctx;
	int rc = 0;

	if (!fallocate(r->fd[kc_block_index(block)], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		       page * KC_PAGE_SIZE, n * KC_PAGE_SIZE))
		return 0;
	for (; n && !rc; n--, page++)
		rc = restore_page(r, 0, 0, block, page, zeros, err);
	return rc;
}

static int restore_part(void *ctx, size_t file, uint64_t offset, const struct kc_part *p,
			struct kc_err *err)
{
	(void)file;
	(void)offset;
	return restore_bytes(ctx, p->block, p->page * KC_PAGE_SIZE + p->offset, p->data, p->len, err);
}

static const struct kc_store_ops restore_ops = {
	.page = restore_page,
	.zero = restore_zero,
	.part = restore_part,
};

static int new_file(struct restore *r, const char *name, uint64_t size, struct kc_err *err)
{
	int fd = openat(r->dir, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);

	if (fd < 0 && errno == EEXIST)
		return kc_fail(err, EEXIST, "%s/%s exists: restore to another directory", r->out,
			       name);
	if (fd < 0)
		return restore_error(r, err);
	if (ftruncate(fd, size)) {
		int rc = restore_error(r, err);

		close(fd);
		return rc;
	}
	return fd;
}

/* A new file, or a block device that nobody uses */
static int open_disk(struct restore *r, const struct kc_disk *d, uint32_t disk, struct kc_err *err)
{
	int64_t want = d->npages * KC_PAGE_SIZE;
	const char *path = r->disks[disk];
	struct stat st;
	int fd, rc;

	fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (fd >= 0) {
		r->made[disk] = true;
		r->fd[KC_MAX_BLOCKS + disk] = fd;
		return ftruncate(fd, want) ? disk_error(r, disk, err) : 0;
	}
	if (errno != EEXIST)
		return disk_error(r, disk, err);
	if (stat(path, &st))
		return disk_error(r, disk, err);
	if (!S_ISBLK(st.st_mode))
		return kc_fail(err, EEXIST, "%s exists: restore disk %s to another file", path, d->name);
	/* Of a block device this fails if it is mounted. */
	fd = open(path, O_RDWR | O_EXCL | O_CLOEXEC);
	if (fd < 0)
		return disk_error(r, disk, err);
	r->fd[KC_MAX_BLOCKS + disk] = fd;
	rc = kc_image_lock(fd, path, err);
	if (!rc && kc_image_size(fd) != want)
		rc = kc_fail(err, EINVAL, "%s has %lld bytes, and the guest's disk %s %lld", path,
			     (long long)kc_image_size(fd), d->name, (long long)want);
	return rc;
}

static int restore_to(struct restore *r, const struct kc_store *st, const size_t *chain, size_t n,
		      struct kc_err *err)
{
	char name[16];
	uint32_t i;
	int fd, rc;

	for (i = 0; i < st->guest.nr_blocks; i++) {
		snprintf(name, sizeof(name), "ram%u", i);
		r->fd[i] = new_file(r, name, st->guest.blocks[i].npages * KC_PAGE_SIZE, err);
		if (r->fd[i] < 0)
			return r->fd[i];
	}
	for (i = 0; i < st->guest.nr_disks; i++) {
		rc = open_disk(r, &st->guest.disks[i], i, err);
		if (rc)
			return rc;
	}
	rc = kc_store_replay(st, chain, n, &restore_ops, r, &r->state, NULL, err);
	if (rc)
		return rc;
	fd = new_file(r, "state", 0, err);
	if (fd < 0)
		return fd;
	r->made_state = true;
	for (i = 0; i < r->state.len && !rc;) {
		ssize_t w = write(fd, r->state.data + i, r->state.len - i);

		if (w <= 0)
			rc = restore_error(r, err);
		else
			i += w;
	}
	if (!rc && fsync(fd))
		rc = restore_error(r, err);
	close(fd);
	for (i = 0; i < st->guest.nr_blocks && !rc; i++) {
		if (fsync(r->fd[i]))
			rc = restore_error(r, err);
	}
	for (i = 0; i < st->guest.nr_disks && !rc; i++) {
		if (fsync(r->fd[KC_MAX_BLOCKS + i]))
			rc = disk_error(r, i, err);
	}
	return rc;
}

/* Never half of a checkpoint: if it failed, what was made is removed. */
static void close_all(struct restore *r, bool failed)
{
	char name[16];
	uint32_t i;

	for (i = 0; i < KC_MAX_INDEX; i++) {
		if (r->fd[i] < 0)
			continue;
		close(r->fd[i]);
		snprintf(name, sizeof(name), "ram%u", i);
		if (failed && i < KC_MAX_BLOCKS)
			unlinkat(r->dir, name, 0);
		else if (failed && r->made[i - KC_MAX_BLOCKS])
			unlink(r->disks[i - KC_MAX_BLOCKS]);
	}
	if (failed && r->made_state)
		unlinkat(r->dir, "state", 0);
	if (r->dir >= 0)
		close(r->dir);
	free(r->state.data);
}

int kc_store_restore(const struct kc_store *st, uint64_t nr, const char *out,
		     const char *const *disks, unsigned int nr_disks, uint64_t *got, bool *stopped,
		     struct kc_err *err)
{
	struct restore r = { .out = out, .disks = disks, .dir = -1 };
	size_t *chain;
	ssize_t n;
	int rc = 0;

	if (!st->nr_files)
		return kc_fail(err, ENOENT, "%s holds no epochs", st->path);
	if (st->guest.nr_disks != nr_disks)
		return kc_fail(err, EINVAL,
			       "the epochs in %s have %u disks: say --disk PATH %u times, where to restore each",
			       st->path, st->guest.nr_disks, st->guest.nr_disks);
	if (!nr)
		rc = kc_store_last_sound(st, &nr, err);
	if (rc)
		return rc;
	if (!nr)
		return kc_fail(err, EPROTO, "%s holds no sound epoch", st->path);
	n = kc_store_chain(st, nr, &chain, err);
	if (n < 0)
		return n;
	memset(r.fd, -1, sizeof(r.fd));
	if (mkdir(out, 0700) && errno != EEXIST)
		rc = restore_error(&r, err);
	else
		rc = 0;
	r.dir = open(out, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (!rc && r.dir < 0)
		rc = restore_error(&r, err);
	if (!rc)
		rc = kc_check_owner(r.dir, out, err);
	if (!rc)
		rc = restore_to(&r, st, chain, n, err);
	close_all(&r, rc);
	free(chain);
	*got = nr;
	*stopped = r.state.stopped;
	return rc;
}
