// SPDX-License-Identifier: GPL-2.0-only
/*
 * Is any write lost, is any page reported twice?  virt/kvm/dirty_slot/ itself, as
 * a userspace program: vCPUs and others write to pages while consumers of every
 * kind take pages out of the log of one memslot and copy them.  Here is also what
 * all cases share; vmlog.c has those of the whole VM's log, fixed.c those in which
 * all that happens happens in one order.
 *
 * In each case, again and again: let all of them run, stop the writers, take
 * what is left, then
 *
 *  - the copy is the memory: the last write to each page was followed by a report
 *    of it, which its reader made use of after the call had returned;
 *  - no more pages were reported than entered the log;
 *  - no SPTE is writable (with PML: dirty), so that the next write is logged.
 *
 * And while they run
 *
 *  - no page is reported more often than it was marked;
 *  - with one consumer, a write that was over before a harvest began is in that
 *    harvest (of KVM_DIRTY_HARVEST_SYNC's kind, if hardware may hold it back).
 */

#include <getopt.h>
#include <signal.h>
#include <stdarg.h>

#include "stress.h"

#define MAX_CAPACITY	8192
#define RECENT		32
#define MAX_VCPUS	8
#define MAX_HARVESTERS	4

struct test_case {
	const char *name, *what;
	struct sim_config vm;
	unsigned int capacity;		/* of a harvest's array */
	unsigned int harvesters;
	bool strict;			/* the only consumer sees all there is */
	bool sync;
	bool mapped;			/* reads the mapping and calls RESET */
	bool hostile;			/* consumers out of bounds, all the time */
	bool steal;			/* KVM_GET_DIRTY_LOG */
	bool discard;
	bool device;			/* writes without a vCPU, and MARK */
	unsigned int kvm_writes;	/* of 64, made by KVM in the vCPU's thread... */
	unsigned int irq_writes;	/* ...or in an interrupt there */
	unsigned int sparse, words;	/* write to so many places, words of each */
	unsigned int pause;		/* of 16 writes, so many come after a while */
	bool wait;			/* harvest when poll() says so */
	unsigned int inject;		/* chance, in 256, of a fault or signal */
};

