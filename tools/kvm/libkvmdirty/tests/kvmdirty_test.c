// SPDX-License-Identifier: GPL-2.0-only
/*
 * libkvmdirty: the same cases over every back end.
 *
 *	kvmdirty_test [--require] [PATTERN]
 *
 * PATTERN: only cases whose name ("slot-ring/exact") holds it.  --require: a back end
 * that the kernel lacks is a failure, not a skip.  Exit status: 0 all passed or
 * skipped, 1 not so, 4 there is no usable KVM, and the cases that need none passed.
 *
 * Linked with --wrap=ioctl, so that ioctls can be counted, and made to fail.
 */
#include <poll.h>
#include <sys/socket.h>
#include <linux/kvm_dirty_slot_ring.h>
#include "ktap.h"
#include "minivm.h"
#include "../src/pageset.c"	/* the library does not export it */

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))

/* --- What ioctl() is made to do --------------------------------------------- */

static struct {
	unsigned long request;	/* this one... */
	int skip;		/* ...after so many of it... */
	int nr;			/* ...so many times... */
	int error;		/* ...fails with this; 0: does nothing and returns 0 */
} fault;

static unsigned int hidden_caps[4];

/* Called once before the next KVM_RESET_DIRTY_RINGS */
static void (*before_reset)(void *arg);
static void *before_reset_arg;

/* Instead of KVM, with any fd: slot rings whose log has page 50, whenever it is asked. */
static bool fake_kvm;

static int fake_ioctl(unsigned long request, void *arg)
{
	struct kvm_dirty_slot_log_info *info = arg;
	struct kvm_dirty_slot_runs *runs = arg;

	switch (request) {
	case KVM_CHECK_EXTENSION:
		return 1;
	case KVM_ENABLE_CAP:
	case KVM_SET_USER_MEMORY_REGION:
	case KVM_DIRTY_SLOT_LOG_MARK:
		return 0;
	case KVM_GET_DIRTY_SLOT_LOG_FD:
		return dup(STDOUT_FILENO);
	case KVM_DIRTY_SLOT_LOG_INFO:
		info->slot = SLOT_MAIN;
		info->npages = MAIN_PAGES;
		return 0;
	case KVM_DIRTY_SLOT_LOG_HARVEST:
		*(struct kvm_dirty_run *)(uintptr_t)runs->runs =
			(struct kvm_dirty_run){ .offset = 50, .npages = 1 };
		runs->nr_runs = 1;
		runs->nr_pages = 1;
		return 0;
	}
	errno = ENOTTY;
	return -1;
}

int __real_ioctl(int fd, unsigned long request, void *arg);
int __wrap_ioctl(int fd, unsigned long request, void *arg);

int __wrap_ioctl(int fd, unsigned long request, void *arg)
{
	size_t i;

	if (fake_kvm)
		return fake_ioctl(request, arg);
	if (request == KVM_CHECK_EXTENSION) {
		for (i = 0; i < ARRAY_SIZE(hidden_caps); i++) {
			if (hidden_caps[i] && hidden_caps[i] == (uintptr_t)arg)
				return 0;
		}
	}
	if (request == KVM_RESET_DIRTY_RINGS && before_reset) {
		void (*fn)(void *arg) = before_reset;

		before_reset = NULL;
		fn(before_reset_arg);
	}
	if (request == fault.request && fault.nr && fault.skip-- <= 0) {
		fault.nr--;
		errno = fault.error;
		return fault.error ? -1 : 0;
	}
	return __real_ioctl(fd, request, arg);
}

static void fail_ioctl(unsigned long request, int skip, int nr, int error)
{
	fault.request = request;
	fault.skip = skip;
	fault.nr = nr;
	fault.error = error;
}

/* --- A VM whose log is tracked ---------------------------------------------- */

struct mode {
	const char *name;
	enum kvmdirty_backend backend;
	uint32_t flags;
};

static const struct mode modes[] = {
	{ "slot-ring", KVMDIRTY_SLOT_RING, 0 },
	{ "ring", KVMDIRTY_RING, 0 },
	{ "bitmap", KVMDIRTY_BITMAP, 0 },
	{ "bitmap-no-manual", KVMDIRTY_BITMAP, KVMDIRTY_OPEN_NO_MANUAL },
};

struct env {
	const struct mode *mode;
	struct minivm vm;
	struct kvmdirty *kd;
	struct kvmdirty_slot *main, *odd;
};

/* How often each page of a slot was handed out. */
struct seen {
	uint8_t page[MAIN_PAGES];
	uint64_t pages, runs;
};

static void see(struct seen *seen, const struct kvmdirty_run *run)
{
	uint32_t i;

	CHECK(run->npages, "an empty run");
	CHECK((uint64_t)run->offset + run->npages <= MAIN_PAGES, "%u + %u", run->offset,
	      run->npages);
	for (i = 0; i < run->npages; i++)
		seen->page[run->offset + i]++;
	seen->pages += run->npages;
	seen->runs++;
}

/* Harvest all there is with arrays of @nr runs, into *seen; what the last call said. */
static int harvest_some(struct kvmdirty_slot *slot, struct seen *seen, size_t nr)
{
	struct kvmdirty_run runs[512];
	struct kvmdirty_result result;
	uint64_t before;
	size_t i;
	int r;

	do {
		r = kvmdirty_harvest(slot, runs, nr, 0, &result);
		CHECK(result.nr_runs <= nr, "%lu runs", (unsigned long)result.nr_runs);
		CHECK(r >= 0 || !result.nr_runs, "%d with runs", r);
		before = seen->pages;
		for (i = 0; i < result.nr_runs; i++)
			see(seen, &runs[i]);
		CHECK_EQ(seen->pages - before, result.nr_pages);
	} while (r > 0);
	return r;
}

static struct seen harvest_n(struct kvmdirty_slot *slot, size_t nr)
{
	struct seen seen;

	memset(&seen, 0, sizeof(seen));
	CHECK_EQ(harvest_some(slot, &seen, nr), 0);
	return seen;
}

static struct seen harvest(struct kvmdirty_slot *slot)
{
	return harvest_n(slot, 512);
}

/* Exactly @nr pages from @offset on in steps of @step, once each. */
static void expect(const struct seen *seen, uint32_t offset, uint32_t nr, uint32_t step)
{
	uint32_t i, wanted = 0;

	for (i = 0; i < MAIN_PAGES; i++) {
		bool want = nr && i >= offset && (i - offset) % step == 0 &&
			    (i - offset) / step < nr;

		CHECK(seen->page[i] == want, "page %u: %u times instead of %u", i, seen->page[i],
		      want);
		wanted += want;
	}
	CHECK_EQ(seen->pages, wanted);
}

static void write_pages(struct env *env, int slot, uint32_t offset, uint32_t nr, uint32_t step)
{
	CHECK_EQ(minivcpu_write(&env->vm.vcpu[0], slot, offset, nr, step), 0);
}

static void open_env(struct env *env, const struct mode *mode, uint32_t ring_entries)
{
	struct kvmdirty_options options = {
		.size = sizeof(options), .backend = mode->backend, .flags = mode->flags,
		.ring_entries = ring_entries,
	};
	int r;

	memset(env, 0, sizeof(*env));
	env->mode = mode;
	CHECK_EQ(minivm_create(&env->vm), 0);
	r = kvmdirty_open(env->vm.fd, &options, &env->kd);
	CHECK(!r, "%d: %s", r, options.reason);
	CHECK_EQ(kvmdirty_backend(env->kd), mode->backend);
	env->vm.kd = env->kd;
}

static struct minivcpu *add_vcpu(struct env *env)
{
	struct minivcpu *vcpu = minivm_add_vcpu(&env->vm);

	CHECK_EQ(kvmdirty_add_vcpu(env->kd, vcpu->fd), 0);
	return vcpu;
}

static void track(struct env *env)
{
	CHECK_EQ(kvmdirty_track(env->kd, &env->vm.region[SLOT_MAIN], &env->main), 0);
	CHECK_EQ(kvmdirty_track(env->kd, &env->vm.region[SLOT_ODD], &env->odd), 0);
}

/* KVM may report what is touched for the first time even if it is only read. */
static void settle(struct env *env)
{
	write_pages(env, SLOT_MAIN, 0, MAIN_PAGES, 1);
	write_pages(env, SLOT_ODD, 0, ODD_PAGES, 1);
	harvest(env->main);
	harvest(env->odd);
}

static struct env *setup_entries(const struct mode *mode, uint32_t ring_entries)
{
	static struct env env;

	open_env(&env, mode, ring_entries);
	add_vcpu(&env);
	track(&env);
	settle(&env);
	return &env;
}

/* More than any case writes: with the dirty ring, no vCPU exits. */
#define MANY_ENTRIES	8192

static struct env *setup(const void *mode)
{
	return setup_entries(mode, MANY_ENTRIES);
}

/* Few: with the dirty ring, vCPUs exit.  VMX keeps more of them in reserve. */
#define FEW_ENTRIES	(access("/sys/module/kvm_intel", F_OK) ? 256 : 1024)

