// SPDX-License-Identifier: GPL-2.0-only
/*
 * Epochs into records: what all kinds of sinks have in common.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend.h"

/* Time that was not used is made up for up to so long; and waits are not shorter. */
#define MAX_BURST_US	100000u
#define MIN_WAIT_US	5000u

bool kc_sink_is_temporary(int error)
{
	switch (error) {
	case ECONNREFUSED:
	case ECONNRESET:
	case ECONNABORTED:
	case EPIPE:
	case ETIMEDOUT:
	case ENETUNREACH:
	case ENETDOWN:
	case EHOSTUNREACH:
	case EHOSTDOWN:
	case EADDRNOTAVAIL:
	case ENODATA:
	case EBUSY:
	case EBADMSG:
		return true;
	}
	return false;
}

struct kc_sink *kc_sink_open(const char *spec, const struct kc_sink_opts *opts,
			     const struct kc_guest *guest, struct kc_err *err)
{
	struct kc_sink *s;
	int rc;

	rc = kc_guest_check(guest, err);
	if (rc) {
		errno = EINVAL;
		return NULL;
	}
	s = calloc(1, sizeof(*s));
	if (!s) {
		kc_fail(err, ENOMEM, "out of memory");
		return NULL;
	}
	s->fd = -1;
	s->first = true;
	s->opts = *opts;
	pthread_mutex_init(&s->lock, NULL);
	s->sum = XXH3_createState();
	if (!s->sum || kc_guest_copy(&s->guest, guest)) {
		rc = kc_fail(err, ENOMEM, "out of memory");
		goto fail;
	}
	if (!strncmp(spec, "tcp:", 4)) {
		rc = kc_tcp_open(s, spec + 4, err);
	} else {
		s->opts.delta_cache = 0;
		rc = kc_store_open(s, spec, err);
	}
	if (rc)
		goto fail;
	s->packer = kc_packer_new(opts->codec, opts->level, s->opts.delta_cache);
	if (!s->packer) {
		rc = kc_fail(err, ENOMEM, "out of memory");
		goto fail;
	}
	s->base = s->last_epoch;
	s->stats.epoch_acked = s->last_epoch;
	s->published = s->stats;
	return s;
fail:
	kc_sink_close(s);
	errno = -rc;
	return NULL;
}

void kc_sink_close(struct kc_sink *s)
{
	if (!s)
		return;
	if (s->ops)
		s->ops->close(s);
	kc_packer_free(s->packer);
	XXH3_freeState(s->sum);
	kc_guest_free(&s->guest);
	free(s->state[0]);
	free(s->state[1]);
	free(s->ahead_digests);
	pthread_mutex_destroy(&s->lock);
	free(s);
}

bool kc_sink_end(struct kc_sink *s, enum kc_end end)
{
	return !s->broken && s->ops->end(s, end);
}

int kc_sink_switch_over(struct kc_sink *s, struct kc_err *err)
{
	int rc;

	if (!s->ops->switch_over)
		return kc_fail(err, ECANCELED, "only a standby can go on with a guest");
	if (s->broken || s->open || s->last_epoch != s->base)
		return kc_fail(err, ECANCELED, "the standby does not have all of the guest");
	rc = s->ops->switch_over(s, err);
	s->broken = true;
	return rc;
}

uint64_t kc_sink_last_epoch(const struct kc_sink *s)
{
	return s->last_epoch;
}

const uint8_t *kc_sink_receiver(const struct kc_sink *s)
{
	return s->receiver;
}

bool kc_sink_continues(const struct kc_sink *s)
{
	return s->same_sender;
}

bool kc_sink_counts(const struct kc_sink *s)
{
	return s->counts;
}

unsigned int kc_sink_start(const struct kc_sink *s)
{
	return s->has_ram ? KC_EPOCH_RESYNC : KC_EPOCH_FULL;
}

int kc_sink_fd(const struct kc_sink *s)
{
	return s->fd;
}

static void publish(struct kc_sink *s)
{
	pthread_mutex_lock(&s->lock);
	s->published = s->stats;
	pthread_mutex_unlock(&s->lock);
}

