// SPDX-License-Identifier: GPL-2.0-only
/*
 * A standby, and a writer of a directory, that dies before each of the steps in turn by which it
 * changes files, or in the midst of one that writes: nothing acknowledged is lost, and what is found
 * is of one epoch, memory, state and disk.
 *
 * The steps are system calls, and copies into mapped memory: stream_test is linked so that they come
 * by here (--wrap).
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ram.h"
#include "ram_internal.h"
#include "sim.h"
#include "store.h"
#include "stream_tests.h"

#define DIED 77

/* 0: nobody dies. */
static unsigned int die_at;
static _Atomic unsigned int steps;
static bool torn;

/* True if the step that writes is to be done in part, and be the last. */
static bool step(void)
{
	if (!die_at || ++steps != die_at)
		return false;
	if (torn)
		return true;
	_exit(DIED);
}

#define WRAPPED(ret, name, args, call, part) \
	ret __real_##name args; \
	ret __wrap_##name args; \
	ret __wrap_##name args \
	{ \
		if (step()) { \
			part; \
			_exit(DIED); \
		} \
		return __real_##name call; \
	}
#define NOTHING do { } while (0)
#define IGNORE(call) do { if (call) { } } while (0)

WRAPPED(ssize_t, write, (int fd, const void *buf, size_t n), (fd, buf, n),
	IGNORE(__real_write(fd, buf, n / 2) < 0))
WRAPPED(ssize_t, pwrite, (int fd, const void *buf, size_t n, off_t at), (fd, buf, n, at),
	IGNORE(__real_pwrite(fd, buf, n / 2, at) < 0))
WRAPPED(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to), NOTHING)
WRAPPED(int, renameat2, (int a, const char *from, int b, const char *to, unsigned int flags),
	(a, from, b, to, flags), NOTHING)
WRAPPED(int, unlinkat, (int d, const char *name, int flags), (d, name, flags), NOTHING)
WRAPPED(int, symlinkat, (const char *to, int d, const char *name), (to, d, name), NOTHING)
WRAPPED(int, ftruncate, (int fd, off_t size), (fd, size), NOTHING)
WRAPPED(int, fallocate, (int fd, int mode, off_t at, off_t n), (fd, mode, at, n),
	__real_fallocate(fd, mode, at, n / 2))
WRAPPED(int, posix_fallocate, (int fd, off_t at, off_t n), (fd, at, n), NOTHING)
WRAPPED(int, fsync, (int fd), (fd), NOTHING)
WRAPPED(int, fdatasync, (int fd), (fd), NOTHING)
WRAPPED(int, kc_ram_write_page,
	(struct kc_ram *ram, uint32_t block, uint64_t page, const void *from, struct kc_err *e),
	(ram, block, page, from, e),
	if (block < KC_DISK_BLOCK) memcpy(ram->map[block] + page * KC_PAGE_SIZE, from, 1000))

void (*before_open)(const char *name);

int __real_openat(int d, const char *name, int flags, ...);
int __wrap_openat(int d, const char *name, int flags, ...);
int __wrap_openat(int d, const char *name, int flags, ...)
{
	mode_t mode;
	va_list ap;

	va_start(ap, flags);
	mode = flags & O_CREAT ? va_arg(ap, mode_t) : 0;
	va_end(ap);
	if ((flags & O_CREAT) && step())
		_exit(DIED);
	if (before_open)
		before_open(name);
	return __real_openat(d, name, flags, mode);
}

/* --- A standby's files ---------------------------------------------------- */

#define EPOCHS 5

/* Which kind of trial there is of each epoch: none, all are good, one is not */
static enum { NONE, GOOD, BAD } trial;
static uint64_t untried;

static bool is_needed(void *ctx, const struct kc_devices *state)
{
	(void)ctx;
	(void)state;
	untried++;
	return true;
}

static int try(void *ctx, struct kc_err *e)
{
	(void)ctx;
	return trial == BAD && untried == 3 ? kc_fail(e, EINVAL, "QEMU does not like it") : 0;
}

static const struct kc_ram_trial trials = { .needed = is_needed, .run = try };

