// SPDX-License-Identifier: GPL-2.0-only
/*
 * The control socket of a daemon, and who asks there.
 *
 * One thread serves all clients at once: one that says nothing, or does not take its answer, is in
 * nobody's way.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "status.h"
#include "wake.h"

/* One that does not read or write is not waited for long. */
#define CTL_TIMEOUT_MS 2000
/* Another one replaces the one that has been here the longest. */
#define MAX_CLIENTS 16

struct client {
	int fd;
	uint64_t end_us;	/* when it is given up */
	char line[256];
	size_t len;
	char *answer;		/* NULL: it has not asked yet */
	size_t answer_len, sent;
};

struct kc_ctl {
	char *path;
	int fd, stop;
	pthread_t thread;
	struct kc_status *st;
	char *(*command)(void *ctx, const char *line, bool *ok);
	void *ctx;
	struct client clients[MAX_CLIENTS];
	unsigned int nr_clients;
};

/* --- The daemon ----------------------------------------------------------- */

static void drop(struct kc_ctl *ctl, unsigned int i)
{
	struct client *c = &ctl->clients[i];

	close(c->fd);
	free(c->answer);
	*c = ctl->clients[--ctl->nr_clients];
}

static void take_client(struct kc_ctl *ctl, int fd)
{
	unsigned int i, oldest = 0;

	if (ctl->nr_clients == MAX_CLIENTS) {
		for (i = 1; i < MAX_CLIENTS; i++) {
			if (ctl->clients[i].end_us < ctl->clients[oldest].end_us)
				oldest = i;
		}
		drop(ctl, oldest);
	}
	ctl->clients[ctl->nr_clients++] = (struct client){
		.fd = fd, .end_us = kc_now_us() + CTL_TIMEOUT_MS * 1000ull,
	};
}

static void make_answer(struct kc_ctl *ctl, struct client *c)
{
	const char *line = c->line;
	char *text = NULL;
	bool ok = true;
	int n;

	if (!strcmp(line, "status")) {
		text = kc_status_print(ctl->st, KC_STATUS_TEXT);
	} else if (!strcmp(line, "status json")) {
		text = kc_status_print(ctl->st, KC_STATUS_JSON);
	} else if (!strcmp(line, "status prometheus")) {
		text = kc_status_print(ctl->st, KC_STATUS_PROMETHEUS);
	} else if (ctl->command) {
		text = ctl->command(ctl->ctx, line, &ok);
		kc_wake();
	} else {
		ok = false;
		text = strdup("unknown command");
	}
	n = asprintf(&c->answer, "%s\n%s%s", ok && text ? "ok" : "error", text ? text : "",
		     text && *text && text[strlen(text) - 1] != '\n' ? "\n" : "");
	if (n < 0)
		c->answer = NULL;
	c->answer_len = n < 0 ? 0 : n;
	free(text);
}

/* Read of it or write to it what can be; false if that was all. */
static bool serve_client(struct kc_ctl *ctl, struct client *c)
{
	ssize_t n;

	if (!c->answer) {
		n = recv(c->fd, c->line + c->len, sizeof(c->line) - 1 - c->len, MSG_DONTWAIT);
		if (n <= 0)
			return n < 0 && (errno == EAGAIN || errno == EINTR);
		c->len += n;
		c->line[c->len] = '\0';
		if (!strchr(c->line, '\n') && c->len < sizeof(c->line) - 1)
			return true;
		c->line[strcspn(c->line, "\n")] = '\0';
		make_answer(ctl, c);
		c->end_us = kc_now_us() + CTL_TIMEOUT_MS * 1000ull;
	}
	while (c->sent < c->answer_len) {
		n = send(c->fd, c->answer + c->sent, c->answer_len - c->sent,
			 MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n < 0)
			return errno == EAGAIN || errno == EINTR;
		c->sent += n;
	}
	return false;
}

