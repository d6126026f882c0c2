/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the test programs share: tests that run in processes and directories of their own, and the
 * daemons that they start.
 *
 * One thread.  What is said below of a test's directory and process holds within a test.
 */
#ifndef KC_TESTS_HARNESS_H
#define KC_TESTS_HARNESS_H

#include <inttypes.h>
#include <limits.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/types.h>

#include "util.h"

/* --- Failing and skipping ------------------------------------------------- */

extern jmp_buf out;
extern char reason[1024];

/* Ends a test: 1 if it failed, 2 if it is skipped. */
__attribute__((format(printf, 2, 3), noreturn))
void leave(int how, const char *fmt, ...);

#define FAIL(...) leave(1, __VA_ARGS__)
#define SKIP(...) leave(2, __VA_ARGS__)
#define CHECK(c, ...) do { if (!(c)) FAIL(__VA_ARGS__); } while (0)
/* A call that returns 0 or a negative errno with the reason in err. */
#define OK(call) do { \
	int rc_ = (call); \
	CHECK(!rc_, "%s:%d: %s: %d: %s", __func__, __LINE__, #call, rc_, err.text); \
} while (0)

extern struct kc_err err;

/* --- What a test has ------------------------------------------------------ */

/* kvm-checkpoint, and what more programs the command line names, and the test's directory */
extern const char *program, *programs[4], *dir;

/* All that is random follows from the seed. */
extern uint64_t seed, rng_state;

uint64_t rnd(uint64_t *state);
unsigned int below(unsigned int n);

/* A path in the directory; there are eight of them at a time. */
char *path_of(const char *name);
void remove_tree(const char *path);
void write_text(const char *path, mode_t mode, const char *text);
void read_all(const char *path, uint8_t **buf, size_t *len);
bool exists(const char *path);
bool wait_for(const char *path, unsigned int ms);
/* A script as fence or QEMU. */
const char *script(const char *name, const char *text);

/* --- Processes ------------------------------------------------------------ */

extern char psk[PATH_MAX];	/* the standby's keys */
extern pid_t standby;
extern int port;		/* it listens to */

/* "tcp:127.0.0.1:port" */
const char *spec(void);

/* Appends arguments up to NULL, which it appends as well. */
void add_args(const char **argv, int n, va_list ap);

/* Output goes to the log in the directory of the tests; files no larger than fsize, 0: any. */
pid_t spawn(const char *const *argv, rlim_t fsize);
bool log_has(const char *text);
void wait_log(const char *text);

/* A standby with an empty log. */
void start_standby_fsize(const char *ram_dir, rlim_t fsize, ...);
#define start_standby(ram_dir, ...) start_standby_fsize(ram_dir, 0, ##__VA_ARGS__, NULL)
void stop_standby(int sig);

/* The epoch in the directory of a standby that is dead. */
uint64_t ram_epoch(const char *path);

/* SIGSTOP to a child; when this returns, none of its threads goes on any more. */
void freeze(pid_t pid);
bool is_asleep(pid_t pid);

/* Its exit status, or minus the signal. */
int reap(pid_t *pid);

/* The exit status of the program with these arguments. */
int run(const char *first, ...);

/* --- Running them --------------------------------------------------------- */

struct test {
	const char *name;
	void (*run)(void);
};

/**
 * struct suite - what a test program consists of
 * @tests: its tests.
 * @nr_tests: how many.
 * @setup: called in each test before it runs, or NULL.
 * @usage: which programs it needs on the command line, the first is kvm-checkpoint.
 * @nr_programs: how many these are.
 * @jobs: so many tests run at a time; more than one if most of their time they wait.
 */
struct suite {
	const struct test *tests;
	size_t nr_tests;
	void (*setup)(void);
	const char *usage;
	unsigned int nr_programs, jobs;
};

/**
 * run_tests() - the main() of a test program
 *
 * All tests, or those of -t NAME..., without those of -T NAME...
 *
 * Return: the exit status: 0, 1 if a test failed, 2 for a mistake in the command line.
 */
int run_tests(const struct suite *suite, int argc, char **argv);

#endif
