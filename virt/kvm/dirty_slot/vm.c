// SPDX-License-Identifier: GPL-2.0-only
/*
 * All dirty slot logs of a VM, and the file that harvests them in one call.
 *
 * A harvest goes through the tree over the VM's logs and drains those that may
 * have something.  Several can do so at once: the tree and the table of logs are
 * only looked at, and each log sees to it that each page goes to one of them.
 *
 * A log whose memslot has stopped logging stays in the table as long as there are
 * files of this kind and it has something left.  Whoever finds that it has nothing
 * takes it out; the last file to go takes them all out.
 */

#include <linux/anon_inodes.h>
#include <linux/fs.h>
#include <linux/kvm_host.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "log.h"

struct vm_file {
	struct kvm_dirty_slot_vm *vm;
	u32 layout;		/* of the VM, as the file has told it */
	u32 next;		/* where the last call stopped */
};

struct vm_sink {
	struct kvm_dirty_slot_sink sink;
	struct kvm_dirty_vm_harvest args;
	void __user *argp;
	const struct vm_file *f;
};

/**
 * kvm_dirty_slot_vm_add - a log has come
 * @vm: the VM
 * @log: the log; the table takes a reference
 *
 * Context: under slots_lock, may sleep; nobody else can reach @log.
 * Return: 0; -ENOMEM, also if files of the VM keep too many.
 */
int kvm_dirty_slot_vm_add(struct kvm_dirty_slot_vm *vm,
			  struct kvm_dirty_slot_log *log)
{
	int r;

	log->nr = ++vm->nr_logs;
	log->listed = true;
	kref_get(&log->ref);
	xa_lock(&vm->logs);
	r = __xa_alloc(&vm->logs, &log->index, log,
		       XA_LIMIT(0, VM_MAX_LOGS - 1), GFP_KERNEL_ACCOUNT);
	xa_unlock(&vm->logs);
	if (!r)
		return 0;

	log->listed = false;
	log_put(log);
	return -ENOMEM;
}

/**
 * kvm_dirty_slot_vm_changed - a log came or went, as the VM's files shall say
 * @vm: the VM
 */
void kvm_dirty_slot_vm_changed(struct kvm_dirty_slot_vm *vm)
{
	xa_lock(&vm->logs);
	WRITE_ONCE(vm->layout, vm->layout + 1);
	xa_unlock(&vm->logs);
}

/* Under the table's lock; true if the caller has to put the table's reference. */
static bool table_erase(struct kvm_dirty_slot_log *log)
{
	struct kvm_dirty_slot_vm *vm = log->vm;

	/* Its place may be used again: log_activate() leaves that alone now. */
	raw_spin_lock_irq(&log->mark_lock);
	if (!log->listed) {
		raw_spin_unlock_irq(&log->mark_lock);
		return false;
	}
	log->listed = false;
	raw_spin_unlock_irq(&log->mark_lock);

	kvm_dirty_summary_clear(&vm->index, log->index);
	__xa_erase(&vm->logs, log->index);
	return true;
}

/**
 * kvm_dirty_slot_vm_remove - a memslot has stopped logging
 * @log: its log, in which nobody marks pages any more
 * @keep: what is left in it was written
 *
 * It stays in the table if there are files that may want what is left in it.
 */
void kvm_dirty_slot_vm_remove(struct kvm_dirty_slot_log *log, bool keep)
{
	struct kvm_dirty_slot_vm *vm = log->vm;
	bool put = false;

	if (keep)
		kvm_dirty_slot_vm_changed(vm);
	xa_lock(&vm->logs);
	if (vm->nr_files && keep)
		kvm_dirty_slot_log_activate(log);
	else
		put = table_erase(log);
	xa_unlock(&vm->logs);
	if (put)
		log_put(log);
}

/* Nothing is left of a log that is not of a memslot any more. */
static void table_reap(struct kvm_dirty_slot_log *log)
{
	bool put;

	xa_lock(&log->vm->logs);
	put = table_erase(log);
	xa_unlock(&log->vm->logs);
	if (put)
		log_put(log);
}

