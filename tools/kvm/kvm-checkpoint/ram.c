// SPDX-License-Identifier: GPL-2.0-only
/*
 * The RAM that a standby holds.
 */
#include <dirent.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ram.h"

#define WBUF_PAGES 64u
#define SLOT_NONE 0u
#define SLOT_ZERO UINT32_MAX

/* In redo after the pages; of this host's own byte order, as it never leaves it. */
struct entry {
	uint64_t page;
	uint32_t block;
	uint32_t slot;		/* number of the page in redo, from 1, or SLOT_ZERO */
};

struct trailer {
	char magic[8];
	uint64_t epoch, flags, nr_slots, nr_entries;
	uint64_t xxh;		/* of the entries and of what is above */
};

struct meta {
	char magic[8];
	uint32_t flags, durable, hello_len, reserved;
	uint64_t epoch;
	char boot_id[40];
	/* Then a HELLO record, then the XXH3-64 of all of it. */
};

struct kc_ram {
	char *path;
	int dir, lock;
	bool durable;
	bool on_disk;		/* the RAM files are, as meta says they are */
	bool has_guest, torn;
	struct kc_guest guest;
	/* Read by any thread. */
	_Atomic uint64_t epoch;
	_Atomic unsigned int flags;
	uint8_t *map[KC_MAX_BLOCKS];
	struct kc_devices state;

	/* The epoch that is being received. */
	bool direct;
	int redo;
	uint32_t *slot[KC_MAX_BLOCKS];
	struct entry *entries;
	size_t nr_entries, room;
	uint32_t nr_slots, flushed;
	uint8_t *wbuf;
};

static const char meta_magic[8] = "KCRAM 1", redo_magic[8] = "KCREDO1";

static int fail_errno(struct kc_err *err, const struct kc_ram *ram, const char *what)
{
	int e = errno;

	return kc_fail(err, e, "cannot %s in %s: %s", what, ram->path, strerror(e));
}

/* --- Small files ---------------------------------------------------------- */

