// SPDX-License-Identifier: GPL-2.0-only
/*
 * Putting pages into a dirty slot log: from the vCPU that writes, without a lock,
 * and from everybody else.  The invariants and barriers are in log.h.
 */

#include <linux/bitops.h>
#include <linux/delay.h>
#include <linux/kvm_host.h>
#include <linux/prefetch.h>
#include <linux/rcupdate.h>

#define CREATE_TRACE_POINTS
#include "log.h"

/* The ring of a vCPU, NULL if it has none. */
static struct kvm_dirty_slot_ring *log_ring(const struct kvm_dirty_slot_log *log,
					    const struct kvm_vcpu *vcpu)
{
	/* F, by the dependency on the address. */
	return READ_ONCE(log->rings[vcpu->dirty_slot_ring.nr]);
}

/* Under mark_lock. */
static void log_activate(struct kvm_dirty_slot_log *log)
{
	if (log->active)
		return;
	/* First: who finds it active relies on the tree. */
	if (log->listed)
		kvm_dirty_summary_set(&log->vm->index, log->index);
	smp_store_release(&log->active, true); /* G */
}

/**
 * kvm_dirty_slot_log_activate - a log may have something
 * @log: the log, which looked as if it were not in the VM's tree
 *
 * Context: any but under mark_lock, after a full barrier.
 */
void kvm_dirty_slot_log_activate(struct kvm_dirty_slot_log *log)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&log->mark_lock, flags);
	log_activate(log);
	raw_spin_unlock_irqrestore(&log->mark_lock, flags);
}

/**
 * kvm_dirty_slot_log_spill - pages of a word of the bitmap are in no ring
 * @log: the log
 * @word: of its bitmap, where bits have been set, then a full barrier
 *
 * Context: any.
 */
void kvm_dirty_slot_log_spill(struct kvm_dirty_slot_log *log, unsigned long word)
{
	if (kvm_dirty_summary_set(&log->overflow, word))
		irq_work_queue(&log->wake);
	/* After the full barrier at the last level. */
	if (unlikely(!READ_ONCE(log->active)))
		kvm_dirty_slot_log_activate(log);
}

/*
 * Rings.
 */

/* The ring is not in busy, or is about to leave it. */
static noinline void ring_activate(struct kvm_dirty_slot_log *log,
				   struct kvm_dirty_slot_ring *ring,
				   struct kvm_vcpu *vcpu)
{
	WRITE_ONCE(ring->active, true);
	smp_mb(); /* G, with ring_leave(): see it leave, or be seen */
	kvm_dirty_summary_set(&log->busy, vcpu->dirty_slot_ring.nr - 1);
	if (!READ_ONCE(log->active))
		kvm_dirty_slot_log_activate(log);
}

static void ring_full(struct kvm_dirty_slot_log *log, struct kvm_vcpu *vcpu)
{
	if (log->flags & KVM_DIRTY_SLOT_RING_EXIT_ON_FULL)
		kvm_make_request(KVM_REQ_DIRTY_SLOT_RING_FULL, vcpu);
}

/* The bit of @offset has just been set and there is room for its entry. */
static __always_inline void ring_push(struct kvm_dirty_slot_log *log,
				      struct kvm_dirty_slot_ring *ring,
				      struct kvm_vcpu *vcpu, u64 producer,
				      unsigned long offset, u64 used)
{
	u32 i = producer & (log->entries - 1);
	struct kvm_dirty_run *run = &ring->runs[i];

	/*
	 * Who read a line of entries has it still.  Own the one after the next, well
	 * before it is written to: the next atomic operation waits for that.
	 */
	if (!(i % ENTRIES_PER_LINE))
		prefetchw(run + 2 * ENTRIES_PER_LINE);
	run->offset = offset;
	run->npages = 1;
	smp_store_release(&ring->kern->producer, producer + 1); /* A */
	vcpu->stat.generic.dirty_slot_ring_pushed++;
	if (trace_kvm_dirty_slot_ring_push_enabled())
		trace_kvm_dirty_slot_ring_push(log->pid, vcpu->vcpu_id, log->slot,
					       offset, used + 1, log->entries);
}