/*
 * Where there is no hardware virtualization, KVM may run code such as ours in an
 * emulator that looks too seldom whether a ring is full, and lose pages.  That is
 * not what is tested here.
 */
static void needs_full_exits(const struct mode *mode)
{
	if (mode->backend != KVMDIRTY_RING || !access("/sys/module/kvm_amd", F_OK) ||
	    !access("/sys/module/kvm_intel", F_OK))
		return;
	ktap_skip("neither kvm_amd nor kvm_intel: this KVM may overrun its dirty ring");
}

static struct env *setup_few_entries(const void *mode)
{
	needs_full_exits(mode);
	return setup_entries(mode, FEW_ENTRIES);
}

/* --- The cases -------------------------------------------------------------- */

static void test_exact(const void *mode)
{
	struct env *env = setup(mode);
	struct seen seen;

	seen = harvest(env->main);
	expect(&seen, 0, 0, 1);

	write_pages(env, SLOT_MAIN, 3, 100, 7);
	write_pages(env, SLOT_MAIN, 3, 100, 7);
	seen = harvest(env->main);
	expect(&seen, 3, 100, 7);
	seen = harvest(env->main);
	expect(&seen, 0, 0, 1);

	/* Re-armed: the same pages again. */
	write_pages(env, SLOT_MAIN, 3, 100, 7);
	seen = harvest(env->main);
	expect(&seen, 3, 100, 7);

	/* Everything, and the first and the last page. */
	write_pages(env, SLOT_MAIN, 0, MAIN_PAGES, 1);
	seen = harvest(env->main);
	expect(&seen, 0, MAIN_PAGES, 1);
	write_pages(env, SLOT_MAIN, 0, 2, MAIN_PAGES - 1);
	seen = harvest(env->main);
	expect(&seen, 0, 2, MAIN_PAGES - 1);
}

static void test_slots_apart(const void *mode)
{
	struct env *env = setup(mode);
	struct seen seen;

	write_pages(env, SLOT_ODD, 0, ODD_PAGES, 1);
	write_pages(env, SLOT_MAIN, 64, 64, 1);
	seen = harvest(env->main);
	expect(&seen, 64, 64, 1);
	write_pages(env, SLOT_MAIN, 1, 1, 1);
	seen = harvest(env->odd);
	expect(&seen, 0, ODD_PAGES, 1);
	seen = harvest(env->main);
	expect(&seen, 1, 1, 1);
	write_pages(env, SLOT_ODD, ODD_PAGES - 1, 1, 1);
	seen = harvest(env->odd);
	expect(&seen, ODD_PAGES - 1, 1, 1);
}

static void test_array_of_one(const void *mode)
{
	struct env *env = setup(mode);
	struct kvmdirty_run run;
	struct seen seen;

	write_pages(env, SLOT_MAIN, 1, 100, 10);
	seen = harvest_n(env->main, 1);
	expect(&seen, 1, 100, 10);

	/* What is written between two calls is in a later one, before a 0. */
	write_pages(env, SLOT_MAIN, 100, 2, 100);
	memset(&seen, 0, sizeof(seen));
	CHECK_EQ(kvmdirty_harvest(env->main, &run, 1, 0, NULL), 1);
	see(&seen, &run);
	write_pages(env, SLOT_MAIN, 2, 1, 1);
	CHECK_EQ(harvest_some(env->main, &seen, 1), 0);
	CHECK(seen.page[2] == 1 && seen.page[100] == 1 && seen.page[200] == 1,
	      "%u %u %u", seen.page[2], seen.page[100], seen.page[200]);
	CHECK_EQ(seen.pages, 3);

	CHECK_EQ(kvmdirty_harvest(env->main, &run, 0, 0, NULL), -EINVAL);
	CHECK_EQ(kvmdirty_harvest(env->main, &run, 1, ~0U, NULL), -EINVAL);
}

struct taker {
	struct seen seen;
	int calls;
	int refuse_at, stop_at;		/* this call, counted from 1 */
	struct kvmdirty_slot *slot;
	bool attached;
	int reentry;
	struct env *env;
};

static int take(const struct kvmdirty_run *run, void *arg)
{
	struct taker *taker = arg;

	taker->calls++;
	if (taker->calls == taker->refuse_at)
		return -EIO;
	see(&taker->seen, run);
	return taker->calls == taker->stop_at;
}

static void test_budget(const void *mode)
{
	struct env *env = setup(mode);
	struct kvmdirty_result result;
	struct taker taker = { .calls = 0 };
	int r, calls = 0;

	/* Runs that are longer than the budget, and single pages. */
	write_pages(env, SLOT_MAIN, 0, 100, 1);
	write_pages(env, SLOT_MAIN, 200, 50, 2);
	do {
		uint64_t before = taker.seen.pages;

		r = kvmdirty_harvest_each(env->main, take, &taker, 7, 0, &result);
		CHECK(r >= 0, "%d", r);
		CHECK(result.nr_pages <= 7, "%lu pages", (unsigned long)result.nr_pages);
		CHECK_EQ(result.nr_pages, taker.seen.pages - before);
		calls++;
	} while (r);
	CHECK(calls >= 150 / 7, "%d calls", calls);
	CHECK_EQ(taker.seen.pages, 150);
	for (r = 0; r < 100; r++) {
		CHECK(taker.seen.page[r] == 1, "page %d: %u", r, taker.seen.page[r]);
		CHECK(taker.seen.page[200 + r] == !(r % 2), "page %d", 200 + r);
	}

	/* No limit. */
	memset(&taker, 0, sizeof(taker));
	write_pages(env, SLOT_MAIN, 5, 300, 3);
	CHECK_EQ(kvmdirty_harvest_each(env->main, take, &taker, 0, 0, &result), 0);
	expect(&taker.seen, 5, 300, 3);
	CHECK_EQ(kvmdirty_harvest_each(env->main, NULL, NULL, 0, 0, &result), -EINVAL);
}

static void test_callback_refuses(const void *mode)
{
	struct env *env = setup(mode);
	struct taker taker = { .refuse_at = 3 };
	struct kvmdirty_result result;
	struct seen rest;
	uint32_t i;

	write_pages(env, SLOT_MAIN, 0, 100, 10);
	CHECK_EQ(kvmdirty_harvest_each(env->main, take, &taker, 0, 0, &result), -EIO);
	CHECK_EQ(taker.seen.pages, 2);
	CHECK_EQ(result.nr_pages, 2);
	rest = harvest(env->main);
	CHECK_EQ(rest.pages, 98);
	for (i = 0; i < 100; i++)
		rest.page[i * 10] += taker.seen.page[i * 10];
	rest.pages += 2;
	expect(&rest, 0, 100, 10);

	/* One that says stop has taken its run. */
	memset(&taker, 0, sizeof(taker));
	taker.stop_at = 4;
	write_pages(env, SLOT_MAIN, 0, 100, 10);
	CHECK_EQ(kvmdirty_harvest_each(env->main, take, &taker, 0, 0, &result), 1);
	CHECK_EQ(result.nr_pages, 4);
	taker.stop_at = 0;
	CHECK_EQ(kvmdirty_harvest_each(env->main, take, &taker, 0, 0, &result), 0);
	expect(&taker.seen, 0, 100, 10);
}

static int reenter(const struct kvmdirty_run *run, void *arg)
{
	struct taker *taker = arg;
	struct kvmdirty_run other = { .offset = 1, .npages = 1 };

	if (!taker->calls++) {
		taker->reentry = kvmdirty_harvest(taker->slot, &other, 1, 0, NULL);
		CHECK_EQ(kvmdirty_stop(taker->slot, NULL),
			 taker->attached ? -EOPNOTSUPP : -EDEADLK);
		CHECK_EQ(kvmdirty_untrack(taker->slot, ~0U), -EINVAL);
		CHECK_EQ(kvmdirty_untrack(taker->slot, 0), -EDEADLK);
		CHECK_EQ(kvmdirty_untrack(taker->slot, KVMDIRTY_UNTRACK_DROP), -EDEADLK);
		CHECK_EQ(kvmdirty_mark(taker->slot, &other, 1), 0);
		CHECK_EQ(kvmdirty_discard(taker->slot, &other, 1), -EDEADLK);
	}
	see(&taker->seen, run);
	return 0;
}

static void test_callback_calls_back(const void *mode)
{
	struct env *env = setup(mode);
	struct taker taker = { .slot = env->main };
	struct seen rest;

	write_pages(env, SLOT_MAIN, 50, 2, 50);
	CHECK_EQ(kvmdirty_harvest_each(env->main, reenter, &taker, 0, 0, NULL), 0);
	CHECK_EQ(taker.reentry, -EDEADLK);
	rest = harvest(env->main);
	CHECK_EQ(rest.page[1] + taker.seen.page[1], 1);
	CHECK_EQ(rest.pages + taker.seen.pages, 3);
	if (env->mode->backend != KVMDIRTY_SLOT_RING)
		return;

	memset(&taker, 0, sizeof(taker));
	taker.attached = true;
	CHECK_EQ(kvmdirty_attach(kvmdirty_fd(env->main), &taker.slot), 0);
	write_pages(env, SLOT_MAIN, 50, 2, 50);
	CHECK_EQ(kvmdirty_harvest_each(taker.slot, reenter, &taker, 0, 0, NULL), 0);
	CHECK_EQ(taker.reentry, -EDEADLK);
	rest = harvest(taker.slot);
	CHECK_EQ(rest.page[1] + taker.seen.page[1], 1);
	CHECK_EQ(rest.pages + taker.seen.pages, 3);
	CHECK_EQ(kvmdirty_untrack(taker.slot, 0), 0);
}

