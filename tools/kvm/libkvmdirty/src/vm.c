// SPDX-License-Identifier: GPL-2.0-only
/*
 * Harvests of all slots in one call.
 *
 * With slot rings it is one call of KVM, too, which finds those that have something.  What it
 * gives belongs to slots that are tracked, which may have come and gone meanwhile: from here on it
 * is as if they had been harvested, each by itself.  Where KVM has no such log, that is what is
 * done.
 *
 * Who attached to the log of another process's VM knows no slots.  What was refused then waits in
 * kd->batch.
 */
#include <errno.h>
#include <string.h>
#include "internal.h"

/* What a run of a slot becomes. */
struct target {
	kvmdirty_vm_run_fn fn;
	void *arg;
	uint32_t slot, log;
};

static int hand_out(const struct kvmdirty_run *run, void *arg)
{
	const struct target *t = arg;
	struct kvmdirty_vm_run vm_run = {
		.slot = t->slot, .log = t->log, .offset = run->offset, .npages = run->npages,
	};

	return t->fn(&vm_run, t->arg);
}

/* The slot whose log's number is the next, from @from on, of those that @wanted wants. */
static struct kvmdirty_slot *find_next(struct kvmdirty *kd, uint64_t from,
				       bool (*wanted)(struct kvmdirty_slot *slot))
{
	struct kvmdirty_slot *slot, *best = NULL;
	size_t i;

	for (i = 0; i < NR_BUCKETS; i++) {
		for (slot = kd->slots[i]; slot; slot = slot->next) {
			if (slot->log >= from && (!best || slot->log < best->log) &&
			    (!wanted || wanted(slot)))
				best = slot;
		}
	}
	return best;
}

static struct kvmdirty_slot *find_any(struct kvmdirty *kd, uint64_t from)
{
	return find_next(kd, from, NULL);
}

/* What KVM logged before it stopped may not be in its log of all memslots. */
static bool is_stopped(struct kvmdirty_slot *slot)
{
	bool stopped;

	pthread_mutex_lock(&slot->pending_lock);
	stopped = slot->stopped && !slot->drained;
	pthread_mutex_unlock(&slot->pending_lock);
	return stopped;
}

static bool has_something(struct kvmdirty_slot *slot)
{
	bool has;

	pthread_mutex_lock(&slot->pending_lock);
	has = (slot->stopped && !slot->drained) || !pageset_empty(&slot->pending);
	pthread_mutex_unlock(&slot->pending_lock);
	return has;
}

static struct kvmdirty_slot *find_with_something(struct kvmdirty *kd, uint64_t from)
{
	return find_next(kd, from, has_something);
}

/* Of a slot in the upper half, if it still has the log in the lower one */
static struct kvmdirty_slot *find_log(struct kvmdirty *kd, uint64_t what)
{
	struct kvmdirty_slot *slot = slot_find(kd, what >> 32);

	return slot && slot->log == (uint32_t)what ? slot : NULL;
}

static int visit(struct kvmdirty_slot *slot, struct sink *sink, unsigned int flags, bool all)
{
	int r;

	if (!all && !is_stopped(slot))
		return slot_hand_out(slot, sink);
	r = slot_harvest(slot, sink, flags);
	if (r != -ENODEV)
		return r;
	pthread_mutex_lock(&slot->pending_lock);
	slot->drained = true;
	pthread_mutex_unlock(&slot->pending_lock);
	return 0;
}

/*
 * One slot after the other: all of them, or those that have something here.  Once around, from
 * where the last call stopped.
 */
static int visit_slots(struct kvmdirty *kd, struct sink *sink, unsigned int flags, bool all)
{
	uint64_t start = kd->next_log, from = start, end = UINT64_MAX;
	struct target *t = sink->arg;
	struct kvmdirty_slot *slot;
	bool had_turn;
	int r;

	for (;;) {
		r = slot_lock(kd, all ? find_any : find_with_something, from, &slot);
		if (r == -ENXIO || (!r && slot->log >= end)) {
			if (!r)
				pthread_mutex_unlock(&slot->harvest_lock);
			if (end == start || !start)
				return 0;
			from = 0;
			end = start;
			continue;
		}
		if (r)
			return r;
		t->slot = slot->id;
		t->log = slot->log;
		had_turn = !sink_full(sink);
		r = visit(slot, sink, flags, all);
		from = slot->log + 1ULL;
		/* One that always has more must not keep others from their turn. */
		if (r)
			kd->next_log = r > 0 && had_turn ? from : slot->log;
		pthread_mutex_unlock(&slot->harvest_lock);
		if (r)
			return r;
	}
}

/*
 * What KVM gave of one log, @nr runs: 0; 1 if not all of it was wanted; or what the callback
 * said.  What was not taken is pending in its slot.
 */
