// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint standby: connections of primaries.
 */
#include <errno.h>
#include <inttypes.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "standby.h"
#include "wake.h"

static uint32_t errno_code(int error)
{
	switch (error) {
	case EPROTONOSUPPORT:
		return KC_ERR_VERSION;
	case EEXIST:
		return KC_ERR_GUEST;
	case EBUSY:
		return KC_ERR_BUSY;
	case ESHUTDOWN:
		return KC_ERR_TAKEN_OVER;
	case EPROTO:
	case EBADMSG:
		return KC_ERR_STREAM;
	case ENOSPC:
	case EDQUOT:
	case EFBIG:
		return KC_ERR_SPACE;
	case EOPNOTSUPP:
		return KC_ERR_CONFIG;
	default:
		return KC_ERR_OTHER;
	}
}

static void send_error(struct kc_io *io, int error, const char *text)
{
	uint8_t rec[KC_REC_HDR + 4 + sizeof(((struct kc_err *)0)->text)];
	size_t n = kc_put_error(rec, errno_code(error), text);

	if (!kc_io_write(io, rec, n, NULL) && !kc_io_flush(io, NULL))
		kc_io_linger(io, 2000);
}

/* With the lock.  How long nothing was heard of the primary on this connection. */
static uint64_t silent_us(const struct session *s)
{
	uint64_t heard, now = kc_now_us();

	if (!s->io || s->busy)
		return 0;
	heard = kc_io_heard_us(s->io);
	return now > heard ? now - heard : 0;
}

static unsigned int heartbeat_ms(const struct standby *sb)
{
	return sb->timeout_ms ? (sb->timeout_ms + 3) / 4 : 1000;
}

/* With the lock.  End it; its thread will notice. */
void kc_session_kick(struct session *s)
{
	s->kicked = true;
	shutdown(s->fd, SHUT_RDWR);
}

int kc_standby_wait(struct standby *sb, unsigned int ms)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	ts.tv_sec += ms / 1000;
	ts.tv_nsec += ms % 1000 * 1000000l;
	if (ts.tv_nsec >= 1000000000) {
		ts.tv_sec++;
		ts.tv_nsec -= 1000000000;
	}
	return -pthread_cond_timedwait(&sb->changed, &sb->lock, &ts);
}

/*
 * The guest runs here.  Who protected it before has to stop his copy.  Anybody else must not, least
 * of all who would protect the one that runs here now, and asks for the wrong standby.
 */
static int refuse_for_good(const struct session *s, const struct kc_guest *guest,
			   struct kc_err *err)
{
	static const uint8_t unknown[16];
	const struct kc_guest *g = kc_ram_guest(s->sb->ram);

	if (!kc_guest_same(g, guest, NULL) &&
	    (!memcmp(s->instance, s->sb->instance, sizeof(s->instance)) ||
	     (memcmp(g->process, unknown, 16) && !memcmp(g->process, guest->process, 16))))
		return kc_fail(err, ESHUTDOWN,
			       "the standby has taken over the guest at epoch %" PRIu64,
			       kc_ram_epoch(s->sb->ram));
	return kc_fail(err, EEXIST,
		       "this standby has taken over guest %s and holds no checkpoints any more: start another one, with a --ram-dir of its own",
		       g->name);
}

/* Become the active session, or say why not. */
static int activate(struct session *s, const struct kc_guest *guest, struct kc_err *err)
{
	struct standby *sb = s->sb;
	struct session *other;
	int rc = 0;

	pthread_mutex_lock(&sb->lock);
	other = sb->active;
	if (other && sb->mode == SERVING) {
		/*
		 * The same process again, or one that was restarted: what it had before is a link
		 * that broke and that we have not noticed yet.  A second primary is something else.
		 */
		if (memcmp(other->instance, s->instance, sizeof(s->instance)) &&
		    silent_us(other) < 2 * heartbeat_ms(sb) * 1000ull) {
			rc = kc_fail(err, EBUSY, "another primary is connected");
		} else {
			kc_session_kick(other);
			while (sb->active == other && !rc)
				rc = kc_standby_wait(sb, 5000);
			if (rc || sb->active)
				rc = kc_fail(err, EBUSY, "another connection is at work");
		}
	}
	if (!rc && sb->mode == FAILING_OVER)
		rc = kc_fail(err, EBUSY, "the standby is failing over");
	if (!rc && sb->mode == STOPPING)
		rc = kc_fail(err, EBUSY, "the standby is ending");
	if (!rc && sb->mode == TAKEN_OVER)
		rc = refuse_for_good(s, guest, err);
	if (!rc) {
		sb->active = s;
		memcpy(sb->instance, s->instance, sizeof(sb->instance));
	}
	pthread_mutex_unlock(&sb->lock);
	return rc;
}

