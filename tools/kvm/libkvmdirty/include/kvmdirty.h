/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KVMDIRTY_H
#define KVMDIRTY_H

/*
 * libkvmdirty: which guest pages were written since I last asked?
 *
 * One interface over the three logs that KVM can keep: dirty slot rings, the
 * dirty ring, and the dirty bitmap.  See kvmdirty(3).
 *
 * Rules that hold everywhere:
 *
 * - Errors are negative errno values, returned; errno itself means nothing
 *   after a call.
 * - Pages are what the host calls a page (sysconf(_SC_PAGESIZE): 4096 bytes on
 *   x86, also 16 or 64 KiB on arm64).  A page is named by its offset in its
 *   memslot, in pages.
 * - What a harvest hands out is re-armed already: copy the pages when you have
 *   their runs, and a write that comes after your copy is in a later harvest.
 * - What a failed call did not hand out stays in the log.
 * - Every function may be called by any thread at any time, but for those that
 *   free an object (kvmdirty_close(), kvmdirty_untrack()): nobody else may use
 *   the object then, or afterwards.  Harvests of one slot wait for each
 *   other; those of different slots do not, except where kvmdirty(3) says so.
 * - The library starts no thread, keeps no global state, blocks no signal, and
 *   allocates memory only in kvmdirty_open(), kvmdirty_add_vcpu(),
 *   kvmdirty_track(), kvmdirty_attach() and kvmdirty_vm_attach().
 */

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define KVMDIRTY_API __attribute__((visibility("default")))
#else
#define KVMDIRTY_API
#endif

#define KVMDIRTY_VERSION_MAJOR	1
#define KVMDIRTY_VERSION_MINOR	0

/* From <linux/kvm.h>, which only those who call these functions need. */
struct kvm_run;
struct kvm_userspace_memory_region;

/** struct kvmdirty - dirty logging of one VM */
struct kvmdirty;

/** struct kvmdirty_slot - the dirty log of one memslot */
struct kvmdirty_slot;

/**
 * enum kvmdirty_backend - the logs that KVM may keep
 * @KVMDIRTY_AUTO: the first of the others that works
 * @KVMDIRTY_SLOT_RING: dirty slot rings, KVM_CAP_DIRTY_SLOT_RING
 * @KVMDIRTY_RING: the dirty ring, KVM_CAP_DIRTY_LOG_RING(_ACQ_REL).  vCPUs exit
 *	when it is full, and the VMM has to call kvmdirty_vcpu_full() then
 * @KVMDIRTY_BITMAP: the dirty bitmap, with or without
 *	KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
 */
enum kvmdirty_backend {
	KVMDIRTY_AUTO = 0,
	KVMDIRTY_SLOT_RING = 1,
	KVMDIRTY_RING = 2,
	KVMDIRTY_BITMAP = 3
};

/* kvmdirty_options.flags: never choose a back end that makes vCPUs exit */
#define KVMDIRTY_OPEN_NO_EXITS		0x1U
/* kvmdirty_options.flags: the bitmap without KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 */
#define KVMDIRTY_OPEN_NO_MANUAL		0x2U

/**
 * struct kvmdirty_options - how kvmdirty_open() is to set up logging
 * @size: sizeof(struct kvmdirty_options), for later versions of this struct
 * @backend: enum kvmdirty_backend; KVMDIRTY_AUTO to take the best
 * @ring_entries: entries of each ring, a power of two; 0 for the default.  The
 *	bitmap has none and ignores it
 * @flags: KVMDIRTY_OPEN_* or 0
 * @reason: out: if kvmdirty_open() fails, why, in words: a constant string
 *	without a newline; NULL otherwise
 */
struct kvmdirty_options {
	uint32_t size;
	uint32_t backend;
	uint32_t ring_entries;
	uint32_t flags;
	const char *reason;
};

/**
 * struct kvmdirty_run - pages that follow one another
 * @offset: the first one, in pages from the start of the memslot
 * @npages: how many, at least one
 */
struct kvmdirty_run {
	uint32_t offset;
	uint32_t npages;
};

/**
 * struct kvmdirty_result - what a harvest handed out
 * @nr_pages: pages
 * @nr_runs: runs
 */
