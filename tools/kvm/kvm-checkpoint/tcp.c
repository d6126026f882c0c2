// SPDX-License-Identifier: GPL-2.0-only
/*
 * The sink that is a standby on another host.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "backend.h"

static struct kc_io *io_of(struct kc_sink *s)
{
	return s->ctx;
}

/* What a receiver's refusal is called here. */
static int code_errno(uint32_t code)
{
	switch (code) {
	case KC_ERR_VERSION:
		return EPROTONOSUPPORT;
	case KC_ERR_GUEST:
		return EEXIST;
	case KC_ERR_BUSY:
		return EBUSY;
	case KC_ERR_TAKEN_OVER:
		return ESHUTDOWN;
	case KC_ERR_STREAM:
		return EBADMSG;
	case KC_ERR_SPACE:
		return ENOSPC;
	case KC_ERR_CONFIG:
		return EOPNOTSUPP;
	default:
		return EREMOTEIO;
	}
}

/* The next record that is no news of the general kind. */
static int next(struct kc_sink *s, unsigned int timeout_ms, struct kc_rec *rec, struct kc_err *err)
{
	char text[400];
	uint64_t nr, us;
	uint32_t code;
	int rc;

	for (;;) {
		rc = kc_io_record(io_of(s), timeout_ms, rec, err);
		if (rc)
			return rc;
		switch (rec->type) {
		case KC_ACK:
			rc = kc_get_nr(rec, &nr, &us, err);
			if (!rc && (nr <= s->last_epoch || nr > s->stats.epoch_sent))
				rc = kc_fail(err, EPROTO, "epoch %llu is acknowledged, but was not sent",
					     (unsigned long long)nr);
			if (rc)
				return rc;
			kc_sink_acked(s, nr);
			break;
		case KC_HEARTBEAT:
			rc = kc_get_heartbeat(rec, &us, err);
			if (!rc && us > s->beat_us)
				rc = kc_fail(err, EPROTO, "a heartbeat is answered that was not sent");
			if (rc)
				return rc;
			if (us > s->confirmed_us)
				s->confirmed_us = us;
			break;
		case KC_ERROR:
			kc_get_error(rec, &code, text, sizeof(text));
			return kc_fail(err, code_errno(code), "the standby refuses: %s", text);
		default:
			if (!(rec->flags & KC_REC_OPTIONAL))
				return 0;
		}
	}
}

/* Sending failed: did the receiver say why? */
static int why(struct kc_sink *s, int rc, struct kc_err *err)
{
	struct kc_err said;
	struct kc_rec rec;
	int said_rc;

	said_rc = next(s, 500, &rec, &said);
	switch (said_rc) {
	case -EPROTONOSUPPORT:
	case -EEXIST:
	case -EBUSY:
	case -ESHUTDOWN:
	case -EBADMSG:
	case -ENOSPC:
	case -EOPNOTSUPP:
	case -EREMOTEIO:
		return kc_fail(err, -said_rc, "%s", said.text);
	}
	return rc;
}

static int tcp_begin(struct kc_sink *s, struct kc_err *err)
{
	(void)s;
	(void)err;
	return 0;
}

static int tcp_write(struct kc_sink *s, const void *buf, size_t len, struct kc_err *err)
{
	int rc = kc_io_write(io_of(s), buf, len, err);

	return rc ? why(s, rc, err) : 0;
}

static int tcp_flush(struct kc_sink *s, struct kc_err *err)
{
	int rc = kc_io_flush(io_of(s), err);

	return rc ? why(s, rc, err) : 0;
}

/* The answer to what was asked ahead */
static int take_digests(struct kc_sink *s, const struct kc_rec *rec, struct kc_err *err)
{
	struct kc_digest_req got, *want = &s->ahead;

	if (rec->type != KC_DIGESTS)
		return kc_fail(err, EPROTO, "the standby sent a record of type %u for no reason",
			       rec->type);
	if (!want->n || s->ahead_here || kc_get_digest_req(rec, &got, err) ||
	    got.block != want->block || got.first != want->first || got.n != want->n)
		return kc_fail(err, EPROTO,
			       "the standby does not answer with the digests it was asked for");
	memcpy(s->ahead_digests, got.digests, (size_t)got.n * KC_DIGEST_SIZE);
	s->ahead_here = true;
	return 0;
}

