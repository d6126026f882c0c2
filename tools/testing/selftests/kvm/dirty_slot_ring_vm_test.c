// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings: the log of a whole VM, KVM_GET_DIRTY_SLOT_LOG_FD with
 * KVM_DIRTY_SLOT_ALL and KVM_DIRTY_VM_LOG_HARVEST.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dirty_slot_ring_test.h"

/* Many small slots, one after the other. */
#define SMALL_SLOT		100
#define SMALL_PAGES		8u
#define SMALL_GPA		0x200000000ul
#define SMALL_GVA		0x240000000ul

/* -- logs, and what a harvest of all of them says -------------------------- */

struct one_log {
	uint32_t slot, nr, npages;
	uint8_t *got;		/* as often as they were reported */
	uint64_t pages;		/* in all, since the last vm_check() */
};

struct all_logs {
	struct dsr *v;
	int fd;
	struct one_log *log;
	int nr_logs;
	uint32_t flags;		/* of all answers of the last harvest, joined */
	uint32_t calls;
};

static struct all_logs *all_new(struct dsr *v)
{
	struct all_logs *a = calloc(1, sizeof(*a));

	a->v = v;
	a->fd = dsr_open(v->vm, KVM_DIRTY_SLOT_ALL);
	return a;
}

/* A log whose pages may come, as its own file tells of it. */
static int all_add(struct all_logs *a, int fd)
{
	struct kvm_dirty_slot_log_info info = dsr_info(fd);

	a->log = realloc(a->log, (a->nr_logs + 1) * sizeof(*a->log));
	a->log[a->nr_logs] = (struct one_log){
		.slot = info.slot, .nr = info.log, .npages = info.npages,
		.got = calloc(1, info.npages),
	};
	return a->nr_logs++;
}

static void all_free(struct all_logs *a)
{
	int i;

	close(a->fd);
	for (i = 0; i < a->nr_logs; i++)
		free(a->log[i].got);
	free(a->log);
	free(a);
}

static struct one_log *find_log(struct all_logs *a, const struct kvm_dirty_vm_run *run)
{
	int i;

	for (i = 0; i < a->nr_logs; i++)
		if (a->log[i].nr == run->log)
			break;
	CHECK(i < a->nr_logs && a->log[i].slot == run->slot, "log %u of slot %u", run->log,
	      run->slot);
	return &a->log[i];
}

/* One answer.  Runs of one log follow one another. */
static void all_take(struct all_logs *a, const struct kvm_dirty_vm_run *runs,
		     const struct kvm_dirty_vm_harvest *args, uint32_t cap)
{
	struct one_log *log = NULL;
	uint64_t pages = 0;
	uint32_t i, k;

	CHECK(args->nr_runs <= cap, "%u runs in an array of %u", args->nr_runs, cap);
	CHECK(!(args->flags & ~(KVM_DIRTY_HARVEST_MORE | KVM_DIRTY_HARVEST_LAYOUT)), "flags %#x",
	      args->flags);
	CHECK(!args->reserved[0] && !args->reserved[1] && !args->reserved[2] && !args->reserved[3],
	      "reserved fields written");
	for (i = 0; i < args->nr_runs; i++) {
		if (!log || log->nr != runs[i].log) {
			for (k = 0; k < i; k++)
				CHECK(runs[k].log != runs[i].log,
				      "runs %u and %u are of log %u, and not those in between",
				      k, i, runs[i].log);
			log = find_log(a, &runs[i]);
		}
		CHECK(runs[i].slot == log->slot, "slots %u and %u of log %u", log->slot,
		      runs[i].slot, log->nr);
		CHECK(runs[i].npages && runs[i].offset < log->npages &&
		      runs[i].npages <= log->npages - runs[i].offset,
		      "run %u+%u in a slot of %u", runs[i].offset, runs[i].npages, log->npages);
		set_add(log->got, runs[i].offset, runs[i].npages, 1);
		log->pages += runs[i].npages;
		pages += runs[i].npages;
	}
	CHECK(pages == args->nr_pages, "%lu pages in the runs, nr_pages %llu", pages,
	      args->nr_pages);
	a->flags |= args->flags;
	a->calls++;
}

/* Until there is no more; returns the pages. */
static uint64_t all_harvest(struct all_logs *a, uint32_t flags, uint32_t cap)
{
	struct kvm_dirty_vm_run *runs = calloc(cap, sizeof(*runs));
	struct kvm_dirty_vm_harvest args;
	uint64_t pages = 0;
	int ret;

	a->flags = 0;
	a->calls = 0;
	do {
		ret = __dsr_vm_harvest(a->fd, runs, cap, flags, &args);
		CHECK(!ret, "VM_LOG_HARVEST gave %d", ret);
		all_take(a, runs, &args, cap);
		CHECK(!(args.flags & KVM_DIRTY_HARVEST_MORE) || args.nr_runs == cap,
		      "MORE after %u runs in an array of %u", args.nr_runs, cap);
		pages += args.nr_pages;
	} while (args.flags & KVM_DIRTY_HARVEST_MORE);
	free(runs);
	return pages;
}

/* What came of a log is these pages, once, and it is forgotten. */
static void __log_check(struct one_log *log, uint64_t first, uint64_t n, uint64_t step,
			const char *file, int line)
{
	struct dsr v = { .npages = log->npages };
	uint8_t *want = set_new(&v);

	set_add(want, first, n, step);
	__set_check(&v, log->got, want, file, line);
	memset(log->got, 0, log->npages);
	log->pages = 0;
	free(want);
}

#define log_check(a, i, first, n, step)	\
	__log_check(&(a)->log[i], first, n, step, __FILE__, __LINE__)

static void __none_check(struct all_logs *a, const char *file, int line)
{
	int i;

	for (i = 0; i < a->nr_logs; i++)
		__log_check(&a->log[i], 0, 0, 1, file, line);
}

/* All that came has been looked at. */
#define none_check(a)	__none_check(a, __FILE__, __LINE__)

static void all_nothing(struct all_logs *a)
{
	CHECK_EQ(all_harvest(a, 0, MANY_RUNS), 0);
	CHECK_EQ(a->flags, 0);
}

/* Another slot that logs; its own file. */
static int slot_new(struct dsr *v, uint32_t slot, uint64_t gpa, uint32_t npages)
{
	vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, gpa, slot, npages,
				    KVM_MEM_LOG_DIRTY_PAGES);
	return dsr_open(v->vm, slot);
}

static int small_slot_new(struct dsr *v, int i)
{
	return slot_new(v, SMALL_SLOT + i, SMALL_GPA + i * SMALL_PAGES * PG, SMALL_PAGES);
}

/* @n of them, which the guest has at SMALL_GVA. */
static void small_slots_new(struct dsr *v, struct all_logs *a, int *fd, int n)
{
	int i;

	for (i = 0; i < n; i++) {
		fd[i] = small_slot_new(v, i);
		if (a)
			all_add(a, fd[i]);
	}
	virt_map(v->vm, SMALL_GVA, SMALL_GPA, n * SMALL_PAGES);
}

