// SPDX-License-Identifier: GPL-2.0-only
/*
 * Epochs by one command, x-checkpoint-take, and all that can go wrong within it.
 */
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "protecting.h"
#include "protect_tests.h"

static unsigned int last, nr_told;

/* By the monitor, as with a QEMU that has the command, and does not hear on the socket */
static void by_monitor(void (*test)(void))
{
	qemu.deaf = true;
	test();
	CHECK(!qemu.times_asked, "a QEMU that does not hear is asked on the socket");
}

static void take_epochs(unsigned int n)
{
	char text[12];

	snprintf(text, sizeof(text), "%u", n);
	qemu.takes = true;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), text);
}

void test_take(void)
{
	take_epochs(20);
	check_store(&last);
	CHECK(qemu.nr_taken == 21 && !qemu.stops && last == 20, "%u epochs by one command, %u by three",
	      qemu.nr_taken, qemu.stops);
	CHECK(qemu.nr_snaps == 21, "%u epochs were taken", qemu.nr_snaps);
	CHECK(qemu.deaf || qemu.times_asked == 21, "it is asked %u times on the socket",
	      qemu.times_asked);
}

void test_take_by_monitor(void)
{
	by_monitor(test_take);
}

/* Memory for copies is there before the guest stands still: 8 MiB of it, for a start */
static unsigned long rss_pages[2];

static bool looks_at_memory(struct qemu *q, struct told *told)
{
	char path[64];
	FILE *f;

	if (told->what != TOLD_STOPPED || nr_told == 2)
		return true;
	snprintf(path, sizeof(path), "/proc/%d/statm", q->client);
	f = fopen(path, "r");
	CHECK(f && fscanf(f, "%*u %lu", &rss_pages[nr_told]) == 1, "no memory of protect's");
	fclose(f);
	nr_told++;
	return true;
}

void test_take_ready(void)
{
	qemu.tells = looks_at_memory;
	take_epochs(4);
	check_store(&last);
	CHECK(nr_told == 2 && rss_pages[1] < rss_pages[0] + 1024,
	      "protect had %lu pages when the guest was stopped, and %lu the next time", rss_pages[0],
	      rss_pages[1]);
}

/* --- It comes to nothing -------------------------------------------------- */

/* Twice, when there are some epochs */
static bool now_and_then(const struct told *told)
{
	nr_told += told->what == TOLD_SAVED;
	return told->what == TOLD_SAVED && (nr_told == 4 || nr_told == 9);
}

static bool spoils(struct qemu *q, struct told *told)
{
	if (now_and_then(told))
		q->spoilt_by = "run-state";
	return true;
}

void test_take_spoilt(void)
{
	qemu.tells = spoils;
	take_epochs(20);
	CHECK(times_in_log("about to stop or to be reset during a checkpoint: taking another") == 2,
	      "it does not say twice what happened");
	check_store(&last);
	CHECK(qemu.nr_taken == 21 && last == 22, "%u epochs were taken, the last is %u",
	      qemu.nr_taken, last);
}

/* In the midst of it, until it is too late */
static bool freezes(struct qemu *q, struct told *told)
{
	if (now_and_then(told)) {
		kill(q->client, SIGSTOP);
		/* It has not got it yet, or not what came before */
		poll(NULL, 0, 400);
		kill(q->client, SIGCONT);
		q->spoilt_by = "late";
	}
	return true;
}

void test_take_late(void)
{
	qemu.tells = freezes;
	qemu.takes = true;
	start_qemu(&qemu);
	CHECK(protect(CHECKED, path_of("store"), "--epochs", "20", "--interval", "1ms",
		      "--pause-limit", "300ms") == 0, "protect fails");
	CHECK(qemu.nr_taken >= 21, "%u epochs were taken", qemu.nr_taken);
	CHECK(times_in_log("took longer than the 300 ms of --pause-limit") >= 2,
	      "it does not say what happened");
	check_store(&last);
}

/* Slots come: QEMU cannot be asked about them before it goes on. */
static bool moves(struct qemu *q, struct told *told)
{
	if (now_and_then(told)) {
		q->generation++;
		told->generation++;
	}
	return true;
}

void test_take_layout(void)
{
	qemu.tells = moves;
	take_epochs(20);
	CHECK(qemu.layouts == 2, "the layout was asked for %u times", qemu.layouts);
	CHECK(times_in_log("memory slots have been changed: taking another") == 2,
	      "it does not say what happened");
	check_store(&last);
}

/* The guest is stopped by its owner, and later resumed: then it is the three commands. */
static const char *owner_stops(struct qemu *q, const char *command)
{
	if (!strcmp(command, TAKE) && q->nr_taken == 4)
		q->running = false;
	if (!strcmp(command, STOP) && q->stops == 3) {
		q->running = true;
		q->nr_taken++;
	}
	return NULL;
}

void test_take_stopped(void)
{
	qemu.hook = owner_stops;
	take_epochs(12);
	CHECK(qemu.stops >= 3 && qemu.nr_taken > 5, "%u epochs by one command, %u by three",
	      qemu.nr_taken, qemu.stops);
	check_store(&last);
}

/* --- QEMU is not what it should be ---------------------------------------- */

/* It dies when it has stopped the guest, or has saved its state. */
static unsigned int dies_at;

static bool dies(struct qemu *q, struct told *told)
{
	if (told->what != dies_at || ++nr_told != 4)
		return true;
	die(q);
	q->takes = false;
	return false;
}

static void die_at(unsigned int what)
{
	dies_at = what;
	nr_told = 0;
	qemu.tells = dies;
	qemu.takes = true;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	must_fail(protect(CHECKED, spec(), "--interval", "1ms"), "QEMU is gone");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) <= 3, "an epoch counts that was not taken to its end");
}

