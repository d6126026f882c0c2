// SPDX-License-Identifier: GPL-2.0-only
/*
 * How dirty slot logs come to be and go: with memslots, vCPUs, VMs and files.
 */

#include <linux/bitops.h>
#include <linux/kvm_host.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/srcu.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "log.h"

/*
 * By default a ring has room for an eighth of its slot's pages, within these bounds:
 * a page that finds it full costs the vCPU and who harvests more cache misses than
 * memory is worth, and where more than that is dirty, the overflow's order is better.
 */
#define RING_DEFAULT_LEAST	4096
#define RING_DEFAULT_SHARE	8

/*
 * A call on a log can hold the last reference to a VM, so that the files have to
 * keep the code that VMs run on: more than THIS_MODULE, if that is kvm.ko.
 */
static struct module *vendor_module;

/**
 * kvm_dirty_slot_ring_init - called once, before there are VMs
 * @module: the vendor module
 */
void kvm_dirty_slot_ring_init(struct module *module)
{
	vendor_module = module;
}

/* There is a VM, or a file, which keeps the module. */
void kvm_dirty_slot_module_get(void)
{
	__module_get(vendor_module);
}

void kvm_dirty_slot_module_put(void)
{
	module_put(vendor_module);
}

/*
 * Rings.
 */

static void ring_free(struct kvm_dirty_slot_ring *ring)
{
	if (ring)
		vfree(ring->kern);
	kfree(ring);
}

static struct kvm_dirty_slot_ring *ring_alloc(u32 entries)
{
	struct kvm_dirty_slot_ring *ring;
	void *area;

	ring = kzalloc(sizeof(*ring), GFP_KERNEL_ACCOUNT);
	if (!ring)
		return NULL;
	area = __vmalloc(ring_pages(entries) << PAGE_SHIFT,
			 GFP_KERNEL_ACCOUNT | __GFP_ZERO);
	if (!area) {
		kfree(ring);
		return NULL;
	}
	ring->kern = area + KVM_DIRTY_SLOT_RING_KERN_PAGE * PAGE_SIZE;
	ring->runs = area + KVM_DIRTY_SLOT_RING_ENTRIES_PAGE * PAGE_SIZE;
	return ring;
}

/* Under slots_lock.  The log takes @ring, its ring @n, over if there is none. */
static int log_add_ring(struct kvm_dirty_slot_log *log, u32 n,
			struct kvm_dirty_slot_ring *ring)
{
	struct kvm_dirty_slot_ring_user **page;

	/* Left behind by a vCPU whose creation failed afterwards. */
	if (n < log->nr_rings) {
		ring_free(ring);
		return 0;
	}
	if (!ring)
		return -ENOMEM;

	page = &log->consumers[n / CONSUMERS_PER_PAGE];
	if (!*page)
		*page = (void *)get_zeroed_page(GFP_KERNEL_ACCOUNT);
	if (!*page) {
		ring_free(ring);
		return -ENOMEM;
	}
	ring->user = (void *)*page +
		     n % CONSUMERS_PER_PAGE * KVM_DIRTY_SLOT_CONSUMER_STRIDE;
	/* Userspace may have been here: the page came with the first ring in it. */
	WRITE_ONCE(ring->user->consumer, 0);

	smp_store_release(&log->rings[n + 1], ring); /* F */
	smp_store_release(&log->nr_rings, n + 1); /* F */
	return 0;
}

/**
 * kvm_dirty_slot_ring_add_vcpu - give a new vCPU a ring in every log
 * @vcpu: the vCPU, which has its vcpu_idx but is not online yet
 *
 * Memory is allocated without slots_lock.
 *
 * Context: under kvm->lock, may sleep.
 * Return: 0 or -ENOMEM.  There is no way back: rings of a vCPU that does not
 * come to life after all stay for the next one, which has the same index.
 */
