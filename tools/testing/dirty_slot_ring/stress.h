/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef DIRTY_SLOT_RING_STRESS_H
#define DIRTY_SLOT_RING_STRESS_H

/*
 * The cases of the test, and what they share.
 */

#include "sim.h"

struct stress_case {
	const char *name, *what;
	/* Goes on for @ms, if it is one that does; comes back if all was well. */
	void (*run)(unsigned int ms);
};

extern const struct stress_case vm_cases[];	/* vmlog.c */
extern const struct stress_case fixed_cases[];	/* fixed.c */

/* The name of the case that runs. */
extern const char *case_name;

void __printf(1, 2) __noreturn fail(const char *fmt, ...);
u32 random_u32(u64 *state);
u64 now_ms(void);

/* What mark_page_dirty_in_slot() calls beside the log's code; NULL: nothing. */
extern void (*on_mark)(const struct kvm_memory_slot *memslot, gfn_t gfn);

/* KVM writes to guest memory, not through the page table, then marks the page. */
u64 write_as_kvm(struct kvm_vcpu *vcpu, gfn_t gfn);

/* In a vCPU's thread; it may be preempted in the midst of the mark, to write @other. */
u64 write_as_vcpu(struct kvm_vcpu *vcpu, gfn_t gfn, gfn_t other);

#endif /* DIRTY_SLOT_RING_STRESS_H */