/* The ring is at least half full: ring_push(), and what poll() needs. */
static noinline void ring_push_wake(struct kvm_dirty_slot_log *log,
				    struct kvm_dirty_slot_ring *ring,
				    struct kvm_vcpu *vcpu, u64 producer,
				    unsigned long offset, u64 used)
{
	ring_push(log, ring, vcpu, producer, offset, used);

	/*
	 * Look again: RESET may have made room since, and poll() have looked
	 * before this page was there.
	 */
	smp_mb(); /* with poll(): see reset, or be seen */
	if (ring_used(ring) == log->wake_level)
		irq_work_queue(&log->wake);
	if (used + 1 == log->entries)
		ring_full(log, vcpu);
}

/* The ring is full. */
static noinline void ring_overflow(struct kvm_dirty_slot_log *log,
				   struct kvm_dirty_slot_ring *ring,
				   struct kvm_vcpu *vcpu, unsigned long offset)
{
	struct kvm_dirty_slot_ring_kern *kern = ring->kern;

	WRITE_ONCE(kern->overflowed, kern->overflowed + 1);
	vcpu->stat.generic.dirty_slot_ring_overflowed++;
	if (trace_kvm_dirty_slot_ring_overflow_enabled())
		trace_kvm_dirty_slot_ring_overflow(log->pid, vcpu->vcpu_id,
						   log->slot, offset, 1);
	ring_full(log, vcpu);
	kvm_dirty_slot_log_spill(log, offset / BITS_PER_LONG);
}

/*
 * The vCPU's thread marks a page.  It may be preempted anywhere: E says how a
 * harvest finds a page whose bit is set and whose entry is not there yet.  If it
 * does, the entry comes later and is stale.  But nothing may mark another page in
 * the middle of it, see kvm_dirty_slot_log_mark().
 */
static __always_inline void ring_mark_active(struct kvm_dirty_slot_log *log,
					     struct kvm_dirty_slot_ring *ring,
					     struct kvm_vcpu *vcpu,
					     unsigned long offset)
{
	struct kvm_dirty_slot_ring_kern *kern = ring->kern;
	u64 producer, used;

	smp_store_release(&ring->marking, offset); /* E */
	/* Before the atomic operation, which waits anyway; more room may come. */
	producer = kern->producer;
	used = producer - smp_load_acquire(&kern->reset); /* B */
	/*
	 * Not test_bit() first, to save the atomic operation where the bit is
	 * set: it also orders the write to the page, which KVM itself may have
	 * made, before the look at the bit.  Else a harvest could clear the bit
	 * after the look, and its caller read the page before the write.
	 */
	if (test_and_set_bit_le(offset, log->bitmap))
		return;

	if (likely(used + 1 < log->wake_level))
		ring_push(log, ring, vcpu, producer, offset, used);
	else if (used < log->entries)
		ring_push_wake(log, ring, vcpu, producer, offset, used);
	else
		ring_overflow(log, ring, vcpu, offset);
}

static noinline void ring_mark_quiet(struct kvm_dirty_slot_log *log,
				     struct kvm_dirty_slot_ring *ring,
				     struct kvm_vcpu *vcpu, unsigned long offset)
{
	ring_activate(log, ring, vcpu);
	ring_mark_active(log, ring, vcpu, offset);
}

static __always_inline void ring_mark(struct kvm_dirty_slot_log *log,
				      struct kvm_dirty_slot_ring *ring,
				      struct kvm_vcpu *vcpu, unsigned long offset)
{
	/* G: before the bit, for who finds the bit set relies on it as well. */
	if (likely(READ_ONCE(ring->active)))
		ring_mark_active(log, ring, vcpu, offset);
	else
		ring_mark_quiet(log, ring, vcpu, offset);
}

/**
 * kvm_dirty_slot_log_mark_word - mark pages that no vCPU wrote
 * @log: the log
 * @kvm: the VM
 * @word: of the bitmap
 * @mask: the pages of that word
 *
 * Or that one wrote whose thread is not in a state to push.
 *
 * Context: any but NMI.
 * Return: how many of the pages were not in the log.
 */
unsigned int kvm_dirty_slot_log_mark_word(struct kvm_dirty_slot_log *log,
					  struct kvm *kvm, unsigned long word,
					  unsigned long mask)
{
	atomic_long_t *p = (atomic_long_t *)&log->bitmap[word];
	unsigned long flags;
	unsigned int n;

	raw_spin_lock_irqsave(&log->mark_lock, flags); /* E */
	/* As in ring_mark(), before the bits; the lock keeps it that way. */
	log_activate(log);
	mask &= ~atomic_long_fetch_or(mask, p);
	if (mask)
		kvm_dirty_slot_log_spill(log, word);
	raw_spin_unlock_irqrestore(&log->mark_lock, flags);
	if (!mask)
		return 0;

	n = hweight_long(mask);
	atomic64_add(n, &kvm->stat.generic.dirty_slot_log_marked_pages);
	trace_kvm_dirty_slot_ring_overflow(log->pid, -1, log->slot,
					   word * BITS_PER_LONG + __ffs(mask),
					   n);
	return n;
}