static void small_write(struct dsr *v, int cpu, uint64_t first, uint64_t n, uint64_t step)
{
	static uint64_t value;

	guest_run(v, cpu, (struct mailbox){
		.op = OP_WRITE, .gva = SMALL_GVA, .first = first, .npages = n, .step = step,
		.value = ++value,
	});
}

static void close_all(int *fd, int n)
{
	while (n--)
		close(fd[n]);
}

/* -- the file and the call ------------------------------------------------- */

TEST(vm_open)
{
	struct dsr *v = dsr_new(.no_cap = true, .no_log = true);
	struct kvm_dirty_slot_log_fd arg = { .slot = KVM_DIRTY_SLOT_ALL };
	int fd, i;
	char c;

	CHECK_ERR(__dsr_open(v->vm, KVM_DIRTY_SLOT_ALL), ENXIO);
	dsr_enable(v->vm, 64, 0);
	for (i = 0; i < 32; i++) {
		arg.flags = 1u << i;
		CHECK_ERR(ioctl(v->vm->fd, KVM_GET_DIRTY_SLOT_LOG_FD, &arg), EINVAL);
	}
	CHECK_ERR(__dsr_open(v->vm, KVM_DIRTY_SLOT_ALL - 1), EINVAL);
	CHECK_ERR(__dsr_open(v->vm, 0xffff), EINVAL);

	/* With no slot that logs it can be opened, and has nothing. */
	fd = dsr_open(v->vm, KVM_DIRTY_SLOT_ALL);
	CHECK_EQ(fcntl(fd, F_GETFD), FD_CLOEXEC);
	CHECK(read(fd, &c, 1) == -1, "read succeeded");
	CHECK(write(fd, &c, 1) == -1, "write succeeded");
	CHECK_EQ(poll_log(fd, 0), 0);
	close(fd);
	dsr_free(v);
}

TEST(vm_other_calls)
{
	struct dsr *v = dsr_new(.nr_vcpus = 1);
	int fd = dsr_open(v->vm, KVM_DIRTY_SLOT_ALL), i, ret;
	const unsigned long bad[] = {
		KVM_DIRTY_SLOT_LOG_INFO, KVM_DIRTY_SLOT_LOG_HARVEST, KVM_DIRTY_SLOT_LOG_RESET,
		KVM_DIRTY_SLOT_LOG_MARK, KVM_DIRTY_SLOT_LOG_DISCARD, KVM_GET_DIRTY_SLOT_LOG_FD,
		KVM_RUN, KVM_GET_DIRTY_LOG,
		_IO(KVMIO, 0xf6),
		_IOWR(KVMIO, 0xf6, struct kvm_dirty_slot_runs),
		_IOR(KVMIO, 0xf6, struct kvm_dirty_vm_harvest),
		_IOWR(KVMIO, 0xf7, struct kvm_dirty_vm_harvest),
		_IOWR('x', 0xf6, struct kvm_dirty_vm_harvest),
	};
	const int prots[] = { PROT_READ, PROT_READ | PROT_WRITE, PROT_NONE };
	const int flags[] = { MAP_SHARED, MAP_PRIVATE };
	struct kvm_dirty_vm_run runs[8];
	struct kvm_dirty_vm_harvest args;
	char buf[256] = { 0 };

	for (i = 0; i < ARRAY_SIZE(bad); i++) {
		ret = ioctl(fd, bad[i], buf);
		CHECK(ret == -1 && errno == ENOTTY, "row %d gave %d", i, ret);
	}
	for (i = 0; i < 6; i++)
		CHECK_ERR((long)mmap(NULL, PG, prots[i % 3], flags[i / 3], fd, 0), ENODEV);

	/* And its call is none of a memslot's file, or of the VM's. */
	CHECK_ERR(__dsr_vm_harvest(v->fd, runs, 8, 0, &args), ENOTTY);
	CHECK(__dsr_vm_harvest(v->vm->fd, runs, 8, 0, &args) == -1, "harvest of a VM's file");
	close(fd);
	dsr_free(v);
}

TEST(vm_bad_fields)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct all_logs *a = all_new(v);
	struct kvm_dirty_vm_run runs[8];
	struct kvm_dirty_vm_harvest good = { .runs = (uintptr_t)runs, .nr_runs = 8 }, bad, was;
	int i;

	all_add(a, v->fd);
	guest_write_step(v, 0, 0, 100, 2);
	/* The field that is bad, by turns: capacity, flags, each bit of each reserved one. */
	for (i = 0; i < 1 + 32 + 4 * 64; i++) {
		bad = good;
		if (!i)
			bad.nr_runs = 0;
		else if (i < 33)
			bad.flags = 1u << (i - 1);
		else
			bad.reserved[(i - 33) / 64] = 1ull << ((i - 33) % 64);
		if (i && i < 33 && (bad.flags & (KVM_DIRTY_HARVEST_SYNC | KVM_DIRTY_HARVEST_MORE |
						 KVM_DIRTY_HARVEST_LAYOUT)))
			continue;
		was = bad;
		CHECK_ERR(ioctl(a->fd, KVM_DIRTY_VM_LOG_HARVEST, &bad), EINVAL);
		CHECK(!memcmp(&bad, &was, sizeof(bad)), "row %d was changed", i);
	}
	/* Nothing was taken; and what calls hand out may be handed in again. */
	good.nr_pages = ~0ull;
	good.flags = KVM_DIRTY_HARVEST_SYNC | KVM_DIRTY_HARVEST_MORE | KVM_DIRTY_HARVEST_LAYOUT;
	CHECK_OK(ioctl(a->fd, KVM_DIRTY_VM_LOG_HARVEST, &good));
	CHECK_EQ(good.nr_runs, 8);
	CHECK_EQ(good.flags, KVM_DIRTY_HARVEST_MORE);
	all_take(a, runs, &good, 8);
	all_harvest(a, 0, MANY_RUNS);
	log_check(a, 0, 0, 100, 2);
	good.nr_runs = 8;
	good.flags = KVM_DIRTY_HARVEST_MORE | KVM_DIRTY_HARVEST_LAYOUT;
	CHECK_OK(ioctl(a->fd, KVM_DIRTY_VM_LOG_HARVEST, &good));
	CHECK(!good.nr_runs && !good.flags && !good.nr_pages, "an empty log was not");
	expect_armed(v, 0, v->npages);
	all_free(a);
	dsr_free(v);
}

