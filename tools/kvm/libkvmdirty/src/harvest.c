// SPDX-License-Identifier: GPL-2.0-only
/*
 * Harvests of one slot: how pages get from KVM's log, and from those that wait here, to
 * the caller.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "internal.h"

static bool can_write(struct kvmdirty_slot *slot, void *p, size_t len)
{
	uintptr_t page = sysconf(_SC_PAGESIZE);
	uintptr_t start = (uintptr_t)p / page * page;
	int r;

	if (!slot->can_probe)
		return true;
	do {
		r = madvise((void *)start, (uintptr_t)p + len - start, MADV_POPULATE_WRITE);
	} while (r && (errno == EINTR || errno == EAGAIN));
	return !r;
}

/*
 * What can be stored now: pages are taken out of slot->pending first and a fault
 * must not lose them.  The kernel takes care of that itself in HARVEST.
 */
static size_t writable_runs(struct kvmdirty_slot *slot, struct sink *sink)
{
	size_t n = sink->room < 4096 ? sink->room : 4096;

	if (!sink->probed && n) {
		if (can_write(slot, sink->runs, n * sizeof(*sink->runs)))
			sink->probed = n;
		else if (can_write(slot, sink->runs, sizeof(*sink->runs)))
			sink->probed = 1;
	}
	return sink->probed;
}

static void sink_count(struct sink *sink, uint64_t nr_runs, uint64_t nr_pages)
{
	sink->result.nr_runs += nr_runs;
	sink->result.nr_pages += nr_pages;
	if (!sink->fn) {
		sink->runs += nr_runs;
		sink->room -= nr_runs;
		sink->probed -= nr_runs < sink->probed ? nr_runs : sink->probed;
	}
}

int slot_deliver(struct kvmdirty_slot *slot, struct sink *sink, size_t nr, uint64_t *left)
{
	struct kvmdirty_run *run = slot->batch, *end = slot->batch + nr;
	struct kvmdirty_run part;
	uint64_t n = 0;
	int r = 0;

	if (!sink->fn) {
		for (; run < end; run++)
			n += run->npages;
		memcpy(sink->runs, slot->batch, nr * sizeof(*run));
		sink_count(sink, nr, n);
		return 0;
	}

	while (run < end && sink->budget && !r) {
		part = *run;
		if (part.npages > sink->budget)
			part.npages = sink->budget;
		r = sink->fn(&part, sink->arg);
		if (r < 0)
			break;
		sink_count(sink, 1, part.npages);
		sink->budget -= part.npages;
		if (part.npages == run->npages) {
			run++;
		} else {
			run->offset += part.npages;
			run->npages -= part.npages;
		}
	}
	/* It said stop: as if the budget were used up. */
	if (r > 0)
		sink->budget = 0;
	if (run == end)
		return 0;
	*left = run->offset;
	pending_add_runs(slot, run, end - run);
	for (; run < end; run++)
		n += run->npages;
	count(&slot->stats.returned_pages, n);
	return r < 0 ? r : 1;
}

static uint64_t next_pending(struct kvmdirty_slot *slot, uint64_t from)
{
	uint64_t pos;

	pthread_mutex_lock(&slot->pending_lock);
	pos = pageset_next(&slot->pending, from);
	pthread_mutex_unlock(&slot->pending_lock);
	return pos;
}

/* Move runs from [*cursor, to) to the batch, not more than the sink takes. */
static size_t take_pending(struct kvmdirty_slot *slot, struct sink *sink, uint64_t *cursor,
			   uint64_t to)
{
	uint64_t pages = sink->fn ? sink->budget : UINT64_MAX;
	size_t max = sink->fn || sink->probed > BATCH_RUNS ? BATCH_RUNS : sink->probed;
	uint64_t pos, len;
	size_t n = 0;

	pthread_mutex_lock(&slot->pending_lock);
	while (n < max && pages) {
		pos = pageset_next(&slot->pending, *cursor);
		if (pos >= to)
			break;
		len = pageset_run(&slot->pending, pos, to - pos < pages ? to - pos : pages);
		pageset_del(&slot->pending, pos, len);
		slot->batch[n++] = (struct kvmdirty_run){ .offset = pos, .npages = len };
		pages -= len;
		*cursor = pos + len;
	}
	pthread_mutex_unlock(&slot->pending_lock);
	return n;
}

/*
 * Hand out what is pending in [*cursor, to).  0: all of it, and *cursor is @to; 1:
 * the sink is full or wants no more; or an error.
 */
static int emit(struct kvmdirty_slot *slot, struct sink *sink, uint64_t *cursor, uint64_t to)
{
	uint64_t left;
	size_t n;
	int r;

	while (next_pending(slot, *cursor) < to) {
		if (sink_full(sink))
			return 1;
		if (!sink->fn && !writable_runs(slot, sink))
			return -EFAULT;
		n = take_pending(slot, sink, cursor, to);
		left = *cursor;
		r = slot_deliver(slot, sink, n, &left);
		*cursor = left;
		if (r)
			return r;
	}
	*cursor = to;
	return 0;
}

