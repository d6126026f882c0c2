// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings: what if memory runs out, or cannot be reached, in the midst
 * of a call?
 *
 * Each call is made again and again, with the first, the second, the third...
 * place in it that can fail failing, for this thread alone, until it returns
 * before the failure it was to meet (/proc/thread-self/fail-nth).  Places are
 * slab and page allocations and the copies from and to userspace.  A call that
 * fails has the right errno and leaves the VM as it was, as far as its caller can
 * tell; whatever happens, a later harvest has all the pages that were written,
 * each of them once.  Nothing stays behind when the VM is gone.
 *
 * Needs a kernel with CONFIG_FAULT_INJECTION_DEBUG_FS, FAILSLAB, FAIL_PAGE_ALLOC
 * and FAULT_INJECTION_USERCOPY, and debugfs mounted; skips without.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#include "dirty_slot_ring.h"
#include "dirty_slot_ring_check.h"

#undef TEST_TIMEOUT_DEFAULT
#define TEST_TIMEOUT_DEFAULT	600

#define PG		4096ul
#define NPAGES		1100u		/* more than two batches of a harvest */
#define ENTRIES		64
#define SLOT		10
#define OTHER_SLOT	11
#define GPA		0x10000000ul
#define OTHER_GPA	0x20000000ul
#define GVA		0xc0000000ul

#define DEBUGFS		"/sys/kernel/debug/"

/* -- failing -------------------------------------------------------------- */

/* The defaults spare what most code asks for, and log each failure. */
static const struct {
	const char *file, *value;
} knobs[] = {
	{ DEBUGFS "failslab/ignore-gfp-wait", "N" },
	{ DEBUGFS "failslab/verbose", "0" },
	{ DEBUGFS "fail_page_alloc/ignore-gfp-wait", "N" },
	{ DEBUGFS "fail_page_alloc/ignore-gfp-highmem", "N" },
	{ DEBUGFS "fail_page_alloc/min-order", "0" },
	{ DEBUGFS "fail_page_alloc/verbose", "0" },
	{ DEBUGFS "fail_usercopy/verbose", "0" },
};

static char old_knobs[ARRAY_SIZE(knobs)][32];

/* Returns the file that is not there, or NULL. */
static const char *knobs_set(void)
{
	int i, fd;

	for (i = 0; i < ARRAY_SIZE(knobs); i++) {
		fd = open(knobs[i].file, O_RDWR);
		if (fd < 0)
			return knobs[i].file;
		if (read(fd, old_knobs[i], sizeof(old_knobs[i]) - 1) < 0 ||
		    write(fd, knobs[i].value, strlen(knobs[i].value)) < 0) {
			close(fd);
			return knobs[i].file;
		}
		close(fd);
	}
	return access("/proc/thread-self/fail-nth", W_OK) ? "/proc/thread-self/fail-nth" : NULL;
}

static void knobs_restore(void)
{
	int i, fd;

	for (i = 0; i < ARRAY_SIZE(knobs) && old_knobs[i][0]; i++) {
		fd = open(knobs[i].file, O_WRONLY);
		if (fd < 0 || write(fd, old_knobs[i], strlen(old_knobs[i])) < 0)
			perror(knobs[i].file);
		close(fd);
	}
}

struct sweep {
	unsigned int n;		/* the place that fails, from 1 */
	bool injected;		/* the call got there */
	int ret, err;		/* of the call */
	unsigned int failed;	/* calls that did */
	int fd;			/* fail-nth */
};

static void sweep_arm(struct sweep *s, unsigned int n)
{
	char buf[16];
	int len = snprintf(buf, sizeof(buf), "%u", n), ret;

	/* It may be what fails; but then nothing else does. */
	do
		ret = pwrite(s->fd, buf, len, 0);
	while (ret < 0 && errno == EFAULT);
	CHECK(ret == len, "fail-nth");
}

