// SPDX-License-Identifier: GPL-2.0-only
/*
 * Directories and standbys on disks that are full.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sim.h"
#include "stream_tests.h"

static void fill_directory(const char *store)
{
	struct kc_sink *s;
	uint64_t last;
	struct sim g;
	int rc = 0;

	sim_init(&g);
	s = must_open(store);
	opts.keep = 1000;
	for (last = 0; !rc && last < 5000; last = rc ? last : g.epoch) {
		sim_step(&g);
		rc = sim_send(&g, s, g.epoch == 1 ? KC_EPOCH_FULL : 0);
	}
	CHECK(rc == -ENOSPC || rc == -EFBIG, "%d: %s", rc, err.text);
	CHECK(strstr(err.text, "cannot write to"), "it says \"%s\"", err.text);
	CHECK(kc_sink_last_epoch(s) == last, "the last epoch is wrong");
	CHECK(kc_epoch_begin(s, g.epoch + 1, 0, &err) == -EINVAL, "the broken sink is used on");
	kc_sink_close(s);
	printf("# full after %" PRIu64 " epochs\n", last);
	CHECK(!run("verify", store, NULL), "verify finds something");
	restore_and_compare(store, last, &g);
	sim_free(&g);
}

static void mount_small(void)
{
	if (mkdir(path_of("full"), 0700) || unshare(CLONE_NEWNS) ||
	    mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("none", path_of("full"), "tmpfs", 0, "size=6m"))
		SKIP("cannot mount a small tmpfs: %s", strerror(errno));
}

void test_full_directory(void)
{
	struct stat st;

	mount_small();
	fill_directory(path_of("full/store"));
	CHECK(!stat(path_of("full/store"), &st), "it is gone");
	umount(path_of("full"));
}

/* Up to the last byte. */
static void write_junk(const char *path)
{
	static const char junk[4096] = "junk";
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

	CHECK(fd >= 0, "cannot make %s: %s", path, strerror(errno));
	while (write(fd, junk, sizeof(junk)) > 0)
		;
	CHECK(errno == ENOSPC, "%s", strerror(errno));
	close(fd);
}

/* A standby that has room for RAM, but not for an epoch with all of it. */
void test_full_standby(void)
{
	struct kc_sink *s;
	struct sim g;
	unsigned int i;
	int rc;

	start_standby_fsize(path_of("ram"), blocks[0].npages * KC_PAGE_SIZE, "--no-fence",
			    "--timeout", "0", NULL);
	sim_init(&g);
	s = must_open(spec());
	for (i = 0; i < 5; i++) {
		sim_step(&g);
		OK(sim_send(&g, s, i ? 0 : KC_EPOCH_FULL));
	}
	OK(kc_sink_wait(s, 5, 10000, &err));
	/* Each page of it differs, so it needs more than RAM has. */
	OK(kc_epoch_begin(s, 6, KC_EPOCH_FULL, &err));
	for (i = 0, rc = 0; i < 3 * blocks[0].npages && !rc; i++) {
		uint64_t junk[KC_PAGE_SIZE / 8];
		unsigned int j;

		for (j = 0; j < KC_PAGE_SIZE / 8; j++)
			junk[j] = rnd(&rng_state);
		rc = kc_epoch_page(s, 0, i % blocks[0].npages, junk, &err);
	}
	while (!rc)
		rc = kc_sink_poll(s, NULL, &err);
	CHECK(rc == -ENOSPC, "%d: %s", rc, err.text);
	kc_sink_close(s);
	compare_standby(&g, path_of("ram"));
	/* It still serves. */
	s = must_open(spec());
	CHECK(kc_sink_last_epoch(s) == 5, "the last epoch is %" PRIu64, kc_sink_last_epoch(s));
	sim_goto(&g, 8);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, 8, 10000, &err));
	compare_standby(&g, path_of("ram"));
	kc_sink_close(s);
	stop_standby(SIGTERM);
	/* No room for the RAM itself. */
	start_standby_fsize(path_of("ram2"), 1 << 20, "--no-fence", "--timeout", "0", NULL);
	must_refuse(spec(), &opts, &guest, ENOSPC, "cannot allocate");
	CHECK(!exists(path_of("ram2/ram0")), "half of the RAM was left there");
	sim_free(&g);
}

