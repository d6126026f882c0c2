// SPDX-License-Identifier: GPL-2.0-only
/*
 * A directory of epochs as a sink.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backend.h"
#include "store_internal.h"

struct store_sink {
	struct kc_store store;		/* the files; ours alone to change but for merging */
	struct kc_sink *s;
	int lock, fd;
	uint8_t *buf;
	size_t fill;
	uint64_t bytes;			/* of the open file */
	/* For digests: of the last epoch, and what the open one has brought. */
	bool placed;
	struct kc_place place;
	size_t *chain, nr_chain;
	uint64_t scanned;
	/* Merging, in a thread of its own. */
	bool merging;
	_Atomic bool merged;
	pthread_t merger;
	uint64_t merge_nr, merged_bytes;
	int merge_rc;
};

#define SINK_BUF (256u << 10)

static struct store_sink *of(struct kc_sink *s)
{
	return s->ctx;
}

static int sink_error(struct store_sink *ss, struct kc_err *err)
{
	return kc_fail(err, errno, "cannot write to %s: %s", ss->store.path, strerror(errno));
}

static void unplace(struct store_sink *ss)
{
	if (ss->placed)
		kc_place_free(&ss->place);
	free(ss->chain);
	ss->chain = NULL;
	ss->placed = false;
}

static int write_fd(int fd, const uint8_t *p, size_t len)
{
	ssize_t n;

	for (; len; p += n, len -= n) {
		n = write(fd, p, len);
		if (n < 0 && errno == EINTR)
			n = 0;
		if (n < 0)
			return -1;
	}
	return 0;
}

static int sink_flush(struct store_sink *ss, struct kc_err *err)
{
	size_t n = ss->fill;

	ss->fill = 0;
	return write_fd(ss->fd, ss->buf, n) ? sink_error(ss, err) : 0;
}

static int store_write(struct kc_sink *s, const void *data, size_t len, struct kc_err *err)
{
	struct store_sink *ss = of(s);
	const uint8_t *p = data;
	size_t n;
	int rc;

	ss->bytes += len;
	while (len) {
		n = SINK_BUF - ss->fill < len ? SINK_BUF - ss->fill : len;
		memcpy(ss->buf + ss->fill, p, n);
		ss->fill += n;
		p += n;
		len -= n;
		if (ss->fill == SINK_BUF) {
			rc = sink_flush(ss, err);
			if (rc)
				return rc;
		}
	}
	return 0;
}

static void discard(struct store_sink *ss)
{
	if (ss->fd >= 0) {
		close(ss->fd);
		unlinkat(ss->store.dir, KC_STORE_TMP, 0);
	}
	ss->fd = -1;
	ss->fill = 0;
}