static bool sweep_was_injected(struct sweep *s)
{
	char buf[16] = "";
	bool in_read;

	/* So may this. */
	in_read = pread(s->fd, buf, sizeof(buf) - 1, 0) <= 0;
	sweep_arm(s, 0);
	return !in_read && !atoi(buf);
}

/* With the next place failing; false if the call has none left. */
static bool sweep_next(struct sweep *s)
{
	if (!s->n) {
		s->failed = 0;
		s->fd = open("/proc/thread-self/fail-nth", O_RDWR);
		CHECK(s->fd >= 0, "fail-nth");
	} else if (!s->injected) {
		CHECK(s->failed, "a call that cannot fail?");
		fprintf(stderr, "# %u places to fail, %u calls failed\n", s->n - 1, s->failed);
		close(s->fd);
		s->n = 0;
		return false;
	}
	CHECK(s->n < 3000, "there is no end to it");
	s->n++;
	return true;
}

/* Fails the test if the call did, and not for the failure it met. */
static bool sweep_judge(struct sweep *s, int line)
{
	if (s->ret >= 0)
		return true;
	if (!s->injected || (s->err != ENOMEM && s->err != EFAULT))
		check_failed(__FILE__, line, "the call", s->err, "place %u, %sinjected, gave %d",
			     s->n, s->injected ? "" : "not ", s->ret);
	s->failed++;
	return false;
}

/* Make the call; true if it worked, whether or not it met a failure. */
#define inject(s, call)						\
({								\
	struct sweep *__s = (s);				\
								\
	sweep_arm(__s, __s->n);					\
	__s->ret = (call);					\
	__s->err = errno;					\
	__s->injected = sweep_was_injected(__s);		\
	sweep_judge(__s, __LINE__);				\
})

/* -- the guest and the VM ------------------------------------------------- */

static struct {
	uint64_t first, n, step, value;
} todo;

static void guest_main(void)
{
	uint64_t i;

	for (;;) {
		for (i = 0; i < todo.n; i++)
			WRITE_ONCE(*(uint64_t *)(GVA + (todo.first + i * todo.step) * PG),
				   todo.value);
		GUEST_SYNC(0);
	}
}

struct machine {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu;
	int nr_vcpus;
	int fd;			/* the log of SLOT */
};

/* SLOT's; the memory stays the same. */
static int set_region(struct machine *m, uint32_t flags, uint64_t gpa, uint64_t npages)
{
	struct kvm_userspace_memory_region region = {
		.slot = SLOT,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = npages * PG,
		.userspace_addr = (uintptr_t)addr_gpa2hva(m->vm, GPA),
	};

	return ioctl(m->vm->fd, KVM_SET_USER_MEMORY_REGION, &region);
}

static void set_log(struct machine *m, bool on)
{
	CHECK(!set_region(m, on ? KVM_MEM_LOG_DIRTY_PAGES : 0, GPA, NPAGES), "logging");
}

static void log_open(struct machine *m)
{
	m->fd = dsr_open(m->vm, SLOT);
}

#define MANY_VCPUS	400

enum { NO_CAP = 1, NO_LOG = 2, HUGE_PAGES = 4 };

static struct machine machine_new(int flags)
{
	enum vm_mem_backing_src_type src = flags & HUGE_PAGES ? VM_MEM_SRC_ANONYMOUS_THP :
						VM_MEM_SRC_ANONYMOUS;
	struct machine m = { .fd = -1, .nr_vcpus = 1 };

