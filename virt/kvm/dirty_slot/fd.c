// SPDX-License-Identifier: GPL-2.0-only
/*
 * The file of one dirty slot log: calls, poll, and what of it can be mapped.
 */

#include <linux/anon_inodes.h>
#include <linux/fs.h>
#include <linux/kvm_host.h>
#include <linux/mm.h>
#include <linux/nospec.h>
#include <linux/poll.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "log.h"

static long log_info(struct kvm_dirty_slot_log *log, void __user *argp)
{
	struct kvm_dirty_slot_log_info info = {
		.slot = log->slot,
		.nr_rings = log_nr_rings(log),
		.entries = log->entries,
		.stride = ring_pages(log->entries) << PAGE_SHIFT,
		.npages = log->npages,
		.log = log->nr,
		.consumers_size = CONSUMER_PAGES(log->max_rings) << PAGE_SHIFT,
		.rings_offset = CONSUMER_PAGES(log->max_rings) << PAGE_SHIFT,
	};
	struct kvm_memory_slot *memslot = NULL;
	struct kvm *kvm;
	int idx;

	kvm = kvm_dirty_slot_log_get_kvm(log, NULL);
	if (kvm) {
		idx = srcu_read_lock(&kvm->srcu);
		memslot = kvm_dirty_slot_log_memslot(log, kvm);
		if (memslot)
			info.base_gfn = memslot->base_gfn;
		srcu_read_unlock(&kvm->srcu, idx);
		kvm_put_kvm(kvm);
	}
	if (!memslot) {
		/* Pairs with kvm_dirty_slot_log_release(), or it is under way. */
		spin_lock(&log->kvm_lock);
		info.base_gfn = log->base_gfn;
		spin_unlock(&log->kvm_lock);
		info.flags = KVM_DIRTY_SLOT_LOG_DEAD;
	}

	return copy_to_user(argp, &info, sizeof(info)) ? -EFAULT : 0;
}

static long log_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct kvm_dirty_slot_log *log = file->private_data;
	void __user *argp = (void __user *)arg;

	switch (cmd) {
	case KVM_DIRTY_SLOT_LOG_INFO:
		return log_info(log, argp);
	case KVM_DIRTY_SLOT_LOG_HARVEST:
		return kvm_dirty_slot_log_harvest(log, argp);
	case KVM_DIRTY_SLOT_LOG_RESET:
		return kvm_dirty_slot_log_reset(log, argp);
	case KVM_DIRTY_SLOT_LOG_MARK:
		return kvm_dirty_slot_log_mark_runs(log, argp);
	case KVM_DIRTY_SLOT_LOG_DISCARD:
		return kvm_dirty_slot_log_discard_runs(log, argp);
	default:
		return -ENOTTY;
	}
}

static __poll_t log_poll(struct file *file, poll_table *wait)
{
	struct kvm_dirty_slot_log *log = file->private_data;
	u32 level = log->wake_level;
	__poll_t events = 0;

	poll_wait(file, &log->wait, wait);
	smp_mb(); /* with who wakes: see it, or be woken */

	if (!READ_ONCE(log->kvm)) {
		events |= EPOLLHUP;
		level = 1;
	}
	if (kvm_dirty_slot_log_ready(log, level))
		events |= EPOLLIN | EPOLLRDNORM;
	return events;
}

static vm_fault_t log_fault(struct vm_fault *vmf)
{
	struct kvm_dirty_slot_log *log = vmf->vma->vm_file->private_data;
	unsigned long area = CONSUMER_PAGES(log->max_rings);
	unsigned long pages = ring_pages(log->entries);
	unsigned long n, nr_rings = log_nr_rings(log), pgoff = vmf->pgoff;
	void *addr;

	/* A page of the area is there with the first ring that has a place in it. */
	n = pgoff < area ? pgoff * CONSUMERS_PER_PAGE : (pgoff - area) / pages;
	if (n >= nr_rings)
		return VM_FAULT_SIGBUS;
	n = array_index_nospec(n, nr_rings);

	if (pgoff < area) {
		addr = log->consumers[n / CONSUMERS_PER_PAGE];
		vmf->page = virt_to_page(addr);
	} else {
		addr = (void *)log_nth_ring(log, n)->kern;
		addr += (pgoff - area) % pages * PAGE_SIZE;
		vmf->page = vmalloc_to_page(addr);
	}
	get_page(vmf->page);
	return 0;
}

static const struct vm_operations_struct log_vm_ops = {
	.fault = log_fault,
};

/*
 * Userspace writes consumers and nothing else: a writable mapping lies in their
 * area and cannot grow, any other cannot be made writable.
 */
static int log_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct kvm_dirty_slot_log *log = file->private_data;
	unsigned long area = CONSUMER_PAGES(log->max_rings);

	if (!(vma->vm_flags & VM_MAYSHARE))
		return -EINVAL;
	if (vma->vm_flags & VM_EXEC)
		return -EPERM;
	if (vma->vm_pgoff >= area || vma_pages(vma) > area - vma->vm_pgoff) {
		if (vma->vm_flags & VM_WRITE)
			return -EPERM;
		vm_flags_clear(vma, VM_MAYWRITE);
	}
	vm_flags_mod(vma, VM_DONTCOPY | VM_DONTEXPAND | VM_DONTDUMP,
		     VM_MAYEXEC);
	vma->vm_ops = &log_vm_ops;
	return 0;
}

static int log_release(struct inode *inode, struct file *file)
{
	log_put(file->private_data);
	kvm_dirty_slot_module_put();
	return 0;
}

static const struct file_operations log_fops = {
	.owner		= THIS_MODULE,
	.release	= log_release,
	.unlocked_ioctl	= log_ioctl,
	.compat_ioctl	= compat_ptr_ioctl,
	.poll		= log_poll,
	.mmap		= log_mmap,
	.llseek		= noop_llseek,
};

/**
 * kvm_dirty_slot_log_open - make a file of a log
 * @log: the log, with a reference, which the file takes over if there is one
 *
 * Return: a file descriptor, or what opening a file gives.
 */
int kvm_dirty_slot_log_open(struct kvm_dirty_slot_log *log)
{
	int fd;

	kvm_dirty_slot_module_get();
	fd = anon_inode_getfd("kvm-dirty-slot-log", &log_fops, log,
			      O_RDWR | O_CLOEXEC);
	if (fd < 0)
		kvm_dirty_slot_module_put();
	return fd;
}
