// SPDX-License-Identifier: GPL-2.0-only
/*
 * libkvmdirty: what does not depend on the back end.  The functions are described
 * in kvmdirty.h, how they work together in internal.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include "internal.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define STRINGIFY_(x)	#x
#define STRINGIFY(x)	STRINGIFY_(x)

static const struct backend *const backends[] = {
	&backend_slot_ring, &backend_ring, &backend_bitmap,	/* the best first */
};

/* --- Small things ----------------------------------------------------------- */

int do_ioctl(int fd, unsigned long request, void *arg)
{
	int r = ioctl(fd, request, arg);

	return r < 0 ? -errno : r;
}

int slot_ioctl(struct kvmdirty_slot *slot, int fd, unsigned long request, void *arg)
{
	count(&slot->stats.ioctls, 1);
	return do_ioctl(fd, request, arg);
}

int check_extension(int fd, unsigned int cap)
{
	return do_ioctl(fd, KVM_CHECK_EXTENSION, (void *)(uintptr_t)cap);
}

int enable_cap(int vm_fd, unsigned int cap, uint64_t arg)
{
	struct kvm_enable_cap args = { .cap = cap, .args = { arg } };

	return do_ioctl(vm_fd, KVM_ENABLE_CAP, &args);
}

int set_logging(int vm_fd, struct kvm_userspace_memory_region *region, bool on)
{
	struct kvm_userspace_memory_region wanted = *region;
	int r;

	wanted.flags &= ~KVM_MEM_LOG_DIRTY_PAGES;
	if (on)
		wanted.flags |= KVM_MEM_LOG_DIRTY_PAGES;
	r = do_ioctl(vm_fd, KVM_SET_USER_MEMORY_REGION, &wanted);
	if (!r)
		region->flags = wanted.flags;
	return r;
}

static struct kvmdirty_slot **bucket(struct kvmdirty *kd, uint32_t id)
{
	return &kd->slots[(id ^ id >> 16) % NR_BUCKETS];
}

struct kvmdirty_slot *slot_find(struct kvmdirty *kd, uint32_t id)
{
	struct kvmdirty_slot *slot;

	for (slot = *bucket(kd, id); slot; slot = slot->next) {
		if (slot->id == id)
			return slot;
	}
	return NULL;
}

void pending_add_runs(struct kvmdirty_slot *slot, const struct kvmdirty_run *runs, size_t nr)
{
	size_t i;

	pthread_mutex_lock(&slot->pending_lock);
	for (i = 0; i < nr; i++)
		pageset_add(&slot->pending, runs[i].offset, runs[i].npages);
	pthread_mutex_unlock(&slot->pending_lock);
}

void slot_set_stopped(struct kvmdirty_slot *slot)
{
	/* kvmdirty_mark() looks at it under this lock. */
	pthread_mutex_lock(&slot->pending_lock);
	slot->stopped = true;
	pthread_mutex_unlock(&slot->pending_lock);
}

static bool pending_is_empty(struct kvmdirty_slot *slot)
{
	bool empty;

	pthread_mutex_lock(&slot->pending_lock);
	empty = pageset_empty(&slot->pending);
	pthread_mutex_unlock(&slot->pending_lock);
	return empty;
}

/* An error-checking mutex: a callback that calls back in gets -EDEADLK, not a hang. */
static int init_checking_mutex(pthread_mutex_t *mutex)
{
	pthread_mutexattr_t attr;
	int r;

	r = pthread_mutexattr_init(&attr);
	if (r)
		return -r;
	pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ERRORCHECK);
	r = pthread_mutex_init(mutex, &attr);
	pthread_mutexattr_destroy(&attr);
	return -r;
}

static void copy_out(void *to, size_t size, const void *from, size_t known)
{
	memset(to, 0, size);
	memcpy(to, from, size < known ? size : known);
}

const char *kvmdirty_version(void)
{
	return STRINGIFY(KVMDIRTY_VERSION_MAJOR) "." STRINGIFY(KVMDIRTY_VERSION_MINOR);
}

const char *kvmdirty_backend_name(unsigned int backend)
{
	size_t i;

	for (i = 0; i < ARRAY_SIZE(backends); i++) {
		if (backends[i]->id == backend)
			return backends[i]->name;
	}
	return backend == KVMDIRTY_AUTO ? "auto" : "unknown";
}

/* --- The VM ----------------------------------------------------------------- */