TEST(vm_harvest_into_nowhere)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct kvm_dirty_vm_run *none = alloc_guarded(1), *ro;
	struct all_logs *a = all_new(v);
	void *end = alloc_guarded(2) + PG;
	const uintptr_t bad[] = { (uintptr_t)none, 0, 8, -PG, 1ull << 63, (1ull << 47) - 4 };
	const uintptr_t headers[] = {
		0, (uintptr_t)end - 8, (uintptr_t)end, -PG, (uintptr_t)end - 55,
	};
	const uint32_t fits[] = { 0, 1, 2, 15, 16, 17, 31, 32, 33, 100, 199, 200, 201 };
	struct kvm_dirty_vm_harvest args, *header;
	int fd = slot_new(v, OTHER_SLOT, OTHER_GPA, v->npages), i, ret, n;
	struct kvm_dirty_vm_run *runs;

	all_add(a, v->fd);
	all_add(a, fd);
	CHECK_EQ(all_harvest(a, 0, 8), 0);
	guest_write_step(v, 0, 0, 100, 2);
	CHECK_EQ(dsr_mark(fd, 7, 1), 1);

	for (i = 0; i < ARRAY_SIZE(headers); i++) {
		ret = ioctl(a->fd, KVM_DIRTY_VM_LOG_HARVEST, (void *)headers[i]);
		CHECK(ret == -1 && errno == EFAULT, "header %d gave %d", i, ret);
	}
	header = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	runs = calloc(512, sizeof(*runs));
	*header = (struct kvm_dirty_vm_harvest){ .runs = (uintptr_t)runs, .nr_runs = 512 };
	CHECK_OK(mprotect(header, PG, PROT_READ));
	CHECK_ERR(ioctl(a->fd, KVM_DIRTY_VM_LOG_HARVEST, header), EFAULT);
	for (i = 0; i < ARRAY_SIZE(bad); i++) {
		ret = __dsr_vm_harvest(a->fd, (void *)bad[i], 512, KVM_DIRTY_HARVEST_SYNC, &args);
		CHECK(ret == -1 && errno == EFAULT, "row %d gave %d", i, ret);
		CHECK(args.nr_runs == 512 && args.flags == KVM_DIRTY_HARVEST_SYNC,
		      "row %d changed the arguments", i);
	}
	ro = mmap(NULL, PG, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK_ERR(__dsr_vm_harvest(a->fd, ro, 512, 0, &args), EFAULT);
	all_harvest(a, 0, MANY_RUNS);
	log_check(a, 0, 0, 100, 2);
	log_check(a, 1, 7, 1, 1);

	/* An array that ends in nowhere after so many runs: what did not come stays. */
	for (i = 0; i < ARRAY_SIZE(fits); i++) {
		guest_write_step(v, 0, 0, 100, 2);
		for (n = 0; n < 100; n++)
			CHECK_EQ(dsr_mark(fd, 2 * n, 1), 1);
		for (n = 0; n < 300; n++) {
			ret = __dsr_vm_harvest(a->fd, end - fits[i] * sizeof(*runs), 512, 0, &args);
			if (ret)
				break;
			all_take(a, end - fits[i] * sizeof(*runs), &args, fits[i]);
			if (!(args.flags & KVM_DIRTY_HARVEST_MORE))
				break;
		}
		CHECK(!ret || errno == EFAULT, "%u runs fit: gave %d", fits[i], ret);
		CHECK(!ret || fits[i] < 200, "%u runs fit, EFAULT for 200", fits[i]);
		all_harvest(a, 0, MANY_RUNS);
		log_check(a, 0, 0, 100, 2);
		log_check(a, 1, 0, 100, 2);
	}
	all_nothing(a);
	expect_armed(v, 0, v->npages);
	close(fd);
	free(runs);
	all_free(a);
	dsr_free(v);
}

/* EINTR with the arguments as they were, or an answer that is cut short; no page lost. */
TEST(vm_harvest_under_signals)
{
	uint32_t cap = 4096, npages = quick ? 1 << 13 : 1 << 15, i, page;
	struct dsr *v = dsr_new(.npages = npages, .entries = 65536, .nr_vcpus = 1);
	struct kvm_dirty_vm_run *runs = calloc(cap, sizeof(*runs));
	struct kvm_dirty_run *marks = calloc(cap, sizeof(*marks));
	struct all_logs *a = all_new(v);
	struct kvm_dirty_vm_harvest args;
	struct kvm_dirty_slot_runs m;
	int ret, eintr = 0, partial = 0, fd, turn;

	fd = slot_new(v, OTHER_SLOT, OTHER_GPA, npages);
	all_add(a, v->fd);
	all_add(a, fd);
	all_harvest(a, 0, 1);
	for (turn = 0; turn < 3; turn++) {
		/* Stale entries first: nothing to store, for a long time. */
		guest_write(v, 0, 0, npages);
		CHECK_EQ(dsr_discard(v->fd, 0, npages), npages);
		for (page = 0; page < npages; page += 2 * cap) {
			for (i = 0; i < cap; i++)
				marks[i] = (struct kvm_dirty_run){ page + 2 * i, 1 };
			CHECK_OK(__dsr_runs(fd, KVM_DIRTY_SLOT_LOG_MARK, marks, cap, 0, &m));
		}
		WRITE_ONCE(nr_signals, 0);
		signals_every_us(200);
		for (;;) {
			ret = __dsr_vm_harvest(a->fd, runs, cap, KVM_DIRTY_HARVEST_SYNC, &args);
			CHECK(!ret || errno == EINTR, "VM_LOG_HARVEST gave %d", ret);
			if (ret) {
				CHECK_EQ(args.nr_runs, cap);
				CHECK_EQ(args.flags, KVM_DIRTY_HARVEST_SYNC);
				CHECK_EQ(args.nr_pages, 0);
				eintr++;
				continue;
			}
			all_take(a, runs, &args, cap);
			if (!(args.flags & KVM_DIRTY_HARVEST_MORE))
				break;
			partial += args.nr_runs < cap;
		}
		signals_every_us(0);
		log_check(a, 0, 0, 0, 1);
		log_check(a, 1, 0, npages / 2, 2);
		all_nothing(a);
	}
	TH_LOG("%d signals, cut short %d times, EINTR %d times", READ_ONCE(nr_signals), partial,
	       eintr);
	close(fd);
	free(runs);
	free(marks);
	all_free(a);
	dsr_free(v);
}

/* -- which log ------------------------------------------------------------- */

TEST(vm_slots_and_logs)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 2);
	struct all_logs *a = all_new(v);
	int fd[8], i, k, cap;

	CHECK_EQ(all_add(a, v->fd), 0);
	small_slots_new(v, a, fd, 8);
	/* They count up as they are made. */
	for (i = 0; i <= 8; i++)
		CHECK_EQ(a->log[i].nr, i + 1);
	CHECK_EQ(all_harvest(a, 0, 1), 0);
	CHECK_EQ(a->flags, KVM_DIRTY_HARVEST_LAYOUT);

	/* By two vCPUs and by the VMM, in no order, into arrays of all sizes. */
	for (cap = 1; cap < 40; cap += quick ? 13 : 3) {
		for (k = 0; k < 8; k++)
			CHECK_EQ(dsr_mark(fd[k * 5 % 8], k, 1), 1);
		small_write(v, 0, 0, 16, 4);	/* pages 0 and 4 of each */
		small_write(v, 1, 62, 16, -4);	/* 62, 58, ...: pages 6 and 2 of each */
		guest_write_step(v, 1, 1, 100, 3);
		all_harvest(a, cap & 1 ? KVM_DIRTY_HARVEST_SYNC : 0, cap);
		CHECK_EQ(a->flags & KVM_DIRTY_HARVEST_LAYOUT, 0);
		log_check(a, 0, 1, 100, 3);
		for (k = 0; k < 8; k++) {
			uint8_t *got = a->log[1 + k * 5 % 8].got;

			for (i = 0; i < SMALL_PAGES; i++) {
				CHECK(got[i] == (!(i & 1) || i == k),
				      "slot %d page %d: %d times", k * 5 % 8, i, got[i]);
			}
			memset(got, 0, SMALL_PAGES);
		}
		all_nothing(a);
	}
	close_all(fd, 8);
	all_free(a);
	dsr_free(v);
}

