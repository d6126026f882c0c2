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
		uint64_t mask = kc_word_mask(first, here);
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

int guest_new_bits(const struct guest *g, uint64_t *bits[])
{
	unsigned int i;

	for (i = 0; i < g->id.nr_blocks; i++) {
		if (!bits[i])
			bits[i] = calloc(g->block_ids[i].npages / 64 + 1, sizeof(uint64_t));
		if (!bits[i]) {
			guest_free_bits(bits);
			return -ENOMEM;
		}
	}
	return 0;
}

void guest_free_bits(uint64_t *bits[])
{
	unsigned int i;

	for (i = 0; i < KC_MAX_BLOCKS; i++) {
		free(bits[i]);
		bits[i] = NULL;
	}
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
	/* Populated, so that copies do not fault */
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

/*
 * What grows faster than this is faulted in while the guest waits.  If there is no memory, that is
 * for who needs it to say.
 */
void guest_ready_copy(const struct guest *g, struct copy *c)
{
	size_t had = c->max;

	if (copy_reserve(c, 2 * (c->nr + g->dirty.pages) + 1) || c->max == had || !had)
		return;
#ifdef MADV_POPULATE_WRITE
	madvise(c->data + had * KC_PAGE_SIZE, (c->max - had) * KC_PAGE_SIZE, MADV_POPULATE_WRITE);
#endif
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

/*
 * Where data begin again, if the page is in a hole, or else the page.  Where they end would take as
 * long as there are data.
 */
static uint64_t hole_end(int fd, uint64_t page)
{
	off_t next = lseek(fd, page * KC_PAGE_SIZE, SEEK_DATA);

	if (next < 0)
		return errno == ENXIO ? UINT64_MAX : page;
	return next / KC_PAGE_SIZE;
}

/* They are taken from the end, so ascending */
static int compare_words(const void *a, const void *b)
{
	const struct dirty_word *x = a, *y = b;

	if (x->block != y->block)
		return x->block > y->block ? -1 : 1;
	return x->word > y->word ? -1 : x->word < y->word;
}

static int add_hole(struct copy *c, uint32_t block, uint64_t page, uint64_t n)
{
	struct copied_hole *last = c->nr_holes ? &c->holes[c->nr_holes - 1] : NULL;

	if (last && last->block == block && last->at == c->nr && last->page + last->n == page) {
		last->n += n;
		return 0;
	}
	if (c->nr_holes == c->max_holes) {
		size_t max = c->max_holes ? 2 * c->max_holes : 256;
		struct copied_hole *h = realloc(c->holes, max * sizeof(*h));

		if (!h)
			return -ENOMEM;
		c->holes = h;
		c->max_holes = max;
	}
	c->holes[c->nr_holes++] = (struct copied_hole){ block, page, n, c->nr };
	return 0;
}

/*
 * The pages in holes, of those of a word that are dirty: no copies of them.  @until: up to where a
 * hole is known that began below; moved on.
 */
static int take_holes(struct guest *g, struct copy *c, const struct dirty_word *w, uint64_t *until)
{
	uint64_t *bits = &g->dirty.bits[w->block][w->word], left = *bits;

	while (left) {
		unsigned int first = __builtin_ctzll(left), n;
		uint64_t page = w->word * 64 + first, mask;

		if (page >= *until)
			*until = hole_end(g->blocks[w->block].fd, page);
		if (page >= *until) {
			left &= left - 1;
			continue;
		}
		/* As many in a row as are dirty, and in it */
		mask = left >> first;
		n = mask == ~0ull ? 64 : __builtin_ctzll(~mask);
		n = *until - page < n ? *until - page : n;
		if (add_hole(c, w->block, page, n))
			return -ENOMEM;
		mask = kc_word_mask(first, n);
		*bits &= ~mask;
		left &= ~mask;
		g->dirty.pages -= n;
	}
	return 0;
}

int guest_copy_dirty(struct guest *g, struct copy *c, uint64_t max)
{
	struct dirty *d = &g->dirty;
	uint32_t block = UINT32_MAX;
	uint64_t until = 0;

	if (d->has_holes)
		qsort(d->words, d->nr_words, sizeof(*d->words), compare_words);
	else if (copy_reserve(c, c->nr + (max < d->pages ? max : d->pages)))
		return -ENOMEM;
	while (d->nr_words && max) {
		struct dirty_word *w = &d->words[d->nr_words - 1];
		uint64_t *bits = &d->bits[w->block][w->word];

		if (d->has_holes) {
			until = w->block == block ? until : 0;
			block = w->block;
			if (take_holes(g, c, w, &until) || copy_reserve(c, c->nr + 64))
				return -ENOMEM;
		}
		/* After that: what was given back is to be given back elsewhere, too */
		guest_drop_unused(g, c, w->block, w->word);
		while (*bits && max) {
			uint64_t page = w->word * 64 + __builtin_ctzll(*bits);

			c->pages[c->nr] = (struct copied_page){ w->block, page, c->nr, false };
			memcpy(c->data + c->nr * KC_PAGE_SIZE,
			       g->blocks[w->block].map + page * KC_PAGE_SIZE, KC_PAGE_SIZE);
			guest_is_copied(g, w->block, page);
			c->nr++;
			*bits &= *bits - 1;
			d->pages--;
			max--;
		}
		if (!*bits)
			d->nr_words--;
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

/* The first of the copies that is not of a lower page */
static size_t find_page(const struct copy *c, uint32_t block, uint64_t page)
{
	const struct copied_page key = { block, page, 0, false };
	size_t low = 0, high = c->nr;

	while (low < high) {
		size_t mid = low + (high - low) / 2;

		if (compare_pages(&c->pages[mid], &key) < 0)
			low = mid + 1;
		else
			high = mid;
	}
	return low;
}

void copy_sort(struct copy *c)
{
	size_t i, k, n = 0;

	if (!c->nr)
		return;
	qsort(c->pages, c->nr, sizeof(*c->pages), compare_pages);
	/* Holes are handed over before pages: what was copied before there was one does not count */
	for (i = 0; i < c->nr_holes; i++) {
		const struct copied_hole *h = &c->holes[i];

		for (k = find_page(c, h->block, h->page); k < c->nr &&
		     c->pages[k].block == h->block && c->pages[k].page - h->page < h->n; k++) {
			if (c->pages[k].at < h->at)
				c->pages[k].gone = true;
		}
	}
	for (i = 0; c->nr_holes && i < c->nr; i++) {
		if (!c->pages[i].gone)
			c->pages[n++] = c->pages[i];
	}
	c->nr = c->nr_holes ? n : c->nr;
}