/**
 * kvm_dirty_slot_log_mark - a page of a memslot with a log was written
 * @kvm: the VM
 * @memslot: the memslot
 * @vcpu: the vCPU that is loaded on this CPU, or NULL
 * @offset: the page, in pages from the start of the memslot
 *
 * Takes no lock and allocates nothing when a vCPU writes.
 *
 * Context: any but NMI; called under mmu_lock, with interrupts off, and from
 * the lockless fast page fault.  The memslot must not go away: a vCPU's thread
 * is in a read side section of kvm->srcu, others may keep it by other means.
 */
void kvm_dirty_slot_log_mark(struct kvm *kvm,
			     const struct kvm_memory_slot *memslot,
			     struct kvm_vcpu *vcpu, unsigned long offset)
{
	struct kvm_dirty_slot_log *log = memslot->dirty_slot_log;
	struct kvm_dirty_slot_ring *ring = NULL;

	/*
	 * The wrong VM's vCPU is as good as none.  Where there is the other ring,
	 * mark_page_dirty_in_slot() has warned before, and leaves it at that.
	 */
	if (WARN_ON_ONCE(vcpu && vcpu->kvm != kvm))
		vcpu = NULL;

	/*
	 * A ring has one producer, whose push may have been interrupted.  Marks
	 * from interrupts do not touch it; nor do those from the scheduler, that
	 * is, from kvm_arch_vcpu_put() and kvm_arch_vcpu_load() of a thread that
	 * is preempted (steal time, Xen's runstate).
	 */
	if (likely(vcpu && in_task() && !READ_ONCE(vcpu->scheduled_out)))
		ring = log_ring(log, vcpu);
	if (likely(ring)) {
		/* "Quiet" counts on it; nobody looks when the VM is destroyed. */
		RCU_LOCKDEP_WARN(!srcu_read_lock_held(&kvm->srcu) &&
				 refcount_read(&kvm->users_count),
				 "dirty page of a vCPU without kvm->srcu");
		ring_mark(log, ring, vcpu, offset);
		return;
	}

	/* A vCPU that is being created writes nothing. */
	WARN_ON_ONCE(vcpu && !vcpu->dirty_slot_ring.nr);
	kvm_dirty_slot_log_mark_word(log, kvm, offset / BITS_PER_LONG,
				     BIT(offset % BITS_PER_LONG));
}

/**
 * kvm_dirty_slot_log_mark_vcpu - a vCPU is about to write a page
 * @memslot: a memslot with a log
 * @vcpu: the vCPU, online and loaded on this CPU
 * @offset: the page, in pages from the start of the memslot
 *
 * kvm_dirty_slot_log_mark() without its questions.
 *
 * Context: the vCPU's thread, not in an interrupt; kvm->srcu is held for read.
 */
void kvm_dirty_slot_log_mark_vcpu(const struct kvm_memory_slot *memslot,
				  struct kvm_vcpu *vcpu, unsigned long offset)
{
	struct kvm_dirty_slot_log *log = memslot->dirty_slot_log;

	/* A vCPU gets its rings before it is online. */
	ring_mark(log, log_ring(log, vcpu), vcpu, offset);
}

/**
 * kvm_dirty_slot_log_look_again - a page that was marked has been made writable
 * @memslot: a memslot with a log
 * @vcpu: the vCPU for which it was, online and loaded on this CPU
 * @offset: the page, in pages from the start of the memslot
 *
 * A harvest may have taken the page out of the log since it was marked, and have
 * looked at its SPTE while there was nothing to protect yet.  Then it has to be logged
 * once more: others may be writing to it.  A harvest clears the bit, full barrier, then
 * looks at the SPTE; the caller makes the SPTE writable, full barrier, and calls this.
 * One of the two sees what the other did (tools/testing/dirty_slot_ring/model has the
 * proof).
 *
 * Context: as kvm_dirty_slot_log_mark_vcpu(); between kvm_dirty_slot_ring_hw_enter()
 * before the page was made writable and kvm_dirty_slot_ring_hw_flushed().
 */
