// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvmdirtytop, the part in the kernel: adds up, in maps, what the tracepoints of
 * KVM's dirty logs say.
 *
 * The programs on the tracepoints of dirty slot rings take their arguments as
 * they come and need no kernel type, so that CAP_BPF and CAP_PERFMON do even
 * where kvm is a module, whose types only CAP_SYS_ADMIN can load.  Those for
 * kernels without slot rings walk KVM's structures, relocated to what the
 * running kernel has (CO-RE).
 *
 * A row of a vCPU has one writer at a time, its thread; those of vCPU -1, and of
 * slots, have several.
 */
#include <linux/bpf.h>
#include <linux/kvm_dirty_slot_ring.h>
#include <asm/ptrace.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include "kvmdirtytop.h"

char LICENSE[] SEC("license") = "GPL";

/* Set before the load: look only at the VMs in the map of that name. */
const volatile bool only_vms;

/* Moved on by userspace with every interval: the peaks begin anew. */
__u32 epoch;
/* Events that found a map full. */
__u64 lost;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, int);
	__type(value, __u8);
} vms SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, struct vcpu_key);
	__type(value, struct vcpu_val);
} vcpus SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct slot_key);
	__type(value, struct slot_val);
} slots SEC(".maps");

/* Calls that are under way, by their thread. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct call_val);
} calls SEC(".maps");

/* What new rows begin as; a slot's is too large for the stack. */
static const struct vcpu_val no_vcpu_val;
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct slot_val);
} no_slot_val SEC(".maps");

static __always_inline bool unwanted(int vm)
{
	return only_vms && !bpf_map_lookup_elem(&vms, &vm);
}

static __always_inline struct vcpu_val *vcpu_row(int vm, __u32 slot, int vcpu)
{
	struct vcpu_key key = { .vm = vm, .slot = slot, .vcpu = vcpu };
	struct vcpu_val *v;

	v = bpf_map_lookup_elem(&vcpus, &key);
	if (v)
		return v;
	bpf_map_update_elem(&vcpus, &key, &no_vcpu_val, BPF_NOEXIST);
	v = bpf_map_lookup_elem(&vcpus, &key);
	if (!v)
		__sync_fetch_and_add(&lost, 1);
	return v;
}

static __always_inline struct slot_val *slot_row(int vm, __u32 slot)
{
	struct slot_key key = { .vm = vm, .slot = slot };
	struct slot_val *v, *zero;
	__u32 index = 0;

	v = bpf_map_lookup_elem(&slots, &key);
	if (v)
		return v;
	zero = bpf_map_lookup_elem(&no_slot_val, &index);
	if (!zero)
		return NULL;
	bpf_map_update_elem(&slots, &key, zero, BPF_NOEXIST);
	v = bpf_map_lookup_elem(&slots, &key);
	if (!v)
		__sync_fetch_and_add(&lost, 1);
	return v;
}

static __always_inline void row_page(struct vcpu_val *v, __u64 offset)
{
	v->runs += !v->pages || offset != v->next;
	v->pages++;
	v->next = offset + 1;
}

static __always_inline void row_push(struct vcpu_val *v, __u64 offset,
				     __u32 used, __u32 entries)
{
	row_page(v, offset);
	v->used = used;
	v->entries = entries;
	if (v->epoch != epoch) {
		v->epoch = epoch;
		v->peak = used;
	} else if (used > v->peak) {
		v->peak = used;
	}
}

static __always_inline __u64 bucket(__u64 ns)
{
	__u64 msb = 0, v = ns;

	if (ns < 1 << BUCKET_BITS)
		return ns;
	if (v >> 32) {
		msb += 32;
		v >>= 32;
	}
	if (v >> 16) {
		msb += 16;
		v >>= 16;
	}
	if (v >> 8) {
		msb += 8;
		v >>= 8;
	}
	if (v >> 4) {
		msb += 4;
		v >>= 4;
	}
	if (v >> 2) {
		msb += 2;
		v >>= 2;
	}
	msb += v >> 1;
	return ((msb - BUCKET_BITS + 1) << BUCKET_BITS) +
	       ((ns >> (msb - BUCKET_BITS)) & ((1 << BUCKET_BITS) - 1));
}

