// SPDX-License-Identifier: GPL-2.0-only
/*
 * Standbys that fail over, or must not, with a QEMU that emulates and one that this program is.
 */
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
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ram.h"
#include "sim.h"
#include "status.h"
#include "stream_tests.h"

void test_no_failover(void)
{
	struct kc_sink *s;
	struct sim g;
	char *ans;

	/* Neither when it is silent nor when its guest died; the time given does not count. */
	start_standby(path_of("ram"), "--no-fence", "--no-failover", "--timeout", "300ms");
	s = protected_guest(&g);
	kc_sink_close(s);
	poll(NULL, 0, 1000);
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"),
	      "failed over as the primary was silent");
	s = must_open(spec());
	sim_goto(&g, 5);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, 5, 10000, &err));
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	wait_log("its guest died");
	poll(NULL, 0, 1000);
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"),
	      "failed over as the guest died");
	/* When told to, it does. */
	OK(kc_ctl_request(path_of("ctl"), "promote", &ans, &err));
	free(ans);
	CHECK(reap(&standby) == 0 && log_has("taken over at epoch 5"), "did not fail over");
	compare_standby(&g, path_of("ram"));
	sim_free(&g);
}

void test_failover(void)
{
	char fence[PATH_MAX], fence_text[2 * PATH_MAX], qemu[PATH_MAX], text[4 * PATH_MAX],
		want[PATH_MAX + 200];
	struct kc_sink *s;
	struct sim g;
	uint8_t *buf;
	size_t len;
	char *ans;

	/*
	 * The fence fails until it may not; QEMU says what it was called with, and that it was
	 * fenced.
	 */
	snprintf(fence_text, sizeof(fence_text),
		 "#!/bin/sh\n[ \"$1\" = 'a b' ] || exit 9\necho x >>%s/fences\n[ -e %s/may ] || exit 1\n>%s/fenced\n",
		 dir, dir, dir);
	snprintf(fence, sizeof(fence), "%s 'a b'", script("fence", fence_text));
	snprintf(text, sizeof(text),
		 "#!/bin/sh\n[ -e %s/fenced ] || exit 9\ncp %s/ram/ram0 %s/ram/ram1 \"$3\" %s/took/\nprintf '%%s|' \"$@\" >%s/args.tmp\nmv %s/args.tmp %s/args\n",
		 dir, dir, dir, dir, dir, dir, dir);
	snprintf(qemu, sizeof(qemu), "%s", script("qemu", text));
	CHECK(!mkdir(path_of("took"), 0700), "mkdir");
	start_standby(path_of("ram"), "--fence", fence, "--timeout", "500ms", "--bare-exec", "--",
		      qemu, "m={ram0},n={ram:/objects/ram1}", "$(touch x);{epoch},{size1}",
		      "{state}");
	s = protected_guest(&g);
	/* As long as there are heartbeats, nothing happens. */
	for (len = 0; len < 100; len++) {
		OK(kc_sink_poll(s, NULL, &err));
		poll(NULL, 0, 10);
	}
	CHECK(!exists(path_of("fences")), "fenced although the primary lives");
	kc_sink_close(s);
	CHECK(wait_for(path_of("fences"), 20000), "the fence did not run");
	wait_log("could not fail over");
	CHECK(!exists(path_of("args")), "QEMU was started although the fence failed");
	/* The primary was not dead after all. */
	s = must_open(spec());
	sim_step(&g);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, 3, 10000, &err));
	write_text(path_of("may"), 0600, "");
	kc_sink_close(s);
	CHECK(wait_for(path_of("args"), 20000), "QEMU was not started");
	CHECK(reap(&standby) == 0, "the standby failed");
	read_all(path_of("args"), &buf, &len);
	buf[len] = '\0';
	snprintf(want, sizeof(want), "m=%s/ram/ram0,n=%s/ram/ram1|$(touch x);3,%u|%s/ram/state-3|",
		 dir, dir, (unsigned int)blocks[1].npages * KC_PAGE_SIZE, dir);
	CHECK(!strcmp((char *)buf, want), "QEMU was called with \"%s\", not \"%s\"", buf, want);
	free(buf);
	compare(&g, path_of("took"), "state-3");
	/* These files are QEMU's now. */
	CHECK(run("standby", "--listen", "127.0.0.1:0", "--no-fence", "--psk-file", psk,
		  "--ram-dir", path_of("ram"), NULL) == 1,
	      "files that were given away are used again");
	CHECK(kc_ctl_request(path_of("ctl"), "status", &ans, &err), "it left its socket");
	sim_free(&g);
}

