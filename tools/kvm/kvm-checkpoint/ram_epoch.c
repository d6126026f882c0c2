// SPDX-License-Identifier: GPL-2.0-only
/*
 * The RAM that a standby holds: an epoch on its way into it.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ram_internal.h"

static const char redo_magic[8] = "KCREDO2", undo_magic[8] = "KCUNDO2";

static uint64_t ram_last(void *ctx)
{
	struct kc_ram *ram = ctx;

	return ram->epoch;
}

void kc_ram_drop(struct kc_ram *ram)
{
	size_t i;

	for (i = 0; i < ram->nr_entries; i++)
		*kc_ram_slot(ram, ram->entries[i].block, ram->entries[i].page) = SLOT_NONE;
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

	kc_ram_drop(ram);
	unlinkat(ram->dir, "redo.tmp", 0);
}

static int ram_begin(void *ctx, const struct kc_begin *b, struct kc_err *err)
{
	struct kc_ram *ram = ctx;

	int rc;

	(void)b;
	kc_ram_drop(ram);
	rc = kc_ram_settle(ram, err);
	if (rc)
		return rc;
	ram->direct = !ram->epoch;
	if (ram->direct)
		return 0;
	ram->redo = openat(ram->dir, "redo.tmp",
			   O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	return ram->redo < 0 ? kc_ram_fail(err, ram, "make redo.tmp") : 0;
}

static const void *ram_base(void *ctx, uint16_t block, uint64_t page)
{
	struct kc_ram *ram = ctx;

	/* A delta needs a base that is complete. */
	if (ram->direct)
		return NULL;
	if (block < KC_DISK_BLOCK)
		return ram->map[block] + page * KC_PAGE_SIZE;
	return kc_ram_read_page(ram, block, page, ram->base, NULL) ? NULL : ram->base;
}

static const struct kc_devices *ram_base_state(void *ctx)
{
	struct kc_ram *ram = ctx;

	return ram->epoch ? &ram->state : NULL;
}

int kc_ram_flush(struct kc_ram *ram, struct kc_err *err)
{
	uint32_t n = ram->nr_slots - ram->flushed;

	if (n && kc_ram_write_full(ram->redo, ram->wbuf, (size_t)n * KC_PAGE_SIZE))
		return kc_ram_fail(err, ram, "write redo.tmp");
	ram->flushed = ram->nr_slots;
	return 0;
}

/* The page is in the open epoch, at a slot of redo. */
static int note(struct kc_ram *ram, uint16_t block, uint64_t page, uint32_t slot,
		struct kc_err *err)
{
	uint32_t *at = kc_ram_slot(ram, block, page);

	if (*at == SLOT_NONE) {
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
	*at = slot;
	return 0;
}

static int ram_page(void *ctx, uint16_t block, uint64_t page, const void *data, struct kc_err *err)
{
	struct kc_ram *ram = ctx;
	int rc;

	if (ram->direct)
		return kc_ram_write_page(ram, block, page, data, err);
	if (ram->nr_slots == SLOT_ZERO - 1)
		return kc_fail(err, EFBIG, "the epoch has too many pages");
	memcpy(ram->wbuf + (size_t)(ram->nr_slots - ram->flushed) * KC_PAGE_SIZE, data,
	       KC_PAGE_SIZE);
	ram->nr_slots++;
	rc = note(ram, block, page, ram->nr_slots, err);
	if (!rc && ram->nr_slots - ram->flushed == WBUF_PAGES)
		rc = kc_ram_flush(ram, err);
	return rc;
}

static int ram_zero(void *ctx, uint16_t block, uint64_t page, uint64_t n, struct kc_err *err)
{
	static const uint8_t zeros[KC_PAGE_SIZE];
	struct kc_ram *ram = ctx;
	uint8_t old[KC_PAGE_SIZE];
	int rc = 0;

	for (; n && !rc; n--, page++) {
		if (!ram->direct) {
			rc = note(ram, block, page, SLOT_ZERO, err);
			continue;
		}
		/* What is zero already needs no memory, and no room on a disk. */
		rc = kc_ram_read_page(ram, block, page, old, err);
		if (!rc && !kc_is_zero_page(old))
			rc = kc_ram_write_page(ram, block, page, zeros, err);
	}
	return rc;
}

int kc_ram_read_open(struct kc_ram *ram, uint32_t block, uint64_t page, uint8_t *to,
		     struct kc_err *err)
{
	uint32_t slot = *kc_ram_slot(ram, block, page);
	int rc;

