// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings: one test for each promise, each trap and each errno.
 *
 * The guest writes pages of a memslot of its own, on command, and the tests
 * compare what the log says with exactly that set of pages: what is missing,
 * what nobody wrote and what comes twice are all failures.  Code, stack and
 * page tables of the guest are in memslot 0, which does not log.
 *
 * -t NAME runs one test (-l lists them), -q fewer rounds and smaller sizes,
 * for emulators.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <asm/kvm_para.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "svm_util.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfaultfd_util.h"
#include "vmx.h"

#include "dirty_slot_ring.h"
#include "dirty_slot_ring_check.h"

/* An emulator is slow; what hangs, hangs for good. */
#undef TEST_TIMEOUT_DEFAULT
#define TEST_TIMEOUT_DEFAULT	240

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE		25
#endif

#define PG			4096ul
#define MAX_VCPUS		2

#define TEST_SLOT		10
#define TEST_GPA		0x10000000ul
#define TEST_GVA		0xc0000000ul

#define OTHER_SLOT		11
#define OTHER_GPA		0x80000000ul
#define OTHER_GVA		0x140000000ul

/* where TEST_SLOT goes when a test moves it */
#define MOVED_GPA		0x40000000ul
#define MOVED_GVA		0x100000000ul

/* Not a multiple of the 64 pages in a word of the bitmap. */
#define DEFAULT_NPAGES		515u

/* The size of a PML buffer, and more. */
#define MANY_RUNS		1024u

#define DONE_PORT		0x1001
#define INS_PORT		0x1002

static bool quick;

/* How often to repeat what depends on timing. */
static int rounds(int n)
{
	return quick ? (n + 9) / 10 : n;
}

/* -- the guest ------------------------------------------------------------ */

enum guest_op {
	OP_NONE,
	OP_WRITE,	/* write @npages pages from @first, @step apart, exit */
	OP_BATCHES,	/* the same each time @go moves on, never exiting */
	OP_TPR,		/* write the task priority register each time @go moves on */
	OP_RANDOM,	/* write random ones of the first @npages, until @stop */
	OP_INS,		/* have KVM's emulator store one byte in page @first */
};

/* The guest's copy is the one that both sides use, see mailbox_of(). */
struct mailbox {
	uint64_t op;
	uint64_t gva;
	uint64_t twin;		/* every other write is at this address; or 0 */
	uint64_t first;
	uint64_t npages;
	uint64_t step;
	uint64_t value;
	uint64_t go;
	uint64_t stop;
	uint64_t done;		/* by the guest: pages written, batches done */
};

static struct mailbox mailboxes[MAX_VCPUS];

static inline void guest_relax(void)
{
	asm volatile("pause" ::: "memory");
}

static void guest_store(struct mailbox *mb, uint64_t page, uint64_t value)
{
	WRITE_ONCE(*(uint64_t *)(mb->gva + page * PG), value);
	if (mb->twin)
		WRITE_ONCE(*(uint64_t *)(mb->twin + page * PG), value);
}

static void guest_do(struct mailbox *mb)
{
	uint64_t i, x;
	void *dst;

	/*
	 * Nobody interrupts this guest.  It is for emulators of virtualization
	 * extensions that do not let the host's interrupts through to a vCPU
	 * that has them disabled, and so would never get out of a loop.
	 */
	asm volatile("sti");

	switch (READ_ONCE(mb->op)) {
	case OP_WRITE:
		for (i = 0; i < mb->npages; i++) {
			guest_store(mb, mb->first + i * mb->step, mb->value);
			WRITE_ONCE(mb->done, i + 1);
		}
		break;
	case OP_BATCHES:
	case OP_TPR:
		while (!READ_ONCE(mb->stop)) {
			x = __atomic_load_n(&mb->go, __ATOMIC_ACQUIRE);
			if (x == mb->done) {
				guest_relax();
				continue;
			}
			for (i = 0; i < mb->npages; i++)
				guest_store(mb, mb->first + i * mb->step, mb->value + x);
			if (mb->op == OP_TPR)
				asm volatile("mov %0, %%cr8" : : "r"(x & 1) : "memory");
			__atomic_store_n(&mb->done, x, __ATOMIC_RELEASE);
		}
		break;
	case OP_RANDOM:
		for (i = 1, x = mb->value | 1; !READ_ONCE(mb->stop); i++) {
			x ^= x << 13;
			x ^= x >> 7;
			x ^= x << 17;
			guest_store(mb, x % mb->npages, mb->value + i);
			WRITE_ONCE(mb->done, i);
		}
		break;
	case OP_INS:
		dst = (void *)(mb->gva + mb->first * PG);
		asm volatile("insb" : "+D"(dst) : "d"(INS_PORT) : "memory");
		break;
	}
}

static void guest_exit(void)
{
	asm volatile("outb %%al, %%dx" : : "a"(0), "d"(DONE_PORT) : "memory");
}

static void guest_main(uint64_t id)
{
	for (;;) {
		guest_do(&mailboxes[id]);
		guest_exit();
	}
}

/* -- the VM --------------------------------------------------------------- */

struct dsr_params {
	uint32_t npages;		/* 0: DEFAULT_NPAGES */
	uint32_t entries;		/* of each ring; 0: the default */
	uint64_t flags;			/* KVM_DIRTY_SLOT_RING_* */
	int nr_vcpus;			/* 0: no guest at all, and no rings */
	int max_vcpus;			/* more may be added later */
	uint64_t manual;		/* for KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 */
	enum vm_mem_backing_src_type src;
	bool no_cap;			/* leave the capability off */
	bool no_log;			/* the slot does not log yet */
};

struct dsr {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu[MAX_VCPUS];
	pthread_t thread[MAX_VCPUS];
	struct mailbox *mb[MAX_VCPUS];
	uint32_t npages;
	int fd;				/* the log of TEST_SLOT */
};

static void dsr_add_vcpu(struct dsr *v, int id)
{
	v->vcpu[id] = vm_vcpu_add(v->vm, id, guest_main);
	vcpu_args_set(v->vcpu[id], 1, id);
	v->mb[id] = &((struct mailbox *)addr_gva2hva(v->vm, (vm_vaddr_t)mailboxes))[id];
}

static void dsr_free(struct dsr *v)
{
	if (v->fd >= 0)
		close(v->fd);
	kvm_vm_free(v->vm);
	free(v);
}

static void dsr_log(struct dsr *v, bool on)
{
	vm_mem_region_set_flags(v->vm, TEST_SLOT, on ? KVM_MEM_LOG_DIRTY_PAGES : 0);
}

static void dsr_reopen(struct dsr *v)
{
	if (v->fd >= 0)
		close(v->fd);
	v->fd = dsr_open(v->vm, TEST_SLOT);
}

/* Runs until the guest is done (true) or its ring is full (false). */
static bool run_vcpu(struct kvm_vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	struct ucall uc;
	int ret;

	for (;;) {
		do
			ret = __vcpu_run(vcpu);
		while (ret == -1 && errno == EINTR);
		CHECK(!ret, "KVM_RUN gave %d", ret);

		if (run->exit_reason == KVM_EXIT_DIRTY_SLOT_RING_FULL)
			return false;
		CHECK(run->exit_reason == KVM_EXIT_IO, "exit %s",
		      exit_reason_str(run->exit_reason));
		if (run->io.port == DONE_PORT)
			return true;
		if (run->io.port == INS_PORT) {
			memset((void *)run + run->io.data_offset, 0x5a,
			       run->io.size * run->io.count);
			continue;
		}
		get_ucall(vcpu, &uc);
		CHECK(false, "guest failed: %s", uc.buffer);
	}
}

static void guest_set(struct dsr *v, int cpu, struct mailbox mb)
{
	mb.gva = mb.gva ?: TEST_GVA;
	mb.step = mb.step ?: 1;
	*v->mb[cpu] = mb;
}

static void guest_run(struct dsr *v, int cpu, struct mailbox mb)
{
	guest_set(v, cpu, mb);
	CHECK(run_vcpu(v->vcpu[cpu]), "exit on a full ring nobody asked for");
}

static struct dsr *__dsr_new(const struct dsr_params *p)
{
	int i, nr = max(p->nr_vcpus, p->max_vcpus);
	struct dsr *v = calloc(1, sizeof(*v));

	CHECK(v, "no memory");
	v->npages = p->npages ?: DEFAULT_NPAGES;
	v->fd = -1;
	v->vm = nr ? __vm_create(VM_SHAPE_DEFAULT, nr, 4 * v->npages) : vm_create_barebones();

	if (!p->no_cap)
		dsr_enable(v->vm, p->entries, p->flags);
	if (p->manual)
		vm_enable_cap(v->vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, p->manual);

	vm_userspace_mem_region_add(v->vm, p->src, TEST_GPA, TEST_SLOT, v->npages,
				    p->no_log ? 0 : KVM_MEM_LOG_DIRTY_PAGES);
	if (nr)
		virt_map(v->vm, TEST_GVA, TEST_GPA, v->npages);
	for (i = 0; i < p->nr_vcpus; i++)
		dsr_add_vcpu(v, i);
	/*
	 * Map what vCPUs have in common in slot 0 before they run at the same
	 * time.  Two that fault on one page leave its D bit clear, and then
	 * there are emulators whose PML logs the address and not the page,
	 * which KVM warns about.
	 */
	for (i = 0; p->nr_vcpus > 1 && i < p->nr_vcpus; i++)
		guest_run(v, i, (struct mailbox){ .op = OP_NONE });

	if (!p->no_cap && !p->no_log)
		v->fd = dsr_open(v->vm, TEST_SLOT);
	return v;
}

#define dsr_new(...)	__dsr_new(&(struct dsr_params){ __VA_ARGS__ })

static void guest_write_step(struct dsr *v, int cpu, uint64_t first, uint64_t n, uint64_t step)
{
	static uint64_t value;
	struct mailbox mb = {
		.op = OP_WRITE, .first = first, .npages = n, .step = step, .value = ++value,
	};

	guest_run(v, cpu, mb);
}

static void guest_write(struct dsr *v, int cpu, uint64_t first, uint64_t n)
{
	guest_write_step(v, cpu, first, n, 1);
}

static void *vcpu_thread(void *vcpu)
{
	CHECK(run_vcpu(vcpu), "exit on a full ring nobody asked for");
	return NULL;
}

static void guest_start(struct dsr *v, int cpu, struct mailbox mb)
{
	guest_set(v, cpu, mb);
	CHECK_OK(pthread_create(&v->thread[cpu], NULL, vcpu_thread, v->vcpu[cpu]));
}

static void guest_join(struct dsr *v, int cpu)
{
	WRITE_ONCE(v->mb[cpu]->stop, 1);
	CHECK_OK(pthread_join(v->thread[cpu], NULL));
}

/* One batch of a guest that runs OP_BATCHES. */
static void guest_batch(struct dsr *v, int cpu)
{
	struct mailbox *mb = v->mb[cpu];
	uint64_t next = mb->go + 1;

	__atomic_store_n(&mb->go, next, __ATOMIC_RELEASE);
	while (__atomic_load_n(&mb->done, __ATOMIC_ACQUIRE) != next)
		sched_yield();
}

/* -- sets of pages, as often as they were reported ------------------------ */

static uint8_t *set_new(struct dsr *v)
{
	uint8_t *set = calloc(1, v->npages);

	CHECK(set, "no memory");
	return set;
}

static void set_add(uint8_t *set, uint64_t first, uint64_t n, uint64_t step)
{
	for (; n--; first += step)
		if (set[first] < UINT8_MAX)
			set[first]++;
}

/* Saturates, as set_add() does: 256 times is not never. */
static void set_join(struct dsr *v, uint8_t *set, const uint8_t *more)
{
	uint64_t i;

	for (i = 0; i < v->npages; i++)
		set[i] = min(set[i] + more[i], UINT8_MAX);
}

static void __set_check(struct dsr *v, const uint8_t *got, const uint8_t *want, int line)
{
	unsigned int i, bad = 0, nr = 0;
	char where[256] = "";
	int len = 0;

	for (i = 0; i < v->npages; i++) {
		nr += got[i];
		if (got[i] == want[i])
			continue;
		if (bad++ < 8)
			len += snprintf(where + len, sizeof(where) - len, " %u:%u/%u",
					i, got[i], want[i]);
	}
	if (bad)
		check_failed(__FILE__, line, "pages in the log", 0,
			     "%u of %u pages wrong, %u reported in all (page:times/expected)%s",
			     bad, v->npages, nr, where);
}

#define set_check(v, got, want)	__set_check(v, got, want, __LINE__)

/* Adds the runs of one answer to @got, having looked at its form. */
static void runs_take(uint8_t *got, uint32_t npages, const struct kvm_dirty_run *runs,
		      const struct kvm_dirty_slot_runs *args, uint32_t cap)
{
	uint64_t pages = 0;
	uint32_t i;

	CHECK(args->nr_runs <= cap, "%u runs in an array of %u", args->nr_runs, cap);
	CHECK(!(args->flags & ~KVM_DIRTY_HARVEST_MORE), "flags %#x", args->flags);
	CHECK(!args->reserved[0] && !args->reserved[1], "reserved fields written");
	for (i = 0; i < args->nr_runs; i++) {
		CHECK(runs[i].npages && runs[i].offset < npages &&
		      runs[i].npages <= npages - runs[i].offset,
		      "run %u+%u in a slot of %u", runs[i].offset, runs[i].npages, npages);
		set_add(got, runs[i].offset, runs[i].npages, 1);
		pages += runs[i].npages;
	}
	CHECK(pages == args->nr_pages, "%lu pages in the runs, nr_pages %llu",
	      pages, args->nr_pages);
}

/* Everything in the log, @cap runs at a time.  Returns the number of pages. */
static uint64_t harvest_cap(int fd, uint8_t *got, uint32_t npages, uint32_t flags, uint32_t cap)
{
	struct kvm_dirty_run *runs = calloc(cap, sizeof(*runs));
	struct kvm_dirty_slot_runs args;
	uint64_t pages = 0;
	int ret;

	do {
		ret = __dsr_runs(fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, cap, flags, &args);
		CHECK(!ret, "HARVEST gave %d", ret);
		runs_take(got, npages, runs, &args, cap);
		CHECK(!(args.flags & KVM_DIRTY_HARVEST_MORE) || args.nr_runs == cap,
		      "MORE after %u runs in an array of %u", args.nr_runs, cap);
		pages += args.nr_pages;
	} while (args.flags & KVM_DIRTY_HARVEST_MORE);
	free(runs);
	return pages;
}

static uint64_t harvest(struct dsr *v, uint8_t *got)
{
	return harvest_cap(v->fd, got, v->npages, 0, MANY_RUNS);
}

/* The log holds @want and nothing else, and then nothing. */
static void __expect_set(struct dsr *v, const uint8_t *want, int line)
{
	uint8_t *got = set_new(v);
	uint64_t again;

	harvest(v, got);
	__set_check(v, got, want, line);
	again = harvest(v, got);
	if (again)
		check_failed(__FILE__, line, "second harvest", 0, "%lu pages in an empty log",
			     again);
	free(got);
}

static void __expect_step(struct dsr *v, uint64_t first, uint64_t n, uint64_t step, int line)
{
	uint8_t *want = set_new(v);

	set_add(want, first, n, step);
	__expect_set(v, want, line);
	free(want);
}

#define expect_set(v, want)			__expect_set(v, want, __LINE__)
#define expect_step(v, first, n, step)		__expect_step(v, first, n, step, __LINE__)
#define expect(v, first, n)			__expect_step(v, first, n, 1, __LINE__)
#define expect_nothing(v)			__expect_step(v, 0, 0, 1, __LINE__)

/* Written once more, these pages are logged once more. */
static void __expect_armed(struct dsr *v, uint64_t first, uint64_t n, int line)
{
	guest_write(v, 0, first, n);
	__expect_step(v, first, n, 1, line);
}

#define expect_armed(v, first, n)		__expect_armed(v, first, n, __LINE__)

/* KVM_GET_DIRTY_LOG; returns the number of pages. */
static uint64_t bitmap_take(struct dsr *v, uint8_t *got)
{
	unsigned long *bmap = calloc((v->npages + 63) / 64, 8);
	uint64_t i, nr = 0;

	kvm_vm_get_dirty_log(v->vm, TEST_SLOT, bmap);
	for (i = 0; i < v->npages; i++) {
		if (!(bmap[i / 64] >> (i % 64) & 1))
			continue;
		if (got)
			set_add(got, i, 1, 1);
		nr++;
	}
	free(bmap);
	return nr;
}

static int poll_log(int fd, int timeout_ms)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };
	int ret = poll(&p, 1, timeout_ms);

	CHECK(ret >= 0, "poll gave %d", ret);
	return ret ? p.revents : 0;
}

static void sleep_ms(unsigned int ms)
{
	usleep(ms * 1000);
}

static uint64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000ull + ts.tv_nsec / 1000000;
}

/* For a short time that is never the same. */
static void dither(int max)
{
	for (max = random() % max; max > 0; max--)
		guest_relax();
}

static void markers_check(const struct dsr_ring *ring)
{
	uint64_t r = dsr_reset_marker(ring), c = dsr_consumer(ring), p = dsr_producer(ring);

	CHECK(r <= c && c <= p && p <= r + ring->entries,
	      "reset %lu consumer %lu producer %lu entries %u", r, c, p, ring->entries);
}

