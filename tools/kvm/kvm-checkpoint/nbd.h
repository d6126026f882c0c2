/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What QEMU writes to its disks, by NBD: a server for its mirror jobs, which keeps writes in order
 * until they are taken.
 *
 * It has threads of its own: QEMU, which waits for its answers when it stops the guest, must not
 * wait for whoever waits for QEMU.
 */
#ifndef KC_NBD_H
#define KC_NBD_H

#include "util.h"

#define NBD_MAX_DISKS	16u

/**
 * struct nbd_write - one write, or zeros
 * @next: the next one.
 * @epoch: for the owner.
 * @disk: to which disk.
 * @offset: where, in bytes.
 * @len: how many bytes.
 * @zeros: it has no data.
 */
struct nbd_write {
	struct nbd_write *next;
	uint64_t epoch;
	unsigned int disk;
	uint64_t offset;
	uint32_t len;
	bool zeros;
	uint8_t data[];
};

struct nbd;

/**
 * nbd_guard_start() - a process that ends connections when we are stopped
 * @limit_ms: for how long QEMU, and its guest, may wait for us then; not 0.
 * @err: why not.
 *
 * For a process without threads and without much memory, as it is forked.  It ends when we do.
 *
 * Return: for nbd_start(), or a negative errno.
 */
int nbd_guard_start(unsigned int limit_ms, struct kc_err *err);

/* We live, more often than four times in its limit; and this is a connection of ours, or -1 */
void nbd_guard_tell(int guard, int fd);

/**
 * nbd_start() - listen on a unix socket in a directory that is made for it
 * @sizes: of the disks in bytes; they are called "0", "1" and so on.
 * @nr: how many.
 * @limit: bytes of data that may wait to be taken; more make QEMU wait, and its guest with it.
 * @guard: of nbd_guard_start(), or -1; remains the caller's.
 * @guard_ms: its limit.
 * @err: why not.
 *
 * Writes fail until nbd_accept().
 *
 * Return: the server, or NULL with errno.
 */
struct nbd *nbd_start(const uint64_t *sizes, unsigned int nr, uint64_t limit, int guard,
		      unsigned int guard_ms, struct kc_err *err);
void nbd_stop(struct nbd *n);

/** nbd_path() - of its socket */
const char *nbd_path(const struct nbd *n);

/**
 * nbd_accept() - from now on writes are taken, or fail with EIO
 *
 * Either way what was not taken is forgotten, and nothing has failed.
 */
void nbd_accept(struct nbd *n, bool accept);

/** nbd_hurry() - the limit does not count: QEMU stops the guest, or the guest stands still */
void nbd_hurry(struct nbd *n, bool hurry);

/** nbd_never_wait() - or at the limit writes fail, rather than wait; for when nobody may take them */
void nbd_never_wait(struct nbd *n, bool never);

/** nbd_again() - writes that failed are forgotten, and those to come are taken; had any failed? */
bool nbd_again(struct nbd *n);

/** nbd_connected() - is there a connection to each disk? */
bool nbd_connected(struct nbd *n);

/** nbd_take() - all writes that have come, in order; the caller free()s each */
struct nbd_write *nbd_take(struct nbd *n);

/** nbd_bytes() - of data that was not taken yet */
uint64_t nbd_bytes(struct nbd *n);

/** nbd_failed() - a write failed or a connection was lost since nbd_accept() */
bool nbd_failed(struct nbd *n);

#endif
