// SPDX-License-Identifier: GPL-2.0-only
/*
 * Of the demo's guest: what memory costs it.
 *
 * In an emulator whose clock advances by instructions (scripts/rig --icount) a tick of the TSC is one.
 * The least of many rounds is one that no interrupt came into, and that found all it needed in caches
 * of the page allocator.
 */
#define _GNU_SOURCE
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cost.h"
#include "pattern.h"

#define ROUNDS	300

static uint64_t ticks(void)
{
	unsigned int aux;

	/* After all that came before it */
	return __builtin_ia32_rdtscp(&aux);
}

static void least(uint64_t *of, uint64_t begun)
{
	uint64_t now = ticks() - begun;

	if (!*of || now < *of)
		*of = now;
}

static bool fork_once(void)
{
	pid_t pid = fork();
	int status;

	if (!pid)
		_exit(0);
	return pid > 0 && waitpid(pid, &status, 0) == pid && !status;
}

const char *cost_of_memory(struct cost *cost)
{
	const size_t size = COST_PAGES * PAGE;
	uint64_t begun;
	char *p;
	int i, n;

	*cost = (struct cost){ 0 };
	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return "mmap";
	/* Kernels without huge pages do not know it */
	madvise(p, size, MADV_NOHUGEPAGE);
	for (i = 0; i < ROUNDS; i++) {
		begun = ticks();
		if (madvise(p, size, MADV_POPULATE_WRITE) || madvise(p, size, MADV_DONTNEED))
			return "madvise";
		least(&cost->pages, begun);

		begun = ticks();
		for (n = 0; n < COST_PAGES; n++)
			*(volatile char *)(p + n * PAGE) = 1;
		if (madvise(p, size, MADV_DONTNEED))
			return "madvise";
		least(&cost->faults, begun);

		begun = ticks();
		if (!fork_once())
			return "fork";
		least(&cost->fork, begun);
	}
	munmap(p, size);
	return NULL;
}
