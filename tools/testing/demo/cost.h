/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Of the demo's guest: what memory costs it, in ticks of the TSC.
 */
#ifndef DEMO_COST_H
#define DEMO_COST_H

#include <stdint.h>

struct cost {
	/* Least of many rounds, each of COST_PAGES pages of order 0 */
	uint64_t pages;		/* allocated, cleared and freed, without a page fault */
	uint64_t faults;	/* the same, with one for each page */
	uint64_t fork;		/* a child that ends at once, and is waited for */
};

#define COST_PAGES	256

/* Returns NULL, or what went wrong */
const char *cost_of_memory(struct cost *cost);

#endif
