// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvmdirtytop - which VM dirties what, how fast, and where does its pause go?
 *
 * The BPF programs add up what KVM's tracepoints say (kvmdirtytop.bpf.c).  Here
 * their maps are read at each interval and the differences shown: as tables, or
 * as JSON, one object for each interval.  Every event is in one interval and in
 * no other, and nothing stays attached when this process ends, however it ends.
 */
#include <errno.h>
#include <getopt.h>
#include <linux/capability.h>
#include <math.h>
#include <search.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#include <dirent.h>
#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include "kvmdirtytop.h"
#include "kvmdirtytop.skel.h"

#define COMM_LEN	16
#define __noreturn	__attribute__((__noreturn__))
#define __printf(a, b)	__attribute__((__format__(printf, a, b)))

/* A row of a table; the key comes first, for search(3). */
struct row {
	union {
		int vm;
		struct vcpu_key vcpu;
		struct slot_key slot;
	} key;
	char comm[COMM_LEN];
	bool active;		/* something happened in this interval */
};

/* What a vCPU logged in a memslot. */
struct vcpu_row {
	struct row row;
	struct vcpu_val now, before, diff;
};

/* The calls that emptied a memslot's log. */
struct slot_row {
	struct row row;
	struct slot_val now, before, diff;
};

/**
 * struct table - the rows of a BPF map
 * @map: its file descriptor
 * @key_size: of its keys
 * @row_size: of the rows here
 * @now: where in a row the map's value goes
 * @cmp: compares keys
 * @diff: what happened since the last time; sets row->active
 * @tree: all rows, by key
 * @active: those where something happened
 * @nr: how many
 * @max: room for
 * @in_map: rows in the map
 */
struct table {
	int map;
	size_t key_size, row_size, now;
	int (*cmp)(const void *a, const void *b);
	void (*diff)(struct row *row, __u32 epoch);
	void *tree;
	struct row **active;
	size_t nr, max, in_map;
};

static const char * const phase_names[NR_PHASES] = {
	[PHASE_TOTAL] = "pause",
	[PHASE_WAIT] = "wait",
	[PHASE_COLLECT] = "collect",
	[PHASE_PROTECT] = "protect",
	[PHASE_FLUSH] = "flush",
};

/* What -s can name. */
enum sort {
	SORT_PAGES, SORT_RUNS, SORT_LEN, SORT_PEAK, SORT_OVERFLOW, SORT_EXITS,
	SORT_HARVESTS, SORT_PAUSE, SORT_VM, NR_SORTS
};

static const char * const sort_names[NR_SORTS] = {
	"pages", "runs", "len", "peak", "overflow", "exits", "harvests", "pause",
	"vm",
};

static struct {
	double interval;
	long count;
	int pid;
	enum sort sort;
	int rows;
	bool no_clear, json, hist, verbose, all;
} opt = { .interval = 1, .count = -1, .rows = 20 };

/* Where the figures come from on this kernel. */
static bool have_slot_rings, have_ring, have_bitmap;

static void __noreturn __printf(1, 2)
die(const char *fmt, ...)
{
	va_list ap;

	fputs("kvmdirtytop: ", stderr);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	exit(1);
}

static void __noreturn __printf(1, 2)
usage_error(const char *fmt, ...)
{
	va_list ap;

	fputs("kvmdirtytop: ", stderr);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputs("\nTry: kvmdirtytop --help\n", stderr);
	exit(2);
}

#ifndef PROGRAM_VERSION
#define PROGRAM_VERSION "1"
#endif

static void usage(void)
{
	fputs("Usage: kvmdirtytop [OPTION]... [INTERVAL [COUNT]]\n"
	      "\n"
	      "Shows which VM dirties what, how fast, and where the time of those who ask for it\n"
	      "goes: every INTERVAL seconds (default 1), COUNT times (default: until stopped).\n"
	      "It only listens: a page is seen if something else logs dirty pages.\n"
	      "\n"
	      "  -p, --pid PID    only VMs of this process\n"
	      "  -s, --sort KEY   pages (default), runs, len, peak, overflow, exits, harvests,\n"
	      "                   pause or vm\n"
	      "  -r, --rows N     at most N rows of each table (default 20)\n"
	      "  -C, --no-clear   do not clear the screen\n"
	      "  -a, --all        also VMs that use the bitmap, with a probe on each dirtied page;\n"
	      "                   without dirty slot rings in the kernel that is the default\n"
	      "      --hist       also histograms of the times\n"
	      "      --json       one JSON object for each interval, and no tables\n"
	      "  -v, --verbose    say what is loaded and attached\n"
	      "  -h, --help       this\n"
	      "      --version    which version this is\n"
	      "\n"
	      "Needs CAP_BPF and CAP_PERFMON.  The manual page, kvmdirtytop(8), explains each\n"
	      "column.\n", stdout);
}

