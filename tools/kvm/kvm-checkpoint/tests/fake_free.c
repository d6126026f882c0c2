// SPDX-License-Identifier: GPL-2.0-only
/*
 * Of the fake QEMU: a guest that tells which pages it does not use.
 *
 * What a page holds is undefined from when it is freed until it is written after it was allocated.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake_qemu.h"

#define TABLE_PAGES	2u

/* Block 0 is in two pieces for the guest */
#define GAP		100u

uint64_t gfn_of(const struct qemu *q, uint64_t page)
{
	return page < q->blocks[0].npages / 2 ? page : page + GAP;
}

const char *ranges_text(const struct qemu *q)
{
	uint64_t half = q->blocks[0].npages / 2;
	static char text[300];

	if (q->ranges)
		return q->ranges;
	snprintf(text, sizeof(text),
		 "{\"gfn\": 0, \"pages\": %" PRIu64 ", \"block\": 0, \"page\": 0}, "
		 "{\"gfn\": %" PRIu64 ", \"pages\": %" PRIu64 ", \"block\": 0, \"page\": %" PRIu64 "}",
		 half, half + GAP, q->blocks[0].npages - half, half);
	return text;
}

static bool in_table(const struct qemu *q, uint64_t page)
{
	return q->states_nr && page - q->states_page < TABLE_PAGES;
}

static uint8_t *state_of(const struct qemu *q, uint64_t page)
{
	return q->blocks[0].ram + q->states_page * KC_PAGE_SIZE + gfn_of(q, page);
}

bool is_free(const struct qemu *q, uint64_t page)
{
	return q->states_nr && q->undefined && (in_table(q, page) || *state_of(q, page) == 1);
}

static void set_state(struct qemu *q, uint64_t page, uint8_t state)
{
	*state_of(q, page) = state;
	q->blocks[0].dirty[q->states_page + gfn_of(q, page) / KC_PAGE_SIZE] = true;
}

static void change(struct qemu *q, uint64_t page)
{
	struct block *b = &q->blocks[0];

	if (in_table(q, page))
		return;
	if (!is_free(q, page)) {
		q->undefined[page] = true;
		set_state(q, page, 1);
		/* Who writes to it nevertheless has what he wants */
		if (!below(3))
			write_page(b, page);
		return;
	}
	/* Other values than these two mean that it is used, too */
	set_state(q, page, below(4) ? 0 : 2 + below(254));
	if (below(3)) {
		write_page(b, page);
		q->undefined[page] = false;
	}
}

void states_change(struct qemu *q)
{
	unsigned int n;

	for (n = q->states_nr && q->undefined && !q->lies ? below(60) : 0; n; n--)
		change(q, below(q->blocks[0].npages));
}

void start_states(struct qemu *q, uint64_t page)
{
	uint64_t n = q->blocks[0].npages, i;

	CHECK(n + GAP <= TABLE_PAGES * KC_PAGE_SIZE, "the table is too small");
	q->undefined = calloc(n, sizeof(bool));
	q->states_page = page;
	q->states_nr = n + GAP;
	memset(q->blocks[0].ram + page * KC_PAGE_SIZE, 0, TABLE_PAGES * KC_PAGE_SIZE);
	for (i = 0; i < n; i++) {
		if (below(2))
			change(q, i);
	}
}

void do_hints(struct qemu *q, const char *action)
{
	struct pages run = { .block = q->hint_block };
	uint64_t n = 0;

	if (!strcmp(action, "start")) {
		CHECK(q->attached && q->running, "hints are asked for at a wrong time");
		q->hinting = true;
		q->hints_begun++;
	} else if (!strcmp(action, "done")) {
		q->hints_ended += q->hinting;
		q->hinting = false;
	}
	if (q->hinting && q->hint_pages && !strcmp(action, "get")) {
		/* Whatever it was until now, it is free now */
		if (q->undefined && q->hint_page + q->hint_pages <= q->blocks[0].npages)
			memset(q->undefined + q->hint_page, 1, q->hint_pages);
		run.page = q->hint_page;
		run.npages = q->hint_pages;
		write_buffer(q, &run, sizeof(run), 0);
		q->hint_pages = 0;
		n = 1 + q->hint_more;
	}
	answer(q, "{\"offset\": %" PRIu64 ", \"runs\": %" PRIu64 "}", n ? q->hint_offset : 0, n);
}
