// SPDX-License-Identifier: GPL-2.0-only
/*
 * What instruction counts cannot show: cache misses and contention.  vCPUs on
 * one CPU, who collects their dirty pages on another, and the same work for each
 * way to log them:
 *
 *	floor		nobody logs, the collector knows the pages by heart
 *	least		the least that a log with a bitmap and rings can do: an atomic
 *			bit, an entry, a producer; the collector knows the SPTEs by heart
 *	bitmap-get	KVM_GET_DIRTY_LOG, which clears and re-protects
 *	bitmap-clear	with manual protect: KVM_GET_DIRTY_LOG, and
 *			KVM_CLEAR_DIRTY_LOG of each 64 Ki pages that have a dirty one
 *	ring		the kernel's dirty ring, virt/kvm/dirty_ring.c
 *	slot-ring	virt/kvm/dirty_slot/
 *	tree		its overflow log alone: a bitmap, and a tree of bits over it
 *	tree+sorted	slot-ring, but with all that rings have put into the tree
 *			first, and so collected in the order of the pages
 *
 * In each round the vCPUs write to a set of pages that are write-protected.
 * "apart": then, when they are done, the collector collects.  "together": they
 * write to the next set while it collects the one before.  What is told are
 * nanoseconds of CPU time for each page, in the lower quartile of the rounds, the
 * least of several runs in which the ways to log take turns (--runs): of
 * the fault (finding the SPTE, making it writable, logging the page) and of
 * collecting (finding the page, write-protecting it, giving it to userspace).
 *
 * All write-protect in the same page tables: slot-ring by x86's own walk,
 * arch/x86/kvm/mmu/dirty_slot.c, the others mask by mask as clear_dirty_pt_masked()
 * of the TDP MMU does it, which sim.c has.
 */

#include <getopt.h>
#include <linux/perf_event.h>
#include <math.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <time.h>

#include "sim.h"
#include "measure.h"
#include "log.h"

#define MAX_PAGES	65536
#define MAX_SETS	4
#define MAX_ROUNDS	200
#define RING_ENTRIES	65536		/* the most that the kernel's ring can have */
#define CLEAR_CHUNK	65536		/* pages in a KVM_CLEAR_DIRTY_LOG */
#define LEAST_AHEAD	16		/* as far as slot rings look ahead */

enum mechanism {
	FLOOR, LEAST, BITMAP_GET, BITMAP_CLEAR, RING, SLOT_RING, TREE, TREE_SORTED, NR_MECHANISMS
};

static const char * const names[NR_MECHANISMS] = {
	"floor", "least", "bitmap-get", "bitmap-clear", "ring", "slot-ring", "tree", "tree+sorted",
};

enum order { RANDOM, IN_ORDER, CLUSTERS };

#define CLUSTER		16		/* pages, one after the other */

struct point {
	unsigned int mib;
	unsigned int pages;
	enum order order;
	unsigned int vcpus;
};

/*
 * Those that the guests' benchmark has, some that no rig here can hold, and from 8
 * GiB on those where checkpoints live.
 */
static const struct point points[] = {
	{ 64, 1000, RANDOM, 1 },
	{ 64, 16384, IN_ORDER, 1 },
	{ 64, 16384, RANDOM, 1 },
	{ 1 << 10, 1000, RANDOM, 1 },
	{ 1 << 10, 20000, RANDOM, 1 },
	{ 1 << 10, 20000, RANDOM, 4 },
	{ 8 << 10, 500, RANDOM, 1 },
	{ 8 << 10, 500, CLUSTERS, 1 },
	{ 8 << 10, 5000, RANDOM, 1 },
	{ 8 << 10, 5000, RANDOM, 2 },
	{ 8 << 10, 5000, RANDOM, 4 },
	{ 8 << 10, 5000, CLUSTERS, 1 },
	{ 8 << 10, 50000, RANDOM, 1 },
	{ 8 << 10, 50000, CLUSTERS, 1 },
	{ 64 << 10, 100, RANDOM, 1 },
	{ 64 << 10, 1000, RANDOM, 1 },
	{ 64 << 10, 20000, RANDOM, 1 },
	{ 64 << 10, 20000, RANDOM, 4 },
	{ 512 << 10, 1000, RANDOM, 1 },
	{ 1 << 20, 1000, RANDOM, 1 },
	{ 1 << 20, 20000, RANDOM, 1 },
};

/* Cache misses as the CPU counts them, if it does and one may look. */
enum { LLC_MISSES, L1D_MISSES, NR_COUNTERS };

struct side {
	double ns[MAX_ROUNDS];
	int counter[NR_COUNTERS];
	u64 misses[NR_COUNTERS], pages;
};

#define ALL_MECHANISMS	(BIT(NR_MECHANISMS) - 1)

