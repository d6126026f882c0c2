// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings: pages that the VMM marks, and those that it discards.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "dirty_slot_ring_test.h"

TEST(mark)
{
	struct kvm_dirty_run runs[4] = { { 0, 1 }, { 10, 20 }, { 25, 10 }, { 100, 64 } };
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	uint8_t *want = set_new(v);
	struct kvm_dirty_slot_runs args;

	/* pages 25 to 29 are named twice */
	CHECK_OK(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_MARK, runs, 4, 0, &args));
	CHECK_EQ(args.nr_pages, 1 + 25 + 64);
	CHECK_OK(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_MARK, runs, 4, 0, &args));
	CHECK_EQ(args.nr_pages, 0);
	/* the guest writes some of them, and some others */
	guest_write(v, 0, 20, 100);
	CHECK_EQ(dsr_mark(v->fd, 60, 20), 0);
	set_add(want, 0, 1, 1);
	set_add(want, 10, 154, 1);
	expect_set(v, want);

	/* all of it, and the last page */
	CHECK_EQ(dsr_mark(v->fd, 0, v->npages), v->npages);
	CHECK_EQ(dsr_mark(v->fd, v->npages - 1, 1), 0);
	expect(v, 0, v->npages);
	CHECK_EQ(dsr_mark(v->fd, v->npages - 1, 1), 1);
	expect(v, v->npages - 1, 1);

	/* no runs at all */
	CHECK_OK(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_MARK, runs, 0, 0, &args));
	CHECK_EQ(args.nr_pages, 0);
	CHECK_OK(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_MARK, NULL, 0, 0, &args));
	CHECK_OK(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_DISCARD, NULL, 0, 0, &args));
	CHECK_EQ(args.nr_pages, 0);
	expect_nothing(v);
	free(want);
	dsr_free(v);
}

/* A log without a single vCPU */
TEST(mark_without_vcpus)
{
	struct dsr *v = dsr_new(.npages = 100000);
	uint8_t *want = set_new(v);

	CHECK_EQ(dsr_info(v->fd).nr_rings, 0);
	CHECK_EQ(dsr_mark(v->fd, 0, 1), 1);
	CHECK_EQ(dsr_mark(v->fd, 4095, 2), 2);
	CHECK_EQ(dsr_mark(v->fd, 65000, 3000), 3000);
	CHECK_EQ(dsr_mark(v->fd, 99999, 1), 1);
	set_add(want, 0, 1, 1);
	set_add(want, 4095, 2, 1);
	set_add(want, 65000, 3000, 1);
	set_add(want, 99999, 1, 1);
	expect_set(v, want);
	free(want);
	dsr_free(v);
}

TEST(discard)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	uint8_t *want = set_new(v);

	CHECK_EQ(dsr_discard(v->fd, 0, v->npages), 0);
	/* in the ring, in the overflow log, and not at all */
	guest_write(v, 0, 0, 100);
	CHECK_EQ(dsr_discard(v->fd, 10, 10), 10);
	CHECK_EQ(dsr_discard(v->fd, 10, 10), 0);
	CHECK_EQ(dsr_discard(v->fd, 90, 30), 10);
	set_add(want, 0, 10, 1);
	set_add(want, 20, 70, 1);
	expect_set(v, want);

	/* Written later, logged again, before a harvest and after one. */
	guest_write(v, 0, 0, 100);
	CHECK_EQ(dsr_discard(v->fd, 0, v->npages), 100);
	expect_nothing(v);
	expect_armed(v, 0, 100);
	guest_write(v, 0, 0, 100);
	CHECK_EQ(dsr_discard(v->fd, 0, v->npages), 100);
	guest_write(v, 0, 50, 10);
	expect(v, 50, 10);

	CHECK_EQ(dsr_mark(v->fd, 200, 10), 10);
	CHECK_EQ(dsr_discard(v->fd, 205, 100), 5);
	CHECK_EQ(dsr_mark(v->fd, 200, 10), 5);
	CHECK_EQ(dsr_discard(v->fd, 209, 1), 1);
	expect(v, 200, 9);
	expect_armed(v, 0, v->npages);
	free(want);
	dsr_free(v);
}

/* DISCARD re-protects in the TLBs too. */
TEST(discard_spinning_vcpu)
{
	struct dsr *v = dsr_new(.entries = 1024, .nr_vcpus = 1);
	struct mailbox mb = { .op = OP_BATCHES, .npages = 100 };
	uint8_t *want = set_new(v), *got;
	int i;

	set_add(want, 0, 100, 1);
	guest_start(v, 0, mb);
	for (i = 0; i < rounds(100); i++) {
		got = set_new(v);
		guest_batch(v, 0);
		dsr_discard(v->fd, 0, v->npages);
		/* what PML held goes after it */
		harvest_cap(v->fd, got, v->npages, KVM_DIRTY_HARVEST_SYNC, MANY_RUNS);
		memset(got, 0, v->npages);
		guest_batch(v, 0);
		harvest_cap(v->fd, got, v->npages, KVM_DIRTY_HARVEST_SYNC, MANY_RUNS);
		set_check(v, got, want);
		free(got);
	}
	guest_join(v, 0);
	free(want);
	dsr_free(v);
}

