// SPDX-License-Identifier: GPL-2.0-only
/*
 * Of the demo's guest: who allocates, fills, checks and frees memory all the time.
 *
 * Pages that are free by the time of a checkpoint need not be in it.  If one is left out that was in
 * use, then what is found here after a failover is a page of the past, or of zeros: of another round,
 * or of no round at all.  Pages of processes, of files, and the page tables and stacks of children.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "churn.h"
#include "pattern.h"

#define CHURN_ID	100	/* and up, one for each thread */
#define CHILD_PAGES	64

static _Atomic uint64_t npages, pause_us;
static atomic_ulong rounds, bad;
static char first_bad[200];

static void note_bad(const char *where, uint64_t n, uint64_t round, const uint64_t *page)
{
	if (!atomic_fetch_add(&bad, 1))
		snprintf(first_bad, sizeof(first_bad),
			 "page %lu of %s in round %lu says it is page %lu of step %lu", n, where,
			 round, page_number(page), page_step(page));
}

static uint64_t *get_pages(uint64_t n)
{
	void *p = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

static void in_memory(uint64_t id, uint64_t round, uint64_t n)
{
	uint64_t *p = get_pages(n), i;

	for (i = 0; p && i < n; i++)
		fill_page(p + i * PAGE_WORDS, id, i, round);
	for (i = 0; p && i < n; i++) {
		if (!page_is(p + i * PAGE_WORDS, id, i, round))
			note_bad("memory", i, round, p + i * PAGE_WORDS);
	}
	if (p)
		munmap(p, n * PAGE);
}

/* Of the root, which is in memory: page cache */
static bool in_file(uint64_t id, uint64_t round, uint64_t n)
{
	uint64_t page[PAGE_WORDS], i;
	bool ok = true;
	char name[32];
	int fd;

	snprintf(name, sizeof(name), "/churn%lu", id);
	fd = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
	for (i = 0; i < n && ok; i++) {
		fill_page(page, id, i, round);
		ok = pwrite(fd, page, PAGE, i * PAGE) == PAGE;
	}
	while (i--) {
		if (ok && pread(fd, page, PAGE, i * PAGE) == PAGE && !page_is(page, id, i, round))
			note_bad("a file", i, round, page);
	}
	close(fd);
	unlink(name);
	return ok;
}

static void in_child(uint64_t id, uint64_t round)
{
	int status = 0;
	pid_t pid;

	pid = fork();
	if (!pid) {
		in_memory(id, round, CHILD_PAGES);
		_exit(bad != 0);
	}
	if (pid > 0 && waitpid(pid, &status, 0) == pid && status && !atomic_fetch_add(&bad, 1))
		snprintf(first_bad, sizeof(first_bad), "a child of round %lu ended with 0x%x", round,
			 status);
}

static void *churn(void *arg)
{
	uint64_t id = CHURN_ID + (uintptr_t)arg, round, n;

	for (round = 1; ; round++) {
		n = npages;
		in_memory(id, round, n);
		if (round % 4 == 0)
			in_file(id, round, n / 4);
		/* It starts with what was found so far */
		if (round % 4 == 2 && !bad)
			in_child(id, round);
		rounds++;
		if (pause_us)
			usleep(pause_us);
	}
	return NULL;
}

const char *churn_start(uint64_t n, uint64_t us)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN), i;
	static bool begun;
	pthread_t thread;

	npages = n;
	pause_us = us;
	for (i = 0; i < cpus && !begun; i++) {
		if (pthread_create(&thread, NULL, churn, (void *)(uintptr_t)i))
			return "pthread_create";
	}
	begun = true;
	return NULL;
}

uint64_t churn_rounds(void)
{
	return rounds;
}

uint64_t churn_bad(void)
{
	return bad;
}

const char *churn_first_bad(void)
{
	return first_bad;
}

bool churn_once(uint64_t n, bool file)
{
	uint64_t *p, i;

	if (file)
		return in_file(CHURN_ID - 1, 1, n);
	p = get_pages(n);
	for (i = 0; p && i < n; i++)
		fill_page(p + i * PAGE_WORDS, CHURN_ID - 1, i, 1);
	if (p)
		munmap(p, n * PAGE);
	return p;
}
