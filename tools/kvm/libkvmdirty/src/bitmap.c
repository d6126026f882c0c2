// SPDX-License-Identifier: GPL-2.0-only
/*
 * Back end: the dirty bitmap.
 *
 * With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_GET_DIRTY_LOG only shows the bits and
 * KVM_CLEAR_DIRTY_LOG re-arms some of them: a sweep takes one snapshot and re-arms
 * it bit by bit, as it is handed out.  Without it, KVM_GET_DIRTY_LOG re-arms
 * everything at once, and the pages wait in slot->pending.
 */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include "internal.h"

/*
 * How many dirty pages are enough for one KVM_CLEAR_DIRTY_LOG: it holds KVM's
 * slots_lock, and what it re-arms has to wait here if the caller wants less.
 */
#define ARM_PAGES	512

static int bitmap_open(struct kvmdirty *kd, const struct kvmdirty_options *options,
		       const char **reason)
{
	int offered, r;

	/* Works only if the ring is enabled, and then there is no bitmap. */
	if (do_ioctl(kd->vm_fd, KVM_RESET_DIRTY_RINGS, NULL) >= 0) {
		*reason = "this VM has no dirty bitmap: the dirty ring is enabled";
		return -EBUSY;
	}
	offered = check_extension(kd->vm_fd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2);
	if (offered < 0)
		return offered;
	if (!(offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE))
		return 0;

	kd->manual = !(options->flags & KVMDIRTY_OPEN_NO_MANUAL);
	/* Also to disable it: whoever enabled it before, we must know what GET does. */
	r = enable_cap(kd->vm_fd, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		       kd->manual ? KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE : 0);
	if (r)
		*reason = "KVM refused to set KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";
	return r;
}

static uint64_t nr_words(const struct kvmdirty_slot *slot)
{
	return (slot->npages + 63) / 64;
}

static int get_log(struct kvmdirty_slot *slot)
{
	struct kvm_dirty_log log = { .slot = slot->id, .dirty_bitmap = slot->snapshot };

	return slot_ioctl(slot, slot->kd->vm_fd, KVM_GET_DIRTY_LOG, &log);
}

static void pending_add_snapshot(struct kvmdirty_slot *slot, uint64_t from, uint64_t to)
{
	uint64_t i;

	pthread_mutex_lock(&slot->pending_lock);
	for (i = from; i < to; i++)
		pageset_add_word(&slot->pending, i, slot->snapshot[i]);
	pthread_mutex_unlock(&slot->pending_lock);
}