/* LAYOUT is told when logs came or went, and at no other time, to each file once. */
TEST(vm_layout)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1, .max_vcpus = 2);
	struct all_logs *a = all_new(v), *b = all_new(v);
	void *mem = mmap(NULL, 16 * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_dirty_vm_harvest args;
	struct kvm_dirty_vm_run run;
	int i, fd;

#define layout_is(told)							\
do {									\
	CHECK_EQ(all_harvest(a, 0, 8), 0);				\
	CHECK_EQ(a->flags, (told) ? KVM_DIRTY_HARVEST_LAYOUT : 0);	\
	CHECK_EQ(all_harvest(a, 0, 8), 0);				\
	CHECK_EQ(a->flags, 0);						\
} while (0)

	all_add(a, v->fd);
	all_add(b, v->fd);
	layout_is(false);
	for (i = 0; i < 3; i++) {
		/* a slot that does not log, made, and deleted */
		CHECK_OK(__vm_set_user_memory_region(v->vm, OTHER_SLOT, 0, OTHER_GPA, 16 * PG,
						     mem));
		layout_is(false);
		/* begins to log, moves, ends */
		CHECK_OK(__vm_set_user_memory_region(v->vm, OTHER_SLOT, KVM_MEM_LOG_DIRTY_PAGES,
						     OTHER_GPA, 16 * PG, mem));
		/* Calls that fail have told nothing. */
		CHECK_ERR(__dsr_vm_harvest(a->fd, &run, 0, 0, &args), EINVAL);
		CHECK_ERR(ioctl(a->fd, KVM_DIRTY_VM_LOG_HARVEST, NULL), EFAULT);
		layout_is(true);
		CHECK_OK(__vm_set_user_memory_region(v->vm, OTHER_SLOT, KVM_MEM_LOG_DIRTY_PAGES,
						     OTHER_GPA + 16 * PG, 16 * PG, mem));
		layout_is(false);
		CHECK_OK(__vm_set_user_memory_region(v->vm, OTHER_SLOT, 0, OTHER_GPA + 16 * PG,
						     16 * PG, mem));
		layout_is(true);
		CHECK_OK(__vm_set_user_memory_region(v->vm, OTHER_SLOT, 0, 0, 0, NULL));
		layout_is(false);
		/* made logging, and deleted so */
		CHECK_OK(__vm_set_user_memory_region(v->vm, OTHER_SLOT, KVM_MEM_LOG_DIRTY_PAGES,
						     OTHER_GPA, 16 * PG, mem));
		layout_is(true);
		CHECK_OK(__vm_set_user_memory_region(v->vm, OTHER_SLOT, 0, 0, 0, NULL));
		layout_is(true);
		/* came and went in between */
		CHECK_OK(__vm_set_user_memory_region(v->vm, OTHER_SLOT, KVM_MEM_LOG_DIRTY_PAGES,
						     OTHER_GPA, 16 * PG, mem));
		CHECK_OK(__vm_set_user_memory_region(v->vm, OTHER_SLOT, 0, 0, 0, NULL));
		layout_is(true);
		/* The other file has not asked yet, and hears of it all at once. */
		CHECK_EQ(all_harvest(b, 0, 8), 0);
		CHECK_EQ(b->flags, KVM_DIRTY_HARVEST_LAYOUT);
		CHECK_EQ(all_harvest(b, 0, 8), 0);
		CHECK_EQ(b->flags, 0);
	}
	dsr_add_vcpu(v, 1);
	layout_is(false);

	/* Who is told of a log's pages has been told of the log. */
	fd = slot_new(v, OTHER_SLOT, OTHER_GPA, 64);
	all_add(a, fd);
	dsr_mark(fd, 3, 1);
	dsr_mark(v->fd, 4, 1);
	CHECK_OK(__dsr_vm_harvest(a->fd, &run, 1, 0, &args));
	CHECK_EQ(args.flags, KVM_DIRTY_HARVEST_LAYOUT | KVM_DIRTY_HARVEST_MORE);
	CHECK_OK(__dsr_vm_harvest(a->fd, &run, 1, 0, &args));
	CHECK_EQ(args.flags & KVM_DIRTY_HARVEST_LAYOUT, 0);
	close(fd);
	all_free(a);
	all_free(b);
	dsr_free(v);
}

/*
 * A memslot that could not be made after all, because of where it would be, has had
 * a log for a moment.  No file may hear of that, or get the pages it started with.
 */
TEST(vm_slot_creation_fails)
{
	struct dsr *v = dsr_new(.entries = 64, .manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE |
							 KVM_DIRTY_LOG_INITIALLY_SET);
	void *mem = mmap(NULL, 16 * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct all_logs *a = all_new(v);
	uint32_t last;
	int i, fd;

	all_add(a, v->fd);
	last = a->log[0].nr;
	CHECK_EQ(all_harvest(a, 0, 8), v->npages);
	log_check(a, 0, 0, v->npages, 1);
	for (i = 0; i < 3; i++) {
		CHECK_ERR(__vm_set_user_memory_region(v->vm, OTHER_SLOT, KVM_MEM_LOG_DIRTY_PAGES,
						      1ull << 52, 16 * PG, mem),
			  SLOT_TOO_HIGH_ERRNO);
		CHECK_ERR(__dsr_open(v->vm, OTHER_SLOT), ENOENT);
		CHECK_EQ(poll_log(a->fd, 0), 0);
		all_nothing(a);
		fd = slot_new(v, OTHER_SLOT, OTHER_GPA, 16);
		CHECK_EQ(poll_log(a->fd, 0), POLLIN);
		all_add(a, fd);
		CHECK(a->log[i + 1].nr > last, "log %u after %u", a->log[i + 1].nr, last);
		last = a->log[i + 1].nr;
		CHECK_EQ(all_harvest(a, 0, 8), 16);
		CHECK_EQ(a->flags & KVM_DIRTY_HARVEST_LAYOUT, KVM_DIRTY_HARVEST_LAYOUT);
		log_check(a, i + 1, 0, 16, 1);
		all_nothing(a);
		vm_mem_region_delete(v->vm, OTHER_SLOT);
		CHECK_EQ(all_harvest(a, 0, 8), 0);
		CHECK_EQ(a->flags, KVM_DIRTY_HARVEST_LAYOUT);
		close(fd);
	}
	all_free(a);
	dsr_free(v);
}

/* What a memslot leaves behind comes once, with its log's number and not its successor's. */
TEST(vm_leftovers)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct all_logs *a = all_new(v), *b = all_new(v), *late;
	struct mailbox mb = { .op = OP_WRITE, .gva = OTHER_GVA, .first = 3, .npages = 100 };
	struct kvm_dirty_vm_harvest args;
	struct kvm_dirty_vm_run run;
	int fd, i, k, how;

	all_add(a, v->fd);
	all_add(b, v->fd);
	virt_map(v->vm, OTHER_GVA, OTHER_GPA, v->npages);
	for (how = 0; how < 4; how++) {
		i = a->nr_logs;
		fd = slot_new(v, OTHER_SLOT, OTHER_GPA, v->npages);
		all_add(a, fd);
		all_add(b, fd);
		all_harvest(a, 0, 1);
		guest_run(v, 0, mb);
		CHECK_EQ(dsr_mark(fd, 200, 50), 50);
		if (how & 1)
			vm_mem_region_set_flags(v->vm, OTHER_SLOT, 0);
		vm_mem_region_delete(v->vm, OTHER_SLOT);
		CHECK_EQ(poll_log(a->fd, 0), POLLIN);
		close(fd);

		/* Another with the same number comes before anybody asked. */
		fd = slot_new(v, OTHER_SLOT, OTHER_GPA, v->npages);
		all_add(a, fd);
		all_add(b, fd);
		CHECK(a->log[i + 1].nr > a->log[i].nr, "log %u after %u", a->log[i + 1].nr,
		      a->log[i].nr);
		mb.first = 7;
		guest_run(v, 0, mb);
		mb.first = 3;

		/* Whichever file asks first; a tiny array, or a part each. */
		if (how & 2) {
			CHECK_OK(__dsr_vm_harvest(a->fd, &run, 1, 0, &args));
			all_take(a, &run, &args, 1);
		}
		all_harvest(b, 0, 1);
		for (k = 0; k < 2; k++) {
			set_join(v, b->log[i + k].got, a->log[i + k].got);
			memset(a->log[i + k].got, 0, v->npages);
		}
		for (k = 200; k < 250; k++) {
			CHECK_EQ(b->log[i].got[k], 1);
			b->log[i].got[k] = 0;
		}
		log_check(b, i, 3, 100, 1);
		log_check(b, i + 1, 7, 100, 1);
		none_check(a);
		none_check(b);
		all_harvest(a, 0, 8);
		all_nothing(a);
		all_nothing(b);
		vm_mem_region_delete(v->vm, OTHER_SLOT);
		CHECK_EQ(poll_log(a->fd, 0), 0);
		close(fd);
	}

	/* Where no such file was open, nothing is kept for one that is opened later. */
	all_free(a);
	all_free(b);
	fd = slot_new(v, OTHER_SLOT, OTHER_GPA, v->npages);
	guest_run(v, 0, mb);
	vm_mem_region_delete(v->vm, OTHER_SLOT);
	late = all_new(v);
	all_add(late, v->fd);
	CHECK_EQ(poll_log(late->fd, 0), 0);
	all_nothing(late);
	close(fd);
	all_free(late);
	dsr_free(v);
}

