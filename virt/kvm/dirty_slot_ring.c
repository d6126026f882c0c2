// SPDX-License-Identifier: GPL-2.0-only
/*
 * KVM dirty slot rings: which pages of a memslot were written, in time that
 * follows the pages written and not the size of the slot.
 *
 * Each memslot that logs dirty pages has a log (struct kvm_dirty_slot_log):
 *
 *	bitmap	 the truth: a page is in the log if and only if its bit is set;
 *	rings	 the index: one for each vCPU, where it pushes the pages whose
 *		 bits it set, mapped into userspace;
 *	summary	 the index of what is in no ring, because the ring was full or no
 *		 vCPU wrote the page: a tree of bits over the words of the bitmap.
 *
 * Invariants
 *
 * 1. Every set bit has a ring entry or a summary bit of its own, or is about to
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
 * 5. Re-protection holds mmu_lock for write.  The fault path marks a page before
 *    it installs the writable SPTE, under mmu_lock for read; were re-protection
 *    to get in between, it would find nothing to protect, and later writes
 *    through that SPTE would be lost.
 *
 * Who writes what
 *
 *	kern->producer, entries, ring->marking		the vCPU's thread
 *	kern->reset					the holder of log->mutex
 *	user->consumer					userspace, log->mutex holder
 *	bitmap						anybody, atomically
 *	summary						sets anybody, clears log->mutex
 *
 * Barriers, besides those of atomic operations that return a value
 *
 *	A  ring_push() releases producer after writing the entry; log_snapshot(),
 *	   and userspace likewise, acquires it before reading the entry
 *	B  log_publish() releases reset after the entries were read; ring_push()
 *	   acquires it before overwriting them
 *	C  userspace releases consumer after reading the entries; log_snapshot()
 *	   acquires it
 *	D  summary_set() and summary_clear() both write at one level, full barrier,
 *	   then read at the other: one of the two sees what the other did
 *	E  marks in flight: ring_mark() says in ring->marking which page it is about
 *	   to mark, before the atomic operation that sets the bit, and no sooner
 *	   than the page before is in the index (release).  log_snapshot(): full
 *	   barrier, acquire marking, then read producer.  Who finds a bit set, or
 *	   comes after somebody who did, so finds the page in marking, or something
 *	   newer there and then the page below producer or in the summary
 *	F  log_add_ring() releases the ring, then nr_rings, after it is complete
 */

#include <linux/anon_inodes.h>
#include <linux/bitops.h>
#include <linux/delay.h>
#include <linux/irq_work.h>
#include <linux/kvm_host.h>
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/nospec.h>
#include <linux/poll.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#define CREATE_TRACE_POINTS
#include <trace/events/kvm_dirty_slot_ring.h>

#define RING_DEFAULT_ENTRIES	4096

/* A slot has less than 2 ^ 31 pages in words of 64, and 64 ^ 5 > 2 ^ 25. */
#define SUMMARY_LEVELS		5

/*
 * How much a call takes from the log before it copies it out and re-protects
 * it.  Bounds the time between two looks at signals, and the log's own memory.
 */
#define BATCH_MASKS		256
#define BATCH_RUNS		500	/* with the masks, not quite 8 KiB */

/* One ring: of one vCPU, in the log of one memslot. */
struct kvm_dirty_slot_ring {
	/* Mapped by userspace: what their types say, in one vmalloc area. */
	struct kvm_dirty_slot_ring_user *user;
	struct kvm_dirty_slot_ring_kern *kern;
	struct kvm_dirty_run *runs;

	/* Written by the vCPU's thread: the page it marked last, or marks now. */
	u32 marking;

	/* Used under log->mutex. */
	u64 cursor ____cacheline_aligned_in_smp; /* a call got so far... */
	u64 end;		/* ...of so far */
	u64 consumer;		/* as the call under way read it, checked */
	u64 limit;		/* producer as the call under way read it */
	u32 in_flight;		/* marking as the call under way read it */
};

/* Where a call's time went, in ns; of use only to those who trace it. */
struct kvm_dirty_slot_times {
	u64 last;		/* 0: nobody listens */
	u64 wait, collect, protect, flush;
};

/* What a call took from the bitmap and has yet to copy out and re-protect. */
struct kvm_dirty_slot_batch {
	int nr_masks, nr_runs, max_runs;
	int plenty;		/* so many runs, and any word still fits */
	u32 run_end;		/* the page after the last run */
	bool flush;		/* something was protected, flush TLBs */
	u64 nr_pages;
	unsigned long pos;	/* the summary is done up to this word */
	struct kvm_dirty_slot_times times;
	struct kvm_dirty_slot_mask masks[BATCH_MASKS];
	struct kvm_dirty_run runs[BATCH_RUNS];
};

/*
 * The log of one memslot.  The memslot holds one reference, each file one, so
 * that a log outlives its slot; it does not hold the VM.
 */
struct kvm_dirty_slot_log {
	struct kref ref;
	u32 slot;		/* as_id << 16 | id */
	u32 entries, flags;	/* as the capability said */
	u32 wake_level;		/* entries in a ring that make poll() call */
	int vm;			/* the VM's name in traces */
	unsigned long npages, nr_words;
	u64 base_gfn;		/* when it stopped logging */

	unsigned long *bitmap;	/* the memslot's dirty_bitmap, both halves */
	unsigned long *summary[SUMMARY_LEVELS];
	unsigned long summary_bits[SUMMARY_LEVELS];
	int nr_levels;

	/* Serializes marks made without a vCPU; taken in any context. */
	raw_spinlock_t mark_lock;

	/* Protects kvm, which is NULL when the slot has stopped logging. */
	spinlock_t kvm_lock;
	struct kvm *kvm;

	/*
	 * Serializes all that takes pages out.  Outside of mmap_lock and
	 * kvm->srcu; never taken by the rest of KVM, so that a reader who sits
	 * in a page fault holds up other readers of this log and nobody else.
	 */
	struct mutex mutex;
	struct kvm_dirty_slot_batch *batch;

	wait_queue_head_t wait;
	struct irq_work wake;

	u32 nr_rings;		/* grows, under slots_lock, see barrier F */
	struct kvm_dirty_slot_ring *rings[];
};

static unsigned long ring_pages(u32 entries)
{
	return KVM_DIRTY_SLOT_RING_ENTRIES_PAGE +
	       DIV_ROUND_UP(entries * sizeof(struct kvm_dirty_run), PAGE_SIZE);
}

/* Rings 0 to the result - 1 can be used. */
static u32 log_nr_rings(const struct kvm_dirty_slot_log *log)
{
	return smp_load_acquire(&log->nr_rings); /* F */
}

/* The ring of a vCPU, NULL if it has none yet. */
static struct kvm_dirty_slot_ring *log_ring(const struct kvm_dirty_slot_log *log,
					    const struct kvm_vcpu *vcpu)
{
	/* F, by the dependency on the address. */
	return READ_ONCE(log->rings[vcpu->vcpu_idx]);
}

static u64 ring_used(const struct kvm_dirty_slot_ring *ring)
{
	/* In this order: reset never passes a producer read after it. */
	u64 reset = smp_load_acquire(&ring->kern->reset); /* B */

	return READ_ONCE(ring->kern->producer) - reset;
}

/*
 * The summary: bit w of level 0 says that word w of the bitmap may hold pages
 * that no ring knows; bit b of level n + 1 says that word b of level n is not
 * zero.  The last level is one word.
 */
static unsigned long *summary_top(const struct kvm_dirty_slot_log *log)
{
	return log->summary[log->nr_levels - 1];
}

