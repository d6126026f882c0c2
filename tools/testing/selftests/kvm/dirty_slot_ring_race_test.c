// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings: many who take pages at once, vCPUs that stay in the guest,
 * signals, and memory that must equal its copy in the end.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include "processor.h"
#include "test_util.h"

#include "dirty_slot_ring_test.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE		25
#endif

/* This thread, and those that it makes from now on */
static void run_on_cpu(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	CHECK_OK(sched_setaffinity(0, sizeof(set), &set));
}

/* -- who takes ------------------------------------------------------------ */

/* Two threads take pages: the union is complete, and no page comes twice. */
static void check_two_takers(bool bitmap)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	uint8_t *want = set_new(v), *got;
	struct taker t[2];
	int i, n;

	set_add(want, 0, v->npages, 1);
	for (n = 0; n < rounds(60); n++) {
		got = set_new(v);
		/* each page once: from the ring and its overflow, */
		guest_write(v, 0, 0, 250);
		for (i = 0; i < 2; i++) {
			t[i] = (struct taker) {
				.v = v, .got = set_new(v), .bitmap = bitmap && i,
			};
			CHECK_OK(pthread_create(&t[i].thread, NULL, taker_thread, &t[i]));
		}
		/* and, meanwhile, by the VMM and by the guest */
		for (i = 0; i < 65; i += 5)
			dsr_mark(v->fd, 250 + i, 5);
		guest_write(v, 0, 315, v->npages - 315);
		for (i = 0; i < 2; i++)
			WRITE_ONCE(t[i].stop, true);
		for (i = 0; i < 2; i++) {
			CHECK_OK(pthread_join(t[i].thread, NULL));
			set_join(v, got, t[i].got);
			free(t[i].got);
		}
		harvest(v, got);
		set_limit(got, 315, v->npages - 315);
		set_check(v, got, want);
		expect_nothing(v);
		free(got);
	}
	free(want);
	dsr_free(v);
}

TEST(harvest_races_harvest)
{
	check_two_takers(false);
}

TEST(harvest_races_get_dirty_log)
{
	check_two_takers(true);
}

/* -- vCPUs that stay in the guest ----------------------------------------- */

/*
 * The vCPU stays in the guest.  What hardware still holds must be handed over,
 * and what is re-protected must be so in its TLB too, or the next round of
 * writes to the same pages goes unseen.
 */
TEST(harvest_sync_spinning_vcpu)
{
	struct dsr *v = dsr_new(.entries = 1024, .nr_vcpus = 1);
	struct mailbox mb = { .op = OP_BATCHES, .first = 3, .npages = 100, .step = 2 };
	uint8_t *want = set_new(v);

	set_add(want, mb.first, mb.npages, mb.step);
	guest_start(v, 0, mb);
	check_sync_batches(v, want, 200);
	guest_join(v, 0);
	free(want);
	dsr_free(v);
}

/* More than a PML buffer holds, and many times what the ring takes of it. */
TEST(harvest_sync_pml_full)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 2, .npages = 1400);
	struct mailbox mb = { .op = OP_BATCHES, .npages = 1300 };
	uint8_t *want = set_new(v), *got;
	int i;

	set_add(want, 0, 1300, 1);
	guest_start(v, 0, mb);
	guest_start(v, 1, mb);
	for (i = 0; i < rounds(40); i++) {
		got = set_new(v);
		guest_batch(v, 0);
		guest_batch(v, 1);
		harvest_cap(v->fd, got, v->npages, KVM_DIRTY_HARVEST_SYNC, MANY_RUNS);
		set_check(v, got, want);
		free(got);
	}
	guest_join(v, 0);
	guest_join(v, 1);
	free(want);
	dsr_free(v);
}

/*
 * A burst of as many pages as a PML buffer holds, and some, comes while a harvest
 * runs, whatever the ring holds by then: each page is in that one or in the next.
 */