struct kvmdirty_result {
	uint64_t nr_pages;
	uint64_t nr_runs;
};

/* kvmdirty_info.flags: logging has ended; what is left can be harvested */
#define KVMDIRTY_INFO_STOPPED		0x1U
/* kvmdirty_info.flags: kvmdirty_attach() made it, not kvmdirty_track() */
#define KVMDIRTY_INFO_ATTACHED		0x2U

/**
 * struct kvmdirty_info - what is known about a slot
 * @backend: enum kvmdirty_backend
 * @slot: as_id << 16 | id
 * @npages: size of the memslot, in pages
 * @base_gfn: its place in guest physical memory, in pages.  Slot rings: where it
 *	is now; the others: where it was when it was tracked
 * @ring_entries: entries of each ring, 0 with the bitmap
 * @nr_rings: rings that exist now, 0 with the bitmap
 * @flags: KVMDIRTY_INFO_* or 0
 * @log: which of the logs it had, one after the other: see struct kvmdirty_vm_run
 */
struct kvmdirty_info {
	uint32_t backend;
	uint32_t slot;
	uint64_t npages;
	uint64_t base_gfn;
	uint32_t ring_entries;
	uint32_t nr_rings;
	uint32_t flags;
	uint32_t log;
};

/**
 * struct kvmdirty_stats - counts of one slot since it was tracked or attached
 * @harvests: calls of kvmdirty_harvest() and kvmdirty_harvest_each(), and what
 *	kvmdirty_vm_harvest() did to this slot alone
 * @runs: runs that were handed out
 * @pages: pages in those
 * @returned_pages: pages that a callback refused, or that did not fit the budget
 *	any more, and were kept for a later call
 * @marked_pages: pages named to kvmdirty_mark()
 * @discarded_pages: pages named to kvmdirty_discard()
 * @ioctls: system calls made for this slot, without those for the whole VM
 */
struct kvmdirty_stats {
	uint64_t harvests;
	uint64_t runs;
	uint64_t pages;
	uint64_t returned_pages;
	uint64_t marked_pages;
	uint64_t discarded_pages;
	uint64_t ioctls;
};

/**
 * struct kvmdirty_vm_stats - counts of a VM since kvmdirty_open()
 * @full_exits: exits that kvmdirty_vcpu_full() served
 * @collects: times that all dirty rings were collected and reset
 * @collected: entries that they held
 * @stray: pages, in those or from the log of all memslots, that belonged to no slot that is
 *	tracked
 * @harvests: calls of kvmdirty_vm_harvest()
 * @ioctls: system calls that harvested the log of all memslots
 */
struct kvmdirty_vm_stats {
	uint64_t full_exits;
	uint64_t collects;
	uint64_t collected;
	uint64_t stray;
	uint64_t harvests;
	uint64_t ioctls;
};

/**
 * kvmdirty_version() - the version of the library that is linked
 *
 * Return: a constant string, "MAJOR.MINOR".
 */
KVMDIRTY_API const char *kvmdirty_version(void);

/**
 * kvmdirty_backend_name() - a name for messages
 * @backend: enum kvmdirty_backend
 *
 * Return: a constant string: "auto", "slot-ring", "ring", "bitmap", or
 * "unknown".
 */
KVMDIRTY_API const char *kvmdirty_backend_name(unsigned int backend);

/**
 * kvmdirty_probe() - which back ends does this kernel offer?
 * @fd: a VM fd, or one of /dev/kvm
 *
 * That the kernel has one does not say that it can still be enabled: see
 * kvmdirty_open().
 *
 * Return: a mask of 1U << enum kvmdirty_backend, or -EBADF, -ENOTTY if @fd is
 * something else.
 */
KVMDIRTY_API int kvmdirty_probe(int fd);