	if (slot == SLOT_NONE)
		return kc_ram_read_page(ram, block, page, to, err);
	if (slot == SLOT_ZERO) {
		memset(to, 0, KC_PAGE_SIZE);
		return 0;
	}
	rc = kc_ram_flush(ram, err);
	if (!rc && pread(ram->redo, to, KC_PAGE_SIZE, (off_t)(slot - 1) * KC_PAGE_SIZE) !=
			   (ssize_t)KC_PAGE_SIZE)
		rc = kc_ram_fail(err, ram, "read redo.tmp");
	return rc;
}

static int ram_part(void *ctx, const struct kc_part *p, struct kc_err *err)
{
	uint8_t whole[KC_PAGE_SIZE];
	int rc = kc_ram_read_open(ctx, p->block, p->page, whole, err);

	if (rc)
		return rc;
	memcpy(whole + p->offset, p->data, p->len);
	return ram_page(ctx, p->block, p->page, whole, err);
}

/* Copy the pages of a complete epoch to where they belong. */
static int apply(struct kc_ram *ram, int redo, const struct entry *entries, uint64_t nr_entries,
		 uint64_t nr_slots, struct kc_err *err)
{
	static const uint8_t zeros[KC_PAGE_SIZE];
	const uint8_t *pages = NULL;
	uint64_t i;
	int rc = 0;

	if (nr_slots) {
		pages = mmap(NULL, nr_slots * KC_PAGE_SIZE, PROT_READ, MAP_SHARED, redo, 0);
		if (pages == MAP_FAILED)
			return kc_ram_fail(err, ram, "map redo");
	}
	for (i = 0; i < nr_entries && !rc; i++) {
		const struct entry *e = &entries[i];

		rc = kc_ram_write_page(ram, e->block, e->page, e->slot == SLOT_ZERO ? zeros :
				       pages + (uint64_t)(e->slot - 1) * KC_PAGE_SIZE, err);
	}
	if (pages)
		munmap((void *)pages, nr_slots * KC_PAGE_SIZE);
	return rc;
}

static int sync_blocks(struct kc_ram *ram, struct kc_err *err)
{
	uint32_t i;

	for (i = 0; ram->durable && i < ram->guest.nr_blocks; i++) {
		if (msync(ram->map[i], ram->guest.blocks[i].npages * KC_PAGE_SIZE, MS_SYNC))
			return kc_ram_fail(err, ram, "sync the RAM");
	}
	return ram->durable ? kc_ram_sync_disks(ram, err) : 0;
}

/* The RAM files have the epoch: say so, and remove what only led there. */
static int arrived(struct kc_ram *ram, uint64_t nr, uint64_t time_ms, unsigned int flags,
		   struct kc_err *err)
{
	uint64_t old = ram->epoch;
	char name[32];
	int rc;

	rc = sync_blocks(ram, err);
	if (rc)
		return rc;
	rc = kc_ram_rename_meta(ram, err);
	if (rc)
		return rc;
	ram->epoch = nr;
	ram->time_ms = time_ms;
	ram->flags = flags;
	ram->on_disk = ram->durable;
	rc = kc_ram_sync_dir(ram, err);
	unlinkat(ram->dir, "redo", 0);
	/* The state that there is a way back to stays. */
	if (old && old != nr && !(flags & KC_RAM_UNTRIED)) {
		kc_ram_state_name(name, old);
		unlinkat(ram->dir, name, 0);
	}
	return rc;
}

/* What comes after the pages in redo and undo */
static int write_end(struct kc_ram *ram, int fd, struct trailer *t, const char magic[8])
{
	size_t len = ram->nr_entries * sizeof(*ram->entries);

	t->nr_entries = ram->nr_entries;
	memcpy(t->magic, magic, sizeof(t->magic));
	t->xxh = XXH3_64bits_withSeed(ram->entries, len,
				      XXH3_64bits(t, offsetof(struct trailer, xxh)));
	return kc_ram_write_full(fd, ram->entries, len) || kc_ram_write_full(fd, t, sizeof(*t)) ||
	       (ram->durable && fdatasync(fd));
}

/* redo.tmp is whole: give it its end and its name. */
static int seal(struct kc_ram *ram, uint64_t nr, uint64_t time_ms, unsigned int flags,
		struct kc_err *err)
{
	struct trailer t = { .epoch = nr, .time_ms = time_ms, .flags = flags,
			     .nr_slots = ram->nr_slots };
	size_t i;
	int rc;

