// SPDX-License-Identifier: GPL-2.0-only
/*
 * A guest with a database and a disk, whose epochs go to a directory.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "clients.h"

const char *wrong_disk;

static void remove_image(unsigned int gen)
{
	char path[64];

	ledger_image(gen, path);
	unlink(path);
}

/* Until so many more are there */
static bool wait_epochs(unsigned int n)
{
	uint64_t want = last_acked() + n;
	bool ok = true;

	while (ok && last_acked() < want)
		ok = watch_guest(&vm, 50);
	return ok;
}

/*
 * It goes on from an epoch of a directory, on the disk of that epoch: all is there that clients were
 * told of before the epoch was taken, nothing twice, and the file system is sound.
 */
static bool one_archive(uint64_t *epoch)
{
	unsigned int gen = ++last_gen, before = vm.gen;
	char dir[64], all[70], dead[64];
	struct pair x = { .timeout_ms = 0 };
	long told[CLIENTS], later[CLIENTS], lost;
	uint64_t newest;
	struct protect p;
	bool ok;

	reset_log();
	snprintf(dir, sizeof(dir), "/dev/shm/standby-chain-%u", gen);
	chain = dir;
	start_protect(&p, &vm, &x, interval, 0);
	ok = wait_synced(&p, &vm, 1) && ledger_connect() && wait_epochs(10);
	ledger_told(told);
	/* The next two may have been taken already. */
	newest = last_acked();
	*epoch = newest + random_from(3, 7);
	ok = ok && wait_epochs(10);
	/* What clients do from now on is on the disk that is left behind, and in no memory of that epoch. */
	ledger_told(later);
	ok = ok && ledger_goes_on(later);
	leave(&vm);
	remove_ram(vm.ram);
	kill_now(&standby, true);
	wait_protect(&p);
	ledger_disconnect();
	if (wrong_disk) {
		ledger_image(before, dead);
		wrong_disk = dead;
	}
	ok = ok && go_on_from(gen, *epoch) && ledger_check(told, &lost) &&
	     (wrong_disk || ledger_check_disk());
	remove_image(before);
	chain = NULL;
	snprintf(all, sizeof(all), "%s/all", dir);
	remove_ram(all);
	return ok;
}

bool test_archives(unsigned int times)
{
	uint64_t epoch;
	unsigned int n;
	bool ok = ledger_boot();

	for (n = 0; ok && n < times; n++) {
		ok = one_archive(&epoch);
		if (ok)
			note("goes on from epoch %lu of a directory: memory, database and file system are sound",
			     epoch);
	}
	remove_image(vm.gen);
	ledger_end();
	return ok;
}

/* The disk that the guest leaves behind when it dies is of another moment than its memory. */
bool test_archives_control(unsigned int times)
{
	uint64_t epoch;
	unsigned int n;
	bool ok = true;

	for (n = 0; ok && n < times; n++) {
		if (!ledger_boot())
			return false;
		wrong_disk = "";
		ok = one_archive(&epoch);
		wrong_disk = NULL;
		remove_image(vm.gen);
		ledger_end();
	}
	if (ok)
		return fail("on the disk of a dead primary %u guests went on as if nothing was wrong", n);
	note("on the disk of a dead primary guest %u does not go on, as is to be expected", n);
	return true;
}