/* The signal that reading or writing *@p brings, or 0. */
static sigjmp_buf probe_env;

static void probe_handler(int sig)
{
	siglongjmp(probe_env, sig);
}

static int probe(void *p, bool write)
{
	struct sigaction sa = { .sa_handler = probe_handler }, old[2];
	int sig;

	sigaction(SIGBUS, &sa, &old[0]);
	sigaction(SIGSEGV, &sa, &old[1]);
	sig = sigsetjmp(probe_env, 1);
	if (!sig) {
		if (write)
			WRITE_ONCE(*(uint64_t *)p, 0);
		else
			READ_ONCE(*(uint64_t *)p);
	}
	sigaction(SIGBUS, &old[0], NULL);
	sigaction(SIGSEGV, &old[1], NULL);
	return sig;
}

static void child_check(pid_t pid)
{
	int status;

	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(WIFEXITED(status) && !WEXITSTATUS(status), "child ended with %#x", status);
}

/* @n pages of memory, of which the last cannot be touched */
static void *alloc_guarded(size_t n)
{
	void *p = mmap(NULL, n * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED, "no memory");
	CHECK_OK(mprotect(p + (n - 1) * PG, PG, PROT_NONE));
	return p;
}

/* -- enabling ------------------------------------------------------------- */

TEST(cap_probe)
{
	struct kvm_vm *vm = vm_create_barebones();

	CHECK_EQ(kvm_check_cap(KVM_CAP_DIRTY_SLOT_RING), DSR_MAX_ENTRIES);
	CHECK_EQ(vm_check_cap(vm, KVM_CAP_DIRTY_SLOT_RING), DSR_MAX_ENTRIES);
	kvm_vm_free(vm);
}

TEST(cap_sizes)
{
	static const uint32_t sizes[] = { 0, 1, 2, 64, 512, 4096, 65536 };
	struct kvm_dirty_slot_log_info info;
	struct dsr *v;
	int i;

	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		v = dsr_new(.entries = sizes[i]);
		info = dsr_info(v->fd);
		CHECK_EQ(info.entries, sizes[i] ?: DSR_DEFAULT_ENTRIES);
		dsr_free(v);
	}
}

static const struct kvm_enable_cap bad_caps[] = {
	{ .args = { 3 } },
	{ .args = { 65 } },
	{ .args = { DSR_MAX_ENTRIES - 1 } },
	{ .args = { DSR_MAX_ENTRIES + 1 } },
	{ .args = { 2 * DSR_MAX_ENTRIES } },
	{ .args = { 1ull << 32 } },
	{ .args = { 1ull << 63 } },
	{ .args = { (1ull << 32) | 64 } },
	{ .args = { ~0ull } },
	{ .args = { 64, 2 } },
	{ .args = { 64, 1ull << 32 } },
	{ .args = { 64, ~0ull } },
	{ .args = { 64, 0, 1 } },
	{ .args = { 64, 0, 0, 1 } },
	{ .args = { 64, 0, 1ull << 63 } },
	{ .args = { 64, 0, 0, 1ull << 63 } },
	{ .args = { 64 }, .flags = 1 },
	{ .args = { 64 }, .flags = 1u << 31 },
};

static void check_bad_caps(struct kvm_vm *vm)
{
	struct kvm_enable_cap cap;
	int i, ret;

	for (i = 0; i < ARRAY_SIZE(bad_caps); i++) {
		cap = bad_caps[i];
		cap.cap = KVM_CAP_DIRTY_SLOT_RING;
		ret = ioctl(vm->fd, KVM_ENABLE_CAP, &cap);
		CHECK(ret == -1 && errno == EINVAL, "row %d gave %d", i, ret);
	}
}

TEST(cap_einval)
{
	struct dsr *v = dsr_new(.no_cap = true, .no_log = true);

	check_bad_caps(v->vm);
	/* None of them was half accepted, and EINVAL comes before EBUSY. */
	dsr_enable(v->vm, 64, 0);
	check_bad_caps(v->vm);
	CHECK_ERR(__dsr_enable(v->vm, 64, 0), EBUSY);
	dsr_free(v);
}

TEST(cap_ebusy)
{
	struct dsr *v = dsr_new(.no_cap = true);

	/* A slot logs, then it does not. */
	CHECK_ERR(__dsr_enable(v->vm, 64, 0), EBUSY);
	dsr_log(v, false);
	dsr_enable(v->vm, 64, 0);
	CHECK_ERR(__dsr_enable(v->vm, 64, 0), EBUSY);
	CHECK_ERR(__dsr_enable(v->vm, 0, 0), EBUSY);
	dsr_free(v);
}

TEST(cap_ebusy_upstream_ring)
{
	static const uint32_t caps[] = {
		KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
	};
	/* in bytes; it must have room for a PML buffer */
	const uint64_t size = 4096 * sizeof(struct kvm_dirty_gfn);
	struct kvm_vm *vm;
	int i;

	for (i = 0; i < ARRAY_SIZE(caps); i++) {
		if (!kvm_check_cap(caps[i]))
			continue;
		vm = vm_create_barebones();
		vm_enable_cap(vm, caps[i], size);
		CHECK_ERR(__dsr_enable(vm, 64, 0), EBUSY);
		kvm_vm_free(vm);

		vm = vm_create_barebones();
		dsr_enable(vm, 64, 0);
		CHECK_ERR(__vm_enable_cap(vm, caps[i], size), EBUSY);
		/* not EINVAL, though it is too late for that one anyway */
		__vm_vcpu_add(vm, 0);
		CHECK_ERR(__vm_enable_cap(vm, caps[i], size), EBUSY);
		kvm_vm_free(vm);
	}
}

TEST(cap_after_vcpus)
{
	struct dsr *v = dsr_new(.no_cap = true, .no_log = true, .nr_vcpus = 2);

	guest_write(v, 0, 0, v->npages);
	dsr_enable(v->vm, 64, 0);
	guest_write(v, 1, 0, v->npages);
	dsr_log(v, true);
	dsr_reopen(v);
	CHECK_EQ(dsr_info(v->fd).nr_rings, 2);
	expect_nothing(v);
	guest_write(v, 0, 0, 100);
	guest_write(v, 1, 50, 100);
	expect(v, 0, 150);
	dsr_free(v);
}

/* Nothing that was there before is different when the capability is off. */
TEST(cap_off)
{
	struct dsr *v = dsr_new(.no_cap = true, .nr_vcpus = 1);
	uint8_t *got = set_new(v), *want = set_new(v);

	CHECK_ERR(__dsr_open(v->vm, TEST_SLOT), ENXIO);
	CHECK_ERR(__dsr_open(v->vm, 0), ENXIO);

	guest_write(v, 0, 7, 300);
	bitmap_take(v, got);
	set_add(want, 7, 300, 1);
	set_check(v, got, want);
	CHECK_EQ(bitmap_take(v, got), 0);
	guest_write(v, 0, 9, 1);
	CHECK_EQ(bitmap_take(v, got), 1);

	/* no pages, no counts */
	CHECK_EQ(vm_get_stat(v->vm, "dirty_slot_log_harvests"), 0);
	CHECK_EQ(v->vcpu[0]->run->exit_reason, KVM_EXIT_IO);
	free(got);
	free(want);
	dsr_free(v);
}

/* -- the file descriptor -------------------------------------------------- */

TEST(fd_errors)
{
	struct kvm_dirty_slot_log_fd arg = { .slot = TEST_SLOT };
	struct dsr *v = dsr_new(.nr_vcpus = 1);
	int as = vm_check_cap(v->vm, KVM_CAP_MULTI_ADDRESS_SPACE) ?: 1;
	int vmfd = v->vm->fd;

	/* slot 0 is there and does not log */
	CHECK_ERR(__dsr_open(v->vm, 0), ENOENT);
	CHECK_ERR(__dsr_open(v->vm, TEST_SLOT + 1), ENOENT);
	CHECK_ERR(__dsr_open(v->vm, 0xffff), EINVAL);
	CHECK_ERR(__dsr_open(v->vm, as << 16 | TEST_SLOT), EINVAL);
	CHECK_ERR(__dsr_open(v->vm, 0xffff0000u | TEST_SLOT), EINVAL);
	if (as > 1)
		CHECK_ERR(__dsr_open(v->vm, 1 << 16 | TEST_SLOT), ENOENT);

	arg.flags = 1;
	CHECK_ERR(ioctl(vmfd, KVM_GET_DIRTY_SLOT_LOG_FD, &arg), EINVAL);
	arg.flags = 1u << 31;
	CHECK_ERR(ioctl(vmfd, KVM_GET_DIRTY_SLOT_LOG_FD, &arg), EINVAL);
	CHECK_ERR(ioctl(vmfd, KVM_GET_DIRTY_SLOT_LOG_FD, NULL), EFAULT);

	dsr_log(v, false);
	CHECK_ERR(__dsr_open(v->vm, TEST_SLOT), ENOENT);
	dsr_log(v, true);
	dsr_reopen(v);
	expect_armed(v, 0, 10);
	dsr_free(v);
}

TEST(fd_flags_and_limits)
{
	struct dsr *v = dsr_new();
	struct rlimit old, none;
	char c;

	CHECK_EQ(fcntl(v->fd, F_GETFD), FD_CLOEXEC);
	CHECK(read(v->fd, &c, 1) == -1, "read succeeded");
	CHECK(write(v->fd, &c, 1) == -1, "write succeeded");

	CHECK_OK(getrlimit(RLIMIT_NOFILE, &old));
	none = old;
	none.rlim_cur = 0;
	CHECK_OK(setrlimit(RLIMIT_NOFILE, &none));
	CHECK_ERR(__dsr_open(v->vm, TEST_SLOT), EMFILE);
	CHECK_OK(setrlimit(RLIMIT_NOFILE, &old));

	/* Two descriptors are two views of one log. */
	close(v->fd);
	v->fd = -1;
	dsr_reopen(v);
	dsr_mark(v->fd, 3, 4);
	dsr_reopen(v);
	expect(v, 3, 4);
	dsr_free(v);
}

TEST(fd_unknown_ioctls)
{
	struct dsr *v = dsr_new();
	const unsigned long bad[] = {
		KVM_RUN,
		KVM_GET_DIRTY_LOG,
		KVM_GET_DIRTY_SLOT_LOG_FD,
		_IO(KVMIO, 0xf2),
		_IO(KVMIO, 0xf6),
		_IOR(KVMIO, 0xf2, struct kvm_dirty_slot_runs),
		_IOWR(KVMIO, 0xf1, struct kvm_dirty_slot_log_info),
		_IOWR(KVMIO, 0xf2, struct kvm_dirty_slot_reset),
		_IOWR(KVMIO, 0xf6, struct kvm_dirty_slot_runs),
		_IOWR('x', 0xf2, struct kvm_dirty_slot_runs),
	};
	char buf[256] = { 0 };
	int i, ret;

	for (i = 0; i < ARRAY_SIZE(bad); i++) {
		ret = ioctl(v->fd, bad[i], buf);
		CHECK(ret == -1 && errno == ENOTTY, "row %d gave %d", i, ret);
	}
	/* What belongs to the log is unknown to the VM. */
	CHECK(ioctl(v->vm->fd, KVM_DIRTY_SLOT_LOG_HARVEST, buf) == -1, "HARVEST on a VM");
	dsr_free(v);
}

TEST(fd_bad_pointers)
{
	struct dsr *v = dsr_new();
	static const unsigned long cmds[] = {
		KVM_DIRTY_SLOT_LOG_INFO, KVM_DIRTY_SLOT_LOG_HARVEST, KVM_DIRTY_SLOT_LOG_RESET,
		KVM_DIRTY_SLOT_LOG_MARK, KVM_DIRTY_SLOT_LOG_DISCARD,
	};
	void *end = alloc_guarded(2) + PG - 8;
	int i, ret;

	dsr_mark(v->fd, 5, 50);
	for (i = 0; i < ARRAY_SIZE(cmds); i++) {
		ret = ioctl(v->fd, cmds[i], NULL);
		CHECK(ret == -1 && errno == EFAULT, "row %d, NULL: %d", i, ret);
		ret = ioctl(v->fd, cmds[i], end);
		CHECK(ret == -1 && errno == EFAULT, "row %d, straddling: %d", i, ret);
		ret = ioctl(v->fd, cmds[i], (void *)-PG);
		CHECK(ret == -1 && errno == EFAULT, "row %d, kernel: %d", i, ret);
	}
	expect(v, 5, 50);
	dsr_free(v);
}

TEST(fd_bad_fields)
{
	struct kvm_dirty_run run = { .offset = 0, .npages = 1 };
	const uint64_t addr = (uintptr_t)&run;
	const struct {
		unsigned long cmd;
		struct kvm_dirty_slot_runs args;
	} runs[] = {
		{ KVM_DIRTY_SLOT_LOG_HARVEST, { .runs = addr, .nr_runs = 0 } },
		{ KVM_DIRTY_SLOT_LOG_HARVEST, { .runs = addr, .nr_runs = 1, .flags = 4 } },
		{ KVM_DIRTY_SLOT_LOG_HARVEST, { .runs = addr, .nr_runs = 1, .flags = 1u << 31 } },
		{ KVM_DIRTY_SLOT_LOG_HARVEST, { .runs = addr, .nr_runs = 1, .reserved = { 1 } } },
		{ KVM_DIRTY_SLOT_LOG_HARVEST,
		  { .runs = addr, .nr_runs = 1, .reserved = { 0, 1ull << 63 } } },
		{ KVM_DIRTY_SLOT_LOG_MARK, { .runs = addr, .nr_runs = 1, .flags = 1 } },
		{ KVM_DIRTY_SLOT_LOG_MARK, { .runs = addr, .nr_runs = 1, .flags = 2 } },
		{ KVM_DIRTY_SLOT_LOG_MARK, { .runs = addr, .nr_runs = 1, .flags = 1u << 31 } },
		{ KVM_DIRTY_SLOT_LOG_MARK, { .runs = addr, .nr_runs = 1, .reserved = { 1 } } },
		{ KVM_DIRTY_SLOT_LOG_MARK, { .runs = addr, .nr_runs = 1, .reserved = { 0, 1 } } },
		{ KVM_DIRTY_SLOT_LOG_MARK, { .runs = addr, .nr_runs = 0, .flags = 1 } },
		{ KVM_DIRTY_SLOT_LOG_DISCARD, { .runs = addr, .nr_runs = 1, .flags = 1 } },
		{ KVM_DIRTY_SLOT_LOG_DISCARD, { .runs = addr, .nr_runs = 1, .flags = 2 } },
		{ KVM_DIRTY_SLOT_LOG_DISCARD, { .runs = addr, .nr_runs = 1, .reserved = { 1 } } },
		{ KVM_DIRTY_SLOT_LOG_DISCARD,
		  { .runs = addr, .nr_runs = 1, .reserved = { 0, 1 } } },
	};
	const struct kvm_dirty_slot_reset resets[] = {
		{ .flags = 2 }, { .flags = 1u << 31 }, { .pad = 1 },
		{ .reserved = { 1 } }, { .reserved = { 0, 1ull << 63 } },
	};
	struct dsr *v = dsr_new();
	struct kvm_dirty_slot_reset reset;
	struct kvm_dirty_slot_runs args;
	int i, ret;

	dsr_mark(v->fd, 0, 100);
	for (i = 0; i < ARRAY_SIZE(runs); i++) {
		args = runs[i].args;
		ret = ioctl(v->fd, runs[i].cmd, &args);
		CHECK(ret == -1 && errno == EINVAL, "row %d gave %d", i, ret);
	}
	for (i = 0; i < ARRAY_SIZE(resets); i++) {
		reset = resets[i];
		ret = ioctl(v->fd, KVM_DIRTY_SLOT_LOG_RESET, &reset);
		CHECK(ret == -1 && errno == EINVAL, "reset row %d gave %d", i, ret);
	}
	/* Nothing above took, added or dropped a page. */
	expect(v, 0, 100);

	/* What calls hand out may be handed in again: output is not input. */
	args = (struct kvm_dirty_slot_runs) {
		.runs = addr, .nr_runs = 1, .nr_pages = ~0ull,
		.flags = KVM_DIRTY_HARVEST_MORE | KVM_DIRTY_HARVEST_SYNC,
	};
	CHECK_OK(ioctl(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, &args));
	CHECK(!args.nr_runs && !args.flags && !args.nr_pages, "an empty log was not");
	reset = (struct kvm_dirty_slot_reset) {
		.nr_pages = ~0ull, .flags = KVM_DIRTY_RESET_OVERFLOW,
	};
	CHECK_OK(ioctl(v->fd, KVM_DIRTY_SLOT_LOG_RESET, &reset));
	CHECK(!reset.flags && !reset.nr_pages, "an empty log was not");
	dsr_free(v);
}

TEST(info_fields)
{
	struct dsr *v = dsr_new(.entries = 128, .nr_vcpus = 1, .max_vcpus = 2);
	struct kvm_dirty_slot_log_info info;

	memset(&info, 0xff, sizeof(info));
	CHECK_OK(ioctl(v->fd, KVM_DIRTY_SLOT_LOG_INFO, &info));
	CHECK_EQ(info.slot, TEST_SLOT);
	CHECK_EQ(info.nr_rings, 1);
	CHECK_EQ(info.entries, 128);
	CHECK_EQ(info.flags, 0);
	CHECK(info.stride >= 3 * PG && !(info.stride % PG), "stride %#llx", info.stride);
	CHECK_EQ(info.npages, v->npages);
	CHECK_EQ(info.base_gfn, TEST_GPA / PG);
	CHECK(!info.reserved[0] && !info.reserved[1] && !info.reserved[2] && !info.reserved[3],
	      "reserved fields not zero");

	dsr_add_vcpu(v, 1);
	CHECK_EQ(dsr_info(v->fd).nr_rings, 2);
	dsr_free(v);
}