TEST(vm_slot_moves)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct mailbox mb = { .op = OP_WRITE, .gva = MOVED_GVA, .first = 100, .npages = 200 };
	struct all_logs *a = all_new(v);
	int i;

	all_add(a, v->fd);
	virt_map(v->vm, MOVED_GVA, MOVED_GPA, v->npages);
	for (i = 0; i < 3; i++) {
		guest_write(v, 0, 0, 150);
		vm_mem_region_move(v->vm, TEST_SLOT, MOVED_GPA);
		guest_run(v, 0, mb);
		CHECK_EQ(all_harvest(a, 0, 16), 300);
		CHECK_EQ(a->flags, 0);
		log_check(a, 0, 0, 300, 1);
		guest_run(v, 0, mb);
		vm_mem_region_move(v->vm, TEST_SLOT, TEST_GPA);
		all_harvest(a, 0, 16);
		log_check(a, 0, 100, 200, 1);
		all_nothing(a);
	}
	all_free(a);
	dsr_free(v);
}

/* Slots whose pages start dirty are there from the first moment, each page once. */
TEST(vm_initially_set)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1,
				.manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE |
					  KVM_DIRTY_LOG_INITIALLY_SET);
	struct all_logs *a = all_new(v);
	int fd[5], i, cap;

	all_add(a, v->fd);
	small_slots_new(v, a, fd, 5);
	/* Written or not, while it is still in the log it is in it once. */
	small_write(v, 0, 3, 20, 1);
	guest_write(v, 0, 100, 200);
	for (cap = 0; cap < 2; cap++) {
		all_harvest(a, 0, cap ? 1 : MANY_RUNS);
		log_check(a, 0, 0, cap ? 0 : v->npages, 1);
		for (i = 0; i < 5; i++)
			log_check(a, i + 1, 0, cap ? 0 : SMALL_PAGES, 1);
	}
	small_write(v, 0, 0, 5, SMALL_PAGES);
	guest_write(v, 0, 9, 10);
	all_harvest(a, 0, 1);
	log_check(a, 0, 9, 10, 1);
	for (i = 0; i < 5; i++)
		log_check(a, i + 1, 0, 1, 1);
	/* and where the pages they start with come one by one */
	vm_mem_region_set_flags(v->vm, TEST_SLOT, 0);
	vm_mem_region_set_flags(v->vm, TEST_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
	dsr_reopen(v);
	i = all_add(a, v->fd);
	all_harvest(a, 0, 1);
	log_check(a, i, 0, v->npages, 1);
	all_nothing(a);
	close_all(fd, 5);
	all_free(a);
	dsr_free(v);
}

/* -- who gets what --------------------------------------------------------- */

/*
 * One slot's writers never rest, and arrays hold one run: each of the others gets
 * its turn, in the order of turns, and so does each vCPU's ring.
 */
TEST(vm_fair)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 2);
	struct mailbox mb = { .op = OP_RANDOM, .value = 12345 };
	struct all_logs *a = all_new(v);
	struct kvm_dirty_vm_harvest args;
	struct kvm_dirty_vm_run run;
	int fd[20], i, n, left, round;

	all_add(a, v->fd);
	small_slots_new(v, a, fd, 20);
	all_harvest(a, 0, 1);
	mb.npages = v->npages;
	guest_start(v, 0, mb);
	mb.value = 54321;
	guest_start(v, 1, mb);
	/* All are at it. */
	for (i = 0; i < 2; i++) {
		while (READ_ONCE(v->mb[i]->done) < 10)
			sched_yield();
	}
	for (round = 0; round < rounds(30); round++) {
		for (i = 0; i < 20; i++)
			CHECK_EQ(dsr_mark(fd[(i * 7 + round) % 20], i % SMALL_PAGES, 1), 1);
		for (n = 0, left = 20; left; n++) {
			CHECK(n < 2 * 22, "%d slots of 20 not served after %d calls", left, n);
			CHECK_OK(__dsr_vm_harvest(a->fd, &run, 1, 0, &args));
			all_take(a, &run, &args, 1);
			left -= args.nr_runs && run.slot != TEST_SLOT;
		}
		for (i = 1; i <= 20; i++) {
			CHECK_EQ(a->log[i].pages, 1);
			a->log[i].pages = 0;
		}
	}
	CHECK(a->log[0].pages, "nothing of those who never rest");
	guest_join(v, 0);
	guest_join(v, 1);
	close_all(fd, 20);
	all_free(a);
	dsr_free(v);
}

