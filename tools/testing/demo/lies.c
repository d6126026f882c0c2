// SPDX-License-Identifier: GPL-2.0-only
/*
 * Of the demo's guest: what it tells its host of its pages (MSR_KVM_PAGE_STATES), true or not.
 *
 * The MSR is written from userspace, as root may; the kernel's own table is left as it is, so that
 * the truth can be told again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include "lies.h"
#include "pattern.h"

#define MSR_KVM_PAGE_STATES	0x4b564d09
#define ON			1ull
#define MAGIC			0x7374504bu
#define HUGE			(2ull << 20)

struct header {
	uint32_t magic, version;
	uint64_t nr;
};

static bool msr(uint64_t *value, bool write)
{
	int fd = open("/dev/cpu/0/msr", O_RDWR);
	bool ok;

	ok = fd >= 0 && (write ? pwrite(fd, value, 8, MSR_KVM_PAGE_STATES) :
			 pread(fd, value, 8, MSR_KVM_PAGE_STATES)) == 8;
	if (fd >= 0)
		close(fd);
	return ok;
}

uint64_t lies_truth(void)
{
	uint64_t value = 0;

	return msr(&value, false) ? value : 0;
}

static uint64_t physical(const void *p)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	uint64_t entry = 0;

	if (fd < 0)
		return 0;
	if (pread(fd, &entry, 8, (uintptr_t)p / PAGE * 8) != 8 || !(entry & 1ull << 63))
		entry = 0;
	close(fd);
	return (entry & ((1ull << 55) - 1)) * PAGE;
}

static uint8_t *table;

/* Pages in a row, also for the host: a huge page, while there is one.  It stays; the host looks at it. */
bool lies_init(void)
{
	int fd = open("/sys/kernel/mm/transparent_hugepage/enabled", O_WRONLY);
	uint8_t *p;
	uint64_t i;

	/* Small machines have none by default */
	if (fd < 0 || write(fd, "madvise", 7) != 7)
		return false;
	close(fd);
	p = mmap(NULL, 2 * HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return false;
	p = (uint8_t *)(((uintptr_t)p + HUGE - 1) & ~(HUGE - 1));
	madvise(p, HUGE, MADV_HUGEPAGE);
	memset(p, 0, HUGE);
	mlock(p, HUGE);
	for (i = 0; i < HUGE; i += PAGE) {
		if (!physical(p) || physical(p + i) != physical(p) + i)
			return false;
	}
	table = p;
	return true;
}

static atomic_bool restless;

/* One that never says the same twice, header and all */
static void *change(void *arg)
{
	uint8_t *p = arg;
	uint64_t n = 1;

	while (restless) {
		n = mix(n);
		p[PAGE + n % (HUGE - PAGE)] = n >> 32;
		if (!(n % 1000))
			((struct header *)p)->nr = mix(n) >> n % 64;
		if (!(n % 4096))
			usleep(1000);
	}
	return NULL;
}

const char *lies_tell(const char *what)
{
	static uint64_t truth;
	struct header *h;
	pthread_t thread;
	uint64_t value, ram;
	struct sysinfo info;

	if (!truth)
		truth = lies_truth();
	h = (struct header *)table;
	if (!truth || !h)
		return !truth ? "no-page-states" : "no-table";
	sysinfo(&info);
	restless = false;
	memset((uint8_t *)h + PAGE, 1, HUGE - PAGE);
	*h = (struct header){ MAGIC, 1, (HUGE - PAGE) };
	value = physical(h) | ON;
	/* Nothing at all, or what was true from the beginning */
	if (!strcmp(what, "nothing"))
		value = 0;
	else if (!strcmp(what, "truth"))
		value = truth;
	else if (!strcmp(what, "magic"))
		h->magic++;
	else if (!strcmp(what, "version"))
		h->version++;
	else if (!strcmp(what, "long"))
		h->nr = ~0ull;
	else if (!strcmp(what, "wraps"))
		h->nr = -(uint64_t)physical(h);
	else if (!strcmp(what, "all"))
		;
	else if (!strncmp(what, "end ", 4) && sscanf(what + 4, "%lu", &ram) == 1)
		/* The header is the last page of its RAM */
		value = ((ram << 20) - PAGE) | ON;
	else if (!strncmp(what, "at ", 3) && sscanf(what + 3, "%lx", &ram) == 1)
		value = ram;
	else if (!strcmp(what, "restless"))
		restless = true;
	else
		return "what?";
	if (!msr(&value, true))
		return errno == EIO ? "refused" : strerror(errno);
	if (restless && pthread_create(&thread, NULL, change, h))
		return "pthread_create";
	return "ok";
}
