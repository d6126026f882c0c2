// SPDX-License-Identifier: GPL-2.0-only
/*
 * What it costs to find the pages a guest wrote and to re-arm them: the dirty
 * bitmap, the upstream dirty ring and dirty slot rings, in the same VM, with the
 * same pages, phase by phase.
 *
 * The guest writes one word to each page of a list that the host made, so that
 * its own share of the time is the write and nothing else.  All vCPUs run on one
 * thread, one after the other: no wake-up and no waiting is measured.  After each
 * harvest, outside of what is timed, the pages reported must be the pages
 * written, each once, with what was written in them.
 *
 * Under an emulator that counts one nanosecond for an instruction, all times are
 * instruction counts.  See Documentation/virt/kvm/dirty-slot-ring-performance.rst.
 *
 * Two more questions have their own options, as they need other VMs: how long a
 * vCPU is held up by a harvest (--stall), and what memory the log takes
 * (--memory).
 *
 * The mechanisms are in _modes, the guest and the measurements in _run, what is
 * said of them in _report; here are the options.
 */
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dirty_slot_ring_perf.h"

static const char *my_name;

static void show_options(void)
{
	printf("usage: %s [OPTION]...\n", my_name);
	fputs("\n"
"Measures what it costs to find the pages that a guest wrote and to re-arm them,\n"
"and checks that they are exactly the pages it wrote.\n"
"\n"
"  -m, --mode LIST       bitmap, upstream, slot, with commas between, or all,\n"
"                        which leaves out what the kernel lacks (default: all)\n"
"  -s, --size SIZE       of the memslot, 1M to 1000G (default: 64M)\n"
"  -n, --dirty N         pages to write in each iteration (default: 1000)\n"
"  -o, --order ORDER     random or in-order, from the first (default: random)\n"
"  -c, --vcpus N         they share the pages (default: 1, at most 8)\n"
"  -i, --iterations N    after one that warms up (default: 5, at most 100)\n"
"  -r, --ring-size N     entries of each ring (default: upstream 65536, slot KVM's);\n"
"                        an upstream ring that fills is collected there and then\n"
"  -S, --seed N          of the random pages (default: 1)\n"
"  -j, --json[=FILE]     one line of JSON for each mode, appended to FILE or\n"
"                        among the text\n"
"  -w, --stall           how long does a harvest hold up another vCPU?\n"
"  -M, --memory          what memory does the log take?\n"
"  -x, --slots N         --memory: memslots of that size (default: 1, at most 64)\n"
"  -h, --help            this\n"
"\n"
"Times are in ns: of the host's clock, but \"guest\", which is the guest's own for\n"
"its loop of writes.  The columns dirty to cost are medians, per page written:\n"
"  dirty      KVM_RUN: write, fault, log, and the exit at the end\n"
"  guest      write, fault and log\n"
"  harvest    until userspace has the pages; for slot, all of HARVEST\n"
"  reprotect  KVM_CLEAR_DIRTY_LOG, KVM_RESET_DIRTY_RINGS\n"
"  cost       harvest and reprotect, with the flush of TLBs\n"
"and per VM:\n"
"  enable     KVM_SET_USER_MEMORY_REGION, to log\n"
"  empty      cost when nothing was written\n"
"  full       exits for a full ring\n"
"The lines of JSON also have populate, the first touch of the pages, without log.\n"
"\n"
"--stall has one vCPU write the N pages, which are harvested while a second one\n"
"writes pages that it never touched before.  With one CPU, the second one's thread\n"
"is woken up at random moments, and the time is from then until the page is\n"
"written.  With more, it writes without pause, and the time is one write's, by the\n"
"guest's clock.  \"alone\" is the same for as long without a harvest.\n"
"\n"
"--memory compares VMs that log with VMs that do not, by /proc/meminfo; bytes is\n"
"vmalloc and slab together.\n"
"\n"
"Exit status: 0, 1 if a page was lost, invented or reported twice, 2 usage, 4 if\n"
"the kernel lacks a mode that was named, or all of them.\n", stdout);
}

static void __noreturn __printf(1, 2) usage_error(const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "%s: ", my_name);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "; try %s -h\n", my_name);
	exit(2);
}

static uint64_t parse_number(const char *what, const char *s, uint64_t min, uint64_t max)
{
	unsigned long val;
	char *end;

	errno = 0;
	val = strtoul(s, &end, 0);
	if (errno || end == s || *end || *s == '-' || val < min || val > max)
		usage_error("%s is \"%s\", which is not from %lu to %lu", what, s, min, max);
	return val;
}

/* Such as "64M"; the parse_size() of the library aborts on what it dislikes. */
static uint64_t parse_slot_size(const char *s)
{
	static const char units[] = "KMGT";
	const char *unit;
	uint64_t size;
	double val;
	char *end;

	val = strtod(s, &end);
	unit = *end ? strchr(units, *end) : NULL;
	if (unit) {
		val *= 1ul << 10 * (unit - units + 1);
		end++;
	}
	if (end == s || *end || !(val >= 1ul << 20 && val <= 1000ul << 30))
		usage_error("--size is \"%s\", which is not from 1M to 1000G", s);
	size = val;
	if (size % PG)
		usage_error("--size is \"%s\", which is not a number of pages", s);
	return size;
}

