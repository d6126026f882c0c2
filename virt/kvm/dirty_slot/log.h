/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef __KVM_DIRTY_SLOT_LOG_H
#define __KVM_DIRTY_SLOT_LOG_H

/*
 * KVM dirty slot rings: which pages of a memslot were written, in time that
 * follows the pages written and not the size of the slot.
 *
 * Each memslot that logs dirty pages has a log (struct kvm_dirty_slot_log):
 *
 *	bitmap	 the truth: a page is in the log if and only if its bit is set;
 *	rings	 the index: one for each vCPU, where it pushes the pages whose
 *		 bits it set, mapped into userspace;
 *	overflow the index of what is in no ring, because the ring was full or no
 *		 vCPU wrote the page: a tree of bits over the words of the bitmap;
 *	busy	 a tree of bits over the rings: which of them may have something.
 *
 * A VM has a table of its logs, with a tree of bits over it: which of them may
 * have something (struct kvm_dirty_slot_vm).
 *
 * The files: summary.c has the trees, mark.c puts pages into a log, look.c finds
 * what is in it, batch.c takes pages out and re-protects them, harvest.c and vm.c
 * do all that for a memslot and for a VM, runs.c does what userspace says of
 * pages, fd.c is the log's file, life.c makes and unmakes it all.
 *
 * Invariants
 *
 * 1. Every set bit has a ring entry or an overflow bit of its own, or is about to
 *    get it and is named by ring->marking until then.  So nothing is lost.
 * 2. An entry whose page's bit is clear is stale and skipped.  So whoever clears
 *    a bit need not find its entry, and nothing is reported twice.
 * 3. reset <= consumer <= producer <= reset + entries, for whoever reads them in
 *    that order.  There is one copy of each: userspace maps producer and reset
 *    read-only for good.  Of what it can write the kernel reads consumer alone,
 *    once for each call, and checks it.
 * 4. A page is re-protected after its bit was cleared, never before: a fault
 *    between protecting and clearing would find the bit set, leave no entry, and
 *    the clear would then forget the write.
 * 5. Who makes an SPTE writable looks at the page's bit after that, and marks the
 *    page if it is clear.  A fault marks before, too; but re-protection, which keeps
 *    no fault out, may get in between and find nothing to protect.  Both are full
 *    barriers: install the SPTE, look at the bit; clear the bit, look at the SPTE.
 *    The SPTEs of a huge page that is split are as writable as it was, without a
 *    look: re-protection sees either the huge page, and takes mmu_lock for write, or
 *    a table that was complete before it was linked, as if it had always been there.
 * 6. Who has taken pages out holds log->outstanding until they are their caller's,
 *    or back in the log; and so does who marks pages for userspace, from when it
 *    finds that the slot still logs.  Else there could be pages in a log of which
 *    it had been said that none would come.  log->mutex is not held then, as it may
 *    wait for userspace.
 * 7. A ring that is not in busy has no entry that is not stale, and no mark in
 *    flight; a log that is not in the VM's tree has no busy ring and no overflow.
 *    "Quiet", below, says why.
 *
 * Who writes what
 *
 *	kern->producer, entries, ring->marking		the vCPU's thread
 *	kern->reset					the holder of log->mutex
 *	user->consumer					userspace, log->mutex holder
 *	bitmap						anybody, atomically
 *	overflow					sets anybody, clears log->mutex
 *	ring->active, busy				sets the vCPU's thread,
 *							clears log->mutex
 *	log->active, vm->index				sets mark_lock, clears also
 *							log->mutex and vm->logs'
 *
 * Barriers, besides those of atomic operations that return a value
 *
 *	A  ring_push() releases producer after writing the entry; whoever begins a
 *	   call, and userspace likewise, acquires it before reading the entry
 *	B  ring_give_back() releases reset after the entries were read; ring_mark()
 *	   acquires it before overwriting them
 *	C  userspace releases consumer after reading the entries; ring_look_at()
 *	   acquires it
 *	D  kvm_dirty_summary_set() and _clear() both write at one level, full
 *	   barrier, then read at the other: one of the two sees what the other did
 *	E  marks in flight: ring_mark() says in ring->marking which page it is about
 *	   to mark, before the atomic operation that sets the bit, and no sooner
 *	   than the page before is in the index (release).  A call begins with a full
 *	   barrier, acquires marking, then reads producer.  Who finds a bit set, or
 *	   comes after somebody who did, so finds the page in marking, or something
 *	   newer there and then the page below producer or in the overflow
 *	F  log_add_ring() releases the ring, then nr_rings, after it is complete
 *	G  quiet rings: ring_mark() reads ring->active and, if it is clear, sets it
 *	   and then busy (D), all before the bit.  See below
 *
 * Quiet
 *
 * Nobody looks at a ring that is not in busy, so a mark has to put it there before
 * the bit is set.  It does not look into busy each time, but at ring->active; and
 * to clear that is not enough to keep it from going on with what it had read.  So
 * a ring leaves busy in two steps: a call that finds nothing in it clears active;
 * it stays in busy, and is looked at, until every mark that can have read the old
 * value is over, that is, for a grace period of kvm->srcu, in which all marks of
 * vCPUs are made.  A later call that finds active still clear takes it out of busy,
 * full barrier, and looks at active again, as a mark sets active, full barrier,
 * then busy.
 *
 * A log without busy rings and without overflow leaves the VM's tree at once: marks
 * without a vCPU look at log->active under mark_lock, and so does who clears it;
 * marks of vCPUs look at it after they have set busy, full barrier, and who clears
 * it looks at busy again after that, full barrier, and only then clears the tree.
 * Whoever finds a log active goes on and relies on the tree: so it is in the tree
 * before it is active, and as long as it is; and nobody looks for logs in the tree,
 * for which there is the lock of vm->logs, while one is taken out of it.
 */