/* A log that may have something, from place *@at on, with a reference. */
static struct kvm_dirty_slot_log *vm_next_log(struct kvm_dirty_slot_vm *vm,
					      u32 *at, u32 end)
{
	struct kvm_dirty_slot_log *log = NULL;

	xa_lock(&vm->logs);
	*at = kvm_dirty_summary_next(&vm->index, *at);
	if (*at < end) {
		log = xa_load(&vm->logs, *at);
		kref_get(&log->ref);
		++*at;
	}
	xa_unlock(&vm->logs);
	return log;
}

/* What there is to be told of @layout, the VM's, as read after the logs were found. */
static u32 layout_flag(const struct vm_file *f, u32 layout)
{
	return layout != READ_ONCE(f->layout) ? KVM_DIRTY_HARVEST_LAYOUT : 0;
}

static int vm_store(struct kvm_dirty_slot_sink *sink,
		    const struct kvm_dirty_slot_log *log,
		    const struct kvm_dirty_slot_call *c)
{
	struct vm_sink *s = container_of(sink, struct vm_sink, sink);
	struct kvm_dirty_vm_run __user *to = u64_to_user_ptr(s->args.runs);
	struct kvm_dirty_vm_harvest args = s->args;
	struct kvm_dirty_vm_run chunk[16];
	int i, j, n;

	to += args.nr_runs;
	for (i = 0; i < c->nr_runs; i += n) {
		n = min_t(int, c->nr_runs - i, ARRAY_SIZE(chunk));
		for (j = 0; j < n; j++)
			chunk[j] = (struct kvm_dirty_vm_run) {
				.slot = log->slot,
				.log = log->nr,
				.offset = c->runs[i + j].offset,
				.npages = c->runs[i + j].npages,
			};
		if (copy_to_user(to + i, chunk, n * sizeof(*to)))
			return -EFAULT;
	}

	args.nr_runs += c->nr_runs;
	args.nr_pages += c->nr_pages;
	/* There are other logs; and this may be all that the caller gets to know. */
	args.flags = KVM_DIRTY_HARVEST_MORE |
		     layout_flag(s->f, READ_ONCE(s->f->vm->layout));
	if (copy_to_user(s->argp, &args, sizeof(args)))
		return -EFAULT;
	s->args = args;
	return 0;
}

/*
 * A log is in the table before its memslot is one, and before the bits of pages
 * that start dirty are set: until then there is nothing to be had.
 */
static bool log_is_live(struct kvm_dirty_slot_log *log)
{
	return smp_load_acquire(&log->live); /* with kvm_dirty_slot_log_start() */
}

/* Drain one log; its kvm is the call's, or NULL. */
static int drain_log(struct kvm_dirty_slot_log *log, struct kvm *kvm,
		     struct kvm_dirty_slot_sink *sink, bool *flush)
{
	struct kvm_dirty_slot_call *c;
	u32 left = sink->left;
	bool dead;
	int r;

	if (!log_is_live(log))
		return 0;
	dead = !READ_ONCE(log->kvm);
	c = kvm_dirty_slot_call_get(log);
	if (!c) {
		sink->more = true;
		return sink->stored ? 0 : -ENOMEM;
	}
	c->kvm = dead ? NULL : kvm;
	/* For who has the log's mutex. */
	log_phase(log, KVM_DIRTY_SLOT_PHASE_WAIT);
	r = kvm_dirty_slot_log_drain(log, c, sink, false);
	/* If there was nothing, with the mutex held all the time. */
	if (!r && dead && !sink->more && left == sink->left && !c->others)
		table_reap(log);
	*flush |= c->flush;
	kvm_dirty_slot_call_put(log, c);
	return r;
}

static struct kvm *vm_get_kvm(struct kvm_dirty_slot_vm *vm, bool *dead)
{
	struct kvm *kvm;

