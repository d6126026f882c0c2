// SPDX-License-Identifier: GPL-2.0-only
/*
 * A directory of epochs: what is there, and which files make an epoch.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store_internal.h"

/* Of HELLO and BEGIN: what kc_put_hello() makes is smaller than this. */
#define HEAD_MAX (KC_MAX_BLOCKS * (KC_NAME_SIZE + 16) + KC_HARDWARE_SIZE + 1024)

void kc_store_file_name(char name[40], uint64_t nr)
{
	snprintf(name, 40, "epoch-%020" PRIu64 ".kc", nr);
}

int kc_store_open_file(const struct kc_store *st, uint64_t nr)
{
	struct stat sb;
	char name[40];

	kc_store_file_name(name, nr);
	/* To open a FIFO would wait for a writer, and a device may do anything. */
	if (fstatat(st->dir, name, &sb, AT_SYMLINK_NOFOLLOW))
		return -1;
	if (!S_ISREG(sb.st_mode)) {
		errno = EINVAL;
		return -1;
	}
	return openat(st->dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
}

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
	fd = kc_store_open_file(st, nr);
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

/* The numbers of the files that the directory has, in their order. */
static int list_files(struct kc_store *st, struct kc_err *err)
{
	struct dirent *d;
	size_t room = 0;
	char name[40];
	uint64_t nr;
	DIR *dir;
	int fd;

	st->nr_files = 0;
	free(st->files);
	st->files = NULL;
	fd = openat(st->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	dir = fd < 0 ? NULL : fdopendir(fd);
	if (!dir) {
		if (fd >= 0)
			close(fd);
		return kc_fail(err, ENOMEM, "cannot read %s", st->path);
	}
	while ((d = readdir(dir))) {
		if (sscanf(d->d_name, "epoch-%" SCNu64, &nr) != 1)
			continue;
		kc_store_file_name(name, nr);
		if (strcmp(name, d->d_name))
			continue;
		if (st->nr_files == room) {
			struct kc_store_file *f;

			room = room ? 2 * room : 64;
			f = realloc(st->files, room * sizeof(*f));
			if (!f) {
				closedir(dir);
				return kc_fail(err, ENOMEM, "out of memory");
			}
			st->files = f;
		}
		st->files[st->nr_files++].nr = nr;
	}
	closedir(dir);
	if (st->nr_files)
		qsort(st->files, st->nr_files, sizeof(*st->files), by_nr);
	return 0;
}

/* Look at the files of the list; those that are not there any more leave it. */
static int look_at_all(struct kc_store *st)
{
	size_t i, n = 0;
	int rc;

	/* The newest ones first tell which guest it is. */
	for (i = st->nr_files; i-- > 0;) {
		rc = look_at(st, st->files[i].nr, &st->files[i]);
		if (rc == -ENOENT)
			st->files[i].nr = 0;	/* Merged away in the meantime. */
		else if (rc)
			return rc;
	}
	for (i = 0; i < st->nr_files; i++) {
		/* One that was replaced while the directory was read may be in it twice. */
		if (st->files[i].nr && (!n || st->files[n - 1].nr != st->files[i].nr))
			st->files[n++] = st->files[i];
	}
	st->nr_files = n;
	return 0;
}

int kc_store_read(const char *path, struct kc_store *st, struct kc_err *err)
{
	unsigned int empty = 0;
	int rc;

	memset(st, 0, sizeof(*st));
	st->dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (st->dir < 0)
		return kc_fail(err, errno, "cannot open %s: %s", path, strerror(errno));
	st->path = strdup(path);
	rc = st->path ? 0 : kc_fail(err, ENOMEM, "out of memory");
	/*
	 * A writer that keeps few epochs may replace all of them while they are looked at, or
	 * while the directory is read: it is empty if twice in a row nothing is found in it.
	 */
	while (!rc && !st->nr_files && empty < 2) {
		rc = list_files(st, err);
		empty = rc || st->nr_files ? 0 : empty + 1;
		if (!rc && look_at_all(st))
			rc = kc_fail(err, ENOMEM, "out of memory");
	}
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

ssize_t kc_store_find(const struct kc_store *st, uint64_t nr)
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

	kc_store_file_name(name, nr);
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
		f = kc_store_find(st, want);
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
			if (want == nr)
				return kc_fail(err, EPROTO,
					       "the file of epoch %" PRIu64 " is damaged", nr);
			return kc_fail(err, EPROTO,
				       "epoch %" PRIu64 " needs epoch %" PRIu64 ", whose file is %s",
				       nr, want, f < 0 ? "missing" : "damaged");
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