/* Others fill the file system of a standby: what it has to remember is little, and counts. */
void test_full_ram_dir(void)
{
	struct kc_sink *s;
	struct sim g;

	mount_small();
	start_standby(path_of("full/ram"), "--no-fence", "--timeout", "300ms");
	s = protected_guest(&g);
	write_junk(path_of("full/junk"));
	kc_sink_end(s, KC_END_DETACH);
	kc_sink_close(s);
	wait_log("ends the protection: detached");
	poll(NULL, 0, 1000);
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"),
	      "failed over after a detach");
	stop_standby(SIGKILL);
	start_standby(path_of("full/ram"), "--no-fence", "--timeout", "300ms");
	poll(NULL, 0, 1000);
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"),
	      "failed over after a detach and a restart");
	unlink(path_of("full/junk"));
	s = must_open(spec());
	sim_step(&g);
	OK(sim_send(&g, s, kc_sink_start(s)));
	OK(kc_sink_wait(s, 3, 10000, &err));
	write_junk(path_of("full/junk"));
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	CHECK(reap(&standby) == 0 && log_has("taken over at epoch 3"), "did not fail over");
	/* Which it has stored. */
	CHECK(run("standby", "--listen", "127.0.0.1:0", "--no-fence", "--psk-file", psk,
		  "--ram-dir", path_of("full/ram"), NULL) == 1 && log_has("was taken over"),
	      "files that were given away are used again");
	umount(path_of("full"));
	sim_free(&g);
}

/* The guest's own epoch number @nr, without the pages of block 0 that are given back and dirty. */
static void send_hole(struct sim *g, struct kc_sink *s)
{
	sim_step(g);
	memset(g->ram[0], 0, blocks[0].npages * KC_PAGE_SIZE);
	OK(kc_epoch_begin(s, g->epoch, 0, &err));
	OK(kc_epoch_zeros(s, 0, 0, blocks[0].npages, true, &err));
	/* Of one that is given back in part the rest stays */
	memset(g->ram[0] + 3 * KC_PAGE_SIZE, 7, KC_PAGE_SIZE);
	OK(kc_epoch_page(s, 0, 3, g->ram[0] + 3 * KC_PAGE_SIZE, &err));
	for (uint64_t i = 0; i < blocks[1].npages; i++) {
		if (g->dirty[1][i])
			OK(kc_epoch_page(s, 1, i, g->ram[1] + i * KC_PAGE_SIZE, &err));
	}
	OK(kc_epoch_state(s, g->state, g->state_len, sim_stopped(g->epoch), &err));
	OK(kc_epoch_commit(s, &err));
	OK(kc_sink_wait(s, g->epoch, 10000, &err));
}

static uint64_t used_by(const char *path)
{
	struct stat st;

	CHECK(!stat(path, &st), "there is no %s", path);
	return st.st_blocks / (KC_PAGE_SIZE / 512);
}

/*
 * A standby has given memory back, as the guest had, and others have it now: an epoch that has
 * something there is refused, and the last one is as it was.
 */
void test_full_holes(void)
{
	struct kc_sink *s;
	struct sim g;
	int rc = 0;

	mount_small();
	start_standby(path_of("full/ram"), "--no-fence", "--timeout", "0");
	s = protected_guest(&g);
	send_hole(&g, s);
	compare_standby(&g, path_of("full/ram"));
	CHECK(used_by(path_of("full/ram/ram0")) < blocks[0].npages / 2, "it keeps %" PRIu64 " pages",
	      used_by(path_of("full/ram/ram0")));
	write_junk(path_of("full/junk"));
	truncate(path_of("full/junk"), 20 * KC_PAGE_SIZE);
	write_junk(path_of("full/junk2"));

	/* There is room for half of it */
	unlink(path_of("full/junk"));
	OK(kc_epoch_begin(s, g.epoch + 1, 0, &err));
	for (uint64_t i = 0; i < 40 && !rc; i++)
		rc = kc_epoch_page(s, 0, 100 + i, g.ram[0] + 3 * KC_PAGE_SIZE, &err);
	OK(rc);
	OK(kc_epoch_state(s, g.state, 100, false, &err));
	OK(kc_epoch_commit(s, &err));
	while (!rc)
		rc = kc_sink_wait(s, g.epoch + 1, 10000, &err);
	CHECK(rc == -ENOSPC && strstr(err.text, "again"), "%d: %s", rc, err.text);
	kc_sink_close(s);
	compare_standby(&g, path_of("full/ram"));

	/* It is over: also for one that was restarted, which sees what it has no memory for. */
	unlink(path_of("full/junk2"));
	stop_standby(SIGKILL);
	start_standby(path_of("full/ram"), "--no-fence", "--timeout", "0");
	s = must_open(spec());
	CHECK(kc_sink_last_epoch(s) == g.epoch, "it has epoch %" PRIu64, kc_sink_last_epoch(s));
	CHECK(used_by(path_of("full/ram/ram0")) < blocks[0].npages / 2, "it reads what is not there");
	sim_step(&g);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, g.epoch, 10000, &err));
	compare_standby(&g, path_of("full/ram"));
	kc_sink_close(s);
	stop_standby(SIGKILL);
	umount(path_of("full"));
	sim_free(&g);
}
