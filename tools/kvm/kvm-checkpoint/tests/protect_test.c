// SPDX-License-Identifier: GPL-2.0-only
/*
 * protect_test [-s SEED] [-t NAME]... KVM-CHECKPOINT CHECKED IMPATIENT
 *
 * kvm-checkpoint protect against a QEMU that is part of this program: it answers to the commands
 * that qemu/qapi/checkpoint.json describes, has a guest that writes to its memory, and remembers
 * what that was at each epoch.  It also can do all that a QEMU should not do.  Prints KTAP.
 *
 * CHECKED is the program built with sanitizers, IMPATIENT as well, and waits only seconds for QEMU.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "protecting.h"
#include "protect_tests.h"

/* --- A good life ---------------------------------------------------------- */

static void test_directory(void)
{
	unsigned int last;

	start_qemu(&qemu);
	protect_epochs(path_of("store"), "20");
	/* The first copy is one more. */
	CHECK(qemu.nr_snaps == 21 && qemu.conts == 21, "%u epochs were taken", qemu.nr_snaps);
	CHECK(check_store(&last) == 21 && last == 20, "epochs are missing");
	/* What was written since is found by comparing. */
	protect_epochs(path_of("store"), "3");
	CHECK(log_has("pages differed"), "everything was copied once more");
	CHECK(check_store(&last) == 25 && last == 24, "epochs are missing");
}

static void test_standby(void)
{
	unsigned int i;

	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	for (i = 1; i < 4; i++) {
		protect_epochs(spec(), "20");
		wait_log("ends the protection: detached");
		stop_standby(SIGTERM);
		CHECK(snap_of_standby(path_of("ram")) == 21 * i - 1, "the last epoch is missing");
		start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	}
}

/* Writes more than what is left for the pause, and less each time */
static const char *writes_much(struct qemu *q, const char *command)
{
	static const unsigned int pages[] = { 3500, 3000, 2500, 2100, 700 };
	unsigned int i;

	if (!strcmp(command, COLLECT) && q->running && q->looks <= 5) {
		for (i = 0; i < pages[q->looks - 1]; i++)
			write_page(&q->blocks[0], i);
	}
	return NULL;
}

static void test_passes(void)
{
	unsigned int last;

	qemu.blocks[0].npages = 4096;
	qemu.hook = writes_much;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "2");
	CHECK(qemu.looks == 5, "it copied the running guest %u times", qemu.looks);
	CHECK(check_store(&last) == 3 && last == 2, "epochs are missing");
}

/* Its owner stops the guest before epoch 5, and lets it go on before epoch 10. */
static const char *owner_stops(struct qemu *q, const char *command)
{
	if (!strcmp(command, STOP) && q->stops == 5)
		q->running = false;
	if (!strcmp(command, STOP) && q->stops == 10)
		q->running = true;
	return NULL;
}

static void test_paused(void)
{
	unsigned int last;

	qemu.hook = owner_stops;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "10");
	/* One of them says that it is stopped; those after it would say nothing. */
	CHECK(check_store(&last) == 11, "idle epochs are kept");
	CHECK(qemu.nr_snaps == 15 && last == 14, "%u epochs were taken", qemu.nr_snaps);
}

/* The layout gets another generation, but is the same. */
static const char *layout_again(struct qemu *q, const char *command)
{
	if (!strcmp(command, COLLECT) && (q->collects == 3 || q->looks == 1))
		q->generation++;
	return NULL;
}

static void test_generation(void)
{
	unsigned int last;

	qemu.hook = layout_again;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "8");
	CHECK(qemu.layouts >= 2, "it did not ask for the new layout");
	CHECK(check_store(&last) == 9 && last == 8, "epochs are missing");
}

/* --- Others meddle -------------------------------------------------------- */

static void test_torn(void)
{
	unsigned int last;

	qemu.hook = meddles;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "20");
	CHECK(qemu.stops == 32, "%u epochs were taken", qemu.stops);
	CHECK(times_in_log("taking another") == 11, "a torn epoch is taken for a whole one");
	CHECK(check_store(&last) == 21 && last == qemu.nr_snaps - 1,
	      "epochs are missing");
}

static const char *meddles_for_ever(struct qemu *q, const char *command)
{
	if (!strcmp(command, STOP) && q->stops > 3)
		q->tear = RESUMED;
	return NULL;
}

static void test_torn_for_ever(void)
{
	qemu.hook = meddles_for_ever;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	must_fail(protect(CHECKED, spec(), "--interval", "1ms"),
		  "during a checkpoint; the guest is without protection");
	CHECK(qemu.stops == 203 && qemu.attaches == 4, "%u attempts, attached %u times", qemu.stops,
	      qemu.attaches);
	CHECK(times_in_log("connecting to QEMU again") == 3, "it did not try again");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == 2, "the last epoch is missing");
}

