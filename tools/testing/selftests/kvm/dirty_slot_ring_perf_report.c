// SPDX-License-Identifier: GPL-2.0-only
/*
 * The perf test of dirty slot rings: what it says, as a table and as JSON.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/utsname.h>

#include "dirty_slot_ring_perf.h"

const char * const order_names[NR_ORDERS] = { "random", "in-order" };

static int cmp_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

struct spread {
	double median, min, max;	/* ns per dirty page */
};

static struct spread spread_of(const struct run *r, uint64_t (*get)(const struct sample *))
{
	int i, n = r->p->iterations;
	uint64_t v[MAX_ITERATIONS];
	double pages = r->p->nr_dirty;

	for (i = 0; i < n; i++)
		v[i] = get(&r->samples[i]);
	qsort(v, n, sizeof(*v), cmp_u64);
	return (struct spread) {
		.median = (v[(n - 1) / 2] + v[n / 2]) / 2.0 / pages,
		.min = v[0] / pages,
		.max = v[n - 1] / pages,
	};
}

static uint64_t get_dirty(const struct sample *s) { return s->dirty; }
static uint64_t get_guest(const struct sample *s) { return s->guest; }
static uint64_t get_harvest(const struct sample *s) { return s->harvest; }
static uint64_t get_reprotect(const struct sample *s) { return s->reprotect; }
static uint64_t get_cost(const struct sample *s) { return s->harvest + s->reprotect; }

static const struct phase {
	const char *name;
	uint64_t (*get)(const struct sample *s);
} phases[] = {
	{ "dirty", get_dirty },
	{ "guest", get_guest },
	{ "harvest", get_harvest },
	{ "reprotect", get_reprotect },
	{ "cost", get_cost },
};

static const char cost_heading[] =
	"mode         dirty     guest   harvest reprotect      cost     enable     empty  full";

static void report_cost(const struct run *r)
{
	struct spread s;
	int i;

	printf("%-8s", r->mode->name);
	for (i = 0; i < ARRAY_SIZE(phases); i++) {
		s = spread_of(r, phases[i].get);
		printf(" %9.1f", s.median);
	}
	printf(" %10lu %9lu %5u\n", r->enable, r->empty, r->full_exits);
}

static void json_cost(FILE *f, const struct run *r)
{
	struct spread s;
	int i;

	fprintf(f, "\"enable_ns\": %lu, \"populate_ns\": %lu, \"empty_ns\": %lu, ",
		r->enable, r->populate, r->empty);
	fprintf(f, "\"full_exits\": %u, \"ns_per_page\": {", r->full_exits);
	for (i = 0; i < ARRAY_SIZE(phases); i++) {
		s = spread_of(r, phases[i].get);
		fprintf(f, "%s\"%s\": {\"median\": %.1f, \"min\": %.1f, \"max\": %.1f}",
			i ? ", " : "", phases[i].name, s.median, s.min, s.max);
	}
	fprintf(f, "}");
}

static const char * const stall_names[] = { "alone", "harvest" };

static int cmp_u32(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

/* The value that @permille of the sorted samples do not exceed. */
static uint32_t quantile(const struct stall *s, int which, unsigned int permille)
{
	uint64_t nr = s->nr[which];

	return nr ? s->ns[which][(nr - 1) * permille / 1000] : 0;
}

static void report_stall(const struct run *r)
{
	struct stall *s = r->stall;
	int i;

	for (i = 0; i < 2; i++) {
		qsort(s->ns[i], s->nr[i], sizeof(**s->ns), cmp_u32);
		printf("%-8s %-8s %8u %10u %10u %10u %10u\n", r->mode->name, stall_names[i],
		       s->nr[i], quantile(s, i, 500), quantile(s, i, 990),
		       quantile(s, i, 999), quantile(s, i, 1000));
	}
}

/* Four bins to the octave, each as [from, samples]. */
static void json_histogram(FILE *f, const uint32_t *ns, uint32_t nr)
{
	uint64_t from, width;
	uint32_t i = 0, n;

	fprintf(f, "\"histogram\": [");
	while (i < nr) {
		width = max(1ul << (31 - __builtin_clz(ns[i] | 1)), 4ul) / 4;
		from = ns[i] / width * width;
		for (n = 0; i < nr && ns[i] < from + width; i++)
			n++;
		fprintf(f, "[%lu, %u]%s", from, n, i < nr ? ", " : "");
	}
	fprintf(f, "]");
}

static void json_stall(FILE *f, const struct run *r)
{
	const struct stall *s = r->stall;
	int i;

	fprintf(f, "\"clock\": \"%s\", \"ns\": {", s->own_cpu ? "guest" : "host");
	for (i = 0; i < 2; i++) {
		fprintf(f, "%s\"%s\": {\"samples\": %u, \"median\": %u, \"p99\": %u, ",
			i ? ", " : "", stall_names[i], s->nr[i], quantile(s, i, 500),
			quantile(s, i, 990));
		fprintf(f, "\"p999\": %u, \"max\": %u, ", quantile(s, i, 999),
			quantile(s, i, 1000));
		json_histogram(f, s->ns[i], s->nr[i]);
		fprintf(f, "}");
	}
	fprintf(f, "}, \"cost_ns_per_page\": %.1f", spread_of(r, get_cost).median);
}

static void report_memory(const struct run *r)
{
	printf("%-8s %12ld %12ld %12ld %12ld\n", r->mode->name,
	       r->memory.vmalloc + r->memory.slab, r->memory.vmalloc, r->memory.slab,
	       r->memory.free);
}

static void json_memory(FILE *f, const struct run *r)
{
	fprintf(f, "\"slots\": %d, \"bytes\": %ld, \"vmalloc\": %ld, \"slab\": %ld, \"free\": %ld",
		r->p->nr_slots, r->memory.vmalloc + r->memory.slab, r->memory.vmalloc,
		r->memory.slab, r->memory.free);
}

const struct question questions[NR_QUESTIONS] = {
	[ASK_COST] = {
		"cost", cost_heading,
		measure, report_cost, json_cost,
	},
	[ASK_STALL] = {
		"stall",
		"mode     beside    samples     median        99%      99.9%    longest",
		stall, report_stall, json_stall,
	},
	[ASK_MEMORY] = {
		"memory",
		"mode            bytes      vmalloc         slab   memory gone",
		measure_memory, report_memory, json_memory,
	},
};

void report_json(FILE *f, const struct question *q, const struct run *r)
{
	struct utsname uts;

	uname(&uts);
	fprintf(f, "{\"test\": \"dirty_slot_ring_perf_test\", \"question\": \"%s\", ", q->name);
	fprintf(f, "\"kernel\": \"%s\", \"mode\": \"%s\", ", uts.release, r->mode->name);
	fprintf(f, "\"slot_bytes\": %lu, \"slot_pages\": %lu, ", r->p->size, r->p->size / PG);
	fprintf(f, "\"dirty_pages\": %u, \"order\": \"%s\", \"vcpus\": %d, \"ring_entries\": %u, ",
		r->p->nr_dirty, order_names[r->p->order], r->p->nr_vcpus, r->entries);
	fprintf(f, "\"seed\": %lu, \"iterations\": %d, ", r->p->seed, r->p->iterations);
	q->json(f, r);
	fprintf(f, "}\n");
	fflush(f);
}