void kc_sink_stats(const struct kc_sink *cs, struct kc_sink_stats *out)
{
	struct kc_sink *s = (struct kc_sink *)cs;

	pthread_mutex_lock(&s->lock);
	*out = s->published;
	pthread_mutex_unlock(&s->lock);
}

void kc_sink_acked(struct kc_sink *s, uint64_t nr)
{
	s->last_epoch = nr;
	s->stats.epoch_acked = nr;
	s->stats.ack_us = kc_now_us() - s->commit_us[nr % 64];
	s->acked_boot_us = s->commit_boot_us[nr % 64];
	if (s->commit_us[nr % 64] > s->confirmed_us)
		s->confirmed_us = s->commit_us[nr % 64];
}

uint64_t kc_sink_confirmed_us(const struct kc_sink *s)
{
	return s->confirmed_us;
}

/* Whoever fails but for wrong use leaves a broken sink. */
int kc_sink_broken(struct kc_sink *s, int rc)
{
	if (rc < 0)
		s->broken = true;
	return rc;
}

int kc_sink_usable(struct kc_sink *s, bool open, struct kc_err *err)
{
	if (s->broken)
		return kc_fail(err, EINVAL, "the sink is broken and has to be closed");
	if (open && !s->open)
		return kc_fail(err, EINVAL, "no epoch is open");
	return 0;
}

/*
 * Something was handed over: wait until its time is up, if there is a limit.  What was handed over
 * is on its way meanwhile, so the receiver hears of us as often as there are waits.
 */
static int pace(struct kc_sink *s, size_t len, uint64_t now, struct kc_err *err)
{
	int rc = 0;

	if (!s->opts.bandwidth)
		return 0;
	if (s->paid_ns < (now - MAX_BURST_US) * 1000)
		s->paid_ns = (now - MAX_BURST_US) * 1000;
	s->paid_ns += len * 1000000000ull / s->opts.bandwidth;
	/* A record without contents, such as a heartbeat, does not wait: the guest may. */
	if (len <= KC_REC_HDR || s->paid_ns / 1000 < now + MIN_WAIT_US)
		return 0;
	if (s->ops->flush)
		rc = s->ops->flush(s, err);
	if (!rc)
		usleep(s->paid_ns / 1000 - now);
	return rc;
}

/* @t: when that began; there is one for each page, and clocks take time, too */
static int emit_since(struct kc_sink *s, uint64_t t, const uint8_t *rec, size_t len,
		      const void *more, size_t more_len, struct kc_err *err)
{
	uint64_t now;
	int rc;

	if (s->open) {
		s->records++;
		XXH3_128bits_update(s->sum, rec, len);
		if (more_len)
			XXH3_128bits_update(s->sum, more, more_len);
	}
	rc = s->ops->write(s, rec, len, err);
	if (!rc && more_len)
		rc = s->ops->write(s, more, more_len, err);
	now = kc_now_us();
	if (len > KC_REC_HDR + 8)
		s->data_us = now;
	s->stats.wire_bytes += len + more_len;
	s->stats.io_us += now - t;
	return rc ? rc : pace(s, len + more_len, now, err);
}

int kc_sink_emit(struct kc_sink *s, const uint8_t *rec, size_t len, const void *more,
		 size_t more_len, struct kc_err *err)
{
	return emit_since(s, kc_now_us(), rec, len, more, more_len, err);
}

int kc_sink_flush_zeros(struct kc_sink *s, struct kc_err *err)
{
	uint8_t rec[KC_REC_HDR + 24];

	if (!s->zeros.npages)
		return 0;
	kc_put_zero(rec, &s->zeros);
	s->zeros.npages = 0;
	return kc_sink_emit(s, rec, sizeof(rec), NULL, 0, err);
}

static int put_zeros(struct kc_sink *s, const struct kc_zero *z, struct kc_err *err)
{
	int rc;

	if (s->zeros.npages && s->zeros.block == z->block && s->zeros.flags == z->flags &&
	    s->zeros.page + s->zeros.npages == z->page) {
		s->zeros.npages += z->npages;
		return 0;
	}
	rc = kc_sink_flush_zeros(s, err);
	s->zeros = *z;
	return rc;
}

