// SPDX-License-Identifier: GPL-2.0-only
/*
 * Epochs in a directory, and of a guest that boots.
 */
#define _GNU_SOURCE
#include <signal.h>

#include "failover.h"

static pid_t start_restore(unsigned int gen, uint64_t epoch)
{
	struct args a = { .n = 0 };
	char err[64];

	a.v[a.n++] = (char *)checkpoint;
	a.v[a.n++] = "restore";
	a.v[a.n++] = "--epoch";
	arg(&a, "%lu", epoch);
	a.v[a.n++] = "--ram-dir";
	arg(&a, "/dev/shm/standby-%u", gen);
	if (guest_has_ledger) {
		char path[64];

		ledger_image(gen, path);
		a.v[a.n++] = "--disk";
		arg(&a, "%s", path);
	}
	a.v[a.n++] = (char *)chain;
	a.v[a.n++] = "--";
	args_of_qemu(&a, gen, "{ram0}");
	a.v[a.n] = NULL;
	snprintf(err, sizeof(err), "/tmp/standby-%u.err", gen);
	return start(a.v, -1, err);
}

bool go_on_from(unsigned int gen, uint64_t epoch)
{
	char ram[64], path[64];
	struct vm next;
	pid_t restore;

	restore = start_restore(gen, epoch);
	snprintf(ram, sizeof(ram), "/dev/shm/standby-%u/ram0", gen);
	if (!meet(&next, gen, ram, FAILOVER_TIMEOUT) || !wait_running(&next, FAILOVER_TIMEOUT)) {
		snprintf(path, sizeof(path), "/tmp/standby-%u.err", gen);
		show_file(path);
		kill_now(&restore, true);
		return fail("epoch %lu of a directory was not restored", epoch);
	}
	vm = next;
	standby = restore;
	return check_guest(&vm, promised(epoch));
}

bool test_chains(unsigned int epochs)
{
	unsigned int gen = ++last_gen;
	char dir[64], ram[64];
	uint64_t newest = 0, epoch;
	struct pair x = { .timeout_ms = 0 };
	struct protect p;
	bool ok;

	reset_log();
	snprintf(dir, sizeof(dir), "/dev/shm/standby-chain-%u", gen);
	chain = dir;
	start_protect(&p, &vm, &x, "50ms", 0);
	ok = wait_synced(&p, &vm, 1);
	while (ok && newest < epochs) {
		ok = watch_guest(&vm, 50);
		newest = last_acked();
	}
	leave(&vm);
	remove_ram(vm.ram);
	kill_now(&standby, true);
	wait_protect(&p);
	epoch = newest - epochs / 2;
	ok = ok && go_on_from(gen, epoch);
	chain = NULL;
	snprintf(ram, sizeof(ram), "/dev/shm/standby-chain-%u/all", gen);
	remove_ram(ram);
	if (ok)
		note("killed at epoch %lu of a directory: goes on from %lu, memory verified",
		     newest, epoch);
	return ok;
}

/* Protected from its first instruction on: firmware moves memory slots about */
bool test_boot(unsigned int times)
{
	unsigned int n;
	bool ok = true;

	for (n = 0; ok && n < times; n++) {
		struct pair x = { .timeout_ms = 0 };

		leave(&vm);
		remove_ram(vm.ram);
		kill_now(&standby, true);
		new_pair(&x);
		x.standby = start_standby(&x);
		ok = start_qemu(&vm);
		if (!ok)
			break;
		start_protect(&x.protect, &vm, &x, "50ms", 0);
		ok = wait_boot(&vm) && wait_synced(&x.protect, &vm, 1) && compare_once(x.theirs);
		end(&x);
		if (ok)
			note("protected while it booted, %lu epochs: all equal",
			     log_.newest);
	}
	return ok;
}