static const struct test_case cases[] = {
	{
		.name = "overflow", .what = "2 vCPUs, tiny rings, small arrays",
		.vm = { .npages = 8192, .nr_vcpus = 2, .entries = 32 },
		.kvm_writes = 1, .irq_writes = 1,
		.capacity = 37, .harvesters = 1, .strict = true, .sync = true,
	}, {
		.name = "rings", .what = "rings that hold all, harvested when poll() says so",
		.vm = { .npages = 100, .nr_vcpus = 1, .entries = 128, .init_set = true },
		.kvm_writes = 1,
		.capacity = MAX_CAPACITY, .harvesters = 1, .strict = true, .wait = true,
	}, {
		.name = "in-flight", .what = "3 vCPUs write to the same few pages",
		.vm = { .npages = 1024, .nr_vcpus = 3, .entries = 16 },
		.kvm_writes = 56, .irq_writes = 1,
		.capacity = 100, .harvesters = 1, .sparse = 4, .words = 4,
		.strict = true, .sync = true,
	}, {
		.name = "summary", .what = "a sparse overflow log of three levels",
		.vm = { .npages = 1 << 19, .nr_vcpus = 2, .entries = 1 },
		.kvm_writes = 60, .irq_writes = 1,
		.capacity = 1000, .harvesters = 1, .sparse = 32, .words = 16,
		.strict = true, .sync = true,
	}, {
		.name = "fast-fault", .what = "the lockless fast page fault, with SYNC",
		.vm = { .npages = 512, .nr_vcpus = 3, .entries = 64, .fast_fault = true },
		.kvm_writes = 1, .irq_writes = 1,
		.capacity = 100, .harvesters = 1, .strict = true, .sync = true,
	}, {
		.name = "pml", .what = "D bits and a PML buffer, with SYNC",
		.vm = { .npages = 4096, .nr_vcpus = 2, .entries = 128, .pml = true },
		.kvm_writes = 1, .irq_writes = 1,
		.capacity = 1000, .harvesters = 1, .strict = true, .sync = true,
	}, {
		.name = "everybody",
		.what = "2 harvesters, GET_DIRTY_LOG, DISCARD, MARK and writes without a vCPU",
		.vm = { .npages = 2048, .nr_vcpus = 2, .entries = 16, .fast_fault = true },
		.kvm_writes = 1, .irq_writes = 1,
		.capacity = 64, .harvesters = 2, .steal = true, .discard = true, .device = true,
	}, {
		.name = "mapping", .what = "a reader of the mapping, RESET, exits for full rings",
		.vm = { .npages = 4096, .nr_vcpus = 2, .entries = 64,
			.flags = KVM_DIRTY_SLOT_RING_EXIT_ON_FULL },
		.kvm_writes = 1, .irq_writes = 1,
		.capacity = 64, .mapped = true, .steal = true, .device = true,
	}, {
		.name = "overrun", .what = "a reader of the mapping whose rings overflow",
		.vm = { .npages = 4096, .nr_vcpus = 2, .entries = 16, .fast_fault = true },
		.kvm_writes = 1, .irq_writes = 1,
		.capacity = 512, .mapped = true, .discard = true, .sync = true,
	}, {
		.name = "faults", .what = "arrays that cannot be written, signals",
		.vm = { .npages = 4096, .nr_vcpus = 2, .entries = 64 },
		.kvm_writes = 1, .irq_writes = 1,
		.capacity = 128, .harvesters = 2, .device = true, .discard = true, .inject = 24,
	}, {
		.name = "harvesters", .what = "4 threads harvest one log at once",
		.vm = { .npages = 4096, .nr_vcpus = 3, .entries = 64, .fast_fault = true },
		.kvm_writes = 4, .irq_writes = 1,
		.capacity = 50, .harvesters = 4, .device = true,
	}, {
		.name = "huge", .what = "huge pages, which writes split",
		.vm = { .npages = 4096, .nr_vcpus = 2, .entries = 64, .huge = true,
			.init_set = true },
		.kvm_writes = 16, .irq_writes = 1,
		.capacity = 1000, .harvesters = 1, .strict = true, .sync = true,
	}, {
		.name = "quiet", .what = "rings that stop and go, and leave and come back",
		.vm = { .npages = 64, .nr_vcpus = 3, .entries = 64 },
		.kvm_writes = 60, .capacity = 100, .harvesters = 1, .pause = 2,
		.strict = true, .sync = true,
	}, {
		.name = "hostile", .what = "consumers that are out of bounds all the time",
		.vm = { .npages = 2048, .nr_vcpus = 2, .entries = 64, .fast_fault = true },
		.kvm_writes = 4, .irq_writes = 1,
		.capacity = 100, .harvesters = 2, .hostile = true,
	},
};

const char *case_name = "";
void (*on_mark)(const struct kvm_memory_slot *memslot, gfn_t gfn, int n);

static const struct test_case *test;
static int fd;

/* What consumers made of the reports, the last one of each page's writes. */
static u64 *copy;
static u32 *marks, *reports;
static u64 harvested, stolen;

static struct {
	struct kvm_dirty_slot_ring_user *user;
	struct kvm_dirty_slot_ring_kern *kern;
	struct kvm_dirty_run *runs;
} rings[MAX_VCPUS];

/* The last writes of each vCPU, page (24 bits) and value, for the strict test. */
static u64 recent[MAX_VCPUS][RECENT];

void fail(const char *fmt, ...)
{
	va_list args;

	va_start(args, fmt);
	flockfile(stdout);
	printf("# FAIL %s: ", case_name);
	vprintf(fmt, args);
	printf("\n");
	va_end(args);
	fflush(stdout);
	_exit(1);
}

static void hung(int sig)
{
	static const char what[] = "# FAIL: it hangs\n";

	(void)sig;
	if (write(STDOUT_FILENO, what, sizeof(what) - 1) < 0)
		_exit(3);
	_exit(1);
}

u32 random_u32(u64 *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state >> 32;
}

/* As the kernel's, and it counts. */
void mark_page_dirty_in_slot(struct kvm *kvm, const struct kvm_memory_slot *memslot,
			     struct kvm_vcpu *vcpu, gfn_t gfn)
{
	if (!memslot || !memslot->dirty_slot_log)
		return;
	if (on_mark)
		on_mark(memslot, gfn, 1);
	kvm_dirty_slot_log_mark(kvm, memslot, vcpu, gfn - memslot->base_gfn);
}

