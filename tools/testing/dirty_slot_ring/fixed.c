// SPDX-License-Identifier: GPL-2.0-only
/*
 * What does not depend on chance: one thread, and all that happens happens in an
 * order that the test chooses.
 *
 * Some cases do B at the first place in A where a delay could be, then anew with the
 * second, and so on, until A has no more: as if another thread had done B there.
 */

#include "stress.h"
#include "log.h"

#define MAX_RUNS	(1U << 18)

static struct kvm_dirty_run *runs;
static struct kvm_dirty_vm_run *vm_runs;

/* How often each page was reported. */
static u8 *seen;
static unsigned long nr_seen;

static struct sim_config config;

static void begin(const struct sim_config *c)
{
	shim_calm = true;
	config = *c;
	runs = calloc(MAX_RUNS, sizeof(*runs));
	vm_runs = calloc(MAX_RUNS, sizeof(*vm_runs));
	nr_seen = c->nr_gfns ?: c->npages;
	seen = calloc(nr_seen, 1);
	sim_create(&config);
}

static void end(void)
{
	sim_destroy();
	free(runs);
	free(vm_runs);
	free(seen);
	shim_calm = false;
}

static int open_log(u32 slot)
{
	struct kvm_dirty_slot_log_fd arg = { .slot = slot };
	int fd = kvm_vm_ioctl_get_dirty_slot_log_fd(sim_kvm, &arg);

	if (fd < 0)
		fail("no file descriptor: %s", strerror(-fd));
	return fd;
}

/* A write to a page of the slot at the same gfn; vcpu -1: by nobody. */
static void mark(int vcpu, gfn_t gfn)
{
	int idx = srcu_read_lock(&sim_kvm->srcu);

	mark_page_dirty_in_slot(sim_kvm, sim_slot_of(sim_kvm, gfn),
				vcpu < 0 ? NULL : sim_kvm->vcpus[vcpu], gfn);
	srcu_read_unlock(&sim_kvm->srcu, idx);
}

struct result {
	u64 pages;
	u32 flags;
	int r;
};

static struct result result_of(int r, u64 pages, u32 flags)
{
	if (r)
		return (struct result){ .r = r };
	return (struct result){ .pages = pages, .flags = flags };
}

static void count_seen(u32 first, u32 npages)
{
	while (npages--)
		seen[first++]++;
}

static struct result harvest(int fd, u32 room)
{
	struct kvm_dirty_slot_runs args = { .runs = (uintptr_t)runs, .nr_runs = room };
	int r = sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_HARVEST, &args);
	u32 i;

	for (i = 0; !r && i < args.nr_runs; i++)
		count_seen(runs[i].offset, runs[i].npages);
	return result_of(r, args.nr_pages, args.flags);
}

/* In fixed.c a slot's number times this is where it begins. */
#define SLOT_PAGES	256

static struct result harvest_vm(int fd, u32 room)
{
	struct kvm_dirty_vm_harvest args = { .runs = (uintptr_t)vm_runs, .nr_runs = room };
	int r = sim_ioctl(fd, KVM_DIRTY_VM_LOG_HARVEST, &args);
	u32 i;

	for (i = 0; !r && i < args.nr_runs; i++)
		count_seen(vm_runs[i].slot * SLOT_PAGES + vm_runs[i].offset,
			   vm_runs[i].npages);
	return result_of(r, args.nr_pages, args.flags);
}

static void expect(const char *what, struct result res, int r, u64 pages)
{
	if (res.r != r || (!r && res.pages != pages))
		fail("%s: %s, %llu pages, not %s and %llu", what, strerror(-res.r), res.pages,
		     strerror(-r), pages);
}

/*
 * However fast pages are dirtied again, a harvest ends, and has no more than was there.
 */

static unsigned int hot_vcpus, copies;	/* to userspace, so far */

static void dirty_hot_pages(void)
{
	unsigned int i;

	for (i = 0; i < hot_vcpus; i++)
		mark(i, i * 65UL);
}

static void bounded(unsigned int vcpus, unsigned int pages)
{
	const struct sim_config c = {
		.npages = (pages + vcpus) * 65UL, .nr_vcpus = vcpus,
		.entries = roundup_pow_of_two(2 * pages / vcpus + 2),
	};
	struct result res;
	unsigned int i;
	int fd;

	begin(&c);
	fd = open_log(0);
	for (i = 0; i < pages; i++)
		mark(i % vcpus, (vcpus + i) * 65UL);
	hot_vcpus = vcpus;
	dirty_hot_pages();
	shim_before_copy = dirty_hot_pages;
	res = harvest(fd, MAX_RUNS);
	shim_before_copy = NULL;
	/* Of each ring, the page in flight may come once more. */
	if (res.r || res.pages < pages + vcpus || res.pages > pages + 2 * vcpus)
		fail("%u vCPUs: %u pages were logged, %llu reported (%s)", vcpus,
		     pages + vcpus, res.pages, strerror(-res.r));
	if (res.flags)
		fail("%u vCPUs: there is room, and yet MORE", vcpus);
	sim_close(fd);
	end();
}

static unsigned int column_words, column_pages;

static void dirty_columns(void)
{
	unsigned int i, j;

	for (i = 0; i < column_pages; i++)
		for (j = 0; j < column_words; j++)
			mark(0, j * BITS_PER_LONG + i);
}

/* Neighbours far apart in the ring, all of which are dirtied again each time. */
static void bounded_columns(void)
{
	const struct sim_config c = {
		.npages = 512 * BITS_PER_LONG, .nr_vcpus = 1, .entries = 32768,
	};
	const u64 logged = 512 * BITS_PER_LONG;
	struct result res;
	int fd;

	begin(&c);
	fd = open_log(0);
	column_words = 512;
	column_pages = BITS_PER_LONG;
	dirty_columns();
	shim_before_copy = dirty_columns;
	res = harvest(fd, MAX_RUNS);
	shim_before_copy = NULL;
	/* As many as there were entries, and what a call may take in advance. */
	if (res.r || res.flags || res.pages > 2 * logged)
		fail("%llu pages were logged, %llu reported (%s, flags %x)", logged, res.pages,
		     strerror(-res.r), res.flags);
	sim_close(fd);
	end();
}

/* More than a batch takes, and no multiple of it: the last one has room. */
#define STALE_WORDS	300

static void dirty_stale_words(void)
{
	unsigned int i;

	if (++copies == 2)
		for (i = 0; i < STALE_WORDS; i++)
			mark(1, (STALE_WORDS + i) * BITS_PER_LONG + 5);
}