/* The promise: a page that is written as soon as it is handed out comes again. */
static int write_again(const struct kvmdirty_run *run, void *arg)
{
	struct taker *taker = arg;
	uint32_t i;

	for (i = 0; i < run->npages; i++) {
		if (!taker->seen.page[run->offset + i])
			write_pages(taker->env, SLOT_MAIN, run->offset + i, 1, 1);
	}
	see(&taker->seen, run);
	return 0;
}

static void test_rearmed(const void *mode)
{
	struct env *env = setup(mode);
	struct taker taker = { .env = env };
	uint32_t i;
	int r;

	/* As many as the back ends take in several steps. */
	write_pages(env, SLOT_MAIN, 0, MAIN_PAGES, 1);
	do {
		r = kvmdirty_harvest_each(env->main, write_again, &taker, 200, 0, NULL);
		CHECK(r >= 0, "%d", r);
	} while (r);
	for (i = 0; i < MAIN_PAGES; i++)
		CHECK(taker.seen.page[i] == 2, "page %u: %u times", i, taker.seen.page[i]);
}

static void test_bad_array(const void *mode)
{
	struct env *env = setup(mode);
	struct kvmdirty_result result;
	struct kvmdirty_run *runs;
	struct seen seen;
	uint8_t *p;
	size_t i;
	int r;

	p = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(p != MAP_FAILED, "mmap");
	CHECK_EQ(mprotect(p + PAGE, PAGE, PROT_READ), 0);
	if (env->mode->backend != KVMDIRTY_SLOT_RING && madvise(p, PAGE, 23))
		ktap_skip("this kernel has no MADV_POPULATE_WRITE");

	write_pages(env, SLOT_MAIN, 0, 40, 2);
	r = kvmdirty_harvest(env->main, (void *)(p + PAGE), 512, 0, &result);
	CHECK_EQ(r, -EFAULT);
	CHECK_EQ(result.nr_runs, 0);
	CHECK_EQ(mprotect(p + PAGE, PAGE, PROT_NONE), 0);
	CHECK_EQ(kvmdirty_harvest(env->main, (void *)(p + PAGE), 512, 0, &result), -EFAULT);
	CHECK_EQ(kvmdirty_harvest(env->main, (void *)16, 512, 0, &result), -EFAULT);

	/* An array whose end cannot be written: what was stored is good, the rest stays. */
	memset(&seen, 0, sizeof(seen));
	runs = (void *)(p + PAGE - 8 * sizeof(*runs));
	r = kvmdirty_harvest(env->main, runs, 512, 0, &result);
	CHECK(r == 1 || r == -EFAULT, "%d", r);
	CHECK(result.nr_runs <= 8, "%lu runs", (unsigned long)result.nr_runs);
	for (i = 0; i < result.nr_runs; i++)
		see(&seen, &runs[i]);
	CHECK_EQ(harvest_some(env->main, &seen, 512), 0);
	expect(&seen, 0, 40, 2);
}

static void test_mark(const void *mode)
{
	struct env *env = setup(mode);
	struct kvmdirty_run runs[] = { { 10, 5 }, { 64, 200 }, { MAIN_PAGES - 1, 1 } };
	struct kvmdirty_run bad[] = { { 1, 1 }, { MAIN_PAGES - 1, 2 } };
	struct kvmdirty_run empty[] = { { 1, 1 }, { 2, 0 } };
	struct kvmdirty_run far[] = { { 0xffffffff, 0xffffffff } };
	struct seen seen;

	CHECK_EQ(kvmdirty_mark(env->main, runs, 3), 0);
	CHECK_EQ(kvmdirty_mark(env->main, runs, 1), 0);
	/* Written by the guest as well: still once. */
	write_pages(env, SLOT_MAIN, 12, 1, 1);
	write_pages(env, SLOT_MAIN, 100, 3, 1);
	seen = harvest(env->main);
	CHECK_EQ(seen.pages, 206);
	CHECK(seen.page[10] == 1 && seen.page[12] == 1 && seen.page[14] == 1, "10 to 14");
	CHECK(seen.page[64] == 1 && seen.page[100] == 1 && seen.page[263] == 1, "64 to 263");
	CHECK_EQ(seen.page[MAIN_PAGES - 1], 1);
	seen = harvest(env->main);
	expect(&seen, 0, 0, 1);

	CHECK_EQ(kvmdirty_mark(env->main, bad, 2), -EINVAL);
	CHECK_EQ(kvmdirty_mark(env->main, empty, 2), -EINVAL);
	CHECK_EQ(kvmdirty_mark(env->main, far, 1), -EINVAL);
	CHECK_EQ(kvmdirty_mark(env->main, runs, 0), 0);
	CHECK_EQ(kvmdirty_mark(env->odd, runs, 3), -EINVAL);
	seen = harvest(env->main);
	expect(&seen, 0, 0, 1);
	seen = harvest(env->odd);
	expect(&seen, 0, 0, 1);
}

static void test_discard(const void *mode)
{
	struct env *env = setup(mode);
	struct kvmdirty_run runs[] = { { 30, 40 }, { 500, 500 } };
	struct kvmdirty_run bad[] = { { 0, 1 }, { MAIN_PAGES, 1 } };
	struct kvmdirty_run mark = { 35, 2 };
	struct kvmdirty_run last = { ODD_PAGES - 30, 30 };
	struct taker taker = { .calls = 0 };
	struct kvmdirty_run one;
	struct seen seen;
	uint32_t i, n;

	write_pages(env, SLOT_MAIN, 0, 100, 1);
	write_pages(env, SLOT_MAIN, 600, 100, 1);
	CHECK_EQ(kvmdirty_mark(env->main, &mark, 1), 0);
	CHECK_EQ(kvmdirty_discard(env->main, bad, 2), -EINVAL);
	CHECK_EQ(kvmdirty_discard(env->main, runs, 2), 0);
	/* Re-armed: written again, it is logged again. */
	write_pages(env, SLOT_MAIN, 40, 1, 1);
	write_pages(env, SLOT_MAIN, 650, 1, 1);
	seen = harvest(env->main);
	CHECK_EQ(seen.pages, 30 + 30 + 2);
	CHECK(seen.page[29] == 1 && !seen.page[30] && !seen.page[35] && seen.page[40] == 1 &&
	      !seen.page[69] && seen.page[70] == 1 && !seen.page[600] && seen.page[650] == 1,
	      "wrong pages");

	/* In the middle of a harvest. */
	write_pages(env, SLOT_MAIN, 10, 50, 2);
	memset(&seen, 0, sizeof(seen));
	CHECK_EQ(kvmdirty_harvest(env->main, &one, 1, 0, NULL), 1);
	see(&seen, &one);
	CHECK_EQ(kvmdirty_discard(env->main, runs, 1), 0);
	CHECK_EQ(harvest_some(env->main, &seen, 512), 0);
	CHECK(seen.pages == 30 || seen.pages == 31, "%lu pages", (unsigned long)seen.pages);

	/* ... of which the end has not been looked at yet. */
	write_pages(env, SLOT_MAIN, 0, MAIN_PAGES, 1);
	CHECK_EQ(kvmdirty_harvest_each(env->main, take, &taker, 100, 0, NULL), 1);
	seen = taker.seen;
	one = (struct kvmdirty_run){ 700, 300 };
	CHECK_EQ(kvmdirty_discard(env->main, &one, 1), 0);
	CHECK_EQ(harvest_some(env->main, &seen, 512), 0);
	n = 300;
	for (i = 700; i < 1000; i++)
		n -= taker.seen.page[i];	/* too late to discard */
	CHECK_EQ(seen.pages, MAIN_PAGES - n);
	CHECK(seen.page[699] == 1 && seen.page[700] == taker.seen.page[700] &&
	      seen.page[999] == taker.seen.page[999] && seen.page[1000] == 1, "wrong pages");

	/* The end of a slot that is no multiple of 64. */
	write_pages(env, SLOT_ODD, 0, ODD_PAGES, 1);
	CHECK_EQ(kvmdirty_discard(env->odd, &last, 1), 0);
	seen = harvest(env->odd);
	expect(&seen, 0, ODD_PAGES - 30, 1);
	write_pages(env, SLOT_ODD, ODD_PAGES - 1, 1, 1);
	seen = harvest(env->odd);
	expect(&seen, ODD_PAGES - 1, 1, 1);
}

