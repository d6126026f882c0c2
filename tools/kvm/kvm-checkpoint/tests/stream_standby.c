// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a standby decides by itself: whether silence means that the primary is dead, and what it
 * says to primaries when it has taken over.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

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
	uint64_t time;
	uint8_t *buf;
	size_t len;

	snprintf(path, sizeof(path), "%s/meta", ram);
	read_all(path, &buf, &len);
	memcpy(&time, buf + 32, sizeof(time));
	CHECK(kc_wall_ms() - time < 2 * 3600000, "the epoch is %" PRIu64 " ms old",
	      kc_wall_ms() - time);
	time -= ms;
	memcpy(buf + 32, &time, sizeof(time));
	write_meta(path, buf, len);
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

/* --- Who has no key ------------------------------------------------------- */

/* Connects as often as it can, says nothing, or nonsense, and keeps what it can keep. */
static pid_t start_flood(void)
{
	static const char junk[] = "\x16\x03\x01GET / HTTP/1.0\r\n\r\n";
	struct sockaddr_in sa = { .sin_family = AF_INET, .sin_port = htons(port),
				  .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fds[200] = { 0 };
	pid_t pid = fork();
	unsigned int i;

	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (i = 0;; i++) {
		int *fd = &fds[i % 200];

		if (*fd > 0)
			close(*fd);
		*fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (connect(*fd, (struct sockaddr *)&sa, sizeof(sa)))
			continue;
		if (i % 3 && write(*fd, junk, i % 3 == 1 ? 1 : sizeof(junk)) < 0)
			continue;
	}
}

void test_flood(void)
{
	const unsigned int timeout_ms = 3000;
	uint64_t end, heard, t;
	unsigned int lines = 0;
	struct kc_sink *s;
	pid_t pid[2];
	struct sim g;
	uint8_t *buf;
	size_t len;
	char *p;

	start_standby(path_of("ram"), "--fence", fence_command(), "--timeout", "3s");
	pid[0] = start_flood();
	pid[1] = start_flood();
	poll(NULL, 0, 1000);
	/* A primary gets in. */
	for (end = kc_now_us() + 60000000; !(s = kc_sink_open(spec(), &opts, &guest, &err));)
		CHECK(kc_sink_is_temporary(errno) && kc_now_us() < end, "no way in: %s", err.text);
	sim_init(&g);
	sim_step(&g);
	OK(sim_send(&g, s, KC_EPOCH_FULL));
	OK(kc_sink_wait(s, 1, 60000, &err));
	/* Is heard. */
	for (end = kc_now_us() + 11000000; kc_now_us() < end; poll(NULL, 0, 20))
		OK(kc_sink_poll(s, NULL, &err));
	CHECK(!exists(path_of("fenced")), "the host of a guest that lives is fenced");
	/* And missed, in time. */
	heard = kc_now_us();
	kc_sink_close(s);
	CHECK(wait_for(path_of("fenced"), 30000), "it is never missed");
	t = kc_now_us() - heard;
	printf("# fenced %" PRIu64 " ms after it was heard\n", t / 1000);
	CHECK(t < (2 * timeout_ms + 1000) * 1000ull, "that took %" PRIu64 " ms", t / 1000);
	kill(pid[0], SIGKILL);
	kill(pid[1], SIGKILL);
	reap(&pid[0]);
	reap(&pid[1]);
	CHECK(reap(&standby) == 0, "the standby failed");
	read_all(path_of("log"), &buf, &len);
	buf[len] = '\0';
	for (p = (char *)buf; (p = strstr(p, "refused")); p++)
		lines++;
	CHECK(log_has("connections more") && lines < 60, "refused %u times", lines);
	free(buf);
	sim_free(&g);
}

/* That the standby itself was stopped says nothing about the primary. */
void test_standby_stopped(void)
{
	struct kc_sink *s;
	struct sim g;
	unsigned int i;

	start_standby(path_of("ram"), "--fence", fence_command(), "--timeout", "1s");
	s = protected_guest(&g);
	kill(standby, SIGSTOP);
	for (i = 0; i < 150; i++) {
		OK(kc_sink_poll(s, NULL, &err));
		poll(NULL, 0, 20);
	}
	kill(standby, SIGCONT);
	for (i = 0; i < 100; i++) {
		OK(kc_sink_poll(s, NULL, &err));
		poll(NULL, 0, 20);
	}
	must_wait(0);
	kc_sink_close(s);
	CHECK(reap(&standby) == 0 && log_has("taken over at epoch 2"), "did not fail over");
	sim_free(&g);
}

/* --- What is wrong with its command --------------------------------------- */

/* It ends with 2, and says this. */
static void must_not_start(const char *text, const char *a, const char *b, const char *c)
{
	unlink(path_of("log"));
	CHECK(run("standby", "--listen", "127.0.0.1:0", "--psk-file", psk, "--ram-dir",
		  path_of("ram"), a, b, c, NULL) == 2 && log_has(text), "it does not say \"%s\"",
	      text);
}

void test_configuration(void)
{
	char fence[PATH_MAX], qemu[PATH_MAX], command[2 * PATH_MAX];
	struct kc_sink *s;

	snprintf(fence, sizeof(fence), "--fence=%s x", path_of("typo"));
	must_not_start("typo: No such file or directory", fence, NULL, NULL);
	must_not_start("cannot run no-such-command", "--fence", "no-such-command", NULL);
	write_text(path_of("typo"), 0600, "#!/bin/sh\n");
	must_not_start("typo: Permission denied", fence, NULL, NULL);
	must_not_start("cannot run /: Permission denied", "--fence=/", NULL, NULL);
	must_not_start("no/such/qemu: No such file", "--no-fence", "--exec=/no/such/qemu {ram0}",
		       NULL);
	snprintf(qemu, sizeof(qemu), "%s", script("qemu", "#!/bin/sh\nexec sleep 100\n"));
	snprintf(command, sizeof(command), "--exec=%s -m 4G", qemu);
	must_not_start("has no {ramN}", "--no-fence", command, NULL);

	/* Which blocks there are is known when a primary comes. */
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--", qemu, "mem-path={ram0}",
		      "{\"size\": {size1}}");
	must_refuse(spec(), &opts, &guest, EOPNOTSUPP,
		    "does not use block /objects/ram1 of the guest's RAM, by {ram1} or");
	CHECK(!exists(path_of("ram/ram0")), "it made RAM");
	stop_standby(SIGTERM);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--", qemu,
		      "{ram:/objects/ram1}", "mem-path={ram0}");
	s = must_open(spec());
	kc_sink_close(s);
	stop_standby(SIGTERM);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--", qemu, "{ram7}");
	must_refuse(spec(), &opts, &guest, EOPNOTSUPP, "there is no {ram7}");
}

