/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KVMDIRTY_INTERNAL_H
#define KVMDIRTY_INTERNAL_H

/*
 * What the back ends share.  Every page is in one of three places:
 *
 *	KVM's log	 written, not yet re-armed
 *	slot->pending	 re-armed (or named by kvmdirty_mark()), not yet handed out
 *	the caller	 handed out
 *
 * and moves downwards only once it is re-armed, so that whoever is handed a page
 * can copy it.  The way back up is for pages that the caller did not want.
 *
 * Locks, in the order in which they are taken:
 *
 *	kd->vm_lock	    one harvest of the whole VM at a time; held during callbacks
 *	slot->harvest_lock  one harvest of a slot at a time; held during callbacks
 *	kd->lock	    vCPUs, slots, and the rings, which are one for all slots
 *	slot->pending_lock  slot->pending; a leaf, never held over a system call
 *
 * A slot that is found in kd is there as long as kd->lock or its harvest_lock is held:
 * slot_lock() gets the latter, without waiting for it inside the former.
 */

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <linux/kvm.h>
#include <linux/kvm_dirty_slot_ring.h>
#include "kvmdirty.h"
#include "pageset.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

/*
 * The headers that a distribution has of an architecture that got the dirty ring later, such as
 * arm64, say 0: there is struct kvm_run.  Wherever there are rings they are here.
 */
#define RING_PAGE_OFFSET	64

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))

#define NR_BUCKETS	64	/* of slots, by number: VMs have few that log */
#define BATCH_RUNS	512

struct vcpu {
	int fd;
	struct kvm_dirty_gfn *ring;	/* KVMDIRTY_RING only */
	uint64_t next;			/* entry to look at next */
};

struct ring_page {
	uint32_t slot;
	uint64_t offset;
};

struct backend;

struct kvmdirty {
	const struct backend *backend;
	int vm_fd;
	size_t page_size;
	uint32_t ring_entries;
	bool manual;			/* bitmap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 */
	bool attached;			/* to @log_fd; there is no VM, and no slot is known */

	pthread_mutex_t vm_lock;
	uint64_t next_log;		/* where the next harvest of all slots goes on */
	/* From the log of all memslots; [vm_at, vm_at + vm_left) is not handed out yet. */
	struct kvmdirty_vm_run batch[BATCH_RUNS];
	size_t vm_at, vm_left;
	uint32_t layout_told;

	pthread_mutex_t lock;
	struct vcpu *vcpus;
	size_t nr_vcpus;
	struct ring_page *held;		/* collected from rings, not re-armed yet */
	size_t nr_held;
	bool overrun;			/* KVM overwrote entries: pages are lost */
	struct kvmdirty_slot *slots[NR_BUCKETS];
	uint32_t nr_logs;		/* counted by us, where KVM does not */
	uint32_t layout;		/* counts changes of @slots, or what KVM says of them */
	int log_fd;			/* slot rings: of all memslots, once it is wanted, or -1 */
	bool no_vm_log;			/* this kernel has none */
	struct kvmdirty_vm_stats stats;
};

struct kvmdirty_slot {
	struct kvmdirty *kd;		/* NULL if attached */
	const struct backend *backend;
	struct kvmdirty_slot *next;	/* in the bucket */
	uint32_t id;			/* as_id << 16 | id */
	uint32_t log;			/* a number that no other log has */
	uint64_t npages;
	uint64_t base_gfn;
	int log_fd;			/* slot rings, else -1 */
	bool stopped;			/* written under both locks, read under any */
	bool drained;			/* stopped, and KVM has nothing left */
	bool can_probe;			/* MADV_POPULATE_WRITE is there */

	pthread_mutex_t harvest_lock;
	/*
	 * A sweep goes once over the memslot: pages before @cursor have been
	 * handed out; those in slot->pending before @armed may be; what is beyond
	 * has not been looked at.
	 */
	bool sweeping;
	uint64_t cursor;
	uint64_t armed;
	uint64_t *snapshot;		/* bitmap: what KVM_GET_DIRTY_LOG gave */
	size_t snapshot_bytes;		/* of the mapping, with a guard page */
	struct kvmdirty_run batch[BATCH_RUNS];

	pthread_mutex_t pending_lock;
	struct pageset pending;

	struct kvmdirty_stats stats;	/* atomic */
};

/**
 * struct backend - one of KVM's logs
 * @id: enum kvmdirty_backend
 * @name: for messages
 * @open: enable it; on failure set *reason
 * @add_vcpu: map what it has; kd->lock is held.  May be NULL
 * @full: serve an exit, 0 if it is not one of ours.  May be NULL
 * @track: join a memslot that logs
 * @sweep: begin a sweep: set slot->armed to 0 if @arm is there, else bring all that
 *	is logged to slot->pending.  harvest_lock is held
 * @arm: re-arm some pages from slot->armed on, bring them to slot->pending, and move
 *	slot->armed up
 * @discard: re-arm runs, which are valid, without handing them out; slot->pending
 *	is the caller's part.  harvest_lock is held
 * @stop: what kvmdirty_stop() says, but for slot->stopped.  harvest_lock is held
 */
struct backend {
	enum kvmdirty_backend id;
	const char *name;
	int (*open)(struct kvmdirty *kd, const struct kvmdirty_options *options,
		    const char **reason);
	int (*add_vcpu)(struct kvmdirty *kd, struct vcpu *vcpu);
	int (*full)(struct kvmdirty *kd, const struct kvm_run *run);
	int (*track)(struct kvmdirty_slot *slot);
	int (*sweep)(struct kvmdirty_slot *slot);
	int (*arm)(struct kvmdirty_slot *slot);
	int (*discard)(struct kvmdirty_slot *slot, const struct kvmdirty_run *runs, size_t nr);
	int (*stop)(struct kvmdirty_slot *slot, struct kvm_userspace_memory_region *region);
};

