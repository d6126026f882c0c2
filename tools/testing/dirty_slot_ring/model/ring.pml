/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Model of rings, bitmap and summary: marks by two vCPUs, overflow, and two threads
 * of userspace that take pages out.  A harvest does not hold the mutex while it
 * copies out, which may fail.  See README; rings that leave are in quiet.pml.
 *
 * Properties
 *	no lost page	a bit that was set when HARVEST began is cleared by the time
 *			that it returns without MORE or a fault; and at the end, when
 *			the last harvest is over, no bit is set
 *	at most once	a page is reported once for each time that its bit was set
 *	markers ordered	reset <= consumer <= producer <= reset + entries, at every
 *			moment, as userspace can see it
 *	no overwrite	who reads entry i finds entry i, whole, and no other
 */

/* The pages that each vCPU marks: digits, last one first, after a 9. */
#ifndef MARKS0
#define MARKS0		910	/* page 0, then page 1, which makes it a run */
#endif
#ifndef MARKS1
#define MARKS1		91
#endif
#ifndef FIRST
#define FIRST		harvest
#endif
#ifndef SECOND
#define SECOND		harvest
#endif
#define NR_PAGES	3	/* two words of the bitmap: 0 and 1, 2 */
#define WORD(page)	((page) / 2)
#define WORDS(mask)	((((mask) & 3) -> 3 : 0) | ((mask) & 4))
#define ENTRIES		2
#ifndef DEPTH
#define DEPTH		2
#endif

/* The places in memory.  Of ring r: */
#define RUN(r, i)	((r) * 9 + (i) % ENTRIES)
#define PRODUCER(r)	((r) * 9 + 3)	/* kern->producer */
#ifdef TWO_PRODUCERS
#define COUNT(r)	((r) * 9 + 2)	/* a second one */
#else
#define COUNT(r)	PRODUCER(r)
#endif
#define KRESET(r)	((r) * 9 + 5)	/* kern->reset */
#ifdef TWO_RESETS
#define RESET(r)	((r) * 9 + 4)	/* one that only the kernel looks at */
#else
#define RESET(r)	KRESET(r)
#endif
#define CONSUMER(r)	((r) * 9 + 6)	/* user->consumer */
#define MARKING(r)	((r) * 9 + 8)	/* the page that is being marked */
#define BITMAP		18
#define SUMMARY		19
#define NLOC		20

/* vCPUs are processes 0 and 1, with the ring of that number. */
#define NPROC		4
#define IN_RING(l, r)	((l) >= (r) * 9 && (l) < (r) * 9 + 9)
#define OFFSET(l)	((l) % 9)
#define READS(p, l)	((p) < 2 -> (l) == RESET(p) : \
			 (l) >= 18 || (OFFSET(l) != 5 && OFFSET(l) != 7 && OFFSET(l) != 4))

#define ORDERED(r) \
	(mem[KRESET(r)] <= mem[CONSUMER(r)] && \
	 mem[CONSUMER(r)] <= mem[PRODUCER(r)] && \
	 mem[PRODUCER(r)] <= mem[KRESET(r)] + ENTRIES)
#define CHECK()		assert(ORDERED(0) && ORDERED(1)) /* markers ordered */

#include "memory.pml"

/* An entry: its number, for the check, its first page and its length. */
#define ENTRY(i, first, n)	((i) * 16 + (first) * 4 + (n))
#define E_INDEX(e)		((e) / 16)
#define E_FIRST(e)		(((e) / 4) % 4)
#define E_LEN(e)		((e) % 4)
#define E_MASK(e)		(((1 << E_LEN(e)) - 1) << E_FIRST(e))
#define ALL			((1 << NR_PAGES) - 1)

bit mutex;			/* log->mutex */
byte rst[2];			/* ring->reset, for the holders of mutex */
byte owed;			/* pages marked and not yet reported */
byte must;			/* pages that the call under way has to take */
byte held;			/* pages that a call which failed is putting back */
byte running = 4;
bit final;

#ifdef NO_RELEASE
#define ST_A(l, value)		ST(l, value)
#else
#define ST_A(l, value)		ST_REL(l, value)	/* A */
#endif

/*
 * vCPUs
 */

inline ring_push()
{
		if
		:: count - reset >= ENTRIES ->
			FETCH_OR(SUMMARY, 1 << WORD(page), tmp)
		:: else ->
			first = page;
			length = 1;
			ST(RUN(me, count), ENTRY(count, first, length));
			count++;
#ifdef TWO_PRODUCERS
#ifdef COUNT_FIRST
			ST_A(COUNT(me), count);
			ST_A(PRODUCER(me), count)
#else
			ST_A(PRODUCER(me), count);
			ST_A(COUNT(me), count)
#endif
#else
			ST_A(PRODUCER(me), count)
#endif
		fi
}

