/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Model of the life of a log: a memslot is deleted while two vCPUs run and two
 * threads hold a file of its log; then the VM goes.  See README.
 *
 * Properties
 *	nothing that was freed is touched: log, memslot, VM
 *	no lost page: what was written before the deletion began is harvested, before
 *	the last file is closed
 *	-ENODEV is final: after it nothing is logged
 */

#ifndef ROUNDS
#define ROUNDS	1		/* of each vCPU in the guest */
#endif

/* The memslot: vCPUs find it, or not. */
bit reachable = 1;
bit slot_freed;
bit reading[4];			/* kvm->srcu, read side, of each process */

/* The log */
bit bitmap, indexed;
bit mutex;
bit log_kvm = 1;		/* log->kvm is not NULL */
byte refs = 3;			/* the memslot's, and two files' */
bit log_freed;
bit enodev;

/* The VM: the reference of the thread that deletes, of calls on the log. */
byte vm_refs = 1;
bit vm_freed;

typedef vcpu_state {
	bit pml;		/* hardware holds the page */
	bit hw;			/* hw_seq is odd */
	bit want;		/* it held it when the deletion began */
	bit marking;		/* a mark is in flight */
	bit was
}
vcpu_state cpu[2];

bit want;			/* logged when the deletion began, not harvested yet */

#define TOUCH_LOG()	assert(!log_freed)
#define TOUCH_VM()	assert(!vm_freed)

inline put_log()
{
	atomic {
		TOUCH_LOG();
		refs--;
		if
		:: refs == 0 -> 
			assert(!want && !cpu[0].want && !cpu[1].want);
			assert(!bitmap);
			log_freed = 1
		:: else
		fi
	}
}

inline put_vm()
{
	atomic {
		vm_refs--;
		if
		:: vm_refs == 0 -> vm_freed = 1
		:: else
		fi
	}
}

/* In a read side section, with the memslot found. */
inline mark()
{
	atomic {
		TOUCH_LOG();
		assert(!enodev);
		cpu[me].marking = 1;
		cpu[me].was = bitmap;
		bitmap = 1;
		want = want || cpu[me].want;
		cpu[me].want = 0;
		cpu[me].pml = 0
	}
	atomic {
		TOUCH_LOG();
		if
		:: !cpu[me].was -> indexed = 1
		:: else
		fi;
		cpu[me].was = 0;
		cpu[me].marking = 0
	}
}

proctype vcpu(bit me)
{
	byte n;
	bit found;

	do
	:: n < ROUNDS ->
		n++;
		/* In the guest: a write, through PML. */
		if
		:: atomic { reachable -> cpu[me].hw = 1; cpu[me].pml = 1 }
		:: skip
		fi;
		/* An exit: the buffer is emptied, one more write by KVM itself. */
		atomic {
			reading[me] = 1;
			found = reachable
		}
		if
		:: found ->
			mark()
		:: else -> cpu[me].pml = 0
		fi;
		cpu[me].hw = 0;
		found = 0;
		reading[me] = 0
	:: n == ROUNDS -> break
	od
}

/* KVM_SET_USER_MEMORY_REGION, and then the end of the VM. */
proctype delete()
{
	atomic {
		want = bitmap;
		cpu[0].want = cpu[0].pml;
		cpu[1].want = cpu[1].pml
	}
#ifndef NO_STOP
	/* kvm_dirty_slot_log_stop() */
	!cpu[0].hw;
	!cpu[1].hw;
#endif
	reachable = 0;
#ifndef NO_SYNCHRONIZE
	!reading[0];
	!reading[1];
	!reading[2];
	!reading[3];
#endif
	/* kvm_dirty_slot_log_release() */
	log_kvm = 0;
	put_log();
	slot_freed = 1;
	put_vm()
}

proctype user(byte me)
{
	bit kvm, took, found;

	do
	:: true ->
		atomic { TOUCH_LOG(); !mutex -> mutex = 1 }
		/* log_get_kvm(), under kvm_lock */
		atomic {
			kvm = log_kvm;
			if
			:: kvm ->
				TOUCH_VM();
#ifndef NO_VM_REF
				vm_refs++
#endif
			:: else
			fi
		}
		!cpu[0].marking;
		!cpu[1].marking;
		atomic {
			TOUCH_LOG();
			if
			:: indexed ->
				took = bitmap;
				bitmap = 0;
				indexed = 0;
				want = 0
			:: else
			fi
		}
		/* batch_protect() */
		if
		:: kvm && took ->
			atomic {
				TOUCH_VM();
#ifndef NO_SRCU
				reading[me] = 1;
#endif
				found = reachable
			}
			if
			:: found -> assert(!slot_freed)
			:: else
			fi;
			reading[me] = 0;
			found = 0
		:: else
		fi;
		atomic {
			TOUCH_LOG();
			mutex = 0;
			if
			:: !kvm && !took -> enodev = 1; break
			:: else
			fi;
			took = 0
		}
		if
		:: kvm ->
			TOUCH_VM();
#ifndef NO_VM_REF
			put_vm();
#endif
			kvm = 0
		:: else
		fi
	od;
	/* -ENODEV: close. */
	took = 0;
	put_log()
}

init {
#ifdef NO_FILE_REF
	refs = 1;
#endif
	atomic {
		run vcpu(0);
		run vcpu(1);
		run user(2);
		run user(3);
		run delete()
	}
}
