// SPDX-License-Identifier: GPL-2.0-only
/*
 * MARK and DISCARD: what userspace says of pages.  Neither takes log->mutex, so
 * that however many runs there are, nobody who harvests waits for them.
 */

#include <linux/kvm_host.h>
#include <linux/nospec.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>

#include "batch.h"

/* Does something to pages of a word; returns how many it made a difference to. */
typedef unsigned int (*log_word_fn)(struct kvm_dirty_slot_log *log,
				    struct kvm_dirty_slot_call *c,
				    unsigned long word, unsigned long mask);

/* The bits of @word that the pages @first to @last have. */
static unsigned long run_mask(unsigned long first, unsigned long last,
			      unsigned long word)
{
	unsigned long mask = ~0UL;

	if (word == first / BITS_PER_LONG)
		mask &= ~0UL << (first % BITS_PER_LONG);
	if (word == last / BITS_PER_LONG)
		mask &= ~0UL >> (BITS_PER_LONG - 1 - last % BITS_PER_LONG);
	return mask;
}

static int apply_run(struct kvm_dirty_slot_log *log,
		     struct kvm_dirty_slot_call *c, struct kvm_dirty_run run,
		     log_word_fn fn, u64 *nr_pages)
{
	unsigned long first = run.offset, last = first + run.npages - 1, word;

	for (word = first / BITS_PER_LONG; word <= last / BITS_PER_LONG; word++) {
		if (!(word % 1024) && word != first / BITS_PER_LONG) {
			if (signal_pending(current))
				return -EINTR;
			cond_resched();
		}
		*nr_pages += fn(log, c, array_index_nospec(word, log->nr_words),
				run_mask(first, last, word));
	}
	return 0;
}

/*
 * Walk the caller's runs and hand each word that they touch to @fn, after all of
 * them have been found good (@fn NULL).  The array is read twice; one that changes
 * in between is checked again and cuts the call short.
 */
static int log_apply(struct kvm_dirty_slot_log *log,
		     struct kvm_dirty_slot_call *c,
		     struct kvm_dirty_slot_runs *args, log_word_fn fn)
{
	struct kvm_dirty_run __user *runs = u64_to_user_ptr(args->runs);
	struct kvm_dirty_run chunk[32];
	u32 done, n, i;
	int r;

	for (done = 0; done < args->nr_runs; done += n) {
		if (done && signal_pending(current))
			return -EINTR;
		cond_resched();
		n = min_t(u32, args->nr_runs - done, ARRAY_SIZE(chunk));
		if (copy_from_user(chunk, runs + done, n * sizeof(*runs)))
			return -EFAULT;
		for (i = 0; i < n; i++) {
			if (!chunk[i].npages || chunk[i].npages > log->npages ||
			    chunk[i].offset > log->npages - chunk[i].npages)
				return -EINVAL;
			if (!fn)
				continue;
			r = apply_run(log, c, chunk[i], fn, &args->nr_pages);
			if (r)
				return r;
		}
	}
	return 0;
}

static unsigned int mark_word(struct kvm_dirty_slot_log *log,
			      struct kvm_dirty_slot_call *c,
			      unsigned long word, unsigned long mask)
{
	return kvm_dirty_slot_log_mark_word(log, c->kvm, word, mask);
}

/* Holds the log if its slot logs; not otherwise, as -ENODEV is final. */
static bool mark_begin(struct kvm_dirty_slot_log *log)
{
	bool held;

	spin_lock(&log->kvm_lock);
	held = log->kvm;
	if (held)
		log_hold(log);
	spin_unlock(&log->kvm_lock);
	return held;
}

static unsigned int discard_word(struct kvm_dirty_slot_log *log,
				 struct kvm_dirty_slot_call *c,
				 unsigned long word, unsigned long mask)
{
	u64 before;

	/* Without runs to store, all of a word fits or the batch is full. */
	if (c->nr_masks == BATCH_MASKS) {
		kvm_dirty_slot_batch_protect(log, c);
		batch_reset(c, 0);
	}
	before = c->nr_pages;
	batch_take_known(log, c, word, mask);
	return c->nr_pages - before;
}

static long log_runs(struct kvm_dirty_slot_log *log, void __user *argp,
		     log_word_fn fn)
{
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_slot_call *c;
	bool held;
	int r;

	if (copy_from_user(&args, argp, sizeof(args)))
		return -EFAULT;
	if (args.flags || args.reserved[0] || args.reserved[1])
		return -EINVAL;
	args.nr_pages = 0;
	if (copy_to_user(argp, &args, sizeof(args)))
		return -EFAULT;

	c = kvm_dirty_slot_call_get(log);
	if (!c)
		return -ENOMEM;
	batch_reset(c, 0);
	held = fn == mark_word && mark_begin(log);
	c->kvm = kvm_dirty_slot_log_get_kvm(log, NULL);
	if (!c->kvm) {
		r = -ENODEV;
		goto put_call;
	}
	r = READ_ONCE(c->kvm->vm_dead) ? -EIO : 0;
	if (!r)
		r = log_apply(log, c, &args, NULL);
	if (!r)
		r = log_apply(log, c, &args, fn);

	/*
	 * Of DISCARD.  The entries of these pages stay where they are, stale.  A
	 * page that is not in the log needs nothing: it is protected.
	 */
	kvm_dirty_slot_batch_protect(log, c);
	kvm_dirty_slot_call_flush(c);
	if (fn == discard_word)
		atomic64_add(args.nr_pages,
			     &c->kvm->stat.generic.dirty_slot_log_discarded_pages);

	kvm_put_kvm(c->kvm);
	if (copy_to_user(argp, &args, sizeof(args)) && !r)
		r = -EFAULT;
put_call:
	if (held)
		log_unhold(log);
	kvm_dirty_slot_call_put(log, c);
	return r;
}

/**
 * kvm_dirty_slot_log_mark_runs - KVM_DIRTY_SLOT_LOG_MARK
 * @log: the log
 * @argp: struct kvm_dirty_slot_runs in userspace
 */
long kvm_dirty_slot_log_mark_runs(struct kvm_dirty_slot_log *log,
				  void __user *argp)
{
	return log_runs(log, argp, mark_word);
}

/**
 * kvm_dirty_slot_log_discard_runs - KVM_DIRTY_SLOT_LOG_DISCARD
 * @log: the log
 * @argp: struct kvm_dirty_slot_runs in userspace
 */
long kvm_dirty_slot_log_discard_runs(struct kvm_dirty_slot_log *log,
				     void __user *argp)
{
	return log_runs(log, argp, discard_word);
}