int kvm_dirty_slot_ring_add_vcpu(struct kvm_vcpu *vcpu)
{
	struct kvm_dirty_slot_ring_vm *dsr = &vcpu->kvm->dirty_slot_ring;
	u32 n = vcpu->vcpu_idx;
	struct kvm_dirty_slot_log *log;
	struct kvm_dirty_slot_ring *ring;
	unsigned long i;
	int r = 0;

	/* Also if it is enabled only later, or no log is there yet. */
	vcpu->dirty_slot_ring.nr = n + 1;
	if (!kvm_dirty_slot_ring_enabled(vcpu->kvm))
		return 0;

	/* Logs that are made from now on have the ring; the others are in the table. */
	mutex_lock(&vcpu->kvm->slots_lock);
	dsr->nr_rings = max(dsr->nr_rings, n + 1);
	mutex_unlock(&vcpu->kvm->slots_lock);

	for (i = 0; !r; i++) {
		xa_lock(&dsr->vm->logs);
		log = xa_find(&dsr->vm->logs, &i, ULONG_MAX, XA_PRESENT);
		if (log)
			kref_get(&log->ref);
		xa_unlock(&dsr->vm->logs);
		if (!log)
			break;
		if (READ_ONCE(log->kvm) && log_nr_rings(log) <= n) {
			ring = ring_alloc(log->entries);
			mutex_lock(&vcpu->kvm->slots_lock);
			r = log_add_ring(log, n, ring);
			mutex_unlock(&vcpu->kvm->slots_lock);
		}
		log_put(log);
	}
	return r;
}

/*
 * Logs.
 */

/**
 * kvm_dirty_slot_log_free - the last reference to a log is gone
 * @ref: of the log
 */
void kvm_dirty_slot_log_free(struct kref *ref)
{
	struct kvm_dirty_slot_log *log =
		container_of(ref, struct kvm_dirty_slot_log, ref);
	u32 i;

	irq_work_sync(&log->wake);
	for (i = 0; i < log->nr_rings; i++)
		ring_free(log_nth_ring(log, i));
	for (i = 0; log->consumers && i < CONSUMER_PAGES(log->max_rings); i++)
		free_page((unsigned long)log->consumers[i]);
	kfree(log->consumers);
	kvm_dirty_summary_free(&log->overflow);
	kvm_dirty_summary_free(&log->busy);
	kvfree(log->spare);
	vfree(log->bitmap);
	kvm_dirty_slot_vm_put(log->vm);
	kvfree(log);
}

/*
 * The VM, with a reference.  NULL if the slot has stopped logging, *@dead is set
 * then, or the VM is being destroyed, when vCPUs may still log.
 */
struct kvm *kvm_dirty_slot_log_get_kvm(struct kvm_dirty_slot_log *log, bool *dead)
{
	struct kvm *kvm;

	spin_lock(&log->kvm_lock);
	kvm = log->kvm;
	if (dead)
		*dead = !kvm;
	/*
	 * Not while it is being destroyed.  It cannot be gone: destruction has
	 * to pass kvm_dirty_slot_log_release(), which clears log->kvm, first.
	 */
	if (kvm && !kvm_get_kvm_safe(kvm))
		kvm = NULL;
	spin_unlock(&log->kvm_lock);
	return kvm;
}

/* The log's memslot, or NULL if it has none any more.  Under kvm->srcu. */
struct kvm_memory_slot *kvm_dirty_slot_log_memslot(struct kvm_dirty_slot_log *log,
						   struct kvm *kvm)
{
	struct kvm_memslots *slots = __kvm_memslots(kvm, log->slot >> 16);
	struct kvm_memory_slot *memslot = id_to_memslot(slots, (u16)log->slot);

	return memslot && memslot->dirty_slot_log == log ? memslot : NULL;
}

static void log_wake(struct irq_work *work)
{
	struct kvm_dirty_slot_log *log =
		container_of(work, struct kvm_dirty_slot_log, wake);

	wake_up_poll(&log->wait, EPOLLIN | EPOLLRDNORM);
	wake_up_poll(&log->vm->wait, EPOLLIN | EPOLLRDNORM);
}

/*
 * What of a log can fail.  All of it under slots_lock, as is the bitmap of a memslot
 * without a log: who sets a memslot has it, and how many vCPUs there are, and how large
 * the memslot is, is only certain with it.
 */