static void summary_set(struct kvm_dirty_slot_log *log, int level,
			unsigned long bit)
{
	unsigned long *p, mask;

	/*
	 * All the way up, also where a bit is set already: whoever set it may
	 * not have got any further yet.
	 */
	for (; level < log->nr_levels; level++, bit /= BITS_PER_LONG) {
		p = log->summary[level] + BIT_WORD(bit);
		mask = BIT_MASK(bit);
		if (READ_ONCE(*p) & mask) {
			smp_mb(); /* D */
			continue;
		}
		/* D.  Who makes the last level other than zero wakes poll(). */
		if (!atomic_long_fetch_or(mask, (atomic_long_t *)p) &&
		    level == log->nr_levels - 1)
			irq_work_queue(&log->wake);
	}
}

/* Under log->mutex. */
static void summary_clear(struct kvm_dirty_slot_log *log, int level,
			  unsigned long bit)
{
	for (;;) {
		clear_bit(bit, log->summary[level]);
		smp_mb__after_atomic(); /* D */

		/* The caller looks below level 0, that is, into the bitmap. */
		if (level && READ_ONCE(log->summary[level - 1][bit])) {
			summary_set(log, level, bit);
			return;
		}

		bit /= BITS_PER_LONG;
		if (READ_ONCE(log->summary[level][bit]) ||
		    ++level == log->nr_levels)
			return;
	}
}

/*
 * The first word of the bitmap, from @word on, that the summary knows; nr_words
 * if there is none.  Under log->mutex.
 */
static unsigned long summary_next(struct kvm_dirty_slot_log *log,
				  unsigned long word)
{
	unsigned long bit = word, i, val;
	int level = 0;

	for (;;) {
		i = bit / BITS_PER_LONG;
		val = 0;
		if (bit < log->summary_bits[level])
			val = READ_ONCE(log->summary[level][i]) &
			      (~0UL << (bit % BITS_PER_LONG));
		if (val) {
			bit = i * BITS_PER_LONG + __ffs(val);
			if (!level--)
				return bit;
			bit *= BITS_PER_LONG;
			continue;
		}

		if (level + 1 == log->nr_levels)
			return log->nr_words;

		/*
		 * A bit above an empty word: its summary_set() was overtaken by
		 * the summary_clear() of what it had set below.
		 */
		if (bit < log->summary_bits[level] && !(bit % BITS_PER_LONG) &&
		    test_bit(i, log->summary[level + 1]))
			summary_clear(log, level + 1, i);
		bit = i + 1;
		level++;
	}
}

/*
 * Marking.
 */

static void ring_full(struct kvm_dirty_slot_log *log, struct kvm_vcpu *vcpu)
{
	if (log->flags & KVM_DIRTY_SLOT_RING_EXIT_ON_FULL)
		kvm_make_request(KVM_REQ_DIRTY_SLOT_RING_FULL, vcpu);
}

/* The bit of @offset has just been set and there is room for its entry. */
static __always_inline void ring_push(struct kvm_dirty_slot_log *log,
				      struct kvm_dirty_slot_ring *ring,
				      struct kvm_vcpu *vcpu, u64 producer,
				      unsigned long offset, u64 used)
{
	struct kvm_dirty_run *run = &ring->runs[producer & (log->entries - 1)];

	run->offset = offset;
	run->npages = 1;
	smp_store_release(&ring->kern->producer, producer + 1); /* A */
	vcpu->stat.generic.dirty_slot_ring_pushed++;
	if (trace_kvm_dirty_slot_ring_push_enabled())
		trace_kvm_dirty_slot_ring_push(log->vm, vcpu->vcpu_id, log->slot,
					       offset, used + 1, log->entries);
}

/* The ring is at least half full: ring_push(), and what poll() needs. */
static noinline void ring_push_wake(struct kvm_dirty_slot_log *log,
				    struct kvm_dirty_slot_ring *ring,
				    struct kvm_vcpu *vcpu, u64 producer,
				    unsigned long offset, u64 used)
{
	ring_push(log, ring, vcpu, producer, offset, used);

	/*
	 * Look again: RESET may have made room since, and poll() have looked
	 * before this page was there.
	 */
	smp_mb(); /* with log_poll(): see reset, or be seen */
	if (ring_used(ring) == log->wake_level)
		irq_work_queue(&log->wake);
	if (used + 1 == log->entries)
		ring_full(log, vcpu);
}

/* The ring is full. */
static noinline void ring_overflow(struct kvm_dirty_slot_log *log,
				   struct kvm_dirty_slot_ring *ring,
				   struct kvm_vcpu *vcpu, unsigned long offset)
{
	struct kvm_dirty_slot_ring_kern *kern = ring->kern;

	WRITE_ONCE(kern->overflowed, kern->overflowed + 1);
	vcpu->stat.generic.dirty_slot_ring_overflowed++;
	if (trace_kvm_dirty_slot_ring_overflow_enabled())
		trace_kvm_dirty_slot_ring_overflow(log->vm, vcpu->vcpu_id,
						   log->slot, offset, 1);
	ring_full(log, vcpu);
	summary_set(log, 0, offset / BITS_PER_LONG);
}

/*
 * The vCPU's thread marks a page.  It may be preempted anywhere: E says how a
 * harvest finds a page whose bit is set and whose entry is not there yet.  If it
 * does, the entry comes later and is stale.  But nothing may mark another page in
 * the middle of it, see kvm_dirty_slot_log_mark().
 */
static __always_inline void ring_mark(struct kvm_dirty_slot_log *log,
				      struct kvm_dirty_slot_ring *ring,
				      struct kvm_vcpu *vcpu,
				      unsigned long offset)
{
	struct kvm_dirty_slot_ring_kern *kern = ring->kern;
	u64 producer, used;

	smp_store_release(&ring->marking, offset); /* E */
	/*
	 * Not test_bit() first, to save the atomic operation where the bit is
	 * set: it also orders the write to the page, which KVM itself may have
	 * made, before the look at the bit.  Else a harvest could clear the bit
	 * after the look, and its caller read the page before the write.
	 */
	if (test_and_set_bit_le(offset, log->bitmap))
		return;

	producer = kern->producer;
	used = producer - smp_load_acquire(&kern->reset); /* B */
	if (likely(used + 1 < log->wake_level))
		ring_push(log, ring, vcpu, producer, offset, used);
	else if (used < log->entries)
		ring_push_wake(log, ring, vcpu, producer, offset, used);
	else
		ring_overflow(log, ring, vcpu, offset);
}

/*
 * Mark pages of one word that no vCPU wrote, or that one wrote whose thread is
 * not in a state to push.  Returns how many were not in the log.
 */
static unsigned int log_mark_word(struct kvm_dirty_slot_log *log,
				  struct kvm *kvm, unsigned long word,
				  unsigned long mask)
{
	atomic_long_t *p = (atomic_long_t *)&log->bitmap[word];
	unsigned long flags;
	unsigned int n;

	raw_spin_lock_irqsave(&log->mark_lock, flags); /* E */
	mask &= ~atomic_long_fetch_or(mask, p);
	if (mask)
		summary_set(log, 0, word);
	raw_spin_unlock_irqrestore(&log->mark_lock, flags);
	if (!mask)
		return 0;

	n = hweight_long(mask);
	atomic64_add(n, &kvm->stat.generic.dirty_slot_log_marked_pages);
	trace_kvm_dirty_slot_ring_overflow(log->vm, -1, log->slot,
					   word * BITS_PER_LONG + __ffs(mask),
					   n);
	return n;
}

