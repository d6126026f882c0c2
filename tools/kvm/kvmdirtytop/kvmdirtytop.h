/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What kvmdirtytop's BPF programs and its userspace side share: the maps' keys
 * and values.  Counts grow and are never set back by userspace, which shows
 * differences; so nothing is lost between two looks.
 */
#ifndef KVMDIRTYTOP_H
#define KVMDIRTYTOP_H

/* Where pages come from.  vcpu is -1 for pages that no vCPU wrote. */
struct vcpu_key {
	int vm;
	__u32 slot;
	int vcpu;
};

/**
 * struct vcpu_val - what a vCPU logged in one memslot
 * @pages: pages that joined the log
 * @runs: of pages that followed one another in the log and in the memslot; pages
 *	without a vCPU have none
 * @overflowed: of @pages, those that are in no ring
 * @exits: exits to userspace because of a full ring
 * @next: the page after the newest, which would make its run longer
 * @used: entries in use at the last push
 * @peak: the most of them since @epoch began
 * @entries: capacity of the ring, 0 if there is none
 * @epoch: the value of the global epoch at the last push
 */
struct vcpu_val {
	__u64 pages;
	__u64 runs;
	__u64 overflowed;
	__u64 exits;
	__u64 next;
	__u32 used;
	__u32 peak;
	__u32 entries;
	__u32 epoch;
};

/*
 * Where pages go to.  slot is ALL_SLOTS for a call on the whole VM; so the kernel
 * calls it, too.
 */
struct slot_key {
	int vm;
	__u32 slot;
};

#define ALL_SLOTS	(~0U)

enum phase {
	PHASE_TOTAL,
	PHASE_WAIT,
	PHASE_COLLECT,
	PHASE_PROTECT,
	PHASE_FLUSH,
	NR_PHASES,
};

/* The same, as the kernel's events count them; what comes after these is the end. */
#define CALL_WAIT	0
#define NR_CALL_PHASES	4

/**
 * struct call_val - a call on a log that is under way
 * @ns: time in each phase so far
 * @since: when the phase began
 * @slot: whose log, or ALL_SLOTS
 * @phase: as the kernel counts them
 */
struct call_val {
	__u64 ns[NR_CALL_PHASES];
	__u64 since;
	__u32 slot;
	__u32 phase;
};

/*
 * Times fall into buckets an eighth of a power of two wide: below 8 ns one for
 * each, then 8 for each power up to 2^37 ns, over two minutes.
 */
#define BUCKET_BITS	3
#define NR_BUCKETS	((37 - BUCKET_BITS + 1) << BUCKET_BITS)

/**
 * struct slot_val - the calls that took pages out of a memslot's log
 * @harvests: successful harvests
 * @resets: successful resets
 * @failed: either, if it failed
 * @more: harvests whose array was too small
 * @runs: runs that harvests stored
 * @pages: pages in them
 * @collected: pages that were read from the mapping and re-protected; of calls
 *	on the whole VM nobody tells
 * @sum: time in each phase of all calls, in nanoseconds
 * @max: the longest since @epoch began
 * @epoch: the value of the global epoch at the last call
 * @hist: calls by the time they took
 */
struct slot_val {
	__u64 harvests;
	__u64 resets;
	__u64 failed;
	__u64 more;
	__u64 runs;
	__u64 pages;
	__u64 collected;
	__u64 sum[NR_PHASES];
	__u64 max[NR_PHASES];
	__u32 epoch;
	__u32 pad;
	__u32 hist[NR_PHASES][NR_BUCKETS];
};

#endif /* KVMDIRTYTOP_H */
