/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The stream of epochs: what goes over the wire and, the same records, into epoch files.
 *
 * All is little endian.  A record is
 *
 *	u32 length of the payload	u16 type	u16 flags	payload
 *
 * and at most KC_REC_MAX bytes long without its header.  A record of unknown type is skipped if it
 * has KC_REC_OPTIONAL and refused if not.  Records that are shorter or longer than what their type
 * has room for are refused, as is anything but 0 in reserved fields.
 *
 * Sender to receiver:
 *
 *	HELLO		once, first: magic, versions, instance, guest, sum
 *	DIGEST_REQ	any time: which digests it wants
 *	BEGIN		an epoch begins: number, number it builds upon, flags
 *	PAGE, ZERO	contents of a page; a run of zero pages
 *	PART		less than a page of a disk; what of disks is whole pages are PAGEs and
 *			ZEROs, of blocks from KC_DISK_BLOCK on
 *	STATE		length, checksum and flags of the device state; its contents are PAGEs and
 *			ZEROs of the block KC_STATE_BLOCK after it.  What they leave out is as in
 *			the epoch before, or zero if this is no increment
 *	COMMIT		the epoch is whole: number of records and pages, checksum of them
 *	ABORT		forget it
 *	HEARTBEAT	any time: when it was sent, by the sender's clock.  The receiver's answer
 *			has the same number, and 0 if it is no answer
 *	NOTE		any time, optional: why there are no epochs for now, in words; empty when
 *			there are again
 *	UNHELD		any time: what the guest sends is not held back any more, so that who has got
 *			it may know more than the last epoch.  There will be no takeover from that
 *			by itself once a heartbeat is answered that was sent after this
 *	END		there will be no more
 *
 * Receiver to sender: WELCOME or ERROR after HELLO; then DIGESTS, ACK, HEARTBEAT, END when it has
 * done what END asks for, ERROR (and then it closes).
 *
 * The checksum of an epoch is the XXH3-128 of all bytes, headers included, that the sender sent
 * from BEGIN (inclusive) to COMMIT (exclusive), so also of records that the receiver does not know.
 *
 * Types 0x40 to 0x4f are for the replication of disks.
 *
 * An epoch file is HELLO, then BEGIN to COMMIT of one epoch.
 */
#ifndef KC_STREAM_H
#define KC_STREAM_H

#include <sys/types.h>
#include <xxhash.h>
/* The same with what the CPU has; the library has it where it has the header */
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h>
#endif

#include "sink.h"

#define KC_VERSION	5
#define KC_REC_HDR	8u
#define KC_REC_MAX	(64u << 10)
#define KC_REC_OPTIONAL	1u
#define KC_NOTE_MAX	400u

enum kc_rec_type {
	KC_HELLO = 1, KC_WELCOME, KC_ERROR, KC_HEARTBEAT, KC_END, KC_DIGEST_REQ, KC_DIGESTS, KC_NOTE,
	KC_UNHELD,
	KC_BEGIN = 0x10, KC_PAGE, KC_ZERO, KC_STATE, KC_COMMIT, KC_ABORT, KC_ACK,
	KC_PART = 0x40,
};

/* Why a receiver refuses or gives up; a receiver may send others. */
enum kc_error_code {
	KC_ERR_OTHER, KC_ERR_VERSION, KC_ERR_GUEST, KC_ERR_BUSY, KC_ERR_TAKEN_OVER, KC_ERR_STREAM,
	KC_ERR_SPACE, KC_ERR_CONFIG,
};

/* A record as found in a buffer. */
struct kc_rec {
	uint16_t type, flags;
	uint32_t len;
	const uint8_t *payload;
	/* The record from its header, for checksums. */
	const uint8_t *raw;
};

/* The same as KC_UNHELD, of the time before the connection */
#define KC_HELLO_UNHELD	1u

struct kc_hello {
	uint16_t version, version_min;
	uint32_t flags;
	uint8_t instance[16];
	struct kc_guest guest;		/* kc_guest_free() */
};

struct kc_welcome {
	uint16_t version;
	bool has_ram, same_sender;	/* the last epoch came from the same instance */
	bool counts;			/* there is one that may be taken over from by itself */
	uint32_t timeout_ms, fence_ms;	/* of silence, then for the fence; 0: never, none */
	uint64_t last_epoch;
	uint8_t receiver[16];
};

struct kc_begin {
	uint64_t nr, base;
	uint32_t flags;
};

