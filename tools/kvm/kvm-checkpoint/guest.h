/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The guest that is protected: its memory, mapped; which of its pages were written; its device
 * state.
 *
 * A page is written by a vCPU, or by QEMU for a device.  What vCPUs write is found in KVM's log of
 * all memory slots, harvested here through a file descriptor that QEMU sent.  What else QEMU knows about
 * comes from x-checkpoint-collect; with a kernel without slot rings that is everything.
 *
 * The order in which an epoch is taken is what makes it a point in time: stop the guest, save the
 * state, let QEMU report its pages, harvest the logs, copy, resume.  (A first harvest and copy go
 * on while QEMU saves the state, to make the pause shorter.)  It is one command of QEMU, or three:
 * brief.c, guest.c.
 */
#ifndef KC_GUEST_H
#define KC_GUEST_H

#include <kvmdirty.h>

#include "qmp.h"
#include "sink.h"
#include "status.h"

/* Pages that were found dirty and not copied yet; never loses one but by dirty_forget() */
struct dirty_word {
	uint32_t block;
	uint64_t word;
};

struct dirty {
	uint64_t *bits[KC_MAX_BLOCKS];
	struct dirty_word *words;	/* which are not 0, in the order they were found */
	size_t nr_words, max_words;
	uint64_t pages;
	bool has_holes;			/* some may be of memory that was given back to the host */
};

/* Pages copied aside */
struct copied_page {
	uint32_t block;
	uint64_t page;
	size_t at;			/* in data, in pages */
	bool gone;			/* it does not count */
};

/* Pages in a row that have no memory, so that there is nothing to copy; they read as zero */
struct copied_hole {
	uint32_t block;
	uint64_t page, n;
	size_t at;			/* copies from there on were made later */
};

/* Pages of a word that were not copied, as the guest does not use them */
struct dropped_word {
	uint32_t block;
	uint64_t word, bits;
};

struct copy {
	struct copied_page *pages;
	uint8_t *data;
	size_t nr, max;
	struct copied_hole *holes;
	size_t nr_holes, max_holes;
	struct dropped_word *dropped;
	size_t nr_dropped, max_dropped;
};

/* Pages that the guest has at addresses in a row */
struct guest_range {
	uint32_t block;
	uint64_t page, npages, gfn;
};

/* See states.c */
struct guest_states {
	const uint8_t *table;
	uint64_t nr;			/* of bytes in it; 0: there is none now */
	struct guest_range *ranges;
	unsigned int nr_ranges;
	uint64_t *skipped[KC_MAX_BLOCKS];	/* a bit for each page; NULL: nothing is noted */
	uint64_t left_out;		/* pages that were not copied, since guest_open() */
};

struct guest_block {
	const uint8_t *map;
	int fd;
	uint64_t inode;
	uint32_t qemu_nr;
};

/* A memory slot of KVM, as long as it has had one log */
struct guest_slot {
	uint32_t log;			/* its number */
	int block;			/* that it shows, -1 if that is not shared */
	bool gone;			/* what it had may still come */
	uint64_t page, npages;
};

/**
 * struct guest_opts - how a guest is protected
 * @qmp: path of QEMU's monitor.
 * @external_disks: writable disks are taken care of.
 * @disks: names of those that are, if not all; the others are taken care of.
 * @nr_disks: how many names.
 * @trusted_devices: patterns of types of devices that have no state but what QEMU has.
 * @nr_trusted_devices: how many.
 * @pause_limit_ms: the guest goes on when it has stood still for so long, whatever we do; 0 for
 *	never.
 * @qemu_timeout_ms: how long QEMU may not answer once the guest is protected; 0: for as long as it
 *	lives.
 * @watch_packets: guest.packets_fd is to tell of packets that are held back.
 * @idle: called now and then while QEMU works, see qmp_open(); or NULL.
 * @idle_ctx: for @idle.
 * @stopped: called in each guest_take() when the guest stands still and its disks are at rest; or
 *	NULL.  Also if nothing comes of it.
 * @stopping: called before that, or NULL.
 */
struct guest_opts {
	const char *qmp;
	bool external_disks;
	const char *disks[KC_MAX_DISKS];
	unsigned int nr_disks;
	const char *trusted_devices[16];
	unsigned int nr_trusted_devices;
	unsigned int pause_limit_ms, qemu_timeout_ms;
	bool watch_packets;
	int (*idle)(void *ctx);
	void *idle_ctx;
	void (*stopping)(void *ctx), (*stopped)(void *ctx);
};

