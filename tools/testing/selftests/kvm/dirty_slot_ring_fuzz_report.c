// SPDX-License-Identifier: GPL-2.0-only
/*
 * The fuzzer of dirty slot rings: what it says when a check fails, and when nothing
 * happens any more.
 */
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "dirty_slot_ring_fuzz.h"

static void print_notes(void)
{
	unsigned int i, n = sh->nr_notes;
	struct op_note *t;

	fprintf(stderr, "# the last steps (by whom 0-3; four arguments; result):\n");
	for (i = n < NR_NOTES ? 0 : n - NR_NOTES; i < n; i++) {
		t = &sh->notes[i % NR_NOTES];
		fprintf(stderr, "#   op %lu by %d: %s %#lx %#lx %#lx %#lx = %d%s%s\n", t->op,
			t->ex, t->what ?: "?", t->a, t->b, t->c, t->d, t->ret,
			t->ret < 0 ? " " : "", t->ret < 0 ? strerror(t->err) : "");
	}
	for (i = 0; in_storm && i < sh->storm.nr_actors; i++)
		fprintf(stderr, "#   actor of kind %d in peer %d: %u of %u done\n",
			sh->storm.actor[i].kind, sh->storm.actor[i].peer,
			sh->storm.actor[i].done, sh->storm.actor[i].n);
}

static void print_replay(void)
{
	print_guests();
	fprintf(stderr, "# seed %lu, round %lu, op %lu (%s)\n", opt.seed, round_nr, step_nr,
		in_storm ? "storm: it may take several tries to see it again" : "step");
	fprintf(stderr, "# again: dirty_slot_ring_fuzz -s %lu -r %lu -n %lu\n", opt.seed, round_nr,
		nr_ops + 200000);
}

/* What a failed CHECK() adds; the main process speaks for all. */
void report_failure(const char *what)
{
	if (getpid() != sh->main_pid) {
		kill(sh->main_pid, SIGTERM);
		return;
	}
	print_notes();
	print_replay();
	printf("not ok - %s\n", what);
	fflush(stdout);
}

void on_term(int sig)
{
	print_notes();
	print_replay();
	printf("not ok - another process failed\n");
	fflush(stdout);
	_exit(KSFT_FAIL);
}

struct op_note *note(const char *what, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
	struct op_note *t = &sh->notes[sh->nr_notes++ % NR_NOTES];

	*t = (struct op_note){ .op = step_nr, .what = what, .a = a, .b = b, .c = c, .d = d };
	return t;
}

/* -- hangs ---------------------------------------------------------------- */

bool hang_found;

static void print_file(const char *dir, const char *name, const char *only)
{
	char path[300], line[300];
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	f = fopen(path, "r");
	if (!f) {
		fprintf(stderr, "#     %s: %s\n", name, strerror(errno));
		return;
	}
	while (fgets(line, sizeof(line), f)) {
		line[strcspn(line, "\n")] = 0;
		if (!only || strstr(line, only))
			fprintf(stderr, "#     %s: %s\n", name, line);
	}
	fclose(f);
}

/* Calls @show for each entry of a directory of /proc that is a number. */
static void each_number(const char *dir, void (*show)(const char *path, int n))
{
	struct dirent *d;
	char path[300];
	DIR *all = opendir(dir);

	while (all && (d = readdir(all))) {
		if (d->d_name[0] < '1' || d->d_name[0] > '9')
			continue;
		snprintf(path, sizeof(path), "%.200s/%.20s", dir, d->d_name);
		show(path, atoi(d->d_name));
	}
	if (all)
		closedir(all);
}

static void print_thread(const char *path, int tid)
{
	fprintf(stderr, "#   thread %d of %s\n", tid, path);
	print_file(path, "comm", NULL);
	print_file(path, "status", "State");
	print_file(path, "status", "ctxt_switches");
	print_file(path, "stat", NULL);		/* 14, 15, 43: user, system, guest */
	print_file(path, "wchan", NULL);
	print_file(path, "stack", NULL);
}

static void print_process(const char *path, int pid)
{
	char task[300];

	if (getpgid(pid) != getpgrp())
		return;
	snprintf(task, sizeof(task), "%.280s/task", path);
	each_number(task, print_thread);
}