/**
 * kvmdirty_open() - set up dirty logging of a VM
 * @vm_fd: the VM.  It is borrowed: keep it open until kvmdirty_close()
 * @options: what to set up, or NULL for the best that there is
 * @kdp: where to store the handle; free it with kvmdirty_close()
 *
 * Call it when the VM is new: before its first vCPU exists for the dirty ring,
 * before a memslot logs for slot rings, and before its vCPUs run.  With
 * KVMDIRTY_AUTO the order of preference is slot rings, dirty ring, bitmap;
 * what is missing or can no longer be enabled is passed over, and so is the
 * dirty ring with KVMDIRTY_OPEN_NO_EXITS.  Slot rings that somebody enabled
 * before are used as they are.
 *
 * From then on the library owns dirty logging of this VM: do not call
 * KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG or KVM_RESET_DIRTY_RINGS yourself.
 *
 * Return: 0, or
 * -EINVAL: an option makes no sense: its size, back end, flags or entries;
 * -EOPNOTSUPP: the kernel does not have the back end that was asked for;
 * -EBUSY: it has, but it is too late to enable it (a vCPU exists, a memslot
 *	logs), or another log is enabled;
 * -ENOMEM, -EBADF, -ENOTTY (not a VM), or what else KVM says.
 * options->reason says it in words.
 */
KVMDIRTY_API int kvmdirty_open(int vm_fd, struct kvmdirty_options *options,
			       struct kvmdirty **kdp);

/**
 * kvmdirty_close() - forget a VM and all its slots
 * @kd: from kvmdirty_open(); NULL is allowed
 *
 * Frees all slots that are still tracked, with what they have pending.
 * Memslots that log go on logging.  With the dirty ring nobody empties it
 * afterwards, and it cannot be opened again: close it when the VM ends.
 *
 * Must not be called from a callback of kvmdirty_harvest_each() of such a slot.
 */
KVMDIRTY_API void kvmdirty_close(struct kvmdirty *kd);

/**
 * kvmdirty_backend() - which log is it?
 * @kd: from kvmdirty_open()
 *
 * Return: enum kvmdirty_backend, never KVMDIRTY_AUTO.
 */
KVMDIRTY_API enum kvmdirty_backend kvmdirty_backend(const struct kvmdirty *kd);

/**
 * kvmdirty_add_vcpu() - tell of a vCPU
 * @kd: from kvmdirty_open()
 * @vcpu_fd: the vCPU.  It is borrowed: keep it open until kvmdirty_close()
 *
 * At any time, for every vCPU, before it first runs.  Only the dirty ring needs
 * it; call it always, and the VMM works with each of them.
 *
 * Return: 0; -EEXIST if it was added before; -EOPNOTSUPP: @kd is attached; -EBADF,
 * -ENOTTY if it is not a vCPU; -ENOMEM.
 */
KVMDIRTY_API int kvmdirty_add_vcpu(struct kvmdirty *kd, int vcpu_fd);

/**
 * kvmdirty_vcpu_full() - serve the exit of a vCPU whose ring is full
 * @kd: from kvmdirty_open()
 * @vcpu_fd: the vCPU that left KVM_RUN
 * @run: its struct kvm_run
 *
 * With the dirty ring, KVM_RUN ends with KVM_EXIT_DIRTY_RING_FULL until the ring
 * is emptied.  Call this for every exit that the VMM does not know itself, on
 * the vCPU's own thread, with whatever back end: it empties the rings into
 * the slots' memory in the library, where the next harvest finds the pages, and
 * the vCPU can go on.  It also serves KVM_EXIT_DIRTY_SLOT_RING_FULL, for VMMs
 * that enabled slot rings with KVM_DIRTY_SLOT_RING_EXIT_ON_FULL by themselves.
 *
 * Must not be called from a callback of kvmdirty_harvest_each().
 *
 * Return: 1 if it was such an exit and KVM_RUN can be called again; 0 if it was
 * another exit; -ENOENT if the vCPU was never added; -EINTR if a signal came
 * (call again); -EOVERFLOW as of kvmdirty_harvest(); or what KVM says.
 */
KVMDIRTY_API int kvmdirty_vcpu_full(struct kvmdirty *kd, int vcpu_fd, const struct kvm_run *run);