/* Memory is small here, and without it there is nothing to do. */
static void *xalloc(void *p, size_t size)
{
	p = realloc(p, size);
	if (!p)
		die("out of memory");
	return p;
}

/*
 * Which VMs.  The kernel names a VM by the thread that created it.
 */

static void vm_comm(int vm, char comm[COMM_LEN])
{
	char path[32];
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/comm", vm);
	snprintf(comm, COMM_LEN, "?");
	f = fopen(path, "re");
	if (f && !fgets(comm, COMM_LEN, f))
		snprintf(comm, COMM_LEN, "?");
	comm[strcspn(comm, "\n")] = 0;
	if (f)
		fclose(f);
}

static bool vm_alive(int vm)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/%d", vm);
	return !access(path, F_OK);
}

/* The threads of the process that is wanted. */
static void want_threads(int map)
{
	struct dirent *d;
	char path[32];
	__u8 yes = 1;
	DIR *dir;
	int tid;

	snprintf(path, sizeof(path), "/proc/%d/task", opt.pid);
	dir = opendir(path);
	if (!dir)
		die("there is no process %d", opt.pid);
	/* It may have created its VM from a thread that is gone by now. */
	bpf_map_update_elem(map, &opt.pid, &yes, 0);
	while ((d = readdir(dir))) {
		tid = atoi(d->d_name);
		if (tid > 0 && bpf_map_update_elem(map, &tid, &yes, 0))
			die("process %d has too many threads", opt.pid);
	}
	closedir(dir);
}

/*
 * Reading the maps.
 */

static int vcpu_cmp(const void *a, const void *b)
{
	const struct vcpu_key *x = a, *y = b;

	if (x->vm != y->vm)
		return x->vm < y->vm ? -1 : 1;
	if (x->slot != y->slot)
		return x->slot < y->slot ? -1 : 1;
	return x->vcpu < y->vcpu ? -1 : x->vcpu > y->vcpu;
}

static int slot_cmp(const void *a, const void *b)
{
	const struct slot_key *x = a, *y = b;

	if (x->vm != y->vm)
		return x->vm < y->vm ? -1 : 1;
	return x->slot < y->slot ? -1 : x->slot > y->slot;
}

static void vcpu_diff(struct row *row, __u32 epoch)
{
	struct vcpu_row *r = (struct vcpu_row *)row;
	const struct vcpu_val *a = &r->before, *b = &r->now;
	struct vcpu_val *d = &r->diff;

	d->pages = b->pages - a->pages;
	d->runs = b->runs - a->runs;
	d->overflowed = b->overflowed - a->overflowed;
	d->exits = b->exits - a->exits;
	row->active = d->pages || d->exits;
	d->used = b->used;
	d->entries = b->entries;
	d->peak = b->epoch == epoch ? b->peak : 0;
	/* Its vCPU may have written the row while it was copied. */
	if (row->active && d->peak < d->used)
		d->peak = d->used;
	r->before = r->now;
}

static void slot_diff(struct row *row, __u32 epoch)
{
	struct slot_row *r = (struct slot_row *)row;
	const struct slot_val *a = &r->before, *b = &r->now;
	struct slot_val *d = &r->diff;
	int i, j;

	d->harvests = b->harvests - a->harvests;
	d->resets = b->resets - a->resets;
	d->failed = b->failed - a->failed;
	d->more = b->more - a->more;
	d->runs = b->runs - a->runs;
	d->pages = b->pages - a->pages;
	d->collected = b->collected - a->collected;
	row->active = d->harvests || d->resets || d->failed;
	for (i = 0; i < NR_PHASES; i++) {
		d->sum[i] = b->sum[i] - a->sum[i];
		d->max[i] = b->epoch == epoch ? b->max[i] : 0;
		for (j = 0; j < NR_BUCKETS; j++)
			d->hist[i][j] = b->hist[i][j] - a->hist[i][j];
	}
	r->before = r->now;
}

static struct table vcpus = {
	.key_size = sizeof(struct vcpu_key),
	.row_size = sizeof(struct vcpu_row),
	.now = offsetof(struct vcpu_row, now),
	.cmp = vcpu_cmp,
	.diff = vcpu_diff,
};

