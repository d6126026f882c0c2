// SPDX-License-Identifier: GPL-2.0-only
/*
 * Prints the frequency of the TSC, for the rig's kernel parameter
 * tsc_early_khz=.  Its emulated CPU has this machine's TSC, but a kernel that
 * boots on a busy machine may measure it wrong by more than 250 ppm.  KVM keeps
 * that first measurement, takes the refined one that comes a second later for
 * what the hardware does, finds that it cannot scale the one to the other, and
 * leaves its guests with a TSC, and timers, that stand still.
 */
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

struct sample {
	uint64_t tsc, ns;
};

/* The one of many that took the shortest time was not interrupted */
static struct sample sample(void)
{
	struct sample best = { 0, 0 };
	uint64_t shortest = UINT64_MAX;
	int i;

	for (i = 0; i < 1000; i++) {
		struct timespec ts;
		uint64_t before, after;

		before = __rdtsc();
		clock_gettime(CLOCK_MONOTONIC, &ts);
		after = __rdtsc();
		if (after - before >= shortest)
			continue;
		shortest = after - before;
		best.tsc = before + shortest / 2;
		best.ns = ts.tv_sec * 1000000000ull + ts.tv_nsec;
	}
	return best;
}

int main(void)
{
	struct timespec pause = { 0, 200000000 };
	struct sample a = sample(), b;

	nanosleep(&pause, NULL);
	b = sample();
	printf("%.0f\n", (b.tsc - a.tsc) * 1e6 / (b.ns - a.ns));
	return 0;
}
