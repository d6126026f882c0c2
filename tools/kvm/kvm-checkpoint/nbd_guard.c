// SPDX-License-Identifier: GPL-2.0-only
/*
 * A guest whose disks are mirrored to a process that is stopped would wait for it.
 *
 * QEMU waits for a reply as long as the connection lives, whatever reconnect-delay says, and its
 * yank command needs somebody who gives it.  So a small process has the server's connections as
 * well, and shuts them down when nothing is heard of the server for some time: for QEMU that is an
 * error of the mirror, which it has learnt to live with.  It needs nothing of QEMU for that.
 *
 * If the server dies this process ends at once, as it must not keep connections open.  It cannot
 * help if it is stopped as well, as by a freezer of their cgroup.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "nbd.h"

/* So often in a row nothing is heard: not by the clock alone, as both may have been stopped */
#define TIMES		4u

#define MAX_CONNS	(2 * NBD_MAX_DISKS)

static struct pollfd fds[1 + MAX_CONNS];
static unsigned int nr = 1;

/* What has come: 0 at the end of the server, else a positive number; a connection is added */
static ssize_t take_message(void)
{
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(int))];
	} control;
	char byte;
	struct iovec iov = { .iov_base = &byte, .iov_len = 1 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control,
			    .msg_controllen = sizeof(control) };
	struct cmsghdr *c;
	ssize_t n = recvmsg(fds[0].fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	int fd;

	if (n <= 0)
		return n < 0 && (errno == EAGAIN || errno == EINTR) ? -1 : 0;
	c = CMSG_FIRSTHDR(&m);
	if (!c || c->cmsg_type != SCM_RIGHTS || c->cmsg_len != CMSG_LEN(sizeof(int)))
		return n;
	memcpy(&fd, CMSG_DATA(c), sizeof(fd));
	if (nr < 1 + MAX_CONNS)
		fds[nr++] = (struct pollfd){ .fd = fd };
	else
		close(fd);
	return n;
}

static void drop(unsigned int i)
{
	close(fds[i].fd);
	fds[i] = fds[--nr];
}

static void cut(void)
{
	while (nr > 1) {
		shutdown(fds[nr - 1].fd, SHUT_RDWR);
		drop(nr - 1);
	}
}

static void watch(int end, unsigned int limit_ms)
{
	unsigned int tick_ms = limit_ms / TIMES + 1, silent = 0, i;
	uint64_t due = 0;
	sigset_t all;
	ssize_t n;

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	prctl(PR_SET_NAME, "kc-nbd-guard");
	/* Neither its terminal nor its pipes are ours to keep */
	dup2(end, 0);
	syscall(SYS_close_range, 1, ~0U, 0);
	fds[0] = (struct pollfd){ .fd = 0, .events = POLLIN };
	for (;;) {
		uint64_t now = kc_now_us();

		if (now >= due)
			due = now + tick_ms * 1000ull;
		/* When there is nothing to watch there is no hurry */
		poll(fds, nr, nr > 1 ? (int)((due - now + 999) / 1000) : -1);
		for (i = nr - 1; i; i--) {
			if (fds[i].revents)
				drop(i);
		}
		if (fds[0].revents) {
			while ((n = take_message()) > 0)
				;
			if (!n)
				_exit(0);
			silent = 0;
			due = 0;
		} else if (kc_now_us() >= due && ++silent >= TIMES) {
			cut();
			silent = 0;
		}
	}
}

int nbd_guard_start(unsigned int limit_ms, struct kc_err *err)
{
	int pair[2], e;
	pid_t child;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return kc_fail(err, errno, "cannot make a pair of sockets: %s", strerror(errno));
	child = fork();
	if (!child) {
		/* Nobody has to wait for it, and what stops us by our terminal does not reach it */
		if (setsid() < 0 || fork())
			_exit(0);
		close(pair[1]);
		watch(pair[0], limit_ms);
	}
	e = errno;
	close(pair[0]);
	if (child < 0) {
		close(pair[1]);
		return kc_fail(err, e, "cannot start a process: %s", strerror(e));
	}
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
	return pair[1];
}

void nbd_guard_tell(int guard, int fd)
{
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(int))];
	} control = { .room = "" };
	struct iovec iov = { .iov_base = "", .iov_len = 1 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1 };

	if (guard < 0)
		return;
	if (fd >= 0) {
		control.head = (struct cmsghdr){ .cmsg_len = CMSG_LEN(sizeof(int)),
						 .cmsg_level = SOL_SOCKET,
						 .cmsg_type = SCM_RIGHTS };
		memcpy(CMSG_DATA(&control.head), &fd, sizeof(fd));
		m.msg_control = &control;
		m.msg_controllen = sizeof(control);
	}
	/* One that is gone, or stopped itself, is of no use, and nothing else */
	sendmsg(guard, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
}
