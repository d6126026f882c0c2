/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
#ifndef _UAPI_LINUX_KVM_DIRTY_SLOT_RING_H
#define _UAPI_LINUX_KVM_DIRTY_SLOT_RING_H

/*
 * Dirty slot rings: per-vCPU, per-memslot circular buffers of dirty gfns.
 * See Documentation/virt/kvm/dirty-slot-ring.rst.
 *
 * This header is the whole ABI and needs nothing but the two includes below,
 * so that a VMM built on a distribution whose linux/kvm.h does not know the
 * feature can carry a copy of it.
 */

#include <linux/ioctl.h>
#include <linux/types.h>

/*
 * KVM_CHECK_EXTENSION gives the largest ring size, in entries; 0 if absent.
 * KVM_ENABLE_CAP on the VM: args[0] is the entries of each ring (a power of
 * two, 0 for the default), args[1] holds KVM_DIRTY_SLOT_RING_* flags.
 */
#define KVM_CAP_DIRTY_SLOT_RING		0x2000

/* args[1]: a vCPU whose ring is full exits with KVM_EXIT_DIRTY_SLOT_RING_FULL */
#define KVM_DIRTY_SLOT_RING_EXIT_ON_FULL	(1 << 0)

#define KVM_EXIT_DIRTY_SLOT_RING_FULL	0x2000

/**
 * struct kvm_dirty_slot_ring_exit - kvm_run.dirty_slot_ring
 * @slot: the memslot whose ring is full, as_id << 16 | id
 * @pad: zero
 *
 * It stands where every exit's details stand, in the union that has the member
 * kvm_run.hw; a VMM with an old linux/kvm.h reads it from there.
 */
struct kvm_dirty_slot_ring_exit {
	__u32 slot;
	__u32 pad;
};

/**
 * struct kvm_dirty_slot_log_fd - argument of KVM_GET_DIRTY_SLOT_LOG_FD
 * @slot: as_id << 16 | id of a memslot that logs dirty pages, or
 *	KVM_DIRTY_SLOT_ALL for all that do so now or later
 * @flags: must be zero
 */
struct kvm_dirty_slot_log_fd {
	__u32 slot;
	__u32 flags;
};

#define KVM_DIRTY_SLOT_ALL		0xffffffffU

/**
 * struct kvm_dirty_slot_log_info - what KVM_DIRTY_SLOT_LOG_INFO tells
 * @slot: as_id << 16 | id
 * @nr_rings: rings that exist now, one for each vCPU created so far
 * @entries: entries of each ring: as the capability said, but no more than the
 *	memslot has pages, rounded up to a power of two
 * @flags: KVM_DIRTY_SLOT_LOG_DEAD or zero
 * @stride: distance from one ring to the next in the mapping, in bytes
 * @npages: size of the memslot, in pages
 * @base_gfn: where the memslot is (or last was) in guest physical memory
 * @log: the log's number in the VM; they count up and are not used again
 * @pad: zero
 * @consumers_size: size of the area of the consumers, at the start of the
 *	mapping, in bytes
 * @rings_offset: where ring 0 is in the mapping, in bytes
 * @reserved: zero
 */
struct kvm_dirty_slot_log_info {
	__u32 slot;
	__u32 nr_rings;
	__u32 entries;
	__u32 flags;
	__u64 stride;
	__u64 npages;
	__u64 base_gfn;
	__u32 log;
	__u32 pad;
	__u64 consumers_size;
	__u64 rings_offset;
	__u64 reserved;
};

/* kvm_dirty_slot_log_info.flags: the slot stopped logging */
#define KVM_DIRTY_SLOT_LOG_DEAD		(1 << 0)

/**
 * struct kvm_dirty_run - pages that follow one another
 * @offset: the first one, in pages from the start of the memslot
 * @npages: how many, at least one
 */
struct kvm_dirty_run {
	__u32 offset;
	__u32 npages;
};

/**
 * struct kvm_dirty_slot_runs - argument of HARVEST, MARK and DISCARD
 * @runs: userspace address of an array of struct kvm_dirty_run
 * @nr_runs: HARVEST: in, the capacity of the array (at least 1); out, the runs
 *	stored.  MARK and DISCARD: in, the runs in the array
 * @flags: HARVEST: in, KVM_DIRTY_HARVEST_SYNC or zero; out,
 *	KVM_DIRTY_HARVEST_MORE or zero.  MARK and DISCARD: must be zero
 * @nr_pages: out.  HARVEST: pages in the runs stored.  MARK: pages newly
 *	logged.  DISCARD: pages that were logged
 * @reserved: must be zero
 */
struct kvm_dirty_slot_runs {
	__u64 runs;
	__u32 nr_runs;
	__u32 flags;
	__u64 nr_pages;
	__u64 reserved[2];
};

/* In: first make CPUs hand over the dirty pages that hardware still holds */
#define KVM_DIRTY_HARVEST_SYNC		(1 << 0)
/* Out (ignored on input): the array filled up, call again */
#define KVM_DIRTY_HARVEST_MORE		(1 << 1)

/**
 * struct kvm_dirty_vm_run - pages of one memslot that follow one another
 * @slot: the memslot, as_id << 16 | id
 * @log: which of the logs it had, one after the other: see
 *	kvm_dirty_slot_log_info.log
 * @offset: the first page, in pages from the start of the memslot
 * @npages: how many, at least one
 */