#include <linux/bits.h>
#include <linux/irq_work.h>
#include <linux/kref.h>
#include <linux/kvm_host.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/wait.h>
#include <linux/xarray.h>

#include <trace/events/kvm_dirty_slot_ring.h>

/* A slot has less than 2 ^ 31 pages in words of 64, and 64 ^ 5 > 2 ^ 25. */
#define SUMMARY_LEVELS		5

/**
 * struct kvm_dirty_summary - which of many things may have something
 * @level: a bit for each thing; above it, in the next level, a bit for each long
 *	that is not zero; and so on up to a single long
 * @bits: of each level
 * @nr_levels: at least one
 */
struct kvm_dirty_summary {
	unsigned long *level[SUMMARY_LEVELS];
	unsigned long bits[SUMMARY_LEVELS];
	int nr_levels;
};

int kvm_dirty_summary_init(struct kvm_dirty_summary *s, unsigned long bits);
void kvm_dirty_summary_free(struct kvm_dirty_summary *s);
void kvm_dirty_summary_fill(struct kvm_dirty_summary *s);
bool kvm_dirty_summary_set(struct kvm_dirty_summary *s, unsigned long bit);
void kvm_dirty_summary_clear(struct kvm_dirty_summary *s, unsigned long bit);
unsigned long kvm_dirty_summary_next(struct kvm_dirty_summary *s,
				     unsigned long bit);
unsigned long kvm_dirty_summary_peek(struct kvm_dirty_summary *s,
				     unsigned long bit);

static inline bool kvm_dirty_summary_empty(const struct kvm_dirty_summary *s)
{
	return !READ_ONCE(*s->level[s->nr_levels - 1]);
}

/* Entries in a line of a cache. */
#define ENTRIES_PER_LINE	(L1_CACHE_BYTES / sizeof(struct kvm_dirty_run))

/* One ring: of one vCPU, in the log of one memslot. */
struct kvm_dirty_slot_ring {
	/* Mapped by userspace: what their types say. */
	struct kvm_dirty_slot_ring_user *user;
	struct kvm_dirty_slot_ring_kern *kern;
	struct kvm_dirty_run *runs;

	/* Written by the vCPU's thread: the page it marked last, or marks now. */
	u32 marking;
	/* See "Quiet". */
	bool active;

