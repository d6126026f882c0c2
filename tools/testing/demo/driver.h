/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the drivers that run inside the rig share.
 */
#ifndef DEMO_DRIVER_H
#define DEMO_DRIVER_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "pattern.h"

static inline uint64_t now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000ull + ts.tv_nsec / 1000;
}

/*
 * Reads what comes until a line has "want" in it (or one of two), which is left
 * in buf.  Returns it or NULL if the time is up or the other end is gone.
 */
static inline char *read_line(int fd, char *buf, size_t size, const char *want,
			      const char *or, unsigned int seconds)
{
	uint64_t until = now_us() + seconds * 1000000ull;
	size_t len = 0;

	while (now_us() < until) {
		struct pollfd p = { .fd = fd, .events = POLLIN };

		if (poll(&p, 1, 100) <= 0)
			continue;
		if (read(fd, buf + len, 1) != 1)
			return NULL;
		if (buf[len] != '\n') {
			if (len < size - 2)
				len++;
			continue;
		}
		buf[len] = '\0';
		len = 0;
		if (strstr(buf, want) || (or && strstr(buf, or)))
			return buf;
	}
	return NULL;
}

/* The guest's disk; false with errno if it cannot be made */
/*
 * Is this where a guest of so many pages begins to say which of them it does not use?  Of how many
 * it does: the next pages have a byte for each, 1 if it does not.  (Its memory is in a row.)
 */
static inline uint64_t has_page_states(const uint8_t *page, uint64_t npages)
{
	const uint32_t magic = 0x7374504b, version = 1;
	uint64_t nr;

	memcpy(&nr, page + 8, sizeof(nr));
	return !memcmp(page, &magic, 4) && !memcmp(page + 4, &version, 4) && nr > npages / 2 &&
	       nr <= npages ? nr : 0;
}

static inline bool make_disk(const char *path)
{
	uint64_t page[PAGE_WORDS], n;
	FILE *f = fopen(path, "w");
	bool ok = f;

	for (n = 0; ok && n < DISK_BLOCKS; n++) {
		fill_page(page, DISK_ID, n, 0);
		ok = fwrite(page, PAGE, 1, f) == 1;
	}
	return f && !fclose(f) && ok;
}

#endif