static void heartbeat(struct session *s, uint64_t us)
{
	uint8_t rec[KC_REC_HDR + 8];
	size_t n = kc_put_heartbeat(rec, us);

	if (!kc_io_write(s->io, rec, n, NULL))
		kc_io_flush(s->io, NULL);
}

void kc_session_still_there(struct standby *sb)
{
	uint64_t now = kc_now_us();

	/* The active one is that of this thread. */
	if (sb->active && now - sb->still_there_us > heartbeat_ms(sb) * 1000ull / 2) {
		sb->still_there_us = now;
		heartbeat(sb->active, 0);
	}
}

enum mode kc_standby_mode(struct standby *sb)
{
	enum mode mode;

	pthread_mutex_lock(&sb->lock);
	mode = sb->mode;
	pthread_mutex_unlock(&sb->lock);
	return mode;
}

/* Making RAM for a large guest takes its time: say that we live. */
static void still_there(void *ctx)
{
	heartbeat(ctx, 0);
}

static void show_peer(struct session *s)
{
	struct sockaddr_storage sa;
	socklen_t len = sizeof(sa);
	char host[64], port[16], text[100];

	if (getpeername(s->fd, (struct sockaddr *)&sa, &len) ||
	    getnameinfo((struct sockaddr *)&sa, len, host, sizeof(host), port, sizeof(port),
			NI_NUMERICHOST | NI_NUMERICSERV))
		return;
	snprintf(text, sizeof(text), strchr(host, ':') ? "from [%s]:%s" : "from %s:%s", host, port);
	kc_status_peer(s->sb->status, text);
}

/* Who has got what the guest sent after the last epoch may know more than that. */
static int unheld(struct standby *sb, struct kc_err *err)
{
	if (!kc_ram_counts(sb->ram))
		return 0;
	kc_log(KC_LOG_WARN,
	       "what the guest sends was not held back any more: epoch %" PRIu64 " is not failed over to, unless told to by promote-anyway",
	       kc_ram_epoch(sb->ram));
	return kc_ram_set_flags(sb->ram, kc_ram_flags(sb->ram) | KC_RAM_UNHELD, err);
}

