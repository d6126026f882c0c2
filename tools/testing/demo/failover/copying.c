// SPDX-License-Identifier: GPL-2.0-only
/*
 * A guest with a database dies while the first copy of it is made.
 *
 * Nobody has anything to go on from, and nothing that it sent was held back.  So it boots again, from its
 * own disk, and there is all that its clients were told of: that the disk is copied changes nothing.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>

#include "clients.h"

/* What the standby makes of it, however long that takes */
static bool is_judged(const struct pair *x, bool *goes_on)
{
	uint64_t until = now_us() + FAILOVER_TIMEOUT * 1000000ull;

	while (now_us() < until) {
		*goes_on = standby_said(x, "taken over at epoch");
		/* Of QEMU's end it is told; else when it listened, was connected to, and was left */
		if (*goes_on || standby_said(x, "there is no complete epoch of it to go on from") ||
		    standby_said(x, "; last complete epoch 0") >= 3)
			return true;
		usleep(20000);
	}
	return fail("the standby says nothing of a primary that has died");
}

static bool boots_again(struct pair *x)
{
	char old[64], new[64];

	if (standby_said(x, "failing over"))
		return fail("the standby goes on from half of a guest");
	kill(x->standby, SIGTERM);
	waitpid(x->standby, NULL, 0);
	x->standby = 0;
	remove_ram(x->theirs);
	ledger_image(x->gen, old);
	unlink(old);
	ledger_image(vm.gen, old);
	ledger_image(last_gen + 1, new);
	leave(&vm);
	remove_ram(vm.ram);
	if (rename(old, new))
		fatal(new);
	return boot(&vm);
}

/* False for *@early: there was an epoch already, as in other tests */
static bool one_copy(bool with_daemon, unsigned int most_ms, bool *early)
{
	struct pair x = { .timeout_ms = 3000, .safe = FENCE };
	long told[CLIENTS], lost;
	struct vm next;
	bool ok, goes_on;

	if (!ledger_connect())
		return false;
	new_pair(&x);
	x.standby = start_standby(&x);
	start_protect(&x.protect, &vm, &x, interval, 0);
	ok = wait_said(&x, "is connected", SYNC_TIMEOUT) ||
	     fail("the standby does not hear of a primary");
	sleep_ms(random_from(0, most_ms));
	kill(vm.pid, SIGKILL);
	if (with_daemon)
		kill_protect(&x.protect);
	else
		wait_protect(&x.protect);
	ok = ok && is_judged(&x, &goes_on);
	*early = ok && !goes_on;
	if (ok && goes_on) {
		ok = meet(&next, x.gen, x.theirs, FAILOVER_TIMEOUT) &&
		     wait_running(&next, FAILOVER_TIMEOUT);
		if (ok)
			moved(&x, &next);
	} else if (ok) {
		ok = boots_again(&x);
	}
	ledger_disconnect();
	ledger_told(told);
	ok = ok && ledger_check(told, &lost) && ledger_check_disk();
	if (!ok)
		show_all(&vm);
	kill_now(&x.standby, true);
	return ok;
}

bool test_copying(unsigned int times)
{
	unsigned int n = 0, late = 0, most_ms = 1000;
	bool ok = ledger_boot(), early;

	while (ok && n < times) {
		ok = one_copy(n & 1, most_ms, &early);
		if (ok && early) {
			note("dead while it was copied, for the %u. time: it boots, and all that was committed is on its own disk",
			     ++n);
		} else if (ok) {
			late++;
			/* This machine is fast */
			most_ms = most_ms * 3 / 4;
		}
	}
	if (ok)
		note("%u guests died while they were copied, and %u when they had been", n, late);
	ledger_end();
	return ok;
}
