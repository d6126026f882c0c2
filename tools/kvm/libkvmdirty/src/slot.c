// SPDX-License-Identifier: GPL-2.0-only
/*
 * Slots: how they come to be and go, and what is known about them.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "internal.h"

void slot_free(struct kvmdirty_slot *slot)
{
	if (slot->log_fd >= 0)
		close(slot->log_fd);
	if (slot->snapshot)
		munmap(slot->snapshot, slot->snapshot_bytes);
	pageset_destroy(&slot->pending);
	pthread_mutex_destroy(&slot->pending_lock);
	pthread_mutex_destroy(&slot->harvest_lock);
	free(slot);
}

static struct kvmdirty_slot *slot_alloc(const struct backend *backend)
{
	struct kvmdirty_slot *slot = calloc(1, sizeof(*slot));

	if (!slot)
		return NULL;
	slot->backend = backend;
	slot->log_fd = -1;
	if (init_checking_mutex(&slot->harvest_lock)) {
		free(slot);
		return NULL;
	}
	if (pthread_mutex_init(&slot->pending_lock, NULL)) {
		pthread_mutex_destroy(&slot->harvest_lock);
		free(slot);
		return NULL;
	}
	return slot;
}

static int slot_init_pending(struct kvmdirty_slot *slot)
{
	int r = pageset_init(&slot->pending, slot->npages);

	if (!r)
		slot->can_probe = !madvise(slot->pending.mem, sysconf(_SC_PAGESIZE),
					   MADV_POPULATE_WRITE);
	return r;
}

static int slot_track(struct kvmdirty_slot *slot, struct kvm_userspace_memory_region *region)
{
	bool turned_on = false;
	int r;

	r = slot_init_pending(slot);
	if (r)
		return r;
	if (!(region->flags & KVM_MEM_LOG_DIRTY_PAGES)) {
		r = set_logging(slot->kd->vm_fd, region, true);
		if (r)
			return r;
		turned_on = true;
	}
	r = slot->backend->track(slot);
	if (r && turned_on)
		set_logging(slot->kd->vm_fd, region, false);
	/* Where KVM does not count logs, we do. */
	if (!r && !slot->log)
		slot->log = ++slot->kd->nr_logs;
	return r;
}

int kvmdirty_track(struct kvmdirty *kd, struct kvm_userspace_memory_region *region,
		   struct kvmdirty_slot **slotp)
{
	struct kvmdirty_slot *slot;
	int r;

	if (kd->attached)
		return -EOPNOTSUPP;
	if (!region->memory_size || region->memory_size % kd->page_size ||
	    region->memory_size / kd->page_size > UINT32_MAX)
		return -EINVAL;
	slot = slot_alloc(kd->backend);
	if (!slot)
		return -ENOMEM;
	slot->kd = kd;
	slot->id = region->slot;
	slot->npages = region->memory_size / kd->page_size;
	slot->base_gfn = region->guest_phys_addr / kd->page_size;

	/* Under the lock, so that one of two who track the same memslot fails. */
	pthread_mutex_lock(&kd->lock);
	r = slot_find(kd, slot->id) ? -EEXIST : slot_track(slot, region);
	if (!r) {
		slot->next = *bucket(kd, slot->id);
		*bucket(kd, slot->id) = slot;
		kd->layout++;
	}
	pthread_mutex_unlock(&kd->lock);
	if (r) {
		slot_free(slot);
		return r;
	}
	*slotp = slot;
	return 0;
}