TEST(mark_discard_bad_runs)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	const uint32_t n = v->npages;
	const struct kvm_dirty_run bad[] = {
		{ 0, 0 }, { 5, 0 }, { n - 1, 0 }, { n, 0 }, { UINT32_MAX, 0 },
		{ 0, n + 1 }, { 1, n }, { n - 1, 2 }, { n, 1 }, { n + 1, 1 },
		{ 0, UINT32_MAX }, { 1, UINT32_MAX }, { UINT32_MAX, 1 },
		{ UINT32_MAX, UINT32_MAX }, { UINT32_MAX - 1, 2 }, { 1u << 31, 1u << 31 },
		{ n - 1, UINT32_MAX - n + 2 },
	};
	static const unsigned long cmds[] = { KVM_DIRTY_SLOT_LOG_MARK, KVM_DIRTY_SLOT_LOG_DISCARD };
	struct kvm_dirty_run *runs = calloc(MANY_RUNS, sizeof(*runs));
	struct kvm_dirty_slot_runs args;
	int i, c, k, ret;

	guest_write(v, 0, 0, 50);
	for (c = 0; c < 2; c++) {
		for (i = 0; i < ARRAY_SIZE(bad); i++) {
			ret = __dsr_runs(v->fd, cmds[c], &bad[i], 1, 0, &args);
			CHECK(ret == -1 && errno == EINVAL, "%d row %d gave %d", c, i, ret);
		}
		/* The last of many is bad: none of them is applied. */
		for (k = 0; k < MANY_RUNS; k++)
			runs[k] = (struct kvm_dirty_run){ .offset = c ? 10 : 100, .npages = 10 };
		runs[MANY_RUNS - 1].npages = 0;
		CHECK_ERR(__dsr_runs(v->fd, cmds[c], runs, MANY_RUNS, 0, &args), EINVAL);
		runs[MANY_RUNS - 1] = (struct kvm_dirty_run){ .offset = n, .npages = 1 };
		CHECK_ERR(__dsr_runs(v->fd, cmds[c], runs, MANY_RUNS, 0, &args), EINVAL);
	}
	expect(v, 0, 50);
	free(runs);
	dsr_free(v);
}

TEST(mark_discard_array_faults)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	static const unsigned long cmds[] = { KVM_DIRTY_SLOT_LOG_MARK, KVM_DIRTY_SLOT_LOG_DISCARD };
	static const uint32_t fits[] = { 0, 1, 31, 64, 100, 256, 300, 512 };
	void *end = alloc_guarded(2) + PG;
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_run *runs;
	int c, i, k, ret;

	guest_write(v, 0, 0, 50);
	for (c = 0; c < 2; c++) {
		for (i = 0; i < ARRAY_SIZE(fits); i++) {
			runs = end - fits[i] * sizeof(*runs);
			for (k = 0; k < fits[i]; k++) {
				runs[k].offset = c ? k % 50 : 100 + k % 50;
				runs[k].npages = 1;
			}
			ret = __dsr_runs(v->fd, cmds[c], runs, fits[i] + 1, 0, &args);
			CHECK(ret == -1 && errno == EFAULT, "%d row %d gave %d", c, i, ret);
			ret = __dsr_runs(v->fd, cmds[c], runs, UINT32_MAX, 0, &args);
			CHECK(ret == -1 && errno == EFAULT, "%d row %d gave %d", c, i, ret);
		}
		CHECK_ERR(__dsr_runs(v->fd, cmds[c], NULL, 1, 0, &args), EFAULT);
		CHECK_ERR(__dsr_runs(v->fd, cmds[c], (void *)-PG, 1, 0, &args), EFAULT);
	}
	expect(v, 0, 50);
	dsr_free(v);
}

/* The array changes between the kernel's looks at it. */
static void *flip_thread(void *arg)
{
	struct kvm_dirty_run *run = ((void **)arg)[0];
	bool *stop = ((void **)arg)[1];

	while (!READ_ONCE(*stop)) {
		WRITE_ONCE(run->npages, UINT32_MAX);
		WRITE_ONCE(run->offset, 1u << 30);
		WRITE_ONCE(run->offset, 5);
		WRITE_ONCE(run->npages, 1);
	}
	return NULL;
}

TEST(mark_discard_changing_array)
{
	static const unsigned long cmds[] = { KVM_DIRTY_SLOT_LOG_MARK, KVM_DIRTY_SLOT_LOG_DISCARD };
	struct dsr *v = dsr_new();
	struct kvm_dirty_run runs[64];
	bool stop = false;
	void *arg[2] = { &runs[63], &stop };
	struct kvm_dirty_slot_runs args;
	uint8_t *got = set_new(v);
	pthread_t thread;
	int i, ret;

	for (i = 0; i < 64; i++)
		runs[i] = (struct kvm_dirty_run){ .offset = 5, .npages = 1 };
	CHECK_OK(pthread_create(&thread, NULL, flip_thread, arg));
	for (i = 0; i < rounds(3000); i++) {
		ret = __dsr_runs(v->fd, cmds[i & 1], runs, 64, 0, &args);
		CHECK(!ret || errno == EINVAL, "gave %d", ret);
	}
	WRITE_ONCE(stop, true);
	CHECK_OK(pthread_join(thread, NULL));
	harvest(v, got);
	/* A copy may be torn, so this is about what is in the slot, once. */
	for (i = 0; i < v->npages; i++)
		CHECK(got[i] <= 1, "page %d: %d times", i, got[i]);
	free(got);
	dsr_free(v);
}