	m.vm = __vm_create(VM_SHAPE_DEFAULT, MANY_VCPUS, 2 * NPAGES);
	if (!(flags & NO_CAP))
		dsr_enable(m.vm, ENTRIES, 0);
	if (flags & HUGE_PAGES)
		vm_enable_cap(m.vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
			      KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
	vm_userspace_mem_region_add(m.vm, src, GPA, SLOT, NPAGES, 0);
	vm_userspace_mem_region_add(m.vm, VM_MEM_SRC_ANONYMOUS, OTHER_GPA, OTHER_SLOT, 100,
				    flags & (NO_CAP | NO_LOG) ? 0 : KVM_MEM_LOG_DIRTY_PAGES);
	virt_map(m.vm, GVA, GPA, NPAGES);
	m.vcpu = vm_vcpu_add(m.vm, 0, guest_main);
	if (!(flags & (NO_CAP | NO_LOG))) {
		set_log(&m, true);
		log_open(&m);
	}
	return m;
}

static void machine_free(struct machine *m)
{
	if (m->fd >= 0)
		close(m->fd);
	kvm_vm_free(m->vm);
}

static void guest_set(struct machine *m, uint64_t first, uint64_t n, uint64_t step)
{
	todo.first = first;
	todo.n = n;
	todo.step = step;
	todo.value++;
	sync_global_to_guest(m->vm, todo);
}

static void vcpu_finish(struct kvm_vcpu *vcpu)
{
	struct ucall uc;

	CHECK(get_ucall(vcpu, &uc) == UCALL_SYNC, "exit %s, ucall %lu",
	      exit_reason_str(vcpu->run->exit_reason), uc.cmd);
}

static void guest_write(struct machine *m, uint64_t first, uint64_t n, uint64_t step)
{
	guest_set(m, first, n, step);
	vcpu_run(m->vcpu);
	vcpu_finish(m->vcpu);
}

/* -- sets of pages -------------------------------------------------------- */

static uint8_t got[NPAGES], want[NPAGES];
static struct kvm_dirty_run runs[NPAGES];

static void want_step(uint64_t first, uint64_t n, uint64_t step)
{
	for (; n--; first += step)
		want[first] = 1;
}

static void got_runs(const struct kvm_dirty_slot_runs *args)
{
	uint64_t pages = 0;
	uint32_t i, k;

	CHECK(args->nr_runs <= NPAGES, "%u runs", args->nr_runs);
	for (i = 0; i < args->nr_runs; i++) {
		CHECK(runs[i].npages && runs[i].offset < NPAGES &&
		      runs[i].npages <= NPAGES - runs[i].offset,
		      "run %u+%u", runs[i].offset, runs[i].npages);
		for (k = 0; k < runs[i].npages; k++)
			got[runs[i].offset + k]++;
		pages += runs[i].npages;
	}
	CHECK_EQ(pages, args->nr_pages);
}

/* All that is in the log, on top of what @got has, is what we want. */
static void __expect(struct machine *m, int line)
{
	struct kvm_dirty_slot_runs args;
	unsigned int i, bad = 0;

	do {
		CHECK(!__dsr_runs(m->fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, NPAGES,
				  KVM_DIRTY_HARVEST_SYNC, &args), "HARVEST");
		got_runs(&args);
	} while (args.flags & KVM_DIRTY_HARVEST_MORE);
	for (i = 0; i < NPAGES; i++)
		bad += got[i] != want[i];
	for (i = 0; bad && i < NPAGES; i++)
		if (got[i] != want[i])
			check_failed(__FILE__, line, "pages in the log", 0,
				     "%u wrong, the first is %u, %u times and not %u",
				     bad, i, got[i], want[i]);
	memset(got, 0, sizeof(got));
	memset(want, 0, sizeof(want));
}

#define expect(m)	__expect(m, __LINE__)

/* A page written now is logged now: re-protection was not forgotten. */
static void __expect_armed(struct machine *m, int line)
{
	guest_write(m, 0, NPAGES, 1);
	want_step(0, NPAGES, 1);
	__expect(m, line);
}

#define expect_armed(m)	__expect_armed(m, __LINE__)

/* -- what is left --------------------------------------------------------- */

/* Rings of logs, and VMs; kmemleak, where there is one, knows about the rest. */
static unsigned int count_left(void)
{
	static const char * const owners[] = {
		"log_add_ring", "kvm_dirty_slot_log_create", "kvm_dirty_slot_ring_add_vcpu",
	};
	FILE *f = fopen("/proc/vmallocinfo", "r");
	DIR *d = opendir(DEBUGFS "kvm");
	unsigned int n = 0, i;
	struct dirent *e;
	char line[512];

	CHECK(f && d, "vmallocinfo and debugfs");
	while (fgets(line, sizeof(line), f))
		for (i = 0; i < ARRAY_SIZE(owners); i++)
			n += !!strstr(line, owners[i]);
	while ((e = readdir(d)))
		n += e->d_type == DT_DIR && e->d_name[0] != '.';
	fclose(f);
	closedir(d);
	return n;
}

FIXTURE(fault) {
	unsigned int left;
	int fd;
};

FIXTURE_SETUP(fault)
{
	struct machine m;

	/* A VM and its two rings show. */
	self->left = count_left();
	m = machine_new(0);
	CHECK_EQ(count_left(), self->left + 3);
	machine_free(&m);
	CHECK_EQ(count_left(), self->left);
	self->fd = dup(0);
	close(self->fd);
	/* What this process touches must not be what fails. */
	CHECK(!mlockall(MCL_CURRENT), "mlockall");
}

FIXTURE_TEARDOWN(fault)
{
	int fd = dup(0);

	CHECK_EQ(fd, self->fd);
	CHECK_EQ(count_left(), self->left);
}

/* -- the calls ------------------------------------------------------------ */

TEST_F(fault, enable)
{
	struct sweep s = { 0 };
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_DIRTY_SLOT_RING, .args = { ENTRIES },
	};
	struct machine m;