static u32 entries = SIM_BY_SLOT;
static unsigned long wanted = ALL_MECHANISMS;
static unsigned int budget_ms = 50, nr_runs = 3;
static enum mechanism mechanism;
static const struct point *point;
static unsigned long npages;
static unsigned int nr_sets;
static u32 *sets[MAX_SETS];
static int log_fd;
static struct kvm_dirty_run *runs;
static u32 *list;			/* what the collector got, if not runs */
static unsigned long *user_map;
static int cpus[2];
static const char *no_counters;
static double clock_ns[2];		/* what it takes to look at the clock */

/*
 * What "least" has: rings that are never full, and by heart the SPTEs of the pages that
 * the vCPU writes, of one set after the other, and some of the first once more.
 */
static struct least_ring {
	u64 *pages, **sptes;
	u64 producer ____cacheline_aligned;
	u64 reset ____cacheline_aligned;
	unsigned int at, nr_sptes;
} least[SIM_MAX_VCPUS];

/* The producer's order: "mark set n", and that it did. */
static int go, done, first_round;
static struct side producer, collector;

/* All pages are in each set. */
static bool whole(void)
{
	return point->pages == npages;
}

/* A page must not be in two sets, and two sets have to fit the kernel's ring. */
static bool can_together(void)
{
	return !whole() && 2 * point->pages < RING_ENTRIES;
}

/* A mark that knows of no rings. */
static void mark_tree(struct kvm_dirty_slot_log *log, unsigned long offset)
{
	if (!test_and_set_bit_le(offset, log->bitmap))
		kvm_dirty_slot_log_spill(log, offset / BITS_PER_LONG);
}

static void mark_least(const struct kvm_memory_slot *memslot, const struct kvm_vcpu *vcpu,
		       unsigned long offset)
{
	struct least_ring *ring = &least[vcpu->vcpu_idx];
	u64 *page = &ring->pages[ring->producer & (RING_ENTRIES - 1)];

	if (test_and_set_bit_le(offset, memslot->dirty_bitmap))
		return;
	if (!((uintptr_t)page % 64))
		prefetchw(page + 16);
	*page = offset;
	smp_store_release(&ring->producer, ring->producer + 1);
}

/* As the kernel's fast page fault, for the ways to log that there are here. */
void mark_page_dirty_in_slot(struct kvm *kvm, const struct kvm_memory_slot *memslot,
			     struct kvm_vcpu *vcpu, gfn_t gfn)
{
	if (mechanism == LEAST)
		mark_least(memslot, vcpu, gfn - memslot->base_gfn);
	else if (mechanism == TREE)
		mark_tree(memslot->dirty_slot_log, gfn - memslot->base_gfn);
	else if (memslot->dirty_slot_log)
		kvm_dirty_slot_log_mark_vcpu(memslot, vcpu, gfn - memslot->base_gfn);
	else if (kvm->dirty_ring_size)
		kvm_dirty_ring_push(vcpu, 0, gfn - memslot->base_gfn);
	else if (memslot->dirty_bitmap)
		set_bit_le(gfn - memslot->base_gfn, memslot->dirty_bitmap);
}

void sim_look_again(const struct kvm_memory_slot *memslot, struct kvm_vcpu *vcpu, gfn_t gfn)
{
	struct kvm_dirty_slot_log *log = memslot->dirty_slot_log;
	unsigned long offset = gfn - memslot->base_gfn;

	if (mechanism != TREE)
		kvm_dirty_slot_log_look_again(memslot, vcpu, offset);
	else if (!test_bit_le(offset, log->bitmap))
		mark_tree(log, offset);
}

/*
 * Counters.
 */

static void open_counters(struct side *s)
{
	static const u64 what[NR_COUNTERS][2] = {
		[LLC_MISSES] = { PERF_TYPE_HARDWARE, PERF_COUNT_HW_CACHE_MISSES },
		[L1D_MISSES] = { PERF_TYPE_HW_CACHE, PERF_COUNT_HW_CACHE_L1D |
				 PERF_COUNT_HW_CACHE_OP_READ << 8 |
				 PERF_COUNT_HW_CACHE_RESULT_MISS << 16 },
	};
	unsigned int i;

	for (i = 0; i < NR_COUNTERS; i++) {
		struct perf_event_attr attr = {
			.type = what[i][0], .size = sizeof(attr), .config = what[i][1],
			.exclude_kernel = 1, .exclude_hv = 1,
		};

		s->counter[i] = syscall(SYS_perf_event_open, &attr, 0, -1, -1, 0);
		if (s->counter[i] < 0)
			__atomic_store_n(&no_counters, strerror(errno), __ATOMIC_RELAXED);
	}
}

static void forget(struct side *s)
{
	s->pages = 0;
	memset(s->misses, 0, sizeof(s->misses));
}