/* -- harvest -------------------------------------------------------------- */

TEST(harvest_basic)
{
	struct dsr *v = dsr_new(.nr_vcpus = 1);

	expect_nothing(v);
	guest_write(v, 0, 0, 1);
	expect(v, 0, 1);
	guest_write(v, 0, v->npages - 1, 1);
	expect(v, v->npages - 1, 1);
	/* Again and again is once. */
	guest_write(v, 0, 10, 100);
	guest_write(v, 0, 10, 100);
	guest_write(v, 0, 60, 100);
	expect(v, 10, 150);
	guest_write_step(v, 0, 1, 128, 4);
	expect_step(v, 1, 128, 4);
	guest_write(v, 0, 0, v->npages);
	expect(v, 0, v->npages);
	expect_armed(v, 0, v->npages);
	dsr_free(v);
}

/* Fifty times as many dirty pages as the ring has entries. */
static void check_small_ring(uint32_t entries, uint32_t npages, uint64_t step)
{
	struct dsr *v = dsr_new(.entries = entries, .npages = npages, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	uint64_t n = (npages + step - 1) / step;
	int i;

	for (i = 0; i < 3; i++) {
		guest_write_step(v, 0, 0, n, step);
		markers_check(&ring);
		CHECK(dsr_overflowed(&ring), "a ring of %u took %lu pages", entries, n);
		expect_step(v, 0, n, step);
		markers_check(&ring);
		CHECK_EQ(dsr_producer(&ring), dsr_reset_marker(&ring));
	}
	dsr_unmap(&ring);
	dsr_free(v);
}

TEST(harvest_ring_of_1)
{
	check_small_ring(1, 50, 1);
	check_small_ring(1, 515, 2);
}

TEST(harvest_ring_of_64)
{
	check_small_ring(64, 3200, 1);
	if (!quick)
		check_small_ring(64, 9601, 3);
}

TEST(harvest_ring_wraps)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	int i;

	/* 37 and 64 have no common factor: the ring fills at every offset. */
	for (i = 0; i < rounds(200); i++) {
		guest_write_step(v, 0, i % 7, 37, 2);
		CHECK(dsr_producer(&ring) > dsr_reset_marker(&ring), "ring not used");
		expect_step(v, i % 7, 37, 2);
		markers_check(&ring);
	}
	CHECK_EQ(dsr_overflowed(&ring), 0);
	dsr_unmap(&ring);
	dsr_free(v);
}

TEST(harvest_two_vcpus_same_pages)
{
	struct dsr *v = dsr_new(.nr_vcpus = 2);
	struct mailbox mb = { .op = OP_WRITE, .npages = v->npages };
	int i;

	guest_write(v, 0, 0, v->npages);
	guest_write(v, 1, 0, v->npages);
	expect(v, 0, v->npages);

	for (i = 0; i < rounds(30); i++) {
		guest_start(v, 0, mb);
		guest_start(v, 1, mb);
		guest_join(v, 0);
		guest_join(v, 1);
		expect(v, 0, v->npages);
	}
	dsr_free(v);
}

TEST(harvest_one_run_at_a_time)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	uint8_t *got = set_new(v), *want = set_new(v);

	/* from the ring and from the overflow log, single pages and neighbours */
	guest_write_step(v, 0, 0, 128, 2);
	dsr_mark(v->fd, 300, 130);
	set_add(want, 0, 128, 2);
	set_add(want, 300, 130, 1);
	CHECK_EQ(harvest_cap(v->fd, got, v->npages, 0, 1), 128 + 130);
	set_check(v, got, want);
	expect_nothing(v);
	expect_armed(v, 0, v->npages);
	free(got);
	free(want);
	dsr_free(v);
}

TEST(harvest_every_capacity)
{
	struct dsr *v = dsr_new(.entries = 16, .nr_vcpus = 1, .npages = 200);
	uint8_t *want = set_new(v), *got;
	uint32_t cap;

	set_add(want, 0, 40, 3);
	for (cap = 1; cap <= 48; cap += quick ? 5 : 1) {
		got = set_new(v);
		guest_write_step(v, 0, 0, 40, 3);
		harvest_cap(v->fd, got, v->npages, 0, cap);
		set_check(v, got, want);
		expect_nothing(v);
		free(got);
	}
	free(want);
	dsr_free(v);
}

TEST(harvest_into_nowhere)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct kvm_dirty_run *none = alloc_guarded(1), *ro;
	struct kvm_dirty_slot_runs args;
	const uintptr_t bad[] = {
		(uintptr_t)none, 8, -PG, 1ull << 63, (1ull << 47) - 4,
	};
	int i, ret;

	guest_write_step(v, 0, 0, 200, 2);
	for (i = 0; i < ARRAY_SIZE(bad); i++) {
		ret = __dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, (void *)bad[i], 512, 0, &args);
		CHECK(ret == -1 && errno == EFAULT, "row %d gave %d", i, ret);
	}
	ro = mmap(NULL, PG, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK_ERR(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, ro, 512, 0, &args), EFAULT);
	expect_step(v, 0, 200, 2);
	expect_armed(v, 0, v->npages);
	dsr_free(v);
}

/* The array ends in memory that is not there, after 0, 1, 2, ... runs. */
TEST(harvest_array_faults_half_way)
{
	static const uint32_t fits[] = {
		0, 1, 2, 7, 8, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 199, 200, 201, 255, 256
	};
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	void *end = alloc_guarded(2) + PG;
	uint8_t *want = set_new(v), *got;
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_run *runs;
	int i, ret, nr;

	set_add(want, 0, 200, 2);
	for (i = 0; i < ARRAY_SIZE(fits); i++) {
		got = set_new(v);
		runs = end - fits[i] * sizeof(*runs);
		guest_write_step(v, 0, 0, 200, 2);

		/* Full batches may have got through, the one that faulted stays. */
		for (nr = 0; nr < 300; nr++) {
			ret = __dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, 512, 0, &args);
			if (ret)
				break;
			runs_take(got, v->npages, runs, &args, fits[i]);
			if (!(args.flags & KVM_DIRTY_HARVEST_MORE))
				break;
			CHECK(args.nr_runs, "MORE and no runs");
		}
		CHECK(!ret || errno == EFAULT, "%u runs fit: gave %d", fits[i], ret);
		CHECK(!ret || fits[i] < 200, "%u runs fit, EFAULT for 200", fits[i]);

		harvest(v, got);
		set_check(v, got, want);
		expect_nothing(v);
		free(got);
	}
	expect_armed(v, 0, v->npages);
	free(want);
	dsr_free(v);
}

TEST(harvest_readonly_header)
{
	struct kvm_dirty_run runs[512] = { { 0 } };
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct kvm_dirty_slot_runs *args = mmap(NULL, PG, PROT_READ | PROT_WRITE,
						MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	*args = (struct kvm_dirty_slot_runs) {
		.runs = (uintptr_t)runs, .nr_runs = ARRAY_SIZE(runs),
	};
	CHECK_OK(mprotect(args, PG, PROT_READ));
	guest_write_step(v, 0, 0, 200, 2);
	CHECK_ERR(ioctl(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, args), EFAULT);
	expect_step(v, 0, 200, 2);
	dsr_free(v);
}

/* The capacity is the caller's word, nothing to allocate by. */
TEST(harvest_huge_capacity)
{
	struct kvm_dirty_run *runs = alloc_guarded(2);
	struct dsr *v = dsr_new(.nr_vcpus = 1);
	struct kvm_dirty_slot_runs args;
	uint8_t *got = set_new(v), *want = set_new(v);

	guest_write_step(v, 0, 0, 100, 2);
	set_add(want, 0, 100, 2);
	CHECK_OK(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, UINT32_MAX, 0, &args));
	CHECK_EQ(args.flags, 0);
	runs_take(got, v->npages, runs, &args, PG / sizeof(*runs));
	set_check(v, got, want);
	free(got);
	free(want);
	dsr_free(v);
}

struct taker {
	struct dsr *v;
	uint8_t *got;
	bool stop;
	bool bitmap;
	uint64_t nr;
	pthread_t thread;
};

static void *taker_thread(void *arg)
{
	struct taker *t = arg;

	do {
		if (t->bitmap)
			t->nr += bitmap_take(t->v, t->got);
		else
			t->nr += harvest_cap(t->v->fd, t->got, t->v->npages, 0, 16);
	} while (!READ_ONCE(t->stop));
	return NULL;
}

/*
 * The guest is at it while the log is harvested: a page is logged before it is
 * written, and if it was re-protected in between the write faults again, and is
 * logged again.  So what the guest writes now may come more than once, what it
 * wrote before and what the VMM marks comes exactly once.
 */
static void set_limit(uint8_t *set, uint32_t first, uint32_t n)
{
	for (; n--; first++)
		set[first] = !!set[first];
}

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

TEST(get_dirty_log_side_by_side)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	uint8_t *got = set_new(v), *want = set_new(v);
	int i;

	/* Whoever asks first gets the page, and the stale entries harm nobody. */
	for (i = 0; i < 5; i++) {
		guest_write(v, 0, 0, 40 + i * 30);
		CHECK_EQ(bitmap_take(v, NULL), 40 + i * 30);
		expect_nothing(v);
		guest_write(v, 0, 0, 40 + i * 30);
		CHECK_EQ(bitmap_take(v, NULL), 40 + i * 30);
		guest_write(v, 0, 20, 100);
		expect(v, 20, 100);
		CHECK_EQ(bitmap_take(v, NULL), 0);
	}
	dsr_mark(v->fd, 5, 1);
	bitmap_take(v, got);
	set_add(want, 5, 1, 1);
	set_check(v, got, want);
	expect_armed(v, 0, v->npages);
	free(got);
	free(want);
	dsr_free(v);
}

TEST(clear_dirty_log_side_by_side)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1,
				.manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
	unsigned long *bmap = calloc((v->npages + 63) / 64, 8);
	uint8_t *want = set_new(v);
	uint32_t n = v->npages & ~63;

	memset(bmap, 0xff, (v->npages + 63) / 64 * 8);
	/* GET looks, CLEAR takes. */
	guest_write(v, 0, 0, 200);
	CHECK_EQ(bitmap_take(v, NULL), 200);
	CHECK_EQ(bitmap_take(v, NULL), 200);
	kvm_vm_clear_dirty_log(v->vm, TEST_SLOT, bmap, 0, 128);
	expect(v, 128, 72);
	CHECK_EQ(bitmap_take(v, NULL), 0);

	/* cleared pages are armed, and their old entries forgotten */
	guest_write(v, 0, 0, 100);
	kvm_vm_clear_dirty_log(v->vm, TEST_SLOT, bmap, 0, n);
	guest_write(v, 0, 0, 10);
	expect(v, 0, 10);
	guest_write(v, 0, 0, 300);
	kvm_vm_clear_dirty_log(v->vm, TEST_SLOT, bmap, 64, n - 64);
	guest_write(v, 0, 100, 300);
	guest_write(v, 0, 60, 4);
	CHECK_EQ(bitmap_take(v, NULL), 364);
	set_add(want, 0, 64, 1);
	set_add(want, 100, 300, 1);
	expect_set(v, want);
	expect_armed(v, 0, v->npages);
	free(want);
	free(bmap);
	dsr_free(v);
}

TEST(initially_set)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1, .no_log = true,
				.manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE |
					  KVM_DIRTY_LOG_INITIALLY_SET);
	uint8_t *got = set_new(v), *want = set_new(v);
	int i;

	set_add(want, 0, v->npages, 1);
	guest_write(v, 0, 0, v->npages);
	for (i = 0; i < 3; i++) {
		dsr_log(v, true);
		dsr_reopen(v);
		/* written or not, while it is still in the log it is in it once */
		if (i == 1)
			guest_write(v, 0, 0, v->npages);
		CHECK(poll_log(v->fd, 0) == POLLIN, "a full log is not readable");
		if (i == 2) {
			harvest_cap(v->fd, got, v->npages, 0, 1);
			set_check(v, got, want);
		} else {
			expect(v, 0, v->npages);
		}
		expect_nothing(v);
		guest_write(v, 0, 3, 200);
		expect(v, 3, 200);
		guest_write_step(v, 0, 0, 250, 2);
		expect_step(v, 0, 250, 2);
		dsr_log(v, false);
	}
	free(got);
	free(want);
	dsr_free(v);
}

/* vCPU 0 stays in the guest; each SYNC has all of the batch that it has done. */
static void check_sync_batches(struct dsr *v, const uint8_t *want, int n)
{
	uint8_t *got;

	for (n = rounds(n); n; n--) {
		got = set_new(v);
		guest_batch(v, 0);
		harvest_cap(v->fd, got, v->npages, KVM_DIRTY_HARVEST_SYNC, MANY_RUNS);
		set_check(v, got, want);
		free(got);
	}
}

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
	struct kvm_dirty_run run;
	uint64_t c;
	int i;

	set_add(want, mb.first, mb.npages, mb.step);
	guest_start(v, 0, mb);
	for (i = 0; i < rounds(200); i++) {
		got = set_new(v);
		guest_batch(v, 0);
		for (c = dsr_consumer(&ring); c < dsr_producer(&ring); c++) {
			run = dsr_entry(&ring, c);
			set_add(got, run.offset, run.npages, 1);
		}
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

static int nr_signals;

static void count_signal(int sig)
{
	WRITE_ONCE(nr_signals, nr_signals + 1);
}

static void signals_every_us(int us)
{
	struct sigaction sa = { .sa_handler = count_signal };
	struct itimerval it = {
		.it_interval = { .tv_usec = us },
		.it_value = { .tv_usec = us },
	};

	sigaction(SIGALRM, &sa, NULL);
	CHECK_OK(setitimer(ITIMER_REAL, &it, NULL));
}

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

TEST(slots_are_independent)
{
	struct mailbox mb = {
		.op = OP_WRITE, .gva = OTHER_GVA, .first = 100, .npages = 20, .step = 3,
	};
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct taker t = { .v = v, .got = set_new(v) };
	uint8_t *want = set_new(v), *got = set_new(v);
	struct dsr_ring ring[2];
	struct dsr other = *v;
	int i;

	vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, OTHER_GPA, OTHER_SLOT,
				    v->npages, KVM_MEM_LOG_DIRTY_PAGES);
	virt_map(v->vm, OTHER_GVA, OTHER_GPA, v->npages);
	other.fd = dsr_open(v->vm, OTHER_SLOT);
	CHECK_EQ(dsr_info(other.fd).slot, OTHER_SLOT);
	CHECK_EQ(dsr_info(other.fd).base_gfn, OTHER_GPA / PG);
	ring[0] = dsr_map(v->fd, 0);
	ring[1] = dsr_map(other.fd, 0);

	/* One ring overflows, the other does not notice. */
	guest_write(v, 0, 0, 200);
	guest_run(v, 0, mb);
	CHECK(dsr_overflowed(&ring[0]), "no overflow");
	CHECK_EQ(dsr_overflowed(&ring[1]), 0);
	CHECK_EQ(poll_log(other.fd, 0), 0);
	expect_step(&other, 100, 20, 3);
	expect(v, 0, 200);

	/* Harvested at the same time, each gets its own. */
	CHECK_OK(pthread_create(&t.thread, NULL, taker_thread, &t));
	for (i = 0; i < rounds(50); i++) {
		mb.first = i;
		guest_run(v, 0, mb);
		expect_step(&other, i, 20, 3);
	}
	guest_write(v, 0, 7, 77);
	WRITE_ONCE(t.stop, true);
	CHECK_OK(pthread_join(t.thread, NULL));
	harvest(v, got);
	set_add(want, 7, 77, 1);
	set_join(v, got, t.got);
	set_limit(got, 0, v->npages);
	set_check(v, got, want);

	dsr_unmap(&ring[0]);
	dsr_unmap(&ring[1]);
	close(other.fd);
	dsr_free(v);
}

/* -- lifetime ------------------------------------------------------------- */

/* The slot of this log is gone, its log holds @first and @n. */
static void check_dead(struct dsr *v, uint64_t first, uint64_t n, uint32_t cap)
{
	struct kvm_dirty_run run = { .offset = 0, .npages = 1 };
	uint8_t *got = set_new(v), *want = set_new(v);
	struct kvm_dirty_slot_log_info info;
	struct kvm_dirty_slot_reset reset;
	struct kvm_dirty_slot_runs args;

	info = dsr_info(v->fd);
	CHECK_EQ(info.flags, KVM_DIRTY_SLOT_LOG_DEAD);
	CHECK_EQ(info.npages, v->npages);
	CHECK_ERR(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_MARK, &run, 1, 0, &args), ENODEV);
	CHECK_ERR(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_DISCARD, &run, 1, 0, &args), ENODEV);
	if (n) {
		CHECK_EQ(poll_log(v->fd, 0), POLLIN | POLLHUP);
		set_add(want, first, n, 1);
		harvest_cap(v->fd, got, v->npages, 0, cap);
		set_check(v, got, want);
	}
	CHECK_EQ(poll_log(v->fd, 0), POLLHUP);
	CHECK_ERR(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, &run, 1, 0, &args), ENODEV);
	CHECK_ERR(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, &run, 1,
			     KVM_DIRTY_HARVEST_SYNC, &args), ENODEV);
	CHECK_ERR(__dsr_reset(v->fd, &reset), ENODEV);
	CHECK_EQ(dsr_info(v->fd).flags, KVM_DIRTY_SLOT_LOG_DEAD);
	free(got);
	free(want);
}