	/* Used under log->mutex. */
	bool leaving ____cacheline_aligned_in_smp; /* not active, see log->gp */
	u64 consumer;		/* as the call that holds the mutex read it... */
	u64 cursor;		/* ...and how far it re-protected */
};

/*
 * The log of one memslot.  The memslot holds one reference, each file and the
 * VM's table one, so that a log outlives its slot; it does not hold the VM.
 */
struct kvm_dirty_slot_log {
	struct kref ref;
	u32 slot;		/* as_id << 16 | id */
	u32 entries;		/* of each ring: no more than the slot has pages */
	u32 flags;		/* as the capability said, if the rings are as it said */
	u32 wake_level;		/* entries in a ring that make poll() call */
	u32 nr;			/* its number in the VM, never used again */
	u32 index;		/* its place in vm->logs */
	int pid;		/* the VM's name in traces */
	unsigned long npages, nr_words;
	u64 base_gfn;		/* when it stopped logging */

	unsigned long *bitmap;	/* the memslot's dirty_bitmap, both halves */
	struct kvm_dirty_summary overflow, busy;

	/* Serializes marks made without a vCPU; taken in any context. */
	raw_spinlock_t mark_lock;
	bool active;		/* it is in vm->index, see "Quiet" */
	bool listed;		/* it is in vm->logs; cleared under mark_lock */
	bool live;		/* its memslot is, or was, one */

	/* Protects kvm, which is NULL when the slot has stopped logging. */
	spinlock_t kvm_lock;
	struct kvm *kvm;
	struct kvm_dirty_slot_vm *vm;

	/*
	 * Serializes all that moves the rings' markers and clears overflow bits.
	 * Outside of mmap_lock and kvm->srcu, never taken by the rest of KVM, and
	 * never held while userspace is waited for.
	 */
	struct mutex mutex;
	u32 next;		/* where the next harvest begins: a ring, or nr_rings */
	unsigned long next_word; /* and where in the overflow */
	bool gp_started;	/* for the rings that are leaving... */
	unsigned long gp;	/* ...a grace period of kvm->srcu */

	atomic_t outstanding;	/* see invariant 6 */
	struct kvm_dirty_slot_call *spare; /* for one call at a time */

	wait_queue_head_t wait;
	struct irq_work wake;

	/* Consumers, a page for so many rings, as rings come. */
	struct kvm_dirty_slot_ring_user **consumers;
	u32 max_rings;
	u32 nr_rings;		/* grows, under slots_lock, see barrier F */
	/*
	 * The ring of vCPU n is rings[n + 1]: there is none at 0, for a vCPU that
	 * has no place yet.
	 */
	struct kvm_dirty_slot_ring *rings[];
};

/* Consumers in a page of their area, and pages that @rings consumers take. */
#define CONSUMERS_PER_PAGE	(PAGE_SIZE / KVM_DIRTY_SLOT_CONSUMER_STRIDE)
#define CONSUMER_PAGES(rings)	DIV_ROUND_UP(rings, CONSUMERS_PER_PAGE)

/* More than there can be memslots at once; the rest is for deleted ones. */
#define VM_MAX_LOGS		BIT(17)

/* All logs of a VM.  The VM holds one reference, each log and each file one. */
struct kvm_dirty_slot_vm {
	struct kref ref;

	/* Protects kvm, which is NULL when the VM is gone. */
	spinlock_t kvm_lock;
	struct kvm *kvm;

	/*
	 * The logs of all memslots that log, with a reference; and as long as
	 * there are files, those of others that have something left.
	 */
	struct xarray logs;
	struct kvm_dirty_summary index;	/* over @logs */
	u32 nr_files;		/* under the lock of @logs */
	u32 layout;		/* likewise: counts changes of @logs */

	u32 nr_logs;		/* made so far, under slots_lock */
	int pid;		/* the VM's name in traces */
	bool gp_started;	/* a grace period of kvm->srcu ever was */

	wait_queue_head_t wait;
};

/*
 * How much a call takes from a log before it copies it out and re-protects it.
 * Bounds the time between two looks at signals, and the call's memory.
 */
