// SPDX-License-Identifier: GPL-2.0-only
/*
 * The control of guests that tell which pages they do not use: with a protect that is wrong about
 * when they said so, pages of the past are found.
 */
#define _GNU_SOURCE
#include <signal.h>

#include "failover.h"

static void end_guest(void)
{
	leave(&vm);
	remove_ram(vm.ram);
	kill_now(&standby, true);
}

/* A guest that does not go on has noticed, too: its kernel's pages are among them */
bool test_stale(unsigned int times)
{
	bool ok = true, booted;
	unsigned int n;

	end_guest();
	guest_tells = 1;
	booted = boot(&vm);
	protect_with = "/stale/kvm-checkpoint";
	for (n = 0; booted && ok && n < times; n++)
		ok = kill_guest(n & 1);
	protect_with = NULL;
	guest_tells = 0;
	end_guest();
	if (!booted)
		return false;
	if (ok)
		return fail("in %u kills no page of the past was found: this test would not notice", n);
	note("what failed was meant to: page states of the past are noticed at kill %u", n);
	return true;
}
