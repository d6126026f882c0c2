// SPDX-License-Identifier: GPL-2.0-only
/*
 * HARVEST and RESET of one log.
 *
 * A call notes, under log->mutex, how far each ring goes and what is in flight;
 * then it takes that, batch after batch.  It holds the mutex while it takes, and
 * not while it copies a batch out and re-protects it: so it does not matter to
 * others whether it waits for userspace, and several calls can work on one log.
 * Each page goes to the one that takes it.
 *
 * What userspace has collected itself is re-protected in one go under the mutex:
 * whoever finds reset where its consumer is may rely on it.
 */

#include <linux/kvm_host.h>
#include <linux/prefetch.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>

#include "batch.h"

/*
 * Take.  All of it under log->mutex.
 */

/* So many entries more may be looked at before signals are. */
static bool call_spend(struct kvm_dirty_slot_call *c, u32 n)
{
	c->budget -= min(n, c->budget);
	if (likely(c->budget))
		return false;
	c->budget = CALL_STEP;
	cond_resched();
	return signal_pending(current);
}

/*
 * Words of the bitmap, and entries, which the vCPU has in its cache, are asked for so
 * many entries before they are needed: an atomic operation does not wait for what has
 * been asked for, but nothing overlaps with it that has not.
 */
#define WORDS_AHEAD	16
#define ENTRIES_AHEAD	64

/* Ask for what entries from @at on say, some of those before @end. */
static __always_inline u64 ask_ahead(const struct kvm_dirty_slot_log *log,
				     const struct kvm_dirty_run *runs, u64 at,
				     u64 end)
{
	const u32 last = log->entries - 1;

	if (end - at > ENTRIES_AHEAD + WORDS_AHEAD) {
		prefetch(&runs[(at + ENTRIES_AHEAD) & last]);
		prefetch(&runs[(at + ENTRIES_AHEAD + ENTRIES_PER_LINE) & last]);
	}
	for (end = min(end, at + WORDS_AHEAD); at != end; at++)
		prefetchw(&log->bitmap[runs[at & last].offset / BITS_PER_LONG]);
	return end;
}

/* Give entries that were read back to the vCPU. */
static void ring_give_back(struct kvm_dirty_slot_ring *ring, u64 cursor)
{
	smp_store_release(&ring->kern->reset, cursor); /* B */
}

/* Take the pages of entries, and no others, as long as there is room. */
static noinline u64 take_own(struct kvm_dirty_slot_log *log,
			     struct kvm_dirty_slot_call *c,
			     const struct kvm_dirty_run *runs, u64 cursor, u64 end)
{
	unsigned long own;
	u32 offset;

	for (; cursor != end; cursor++) {
		offset = runs[cursor & (log->entries - 1)].offset;
		own = BIT(offset % BITS_PER_LONG);
		if (!batch_take(log, c, offset / BITS_PER_LONG, own))
			break;
	}
	return cursor;
}

/*
 * Take the entries from @cursor to @end, with their neighbours while there is plenty of
 * room; returns the one for which there was none.  What is left of the room is filled
 * in the order of the entries: the pages of a word are not in that order, and the last
 * of them would never have its turn.
 */
static noinline u64 take_entries(struct kvm_dirty_slot_log *log,
				 struct kvm_dirty_slot_call *c,
				 const struct kvm_dirty_run *runs, u64 cursor,
				 u64 end)
{
	const u32 last = log->entries - 1;
	struct batch_end e = batch_get_end(c);
	unsigned long *p, taken;
	u64 asked = ask_ahead(log, runs, cursor, end), stop;
	u32 offset;

	while (cursor != end) {
		stop = asked;
		if (asked != end)
			asked = ask_ahead(log, runs, asked, end);
		for (; cursor != stop; cursor++) {
			offset = runs[cursor & last].offset;
			p = &log->bitmap[offset / BITS_PER_LONG];
			if (!(READ_ONCE(*p) & BIT(offset % BITS_PER_LONG)))
				continue;
			if (unlikely(!batch_has_plenty(c, &e))) {
				batch_set_end(c, &e);
				return take_own(log, c, runs, cursor, end);
			}
			taken = xchg(p, 0);
			if (unlikely(!taken))
				continue;
			offset -= offset % BITS_PER_LONG;
			batch_emit(c, &e, offset, taken, true);
			batch_add(c, &e, offset, taken, false);
		}
	}
	batch_set_end(c, &e);
	return cursor;
}

