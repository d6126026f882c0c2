/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Model of quiet rings and logs ("Quiet" in log.h): two vCPUs mark a page each, a
 * device one more, and threads of userspace harvest the VM, which looks at what the
 * trees say may have something and at nothing else.  Several at once: log->mutex is
 * not held while a harvest copies out, which may fail.  See README.
 *
 * It begins with each ring, and the log, in any state that they can be in with
 * nothing in them.
 *
 * Properties
 *	no lost page	each bit that was set when a harvest began is cleared by its
 *			end; after the last harvest no bit is set
 *	invariant 7	when nobody is at it, a ring that is not in busy has nothing,
 *			and a log that is not in the tree neither
 */

#ifndef MARKS0
#define MARKS0	1		/* marks of each vCPU, at most */
#endif
#ifndef MARKS1
#define MARKS1	1
#endif
#ifndef DEVICE
#define DEVICE	0		/* marks without a vCPU */
#endif
#ifndef CALLS0
#define CALLS0	2		/* harvests of each thread */
#endif
#ifndef CALLS1
#define CALLS1	0
#endif
#ifndef DEPTH
#define DEPTH	2
#endif

/* The places in memory. */
#define PRODUCER(r)	(r)
#define MARKING(r)	(2 + (r))
#define RACTIVE(r)	(4 + (r))	/* ring->active */
#define BUSY		6
#define BITMAP		7
#define OVERFLOW	8
#define LACTIVE		9		/* log->active */
#define INDEX		10
#define NLOC		11

/* Processes: vCPUs, threads of userspace (the first also makes the last call), device. */
#define NPROC		5
#define READS(p, l)	((p) < 2 -> ((l) == RACTIVE(p) || (l) == BUSY || (l) == LACTIVE || \
				     (l) == INDEX) : \
			 (p) < 4 || (l) >= LACTIVE)
#define CHECK()		skip

#include "memory.pml"

bit mutex, mark_lock, table_lock;
byte running = 5;
byte must[4];			/* what the call of this process has to take */
byte outstanding;

/* SRCU: who reads; and whom the grace period waits for. */
byte reading, waits;
bit gp_started, leaving[2];
byte rst[2];

#define PAGE(p)		(1 << (p))	/* vCPU p's page; the device's is 1 << 2 */

/* kvm_dirty_summary_set() */
inline set(place, mask)
{
	LD(place, tmp);
	if
	:: tmp & (mask) -> MB()			/* D */
	:: else -> FETCH_OR(place, mask, tmp)
	fi;
	tmp = 0
}

/* log_activate(), under mark_lock */
inline activate_log()
{
	LD(LACTIVE, tmp);
	if
	:: !tmp ->
#ifdef ACTIVE_FIRST
		ST(LACTIVE, 1);
		set(INDEX, 1)
#else
		set(INDEX, 1);
		ST_REL(LACTIVE, 1)		/* G */
#endif
	:: else -> tmp = 0
	fi
}

inline activate_log_if()
{
	LD(LACTIVE, tmp);
	if
	:: !tmp ->
		LOCK(mark_lock);
		activate_log();
		UNLOCK(mark_lock)
	:: else -> tmp = 0
	fi
}

inline activate_ring()
{
	LD(RACTIVE(me), tmp);
	if
	:: !tmp ->
#ifdef BUSY_FIRST
		set(BUSY, PAGE(me));
		ST(RACTIVE(me), 1);
#else
		ST(RACTIVE(me), 1);
#ifndef NO_RING_MB
		MB();				/* G */
#endif
		set(BUSY, PAGE(me));
#endif
		activate_log_if()
	:: else -> tmp = 0
	fi
}