int kvmdirty_probe(int fd)
{
	int r, mask = 1 << KVMDIRTY_BITMAP;

	r = check_extension(fd, KVM_CAP_DIRTY_SLOT_RING);
	if (r < 0)
		return r;
	if (r > 0)
		mask |= 1 << KVMDIRTY_SLOT_RING;
	if (check_extension(fd, KVM_CAP_DIRTY_LOG_RING) > 0 ||
	    check_extension(fd, KVM_CAP_DIRTY_LOG_RING_ACQ_REL) > 0)
		mask |= 1 << KVMDIRTY_RING;
	return mask;
}

static int check_options(const struct kvmdirty_options *options, const char **reason)
{
	if (options->backend > KVMDIRTY_BITMAP) {
		*reason = "no such back end";
		return -EINVAL;
	}
	if (options->flags & ~(KVMDIRTY_OPEN_NO_EXITS | KVMDIRTY_OPEN_NO_MANUAL)) {
		*reason = "unknown flag";
		return -EINVAL;
	}
	if (options->flags & KVMDIRTY_OPEN_NO_EXITS && options->backend == KVMDIRTY_RING) {
		*reason = "the dirty ring makes vCPUs exit, which KVMDIRTY_OPEN_NO_EXITS rules out";
		return -EINVAL;
	}
	if (options->ring_entries & (options->ring_entries - 1)) {
		*reason = "ring_entries is not a power of two";
		return -EINVAL;
	}
	return 0;
}

static int open_backend(struct kvmdirty *kd, const struct kvmdirty_options *options,
			const char **reason)
{
	size_t i;
	int r = -EOPNOTSUPP;

	for (i = 0; i < ARRAY_SIZE(backends); i++) {
		const struct backend *backend = backends[i];

		if (options->backend != KVMDIRTY_AUTO && options->backend != backend->id)
			continue;
		if (options->flags & KVMDIRTY_OPEN_NO_EXITS && backend->id == KVMDIRTY_RING)
			continue;
		r = backend->open(kd, options, reason);
		if (!r) {
			kd->backend = backend;
			*reason = NULL;
		}
		/* What is missing or too late is no reason not to try the next. */
		if (!r || (r != -EOPNOTSUPP && r != -EBUSY))
			break;
	}
	return r;
}

int kvmdirty_open(int vm_fd, struct kvmdirty_options *options, struct kvmdirty **kdp)
{
	struct kvmdirty_options defaults = { .size = sizeof(defaults) };
	struct kvmdirty *kd = NULL;
	int r;

	if (!options)
		options = &defaults;
	if (options->size != sizeof(*options))
		return -EINVAL;
	options->reason = NULL;
	r = check_options(options, &options->reason);
	if (r)
		return r;

	/* A VM and /dev/kvm answer much alike; only the latter tells this. */
	r = check_extension(vm_fd, KVM_CAP_USER_MEMORY);
	if (r < 0 || do_ioctl(vm_fd, KVM_GET_API_VERSION, NULL) >= 0) {
		options->reason = "the file descriptor is not a VM of KVM";
		return r < 0 ? r : -ENOTTY;
	}

	kd = calloc(1, sizeof(*kd));
	if (!kd)
		return -ENOMEM;
	kd->vm_fd = vm_fd;
	kd->page_size = sysconf(_SC_PAGESIZE);
	r = pthread_mutex_init(&kd->lock, NULL);
	if (r) {
		free(kd);
		return -r;
	}
	r = open_backend(kd, options, &options->reason);
	if (r) {
		kvmdirty_close(kd);
		return r;
	}
	*kdp = kd;
	return 0;
}

static void slot_free(struct kvmdirty_slot *slot)
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

void kvmdirty_close(struct kvmdirty *kd)
{
	size_t i;

	if (!kd)
		return;
	for (i = 0; i < NR_BUCKETS; i++) {
		while (kd->slots[i]) {
			struct kvmdirty_slot *slot = kd->slots[i];

			kd->slots[i] = slot->next;
			slot_free(slot);
		}
	}
	for (i = 0; i < kd->nr_vcpus; i++) {
		if (kd->vcpus[i].ring)
			munmap(kd->vcpus[i].ring, kd->ring_entries * sizeof(struct kvm_dirty_gfn));
	}
	free(kd->held);
	free(kd->vcpus);
	pthread_mutex_destroy(&kd->lock);
	free(kd);
}

enum kvmdirty_backend kvmdirty_backend(const struct kvmdirty *kd)
{
	return kd->backend->id;
}

static bool knows_vcpu(const struct kvmdirty *kd, int vcpu_fd)
{
	size_t i;

	for (i = 0; i < kd->nr_vcpus; i++) {
		if (kd->vcpus[i].fd == vcpu_fd)
			return true;
	}
	return false;
}

