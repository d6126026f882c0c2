// SPDX-License-Identifier: GPL-2.0-only
/*
 * Starting programs and ending them.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>

#include "process.h"

/*
 * PR_SET_PDEATHSIG will not do: only the child itself could take it back when it is to live on.  In
 * a fork of a process with threads, so nothing but system calls.
 */
static void watch(int end, int pidfd)
{
	sigset_t all;
	ssize_t n;
	char byte;

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	prctl(PR_SET_NAME, "kc-guard");
	/* The files of the daemon are not ours to keep open, or locked */
	end = fcntl(end, F_DUPFD, 10);
	pidfd = fcntl(pidfd, F_DUPFD, 10);
	dup2(end, 0);
	dup2(pidfd, 1);
	syscall(SYS_close_range, 2, ~0U, 0);
	do
		n = read(0, &byte, 1);
	while (n < 0 && errno == EINTR);
	if (n <= 0)
		syscall(SYS_pidfd_send_signal, 1, SIGKILL, NULL, 0);
	_exit(0);
}

static int start_guard(pid_t pid, struct kc_err *err)
{
	int p[2], pidfd = syscall(SYS_pidfd_open, pid, 0), e = errno;
	pid_t child;

	if (pidfd < 0)
		return kc_fail(err, e, "cannot watch over a process: %s", strerror(e));
	if (pipe2(p, O_CLOEXEC)) {
		e = errno;
		close(pidfd);
		return kc_fail(err, e, "cannot make a pipe: %s", strerror(e));
	}
	child = fork();
	if (!child) {
		close(p[1]);
		/* Nobody of ours has to wait for it, and what ends us does not reach it */
		if (setsid() < 0 || fork())
			_exit(0);
		watch(p[0], pidfd);
	}
	e = errno;
	close(p[0]);
	close(pidfd);
	if (child < 0) {
		close(p[1]);
		return kc_fail(err, e, "cannot watch over a process: %s", strerror(e));
	}
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
	return p[1];
}

void kc_guard_release(int guard)
{
	if (guard < 0)
		return;
	if (write(guard, "", 1) != 1)
		kc_log(KC_LOG_WARN, "cannot tell who watches over QEMU: %s", strerror(errno));
	close(guard);
}

/* In the child; @keep stays open, @errors is its stderr, and @out says what failed. */
static void child(char **argv, int keep, int errors, int go, int out)
{
	sigset_t none;
	char byte;
	int e;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	/* Nobody would end it */
	if (go >= 0 && read(go, &byte, 1) != 1)
		_exit(127);
	signal(SIGPIPE, SIG_DFL);
	kc_core_as_before();
	if (keep >= 0)
		fcntl(keep, F_SETFD, 0);
	if (errors >= 0)
		dup2(errors, STDERR_FILENO);
	execvp(argv[0], argv);
	e = errno;
	if (write(out, &e, sizeof(e)) != sizeof(e))
		_exit(126);
	_exit(127);
}

int kc_start(char **argv, int keep, int errors, enum place place, int *guard, pid_t *pid,
	     struct kc_err *err)
{
	int p[2], go[2] = { -1, -1 }, e = 0, rc = 0;
	ssize_t n;

	if (pipe2(p, O_CLOEXEC))
		return kc_fail(err, errno, "cannot make a pipe: %s", strerror(errno));
	if (guard && pipe2(go, O_CLOEXEC)) {
		rc = kc_fail(err, errno, "cannot make a pipe: %s", strerror(errno));
		close(p[0]);
		close(p[1]);
		return rc;
	}
	*pid = fork();
	if (!*pid) {
		if (guard)
			close(go[1]);
		if (place == OWN_SESSION)
			setsid();
		else if (place == OWN_GROUP)
			setpgid(0, 0);
		child(argv, keep, errors, go[0], p[1]);
	}
	if (*pid < 0)
		e = errno;
	close(p[1]);
	if (guard) {
		close(go[0]);
		*guard = *pid > 0 ? start_guard(*pid, err) : -1;
		if (*pid > 0 && *guard < 0)
			rc = *guard;
		else if (*pid > 0 && write(go[1], "", 1) != 1)
			rc = kc_fail(err, errno, "cannot start %s: %s", argv[0], strerror(errno));
		/* Without that byte it ends by itself */
		close(go[1]);
	}
	if (*pid > 0) {
		if (place == OWN_GROUP)
			setpgid(*pid, *pid);
		do
			n = read(p[0], &e, sizeof(e));
		while (n < 0 && errno == EINTR);
		if (n != sizeof(e))
			e = 0;
		if (e || rc)
			waitpid(*pid, NULL, 0);
	}
	close(p[0]);
	if ((e || rc) && guard && *guard >= 0)
		close(*guard);
	if (rc)
		return rc;
	if (e)
		return kc_fail(err, e, "cannot start %s: %s", argv[0], strerror(e));
	return 0;
}

void kc_kill_child(pid_t pid)
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

	rc = kc_start(argv, -1, -1, OWN_GROUP, NULL, &pid, err);
	if (rc)
		return rc;
	while (!(got = waitpid(pid, &status, WNOHANG))) {
		if (kc_now_us() > end) {
			kc_kill_child(pid);
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

void kc_process_id(pid_t pid, uint8_t id[16])
{
	static const char boot_path[] = "/proc/sys/kernel/random/boot_id";
	char path[64], text[1200] = "", stat[1024] = "", *p;
	XXH128_hash_t h;
	unsigned int i;
	int fd;

	memset(id, 0, 16);
	fd = open(boot_path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || read(fd, text, 36) != 36) {
		if (fd >= 0)
			close(fd);
		return;
	}
	close(fd);
	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (read(fd, stat, sizeof(stat) - 1) < 0)
		stat[0] = '\0';
	close(fd);
	/* Its name may have blanks and parentheses; what counts is when it was started: field 22 */
	p = strrchr(stat, ')');
	for (i = 2; p && i < 22; i++)
		p = strchr(p + 1, ' ');
	if (!p)
		return;
	snprintf(text + 36, sizeof(text) - 36, " %d %.30s", pid, p + 1);
	p = strchr(text + 37, ' ');
	p[1 + strcspn(p + 1, " ")] = '\0';
	h = XXH3_128bits(text, strlen(text));
	memcpy(id, &h, 16);
}
