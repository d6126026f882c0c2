// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a call that takes pages out of a log works with, and what becomes of the
 * pages that it took: re-protected, or put back.
 */

#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "batch.h"

/**
 * kvm_dirty_slot_call_alloc - the memory that a call works with
 *
 * Return: NULL if there is none.
 */
struct kvm_dirty_slot_call *kvm_dirty_slot_call_alloc(void)
{
	struct kvm_dirty_slot_call *c;

	BUILD_BUG_ON(sizeof(*c) > 2 * PAGE_SIZE);

	c = kvmalloc(sizeof(*c), GFP_KERNEL_ACCOUNT);
	if (c) {
		c->spare = false;
		c->spans = c->few;
	}
	return c;
}

/**
 * kvm_dirty_slot_call_get - begin a call on a log
 * @log: the log, which has memory to spare for one call at a time
 *
 * Context: may sleep, does not wait for other calls.
 * Return: the call, or NULL if there is no memory.
 */
struct kvm_dirty_slot_call *kvm_dirty_slot_call_get(struct kvm_dirty_slot_log *log)
{
	struct kvm_dirty_slot_call *c = xchg(&log->spare, NULL);
	u32 spans;

	if (!c)
		c = kvm_dirty_slot_call_alloc();
	if (!c)
		return NULL;

	c->kvm = NULL;
	c->flush = false;
	c->used = 0;
	c->max_spans = CALL_SPANS;
	c->nr_rings = log_nr_rings(log);
	spans = c->nr_rings + 1;
	if (spans > CALL_SPANS) {
		c->max_spans = spans;
		c->spans = kvmalloc_array(spans, sizeof(*c->spans),
					  GFP_KERNEL_ACCOUNT);
		if (!c->spans) {
			kvm_dirty_slot_call_put(log, c);
			return NULL;
		}
	}
	return c;
}

/**
 * kvm_dirty_slot_call_put - end it
 * @log: the log
 * @c: the call
 */
void kvm_dirty_slot_call_put(struct kvm_dirty_slot_log *log,
			     struct kvm_dirty_slot_call *c)
{
	if (c->spans != c->few)
		kvfree(c->spans);
	c->spans = c->few;
	if (c->spare)
		smp_store_release(&log->spare, c); /* with xchg() */
	else
		kvfree(c);
}

/* Those of the pages for whose runs there is room. */
static unsigned long batch_fit(const struct kvm_dirty_slot_call *c, u32 offset,
			       unsigned long mask)
{
	int room = c->max_runs - c->nr_runs;
	unsigned long left = mask;

	if (mask && offset + __ffs(mask) == c->run_end)
		room++;
	while (left && room--)
		left &= left + (left & -left);
	return mask & ~left;
}

/*
 * The pages are not re-protected yet, or their owner could not be told: they are
 * dirty as before.  Their entries may be gone.
 */
void kvm_dirty_slot_batch_put_back(struct kvm_dirty_slot_log *log,
				   unsigned long word, unsigned long mask)
{
	atomic_long_or(mask, (atomic_long_t *)&log->bitmap[word]);
	smp_mb__after_atomic(); /* D, where level 0 is above the bitmap */
	kvm_dirty_slot_log_spill(log, word);
}

/**
 * kvm_dirty_slot_batch_take_some - take what there is room for
 * @log: the log
 * @c: the call, whose runs may soon be all
 * @word: of the bitmap
 * @own: its pages to take
 *
 * Return: true if that was all of them.
 */
bool kvm_dirty_slot_batch_take_some(struct kvm_dirty_slot_log *log,
				    struct kvm_dirty_slot_call *c,
				    unsigned long word, unsigned long own)
{
	unsigned long *p = &log->bitmap[word], taken, left;
	struct batch_end e = batch_get_end(c);
	u32 offset = word * BITS_PER_LONG;
	bool all;

	/* The next batch has plenty. */
	if (c->max_runs == BATCH_RUNS)
		return false;

	own &= READ_ONCE(*p);
	taken = batch_fit(c, offset, own);
	all = taken == own;
	taken &= atomic_long_fetch_andnot(taken, (atomic_long_t *)p);
	if (!taken)
		return all;

	left = batch_emit(c, &e, offset, taken, false);
	/* Only if the bitmap ioctls broke a run that would have fitted. */
	if (unlikely(left)) {
		kvm_dirty_slot_batch_put_back(log, word, left);
		all = false;
		taken &= ~left;
		if (!taken)
			return false;
	}
	batch_add(c, &e, offset, taken, true);
	batch_set_end(c, &e);
	return all;
}

/**
 * kvm_dirty_slot_batch_undo - put a batch back
 * @log: where it was taken from
 * @c: the call
 */
void kvm_dirty_slot_batch_undo(struct kvm_dirty_slot_log *log,
			       struct kvm_dirty_slot_call *c)
{
	int i;

	for (i = 0; i < c->nr_masks; i++)
		kvm_dirty_slot_batch_put_back(log,
					      c->masks[i].offset / BITS_PER_LONG,
					      c->masks[i].mask);
}

/**
 * kvm_dirty_slot_batch_protect - re-protect a batch
 * @log: where it was taken from
 * @c: the call
 *
 * The slot may be gone, or going, or have stopped to log: then there is nothing
 * to protect it for.
 *
 * Context: may sleep; yields the CPU to who wants it.
 */
void kvm_dirty_slot_batch_protect(struct kvm_dirty_slot_log *log,
				  struct kvm_dirty_slot_call *c)
{
	struct kvm *kvm = c->kvm;
	struct kvm_memory_slot *memslot;
	unsigned int i = 0;
	int idx;

	if (!kvm || !c->nr_masks)
		return;

	log_phase(log, KVM_DIRTY_SLOT_PHASE_PROTECT);
	idx = srcu_read_lock(&kvm->srcu);
	memslot = kvm_dirty_slot_log_memslot(log, kvm);
	if (memslot) {
		/* The bits are clear: since an atomic operation, so full barrier. */
		while (i != c->nr_masks) {
			i += kvm_arch_dirty_slot_protect(kvm, memslot,
							 c->masks + i,
							 c->nr_masks - i);
			cond_resched();
		}
		c->flush = true;
	}
	srcu_read_unlock(&kvm->srcu, idx);
	log_phase(log, KVM_DIRTY_SLOT_PHASE_COLLECT);
}

/**
 * kvm_dirty_slot_call_flush - let no vCPU go on with what was protected
 * @c: the call
 *
 * What was re-protected is the caller's to copy after this, not before.
 */
void kvm_dirty_slot_call_flush(struct kvm_dirty_slot_call *c)
{
	if (c->flush)
		kvm_flush_remote_tlbs(c->kvm);
	c->flush = false;
}