/* Counts before, as a harvest may report the page at once, and back if it was not. */
void sim_look_again(const struct kvm_memory_slot *memslot, struct kvm_vcpu *vcpu, gfn_t gfn)
{
	const struct kvm_vcpu_stat_generic *stat = &vcpu->stat.generic;
	u64 before = stat->dirty_slot_ring_pushed + stat->dirty_slot_ring_overflowed;

	if (on_mark)
		on_mark(memslot, gfn, 1);
	kvm_dirty_slot_log_look_again(memslot, vcpu, gfn - memslot->base_gfn);
	if (on_mark && stat->dirty_slot_ring_pushed + stat->dirty_slot_ring_overflowed == before)
		on_mark(memslot, gfn, -1);
}

static void count_mark(const struct kvm_memory_slot *memslot, gfn_t gfn, int n)
{
	(void)memslot;
	__atomic_add_fetch(&marks[gfn], n, __ATOMIC_RELAXED);
}

/*
 * Writers.
 */

/* Random pages, many of them neighbours, some of them often. */
static gfn_t next_page(u64 *rnd, gfn_t last)
{
	u32 r = random_u32(rnd), page = random_u32(rnd) % test->vm.npages;

	if (test->sparse)
		return r % test->sparse * (test->vm.npages / test->sparse) +
		       r / test->sparse % test->words * BITS_PER_LONG;

	switch (r % 4) {
	case 0:
		return page;
	case 1:
		return page % 64 * test->vm.npages / 64;
	default:
		return (last + 1 + (r / 4 % 16 == 0)) % test->vm.npages;
	}
}

u64 write_as_kvm(struct kvm_vcpu *vcpu, gfn_t gfn)
{
	struct kvm *kvm = sim_kvm;
	int idx = srcu_read_lock(&kvm->srcu);
	struct kvm_memory_slot *memslot = sim_slot_of(kvm, gfn);
	u64 val = 0;

	if (memslot) {
		val = __atomic_add_fetch(&sim_memory[gfn], 1, __ATOMIC_RELAXED);
		mark_page_dirty_in_slot(kvm, memslot, vcpu, gfn);
	}
	srcu_read_unlock(&kvm->srcu, idx);
	return val;
}

/*
 * What comes in the midst of a mark in the vCPU's own thread and writes to guest
 * memory: kvm_arch_vcpu_put(), as the scheduler calls it (steal time), or an
 * interrupt.
 */
static __thread struct kvm_vcpu *loaded;
static __thread gfn_t steal_time;

static void preempted(void)
{
	static __thread unsigned int n;

	if (n++ % 4) {
		loaded->scheduled_out = true;
		write_as_kvm(loaded, steal_time);
		loaded->scheduled_out = false;
	} else {
		shim_in_task = false;
		write_as_kvm(loaded, steal_time);
		shim_in_task = true;
	}
}

u64 write_as_vcpu(struct kvm_vcpu *vcpu, gfn_t gfn, gfn_t other)
{
	u64 val;

	loaded = vcpu;
	steal_time = other;
	shim_preempted = preempted;
	val = write_as_kvm(vcpu, gfn);
	shim_preempted = NULL;
	return val;
}

static void *vcpu_thread(void *arg)
{
	struct kvm_vcpu *vcpu = arg;
	u64 rnd = 0x9e3779b97f4a7c15ULL * (vcpu->vcpu_idx + 1), val;
	unsigned int n = 0;
	gfn_t gfn = 0;
	u32 how;

	while (rounds_go_on(vcpu)) {
		gfn = next_page(&rnd, gfn);
		how = random_u32(&rnd) % 64;
		if (how % 16 < test->pause) {
			sim_exit(vcpu);
			usleep(random_u32(&rnd) % 256);
		}
		if (how < test->kvm_writes) {
			sim_exit(vcpu);
			val = write_as_vcpu(vcpu, gfn, next_page(&rnd, 0));
		} else if (how < test->kvm_writes + test->irq_writes) {
			/* An interrupt's; the CPU has this vCPU loaded. */
			sim_exit(vcpu);
			shim_in_task = false;
			val = write_as_kvm(vcpu, gfn);
			shim_in_task = true;
		} else {
			val = sim_write(vcpu, gfn);
			if (!val) {
				usleep(20);
				continue;
			}
		}
		/* The write was over: pairs with strict_harvest(). */
		smp_store_release(&recent[vcpu->vcpu_idx][n++ % RECENT], gfn | val << 24);
	}
	return NULL;
}