void test_failover_reasons(void)
{
	struct kc_sink *s;
	struct sim g;
	char *ans;

	/* Detached: never, not even after a restart. */
	start_standby(path_of("ram"), "--no-fence", "--timeout", "300ms");
	s = protected_guest(&g);
	kc_sink_end(s, KC_END_DETACH);
	kc_sink_close(s);
	wait_log("ends the protection");
	poll(NULL, 0, 700);
	stop_standby(SIGKILL);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "300ms");
	poll(NULL, 0, 700);
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"),
	      "failed over after a detach");
	/* Nor when a primary came again and was lost before it had brought anything new. */
	s = must_open(spec());
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	kc_sink_close(must_open(spec()));
	poll(NULL, 0, 700);
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"),
	      "failed over to an old epoch");
	sim_free(&g);
	/* The guest died: at once, however long the timeout. */
	stop_standby(SIGTERM);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "1m");
	s = must_open(spec());
	sim_init(&g);
	sim_goto(&g, 5);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, 5, 10000, &err));
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	CHECK(reap(&standby) == 0 && log_has("taken over at epoch 5"), "did not fail over");
	compare_standby(&g, path_of("ram"));
	/* Told to; but not without an epoch. */
	remove_tree(path_of("ram"));
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	CHECK(kc_ctl_request(path_of("ctl"), "promote", &ans, &err) == -EREMOTEIO,
	      "promoted without an epoch");
	CHECK(kc_ctl_request(path_of("ctl"), "bogus", &ans, &err) == -EREMOTEIO,
	      "took a bogus command");
	s = protected_guest(&g);
	CHECK(!run("status", path_of("ctl"), "promote", NULL), "promote failed");
	CHECK(reap(&standby) == 0 && log_has("told to"), "did not fail over");
	CHECK(log_has("ram pc.ram 2867200 /") && log_has("state-2"),
	      "does not say where the checkpoint is");
	compare_standby(&g, path_of("ram"));
	CHECK(kc_sink_poll(s, NULL, &err) < 0, "the primary does not notice");
	kc_sink_close(s);
	sim_free(&g);
	/* A fence that hangs is killed and has failed. */
	remove_tree(path_of("ram"));
	start_standby(path_of("ram"), "--fence", "sleep 100", "--fence-timeout", "200ms",
		      "--timeout", "300ms");
	s = protected_guest(&g);
	kc_sink_close(s);
	wait_log("did not end within 200 ms");
	CHECK(!log_has("taken over"), "took over without a fence");
	sim_free(&g);
}

/* What failed is tried again: by itself if the guest is dead, and nothing is given away before. */
void test_failover_again(void)
{
	char fence[PATH_MAX], text[2 * PATH_MAX];
	struct kc_sink *s;
	struct sim g;

	/* However long the timeout, as it will be silent for ever. */
	snprintf(text, sizeof(text), "#!/bin/sh\n[ -e %s/tried ]; rc=$?\n>%s/tried\nexit $rc\n", dir,
		 dir);
	snprintf(fence, sizeof(fence), "%s", script("fence", text));
	start_standby(path_of("ram"), "--fence", fence, "--timeout", "0");
	s = protected_guest(&g);
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	wait_log("could not fail over");
	CHECK(reap(&standby) == 0 && log_has("taken over at epoch 2"), "did not try again");
	sim_free(&g);

	/* A command that cannot be started has not got the files. */
	remove_tree(path_of("ram"));
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--bare-exec", "--",
		      script("nothing", "#!/bin/sh\n"), "{state}");
	unlink(path_of("nothing"));
	s = protected_guest(&g);
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	wait_log("could not fail over");
	CHECK(!waitpid(standby, NULL, WNOHANG), "it gave up");
	s = must_open(spec());
	CHECK(kc_sink_last_epoch(s) == 2, "the epoch is lost");
	sim_step(&g);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, 3, 10000, &err));
	kc_sink_close(s);
	stop_standby(SIGTERM);
	sim_free(&g);
}