/* --- QEMU is silent, or dies ---------------------------------------------- */

static const char *victim;
static unsigned int victim_nr;

/* Is it the command that the test is about? */
static bool is_victim(struct qemu *q, const char *command)
{
	unsigned int nr = !strcmp(command, STOP) ? q->stops :
			  !strcmp(command, CONT) ? q->conts :
			  !strcmp(command, COLLECT) ? q->collects : victim_nr;

	return !strcmp(command, victim) && nr == victim_nr;
}

static const char *is_silent(struct qemu *q, const char *command)
{
	return is_victim(q, command) ? silent : NULL;
}

static void silent_at(const char *command)
{
	char text[100];

	victim = command;
	victim_nr = 3;
	qemu.hook = is_silent;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	snprintf(text, sizeof(text), strcmp(command, "greeting") ?
		 "error: QEMU does not answer to %s" :
		 "does not answer: is another client connected?", command);
	must_fail(protect(IMPATIENT, spec(), "--interval", "1ms", "--qemu-timeout", "3s"), text);
	/* It may live: that is for the standby to find out. */
	stop_standby(SIGTERM);
	CHECK(!log_has("ends the protection") && !log_has("guest died"),
	      "the standby was told something");
	CHECK(qemu.running, "the guest is left stopped");
}

static void test_silent_greeting(void)
{
	silent_at("greeting");
}

/* Clients that have given up are in the queue of its monitor, and nobody takes them out. */
static void fill_queue(void)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	unsigned int i;
	int fd;

	snprintf(sun.sun_path, sizeof(sun.sun_path), "%s/qmp", dir);
	for (i = 0; i < 100; i++) {
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		CHECK(fd >= 0, "no socket");
		if (!connect(fd, (struct sockaddr *)&sun, sizeof(sun)))
			continue;
		CHECK(errno == EAGAIN, "cannot connect to %s: %s", sun.sun_path, strerror(errno));
		close(fd);
		return;
	}
	FAIL("its queue is never full");
}

static void test_full_queue(void)
{
	uint64_t end;
	int status;

	start_qemu(&qemu);
	fill_queue();
	start_protect(IMPATIENT, path_of("store"), NULL);
	end = kc_now_us() + LIMIT_US;
	while (waitpid(qemu.client, &status, WNOHANG) != qemu.client) {
		CHECK(kc_now_us() < end, "protect hangs");
		poll(NULL, 0, 10);
	}
	CHECK(WIFEXITED(status), "protect dies of signal %d", WTERMSIG(status));
	must_fail(WEXITSTATUS(status), "does not answer: is another client connected?");
}

static void test_silent_attach(void)
{
	silent_at(ATTACH);
}

static void test_silent_stop(void)
{
	silent_at(STOP);
}

static void test_silent_collect(void)
{
	silent_at(COLLECT);
}

static void test_silent_cont(void)
{
	silent_at(CONT);
}

static const char *dies(struct qemu *q, const char *command)
{
	return is_victim(q, command) ? dead : NULL;
}

static const char *dies_after(struct qemu *q, const char *command)
{
	q->dies_after = is_victim(q, command);
	return NULL;
}

/* A standby takes over when QEMU dies of a command: at which snap */
static unsigned int snap_after(const char *(*hook)(struct qemu *q, const char *command),
			       const char *command, unsigned int nr)
{
	victim = command;
	victim_nr = nr;
	qemu.hook = hook;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	must_fail(protect(CHECKED, spec(), "--interval", "1ms"),
		  "QEMU is gone; the last epoch that counts is");
	CHECK(reap(&standby) == 0 && log_has("the primary's guest died"),
	      "the standby does not take over");
	return snap_of_standby(path_of("ram"));
}

static void test_dies_in_collect(void)
{
	CHECK(snap_after(dies, COLLECT, 6) == 4, "the last epoch is missing");
}

static void test_dies_in_stop(void)
{
	CHECK(snap_after(dies, STOP, 3) == 1, "the last epoch is missing");
}

/* The epoch that was taken last is sent before it is noticed. */
static void test_dies_between(void)
{
	CHECK(snap_after(dies_after, CONT, 5) == 4, "the last epoch is missing");
}

/* While the first epoch is on its way: stops the standby, so that it cannot have arrived */

static void test_dies_in_copy(void)
{
	/* More than what fits into sockets. */
	qemu.blocks[0].npages = 8192;
	qemu.hook = stops_standby;
	start_qemu(&qemu);
	guest_writes(&qemu, 30000);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--compress", "none", NULL);
	serve_until_log("full copy:   0%");
	die(&qemu);
	kill(standby, SIGCONT);
	must_fail(serve(), "QEMU is gone; the last epoch that counts is 0");
	/* There is nothing that it could take over. */
	wait_log("there is no complete epoch of it to go on from");
	CHECK(!waitpid(standby, NULL, WNOHANG), "the standby takes over nothing");
}