static void mark_by_ioctl(gfn_t gfn, u32 n)
{
	struct kvm_dirty_run run = { .offset = gfn, .npages = n };
	struct kvm_dirty_slot_runs args = { .runs = (uintptr_t)&run, .nr_runs = 1 };
	u32 i;
	int r;

	for (i = 0; i < n; i++)
		__atomic_add_fetch(&sim_memory[gfn + i], 1, __ATOMIC_RELAXED);
	do {
		for (i = 0; i < n; i++)
			__atomic_add_fetch(&marks[gfn + i], 1, __ATOMIC_RELAXED);
		r = sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_MARK, &args);
	} while (r && test->inject && (r == -EINTR || r == -EFAULT));
	if (r && r != -ENODEV)
		fail("MARK: %s", strerror(-r));
	if (args.nr_pages > n)
		fail("MARK added %llu of %u pages", args.nr_pages, n);
}

static void *device_thread(void *arg)
{
	u64 rnd = 12345;
	gfn_t gfn = 0;

	(void)arg;
	shim_inject = test->inject;
	while (rounds_go_on(NULL)) {
		gfn = next_page(&rnd, gfn);
		if (random_u32(&rnd) % 4)
			write_as_kvm(NULL, gfn);
		else
			mark_by_ioctl(gfn, min_t(u32, 1 + random_u32(&rnd) % 100,
						 test->vm.npages - gfn));
		usleep(50);
	}
	return NULL;
}

/*
 * Consumers.
 */

struct consumer {
	unsigned int seed;
	struct kvm_dirty_run *runs;
	u32 *pages;
};

/* After the call that reported it: what is read now is the consumer's. */
static void copy_page(gfn_t gfn)
{
	u64 val = __atomic_load_n(&sim_memory[gfn], __ATOMIC_RELAXED), old;

	old = __atomic_load_n(&copy[gfn], __ATOMIC_RELAXED);
	while (old < val && !__atomic_compare_exchange_n(&copy[gfn], &old, val, false,
							 __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		;
}

static void take_page(gfn_t gfn)
{
	u32 n;

	if (gfn >= test->vm.npages)
		fail("page %llu reported, there are %lu", gfn, test->vm.npages);
	n = __atomic_add_fetch(&reports[gfn], 1, __ATOMIC_RELAXED);
	/* A mapping's reader also sees entries of pages that others took. */
	if (!test->mapped && n > __atomic_load_n(&marks[gfn], __ATOMIC_RELAXED))
		fail("page %llu reported %u times, more often than marked",
		     gfn, n);
	copy_page(gfn);
}

static void map_rings(void)
{
	struct kvm_dirty_slot_log_info info;
	unsigned long at;
	unsigned int i;

	if (sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info))
		fail("INFO");
	if (info.nr_rings != test->vm.nr_vcpus || info.entries != test->vm.entries ||
	    info.slot || info.npages != test->vm.npages || info.base_gfn || info.flags ||
	    info.consumers_size < SIM_MAX_VCPUS * KVM_DIRTY_SLOT_CONSUMER_STRIDE)
		fail("INFO tells of %u rings of %u entries", info.nr_rings, info.entries);
	for (i = 0; i < info.nr_rings; i++) {
		at = i * KVM_DIRTY_SLOT_CONSUMER_STRIDE;
		rings[i].user = sim_mmap(fd, at / PAGE_SIZE, true) + at % PAGE_SIZE;
		at = (info.rings_offset + i * info.stride) / PAGE_SIZE;
		rings[i].kern = sim_mmap(fd, at + KVM_DIRTY_SLOT_RING_KERN_PAGE, false);
		rings[i].runs = sim_mmap(fd, at + KVM_DIRTY_SLOT_RING_ENTRIES_PAGE, false);
		if (!rings[i].kern || !rings[i].runs)
			fail("cannot map ring %u", i);
		if (sim_mmap(fd, at, true))
			fail("a page of ring %u can be mapped writable", i);
	}
	if (sim_mmap(fd, (info.rings_offset + i * info.stride) / PAGE_SIZE, false))
		fail("there is a ring beyond the last");
}

/* What the mapping shows, whenever one looks.  None of the three goes back. */
static void check_markers(unsigned int ring)
{
	u64 reset = __atomic_load_n(&rings[ring].kern->reset, __ATOMIC_ACQUIRE);
	u64 consumer = __atomic_load_n(&rings[ring].user->consumer, __ATOMIC_ACQUIRE);
	u64 producer = __atomic_load_n(&rings[ring].kern->producer, __ATOMIC_ACQUIRE);

	if (reset > consumer || consumer > producer)
		fail("ring %u shows reset %llu, consumer %llu, producer %llu",
		     ring, reset, consumer, producer);
}

/* One call; returns 0, KVM_DIRTY_HARVEST_MORE or an error. */
static int harvest_once(struct consumer *c, bool sync, u64 *nr_pages)
{
	struct kvm_dirty_slot_runs args = {
		.runs = (uintptr_t)c->runs, .nr_runs = test->capacity,
		.flags = sync ? KVM_DIRTY_HARVEST_SYNC : 0,
	};
	u64 n = 0;
	u32 i, j;
	int r;

	r = sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_HARVEST, &args);
	for (i = 0; i < test->vm.nr_vcpus && !test->hostile; i++)
		check_markers(i);
	if (r)
		return r;
	if (args.nr_runs > test->capacity)
		fail("%u runs in an array of %u", args.nr_runs, test->capacity);
	for (i = 0; i < args.nr_runs; i++) {
		if (!c->runs[i].npages)
			fail("an empty run");
		n += c->runs[i].npages;
		for (j = 0; j < c->runs[i].npages; j++)
			take_page((gfn_t)c->runs[i].offset + j);
	}
	if (n != args.nr_pages)
		fail("%llu pages in the runs, nr_pages %llu",
		     n, args.nr_pages);
	__atomic_add_fetch(&harvested, n, __ATOMIC_RELAXED);
	*nr_pages += n;
	return args.flags & KVM_DIRTY_HARVEST_MORE;
}