TEST(slot_deleted)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr old;

	guest_write(v, 0, 2, 150);
	vm_mem_region_delete(v->vm, TEST_SLOT);
	CHECK_ERR(__dsr_open(v->vm, TEST_SLOT), ENOENT);
	check_dead(v, 2, 150, MANY_RUNS);

	/* Made again it has a log of its own; the old one stays dead. */
	old = *v;
	vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, TEST_GPA, TEST_SLOT,
				    v->npages, KVM_MEM_LOG_DIRTY_PAGES);
	v->fd = dsr_open(v->vm, TEST_SLOT);
	CHECK_EQ(dsr_info(v->fd).flags, 0);
	guest_write(v, 0, 5, 100);
	check_dead(&old, 0, 0, 1);
	close(old.fd);
	expect(v, 5, 100);

	/* one run at a time, when dead */
	guest_write(v, 0, 5, 100);
	vm_mem_region_delete(v->vm, TEST_SLOT);
	check_dead(v, 5, 100, 1);
	dsr_free(v);
}

TEST(slot_deleted_empty)
{
	struct dsr *v = dsr_new(.nr_vcpus = 1);

	vm_mem_region_delete(v->vm, TEST_SLOT);
	check_dead(v, 0, 0, 1);
	dsr_free(v);
}

TEST(logging_off_and_on)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr old;
	int i;

	for (i = 0; i < 3; i++) {
		guest_write(v, 0, 10, 100);
		dsr_log(v, false);
		/* not logged by anyone */
		guest_write(v, 0, 0, v->npages);
		old = *v;
		v->fd = -1;
		dsr_log(v, true);
		dsr_reopen(v);
		guest_write(v, 0, 200, 30);
		check_dead(&old, 10, 100, MANY_RUNS);
		close(old.fd);
		expect(v, 200, 30);
	}
	dsr_free(v);
}

static void *manual_thread(void *arg)
{
	uint64_t both = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
	struct taker *t = arg;
	int i;

	for (i = 0; !READ_ONCE(t->stop); i++)
		vm_enable_cap(t->v->vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, i % 2 ? both : 0);
	return NULL;
}

/* All pages start dirty, or all are protected; never neither. */
TEST(logging_on_while_manual_protect_changes)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct taker t = { .v = v };
	pthread_t thread;
	uint8_t *got;
	int i, p;

	CHECK_OK(pthread_create(&thread, NULL, manual_thread, &t));
	for (i = 0; i < rounds(200); i++) {
		dsr_log(v, false);
		dsr_log(v, true);
		dsr_reopen(v);
		guest_write(v, 0, 7, 90);
		got = set_new(v);
		harvest_cap(v->fd, got, v->npages, 0, MANY_RUNS);
		for (p = 7; p < 97; p++)
			CHECK(got[p], "page %d is lost, the %dth time", p, i + 1);
		free(got);
	}
	WRITE_ONCE(t.stop, true);
	CHECK_OK(pthread_join(thread, NULL));
	dsr_free(v);
}

/* A dead log keeps what the reader of the mapping has not confirmed. */
TEST(slot_deleted_mapped)
{
	struct dsr *v = dsr_new(.entries = 256, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	struct kvm_dirty_run run;
	uint8_t *got = set_new(v), *want = set_new(v);
	uint64_t i;

	guest_write_step(v, 0, 0, 100, 2);
	vm_mem_region_delete(v->vm, TEST_SLOT);
	set_add(want, 0, 100, 2);
	for (i = 0; i < dsr_producer(&ring); i++) {
		run = dsr_entry(&ring, i);
		set_add(got, run.offset, run.npages, 1);
	}
	set_check(v, got, want);
	/* half of them by the mapping, the rest by HARVEST */
	i = dsr_producer(&ring) / 2;
	dsr_set_consumer(&ring, i);
	memset(got, 0, v->npages);
	while (i--) {
		run = dsr_entry(&ring, i);
		set_add(got, run.offset, run.npages, 1);
	}
	harvest(v, got);
	set_check(v, got, want);
	CHECK_EQ(poll_log(v->fd, 0), POLLHUP);
	dsr_unmap(&ring);
	free(got);
	free(want);
	dsr_free(v);
}

TEST(slot_moved)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct mailbox mb = { .op = OP_WRITE, .gva = MOVED_GVA, .first = 100, .npages = 200 };
	struct dsr_ring ring = dsr_map(v->fd, 0);

	virt_map(v->vm, MOVED_GVA, MOVED_GPA, v->npages);
	guest_write(v, 0, 0, 150);
	vm_mem_region_move(v->vm, TEST_SLOT, MOVED_GPA);
	CHECK_EQ(dsr_info(v->fd).base_gfn, MOVED_GPA / PG);
	CHECK_EQ(dsr_info(v->fd).flags, 0);
	guest_run(v, 0, mb);
	expect(v, 0, 300);
	guest_run(v, 0, mb);
	expect(v, 100, 200);
	markers_check(&ring);
	vm_mem_region_move(v->vm, TEST_SLOT, TEST_GPA);
	CHECK_EQ(dsr_info(v->fd).base_gfn, TEST_GPA / PG);
	expect_armed(v, 50, 400);
	dsr_unmap(&ring);
	dsr_free(v);
}

/* A dead log tells where its slot was last, though nobody asked meanwhile. */
TEST(slot_moved_then_deleted)
{
	struct dsr *v = dsr_new();
	int i;

	for (i = 0; i < 2; i++) {
		vm_mem_region_move(v->vm, TEST_SLOT, MOVED_GPA);
		if (i)
			dsr_log(v, false);
		else
			vm_mem_region_delete(v->vm, TEST_SLOT);
		CHECK_EQ(dsr_info(v->fd).base_gfn, MOVED_GPA / PG);
		check_dead(v, 0, 0, 1);
		if (i)
			break;
		vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, TEST_GPA, TEST_SLOT,
					    v->npages, KVM_MEM_LOG_DIRTY_PAGES);
		dsr_reopen(v);
		CHECK_EQ(dsr_info(v->fd).base_gfn, TEST_GPA / PG);
	}
	dsr_free(v);
}

/*
 * Slots come, move and go while another thread harvests.  Each generation's
 * pages are in that generation's log, once.
 */
struct churn {
	struct dsr *v;
	uint8_t *got;
	int fd;			/* -1: none, -2: finish */
	uint64_t calls;
};

static void *churn_thread(void *arg)
{
	struct churn *c = arg;
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_run runs[8];
	int fd, ret;

	while ((fd = __atomic_load_n(&c->fd, __ATOMIC_ACQUIRE)) != -2) {
		if (fd == -1) {
			sched_yield();
			continue;
		}
		ret = __dsr_runs(fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, ARRAY_SIZE(runs), 0, &args);
		c->calls++;
		if (!ret) {
			runs_take(c->got, c->v->npages, runs, &args, ARRAY_SIZE(runs));
			continue;
		}
		CHECK(errno == ENODEV, "HARVEST gave %d", ret);
		__atomic_store_n(&c->fd, -1, __ATOMIC_RELEASE);
	}
	return NULL;
}

TEST(slot_churn)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct mailbox mb = { .op = OP_WRITE, .gva = MOVED_GVA, .first = 300, .npages = 150 };
	struct churn c = { .v = v, .fd = -1, .got = set_new(v) };
	uint8_t *want = set_new(v);
	pthread_t thread;
	int i;

	virt_map(v->vm, MOVED_GVA, MOVED_GPA, v->npages);
	set_add(want, 0, 450, 1);
	CHECK_OK(pthread_create(&thread, NULL, churn_thread, &c));
	for (i = 0; i < rounds(60); i++) {
		__atomic_store_n(&c.fd, v->fd, __ATOMIC_RELEASE);
		guest_write(v, 0, 0, 150);
		CHECK_EQ(dsr_mark(v->fd, 150, 150), 150);
		if (i % 3) {
			vm_mem_region_move(v->vm, TEST_SLOT, MOVED_GPA);
			guest_run(v, 0, mb);
		} else {
			guest_write(v, 0, 300, 150);
		}
		if (i % 2)
			vm_mem_region_delete(v->vm, TEST_SLOT);
		else
			dsr_log(v, false);
		while (__atomic_load_n(&c.fd, __ATOMIC_ACQUIRE) != -1)
			sched_yield();
		set_limit(c.got, 0, 150);
		set_limit(c.got, 300, 150);
		set_check(v, c.got, want);
		memset(c.got, 0, v->npages);
		close(v->fd);
		if (i % 2) {
			vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, TEST_GPA,
						    TEST_SLOT, v->npages, KVM_MEM_LOG_DIRTY_PAGES);
		} else {
			vm_mem_region_move(v->vm, TEST_SLOT, TEST_GPA);
			dsr_log(v, true);
		}
		v->fd = dsr_open(v->vm, TEST_SLOT);
	}
	__atomic_store_n(&c.fd, -2, __ATOMIC_RELEASE);
	CHECK_OK(pthread_join(thread, NULL));
	CHECK(c.calls, "never harvested");
	free(c.got);
	free(want);
	dsr_free(v);
}

TEST(vcpu_added_later)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1, .max_vcpus = 2);
	struct kvm_dirty_slot_log_info info = dsr_info(v->fd);
	uint8_t *want = set_new(v), *got = set_new(v);
	struct kvm_dirty_run run;
	struct dsr_ring ring;
	uint64_t i;

	/* The ring may be mapped before it exists, but not touched. */
	ring = dsr_map(v->fd, 1);
	CHECK_EQ(probe(ring.user, false), SIGBUS);
	CHECK_EQ(probe(ring.user, true), SIGBUS);
	CHECK_EQ(probe((void *)ring.kern, false), SIGBUS);
	CHECK_EQ(probe((void *)ring.runs, false), SIGBUS);

	guest_write(v, 0, 0, 30);
	dsr_add_vcpu(v, 1);
	CHECK_EQ(dsr_info(v->fd).nr_rings, 2);
	CHECK_EQ(dsr_info(v->fd).stride, info.stride);
	CHECK_EQ(dsr_producer(&ring), 0);
	guest_write(v, 1, 20, 50);
	set_add(want, 30, 40, 1);
	for (i = 0; i < dsr_producer(&ring); i++) {
		run = dsr_entry(&ring, i);
		set_add(got, run.offset, run.npages, 1);
	}
	set_check(v, got, want);
	expect(v, 0, 70);
	guest_write(v, 1, 0, v->npages);
	expect(v, 0, v->npages);
	markers_check(&ring);
	dsr_unmap(&ring);
	free(got);
	free(want);
	dsr_free(v);
}

/* The new vCPU starts to write while someone harvests without a pause. */
TEST(vcpu_added_during_harvest)
{
	uint8_t *got, *want;
	struct taker t;
	struct dsr *v;
	int i;

	for (i = 0; i < rounds(20); i++) {
		v = dsr_new(.entries = 64, .nr_vcpus = 1, .max_vcpus = 2);
		got = set_new(v);
		want = set_new(v);
		t = (struct taker) { .v = v, .got = set_new(v) };
		CHECK_OK(pthread_create(&t.thread, NULL, taker_thread, &t));
		dsr_add_vcpu(v, 1);
		guest_write(v, 1, 0, 100);
		guest_write(v, 0, 200, 100);
		WRITE_ONCE(t.stop, true);
		CHECK_OK(pthread_join(t.thread, NULL));
		harvest(v, got);
		set_add(want, 0, 100, 1);
		set_add(want, 200, 100, 1);
		set_join(v, got, t.got);
		set_limit(got, 0, v->npages);
		set_check(v, got, want);
		free(t.got);
		free(got);
		free(want);
		dsr_free(v);
	}
}

TEST(vm_gone_before_log)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	int sig;

	guest_write(v, 0, 2, 150);
	kvm_vm_free(v->vm);
	CHECK(dsr_producer(&ring), "the ring went with the VM");
	sig = probe(ring.user, false);
	CHECK(!sig, "signal %d", sig);
	check_dead(v, 2, 150, MANY_RUNS);
	dsr_unmap(&ring);
	close(v->fd);
	free(v);
}

static void send_fd(int sock, int fd)
{
	char c = 0, buf[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { .iov_base = &c, .iov_len = 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = buf, .msg_controllen = sizeof(buf),
	};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(cmsg), &fd, sizeof(int));
	CHECK_EQ(sendmsg(sock, &msg, 0), 1);
}

static int recv_fd(int sock)
{
	char c, buf[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { .iov_base = &c, .iov_len = 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = buf, .msg_controllen = sizeof(buf),
	};
	struct cmsghdr *cmsg;
	int fd;

	CHECK_EQ(recvmsg(sock, &msg, 0), 1);
	cmsg = CMSG_FIRSTHDR(&msg);
	CHECK(cmsg && cmsg->cmsg_type == SCM_RIGHTS, "no descriptor came");
	memcpy(&fd, CMSG_DATA(cmsg), sizeof(int));
	return fd;
}

/* The same without anyone deleting the slots first, as when a VMM is killed. */
TEST(vmm_killed_before_log)
{
	struct dsr log = { .npages = DEFAULT_NPAGES };
	struct dsr *v;
	int sk[2];
	pid_t pid;

	CHECK_OK(socketpair(AF_UNIX, SOCK_STREAM, 0, sk));
	pid = fork();
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		v = dsr_new(.entries = 64, .nr_vcpus = 1);
		guest_write(v, 0, 2, 150);
		send_fd(sk[1], v->fd);
		for (;;)
			pause();
	}
	log.fd = recv_fd(sk[0]);
	CHECK_EQ(dsr_info(log.fd).flags, 0);
	kill(pid, SIGKILL);
	CHECK_EQ(waitpid(pid, NULL, 0), pid);
	CHECK(poll_log(log.fd, 10000) & POLLHUP, "no POLLHUP");
	check_dead(&log, 2, 150, 8);
	close(log.fd);
}

static void *close_thread(void *arg)
{
	struct taker *t = arg;
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_run runs[4];
	int ret;

	for (;;) {
		ret = __dsr_runs(t->v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, 4, 0, &args);
		if (ret)
			break;
		runs_take(t->got, t->v->npages, runs, &args, 4);
	}
	CHECK(errno == EBADF, "HARVEST gave %d", ret);
	return NULL;
}

TEST(closed_during_harvest)
{
	struct dsr *v = dsr_new(.entries = 64);
	uint8_t *want = set_new(v);
	struct taker t = { .v = v };
	int i, n, keep;

	set_add(want, 0, v->npages, 1);
	for (i = 0; i < rounds(100); i++) {
		t.got = set_new(v);
		keep = dsr_open(v->vm, TEST_SLOT);
		CHECK_OK(pthread_create(&t.thread, NULL, close_thread, &t));
		for (n = 0; n < v->npages; n++)
			dsr_mark(keep, n, 1);
		close(v->fd);
		CHECK_OK(pthread_join(t.thread, NULL));
		v->fd = keep;
		harvest(v, t.got);
		set_check(v, t.got, want);
		free(t.got);
	}
	free(want);
	dsr_free(v);
}

TEST(fork_shares_log_not_mapping)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	pid_t pid;

	guest_write(v, 0, 0, 100);
	pid = fork();
	if (!pid) {
		CHECK_EQ(probe((void *)ring.kern, false), SIGSEGV);
		CHECK_EQ(probe(ring.user, false), SIGSEGV);
		/* The VM is the parent's alone, the log is not. */
		CHECK_ERR(__dsr_open(v->vm, TEST_SLOT), EIO);
		ring = dsr_map(v->fd, 0);
		CHECK_EQ(dsr_producer(&ring), 64);
		expect(v, 0, 100);
		dsr_mark(v->fd, 200, 5);
		_exit(0);
	}
	child_check(pid);
	expect(v, 200, 5);
	CHECK_EQ(dsr_consumer(&ring), dsr_reset_marker(&ring));
	expect_armed(v, 0, 100);
	dsr_unmap(&ring);
	dsr_free(v);
}

/*
 * The holder of the descriptor need not have been there when the VM was made:
 * another process, with another mm and no VM descriptor.
 */
