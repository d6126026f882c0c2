/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __KVM_DIRTY_SLOT_BATCH_H
#define __KVM_DIRTY_SLOT_BATCH_H

/*
 * Taking pages out of a log's bitmap into a batch of a call: here what runs for
 * each entry, the rest in batch.c.  None of it needs log->mutex: the bitmap is
 * changed atomically, and the batch is the caller's.
 */

#include <linux/bitops.h>

#include "log.h"

/*
 * See invariant 6.  Whoever sees that nobody holds a log any more also sees what is
 * in it by then.
 */
static inline void log_hold(struct kvm_dirty_slot_log *log)
{
	atomic_inc(&log->outstanding);
}

static inline void log_unhold(struct kvm_dirty_slot_log *log)
{
	smp_mb__before_atomic(); /* with kvm_dirty_slot_log_look_at() */
	atomic_dec(&log->outstanding);
}

/* Start a batch of @max_runs. */
static inline void batch_reset(struct kvm_dirty_slot_call *c,
			       unsigned int max_runs)
{
	c->nr_masks = 0;
	c->nr_runs = 0;
	c->nr_pages = 0;
	c->run_end = U32_MAX;	/* more than any page */
	c->max_runs = min_t(unsigned int, max_runs, BATCH_RUNS);
	c->plenty = c->max_runs - BITS_PER_LONG / 2;
}

/*
 * Turn pages into runs; returns those for which there was no room, which cannot be
 * if there is plenty.
 */
static __always_inline unsigned long batch_emit(struct kvm_dirty_slot_call *c,
						u32 offset, unsigned long mask,
						bool plenty)
{
	struct kvm_dirty_run *run = &c->runs[c->nr_runs];
	u32 run_end = c->run_end, first, n;
	unsigned long sum;

	do {
		first = __ffs(mask);
		/* The carry goes through the lowest run, to the bit after it. */
		sum = mask + (mask & -mask);
		n = (sum ? __ffs(sum) : BITS_PER_LONG) - first;
		first += offset;
		if (first == run_end) {
			run[-1].npages += n;
		} else if (plenty || run != &c->runs[c->max_runs]) {
			run->offset = first;
			run->npages = n;
			run++;
		} else {
			break;
		}
		run_end = first + n;
		mask &= sum;
	} while (mask);

	c->run_end = run_end;
	c->nr_runs = run - c->runs;
	return mask;
}

/* These pages are the call's; @more of the same word may be already. */
static __always_inline void batch_add(struct kvm_dirty_slot_call *c,
				      unsigned long word, unsigned long taken,
				      bool more)
{
	struct kvm_dirty_slot_mask *next = &c->masks[c->nr_masks];

	c->nr_pages += hweight_long(taken);
	if (more && c->nr_masks && next[-1].offset == word * BITS_PER_LONG) {
		next[-1].mask |= taken;
	} else {
		next->offset = word * BITS_PER_LONG;
		next->mask = taken;
		c->nr_masks++;
	}
}

bool kvm_dirty_slot_batch_take_some(struct kvm_dirty_slot_log *log,
				    struct kvm_dirty_slot_call *c,
				    unsigned long word, unsigned long own);
void kvm_dirty_slot_batch_put_back(struct kvm_dirty_slot_log *log,
				   unsigned long word, unsigned long mask);

/*
 * If one of the pages @own of a word is logged, take what is logged of its pages
 * @want into the batch; of its pages @own, if there may be no room for more.  False
 * if there was none for all of these; the rest stays in the log, with a place in the
 * index.
 */
static __always_inline bool batch_take(struct kvm_dirty_slot_log *log,
				       struct kvm_dirty_slot_call *c,
				       unsigned long word, unsigned long own,
				       unsigned long want)
{
	unsigned long *p = &log->bitmap[word], taken;

	if (!(READ_ONCE(*p) & own))
		return true;
	if (unlikely(c->nr_masks == BATCH_MASKS))
		return false;
	if (unlikely(c->nr_runs > c->plenty))
		return kvm_dirty_slot_batch_take_some(log, c, word, own);

	if (want == ~0UL)
		taken = xchg(p, 0);
	else
		taken = want & atomic_long_fetch_andnot(want, (atomic_long_t *)p);
	if (likely(taken)) {
		batch_emit(c, word * BITS_PER_LONG, taken, true);
		batch_add(c, word, taken, want != ~0UL);
	}
	return true;
}

/* The same for who knows the pages: no runs, and there is room for a mask. */
static inline void batch_take_known(struct kvm_dirty_slot_log *log,
				    struct kvm_dirty_slot_call *c,
				    unsigned long word, unsigned long want)
{
	unsigned long *p = &log->bitmap[word], taken;

	if (!(READ_ONCE(*p) & want))
		return;
	taken = want & atomic_long_fetch_andnot(want, (atomic_long_t *)p);
	if (taken)
		batch_add(c, word, taken, true);
}

#endif /* __KVM_DIRTY_SLOT_BATCH_H */
