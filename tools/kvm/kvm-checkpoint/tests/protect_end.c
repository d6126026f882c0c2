// SPDX-License-Identifier: GPL-2.0-only
/*
 * How protect ends, what becomes of a lost link, and of what nobody reads.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "protecting.h"
#include "protect_tests.h"

/* It ended well, and the standby does nothing */
static void must_detach(int status)
{
	CHECK(status == 0, "it ends with %d", status);
	CHECK(qemu.running, "the guest is left stopped");
	wait_log("ends the protection: detached");
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"), "the standby takes over");
	stop_standby(SIGTERM);
}

static int end_signal;

static const char *terminates(struct qemu *q, const char *command)
{
	if (!strcmp(command, CONT) && q->conts == 5)
		kill(q->client, end_signal);
	return NULL;
}

/* What was begun is brought to an end. */
static void end_in_epoch(int sig)
{
	end_signal = sig;
	qemu.hook = terminates;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	must_detach(protect(CHECKED, spec(), "--interval", "1ms"));
	CHECK(snap_of_standby(path_of("ram")) == 4, "the last epoch is missing");
}

void test_term_in_epoch(void)
{
	end_in_epoch(SIGTERM);
}

/* The end of a terminal; the tests may be under nohup themselves. */
void test_hup_in_epoch(void)
{
	signal(SIGHUP, SIG_DFL);
	end_in_epoch(SIGHUP);
}

/* Both of them are under nohup. */
void test_nohup(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	unsigned int conts;

	signal(SIGHUP, SIG_IGN);
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "1ms", NULL);
	serve_until_log("protected since epoch 1");
	kill(qemu.client, SIGHUP);
	kill(standby, SIGHUP);
	conts = qemu.conts;
	while (qemu.conts < conts + 10) {
		CHECK(kc_now_us() < end, "there are no more epochs");
		step(&qemu, 1);
	}
	CHECK(!log_has("stopped; last complete epoch"), "the standby ends");
	kill(qemu.client, SIGTERM);
	must_detach(serve());
}

/* However long it is until the next one. */
void test_term_between(void)
{
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "60m", NULL);
	serve_until_log("protected since epoch 1");
	kill(qemu.client, SIGTERM);
	must_detach(serve());
	CHECK(snap_of_standby(path_of("ram")) == 0, "the last epoch is missing");
	/* And by command. */
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "60m", "--control", path_of("pctl"), NULL);
	serve_until_log("protected since epoch 2");
	CHECK(!run("status", path_of("pctl"), "detach", NULL), "it cannot be told to detach");
	must_detach(serve());
}

void test_term_in_copy(void)
{
	qemu.blocks[0].npages = 8192;
	qemu.hook = stops_standby;
	start_qemu(&qemu);
	guest_writes(&qemu, 30000);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--compress", "none", NULL);
	serve_until_log("full copy:   0%");
	kill(qemu.client, SIGTERM);
	kill(standby, SIGCONT);
	must_detach(serve());
	CHECK(!qemu.stops, "an epoch was taken");
}

/* It waits for a standby. */
void test_term_alone(void)
{
	start_qemu(&qemu);
	/* A port that is free. */
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	stop_standby(SIGTERM);
	start_protect(CHECKED, spec(), NULL);
	serve_until_log("the guest runs on, trying again");
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "it does not end as it was told to");
}

/*
 * The end comes while the link to the standby is lost, and the standby is there again: it has to
 * be told.
 */
static void end_while_lost(bool term, const char *said)
{
	unsigned int i;

	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "1ms", NULL);
	while (qemu.conts < 3)
		step(&qemu, 1);
	stop_standby(SIGKILL);
	serve_until_log("the guest runs on, trying again");
	/* It tries less and less often. */
	for (i = 0; i < 1000; i++)
		step(&qemu, 1);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	if (term) {
		kill(qemu.client, SIGTERM);
	} else {
		send_event(&qemu, "SHUTDOWN");
		die(&qemu);
	}
	CHECK(serve() == 0, "it does not end as it should");
	wait_log(said);
	stop_standby(SIGTERM);
}

void test_shutdown_lost(void)
{
	end_while_lost(false, "ends the protection: its guest shut down");
}

void test_term_lost(void)
{
	end_while_lost(true, "ends the protection: detached");
}

/* Or nobody is there any more that could be told, which must not be taken for a good end. */
static void end_untold(const char *said)
{
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "1ms", "--io-timeout", "2s", NULL);
	while (qemu.conts < 3)
		step(&qemu, 1);
	if (said) {
		kill(standby, SIGKILL);
		serve_until_log(said);
	} else {
		freeze(standby);
	}
	kill(qemu.client, SIGTERM);
	must_fail(serve(), "does not know that the protection has ended");
	kill(standby, SIGKILL);
	reap(&standby);
}

void test_term_untold(void)
{
	end_untold("the guest runs on, trying again");
}

/* The connection is there, but the standby hangs. */
void test_term_unheard(void)
{
	end_untold(NULL);
}