/* All there is; -ENODEV if the slot has stopped logging and all was harvested. */
static int harvest_all(struct consumer *c, bool sync, u64 *nr_pages)
{
	unsigned int i;
	int r;

	*nr_pages = 0;
	do {
		r = harvest_once(c, sync, nr_pages);
		if (r == -EINVAL && test->hostile) {
			for (i = 0; i < test->vm.nr_vcpus; i++)
				__atomic_store_n(&rings[i].user->consumer,
						 __atomic_load_n(&rings[i].kern->reset,
								 __ATOMIC_ACQUIRE),
						 __ATOMIC_RELEASE);
			continue;
		}
		if (r < 0 && r != -ENODEV &&
		    !(shim_inject && (r == -EINTR || r == -EFAULT)))
			fail("HARVEST: %s", strerror(-r));
	} while (r && r != -ENODEV);
	return r;
}

static void strict_harvest(struct consumer *c)
{
	u64 before[MAX_VCPUS][RECENT], nr_pages;
	unsigned int i, n;
	gfn_t gfn;

	for (i = 0; i < test->vm.nr_vcpus; i++)
		for (n = 0; n < RECENT; n++)
			/* Pairs with vcpu_thread(). */
			before[i][n] = smp_load_acquire(&recent[i][n]);
	harvest_all(c, test->sync, &nr_pages);
	for (i = 0; i < test->vm.nr_vcpus; i++) {
		for (n = 0; n < RECENT; n++) {
			gfn = before[i][n] & 0xffffff;
			if (copy[gfn] < before[i][n] >> 24)
				fail("page %llu: write %llu was over, but the harvest has %llu",
				     gfn, (before[i][n] >> 24),
				     copy[gfn]);
		}
	}
}

static void *harvest_thread(void *arg)
{
	struct consumer *c = arg;
	u64 nr_pages;
	int r;

	shim_inject = test->inject;
	while (rounds_go_on(NULL)) {
		if (test->wait) {
			r = sim_poll(fd, 3);
			if (r < 0)
				fail("it became readable and woke nobody");
			if (!r)
				continue;
		}
		if (test->strict)
			strict_harvest(c);
		else
			harvest_all(c, test->sync, &nr_pages);
	}
	return NULL;
}

/* Read all rings, say so, RESET, then copy; now and then HARVEST what overflowed. */
static void read_mapping(struct consumer *c)
{
	struct kvm_dirty_slot_reset reset = { 0 };
	struct kvm_dirty_run run;
	u64 consumer, producer, nr_pages;
	unsigned int i, n = 0, max = MAX_CAPACITY;
	int r;

	for (i = 0; i < test->vm.nr_vcpus; i++) {
		check_markers(i);
		consumer = __atomic_load_n(&rings[i].user->consumer, __ATOMIC_RELAXED);
		producer = __atomic_load_n(&rings[i].kern->producer, __ATOMIC_ACQUIRE);
		for (; consumer != producer; consumer++) {
			run = rings[i].runs[consumer & (test->vm.entries - 1)];
			if (!run.npages || n + run.npages > max)
				break;
			while (run.npages--)
				c->pages[n++] = run.offset++;
		}
		__atomic_store_n(&rings[i].user->consumer, consumer, __ATOMIC_RELEASE);
	}
	r = sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_RESET, &reset);
	if (r)
		fail("RESET: %s", strerror(-r));
	for (i = 0; i < n; i++)
		take_page(c->pages[i]);
	if (reset.nr_pages > n)
		fail("RESET re-protected %llu pages, %u were collected",
		     reset.nr_pages, n);
	if (reset.flags & KVM_DIRTY_RESET_OVERFLOW)
		harvest_all(c, test->sync, &nr_pages);
}