static struct table slots = {
	.key_size = sizeof(struct slot_key),
	.row_size = sizeof(struct slot_row),
	.now = offsetof(struct slot_row, now),
	.cmp = slot_cmp,
	.diff = slot_diff,
};

static struct row *table_row(struct table *t, const void *key)
{
	struct row *row;
	void *node;

	node = tfind(key, &t->tree, t->cmp);
	if (node)
		return *(struct row **)node;
	row = xalloc(NULL, t->row_size);
	memset(row, 0, t->row_size);
	memcpy(&row->key, key, t->key_size);
	vm_comm(row->key.vm, row->comm);
	if (!tsearch(row, &t->tree, t->cmp))
		die("out of memory");
	return row;
}

/* Read the map; rows of VMs that are gone make room for others. */
static void table_read(struct table *t, __u32 epoch)
{
	struct row *row, **dead = NULL;
	size_t nr_dead = 0;
	char key[sizeof(row->key)];
	void *prev = NULL;

	t->nr = 0;
	t->in_map = 0;
	while (!bpf_map_get_next_key(t->map, prev, key)) {
		row = table_row(t, key);
		prev = &row->key;
		t->in_map++;
		if (bpf_map_lookup_elem(t->map, key, (char *)row + t->now))
			continue;
		t->diff(row, epoch);
		if (row->active) {
			if (t->nr == t->max) {
				t->max = t->max * 2 + 64;
				t->active = xalloc(t->active,
						   t->max * sizeof(row));
			}
			t->active[t->nr++] = row;
		} else if (!vm_alive(row->key.vm)) {
			dead = xalloc(dead, (nr_dead + 1) * sizeof(row));
			dead[nr_dead++] = row;
		}
	}
	t->in_map -= nr_dead;
	while (nr_dead--) {
		row = dead[nr_dead];
		bpf_map_delete_elem(t->map, &row->key);
		tdelete(row, &t->tree, t->cmp);
		free(row);
	}
	free(dead);
}

/*
 * Showing.
 */

/* Calls of all lengths in a phase. */
static __u64 hist_calls(const __u32 *hist)
{
	__u64 n = 0;
	int i;

	for (i = 0; i < NR_BUCKETS; i++)
		n += hist[i];
	return n;
}

/* The first time, in ns, that no longer belongs to a bucket. */
static __u64 bucket_end(int i)
{
	int power = i >> BUCKET_BITS;

	if (!power)
		return i + 1;
	return (__u64)((1 << BUCKET_BITS) + (i & ((1 << BUCKET_BITS) - 1)) + 1)
	       << (power - 1);
}

/*
 * The time, in ns, that @part of the calls did not exceed: the end of a bucket,
 * hence up to an eighth too long, but never longer than the longest call.
 */
static double quantile(const struct slot_val *v, enum phase phase, double part)
{
	__u64 want = ceil(hist_calls(v->hist[phase]) * part), n = 0, end;
	int i;

	for (i = 0; i < NR_BUCKETS; i++) {
		n += v->hist[phase][i];
		if (n && n >= want) {
			end = bucket_end(i) - 1;
			return end < v->max[phase] ? end : v->max[phase];
		}
	}
	return 0;
}

static double ratio(double a, double b)
{
	return b ? a / b : 0;
}

static double vcpu_sort_key(const struct vcpu_row *r)
{
	const struct vcpu_val *d = &r->diff;

	switch (opt.sort) {
	case SORT_RUNS:
		return d->runs;
	case SORT_LEN:
		return ratio(d->pages, d->runs);
	case SORT_PEAK:
		return ratio(d->peak, d->entries);
	case SORT_OVERFLOW:
		return d->overflowed;
	case SORT_EXITS:
		return d->exits;
	case SORT_VM:
		return 0;
	default:
		return d->pages;
	}
}

static double slot_sort_key(const struct slot_row *r)
{
	const struct slot_val *d = &r->diff;

	switch (opt.sort) {
	case SORT_RUNS:
		return d->runs;
	case SORT_LEN:
		return ratio(d->pages, d->runs);
	case SORT_HARVESTS:
		return d->harvests + d->resets;
	case SORT_PAUSE:
		return quantile(d, PHASE_TOTAL, 0.99);
	case SORT_VM:
		return 0;
	default:
		return d->pages + d->collected;
	}
}