#define BATCH_MASKS		256
#define BATCH_RUNS		384
/* A call notes that many rings without asking for memory; a call is 8 KiB. */
#define CALL_SPANS		46
/* Entries that are looked at, stale or not, between two looks at signals. */
#define CALL_STEP		4096
/*
 * So many pages, half of the entries that there are, and a batch, may a call have beyond
 * the entries it has read.
 */
#define CALL_AHEAD		4096

/* What a call has to take from one ring, or from the overflow. */
struct kvm_dirty_slot_span {
	u64 limit;		/* producer when the call began */
	u32 ring;		/* SPAN_OVERFLOW: none */
	u32 in_flight;		/* marking then, if its bit was set; NO_PAGE */
};

#define SPAN_OVERFLOW		U32_MAX
#define NO_PAGE			U32_MAX

/* What is left of a call's way through a log when it stops. */
enum take {
	TAKE_DONE,		/* nothing */
	TAKE_FULL,		/* the array, or the batch, is full */
	TAKE_SIGNAL,
};

/* A call that takes pages out, and its way through one log. */
struct kvm_dirty_slot_call {
	struct kvm *kvm;	/* with a reference, NULL if nothing is protected */
	bool spare;		/* it belongs to a log */
	bool flush;		/* something was protected, flush TLBs */

	/* The log: its rings and its overflow, from @span on. */
	u32 nr_rings, max_spans, nr_spans, span;
	struct kvm_dirty_slot_span *spans, few[CALL_SPANS];
	unsigned long word, start; /* the overflow: this far, and all around */
	bool around;
	bool others;		/* other calls have pages of it */
	bool collected;		/* userspace has collected something */
	bool gp_done, leave;	/* see "Quiet" */
	u32 budget;		/* of CALL_STEP */
	s64 ahead;		/* of CALL_AHEAD */
	bool served;		/* it has something of @span */
	u64 used;		/* entries in all rings, for traces */

	/* A batch: taken from the bitmap, to be copied out and re-protected. */
	int nr_masks, nr_runs, max_runs;
	struct kvm_dirty_run *plenty; /* up to here any word still fits; NULL: never */
	u32 run_end;		/* the page after the last run */
	u64 nr_pages;
	struct kvm_dirty_slot_mask masks[BATCH_MASKS];
	struct kvm_dirty_run runs[BATCH_RUNS];
};

/**
 * struct kvm_dirty_slot_sink - where a HARVEST puts what it takes
 * @store: stores the runs of the call's batch, all or, with -EFAULT, none
 * @left: runs that there is room for
 * @stored: some were
 * @more: there may be more to be had, as @store can tell already
 * @collected: pages that userspace had collected, re-protected
 */
struct kvm_dirty_slot_sink {
	int (*store)(struct kvm_dirty_slot_sink *sink,
		     const struct kvm_dirty_slot_log *log,
		     const struct kvm_dirty_slot_call *call);
	u32 left;
	bool stored, more;
	u64 collected;
};

/* Where a call is, for those who want to know how long it stays there. */
enum {
	KVM_DIRTY_SLOT_PHASE_WAIT,	/* for hardware, and for others */
	KVM_DIRTY_SLOT_PHASE_COLLECT,
	KVM_DIRTY_SLOT_PHASE_PROTECT,
	KVM_DIRTY_SLOT_PHASE_FLUSH,
	KVM_DIRTY_SLOT_PHASE_END,
};

/* mark.c */
void kvm_dirty_slot_log_activate(struct kvm_dirty_slot_log *log);
void kvm_dirty_slot_log_spill(struct kvm_dirty_slot_log *log, unsigned long word);
unsigned int kvm_dirty_slot_log_mark_word(struct kvm_dirty_slot_log *log,
					  struct kvm *kvm, unsigned long word,
					  unsigned long mask);
int kvm_dirty_slot_sync_hw(struct kvm *kvm, bool interruptible);

