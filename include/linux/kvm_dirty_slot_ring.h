/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __KVM_DIRTY_SLOT_RING_H
#define __KVM_DIRTY_SLOT_RING_H

/*
 * What the rest of KVM may call of the dirty slot rings.  All of it is in
 * virt/kvm/dirty_slot/; the ABI is in the uapi header of the same name.
 */

#include <linux/compiler.h>
#include <linux/errno.h>
#include <linux/types.h>
#include <asm/barrier.h>

/* Same name, and this one comes first in the kernel's include path. */
#include <uapi/linux/kvm_dirty_slot_ring.h>

struct kvm;
struct kvm_dirty_slot_mask;
struct kvm_dirty_slot_vm;
struct kvm_enable_cap;
struct kvm_memory_slot;
struct kvm_vcpu;
struct module;

#ifdef CONFIG_HAVE_KVM_DIRTY_SLOT_RING

/**
 * struct kvm_dirty_slot_ring_vm - the feature's state in struct kvm
 * @entries: entries of each ring.  Zero, and everything is off, until
 *	KVM_CAP_DIRTY_SLOT_RING is enabled, then never changes.  Written under
 *	kvm->lock and kvm->slots_lock
 * @by_slot: nobody said how many: @entries is the most, each slot has its own
 * @flags: KVM_DIRTY_SLOT_RING_*
 * @nr_rings: vCPUs that have a ring in every log.  Protected by slots_lock
 * @vm: all logs, from when it is enabled on
 */
struct kvm_dirty_slot_ring_vm {
	u32 entries;
	bool by_slot;
	u32 flags;
	u32 nr_rings;
	struct kvm_dirty_slot_vm *vm;
};

/**
 * struct kvm_dirty_slot_ring_vcpu - the feature's state in struct kvm_vcpu
 * @hw_seq: odd while there may be writes through this vCPU that are not marked
 *	yet, as with Intel's PML.  Written by the vCPU's thread only
 * @nr: 1 + vcpu_idx, or 0 as long as it has none.  Written once, before the vCPU
 *	is online
 */
struct kvm_dirty_slot_ring_vcpu {
	u32 hw_seq;
	u32 nr;
};

/**
 * struct kvm_dirty_slot_mask - pages of a memslot to be protected
 * @offset: of the page of bit 0, in pages from the start of the memslot; a
 *	multiple of BITS_PER_LONG
 * @mask: the pages, at least one
 */
struct kvm_dirty_slot_mask {
	unsigned long offset;
	unsigned long mask;
};

#define KVM_DIRTY_SLOT_RING_MAX_ENTRIES	65536

void kvm_dirty_slot_ring_init(struct module *module);
int kvm_dirty_slot_ring_enable(struct kvm *kvm, struct kvm_enable_cap *cap);
int kvm_dirty_slot_ring_add_vcpu(struct kvm_vcpu *vcpu);
bool kvm_dirty_slot_ring_check_request(struct kvm_vcpu *vcpu);
void kvm_dirty_slot_ring_destroy(struct kvm *kvm);

int kvm_dirty_slot_log_create(struct kvm *kvm, struct kvm_memory_slot *memslot);
void kvm_dirty_slot_log_start(const struct kvm_memory_slot *memslot);
void kvm_dirty_slot_log_stop(struct kvm *kvm,
			     const struct kvm_memory_slot *memslot);
bool kvm_dirty_slot_log_release(struct kvm_memory_slot *memslot);
void kvm_dirty_slot_log_mark(struct kvm *kvm,
			     const struct kvm_memory_slot *memslot,
			     struct kvm_vcpu *vcpu, unsigned long offset);
void kvm_dirty_slot_log_mark_vcpu(const struct kvm_memory_slot *memslot,
				  struct kvm_vcpu *vcpu, unsigned long offset);
void kvm_dirty_slot_log_look_again(const struct kvm_memory_slot *memslot,
				   struct kvm_vcpu *vcpu, unsigned long offset);
int kvm_vm_ioctl_get_dirty_slot_log_fd(struct kvm *kvm, void __user *argp);

/**
 * kvm_arch_dirty_slot_protect - make the next write to pages show
 * @kvm: the VM
 * @memslot: the memslot
 * @masks: the pages
 * @nr: of @masks, at least 1
 *
 * Each architecture that selects HAVE_KVM_DIRTY_SLOT_RING has one.  What
 * kvm_arch_mmu_enable_log_dirty_pt_masked() does, for many masks that are in no
 * order, but without slots_lock, which that one may count on: whatever slots_lock
 * protects, such as caches of pages for splitting huge ones, is not to be used.
 * The caller may belong to another process than the VM: nothing is allocated on
 * its account.  A huge page is protected as a whole, for the next write to split
 * it.  The caller flushes TLBs.
 *
 * It takes mmu_lock itself: for read, if whoever makes a page of a memslot with a
 * log writable calls kvm_dirty_slot_log_look_again(), or marks it, after that; else
 * for write.  Pages' bits in the log were cleared, full barrier, before this.
 *
 * Context: kvm->srcu is held for read, and no lock; slots_lock is not.  May sleep.
 * Return: how many of @masks were done, from the first on.  At least one; to do
 * fewer than @nr, and leave mmu_lock, is right if kvm_dirty_slot_must_yield().
 */