/* Entries whose pages somebody discarded do not name their neighbours. */
static void bounded_stale(void)
{
	const struct sim_config c = {
		.npages = 1024 * BITS_PER_LONG, .nr_vcpus = 2, .entries = 4096,
	};
	struct kvm_dirty_run run = {
		.offset = STALE_WORDS * BITS_PER_LONG, .npages = STALE_WORDS * BITS_PER_LONG,
	};
	struct kvm_dirty_slot_runs args = { .runs = (uintptr_t)&run, .nr_runs = 1 };
	unsigned int i;
	int fd;

	begin(&c);
	fd = open_log(0);
	for (i = 0; i < 2 * STALE_WORDS; i++)
		mark(0, i * BITS_PER_LONG);
	if (sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_DISCARD, &args) || args.nr_pages != STALE_WORDS)
		fail("DISCARD");
	copies = 0;
	shim_before_copy = dirty_stale_words;
	expect("words with stale entries", harvest(fd, MAX_RUNS), 0, STALE_WORDS);
	shim_before_copy = NULL;
	expect("what came meanwhile", harvest(fd, MAX_RUNS), 0, STALE_WORDS);
	sim_close(fd);
	end();
}

static void count_copy(void)
{
	copies++;
}

/* Words of which each makes as many runs as a word can. */
static void bounded_combs(void)
{
	const struct sim_config c = {
		.npages = 64 * BITS_PER_LONG, .nr_vcpus = 1, .entries = 4096,
	};
	const unsigned int nr_runs = c.npages / 2;
	unsigned int i;
	int fd;

	begin(&c);
	fd = open_log(0);
	for (i = 0; i < nr_runs; i++)
		mark(0, 2 * i);
	copies = 0;
	shim_before_copy = count_copy;
	expect("every other page", harvest(fd, MAX_RUNS), 0, nr_runs);
	shim_before_copy = NULL;
	/* Each batch is copied, then what the caller gets to know. */
	if (copies < 2 * nr_runs / BATCH_RUNS)
		fail("%u runs were copied in %u pieces", nr_runs, copies);
	sim_close(fd);
	end();
}

static void run_bounded(unsigned int ms)
{
	bounded_stale();
	bounded_combs();
#ifdef __SANITIZE_THREAD__
	/* It is one thread: nothing to be seen, but that it runs at all. */
	bounded(64, 2000);
	bounded(257, 2000);
	return;
#endif
	bounded(64, 100000);
	bounded(200, 100000);
	bounded(256, 20000);
	bounded(257, 20000);
	bounded(1000, 20000);
	bounded_columns();
}

/*
 * With arrays that hold less than one ring has, all get their turn.
 */

#define FAIR_PAGES	64		/* of each vCPU */

static void fill_rings(unsigned int vcpus, bool overflow)
{
	unsigned int i, j;

	for (i = 0; i < vcpus; i++)
		for (j = 0; j < 8; j++)
			mark(i, i * FAIR_PAGES + 2 * j);
	for (j = 0; overflow && j < 8; j++)
		mark(-1, vcpus * FAIR_PAGES + j * BITS_PER_LONG);
}

static void fair(unsigned int vcpus, u32 room, bool overflow)
{
	const unsigned int parts = vcpus + overflow;
	const struct sim_config c = {
		.npages = (vcpus + 8) * FAIR_PAGES, .nr_vcpus = vcpus, .entries = 64,
	};
	unsigned int i, part, last[64] = { 0 }, last_word[8] = { 0 };
	struct kvm_dirty_slot_runs args;
	u32 j;
	int fd;

	begin(&c);
	fd = open_log(0);
	for (i = 1; i < 40 * parts; i++) {
		fill_rings(vcpus, overflow);
		args = (struct kvm_dirty_slot_runs){ .runs = (uintptr_t)runs, .nr_runs = room };
		if (sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_HARVEST, &args) || !args.nr_runs)
			fail("call %u got nothing", i);
		for (j = 0; j < args.nr_runs; j++) {
			part = min_t(u32, runs[j].offset / FAIR_PAGES, vcpus);
			last[part] = i;
			if (part == vcpus)
				last_word[runs[j].offset / FAIR_PAGES - vcpus] = i;
		}
		for (j = 0; overflow && j < 8; j++) {
			if (i - last_word[j] > 8 * (parts + 1))
				fail("%u vCPUs, room for %u: nothing of the overflow's word %u in %u "
				     "calls", vcpus, room, j, i - last_word[j]);
		}
		for (part = 0; part < parts; part++) {
			if (i - last[part] > parts + 1)
				fail("%u vCPUs, room for %u: nothing of %s %u in %u calls",
				     vcpus, room, part < vcpus ? "ring" : "the overflow",
				     part, i - last[part]);
		}
	}
	sim_close(fd);
	end();
}

/* The same with memslots in the place of vCPUs. */
static void fair_vm(unsigned int slots, u32 room)
{
	const struct sim_config c = {
		.nr_gfns = slots * SLOT_PAGES, .nr_vcpus = 1, .entries = 64,
	};
	struct kvm_dirty_vm_harvest args;
	unsigned int i, j, last[SIM_MAX_SLOTS] = { 0 };
	int fd;

	begin(&c);
	for (i = 0; i < slots; i++)
		sim_create_slot(i, i * SLOT_PAGES, SLOT_PAGES, NULL);
	fd = open_log(KVM_DIRTY_SLOT_ALL);
	for (i = 1; i < 10 * slots; i++) {
		for (j = 0; j < slots * 8; j++)
			mark(0, j / 8 * SLOT_PAGES + j % 8 * 2);
		args = (struct kvm_dirty_vm_harvest){
			.runs = (uintptr_t)vm_runs, .nr_runs = room,
		};
		if (sim_ioctl(fd, KVM_DIRTY_VM_LOG_HARVEST, &args) || !args.nr_runs)
			fail("call %u got nothing", i);
		for (j = 0; j < args.nr_runs; j++)
			last[vm_runs[j].slot] = i;
		for (j = 0; j < slots; j++) {
			if (i - last[j] > slots + 1)
				fail("%u memslots, room for %u: nothing of memslot %u in %u calls",
				     slots, room, j, i - last[j]);
		}
	}
	sim_close(fd);
	end();
}

