/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Shared memory for the models, with the order that CPUs give it:
 *
 *	MM=0	sequential consistency: every access at once
 *	MM=1	x86-TSO: each process has a FIFO store buffer, which it reads its
 *		own stores from
 *	MM=2	weaker: stores leave the buffer in any order, but those to one place
 *		and releases, which leave last; and a load may give an old value, as
 *		from a cache line whose invalidation still waits in a queue
 *
 * A process is known by "me".  Stores leave the buffers when the process "drain"
 * says so, or when the buffer has no room.  What MM=2 lacks is told in README.
 *
 * Before including it, define NPROC, NLOC, DEPTH (stores in a buffer), CHECK()
 * (what must hold of mem[] after each change) and READS(p, l): false if process p
 * never loads l, so that no old value of it is kept.
 */
#ifndef MM
#define MM 0
#endif

byte mem[NLOC];
hidden byte i_, v_;

#if MM
typedef buffer {
	byte n;
	byte at[DEPTH];
	byte what[DEPTH];
	bit rel[DEPTH]
}
buffer sb[NPROC];
#endif

#if MM == 2
typedef copies { byte v[NLOC] }
copies old[NPROC];
#define SAW(p, l, val)	old[p].v[l] = val
#else
#define SAW(p, l, val)	skip
#endif

#if MM
/* Store nth of who's buffer becomes visible.  Use within atomic or d_step. */
inline commit(who, nth)
{
	mem[sb[who].at[nth]] = sb[who].what[nth];
	SAW(who, sb[who].at[nth], sb[who].what[nth]);
	i_ = nth;
	do
	:: i_ + 1 < sb[who].n ->
		sb[who].at[i_] = sb[who].at[i_ + 1];
		sb[who].what[i_] = sb[who].what[i_ + 1];
		sb[who].rel[i_] = sb[who].rel[i_ + 1];
		i_++
	:: else -> break
	od;
	sb[who].at[i_] = 0;
	sb[who].what[i_] = 0;
	sb[who].rel[i_] = 0;
	sb[who].n--;
	i_ = 0;
	CHECK();
}

#define OLDEST(p)	(sb[p].n > 0)
#if MM == 2
#define FREE1(p)	(sb[p].n > 1 && !sb[p].rel[1] && \
			 sb[p].at[1] != sb[p].at[0])
#if DEPTH > 2
#define FREE2(p)	(sb[p].n > 2 && !sb[p].rel[2] && \
			 sb[p].at[2] != sb[p].at[0] && \
			 sb[p].at[2] != sb[p].at[1])
#endif
#endif

proctype drain(byte p)
{
end:
	do
	:: d_step { OLDEST(p) -> commit(p, 0) }
#if MM == 2
	:: d_step { FREE1(p) -> commit(p, 1) }
#if DEPTH > 2
	:: d_step { FREE2(p) -> commit(p, 2) }
#endif
#endif
	od
}
#define RUN_DRAINS	v_ = 0; \
	do \
	:: v_ < NPROC -> run drain(v_); v_++ \
	:: else -> v_ = 0; break \
	od
#else
#define RUN_DRAINS	skip
#endif

/* Empty me's buffer.  Within atomic. */
inline drain_me()
{
#if MM
	do
	:: sb[me].n > 0 -> commit(me, 0)
	:: else -> break
	od
#else
	skip
#endif
}

/* Forget me's old values.  Within atomic. */
inline refresh_me()
{
#if MM == 2
	i_ = 0;
	do
	:: i_ < NLOC ->
		if
		:: READS(me, i_) -> old[me].v[i_] = mem[i_]
		:: else
		fi;
		i_++
	:: else -> break
	od;
	i_ = 0
#else
	skip
#endif
}

/*
 * Here me's old values no longer matter, as a full barrier comes before its next
 * load: fewer states.  Within atomic.
 */
inline forget_old()
{
#if MM == 2
	i_ = 0;
	do
	:: i_ < NLOC -> old[me].v[i_] = 0; i_++
	:: else -> break
	od;
	i_ = 0
#else
	skip
#endif
}

/* READ_ONCE() */
inline LD(place, result)
{
	atomic {
#if MM == 0
		result = mem[place]
#else
		i_ = sb[me].n;
		do
		:: i_ > 0 && sb[me].at[i_ - 1] != place -> i_--
		:: else -> break
		od;
		if
		:: i_ > 0 -> result = sb[me].what[i_ - 1]
#if MM == 2
		:: i_ == 0 -> result = old[me].v[place]
		:: i_ == 0 && old[me].v[place] != mem[place] ->
			old[me].v[place] = mem[place];
			result = mem[place]
#else
		:: else -> result = mem[place]
#endif
		fi;
		i_ = 0
#endif
	}
}

/* smp_load_acquire(): a load, and none that follows it can be older than it. */
#define LD_ACQ(l, result)	atomic { LD(l, result); refresh_me() }

/* smp_cond_load_acquire(l, VAL != value) */
#define WAIT_ACQ(l, value)	atomic { mem[l] != value -> refresh_me() }

inline store(place, value, release)
{
	atomic {
#if MM == 0
		mem[place] = value;
		CHECK()
#else
		if
		:: sb[me].n == DEPTH -> commit(me, 0)
		:: else
		fi;
		sb[me].at[sb[me].n] = place;
		sb[me].what[sb[me].n] = value;
		sb[me].rel[sb[me].n] = release;
		sb[me].n++
#endif
	}
}

#define ST(l, value)		store(l, value, 0)	/* WRITE_ONCE() */
#define ST_REL(l, value)	store(l, value, 1)	/* smp_store_release() */
#define RMB()			atomic { refresh_me() }	/* smp_rmb() */
#define MB()			atomic { drain_me(); refresh_me() }	/* smp_mb() */

/*
 * Atomic operations that return a value are full barriers before and after; as
 * are those that do not, as this code uses them, with smp_mb__after_atomic().
 */
inline FETCH_OR(place, mask, result)
{
	atomic {
		drain_me();
		result = mem[place];
		mem[place] = mem[place] | (mask);
		CHECK();
		refresh_me()
	}
}

inline FETCH_ANDNOT(place, mask, result)
{
	atomic {
		drain_me();
		result = mem[place];
		mem[place] = mem[place] & ~(mask);
		CHECK();
		refresh_me()
	}
}

inline CMPXCHG(place, from, to)
{
	atomic {
		drain_me();
		if
		:: mem[place] == (from) -> mem[place] = to; CHECK()
		:: else
		fi;
		refresh_me()
	}
}

/* A mutex: the next holder sees all that the last one did. */
inline LOCK(m)
{
	atomic { !m -> m = 1; refresh_me() }
}

inline UNLOCK(m)
{
	atomic { drain_me(); m = 0; forget_old() }
}
