/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Model of what makes a clear bit mean a clean page: bitmap, SPTEs, TLBs, what
 * hardware holds, and the contents of pages that a checkpointer copies; see README.
 *
 * vCPUs write any number of times.  Two threads of userspace harvest and then copy
 * what they were told of.
 *
 *	PML	hardware sets the D bit and fills a buffer; without it, pages are
 *		write-protected and faults mark them.  spte_w stands for either bit
 *	SYNC	with KVM_DIRTY_HARVEST_SYNC
 *	FAULTS	the caller's array may turn out not to be writable
 *
 * Property: no lost page.  When all is over, the copy is the memory.  With SYNC,
 * each write that retired before a harvest began is in the copy after it, or the
 * page is in the hands of the other harvester.
 */

#define NR_PAGES	2	/* in one word of the bitmap */

/* vCPU 0 writes page 0; vCPU 1 as well, and page 1. */
#ifndef NR_WRITTEN
#define NR_WRITTEN	2
#endif

/* Which faults a vCPU takes: without FAST_FAULTS slow ones, with it vCPU 1 fast ones. */
#ifdef FAST_FAULTS
#define FAST(v)		(v == 1)
#else
#define FAST(v)		false
#endif
#define SLOW(v)		(!FAST(v))

/* The log */
bit bitmap[NR_PAGES];
bit indexed;			/* the word has an entry or a summary bit */
bit mutex;			/* log->mutex */

/* The MMU */
bit spte_w[NR_PAGES];

typedef vcpu_state {
	bit tlb_w[NR_PAGES];	/* a writable translation is cached */
	bit pml[NR_PAGES];	/* in hardware's buffer */
	bit hw;			/* hw_seq is odd */
	bit marking		/* busy_seq is odd */
}
vcpu_state cpu[2];

/* Memory and its copy */
typedef pages { bit page[NR_PAGES] }
bit newer[NR_PAGES];		/* the page is newer than its copy */
pages took[2];			/* by a harvest, out of the log... */
pages told[2];			/* ...and told by it, not copied yet */
pages want[2];			/* newer when the harvest began, not copied since */

byte running = 4;

/*
 * vCPUs
 */

/* kvm_dirty_slot_log_mark(): an atomic operation, then the index. */
inline mark()
{
	atomic {
		cpu[me].marking = 1;
		was = bitmap[page];
		bitmap[page] = 1
	}
	atomic {
		if
		:: !was -> indexed = 1
		:: else
		fi;
		was = 0;
		cpu[me].marking = 0
	}
}

inline hw_enter()
{
#ifdef SYNC
	cpu[me].hw = 1
#else
	skip
#endif
}

inline hw_flushed()
{
#ifdef SYNC
	cpu[me].hw = 0
#else
	skip
#endif
}

/*
 * The slow page fault: mark, install, look at the mark again.  mmu_lock is held for
 * read, as it is by who re-protects: it keeps nobody out.
 */
inline fault()
{
	mark();
#ifdef SECOND_LOOK_FIRST
	look_again();
#endif
#ifndef SLOW_FAULT_UNTOLD
	hw_enter();
#endif
	spte_w[page] = 1;
#if !defined(NO_SECOND_LOOK) && !defined(SECOND_LOOK_FIRST)
	look_again();
#endif
	hw_flushed()
}

inline look_again()
{
	if
	:: !bitmap[page] -> mark()
	:: else
	fi
}

/* The fast page fault: install, then mark, under no lock; hw_seq tells. */
inline fast_fault()
{
#ifndef FAST_FAULT_UNTOLD
	hw_enter();
#endif
	atomic {	/* try_cmpxchg64() */
		won = !spte_w[page];
		spte_w[page] = 1
	}
	if
	:: won -> mark(); won = 0
	:: else
	fi;
	hw_flushed()
}

/* Leaves the guest. */
inline flush_pml()
{
	if
	:: cpu[me].pml[0] ->
		page = 0;
		mark();
		cpu[me].pml[0] = 0
	:: else
	fi;
	if
	:: cpu[me].pml[1] ->
		page = 1;
		mark();
		cpu[me].pml[1] = 0;
		page = 0
	:: else
	fi;
	hw_flushed()
}

/* An instruction of the guest, until it has been carried out. */
inline write()
{
#ifdef PML
	if
	:: !cpu[me].hw -> hw_enter()
	:: else
	fi;
	atomic {
		if
		:: !cpu[me].tlb_w[page] && !spte_w[page] ->
			spte_w[page] = 1;
			cpu[me].pml[page] = 1
		:: else
		fi;
		cpu[me].tlb_w[page] = 1;
		newer[page] = 1;
		page = 0
	}
#else
	do
	:: atomic {
		cpu[me].tlb_w[page] || spte_w[page] ->
		cpu[me].tlb_w[page] = 1;
		newer[page] = 1;
		page = 0;
		break
	   }
	:: !cpu[me].tlb_w[page] && !spte_w[page] && SLOW(me) -> fault()
	:: !cpu[me].tlb_w[page] && !spte_w[page] && FAST(me) -> fast_fault()
	od
#endif
}

