// SPDX-License-Identifier: GPL-2.0-only
/*
 * The guest goes to and fro between two hosts, as for their maintenance: nothing is lost, and who
 * had it before has most of it when it is the standby.
 */
#define _GNU_SOURCE
#include <signal.h>

#include "failover.h"

static bool go_over(struct pair *x)
{
	const struct sample *least;
	uint64_t foreign, now;
	struct vm next;
	int status;

	if (!watch_guest(&vm, random_from(50, 500)) || !get_foreign(&vm, &foreign))
		return false;
	if (!tell_protect(x, "switchover"))
		return fail("protect does not take a command");
	status = wait_protect(&x->protect);
	if (status)
		return fail("protect ends with %d", status);
	/* All that was ever seen of it, not only what was acknowledged by then */
	least = last_sample();
	if (!wait_taken_over(x) || !meet(&next, x->gen, x->theirs, FAILOVER_TIMEOUT) ||
	    !wait_running(&next, FAILOVER_TIMEOUT))
		return fail("the guest is not at the standby");
	moved(x, &next);
	if (!check_guest(&vm, least))
		return false;
	return (get_foreign(&vm, &now) && now <= foreign + 1) ||
	       fail("second copy: %lu times another wrote to what one may hold, before %lu", now,
		    foreign);
}

bool test_switches(unsigned int times)
{
	struct pair x = { .timeout_ms = 0, .leaves = true };
	unsigned int n;
	bool ok;

	ok = begin(&x);
	for (n = 0; ok && n < times; n++) {
		ok = go_over(&x) && (!guest_has_ledger || ledger_holds(true));
		x = (struct pair){ .timeout_ms = 0, .leaves = true };
		ok = ok && begin(&x);
		if (ok && (!x.protect.resync || x.protect.differed > GUEST_MB * 256 / 2))
			ok = fail("all was sent again: %lu pages", x.protect.differed);
		ok = ok && compare_once(x.theirs) && (!guest_has_ledger || ledger_holds(false));
		if (ok)
			note("switched over, and the other way round: no step lost, %lu of %u pages differed, all equal",
			     x.protect.differed, GUEST_MB * 256);
	}
	if (!ok) {
		show_all(&vm);
		kill_protect(&x.protect);
	}
	end(&x);
	return ok;
}
