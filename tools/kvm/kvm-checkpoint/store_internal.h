/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of store.h share among each other: store.c looks at a directory, store_replay.c
 * reads chains, store_verify.c finds out which are sound, store_restore.c writes them out,
 * store_place.c finds single pages in them, store_merge.c makes one epoch of many, and store_sink.c
 * takes new ones.
 */
#ifndef KC_STORE_INTERNAL_H
#define KC_STORE_INTERNAL_H

#include <sys/types.h>

#include "store.h"

/* An epoch that is being written, and one that is being merged. */
#define KC_STORE_TMP "epoch.tmp"
#define KC_STORE_MERGE_TMP "merge.tmp"

void kc_store_file_name(char name[40], uint64_t nr);
/* A file descriptor, or -1 and errno; EINVAL for what is not a regular file. */
int kc_store_open_file(const struct kc_store *st, uint64_t nr);
/* The index of an epoch's file, or -1. */
ssize_t kc_store_find(const struct kc_store *st, uint64_t nr);

/* *nr: the last sound epoch, 0 if there is none. */
int kc_store_last_sound(const struct kc_store *st, uint64_t *nr, struct kc_err *err);

/* All up to epoch @nr into one full epoch with its name; @bytes: the size of its file. */
int kc_store_merge(const char *path, uint64_t nr, uint64_t *bytes, struct kc_err *err);

/* --- Where the last version of each page is ------------------------------- */

#define KC_AT_ZERO 1ull
#define KC_AT_SHIFT 42
#define KC_AT_PARTS (1ull << 63)

/* Part of a page: where its record is, and where what it was written to is, as in kc_place_at() */
struct kc_place_part {
	uint64_t at, before;
};

/**
 * struct kc_place - where the pages of a chain are
 * @at: by kc_block_index() and groups of pages; a group that is nowhere, or all zero, has no
 *	memory of its own: what is kept is in proportion to what is not zero.
 * @parts: of pages that have some.
 * @fds: files of the chain that are open.
 */
struct kc_place {
	const struct kc_guest *guest;
	uint64_t **at[KC_MAX_INDEX];
	struct kc_place_part *parts;
	size_t nr_parts, room;
	struct kc_devices state;
	size_t nr_fds;
	int *fds;
	struct kc_unpacker *up;
};

/* Also if this fails, kc_place_free() is needed. */
int kc_place_init(struct kc_place *pl, const struct kc_guest *guest, size_t nr_files,
		  struct kc_err *err);
void kc_place_free(struct kc_place *pl);

/* To be given to kc_store_replay(), with a struct kc_place as its context; and what is in them. */
extern const struct kc_store_ops kc_place_ops;
int kc_place_page(void *ctx, size_t file, uint64_t offset, uint16_t block, uint64_t page,
		  const void *data, struct kc_err *err);
int kc_place_zero(void *ctx, uint16_t block, uint64_t page, uint64_t n, struct kc_err *err);
int kc_place_part(void *ctx, size_t file, uint64_t offset, const struct kc_part *part,
		  struct kc_err *err);

/*
 * Where a page is: 0 if it was nowhere yet, KC_AT_ZERO, KC_AT_PARTS and an index into pl->parts, or
 * the number in the chain + 1, shifted left by KC_AT_SHIFT, and the offset of its record.
 */
uint64_t kc_place_at(const struct kc_place *pl, uint16_t block, uint64_t page);

/* Of a PAGE, and more than a PART is. */
#define KC_PAGE_REC_MAX (KC_REC_HDR + KC_PAGE_HDR + KC_PAGE_SIZE)

/* Read the record of @type that is whole and at a place into @buf. */
int kc_place_read(struct kc_place *pl, const struct kc_store *st, const size_t *chain, uint64_t at,
		  uint16_t type, uint8_t buf[KC_PAGE_REC_MAX], struct kc_rec *rec,
		  struct kc_err *err);

/* The contents of a page, wherever it is. */
int kc_place_get(struct kc_place *pl, const struct kc_store *st, const size_t *chain,
		 uint16_t block, uint64_t page, uint8_t out[KC_PAGE_SIZE], struct kc_err *err);

#endif
