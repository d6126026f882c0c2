// SPDX-License-Identifier: GPL-2.0-only
/*
 * A large VM of which little or nothing is dirty: its harvest touches no more memory
 * than that of a small one.
 *
 * Counted, not timed.  All that the code and the VM allocate comes from a pool, which
 * cannot be accessed while lines of a cache are counted: each instruction that wants
 * to faults, the line is noted, and the instruction is let through by itself.
 */

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "stress.h"

/* ThreadSanitizer accesses memory of its own, and wants signals for itself. */
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define CAN_COUNT
#endif

/*
 * Lines that one call on an idle VM may touch: of the VM, of the table of its logs, of
 * the file.  And what one page adds, its log, its ring, its vCPU's word of the bitmap,
 * and what the call works with.
 */
#define IDLE_LINES	16
#define PAGE_LINES	48

#define SLOT_PAGES	2048		/* of each memslot: one for each vCPU, and more */
#define POOL_SIZE	(16UL << 30)	/* of addresses; of memory, what is touched */

struct size {
	unsigned int slots, vcpus;
};

static struct kvm_memory_slot *slots;
static int vm_fd;

#ifdef CAN_COUNT

#define LINE		64
#define TRAP_FLAG	0x100		/* of the flags: stop after one instruction */
#define MAX_OPEN	8		/* pages that one instruction needs */

static uintptr_t lines[4096], open_pages[MAX_OPEN];
static unsigned int nr_lines, nr_open;

static void set_access(uintptr_t page, unsigned long size, int prot)
{
	if (mprotect((void *)page, size, prot))
		fail("mprotect: %s", strerror(errno));
}

static void note_line(uintptr_t line)
{
	unsigned int i;

	for (i = 0; i < nr_lines; i++)
		if (lines[i] == line)
			return;
	if (nr_lines == ARRAY_SIZE(lines))
		fail("a call touches more than %u lines", nr_lines);
	lines[nr_lines++] = line;
}

static void on_access(int sig, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;
	uintptr_t at = (uintptr_t)info->si_addr;

	if (at < (uintptr_t)shim_pool.start || at >= (uintptr_t)shim_pool.end ||
	    nr_open == MAX_OPEN) {
		signal(sig, SIG_DFL);
		return;
	}
	note_line(at / LINE);
	open_pages[nr_open] = round_down(at, PAGE_SIZE);
	set_access(open_pages[nr_open++], PAGE_SIZE, PROT_READ | PROT_WRITE);
	uc->uc_mcontext.gregs[REG_EFL] |= TRAP_FLAG;
}

static void on_step(int sig, siginfo_t *info, void *context)
{
	ucontext_t *uc = context;

	(void)sig;
	(void)info;
	while (nr_open)
		set_access(open_pages[--nr_open], PAGE_SIZE, PROT_NONE);
	uc->uc_mcontext.gregs[REG_EFL] &= ~TRAP_FLAG;
}

/* The lines that @what touches. */
static unsigned int count_lines(void (*what)(void))
{
	struct sigaction access = { .sa_sigaction = on_access, .sa_flags = SA_SIGINFO };
	struct sigaction step = { .sa_sigaction = on_step, .sa_flags = SA_SIGINFO };
	struct sigaction old_access, old_step;

	sigaction(SIGSEGV, &access, &old_access);
	sigaction(SIGTRAP, &step, &old_step);
	nr_lines = 0;
	set_access((uintptr_t)shim_pool.start, POOL_SIZE, PROT_NONE);
	what();
	set_access((uintptr_t)shim_pool.start, POOL_SIZE, PROT_READ | PROT_WRITE);
	sigaction(SIGSEGV, &old_access, NULL);
	sigaction(SIGTRAP, &old_step, NULL);
	/* Else nothing is counted, whatever is touched. */
	if (!nr_lines)
		fail("a call that touches nothing");
	return nr_lines;
}

#else

static unsigned int count_lines(void (*what)(void))
{
	what();
	return 0;
}

#endif

static void mark(unsigned int slot, int vcpu, unsigned long page)
{
	int idx = srcu_read_lock(&sim_kvm->srcu);

	kvm_dirty_slot_log_mark(sim_kvm, &slots[slot], vcpu < 0 ? NULL : sim_kvm->vcpus[vcpu],
				page);
	srcu_read_unlock(&sim_kvm->srcu, idx);
}

static u64 harvest(void)
{
	static struct kvm_dirty_vm_run runs[8192];
	struct kvm_dirty_vm_harvest args;
	u64 pages = 0;
	int r;

	do {
		args = (struct kvm_dirty_vm_harvest){
			.runs = (uintptr_t)runs, .nr_runs = ARRAY_SIZE(runs),
		};
		r = sim_ioctl(vm_fd, KVM_DIRTY_VM_LOG_HARVEST, &args);
		if (r)
			fail("HARVEST of the VM: %s", strerror(-r));
		pages += args.nr_pages;
	} while (args.flags & KVM_DIRTY_HARVEST_MORE);
	return pages;
}

