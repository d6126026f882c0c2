/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KTAP_H
#define KTAP_H

/* Test cases as processes of their own: one that crashes or hangs fails alone. */

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { KTAP_PASS = 0, KTAP_FAIL = 1, KTAP_SKIP = 4 };

#define CASE_SECONDS	60

/* In a case: say why and end it. */
#define CHECK(cond, ...) do {						\
	if (!(cond)) {							\
		printf("# line %d: %s: ", __LINE__, #cond);		\
		printf(__VA_ARGS__);					\
		printf("\n");						\
		fflush(stdout);						\
		_exit(KTAP_FAIL);					\
	}								\
} while (0)

#define CHECK_EQ(a, b) do {						\
	long long a_ = (a), b_ = (b);					\
	CHECK(a_ == b_, "%s is %lld, not %lld", #a, a_, b_);		\
} while (0)

struct ktap {
	int nr, failed;
};

/* Shared by a case and its parent: why it was skipped.  The program has it. */
extern char *ktap_why;

#define KTAP_WHY_SIZE	200

static inline void ktap_skip(const char *why)
{
	snprintf(ktap_why, KTAP_WHY_SIZE, "%s", why);
	fflush(stdout);
	_exit(KTAP_SKIP);
}

static inline void ktap_verdict(struct ktap *ktap, int status, const char *name, const char *why)
{
	ktap->nr++;
	if (status == KTAP_SKIP) {
		printf("ok %d %s # SKIP %s\n", ktap->nr, name, why);
	} else if (status == KTAP_PASS) {
		printf("ok %d %s\n", ktap->nr, name);
	} else {
		printf("not ok %d %s\n", ktap->nr, name);
		ktap->failed++;
	}
	fflush(stdout);
}

static inline void ktap_run(struct ktap *ktap, const char *name, void (*fn)(const void *),
			    const void *arg)
{
	struct timespec t0, t1;
	int status;
	pid_t pid;

	if (!ktap_why)
		ktap_why = mmap(NULL, KTAP_WHY_SIZE, PROT_READ | PROT_WRITE,
				MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	printf("# RUN %s\n", name);
	fflush(stdout);
	clock_gettime(CLOCK_MONOTONIC, &t0);
	pid = fork();
	if (!pid) {
		alarm(CASE_SECONDS);
		fn(arg);
		fflush(stdout);
		_exit(KTAP_PASS);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		status = KTAP_FAIL << 8;
	if (WIFSIGNALED(status)) {
		printf("# killed by signal %d (%s)\n", WTERMSIG(status),
		       WTERMSIG(status) == SIGALRM ? "it hung" : "it crashed");
		status = KTAP_FAIL << 8;
	}
	clock_gettime(CLOCK_MONOTONIC, &t1);
	printf("# took %ld ms\n", (t1.tv_sec - t0.tv_sec) * 1000L +
	       (t1.tv_nsec - t0.tv_nsec) / 1000000L);
	ktap_verdict(ktap, WEXITSTATUS(status), name, ktap_why);
}

#endif