/*
 * Take what a ring's entries say.  Taken is also what else is logged in the words
 * of those pages: neighbours get into one run without sorting, and a walk of the
 * page tables serves them all.  They have entries of their own, which become
 * stale.  But an entry that is stale itself is no reason to look at its word: what
 * has been logged there since the call began need not be in the answer.
 *
 * Nor is one that looks as if it were not, because its page was dirtied again after
 * a neighbour's entry had it taken: a guest could have each of its pages reported 64
 * times.  A call that has much more than the entries it has read takes no neighbours
 * until it has read more; much is half of what there was to read, and CALL_AHEAD.
 */
static enum take take_ring(struct kvm_dirty_slot_log *log,
			   struct kvm_dirty_slot_call *c,
			   struct kvm_dirty_slot_span *span)
{
	struct kvm_dirty_slot_ring *ring = log_nth_ring(log, span->ring);
	u64 reset = ring->kern->reset, cursor = reset, end;
	enum take took = TAKE_DONE;
	unsigned long own;
	u32 offset;

	/* Others may have got further meanwhile. */
	while ((s64)(span->limit - cursor) > 0) {
		u64 from = cursor, pages = c->nr_pages;

		end = cursor + min_t(u64, span->limit - cursor, c->budget);
		if (likely(c->ahead < CALL_AHEAD))
			cursor = take_entries(log, c, ring->runs, cursor, end);
		else
			cursor = take_own(log, c, ring->runs, cursor, end);
		c->ahead += (s64)(c->nr_pages - pages) - (s64)(cursor - from);
		if (cursor != end)
			took = TAKE_FULL;
		else if (call_spend(c, cursor - from) && cursor != span->limit)
			took = TAKE_SIGNAL;
		if (took)
			break;
	}
	if (cursor != reset) {
		/* First, for reset never to be seen ahead of it. */
		WRITE_ONCE(ring->user->consumer, cursor);
		ring_give_back(ring, cursor);
	}
	/* E: most often it has an entry by now */
	offset = span->in_flight;
	if (took || offset == NO_PAGE || !test_bit(offset, log->bitmap))
		return took;
	own = BIT(offset % BITS_PER_LONG);
	if (!batch_take(log, c, offset / BITS_PER_LONG, own))
		return TAKE_FULL;
	return TAKE_DONE;
}

/*
 * Take what is in no ring.  One pass upwards and around, so that it ends however
 * fast pages are added.
 */
static enum take take_overflow(struct kvm_dirty_slot_log *log,
			       struct kvm_dirty_slot_call *c)
{
	unsigned long word, end;
	u64 before;

	for (;;) {
		end = c->around ? c->start : log->nr_words;
		word = kvm_dirty_summary_next(&log->overflow, c->word);
		if (word >= end) {
			if (c->around || !c->start)
				return TAKE_DONE;
			c->around = true;
			c->word = 0;
			continue;
		}
		c->word = word;
		/* First, as a mark that finds it set leaves it at that. */
		kvm_dirty_summary_clear(&log->overflow, word);
		before = c->nr_pages;
		if (!batch_take(log, c, word, ~0UL)) {
			kvm_dirty_slot_log_spill(log, word);
			/* If it had its turn, and only then, it is another's. */
			c->word += c->nr_pages != before;
			return TAKE_FULL;
		}
		c->word = word + 1;
		if (call_spend(c, 1))
			return TAKE_SIGNAL;
	}
}

/*
 * The call may end here.  What of the log has had its turn comes last in the next
 * one, even if it was not done: with small arrays, who writes fast would be served
 * for ever, and the others never.
 */
static void log_stop_at(struct kvm_dirty_slot_log *log,
			struct kvm_dirty_slot_call *c,
			const struct kvm_dirty_slot_span *span)
{
	u32 at = min(span->ring, c->nr_rings) + c->served;

	log->next = at > c->nr_rings ? 0 : at;
	if (span->ring == SPAN_OVERFLOW)
		log->next_word = c->word;
}

/* Fill a batch; note where to go on if that is not all. */
static enum take log_take(struct kvm_dirty_slot_log *log,
			  struct kvm_dirty_slot_call *c, u32 max_runs)
{
	struct kvm_dirty_slot_span *span;
	enum take took;
	u64 before;

