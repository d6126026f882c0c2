// SPDX-License-Identifier: GPL-2.0-only
/*
 * Back end: the dirty ring.  Each vCPU has one ring for all memslots, and one
 * ioctl re-arms what was collected from all of them.  So pages go through
 * kd->held: collected, but not to be shown to anybody before the reset.
 *
 * Barriers: our load-acquire of an entry's flags pairs with the kernel's smp_wmb()
 * before it sets KVM_DIRTY_GFN_F_DIRTY; our store-release of
 * KVM_DIRTY_GFN_F_RESET, after the entry was read, pairs with its load-acquire.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include "internal.h"

#define DEFAULT_ENTRIES	4096
/* Above what any architecture reserves in a ring, so that EINVAL means other things. */
#define SURELY_ENOUGH	1024

static int ring_open(struct kvmdirty *kd, const struct kvmdirty_options *options,
		     const char **reason)
{
	uint32_t entries = options->ring_entries ? options->ring_entries : DEFAULT_ENTRIES;
	unsigned int cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
	int max, r;

	max = check_extension(kd->vm_fd, cap);
	if (max <= 0) {
		cap = KVM_CAP_DIRTY_LOG_RING;
		max = check_extension(kd->vm_fd, cap);
	}
	if (max <= 0) {
		*reason = "this kernel has no dirty ring (KVM_CAP_DIRTY_LOG_RING)";
		return max ? max : -EOPNOTSUPP;
	}
	max /= sizeof(struct kvm_dirty_gfn);
	if (!options->ring_entries && entries > (unsigned int)max)
		entries = max;
	if (entries > (unsigned int)max) {
		*reason = "ring_entries is more than this kernel's dirty ring may have";
		return -EINVAL;
	}

	r = enable_cap(kd->vm_fd, cap, (uint64_t)entries * sizeof(struct kvm_dirty_gfn));
	if (r == -EINVAL && do_ioctl(kd->vm_fd, KVM_RESET_DIRTY_RINGS, NULL) >= 0) {
		*reason = "the dirty ring of this VM is enabled already";
		return -EBUSY;
	}
	if (r == -EINVAL && entries >= SURELY_ENOUGH)
		r = -EBUSY;
	if (r == -EBUSY)
		*reason = "too late for the dirty ring: a vCPU exists, or slot rings are enabled";
	else if (r == -EINVAL)
		*reason = "ring_entries is too small for the dirty ring, or a vCPU exists already";
	else if (r)
		*reason = "KVM refused to enable the dirty ring";
	if (!r)
		kd->ring_entries = entries;
	return r;
}

static int ring_add_vcpu(struct kvmdirty *kd, struct vcpu *vcpu)
{
	struct ring_page *held;
	void *ring;

	/* Room for all that all rings can hold: to collect must not fail. */
	held = reallocarray(kd->held, (kd->nr_vcpus + 1) * kd->ring_entries, sizeof(*held));
	if (!held)
		return -ENOMEM;
	kd->held = held;

	ring = mmap(NULL, kd->ring_entries * sizeof(struct kvm_dirty_gfn), PROT_READ | PROT_WRITE,
		    MAP_SHARED, vcpu->fd, RING_PAGE_OFFSET * kd->page_size);
	if (ring == MAP_FAILED)
		return -errno;
	vcpu->ring = ring;
	return 0;
}