struct kvm_dirty_vm_run {
	__u32 slot;
	__u32 log;
	__u32 offset;
	__u32 npages;
};

/**
 * struct kvm_dirty_vm_harvest - argument of KVM_DIRTY_VM_LOG_HARVEST
 * @runs: userspace address of an array of struct kvm_dirty_vm_run
 * @nr_runs: in, the capacity of the array (at least 1); out, the runs stored,
 *	those of one log one after the other
 * @flags: in, KVM_DIRTY_HARVEST_SYNC or zero; out, KVM_DIRTY_HARVEST_MORE,
 *	KVM_DIRTY_HARVEST_LAYOUT or zero
 * @nr_pages: out, pages in the runs stored
 * @reserved: must be zero
 */
struct kvm_dirty_vm_harvest {
	__u64 runs;
	__u32 nr_runs;
	__u32 flags;
	__u64 nr_pages;
	__u64 reserved[4];
};

/*
 * Out, of KVM_DIRTY_VM_LOG_HARVEST (ignored on input): logs came or went since
 * the last call on this file, or since it was opened
 */
#define KVM_DIRTY_HARVEST_LAYOUT	(1 << 2)

/**
 * struct kvm_dirty_slot_reset - argument of KVM_DIRTY_SLOT_LOG_RESET
 * @nr_pages: out, pages re-protected
 * @flags: in, zero; out, KVM_DIRTY_RESET_OVERFLOW or zero
 * @pad: must be zero
 * @reserved: must be zero
 */
struct kvm_dirty_slot_reset {
	__u64 nr_pages;
	__u32 flags;
	__u32 pad;
	__u64 reserved[2];
};

/* Out (ignored on input): pages are in no ring, KVM_DIRTY_SLOT_LOG_HARVEST has them */
#define KVM_DIRTY_RESET_OVERFLOW	(1 << 0)

/*
 * The mapping of the log fd of a memslot begins with an area of consumers: that of
 * ring n, which is the n-th created vCPU's, is at n * KVM_DIRTY_SLOT_CONSUMER_STRIDE.
 * The area, or pages of it, can be mapped writable; all else cannot.
 *
 * Ring n is at rings_offset + n * stride: a page for struct kvm_dirty_slot_ring_kern,
 * then the entries, an array of struct kvm_dirty_run.  Entry i stands at index
 * i % entries.  The counts are free running and never wrap;
 * reset <= consumer <= producer <= reset + entries.
 *
 *	[reset, consumer)	collected by userspace, not yet re-protected
 *	[consumer, producer)	logged, not yet collected
 *
 * Barriers: userspace's load-acquire of producer pairs with the kernel's
 * store-release of it after writing an entry; userspace's store-release of
 * consumer, after it has read the entries, pairs with the kernel's load-acquire
 * of it in HARVEST and RESET.
 */

/**
 * struct kvm_dirty_slot_ring_user - a consumer, read-write
 * @consumer: written by userspace, and by HARVEST on its behalf
 */
struct kvm_dirty_slot_ring_user {
	__u64 consumer;
};

#define KVM_DIRTY_SLOT_CONSUMER_STRIDE		64

/**
 * struct kvm_dirty_slot_ring_kern - the first page of a ring, read-only
 * @producer: written by the kernel only
 * @reset: written by the kernel only
 * @overflowed: written by the kernel only, pages of this vCPU that found the
 *	ring full and went to the overflow log since tracking began
 * @pad0: keeps producer and reset, which different CPUs write, apart
 * @pad1: likewise
 */
struct kvm_dirty_slot_ring_kern {
	__u64 producer;
	__u64 pad0[7];
	__u64 reset;
	__u64 pad1[7];
	__u64 overflowed;
};

#define KVM_DIRTY_SLOT_RING_KERN_PAGE		0
#define KVM_DIRTY_SLOT_RING_ENTRIES_PAGE	1

/* 0xAE is KVMIO, spelled out so that linux/kvm.h is not needed */

/* on the VM fd */
#define KVM_GET_DIRTY_SLOT_LOG_FD	_IOW(0xAE, 0xf0, struct kvm_dirty_slot_log_fd)
/* on the log fd */
#define KVM_DIRTY_SLOT_LOG_INFO		_IOR(0xAE, 0xf1, struct kvm_dirty_slot_log_info)
#define KVM_DIRTY_SLOT_LOG_HARVEST	_IOWR(0xAE, 0xf2, struct kvm_dirty_slot_runs)
#define KVM_DIRTY_SLOT_LOG_RESET	_IOWR(0xAE, 0xf3, struct kvm_dirty_slot_reset)
#define KVM_DIRTY_SLOT_LOG_MARK		_IOWR(0xAE, 0xf4, struct kvm_dirty_slot_runs)
#define KVM_DIRTY_SLOT_LOG_DISCARD	_IOWR(0xAE, 0xf5, struct kvm_dirty_slot_runs)
/* on the log fd of KVM_DIRTY_SLOT_ALL */
#define KVM_DIRTY_VM_LOG_HARVEST	_IOWR(0xAE, 0xf6, struct kvm_dirty_vm_harvest)

#endif /* _UAPI_LINUX_KVM_DIRTY_SLOT_RING_H */
