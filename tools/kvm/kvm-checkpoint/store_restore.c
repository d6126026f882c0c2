// SPDX-License-Identifier: GPL-2.0-only
/*
 * Writing an epoch of a directory to files of RAM and device state.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store_internal.h"

struct restore {
	const char *out;
	int dir;
	int fd[KC_MAX_BLOCKS];
	struct kc_devices state;
};

static int restore_error(struct restore *r, struct kc_err *err)
{
	return kc_fail(err, errno, "cannot write to %s: %s", r->out, strerror(errno));
}

static int restore_page(void *ctx, size_t file, uint64_t offset, uint16_t block, uint64_t page,
			const void *data, struct kc_err *err)
{
	struct restore *r = ctx;
	ssize_t n;

	(void)file;
	(void)offset;
	n = pwrite(r->fd[block], data, KC_PAGE_SIZE, page * KC_PAGE_SIZE);
	if (n >= 0 && n != (ssize_t)KC_PAGE_SIZE)
		errno = ENOSPC;
	return n == (ssize_t)KC_PAGE_SIZE ? 0 : restore_error(r, err);
}

static int restore_zero(void *ctx, uint16_t block, uint64_t page, uint64_t n, struct kc_err *err)
{
	static const uint8_t zeros[KC_PAGE_SIZE];
	struct restore *r = ctx;
	int rc = 0;

	if (!fallocate(r->fd[block], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		       page * KC_PAGE_SIZE, n * KC_PAGE_SIZE))
		return 0;
	for (; n && !rc; n--, page++)
		rc = restore_page(r, 0, 0, block, page, zeros, err);
	return rc;
}

static const struct kc_store_ops restore_ops = {
	.page = restore_page,
	.zero = restore_zero,
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
	rc = kc_store_replay(st, chain, n, &restore_ops, r, &r->state, NULL, err);
	if (rc)
		return rc;
	fd = new_file(r, "state", 0, err);
	if (fd < 0)
		return fd;
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
	return rc;
}

int kc_store_restore(const struct kc_store *st, uint64_t nr, const char *out, uint64_t *got,
		     bool *stopped, struct kc_err *err)
{
	struct restore r = { .out = out, .dir = -1 };
	char name[16];
	size_t *chain;
	ssize_t n;
	uint32_t i;
	int rc = 0;

	if (!st->nr_files)
		return kc_fail(err, ENOENT, "%s holds no epochs", st->path);
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
	for (i = 0; i < KC_MAX_BLOCKS; i++) {
		if (r.fd[i] < 0)
			continue;
		close(r.fd[i]);
		/* Never half of a checkpoint. */
		snprintf(name, sizeof(name), "ram%u", i);
		if (rc)
			unlinkat(r.dir, name, 0);
	}
	if (r.dir >= 0)
		close(r.dir);
	free(r.state.data);
	free(chain);
	*got = nr;
	*stopped = r.state.stopped;
	return rc;
}
