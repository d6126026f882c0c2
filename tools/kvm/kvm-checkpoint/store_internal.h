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

/**
 * struct kc_place - where the pages of a chain are
 * @at: for each page 0 if it was nowhere yet, KC_AT_ZERO, or the number in the chain + 1, shifted
 *	left by KC_AT_SHIFT, and the offset of its record.
 * @fds: files of the chain that are open.
 */
struct kc_place {
	const struct kc_guest *guest;
	uint64_t *at[KC_MAX_BLOCKS];
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

/* Read the PAGE record at a place into @buf. */
int kc_place_read(struct kc_place *pl, const struct kc_store *st, const size_t *chain, uint64_t at,
		  uint8_t buf[KC_REC_HDR + KC_PAGE_HDR + KC_PAGE_SIZE], struct kc_rec *rec,
		  struct kc_err *err);

#endif