TEST(harvest_sync_burst)
{
	const uint32_t entries = 16, burst = 520;
	struct dsr *v = dsr_new(.entries = entries, .nr_vcpus = 1, .npages = burst + entries + 1);
	struct mailbox mb = { .op = OP_BATCHES, .npages = burst };
	uint8_t *want = set_new(v), *got = set_new(v);
	uint32_t flags, fill, k;
	int i;

	for (fill = 0; fill <= entries + 1; fill += quick ? 4 : 1) {
		for (i = 0; i < 4; i++) {
			memset(got, 0, v->npages);
			memset(want, 0, v->npages);
			set_add(want, 0, burst + fill, 1);
			guest_write(v, 0, burst, fill);

			guest_start(v, 0, mb);
			__atomic_store_n(&v->mb[0]->go, 1, __ATOMIC_RELEASE);
			dither(20000);
			flags = i & 1 ? KVM_DIRTY_HARVEST_SYNC : 0;
			harvest_cap(v->fd, got, v->npages, flags, MANY_RUNS);
			while (__atomic_load_n(&v->mb[0]->done, __ATOMIC_ACQUIRE) != 1)
				sched_yield();
			harvest_cap(v->fd, got, v->npages, KVM_DIRTY_HARVEST_SYNC, MANY_RUNS);
			/* Twice, if the first came between a page's mark and its write. */
			for (k = 0; k < v->npages; k++)
				got[k] = !!got[k];
			set_check(v, got, want);
			guest_join(v, 0);
		}
	}
	free(got);
	free(want);
	dsr_free(v);
}

/* RESET re-protects in the TLBs too. */
TEST(reset_spinning_vcpu)
{
	struct dsr *v = dsr_new(.entries = 1024, .nr_vcpus = 1);
	struct mailbox mb = { .op = OP_BATCHES, .first = 3, .npages = 100, .step = 2 };
	struct dsr_ring ring = dsr_map(v->fd, 0);
	uint8_t *want = set_new(v), *got;
	uint64_t c;
	int i;

	set_add(want, mb.first, mb.npages, mb.step);
	guest_start(v, 0, mb);
	for (i = 0; i < rounds(200); i++) {
		got = set_new(v);
		guest_batch(v, 0);
		c = dsr_producer(&ring);
		set_add_entries(got, v->npages, &ring, dsr_consumer(&ring), c);
		dsr_set_consumer(&ring, c);
		dsr_reset(v->fd);
		/* Where PML held some back they follow by HARVEST, once. */
		harvest_cap(v->fd, got, v->npages, KVM_DIRTY_HARVEST_SYNC, MANY_RUNS);
		set_check(v, got, want);
		free(got);
	}
	guest_join(v, 0);
	free(want);
	dsr_unmap(&ring);
	dsr_free(v);
}

/* -- many vCPUs that never rest -------------------------------------------- */

/* Guests must leave something of few CPUs to who harvests. */
static void guests_start(struct dsr *v, int nr, uint64_t npages, uint64_t apart)
{
	int i;

	CHECK_OK(setpriority(PRIO_PROCESS, 0, 10));
	for (i = 0; i < nr; i++) {
		guest_start(v, i, (struct mailbox){
			.op = OP_RANDOM, .gva = TEST_GVA + i * apart * PG, .npages = npages,
			.value = 1000 + i * 77,
		});
	}
	CHECK_OK(setpriority(PRIO_PROCESS, 0, 0));
	/* All of them have written something before the first call, and go on. */
	for (i = 0; i < nr; i++) {
		while (!READ_ONCE(v->mb[i]->done))
			usleep(1000);
	}
}

static void guests_join(struct dsr *v, int nr)
{
	int i;

	for (i = 0; i < nr; i++)
		WRITE_ONCE(v->mb[i]->stop, 1);
	for (i = 0; i < nr; i++)
		guest_join(v, i);
}

