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

#include "dirty_slot_ring_test.h"

#undef TEST_TIMEOUT_DEFAULT
#define TEST_TIMEOUT_DEFAULT	600

#define NPAGES		1100u		/* more than two batches of a harvest */
#define ENTRIES		64

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

/* -- the VM --------------------------------------------------------------- */

/* TEST_SLOT's; the memory stays the same. */
static int set_region(struct dsr *v, uint32_t flags, uint64_t gpa, uint64_t npages)
{
	struct kvm_userspace_memory_region region = {
		.slot = TEST_SLOT,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = npages * PG,
		.userspace_addr = (uintptr_t)addr_gpa2hva(v->vm, TEST_GPA),
	};

	return ioctl(v->vm->fd, KVM_SET_USER_MEMORY_REGION, &region);
}

static void set_log(struct dsr *v, bool on)
{
	CHECK(!set_region(v, on ? KVM_MEM_LOG_DIRTY_PAGES : 0, TEST_GPA, NPAGES), "logging");
}

static void close_log(struct dsr *v)
{
	close(v->fd);
	v->fd = -1;
}

#define MANY_VCPUS	400

enum { NO_CAP = 1, NO_LOG = 2, HUGE_PAGES = 4 };

static struct dsr *machine_new(int flags)
{
	bool huge = flags & HUGE_PAGES;
	struct dsr *v = dsr_new(.npages = NPAGES, .entries = ENTRIES, .nr_vcpus = 1,
				.max_vcpus = MANY_VCPUS, .no_cap = flags & NO_CAP,
				.no_log = flags & (NO_CAP | NO_LOG),
				.src = huge ? VM_MEM_SRC_ANONYMOUS_THP : VM_MEM_SRC_ANONYMOUS,
				.manual = huge ? KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE |
						 KVM_DIRTY_LOG_INITIALLY_SET : 0);

	vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, OTHER_GPA, OTHER_SLOT, 100,
				    flags & (NO_CAP | NO_LOG) ? 0 : KVM_MEM_LOG_DIRTY_PAGES);
	return v;
}

/* -- sets of pages -------------------------------------------------------- */

static uint8_t got[NPAGES], want[NPAGES];
static struct kvm_dirty_run runs[NPAGES];

/* Once, however often it is said. */
static void want_step(uint64_t first, uint64_t n, uint64_t step)
{
	for (; n--; first += step)
		want[first] = 1;
}

static void got_runs(const struct kvm_dirty_slot_runs *args)
{
	runs_take(got, NPAGES, runs, args, NPAGES);
}

/* All that is in the log, on top of what @got has, is what we want. */
static void __expect_wanted(struct dsr *v, int line)
{
	harvest_cap(v->fd, got, NPAGES, KVM_DIRTY_HARVEST_SYNC, NPAGES);
	__set_check(v, got, want, __FILE__, line);
	memset(got, 0, sizeof(got));
	memset(want, 0, sizeof(want));
}

#define expect_wanted(v)	__expect_wanted(v, __LINE__)

/* A page written now is logged now: re-protection was not forgotten. */
static void __expect_all_armed(struct dsr *v, int line)
{
	guest_write(v, 0, 0, NPAGES);
	want_step(0, NPAGES, 1);
	__expect_wanted(v, line);
}

#define expect_all_armed(v)	__expect_all_armed(v, __LINE__)

/* -- what is left --------------------------------------------------------- */

