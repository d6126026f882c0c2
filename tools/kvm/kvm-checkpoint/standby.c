// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint standby: receives epochs, and goes on with the guest when the primary is gone.
 *
 * One thread for each connection.  Only the one that is "active" touches the RAM; the main thread
 * does so after it has seen to it that none is.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "launch.h"
#include "ram.h"
#include "status.h"

#define MAX_SESSIONS 16u
#define TICK_MS 50u
#define RETRY_MS 5000u

enum mode { SERVING, FAILING_OVER, TAKEN_OVER, STOPPING };

struct session {
	struct standby *sb;
	struct session *next;
	pthread_t thread;
	int fd;
	struct kc_io *io;
	uint8_t instance[16];
	/* Not waiting for the primary but at work for it. */
	atomic_bool busy;
};

struct standby {
	struct kc_sink_opts opts;
	const char *listen, *ram_dir, *control;
	bool durable;
	unsigned int timeout_ms, fence_timeout_ms, load_timeout_ms;
	char **fence;
	bool no_fence, bare;
	char **exec;
	char *capabilities[8];

	struct kc_ram *ram;
	struct kc_status *status;
	struct kc_sink_stats stats;

	pthread_mutex_t lock;
	pthread_cond_t changed;
	enum mode mode;
	struct session *sessions, *active;
	unsigned int nr_sessions;
	/* By whom failing over was asked for, if it was. */
	const char *promote;
	/* Not to be forgotten when failing over fails, but when a primary comes again. */
	bool guest_died;
	/* When an active session that is gone was heard last. */
	uint64_t heard_us;
};

/* --- A connection --------------------------------------------------------- */

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
static void kick(struct session *s)
{
	shutdown(s->fd, SHUT_RDWR);
}

static int wait_changed(struct standby *sb, unsigned int ms)
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

/* Become the active session, or say why not. */
static int activate(struct session *s, struct kc_err *err)
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
			kick(other);
			while (sb->active == other && !rc)
				rc = wait_changed(sb, 5000);
			if (rc || sb->active)
				rc = kc_fail(err, EBUSY, "another connection is at work");
		}
	}
	if (!rc && sb->mode == FAILING_OVER)
		rc = kc_fail(err, EBUSY, "the standby is failing over");
	if (!rc && sb->mode != SERVING)
		rc = kc_fail(err, ESHUTDOWN,
			     "the standby has taken over the guest at epoch %" PRIu64,
			     kc_ram_epoch(sb->ram));
	if (!rc)
		sb->active = s;
	pthread_mutex_unlock(&sb->lock);
	return rc;
}

/* Making RAM for a large guest takes its time: say that we live. */
static void still_there(void *ctx)
{
	struct session *s = ctx;
	uint8_t rec[KC_REC_HDR];

	kc_put_rec(rec, KC_HEARTBEAT, 0, 0);
	if (!kc_io_write(s->io, rec, sizeof(rec), NULL))
		kc_io_flush(s->io, NULL);
}

static int greet(struct session *s, const struct kc_hello *hello, struct kc_err *err)
{
	struct standby *sb = s->sb;
	struct kc_welcome w = { .version = KC_VERSION };
	uint8_t rec[KC_REC_HDR + 16];
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
	} else {
		kc_log(KC_LOG_INFO, "making %" PRIu64 " MiB of RAM in %s",
		       kc_guest_pages(&hello->guest) >> 8, sb->ram_dir);
		rc = kc_ram_create(sb->ram, &hello->guest, still_there, s, err);
		if (rc)
			return rc;
	}
	/* That protection had ended is forgotten with the next complete epoch, not before. */
	rc = kc_ram_settle(sb->ram, err);
	if (rc)
		return rc;
	kc_uuid_text(hello->guest.uuid, uuid);
	kc_status_guest(sb->status, hello->guest.name[0] ? hello->guest.name : uuid);
	kc_log(KC_LOG_INFO, "the primary of guest %s (%s) is connected; last complete epoch %" PRIu64, uuid,
	       hello->guest.name, kc_ram_epoch(sb->ram));
	w.timeout_ms = sb->timeout_ms;
	w.last_epoch = kc_ram_epoch(sb->ram);
	kc_put_welcome(rec, &w);
	pthread_mutex_lock(&sb->lock);
	sb->guest_died = false;
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
	return rc;
}