/**
 * kvmdirty_track() - follow a memslot
 * @kd: from kvmdirty_open()
 * @region: the memslot as the VMM gave it to KVM, or is about to
 * @slotp: where to store the handle; free it with kvmdirty_untrack()
 *
 * Memslots are the VMM's.  If region->flags has KVM_MEM_LOG_DIRTY_PAGES, the
 * memslot logs already and the library only joins in.  If not, the library calls
 * KVM_SET_USER_MEMORY_REGION with *@region and that flag, and sets it in *@region,
 * so that the VMM's own record stays true.  The memslot may be moved while it
 * is tracked, with KVM_MEM_LOG_DIRTY_PAGES set; resizing or deleting it ends
 * tracking: call kvmdirty_stop() first.
 *
 * Return: 0; -EOPNOTSUPP: @kd is attached; -EINVAL: the region is empty or not in whole
 * pages, or the memslot's size in KVM differs; -EEXIST: this memslot is tracked already; -ENOENT:
 * the memslot does not log although region->flags says so; -ENOMEM; or what KVM
 * says.
 */
KVMDIRTY_API int kvmdirty_track(struct kvmdirty *kd, struct kvm_userspace_memory_region *region,
				struct kvmdirty_slot **slotp);

/**
 * kvmdirty_attach() - follow a memslot of another process's VM
 * @log_fd: a slot ring log fd: what kvmdirty_fd() gave there and SCM_RIGHTS or
 *	pidfd_getfd() brought here.  The library makes a duplicate of its own
 * @slotp: where to store the handle; free it with kvmdirty_untrack()
 *
 * Slot rings only.  The handle can do all that the VMM's can.  Each page goes to
 * whoever harvests first, so only one of them should.
 *
 * Return: 0; -EINVAL: it is not a log fd; -EBADF, -EMFILE, -ENOMEM.
 */
KVMDIRTY_API int kvmdirty_attach(int log_fd, struct kvmdirty_slot **slotp);

/**
 * kvmdirty_stop() - end logging and keep what is logged
 * @slot: from kvmdirty_track()
 * @region: the memslot as it is now, or NULL
 *
 * With @region, the library calls KVM_SET_USER_MEMORY_REGION with *@region
 * less KVM_MEM_LOG_DIRTY_PAGES, and clears the flag in *@region.  With NULL the VMM
 * does that, or deletes the memslot, right *after* this call.  Afterwards
 * harvests hand out what is left and then say -ENODEV.
 *
 * With the bitmap, pages written while this call works, or with NULL between it and
 * what the VMM does next, may be lost, as KVM drops them: let no vCPU run if that
 * matters.
 *
 * Return: 0, also if it was stopped before; -EOPNOTSUPP if the slot is attached
 * (the VMM decides when it stops); -EINTR: call again; -EDEADLK: called from a
 * callback of the same slot; or what KVM says, and then the slot is still tracked and
 * nothing is lost.
 */
KVMDIRTY_API int kvmdirty_stop(struct kvmdirty_slot *slot,
			       struct kvm_userspace_memory_region *region);

/* kvmdirty_untrack(): forget pages that are not harvested yet */
#define KVMDIRTY_UNTRACK_DROP		0x1U

/**
 * kvmdirty_untrack() - free a slot
 * @slot: from kvmdirty_track() or kvmdirty_attach(); NULL is allowed
 * @flags: KVMDIRTY_UNTRACK_DROP or 0
 *
 * For a tracked slot that was not stopped it does what kvmdirty_stop(slot, NULL)
 * does.  If pages are then left, it fails with -EBUSY, the slot stays, and they can
 * be harvested; with KVMDIRTY_UNTRACK_DROP they are forgotten.  An attached slot is
 * not stopped: pages that were not handed out are left to who harvests next, and
 * -EBUSY only means that some could not be given back.
 *
 * Return: 0: it is freed; -EBUSY: pages are left, it is not; -EINVAL: unknown
 * flag; -EDEADLK: called from a callback of the same slot; or an error of
 * kvmdirty_stop(), and it is not freed.  With KVMDIRTY_UNTRACK_DROP it only fails
 * with -EINVAL or -EDEADLK.
 */
KVMDIRTY_API int kvmdirty_untrack(struct kvmdirty_slot *slot, unsigned int flags);

/*
 * Harvest flag: do not wait for what hardware of running vCPUs still holds.
 * Slot rings only; the others never wait.
 */
#define KVMDIRTY_HARVEST_NOSYNC		0x1U