/*
 * Consumers behind reset and ahead of producer: one in between would say that pages
 * had been collected.
 */
static void *hostile_thread(void *arg)
{
	u64 rnd = 777, reset, val;
	u32 r;

	(void)arg;
	while (rounds_go_on(NULL)) {
		r = random_u32(&rnd);
		reset = __atomic_load_n(&rings[r % test->vm.nr_vcpus].kern->reset,
					__ATOMIC_ACQUIRE);
		val = r & 0x100 ? reset - 1 - r % 64 : reset + (1ULL << (32 + r / 512 % 31));
		__atomic_store_n(&rings[r % test->vm.nr_vcpus].user->consumer, val,
				 __ATOMIC_RELAXED);
		if (!(r / 1024 % 64))
			usleep(30);
	}
	return NULL;
}

static void *mapping_thread(void *arg)
{
	while (rounds_go_on(NULL))
		read_mapping(arg);
	return NULL;
}

static void protect_word(struct kvm_memory_slot *memslot, unsigned long word, unsigned long mask)
{
	kvm_arch_mmu_enable_log_dirty_pt_masked(sim_kvm, memslot, word * BITS_PER_LONG, mask);
}

/* kvm_get_dirty_log_protect() */
static void *steal_thread(void *arg)
{
	unsigned long words = BITS_TO_LONGS(test->vm.npages), i, mask, *map;
	struct kvm *kvm = sim_kvm;
	struct kvm_memory_slot *memslot;
	unsigned int bit;

	(void)arg;
	map = calloc(words, sizeof(*map));
	while (rounds_go_on(NULL)) {
		memset(map, 0, words * sizeof(*map));
		mutex_lock(&kvm->slots_lock);
		memslot = sim_slot(0);
		if (memslot) {
			write_lock(&kvm->mmu_lock);
			for (i = 0; i < words; i++) {
				if (!READ_ONCE(memslot->dirty_bitmap[i]))
					continue;
				map[i] = xchg(&memslot->dirty_bitmap[i], 0);
				if (map[i])
					protect_word(memslot, i, map[i]);
			}
			write_unlock(&kvm->mmu_lock);
			kvm_flush_remote_tlbs(kvm);
		}
		mutex_unlock(&kvm->slots_lock);
		for (i = 0; i < words; i++) {
			for (mask = map[i]; mask; mask &= mask - 1) {
				bit = __ffs(mask);
				take_page(i * BITS_PER_LONG + bit);
				__atomic_add_fetch(&stolen, 1, __ATOMIC_RELAXED);
			}
		}
		usleep(300);
	}
	free(map);
	return NULL;
}

/* What was discarded is as good as any other content: take what is there. */
static void *discard_thread(void *arg)
{
	struct kvm_dirty_run run;
	struct kvm_dirty_slot_runs args;
	u64 rnd = 54321;
	u32 i;
	int r;

	(void)arg;
	shim_inject = test->inject;
	while (rounds_go_on(NULL)) {
		run.offset = random_u32(&rnd) % test->vm.npages;
		run.npages = min_t(u32, 1 + random_u32(&rnd) % 300,
				   test->vm.npages - run.offset);
		args = (struct kvm_dirty_slot_runs){ .runs = (uintptr_t)&run, .nr_runs = 1 };
		r = sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_DISCARD, &args);
		if (r && r != -ENODEV && !(test->inject && (r == -EINTR || r == -EFAULT)))
			fail("DISCARD: %s", strerror(-r));
		/* It may have got some way before it failed. */
		for (i = 0; i < run.npages; i++)
			copy_page(run.offset + i);
		usleep(500);
	}
	return NULL;
}

/*
 * Checks.
 */