static void run_fair(unsigned int ms)
{
	static const u32 rooms[] = { 1, 2, 3, 7, 8, 9, 20 };
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(rooms); i++) {
		fair(2, rooms[i], false);
		fair(3, rooms[i], true);
		fair(10, rooms[i], false);
		fair(10, rooms[i], true);
		fair_vm(2, rooms[i]);
		fair_vm(9, rooms[i]);
	}
}

/*
 * Step by step.
 */

static unsigned int step_inner;		/* B was done so often */
static unsigned int step_at;
static void (*step_b)(void);

static void at_step(void)
{
	bool own = shim_step_locks;

	shim_step_locks = false;
	step_inner++;
	step_b();
	shim_step_locks = own;
}

/* Do @a with @b at its @n'th step; false if it has not so many. */
static bool do_with(void (*a)(void), void (*b)(void), bool b_locks, unsigned int n)
{
	step_inner = 0;
	step_at = n;
	step_b = b;
	shim_at_step = at_step;
	shim_step_locks = b_locks;
	shim_steps = n;
	a();
	shim_steps = 0;
	shim_step_locks = false;
	return step_inner;
}

static int slot_fd, vm_fd;

#define STEP_PAGES	128
#define STEP_PAGE	70		/* vCPU 0 writes it, in A or in B */

static void a_mark(void)
{
	mark(0, STEP_PAGE);
}

static void a_mark_nobody(void)
{
	mark(-1, STEP_PAGE);
}

static struct kvm_dirty_slot_log *the_log(void)
{
	return sim_slot(0)->dirty_slot_log;
}

/* Whatever else is under way: what is in the log when a harvest begins is in it. */
static void harvest_vm_once(void)
{
	bool logged = test_bit(STEP_PAGE, the_log()->bitmap);
	u8 had = seen[STEP_PAGE];
	struct result res = harvest_vm(vm_fd, MAX_RUNS);

	if (res.r)
		fail("HARVEST of the VM: %s", strerror(-res.r));
	if (logged && seen[STEP_PAGE] == had)
		fail("HARVEST of the VM at step %u has not what was in the log", step_at);
}

static void harvest_slot_once(void)
{
	bool logged = test_bit(STEP_PAGE, the_log()->bitmap);
	u8 had = seen[STEP_PAGE];
	struct result res = harvest(slot_fd, MAX_RUNS);

	if (res.r)
		fail("HARVEST: %s", strerror(-res.r));
	if (logged && seen[STEP_PAGE] == had)
		fail("HARVEST at step %u has not what was in the log", step_at);
}

/* Another vCPU's mark, and it is over. */
static void other_mark_and_harvest(void)
{
	mark(1, STEP_PAGE);
	harvest_vm_once();
}

/* What is in no ring is taken, and comes again meanwhile. */
static void overflow_and_harvest(void)
{
	mark(-1, STEP_PAGE);
	harvest_vm_once();
}

static void harvest_vm_thrice(void)
{
	harvest_vm_once();
	harvest_vm_once();
	harvest_vm_once();
}

static void harvest_slot_thrice(void)
{
	harvest_slot_once();
	harvest_slot_once();
	harvest_slot_once();
}

static void harvest_both(void)
{
	harvest_slot_once();
	harvest_vm_once();
}

struct step {
	const char *name;
	void (*fn)(void);
	bool locks;
};

static const struct step step_marks[] = {
	{ "a vCPU's mark", a_mark, false }, { "a mark without a vCPU", a_mark_nobody, false },
};

static const struct step step_harvests[] = {
	{ "HARVEST of the VM", harvest_vm_once, true },
	{ "HARVEST", harvest_slot_once, true },
	{ "three of the VM", harvest_vm_thrice, true },
	{ "three HARVESTs", harvest_slot_thrice, true },
	{ "both HARVESTs", harvest_both, true },
	{ "another's mark, and HARVEST of the VM", other_mark_and_harvest, true },
	{ "a page in no ring, and HARVEST of the VM", overflow_and_harvest, true },
};

/* Harvests that found nothing, before A: how far rings and the log have left. */
#define STEP_QUIETER	6

/* Is that page in the log, which it is if it was not reported, and will it be found? */
static void check_step(const char *a, const char *b, unsigned int n, unsigned int quiet)
{
	struct kvm_dirty_slot_log *log = the_log();
	bool logged = test_bit(STEP_PAGE, log->bitmap);
	u64 had = seen[STEP_PAGE];
	struct result res = harvest_vm(vm_fd, MAX_RUNS);

	if (res.pages != logged || (u64)seen[STEP_PAGE] != had + logged || had + logged < 1)
		fail("%s, and %s at step %u (%u harvests before): page reported %u times before, "
		     "%s the log, %llu pages harvested",
		     a, b, n, quiet, (u32)had, logged ? "in" : "not in", res.pages);
	seen[STEP_PAGE] = 0;
}

static void step_pair(const struct step *a, const struct step *b)
{
	unsigned int n, quiet, i;
	bool more = true;

	for (n = 1; more; n++) {
		more = false;
		for (quiet = 0; quiet < STEP_QUIETER; quiet++) {
			bool did;

			mark(0, STEP_PAGE);
			for (i = 0; i <= quiet; i++)
				harvest_vm_once();
			seen[STEP_PAGE] = 0;
			did = do_with(a->fn, b->fn, b->locks, n);
			more |= did;
			/* A harvest that ended before its n'th step, and no mark. */
			if (!did && a->locks)
				continue;
			check_step(a->name, b->name, n, quiet);
			/* And once more: who left in the midst of it must come back. */
			harvest_vm_once();
			harvest_vm_once();
			mark(0, STEP_PAGE);
			check_step(a->name, b->name, n, quiet);
		}
	}
	if (n < 5)
		fail("%s has no more than %u steps", a->name, n);
}

/*
 * The tree alone: a thing gets something while its neighbour, which shares all that
 * is above the two of them, is looked at; and the other way round.
 */
#define STEP_THING	70

static struct kvm_dirty_summary step_tree;

static void thing_gets(void)
{
	kvm_dirty_summary_set(&step_tree, STEP_THING);
}

static void neighbour_is_taken(void)
{
	kvm_dirty_summary_clear(&step_tree, STEP_THING + 1);
}

static void step_summary(void (*a)(void), void (*b)(void), const char *what)
{
	unsigned int n;
	bool more = true;

	for (n = 1; more; n++) {
		kvm_dirty_summary_set(&step_tree, STEP_THING + 1);
		more = do_with(a, b, false, n);
		if (!more)
			b();
		if (kvm_dirty_summary_next(&step_tree, 0) != STEP_THING)
			fail("%s at step %u: the tree does not have it", what, n);
		kvm_dirty_summary_clear(&step_tree, STEP_THING);
	}
	if (n < 4)
		fail("%s has no more than %u steps", what, n);
}

