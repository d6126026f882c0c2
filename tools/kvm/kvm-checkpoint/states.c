// SPDX-License-Identifier: GPL-2.0-only
/*
 * Pages of which the guest says that it does not use them.
 *
 * A guest with KVM_FEATURE_PAGE_STATES has a table in its memory, a byte for each page, which it
 * changes as pages are freed and allocated, with nobody asked.  What it promises is of an instant at
 * which it stands still: what a page holds of which the table says "unused" does not matter, it will
 * be written before it is read.  Such a page need not be copied in that pause.  When it is written
 * later, it is in the log.
 *
 * Of a guest that runs the table says nothing that lasts: it may be of a kernel that is gone a moment
 * later (kexec).  What was left out of a first copy is noted, therefore, and looked at once more in
 * the pause that ends it: what is used by then is copied then, written or not.  And if a pause comes
 * to nothing, be it that the guest went on while this looked at its table, what was left out in it is
 * dirty again.
 *
 * The table is the guest's own.  Whatever it says, nobody but the guest gets less than it should.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "guest.h"

#define UNUSED	1

static const struct guest_range *find_range(const struct guest_states *s, uint32_t block,
					    uint64_t page)
{
	unsigned int i;

	for (i = 0; i < s->nr_ranges; i++) {
		const struct guest_range *r = &s->ranges[i];

		if (r->block == block && page >= r->page && page - r->page < r->npages)
			return r;
	}
	return NULL;
}

bool guest_is_unused(const struct guest *g, uint32_t block, uint64_t page)
{
	const struct guest_states *s = &g->states;
	const struct guest_range *r;
	uint64_t gfn;

	if (!s->nr)
		return false;
	r = find_range(s, block, page);
	if (!r)
		return false;
	gfn = r->gfn + (page - r->page);
	return gfn < s->nr && *(const volatile uint8_t *)(s->table + gfn) == UNUSED;
}

static void note(struct guest_states *s, uint32_t block, uint64_t page)
{
	if (s->skipped[block])
		s->skipped[block][page / 64] |= 1ull << page % 64;
}

bool guest_skips(struct guest *g, uint32_t block, uint64_t page)
{
	if (!guest_is_unused(g, block, page))
		return false;
	note(&g->states, block, page);
	g->states.left_out++;
	return true;
}

/* Room to remember one more word, or what is dropped would be lost if the epoch is */
static bool has_room(struct copy *c)
{
	size_t max = c->max_dropped ? 2 * c->max_dropped : 256;
	struct dropped_word *w;

	if (c->nr_dropped < c->max_dropped)
		return true;
	w = realloc(c->dropped, max * sizeof(*w));
	if (!w)
		return false;
	c->dropped = w;
	c->max_dropped = max;
	return true;
}

void guest_drop_unused(struct guest *g, struct copy *c, uint32_t block, uint64_t word)
{
	uint64_t *bits = &g->dirty.bits[block][word], left = *bits, dropped = 0;

	if (!g->states.nr || !has_room(c))
		return;
	for (; left; left &= left - 1) {
		if (guest_skips(g, block, word * 64 + __builtin_ctzll(left)))
			dropped |= left & -left;
	}
	if (!dropped)
		return;
	*bits &= ~dropped;
	g->dirty.pages -= __builtin_popcountll(dropped);
	c->dropped[c->nr_dropped++] = (struct dropped_word){ block, word, dropped };
}

void guest_is_copied(struct guest *g, uint32_t block, uint64_t page)
{
	if (g->states.skipped[block])
		g->states.skipped[block][page / 64] &= ~(1ull << page % 64);
}

int guest_note_skipped(struct guest *g, bool again, struct kc_err *err)
{
	if (!again)
		guest_forget_skipped(g);
	return guest_new_bits(g, g->states.skipped) ?
	       kc_fail(err, ENOMEM, "no memory for the list of unused pages") : 0;
}

void guest_forget_skipped(struct guest *g)
{
	guest_free_bits(g->states.skipped);
}

/* All of 64 pages: most of what was left out is still unused, and there may be millions of them */
static bool is_word_unused(const struct guest_states *s, uint32_t block, uint64_t page)
{
	const struct guest_range *r = s->nr ? find_range(s, block, page) : NULL;
	uint64_t gfn, states[8];
	unsigned int i;

	if (!r || r->npages - (page - r->page) < 64)
		return false;
	gfn = r->gfn + (page - r->page);
	if (gfn >= s->nr || s->nr - gfn < 64)
		return false;
	memcpy(states, s->table + gfn, sizeof(states));
	for (i = 0; i < 8; i++) {
		if (states[i] != UNUSED * 0x0101010101010101ull)
			return false;
	}
	return true;
}

int guest_check_skipped(struct guest *g, struct kc_err *err)
{
	uint64_t word, left, page;
	unsigned int i;
	int rc = 0;

	for (i = 0; i < g->id.nr_blocks; i++) {
		uint64_t *skipped = g->states.skipped[i];

		for (word = 0; skipped && word * 64 < g->block_ids[i].npages; word++) {
			left = skipped[word];
			if (left && is_word_unused(&g->states, i, word * 64))
				continue;
			for (; left && !rc; left &= left - 1) {
				page = word * 64 + __builtin_ctzll(left);
				if (guest_is_unused(g, i, page))
					continue;
				skipped[word] &= ~(left & -left);
				rc = dirty_add(&g->dirty, i, page, 1);
			}
		}
	}
	return rc ? kc_fail(err, -rc, "no memory for the list of dirty pages") : 0;
}

void guest_take_states(struct guest *g, uint64_t qemu_block, uint64_t page, uint64_t nr)
{
	int block = nr ? guest_block_of(g, qemu_block) : -1;

	g->states.nr = 0;
	if (block < 0 || page >= g->block_ids[block].npages ||
	    nr > (g->block_ids[block].npages - page) * KC_PAGE_SIZE)
		return;
	g->states.table = g->blocks[block].map + page * KC_PAGE_SIZE;
	g->states.nr = nr;
}

void guest_read_states(struct guest *g, struct json_object *o)
{
	struct json_object *s;

	if (json_object_object_get_ex(o, "page-states", &s))
		guest_take_states(g, qmp_u64(s, "block"), qmp_u64(s, "page"), qmp_u64(s, "count"));
	else
		guest_take_states(g, 0, 0, 0);
}

int guest_take_ranges(struct guest *g, struct json_object *list, struct kc_err *err)
{
	size_t n = json_object_is_type(list, json_type_array) ? json_object_array_length(list) : 0;
	struct guest_range *ranges;
	unsigned int nr = 0;
	size_t i;

	ranges = calloc(n + 1, sizeof(*ranges));
	if (!ranges)
		return kc_fail(err, ENOMEM, "no memory");
	for (i = 0; i < n; i++) {
		struct json_object *o = json_object_array_get_idx(list, i);
		int block = guest_block_of(g, qmp_u64(o, "block"));

		if (block >= 0)
			ranges[nr++] = (struct guest_range){ block, qmp_u64(o, "page"),
							     qmp_u64(o, "pages"),
							     qmp_u64(o, "gfn") };
	}
	free(g->states.ranges);
	g->states.ranges = ranges;
	g->states.nr_ranges = nr;
	return 0;
}

void guest_close_states(struct guest *g)
{
	guest_forget_skipped(g);
	free(g->states.ranges);
	memset(&g->states, 0, sizeof(g->states));
}