	spin_lock(&vm->kvm_lock);
	kvm = vm->kvm;
	*dead = !kvm;
	if (kvm && !kvm_get_kvm_safe(kvm))
		kvm = NULL;
	spin_unlock(&vm->kvm_lock);
	return kvm;
}

/* What a call on all logs does outside of any of them. */
static void vm_phase(const struct kvm_dirty_slot_vm *vm, int phase)
{
	trace_kvm_dirty_slot_log_phase(vm->pid, KVM_DIRTY_SLOT_ALL, phase);
}

/* One way around the logs, from where the last call stopped. */
static int drain_all(struct vm_file *f, struct kvm *kvm,
		     struct kvm_dirty_slot_sink *sink, u32 *nr_logs, bool *flush)
{
	struct kvm_dirty_slot_vm *vm = f->vm;
	u32 start = READ_ONCE(f->next), at = start, end = VM_MAX_LOGS;
	struct kvm_dirty_slot_log *log;
	u32 left;
	int r;

	sink->more = false;
	for (;;) {
		log = vm_next_log(vm, &at, end);
		if (!log) {
			if (end == start || !start)
				return 0;
			at = 0;
			end = start;
			continue;
		}
		left = sink->left;
		if (!left) {
			sink->more = true;
			r = 0;
		} else {
			r = drain_log(log, kvm, sink, flush);
			++*nr_logs;
		}
		log_put(log);
		if (r || sink->more) {
			/* As log_stop_at(): if it had its turn, it is the next one's. */
			if (left == sink->left)
				at--;
			WRITE_ONCE(f->next, at % VM_MAX_LOGS);
			return r;
		}
	}
}

static long vm_harvest(struct vm_file *f, void __user *argp)
{
	struct vm_sink s = { .sink.store = vm_store, .argp = argp, .f = f };
	struct kvm_dirty_vm_harvest *args = &s.args;
	struct kvm_dirty_slot_vm *vm = f->vm;
	bool sync, dead, flush = false;
	u32 i, nr_logs = 0, layout;
	struct kvm *kvm;
	int r;

	if (copy_from_user(args, argp, sizeof(*args)))
		return -EFAULT;
	if (args->flags & ~(KVM_DIRTY_HARVEST_SYNC | KVM_DIRTY_HARVEST_MORE |
			    KVM_DIRTY_HARVEST_LAYOUT) || !args->nr_runs)
		return -EINVAL;
	for (i = 0; i < ARRAY_SIZE(args->reserved); i++) {
		if (args->reserved[i])
			return -EINVAL;
	}
	/* As in kvm_dirty_slot_log_harvest(). */
	if (copy_to_user(argp, args, sizeof(*args)))
		return -EFAULT;
	sync = args->flags & KVM_DIRTY_HARVEST_SYNC;
	s.sink.left = args->nr_runs;
	args->nr_runs = 0;
	args->nr_pages = 0;
	args->flags = 0;

	vm_phase(vm, KVM_DIRTY_SLOT_PHASE_WAIT);
	kvm = vm_get_kvm(vm, &dead);
	r = kvm && READ_ONCE(kvm->vm_dead) ? -EIO : 0;
	if (!r && kvm && sync)
		r = kvm_dirty_slot_sync_hw(kvm, true);
	if (!r)
		r = drain_all(f, kvm, &s.sink, &nr_logs, &flush);
	vm_phase(vm, KVM_DIRTY_SLOT_PHASE_FLUSH);
	if (flush)
		kvm_flush_remote_tlbs(kvm);
	vm_phase(vm, KVM_DIRTY_SLOT_PHASE_END);

	if (!r && dead && !args->nr_runs && !s.sink.more &&
	    kvm_dirty_summary_empty(&vm->index))
		r = -ENODEV;
	if (!r || r == -ENODEV) {
		/* After the logs, so that whatever they are, they are known. */
		layout = READ_ONCE(vm->layout);
		args->flags = layout_flag(f, layout);
		if (s.sink.more)
			args->flags |= KVM_DIRTY_HARVEST_MORE;
		if (!copy_to_user(argp, args, sizeof(*args)))
			WRITE_ONCE(f->layout, layout);
		else if (!s.sink.stored)
			r = -EFAULT;
	}
	trace_kvm_dirty_slot_vm_harvest(vm->pid, nr_logs, args->nr_runs,
					args->nr_pages, args->flags | sync, r);
	if (kvm) {
		atomic64_inc(&kvm->stat.generic.dirty_slot_log_harvests);
		atomic64_add(args->nr_pages,
			     &kvm->stat.generic.dirty_slot_log_harvested_pages);
		kvm_put_kvm(kvm);
	}
	return r;
}

