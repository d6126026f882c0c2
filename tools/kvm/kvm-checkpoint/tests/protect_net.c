// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the guest sends leaves QEMU when the epoch that knows of it is acknowledged, and not before.
 */
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "protecting.h"
#include "protect_tests.h"

#define ONE_CARD "[\"net0\"]"

/* Of the standby */
#define UNHELD "is not failed over to, unless told to by promote-anyway"
#define NOT_FROM_THERE "promote-anyway goes on from it nevertheless"

/* Whether it can hold them it has found out before, and has let go what somebody else may have held */
static void until_protected(void)
{
	serve_until_log("protected since");
	CHECK(qemu.holds && qemu.holds_begun == 2 && qemu.released_all == 1,
	      "protected: %u times held, %u times released", qemu.holds_begun, qemu.released_all);
	qemu.holds_begun = 1;
	qemu.released_all = 0;
}

static void begin(const char *option, const char *value)
{
	qemu.cards = ONE_CARD;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure", "--control",
		      path_of("ctl"));
	start_protect(CHECKED, spec(), "--interval", "5ms", option, value, NULL);
	if (option && !strcmp(option, "--net"))
		serve_until_log("protected since");
	else
		until_protected();
}

static void until_released(uint64_t packets)
{
	uint64_t end = kc_now_us() + LIMIT_US;

	while (qemu.released < packets) {
		CHECK(kc_now_us() < end, "nothing is released after %" PRIu64, qemu.released);
		step(&qemu, 1);
	}
}

static void finish(int status)
{
	int rc;

	kill(qemu.client, SIGTERM);
	rc = serve();
	CHECK(rc == status, "it ends with %d", rc);
	stop_standby(SIGTERM);
}

/* While the standby is silent, no more than what it has acknowledged before */
static void held_while_silent(void)
{
	uint64_t packets;

	until_released(5);
	freeze(standby);
	/* An acknowledgement may be under way */
	be_qemu_until_asleep(qemu.client);
	packets = qemu.released;
	be_qemu_for(400);
	CHECK(qemu.released == packets && !qemu.released_all,
	      "%" PRIu64 " is released, and the standby is silent", qemu.released);
	CHECK(qemu.packets > packets, "there is nothing to hold");
	kill(standby, SIGCONT);
	until_released(packets + 3);
	CHECK(qemu.holds_begun == 1, "it begins to hold packets %u times", qemu.holds_begun);
}

/* The guest has sent something since the last state: QEMU says so once */
static void sends(void)
{
	const uint64_t one = 1;

	CHECK(qemu.got_notify >= 0, "it does not want to know of packets");
	CHECK(write(qemu.got_notify, &one, sizeof(one)) == sizeof(one), "it cannot be told");
}

/* There would be no epoch for an hour: each is one for packets, and its acknowledgement lets them go */
void test_net_epochs(void)
{
	uint64_t before, i;

	qemu.cards = ONE_CARD;
	qemu.takes = true;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure", "--control",
		      path_of("ctl"));
	start_protect(CHECKED, spec(), "--interval", "3600s", "--packet-epochs", NULL);
	until_protected();
	until_released(1);
	for (i = 0; i < 20; i++) {
		be_qemu_for(below(20));
		before = qemu.packets;
		sends();
		until_released(before + 1);
	}
	CHECK(qemu.packets <= 1 + 2 * 20, "%" PRIu64 " epochs for 20 packets", qemu.packets);
	be_qemu_until_asleep(qemu.client);
	before = qemu.packets;
	be_qemu_for(300);
	CHECK(qemu.packets == before, "there are epochs without packets");

	/* Not one after the other into a link that nothing comes back from */
	freeze(standby);
	sends();
	be_qemu_until_asleep(qemu.client);
	before = qemu.packets;
	sends();
	be_qemu_for(300);
	CHECK(qemu.packets == before, "an epoch begins that others are in the way of");
	kill(standby, SIGCONT);
	until_released(before + 1);
	finish(0);
}

void test_net(void)
{
	begin(NULL, NULL);
	held_while_silent();
	finish(0);
	CHECK(qemu.released_all == 1 && !qemu.dropped_all, "it leaves packets behind");
}

