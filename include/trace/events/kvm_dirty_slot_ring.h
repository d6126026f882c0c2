/* SPDX-License-Identifier: GPL-2.0-only */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM kvm_dirty_slot_ring

#if !defined(_TRACE_KVM_DIRTY_SLOT_RING_H) || defined(TRACE_HEADER_MULTI_READ)
#define _TRACE_KVM_DIRTY_SLOT_RING_H

#include <linux/tracepoint.h>

/*
 * A VM is named by the pid of the process that created it, as in its stats id
 * and its debugfs directory; a slot by as_id << 16 | id, as in the ABI; pages by
 * their offset in the slot.
 */

/* A page joined the log, through the ring of the vCPU that wrote it. */
TRACE_EVENT(kvm_dirty_slot_ring_push,
	    TP_PROTO(int vm, int vcpu, u32 slot, u64 offset, u64 used,
		     u32 entries),
	    TP_ARGS(vm, vcpu, slot, offset, used, entries),

	    TP_STRUCT__entry(__field(int, vm)
			     __field(int, vcpu)
			     __field(u32, slot)
			     __field(u32, entries)
			     __field(u64, offset)
			     __field(u64, used)
	    ),

	    TP_fast_assign(__entry->vm = vm;
			   __entry->vcpu = vcpu;
			   __entry->slot = slot;
			   __entry->offset = offset;
			   __entry->used = used;
			   __entry->entries = entries;
	    ),

	    TP_printk("vm %d vcpu %d slot 0x%x offset 0x%llx used %llu entries %u",
		      __entry->vm, __entry->vcpu, __entry->slot,
		      __entry->offset, __entry->used, __entry->entries)
);

/* Pages joined the log outside of any ring; vcpu is -1 if none wrote them. */
TRACE_EVENT(kvm_dirty_slot_ring_overflow,
	    TP_PROTO(int vm, int vcpu, u32 slot, u64 offset, u32 npages),
	    TP_ARGS(vm, vcpu, slot, offset, npages),

	    TP_STRUCT__entry(__field(int, vm)
			     __field(int, vcpu)
			     __field(u32, slot)
			     __field(u32, npages)
			     __field(u64, offset)
	    ),

	    TP_fast_assign(__entry->vm = vm;
			   __entry->vcpu = vcpu;
			   __entry->slot = slot;
			   __entry->npages = npages;
			   __entry->offset = offset;
	    ),

	    TP_printk("vm %d vcpu %d slot 0x%x offset 0x%llx npages %u",
		      __entry->vm, __entry->vcpu, __entry->slot,
		      __entry->offset, __entry->npages)
);

/* A vCPU leaves to userspace because its ring of the slot is full. */
TRACE_EVENT(kvm_dirty_slot_ring_exit,
	    TP_PROTO(int vm, int vcpu, u32 slot),
	    TP_ARGS(vm, vcpu, slot),

	    TP_STRUCT__entry(__field(int, vm)
			     __field(int, vcpu)
			     __field(u32, slot)
	    ),

	    TP_fast_assign(__entry->vm = vm;
			   __entry->vcpu = vcpu;
			   __entry->slot = slot;
	    ),

	    TP_printk("vm %d vcpu %d slot 0x%x",
		      __entry->vm, __entry->vcpu, __entry->slot)
);

/*
 * A call on a log has come to: 0 waiting for hardware and for other calls, 1 taking
 * pages and copying them out, 2 re-protecting them (with the wait for mmu_lock),
 * 3 flushing TLBs, 4 its end.  What passes between two of them, in one thread, is
 * the time that the former takes.  "slot" is the log that it is at; a call on all logs
 * of a VM begins and ends with 0xffffffff, and is at one log after the other between.
 */
