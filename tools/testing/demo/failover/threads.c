// SPDX-License-Identifier: GPL-2.0-only
/*
 * Who had a CPU while the guest stood still: from the kernel's trace of its scheduler, whose
 * clock is the one of the epochs' times.  Where that clock counts instructions, so does this.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <stdlib.h>

#include "failover.h"

#define TRACING		"/sys/kernel/tracing/"
#define MAX_CPUS	64
#define MAX_TIDS	65536

const char * const who_names[NR_WHO] = {
	[BY_MAIN] = "QEMU's main thread", [BY_VCPUS] = "vCPUs' threads",
	[BY_QEMU] = "QEMU's others", [BY_PROTECT] = "protect",
	[BY_STANDBY] = "standby and its QEMU", [BY_REST] = "the kernel's and others",
};

/* By number, 0: nobody's; else enum who + 1 */
static uint8_t threads[MAX_TIDS];

static bool put(const char *name, const char *value)
{
	char path[128];
	FILE *f;
	bool ok;

	snprintf(path, sizeof(path), TRACING "%s", name);
	f = fopen(path, "w");
	ok = f && fputs(value, f) >= 0;
	return f && !fclose(f) && ok;
}

bool trace_begin(void)
{
	memset(threads, 0, sizeof(threads));
	return put("tracing_on", "0") && put("trace", "") && put("trace_clock", "mono") &&
	       put("buffer_size_kb", "32768") && put("events/sched/sched_switch/enable", "1") &&
	       put("events/sched/sched_process_fork/enable", "1") && put("tracing_on", "1");
}

void trace_know(int tid, enum who who)
{
	if (tid > 0 && tid < MAX_TIDS)
		threads[tid] = who + 1;
}

void trace_know_qemu(struct vm *vm)
{
	struct dirent *d;
	char path[64];
	const char *p;
	DIR *dp;

	snprintf(path, sizeof(path), "/proc/%d/task", vm->pid);
	dp = opendir(path);
	while (dp && (d = readdir(dp)))
		trace_know(atoi(d->d_name), BY_QEMU);
	if (dp)
		closedir(dp);
	trace_know(vm->pid, BY_MAIN);
	if (!qmp(vm, "query-cpus-fast"))
		return;
	for (p = vm->buf; (p = strstr(p, "\"thread-id\": "));) {
		p += strlen("\"thread-id\": ");
		trace_know(atoi(p), BY_VCPUS);
	}
}

/* The CPU was idle */
#define NOBODY_HAD	NR_WHO

static enum who who_is(int tid)
{
	if (!tid)
		return NOBODY_HAD;
	return tid > 0 && tid < MAX_TIDS && threads[tid] ? threads[tid] - 1 : BY_REST;
}

/* Whoever is started later is of whom it was started by */
static void know_child(int parent, int child)
{
	enum who who = who_is(parent);

	if (who != BY_REST)
		trace_know(child, who == BY_PROTECT || who == BY_STANDBY ? who : BY_QEMU);
}

/* Of those that nobody knows, and of nobody at all, for the record */
static struct {
	char name[32];
	uint64_t us;
} others[64];

static void add_other(const char *name, size_t len, uint64_t us)
{
	unsigned int i;

	if (len >= sizeof(others[0].name))
		len = sizeof(others[0].name) - 1;
	for (i = 0; i < ARRAY_SIZE(others) && others[i].us; i++) {
		if (strlen(others[i].name) == len && !memcmp(others[i].name, name, len))
			break;
	}
	if (i == ARRAY_SIZE(others) || !us)
		return;
	memcpy(others[i].name, name, len);
	others[i].us += us;
}

static void show_others(unsigned int epochs)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(others) && others[i].us; i++) {
		if (others[i].us / epochs > 100)
			printf("        %s: %lu of each epoch\n", others[i].name,
			       others[i].us / epochs);
	}
}

/* Adds what of a time was in epochs to them, from the last one on that was not over; how much that was */
static uint64_t add(uint64_t from, uint64_t to, enum who who, struct traced *t, uint64_t *epoch)
{
	uint64_t begin, end, sum = 0, part;
	const struct epoch *e;

	for (; *epoch <= t->to; ++*epoch) {
		e = &log_.epochs[*epoch % MAX_EPOCHS];
		begin = e->taken_us;
		end = t->pauses || *epoch == t->to ? begin + e->us[PAUSE] :
		      log_.epochs[(*epoch + 1) % MAX_EPOCHS].taken_us;
		if (begin >= to)
			break;
		if (end > from) {
			part = (end < to ? end : to) - (begin > from ? begin : from);
			sum += part;
			if (who != NOBODY_HAD)
				t->us[*epoch - t->from][who] += part;
		}
		if (end > to)
			break;
	}
	return sum;
}

/* "NAME=NUMBER" */
static bool field(const char *line, const char *name, int *value)
{
	const char *p = strstr(line, name);

	return p && sscanf(p + strlen(name), "=%d", value) == 1;
}

bool trace_end(struct traced *t)
{
	uint64_t since[MAX_CPUS] = { 0 }, epoch[MAX_CPUS], sec, usec, now, part;
	uint64_t kept = 0, written = 1;
	char line[512], *p, *name;
	unsigned int cpu, i;
	enum who who;
	int prev, child;
	FILE *f;

	put("tracing_on", "0");
	put("events/sched/sched_switch/enable", "0");
	put("events/sched/sched_process_fork/enable", "0");
	memset(others, 0, sizeof(others));
	memset(t->us, 0, (t->to - t->from + 1) * sizeof(*t->us));
	for (i = 0; i < MAX_CPUS; i++)
		epoch[i] = t->from;
	f = fopen(TRACING "trace", "r");
	while (f && fgets(line, sizeof(line), f)) {
		/* "comm-pid [cpu] flags seconds: sched_switch: ... prev_pid=N ..." */
		p = strstr(line, "entries-written: ");
		if (p && *line == '#')
			sscanf(p, "entries-written: %lu/%lu", &kept, &written);
		p = strstr(line, ": sched_process_fork: ");
		if (p && field(p, " pid", &prev) && field(p, " child_pid", &child))
			know_child(prev, child);
		p = strstr(line, ": sched_switch: ");
		if (!p || !field(p, " prev_pid", &prev))
			continue;
		*p = '\0';
		/* The name of who had it until now */
		name = p + strlen(": sched_switch: prev_comm=");
		p = strrchr(line, '[');
		if (!p || sscanf(p, "[%u] %*s %lu.%lu", &cpu, &sec, &usec) != 3 || cpu >= MAX_CPUS)
			continue;
		now = sec * 1000000 + usec;
		who = who_is(prev);
		part = since[cpu] ? add(since[cpu], now, who, t, &epoch[cpu]) : 0;
		if (part && (who == BY_REST || who == NOBODY_HAD))
			add_other(name, strstr(name, " prev_pid=") - name, part);
		since[cpu] = now;
	}
	if (f)
		fclose(f);
	put("trace", "");
	if (!t->pauses)
		show_others(t->to - t->from + 1);
	return kept == written;
}