/* Rings of logs, and VMs; kmemleak, where there is one, knows about the rest. */
static unsigned int count_left(void)
{
	static const char * const owners[] = {
		"ring_alloc", "kvm_dirty_slot_log_create", "kvm_dirty_slot_ring_add_vcpu",
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
	struct dsr *v;

	/* A VM and its two rings show. */
	self->left = count_left();
	v = machine_new(0);
	CHECK_EQ(count_left(), self->left + 3);
	dsr_free(v);
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
	struct dsr *v;

	while (sweep_next(&s)) {
		v = machine_new(NO_CAP);
		if (!inject(&s, ioctl(v->vm->fd, KVM_ENABLE_CAP, &cap)))
			dsr_enable(v->vm, ENTRIES, 0);
		set_log(v, true);
		dsr_reopen(v);
		expect_all_armed(v);
		dsr_free(v);
	}
}

static void check_track(int flags)
{
	struct sweep s = { 0 };
	struct dsr *v = machine_new(NO_LOG | flags);
	bool all = flags & HUGE_PAGES;

	while (sweep_next(&s)) {
		guest_write(v, 0, 0, NPAGES);
		if (!inject(&s, set_region(v, KVM_MEM_LOG_DIRTY_PAGES, TEST_GPA, NPAGES))) {
			CHECK_ERR(__dsr_open(v->vm, TEST_SLOT), ENOENT);
			guest_write(v, 0, 0, NPAGES);
			set_log(v, true);
		}
		dsr_reopen(v);
		guest_write_step(v, 0, 3, 100, 2);
		if (all)
			want_step(0, NPAGES, 1);
		else
			want_step(3, 100, 2);
		expect_wanted(v);
		expect_all_armed(v);
		set_log(v, false);
		close_log(v);
	}
	dsr_free(v);
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
	struct dsr *v = machine_new(0);
	bool worked;

	while (sweep_next(&s)) {
		guest_write_step(v, 0, 3, 100, 2);
		want_step(3, 100, 2);
		worked = inject(&s, set_region(v, flags, gpa, npages));
		CHECK_EQ(dsr_info(v->fd).flags,
			 worked && gpa == TEST_GPA ? KVM_DIRTY_SLOT_LOG_DEAD : 0);
		expect_wanted(v);
		if (!worked) {
			expect_all_armed(v);
			continue;
		}
		CHECK(!set_region(v, 0, TEST_GPA, 0) || !npages, "delete");
		set_log(v, true);
		dsr_reopen(v);
		expect_all_armed(v);
	}
	dsr_free(v);
}

TEST_F(fault, untrack)
{
	check_end(0, TEST_GPA, NPAGES);
}

TEST_F(fault, delete_slot)
{
	check_end(0, TEST_GPA, 0);
}

TEST_F(fault, move_slot)
{
	check_end(KVM_MEM_LOG_DIRTY_PAGES, MOVED_GPA, NPAGES);
}

TEST_F(fault, open)
{
	struct sweep s = { 0 };
	struct kvm_dirty_slot_log_fd arg = { .slot = TEST_SLOT };
	struct dsr *v = machine_new(0);

	while (sweep_next(&s)) {
		guest_write_step(v, 0, 3, 100, 2);
		want_step(3, 100, 2);
		if (inject(&s, ioctl(v->vm->fd, KVM_GET_DIRTY_SLOT_LOG_FD, &arg)))
			close(s.ret);
		expect_wanted(v);
	}
	expect_all_armed(v);
	dsr_free(v);
}

/* The log of all slots: opened, and harvested. */
TEST_F(fault, vm_open_and_harvest)
{
	struct sweep s = { 0 };
	struct kvm_dirty_slot_log_fd arg = { .slot = KVM_DIRTY_SLOT_ALL };
	static struct kvm_dirty_vm_run vm_runs[NPAGES];
	struct kvm_dirty_vm_harvest args;
	struct dsr *v = machine_new(0);
	uint32_t i;
	int all;

	while (sweep_next(&s)) {
		if (inject(&s, ioctl(v->vm->fd, KVM_GET_DIRTY_SLOT_LOG_FD, &arg)))
			close(s.ret);
	}
	all = dsr_open(v->vm, KVM_DIRTY_SLOT_ALL);
	while (sweep_next(&s)) {
		guest_write_step(v, 0, 3, 100, 2);
		want_step(3, 100, 2);
		if (!inject(&s, __dsr_vm_harvest(all, vm_runs, NPAGES, KVM_DIRTY_HARVEST_SYNC,
						 &args)))
			args.nr_runs = 0;
		for (i = 0; i < args.nr_runs; i++) {
			CHECK_EQ(vm_runs[i].slot, TEST_SLOT);
			set_add(got, vm_runs[i].offset, vm_runs[i].npages, 1);
		}
		expect_wanted(v);
	}
	expect_all_armed(v);
	close(all);
	dsr_free(v);
}

/* Where nothing else is, so that there are no page tables either. */
#define FAR_AWAY	((void *)0x100000000000ul)

static int map_far(int fd, off_t off, size_t size, int prot)
{
	void *p = mmap(FAR_AWAY, size, prot, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, off);

	return p == MAP_FAILED ? -1 : 0;
}

TEST_F(fault, map)
{
	struct sweep s = { 0 };
	struct dsr *v = machine_new(0);
	struct kvm_dirty_slot_log_info info = dsr_info(v->fd);
	struct dsr_ring ring;

	guest_write_step(v, 0, 3, 10, 2);
	want_step(3, 10, 2);
	while (sweep_next(&s)) {
		if (inject(&s, map_far(v->fd, info.rings_offset, info.stride, PROT_READ)))
			munmap(FAR_AWAY, info.stride);
	}
	while (sweep_next(&s)) {
		CHECK(!map_far(v->fd, info.rings_offset, info.stride, PROT_READ), "mmap");
		inject(&s, madvise(FAR_AWAY, info.stride, MADV_POPULATE_READ));
		CHECK(!madvise(FAR_AWAY, info.stride, MADV_POPULATE_READ), "populate");
		munmap(FAR_AWAY, info.stride);
	}
	while (sweep_next(&s)) {
		CHECK(!map_far(v->fd, 0, PG, PROT_READ | PROT_WRITE), "mmap");
		inject(&s, madvise(FAR_AWAY, PG, MADV_POPULATE_WRITE));
		CHECK(!madvise(FAR_AWAY, PG, MADV_POPULATE_WRITE), "populate");
		munmap(FAR_AWAY, PG);
	}
	ring = dsr_map(v->fd, 0);
	CHECK_EQ(dsr_producer(&ring), 10);
	CHECK_EQ(dsr_entry(&ring, 9).offset, 21);
	dsr_unmap(&ring);
	expect_wanted(v);
	dsr_free(v);
}

TEST_F(fault, info_and_poll)
{
	struct sweep s = { 0 };
	struct dsr *v = machine_new(0);
	struct kvm_dirty_slot_log_info info;
	struct pollfd p = { .fd = v->fd, .events = POLLIN };

	while (sweep_next(&s)) {
		if (inject(&s, ioctl(v->fd, KVM_DIRTY_SLOT_LOG_INFO, &info)))
			CHECK_EQ(info.npages, NPAGES);
	}
	guest_write(v, 0, 0, ENTRIES);
	want_step(0, ENTRIES, 1);
	while (sweep_next(&s)) {
		if (inject(&s, poll(&p, 1, 0)))
			CHECK_EQ(p.revents, POLLIN);
	}
	expect_wanted(v);
	dsr_free(v);
}

/* Of @n pages, 2 apart, some in the ring and some beyond, @cap at a time. */
static void check_harvest(uint32_t n, uint32_t cap, int flags)
{
	struct sweep s = { 0 };
	struct dsr *v = machine_new(flags | (flags ? NO_LOG : 0));
	struct kvm_dirty_slot_runs args;

	while (sweep_next(&s)) {
		if (flags) {
			guest_write(v, 0, 0, NPAGES);
			set_log(v, true);
			dsr_reopen(v);
			want_step(0, NPAGES, 1);
		} else {
			guest_write_step(v, 0, 1, n, 2);
			want_step(1, n, 2);
		}
		memset(runs, 0xff, sizeof(runs));
		args = (struct kvm_dirty_slot_runs){ .runs = (uintptr_t)runs, .nr_runs = cap };
		if (inject(&s, ioctl(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, &args))) {
			got_runs(&args);
			/* Whoever believes the flag must not lose the rest. */
			if (!(args.flags & KVM_DIRTY_HARVEST_MORE))
				CHECK_EQ(args.nr_pages, flags ? NPAGES : n);
		}
		expect_wanted(v);
		expect_all_armed(v);
		if (flags) {
			set_log(v, false);
			close_log(v);
		}
	}
	dsr_free(v);
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
	struct dsr *v = machine_new(0);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	struct kvm_dirty_slot_reset args;
	uint64_t c;

	while (sweep_next(&s)) {
		guest_write_step(v, 0, 1, ENTRIES + 20, 2);
		want_step(1, ENTRIES + 20, 2);
		for (c = dsr_consumer(&ring); c < dsr_producer(&ring); c++)
			got[dsr_entry(&ring, c).offset]++;
		dsr_set_consumer(&ring, c);
		args = (struct kvm_dirty_slot_reset){ 0 };
		if (inject(&s, ioctl(v->fd, KVM_DIRTY_SLOT_LOG_RESET, &args))) {
			CHECK_EQ(args.nr_pages, ENTRIES);
			CHECK_EQ(args.flags, KVM_DIRTY_RESET_OVERFLOW);
		}
		/* Collected from the mapping, so in no harvest. */
		expect_wanted(v);
		expect_all_armed(v);
	}
	dsr_unmap(&ring);
	dsr_free(v);
}

#define NR_SOME 100
#define SOME_STEP 5

/*
 * MARK and DISCARD of two pages of every SOME_STEP, with a failure.  They may
 * have done part of it: then they can be repeated.
 */
static void check_some(struct sweep *s, struct dsr *v, unsigned long cmd)
{
	struct kvm_dirty_run some[NR_SOME];
	struct kvm_dirty_slot_runs args = { .runs = (uintptr_t)some, .nr_runs = NR_SOME };
	int i;

	for (i = 0; i < NR_SOME; i++)
		some[i] = (struct kvm_dirty_run){ .offset = SOME_STEP * i, .npages = 2 };
	if (inject(s, ioctl(v->fd, cmd, &args)))
		CHECK_EQ(args.nr_pages, 2 * NR_SOME);
	else
		CHECK_OK(__dsr_runs(v->fd, cmd, some, NR_SOME, 0, &args));
}

TEST_F(fault, mark)
{
	struct dsr *v = machine_new(0);
	struct sweep s = { 0 };

	while (sweep_next(&s)) {
		guest_write_step(v, 0, 700, 20, 3);
		want_step(700, 20, 3);
		check_some(&s, v, KVM_DIRTY_SLOT_LOG_MARK);
		want_step(0, NR_SOME, SOME_STEP);
		want_step(1, NR_SOME, SOME_STEP);
		expect_wanted(v);
	}
	expect_all_armed(v);
	dsr_free(v);
}

TEST_F(fault, discard)
{
	struct dsr *v = machine_new(0);
	struct sweep s = { 0 };
	int i;

	while (sweep_next(&s)) {
		guest_write(v, 0, 0, NPAGES);
		want_step(0, NPAGES, 1);
		check_some(&s, v, KVM_DIRTY_SLOT_LOG_DISCARD);
		for (i = 0; i < NR_SOME; i++)
			memset(&want[SOME_STEP * i], 0, 2);
		expect_wanted(v);
		expect_all_armed(v);
	}
	dsr_free(v);
}

TEST_F(fault, create_vcpu)
{
	struct dsr *v = machine_new(0);
	int other = dsr_open(v->vm, OTHER_SLOT), fd, nr = 1;
	struct sweep s = { 0 };

	while (sweep_next(&s)) {
		guest_write_step(v, 0, 3, 100, 2);
		want_step(3, 100, 2);
		/* 1 is for the last one. */
		if (inject(&s, ioctl(v->vm->fd, KVM_CREATE_VCPU, nr + 1))) {
			close(s.ret);
			expect_wanted(v);
		} else {
			/* As if it had not been tried, and then tried again. */
			expect_wanted(v);
			expect_all_armed(v);
			fd = ioctl(v->vm->fd, KVM_CREATE_VCPU, nr + 1);
			CHECK(fd >= 0, "once more");
			close(fd);
		}
		nr++;
		CHECK_EQ(dsr_info(v->fd).nr_rings, nr);
		CHECK_EQ(dsr_info(other).nr_rings, nr);
	}
	/* The next one has the next ring. */
	__dsr_add_vcpu(v, 0, 1);
	guest_write_step(v, 0, 501, 100, 2);
	want_step(501, 100, 2);
	expect_wanted(v);
	expect_all_armed(v);
	CHECK_EQ(dsr_info(v->fd).nr_rings, nr + 1);
	CHECK_EQ(dsr_info(other).nr_rings, nr + 1);
	close(other);
	dsr_free(v);
}

/*
 * The guest's page faults: page tables, and the host's own faults below them.
 * With the slot go all page tables, and a new vCPU has none in store.
 */
static void check_run(int flags)
{
	struct dsr *v = machine_new(flags | NO_LOG);
	void *mem = addr_gpa2hva(v->vm, TEST_GPA);
	struct sweep s = { 0 };

	while (sweep_next(&s)) {
		CHECK(!set_region(v, 0, TEST_GPA, 0), "delete");
		CHECK(!madvise(mem, NPAGES * PG, MADV_DONTNEED), "DONTNEED");
		set_log(v, true);
		dsr_reopen(v);
		if (flags & HUGE_PAGES)
			want_step(0, NPAGES, 1);

		CHECK(s.n < MANY_VCPUS, "more places than vCPUs");
		__dsr_add_vcpu(v, 0, s.n);
		guest_set(v, 0, (struct mailbox){
			.op = OP_WRITE, .first = 7, .npages = 3, .step = 500,
		});
		want_step(7, 3, 500);
		if (!inject(&s, ioctl(v->vcpu[0]->fd, KVM_RUN, NULL)))
			vcpu_run(v->vcpu[0]);
		CHECK(guest_is_done(v->vcpu[0]->run), "exit %s",
		      exit_reason_str(v->vcpu[0]->run->exit_reason));
		expect_wanted(v);
		expect_all_armed(v);
		close_log(v);
	}
	dsr_free(v);
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
