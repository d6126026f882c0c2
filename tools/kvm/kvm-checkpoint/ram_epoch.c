// SPDX-License-Identifier: GPL-2.0-only
/*
 * The RAM that a standby holds: an epoch on its way into it.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include "ram_internal.h"

static uint64_t ram_last(void *ctx)
{
	struct kc_ram *ram = ctx;

	return ram->epoch;
}

static void fill_slots(const struct kc_ram *ram, uint32_t block, uint64_t page, uint64_t n,
		       uint32_t slot)
{
	uint32_t *at = kc_ram_slot(ram, block, page);

	while (n--)
		*at++ = slot;
}

void kc_ram_close_redo(struct kc_ram *ram)
{
	if (ram->redo_map)
		munmap(ram->redo_map, KEPT_SLOTS * KC_PAGE_SIZE);
	ram->redo_map = NULL;
	ram->in_map = ram->flushed = 0;
	if (ram->redo >= 0)
		close(ram->redo);
	ram->redo = -1;
	ram->keeps_redo = false;
}

/*
 * Its pages need not be allocated again, and are written where they are.  Not if the host may crash:
 * its disk might have what is written over it, and not its new name.  Where a file system has to find
 * room for what is written over, that is an error of write(), and would be a SIGBUS of a mapping; what
 * tmpfs has, it has.
 */
void kc_ram_keep_redo(struct kc_ram *ram)
{
	struct statfs fs;
	void *map;

	ram->keeps_redo = ram->redo >= 0 && !ram->durable && ram->nr_slots <= KEPT_SLOTS &&
			  !renameat(ram->dir, "redo", ram->dir, "redo.tmp");
	ram->in_map = 0;
	if (!ram->keeps_redo || fstatfs(ram->redo, &fs) || fs.f_type != TMPFS_MAGIC)
		return;
	if (!ram->redo_map) {
		map = mmap(NULL, KEPT_SLOTS * KC_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
			   ram->redo, 0);
		if (map == MAP_FAILED)
			return;
		kc_no_dump(map, KEPT_SLOTS * KC_PAGE_SIZE);
		ram->redo_map = map;
	}
	/* What lies behind them has the end of the file, and is cut off with it */
	ram->in_map = ram->nr_slots;
}