static int deliver_log(struct kvmdirty *kd, struct sink *sink, const struct kvmdirty_vm_run *run,
		       size_t nr)
{
	struct kvmdirty_result before = sink->result;
	struct target *t = sink->arg;
	struct kvmdirty_slot *slot;
	struct kvmdirty_run part;
	uint64_t left, npages = 0;
	size_t i;
	int r;

	r = slot_lock(kd, find_log, (uint64_t)run->slot << 32 | run->log, &slot);
	if (r == -ENXIO) {
		for (i = 0; i < nr; i++)
			npages += run[i].npages;
		count(&kd->stats.stray, npages);
		return 0;
	}
	if (r) {
		/* From a callback of this slot, which should not be. */
		for (i = 0; i < nr; i++) {
			part = (struct kvmdirty_run){ run[i].offset, run[i].npages };
			pending_add_runs(slot, &part, 1);
		}
		return r;
	}
	for (i = 0; i < nr; i++)
		slot->batch[i] = (struct kvmdirty_run){ run[i].offset, run[i].npages };
	t->slot = slot->id;
	t->log = slot->log;
	r = slot_deliver(slot, sink, nr, &left);
	count(&slot->stats.runs, sink->result.nr_runs - before.nr_runs);
	count(&slot->stats.pages, sink->result.nr_pages - before.nr_pages);
	pthread_mutex_unlock(&slot->harvest_lock);
	return r;
}

static int deliver_logs(struct kvmdirty *kd, struct sink *sink)
{
	int r = 0, one;
	size_t i;

	while (kd->vm_left) {
		const struct kvmdirty_vm_run *run = &kd->batch[kd->vm_at];

		for (i = 1; i < kd->vm_left && run[i].log == run->log; i++)
			;
		one = deliver_log(kd, sink, run, i);
		kd->vm_at += i;
		kd->vm_left -= i;
		/* The rest goes back to where it belongs. */
		if (one && !r) {
			r = one;
			sink->budget = 0;
		}
	}
	return r;
}

/* The same of a VM whose slots are not known. */
static int deliver_attached(struct kvmdirty *kd, struct sink *sink)
{
	struct target *t = sink->arg;
	int r = 0;

	while (kd->vm_left && sink->budget && !r) {
		struct kvmdirty_vm_run *run = &kd->batch[kd->vm_at], part = *run;

		if (part.npages > sink->budget)
			part.npages = sink->budget;
		r = t->fn(&part, t->arg);
		if (r < 0)
			return r;
		sink->budget -= part.npages;
		sink->result.nr_runs++;
		sink->result.nr_pages += part.npages;
		run->offset += part.npages;
		run->npages -= part.npages;
		if (!run->npages) {
			kd->vm_at++;
			kd->vm_left--;
		}
	}
	if (r > 0)
		sink->budget = 0;
	return !!kd->vm_left;
}

static int harvest_log(struct kvmdirty *kd, int fd, struct sink *sink, unsigned int flags)
{
	int r, more;

	r = kd->attached ? deliver_attached(kd, sink) : visit_slots(kd, sink, flags, false);
	if (r)
		return r;
	do {
		if (sink_full(sink))
			return 1;
		more = slot_ring_vm_take(kd, fd, sink->budget < BATCH_RUNS ? sink->budget :
					 BATCH_RUNS, flags);
		if (more < 0)
			return more;
		r = kd->attached ? deliver_attached(kd, sink) : deliver_logs(kd, sink);
		if (r)
			return r;
		/* Once in a harvest is enough: the rest is logged by now. */
		flags |= KVMDIRTY_HARVEST_NOSYNC;
	} while (more);
	return 0;
}

int kvmdirty_vm_harvest(struct kvmdirty *kd, kvmdirty_vm_run_fn fn, void *arg, uint64_t max_pages,
			unsigned int flags, struct kvmdirty_vm_result *result)
{
	struct target target = { .fn = fn, .arg = arg };
	struct sink sink = {
		.fn = hand_out, .arg = &target, .budget = max_pages ? max_pages : UINT64_MAX,
	};
	int fd, r;

	if (result)
		memset(result, 0, sizeof(*result));
	if (!fn || flags & ~KVMDIRTY_HARVEST_NOSYNC)
		return -EINVAL;
	r = pthread_mutex_lock(&kd->vm_lock);
	if (r)
		return -r;
	fd = slot_ring_vm_open(kd);
	if (fd == -EOPNOTSUPP)
		r = visit_slots(kd, &sink, flags, true);
	else
		r = fd < 0 ? fd : harvest_log(kd, fd, &sink, flags);
	if (r == -ENODEV && sink.result.nr_runs)
		r = 0;
	count(&kd->stats.harvests, 1);
	if (result) {
		result->nr_pages = sink.result.nr_pages;
		result->nr_runs = sink.result.nr_runs;
		pthread_mutex_lock(&kd->lock);
		if (kd->layout != kd->layout_told)
			result->flags = KVMDIRTY_VM_LAYOUT;
		kd->layout_told = kd->layout;
		pthread_mutex_unlock(&kd->lock);
	}
	pthread_mutex_unlock(&kd->vm_lock);
	return r;
}

int kvmdirty_vm_fd(struct kvmdirty *kd)
{
	return slot_ring_vm_open(kd);
}
