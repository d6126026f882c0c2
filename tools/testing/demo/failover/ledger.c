// SPDX-License-Identifier: GPL-2.0-only
/*
 * A database in the guest, and clients of it outside who remember what they were told.
 *
 * The guest's disk and what it sends belong to epochs: whoever was told that an entry is committed
 * finds it after each failover, nothing is there twice, and connections go on as if nothing had
 * happened.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "clients.h"

static bool one_kill(unsigned int n)
{
	long told[CLIENTS], lost;

	if (!kill_guest(n & 1))
		return false;
	/* What came in since then came from the guest at the standby, and is there as well */
	ledger_told(told);
	return ledger_goes_on(told) && ledger_check(told, &lost) && ledger_check_disk();
}

/* Where nothing is held back, what clients were told is lost now and then */
bool test_ledger_control(unsigned int times)
{
	long told[CLIENTS], lost = 0;
	unsigned int n;
	bool ok = ledger_boot();

	net_option = "pass";
	/* So that there is something to lose */
	interval = "500ms";
	for (n = 0; ok && !lost && n < times; n++) {
		ok = ledger_connect() && kill_guest(n & 1);
		if (!ok)
			break;
		ledger_told(told);
		ok = ledger_check(told, &lost) || lost;
		ledger_disconnect();
	}
	net_option = NULL;
	interval = "50ms";
	ledger_end();
	if (ok && !lost)
		return fail("with --net pass nothing was lost in %u kills: this test would not notice", n);
	if (ok)
		note("with --net pass %ld entries are lost at kill %u, as is to be expected", lost, n);
	return ok;
}

/* For who looks on: what clients get done, and how long they had to wait */
static void *tell_progress(void *arg)
{
	const atomic_bool *end = arg;
	long before = 0, now;
	unsigned int i;

	while (!*end) {
		for (i = 0; i < 20 && !*end; i++)
			usleep(100000);
		for (i = 0, now = 0; i < CLIENTS; i++)
			now += clients[i].told;
		note("clients: %ld entries committed, %ld of them in the last 2 s", now, now - before);
		before = now;
	}
	return NULL;
}
/* --- How long an answer takes ---------------------------------------------- */

static int compare_times(const void *a, const void *b)
{
	const uint64_t *x = a, *y = b;

	return (*x > *y) - (*x < *y);
}

/* Of a question that is not written to the disk; one after the other */
static bool ask_questions(unsigned int n, uint64_t *us)
{
	FILE *f = ledger_open();
	char line[200];
	unsigned int i;
	bool ok = f;

	for (i = 0; ok && i < n; i++) {
		us[i] = now_us();
		ok = ledger_say(f, line, sizeof(line), "have 1\n") && !strncmp(line, "have 1 ", 7);
		us[i] = now_us() - us[i];
	}
	if (f)
		fclose(f);
	qsort(us, i, sizeof(*us), compare_times);
	return ok || fail("the database does not answer");
}

/* Of the last epochs: how long the guest stood still, and from one to the next */
static void median_epoch(uint64_t *pause, uint64_t *every)
{
	uint64_t a[200], b[200], i, n = 0;

	pthread_mutex_lock(&log_.lock);
	for (i = log_.newest; i > 2 && n < ARRAY_SIZE(a); i--, n++) {
		a[n] = log_.epochs[i % MAX_EPOCHS].us[PAUSE];
		b[n] = log_.epochs[i % MAX_EPOCHS].taken_us -
		       log_.epochs[(i - 1) % MAX_EPOCHS].taken_us;
	}
	pthread_mutex_unlock(&log_.lock);
	qsort(a, n, sizeof(*a), compare_times);
	qsort(b, n, sizeof(*b), compare_times);
	/* Few tell nothing */
	*pause = n > 10 ? a[n / 2] : 0;
	*every = n > 10 ? b[n / 2] : 0;
}

bool test_latency(unsigned int n)
{
	static const char * const intervals[] = { "10ms", "25ms", "50ms", "100ms" };
	uint64_t *us = calloc(n, sizeof(*us)), pause, every;
	static const char * const ways[] = { "--net commit", "--packet-epochs", "--net pass" };
	unsigned int i;
	bool ok;

	ok = us && ledger_boot() && ask_questions(n, us);
	if (ok) {
		printf("TABLE\n%-26s %10s %10s %12s %12s\n", "us, a question's answer", "p50",
		       "p99", "pause p50", "epochs every");
		printf("%-26s %10lu %10lu\n", "not protected", us[n / 2], us[n * 99 / 100]);
	}
	for (i = 0; ok && i < 3 * ARRAY_SIZE(intervals); i++) {
		struct pair x = { .timeout_ms = 0, .safe = FENCE };
		char name[40];

		net_option = i % 3 == 2 ? "pass" : NULL;
		packet_epochs = i % 3 == 1;
		ok = begin_with(&x, intervals[i / 3]) && ask_questions(n, us);
		snprintf(name, sizeof(name), "%s, %s", intervals[i / 3], ways[i % 3]);
		median_epoch(&pause, &every);
		if (ok)
			printf("%-26s %10lu %10lu %12lu %12lu\n", name, us[n / 2],
			       us[n * 99 / 100], pause, every);
		end(&x);
	}
	net_option = NULL;
	packet_epochs = false;
	if (ok)
		printf("END\n");
	free(us);
	ledger_end();
	return ok;
}

bool test_ledger(unsigned int times)
{
	uint64_t began, sum = 0, longest = 0;
	atomic_bool told_enough = false;
	pthread_t teller;
	long entries = 0;
	unsigned int n;
	bool ok, tells;
	int i;

	ok = ledger_boot() && ledger_connect();
	began = now_us();
	/* In a long run nobody reads it. */
	tells = ok && times < 10 && !pthread_create(&teller, NULL, tell_progress, &told_enough);
	for (n = 0; ok && n < times; n++) {
		ok = one_kill(n);
		if (ok && tells)
			note("kill %u: all that was committed is there, once; database and file system are sound; connections went on",
			     n + 1);
	}
	told_enough = true;
	if (tells)
		pthread_join(teller, NULL);
	for (i = 0; i < CLIENTS; i++) {
		entries += clients[i].told;
		sum += clients[i].sum_us;
		if (clients[i].longest_us > longest)
			longest = clients[i].longest_us;
	}
	if (ok)
		note("%u kills: %ld entries by %d clients, %.1f s each, no one lost, none twice; an answer after %.1f ms on average, %.1f s at most",
		     n, entries, CLIENTS, (now_us() - began) / 1e6 / n, sum / 1e3 / (entries ? entries : 1),
		     longest / 1e6);
	ledger_disconnect();
	ledger_end();
	return ok;
}

/* After a bad day the same holds, wherever the guest is by then. */
bool ledger_holds(bool moved)
{
	long told[CLIENTS], lost;

	ledger_told(told);
	/* To stop a guest that is protected is another test's. */
	return ledger_goes_on(told) && ledger_check(told, &lost) && (!moved || ledger_check_disk());
}

static bool with_ledger(bool (*test)(unsigned int n), unsigned int n)
{
	bool ok = ledger_boot() && ledger_connect() && test(n);

	ledger_disconnect();
	ledger_end();
	return ok;
}

bool test_ledger_days(unsigned int n)
{
	return with_ledger(test_faults, n);
}

bool test_ledger_turns(unsigned int n)
{
	return with_ledger(test_switches, n);
}