/* The vCPU stays in the guest, and each SYNC has all of both slots that it has done. */
TEST(vm_sync)
{
	struct dsr *v = dsr_new(.entries = 1024, .nr_vcpus = 1);
	struct mailbox mb = {
		.op = OP_BATCHES, .twin = OTHER_GVA, .first = 3, .npages = 100, .step = 2,
	};
	struct all_logs *a = all_new(v);
	int fd = slot_new(v, OTHER_SLOT, OTHER_GPA, v->npages), i;

	virt_map(v->vm, OTHER_GVA, OTHER_GPA, v->npages);
	all_add(a, v->fd);
	all_add(a, fd);
	guest_start(v, 0, mb);
	for (i = 0; i < rounds(200); i++) {
		guest_batch(v, 0);
		all_harvest(a, KVM_DIRTY_HARVEST_SYNC, MANY_RUNS);
		log_check(a, 0, 3, 100, 2);
		log_check(a, 1, 3, 100, 2);
	}
	guest_join(v, 0);
	close(fd);
	all_free(a);
	dsr_free(v);
}

/* All calls on the same logs, one after the other: each page goes to who asks first. */
TEST(vm_mixed)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	struct all_logs *a = all_new(v);
	int fd = slot_new(v, OTHER_SLOT, OTHER_GPA, v->npages), i;
	struct dsr other = *v;
	uint64_t reset, at;

	other.fd = fd;
	all_add(a, v->fd);
	all_add(a, fd);
	all_harvest(a, 0, 1);
	for (i = 0; i < 5; i++) {
		guest_write_step(v, 0, 0, 150, 2);
		dsr_mark(fd, 10, 20);
		expect_step(v, 0, 150, 2);
		all_harvest(a, 0, 16);
		log_check(a, 0, 0, 0, 1);
		log_check(a, 1, 10, 20, 1);
		expect_nothing(&other);

		guest_write(v, 0, 0, 200);
		CHECK_EQ(bitmap_take(v, NULL), 200);
		guest_write(v, 0, 100, 200);
		all_harvest(a, 0, 16);
		log_check(a, 0, 100, 200, 1);
		CHECK_EQ(bitmap_take(v, NULL), 0);

		/* Collected from the mapping: re-armed, and not reported again. */
		guest_write_step(v, 0, 1, 60, 2);
		reset = dsr_reset_marker(&ring);
		dsr_set_consumer(&ring, reset + 20);
		/* A buffer of the CPU's (PML) is emptied from its end, at each exit of the vCPU. */
		for (at = reset; at < reset + 20; at++) {
			const struct kvm_dirty_run *run = &ring.runs[at % ring.entries];

			CHECK(run->npages == 1 && run->offset < v->npages, "page %u, %u of them",
			      run->offset, run->npages);
			a->log[0].got[run->offset]++;
		}
		all_harvest(a, 0, 16);
		CHECK_EQ(a->log[0].pages, 40);
		log_check(a, 0, 1, 60, 2);
		CHECK_EQ(dsr_reset_marker(&ring), dsr_producer(&ring));
		CHECK_EQ(dsr_consumer(&ring), dsr_producer(&ring));
		guest_write_step(v, 0, 1, 60, 2);
		dsr_set_consumer(&ring, dsr_producer(&ring));
		CHECK_EQ(dsr_reset(v->fd), 60);
		all_nothing(a);

		guest_write(v, 0, 0, 100);
		CHECK_EQ(dsr_discard(v->fd, 20, 500 - 20), 80);
		all_harvest(a, 0, 16);
		log_check(a, 0, 0, 20, 1);
	}
	expect_armed(v, 0, v->npages);
	dsr_unmap(&ring);
	close(fd);
	all_free(a);
	dsr_free(v);
}

struct vm_taker {
	struct all_logs *a;
	struct taker slot;
	int cap;
	bool stop;
	pthread_t thread;
};

static void *vm_taker_thread(void *arg)
{
	struct vm_taker *t = arg;

	do
		all_harvest(t->a, 0, t->cap);
	while (!READ_ONCE(t->stop));
	return NULL;
}

/*
 * Three threads harvest the VM, two of them with one file, one a slot, and one takes
 * its bitmap.  What the VMM marks comes to one of them, once; what the guest writes
 * comes, at least once.
 */
TEST(vm_threads)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	int fd = slot_new(v, OTHER_SLOT, OTHER_GPA, v->npages), i, k, n, same, page;
	uint8_t *want = set_new(v), *got = set_new(v), *other = set_new(v);
	struct vm_taker t[3];
	struct taker slot[2];

	set_add(want, 0, v->npages, 1);
	for (n = 0; n < rounds(40); n++) {
		memset(got, 0, v->npages);
		memset(other, 0, v->npages);
		guest_write(v, 0, 0, 150);
		for (i = 0; i < 3; i++) {
			t[i] = (struct vm_taker){ .a = all_new(v), .cap = 1 + 7 * i };
			all_add(t[i].a, v->fd);
			all_add(t[i].a, fd);
			if (i == 2) {
				same = dup(t[1].a->fd);
				CHECK(dup2(same, t[2].a->fd) == t[2].a->fd, "dup2");
				close(same);
			}
		}
		for (i = 0; i < 2; i++) {
			slot[i] = (struct taker){ .v = v, .got = set_new(v), .bitmap = i };
			CHECK_OK(pthread_create(&slot[i].thread, NULL, taker_thread, &slot[i]));
		}
		for (i = 0; i < 3; i++)
			CHECK_OK(pthread_create(&t[i].thread, NULL, vm_taker_thread, &t[i]));
		for (page = 0; page < v->npages; page += 5) {
			CHECK_EQ(dsr_mark(fd, page, 5), 5);
			if (page >= 150 && page < 315)
				CHECK_EQ(dsr_mark(v->fd, page, 5), 5);
		}
		guest_write(v, 0, 315, v->npages - 315);
		for (i = 0; i < 3; i++)
			WRITE_ONCE(t[i].stop, true);
		for (i = 0; i < 2; i++)
			WRITE_ONCE(slot[i].stop, true);
		for (i = 0; i < 2; i++) {
			CHECK_OK(pthread_join(slot[i].thread, NULL));
			set_join(v, got, slot[i].got);
			free(slot[i].got);
		}
		for (i = 0; i < 3; i++)
			CHECK_OK(pthread_join(t[i].thread, NULL));
		all_harvest(t[0].a, 0, MANY_RUNS);
		for (i = 0; i < 3; i++) {
			for (k = 0; k < 2; k++)
				set_join(v, k ? other : got, t[i].a->log[k].got);
		}
		set_limit(got, 315, v->npages - 315);
		set_check(v, got, want);
		set_check(v, other, want);
		all_nothing(t[0].a);
		for (i = 0; i < 3; i++)
			all_free(t[i].a);
	}
	free(want);
	free(got);
	free(other);
	close(fd);
	dsr_free(v);
}

/* -- readers that lie ------------------------------------------------------ */