TRACE_EVENT(kvm_dirty_slot_log_phase,
	    TP_PROTO(int vm, u32 slot, u32 phase),
	    TP_ARGS(vm, slot, phase),

	    TP_STRUCT__entry(__field(int, vm)
			     __field(u32, slot)
			     __field(u32, phase)
	    ),

	    TP_fast_assign(__entry->vm = vm;
			   __entry->slot = slot;
			   __entry->phase = phase;
	    ),

	    TP_printk("vm %d slot 0x%x phase %u",
		      __entry->vm, __entry->slot, __entry->phase)
);

/*
 * A harvest ended.  "collected" are pages that the mapping's reader had taken
 * and that were only re-protected; "used" is what was in the rings when it
 * began, stale entries too; "ret" is what the caller gets.
 */
TRACE_EVENT(kvm_dirty_slot_log_harvest,
	    TP_PROTO(int vm, u32 slot, u32 runs, u64 pages, u64 collected,
		     u64 used, u32 flags, int ret),
	    TP_ARGS(vm, slot, runs, pages, collected, used, flags, ret),

	    TP_STRUCT__entry(__field(int, vm)
			     __field(u32, slot)
			     __field(u32, runs)
			     __field(u32, flags)
			     __field(u64, pages)
			     __field(u64, collected)
			     __field(u64, used)
			     __field(int, ret)
	    ),

	    TP_fast_assign(__entry->vm = vm;
			   __entry->slot = slot;
			   __entry->runs = runs;
			   __entry->flags = flags;
			   __entry->pages = pages;
			   __entry->collected = collected;
			   __entry->used = used;
			   __entry->ret = ret;
	    ),

	    TP_printk("vm %d slot 0x%x runs %u pages %llu collected %llu used %llu flags 0x%x ret %d",
		      __entry->vm, __entry->slot, __entry->runs, __entry->pages,
		      __entry->collected, __entry->used, __entry->flags,
		      __entry->ret)
);

/* KVM_DIRTY_SLOT_LOG_RESET ended; fields as above. */
TRACE_EVENT(kvm_dirty_slot_log_reset,
	    TP_PROTO(int vm, u32 slot, u64 pages, u64 used, u32 flags, int ret),
	    TP_ARGS(vm, slot, pages, used, flags, ret),

	    TP_STRUCT__entry(__field(int, vm)
			     __field(u32, slot)
			     __field(u64, pages)
			     __field(u64, used)
			     __field(u32, flags)
			     __field(int, ret)
	    ),

	    TP_fast_assign(__entry->vm = vm;
			   __entry->slot = slot;
			   __entry->pages = pages;
			   __entry->used = used;
			   __entry->flags = flags;
			   __entry->ret = ret;
	    ),

	    TP_printk("vm %d slot 0x%x pages %llu used %llu flags 0x%x ret %d",
		      __entry->vm, __entry->slot, __entry->pages, __entry->used,
		      __entry->flags, __entry->ret)
);

/* A harvest of all logs of a VM ended; "logs" is how many it had to look at. */
TRACE_EVENT(kvm_dirty_slot_vm_harvest,
	    TP_PROTO(int vm, u32 logs, u32 runs, u64 pages, u32 flags, int ret),
	    TP_ARGS(vm, logs, runs, pages, flags, ret),

	    TP_STRUCT__entry(__field(int, vm)
			     __field(u32, logs)
			     __field(u32, runs)
			     __field(u32, flags)
			     __field(u64, pages)
			     __field(int, ret)
	    ),

	    TP_fast_assign(__entry->vm = vm;
			   __entry->logs = logs;
			   __entry->runs = runs;
			   __entry->flags = flags;
			   __entry->pages = pages;
			   __entry->ret = ret;
	    ),

	    TP_printk("vm %d logs %u runs %u pages %llu flags 0x%x ret %d",
		      __entry->vm, __entry->logs, __entry->runs, __entry->pages,
		      __entry->flags, __entry->ret)
);

#endif /* _TRACE_KVM_DIRTY_SLOT_RING_H */

#include <trace/define_trace.h>