static void compare(const char *when)
{
	unsigned long i;

	for (i = 0; i < test->vm.npages; i++) {
		if (copy[i] != sim_memory[i])
			fail("%s: page %lu lost: memory %llu, copy %llu, marks %u, reports %u",
			     when, i, sim_memory[i], copy[i], marks[i], reports[i]);
	}
}

static void check_counts(void)
{
	struct kvm_vm_stat_generic *stat = &sim_kvm->stat.generic;
	u64 in = atomic64_read(&stat->dirty_slot_log_marked_pages), out;
	struct kvm_vcpu *vcpu;
	unsigned long i;

	if (test->vm.init_set)
		in += test->vm.npages;
	kvm_for_each_vcpu(i, vcpu, sim_kvm)
		in += vcpu->stat.generic.dirty_slot_ring_pushed +
		      vcpu->stat.generic.dirty_slot_ring_overflowed;
	out = harvested + stolen + atomic64_read(&stat->dirty_slot_log_reset_pages) +
	      atomic64_read(&stat->dirty_slot_log_discarded_pages);
	/*
	 * Not always as many: pages that could not be reported go back, and one
	 * that was marked in between had joined once more.
	 */
	if (in < out)
		fail("%llu pages went in, %llu came out: %llu harvested, %llu stolen", in,
		     out, harvested, stolen);
	if (harvested != (u64)atomic64_read(&stat->dirty_slot_log_harvested_pages))
		fail("the statistics have another number of harvested pages");
}

/* All but the main thread wait. */
static void check_round(void *arg)
{
	struct consumer *c = arg;
	u64 nr_pages;
	unsigned long i;

	harvest_all(c, true, &nr_pages);
	compare("after a last harvest");
	check_counts();
	for (i = 0; i < test->vm.npages; i++) {
		if (sim_unlogged(i))
			fail("page %lu is not in the log, and writes to it would not be", i);
	}
	harvest_all(c, true, &nr_pages);
	if (nr_pages)
		fail("the log was empty, and there are %llu pages", nr_pages);
}

/* Pages are dirty, a consumer is at work, and the slot goes away. */
static void check_deletion(struct consumer *c)
{
	u64 rnd = 99, nr_pages;
	gfn_t gfn = 0;
	int i;

	for (i = 0; i < 500; i++) {
		gfn = next_page(&rnd, gfn);
		write_as_kvm(i % 2 ? sim_kvm->vcpus[0] : NULL, gfn);
	}
	sim_delete_slot(0);
	while (harvest_all(c, true, &nr_pages) != -ENODEV)
		;
	compare("after the slot was deleted");
	if (sim_poll(fd, 0) != EPOLLHUP)
		fail("poll() of an empty log whose slot is gone");
}

static void init_consumer(struct consumer *c)
{
	c->runs = calloc(MAX_CAPACITY, sizeof(*c->runs));
	c->pages = calloc(MAX_CAPACITY, sizeof(*c->pages));
}

static void free_consumer(struct consumer *c)
{
	free(c->runs);
	free(c->pages);
}

static void run_case(unsigned int ms)
{
	struct kvm_dirty_slot_log_fd arg = { 0 };
	struct consumer own, consumers[MAX_HARVESTERS];
	unsigned int i, rounds;
	unsigned long npages = test->vm.npages, k;

	harvested = 0;
	stolen = 0;
	memset(recent, 0, sizeof(recent));
	copy = calloc(npages, sizeof(*copy));
	marks = calloc(npages, sizeof(*marks));
	reports = calloc(npages, sizeof(*reports));
	on_mark = count_mark;
	init_consumer(&own);
	for (i = 0; i < ARRAY_SIZE(consumers); i++)
		init_consumer(&consumers[i]);

	sim_create(&test->vm);
	fd = kvm_vm_ioctl_get_dirty_slot_log_fd(sim_kvm, &arg);
	if (fd < 0)
		fail("no file descriptor: %s", strerror(-fd));
	map_rings();
	for (k = 0; k < npages && test->vm.init_set; k++)
		marks[k]++;

	rounds_begin(test->vm.nr_vcpus + test->harvesters + test->mapped + test->steal +
		     test->discard + test->device + test->hostile);
	for (i = 0; i < test->vm.nr_vcpus; i++)
		rounds_start(vcpu_thread, sim_kvm->vcpus[i]);
	for (i = 0; i < test->harvesters; i++)
		rounds_start(harvest_thread, &consumers[i]);
	if (test->mapped)
		rounds_start(mapping_thread, &consumers[0]);
	if (test->hostile)
		rounds_start(hostile_thread, NULL);
	if (test->steal)
		rounds_start(steal_thread, NULL);
	if (test->discard)
		rounds_start(discard_thread, NULL);
	if (test->device)
		rounds_start(device_thread, NULL);

	rounds = rounds_run(ms, check_round, &own);
	check_deletion(&own);

	printf("# %s: %u rounds, pages: %llu harvested, %llu reset, %llu stolen\n", test->name,
	       rounds, harvested,
	       atomic64_read(&sim_kvm->stat.generic.dirty_slot_log_reset_pages),
	       stolen);
	if (!harvested)
		fail("nothing was harvested");

	sim_close(fd);
	sim_destroy();
	on_mark = NULL;
	free_consumer(&own);
	for (i = 0; i < ARRAY_SIZE(consumers); i++)
		free_consumer(&consumers[i]);
	free(copy);
	free(marks);
	free(reports);
}