static int greet(struct session *s, const struct kc_hello *hello, struct kc_err *err)
{
	struct standby *sb = s->sb;
	struct kc_welcome w = { .version = KC_VERSION };
	uint8_t rec[KC_REC_HDR + 36];
	struct kc_err why;
	char uuid[37];
	int rc;

	w.has_ram = kc_ram_guest(sb->ram);
	if (w.has_ram) {
		rc = kc_guest_same(kc_ram_guest(sb->ram), &hello->guest, &why);
		if (rc)
			return kc_fail(err, EEXIST,
				       "%s (give the standby another --ram-dir, or remove its old one)",
				       why.text);
		/* Before its silence means something */
		rc = hello->flags & KC_HELLO_UNHELD ? unheld(sb, err) : 0;
		if (rc)
			return rc;
		/* Whatever keeps us from taking it now: it lives. */
		pthread_mutex_lock(&sb->lock);
		sb->guest_died = false;
		sb->armed = true;
		sb->heard_us = kc_now_us();
		pthread_mutex_unlock(&sb->lock);
	}
	rc = kc_check_command(sb, &hello->guest, err);
	if (rc)
		return rc;
	if (!w.has_ram) {
		kc_log(KC_LOG_INFO, "making %" PRIu64 " MiB of RAM in %s",
		       kc_guest_pages(&hello->guest) >> 8, sb->ram_dir);
		rc = kc_ram_create(sb->ram, &hello->guest, still_there, s, err);
		if (rc)
			return rc;
	}
	/* That protection had ended is forgotten with the next complete epoch, not before. */
	rc = kc_ram_open_disks(sb->ram, err);
	if (!rc)
		rc = kc_ram_settle(sb->ram, err);
	if (rc)
		return rc;
	kc_uuid_text(hello->guest.uuid, uuid);
	kc_status_guest(sb->status, hello->guest.name[0] ? hello->guest.name : uuid);
	kc_log(KC_LOG_INFO, "the primary of guest %s (%s) is connected; last complete epoch %" PRIu64, uuid,
	       hello->guest.name, kc_ram_epoch(sb->ram));
	show_peer(s);
	w.timeout_ms = sb->timeout_ms;
	w.fence_ms = sb->no_fence ? 0 : sb->fence_timeout_ms;
	w.same_sender = kc_ram_set_sender(sb->ram, hello->instance, hello->guest.process);
	w.last_epoch = kc_ram_epoch(sb->ram);
	w.counts = kc_ram_counts(sb->ram);
	memcpy(w.receiver, kc_ram_id(sb->ram), sizeof(w.receiver));
	kc_put_welcome(rec, &w);
	pthread_mutex_lock(&sb->lock);
	sb->armed = true;
	pthread_mutex_unlock(&sb->lock);
	rc = kc_io_write(s->io, rec, sizeof(rec), err);
	return rc ? rc : kc_io_flush(s->io, err);
}

static int answer_digests(struct session *s, const struct kc_rec *rec, struct kc_err *err)
{
	uint8_t head[KC_REC_HDR + 16], *digests;
	struct kc_digest_req req;
	int rc;

	rc = kc_get_digest_req(rec, &req, err);
	if (rc)
		return rc;
	digests = malloc((size_t)req.n * KC_DIGEST_SIZE);
	if (!digests)
		return kc_fail(err, ENOMEM, "out of memory");
	rc = kc_ram_digests(s->sb->ram, req.block, req.first, req.n, digests, err);
	if (!rc) {
		kc_put_digest_req(head, KC_DIGESTS, &req);
		rc = kc_io_write(s->io, head, sizeof(head), err);
	}
	if (!rc)
		rc = kc_io_write(s->io, digests, (size_t)req.n * KC_DIGEST_SIZE, err);
	if (!rc)
		rc = kc_io_flush(s->io, err);
	free(digests);
	return rc;
}

static int acknowledge(struct session *s, const struct kc_rx *rx, uint64_t started,
		       uint64_t *offset, struct kc_err *err)
{
	struct standby *sb = s->sb;
	uint64_t nr = kc_ram_epoch(sb->ram), now = kc_now_us();
	uint8_t rec[KC_REC_HDR + 16];
	int rc;

	kc_put_nr(rec, KC_ACK, nr, now - started);
	rc = kc_io_write(s->io, rec, sizeof(rec), err);
	if (!rc)
		rc = kc_io_flush(s->io, err);
	sb->stats.epoch_sent = sb->stats.epoch_acked = nr;
	sb->stats.epochs++;
	sb->stats.pages += kc_rx_pages(rx);
	sb->stats.wire_bytes += kc_io_offset(s->io) - *offset;
	sb->stats.io_us += now - started;
	sb->stats.ack_us = now - started;
	*offset = kc_io_offset(s->io);
	kc_status_epoch(sb->status, nr, now);
	kc_status_sink(sb->status, &sb->stats);
	kc_status_trouble(sb->status, NULL);
	kc_status_phase(sb->status, kc_ram_counts(sb->ram) ? "receiving" :
			"receiving, but nothing to fail over to yet");
	return rc;
}

