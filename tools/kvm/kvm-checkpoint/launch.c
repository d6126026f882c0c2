// SPDX-License-Identifier: GPL-2.0-only
/*
 * QEMU on top of a checkpoint.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <json-c/json.h>

#include "launch.h"
#include "process.h"

/* Just enough of it to load a state: a line out, lines in until the answer. */
struct qmp {
	int fd;
	uint64_t end;
	char *buf;
	size_t len;
};

#define QMP_MAX (1u << 20)

/* The next object; NULL if none comes in time. */
static struct json_object *qmp_read(struct qmp *q, struct kc_err *err)
{
	struct json_object *o;
	struct pollfd p = { .fd = q->fd, .events = POLLIN };
	uint64_t now;
	char *nl;
	ssize_t n;

	for (;;) {
		nl = memchr(q->buf, '\n', q->len);
		if (nl) {
			*nl = '\0';
			o = json_tokener_parse(q->buf);
			q->len -= nl + 1 - q->buf;
			memmove(q->buf, nl + 1, q->len);
			if (!o)
				kc_fail(err, EPROTO, "QEMU's monitor does not speak QMP");
			return o;
		}
		now = kc_now_us();
		if (now >= q->end || poll(&p, 1, (q->end - now + 999) / 1000) <= 0) {
			if (now < q->end)
				continue;
			kc_fail(err, ETIMEDOUT, "QEMU's monitor does not answer in time");
			return NULL;
		}
		n = q->len < QMP_MAX ? recv(q->fd, q->buf + q->len, QMP_MAX - q->len, 0) : -1;
		if (n <= 0) {
			kc_fail(err, EPIPE, "QEMU ended, or closed its monitor");
			return NULL;
		}
		q->len += n;
	}
}

static int qmp_send(struct qmp *q, const char *line, int fd, struct kc_err *err)
{
	union {
		char buf[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} u;
	struct iovec iov = { .iov_base = (void *)line, .iov_len = strlen(line) };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (fd >= 0) {
		m.msg_control = u.buf;
		m.msg_controllen = sizeof(u.buf);
		CMSG_FIRSTHDR(&m)->cmsg_level = SOL_SOCKET;
		CMSG_FIRSTHDR(&m)->cmsg_type = SCM_RIGHTS;
		CMSG_FIRSTHDR(&m)->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(CMSG_FIRSTHDR(&m)), &fd, sizeof(fd));
	}
	/* Lines are short and the socket's buffer is not. */
	if (sendmsg(q->fd, &m, MSG_NOSIGNAL) != (ssize_t)iov.iov_len)
		return kc_fail(err, EPIPE, "QEMU ended, or closed its monitor");
	return 0;
}

/* Run a command; its "return" to *ret, if that is wanted. */
static int qmp_run(struct qmp *q, const char *line, int fd, struct json_object **ret,
		   struct kc_err *err)
{
	struct json_object *o, *v, *desc;
	int rc;

	rc = qmp_send(q, line, fd, err);
	while (!rc) {
		o = qmp_read(q, err);
		if (!o)
			return -EPIPE;
		if (json_object_object_get_ex(o, "return", &v)) {
			if (ret)
				*ret = json_object_get(v);
			json_object_put(o);
			return 0;
		}
		if (json_object_object_get_ex(o, "error", &v)) {
			json_object_object_get_ex(v, "desc", &desc);
			rc = kc_fail(err, EREMOTEIO, "QEMU: %s", json_object_get_string(desc));
		}
		json_object_put(o);	/* an event, or the greeting */
	}
	return rc;
}

static int set_capabilities(struct qmp *q, char **caps, struct kc_err *err)
{
	struct json_object *cmd, *args, *list, *cap;
	char *line;
	int rc;

	if (!caps || !*caps)
		return 0;
	list = json_object_new_array();
	for (; *caps; caps++) {
		cap = json_object_new_object();
		json_object_object_add(cap, "capability", json_object_new_string(*caps));
		json_object_object_add(cap, "state", json_object_new_boolean(true));
		json_object_array_add(list, cap);
	}
	args = json_object_new_object();
	json_object_object_add(args, "capabilities", list);
	cmd = json_object_new_object();
	json_object_object_add(cmd, "execute", json_object_new_string("migrate-set-capabilities"));
	json_object_object_add(cmd, "arguments", args);
	rc = asprintf(&line, "%s\n", json_object_to_json_string_ext(cmd, JSON_C_TO_STRING_PLAIN));
	json_object_put(cmd);
	if (rc < 0)
		return kc_fail(err, ENOMEM, "out of memory");
	rc = qmp_run(q, line, -1, NULL, err);
	free(line);
	return rc;
}