static unsigned int parse_modes(const char *arg)
{
	char *list = strdup(arg), *name, *save;
	unsigned int mask = 0;
	int i;

	for (name = strtok_r(list, ",", &save); name; name = strtok_r(NULL, ",", &save)) {
		for (i = 0; i < NR_MODES; i++) {
			if (!strcmp(name, modes[i].name))
				break;
		}
		if (i == NR_MODES)
			usage_error("there is no mode \"%s\"", name);
		mask |= 1u << i;
	}
	free(list);
	if (!mask)
		usage_error("--mode names no mode");
	return mask;
}

static enum order parse_order(const char *arg)
{
	int i;

	for (i = 0; i < NR_ORDERS; i++) {
		if (!strcmp(arg, order_names[i]))
			return i;
	}
	usage_error("--order is \"%s\", which is not random or in-order", arg);
}

int main(int argc, char *argv[])
{
	static const struct option options[] = {
		{ "mode", required_argument, NULL, 'm' },
		{ "size", required_argument, NULL, 's' },
		{ "dirty", required_argument, NULL, 'n' },
		{ "order", required_argument, NULL, 'o' },
		{ "vcpus", required_argument, NULL, 'c' },
		{ "iterations", required_argument, NULL, 'i' },
		{ "ring-size", required_argument, NULL, 'r' },
		{ "seed", required_argument, NULL, 'S' },
		{ "json", optional_argument, NULL, 'j' },
		{ "stall", no_argument, NULL, 'w' },
		{ "memory", no_argument, NULL, 'M' },
		{ "slots", required_argument, NULL, 'x' },
		{ "help", no_argument, NULL, 'h' },
		{ }
	};
	struct params p = {
		.size = 64ul << 20,
		.nr_dirty = 1000,
		.nr_vcpus = 1,
		.nr_slots = 1,
		.iterations = 5,
		.seed = 1,
	};
	const struct question *q = &questions[ASK_COST];
	unsigned int want = 0, done = 0;
	static struct run r;
	FILE *json = NULL;
	int opt, i;

	my_name = argv[0];
	while ((opt = getopt_long(argc, argv, "m:s:n:o:c:i:r:S:j::wMx:h", options, NULL)) != -1) {
		switch (opt) {
		case 'm':
			want = strcmp(optarg, "all") ? parse_modes(optarg) : 0;
			break;
		case 's':
			p.size = parse_slot_size(optarg);
			break;
		case 'n':
			p.nr_dirty = parse_number("--dirty", optarg, 1, 1u << 28);
			break;
		case 'o':
			p.order = parse_order(optarg);
			break;
		case 'c':
			p.nr_vcpus = parse_number("--vcpus", optarg, 1, MAX_VCPUS);
			break;
		case 'i':
			p.iterations = parse_number("--iterations", optarg, 1, MAX_ITERATIONS);
			break;
		case 'r':
			p.entries = parse_number("--ring-size", optarg, 1, DSR_MAX_ENTRIES);
			if (p.entries & (p.entries - 1))
				usage_error("--ring-size is %u, no power of two", p.entries);
			break;
		case 'S':
			p.seed = parse_number("--seed", optarg, 0, UINT64_MAX);
			break;
		case 'j':
			json = optarg ? fopen(optarg, "a") : stdout;
			if (!json)
				usage_error("cannot open %s: %s", optarg, strerror(errno));
			break;
		case 'w':
			q = &questions[ASK_STALL];
			break;
		case 'M':
			q = &questions[ASK_MEMORY];
			break;
		case 'x':
			p.nr_slots = parse_number("--slots", optarg, 1, MAX_SLOTS);
			break;
		case 'h':
			show_options();
			return 0;
		default:
			fprintf(stderr, "try %s -h\n", my_name);
			return 2;
		}
	}
	if (optind < argc)
		usage_error("what is \"%s\"?", argv[optind]);
	if (p.nr_dirty > p.size / PG)
		usage_error("--dirty is %u, but the slot has %lu pages", p.nr_dirty, p.size / PG);
	if (q == &questions[ASK_STALL]) {
		p.nr_vcpus = 2;
		p.nr_probes = min(p.size / PG - p.nr_dirty, (uint64_t)MAX_PROBES);
	}

	printf("%s: %lu MiB, %u pages %s, %d vCPUs, %d iterations, seed %lu\n", q->name,
	       p.size >> 20, p.nr_dirty, order_names[p.order], p.nr_vcpus, p.iterations, p.seed);
	puts(q->heading);

	for (i = 0; i < NR_MODES; i++) {
		if (want && !(want & 1u << i))
			continue;
		if (!modes[i].supported()) {
			printf("%-8s skipped: not in this kernel\n", modes[i].name);
			continue;
		}
		memset(&r, 0, sizeof(r));
		r.p = &p;
		r.mode = &modes[i];
		q->measure(&r);
		q->report(&r);
		fflush(stdout);
		if (json)
			report_json(json, q, &r);
		free(r.stall);
		done |= 1u << i;
	}
	if (json && json != stdout && fclose(json))
		fail("writing the JSON lines: %s", strerror(errno));
	return !done || want & ~done ? KSFT_SKIP : 0;
}
