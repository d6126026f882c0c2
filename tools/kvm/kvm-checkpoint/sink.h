/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Where epochs go: a standby on another host, or a chain of epochs in a directory.
 *
 * The one who collects epochs from a guest (protect.c) sees nothing but this.  For each epoch:
 *
 *	pause the guest, harvest, save the device state, copy the dirty pages aside, resume
 *	kc_epoch_begin(sink, nr, 0, &err)
 *	kc_epoch_page(sink, block, page, copy, &err)	for each page
 *	kc_epoch_state(sink, state, len, stopped, &err)
 *	kc_epoch_commit(sink, &err)
 *
 * and between epochs, by kc_sink_due_us() at the latest, kc_sink_poll() for acknowledgements and
 * heartbeats.
 *
 * Threading: none inside for tcp.  Compression, encryption and sending happen in the caller's
 * thread, while the guest runs.  So when kc_epoch_commit() returns, the epoch has been handed over
 * (to the kernel's socket buffer or, for a directory, to the disk), and nothing of the caller's is
 * referred to any more.  One sink belongs to one thread, except kc_sink_stats(), for any thread.
 *
 * Time: no call blocks longer than opts.io_timeout_ms without progress, and those that hand
 * something over take as long as opts.bandwidth says.
 *
 * Failure: every call that fails with a negative errno, other than -EINVAL for a wrong use, leaves
 * the sink broken: close it, open another, begin with KC_EPOCH_RESYNC or KC_EPOCH_FULL (see
 * kc_sink_start()).  The receiver then still has its last complete epoch.
 */
#ifndef KC_SINK_H
#define KC_SINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util.h"

#define KC_PAGE_SIZE	4096u
#define KC_DIGEST_SIZE	16u
#define KC_MAX_BLOCKS	64u
#define KC_MAX_DISKS	16u
/* Blocks from here on are disks */
#define KC_DISK_BLOCK	0x8000u
#define KC_NAME_SIZE	256u
#define KC_HARDWARE_SIZE 8192u

/**
 * struct kc_block - one block of guest RAM
 * @name: as QEMU knows it; the standby offers its RAM to QEMU by it.  Unique in the guest, not
 *	empty.
 * @npages: its size in pages of KC_PAGE_SIZE bytes, at least 1.
 */
struct kc_block {
	char name[KC_NAME_SIZE];
	uint64_t npages;
};

/**
 * struct kc_disk - a disk of the guest whose contents are part of an epoch
 * @name: as QEMU knows it, not empty.
 * @npages: its size in units of KC_PAGE_SIZE bytes, at least 1.
 */
struct kc_disk {
	char name[KC_NAME_SIZE];
	uint64_t npages;
};

/**
 * struct kc_guest - which guest, and how its memory is laid out
 * @uuid: of the guest (QEMU's -uuid; all zero if it has none).
 * @name: of the guest, for people; may be empty.
 * @page_size: KC_PAGE_SIZE.
 * @nr_blocks: entries in @blocks, from 1 to KC_MAX_BLOCKS.
 * @blocks: RAM blocks; their order is the numbering used everywhere.
 * @nr_disks: entries in @disks, up to KC_MAX_DISKS.
 * @disks: those that are part of epochs; the number of one as a block is KC_DISK_BLOCK more.
 * @fingerprint: a hash of whatever else must be the same for a checkpoint to fit: the machine type
 *	and the list of devices; all zero if unknown.
 * @hardware: what that is the hash of, for messages, one item a line; may be cut, may be empty.
 * @process: which QEMU process it is, among all that there ever were; all zero if unknown.
 *
 * A receiver that holds epochs of a guest refuses one in which anything but @process differs, and
 * if it has neither UUID nor name, that too.
 */
struct kc_guest {
	uint8_t uuid[16];
	char name[KC_NAME_SIZE];
	uint32_t page_size;
	uint32_t nr_blocks;
	struct kc_block *blocks;
	uint32_t nr_disks;
	struct kc_disk *disks;
	uint8_t fingerprint[32];
	char hardware[KC_HARDWARE_SIZE];
	uint8_t process[16];
};

enum kc_codec { KC_CODEC_NONE, KC_CODEC_LZ4, KC_CODEC_ZSTD };

/**
 * struct kc_sink_opts - how epochs are packed and sent; start from kc_sink_defaults()
 * @codec: what pages that are neither zero nor small deltas are compressed with.
 * @level: of zstd (1 to 19), ignored by others.
 * @delta_cache: bytes of memory for the last versions of pages, against which new versions are sent
 *	as differences; 0 turns that off.  Ignored for a directory: there every page stands alone.
 * @io_timeout_ms: how long any call waits without progress.
 * @connect_timeout_ms: how long connecting, TLS handshake and greeting may take, all together.
 * @psk_file: keys in GnuTLS psktool's format ("identity:hex"), readable by nobody else.
 * @psk_identity: which line of it, NULL for the first.
 * @insecure: neither authenticated nor encrypted; only to a loopback address.
 * @bandwidth: bytes a second that are sent or written at most, before encryption; 0 for no limit.
 * @keep: a directory keeps at least this many of the last epochs restorable, and merges older ones.
 * @unheld: what the guest sent after the last epoch that was acknowledged was not held back: the
 *	standby must not take over from what it has, unless told to.
 */
struct kc_sink_opts {
	enum kc_codec codec;
	int level;
	uint64_t delta_cache;
	unsigned int io_timeout_ms;
	unsigned int connect_timeout_ms;
	const char *psk_file;
	const char *psk_identity;
	bool insecure;
	uint64_t bandwidth;
	unsigned int keep;
	bool unheld;
};

/** kc_sink_defaults() - fill in what is used when the user says nothing. */
void kc_sink_defaults(struct kc_sink_opts *opts);

/**
 * kc_sink_parse_option() - take one of the options that describe a sink
 * @opts: to change.
 * @name: long option without dashes: compress, delta-cache, io-timeout, psk-file, psk-identity,
 *	insecure, bandwidth, keep.
 * @arg: its argument, NULL for insecure.  Must stay valid.
 * @err: why not.
 *
 * Return: 1 if it was taken, 0 if it is not one of these, -EINVAL if @arg is wrong.
 */
int kc_sink_parse_option(struct kc_sink_opts *opts, const char *name, const char *arg,
			 struct kc_err *err);

/**
 * kc_sink_check() - is there a mistake that can be seen without opening it?
 * @spec: as for kc_sink_open().
 *
 * Return: 0, or a negative errno if the address makes no sense or the key is missing or unfit.
 */
int kc_sink_check(const char *spec, const struct kc_sink_opts *opts, struct kc_err *err);

/* For --help of whoever uses kc_sink_parse_option(). */
extern const char kc_sink_options_help[];

struct kc_sink;

/**
 * kc_sink_open() - connect to a standby, or open or create a directory
 * @spec: "tcp:HOST:PORT" (IPv6 addresses in brackets), or the path of a directory.
 * @opts: how.  Its strings must stay valid until this returns.
 * @guest: copied.
 * @err: why not.
 *
 * Does not retry: on -ECONNREFUSED, -ETIMEDOUT, -ENETUNREACH, -EHOSTUNREACH, -ECONNRESET, -EPIPE
 * and -EBUSY (another primary is connected), -EBADMSG (corrupted on the way) it makes sense to try
 * again later; the others need the user (-EACCES wrong key, -EDESTADDRREQ no such host or port,
 * -EPROTO no standby, -EPROTONOSUPPORT another version,
 * -EEXIST it holds another guest, -EINVAL bad spec or options, -ENOSPC and the like).
 * kc_sink_is_temporary() knows.
 *
 * Return: the sink, or NULL with errno set.
 */
struct kc_sink *kc_sink_open(const char *spec, const struct kc_sink_opts *opts,
			     const struct kc_guest *guest, struct kc_err *err);

/** kc_sink_is_temporary() - may trying again help after -@error? @error is positive. */
bool kc_sink_is_temporary(int error);

/**
 * kc_sink_close() - end; what was not committed is lost, what was is still received. NULL is fine.
 */
void kc_sink_close(struct kc_sink *sink);

/**
 * enum kc_end - what the receiver is to do when it was told the end
 * @KC_END_DETACH: protection ended by intent; the guest lives on here, never fail over.
 * @KC_END_GUEST_SHUTDOWN: the guest itself shut down; never fail over.
 * @KC_END_GUEST_DIED: QEMU is gone or does not answer; fail over now, do not wait for the timeout.
 * @KC_END_SWITCH_OVER: the guest is stopped, and the last epoch is all of it; go on with it.  For
 *	kc_sink_switch_over().
 */
enum kc_end {
	KC_END_DETACH = 1, KC_END_GUEST_SHUTDOWN = 2, KC_END_GUEST_DIED = 3, KC_END_SWITCH_OVER = 4,
};

/**
 * kc_sink_end() - tell the receiver why no more epochs come, then kc_sink_close()
 *
 * Without it (SIGKILL, a lost link) a standby takes the primary for dead after its --timeout.
 *
 * Return: false if it could not be told, or does not react within the I/O timeout.
 */
bool kc_sink_end(struct kc_sink *sink, enum kc_end end);

/**
 * kc_sink_switch_over() - have a standby go on with the guest, then kc_sink_close()
 * @sink: all that was committed is acknowledged.
 * @err: why not.
 *
 * The guest must not run here from before the last epoch was taken on, and never again unless it is
 * certain that it will not run there.
 *
 * Return: 0, the guest is there; -ECANCELED, it is certain that the standby will not go on with it;
 * another negative errno, and nothing is certain: kc_sink_open() will tell, by -ESHUTDOWN if it
 * did, by success if it did not.
 */
int kc_sink_switch_over(struct kc_sink *sink, struct kc_err *err);

/**
 * kc_sink_last_epoch() - the last complete epoch that the receiver holds, 0 for none
 *
 * As of kc_sink_open(), and moved by acknowledgements.
 */
uint64_t kc_sink_last_epoch(const struct kc_sink *sink);

/**
 * kc_sink_receiver() - which receiver it is: 16 bytes that it chose when it first held epochs; all
 * zero for a directory
 */
const uint8_t *kc_sink_receiver(const struct kc_sink *sink);

/**
 * kc_sink_continues() - is kc_sink_last_epoch(), as of kc_sink_open(), one that this process sent?
 *
 * Then whoever remembers what it has sent since and what was written since needs no digests.
 */
bool kc_sink_continues(const struct kc_sink *sink);

/**
 * kc_sink_start() - how the first epoch after kc_sink_open() has to begin
 *
 * Return: KC_EPOCH_FULL if the receiver holds nothing, KC_EPOCH_RESYNC if kc_sink_digests() works
 * (KC_EPOCH_FULL is then allowed as well).
 */
unsigned int kc_sink_start(const struct kc_sink *sink);

/**
 * kc_sink_digests() - what the receiver holds, to send only pages that differ
 * @sink: any time, also within an epoch; pages already sent in that epoch count with what was sent.
 * @block: number of the block, or of a disk.
 * @first: first page.
 * @n: number of pages; the best size is KC_DIGESTS_CHUNK.
 * @out: @n digests of KC_DIGEST_SIZE bytes, to be compared with kc_page_digest().
 * @err: why not.
 *
 * A standby is asked for what follows in the block as well, and looks for that while the caller
 * compares: so ask in ascending order.
 *
 * The same as the receiver's memory is what a page with an equal digest is: the digest is a
 * cryptographic one, because what is in a page may be chosen by an adversary in the guest.
 *
 * Return: 0 or a negative errno.
 */
int kc_sink_digests(struct kc_sink *sink, uint32_t block, uint64_t first, uint32_t n, uint8_t *out,
		    struct kc_err *err);

#define KC_DIGESTS_CHUNK 2048u

/** kc_page_digest() - digest of one page, KC_DIGEST_SIZE bytes to @out. Any thread. */
void kc_page_digest(const void *data, uint8_t *out);

/** kc_page_digests() - of @n pages, which may be anywhere, by several threads */
void kc_page_digests(const uint8_t *const *pages, uint32_t n, uint8_t *out);

/*
 * Flags of kc_epoch_begin().  0: an increment, pages that are not in it are as they were in the
 * epoch before, which is the last one committed in this sink.
 */
/* Every page of every block and disk is in it as a whole, nothing from before counts. */
#define KC_EPOCH_FULL	1u
/*
 * Pages that are not in it are as in kc_sink_last_epoch(): the caller compared digests, or
 * remembers all pages written since that epoch.
 */
#define KC_EPOCH_RESYNC	2u

/**
 * kc_epoch_begin() - begin to hand over an epoch
 * @sink: no other epoch may be open in it.
 * @nr: greater than any before and than kc_sink_last_epoch().
 * @flags: 0, KC_EPOCH_FULL or KC_EPOCH_RESYNC; the first after kc_sink_open() must not be 0.
 * @err: why not.
 *
 * Return: 0 or a negative errno.
 */
int kc_epoch_begin(struct kc_sink *sink, uint64_t nr, unsigned int flags, struct kc_err *err);

/**
 * kc_epoch_page() - hand over one page
 * @sink: with an open epoch.
 * @block: number of the block.
 * @page: number of the page in the block.
 * @data: KC_PAGE_SIZE bytes, must not change during the call (so never the guest's own memory while
 *	it runs), not referred to after it.
 * @err: why not.
 *
 * A page may be handed over several times in one epoch; the last one counts.  So the first copy can
 * be made of a running guest (page by page, through a buffer) and the pages written meanwhile sent
 * again when it is paused.  Ascending pages are cheapest: runs of zero pages become one record.
 *
 * Return: 0 or a negative errno.
 */
int kc_epoch_page(struct kc_sink *sink, uint32_t block, uint64_t page, const void *data,
		  struct kc_err *err);

/**
 * kc_epoch_zeros() - hand over pages in a row that are zero
 * @sink: with an open epoch.
 * @block: number of the block.
 * @page: number of the first page in the block.
 * @n: how many, at least one.
 * @hole: there is no memory behind them any more; a receiver need not have any either.
 * @err: why not.
 *
 * As that many kc_epoch_page(), in one record, and in no more time than it takes to look through the
 * pages that are remembered for deltas.
 *
 * Return: 0 or a negative errno.
 */
int kc_epoch_zeros(struct kc_sink *sink, uint32_t block, uint64_t page, uint64_t n, bool hole,
		   struct kc_err *err);

/**
 * kc_epoch_disk() - hand over a write to a disk
 * @sink: with an open epoch.
 * @disk: number of the disk.
 * @offset: where, in bytes.
 * @data: what; NULL for zeros.  Not referred to after the call.
 * @len: how much, in bytes.
 * @err: why not.
 *
 * Writes count in the order in which they are handed over.  For a receiver that holds nothing all of
 * the disk has to be in the first epoch, each of its pages whole in one write at least.
 *
 * Return: 0 or a negative errno.
 */
int kc_epoch_disk(struct kc_sink *sink, uint32_t disk, uint64_t offset, const void *data,
		  size_t len, struct kc_err *err);

/**
 * kc_epoch_state() - hand over the device state; once in each epoch
 * @sink: with an open epoch.
 * @buf: the state, opaque.
 * @len: its length, at most KC_STATE_MAX.
 * @flags: of the following.
 * @err: why not.
 *
 * Return: 0 or a negative errno.
 */
int kc_epoch_state(struct kc_sink *sink, const void *buf, size_t len, unsigned int flags,
		   struct kc_err *err);

/* The guest was not running, and is not to run where it is restored either. */
#define KC_STATE_STOPPED 1u
/* What it sends after this epoch is not held back: no standby takes over from it by itself. */
#define KC_STATE_UNHELD	2u

#ifndef KC_STATE_MAX
#define KC_STATE_MAX (64u << 20)
#endif

/**
 * kc_epoch_commit() - the epoch is whole
 *
 * Only after this can the receiver use it.  Does not wait for the acknowledgement of a standby; a
 * directory acknowledges before this returns (it has called fsync()).
 *
 * Return: 0 or a negative errno.
 */
int kc_epoch_commit(struct kc_sink *sink, struct kc_err *err);

/**
 * kc_epoch_abort() - forget the open epoch; the next one builds upon the same epoch as this one did
 *
 * If the aborted epoch had KC_EPOCH_FULL or KC_EPOCH_RESYNC and was the first, so must the next.
 * The pages that were in it have to be in the next one: they are no longer in any dirty log.
 *
 * Return: 0 or a negative errno.
 */
int kc_epoch_abort(struct kc_sink *sink, struct kc_err *err);

/**
 * kc_sink_poll() - take acknowledgements, send a heartbeat if due, notice a lost link; never blocks
 * @sink: any time, also within an epoch.
 * @acked: set to the last acknowledged epoch, unless NULL.
 * @err: why not.
 *
 * Heartbeats come from here and not from a thread so that a protect loop that hangs is silent.  The
 * standby's timeout divided by four is how often they are due.
 *
 * Return: 0, or a negative errno if the link or the receiver failed.
 */
int kc_sink_poll(struct kc_sink *sink, uint64_t *acked, struct kc_err *err);

/**
 * kc_sink_heard_us() - until when the receiver has surely heard of us
 *
 * Return: when the last epoch that was acknowledged was sent, of kc_boot_us(); 0 if none was.
 */
uint64_t kc_sink_heard_us(const struct kc_sink *sink);

/* After how long a silence it takes over, in milliseconds; 0 for never. */
unsigned int kc_sink_takeover_ms(const struct kc_sink *sink);

/* How long its fence may take then, in milliseconds; 0 if it has none. */
unsigned int kc_sink_fence_ms(const struct kc_sink *sink);

/**
 * kc_sink_note() - tell a standby why there are no epochs for now
 * @sink: any time.
 * @text: the reason; empty: there are again.
 * @err: why not.
 *
 * Return: 0 or a negative errno.
 */
int kc_sink_note(struct kc_sink *sink, const char *text, struct kc_err *err);

/**
 * kc_sink_counts() - has a standby, as of kc_sink_open(), an epoch that it may take over from?
 *
 * By itself, when it misses the primary.  A directory has none.
 */
bool kc_sink_counts(const struct kc_sink *sink);

/**
 * kc_sink_unheld() - what the guest sends will not be held back: see opts.unheld
 * @sink: any time.
 * @err: why not.
 *
 * The standby knows when kc_sink_confirmed_us() is later than the return of this.
 *
 * Return: 0 or a negative errno.
 */
int kc_sink_unheld(struct kc_sink *sink, struct kc_err *err);

/**
 * kc_sink_confirmed_us() - since when nothing is known of a standby
 *
 * Return: the last time, by this host's kc_now_us(), at which something was sent that the standby
 * has answered since.  Whatever it does out of silence, it does not before its timeout after that.
 */
uint64_t kc_sink_confirmed_us(const struct kc_sink *sink);

/**
 * kc_sink_due_us() - when kc_sink_poll() has to be called next, by kc_now_us()
 *
 * Sooner is never wrong, and what comes of the receiver is told by kc_sink_fd().
 *
 * Return: the time, or UINT64_MAX if there is none.
 */
uint64_t kc_sink_due_us(const struct kc_sink *sink);

/**
 * kc_sink_wait() - wait until an epoch is acknowledged, with heartbeats
 * @sink: no epoch may be open.
 * @nr: which.
 * @timeout_ms: how long.
 * @err: why not.
 *
 * Return: 0, -ETIMEDOUT (the sink is then not broken), or another negative errno.
 */
int kc_sink_wait(struct kc_sink *sink, uint64_t nr, unsigned int timeout_ms, struct kc_err *err);

/**
 * kc_sink_fd() - to poll() for POLLIN, then call kc_sink_poll(); -1 for a directory
 */
int kc_sink_fd(const struct kc_sink *sink);

/**
 * struct kc_sink_stats - since kc_sink_open()
 * @epoch_sent: last epoch committed here.
 * @epoch_acked: last epoch acknowledged by the receiver.
 * @epochs: number of epochs committed.
 * @pages: pages handed over.
 * @zero_pages: of these, zero.
 * @delta_pages: of these, sent as difference.
 * @state_bytes: device state handed over.
 * @disk_bytes: writes to disks handed over.
 * @wire_bytes: bytes sent or written, before TLS.
 * @pack_us: time spent in comparing and compressing.
 * @io_us: time spent in sending or writing, TLS included.
 * @ack_us: time from the last acknowledged commit to its acknowledgement.
 */
struct kc_sink_stats {
	uint64_t epoch_sent, epoch_acked, epochs;
	uint64_t pages, zero_pages, delta_pages, state_bytes, disk_bytes;
	uint64_t wire_bytes, pack_us, io_us, ack_us;
};

/** kc_sink_stats() - copy them. Any thread. */
void kc_sink_stats(const struct kc_sink *sink, struct kc_sink_stats *out);

#endif