/* --- The guest is here now ------------------------------------------------ */

/* Another process than this one, so another primary; opens a sink when told to: errno. */
struct other {
	pid_t pid;
	int in, out;
};

static void start_other(struct other *o)
{
	int to[2], from[2];
	uint8_t process;

	CHECK(!pipe(to) && !pipe(from), "no pipes");
	o->pid = fork();
	o->in = to[1];
	o->out = from[0];
	if (o->pid)
		return;
	close(to[1]);
	while (read(to[0], &process, 1) == 1) {
		struct kc_sink *s;
		int e;

		guest.process[0] = process;
		s = kc_sink_open(spec(), &opts, &guest, NULL);
		e = s ? 0 : errno;
		kc_sink_close(s);
		if (write(from[1], &e, sizeof(e)) != sizeof(e))
			_exit(1);
	}
	_exit(0);
}

static int ask_other(struct other *o, uint8_t process)
{
	int e = -1;

	CHECK(write(o->in, &process, 1) == 1 && read(o->out, &e, sizeof(e)) == sizeof(e),
	      "the other process is gone");
	return e;
}

void test_taken_over(void)
{
	char self[PATH_MAX] = "", *pid_file = strdup(path_of("qemu.pid"));
	struct other other;
	struct kc_sink *s;
	struct sim g;
	unsigned int i;
	pid_t pid;
	uint8_t *buf;
	size_t len;
	int e;

	CHECK(readlink("/proc/self/exe", self, sizeof(self) - 1) > 0, "where is this program?");
	CHECK(!prctl(PR_SET_CHILD_SUBREAPER, 1), "cannot adopt");
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--", self, "--be-qemu",
		      "running", pid_file, "{ram0}", "{ram1}");
	start_other(&other);
	guest.process[0] = 5;
	s = protected_guest(&g);
	kc_sink_close(s);
	/* Epoch 2 is of a guest that was stopped. */
	s = must_open(spec());
	sim_step(&g);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, 3, 10000, &err));
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	wait_log("taken over at epoch 3");
	for (i = 0; i < 3; i++)
		must_refuse(spec(), &opts, &guest, ESHUTDOWN, "has taken over the guest at epoch 3");
	/* Another daemon of the same QEMU, but not one of any other, such as the one here */
	e = ask_other(&other, 5);
	CHECK(e == ESHUTDOWN, "a restarted primary is refused with %s", strerror(e));
	e = ask_other(&other, 6);
	CHECK(e == EEXIST, "the primary of another QEMU is refused with %s", strerror(e));
	guest.name[0] = 'T';
	must_refuse(spec(), &opts, &guest, EEXIST, "has taken over guest test guest");
	guest.name[0] = 't';
	CHECK(!waitpid(standby, NULL, WNOHANG), "the standby ended");
	stop_standby(SIGTERM);
	must_refuse(spec(), &opts, &guest, ECONNREFUSED, "cannot connect");
	kill(other.pid, SIGKILL);
	reap(&other.pid);
	read_all(pid_file, &buf, &len);
	buf[len] = '\0';
	pid = atoi((char *)buf);
	kill(pid, SIGKILL);
	CHECK(waitpid(pid, NULL, 0) == pid, "whose child is QEMU?");
	free(pid_file);
	free(buf);
	sim_free(&g);
}