/**
 * kvm_dirty_slot_log_mark - a page of a memslot with a log was written
 * @kvm: the VM
 * @memslot: the memslot
 * @vcpu: the vCPU that is loaded on this CPU, or NULL
 * @offset: the page, in pages from the start of the memslot
 *
 * Takes no lock and allocates nothing when a vCPU writes.
 *
 * Context: any but NMI; called under mmu_lock, with interrupts off, and from
 * the lockless fast page fault.  The memslot must not go away, that is, the
 * caller is in a read side section of kvm->srcu or keeps it by other means.
 */
void kvm_dirty_slot_log_mark(struct kvm *kvm,
			     const struct kvm_memory_slot *memslot,
			     struct kvm_vcpu *vcpu, unsigned long offset)
{
	struct kvm_dirty_slot_log *log = memslot->dirty_slot_log;
	struct kvm_dirty_slot_ring *ring;

	/*
	 * A ring has one producer, whose push may have been interrupted.  Marks
	 * from interrupts do not touch it; nor do those from the scheduler, that
	 * is, from kvm_arch_vcpu_put() and kvm_arch_vcpu_load() of a thread that
	 * is preempted (steal time, Xen's runstate).
	 */
	ring = NULL;
	if (likely(vcpu && in_task() && !READ_ONCE(vcpu->scheduled_out)))
		ring = log_ring(log, vcpu);
	if (likely(ring))
		ring_mark(log, ring, vcpu, offset);
	else
		log_mark_word(log, kvm, offset / BITS_PER_LONG,
			      BIT(offset % BITS_PER_LONG));
}

/**
 * kvm_dirty_slot_log_mark_vcpu - a vCPU is about to write a page
 * @memslot: a memslot with a log
 * @vcpu: the vCPU, online and loaded on this CPU
 * @offset: the page, in pages from the start of the memslot
 *
 * kvm_dirty_slot_log_mark() without its questions.
 *
 * Context: the vCPU's thread, not in an interrupt; kvm->srcu is held for read.
 */
void kvm_dirty_slot_log_mark_vcpu(const struct kvm_memory_slot *memslot,
				  struct kvm_vcpu *vcpu, unsigned long offset)
{
	struct kvm_dirty_slot_log *log = memslot->dirty_slot_log;

	/* A vCPU gets its rings before it is online. */
	ring_mark(log, log_ring(log, vcpu), vcpu, offset);
}

/*
 * Make vCPUs hand over what hardware holds of their writes, and wait until they
 * have.  A kick alone does not: it returns when the vCPU has left the guest,
 * and the buffer is emptied some time later, which may be long if the thread is
 * preempted in between.
 */
static int kvm_dirty_slot_sync_hw(struct kvm *kvm, bool interruptible)
{
	struct kvm_vcpu *vcpu;
	unsigned long i;
	u32 seq;

	/* Pairs with the entry into the guest, which is a full barrier. */
	smp_mb();
	kvm_for_each_vcpu(i, vcpu, kvm) {
		if (READ_ONCE(vcpu->dirty_slot_ring.hw_seq) & 1)
			kvm_vcpu_kick(vcpu);
	}
	kvm_for_each_vcpu(i, vcpu, kvm) {
		seq = READ_ONCE(vcpu->dirty_slot_ring.hw_seq);
		if (!(seq & 1))
			continue;
		/* It may be in the guest for the second time since the kick. */
		kvm_vcpu_kick(vcpu);
		while (READ_ONCE(vcpu->dirty_slot_ring.hw_seq) == seq) {
			if (interruptible && signal_pending(current))
				return -EINTR;
			usleep_range(10, 50);
		}
	}
	/* With kvm_dirty_slot_ring_hw_flushed(): see the marks made before. */
	smp_rmb();
	return 0;
}

/*
 * Taking pages out of the log.  All of it under log->mutex.
 */

static void log_put_back(struct kvm_dirty_slot_log *log, unsigned long word,
			 unsigned long mask)
{
	/*
	 * The pages are not re-protected yet, or their owner could not be told:
	 * they are dirty as before.  Their entries may be gone.
	 */
	atomic_long_or(mask, (atomic_long_t *)&log->bitmap[word]);
	smp_mb__after_atomic(); /* D, where level 0 is above the bitmap */
	summary_set(log, 0, word);
}

/* Start a batch; without @max_runs it does not turn pages into runs. */
static void batch_reset(struct kvm_dirty_slot_batch *b, unsigned int max_runs)
{
	b->nr_masks = 0;
	b->nr_runs = 0;
	b->nr_pages = 0;
	b->run_end = U32_MAX;	/* more than any page */
	b->max_runs = min_t(unsigned int, max_runs, BATCH_RUNS);
	b->plenty = max_runs ? b->max_runs - BITS_PER_LONG / 2 : INT_MAX;
}

/* Turn pages into runs; returns those for which there was no room. */
static __always_inline unsigned long batch_emit(struct kvm_dirty_slot_batch *b,
						u32 offset, unsigned long mask)
{
	struct kvm_dirty_run *run = &b->runs[b->nr_runs];
	const struct kvm_dirty_run *end = &b->runs[b->max_runs];
	u32 run_end = b->run_end, first, n;
	unsigned long sum;

	do {
		first = __ffs(mask);
		/* The carry goes through the lowest run, to the bit after it. */
		sum = mask + (mask & -mask);
		n = (sum ? __ffs(sum) : BITS_PER_LONG) - first;
		first += offset;
		if (first == run_end) {
			run[-1].npages += n;
		} else if (run != end) {
			run->offset = first;
			run->npages = n;
			run++;
		} else {
			break;
		}
		run_end = first + n;
		mask &= sum;
	} while (mask);

	b->run_end = run_end;
	b->nr_runs = run - b->runs;
	return mask;
}

/* Those of the pages for whose runs there is room. */
static unsigned long batch_fit(const struct kvm_dirty_slot_batch *b, u32 offset,
			       unsigned long mask)
{
	int room = b->max_runs - b->nr_runs;
	unsigned long left = mask;

	if (offset + __ffs(mask) == b->run_end)
		room++;
	while (left && room--)
		left &= left + (left & -left);
	return mask & ~left;
}

/*
 * Take what is logged of the pages @want of a word out of the log, into the
 * batch.  False if there was no room for all of them; the rest stays in the log,
 * with a place in the index.
 */
static __always_inline bool batch_take(struct kvm_dirty_slot_log *log,
				       struct kvm_dirty_slot_batch *b,
				       unsigned long word, unsigned long want)
{
	unsigned long *p = &log->bitmap[word], seen, taken, left = 0;
	struct kvm_dirty_slot_mask *next;
	bool all = true;

	seen = READ_ONCE(*p) & want;
	if (!seen)
		return true;
	if (unlikely(b->nr_masks == BATCH_MASKS))
		return false;

	if (unlikely(b->nr_runs > b->plenty)) {
		if (b->max_runs == BATCH_RUNS)
			return false;
		taken = batch_fit(b, word * BITS_PER_LONG, seen);
		all = taken == seen;
		taken &= atomic_long_fetch_andnot(taken, (atomic_long_t *)p);
	} else if (want == ~0UL) {
		taken = xchg(p, 0);
	} else {
		taken = want & atomic_long_fetch_andnot(want, (atomic_long_t *)p);
	}
	if (unlikely(!taken))
		return all;

	if (b->max_runs) {
		left = batch_emit(b, word * BITS_PER_LONG, taken);
		/* Only if the bitmap ioctls broke a run that would have fitted. */
		if (unlikely(left)) {
			log_put_back(log, word, left);
			all = false;
			taken &= ~left;
			if (!taken)
				return false;
		}
	}

	b->nr_pages += hweight_long(taken);
	next = &b->masks[b->nr_masks];
	if (want != ~0UL && b->nr_masks &&
	    next[-1].offset == word * BITS_PER_LONG) {
		next[-1].mask |= taken;
	} else {
		next->offset = word * BITS_PER_LONG;
		next->mask = taken;
		b->nr_masks++;
	}
	return all;
}