/* Not static: so the verifier looks at it once and not with each of its calls. */
__noinline int row_time(struct slot_val *v, __u32 phase, __u64 ns)
{
	__u64 i = bucket(ns), max;
	int tries;

	if (!v || phase >= NR_PHASES)
		return 0;
	__sync_fetch_and_add(&v->sum[phase], ns);
	/* Whoever loses has met a larger one, and that at most so often. */
	for (tries = 0; tries < 16; tries++) {
		max = v->max[phase];
		if (ns <= max || __sync_val_compare_and_swap(&v->max[phase], max, ns) == max)
			break;
	}
	/* The verifier must see the very register that is used compared. */
	asm volatile("" : "+r"(i));
	if (i >= NR_BUCKETS)
		i = NR_BUCKETS - 1;
	__sync_fetch_and_add(&v->hist[phase][i], 1);
	return 0;
}

/* A call on a slot, or on all of them, has ended; its times are known if it was seen to begin. */
static __always_inline void row_call(struct slot_val *v, int ret)
{
	__u32 tid = bpf_get_current_pid_tgid(), now = epoch, was = v->epoch;
	struct call_val *c = bpf_map_lookup_elem(&calls, &tid);
	int i;

	if (ret < 0)
		__sync_fetch_and_add(&v->failed, 1);
	if (was != now && __sync_val_compare_and_swap(&v->epoch, was, now) == was) {
		for (i = 0; i < NR_PHASES; i++)
			v->max[i] = 0;
	}
	if (!c)
		return;
	row_time(v, PHASE_WAIT, c->ns[0]);
	row_time(v, PHASE_COLLECT, c->ns[1]);
	row_time(v, PHASE_PROTECT, c->ns[2]);
	row_time(v, PHASE_FLUSH, c->ns[3]);
	row_time(v, PHASE_TOTAL, c->ns[0] + c->ns[1] + c->ns[2] + c->ns[3]);
	bpf_map_delete_elem(&calls, &tid);
}

static __always_inline void row_harvest(struct slot_val *v, __u32 runs, __u64 pages,
					__u64 collected, __u32 flags, int ret)
{
	if (!v)
		return;
	if (ret >= 0)
		__sync_fetch_and_add(&v->harvests, 1);
	if (flags & KVM_DIRTY_HARVEST_MORE)
		__sync_fetch_and_add(&v->more, 1);
	__sync_fetch_and_add(&v->runs, runs);
	__sync_fetch_and_add(&v->pages, pages);
	__sync_fetch_and_add(&v->collected, collected);
	row_call(v, ret);
}

/*
 * Dirty slot rings.
 */

SEC("raw_tp/kvm_dirty_slot_ring_push")
int BPF_PROG(slot_ring_push, int vm, int vcpu, __u32 slot, __u64 offset,
	     __u64 used, __u32 entries)
{
	struct vcpu_val *v;

	if (unwanted(vm))
		return 0;
	v = vcpu_row(vm, slot, vcpu);
	if (v)
		row_push(v, offset, used, entries);
	return 0;
}

SEC("raw_tp/kvm_dirty_slot_ring_overflow")
int BPF_PROG(slot_ring_overflow, int vm, int vcpu, __u32 slot, __u64 offset,
	     __u32 npages)
{
	struct vcpu_val *v;

	if (unwanted(vm))
		return 0;
	v = vcpu_row(vm, slot, vcpu);
	if (!v)
		return 0;
	if (vcpu >= 0) {
		row_page(v, offset);
		v->overflowed++;
		/* It was as full as it gets. */
		v->used = v->entries;
		v->peak = v->entries;
		v->epoch = epoch;
	} else {
		__sync_fetch_and_add(&v->pages, npages);
		__sync_fetch_and_add(&v->overflowed, npages);
	}
	return 0;
}