/* protect is killed when it has sent three epochs. */
static const char *kills_client(struct qemu *q, const char *command)
{
	if (!strcmp(command, STOP) && q->stops == 4)
		kill(q->client, SIGKILL);
	return NULL;
}

static void test_dies_in_resync(void)
{
	int status;

	qemu.hook = kills_client;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "1ms", NULL);
	while (waitpid(qemu.client, &status, WNOHANG) != qemu.client)
		step(&qemu, 1);
	while (qemu.attached || qemu.monitor >= 0)
		step(&qemu, 1);
	CHECK(qemu.running, "the guest is left stopped");
	wait_log("lost the primary");
	qemu.hook = stops_standby;
	qemu.looks = 0;
	start_protect(CHECKED, spec(), NULL);
	/* The standby does not say which pages it has. */
	while (!qemu.looks)
		step(&qemu, 1);
	die(&qemu);
	kill(standby, SIGCONT);
	must_fail(serve(), "QEMU is gone; the last epoch that counts is 3");
	CHECK(reap(&standby) == 0 && log_has("the primary's guest died"),
	      "the standby does not take over");
	CHECK(snap_of_standby(path_of("ram")) == 2, "it took over at another epoch");
}

/* Only the monitor's connection is lost. */
static const char *hangs_up(struct qemu *q, const char *command)
{
	if (strcmp(command, STOP) || q->stops != 4)
		return NULL;
	close_monitor(q);
	return "";
}

static void test_monitor_lost(void)
{
	unsigned int last;

	qemu.hook = hangs_up;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "8");
	CHECK(times_in_log("connecting to QEMU again") == 1 && qemu.attaches == 2,
	      "it does not connect again");
	CHECK(check_store(&last) == 10 && last == 9, "epochs are missing");
}

static const char *hangs_up_for_long(struct qemu *q, const char *command)
{
	if (!strcmp(command, "greeting") && q->stops == 4)
		poll(NULL, 0, 8000);
	return hangs_up(q, command);
}

/* However long that takes, the standby is to hear that this host lives. */
static void test_monitor_lost_for_long(void)
{
	char fence[PATH_MAX + 50];

	snprintf(fence, sizeof(fence), "#!/bin/sh\n>%s/fenced\n", dir);
	qemu.hook = hangs_up_for_long;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--fence", script("fence", fence), "--timeout", "6s",
		      "--insecure");
	protect_epochs(spec(), "8");
	CHECK(!exists(path_of("fenced")) && !log_has("failing over"),
	      "the host of a guest that runs is fenced");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "the last epoch is missing");
}

/* QEMU refuses something, and is no more when it is asked again. */
static const char *dies_attached_again(struct qemu *q, const char *command)
{
	if (!strcmp(command, COLLECT) && q->collects == 4)
		return "{\"error\": {\"desc\": \"no memory\"}}\n";
	return !strcmp(command, ATTACH) && q->attaches == 2 ? dead : NULL;
}

static void test_dies_attached_again(void)
{
	qemu.hook = dies_attached_again;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "6s", "--insecure");
	must_fail(protect(CHECKED, spec(), "--interval", "1ms"),
		  "QEMU is gone; the guest is without protection");
	wait_log("taken over at epoch 3");
	CHECK(reap(&standby) == 0, "the standby fails");
	CHECK(snap_of_standby(path_of("ram")) == 2, "the last epoch is missing");
}

/* --- The guest is shut down ----------------------------------------------- */

#define EVENT(name) "{\"event\": \"" name "\", \"data\": {\"guest\": true, \"reason\": \"guest-reset\"}}\r\n"

/* QEMU ends in its own way after some answer; the standby would wait so long for it */
static void shut_down(const char *command, unsigned int nr, const char *timeout)
{
	victim = command;
	victim_nr = nr;
	qemu.hook = dies_after;
	qemu.last_words = EVENT("SHUTDOWN");
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", timeout, "--insecure");
	CHECK(protect(CHECKED, spec(), "--interval", "1ms") == 0, "a shutdown is a failure");
	CHECK(log_has("the guest was shut down (guest-reset)"), "it does not say so, or why");
	wait_log("ends the protection: its guest shut down");
	if (strcmp(timeout, "0"))
		poll(NULL, 0, 2500);
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"),
	      "the standby goes on with a guest that was shut down");
	stop_standby(SIGTERM);
}