proctype vcpu(bit me)
{
	bit page, was, won;

	do
	:: true ->
		if
		:: page = 0
		:: me && NR_WRITTEN == 2 -> page = 1
		fi;
		write()
#ifdef PML
	:: cpu[me].hw -> flush_pml()
	:: !cpu[me].hw -> break
#else
	:: break
#endif
	od;
	running--
}

/*
 * Userspace.
 */

/* kvm_dirty_slot_sync_hw() */
inline sync_hw()
{
#if defined(SYNC) && !defined(SYNC_NO_WAIT)
	/* The kick is left out: a vCPU that is in the guest can always leave. */
	/*
	 * Nor the number's change: who waits goes on once it is even, and does not
	 * care if it is odd again by then.
	 */
	!cpu[0].hw;
	!cpu[1].hw
#else
	skip
#endif
}

inline quiesce()
{
	!cpu[0].marking;
	!cpu[1].marking
}

inline clear_bits()
{
	atomic {
		if
		:: indexed ->
			indexed = 0;
			took[me].page[0] = bitmap[0];
			took[me].page[1] = bitmap[1];
			bitmap[0] = 0;
			bitmap[1] = 0
		:: else
		fi
	}
}

/* Under mmu_lock for read: one SPTE after the other, and whoever else does what. */
inline protect()
{
	if
	:: took[me].page[0] -> spte_w[0] = 0
	:: else
	fi;
	if
	:: took[me].page[1] -> spte_w[1] = 0
	:: else
	fi
}

inline flush_tlbs()
{
	atomic {
		cpu[0].tlb_w[0] = 0;
		cpu[0].tlb_w[1] = 0;
		cpu[1].tlb_w[0] = 0;
		cpu[1].tlb_w[1] = 0
	}
}

inline copy(n)
{
	atomic {
		if
		:: told[me].page[n] ->
			told[me].page[n] = 0;
			newer[n] = 0;
			want[0].page[n] = 0;
			want[1].page[n] = 0
		:: else
		fi
	}
}

inline harvest()
{
	atomic {
		!mutex -> mutex = 1;
#ifdef SYNC
		want[me].page[0] = newer[0];
		want[me].page[1] = newer[1]
#endif
	}
	sync_hw();
	quiesce();
#ifdef PROTECT_BEFORE_CLEAR
	took[me].page[0] = bitmap[0];
	took[me].page[1] = bitmap[1];
	protect();
	flush_tlbs();
	clear_bits();
	mutex = 0;
#else
	clear_bits();
	mutex = 0;
#ifdef FAULTS
	if
	:: skip			/* copied out */
	:: took[me].page[0] || took[me].page[1] ->	/* EFAULT */
#ifndef NO_PUT_BACK
		atomic {
			bitmap[0] = bitmap[0] | took[me].page[0];
			bitmap[1] = bitmap[1] | took[me].page[1]
		}
		indexed = 1;
#endif
		atomic {
			took[me].page[0] = 0;
			took[me].page[1] = 0;
			want[me].page[0] = 0;
			want[me].page[1] = 0
		}
	fi;
#endif
	protect();
#endif
	atomic {
		told[me].page[0] = told[me].page[0] | took[me].page[0];
		told[me].page[1] = told[me].page[1] | took[me].page[1];
		took[me].page[0] = 0;
		took[me].page[1] = 0
	}
#if !defined(NO_FLUSH) && !defined(FLUSH_AFTER_RETURN)
	flush_tlbs();
#endif
	copy(0);
	copy(1);
#ifdef FLUSH_AFTER_RETURN
	flush_tlbs();
#endif
	atomic {
#ifdef SYNC
		assert(!want[me].page[0] || told[1 - me].page[0] || took[1 - me].page[0]);
		assert(!want[me].page[1] || told[1 - me].page[1] || took[1 - me].page[1]);
#endif
		want[me].page[0] = 0;
		want[me].page[1] = 0
	}
}

proctype user(bit me)
{
	harvest();
	running--
}

proctype last()
{
	bit me;

	atomic {
		running == 0;
		/* It never fails, and whom should it have to wait for? */
		clear_bits();
		told[me].page[0] = took[me].page[0];
		told[me].page[1] = took[me].page[1];
		copy(0);
		copy(1);
		assert(!newer[0] && !newer[1])
	}
}

init {
	atomic {
		run vcpu(0);
		run vcpu(1);
		run user(0);
		run user(1);
		run last()
	}
}