SEC("raw_tp/kvm_dirty_slot_ring_exit")
int BPF_PROG(slot_ring_exit, int vm, int vcpu, __u32 slot)
{
	struct vcpu_val *v;

	if (unwanted(vm))
		return 0;
	v = vcpu_row(vm, slot, vcpu);
	if (v)
		v->exits++;
	return 0;
}

/*
 * What passes until a thread's next event is the time of the phase that it has come
 * to.  A call on all slots is at one of them after the other: their waits are its own.
 */
SEC("raw_tp/kvm_dirty_slot_log_phase")
int BPF_PROG(slot_log_phase, int vm, __u32 slot, __u32 phase)
{
	__u32 tid = bpf_get_current_pid_tgid();
	__u64 now = bpf_ktime_get_ns();
	struct call_val *c, begin;

	if (unwanted(vm))
		return 0;
	c = bpf_map_lookup_elem(&calls, &tid);
	if (phase == CALL_WAIT && !(c && c->slot == ALL_SLOTS && slot != ALL_SLOTS)) {
		begin = (struct call_val){ .slot = slot, .phase = phase, .since = now };
		if (bpf_map_update_elem(&calls, &tid, &begin, BPF_ANY))
			__sync_fetch_and_add(&lost, 1);
		return 0;
	}
	/* Not seen to begin: the tool came later. */
	if (!c)
		return 0;
	if (c->phase < NR_CALL_PHASES)
		c->ns[c->phase] += now - c->since;
	c->phase = phase;
	c->since = now;
	return 0;
}

SEC("raw_tp/kvm_dirty_slot_log_harvest")
int BPF_PROG(slot_log_harvest, int vm, __u32 slot, __u32 runs, __u64 pages,
	     __u64 collected, __u64 used, __u32 flags, int ret)
{
	if (!unwanted(vm))
		row_harvest(slot_row(vm, slot), runs, pages, collected, flags, ret);
	return 0;
}

SEC("raw_tp/kvm_dirty_slot_vm_harvest")
int BPF_PROG(slot_vm_harvest, int vm, __u32 logs, __u32 runs, __u64 pages,
	     __u32 flags, int ret)
{
	if (!unwanted(vm))
		row_harvest(slot_row(vm, ALL_SLOTS), runs, pages, 0, flags, ret);
	return 0;
}

SEC("raw_tp/kvm_dirty_slot_log_reset")
int BPF_PROG(slot_log_reset, int vm, __u32 slot, __u64 pages, __u64 used,
	     __u32 flags, int ret)
{
	struct slot_val *v;

	if (unwanted(vm))
		return 0;
	v = slot_row(vm, slot);
	if (!v)
		return 0;
	if (ret >= 0)
		__sync_fetch_and_add(&v->resets, 1);
	__sync_fetch_and_add(&v->collected, pages);
	row_call(v, ret);
	return 0;
}

/*
 * The upstream ring and the bitmap.  Only members that are used, of the types as
 * the kernel names them; where each is, libbpf looks up.
 */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct kvm {
	int userspace_pid;
	__u32 dirty_ring_size;
};

struct kvm_dirty_ring {
	__u32 dirty_index;
	__u32 reset_index;
	__u32 size;
};

struct hlist_node {
	struct hlist_node *next;
};

struct hlist_head {
	struct hlist_node *first;
};

struct preempt_notifier {
	struct hlist_node link;
};

struct kvm_vcpu {
	struct kvm *kvm;
	struct preempt_notifier preempt_notifier;
	int vcpu_id;
	struct kvm_dirty_ring dirty_ring;
};

struct kvm_dirty_slot_log;

struct kvm_memory_slot {
	__u64 base_gfn;
	unsigned long *dirty_bitmap;
	struct kvm_dirty_slot_log *dirty_slot_log;
	short id;
	__u16 as_id;
};

struct task_struct {
	struct hlist_head preempt_notifiers;
};

#pragma clang attribute pop