/*
 * A mark without a vCPU stands still, with mark_lock, and another thread's harvest
 * has what that mark has put into the bitmap.
 */
static bool stand_still;

static void still(void)
{
	step_inner++;
	__atomic_store_n(&stand_still, true, __ATOMIC_RELEASE);
	usleep(20000);
}

static void *mark_and_stand_still(void *n)
{
	shim_calm = true;
	shim_step_spins = true;
	shim_at_step = still;
	shim_steps = (uintptr_t)n;
	mark(-1, STEP_PAGE);
	shim_steps = 0;
	/* A mark that has no such step, and is over. */
	__atomic_store_n(&stand_still, true, __ATOMIC_RELEASE);
	return NULL;
}

static void step_still(void (*harvest)(void))
{
	unsigned int n;
	pthread_t t;

	step_inner = 1;
	for (n = 1; step_inner; n++) {
		step_inner = 0;
		step_at = n;
		__atomic_store_n(&stand_still, false, __ATOMIC_RELEASE);
		if (pthread_create(&t, NULL, mark_and_stand_still, (void *)(uintptr_t)n))
			fail("no thread");
		while (!__atomic_load_n(&stand_still, __ATOMIC_ACQUIRE))
			usleep(100);
		harvest();
		pthread_join(t, NULL);
		harvest_vm_once();
		seen[STEP_PAGE] = 0;
	}
	if (n < 4)
		fail("a mark without a vCPU has no more than %u steps", n);
}

/*
 * A ring gets more than it has room for, and more again after it was harvested.
 */
#define FULL_ENTRIES	16

static void more_than_a_ring(void)
{
	static const struct sim_config c = {
		.npages = 3 * FULL_ENTRIES * BITS_PER_LONG, .nr_vcpus = 1,
		.entries = FULL_ENTRIES,
	};
	struct kvm_dirty_slot_ring *ring;
	unsigned int i, n;
	int fd;

	begin(&c);
	fd = open_log(0);
	ring = log_nth_ring(the_log(), 0);
	/* One less than it has room for, as many, and so on. */
	for (n = FULL_ENTRIES - 1; n <= 3 * FULL_ENTRIES; n++) {
		for (i = 0; i < n; i++) {
			mark(0, i * BITS_PER_LONG);
			if (ring_used(ring) > FULL_ENTRIES)
				fail("a ring of %u has %llu entries", FULL_ENTRIES,
				     ring_used(ring));
		}
		expect("a ring, and what it has no room for", harvest(fd, MAX_RUNS), 0, n);
		if (ring_used(ring) || ring->user->consumer != ring->kern->reset)
			fail("a harvest of %u pages left reset at %llu, consumer at %llu of %llu",
			     n, ring->kern->reset, ring->user->consumer, ring->kern->producer);
	}
	sim_close(fd);
	end();
}

static void a_page_fault(void)
{
	int idx = srcu_read_lock(&sim_kvm->srcu);

	sim_fault(sim_kvm->vcpus[0], STEP_PAGE);
	srcu_read_unlock(&sim_kvm->srcu, idx);
}

/* A page fault, and a harvest at each of its steps, under mmu_lock for read as well. */
static void step_fault(void)
{
	static const struct sim_config c = {
		.npages = STEP_PAGES, .nr_vcpus = 2, .entries = 64,
	};
	unsigned int n;
	bool more = true;

	for (n = 1; more; n++) {
		begin(&c);
		slot_fd = open_log(0);
		/* So that it has no lock to take for its ring. */
		mark(0, 0);
		shim_step_spins = true;
		more = do_with(a_page_fault, harvest_slot_once, true, n);
		shim_step_spins = false;
		if (!sim_unlogged(STEP_PAGE) && !more)
			fail("a page fault did not make its page writable");
		if (sim_unlogged(STEP_PAGE) && !test_bit(STEP_PAGE, the_log()->bitmap))
			fail("a page fault, and HARVEST at step %u: a page is writable and not in the log",
			     n);
		sim_close(slot_fd);
		end();
	}
	if (n < 6)
		fail("a page fault has no more than %u steps", n);
}

/*
 * The same fault, a harvest at one of its steps, and at a later one another vCPU writes to
 * the page through the SPTE, which nobody hears of, and its VMM harvests with SYNC.
 */
static unsigned int sync_after, nr_synced, nr_waits;

static void write_and_sync(void)
{
	bool own = shim_step_locks, wrote = sim_unlogged(STEP_PAGE);
	u8 had = seen[STEP_PAGE];
	int r;

	shim_step_locks = false;
	nr_synced++;
	/* A signal, in place of the wait for the fault that stands still here. */
	shim_inject = 256;
	r = kvm_dirty_slot_sync_hw(sim_kvm, true);
	shim_inject = 0;
	if (r)
		nr_waits++;
	else
		harvest_slot_once();
	if (!r && wrote && seen[STEP_PAGE] == had)
		fail("HARVEST at step %u of a page fault, another with SYNC %u later: it has not what was written before",
		     step_at, sync_after);
	shim_step_locks = own;
}

static void harvest_then_sync(void)
{
	harvest_slot_once();
	shim_at_step = write_and_sync;
	shim_steps = sync_after;
}

static void step_sync(bool fast_fault)
{
	const struct sim_config c = {
		.npages = STEP_PAGES, .nr_vcpus = 2, .entries = 64, .fast_fault = fast_fault,
	};
	unsigned int n;
	bool more = true;

	nr_waits = 0;
	for (n = 1; more; n++) {
		nr_synced = 1;
		for (sync_after = 1; nr_synced; sync_after++) {
			nr_synced = 0;
			begin(&c);
			slot_fd = open_log(0);
			mark(0, 0);
			if (fast_fault)
				sim_map_page(STEP_PAGE);
			shim_step_spins = true;
			more = do_with(a_page_fault, harvest_then_sync, true, n);
			shim_step_spins = false;
			sim_close(slot_fd);
			end();
		}
	}
	if (!nr_waits)
		fail("SYNC never waits for a page fault");
}

/*
 * A huge page that is still writable, as all of its pages are in the log, is split at each
 * step of their harvest but those under mmu_lock for write: none is left writable.
 */