void test_net_take(void)
{
	qemu.takes = true;
	begin(NULL, NULL);
	held_while_silent();
	be_qemu_for_epochs(8);
	CHECK(qemu.nr_taken > 5, "%u epochs by one command", qemu.nr_taken);
	finish(0);
}

static void lose_standby(void)
{
	until_released(5);
	stop_standby(SIGKILL);
}

/* It comes back in time. */
void test_net_blip(void)
{
	uint64_t packets;

	begin("--net-limit", "60s");
	lose_standby();
	be_qemu_for(300);
	packets = qemu.released;
	CHECK(!qemu.released_all, "packets are released, and nobody has acknowledged them");
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	until_released(packets + 3);
	CHECK(!qemu.released_all && qemu.holds_begun == 1, "packets have left in between");
	finish(0);
}

static void until_all_released(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;

	while (!qemu.released_all) {
		CHECK(kc_now_us() < end, "packets are held for ever");
		step(&qemu, 1);
	}
}

/* It does not: but later. */
void test_net_limit(void)
{
	uint64_t t, packets;

	begin("--net-limit", "700ms");
	CHECK(qemu.limit_ms == 700, "QEMU is told %u ms", qemu.limit_ms);
	lose_standby();
	t = kc_now_us();
	until_all_released();
	/* What was confirmed last may have been sent some epochs earlier. */
	CHECK(kc_now_us() - t > 300000, "they are released after %" PRIu64 " us", kc_now_us() - t);
	CHECK(log_has("is not held back any more"), "it does not say so");
	packets = qemu.released;
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	until_released(packets + 3);
	CHECK(log_has(UNHELD), "the standby does not know that they are");
	/* Once it was looked whether they can be held */
	CHECK(qemu.holds_begun == 3 && qemu.released_all == 2, "%u times held, %u times released",
	      qemu.holds_begun, qemu.released_all);
	finish(0);
}

/*
 * The last acknowledgement and the end of the link come at once: what it lets go is no reason not to
 * count from then on.
 */
void test_net_limit_acked(void)
{
	uint64_t packets;

	begin("--net-limit", "700ms");
	until_released(5);
	freeze(standby);
	be_qemu_until_asleep(qemu.client);
	packets = qemu.released;
	freeze(qemu.client);
	kill(standby, SIGCONT);
	/* What it has been sent it acknowledges. */
	be_qemu_until_asleep(standby);
	stop_standby(SIGKILL);
	kill(qemu.client, SIGCONT);
	until_all_released();
	CHECK(qemu.released > packets, "nothing was acknowledged at last: this test shows nothing");
	kill(qemu.client, SIGKILL);
}

/* With a lease the guest stands still when that is over, and the standby may run it. */
void test_net_lease(void)
{
	qemu.cards = ONE_CARD;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "2s", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "5ms", "--net-limit", "100ms", "--lease",
		      "1s", NULL);
	until_protected();
	lose_standby();
	be_qemu_for(1000);
	CHECK(!qemu.released_all, "packets are released, and the standby may run the guest");
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 1 && !qemu.released_all && !qemu.dropped_all,
	      "it does not know who runs the guest, and decides about its packets");
}

/* The guest runs, and there can be no epochs of it. */
void test_net_no_epochs(void)
{
	begin("--net-limit", "300ms");
	until_released(5);
	qemu.blocked = "a share is mounted";
	until_all_released();
	/* The standby is there, and has no epoch that it may take over from now. */
	CHECK(log_has(UNHELD), "packets leave that the standby's epoch does not know of");
	CHECK(run("status", path_of("ctl"), "promote", NULL) == 1 && log_has(NOT_FROM_THERE),
	      "it can be promoted");
	CHECK(log_has("no epochs for now"), "it does not say why");
	qemu.blocked = NULL;
	until_released(qemu.released + 3);
	CHECK(qemu.holds_begun == 2, "it does not begin to hold packets again");
	finish(0);
}

/* It stands still, and so sends nothing: what it has sent before can wait. */
void test_net_stands_still(void)
{
	begin("--net-limit", "300ms");
	until_released(5);
	qemu.running = false;
	qemu.run_state = "internal-error";
	serve_until_log("no epochs for now");
	be_qemu_for(1000);
	CHECK(!qemu.released_all && !log_has(UNHELD),
	      "packets are released, and the standby would go on from before they were sent");
	qemu.run_state = NULL;
	qemu.running = true;
	until_released(qemu.released + 3);
	CHECK(qemu.holds_begun == 1 && !qemu.released_all, "packets have left in between");
	finish(0);
}

