// SPDX-License-Identifier: GPL-2.0-only
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "qmp.h"

#define IDLE_MS		50
#define MAX_LINE	(16u << 20)

int qmp_wait(struct qmp *q, int fd, short events, uint64_t until_us)
{
	for (;;) {
		struct pollfd p = { .fd = fd, .events = events };
		uint64_t now = kc_now_us(), ms;
		int rc;

		if (now >= until_us)
			return -ETIMEDOUT;
		ms = (until_us - now) / 1000 + 1;
		if (ms > IDLE_MS)
			ms = IDLE_MS;
		if (poll(&p, 1, ms) > 0)
			return 0;
		rc = q->idle ? q->idle(q->idle_ctx) : 0;
		if (rc)
			return rc;
	}
}

static int qemu_gone(struct kc_err *err)
{
	return kc_fail(err, EPIPE, "QEMU is gone");
}

static void job_event(struct qmp *q, const char *name, struct json_object *o)
{
	struct json_object *data;

	if (!json_object_object_get_ex(o, "data", &data) ||
	    strncmp(qmp_str(data, "device"), JOB_NAME, strlen(JOB_NAME)))
		return;
	if (!strcmp(name, "ERROR"))
		q->jobs_failed++;
	else if (strcmp(name, "READY") && strcmp(name, "PENDING"))
		q->jobs_ended++;
}

static void shutdown_event(struct qmp *q, struct json_object *o)
{
	struct json_object *data;
	const char *why = "";

	if (json_object_object_get_ex(o, "data", &data))
		why = qmp_str(data, "reason");
	snprintf(q->why_shutdown, sizeof(q->why_shutdown), "%s", why);
	q->shutdown = true;
}

static void event(struct qmp *q, struct json_object *o)
{
	if (!strncmp(qmp_str(o, "event"), "BLOCK_JOB_", 10))
		job_event(q, qmp_str(o, "event") + 10, o);
	if (!strcmp(qmp_str(o, "event"), "SHUTDOWN"))
		shutdown_event(q, o);
	else if (!strcmp(qmp_str(o, "event"), "RESUME"))
		q->shutdown = false;	/* -no-shutdown: it was reset, and runs */
}

/* Of kc_now_us(): when it is too late for an answer to what is asked now */
static uint64_t patience(const struct qmp *q)
{
	return q->timeout_ms ? kc_now_us() + q->timeout_ms * 1000ull : UINT64_MAX;
}

/*
 * The next object, or NULL with *rc set: -EAGAIN if there is none yet and there is no time to wait.
 */
static struct json_object *next(struct qmp *q, uint64_t until_us, int *rc)
{
	struct json_object *o;
	size_t done = 0;
	char *end;
	ssize_t n;

	for (;;) {
		end = q->len > done ? memchr(q->buf + done, '\n', q->len - done) : NULL;
		if (end) {
			json_tokener_reset(q->tok);
			o = json_tokener_parse_ex(q->tok, q->buf, end - q->buf);
			q->len -= end + 1 - q->buf;
			memmove(q->buf, end + 1, q->len);
			if (!json_object_is_type(o, json_type_object)) {
				json_object_put(o);
				o = NULL;
			}
			*rc = o ? 0 : -EPROTO;
			return o;
		}
		done = q->len;
		if (q->size - q->len < 4096) {
			size_t size = q->size * 2 + 65536;
			char *buf = size <= MAX_LINE ? realloc(q->buf, size) : NULL;

			if (!buf) {
				*rc = -EPROTO;
				return NULL;
			}
			q->buf = buf;
			q->size = size;
		}
		n = recv(q->fd, q->buf + q->len, q->size - q->len, MSG_DONTWAIT);
		if (n > 0) {
			q->len += n;
		} else if (n < 0 && errno == EINTR) {
			continue;
		} else if (n < 0 && errno == EAGAIN) {
			*rc = until_us ? qmp_wait(q, q->fd, POLLIN, until_us) : -EAGAIN;
			if (*rc)
				return NULL;
		} else {
			*rc = -EPIPE;
			return NULL;
		}
	}
}