#define GUEST_NO_LEASE	UINT64_MAX

/* A tap device whose packets QEMU cannot hold back, and why; the address is its own */
struct guest_tap {
	char card[64], ifname[16], mac[18], why[160];
};

#define GUEST_MAX_TAPS	8u

struct guest {
	struct guest_opts opts;
	struct qmp qmp;
	struct kc_guest id;
	struct kc_block block_ids[KC_MAX_BLOCKS];
	struct kc_disk disk_ids[KC_MAX_DISKS];
	char disk_nodes[KC_MAX_DISKS][KC_NAME_SIZE];	/* what QEMU's commands call them */
	struct guest_block blocks[KC_MAX_BLOCKS];
	struct kvmdirty *log;		/* of all slots; NULL: QEMU reads what KVM has */
	int log_fd;			/* to poll */
	struct guest_slot *slots;
	unsigned int nr_slots;
	char dirty_log[32];		/* "dirty-slot-ring", "dirty-ring" or "bitmap" */
	uint64_t lease_us;		/* see guest_lease() */
	bool lease_first;
	char *devices;			/* what their state consists of, sorted, a line for each part */
	uint64_t generation;
	int sock, buffer;		/* shared with QEMU */
	bool no_take;			/* this QEMU has no x-checkpoint-take */
	bool hears;			/* or it can be asked for that on the socket */
	bool holds;			/* what it sends is held back */
	bool unbroken;			/* and was, says the last guest_hold() */
	struct guest_tap taps[GUEST_MAX_TAPS];	/* that QEMU cannot hold back, says that too */
	unsigned int nr_taps;
	int packets_fd;			/* an eventfd: there is something since the last state; or -1 */
	struct dirty dirty;
	struct guest_states states;
	bool has_balloon, hints;	/* see hints.c */
	uint64_t *hinted[KC_MAX_BLOCKS];	/* a bit for each page */
};

/*
 * What guest_take() did.  waits_for says why the guest has to wait until it can run again, which it
 * will then, and is empty if it has not.
 */
struct guest_epoch {
	struct copy copy;
	void *state;
	size_t state_len, state_max;
	uint64_t taken_us;		/* when the guest was stopped, or found stopped */
	uint64_t us[KC_PAUSE_PARTS];
	bool was_running, resumed;
	bool last;			/* in: the guest is to stay stopped */
	uint64_t packets;		/* for guest_release(): those sent before it; 0: none are held */
	char status[32];		/* QEMU's word for it */
	char waits_for[256];
};

/**
 * guest_open() - connect to QEMU and start logging
 * @g: filled in, to be closed by guest_close() in any case.
 * @opts: copied, its strings must stay.
 * @err: why not.
 *
 * Return: 0 or a negative errno: what the user can do about it is in @err.
 */
int guest_open(struct guest *g, const struct guest_opts *opts, struct kc_err *err);

/** guest_reopen() - the same once more, with -ESTALE if it has other devices by now */
int guest_reopen(struct guest *g, struct kc_err *err);

/** guest_close() - end logging; QEMU resumes the guest if it was stopped for us */
void guest_close(struct guest *g);

/*
 * A call below that fails with anything but -EAGAIN may have lost dirty pages, and may have left
 * the guest stopped: guest_close() and QEMU resumes it; then guest_open(), and compare all pages.
 */

/**
 * guest_harvest() - move what the log holds to g->dirty
 * @g: the guest, running or not.
 * @err: why not.
 *
 * A running guest may write faster than this harvests: it ends when it has had each page twice, and
 * what remains in the log is for the next time.  Without slot rings there is nothing to do.  It may
 * have to ask QEMU for the layout.
 *
 * Return: 0 or a negative errno.
 */
int guest_harvest(struct guest *g, struct kc_err *err);

/**
 * guest_collect() - guest_harvest() and QEMU's pages
 *
 * Return: 0 or a negative errno.
 */
int guest_collect(struct guest *g, struct kc_err *err);

/**
 * guest_take() - take an epoch: stop, collect, save, copy, resume
 * @g: the guest.
 * @e: what was taken; zero it before the first time, its buffers are used again.  Pages are sorted.
 * @err: why not.
 *
 * Return: 0; -EAGAIN if somebody else resumed the guest or changed its memory meanwhile, or it took
 * too long; -ENODATA while the guest is in a run state of which there can be no epoch: in both cases
 * nothing is lost; -EUCLEAN if its memory was changed and no log knows of it; other negative errno.
 */