static void read_counters(struct side *s, u64 *val)
{
	unsigned int i;

	for (i = 0; i < NR_COUNTERS; i++) {
		val[i] = 0;
		if (s->counter[i] >= 0 && read(s->counter[i], &val[i], 8) != 8)
			val[i] = 0;
	}
}

/*
 * Time that the thread ran, so that what else runs here does not count.  Nobody
 * sleeps while he works: the fast page fault takes no lock.  But it is a system
 * call, and may leave caches and predictors empty, which shows in short rounds:
 * every other round uses the wall clock, and the faster half wins.
 */
static double clock_of(unsigned int round)
{
	struct timespec t;

	clock_gettime(round % 2 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

/* Measures one round of one side. */
static void measure(struct side *s, unsigned int round, unsigned int (*work)(unsigned int set),
		    unsigned int set)
{
	u64 before[NR_COUNTERS], after[NR_COUNTERS];
	unsigned int i, n;
	double t;

	read_counters(s, before);
	t = clock_of(round);
	n = work(set);
	t = clock_of(round) - t - clock_ns[round % 2];
	read_counters(s, after);
	/* A collector that found little ran ahead: no sample. */
	s->ns[round] = n > point->pages / 4 ? max(t, 0.0) / n : -1;
	s->pages += n;
	for (i = 0; i < NR_COUNTERS; i++)
		s->misses[i] += after[i] - before[i];
}

/*
 * The vCPUs.
 */

static unsigned int mark_set(unsigned int set)
{
	const u32 *pages = sets[set];
	unsigned int i, vcpu = 0;
	int idx = srcu_read_lock(&sim_kvm->srcu);

	for (i = 0; i < point->pages; i++) {
		sim_fault(sim_kvm->vcpus[vcpu], pages[i]);
		if (point->order == CLUSTERS && (i + 1) % CLUSTER)
			continue;
		if (++vcpu == point->vcpus)
			vcpu = 0;
	}
	srcu_read_unlock(&sim_kvm->srcu, idx);
	return point->pages;
}

static void wait_for(int *p, int val)
{
	unsigned int n;

	for (n = 1; __atomic_load_n(p, __ATOMIC_ACQUIRE) < val; n++) {
		/* With one CPU, or a busy machine, the other side needs it. */
		if (!(n % 1000))
			sched_yield();
	}
}

static void *producer_thread(void *arg)
{
	unsigned int round;
	int n;

	(void)arg;
	pin(cpus[0]);
	open_counters(&producer);
	/* Until the program ends: SRCU here never forgets a thread. */
	for (n = 1;; n++) {
		wait_for(&go, n);
		round = n - 1 - first_round;
		measure(&producer, round, mark_set, round % nr_sets);
		__atomic_store_n(&done, n, __ATOMIC_RELEASE);
	}
	return NULL;
}

/*
 * The collector; each returns how many pages it got.
 */

static unsigned int collect_floor(unsigned int set)
{
	struct kvm_memory_slot *memslot = sim_slot(0);
	unsigned int i;

	write_lock(&sim_kvm->mmu_lock);
	for (i = 0; i < point->pages; i++) {
		list[i] = sets[set][i];
		kvm_arch_mmu_enable_log_dirty_pt_masked(sim_kvm, memslot, list[i], 1);
	}
	write_unlock(&sim_kvm->mmu_lock);
	kvm_flush_remote_tlbs(sim_kvm);
	return point->pages;
}

/*
 * The entries of the rings, words of the bitmap, SPTEs, each looked at once and asked for
 * ahead.  It takes nothing from a log's contract but that no page is told twice.
 */
static unsigned int collect_least(unsigned int set)
{
	unsigned long *bitmap = sim_slot(0)->dirty_bitmap, mask;
	unsigned int n = 0, vcpu, bit;
	u64 end, i, page, *sptep;

	(void)set;
	read_lock(&sim_kvm->mmu_lock);
	for (vcpu = 0; vcpu < point->vcpus; vcpu++) {
		struct least_ring *ring = &least[vcpu];

		end = smp_load_acquire(&ring->producer);
		for (i = ring->reset; i != end; i++) {
			if (end - i > LEAST_AHEAD) {
				page = ring->pages[(i + LEAST_AHEAD) & (RING_ENTRIES - 1)];
				prefetchw(&bitmap[page / BITS_PER_LONG]);
				prefetchw(ring->sptes[ring->at + LEAST_AHEAD]);
			}
			page = ring->pages[i & (RING_ENTRIES - 1)];
			sptep = ring->sptes[ring->at] - page % BITS_PER_LONG;
			if (++ring->at == ring->nr_sptes)
				ring->at = 0;
			if (!READ_ONCE(bitmap[page / BITS_PER_LONG]))
				continue;
			mask = xchg(&bitmap[page / BITS_PER_LONG], 0);
			for (; mask; mask &= mask - 1) {
				bit = __ffs(mask);
				__atomic_fetch_and(&sptep[bit], ~PT_WRITABLE_MASK,
						   __ATOMIC_SEQ_CST);
				list[n++] = round_down(page, BITS_PER_LONG) + bit;
			}
		}
		smp_store_release(&ring->reset, end);
	}
	read_unlock(&sim_kvm->mmu_lock);
	kvm_flush_remote_tlbs(sim_kvm);
	return n;
}

/* Userspace: the pages of the words that are not zero. */
static unsigned int scan(const unsigned long *map, unsigned long words, unsigned long first,
			 unsigned int n)
{
	unsigned long i, mask;

	for (i = 0; i < words; i++) {
		for (mask = map[i]; mask; mask &= mask - 1)
			list[n++] = first + i * BITS_PER_LONG + __ffs(mask);
	}
	return n;
}

/* kvm_get_dirty_log_protect() */
static unsigned int collect_bitmap_get(unsigned int set)
{
	struct kvm_memory_slot *memslot = sim_slot(0);
	unsigned long words = BITS_TO_LONGS(npages), i, mask;
	unsigned long *buffer = memslot->dirty_bitmap + words;

	(void)set;
	mutex_lock(&sim_kvm->slots_lock);
	memset(buffer, 0, words * sizeof(*buffer));
	write_lock(&sim_kvm->mmu_lock);
	for (i = 0; i < words; i++) {
		if (!memslot->dirty_bitmap[i])
			continue;
		mask = xchg(&memslot->dirty_bitmap[i], 0);
		buffer[i] = mask;
		kvm_arch_mmu_enable_log_dirty_pt_masked(sim_kvm, memslot, i * BITS_PER_LONG, mask);
	}
	write_unlock(&sim_kvm->mmu_lock);
	kvm_flush_remote_tlbs(sim_kvm);
	memcpy(user_map, buffer, words * sizeof(*buffer));
	mutex_unlock(&sim_kvm->slots_lock);
	return scan(user_map, words, 0, 0);
}

/* kvm_clear_dirty_log_protect() */
static void clear_dirty_log(unsigned long first, unsigned long n)
{
	struct kvm_memory_slot *memslot = sim_slot(0);
	unsigned long *buffer = memslot->dirty_bitmap + BITS_TO_LONGS(npages), i, mask;
	bool flush = false;

	mutex_lock(&sim_kvm->slots_lock);
	memcpy(buffer, user_map + first, n * sizeof(*buffer));
	write_lock(&sim_kvm->mmu_lock);
	for (i = 0; i < n; i++) {
		mask = buffer[i];
		if (!mask)
			continue;
		mask &= atomic_long_fetch_andnot(mask, (atomic_long_t *)
						 &memslot->dirty_bitmap[first + i]);
		if (!mask)
			continue;
		flush = true;
		kvm_arch_mmu_enable_log_dirty_pt_masked(sim_kvm, memslot,
							(first + i) * BITS_PER_LONG, mask);
	}
	write_unlock(&sim_kvm->mmu_lock);
	if (flush)
		kvm_flush_remote_tlbs(sim_kvm);
	mutex_unlock(&sim_kvm->slots_lock);
}

static unsigned int collect_bitmap_clear(unsigned int set)
{
	struct kvm_memory_slot *memslot = sim_slot(0);
	unsigned long words = BITS_TO_LONGS(npages), i, chunk = CLEAR_CHUNK / BITS_PER_LONG;
	unsigned int n = 0, got;

	(void)set;
	mutex_lock(&sim_kvm->slots_lock);
	memcpy(user_map, memslot->dirty_bitmap, words * sizeof(*user_map));
	mutex_unlock(&sim_kvm->slots_lock);
	for (i = 0; i < words; i += chunk) {
		chunk = min(chunk, words - i);
		got = scan(user_map + i, chunk, i * BITS_PER_LONG, n);
		if (got != n)
			clear_dirty_log(i, chunk);
		n = got;
	}
	return n;
}

/* What userspace does with the mapping, and KVM_RESET_DIRTY_RINGS. */
static unsigned int collect_ring(unsigned int set)
{
	static u32 fetch[SIM_MAX_VCPUS];
	struct kvm_dirty_gfn *gfn;
	struct kvm_dirty_ring *ring;
	struct kvm_vcpu *vcpu;
	unsigned int n = 0;
	unsigned long i;
	int cleared = 0;

	if (set == UINT_MAX) {
		memset(fetch, 0, sizeof(fetch));
		return 0;
	}
	kvm_for_each_vcpu(i, vcpu, sim_kvm) {
		ring = &vcpu->dirty_ring;
		for (;;) {
			gfn = &ring->dirty_gfns[fetch[i] & (ring->size - 1)];
			/* Pairs with kvm_dirty_ring_push(). */
			if (smp_load_acquire(&gfn->flags) != KVM_DIRTY_GFN_F_DIRTY)
				break;
			list[n++] = gfn->offset;
			/* Pairs with kvm_dirty_gfn_harvested(). */
			smp_store_release(&gfn->flags, KVM_DIRTY_GFN_F_RESET);
			fetch[i]++;
		}
	}
	mutex_lock(&sim_kvm->slots_lock);
	kvm_for_each_vcpu(i, vcpu, sim_kvm)
		cleared += kvm_dirty_ring_reset(sim_kvm, &vcpu->dirty_ring);
	mutex_unlock(&sim_kvm->slots_lock);
	if (cleared)
		kvm_flush_remote_tlbs(sim_kvm);
	return n;
}

static unsigned int collect_slot_ring(unsigned int set)
{
	struct kvm_dirty_slot_runs args = { .runs = (uintptr_t)runs, .nr_runs = 2 * MAX_PAGES };

	(void)set;
	if (sim_ioctl(log_fd, KVM_DIRTY_SLOT_LOG_HARVEST, &args))
		die("KVM_DIRTY_SLOT_LOG_HARVEST failed");
	return args.nr_pages;
}

/* What rings have goes into the tree, and is collected from there. */
static unsigned int collect_sorted(unsigned int set)
{
	struct kvm_dirty_slot_log *log = sim_slot(0)->dirty_slot_log;
	struct kvm_dirty_slot_ring *ring;
	u64 producer, reset;
	unsigned int i;

	mutex_lock(&log->mutex);
	for (i = 0; i < log_nr_rings(log); i++) {
		ring = log_nth_ring(log, i);
		producer = smp_load_acquire(&ring->kern->producer);
		for (reset = ring->kern->reset; reset != producer; reset++)
			kvm_dirty_slot_log_spill(log, ring->runs[reset & (log->entries - 1)].offset /
						      BITS_PER_LONG);
		WRITE_ONCE(ring->user->consumer, reset);
		smp_store_release(&ring->kern->reset, reset);
	}
	mutex_unlock(&log->mutex);
	return collect_slot_ring(set);
}

static unsigned int (* const collect[NR_MECHANISMS])(unsigned int set) = {
	collect_floor, collect_least, collect_bitmap_get, collect_bitmap_clear, collect_ring,
	collect_slot_ring, collect_slot_ring, collect_sorted,
};

/*
 * A point.
 */

/* Each page is in one set at most; or all are in each, in an order of its own. */
static void choose_pages(void)
{
	unsigned int step = point->order == CLUSTERS ? CLUSTER : 1, set, i, j;
	unsigned char *taken = calloc(npages / 8 + 1, 1);
	u64 rnd = RANDOM_SEED;
	u32 page;

	for (set = 0; set < nr_sets; set++) {
		sets[set] = calloc(point->pages + CLUSTER, sizeof(u32));
		for (i = 0; i < point->pages; i += step) {
			page = i;
			while (point->order != IN_ORDER && !whole()) {
				page = random_below(&rnd, npages / step) * step;
				if (!(taken[page / 8] & 1 << page % 8))
					break;
			}
			taken[page / 8] |= 1 << page % 8;
			for (j = 0; j < step; j++)
				sets[set][i + j] = page + j;
		}
		for (i = point->pages - 1; point->order == RANDOM && whole() && i; i--) {
			j = random_below(&rnd, i + 1);
			swap(sets[set][i], sets[set][j]);
		}
	}
	free(taken);
}

static bool has_log(void)
{
	return mechanism >= SLOT_RING;
}

static void learn_sptes(void)
{
	unsigned int set, i, vcpu, n = nr_sets * point->pages / point->vcpus;
	struct least_ring *ring;

	if (point->pages % point->vcpus || (point->order == CLUSTERS && point->vcpus > 1))
		die("no way to tell who writes which page");
	for (vcpu = 0; vcpu < point->vcpus; vcpu++) {
		ring = &least[vcpu];
		ring->sptes = calloc(n + LEAST_AHEAD, sizeof(u64 *));
		ring->nr_sptes = 0;
		for (set = 0; set < nr_sets; set++)
			for (i = vcpu; i < point->pages; i += point->vcpus)
				ring->sptes[ring->nr_sptes++] = sim_sptep(sets[set][i]);
		memcpy(ring->sptes + n, ring->sptes, LEAST_AHEAD * sizeof(u64 *));
	}
}

static void create(void)
{
	struct sim_config *config = calloc(1, sizeof(*config));
	struct kvm_dirty_slot_log_fd arg = { 0 };
	unsigned long words = BITS_TO_LONGS(npages);
	struct kvm_memory_slot *memslot;
	unsigned int set, i;

	config->npages = npages;
	config->nr_vcpus = point->vcpus;
	config->entries = has_log() ? entries : 0;
	config->fast_fault = true;
	config->huge_tables = true;
	sim_create(config);
	memslot = sim_slot(0);
	switch (mechanism) {
	case LEAST:
		memslot->dirty_bitmap = shim_alloc(words * sizeof(long));
		for (i = 0; i < point->vcpus; i++)
			least[i].pages = shim_alloc(RING_ENTRIES * sizeof(u64));
		break;
	case BITMAP_GET:
	case BITMAP_CLEAR:
		memslot->dirty_bitmap = shim_alloc(2 * words * sizeof(long));
		user_map = shim_alloc(words * sizeof(long));
		break;
	case RING:
		sim_kvm->dirty_ring_size = RING_ENTRIES * sizeof(struct kvm_dirty_gfn);
		for (i = 0; i < point->vcpus; i++)
			kvm_dirty_ring_alloc(&sim_kvm->vcpus[i]->dirty_ring, i,
					     sim_kvm->dirty_ring_size);
		collect_ring(UINT_MAX);
		break;
	case SLOT_RING:
	case TREE:
	case TREE_SORTED:
		log_fd = kvm_vm_ioctl_get_dirty_slot_log_fd(sim_kvm, &arg);
		if (log_fd < 0)
			die("no log");
		break;
	default:
		break;
	}
	for (set = 0; set < nr_sets; set++)
		for (i = 0; i < point->pages; i++)
			sim_map_page(sets[set][i]);
	if (mechanism == LEAST)
		learn_sptes();
}

static void destroy(void)
{
	struct kvm_memory_slot *memslot = sim_slot(0);
	unsigned int i;

	if (mechanism == LEAST) {
		for (i = 0; i < point->vcpus; i++) {
			shim_free(least[i].pages);
			free(least[i].sptes);
		}
	}
	if (mechanism == BITMAP_GET || mechanism == BITMAP_CLEAR)
		shim_free(user_map);
	if (!has_log()) {
		shim_free(memslot->dirty_bitmap);
		memslot->dirty_bitmap = NULL;
	}
	if (mechanism == RING)
		for (i = 0; i < point->vcpus; i++)
			kvm_dirty_ring_free(&sim_kvm->vcpus[i]->dirty_ring);
	if (has_log())
		sim_close(log_fd);
	sim_destroy();
}

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

/*
 * Of the rounds with one clock the lower quartile: what else runs on the machine
 * empties caches, and never fills them.
 */
static double quartile(const double *ns, unsigned int n, unsigned int clock)
{
	double sorted[MAX_ROUNDS];
	unsigned int i, nr = 0;

	for (i = clock; i < n; i += 2) {
		if (ns[i] >= 0)
			sorted[nr++] = ns[i];
	}
	qsort(sorted, nr, sizeof(*ns), compare);
	return nr ? sorted[nr / 4] : INFINITY;
}

/* Without the first two rounds, which find cold caches and first touches. */
static double fastest(const double *ns, unsigned int n)
{
	double wall = quartile(ns + 2, n - 2, 0), cpu = quartile(ns + 2, n - 2, 1);

	return min(wall, cpu);
}

static void time_the_clocks(void)
{
	double ns[MAX_ROUNDS], t;
	unsigned int i;

	for (i = 0; i < MAX_ROUNDS; i++) {
		t = clock_of(i);
		ns[i] = clock_of(i) - t;
	}
	clock_ns[0] = quartile(ns, MAX_ROUNDS, 0);
	clock_ns[1] = quartile(ns, MAX_ROUNDS, 1);
}

struct result {
	double mark, harvest;
	double misses[2][NR_COUNTERS];
	unsigned int rounds;
};

/* Rounds until the time is up, at least twelve. */
static void run(bool together, struct result *r)
{
	u64 marked = 0, got = 0;
	double end;
	unsigned int round, i;

	forget(&producer);
	forget(&collector);
	first_round = done;
	for (i = 0; i < point->vcpus; i++) {
		/* Which entry has which page starts anew, as the sets do. */
		least[i].producer = 0;
		least[i].reset = 0;
		least[i].at = 0;
	}
	end = now_ns() + budget_ms * 1e6;
	for (round = 0; round < MAX_ROUNDS && (round < 12 || now_ns() < end); round++) {
		__atomic_store_n(&go, first_round + round + 1, __ATOMIC_RELEASE);
		if (!together || !round)
			wait_for(&done, first_round + round + 1);
		/* The floor's collector has to know whose turn it is. */
		measure(&collector, round, collect[mechanism],
			(round + nr_sets - (together && round)) % nr_sets);
		wait_for(&done, first_round + round + 1);
	}

	marked = producer.pages;
	got = collector.pages;
	if (mechanism != FLOOR) {
		got += collect[mechanism](0);
		if (got != marked) {
			fprintf(stderr, "race: %s: %llu pages marked, %llu collected\n",
				names[mechanism], marked, got);
			exit(1);
		}
	} else if (together) {
		/* What the last round wrote. */
		collect_floor((round - 1) % nr_sets);
	}

	r->mark = fastest(producer.ns, round);
	r->harvest = fastest(collector.ns, round);
	r->rounds = round;
	for (i = 0; i < NR_COUNTERS; i++) {
		r->misses[0][i] = (double)producer.misses[i] / producer.pages;
		r->misses[1][i] = (double)collector.misses[i] / collector.pages;
	}
}

static const char *order_name(void)
{
	return point->order == IN_ORDER ? "in-order" :
	       point->order == CLUSTERS ? "clusters" : "random";
}

static void print_json(FILE *f, const char *mode, const struct result *r)
{
	static const char * const sides[] = { "fault", "collect" };
	unsigned int i;

	fprintf(f, "{\"test\": \"native-race\", \"slot_mib\": %u, \"pages\": %u, ",
		point->mib, point->pages);
	fprintf(f, "\"order\": \"%s\", \"vcpus\": %u, \"mechanism\": \"%s\", ",
		order_name(), point->vcpus, names[mechanism]);
	fprintf(f, "\"mode\": \"%s\", \"runs\": %u, \"rounds\": %u, ", mode, nr_runs, r->rounds);
	fprintf(f, "\"fault_ns\": %.1f, \"collect_ns\": %.1f", r->mark, r->harvest);
	for (i = 0; i < ARRAY_SIZE(sides) && !no_counters; i++)
		fprintf(f, ", \"%s_llc_misses\": %.2f, \"%s_l1d_misses\": %.2f",
			sides[i], r->misses[i][LLC_MISSES], sides[i], r->misses[i][L1D_MISSES]);
	fprintf(f, "}\n");
	fflush(f);
}

/* The least of each. */
static void merge(struct result *r, const struct result *other)
{
	unsigned int side, i;

	r->mark = min(r->mark, other->mark);
	r->harvest = min(r->harvest, other->harvest);
	r->rounds += other->rounds;
	for (side = 0; side < 2; side++)
		for (i = 0; i < NR_COUNTERS; i++)
			r->misses[side][i] = min(r->misses[side][i], other->misses[side][i]);
}

/* What slot rings have to do with the best of the kernel's ways to log. */
static void print_verdict(const char *mode, const struct result *r)
{
	const struct result *ours = &r[SLOT_RING], *bound = &r[LEAST];
	double fault = INFINITY, harvest = INFINITY, sum = INFINITY;
	unsigned int i;

	for (i = BITMAP_GET; i <= RING; i++) {
		fault = min(fault, r[i].mark);
		harvest = min(harvest, r[i].harvest);
		sum = min(sum, r[i].mark + r[i].harvest);
	}
	printf("  ours / best peer, %-8s  fault %.2f, collect %.2f, sum %.2f\n", mode,
	       ours->mark / fault, ours->harvest / harvest, (ours->mark + ours->harvest) / sum);
	printf("  least / best peer, %-8s fault %.2f, collect %.2f, sum %.2f\n", mode,
	       bound->mark / fault, bound->harvest / harvest,
	       (bound->mark + bound->harvest) / sum);
}

static void print_row(const struct result *apart, const struct result *together)
{
	printf("  %-14s %8.1f %9.1f", names[mechanism], apart->mark, apart->harvest);
	if (together)
		printf("   %8.1f %9.1f", together->mark, together->harvest);
	else
		printf("   %8s %9s", "-", "-");
	if (!no_counters)
		printf("   %6.2f %6.2f", apart->misses[0][LLC_MISSES],
		       apart->misses[1][LLC_MISSES]);
	printf("\n");
}

static void run_point(FILE *json)
{
	struct result apart[NR_MECHANISMS], together[NR_MECHANISMS], r;
	unsigned int set, n;

	npages = (unsigned long)point->mib << (20 - PAGE_SHIFT);
	nr_sets = point->pages > 5000 ? 2 : MAX_SETS;
	choose_pages();
	for (n = 0; n < nr_runs; n++) {
		for (mechanism = 0; mechanism < NR_MECHANISMS; mechanism++) {
			if (!(wanted & BIT(mechanism)))
				continue;
			create();
			run(false, n ? &r : &apart[mechanism]);
			if (n)
				merge(&apart[mechanism], &r);
			if (can_together()) {
				run(true, n ? &r : &together[mechanism]);
				if (n)
					merge(&together[mechanism], &r);
			}
			destroy();
		}
	}

	if (point->mib < 1024)
		printf("\n%u MiB", point->mib);
	else
		printf("\n%u GiB", point->mib >> 10);
	printf(", %u pages %s, %u vCPU%s\n", point->pages,
	       point->order == IN_ORDER ? "in order" :
	       point->order == CLUSTERS ? "in clusters of 16" : "at random", point->vcpus,
	       point->vcpus > 1 ? "s" : "");
	for (mechanism = 0; mechanism < NR_MECHANISMS; mechanism++) {
		if (!(wanted & BIT(mechanism)))
			continue;
		print_row(&apart[mechanism], can_together() ? &together[mechanism] : NULL);
		if (!json)
			continue;
		print_json(json, "apart", &apart[mechanism]);
		if (can_together())
			print_json(json, "together", &together[mechanism]);
	}
	if (wanted == ALL_MECHANISMS) {
		print_verdict("apart", apart);
		if (can_together())
			print_verdict("together", together);
	}
	for (set = 0; set < nr_sets; set++)
		free(sets[set]);
	fflush(stdout);
}

static void usage(FILE *f)
{
	unsigned int i;

	fprintf(f, "race [-e ENTRIES] [-r N] [-t MS] [-m MIB] [-p N]... [-w NAME]... [-j FILE]\n\n"
		"  -e ENTRIES      of each slot ring, a power of two (default: KVM's)\n"
		"  -r, --runs N    the least of so many runs (default: %u)\n"
		"  -t MS           time for each measurement (default: %u)\n"
		"  -m MIB          no slots larger than this (default: all, up to 1 TiB)\n"
		"  -p, --point N   only the Nth point\n"
		"  -w, --way NAME  only this way to log:", nr_runs, budget_ms);
	for (i = 0; i < NR_MECHANISMS; i++)
		fprintf(f, " %s", names[i]);
	fprintf(f, "\n  -j FILE         write JSON lines there as well\n");
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "help", no_argument, NULL, 'h' },
		{ "runs", required_argument, NULL, 'r' },
		{ "point", required_argument, NULL, 'p' },
		{ "way", required_argument, NULL, 'w' },
		{ }
	};
	unsigned int max_mib = 1 << 20, i;
	pthread_t thread;
	u64 only = 0;
	FILE *json = NULL;
	int c;

	while ((c = getopt_long(argc, argv, "he:r:t:m:p:w:j:", options, NULL)) != -1) {
		switch (c) {
		case 'h':
			usage(stdout);
			return 0;
		case 'e':
			entries = number(optarg, KVM_DIRTY_SLOT_RING_MAX_ENTRIES);
			if (!is_power_of_2(entries)) {
				fprintf(stderr, "race: %u is not a power of two\n", entries);
				return 2;
			}
			break;
		case 't':
			budget_ms = number(optarg, 60000);
			break;
		case 'r':
			nr_runs = number(optarg, 1000);
			break;
		case 'p':
			only |= BIT_ULL(number(optarg, ARRAY_SIZE(points)) - 1);
			break;
		case 'w':
			for (i = 0; i < NR_MECHANISMS && strcmp(optarg, names[i]); i++)
				;
			if (i == NR_MECHANISMS) {
				usage(stderr);
				return 2;
			}
			wanted = (wanted == ALL_MECHANISMS ? 0 : wanted) | BIT(i);
			break;
		case 'm':
			max_mib = number(optarg, 1 << 20);
			break;
		case 'j':
			json = fopen(optarg, "w");
			if (!json) {
				fprintf(stderr, "race: cannot write %s: %s\n", optarg,
					strerror(errno));
				return 1;
			}
			break;
		default:
			usage(stderr);
			return 2;
		}
	}
	if (optind != argc) {
		usage(stderr);
		return 2;
	}

	if (choose_cpus(cpus) < 2) {
		printf("One CPU only: there is no contention to see, nor the misses it makes.\n");
		cpus[1] = cpus[0];
	}
	pin(cpus[1]);
	time_the_clocks();
	open_counters(&collector);
	if (pthread_create(&thread, NULL, producer_thread, NULL))
		die("cannot start a thread");
	printf("ns for each page, the least of %u runs, vCPUs on CPU %d, collector on CPU %d",
	       nr_runs, cpus[0], cpus[1]);
	if (entries != SIM_BY_SLOT)
		printf(", slot rings of %u entries", entries);
	printf("\n");
	if (no_counters)
		printf("Cache misses are not shown: this machine does not count them (%s).\n",
		       no_counters);
	printf("\n  %-14s %18s   %18s%s\n", "", "apart      ", "together    ",
	       no_counters ? "" : "     LLC misses");
	printf("  %-14s %8s %9s   %8s %9s%s\n", "", "fault", "collect", "fault", "collect",
	       no_counters ? "" : "    fault collect");

	runs = calloc(2 * MAX_PAGES, sizeof(*runs));
	list = calloc(2 * MAX_PAGES, sizeof(*list));
	for (i = 0; i < ARRAY_SIZE(points); i++) {
		point = &points[i];
		if (point->mib <= max_mib && (!only || only & BIT_ULL(i)))
			run_point(json);
	}
	if (json)
		fclose(json);
	free(runs);
	free(list);
	return 0;
}