/* QEMU has forgotten its client: it holds what it has, and is told to go on. */
static const char *fails_once(struct qemu *q, const char *command)
{
	static bool failed;

	if (strcmp(command, STOP) || q->stops != 6 || failed)
		return NULL;
	failed = true;
	return "{\"error\": {\"desc\": \"not now\"}}\n";
}

void test_net_reopened(void)
{
	qemu.hook = fails_once;
	begin(NULL, NULL);
	until_released(12);
	CHECK(qemu.attaches == 2 && qemu.holds_begun == 2 && !qemu.released_all,
	      "%u times attached, %u times begun", qemu.attaches, qemu.holds_begun);
	finish(0);
}

/* --- From which epoch on ---------------------------------------------------- */

/* When the last part of the first epoch is taken the standby is about to try it for a while. */
static uint64_t lease_of_second;

static const char *standby_tries(struct qemu *q, const char *command)
{
	if (!strcmp(command, CONT) && q->stops == 1)
		freeze(standby);
	if (!strcmp(command, CONT) && q->stops == 2)
		lease_of_second = q->lease_us;
	return NULL;
}

static void first(const char *lease, const char *timeout)
{
	uint64_t cont_us;

	qemu.cards = ONE_CARD;
	qemu.hook = standby_tries;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", timeout, "--insecure", "--control",
		      path_of("ctl"));
	start_protect(CHECKED, spec(), "--interval", "5ms", "--control", path_of("pctl"), lease,
		      lease ? "10s" : NULL, NULL);
	while (!qemu.nr_snaps)
		step(&qemu, 1);
	be_qemu_for(500);
	CHECK(!qemu.holds && !qemu.packets,
	      "packets are held, and nobody would take over from before they were sent");
	CHECK(qemu.nr_snaps == 1, "%u epochs wait", qemu.nr_snaps);
	CHECK(!log_has("protected since"), "it says that the guest is protected");
	CHECK(!run("status", path_of("pctl"), NULL) && log_has("not held back"),
	      "it does not show that packets pass");
	CHECK(!qemu.lease_us, "the guest would stand still when its lease is over");
	cont_us = kc_boot_us();
	kill(standby, SIGCONT);
	until_protected();
	/* And not one that was nearly over, or is */
	CHECK(lease ? lease_of_second >= cont_us + 10000000 : !lease_of_second,
	      "the lease ends %" PRId64 " us after the trial", lease_of_second - cont_us);
	until_released(5);
	finish(0);
}

void test_net_first(void)
{
	first(NULL, "0");
}

/* What no standby takes over from needs no lease, and may take longer than that. */
void test_net_first_lease(void)
{
	first("--lease", "15s");
}

/* It is killed when it takes an epoch: the one before has arrived. */
static unsigned int kill_at;

static const char *dies_in_epoch(struct qemu *q, const char *command)
{
	if (!strcmp(command, STOP) && q->stops == kill_at) {
		/* All that was sent arrives before the connection is reset. */
		poll(NULL, 0, 100);
		CHECK(!run("status", path_of("ctl"), NULL), "the standby does not answer");
		kill(q->client, SIGKILL);
		CHECK(waitpid(q->client, NULL, 0) == q->client, "it does not die");
		kill_at = 0;
	}
	return NULL;
}

/* When it begins with the @at-th: what came before has arrived */
static void die_at(unsigned int at)
{
	qemu.cards = ONE_CARD;
	qemu.hook = dies_in_epoch;
	kill_at = at;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--fence", fence(), "--timeout", "300ms", "--insecure",
		      "--control", path_of("ctl"));
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	while (kill_at)
		step(&qemu, 1);
}

