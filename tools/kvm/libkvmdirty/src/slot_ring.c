// SPDX-License-Identifier: GPL-2.0-only
/*
 * Back end: dirty slot rings.  The kernel does it all; HARVEST stores straight
 * into the caller's array.  See Documentation/virt/kvm/dirty-slot-ring.rst.
 */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include "internal.h"

static_assert(sizeof(struct kvmdirty_run) == sizeof(struct kvm_dirty_run) &&
	      offsetof(struct kvmdirty_run, npages) == offsetof(struct kvm_dirty_run, npages),
	      "the kernel stores into the caller's array");
static_assert(sizeof(struct kvmdirty_vm_run) == sizeof(struct kvm_dirty_vm_run) &&
	      offsetof(struct kvmdirty_vm_run, log) == offsetof(struct kvm_dirty_vm_run, log) &&
	      offsetof(struct kvmdirty_vm_run, offset) ==
	      offsetof(struct kvm_dirty_vm_run, offset) &&
	      offsetof(struct kvmdirty_vm_run, npages) == offsetof(struct kvm_dirty_vm_run, npages),
	      "and into ours");

static int slot_ring_open(struct kvmdirty *kd, const struct kvmdirty_options *options,
			  const char **reason)
{
	/* ENXIO if slot rings are not enabled, EINVAL for the flags if they are. */
	struct kvm_dirty_slot_log_fd enabled = { .flags = ~0U };
	int max, r;

	max = check_extension(kd->vm_fd, KVM_CAP_DIRTY_SLOT_RING);
	if (max <= 0) {
		*reason = "this kernel has no dirty slot rings (KVM_CAP_DIRTY_SLOT_RING)";
		return max ? max : -EOPNOTSUPP;
	}
	if (options->ring_entries > (unsigned int)max) {
		*reason = "ring_entries is more than this kernel's slot rings may have";
		return -EINVAL;
	}
	r = enable_cap(kd->vm_fd, KVM_CAP_DIRTY_SLOT_RING, options->ring_entries);
	if (r == -EBUSY && do_ioctl(kd->vm_fd, KVM_GET_DIRTY_SLOT_LOG_FD, &enabled) == -EINVAL)
		return 0;
	if (r == -EBUSY)
		*reason = "too late for slot rings: a memslot logs, or the dirty ring is enabled";
	else if (r)
		*reason = "KVM refused to enable slot rings";
	return r;
}

int slot_ring_info(struct kvmdirty_slot *slot, struct kvm_dirty_slot_log_info *info)
{
	memset(info, 0, sizeof(*info));
	return slot_ioctl(slot, slot->log_fd, KVM_DIRTY_SLOT_LOG_INFO, info);
}

int slot_ring_open_log(struct kvmdirty_slot *slot, int log_fd)
{
	struct kvm_dirty_slot_log_info info;
	int r;

	slot->log_fd = log_fd;
	r = slot_ring_info(slot, &info);
	if (r)
		return r;
	slot->id = info.slot;
	slot->npages = info.npages;
	slot->base_gfn = info.base_gfn;
	slot->log = info.log;
	return 0;
}

static int slot_ring_track(struct kvmdirty_slot *slot)
{
	struct kvm_dirty_slot_log_fd args = { .slot = slot->id };
	uint64_t npages = slot->npages;
	int fd, r;

	fd = slot_ioctl(slot, slot->kd->vm_fd, KVM_GET_DIRTY_SLOT_LOG_FD, &args);
	if (fd < 0)
		return fd;
	r = slot_ring_open_log(slot, fd);
	if (r)
		return r;
	return slot->npages == npages ? 0 : -EINVAL;
}

int slot_ring_take(struct kvmdirty_slot *slot, struct kvmdirty_run *runs, size_t nr,
		   unsigned int flags, struct kvmdirty_result *result)
{
	struct kvm_dirty_slot_runs h = {
		.runs = (uintptr_t)runs,
		.nr_runs = nr < UINT32_MAX ? nr : UINT32_MAX,
		.flags = flags & KVMDIRTY_HARVEST_NOSYNC ? 0 : KVM_DIRTY_HARVEST_SYNC,
	};
	int r;

	r = slot_ioctl(slot, slot->log_fd, KVM_DIRTY_SLOT_LOG_HARVEST, &h);
	if (r < 0)
		return r;
	result->nr_runs = h.nr_runs;
	result->nr_pages = h.nr_pages;
	return !!(h.flags & KVM_DIRTY_HARVEST_MORE);
}