static void test_stop(const void *mode)
{
	struct env *env = setup(mode);
	struct kvmdirty_run run = { 0, 1 };
	struct kvmdirty_info info;
	struct seen seen;

	/* A harvest is half way when it stops. */
	write_pages(env, SLOT_MAIN, 2, 200, 5);
	memset(&seen, 0, sizeof(seen));
	CHECK_EQ(kvmdirty_harvest(env->main, &run, 1, 0, NULL), 1);
	see(&seen, &run);
	CHECK_EQ(kvmdirty_stop(env->main, &env->vm.region[SLOT_MAIN]), 0);
	CHECK_EQ(env->vm.region[SLOT_MAIN].flags, 0);
	CHECK_EQ(kvmdirty_stop(env->main, &env->vm.region[SLOT_MAIN]), 0);
	write_pages(env, SLOT_MAIN, 0, 1, 1);		/* not logged any more */

	CHECK_EQ(kvmdirty_info(env->main, &info, sizeof(info)), 0);
	CHECK_EQ(info.flags, KVMDIRTY_INFO_STOPPED);
	CHECK_EQ(kvmdirty_untrack(env->main, 0), -EBUSY);
	CHECK_EQ(harvest_some(env->main, &seen, 7), 0);
	expect(&seen, 2, 200, 5);
	CHECK_EQ(harvest_some(env->main, &seen, 7), -ENODEV);
	run = (struct kvmdirty_run){ 0, 1 };
	CHECK_EQ(kvmdirty_mark(env->main, &run, 1), -ENODEV);
	CHECK_EQ(kvmdirty_discard(env->main, &run, 1), -ENODEV);
	CHECK_EQ(kvmdirty_untrack(env->main, 0), 0);

	/* The other one goes on, and this one can be tracked again. */
	write_pages(env, SLOT_ODD, 1, 1, 1);
	seen = harvest(env->odd);
	expect(&seen, 1, 1, 1);
	CHECK_EQ(kvmdirty_track(env->kd, &env->vm.region[SLOT_MAIN], &env->main), 0);
	write_pages(env, SLOT_MAIN, 9, 1, 1);
	seen = harvest(env->main);
	CHECK_EQ(seen.page[9], 1);
}

static void test_untrack(const void *mode)
{
	struct env *env = setup(mode);
	struct seen seen;

	CHECK_EQ(kvmdirty_untrack(NULL, 0), 0);
	CHECK_EQ(kvmdirty_untrack(env->main, ~0U), -EINVAL);

	/* The VMM turns logging off by itself, after kvmdirty_stop(). */
	write_pages(env, SLOT_MAIN, 1, 10, 10);
	CHECK_EQ(kvmdirty_untrack(env->main, 0), -EBUSY);
	CHECK_EQ(kvmdirty_stop(env->main, NULL), 0);
	env->vm.region[SLOT_MAIN].flags = 0;
	CHECK_EQ(ioctl(env->vm.fd, KVM_SET_USER_MEMORY_REGION, &env->vm.region[SLOT_MAIN]), 0);
	memset(&seen, 0, sizeof(seen));
	CHECK_EQ(harvest_some(env->main, &seen, 3), 0);
	expect(&seen, 1, 10, 10);
	CHECK_EQ(kvmdirty_untrack(env->main, 0), 0);

	/* ... or deletes the memslot. */
	write_pages(env, SLOT_ODD, 1, 10, 10);
	CHECK_EQ(kvmdirty_stop(env->odd, NULL), 0);
	env->vm.region[SLOT_ODD].memory_size = 0;
	CHECK_EQ(ioctl(env->vm.fd, KVM_SET_USER_MEMORY_REGION, &env->vm.region[SLOT_ODD]), 0);
	CHECK_EQ(kvmdirty_untrack(env->odd, 0), -EBUSY);
	seen = harvest(env->odd);
	expect(&seen, 1, 10, 10);
	CHECK_EQ(kvmdirty_untrack(env->odd, 0), 0);

	/* DROP forgets. */
	CHECK_EQ(kvmdirty_track(env->kd, &env->vm.region[SLOT_MAIN], &env->main), 0);
	write_pages(env, SLOT_MAIN, 1, 10, 10);
	CHECK_EQ(kvmdirty_untrack(env->main, KVMDIRTY_UNTRACK_DROP), 0);
	kvmdirty_close(env->kd);
}

static void test_track(const void *mode)
{
	struct kvm_userspace_memory_region wrong;
	struct kvmdirty_slot *slot;
	struct kvmdirty_info info;
	struct env env;
	struct seen seen;

	open_env(&env, mode, 0);	/* the default */
	add_vcpu(&env);

	wrong = env.vm.region[SLOT_MAIN];
	wrong.memory_size = 0;
	CHECK_EQ(kvmdirty_track(env.kd, &wrong, &slot), -EINVAL);
	wrong.memory_size = PAGE + 1;
	CHECK_EQ(kvmdirty_track(env.kd, &wrong, &slot), -EINVAL);

	/* The library turns logging on, and says so. */
	CHECK_EQ(kvmdirty_track(env.kd, &env.vm.region[SLOT_ODD], &env.odd), 0);
	CHECK_EQ(env.vm.region[SLOT_ODD].flags, KVM_MEM_LOG_DIRTY_PAGES);
	CHECK_EQ(kvmdirty_track(env.kd, &env.vm.region[SLOT_ODD], &slot), -EEXIST);

	/* The VMM did, and it lies about that or about the size. */
	wrong = env.vm.region[SLOT_MAIN];
	wrong.flags = KVM_MEM_LOG_DIRTY_PAGES;
	if (env.mode->backend != KVMDIRTY_RING)
		CHECK_EQ(kvmdirty_track(env.kd, &wrong, &slot), -ENOENT);
	env.vm.region[SLOT_MAIN].flags = KVM_MEM_LOG_DIRTY_PAGES;
	CHECK_EQ(ioctl(env.vm.fd, KVM_SET_USER_MEMORY_REGION, &env.vm.region[SLOT_MAIN]), 0);
	wrong.memory_size = 32 * PAGE;
	if (env.mode->backend == KVMDIRTY_SLOT_RING)
		CHECK_EQ(kvmdirty_track(env.kd, &wrong, &slot), -EINVAL);
	CHECK_EQ(kvmdirty_track(env.kd, &env.vm.region[SLOT_MAIN], &env.main), 0);
	settle(&env);
	write_pages(&env, SLOT_MAIN, 77, 3, 1);
	seen = harvest(env.main);
	expect(&seen, 77, 3, 1);

	CHECK_EQ(kvmdirty_info(env.main, &info, sizeof(info)), 0);
	CHECK_EQ(info.backend, env.mode->backend);
	CHECK_EQ(info.slot, SLOT_MAIN);
	CHECK_EQ(info.npages, MAIN_PAGES);
	CHECK_EQ(info.base_gfn, MAIN_GPA / PAGE);
	CHECK_EQ(info.flags, 0);
	CHECK_EQ(info.nr_rings, env.mode->backend == KVMDIRTY_BITMAP ? 0 : 1);
	CHECK_EQ(info.ring_entries, env.mode->backend == KVMDIRTY_BITMAP ? 0 : 4096);
}

/* A memslot that is moved keeps its log. */
static void test_move(const void *mode)
{
	struct env *env = setup(mode);
	struct seen seen;

	write_pages(env, SLOT_ODD, 1, 2, 3);
	env->vm.region[SLOT_ODD].guest_phys_addr += 0x1000000;
	CHECK_EQ(ioctl(env->vm.fd, KVM_SET_USER_MEMORY_REGION, &env->vm.region[SLOT_ODD]), 0);
	write_pages(env, SLOT_ODD, 50, 2, 3);
	seen = harvest(env->odd);
	CHECK(seen.page[1] && seen.page[4] && seen.page[50] && seen.page[53], "lost by the move");
}

static void test_ring_full(const void *mode)
{
	const struct mode *m = mode;
	struct env *env = setup_few_entries(m);
	struct kvmdirty_vm_stats stats;
	struct kvmdirty_run runs[16];
	struct seen seen;
	unsigned int full;

	/* More than the ring holds, without anybody who harvests. */
	full = env->vm.vcpu[0].full;
	write_pages(env, SLOT_MAIN, 0, MAIN_PAGES, 1);
	full = env->vm.vcpu[0].full - full;
	CHECK((full > 0) == (m->backend == KVMDIRTY_RING), "%u exits", full);
	seen = harvest_n(env->main, 3);
	expect(&seen, 0, MAIN_PAGES, 1);
	kvmdirty_vm_stats(env->kd, &stats, sizeof(stats));
	CHECK_EQ(stats.full_exits, env->vm.vcpu[0].full);
	CHECK_EQ(stats.stray, 0);

	/* With a harvest half done. */
	write_pages(env, SLOT_MAIN, 0, MAIN_PAGES / 2, 2);
	CHECK_EQ(kvmdirty_harvest(env->main, runs, 16, 0, NULL), 1);
	write_pages(env, SLOT_MAIN, 1, MAIN_PAGES / 2, 2);
	seen = harvest(env->main);
	CHECK(seen.page[1] == 1 && seen.page[MAIN_PAGES - 1] == 1, "lost");
	CHECK(seen.pages >= MAIN_PAGES - 16 && seen.pages <= MAIN_PAGES, "%lu pages",
	      (unsigned long)seen.pages);

	/* Not one of ours. */
	CHECK_EQ(env->vm.vcpu[0].run->exit_reason, KVM_EXIT_HLT);
	CHECK_EQ(kvmdirty_vcpu_full(env->kd, env->vm.vcpu[0].fd, env->vm.vcpu[0].run), 0);
	/* A vCPU that nobody added would exit for ever. */
	env->vm.vcpu[0].run->exit_reason = KVM_EXIT_DIRTY_RING_FULL;
	CHECK_EQ(kvmdirty_vcpu_full(env->kd, env->vm.fd, env->vm.vcpu[0].run), -ENOENT);
}

