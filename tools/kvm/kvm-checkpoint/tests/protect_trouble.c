// SPDX-License-Identifier: GPL-2.0-only
/*
 * The receiver is in trouble for a while: protection goes on when that is over, and what there was
 * is not lost meanwhile.
 */
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "protecting.h"
#include "protect_tests.h"
#include "status.h"

/* Be QEMU until the status of protect has this, or has it no more. */
static void serve_until_status(const char *text, bool has)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	char *status = NULL;
	bool found;

	do {
		CHECK(kc_now_us() < end && !waitpid(qemu.client, NULL, WNOHANG),
		      "the status %s has \"%s\": %s", has ? "never" : "always", text, status);
		free(status);
		be_qemu_for(50);
		OK(kc_ctl_request(path_of("pctl"), "status", &status, &err));
		found = strstr(status, text);
	} while (found != has);
	free(status);
}

static void limit(int resource, rlim_t max)
{
	struct rlimit rl;

	CHECK(!prlimit(standby, resource, NULL, &rl), "prlimit: %s", strerror(errno));
	rl.rlim_cur = max < rl.rlim_max ? max : rl.rlim_max;
	CHECK(!prlimit(standby, resource, &rl, NULL), "prlimit: %s", strerror(errno));
}

static const char *writes_everything(struct qemu *q, const char *command)
{
	uint64_t page, i;

	if (strcmp(command, COLLECT) || q->running || q->collects != 4)
		return NULL;
	for (page = 0; page < q->blocks[0].npages; page++) {
		for (i = 0; i < KC_PAGE_SIZE; i += 8) {
			uint64_t v = rnd(&rng_state);

			memcpy(q->blocks[0].ram + page * KC_PAGE_SIZE + i, &v, 8);
		}
		q->blocks[0].dirty[page] = true;
	}
	return NULL;
}

/* Of its first three epochs the standby has room for, but not for the fourth. */
static void fill_standby(void)
{
	qemu.hook = writes_everything;
	start_qemu(&qemu);
	start_standby_fsize(path_of("ram"), 1 << 30, "--fence", fence(), "--timeout", "6s",
			    "--insecure", NULL);
	start_protect(CHECKED, spec(), "--interval", "200ms", "--control", path_of("pctl"), NULL);
	serve_until_log("protected since epoch 1");
	limit(RLIMIT_FSIZE, 1 << 20);
	serve_until_log("cannot write redo.tmp");
	serve_until_status("trouble   the standby refuses: cannot write redo.tmp", true);
}

static void must_not_fence(void)
{
	CHECK(!exists(path_of("fenced")) && !log_has("failing over"),
	      "the host of a guest that runs is fenced");
}

void test_full_standby(void)
{
	fill_standby();
	/* For longer than the standby waits for a primary that is silent. */
	be_qemu_for(8000);
	must_not_fence();
	CHECK(!log_has("ends the protection"), "the protection was ended");
	CHECK(times_in_log("; the guest runs on, trying again") == 1, "it says so again and again");
	limit(RLIMIT_FSIZE, RLIM_INFINITY);
	serve_until_status("trouble", false);
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "it does not end as it was told to");
	wait_log("ends the protection: detached");
	must_not_fence();
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "the last epoch is missing");
}

/* It has epochs to take over. */
void test_full_standby_dies(void)
{
	fill_standby();
	be_qemu_for(1000);
	die(&qemu);
	must_fail(serve(), "QEMU is gone; the last epoch that counts is 3");
	CHECK(reap(&standby) == 0 && log_has("the primary's guest died"),
	      "the standby does not take over");
	CHECK(snap_of_standby(path_of("ram")) == 2, "it took over at another epoch");
}

/* Nor is there memory for anything. */
void test_no_memory(void)
{
	struct rlimit rl;

	start_qemu(&qemu);
	start_standby(path_of("ram"), "--fence", fence(), "--timeout", "6s", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "1ms", "--control", path_of("pctl"), NULL);
	serve_until_log("protected since epoch 1");
	CHECK(!prlimit(standby, RLIMIT_AS, NULL, &rl), "prlimit: %s", strerror(errno));
	limit(RLIMIT_AS, 1 << 20);
	serve_until_status("trouble", true);
	be_qemu_for(3000);
	limit(RLIMIT_AS, rl.rlim_cur);
	serve_until_status("trouble", false);
	must_not_fence();
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "it does not end as it was told to");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "the last epoch is missing");
}

/* For a while another standby listens there. */
void test_other_standby(void)
{
	struct kc_block block = { "pc.ram", 4 };
	struct kc_guest other = { .uuid = { 7 }, .name = "other", .page_size = KC_PAGE_SIZE,
				  .nr_blocks = 1, .blocks = &block };
	struct kc_sink_opts o;
	struct kc_sink *s;

	kc_sink_defaults(&o);
	o.insecure = true;
	start_standby(path_of("ram2"), "--no-fence", "--timeout", "0", "--insecure");
	s = kc_sink_open(spec(), &o, &other, &err);
	CHECK(s, "%s", err.text);
	kc_sink_close(s);
	stop_standby(SIGTERM);

	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "1ms", "--control", path_of("pctl"), NULL);
	serve_until_log("protected since epoch 1");
	stop_standby(SIGKILL);
	start_standby(path_of("ram2"), "--no-fence", "--timeout", "0", "--insecure");
	serve_until_status("it holds guest", true);
	stop_standby(SIGTERM);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	serve_until_status("trouble", false);
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "it does not end as it was told to");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "the last epoch is missing");
}