static int await_digests(struct kc_sink *s, struct kc_err *err)
{
	struct kc_rec rec;
	int rc = 0;

	while (!rc && s->ahead.n && !s->ahead_here) {
		rc = next(s, s->opts.io_timeout_ms, &rec, err);
		if (!rc)
			rc = take_digests(s, &rec, err);
	}
	return rc;
}

static int ask_digests(struct kc_sink *s, uint32_t block, uint64_t first, uint32_t n,
		       struct kc_err *err)
{
	uint8_t buf[KC_REC_HDR + 16];
	size_t len;
	int rc;

	if (!s->ahead_digests)
		s->ahead_digests = malloc(KC_DIGESTS_CHUNK * KC_DIGEST_SIZE);
	if (!s->ahead_digests)
		return kc_fail(err, ENOMEM, "out of memory");
	s->ahead = (struct kc_digest_req){ .block = block, .first = first, .n = n };
	s->ahead_here = false;
	s->ahead_stale = false;
	len = kc_put_digest_req(buf, KC_DIGEST_REQ, &s->ahead);
	rc = kc_sink_emit(s, buf, len, NULL, 0, err);
	return rc ? rc : tcp_flush(s, err);
}

static int tcp_poll(struct kc_sink *s, struct kc_err *err)
{
	uint64_t heard = kc_io_heard_us(io_of(s)), now;
	struct kc_rec rec;
	int rc;

	rc = tcp_flush(s, err);
	if (rc)
		return rc;
	while (!(rc = next(s, 0, &rec, err))) {
		rc = take_digests(s, &rec, err);
		if (rc)
			return rc;
	}
	if (rc != -EAGAIN)
		return rc;
	/* While data flows, a peer that takes none is noticed by that. */
	if (s->data_us > heard)
		heard = s->data_us;
	now = kc_now_us();
	if (s->heartbeat_ms && now > heard &&
	    now - heard > (s->opts.io_timeout_ms + s->heartbeat_ms) * 1000ull)
		return kc_fail(err, ETIMEDOUT, "the standby has not answered for %u ms",
			       s->opts.io_timeout_ms);
	return 0;
}

static int tcp_digests(struct kc_sink *s, uint32_t block, uint64_t first, uint32_t n, uint8_t *out,
		       struct kc_err *err)
{
	uint64_t left = kc_guest_block_pages(&s->guest, block) - first - n;
	uint32_t next_n = left < KC_DIGESTS_CHUNK ? left : KC_DIGESTS_CHUNK;
	int rc;

	if (s->ahead_stale || s->ahead.block != block || s->ahead.first != first ||
	    s->ahead.n != n) {
		/* Another one than was thought */
		rc = await_digests(s, err);
		if (!rc)
			rc = ask_digests(s, block, first, n, err);
		if (rc)
			return rc;
	}
	rc = await_digests(s, err);
	if (rc)
		return rc;
	memcpy(out, s->ahead_digests, (size_t)n * KC_DIGEST_SIZE);
	s->ahead.n = 0;
	/* Both ends are at work then. */
	return left ? ask_digests(s, block, first + n, next_n, err) : 0;
}

static bool tcp_end(struct kc_sink *s, enum kc_end end)
{
	uint8_t buf[KC_REC_HDR + 4];
	struct kc_rec rec;
	bool told;

	kc_put_end(buf, end);
	/* It says the same when it has seen to that, but may be busy with the last epoch. */
	told = !kc_sink_emit(s, buf, sizeof(buf), NULL, 0, NULL) &&
	       !kc_io_flush(io_of(s), NULL) && !await_digests(s, NULL) &&
	       !next(s, s->opts.io_timeout_ms, &rec, NULL) && rec.type == KC_END;
	s->broken = true;
	return told;
}

