/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Model of the table of a VM's logs (virt/kvm/dirty_slot/vm.c): a memslot goes, one
 * more comes and goes, then the VM, while others harvest all logs in one call, one log
 * by its own file, and MARK pages.  See README.
 *
 * Properties
 *	no lost page	when the VM's file says -ENODEV, each page that was logged while
 *			it was open has been reported; and so of a log's own file
 *	at most once	no page is reported twice
 *	-ENODEV is final: after it nothing comes into the log, or into any log
 *	told		who gets pages of a log has got LAYOUT since the log came; with
 *			-ENODEV all changes have been told
 *	nothing left	when the VM's file says -ENODEV, the table is empty
 *	freed once	and not while a call has pages of the log; all are in the end
 *
 * A log's summaries are one bit here, has: what is in the bitmap can be found.
 */

#ifdef NO_WATCH
#define WATCH	0
#else
#define WATCH	1		/* a file of the VM, open from the start to -ENODEV */
#endif
#ifndef SHORT
#define SHORT	0		/* files of the VM that are opened and closed at any time */
#endif
#ifndef SLOT
#define SLOT	0		/* files of log 0, until -ENODEV */
#endif
#ifndef MARKS
#define MARKS	0		/* MARK of a page, by a file of log 0 */
#endif
#ifdef FAULTS
#define MAY_FAULT	1
#else
#define MAY_FAULT	0
#endif

#define NONE	2

typedef log_state {
	bit kvm;		/* log->kvm is not NULL */
	bit live, listed;
	bit on;		/* log->active */
	bit has;		/* busy or overflow is not empty */
	bit mutex;
	byte refs, outstanding, place;
	bool freed, enodev, gone;	/* gone: for files opened from now on */
	byte bitmap;		/* pages: 1 is dirty from the start, 2 is MARKed */
	byte marked, reported;
	byte came		/* vm->layout since then has it */
}
log_state log[2];

byte table[2] = NONE;		/* vm->logs */
bit index[2];
byte nr_files, layout = 1;
bit vm_kvm = 1;
bit vm_enodev;
byte done;

#define TOUCH(l)	assert(!log[l].freed)

/* Where log_settle() looks at more than what the log has. */
#ifdef SETTLE_DEAD
#define SETTLE(l)	!others
#else
#define SETTLE(l)	(!others && log[l].kvm)
#endif

/* Pages come into a log. */
#define MAY_COME(l)	assert(!log[l].enodev && !(vm_enodev && log[l].listed))

inline put_log(l)
{
	atomic {
		TOUCH(l);
		log[l].refs--;
		if
		:: log[l].refs == 0 ->
			assert(!log[l].outstanding && !log[l].listed);
			log[l].freed = 1
		:: else
		fi
	}
}

/* Inside of atomic: kvm_dirty_slot_log_activate() takes mark_lock. */
inline activate(l)
{
	if
	:: !log[l].on ->
#ifdef UNLISTED_ACTIVE
		index[log[l].place] = 1;
#else
		if
		:: log[l].listed -> index[log[l].place] = 1
		:: else
		fi;
#endif
		log[l].on = 1
	:: else
	fi
}

/* table_erase() under its two locks, and the put after them. */
inline erase(l)
{
	atomic {
		TOUCH(l);
		if
#ifdef ERASE_TWICE
		:: true ->
#else
		:: log[l].listed ->
#endif
			log[l].listed = 0;
			index[log[l].place] = 0;
			table[log[l].place] = NONE;
			erased = 1
		:: else
		fi
	}
	if
	:: erased -> erased = 0; put_log(l)
	:: else
	fi
}

/* log_hold() and log_unhold() */
#define HOLD(l)		log[l].outstanding++
#define UNHOLD(l)	log[l].outstanding--

/*
 * kvm_dirty_slot_log_drain(): got is what was stored, fault if it could not be;
 * vm_file says what the VM's file has to have been told.
 */