static int ended(struct session *s, const struct kc_rec *rec, struct kc_err *err)
{
	struct standby *sb = s->sb;
	struct kc_err why;
	uint32_t reason;
	int rc;

	rc = kc_get_end(rec, &reason, err);
	if (rc)
		return rc;
	if (reason == KC_END_GUEST_DIED) {
		kc_log(KC_LOG_WARN, "the primary says that its guest died");
		pthread_mutex_lock(&sb->lock);
		/* Not to what is not there, nor to what was left when it was once detached. */
		if (kc_check_epoch(sb, &why) == -ESTALE)
			kc_log(KC_LOG_ERROR, "%s", why.text);
		else if (!kc_ram_counts(sb->ram))
			kc_log(KC_LOG_ERROR, "there is no complete epoch of it to go on from");
		else if (sb->mode == SERVING)
			sb->guest_died = true;
		kc_wake();
		pthread_mutex_unlock(&sb->lock);
		return 0;
	}
	if (reason == KC_END_SWITCH_OVER) {
		s->switches = true;
		return 0;
	}
	kc_log(KC_LOG_INFO, "the primary ends the protection: %s",
	       reason == KC_END_GUEST_SHUTDOWN ? "its guest shut down" : "detached");
	kc_status_phase(sb->status, "ended");
	return kc_ram_set_flags(sb->ram, kc_ram_flags(sb->ram) | KC_RAM_ENDED, err);
}

/* Why there are no epochs, although the primary lives */
static void noted(struct standby *sb, const struct kc_rec *rec)
{
	char text[KC_NOTE_MAX + 1];

	kc_get_note(rec, text, sizeof(text));
	kc_log(KC_LOG_INFO, "the primary says: %s", *text ? text : "there are epochs again");
	kc_status_phase(sb->status, *text ? "receiving, but no epochs for now" : "receiving");
}

/* That it ends; who is not told has to take care that nobody takes over from a guest that lives. */
static void agree(struct session *s, enum kc_end end)
{
	uint8_t rec[KC_REC_HDR + 4];
	size_t n = kc_put_end(rec, end);

	if (!kc_io_write(s->io, rec, n, NULL) && !kc_io_flush(s->io, NULL))
		kc_io_linger(s->io, 2000);
}

/* Until the connection ends: 0 if the primary ended it as it should. */
static int receive(struct session *s, struct kc_rx *rx, struct kc_err *err)
{
	struct standby *sb = s->sb;
	uint64_t offset = kc_io_offset(s->io), t;
	unsigned int limit_ms = sb->opts.io_timeout_ms + 4 * heartbeat_ms(sb);
	struct kc_rec rec;
	int rc;

	kc_status_phase(sb->status, "receiving");
	for (;;) {
		rc = kc_io_record(s->io, limit_ms, &rec, err);
		if (rc)
			return rc;
		s->busy = true;
		t = rec.type == KC_COMMIT ? kc_now_us() : 0;
		rc = kc_rx_record(rx, &rec, err);
		switch (rc) {
		case KC_COMMIT:
			rc = acknowledge(s, rx, t, &offset, err);
			kc_ready_wait(sb);
			break;
		case KC_HEARTBEAT:
			rc = kc_get_heartbeat(&rec, &t, err);
			if (!rc)
				heartbeat(s, t);
			break;
		case KC_NOTE:
			noted(sb, &rec);
			rc = 0;
			break;
		case KC_UNHELD:
			rc = unheld(sb, err);
			break;
		case KC_DIGEST_REQ:
			if (rec.payload)
				rc = answer_digests(s, &rec, err);
			break;
		case KC_END:
			rc = ended(s, &rec, err);
			if (!rc && !s->switches)
				agree(s, KC_END_DETACH);
			s->busy = false;
			return rc;
		}
		s->busy = false;
		if (rc)
			return rc;
	}
}

/*
 * The primary's guest is stopped, and all of it is here: the main thread lets it run.  Called with
 * the lock, and without touching the RAM any more.  0 or a negative errno.
 */