static void b_split(void)
{
	if (pthread_rwlock_tryrdlock(&sim_kvm->mmu_lock.l))
		return;
	sim_map_page(STEP_PAGE);
	pthread_rwlock_unlock(&sim_kvm->mmu_lock.l);
}

static void step_split(void)
{
	static const struct sim_config c = {
		.npages = 512, .nr_vcpus = 1, .entries = 64, .huge = true, .init_set = true,
	};
	bool more = true;
	unsigned int n;
	gfn_t gfn;

	for (n = 1; more; n++) {
		begin(&c);
		slot_fd = open_log(0);
		shim_step_spins = true;
		more = do_with(harvest_slot_once, b_split, false, n);
		shim_step_spins = false;
		for (gfn = 0; gfn < c.npages; gfn++) {
			if (sim_unlogged(gfn) && !test_bit(gfn, the_log()->bitmap))
				fail("HARVEST, and a split of a huge page at step %u: page %llu is writable and not in the log",
				     n, gfn);
		}
		sim_close(slot_fd);
		end();
	}
}

static void run_steps(unsigned int ms)
{
	static const struct sim_config c = {
		.npages = STEP_PAGES, .nr_vcpus = 2, .entries = 64,
	};
	unsigned int i, j;

	begin(&c);
	slot_fd = open_log(0);
	vm_fd = open_log(KVM_DIRTY_SLOT_ALL);
	for (i = 0; i < ARRAY_SIZE(step_marks); i++) {
		for (j = 0; j < ARRAY_SIZE(step_harvests); j++) {
			step_pair(&step_marks[i], &step_harvests[j]);
			if (step_harvests[j].fn != harvest_slot_thrice)
				step_pair(&step_harvests[j], &step_marks[i]);
		}
	}
	step_still(harvest_vm_once);
	step_still(harvest_slot_once);
	if (kvm_dirty_summary_init(&step_tree, 64 * 64 * 2))
		fail("no memory");
	step_summary(neighbour_is_taken, thing_gets, "what comes while its neighbour is taken");
	step_summary(thing_gets, neighbour_is_taken, "what comes, with its neighbour taken");
	kvm_dirty_summary_free(&step_tree);
	sim_close(vm_fd);
	sim_close(slot_fd);
	end();
	more_than_a_ring();
	step_fault();
	step_sync(false);
	step_sync(true);
	step_split();
}

/*
 * What has nothing is not looked at, and what is not any more costs nothing.
 */

static void check_quiet(void)
{
	struct kvm_dirty_slot_log *log = the_log();

	if (!kvm_dirty_summary_empty(&log->busy) || !kvm_dirty_summary_empty(&log->overflow))
		fail("rings have nothing, and are looked at");
	if (log->active || !kvm_dirty_summary_empty(&log->vm->index))
		fail("a log has nothing, and is looked at");
}

static void run_leave(unsigned int ms)
{
	static const struct sim_config c = {
		.npages = SLOT_PAGES, .nr_gfns = SIM_MAX_SLOTS * SLOT_PAGES, .nr_vcpus = 100,
		.entries = 64,
	};
	int idx, i, vm, fd;
	long before;

	begin(&c);
	vm = open_log(KVM_DIRTY_SLOT_ALL);
	for (i = 0; i < 100; i++)
		mark(i, i);
	expect("all rings", harvest_vm(vm, MAX_RUNS), 0, 100);

	/* One step for each call, and none while somebody may be in a mark. */
	idx = srcu_read_lock(&sim_kvm->srcu);
	for (i = 0; i < 4; i++)
		expect("nothing", harvest_vm(vm, MAX_RUNS), 0, 0);
	if (kvm_dirty_summary_empty(&the_log()->busy))
		fail("rings left while a vCPU may have been in the midst of a mark");
	srcu_read_unlock(&sim_kvm->srcu, idx);
	for (i = 0; i < 2; i++)
		expect("nothing", harvest_vm(vm, MAX_RUNS), 0, 0);
	check_quiet();
	mark(7, 7);
	expect("one that came back", harvest_vm(vm, MAX_RUNS), 0, 1);

	/* A slot's own file has what was left, and the table forgets the log. */
	before = shim_allocated;
	for (i = 1; i < 100; i++) {
		sim_create_slot(1, SLOT_PAGES, SLOT_PAGES, NULL);
		fd = open_log(1);
		if (i % 2)
			mark(i % 4 / 2 ? -1 : 3, SLOT_PAGES + 3);
		sim_delete_slot(1);
		if (i % 3)
			expect("what was left", harvest(fd, MAX_RUNS), i % 2 ? 0 : -ENODEV, 1);
		if (i % 3 && i % 2)
			expect("nothing left", harvest(fd, MAX_RUNS), -ENODEV, 0);
		sim_close(fd);
		expect("what was left, once", harvest_vm(vm, MAX_RUNS), 0,
		       i % 3 ? 0 : i % 2);
		expect("no more", harvest_vm(vm, MAX_RUNS), 0, 0);
		if (shim_allocated > before + 2)
			fail("%ld allocations are left of memslots that were deleted",
			     shim_allocated - before);
	}
	sim_close(vm);
	end();
}

/*
 * -ENODEV is final, for one log and for the VM.
 */

static bool nodev;

/* Marks, and is still at it when the memslot is gone. */
static void a_mark_ioctl(void)
{
	struct kvm_dirty_run run = { .offset = STEP_PAGE, .npages = 1 };
	struct kvm_dirty_slot_runs args = { .runs = (uintptr_t)&run, .nr_runs = 1 };
	int r = sim_ioctl(slot_fd, KVM_DIRTY_SLOT_LOG_MARK, &args);

	if (r && r != -ENODEV)
		fail("MARK: %s", strerror(-r));
}

/* Takes what there is, and cannot store it. */
static void a_fault(void)
{
	struct kvm_dirty_slot_runs args = { .runs = (uintptr_t)runs, .nr_runs = 10 };

	sim_ioctl(slot_fd, KVM_DIRTY_SLOT_LOG_HARVEST, &args);
}

static void second_copy_fails(void)
{
	shim_inject = ++copies == 2 ? 256 : 0;
}

static void b_delete(void)
{
	unsigned int inject = shim_inject;
	struct result res = { 0 };
	int i;

	/* Who deletes it waits for the reader, and is too late. */
	if (shim_reading) {
		shim_steps = 1;
		step_inner--;
		return;
	}
	shim_before_copy = NULL;
	shim_inject = 0;
	sim_delete_slot(0);
	for (i = 0; i < 4 && !res.r; i++)
		res = harvest(slot_fd, MAX_RUNS);
	nodev = res.r == -ENODEV;
	for (i = 0; i < 4; i++)
		harvest_vm(vm_fd, MAX_RUNS);
	shim_before_copy = copies ? second_copy_fails : NULL;
	shim_inject = inject;
}