	batch_reset(c, max_runs);
	for (; c->span < c->nr_spans; c->span++, c->served = false) {
		span = &c->spans[c->span];
		before = c->nr_pages;
		if (span->ring == SPAN_OVERFLOW)
			took = take_overflow(log, c);
		else
			took = take_ring(log, c, span);
		c->served |= c->nr_pages != before;
		if (took) {
			log_stop_at(log, c, span);
			return took;
		}
	}
	return TAKE_DONE;
}

/*
 * Re-protect what userspace collected from the mapping, [reset, consumer) of
 * each ring: only those very pages, as nobody was told of their neighbours.
 */
static int log_reset_collected(struct kvm_dirty_slot_log *log,
			       struct kvm_dirty_slot_call *c, u64 *nr_pages)
{
	struct kvm_dirty_slot_ring *ring;
	u32 i, offset, last = log->entries - 1;
	bool stop = false;
	u64 pages = 0;

	batch_reset(c, 0);
	for (i = 0; i < c->nr_spans && !stop; i++) {
		if (c->spans[i].ring == SPAN_OVERFLOW)
			continue;
		ring = log_nth_ring(log, c->spans[i].ring);
		while (ring->cursor != ring->consumer && !stop) {
			offset = ring->runs[ring->cursor & last].offset;
			if (c->nr_masks == BATCH_MASKS) {
				kvm_dirty_slot_batch_protect(log, c);
				pages += c->nr_pages;
				batch_reset(c, 0);
			}
			batch_take_known(log, c, offset / BITS_PER_LONG,
					 BIT(offset % BITS_PER_LONG));
			ring->cursor++;
			stop = call_spend(c, 1);
		}
	}
	kvm_dirty_slot_batch_protect(log, c);
	pages += c->nr_pages;
	log_phase(log, KVM_DIRTY_SLOT_PHASE_FLUSH);
	kvm_dirty_slot_call_flush(c);
	log_phase(log, KVM_DIRTY_SLOT_PHASE_COLLECT);

	for (i = 0; i < c->nr_spans; i++) {
		if (c->spans[i].ring == SPAN_OVERFLOW)
			continue;
		ring = log_nth_ring(log, c->spans[i].ring);
		if (ring->cursor != ring->kern->reset)
			ring_give_back(ring, ring->cursor);
	}
	if (c->kvm)
		atomic64_add(pages,
			     &c->kvm->stat.generic.dirty_slot_log_reset_pages);
	*nr_pages += pages;
	return stop ? -EINTR : 0;
}

/**
 * kvm_dirty_slot_log_ready - has a ring so many entries, or the overflow anything?
 * @log: the log
 * @level: entries, stale or not
 */
bool kvm_dirty_slot_log_ready(struct kvm_dirty_slot_log *log, u32 level)
{
	u32 i, n = log_nr_rings(log);

	if (!kvm_dirty_summary_empty(&log->overflow))
		return true;
	for (i = 0; i < n; i++) {
		i = kvm_dirty_summary_peek(&log->busy, i);
		if (i < n && ring_used(log_nth_ring(log, i)) >= level)
			return true;
	}
	return false;
}

/*
 * Who waits for events, not for states, has seen the one that made it call, and
 * vCPUs that find half a ring used, or something in the overflow, cause no other.
 */
static void log_wake_again(struct kvm_dirty_slot_log *log)
{
	/*
	 * A full barrier: with ring_push_wake(), see it, or it sees reset; and with
	 * who comes to wait, see him, or he sees what there is.
	 */
	if (!wq_has_sleeper(&log->wait) && !waitqueue_active(&log->vm->wait))
		return;
	if (kvm_dirty_slot_log_ready(log, log->wake_level))
		irq_work_queue(&log->wake);
}

/**
 * kvm_dirty_slot_log_drain - take what is in a log when it is called
 * @log: the log
 * @c: the call, with its kvm; the caller flushes TLBs
 * @sink: where to put it
 * @all: look at all rings, and fail if userspace's consumers are no good;
 *	otherwise look at those that may have something
 *
 * Context: sleeps, and waits for userspace; without locks.
 * Return: 0, also if something was stored before one of these: -EINVAL if a
 * consumer is out of bounds, -EINTR, -EFAULT from storing.
 */
int kvm_dirty_slot_log_drain(struct kvm_dirty_slot_log *log,
			     struct kvm_dirty_slot_call *c,
			     struct kvm_dirty_slot_sink *sink, bool all)
{
	enum take took;
	int r;

	sink->more = true;
	if (mutex_lock_interruptible(&log->mutex))
		return sink->stored ? 0 : -EINTR;
	log_phase(log, KVM_DIRTY_SLOT_PHASE_COLLECT);