/* A page of RAM or of the device state. */
int kc_sink_put_page(struct kc_sink *s, uint16_t block, uint64_t page, const void *data,
		     struct kc_err *err)
{
	struct kc_page p = { .block = block, .page = page };
	uint8_t rec[KC_REC_HDR + KC_PAGE_HDR];
	uint64_t t = kc_now_us(), packed;
	bool zero, same = false;
	int rc;

	zero = kc_is_zero_page(data);
	if (zero)
		kc_pack_zero(s->packer, block, page);
	else
		same = kc_pack(s->packer, s->begin.nr, &p, data);
	packed = kc_now_us();
	s->stats.pack_us += packed - t;
	if (same)
		return 0;
	if (block != KC_STATE_BLOCK) {
		s->epoch_pages++;
		s->stats.zero_pages += zero;
	}
	if (zero)
		return put_zeros(s, &(struct kc_zero){ .block = block, .page = page,
						       .npages = 1 }, err);
	rc = kc_sink_flush_zeros(s, err);
	if (rc)
		return rc;
	s->stats.delta_pages += !!(p.enc & KC_ENC_DELTA);
	kc_put_page(rec, &p);
	return emit_since(s, packed, rec, sizeof(rec), p.data, p.len, err);
}

int kc_epoch_begin(struct kc_sink *s, uint64_t nr, unsigned int flags, struct kc_err *err)
{
	uint8_t rec[KC_REC_HDR + 24];
	int rc;

	rc = kc_sink_usable(s, false, err);
	if (rc)
		return rc;
	if (s->open || (flags & ~(KC_EPOCH_FULL | KC_EPOCH_RESYNC)) ||
	    flags == (KC_EPOCH_FULL | KC_EPOCH_RESYNC) || nr <= s->base || (s->first && !flags) ||
	    (flags == KC_EPOCH_RESYNC && !s->has_ram && !s->base))
		return kc_fail(err, EINVAL,
			       "epoch %llu with flags %u cannot begin here (last is %llu)",
			       (unsigned long long)nr, flags, (unsigned long long)s->base);
	s->begin = (struct kc_begin){ .nr = nr, .flags = flags,
				      .base = flags == KC_EPOCH_FULL ? 0 : s->base };
	if (flags == KC_EPOCH_FULL)
		kc_packer_forget(s->packer, 0);
	rc = s->ops->begin(s, err);
	if (rc)
		return kc_sink_broken(s, rc);
	s->open = true;
	s->records = 0;
	s->epoch_pages = 0;
	s->has_state = false;
	XXH3_128bits_reset(s->sum);
	kc_put_begin(rec, &s->begin);
	return kc_sink_broken(s, kc_sink_emit(s, rec, sizeof(rec), NULL, 0, err));
}

int kc_epoch_page(struct kc_sink *s, uint32_t block, uint64_t page, const void *data,
		  struct kc_err *err)
{
	int rc;

	rc = kc_sink_usable(s, true, err);
	if (rc)
		return rc;
	if (block >= s->guest.nr_blocks || page >= s->guest.blocks[block].npages)
		return kc_fail(err, EINVAL, "the guest has no page %llu in block %u",
			       (unsigned long long)page, block);
	s->stats.pages++;
	if (block == s->ahead.block && page - s->ahead.first < s->ahead.n)
		s->ahead_stale = true;
	return kc_sink_broken(s, kc_sink_put_page(s, block, page, data, err));
}

int kc_epoch_zeros(struct kc_sink *s, uint32_t block, uint64_t page, uint64_t n, bool hole,
		   struct kc_err *err)
{
	struct kc_zero z = { .page = page, .npages = n, .block = block,
			     .flags = hole ? KC_ZERO_HOLE : 0 };
	int rc;