static void run_test_case(const struct test_case *which, unsigned int ms)
{
	static struct test_case now;

	now = *which;
	now.vm.memory = true;
	test = &now;
	run_case(ms);
}

/* Those of other files, one after the other; the last one has no name. */
static const struct stress_case *other_case(unsigned int n)
{
	static const struct stress_case *const files[] = {
		vm_cases, fixed_cases, idle_cases, strange_cases,
	};
	const struct stress_case *c = NULL;
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(files); i++) {
		for (c = files[i]; c->name; c++)
			if (!n--)
				return c;
	}
	return c;
}

static const char *nth_case(unsigned int n, const char **what)
{
	const struct stress_case *c;

	if (n < ARRAY_SIZE(cases)) {
		*what = cases[n].what;
		return cases[n].name;
	}
	c = other_case(n - ARRAY_SIZE(cases));
	*what = c->what;
	return c->name;
}

static void run_nth_case(unsigned int n, unsigned int ms)
{
	if (n < ARRAY_SIZE(cases))
		run_test_case(&cases[n], ms);
	else
		other_case(n - ARRAY_SIZE(cases))->run(ms);
}

static void usage(FILE *f)
{
	const char *name, *what;
	unsigned int i;

	fprintf(f, "stress [-t MS] [CASE]...\n\n"
		"Runs the cases (all by default) and prints TAP; the first failure ends it, with\n"
		"exit status 1.\n\n"
		"  -t MS  how long each case goes on (default: 500)\n\n");
	for (i = 0; (name = nth_case(i, &what)); i++)
		fprintf(f, "  %-12s %s\n", name, what);
}

static bool wanted(const char *name, int argc, char **argv)
{
	int i;

	for (i = 0; i < argc; i++) {
		if (!strcmp(argv[i], name))
			return true;
	}
	return !argc;
}

static void check_names(int argc, char **argv)
{
	const char *name, *what;
	unsigned int i;

	for (; argc; argc--, argv++) {
		for (i = 0; (name = nth_case(i, &what)) && strcmp(*argv, name); i++)
			;
		if (!name) {
			fprintf(stderr, "stress: no such case: %s; see stress --help\n", *argv);
			exit(2);
		}
	}
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "help", no_argument, NULL, 'h' },
		{ "time", required_argument, NULL, 't' },
		{ }
	};
	unsigned int i, n = 0, ms = 500;
	const char *name, *what;
	char *end;
	int c;

	while ((c = getopt_long(argc, argv, "ht:", options, NULL)) != -1) {
		switch (c) {
		case 'h':
			usage(stdout);
			return 0;
		case 't':
			ms = strtoul(optarg, &end, 10);
			if (*end || !ms || ms > 1000000) {
				fprintf(stderr, "stress: -t wants milliseconds, not \"%s\"\n",
					optarg);
				return 2;
			}
			break;
		default:
			usage(stderr);
			return 2;
		}
	}
	argc -= optind;
	argv += optind;
	check_names(argc, argv);

	signal(SIGALRM, hung);
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (i = 0; (name = nth_case(i, &what)); i++) {
		if (!wanted(name, argc, argv))
			continue;
		case_name = name;
		/* Busy machines decide nothing; but who looks for a hang wants to know. */
		alarm(ms < 5000 ? 300 : 20 + ms / 500);
		run_nth_case(i, ms);
		if (shim_allocated)
			fail("%ld allocations were not freed", shim_allocated);
		printf("ok %u %s: %s\n", ++n, name, what);
	}
	printf("1..%u\n", n);
	return 0;
}
