// SPDX-License-Identifier: GPL-2.0-only
/*
 * What epochs cost.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "failover.h"

static int compare_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static uint64_t percentile(uint64_t *v, unsigned int n, unsigned int percent)
{
	unsigned int i = n * percent / 100;

	qsort(v, n, sizeof(*v), compare_u64);
	return n ? v[i < n ? i : n - 1] : 0;
}

struct row {
	uint64_t p50[PARTS], p99[PARTS], max[PARTS];
	uint64_t pages, bytes;
	double rate, fastest;
};

/* One run; the rate is that of epochs after the first, which copied everything */
static bool run_epochs(const char *interval, unsigned int n, struct row *r, double *rate)
{
	struct pair x = { .timeout_ms = 0 };
	unsigned int i, k = 0;
	uint64_t *v = calloc(n + 1, sizeof(*v)), first, part, pages = 0;
	int status;

	if (!v)
		fatal("no memory");
	new_pair(&x);
	x.standby = start_standby(&x);
	start_protect(&x.protect, &vm, &x, interval, n);
	if (!wait_synced(&x.protect, &vm, 1))
		return false;
	status = wait_protect(&x.protect);
	kill_now(&x.standby, true);
	remove_ram(x.theirs);
	if (status || log_.newest != n + 1)
		return fail("protect ended with %d at epoch %lu of %u", status, log_.newest,
			    n + 1);

	first = log_.epochs[1].done_us;
	*rate = n / ((log_.epochs[n + 1].done_us - first) / 1e6);
	if (!r)
		goto out;
	for (part = 0; part < PARTS; part++) {
		for (k = 0, i = 2; i <= n + 1; i++)
			v[k++] = log_.epochs[i].us[part];
		r->p50[part] = percentile(v, k, 50);
		r->p99[part] = percentile(v, k, 99);
		r->max[part] = v[k - 1];
	}
	for (i = 2; i <= n + 1; i++)
		pages += log_.epochs[i].pages;
	r->pages = pages / n;
	r->bytes = (log_.epochs[n + 1].wire - log_.epochs[1].wire) / n;
out:
	free(v);
	return true;
}

bool test_early(unsigned int epochs)
{
	struct row r;
	double rate;
	bool ok;

	memset(&r, 0, sizeof(r));
	max_dirty = "400";
	ok = run_epochs("60m", epochs, &r, &rate);
	max_dirty = NULL;
	if (ok && r.pages < 400)
		ok = fail("epochs of %lu pages were taken before 400 were dirty", r.pages);
	if (ok)
		note("%u epochs of %lu pages long before the interval was over", epochs, r.pages);
	return ok;
}

bool test_measure(unsigned int epochs)
{
	static const struct {
		const char *title, *accel;
	} logs[] = {
		{ "dirty slot rings", "kvm,dirty-slot-ring-size=4096" },
		{ "dirty ring", "kvm,dirty-ring-size=4096" },
		{ "dirty bitmap", "kvm" },
	};
	static const char * const titles[] = {
		[PAUSE] = "pause", [STOP] = "stop", [HARVEST] = "harvest", [STATE] = "state",
		[COPY] = "copy", [RESUME] = "resume",
	};
	static const int order[] = { PAUSE, STOP, HARVEST, STATE, COPY, RESUME };
	struct row rows[3];
	const char *old = accel;
	size_t i, k;
	bool ok = true;

	memset(rows, 0, sizeof(rows));
	for (i = 0; i < 3 && ok; i++) {
		accel = logs[i].accel;
		leave(&vm);
		remove_ram(vm.ram);
		kill_now(&standby, true);
		ok = boot(&vm) && run_epochs("100ms", epochs, &rows[i], &rows[i].rate) &&
		     run_epochs("1ms", epochs, NULL, &rows[i].fastest);
	}
	accel = old;
	if (!ok)
		return false;

	printf("\nTABLE\n");
	printf("| %u epochs each | | %s | %s | %s |\n", epochs, logs[0].title, logs[1].title,
	       logs[2].title);
	printf("|---|---|---|---|---|\n");
	for (k = 0; k < PARTS; k++) {
		printf("| %s, µs | p50 / p99 / max |", titles[order[k]]);
		for (i = 0; i < 3; i++)
			printf(" %lu / %lu / %lu |", rows[i].p50[order[k]], rows[i].p99[order[k]],
			       rows[i].max[order[k]]);
		printf("\n");
	}
	printf("| pages in an epoch | mean |");
	for (i = 0; i < 3; i++)
		printf(" %lu |", rows[i].pages);
	printf("\n| bytes sent for it | mean |");
	for (i = 0; i < 3; i++)
		printf(" %lu |", rows[i].bytes);
	printf("\n| epochs a second | --interval 100ms |");
	for (i = 0; i < 3; i++)
		printf(" %.1f |", rows[i].rate);
	printf("\n| | --interval 1ms |");
	for (i = 0; i < 3; i++)
		printf(" %.1f |", rows[i].fastest);
	printf("\nEND\n");
	return true;
}
