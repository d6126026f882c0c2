/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a kind of sink (tcp.c, store_sink.c) has to provide to sink.c, which packs epochs into
 * records.
 */
#ifndef KC_BACKEND_H
#define KC_BACKEND_H

#include <pthread.h>

#include "stream.h"

struct kc_sink;

struct kc_sink_ops {
	/* An epoch file or nothing; BEGIN is written after it. */
	int (*begin)(struct kc_sink *s, struct kc_err *err);
	int (*write)(struct kc_sink *s, const void *buf, size_t len, struct kc_err *err);
	/* Hand on what was written; NULL if there is nobody who waits for it. */
	int (*flush)(struct kc_sink *s, struct kc_err *err);
	/* COMMIT was written. */
	int (*commit)(struct kc_sink *s, struct kc_err *err);
	/* ABORT was written if aborts_by_record. */
	int (*abort)(struct kc_sink *s, struct kc_err *err);
	/* Hand on what was written, take what came. */
	int (*poll)(struct kc_sink *s, struct kc_err *err);
	int (*digests)(struct kc_sink *s, uint32_t block, uint64_t first, uint32_t n, uint8_t *out,
		       struct kc_err *err);
	bool (*end)(struct kc_sink *s, enum kc_end end);
	/* NULL if it holds no guest that could run. */
	int (*switch_over)(struct kc_sink *s, struct kc_err *err);
	void (*close)(struct kc_sink *s);
	bool aborts_by_record;
};

struct kc_sink {
	const struct kc_sink_ops *ops;
	void *ctx;			/* of the backend */
	int fd;
	struct kc_sink_opts opts;
	struct kc_guest guest;

	/* Set by the backend when opened. */
	uint64_t last_epoch;		/* complete at the receiver, and known to be */
	bool has_ram, same_sender, counts;
	uint8_t receiver[16];
	unsigned int heartbeat_ms;	/* 0 for none */
	unsigned int takeover_ms;	/* of silence, and it takes over; 0 for never */
	unsigned int fence_ms;		/* that its fence may take; 0 for none */

	/* The rest is sink.c's. */
	struct kc_packer *packer;
	bool broken, open, first;
	uint64_t base;			/* last epoch committed, or held by the receiver at first */
	struct kc_begin begin;
	uint64_t records, epoch_pages;
	XXH3_state_t *sum;
	struct kc_zero zeros;		/* a run that may grow */
	uint64_t data_us;		/* when anything but heartbeats was sent last */
	uint64_t paid_ns;		/* when the bandwidth allows for more */
	/* The device state of the last epoch committed, and of the open one. */
	uint8_t *state[2];
	uint32_t state_len[2];
	bool has_state;
	uint64_t commit_us[64];		/* when an epoch was committed, by its number */
	uint64_t commit_boot_us[64];	/* and when that began, by another clock */
	uint64_t acked_boot_us;
	/*
	 * Digests that a standby was asked for ahead; whether they are here, and of pages that were
	 * sent since.
	 */
	struct kc_digest_req ahead;	/* n is 0: none */
	uint8_t *ahead_digests;
	bool ahead_here, ahead_stale;
	uint64_t beat_us;		/* when the last heartbeat was sent */
	bool beat_soon;			/* and another is due */
	uint64_t confirmed_us;

	struct kc_sink_stats stats;
	pthread_mutex_t lock;		/* for published */
	struct kc_sink_stats published;
};

/* Set s->ops, s->ctx and what else the backend sets. */
int kc_tcp_open(struct kc_sink *s, const char *hostport, struct kc_err *err);
int kc_store_open(struct kc_sink *s, const char *path, struct kc_err *err);

/* An acknowledgement came. */
void kc_sink_acked(struct kc_sink *s, uint64_t nr);

/* Of sink.c: 0 or -EINVAL; what failed leaves a broken sink; pages, and runs of zeros before them. */
int kc_sink_usable(struct kc_sink *s, bool open, struct kc_err *err);
int kc_sink_broken(struct kc_sink *s, int rc);
int kc_sink_put_page(struct kc_sink *s, uint16_t block, uint64_t page, const void *data,
		     struct kc_err *err);
int kc_sink_flush_zeros(struct kc_sink *s, struct kc_err *err);

/* A record, counted and summed up if an epoch is open. */
int kc_sink_emit(struct kc_sink *s, const uint8_t *rec, size_t len, const void *more,
		 size_t more_len, struct kc_err *err);

#endif