static void test_shutdown(void)
{
	shut_down(CONT, 4, "2s");
	CHECK(snap_of_standby(path_of("ram")) == 3, "the last epoch is missing");
}

/* In the middle of an epoch, of which nothing remains. */
static void test_shutdown_in_epoch(void)
{
	shut_down(COLLECT, 4, "0");
	CHECK(snap_of_standby(path_of("ram")) == 2, "the last epoch is missing");
}

static void test_shutdown_in_stop(void)
{
	shut_down(STOP, 4, "0");
	CHECK(snap_of_standby(path_of("ram")) == 2, "the last epoch is missing");
}

/* With -no-shutdown the guest may be reset, and run, and die. */
static void test_no_shutdown(void)
{
	qemu.last_words = EVENT("SHUTDOWN") EVENT("RESET") EVENT("RESUME");
	CHECK(snap_after(dies_after, CONT, 4) == 3, "the last epoch is missing");
}

/* --- QEMU refuses --------------------------------------------------------- */

#define ERROR(class, desc) "{\"error\": {\"class\": \"" class "\", \"desc\": \"" desc "\"}}\r\n"

static const char *attach_answer;

static const char *refuses_attach(struct qemu *q, const char *command)
{
	(void)q;
	return strcmp(command, ATTACH) ? NULL : attach_answer;
}

static const char *attached_twice(struct qemu *q, const char *command)
{
	if (!strcmp(command, ATTACH))
		q->attached = q->attaches < 3;
	return NULL;
}

static void test_refused(void)
{
	start_qemu(&qemu);
	qemu.hook = refuses_attach;
	attach_answer = ERROR("GenericError", "disk x has no migration");
	must_fail(protect(CHECKED, path_of("store")),
		  "QEMU refuses x-checkpoint-attach: disk x has no migration");
	attach_answer = ERROR("GenericError", "a client is attached already");
	must_fail(protect(CHECKED, path_of("store")),
		  "QEMU refuses x-checkpoint-attach: a client is attached already");
	CHECK(qemu.attaches > 2, "it does not wait for the other one's end");
	attach_answer = ERROR("CommandNotFound",
			      "The command x-checkpoint-attach has not been found");
	must_fail(protect(CHECKED, path_of("store")), "build it with the patch in qemu/");
	CHECK(!exists(path_of("store")), "it made a directory");
	/* The one before was killed a moment ago. */
	qemu.attaches = 0;
	qemu.hook = attached_twice;
	protect_epochs(path_of("store"), "1");
	CHECK(qemu.attaches == 3, "it attached %u times", qemu.attaches);
}

static void test_disks(void)
{
	start_qemu(&qemu);
	qemu.disks = "[{\"device\": \"cd0\", \"inserted\": {\"ro\": true}}, {\"device\": \"floppy\"}]";
	CHECK(protect(CHECKED, path_of("store"), "--epochs", "1") == 0,
	      "disks that cannot be written are refused");
	qemu.disks = "[{\"device\": \"cd0\", \"inserted\": {\"ro\": true}}, "
		     "{\"device\": \"\", \"qdev\": \"vda\", \"inserted\": {\"ro\": false}}]";
	must_fail(protect(CHECKED, path_of("store"), "--epochs", "1"),
		  "disk vda has 0 bytes: only disks whose size is a multiple of 4096");
	CHECK(qemu.attaches == 1, "it attached first");
	CHECK(protect(CHECKED, path_of("store"), "--epochs", "1", "--disk", "external") == 0,
	      "--disk external does not help");
}

/* --- Garbage -------------------------------------------------------------- */

#define LAYOUT_OF(size, blocks, log, slots) \
	"{\"return\": {\"generation\": 77, \"page-size\": " #size \
	", \"dirty-log\": \"bitmap\", \"blocks\": [" blocks "], \"vm-log\": " log \
	", \"slots\": [" slots "], \"devices\": [], \"ranges\": []}}\n"
#define LAID_OUT(size, blocks) LAYOUT_OF(size, blocks, "false", "")
#define LOGGED(blocks, slots) LAYOUT_OF(4096, blocks, "true", slots)
#define BLOCK(name, pages, shared) \
	"{\"name\": \"" name "\", \"pages\": " #pages ", \"shared\": " #shared "}"
#define SLOT(block, page, pages) \
	"{\"slot\": 0, \"log\": 1, \"block\": " #block ", \"page\": " #page ", \"pages\": " #pages "}"
#define COLLECTED(size, at, runs) \
	"{\"return\": {\"generation\": 1, \"state-size\": " #size ", \"offset\": " #at \
	", \"runs\": " #runs ", \"collect-us\": 1}}\n"
#define CHANGED	"the guest's memory has been changed (plugged?)"