/* Largest first; by VM, slot and vCPU where that says nothing. */
static int vcpu_order(const void *a, const void *b)
{
	const struct vcpu_row *x = *(void **)a, *y = *(void **)b;
	double p = vcpu_sort_key(x), q = vcpu_sort_key(y);

	return p != q ? (p < q ? 1 : -1) : vcpu_cmp(x, y);
}

static int slot_order(const void *a, const void *b)
{
	const struct slot_row *x = *(void **)a, *y = *(void **)b;
	double p = slot_sort_key(x), q = slot_sort_key(y);

	return p != q ? (p < q ? 1 : -1) : slot_cmp(x, y);
}

/* Slots other than of the first address space (SMM) are shown as space:slot. */
static const char *slot_name(__u32 slot)
{
	static char name[16];

	if (slot == ALL_SLOTS)
		return "all";
	if (slot >> 16)
		snprintf(name, sizeof(name), "%u:%u", slot >> 16, slot & 0xffff);
	else
		snprintf(name, sizeof(name), "%u", slot);
	return name;
}

static void show_vcpu(const struct vcpu_row *r, double secs)
{
	const struct vcpu_key *k = &r->row.key.vcpu;
	const struct vcpu_val *d = &r->diff;
	char vcpu[12] = "-", fill[8] = "-", peak[8] = "-";

	if (k->vcpu >= 0)
		snprintf(vcpu, sizeof(vcpu), "%d", k->vcpu);
	if (d->entries) {
		snprintf(fill, sizeof(fill), "%.0f", 100.0 * d->used / d->entries);
		snprintf(peak, sizeof(peak), "%.0f", 100.0 * d->peak / d->entries);
	}
	printf("%7d %-15s %6s %4s %9.0f %8.1f %9.0f %7.1f %5s %5s %8.0f %6.0f\n",
	       k->vm, r->row.comm, slot_name(k->slot), vcpu, d->pages / secs,
	       d->pages / secs * sysconf(_SC_PAGESIZE) / (1 << 20),
	       d->runs / secs, ratio(d->pages, d->runs), fill,
	       peak, d->overflowed / secs, d->exits / secs);
}

static void show_slot(const struct slot_row *r, double secs)
{
	const struct slot_val *d = &r->diff;
	int i;

	printf("%7d %-15s %6s %8.1f %7.1f %9.0f %8.0f %7.1f", r->row.key.vm,
	       r->row.comm, slot_name(r->row.key.slot.slot), d->harvests / secs,
	       d->resets / secs, (d->pages + d->collected) / secs,
	       d->runs / secs, ratio(d->pages, d->runs));
	for (i = 0; i < NR_PHASES; i++) {
		if (!hist_calls(d->hist[i])) {
			putchar('\n');
			break;
		}
		printf("%*s%-7s %8.1f %8.1f %8.1f", i ? 76 : 1, "",
		       phase_names[i], quantile(d, i, 0.5) / 1000,
		       quantile(d, i, 0.99) / 1000, d->max[i] / 1000.0);
		printf(" %4.0f%%\n",
		       100 * ratio(d->sum[i], d->sum[PHASE_TOTAL]));
	}
	if (d->more || d->failed)
		printf("%32s%.1f/s filled the array, %.1f/s failed\n", "",
		       d->more / secs, d->failed / secs);
}

/* Calls by powers of two of the time they took. */
static void show_hist(const struct slot_row *r)
{
	static const char stars[] = "****************************************";
	__u64 n[NR_PHASES][NR_BUCKETS >> BUCKET_BITS] = { 0 }, most = 0, sum;
	int i, j, first = -1, last = -1, nr = NR_BUCKETS >> BUCKET_BITS;

	for (i = 0; i < NR_PHASES; i++) {
		for (j = 0; j < NR_BUCKETS; j++)
			n[i][j >> BUCKET_BITS] += r->diff.hist[i][j];
	}
	for (j = 0; j < nr; j++) {
		for (i = sum = 0; i < NR_PHASES; i++)
			sum += n[i][j];
		if (sum && first < 0)
			first = j;
		if (sum)
			last = j;
		if (n[PHASE_TOTAL][j] > most)
			most = n[PHASE_TOTAL][j];
	}
	if (first < 0)
		return;

	printf("\nVM %d slot %s: calls by the time they took, in ns\n",
	       r->row.key.vm, slot_name(r->row.key.slot.slot));
	printf("%12s    %-12s", "from", "to");
	for (i = 0; i < NR_PHASES; i++)
		printf(" %8s", phase_names[i]);
	printf("  %s\n", phase_names[PHASE_TOTAL]);
	for (j = first; j <= last; j++) {
		printf("%12llu -> %-12llu",
		       j ? bucket_end((j << BUCKET_BITS) - 1) : 0,
		       bucket_end(((j + 1) << BUCKET_BITS) - 1) - 1);
		for (i = 0; i < NR_PHASES; i++)
			printf(" %8llu", n[i][j]);
		printf("  %.*s\n", (int)(ratio(n[PHASE_TOTAL][j], most) * 40), stars);
	}
}

