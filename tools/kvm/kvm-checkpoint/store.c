// SPDX-License-Identifier: GPL-2.0-only
/*
 * A directory of epochs, to read, and as a sink.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "backend.h"
#include "store.h"

#define TMP "epoch.tmp"
#define MERGE_TMP "merge.tmp"
/* Of HELLO and BEGIN: what kc_put_hello() makes is smaller than this. */
#define HEAD_MAX (KC_MAX_BLOCKS * (KC_NAME_SIZE + 16) + 1024)

static void file_name(char name[40], uint64_t nr)
{
	snprintf(name, 40, "epoch-%020" PRIu64 ".kc", nr);
}

static int open_file(const struct kc_store *st, uint64_t nr)
{
	char name[40];

	file_name(name, nr);
	return openat(st->dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
}

/* --- Looking -------------------------------------------------------------- */

/* Guest and BEGIN of a file. */
static int read_begin(const struct kc_store *st, struct kc_io *io, struct kc_guest *guest,
		      struct kc_begin *b, uint64_t nr, struct kc_err *err)
{
	struct kc_hello hello;
	struct kc_rec rec;
	int rc;

	rc = kc_io_record(io, 0, &rec, err);
	if (!rc)
		rc = kc_get_hello(&rec, &hello, err);
	if (rc)
		return rc;
	if (st && st->has_guest)
		rc = kc_guest_same(&st->guest, &hello.guest, err);
	if (!rc)
		rc = kc_io_record(io, 0, &rec, err);
	if (!rc && rec.type != KC_BEGIN)
		rc = kc_fail(err, EPROTO, "it does not begin with an epoch");
	if (!rc)
		rc = kc_get_begin(&rec, b, err);
	if (!rc && b->nr != nr)
		rc = kc_fail(err, EPROTO, "it is epoch %" PRIu64, b->nr);
	if (rc)
		kc_guest_free(&hello.guest);
	else
		*guest = hello.guest;
	return rc;
}

static int by_nr(const void *a, const void *b)
{
	const struct kc_store_file *x = a, *y = b;

	return x->nr < y->nr ? -1 : x->nr > y->nr;
}

static int look_at(struct kc_store *st, uint64_t nr, struct kc_store_file *f)
{
	struct kc_guest guest;
	struct kc_begin b;
	struct stat sb;
	struct kc_io *io;
	uint8_t *head;
	ssize_t n;
	int fd, rc;

	memset(f, 0, sizeof(*f));
	f->nr = nr;
	f->damaged = true;
	fd = open_file(st, nr);
	if (fd < 0)
		return errno == ENOENT ? -ENOENT : 0;
	head = malloc(HEAD_MAX);
	n = head && !fstat(fd, &sb) ? pread(fd, head, HEAD_MAX, 0) : -1;
	close(fd);
	io = n < 0 ? NULL : kc_io_file(-1, head, n);
	if (!io) {
		rc = head ? 0 : -ENOMEM;
		free(head);
		return rc;
	}
	f->bytes = sb.st_size;
	f->mtime = sb.st_mtime;
	if (!read_begin(st, io, &guest, &b, nr, NULL)) {
		f->damaged = false;
		f->base = b.base;
		f->flags = b.flags;
		if (!st->has_guest)
			st->guest = guest;
		else
			kc_guest_free(&guest);
		st->has_guest = true;
	}
	kc_io_close(io);
	free(head);
	return 0;
}

int kc_store_read(const char *path, struct kc_store *st, struct kc_err *err)
{
	size_t room = 0, i, n;
	struct dirent *d;
	char name[40];
	uint64_t nr;
	DIR *dir;
	int fd, rc = 0;

	memset(st, 0, sizeof(*st));
	st->dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (st->dir < 0)
		return kc_fail(err, errno, "cannot open %s: %s", path, strerror(errno));
	st->path = strdup(path);
	fd = openat(st->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	dir = fd < 0 ? NULL : fdopendir(fd);
	if (!dir || !st->path) {
		kc_store_free(st);
		return kc_fail(err, ENOMEM, "cannot read %s", path);
	}
	while (!rc && (d = readdir(dir))) {
		if (sscanf(d->d_name, "epoch-%" SCNu64, &nr) != 1)
			continue;
		file_name(name, nr);
		if (strcmp(name, d->d_name))
			continue;
		if (st->nr_files == room) {
			struct kc_store_file *f;

			room = room ? 2 * room : 64;
			f = realloc(st->files, room * sizeof(*f));
			if (!f) {
				rc = kc_fail(err, ENOMEM, "out of memory");
				break;
			}
			st->files = f;
		}
		st->files[st->nr_files++].nr = nr;
	}
	closedir(dir);
	if (st->nr_files)
		qsort(st->files, st->nr_files, sizeof(*st->files), by_nr);
	/* The newest ones first tell which guest it is. */
	for (i = st->nr_files; i-- > 0 && !rc;) {
		rc = look_at(st, st->files[i].nr, &st->files[i]);
		if (rc == -ENOENT) {
			/* Merged away in the meantime. */
			st->files[i].nr = 0;
			rc = 0;
		}
	}
	for (i = n = 0; i < st->nr_files; i++) {
		/* One that was replaced while the directory was read may be in it twice. */
		if (st->files[i].nr && (!n || st->files[n - 1].nr != st->files[i].nr))
			st->files[n++] = st->files[i];
	}
	st->nr_files = n;
	if (rc)
		kc_store_free(st);
	return rc;
}

void kc_store_free(struct kc_store *st)
{
	if (st->dir >= 0)
		close(st->dir);
	free(st->path);
	free(st->files);
	kc_guest_free(&st->guest);
	memset(st, 0, sizeof(*st));
	st->dir = -1;
}

static ssize_t find_file(const struct kc_store *st, uint64_t nr)
{
	struct kc_store_file key = { .nr = nr }, *f;

	f = st->nr_files ? bsearch(&key, st->files, st->nr_files, sizeof(key), by_nr) : NULL;
	return f ? f - st->files : -1;
}

/*
 * Whether a file that the list lacks is missing, and was not merged away or added since the list
 * was made: whatever needs a file is replaced or removed before that file is.
 */
static bool is_missing(const struct kc_store *st, uint64_t nr, const struct kc_store_file *needs_it)
{
	struct kc_store now = *st;
	struct kc_store_file f;
	char name[40];

	file_name(name, nr);
	if (!faccessat(st->dir, name, F_OK, AT_SYMLINK_NOFOLLOW))
		return false;
	return !needs_it || (!look_at(&now, needs_it->nr, &f) && !f.damaged &&
			     f.flags == needs_it->flags && f.base == needs_it->base);
}

ssize_t kc_store_chain(const struct kc_store *st, uint64_t nr, size_t **out, struct kc_err *err)
{
	size_t *chain, n = 0, i, t;
	uint64_t want = nr;
	ssize_t f;

	chain = calloc(st->nr_files + 1, sizeof(*chain));
	if (!chain)
		return kc_fail(err, ENOMEM, "out of memory");
	for (;;) {
		f = find_file(st, want);
		if (f < 0 || st->files[f].damaged) {
			bool stale = f < 0 &&
				     !is_missing(st, want, n ? &st->files[chain[n - 1]] : NULL);

			free(chain);
			if (stale)
				return kc_fail(err, ESTALE, "%s was changed while it was read",
					       st->path);
			if (f < 0 && want == nr)
				return kc_fail(err, ENOENT, "%s has no epoch %" PRIu64, st->path,
					       nr);
			return kc_fail(err, EPROTO,
				       "epoch %" PRIu64 " needs epoch %" PRIu64 ", whose file is %s", nr,
				       want, f < 0 ? "missing" : "damaged");
		}
		chain[n++] = f;
		if (st->files[f].flags == KC_EPOCH_FULL)
			break;
		/* BEGIN has seen to base < nr, so this ends. */
		want = st->files[f].base;
	}
	for (i = 0; i < n / 2; i++) {
		t = chain[i];
		chain[i] = chain[n - 1 - i];
		chain[n - 1 - i] = t;
	}
	*out = chain;
	return n;
}

/* --- Replaying ------------------------------------------------------------ */

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

static int replay_zero(void *ctx, uint16_t block, uint64_t page, uint64_t n, struct kc_err *err)
{
	struct replay *r = ctx;

	return r->ops && r->ops->zero ? r->ops->zero(r->ctx, block, page, n, err) : 0;
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
		fd = open_file(st, f->nr);
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
		fds[nr_fds] = open_file(st, st->files[chain[nr_fds]].nr);
		if (fds[nr_fds] < 0)
			break;
	}
	if (nr_fds < n && errno == ENOENT) {
		file_name(name, st->files[chain[nr_fds]].nr);
		rc = kc_fail(err, ESTALE, "%s/%s was removed", st->path, name);
	}
	/* Another error is met again when it is the file's turn, if it is still there. */
	for (i = 0; i < n && !rc; i++) {
		r.file = i;
		rc = replay_file(&r, st, &st->files[chain[i]], i < nr_fds ? fds[i] : -1, &why);
		r.done += st->files[chain[i]].bytes;
		if (rc) {
			file_name(name, st->files[chain[i]].nr);
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

/* --- Restoring ------------------------------------------------------------ */

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

/* *nr: the last epoch whose chain is sound, 0 if there is none.  0 or -ESTALE. */
static int last_sound(const struct kc_store *st, uint64_t *nr, struct kc_err *err)
{
	struct kc_err why;
	size_t *chain, sound, i;
	ssize_t n;
	int rc;

	*nr = 0;
	for (i = st->nr_files; i-- > 0 && !*nr;) {
		n = kc_store_chain(st, st->files[i].nr, &chain, &why);
		rc = n;
		if (n > 0) {
			sound = 0;
			rc = kc_store_replay(st, chain, n, NULL, NULL, NULL, &sound, &why);
			if (!rc)
				*nr = st->files[i].nr;
			else if (sound)
				*nr = st->files[chain[sound - 1]].nr;
			free(chain);
		}
		if (rc == -ESTALE)
			return kc_fail(err, ESTALE, "%s", why.text);
		if (*nr != st->files[i].nr)
			kc_log(KC_LOG_WARN, "%s", why.text);
	}
	return 0;
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
		rc = last_sound(st, &nr, err);
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

/* --- Where the last version of each page is ------------------------------- */

#define AT_ZERO 1ull
#define OFFSET_BITS 42

/* For each page 0 if it was nowhere yet, AT_ZERO, or (number in the chain + 1) and offset. */
struct place {
	const struct kc_guest *guest;
	uint64_t *at[KC_MAX_BLOCKS];
	struct kc_devices state;
	/* Files of the chain that are open. */
	size_t nr_fds;
	int *fds;
	struct kc_unpacker *up;
};

static int place_init(struct place *pl, const struct kc_guest *guest, size_t nr_files,
		      struct kc_err *err)
{
	uint32_t i;

	memset(pl, 0, sizeof(*pl));
	pl->guest = guest;
	pl->up = kc_unpacker_new();
	pl->fds = malloc((nr_files + 1) * sizeof(*pl->fds));
	if (!pl->up || !pl->fds)
		return kc_fail(err, ENOMEM, "out of memory");
	for (pl->nr_fds = 0; pl->nr_fds < nr_files; pl->nr_fds++)
		pl->fds[pl->nr_fds] = -1;
	for (i = 0; i < guest->nr_blocks; i++) {
		pl->at[i] = calloc(guest->blocks[i].npages, sizeof(uint64_t));
		if (!pl->at[i])
			return kc_fail(err, ENOMEM, "out of memory");
	}
	return 0;
}

static void place_free(struct place *pl)
{
	uint32_t i;

	while (pl->nr_fds--) {
		if (pl->fds[pl->nr_fds] >= 0)
			close(pl->fds[pl->nr_fds]);
	}
	for (i = 0; i < KC_MAX_BLOCKS; i++)
		free(pl->at[i]);
	free(pl->fds);
	free(pl->state.data);
	kc_unpacker_free(pl->up);
	memset(pl, 0, sizeof(*pl));
}

static int place_page(void *ctx, size_t file, uint64_t offset, uint16_t block, uint64_t page,
		      const void *data, struct kc_err *err)
{
	struct place *pl = ctx;

	(void)data;
	if (offset >> OFFSET_BITS || file >> (63 - OFFSET_BITS))
		return kc_fail(err, EFBIG, "the chain is too large");
	pl->at[block][page] = (uint64_t)(file + 1) << OFFSET_BITS | offset;
	return 0;
}

static int place_zero(void *ctx, uint16_t block, uint64_t page, uint64_t n, struct kc_err *err)
{
	struct place *pl = ctx;

	(void)err;
	while (n--)
		pl->at[block][page++] = AT_ZERO;
	return 0;
}

static const struct kc_store_ops place_ops = {
	.page = place_page,
	.zero = place_zero,
};

/* Read the PAGE record at a place into @buf. */
static int read_place(struct place *pl, const struct kc_store *st, const size_t *chain, uint64_t at,
		      uint8_t buf[KC_REC_HDR + KC_PAGE_HDR + KC_PAGE_SIZE], struct kc_rec *rec,
		      struct kc_err *err)
{
	size_t file = (at >> OFFSET_BITS) - 1;
	ssize_t n;

	if (pl->fds[file] < 0)
		pl->fds[file] = open_file(st, st->files[chain[file]].nr);
	n = pl->fds[file] < 0 ? -1 :
				pread(pl->fds[file], buf, KC_REC_HDR + KC_PAGE_HDR + KC_PAGE_SIZE,
				      at & ((1ull << OFFSET_BITS) - 1));
	if (n < 0)
		return kc_fail(err, errno, "cannot read %s: %s", st->path, strerror(errno));
	if (kc_get_rec(buf, n, rec, NULL) <= 0 || rec->type != KC_PAGE)
		return kc_fail(err, EPROTO, "an epoch in %s was changed while it was read",
			       st->path);
	return 0;
}

/* --- The sink ------------------------------------------------------------- */

struct store_sink {
	struct kc_store store;		/* the files; ours alone to change but for merging */
	struct kc_sink *s;
	int lock, fd;
	uint8_t *buf;
	size_t fill;
	uint64_t bytes;			/* of the open file */
	/* For digests: of the last epoch, and what the open one has brought. */
	bool placed;
	struct place place;
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
		place_free(&ss->place);
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
		unlinkat(ss->store.dir, TMP, 0);
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
	ss->fd = openat(ss->store.dir, TMP, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW,
			0600);
	if (ss->fd < 0)
		return sink_error(ss, err);
	hello = malloc(KC_REC_HDR + KC_REC_MAX);
	if (!hello)
		return kc_fail(err, ENOMEM, "out of memory");
	n = kc_put_hello(hello, &s->guest, nobody);
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
		file_name(name, st->files[i].nr);
		unlinkat(st->dir, name, 0);
	}
	st->nr_files -= n;
	memmove(st->files, st->files + n, st->nr_files * sizeof(*st->files));
}

/* --- Merging -------------------------------------------------------------- */

/* A record into the merged file, summed up unless it is HELLO or COMMIT. */
static int merge_put(FILE *f, XXH3_state_t *sum, uint64_t *records, const void *data, size_t len)
{
	if (records) {
		XXH3_128bits_update(sum, data, len);
		++*records;
	}
	return fwrite(data, 1, len, f) == len ? 0 : -1;
}

static int merge_block(struct place *pl, const struct kc_store *st, const size_t *chain,
		       uint16_t block, FILE *f, XXH3_state_t *sum, uint64_t *records,
		       struct kc_err *err)
{
	uint8_t buf[KC_REC_HDR + KC_PAGE_HDR + KC_PAGE_SIZE];
	uint64_t page, n, npages = pl->guest->blocks[block].npages;
	struct kc_zero z = { .block = block };
	struct kc_rec rec;
	size_t len;
	int rc;

	for (page = 0; page < npages; page += n) {
		if (!pl->at[block][page])
			return kc_fail(err, EPROTO, "a page is nowhere");
		n = 1;
		if (pl->at[block][page] == AT_ZERO) {
			while (page + n < npages && pl->at[block][page + n] == AT_ZERO)
				n++;
			z.page = page;
			z.npages = n;
			len = kc_put_zero(buf, &z);
		} else {
			rc = read_place(pl, st, chain, pl->at[block][page], buf, &rec, err);
			if (rc)
				return rc;
			len = KC_REC_HDR + rec.len;
		}
		if (merge_put(f, sum, records, buf, len))
			return kc_fail(err, errno, "cannot write: %s", strerror(errno));
	}
	return 0;
}

static int merge_state(struct place *pl, FILE *f, XXH3_state_t *sum, uint64_t *records,
		       struct kc_err *err)
{
	struct kc_state state = { .len = pl->state.len,
				  .flags = pl->state.stopped ? KC_STATE_STOPPED : 0,
				  .xxh = XXH3_64bits(pl->state.data, pl->state.len) };
	uint8_t buf[KC_REC_HDR + KC_PAGE_HDR + KC_PAGE_SIZE], page[KC_PAGE_SIZE];
	struct kc_packer *pk = kc_packer_new(KC_CODEC_LZ4, 1, 0);
	struct kc_page p = { .block = KC_STATE_BLOCK };
	size_t len, n;
	int rc = 0;

	if (!pk)
		return kc_fail(err, ENOMEM, "out of memory");
	len = kc_put_state(buf, &state);
	rc = merge_put(f, sum, records, buf, len);
	for (p.page = 0; p.page < KC_STATE_PAGES(pl->state.len) && !rc; p.page++) {
		n = pl->state.len - p.page * KC_PAGE_SIZE;
		memset(page, 0, sizeof(page));
		memcpy(page, pl->state.data + p.page * KC_PAGE_SIZE,
		       n < KC_PAGE_SIZE ? n : KC_PAGE_SIZE);
		kc_pack(pk, 1, &p, page);
		len = kc_put_page(buf, &p);
		memcpy(buf + len, p.data, p.len);
		rc = merge_put(f, sum, records, buf, len + p.len);
	}
	kc_packer_free(pk);
	return rc ? kc_fail(err, errno, "cannot write: %s", strerror(errno)) : 0;
}

static int merge_file(struct place *pl, const struct kc_store *st, const size_t *chain, uint64_t nr,
		      FILE *f, struct kc_err *err)
{
	static const uint8_t nobody[16];
	struct kc_begin b = { .nr = nr, .flags = KC_EPOCH_FULL };
	struct kc_commit c = { .nr = nr, .pages = kc_guest_pages(&st->guest) };
	uint8_t *buf = malloc(KC_REC_HDR + KC_REC_MAX);
	XXH3_state_t *sum = XXH3_createState();
	XXH128_canonical_t canonical;
	uint32_t i;
	int rc = -ENOMEM;

	if (!buf || !sum) {
		kc_fail(err, ENOMEM, "out of memory");
		goto out;
	}
	XXH3_128bits_reset(sum);
	rc = merge_put(f, sum, NULL, buf, kc_put_hello(buf, &st->guest, nobody));
	if (!rc)
		rc = merge_put(f, sum, &c.records, buf, kc_put_begin(buf, &b));
	if (rc)
		rc = kc_fail(err, errno, "cannot write: %s", strerror(errno));
	for (i = 0; i < st->guest.nr_blocks && !rc; i++)
		rc = merge_block(pl, st, chain, i, f, sum, &c.records, err);
	if (!rc)
		rc = merge_state(pl, f, sum, &c.records, err);
	if (rc)
		goto out;
	XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(sum));
	memcpy(c.sum, canonical.digest, sizeof(c.sum));
	if (merge_put(f, sum, NULL, buf, kc_put_commit(buf, &c)) || fflush(f) ||
	    fdatasync(fileno(f)))
		rc = kc_fail(err, errno, "cannot write: %s", strerror(errno));
out:
	free(buf);
	XXH3_freeState(sum);
	return rc;
}

/* All up to epoch @nr into one full epoch with its name. */
static int merge(const char *path, uint64_t nr, uint64_t *bytes, struct kc_err *err)
{
	struct place pl = { 0 };
	struct kc_store st;
	size_t *chain = NULL;
	char name[40];
	FILE *f = NULL;
	ssize_t n;
	int fd, rc;

	rc = kc_store_read(path, &st, err);
	if (rc)
		return rc;
	n = kc_store_chain(&st, nr, &chain, err);
	rc = n < 0 ? n : place_init(&pl, &st.guest, n, err);
	if (!rc)
		rc = kc_store_replay(&st, chain, n, &place_ops, &pl, &pl.state, NULL, err);
	if (!rc) {
		fd = openat(st.dir, MERGE_TMP,
			    O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
		f = fd < 0 ? NULL : fdopen(fd, "w");
		if (!f) {
			rc = kc_fail(err, errno, "cannot write to %s: %s", path, strerror(errno));
			if (fd >= 0)
				close(fd);
		} else {
			rc = merge_file(&pl, &st, chain, nr, f, err);
			*bytes = ftello(f);
			fclose(f);
		}
	}
	file_name(name, nr);
	if (!rc && (renameat(st.dir, MERGE_TMP, st.dir, name) || fsync(st.dir)))
		rc = kc_fail(err, errno, "cannot rename in %s: %s", path, strerror(errno));
	if (rc)
		unlinkat(st.dir, MERGE_TMP, 0);
	place_free(&pl);
	free(chain);
	kc_store_free(&st);
	return rc;
}

static void *merger(void *arg)
{
	struct store_sink *ss = arg;
	struct kc_err err = { "" };

	ss->merge_rc = merge(ss->store.path, ss->merge_nr, &ss->merged_bytes, &err);
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
	i = find_file(&ss->store, ss->merge_nr);
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
	file_name(name, s->begin.nr);
	if (!rc && renameat(ss->store.dir, TMP, ss->store.dir, name))
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
	struct kc_rec rec;
	struct kc_io *io;
	uint64_t at;
	int fd, rc;

	rc = sink_flush(ss, err);
	if (rc)
		return rc;
	fd = openat(ss->store.dir, TMP, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
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
			rc = place_page(&ss->place, ss->nr_chain, at, p.block, p.page, NULL, err);
		else if (rec.type == KC_ZERO && !kc_get_zero(&rec, &z, err) &&
			 z.block != KC_STATE_BLOCK)
			rc = place_zero(&ss->place, z.block, z.page, z.npages, err);
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
	uint8_t buf[KC_REC_HDR + KC_PAGE_HDR + KC_PAGE_SIZE], page[KC_PAGE_SIZE];
	struct store_sink *ss = of(s);
	struct kc_page p;
	struct kc_rec rec;
	uint64_t at;
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
		rc = place_init(&ss->place, &s->guest, nr + 1, err);
		if (!rc)
			rc = kc_store_replay(&ss->store, ss->chain, nr, &place_ops, &ss->place,
					     &ss->place.state, NULL, err);
	}
	if (!rc && ss->fd >= 0) {
		ss->place.fds[ss->nr_chain] = ss->fd;
		rc = scan_open(ss, err);
	}
	for (; n && !rc; n--, first++, out += KC_DIGEST_SIZE) {
		at = ss->place.at[block][first];
		memset(page, 0, sizeof(page));
		if (at > AT_ZERO) {
			rc = read_place(&ss->place, &ss->store, ss->chain, at, buf, &rec, err);
			if (!rc)
				rc = kc_get_page(&rec, &p, err);
			if (!rc)
				rc = kc_unpack(ss->place.up, &p, NULL, page, err);
		}
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
	if (rc)
		return rc;
	ss->lock = openat(ss->store.dir, "lock", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (ss->lock < 0)
		return sink_error(ss, err);
	if (flock(ss->lock, LOCK_EX | LOCK_NB))
		return kc_fail(err, EBUSY, "another kvm-checkpoint writes to %s", path);
	/* Nobody else writes now: what is temporary is of the past. */
	unlinkat(ss->store.dir, TMP, 0);
	unlinkat(ss->store.dir, MERGE_TMP, 0);
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
	rc = last_sound(&ss->store, &s->last_epoch, err);
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
		file_name(name, ss->store.files[i].nr);
		snprintf(aside, sizeof(aside), "damaged-%s", name);
		kc_log(KC_LOG_WARN, "setting %s/%s aside as %s: it is no sound epoch", path, name,
		       aside);
		if (renameat(ss->store.dir, name, ss->store.dir, aside))
			return sink_error(ss, err);
	}
	ss->store.nr_files = n;
	return 0;
}