static int explain(int rc, const char *command, struct kc_err *err)
{
	switch (rc) {
	case -EPIPE:
		return qemu_gone(err);
	case -ETIMEDOUT:
		return kc_fail(err, ETIMEDOUT, "QEMU does not answer to %s", command);
	case -ECANCELED:
		return kc_fail(err, ECANCELED, "QEMU has not answered to %s yet", command);
	default:
		return kc_fail(err, EPROTO, "what QEMU answers to %s is no QMP", command);
	}
}

/* Those that have come; 0, or why there are no more */
static int take_events(struct qmp *q)
{
	struct json_object *o;
	int rc;

	while ((o = next(q, 0, &rc))) {
		event(q, o);
		json_object_put(o);
	}
	return rc == -EAGAIN ? 0 : rc;
}

int qmp_send(struct qmp *q, const char *command, struct json_object *args, int fd,
	     struct kc_err *err)
{
	struct json_object *o = json_object_new_object();
	uint64_t until = patience(q);
	union {
		char buf[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = { 0 };
	size_t len, sent = 0;
	const char *text;
	int rc = 0;

	q->asked_us = kc_now_us();
	json_object_object_add(o, "execute", json_object_new_string(command));
	if (args)
		json_object_object_add(o, "arguments", args);
	text = json_object_to_json_string_length(o, JSON_C_TO_STRING_PLAIN, &len);

	while (sent < len && !rc) {
		struct iovec iov = { (char *)text + sent, len - sent };
		struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
		ssize_t n;

		if (fd >= 0 && !sent) {
			struct cmsghdr *c;

			msg.msg_control = control.buf;
			msg.msg_controllen = sizeof(control.buf);
			c = CMSG_FIRSTHDR(&msg);
			c->cmsg_level = SOL_SOCKET;
			c->cmsg_type = SCM_RIGHTS;
			c->cmsg_len = CMSG_LEN(sizeof(int));
			memcpy(CMSG_DATA(c), &fd, sizeof(int));
		}
		n = sendmsg(q->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n >= 0)
			sent += n;
		else if (errno == EAGAIN)
			rc = qmp_wait(q, q->fd, POLLOUT, until);
		else if (errno != EINTR)
			rc = -EPIPE;
	}
	json_object_put(o);
	/* What it said before it went, such as that the guest was shut down */
	if (rc == -EPIPE)
		take_events(q);
	return rc ? explain(rc, command, err) : 0;
}

int qmp_receive(struct qmp *q, const char *command, struct json_object **ret, struct kc_err *err)
{
	uint64_t until = patience(q);
	struct json_object *o, *member;
	int rc;

	q->asked_us = kc_now_us();
	for (;;) {
		o = q->answer ? q->answer : next(q, until, &rc);
		q->answer = NULL;
		if (!o)
			return explain(rc, command, err);
		q->asked_us = kc_now_us();
		if (json_object_object_get_ex(o, "return", &member)) {
			q->asked_us = 0;
			if (ret)
				*ret = json_object_get(member);
			json_object_put(o);
			return 0;
		}
		if (json_object_object_get_ex(o, "error", &member)) {
			q->asked_us = 0;
			rc = kc_fail(err, EREMOTEIO, "QEMU refuses %s: %s", command,
				     qmp_str(member, "desc"));
			json_object_put(o);
			return rc;
		}
		event(q, o);
		json_object_put(o);
	}
}

bool qmp_answered(struct qmp *q)
{
	struct json_object *o;
	int rc = -EAGAIN;

	while (!q->answer && (o = next(q, 0, &rc))) {
		if (json_object_object_get_ex(o, "return", NULL) ||
		    json_object_object_get_ex(o, "error", NULL)) {
			q->answer = o;
			break;
		}
		event(q, o);
		json_object_put(o);
	}
	return q->answer || rc != -EAGAIN;
}

int qmp_call(struct qmp *q, const char *command, struct json_object *args,
	     struct json_object **ret, struct kc_err *err)
{
	int rc = qmp_send(q, command, args, -1, err);