/* A consumer that is out of bounds fails nobody else's harvest, and hides no page. */
TEST(vm_hostile_consumer)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 2);
	struct dsr_ring ring[2] = { dsr_map(v->fd, 0), dsr_map(v->fd, 1) };
	struct all_logs *a = all_new(v);
	int fd = slot_new(v, OTHER_SLOT, OTHER_GPA, v->npages), i;
	struct liar liar = { .ring = &ring[0] };
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_run run;
	uint64_t bad[5];

	all_add(a, v->fd);
	all_add(a, fd);
	all_harvest(a, 0, 1);
	for (i = 0; i < ARRAY_SIZE(bad); i++) {
		guest_write_step(v, 0, 0, 50, 2);
		guest_write_step(v, 1, 101, 30, 2);
		dsr_mark(fd, 5, 20);
		bad[0] = dsr_reset_marker(&ring[0]) - 1;
		bad[1] = dsr_producer(&ring[0]) + 1;
		bad[2] = ~0ull;
		bad[3] = dsr_producer(&ring[0]) + (1ull << 32);
		bad[4] = 1ull << 63;
		dsr_set_consumer(&ring[0], bad[i]);
		CHECK_ERR(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, &run, 1, 0, &args), EINVAL);
		CHECK_EQ(all_harvest(a, KVM_DIRTY_HARVEST_SYNC, 16), 100);
		log_check(a, 1, 5, 20, 1);
		CHECK_EQ(a->log[0].got[0], 1);
		CHECK_EQ(a->log[0].got[98], 1);
		CHECK_EQ(a->log[0].got[101], 1);
		CHECK_EQ(a->log[0].got[159], 1);
		CHECK_EQ(a->log[0].pages, 80);
		memset(a->log[0].got, 0, v->npages);
		a->log[0].pages = 0;
		all_nothing(a);
		/* which also put it where it belongs */
		markers_check(&ring[0]);
		markers_check(&ring[1]);
	}

	/* And so while it changes all the time. */
	liar_start(&liar);
	for (i = 0; i < rounds(500); i++) {
		guest_write_step(v, 0, 0, 50, 2);
		dsr_mark(fd, 5, 20);
		all_harvest(a, 0, 16);
		log_check(a, 0, 0, 50, 2);
		log_check(a, 1, 5, 20, 1);
	}
	liar_stop(&liar);
	dsr_set_consumer(&ring[0], dsr_reset_marker(&ring[0]));
	expect_armed(v, 0, v->npages);
	dsr_unmap(&ring[0]);
	dsr_unmap(&ring[1]);
	close(fd);
	all_free(a);
	dsr_free(v);
}

/* -- coming late, and the end ---------------------------------------------- */

TEST(vm_vcpu_added_later)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1, .max_vcpus = 3);
	struct all_logs *a = all_new(v);
	int fd[3], i, k;

	all_add(a, v->fd);
	small_slots_new(v, a, fd, 3);
	all_harvest(a, 0, 1);
	for (i = 0; i < 3; i++) {
		if (i)
			dsr_add_vcpu(v, i);
		small_write(v, i, 0, 3, SMALL_PAGES);
		guest_write(v, i, 10, 100);
		all_harvest(a, 0, 8);
		CHECK_EQ(a->flags & KVM_DIRTY_HARVEST_LAYOUT, 0);
		log_check(a, 0, 10, 100, 1);
		for (k = 0; k < 3; k++)
			log_check(a, k + 1, 0, 1, 1);
	}
	close_all(fd, 3);
	all_free(a);
	dsr_free(v);
}

/* All is taken of a VM that is gone, then it is gone for good. */
static void check_vm_dead(struct all_logs *a, uint32_t cap)
{
	struct kvm_dirty_vm_harvest args;
	struct kvm_dirty_vm_run *runs = calloc(cap, sizeof(*runs));
	int ret, i;

	CHECK_EQ(poll_log(a->fd, 10000), POLLIN | POLLHUP);
	for (;;) {
		ret = __dsr_vm_harvest(a->fd, runs, cap, KVM_DIRTY_HARVEST_SYNC, &args);
		if (ret)
			break;
		all_take(a, runs, &args, cap);
	}
	CHECK(errno == ENODEV, "VM_LOG_HARVEST gave %d", ret);
	CHECK_EQ(args.nr_runs, 0);
	CHECK_EQ(poll_log(a->fd, 0), POLLHUP);
	for (i = 0; i < 3; i++)
		CHECK_ERR(__dsr_vm_harvest(a->fd, runs, cap, 0, &args), ENODEV);
	free(runs);
}

TEST(vm_gone_before_file)
{
	struct all_logs *a;
	int fd[4], i, cap;
	struct dsr *v;

	for (cap = 1; cap < 1000; cap += 333) {
		v = dsr_new(.entries = 64, .nr_vcpus = 1);
		a = all_new(v);
		all_add(a, v->fd);
		small_slots_new(v, a, fd, 4);
		small_write(v, 0, 1, 4, SMALL_PAGES);
		guest_write(v, 0, 2, 150);
		close_all(fd, 4);
		close(v->fd);
		kvm_vm_free(v->vm);
		check_vm_dead(a, cap);
		log_check(a, 0, 2, 150, 1);
		for (i = 0; i < 4; i++)
			log_check(a, i + 1, 1, 1, 1);
		all_free(a);
		free(v);
	}
}

/* The same without anyone deleting the slots first, as when a VMM is killed. */
TEST(vm_vmm_killed_before_file)
{
	struct all_logs a = { 0 };
	int sk[2], fd[4], i;
	struct dsr *v;
	pid_t pid;

	CHECK_OK(socketpair(AF_UNIX, SOCK_STREAM, 0, sk));
	pid = fork();
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		v = dsr_new(.entries = 64, .nr_vcpus = 1);
		small_slots_new(v, NULL, fd, 4);
		small_write(v, 0, 1, 4, SMALL_PAGES);
		guest_write(v, 0, 2, 150);
		send_fd(sk[1], 0, v->fd);
		for (i = 0; i < 4; i++)
			send_fd(sk[1], 0, fd[i]);
		send_fd(sk[1], 0, dsr_open(v->vm, KVM_DIRTY_SLOT_ALL));
		for (;;)
			pause();
	}
	for (i = 0; i < 5; i++) {
		fd[0] = recv_fd(sk[0], NULL, 0);
		all_add(&a, fd[0]);
		close(fd[0]);
	}
	a.fd = recv_fd(sk[0], NULL, 0);
	CHECK_EQ(poll_log(a.fd, 0) & POLLHUP, 0);
	kill(pid, SIGKILL);
	CHECK_EQ(waitpid(pid, NULL, 0), pid);
	for (i = 0; i < 1000 && !(poll_log(a.fd, 0) & POLLHUP); i++)
		sleep_ms(10);
	check_vm_dead(&a, 8);
	log_check(&a, 0, 2, 150, 1);
	for (i = 0; i < 4; i++)
		log_check(&a, i + 1, 1, 1, 1);
	close(a.fd);
}

/* -- poll ------------------------------------------------------------------ */

TEST(vm_poll_level)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	int fd = dsr_open(v->vm, KVM_DIRTY_SLOT_ALL), own = slot_new(v, OTHER_SLOT, OTHER_GPA, 64);
	struct all_logs *a = all_new(v);
	int i;

	all_add(a, v->fd);
	all_add(a, own);
	for (i = 0; i < 3; i++) {
		CHECK_EQ(poll_log(fd, 0), 0);
		guest_write_step(v, 0, 0, 30, 2);
		CHECK_EQ(poll_log(fd, 0), 0);
		guest_write_step(v, 0, 100, 10, 2);	/* half full */
		CHECK_EQ(poll_log(fd, 0), POLLIN);
		all_harvest(a, 0, 8);
		CHECK_EQ(poll_log(fd, 0), 0);
		dsr_mark(own, 7, 1);			/* in the overflow */
		CHECK_EQ(poll_log(fd, 0), POLLIN);
		all_harvest(a, 0, 8);
		CHECK_EQ(poll_log(fd, 0), 0);
	}
	close(own);
	close(fd);
	all_free(a);
	dsr_free(v);
}

