// SPDX-License-Identifier: GPL-2.0-only
/*
 * The RAM that a standby holds: redo and undo, the files by which an epoch gets into it whole, or
 * not at all.
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

static const char redo_magic[8] = "KCREDO3", undo_magic[8] = "KCUNDO3";

int kc_ram_apply(struct kc_ram *ram, int redo, const struct entry *entries, uint64_t nr_entries,
		 uint64_t nr_slots, struct kc_err *err)
{
	bool mapped = redo == ram->redo && nr_slots <= ram->in_map;
	const uint8_t *pages = mapped ? ram->redo_map : NULL;
	uint64_t i;
	int rc = 0;

	if (nr_slots && !mapped) {
		pages = mmap(NULL, nr_slots * KC_PAGE_SIZE, PROT_READ, MAP_SHARED, redo, 0);
		if (pages == MAP_FAILED)
			return kc_ram_fail(err, ram, "map redo");
	}
	for (i = 0; i < nr_entries && !rc; i++) {
		const struct entry *e = &entries[i];

		if (e->slot == SLOT_HOLE)
			rc = kc_ram_punch(ram, e->block, e->page, e->npages, err);
		else if (e->slot == SLOT_ZERO)
			rc = kc_ram_write_zeros(ram, e->block, e->page, e->npages, err);
		else
			rc = kc_ram_reserve(ram, e->block, e->page, err);
		if (!rc && e->slot != SLOT_HOLE && e->slot != SLOT_ZERO)
			rc = kc_ram_write_page(ram, e->block, e->page,
					       pages + (uint64_t)(e->slot - 1) * KC_PAGE_SIZE, err);
	}
	if (pages && !mapped)
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

int kc_ram_arrived(struct kc_ram *ram, uint64_t nr, uint64_t time_ms, unsigned int flags,
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
	kc_ram_keep_redo(ram);
	if (!ram->keeps_redo)
		unlinkat(ram->dir, "redo", 0);
	/* The state that there is a way back to stays. */
	if (old && old != nr && !(flags & KC_RAM_UNTRIED)) {
		kc_ram_state_name(name, old);
		/* As with redo: nobody reads it, and the next one is written over it */
		if (ram->durable || renameat(ram->dir, name, ram->dir, "state.tmp"))
			unlinkat(ram->dir, name, 0);
	}
	return rc;
}

/* What comes after the pages in redo and undo */
static int write_end(struct kc_ram *ram, int fd, struct trailer *t, const char magic[8],
		     const struct entry *entries, size_t nr)
{
	size_t len = nr * sizeof(*entries);

	t->nr_entries = nr;
	memcpy(t->magic, magic, sizeof(t->magic));
	t->xxh = XXH3_64bits_withSeed(entries, len,
				      XXH3_64bits(t, offsetof(struct trailer, xxh)));
	return kc_ram_write_full(fd, entries, len) || kc_ram_write_full(fd, t, sizeof(*t)) ||
	       (ram->durable && fdatasync(fd));
}

/* A run as the slots have it by now: pages of it may have got contents later */
static int settle_run(struct kc_ram *ram, const struct zero_run *z, bool punch,
		      struct kc_err *err)
{
	uint32_t *at = kc_ram_slot(ram, z->block, z->page);
	uint64_t i, n, k;
	int rc = 0;

	for (i = 0; i < z->npages && !rc; i += n) {
		struct entry e = { z->page + i, z->block, at[i], 1 };

		for (n = 1; i + n < z->npages && at[i + n] == at[i]; n++)
			;
		if (e.slot != SLOT_ZERO && e.slot != SLOT_HOLE)
			continue;
		/* Runs that overlap make no more entries than there are pages */
		for (k = i; k < i + n; k++)
			at[k] = SLOT_NONE;
		e.npages = n;
		if (!punch)
			e.slot = SLOT_ZERO;
		rc = kc_ram_add_entry(ram, &e, err);
	}
	return rc;
}

/*
 * All of the epoch is here: entries become what is to be done, in any order, and what that needs is
 * allocated.
 */
int kc_ram_make_ready(struct kc_ram *ram, bool punch, struct kc_err *err)
{
	size_t i, n = 0;
	int rc = 0;

	for (i = 0; i < ram->nr_entries && !rc; i++) {
		struct entry e = ram->entries[i];

		e.slot = *kc_ram_slot(ram, e.block, e.page);
		/* A run has it */
		if (e.slot == SLOT_ZERO || e.slot == SLOT_HOLE)
			continue;
		ram->entries[n++] = e;
		rc = kc_ram_reserve(ram, e.block, e.page, err);
	}
	if (rc)
		return rc;
	ram->nr_entries = n;
	for (i = 0; i < ram->nr_zeros && !rc; i++)
		rc = settle_run(ram, &ram->zeros[i], punch, err);
	return rc;
}