static void show_tables(double secs, __u64 lost)
{
	const size_t rows = opt.rows;
	double pages = 0;
	char when[16];
	size_t i;
	time_t t;

	for (i = 0; i < vcpus.nr; i++)
		pages += ((struct vcpu_row *)vcpus.active[i])->diff.pages;
	if (!opt.no_clear)
		fputs("\033[H\033[J", stdout);
	time(&t);
	strftime(when, sizeof(when), "%H:%M:%S", localtime(&t));
	printf("kvmdirtytop %s  %.1f s  %.0f pages/s dirtied, %.1f MiB/s  (%s%s%s)\n",
	       when, secs, pages / secs,
	       pages / secs * sysconf(_SC_PAGESIZE) / (1 << 20),
	       have_slot_rings ? "slot rings" : "no slot rings",
	       have_ring ? ", ring" : "", have_bitmap ? ", bitmap" : "");
	if (lost)
		printf("%llu events were lost: too many VMs, slots and vCPUs\n", lost);

	printf("\n%7s %-15s %6s %4s %9s %8s %9s %7s %5s %5s %8s %6s\n", "VM",
	       "COMM", "SLOT", "VCPU", "PAGES/s", "MiB/s", "RUNS/s", "LEN",
	       "FILL%", "PEAK%", "OVERFL/s", "EXIT/s");
	for (i = 0; i < vcpus.nr && i < rows; i++)
		show_vcpu((struct vcpu_row *)vcpus.active[i], secs);
	if (vcpus.nr > rows)
		printf("... and %zu more\n", vcpus.nr - rows);

	if (slots.nr)
		printf("\n%7s %-15s %6s %8s %7s %9s %8s %7s %-7s %8s %8s %8s %5s\n",
		       "VM", "COMM", "SLOT", "HARV/s", "RESET/s", "PAGES/s",
		       "RUNS/s", "LEN", "us", "p50", "p99", "max", "");
	for (i = 0; i < slots.nr && i < rows; i++)
		show_slot((struct slot_row *)slots.active[i], secs);
	if (slots.nr > rows)
		printf("... and %zu more\n", slots.nr - rows);
	for (i = 0; opt.hist && i < slots.nr && i < rows; i++)
		show_hist((struct slot_row *)slots.active[i]);
	if (opt.no_clear)
		putchar('\n');
}

/* A process can give itself any name. */
static void json_string(const char *s)
{
	putchar('"');
	for (; *s; s++) {
		if ((unsigned char)*s < ' ' || *s == '"' || *s == '\\' || *s & 0x80)
			printf("\\u%04x", (unsigned char)*s);
		else
			putchar(*s);
	}
	putchar('"');
}

static void json_row(const struct row *row, __u32 slot, bool first)
{
	printf("%s{\"vm\":%d,\"comm\":", first ? "" : ",", row->key.vm);
	json_string(row->comm);
	if (slot == ALL_SLOTS)
		fputs(",\"as_id\":null,\"slot\":null", stdout);
	else
		printf(",\"as_id\":%u,\"slot\":%u", slot >> 16, slot & 0xffff);
}

static void json_hist(const __u32 *hist)
{
	bool first = true;
	int i;

	fputs(",\"hist\":[", stdout);
	for (i = 0; i < NR_BUCKETS; i++) {
		if (!hist[i])
			continue;
		printf("%s[%llu,%u]", first ? "" : ",", bucket_end(i) - 1, hist[i]);
		first = false;
	}
	putchar(']');
}