int guest_take(struct guest *g, struct guest_epoch *e, struct kc_err *err);

/**
 * guest_lease() - let the guest run until then, from the next guest_take() on
 * @g: the guest.
 * @until_us: of kc_boot_us(): QEMU stops it then, whatever becomes of us; 0: for ever.
 * @first: only if it has none.
 */
static inline void guest_lease(struct guest *g, uint64_t until_us, bool first)
{
	g->lease_us = until_us;
	g->lease_first = first;
}

/**
 * guest_hold() - hold back what the guest sends, from the next guest_take() on
 * @g: the guest; g->holds says whether it has a network card at all.
 * @limit_ms: for how long when we are gone.
 * @checkpoints: a name of where its epochs go; g->unbroken says whether all is held that it has sent
 *	since they did, with whatever process.  Empty: nobody will ask.
 * @anew: there is no epoch there that counts, so that from now on it is.
 * @err: why not.
 *
 * Those of g->taps are not held by that, but numbered as others are.
 *
 * Return: 0; -EOPNOTSUPP if there is a card whose packets cannot be held; another negative errno.
 */
int guest_hold(struct guest *g, unsigned int limit_ms, const char *checkpoints, bool anew,
	       struct kc_err *err);

/**
 * guest_guard() - who is to be told what becomes of what g->taps have sent
 * @g: the guest, after guest_hold().
 * @fd: the end for QEMU, see x-checkpoint-guard.
 * @err: why not.
 */
int guest_guard(struct guest *g, int fd, struct kc_err *err);

/** guest_packets_wait() - was something held back since the last state?  It was asked: it is forgotten */
bool guest_packets_wait(struct guest *g);

/**
 * guest_release() - let go what was held back
 * @g: the guest.
 * @packets: what was sent before the epoch with this guest_epoch.packets; 0: all, and hold nothing
 *	any more.
 * @drop: it is not to be sent, as the guest goes on elsewhere.
 * @err: why not.
 *
 * Return: 0 or a negative errno.
 */
int guest_release(struct guest *g, uint64_t packets, bool drop, struct kc_err *err);

/** guest_end_lease() - it runs for ever; by a connection of its own, so after guest_close() */
int guest_end_lease(const struct guest_opts *opts, struct kc_err *err);

/**
 * guest_copy_running() - copy dirty pages of the running guest aside
 * @g: the guest.
 * @e: where to.
 * @max: at most so many pages; the others stay dirty.
 * @err: why not.
 *
 * What is copied may be half written: such a page gets dirty again.
 *
 * Return: 0 or a negative errno.
 */
int guest_copy_running(struct guest *g, struct guest_epoch *e, uint64_t max, struct kc_err *err);

/** guest_died() - waits a moment for QEMU's process to be gone, after -EPIPE */
bool guest_died(struct guest *g);

/*
 * Between the files of this part
 */

/* dirty.c */
void dirty_forget(struct dirty *d);
/* A bit for each page of each block, all clear, where there is none yet; and none any more */
int guest_new_bits(const struct guest *g, uint64_t *bits[]);
void guest_free_bits(uint64_t *bits[]);
int dirty_add(struct dirty *d, uint32_t block, uint64_t page, uint64_t n);

/*
 * Where a block's file has holes, asked once for each hole and what follows it; zero it first.  To
 * read a hole would allocate memory.
 */
struct guest_holes {
	uint64_t hole_until, data_until;	/* pages */
};

bool guest_is_hole(struct guest_holes *h, int fd, uint64_t page);
/* Moves dirty pages to the copy: at most max of those that have memory, and all holes on the way */
int guest_copy_dirty(struct guest *g, struct copy *c, uint64_t max);
/* Before the guest is stopped: memory for twice as much as last time */
void guest_ready_copy(const struct guest *g, struct copy *c);
void copy_sort(struct copy *c);

static inline void copy_reset(struct copy *c)
{
	c->nr = c->nr_holes = c->nr_dropped = 0;
}

/* states.c */