TEST(harvest_in_another_process)
{
	struct dsr remote = { .npages = DEFAULT_NPAGES };
	struct dsr_ring ring;
	uint8_t *got, *want;
	struct dsr *v;
	int sk[2];
	pid_t pid;
	char c;

	CHECK_OK(socketpair(AF_UNIX, SOCK_STREAM, 0, sk));
	got = mmap(NULL, DEFAULT_NPAGES, PROT_READ | PROT_WRITE,
		   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid = fork();
	if (!pid) {
		remote.fd = recv_fd(sk[1]);
		ring = dsr_map(remote.fd, 0);
		CHECK_EQ(dsr_info(remote.fd).slot, TEST_SLOT);
		CHECK(dsr_producer(&ring), "nothing in the ring");
		harvest_cap(remote.fd, got, remote.npages, KVM_DIRTY_HARVEST_SYNC, 10);
		CHECK_EQ(dsr_producer(&ring), dsr_consumer(&ring));
		CHECK_EQ(dsr_mark(remote.fd, 400, 10), 10);
		CHECK_EQ(dsr_mark(remote.fd, 300, 10), 10);
		CHECK_EQ(dsr_discard(remote.fd, 300, 10), 10);
		CHECK_EQ(dsr_reset(remote.fd), 0);
		CHECK_EQ(write(sk[1], "", 1), 1);
		_exit(0);
	}
	v = dsr_new(.entries = 64, .nr_vcpus = 1);
	want = set_new(v);
	guest_write(v, 0, 11, 200);
	set_add(want, 11, 200, 1);
	send_fd(sk[0], v->fd);
	CHECK_EQ(read(sk[0], &c, 1), 1);
	child_check(pid);
	set_check(v, got, want);
	/* What the other one took is armed again. */
	guest_write(v, 0, 11, 200);
	set_add(want, 400, 10, 1);
	expect_set(v, want);
	free(want);
	dsr_free(v);
}

/* -- the mapping ---------------------------------------------------------- */

TEST(map_reader)
{
	struct dsr *v = dsr_new(.entries = 256, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	uint8_t *want = set_new(v), *got;
	struct kvm_dirty_run run;
	uint64_t c, n, total = 0;
	int i;

	CHECK_EQ(dsr_producer(&ring), 0);
	CHECK_EQ(dsr_consumer(&ring), 0);
	CHECK_EQ(dsr_reset_marker(&ring), 0);
	CHECK_EQ(dsr_overflowed(&ring), 0);
	set_add(want, 0, 100, 3);
	for (i = 0; i < 20; i++) {
		got = set_new(v);
		guest_write_step(v, 0, 0, 100, 3);
		markers_check(&ring);
		for (c = dsr_consumer(&ring); c < dsr_producer(&ring); c++) {
			run = dsr_entry(&ring, c);
			CHECK(run.npages && run.offset + run.npages <= v->npages,
			      "entry %lu is %u+%u", c, run.offset, run.npages);
			set_add(got, run.offset, run.npages, 1);
		}
		set_check(v, got, want);
		/* In two steps: what is not collected is not reset. */
		n = dsr_consumer(&ring) + 10;
		dsr_set_consumer(&ring, n);
		total += dsr_reset(v->fd);
		CHECK_EQ(dsr_reset_marker(&ring), n);
		CHECK_EQ(dsr_consumer(&ring), n);
		dsr_set_consumer(&ring, c);
		total += dsr_reset(v->fd);
		CHECK_EQ(dsr_reset_marker(&ring), c);
		CHECK_EQ(total, 100 * (i + 1));
		CHECK_EQ(dsr_reset(v->fd), 0);
		CHECK_EQ(poll_log(v->fd, 0), 0);
		free(got);
	}
	expect_nothing(v);
	expect_armed(v, 0, v->npages);
	free(want);
	dsr_unmap(&ring);
	dsr_free(v);
}

/* A page that was collected but not reset is not armed: no second entry. */
TEST(map_collected_is_not_armed)
{
	struct dsr *v = dsr_new(.entries = 256, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);

	guest_write_step(v, 0, 0, 50, 2);
	dsr_set_consumer(&ring, dsr_producer(&ring));
	guest_write_step(v, 0, 0, 50, 2);
	CHECK_EQ(dsr_producer(&ring), dsr_consumer(&ring));
	CHECK_EQ(dsr_reset(v->fd), 50);
	guest_write_step(v, 0, 0, 50, 2);
	expect_step(v, 0, 50, 2);
	dsr_unmap(&ring);
	dsr_free(v);
}

TEST(map_harvest_does_not_repeat)
{
	struct dsr *v = dsr_new(.entries = 256, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	uint8_t *got = set_new(v), *want = set_new(v);
	struct kvm_dirty_run run;
	uint64_t c;

	guest_write_step(v, 0, 0, 100, 2);
	dsr_mark(v->fd, 400, 20);
	set_add(want, 0, 100, 2);
	set_add(want, 400, 20, 1);
	for (c = 0; c < 37; c++) {
		run = dsr_entry(&ring, c);
		set_add(got, run.offset, run.npages, 1);
	}
	dsr_set_consumer(&ring, c);
	harvest(v, got);
	set_check(v, got, want);
	CHECK_EQ(dsr_reset_marker(&ring), dsr_producer(&ring));
	CHECK_EQ(dsr_consumer(&ring), dsr_producer(&ring));
	expect_nothing(v);
	/* all of it collected */
	guest_write_step(v, 0, 0, 100, 2);
	dsr_set_consumer(&ring, dsr_producer(&ring));
	expect_nothing(v);
	expect_armed(v, 0, v->npages);
	dsr_unmap(&ring);
	free(got);
	free(want);
	dsr_free(v);
}

/* A reader that died half way is followed by one that starts again. */
TEST(map_consumer_moved_back)
{
	struct dsr *v = dsr_new(.entries = 256, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	uint64_t reset;

	guest_write_step(v, 0, 0, 60, 2);
	dsr_set_consumer(&ring, dsr_producer(&ring));
	dsr_reset(v->fd);

	reset = dsr_reset_marker(&ring);
	CHECK(reset, "reset did not move");
	guest_write_step(v, 0, 1, 100, 2);
	dsr_set_consumer(&ring, reset + 50);
	dsr_set_consumer(&ring, reset);
	CHECK_EQ(dsr_reset(v->fd), 0);
	CHECK_EQ(dsr_reset_marker(&ring), reset);
	expect_step(v, 1, 100, 2);
	dsr_unmap(&ring);
	dsr_free(v);
}

TEST(map_reset_tells_of_overflow)
{
	struct dsr *v = dsr_new(.entries = 2, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	struct kvm_dirty_slot_reset args;

	guest_write_step(v, 0, 0, 2, 2);
	CHECK_OK(__dsr_reset(v->fd, &args));
	CHECK_EQ(args.flags, 0);
	CHECK_EQ(dsr_overflowed(&ring), 0);

	guest_write_step(v, 0, 10, 5, 2);
	CHECK_EQ(dsr_overflowed(&ring), 5);
	dsr_set_consumer(&ring, 2);
	CHECK_OK(__dsr_reset(v->fd, &args));
	CHECK_EQ(args.flags, KVM_DIRTY_RESET_OVERFLOW);
	CHECK_EQ(args.nr_pages, 2);
	expect_step(v, 10, 5, 2);
	CHECK_OK(__dsr_reset(v->fd, &args));
	CHECK_EQ(args.flags, 0);
	CHECK_EQ(dsr_overflowed(&ring), 5);

	dsr_mark(v->fd, 1, 1);
	CHECK_OK(__dsr_reset(v->fd, &args));
	CHECK_EQ(args.flags, KVM_DIRTY_RESET_OVERFLOW);
	expect(v, 1, 1);
	expect_armed(v, 0, v->npages);
	dsr_unmap(&ring);
	dsr_free(v);
}

TEST(map_hostile_consumer)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 2);
	struct dsr_ring ring[2] = { dsr_map(v->fd, 0), dsr_map(v->fd, 1) };
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_slot_reset reset;
	struct kvm_dirty_run runs[8];
	uint8_t *want = set_new(v);
	uint64_t r[2], p[2], bad[9], good;
	int i, k;

	/* so that there is something below reset */
	guest_write(v, 0, 0, 30);
	guest_write(v, 1, 30, 30);
	expect(v, 0, 60);

	guest_write_step(v, 0, 0, 100, 2);
	guest_write_step(v, 1, 201, 40, 2);
	dsr_mark(v->fd, 400, 50);
	set_add(want, 0, 100, 2);
	set_add(want, 201, 40, 2);
	set_add(want, 400, 50, 1);
	for (k = 0; k < 2; k++) {
		p[k] = dsr_producer(&ring[k]);
		r[k] = dsr_reset_marker(&ring[k]);
	}
	for (k = 0; k < 2; k++) {
		good = dsr_consumer(&ring[k]);
		bad[0] = r[k] - 1;
		bad[1] = 0;
		bad[2] = p[k] + 1;
		bad[3] = p[k] + 64;
		bad[4] = p[k] + (1ull << 32);
		bad[5] = ~0ull;
		bad[6] = 1ull << 63;
		bad[7] = r[k] - 64;
		bad[8] = good + (1ull << 32);
		for (i = 0; i < ARRAY_SIZE(bad); i++) {
			dsr_set_consumer(&ring[k], bad[i]);
			CHECK_ERR(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, 8,
					     KVM_DIRTY_HARVEST_SYNC, &args), EINVAL);
			/* So that it can be made again, and means the same. */
			CHECK_EQ(args.nr_runs, 8);
			CHECK_EQ(args.flags, KVM_DIRTY_HARVEST_SYNC);
			CHECK_ERR(__dsr_reset(v->fd, &reset), EINVAL);
			CHECK_EQ(dsr_consumer(&ring[k]), bad[i]);
			CHECK_EQ(dsr_producer(&ring[0]), p[0]);
			CHECK_EQ(dsr_producer(&ring[1]), p[1]);
			CHECK_EQ(dsr_reset_marker(&ring[0]), r[0]);
			CHECK_EQ(dsr_reset_marker(&ring[1]), r[1]);
			/* The rest of the interface minds its own business. */
			dsr_info(v->fd);
			poll_log(v->fd, 0);
			CHECK_EQ(dsr_mark(v->fd, 400, 50), 0);
		}
		dsr_set_consumer(&ring[k], good);
	}
	expect_set(v, want);
	expect_armed(v, 0, v->npages);
	dsr_unmap(&ring[0]);
	dsr_unmap(&ring[1]);
	free(want);
	dsr_free(v);
}

static void *scribble_thread(void *arg)
{
	struct dsr_ring *ring = ((void **)arg)[0];
	bool *stop = ((void **)arg)[1];
	uint64_t x = 88172645463325252ull;

	while (!READ_ONCE(*stop)) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		/* Never a valid value: those would be a reader's word. */
		dsr_set_consumer(ring, x | 1ull << 40);
	}
	return NULL;
}

TEST(map_hostile_consumer_loop)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	bool stop = false;
	void *arg[2] = { &ring, &stop };
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_slot_reset reset;
	struct kvm_dirty_run runs[16];
	uint8_t *got = set_new(v), *want = set_new(v);
	int i, ret, nr = rounds(2000);
	pthread_t thread;

	CHECK_OK(pthread_create(&thread, NULL, scribble_thread, arg));
	for (i = 0; i < nr; i++) {
		if (!(i % 100))
			guest_write_step(v, 0, 0, 100, 2);
		ret = __dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, 16, 0, &args);
		CHECK(!ret || errno == EINVAL, "HARVEST gave %d", ret);
		if (!ret) {
			memset(got, 0, v->npages);
			runs_take(got, v->npages, runs, &args, 16);
		}
		ret = __dsr_reset(v->fd, &reset);
		CHECK(!ret || errno == EINVAL, "RESET gave %d", ret);
		CHECK(ret || !reset.nr_pages, "%llu pages that nobody collected", reset.nr_pages);
	}
	WRITE_ONCE(stop, true);
	CHECK_OK(pthread_join(thread, NULL));
	dsr_set_consumer(&ring, dsr_reset_marker(&ring));
	memset(got, 0, v->npages);
	harvest(v, got);

	/* The ring is as good as new. */
	guest_write_step(v, 0, 0, 100, 2);
	set_add(want, 0, 100, 2);
	expect_set(v, want);
	markers_check(&ring);
	expect_armed(v, 0, v->npages);
	dsr_unmap(&ring);
	free(got);
	free(want);
	dsr_free(v);
}