static const struct garbage {
	const char *command, *text, *message;
} garbage[] = {
	{ "greeting", "Hello.\n", "is not a QMP socket" },
	{ "greeting", "[ \"QMP\" ]\n", "is not a QMP socket" },
	{ "qmp_capabilities", "{\"error\": 7}\n", "QEMU refuses qmp_capabilities" },
	{ "query-block", "{\"return\": {}}\n", "QEMU's answer to query-block makes no sense" },
	{ "query-block", "{\"return\": null}\n", "QEMU's answer to query-block makes no sense" },
	{ "qom-list", "{\"return\": {}}\n", "QEMU's answer to qom-list makes no sense" },
	{ "query-cpus-fast", "{\"return\": 7}\n", "QEMU's answer to query-cpus-fast makes no sense" },
	{ ATTACH, "{\"return\": {}}\n", "QEMU's layout makes no sense" },
	{ ATTACH, LAID_OUT(8192, BLOCK("a", 9, true)), "the guest's pages are not of 4096 bytes" },
	{ ATTACH,
	  "{\"return\": {\"generation\": 7, \"page-size\": 4096, \"blocks\": ["
	  BLOCK("a", 9, true) "], \"slots\": [], \"devices\": 3, \"ranges\": []}}\n",
	  "QEMU does not say which devices the guest has" },
	{ ATTACH, LAID_OUT(4096, "1, []"), "MiB of the guest's memory are not shared" },
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 9, true) "," BLOCK("b", 2000, false)),
	  "7 MiB of the guest's memory are not shared" },
	{ ATTACH, LOGGED(BLOCK("a", 9, true) "," BLOCK("b", 9, true), SLOT(0, 0, 9)),
	  "QEMU sent fewer file descriptors than it said" },
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 129, true)), "the file of a is smaller" },
	/* 1 page if only 64 bits of bytes are counted */
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 4503599627370497, true)), "the file of a is smaller" },
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 0, true)), "cannot map a" },
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 9, true) "," BLOCK("a", 9, true)), "two blocks" },
	{ ATTACH, LOGGED(BLOCK("a", 9, true), SLOT(1, 0, 1)), "slots are not in its memory" },
	{ ATTACH, LOGGED(BLOCK("a", 9, true), SLOT(0, 5, 5)), "slots are not in its memory" },
	{ ATTACH, LOGGED(BLOCK("a", 9, true), SLOT(0, 0, 9)), "cannot use the dirty log" },
	{ LAYOUT, LAID_OUT(4096, BLOCK("pc.ram", 100, true) "," BLOCK("/objects/ram1", 77, true)),
	  CHANGED },
	{ LAYOUT, LAID_OUT(4096, BLOCK("pc.ram", 128, true) "," BLOCK("/objects/ram2", 77, true)),
	  CHANGED },
	{ LAYOUT, LAID_OUT(4096, BLOCK("pc.ram", 128, true)), CHANGED },
	/* The same names and sizes, but other files */
	{ LAYOUT, LAID_OUT(4096, BLOCK("pc.ram", 128, true) "," BLOCK("/objects/ram1", 77, true)),
	  CHANGED },
	{ LAYOUT, "{\"error\": {\"desc\": \"not now\"}}\n", "QEMU refuses x-checkpoint-layout: not now" },
	{ COLLECT, "{\"error\": {\"desc\": \"a full disk\"}}\n", COLLECT ": a full disk" },
	{ COLLECT, COLLECTED(16, 64, 1000000), "QEMU wrote less to the buffer than it said" },
	{ COLLECT, COLLECTED(16, 64, 18446744073709551615), "QEMU wrote less" },
	{ COLLECT, COLLECTED(16, 9223372036854775807, 1), "QEMU wrote less" },
	{ COLLECT, COLLECTED(16, 18446744073709551615, 1), "QEMU wrote less" },
	{ COLLECT, COLLECTED(10000000, 64, 0), "QEMU wrote less" },
	{ COLLECT, COLLECTED(100000000000, 64, 0), "QEMU saved 100000000000 bytes of device state" },
	{ COLLECT, COLLECTED(0, 64, 0), "QEMU saved 0 bytes of device state" },
	{ COLLECT, COLLECTED("x", 64, 0), "QEMU saved 0 bytes of device state" },
	{ COLLECT, "{\"return\": null}\n", "QEMU saved 0 bytes of device state" },
	{ STOP, "}{\n", "what QEMU answers to x-checkpoint-stop is no QMP" },
	{ STOP, "[ 1 ]\n", "what QEMU answers to x-checkpoint-stop is no QMP" },
	{ STOP, "{\"return\": {\n", "what QEMU answers to x-checkpoint-stop is no QMP" },
	{ STOP, "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\n", "is no QMP" },
	{ CONT, "null\n", "what QEMU answers to x-checkpoint-cont is no QMP" },
}, *now;