/*
 * However many vCPUs write hot pages while HARVEST works, it ends, with no more than
 * was logged when it began: what rings can hold, the overflow once, and for pages that
 * are taken along with their neighbours what the manual's batch and some are.
 */
TEST(harvest_is_bounded)
{
	const uint32_t nr = quick ? 8 : MAX_VCPUS, npages = 1024, cap = 1 << 20;
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = nr, .npages = npages);
	struct kvm_dirty_run *runs = malloc(cap * sizeof(*runs));
	uint64_t bound = nr * 64 + nr + npages + 4096 + 256 * 64, most = 0;
	int all = dsr_open(v->vm, KVM_DIRTY_SLOT_ALL), i;
	struct kvm_dirty_vm_harvest vm_args;
	struct kvm_dirty_slot_runs args;

	guests_start(v, nr, npages, 0);
	for (i = 0; i < rounds(100); i++) {
		CHECK_OK(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, cap,
				    i & 1 ? KVM_DIRTY_HARVEST_SYNC : 0, &args));
		CHECK_EQ(args.flags, 0);
		CHECK(args.nr_pages <= bound, "%llu pages, the bound is %lu", args.nr_pages, bound);
		most = max(most, args.nr_pages);
		/* The array is as good for that: half as many runs of twice the size. */
		CHECK_OK(__dsr_vm_harvest(all, (void *)runs, cap / 2, 0, &vm_args));
		CHECK_EQ(vm_args.flags, 0);
		CHECK(vm_args.nr_pages <= bound, "%llu pages, the bound is %lu", vm_args.nr_pages,
		      bound);
		most = max(most, vm_args.nr_pages);
	}
	guests_join(v, nr);
	CHECK(most, "nothing was written");
	TH_LOG("%u vCPUs, at most %lu pages, the bound is %lu", nr, most, bound);
	free(runs);
	close(all);
	dsr_free(v);
}

/*
 * Arrays of one run, and each vCPU writes pages of its own without a pause: no ring
 * that has something waits for more calls than there are rings.
 */
TEST(harvest_is_fair)
{
	const uint32_t nr = quick ? 8 : 32;
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = nr, .npages = nr * 128);
	struct dsr_ring *ring = calloc(nr, sizeof(*ring));
	uint64_t *reset = calloc(nr, sizeof(*reset)), *waits = calloc(nr, sizeof(*waits));
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_run run;
	uint64_t longest = 0;
	int i, k, served = 0;

	for (k = 0; k < nr; k++)
		ring[k] = dsr_map(v->fd, k);
	guests_start(v, nr, 128, 128);
	for (i = 0; i < rounds(2000); i++) {
		/* Those that wait are those that had something before the call. */
		for (k = 0; k < nr; k++) {
			reset[k] = dsr_reset_marker(&ring[k]);
			if (dsr_producer(&ring[k]) == reset[k])
				reset[k] = -1;
		}
		if (!(i % 7))
			dsr_mark(v->fd, random() % v->npages, 1);
		CHECK_OK(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, &run, 1, 0, &args));
		for (k = 0; k < nr; k++) {
			if (reset[k] == dsr_reset_marker(&ring[k])) {
				waits[k]++;
				longest = max(longest, waits[k]);
				CHECK(waits[k] <= 2 * (nr + 2), "vCPU %d waits for %lu calls", k,
				      waits[k]);
			} else {
				served += !!waits[k];
				waits[k] = 0;
			}
		}
	}
	guests_join(v, nr);
	CHECK(served, "nobody had to wait");
	TH_LOG("%u vCPUs, at most %lu calls", nr, longest);
	for (k = 0; k < nr; k++)
		dsr_unmap(&ring[k]);
	free(ring);
	free(reset);
	free(waits);
	dsr_free(v);
}

/* -- signals -------------------------------------------------------------- */