TEST(map_forbidden)
{
	struct dsr *v = dsr_new(.entries = 1024, .nr_vcpus = 2);
	uint64_t stride = dsr_info(v->fd).stride;
	const struct {
		uint64_t off;		/* in pages */
		uint64_t len;
		int prot;
		int flags;
		int err;		/* 0: allowed */
	} t[] = {
		{ 0, 1, PROT_READ | PROT_WRITE, MAP_SHARED, 0 },
		{ 0, 1, PROT_READ, MAP_SHARED, 0 },
		{ 0, 1, PROT_WRITE, MAP_SHARED, 0 },
		{ 1, 1, PROT_READ, MAP_SHARED, 0 },
		{ 2, 2, PROT_READ, MAP_SHARED, 0 },
		{ 0, 4, PROT_READ, MAP_SHARED, 0 },
		{ 1, 1, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ 1, 1, PROT_WRITE, MAP_SHARED, EPERM },
		{ 2, 1, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ 3, 1, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ 2, 2, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ 0, 2, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ 0, 4, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ 0, stride / PG, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ 0, 2 * stride / PG, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		/* from a consumer page up to the next one: both ends are good */
		{ 0, stride / PG + 1, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		/* from the last page of one ring to the first of the next */
		{ stride / PG - 1, 2, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ stride / PG, 1, PROT_READ | PROT_WRITE, MAP_SHARED, 0 },
		{ stride / PG + 1, 1, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ 0, 1, PROT_READ | PROT_EXEC, MAP_SHARED, EPERM },
		{ 1, 1, PROT_READ | PROT_EXEC, MAP_SHARED, EPERM },
		{ 2, 1, PROT_EXEC, MAP_SHARED, EPERM },
		{ 0, 1, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED, EPERM },
		{ 0, 1, PROT_READ | PROT_WRITE, MAP_PRIVATE, EINVAL },
		{ 0, 1, PROT_READ, MAP_PRIVATE, EINVAL },
		{ 1, 1, PROT_READ, MAP_PRIVATE, EINVAL },
		{ 1, 1, PROT_READ | PROT_WRITE, MAP_PRIVATE, EINVAL },
		{ 2, 1, PROT_READ, MAP_PRIVATE, EINVAL },
	};
	void *p;
	int i;

	for (i = 0; i < ARRAY_SIZE(t); i++) {
		errno = 0;
		p = mmap(NULL, t[i].len * PG, t[i].prot, t[i].flags, v->fd, t[i].off * PG);
		CHECK(t[i].err ? p == MAP_FAILED && errno == t[i].err : p != MAP_FAILED,
		      "row %d gave %p, expected %s", i, p, strerror(t[i].err));
		if (p != MAP_FAILED)
			munmap(p, t[i].len * PG);
	}
	dsr_free(v);
}

/* What cannot be mapped so cannot become so. */
TEST(map_cannot_be_changed)
{
	struct dsr *v = dsr_new(.entries = 1024, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	void *kern = (void *)ring.kern, *runs = (void *)ring.runs, *all, *p;
	size_t len = 4 * PG;
	uint64_t producer, x = 12345;
	int fd;

	guest_write_step(v, 0, 0, 50, 2);
	producer = dsr_producer(&ring);
	all = mmap(NULL, len, PROT_READ, MAP_SHARED, v->fd, 0);
	CHECK(all != MAP_FAILED, "no mapping");

	CHECK_ERR(mprotect(kern, PG, PROT_READ | PROT_WRITE), EACCES);
	CHECK_ERR(mprotect(runs, PG, PROT_READ | PROT_WRITE), EACCES);
	CHECK_ERR(mprotect(kern, ring.size, PROT_WRITE), EACCES);
	CHECK_ERR(mprotect(all, len, PROT_READ | PROT_WRITE), EACCES);
	CHECK_ERR(mprotect(all + PG, PG, PROT_READ | PROT_WRITE), EACCES);
	CHECK_ERR(mprotect(kern, PG, PROT_READ | PROT_EXEC), EACCES);
	CHECK_ERR(mprotect(ring.user, PG, PROT_READ | PROT_EXEC), EACCES);
	CHECK_ERR(mprotect(ring.user, PG, PROT_READ | PROT_WRITE | PROT_EXEC), EACCES);

	CHECK_ERR((long)mremap(ring.user, PG, 2 * PG, MREMAP_MAYMOVE), EFAULT);
	CHECK_ERR((long)mremap(ring.user, PG, 4 * PG, 0), EFAULT);
	/* a length of 0 asks for a second mapping of the same pages */
	p = mremap(ring.user, 0, 2 * PG, MREMAP_MAYMOVE);
	CHECK(p == MAP_FAILED, "a second and longer mapping");

	CHECK_EQ(probe(kern, true), SIGSEGV);
	CHECK_EQ(probe(runs, true), SIGSEGV);
	CHECK_EQ(probe(all, true), SIGSEGV);

	/* by ways that do not ask the page tables */
	fd = open("/proc/self/mem", O_RDWR);
	CHECK(fd >= 0, "no /proc/self/mem");
	CHECK(pwrite(fd, &x, 8, (off_t)(uintptr_t)kern) == -1, "kernel page written");
	CHECK(pwrite(fd, &x, 8, (off_t)(uintptr_t)runs) == -1, "entries written");
	CHECK(pwrite(fd, &x, 8, (off_t)(uintptr_t)all) == -1, "read-only consumer written");
	close(fd);
	fd = open("/dev/zero", O_RDONLY);
	CHECK(fd >= 0, "no /dev/zero");
	CHECK_ERR(read(fd, kern, 8), EFAULT);
	CHECK_ERR(read(fd, runs, 8), EFAULT);
	close(fd);

	CHECK_EQ(dsr_producer(&ring), producer);
	CHECK(READ_ONCE(*(uint64_t *)(all + PG)) == producer, "another kernel page");

	/* This moves the writable mapping on to the kernel page, if it may. */
	CHECK(syscall(SYS_remap_file_pages, ring.user, PG, 0, 1, 0), "remapped to kernel page");
	munmap(ring.user, PG);
	ring.user = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
	CHECK(ring.user != MAP_FAILED, "no mapping");
	markers_check(&ring);
	CHECK_EQ(dsr_producer(&ring), producer);
	expect_step(v, 0, 50, 2);
	munmap(all, len);
	dsr_unmap(&ring);
	dsr_free(v);
}

TEST(map_beyond_is_sigbus)
{
	struct dsr *v = dsr_new(.entries = 512, .nr_vcpus = 2);
	uint64_t stride = dsr_info(v->fd).stride, off;
	const uint64_t rings[] = { 2, 3, 8, 1000, 1 << 20, 1ull << 32 };
	void *p;
	int i, pg;

	/* All of what exists is there, */
	for (off = 0; off < 2 * stride; off += stride) {
		for (pg = 0; pg < 3; pg++) {
			p = mmap(NULL, PG, PROT_READ, MAP_SHARED, v->fd, off + pg * PG);
			CHECK(p != MAP_FAILED, "no mapping");
			CHECK_EQ(probe(p, false), 0);
			munmap(p, PG);
		}
	}
	/* what does not is not. */
	for (i = 0; i < ARRAY_SIZE(rings); i++) {
		for (pg = 0; pg < 3; pg++) {
			p = mmap(NULL, PG, PROT_READ, MAP_SHARED, v->fd,
				 rings[i] * stride + pg * PG);
			if (p == MAP_FAILED)
				continue;
			CHECK_EQ(probe(p, false), SIGBUS);
			munmap(p, PG);
		}
	}
	/* one mapping across the end */
	p = mmap(NULL, 3 * stride, PROT_READ, MAP_SHARED, v->fd, 0);
	CHECK(p != MAP_FAILED, "no mapping");
	CHECK_EQ(probe(p + stride, false), 0);
	CHECK_EQ(probe(p + 2 * stride, false), SIGBUS);
	munmap(p, 3 * stride);
	dsr_free(v);
}

TEST(map_outlives_fd)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);

	close(v->fd);
	v->fd = -1;
	guest_write_step(v, 0, 0, 20, 2);
	CHECK(dsr_producer(&ring), "nothing came");
	/* The slot's log lives on without an open descriptor. */
	dsr_reopen(v);
	expect_step(v, 0, 20, 2);
	CHECK_EQ(dsr_consumer(&ring), dsr_producer(&ring));
	dsr_unmap(&ring);
	dsr_free(v);
}

/* -- exit on full --------------------------------------------------------- */

static void check_full_exit(struct dsr *v, struct dsr_ring *ring)
{
	struct kvm_run *run = v->vcpu[0]->run;

	CHECK_EQ(run->exit_reason, KVM_EXIT_DIRTY_SLOT_RING_FULL);
	CHECK_EQ(run->dirty_slot_ring.slot, TEST_SLOT);
	CHECK_EQ(run->dirty_slot_ring.pad, 0);
	/* for a VMM whose kvm.h knows no dirty_slot_ring */
	CHECK_EQ(*(uint32_t *)&run->hw, TEST_SLOT);
	CHECK_EQ(dsr_producer(ring) - dsr_reset_marker(ring), ring->entries);
}

static void check_exit_on_full(uint32_t entries, bool mapped)
{
	struct dsr *v = dsr_new(.entries = entries, .nr_vcpus = 1,
				.flags = KVM_DIRTY_SLOT_RING_EXIT_ON_FULL);
	struct mailbox mb = { .op = OP_WRITE, .npages = 200, .step = 2 };
	struct dsr_ring ring = dsr_map(v->fd, 0);
	uint8_t *want = set_new(v), *got;
	uint64_t done, producer, overflowed, i, c;
	struct kvm_dirty_slot_reset args;
	struct kvm_dirty_run run;
	int exits = 0, round;

	set_add(want, 0, 200, 2);
	for (round = 0; round < 3; round++) {
		got = set_new(v);
		guest_set(v, 0, mb);
		for (; !run_vcpu(v->vcpu[0]); exits++) {
			check_full_exit(v, &ring);

			/* Full is full, however often one asks. */
			done = v->mb[0]->done;
			producer = dsr_producer(&ring);
			overflowed = dsr_overflowed(&ring);
			for (i = 0; i < 3; i++) {
				CHECK(!run_vcpu(v->vcpu[0]), "ran with a full ring");
				check_full_exit(v, &ring);
			}
			if (mapped) {
				/* collected is not reset */
				for (c = dsr_consumer(&ring); c < producer; c++) {
					run = dsr_entry(&ring, c);
					set_add(got, run.offset, run.npages, 1);
				}
				dsr_set_consumer(&ring, c);
				CHECK(!run_vcpu(v->vcpu[0]), "ran with a full ring");
			}
			CHECK_EQ(v->mb[0]->done, done);
			CHECK_EQ(dsr_producer(&ring), producer);
			CHECK_EQ(dsr_overflowed(&ring), overflowed);
			if (mapped) {
				CHECK_OK(__dsr_reset(v->fd, &args));
				CHECK(args.nr_pages <= entries, "%llu pages", args.nr_pages);
				if (args.flags & KVM_DIRTY_RESET_OVERFLOW)
					harvest(v, got);
			} else {
				harvest(v, got);
			}
		}
		/* Pages that hardware logs show at the last exit, or the next. */
		if (dsr_producer(&ring) - dsr_reset_marker(&ring) == entries) {
			CHECK(!run_vcpu(v->vcpu[0]), "ran with a full ring");
			check_full_exit(v, &ring);
			exits++;
		}
		harvest(v, got);
		/*
		 * The page that filled the ring is logged before it is written,
		 * so it may be logged again when the instruction is resumed.
		 */
		for (i = 0; i < v->npages; i++)
			CHECK(!got[i] == !want[i] && got[i] <= 2, "page %lu: %u times", i, got[i]);
		free(got);
		CHECK(exits > round, "never full in round %d", round);
	}
	free(want);
	dsr_unmap(&ring);
	dsr_free(v);
}

TEST(exit_on_full_harvest)
{
	check_exit_on_full(64, false);
	check_exit_on_full(16, false);
}

TEST(exit_on_full_reset)
{
	check_exit_on_full(64, true);
}

TEST(exit_on_full_not_full)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1,
				.flags = KVM_DIRTY_SLOT_RING_EXIT_ON_FULL);
	int i;

	/* Never full, never out; and MARK fills no ring. */
	for (i = 0; i < 10; i++) {
		guest_write(v, 0, i * 10, 63);
		expect(v, i * 10, 63);
	}
	dsr_mark(v->fd, 0, v->npages);
	guest_write(v, 0, 0, v->npages);
	expect(v, 0, v->npages);
	dsr_free(v);
}

static bool ring_full(const struct dsr_ring *ring)
{
	return dsr_producer(ring) - dsr_reset_marker(ring) == ring->entries;
}

/*
 * Two slots, and hardware that hands over pages by the hundred may fill the
 * rings of both at once: a vCPU runs when neither is full.
 */
TEST(exit_on_full_two_slots)
{
	struct dsr *v = dsr_new(.entries = 16, .nr_vcpus = 1,
				.flags = KVM_DIRTY_SLOT_RING_EXIT_ON_FULL);
	struct mailbox mb = { .op = OP_WRITE, .twin = OTHER_GVA, .npages = 40 };
	struct kvm_run *run = v->vcpu[0]->run;
	uint8_t *got[2] = { set_new(v), set_new(v) };
	struct dsr other = *v, *slots[2] = { v, &other };
	struct dsr_ring ring[2];
	int round, i, k, both = 0, exits = 0;
	bool done;

	vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, OTHER_GPA, OTHER_SLOT,
				    v->npages, KVM_MEM_LOG_DIRTY_PAGES);
	virt_map(v->vm, OTHER_GVA, OTHER_GPA, v->npages);
	other.fd = dsr_open(v->vm, OTHER_SLOT);
	ring[0] = dsr_map(v->fd, 0);
	ring[1] = dsr_map(other.fd, 0);

	/* The first time maps the pages, the others find them mapped. */
	for (round = 0; round < 4; round++) {
		guest_set(v, 0, mb);
		done = false;
		while (!done || ring_full(&ring[0]) || ring_full(&ring[1])) {
			k = ring_full(&ring[0]) || ring_full(&ring[1]);
			both += ring_full(&ring[0]) && ring_full(&ring[1]);
			if (run_vcpu(v->vcpu[0])) {
				CHECK(!k, "ran with a full ring");
				done = true;
				continue;
			}
			exits++;
			k = run->dirty_slot_ring.slot == OTHER_SLOT;
			CHECK(k || run->dirty_slot_ring.slot == TEST_SLOT,
			      "slot %u", run->dirty_slot_ring.slot);
			CHECK(ring_full(&ring[k]), "slot %u is not full",
			      run->dirty_slot_ring.slot);
			/* Only what it names is emptied. */
			harvest(slots[k], got[k]);
		}
		harvest(v, got[0]);
		harvest(&other, got[1]);
	}
	CHECK(exits, "never full");
	for (k = 0; k < 2; k++)
		for (i = 0; i < v->npages; i++)
			CHECK(i < 40 ? got[k][i] >= round : !got[k][i], "slot %d page %d: %d times",
			      k, i, got[k][i]);
	TH_LOG("%d exits, %d times both were full", exits, both);
	dsr_unmap(&ring[0]);
	dsr_unmap(&ring[1]);
	close(other.fd);
	dsr_free(v);
}

/* A full ring of a slot that is gone holds nobody up. */
TEST(exit_on_full_slot_deleted)
{
	struct dsr *v = dsr_new(.entries = 16, .nr_vcpus = 1,
				.flags = KVM_DIRTY_SLOT_RING_EXIT_ON_FULL);

	guest_set(v, 0, (struct mailbox){ .op = OP_WRITE, .npages = 100 });
	CHECK(!run_vcpu(v->vcpu[0]), "never full");
	dsr_log(v, false);
	CHECK(run_vcpu(v->vcpu[0]), "still full");
	CHECK_EQ(v->mb[0]->done, 100);
	dsr_free(v);
}

/* -- mark and discard ----------------------------------------------------- */

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
			x ^= x << 13;
			x ^= x >> 7;
			x ^= x << 17;
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

/* -- poll ----------------------------------------------------------------- */

TEST(poll_half_full)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	int i;

	for (i = 0; i < 3; i++) {
		CHECK_EQ(poll_log(v->fd, 0), 0);
		guest_write_step(v, 0, 0, 30, 2);
		CHECK_EQ(poll_log(v->fd, 0), 0);
		guest_write_step(v, 0, 100, 10, 2);
		CHECK_EQ(poll_log(v->fd, 0), POLLIN);
		harvest(v, set_new(v));
	}
	CHECK_EQ(poll_log(v->fd, 0), 0);
	dsr_free(v);
}

TEST(poll_overflow)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);

	CHECK_EQ(poll_log(v->fd, 0), 0);
	dsr_mark(v->fd, 77, 1);
	CHECK_EQ(poll_log(v->fd, 0), POLLIN);
	expect(v, 77, 1);
	CHECK_EQ(poll_log(v->fd, 0), 0);
	guest_write(v, 0, 0, 100);
	CHECK_EQ(poll_log(v->fd, 0), POLLIN);
	expect(v, 0, 100);
	CHECK_EQ(poll_log(v->fd, 0), 0);
	dsr_free(v);
}

static void *poll_thread(void *arg)
{
	struct taker *t = arg;

	t->nr = poll_log(t->v->fd, 60000);
	return NULL;
}

/* A poller that is asleep already wakes up, for each of the reasons. */
TEST(poll_wakes)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct taker t = { .v = v };
	int i;

	for (i = 0; i < 4; i++) {
		CHECK_EQ(poll_log(v->fd, 0), 0);
		t.nr = -1;
		CHECK_OK(pthread_create(&t.thread, NULL, poll_thread, &t));
		sleep_ms(50);
		CHECK_EQ((int)READ_ONCE(t.nr), -1);
		switch (i) {
		case 0:
			guest_write_step(v, 0, 0, 40, 2);
			break;
		case 1:
			dsr_mark(v->fd, 9, 1);
			break;
		case 2:
			guest_write(v, 0, 0, 70);
			break;
		case 3:
			dsr_log(v, false);
			break;
		}
		CHECK_OK(pthread_join(t.thread, NULL));
		CHECK_EQ(t.nr, i == 3 ? POLLHUP : POLLIN);
		if (i != 3)
			harvest(v, set_new(v));
	}
	dsr_free(v);
}

/* A poll() that has not come back by now sleeps on a log that is readable. */
#define WAKE_UP_MS	15000

static void *poll_and_harvest_thread(void *arg)
{
	struct taker *t = arg;
	uint64_t n;

	while (!READ_ONCE(t->stop)) {
		poll_log(t->v->fd, 4 * WAKE_UP_MS);
		n = harvest_cap(t->v->fd, t->got, t->v->npages, 0, 64);
		__atomic_fetch_add(&t->nr, n, __ATOMIC_RELEASE);
	}
	return NULL;
}

/*
 * Pages are marked while the harvest that the page before them called for takes
 * that one out.  Who of the two has the poller woken is for the kernel to know:
 * each page marked has to be harvested, and no further mark comes to the rescue.
 */
TEST(poll_wakes_for_marks)
{
	/* the top of the overflow log is one word of 16 bits */
	struct dsr *v = dsr_new(.npages = 16 * 64 * 64);
	struct taker t = { .v = v, .got = set_new(v) };
	uint64_t marked = 0, calls = 0, since, end = now_ms() + (quick ? 500 : 5000);
	int i;

	CHECK_OK(pthread_create(&t.thread, NULL, poll_and_harvest_thread, &t));
	while (now_ms() < end) {
		for (i = random() % 4; i >= 0; i--, calls++) {
			marked += dsr_mark(v->fd, random() % v->npages, 1);
			dither(400);
		}
		since = now_ms();
		while (__atomic_load_n(&t.nr, __ATOMIC_ACQUIRE) != marked) {
			CHECK(now_ms() - since < WAKE_UP_MS,
			      "poll() sleeps: %lu marked, %lu harvested, readable: %d",
			      marked, t.nr, poll_log(v->fd, 0));
			sched_yield();
		}
	}
	WRITE_ONCE(t.stop, true);
	dsr_mark(v->fd, 0, 1);
	CHECK_OK(pthread_join(t.thread, NULL));
	CHECK(marked, "no page marked");
	TH_LOG("%lu pages, each harvested", marked);
	expect_nothing(v);
	free(t.got);
	dsr_free(v);
}

/* Keeps the ring one entry below half full, which is when poll() sleeps. */
static void *poll_and_reset_thread(void *arg)
{
	struct taker *t = arg;
	struct dsr_ring ring = dsr_map(t->v->fd, 0);
	uint64_t keep = ring.entries / 2 - 1, reset, used;

	while (!READ_ONCE(t->stop)) {
		poll_log(t->v->fd, 4 * WAKE_UP_MS);
		reset = dsr_reset_marker(&ring);
		used = dsr_producer(&ring) - reset;
		if (used <= keep)
			continue;
		dsr_set_consumer(&ring, reset + used - keep);
		CHECK_EQ(dsr_reset(t->v->fd), used - keep);
		t->nr++;
	}
	dsr_unmap(&ring);
	return NULL;
}

/*
 * A vCPU pushes while RESET makes room, and poll() looks: the page that makes
 * the ring half full again wakes it, whichever of the three came first.
 */
TEST(poll_wakes_though_reset)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	struct taker t = { .v = v };
	uint64_t n = 0, since, end = now_ms() + (quick ? 500 : 5000);
	int i;

	CHECK_OK(pthread_create(&t.thread, NULL, poll_and_reset_thread, &t));
	guest_start(v, 0, (struct mailbox){ .op = OP_BATCHES, .npages = 1 });
	while (now_ms() < end) {
		for (i = random() % 4; i >= 0; i--) {
			/* long since reset, so that it is logged */
			WRITE_ONCE(v->mb[0]->first, n++ % v->npages);
			guest_batch(v, 0);
			dither(200);
		}
		since = now_ms();
		while (dsr_producer(&ring) - dsr_reset_marker(&ring) >= ring.entries / 2) {
			CHECK(now_ms() - since < WAKE_UP_MS,
			      "poll() sleeps: %lu entries, readable: %d",
			      dsr_producer(&ring) - dsr_reset_marker(&ring),
			      poll_log(v->fd, 0));
			sched_yield();
		}
	}
	guest_join(v, 0);
	CHECK_EQ(dsr_overflowed(&ring), 0);
	WRITE_ONCE(t.stop, true);
	dsr_mark(v->fd, 0, 1);
	CHECK_OK(pthread_join(t.thread, NULL));
	CHECK(quick || t.nr, "the ring was never half full");
	TH_LOG("%lu pages written, woken up %lu times", n, t.nr);
	dsr_unmap(&ring);
	dsr_free(v);
}

/* -- who else writes ------------------------------------------------------ */

/* The emulator stores for the guest. */
TEST(write_by_emulator)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	uint8_t *mem = addr_gpa2hva(v->vm, TEST_GPA);
	int i;

	for (i = 0; i < 3; i++) {
		mem[123 * PG] = 0;
		guest_run(v, 0, (struct mailbox){ .op = OP_INS, .first = 123 });
		CHECK_EQ(mem[123 * PG], 0x5a);
		expect(v, 123, 1);
	}
	dsr_free(v);
}

