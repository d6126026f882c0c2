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

struct kvmdirty_slot **bucket(struct kvmdirty *kd, uint32_t id)
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

bool pending_is_empty(struct kvmdirty_slot *slot)
{
	bool empty;

	pthread_mutex_lock(&slot->pending_lock);
	empty = pageset_empty(&slot->pending);
	pthread_mutex_unlock(&slot->pending_lock);
	return empty;
}

int init_checking_mutex(pthread_mutex_t *mutex)
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

void copy_out(void *to, size_t size, const void *from, size_t known)
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

static struct kvmdirty *kvmdirty_alloc(int vm_fd)
{
	struct kvmdirty *kd = calloc(1, sizeof(*kd));

	if (!kd)
		return NULL;
	kd->vm_fd = vm_fd;
	kd->log_fd = -1;
	kd->page_size = sysconf(_SC_PAGESIZE);
	if (init_checking_mutex(&kd->vm_lock)) {
		free(kd);
		return NULL;
	}
	if (pthread_mutex_init(&kd->lock, NULL)) {
		pthread_mutex_destroy(&kd->vm_lock);
		free(kd);
		return NULL;
	}
	return kd;
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

	kd = kvmdirty_alloc(vm_fd);
	if (!kd)
		return -ENOMEM;
	r = open_backend(kd, options, &options->reason);
	if (r) {
		kvmdirty_close(kd);
		return r;
	}
	*kdp = kd;
	return 0;
}

int kvmdirty_vm_attach(int log_fd, struct kvmdirty **kdp)
{
	struct kvmdirty *kd;
	int fd;

	fd = fcntl(log_fd, F_DUPFD_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	/* Others do not know the call, and this one looks at its argument first. */
	if (do_ioctl(fd, KVM_DIRTY_VM_LOG_HARVEST, NULL) != -EFAULT) {
		close(fd);
		return -EINVAL;
	}
	kd = kvmdirty_alloc(-1);
	if (!kd) {
		close(fd);
		return -ENOMEM;
	}
	kd->backend = &backend_slot_ring;
	kd->attached = true;
	kd->log_fd = fd;
	kd->layout = 1;
	*kdp = kd;
	return 0;
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
	if (kd->log_fd >= 0)
		close(kd->log_fd);
	free(kd->held);
	free(kd->vcpus);
	pthread_mutex_destroy(&kd->lock);
	pthread_mutex_destroy(&kd->vm_lock);
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

	if (kd->attached)
		return -EOPNOTSUPP;
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