	rc = kc_ram_flush(ram, err);
	if (rc)
		return rc;
	for (i = 0; i < ram->nr_entries; i++)
		ram->entries[i].slot = *kc_ram_slot(ram, ram->entries[i].block,
						    ram->entries[i].page);
	if (write_end(ram, ram->redo, &t, redo_magic))
		return kc_ram_fail(err, ram, "write redo.tmp");
	if (renameat(ram->dir, "redo.tmp", ram->dir, "redo"))
		return kc_ram_fail(err, ram, "rename redo.tmp");
	rc = kc_ram_sync_dir(ram, err);
	if (rc)
		unlinkat(ram->dir, "redo", 0); /* its state is about to go, too */
	return rc;
}

/* What the epoch is about to replace.  Its entries are redo's but for the slots. */
static int keep_way_back(struct kc_ram *ram, struct kc_err *err)
{
	struct trailer t = { .epoch = ram->epoch, .time_ms = ram->time_ms, .flags = ram->flags };
	uint8_t page[KC_PAGE_SIZE];
	bool failed = false;
	size_t i;
	int fd;

	fd = openat(ram->dir, "undo.tmp", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW,
		    0600);
	if (fd < 0)
		return kc_ram_fail(err, ram, "make undo.tmp");
	for (i = 0; i < ram->nr_entries && !failed; i++) {
		struct entry *e = &ram->entries[i];
		e->slot = SLOT_ZERO;
		failed = kc_ram_read_page(ram, e->block, e->page, page, NULL);
		if (failed || kc_is_zero_page(page))
			continue;
		e->slot = ++t.nr_slots;
		failed = kc_ram_write_full(fd, page, KC_PAGE_SIZE);
	}
	if (!failed)
		failed = write_end(ram, fd, &t, undo_magic) ||
			 renameat(ram->dir, "undo.tmp", ram->dir, "undo");
	if (failed) {
		int rc = kc_ram_fail(err, ram, "write undo.tmp");

		close(fd);
		unlinkat(ram->dir, "undo.tmp", 0);
		return rc;
	}
	close(fd);
	return kc_ram_sync_dir(ram, err);
}

/* It can be loaded: there is no way back any more. */
static int prove(struct kc_ram *ram, uint64_t old, struct kc_err *err)
{
	unsigned int flags = ram->flags & ~KC_RAM_UNTRIED;
	char name[32];
	int rc;

	rc = kc_ram_replace_meta(ram, ram->epoch, flags, ram->on_disk, err);
	if (rc)
		return rc;
	ram->flags = flags;
	unlinkat(ram->dir, "undo", 0);
	kc_ram_state_name(name, old);
	if (old)
		unlinkat(ram->dir, name, 0);
	return 0;
}

/* The epoch is in its files, and untried. */
static int try(struct kc_ram *ram, uint64_t old, struct kc_err *err)
{
	struct kc_err why;
	int rc = ram->trial->run(ram->trial->ctx, err);

	if (!rc)
		return prove(ram, old, err);
	/* Nothing is known against it, and there is nothing else. */
	if (rc == -ECANCELED && !old)
		return 0;
	if (kc_ram_go_back(ram, &why)) {
		kc_log(KC_LOG_ERROR, "cannot go back to epoch %" PRIu64 ": %s", old, why.text);
		ram->torn = true;
	}
	return rc;
}

static int ram_commit(void *ctx, uint64_t nr, const struct kc_devices *state, struct kc_err *err)
{
	unsigned int flags = state->stopped ? KC_RAM_STOPPED : 0;
	struct kc_devices copy = { .data = NULL };
	struct kc_ram *ram = ctx;
	uint64_t now = kc_wall_ms(), old = ram->epoch;
	char name[32];
	int rc;

	if (ram->trial && ram->trial->needed(ram->trial->ctx, state))
		flags |= KC_RAM_UNTRIED;
	/* All that may fail for want of space comes before the epoch is complete. */
	kc_ram_state_name(name, nr);
	rc = kc_devices_keep(&copy, state, err);
	if (!rc)
		rc = kc_ram_write_file(ram, name, state->data, state->len, NULL, 0, err);
	if (!rc)
		rc = kc_ram_write_meta_tmp(ram, nr, now, flags, ram->durable, err);
	if (!rc && !ram->direct && (flags & KC_RAM_UNTRIED))
		rc = keep_way_back(ram, err);
	if (!rc && !ram->direct)
		rc = seal(ram, nr, now, flags, err);
	if (rc) {
		unlinkat(ram->dir, name, 0);
		unlinkat(ram->dir, "undo", 0);
		free(copy.data);
		ram_abort(ram);
		return rc;
	}
	ram->torn = !ram->direct;
	if (!ram->direct)
		rc = apply(ram, ram->redo, ram->entries, ram->nr_entries, ram->nr_slots, err);
	if (!rc)
		rc = arrived(ram, nr, now, flags, err);
	kc_ram_drop(ram);
	if (rc) {
		free(copy.data);
		return rc;
	}
	ram->torn = false;
	free(ram->state.data);
	ram->state = copy;
	return flags & KC_RAM_UNTRIED ? try(ram, old, err) : 0;
}

const struct kc_rx_ops kc_ram_ops = {
	.last = ram_last,
	.begin = ram_begin,
	.base = ram_base,
	.base_state = ram_base_state,
	.page = ram_page,
	.zero = ram_zero,
	.part = ram_part,
	.commit = ram_commit,
	.abort = ram_abort,
};

/* The end of redo or undo, and its entries, malloc()ed; what is wrong with them is not said. */
static int read_end(struct kc_ram *ram, int fd, const char magic[8], struct trailer *t,
		    struct entry **out)
{
	struct entry *entries;
	uint64_t i, size;
	struct stat st;