static void test_add_vcpu(const void *mode)
{
	struct env *env = setup(mode);
	struct minivcpu *vcpu;
	struct seen seen;

	CHECK_EQ(kvmdirty_add_vcpu(env->kd, env->vm.vcpu[0].fd), -EEXIST);
	CHECK_EQ(kvmdirty_add_vcpu(env->kd, env->vm.fd), -ENOTTY);
	CHECK_EQ(kvmdirty_add_vcpu(env->kd, -1), -EBADF);

	write_pages(env, SLOT_MAIN, 0, 10, 1);
	vcpu = add_vcpu(env);
	CHECK_EQ(minivcpu_write(vcpu, SLOT_MAIN, 5, 10, 1), 0);
	seen = harvest(env->main);
	CHECK(seen.page[0] == 1 && seen.page[9] && seen.page[14] == 1, "lost");
	if (env->mode->backend != KVMDIRTY_RING)	/* the one with duplicates in KVM */
		expect(&seen, 0, 15, 1);
	CHECK_EQ(seen.pages, 15);
}

static void *vcpu_thread(void *arg)
{
	struct minivcpu *vcpu = arg;

	vcpu->result = minivcpu_run(vcpu);
	return NULL;
}

static void wake(int sig)
{
	(void)sig;
}

static void start_random(struct env *env, pthread_t *thread, int nr)
{
	int i;

	signal(SIGUSR1, wake);
	for (i = 0; i < nr; i++) {
		minivcpu_setup(&env->vm.vcpu[i], guest_random, MAIN_GPA + 4 * i, 0xffffffff, 0,
			       i * 7919 + getpid());
		CHECK_EQ(pthread_create(&thread[i], NULL, vcpu_thread, &env->vm.vcpu[i]), 0);
	}
}

static void stop_random(struct env *env, pthread_t *thread, int nr)
{
	int i;

	__atomic_store_n(&env->vm.stop, true, __ATOMIC_RELEASE);
	for (i = 0; i < nr; i++) {
		env->vm.vcpu[i].run->immediate_exit = 1;
		pthread_kill(thread[i], SIGUSR1);
		pthread_join(thread[i], NULL);
		CHECK_EQ(env->vm.vcpu[i].result, 0);
		env->vm.vcpu[i].run->immediate_exit = 0;
	}
	env->vm.stop = false;
}

struct copier {
	uint8_t *from, *to;
	uint64_t pages;
};

static int copy_run(const struct kvmdirty_run *run, void *arg)
{
	struct copier *copier = arg;

	memcpy(copier->to + run->offset * PAGE, copier->from + run->offset * PAGE,
	       run->npages * PAGE);
	copier->pages += run->npages;
	return 0;
}

/*
 * The test that counts: copy what a harvest says while vCPUs write, then stop them,
 * harvest once more, and the copy must be the memory.
 */
static void run_and_copy(struct env *env)
{
	struct kvmdirty_run runs[64];
	struct kvmdirty_result result;
	struct copier copier = { .from = env->vm.mem[SLOT_MAIN] };
	pthread_t thread[2];
	int r, round, i;
	uint32_t page;
	size_t n;

	copier.to = malloc(MAIN_PAGES * PAGE);
	memcpy(copier.to, copier.from, MAIN_PAGES * PAGE);
	add_vcpu(env);
	for (round = 0; round < 2; round++) {
		uint64_t before = copier.pages;

		start_random(env, thread, 2);
		for (i = 0; i < 20; i++) {
			usleep(1000);
			if (i % 2) {
				r = kvmdirty_harvest(env->main, runs, 64, 0, &result);
				CHECK(r >= 0, "%d", r);
				for (n = 0; n < result.nr_runs; n++)
					copy_run(&runs[n], &copier);
			} else {
				r = kvmdirty_harvest_each(env->main, copy_run, &copier, 200,
							  i % 4 ? KVMDIRTY_HARVEST_NOSYNC : 0,
							  NULL);
				CHECK(r >= 0, "%d", r);
			}
		}
		stop_random(env, thread, 2);
		do {
			r = kvmdirty_harvest_each(env->main, copy_run, &copier, 1000, 0, NULL);
			CHECK(r >= 0, "%d", r);
		} while (r);
		CHECK(copier.pages > before, "the guest wrote nothing");
		for (page = 0; page < MAIN_PAGES; page++)
			CHECK(!memcmp(copier.to + page * PAGE, copier.from + page * PAGE, PAGE),
			      "page %u of round %d is lost", page, round);
	}
	printf("# %lu pages copied\n", (unsigned long)copier.pages);
}

static void test_running(const void *mode)
{
	run_and_copy(setup(mode));
}

static void test_running_full(const void *mode)
{
	run_and_copy(setup_few_entries(mode));
}

static void *harvest_thread(void *arg)
{
	struct env *env = arg;
	struct seen *seen = calloc(1, sizeof(*seen));

	while (!__atomic_load_n(&env->vm.stop, __ATOMIC_ACQUIRE)) {
		struct kvmdirty_run run;

		if (kvmdirty_harvest(env->odd, &run, 1, 0, NULL) < 0)
			return seen;
		usleep(100);
	}
	return seen;
}

/* While one slot's harvest has collected pages of another and not yet re-armed them. */
static void harvest_early(void *arg)
{
	struct env *env = arg;
	struct kvmdirty_run runs[9];
	struct kvmdirty_result result;
	uint32_t i;

	CHECK_EQ(kvmdirty_harvest(env->main, runs, 9, 0, &result), 1);
	CHECK_EQ(result.nr_pages, 9);
	for (i = 0; i < 9; i++)
		CHECK_EQ(runs[i].offset, 2 * i + 2);
}

static void test_collected_by_others(const void *mode)
{
	struct env *env = setup(mode);
	struct kvmdirty_run run;
	struct seen seen;

	/* A harvest under way: page 0 of 0, 2, ... 20. */
	write_pages(env, SLOT_MAIN, 0, 11, 2);
	CHECK_EQ(kvmdirty_harvest(env->main, &run, 1, 0, NULL), 1);
	CHECK(env->mode->backend == KVMDIRTY_SLOT_RING || !run.offset, "%u", run.offset);
	write_pages(env, SLOT_MAIN, 5, 2, 2);
	if (env->mode->backend == KVMDIRTY_RING) {
		before_reset_arg = env;
		before_reset = harvest_early;
	}
	seen = harvest(env->odd);
	expect(&seen, 0, 0, 1);
	CHECK(!before_reset, "no reset");
	seen = harvest(env->main);
	CHECK(seen.page[5] == 1 && seen.page[7] == 1 && seen.page[20] == 1, "lost");
	CHECK_EQ(seen.pages, env->mode->backend == KVMDIRTY_RING ? 3 : 12);
}

/* What the skip above relies on: a ring in which every entry is taken is an error. */
static void test_overrun(const void *mode)
{
	struct env *env = setup(mode);
	struct kvm_dirty_gfn *ring;
	struct kvmdirty_run run;
	uint32_t i;

	if (env->mode->backend != KVMDIRTY_RING)
		return;
	ring = mmap(NULL, MANY_ENTRIES * sizeof(*ring), PROT_READ | PROT_WRITE, MAP_SHARED,
		    env->vm.vcpu[0].fd, KVM_DIRTY_LOG_PAGE_OFFSET * PAGE);
	CHECK(ring != MAP_FAILED, "mmap");
	for (i = 0; i < MANY_ENTRIES; i++) {
		ring[i].slot = SLOT_MAIN;
		ring[i].offset = i % 10;
		ring[i].flags = KVM_DIRTY_GFN_F_DIRTY;
	}
	CHECK_EQ(kvmdirty_harvest(env->main, &run, 1, 0, NULL), -EOVERFLOW);
	CHECK_EQ(kvmdirty_harvest(env->main, &run, 1, 0, NULL), -EOVERFLOW);
}

/* One thread harvests ODD, another MAIN: no page of one is lost to the other. */
static void test_two_harvesters(const void *mode)
{
	struct env *env = setup(mode);
	pthread_t thread;
	struct seen seen;
	void *ret;
	int i;

	CHECK_EQ(pthread_create(&thread, NULL, harvest_thread, env), 0);
	for (i = 0; i < 20; i++) {
		write_pages(env, SLOT_MAIN, i, 300, 3);
		seen = harvest(env->main);
		expect(&seen, i, 300, 3);
	}
	env->vm.stop = true;
	pthread_join(thread, &ret);
	free(ret);
}