TEST(harvest_under_signals)
{
	uint32_t cap = 4096, npages = quick ? 1 << 14 : 1 << 17;
	struct kvm_dirty_run *runs = calloc(cap, sizeof(*runs));
	struct dsr *v = dsr_new(.npages = npages);
	uint8_t *got = set_new(v), *want = set_new(v);
	int ret, eintr = 0, partial = 0;
	struct kvm_dirty_slot_runs args;
	uint32_t i, page;

	/* every other page, for many short runs */
	for (page = 0; page < npages; page += 2 * cap) {
		for (i = 0; i < cap; i++)
			runs[i] = (struct kvm_dirty_run){ .offset = page + 2 * i, .npages = 1 };
		CHECK_OK(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_MARK, runs, cap, 0, &args));
		CHECK_EQ(args.nr_pages, cap);
	}
	set_add(want, 0, npages / 2, 2);

	WRITE_ONCE(nr_signals, 0);
	signals_every_us(200);
	for (;;) {
		ret = __dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, cap, 0, &args);
		CHECK(!ret || errno == EINTR, "HARVEST gave %d", ret);
		if (ret) {
			CHECK_EQ(args.nr_runs, cap);
			eintr++;
			continue;
		}
		runs_take(got, npages, runs, &args, cap);
		if (!(args.flags & KVM_DIRTY_HARVEST_MORE))
			break;
		CHECK(args.nr_runs, "MORE and no runs");
		partial += args.nr_runs < cap;
	}
	signals_every_us(0);
	set_check(v, got, want);
	expect_nothing(v);
	TH_LOG("%d signals, cut short %d times, EINTR %d times",
	       READ_ONCE(nr_signals), partial, eintr);
	free(runs);
	free(got);
	free(want);
	dsr_free(v);
}