static void expect(const char *what, u64 pages)
{
	u64 got = harvest();

	if (got != pages)
		fail("%s: %llu pages, not %llu", what, got, pages);
}

static void nothing(void)
{
	expect("an idle VM", 0);
}

static void one_page(void)
{
	expect("one page", 1);
}

static void poll_nothing(void)
{
	if (sim_poll(vm_fd, 0))
		fail("an idle VM can be read");
}

/* Not the simulation's: it has 16, and a list of all that it looks through. */
static void make_slots(unsigned int nr)
{
	unsigned int i;
	int r;

	slots = calloc(nr, sizeof(*slots));
	mutex_lock(&sim_kvm->slots_lock);
	for (i = 0; i < nr; i++) {
		slots[i] = (struct kvm_memory_slot){
			.id = SIM_MAX_SLOTS + i, .base_gfn = i * SLOT_PAGES,
			.npages = SLOT_PAGES,
		};
		r = kvm_dirty_slot_log_create(sim_kvm, &slots[i]);
		if (r)
			fail("no log of memslot %u: %s", i, strerror(-r));
		kvm_dirty_slot_log_start(&slots[i]);
	}
	mutex_unlock(&sim_kvm->slots_lock);
}

static void count(const struct size *s, unsigned int *idle, unsigned int *polled,
		  unsigned int *page)
{
	const struct sim_config c = {
		.nr_gfns = SLOT_PAGES, .nr_vcpus = s->vcpus, .entries = 64,
	};
	struct kvm_dirty_slot_log_fd all = { .slot = KVM_DIRTY_SLOT_ALL };
	unsigned int i, last = s->vcpus - 1;
	u64 pages = 0;

	shim_calm = true;
	shim_pool.start = mmap(NULL, POOL_SIZE, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (shim_pool.start == MAP_FAILED)
		fail("no addresses: %s", strerror(errno));
	shim_pool.next = shim_pool.start;
	shim_pool.end = shim_pool.start + POOL_SIZE;
	shim_pool.last = shim_pool.end;
	sim_create(&c);
	make_slots(s->slots);
	vm_fd = kvm_vm_ioctl_get_dirty_slot_log_fd(sim_kvm, &all);
	if (vm_fd < 0)
		fail("no file of the VM: %s", strerror(-vm_fd));

	/* It has not always been idle. */
	for (i = 0; i < s->slots; i++) {
		mark(i, i % s->vcpus, 1);
		mark(i, last, 2);
		mark(i, -1, 3);
		pages += 3;
	}
	for (i = 0; i < s->vcpus; i++)
		mark(i % s->slots, i, 4 + i);
	pages += s->vcpus;
	expect("what was marked", pages);
	/* Rings leave in two steps, the first of which is behind them now. */
	for (i = 0; i < 3; i++)
		nothing();

	*idle = count_lines(nothing);
	*polled = count_lines(poll_nothing);
	mark(s->slots - 1, last, 0);
	*page = count_lines(one_page);
	expect("what was harvested", 0);

	for (i = 0; i < s->slots; i++)
		kvm_dirty_slot_log_release(&slots[i]);
	sim_close(vm_fd);
	sim_destroy();
	free(slots);
	munmap(shim_pool.start, POOL_SIZE);
	memset(&shim_pool, 0, sizeof(shim_pool));
	shim_calm = false;
}

static void run_idle(unsigned int ms)
{
#ifdef CAN_COUNT
	static const struct size sizes[] = { { 1, 1 }, { 1, 1024 }, { 500, 1 }, { 500, 1024 } };
#else
	/* Nothing is counted here, but it runs. */
	static const struct size sizes[] = { { 1, 1 }, { 20, 100 } };
#endif
	unsigned int i, idle, polled, page, small = 0, small_polled = 0;

	(void)ms;
	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		count(&sizes[i], &idle, &polled, &page);
		if (!i) {
			small = idle;
			small_polled = polled;
		}
#ifdef CAN_COUNT
		printf("# idle: %u memslots, %u vCPUs: %u lines, poll() %u, one page %u\n",
		       sizes[i].slots, sizes[i].vcpus, idle, polled, page);
#endif
		if (idle != small || polled != small_polled || idle > IDLE_LINES ||
		    polled > IDLE_LINES || page > PAGE_LINES)
			fail("%u memslots, %u vCPUs: %u lines, poll() %u, one page %u; 1: %u, %u",
			     sizes[i].slots, sizes[i].vcpus, idle, polled, page, small,
			     small_polled);
	}
}

const struct stress_case idle_cases[] = {
	{ "idle", "500 memslots and 1,024 vCPUs that do nothing cost nothing", run_idle },
	{ }
};