static int log_alloc(struct kvm *kvm, struct kvm_dirty_slot_log *log)
{
	int r;
	u32 i;

	/* Twice the size, as KVM_GET_DIRTY_LOG wants it. */
	log->bitmap = __vcalloc(2 * log->nr_words, sizeof(long),
				GFP_KERNEL_ACCOUNT);
	log->consumers = kcalloc(CONSUMER_PAGES(log->max_rings),
				 sizeof(*log->consumers), GFP_KERNEL_ACCOUNT);
	log->spare = kvm_dirty_slot_call_alloc();
	if (!log->bitmap || !log->consumers || !log->spare)
		return -ENOMEM;
	log->spare->spare = true;

	r = kvm_dirty_summary_init(&log->overflow, log->nr_words);
	if (!r)
		r = kvm_dirty_summary_init(&log->busy, log->max_rings);
	for (i = 0; !r && i < kvm->dirty_slot_ring.nr_rings; i++)
		r = log_add_ring(log, i, ring_alloc(log->entries));
	/* The last that can fail: from here on others can reach it. */
	if (!r)
		r = kvm_dirty_slot_vm_add(log->vm, log);
	return r;
}

static u32 default_entries(unsigned long npages)
{
	return clamp_t(unsigned long,
		       roundup_pow_of_two(npages / RING_DEFAULT_SHARE + 1) / 2,
		       RING_DEFAULT_LEAST, KVM_DIRTY_SLOT_RING_MAX_ENTRIES);
}

/**
 * kvm_dirty_slot_log_create - give a memslot a log, and so a dirty bitmap
 * @kvm: the VM, with the capability enabled
 * @memslot: the memslot, not yet reachable by vCPUs
 *
 * Context: under slots_lock, may sleep.
 * Return: 0, or -ENOMEM with @memslot as it was.
 */
int kvm_dirty_slot_log_create(struct kvm *kvm, struct kvm_memory_slot *memslot)
{
	struct kvm_dirty_slot_ring_vm *dsr = &kvm->dirty_slot_ring;
	struct kvm_dirty_slot_log *log;
	u32 entries;
	int r;

	log = kvzalloc(struct_size(log, rings, kvm->max_vcpus + 1),
		       GFP_KERNEL_ACCOUNT);
	if (!log)
		return -ENOMEM;

	kref_init(&log->ref);
	log->slot = memslot->as_id << 16 | memslot->id;
	entries = dsr->by_slot ? default_entries(memslot->npages) : dsr->entries;
	/* No ring needs more than one entry for each page. */
	log->entries = min_t(unsigned long, entries,
			     roundup_pow_of_two(memslot->npages));
	/*
	 * One with room for all pages is no reason to hold a vCPU up.  It could hold
	 * it up for good: full with what one instruction writes, which is protected
	 * again at each exit.
	 */
	log->flags = log->entries < entries ? 0 : dsr->flags;
	log->wake_level = DIV_ROUND_UP(log->entries, 2);
	log->pid = kvm->userspace_pid;
	log->npages = memslot->npages;
	log->nr_words = BITS_TO_LONGS(memslot->npages);
	log->base_gfn = memslot->base_gfn;
	log->max_rings = kvm->max_vcpus;
	log->kvm = kvm;
	log->vm = dsr->vm;
	kref_get(&dsr->vm->ref);
	raw_spin_lock_init(&log->mark_lock);
	spin_lock_init(&log->kvm_lock);
	mutex_init(&log->mutex);
	init_waitqueue_head(&log->wait);
	init_irq_work(&log->wake, log_wake);

	r = log_alloc(kvm, log);
	if (r) {
		log_put(log);
		return r;
	}

	memslot->dirty_slot_log = log;
	memslot->dirty_bitmap = log->bitmap;
	/* The pages that start dirty, as our caller sees to, are in no ring. */
	if (kvm_dirty_log_manual_protect_and_init_set(kvm)) {
		kvm_dirty_summary_fill(&log->overflow);
		kvm_dirty_slot_log_activate(log);
	}
	return 0;
}

/**
 * kvm_dirty_slot_log_start - vCPUs can reach a memslot
 * @memslot: the memslot; NULL is fine, and so is one that had been there before
 *
 * From here on its log is one of the VM's.
 *
 * Context: under slots_lock.
 */
