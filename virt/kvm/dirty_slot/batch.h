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

/* Start a batch; without @max_runs it does not turn pages into runs. */
static inline void batch_reset(struct kvm_dirty_slot_call *c,
			       unsigned int max_runs)
{
	c->nr_masks = 0;
	c->nr_runs = 0;
	c->nr_pages = 0;
	c->run_end = U32_MAX;	/* more than any page */
	c->max_runs = min_t(unsigned int, max_runs, BATCH_RUNS);
	c->plenty = max_runs ? c->max_runs - BITS_PER_LONG / 2 : INT_MAX;
}

/* Turn pages into runs; returns those for which there was no room. */
static __always_inline unsigned long batch_emit(struct kvm_dirty_slot_call *c,
						u32 offset, unsigned long mask)
{
	struct kvm_dirty_run *run = &c->runs[c->nr_runs];
	const struct kvm_dirty_run *end = &c->runs[c->max_runs];
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
		} else if (run != end) {
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

unsigned long kvm_dirty_slot_batch_fit(const struct kvm_dirty_slot_call *c,
				       u32 offset, unsigned long mask);
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
	unsigned long *p = &log->bitmap[word], seen, taken, left = 0;
	struct kvm_dirty_slot_mask *next;
	bool all = true;

	seen = READ_ONCE(*p);
	if (!(seen & own))
		return true;
	if (unlikely(c->nr_masks == BATCH_MASKS))
		return false;

	if (unlikely(c->nr_runs > c->plenty)) {
		if (c->max_runs == BATCH_RUNS)
			return false;
		seen &= own;
		taken = kvm_dirty_slot_batch_fit(c, word * BITS_PER_LONG, seen);
		all = taken == seen;
		taken &= atomic_long_fetch_andnot(taken, (atomic_long_t *)p);
	} else if (want == ~0UL) {
		taken = xchg(p, 0);
	} else {
		taken = want & atomic_long_fetch_andnot(want, (atomic_long_t *)p);
	}
	if (unlikely(!taken))
		return all;

	if (c->max_runs) {
		left = batch_emit(c, word * BITS_PER_LONG, taken);
		/* Only if the bitmap ioctls broke a run that would have fitted. */
		if (unlikely(left)) {
			kvm_dirty_slot_batch_put_back(log, word, left);
			all = false;
			taken &= ~left;
			if (!taken)
				return false;
		}
	}

	c->nr_pages += hweight_long(taken);
	next = &c->masks[c->nr_masks];
	if (want != ~0UL && c->nr_masks &&
	    next[-1].offset == word * BITS_PER_LONG) {
		next[-1].mask |= taken;
	} else {
		next->offset = word * BITS_PER_LONG;
		next->mask = taken;
		c->nr_masks++;
	}
	return all;
}

#endif /* __KVM_DIRTY_SLOT_BATCH_H */