	rc = kc_sink_usable(s, true, err);
	if (rc)
		return rc;
	if (block >= s->guest.nr_blocks || page > s->guest.blocks[block].npages || !n ||
	    n > s->guest.blocks[block].npages - page)
		return kc_fail(err, EINVAL, "the guest has no pages %llu+%llu in block %u",
			       (unsigned long long)page, (unsigned long long)n, block);
	s->stats.pages += n;
	s->stats.zero_pages += n;
	s->epoch_pages += n;
	if (block == s->ahead.block && page < s->ahead.first + s->ahead.n &&
	    s->ahead.first < page + n)
		s->ahead_stale = true;
	kc_pack_zeros(s->packer, block, page, n);
	return kc_sink_broken(s, put_zeros(s, &z, err));
}

int kc_epoch_state(struct kc_sink *s, const void *buf, size_t len, unsigned int flags,
		   struct kc_err *err)
{
	size_t i, n = KC_STATE_PAGES(len), old;
	uint8_t rec[KC_REC_HDR + 16], *copy;
	struct kc_state state;
	int rc;

	rc = kc_sink_usable(s, true, err);
	if (rc)
		return rc;
	if (s->has_state || len > KC_STATE_MAX)
		return kc_fail(err, EINVAL, "%s", s->has_state ? "an epoch has one device state" :
			       "the device state is too large");
	copy = calloc(n + 1, KC_PAGE_SIZE);
	if (!copy)
		return kc_sink_broken(s, kc_fail(err, ENOMEM, "out of memory"));
	memcpy(copy, buf, len);
	free(s->state[1]);
	s->state[1] = copy;
	s->state_len[1] = len;
	s->has_state = true;
	s->stats.state_bytes += len;

	/* An increment leaves out what is as before; to others, no state was before. */
	old = KC_STATE_PAGES(s->state_len[0]);
	for (i = s->begin.flags ? 0 : n; i < old; i++)
		kc_pack_zero(s->packer, KC_STATE_BLOCK, i);
	if (s->begin.flags)
		old = 0;

	state = (struct kc_state){ .len = len,
				   .flags = flags,
				   .xxh = XXH3_64bits(copy, len) };
	kc_put_state(rec, &state);
	rc = kc_sink_flush_zeros(s, err);
	if (!rc)
		rc = kc_sink_emit(s, rec, sizeof(rec), NULL, 0, err);
	for (i = 0; i < n && !rc; i++) {
		const uint8_t *p = copy + i * KC_PAGE_SIZE;

		if (i >= old || memcmp(p, s->state[0] + i * KC_PAGE_SIZE, KC_PAGE_SIZE))
			rc = kc_sink_put_page(s, KC_STATE_BLOCK, i, p, err);
	}
	if (!rc)
		rc = kc_sink_flush_zeros(s, err);
	return kc_sink_broken(s, rc);
}

int kc_epoch_commit(struct kc_sink *s, struct kc_err *err)
{
	struct kc_commit c = { .nr = s->begin.nr };
	uint8_t rec[KC_REC_HDR + 40];
	uint64_t begun = kc_now_us(), t;
	XXH128_canonical_t sum;
	int rc;

	rc = kc_sink_usable(s, true, err);
	if (rc)
		return rc;
	if (!s->has_state)
		return kc_fail(err, EINVAL, "an epoch needs a device state");
	rc = kc_sink_flush_zeros(s, err);
	if (rc)
		return kc_sink_broken(s, rc);
	XXH128_canonicalFromHash(&sum, XXH3_128bits_digest(s->sum));
	memcpy(c.sum, sum.digest, sizeof(c.sum));
	c.records = s->records;
	c.pages = s->epoch_pages;
	kc_put_commit(rec, &c);
	/* COMMIT is no part of what it sums up. */
	s->open = false;
	s->commit_boot_us[c.nr % 64] = kc_boot_us();
	rc = kc_sink_emit(s, rec, sizeof(rec), NULL, 0, err);
	if (rc)
		return kc_sink_broken(s, rc);
	/* Not later than it was sent. */
	s->commit_us[c.nr % 64] = begun;
	t = kc_now_us();
	s->base = c.nr;
	s->first = false;
	free(s->state[0]);
	s->state[0] = s->state[1];
	s->state_len[0] = s->state_len[1];
	s->state[1] = NULL;
	s->stats.epoch_sent = c.nr;
	s->stats.epochs++;
	rc = s->ops->commit(s, err);
	s->stats.io_us += kc_now_us() - t;
	publish(s);
	return kc_sink_broken(s, rc);
}

