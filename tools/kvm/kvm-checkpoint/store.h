/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A directory of epochs: one file epoch-NUMBER.kc for each, records as in the stream, and a lock.
 *
 * An epoch is written to epoch.tmp, forced to the disk and renamed, so a file with its final name
 * is whole unless the disk damages it, which its checksum tells.  An increment names the epoch that
 * it builds upon; following these leads to a full epoch.  Files hold no differences between
 * versions of a page: so two files can be merged by taking records as they are, and a damaged page
 * is one page.  Only of disks there are parts of pages, which merging puts together.
 *
 * What is older than the epochs to keep is merged into a full epoch now and then, which replaces
 * the last increment in it by rename; only then are the others removed.
 */
#ifndef KC_STORE_H
#define KC_STORE_H

#include "stream.h"

struct kc_store_file {
	uint64_t nr, base, bytes;
	unsigned int flags;
	int64_t mtime;		/* seconds since 1970 */
	bool damaged;		/* its beginning cannot be read */
};

/**
 * struct kc_store - what is in a directory
 * @files: by ascending number.
 * @guest: if there is at least one file that can be read.
 */
struct kc_store {
	char *path;
	int dir;
	size_t nr_files;
	struct kc_store_file *files;
	bool has_guest;
	struct kc_guest guest;
};

/* Look what is there, without locking: files may go while they are looked at. */
int kc_store_read(const char *path, struct kc_store *store, struct kc_err *err);
void kc_store_free(struct kc_store *store);

/**
 * kc_store_chain() - the files that an epoch is made of
 * @nr: number of the epoch.
 * @chain: indexes into store->files, from the full epoch to @nr; malloc()ed.
 *
 * Return: their number; -ESTALE if what it lacks is not missing, but the directory was changed
 * since it was looked at: look again; or another negative errno.
 */
ssize_t kc_store_chain(const struct kc_store *store, uint64_t nr, size_t **chain,
		       struct kc_err *err);

/**
 * struct kc_store_ops - what to do with the pages of a chain, and parts of pages of disks
 *
 * Each returns 0 or a negative errno.  @file is an index into the chain, @offset that of the
 * record.
 */
struct kc_store_ops {
	int (*page)(void *ctx, size_t file, uint64_t offset, uint16_t block, uint64_t page,
		    const void *data, struct kc_err *err);
	int (*zero)(void *ctx, uint16_t block, uint64_t page, uint64_t n, struct kc_err *err);
	int (*part)(void *ctx, size_t file, uint64_t offset, const struct kc_part *part,
		    struct kc_err *err);
};

/**
 * kc_store_replay() - read a chain from its beginning, and verify all of it
 * @state: the device state of the last epoch, in place of what it has; may be NULL.
 * @sound: how many files were sound, may be NULL.
 *
 * Return: 0; -EPROTO and what is wrong with which file; -ESTALE if a file was removed since the
 * directory was looked at, be it by merging: look again; or another negative errno.
 */
int kc_store_replay(const struct kc_store *store, const size_t *chain, size_t n,
		    const struct kc_store_ops *ops, void *ctx, struct kc_devices *state,
		    size_t *sound, struct kc_err *err);

/**
 * kc_store_verify() - read all files, and say of each epoch that is lost why it is
 * @last: the last sound epoch, 0 if there is none.
 * @lost: how many are lost.
 *
 * Return: 0, -ESTALE as of kc_store_replay(), or another negative errno.
 */
int kc_store_verify(const struct kc_store *store, uint64_t *last, size_t *lost, struct kc_err *err);

/* Show on stderr how far reading is; for who is on a terminal. */
extern bool kc_store_progress;

/**
 * kc_store_restore() - write the RAM, device state and disks of an epoch to files
 * @nr: its number, 0 for the last sound one.
 * @out: directory for ram0, ram1, ... and state; made if it is not there.
 * @disks: a path for each disk: a file that is not there yet, or a block device of its size.
 * @nr_disks: how many, just as many as the guest has.
 * @got: the number.
 * @stopped: whether the guest was not running then.
 *
 * Return: 0, -ESTALE as of kc_store_replay(), and then nothing was restored; or another negative
 * errno.  Files that this made are removed again if it fails; of what was on a block device nothing
 * may be left.
 */
int kc_store_restore(const struct kc_store *store, uint64_t nr, const char *out,
		     const char *const *disks, unsigned int nr_disks, uint64_t *got, bool *stopped,
		     struct kc_err *err);

#endif