	*out = NULL;
	if (fstat(fd, &st) || st.st_size < (off_t)sizeof(*t) ||
	    pread(fd, t, sizeof(*t), st.st_size - sizeof(*t)) != (ssize_t)sizeof(*t))
		return -EPROTO;
	size = st.st_size - sizeof(*t);
	if (memcmp(t->magic, magic, sizeof(t->magic)) || t->nr_slots > size / KC_PAGE_SIZE ||
	    t->nr_entries != (size - t->nr_slots * KC_PAGE_SIZE) / sizeof(*entries) ||
	    (size - t->nr_slots * KC_PAGE_SIZE) % sizeof(*entries))
		return -EPROTO;
	size -= t->nr_slots * KC_PAGE_SIZE;
	entries = malloc(size + 1);
	if (!entries)
		return -ENOMEM;
	*out = entries;
	if (pread(fd, entries, size, t->nr_slots * KC_PAGE_SIZE) != (ssize_t)size ||
	    XXH3_64bits_withSeed(entries, size,
				 XXH3_64bits(t, offsetof(struct trailer, xxh))) != t->xxh)
		return -EPROTO;
	for (i = 0; i < t->nr_entries; i++) {
		if (entries[i].page >= kc_guest_block_pages(&ram->guest, entries[i].block) ||
		    (entries[i].slot != SLOT_ZERO && entries[i].slot - 1 >= t->nr_slots))
			return -EPROTO;
	}
	return 0;
}

static int replay(struct kc_ram *ram, const char *name, const char magic[8], struct kc_err *err)
{
	bool redo = magic == redo_magic;
	struct entry *entries = NULL;
	struct trailer t;
	int fd, rc;

	fd = openat(ram->dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	if (fd < 0)
		return errno == ENOENT && redo ? 0 : kc_ram_fail(err, ram, "open undo or redo");
	rc = read_end(ram, fd, magic, &t, &entries);
	if (rc == -ENOMEM) {
		kc_fail(err, ENOMEM, "out of memory");
	} else if (rc) {
		kc_fail(err, EPROTO, "%s/%s is damaged: remove %s and start from nothing", ram->path,
			name, ram->path);
	} else if (redo && (t.epoch <= ram->epoch || !ram->epoch)) {
		/* It had arrived, or is of before the boot */
	} else {
		kc_log(KC_LOG_INFO, redo ? "finishing epoch %" PRIu64 ", which was complete" :
		       "going back to epoch %" PRIu64, t.epoch);
		rc = apply(ram, fd, entries, t.nr_entries, t.nr_slots, err);
		if (!rc)
			rc = kc_ram_write_meta_tmp(ram, t.epoch, t.time_ms, t.flags, ram->durable,
						   err);
		if (!rc)
			rc = arrived(ram, t.epoch, t.time_ms, t.flags, err);
	}
	free(entries);
	close(fd);
	return rc;
}

int kc_ram_redo_again(struct kc_ram *ram, struct kc_err *err)
{
	return replay(ram, "redo", redo_magic, err);
}

int kc_ram_go_back(struct kc_ram *ram, struct kc_err *err)
{
	char name[32];
	int rc;

	if (!faccessat(ram->dir, "undo", F_OK, AT_SYMLINK_NOFOLLOW)) {
		rc = replay(ram, "undo", undo_magic, err);
		if (!rc)
			rc = kc_ram_read_state(ram, err);
		if (!rc)
			unlinkat(ram->dir, "undo", 0);
		return rc;
	}
	/* There was none before. */
	kc_ram_state_name(name, ram->epoch);
	rc = kc_ram_replace_meta(ram, 0, 0, false, err);
	if (rc)
		return rc;
	ram->epoch = 0;
	ram->flags = 0;
	free(ram->state.data);
	ram->state = (struct kc_devices){ .data = NULL };
	unlinkat(ram->dir, name, 0);
	return 0;
}

int kc_ram_read_state(struct kc_ram *ram, struct kc_err *err)
{
	char name[32];
	size_t len;
	int rc;

	free(ram->state.data);
	ram->state.data = NULL;
	kc_ram_state_name(name, ram->epoch);
	rc = kc_ram_read_file(ram, name, &ram->state.data, &len);
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
	rc = kc_ram_redo_again(ram, err);
	if (!rc && (ram->flags & KC_RAM_UNTRIED))
		rc = kc_ram_go_back(ram, err);
	else if (!rc)
		rc = kc_ram_read_state(ram, err);
	if (!rc)
		ram->torn = false;
	return rc;
}