static void *vm_poll_thread(void *arg)
{
	struct taker *t = arg;

	t->nr = poll_log(t->v->fd, 60000);
	return NULL;
}

/* A poller that is asleep already wakes up, for each of the reasons. */
TEST(vm_poll_wakes)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1), all = *v;
	struct all_logs *a = all_new(v);
	int fd = slot_new(v, OTHER_SLOT, OTHER_GPA, 64), i;
	struct taker t = { .v = &all };

	all_add(a, v->fd);
	all_add(a, fd);
	all.fd = a->fd;
	for (i = 0; i < 6; i++) {
		/* what a deleted slot leaves behind, however little, is a reason */
		if (i == 4)
			guest_write(v, 0, 3, 2);
		CHECK_EQ(poll_log(a->fd, 0), 0);
		t.nr = -1;
		CHECK_OK(pthread_create(&t.thread, NULL, vm_poll_thread, &t));
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
			dsr_mark(fd, 9, 1);
			break;
		case 3:
			guest_write(v, 0, 0, 70);
			break;
		case 4:
			dsr_log(v, false);
			break;
		case 5:
			close(v->fd);
			kvm_vm_free(v->vm);
			break;
		}
		CHECK_OK(pthread_join(t.thread, NULL));
		CHECK_EQ(t.nr, i == 5 ? POLLHUP : POLLIN);
		if (i != 5)
			all_harvest(a, 0, MANY_RUNS);
	}
	close(fd);
	all_free(a);
	free(v);
}

/* Who is told of edges alone, and sleeps after each complete harvest, misses nothing. */
static void *vm_edge_thread(void *arg)
{
	struct vm_taker *t = arg;
	int ep = edge_open(t->a->fd), i;
	uint64_t pages;

	while (!READ_ONCE(t->stop)) {
		edge_wait(ep);
		for (i = 0, pages = 0; i < t->a->nr_logs; i++)
			pages -= t->a->log[i].pages;
		all_harvest(t->a, 0, t->cap);
		for (i = 0; i < t->a->nr_logs; i++)
			pages += t->a->log[i].pages;
		__atomic_fetch_add(&t->slot.nr, pages, __ATOMIC_RELEASE);
	}
	close(ep);
	return NULL;
}

TEST(vm_poll_edge)
{
	struct dsr *v = dsr_new(.entries = 64, .npages = 16 * 64 * 64);
	struct vm_taker t = { .a = all_new(v), .cap = 4 };
	int fd = slot_new(v, OTHER_SLOT, OTHER_GPA, 64);
	const struct marked_log logs[] = {
		{ .fd = v->fd, .npages = v->npages }, { .fd = fd, .npages = 64 },
	};

	all_add(t.a, v->fd);
	all_add(t.a, fd);
	CHECK_OK(pthread_create(&t.thread, NULL, vm_edge_thread, &t));
	mark_for_poller(logs, ARRAY_SIZE(logs), t.a->fd, &t.slot.nr);
	WRITE_ONCE(t.stop, true);
	dsr_mark(v->fd, 0, 1);
	CHECK_OK(pthread_join(t.thread, NULL));
	close(fd);
	all_free(t.a);
	dsr_free(v);
}

/* -- what is idle costs nothing -------------------------------------------- */

#define TRACING		"/sys/kernel/tracing/"
#define TRACE_EVENT	TRACING "events/kvm_dirty_slot_ring/kvm_dirty_slot_vm_harvest/enable"

static void trace_write(const char *name, const char *value)
{
	int fd = open(name, O_WRONLY | O_TRUNC);

	CHECK(fd >= 0 && write(fd, value, strlen(value)) == (int)strlen(value), "%s", name);
	close(fd);
}

/* How many logs the harvest looked at, as the kernel tells. */
static int logs_looked_at(struct all_logs *a, uint32_t cap)
{
	char line[512], *p;
	int n = -1, lines = 0;
	FILE *f;

	trace_write(TRACING "trace", "");
	all_harvest(a, 0, cap);
	f = fopen(TRACING "trace", "r");
	CHECK(f, "no trace");
	while (fgets(line, sizeof(line), f)) {
		p = strstr(line, "kvm_dirty_slot_vm_harvest: ");
		p = p ? strstr(p, " logs ") : NULL;
		if (!p)
			continue;
		n = atoi(p + 6);
		lines++;
	}
	fclose(f);
	CHECK(lines == (int)a->calls, "%d events of %u calls", lines, a->calls);
	return n;
}

TEST(vm_idle_slots_cost_nothing)
{
	int n = quick ? 40 : 500, i, k, looked, *fd = calloc(n, sizeof(*fd));
	struct dsr *v;
	struct all_logs *a;

	if (access(TRACE_EVENT, W_OK))
		SKIP(return, "no tracefs");

	/* slot numbers end at 32764, memory for page tables at what the slot's size says */
	v = dsr_new(.entries = 64, .nr_vcpus = 2);
	a = all_new(v);
	all_add(a, v->fd);
	small_slots_new(v, a, fd, n);
	trace_write(TRACE_EVENT, "1");
	CHECK_EQ(logs_looked_at(a, MANY_RUNS), 0);

	small_write(v, 0, 0, n, SMALL_PAGES);
	small_write(v, 1, 1, n, SMALL_PAGES);
	looked = logs_looked_at(a, MANY_RUNS * 2);
	CHECK(looked >= n, "%d logs for %d slots that were written", looked, n);
	for (i = 0; i < n; i++)
		log_check(a, i + 1, 0, 2, 1);

	/* Two calls and a grace period are what it takes; an emulator's may be long. */
	for (i = 0; (looked = logs_looked_at(a, 8)); i++) {
		CHECK(i < 300, "%d logs are looked at that have nothing", looked);
		sleep_ms(10);
	}
	TH_LOG("quiet after %d calls", i);
	for (k = 0; k < 5; k++)
		CHECK_EQ(logs_looked_at(a, 8), 0);

	/* They are not forgotten, and neither is who is busy meanwhile. */
	for (k = 0; k < 3; k++) {
		small_write(v, k & 1, (7 + k) * SMALL_PAGES + 3, 1, 1);
		dsr_mark(fd[n - 1], 2, 1);
		looked = logs_looked_at(a, 8);
		CHECK(looked >= 2 && looked <= 2 + k, "%d logs for 2", looked);
		log_check(a, 1 + 7 + k, 3, 1, 1);
		log_check(a, n, 2, 1, 1);
		none_check(a);
	}
	trace_write(TRACE_EVENT, "0");
	close_all(fd, n);
	free(fd);
	all_free(a);
	dsr_free(v);
}

int main(int argc, char *argv[])
{
	return dsr_test_main(argc, argv);
}