static void *serve(void *arg)
{
	struct kc_ctl *ctl = arg;
	struct pollfd p[2 + MAX_CLIENTS];
	uint64_t now, next, full_until = 0;
	unsigned int i, n;
	int fd;

	for (;;) {
		now = kc_now_us();
		n = ctl->nr_clients;
		next = now < full_until ? full_until : UINT64_MAX;
		p[0] = (struct pollfd){ .fd = ctl->stop, .events = POLLIN };
		p[1] = (struct pollfd){ .fd = now < full_until ? -1 : ctl->fd, .events = POLLIN };
		for (i = 0; i < n; i++) {
			p[2 + i] = (struct pollfd){
				.fd = ctl->clients[i].fd,
				.events = ctl->clients[i].answer ? POLLOUT : POLLIN,
			};
			if (ctl->clients[i].end_us < next)
				next = ctl->clients[i].end_us;
		}
		if (poll(p, 2 + n, next == UINT64_MAX ? -1 :
			 next > now ? (int)((next - now + 999) / 1000) : 0) < 0)
			continue;
		if (p[0].revents)
			return NULL;
		now = kc_now_us();
		/* Backwards, as the last one takes the place of one that is dropped. */
		for (i = n; i-- > 0; ) {
			if (p[2 + i].revents ? !serve_client(ctl, &ctl->clients[i]) :
					       ctl->clients[i].end_us <= now)
				drop(ctl, i);
		}
		if (!p[1].revents)
			continue;
		fd = accept4(ctl->fd, NULL, NULL, SOCK_CLOEXEC);
		if (fd >= 0)
			take_client(ctl, fd);
		else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED)
			full_until = now + 1000000;	/* out of descriptors: do not spin */
	}
}

/* --- Both sides ----------------------------------------------------------- */

static int set_path(struct sockaddr_un *sa, const char *path, struct kc_err *err)
{
	memset(sa, 0, sizeof(*sa));
	sa->sun_family = AF_UNIX;
	if (strlen(path) >= sizeof(sa->sun_path))
		return kc_fail(err, ENAMETOOLONG, "%s is too long for a socket", path);
	strcpy(sa->sun_path, path);
	return 0;
}

/* False with errno ECONNREFUSED if a daemon did that was killed */
static bool somebody_listens(const struct sockaddr_un *sa)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	int e = 0;

	/* EAGAIN: somebody who is busy */
	if (fd < 0 || (connect(fd, (const struct sockaddr *)sa, sizeof(*sa)) && errno != EAGAIN))
		e = errno;
	if (fd >= 0)
		close(fd);
	errno = e;
	return !e;
}

struct kc_ctl *kc_ctl_start(const char *path, struct kc_status *st,
			    char *(*command)(void *ctx, const char *line, bool *ok), void *ctx,
			    struct kc_err *err)
{
	struct kc_ctl *ctl = calloc(1, sizeof(*ctl));
	struct sockaddr_un sa;
	struct stat sb;
	mode_t mask;
	int rc;