static int ended(struct session *s, const struct kc_rec *rec, struct kc_err *err)
{
	struct standby *sb = s->sb;
	uint32_t reason;
	int rc;

	rc = kc_get_end(rec, &reason, err);
	if (rc)
		return rc;
	if (reason == KC_END_GUEST_DIED) {
		kc_log(KC_LOG_WARN, "the primary says that its guest died");
		pthread_mutex_lock(&sb->lock);
		/* Not to what is not there, nor to what was left when it was once detached. */
		if (!kc_ram_epoch(sb->ram) || (kc_ram_flags(sb->ram) & KC_RAM_ENDED))
			kc_log(KC_LOG_ERROR, "there is no complete epoch of it to go on from");
		else if (sb->mode == SERVING)
			sb->guest_died = true;
		pthread_mutex_unlock(&sb->lock);
		return 0;
	}
	kc_log(KC_LOG_INFO, "the primary ends the protection: %s",
	       reason == KC_END_GUEST_SHUTDOWN ? "its guest shut down" : "detached");
	kc_status_phase(sb->status, "ended");
	return kc_ram_set_flags(sb->ram, kc_ram_flags(sb->ram) | KC_RAM_ENDED, err);
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
		t = kc_now_us();
		rc = kc_rx_record(rx, &rec, err);
		switch (rc) {
		case KC_COMMIT:
			rc = acknowledge(s, rx, t, &offset, err);
			break;
		case KC_HEARTBEAT:
			still_there(s);
			rc = 0;
			break;
		case KC_DIGEST_REQ:
			if (rec.payload)
				rc = answer_digests(s, &rec, err);
			break;
		case KC_END:
			rc = ended(s, &rec, err);
			s->busy = false;
			return rc;
		}
		s->busy = false;
		if (rc)
			return rc;
	}
}

static void *session(void *arg)
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
		kc_log(KC_LOG_WARN, "refused a connection: %s", err.text);
		goto out;
	}
	s->io = io;
	rc = kc_io_record(io, sb->opts.connect_timeout_ms, &rec, &err);
	if (!rc)
		rc = kc_get_hello(&rec, &hello, &err);
	if (!rc) {
		memcpy(s->instance, hello.instance, sizeof(s->instance));
		rc = activate(s, &err);
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
			kc_log(KC_LOG_WARN, "refused a primary: %s", err.text);
		else
			rc = receive(s, rx, &err);
		if (rc && rx)
			kc_log(KC_LOG_WARN, "lost the primary: %s; last complete epoch %" PRIu64, err.text,
			       kc_ram_epoch(sb->ram));
	} else {
		kc_log(KC_LOG_WARN, "refused a connection: %s", err.text);
	}
	/* First let others have the RAM: to say goodbye may take a while. */
	kc_rx_free(rx);
	pthread_mutex_lock(&sb->lock);
	if (active) {
		if (rx && rc)
			kc_status_phase(sb->status, "waiting for the primary");
		if (rx)
			sb->heard_us = kc_io_heard_us(io);
		sb->active = NULL;
		pthread_cond_broadcast(&sb->changed);
	}
	pthread_mutex_unlock(&sb->lock);
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

static void take_connection(struct standby *sb, int listener)
{
	struct session *s;
	int fd;

	fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
	if (fd < 0)
		return;
	s = calloc(1, sizeof(*s));
	pthread_mutex_lock(&sb->lock);
	if (!s || sb->nr_sessions >= MAX_SESSIONS) {
		kc_log(KC_LOG_WARN, "refused a connection: there are too many");
		goto refuse;
	}
	*s = (struct session){ .sb = sb, .fd = fd, .next = sb->sessions };
	if (pthread_create(&s->thread, NULL, session, s))
		goto refuse;
	pthread_detach(s->thread);
	sb->sessions = s;
	sb->nr_sessions++;
	pthread_mutex_unlock(&sb->lock);
	return;
refuse:
	pthread_mutex_unlock(&sb->lock);
	free(s);
	close(fd);
}