static int add_vcpu(struct kvmdirty *kd, int vcpu_fd)
{
	struct vcpu vcpu = { .fd = vcpu_fd };
	struct vcpu *vcpus;
	int r;

	if (knows_vcpu(kd, vcpu_fd))
		return -EEXIST;
	vcpus = reallocarray(kd->vcpus, kd->nr_vcpus + 1, sizeof(*vcpus));
	if (!vcpus)
		return -ENOMEM;
	kd->vcpus = vcpus;
	if (kd->backend->add_vcpu) {
		r = kd->backend->add_vcpu(kd, &vcpu);
		if (r)
			return r;
	}
	kd->vcpus[kd->nr_vcpus++] = vcpu;
	return 0;
}

int kvmdirty_add_vcpu(struct kvmdirty *kd, int vcpu_fd)
{
	void *p;
	int r;

	/* Of KVM's files only vCPUs can be mapped; an ioctl would wait for KVM_RUN. */
	p = mmap(NULL, kd->page_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, 0);
	if (p == MAP_FAILED)
		return errno == EBADF || errno == ENOMEM ? -errno : -ENOTTY;
	munmap(p, kd->page_size);

	pthread_mutex_lock(&kd->lock);
	r = add_vcpu(kd, vcpu_fd);
	pthread_mutex_unlock(&kd->lock);
	return r;
}

int kvmdirty_vcpu_full(struct kvmdirty *kd, int vcpu_fd, const struct kvm_run *run)
{
	bool known;
	int r;

	if (run->exit_reason != KVM_EXIT_DIRTY_RING_FULL &&
	    run->exit_reason != KVM_EXIT_DIRTY_SLOT_RING_FULL)
		return 0;
	pthread_mutex_lock(&kd->lock);
	known = knows_vcpu(kd, vcpu_fd);
	pthread_mutex_unlock(&kd->lock);
	/* Nobody would empty its ring, and it would exit for ever. */
	if (!known)
		return -ENOENT;
	r = kd->backend->full ? kd->backend->full(kd, run) : 0;
	if (r > 0)
		count(&kd->stats.full_exits, 1);
	return r;
}

void kvmdirty_vm_stats(struct kvmdirty *kd, struct kvmdirty_vm_stats *stats, size_t size)
{
	copy_out(stats, size, &kd->stats, sizeof(kd->stats));
}

/* --- Slots ------------------------------------------------------------------ */

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
	return r;
}

int kvmdirty_track(struct kvmdirty *kd, struct kvm_userspace_memory_region *region,
		   struct kvmdirty_slot **slotp)
{
	struct kvmdirty_slot *slot;
	int r;

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
		struct kvmdirty_slot **p;

		pthread_mutex_lock(&slot->kd->lock);
		for (p = bucket(slot->kd, slot->id); *p != slot; p = &(*p)->next)
			;
		*p = slot->next;
		pthread_mutex_unlock(&slot->kd->lock);
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

/* --- Harvest ---------------------------------------------------------------- */

/* Where a harvest puts runs: an array, or a callback with a budget. */
struct sink {
	struct kvmdirty_run *runs;
	size_t room;		/* runs that still fit there */
	size_t probed;		/* of those, known to be writable */

	kvmdirty_run_fn fn;	/* NULL: the array */
	void *arg;
	uint64_t budget;	/* pages that may still be handed out */

	struct kvmdirty_result result;
};

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

static bool sink_full(const struct sink *sink)
{
	return sink->fn ? !sink->budget : !sink->room;
}

/*
 * Hand out the batch.  0; 1 if not all of it was wanted; or what the callback said.
 * What was not taken goes to slot->pending, and *@left is its first page.
 */
static int deliver(struct kvmdirty_slot *slot, struct sink *sink, size_t nr, uint64_t *left)
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
		r = deliver(slot, sink, n, &left);
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
		r = deliver(slot, sink, got.nr_runs, &left);
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

static int harvest(struct kvmdirty_slot *slot, struct sink *sink, unsigned int flags,
		   struct kvmdirty_result *result)
{
	int r;

	if (flags & ~KVMDIRTY_HARVEST_NOSYNC)
		return -EINVAL;
	r = pthread_mutex_lock(&slot->harvest_lock);
	if (r)
		return -r;
	if (slot->log_fd >= 0)
		r = harvest_slot_ring(slot, sink, flags);
	else
		r = harvest_sweep(slot, sink);
	pthread_mutex_unlock(&slot->harvest_lock);

	count(&slot->stats.harvests, 1);
	count(&slot->stats.runs, sink->result.nr_runs);
	count(&slot->stats.pages, sink->result.nr_pages);
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