static void show_json(double secs, __u64 lost)
{
	struct timespec now;
	size_t i;
	int j;

	clock_gettime(CLOCK_REALTIME, &now);
	printf("{\"time\":%lld.%03ld,\"interval\":%.6f,\"page_size\":%ld,\"lost\":%llu",
	       (long long)now.tv_sec, now.tv_nsec / 1000000, secs,
	       sysconf(_SC_PAGESIZE), lost);
	printf(",\"sources\":{\"slot_rings\":%s,\"ring\":%s,\"bitmap\":%s}",
	       have_slot_rings ? "true" : "false", have_ring ? "true" : "false",
	       have_bitmap ? "true" : "false");
	printf(",\"rows\":{\"vcpus\":%zu,\"slots\":%zu}", vcpus.in_map, slots.in_map);
	fputs(",\"vcpus\":[", stdout);
	for (i = 0; i < vcpus.nr; i++) {
		struct vcpu_row *r = (struct vcpu_row *)vcpus.active[i];
		const struct vcpu_val *d = &r->diff;

		json_row(&r->row, r->row.key.vcpu.slot, !i);
		printf(",\"vcpu\":%d,\"pages\":%llu,\"runs\":%llu", r->row.key.vcpu.vcpu,
		       d->pages, d->runs);
		printf(",\"overflowed\":%llu,\"exits\":%llu", d->overflowed, d->exits);
		printf(",\"used\":%u,\"peak\":%u,\"entries\":%u}", d->used, d->peak,
		       d->entries);
	}
	fputs("],\"slots\":[", stdout);
	for (i = 0; i < slots.nr; i++) {
		struct slot_row *r = (struct slot_row *)slots.active[i];
		const struct slot_val *d = &r->diff;

		json_row(&r->row, r->row.key.slot.slot, !i);
		printf(",\"harvests\":%llu,\"resets\":%llu,\"failed\":%llu,\"more\":%llu",
		       d->harvests, d->resets, d->failed, d->more);
		printf(",\"runs\":%llu,\"pages\":%llu,\"collected\":%llu,\"ns\":{", d->runs,
		       d->pages, d->collected);
		for (j = 0; j < NR_PHASES; j++) {
			printf("%s\"%s\":{\"sum\":%llu,\"p50\":%.0f,\"p99\":%.0f,\"max\":%llu",
			       j ? "," : "", phase_names[j], d->sum[j],
			       quantile(d, j, 0.5), quantile(d, j, 0.99), d->max[j]);
			if (opt.hist)
				json_hist(d->hist[j]);
			putchar('}');
		}
		fputs("}}", stdout);
	}
	puts("]}");
}

/*
 * Loading.
 */

static int print_libbpf(enum libbpf_print_level level, const char *fmt, va_list ap)
{
	(void)level;
	/* What fails is told in other words, by who tried. */
	return opt.verbose ? vfprintf(stderr, fmt, ap) : 0;
}

static void check_caps(void)
{
	struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];
	const __u32 bpf = 1U << (CAP_BPF - 32), perfmon = 1U << (CAP_PERFMON - 32);
	__u32 missing;

	if (syscall(SYS_capget, &head, data))
		return;
	if (data[0].effective & 1U << CAP_SYS_ADMIN)
		return;
	missing = ~data[1].effective & (bpf | perfmon);
	if (missing)
		die("%s missing: run it as root, or once: setcap %s \"$(command -v %s)\"",
		    missing == bpf ? "CAP_BPF is" : missing == perfmon ? "CAP_PERFMON is" :
		    "CAP_BPF and CAP_PERFMON are", "cap_bpf,cap_perfmon+ep", "kvmdirtytop");
}

static struct kvmdirtytop_bpf *load(bool with_types)
{
	struct kvmdirtytop_bpf *skel = kvmdirtytop_bpf__open();
	int err;

	if (!skel)
		return NULL;
	skel->rodata->only_vms = opt.pid;
	if (!with_types) {
		bpf_program__set_autoload(skel->progs.ring_push, false);
		bpf_program__set_autoload(skel->progs.ring_exit, false);
		bpf_program__set_autoload(skel->progs.ring_reset, false);
		bpf_program__set_autoload(skel->progs.bitmap_mark, false);
	}
	err = kvmdirtytop_bpf__load(skel);
	if (err) {
		kvmdirtytop_bpf__destroy(skel);
		errno = -err;
		return NULL;
	}
	return skel;
}

/* Attaches all of them or fails; 0 or the errno of the first that failed. */
static int attach(struct bpf_program *const progs[], struct bpf_link **links[], int nr)
{
	int i, err;

	for (i = 0; i < nr; i++) {
		*links[i] = bpf_program__attach(progs[i]);
		if (*links[i])
			continue;
		err = errno;
		while (i--) {
			bpf_link__destroy(*links[i]);
			*links[i] = NULL;
		}
		return err;
	}
	return 0;
}

