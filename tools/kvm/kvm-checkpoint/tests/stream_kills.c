// SPDX-License-Identifier: GPL-2.0-only
/*
 * Standbys, primaries and writers of directories that are killed at any moment.
 */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "image.h"
#include "sim.h"
#include "store.h"
#include "stream_tests.h"

static bool lock_directory(int fd)
{
	return kc_lock(fd, kc_try_flock);
}

static bool lock_image(int fd)
{
	return !kc_image_lock(fd, "image", NULL);
}

static void killed_lock(bool (*lock)(int fd))
{
	int fd, other;
	pid_t child;

	write_text(path_of("lock"), 0600, "");
	fd = open(path_of("lock"), O_RDWR);
	other = open(path_of("lock"), O_RDWR);
	CHECK(fd >= 0 && other >= 0 && lock(fd), "cannot lock");
	CHECK(!lock(other), "somebody else has the lock as well");
	child = fork();
	if (!child) {
		poll(NULL, 0, 200);
		_exit(0);
	}
	close(fd);
	CHECK(lock(other), "the lock of one that is gone is not to be had");
	CHECK(waitpid(child, NULL, 0) == child, "waitpid");
	close(other);
}

/* What it has forked just before it was killed has its locks a little longer. */
void test_killed_lock(void)
{
	killed_lock(lock_directory);
	killed_lock(lock_image);
}

void test_kill_standby(void)
{
	volatile uint64_t *n = shared_numbers();
	unsigned int round, complete = 0;
	uint64_t nr, last = 0;
	pid_t primary;
	struct sim g;

	sim_init(&g);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	primary = start_primary(spec(), 0, n, true);
	for (round = 0; round < 60; round++) {
		let_run(round, n, 60);
		stop_standby(SIGKILL);
		/* The primary may have read an acknowledgement just now, and not yet said so. */
		nr = ram_epoch(path_of("ram"));
		CHECK(nr >= n[0],
		      "round %u: epoch %" PRIu64 " was acknowledged, but the last is %" PRIu64,
		      round, n[0], nr);
		CHECK(nr >= last, "round %u: epoch %" PRIu64 " after %" PRIu64, round, nr, last);
		if (nr) {
			sim_goto(&g, nr);
			compare_standby(&g, path_of("ram"));
		}
		complete += nr > last;
		last = nr;
		start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	}
	CHECK(waitpid(primary, NULL, WNOHANG) == 0, "the primary gave up");
	kill(primary, SIGKILL);
	reap(&primary);
	CHECK(complete >= round / 2, "only %u of %u rounds had a new epoch", complete, round);
	printf("# %u kills, %u with new epochs, %" PRIu64 " epochs, %" PRIu64 " connections\n", round,
	       complete, last, n[1]);
	sim_free(&g);
}

void test_kill_primary(void)
{
	volatile uint64_t *n = shared_numbers();
	unsigned int round;
	pid_t primary;
	uint64_t nr;
	struct sim g;

	sim_init(&g);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	for (round = 0; round < 40; round++) {
		primary = start_primary(spec(), n[2], n, true);
		let_run(round, n, 80);
		kill(primary, SIGKILL);
		CHECK(reap(&primary) == -SIGKILL, "the primary ended by itself");
		if (round % 4)
			continue;
		/* Let the standby finish what is on its way, then look at what it has. */
		stop_standby(SIGTERM);
		nr = ram_epoch(path_of("ram"));
		CHECK(nr >= n[0], "epoch %" PRIu64 " was acknowledged, but the last is %" PRIu64,
		      n[0], nr);
		if (nr) {
			sim_goto(&g, nr);
			compare_standby(&g, path_of("ram"));
		}
		start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	}
	CHECK(n[0] >= round / 2, "only %" PRIu64 " epochs in %u rounds", n[0], round);
	printf("# %u kills, %" PRIu64 " epochs acknowledged\n", round, n[0]);
	sim_free(&g);
}

void test_kill_directory(void)
{
	volatile uint64_t *n = shared_numbers();
	unsigned int round, merged = 0;
	struct kc_store st;
	pid_t primary;
	struct sim g;
	size_t i;

	sim_init(&g);
	opts.keep = 5;
	/* A busy machine may kill it before it has merged anything, again and again. */
	for (round = 0; round < 24 || (merged <= 5 && round < 500); round++) {
		primary = start_primary(path_of("store"), n[2], n, false);
		let_run(round, n, 100);
		kill(primary, SIGKILL);
		CHECK(reap(&primary) == -SIGKILL, "the primary ended by itself");
		if (!n[0])
			continue;
		OK(kc_store_read(path_of("store"), &st, &err));
		CHECK(st.nr_files && st.files[st.nr_files - 1].nr >= n[0],
		      "epoch %" PRIu64 " was acknowledged, but is not there", n[0]);
		merged += st.files[0].nr > 1;
		restore_and_compare(path_of("store"), st.files[st.nr_files - 1].nr, &g);
		/* And any that is still there since the last full one. */
		for (i = st.nr_files - 1; i && st.files[i].flags != KC_EPOCH_FULL; i--)
			;
		i += below(st.nr_files - i);
		restore_and_compare(path_of("store"), st.files[i].nr, &g);
		kc_store_free(&st);
	}
	CHECK(!run("verify", path_of("store"), NULL), "verify finds something");
	CHECK(merged > 5, "only %u rounds had merged epochs", merged);
	printf("# %u kills, %u with merged epochs, %" PRIu64 " epochs\n", round, merged, n[0]);
	sim_free(&g);
}

void test_kill_directory_disk(void)
{
	guest.nr_disks = 1;
	test_kill_directory();
}
