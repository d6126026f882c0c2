// SPDX-License-Identifier: GPL-2.0-only
/*
 * Bad days: what goes half wrong, with or without the primary's death in the midst of it.
 *
 * After each the guest runs, once: where it was, protected, or at the standby.  A busy machine may
 * make a primary silent for so long that its standby takes over, and that is right then: there is a
 * lease or a fence always.  That it was silent for so long is known from the relay.
 */
#define _GNU_SOURCE
#include <signal.h>

#include "faults.h"

struct pair x;
bool have;
static unsigned int nr_moved, nr_stayed, nr_silent;
static uint64_t last_foreign;

static void strike(struct fault *f)
{
	if (f->victim == NONE || f->killed)
		return;
	kill(vm.pid, SIGKILL);
	if (f->victim == HOST)
		kill_protect(&x.protect);
	f->killed = true;
}

static bool alive(pid_t pid)
{
	char path[64], name[64], state = 'X';
	FILE *f;
	int n;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	f = fopen(path, "r");
	if (f && fscanf(f, "%d (%63[^)]) %c", &n, name, &state) != 3)
		state = 'X';
	if (f)
		fclose(f);
	return state != 'Z' && state != 'X';
}

static bool is_running(struct vm *vm)
{
	return qmp(vm, "query-status") && strstr(vm->buf, "\"running\": true");
}

/* The one that was left behind stands still, and its daemon learns why and ends */
static bool check_old(struct fault *f)
{
	bool watched = x.protect.pid;
	int i, status;

	for (i = 0; i < 3 && alive(vm.pid); i++) {
		if (is_running(&vm))
			return fail("two copies: the old one runs on");
		usleep(50000);
	}
	if (f->killed) {
		kill_protect(&x.protect);
		return true;
	}
	status = wait_protect(&x.protect);
	if (watched && x.safe == LEASE && status != 1)
		return fail("protect ends with %d when the standby has taken over", status);
	return !alive(vm.pid) || !is_running(&vm) || fail("two copies: the old one is not stopped");
}

static bool check_moved(struct fault *f)
{
	const struct sample *least;
	uint64_t acked, foreign;
	struct vm next;
	bool ok;

	have = false;
	ok = check_old(f) && meet(&next, x.gen, x.theirs, FAILOVER_TIMEOUT);
	if (!ok)
		return false;
	acked = last_acked();
	least = promised(acked);
	ok = wait_running(&next, FAILOVER_TIMEOUT) && check_guest(&next, least);
	if (ok && epoch_taken(&x) < acked)
		ok = fail("it goes on from epoch %lu, and %lu was acknowledged", epoch_taken(&x),
			  acked);
	if (ok && (!get_foreign(&next, &foreign) || foreign > f->foreign + 1))
		ok = fail("second copy: %lu times another wrote to what one may hold, before %lu",
			  foreign, f->foreign);
	if (!ok)
		show_all(&next);
	moved(&x, &next);
	return ok;
}

/*
 * The last epoch was of a guest that stood still to be compared, and would stand still at the standby:
 * that is not what the next fault is about.
 */
static bool wait_running_epoch(void)
{
	uint64_t until = now_us() + SYNC_TIMEOUT * 1000000ull;
	bool runs = false;

	while (!runs) {
		pthread_mutex_lock(&log_.lock);
		runs = log_.epochs[log_.acked % MAX_EPOCHS].was_running;
		pthread_mutex_unlock(&log_.lock);
		if (!runs && now_us() > until)
			return fail("no epoch of the guest that goes on was acknowledged");
		usleep(5000);
	}
	return true;
}

static bool check_stayed(struct fault *f)
{
	uint64_t foreign;

	if (!guest_goes_on(&vm))
		return false;
	if (!get_foreign(&vm, &foreign) || foreign != f->foreign)
		return fail("second copy: %lu times another wrote to what one may hold, before %lu",
			    foreign, f->foreign);
	/* "cont" ends a lease that is over */
	return x.safe == LEASE || (compare_once(x.theirs) && wait_running_epoch());
}

/* It may have been started just now */
static bool promote(void)
{
	uint64_t until = now_us() + SYNC_TIMEOUT * 1000000ull;

	while (!tell_standby(&x, "promote") && !standby_said(&x, "failing over")) {
		usleep(200000);
		if (now_us() > until)
			return fail("the standby does not take a command");
	}
	return wait_taken_over(&x);
}

/* Where the guest is, and that it is well; *at is what came of it */
static bool settle(struct fault *f, uint64_t acked, const char **at)
{
	uint64_t until = now_us() + SYNC_TIMEOUT * 1000000ull, gap;
	bool over;

	if (f->unheard) {
		sleep_ms(TIMEOUT_MS + 500);
		if (standby_said(&x, "taken over at epoch"))
			return fail("a standby that was restarted took over without having heard a primary");
		if (!promote())
			return false;
	}
	do {
		usleep(20000);
		over = standby_said(&x, "taken over at epoch");
		if (now_us() > until)
			return fail("the guest is neither protected nor taken over");
		if (!f->killed && !over && protect_ended(&x.protect) && !standby_said(&x, "failing over"))
			return fail("protect has ended by itself");
	} while (!over && (f->killed || last_acked() <= acked));

	gap = relay_gap_us() / 1000;
	*at = "went on at the standby";
	if (!over) {
		nr_stayed++;
		*at = "stayed, protected";
		return check_stayed(f);
	}
	nr_moved++;
	if (!f->killed && f->kind->outcome == STAYS) {
		if (gap < TIMEOUT_MS / 10 * 8)
			return fail("the standby took over from a primary that was heard all %lu ms", gap);
		nr_silent++;
		*at = "the machine was too busy: went on at the standby";
	}
	return check_moved(f);
}