/* --- Failing over --------------------------------------------------------- */

static int taken_over(void *ctx, struct kc_err *err)
{
	struct standby *sb = ctx;

	return kc_ram_set_flags(sb->ram, kc_ram_flags(sb->ram) | KC_RAM_TAKEN_OVER, err);
}

/* As kc_launch() */
static int start_guest(struct standby *sb, pid_t *pid, struct kc_err *err)
{
	const struct kc_guest *g = kc_ram_guest(sb->ram);
	struct kc_launch l = {
		.argv = sb->exec, .bare = sb->bare, .capabilities = sb->capabilities, .guest = g,
		.state = kc_ram_state_path(sb->ram), .epoch = kc_ram_epoch(sb->ram),
		.stopped = kc_ram_flags(sb->ram) & KC_RAM_STOPPED,
		.timeout_ms = sb->load_timeout_ms, .committed = taken_over, .ctx = sb,
	};
	int qmp, rc = 0;
	uint32_t i;

	l.ram = calloc(g->nr_blocks + 1, sizeof(*l.ram));
	for (i = 0; l.ram && i < g->nr_blocks; i++) {
		l.ram[i] = kc_ram_block_path(sb->ram, i);
		if (!l.ram[i])
			rc = -ENOMEM;
	}
	if (!l.ram || !l.state || rc)
		rc = kc_fail(err, ENOMEM, "out of memory");
	else
		rc = kc_launch(&l, pid, &qmp, err);
	/* A command that could not be started has not touched the RAM. */
	if (rc < 0 && sb->bare && (kc_ram_flags(sb->ram) & KC_RAM_TAKEN_OVER))
		kc_ram_set_flags(sb->ram, kc_ram_flags(sb->ram) & ~KC_RAM_TAKEN_OVER, NULL);
	if (rc >= 0 && qmp >= 0)
		close(qmp);
	kc_free_argv(l.ram);
	free((char *)l.state);
	return rc;
}

/* 0 if the guest runs here now (*pid > 0) or its files are given away (*pid is 0). */
static int fail_over(struct standby *sb, const char *reason, pid_t *pid, struct kc_err *err)
{
	uint64_t t = kc_now_us();
	int rc = 0;

	*pid = 0;
	pthread_mutex_lock(&sb->lock);
	sb->mode = FAILING_OVER;
	sb->promote = NULL;
	if (sb->active)
		kick(sb->active);
	while (sb->active && !rc)
		rc = wait_changed(sb, 30000);
	pthread_mutex_unlock(&sb->lock);
	if (rc)
		return kc_fail(err, ETIMEDOUT, "the connection to the primary does not end");
	if (!kc_ram_epoch(sb->ram))
		return kc_fail(err, ENOENT, "there is no complete epoch to go on from");
	rc = kc_ram_settle(sb->ram, err);
	if (rc)
		return rc;
	kc_log(KC_LOG_WARN, "failing over to epoch %" PRIu64 ": %s", kc_ram_epoch(sb->ram), reason);
	kc_status_phase(sb->status, "failing over");
	if (sb->fence) {
		rc = kc_run_fence(sb->fence, sb->fence_timeout_ms, err);
		if (rc)
			return rc;
		kc_log(KC_LOG_INFO, "the fence says that the primary is dead");
	}
	rc = sb->exec ? start_guest(sb, pid, err) : taken_over(sb, err);
	if (rc < 0)
		return rc;
	if (rc)
		kc_log(KC_LOG_ERROR, "%s: see QEMU's other monitors what it needs", err->text);
	kc_log(KC_LOG_WARN, "taken over at epoch %" PRIu64 " after %.3f s%s", kc_ram_epoch(sb->ram),
	       (kc_now_us() - t) / 1e6, !sb->exec ? "" : rc ? ": the guest is here" :
	       kc_ram_flags(sb->ram) & KC_RAM_STOPPED ?
	       ": the guest is here, and stopped as it was when the epoch was taken" :
	       ": the guest runs here");
	kc_status_phase(sb->status, "taken over");
	return 0;
}