	r = kvm_dirty_slot_log_look_at(log, c, all);
	if (r)
		goto unlock;
	if (unlikely(c->collected))
		r = log_reset_collected(log, c, &sink->collected);
	if (r)
		goto unlock;

	for (;;) {
		took = log_take(log, c, sink->left);
		if (!c->nr_masks)
			break;
		log_hold(log);
		mutex_unlock(&log->mutex);

		sink->more = took != TAKE_DONE;
		r = sink->store(sink, log, c);
		if (r) {
			kvm_dirty_slot_batch_undo(log, c);
		} else {
			/* From here on the pages are the caller's. */
			sink->stored = true;
			sink->left -= c->nr_runs;
			kvm_dirty_slot_batch_protect(log, c);
		}
		log_unhold(log);

		if (r || took == TAKE_DONE || !sink->left ||
		    signal_pending(current) ||
		    mutex_lock_interruptible(&log->mutex))
			goto out;
	}
	sink->more = took != TAKE_DONE;
	if (took == TAKE_SIGNAL)
		r = -EINTR;
unlock:
	mutex_unlock(&log->mutex);
out:
	if (r)
		sink->more = true;
	if (sink->stored)
		r = 0;
	if (!sink->more)
		log_wake_again(log);
	return r;
}

/*
 * The calls.
 */

struct slot_sink {
	struct kvm_dirty_slot_sink sink;
	struct kvm_dirty_slot_runs args;
	void __user *argp;
};

/* What a call changes of its arguments; false if it cannot be written. */
static bool put_args(struct kvm_dirty_slot_runs __user *argp,
		     const struct kvm_dirty_slot_runs *args)
{
	u32 nr_runs = args->nr_runs, flags = args->flags;
	u64 nr_pages = args->nr_pages;

	if (!user_write_access_begin(argp, sizeof(*argp)))
		return false;
	unsafe_put_user(nr_runs, &argp->nr_runs, fault);
	unsafe_put_user(flags, &argp->flags, fault);
	unsafe_put_user(nr_pages, &argp->nr_pages, fault);
	user_write_access_end();
	return true;
fault:
	user_write_access_end();
	return false;
}

static int slot_store(struct kvm_dirty_slot_sink *sink,
		      const struct kvm_dirty_slot_log *log,
		      const struct kvm_dirty_slot_call *c)
{
	struct slot_sink *s = container_of(sink, struct slot_sink, sink);
	struct kvm_dirty_run __user *runs = u64_to_user_ptr(s->args.runs);
	struct kvm_dirty_slot_runs args = s->args;

	if (copy_to_user(runs + args.nr_runs, c->runs,
			 c->nr_runs * sizeof(*runs)))
		return -EFAULT;

	args.nr_runs += c->nr_runs;
	args.nr_pages += c->nr_pages;
	args.flags = sink->more ? KVM_DIRTY_HARVEST_MORE : 0;
	if (!put_args(s->argp, &args))
		return -EFAULT;
	s->args = args;
	return 0;
}

/**
 * kvm_dirty_slot_log_harvest - KVM_DIRTY_SLOT_LOG_HARVEST
 * @log: the log
 * @argp: struct kvm_dirty_slot_runs in userspace
 */