/* Each of the ioctls fails once, at different points: an error, and nothing lost. */
static void test_failing_ioctls(const void *mode)
{
	static const struct {
		enum kvmdirty_backend backend;
		unsigned long request;
		int nr, error, result;
	} faults[] = {
		{ KVMDIRTY_SLOT_RING, KVM_DIRTY_SLOT_LOG_HARVEST, 1, EINTR, -EINTR },
		{ KVMDIRTY_SLOT_RING, KVM_DIRTY_SLOT_LOG_HARVEST, 1, ENOMEM, -ENOMEM },
		{ KVMDIRTY_RING, KVM_RESET_DIRTY_RINGS, 1, EIO, -EIO },
		{ KVMDIRTY_RING, KVM_RESET_DIRTY_RINGS, 1, 0, -EINTR },	/* a signal */
		{ KVMDIRTY_BITMAP, KVM_GET_DIRTY_LOG, 1, ENOMEM, -ENOMEM },
		{ KVMDIRTY_BITMAP, KVM_CLEAR_DIRTY_LOG, 1, ENOMEM, -ENOMEM },
	};
	struct env *env = setup(mode);
	struct seen seen;
	size_t i;
	int skip, r;

	for (i = 0; i < ARRAY_SIZE(faults); i++) {
		if (faults[i].backend != env->mode->backend)
			continue;
		if (env->mode->flags && faults[i].request == KVM_CLEAR_DIRTY_LOG)
			continue;
		for (skip = 0; skip < 4; skip++) {
			write_pages(env, SLOT_MAIN, 3, 200, 5);
			memset(&seen, 0, sizeof(seen));
			fail_ioctl(faults[i].request, skip, faults[i].nr, faults[i].error);
			r = harvest_some(env->main, &seen, 100);
			CHECK(r == faults[i].result || (skip && !r), "fault %zu: %d", i, r);
			CHECK(skip || r, "no fault");
			fail_ioctl(0, 0, 0, 0);
			CHECK_EQ(harvest_some(env->main, &seen, 100), 0);
			expect(&seen, 3, 200, 5);
		}
	}
}

static void test_stop_fails(const void *mode)
{
	struct env *env = setup(mode);
	struct seen seen;

	write_pages(env, SLOT_MAIN, 3, 70, 5);
	fail_ioctl(KVM_SET_USER_MEMORY_REGION, 0, 1, ENOMEM);
	CHECK_EQ(kvmdirty_stop(env->main, &env->vm.region[SLOT_MAIN]), -ENOMEM);
	CHECK_EQ(env->vm.region[SLOT_MAIN].flags, KVM_MEM_LOG_DIRTY_PAGES);
	seen = harvest(env->main);
	expect(&seen, 3, 70, 5);
	write_pages(env, SLOT_MAIN, 3, 70, 5);
	seen = harvest(env->main);
	expect(&seen, 3, 70, 5);
}

static void test_stats(const void *mode)
{
	struct env *env = setup(mode);
	struct kvmdirty_run run = { 1000, 10 };
	struct kvmdirty_stats before, after;
	struct { uint64_t harvests, runs; } old;
	struct { struct kvmdirty_stats stats; uint64_t more[4]; } later;
	struct taker taker = { .calls = 0 };

	kvmdirty_stats(env->main, &before, sizeof(before));
	write_pages(env, SLOT_MAIN, 0, 10, 10);
	CHECK_EQ(kvmdirty_harvest_each(env->main, take, &taker, 4, 0, NULL), 1);
	CHECK_EQ(kvmdirty_harvest_each(env->main, take, &taker, 0, 0, NULL), 0);
	CHECK_EQ(kvmdirty_mark(env->main, &run, 1), 0);
	CHECK_EQ(kvmdirty_discard(env->main, &run, 1), 0);
	kvmdirty_stats(env->main, &after, sizeof(after));
	CHECK_EQ(after.harvests - before.harvests, 2);
	CHECK_EQ(after.runs - before.runs, 10);
	CHECK_EQ(after.pages - before.pages, 10);
	CHECK_EQ(after.marked_pages - before.marked_pages, 10);
	CHECK_EQ(after.discarded_pages - before.discarded_pages, 10);
	CHECK(after.ioctls > before.ioctls || env->mode->backend == KVMDIRTY_RING, "ioctls");

	/* Programs built with an older or a newer header. */
	kvmdirty_stats(env->main, (void *)&old, sizeof(old));
	CHECK(old.harvests == after.harvests && old.runs == after.runs, "an older struct");
	memset(&later, 0xff, sizeof(later));
	kvmdirty_stats(env->main, &later.stats, sizeof(later));
	CHECK(later.stats.pages == after.pages && !later.more[3], "a newer struct");
}

static void test_reopen(const void *mode)
{
	struct env *env = setup(mode);
	struct kvmdirty_options options = {
		.size = sizeof(options), .backend = env->mode->backend, .flags = env->mode->flags,
	};
	struct seen seen;
	int r;

	CHECK_EQ(kvmdirty_stop(env->main, &env->vm.region[SLOT_MAIN]), 0);
	kvmdirty_close(env->kd);
	r = kvmdirty_open(env->vm.fd, &options, &env->kd);
	if (env->mode->backend == KVMDIRTY_RING) {
		CHECK_EQ(r, -EBUSY);
		CHECK(options.reason && strstr(options.reason, "already"), "%s", options.reason);
		return;
	}
	CHECK(!r, "%d: %s", r, options.reason);
	env->vm.kd = env->kd;
	CHECK_EQ(kvmdirty_add_vcpu(env->kd, env->vm.vcpu[0].fd), 0);
	track(env);
	settle(env);
	write_pages(env, SLOT_MAIN, 3, 70, 5);
	seen = harvest(env->main);
	expect(&seen, 3, 70, 5);
}

/* --- Log fds ---------------------------------------------------------------- */

static void send_fd(int sock, int fd)
{
	char byte = 0, control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
	CHECK_EQ(sendmsg(sock, &msg, 0), 1);
}

static int receive_fd(int sock)
{
	char byte, control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	int fd;

	CHECK_EQ(recvmsg(sock, &msg, MSG_CMSG_CLOEXEC), 1);
	CHECK(CMSG_FIRSTHDR(&msg), "no fd");
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(fd));
	return fd;
}

/* The other process: for each byte, harvest and answer with what was seen. */
static void attached(int sock)
{
	struct kvmdirty_run run = { 900, 1 };
	struct kvmdirty_slot *slot;
	struct kvmdirty_info info;
	struct seen seen;
	char byte;
	int fd;

	fd = receive_fd(sock);
	CHECK_EQ(kvmdirty_attach(fd, &slot), 0);
	close(fd);	/* the library has its own */
	CHECK_EQ(kvmdirty_info(slot, &info, sizeof(info)), 0);
	CHECK_EQ(info.npages, MAIN_PAGES);
	CHECK_EQ(info.base_gfn, MAIN_GPA / PAGE);
	CHECK_EQ(info.flags, KVMDIRTY_INFO_ATTACHED);
	CHECK_EQ(kvmdirty_stop(slot, NULL), -EOPNOTSUPP);
	while (read(sock, &byte, 1) == 1) {
		if (byte == 'm') {
			CHECK_EQ(kvmdirty_mark(slot, &run, 1), 0);
		} else if (byte == 'r') {
			struct taker taker = { .refuse_at = 2 };

			CHECK_EQ(kvmdirty_harvest_each(slot, take, &taker, 0, 0, NULL), -EIO);
			CHECK_EQ(kvmdirty_untrack(slot, 0), 0);
			CHECK_EQ(write(sock, &taker.seen, sizeof(seen)), sizeof(seen));
			return;
		}
		seen = harvest(slot);
		CHECK_EQ(write(sock, &seen, sizeof(seen)), sizeof(seen));
	}
}

static struct seen ask(int sock, char byte)
{
	struct seen seen;
	size_t got = 0;
	ssize_t n;

	CHECK_EQ(write(sock, &byte, 1), 1);
	for (; got < sizeof(seen); got += n) {
		n = read(sock, (char *)&seen + got, sizeof(seen) - got);
		CHECK(n > 0, "the other process is gone");
	}
	return seen;
}