static __always_inline struct kvm_vcpu *ring_vcpu(struct kvm_dirty_ring *ring)
{
	return (void *)ring - bpf_core_field_offset(struct kvm_vcpu, dirty_ring);
}

SEC("raw_tp/kvm_dirty_ring_push")
int BPF_PROG(ring_push, struct kvm_dirty_ring *ring, __u32 slot, __u64 offset)
{
	struct kvm_vcpu *vcpu = ring_vcpu(ring);
	int vm = BPF_CORE_READ(vcpu, kvm, userspace_pid);
	struct vcpu_val *v;

	if (unwanted(vm))
		return 0;
	v = vcpu_row(vm, slot, BPF_CORE_READ(vcpu, vcpu_id));
	if (v)
		row_push(v, offset,
			 BPF_CORE_READ(ring, dirty_index) -
			 BPF_CORE_READ(ring, reset_index),
			 BPF_CORE_READ(ring, size));
	return 0;
}

SEC("raw_tp/kvm_dirty_ring_exit")
int BPF_PROG(ring_exit, struct kvm_vcpu *vcpu)
{
	int vm = BPF_CORE_READ(vcpu, kvm, userspace_pid);
	struct vcpu_val *v;

	if (unwanted(vm))
		return 0;
	v = vcpu_row(vm, ALL_SLOTS, BPF_CORE_READ(vcpu, vcpu_id));
	if (v)
		v->exits++;
	return 0;
}

SEC("raw_tp/kvm_dirty_ring_reset")
int BPF_PROG(ring_reset, struct kvm_dirty_ring *ring)
{
	int vm = BPF_CORE_READ(ring_vcpu(ring), kvm, userspace_pid);
	struct slot_val *v;

	if (unwanted(vm))
		return 0;
	/* KVM_RESET_DIRTY_RINGS does one ring after the other, under slots_lock. */
	v = slot_row(vm, ALL_SLOTS);
	if (v)
		v->resets++;
	return 0;
}

/* The vCPU that is loaded by the current thread: who else is told of preemption? */
static __always_inline struct kvm_vcpu *current_vcpu(void)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct hlist_node *node = BPF_CORE_READ(task, preempt_notifiers.first);

	if (!node)
		return NULL;
	return (void *)node -
	       bpf_core_field_offset(struct preempt_notifier, link) -
	       bpf_core_field_offset(struct kvm_vcpu, preempt_notifier);
}

/* Pages that the bitmap does not have yet; what the rings take has its own events. */
SEC("kprobe/mark_page_dirty_in_slot")
int BPF_KPROBE(bitmap_mark, struct kvm *kvm, struct kvm_memory_slot *slot,
	       __u64 gfn)
{
	unsigned long *bitmap, word;
	struct kvm_vcpu *vcpu;
	struct vcpu_val *v;
	__u64 offset;
	__u32 id;
	int vm;

	if (!slot)
		return 0;
	bitmap = BPF_CORE_READ(slot, dirty_bitmap);
	if (!bitmap)
		return 0;
	if (bpf_core_field_exists(slot->dirty_slot_log) &&
	    BPF_CORE_READ(slot, dirty_slot_log))
		return 0;
	vcpu = current_vcpu();
	if (vcpu && BPF_CORE_READ(kvm, dirty_ring_size))
		return 0;
	vm = BPF_CORE_READ(kvm, userspace_pid);
	if (unwanted(vm))
		return 0;

	offset = gfn - BPF_CORE_READ(slot, base_gfn);
	if (bpf_probe_read_kernel(&word, sizeof(word), bitmap + offset / 64) ||
	    word & 1UL << offset % 64)
		return 0;
	id = (__u32)BPF_CORE_READ(slot, as_id) << 16 |
	     (__u16)BPF_CORE_READ(slot, id);
	v = vcpu_row(vm, id, vcpu ? BPF_CORE_READ(vcpu, vcpu_id) : -1);
	if (v)
		row_push(v, offset, 0, 0);
	return 0;
}
