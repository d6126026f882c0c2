// SPDX-License-Identifier: GPL-2.0-only
/*
 * Many guests on one host, each with its protect and its standby: what the daemons cost when there
 * is little to do.  PAIRS is how many (20).
 */
#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "protecting.h"
#include "protect_tests.h"

#define MEASURED_S	5

/* Of one pair; the process of the test and that of the pair share it */
struct pair {
	pid_t pid, protect, standby;
	volatile bool lives, stop;
};

/* Of a daemon */
struct cost {
	unsigned int threads;
	uint64_t wakeups, private_kib;
};

static uint64_t number_in(const char *path, const char *name)
{
	char line[256];
	uint64_t n = 0, one;
	FILE *f = fopen(path, "r");
	size_t len = strlen(name);

	CHECK(f, "no %s: %s", path, strerror(errno));
	while (fgets(line, sizeof(line), f)) {
		if (!strncmp(line, name, len) && sscanf(line + len, " %" SCNu64, &one) == 1)
			n += one;
	}
	fclose(f);
	return n;
}

static void look_at(pid_t pid, struct cost *c)
{
	char path[300];
	struct dirent *d;
	DIR *tasks;

	memset(c, 0, sizeof(*c));
	snprintf(path, sizeof(path), "/proc/%d/smaps_rollup", pid);
	c->private_kib = number_in(path, "Private_Clean:") + number_in(path, "Private_Dirty:");
	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	tasks = opendir(path);
	CHECK(tasks, "a daemon is gone");
	while ((d = readdir(tasks))) {
		if (*d->d_name == '.')
			continue;
		snprintf(path, sizeof(path), "/proc/%d/task/%s/status", pid, d->d_name);
		c->threads++;
		c->wakeups += number_in(path, "voluntary_ctxt_switches:");
	}
	closedir(tasks);
}

/* In a process of its own: a QEMU, its protect and its standby, until it is told to stop */
static void be_pair(struct pair *pair, unsigned int nr)
{
	char where[PATH_MAX];

	snprintf(where, sizeof(where), "%s/pair-%u", dir, nr);
	mkdir(where, 0700);
	dir = where;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "20s");
	key_file = psk;
	start_protect(program, spec(), "--interval", "1s", "--control", path_of("protect.ctl"),
		      NULL);
	pair->protect = qemu.client;
	pair->standby = standby;
	while (!pair->stop) {
		step(&qemu, 50);
		pair->lives = qemu.conts > 3;
	}
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "protect fails");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "the last epoch is missing");
}

static void start_pair(struct pair *pair, unsigned int nr)
{
	pair->pid = fork();
	if (pair->pid)
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (!setjmp(out)) {
		be_pair(pair, nr);
		_exit(0);
	}
	fprintf(stderr, "pair %u: %s\n", nr, reason);
	_exit(1);
}

void test_pairs(void)
{
	unsigned int nr = getenv("PAIRS") ? atoi(getenv("PAIRS")) : 20, i, j;
	uint64_t end = kc_now_us() + LIMIT_US, t;
	static const char * const names[] = { "protect", "standby" };
	struct cost before[2][nr], after, sum[2] = { 0 };
	struct pair *pairs;
	double seconds;

	pairs = mmap(NULL, nr * sizeof(*pairs), PROT_READ | PROT_WRITE,
		     MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(nr > 0 && pairs != MAP_FAILED, "no memory");
	for (i = 0; i < nr; i++)
		start_pair(&pairs[i], i);
	for (i = 0; i < nr; i++) {
		while (!pairs[i].lives) {
			CHECK(kc_now_us() < end && !waitpid(pairs[i].pid, NULL, WNOHANG),
			      "pair %u does not come up", i);
			poll(NULL, 0, 20);
		}
	}
	t = kc_now_us();
	for (i = 0; i < nr; i++) {
		look_at(pairs[i].protect, &before[0][i]);
		look_at(pairs[i].standby, &before[1][i]);
	}
	poll(NULL, 0, MEASURED_S * 1000);
	seconds = (kc_now_us() - t) / 1e6;
	for (i = 0; i < nr; i++) {
		for (j = 0; j < 2; j++) {
			look_at(j ? pairs[i].standby : pairs[i].protect, &after);
			sum[j].threads += after.threads;
			sum[j].private_kib += after.private_kib;
			sum[j].wakeups += after.wakeups - before[j][i].wakeups;
		}
	}
	printf("# %u pairs, an epoch a second; of each daemon:\n", nr);
	for (j = 0; j < 2; j++)
		printf("# %s: %.1f threads, %.1f MiB of its own, %.1f wake-ups a second\n",
		       names[j], (double)sum[j].threads / nr, sum[j].private_kib / 1024.0 / nr,
		       sum[j].wakeups / seconds / nr);
	for (i = 0; i < nr; i++)
		pairs[i].stop = true;
	for (i = 0; i < nr; i++)
		CHECK(!reap(&pairs[i].pid), "pair %u fails", i);
	/* Counts, not times: what runs beside this does not change them much. */
	for (j = 0; j < 2; j++) {
		CHECK(sum[j].threads <= 3 * nr, "%s has too many threads", names[j]);
		CHECK(sum[j].private_kib / nr < 16 << 10, "%s needs too much memory", names[j]);
		CHECK(sum[j].wakeups / seconds / nr < 15, "%s wakes up too often",
		      names[j]);
	}
}