static struct kvmdirtytop_bpf *load_and_attach(void)
{
	static const char need[] =
		"it takes CONFIG_KPROBE_EVENTS, CONFIG_DEBUG_INFO_BTF, for a module CAP_SYS_ADMIN";
	struct kvmdirtytop_bpf *skel;
	int err, types_err = 0;

	skel = load(true);
	if (!skel) {
		types_err = errno;
		skel = load(false);
	}
	if (!skel)
		die("the kernel took no BPF program: %s; -v says more", strerror(errno));

	err = attach((struct bpf_program *const []) {
			     skel->progs.slot_ring_push, skel->progs.slot_ring_overflow,
			     skel->progs.slot_ring_exit, skel->progs.slot_log_phase,
			     skel->progs.slot_log_harvest, skel->progs.slot_vm_harvest,
			     skel->progs.slot_log_reset },
		     (struct bpf_link **[]) {
			     &skel->links.slot_ring_push, &skel->links.slot_ring_overflow,
			     &skel->links.slot_ring_exit, &skel->links.slot_log_phase,
			     &skel->links.slot_log_harvest, &skel->links.slot_vm_harvest,
			     &skel->links.slot_log_reset }, 7);
	if (err && err != ENOENT)
		die("cannot attach to the tracepoints of dirty slot rings: %s%s", strerror(err),
		    err == EINVAL ? "; they are of another version than this program" : "");
	have_slot_rings = !err;

	if (!types_err) {
		have_ring = !attach((struct bpf_program *const []) {
					    skel->progs.ring_push, skel->progs.ring_exit,
					    skel->progs.ring_reset },
				    (struct bpf_link **[]) {
					    &skel->links.ring_push, &skel->links.ring_exit,
					    &skel->links.ring_reset }, 3);
		if (opt.all || !have_slot_rings)
			have_bitmap = !attach((struct bpf_program *const []) {
						      skel->progs.bitmap_mark },
					      (struct bpf_link **[]) {
						      &skel->links.bitmap_mark }, 1);
	}

	if (!have_slot_rings && !have_ring && !have_bitmap) {
		if (access("/dev/kvm", F_OK))
			die("there is no /dev/kvm: is KVM's module loaded, and virtualization enabled?");
		if (types_err)
			die("there are no dirty slot rings, and no types for other logs: %s", need);
		die("KVM has nothing to attach to: %s", need);
	}
	if (!have_slot_rings) {
		fprintf(stderr, "kvmdirtytop: this kernel has no dirty slot rings: showing%s%s%s\n",
			have_ring ? " the dirty ring" : "",
			have_ring && have_bitmap ? " and" : "",
			have_bitmap ? " the bitmap" : "");
		fputs("kvmdirtytop: nothing can be said about harvests and their times\n", stderr);
	}
	if (opt.all && !have_bitmap)
		fprintf(stderr, "kvmdirtytop: the bitmap cannot be shown: %s\n", need);
	return skel;
}

/* Events that found a program busy on the same CPU: it was interrupted. */
static __u64 missed(struct kvmdirtytop_bpf *skel)
{
	struct bpf_prog_info info;
	struct bpf_program *prog;
	__u64 sum = 0;
	__u32 len;

	bpf_object__for_each_program(prog, skel->obj) {
		len = sizeof(info);
		memset(&info, 0, sizeof(info));
		if (bpf_program__fd(prog) >= 0 &&
		    !bpf_obj_get_info_by_fd(bpf_program__fd(prog), &info, &len))
			sum += info.recursion_misses;
	}
	return sum;
}