static int status_is(struct qmp *q, const char *status, bool *is, struct kc_err *err)
{
	struct json_object *ret, *v;
	int rc;

	rc = qmp_run(q, "{\"execute\":\"query-status\"}\n", -1, &ret, err);
	if (rc)
		return rc;
	*is = json_object_object_get_ex(ret, "status", &v) &&
	      !strcmp(json_object_get_string(v), status);
	json_object_put(ret);
	return 0;
}

static const char qmp_getfd[] =
	"{\"execute\":\"getfd\",\"arguments\":{\"fdname\":\"kvm-checkpoint\"}}\n";
static const char qmp_incoming[] =
	"{\"execute\":\"migrate-incoming\",\"arguments\":{\"uri\":\"fd:kvm-checkpoint\"}}\n";

static int load(const struct kc_launch *l, struct qmp *q, struct kc_err *err)
{
	bool is = true;
	int fd, rc;

	fd = open(l->state, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return kc_fail(err, errno, "cannot open %s: %s", l->state, strerror(errno));
	rc = qmp_run(q, "{\"execute\":\"qmp_capabilities\"}\n", -1, NULL, err);
	if (!rc)
		rc = set_capabilities(q, l->capabilities, err);
	if (!rc)
		rc = qmp_run(q, qmp_getfd, fd, NULL, err);
	if (!rc)
		rc = qmp_run(q, qmp_incoming, -1, NULL, err);
	close(fd);
	while (!rc) {
		rc = status_is(q, "inmigrate", &is, err);
		if (rc || !is)
			break;
		if (kc_now_us() > q->end)
			return kc_fail(err, ETIMEDOUT, "QEMU did not load the state in time");
		poll(NULL, 0, 2);
	}
	/* Until here the guest has not run, because of -S, and the RAM is as it was. */
	if (!rc && l->committed)
		rc = l->committed(l->ctx, err);
	if (rc || l->stopped)
		return rc;
	q->end = kc_now_us() + l->timeout_ms * 1000ull;
	rc = qmp_run(q, "{\"execute\":\"cont\"}\n", -1, NULL, err);
	if (!rc)
		rc = status_is(q, "running", &is, err);
	if (!rc && !is)
		rc = kc_fail(err, EIO, "its status is not \"running\"");
	if (!rc)
		return 0;
	kc_fail(err, -rc, "QEMU loaded the state, but the guest does not run: %s", err->text);
	/* There is no other copy of it any more, and what keeps it, as its disk, may be mended. */
	return l->committed ? 1 : rc;
}

int kc_launch(const struct kc_launch *l, pid_t *pid, int *qmp, struct kc_err *err)
{
	struct qmp q = { .fd = -1, .end = kc_now_us() + l->timeout_ms * 1000ull };
	int n, rc = 0, sv[2] = { -1, -1 };
	char **argv, **a;

	for (n = 0; l->argv[n]; n++)
		;
	argv = calloc(n + 9, sizeof(*argv));
	if (!argv)
		return kc_fail(err, ENOMEM, "out of memory");
	for (a = argv, n = 0; l->argv[n] && !rc; n++) {
		*a = kc_expand(l, l->argv[n], err);
		if (!*a++)
			rc = -EINVAL;
	}
	if (!rc && !l->bare) {
		if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv)) {
			rc = kc_fail(err, errno, "cannot make a socket: %s", strerror(errno));
		} else {
			*a++ = strdup("-S");
			*a++ = strdup("-incoming");
			*a++ = strdup("defer");
			*a++ = strdup("-chardev");
			if (asprintf(a++, "socket,id=kvm-checkpoint,fd=%d", sv[1]) < 0)
				rc = kc_fail(err, ENOMEM, "out of memory");
			*a++ = strdup("-mon");
			*a++ = strdup("chardev=kvm-checkpoint,mode=control");
		}
	}
	if (!rc && l->bare && l->committed)
		rc = l->committed(l->ctx, err);
	if (!rc)
		rc = kc_start(argv, sv[1], l->committed ? OWN_SESSION : WITH_US, pid, err);
	if (sv[1] >= 0)
		close(sv[1]);
	kc_free_argv(argv);
	*qmp = sv[0];
	if (rc) {
		if (sv[0] >= 0)
			close(sv[0]);
		return rc;
	}
	if (l->bare)
		return 0;
	q.fd = sv[0];
	q.buf = malloc(QMP_MAX);
	rc = q.buf ? load(l, &q, err) : kc_fail(err, ENOMEM, "out of memory");
	free(q.buf);
	if (rc < 0) {
		close(sv[0]);
		kc_kill_child(*pid);
	}
	return rc;
}