/* vcpu_set_msr() reads it back, and has a variable v of its own */
static void set_msr(struct kvm_vcpu *vcpu, uint32_t msr, uint64_t value)
{
	CHECK(_vcpu_set_msr(vcpu, msr, value) == 1, "MSR %#x refuses %#lx", msr, value);
}

/* KVM's own pages in the guest, written with the vCPU running and without. */
TEST(write_by_kvm)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	uint32_t *mem = addr_gpa2hva(v->vm, TEST_GPA);
	uint8_t *got, *want = set_new(v);
	int i;

	for (i = 0; i < 3; i++) {
		/* right in the ioctl */
		mem[20 * PG / 4] = 0;
		set_msr(v->vcpu[0], MSR_KVM_WALL_CLOCK_NEW, TEST_GPA + 20 * PG);
		CHECK(mem[20 * PG / 4], "no wall clock written");
		expect(v, 20, 1);

		/* on the way into the guest */
		mem[30 * PG / 4] = 0;
		set_msr(v->vcpu[0], MSR_KVM_SYSTEM_TIME_NEW, TEST_GPA + 30 * PG + 1);
		guest_write(v, 0, 10, 1);
		CHECK(mem[30 * PG / 4], "no system time written");
		got = set_new(v);
		harvest(v, got);
		memset(want, 0, v->npages);
		set_add(want, 10, 1, 1);
		set_add(want, 30, 1, 1);
		set_check(v, got, want);
		free(got);
		set_msr(v->vcpu[0], MSR_KVM_SYSTEM_TIME_NEW, 0);
	}
	free(want);
	dsr_free(v);
}

/* Stolen time is written on the way in, and when the vCPU's thread is scheduled out. */
TEST(write_by_kvm_steal_time)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	uint64_t *mem = addr_gpa2hva(v->vm, TEST_GPA + 40 * PG), copy[8] = { 0 };
	uint8_t *got = set_new(v);
	int i, k;

	/* The feature bit is KVM's to check; without it the MSR is refused. */
	if (!_vcpu_set_msr(v->vcpu[0], MSR_KVM_STEAL_TIME, (TEST_GPA + 40 * PG) | 1))
		SKIP(return, "no stolen time here");

	for (i = 0; i < rounds(100); i++) {
		guest_write(v, 0, 0, 5);
		memset(got, 0, v->npages);
		harvest(v, got);
		/* The copy is right whenever the log says nothing. */
		if (got[40])
			memcpy(copy, mem, sizeof(copy));
		CHECK(!memcmp(copy, mem, sizeof(copy)), "page written and not logged");
		for (k = 0; k < v->npages; k++)
			CHECK(got[k] == (k < 5) || k == 40, "page %d: %d times", k, got[k]);
	}
	CHECK(copy[1] & ~0ull >> 32, "no stolen time written");
	free(got);
	dsr_free(v);
}

#define SMRAM_GPA	0x1000000ul
#define SMRAM_SIZE	0x10000ul
#define SMI_HANDLER	0x8000

/* The same gfn in two address spaces is two pages, and two logs. */
TEST(smm_has_its_own_log)
{
	uint8_t handler[] = {
		0xb0, 0x5a,				/* mov $0x5a, %al */
		0x67, 0xa2, 0, 0, 0, 0,			/* mov %al, (32-bit address) */
		0x0f, 0xaa,				/* rsm */
	};
	const uint32_t addr = TEST_GPA + 33 * PG, slot = 1 << 16 | TEST_SLOT;
	struct kvm_vcpu_events events;
	struct dsr *v, smm;
	uint8_t *mem;
	void *smram;
	int i;

	if (!kvm_has_cap(KVM_CAP_X86_SMM) || kvm_check_cap(KVM_CAP_MULTI_ADDRESS_SPACE) < 2)
		SKIP(return, "no SMM");

	v = dsr_new(.entries = 64, .nr_vcpus = 1);
	mem = mmap(NULL, v->npages * PG, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	smram = mmap(NULL, SMRAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memcpy(&handler[4], &addr, 4);
	memcpy(smram + SMI_HANDLER, handler, sizeof(handler));
	vm_set_user_memory_region(v->vm, 1 << 16 | 1, 0, SMRAM_GPA, SMRAM_SIZE, smram);
	vm_set_user_memory_region(v->vm, slot, KVM_MEM_LOG_DIRTY_PAGES, TEST_GPA,
				  v->npages * PG, mem);
	smm = *v;
	smm.fd = dsr_open(v->vm, slot);
	CHECK_EQ(dsr_info(smm.fd).slot, slot);
	CHECK_EQ(dsr_info(smm.fd).base_gfn, TEST_GPA / PG);
	set_msr(v->vcpu[0], MSR_IA32_SMBASE, SMRAM_GPA);

	for (i = 0; i < 3; i++) {
		mem[33 * PG] = 0;
		vcpu_events_get(v->vcpu[0], &events);
		events.smi.pending = 1;
		events.flags |= KVM_VCPUEVENT_VALID_SMM;
		vcpu_events_set(v->vcpu[0], &events);
		guest_write(v, 0, 34, 2);
		CHECK_EQ(mem[33 * PG], 0x5a);
		expect(&smm, 33, 1);
		expect(v, 34, 2);

		CHECK_EQ(dsr_mark(smm.fd, 34, 1), 1);
		expect_nothing(v);
		expect(&smm, 34, 1);
	}
	vm_set_user_memory_region(v->vm, slot, 0, TEST_GPA, 0, mem);
	check_dead(&smm, 0, 0, 1);
	expect_armed(v, 0, v->npages);
	close(smm.fd);
	dsr_free(v);
}

/* A guest of the guest: KVM tracks its pages by rmap, and through shadow page tables. */
static void l2_svm_main(void)
{
	guest_do(&mailboxes[0]);
	vmmcall();
}

static void l2_vmx_main(void)
{
	guest_do(&mailboxes[0]);
	vmcall();
}

static uint64_t l2_stack[512];

static void l1_svm_main(struct svm_test_data *svm, uint64_t ncr3)
{
	for (;;) {
		generic_svm_setup(svm, l2_svm_main, &l2_stack[500]);
		svm->vmcb->control.nested_ctl = ncr3 ? SVM_NESTED_CTL_NP_ENABLE : 0;
		svm->vmcb->control.nested_cr3 = ncr3;
		run_guest(svm->vmcb, svm->vmcb_gpa);
		GUEST_ASSERT_EQ(svm->vmcb->control.exit_code, SVM_EXIT_VMMCALL);
		guest_exit();
	}
}

/* What else L1 gives L2. */
static struct {
	uint64_t apic_gpa;	/* a virtual-APIC page, for its TPR; 0 for none */
	bool shadow_vmcs;
} vmx_extras;

static void l1_vmx_main(struct vmx_pages *vmx)
{
	GUEST_ASSERT(prepare_for_vmx_operation(vmx));
	GUEST_ASSERT(load_vmcs(vmx));
	prepare_vmcs(vmx, l2_vmx_main, &l2_stack[500]);
	if (vmx_extras.apic_gpa) {
		vmwrite(CPU_BASED_VM_EXEC_CONTROL,
			vmreadz(CPU_BASED_VM_EXEC_CONTROL) | CPU_BASED_TPR_SHADOW);
		vmwrite(VIRTUAL_APIC_PAGE_ADDR, vmx_extras.apic_gpa);
	}
	if (vmx_extras.shadow_vmcs) {
		vmwrite(SECONDARY_VM_EXEC_CONTROL,
			vmreadz(SECONDARY_VM_EXEC_CONTROL) | SECONDARY_EXEC_SHADOW_VMCS);
		vmwrite(VMCS_LINK_POINTER, vmx->shadow_vmcs_gpa);
	}
	GUEST_ASSERT(!vmlaunch());
	for (;;) {
		GUEST_ASSERT_EQ(vmreadz(VM_EXIT_REASON), EXIT_REASON_VMCALL);
		guest_exit();
		GUEST_ASSERT(!vmwrite(GUEST_RIP, (u64)l2_vmx_main));
		GUEST_ASSERT(!vmwrite(GUEST_RSP, (u64)&l2_stack[500]));
		GUEST_ASSERT(!vmresume());
	}
}

/* An identity map of the first gigabyte, in pages of 2 MiB. */
static uint64_t make_npt(struct kvm_vm *vm)
{
	vm_vaddr_t gva = vm_vaddr_alloc_pages(vm, 3);
	uint64_t *pt = addr_gva2hva(vm, gva), i;
	uint64_t pa[3];

	for (i = 0; i < 3; i++)
		pa[i] = addr_gva2gpa(vm, gva + i * PG);
	memset(pt, 0, 3 * PG);
	*(uint64_t *)addr_gpa2hva(vm, pa[0]) = pa[1] | 0x67;
	*(uint64_t *)addr_gpa2hva(vm, pa[1]) = pa[2] | 0x67;
	pt = addr_gpa2hva(vm, pa[2]);
	for (i = 0; i < 512; i++)
		pt[i] = i << 21 | 0xe7;
	return pa[0];
}

/* What vCPU 0 is told to do, a guest of its own does.  L1's pages for VMX, or NULL. */
static struct vmx_pages *run_nested(struct dsr *v, bool two_dimensional, uint64_t other_gpa)
{
	struct vmx_pages *nested = NULL;
	vm_vaddr_t gva;

	if (kvm_cpu_has(X86_FEATURE_SVM)) {
		vcpu_alloc_svm(v->vm, &gva);
		vcpu_arch_set_entry_point(v->vcpu[0], l1_svm_main);
		vcpu_args_set(v->vcpu[0], 2, gva, two_dimensional ? make_npt(v->vm) : 0);
	} else {
		nested = vcpu_alloc_vmx(v->vm, &gva);
		if (two_dimensional) {
			prepare_eptp(nested, v->vm, 0);
			nested_map_memslot(nested, v->vm, 0);
			nested_map(nested, v->vm, TEST_GPA, TEST_GPA, v->npages * PG);
			if (other_gpa)
				nested_map(nested, v->vm, other_gpa, other_gpa, v->npages * PG);
		}
		vcpu_arch_set_entry_point(v->vcpu[0], l1_vmx_main);
		vcpu_args_set(v->vcpu[0], 1, gva);
		sync_global_to_guest(v->vm, vmx_extras);
	}
	return nested;
}

static void check_nested(bool two_dimensional)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct mailbox mb = { .op = OP_BATCHES, .npages = 50 };
	uint8_t *want = set_new(v);
	int i;

	run_nested(v, two_dimensional, 0);
	for (i = 0; i < 3; i++) {
		guest_write(v, 0, 0, 200);
		expect(v, 0, 200);
		guest_write_step(v, 0, 1, 30, 7);
		expect_step(v, 1, 30, 7);
		guest_write(v, 0, 9, 3);
		CHECK_EQ(dsr_discard(v->fd, 10, 1), 1);
		guest_write(v, 0, 10, 1);
		expect(v, 9, 3);
	}
	/* and while it stays inside */
	set_add(want, 0, 50, 1);
	guest_start(v, 0, mb);
	check_sync_batches(v, want, 50);
	guest_join(v, 0);
	free(want);
	dsr_free(v);
}

static bool nested_supported(void)
{
	return kvm_has_cap(KVM_CAP_NESTED_STATE) &&
	       (kvm_cpu_has(X86_FEATURE_SVM) || kvm_cpu_has(X86_FEATURE_VMX));
}

TEST(nested)
{
	if (!nested_supported())
		SKIP(return, "no nested virtualization");
	check_nested(false);
}

static bool nested_paging_supported(void)
{
	if (!nested_supported())
		return false;
	return kvm_cpu_has(X86_FEATURE_SVM) ? kvm_cpu_has(X86_FEATURE_NPT) : kvm_cpu_has_ept();
}

TEST(nested_two_dimensional)
{
	if (!nested_paging_supported())
		SKIP(return, "no nested paging");
	check_nested(true);
}

/* within the gigabyte that make_npt() maps */
#define NEAR_GPA	0x20000000ul

/*
 * Two slots that start dirty, in huge pages, some of them mapped by shadow page
 * tables: the first harvest has to protect them all, and that of the other slot
 * does so at the same time.
 */
TEST(nested_huge_pages_initially_set)
{
	const uint32_t huge = 512;
	struct mailbox touch = {
		.op = OP_WRITE, .twin = OTHER_GVA, .npages = 4, .step = huge,
	};
	struct mailbox mb = { .op = OP_WRITE, .twin = OTHER_GVA, .first = 500, .npages = 100 };
	struct dsr *v, other, *slots[2];
	struct taker t[2];
	uint8_t *want;
	int i, k;

	if (!nested_paging_supported())
		SKIP(return, "no nested paging");
	if (!thp_configured())
		SKIP(return, "no transparent huge pages");

	v = dsr_new(.entries = 64, .nr_vcpus = 1, .no_log = true, .npages = 4 * huge,
		    .src = VM_MEM_SRC_ANONYMOUS_THP,
		    .manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
	vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS_THP, NEAR_GPA, OTHER_SLOT,
				    v->npages, 0);
	virt_map(v->vm, OTHER_GVA, NEAR_GPA, v->npages);
	want = set_new(v);
	set_add(want, 0, v->npages, 1);
	other = *v;
	slots[0] = v;
	slots[1] = &other;
	/* by the first level, then by the second */
	guest_run(v, 0, touch);
	run_nested(v, true, NEAR_GPA);

	for (i = 0; i < rounds(20); i++) {
		guest_run(v, 0, touch);
		dsr_log(v, true);
		vm_mem_region_set_flags(v->vm, OTHER_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
		v->fd = dsr_open(v->vm, TEST_SLOT);
		other.fd = dsr_open(v->vm, OTHER_SLOT);
		for (k = 0; k < 2; k++) {
			t[k] = (struct taker){
				.v = slots[k], .got = set_new(v), .stop = true,
			};
			CHECK_OK(pthread_create(&t[k].thread, NULL, taker_thread, &t[k]));
		}
		for (k = 0; k < 2; k++) {
			CHECK_OK(pthread_join(t[k].thread, NULL));
			set_check(v, t[k].got, want);
			free(t[k].got);
		}
		guest_run(v, 0, mb);
		for (k = 0; k < 2; k++)
			expect(slots[k], mb.first, mb.npages);
		dsr_log(v, false);
		vm_mem_region_set_flags(v->vm, OTHER_SLOT, 0);
		for (k = 0; k < 2; k++) {
			close(slots[k]->fd);
			slots[k]->fd = -1;
		}
	}
	free(want);
	dsr_free(v);
}

/* -- huge pages ----------------------------------------------------------- */

TEST(huge_pages_are_split)
{
	const uint32_t huge = 512;
	struct dsr *v;
	int i;

	if (!thp_configured())
		SKIP(return, "no transparent huge pages");

	v = dsr_new(.entries = 64, .nr_vcpus = 1, .no_log = true, .npages = 4 * huge,
		    .src = VM_MEM_SRC_ANONYMOUS_THP);
	for (i = 0; i < 3; i++) {
		/* map them huge, then start to log */
		guest_write_step(v, 0, 0, 4, huge);
		dsr_log(v, true);
		dsr_reopen(v);
		expect_nothing(v);
		guest_write_step(v, 0, 5, 4, huge);
		expect_step(v, 5, 4, huge);
		guest_write(v, 0, 0, v->npages);
		expect(v, 0, v->npages);
		expect_armed(v, huge - 3, 6);
		dsr_log(v, false);
	}
	dsr_free(v);
}

/* -- memory of other kinds ------------------------------------------------ */

/* What the guest writes to read-only memory is not written, and not logged. */
TEST(readonly_slot)
{
	struct mailbox mb = { .op = OP_WRITE, .gva = OTHER_GVA, .npages = 20, .value = 7 };
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1), rom;
	struct kvm_run *run = v->vcpu[0]->run;
	uint64_t *mem, exits = 0;

	if (!kvm_has_cap(KVM_CAP_READONLY_MEM))
		SKIP(return, "no read-only memory");

	vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, OTHER_GPA, OTHER_SLOT, v->npages,
				    KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES);
	virt_map(v->vm, OTHER_GVA, OTHER_GPA, v->npages);
	mem = addr_gpa2hva(v->vm, OTHER_GPA);
	rom = *v;
	rom.fd = dsr_open(v->vm, OTHER_SLOT);

	guest_set(v, 0, mb);
	for (;;) {
		vcpu_run(v->vcpu[0]);
		if (run->exit_reason != KVM_EXIT_MMIO)
			break;
		CHECK(run->mmio.is_write, "a read");
		CHECK_EQ(run->mmio.phys_addr, OTHER_GPA + exits * PG);
		CHECK_EQ(mem[exits * PG / 8], 0);
		exits++;
	}
	CHECK_EQ(run->exit_reason, KVM_EXIT_IO);
	CHECK_EQ(exits, mb.npages);
	expect_nothing(&rom);

	/* The VMM may well write it, and says so. */
	mem[7 * PG / 8] = 1;
	CHECK_EQ(dsr_mark(rom.fd, 7, 2), 2);
	expect(&rom, 7, 2);
	CHECK_EQ(dsr_mark(rom.fd, 7, 2), 2);
	CHECK_EQ(dsr_discard(rom.fd, 0, v->npages), 2);
	expect_nothing(&rom);
	expect_armed(v, 0, v->npages);
	close(rom.fd);
	dsr_free(v);
}