static void print_checkpoint(struct standby *sb)
{
	const struct kc_guest *g = kc_ram_guest(sb->ram);
	char *p;
	uint32_t i;

	printf("epoch %" PRIu64 "\n", kc_ram_epoch(sb->ram));
	for (i = 0; i < g->nr_blocks; i++) {
		p = kc_ram_block_path(sb->ram, i);
		printf("ram %s %" PRIu64 " %s\n", g->blocks[i].name, g->blocks[i].npages * KC_PAGE_SIZE,
		       p ? p : "");
		free(p);
	}
	p = kc_ram_state_path(sb->ram);
	printf("state %s\n", p ? p : "");
	free(p);
	if (kc_ram_flags(sb->ram) & KC_RAM_STOPPED)
		printf("stopped\n");
	fflush(stdout);
}

/* --- The main thread ------------------------------------------------------ */

static char *command(void *ctx, const char *line, bool *ok)
{
	struct standby *sb = ctx;
	const char *text;

	*ok = false;
	pthread_mutex_lock(&sb->lock);
	if (strcmp(line, "promote")) {
		text = "unknown command; there are: status, promote";
	} else if (sb->mode != SERVING) {
		text = "it is failing over or has done so";
	} else if (!kc_ram_epoch(sb->ram)) {
		text = "there is no complete epoch to go on from";
	} else {
		sb->promote = "told to";
		text = "failing over";
		*ok = true;
	}
	pthread_mutex_unlock(&sb->lock);
	return strdup(text);
}

/*
 * How long the primary has been silent.  In ticks of which none counts for more than it should be:
 * when this host was suspended or this process stopped, it is not the primary who was silent.
 */
struct silence {
	uint64_t last_us, heard_us;
	unsigned int ms;
};

static bool is_silent(struct standby *sb, struct silence *q)
{
	uint64_t now = kc_now_us(), heard;
	unsigned int gap = (now - q->last_us) / 1000;

	pthread_mutex_lock(&sb->lock);
	heard = sb->heard_us;
	if (sb->active && sb->active->io)
		heard = sb->active->busy ? now : kc_io_heard_us(sb->active->io);
	pthread_mutex_unlock(&sb->lock);
	q->last_us = now;
	if (heard > q->heard_us) {
		q->heard_us = heard;
		q->ms = 0;
	} else {
		q->ms += gap < 4 * TICK_MS ? gap : 4 * TICK_MS;
	}
	return sb->timeout_ms && q->ms > sb->timeout_ms && kc_ram_epoch(sb->ram) &&
	       !(kc_ram_flags(sb->ram) & KC_RAM_ENDED);
}

/* Stop all connections. */
static void stop(struct standby *sb, enum mode mode)
{
	struct session *s;

	pthread_mutex_lock(&sb->lock);
	sb->mode = mode;
	for (s = sb->sessions; s; s = s->next)
		kick(s);
	while (sb->nr_sessions && !wait_changed(sb, 10000))
		;
	pthread_mutex_unlock(&sb->lock);
}

