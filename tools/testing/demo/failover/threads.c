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
#define MAX_THREADS	256

const char * const who_names[NR_WHO] = {
	[BY_MAIN] = "QEMU's main thread", [BY_VCPUS] = "vCPUs' threads",
	[BY_QEMU] = "QEMU's others", [BY_PROTECT] = "protect",
	[BY_STANDBY] = "standby and its QEMU", [BY_REST] = "the kernel's and others",
};

static struct {
	int tid;
	enum who who;
} threads[MAX_THREADS];
static unsigned int nr_threads;

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
	nr_threads = 0;
	return put("tracing_on", "0") && put("trace", "") && put("trace_clock", "mono") &&
	       put("buffer_size_kb", "8192") && put("events/sched/sched_switch/enable", "1") &&
	       put("tracing_on", "1");
}

static void know(int tid, enum who who)
{
	unsigned int i;

	for (i = 0; i < nr_threads && threads[i].tid != tid; i++)
		;
	if (i == MAX_THREADS)
		return;
	/* What is known of it already is more */
	if (i == nr_threads)
		threads[nr_threads++].tid = tid;
	else if (who == BY_QEMU)
		return;
	threads[i].who = who;
}

static void know_all(pid_t pid, enum who who)
{
	struct dirent *d;
	char path[64];
	DIR *dp;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dp = opendir(path);
	while (dp && (d = readdir(dp))) {
		if (*d->d_name != '.')
			know(atoi(d->d_name), who);
	}
	if (dp)
		closedir(dp);
}

static void know_children(pid_t parent, enum who who)
{
	char path[64];
	int pid;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/children", parent, parent);
	f = fopen(path, "r");
	while (f && fscanf(f, "%d", &pid) == 1)
		know_all(pid, who);
	if (f)
		fclose(f);
}

void trace_know(struct vm *vm, pid_t protect, pid_t standby)
{
	const char *p;

	know(vm->pid, BY_MAIN);
	if (qmp(vm, "query-cpus-fast")) {
		for (p = vm->buf; (p = strstr(p, "\"thread-id\": ")); p++)
			know(atoi(p + strlen("\"thread-id\": ")), BY_VCPUS);
	}
	know_all(vm->pid, BY_QEMU);
	if (protect)
		know_all(protect, BY_PROTECT);
	know_all(standby, BY_STANDBY);
	know_children(standby, BY_STANDBY);
}

static enum who who_is(int tid)
{
	unsigned int i;

	for (i = 0; i < nr_threads; i++) {
		if (threads[i].tid == tid)
			return threads[i].who;
	}
	return BY_REST;
}

/* How much of a time was in epochs, from the last one on that was not over */
static uint64_t in_epochs(uint64_t from, uint64_t to, uint64_t *epoch, uint64_t last, bool pauses)
{
	uint64_t sum = 0, begin, end;
	const struct epoch *e;

	for (; *epoch <= last; ++*epoch) {
		e = &log_.epochs[*epoch % MAX_EPOCHS];
		begin = e->taken_us;
		end = pauses || *epoch == last ? begin + e->us[PAUSE] :
		      log_.epochs[(*epoch + 1) % MAX_EPOCHS].taken_us;
		if (begin >= to)
			break;
		if (end > from)
			sum += (end < to ? end : to) - (begin > from ? begin : from);
		if (end > to)
			break;
	}
	return sum;
}

void trace_end(uint64_t from, uint64_t to, bool pauses, uint64_t us[NR_WHO])
{
	uint64_t since[MAX_CPUS] = { 0 }, epoch[MAX_CPUS], sec, usec, now;
	char line[512], *p;
	unsigned int cpu, i;
	uint64_t here;
	int prev;
	FILE *f;

	put("tracing_on", "0");
	put("events/sched/sched_switch/enable", "0");
	memset(us, 0, NR_WHO * sizeof(*us));
	for (i = 0; i < MAX_CPUS; i++)
		epoch[i] = from;
	f = fopen(TRACING "trace", "r");
	while (f && fgets(line, sizeof(line), f)) {
		/* "comm-pid [cpu] flags seconds: sched_switch: ... prev_pid=N ..." */
		p = strstr(line, " sched_switch: ");
		if (!p)
			continue;
		*p = '\0';
		if (!strstr(p + 1, "prev_pid=") ||
		    sscanf(strstr(p + 1, "prev_pid="), "prev_pid=%d", &prev) != 1)
			continue;
		p = strrchr(line, '[');
		if (!p || sscanf(p, "[%u] %*s %lu.%lu:", &cpu, &sec, &usec) != 3 || cpu >= MAX_CPUS)
			continue;
		now = sec * 1000000 + usec;
		here = in_epochs(since[cpu], now, &epoch[cpu], to, pauses);
		if (since[cpu] && prev)
			us[who_is(prev)] += here;
		since[cpu] = now;
	}
	if (f)
		fclose(f);
	put("trace", "");
}