void kvm_dirty_slot_log_look_again(const struct kvm_memory_slot *memslot,
				   struct kvm_vcpu *vcpu, unsigned long offset)
{
	struct kvm_dirty_slot_log *log = memslot->dirty_slot_log;

	if (unlikely(!test_bit_le(offset, log->bitmap)))
		ring_mark(log, log_ring(log, vcpu), vcpu, offset);
}

/* The log of a memslot in which the vCPU's ring is full, if any. */
static struct kvm_dirty_slot_log *full_log(struct kvm_vcpu *vcpu)
{
	struct kvm_dirty_slot_ring *ring;
	struct kvm_dirty_slot_log *log;
	struct kvm_memory_slot *memslot;
	int as_id, bkt;

	for (as_id = 0; as_id < kvm_arch_nr_memslot_as_ids(vcpu->kvm); as_id++) {
		kvm_for_each_memslot(memslot, bkt,
				     __kvm_memslots(vcpu->kvm, as_id)) {
			log = memslot->dirty_slot_log;
			if (!log || !(log->flags & KVM_DIRTY_SLOT_RING_EXIT_ON_FULL))
				continue;
			ring = log_ring(log, vcpu);
			if (ring && ring_used(ring) >= log->entries)
				return log;
		}
	}
	return NULL;
}

/**
 * kvm_dirty_slot_ring_check_request - must the vCPU leave for a full ring?
 * @vcpu: the vCPU, about to enter the guest
 *
 * The request stays until all of its rings have room, so that a vCPU that
 * userspace runs again with a full one leaves again.  One exit of the guest can
 * fill several, hence no note of the one that made the request.
 *
 * Context: the vCPU's thread; may be under kvm->srcu.
 * Return: true if it must, with kvm_run filled in.
 */
bool kvm_dirty_slot_ring_check_request(struct kvm_vcpu *vcpu)
{
	struct kvm_dirty_slot_log *log;
	int idx;

	if (!kvm_check_request(KVM_REQ_DIRTY_SLOT_RING_FULL, vcpu))
		return false;

	/* Not every architecture holds it where it looks at requests. */
	idx = srcu_read_lock(&vcpu->kvm->srcu);
	log = full_log(vcpu);
	if (log) {
		kvm_make_request(KVM_REQ_DIRTY_SLOT_RING_FULL, vcpu);
		vcpu->run->exit_reason = KVM_EXIT_DIRTY_SLOT_RING_FULL;
		vcpu->run->dirty_slot_ring.slot = log->slot;
		vcpu->run->dirty_slot_ring.pad = 0;
		vcpu->stat.generic.dirty_slot_ring_full_exits++;
		trace_kvm_dirty_slot_ring_exit(log->pid, vcpu->vcpu_id, log->slot);
	}
	srcu_read_unlock(&vcpu->kvm->srcu, idx);
	return !!log;
}

/**
 * kvm_dirty_slot_sync_hw - get what hardware holds of vCPUs' writes into the logs
 * @kvm: the VM
 * @interruptible: give up when a signal comes
 *
 * Kicks vCPUs and waits until they have handed it over.  A kick alone does not do:
 * it returns when the vCPU has left the guest, and the buffer is emptied some time
 * later, which may be long if the thread is preempted in between.  It is emptied
 * before anything that can wait for userspace, so that nobody waits here for
 * whoever supplies the guest's memory, who may be the caller.
 *
 * Context: sleeps.
 * Return: 0 or -EINTR.
 */
int kvm_dirty_slot_sync_hw(struct kvm *kvm, bool interruptible)
{
	struct kvm_vcpu *vcpu;
	unsigned long i;
	u32 seq;

	/* Pairs with the entry into the guest, which is a full barrier. */
	smp_mb();
	kvm_for_each_vcpu(i, vcpu, kvm) {
		if (READ_ONCE(vcpu->dirty_slot_ring.hw_seq) & 1)
			kvm_vcpu_kick(vcpu);
	}
	kvm_for_each_vcpu(i, vcpu, kvm) {
		seq = READ_ONCE(vcpu->dirty_slot_ring.hw_seq);
		if (!(seq & 1))
			continue;
		/* It may be in the guest for the second time since the kick. */
		kvm_vcpu_kick(vcpu);
		while (READ_ONCE(vcpu->dirty_slot_ring.hw_seq) == seq) {
			if (interruptible && signal_pending(current))
				return -EINTR;
			usleep_range(10, 50);
		}
	}
	/* With kvm_dirty_slot_ring_hw_flushed(): see the marks made before. */
	smp_rmb();
	return 0;
}
