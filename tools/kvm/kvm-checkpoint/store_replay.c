// SPDX-License-Identifier: GPL-2.0-only
/*
 * Reading chains of epochs, and checking all of what is in them.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "store_internal.h"

bool kc_store_progress;

struct replay {
	const struct kc_store_ops *ops;
	void *ctx;
	uint64_t done, total, shown_us;		/* for progress, in bytes */
	size_t file;
	uint64_t offset, base;
	struct kc_devices state;
};

static uint64_t replay_last(void *ctx)
{
	return ((struct replay *)ctx)->base;
}

static int replay_begin(void *ctx, const struct kc_begin *b, struct kc_err *err)
{
	(void)ctx;
	(void)b;
	(void)err;
	return 0;
}

static const struct kc_devices *replay_base_state(void *ctx)
{
	return &((struct replay *)ctx)->state;
}

static int replay_page(void *ctx, uint16_t block, uint64_t page, const void *data,
		       struct kc_err *err)
{
	struct replay *r = ctx;

	return r->ops && r->ops->page ?
	       r->ops->page(r->ctx, r->file, r->offset, block, page, data, err) : 0;
}

static int replay_zero(void *ctx, const struct kc_zero *z, struct kc_err *err)
{
	struct replay *r = ctx;

	return r->ops && r->ops->zero ?
	       r->ops->zero(r->ctx, z->block, z->page, z->npages, err) : 0;
}

static int replay_part(void *ctx, const struct kc_part *part, struct kc_err *err)
{
	struct replay *r = ctx;

	return r->ops && r->ops->part ? r->ops->part(r->ctx, r->file, r->offset, part, err) : 0;
}

static int replay_commit(void *ctx, uint64_t nr, const struct kc_devices *state,
			 struct kc_err *err)
{
	struct replay *r = ctx;
	int rc = kc_devices_keep(&r->state, state, err);

	if (rc)
		return rc;
	r->base = nr;
	return 0;
}

static void replay_abort(void *ctx)
{
	(void)ctx;
}

/* No differences between versions of a page in files, so no base. */
static const struct kc_rx_ops replay_ops = {
	.last = replay_last,
	.begin = replay_begin,
	.base_state = replay_base_state,
	.page = replay_page,
	.zero = replay_zero,
	.part = replay_part,
	.commit = replay_commit,
	.abort = replay_abort,
};

/* Five times a second. */
static void show_progress(struct replay *r, bool end)
{
	uint64_t now = kc_now_us();

	if (!kc_store_progress || (end && !r->shown_us))
		return;
	if (end)
		fprintf(stderr, "\r\033[K");
	else if (now - r->shown_us > 200000)
		fprintf(stderr, "\r\033[Kreading: %" PRIu64 " of %" PRIu64 " MiB",
			(r->done + r->offset) >> 20, r->total >> 20);
	else
		return;
	r->shown_us = now;
}

/* The records of one file up to its end; @done: it had a COMMIT. */
static int replay_records(struct replay *r, struct kc_io *io, struct kc_rx *rx, bool *done,
			  struct kc_err *err)
{
	struct kc_rec rec;
	uint64_t n = 0;
	int rc;

	for (;;) {
		r->offset = kc_io_offset(io);
		if (!(++n % 4096))
			show_progress(r, false);
		rc = kc_io_record(io, 0, &rec, err);
		if (rc == -ENODATA)
			return 0;
		if (rc == -ECONNRESET)
			return kc_fail(err, EPROTO, "it ends in the middle of a record");
		if (rc)
			return rc;
		if (*done)
			return kc_fail(err, EPROTO, "something follows its end");
		rc = kc_rx_record(rx, &rec, err);
		if (rc == KC_COMMIT)
			*done = true;
		else if (rc > 0 && rc != KC_HEARTBEAT)
			return kc_fail(err, EPROTO, "it has a record of type %u", rec.type);
		else if (rc < 0)
			return rc;
	}
}

/* @fd: of the file, which this closes; or -1. */
static int replay_file(struct replay *r, const struct kc_store *st, const struct kc_store_file *f,
		       int fd, struct kc_err *err)
{
	struct kc_rx *rx = NULL;
	struct kc_hello hello;
	struct kc_rec rec;
	struct kc_io *io;
	bool done = false;
	int rc;

	if (fd < 0)
		fd = kc_store_open_file(st, f->nr);
	if (fd < 0)
		return kc_fail(err, errno == ENOENT ? ESTALE : errno, "%s", strerror(errno));
	posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
	io = kc_io_file(fd, NULL, 0);
	if (!io) {
		close(fd);
		return kc_fail(err, ENOMEM, "out of memory");
	}
	rc = kc_io_record(io, 0, &rec, err);
	if (!rc)
		rc = kc_get_hello(&rec, &hello, err);
	if (!rc) {
		rc = kc_guest_same(&st->guest, &hello.guest, err);
		kc_guest_free(&hello.guest);
	}
	if (!rc) {
		rx = kc_rx_new(&st->guest, &replay_ops, r);
		if (!rx)
			rc = kc_fail(err, ENOMEM, "out of memory");
	}
	if (!rc)
		rc = replay_records(r, io, rx, &done, err);
	if (!rc && (!done || r->base != f->nr))
		rc = kc_fail(err, EPROTO, "its end is missing");
	kc_rx_free(rx);
	kc_io_close(io);
	return rc;
}

int kc_store_replay(const struct kc_store *st, const size_t *chain, size_t n,
		    const struct kc_store_ops *ops, void *ctx, struct kc_devices *state,
		    size_t *sound, struct kc_err *err)
{
	struct replay r = { .ops = ops, .ctx = ctx };
	int *fds = malloc((n + 1) * sizeof(*fds));
	struct kc_err why = { "" };
	size_t i, nr_fds;
	char name[40];
	int rc = 0;

	if (!fds)
		return kc_fail(err, ENOMEM, "out of memory");
	for (i = 0; i < n; i++)
		r.total += st->files[chain[i]].bytes;
	/* All of them first: reading takes long, and what is open cannot be merged away. */
	for (nr_fds = 0; nr_fds < n; nr_fds++) {
		fds[nr_fds] = kc_store_open_file(st, st->files[chain[nr_fds]].nr);
		if (fds[nr_fds] < 0)
			break;
	}
	if (nr_fds < n && errno == ENOENT) {
		kc_store_file_name(name, st->files[chain[nr_fds]].nr);
		rc = kc_fail(err, ESTALE, "%s/%s was removed", st->path, name);
	}
	/* Another error is met again when it is the file's turn, if it is still there. */
	for (i = 0; i < n && !rc; i++) {
		r.file = i;
		rc = replay_file(&r, st, &st->files[chain[i]], i < nr_fds ? fds[i] : -1, &why);
		r.done += st->files[chain[i]].bytes;
		if (rc) {
			kc_store_file_name(name, st->files[chain[i]].nr);
			kc_fail(err, -rc, "%s/%s: %s", st->path, name, why.text);
		} else if (sound) {
			*sound = i + 1;
		}
	}
	while (nr_fds > i)
		close(fds[--nr_fds]);
	free(fds);
	show_progress(&r, true);
	if (!rc && state) {
		free(state->data);
		*state = r.state;
	} else {
		free(r.state.data);
	}
	return rc;
}
