/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The RAM that a standby holds: a directory with a file for each block, which QEMU can map, and
 * what is needed to find the last complete epoch there after the standby was killed at any moment.
 *
 *	ram0, ram1, ...	the blocks
 *	state-N		device state of epoch N
 *	meta		guest, last epoch in the RAM files and when it was complete, boot ID of the
 *			host, whether the disk has all of that
 *	redo		a complete epoch on its way into the RAM files
 *	redo.tmp	an epoch that is being received; or the last one, for its pages
 *	state.tmp	the state of the one before the last, for its pages
 *	disk0, ...	links to the images of disks, if they are part of epochs
 *	undo		the way back from an epoch that is yet to prove itself to the one before
 *
 * An epoch is complete when redo.tmp has been renamed to redo.  If the process dies while it copies
 * pages from redo to the RAM files, the next one does it again: redo has whole pages, no
 * differences. While there is no complete epoch yet, pages go straight to the RAM files.
 *
 * Without "durable" nothing is forced to the disk: files survive the process, not a crash of the
 * host. After one the boot ID differs, and the RAM files only count as a start for a
 * resynchronization, whatever the option is then.
 *
 * One thread at a time, but kc_ram_epoch() and kc_ram_flags() are for any.
 */
#ifndef KC_RAM_H
#define KC_RAM_H

#include "stream.h"

struct kc_ram;

/**
 * kc_ram_open() - open or make the directory and finish what was begun in it
 * Return: 0; -EBUSY if another process has it; or another negative errno.
 */
int kc_ram_open(const char *path, bool durable, struct kc_ram **ram, struct kc_err *err);
void kc_ram_close(struct kc_ram *ram);

/* NULL if there is none yet. */
const struct kc_guest *kc_ram_guest(const struct kc_ram *ram);

/**
 * kc_ram_create() - make RAM for a guest; all of its memory is allocated at once
 * @progress: called now and then, may be NULL.
 */
int kc_ram_create(struct kc_ram *ram, const struct kc_guest *guest, void (*progress)(void *ctx),
		  void *ctx, struct kc_err *err);

/**
 * kc_ram_set_disks() - which images a guest's disks are to have, before kc_ram_create()
 * @paths: of raw files or block devices; files that are not there are made.
 * @nr: how many.
 *
 * Return: 0; -EINVAL or -EEXIST if there is a guest already that has others.
 */
int kc_ram_set_disks(struct kc_ram *ram, const char *const *paths, unsigned int nr,
		     struct kc_err *err);

/**
 * kc_ram_leave_disks_out() - RAM that is made from now on is left for a standby
 *
 * Of a guest with disks it then lacks their images: they are those that the standby is given, whatever is
 * in them, as long as there is no epoch of it.
 */
void kc_ram_leave_disks_out(struct kc_ram *ram);

/*
 * They are somebody else's from now on, and not locked any more; or again ours, which is nothing if
 * they are.
 */
void kc_ram_close_disks(struct kc_ram *ram);
int kc_ram_open_disks(struct kc_ram *ram, struct kc_err *err);
const char *kc_ram_disk_path(const struct kc_ram *ram, unsigned int disk);

/* 16 random bytes that were made with the RAM. */
const uint8_t *kc_ram_id(const struct kc_ram *ram);

/*
 * Who sends epochs from now on, and of which QEMU process; stored with the next epoch.  Is it the
 * sender of the last one?
 */
bool kc_ram_set_sender(struct kc_ram *ram, const uint8_t sender[16], const uint8_t process[16]);

/**
 * kc_ram_settle() - finish an epoch that was complete when copying it to the RAM files failed
 *
 * To be called before the RAM files are used for anything; tried again with each new epoch.
 */
int kc_ram_settle(struct kc_ram *ram, struct kc_err *err);

/* The last complete epoch, 0 for none. */
uint64_t kc_ram_epoch(const struct kc_ram *ram);

/*
 * May it be failed over to without being told to?  Not if the protection has ended, or if clients
 * may know more of the guest than it does.
 */
bool kc_ram_counts(const struct kc_ram *ram);

/*
 * How long ago it was complete, by the clock on the wall; UINT64_MAX if there is none or that clock
 * was set back since.
 */
uint64_t kc_ram_age_ms(const struct kc_ram *ram);

/* Paths for QEMU; malloc()ed. */
char *kc_ram_block_path(const struct kc_ram *ram, uint32_t block);
char *kc_ram_state_path(const struct kc_ram *ram);

#define KC_RAM_ENDED		1u	/* protection ended by intent: silence means nothing */
#define KC_RAM_TAKEN_OVER	2u	/* QEMU got these files: they are no epoch any more */
#define KC_RAM_STOPPED		4u	/* the guest was not running when the epoch was taken */
#define KC_RAM_UNTRIED		8u	/* nobody knows yet whether it can be loaded */
/* What the guest sent after the epoch has left: to go on from it is for people to decide */
#define KC_RAM_UNHELD		16u

/**
 * struct kc_ram_trial - who finds out whether an epoch can be loaded
 * @needed: is this state of a kind that is not known to be loadable?
 * @run: find out; the epoch is in its files.  -ECANCELED if there is no time for that.
 *
 * If it cannot be loaded, the RAM is again as it was before the epoch, which fails with that error.
 */
struct kc_ram_trial {
	bool (*needed)(void *ctx, const struct kc_devices *state);
	int (*run)(void *ctx, struct kc_err *err);
	void *ctx;
};

/*
 * All of the RAM is allocated from now on, also what the guest gave back or will.  Otherwise it may
 * be that there is no memory for it when the guest that goes on wants it again.
 */
int kc_ram_keep_memory(struct kc_ram *ram, struct kc_err *err);

/* To be asked for each epoch from now on; stays valid. */
void kc_ram_set_trial(struct kc_ram *ram, const struct kc_ram_trial *trial);

unsigned int kc_ram_flags(const struct kc_ram *ram);
/* Replaces them; the next complete epoch does so, too. */
int kc_ram_set_flags(struct kc_ram *ram, unsigned int flags, struct kc_err *err);

/* For kc_rx_new(), with the kc_ram as its context. */
extern const struct kc_rx_ops kc_ram_ops;

/* Digests of the pages as they are, those of an open epoch included. */
int kc_ram_digests(struct kc_ram *ram, uint32_t block, uint64_t first, uint32_t n, uint8_t *out,
		   struct kc_err *err);

#endif