/* meta as if it had been written before this host was booted. */
static void other_boot(const char *ram)
{
	char path[PATH_MAX], id[37] = "", *at;
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
	uint8_t *buf;
	size_t len;

	CHECK(fd >= 0 && read(fd, id, 36) == 36, "no boot ID");
	close(fd);
	snprintf(path, sizeof(path), "%s/meta", ram);
	read_all(path, &buf, &len);
	at = memmem(buf, len, id, 36);
	CHECK(at, "the boot ID is not in meta");
	*at ^= 1;
	write_meta(path, buf, len);
	free(buf);
}

/* What a disk may have of an epoch on its way when its host dies, if nothing was forced there */
static void half_of_redo(void)
{
	FILE *f = fopen(path_of("ram/redo"), "w");

	CHECK(f && fputs("half", f) >= 0 && !fclose(f), "cannot write redo");
}

/* A standby has an epoch, is killed, and its host boots; what counts of it then? */
static uint64_t after_boot(struct sim *g, const char *first, const char *second, const char *third)
{
	struct kc_sink *s;
	uint64_t last;

	remove_tree(path_of("ram"));
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", first);
	s = protected_guest(g);
	kc_sink_close(s);
	stop_standby(SIGKILL);
	if (second) {
		start_standby(path_of("ram"), "--no-fence", "--timeout", "0", second);
		stop_standby(SIGKILL);
	}
	other_boot(path_of("ram"));
	if (strcmp(first, "--durable"))
		half_of_redo();
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", third);
	s = must_open(spec());
	last = kc_sink_last_epoch(s);
	if (last)
		compare_standby(g, path_of("ram"));
	/* In any case its pages are of use. */
	CHECK(kc_sink_start(s) == KC_EPOCH_RESYNC, "all pages would be sent");
	kc_sink_close(s);
	stop_standby(SIGTERM);
	sim_free(g);
	return last;
}

void test_reboot(void)
{
	static const char * const durable = "--durable", * const not = "--json";
	struct sim g;

	CHECK(after_boot(&g, durable, NULL, durable) == 2, "a durable epoch is lost");
	CHECK(after_boot(&g, durable, NULL, not) == 2, "a durable epoch is lost without --durable");
	CHECK(after_boot(&g, not, NULL, not) == 0, "what was not forced to the disk is trusted");
	CHECK(after_boot(&g, not, NULL, durable) == 0,
	      "what was not forced to the disk is trusted with --durable");
	CHECK(after_boot(&g, durable, not, durable) == 0,
	      "what may have been changed without --durable is trusted");
}

/* What others may write to is no place for a guest's memory. */
void test_foreign_directory(void)
{
	if (geteuid())
		SKIP("only root can give a directory away");
	CHECK(!mkdir(path_of("theirs"), 0700) && !chown(path_of("theirs"), 12345, 12345), "chown");
	CHECK(run("standby", "--listen", "127.0.0.1:0", "--no-fence", "--psk-file", psk,
		  "--ram-dir", path_of("theirs"), NULL) == 1,
	      "took a directory of somebody else for RAM");
	CHECK(!exists(path_of("theirs/meta")), "wrote to it");
	CHECK(!mkdir(path_of("open"), 0700) && !chmod(path_of("open"), 0777), "chmod");
	CHECK(run("standby", "--listen", "127.0.0.1:0", "--no-fence", "--psk-file", psk,
		  "--ram-dir", path_of("open"), NULL) == 1,
	      "took a directory for RAM that all may write to");
}

/* --- With a real QEMU, which emulates ------------------------------------- */

static int qmp_connect(const char *path)
{
	struct kc_ctl *unused = NULL;
	char cmd[64];
	int fd, i;

	(void)unused;
	(void)cmd;
	for (i = 0; i < 1000; i++) {
		struct sockaddr_storage ss = { .ss_family = AF_UNIX };

		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		strcpy((char *)&ss + 2, path);
		if (!connect(fd, (struct sockaddr *)&ss, 2 + strlen(path) + 1))
			return fd;
		close(fd);
		poll(NULL, 0, 20);
	}
	FAIL("QEMU does not come up");
}

