// SPDX-License-Identifier: GPL-2.0-only
/*
 * That a second copy of the guest is noticed by the guest: here there are two on purpose.
 */
#define _GNU_SOURCE
#include <signal.h>

#include "failover.h"

static bool two_copies(void)
{
	/* Nobody sees to it that there is one: the daemon cannot, and the standby is told to */
	struct pair x = { .timeout_ms = 0, .safe = NOBODY };
	uint64_t before, here = 0, there = 0, until, t;
	struct vm next;
	bool ok;

	ok = begin(&x) && get_foreign(&vm, &before) && watch_guest(&vm, 300) &&
	     get_foreign(&vm, &here);
	if (ok && here != before)
		ok = fail("a guest of which there is one says that it has met another");
	if (ok) {
		kill(x.protect.pid, SIGSTOP);
		t = now_us();
		ok = tell_standby(&x, "promote") && wait_taken_over(&x) &&
		     meet(&next, x.gen, x.theirs, FAILOVER_TIMEOUT) &&
		     wait_running(&next, FAILOVER_TIMEOUT);
	}
	if (!ok) {
		end(&x);
		return fail("there are no two copies");
	}
	until = now_us() + ANSWER_TIMEOUT * 1000000ull;
	/* One write of another's is what who has taken over may see, at the old one none */
	while (ok && (here <= before || there <= before + 1)) {
		ok = get_foreign(&vm, &here) && get_foreign(&next, &there);
		if (now_us() > until)
			ok = fail("two copies run, one saw %lu writes of another, the other %lu",
				  here - before, there - before);
	}
	t = now_us() - t;
	kill_protect(&x.protect);
	moved(&x, &next);
	/* And it is over when there is one again */
	usleep(100000);
	ok = ok && get_foreign(&vm, &there);
	usleep(300000);
	ok = ok && get_foreign(&vm, &here);
	if (ok && here != there)
		ok = fail("there is one copy again, and it says that it has met another");
	if (ok)
		note("two copies on purpose: both have noticed it after %lu ms", t / 1000);
	return ok && check_guest(&vm, NULL);
}

bool test_copies(unsigned int times)
{
	while (times--) {
		if (!two_copies())
			return false;
	}
	return true;
}