/* The bits of @word that the pages @first to @last have. */
static unsigned long run_mask(unsigned long first, unsigned long last,
			      unsigned long word)
{
	unsigned long mask = ~0UL;

	if (word == first / BITS_PER_LONG)
		mask &= ~0UL << (first % BITS_PER_LONG);
	if (word == last / BITS_PER_LONG)
		mask &= ~0UL >> (BITS_PER_LONG - 1 - last % BITS_PER_LONG);
	return mask;
}

/*
 * Take what the rings' entries from cursor to end say; false if no room.
 *
 * HARVEST (@whole) takes also what else is logged in the words of those pages:
 * neighbours get into one run without sorting, and a walk of the page tables
 * serves them all.  They have entries of their own, which become stale.
 */
static __always_inline bool batch_take_rings(struct kvm_dirty_slot_log *log,
					     u32 nr_rings, bool whole)
{
	struct kvm_dirty_slot_batch *b = log->batch;
	const struct kvm_dirty_run *runs;
	struct kvm_dirty_slot_ring *ring;
	u32 i, offset, last = log->entries - 1;
	u64 cursor, end;

	for (i = 0; i < nr_rings; i++) {
		ring = log->rings[i];
		runs = ring->runs;
		end = ring->end;
		for (cursor = ring->cursor; cursor != end; cursor++) {
			offset = runs[cursor & last].offset;
			if (!batch_take(log, b, offset / BITS_PER_LONG, whole ?
					~0UL : BIT(offset % BITS_PER_LONG)))
				break;
		}
		ring->cursor = cursor;
		if (cursor != end)
			return false;
		/* E */
		if (whole && !batch_take(log, b, ring->in_flight / BITS_PER_LONG,
					 ~0UL))
			return false;
		cond_resched();
	}
	return true;
}

/*
 * Take what the summary knows; false if no room.  One pass upwards, so that it
 * ends however fast pages are added.
 */
static bool batch_take_summary(struct kvm_dirty_slot_log *log)
{
	struct kvm_dirty_slot_batch *b = log->batch;
	unsigned long word;

	while ((word = summary_next(log, b->pos)) < log->nr_words) {
		b->pos = word;
		/* First, as a mark that finds it set leaves it at that. */
		summary_clear(log, 0, word);
		if (!batch_take(log, b, word, ~0UL)) {
			summary_set(log, 0, word);
			return false;
		}
		b->pos = word + 1;
		cond_resched();
	}
	return true;
}

static u64 times_start(bool enabled)
{
	return unlikely(enabled) ? ktime_get_ns() : 0;
}

/* What passed since the last time here belongs to @to, one of @t's. */
static void times_lap(struct kvm_dirty_slot_times *t, u64 *to)
{
	u64 now;

	if (likely(!t->last))
		return;
	now = ktime_get_ns();
	*to += now - t->last;
	t->last = now;
}

/* The log's memslot, or NULL if it has none any more.  Under kvm->srcu. */
static struct kvm_memory_slot *log_memslot(struct kvm_dirty_slot_log *log,
					   struct kvm *kvm)
{
	struct kvm_memslots *slots = __kvm_memslots(kvm, log->slot >> 16);
	struct kvm_memory_slot *memslot = id_to_memslot(slots, (u16)log->slot);

	return memslot && memslot->dirty_slot_log == log ? memslot : NULL;
}

/*
 * What an architecture does that has nothing better.  It need not be fast, and
 * gives up mmu_lock whenever somebody waits for it.
 */
unsigned int __weak
kvm_arch_dirty_slot_protect(struct kvm *kvm, struct kvm_memory_slot *memslot,
			    const struct kvm_dirty_slot_mask *masks,
			    unsigned int nr)
{
	unsigned int i = 0;

	do {
		kvm_arch_mmu_enable_log_dirty_pt_masked(kvm, memslot,
							masks[i].offset,
							masks[i].mask);
	} while (++i < nr && !kvm_dirty_slot_must_yield(kvm));
	return i;
}

/*
 * Re-protect the batch.  The slot may be gone, or going, or have stopped to
 * log: then there is nothing to protect it for.
 */
static void batch_protect(struct kvm_dirty_slot_log *log, struct kvm *kvm)
{
	struct kvm_dirty_slot_batch *b = log->batch;
	struct kvm_memory_slot *memslot;
	unsigned int i = 0;
	int idx;

	times_lap(&b->times, &b->times.collect);
	if (!kvm || !b->nr_masks)
		return;

	idx = srcu_read_lock(&kvm->srcu);
	memslot = log_memslot(log, kvm);
	if (memslot) {
		write_lock(&kvm->mmu_lock);
		for (;;) {
			i += kvm_arch_dirty_slot_protect(kvm, memslot,
							 b->masks + i,
							 b->nr_masks - i);
			if (i == b->nr_masks)
				break;
			if (!kvm_dirty_slot_must_yield(kvm))
				continue;
			write_unlock(&kvm->mmu_lock);
			cond_resched();
			write_lock(&kvm->mmu_lock);
		}
		write_unlock(&kvm->mmu_lock);
		b->flush = true;
	}
	srcu_read_unlock(&kvm->srcu, idx);
	times_lap(&b->times, &b->times.protect);
}

static int log_lock(struct kvm_dirty_slot_log *log, bool traced)
{
	u64 start = times_start(traced);

	if (mutex_lock_interruptible(&log->mutex))
		return -EINTR;
	log->batch->flush = false;
	log->batch->times = (struct kvm_dirty_slot_times){ .last = start };
	return 0;
}

/*
 * Begin a call that looks at the rings: read and check what userspace says it
 * collected, and how far each ring goes now.
 */
static int log_snapshot(struct kvm_dirty_slot_log *log, u32 *nr_rings, u64 *used)
{
	struct kvm_dirty_slot_ring *ring;
	u64 reset;
	u32 i;

	*used = 0;

	/* Marks without a vCPU that set a bit before now are in the summary. */
	raw_spin_lock_irq(&log->mark_lock);
	raw_spin_unlock_irq(&log->mark_lock);
	smp_mb(); /* E */

	*nr_rings = log_nr_rings(log);
	for (i = 0; i < *nr_rings; i++) {
		ring = log->rings[i];
		ring->in_flight = smp_load_acquire(&ring->marking); /* E */
		/* In this order: an honest consumer lags producer. */
		ring->consumer = smp_load_acquire(&ring->user->consumer); /* C */
		ring->limit = smp_load_acquire(&ring->kern->producer); /* A */
		reset = ring->kern->reset;
		/* Unsigned, so that one behind reset is too far ahead as well. */
		if (ring->consumer - reset > ring->limit - reset)
			return -EINVAL;
		ring->cursor = reset;
		ring->end = ring->consumer;
		*used += ring->limit - reset;
	}
	times_lap(&log->batch->times, &log->batch->times.wait);
	return 0;
}