/* In the buffer at 64, unless it is empty */
static struct pages bad_run;

static const char *says_garbage(struct qemu *q, const char *command)
{
	if (!strcmp(now->command, LAYOUT) && !strcmp(command, COLLECT) && !q->running)
		q->generation++;
	/* Which come with file descriptors */
	if (!strcmp(command, ATTACH) || !strcmp(command, LAYOUT) || strcmp(command, now->command) ||
	    (!strcmp(command, COLLECT) && q->running))
		return NULL;
	if (bad_run.npages)
		write_buffer(q, &bad_run, sizeof(bad_run), 64);
	return now->text;
}

static void must_not_swallow(const struct garbage *g)
{
	now = g;
	qemu.layout = strcmp(now->command, ATTACH) ? NULL : now->text;
	qemu.new_layout = strcmp(now->command, LAYOUT) ? NULL : now->text;
	unlink(path_of("log"));
	remove_tree(path_of("store"));
	must_fail(protect(CHECKED, path_of("store"), "--interval", "1ms"), now->message);
}

static void start_little_qemu(void)
{
	qemu.blocks[0].npages = 128;
	qemu.hook = says_garbage;
	start_qemu(&qemu);
}

static void test_garbage(void)
{
	size_t i;

	start_little_qemu();
	for (i = 0; i < sizeof(garbage) / sizeof(garbage[0]); i++)
		must_not_swallow(&garbage[i]);
}

static void test_garbage_runs(void)
{
	static const struct garbage one_run = {
		COLLECT, COLLECTED(16, 64, 1), "pages of memory that was not there before"
	};
	static const struct pages runs[] = {
		{ 0, 2, 127 }, { 0, UINT32_MAX, 1 }, { 0, 1, UINT64_MAX }, { 1, 1, 0 }, { 3, 1, 0 },
	};
	size_t i;

	start_little_qemu();
	for (i = 0; i < sizeof(runs) / sizeof(runs[0]); i++) {
		bad_run = runs[i];
		must_not_swallow(&one_run);
	}
}

/* Until somebody has had enough of it */
static const char *talks_for_ever(struct qemu *q, const char *command)
{
	static char text[1 << 20];

	if (strcmp(command, STOP))
		return NULL;
	memset(text, ' ', sizeof(text));
	while (send(q->monitor, text, sizeof(text), MSG_NOSIGNAL) > 0)
		;
	return silent;
}

static void test_long_line(void)
{
	qemu.hook = talks_for_ever;
	start_qemu(&qemu);
	must_fail(protect(CHECKED, path_of("store")),
		  "what QEMU answers to x-checkpoint-stop is no QMP");
}

/* --- All of them ---------------------------------------------------------- */