/* batch.c */
struct kvm_dirty_slot_call *kvm_dirty_slot_call_alloc(void);
struct kvm_dirty_slot_call *kvm_dirty_slot_call_get(struct kvm_dirty_slot_log *log);
void kvm_dirty_slot_call_put(struct kvm_dirty_slot_log *log,
			     struct kvm_dirty_slot_call *call);
void kvm_dirty_slot_batch_protect(struct kvm_dirty_slot_log *log,
				  struct kvm_dirty_slot_call *call);
void kvm_dirty_slot_batch_undo(struct kvm_dirty_slot_log *log,
			       struct kvm_dirty_slot_call *call);
void kvm_dirty_slot_call_flush(struct kvm_dirty_slot_call *call);

/* look.c */
int kvm_dirty_slot_log_look_at(struct kvm_dirty_slot_log *log,
			       struct kvm_dirty_slot_call *call, bool all);

/* harvest.c */
int kvm_dirty_slot_log_drain(struct kvm_dirty_slot_log *log,
			     struct kvm_dirty_slot_call *call,
			     struct kvm_dirty_slot_sink *sink, bool all);
bool kvm_dirty_slot_log_ready(struct kvm_dirty_slot_log *log, u32 level);
long kvm_dirty_slot_log_harvest(struct kvm_dirty_slot_log *log, void __user *argp);
long kvm_dirty_slot_log_reset(struct kvm_dirty_slot_log *log, void __user *argp);

/* runs.c */
long kvm_dirty_slot_log_mark_runs(struct kvm_dirty_slot_log *log,
				  void __user *argp);
long kvm_dirty_slot_log_discard_runs(struct kvm_dirty_slot_log *log,
				     void __user *argp);

/* fd.c */
int kvm_dirty_slot_log_open(struct kvm_dirty_slot_log *log);

/* vm.c */
int kvm_dirty_slot_vm_open(struct kvm_dirty_slot_vm *vm);
int kvm_dirty_slot_vm_add(struct kvm_dirty_slot_vm *vm,
			  struct kvm_dirty_slot_log *log);
void kvm_dirty_slot_vm_changed(struct kvm_dirty_slot_vm *vm);
void kvm_dirty_slot_vm_remove(struct kvm_dirty_slot_log *log, bool keep);

/* life.c */
void kvm_dirty_slot_log_free(struct kref *ref);
struct kvm *kvm_dirty_slot_log_get_kvm(struct kvm_dirty_slot_log *log, bool *dead);
struct kvm_memory_slot *kvm_dirty_slot_log_memslot(struct kvm_dirty_slot_log *log,
						   struct kvm *kvm);
void kvm_dirty_slot_vm_put(struct kvm_dirty_slot_vm *vm);
void kvm_dirty_slot_module_get(void);
void kvm_dirty_slot_module_put(void);

static inline void log_put(struct kvm_dirty_slot_log *log)
{
	kref_put(&log->ref, kvm_dirty_slot_log_free);
}

/* Pages of a ring's mapping. */
static inline unsigned long ring_pages(u32 entries)
{
	return KVM_DIRTY_SLOT_RING_ENTRIES_PAGE +
	       DIV_ROUND_UP(entries * sizeof(struct kvm_dirty_run), PAGE_SIZE);
}

/* Rings 0 to the result - 1 can be used. */
static inline u32 log_nr_rings(const struct kvm_dirty_slot_log *log)
{
	return smp_load_acquire(&log->nr_rings); /* F */
}

/* One of them. */
static inline struct kvm_dirty_slot_ring *
log_nth_ring(const struct kvm_dirty_slot_log *log, u32 n)
{
	return log->rings[n + 1];
}

static inline u64 ring_used(const struct kvm_dirty_slot_ring *ring)
{
	/* In this order: reset never passes a producer read after it. */
	u64 reset = smp_load_acquire(&ring->kern->reset); /* B */

	return READ_ONCE(ring->kern->producer) - reset;
}

static inline void log_phase(const struct kvm_dirty_slot_log *log, int phase)
{
	trace_kvm_dirty_slot_log_phase(log->pid, log->slot, phase);
}

#endif /* __KVM_DIRTY_SLOT_LOG_H */