/* End it: flush TLBs, then give what was taken back to the producers. */
static void log_publish(struct kvm_dirty_slot_log *log, struct kvm *kvm,
			u32 nr_rings)
{
	struct kvm_dirty_slot_ring *ring;
	u64 reset;
	u32 i;

	times_lap(&log->batch->times, &log->batch->times.collect);
	if (log->batch->flush)
		kvm_flush_remote_tlbs(kvm);
	times_lap(&log->batch->times, &log->batch->times.flush);

	for (i = 0; i < nr_rings; i++) {
		ring = log->rings[i];
		reset = ring->kern->reset;
		if (ring->cursor == reset)
			continue;
		/* First, for reset never to be seen ahead of it. */
		if (ring->cursor - reset > ring->consumer - reset)
			WRITE_ONCE(ring->user->consumer, ring->cursor);
		smp_store_release(&ring->kern->reset, ring->cursor); /* B */
	}
}

/*
 * Re-protect what userspace collected from the mapping, [reset, consumer) of
 * each ring: only those very pages, as nobody was told of their neighbours.
 */
static int log_reset_collected(struct kvm_dirty_slot_log *log, struct kvm *kvm,
			       u32 nr_rings, u64 *nr_pages)
{
	bool done;

	*nr_pages = 0;
	do {
		batch_reset(log->batch, 0);
		done = batch_take_rings(log, nr_rings, false);
		batch_protect(log, kvm);
		*nr_pages += log->batch->nr_pages;
	} while (!done && !signal_pending(current));

	if (kvm)
		atomic64_add(*nr_pages,
			     &kvm->stat.generic.dirty_slot_log_reset_pages);
	return done ? 0 : -EINTR;
}

/* Has a ring @level entries, stale or not, or the overflow log anything? */
static bool log_ready(struct kvm_dirty_slot_log *log, u32 nr_rings, u32 level)
{
	u32 i;

	for (i = 0; i < nr_rings; i++) {
		if (ring_used(log->rings[i]) >= level)
			return true;
	}
	return READ_ONCE(*summary_top(log));
}

/*
 * The VM, with a reference.  NULL if the slot has stopped logging, *@dead is set
 * then, or the VM is being destroyed, when vCPUs may still log.
 */
static struct kvm *log_get_kvm(struct kvm_dirty_slot_log *log, bool *dead)
{
	struct kvm *kvm;

	spin_lock(&log->kvm_lock);
	kvm = log->kvm;
	if (dead)
		*dead = !kvm;
	/*
	 * Not while it is being destroyed.  It cannot be gone: destruction has
	 * to pass kvm_dirty_slot_log_release(), which clears log->kvm, first.
	 */
	if (kvm && !kvm_get_kvm_safe(kvm))
		kvm = NULL;
	spin_unlock(&log->kvm_lock);
	return kvm;
}

/* Copy the batch out, then re-protect it; on failure, undo it. */
static int harvest_batch(struct kvm_dirty_slot_log *log, struct kvm *kvm,
			 struct kvm_dirty_slot_runs *args, void __user *argp)
{
	struct kvm_dirty_run __user *runs = u64_to_user_ptr(args->runs);
	struct kvm_dirty_slot_batch *b = log->batch;
	unsigned int i;

	if (copy_to_user(runs + args->nr_runs, b->runs,
			 b->nr_runs * sizeof(*runs)))
		goto fault;

	/* From here on the pages are the caller's. */
	args->nr_runs += b->nr_runs;
	args->nr_pages += b->nr_pages;
	if (copy_to_user(argp, args, sizeof(*args))) {
		args->nr_runs -= b->nr_runs;
		args->nr_pages -= b->nr_pages;
		goto fault;
	}
	batch_protect(log, kvm);
	return 0;

fault:
	for (i = 0; i < b->nr_masks; i++)
		log_put_back(log, b->masks[i].offset / BITS_PER_LONG,
			     b->masks[i].mask);
	return -EFAULT;
}

static int log_harvest(struct kvm_dirty_slot_log *log, void __user *argp)
{
	struct kvm_dirty_slot_runs args;
	u32 i, capacity, nr_rings;
	struct kvm_dirty_slot_times *t = &log->batch->times;
	u64 collected = 0, used;
	struct kvm *kvm;
	bool sync, done, dead;
	int r;

	if (copy_from_user(&args, argp, sizeof(args)))
		return -EFAULT;
	if (args.flags & ~(KVM_DIRTY_HARVEST_SYNC | KVM_DIRTY_HARVEST_MORE) ||
	    !args.nr_runs || args.reserved[0] || args.reserved[1])
		return -EINVAL;

	/*
	 * Learn now, with nothing taken, if it cannot be written; as it is, so
	 * that who gets EINTR can make the same call again.
	 */
	if (copy_to_user(argp, &args, sizeof(args)))
		return -EFAULT;
	sync = args.flags & KVM_DIRTY_HARVEST_SYNC;
	capacity = args.nr_runs;
	args.nr_runs = 0;
	args.nr_pages = 0;
	args.flags = 0;

	if (log_lock(log, trace_kvm_dirty_slot_log_harvest_enabled()))
		return -EINTR;
	kvm = log_get_kvm(log, &dead);

	if (kvm && sync) {
		r = kvm_dirty_slot_sync_hw(kvm, true);
		if (r)
			goto unlock;
	}
	r = log_snapshot(log, &nr_rings, &used);
	if (r)
		goto unlock;

	r = log_reset_collected(log, kvm, nr_rings, &collected);
	if (r)
		goto publish;

	for (i = 0; i < nr_rings; i++)
		log->rings[i]->end = log->rings[i]->limit;
	log->batch->pos = 0;
	do {
		batch_reset(log->batch, capacity - args.nr_runs);
		done = batch_take_rings(log, nr_rings, true) &&
		       batch_take_summary(log);
		args.flags = done ? 0 : KVM_DIRTY_HARVEST_MORE;
		r = harvest_batch(log, kvm, &args, argp);
	} while (!r && !done && args.nr_runs < capacity &&
		 !signal_pending(current));

	/* What was stored and re-protected before the fault is the answer. */
	if (r && args.nr_runs)
		r = 0;
	if (!r && dead && !args.nr_runs && !args.flags && !collected)
		r = -ENODEV;
publish:
	log_publish(log, kvm, nr_rings);
	trace_kvm_dirty_slot_log_harvest(log->vm, log->slot, args.nr_runs,
					 args.nr_pages, collected, used,
					 args.flags | sync, r, t->wait,
					 t->collect, t->protect, t->flush);
unlock:
	mutex_unlock(&log->mutex);
	if (kvm) {
		atomic64_inc(&kvm->stat.generic.dirty_slot_log_harvests);
		atomic64_add(args.nr_pages,
			     &kvm->stat.generic.dirty_slot_log_harvested_pages);
		kvm_put_kvm(kvm);
	}
	return r;
}

