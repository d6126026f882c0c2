/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef DIRTY_SLOT_RING_MEASURE_H
#define DIRTY_SLOT_RING_MEASURE_H

/*
 * What programs that take time on this machine's CPUs have in common.
 */

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "kernel.h"

static inline void __noreturn die(const char *what)
{
	fprintf(stderr, "%s: %s\n", program_invocation_short_name, what);
	exit(1);
}

static inline double now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static inline void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die("cannot stay on one CPU");
}

/* Two CPUs that this process may use; how many there are of them. */
static inline int choose_cpus(int cpus[2])
{
	cpu_set_t set;
	int cpu, n = 0;

	if (sched_getaffinity(0, sizeof(set), &set))
		die("cannot tell the CPUs");
	for (cpu = 0; cpu < CPU_SETSIZE && n < 2; cpu++) {
		if (CPU_ISSET(cpu, &set))
			cpus[n++] = cpu;
	}
	return n;
}

/* The same numbers for each who begins with RANDOM_SEED. */
#define RANDOM_SEED	88172645463325252ULL

static inline unsigned long random_below(u64 *state, unsigned long n)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return (*state >> 20) % n;
}

/* An option's argument. */
static inline unsigned long number(const char *arg, unsigned long max)
{
	char *end;
	unsigned long n = strtoul(arg, &end, 10);

	if (*end || !n || n > max) {
		fprintf(stderr, "%s: want one from 1 to %lu, not %s\n",
			program_invocation_short_name, max, arg);
		exit(2);
	}
	return n;
}

#endif /* DIRTY_SLOT_RING_MEASURE_H */