extern const struct backend backend_slot_ring;
extern const struct backend backend_ring;
extern const struct backend backend_bitmap;

/* ioctl() that returns a negative errno instead of -1; slot_ioctl() counts it */
int do_ioctl(int fd, unsigned long request, void *arg);
int slot_ioctl(struct kvmdirty_slot *slot, int fd, unsigned long request, void *arg);

/* KVM_CHECK_EXTENSION and KVM_ENABLE_CAP with one argument */
int check_extension(int fd, unsigned int cap);
int enable_cap(int vm_fd, unsigned int cap, uint64_t arg);

/* KVM_SET_USER_MEMORY_REGION with or without KVM_MEM_LOG_DIRTY_PAGES */
int set_logging(int vm_fd, struct kvm_userspace_memory_region *region, bool on);

/* Where slots of this number are; kd->lock is held */
struct kvmdirty_slot **bucket(struct kvmdirty *kd, uint32_t id);

/* slot_find() - the slot of this number, or NULL; kd->lock is held */
struct kvmdirty_slot *slot_find(struct kvmdirty *kd, uint32_t id);

typedef struct kvmdirty_slot *(*slot_find_fn)(struct kvmdirty *kd, uint64_t what);

/**
 * slot_lock() - find a slot and take its harvest_lock
 * @kd: where to look for it
 * @find: how; called under kd->lock
 * @what: handed to @find
 * @slot: what was found, or NULL
 *
 * Context: waits for a harvest of the slot.
 *
 * Return: 0; -ENXIO: there is none; -EDEADLK: the harvest is this thread's own.
 */
int slot_lock(struct kvmdirty *kd, slot_find_fn find, uint64_t what, struct kvmdirty_slot **slot);

void slot_free(struct kvmdirty_slot *slot);

/* An error-checking mutex: a callback that calls back in gets -EDEADLK, not a hang. */
int init_checking_mutex(pthread_mutex_t *mutex);

/* What was asked for of a struct that another version may know more or less of */
void copy_out(void *to, size_t size, const void *from, size_t known);

/* slot_set_stopped() - logging has ended; harvest_lock is held */
void slot_set_stopped(struct kvmdirty_slot *slot);

bool pending_is_empty(struct kvmdirty_slot *slot);

/* Where a harvest puts runs: an array, or a callback with a budget. */
struct sink {
	struct kvmdirty_run *runs;
	size_t room;		/* runs that still fit there */
	size_t probed;		/* of those, known to be writable */

	kvmdirty_run_fn fn;	/* NULL: the array */
	void *arg;
	uint64_t budget;	/* pages that may still be handed out */

	struct kvmdirty_result result;
};

static inline bool sink_full(const struct sink *sink)
{
	return sink->fn ? !sink->budget : !sink->room;
}

/* slot_harvest() - what kvmdirty_harvest() does; harvest_lock is held */
int slot_harvest(struct kvmdirty_slot *slot, struct sink *sink, unsigned int flags);

/* slot_hand_out() - only what is pending; harvest_lock is held.  0; 1 if there is more */
int slot_hand_out(struct kvmdirty_slot *slot, struct sink *sink);

/*
 * slot_deliver() - hand out the first runs of slot->batch; harvest_lock is held.  0; 1 if not
 * all of it was wanted; or what the callback said.  What was not taken is pending, and *@left
 * is its first page.
 */
int slot_deliver(struct kvmdirty_slot *slot, struct sink *sink, size_t nr, uint64_t *left);

/* pending_add_runs() - re-armed pages wait to be handed out */
void pending_add_runs(struct kvmdirty_slot *slot, const struct kvmdirty_run *runs, size_t nr);

/**
 * slot_ring_take() - KVM_DIRTY_SLOT_LOG_HARVEST
 * @slot: of slot rings
 * @runs: where the kernel is to store runs
 * @nr: how many fit there
 * @flags: KVMDIRTY_HARVEST_NOSYNC or 0
 * @result: what was stored
 *
 * Return: 0: that is all; 1: there is more; or a negative errno.
 */
int slot_ring_take(struct kvmdirty_slot *slot, struct kvmdirty_run *runs, size_t nr,
		   unsigned int flags, struct kvmdirty_result *result);

/* slot_ring_vm_open() - the log fd of all memslots, or -EOPNOTSUPP, or why it cannot be had */
int slot_ring_vm_open(struct kvmdirty *kd);

/* slot_ring_vm_take() - KVM_DIRTY_VM_LOG_HARVEST of up to @nr runs to kd->batch, all of which is
 * handed out.  As slot_ring_take(); vm_lock is held
 */
int slot_ring_vm_take(struct kvmdirty *kd, int fd, size_t nr, unsigned int flags);

/* slot_ring_open_log() - take over a log fd: fill in what it tells.  0 or -errno. */
int slot_ring_open_log(struct kvmdirty_slot *slot, int log_fd);

/* slot_ring_info() - KVM_DIRTY_SLOT_LOG_INFO */
int slot_ring_info(struct kvmdirty_slot *slot, struct kvm_dirty_slot_log_info *info);

/* slot_ring_mark() - KVM_DIRTY_SLOT_LOG_MARK of any number of valid runs */
int slot_ring_mark(struct kvmdirty_slot *slot, const struct kvmdirty_run *runs, size_t nr);

static inline void count(uint64_t *counter, uint64_t n)
{
	__atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

#endif