int kc_ram_seal(struct kc_ram *ram, uint64_t nr, uint64_t time_ms, unsigned int flags,
		struct kc_err *err)
{
	struct trailer t = { .epoch = nr, .time_ms = time_ms, .flags = flags,
			     .nr_slots = ram->nr_slots };
	int rc;

	rc = kc_ram_flush(ram, err);
	if (rc)
		return rc;
	/* It may have been longer before, and its end is looked for at its end */
	if (ftruncate(ram->redo, (off_t)ram->nr_slots * KC_PAGE_SIZE) ||
	    lseek(ram->redo, 0, SEEK_END) < 0)
		return kc_ram_fail(err, ram, "shorten redo.tmp");
	if (write_end(ram, ram->redo, &t, redo_magic, ram->entries, ram->nr_entries))
		return kc_ram_fail(err, ram, "write redo.tmp");
	if (renameat(ram->dir, "redo.tmp", ram->dir, "redo"))
		return kc_ram_fail(err, ram, "rename redo.tmp");
	rc = kc_ram_sync_dir(ram, err);
	if (rc)
		unlinkat(ram->dir, "redo", 0); /* its state is about to go, too */
	return rc;
}

/* What the epoch is about to replace, page by page: entries, which are zero but for some, to @e */
static bool write_old(struct kc_ram *ram, int fd, struct trailer *t, struct entry *e)
{
	uint8_t page[KC_PAGE_SIZE];
	bool failed = false;
	size_t i;
	uint64_t k;

	for (i = 0; i < ram->nr_entries; i++) {
		for (k = 0; k < ram->entries[i].npages && !failed; k++, e++) {
			*e = (struct entry){ ram->entries[i].page + k, ram->entries[i].block,
					     SLOT_ZERO, 1 };
			failed = kc_ram_read_page(ram, e->block, e->page, page, NULL);
			if (failed || kc_is_zero_page(page))
				continue;
			e->slot = ++t->nr_slots;
			failed = kc_ram_write_full(fd, page, KC_PAGE_SIZE);
		}
	}
	return failed;
}

int kc_ram_keep_way_back(struct kc_ram *ram, struct kc_err *err)
{
	struct trailer t = { .epoch = ram->epoch, .time_ms = ram->time_ms, .flags = ram->flags };
	struct entry *old;
	bool failed;
	size_t i, n = 0;
	int fd;

	for (i = 0; i < ram->nr_entries; i++)
		n += ram->entries[i].npages;
	old = malloc((n + 1) * sizeof(*old));
	if (!old)
		return kc_fail(err, ENOMEM, "out of memory");
	fd = openat(ram->dir, "undo.tmp", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW,
		    0600);
	if (fd < 0) {
		free(old);
		return kc_ram_fail(err, ram, "make undo.tmp");
	}
	failed = write_old(ram, fd, &t, old) || write_end(ram, fd, &t, undo_magic, old, n) ||
		 renameat(ram->dir, "undo.tmp", ram->dir, "undo");
	free(old);
	if (failed) {
		int rc = kc_ram_fail(err, ram, "write undo.tmp");

		close(fd);
		unlinkat(ram->dir, "undo.tmp", 0);
		return rc;
	}
	close(fd);
	return kc_ram_sync_dir(ram, err);
}

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
		uint64_t npages = kc_guest_block_pages(&ram->guest, entries[i].block);
		uint32_t slot = entries[i].slot;

		if (entries[i].page >= npages || !entries[i].npages ||
		    entries[i].npages > npages - entries[i].page ||
		    (slot == SLOT_HOLE && entries[i].block >= KC_DISK_BLOCK) ||
		    (slot != SLOT_ZERO && slot != SLOT_HOLE &&
		     (slot - 1 >= t->nr_slots || entries[i].npages != 1)))
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
	} else if (redo && !ram->epoch) {
		/* Of before the boot, or it would be of no epoch: its host may have left half of it */
		rc = 0;
	} else if (rc) {
		kc_fail(err, EPROTO, "%s/%s is damaged: remove %s and start from nothing", ram->path,
			name, ram->path);
	} else if (redo && t.epoch <= ram->epoch) {
		/* It had arrived */
	} else {
		kc_log(KC_LOG_INFO, redo ? "finishing epoch %" PRIu64 ", which was complete" :
		       "going back to epoch %" PRIu64, t.epoch);
		rc = kc_ram_apply(ram, fd, entries, t.nr_entries, t.nr_slots, err);
		if (!rc)
			rc = kc_ram_write_meta_tmp(ram, t.epoch, t.time_ms, t.flags, ram->durable,
						   err);
		if (!rc)
			rc = kc_ram_arrived(ram, t.epoch, t.time_ms, t.flags, err);
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