	while (sweep_next(&s)) {
		m = machine_new(NO_CAP);
		if (!inject(&s, ioctl(m.vm->fd, KVM_ENABLE_CAP, &cap)))
			dsr_enable(m.vm, ENTRIES, 0);
		set_log(&m, true);
		log_open(&m);
		expect_armed(&m);
		machine_free(&m);
	}
}

static void check_track(int flags)
{
	struct sweep s = { 0 };
	struct machine m = machine_new(NO_LOG | flags);
	bool all = flags & HUGE_PAGES;

	while (sweep_next(&s)) {
		guest_write(&m, 0, NPAGES, 1);
		if (!inject(&s, set_region(&m, KVM_MEM_LOG_DIRTY_PAGES, GPA, NPAGES))) {
			CHECK(__dsr_open(m.vm, SLOT) == -1 && errno == ENOENT, "there is a log");
			guest_write(&m, 0, NPAGES, 1);
			set_log(&m, true);
		}
		log_open(&m);
		guest_write(&m, 3, 100, 2);
		if (all)
			want_step(0, NPAGES, 1);
		else
			want_step(3, 100, 2);
		expect(&m);
		expect_armed(&m);
		set_log(&m, false);
		close(m.fd);
	}
	m.fd = -1;
	machine_free(&m);
}

TEST_F(fault, track)
{
	check_track(0);
}

TEST_F(fault, track_initially_set)
{
	check_track(HUGE_PAGES);
}

/* What was logged outlives the slot; where that is not to end, it goes on. */
static void check_end(uint32_t flags, uint64_t gpa, uint64_t npages)
{
	struct sweep s = { 0 };
	struct machine m = machine_new(0);
	bool worked;

	while (sweep_next(&s)) {
		guest_write(&m, 3, 100, 2);
		want_step(3, 100, 2);
		worked = inject(&s, set_region(&m, flags, gpa, npages));
		CHECK_EQ(dsr_info(m.fd).flags, worked && gpa == GPA ? KVM_DIRTY_SLOT_LOG_DEAD : 0);
		expect(&m);
		if (!worked) {
			expect_armed(&m);
			continue;
		}
		CHECK(!set_region(&m, 0, GPA, 0) || !npages, "delete");
		set_log(&m, true);
		close(m.fd);
		log_open(&m);
		expect_armed(&m);
	}
	machine_free(&m);
}

