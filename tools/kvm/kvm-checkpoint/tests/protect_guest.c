// SPDX-License-Identifier: GPL-2.0-only
/*
 * What is done to the guest: it must not stand still for us, and its memory is nobody's business.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "protecting.h"
#include "protect_tests.h"

/* --- It does not stand still ---------------------------------------------- */

/* In the middle of an epoch */
static const char *freezes(struct qemu *q, const char *command)
{
	if (!strcmp(command, COLLECT) && q->collects == 4)
		kill(q->client, SIGSTOP);
	return NULL;
}

void test_frozen(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	unsigned int last;

	qemu.hook = freezes;
	start_qemu(&qemu);
	start_protect(CHECKED, path_of("store"), "--epochs", "8", "--interval", "1ms",
		      "--pause-limit", "300ms", NULL);
	while (!qemu.spoilt_by) {
		CHECK(kc_now_us() < end, "the guest stands still");
		step(&qemu, 1);
	}
	CHECK(qemu.running && qemu.stops == 4, "the guest stands still, or was never stopped");
	kill(qemu.client, SIGCONT);
	CHECK(serve() == 0, "protect fails");
	CHECK(times_in(path_of("log"), "took longer than the 300 ms of --pause-limit") == 1,
	      "it does not say what happened");
	CHECK(check_store(&last) == 9 && last == 9, "epochs are missing");
}

/* Somebody has begun to dump the guest, until some epochs later. */
static const char *dumps(struct qemu *q, const char *command)
{
	if (!strcmp(command, CONT))
		q->waits_for = q->conts >= 4 && q->conts < 7 ? "There is a dump in process" : NULL;
	return NULL;
}

void test_waits(void)
{
	unsigned int last;

	qemu.hook = dumps;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "9");
	CHECK(times_in_log("has to wait until it can run: There is a dump in process") == 1,
	      "it does not say once what the guest waits for");
	CHECK(times_in_log("the guest runs again") == 1, "it does not say once that it is over");
	CHECK(check_store(&last) == 10 && last == 9, "epochs are missing");
	CHECK(!qemu.snaps[5].stopped, "the guest would stand still where it is restored");
}

/* --- Cores ---------------------------------------------------------------- */

/* How many mappings of a file with this name a process has; all of them are left out of cores */
static unsigned int check_maps(pid_t pid, const char *name)
{
	char path[64], line[1000];
	unsigned int n = 0;
	bool ours = false;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/smaps", pid);
	f = fopen(path, "r");
	CHECK(f, "cannot read %s", path);
	while (fgets(line, sizeof(line), f)) {
		if (strchr(line, '-') && strchr(line, '-') < strchr(line, ' ')) {
			ours = strstr(line, name);
			n += ours;
		} else if (ours && !strncmp(line, "VmFlags:", 8)) {
			CHECK(strstr(line, " dd"), "a core of process %d has %s in it", pid, name);
		}
	}
	fclose(f);
	return n;
}

static unsigned long core_filter(const char *pid)
{
	char path[64];
	unsigned long v = ~0ul;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%s/coredump_filter", pid);
	f = fopen(path, "r");
	CHECK(f && fscanf(f, "%lx", &v) == 1, "cannot read %s", path);
	fclose(f);
	return v;
}

static void check_core(pid_t pid, const char *file)
{
	char text[32];

	CHECK(check_maps(pid, file), "process %d does not map %s", pid, file);
	snprintf(text, sizeof(text), "%d", pid);
	CHECK(!core_filter(text), "a core of process %d has memory in it", pid);
}

void test_core(void)
{
	char text[3 * PATH_MAX];
	unsigned long theirs;
	FILE *f;

	start_qemu(&qemu);
	snprintf(text, sizeof(text), "#!/bin/sh\ncat /proc/self/coredump_filter >%s/filter\n", dir);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure", "--bare-exec",
		      "--exec", script("qemu", text));
	start_protect(CHECKED, spec(), "--interval", "1ms", NULL);
	serve_until_log("protected since epoch 1");
	check_core(qemu.client, "memfd:pc.ram");
	check_core(standby, "/ram/ram0");
	/* But QEMU's cores are its owner's. */
	die(&qemu);
	CHECK(serve() == 1, "protect does not notice");
	CHECK(reap(&standby) == 0, "the standby does not take over");
	f = fopen(path_of("filter"), "r");
	CHECK(f && fscanf(f, "%lx", &theirs) == 1 && theirs == core_filter("self"),
	      "QEMU makes other cores than it would have made");
	fclose(f);
}