static int log_reset(struct kvm_dirty_slot_log *log, void __user *argp)
{
	struct kvm_dirty_slot_times *t = &log->batch->times;
	struct kvm_dirty_slot_reset args;
	struct kvm *kvm;
	u32 nr_rings;
	u64 used;
	bool empty, dead;
	int r;

	if (copy_from_user(&args, argp, sizeof(args)))
		return -EFAULT;
	if (args.flags & ~KVM_DIRTY_RESET_OVERFLOW || args.pad ||
	    args.reserved[0] || args.reserved[1])
		return -EINVAL;
	args.nr_pages = 0;
	args.flags = 0;
	if (copy_to_user(argp, &args, sizeof(args)))
		return -EFAULT;

	if (log_lock(log, trace_kvm_dirty_slot_log_reset_enabled()))
		return -EINTR;
	kvm = log_get_kvm(log, &dead);

	r = log_snapshot(log, &nr_rings, &used);
	if (r)
		goto unlock;

	empty = !log_ready(log, nr_rings, 1);
	r = log_reset_collected(log, kvm, nr_rings, &args.nr_pages);
	log_publish(log, kvm, nr_rings);

	if (READ_ONCE(*summary_top(log)))
		args.flags |= KVM_DIRTY_RESET_OVERFLOW;
	if (!r && dead && empty)
		r = -ENODEV;
	trace_kvm_dirty_slot_log_reset(log->vm, log->slot, args.nr_pages, used,
				       args.flags, r, t->wait, t->collect,
				       t->protect, t->flush);
unlock:
	mutex_unlock(&log->mutex);
	if (kvm) {
		atomic64_inc(&kvm->stat.generic.dirty_slot_log_resets);
		kvm_put_kvm(kvm);
	}
	/* The pages are re-protected; all that can be lost here is their count. */
	if (copy_to_user(argp, &args, sizeof(args)) && !r)
		r = -EFAULT;
	return r;
}

/* Does something to pages of a word; returns how many it made a difference to. */
typedef unsigned int (log_word_fn)(struct kvm_dirty_slot_log *log,
				   struct kvm *kvm, unsigned long word,
				   unsigned long mask);

/*
 * MARK and DISCARD: walk the caller's runs and hand each word that they touch
 * to @fn, after all of them have been found good (@fn NULL).  The array is read
 * twice; one that changes in between is checked again and cuts the call short.
 */
static int log_apply(struct kvm_dirty_slot_log *log, struct kvm *kvm,
		     struct kvm_dirty_slot_runs *args, log_word_fn *fn)
{
	struct kvm_dirty_run __user *runs = u64_to_user_ptr(args->runs);
	unsigned long first, last, word, mask;
	struct kvm_dirty_run chunk[32];
	u32 done, n, i;

	for (done = 0; done < args->nr_runs; done += n) {
		if (done && signal_pending(current))
			return -EINTR;
		cond_resched();
		n = min_t(u32, args->nr_runs - done, ARRAY_SIZE(chunk));
		if (copy_from_user(chunk, runs + done, n * sizeof(*runs)))
			return -EFAULT;
		for (i = 0; i < n; i++) {
			if (!chunk[i].npages || chunk[i].npages > log->npages ||
			    chunk[i].offset > log->npages - chunk[i].npages)
				return -EINVAL;
			if (!fn)
				continue;
			first = chunk[i].offset;
			last = first + chunk[i].npages - 1;
			for (word = first / BITS_PER_LONG;
			     word <= last / BITS_PER_LONG; word++) {
				if (!(word % 1024) && word != first / BITS_PER_LONG) {
					if (signal_pending(current))
						return -EINTR;
					cond_resched();
				}
				mask = run_mask(first, last, word);
				args->nr_pages += fn(log, kvm, word, mask);
			}
		}
	}
	return 0;
}

static unsigned int discard_word(struct kvm_dirty_slot_log *log,
				 struct kvm *kvm, unsigned long word,
				 unsigned long mask)
{
	u64 before;

	/* Without runs to store, all of a word fits or the batch is full. */
	if (log->batch->nr_masks == BATCH_MASKS) {
		batch_protect(log, kvm);
		batch_reset(log->batch, 0);
	}
	before = log->batch->nr_pages;
	batch_take(log, log->batch, word, mask);
	return log->batch->nr_pages - before;
}

static int log_mark_or_discard(struct kvm_dirty_slot_log *log,
			       void __user *argp, bool mark)
{
	struct kvm_dirty_slot_runs args;
	struct kvm *kvm;
	int r;

	if (copy_from_user(&args, argp, sizeof(args)))
		return -EFAULT;
	if (args.flags || args.reserved[0] || args.reserved[1])
		return -EINVAL;
	args.nr_pages = 0;
	if (copy_to_user(argp, &args, sizeof(args)))
		return -EFAULT;

	kvm = log_get_kvm(log, NULL);
	if (!kvm)
		return -ENODEV;

	r = log_apply(log, kvm, &args, NULL);
	if (r)
		goto put;

	if (mark) {
		r = log_apply(log, kvm, &args, log_mark_word);
		goto put;
	}

	/*
	 * The entries of these pages stay where they are, stale.  A page that is
	 * not in the log needs nothing: it is protected.
	 */
	r = -EINTR;
	if (log_lock(log, false))
		goto put;
	batch_reset(log->batch, 0);
	r = log_apply(log, kvm, &args, discard_word);
	batch_protect(log, kvm);
	log_publish(log, kvm, 0);
	mutex_unlock(&log->mutex);
	atomic64_add(args.nr_pages,
		     &kvm->stat.generic.dirty_slot_log_discarded_pages);
put:
	kvm_put_kvm(kvm);
	if (copy_to_user(argp, &args, sizeof(args)) && !r)
		r = -EFAULT;
	return r;
}