static double seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void run(struct kvmdirtytop_bpf *skel)
{
	double before = seconds(), next = before, left, now;
	__u64 lost, lost_before = 0;
	struct timespec ts;
	sigset_t stop;
	int sig = -1;

	sigemptyset(&stop);
	sigaddset(&stop, SIGINT);
	sigaddset(&stop, SIGTERM);
	sigaddset(&stop, SIGHUP);
	/* The last interval ends with the signal and is shown like any other. */
	while (sig < 0 && opt.count) {
		/* Late, it leaves beats out: no interval is much shorter than asked. */
		next = fmax(next + opt.interval, before + opt.interval / 2);
		left = fmax(next - seconds(), 0);
		ts.tv_sec = left;
		ts.tv_nsec = (left - ts.tv_sec) * 1e9;
		sig = sigtimedwait(&stop, NULL, &ts);

		table_read(&vcpus, skel->bss->epoch);
		table_read(&slots, skel->bss->epoch);
		__atomic_add_fetch(&skel->bss->epoch, 1, __ATOMIC_RELAXED);
		now = seconds();
		lost = skel->bss->lost + missed(skel);
		if (opt.json) {
			show_json(now - before, lost - lost_before);
		} else {
			if (vcpus.nr)
				qsort(vcpus.active, vcpus.nr, sizeof(void *), vcpu_order);
			if (slots.nr)
				qsort(slots.active, slots.nr, sizeof(void *), slot_order);
			show_tables(now - before, lost - lost_before);
		}
		if (fflush(stdout) || ferror(stdout))
			die("cannot write: %s", strerror(errno));
		before = now;
		lost_before = lost;
		if (opt.count > 0)
			opt.count--;
	}
}

static double number(const char *what, const char *s, double min, double max)
{
	char *end;
	double x;

	errno = 0;
	x = strtod(s, &end);
	if (errno || end == s || *end || !(x >= min && x <= max))
		usage_error("%s must be from %g to %g, not '%s'", what, min, max, s);
	return x;
}

static long whole(const char *what, const char *s, long max)
{
	double x = number(what, s, 1, max);

	if (x != (long)x)
		usage_error("%s must be an integer, not '%s'", what, s);
	return x;
}

static void parse(int argc, char **argv)
{
	enum { HIST = 256, JSON, VERSION };
	static const struct option options[] = {
		{ "pid", required_argument, NULL, 'p' },
		{ "sort", required_argument, NULL, 's' },
		{ "rows", required_argument, NULL, 'r' },
		{ "no-clear", no_argument, NULL, 'C' },
		{ "all", no_argument, NULL, 'a' },
		{ "hist", no_argument, NULL, HIST },
		{ "json", no_argument, NULL, JSON },
		{ "verbose", no_argument, NULL, 'v' },
		{ "help", no_argument, NULL, 'h' },
		{ "version", no_argument, NULL, VERSION },
		{ 0 }
	};
	int c;

	while ((c = getopt_long(argc, argv, "p:s:r:Cavh", options, NULL)) != -1) {
		switch (c) {
		case 'p':
			opt.pid = whole("PID", optarg, 1 << 22);
			break;
		case 's':
			for (opt.sort = 0; opt.sort < NR_SORTS; opt.sort++) {
				if (!strcmp(optarg, sort_names[opt.sort]))
					break;
			}
			if (opt.sort == NR_SORTS)
				usage_error("cannot sort by '%s'", optarg);
			break;
		case 'r':
			opt.rows = whole("the number of rows", optarg, 1000000);
			break;
		case 'C':
			opt.no_clear = true;
			break;
		case 'a':
			opt.all = true;
			break;
		case HIST:
			opt.hist = true;
			break;
		case JSON:
			opt.json = true;
			break;
		case 'v':
			opt.verbose = true;
			break;
		case 'h':
			usage();
			exit(0);
		case VERSION:
			puts("kvmdirtytop " PROGRAM_VERSION);
			exit(0);
		default:
			fputs("Try: kvmdirtytop --help\n", stderr);
			exit(2);
		}
	}
	if (optind < argc)
		opt.interval = number("INTERVAL", argv[optind++], 0.01, 86400);
	if (optind < argc)
		opt.count = whole("COUNT", argv[optind++], 1000000000);
	if (optind < argc)
		usage_error("what is '%s'?", argv[optind]);
	if (!isatty(STDOUT_FILENO))
		opt.no_clear = true;
}

int main(int argc, char **argv)
{
	struct kvmdirtytop_bpf *skel;
	sigset_t stop;

	parse(argc, argv);

	/* Taken by sigtimedwait() only. */
	sigemptyset(&stop);
	sigaddset(&stop, SIGINT);
	sigaddset(&stop, SIGTERM);
	sigaddset(&stop, SIGHUP);
	sigprocmask(SIG_BLOCK, &stop, NULL);

	libbpf_set_print(print_libbpf);
	check_caps();
	skel = load_and_attach();
	if (opt.pid)
		want_threads(bpf_map__fd(skel->maps.vms));
	vcpus.map = bpf_map__fd(skel->maps.vcpus);
	slots.map = bpf_map__fd(skel->maps.slots);
	run(skel);
	kvmdirtytop_bpf__destroy(skel);
	return 0;
}