/* How a page is encoded.  A delta is the XOR with the page's version in the last complete epoch. */
enum kc_encoding {
	KC_ENC_RAW = KC_CODEC_NONE,
	KC_ENC_LZ4 = KC_CODEC_LZ4,
	KC_ENC_ZSTD = KC_CODEC_ZSTD,
	KC_ENC_DELTA = 0x10
};

#define KC_PAGE_HDR 24u

struct kc_page {
	uint64_t page, xxh;
	uint16_t block;
	uint8_t enc;
	uint32_t len;
	const uint8_t *data;
};

/* The device state is paged as RAM is, because little of it changes from one epoch to the next. */
#define KC_STATE_BLOCK 0xffffu
#define KC_STATE_PAGES(len) (((len) + KC_PAGE_SIZE - 1) / KC_PAGE_SIZE)

struct kc_state {
	uint32_t len, flags;
	uint64_t xxh;
};

#define KC_PART_HDR	24u

/* Less than a page of a disk */
struct kc_part {
	uint64_t page, xxh;
	uint16_t block, offset;		/* in the page, in bytes */
	uint32_t len;
	const uint8_t *data;
};

#define KC_ZERO_HOLE	1u		/* and the sender has no memory there any more */

struct kc_zero {
	uint64_t page, npages;
	uint16_t block, flags;
};

struct kc_commit {
	uint64_t nr, records, pages;
	uint8_t sum[16];
};

struct kc_digest_req {
	uint64_t first;
	uint32_t n;
	uint16_t block;
	const uint8_t *digests;		/* in KC_DIGESTS only */
};

/* Packing: each returns the length of the whole record in @out. */
size_t kc_put_rec(uint8_t *out, uint16_t type, uint16_t flags, uint32_t len);
/* @out has room for KC_REC_HDR + KC_REC_MAX; 0 if the description does not fit. */
size_t kc_put_hello(uint8_t *out, const struct kc_guest *guest, const uint8_t instance[16],
		    uint32_t flags);
size_t kc_put_welcome(uint8_t *out, const struct kc_welcome *w);
size_t kc_put_note(uint8_t *out, const char *text);
size_t kc_put_error(uint8_t *out, uint32_t code, const char *text);
size_t kc_put_begin(uint8_t *out, const struct kc_begin *b);
/* Header of the record and of the page; p->len bytes of data have to follow. */
size_t kc_put_page(uint8_t *out, const struct kc_page *p);
/* Likewise */
size_t kc_put_part(uint8_t *out, const struct kc_part *p);
size_t kc_put_zero(uint8_t *out, const struct kc_zero *z);
size_t kc_put_state(uint8_t *out, const struct kc_state *s);
size_t kc_put_commit(uint8_t *out, const struct kc_commit *c);
size_t kc_put_nr(uint8_t *out, uint16_t type, uint64_t nr, uint64_t us);
size_t kc_put_heartbeat(uint8_t *out, uint64_t us);
size_t kc_put_end(uint8_t *out, uint32_t reason);
size_t kc_put_digest_req(uint8_t *out, uint16_t type, const struct kc_digest_req *r);

/* Unpacking: 0, or -EPROTO with the reason. */
int kc_get_hello(const struct kc_rec *rec, struct kc_hello *hello, struct kc_err *err);
int kc_get_welcome(const struct kc_rec *rec, struct kc_welcome *w, struct kc_err *err);
/* What is not fit to be shown is replaced. */
void kc_get_note(const struct kc_rec *rec, char *text, size_t size);
int kc_get_error(const struct kc_rec *rec, uint32_t *code, char *text, size_t size);
int kc_get_begin(const struct kc_rec *rec, struct kc_begin *b, struct kc_err *err);
int kc_get_page(const struct kc_rec *rec, struct kc_page *p, struct kc_err *err);
int kc_get_part(const struct kc_rec *rec, struct kc_part *p, struct kc_err *err);
int kc_get_zero(const struct kc_rec *rec, struct kc_zero *z, struct kc_err *err);
int kc_get_state(const struct kc_rec *rec, struct kc_state *s, struct kc_err *err);
int kc_get_commit(const struct kc_rec *rec, struct kc_commit *c, struct kc_err *err);
int kc_get_nr(const struct kc_rec *rec, uint64_t *nr, uint64_t *us, struct kc_err *err);
int kc_get_heartbeat(const struct kc_rec *rec, uint64_t *us, struct kc_err *err);
int kc_get_end(const struct kc_rec *rec, uint32_t *reason, struct kc_err *err);
int kc_get_digest_req(const struct kc_rec *rec, struct kc_digest_req *r, struct kc_err *err);

