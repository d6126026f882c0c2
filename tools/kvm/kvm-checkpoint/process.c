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
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>

#include "process.h"

/* In the child; @keep stays open, @errors is its stderr, and @out says what failed. */
static void child(char **argv, int keep, int errors, int out)
{
	sigset_t none;
	int e;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
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

int kc_start(char **argv, int keep, int errors, enum place place, pid_t *pid,
	     struct kc_err *err)
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
		child(argv, keep, errors, p[1]);
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

	rc = kc_start(argv, -1, -1, OWN_GROUP, &pid, err);
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