	return rc ? rc : qmp_receive(q, command, ret, err);
}

int qmp_poll(struct qmp *q, struct kc_err *err)
{
	int rc = take_events(q);

	return rc ? explain(rc, "nothing", err) : 0;
}

/* Where the queue is full of clients that have given up, connect() would wait for ever */
static int connect_to(struct qmp *q, const struct sockaddr_un *sun)
{
	uint64_t until = patience(q);

	while (connect(q->fd, (const struct sockaddr *)sun, sizeof(*sun))) {
		if (errno != EAGAIN && errno != EINTR)
			return -errno;
		if (kc_now_us() >= until)
			return -ETIMEDOUT;
		poll(NULL, 0, IDLE_MS);
		if (q->idle && q->idle(q->idle_ctx))
			return -ECANCELED;
	}
	return 0;
}

/* QEMU speaks first */
static int greet(struct qmp *q)
{
	struct json_object *o;
	int rc;

	q->tok = json_tokener_new();
	o = next(q, patience(q), &rc);
	if (o && !json_object_object_get_ex(o, "QMP", NULL))
		rc = -EPROTO;
	json_object_put(o);
	return rc;
}

int qmp_adopt(struct qmp *q, int fd, unsigned int timeout_ms, int (*idle)(void *ctx),
	      void *idle_ctx, struct kc_err *err)
{
	int rc;

	*q = (struct qmp){ .fd = fd, .timeout_ms = timeout_ms, .idle = idle, .idle_ctx = idle_ctx };
	rc = greet(q);
	rc = rc ? explain(rc, "being started", err) :
	     qmp_call(q, "qmp_capabilities", NULL, NULL, err);
	if (rc)
		qmp_close(q);
	return rc;
}

int qmp_open(struct qmp *q, const char *path, unsigned int timeout_ms, int (*idle)(void *ctx),
	     void *idle_ctx, struct kc_err *err)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	int rc;

	memset(q, 0, sizeof(*q));
	q->fd = -1;
	q->timeout_ms = timeout_ms;
	q->idle = idle;
	q->idle_ctx = idle_ctx;
	if (!strncmp(path, "unix:", 5))
		path += 5;
	if (strlen(path) >= sizeof(sun.sun_path))
		return kc_fail(err, EINVAL, "%s: too long for a socket", path);
	memcpy(sun.sun_path, path, strlen(path) + 1);

	q->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (q->fd < 0)
		return kc_fail(err, errno, "socket: %s", strerror(errno));
	rc = connect_to(q, &sun);
	if (rc && rc != -ETIMEDOUT) {
		kc_fail(err, -rc, "cannot connect to QEMU at %s: %s", path, strerror(-rc));
		goto fail;
	}
	if (!rc)
		rc = greet(q);
	if (rc == -ETIMEDOUT) {
		rc = kc_fail(err, ETIMEDOUT,
			     "QEMU at %s does not answer: is another client connected?  Give it a socket of its own (-qmp unix:PATH,server=on,wait=off)",
			     path);
		goto fail;
	}
	/* One that ends may take a client as long as it has not closed everything */
	if (rc == -EPIPE) {
		rc = qemu_gone(err);
		goto fail;
	}
	if (rc) {
		rc = kc_fail(err, EPROTO, "%s is not a QMP socket", path);
		goto fail;
	}
	rc = qmp_call(q, "qmp_capabilities", NULL, NULL, err);
	if (rc)
		goto fail;
	return 0;
fail:
	qmp_close(q);
	return rc;
}

void qmp_close(struct qmp *q)
{
	if (q->fd >= 0)
		close(q->fd);
	if (q->tok)
		json_tokener_free(q->tok);
	json_object_put(q->answer);
	free(q->buf);
	q->fd = -1;
	q->tok = NULL;
	q->answer = NULL;
	q->buf = NULL;
}

uint64_t qmp_u64(struct json_object *o, const char *name)
{
	struct json_object *m;

	return json_object_object_get_ex(o, name, &m) ? json_object_get_uint64(m) : 0;
}

bool qmp_bool(struct json_object *o, const char *name)
{
	struct json_object *m;

	return json_object_object_get_ex(o, name, &m) && json_object_get_boolean(m);
}

const char *qmp_str(struct json_object *o, const char *name)
{
	struct json_object *m;
	const char *s = NULL;

	if (json_object_object_get_ex(o, name, &m))
		s = json_object_get_string(m);
	return s ? s : "";
}