/**
 * kc_get_rec() - look at the record at the start of a buffer
 * Return: its length with header, 0 if more bytes are needed, -EPROTO if it can be none.
 */
ssize_t kc_get_rec(const uint8_t *buf, size_t len, struct kc_rec *rec, struct kc_err *err);

/* Guests. */
int kc_guest_check(const struct kc_guest *guest, struct kc_err *err);
int kc_guest_copy(struct kc_guest *to, const struct kc_guest *from);
void kc_guest_free(struct kc_guest *guest);
/* 0 if epochs of @b fit to those of @a, -EEXIST and what differs if not. */
int kc_guest_same(const struct kc_guest *a, const struct kc_guest *b, struct kc_err *err);
/* Of its RAM, and of its disks */
uint64_t kc_guest_pages(const struct kc_guest *guest);
uint64_t kc_guest_disk_pages(const struct kc_guest *guest);
/* Of a block or a disk, 0 if there is none of this number */
uint64_t kc_guest_block_pages(const struct kc_guest *guest, uint32_t block);
/* Where something is kept of each block and disk: disks come after all blocks. */
#define KC_MAX_INDEX (KC_MAX_BLOCKS + KC_MAX_DISKS)
static inline uint32_t kc_block_index(uint32_t block)
{
	return block < KC_DISK_BLOCK ? block : KC_MAX_BLOCKS + block - KC_DISK_BLOCK;
}

static inline uint32_t kc_block_of_index(uint32_t index)
{
	return index < KC_MAX_BLOCKS ? index : KC_DISK_BLOCK + index - KC_MAX_BLOCKS;
}

void kc_uuid_text(const uint8_t uuid[16], char out[37]);

/*
 * Whether a checksum is right.  A fuzzer would not get beyond these, and they are no defence
 * against who can write the stream: so they always are, in its build.
 */
static inline bool kc_sum_is(bool equal)
{
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
	(void)equal;
	return true;
#else
	return equal;
#endif
}

/* --- Pages: pack.c -------------------------------------------------------- */

struct kc_packer;

struct kc_packer *kc_packer_new(enum kc_codec codec, int level, uint64_t delta_cache);
void kc_packer_free(struct kc_packer *pk);

/**
 * kc_pack() - encode a page
 * @pk: remembers the page for later deltas.
 * @epoch: number of the open epoch; versions of it are never the base of a delta.
 * @p: in: block, page.  Out: the rest; data points to @pk's or the caller's memory.
 * @data: the page.
 *
 * Return: true if the receiver holds just this version already.
 */
bool kc_pack(struct kc_packer *pk, uint64_t epoch, struct kc_page *p, const void *data);

/* The page is zero now, or some of it was changed, which kc_pack() was not asked about. */
void kc_pack_zero(struct kc_packer *pk, uint16_t block, uint64_t page);
/* Likewise, in as much time as there are pages or as @pk remembers, whatever is less */
void kc_pack_zeros(struct kc_packer *pk, uint16_t block, uint64_t page, uint64_t n);

/* What was packed for @epoch (0: ever) is not what the receiver holds. */
void kc_packer_forget(struct kc_packer *pk, uint64_t epoch);

bool kc_is_zero_page(const void *data);

struct kc_unpacker;

struct kc_unpacker *kc_unpacker_new(void);
void kc_unpacker_free(struct kc_unpacker *up);

/**
 * kc_unpack() - decode a page
 * @base: the version of the last complete epoch, needed for a delta.
 * @out: KC_PAGE_SIZE bytes.
 *
 * Return: 0, or -EPROTO if it cannot be decoded or is not the page that was packed.
 */
int kc_unpack(struct kc_unpacker *up, const struct kc_page *p, const void *base, void *out,
	      struct kc_err *err);

/* --- The receiver's side of an epoch: rx.c -------------------------------- */

/* The device state of an epoch, whole. */
struct kc_devices {
	uint8_t *data;
	uint32_t len;
	bool stopped, unheld;		/* KC_STATE_STOPPED, KC_STATE_UNHELD */
};

/* A copy, in place of what *to has; 0 or -ENOMEM, and then *to is as it was. */
int kc_devices_keep(struct kc_devices *to, const struct kc_devices *from, struct kc_err *err);