void kvm_dirty_slot_log_start(const struct kvm_memory_slot *memslot)
{
	struct kvm_dirty_slot_log *log = memslot ? memslot->dirty_slot_log : NULL;

	if (!log || log->live)
		return;
	/* First, so that who has pages of it has been told of it. */
	kvm_dirty_slot_vm_changed(log->vm);
	smp_store_release(&log->live, true); /* with log_is_live() */
	smp_mb(); /* with drain_log(): it sees that, or left the pages to be seen */
	if (kvm_dirty_slot_log_ready(log, log->wake_level))
		irq_work_queue(&log->wake);
}

/**
 * kvm_dirty_slot_log_stop - a memslot is about to stop logging, or to move
 * @kvm: the VM
 * @memslot: the memslot, which vCPUs can still reach; NULL is fine
 *
 * Gets what hardware still holds into the log, where it can be harvested after
 * the slot is gone.
 *
 * Context: under slots_lock, sleeps.
 */
void kvm_dirty_slot_log_stop(struct kvm *kvm,
			     const struct kvm_memory_slot *memslot)
{
	if (memslot && memslot->dirty_slot_log)
		kvm_dirty_slot_sync_hw(kvm, false);
}

/**
 * kvm_dirty_slot_log_release - a memslot has stopped logging
 * @memslot: the memslot; nobody can reach it any more, or nobody could yet
 *
 * Context: process context, may sleep.
 * Return: true if there was a log and it owned the bitmap; both are detached.
 */
bool kvm_dirty_slot_log_release(struct kvm_memory_slot *memslot)
{
	struct kvm_dirty_slot_log *log = memslot->dirty_slot_log;

	if (!log)
		return false;

	memslot->dirty_slot_log = NULL;
	memslot->dirty_bitmap = NULL;

	spin_lock(&log->kvm_lock);
	log->base_gfn = memslot->base_gfn;
	WRITE_ONCE(log->kvm, NULL);
	spin_unlock(&log->kvm_lock);
	/* If the memslot could not be made after all, there was nothing. */
	kvm_dirty_slot_vm_remove(log, log->live);
	wake_up_poll(&log->wait, EPOLLHUP);
	wake_up_poll(&log->vm->wait, EPOLLIN | EPOLLRDNORM);

	log_put(log);
	return true;
}

/*
 * VMs.
 */

static void vm_free(struct kref *ref)
{
	struct kvm_dirty_slot_vm *vm =
		container_of(ref, struct kvm_dirty_slot_vm, ref);

	xa_destroy(&vm->logs);
	kvm_dirty_summary_free(&vm->index);
	kfree(vm);
}

void kvm_dirty_slot_vm_put(struct kvm_dirty_slot_vm *vm)
{
	kref_put(&vm->ref, vm_free);
}

static struct kvm_dirty_slot_vm *vm_create(struct kvm *kvm)
{
	struct kvm_dirty_slot_vm *vm;

	vm = kzalloc(sizeof(*vm), GFP_KERNEL_ACCOUNT);
	if (!vm)
		return NULL;
	kref_init(&vm->ref);
	spin_lock_init(&vm->kvm_lock);
	vm->kvm = kvm;
	vm->pid = kvm->userspace_pid;
	xa_init_flags(&vm->logs, XA_FLAGS_ALLOC | XA_FLAGS_ACCOUNT);
	init_waitqueue_head(&vm->wait);
	if (kvm_dirty_summary_init(&vm->index, VM_MAX_LOGS)) {
		kvm_dirty_slot_vm_put(vm);
		return NULL;
	}
	return vm;
}

/**
 * kvm_dirty_slot_ring_enable - KVM_ENABLE_CAP for KVM_CAP_DIRTY_SLOT_RING
 * @kvm: the VM
 * @cap: what userspace asks for
 *
 * Return: 0; -EINVAL for a bad size, an unknown flag or a reserved field that is
 * not zero; -EBUSY if a memslot logs, if enabled before, or if the upstream
 * dirty ring is on; -ENOMEM.
 */
