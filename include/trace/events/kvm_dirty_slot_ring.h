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
	    TP_PROTO(int vm, int vcpu, u32 slot, u64 offset, u64 used),
	    TP_ARGS(vm, vcpu, slot, offset, used),

	    TP_STRUCT__entry(__field(int, vm)
			     __field(int, vcpu)
			     __field(u32, slot)
			     __field(u64, offset)
			     __field(u64, used)
	    ),

	    TP_fast_assign(__entry->vm = vm;
			   __entry->vcpu = vcpu;
			   __entry->slot = slot;
			   __entry->offset = offset;
			   __entry->used = used;
	    ),

	    TP_printk("vm %d vcpu %d slot 0x%x offset 0x%llx used %llu",
		      __entry->vm, __entry->vcpu, __entry->slot,
		      __entry->offset, __entry->used)
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
 * A harvest ended.  "collected" are pages that the mapping's reader had taken
 * and that were only re-protected; "ret" is what the caller gets.
 */
TRACE_EVENT(kvm_dirty_slot_log_harvest,
	    TP_PROTO(int vm, u32 slot, u32 runs, u64 pages, u64 collected,
		     u32 flags, int ret),
	    TP_ARGS(vm, slot, runs, pages, collected, flags, ret),

	    TP_STRUCT__entry(__field(int, vm)
			     __field(u32, slot)
			     __field(u32, runs)
			     __field(u32, flags)
			     __field(u64, pages)
			     __field(u64, collected)
			     __field(int, ret)
	    ),

	    TP_fast_assign(__entry->vm = vm;
			   __entry->slot = slot;
			   __entry->runs = runs;
			   __entry->flags = flags;
			   __entry->pages = pages;
			   __entry->collected = collected;
			   __entry->ret = ret;
	    ),

	    TP_printk("vm %d slot 0x%x runs %u pages %llu collected %llu flags 0x%x ret %d",
		      __entry->vm, __entry->slot, __entry->runs, __entry->pages,
		      __entry->collected, __entry->flags, __entry->ret)
);

/* KVM_DIRTY_SLOT_LOG_RESET ended. */
TRACE_EVENT(kvm_dirty_slot_log_reset,
	    TP_PROTO(int vm, u32 slot, u64 pages, u32 flags, int ret),
	    TP_ARGS(vm, slot, pages, flags, ret),

	    TP_STRUCT__entry(__field(int, vm)
			     __field(u32, slot)
			     __field(u64, pages)
			     __field(u32, flags)
			     __field(int, ret)
	    ),

	    TP_fast_assign(__entry->vm = vm;
			   __entry->slot = slot;
			   __entry->pages = pages;
			   __entry->flags = flags;
			   __entry->ret = ret;
	    ),

	    TP_printk("vm %d slot 0x%x pages %llu flags 0x%x ret %d",
		      __entry->vm, __entry->slot, __entry->pages,
		      __entry->flags, __entry->ret)
);

#endif /* _TRACE_KVM_DIRTY_SLOT_RING_H */

#include <trace/define_trace.h>
