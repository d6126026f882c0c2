// SPDX-License-Identifier: GPL-2.0-only
/*
 * The guest goes on at the standby because somebody wants it to: nothing is lost, nobody is fenced,
 * and there is never a second copy.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "protecting.h"
#include "protect_tests.h"
#include "status.h"
#include "stream.h"

/* A guest that is protected, by a standby that would start this */
static void start_pair(const char *qemu_text, const char *option, const char *arg)
{
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--fence", fence(), "--timeout", "0", "--insecure",
		      "--bare-exec", "--", script("qemu", qemu_text));
	start_protect(CHECKED, spec(), "--interval", "2ms", "--control", path_of("pctl"), option, arg,
		      NULL);
	serve_until_log("protected since epoch 1");
}

static void must_be_there(void)
{
	CHECK(log_has("the guest is at the standby since epoch"), "it does not say so");
	CHECK(qemu.listener < 0 && !qemu.running, "QEMU is there still");
	wait_log("taken over at epoch");
	CHECK(!exists(path_of("fenced")), "it was fenced");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "the last epoch is missing");
}

/* What the guest had when it was stopped is in these files. */
static void is_same(struct block *b, const uint8_t *ram)
{
	CHECK(!memcmp(ram, b->ram, b->npages * KC_PAGE_SIZE), "%s is not the guest's memory", b->name);
}

static void compare_ram(const char *where)
{
	each_ram(where, is_same);
}

void test_switchover(void)
{
	char *left = strdup(path_of("left")), *text;

	start_pair("#!/bin/sh\nexec sleep 100\n", "--leave-ram", left);
	be_qemu_for(300);
	OK(kc_ctl_request(path_of("pctl"), "status", &text, &err));
	CHECK(strstr(text, "peer      to tcp:127.0.0.1:"), "whom does it protect: %s", text);
	free(text);
	OK(kc_ctl_request(path_of("ctl"), "status", &text, &err));
	CHECK(strstr(text, "peer      from 127.0.0.1:"), "who protects it: %s", text);
	free(text);
	CHECK(!run("status", path_of("pctl"), "switchover", NULL), "it is refused");
	CHECK(serve() == 0, "switching over failed");
	must_be_there();
	compare_ram(path_of("ram"));
	CHECK(log_has("the guest runs here") && !log_has("stopped as it was"), "it stands still");
	/* And back again does not cost a full copy. */
	compare_ram(left);
	start_standby(left, "--no-fence", "--timeout", "0", "--insecure");
	stop_standby(SIGTERM);
	CHECK(ram_epoch(left) == 0, "what is left is taken for an epoch");
	free(left);
}

/* Where the guest was stopped by somebody, it stays that. */
static const char *owner_stops(struct qemu *q, const char *command)
{
	if (!strcmp(command, STOP) && q->stops == 3)
		q->running = false;
	return NULL;
}

void test_switchover_stopped(void)
{
	qemu.hook = owner_stops;
	start_pair("#!/bin/sh\nexec sleep 100\n", NULL, NULL);
	while (qemu.stops < 4)
		step(&qemu, 1);
	CHECK(!run("status", path_of("pctl"), "switchover", NULL), "it is refused");
	CHECK(serve() == 0, "switching over failed");
	wait_log("stopped as it was when the epoch was taken");
	stop_standby(SIGTERM);
}

/* The standby cannot: nothing has happened. */
void test_switchover_fails(void)
{
	start_pair("#!/bin/sh\nexec sleep 100\n", NULL, NULL);
	unlink(path_of("qemu"));
	CHECK(!run("status", path_of("pctl"), "switchover", NULL), "it is refused");
	serve_until_log("the guest runs on here");
	CHECK(log_has("it cannot go on with the guest: cannot start"), "it does not say why");
	CHECK(qemu.running, "the guest stands still");
	script("qemu", "#!/bin/sh\nexec sleep 100\n");
	serve_until_log("pages differed");
	CHECK(!run("status", path_of("pctl"), "switchover", NULL), "it is refused");
	CHECK(serve() == 0, "switching over failed");
	must_be_there();
}

