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
extern const struct stress_case idle_cases[];	/* idle.c */
extern const struct stress_case strange_cases[];	/* strange.c */

/* The name of the case that runs. */
extern const char *case_name;

void __printf(1, 2) __noreturn fail(const char *fmt, ...);
u32 random_u32(u64 *state);
u64 now_ms(void);

/*
 * rounds.c: threads that do what they do until rounds_go_on() says no.  In it all of
 * them stand still at the end of each round, a vCPU outside of the guest; round_ends()
 * tells who should get there soon.  rounds_run() calls @check while they do, goes on for
 * @ms but for one round at least, joins the threads and returns how many rounds it was.
 */
void rounds_begin(unsigned int nr_threads);
void rounds_start(void *(*fn)(void *), void *arg);
unsigned int rounds_run(unsigned int ms, void (*check)(void *arg), void *arg);
bool rounds_go_on(struct kvm_vcpu *vcpu);
bool round_ends(void);

/* What mark_page_dirty_in_slot() calls beside the log's code; NULL: nothing. */
extern void (*on_mark)(const struct kvm_memory_slot *memslot, gfn_t gfn, int n);

/* KVM writes to guest memory, not through the page table, then marks the page. */
u64 write_as_kvm(struct kvm_vcpu *vcpu, gfn_t gfn);

/* In a vCPU's thread; it may be preempted in the midst of the mark, to write @other. */
u64 write_as_vcpu(struct kvm_vcpu *vcpu, gfn_t gfn, gfn_t other);

#endif /* DIRTY_SLOT_RING_STRESS_H */