/**
 * kvmdirty_harvest() - take dirty pages into an array
 * @slot: from kvmdirty_track() or kvmdirty_attach()
 * @runs: where to store runs
 * @nr_runs: how many fit there, at least 1
 * @flags: KVMDIRTY_HARVEST_NOSYNC or 0
 * @result: how many were stored; NULL if nobody wants to know
 *
 * The runs are re-armed when the call returns: copy the pages then.  They are
 * not sorted.  When it returns 0, every page that was written before the call,
 * by a vCPU that has left KVM_RUN since or named to kvmdirty_mark(), has been
 * handed out, by this call or by earlier ones.  With slot rings that holds for
 * vCPUs in KVM_RUN as well, unless KVMDIRTY_HARVEST_NOSYNC is set.  A page is
 * handed out again only if it was written again.
 *
 * Context: waits for another harvest of the same slot.
 *
 * Return: 0: that is all; 1: there is more, call again; or, with nothing stored
 * and nothing lost,
 * -EINVAL: @nr_runs is 0, or unknown flag;
 * -EFAULT: @runs cannot be written (with the dirty ring and the bitmap on Linux
 *	before 5.14, SIGSEGV instead);
 * -EINTR: a signal came;
 * -ENODEV: logging has ended, and all that was left has been handed out;
 * -EOVERFLOW: KVM overran a dirty ring and lost pages, which kernels without a
 *	fault never do.  It stays so: copy all of the memory, and in a new VM use
 *	another back end;
 * -EDEADLK: called from a callback of the same slot; or what KVM says.
 */
KVMDIRTY_API int kvmdirty_harvest(struct kvmdirty_slot *slot, struct kvmdirty_run *runs,
				  size_t nr_runs, unsigned int flags,
				  struct kvmdirty_result *result);

/**
 * typedef kvmdirty_run_fn - what kvmdirty_harvest_each() calls for each run
 * @run: the pages, re-armed: copy them now.  Valid during the call
 * @arg: from the caller of kvmdirty_harvest_each()
 *
 * It must not call the library with the same slot, except for kvmdirty_mark(),
 * kvmdirty_info(), kvmdirty_stats() and kvmdirty_fd(); nor kvmdirty_close(), which
 * would free it; nor kvmdirty_vm_harvest(); and must not leave by longjmp() or a C++
 * exception.
 *
 * Return: 0: taken, go on; > 0: taken, stop; a negative errno: not taken, keep
 * it in the log and stop.
 */
typedef int (*kvmdirty_run_fn)(const struct kvmdirty_run *run, void *arg);

/**
 * kvmdirty_harvest_each() - take dirty pages by callback, up to a budget
 * @slot: from kvmdirty_track() or kvmdirty_attach()
 * @fn: called for each run
 * @arg: handed to @fn
 * @max_pages: hand out no more pages than this; 0 for no limit.  A run that
 *	would go beyond is split
 * @flags: KVMDIRTY_HARVEST_NOSYNC or 0
 * @result: what @fn took; NULL if nobody wants to know.  Also set on failure
 *
 * As kvmdirty_harvest(), which see, but that what @fn took before a failure stays
 * taken.
 *
 * Return: 0: that is all; 1: there is more (the budget is used up, or @fn said
 * stop); what @fn returned if that is negative; or an error as
 * of kvmdirty_harvest().
 */
KVMDIRTY_API int kvmdirty_harvest_each(struct kvmdirty_slot *slot, kvmdirty_run_fn fn, void *arg,
				       uint64_t max_pages, unsigned int flags,
				       struct kvmdirty_result *result);

/**
 * struct kvmdirty_vm_run - pages of one memslot that follow one another
 * @slot: the memslot, as_id << 16 | id
 * @log: which of the logs it had, one after the other.  No two logs of a VM have the same
 *	number: a memslot that is deleted and made again has another.  kvmdirty_info() tells it
 * @offset: the first page, in pages from the start of the memslot
 * @npages: how many, at least one
 */
struct kvmdirty_vm_run {
	uint32_t slot;
	uint32_t log;
	uint32_t offset;
	uint32_t npages;
};

/* kvmdirty_vm_result.flags: slots came or went since this was told last */
#define KVMDIRTY_VM_LAYOUT		0x1U