/**
 * struct kc_rx_ops - who takes the contents of an epoch
 *
 * Each returns 0 or a negative errno with the reason.  Numbers of blocks and pages are checked.
 */
struct kc_rx_ops {
	/* The number that BEGIN has to build upon; 0 if there is no complete epoch. */
	uint64_t (*last)(void *ctx);
	int (*begin)(void *ctx, const struct kc_begin *b, struct kc_err *err);
	/* The page as of the last complete epoch; NULL for who knows no deltas. */
	const void *(*base)(void *ctx, uint16_t block, uint64_t page);
	/* The device state of the last complete epoch; NULL for none. */
	const struct kc_devices *(*base_state)(void *ctx);
	/*
	 * Where the contents of the next page are to be put, which page() gets then if it is of a block
	 * or a disk; NULL for who copies it from where it is put instead.
	 */
	void *(*room)(void *ctx);
	int (*page)(void *ctx, uint16_t block, uint64_t page, const void *data, struct kc_err *err);
	int (*zero)(void *ctx, const struct kc_zero *z, struct kc_err *err);
	/* Some bytes of a page of a disk. */
	int (*part)(void *ctx, const struct kc_part *part, struct kc_err *err);
	/* All is there and verified: keep it, for good. */
	int (*commit)(void *ctx, uint64_t nr, const struct kc_devices *state, struct kc_err *err);
	void (*abort)(void *ctx);
};

struct kc_rx;

struct kc_rx *kc_rx_new(const struct kc_guest *guest, const struct kc_rx_ops *ops, void *ctx);
/* An open epoch is aborted. */
void kc_rx_free(struct kc_rx *rx);

/**
 * kc_rx_record() - take one record that the sender sent, each of them
 *
 * Return: 0; the type if it was KC_COMMIT, or one that has nothing to do with epochs (HEARTBEAT,
 * END, DIGEST_REQ) and is the caller's to handle; or a negative errno, and then the stream cannot
 * go on.
 */
int kc_rx_record(struct kc_rx *rx, const struct kc_rec *rec, struct kc_err *err);

/* Pages in the epoch that was committed last. */
uint64_t kc_rx_pages(const struct kc_rx *rx);

/* --- Transport: io.c ------------------------------------------------------ */

struct kc_io;

/**
 * kc_io_connect() - connect by TCP, and by TLS with a pre-shared key unless opts->insecure
 * @hostport: "HOST:PORT" or "[ADDRESS]:PORT".
 *
 * Return: 0 or a negative errno.
 */
int kc_io_connect(const char *hostport, const struct kc_sink_opts *opts, struct kc_io **io,
		  struct kc_err *err);

/* Listen; -1 with errno on failure.  Without keys only on loopback. */
int kc_io_listen(const char *hostport, const struct kc_sink_opts *opts, struct kc_err *err);

/* The server's part of a connection that accept() returned, which becomes the io's on success. */
int kc_io_accept(int fd, const struct kc_sink_opts *opts, struct kc_io **io, struct kc_err *err);

/* A file, or bytes in memory (@fd -1), to be read only. */
struct kc_io *kc_io_file(int fd, const void *mem, size_t len);

void kc_io_close(struct kc_io *io);
int kc_io_fd(const struct kc_io *io);

/**
 * kc_io_record() - the next record
 * @timeout_ms: how long to wait for it without progress; 0 does not wait at all.
 * @rec: valid until the next call.
 *
 * Return: 0; -EAGAIN (@timeout_ms is 0); -ENODATA at the end, between records; -ECONNRESET if it
 * ended within a record; -ETIMEDOUT; -EPROTO; or another negative errno.
 */
int kc_io_record(struct kc_io *io, unsigned int timeout_ms, struct kc_rec *rec, struct kc_err *err);

/* Bytes of records returned so far. */
uint64_t kc_io_offset(const struct kc_io *io);

/* Bytes arrive at *io up to the last kc_io_record(), by kc_now_us(). */
uint64_t kc_io_heard_us(const struct kc_io *io);

/* Into the buffer, flushed when it is full. */
int kc_io_write(struct kc_io *io, const void *buf, size_t len, struct kc_err *err);
int kc_io_flush(struct kc_io *io, struct kc_err *err);

/*
 * No more will be written; wait a little for the peer to have read it.  False if it has not closed
 * the connection by then.
 */
bool kc_io_linger(struct kc_io *io, unsigned int timeout_ms);

#endif
