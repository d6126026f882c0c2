// SPDX-License-Identifier: GPL-2.0-only
/*
 * Starting programs: the fence, and QEMU on top of a checkpoint.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <json-c/json.h>

#include "launch.h"

/* --- Arguments ------------------------------------------------------------ */

void kc_free_argv(char **argv)
{
	char **a;

	for (a = argv; a && *a; a++)
		free(*a);
	free(argv);
}

char **kc_split(const char *s)
{
	/* No more arguments than characters. */
	char **argv = calloc(strlen(s) + 1, sizeof(*argv)), *word = malloc(strlen(s) + 1);
	size_t n = 0, len = 0;
	bool in_word = false;
	char quote = 0;

	if (!argv || !word)
		goto fail;
	for (;; s++) {
		if (*s && quote) {
			if (*s == quote)
				quote = 0;
			else if (*s == '\\' && quote == '"' && (s[1] == '"' || s[1] == '\\'))
				word[len++] = *++s;
			else
				word[len++] = *s;
			continue;
		}
		if (*s == '\'' || *s == '"') {
			quote = *s;
			in_word = true;
		} else if (*s == '\\' && s[1]) {
			word[len++] = *++s;
			in_word = true;
		} else if (*s && !strchr(" \t\n", *s)) {
			word[len++] = *s;
			in_word = true;
		} else {
			if (in_word) {
				argv[n] = strndup(word, len);
				if (!argv[n++])
					goto fail;
				len = 0;
				in_word = false;
			}
			if (!*s)
				break;
		}
	}
	if (quote || !n)
		goto fail;
	free(word);
	return argv;
fail:
	free(word);
	kc_free_argv(argv);
	return NULL;
}

/* What {name} stands for, into buf; false if there is none. */
static bool placeholder(const struct kc_launch *l, const char *name, size_t n, char *buf,
			size_t size)
{
	const char *v = NULL;
	unsigned long i = KC_MAX_BLOCKS;
	bool is_size = n > 4 && !strncmp(name, "size", 4);
	char *end;

	*buf = '\0';
	if (n == 5 && !strncmp(name, "state", n)) {
		v = l->state ? l->state : "";
	} else if (n == 5 && !strncmp(name, "epoch", n)) {
		snprintf(buf, size, "%" PRIu64, l->epoch);
		return true;
	} else if (n > 4 && !strncmp(name, "ram:", 4)) {
		if (!l->guest)
			return true;
		for (i = 0; i < l->guest->nr_blocks; i++) {
			if (strlen(l->guest->blocks[i].name) == n - 4 &&
			    !strncmp(l->guest->blocks[i].name, name + 4, n - 4))
				break;
		}
	} else if ((is_size || (n > 3 && !strncmp(name, "ram", 3))) &&
		   name[is_size ? 4 : 3] >= '0' && name[is_size ? 4 : 3] <= '9') {
		i = strtoul(name + (is_size ? 4 : 3), &end, 10);
		if (end != name + n)
			return false;
		if (!l->guest)
			return i < KC_MAX_BLOCKS;
	}
	if (l->guest && i < l->guest->nr_blocks) {
		if (is_size) {
			snprintf(buf, size, "%" PRIu64, l->guest->blocks[i].npages * KC_PAGE_SIZE);
			return true;
		}
		v = l->ram[i];
	}
	if (!v || strlen(v) >= size)
		return false;
	strcpy(buf, v);
	return true;
}

/* An argument with its placeholders replaced; malloc()ed. */
static char *expand(const struct kc_launch *l, const char *arg, struct kc_err *err)
{
	char value[4096], *out = NULL;
	const char *p, *close;
	size_t len;
	FILE *f = open_memstream(&out, &len);
	bool ok = f;

	for (p = arg; ok && *p; p++) {
		/* JSON has braces too: only a lower-case word in them is one of ours. */
		close = *p == '{' && p[1] >= 'a' && p[1] <= 'z' ? strchr(p, '}') : NULL;
		if (!close) {
			fputc(*p, f);
			continue;
		}
		ok = placeholder(l, p + 1, close - p - 1, value, sizeof(value));
		if (!ok)
			kc_fail(err, EINVAL,
				"\"%s\": there is no %.*s; known are {ramN}, {ram:NAME}, {sizeN}, {state} and {epoch}%s",
				arg, (int)(close - p + 1), p,
				l->guest ? ", of blocks that the guest has" : "");
		fputs(value, f);
		p = close;
	}
	if (f && fclose(f))
		ok = false;
	if (ok)
		return out;
	free(out);
	return NULL;
}