/* Send a line, wait for a line with @want. */
static void qmp(int fd, const char *line, const char *want)
{
	uint64_t end = kc_now_us() + 30000000;
	static char buf[65536];
	size_t n = 0;
	ssize_t r;

	if (line)
		CHECK(write(fd, line, strlen(line)) == (ssize_t)strlen(line), "QEMU is gone");
	while (kc_now_us() < end && n < sizeof(buf) - 1) {
		struct pollfd p = { .fd = fd, .events = POLLIN };

		if (poll(&p, 1, 100) <= 0)
			continue;
		r = read(fd, buf + n, sizeof(buf) - 1 - n);
		CHECK(r > 0, "QEMU is gone");
		n += r;
		buf[n] = '\0';
		if (strstr(buf, want) && buf[n - 1] == '\n')
			return;
		CHECK(!strstr(buf, "\"error\""), "QEMU says %s", buf);
	}
	FAIL("QEMU does not say %s, but %s", want, buf);
}

/*
 * The guest's firmware runs; it is stopped, saved, sent, and goes on in another QEMU, or stands
 * still there if that is what the epoch says.
 */
static void qemu_takes_over(bool stopped, const char *extra)
{
	static struct kc_block one = { "ram0", 32 << 8 };
	struct kc_guest g = { .page_size = KC_PAGE_SIZE, .nr_blocks = 1, .blocks = &one };
	char mem[PATH_MAX + 100], sock[PATH_MAX + 100], line[PATH_MAX + 200], sock2[PATH_MAX + 100];
	const char *qemu = "/usr/bin/qemu-system-x86_64";
	const char *argv[] = { qemu,
			       "-accel",
			       "tcg",
			       "-m",
			       "32M",
			       "-machine",
			       "pc,memory-backend=ram0",
			       "-object",
			       mem,
			       "-nodefaults",
			       "-display",
			       "none",
			       "-vga",
			       "none",
			       "-qmp",
			       sock,
			       extra ? "-serial" : NULL,
			       extra,
			       NULL };
	struct kc_sink *s;
	uint8_t *ram, *state, *theirs;
	size_t len, state_len, i;
	pid_t primary;
	int fd, rc;

	if (!exists(qemu))
		SKIP("there is no %s", qemu);
	snprintf(mem, sizeof(mem),
		 "memory-backend-file,id=ram0,size=32M,share=on,mem-path=%s/primary", dir);
	snprintf(sock, sizeof(sock), "unix:%s/qmp,server=on,wait=off", dir);
	primary = spawn(argv, 0);
	fd = qmp_connect(path_of("qmp"));
	qmp(fd, "{\"execute\":\"qmp_capabilities\"}\n", "return");
	qmp(fd,
	    "{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":[{\"capability\":\"x-ignore-shared\",\"state\":true}]}}\n",
	    "return");
	poll(NULL, 0, 500);
	qmp(fd, "{\"execute\":\"stop\"}\n", "return");
	snprintf(line, sizeof(line),
		 "{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"exec:cat >%s/saved\"}}\n", dir);
	qmp(fd, line, "return");
	for (i = 0; i < 500; i++) {
		poll(NULL, 0, 20);
		qmp(fd, "{\"execute\":\"query-migrate\"}\n", "status");
		if (exists(path_of("saved")) && i > 10)
			break;
	}
	read_all(path_of("primary"), &ram, &len);
	read_all(path_of("saved"), &state, &state_len);
	CHECK(len == 32 << 20 && state_len > 1000, "%zu bytes of RAM, %zu of state", len,
	      state_len);

	/* The standby starts a QEMU that is told the same, but for the memory and the monitor. */
	snprintf(sock2, sizeof(sock2), "unix:%s/qmp2,server=on,wait=off", dir);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--capability",
		      "x-ignore-shared", "--", qemu, "-accel", "tcg", "-m", "32M", "-machine",
		      "pc,memory-backend=ram0", "-object",
		      "memory-backend-file,id=ram0,size={size0},share=on,mem-path={ram:ram0}",
		      "-nodefaults", "-display", "none", "-vga", "none", "-qmp", sock2);
	s = kc_sink_open(spec(), &opts, &g, &err);
	CHECK(s, "%s", err.text);
	OK(kc_epoch_begin(s, 1, KC_EPOCH_FULL, &err));
	for (i = 0; i < len / KC_PAGE_SIZE; i++)
		OK(kc_epoch_page(s, 0, i, ram + i * KC_PAGE_SIZE, &err));
	OK(kc_epoch_state(s, state, state_len, stopped, &err));
	OK(kc_epoch_commit(s, &err));
	rc = kc_sink_wait(s, 1, 60000, &err);
	kill(primary, SIGKILL);
	reap(&primary);
	close(fd);
	if (extra) {
		CHECK(rc == -EREMOTEIO && strstr(err.text, "Unknown savevm section"), "%d: %s", rc,
		      err.text);
		kc_sink_close(s);
		return;
	}
	CHECK(!rc, "%d: %s", rc, err.text);
	CHECK(log_has("epoch 1 can be loaded"), "nobody has tried");
	/* Neither that one nor the one that waits has written to the guest's memory. */
	CHECK(wait_for(path_of("qmp2"), 20000), "no QEMU waits");
	poll(NULL, 0, 500);
	read_all(path_of("ram/ram0"), &theirs, &len);
	CHECK(len == 32 << 20 && !memcmp(ram, theirs, len), "QEMU has changed the guest's memory");
	free(theirs);
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	wait_log(stopped ? "stopped as it was" : "the guest runs here");
	fd = qmp_connect(path_of("qmp2"));
	qmp(fd, "{\"execute\":\"qmp_capabilities\"}\n", "return");
	qmp(fd, "{\"execute\":\"query-status\"}\n",
	    stopped ? "\"running\": false" : "\"running\": true");
	qmp(fd, "{\"execute\":\"quit\"}\n", "return");
	CHECK(reap(&standby) == 0, "the standby failed");
	close(fd);
	free(ram);
	free(state);
}

void test_qemu(void)
{
	qemu_takes_over(false, NULL);
}

void test_qemu_stopped(void)
{
	qemu_takes_over(true, NULL);
}

/* The standby's QEMU lacks a device. */
void test_qemu_differs(void)
{
	qemu_takes_over(false, "null");
}

/* --- With something that speaks as QEMU does ------------------------------ */

static void nothing(int sig)
{
	(void)sig;
}

/*
 * The guest was given to QEMU, but does not run there: it is the only one by now.  It outlives the
 * standby, too, and what ends that by the keyboard.
 */
static void taken_over_by(const char *status, const char *why)
{
	char self[PATH_MAX] = "", *pid_file = strdup(path_of("qemu.pid"));
	struct kc_sink *s;
	struct sim g;
	uint8_t *buf;
	size_t len;
	pid_t pid;

	CHECK(readlink("/proc/self/exe", self, sizeof(self) - 1) > 0, "where is this program?");
	/* QEMU is to be found again when the standby is gone. */
	CHECK(!prctl(PR_SET_CHILD_SUBREAPER, 1), "cannot adopt");
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--load-timeout", "2s", "--",
		      self, "--be-qemu", status, pid_file, "{ram0}", "{ram1}");
	s = protected_guest(&g);
	/* It runs in this one. */
	sim_goto(&g, 6);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, 6, 10000, &err));
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	wait_log("but the guest does not run");
	wait_log("taken over at epoch 6");
	CHECK(log_has(why), "it does not say why");
	read_all(pid_file, &buf, &len);
	buf[len] = '\0';
	pid = atoi((char *)buf);
	CHECK(pid > 1 && !kill(pid, 0), "QEMU was killed");
	CHECK(!waitpid(standby, NULL, WNOHANG), "the standby does not attend to QEMU");
	/* Ctrl-C, for all of the group. */
	signal(SIGINT, nothing);
	kill(0, SIGINT);
	CHECK(reap(&standby) == 0 && log_has("leaving QEMU"), "the standby does not end");
	CHECK(!waitpid(pid, NULL, WNOHANG), "QEMU ends with the standby");
	kill(pid, SIGKILL);
	CHECK(waitpid(pid, NULL, 0) == pid, "whose child is QEMU?");
	free(pid_file);
	free(buf);
	sim_free(&g);
}

void test_io_error(void)
{
	taken_over_by("io-error", "its status is not");
}

void test_silent_qemu(void)
{
	taken_over_by("silent", "does not answer to cont");
}