/* Counters that are not 0, and by how much they grew. */
void print_stats(unsigned int seconds)
{
	uint64_t before[MAX_VCPUS + 1][256] = { 0 }, now;
	struct kvm_stats_header header;
	struct kvm_stats_desc *all, *desc;
	int fds[MAX_VCPUS + 1], n = m.nr_vcpus + 1, i, k, pass;

	fds[0] = vm_get_stats_fd(m.vm);
	memcpy(fds + 1, m.stats, sizeof(m.stats));
	for (pass = 0; pass < 2; pass++) {
		for (k = 0; k < n; k++) {
			read_stats_header(fds[k], &header);
			all = read_stats_descriptors(fds[k], &header);
			if (pass)
				fprintf(stderr, "#   counters of %s %d, +growth in %u s:",
					k ? "vCPU" : "VM", k ? k - 1 : 0, seconds);
			for (i = 0; i < header.num_desc && i < 256; i++) {
				desc = get_stats_descriptor(all, i, &header);
				if (desc->size != 1)
					continue;
				read_stat_data(fds[k], &header, desc, &now, 1);
				if (!pass)
					before[k][i] = now;
				else if (now)
					fprintf(stderr, " %s %lu+%ld", desc->name, now,
						(long)(now - before[k][i]));
			}
			if (pass)
				fprintf(stderr, "\n");
			free(all);
		}
		if (!pass)
			sleep(seconds);
	}
	close(fds[0]);
}

#define TRACE		"/sys/kernel/tracing/instances/dirty_slot_ring_fuzz"
#define TRACE_LINES	80

static bool set_trace(const char *name, const char *value)
{
	char path[200];
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", TRACE, name);
	f = fopen(path, "w");
	return f && fputs(value, f) >= 0 && !fclose(f);
}

/* What KVM does.  In a buffer of its own, so that nobody else's is disturbed. */
static void print_trace(void)
{
	static char lines[TRACE_LINES][200];
	unsigned int n = 0, i;
	FILE *f;

	fprintf(stderr, "# what KVM does:\n");
	/* If it is there, another one that hangs uses it. */
	if (mkdir(TRACE, 0700)) {
		fprintf(stderr, "#   cannot trace it: %s\n", strerror(errno));
		return;
	}
	if (!set_trace("events/kvm/enable", "1"))
		fprintf(stderr, "#   cannot trace it: %s\n", strerror(errno));
	sleep(1);
	set_trace("tracing_on", "0");
	f = fopen(TRACE "/trace", "r");
	while (f && fgets(lines[n % TRACE_LINES], sizeof(lines[0]), f))
		n++;
	for (i = n < TRACE_LINES ? 0 : n - TRACE_LINES; i < n; i++)
		fprintf(stderr, "#   %.150s\n", strtok(lines[i % TRACE_LINES], "\n") ?: "");
	if (f)
		fclose(f);
	rmdir(TRACE);
}

/* May a signal help?  Then a kick was lost. */
static void poke_vcpus(void)
{
	uint64_t returns[MAX_VCPUS], done[MAX_VCPUS];
	bool runs[MAX_VCPUS];
	int v;

	for (v = 0; v < m.nr_vcpus; v++) {
		runs[v] = READ_ONCE(m.runs[v]);
		returns[v] = READ_ONCE(m.returns[v]);
		done[v] = READ_ONCE(m.mb[v]->done);
		if (runs[v])
			pthread_kill(m.runner[v], SIGUSR1);
	}
	sleep(5);
	for (v = 0; v < m.nr_vcpus; v++) {
		if (!runs[v])
			fprintf(stderr, "#   vCPU %d was not in KVM_RUN\n", v);
		else
			fprintf(stderr,
				"#   vCPU %d, 5 s after a signal: KVM_RUN returned %lu times, is %s, the guest did %lu more\n",
				v, READ_ONCE(m.returns[v]) - returns[v],
				READ_ONCE(m.runs[v]) ? "under way" : "not under way",
				READ_ONCE(m.mb[v]->done) - done[v]);
	}
}

/*
 * What tells apart a guest that faults for ever (its exits grow, its work does
 * not), one that the emulator does not get on with (neither grows, and it has
 * the CPU), a thread that nobody wakes (its stack) and a lost kick (a signal
 * helps).
 */
static void __noreturn report_hang(unsigned int seconds)
{
	fprintf(stderr, "# nothing has happened for %u s\n", seconds);
	print_notes();
	fprintf(stderr, "# all threads:\n");
	each_number("/proc", print_process);
	/* What follows may get stuck itself. */
	print_replay();
	if (m.nr_vcpus)
		print_stats(5);
	print_trace();
	fprintf(stderr, "# all threads, later:\n");
	each_number("/proc", print_process);
	WRITE_ONCE(hang_found, true);
	poke_vcpus();
	printf("not ok - nothing happens any more\n");
	fflush(stdout);
	_exit(KSFT_FAIL);
}

/* A thread, as it shall not matter what the others are stuck in. */
void *watch(void *unused)
{
	unsigned int limit = opt.how == BREAK_HANG ? 20 : HANG_SECONDS, idle = 0;
	uint64_t seen = 0, now;

	for (;;) {
		sleep(2);
		now = __atomic_load_n(&sh->progress, __ATOMIC_RELAXED);
		idle = now == seen ? idle + 2 : 0;
		seen = now;
		if (idle >= limit)
			report_hang(idle);
	}
	return NULL;
}