static void test_attach(const void *mode)
{
	struct env *env = setup(mode);
	struct kvmdirty_slot *slot;
	int sock[2], status;
	struct seen seen, rest;
	pid_t pid;

	CHECK_EQ(kvmdirty_attach(-1, &slot), -EBADF);
	CHECK_EQ(kvmdirty_attach(env->vm.fd, &slot), -EINVAL);
	CHECK_EQ(kvmdirty_attach(env->vm.kvm, &slot), -EINVAL);
	if (env->mode->backend != KVMDIRTY_SLOT_RING) {
		CHECK_EQ(kvmdirty_fd(env->main), -EOPNOTSUPP);
		return;
	}

	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, sock), 0);
	pid = fork();
	if (!pid) {
		close(sock[0]);
		attached(sock[1]);
		_exit(0);
	}
	close(sock[1]);
	send_fd(sock[0], kvmdirty_fd(env->main));
	write_pages(env, SLOT_MAIN, 7, 30, 9);
	seen = ask(sock[0], 'h');
	expect(&seen, 7, 30, 9);
	write_pages(env, SLOT_MAIN, 7, 1, 1);
	seen = ask(sock[0], 'm');
	CHECK_EQ(seen.pages, 2);
	CHECK(seen.page[7] == 1 && seen.page[900] == 1, "wrong pages");

	/* What it refused and then left comes to us. */
	write_pages(env, SLOT_MAIN, 7, 30, 9);
	seen = ask(sock[0], 'r');
	CHECK_EQ(seen.pages, 1);
	waitpid(pid, &status, 0);
	CHECK_EQ(status, 0);
	rest = harvest(env->main);
	for (status = 0; status < (int)MAIN_PAGES; status++)
		rest.page[status] += seen.page[status];
	rest.pages += seen.pages;
	expect(&rest, 7, 30, 9);
}

static void test_poll(const void *mode)
{
	bool slot_ring = ((const struct mode *)mode)->backend == KVMDIRTY_SLOT_RING;
	struct env *env = setup_entries(mode, slot_ring ? FEW_ENTRIES : MANY_ENTRIES);
	struct pollfd p = { .fd = kvmdirty_fd(env->main), .events = POLLIN };

	if (!slot_ring) {
		CHECK_EQ(p.fd, -EOPNOTSUPP);
		return;
	}
	write_pages(env, SLOT_MAIN, 0, 10, 1);
	CHECK_EQ(poll(&p, 1, 0), 0);
	write_pages(env, SLOT_MAIN, 0, 600, 1);
	CHECK_EQ(poll(&p, 1, 5000), 1);
	CHECK_EQ(p.revents, POLLIN);
	harvest(env->main);
	CHECK_EQ(poll(&p, 1, 0), 0);
	CHECK_EQ(kvmdirty_stop(env->main, &env->vm.region[SLOT_MAIN]), 0);
	CHECK_EQ(poll(&p, 1, 5000), 1);
	CHECK_EQ(p.revents, POLLHUP);
}

/* --- Which back end --------------------------------------------------------- */

static int try_open(struct minivm *vm, uint32_t backend, uint32_t flags, uint32_t entries,
		    const char **reason)
{
	struct kvmdirty_options options = {
		.size = sizeof(options), .backend = backend, .flags = flags,
		.ring_entries = entries,
	};
	struct kvmdirty *kd;
	int r;

	r = kvmdirty_open(vm->fd, &options, &kd);
	*reason = options.reason ? options.reason : "";
	CHECK(!r == !options.reason, "%d but %s", r, *reason);
	if (r < 0)
		return r;
	r = kvmdirty_backend(kd);
	kvmdirty_close(kd);
	return r;
}

#define CHECK_REASON(r, error, text) do {				\
	CHECK_EQ(r, error);						\
	CHECK(strstr(reason, text), "%s", reason);			\
} while (0)

static void test_missing(const void *mode)
{
	const struct mode *m = mode;
	const char *reason;
	struct minivm vm;

	if (m->backend == KVMDIRTY_BITMAP)
		return;		/* never missing */
	CHECK_EQ(minivm_create(&vm), 0);
	hidden_caps[0] = KVM_CAP_DIRTY_SLOT_RING;
	hidden_caps[1] = KVM_CAP_DIRTY_LOG_RING;
	hidden_caps[2] = KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
	CHECK_EQ(kvmdirty_probe(vm.fd), 1 << KVMDIRTY_BITMAP);
	CHECK_REASON(try_open(&vm, m->backend, 0, 0, &reason), -EOPNOTSUPP,
		     m->backend == KVMDIRTY_RING ? "KVM_CAP_DIRTY_LOG_RING" :
						   "KVM_CAP_DIRTY_SLOT_RING");
	CHECK_EQ(try_open(&vm, KVMDIRTY_AUTO, 0, 0, &reason), KVMDIRTY_BITMAP);
}

static void test_too_late(const void *mode)
{
	const struct mode *m = mode;
	const char *reason;
	struct minivm vm;

	if (m->backend == KVMDIRTY_BITMAP)
		return;		/* never too late */
	CHECK_EQ(minivm_create(&vm), 0);
	minivm_add_vcpu(&vm);
	vm.region[SLOT_MAIN].flags = KVM_MEM_LOG_DIRTY_PAGES;
	CHECK_EQ(ioctl(vm.fd, KVM_SET_USER_MEMORY_REGION, &vm.region[SLOT_MAIN]), 0);
	CHECK_REASON(try_open(&vm, m->backend, 0, 0, &reason), -EBUSY, "too late");
	CHECK_EQ(try_open(&vm, KVMDIRTY_AUTO, 0, 0, &reason), KVMDIRTY_BITMAP);
}

static void test_bad_options(const void *mode)
{
	const struct mode *m = mode;
	struct kvmdirty_options options = { .size = 4 };
	const char *reason;
	struct kvmdirty *kd;
	struct minivm vm;

	CHECK_EQ(minivm_create(&vm), 0);
	CHECK_EQ(kvmdirty_open(vm.fd, &options, &kd), -EINVAL);
	CHECK_EQ(kvmdirty_open(vm.kvm, NULL, &kd), -ENOTTY);
	CHECK_EQ(kvmdirty_open(-1, NULL, &kd), -EBADF);
	CHECK_REASON(try_open(&vm, 99, 0, 0, &reason), -EINVAL, "back end");
	CHECK_REASON(try_open(&vm, m->backend, ~0U, 0, &reason), -EINVAL, "flag");
	CHECK_REASON(try_open(&vm, m->backend, 0, 1000, &reason), -EINVAL, "power of two");
	CHECK_REASON(try_open(&vm, KVMDIRTY_RING, KVMDIRTY_OPEN_NO_EXITS, 0, &reason), -EINVAL,
		     "exit");
	if (m->backend != KVMDIRTY_BITMAP)
		CHECK_REASON(try_open(&vm, m->backend, 0, 1U << 31, &reason), -EINVAL,
			     "ring_entries");
	/* None of that enabled anything. */
	CHECK_EQ(try_open(&vm, m->backend, m->flags, 0, &reason), m->backend);
	if (m->backend == KVMDIRTY_RING)
		CHECK_REASON(try_open(&vm, KVMDIRTY_BITMAP, 0, 0, &reason), -EBUSY, "ring");
}

/* Once, not for each back end: sets of pages, against an array of flags. */
static void test_pageset(const void *unused)
{
	static const uint64_t sizes[] = { 1, 63, 64, 65, 4096, 4097, 300000 };
	static uint8_t flags[300000];
	struct pageset set;
	uint64_t n, i, pos, len;
	size_t s;
	int step;

	(void)unused;
	srandom(1);
	for (s = 0; s < ARRAY_SIZE(sizes); s++) {
		n = sizes[s];
		memset(flags, 0, sizeof(flags));
		CHECK_EQ(pageset_init(&set, n), 0);
		for (step = 0; step < 300; step++) {
			pos = random() % n;
			len = random() % (step % 3 ? 100 : n) + 1;
			if (len > n - pos)
				len = n - pos;
			memset(flags + pos, step % 2, len);
			if (step % 2)
				pageset_add(&set, pos, len);
			else
				pageset_del(&set, pos, len);
			if (step % 10)
				continue;
			/* All runs, and nothing between them. */
			for (i = 0; i < n; i = pos + len) {
				pos = pageset_next(&set, i);
				CHECK((pos == UINT64_MAX ? n : pos) - i ==
				      (uint64_t)((uint8_t *)(memchr(flags + i, 1, n - i) ?:
							     flags + n) - (flags + i)),
				      "next from %lu of %lu", (unsigned long)i, (unsigned long)n);
				if (pos == UINT64_MAX)
					break;
				len = pageset_run(&set, pos, n);
				CHECK(pos + len <= n && !memchr(flags + pos, 0, len) &&
				      (pos + len == n || !flags[pos + len]),
				      "run of %lu at %lu of %lu", (unsigned long)len,
				      (unsigned long)pos, (unsigned long)n);
				CHECK_EQ(pageset_run(&set, pos, (len + 1) / 2), (len + 1) / 2);
			}
			CHECK_EQ(pageset_empty(&set), !memchr(flags, 1, n));
		}
		pageset_destroy(&set);
	}
}