/* The standby hangs: the last epoch does not get there, and the guest runs on. */
static const char *hangs_standby(struct qemu *q, const char *command)
{
	int status;

	(void)q;
	if (!strcmp(command, "stop")) {
		kill(standby, SIGSTOP);
		waitpid(standby, &status, WUNTRACED);
	}
	return NULL;
}

void test_switchover_late(void)
{
	qemu.hook = hangs_standby;
	start_pair("#!/bin/sh\nexec sleep 100\n", "--io-timeout", "1s");
	CHECK(!run("status", path_of("pctl"), "switchover", NULL), "it is refused");
	serve_until_log("switchover failed");
	CHECK(qemu.running, "the guest stands still");
	kill(standby, SIGCONT);
	serve_until_log("pages differed");
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "it does not end as it was told to");
	stop_standby(SIGTERM);
}

/* A standby that takes everything, and closes the connection when it has been handed the guest */
static void be_standby(void)
{
	struct kc_welcome w = { .version = KC_VERSION, .receiver = { 7 } };
	struct kc_io *io = NULL;
	struct kc_commit c;
	struct kc_sink_opts o;
	struct kc_rec rec;
	uint8_t buf[64];
	char listen_on[32];
	int fd, conn;

	kc_sink_defaults(&o);
	o.insecure = true;
	snprintf(listen_on, sizeof(listen_on), "127.0.0.1:%d", port);
	fd = kc_io_listen(listen_on, &o, &err);
	while ((conn = accept4(fd, NULL, NULL, SOCK_NONBLOCK)) < 0)
		poll(NULL, 0, 10);
	if (kc_io_accept(conn, &o, &io, &err) || kc_io_record(io, 10000, &rec, &err))
		_exit(1);
	kc_io_write(io, buf, kc_put_welcome(buf, &w), &err);
	kc_io_flush(io, &err);
	while (!kc_io_record(io, 10000, &rec, &err) && rec.type != KC_END) {
		if (rec.type != KC_COMMIT || kc_get_commit(&rec, &c, &err))
			continue;
		kc_io_write(io, buf, kc_put_nr(buf, KC_ACK, c.nr, 0), &err);
		kc_io_flush(io, &err);
	}
	_exit(rec.type != KC_END);
}

/* It may have taken over: the guest must not run here as long as nobody says that it did not. */
void test_switchover_unknown(void)
{
	pid_t pid;

	start_qemu(&qemu);
	/* For a port. */
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	stop_standby(SIGTERM);
	pid = fork();
	if (!pid)
		be_standby();
	start_protect(CHECKED, spec(), "--interval", "2ms", "--control", path_of("pctl"), NULL);
	serve_until_log("protected since epoch 1");
	CHECK(!run("status", path_of("pctl"), "switchover", NULL), "it is refused");
	serve_until_log("the guest is stopped until it is known whether it runs at the standby");
	CHECK(reap(&pid) == 0, "it was not handed the guest");
	be_qemu_for(1000);
	/* Another one does not know.  It begins another log, but not for protect. */
	CHECK(!link(path_of("log"), path_of("protect.log")), "cannot link the log");
	start_standby(path_of("ram2"), "--no-fence", "--timeout", "0", "--insecure");
	wait_log("is connected");
	be_qemu_for(2000);
	CHECK(!qemu.running && !waitpid(qemu.client, NULL, WNOHANG), "the guest may run twice");
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 1 && times_in(path_of("protect.log"), "IT IS NOT KNOWN WHETHER THE GUEST"),
	      "it does not say that nothing is known");
	CHECK(!qemu.running, "the guest may run twice");
	stop_standby(SIGTERM);
}

void test_switchover_directory(void)
{
	start_qemu(&qemu);
	start_protect(CHECKED, path_of("store"), "--control", path_of("pctl"), NULL);
	serve_until_log("protected since epoch 1");
	CHECK(run("status", path_of("pctl"), "switchover", NULL) == 1 &&
	      log_has("only a standby can go on with a guest"), "it is not refused");
	be_qemu_for(300);
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "it does not end as it was told to");
}