static void nodev_is_final(void (*a)(void), bool fault)
{
	static const struct sim_config c = {
		.npages = STEP_PAGES, .nr_vcpus = 2, .entries = 64,
	};
	unsigned int n;
	struct result res;
	bool more = true;

	for (n = 1; more; n++) {
		begin(&c);
		slot_fd = open_log(0);
		vm_fd = open_log(KVM_DIRTY_SLOT_ALL);
		nodev = false;
		copies = 0;
		if (fault) {
			mark(1, STEP_PAGE);
			/* So that the other one is not the last that the vCPU marked. */
			mark(1, 0);
			shim_before_copy = second_copy_fails;
		}
		more = do_with(a, b_delete, true, n);
		shim_before_copy = NULL;
		shim_inject = 0;
		if (!more)
			sim_delete_slot(0);
		/* Once for whoever asks first. */
		if (n % 2) {
			harvest_vm(vm_fd, MAX_RUNS);
			harvest_vm(vm_fd, MAX_RUNS);
		}
		res = harvest(slot_fd, MAX_RUNS);
		if (n % 2 && res.r != -ENODEV)
			fail("step %u: there are %llu pages, which the VM's file did not have", n,
			     res.pages);
		if (nodev && res.r != -ENODEV)
			fail("step %u: there are %llu pages after -ENODEV", n, res.pages);
		expect("the end", harvest(slot_fd, MAX_RUNS), -ENODEV, 0);
		if (fault && seen[STEP_PAGE] != 1)
			fail("step %u: the page was reported %u times", n, seen[STEP_PAGE]);
		sim_close(slot_fd);
		sim_close(vm_fd);
		end();
	}
}

static void b_dead_still(void)
{
	expect("HARVEST while somebody tries to MARK", harvest(slot_fd, MAX_RUNS), -ENODEV, 0);
}

/* Who was told so is not told otherwise when somebody tries to MARK. */
static void nodev_is_kept(void)
{
	static const struct sim_config c = {
		.npages = STEP_PAGES, .nr_vcpus = 2, .entries = 64,
	};
	unsigned int n = 1;

	begin(&c);
	slot_fd = open_log(0);
	sim_delete_slot(0);
	expect("the end", harvest(slot_fd, MAX_RUNS), -ENODEV, 0);
	while (do_with(a_mark_ioctl, b_dead_still, true, n))
		n++;
	sim_close(slot_fd);
	end();
}

static void run_nodev(unsigned int ms)
{
	static const struct sim_config c = {
		.npages = STEP_PAGES, .nr_vcpus = 2, .entries = 64,
	};
	struct result res;
	int fd, vm;

	nodev_is_final(a_mark_ioctl, false);
	nodev_is_final(a_fault, true);
	nodev_is_kept();

	/* The VM goes, and what was left is there for those who ask. */
	begin(&c);
	fd = open_log(0);
	vm = open_log(KVM_DIRTY_SLOT_ALL);
	mark(1, 1);
	sim_destroy();
	if (sim_poll(vm, 0) != (EPOLLHUP | EPOLLIN | EPOLLRDNORM))
		fail("poll() of a VM that is gone");
	expect("what was left", harvest_vm(vm, MAX_RUNS), 0, 1);
	expect("the VM's end", harvest_vm(vm, MAX_RUNS), -ENODEV, 0);
	expect("the VM's end again", harvest_vm(vm, MAX_RUNS), -ENODEV, 0);
	expect("the log's end", harvest(fd, MAX_RUNS), -ENODEV, 0);
	res = (struct result){ .r = sim_poll(vm, 0) };
	if (res.r != EPOLLHUP)
		fail("poll() of a VM that is gone, with nothing left");
	sim_close(fd);
	sim_close(vm);
	free(runs);
	free(vm_runs);
	free(seen);
	shim_calm = false;
}

/*
 * Who waits for an event and not for a state must get one for each state.
 */

static unsigned long edges[2];

/* A reader: all there is, and from here on it waits for what is said afterwards. */
static void read_slot(void)
{
	struct result res;

	do {
		edges[0] = sim_edge(slot_fd);
		res = harvest(slot_fd, 3);
		if (res.r)
			fail("HARVEST: %s", strerror(-res.r));
	} while (res.flags & KVM_DIRTY_HARVEST_MORE);
}

static void read_vm(void)
{
	struct result res;

	do {
		edges[1] = sim_edge(vm_fd);
		res = harvest_vm(vm_fd, 3);
		if (res.r)
			fail("HARVEST of the VM: %s", strerror(-res.r));
	} while (res.flags & KVM_DIRTY_HARVEST_MORE);
}

static unsigned int edge_page;

static void one_more(void)
{
	mark(0, edge_page++ % STEP_PAGES);
}

static void half_a_ring(void)
{
	unsigned int i;

	for (i = 0; i < 8; i++)
		mark(0, edge_page++ % STEP_PAGES);
}

static void one_elsewhere(void)
{
	mark(-1, edge_page++ % STEP_PAGES);
}

static void two_elsewhere(void)
{
	one_elsewhere();
	edge_page += BITS_PER_LONG;
	one_elsewhere();
}

static void edge_pair(const struct step *a, const struct step *b, bool vm, unsigned int before)
{
	int fd = vm ? vm_fd : slot_fd;
	unsigned int n, i;
	bool more = true;

	for (n = 1; more; n++) {
		read_slot();
		read_vm();
		read_slot();
		edge_page = n;
		for (i = 0; i < before; i++)
			one_more();
		more = do_with(a->fn, b->fn, b->locks, n);
		if (sim_poll(fd, 0) && sim_edge(fd) == edges[vm])
			fail("%s, and %s at step %u, %u entries before: the %s has something, "
			     "which nobody said", a->name, b->name, n, before,
			     vm ? "VM" : "log");
	}
}