inline drain(l, vm_file)
{
	atomic { TOUCH(l); !log[l].mutex -> log[l].mutex = 1; got = 0; fault = 0 }
	/* kvm_dirty_slot_log_look_at() */
#ifdef OTHERS_LATE
	saw = log[l].has;
	others = log[l].outstanding > 0;
#else
	others = log[l].outstanding > 0;
	saw = log[l].has;
#endif
	/* log_settle() */
	atomic {
		TOUCH(l);
		if
		:: log[l].on && !log[l].has && SETTLE(l) ->
			log[l].on = 0;
			if
			:: log[l].listed -> index[log[l].place] = 0
			:: else
			fi
		:: else
		fi
	}
	atomic {
		TOUCH(l);
		if
		:: saw ->
			log[l].has = 0;
			taken = log[l].bitmap;
			log[l].bitmap = 0
		:: else
		fi;
		if
		:: taken -> HOLD(l)
		:: else
		fi;
		saw = 0;
		log[l].mutex = 0
	}
	if
	:: taken ->
		if
		:: MAY_FAULT ->
			fault = 1;
#ifdef UNHOLD_EARLY
			UNHOLD(l);
#endif
			/* kvm_dirty_slot_batch_undo() */
			atomic {
				TOUCH(l);
				MAY_COME(l);
				log[l].bitmap = log[l].bitmap | taken;
				log[l].has = 1;
				activate(l)
			}
		:: true ->
			atomic {
				TOUCH(l);
				assert(!(log[l].reported & taken));
				/* layout_flag() in vm_store() */
				assert(!(vm_file) || log[l].came && (layout != told || told >= log[l].came));
				log[l].reported = log[l].reported | taken;
#ifdef PUT_BACK_STORED
				log[l].bitmap = log[l].bitmap | taken;
				log[l].has = 1;
#endif
				got = 1
			}
		fi;
		taken = 0;
#ifdef UNHOLD_EARLY
		if
		:: fault
		:: else -> UNHOLD(l)
		fi
#else
		atomic { TOUCH(l); UNHOLD(l) }
#endif
	:: else
	fi
}

/* vm_harvest(), over two places; ended if it is -ENODEV. */
inline harvest_vm()
{
#ifdef LAYOUT_EARLY
	known = layout;
#endif
	vm_dead = !vm_kvm;
	do
	:: at < 2 ->
		/* vm_next_log() */
		atomic {
			if
			:: index[at] ->
				l = table[at];
				assert(l != NONE);
				TOUCH(l);
#ifndef NO_NEXT_REF
				log[l].refs++
#endif
			:: else
			fi;
			at++
		}
		if
		:: l != NONE ->
			/* drain_log() */
			if
#ifdef NOT_LIVE
			:: true ->
#else
			:: log[l].live ->
#endif
#ifndef DEAD_LATE
				dead = !log[l].kvm;
#endif
				drain(l, 1);
#ifdef DEAD_LATE
				dead = !log[l].kvm;
#endif
				if
#ifdef OTHERS_REAP
				:: dead && !got && !fault ->
#else
				:: dead && !got && !fault && !others ->
#endif
					erase(l)
				:: else
				fi;
				others = 0;
				dead = 0;
				any = any || got;
				more = more || fault;
				got = 0
			:: else
			fi;
#ifndef NO_NEXT_REF
			put_log(l);
#endif
			l = NONE
		:: else
		fi;
		if
		:: fault -> fault = 0; break
		:: else
		fi
	:: else -> break
	od;
#ifdef NODEV_BY_LOOK
	ended = vm_dead && !any && !more;
#else
	ended = vm_dead && !any && !more && !index[0] && !index[1];
#endif
	atomic {
		if
#ifdef LAYOUT_EARLY
		:: !more || any -> told = known
#else
		:: !more || any -> told = layout
#endif
		:: else
		fi;
		if
		:: ended ->
			assert(!(mine & 1) || log[0].marked == log[0].reported);
			assert(!(mine & 2) || log[1].marked == log[1].reported);
			assert(table[0] == NONE && table[1] == NONE);
			assert(told == layout);
			vm_enodev = 1
		:: else
		fi;
		vm_dead = 0;
		any = 0;
		more = 0;
		known = 0;
		at = 0
	}
}

/* vm_file_free() */
inline close_vm()
{
	atomic { nr_files--; last = nr_files == 0; told = 0; mine = 0 }
#ifndef NEVER_SWEPT
	/* table_sweep() */
	at = 0;
	do
	:: last && at < 2 ->
		atomic {
			l = table[at];
			if
			:: l != NONE -> TOUCH(l)
			:: else
			fi
		}
		/* Found without the lock, and without a reference: nothing of it is used. */
		if
		:: l != NONE ->
			atomic {
				if
#ifdef SWEEP_OTHERS
				:: table[at] == l ->
#else
				:: table[at] == l && !nr_files && !log[l].kvm ->
#endif
					log[l].listed = 0;
					index[at] = 0;
					table[at] = NONE;
					erased = 1
				:: else
				fi
			}
			if
			:: erased -> erased = 0; put_log(l)
			:: else
			fi;
			l = NONE
		:: else
		fi;
		at++
	:: else -> break
	od;
#endif
	atomic { last = 0; at = 0; done++ }
}

/* A file of the VM, from before to -ENODEV. */
proctype watcher()
{
	byte l = NONE, at, taken, told = 1, known;
	byte mine = 3;		/* logs whose memslots were not gone when it was opened */
	bit got, fault, others, saw, dead, vm_dead, any, more, ended, erased, last;

	do
	:: !ended -> harvest_vm()
	:: else -> break
	od;
	close_vm()
}

proctype passer()
{
	byte l = NONE, at, taken, told, known, mine;
	bit got, fault, others, saw, dead, vm_dead, any, more, ended, erased, last;

	atomic {
		nr_files++;
		told = layout;
		mine = !log[0].gone + 2 * !log[1].gone
	}
	do
	:: !ended -> harvest_vm()
	:: true -> break
	od;
	ended = 0;
	close_vm()
}