unsigned int kvm_arch_dirty_slot_protect(struct kvm *kvm,
					 struct kvm_memory_slot *memslot,
					 const struct kvm_dirty_slot_mask *masks,
					 unsigned int nr);

/*
 * Does somebody wait for mmu_lock or for this CPU?  Other than
 * rwlock_needbreak() it does not depend on the model of preemption: vCPUs that
 * fault wait for who holds mmu_lock for write, and behind who waits for that.
 */
#define kvm_dirty_slot_must_yield(kvm) \
	(need_resched() || rwlock_is_contended(&(kvm)->mmu_lock))

/**
 * kvm_dirty_slot_ring_hw_enter - there may be writes that are not marked yet
 * @v: the vCPU's state
 *
 * An architecture whose hardware buffers dirty pages calls this before the
 * guest can write anything, and kvm_dirty_slot_ring_hw_flushed() when all that
 * was buffered has been marked dirty; likewise before a page is made writable, and
 * when it has been marked, or looked at again.  KVM_DIRTY_HARVEST_SYNC waits for
 * vCPUs that are between the two, so that they must not wait for userspace there,
 * not even in a fault of memory that they access.
 *
 * Context: the vCPU's thread.
 */
static inline void kvm_dirty_slot_ring_hw_enter(struct kvm_dirty_slot_ring_vcpu *v)
{
	WRITE_ONCE(v->hw_seq, v->hw_seq | 1);
}

/**
 * kvm_dirty_slot_ring_hw_flushed - all writes so far are marked
 * @v: the vCPU's state
 *
 * Context: the vCPU's thread.
 */
static inline void kvm_dirty_slot_ring_hw_flushed(struct kvm_dirty_slot_ring_vcpu *v)
{
	if (v->hw_seq & 1) {
		/* Who sees the even number sees the marks made before it. */
		smp_store_release(&v->hw_seq, v->hw_seq + 1);
	}
}

/* One line in a list of KVM's binary statistics, with its comma. */
#define KVM_DIRTY_SLOT_RING_STAT(scope, stat)	STATS_DESC_COUNTER(scope, stat),

#else /* !CONFIG_HAVE_KVM_DIRTY_SLOT_RING */

#define KVM_DIRTY_SLOT_RING_MAX_ENTRIES	0

static inline void kvm_dirty_slot_ring_init(struct module *module)
{
}

static inline int kvm_dirty_slot_ring_enable(struct kvm *kvm,
					     struct kvm_enable_cap *cap)
{
	return -EINVAL;
}

static inline int kvm_dirty_slot_ring_add_vcpu(struct kvm_vcpu *vcpu)
{
	return 0;
}

static inline bool kvm_dirty_slot_ring_check_request(struct kvm_vcpu *vcpu)
{
	return false;
}

static inline void kvm_dirty_slot_ring_destroy(struct kvm *kvm)
{
}

static inline int kvm_dirty_slot_log_create(struct kvm *kvm,
					    struct kvm_memory_slot *memslot)
{
	return -ENXIO;
}

static inline void kvm_dirty_slot_log_start(const struct kvm_memory_slot *memslot)
{
}

static inline void kvm_dirty_slot_log_stop(struct kvm *kvm,
					   const struct kvm_memory_slot *memslot)
{
}

static inline bool kvm_dirty_slot_log_release(struct kvm_memory_slot *memslot)
{
	return false;
}

static inline void kvm_dirty_slot_log_mark(struct kvm *kvm,
					   const struct kvm_memory_slot *memslot,
					   struct kvm_vcpu *vcpu,
					   unsigned long offset)
{
}

static inline void kvm_dirty_slot_log_mark_vcpu(const struct kvm_memory_slot *memslot,
						struct kvm_vcpu *vcpu,
						unsigned long offset)
{
}

static inline void kvm_dirty_slot_log_look_again(const struct kvm_memory_slot *memslot,
						 struct kvm_vcpu *vcpu,
						 unsigned long offset)
{
}

static inline int kvm_vm_ioctl_get_dirty_slot_log_fd(struct kvm *kvm,
						     void __user *argp)
{
	return -ENOTTY;
}

/* Macros, as the argument is a field that does not exist. */
#define kvm_dirty_slot_ring_hw_enter(...)	do { } while (0)
#define kvm_dirty_slot_ring_hw_flushed(...)	do { } while (0)
#define KVM_DIRTY_SLOT_RING_STAT(...)

#endif /* CONFIG_HAVE_KVM_DIRTY_SLOT_RING */

#endif /* __KVM_DIRTY_SLOT_RING_H */