static long vm_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	if (cmd != KVM_DIRTY_VM_LOG_HARVEST)
		return -ENOTTY;
	return vm_harvest(file->private_data, (void __user *)arg);
}

static __poll_t vm_poll(struct file *file, poll_table *wait)
{
	struct vm_file *f = file->private_data;
	struct kvm_dirty_slot_vm *vm = f->vm;
	struct kvm_dirty_slot_log *log;
	__poll_t events = 0;
	u32 at = 0, level;

	poll_wait(file, &vm->wait, wait);
	smp_mb(); /* with who wakes: see it, or be woken */

	if (!READ_ONCE(vm->kvm))
		events |= EPOLLHUP;
	while (!(events & EPOLLIN) && (log = vm_next_log(vm, &at, VM_MAX_LOGS))) {
		/* Of a deleted memslot there is nothing more to come. */
		level = READ_ONCE(log->kvm) ? log->wake_level : 1;
		if (log_is_live(log) && kvm_dirty_slot_log_ready(log, level))
			events |= EPOLLIN | EPOLLRDNORM;
		log_put(log);
	}
	return events;
}

/* The last file takes what is left of deleted memslots with it. */
static void table_sweep(struct kvm_dirty_slot_vm *vm)
{
	struct kvm_dirty_slot_log *log;
	unsigned long i;
	bool put;

	xa_for_each(&vm->logs, i, log) {
		xa_lock(&vm->logs);
		put = !vm->nr_files && xa_load(&vm->logs, i) == log &&
		      !READ_ONCE(log->kvm) && table_erase(log);
		xa_unlock(&vm->logs);
		if (put)
			log_put(log);
	}
}

static void vm_file_free(struct vm_file *f)
{
	bool last;

	xa_lock(&f->vm->logs);
	last = !--f->vm->nr_files;
	xa_unlock(&f->vm->logs);
	if (last)
		table_sweep(f->vm);
	kvm_dirty_slot_vm_put(f->vm);
	kfree(f);
	kvm_dirty_slot_module_put();
}

static int vm_release(struct inode *inode, struct file *file)
{
	vm_file_free(file->private_data);
	return 0;
}

static const struct file_operations vm_fops = {
	.owner		= THIS_MODULE,
	.release	= vm_release,
	.unlocked_ioctl	= vm_ioctl,
	.compat_ioctl	= compat_ptr_ioctl,
	.poll		= vm_poll,
	.llseek		= noop_llseek,
};

/**
 * kvm_dirty_slot_vm_open - make a file of all logs of a VM
 * @vm: the VM's
 *
 * Return: a file descriptor, or what opening a file gives.
 */
int kvm_dirty_slot_vm_open(struct kvm_dirty_slot_vm *vm)
{
	struct vm_file *f;
	int fd;

	f = kzalloc(sizeof(*f), GFP_KERNEL_ACCOUNT);
	if (!f)
		return -ENOMEM;
	f->vm = vm;
	kref_get(&vm->ref);
	xa_lock(&vm->logs);
	vm->nr_files++;
	f->layout = vm->layout;
	xa_unlock(&vm->logs);

	kvm_dirty_slot_module_get();
	fd = anon_inode_getfd("kvm-dirty-slot-vm-log", &vm_fops, f,
			      O_RDWR | O_CLOEXEC);
	if (fd < 0)
		vm_file_free(f);
	return fd;
}
