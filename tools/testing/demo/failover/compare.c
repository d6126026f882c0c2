// SPDX-License-Identifier: GPL-2.0-only
/*
 * The memory of both sides is compared, whatever is done to the guest.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>

#include "failover.h"

#define MAX_RESETS	1000

bool stop_guest(void)
{
	uint64_t before, until;
	bool there = false;
	char path[64];

	pthread_mutex_lock(&log_.lock);
	before = log_.newest;
	pthread_mutex_unlock(&log_.lock);
	if (!qmp(&vm, "stop"))
		return fail("QEMU does not stop the guest");
	until = now_us() + ANSWER_TIMEOUT * 1000000ull;
	while (!there && now_us() < until) {
		usleep(5000);
		pthread_mutex_lock(&log_.lock);
		/* What comes after it has nothing that is new */
		there = log_.acked > before && !log_.epochs[log_.acked % MAX_EPOCHS].was_running;
		pthread_mutex_unlock(&log_.lock);
	}
	if (there)
		return true;
	snprintf(path, sizeof(path), "/tmp/protect-%u.err", vm.gen);
	show_file(path);
	note("epoch %lu was acknowledged, %lu was taken", log_.acked, log_.newest);
	return fail("the stopped guest's epoch was not acknowledged");
}

static uint8_t *map_ram(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	void *p = mmap(NULL, (size_t)GUEST_MB << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (fd >= 0)
		close(fd);
	return fd < 0 || p == MAP_FAILED ? NULL : p;
}

/* What the guest says of its pages; NULL: nothing */
static const uint8_t *find_states(const uint8_t *ram)
{
	static uint8_t states[GUEST_MB * 256];
	uint64_t n, nr;

	for (n = 0; n < sizeof(states) - sizeof(states) / PAGE - 1; n++) {
		nr = has_page_states(ram + n * PAGE, sizeof(states));
		if (!nr)
			continue;
		/* What it does not say anything of is used */
		memset(states, 0, sizeof(states));
		memcpy(states, ram + (n + 1) * PAGE, nr);
		return states;
	}
	return NULL;
}

static uint64_t different_pages(const uint8_t *a, const uint8_t *b, const uint8_t *states,
				uint64_t *first)
{
	uint64_t n, bad = 0;

	for (n = 0; n < GUEST_MB * 256ull; n++) {
		if (states && states[n] == 1)
			continue;
		if (memcmp(a + n * PAGE, b + n * PAGE, PAGE) && !bad++)
			*first = n;
	}
	return bad;
}

/* A vCPU each may be there, and who allocates more than a page at once is rare */
#define MAX_UNWRITTEN 4

/*
 * Between the instant at which a page is not unused any more and that at which it is written there
 * are some instructions, as the guest's kernel clears what it allocates (init_on_alloc).  Who is
 * stopped there has a page that is used and may be anything; it is not so when he is stopped again.
 */
static bool are_unwritten(const uint8_t *a, const uint8_t *b, const uint8_t *states, uint64_t bad)
{
	static uint64_t before[MAX_UNWRITTEN], nr_before;
	uint64_t now[MAX_UNWRITTEN], nr = 0, n, i;

	if (bad > MAX_UNWRITTEN)
		return false;
	for (n = 0; n < GUEST_MB * 256ull && nr < bad; n++) {
		const uint64_t *x = (const uint64_t *)(a + n * PAGE);
		const uint64_t *y = (const uint64_t *)(b + n * PAGE);

		if (states[n] == 1 || !memcmp(x, y, PAGE))
			continue;
		note("page %lu is used, and not written yet: %lx %lx here, %lx %lx there", n, x[0],
		     x[1], y[0], y[1]);
		for (i = 0; i < nr_before; i++) {
			if (before[i] == n)
				return false;
		}
		now[nr++] = n;
	}
	memcpy(before, now, sizeof(now));
	nr_before = nr;
	return true;
}

bool compare_once(const char *theirs)
{
	uint8_t *a = map_ram(vm.ram), *b = map_ram(theirs);
	uint64_t before, bad = 0, first = 0, noticed = 0, unwritten = 0, bit = (GUEST_MB << 19) + 1234;
	const uint8_t *states = NULL;
	bool there;

	if (!a || !b)
		return fail("cannot map the memory of both sides");
	there = stop_guest();
	if (there) {
		if (guest_tells)
			states = find_states(a);
		bad = different_pages(a, b, states, &first);
		unwritten = states && are_unwritten(a, b, states, bad) ? bad : 0;
		/* The control: one bit, of a page that is used */
		while (states && (states[bit / PAGE] == 1 ||
				  memcmp(a + bit / PAGE * PAGE, b + bit / PAGE * PAGE, PAGE)))
			bit += PAGE;
		b[bit] ^= 1;
		noticed = different_pages(a, b, states, &before);
		b[bit] ^= 1;
	}
	munmap(a, (size_t)GUEST_MB << 20);
	munmap(b, (size_t)GUEST_MB << 20);
	if (!qmp(&vm, "cont"))
		return fail("QEMU does not resume the guest");
	if (guest_tells && !states)
		return fail("the guest does not say which pages it does not use");
	if (!there)
		return false;
	if (bad != unwritten)
		return fail("%lu pages differ, the first is page %lu", bad, first);
	if (noticed != 1 + unwritten)
		return fail("a bit that differs was not noticed");
	return true;
}

bool test_equal(unsigned int times)
{
	struct pair x = { .timeout_ms = 0 };
	unsigned int n;
	bool ok;

	ok = begin(&x);
	for (n = 0; ok && n < times; n++) {
		sleep_ms(random_from(0, 300));
		ok = compare_once(x.theirs);
	}
	end(&x);
	if (ok)
		note("the memory of both sides was equal each of %u times, at epochs up to %lu", n,
		     log_.newest);
	return ok;
}

/* How often protect has noticed that an epoch was torn */
static unsigned int count_torn(void)
{
	char path[64];

	snprintf(path, sizeof(path), "/tmp/protect-%u.err", vm.gen);
	return count_lines(path, "taking another");
}

/* What a management program may do at any time */
bool test_meddles(unsigned int times)
{
	unsigned int n, i;
	struct pair x = { .timeout_ms = 0 };
	bool ok;

	ok = begin(&x);
	for (n = 0; ok && n < times; n++) {
		/* One measurement at a time is allowed: it may be refused */
		qmp_args(&vm, "calc-dirty-rate", "'calc-time': 1, 'mode': 'dirty-bitmap'");
		for (i = 0; ok && i < 100; i++) {
			sleep_ms(random_from(0, 10));
			ok = qmp(&vm, "cont");
		}
		ok = ok && compare_once(x.theirs);
	}
	end(&x);
	if (ok)
		note("%u times resumed by somebody else, %u epochs torn and taken again: all equal",
		     n * 100, count_torn());
	return ok;
}

/* So does a reset: it may come when the guest is stopped for an epoch, and stop being that */
bool test_resets(unsigned int times)
{
	unsigned int n, torn = 0;
	struct pair x = { .timeout_ms = 0 };
	bool ok;

	ok = begin(&x) && qmp_args(&vm, "set-action", "'reboot': 'reset'");
	for (n = 0; ok && n < MAX_RESETS && (n < times || !torn); n++) {
		sleep_ms(random_from(0, 60));
		ok = qmp(&vm, "system_reset");
		torn = count_torn();
	}
	ok = ok && compare_once(x.theirs);
	end(&x);
	/* It boots sooner when nobody looks */
	ok = ok && wait_boot(&vm) && qmp_args(&vm, "set-action", "'reboot': 'shutdown'");
	if (ok && !torn)
		return fail("none of %u resets came in the midst of an epoch", n);
	if (ok)
		note("%u times reset, %u epochs torn and taken again: all equal", n, torn);
	return ok;
}

bool test_daemons(unsigned int times)
{
	struct pair x = { .timeout_ms = 0 };
	struct protect *p = &x.protect;
	unsigned int n;
	bool ok;

	ok = begin(&x);
	for (n = 0; ok && n < times; n++) {
		uint64_t synced = p->synced;

		sleep_ms(random_from(100, 600));
		if (n & 1) {
			kill_now(&x.standby, true);
			ok = guest_goes_on(&vm);
			x.standby = start_standby(&x);
			ok = ok && wait_synced(p, &vm, synced + 1);
		} else {
			kill_protect(p);
			ok = guest_goes_on(&vm);
			start_protect(p, &vm, &x, "50ms", 0);
			ok = ok && wait_synced(p, &vm, 1);
		}
		if (ok && !p->resync)
			ok = fail("all pages were sent again");
		ok = ok && compare_once(x.theirs);
		if (ok)
			note("%s killed and back: the guest ran on, %lu pages differed, all equal",
			     n & 1 ? "standby" : "protect", p->differed);
	}
	end(&x);
	return ok;
}