static int tcp_switch_over(struct kc_sink *s, struct kc_err *err)
{
	uint8_t buf[KC_REC_HDR + 4];
	struct kc_rec rec;
	int rc;

	kc_put_end(buf, KC_END_SWITCH_OVER);
	rc = kc_sink_emit(s, buf, sizeof(buf), NULL, 0, err);
	if (!rc)
		rc = tcp_flush(s, err);
	/* QEMU takes its time there; heartbeats say that somebody waits for it. */
	if (!rc)
		rc = next(s, s->opts.io_timeout_ms + 4 * s->heartbeat_ms, &rec, err);
	switch (rc) {
	case 0:
		return rec.type == KC_END ? 0 :
		       kc_fail(err, EPROTO, "the standby sent a record of type %u for no reason",
			       rec.type);
	case -EREMOTEIO:
	case -EBUSY:
	case -ENOSPC:
	case -EOPNOTSUPP:
		return -ECANCELED;
	case -ESHUTDOWN:
		return 0;
	}
	return rc == -ECANCELED ? -ECONNABORTED : rc;
}

static void tcp_close(struct kc_sink *s)
{
	kc_io_close(io_of(s));
}

static const struct kc_sink_ops tcp_ops = {
	.begin = tcp_begin,
	.write = tcp_write,
	.flush = tcp_flush,
	.commit = tcp_flush,
	.abort = tcp_flush,
	.poll = tcp_poll,
	.digests = tcp_digests,
	.end = tcp_end,
	.switch_over = tcp_switch_over,
	.close = tcp_close,
	.aborts_by_record = true,
};

/* Of this process, so that a standby knows whether it is the same that comes again. */
static const uint8_t *instance(void)
{
	static uint8_t id[16];
	static bool made;

	if (!made) {
		if (getrandom(id, sizeof(id), 0) != sizeof(id))
			abort();
		made = true;
	}
	return id;
}

int kc_tcp_open(struct kc_sink *s, const char *hostport, struct kc_err *err)
{
	struct kc_welcome w;
	struct kc_io *io;
	struct kc_rec rec;
	uint64_t sent_us;
	uint8_t *hello;
	size_t len;
	int rc;

	rc = kc_io_connect(hostport, &s->opts, &io, err);
	if (rc)
		return rc;
	s->ops = &tcp_ops;
	s->ctx = io;
	s->fd = kc_io_fd(io);

	hello = malloc(KC_REC_HDR + KC_REC_MAX);
	if (!hello)
		return kc_fail(err, ENOMEM, "out of memory");
	sent_us = kc_now_us();
	len = kc_put_hello(hello, &s->guest, instance(), s->opts.unheld ? KC_HELLO_UNHELD : 0);
	rc = kc_io_write(io, hello, len, err);
	free(hello);
	if (!rc)
		rc = tcp_flush(s, err);
	if (!rc)
		rc = next(s, s->opts.connect_timeout_ms, &rec, err);
	if (rc)
		return rc;
	if (rec.type != KC_WELCOME || kc_get_welcome(&rec, &w, err))
		return kc_fail(err, EPROTO, "%s is no kvm-checkpoint standby", hostport);
	if (w.version != KC_VERSION)
		return kc_fail(err, EPROTONOSUPPORT,
			       "the standby wants version %u of the protocol, this program speaks version %u",
			       w.version, KC_VERSION);
	s->last_epoch = w.last_epoch;
	s->has_ram = w.has_ram;
	s->takeover_ms = w.timeout_ms;
	s->fence_ms = w.fence_ms;
	s->same_sender = w.same_sender;
	s->counts = w.counts;
	memcpy(s->receiver, w.receiver, sizeof(s->receiver));
	s->heartbeat_ms = w.timeout_ms ? (w.timeout_ms + 3) / 4 : 1000;
	s->data_us = s->beat_us = kc_now_us();
	s->confirmed_us = sent_us;
	return 0;
}