static int log_info(struct kvm_dirty_slot_log *log, void __user *argp)
{
	struct kvm_dirty_slot_log_info info = {
		.slot = log->slot,
		.nr_rings = log_nr_rings(log),
		.entries = log->entries,
		.stride = ring_pages(log->entries) << PAGE_SHIFT,
		.npages = log->npages,
	};
	struct kvm_memory_slot *memslot = NULL;
	struct kvm *kvm;
	int idx;

	kvm = log_get_kvm(log, NULL);
	if (kvm) {
		idx = srcu_read_lock(&kvm->srcu);
		memslot = log_memslot(log, kvm);
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

/*
 * The log fd.
 */

static long log_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct kvm_dirty_slot_log *log = file->private_data;
	void __user *argp = (void __user *)arg;

	switch (cmd) {
	case KVM_DIRTY_SLOT_LOG_INFO:
		return log_info(log, argp);
	case KVM_DIRTY_SLOT_LOG_HARVEST:
		return log_harvest(log, argp);
	case KVM_DIRTY_SLOT_LOG_RESET:
		return log_reset(log, argp);
	case KVM_DIRTY_SLOT_LOG_MARK:
		return log_mark_or_discard(log, argp, true);
	case KVM_DIRTY_SLOT_LOG_DISCARD:
		return log_mark_or_discard(log, argp, false);
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
	smp_mb(); /* with ring_push() and summary_set(): see it, or be woken */

	if (!READ_ONCE(log->kvm)) {
		events |= EPOLLHUP;
		level = 1;
	}
	if (log_ready(log, log_nr_rings(log), level))
		events |= EPOLLIN | EPOLLRDNORM;
	return events;
}

static void log_wake(struct irq_work *work)
{
	struct kvm_dirty_slot_log *log =
		container_of(work, struct kvm_dirty_slot_log, wake);

	wake_up_poll(&log->wait, EPOLLIN | EPOLLRDNORM);
}

static vm_fault_t log_fault(struct vm_fault *vmf)
{
	struct kvm_dirty_slot_log *log = vmf->vma->vm_file->private_data;
	unsigned long pages = ring_pages(log->entries);
	unsigned long n = vmf->pgoff / pages, nr_rings = log_nr_rings(log);

	if (n >= nr_rings)
		return VM_FAULT_SIGBUS;
	n = array_index_nospec(n, nr_rings);

	vmf->page = vmalloc_to_page((void *)log->rings[n]->user +
				    vmf->pgoff % pages * PAGE_SIZE);
	get_page(vmf->page);
	return 0;
}

static const struct vm_operations_struct log_vm_ops = {
	.fault = log_fault,
};

/*
 * Userspace writes the consumer page and nothing else: a writable mapping is
 * one consumer page and cannot grow, any other cannot be made writable.
 */
static int log_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct kvm_dirty_slot_log *log = file->private_data;
	unsigned long page = vma->vm_pgoff % ring_pages(log->entries);

	if (!(vma->vm_flags & VM_MAYSHARE))
		return -EINVAL;
	if (vma->vm_flags & VM_EXEC)
		return -EPERM;
	if (page != KVM_DIRTY_SLOT_RING_USER_PAGE || vma_pages(vma) != 1) {
		if (vma->vm_flags & VM_WRITE)
			return -EPERM;
		vm_flags_clear(vma, VM_MAYWRITE);
	}
	vm_flags_mod(vma, VM_DONTCOPY | VM_DONTEXPAND | VM_DONTDUMP,
		     VM_MAYEXEC);
	vma->vm_ops = &log_vm_ops;
	return 0;
}

static void log_free(struct kref *ref)
{
	struct kvm_dirty_slot_log *log =
		container_of(ref, struct kvm_dirty_slot_log, ref);
	u32 i;

	irq_work_sync(&log->wake);
	for (i = 0; i < log->nr_rings; i++) {
		vfree(log->rings[i]->user);
		kfree(log->rings[i]);
	}
	kvfree(log->summary[0]);
	kvfree(log->batch);
	vfree(log->bitmap);
	kvfree(log);
}

/*
 * A call on a log can hold the last reference to a VM, so that a log fd has to
 * keep the code that VMs run on: more than THIS_MODULE, if that is kvm.ko.
 */
static struct module *vendor_module;

/**
 * kvm_dirty_slot_ring_init - called once, before there are VMs
 * @module: the vendor module
 */
void kvm_dirty_slot_ring_init(struct module *module)
{
	vendor_module = module;
}

static int log_release(struct inode *inode, struct file *file)
{
	struct kvm_dirty_slot_log *log = file->private_data;

	kref_put(&log->ref, log_free);
	module_put(vendor_module);
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
 * kvm_vm_ioctl_get_dirty_slot_log_fd - KVM_GET_DIRTY_SLOT_LOG_FD
 * @kvm: the VM
 * @argp: struct kvm_dirty_slot_log_fd in userspace
 *
 * Return: a file descriptor; -ENXIO if the capability is not enabled, -EINVAL
 * for a slot that cannot be or unknown flags, -ENOENT for a slot that is not or
 * does not log, or what opening a file gives.
 */
int kvm_vm_ioctl_get_dirty_slot_log_fd(struct kvm *kvm, void __user *argp)
{
	struct kvm_dirty_slot_log *log = NULL;
	struct kvm_memory_slot *memslot;
	struct kvm_dirty_slot_log_fd args;
	int as_id, id, fd;

	if (!kvm_dirty_slot_ring_enabled(kvm))
		return -ENXIO;
	if (copy_from_user(&args, argp, sizeof(args)))
		return -EFAULT;

	as_id = args.slot >> 16;
	id = (u16)args.slot;
	if (args.flags || as_id >= kvm_arch_nr_memslot_as_ids(kvm) ||
	    id >= KVM_USER_MEM_SLOTS)
		return -EINVAL;

	mutex_lock(&kvm->slots_lock);
	memslot = id_to_memslot(__kvm_memslots(kvm, as_id), id);
	if (memslot && memslot->dirty_slot_log) {
		log = memslot->dirty_slot_log;
		kref_get(&log->ref);
	}
	mutex_unlock(&kvm->slots_lock);
	if (!log)
		return -ENOENT;

	__module_get(vendor_module);
	fd = anon_inode_getfd("kvm-dirty-slot-log", &log_fops, log,
			      O_RDWR | O_CLOEXEC);
	if (fd < 0) {
		kref_put(&log->ref, log_free);
		module_put(vendor_module);
	}
	return fd;
}

/*
 * Life of a log.
 */

/* Under slots_lock. */
static int log_add_ring(struct kvm_dirty_slot_log *log, u32 n)
{
	struct kvm_dirty_slot_ring *ring;
	void *area;

	/* Left behind by a vCPU whose creation failed afterwards. */
	if (n < log->nr_rings)
		return 0;

	ring = kzalloc(sizeof(*ring), GFP_KERNEL_ACCOUNT);
	if (!ring)
		return -ENOMEM;
	area = __vmalloc(ring_pages(log->entries) << PAGE_SHIFT,
			 GFP_KERNEL_ACCOUNT | __GFP_ZERO);
	if (!area) {
		kfree(ring);
		return -ENOMEM;
	}
	ring->user = area + KVM_DIRTY_SLOT_RING_USER_PAGE * PAGE_SIZE;
	ring->kern = area + KVM_DIRTY_SLOT_RING_KERN_PAGE * PAGE_SIZE;
	ring->runs = area + KVM_DIRTY_SLOT_RING_ENTRIES_PAGE * PAGE_SIZE;

	smp_store_release(&log->rings[n], ring); /* F */
	smp_store_release(&log->nr_rings, n + 1); /* F */
	return 0;
}

static int log_alloc_bitmaps(struct kvm_dirty_slot_log *log)
{
	unsigned long bits, longs = 0, *summary;
	int i;

	/* Twice the size, as KVM_GET_DIRTY_LOG wants it. */
	log->bitmap = __vcalloc(2 * log->nr_words, sizeof(long),
				GFP_KERNEL_ACCOUNT);
	if (!log->bitmap)
		return -ENOMEM;

	bits = log->nr_words;
	do {
		log->summary_bits[log->nr_levels++] = bits;
		bits = BITS_TO_LONGS(bits);
		longs += bits;
	} while (bits > 1);

	summary = kvcalloc(longs, sizeof(long), GFP_KERNEL_ACCOUNT);
	if (!summary)
		return -ENOMEM;
	for (i = 0; i < log->nr_levels; i++) {
		log->summary[i] = summary;
		summary += BITS_TO_LONGS(log->summary_bits[i]);
	}
	return 0;
}

/**
 * kvm_dirty_slot_log_create - give a memslot a log, and so a dirty bitmap
 * @kvm: the VM, with the capability enabled
 * @memslot: the memslot, not yet reachable by vCPUs
 *
 * Context: under slots_lock, may sleep.
 * Return: 0, or -ENOMEM with @memslot as it was.
 */
int kvm_dirty_slot_log_create(struct kvm *kvm, struct kvm_memory_slot *memslot)
{
	struct kvm_dirty_slot_log *log;
	int i, r;

	log = kvzalloc(struct_size(log, rings, kvm->max_vcpus),
		       GFP_KERNEL_ACCOUNT);
	if (!log)
		return -ENOMEM;

	kref_init(&log->ref);
	log->slot = memslot->as_id << 16 | memslot->id;
	log->entries = kvm->dirty_slot_ring.entries;
	log->flags = kvm->dirty_slot_ring.flags;
	log->wake_level = DIV_ROUND_UP(log->entries, 2);
	log->vm = kvm->userspace_pid;
	log->npages = memslot->npages;
	log->nr_words = BITS_TO_LONGS(memslot->npages);
	log->base_gfn = memslot->base_gfn;
	log->kvm = kvm;
	raw_spin_lock_init(&log->mark_lock);
	spin_lock_init(&log->kvm_lock);
	mutex_init(&log->mutex);
	init_waitqueue_head(&log->wait);
	init_irq_work(&log->wake, log_wake);

	r = -ENOMEM;
	log->batch = kvzalloc(sizeof(*log->batch), GFP_KERNEL_ACCOUNT);
	if (!log->batch)
		goto free;
	r = log_alloc_bitmaps(log);
	for (i = 0; !r && i < kvm->dirty_slot_ring.nr_rings; i++)
		r = log_add_ring(log, i);
	if (r)
		goto free;

	/* The pages that start dirty, as our caller sees to, are in no ring. */
	for (i = 0; i < log->nr_levels &&
	     kvm_dirty_log_manual_protect_and_init_set(kvm); i++)
		bitmap_set(log->summary[i], 0, log->summary_bits[i]);

	memslot->dirty_slot_log = log;
	memslot->dirty_bitmap = log->bitmap;
	return 0;

free:
	kref_put(&log->ref, log_free);
	return r;
}

/**
 * kvm_dirty_slot_log_stop - a memslot is about to stop logging, or to move
 * @kvm: the VM
 * @memslot: the memslot, which vCPUs can still reach; NULL is fine
 *
 * Gets what hardware still holds into the log, where it can be harvested after
 * the slot is gone.
 *
 * Context: under slots_lock, sleeps.
 */
void kvm_dirty_slot_log_stop(struct kvm *kvm,
			     const struct kvm_memory_slot *memslot)
{
	if (memslot && memslot->dirty_slot_log)
		kvm_dirty_slot_sync_hw(kvm, false);
}

/**
 * kvm_dirty_slot_log_release - a memslot has stopped logging
 * @memslot: the memslot; nobody can reach it any more, or nobody could yet
 *
 * Context: process context, may sleep.
 * Return: true if there was a log and it owned the bitmap; both are detached.
 */
bool kvm_dirty_slot_log_release(struct kvm_memory_slot *memslot)
{
	struct kvm_dirty_slot_log *log = memslot->dirty_slot_log;

	if (!log)
		return false;

	memslot->dirty_slot_log = NULL;
	memslot->dirty_bitmap = NULL;

	spin_lock(&log->kvm_lock);
	log->base_gfn = memslot->base_gfn;
	WRITE_ONCE(log->kvm, NULL);
	spin_unlock(&log->kvm_lock);
	wake_up_poll(&log->wait, EPOLLHUP);

	kref_put(&log->ref, log_free);
	return true;
}

/**
 * kvm_dirty_slot_ring_enable - KVM_ENABLE_CAP for KVM_CAP_DIRTY_SLOT_RING
 * @kvm: the VM
 * @cap: what userspace asks for
 *
 * Return: 0; -EINVAL for a bad size, an unknown flag or a reserved field that is
 * not zero; -EBUSY if a memslot logs, if enabled before, or if the upstream
 * dirty ring is on.
 */
int kvm_dirty_slot_ring_enable(struct kvm *kvm, struct kvm_enable_cap *cap)
{
	u64 entries = cap->args[0] ?: RING_DEFAULT_ENTRIES;
	int r = -EBUSY;

	if (cap->flags || cap->args[2] || cap->args[3] ||
	    cap->args[1] & ~(u64)KVM_DIRTY_SLOT_RING_EXIT_ON_FULL ||
	    !is_power_of_2(entries) || entries > KVM_DIRTY_SLOT_RING_MAX_ENTRIES)
		return -EINVAL;

	/* Against vCPU creation and the upstream ring, and against memslots. */
	mutex_lock(&kvm->lock);
	mutex_lock(&kvm->slots_lock);
	if (!kvm->dirty_slot_ring.entries && !kvm->dirty_ring_size &&
	    !atomic_read(&kvm->nr_memslots_dirty_logging)) {
		kvm->dirty_slot_ring.flags = cap->args[1];
		kvm->dirty_slot_ring.nr_rings = atomic_read(&kvm->online_vcpus);
		WRITE_ONCE(kvm->dirty_slot_ring.entries, entries);
		r = 0;
	}
	mutex_unlock(&kvm->slots_lock);
	mutex_unlock(&kvm->lock);
	return r;
}

/**
 * kvm_dirty_slot_ring_add_vcpu - give a new vCPU a ring in every log
 * @vcpu: the vCPU, which has its vcpu_idx but is not online yet
 *
 * Context: under kvm->lock, may sleep.
 * Return: 0 or -ENOMEM.  There is no way back: rings of a vCPU that does not
 * come to life after all stay for the next one, which has the same index.
 */
int kvm_dirty_slot_ring_add_vcpu(struct kvm_vcpu *vcpu)
{
	struct kvm *kvm = vcpu->kvm;
	struct kvm_memory_slot *memslot;
	int as_id, bkt, r = 0;

	if (!kvm_dirty_slot_ring_enabled(kvm))
		return 0;

	mutex_lock(&kvm->slots_lock);
	for (as_id = 0; as_id < kvm_arch_nr_memslot_as_ids(kvm); as_id++) {
		kvm_for_each_memslot(memslot, bkt, __kvm_memslots(kvm, as_id)) {
			if (!memslot->dirty_slot_log)
				continue;
			r = log_add_ring(memslot->dirty_slot_log,
					 vcpu->vcpu_idx);
			if (r)
				goto unlock;
		}
	}
	kvm->dirty_slot_ring.nr_rings = vcpu->vcpu_idx + 1;
unlock:
	mutex_unlock(&kvm->slots_lock);
	return r;
}

/* The log of a memslot in which the vCPU's ring is full, if any. */
static struct kvm_dirty_slot_log *full_log(struct kvm_vcpu *vcpu)
{
	struct kvm_dirty_slot_ring *ring;
	struct kvm_dirty_slot_log *log;
	struct kvm_memory_slot *memslot;
	int as_id, bkt;

	for (as_id = 0; as_id < kvm_arch_nr_memslot_as_ids(vcpu->kvm); as_id++) {
		kvm_for_each_memslot(memslot, bkt,
				     __kvm_memslots(vcpu->kvm, as_id)) {
			log = memslot->dirty_slot_log;
			ring = log ? log_ring(log, vcpu) : NULL;
			if (ring && ring_used(ring) >= log->entries)
				return log;
		}
	}
	return NULL;
}

/**
 * kvm_dirty_slot_ring_check_request - must the vCPU leave for a full ring?
 * @vcpu: the vCPU, about to enter the guest
 *
 * The request stays until all of its rings have room, so that a vCPU that
 * userspace runs again with a full one leaves again.  One exit of the guest can
 * fill several, hence no note of the one that made the request.
 *
 * Context: the vCPU's thread, under kvm->srcu.
 * Return: true if it must, with kvm_run filled in.
 */
bool kvm_dirty_slot_ring_check_request(struct kvm_vcpu *vcpu)
{
	struct kvm_dirty_slot_log *log;

	if (!kvm_check_request(KVM_REQ_DIRTY_SLOT_RING_FULL, vcpu))
		return false;

	log = full_log(vcpu);
	if (!log)
		return false;

	kvm_make_request(KVM_REQ_DIRTY_SLOT_RING_FULL, vcpu);
	vcpu->run->exit_reason = KVM_EXIT_DIRTY_SLOT_RING_FULL;
	vcpu->run->dirty_slot_ring.slot = log->slot;
	vcpu->run->dirty_slot_ring.pad = 0;
	vcpu->stat.generic.dirty_slot_ring_full_exits++;
	trace_kvm_dirty_slot_ring_exit(log->vm, vcpu->vcpu_id, log->slot);
	return true;
}