/* Once, without KVM: what a callback calls meets the library's locks before KVM. */
static void test_calls_back_fake(const void *unused)
{
	struct kvm_userspace_memory_region region = {
		.slot = SLOT_MAIN, .memory_size = MAIN_PAGES * PAGE,
	};
	struct taker taker = { .attached = true };
	struct kvmdirty *kd;
	int fd;

	(void)unused;
	fake_kvm = true;
	fd = dup(STDOUT_FILENO);
	CHECK_EQ(kvmdirty_attach(fd, &taker.slot), 0);
	CHECK_EQ(kvmdirty_harvest_each(taker.slot, reenter, &taker, 0, 0, NULL), 0);
	CHECK_EQ(taker.reentry, -EDEADLK);
	CHECK_EQ(taker.seen.page[50], 1);
	CHECK_EQ(kvmdirty_untrack(taker.slot, 0), 0);

	memset(&taker, 0, sizeof(taker));
	CHECK_EQ(kvmdirty_open(fd, NULL, &kd), 0);
	CHECK_EQ(kvmdirty_track(kd, &region, &taker.slot), 0);
	CHECK_EQ(kvmdirty_harvest_each(taker.slot, reenter, &taker, 0, 0, NULL), 0);
	CHECK_EQ(taker.reentry, -EDEADLK);
	CHECK_EQ(taker.seen.page[50], 1);
	CHECK_EQ(kvmdirty_untrack(taker.slot, 0), -EBUSY);
	CHECK_EQ(kvmdirty_untrack(taker.slot, KVMDIRTY_UNTRACK_DROP), 0);
	kvmdirty_close(kd);
}

struct full {
	struct kvmdirty *kd;
	int vcpu, other;
	bool begun;
	pthread_t thread;
	int ret, added;
};

static void *full_thread(void *arg)
{
	struct kvm_run run = { .exit_reason = KVM_EXIT_DIRTY_SLOT_RING_FULL };
	struct kvm_dirty_slot_ring_exit details = { .slot = SLOT_MAIN };
	struct full *f = arg;

	memcpy(&run.hw, &details, sizeof(details));
	f->ret = kvmdirty_vcpu_full(f->kd, f->vcpu, &run);
	return NULL;
}

/* A vCPU's ring gets full while a callback runs, which does something with the VM. */
static int full_meanwhile(const struct kvmdirty_run *run, void *arg)
{
	struct full *f = arg;

	(void)run;
	if (!f->begun) {
		f->begun = true;
		CHECK_EQ(pthread_create(&f->thread, NULL, full_thread, f), 0);
		poll(NULL, 0, 200);
		f->added = kvmdirty_add_vcpu(f->kd, f->other);
	}
	return 0;
}

/* Once, without KVM: that is no deadlock. */
static void test_full_fake(const void *unused)
{
	struct kvm_userspace_memory_region region = {
		.slot = SLOT_MAIN, .memory_size = MAIN_PAGES * PAGE,
	};
	struct full f = { .vcpu = memfd_create("vcpu", 0), .other = memfd_create("other", 0) };
	struct kvmdirty_slot *slot;

	(void)unused;
	alarm(60);
	fake_kvm = true;
	CHECK_EQ(kvmdirty_open(dup(STDOUT_FILENO), NULL, &f.kd), 0);
	CHECK_EQ(kvmdirty_add_vcpu(f.kd, f.vcpu), 0);
	CHECK_EQ(kvmdirty_track(f.kd, &region, &slot), 0);
	CHECK_EQ(kvmdirty_harvest_each(slot, full_meanwhile, &f, 0, 0, NULL), 0);
	CHECK_EQ(pthread_join(f.thread, NULL), 0);
	CHECK_EQ(f.added, 0);
	CHECK_EQ(f.ret, 1);
	CHECK_EQ(kvmdirty_untrack(slot, KVMDIRTY_UNTRACK_DROP), 0);
	full_thread(&f);
	CHECK_EQ(f.ret, -ENXIO);
	kvmdirty_close(f.kd);
}

/* Once, not for each back end: the best of those that the kernel has. */
static void test_best(const void *unused)
{
	const char *reason;
	struct minivm vm;
	int mask, best;

	(void)unused;
	CHECK_EQ(minivm_create(&vm), 0);
	mask = kvmdirty_probe(vm.kvm);
	CHECK_EQ(mask, kvmdirty_probe(vm.fd));
	best = mask & 1 << KVMDIRTY_SLOT_RING ? KVMDIRTY_SLOT_RING :
	       mask & 1 << KVMDIRTY_RING ? KVMDIRTY_RING : KVMDIRTY_BITMAP;
	printf("# the best here: %s\n", kvmdirty_backend_name(best));
	CHECK_EQ(try_open(&vm, KVMDIRTY_AUTO, 0, 0, &reason), best);

	/* The next best, each time with a new VM. */
	hidden_caps[0] = KVM_CAP_DIRTY_SLOT_RING;
	CHECK_EQ(minivm_create(&vm), 0);
	CHECK_EQ(try_open(&vm, KVMDIRTY_AUTO, KVMDIRTY_OPEN_NO_EXITS, 0, &reason),
		 KVMDIRTY_BITMAP);
	CHECK_EQ(minivm_create(&vm), 0);
	CHECK_EQ(try_open(&vm, KVMDIRTY_AUTO, 0, 0, &reason),
		 mask & 1 << KVMDIRTY_RING ? KVMDIRTY_RING : KVMDIRTY_BITMAP);
	hidden_caps[0] = 0;
	CHECK_EQ(kvmdirty_probe(open("/dev/null", O_RDONLY)), -ENOTTY);
	CHECK(!strcmp(kvmdirty_backend_name(77), "unknown"), "77");
	CHECK(!strcmp(kvmdirty_version(), "1.0"), "%s", kvmdirty_version());
}

/* --- Main ------------------------------------------------------------------- */

static const struct {
	const char *name;
	void (*fn)(const void *mode);
} cases[] = {
	{ "exact", test_exact },
	{ "slots_apart", test_slots_apart },
	{ "array_of_one", test_array_of_one },
	{ "budget", test_budget },
	{ "callback_refuses", test_callback_refuses },
	{ "callback_calls_back", test_callback_calls_back },
	{ "rearmed", test_rearmed },
	{ "bad_array", test_bad_array },
	{ "mark", test_mark },
	{ "discard", test_discard },
	{ "stop", test_stop },
	{ "untrack", test_untrack },
	{ "track", test_track },
	{ "move", test_move },
	{ "ring_full", test_ring_full },
	{ "add_vcpu", test_add_vcpu },
	{ "running", test_running },
	{ "running_full", test_running_full },
	{ "collected_by_others", test_collected_by_others },
	{ "overrun", test_overrun },
	{ "two_harvesters", test_two_harvesters },
	{ "failing_ioctls", test_failing_ioctls },
	{ "stop_fails", test_stop_fails },
	{ "stats", test_stats },
	{ "reopen", test_reopen },
	{ "attach", test_attach },
	{ "poll", test_poll },
	{ "missing", test_missing },
	{ "too_late", test_too_late },
	{ "bad_options", test_bad_options },
};

static const struct {
	const char *name;
	void (*fn)(const void *unused);
	bool needs_kvm;
} once[] = {
	{ "best", test_best, true },
	{ "pageset", test_pageset, false },
	{ "calls_back_fake", test_calls_back_fake, false },
	{ "full_fake", test_full_fake, false },
};

static int tell_usage(const char *me, int status)
{
	fprintf(status ? stderr : stdout, "usage: %s [--require] [PATTERN]\n", me);
	return status;
}

int main(int argc, char **argv)
{
	const char *pattern = "";
	struct ktap ktap = { 0 };
	bool require = false;
	struct minivm vm;
	size_t m, c, nr = 0;
	char name[100];
	int pass, r;

	for (r = 1; r < argc; r++) {
		if (!strcmp(argv[r], "--require"))
			require = true;
		else if (argv[r][0] != '-')
			pattern = argv[r];
		else
			return tell_usage(argv[0], strcmp(argv[r], "--help") ? 2 : 0);
	}
	r = minivm_create(&vm);
	if (!r)
		r = kvmdirty_probe(vm.fd);

	/* Once to count, once to run. */
	for (pass = 0; pass < 2; pass++) {
		if (pass)
			printf("KTAP version 1\n1..%zu\n", nr);
		for (m = 0; m < ARRAY_SIZE(modes) && r >= 0; m++) {
			for (c = 0; c < ARRAY_SIZE(cases); c++) {
				snprintf(name, sizeof(name), "%s/%s", modes[m].name, cases[c].name);
				if (!strstr(name, pattern))
					continue;
				nr++;
				if (!pass)
					continue;
				if (r & 1 << modes[m].backend || cases[c].fn == test_missing)
					ktap_run(&ktap, name, cases[c].fn, &modes[m]);
				else
					ktap_verdict(&ktap, require ? KTAP_FAIL : KTAP_SKIP, name,
						     "this kernel does not have it");
			}
		}
		for (c = 0; c < ARRAY_SIZE(once); c++) {
			if (!strstr(once[c].name, pattern) || (once[c].needs_kvm && r < 0))
				continue;
			nr++;
			if (pass)
				ktap_run(&ktap, once[c].name, once[c].fn, NULL);
		}
	}
	if (r < 0)
		printf("no usable KVM: /dev/kvm: %s\n", strerror(-r));
	return ktap.failed ? KTAP_FAIL : r < 0 ? KTAP_SKIP : KTAP_PASS;
}