static int bitmap_track(struct kvmdirty_slot *slot)
{
	size_t page = slot->kd->page_size, bytes = nr_words(slot) * sizeof(uint64_t);
	char *p;
	int r;

	/*
	 * KVM writes as much as *it* thinks that the memslot has.  If that is more
	 * than the VMM said, it shall meet the guard page and give EFAULT.
	 */
	bytes = (bytes + page - 1) / page * page;
	slot->snapshot_bytes = bytes + page;
	p = mmap(NULL, slot->snapshot_bytes, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		return -ENOMEM;
	slot->snapshot = (uint64_t *)p;
	if (mprotect(p + bytes, page, PROT_NONE))
		return -errno;

	r = get_log(slot);
	if (r)
		return r == -EFAULT ? -EINVAL : r;
	if (!slot->kd->manual)
		pending_add_snapshot(slot, 0, nr_words(slot));
	return 0;
}

static int bitmap_sweep(struct kvmdirty_slot *slot)
{
	int r = 0;

	if (!slot->stopped)
		r = get_log(slot);
	if (r == -ENOENT)
		slot_set_stopped(slot);	/* by the VMM, without kvmdirty_stop() */
	else if (r)
		return r;
	if (slot->stopped || !slot->kd->manual) {
		if (!slot->stopped)
			pending_add_snapshot(slot, 0, nr_words(slot));
		slot->armed = slot->npages;
	} else {
		slot->armed = 0;
	}
	return 0;
}

static int bitmap_arm(struct kvmdirty_slot *slot)
{
	struct kvm_clear_dirty_log clear = { .slot = slot->id };
	uint64_t first = slot->armed / 64, end = nr_words(slot), last, n = 0;
	int r;

	while (first < end && !slot->snapshot[first])
		first++;
	if (first == end) {
		slot->armed = slot->npages;
		return 0;
	}
	for (last = first; last < end && n < ARM_PAGES; last++)
		n += __builtin_popcountll(slot->snapshot[last]);

	clear.first_page = first * 64;
	clear.num_pages = (last == end ? slot->npages : last * 64) - clear.first_page;
	clear.dirty_bitmap = &slot->snapshot[first];
	r = slot_ioctl(slot, slot->kd->vm_fd, KVM_CLEAR_DIRTY_LOG, &clear);
	if (r == -ENOENT) {
		/* Nobody logs any more: nothing to re-arm, but these were written. */
		slot_set_stopped(slot);
		last = end;
	} else if (r) {
		return r;
	}
	pending_add_snapshot(slot, first, last);
	slot->armed = last == end ? slot->npages : last * 64;
	return 0;
}

/* Re-arm one run, and keep the sweep that is under way from handing it out. */
static int clear_run(struct kvmdirty_slot *slot, uint64_t offset, uint64_t npages)
{
	uint64_t bits[256];
	uint64_t end = offset + npages;

	while (offset < end) {
		uint64_t first = offset / 64 * 64, i;
		uint64_t limit = first + sizeof(bits) * 8;
		struct kvm_clear_dirty_log clear = {
			.slot = slot->id, .first_page = first, .dirty_bitmap = bits,
		};
		int r;

		if (limit > end)
			limit = end;
		memset(bits, 0, sizeof(bits));
		for (i = offset; i < limit; i++)
			bits[(i - first) / 64] |= 1ULL << (i % 64);
		clear.num_pages = (limit - first + 63) / 64 * 64;
		if (first + clear.num_pages > slot->npages)
			clear.num_pages = slot->npages - first;
		r = slot_ioctl(slot, slot->kd->vm_fd, KVM_CLEAR_DIRTY_LOG, &clear);
		if (r)
			return r == -ENOENT ? -ENODEV : r;
		for (i = 0; i < (limit - first + 63) / 64; i++)
			slot->snapshot[first / 64 + i] &= ~bits[i];
		offset = limit;
	}
	return 0;
}

static int bitmap_discard(struct kvmdirty_slot *slot, const struct kvmdirty_run *runs, size_t nr)
{
	size_t i;
	int r = 0;

	if (!slot->kd->manual) {
		r = get_log(slot);
		if (!r)
			pending_add_snapshot(slot, 0, nr_words(slot));
		return r == -ENOENT ? -ENODEV : r;
	}
	for (i = 0; i < nr && !r; i++)
		r = clear_run(slot, runs[i].offset, runs[i].npages);
	return r;
}

static int bitmap_stop(struct kvmdirty_slot *slot, struct kvm_userspace_memory_region *region)
{
	int r;

	r = get_log(slot);
	if (r && r != -ENOENT)
		return r;
	/* A snapshot of its own replaces the one of a sweep that is under way. */
	slot->sweeping = false;
	if (!r && !slot->kd->manual)
		pending_add_snapshot(slot, 0, nr_words(slot));
	if (region) {
		int failed = set_logging(slot->kd->vm_fd, region, false);

		/* These pages are not re-armed: leave them to KVM's log. */
		if (failed)
			return failed;
	}
	/* When nobody logs, nothing has to be re-armed. */
	if (!r && slot->kd->manual)
		pending_add_snapshot(slot, 0, nr_words(slot));
	return 0;
}

const struct backend backend_bitmap = {
	.id = KVMDIRTY_BITMAP,
	.name = "bitmap",
	.open = bitmap_open,
	.track = bitmap_track,
	.sweep = bitmap_sweep,
	.arm = bitmap_arm,
	.discard = bitmap_discard,
	.stop = bitmap_stop,
};