	if (!ctl) {
		kc_fail(err, ENOMEM, "out of memory");
		return NULL;
	}
	*ctl = (struct kc_ctl){ .fd = -1, .stop = -1, .st = st, .command = command, .ctx = ctx };
	rc = set_path(&sa, path, err);
	if (rc)
		goto fail;
	ctl->path = strdup(path);
	ctl->stop = eventfd(0, EFD_CLOEXEC);
	ctl->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (!ctl->path || ctl->stop < 0 || ctl->fd < 0) {
		rc = kc_fail(err, errno, "cannot make a socket: %s", strerror(errno));
		goto fail;
	}
	if (somebody_listens(&sa)) {
		free(ctl->path);
		ctl->path = NULL;
		rc = kc_fail(err, EADDRINUSE, "%s: another daemon listens there", path);
		goto fail;
	}
	/* Anything but a socket is left alone. */
	if (errno == ECONNREFUSED && !lstat(path, &sb) && S_ISSOCK(sb.st_mode))
		unlink(path);
	mask = umask(0177);
	rc = bind(ctl->fd, (struct sockaddr *)&sa, sizeof(sa)) ? -errno : 0;
	umask(mask);
	if (rc || listen(ctl->fd, 8)) {
		rc = rc ? rc : -errno;
		free(ctl->path);
		ctl->path = NULL;
		kc_fail(err, -rc, "cannot listen on %s: %s", path, strerror(-rc));
		goto fail;
	}
	kc_status_socket(st, path);
	rc = -pthread_create(&ctl->thread, NULL, serve, ctl);
	if (rc) {
		kc_fail(err, -rc, "cannot start a thread: %s", strerror(-rc));
		goto fail;
	}
	return ctl;
fail:
	if (ctl->path)
		unlink(ctl->path);
	free(ctl->path);
	if (ctl->fd >= 0)
		close(ctl->fd);
	if (ctl->stop >= 0)
		close(ctl->stop);
	free(ctl);
	errno = -rc;
	return NULL;
}

void kc_ctl_stop(struct kc_ctl *ctl)
{
	if (!ctl)
		return;
	eventfd_write(ctl->stop, 1);
	pthread_join(ctl->thread, NULL);
	while (ctl->nr_clients)
		drop(ctl, 0);
	unlink(ctl->path);
	free(ctl->path);
	close(ctl->fd);
	close(ctl->stop);
	free(ctl);
}

/* --- Who asks ------------------------------------------------------------- */

static void set_timeouts(int fd, unsigned int ms)
{
	struct timeval tv = { .tv_sec = ms / 1000, .tv_usec = ms % 1000 * 1000 };

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof(tv));
}

static int send_all(int fd, const char *p, size_t len)
{
	ssize_t n;

	for (; len; p += n, len -= n) {
		n = send(fd, p, len, MSG_NOSIGNAL);
		if (n <= 0)
			return -1;
	}
	return 0;
}

int kc_ctl_request(const char *path, const char *line, char **out, struct kc_err *err)
{
	char buf[4096], *text = NULL, *first;
	struct sockaddr_un sa;
	size_t len;
	ssize_t n;
	FILE *f;
	int fd, rc;

	rc = set_path(&sa, path, err);
	if (rc)
		return rc;
	fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd >= 0)
		set_timeouts(fd, 2 * CTL_TIMEOUT_MS);	/* connect() has one, too */
	if (fd < 0 || connect(fd, (struct sockaddr *)&sa, sizeof(sa))) {
		rc = errno == EAGAIN ?
		     kc_fail(err, ETIMEDOUT, "the daemon at %s does not answer", path) :
		     kc_fail(err, errno, "cannot reach a daemon at %s: %s", path, strerror(errno));
		if (fd >= 0)
			close(fd);
		return rc;
	}
	f = open_memstream(&text, &len);
	if (!f) {
		close(fd);
		return kc_fail(err, ENOMEM, "out of memory");
	}
	if (send_all(fd, line, strlen(line)) || send_all(fd, "\n", 1))
		n = -1;
	else
		while ((n = recv(fd, buf, sizeof(buf), 0)) > 0)
			fwrite(buf, 1, n, f);
	fclose(f);
	close(fd);
	first = text ? strchr(text, '\n') : NULL;
	if (n < 0 || !first) {
		free(text);
		return kc_fail(err, ETIMEDOUT, "the daemon at %s does not answer", path);
	}
	*first++ = '\0';
	if (strcmp(text, "ok")) {
		first[strcspn(first, "\n")] = '\0';
		kc_fail(err, EREMOTEIO, "%s", first);
		free(text);
		return -EREMOTEIO;
	}
	*out = strdup(first);
	free(text);
	return *out ? 0 : kc_fail(err, ENOMEM, "out of memory");
}