/* Clients may know more than the first one. */
void test_net_first_alone(void)
{
	unsigned int snap;
	uint64_t epoch;

	die_at(2);
	wait_log("lost the primary");
	CHECK(log_has("receiving, but nothing to fail over to yet"), "it does not show that");
	be_qemu_for(1500);
	CHECK(!exists(path_of("fenced")), "it fails over to an epoch from before packets were held");
	CHECK(run("status", path_of("ctl"), "promote", NULL) == 1 && log_has(NOT_FROM_THERE),
	      "it can be promoted");
	/* That is not forgotten. */
	stop_standby(SIGKILL);
	epoch = ram_epoch(path_of("ram"));
	CHECK(epoch == 1, "it has epoch %" PRIu64, epoch);
	start_standby(path_of("ram"), "--fence", fence(), "--timeout", "300ms", "--insecure",
		      "--control", path_of("ctl"), "--failover-after-restart", "1m");
	be_qemu_for(1000);
	CHECK(!exists(path_of("fenced")) && log_has(NOT_FROM_THERE),
	      "it fails over to an epoch from before packets were held, after a restart");
	CHECK(run("status", path_of("ctl"), "promote", NULL) == 1, "it can be promoted now");
	CHECK(!run("status", path_of("ctl"), "promote-anyway", NULL), "promote-anyway fails");
	CHECK(reap(&standby) == 0 && exists(path_of("fenced")), "it does not go on anyway");
	snap = snap_of_standby(path_of("ram"));
	CHECK(!snap, "it goes on from epoch %u", snap);
}

/* The second one has all that was sent before it, and all after it is held. */
void test_net_second(void)
{
	die_at(3);
	CHECK(reap(&standby) == 0 && exists(path_of("fenced")), "it does not take over");
	CHECK(snap_of_standby(path_of("ram")) == 1, "from another epoch");
	CHECK(qemu.holds, "packets leave");
}

/* QEMU dies: the standby is told, and has the first epoch alone. */
static const char *qemu_dies(struct qemu *q, const char *command)
{
	return !strcmp(command, STOP) && q->stops == 2 ? dead : NULL;
}

void test_net_first_dies(void)
{
	qemu.cards = ONE_CARD;
	qemu.hook = qemu_dies;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--fence", fence(), "--timeout", "300ms", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	CHECK(serve() == 1, "it does not fail");
	wait_log("the primary says that its guest died");
	wait_log(NOT_FROM_THERE);
	be_qemu_for(1000);
	CHECK(!exists(path_of("fenced")), "it fails over to an epoch from before packets were held");
	stop_standby(SIGTERM);
}

/* Packets have left while the link was lost: not from the epoch of before, nor from the next one. */
void test_net_limit_dies(void)
{
	begin("--net-limit", "200ms");
	lose_standby();
	until_all_released();
	qemu.hook = dies_in_epoch;
	/* The first one that is sent, and the last one that counts for nothing */
	kill_at = qemu.stops + 2;
	start_standby(path_of("ram"), "--fence", fence(), "--timeout", "300ms", "--insecure",
		      "--control", path_of("ctl"));
	while (kill_at)
		step(&qemu, 1);
	be_qemu_for(1500);
	CHECK(log_has(UNHELD) && !exists(path_of("fenced")),
	      "it fails over to an epoch that clients know more than");
	CHECK(run("status", path_of("ctl"), "promote", NULL) == 1, "it can be promoted");
	stop_standby(SIGTERM);
}

/* The guest stands still, and its epochs are all the same: there is one that counts nevertheless. */
void test_net_first_stopped(void)
{
	qemu.cards = ONE_CARD;
	start_qemu(&qemu);
	qemu.running = false;
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure", "--control",
		      path_of("ctl"));
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	until_protected();
	kill(qemu.client, SIGKILL);
	CHECK(waitpid(qemu.client, NULL, 0) == qemu.client, "it does not die");
	CHECK(!run("status", path_of("ctl"), "promote", NULL), "promote fails");
	CHECK(reap(&standby) == 0, "the standby fails");
}

/* Killed, and started again: what QEMU holds is its own before it copies anything, and kept. */
static unsigned int holds_at_first_look;

static const char *looks_when_held(struct qemu *q, const char *command)
{
	if (!strcmp(command, COLLECT) && !holds_at_first_look)
		holds_at_first_look = q->holds_begun;
	return NULL;
}

