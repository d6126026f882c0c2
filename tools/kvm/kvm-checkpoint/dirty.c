// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which pages of the guest are dirty, and copies of them.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest.h"

int dirty_add(struct dirty *d, uint32_t block, uint64_t page, uint64_t n)
{
	while (n) {
		uint64_t word = page / 64, first = page % 64;
		uint64_t here = 64 - first < n ? 64 - first : n;
		uint64_t mask = (here == 64 ? ~0ull : (1ull << here) - 1) << first;
		uint64_t *bits = &d->bits[block][word];

		if (!*bits) {
			if (d->nr_words == d->max_words) {
				size_t max = d->max_words ? d->max_words * 2 : 1024;
				struct dirty_word *w = realloc(d->words, max * sizeof(*w));

				if (!w)
					return -ENOMEM;
				d->words = w;
				d->max_words = max;
			}
			d->words[d->nr_words++] = (struct dirty_word){ block, word };
		}
		d->pages += __builtin_popcountll(mask & ~*bits);
		*bits |= mask;
		page += here;
		n -= here;
	}
	return 0;
}

void dirty_forget(struct dirty *d)
{
	size_t i;

	for (i = 0; i < d->nr_words; i++)
		d->bits[d->words[i].block][d->words[i].word] = 0;
	d->nr_words = 0;
	d->pages = 0;
}

/* Room for n pages; what is there stays */
static int copy_reserve(struct copy *c, size_t n)
{
	size_t max = c->max ? c->max : 2048;
	struct copied_page *pages;
	void *data;

	if (n <= c->max)
		return 0;
	while (max < n)
		max *= 2;
	pages = realloc(c->pages, max * sizeof(*pages));
	if (!pages)
		return -ENOMEM;
	c->pages = pages;
	/* Populated, so that the first copies do not fault while the guest is paused */
	if (c->data)
		data = mremap(c->data, c->max * KC_PAGE_SIZE, max * KC_PAGE_SIZE, MREMAP_MAYMOVE);
	else
		data = mmap(NULL, max * KC_PAGE_SIZE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (data == MAP_FAILED)
		return -ENOMEM;
	kc_no_dump(data, max * KC_PAGE_SIZE);
	c->data = data;
	c->max = max;
	return 0;
}

bool guest_is_hole(struct guest_holes *h, int fd, uint64_t page)
{
	off_t at = page * KC_PAGE_SIZE, next;

	if (page >= h->hole_until && page >= h->data_until) {
		next = lseek(fd, at, SEEK_DATA);
		if (next >= 0)
			h->hole_until = next / KC_PAGE_SIZE;
		else
			h->hole_until = errno == ENXIO ? UINT64_MAX : 0;
		if (page >= h->hole_until) {
			next = lseek(fd, at, SEEK_HOLE);
			h->data_until = next > at ? (uint64_t)next / KC_PAGE_SIZE : page + 1;
		}
	}
	return page < h->hole_until;
}

bool guest_hole_begins(int fd, uint64_t page)
{
	off_t at = page * KC_PAGE_SIZE, next = lseek(fd, at, SEEK_DATA);

	return next < 0 ? errno == ENXIO : next >= at + (off_t)KC_PAGE_SIZE;
}

int guest_copy_dirty(struct guest *g, struct copy *c, uint64_t max)
{
	struct guest_holes holes = { 0, 0 };
	struct dirty *d = &g->dirty;

	if (max > d->pages)
		max = d->pages;
	if (copy_reserve(c, c->nr + max))
		return -ENOMEM;
	while (d->nr_words && max) {
		struct dirty_word *w = &d->words[d->nr_words - 1];
		uint64_t *bits = &d->bits[w->block][w->word];

		while (*bits && max) {
			uint64_t page = w->word * 64 + __builtin_ctzll(*bits);

			c->pages[c->nr] = (struct copied_page){ w->block, page, c->nr };
			if (d->has_holes && guest_is_hole(&holes, g->blocks[w->block].fd, page))
				memset(c->data + c->nr * KC_PAGE_SIZE, 0, KC_PAGE_SIZE);
			else
				memcpy(c->data + c->nr * KC_PAGE_SIZE,
				       g->blocks[w->block].map + page * KC_PAGE_SIZE, KC_PAGE_SIZE);
			c->nr++;
			*bits &= *bits - 1;
			d->pages--;
			max--;
		}
		if (!*bits)
			d->nr_words--;
		/* The next word is of lower pages, or of another block */
		holes = (struct guest_holes){ 0, 0 };
	}
	if (!d->pages)
		d->has_holes = false;
	return 0;
}

/* Ascending; of two copies of a page the later one comes later */
static int compare_pages(const void *a, const void *b)
{
	const struct copied_page *x = a, *y = b;

	if (x->block != y->block)
		return x->block < y->block ? -1 : 1;
	if (x->page != y->page)
		return x->page < y->page ? -1 : 1;
	return x->at < y->at ? -1 : 1;
}

void copy_sort(struct copy *c)
{
	if (c->nr)
		qsort(c->pages, c->nr, sizeof(*c->pages), compare_pages);
}
