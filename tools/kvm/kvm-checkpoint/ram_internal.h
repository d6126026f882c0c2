/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of the RAM that a standby holds share.
 */
#ifndef KC_RAM_INTERNAL_H
#define KC_RAM_INTERNAL_H

#include "ram.h"

#define WBUF_PAGES 64u
#define KEPT_SLOTS 4096u	/* in a redo that has been applied */
#define SLOT_NONE 0u
#define SLOT_ZERO UINT32_MAX
#define SLOT_HOLE (UINT32_MAX - 1)	/* zero, and the sender has no memory there */

/* Fewer pages than this in a row are not worth a hole in a file of RAM */
#define MIN_PUNCH 64u

/* In redo after the pages; of this host's own byte order, as it never leaves it. */
struct entry {
	uint64_t page;
	uint32_t block;
	uint32_t slot;		/* number of the page in redo, from 1, or one of the above */
	uint64_t npages;	/* in a row, if it is zero; else 1 */
};

/* The same of more than one page in a row */
struct zero_run {
	uint64_t page, npages;
	uint32_t block, slot;
};

struct trailer {
	char magic[8];
	uint64_t epoch, time_ms, flags, nr_slots, nr_entries;
	uint64_t xxh;		/* of the entries and of what is above */
};

struct meta {
	char magic[8];
	uint32_t flags, durable, hello_len, reserved;
	uint64_t epoch, time_ms;
	uint8_t id[16], sender[16];
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
	uint64_t time_ms;	/* when it was complete, by the clock on the wall */
	uint8_t id[16], sender[16];
	uint8_t *map[KC_MAX_BLOCKS];
	int fd[KC_MAX_BLOCKS];
	uint64_t *punched[KC_MAX_BLOCKS];	/* a bit for each page: it has no memory */
	uint64_t nr_punched;
	bool keeps_memory;	/* none is to be without */
	int disk[KC_MAX_DISKS];	/* -1: not open */
	char *disk_path[KC_MAX_DISKS];
	unsigned int nr_paths;
	bool without_disks;	/* kc_ram_leave_disks_out() */
	struct kc_devices state;

	const struct kc_ram_trial *trial;

	/* The epoch that is being received. */
	bool direct;
	int redo;
	bool keeps_redo;	/* redo.tmp is that of the last epoch, to be written over */
	uint8_t *redo_map;
	uint32_t in_map;	/* so many pages of it are written there, the others by wbuf */
	uint32_t *slots[KC_MAX_BLOCKS + KC_MAX_DISKS];
	struct entry *entries;
	size_t nr_entries, room;
	struct zero_run *zeros;
	size_t nr_zeros, zeros_room;
	uint32_t nr_slots, flushed;	/* flushed: not less than in_map */
	uint8_t *wbuf;
	uint8_t base[KC_PAGE_SIZE];
};

/* Where in redo the page is, if it is in the open epoch */
static inline uint32_t *kc_ram_slot(const struct kc_ram *ram, uint32_t block, uint64_t page)
{
	unsigned int i = block < KC_DISK_BLOCK ? block : KC_MAX_BLOCKS + block - KC_DISK_BLOCK;

	return &ram->slots[i][page];
}

/* --- ram_disk.c: disks ----------------------------------------------------- */

/* Of a new guest: its images are opened, or made */
int kc_ram_new_disks(struct kc_ram *ram, struct kc_err *err);
int kc_ram_sync_disks(struct kc_ram *ram, struct kc_err *err);

/* --- ram_pages.c: pages of blocks and disks, as of the last complete epoch -- */

/* Of a block that was just mapped: what its file has no memory for; @new: nothing was written yet */
int kc_ram_find_holes(struct kc_ram *ram, uint32_t block, bool new, struct kc_err *err);
/* A page of RAM, to be read */
const void *kc_ram_page(const struct kc_ram *ram, uint32_t block, uint64_t page);
/* Once that was done the page can be written */
int kc_ram_reserve(struct kc_ram *ram, uint32_t block, uint64_t page, struct kc_err *err);
int kc_ram_write_zeros(struct kc_ram *ram, uint32_t block, uint64_t page, uint64_t n,
		       struct kc_err *err);
