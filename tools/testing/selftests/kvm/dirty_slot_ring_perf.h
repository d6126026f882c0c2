/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of the perf test of dirty slot rings know of each other, see
 * dirty_slot_ring_perf_test.c.
 */
#ifndef SELFTEST_KVM_DIRTY_SLOT_RING_PERF_H
#define SELFTEST_KVM_DIRTY_SLOT_RING_PERF_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#include "dirty_slot_ring.h"
#include "dirty_slot_ring_guest.h"

#define MAX_VCPUS		8
#define MAX_ITERATIONS		100
#define MAX_SLOTS		64
#define WORD_PAGES		64ul

/* The slot under test.  Below it is room for the list and for slot 0. */
#define DATA_SLOT		10
#define DATA_GPA		0x100000000ul
#define DATA_GVA		0x8000000000ul

/* A slot of u32 page numbers, which does not log. */
#define LIST_SLOT		11
#define LIST_GPA		0x40000000ul
#define LIST_GVA		0x40000000ul

/* --stall: pages that the second vCPU may write at most, and what it writes. */
#define MAX_PROBES		60000
#define PROBE_VALUE		0x70726f6265ul

/* The pages of a slot are wrong: says so, and ends the test. */
void __noreturn __printf(1, 2) fail(const char *fmt, ...);

/* -- the guest ------------------------------------------------------------ */

/* The guest's copy is the one that both sides use. */
struct mailbox {
	uint64_t first;			/* of the list, and how many of it */
	uint64_t nr;
	uint64_t value;			/* what to write */
	uint64_t cycles;		/* by the guest: how long that took */
	uint64_t done;			/* by the guest, if @one_by_one: written so far */
	uint64_t one_by_one;		/* time each write, in place of its list entry... */
	uint64_t armed;			/* ...while this is set... */
	uint64_t stop;			/* ...until this is */
};

/* -- one run -------------------------------------------------------------- */

enum order { ORDER_RANDOM, ORDER_IN_ORDER, NR_ORDERS };

extern const char * const order_names[NR_ORDERS];

struct params {
	uint64_t size;			/* of the slot, in bytes */
	uint32_t nr_dirty;		/* pages that each iteration writes */
	enum order order;
	int nr_vcpus;
	int iterations;
	int nr_slots;			/* for --memory; the first is the one that is written */
	uint32_t nr_probes;		/* for --stall: pages after the nr_dirty in the list */
	uint32_t entries;		/* of each ring; 0: see --help */
	uint64_t seed;
};

/* One iteration, in ns. */
struct sample {
	uint64_t dirty;			/* KVM_RUN, by the host's clock */
	uint64_t guest;			/* the loop in the guest, by its clock */
	uint64_t harvest;		/* until userspace has the pages */
	uint64_t reprotect;		/* until they are armed again */
};

struct run {
	const struct params *p;
	const struct mode *mode;
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu[MAX_VCPUS];
	struct mailbox *mb[MAX_VCPUS];
	uint64_t tsc_khz;

	uint64_t npages;
	uint8_t *data;			/* the slot's memory */
	uint32_t *list;			/* what LIST_SLOT holds */
	unsigned long *expected;	/* one bit for each page of the slot: to be reported */
	unsigned long *probes;		/* likewise: of the second vCPU of --stall */

	/* What the mode reported: pages, or runs if it has those. */
	uint32_t *pages;
	uint64_t nr_pages;
	struct kvm_dirty_run *runs;
	uint64_t nr_runs;

	/* Of the modes. */
	unsigned long *bitmap;
	bool *dirty_chunk;
	int log_fd;
	uint32_t entries;

	struct sample now, samples[MAX_ITERATIONS];
	uint64_t enable, populate, empty;
	unsigned int full_exits;
	unsigned int may_repeat;	/* so many pages may be reported twice */

	/* --stall: what a write took in ns, next to a harvest and without one */
	struct stall *stall;

	/* --memory: bytes that the log took, as the kernel accounts for them */
	struct memory {
		int64_t vmalloc, slab, free;
	} memory;
};

struct stall {
	pthread_t thread;
	bool own_cpu, ready, stop;
	uint64_t armed;
	uint32_t used;			/* of the pages for probes */
	uint32_t nr[2];
	uint32_t ns[2][MAX_PROBES];	/* [0] without, [1] with a harvest beside */
};

/*
 * A mode reports pages in two timed steps, harvest() and then reprotect(), which
 * is NULL if the former does all.  Both may be called at any time.
 */
struct mode {
	const char *name;
	bool (*supported)(void);
	void (*create)(struct run *r);		/* no vCPU exists yet */
	void (*start)(struct run *r);		/* the slot logs */
	void (*stop)(struct run *r);
	void (*harvest)(struct run *r);
	void (*reprotect)(struct run *r);
};

enum { NR_MODES = 3 };

extern const struct mode modes[NR_MODES];

/* -- what can be asked for ------------------------------------------------ */

struct question {
	const char *name, *heading;
	void (*measure)(struct run *r);
	void (*report)(const struct run *r);
	void (*json)(FILE *f, const struct run *r);
};

enum { ASK_COST, ASK_STALL, ASK_MEMORY, NR_QUESTIONS };

extern const struct question questions[NR_QUESTIONS];

void measure(struct run *r);
void stall(struct run *r);
void measure_memory(struct run *r);

void report_json(FILE *f, const struct question *q, const struct run *r);

#endif /* SELFTEST_KVM_DIRTY_SLOT_RING_PERF_H */