static struct kc_ram *open_ram(void)
{
	const char *image = path_of("image");
	struct kc_ram *ram;

	OK(kc_ram_open(path_of("ram"), true, &ram, &err));
	if (trial)
		kc_ram_set_trial(ram, &trials);
	OK(kc_ram_set_disks(ram, &image, 1, &err));
	if (kc_ram_guest(ram))
		OK(kc_ram_open_disks(ram, &err));
	else
		OK(kc_ram_create(ram, &guest, NULL, NULL, &err));
	return ram;
}

/* All epochs of the directory from @nr on; the last complete one in @acked. False if one is refused. */
static bool feed(struct kc_ram *ram, uint64_t nr, volatile uint64_t *acked)
{
	struct kc_rx *rx = kc_rx_new(kc_ram_guest(ram), &kc_ram_ops, ram);
	char file[64];
	struct kc_rec rec;
	struct kc_io *io;
	int rc = 0;

	for (; nr <= EPOCHS && rc >= 0; nr++) {
		snprintf(file, sizeof(file), "store/epoch-%020" PRIu64 ".kc", nr);
		io = kc_io_file(open(path_of(file), O_RDONLY | O_CLOEXEC), NULL, 0);
		/* HELLO is not for it. */
		OK(kc_io_record(io, 0, &rec, &err));
		while (rc >= 0 && !kc_io_record(io, 0, &rec, &err)) {
			rc = kc_rx_record(rx, &rec, &err);
			if (rc == KC_COMMIT)
				*acked = nr;
		}
		kc_io_close(io);
	}
	kc_rx_free(rx);
	return rc >= 0;
}

static void make_epochs(struct sim *g)
{
	struct kc_sink *s;
	unsigned int i;

	guest.nr_disks = 1;
	blocks[0].npages = 24;
	blocks[1].npages = 5;
	disks[0].npages = 12;
	sim_init(g);
	s = must_open(path_of("store"));
	for (i = 0; i < EPOCHS; i++) {
		sim_step(g);
		g->state_len = 3000 + i;
		OK(sim_send(g, s, i ? 0 : KC_EPOCH_FULL));
	}
	kc_sink_close(s);
}

/* What was found again is one epoch, and not older than what was acknowledged. */
static uint64_t check_ram(struct sim *g, uint64_t acked)
{
	struct kc_ram *ram;
	uint64_t nr;

	OK(kc_ram_open(path_of("ram"), true, &ram, &err));
	OK(kc_ram_settle(ram, &err));
	nr = kc_ram_epoch(ram);
	CHECK(nr >= acked, "step %u: epoch %" PRIu64 " was acknowledged, %" PRIu64 " is there",
	      die_at, acked, nr);
	if (nr) {
		sim_goto(g, nr);
		g->state_len = 3000 + nr - 1;
		compare_standby(g, path_of("ram"));
		compare_disk(g, path_of("image"));
	}
	kc_ram_close(ram);
	return nr;
}

/* In a child: its status; it dies at die_at, or has done all. */
static int standby_dies(volatile uint64_t *acked)
{
	pid_t pid = fork();
	struct kc_ram *ram;

	if (!pid) {
		kc_log_max = KC_LOG_ERROR;
		/* It is the child's to fail. */
		if (setjmp(out)) {
			fprintf(stderr, "%s\n", reason);
			_exit(1);
		}
		ram = open_ram();
		feed(ram, kc_ram_epoch(ram) + 1, acked);
		kc_ram_close(ram);
		_exit(0);
	}
	return reap(&pid);
}

