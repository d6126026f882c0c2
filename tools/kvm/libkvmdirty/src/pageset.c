// SPDX-License-Identifier: GPL-2.0-only
/*
 * A set of pages: see pageset.h.
 *
 * Invariant: a bit of level n + 1 is set if and only if the word of level n that
 * it stands for is not zero.
 */
#include <errno.h>
#include <sys/mman.h>
#include "pageset.h"

int pageset_init(struct pageset *set, uint64_t npages)
{
	uint64_t words = 0, n = npages;
	uint64_t *p;
	unsigned int i;

	set->nr_levels = 0;
	do {
		n = (n + 63) / 64;
		set->words[set->nr_levels++] = n;
		words += n;
	} while (n > 1);

	/* Not malloc(): what is never touched shall cost nothing. */
	set->bytes = words * sizeof(uint64_t);
	set->mem = mmap(NULL, set->bytes, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (set->mem == MAP_FAILED) {
		set->mem = NULL;
		return -ENOMEM;
	}
	p = set->mem;
	for (i = 0; i < set->nr_levels; i++) {
		set->level[i] = p;
		p += set->words[i];
	}
	return 0;
}

void pageset_destroy(struct pageset *set)
{
	if (set->mem)
		munmap(set->mem, set->bytes);
	set->mem = NULL;
}

void pageset_add_word(struct pageset *set, uint64_t word, uint64_t mask)
{
	unsigned int i;

	for (i = 0; mask && i < set->nr_levels; i++) {
		uint64_t old = set->level[i][word];

		set->level[i][word] = old | mask;
		if (old)
			return;
		mask = 1ULL << (word % 64);
		word /= 64;
	}
}

static void del_word(struct pageset *set, uint64_t word, uint64_t mask)
{
	unsigned int i;

	for (i = 0; i < set->nr_levels; i++) {
		uint64_t old = set->level[i][word];

		set->level[i][word] = old & ~mask;
		if (!old || old & ~mask)
			return;
		mask = 1ULL << (word % 64);
		word /= 64;
	}
}

/* The part of [offset, offset + npages) that is in the word of @offset. */
static uint64_t first_mask(uint64_t offset, uint64_t npages, uint64_t *taken)
{
	unsigned int bit = offset % 64;
	uint64_t n = 64 - bit < npages ? 64 - bit : npages;

	*taken = n;
	return (n == 64 ? ~0ULL : (1ULL << n) - 1) << bit;
}

void pageset_add(struct pageset *set, uint64_t offset, uint64_t npages)
{
	uint64_t mask, n;

	for (; npages; offset += n, npages -= n) {
		mask = first_mask(offset, npages, &n);
		pageset_add_word(set, offset / 64, mask);
	}
}

void pageset_del(struct pageset *set, uint64_t offset, uint64_t npages)
{
	uint64_t mask, n;

	for (; npages; offset += n, npages -= n) {
		mask = first_mask(offset, npages, &n);
		del_word(set, offset / 64, mask);
	}
}

uint64_t pageset_next(const struct pageset *set, uint64_t from)
{
	unsigned int i = 0;
	uint64_t word, bits;

	/* Up, until there is something to the right... */
	for (;;) {
		word = from / 64;
		if (word >= set->words[i])
			return UINT64_MAX;
		bits = set->level[i][word] & (~0ULL << (from % 64));
		if (bits)
			break;
		if (++i == set->nr_levels)
			return UINT64_MAX;
		from = word + 1;
	}
	/* ... and down to its first page. */
	from = word * 64 + __builtin_ctzll(bits);
	while (i--)
		from = from * 64 + __builtin_ctzll(set->level[i][from]);
	return from;
}

uint64_t pageset_run(const struct pageset *set, uint64_t offset, uint64_t max)
{
	uint64_t pos = offset, clear;

	while (pos - offset < max && pos / 64 < set->words[0]) {
		clear = ~(set->level[0][pos / 64] >> (pos % 64));
		/* The shift brought in zeroes: they end the word, not the run. */
		if (clear && (unsigned int)__builtin_ctzll(clear) < 64 - pos % 64) {
			pos += __builtin_ctzll(clear);
			break;
		}
		pos += 64 - pos % 64;
	}
	return pos - offset < max ? pos - offset : max;
}