int slot_ring_vm_open(struct kvmdirty *kd)
{
	struct kvm_dirty_slot_log_fd args = { .slot = KVM_DIRTY_SLOT_ALL };
	int r = 0;

	pthread_mutex_lock(&kd->lock);
	if (kd->log_fd < 0 && !kd->no_vm_log) {
		r = kd->backend->id == KVMDIRTY_SLOT_RING ?
		    do_ioctl(kd->vm_fd, KVM_GET_DIRTY_SLOT_LOG_FD, &args) : -EINVAL;
		/* For kernels without, it is the number of a slot that cannot be. */
		kd->no_vm_log = r == -EINVAL;
		if (r >= 0)
			kd->log_fd = r;
	}
	if (r >= 0 || r == -EINVAL)
		r = kd->log_fd >= 0 ? kd->log_fd : -EOPNOTSUPP;
	pthread_mutex_unlock(&kd->lock);
	return r;
}

int slot_ring_vm_take(struct kvmdirty *kd, int fd, size_t nr, unsigned int flags)
{
	struct kvm_dirty_vm_harvest h = {
		.runs = (uintptr_t)kd->batch,
		.nr_runs = nr < BATCH_RUNS ? nr : BATCH_RUNS,
		.flags = flags & KVMDIRTY_HARVEST_NOSYNC ? 0 : KVM_DIRTY_HARVEST_SYNC,
	};
	int r;

	count(&kd->stats.ioctls, 1);
	r = do_ioctl(fd, KVM_DIRTY_VM_LOG_HARVEST, &h);
	if (r < 0)
		return r;
	kd->vm_at = 0;
	kd->vm_left = h.nr_runs;
	/* We know better what is tracked. */
	if (kd->attached && h.flags & KVM_DIRTY_HARVEST_LAYOUT)
		kd->layout++;
	return !!(h.flags & KVM_DIRTY_HARVEST_MORE);
}

static int apply(struct kvmdirty_slot *slot, unsigned long request,
		 const struct kvmdirty_run *runs, size_t nr)
{
	int r = 0;

	while (nr && !r) {
		uint32_t n = nr < UINT32_MAX ? nr : UINT32_MAX;
		struct kvm_dirty_slot_runs args = { .runs = (uintptr_t)runs, .nr_runs = n };

		r = slot_ioctl(slot, slot->log_fd, request, &args);
		runs += n;
		nr -= n;
	}
	return r;
}

int slot_ring_mark(struct kvmdirty_slot *slot, const struct kvmdirty_run *runs, size_t nr)
{
	int r;

	/* The handler has run by now, and marking twice is harmless. */
	do {
		r = apply(slot, KVM_DIRTY_SLOT_LOG_MARK, runs, nr);
	} while (r == -EINTR);
	return r;
}

static int slot_ring_discard(struct kvmdirty_slot *slot, const struct kvmdirty_run *runs, size_t nr)
{
	return apply(slot, KVM_DIRTY_SLOT_LOG_DISCARD, runs, nr);
}

/* Bring some of what is logged here: what a full ring needs, or who wants to know. */
static int slot_ring_sweep(struct kvmdirty_slot *slot)
{
	struct kvmdirty_result result;
	int r;

	r = slot_ring_take(slot, slot->batch, BATCH_RUNS, 0, &result);
	if (r < 0)
		return r == -ENODEV ? 0 : r;
	pending_add_runs(slot, slot->batch, result.nr_runs);
	return r;
}

static struct kvmdirty_slot *find_by_id(struct kvmdirty *kd, uint64_t id)
{
	return slot_find(kd, id);
}

static int slot_ring_full(struct kvmdirty *kd, const struct kvm_run *run)
{
	struct kvm_dirty_slot_ring_exit details;
	struct kvmdirty_slot *slot;
	int r;

	if (run->exit_reason != KVM_EXIT_DIRTY_SLOT_RING_FULL)
		return 0;
	memcpy(&details, &run->hw, sizeof(details));

	r = slot_lock(kd, find_by_id, details.slot, &slot);
	if (r)
		return r;
	do {
		r = slot_ring_sweep(slot);
	} while (r > 0);
	pthread_mutex_unlock(&slot->harvest_lock);
	return r ? r : 1;
}

static int slot_ring_stop(struct kvmdirty_slot *slot, struct kvm_userspace_memory_region *region)
{
	/* The kernel keeps what is logged until it is harvested. */
	return region ? set_logging(slot->kd->vm_fd, region, false) : 0;
}

const struct backend backend_slot_ring = {
	.id = KVMDIRTY_SLOT_RING,
	.name = "slot-ring",
	.open = slot_ring_open,
	.full = slot_ring_full,
	.track = slot_ring_track,
	.sweep = slot_ring_sweep,
	.discard = slot_ring_discard,
	.stop = slot_ring_stop,
};