proctype vcpu(byte me)
{
	byte n, tmp, count;

	do
	:: n < (me -> MARKS1 : MARKS0) ->
		n++;
		atomic { reading = reading | PAGE(me); drain_me(); refresh_me() }
#ifndef ACTIVE_LATE
		activate_ring();
#endif
		ST_REL(MARKING(me), 1);		/* E */
		FETCH_OR(BITMAP, PAGE(me), tmp);
#ifdef ACTIVE_LATE
		count = count + !(tmp & PAGE(me));
		activate_ring();
		ST_REL(PRODUCER(me), count);
#else
		if
		:: !(tmp & PAGE(me)) ->
			count++;
			ST_REL(PRODUCER(me), count)	/* A */
		:: else
		fi;
#endif
		atomic {
			drain_me();
			tmp = 0;
			reading = reading & ~PAGE(me);
			waits = waits & ~PAGE(me);
			forget_old()
		}
	:: break
	od;
	atomic { n = 0; count = 0; running-- }
}

/* kvm_dirty_slot_log_mark_word() */
proctype device(byte me)
{
	byte n, tmp;

	do
	:: n < DEVICE ->
		n++;
		LOCK(mark_lock);
		activate_log();
		FETCH_OR(BITMAP, 4, tmp);
		if
		:: !(tmp & 4) -> FETCH_OR(OVERFLOW, 1, tmp)
		:: else
		fi;
		tmp = 0;
		UNLOCK(mark_lock)
	:: break
	od;
	atomic { n = 0; running-- }
}

inline take(want)
{
	atomic {
		FETCH_ANDNOT(BITMAP, want, tmp);
		tmp = tmp & (want);
		taken = taken | tmp;
		must[2] = must[2] & ~tmp;
		must[3] = must[3] & ~tmp;
		tmp = 0
	}
}

inline ring_leave()
{
	LD(RACTIVE(r), tmp);
	if
	:: tmp ->
		leaving[r] = !gp_started || gp_done;
		if
		:: leaving[r] -> ST(RACTIVE(r), 0); leave = 1
		:: else
		fi
	:: !tmp && leaving[r] && (gp_done || !gp_started) ->
		leaving[r] = 0;
		FETCH_ANDNOT(BUSY, PAGE(r), tmp);
#ifndef BUSY_BLIND
		LD(RACTIVE(r), tmp);		/* G */
		if
		:: tmp -> FETCH_OR(BUSY, PAGE(r), tmp)
		:: else
		fi
#endif
	:: else
	fi;
	tmp = 0
}

inline log_settle()
{
	if
	:: leave -> atomic { drain_me(); refresh_me(); gp_started = 1; waits = reading }
	:: !leave && gp_done -> gp_started = 0
	:: else
	fi;
	LD(LACTIVE, tmp);
	LD(BUSY, b);
	LD(OVERFLOW, o);
	if
	:: tmp && !b && !o && !others ->
		LOCK(table_lock);
#ifndef SETTLE_UNLOCKED
		LOCK(mark_lock);
#endif
		ST(LACTIVE, 0);
#ifndef NO_SETTLE_MB
		MB();				/* G */
#endif
		LD(BUSY, b);
		LD(OVERFLOW, o);
#ifdef SETTLE_BLIND
		b = 0; o = 0;
#endif
		if
		:: b || o -> ST(LACTIVE, 1)
		:: else ->
			FETCH_ANDNOT(INDEX, 1, tmp)
		fi;
#ifndef SETTLE_UNLOCKED
		UNLOCK(mark_lock);
#endif
		UNLOCK(table_lock)
	:: else
	fi;
	tmp = 0
}