static int switch_over(struct session *s, struct kc_err *err)
{
	struct standby *sb = s->sb;

	if (sb->mode != SERVING || !kc_ram_epoch(sb->ram) ||
	    (kc_ram_flags(sb->ram) & KC_RAM_ENDED))
		return kc_fail(err, EBUSY, "there is no epoch to go on from, or it is done already");
	sb->mode = FAILING_OVER;
	sb->switches = true;
	kc_wake();
	while (sb->mode == FAILING_OVER) {
		kc_standby_wait(sb, heartbeat_ms(sb));
		pthread_mutex_unlock(&sb->lock);
		heartbeat(s, 0);
		pthread_mutex_lock(&sb->lock);
	}
	return sb->mode == TAKEN_OVER ? 0 :
	       kc_fail(err, EREMOTEIO, "it cannot go on with the guest: %s", sb->why_not.text);
}

void *kc_session_run(void *arg)
{
	struct session *s = arg, **p;
	struct standby *sb = s->sb;
	struct kc_err err = { "" };
	struct kc_hello hello;
	bool active = false;
	struct kc_rx *rx = NULL;
	struct kc_rec rec;
	struct kc_io *io = NULL;
	int rc;

	rc = kc_io_accept(s->fd, &sb->opts, &io, &err);
	if (rc) {
		kc_session_refused(sb, "a connection", err.text);
		goto out;
	}
	s->io = io;
	rc = kc_io_record(io, sb->opts.connect_timeout_ms, &rec, &err);
	if (!rc)
		rc = kc_get_hello(&rec, &hello, &err);
	if (!rc) {
		pthread_mutex_lock(&sb->lock);
		s->is_primary = true;
		pthread_mutex_unlock(&sb->lock);
		memcpy(s->instance, hello.instance, sizeof(s->instance));
		rc = activate(s, &hello.guest, &err);
		active = !rc;
		s->busy = true;
		if (!rc)
			rc = greet(s, &hello, &err);
		s->busy = false;
		if (!rc) {
			rx = kc_rx_new(kc_ram_guest(sb->ram), &kc_ram_ops, sb->ram);
			if (!rx)
				rc = kc_fail(&err, ENOMEM, "out of memory");
		}
		kc_guest_free(&hello.guest);
		if (rc)
			kc_session_refused(sb, "a primary", err.text);
		else
			rc = receive(s, rx, &err);
		if (rc && active && rc != -EEXIST && rc != -ENODATA)
			kc_status_trouble(sb->status, err.text);
		if (rc && rx)
			kc_log(KC_LOG_WARN, "lost the primary: %s; last complete epoch %" PRIu64, err.text,
			       kc_ram_epoch(sb->ram));
	} else {
		kc_session_refused(sb, "a connection", err.text);
	}
	/* First let others have the RAM: to say goodbye may take a while. */
	kc_rx_free(rx);
	pthread_mutex_lock(&sb->lock);
	if (active) {
		if (rx && rc)
			kc_status_phase(sb->status, "waiting for the primary");
		kc_status_peer(sb->status, NULL);
		if (rx)
			sb->heard_us = kc_io_heard_us(io);
		sb->active = NULL;
		pthread_cond_broadcast(&sb->changed);
	}
	if (!rc && s->switches)
		rc = switch_over(s, &err);
	pthread_mutex_unlock(&sb->lock);
	if (!rc && s->switches)
		agree(s, KC_END_SWITCH_OVER);
	if (rc && rc != -ENODATA && rc != -ECONNRESET && rc != -ETIMEDOUT)
		send_error(io, -rc, err.text);
out:
	pthread_mutex_lock(&sb->lock);
	for (p = &sb->sessions; *p != s; p = &(*p)->next)
		;
	*p = s->next;
	if (io)
		kc_io_close(io);
	else
		close(s->fd);
	sb->nr_sessions--;
	pthread_cond_broadcast(&sb->changed);
	pthread_mutex_unlock(&sb->lock);
	free(s);
	return NULL;
}

void kc_session_stop_all(struct standby *sb, enum mode mode)
{
	struct session *s;

	pthread_mutex_lock(&sb->lock);
	sb->mode = mode;
	pthread_cond_broadcast(&sb->changed);
	for (s = sb->sessions; s; s = s->next) {
		/* One that waits for just this has something to say first. */
		if (mode != TAKEN_OVER || !s->switches)
			kc_session_kick(s);
	}
	while (sb->nr_sessions && !kc_standby_wait(sb, 10000))
		;
	pthread_mutex_unlock(&sb->lock);
}