long kvm_dirty_slot_log_harvest(struct kvm_dirty_slot_log *log, void __user *argp)
{
	struct slot_sink s = { .sink.store = slot_store, .argp = argp };
	struct kvm_dirty_slot_runs *args = &s.args;
	struct kvm_dirty_slot_call *c;
	bool sync, dead;
	u32 flags;
	int r;

	if (copy_from_user(args, argp, sizeof(*args)))
		return -EFAULT;
	if (args->flags & ~(KVM_DIRTY_HARVEST_SYNC | KVM_DIRTY_HARVEST_MORE) ||
	    !args->nr_runs || args->reserved[0] || args->reserved[1])
		return -EINVAL;

	/*
	 * Learn now, with nothing taken, if it cannot be written; as it is, so
	 * that who gets EINTR can make the same call again.
	 */
	if (!put_args(argp, args))
		return -EFAULT;
	sync = args->flags & KVM_DIRTY_HARVEST_SYNC;
	s.sink.left = args->nr_runs;
	args->nr_runs = 0;
	args->nr_pages = 0;
	args->flags = 0;

	c = kvm_dirty_slot_call_get(log);
	if (!c)
		return -ENOMEM;
	log_phase(log, KVM_DIRTY_SLOT_PHASE_WAIT);
	c->kvm = kvm_dirty_slot_log_get_kvm(log, &dead);
	r = c->kvm && READ_ONCE(c->kvm->vm_dead) ? -EIO : 0;
	if (!r && c->kvm && sync)
		r = kvm_dirty_slot_sync_hw(c->kvm, true);
	if (!r)
		r = kvm_dirty_slot_log_drain(log, c, &s.sink, true);

	log_phase(log, KVM_DIRTY_SLOT_PHASE_FLUSH);
	kvm_dirty_slot_call_flush(c);
	log_phase(log, KVM_DIRTY_SLOT_PHASE_END);

	if (!r && dead && !args->nr_runs && !s.sink.more && !s.sink.collected &&
	    !c->others)
		r = -ENODEV;
	flags = s.sink.more ? KVM_DIRTY_HARVEST_MORE : 0;
	/* If it was not stored, or otherwise; who cannot have it calls again. */
	if ((!r || r == -ENODEV) && (!s.sink.stored || flags != args->flags)) {
		args->flags = flags;
		if (!put_args(argp, args) && !s.sink.stored)
			r = -EFAULT;
	}
	trace_kvm_dirty_slot_log_harvest(log->pid, log->slot, args->nr_runs,
					 args->nr_pages, s.sink.collected,
					 c->used, args->flags | sync, r);
	if (c->kvm) {
		atomic64_inc(&c->kvm->stat.generic.dirty_slot_log_harvests);
		atomic64_add(args->nr_pages,
			     &c->kvm->stat.generic.dirty_slot_log_harvested_pages);
		kvm_put_kvm(c->kvm);
	}
	kvm_dirty_slot_call_put(log, c);
	return r;
}

/**
 * kvm_dirty_slot_log_reset - KVM_DIRTY_SLOT_LOG_RESET
 * @log: the log
 * @argp: struct kvm_dirty_slot_reset in userspace
 */
long kvm_dirty_slot_log_reset(struct kvm_dirty_slot_log *log, void __user *argp)
{
	struct kvm_dirty_slot_reset args;
	struct kvm_dirty_slot_call *c;
	bool empty, dead;
	int r;

	if (copy_from_user(&args, argp, sizeof(args)))
		return -EFAULT;
	if (args.flags & ~KVM_DIRTY_RESET_OVERFLOW || args.pad ||
	    args.reserved[0] || args.reserved[1])
		return -EINVAL;
	args.nr_pages = 0;
	args.flags = 0;
	if (copy_to_user(argp, &args, sizeof(args)))
		return -EFAULT;

	c = kvm_dirty_slot_call_get(log);
	if (!c)
		return -ENOMEM;
	log_phase(log, KVM_DIRTY_SLOT_PHASE_WAIT);
	c->used = 0;
	c->kvm = kvm_dirty_slot_log_get_kvm(log, &dead);
	r = c->kvm && READ_ONCE(c->kvm->vm_dead) ? -EIO : 0;
	if (!r && mutex_lock_interruptible(&log->mutex))
		r = -EINTR;
	if (r)
		goto end;
	log_phase(log, KVM_DIRTY_SLOT_PHASE_COLLECT);

	r = kvm_dirty_slot_log_look_at(log, c, true);
	if (!r) {
		empty = !kvm_dirty_slot_log_ready(log, 1);
		if (c->collected)
			r = log_reset_collected(log, c, &args.nr_pages);
		if (!r && dead && empty && !c->others)
			r = -ENODEV;
		if (!kvm_dirty_summary_empty(&log->overflow))
			args.flags |= KVM_DIRTY_RESET_OVERFLOW;
	}
	mutex_unlock(&log->mutex);
	log_wake_again(log);
end:
	log_phase(log, KVM_DIRTY_SLOT_PHASE_END);
	trace_kvm_dirty_slot_log_reset(log->pid, log->slot, args.nr_pages,
				       c->used, args.flags, r);
	if (c->kvm) {
		atomic64_inc(&c->kvm->stat.generic.dirty_slot_log_resets);
		kvm_put_kvm(c->kvm);
	}
	kvm_dirty_slot_call_put(log, c);
	/* The pages are re-protected; all that can be lost here is their count. */
	if (copy_to_user(argp, &args, sizeof(args)) && !r)
		r = -EFAULT;
	return r;
}