TEST(reset_under_signals)
{
	uint32_t npages = quick ? 2048 : 32768;
	struct dsr *v = dsr_new(.npages = npages, .entries = 65536, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	struct kvm_dirty_slot_reset args;
	uint64_t last = 0;
	int ret, eintr = 0;

	guest_write(v, 0, 0, npages);
	CHECK(dsr_producer(&ring) - dsr_reset_marker(&ring) <= npages, "too many entries");
	dsr_set_consumer(&ring, dsr_producer(&ring));
	WRITE_ONCE(nr_signals, 0);
	signals_every_us(200);
	do {
		ret = __dsr_reset(v->fd, &args);
		CHECK(!ret || errno == EINTR, "RESET gave %d", ret);
		CHECK(dsr_reset_marker(&ring) >= last, "reset went back");
		last = dsr_reset_marker(&ring);
		eintr += !!ret;
	} while (ret);
	signals_every_us(0);
	markers_check(&ring);
	CHECK_EQ(last, dsr_producer(&ring));
	TH_LOG("%d signals, EINTR %d times", READ_ONCE(nr_signals), eintr);
	expect_nothing(v);
	expect_armed(v, 0, npages);
	dsr_unmap(&ring);
	dsr_free(v);
}

/* -- contents ------------------------------------------------------------- */

/*
 * What it is all for: two vCPUs write numbers all over memory, a collector
 * copies every page that the log names, and when the vCPUs stop, the copy is
 * the memory.  The log is not asked whether it lost a page, the memory is.
 */
#define COPY_WORDS	8	/* of each page: the guest writes the first, KVM these */

enum collect_by {
	BY_HARVEST = 1,
	BY_RESET = 2,		/* from the mapping, then RESET */
	BY_BITMAP = 4,		/* KVM_GET_DIRTY_LOG, beside HARVEST */
	BY_DISCARD = 8,		/* DISCARD and copy, beside HARVEST */
	UNMAPPING = 16,		/* the host keeps taking the memory away from the guest */
	STEAL_TIME = 32,	/* KVM writes some of the pages */
	ONE_CPU = 64,		/* all threads on one, so that they preempt each other */
};

#define NR_VCPUS		2

struct collection {
	struct dsr *v;
	uint64_t *copy;
	pthread_mutex_t lock;
	bool stop;
	bool pause;		/* between harvests, or the guest gets nowhere */
	uint64_t collected;
	uint32_t cap;
};

FIXTURE(contents) {
	struct collection c;
};

FIXTURE_VARIANT(contents) {
	uint32_t entries;
	uint32_t cap;
	int how;
};

FIXTURE_VARIANT_ADD(contents, harvest) { 4096, 512, BY_HARVEST };
FIXTURE_VARIANT_ADD(contents, one_run) { 64, 1, BY_HARVEST };
FIXTURE_VARIANT_ADD(contents, ring_of_1) { 1, 100, BY_HARVEST };
FIXTURE_VARIANT_ADD(contents, mapped) { 512, 512, BY_RESET };
FIXTURE_VARIANT_ADD(contents, mapped_ring_of_16) { 16, 64, BY_RESET };
FIXTURE_VARIANT_ADD(contents, with_bitmap) { 256, 64, BY_HARVEST | BY_BITMAP };
FIXTURE_VARIANT_ADD(contents, with_discard) { 256, 64, BY_HARVEST | BY_DISCARD };
FIXTURE_VARIANT_ADD(contents, unmapping) { 256, 512, BY_HARVEST | UNMAPPING };
FIXTURE_VARIANT_ADD(contents, unmapping_mapped) { 64, 64, BY_RESET | UNMAPPING };
FIXTURE_VARIANT_ADD(contents, steal_time) { 256, 512, BY_HARVEST | STEAL_TIME | ONE_CPU };

static void copy_page(struct collection *s, uint64_t page)
{
	uint64_t *src = addr_gpa2hva(s->v->vm, TEST_GPA) + page * PG;
	uint64_t *dst = s->copy + page * COPY_WORDS;
	int i;

	for (i = 0; i < COPY_WORDS; i++)
		dst[i] = READ_ONCE(src[i]);
}

/* Copies are made after a page was taken, one collector at a time: never an old copy over a new. */
static void copy_set(struct collection *s, const uint8_t *set)
{
	uint64_t i;

	pthread_mutex_lock(&s->lock);
	for (i = 0; i < s->v->npages; i++) {
		if (!set[i])
			continue;
		copy_page(s, i);
		s->collected++;
	}
	pthread_mutex_unlock(&s->lock);
	if (s->pause)
		sleep_ms(1);
}

static void *harvest_collector(void *arg)
{
	struct collection *s = arg;
	struct kvm_dirty_run *runs = calloc(s->cap, sizeof(*runs));
	uint8_t *set = set_new(s->v);
	struct kvm_dirty_slot_runs args;

	while (!READ_ONCE(s->stop)) {
		memset(set, 0, s->v->npages);
		CHECK_OK(__dsr_runs(s->v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, s->cap, 0, &args));
		runs_take(set, s->v->npages, runs, &args, s->cap);
		copy_set(s, set);
	}
	free(runs);
	free(set);
	return NULL;
}

static void *bitmap_collector(void *arg)
{
	struct collection *s = arg;
	uint8_t *set = set_new(s->v);

	while (!READ_ONCE(s->stop)) {
		memset(set, 0, s->v->npages);
		bitmap_take(s->v, set);
		copy_set(s, set);
		sched_yield();
	}
	free(set);
	return NULL;
}

static void *discard_collector(void *arg)
{
	struct collection *s = arg;
	uint8_t *set = set_new(s->v);
	uint64_t i;

	for (i = 0; !READ_ONCE(s->stop); i = (i + 37) % s->v->npages) {
		memset(set, 0, s->v->npages);
		dsr_discard(s->v->fd, i, 1);
		set[i] = 1;
		copy_set(s, set);
	}
	free(set);
	return NULL;
}

static void *reset_collector(void *arg)
{
	struct collection *s = arg;
	uint8_t *set = set_new(s->v);
	struct kvm_dirty_slot_reset args;
	struct dsr_ring ring[NR_VCPUS];
	uint64_t p;
	int i;

	for (i = 0; i < NR_VCPUS; i++)
		ring[i] = dsr_map(s->v->fd, i);
	while (!READ_ONCE(s->stop)) {
		memset(set, 0, s->v->npages);
		for (i = 0; i < NR_VCPUS; i++) {
			p = dsr_producer(&ring[i]);
			set_add_entries(set, s->v->npages, &ring[i], dsr_consumer(&ring[i]), p);
			dsr_set_consumer(&ring[i], p);
		}
		CHECK_OK(__dsr_reset(s->v->fd, &args));
		if (args.flags & KVM_DIRTY_RESET_OVERFLOW)
			harvest_cap(s->v->fd, set, s->v->npages, 0, s->cap);
		copy_set(s, set);
	}
	for (i = 0; i < NR_VCPUS; i++)
		dsr_unmap(&ring[i]);
	free(set);
	return NULL;
}

/*
 * What makes the MMU notifiers take pages out of the guest's page tables, where
 * KVM knows which of them are writable and dirty.  What the pages hold changes
 * only where they are dropped, and then the VMM says so, as it has to.
 */
static void *unmapper(void *arg)
{
	struct collection *s = arg;
	struct userspace_mem_region *slot0 = memslot2region(s->v->vm, 0);
	void *mem = addr_gpa2hva(s->v->vm, TEST_GPA);
	uint64_t i, n, first, npages = s->v->npages;
	pid_t pid;

	/* What vCPUs have in common stays mapped, see dsr_new(). */
	CHECK_OK(madvise(slot0->host_mem, slot0->region.memory_size, MADV_DONTFORK));

	for (i = 0; !READ_ONCE(s->stop); i++) {
		first = random() % npages;
		n = min(1ul + random() % 100, npages - first);
		switch (i % 4) {
		case 0:
			CHECK_OK(madvise(mem + first * PG, n * PG, MADV_DONTNEED));
			dsr_mark(s->v->fd, first, n);
			break;
		case 1:
			CHECK_OK(mprotect(mem + first * PG, n * PG,
					  PROT_READ | PROT_WRITE | PROT_EXEC));
			CHECK_OK(mprotect(mem + first * PG, n * PG, PROT_READ | PROT_WRITE));
			break;
		case 2:
			/* All pages are copied on the next write. */
			pid = fork();
			if (!pid)
				_exit(0);
			child_check(pid);
			break;
		case 3:
			/* A hint: it may well find nothing to do. */
			madvise(mem, npages * PG, MADV_COLLAPSE);
			break;
		}
	}
	return NULL;
}

FIXTURE_SETUP(contents)
{
	memset(self, 0, sizeof(*self));
	self->c.v = dsr_new(.entries = variant->entries, .nr_vcpus = NR_VCPUS,
			    .npages = 1027);
	self->c.copy = calloc(self->c.v->npages, COPY_WORDS * 8);
	self->c.cap = variant->cap;
	pthread_mutex_init(&self->c.lock, NULL);
}

FIXTURE_TEARDOWN(contents)
{
	free(self->c.copy);
	dsr_free(self->c.v);
}

TEST_F(contents, copy_equals_memory)
{
	static void *(* const collectors[])(void *) = {
		harvest_collector, reset_collector, bitmap_collector, discard_collector,
		unmapper,
	};
	struct dsr *v = self->c.v;
	pthread_t thread[ARRAY_SIZE(collectors)];
	uint64_t *mem, written = 0, i, w;
	uint8_t *set = set_new(v);
	int n, k;

	if (variant->how & ONE_CPU)
		run_on_cpu(0);
	for (k = 0; variant->how & STEAL_TIME && k < 2; k++)
		if (!guest_set_steal_time(v->vcpu[k], TEST_GPA + (v->npages - 1 - k) * PG))
			SKIP(return, "no stolen time here");

	for (n = 0; n < rounds(20); n++) {
		WRITE_ONCE(self->c.stop, false);
		self->c.pause = n & 1;
		for (k = 0; k < 2; k++)
			guest_start(v, k, (struct mailbox){
				.op = OP_RANDOM, .npages = v->npages - 2,
				.value = (n * 2 + k + 1ull) << 40,
			});
		for (k = 0; k < ARRAY_SIZE(collectors); k++)
			if (variant->how & 1 << k)
				CHECK_OK(pthread_create(&thread[k], NULL, collectors[k], &self->c));
		sleep_ms(150);
		for (k = 0; k < 2; k++)
			guest_join(v, k);
		WRITE_ONCE(self->c.stop, true);
		for (k = 0; k < ARRAY_SIZE(collectors); k++)
			if (variant->how & 1 << k)
				CHECK_OK(pthread_join(thread[k], NULL));
		for (k = 0; k < 2; k++)
			written += v->mb[k]->done;

		memset(set, 0, v->npages);
		harvest_cap(v->fd, set, v->npages, KVM_DIRTY_HARVEST_SYNC, MANY_RUNS);
		copy_set(&self->c, set);
		for (i = 0; i < v->npages; i++) {
			mem = addr_gpa2hva(v->vm, TEST_GPA) + i * PG;
			for (w = 0; w < COPY_WORDS; w++)
				CHECK(mem[w] == self->c.copy[i * COPY_WORDS + w],
				      "round %d page %lu word %lu: memory %#lx, copy %#lx",
				      n, i, w, mem[w], self->c.copy[i * COPY_WORDS + w]);
		}
	}
	CHECK(written && self->c.collected, "%lu written, %lu collected",
	      written, self->c.collected);
	TH_LOG("%lu writes, %lu pages collected", written, self->c.collected);
	free(set);
}

/*
 * SYNC is exact: a write that the host has seen in memory is in the harvest
 * that the host then begins.  All values written differ, so a page that does not
 * read as its copy, which was made after it was last reported, was written since.
 *
 * Two vCPUs write the same few pages, so that there is always one that is about
 * to make a page writable, and another that writes it as soon as it is.
 *
 * They run while the host harvests, or they would like to: a real-time thread,
 * the harvester or another, took their CPU when they were in the guest, and what
 * hardware holds of their writes stays there until they get it back.
 */
struct hog {
	bool has_cpu, stop;
};

FIXTURE(sync) {
	struct dsr *v;
	struct hog hog;
};

FIXTURE_VARIANT(sync) {
	bool preempt, hog;
};

FIXTURE_VARIANT_ADD(sync, running) {};
FIXTURE_VARIANT_ADD(sync, preempted_by_harvester) { .preempt = true };
FIXTURE_VARIANT_ADD(sync, preempted_by_hog) { .preempt = true, .hog = true };

FIXTURE_SETUP(sync)
{
	memset(self, 0, sizeof(*self));
	self->v = dsr_new(.entries = 64, .nr_vcpus = 2);
}

FIXTURE_TEARDOWN(sync)
{
	dsr_free(self->v);
}

/* Takes the vCPUs' CPU again and again, but not for ever: SYNC waits for them. */
static void *hog_thread(void *arg)
{
	struct hog *hog = arg;
	uint64_t end;

	while (!READ_ONCE(hog->stop)) {
		usleep(100 + random() % 1000);
		__atomic_store_n(&hog->has_cpu, true, __ATOMIC_RELEASE);
		for (end = now_ms() + 20; READ_ONCE(hog->has_cpu) && now_ms() < end;)
			guest_relax();
		WRITE_ONCE(hog->has_cpu, false);
	}
	return NULL;
}

TEST_F(sync, is_exact)
{
	enum { NR = 6 };
	struct sched_param rt = { .sched_priority = 1 };
	bool buffered = guest_writes_are_buffered();
	struct hog *hog = &self->hog;
	struct dsr *v = self->v;
	uint64_t *mem = addr_gpa2hva(v->vm, TEST_GPA), copy[NR], seen[NR];
	uint64_t calls = 0, writes = 0, late = 0, pages = 0, end;
	uint8_t *got = set_new(v);
	pthread_t thread;
	bool changed;
	int i;

	if (variant->hog && get_nprocs() < 2)
		SKIP(return, "a hog beside the harvester needs two CPUs");
	if (variant->preempt && sched_setscheduler(0, SCHED_FIFO, &rt))
		SKIP(return, "may not be real-time: run it as root");

	for (i = 0; i < NR; i++)
		copy[i] = READ_ONCE(mem[i * PG / 8]);
	/* Threads inherit both. */
	if (variant->preempt)
		run_on_cpu(variant->hog);
	if (variant->hog)
		CHECK_OK(pthread_create(&thread, NULL, hog_thread, hog));
	rt.sched_priority = 0;
	CHECK_OK(sched_setscheduler(0, SCHED_OTHER, &rt));
	for (i = 0; i < 2; i++)
		guest_start(v, i, (struct mailbox){
			.op = OP_RANDOM, .npages = NR, .value = (i + 1ull) << 40,
		});
	if (variant->hog)
		run_on_cpu(0);
	rt.sched_priority = 1;
	if (variant->preempt)
		CHECK_OK(sched_setscheduler(0, SCHED_FIFO, &rt));

	/* With a buffer until it was seen that there was something to wait for. */
	end = now_ms() + (quick ? 500 : 4000);
	for (; now_ms() < end || (variant->preempt && buffered && !late); calls++) {
		/* At once when the first write shows, or some time later. */
		if (calls % 4 == 3)
			dither(1000);
		do {
			if (variant->hog) {
				while (!__atomic_load_n(&hog->has_cpu, __ATOMIC_ACQUIRE))
					usleep(10);
			} else if (variant->preempt) {
				usleep(1 + random() % 2000);
			} else {
				sched_yield();
			}
			changed = false;
			for (i = 0; i < NR; i++) {
				seen[i] = READ_ONCE(mem[i * PG / 8]);
				changed |= seen[i] != copy[i];
			}
			if (!changed)
				WRITE_ONCE(hog->has_cpu, false);
		} while (!changed);

		memset(got, 0, v->npages);
		if (calls & 1) {
			pages += harvest_cap(v->fd, got, v->npages, 0, 64);
			for (i = 0; i < NR; i++)
				late += !got[i] && seen[i] != copy[i];
		}
		pages += harvest_cap(v->fd, got, v->npages, KVM_DIRTY_HARVEST_SYNC, 64);
		WRITE_ONCE(hog->has_cpu, false);
		for (i = 0; i < NR; i++) {
			CHECK(got[i] || seen[i] == copy[i],
			      "harvest %lu lacks page %d: %#lx when last reported, then %#lx, now %#lx",
			      calls, i, copy[i], seen[i], mem[i * PG / 8]);
			writes += seen[i] != copy[i];
			if (got[i])
				copy[i] = READ_ONCE(mem[i * PG / 8]);
		}
		for (i = NR; i < v->npages; i++)
			CHECK(!got[i], "nobody wrote page %d", i);
	}
	if (variant->hog) {
		WRITE_ONCE(hog->stop, true);
		CHECK_OK(pthread_join(thread, NULL));
	}
	for (i = 0; i < 2; i++)
		guest_join(v, i);
	CHECK(writes, "no write seen");
	TH_LOG("%lu harvests of %lu pages, %lu seen to be written, %lu only with SYNC", calls,
	       pages, writes, late);
	free(got);
}

int main(int argc, char *argv[])
{
	return dsr_test_main(argc, argv);
}