proctype vcpu(byte me)
{
	byte count, first, length, reset, tmp, page;
	short marks;

	marks = (me -> MARKS1 : MARKS0);
	do
	:: marks > 9 ->
		d_step {
			page = marks % 10;
			marks = marks / 10
		}
#ifndef MARKING_LATE
#ifdef MARKING_PLAIN
		ST(MARKING(me), page);
#else
		ST_REL(MARKING(me), page);			/* E */
#endif
#endif
		LD_ACQ(RESET(me), reset);			/* B */
		atomic {
			FETCH_OR(BITMAP, 1 << page, tmp);	/* E */
			tmp = (tmp >> page) & 1;
			if
			:: !tmp -> owed = owed | (1 << page)
			:: else
			fi
		}
#ifdef MARKING_LATE
		ST_REL(MARKING(me), page);
#endif
		if
		:: !tmp -> ring_push()
		:: else
		fi;
		atomic {
			forget_old();
			tmp = 0; reset = 0; page = 0
		}
	:: marks == 9 -> break
	od;
	atomic { drain_me(); running-- }
}

/*
 * Userspace
 */

/* Take the pages @want: batch_take().  One word, hence one try. */
inline take()
{
	LD(BITMAP, seen);
	seen = seen & want;
	if
	:: seen ->
		atomic {
			FETCH_ANDNOT(BITMAP, seen, tmp);
			tmp = tmp & seen;
#ifdef REPORT_SEEN
			tmp = seen;
#endif
			assert((owed & tmp) == tmp);	/* at most once */
			owed = owed & ~tmp;
			must = must & ~tmp;
			taken = taken | tmp;
			tmp = 0
		}
	:: else
	fi
}

/* Entry @at of ring r. */
inline load_entry()
{
	LD(RUN(r, at), e);
	assert(E_INDEX(e) == at && E_LEN(e))		/* no overwrite */
}

/* log_look_at() */
inline snapshot()
{
	MB();						/* E */
	r = 0;
	do
	:: r < 2 ->
#ifdef PRODUCER_BEFORE_MARKING
		LD_ACQ(PRODUCER(r), early);
#endif
		LD_ACQ(MARKING(r), in_flight[r]);	/* E */
		LD_ACQ(CONSUMER(r), cons[r]);		/* C */
#ifdef PRODUCER_BEFORE_MARKING
		limit[r] = early;
		early = 0;
#else
		LD_ACQ(COUNT(r), limit[r]);		/* A */
#endif
		/* An honest reader never gets EINVAL. */
		assert(cons[r] <= limit[r]);
		atomic {
			start[r] = rst[r];
			cursor[r] = rst[r]
		}
		r++
	:: else -> break
	od;
	r = 0
}

/* log_publish() */
inline publish()
{
	r = 0;
	do
	:: r < 2 ->
		if
		:: cursor[r] != start[r] ->
			if
			:: cursor[r] > cons[r] -> ST(CONSUMER(r), cursor[r])
			:: else
			fi;
#ifdef TWO_RESETS
			ST_REL(RESET(r), cursor[r]);
#endif
			ST_REL(KRESET(r), cursor[r]);	/* B */
		:: else
		fi;
		r++
	:: else -> break
	od;
	r = 0
}

/* batch_take_rings(), to consumer or, with whole, to limit. */
inline take_rings()
{
	r = 0;
	do
	:: r < 2 ->
		do
		:: cursor[r] < (whole -> limit[r] : cons[r]) ->
			at = cursor[r];
			load_entry();
			want = (whole -> WORDS(E_MASK(e)) : E_MASK(e));
			take();
			cursor[r]++
		:: else -> break
		od;
#ifndef IN_FLIGHT_IGNORED
		if
		:: whole ->
			want = 1 << in_flight[r];	/* E */
			take()
		:: else
		fi;
#endif
		r++
	:: else -> break
	od;
	r = 0;
	d_step { e = 0; at = 0; want = 0 }
}

inline call_begin()
{
	atomic {
		LOCK(mutex);
		must = mem[BITMAP] & ~held
	}
}

/* Locals of a thread of userspace: */
#define USER_LOCALS	byte r, tmp, want, seen, taken, e, at, start[2], cons[2], limit[2], cursor[2], in_flight[2], early; \
			bit whole