int kc_launch_check(const struct kc_launch *l, struct kc_err *err)
{
	char **a, *s;

	for (a = l->argv; *a; a++) {
		s = expand(l, *a, err);
		if (!s)
			return -EINVAL;
		free(s);
	}
	return 0;
}

/* --- Processes ------------------------------------------------------------ */

/* In the child; @keep stays open, and @out says what failed. */
static void child(char **argv, int keep, int out)
{
	sigset_t none;
	int e;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	kc_core_as_before();
	if (keep >= 0)
		fcntl(keep, F_SETFD, 0);
	execvp(argv[0], argv);
	e = errno;
	if (write(out, &e, sizeof(e)) != sizeof(e))
		_exit(126);
	_exit(127);
}

enum place {
	WITH_US,
	OWN_GROUP,	/* what it starts can be killed with it */
	OWN_SESSION,	/* and no terminal's Ctrl-C or end reaches it */
};

static int start(char **argv, int keep, enum place place, pid_t *pid, struct kc_err *err)
{
	int p[2], e = 0;
	ssize_t n;

	if (pipe2(p, O_CLOEXEC))
		return kc_fail(err, errno, "cannot make a pipe: %s", strerror(errno));
	*pid = fork();
	if (!*pid) {
		if (place == OWN_SESSION)
			setsid();
		else if (place == OWN_GROUP)
			setpgid(0, 0);
		child(argv, keep, p[1]);
	}
	if (*pid < 0)
		e = errno;
	close(p[1]);
	if (*pid > 0) {
		if (place == OWN_GROUP)
			setpgid(*pid, *pid);
		do
			n = read(p[0], &e, sizeof(e));
		while (n < 0 && errno == EINTR);
		if (n != sizeof(e))
			e = 0;
		else
			waitpid(*pid, NULL, 0);
	}
	close(p[0]);
	if (e)
		return kc_fail(err, e, "cannot start %s: %s", argv[0], strerror(e));
	return 0;
}

static void kill_child(pid_t pid)
{
	kill(-pid, SIGKILL);
	kill(pid, SIGKILL);
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
}

int kc_run_fence(char **argv, unsigned int timeout_ms, struct kc_err *err)
{
	uint64_t end = kc_now_us() + timeout_ms * 1000ull;
	int rc, status;
	pid_t pid, got;

	rc = start(argv, -1, OWN_GROUP, &pid, err);
	if (rc)
		return rc;
	while (!(got = waitpid(pid, &status, WNOHANG))) {
		if (kc_now_us() > end) {
			kill_child(pid);
			return kc_fail(err, ETIMEDOUT, "the fence %s did not end within %u ms",
				       argv[0], timeout_ms);
		}
		poll(NULL, 0, 10);
	}
	if (got < 0)
		return kc_fail(err, errno, "cannot wait for the fence: %s", strerror(errno));
	if (WIFSIGNALED(status))
		return kc_fail(err, EIO, "the fence %s died of signal %d", argv[0],
			       WTERMSIG(status));
	if (WEXITSTATUS(status))
		return kc_fail(err, EIO, "the fence %s failed with status %d", argv[0],
			       WEXITSTATUS(status));
	return 0;
}

/* --- QMP ------------------------------------------------------------------ */

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
		*a = expand(l, l->argv[n], err);
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
		rc = start(argv, sv[1], l->committed ? OWN_SESSION : WITH_US, pid, err);
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
		kill_child(*pid);
	}
	return rc;
}
