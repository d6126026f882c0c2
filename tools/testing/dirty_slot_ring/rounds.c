// SPDX-License-Identifier: GPL-2.0-only
/*
 * Rounds of threads that are all at it, and then all stand still to be looked at.
 */

#include <time.h>

#include "stress.h"

#define ROUND_MS	25
#define MAX_THREADS	16

static bool stop, over;
static pthread_barrier_t ends, begins;
static pthread_t threads[MAX_THREADS];
static unsigned int nr_threads, nr_expected;

u64 now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000ULL + t.tv_nsec / 1000000;
}

void rounds_begin(unsigned int nr)
{
	stop = false;
	over = false;
	nr_threads = 0;
	nr_expected = nr;
	pthread_barrier_init(&ends, NULL, nr + 1);
	pthread_barrier_init(&begins, NULL, nr + 1);
}

void rounds_start(void *(*fn)(void *), void *arg)
{
	if (nr_threads == MAX_THREADS || nr_threads == nr_expected ||
	    pthread_create(&threads[nr_threads++], NULL, fn, arg))
		fail("no more threads");
}

bool round_ends(void)
{
	return READ_ONCE(stop);
}

bool rounds_go_on(struct kvm_vcpu *vcpu)
{
	while (!READ_ONCE(over)) {
		if (!READ_ONCE(stop))
			return true;
		if (vcpu)
			sim_exit(vcpu);
		pthread_barrier_wait(&ends);
		pthread_barrier_wait(&begins);
	}
	return false;
}

unsigned int rounds_run(unsigned int ms, void (*check)(void *arg), void *arg)
{
	u64 end = now_ms() + ms;
	unsigned int rounds, i;

	if (nr_threads != nr_expected)
		fail("%u threads, not %u", nr_threads, nr_expected);
	for (rounds = 0; !rounds || now_ms() < end; rounds++) {
		usleep(ROUND_MS * 1000);
		WRITE_ONCE(stop, true);
		pthread_barrier_wait(&ends);
		check(arg);
		WRITE_ONCE(stop, false);
		pthread_barrier_wait(&begins);
	}
	WRITE_ONCE(stop, true);
	pthread_barrier_wait(&ends);
	WRITE_ONCE(over, true);
	WRITE_ONCE(stop, false);
	pthread_barrier_wait(&begins);
	for (i = 0; i < nr_threads; i++)
		pthread_join(threads[i], NULL);
	pthread_barrier_destroy(&ends);
	pthread_barrier_destroy(&begins);
	return rounds;
}