void test_net_restarted(void)
{
	begin("--net-limit", "60s");
	until_released(3);
	kill(qemu.client, SIGKILL);
	CHECK(waitpid(qemu.client, NULL, 0) == qemu.client, "it does not die");
	be_qemu_for(100);
	qemu.hook = looks_when_held;
	start_protect(CHECKED, spec(), "--interval", "5ms", "--net-limit", "60s", NULL);
	until_released(qemu.packets + 1);
	CHECK(holds_at_first_look == 2 && qemu.holds_begun == 2 && !qemu.released_all,
	      "%u times held when it begins to copy", holds_at_first_look);
	finish(0);
}

static void kill_client(void)
{
	kill(qemu.client, SIGKILL);
	CHECK(waitpid(qemu.client, NULL, 0) == qemu.client, "it does not die");
	be_qemu_for(100);
}

/* A new one begins to copy, and dies before it has sent an epoch */
static bool has_looked;

static const char *dies_when_it_looks(struct qemu *q, const char *command)
{
	if (strcmp(command, COLLECT) || has_looked)
		return NULL;
	has_looked = true;
	/* What it has said arrives */
	poll(NULL, 0, 100);
	CHECK(!run("status", path_of("ctl"), NULL), "the standby does not answer");
	kill(q->client, SIGKILL);
	CHECK(waitpid(q->client, NULL, 0) == q->client, "it does not die");
	return NULL;
}

static void begin_again(void)
{
	has_looked = false;
	qemu.hook = dies_when_it_looks;
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	while (!has_looked)
		step(&qemu, 1);
	be_qemu_for(100);
	qemu.hook = NULL;
}

static void promote_fails(const char *why)
{
	CHECK(log_has(UNHELD) && run("status", path_of("ctl"), "promote", NULL) == 1 &&
	      log_has(NOT_FROM_THERE), "it can be promoted: %s", why);
}

/* QEMU has given up what it held for one that is gone: clients know more than the standby's epoch. */
void test_net_given_up(void)
{
	begin(NULL, NULL);
	until_released(3);
	kill_client();
	let_go(&qemu);
	CHECK(!log_has(UNHELD), "the standby has heard of it too soon: this test shows nothing");
	begin_again();
	promote_fails("packets have left since");
	/* Again from an epoch on that knows of all */
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	until_released(qemu.packets + 3);
	kill_client();
	CHECK(!run("status", path_of("ctl"), "promote", NULL), "promote fails");
	CHECK(reap(&standby) == 0, "the standby fails");
}

/* It has held all, without a break, and let go what somebody else has acknowledged. */
void test_net_held_for_others(void)
{
	begin(NULL, NULL);
	until_released(3);
	kill_client();
	start_protect(CHECKED, path_of("store"), "--interval", "1ms", "--net", "commit", NULL);
	until_released(qemu.packets + 3);
	kill_client();
	begin_again();
	promote_fails("packets have left that a directory knows of");
	CHECK(!qemu.released_all || !qemu.holds, "and are held");
	stop_standby(SIGTERM);
}

/* One that asks whether it is so dies with the answer: the next one is told the same. */
static const char *dies_when_told(struct qemu *q, const char *command)
{
	if (strcmp(command, HOLD))
		return NULL;
	has_looked = true;
	kill(q->client, SIGKILL);
	CHECK(waitpid(q->client, NULL, 0) == q->client, "it does not die");
	q->hook = NULL;
	return NULL;
}

void test_net_given_up_twice(void)
{
	begin(NULL, NULL);
	until_released(3);
	kill_client();
	let_go(&qemu);
	qemu.hook = dies_when_told;
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	while (!has_looked)
		step(&qemu, 1);
	be_qemu_for(100);
	CHECK(!log_has(UNHELD), "the standby was told: this test shows nothing");
	begin_again();
	promote_fails("the one before knew that packets have left");
	stop_standby(SIGTERM);
}

/* --- Ends -------------------------------------------------------------------- */

void test_net_detached(void)
{
	begin(NULL, NULL);
	until_released(2);
	finish(0);
	CHECK(qemu.released_all == 1 && !qemu.dropped_all && !qemu.holds,
	      "it leaves QEMU holding packets");
}

/* The standby has not heard of the end, and may take over: QEMU's limit decides. */
void test_net_shutdown_untold(void)
{
	begin("--net-limit", "60s");
	lose_standby();
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 1, "it does not fail");
	CHECK(!qemu.released_all && !qemu.dropped_all && qemu.holds,
	      "it decides about packets, and nobody knows who runs the guest");
}

