// SPDX-License-Identifier: GPL-2.0-only
/*
 * This program as the standby's QEMU: --be-qemu STATUS PID-FILE ARG...
 *
 * Whatever it is told, it says that it did it, and that the guest's status is STATUS once it was
 * told to run it; "silent": nothing any more, then.  It cannot load a state if PID-FILE.refuse
 * exists, for the reason that is in there, and takes for ever if PID-FILE.slow does, or to start
 * if PID-FILE.mute does.  Each start, each handshake and each state loaded is a line in
 * PID-FILE.log, with the memory that it has; who was started last is in PID-FILE.started.
 */
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <json-c/json.h>

#include "harness.h"
#include "stream_tests.h"

struct self {
	const char *status, *pid_file;
	bool is_private, runs;
	int fd, state;
};

static void note(const struct self *q, const char *what)
{
	char path[PATH_MAX], line[200];
	int fd, n;

	snprintf(path, sizeof(path), "%s.log", q->pid_file);
	n = snprintf(line, sizeof(line), "%s %s\n", what, q->is_private ? "private" : "shared");
	fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
	if (write(fd, line, n) != n)
		exit(1);
	close(fd);
}

static void load(const struct self *q)
{
	char path[PATH_MAX], buf[65536];
	FILE *f;

	note(q, "take");
	snprintf(path, sizeof(path), "%s.slow", q->pid_file);
	while (exists(path))
		poll(NULL, 0, 10);
	snprintf(path, sizeof(path), "%s.refuse", q->pid_file);
	f = fopen(path, "r");
	while (f && fgets(buf, sizeof(buf), f))
		fprintf(stderr, "qemu: %s", buf);
	if (f)
		exit(1);
	while (read(q->state, buf, sizeof(buf)) > 0)
		;
	note(q, "load");
}

static void obey(struct self *q, const char *command)
{
	char pid[20];

	if (!strcmp(command, "migrate-incoming"))
		load(q);
	if (!strcmp(command, "cont")) {
		snprintf(pid, sizeof(pid), "%d", getpid());
		write_text(q->pid_file, 0600, pid);
		q->runs = true;
	}
	if (q->runs && !strcmp(q->status, "silent"))
		for (;;)
			pause();
	if (!strcmp(command, "query-status"))
		dprintf(q->fd, "{\"return\": {\"status\": \"%s\"}}\n", q->runs ? q->status : "paused");
	else
		dprintf(q->fd, "{\"return\": {}}\n");
	/* Who started it has heard that it works, even if it is killed now */
	if (!strcmp(command, "qmp_capabilities"))
		note(q, "greet");
}

static void hear(struct self *q)
{
	struct json_tokener *tok = json_tokener_new();
	union {
		char buf[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	char buf[4096];

	for (;;) {
		struct iovec iov = { buf, sizeof(buf) };
		struct msghdr msg = {
			.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf,
			.msg_controllen = sizeof(control.buf),
		};
		ssize_t n = recvmsg(q->fd, &msg, 0), at;
		struct json_object *o, *command;

		if (n <= 0)
			return;
		if (CMSG_FIRSTHDR(&msg))
			memcpy(&q->state, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(int));
		for (at = 0; at < n; at += json_tokener_get_parse_end(tok)) {
			o = json_tokener_parse_ex(tok, buf + at, n - at);
			if (!o)
				break;
			if (json_object_object_get_ex(o, "execute", &command))
				obey(q, json_object_get_string(command));
			json_object_put(o);
		}
	}
}

int be_qemu(int argc, char **argv)
{
	const char *prefix = "socket,id=kvm-checkpoint,fd=";
	struct self q = { .status = argv[2], .pid_file = argv[3], .fd = -1, .state = -1 };
	char path[PATH_MAX], text[20];
	int i;

	/* If the test forgets it. */
	alarm(60);
	for (i = 4; i < argc; i++) {
		if (!strncmp(argv[i], prefix, strlen(prefix)))
			q.fd = atoi(argv[i] + strlen(prefix));
		q.is_private |= !!strstr(argv[i], "share=off");
	}
	snprintf(path, sizeof(path), "%s.started", q.pid_file);
	snprintf(text, sizeof(text), "%d", getpid());
	write_text(path, 0600, text);
	note(&q, "start");
	snprintf(path, sizeof(path), "%s.mute", q.pid_file);
	while (exists(path))
		poll(NULL, 0, 10);
	dprintf(q.fd, "{\"QMP\": {}}\n");
	hear(&q);
	/* It does not end when its monitor is gone. */
	for (;;)
		pause();
}
