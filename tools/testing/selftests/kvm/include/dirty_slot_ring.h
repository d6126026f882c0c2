/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Thin wrappers for the dirty slot ring ABI, shared by its tests.
 *
 * __dsr_*() hand back what the system call said and leave errno alone, dsr_*()
 * insist that it worked.  Nothing here knows about guests.
 */
#ifndef SELFTEST_KVM_DIRTY_SLOT_RING_H
#define SELFTEST_KVM_DIRTY_SLOT_RING_H

#include <sys/ioctl.h>
#include <sys/mman.h>

#include <linux/kvm.h>
#include <linux/kvm_dirty_slot_ring.h>

#include "kvm_util.h"
#include "test_util.h"

kvm_static_assert(sizeof(struct kvm_dirty_slot_log_fd) == 8);
kvm_static_assert(sizeof(struct kvm_dirty_slot_log_info) == 72);
kvm_static_assert(offsetof(struct kvm_dirty_slot_log_info, log) == 40);
kvm_static_assert(offsetof(struct kvm_dirty_slot_log_info, consumers_size) == 48);
kvm_static_assert(sizeof(struct kvm_dirty_vm_harvest) == 56);
kvm_static_assert(sizeof(struct kvm_dirty_vm_run) == 16);
kvm_static_assert(sizeof(struct kvm_dirty_slot_runs) == 40);
kvm_static_assert(sizeof(struct kvm_dirty_slot_reset) == 32);
kvm_static_assert(sizeof(struct kvm_dirty_run) == 8);
kvm_static_assert(offsetof(struct kvm_dirty_slot_ring_kern, producer) == 0);
kvm_static_assert(offsetof(struct kvm_dirty_slot_ring_kern, reset) == 64);
kvm_static_assert(offsetof(struct kvm_dirty_slot_ring_kern, overflowed) == 128);

#define PG			4096ul

/* Of a slot of DSR_MAX_ENTRIES pages. */
#define DSR_DEFAULT_ENTRIES	(DSR_MAX_ENTRIES / 8)
#define DSR_MAX_ENTRIES		65536

static inline int __dsr_enable(struct kvm_vm *vm, uint64_t entries, uint64_t flags)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_DIRTY_SLOT_RING,
		.args = { entries, flags },
	};

	return ioctl(vm->fd, KVM_ENABLE_CAP, &cap);
}

static inline void dsr_enable(struct kvm_vm *vm, uint64_t entries, uint64_t flags)
{
	int ret = __dsr_enable(vm, entries, flags);

	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_CAP_DIRTY_SLOT_RING, ret));
}

static inline int __dsr_open(struct kvm_vm *vm, uint32_t slot)
{
	struct kvm_dirty_slot_log_fd arg = { .slot = slot };

	return ioctl(vm->fd, KVM_GET_DIRTY_SLOT_LOG_FD, &arg);
}

static inline int dsr_open(struct kvm_vm *vm, uint32_t slot)
{
	int fd = __dsr_open(vm, slot);

	TEST_ASSERT(fd >= 0, KVM_IOCTL_ERROR(KVM_GET_DIRTY_SLOT_LOG_FD, fd));
	return fd;
}

static inline struct kvm_dirty_slot_log_info dsr_info(int fd)
{
	struct kvm_dirty_slot_log_info info;
	int ret = ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info);

	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_DIRTY_SLOT_LOG_INFO, ret));
	return info;
}

/* HARVEST, MARK or DISCARD; @args holds the outcome. */
static inline int __dsr_runs(int fd, unsigned long cmd, const struct kvm_dirty_run *runs,
			     uint32_t nr_runs, uint32_t flags, struct kvm_dirty_slot_runs *args)
{
	*args = (struct kvm_dirty_slot_runs) {
		.runs = (uintptr_t)runs,
		.nr_runs = nr_runs,
		.flags = flags,
	};
	return ioctl(fd, cmd, args);
}

/* MARK or DISCARD one run; returns the pages that changed. */
static inline uint64_t dsr_run(int fd, unsigned long cmd, uint32_t offset, uint32_t npages)
{
	struct kvm_dirty_run run = { .offset = offset, .npages = npages };
	struct kvm_dirty_slot_runs args;
	int ret = __dsr_runs(fd, cmd, &run, 1, 0, &args);

	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(MARK / DISCARD, ret));
	return args.nr_pages;
}

#define dsr_mark(fd, offset, npages)	\
	dsr_run(fd, KVM_DIRTY_SLOT_LOG_MARK, offset, npages)
#define dsr_discard(fd, offset, npages)	\
	dsr_run(fd, KVM_DIRTY_SLOT_LOG_DISCARD, offset, npages)