int kc_epoch_abort(struct kc_sink *s, struct kc_err *err)
{
	uint8_t rec[KC_REC_HDR + 16];
	int rc;

	rc = kc_sink_usable(s, true, err);
	if (rc)
		return rc;
	s->zeros.npages = 0;
	s->open = false;
	kc_packer_forget(s->packer, s->begin.nr);
	if (s->ops->aborts_by_record) {
		kc_put_nr(rec, KC_ABORT, s->begin.nr, 0);
		rc = kc_sink_emit(s, rec, sizeof(rec), NULL, 0, err);
	}
	if (!rc)
		rc = s->ops->abort(s, err);
	return kc_sink_broken(s, rc);
}

int kc_sink_digests(struct kc_sink *s, uint32_t block, uint64_t first, uint32_t n, uint8_t *out,
		    struct kc_err *err)
{
	uint64_t npages;
	uint32_t chunk;
	int rc;

	rc = kc_sink_usable(s, false, err);
	if (rc)
		return rc;
	if (!s->has_ram && !s->base)
		return kc_fail(err, EINVAL, "the receiver holds nothing");
	npages = kc_guest_block_pages(&s->guest, block);
	if (first > npages || n > npages - first)
		return kc_fail(err, EINVAL, "the guest has no such pages");
	if (s->open)
		rc = kc_sink_flush_zeros(s, err);
	for (; n && !rc; n -= chunk, first += chunk, out += chunk * KC_DIGEST_SIZE) {
		chunk = n < KC_DIGESTS_CHUNK ? n : KC_DIGESTS_CHUNK;
		rc = s->ops->digests(s, block, first, chunk, out, err);
	}
	return kc_sink_broken(s, rc);
}

int kc_sink_poll(struct kc_sink *s, uint64_t *acked, struct kc_err *err)
{
	uint64_t now = kc_now_us();
	uint8_t rec[KC_REC_HDR + 8];
	size_t n;
	int rc;

	rc = kc_sink_usable(s, false, err);
	if (rc)
		return rc;
	/* Within a long epoch as well, as nothing else in it is answered. */
	if (s->heartbeat_ms &&
	    (s->beat_soon || now - s->beat_us >= s->heartbeat_ms * 1000ull)) {
		n = kc_put_heartbeat(rec, now);
		s->beat_us = now;
		s->beat_soon = false;
		rc = kc_sink_emit(s, rec, n, NULL, 0, err);
	}
	if (!rc)
		rc = s->ops->poll(s, err);
	if (acked)
		*acked = s->last_epoch;
	publish(s);
	return kc_sink_broken(s, rc);
}

uint64_t kc_sink_heard_us(const struct kc_sink *s)
{
	return s->acked_boot_us;
}

unsigned int kc_sink_takeover_ms(const struct kc_sink *s)
{
	return s->takeover_ms;
}

unsigned int kc_sink_fence_ms(const struct kc_sink *s)
{
	return s->fence_ms;
}

uint64_t kc_sink_due_us(const struct kc_sink *s)
{
	if (s->beat_soon)
		return 0;
	return s->heartbeat_ms ? s->beat_us + s->heartbeat_ms * 1000ull : UINT64_MAX;
}

int kc_sink_wait(struct kc_sink *s, uint64_t nr, unsigned int timeout_ms, struct kc_err *err)
{
	uint64_t end = kc_now_us() + timeout_ms * 1000ull;
	struct pollfd p = { .fd = s->fd, .events = POLLIN };
	int rc;

	for (;;) {
		uint64_t now, due;

		rc = kc_sink_poll(s, NULL, err);
		if (rc || s->last_epoch >= nr)
			return rc;
		now = kc_now_us();
		if (now >= end)
			return kc_fail(err, ETIMEDOUT,
				       "epoch %llu was not acknowledged within %u ms",
				       (unsigned long long)nr, timeout_ms);
		due = kc_sink_due_us(s);
		due = due < end ? due : end;
		poll(&p, 1, due > now ? (due - now + 999) / 1000 : 0);
	}
}