/* Private memory cannot log dirty pages: no log, and no harm. */
TEST(guest_memfd_slot_is_refused)
{
	const uint64_t size = 16 * PG;
	struct kvm_vm *vm;
	void *mem;
	int gmem;

	if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM)))
		SKIP(return, "no VMs with private memory");

	vm = vm_create_barebones_type(KVM_X86_SW_PROTECTED_VM);
	mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(mem != MAP_FAILED, "no memory");
	gmem = vm_create_guest_memfd(vm, size, 0);
	dsr_enable(vm, 64, 0);

	CHECK_ERR(__vm_set_user_memory_region2(vm, TEST_SLOT,
					       KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES,
					       TEST_GPA, size, mem, gmem, 0), EINVAL);
	CHECK_OK(__vm_set_user_memory_region2(vm, TEST_SLOT, KVM_MEM_GUEST_MEMFD,
					      TEST_GPA, size, mem, gmem, 0));
	CHECK_ERR(__dsr_open(vm, TEST_SLOT), ENOENT);
	CHECK_ERR(__vm_set_user_memory_region2(vm, TEST_SLOT,
					       KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES,
					       TEST_GPA, size, mem, gmem, 0), EINVAL);
	CHECK_ERR(__dsr_open(vm, TEST_SLOT), ENOENT);

	/* The VM's other memory can. */
	CHECK_OK(__vm_set_user_memory_region(vm, OTHER_SLOT, KVM_MEM_LOG_DIRTY_PAGES,
					     OTHER_GPA, size, mem));
	close(dsr_open(vm, OTHER_SLOT));
	close(gmem);
	kvm_vm_free(vm);
}

/* Lets the guest's faults through when told to. */
static struct {
	bool open, waiting;
} gate;

static int fault_handler(int mode, int uffd, struct uffd_msg *msg)
{
	static char page[PG] __aligned(PG);
	struct uffdio_copy copy = {
		.src = (uintptr_t)page,
		.dst = msg->arg.pagefault.address & ~(PG - 1),
		.len = PG,
	};

	WRITE_ONCE(gate.waiting, true);
	while (!READ_ONCE(gate.open))
		sched_yield();
	return ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST ? -1 : 0;
}

/* A vCPU that waits for memory from userspace holds up no harvest. */
TEST(userfaultfd_slot)
{
	struct mailbox mb = { .op = OP_WRITE, .first = 1, .npages = 100, .step = 2 };
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 2);
	void *mem = addr_gpa2hva(v->vm, TEST_GPA);
	struct uffd_desc *uffd;
	int i, fd;

	fd = syscall(__NR_userfaultfd, O_CLOEXEC);
	if (fd < 0)
		SKIP(return, "no userfaultfd");
	close(fd);

	for (i = 0; i < 3; i++) {
		CHECK_OK(madvise(mem, v->npages * PG, MADV_DONTNEED));
		uffd = uffd_setup_demand_paging(UFFDIO_REGISTER_MODE_MISSING, 0, mem,
						v->npages * PG, 1, fault_handler);
		WRITE_ONCE(gate.open, true);
		guest_write(v, 1, 300, 10);

		WRITE_ONCE(gate.open, false);
		WRITE_ONCE(gate.waiting, false);
		guest_start(v, 0, mb);
		while (!READ_ONCE(gate.waiting))
			sched_yield();
		/* What it has not got, it has not written. */
		expect(v, 300, 10);
		CHECK_EQ(dsr_mark(v->fd, 400, 3), 3);
		CHECK_EQ(dsr_discard(v->fd, 401, 1), 1);
		CHECK_EQ(dsr_reset(v->fd), 0);
		expect_step(v, 400, 2, 2);

		WRITE_ONCE(gate.open, true);
		guest_join(v, 0);
		expect_step(v, mb.first, mb.npages, mb.step);
		expect_armed(v, 0, v->npages);
		uffd_stop_demand_paging(uffd);
	}
	dsr_free(v);
}

static bool nested_vmx_supported(void)
{
	return nested_supported() && kvm_cpu_has(X86_FEATURE_VMX);
}

/*
 * The CPU writes L2's TPR to a page of L1 by its physical address, which is
 * marked when L2 exits.  SYNC includes it, and so does the end of logging: with
 * one CPU in any case, as whoever harvests there has seen an exit before.
 */
TEST(nested_virtual_apic_page)
{
	uint8_t *want;
	struct dsr *v;
	int i;

	if (!nested_vmx_supported())
		SKIP(return, "no nested VMX");
	v = dsr_new(.entries = 64, .nr_vcpus = 1);
	want = set_new(v);
	set_add(want, 5, 1, 1);
	vmx_extras.apic_gpa = TEST_GPA + 5 * PG;
	run_nested(v, false, 0);
	guest_start(v, 0, (struct mailbox){ .op = OP_TPR });
	check_sync_batches(v, want, 100);
	for (i = 0; i < rounds(20); i++) {
		guest_batch(v, 0);
		dsr_log(v, false);
		check_dead(v, 5, 1, MANY_RUNS);
		dsr_log(v, true);
		dsr_reopen(v);
	}
	guest_join(v, 0);
	free(want);
	dsr_free(v);
}

struct gated_harvest {
	int fd, ret;
	struct kvm_dirty_run *runs;
	struct kvm_dirty_slot_runs args;
};

static void *gated_thread(void *arg)
{
	struct gated_harvest *h = arg;

	h->ret = __dsr_runs(h->fd, KVM_DIRTY_SLOT_LOG_HARVEST, h->runs, 100, 0, &h->args);
	return NULL;
}

/*
 * Who is in a call of the log when the VMM is killed puts the last reference to
 * the VM.  What KVM keeps of L1's memory for a vCPU in L2, a shadow VMCS, must
 * not be written to where that is in the VMM, but to nowhere.
 */
TEST(vmm_killed_in_nested_guest)
{
	struct gated_harvest h;
	struct vmx_pages *vmx;
	struct uffd_desc *uffd;
	uint8_t *canary;
	struct dsr *v;
	pthread_t t;
	void *hva;
	int sk[2];
	pid_t pid;
	int i;

	if (!nested_vmx_supported())
		SKIP(return, "no nested VMX");
	i = syscall(__NR_userfaultfd, O_CLOEXEC);
	if (i < 0)
		SKIP(return, "no userfaultfd");
	close(i);

	CHECK_OK(socketpair(AF_UNIX, SOCK_STREAM, 0, sk));
	pid = fork();
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		v = dsr_new(.entries = 64, .nr_vcpus = 1);
		vmx_extras.shadow_vmcs = true;
		vmx = run_nested(v, false, 0);
		guest_start(v, 0, (struct mailbox){ .op = OP_BATCHES, .npages = 3 });
		guest_batch(v, 0);
		send_fd(sk[1], v->fd);
		CHECK_EQ(write(sk[1], &vmx->shadow_vmcs_hva, sizeof(hva)), sizeof(hva));
		for (;;)
			pause();
	}
	h.fd = recv_fd(sk[0]);
	CHECK_EQ(read(sk[0], &hva, sizeof(hva)), sizeof(hva));
	canary = mmap(hva, PG, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	CHECK(canary == hva, "there is something at %p already", hva);
	memset(canary, 0xa5, PG);

	h.runs = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(h.runs != MAP_FAILED, "no memory");
	WRITE_ONCE(gate.open, false);
	WRITE_ONCE(gate.waiting, false);
	uffd = uffd_setup_demand_paging(UFFDIO_REGISTER_MODE_MISSING, 0, h.runs, PG, 1,
					fault_handler);
	CHECK_OK(pthread_create(&t, NULL, gated_thread, &h));
	while (!READ_ONCE(gate.waiting))
		sched_yield();
	kill(pid, SIGKILL);
	CHECK_EQ(waitpid(pid, NULL, 0), pid);
	CHECK_EQ(dsr_info(h.fd).flags, 0);	/* the VM is still there */
	WRITE_ONCE(gate.open, true);
	CHECK_OK(pthread_join(t, NULL));
	CHECK_EQ(h.ret, 0);
	CHECK_EQ(h.args.nr_pages, 3);
	CHECK(poll_log(h.fd, 10000) & POLLHUP, "no POLLHUP");
	for (i = 0; i < PG; i++)
		CHECK(canary[i] == 0xa5, "byte %d of another process was written", i);
	uffd_stop_demand_paging(uffd);
	close(h.fd);
}

static void write_file(const char *name, const char *value)
{
	int fd = open(name, O_WRONLY);

	CHECK(fd >= 0 && write(fd, value, strlen(value)) == (int)strlen(value), "%s", name);
	close(fd);
}

static uint64_t read_file(const char *name)
{
	char buf[32] = "";
	int fd = open(name, O_RDONLY);

	CHECK(fd >= 0 && read(fd, buf, sizeof(buf) - 1) > 0, "%s", name);
	close(fd);
	return strtoull(buf, NULL, 10);
}

#define KSM "/sys/kernel/mm/ksm/"

/* Until most are merged. */
static void ksm_merge(uint64_t pages)
{
	uint64_t merged;
	int i;

	write_file(KSM "run", "1");
	for (i = 0; (merged = read_file(KSM "pages_sharing")) < pages; i++) {
		CHECK(i < 6000, "%lu pages merged in a minute", merged);
		sleep_ms(10);
	}
}

/* Pages that the host merges stay in the log, and a write to one is logged. */
TEST(ksm_merges_pages)
{
	struct dsr *v;
	void *mem;
	int i;

	if (access(KSM "run", W_OK))
		SKIP(return, "no KSM");

	v = dsr_new(.entries = 64, .nr_vcpus = 1);
	mem = addr_gpa2hva(v->vm, TEST_GPA);
	write_file(KSM "pages_to_scan", "5000");
	write_file(KSM "sleep_millisecs", "10");
	CHECK_OK(madvise(mem, v->npages * PG, MADV_MERGEABLE));
	for (i = 0; i < 3; i++) {
		guest_write(v, 0, 0, v->npages);
		if (i & 1)
			expect(v, 0, v->npages);
		ksm_merge(v->npages / 2);
		write_file(KSM "run", "2");	/* and all are on their own again */
		if (i & 1)
			expect_nothing(v);
		else
			expect(v, 0, v->npages);
		ksm_merge(v->npages / 2);
		guest_write_step(v, 0, 5, 100, 3);
		expect_step(v, 5, 100, 3);
		write_file(KSM "run", "0");
	}
	CHECK_OK(madvise(mem, v->npages * PG, MADV_UNMERGEABLE));
	dsr_free(v);
}

/* -- statistics ----------------------------------------------------------- */

static uint64_t stat_of(int fd, const char *name)
{
	struct kvm_stats_header header;
	struct kvm_stats_desc *all, *desc;
	uint64_t value = 0;
	bool found = false;
	int i;

	read_stats_header(fd, &header);
	all = read_stats_descriptors(fd, &header);
	for (i = 0; i < header.num_desc && !found; i++) {
		desc = get_stats_descriptor(all, i, &header);
		if (strcmp(desc->name, name))
			continue;
		read_stat_data(fd, &header, desc, &value, 1);
		found = true;
	}
	CHECK(found, "no counter %s", name);
	free(all);
	return value;
}

TEST(stats_add_up)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 2);
	int fd = vm_get_stats_fd(v->vm), cpu[2] = {
		vcpu_get_stats_fd(v->vcpu[0]), vcpu_get_stats_fd(v->vcpu[1]),
	};
	struct dsr_ring ring = dsr_map(v->fd, 0);
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_run *runs = calloc(MANY_RUNS, sizeof(*runs));

	guest_write_step(v, 0, 0, 100, 2);
	CHECK_EQ(stat_of(cpu[0], "dirty_slot_ring_pushed"), 64);
	CHECK_EQ(stat_of(cpu[0], "dirty_slot_ring_overflowed"), 36);
	CHECK_EQ(dsr_overflowed(&ring), 36);
	CHECK_EQ(stat_of(cpu[0], "dirty_slot_ring_full_exits"), 0);
	CHECK_EQ(stat_of(cpu[1], "dirty_slot_ring_pushed"), 0);
	CHECK_EQ(stat_of(cpu[1], "dirty_slot_ring_overflowed"), 0);

	CHECK_EQ(stat_of(fd, "dirty_slot_log_harvests"), 0);
	CHECK_OK(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, MANY_RUNS, 0, &args));
	CHECK_EQ(args.nr_pages, 100);
	CHECK_EQ(stat_of(fd, "dirty_slot_log_harvests"), 1);
	CHECK_EQ(stat_of(fd, "dirty_slot_log_harvested_pages"), 100);

	guest_write_step(v, 0, 0, 30, 2);
	dsr_set_consumer(&ring, dsr_producer(&ring));
	CHECK_EQ(dsr_reset(v->fd), 30);
	CHECK_EQ(stat_of(fd, "dirty_slot_log_resets"), 1);
	CHECK_EQ(stat_of(fd, "dirty_slot_log_reset_pages"), 30);
	CHECK_EQ(stat_of(cpu[0], "dirty_slot_ring_pushed"), 94);

	dsr_mark(v->fd, 0, 10);
	dsr_mark(v->fd, 5, 10);
	CHECK_EQ(stat_of(fd, "dirty_slot_log_marked_pages"), 15);
	dsr_discard(v->fd, 10, 10);
	CHECK_EQ(stat_of(fd, "dirty_slot_log_discarded_pages"), 5);
	guest_write_step(v, 1, 100, 20, 2);
	CHECK_EQ(stat_of(cpu[1], "dirty_slot_ring_pushed"), 20);
	CHECK_EQ(stat_of(cpu[0], "dirty_slot_ring_pushed"), 94);
	harvest(v, set_new(v));
	CHECK_EQ(stat_of(fd, "dirty_slot_log_harvested_pages"), 130);

	dsr_unmap(&ring);
	free(runs);
	close(fd);
	close(cpu[0]);
	close(cpu[1]);
	dsr_free(v);
}

TEST(stats_full_exits)
{
	struct dsr *v = dsr_new(.entries = 16, .nr_vcpus = 1,
				.flags = KVM_DIRTY_SLOT_RING_EXIT_ON_FULL);
	int fd = vcpu_get_stats_fd(v->vcpu[0]), exits = 0;

	guest_set(v, 0, (struct mailbox){ .op = OP_WRITE, .npages = 100 });
	while (!run_vcpu(v->vcpu[0])) {
		CHECK_EQ(stat_of(fd, "dirty_slot_ring_full_exits"), ++exits);
		harvest(v, set_new(v));
	}
	CHECK_EQ(stat_of(fd, "dirty_slot_ring_full_exits"), exits);
	close(fd);
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
	struct dsr_ring ring[MAX_VCPUS];
	struct kvm_dirty_run run;
	uint64_t c, p;
	int i;

	for (i = 0; i < MAX_VCPUS; i++)
		ring[i] = dsr_map(s->v->fd, i);
	while (!READ_ONCE(s->stop)) {
		memset(set, 0, s->v->npages);
		for (i = 0; i < MAX_VCPUS; i++) {
			p = dsr_producer(&ring[i]);
			for (c = dsr_consumer(&ring[i]); c < p; c++) {
				run = dsr_entry(&ring[i], c);
				CHECK(run.npages && run.offset < s->v->npages &&
				      run.npages <= s->v->npages - run.offset,
				      "entry %lu is %u+%u", c, run.offset, run.npages);
				set_add(set, run.offset, run.npages, 1);
			}
			dsr_set_consumer(&ring[i], p);
		}
		CHECK_OK(__dsr_reset(s->v->fd, &args));
		if (args.flags & KVM_DIRTY_RESET_OVERFLOW)
			harvest_cap(s->v->fd, set, s->v->npages, 0, s->cap);
		copy_set(s, set);
	}
	for (i = 0; i < MAX_VCPUS; i++)
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
	self->c.v = dsr_new(.entries = variant->entries, .nr_vcpus = 2, .npages = 1027);
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
		kvm_pin_this_task_to_pcpu(0);
	for (k = 0; variant->how & STEAL_TIME && k < 2; k++)
		if (!_vcpu_set_msr(v->vcpu[k], MSR_KVM_STEAL_TIME,
				   (TEST_GPA + (v->npages - 1 - k) * PG) | 1))
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
	bool pml = host_cpu_is_intel && get_kvm_intel_param_bool("pml");
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
		kvm_pin_this_task_to_pcpu(variant->hog);
	if (variant->hog)
		CHECK_OK(pthread_create(&thread, NULL, hog_thread, hog));
	rt.sched_priority = 0;
	CHECK_OK(sched_setscheduler(0, SCHED_OTHER, &rt));
	for (i = 0; i < 2; i++)
		guest_start(v, i, (struct mailbox){
			.op = OP_RANDOM, .npages = NR, .value = (i + 1ull) << 40,
		});
	if (variant->hog)
		kvm_pin_this_task_to_pcpu(0);
	rt.sched_priority = 1;
	if (variant->preempt)
		CHECK_OK(sched_setscheduler(0, SCHED_FIFO, &rt));

	/* With PML until it was seen that there was something to wait for. */
	end = now_ms() + (quick ? 500 : 4000);
	for (; now_ms() < end || (variant->preempt && pml && !late); calls++) {
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
	int i, n = 1;

	/* The harness does not know -q. */
	for (i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "-q"))
			quick = true;
		else
			argv[n++] = argv[i];
	}
	argv[n] = NULL;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_DIRTY_SLOT_RING));
	return test_harness_run(n, argv);
}