static void run_edge(unsigned int ms)
{
	static const struct sim_config c = {
		.npages = STEP_PAGES, .nr_gfns = 2 * SLOT_PAGES, .nr_vcpus = 2, .entries = 16,
	};
	static const struct step readers[] = {
		{ "HARVEST", read_slot, true }, { "HARVEST of the VM", read_vm, true },
	};
	static const struct step writers[] = {
		{ "one more", one_more, false }, { "half a ring", half_a_ring, false },
		{ "one elsewhere", one_elsewhere, false },
		{ "two elsewhere", two_elsewhere, false },
	};
	static struct sim_config init_set;
	unsigned int i, j, before;

	begin(&c);
	slot_fd = open_log(0);
	vm_fd = open_log(KVM_DIRTY_SLOT_ALL);
	sim_edge(slot_fd);
	sim_edge(vm_fd);
	for (i = 0; i < ARRAY_SIZE(readers); i++) {
		for (j = 0; j < ARRAY_SIZE(writers); j++) {
			for (before = 0; before < 12; before++) {
				edge_pair(&readers[i], &writers[j], i, before);
				edge_pair(&writers[j], &readers[i], i, before);
			}
		}
	}
	sim_close(slot_fd);
	sim_close(vm_fd);
	end();

	/* A memslot comes that has something from the start. */
	init_set = c;
	init_set.npages = 0;
	init_set.init_set = true;
	begin(&init_set);
	vm_fd = open_log(KVM_DIRTY_SLOT_ALL);
	sim_edge(vm_fd);
	read_vm();
	sim_create_slot(0, 0, STEP_PAGES, NULL);
	if (sim_edge(vm_fd) == edges[1])
		fail("a memslot came that has something, which nobody said");
	read_vm();
	sim_delete_slot(0);
	if (sim_edge(vm_fd) == edges[1])
		fail("a memslot went, which nobody said");
	sim_close(vm_fd);
	end();
}

/*
 * Memslots come and go, and the VM's file says so.
 */

static void b_harvest_live(void)
{
	struct result res = harvest_vm(vm_fd, 2);

	if (res.r)
		fail("HARVEST while a memslot comes: %s", strerror(-res.r));
}

static void a_create(void)
{
	sim_create_slot(0, 0, STEP_PAGES, NULL);
}

static void a_change(void)
{
	sim_change_slot(0);
}

static void expect_layout(const char *what, int r, bool layout)
{
	struct result res = harvest_vm(vm_fd, MAX_RUNS);

	if (res.r != r || (!r && !(res.flags & KVM_DIRTY_HARVEST_LAYOUT) == layout))
		fail("%s: %s, flags %x", what, strerror(-res.r), res.flags);
}

static void run_layout(unsigned int ms)
{
	static const struct sim_config c = {
		.nr_gfns = SLOT_PAGES, .nr_vcpus = 1, .entries = 64, .init_set = true,
	};
	unsigned int n, i;
	bool more;

	/* Pages that start dirty, and a harvest at each step of the memslot's coming. */
	for (n = 1, more = true; more; n++) {
		begin(&c);
		vm_fd = open_log(KVM_DIRTY_SLOT_ALL);
		more = do_with(a_create, b_harvest_live, false, n);
		while (harvest_vm(vm_fd, 3).flags & KVM_DIRTY_HARVEST_MORE)
			;
		for (i = 0; i < STEP_PAGES; i++)
			if (seen[i] != 1)
				fail("step %u: page %u of a new memslot was reported %u times", n, i,
				     seen[i]);
		for (i = 1; i < 5; i++) {
			mark(0, 7);
			do_with(a_change, b_harvest_live, false, n + i);
			harvest_vm(vm_fd, MAX_RUNS);
		}
		if (seen[7] != 5)
			fail("a page of a memslot that changes was reported %u times", seen[7]);
		sim_close(vm_fd);
		end();
	}

	begin(&c);
	vm_fd = open_log(KVM_DIRTY_SLOT_ALL);
	expect_layout("nothing new", 0, false);
	sim_create_slot(0, 0, STEP_PAGES, NULL);
	/* A call that fails has told nothing. */
	shim_inject = 256;
	expect_layout("a fault", -EFAULT, true);
	shim_inject = 0;
	expect_layout("a new one", 0, true);
	expect_layout("nothing new", 0, false);
	sim_change_slot(0);
	expect_layout("it changed", 0, false);
	sim_delete_slot(0);
	/* Nor has one that fails at the very end. */
	copies = 0;
	shim_before_copy = second_copy_fails;
	expect_layout("a fault at the end", -EFAULT, true);
	shim_before_copy = NULL;
	shim_inject = 0;
	expect_layout("it went", 0, true);
	expect_layout("nothing new", 0, false);
	sim_close(vm_fd);
	end();
}

/*
 * Nobody is held up by who waits for userspace, or has much to say.
 */

static bool nested;
static unsigned int until_nested;

static void harvest_meanwhile(void)
{
	/* Not at the first copy, when nothing has been taken. */
	if (nested || (until_nested && --until_nested))
		return;
	nested = true;
	mark(0, 1);
	expect("HARVEST meanwhile", harvest(slot_fd, MAX_RUNS), 0, 1);
	mark(-1, 1);
	expect("HARVEST of the VM meanwhile", harvest_vm(vm_fd, MAX_RUNS), 0, 1);
	nested = false;
}

static void a_discard(void)
{
	static struct kvm_dirty_run all[64];
	struct kvm_dirty_slot_runs args = { .runs = (uintptr_t)all, .nr_runs = ARRAY_SIZE(all) };
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(all); i++)
		all[i] = (struct kvm_dirty_run){ .offset = 2, .npages = STEP_PAGES - 2 };
	if (sim_ioctl(slot_fd, KVM_DIRTY_SLOT_LOG_DISCARD, &args))
		fail("DISCARD");
}

/* Of stale entries there are many, and a signal: a call ends after some of them, and goes on. */
#define STALE_PAGES	(16 * CALL_STEP)

static void expect_signal(const char *what, int r, u64 *before)
{
	u64 reset = log_nth_ring(the_log(), 0)->kern->reset;

	if (r != -EINTR || reset == *before || reset - *before > CALL_STEP)
		fail("%s of stale entries, and a signal: %s after %llu", what, strerror(-r),
		     reset - *before);
	*before = reset;
}