/* Slot rings: what waits here, then what the kernel has. */
static int harvest_slot_ring(struct kvmdirty_slot *slot, struct sink *sink, unsigned int flags)
{
	struct kvmdirty_result got;
	uint64_t cursor = 0, left;
	int r, more;

	r = emit(slot, sink, &cursor, slot->npages);
	if (r)
		return r;
	do {
		if (sink_full(sink))
			return 1;
		if (!sink->fn) {
			r = slot_ring_take(slot, sink->runs, sink->room, flags, &got);
			if (r >= 0)
				sink_count(sink, got.nr_runs, got.nr_pages);
			return r;
		}
		more = slot_ring_take(slot, slot->batch,
				      sink->budget < BATCH_RUNS ? sink->budget : BATCH_RUNS,
				      flags, &got);
		if (more < 0)
			return more;
		r = slot_deliver(slot, sink, got.nr_runs, &left);
		if (r)
			return r;
		/* Once in a harvest is enough: the rest is logged by now. */
		flags |= KVMDIRTY_HARVEST_NOSYNC;
	} while (more);
	return 0;
}

/*
 * The others: sweep over the memslot.  A sweep that an earlier call began may not
 * have what was written since, so only one that began in this call is the end.
 */
static int harvest_sweep(struct kvmdirty_slot *slot, struct sink *sink)
{
	bool began = false;
	int r;

	while (slot->sweeping || !began) {
		if (!slot->sweeping) {
			if (sink_full(sink))
				return 1;
			slot->armed = slot->npages;
			r = slot->backend->sweep(slot);
			if (r)
				return r;
			slot->sweeping = true;
			slot->cursor = 0;
			began = true;
		}
		while (slot->cursor < slot->npages) {
			if (slot->cursor == slot->armed) {
				if (sink_full(sink))
					return 1;
				r = slot->backend->arm(slot);
				if (r)
					return r;
			}
			r = emit(slot, sink, &slot->cursor, slot->armed);
			if (r)
				return r;
		}
		slot->sweeping = false;
	}
	if (!sink->result.nr_runs && slot->stopped && pending_is_empty(slot))
		return -ENODEV;
	return 0;
}

/* The counts of what a sink got since it had *@before. */
static void count_handed_out(struct kvmdirty_slot *slot, const struct sink *sink,
			     const struct kvmdirty_result *before)
{
	count(&slot->stats.runs, sink->result.nr_runs - before->nr_runs);
	count(&slot->stats.pages, sink->result.nr_pages - before->nr_pages);
}

int slot_hand_out(struct kvmdirty_slot *slot, struct sink *sink)
{
	struct kvmdirty_result before = sink->result;
	uint64_t cursor = 0;
	int r;

	r = emit(slot, sink, &cursor, slot->npages);
	count_handed_out(slot, sink, &before);
	return r;
}

int slot_harvest(struct kvmdirty_slot *slot, struct sink *sink, unsigned int flags)
{
	struct kvmdirty_result before = sink->result;
	int r;

	if (slot->log_fd >= 0)
		r = harvest_slot_ring(slot, sink, flags);
	else
		r = harvest_sweep(slot, sink);
	count(&slot->stats.harvests, 1);
	count_handed_out(slot, sink, &before);
	return r;
}

static int harvest(struct kvmdirty_slot *slot, struct sink *sink, unsigned int flags,
		   struct kvmdirty_result *result)
{
	int r;

	if (flags & ~KVMDIRTY_HARVEST_NOSYNC)
		return -EINVAL;
	r = pthread_mutex_lock(&slot->harvest_lock);
	if (r)
		return -r;
	r = slot_harvest(slot, sink, flags);
	pthread_mutex_unlock(&slot->harvest_lock);
	if (result)
		*result = sink->result;
	return r;
}

int kvmdirty_harvest(struct kvmdirty_slot *slot, struct kvmdirty_run *runs, size_t nr_runs,
		     unsigned int flags, struct kvmdirty_result *result)
{
	struct sink sink = { .runs = runs, .room = nr_runs };
	int r;

	if (result)
		memset(result, 0, sizeof(*result));
	if (!nr_runs)
		return -EINVAL;
	r = harvest(slot, &sink, flags, result);
	/* What was stored is the caller's; the next call meets the error again. */
	if (r < 0 && sink.result.nr_runs)
		return r == -ENODEV ? 0 : 1;
	return r;
}

int kvmdirty_harvest_each(struct kvmdirty_slot *slot, kvmdirty_run_fn fn, void *arg,
			  uint64_t max_pages, unsigned int flags,
			  struct kvmdirty_result *result)
{
	struct sink sink = { .fn = fn, .arg = arg, .budget = max_pages ? max_pages : UINT64_MAX };
	int r;

	if (result)
		memset(result, 0, sizeof(*result));
	if (!fn)
		return -EINVAL;
	r = harvest(slot, &sink, flags, result);
	return r == -ENODEV && sink.result.nr_runs ? 0 : r;
}