/* After taking over: as long as QEMU lives. Its status. */
static int attend(struct standby *sb, pid_t pid, int signals)
{
	struct pollfd p = { .fd = signals, .events = POLLIN };
	struct signalfd_siginfo si;
	int status;

	for (;;) {
		if (waitpid(pid, &status, WNOHANG) == pid) {
			kc_status_phase(sb->status, "QEMU ended");
			kc_log(KC_LOG_INFO, "QEMU ended with %s %d",
			       WIFSIGNALED(status) ? "signal" : "status",
			       WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
			return WIFEXITED(status) && !WEXITSTATUS(status) ? 0 : 1;
		}
		if (poll(&p, 1, 1000) > 0 && read(signals, &si, sizeof(si)) == sizeof(si) &&
		    si.ssi_signo != SIGCHLD) {
			kc_log(KC_LOG_INFO, "leaving QEMU (process %d) alone", pid);
			return 0;
		}
	}
}

static int serve(struct standby *sb, int listener, int signals)
{
	struct pollfd p[2] = {
		{ .fd = listener, .events = POLLIN }, { .fd = signals, .events = POLLIN },
	};
	struct silence q = { .last_us = kc_now_us() };
	uint64_t not_before_us = 0;
	char reason[80];
	struct kc_err err;
	const char *why;
	pid_t pid;
	int rc;

	for (;;) {
		if (poll(p, 2, TICK_MS) < 0 && errno != EINTR)
			return 1;
		if (p[0].revents)
			take_connection(sb, listener);
		if (p[1].revents) {
			struct signalfd_siginfo si;

			if (read(signals, &si, sizeof(si)) == sizeof(si) &&
			    si.ssi_signo != SIGCHLD) {
				kc_log(KC_LOG_INFO, "stopped; last complete epoch %" PRIu64,
				       kc_ram_epoch(sb->ram));
				stop(sb, STOPPING);
				return 0;
			}
		}
		pthread_mutex_lock(&sb->lock);
		why = sb->promote;
		if (!why && sb->guest_died && kc_now_us() >= not_before_us)
			why = "the primary's guest died";
		pthread_mutex_unlock(&sb->lock);
		if (is_silent(sb, &q) && !why) {
			snprintf(reason, sizeof(reason), "the primary has been silent for %u ms",
				 q.ms);
			why = reason;
		}
		if (!why)
			continue;
		rc = fail_over(sb, why, &pid, &err);
		if (!rc) {
			stop(sb, TAKEN_OVER);
			close(listener);
			if (pid)
				return attend(sb, pid, signals);
			print_checkpoint(sb);
			return 0;
		}
		kc_log(KC_LOG_ERROR, "could not fail over: %s", err.text);
		if (kc_ram_flags(sb->ram) & KC_RAM_TAKEN_OVER) {
			stop(sb, TAKEN_OVER);
			return 1;
		}
		kc_log(KC_LOG_INFO, "waiting for the primary, and trying again if it stays silent");
		kc_status_phase(sb->status, "failing over failed");
		pthread_mutex_lock(&sb->lock);
		sb->mode = SERVING;
		pthread_mutex_unlock(&sb->lock);
		q = (struct silence){ .last_us = kc_now_us(), .heard_us = q.heard_us };
		not_before_us = kc_now_us() + RETRY_MS * 1000ull;
	}
}

static void usage(FILE *f)
{
	fprintf(f,
		"usage: kvm-checkpoint standby --listen HOST:PORT [OPTION]... [-- QEMU [ARG]...]\n"
		"\n"
		"Receives the epochs of a guest and, when its primary is gone, goes on with it in QEMU.\n"
		"\n"
		"  --listen HOST:PORT    where primaries connect to\n"
		"  --ram-dir DIR         where the guest's RAM and state are held, best in a tmpfs\n"
		"                        (default /dev/shm/kvm-checkpoint)\n"
		"  --durable             force each epoch to the disk of --ram-dir\n"
		"  --timeout TIME        fail over if the primary is silent for so long (default 5s,\n"
		"                        0: only when told to)\n"
		"  --fence COMMAND       must have succeeded before QEMU is started: it makes sure\n"
		"                        that the primary is dead\n"
		"  --no-fence            something else makes sure of that\n"
		"  --fence-timeout TIME  for that command (default 30s)\n"
		"  --exec COMMAND        QEMU's command in one argument, split at blanks, quotes as in\n"
		"                        a shell, but no shell; or as arguments after \"--\"\n"
		"  --bare-exec           add nothing to it: it loads {state} by itself\n"
		"  --capability NAME     migration capability to set before the state is loaded\n"
		"  --load-timeout TIME   for QEMU to have loaded the state (default 30s)\n"
		"  --control PATH        unix socket for status and promote\n"
		"  --psk-file FILE, --psk-identity NAME, --insecure, --io-timeout TIME\n"
		"                        as for protect\n"
		"  --json                messages as JSON\n"
		"\n"
		"In QEMU's command are replaced: {ramN} or {ram:NAME} by the path of a block of RAM,\n"
		"{sizeN} by its size, {state} by that of the device state, {epoch} by its number.\n"
		"Without a command, prints these and ends.\n");
}

static int parse(struct standby *sb, int argc, char **argv)
{
	static const struct option options[] = {
		{ "listen", 1, NULL, 'l' },
		{ "ram-dir", 1, NULL, 'r' },
		{ "durable", 0, NULL, 'd' },
		{ "timeout", 1, NULL, 't' },
		{ "fence", 1, NULL, 'f' },
		{ "no-fence", 0, NULL, 'F' },
		{ "fence-timeout", 1, NULL, 'T' },
		{ "exec", 1, NULL, 'e' },
		{ "bare-exec", 0, NULL, 'b' },
		{ "capability", 1, NULL, 'C' },
		{ "load-timeout", 1, NULL, 'L' },
		{ "control", 1, NULL, 'c' },
		{ "json", 0, NULL, 'j' },
		{ "psk-file", 1, NULL, 'S' },
		{ "psk-identity", 1, NULL, 'S' },
		{ "insecure", 0, NULL, 'S' },
		{ "io-timeout", 1, NULL, 'S' },
		{ "help", 0, NULL, 'h' },
		{ NULL, 0, NULL, 0 }
	};
	const char *fence = NULL, *exec = NULL;
	unsigned int nr_caps = 0;
	struct kc_launch l = { 0 };
	struct kc_err err;
	int o, i, index, rc;

	while ((o = getopt_long(argc, argv, "+h", options, &index)) != -1) {
		bool ok = true;

		switch (o) {
		case 'l':
			sb->listen = optarg;
			break;
		case 'r':
			sb->ram_dir = optarg;
			break;
		case 'd':
			sb->durable = true;
			break;
		case 't':
			ok = !kc_parse_ms(optarg, &sb->timeout_ms);
			break;
		case 'f':
			fence = optarg;
			break;
		case 'F':
			sb->no_fence = true;
			break;
		case 'T':
			ok = !kc_parse_ms(optarg, &sb->fence_timeout_ms) && sb->fence_timeout_ms;
			break;
		case 'e':
			exec = optarg;
			break;
		case 'b':
			sb->bare = true;
			break;
		case 'C':
			ok = nr_caps < 7;
			if (ok)
				sb->capabilities[nr_caps++] = optarg;
			break;
		case 'L':
			ok = !kc_parse_ms(optarg, &sb->load_timeout_ms) && sb->load_timeout_ms;
			break;
		case 'c':
			sb->control = optarg;
			break;
		case 'j':
			kc_log_json = true;
			break;
		case 'S':
			rc = kc_sink_parse_option(&sb->opts, options[index].name, optarg, &err);
			if (rc < 0) {
				kc_log(KC_LOG_ERROR, "%s", err.text);
				return 2;
			}
			break;
		case 'h':
			usage(stdout);
			return 0;
		default:
			fprintf(stderr, "try: kvm-checkpoint standby --help\n");
			return 2;
		}
		if (!ok) {
			kc_log(KC_LOG_ERROR, "--%s does not take %s", options[index].name, optarg);
			return 2;
		}
	}
	if (!sb->listen) {
		kc_log(KC_LOG_ERROR, "--listen HOST:PORT is missing; try: kvm-checkpoint standby --help");
		return 2;
	}
	if (!fence == !sb->no_fence) {
		kc_log(KC_LOG_ERROR, "give --fence COMMAND, which makes sure that the primary is dead before the guest runs here as well, or --no-fence if something else does");
		return 2;
	}
	if (fence) {
		sb->fence = kc_split(fence);
		if (!sb->fence) {
			kc_log(KC_LOG_ERROR, "--fence does not take %s: is a quote missing?", fence);
			return 2;
		}
	}
	if (exec && optind < argc) {
		kc_log(KC_LOG_ERROR, "give QEMU's command by --exec or after \"--\", not both");
		return 2;
	}
	if (exec) {
		sb->exec = kc_split(exec);
		if (!sb->exec) {
			kc_log(KC_LOG_ERROR, "--exec does not take %s: is a quote missing?", exec);
			return 2;
		}
	} else if (optind < argc) {
		sb->exec = calloc(argc - optind + 1, sizeof(char *));
		for (i = optind; sb->exec && i < argc; i++)
			sb->exec[i - optind] = strdup(argv[i]);
	}
	l.argv = sb->exec;
	if (sb->exec && kc_launch_check(&l, &err)) {
		kc_log(KC_LOG_ERROR, "%s", err.text);
		return 2;
	}
	return -1;
}

int cmd_standby(int argc, char **argv)
{
	struct standby sb = {
		.ram_dir = "/dev/shm/kvm-checkpoint", .timeout_ms = 5000, .fence_timeout_ms = 30000,
		.load_timeout_ms = 30000, .lock = PTHREAD_MUTEX_INITIALIZER,
	};
	const struct kc_guest *g;
	pthread_condattr_t attr;
	struct kc_ctl *ctl = NULL;
	struct sigaction sa;
	struct kc_err err = { "" };
	int listener, signals, rc;
	sigset_t set;

	kc_sink_defaults(&sb.opts);
	rc = parse(&sb, argc, argv);
	if (rc >= 0)
		goto out_args;
	rc = 1;
	kc_log_may_lose = true;
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&sb.changed, &attr);
	/* Before the first thread, so that all of them leave signals to signalfd. */
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	/* Which signalfd would tell of under nohup, too. */
	if (!sigaction(SIGHUP, NULL, &sa) && sa.sa_handler != SIG_IGN)
		sigaddset(&set, SIGHUP);
	sigaddset(&set, SIGCHLD);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	signals = signalfd(-1, &set, SFD_CLOEXEC);

	sb.status = kc_status_new("standby", "");
	if (signals < 0 || !sb.status || kc_ram_open(sb.ram_dir, sb.durable, &sb.ram, &err)) {
		kc_log(KC_LOG_ERROR, "%s", err.text[0] ? err.text : "out of memory");
		goto out;
	}
	g = kc_ram_guest(sb.ram);
	if (kc_ram_flags(sb.ram) & KC_RAM_TAKEN_OVER) {
		kc_log(KC_LOG_ERROR, "the guest in %s was taken over, its files are no checkpoint any more: when it needs them no more, remove %s",
		       sb.ram_dir, sb.ram_dir);
		goto out;
	}
	sb.heard_us = kc_now_us();
	listener = kc_io_listen(sb.listen, &sb.opts, &err);
	if (listener < 0) {
		kc_log(KC_LOG_ERROR, "%s", err.text);
		goto out;
	}
	kc_status_phase(sb.status, "waiting for the primary");
	if (g)
		kc_status_guest(sb.status, g->name);
	if (kc_ram_epoch(sb.ram)) {
		sb.stats.epoch_sent = sb.stats.epoch_acked = kc_ram_epoch(sb.ram);
		kc_status_epoch(sb.status, kc_ram_epoch(sb.ram), kc_now_us());
		kc_status_sink(sb.status, &sb.stats);
	}
	if (sb.control) {
		ctl = kc_ctl_start(sb.control, sb.status, command, &sb, &err);
		if (!ctl) {
			kc_log(KC_LOG_ERROR, "%s", err.text);
			close(listener);
			goto out;
		}
	}
	kc_log(KC_LOG_INFO, "listening on %s%s; last complete epoch %" PRIu64, sb.listen,
	       sb.opts.insecure ? " without encryption" : "", kc_ram_epoch(sb.ram));
	rc = serve(&sb, listener, signals);
	kc_ctl_stop(ctl);
	/* A connection that does not end keeps what it uses; the process ends now anyway. */
	if (sb.nr_sessions)
		exit(rc);
out:
	kc_ram_close(sb.ram);
	kc_status_free(sb.status);
out_args:
	kc_free_argv(sb.fence);
	kc_free_argv(sb.exec);
	return rc;
}