static void stop_by_signal(void)
{
	static const struct sim_config c = {
		.npages = STALE_PAGES, .nr_vcpus = 1, .entries = STALE_PAGES,
	};
	struct kvm_dirty_run all = { .npages = STALE_PAGES };
	struct kvm_dirty_slot_runs args = { .runs = (uintptr_t)&all, .nr_runs = 1 };
	struct kvm_dirty_slot_reset reset = { 0 };
	struct kvm_dirty_slot_ring *ring;
	unsigned int i;
	u64 at = 0;

	begin(&c);
	slot_fd = open_log(0);
	vm_fd = open_log(KVM_DIRTY_SLOT_ALL);
	ring = log_nth_ring(the_log(), 0);
	for (i = 0; i < STALE_PAGES; i++)
		mark(0, i);
	if (sim_ioctl(slot_fd, KVM_DIRTY_SLOT_LOG_DISCARD, &args))
		fail("DISCARD");
	shim_signal = true;
	expect_signal("HARVEST", harvest(slot_fd, MAX_RUNS).r, &at);
	expect_signal("HARVEST of the VM", harvest_vm(vm_fd, MAX_RUNS).r, &at);
	ring->user->consumer = ring->kern->producer;
	expect_signal("RESET", sim_ioctl(slot_fd, KVM_DIRTY_SLOT_LOG_RESET, &reset), &at);
	shim_signal = false;
	expect("after the signal", harvest(slot_fd, MAX_RUNS), 0, 0);
	if (ring->kern->reset != ring->kern->producer)
		fail("entries are left after the signal");
	sim_close(slot_fd);
	sim_close(vm_fd);
	end();
}

static void run_waits(unsigned int ms)
{
	static const struct sim_config c = {
		.npages = STEP_PAGES, .nr_vcpus = 2, .entries = 64,
	};
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_slot_reset reset;
	unsigned int n, i;

	stop_by_signal();
	begin(&c);
	slot_fd = open_log(0);
	vm_fd = open_log(KVM_DIRTY_SLOT_ALL);

	/* While another one's pages are copied out. */
	for (i = 0; i < STEP_PAGES / 2; i++)
		mark(1, 2 * i);
	shim_before_copy = harvest_meanwhile;
	until_nested = 2;
	harvest(slot_fd, MAX_RUNS);
	for (i = 0; i < STEP_PAGES / 2; i++)
		mark(1, 2 * i);
	until_nested = 2;
	harvest_vm(vm_fd, MAX_RUNS);
	shim_before_copy = NULL;

	for (n = 1; do_with(a_discard, harvest_meanwhile, true, n) && n < 2000; n++)
		;
	if (n < 8)
		fail("DISCARD has %u steps only", n);

	sim_kvm->vm_dead = true;
	mark(0, 1);
	args = (struct kvm_dirty_slot_runs){ .runs = (uintptr_t)runs, .nr_runs = 1 };
	expect("HARVEST of a dead VM", harvest(slot_fd, 1), -EIO, 0);
	expect("HARVEST of all of a dead VM", harvest_vm(vm_fd, 1), -EIO, 0);
	if (sim_ioctl(slot_fd, KVM_DIRTY_SLOT_LOG_MARK, &args) != -EIO ||
	    sim_ioctl(slot_fd, KVM_DIRTY_SLOT_LOG_DISCARD, &args) != -EIO)
		fail("MARK or DISCARD in a dead VM");
	memset(&reset, 0, sizeof(reset));
	if (sim_ioctl(slot_fd, KVM_DIRTY_SLOT_LOG_RESET, &reset) != -EIO)
		fail("RESET in a dead VM");
	sim_close(slot_fd);
	sim_close(vm_fd);
	end();
}

/*
 * The mapping, with more rings than one page of consumers holds.
 */

static void run_area(unsigned int ms)
{
	static const struct sim_config c = {
		.npages = 1024, .nr_vcpus = 300, .entries = 4096,
	};
	struct kvm_dirty_slot_reset reset = { 0 };
	struct kvm_dirty_slot_ring_user *user;
	struct kvm_dirty_slot_ring_kern *kern;
	struct kvm_dirty_slot_log_info info;
	unsigned long at;
	unsigned int i;

	begin(&c);
	slot_fd = open_log(0);
	if (sim_ioctl(slot_fd, KVM_DIRTY_SLOT_LOG_INFO, &info) || info.nr_rings != 300)
		fail("INFO");
	if (info.entries != 1024)
		fail("a slot of 1024 pages has rings of %u entries", info.entries);
	for (i = 0; i < 300; i++)
		mark(i, i);
	for (i = 0; i < 300; i++) {
		at = i * KVM_DIRTY_SLOT_CONSUMER_STRIDE;
		user = sim_mmap(slot_fd, at / PAGE_SIZE, true) + at % PAGE_SIZE;
		kern = sim_mmap(slot_fd, (info.rings_offset + i * info.stride) / PAGE_SIZE, false);
		if (user->consumer || kern->producer != 1 || kern->reset)
			fail("ring %u", i);
		if (i % 2)
			user->consumer = 1;
		if (i % 3 == 2)
			user->consumer = -1ULL;
	}
	/* The file of one log is strict, and changes nothing. */
	expect("bad consumers", harvest(slot_fd, MAX_RUNS), -EINVAL, 0);
	if (sim_ioctl(slot_fd, KVM_DIRTY_SLOT_LOG_RESET, &reset) != -EINVAL)
		fail("RESET of bad consumers");
	vm_fd = open_log(KVM_DIRTY_SLOT_ALL);
	/* Those who had collected theirs are a third: 1, 3, 7, 9, and so on. */
	expect("as if they had not collected", harvest_vm(vm_fd, MAX_RUNS), 0, 200);
	for (i = 0; i < 300; i++) {
		at = i * KVM_DIRTY_SLOT_CONSUMER_STRIDE;
		user = sim_mmap(slot_fd, at / PAGE_SIZE, true) + at % PAGE_SIZE;
		if (user->consumer != 1)
			fail("consumer %u is at %llu", i, user->consumer);
	}
	if (sim_mmap(slot_fd, 300 / CONSUMERS_PER_PAGE + 1, true))
		fail("there are consumers of rings that are not");
	sim_close(slot_fd);
	sim_close(vm_fd);
	end();
}

const struct stress_case fixed_cases[] = {
	{ "bounded", "hot pages are dirtied again between any two batches", run_bounded },
	{ "fair", "arrays smaller than what one ring has", run_fair },
	{ "steps", "a harvest at each step of a mark, and the other way round", run_steps },
	{ "leave", "what has nothing is not looked at; deleted memslots leave nothing", run_leave },
	{ "nodev", "ENODEV is final; the VM goes", run_nodev },
	{ "edge", "readers that wait for events and not for states", run_edge },
	{ "layout", "memslots come, change and go at each step of a harvest", run_layout },
	{ "waits", "nobody waits for userspace; signals; a VM that is dead", run_waits },
	{ "area", "the consumers' area", run_area },
	{ }
};