/* A harvest of the VM. */
inline harvest()
{
	atomic { drain_me(); refresh_me(); must[me] = mem[BITMAP] }
	/* vm_next_log() */
	LOCK(table_lock);
	LD(INDEX, tmp);
	UNLOCK(table_lock);
	if
	:: tmp ->
		tmp = 0;
		LOCK(mutex);
		others = outstanding;
		atomic {
			drain_me(); refresh_me();
#ifdef NO_GP
			gp_done = gp_started
#else
			gp_done = gp_started && !waits
#endif
		}
		LOCK(mark_lock);
		UNLOCK(mark_lock);
		MB();				/* E */
		LD(BUSY, b);
		r = 0;
		do
		:: r < 2 && (b & PAGE(r)) ->
			LD_ACQ(MARKING(r), tmp);
			LD_ACQ(PRODUCER(r), limit[r]);
			flight[r] = tmp;
			LD(BITMAP, tmp);
			flight[r] = flight[r] && (tmp & PAGE(r));
			tmp = 0;
			if
			:: limit[r] == rst[r] && !flight[r] -> ring_leave()
			:: else
			fi;
			r++
		:: r < 2 && !(b & PAGE(r)) -> limit[r] = rst[r]; r++
		:: r == 2 -> break
		od;
		LD(OVERFLOW, look);
		log_settle();

		r = 0;
		do
		:: r < 2 ->
			if
			:: limit[r] != rst[r] || flight[r] -> take(PAGE(r))
			:: else
			fi;
			rst[r] = limit[r];
			r++
		:: else -> break
		od;
		if
		:: look ->
			FETCH_ANDNOT(OVERFLOW, 1, tmp);
			take(7)
		:: else
		fi;
		assert(!must[me]);		/* no lost page */
		atomic {
			if
			:: taken -> outstanding++
			:: else
			fi;
			r = 0; b = 0; o = 0; look = 0; leave = 0; gp_done = 0; others = 0;
			limit[0] = 0; limit[1] = 0; flight[0] = 0; flight[1] = 0;
			UNLOCK(mutex)
		}
		if
		:: !taken
		:: taken -> taken = 0; atomic { drain_me(); outstanding-- }
#ifdef FAULTS
		:: taken && !final ->
			FETCH_OR(BITMAP, taken, tmp);
			FETCH_OR(OVERFLOW, 1, tmp);
			activate_log_if();
			taken = 0;
			atomic { drain_me(); outstanding-- }
#endif
		fi
	:: else ->
		assert(!must[me])		/* no lost page */
	fi;
	tmp = 0
}

bit final;

proctype user(byte me)
{
	byte r, tmp, b, o, look, taken, others, limit[2], n;
	bit flight[2], leave, gp_done;

	do
	:: n < (me == 2 -> CALLS0 : CALLS1) -> n++; harvest()
	:: else -> break
	od;
	atomic { n = 0; drain_me(); running-- };
	if
	:: me == 2 ->
		/* When all is over, one more harvest has to find all that is left. */
		atomic { running == 0; final = 1 }
		/* The vCPUs' and others' stores get there some time. */
		atomic { refresh_me() }
		assert((!mem[BITMAP] || mem[INDEX]) &&
		       (mem[BUSY] & 1 || mem[PRODUCER(0)] == rst[0]) &&
		       (mem[BUSY] & 2 || mem[PRODUCER(1)] == rst[1])); /* invariant 7 */
		harvest();
		assert(!mem[BITMAP])		/* no lost page */
	:: else
	fi
}

init {
	atomic {
		/* Ring 0 in any state, ring 1 (0, if it writes nothing) has left. */
		if
		:: mem[RACTIVE(0)] = 1; mem[BUSY] = 1
		:: mem[BUSY] = 1; leaving[0] = 1; gp_started = 1
		:: mem[BUSY] = 1; leaving[0] = 1
		:: skip
		fi;
		if
		:: mem[BUSY] || DEVICE || MARKS1 -> mem[LACTIVE] = 1; mem[INDEX] = 1
		:: !mem[BUSY] -> skip
		fi;
		i_ = 0;
#if MM == 2
		v_ = 0;
		do
		:: v_ < NPROC ->
			i_ = 0;
			do
			:: i_ < NLOC -> old[v_].v[i_] = mem[i_]; i_++
			:: else -> break
			od;
			v_++
		:: else -> v_ = 0; i_ = 0; break
		od;
#endif
		run vcpu(0);
		run vcpu(1);
		run user(2);
		run user(3);
		run device(4);
		RUN_DRAINS
	}
}
