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
	c->plenty = c->max_runs < BITS_PER_LONG / 2 ? NULL :
		    &c->runs[c->max_runs - BITS_PER_LONG / 2];
}

/* The end of a batch: in registers, for who adds to it many times. */
struct batch_end {
	struct kvm_dirty_slot_mask *mask;
	struct kvm_dirty_run *run;
	u32 run_end;
	u64 nr_pages;
};

static __always_inline struct batch_end
batch_get_end(struct kvm_dirty_slot_call *c)
{
	return (struct batch_end){
		.mask = &c->masks[c->nr_masks],
		.run = &c->runs[c->nr_runs],
		.run_end = c->run_end,
		.nr_pages = c->nr_pages,
	};
}

static __always_inline void batch_set_end(struct kvm_dirty_slot_call *c,
					  const struct batch_end *e)
{
	c->nr_masks = e->mask - c->masks;
	c->nr_runs = e->run - c->runs;
	c->run_end = e->run_end;
	c->nr_pages = e->nr_pages;
}

/* Any word of the bitmap still fits. */
static __always_inline bool batch_has_plenty(const struct kvm_dirty_slot_call *c,
					     const struct batch_end *e)
{
	return e->mask != &c->masks[BATCH_MASKS] && e->run <= c->plenty;
}

/*
 * Turn pages into runs; returns those for which there was no room, which cannot be
 * if there is plenty.
 */
static __always_inline unsigned long batch_emit(struct kvm_dirty_slot_call *c,
						struct batch_end *e, u32 offset,
						unsigned long mask, bool plenty)
{
	unsigned long sum;
	u32 first, n;

	do {
		first = __ffs(mask);
		/* The carry goes through the lowest run, to the bit after it. */
		sum = mask + (mask & -mask);
		n = (sum ? __ffs(sum) : BITS_PER_LONG) - first;
		first += offset;
		if (first == e->run_end) {
			e->run[-1].npages += n;
		} else if (plenty || e->run != &c->runs[c->max_runs]) {
			e->run->offset = first;
			e->run->npages = n;
			e->run++;
		} else {
			break;
		}
		e->run_end = first + n;
		mask &= sum;
	} while (mask);

	return mask;
}

/* These pages are the call's; @more of the same word may be already. */
static __always_inline void batch_add(struct kvm_dirty_slot_call *c,
				      struct batch_end *e, u32 offset,
				      unsigned long taken, bool more)
{
	e->nr_pages += hweight_long(taken);
	if (more && e->mask != c->masks && e->mask[-1].offset == offset) {
		e->mask[-1].mask |= taken;
	} else {
		e->mask->offset = offset;
		e->mask->mask = taken;
		e->mask++;
	}
}

bool kvm_dirty_slot_batch_take_some(struct kvm_dirty_slot_log *log,
				    struct kvm_dirty_slot_call *c,
				    unsigned long word, unsigned long own);
void kvm_dirty_slot_batch_put_back(struct kvm_dirty_slot_log *log,
				   unsigned long word, unsigned long mask);

/*
 * Take what is logged of the pages @want of a word into the batch.  False if there was
 * no room for all of it; the rest stays in the log, with a place in the index.
 */
static __always_inline bool batch_take(struct kvm_dirty_slot_log *log,
				       struct kvm_dirty_slot_call *c,
				       unsigned long word, unsigned long want)
{
	unsigned long *p = &log->bitmap[word], taken;
	struct batch_end e = batch_get_end(c);
	u32 offset = word * BITS_PER_LONG;

	if (!(READ_ONCE(*p) & want))
		return true;
	if (unlikely(c->nr_masks == BATCH_MASKS))
		return false;
	if (unlikely(!batch_has_plenty(c, &e)))
		return kvm_dirty_slot_batch_take_some(log, c, word, want);

	if (want == ~0UL)
		taken = xchg(p, 0);
	else
		taken = want & atomic_long_fetch_andnot(want, (atomic_long_t *)p);
	if (likely(taken)) {
		batch_emit(c, &e, offset, taken, true);
		batch_add(c, &e, offset, taken, want != ~0UL);
		batch_set_end(c, &e);
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
	if (taken) {
		struct batch_end e = batch_get_end(c);

		batch_add(c, &e, word * BITS_PER_LONG, taken, true);
		batch_set_end(c, &e);
	}
}

#endif /* __KVM_DIRTY_SLOT_BATCH_H */