TEST_F(fault, untrack)
{
	check_end(0, GPA, NPAGES);
}

TEST_F(fault, delete_slot)
{
	check_end(0, GPA, 0);
}

TEST_F(fault, move_slot)
{
	check_end(KVM_MEM_LOG_DIRTY_PAGES, 2 * GPA + GPA, NPAGES);
}

TEST_F(fault, open)
{
	struct sweep s = { 0 };
	struct kvm_dirty_slot_log_fd arg = { .slot = SLOT };
	struct machine m = machine_new(0);

	while (sweep_next(&s)) {
		guest_write(&m, 3, 100, 2);
		want_step(3, 100, 2);
		if (inject(&s, ioctl(m.vm->fd, KVM_GET_DIRTY_SLOT_LOG_FD, &arg)))
			close(s.ret);
		expect(&m);
	}
	expect_armed(&m);
	machine_free(&m);
}

/* Where nothing else is, so that there are no page tables either. */
#define FAR_AWAY	((void *)0x100000000000ul)

static int map_far(int fd, size_t size, int prot)
{
	void *p = mmap(FAR_AWAY, size, prot, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);

	return p == MAP_FAILED ? -1 : 0;
}

TEST_F(fault, map)
{
	struct sweep s = { 0 };
	struct machine m = machine_new(0);
	struct kvm_dirty_slot_log_info info = dsr_info(m.fd);
	struct dsr_ring ring;

	guest_write(&m, 3, 10, 2);
	want_step(3, 10, 2);
	while (sweep_next(&s)) {
		if (inject(&s, map_far(m.fd, info.stride, PROT_READ)))
			munmap(FAR_AWAY, info.stride);
	}
	while (sweep_next(&s)) {
		CHECK(!map_far(m.fd, info.stride, PROT_READ), "mmap");
		inject(&s, madvise(FAR_AWAY, info.stride, MADV_POPULATE_READ));
		CHECK(!madvise(FAR_AWAY, info.stride, MADV_POPULATE_READ), "populate");
		munmap(FAR_AWAY, info.stride);
	}
	while (sweep_next(&s)) {
		CHECK(!map_far(m.fd, PG, PROT_READ | PROT_WRITE), "mmap");
		inject(&s, madvise(FAR_AWAY, PG, MADV_POPULATE_WRITE));
		CHECK(!madvise(FAR_AWAY, PG, MADV_POPULATE_WRITE), "populate");
		munmap(FAR_AWAY, PG);
	}
	ring = dsr_map(m.fd, 0);
	CHECK_EQ(dsr_producer(&ring), 10);
	CHECK_EQ(dsr_entry(&ring, 9).offset, 21);
	dsr_unmap(&ring);
	expect(&m);
	machine_free(&m);
}

TEST_F(fault, info_and_poll)
{
	struct sweep s = { 0 };
	struct machine m = machine_new(0);
	struct kvm_dirty_slot_log_info info;
	struct pollfd p = { .fd = m.fd, .events = POLLIN };

	while (sweep_next(&s)) {
		if (inject(&s, ioctl(m.fd, KVM_DIRTY_SLOT_LOG_INFO, &info)))
			CHECK_EQ(info.npages, NPAGES);
	}
	guest_write(&m, 0, ENTRIES, 1);
	want_step(0, ENTRIES, 1);
	while (sweep_next(&s)) {
		if (inject(&s, poll(&p, 1, 0)))
			CHECK_EQ(p.revents, POLLIN);
	}
	expect(&m);
	machine_free(&m);
}

