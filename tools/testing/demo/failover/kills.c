// SPDX-License-Identifier: GPL-2.0-only
/*
 * The primary is killed.
 */
#define _GNU_SOURCE
#include <signal.h>

#include "failover.h"

/* It has to be told to go on, and it must not be told too early */
static bool go_on_when_told(struct vm *next)
{
	if (!wait_status(next, "paused", FAILOVER_TIMEOUT))
		return false;
	usleep(300000);
	if (!wait_status(next, "paused", 0))
		return fail("a guest that was stopped runs at the standby");
	return qmp(next, "cont");
}

enum victim { QEMU, HOST, PAUSED };

static double longest_failover, sum_failover;
static unsigned int failovers, nr_early;
static uint64_t last_foreign;

/*
 * One kill; vm is the guest at the standby then.  A busy machine may make the primary silent for so
 * long that the standby comes first, and then the fence kills it, or it has stopped by its lease.
 * *@done is false if that was so before there was anything to kill.
 */
static bool kill_once(enum victim victim, bool *done)
{
	static const char * const names[] = {
		"QEMU", "QEMU and daemon", "QEMU of a stopped guest",
	};
	struct pair x = {
		.timeout_ms = victim == PAUSED ? 10000 : 3000,
		.safe = random_from(0, 1) && victim != PAUSED ? LEASE : FENCE,
	};
	uint64_t killed, epoch, ms, steps[3], foreign, now;
	const struct sample *least;
	struct vm next;
	char path[64];
	bool ok;

	ok = begin(&x) && watch_guest(&vm, random_from(50, 1000)) &&
	     get_foreign(&vm, &foreign) && (victim != PAUSED || stop_guest());
	snprintf(path, sizeof(path), "/tmp/standby-%u.err", x.gen);
	*done = ok;
	if (!ok && standby_said(&x, "failing over")) {
		note("the machine was too busy: the standby came first");
		nr_early++;
		victim = QEMU;
		foreign = last_foreign;
	} else if (!ok) {
		show_all(&vm);
		show_file(path);
		kill_protect(&x.protect);
		kill_now(&x.standby, true);
		return false;
	}
	last_foreign = foreign;

	if (*done)
		sleep_ms(random_from(0, 100));
	killed = now_us();
	kill(vm.pid, SIGKILL);
	if (victim == HOST)
		kill_protect(&x.protect);
	else
		wait_protect(&x.protect);
	epoch = last_acked();
	least = promised(epoch);

	ok = wait_taken_over(&x) && meet(&next, x.gen, x.theirs, FAILOVER_TIMEOUT) &&
	     (victim != PAUSED || go_on_when_told(&next)) &&
	     wait_running(&next, FAILOVER_TIMEOUT) && get_steps(&next, steps);
	ms = (now_us() - killed) / 1000;
	if (!ok) {
		show_file(path);
		show_all(&vm);
		kill_now(&x.standby, true);
		return fail("the standby did not take over");
	}
	moved(&x, &next);
	if (epoch_taken(&x) < epoch)
		return fail("it goes on from epoch %lu, and %lu was acknowledged",
			    epoch_taken(&x), epoch);
	if (*done) {
		failovers++;
		sum_failover += ms;
		if (ms > longest_failover)
			longest_failover = ms;
	}
	if (!check_guest(&vm, least)) {
		show_all(&vm);
		return false;
	}
	if (!get_foreign(&vm, &now) || now > foreign + 1) {
		show_all(&vm);
		return fail("second copy: %lu times another wrote to what one may hold, before %lu",
			    now, foreign);
	}
	note("%s %s at epoch %lu; on after %lu ms, memory verified, no acknowledged step lost",
	     names[victim], *done ? "killed" : "left behind", epoch, ms);
	return true;
}

/* As often as it takes until there was one */
static bool kill_one(enum victim victim)
{
	bool done = false;

	while (!done) {
		if (!kill_once(victim, &done))
			return false;
	}
	return true;
}

bool kill_guest(bool with_daemon)
{
	return kill_one(with_daemon ? HOST : QEMU);
}

bool test_paused(unsigned int times)
{
	while (times--) {
		if (!kill_one(PAUSED))
			return false;
	}
	return true;
}

static bool kill_until(unsigned int kills, unsigned int seconds)
{
	uint64_t until = now_us() + seconds * 1000000ull;
	uint64_t began = now_us();
	unsigned int n = 0;

	while (kills ? n < kills : now_us() < until) {
		if (!kill_one(n & 1 ? HOST : QEMU))
			return fail("kill %u", n + 1);
		n++;
	}
	note("%u kills, all verified; the guest was on after %.0f ms on average, %.0f at most; %.1f s each (%u times the standby came first as the machine was busy)",
	     n, sum_failover / failovers, longest_failover, (now_us() - began) / 1e6 / n, nr_early);
	return true;
}

bool test_kills(unsigned int n)
{
	return kill_until(n, 0);
}

bool test_seconds(unsigned int n)
{
	return kill_until(0, n);
}