/* A file of log 0: kvm_dirty_slot_log_harvest() */
proctype one_log()
{
	byte taken, told;
	bit got, fault, others, saw, dead;

	do
	:: true ->
#ifndef SLOT_DEAD_LATE
		dead = !log[0].kvm;
#endif
		drain(0, 0);
#ifdef SLOT_DEAD_LATE
		dead = !log[0].kvm;
#endif
		if
#ifdef OTHERS_NODEV
		:: dead && !got && !fault ->
#else
		:: dead && !got && !fault && !others ->
#endif
			atomic {
				assert(log[0].marked == log[0].reported);
				log[0].enodev = 1
			}
			break
		:: else -> dead = 0; got = 0; fault = 0; others = 0
		fi
	od;
	atomic { dead = 0; got = 0 }
	put_log(0);
	done++
}

/* kvm_dirty_slot_log_mark_runs(), by a file of log 0 */
proctype marker()
{
	bit held;

	/* Under kvm_lock. */
	atomic {
		TOUCH(0);
		held = log[0].kvm;
		if
#ifndef MARK_UNHELD
		:: held -> HOLD(0)
#endif
		:: else
		fi
	}
	if
	:: held ->
		atomic {
			TOUCH(0);
			MAY_COME(0);
			log[0].bitmap = log[0].bitmap | 2;
			log[0].marked = log[0].marked | 2;
			log[0].has = 1;
			activate(0)
		}
#ifndef MARK_UNHELD
		atomic { TOUCH(0); UNHOLD(0) }
#endif
	:: else
	fi;
	held = 0;
	put_log(0);
	done++
}

inline changed()
{
	atomic { layout++ }
}

/* kvm_dirty_slot_log_release(), by the memslot; no vCPU can reach it any more. */
inline release(l)
{
	log[l].kvm = 0;
	/* kvm_dirty_slot_vm_remove() */
	if
	:: log[l].live -> changed()
	:: else
	fi;
	atomic {
		TOUCH(l);
		log[l].gone = 1;
		if
#ifdef KEEP_FOR_NOBODY
		:: true ->
#else
		:: nr_files && log[l].live ->
#endif
#ifndef KEEP_INACTIVE
			activate(l)
#else
			skip
#endif
		:: else -> kept_not = 1
		fi;
#ifdef KEEP_NOTHING
		kept_not = 1;
#endif
		if
		:: kept_not && log[l].listed ->
			log[l].listed = 0;
			index[log[l].place] = 0;
			table[log[l].place] = NONE;
			erased = 1
		:: else
		fi;
		kept_not = 0
	}
	if
	:: erased -> erased = 0; put_log(l)
	:: else
	fi;
	put_log(l)
}

proctype vmm()
{
	bit erased, kept_not, made;

	release(0);
	/* kvm_dirty_slot_vm_add(): a place that is free. */
	atomic {
		log[1].place = (table[0] == NONE -> 0 : 1);
		table[log[1].place] = 1;
		log[1].listed = 1;
		log[1].kvm = 1;
		log[1].refs = 2
	}
	/* kvm_dirty_slot_log_create(): its pages are going to be dirty. */
	atomic {
		TOUCH(1);
		log[1].has = 1;
		activate(1)
	}
	if
	:: true ->
		atomic {
			TOUCH(1);
			log[1].bitmap = 1;
			log[1].marked = 1
		}
		/* kvm_dirty_slot_log_start() */
#ifdef LIVE_FIRST
		log[1].live = 1;
#endif
		atomic {
			layout++;
			log[1].came = layout
		}
		log[1].live = 1
	:: true			/* it could not be made */
	fi;
	release(1);
	/* kvm_dirty_slot_ring_destroy() */
	vm_kvm = 0;
	done++
}

init {
	byte i;

	atomic {
		log[0].kvm = 1;
		log[0].live = 1;
		log[0].listed = 1;
		log[0].came = 1;
		log[0].refs = 2 + SLOT + MARKS;
		table[0] = 0;
		/* It has a page; or it has not, and is quiet or going to be. */
		if
		:: log[0].bitmap = 1; log[0].marked = 1; log[0].has = 1; log[0].on = 1
		:: log[0].on = 1
		:: skip
		fi;
		index[0] = log[0].on;
		run vmm();
		nr_files = WATCH;
		if
		:: WATCH -> run watcher()
		:: else
		fi;
		i = 0;
		do
		:: i < SHORT -> run passer(); i++
		:: else -> break
		od;
		i = 0;
		do
		:: i < SLOT -> run one_log(); i++
		:: else -> break
		od;
		i = 0;
		do
		:: i < MARKS -> run marker(); i++
		:: else -> break
		od;
		i = 0
	}
	done == 1 + WATCH + SHORT + SLOT + MARKS;
	assert(log[0].freed && log[1].freed)
}