/**
 * struct kvmdirty_vm_result - what a harvest of all slots handed out
 * @nr_pages: pages
 * @nr_runs: runs
 * @flags: KVMDIRTY_VM_LAYOUT or 0
 * @pad: 0
 */
struct kvmdirty_vm_result {
	uint64_t nr_pages;
	uint64_t nr_runs;
	uint32_t flags;
	uint32_t pad;
};

/**
 * typedef kvmdirty_vm_run_fn - what kvmdirty_vm_harvest() calls for each run
 * @run: the pages, re-armed: copy them now.  Valid during the call
 * @arg: from the caller of kvmdirty_vm_harvest()
 *
 * It must not call kvmdirty_vm_harvest() nor kvmdirty_close(); nor, with the slot that @run is of,
 * what kvmdirty_run_fn must not; and must not leave by longjmp() or a C++ exception.
 *
 * Return: 0: taken, go on; > 0: taken, stop; a negative errno: not taken, keep
 * it in the log and stop.
 */
typedef int (*kvmdirty_vm_run_fn)(const struct kvmdirty_vm_run *run, void *arg);

/**
 * kvmdirty_vm_harvest() - take dirty pages of all slots, up to a budget
 * @kd: from kvmdirty_open(): of all slots that are tracked; or from
 *	kvmdirty_vm_attach(): of all memslots that log
 * @fn: called for each run
 * @arg: handed to @fn
 * @max_pages: hand out no more pages than this; 0 for no limit.  A run that
 *	would go beyond is split
 * @flags: KVMDIRTY_HARVEST_NOSYNC or 0
 * @result: what @fn took; NULL if nobody wants to know.  Also set on failure
 *
 * As kvmdirty_harvest_each() of one slot after the other, but with slot rings it is one system
 * call, which waits once for what hardware holds and flushes TLBs once, and costs nothing for
 * slots that have nothing.  Kernels without a log of all memslots, and the other back ends, have
 * one slot after the other harvested.  Slots may come and go meanwhile.  If it stops early, the
 * next call goes on with other slots first, so that none waits for ever.
 *
 * With slot rings, pages of memslots that log and are not tracked are taken as well and dropped,
 * and counted as stray; so are those of the dirty ring.
 *
 * Context: waits for another such call, and for harvests of single slots.
 *
 * Return: 0: that is all; 1: there is more (the budget is used up, or @fn said
 * stop); what @fn returned if that is negative; -ENODEV: attached, the VM is gone, and all that
 * was left has been handed out; -EDEADLK: called from a callback; or an error as of
 * kvmdirty_harvest().
 */
KVMDIRTY_API int kvmdirty_vm_harvest(struct kvmdirty *kd, kvmdirty_vm_run_fn fn, void *arg,
				     uint64_t max_pages, unsigned int flags,
				     struct kvmdirty_vm_result *result);

/**
 * kvmdirty_vm_fd() - the log fd of all memslots
 * @kd: from kvmdirty_open() or kvmdirty_vm_attach()
 *
 * As kvmdirty_fd() of one slot: to poll(), POLLHUP when the VM is gone; and to give to another
 * process, for kvmdirty_vm_attach().  As long as it is open anywhere, KVM keeps what memslots had
 * logged when they were deleted, until it is harvested.
 *
 * Return: the fd, or -EOPNOTSUPP: the back end is not slot rings, or the kernel has them but no
 * such log; -EMFILE, -ENOMEM.
 */
KVMDIRTY_API int kvmdirty_vm_fd(struct kvmdirty *kd);

/**
 * kvmdirty_vm_attach() - follow all memslots of another process's VM
 * @log_fd: what kvmdirty_vm_fd() gave there and SCM_RIGHTS or pidfd_getfd() brought here.  The
 *	library makes a duplicate of its own
 * @kdp: where to store the handle; free it with kvmdirty_close()
 *
 * The handle is for kvmdirty_vm_harvest(), which then names memslots that only the VMM knows, and
 * says KVMDIRTY_VM_LAYOUT when logs have come or gone: ask the VMM.  A callback that is given a
 * @log that it does not know can refuse it, ask, and be given it again.  Once a log is gone, and a
 * harvest begun after that has returned 0, no run of it comes any more.  What was refused and not
 * harvested again is lost with kvmdirty_close().  kvmdirty_track() and kvmdirty_add_vcpu() give
 * -EOPNOTSUPP.
 *
 * Return: 0; -EINVAL: it is not such a log fd; -EBADF, -EMFILE, -ENOMEM.
 */