static bool protect_again(void)
{
	if (have)
		return true;
	x = (struct pair){
		.timeout_ms = TIMEOUT_MS, .relayed = true, .disk_mb = STANDBY_MB,
		.safe = random_from(0, 1) ? LEASE : FENCE,
	};
	relay_cut(0);
	have = begin(&x);
	return have;
}

/* Whatever it was that failed: the standby may have come first, as the machine is too busy */
static bool moved_before(struct fault *f)
{
	if (!have || !standby_said(&x, "failing over") || !wait_taken_over(&x))
		return false;
	note("the machine was too busy: the guest went on at the standby before anything was wrong");
	nr_silent++;
	f->foreign = last_foreign;
	return check_moved(f);
}

static bool fault_once(const struct fault_kind *kind, unsigned int nr, unsigned int total)
{
	static const char * const victims[] = { "", ", QEMU killed", ", QEMU and daemon killed" };
	struct fault f = { .kind = kind, .victim = random_from(0, 2) };
	unsigned int ms = random_from(kind->from_ms, kind->to_ms), at;
	const char *what = "restored";
	uint64_t t = now_us(), acked;
	char path[64];
	bool ok;

	if (kind->whole) {
		ok = kind->whole(&f);
	} else {
		do
			ok = protect_again() && watch_guest(&vm, random_from(50, 300)) &&
			     get_foreign(&vm, &f.foreign);
		while (!ok && moved_before(&f));
		last_foreign = f.foreign;
		if (ok && f.victim == NONE && kind->outcome == STAYS)
			relay_gap_us();
		ok = ok && kind->begin(&f);
		at = random_from(0, ms);
		sleep_ms(at);
		if (ok)
			strike(&f);
		sleep_ms(ms - at);
		acked = last_acked();
		ok = ok && kind->end(&f) && settle(&f, acked, &what);
		ok = ok && (!guest_has_ledger || ledger_holds(!have));
	}
	if (ok) {
		note("fault %u of %u: %s%s: %s, all well (%.1f s%s)", nr, total, kind->what,
		     victims[f.victim], what, (now_us() - t) / 1e6,
		     kind->whole ? "" : x.safe == LEASE ? ", lease" : ", fence");
		return true;
	}
	snprintf(path, sizeof(path), "/tmp/standby-%u.err", x.gen);
	show_file(path);
	show_all(&vm);
	return fail("fault %u of %u: %s%s", nr, total, kind->what, victims[f.victim]);
}

static bool run(const struct fault_kind *only, unsigned int n)
{
	unsigned int order[64], i, k, other, done = 0;
	uint64_t began = now_us();
	bool ok = true;

	nr_moved = 0;
	nr_stayed = 0;
	nr_silent = 0;
	for (i = 0; ok && i < n; i++) {
		const struct fault_kind *kind;

		/* All of them in a random order, and again */
		if (!(i % nr_fault_kinds)) {
			for (k = 0; k < nr_fault_kinds; k++) {
				other = random_from(0, k);
				order[k] = order[other];
				order[other] = k;
			}
		}
		kind = only ? only : &fault_kinds[order[i % nr_fault_kinds]];
		/* Nothing is held back for what goes on from a directory */
		if (guest_has_ledger && kind->whole)
			continue;
		done++;
		ok = fault_once(kind, i + 1, n);
	}
	if (have && ok)
		end(&x);
	have = false;
	if (!ok) {
		/* Whatever state that left them in, also stopped */
		kill_protect(&x.protect);
		kill_now(&x.standby, true);
	} else {
		note("%u faults, all verified: the guest stayed %u times, went on elsewhere %u times (%u as the machine was busy); %.1f s each",
		     done, nr_stayed, nr_moved, nr_silent,
		     (now_us() - began) / 1e6 / (done ? done : 1));
	}
	return ok;
}

bool test_faults(unsigned int n)
{
	return run(NULL, n);
}

bool test_fault(const struct fault_kind *kind, unsigned int n)
{
	return run(kind, n);
}

const struct fault_kind *find_fault(const char *name, size_t len)
{
	unsigned int i;

	for (i = 0; i < nr_fault_kinds; i++) {
		if (strlen(fault_kinds[i].name) == len && !strncmp(fault_kinds[i].name, name, len))
			return &fault_kinds[i];
	}
	return NULL;
}

void list_faults(void)
{
	unsigned int i;

	for (i = 0; i < nr_fault_kinds; i++)
		printf("%s\t%s\n", fault_kinds[i].name, fault_kinds[i].what);
}