/* The guest is another one, or has other devices, than that whose epochs are there. */
void test_identity(void)
{
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "1");
	qemu.name = "web-frontend";
	must_fail(protect(CHECKED, path_of("store"), "--epochs", "1"),
		  "it holds guest 550e8400-e29b-41d4-a716-446655440000 (sham), not");
	qemu.name = "sham";
	qemu.devices = "[{\"name\": \"net1\", \"type\": \"child<virtio-net-pci>\"}]";
	must_fail(protect(CHECKED, path_of("store"), "--epochs", "1"),
		  "other devices: without device virtio-net-pci net1");
	qemu.devices = "[{\"name\": \"type\", \"type\": \"string\"}]";
	protect_epochs(path_of("store"), "1");
	/* Of a guest without a name the process is what counts, and that is the same. */
	remove_tree(path_of("store"));
	qemu.name = "";
	qemu.uuid = "00000000-0000-0000-0000-000000000000";
	protect_epochs(path_of("store"), "1");
	protect_epochs(path_of("store"), "1");
}

/* A directory on a disk that others fill. */
void test_full_store(void)
{
	char store[PATH_MAX];
	static char junk[4096];
	unsigned int last;
	FILE *f;

	if (mkdir(path_of("small"), 0700) || unshare(CLONE_NEWNS) ||
	    mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("none", path_of("small"), "tmpfs", 0, "size=8m"))
		SKIP("cannot mount a small tmpfs: %s", strerror(errno));
	snprintf(store, sizeof(store), "%s/small/store", dir);
	start_qemu(&qemu);
	start_protect(CHECKED, store, "--interval", "5ms", "--keep", "5", "--control",
		      path_of("pctl"), NULL);
	serve_until_log("protected since epoch 1");
	f = fopen(path_of("small/junk"), "w");
	CHECK(f, "cannot fill the disk");
	while (fwrite(junk, sizeof(junk), 1, f) == 1 && !fflush(f))
		;
	fclose(f);
	serve_until_status("trouble   cannot write to", true);
	be_qemu_for(2000);
	unlink(path_of("small/junk"));
	serve_until_status("trouble", false);
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "it does not end as it was told to");
	/* Where it is looked for. */
	CHECK(!symlink(store, path_of("store")), "symlink");
	check_store(&last);
	CHECK(last == qemu.nr_snaps - 1, "the last epoch is missing");
	CHECK(!run("verify", store, NULL), "verify finds something");
}

/* --- The standby has taken over ------------------------------------------- */

static void start_pair(void)
{
	start_qemu(&qemu);
	/* It does nothing, and is there. */
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure", "--bare-exec",
		      "--", "/bin/sleep", "100");
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	serve_until_log("protected since epoch 1");
}

static void must_stop_guest(void)
{
	must_fail(serve(), "stopping the guest here");
	CHECK(log_has("the guest is stopped here, as it is at the standby"), "it does not say so");
	CHECK(!qemu.running, "the guest runs here and there");
}

void test_taken_over(void)
{
	start_pair();
	CHECK(!run("status", path_of("ctl"), "promote", NULL), "promote failed");
	must_stop_guest();
	/* Whoever resumes it, and a daemon that is new. */
	qemu.running = true;
	CHECK(protect(CHECKED, spec()) == 1 && log_has("has taken over the guest"),
	      "it does not hear of it");
	CHECK(!qemu.running, "the guest runs here and there");
	/* Another guest is none of its business. */
	qemu.running = true;
	qemu.name = "other";
	CHECK(protect(CHECKED, spec()) == 1 && log_has("has taken over guest sham"),
	      "it is not refused");
	CHECK(qemu.running, "it stopped another guest");
	CHECK(!waitpid(standby, NULL, WNOHANG), "the standby ended");
	stop_standby(SIGTERM);
}

/* It learns that only when it is told to end. */
void test_taken_over_at_end(void)
{
	start_pair();
	kill(qemu.client, SIGSTOP);
	CHECK(!run("status", path_of("ctl"), "promote", NULL), "promote failed");
	wait_log("taken over at epoch");
	kill(qemu.client, SIGTERM);
	kill(qemu.client, SIGCONT);
	must_stop_guest();
	stop_standby(SIGTERM);
}

/* QEMU does not answer for a while, or somebody resumes the guest. */
static const char *resists(struct qemu *q, const char *command)
{
	static unsigned int n;

	if (strcmp(command, "stop") || n++ > 4)
		return NULL;
	if (n == 2) {
		close_monitor(q);
		return "";
	}
	return n == 1 ? "{\"error\": {\"desc\": \"not now\"}}\n" : "{\"return\": {}}\n";
}

void test_taken_over_resists(void)
{
	qemu.hook = resists;
	start_pair();
	CHECK(!run("status", path_of("ctl"), "promote", NULL), "promote failed");
	must_stop_guest();
	CHECK(times_in_log("cannot be stopped") == 1, "it does not say why it takes so long");
	stop_standby(SIGTERM);
}