static int store_begin(struct kc_sink *s, struct kc_err *err)
{
	static const uint8_t nobody[16];
	struct store_sink *ss = of(s);
	uint8_t *hello;
	size_t n;
	int rc;

	discard(ss);
	ss->bytes = 0;
	ss->fd = openat(ss->store.dir, KC_STORE_TMP,
			O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (ss->fd < 0)
		return sink_error(ss, err);
	hello = malloc(KC_REC_HDR + KC_REC_MAX);
	if (!hello)
		return kc_fail(err, ENOMEM, "out of memory");
	n = kc_put_hello(hello, &s->guest, nobody, 0);
	ss->scanned = n;
	rc = store_write(s, hello, n, err);
	free(hello);
	return rc;
}

static int add_file(struct store_sink *ss, const struct kc_begin *b)
{
	struct kc_store *st = &ss->store;
	struct kc_store_file *f = realloc(st->files, (st->nr_files + 1) * sizeof(*f));

	if (!f)
		return -ENOMEM;
	st->files = f;
	f[st->nr_files++] = (struct kc_store_file){
		.nr = b->nr, .base = b->base, .flags = b->flags, .bytes = ss->bytes,
	};
	return 0;
}

/*
 * Remove files with a lower number; those who are not there are as good as removed.  The
 * newest first: each needs older ones, and whoever is killed in the midst of it leaves only
 * such as are whole.
 */
static void remove_older(struct store_sink *ss, uint64_t nr)
{
	struct kc_store *st = &ss->store;
	char name[40];
	size_t i, n = 0;

	while (n < st->nr_files && st->files[n].nr < nr)
		n++;
	for (i = n; i--; ) {
		kc_store_file_name(name, st->files[i].nr);
		unlinkat(st->dir, name, 0);
	}
	st->nr_files -= n;
	memmove(st->files, st->files + n, st->nr_files * sizeof(*st->files));
}

static void *merger(void *arg)
{
	struct store_sink *ss = arg;
	struct kc_err err = { "" };

	ss->merge_rc = kc_store_merge(ss->store.path, ss->merge_nr, &ss->merged_bytes, &err);
	if (ss->merge_rc)
		kc_log(KC_LOG_WARN, "cannot merge old epochs: %s", err.text);
	ss->merged = true;
	return NULL;
}

/* Take over what the merger did, if it is done or has to be. */
static void reap_merger(struct store_sink *ss, bool wait)
{
	ssize_t i;

	if (!ss->merging || (!wait && !ss->merged))
		return;
	pthread_join(ss->merger, NULL);
	ss->merging = false;
	ss->merged = false;
	if (ss->merge_rc)
		return;
	i = kc_store_find(&ss->store, ss->merge_nr);
	if (i >= 0) {
		ss->store.files[i].flags = KC_EPOCH_FULL;
		ss->store.files[i].base = 0;
		ss->store.files[i].bytes = ss->merged_bytes;
	}
	remove_older(ss, ss->merge_nr);
}

/*
 * Merge when the epochs that need not be kept have become as large as the full one, or many: then
 * what is written twice is at most as much as what is written anyway.
 */
static void consolidate(struct store_sink *ss)
{
	struct kc_store *st = &ss->store;
	unsigned int keep = ss->s->opts.keep;
	uint64_t bytes = 0;
	size_t first, last, i;

	reap_merger(ss, false);
	if (ss->merging || st->nr_files <= keep)
		return;
	/* Files from last on are kept; the one at last becomes full. */
	last = st->nr_files - keep;
	for (first = last; first > 0 && st->files[first].flags != KC_EPOCH_FULL; first--)
		;
	if (st->files[first].flags != KC_EPOCH_FULL)
		return;
	/* Whatever is older than a full epoch which need not be kept either. */
	if (first)
		remove_older(ss, st->files[first].nr);
	last -= first;
	for (i = 1; i <= last; i++)
		bytes += st->files[i].bytes;
	if (!last || (bytes < st->files[0].bytes && last < 500))
		return;
	ss->merge_nr = st->files[last].nr;
	ss->merged = false;
	ss->merging = !pthread_create(&ss->merger, NULL, merger, ss);
}

static int store_commit(struct kc_sink *s, struct kc_err *err)
{
	struct store_sink *ss = of(s);
	char name[40];
	int rc;

	unplace(ss);
	rc = sink_flush(ss, err);
	if (!rc && fdatasync(ss->fd))
		rc = sink_error(ss, err);
	kc_store_file_name(name, s->begin.nr);
	if (!rc && renameat(ss->store.dir, KC_STORE_TMP, ss->store.dir, name))
		rc = sink_error(ss, err);
	if (rc) {
		discard(ss);
		return rc;
	}
	close(ss->fd);
	ss->fd = -1;
	if (fsync(ss->store.dir))
		return sink_error(ss, err);
	if (add_file(ss, &s->begin))
		return kc_fail(err, ENOMEM, "out of memory");
	kc_sink_acked(s, s->begin.nr);
	consolidate(ss);
	return 0;
}

static int store_abort(struct kc_sink *s, struct kc_err *err)
{
	(void)err;
	unplace(of(s));
	discard(of(s));
	return 0;
}

static int store_poll(struct kc_sink *s, struct kc_err *err)
{
	(void)s;
	(void)err;
	return 0;
}

/* What the open epoch has brought since the last time. */
static int scan_open(struct store_sink *ss, struct kc_err *err)
{
	struct kc_page p;
	struct kc_zero z;
	struct kc_part part;
	struct kc_rec rec;
	struct kc_io *io;
	uint64_t at;
	int fd, rc;

	rc = sink_flush(ss, err);
	if (rc)
		return rc;
	fd = openat(ss->store.dir, KC_STORE_TMP, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0 || lseek(fd, ss->scanned, SEEK_SET) < 0)
		return sink_error(ss, err);
	io = kc_io_file(fd, NULL, 0);
	if (!io) {
		close(fd);
		return kc_fail(err, ENOMEM, "out of memory");
	}
	for (;;) {
		at = ss->scanned + kc_io_offset(io);
		rc = kc_io_record(io, 0, &rec, err);
		if (rc)
			break;
		if (rec.type == KC_PAGE && !kc_get_page(&rec, &p, err) && p.block != KC_STATE_BLOCK)
			rc = kc_place_page(&ss->place, ss->nr_chain, at, p.block, p.page, NULL,
					   err);
		else if (rec.type == KC_ZERO && !kc_get_zero(&rec, &z, err) &&
			 z.block != KC_STATE_BLOCK)
			rc = kc_place_zero(&ss->place, z.block, z.page, z.npages, err);
		else if (rec.type == KC_PART && !kc_get_part(&rec, &part, err))
			rc = kc_place_part(&ss->place, ss->nr_chain, at, &part, err);
		if (rc)
			break;
	}
	ss->scanned = at;
	kc_io_close(io);
	return rc == -ENODATA ? 0 : rc;
}

static int store_digests(struct kc_sink *s, uint32_t block, uint64_t first, uint32_t n,
			 uint8_t *out, struct kc_err *err)
{
	struct store_sink *ss = of(s);
	uint8_t page[KC_PAGE_SIZE];
	ssize_t nr;
	int rc = 0;

	if (!ss->placed) {
		reap_merger(ss, true);
		nr = kc_store_chain(&ss->store, s->base, &ss->chain, err);
		if (nr < 0)
			return nr;
		ss->nr_chain = nr;
		ss->placed = true;
		/* One more for the open epoch. */
		rc = kc_place_init(&ss->place, &s->guest, nr + 1, err);
		if (!rc)
			rc = kc_store_replay(&ss->store, ss->chain, nr, &kc_place_ops, &ss->place,
					     &ss->place.state, NULL, err);
	}
	if (!rc && ss->fd >= 0) {
		ss->place.fds[ss->nr_chain] = ss->fd;
		rc = scan_open(ss, err);
	}
	for (; n && !rc; n--, first++, out += KC_DIGEST_SIZE) {
		rc = kc_place_get(&ss->place, &ss->store, ss->chain, block, first, page, err);
		if (!rc)
			kc_page_digest(page, out);
	}
	/* It is closed by another. */
	if (ss->placed && ss->place.fds)
		ss->place.fds[ss->nr_chain] = -1;
	return rc;
}

static bool store_end(struct kc_sink *s, enum kc_end end)
{
	(void)s;
	(void)end;
	return true;
}

static void store_close(struct kc_sink *s)
{
	struct store_sink *ss = of(s);

	reap_merger(ss, true);
	unplace(ss);
	discard(ss);
	if (ss->lock >= 0)
		close(ss->lock);
	kc_store_free(&ss->store);
	free(ss->buf);
	free(ss);
}

static const struct kc_sink_ops store_ops = {
	.begin = store_begin,
	.write = store_write,
	.commit = store_commit,
	.abort = store_abort,
	.poll = store_poll,
	.digests = store_digests,
	.end = store_end,
	.close = store_close,
};

int kc_store_open(struct kc_sink *s, const char *path, struct kc_err *err)
{
	struct store_sink *ss = calloc(1, sizeof(*ss));
	struct kc_err why;
	size_t i, n;
	int rc;

	if (!ss)
		return kc_fail(err, ENOMEM, "out of memory");
	ss->s = s;
	ss->lock = ss->fd = ss->store.dir = -1;
	s->ops = &store_ops;
	s->ctx = ss;
	ss->buf = malloc(SINK_BUF);
	if (!ss->buf)
		return kc_fail(err, ENOMEM, "out of memory");
	if (!*path || strchr(path, '\n'))
		return kc_fail(err, EINVAL, "\"%s\" is neither tcp:HOST:PORT nor a directory",
			       path);
	if (mkdir(path, 0700) && errno != EEXIST)
		return kc_fail(err, errno, "cannot make %s: %s", path, strerror(errno));
	rc = kc_store_read(path, &ss->store, err);
	if (!rc)
		rc = kc_check_owner(ss->store.dir, path, err);
	if (rc)
		return rc;
	ss->lock = openat(ss->store.dir, "lock", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (ss->lock < 0)
		return sink_error(ss, err);
	if (!kc_lock(ss->lock, kc_try_flock))
		return kc_fail(err, EBUSY, "another kvm-checkpoint writes to %s", path);
	/* Nobody else writes now: what is temporary is of the past. */
	unlinkat(ss->store.dir, KC_STORE_TMP, 0);
	unlinkat(ss->store.dir, KC_STORE_MERGE_TMP, 0);
	kc_store_free(&ss->store);
	rc = kc_store_read(path, &ss->store, err);
	if (rc)
		return rc;
	if (!ss->store.has_guest) {
		if (ss->store.nr_files)
			return kc_fail(err, EPROTO,
				       "all epochs in %s are damaged: use another directory", path);
		if (kc_guest_copy(&ss->store.guest, &s->guest))
			return kc_fail(err, ENOMEM, "out of memory");
		ss->store.has_guest = true;
		return 0;
	}
	if (kc_guest_same(&ss->store.guest, &s->guest, &why))
		return kc_fail(err, EEXIST, "cannot write to %s: %s", path, why.text);
	kc_log(KC_LOG_INFO, "checking the %zu epochs in %s", ss->store.nr_files, path);
	rc = kc_store_last_sound(&ss->store, &s->last_epoch, err);
	if (rc)
		return rc;
	s->has_ram = s->last_epoch;
	/* What comes after it is damaged and can only be in the way. */
	for (i = n = 0; i < ss->store.nr_files; i++) {
		char name[40], aside[64];

		if (ss->store.files[i].nr <= s->last_epoch) {
			ss->store.files[n++] = ss->store.files[i];
			continue;
		}
		kc_store_file_name(name, ss->store.files[i].nr);
		snprintf(aside, sizeof(aside), "damaged-%s", name);
		kc_log(KC_LOG_WARN, "setting %s/%s aside as %s: it is no sound epoch", path, name,
		       aside);
		if (renameat(ss->store.dir, name, ss->store.dir, aside))
			return sink_error(ss, err);
	}
	ss->store.nr_files = n;
	return 0;
}
