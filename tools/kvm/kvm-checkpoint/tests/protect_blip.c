// SPDX-License-Identifier: GPL-2.0-only
/*
 * The link is lost for a moment: what the standby lacks is known, and nothing is compared.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "protecting.h"
#include "protect_tests.h"

/* Be QEMU until protect has said this so often; it writes to the log of the first standby. */
static void serve_until_times(const char *text, unsigned int n)
{
	uint64_t end = kc_now_us() + LIMIT_US;

	while (times_in(path_of("protect.log"), text) < n) {
		CHECK(kc_now_us() < end && !waitpid(qemu.client, NULL, WNOHANG),
		      "\"%s\" was said %u times", text, times_in(path_of("protect.log"), text));
		step(&qemu, 1);
	}
}

static void begin(void)
{
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	serve_until_log("protected since epoch 1");
	CHECK(!link(path_of("log"), path_of("protect.log")), "cannot link the log");
}

static void finish(void)
{
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "it does not end as it was told to");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "the last epoch is missing");
}

void test_blip(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	unsigned int i;

	begin();
	qemu.hook = kills_standby_later;
	for (i = 1; i <= 12; i++) {
		kill_in = 1 + below(7);
		while (kill_in) {
			CHECK(kc_now_us() < end, "there are no more epochs");
			step(&qemu, 1);
		}
		/* More than what is left for a pause. */
		guest_writes(&qemu, i % 3 == 1 ? 6000 : 20);
		start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
		serve_until_times("pages were sent again", i);
	}
	CHECK(!times_in(path_of("protect.log"), "resync:") &&
	      !times_in(path_of("protect.log"), "pages differed"), "memory was compared");
	finish();
}

/* One that comes back with an older epoch than it has acknowledged. */
void test_blip_set_back(void)
{
	char *old = strdup(path_of("old")), *ram = strdup(path_of("ram"));
	unsigned int conts;
	char command[3 * PATH_MAX];

	begin();
	stop_standby(SIGKILL);
	snprintf(command, sizeof(command), "cp -a %s %s", ram, old);
	CHECK(!system(command), "cannot copy");
	start_standby(ram, "--no-fence", "--timeout", "0", "--insecure");
	serve_until_times("pages were sent again", 1);
	conts = qemu.conts;
	while (qemu.conts < conts + 10)
		step(&qemu, 1);
	stop_standby(SIGKILL);
	remove_tree(ram);
	CHECK(!rename(old, ram), "cannot rename");
	start_standby(ram, "--no-fence", "--timeout", "0", "--insecure");
	serve_until_times("pages differed", 1);
	finish();
	free(old);
	free(ram);
}

/* Somebody else has sent epochs meanwhile. */
void test_blip_other_sender(void)
{
	int first;

	/* More than is asked for at a time. */
	qemu.blocks[0].npages = 9000;
	begin();
	kill(qemu.client, SIGKILL);
	waitpid(qemu.client, &first, 0);
	while (qemu.attached || qemu.monitor >= 0)
		step(&qemu, 1);
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	serve_until_times("pages differed", 1);
	finish();
}