void test_net_taken_over(void)
{
	qemu.cards = ONE_CARD;
	start_qemu(&qemu);
	/* One that goes on, and so tells who comes */
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure", "--bare-exec",
		      "--", "/bin/sleep", "100");
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	until_protected();
	until_released(2);
	CHECK(!run("status", path_of("ctl"), "promote", NULL), "promote failed");
	CHECK(serve() == 1 && !qemu.running, "the guest runs here and there");
	CHECK(qemu.dropped_all == 1 && !qemu.released_all,
	      "packets of a guest that goes on elsewhere are sent");
	stop_standby(SIGTERM);
}

void test_net_switchover(void)
{
	qemu.cards = ONE_CARD;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "5ms", "--control", path_of("pctl"), NULL);
	until_protected();
	until_released(2);
	CHECK(!run("status", path_of("pctl"), "switchover", NULL), "switchover failed");
	CHECK(serve() == 0, "it fails");
	CHECK(qemu.released == qemu.packets && !qemu.dropped_all,
	      "%" PRIu64 " of %" PRIu64 " is released", qemu.released, qemu.packets);
}

void test_net_pass(void)
{
	qemu.not_held = "Vhost is not supported";
	begin("--net", "pass");
	be_qemu_for(200);
	CHECK(!qemu.holds_begun, "it holds packets");
	finish(0);
	CHECK(!qemu.released_all, "it releases what it does not hold");
}

void test_net_directory(void)
{
	qemu.cards = ONE_CARD;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "5");
	CHECK(!qemu.holds_begun, "it holds packets");
	CHECK(protect(CHECKED, path_of("store"), "--epochs", "8", "--interval", "1ms", "--net",
		      "commit") == 0, "protect fails");
	CHECK(qemu.holds_begun == 1 && qemu.released >= 6 && qemu.released_all == 1,
	      "%u times held, %" PRIu64 " released", qemu.holds_begun, qemu.released);
}

void test_net_refused(void)
{
	qemu.not_held = "packets of network card net0 (back end tap0) cannot be held back: Vhost is not supported";
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	must_fail(protect(CHECKED, spec()), "Vhost is not supported.  Say --net pass");
	stop_standby(SIGTERM);
}

/* The kernel would have to hold them, and it is not certain that it would hold the right ones */
void test_net_refused_tap(void)
{
	qemu.taps = "[{\"card\": \"net0\", \"ifname\": \"kc-no-tap\", \"mac\": \"02:00:00:00:00:01\", \"why\": \"Vhost is not supported\"}]";
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	must_fail(protect(CHECKED, spec()),
		  "network card net0 (tap device kc-no-tap) cannot be held back: by QEMU as Vhost is not supported; by the kernel as there is no device kc-no-tap in this network namespace.  Say --net pass");
	CHECK(qemu.released_all && !qemu.holds, "QEMU is left holding what others have sent");
	qemu.taps = "[{\"card\": \"net0\", \"ifname\": \"lo\", \"mac\": \"02:00:00:00:00:01\", \"why\": \"Vhost is not supported\"}]";
	must_fail(protect(CHECKED, spec()), "lo is no tap device");
	stop_standby(SIGTERM);
}

void test_net_unplug_usage(void)
{
	CHECK(run("unplug", NULL) == 2 && run("unplug", "--guard", "2", "lo", NULL) == 2 &&
	      run("unplug", "--guard", "x", "lo", NULL) == 2 && run("unplug", "--now", "lo", NULL) == 2,
	      "it takes what makes no sense");
	CHECK(run("unplug", "kc-no-tap", NULL) == 1 && log_has("there is no device kc-no-tap"),
	      "it does not say that there is none");
	CHECK(!run("unplug", "--help", NULL), "--help fails");
}

void test_net_usage(void)
{
	static const char * const wrong[][2] = {
		{ "--net", "hold" }, { "--net", "" }, { "--net-limit", "-1" },
		{ "--net-limit", "soon" },
	};
	size_t i;

	for (i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++)
		CHECK(run("protect", "--qmp", "x", "--to", "y", wrong[i][0], wrong[i][1], NULL) == 2,
		      "%s %s is taken", wrong[i][0], wrong[i][1]);
}