static void standby_dies_everywhere(void)
{
	volatile uint64_t *acked = shared_numbers();
	unsigned int n, again = 0, epochs = 0;
	struct sim g;
	int status;

	make_epochs(&g);
	/* With trials there are twice as many: every other one. */
	for (n = 1 + (trial && below(2));; n += 1 + !!trial) {
		remove_tree(path_of("ram"));
		unlink(path_of("image"));
		*acked = 0;
		die_at = n;
		torn = below(2);
		status = standby_dies(acked);
		CHECK(status == 0 || status == DIED, "step %u: status %d", n, status);
		/* And when it finishes what it had begun, now and then */
		if (status && !below(3)) {
			die_at = 1 + below(12);
			again += standby_dies(acked) == DIED;
		}
		die_at = 0;
		epochs += check_ram(&g, *acked) != 0;
		if (!status)
			break;
		/* It goes on from there. */
		if (!below(5) && trial != BAD) {
			CHECK(!standby_dies(acked), "step %u: it does not go on", n);
			CHECK(check_ram(&g, *acked) == EPOCHS, "step %u: not all epochs", n);
		}
	}
	CHECK(*acked == (trial == BAD ? 2 : EPOCHS), "the last one was %" PRIu64, *acked);
	CHECK(n > 200, "only %u steps", n);
	printf("# %u steps, %u times died again, %u with an epoch\n", n - 1, again, epochs);
	sim_free(&g);
}

void test_crash_standby(void)
{
	standby_dies_everywhere();
}

void test_crash_standby_trial(void)
{
	trial = GOOD;
	standby_dies_everywhere();
}

void test_crash_standby_bad(void)
{
	trial = BAD;
	standby_dies_everywhere();
}

/* --- A directory ---------------------------------------------------------- */

#define STORE_EPOCHS 30

static int writer_dies(volatile uint64_t *acked)
{
	pid_t pid = fork();
	unsigned int i, flags;
	struct kc_sink *s;
	struct sim g;

	if (pid)
		return reap(&pid);
	kc_log_max = KC_LOG_ERROR;
	sim_init(&g);
	s = kc_sink_open(path_of("store"), &opts, &guest, &err);
	if (!s)
		_exit(1);
	if (kc_sink_last_epoch(s) < *acked)
		_exit(2);
	flags = kc_sink_start(s);
	sim_goto(&g, kc_sink_last_epoch(s));
	for (i = 0; i < STORE_EPOCHS; i++) {
		sim_step(&g);
		if (sim_send(&g, s, flags))
			_exit(3);
		*acked = g.epoch;
		flags = 0;
	}
	/* Waits for merging */
	kc_sink_close(s);
	_exit(0);
}

/* At each other step; returns how many there are */
static unsigned int die_in_directory(volatile uint64_t *acked, unsigned int *merged)
{
	struct kc_store st;
	unsigned int n;
	struct sim g;
	int status;

	sim_init(&g);
	for (n = 1 + below(2);; n += 2) {
		remove_tree(path_of("store"));
		*acked = 0;
		die_at = n;
		torn = below(2);
		status = writer_dies(acked);
		CHECK(status == 0 || status == DIED, "step %u: status %d", n, status);
		die_at = 0;
		if (!status)
			break;
		OK(kc_store_read(path_of("store"), &st, &err));
		CHECK(!*acked || (st.nr_files && st.files[st.nr_files - 1].nr >= *acked),
		      "step %u: epoch %" PRIu64 " was acknowledged, but is not there", n, *acked);
		if (st.nr_files) {
			restore_and_compare(path_of("store"), st.files[st.nr_files - 1].nr, &g);
			*merged += st.files[0].nr > 1;
		}
		kc_store_free(&st);
		/* Another one goes on with it. */
		if (!below(4))
			CHECK(!writer_dies(acked), "step %u: nobody goes on with it", n);
	}
	sim_free(&g);
	return n;
}

/*
 * Merging goes on in a thread of its own, so what the n-th step is differs a little.  On a busy
 * machine there may be few steps with merged epochs: then all is done again.
 */
void test_crash_directory(void)
{
	volatile uint64_t *acked = shared_numbers();
	unsigned int n, merged = 0, rounds = 0;

	guest.nr_disks = 1;
	/* So little that it is merged often */
	blocks[0].npages = 6;
	blocks[1].npages = 2;
	disks[0].npages = 5;
	opts.keep = 2;
	do {
		n = die_in_directory(acked, &merged);
		CHECK(n > 60, "only %u steps", n);
	} while (merged <= 5 && ++rounds < 20);
	CHECK(merged > 5, "only %u of so many steps with merged epochs", merged);
	printf("# %u steps, %u with merged epochs\n", n - 1, merged);
}