int kvm_dirty_slot_ring_enable(struct kvm *kvm, struct kvm_enable_cap *cap)
{
	u64 entries = cap->args[0] ?: KVM_DIRTY_SLOT_RING_MAX_ENTRIES;
	struct kvm_dirty_slot_ring_vm *dsr = &kvm->dirty_slot_ring;
	int r = -EBUSY;

	if (cap->flags || cap->args[2] || cap->args[3] ||
	    cap->args[1] & ~(u64)KVM_DIRTY_SLOT_RING_EXIT_ON_FULL ||
	    !is_power_of_2(entries) || entries > KVM_DIRTY_SLOT_RING_MAX_ENTRIES)
		return -EINVAL;

	/* Against vCPU creation and the upstream ring, and against memslots. */
	mutex_lock(&kvm->lock);
	mutex_lock(&kvm->slots_lock);
	if (dsr->entries || kvm->dirty_ring_size ||
	    atomic_read(&kvm->nr_memslots_dirty_logging))
		goto unlock;

	r = -ENOMEM;
	dsr->vm = vm_create(kvm);
	if (!dsr->vm)
		goto unlock;
	dsr->flags = cap->args[1];
	dsr->by_slot = !cap->args[0];
	dsr->nr_rings = atomic_read(&kvm->online_vcpus);
	WRITE_ONCE(dsr->entries, entries);
	r = 0;
unlock:
	mutex_unlock(&kvm->slots_lock);
	mutex_unlock(&kvm->lock);
	return r;
}

/**
 * kvm_dirty_slot_ring_destroy - a VM is gone, with its memslots
 * @kvm: the VM, of which only kvm->srcu is still needed
 *
 * Context: sleeps.
 */
void kvm_dirty_slot_ring_destroy(struct kvm *kvm)
{
	struct kvm_dirty_slot_vm *vm = kvm->dirty_slot_ring.vm;

	if (!vm)
		return;

	spin_lock(&vm->kvm_lock);
	WRITE_ONCE(vm->kvm, NULL);
	spin_unlock(&vm->kvm_lock);
	wake_up_poll(&vm->wait, EPOLLHUP);

	/* Grace periods that were started have to end before cleanup_srcu_struct(). */
	if (READ_ONCE(vm->gp_started))
		synchronize_srcu(&kvm->srcu);
	kvm_dirty_slot_vm_put(vm);
}

/**
 * kvm_vm_ioctl_get_dirty_slot_log_fd - KVM_GET_DIRTY_SLOT_LOG_FD
 * @kvm: the VM
 * @argp: struct kvm_dirty_slot_log_fd in userspace
 *
 * Return: a file descriptor; -ENXIO if the capability is not enabled, -EINVAL
 * for a slot that cannot be or unknown flags, -ENOENT for a slot that is not or
 * does not log, or what opening a file gives.
 */
int kvm_vm_ioctl_get_dirty_slot_log_fd(struct kvm *kvm, void __user *argp)
{
	struct kvm_dirty_slot_log *log = NULL;
	struct kvm_memory_slot *memslot;
	struct kvm_dirty_slot_log_fd args;
	int as_id, id, fd;

	if (!kvm_dirty_slot_ring_enabled(kvm))
		return -ENXIO;
	if (copy_from_user(&args, argp, sizeof(args)))
		return -EFAULT;
	if (args.flags)
		return -EINVAL;
	if (args.slot == KVM_DIRTY_SLOT_ALL)
		return kvm_dirty_slot_vm_open(kvm->dirty_slot_ring.vm);

	as_id = args.slot >> 16;
	id = (u16)args.slot;
	if (as_id >= kvm_arch_nr_memslot_as_ids(kvm) || id >= KVM_USER_MEM_SLOTS)
		return -EINVAL;

	mutex_lock(&kvm->slots_lock);
	memslot = id_to_memslot(__kvm_memslots(kvm, as_id), id);
	if (memslot && memslot->dirty_slot_log) {
		log = memslot->dirty_slot_log;
		kref_get(&log->ref);
	}
	mutex_unlock(&kvm->slots_lock);
	if (!log)
		return -ENOENT;

	fd = kvm_dirty_slot_log_open(log);
	if (fd < 0)
		log_put(log);
	return fd;
}