inline forget()
{
	d_step {
		taken = 0; seen = 0; tmp = 0; whole = 0; want = 0;
		start[0] = 0; start[1] = 0;
		in_flight[0] = 0; in_flight[1] = 0;
		cons[0] = 0; cons[1] = 0;
		limit[0] = 0; limit[1] = 0;
		cursor[0] = 0; cursor[1] = 0
	}
}

inline harvest()
{
	call_begin();
	snapshot();
#ifdef EARLY_RESET
	/* Room for the vCPUs before their entries have been read. */
	d_step {
		at = start[0];
		e = start[1];
		cursor[0] = limit[0];
		cursor[1] = limit[1]
	}
	publish();
	d_step {
		cursor[0] = at;
		cursor[1] = e;
		at = 0;
		e = 0
	}
#endif
	take_rings();
	taken = 0;	/* so far nothing that the caller is told of */
	whole = 1;
	take_rings();
	r = 0;
	do
	:: r < 2 ->
		LD(SUMMARY, tmp);
		if
		:: tmp & (1 << r) ->
			FETCH_ANDNOT(SUMMARY, 1 << r, tmp);
			want = (r -> 4 : 3);
			take()
		:: else
		fi;
		r++
	:: else -> break
	od;
	r = 0;
	assert(!must);					/* no lost page */
#ifndef EARLY_RESET
	publish();
#endif
	atomic {
		rst[0] = cursor[0];
		rst[1] = cursor[1];
		UNLOCK(mutex)
	}
#ifdef FAULTS
	/* Others may harvest meanwhile. */
	if
	:: skip			/* copied out */
	:: !final && taken ->	/* EFAULT: batch_undo() */
#ifndef NO_PUT_BACK
		atomic {
			FETCH_OR(BITMAP, taken, tmp);
			owed = owed | (taken & ~tmp);
			held = held | taken
		}
		atomic {
			FETCH_OR(SUMMARY, ((taken & 3) -> 1 : 0) | (taken & 4) / 2, tmp);
			held = held & ~taken
		}
#else
		owed = owed | taken
#endif
	fi;
#endif
	forget()
}

/* Reads the rings through the mapping. */
inline collect()
{
	r = 0;
	do
	:: r < 2 ->
		LD(CONSUMER(r), at);
		LD_ACQ(PRODUCER(r), tmp);		/* A */
		if
		:: at < tmp ->
			do
			:: at < tmp ->
				load_entry();
#ifdef READERS_ONLY
				/* At most once, until RESET. */
				assert((owed & E_MASK(e)) == E_MASK(e));
				assert((told & E_MASK(e)) == 0);
				told = told | E_MASK(e);
#endif
				at++
			:: else -> break
			od;
			ST_REL(CONSUMER(r), tmp)	/* C */
		:: else
		fi;
		r++
	:: else -> break
	od;
	r = 0;
	d_step { e = 0; tmp = 0; at = 0 }
}

inline collect_and_reset()
{
	LOCK(reader);
	collect();
	/* The call is made by the thread that wrote consumer. */
	call_begin();
	must = 0;
	snapshot();
	take_rings();
#ifdef READERS_ONLY
	atomic {
		/* No lost page: RESET takes nothing that the reader did not see. */
		assert((taken & ~told) == 0);
		told = told & ~taken
	}
#endif
	publish();
	atomic {
		rst[0] = cursor[0];
		rst[1] = cursor[1];
		forget();
		UNLOCK(mutex);
		UNLOCK(reader)
	}
}

/* KVM_GET_DIRTY_LOG: under neither mutex. */
inline get_dirty_log()
{
	atomic {
		FETCH_ANDNOT(BITMAP, ALL, tmp);
		assert((owed & tmp) == tmp);
		owed = owed & ~tmp;
		must = must & ~tmp;
		tmp = 0
	}
}

bit reader;		/* readers of the mapping take turns, as they must */
byte told;		/* pages that a reader saw since their last RESET */

proctype user1(byte me)
{
	USER_LOCALS;

#ifdef TURNS
	/* HARVEST writes consumer as well: it and readers take turns. */
	LOCK(reader);
	FIRST();
	UNLOCK(reader);
#else
	FIRST();
#endif
	atomic { drain_me(); running-- }
}

proctype user2(byte me)
{
	USER_LOCALS;

	SECOND();
	atomic { drain_me(); running-- }
}

/* When all is over, one more harvest has to find all that is left. */
proctype last(byte me)
{
	USER_LOCALS;

	atomic {
		running == 0;
		final = 1;
		harvest();
		assert(!mem[BITMAP] && !owed)		/* no lost page */
	}
}

init {
	atomic {
		run vcpu(0);
		run vcpu(1);
		run user1(2);
		run user2(3);
		run last(3);
		RUN_DRAINS
	}
}
