/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the pages of the demo's guest hold, for the guest that writes them and
 * the driver that makes its disk and, for the control, a page of the past.
 */
#ifndef DEMO_PATTERN_H
#define DEMO_PATTERN_H

#include <stdbool.h>
#include <stdint.h>

#define PAGE		4096ull
#define PAGE_WORDS	(PAGE / sizeof(uint64_t))

/* Besides the writers 0, 1, 2 */
#define STILL_ID	14
#define DISK_ID		15
#define DISK_BLOCKS	1024

#define PAGE_MAGIC	0xd1a7ull

static inline uint64_t mix(uint64_t x)
{
	x ^= x >> 31;
	x *= 0x9fb21c651e98df25ull;
	x ^= x >> 28;
	x *= 0xd6e8feb86659fd93ull;
	return x ^ (x >> 32);
}

/* The first word: what page this is; the second: which step wrote it */
static inline uint64_t page_tag(uint64_t id, uint64_t n)
{
	return PAGE_MAGIC << 48 | id << 40 | n;
}

static inline uint64_t page_number(const uint64_t *page)
{
	return page[0] & 0xffffffffffull;
}

static inline uint64_t page_step(const uint64_t *page)
{
	return page[1];
}

static inline void fill_page(uint64_t *page, uint64_t id, uint64_t n, uint64_t step)
{
	uint64_t value = mix(page_tag(id, n) + mix(step)), by = value | 1;
	unsigned int i;

	page[0] = page_tag(id, n);
	page[1] = step;
	for (i = 2; i < PAGE_WORDS; i++)
		page[i] = value += by;
}

static inline bool page_is(const uint64_t *page, uint64_t id, uint64_t n, uint64_t step)
{
	uint64_t value = mix(page_tag(id, n) + mix(step)), by = value | 1, wrong;
	unsigned int i;

	wrong = page[0] ^ page_tag(id, n);
	wrong |= page[1] ^ step;
	for (i = 2; i < PAGE_WORDS; i++)
		wrong |= page[i] ^ (value += by);
	return !wrong;
}

/* Which of its pages a writer's step writes; steps count from 1 */
static inline uint64_t step_page(uint64_t id, uint64_t step, uint64_t npages)
{
	return mix(step * 16 + id) % npages;
}

/* Which block of the disk the disk's reader reads in a step */
static inline uint64_t step_block(uint64_t step)
{
	return mix(step + 0x5eed) % DISK_BLOCKS;
}

#endif