KVMDIRTY_API int kvmdirty_vm_attach(int log_fd, struct kvmdirty **kdp);

/**
 * kvmdirty_mark() - "I wrote these pages"
 * @slot: from kvmdirty_track() or kvmdirty_attach()
 * @runs: the pages
 * @nr_runs: how many runs; 0 does nothing
 *
 * For what the VMM writes into guest memory by itself (device emulation, DMA), which
 * KVM does not see.  Call it after writing.  The pages are in the next harvest.
 * It does not wait for a callback of kvmdirty_harvest_each().
 *
 * Return: 0; -EINVAL: a run is empty or goes beyond the memslot, and nothing was
 * marked; -ENODEV: logging has ended; -EFAULT (slot rings): @runs cannot be read.
 */
KVMDIRTY_API int kvmdirty_mark(struct kvmdirty_slot *slot, const struct kvmdirty_run *runs,
			       size_t nr_runs);

/**
 * kvmdirty_discard() - "the contents of these pages do not matter"
 * @slot: from kvmdirty_track() or kvmdirty_attach()
 * @runs: the pages
 * @nr_runs: how many runs; 0 does nothing
 *
 * They leave the log and are re-armed: the next write logs them again.  For pages
 * that the guest freed.
 *
 * Context: waits for a harvest of the same slot.
 *
 * Return: 0; -EINVAL: a run is empty or goes beyond the memslot, and nothing was
 * discarded; -ENODEV: logging has ended; -EINTR: part of it may be done, call
 * again; -EFAULT, -EDEADLK; or what KVM says.
 */
KVMDIRTY_API int kvmdirty_discard(struct kvmdirty_slot *slot, const struct kvmdirty_run *runs,
				  size_t nr_runs);

/**
 * kvmdirty_fd() - the log fd of a slot
 * @slot: from kvmdirty_track() or kvmdirty_attach()
 *
 * To poll() for: POLLIN when a ring is half full or pages are in no ring; POLLHUP
 * when logging has ended.  To give to another process, for kvmdirty_attach(): it
 * lets its holder harvest, mark and discard, but not see the memory.  The
 * library's: do not close it.  After a harvest that returned 1 call again, do not
 * poll().  Fewer pages than half a ring wake nobody: use a timeout too.
 *
 * Return: the fd, or -EOPNOTSUPP if it is not a slot ring: harvest by a timer.
 */
KVMDIRTY_API int kvmdirty_fd(const struct kvmdirty_slot *slot);

/**
 * kvmdirty_info() - what is known about a slot
 * @slot: from kvmdirty_track() or kvmdirty_attach()
 * @info: filled in
 * @size: sizeof(*@info).  A later library fills in what an older struct has
 *
 * Return: 0, or what KVM says.
 */
KVMDIRTY_API int kvmdirty_info(struct kvmdirty_slot *slot, struct kvmdirty_info *info,
			       size_t size);

/**
 * kvmdirty_stats() - counts of a slot
 * @slot: from kvmdirty_track() or kvmdirty_attach()
 * @stats: filled in
 * @size: sizeof(*@stats).  A later library fills in what an older struct has
 *
 * The counts are read one by one while others may add to them.
 */
KVMDIRTY_API void kvmdirty_stats(struct kvmdirty_slot *slot, struct kvmdirty_stats *stats,
				 size_t size);

/**
 * kvmdirty_vm_stats() - counts of a VM
 * @kd: from kvmdirty_open()
 * @stats: filled in
 * @size: sizeof(*@stats).  A later library fills in what an older struct has
 */
KVMDIRTY_API void kvmdirty_vm_stats(struct kvmdirty *kd, struct kvmdirty_vm_stats *stats,
				    size_t size);

#ifdef __cplusplus
}
#endif

#endif /* KVMDIRTY_H */