/* Of @n pages, 2 apart, some in the ring and some beyond, @cap at a time. */
static void check_harvest(uint32_t n, uint32_t cap, int flags)
{
	struct sweep s = { 0 };
	struct machine m = machine_new(flags | (flags ? NO_LOG : 0));
	struct kvm_dirty_slot_runs args;

	while (sweep_next(&s)) {
		if (flags) {
			guest_write(&m, 0, NPAGES, 1);
			set_log(&m, true);
			log_open(&m);
			want_step(0, NPAGES, 1);
		} else {
			guest_write(&m, 1, n, 2);
			want_step(1, n, 2);
		}
		memset(runs, 0xff, sizeof(runs));
		args = (struct kvm_dirty_slot_runs){ .runs = (uintptr_t)runs, .nr_runs = cap };
		if (inject(&s, ioctl(m.fd, KVM_DIRTY_SLOT_LOG_HARVEST, &args))) {
			got_runs(&args);
			/* Whoever believes the flag must not lose the rest. */
			if (!(args.flags & KVM_DIRTY_HARVEST_MORE))
				CHECK_EQ(args.nr_pages, flags ? NPAGES : n);
		}
		expect(&m);
		expect_armed(&m);
		if (flags) {
			set_log(&m, false);
			close(m.fd);
			m.fd = -1;
		}
	}
	machine_free(&m);
}

TEST_F(fault, harvest)
{
	check_harvest(20, NPAGES, 0);
}

TEST_F(fault, harvest_overflow)
{
	check_harvest(500, NPAGES, 0);
}

TEST_F(fault, harvest_one)
{
	check_harvest(30, 1, 0);
}

/* Splitting the huge pages takes memory. */
TEST_F(fault, harvest_huge_pages)
{
	check_harvest(0, NPAGES, HUGE_PAGES);
}

TEST_F(fault, reset)
{
	struct sweep s = { 0 };
	struct machine m = machine_new(0);
	struct dsr_ring ring = dsr_map(m.fd, 0);
	struct kvm_dirty_slot_reset args;
	uint64_t c;

	while (sweep_next(&s)) {
		guest_write(&m, 1, ENTRIES + 20, 2);
		want_step(1, ENTRIES + 20, 2);
		for (c = dsr_consumer(&ring); c < dsr_producer(&ring); c++)
			got[dsr_entry(&ring, c).offset]++;
		dsr_set_consumer(&ring, c);
		args = (struct kvm_dirty_slot_reset){ 0 };
		if (inject(&s, ioctl(m.fd, KVM_DIRTY_SLOT_LOG_RESET, &args))) {
			CHECK_EQ(args.nr_pages, ENTRIES);
			CHECK_EQ(args.flags, KVM_DIRTY_RESET_OVERFLOW);
		}
		/* Collected from the mapping, so in no harvest. */
		expect(&m);
		expect_armed(&m);
	}
	dsr_unmap(&ring);
	machine_free(&m);
}

#define NR_SOME 100
#define SOME_STEP 5

/*
 * MARK and DISCARD of two pages of every SOME_STEP, with a failure.  They may
 * have done part of it: then they can be repeated.
 */
static void check_some(struct sweep *s, struct machine *m, unsigned long cmd)
{
	struct kvm_dirty_run some[NR_SOME];
	struct kvm_dirty_slot_runs args = { .runs = (uintptr_t)some, .nr_runs = NR_SOME };
	int i;

	for (i = 0; i < NR_SOME; i++)
		some[i] = (struct kvm_dirty_run){ .offset = SOME_STEP * i, .npages = 2 };
	if (inject(s, ioctl(m->fd, cmd, &args)))
		CHECK_EQ(args.nr_pages, 2 * NR_SOME);
	else
		CHECK_OK(__dsr_runs(m->fd, cmd, some, NR_SOME, 0, &args));
}

TEST_F(fault, mark)
{
	struct machine m = machine_new(0);
	struct sweep s = { 0 };

	while (sweep_next(&s)) {
		guest_write(&m, 700, 20, 3);
		want_step(700, 20, 3);
		check_some(&s, &m, KVM_DIRTY_SLOT_LOG_MARK);
		want_step(0, NR_SOME, SOME_STEP);
		want_step(1, NR_SOME, SOME_STEP);
		expect(&m);
	}
	expect_armed(&m);
	machine_free(&m);
}