/* The standby ends while QEMU does something that takes long. */
static const char *kills_standby(struct qemu *q, const char *command)
{
	if (!strcmp(command, CONT) && q->conts == 4) {
		stop_standby(SIGKILL);
		poll(NULL, 0, 1000);
	}
	return NULL;
}

void test_link_lost(void)
{
	qemu.hook = kills_standby;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "1ms", "--epochs", "10", NULL);
	serve_until_log("the guest runs on, trying again");
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	CHECK(serve() == 0, "it does not go on with the standby");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "the last epoch is missing");
}

/* When a key has once been right, the one at the other end is that of somebody else for a while. */
void test_other_key(void)
{
	static const char wrong[] = "kvm:100102030405060708090a0b0c0d0e0f\n";
	char own[PATH_MAX];
	uint64_t end;

	strcpy(own, psk);
	key_file = own;
	qemu.hook = kills_standby;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	start_protect(CHECKED, spec(), "--interval", "1ms", "--epochs", "10", NULL);
	serve_until_log("the guest runs on, trying again");
	/* The next standby begins another log, but not for protect. */
	CHECK(!link(path_of("log"), path_of("protect.log")), "cannot link the log");
	snprintf(psk, sizeof(psk), "%s/other.psk", dir);
	write_text(psk, 0600, wrong);
	start_standby(path_of("ram2"), "--no-fence", "--timeout", "0");
	end = kc_now_us() + LIMIT_US;
	while (times_in(path_of("protect.log"), "; the guest runs on, trying again") < 2 ||
	       times_in_log("refused a connection") < 3) {
		CHECK(kc_now_us() < end, "it does not try again");
		step(&qemu, 1);
	}
	CHECK(times_in(path_of("protect.log"), "same identity and key") == 1,
	      "it does not say once that the key is wrong");
	stop_standby(SIGTERM);
	strcpy(psk, own);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	CHECK(serve() == 0, "it does not go on with the standby");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "the last epoch is missing");
	/* But one that was never right is not. */
	qemu.hook = NULL;
	/* For longer than other paths. */
	key_file = strdup(path_of("other.psk"));
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	must_fail(protect(CHECKED, spec()), "; the guest runs on, without protection");
	CHECK(!log_has("trying again"), "it tries again");
	stop_standby(SIGTERM);
}

/* --- Nobody reads what it says -------------------------------------------- */

/* A pipe that is full, and protect writing to it what it would write to this one */
static const char *protect_into(const char *redirect, int *fifo)
{
	char text[3 * PATH_MAX], junk[4096];

	CHECK(!mkfifo(path_of("fifo"), 0600), "mkfifo");
	*fifo = open(path_of("fifo"), O_RDWR | O_NONBLOCK | O_CLOEXEC);
	CHECK(*fifo >= 0, "cannot open the pipe: %s", strerror(errno));
	memset(junk, '\n', sizeof(junk));
	while (write(*fifo, junk, sizeof(junk)) > 0)
		;
	CHECK(errno == EAGAIN, "the pipe is never full");
	snprintf(text, sizeof(text), "#!/bin/sh\nexec %s \"$@\" %s%s/fifo\n", CHECKED, redirect,
		 dir);
	/* For longer than other paths. */
	return strdup(script("protect", text));
}

void test_unread_stdout(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	static char text[1 << 20];
	const char *program_into;
	size_t len = 0, junk;
	ssize_t n;
	int fifo;

	start_qemu(&qemu);
	program_into = protect_into(">", &fifo);
	CHECK(protect(program_into, path_of("store"), "--json", "--interval", "1ms", "--epochs",
		      "50") == 0, "protect fails");
	CHECK(qemu.conts == 51, "%u epochs were taken", qemu.conts);
	/* When somebody reads again, it says how much is missing. */
	start_protect(program_into, path_of("store"), "--json", "--interval", "1ms", NULL);
	while (qemu.conts < 60) {
		CHECK(kc_now_us() < end, "there are no more epochs");
		step(&qemu, 1);
	}
	while (!strstr(text, "{\"event\":\"lost\",\"lines\":") || !strstr(text, "\"epoch\",")) {
		CHECK(kc_now_us() < end && len < sizeof(text) - 1, "it does not say what is lost");
		n = read(fifo, text + len, sizeof(text) - 1 - len);
		if (n > 0)
			len += n;
		/* What it was filled with. */
		junk = strspn(text, "\n");
		len -= junk;
		memmove(text, text + junk, len + 1);
		step(&qemu, 1);
	}
	CHECK(!strncmp(text, "{\"event\":\"lost\"", 15), "it begins with %.40s", text);
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "protect fails");
}

void test_unread_stderr(void)
{
	int fifo;

	/* Of which it tells. */
	qemu.hook = meddles;
	start_qemu(&qemu);
	CHECK(protect(protect_into("2>", &fifo), path_of("store"), "--interval", "1ms", "--epochs",
		      "20") == 0, "protect fails");
	CHECK(qemu.stops == 32, "%u epochs were taken", qemu.stops);
}