static void collect_vcpu(struct kvmdirty *kd, struct vcpu *vcpu)
{
	uint32_t i;

	/* Not more than once around: the vCPU may write as fast as we read. */
	for (i = 0; i < kd->ring_entries; i++) {
		struct kvm_dirty_gfn *gfn = &vcpu->ring[vcpu->next & (kd->ring_entries - 1)];

		/* RESET: it was collected, and the kernel has not taken it back yet. */
		if (__atomic_load_n(&gfn->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
			break;
		kd->held[kd->nr_held].slot = gfn->slot;
		kd->held[kd->nr_held].offset = gfn->offset;
		kd->nr_held++;
		__atomic_store_n(&gfn->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		vcpu->next++;
	}
	/*
	 * KVM keeps some entries in reserve and makes the vCPU exit before they
	 * are used up.  One that did not may have gone round and overwritten some.
	 */
	if (i == kd->ring_entries)
		kd->overrun = true;
}

/* Has the kernel taken back all that was collected?  It goes from old to new. */
static bool all_reset(const struct kvmdirty *kd)
{
	size_t i;

	for (i = 0; i < kd->nr_vcpus; i++) {
		const struct vcpu *vcpu = &kd->vcpus[i];
		const struct kvm_dirty_gfn *last;

		last = &vcpu->ring[(vcpu->next - 1) & (kd->ring_entries - 1)];
		if (vcpu->next &&
		    (__atomic_load_n(&last->flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_RESET))
			return false;
	}
	return true;
}

/* What is re-armed may be handed out. */
static void release_held(struct kvmdirty *kd)
{
	struct kvmdirty_slot *slot = NULL;
	uint32_t id = 0;
	size_t i;

	for (i = 0; i < kd->nr_held; i++) {
		const struct ring_page *page = &kd->held[i];

		if (!i || page->slot != id) {
			if (slot)
				pthread_mutex_unlock(&slot->pending_lock);
			id = page->slot;
			slot = slot_find(kd, id);
			if (slot)
				pthread_mutex_lock(&slot->pending_lock);
		}
		if (slot && page->offset < slot->npages)
			pageset_add(&slot->pending, page->offset, 1);
		else
			count(&kd->stats.stray, 1);
	}
	if (slot)
		pthread_mutex_unlock(&slot->pending_lock);
	count(&kd->stats.collected, kd->nr_held);
	kd->nr_held = 0;
}

/* Re-arm what is held, and only then put it where harvests look. */
static int reset_held(struct kvmdirty *kd)
{
	int r;

	if (!kd->nr_held)
		return 0;
	/* Newer kernels stop half way for a signal. */
	do {
		r = do_ioctl(kd->vm_fd, KVM_RESET_DIRTY_RINGS, NULL);
		if (r < 0)
			return r;
	} while (!all_reset(kd) && r > 0);
	if (!all_reset(kd))
		return -EINTR;
	count(&kd->stats.collects, 1);
	release_held(kd);
	return 0;
}

static int collect(struct kvmdirty *kd)
{
	size_t i;
	int r;

	/* What a signal left first: there is room for the rings' contents once. */
	r = reset_held(kd);
	if (r)
		return r;
	for (i = 0; i < kd->nr_vcpus; i++)
		collect_vcpu(kd, &kd->vcpus[i]);
	r = reset_held(kd);
	return r ? r : kd->overrun ? -EOVERFLOW : 0;
}

static int ring_full(struct kvmdirty *kd, const struct kvm_run *run)
{
	int r;

	if (run->exit_reason != KVM_EXIT_DIRTY_RING_FULL)
		return 0;
	pthread_mutex_lock(&kd->lock);
	r = collect(kd);
	pthread_mutex_unlock(&kd->lock);
	return r ? r : 1;
}

static int ring_track(struct kvmdirty_slot *slot)
{
	(void)slot;
	return 0;
}

static int ring_sweep(struct kvmdirty_slot *slot)
{
	int r;

	pthread_mutex_lock(&slot->kd->lock);
	r = collect(slot->kd);
	pthread_mutex_unlock(&slot->kd->lock);
	return r;
}

static int ring_discard(struct kvmdirty_slot *slot, const struct kvmdirty_run *runs, size_t nr)
{
	/* Collecting re-arms them; the caller then takes them out of what is pending. */
	(void)runs;
	(void)nr;
	return ring_sweep(slot);
}

static int ring_stop(struct kvmdirty_slot *slot, struct kvm_userspace_memory_region *region)
{
	int r;

	/* In this order nothing is lost: the rings keep what the memslot logged. */
	r = region ? set_logging(slot->kd->vm_fd, region, false) : 0;
	return r ? r : ring_sweep(slot);
}

const struct backend backend_ring = {
	.id = KVMDIRTY_RING,
	.name = "ring",
	.open = ring_open,
	.add_vcpu = ring_add_vcpu,
	.full = ring_full,
	.track = ring_track,
	.sweep = ring_sweep,
	.discard = ring_discard,
	.stop = ring_stop,
};