TEST_F(fault, discard)
{
	struct machine m = machine_new(0);
	struct sweep s = { 0 };
	int i;

	while (sweep_next(&s)) {
		guest_write(&m, 0, NPAGES, 1);
		want_step(0, NPAGES, 1);
		check_some(&s, &m, KVM_DIRTY_SLOT_LOG_DISCARD);
		for (i = 0; i < NR_SOME; i++)
			memset(&want[SOME_STEP * i], 0, 2);
		expect(&m);
		expect_armed(&m);
	}
	machine_free(&m);
}

TEST_F(fault, create_vcpu)
{
	struct machine m = machine_new(0);
	int other = dsr_open(m.vm, OTHER_SLOT), fd, nr = 1;
	struct sweep s = { 0 };

	while (sweep_next(&s)) {
		guest_write(&m, 3, 100, 2);
		want_step(3, 100, 2);
		/* 1 is for the last one. */
		if (inject(&s, ioctl(m.vm->fd, KVM_CREATE_VCPU, nr + 1))) {
			close(s.ret);
			expect(&m);
		} else {
			/* As if it had not been tried, and then tried again. */
			expect(&m);
			expect_armed(&m);
			fd = ioctl(m.vm->fd, KVM_CREATE_VCPU, nr + 1);
			CHECK(fd >= 0, "once more");
			close(fd);
		}
		nr++;
		CHECK_EQ(dsr_info(m.fd).nr_rings, nr);
		CHECK_EQ(dsr_info(other).nr_rings, nr);
	}
	/* The next one has the next ring. */
	m.vcpu = vm_vcpu_add(m.vm, 1, guest_main);
	guest_write(&m, 501, 100, 2);
	want_step(501, 100, 2);
	expect(&m);
	expect_armed(&m);
	CHECK_EQ(dsr_info(m.fd).nr_rings, nr + 1);
	CHECK_EQ(dsr_info(other).nr_rings, nr + 1);
	close(other);
	machine_free(&m);
}

/*
 * The guest's page faults: page tables, and the host's own faults below them.
 * With the slot go all page tables, and a new vCPU has none in store.
 */
static void check_run(int flags)
{
	struct machine m = machine_new(flags | NO_LOG);
	void *mem = addr_gpa2hva(m.vm, GPA);
	struct sweep s = { 0 };

	while (sweep_next(&s)) {
		CHECK(!set_region(&m, 0, GPA, 0), "delete");
		CHECK(!madvise(mem, NPAGES * PG, MADV_DONTNEED), "DONTNEED");
		set_log(&m, true);
		log_open(&m);
		if (flags & HUGE_PAGES)
			want_step(0, NPAGES, 1);

		CHECK(s.n < MANY_VCPUS, "more places than vCPUs");
		m.vcpu = vm_vcpu_add(m.vm, s.n, guest_main);
		guest_set(&m, 7, 3, 500);
		want_step(7, 3, 500);
		if (!inject(&s, ioctl(m.vcpu->fd, KVM_RUN, NULL)))
			vcpu_run(m.vcpu);
		vcpu_finish(m.vcpu);
		expect(&m);
		expect_armed(&m);
		close(m.fd);
	}
	m.fd = -1;
	machine_free(&m);
}

TEST_F(fault, run)
{
	check_run(0);
}

TEST_F(fault, run_huge_pages)
{
	check_run(HUGE_PAGES);
}

int main(int argc, char *argv[])
{
	const char *missing;
	int ret;

	TEST_REQUIRE(kvm_has_cap(KVM_CAP_DIRTY_SLOT_RING));
	missing = knobs_set();
	if (missing) {
		knobs_restore();
		ksft_exit_skip("no faults on demand in this kernel: no %s\n", missing);
	}
	ret = test_harness_run(argc, argv);
	knobs_restore();
	return ret;
}
