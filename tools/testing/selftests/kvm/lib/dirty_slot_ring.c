// SPDX-License-Identifier: GPL-2.0-only
/*
 * What tests of dirty slot rings share that has nothing to do with guests: how
 * they fail, and see dirty_slot_ring_util.h.
 */
#include <errno.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kvm_util.h"
#include "test_util.h"

#include "dirty_slot_ring.h"
#include "dirty_slot_ring_check.h"
#include "dirty_slot_ring_guest.h"
#include "dirty_slot_ring_util.h"

void (*check_report)(const char *what);

void check_failed(const char *file, int line, const char *what, int err, const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "# %s:%d: %s\n#   ", file, line, what);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "\n#   errno %d (%s)\n", err, strerror(err));
	if (check_report)
		check_report(what);
	_exit(KSFT_FAIL);
}

void sleep_ms(unsigned int ms)
{
	usleep(ms * 1000);
}

uint64_t now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000ull + ts.tv_nsec / 1000000;
}

void dither(int max)
{
	for (max = random() % max; max > 0; max--)
		guest_relax();
}

int poll_log(int fd, int timeout_ms)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };
	int ret = poll(&p, 1, timeout_ms);

	CHECK(ret >= 0, "poll gave %d", ret);
	return ret ? p.revents : 0;
}

int edge_open(int fd)
{
	struct epoll_event ev = { .events = EPOLLIN | EPOLLET };
	int ep = epoll_create1(0);

	CHECK_OK(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev));
	return ep;
}

void edge_wait(int ep)
{
	struct epoll_event ev;
	int ret;

	/* A signal is no event: who harvests for it hides one that is missing. */
	do {
		ret = epoll_wait(ep, &ev, 1, 4 * WAKE_UP_MS);
	} while (ret < 0 && errno == EINTR);
	CHECK(ret >= 0, "epoll_wait gave %d", ret);
}

static sigjmp_buf probe_env;

static void probe_handler(int sig)
{
	siglongjmp(probe_env, sig);
}

int probe(void *p, bool write)
{
	struct sigaction sa = { .sa_handler = probe_handler }, old[2];
	int sig;

	sigaction(SIGBUS, &sa, &old[0]);
	sigaction(SIGSEGV, &sa, &old[1]);
	sig = sigsetjmp(probe_env, 1);
	if (!sig) {
		if (write)
			WRITE_ONCE(*(uint64_t *)p, 0);
		else
			READ_ONCE(*(uint64_t *)p);
	}
	sigaction(SIGBUS, &old[0], NULL);
	sigaction(SIGSEGV, &old[1], NULL);
	return sig;
}

void child_check(pid_t pid)
{
	int status;

	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(WIFEXITED(status) && !WEXITSTATUS(status), "child ended with %#x", status);
}

void *alloc_guarded(size_t n)
{
	void *p = mmap(NULL, n * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED, "no memory");
	CHECK_OK(mprotect(p + (n - 1) * PG, PG, PROT_NONE));
	return p;
}

void send_fd(int sock, char tag, int fd)
{
	char buf[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { .iov_base = &tag, .iov_len = 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = buf, .msg_controllen = sizeof(buf),
	};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
	int n;

	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(cmsg), &fd, sizeof(int));
	do
		n = sendmsg(sock, &msg, 0);
	while (n < 0 && errno == EINTR);
	CHECK(n == 1, "sendmsg gave %d", n);
}

int recv_fd(int sock, char *tag, int flags)
{
	char buf[CMSG_SPACE(sizeof(int))] = { 0 }, unused;
	struct iovec iov = { .iov_base = tag ?: &unused, .iov_len = 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = buf, .msg_controllen = sizeof(buf),
	};
	struct cmsghdr *cmsg;
	int fd, n;

	do
		n = recvmsg(sock, &msg, flags | MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0 && errno == EAGAIN)
		return -1;
	CHECK(n == 1, "recvmsg gave %d", n);
	cmsg = CMSG_FIRSTHDR(&msg);
	CHECK(cmsg && cmsg->cmsg_type == SCM_RIGHTS, "no descriptor came");
	memcpy(&fd, CMSG_DATA(cmsg), sizeof(int));
	return fd;
}

int nr_signals;

static void count_signal(int sig)
{
	WRITE_ONCE(nr_signals, nr_signals + 1);
}

void signals_every_us(int us)
{
	struct sigaction sa = { .sa_handler = count_signal };
	struct itimerval it = {
		.it_interval = { .tv_usec = us },
		.it_value = { .tv_usec = us },
	};

	sigaction(SIGALRM, &sa, NULL);
	CHECK_OK(setitimer(ITIMER_REAL, &it, NULL));
}

uint64_t stat_of(int fd, const char *name)
{
	struct kvm_stats_header header;
	struct kvm_stats_desc *all, *desc;
	uint64_t value = 0;
	bool found = false;
	int i;

	read_stats_header(fd, &header);
	all = read_stats_descriptors(fd, &header);
	for (i = 0; i < header.num_desc && !found; i++) {
		desc = get_stats_descriptor(all, i, &header);
		if (strcmp(desc->name, name))
			continue;
		read_stat_data(fd, &header, desc, &value, 1);
		found = true;
	}
	CHECK(found, "no counter %s", name);
	free(all);
	return value;
}