static int write_full(int fd, const void *buf, size_t len)
{
	const char *p = buf;
	ssize_t n;

	while (len) {
		n = write(fd, p, len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return -1;
		p += n;
		len -= n;
	}
	return 0;
}

static int write_file(struct kc_ram *ram, const char *name, const void *a, size_t a_len,
		      const void *b, size_t b_len, struct kc_err *err)
{
	/* What is there is written over, as that takes no space. */
	int fd = openat(ram->dir, name, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	int rc;

	if (fd < 0)
		return fail_errno(err, ram, "make a file");
	if (write_full(fd, a, a_len) || write_full(fd, b, b_len) || ftruncate(fd, a_len + b_len) ||
	    (ram->durable && fdatasync(fd))) {
		rc = fail_errno(err, ram, "write a file");
		close(fd);
		unlinkat(ram->dir, name, 0);
		return rc;
	}
	close(fd);
	return 0;
}

/* Whole file into malloc()ed memory. */
static int read_file(struct kc_ram *ram, const char *name, uint8_t **buf, size_t *len)
{
	int fd = openat(ram->dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	struct stat st;
	ssize_t n;

	*buf = NULL;
	if (fd < 0)
		return -errno;
	if (!fstat(fd, &st) && st.st_size <= (off_t)(KC_STATE_MAX + KC_REC_MAX))
		*buf = malloc(st.st_size + 1);
	if (!*buf) {
		close(fd);
		return -ENOMEM;
	}
	n = pread(fd, *buf, st.st_size, 0);
	close(fd);
	if (n != st.st_size) {
		free(*buf);
		*buf = NULL;
		return -EIO;
	}
	*len = n;
	return 0;
}

static int sync_dir(struct kc_ram *ram, struct kc_err *err)
{
	if (ram->durable && fsync(ram->dir))
		return fail_errno(err, ram, "fsync");
	return 0;
}

static void state_name(char name[32], uint64_t epoch)
{
	snprintf(name, 32, "state-%" PRIu64, epoch);
}

static void boot_id(char id[40])
{
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);

	memset(id, 0, 40);
	if (fd < 0)
		return;
	if (read(fd, id, 36) != 36)
		memset(id, 0, 40);
	close(fd);
}

/* --- meta ----------------------------------------------------------------- */

/* It counts once it is called "meta". */
static int write_meta_tmp(struct kc_ram *ram, uint64_t epoch, unsigned int flags, bool on_disk,
			  struct kc_err *err)
{
	static const uint8_t nobody[16];
	struct meta m = { .flags = flags, .epoch = epoch, .durable = on_disk };
	uint8_t *buf = malloc(sizeof(m) + KC_REC_HDR + KC_REC_MAX);
	uint64_t xxh;
	int rc;

	if (!buf)
		return kc_fail(err, ENOMEM, "out of memory");
	memcpy(m.magic, meta_magic, sizeof(m.magic));
	boot_id(m.boot_id);
	m.hello_len = kc_put_hello(buf + sizeof(m), &ram->guest, nobody);
	memcpy(buf, &m, sizeof(m));
	xxh = XXH3_64bits(buf, sizeof(m) + m.hello_len);
	rc = write_file(ram, "meta.tmp", buf, sizeof(m) + m.hello_len, &xxh, sizeof(xxh), err);
	free(buf);
	return rc;
}

/*
 * The old one stays, as the next "meta.tmp": to say that the protection ended or that the guest was
 * taken over takes no space then, which others may have used up.
 */
static int rename_meta(struct kc_ram *ram, struct kc_err *err)
{
	if (renameat2(ram->dir, "meta.tmp", ram->dir, "meta", RENAME_EXCHANGE) &&
	    renameat(ram->dir, "meta.tmp", ram->dir, "meta"))
		return fail_errno(err, ram, "rename meta.tmp");
	return 0;
}

/* At once, and nothing else is new. */
static int replace_meta(struct kc_ram *ram, uint64_t epoch, unsigned int flags, bool on_disk,
			struct kc_err *err)
{
	int rc = write_meta_tmp(ram, epoch, flags, on_disk, err);

	if (!rc)
		rc = rename_meta(ram, err);
	return rc ? rc : sync_dir(ram, err);
}

static int read_meta(struct kc_ram *ram, struct kc_err *err)
{
	struct kc_hello hello;
	struct kc_rec rec;
	struct meta m;
	uint64_t xxh;
	uint8_t *buf;
	char id[40];
	size_t len;
	int rc;

	rc = read_file(ram, "meta", &buf, &len);
	if (rc == -ENOENT)
		return 0;
	if (rc)
		return kc_fail(err, -rc, "cannot read %s/meta: %s", ram->path, strerror(-rc));
	rc = -EPROTO;
	if (len < sizeof(m) + sizeof(xxh))
		goto out;
	memcpy(&m, buf, sizeof(m));
	memcpy(&xxh, buf + len - sizeof(xxh), sizeof(xxh));
	if (memcmp(m.magic, meta_magic, sizeof(m.magic)) ||
	    len - sizeof(m) - sizeof(xxh) != m.hello_len ||
	    XXH3_64bits(buf, len - sizeof(xxh)) != xxh ||
	    kc_get_rec(buf + sizeof(m), m.hello_len, &rec, NULL) != (ssize_t)m.hello_len)
		goto out;
	rc = kc_get_hello(&rec, &hello, err);
	if (rc)
		goto out;
	ram->guest = hello.guest;
	ram->has_guest = true;
	ram->flags = m.flags;
	boot_id(id);
	ram->on_disk = m.durable;
	if (memcmp(id, m.boot_id, sizeof(id)) && !m.durable)
		kc_log(KC_LOG_WARN,
		       "%s was written before this host was booted: its pages serve for a resynchronization only",
		       ram->path);
	else
		ram->epoch = m.epoch;
out:
	if (rc)
		kc_fail(err, EPROTO, "%s/meta is damaged: remove %s and start from nothing",
			ram->path, ram->path);
	free(buf);
	return rc;
}

/* --- Blocks --------------------------------------------------------------- */

/* Map the blocks; make them if they are new. */
static int map_blocks(struct kc_ram *ram, bool create, void (*progress)(void *ctx), void *ctx,
		      struct kc_err *err)
{
	const uint64_t step = 256 << 20;
	uint64_t size, done, n;
	struct stat st;
	char name[32];
	uint32_t i;
	int fd, rc;

	for (i = 0; i < ram->guest.nr_blocks; i++) {
		size = ram->guest.blocks[i].npages * KC_PAGE_SIZE;
		snprintf(name, sizeof(name), "ram%u", i);
		fd = openat(ram->dir, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW |
			    (create ? O_CREAT | O_TRUNC : 0), 0600);
		if (fd < 0)
			return fail_errno(err, ram,
					  create ? "make a block of RAM" : "open a block of RAM");
		/* All at once: running out of memory later would be a SIGBUS. */
		for (done = 0; create && done < size; done += n) {
			n = size - done < step ? size - done : step;
			rc = posix_fallocate(fd, done, n);
			if (rc) {
				close(fd);
				return kc_fail(err, rc,
					       "cannot allocate %" PRIu64
					       " MiB for block %s in %s: %s",
					       size >> 20, ram->guest.blocks[i].name, ram->path,
					       strerror(rc));
			}
			if (progress)
				progress(ctx);
		}
		if (fstat(fd, &st) || (uint64_t)st.st_size != size) {
			close(fd);
			return kc_fail(err, EPROTO,
				       "%s/%s has the wrong size: remove %s and start from nothing",
				       ram->path, name, ram->path);
		}
		ram->map[i] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		close(fd);
		if (ram->map[i] == MAP_FAILED) {
			ram->map[i] = NULL;
			return fail_errno(err, ram, "map a block of RAM");
		}
		kc_no_dump(ram->map[i], size);
		ram->slot[i] = mmap(NULL, ram->guest.blocks[i].npages * sizeof(uint32_t),
				    PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (ram->slot[i] == MAP_FAILED) {
			ram->slot[i] = NULL;
			return kc_fail(err, ENOMEM, "out of memory");
		}
	}
	return 0;
}

static void unmap_blocks(struct kc_ram *ram)
{
	uint32_t i;

	for (i = 0; i < ram->guest.nr_blocks; i++) {
		if (ram->map[i])
			munmap(ram->map[i], ram->guest.blocks[i].npages * KC_PAGE_SIZE);
		if (ram->slot[i])
			munmap(ram->slot[i], ram->guest.blocks[i].npages * sizeof(uint32_t));
		ram->map[i] = NULL;
		ram->slot[i] = NULL;
	}
}

int kc_ram_create(struct kc_ram *ram, const struct kc_guest *guest, void (*progress)(void *ctx),
		  void *ctx, struct kc_err *err)
{
	char name[32];
	uint32_t i;
	int rc;

	if (kc_guest_copy(&ram->guest, guest))
		return kc_fail(err, ENOMEM, "out of memory");
	rc = map_blocks(ram, true, progress, ctx, err);
	if (!rc)
		rc = write_meta_tmp(ram, 0, 0, false, err);
	if (!rc)
		rc = rename_meta(ram, err);
	if (rc) {
		for (i = 0; i < ram->guest.nr_blocks; i++) {
			snprintf(name, sizeof(name), "ram%u", i);
			unlinkat(ram->dir, name, 0);
		}
		unmap_blocks(ram);
		kc_guest_free(&ram->guest);
		return rc;
	}
	ram->has_guest = true;
	return sync_dir(ram, err);
}

/* --- An epoch ------------------------------------------------------------- */

static uint64_t ram_last(void *ctx)
{
	struct kc_ram *ram = ctx;

	return ram->epoch;
}

/* Forget the epoch that is being received. */
static void drop(struct kc_ram *ram)
{
	size_t i;

	for (i = 0; i < ram->nr_entries; i++)
		ram->slot[ram->entries[i].block][ram->entries[i].page] = SLOT_NONE;
	free(ram->entries);
	ram->entries = NULL;
	ram->nr_entries = ram->room = 0;
	ram->nr_slots = ram->flushed = 0;
	if (ram->redo >= 0)
		close(ram->redo);
	ram->redo = -1;
}

static void ram_abort(void *ctx)
{
	struct kc_ram *ram = ctx;

	drop(ram);
	unlinkat(ram->dir, "redo.tmp", 0);
}

static int ram_begin(void *ctx, const struct kc_begin *b, struct kc_err *err)
{
	struct kc_ram *ram = ctx;

	int rc;

	(void)b;
	drop(ram);
	rc = kc_ram_settle(ram, err);
	if (rc)
		return rc;
	ram->direct = !ram->epoch;
	if (ram->direct)
		return 0;
	ram->redo = openat(ram->dir, "redo.tmp",
			   O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	return ram->redo < 0 ? fail_errno(err, ram, "make redo.tmp") : 0;
}

static const void *ram_base(void *ctx, uint16_t block, uint64_t page)
{
	struct kc_ram *ram = ctx;

	/* A delta needs a base that is complete. */
	return ram->direct ? NULL : ram->map[block] + page * KC_PAGE_SIZE;
}

static const struct kc_devices *ram_base_state(void *ctx)
{
	struct kc_ram *ram = ctx;

	return ram->epoch ? &ram->state : NULL;
}

static int flush(struct kc_ram *ram, struct kc_err *err)
{
	uint32_t n = ram->nr_slots - ram->flushed;

	if (n && write_full(ram->redo, ram->wbuf, (size_t)n * KC_PAGE_SIZE))
		return fail_errno(err, ram, "write redo.tmp");
	ram->flushed = ram->nr_slots;
	return 0;
}

/* The page is in the open epoch, at a slot of redo. */
static int note(struct kc_ram *ram, uint16_t block, uint64_t page, uint32_t slot,
		struct kc_err *err)
{
	if (ram->slot[block][page] == SLOT_NONE) {
		if (ram->nr_entries == ram->room) {
			size_t room = ram->room ? 2 * ram->room : 1024;
			struct entry *e = realloc(ram->entries, room * sizeof(*e));

			if (!e)
				return kc_fail(err, ENOMEM, "out of memory");
			ram->entries = e;
			ram->room = room;
		}
		ram->entries[ram->nr_entries++] = (struct entry){ .page = page, .block = block };
	}
	ram->slot[block][page] = slot;
	return 0;
}

static int ram_page(void *ctx, uint16_t block, uint64_t page, const void *data, struct kc_err *err)
{
	struct kc_ram *ram = ctx;
	int rc;

	if (ram->direct) {
		memcpy(ram->map[block] + page * KC_PAGE_SIZE, data, KC_PAGE_SIZE);
		return 0;
	}
	if (ram->nr_slots == SLOT_ZERO - 1)
		return kc_fail(err, EFBIG, "the epoch has too many pages");
	memcpy(ram->wbuf + (size_t)(ram->nr_slots - ram->flushed) * KC_PAGE_SIZE, data,
	       KC_PAGE_SIZE);
	ram->nr_slots++;
	rc = note(ram, block, page, ram->nr_slots, err);
	if (!rc && ram->nr_slots - ram->flushed == WBUF_PAGES)
		rc = flush(ram, err);
	return rc;
}

static int ram_zero(void *ctx, uint16_t block, uint64_t page, uint64_t n, struct kc_err *err)
{
	struct kc_ram *ram = ctx;
	uint8_t *p = ram->map[block] + page * KC_PAGE_SIZE;
	int rc = 0;

	for (; n && !rc; n--, page++, p += KC_PAGE_SIZE) {
		if (!ram->direct)
			rc = note(ram, block, page, SLOT_ZERO, err);
		else if (!kc_is_zero_page(p))
			memset(p, 0, KC_PAGE_SIZE);
	}
	return rc;
}

/* Copy the pages of a complete epoch to where they belong. */
static int apply(struct kc_ram *ram, int redo, const struct entry *entries, uint64_t nr_entries,
		 uint64_t nr_slots, struct kc_err *err)
{
	const uint8_t *pages = NULL;
	uint64_t i;

	if (nr_slots) {
		pages = mmap(NULL, nr_slots * KC_PAGE_SIZE, PROT_READ, MAP_SHARED, redo, 0);
		if (pages == MAP_FAILED)
			return fail_errno(err, ram, "map redo");
	}
	for (i = 0; i < nr_entries; i++) {
		const struct entry *e = &entries[i];
		uint8_t *to = ram->map[e->block] + e->page * KC_PAGE_SIZE;

		if (e->slot == SLOT_ZERO)
			memset(to, 0, KC_PAGE_SIZE);
		else
			memcpy(to, pages + (uint64_t)(e->slot - 1) * KC_PAGE_SIZE, KC_PAGE_SIZE);
	}
	if (pages)
		munmap((void *)pages, nr_slots * KC_PAGE_SIZE);
	return 0;
}

static int sync_blocks(struct kc_ram *ram, struct kc_err *err)
{
	uint32_t i;

	for (i = 0; ram->durable && i < ram->guest.nr_blocks; i++) {
		if (msync(ram->map[i], ram->guest.blocks[i].npages * KC_PAGE_SIZE, MS_SYNC))
			return fail_errno(err, ram, "sync the RAM");
	}
	return 0;
}

/* The RAM files have the epoch: say so, and remove what only led there. */
static int arrived(struct kc_ram *ram, uint64_t nr, unsigned int flags, struct kc_err *err)
{
	uint64_t old = ram->epoch;
	char name[32];
	int rc;

	rc = sync_blocks(ram, err);
	if (rc)
		return rc;
	rc = rename_meta(ram, err);
	if (rc)
		return rc;
	ram->epoch = nr;
	ram->flags = flags;
	ram->on_disk = ram->durable;
	rc = sync_dir(ram, err);
	unlinkat(ram->dir, "redo", 0);
	if (old && old != nr) {
		state_name(name, old);
		unlinkat(ram->dir, name, 0);
	}
	return rc;
}

/* redo.tmp is whole: give it its end and its name. */
static int seal(struct kc_ram *ram, uint64_t nr, unsigned int flags, struct kc_err *err)
{
	struct trailer t = { .epoch = nr,
			     .flags = flags,
			     .nr_slots = ram->nr_slots,
			     .nr_entries = ram->nr_entries };
	size_t i, len = ram->nr_entries * sizeof(*ram->entries);
	int rc;

	rc = flush(ram, err);
	if (rc)
		return rc;
	for (i = 0; i < ram->nr_entries; i++)
		ram->entries[i].slot = ram->slot[ram->entries[i].block][ram->entries[i].page];
	memcpy(t.magic, redo_magic, sizeof(t.magic));
	t.xxh = XXH3_64bits_withSeed(ram->entries, len,
				     XXH3_64bits(&t, offsetof(struct trailer, xxh)));
	if (write_full(ram->redo, ram->entries, len) || write_full(ram->redo, &t, sizeof(t)) ||
	    (ram->durable && fdatasync(ram->redo)))
		return fail_errno(err, ram, "write redo.tmp");
	if (renameat(ram->dir, "redo.tmp", ram->dir, "redo"))
		return fail_errno(err, ram, "rename redo.tmp");
	rc = sync_dir(ram, err);
	if (rc)
		unlinkat(ram->dir, "redo", 0); /* its state is about to go, too */
	return rc;
}

static int ram_commit(void *ctx, uint64_t nr, const struct kc_devices *state, struct kc_err *err)
{
	unsigned int flags = state->stopped ? KC_RAM_STOPPED : 0;
	struct kc_devices copy = { .data = NULL };
	struct kc_ram *ram = ctx;
	char name[32];
	int rc;

	/* All that may fail for want of space comes before the epoch is complete. */
	state_name(name, nr);
	rc = kc_devices_keep(&copy, state, err);
	if (!rc)
		rc = write_file(ram, name, state->data, state->len, NULL, 0, err);
	if (!rc)
		rc = write_meta_tmp(ram, nr, flags, ram->durable, err);
	if (!rc && !ram->direct)
		rc = seal(ram, nr, flags, err);
	if (rc) {
		unlinkat(ram->dir, name, 0);
		free(copy.data);
		ram_abort(ram);
		return rc;
	}
	ram->torn = !ram->direct;
	if (!ram->direct)
		rc = apply(ram, ram->redo, ram->entries, ram->nr_entries, ram->nr_slots, err);
	if (!rc)
		rc = arrived(ram, nr, flags, err);
	drop(ram);
	if (rc) {
		free(copy.data);
		return rc;
	}
	ram->torn = false;
	free(ram->state.data);
	ram->state = copy;
	return 0;
}

const struct kc_rx_ops kc_ram_ops = {
	.last = ram_last,
	.begin = ram_begin,
	.base = ram_base,
	.base_state = ram_base_state,
	.page = ram_page,
	.zero = ram_zero,
	.commit = ram_commit,
	.abort = ram_abort,
};

int kc_ram_digests(struct kc_ram *ram, uint32_t block, uint64_t first, uint32_t n, uint8_t *out,
		   struct kc_err *err)
{
	uint8_t page[KC_PAGE_SIZE];
	const uint8_t *p;
	uint32_t slot;
	int rc;

	if (block >= ram->guest.nr_blocks || first > ram->guest.blocks[block].npages ||
	    n > ram->guest.blocks[block].npages - first)
		return kc_fail(err, EPROTO,
			       "the stream is corrupt: digests of pages that are not there");
	rc = ram->redo >= 0 ? flush(ram, err) : 0;
	for (; n && !rc; n--, first++, out += KC_DIGEST_SIZE) {
		slot = ram->slot[block][first];
		p = ram->map[block] + first * KC_PAGE_SIZE;
		if (slot == SLOT_ZERO) {
			memset(page, 0, sizeof(page));
			p = page;
		} else if (slot != SLOT_NONE) {
			if (pread(ram->redo, page, sizeof(page),
				  (off_t)(slot - 1) * KC_PAGE_SIZE) != (ssize_t)sizeof(page))
				return fail_errno(err, ram, "read redo.tmp");
			p = page;
		}
		kc_page_digest(p, out);
	}
	return rc;
}

/* --- Opening -------------------------------------------------------------- */

/* A complete epoch that may not have reached the RAM files: its number, 0 if there is none. */
static int redo_again(struct kc_ram *ram, struct kc_err *err)
{
	struct entry *entries = NULL;
	struct trailer t;
	struct stat st;
	uint64_t i, size;
	int fd, rc = 0;

	fd = openat(ram->dir, "redo", O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0)
		return errno == ENOENT ? 0 : fail_errno(err, ram, "open redo");
	if (fstat(fd, &st) || st.st_size < (off_t)sizeof(t) ||
	    pread(fd, &t, sizeof(t), st.st_size - sizeof(t)) != (ssize_t)sizeof(t))
		goto damaged;
	if (t.epoch <= ram->epoch || !ram->epoch)
		goto out;	/* it had arrived, or is of before the boot */
	size = st.st_size - sizeof(t);
	if (memcmp(t.magic, redo_magic, sizeof(t.magic)) || t.nr_slots > size / KC_PAGE_SIZE ||
	    t.nr_entries != (size - t.nr_slots * KC_PAGE_SIZE) / sizeof(*entries) ||
	    (size - t.nr_slots * KC_PAGE_SIZE) % sizeof(*entries))
		goto damaged;
	size -= t.nr_slots * KC_PAGE_SIZE;
	entries = malloc(size + 1);
	if (!entries) {
		rc = kc_fail(err, ENOMEM, "out of memory");
		goto out;
	}
	if (pread(fd, entries, size, t.nr_slots * KC_PAGE_SIZE) != (ssize_t)size ||
	    XXH3_64bits_withSeed(entries, size, XXH3_64bits(&t, offsetof(struct trailer, xxh))) !=
		    t.xxh)
		goto damaged;
	for (i = 0; i < t.nr_entries; i++) {
		if (entries[i].block >= ram->guest.nr_blocks ||
		    entries[i].page >= ram->guest.blocks[entries[i].block].npages ||
		    (entries[i].slot != SLOT_ZERO && entries[i].slot - 1 >= t.nr_slots))
			goto damaged;
	}
	kc_log(KC_LOG_INFO, "finishing epoch %" PRIu64 ", which was complete", t.epoch);
	rc = apply(ram, fd, entries, t.nr_entries, t.nr_slots, err);
	if (!rc)
		rc = write_meta_tmp(ram, t.epoch, t.flags, ram->durable, err);
	if (!rc)
		rc = arrived(ram, t.epoch, t.flags, err);
	goto out;
damaged:
	rc = kc_fail(err, EPROTO, "%s/redo is damaged: remove %s and start from nothing", ram->path,
		     ram->path);
out:
	free(entries);
	close(fd);
	return rc;
}

static int read_state(struct kc_ram *ram, struct kc_err *err)
{
	char name[32];
	size_t len;
	int rc;

	free(ram->state.data);
	ram->state.data = NULL;
	state_name(name, ram->epoch);
	rc = read_file(ram, name, &ram->state.data, &len);
	if (rc)
		return kc_fail(err, -rc, "cannot read %s/%s: %s", ram->path, name, strerror(-rc));
	ram->state.len = len;
	return 0;
}

int kc_ram_settle(struct kc_ram *ram, struct kc_err *err)
{
	int rc;

	if (!ram->torn)
		return 0;
	rc = redo_again(ram, err);
	if (!rc)
		rc = read_state(ram, err);
	if (!rc)
		ram->torn = false;
	return rc;
}

/* Remove what was being received when the last process ended. */
static void remove_leftovers(struct kc_ram *ram)
{
	struct dirent *d;
	char keep[32];
	DIR *dir;
	int fd;

	fd = openat(ram->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	dir = fd < 0 ? NULL : fdopendir(fd);
	if (!dir)
		return;
	state_name(keep, ram->epoch);
	while ((d = readdir(dir))) {
		if (!strcmp(d->d_name, "redo") || !strcmp(d->d_name, "redo.tmp") ||
		    (!strncmp(d->d_name, "state-", 6) && strcmp(d->d_name, keep)))
			unlinkat(ram->dir, d->d_name, 0);
	}
	closedir(dir);
}

/*
 * The RAM files are about to be changed without forcing anything to the disk: after a crash of the
 * host they would be of no epoch, and what the disk says of them must not be that they are.
 */
static int no_longer_durable(struct kc_ram *ram, struct kc_err *err)
{
	int rc;

	ram->durable = true;
	rc = replace_meta(ram, ram->epoch, ram->flags, false, err);
	ram->durable = false;
	ram->on_disk = false;
	return rc;
}

int kc_ram_open(const char *path, bool durable, struct kc_ram **out, struct kc_err *err)
{
	struct kc_ram *ram = calloc(1, sizeof(*ram));
	int rc;

	if (!ram)
		return kc_fail(err, ENOMEM, "out of memory");
	ram->dir = ram->lock = ram->redo = -1;
	ram->durable = durable;
	ram->wbuf = malloc(WBUF_PAGES * KC_PAGE_SIZE);
	ram->path = strdup(path);
	if (!ram->path || !ram->wbuf) {
		rc = kc_fail(err, ENOMEM, "out of memory");
		goto fail;
	}
	if (mkdir(path, 0700) && errno != EEXIST) {
		rc = fail_errno(err, ram, "make the directory");
		goto fail;
	}
	ram->dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	/* QEMU may have another working directory. */
	free(ram->path);
	ram->path = realpath(path, NULL);
	if (!ram->path) {
		rc = kc_fail(err, errno, "cannot open %s: %s", path, strerror(errno));
		goto fail;
	}
	if (ram->dir >= 0)
		ram->lock =
			openat(ram->dir, "lock", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (ram->lock < 0) {
		rc = fail_errno(err, ram, "open the directory");
		goto fail;
	}
	rc = kc_check_owner(ram->dir, path, err);
	if (rc)
		goto fail;
	if (flock(ram->lock, LOCK_EX | LOCK_NB)) {
		rc = kc_fail(err, EBUSY, "%s is in use by another kvm-checkpoint", path);
		goto fail;
	}
	rc = read_meta(ram, err);
	if (!rc && ram->on_disk && !durable)
		rc = no_longer_durable(ram, err);
	if (!rc && ram->has_guest) {
		rc = map_blocks(ram, false, NULL, NULL, err);
		if (!rc)
			rc = redo_again(ram, err);
	}
	if (!rc && ram->epoch)
		rc = read_state(ram, err);
	if (rc)
		goto fail;
	remove_leftovers(ram);
	*out = ram;
	return 0;
fail:
	kc_ram_close(ram);
	return rc;
}

void kc_ram_close(struct kc_ram *ram)
{
	if (!ram)
		return;
	drop(ram);
	unmap_blocks(ram);
	kc_guest_free(&ram->guest);
	if (ram->lock >= 0)
		close(ram->lock);
	if (ram->dir >= 0)
		close(ram->dir);
	free(ram->state.data);
	free(ram->wbuf);
	free(ram->path);
	free(ram);
}

const struct kc_guest *kc_ram_guest(const struct kc_ram *ram)
{
	return ram->has_guest ? &ram->guest : NULL;
}

uint64_t kc_ram_epoch(const struct kc_ram *ram)
{
	return ram->epoch;
}

unsigned int kc_ram_flags(const struct kc_ram *ram)
{
	return ram->flags;
}

int kc_ram_set_flags(struct kc_ram *ram, unsigned int flags, struct kc_err *err)
{
	int rc;

	if (flags == ram->flags || !ram->has_guest)
		return 0;
	rc = replace_meta(ram, ram->epoch, flags, ram->on_disk, err);
	/* What cannot be written holds as long as we live; a takeover is tried again. */
	if (!rc || !(flags & KC_RAM_TAKEN_OVER))
		ram->flags = flags;
	return rc;
}

char *kc_ram_block_path(const struct kc_ram *ram, uint32_t block)
{
	char *p;

	return asprintf(&p, "%s/ram%u", ram->path, block) < 0 ? NULL : p;
}

char *kc_ram_state_path(const struct kc_ram *ram)
{
	char *p;

	return asprintf(&p, "%s/state-%" PRIu64, ram->path, ram->epoch) < 0 ? NULL : p;
}