static const struct test tests[] = {
	{ "protect_directory", test_directory },
	{ "protect_standby", test_standby },
	{ "protect_passes", test_passes },
	{ "protect_paused", test_paused },
	{ "protect_generation", test_generation },
	{ "protect_torn", test_torn },
	{ "protect_torn_for_ever", test_torn_for_ever },
	{ "protect_silent_greeting", test_silent_greeting },
	{ "protect_full_queue", test_full_queue },
	{ "protect_silent_attach", test_silent_attach },
	{ "protect_silent_stop", test_silent_stop },
	{ "protect_silent_collect", test_silent_collect },
	{ "protect_silent_cont", test_silent_cont },
	{ "protect_dies_in_collect", test_dies_in_collect },
	{ "protect_dies_in_stop", test_dies_in_stop },
	{ "protect_dies_between", test_dies_between },
	{ "protect_dies_in_copy", test_dies_in_copy },
	{ "protect_dies_in_resync", test_dies_in_resync },
	{ "protect_monitor_lost", test_monitor_lost },
	{ "protect_monitor_lost_for_long", test_monitor_lost_for_long },
	{ "protect_dies_attached_again", test_dies_attached_again },
	{ "protect_shutdown", test_shutdown },
	{ "protect_shutdown_in_epoch", test_shutdown_in_epoch },
	{ "protect_shutdown_in_stop", test_shutdown_in_stop },
	{ "protect_no_shutdown", test_no_shutdown },
	{ "protect_refused", test_refused },
	{ "protect_disks", test_disks },
	{ "protect_full_standby", test_full_standby },
	{ "protect_full_standby_dies", test_full_standby_dies },
	{ "protect_no_memory", test_no_memory },
	{ "protect_other_standby", test_other_standby },
	{ "protect_full_store", test_full_store },
	{ "protect_identity", test_identity },
	{ "protect_blip", test_blip },
	{ "protect_blip_set_back", test_blip_set_back },
	{ "protect_blip_other_sender", test_blip_other_sender },
	{ "protect_switchover", test_switchover },
	{ "protect_switchover_stopped", test_switchover_stopped },
	{ "protect_switchover_fails", test_switchover_fails },
	{ "protect_switchover_late", test_switchover_late },
	{ "protect_switchover_unknown", test_switchover_unknown },
	{ "protect_switchover_directory", test_switchover_directory },
	{ "protect_taken_over", test_taken_over },
	{ "protect_taken_over_at_end", test_taken_over_at_end },
	{ "protect_taken_over_resists", test_taken_over_resists },
	{ "protect_garbage", test_garbage },
	{ "protect_garbage_runs", test_garbage_runs },
	{ "protect_long_line", test_long_line },
	{ "protect_term_in_epoch", test_term_in_epoch },
	{ "protect_hup_in_epoch", test_hup_in_epoch },
	{ "protect_nohup", test_nohup },
	{ "protect_term_between", test_term_between },
	{ "protect_term_in_copy", test_term_in_copy },
	{ "protect_term_alone", test_term_alone },
	{ "protect_link_lost", test_link_lost },
	{ "protect_other_key", test_other_key },
	{ "protect_term_lost", test_term_lost },
	{ "protect_term_untold", test_term_untold },
	{ "protect_term_unheard", test_term_unheard },
	{ "protect_shutdown_lost", test_shutdown_lost },
	{ "protect_unread_stdout", test_unread_stdout },
	{ "protect_unread_stderr", test_unread_stderr },
	{ "protect_pairs", test_pairs },
	{ "protect_frozen", test_frozen },
	{ "protect_run_states", test_run_states },
	{ "protect_other_run_states", test_other_run_states },
	{ "protect_first_run_state", test_first_run_state },
	{ "protect_off", test_off },
	{ "protect_goes_slowly", test_goes_slowly },
	{ "protect_lost", test_lost },
	{ "protect_take", test_take },
	{ "protect_take_ready", test_take_ready },
	{ "protect_take_spoilt", test_take_spoilt },
	{ "protect_take_late", test_take_late },
	{ "protect_take_layout", test_take_layout },
	{ "protect_take_stopped", test_take_stopped },
	{ "protect_take_dies_stopped", test_take_dies_stopped },
	{ "protect_take_dies_saved", test_take_dies_saved },
	{ "protect_take_garbage", test_take_garbage },
	{ "protect_take_by_monitor", test_take_by_monitor },
	{ "protect_take_spoilt_by_monitor", test_take_spoilt_by_monitor },
	{ "protect_take_late_by_monitor", test_take_late_by_monitor },
	{ "protect_take_stopped_by_monitor", test_take_stopped_by_monitor },
	{ "protect_take_dies_by_monitor", test_take_dies_by_monitor },
	{ "protect_take_garbage_by_monitor", test_take_garbage_by_monitor },
	{ "protect_take_dies_unsaid", test_take_dies_unsaid },
	{ "protect_take_dies_asked", test_take_dies_asked },
	{ "protect_take_fails", test_take_fails },
	{ "protect_take_ends_in_garbage", test_take_ends_in_garbage },
	{ "protect_blocked", test_blocked },
	{ "protect_discarded", test_discarded },
	{ "protect_holes", test_holes },
	{ "protect_holes_late", test_holes_late },
	{ "protect_holes_standby", test_holes_standby },
	{ "protect_holes_kept", test_holes_kept },
	{ "protect_holes_kept_later", test_holes_kept_later },
	{ "protect_states", test_states },
	{ "protect_states_take", test_states_take },
	{ "protect_states_spoilt", test_states_spoilt },
	{ "protect_states_reports", test_states_reports },
	{ "protect_states_kexec", test_states_kexec },
	{ "protect_states_outside", test_states_outside },
	{ "protect_states_nowhere", test_states_nowhere },
	{ "protect_states_ranges", test_states_ranges },
	{ "protect_states_lies", test_states_lies },
	{ "protect_states_lies_take", test_states_lies_take },
	{ "protect_hints", test_hints },
	{ "protect_hints_garbage", test_hints_garbage },
	{ "protect_hints_long", test_hints_long },
	{ "protect_hints_wrap", test_hints_wrap },
	{ "protect_hints_block", test_hints_block },
	{ "protect_hints_more", test_hints_more },
	{ "protect_hints_offset", test_hints_offset },
	{ "protect_devices", test_devices },
	{ "protect_plugged", test_plugged },
	{ "protect_unplugged", test_unplugged },
	{ "protect_plugged_unseen", test_plugged_unseen },
	{ "protect_plugged_unknown", test_plugged_unknown },
	{ "protect_flush", test_flush },
	{ "protect_lease", test_lease },
	{ "protect_lease_untold", test_lease_untold },
	{ "protect_busy", test_busy },
	{ "protect_busy_term", test_busy_term },
	{ "protect_busy_term_early", test_busy_term_early },
	{ "protect_waits", test_waits },
	{ "protect_net", test_net },
	{ "protect_net_take", test_net_take },
	{ "protect_net_blip", test_net_blip },
	{ "protect_net_epochs", test_net_epochs },
	{ "protect_net_limit", test_net_limit },
	{ "protect_net_limit_acked", test_net_limit_acked },
	{ "protect_net_lease", test_net_lease },
	{ "protect_net_no_epochs", test_net_no_epochs },
	{ "protect_net_reopened", test_net_reopened },
	{ "protect_net_stands_still", test_net_stands_still },
	{ "protect_net_first", test_net_first },
	{ "protect_net_first_lease", test_net_first_lease },
	{ "protect_net_first_alone", test_net_first_alone },
	{ "protect_net_second", test_net_second },
	{ "protect_net_first_dies", test_net_first_dies },
	{ "protect_net_limit_dies", test_net_limit_dies },
	{ "protect_net_first_stopped", test_net_first_stopped },
	{ "protect_net_restarted", test_net_restarted },
	{ "protect_net_given_up", test_net_given_up },
	{ "protect_net_given_up_twice", test_net_given_up_twice },
	{ "protect_net_held_for_others", test_net_held_for_others },
	{ "protect_net_detached", test_net_detached },
	{ "protect_net_shutdown_untold", test_net_shutdown_untold },
	{ "protect_net_taken_over", test_net_taken_over },
	{ "protect_net_switchover", test_net_switchover },
	{ "protect_net_pass", test_net_pass },
	{ "protect_net_directory", test_net_directory },
	{ "protect_net_refused", test_net_refused },
	{ "protect_net_refused_tap", test_net_refused_tap },
	{ "protect_net_unplug_usage", test_net_unplug_usage },
	{ "protect_net_usage", test_net_usage },
	{ "protect_plug", test_plug },
	{ "protect_plug_killed", test_plug_killed },
	{ "protect_plug_qemu_dies", test_plug_qemu_dies },
	{ "protect_plug_restarted", test_plug_restarted },
	{ "protect_plug_unplugged", test_plug_unplugged },
	{ "protect_plug_removed", test_plug_removed },
	{ "protect_plug_refused_later", test_plug_refused_later },
	{ "protect_plug_guard_unheard", test_plug_guard_unheard },
	{ "protect_plug_guard_fails", test_plug_guard_fails },
	{ "protect_plug_guard_slow", test_plug_guard_slow },
	{ "protect_plug_paused", test_plug_paused },
	{ "protect_plug_refused_ingress", test_plug_refused_ingress },
	{ "protect_unplug_others", test_unplug_others },
	{ "protect_unplug_locked", test_unplug_locked },
	{ "protect_disk", test_disk },
	{ "protect_disk_take", test_disk_take },
	{ "protect_disk_sparse", test_disk_sparse },
	{ "protect_disk_store", test_disk_store },
	{ "protect_disk_blip", test_disk_blip },
	{ "protect_disk_set_back", test_disk_set_back },
	{ "protect_disk_long_blip", test_disk_long_blip },
	{ "protect_disk_resumed", test_disk_resumed },
	{ "protect_disk_resumed_killed", test_disk_resumed_killed },
	{ "protect_disk_not_resumed", test_disk_not_resumed },
	{ "protect_disk_killed", test_disk_killed },
	{ "protect_disk_job_ends", test_disk_job_ends },
	{ "protect_disk_job_ends_again", test_disk_job_ends_again },
	{ "protect_disk_fails", test_disk_fails },
	{ "protect_disk_frozen", test_disk_frozen },
	{ "protect_disk_frozen_shortly", test_disk_frozen_shortly },
	{ "protect_disk_switchover", test_disk_switchover },
	{ "protect_disk_full", test_disk_full },
	{ "protect_disk_refused", test_disk_refused },
	{ "protect_disk_no_job", test_disk_no_job },
	{ "protect_disk_images", test_disk_images },
	{ "protect_disk_locked", test_disk_locked },
	{ "protect_disk_garbage", test_disk_garbage },
	{ "protect_disk_usage", test_disk_usage },
	{ "protect_core", test_core },
};

int main(int argc, char **argv)
{
	static const struct suite suite = {
		.tests = tests, .nr_tests = sizeof(tests) / sizeof(tests[0]),
		.usage = "KVM-CHECKPOINT CHECKED IMPATIENT", .nr_programs = 3, .jobs = 4,
	};

	return run_tests(&suite, argc, argv);
}
