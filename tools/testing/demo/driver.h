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
