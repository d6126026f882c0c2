// SPDX-License-Identifier: GPL-2.0-only
/*
 * The disk of a directory of epochs is full for a while.
 */
#define _GNU_SOURCE
#include <signal.h>

#include "faults.h"

bool full_directory(struct fault *f)
{
	unsigned int gen, ms = random_from(f->kind->from_ms, f->kind->to_ms), at;
	char dir[48], ram[64];
	struct pair none = { .timeout_ms = 0 };
	uint64_t acked, foreign, until;
	struct protect p;
	bool ok;

	if (have)
		end(&x);
	have = false;
	gen = ++last_gen;
	reset_log();
	snprintf(dir, sizeof(dir), "/dev/shm/standby-chain-%u", gen);
	snprintf(ram, sizeof(ram), "%s/all", dir);
	ok = mount_small(dir, 100);
	chain = dir;
	start_protect(&p, &vm, &none, "50ms", 0);
	ok = ok && wait_synced(&p, &vm, 1) && watch_guest(&vm, random_from(50, 300)) &&
	     get_foreign(&vm, &f->foreign);
	if (ok && !fill_disk(dir, true))
		ok = fail("the disk is not full");
	at = random_from(0, ms);
	sleep_ms(at);
	if (f->victim != NONE) {
		kill(vm.pid, SIGKILL);
		if (f->victim == HOST)
			kill_protect(&p);
	}
	sleep_ms(ms - at);
	if (ok && !fill_disk(dir, false))
		ok = fail("the disk stays full");
	/* It is to go on by itself */
	acked = last_acked();
	until = now_us() + SYNC_TIMEOUT * 1000000ull;
	while (ok && f->victim == NONE && last_acked() <= acked) {
		usleep(20000);
		if (now_us() > until)
			ok = fail("no epoch has come to the directory since it has room");
	}
	ok = ok && (f->victim != NONE || watch_guest(&vm, random_from(50, 300)));
	kill(vm.pid, SIGKILL);
	/* It may try for long to write what it has: there is nobody for whom */
	if (f->victim == NONE)
		wait_protect(&p);
	kill_protect(&p);
	acked = last_acked();
	if (ok) {
		leave(&vm);
		remove_ram(vm.ram);
		kill_now(&standby, true);
		ok = go_on_from(gen, acked);
	} else {
		show_all(&vm);
	}
	if (ok && (!get_foreign(&vm, &foreign) || foreign > f->foreign + 1))
		ok = fail("second copy: %lu times another wrote to what one may hold, before %lu",
			  foreign, f->foreign);
	chain = NULL;
	remove_ram(ram);
	return ok;
}
