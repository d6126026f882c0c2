// SPDX-License-Identifier: GPL-2.0-only
/*
 * Two who harvest at once: how much sooner they are done than one.
 *
 * Two memslots, whose pages two vCPUs wrote, are harvested by one thread, one memslot
 * after the other; by two threads, a memslot each; and by two threads that share them,
 * both in one memslot at a time.  Time is from when the first thread begins until the
 * last one is done; the ratio to that of one thread is of the fastest rounds of each.
 */

#include <getopt.h>
#include <math.h>

#include "sim.h"
#include "measure.h"

#define SLOTS		2
#define MAX_PAGES	(1 << 20)
#define MAX_ROUNDS	100000

static unsigned int mib = 1024, pages = 20000, budget_ms = 2000;
static unsigned long npages;		/* of a memslot */
static u32 *wrote[SLOTS];
static int fds[SLOTS];
static int cpus[SLOTS];

void mark_page_dirty_in_slot(struct kvm *kvm, const struct kvm_memory_slot *memslot,
			     struct kvm_vcpu *vcpu, gfn_t gfn)
{
	(void)kvm;
	kvm_dirty_slot_log_mark_vcpu(memslot, vcpu, gfn - memslot->base_gfn);
}

void sim_look_again(const struct kvm_memory_slot *memslot, struct kvm_vcpu *vcpu, gfn_t gfn)
{
	kvm_dirty_slot_log_look_again(memslot, vcpu, gfn - memslot->base_gfn);
}

/* All that there is in a memslot's log. */
static u64 harvest(int slot, struct kvm_dirty_run *runs)
{
	struct kvm_dirty_slot_runs args = {
		.runs = (uintptr_t)runs, .nr_runs = MAX_PAGES,
	};

	if (sim_ioctl(fds[slot], KVM_DIRTY_SLOT_LOG_HARVEST, &args))
		die("KVM_DIRTY_SLOT_LOG_HARVEST failed");
	return args.nr_pages;
}

/*
 * Threads: the main one and a helper, which does the same at the same time.
 */

enum way { ONE, EACH, SHARED, NR_WAYS };

static unsigned long go, done;		/* rounds */
static enum way way;
static u64 got[SLOTS];

static void work(int me)
{
	static struct kvm_dirty_run *runs[SLOTS];
	int slot;

	if (!runs[me])
		runs[me] = shim_alloc(MAX_PAGES * sizeof(**runs));
	got[me] = 0;
	for (slot = 0; slot < SLOTS; slot++) {
		if (way != EACH || slot == me)
			got[me] += harvest(slot, runs[me]);
	}
}

static void *helper(void *unused)
{
	unsigned long round;

	(void)unused;
	pin(cpus[1]);
	for (round = 1;; round++) {
		while (__atomic_load_n(&go, __ATOMIC_ACQUIRE) != round)
			;
		if (way != ONE)
			work(1);
		__atomic_store_n(&done, round, __ATOMIC_RELEASE);
	}
	return NULL;
}

static double measure(void)
{
	double start;

	got[1] = 0;
	start = now_ns();
	__atomic_store_n(&go, go + 1, __ATOMIC_RELEASE);
	work(0);
	while (__atomic_load_n(&done, __ATOMIC_ACQUIRE) != go)
		;
	return now_ns() - start;
}

/* Both vCPUs write to both memslots. */
static void write_pages(void)
{
	int idx = srcu_read_lock(&sim_kvm->srcu);
	unsigned int i, slot;

	for (slot = 0; slot < SLOTS; slot++)
		for (i = 0; i < pages; i++)
			sim_fault(sim_kvm->vcpus[i % 2], slot * npages + wrote[slot][i]);
	srcu_read_unlock(&sim_kvm->srcu, idx);
}

static void create(void)
{
	struct sim_config *config = calloc(1, sizeof(*config));
	struct kvm_dirty_slot_log_fd arg;
	unsigned char *taken;
	unsigned int i, slot;
	u64 rnd = RANDOM_SEED;

	config->npages = npages;
	config->nr_gfns = SLOTS * npages;
	config->nr_vcpus = 2;
	config->entries = SIM_BY_SLOT;
	config->fast_fault = true;
	config->huge_tables = true;
	sim_create(config);
	sim_create_slot(1, npages, npages, NULL);
	for (slot = 0; slot < SLOTS; slot++) {
		arg = (struct kvm_dirty_slot_log_fd){ .slot = slot };
		fds[slot] = kvm_vm_ioctl_get_dirty_slot_log_fd(sim_kvm, &arg);
		if (fds[slot] < 0)
			die("no log");
		taken = calloc(npages, 1);
		wrote[slot] = calloc(pages, sizeof(u32));
		for (i = 0; i < pages;) {
			wrote[slot][i] = random_below(&rnd, npages);
			if (taken[wrote[slot][i]])
				continue;
			taken[wrote[slot][i]] = 1;
			sim_map_page(slot * npages + wrote[slot][i++]);
		}
		free(taken);
	}
}

static void usage(FILE *f)
{
	fprintf(f, "pair [-m MIB] [-n PAGES] [-t MS]\n\n"
		"  -m MIB    of each of two memslots (default: %u)\n"
		"  -n PAGES  written in each, at random (default: %u)\n"
		"  -t MS     time for it all (default: %u)\n", mib, pages, budget_ms);
}

int main(int argc, char **argv)
{
	static const char * const names[] = {
		"one thread", "two threads, a memslot each", "two threads, both in each memslot",
	};
	double best[NR_WAYS] = { INFINITY, INFINITY, INFINITY }, ns, end;
	unsigned int round;
	pthread_t thread;
	int c;

	while ((c = getopt(argc, argv, "hm:n:t:")) != -1) {
		switch (c) {
		case 'h':
			usage(stdout);
			return 0;
		case 'm':
			mib = number(optarg, 1 << 18);
			break;
		case 'n':
			pages = number(optarg, MAX_PAGES);
			break;
		case 't':
			budget_ms = number(optarg, 600000);
			break;
		default:
			usage(stderr);
			return 2;
		}
	}
	npages = (unsigned long)mib << (20 - PAGE_SHIFT);
	if (optind != argc || pages > npages / 2) {
		usage(stderr);
		return 2;
	}

	if (choose_cpus(cpus) < SLOTS)
		die("this machine has one CPU: two threads take turns on it");
	create();
	pin(cpus[0]);
	if (pthread_create(&thread, NULL, helper, NULL))
		die("cannot start a thread");

	end = now_ns() + budget_ms * 1e6;
	for (round = 0; round < MAX_ROUNDS && (round < 9 || now_ns() < end); round++) {
		way = round % NR_WAYS;
		write_pages();
		ns = measure();
		if (got[0] + got[1] != SLOTS * pages) {
			fprintf(stderr, "pair: %u pages written, %llu harvested\n", SLOTS * pages,
				got[0] + got[1]);
			return 1;
		}
		best[way] = min(best[way], ns);
	}

	printf("2 memslots of %u MiB, %u pages in each, 2 vCPUs; %u rounds\n\n", mib, pages, round);
	for (way = 0; way < NR_WAYS; way++)
		printf("  %-34s %8.0f us, %.2f times the throughput\n", names[way],
		       best[way] / 1000, best[ONE] / best[way]);
	return 0;
}