/*
 * Bookkeeping: each call says how many pages it put into the log or took out,
 * and with everyone at it at once the sums still match.
 */
struct clerk {
	struct dsr *v;
	int job;
	bool *stop;
	uint64_t sum;
	pthread_t thread;
};

static void *clerk_thread(void *arg)
{
	struct clerk *c = arg;
	uint64_t x = 1234567 + 7919 * (uintptr_t)c;
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_run runs[32];
	uint8_t *got = set_new(c->v);
	int i;

	while (!READ_ONCE(*c->stop)) {
		for (i = 0; i < ARRAY_SIZE(runs); i++) {
			x = xorshift(x);
			runs[i].offset = x % c->v->npages;
			runs[i].npages = 1 + (x >> 32) % min(40u, c->v->npages - runs[i].offset);
		}
		switch (c->job) {
		case 0:
			CHECK_OK(__dsr_runs(c->v->fd, KVM_DIRTY_SLOT_LOG_MARK,
					    runs, ARRAY_SIZE(runs), 0, &args));
			c->sum += args.nr_pages;
			break;
		case 1:
			CHECK_OK(__dsr_runs(c->v->fd, KVM_DIRTY_SLOT_LOG_DISCARD,
					    runs, 4, 0, &args));
			c->sum += args.nr_pages;
			break;
		case 2:
			CHECK_OK(__dsr_runs(c->v->fd, KVM_DIRTY_SLOT_LOG_HARVEST,
					    runs, ARRAY_SIZE(runs), 0, &args));
			memset(got, 0, c->v->npages);
			runs_take(got, c->v->npages, runs, &args, ARRAY_SIZE(runs));
			for (i = 0; i < c->v->npages; i++)
				CHECK(got[i] <= 1, "page %d twice in one answer", i);
			c->sum += args.nr_pages;
			break;
		case 3:
			c->sum += bitmap_take(c->v, NULL);
			break;
		}
	}
	free(got);
	return NULL;
}

TEST(mark_discard_harvest_add_up)
{
	static const int jobs[] = { 0, 0, 1, 2, 2, 3 };
	struct dsr *v = dsr_new(.npages = 5003);
	struct clerk c[ARRAY_SIZE(jobs)];
	uint64_t in = 0, out = 0;
	uint8_t *got;
	bool stop;
	int i, n;

	for (n = 0; n < 3; n++) {
		stop = false;
		for (i = 0; i < ARRAY_SIZE(jobs); i++) {
			c[i] = (struct clerk) { .v = v, .job = jobs[i], .stop = &stop };
			CHECK_OK(pthread_create(&c[i].thread, NULL, clerk_thread, &c[i]));
		}
		sleep_ms(quick ? 300 : 1500);
		WRITE_ONCE(stop, true);
		for (i = 0; i < ARRAY_SIZE(jobs); i++) {
			CHECK_OK(pthread_join(c[i].thread, NULL));
			if (c[i].job)
				out += c[i].sum;
			else
				in += c[i].sum;
		}
		got = set_new(v);
		out += harvest(v, got);
		for (i = 0; i < v->npages; i++)
			CHECK(got[i] <= 1, "page %d twice", i);
		free(got);
		CHECK(in, "nobody marked a page");
		CHECK_EQ(in, out);
	}
	dsr_free(v);
}

/*
 * One run is done in one step: a caller under a storm of signals would else do
 * it again and again.
 */
TEST(mark_discard_under_signals)
{
	static const unsigned long cmds[] = { KVM_DIRTY_SLOT_LOG_MARK, KVM_DIRTY_SLOT_LOG_DISCARD };
	const struct kvm_dirty_run run = { .offset = 0, .npages = 60000 };
	struct dsr *v = dsr_new(.npages = run.npages);
	struct kvm_dirty_slot_runs args;
	uint64_t end = now_ms() + (quick ? 300 : 2000);
	int i, ret;

	WRITE_ONCE(nr_signals, 0);
	signals_every_us(200);
	for (i = 0; now_ms() < end || i % 2; i++) {
		ret = __dsr_runs(v->fd, cmds[i % 2], &run, 1, 0, &args);
		CHECK(!ret, "call %d gave %d, %llu pages done", i, ret, args.nr_pages);
		CHECK_EQ(args.nr_pages, run.npages);
	}
	signals_every_us(0);
	TH_LOG("%d signals in %d calls", READ_ONCE(nr_signals), i);
	expect_nothing(v);
	dsr_free(v);
}

int main(int argc, char *argv[])
{
	return dsr_test_main(argc, argv);
}