int kvmdirty_attach(int log_fd, struct kvmdirty_slot **slotp)
{
	struct kvmdirty_slot *slot;
	int fd, r;

	fd = fcntl(log_fd, F_DUPFD_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	slot = slot_alloc(&backend_slot_ring);
	if (!slot) {
		close(fd);
		return -ENOMEM;
	}
	r = slot_ring_open_log(slot, fd);
	if (r)
		r = -EINVAL;	/* whatever that file made of the number */
	else
		r = slot_init_pending(slot);
	if (r) {
		slot_free(slot);
		return r;
	}
	*slotp = slot;
	return 0;
}

int kvmdirty_stop(struct kvmdirty_slot *slot, struct kvm_userspace_memory_region *region)
{
	int r = 0;

	if (!slot->kd)
		return -EOPNOTSUPP;
	r = pthread_mutex_lock(&slot->harvest_lock);
	if (r)
		return -r;
	if (!slot->stopped)
		r = slot->backend->stop(slot, region);
	else if (region && region->flags & KVM_MEM_LOG_DIRTY_PAGES)
		r = set_logging(slot->kd->vm_fd, region, false);
	if (!r)
		slot_set_stopped(slot);
	pthread_mutex_unlock(&slot->harvest_lock);
	return r;
}

/* Unlike trylock, this knows if the caller is its owner. */
static int try_harvest_lock(struct kvmdirty_slot *slot)
{
	static const struct timespec at_once;

	return pthread_mutex_timedlock(&slot->harvest_lock, &at_once);
}

int slot_lock(struct kvmdirty *kd, slot_find_fn find, uint64_t what, struct kvmdirty_slot **slot)
{
	int r;

	for (;;) {
		pthread_mutex_lock(&kd->lock);
		*slot = find(kd, what);
		r = *slot ? try_harvest_lock(*slot) : ENXIO;
		pthread_mutex_unlock(&kd->lock);
		if (r != ETIMEDOUT)
			return -r;
		poll(NULL, 0, 1);
	}
}

/* Nobody finds it any more, and nobody who found it has it still. */
static int slot_unlink(struct kvmdirty_slot *slot, bool drop)
{
	struct kvmdirty *kd = slot->kd;
	struct kvmdirty_slot **p;
	int r;

	/* As in slot_lock(). */
	for (;;) {
		pthread_mutex_lock(&kd->lock);
		r = try_harvest_lock(slot);
		if (!r)
			break;
		pthread_mutex_unlock(&kd->lock);
		poll(NULL, 0, 1);
	}
	if (!drop && !pending_is_empty(slot)) {
		r = -EBUSY;
	} else {
		for (p = bucket(kd, slot->id); *p != slot; p = &(*p)->next)
			;
		*p = slot->next;
		kd->layout++;
	}
	pthread_mutex_unlock(&slot->harvest_lock);
	pthread_mutex_unlock(&kd->lock);
	return r;
}

/* Look once more for what is left, and keep or give back what is. */
static int untrack_keep(struct kvmdirty_slot *slot)
{
	struct kvmdirty_run run;
	uint64_t pos;
	int r;

	if (slot->kd) {
		r = kvmdirty_stop(slot, NULL);
		if (r)
			return r;
		r = pthread_mutex_lock(&slot->harvest_lock);
		if (r)
			return -r;
		r = slot->backend->sweep(slot);
		pthread_mutex_unlock(&slot->harvest_lock);
		if (r < 0)
			return r;
		return pending_is_empty(slot) ? 0 : -EBUSY;
	}

	/* Attached: what was refused here is for others to harvest. */
	while ((pos = pageset_next(&slot->pending, 0)) != UINT64_MAX) {
		run.offset = pos;
		run.npages = pageset_run(&slot->pending, pos, UINT32_MAX);
		if (slot_ring_mark(slot, &run, 1))
			return -EBUSY;
		pageset_del(&slot->pending, run.offset, run.npages);
	}
	return 0;
}

int kvmdirty_untrack(struct kvmdirty_slot *slot, unsigned int flags)
{
	int r;

	if (!slot)
		return 0;
	if (flags & ~KVMDIRTY_UNTRACK_DROP)
		return -EINVAL;
	/* The harvest whose callback calls this goes on with the slot, whatever the flags. */
	r = pthread_mutex_lock(&slot->harvest_lock);
	if (r)
		return -r;
	pthread_mutex_unlock(&slot->harvest_lock);
	r = untrack_keep(slot);
	if (r && !(flags & KVMDIRTY_UNTRACK_DROP))
		return r;
	if (slot->kd) {
		r = slot_unlink(slot, flags & KVMDIRTY_UNTRACK_DROP);
		if (r)
			return r;
	}
	slot_free(slot);
	return 0;
}

int kvmdirty_fd(const struct kvmdirty_slot *slot)
{
	return slot->log_fd >= 0 ? slot->log_fd : -EOPNOTSUPP;
}

int kvmdirty_info(struct kvmdirty_slot *slot, struct kvmdirty_info *info, size_t size)
{
	struct kvmdirty_info all = {
		.backend = slot->backend->id,
		.slot = slot->id,
		.npages = slot->npages,
		.base_gfn = slot->base_gfn,
		.flags = slot->kd ? 0 : KVMDIRTY_INFO_ATTACHED,
		.log = slot->log,
	};
	bool stopped;
	int r;

	pthread_mutex_lock(&slot->pending_lock);
	stopped = slot->stopped;
	pthread_mutex_unlock(&slot->pending_lock);
	if (slot->log_fd >= 0) {
		struct kvm_dirty_slot_log_info kinfo;

		r = slot_ring_info(slot, &kinfo);
		if (r)
			return r;
		all.base_gfn = kinfo.base_gfn;
		all.ring_entries = kinfo.entries;
		all.nr_rings = kinfo.nr_rings;
		stopped = stopped || kinfo.flags & KVM_DIRTY_SLOT_LOG_DEAD;
	} else if (slot->backend->id == KVMDIRTY_RING) {
		pthread_mutex_lock(&slot->kd->lock);
		all.ring_entries = slot->kd->ring_entries;
		all.nr_rings = slot->kd->nr_vcpus;
		pthread_mutex_unlock(&slot->kd->lock);
	}
	if (stopped)
		all.flags |= KVMDIRTY_INFO_STOPPED;
	copy_out(info, size, &all, sizeof(all));
	return 0;
}

void kvmdirty_stats(struct kvmdirty_slot *slot, struct kvmdirty_stats *stats, size_t size)
{
	copy_out(stats, size, &slot->stats, sizeof(slot->stats));
}

/* --- Mark and discard ------------------------------------------------------- */

static int check_runs(const struct kvmdirty_slot *slot, const struct kvmdirty_run *runs, size_t nr,
		      uint64_t *npages)
{
	size_t i;

	*npages = 0;
	for (i = 0; i < nr; i++) {
		if (!runs[i].npages ||
		    (uint64_t)runs[i].offset + runs[i].npages > slot->npages)
			return -EINVAL;
		*npages += runs[i].npages;
	}
	return 0;
}

int kvmdirty_mark(struct kvmdirty_slot *slot, const struct kvmdirty_run *runs, size_t nr_runs)
{
	uint64_t npages;
	size_t i;
	int r;

	r = check_runs(slot, runs, nr_runs, &npages);
	if (r)
		return r;
	if (slot->log_fd >= 0) {
		r = nr_runs ? slot_ring_mark(slot, runs, nr_runs) : 0;
	} else {
		pthread_mutex_lock(&slot->pending_lock);
		if (slot->stopped)
			r = -ENODEV;
		for (i = 0; i < nr_runs && !r; i++)
			pageset_add(&slot->pending, runs[i].offset, runs[i].npages);
		pthread_mutex_unlock(&slot->pending_lock);
	}
	if (!r)
		count(&slot->stats.marked_pages, npages);
	return r;
}

int kvmdirty_discard(struct kvmdirty_slot *slot, const struct kvmdirty_run *runs, size_t nr_runs)
{
	uint64_t npages;
	size_t i;
	int r;

	r = check_runs(slot, runs, nr_runs, &npages);
	if (r || !nr_runs)
		return r;
	r = pthread_mutex_lock(&slot->harvest_lock);
	if (r)
		return -r;
	if (slot->stopped && slot->log_fd < 0)
		r = -ENODEV;
	else
		r = slot->backend->discard(slot, runs, nr_runs);
	if (!r) {
		pthread_mutex_lock(&slot->pending_lock);
		for (i = 0; i < nr_runs; i++)
			pageset_del(&slot->pending, runs[i].offset, runs[i].npages);
		pthread_mutex_unlock(&slot->pending_lock);
		count(&slot->stats.discarded_pages, npages);
	}
	pthread_mutex_unlock(&slot->harvest_lock);
	return r;
}