void test_take_dies_stopped(void)
{
	die_at(TOLD_STOPPED);
}

void test_take_dies_saved(void)
{
	die_at(TOLD_SAVED);
}

/* Which of @n comes next, in the place of what should come; none of them: -1 */
static int next_nonsense(unsigned int n)
{
	if (nr_told && nr_told <= n)
		return nr_told++ - 1;
	nr_told += !nr_told;
	return -1;
}

static void hears_nonsense(unsigned int n)
{
	unsigned int i;

	nr_told = 0;
	qemu.takes = true;
	start_qemu(&qemu);
	/* It ends when that has come thrice in a row, and begins anew */
	for (i = 0; i < 6 && nr_told <= n; i++)
		protect(CHECKED, path_of("store"), "--epochs", "3", "--interval", "1ms");
	CHECK(nr_told > n, "only %u of it were heard", nr_told);
	CHECK(protect(CHECKED, path_of("store"), "--epochs", "3", "--interval", "1ms") == 0,
	      "protect fails when QEMU makes sense again");
	check_store(&last);
}

/* Of what it is, or of what it says of it */
static bool babbles(struct qemu *q, struct told *told)
{
	static const struct told nonsense[] = {
		{ .what = 0 },
		{ .what = 4 },
		{ .what = -1ULL },
		{ .what = TOLD_STOPPED, .generation = 1, .state_size = 2, .offset = 3, .runs = 4, .collect_us = 5, .packets = 6 },
		{ .what = TOLD_SAVED, .generation = 1, .state_size = -1ULL, .packets = -1ULL },
		{ .what = TOLD_SAVED, .generation = 1, .state_size = 100, .offset = -1ULL, .runs = 7, .packets = -1ULL },
		{ .what = TOLD_SAVED, .generation = 1, .state_size = 100, .runs = -1ULL, .packets = -1ULL },
		{ .what = TOLD_SAVED, .generation = 1, .packets = -1ULL },
		{ .what = TOLD_SAVED, .generation = 1, .state_size = 1ULL << 40, .packets = -1ULL },
	};

	int i = told->what == TOLD_SAVED ? next_nonsense(sizeof(nonsense) / sizeof(*told)) : -1;

	if (i < 0)
		return true;
	*told = nonsense[i];
	/* Who lies about pages, and makes sense, is believed */
	told->generation = q->generation;
	q->snaps[q->nr_snaps - 1].torn = true;
	return true;
}

void test_take_garbage(void)
{
	qemu.tells = babbles;
	hears_nonsense(9);
}

void test_take_spoilt_by_monitor(void)
{
	by_monitor(test_take_spoilt);
}

void test_take_late_by_monitor(void)
{
	by_monitor(test_take_late);
}

void test_take_stopped_by_monitor(void)
{
	by_monitor(test_take_stopped);
}

void test_take_dies_by_monitor(void)
{
	by_monitor(test_take_dies_saved);
}

void test_take_garbage_by_monitor(void)
{
	by_monitor(test_take_garbage);
}

/* --- How it has ended, on the socket --------------------------------------- */

static void dies_in_fourth(void)
{
	nr_told = 0;
	qemu.takes = true;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	must_fail(protect(CHECKED, spec(), "--interval", "1ms"), "QEMU is gone");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) <= 3, "an epoch counts that was not taken to its end");
}

static bool dies_unsaid(struct qemu *q, struct ended *ended)
{
	(void)ended;
	if (++nr_told != 4)
		return true;
	die(q);
	q->takes = false;
	return false;
}

/* It dies when all is copied: that epoch does not count, as nobody knows that it was whole */
void test_take_dies_unsaid(void)
{
	qemu.ends = dies_unsaid;
	dies_in_fourth();
}

/* It dies when it is asked */
static const char *dies_asked(struct qemu *q, const char *command)
{
	if (strcmp(command, TAKE) || ++nr_told != 4)
		return NULL;
	q->takes = false;
	return dead;
}

void test_take_dies_asked(void)
{
	qemu.hook = dies_asked;
	dies_in_fourth();
}

static bool fails(struct qemu *q, struct ended *ended)
{
	if (++nr_told == 4) {
		q->snaps[q->nr_snaps - 1].torn = true;
		ended->flags = ENDED_FAILED;
		/* As long as can be, without an end */
		memset(ended->why, 'x', sizeof(ended->why));
		memcpy(ended->why, "no room", 7);
	}
	return true;
}

/* Something in QEMU fails: what it says is told, and all is begun anew */
void test_take_fails(void)
{
	nr_told = 0;
	qemu.ends = fails;
	take_epochs(20);
	CHECK(times_in_log("QEMU refuses " TAKE ": no roomxx") >= 1, "it does not say what failed");
	CHECK(qemu.attaches == 2, "it begins anew %u times", qemu.attaches - 1);
	check_store(&last);
}

static bool babbles_at_end(struct qemu *q, struct ended *ended)
{
	static const struct ended nonsense[] = {
		{ .what = 0, .flags = 7 },
		{ .what = TOLD_SAVED, .flags = 7 },
		{ .what = 4, .flags = 7 },
		{ .what = -1ULL, .flags = -1ULL },
		{ .what = TOLD_ENDED, .flags = -1ULL },
		{ .what = TOLD_ENDED, .flags = 0 },
	};

	int i = next_nonsense(sizeof(nonsense) / sizeof(*ended));

	if (i < 0)
		return true;
	*ended = nonsense[i];
	q->snaps[q->nr_snaps - 1].torn = true;
	return true;
}

void test_take_ends_in_garbage(void)
{
	qemu.ends = babbles_at_end;
	hears_nonsense(6);
}