/* Says the guest that it does not use it?  What that is worth, and when, see there. */
bool guest_is_unused(const struct guest *g, uint32_t block, uint64_t page);
/* Likewise; and if so, it is left out of a first copy */
bool guest_skips(struct guest *g, uint32_t block, uint64_t page);
/* Of dirty pages of a word: unused ones are not dirty any more; @c remembers them */
void guest_drop_unused(struct guest *g, struct copy *c, uint32_t block, uint64_t word);
/* A page that was left out is copied after all */
void guest_is_copied(struct guest *g, uint32_t block, uint64_t page);
/* What is left out of a copy from now on is noted; @again: besides what is noted already */
int guest_note_skipped(struct guest *g, bool again, struct kc_err *err);
void guest_forget_skipped(struct guest *g);
/* What was left out and is used now gets dirty: in a pause it is final */
int guest_check_skipped(struct guest *g, struct kc_err *err);
/* Where QEMU says that the table is; @nr 0: nowhere */
void guest_take_states(struct guest *g, uint64_t qemu_block, uint64_t page, uint64_t nr);
void guest_read_states(struct guest *g, struct json_object *o);
int guest_take_ranges(struct guest *g, struct json_object *list, struct kc_err *err);
void guest_close_states(struct guest *g);

/* hints.c */

/*
 * Asks the guest for its free pages, after guest_collect() and before anything is copied, and waits a
 * little for what it says
 */
int guest_begin_hints(struct guest *g, struct kc_err *err);
bool guest_is_hinted(const struct guest *g, uint32_t block, uint64_t page);
/* Before the first pause */
int guest_end_hints(struct guest *g, struct kc_err *err);
void guest_close_hints(struct guest *g);

/* devices.c */

/* Takes in the list of parts of the device state, which must be the same later */
int guest_take_devices(struct guest *g, struct json_object *list, struct kc_err *err);
/* -ESTALE if it is not that of before */
int guest_check_devices(const struct guest *g, const char *before, struct kc_err *err);

/* layout.c */

/*
 * Takes in the layout, the first time with the fds that came with it: blocks are mapped, the log is
 * opened.  Later, blocks must be the same.
 */
int guest_take_layout(struct guest *g, struct json_object *layout, struct kc_err *err);
/* Ours for QEMU's block, or -1 if it is not shared */
int guest_block_of(const struct guest *g, uint64_t qemu_nr);

/* logs.c */
int guest_open_log(struct guest *g, int fd, struct kc_err *err);
void guest_close_log(struct guest *g);
/* The slots of a layout; those of before that it does not have are gone */
int guest_take_slots(struct guest *g, struct json_object *list, struct kc_err *err);
/* As guest_harvest(), but -ESTALE without a reason if there are pages of slots that are not known */
int guest_harvest_known(struct guest *g, struct kc_err *err);

/* guest.c */

/* What QEMU writes to the buffer for each run of pages */
struct qemu_run {
	uint32_t block;
	uint32_t npages;
	uint64_t page;
};

/* QEMU has it by this name, for a command */
int guest_give_fd(struct guest *g, const char *name, int fd, struct kc_err *err);
int guest_refresh_layout(struct guest *g, struct kc_err *err);
int guest_read_buffer(struct guest *g, void *to, size_t size, uint64_t offset, struct kc_err *err);
/* What QEMU has written, from there in the buffer on, becomes dirty */
int guest_take_runs(struct guest *g, uint64_t offset, uint64_t nr, struct kc_err *err);
/* Back to the dirty pages: the copies are of no use */
int guest_undo_copy(struct guest *g, struct copy *c);
/*
 * The guest goes on: how long it took by its parts, and its state, as the buffer is QEMU's again with
 * the next epoch.  @t: before and after stop, first harvest and copy, state, harvest, copy, resume.
 */
int guest_finish(struct guest *g, struct guest_epoch *e, const uint64_t t[], struct kc_err *err);
/* QEMU's word for why what was copied is of no use, as a sentence */
int guest_spoilt(const struct guest *g, const char *by, struct kc_err *err);
/* One of the commands that stop it */
int guest_send_stop(struct guest *g, const char *command, struct kc_err *err);

/* brief.c */

/*
 * guest_take() by one command, with the guest stopped as shortly as can be.  1 if that cannot be:
 * nothing was done.
 */
int guest_take_brief(struct guest *g, struct guest_epoch *e, struct kc_err *err);

/* guard.c */
/* Refuses what has disks or devices whose state would not be in an epoch */
int guest_check_attached(struct guest *g, struct kc_err *err);
/* An answer that has to be a list */
int guest_call_list(struct guest *g, const char *command, struct json_object **list,
		    struct kc_err *err);

#endif
