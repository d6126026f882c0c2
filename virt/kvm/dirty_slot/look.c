// SPDX-License-Identifier: GPL-2.0-only
/*
 * What is in a log when a call on it begins; and, if there is nothing, how rings
 * and the log come not to be looked at any more ("Quiet" in log.h).
 */

#include <linux/bitops.h>
#include <linux/kvm_host.h>
#include <linux/srcu.h>

#include "log.h"

/* There is nothing in the ring: one more step on its way out of busy. */
static void ring_leave(struct kvm_dirty_slot_log *log,
		       struct kvm_dirty_slot_call *c,
		       struct kvm_dirty_slot_ring *ring, u32 n)
{
	if (READ_ONCE(ring->active)) {
		ring->leaving = c->kvm && (!log->gp_started || c->gp_done);
		if (ring->leaving) {
			WRITE_ONCE(ring->active, false); /* G, by the grace period */
			c->leave = true;
		}
	} else if (ring->leaving && (c->gp_done || !log->gp_started)) {
		ring->leaving = false;
		kvm_dirty_summary_clear(&log->busy, n);
		if (READ_ONCE(ring->active)) /* G, with ring_activate() */
			kvm_dirty_summary_set(&log->busy, n);
	}
}

/* Read and check what userspace says it collected, and how far the ring goes. */
static int ring_look_at(struct kvm_dirty_slot_log *log,
			struct kvm_dirty_slot_call *c, u32 n, bool all)
{
	struct kvm_dirty_slot_ring *ring = log_nth_ring(log, n);
	u32 in_flight = smp_load_acquire(&ring->marking); /* E */
	/* In this order: an honest consumer lags producer. */
	u64 consumer = smp_load_acquire(&ring->user->consumer); /* C */
	u64 limit = smp_load_acquire(&ring->kern->producer); /* A */
	u64 reset = ring->kern->reset;
	struct kvm_dirty_slot_span *span;

	/* Unsigned, so that one behind reset is too far ahead as well. */
	if (consumer - reset > limit - reset) {
		if (all)
			return -EINVAL;
		/* Who asks for the whole VM is not to blame: as if it were reset. */
		consumer = reset;
	}
	ring->consumer = consumer;
	ring->cursor = reset;
	c->collected |= consumer != reset;
	c->used += limit - reset;

	if (!test_bit(in_flight, log->bitmap))
		in_flight = NO_PAGE;
	if (limit == reset && in_flight == NO_PAGE) {
		ring_leave(log, c, ring, n);
		return 0;
	}
	span = &c->spans[c->nr_spans++];
	span->limit = limit;
	span->ring = n;
	span->in_flight = in_flight;
	return 0;
}

static int rings_look_at(struct kvm_dirty_slot_log *log,
			 struct kvm_dirty_slot_call *c, u32 from, u32 to,
			 bool all)
{
	int r;

	for (; from < to; from++) {
		if (!all) {
			from = kvm_dirty_summary_next(&log->busy, from);
			if (from >= to)
				break;
		}
		r = ring_look_at(log, c, from, all);
		if (r)
			return r;
	}
	return 0;
}

/* If there is nothing in the log any more, it leaves the VM's tree. */
static void log_settle(struct kvm_dirty_slot_log *log,
		       struct kvm_dirty_slot_call *c)
{
	struct kvm_dirty_slot_vm *vm = log->vm;

	if (c->leave) {
		WRITE_ONCE(vm->gp_started, true);
		log->gp = start_poll_synchronize_srcu(&c->kvm->srcu);
		log->gp_started = true;
	} else if (c->gp_done) {
		log->gp_started = false;
	}

	if (!READ_ONCE(log->active) || c->others ||
	    !kvm_dirty_summary_empty(&log->busy) ||
	    !kvm_dirty_summary_empty(&log->overflow))
		return;

	xa_lock(&vm->logs);
	raw_spin_lock_irq(&log->mark_lock);
	WRITE_ONCE(log->active, false);
	smp_mb(); /* G, with ring_activate(): see it, or be seen */
	/* One without a memslot stays there until the VM's table lets it go. */
	if (!kvm_dirty_summary_empty(&log->busy) ||
	    !kvm_dirty_summary_empty(&log->overflow) || !READ_ONCE(log->kvm))
		WRITE_ONCE(log->active, true);
	else if (log->listed)
		kvm_dirty_summary_clear(&vm->index, log->index);
	raw_spin_unlock_irq(&log->mark_lock);
	xa_unlock(&vm->logs);
}

/**
 * kvm_dirty_slot_log_look_at - note what a call has to take
 * @log: the log
 * @c: the call
 * @all: look at all rings, and fail if userspace's consumers are no good;
 *	otherwise look at those that may have something
 *
 * Beginning after what the last call that did not get to the end had its last pages
 * of.
 *
 * Context: under log->mutex.
 * Return: 0; -EINVAL if a consumer is out of bounds, with nothing changed.
 */
int kvm_dirty_slot_log_look_at(struct kvm_dirty_slot_log *log,
			       struct kvm_dirty_slot_call *c, bool all)
{
	u32 n = c->nr_rings, first = min(log->next, n);
	int r;

	c->nr_spans = 0;
	c->span = 0;
	c->used = 0;
	c->collected = false;
	c->leave = false;
	c->budget = CALL_STEP;
	c->served = false;
	c->others = atomic_read(&log->outstanding);
	c->gp_done = c->kvm && log->gp_started &&
		     poll_state_synchronize_srcu(&c->kvm->srcu, log->gp);

	/* Marks without a vCPU that set a bit before now are in the overflow. */
	raw_spin_lock_irq(&log->mark_lock);
	raw_spin_unlock_irq(&log->mark_lock);
	smp_mb(); /* E */

	r = rings_look_at(log, c, first, n, all);
	if (r)
		goto settle;

	if (!kvm_dirty_summary_empty(&log->overflow)) {
		c->start = log->next_word;
		c->word = c->start;
		c->around = false;
		c->spans[c->nr_spans++].ring = SPAN_OVERFLOW;
	}
	if (first)
		r = rings_look_at(log, c, 0, first, all);
	c->ahead = -(s64)(c->used / 2);
settle:
	log_settle(log, c);
	return r;
}
