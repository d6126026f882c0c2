/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KVMDIRTY_PAGESET_H
#define KVMDIRTY_PAGESET_H

/*
 * A set of pages of a memslot: a bitmap, with a bit above each of its words
 * that is not zero, and so on up to a single word.  To find the next page costs
 * a few words however large the memslot is; memory is used where pages are.
 *
 * No locking: that is the caller's.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGESET_LEVELS	6	/* 64^6 pages and more than KVM allows */

struct pageset {
	uint64_t *level[PAGESET_LEVELS];	/* 0 is the bitmap itself */
	uint64_t words[PAGESET_LEVELS];
	unsigned int nr_levels;
	void *mem;
	size_t bytes;
};

/* pageset_init() - an empty set of pages 0 to @npages - 1.  0 or -ENOMEM. */
int pageset_init(struct pageset *set, uint64_t npages);
void pageset_destroy(struct pageset *set);

/* Add or remove @npages >= 1 pages from @offset on; they must be in range. */
void pageset_add(struct pageset *set, uint64_t offset, uint64_t npages);
void pageset_del(struct pageset *set, uint64_t offset, uint64_t npages);

/* Add those of 64 pages whose bits are set in @mask; @word counts in 64 pages. */
void pageset_add_word(struct pageset *set, uint64_t word, uint64_t mask);

/* pageset_next() - the first page from @from on, or UINT64_MAX */
uint64_t pageset_next(const struct pageset *set, uint64_t from);

/* pageset_run() - how many pages from @offset on, which is one, up to @max */
uint64_t pageset_run(const struct pageset *set, uint64_t offset, uint64_t max);

static inline bool pageset_empty(const struct pageset *set)
{
	return !set->level[set->nr_levels - 1][0];
}

#endif
