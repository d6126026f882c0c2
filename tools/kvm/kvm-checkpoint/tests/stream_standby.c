// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a standby decides by itself: whether silence means that the primary is dead, and what it
 * says to primaries when it has taken over.
 */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>

#include "ram.h"
#include "sim.h"
#include "status.h"
#include "stream_tests.h"

/* A fence that leaves a file behind. */
static const char *fence_command(void)
{
	static char command[PATH_MAX];
	char text[PATH_MAX + 50];

	snprintf(text, sizeof(text), "#!/bin/sh\n>%s/fenced\n", dir);
	snprintf(command, sizeof(command), "%s", script("fence", text));
	return command;
}

static void must_wait(unsigned int ms)
{
	poll(NULL, 0, ms);
	CHECK(!waitpid(standby, NULL, WNOHANG), "the standby ended");
	CHECK(!exists(path_of("fenced")) && !log_has("failing over"),
	      "the host of a guest that may live is fenced");
}

/* --- A standby that was restarted ----------------------------------------- */

/* The stored epoch is so much older (or younger). */
static void age_epoch(const char *ram, int64_t ms)
{
	char path[PATH_MAX];
	uint64_t time, xxh;
	uint8_t *buf;
	size_t len;
	int fd;

	snprintf(path, sizeof(path), "%s/meta", ram);
	read_all(path, &buf, &len);
	memcpy(&time, buf + 32, sizeof(time));
	CHECK(kc_wall_ms() - time < 2 * 3600000, "the epoch is %" PRIu64 " ms old",
	      kc_wall_ms() - time);
	time -= ms;
	memcpy(buf + 32, &time, sizeof(time));
	xxh = XXH3_64bits(buf, len - sizeof(xxh));
	memcpy(buf + len - sizeof(xxh), &xxh, sizeof(xxh));
	fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
	CHECK(fd >= 0 && write(fd, buf, len) == (ssize_t)len, "cannot write %s", path);
	close(fd);
	free(buf);
}

/* Two epochs are stored, and the standby that did it is gone. */
static void store_epochs(struct sim *g)
{
	struct kc_sink *s;

	remove_tree(path_of("ram"));
	unlink(path_of("fenced"));
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	s = protected_guest(g);
	stop_standby(SIGTERM);
	kc_sink_close(s);
}

void test_restarted(void)
{
	struct kc_sink *s;
	struct sim g;

	/* The primary was never heard since: nobody knows what has become of it. */
	store_epochs(&g);
	start_standby(path_of("ram"), "--fence", fence_command(), "--timeout", "300ms");
	CHECK(log_has("is not failed over to before a primary was heard"), "it does not say so");
	must_wait(1500);
	/* One that is heard may be missed, also before it has brought anything new. */
	s = must_open(spec());
	kc_sink_close(s);
	CHECK(reap(&standby) == 0 && log_has("taken over at epoch 2"), "did not fail over");
	CHECK(exists(path_of("fenced")), "did not fence");
	compare_standby(&g, path_of("ram"));
	sim_free(&g);

	/* It may be told to. */
	store_epochs(&g);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "300ms");
	must_wait(700);
	CHECK(!run("status", path_of("ctl"), "promote", NULL), "promote failed");
	CHECK(reap(&standby) == 0 && log_has("taken over at epoch 2"), "did not fail over");
	sim_free(&g);
}

void test_restarted_age(void)
{
	const char *age = "--failover-after-restart";
	struct sim g;

	store_epochs(&g);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "300ms", age, "60m");
	CHECK(reap(&standby) == 0 && log_has("taken over at epoch 2"), "did not fail over");
	CHECK(log_has("\nstopped\n"), "forgot that the guest was stopped");
	sim_free(&g);

	store_epochs(&g);
	age_epoch(path_of("ram"), 70 * 60000);
	start_standby(path_of("ram"), "--fence", fence_command(), "--timeout", "300ms", age, "60m");
	must_wait(1500);
	stop_standby(SIGTERM);
	/* A clock that was set back says nothing about the age. */
	age_epoch(path_of("ram"), -(70 + 60) * 60000);
	start_standby(path_of("ram"), "--fence", fence_command(), "--timeout", "300ms", age, "60m");
	must_wait(1500);
	CHECK(log_has("clock was set back"), "it does not say why");
	stop_standby(SIGTERM);
	sim_free(&g);
}