/* Zero from now on, and without memory if that is worth it */
int kc_ram_punch(struct kc_ram *ram, uint32_t block, uint64_t page, uint64_t n,
		 struct kc_err *err);
int kc_ram_read_page(const struct kc_ram *ram, uint32_t block, uint64_t page, void *to,
		     struct kc_err *err);
int kc_ram_write_page(struct kc_ram *ram, uint32_t block, uint64_t page, const void *from,
		      struct kc_err *err);

/* --- ram_meta.c: small files, and meta ------------------------------------ */

/* What errno says of it. */
int kc_ram_fail(struct kc_err *err, const struct kc_ram *ram, const char *what);
int kc_ram_write_full(int fd, const void *buf, size_t len);
int kc_ram_write_file(struct kc_ram *ram, const char *name, const void *a, size_t a_len,
		      const void *b, size_t b_len, struct kc_err *err);
/* Whole file into malloc()ed memory. */
int kc_ram_read_file(struct kc_ram *ram, const char *name, uint8_t **buf, size_t *len);
int kc_ram_sync_dir(struct kc_ram *ram, struct kc_err *err);
void kc_ram_state_name(char name[32], uint64_t epoch);

/* It counts once it is called "meta". */
int kc_ram_write_meta_tmp(struct kc_ram *ram, uint64_t epoch, uint64_t time_ms,
			  unsigned int flags, bool on_disk, struct kc_err *err);
int kc_ram_rename_meta(struct kc_ram *ram, struct kc_err *err);
/* At once, and nothing else is new. */
int kc_ram_replace_meta(struct kc_ram *ram, uint64_t epoch, unsigned int flags, bool on_disk,
			struct kc_err *err);
int kc_ram_read_meta(struct kc_ram *ram, struct kc_err *err);

/* --- ram_epoch.c: an epoch that arrives ----------------------------------- */

/* Forget the epoch that is being received. */
void kc_ram_drop(struct kc_ram *ram);
int kc_ram_flush(struct kc_ram *ram, struct kc_err *err);
/* redo has been applied: the next epoch may write over it */
void kc_ram_keep_redo(struct kc_ram *ram);
void kc_ram_close_redo(struct kc_ram *ram);
/* A page as the open epoch has it by now */
int kc_ram_read_open(struct kc_ram *ram, uint32_t block, uint64_t page, uint8_t *to,
		     struct kc_err *err);
int kc_ram_add_entry(struct kc_ram *ram, const struct entry *e, struct kc_err *err);

/* --- ram_redo.c: how it gets into the RAM --------------------------------- */

/*
 * All of the epoch is here: entries become what is to be done, in any order, and what that needs is
 * allocated.  @punch: what the sender has no memory for needs none here.
 */
int kc_ram_make_ready(struct kc_ram *ram, bool punch, struct kc_err *err);
/* What the epoch is about to replace goes to undo. */
int kc_ram_keep_way_back(struct kc_ram *ram, struct kc_err *err);
/* redo.tmp is whole: give it its end and its name. */
int kc_ram_seal(struct kc_ram *ram, uint64_t nr, uint64_t time_ms, unsigned int flags,
		struct kc_err *err);
/* Copy the pages of a complete epoch to where they belong. */
int kc_ram_apply(struct kc_ram *ram, int redo, const struct entry *entries, uint64_t nr_entries,
		 uint64_t nr_slots, struct kc_err *err);
/* The RAM files have the epoch: say so, and remove what only led there. */
int kc_ram_arrived(struct kc_ram *ram, uint64_t nr, uint64_t time_ms, unsigned int flags,
		   struct kc_err *err);
/* A complete epoch that may not have reached the RAM files. */
int kc_ram_redo_again(struct kc_ram *ram, struct kc_err *err);
/* The way back from an epoch that was not tried: to the one before, or to none. */
int kc_ram_go_back(struct kc_ram *ram, struct kc_err *err);
int kc_ram_read_state(struct kc_ram *ram, struct kc_err *err);

#endif