void kc_ram_drop(struct kc_ram *ram)
{
	size_t i;

	for (i = 0; i < ram->nr_entries; i++)
		fill_slots(ram, ram->entries[i].block, ram->entries[i].page,
			   ram->entries[i].npages, SLOT_NONE);
	for (i = 0; i < ram->nr_zeros; i++)
		fill_slots(ram, ram->zeros[i].block, ram->zeros[i].page, ram->zeros[i].npages,
			   SLOT_NONE);
	free(ram->entries);
	free(ram->zeros);
	ram->entries = NULL;
	ram->zeros = NULL;
	ram->nr_entries = ram->room = 0;
	ram->nr_zeros = ram->zeros_room = 0;
	ram->nr_slots = 0;
	ram->flushed = ram->in_map;
	if (!ram->keeps_redo)
		kc_ram_close_redo(ram);
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
	if (!ram->keeps_redo)
		ram->redo = openat(ram->dir, "redo.tmp",
				   O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
	/* It is this epoch's from here on */
	ram->keeps_redo = false;
	if (ram->redo < 0 || lseek(ram->redo, (off_t)ram->in_map * KC_PAGE_SIZE, SEEK_SET) < 0)
		return kc_ram_fail(err, ram, "make redo.tmp");
	return 0;
}

static const void *ram_base(void *ctx, uint16_t block, uint64_t page)
{
	struct kc_ram *ram = ctx;

	/* A delta needs a base that is complete. */
	if (ram->direct)
		return NULL;
	if (block < KC_DISK_BLOCK)
		return kc_ram_page(ram, block, page);
	return kc_ram_read_page(ram, block, page, ram->base, NULL) ? NULL : ram->base;
}

static const struct kc_devices *ram_base_state(void *ctx)
{
	struct kc_ram *ram = ctx;

	return ram->epoch ? &ram->state : NULL;
}

int kc_ram_flush(struct kc_ram *ram, struct kc_err *err)
{
	uint32_t n = ram->nr_slots > ram->flushed ? ram->nr_slots - ram->flushed : 0;

	if (n && kc_ram_write_full(ram->redo, ram->wbuf, (size_t)n * KC_PAGE_SIZE))
		return kc_ram_fail(err, ram, "write redo.tmp");
	ram->flushed += n;
	return 0;
}

/* Room for one more in an array */
static int make_room(void **array, size_t nr, size_t *room, size_t size, struct kc_err *err)
{
	size_t n = *room ? 2 * *room : 1024;
	void *p;

	if (nr < *room)
		return 0;
	p = realloc(*array, n * size);
	if (!p)
		return kc_fail(err, ENOMEM, "out of memory");
	*array = p;
	*room = n;
	return 0;
}

int kc_ram_add_entry(struct kc_ram *ram, const struct entry *e, struct kc_err *err)
{
	int rc = make_room((void **)&ram->entries, ram->nr_entries, &ram->room, sizeof(*e), err);

	if (!rc)
		ram->entries[ram->nr_entries++] = *e;
	return rc;
}

/* What comes next in a block: pages in a row that are the same zeros, or one with contents, or none */
static uint64_t noted_run(const uint32_t *at, uint64_t left)
{
	uint64_t n = 1;

	while (n < left && at[n] == at[0])
		n++;
	return n;
}

/*
 * The slots have all of it: of each page what came last, and of each run what is left of it.  So one
 * of the lists is made anew, which cannot become longer than there are pages.
 */
static void note_anew(struct kc_ram *ram, bool zeros)
{
	uint64_t npages, page, n;
	uint32_t i, block, *at;

	ram->nr_zeros = zeros ? 0 : ram->nr_zeros;
	ram->nr_entries = zeros ? ram->nr_entries : 0;
	for (i = 0; i < KC_MAX_INDEX; i++) {
		block = kc_block_of_index(i);
		npages = kc_guest_block_pages(&ram->guest, block);
		for (page = 0; page < npages; page += n) {
			at = kc_ram_slot(ram, block, page);
			n = noted_run(at, npages - page);
			if (*at == SLOT_NONE || zeros != (*at == SLOT_ZERO || *at == SLOT_HOLE))
				continue;
			if (zeros)
				ram->zeros[ram->nr_zeros++] =
					(struct zero_run){ page, n, block, *at };
			else
				ram->entries[ram->nr_entries++] =
					(struct entry){ page, block, *at, 1 };
		}
	}
}

/*
 * Who says the same again and again, without an end, is not to have all memory: no more is kept than
 * twice what there are pages.
 */
static void bound_notes(struct kc_ram *ram)
{
	uint64_t most = 2 * (kc_guest_pages(&ram->guest) + kc_guest_disk_pages(&ram->guest));

	if (ram->nr_zeros > most)
		note_anew(ram, true);
	if (ram->nr_entries > most)
		note_anew(ram, false);
}

/*
 * The page is in the open epoch, at a slot of redo.  One that was zero in it before may be noted
 * twice, which does no harm: where it is, the slots tell.
 */
static int note(struct kc_ram *ram, uint16_t block, uint64_t page, uint32_t slot,
		struct kc_err *err)
{
	uint32_t *at = kc_ram_slot(ram, block, page);
	int rc = 0;

	bound_notes(ram);
	if (*at == SLOT_NONE || *at == SLOT_ZERO || *at == SLOT_HOLE)
		rc = kc_ram_add_entry(ram, &(struct entry){ page, block, slot, 1 }, err);
	if (!rc)
		*at = slot;
	return rc;
}

/* The same of zeros */
static int note_zeros(struct kc_ram *ram, const struct kc_zero *z, struct kc_err *err)
{
	uint32_t slot = (z->flags & KC_ZERO_HOLE) && z->block < KC_DISK_BLOCK ? SLOT_HOLE :
			SLOT_ZERO;
	struct zero_run *last;
	int rc = 0;

	bound_notes(ram);
	last = ram->nr_zeros ? &ram->zeros[ram->nr_zeros - 1] : NULL;
	if (last && last->block == z->block && last->slot == slot &&
	    last->page + last->npages == z->page) {
		last->npages += z->npages;
	} else {
		rc = make_room((void **)&ram->zeros, ram->nr_zeros, &ram->zeros_room,
			       sizeof(*last), err);
		if (!rc)
			ram->zeros[ram->nr_zeros++] =
				(struct zero_run){ z->page, z->npages, z->block, slot };
	}
	if (!rc)
		fill_slots(ram, z->block, z->page, z->npages, slot);
	return rc;
}

static void *ram_room(void *ctx)
{
	struct kc_ram *ram = ctx;

	if (ram->nr_slots < ram->in_map)
		return ram->redo_map + (size_t)ram->nr_slots * KC_PAGE_SIZE;
	return ram->wbuf + (size_t)(ram->nr_slots - ram->flushed) * KC_PAGE_SIZE;
}

static int ram_page(void *ctx, uint16_t block, uint64_t page, const void *data, struct kc_err *err)
{
	struct kc_ram *ram = ctx;
	int rc;

	if (ram->direct) {
		rc = kc_ram_reserve(ram, block, page, err);
		return rc ? rc : kc_ram_write_page(ram, block, page, data, err);
	}
	if (ram->nr_slots == SLOT_HOLE - 1)
		return kc_fail(err, EFBIG, "the epoch has too many pages");
	if (data != ram_room(ram))
		memcpy(ram_room(ram), data, KC_PAGE_SIZE);
	ram->nr_slots++;
	rc = note(ram, block, page, ram->nr_slots, err);
	if (!rc && ram->nr_slots == ram->flushed + WBUF_PAGES)
		rc = kc_ram_flush(ram, err);
	return rc;
}

static int ram_zero(void *ctx, const struct kc_zero *z, struct kc_err *err)
{
	struct kc_ram *ram = ctx;

	if (ram->direct)
		return kc_ram_write_zeros(ram, z->block, z->page, z->npages, err);
	return note_zeros(ram, z, err);
}

int kc_ram_read_open(struct kc_ram *ram, uint32_t block, uint64_t page, uint8_t *to,
		     struct kc_err *err)
{
	uint32_t slot = *kc_ram_slot(ram, block, page);
	int rc;

	if (slot == SLOT_NONE)
		return kc_ram_read_page(ram, block, page, to, err);
	if (slot == SLOT_ZERO || slot == SLOT_HOLE) {
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
	unsigned int flags = (state->stopped ? KC_RAM_STOPPED : 0) |
			     (state->unheld ? KC_RAM_UNHELD : 0);
	struct kc_devices copy = { .data = NULL };
	struct kc_ram *ram = ctx;
	uint64_t now = kc_wall_ms(), old = ram->epoch;
	char name[32];
	int rc;

	if (ram->trial && ram->trial->needed(ram->trial->ctx, state))
		flags |= KC_RAM_UNTRIED;
	/* All that may fail for want of space comes before the epoch is complete. */
	kc_ram_state_name(name, nr);
	renameat(ram->dir, "state.tmp", ram->dir, name);	/* if there is one */
	rc = kc_devices_keep(&copy, state, err);
	if (!rc)
		rc = kc_ram_write_file(ram, name, state->data, state->len, NULL, 0, err);
	if (!rc)
		rc = kc_ram_write_meta_tmp(ram, nr, now, flags, ram->durable, err);
	/* On the way back there must be memory for all. */
	if (!rc && !ram->direct)
		rc = kc_ram_make_ready(ram, !(flags & KC_RAM_UNTRIED), err);
	if (!rc && !ram->direct && (flags & KC_RAM_UNTRIED))
		rc = kc_ram_keep_way_back(ram, err);
	if (!rc && !ram->direct)
		rc = kc_ram_seal(ram, nr, now, flags, err);
	if (rc) {
		unlinkat(ram->dir, name, 0);
		unlinkat(ram->dir, "undo", 0);
		free(copy.data);
		ram_abort(ram);
		return rc;
	}
	ram->torn = !ram->direct;
	if (!ram->direct)
		rc = kc_ram_apply(ram, ram->redo, ram->entries, ram->nr_entries, ram->nr_slots, err);
	if (!rc)
		rc = kc_ram_arrived(ram, nr, now, flags, err);
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
	.room = ram_room,
	.page = ram_page,
	.zero = ram_zero,
	.part = ram_part,
	.commit = ram_commit,
	.abort = ram_abort,
};

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
