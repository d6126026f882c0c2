// SPDX-License-Identifier: GPL-2.0-only
/*
 * One slot, with each back end: what is handed out, when, and how often.
 */
#include <poll.h>
#include "env.h"

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
	/* A slot ring has no more than its memslot has pages. */
	CHECK_EQ(info.ring_entries, env.mode->backend == KVMDIRTY_BITMAP ? 0 :
				    env.mode->backend == KVMDIRTY_SLOT_RING ? MAIN_PAGES : 4096);
}

/* A memslot that is moved keeps its log. */
static void test_move(const void *mode)
{
	struct env *env = setup(mode);
	struct seen seen;

	write_pages(env, SLOT_ODD, 1, 2, 3);
	env->vm.region[SLOT_ODD].guest_phys_addr += 0x10000000;
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
	CHECK_EQ(env->vm.vcpu[0].run->exit_reason, VCPU_DONE);
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
		/* A busy machine may not have let the guest run by then. */
		for (i = 0; i < 20 || copier.pages == before; i++) {
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
		    env->vm.vcpu[0].fd, VCPU_RING_OFFSET * PAGE);
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

const struct test_case slot_cases[] = {
	{ .name = "exact", .fn = test_exact },
	{ .name = "slots_apart", .fn = test_slots_apart },
	{ .name = "array_of_one", .fn = test_array_of_one },
	{ .name = "budget", .fn = test_budget },
	{ .name = "callback_refuses", .fn = test_callback_refuses },
	{ .name = "callback_calls_back", .fn = test_callback_calls_back },
	{ .name = "rearmed", .fn = test_rearmed },
	{ .name = "bad_array", .fn = test_bad_array },
	{ .name = "mark", .fn = test_mark },
	{ .name = "discard", .fn = test_discard },
	{ .name = "stop", .fn = test_stop },
	{ .name = "untrack", .fn = test_untrack },
	{ .name = "track", .fn = test_track },
	{ .name = "move", .fn = test_move },
	{ .name = "ring_full", .fn = test_ring_full },
	{ .name = "add_vcpu", .fn = test_add_vcpu },
	{ .name = "running", .fn = test_running },
	{ .name = "running_full", .fn = test_running_full },
	{ .name = "collected_by_others", .fn = test_collected_by_others },
	{ .name = "overrun", .fn = test_overrun },
	{ .name = "two_harvesters", .fn = test_two_harvesters },
	{ .name = "failing_ioctls", .fn = test_failing_ioctls },
	{ .name = "stop_fails", .fn = test_stop_fails },
	{ .name = "stats", .fn = test_stats },
	{ .name = "reopen", .fn = test_reopen },
	{ .name = NULL },
};
