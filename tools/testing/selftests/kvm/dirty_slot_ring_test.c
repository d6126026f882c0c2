// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings: the capability, the descriptor, harvests, statistics; each
 * errno and each field.
 *
 * The guest writes pages of a memslot of its own, on command, and the tests
 * compare what the log says with exactly that set of pages: what is missing,
 * what nobody wrote and what comes twice are all failures.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "dirty_slot_ring_test.h"

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
	/* Rings are no larger than their slot, in powers of two. */
	static const struct {
		uint32_t npages, size, entries;
	} slots[] = {
		{ 1, 64, 1 }, { 2, 64, 2 }, { 3, 64, 4 }, { 5, 64, 8 }, { 63, 64, 64 },
		{ 64, 64, 64 }, { 65, 64, 64 }, { 65, 128, 128 }, { 1, 1, 1 }, { 2, 1, 1 },
		{ 1000, 0, 1024 }, { 16384, 0, 4096 }, { 65535, 0, 4096 },
		{ 65536, 0, 8192 }, { 131071, 0, 8192 }, { 131072, 0, 16384 },
		{ 1000, 65536, 1024 }, { 1024, 65536, 1024 }, { 1025, 65536, 2048 },
	};
	struct kvm_dirty_slot_log_info info;
	struct dsr *v;
	int i;

	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		v = dsr_new(.entries = sizes[i], .npages = DSR_MAX_ENTRIES);
		info = dsr_info(v->fd);
		CHECK_EQ(info.entries, sizes[i] ?: DSR_DEFAULT_ENTRIES);
		dsr_free(v);
	}
	for (i = 0; i < ARRAY_SIZE(slots); i++) {
		v = dsr_new(.entries = slots[i].size, .npages = slots[i].npages);
		info = dsr_info(v->fd);
		CHECK_EQ(info.entries, slots[i].entries);
		CHECK_EQ(info.stride,
			 PG + roundup(slots[i].entries * sizeof(struct kvm_dirty_run), PG));
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
	int stats = vm_get_stats_fd(v->vm);

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
	CHECK_EQ(stat_of(stats, "dirty_slot_log_harvests"), 0);
	CHECK(guest_is_done(v->vcpu[0]->run), "another exit");
	close(stats);
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
		KVM_DIRTY_VM_LOG_HARVEST,
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
	CHECK_EQ(info.stride, 2 * PG);
	CHECK_EQ(info.npages, v->npages);
	CHECK_EQ(info.base_gfn, TEST_GPA / PG);
	/* The area has a place for each vCPU that there may be. */
	CHECK_EQ(info.consumers_size,
		 roundup(vm_check_cap(v->vm, KVM_CAP_MAX_VCPUS) * KVM_DIRTY_SLOT_CONSUMER_STRIDE,
			 PG));
	CHECK_EQ(info.rings_offset, info.consumers_size);
	CHECK_EQ(info.log, 1);
	CHECK(!info.pad && !info.reserved, "reserved fields not zero");

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

/* -- statistics ----------------------------------------------------------- */

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

int main(int argc, char *argv[])
{
	return dsr_test_main(argc, argv);
}