/* HARVEST of all slots; @args holds the outcome. */
static inline int __dsr_vm_harvest(int fd, const struct kvm_dirty_vm_run *runs,
				   uint32_t nr_runs, uint32_t flags,
				   struct kvm_dirty_vm_harvest *args)
{
	*args = (struct kvm_dirty_vm_harvest) {
		.runs = (uintptr_t)runs,
		.nr_runs = nr_runs,
		.flags = flags,
	};
	return ioctl(fd, KVM_DIRTY_VM_LOG_HARVEST, args);
}

static inline int __dsr_reset(int fd, struct kvm_dirty_slot_reset *args)
{
	memset(args, 0, sizeof(*args));
	return ioctl(fd, KVM_DIRTY_SLOT_LOG_RESET, args);
}

/* Returns the pages re-protected. */
static inline uint64_t dsr_reset(int fd)
{
	struct kvm_dirty_slot_reset args;
	int ret = __dsr_reset(fd, &args);

	TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_DIRTY_SLOT_LOG_RESET, ret));
	return args.nr_pages;
}

/* One vCPU's ring, mapped as a reader maps it. */
struct dsr_ring {
	uint32_t entries;
	size_t size;				/* of the read-only mapping */
	void *area;				/* of the consumers of all rings */
	size_t area_size;
	struct kvm_dirty_slot_ring_user *user;
	const struct kvm_dirty_slot_ring_kern *kern;
	const struct kvm_dirty_run *runs;
};

static inline int __dsr_map(int fd, const struct kvm_dirty_slot_log_info *info, uint32_t n,
			    struct dsr_ring *ring)
{
	off_t base = info->rings_offset + n * info->stride;
	size_t page = getpagesize();
	void *p;

	ring->entries = info->entries;
	ring->area_size = info->consumers_size;
	p = mmap(NULL, ring->area_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (p == MAP_FAILED)
		return -1;
	ring->area = p;
	ring->user = p + n * KVM_DIRTY_SLOT_CONSUMER_STRIDE;

	ring->size = (KVM_DIRTY_SLOT_RING_ENTRIES_PAGE - KVM_DIRTY_SLOT_RING_KERN_PAGE) * page +
		     info->entries * sizeof(struct kvm_dirty_run);
	p = mmap(NULL, ring->size, PROT_READ, MAP_SHARED, fd,
		 base + KVM_DIRTY_SLOT_RING_KERN_PAGE * page);
	if (p == MAP_FAILED) {
		munmap(ring->area, ring->area_size);
		return -1;
	}
	ring->kern = p;
	ring->runs = p + (KVM_DIRTY_SLOT_RING_ENTRIES_PAGE - KVM_DIRTY_SLOT_RING_KERN_PAGE) * page;
	return 0;
}

static inline struct dsr_ring dsr_map(int fd, uint32_t n)
{
	struct kvm_dirty_slot_log_info info = dsr_info(fd);
	struct dsr_ring ring = { 0 };
	int ret = __dsr_map(fd, &info, n, &ring);

	TEST_ASSERT(!ret, "mapping ring %u, errno %d", n, errno);
	return ring;
}

static inline void dsr_unmap(struct dsr_ring *ring)
{
	munmap(ring->area, ring->area_size);
	munmap((void *)ring->kern, ring->size);
}

static inline uint64_t dsr_producer(const struct dsr_ring *ring)
{
	/* Pairs with the kernel's release of producer: entries before it are there. */
	return __atomic_load_n(&ring->kern->producer, __ATOMIC_ACQUIRE);
}

static inline uint64_t dsr_reset_marker(const struct dsr_ring *ring)
{
	/* The other markers, if they are read later, are not older than it. */
	return __atomic_load_n(&ring->kern->reset, __ATOMIC_ACQUIRE);
}

static inline uint64_t dsr_overflowed(const struct dsr_ring *ring)
{
	return __atomic_load_n(&ring->kern->overflowed, __ATOMIC_RELAXED);
}

static inline uint64_t dsr_consumer(const struct dsr_ring *ring)
{
	return __atomic_load_n(&ring->user->consumer, __ATOMIC_RELAXED);
}

static inline void dsr_set_consumer(struct dsr_ring *ring, uint64_t consumer)
{
	/* Pairs with the kernel's acquire of consumer: entries are read before it. */
	__atomic_store_n(&ring->user->consumer, consumer, __ATOMIC_RELEASE);
}

static inline struct kvm_dirty_run dsr_entry(const struct dsr_ring *ring, uint64_t i)
{
	return ring->runs[i & (ring->entries - 1)];
}

#endif /* SELFTEST_KVM_DIRTY_SLOT_RING_H */
