// SPDX-License-Identifier: GPL-2.0-only
/*
 * Directories of epochs: merged, damaged, full, and changed while they are read.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sim.h"
#include "store.h"
#include "stream_tests.h"

void test_resync_directory(void)
{
	struct sim g;

	resync(path_of("store"));
	sim_init(&g);
	restore_and_compare(path_of("store"), 1, &g);
	restore_and_compare(path_of("store"), 2, &g);
	restore_and_compare(path_of("store"), 4, &g);
	restore_and_compare(path_of("store"), 5, &g);
	sim_free(&g);
}

static void merging(void)
{
	struct kc_store st;
	struct kc_sink *s;
	struct sim g, check;
	uint64_t bytes = 0;
	unsigned int i;
	size_t f;

	opts.keep = 7;
	sim_init(&g);
	sim_init(&check);
	s = must_open(path_of("store"));
	for (i = 0; i < 150; i++) {
		sim_step(&g);
		OK(sim_send(&g, s, i ? 0 : KC_EPOCH_FULL));
	}
	kc_sink_close(s);
	/*
	 * Merging goes on beside it.  Closing waits for it, so that the next one begins with all
	 * there is.
	 */
	for (i = 0; i < 3; i++) {
		s = must_open(path_of("store"));
		sim_step(&g);
		OK(sim_send(&g, s, KC_EPOCH_RESYNC));
		kc_sink_close(s);
	}
	OK(kc_store_read(path_of("store"), &st, &err));
	CHECK(st.files[0].flags == KC_EPOCH_FULL && st.files[0].nr > 1, "nothing was merged");
	CHECK(st.nr_files >= opts.keep && st.nr_files < 100, "%zu epochs are left", st.nr_files);
	for (f = 0; f < st.nr_files; f++) {
		restore_and_compare(path_of("store"), st.files[f].nr, &check);
		bytes += st.files[f].bytes;
	}
	printf("# 153 epochs: %zu are left with %" PRIu64 " bytes\n", st.nr_files, bytes);
	kc_store_free(&st);
	CHECK(!run("list", path_of("store"), NULL) &&
		      !run("list", "--json", path_of("store"), NULL),
	      "list");
	CHECK(!run("verify", path_of("store"), NULL), "verify finds something");
	CHECK(run("list", path_of("nowhere"), NULL) == 1, "lists what is not there");
	CHECK(run("restore", "--epoch", "999", "--ram-dir", path_of("restored2"), path_of("store"),
		  NULL) == 1,
	      "restores what is not there");
	sim_free(&g);
	sim_free(&check);
}

void test_merging(void)
{
	merging();
}

/* Parts of pages on parts of pages, which merging puts together and digests have to */
void test_store_disk(void)
{
	guest.nr_disks = 1;
	merging();
}

void test_resync_disk(void)
{
	guest.nr_disks = 1;
	test_resync_directory();
}

/* Also of what says which guest it is, each bit counts. */
static void damage_hello(const char *file)
{
	size_t at, len, hello;
	struct kc_store st;
	uint8_t *buf;
	int fd;

	read_all(file, &buf, &len);
	fd = open(file, O_WRONLY);
	hello = KC_REC_HDR + buf[0] + 256 * buf[1];
	CHECK(hello > 100 && hello < len, "the first record has %zu bytes", hello);
	for (at = 0; at < 8 * hello; at++) {
		buf[at / 8] ^= 1u << at % 8;
		CHECK(pwrite(fd, &buf[at / 8], 1, at / 8) == 1, "cannot write");
		OK(kc_store_read(path_of("store"), &st, &err));
		CHECK(st.files[st.nr_files - 1].damaged, "no damage is seen at %zu", at / 8);
		kc_store_free(&st);
		buf[at / 8] ^= 1u << at % 8;
		CHECK(pwrite(fd, &buf[at / 8], 1, at / 8) == 1, "cannot write");
	}
	close(fd);
	free(buf);
}

void test_damage_directory(void)
{
	char file[64], nr[32];
	uint8_t *buf, *copy;
	struct kc_sink *s;
	struct sim g;
	size_t len, at;
	unsigned int i, e;
	int rc;

	blocks[0].npages = 40;
	blocks[1].npages = 6;
	sim_init(&g);
	s = must_open(path_of("store"));
	for (i = 0; i < 4; i++) {
		sim_step(&g);
		OK(sim_send(&g, s, i ? 0 : KC_EPOCH_FULL));
	}
	kc_sink_close(s);
	CHECK(!run("verify", path_of("store"), NULL), "verify finds something");
	for (i = 0; i < 24; i++) {
		e = 1 + i % 4;
		snprintf(file, sizeof(file), "store/epoch-%020u.kc", e);
		read_all(path_of(file), &buf, &len);
		copy = malloc(len);
		memcpy(copy, buf, len);
		at = below(len);
		if (i % 2)
			copy[at] ^= 1u << below(8);
		else
			rc = truncate(path_of(file), at);
		if (i % 2) {
			int fd = open(path_of(file), O_WRONLY | O_TRUNC);

			CHECK(write(fd, copy, len) == (ssize_t)len, "cannot write");
			close(fd);
		} else {
			CHECK(!rc, "cannot truncate");
		}
		CHECK(run("verify", path_of("store"), NULL) == 1,
		      "verify finds nothing, at %zu of epoch %u", at, e);
		remove_tree(path_of("restored"));
		snprintf(nr, sizeof(nr), "%u", e);
		CHECK(run("restore", "--epoch", nr, "--ram-dir", path_of("restored"),
			  path_of("store"), NULL) == 1 &&
			      !exists(path_of("restored/ram0")),
		      "a damaged epoch is restored");
		/* Without a number it is the last sound one. */
		rc = run("restore", "--ram-dir", path_of("restored"), path_of("store"), NULL);
		if (e == 1) {
			CHECK(rc == 1, "something is restored without a full epoch");
		} else {
			CHECK(!rc, "the last sound epoch is not restored");
			sim_goto(&g, e - 1);
			compare(&g, path_of("restored"), "state");
		}
		rc = open(path_of(file), O_WRONLY | O_TRUNC);
		CHECK(write(rc, buf, len) == (ssize_t)len, "cannot write");
		close(rc);
		free(buf);
		free(copy);
	}
	damage_hello(path_of("store/epoch-00000000000000000004.kc"));
	CHECK(!run("verify", path_of("store"), NULL), "verify finds something");
	/* One that writes on: from the last sound epoch, and nothing is removed. */
	CHECK(!truncate(path_of("store/epoch-00000000000000000003.kc"), 1000), "cannot truncate");
	s = must_open(path_of("store"));
	CHECK(kc_sink_last_epoch(s) == 2, "goes on from epoch %" PRIu64, kc_sink_last_epoch(s));
	sim_goto(&g, 6);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	kc_sink_close(s);
	CHECK(exists(path_of("store/damaged-epoch-00000000000000000003.kc")),
	      "the damaged epoch is gone");
	restore_and_compare(path_of("store"), 6, &g);
	sim_free(&g);
}

/* --- Directories that change while they are read -------------------------- */

#define FIRST 11u
#define LAST 45u

static char *epoch_path(const char *where, unsigned int nr)
{
	char name[64];

	snprintf(name, sizeof(name), "%s/epoch-%020u.kc", where, nr);
	return path_of(name);
}

/* By rename, as a merger does. */
static void put_epoch(const char *from, unsigned int nr)
{
	const char *tmp = path_of("store/merge.tmp");
	uint8_t *buf;
	size_t len;
	int fd;

	read_all(epoch_path(from, nr), &buf, &len);
	fd = open(tmp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	CHECK(write(fd, buf, len) == (ssize_t)len && !close(fd) &&
		      !rename(tmp, epoch_path("store", nr)),
	      "cannot write");
	free(buf);
}

/* Whoever opens the epoch waits until this is closed. */
static int gate(unsigned int nr)
{
	int fd = open(epoch_path("store", nr), O_RDONLY | O_CLOEXEC);

	CHECK(fd >= 0, "no epoch %u", nr);
	if (fcntl(fd, F_SETLEASE, F_WRLCK))
		SKIP("no leases on files here: %s", strerror(errno));
	return fd;
}

/*
 * The exit status of the program, in whose way the directory comes: when it has listed all and
 * looks at epoch @at, the newest ones first, what is older than epoch @merge is merged into that
 * one, or epoch @lose is gone; so often, each time one epoch later.
 */
static int run_changing(const char *const *argv, unsigned int at, unsigned int merge,
			unsigned int lose, unsigned int times)
{
	unsigned int i, oldest = FIRST;
	int fd, next, status;
	pid_t pid;

	remove_tree(path_of("store"));
	CHECK(!mkdir(path_of("store"), 0700), "cannot make a directory");
	for (i = FIRST; i <= LAST; i++)
		put_epoch(i == FIRST ? "full" : "increments", i);
	unlink(path_of("log"));
	signal(SIGIO, SIG_IGN);
	fd = gate(at);
	pid = spawn(argv, 0);
	while (times--) {
		while (fcntl(fd, F_GETLEASE) == F_WRLCK) {
			if (waitpid(pid, &status, WNOHANG) == pid)
				FAIL("it ended with %d before the directory changed", status);
			poll(NULL, 0, 1);
		}
		if (lose)
			CHECK(!unlink(epoch_path("store", lose)), "cannot remove epoch %u", lose);
		else
			put_epoch("full", merge);
		for (i = merge; i-- > oldest; )
			CHECK(!unlink(epoch_path("store", i)), "cannot remove epoch %u", i);
		oldest = merge > oldest ? merge : oldest;
		merge++;
		next = times ? gate(++at) : -1;
		close(fd);
		fd = next;
	}
	return reap(&pid);
}

void test_changing_directory(void)
{
	char *store = strdup(path_of("store")), *restored = strdup(path_of("restored"));
	const char *verify[] = { program, "verify", store, NULL };
	const char *restore[] = { program, "restore", "--ram-dir", restored, store, NULL };
	const char *restore_nr[] = { program, "restore", "--epoch", "20", "--ram-dir", restored,
				     store, NULL };
	struct sim g;
	struct kc_sink *full, *increments;
	unsigned int i;
	char text[80];

	blocks[0].npages = 40;
	blocks[1].npages = 6;
	opts.keep = 1000;
	sim_init(&g);
	full = must_open(path_of("full"));
	increments = must_open(path_of("increments"));
	for (sim_goto(&g, FIRST); g.epoch <= LAST; sim_step(&g)) {
		OK(sim_send(&g, full, KC_EPOCH_FULL));
		OK(sim_send(&g, increments, g.epoch == FIRST ? KC_EPOCH_FULL : 0));
	}
	kc_sink_close(full);
	kc_sink_close(increments);

	/* Gone before it is opened; or already when the list is made, but not what needs it. */
	for (i = 0; i < 2; i++) {
		unsigned int at = i ? 14 : 11, merge = i ? 14 : 12;

		CHECK(!run_changing(verify, at, merge, 0, 1), "verify finds something");
		CHECK(log_has("looking again") && !log_has("is lost"), "nothing changed");
		snprintf(text, sizeof(text), "%u epochs, 0 of them lost; last sound epoch %u",
			 LAST - merge + 1, LAST);
		CHECK(log_has(text), "it does not say \"%s\"", text);
		remove_tree(restored);
		CHECK(!run_changing(restore, at, merge, 0, 1), "nothing is restored");
		CHECK(log_has("looking again"), "nothing changed");
		sim_goto(&g, LAST);
		compare(&g, restored, "state");
		remove_tree(restored);
		restore_nr[3] = "20";
		CHECK(!run_changing(restore_nr, at, merge, 0, 1), "epoch 20 is not restored");
		sim_goto(&g, 20);
		compare(&g, restored, "state");
		remove_tree(restored);
		restore_nr[3] = "11";
		CHECK(run_changing(restore_nr, at, merge, 0, 1) == 1, "what is gone is restored");
		CHECK(log_has("has no epoch 11"), "it does not say why");
	}

	/* What is gone without a merge is lost, and all that needs it. */
	CHECK(run_changing(verify, FIRST, 0, 12, 1) == 1, "verify finds nothing");
	CHECK(log_has("looking again") &&
		      log_has("epoch 13 needs epoch 12, whose file is missing") &&
		      log_has("last sound epoch 11\n"),
	      "it does not say what is missing");
	CHECK(run("verify", store, NULL) == 1, "verify finds nothing");
	unlink(path_of("log"));
	CHECK(run("restore", "--epoch", "20", "--ram-dir", restored, store, NULL) == 1 &&
		      log_has("epoch 20 needs epoch 12, whose file is missing"),
	      "it does not say what is missing");
	CHECK(!run_changing(restore, FIRST, 0, 12, 1), "nothing is restored");
	sim_goto(&g, FIRST);
	compare(&g, restored, "state");

	/* For ever. */
	CHECK(run_changing(verify, FIRST, FIRST + 1, 0, 30) == 1, "it never gives up");
	CHECK(log_has("changes too quickly") && !log_has("is lost"), "it does not say why");
	remove_tree(restored);
	CHECK(run_changing(restore, FIRST, FIRST + 1, 0, 30) == 1, "it never gives up");
	CHECK(log_has("changes too quickly") && !exists(path_of("restored/ram0")),
	      "it does not say why");
	CHECK(!run_changing(verify, FIRST, FIRST + 1, 0, 29), "it gives up too early");
	free(store);
	free(restored);
	sim_free(&g);
}

/*
 * The same with a writer that merges all the time.  It is not as fast as it can be: a machine that
 * is busy might let it merge during each of the looks.
 */
void test_read_while_merged(void)
{
	volatile uint64_t *n = shared_numbers();
	unsigned int round, again = 0;
	struct kc_store st;
	pid_t primary;
	struct sim g;
	uint8_t *log;
	size_t len;
	char *at;

	n[3] = 2;
	opts.keep = 2;
	sim_init(&g);
	primary = start_primary(path_of("store"), 0, n, false);
	for (round = 0; round < 30; round++) {
		let_run(1, n, 20);
		unlink(path_of("log"));
		CHECK(!run("verify", path_of("store"), NULL), "verify finds something");
		remove_tree(path_of("restored"));
		CHECK(!run("restore", "--ram-dir", path_of("restored"), path_of("store"), NULL),
		      "nothing is restored");
		read_all(path_of("log"), &log, &len);
		log[len] = '\0';
		CHECK(!strstr((char *)log, "is lost") && !strstr((char *)log, "warning"),
		      "something was lost");
		again += !!strstr((char *)log, "looking again");
		at = strstr((char *)log, "\nepoch ");
		CHECK(at, "it does not say which epoch it is");
		sim_goto(&g, strtoull(at + 7, NULL, 10));
		compare(&g, path_of("restored"), "state");
		free(log);
	}
	kill(primary, SIGKILL);
	CHECK(reap(&primary) == -SIGKILL, "the writer ended by itself");
	OK(kc_store_read(path_of("store"), &st, &err));
	CHECK(st.nr_files && st.files[0].nr > 1, "nothing was merged");
	kc_store_free(&st);
	printf("# %u rounds, %" PRIu64 " epochs, looked again in %u\n", round, n[0], again);
	sim_free(&g);
}

/* --- Directories as one would not expect them ------------------------------ */

/* Increments up to epoch @last, of little memory. */
static void make_store(const char *store, unsigned int last)
{
	struct kc_sink *s;
	struct sim g;

	blocks[0].npages = 40;
	blocks[1].npages = 6;
	opts.keep = 1000;
	sim_init(&g);
	s = must_open(store);
	while (g.epoch < last) {
		sim_step(&g);
		OK(sim_send(&g, s, g.epoch == 1 ? KC_EPOCH_FULL : 0));
	}
	kc_sink_close(s);
	sim_free(&g);
}

/* A writer that keeps few epochs replaces all that the reader of its directory has seen. */
static unsigned int replacements;

static void replace_all(const char *name)
{
	const unsigned int first = 2 * (5 - replacements) - 1;
	unsigned int i;

	if (!replacements || strncmp(name, "epoch-", 6))
		return;
	replacements--;
	for (i = first; i < first + 2; i++) {
		char *to = strdup(epoch_path("store", i + 2));

		CHECK(!rename(epoch_path("next", i + 2), to), "rename: %s", strerror(errno));
		CHECK(!unlink(epoch_path("store", i)), "unlink: %s", strerror(errno));
		free(to);
	}
}

void test_read_while_replaced(void)
{
	char *store = strdup(path_of("store"));
	struct kc_store st;

	make_store(store, 2);
	make_store(path_of("next"), 10);
	replacements = 4;
	before_open = replace_all;
	OK(kc_store_read(store, &st, &err));
	before_open = NULL;
	CHECK(!replacements, "the directory was not changed %u times", replacements);
	CHECK(st.nr_files == 2 && st.files[0].nr == 9 && st.files[1].nr == 10 && st.has_guest,
	      "%zu files are found, the first of epoch %" PRIu64, st.nr_files,
	      st.nr_files ? st.files[0].nr : 0);
	kc_store_free(&st);
	/* And one that is empty is. */
	remove_tree(store);
	CHECK(!mkdir(store, 0700), "mkdir: %s", strerror(errno));
	OK(kc_store_read(store, &st, &err));
	CHECK(!st.nr_files, "an empty directory has epochs");
	kc_store_free(&st);
	free(store);
}

/* How many bytes a process has read with read() and the like. */
static uint64_t bytes_read(pid_t pid)
{
	char path[64], line[128];
	uint64_t n = 0;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/io", pid);
	f = fopen(path, "r");
	CHECK(f, "no %s", path);
	while (fgets(line, sizeof(line), f))
		sscanf(line, "rchar: %" SCNu64, &n);
	fclose(f);
	return n;
}

/* A run of the program: its status, and what it read. */
static int run_measured(const char *const *argv, uint64_t *read)
{
	siginfo_t si;
	pid_t pid;

	unlink(path_of("log"));
	pid = spawn(argv, 0);
	CHECK(!waitid(P_PID, pid, &si, WEXITED | WNOWAIT), "waitid: %s", strerror(errno));
	*read = bytes_read(pid);
	return reap(&pid);
}

/* Each file is read once, also those that build upon one that is bad. */
void test_verify_once(void)
{
	char *store = strdup(path_of("store"));
	const char *verify[] = { program, "verify", store, NULL };
	const char *restore[] = { program, "restore", "--ram-dir", path_of("restored"), store,
				  NULL };
	uint64_t sound, bad;
	struct stat sb;
	uint8_t *log;
	size_t len;

	make_store(store, 150);
	CHECK(!run_measured(verify, &sound), "verify finds something");
	CHECK(!stat(epoch_path("store", 75), &sb) &&
	      !truncate(epoch_path("store", 75), sb.st_size - 1), "cannot truncate");
	CHECK(run_measured(verify, &bad) == 1, "verify finds nothing");
	CHECK(log_has("epoch 75 is lost") && log_has("epoch 150 is lost") &&
	      !log_has("epoch 74 is lost") &&
	      log_has("150 epochs, 76 of them lost; last sound epoch 74"),
	      "it finds the wrong ones");
	read_all(path_of("log"), &log, &len);
	log[len] = '\0';
	CHECK(strstr((char *)log, "epoch 120 is lost") &&
	      strstr(strstr((char *)log, "epoch 120 is lost"), "000075.kc: it ends in the middle"),
	      "it does not say why: %s", (char *)log);
	free(log);
	/* What comes after the bad one need not be read at all. */
	CHECK(bad <= sound + 65536, "it reads %" PRIu64 " bytes, not %" PRIu64, bad, sound);
	/* Where the first is bad there is nothing to be restored, and that is known at once. */
	CHECK(!stat(epoch_path("store", 1), &sb) &&
	      !truncate(epoch_path("store", 1), sb.st_size - 1), "cannot truncate");
	CHECK(run_measured(restore, &bad) == 1 && log_has("no sound epoch"),
	      "it restores something");
	CHECK(bad <= sound + 65536, "it reads %" PRIu64 " bytes, not %" PRIu64, bad, sound);
	CHECK(run_measured(verify, &bad) == 1 && log_has("150 of them lost; last sound epoch 0"),
	      "verify finds something sound");
	CHECK(bad <= sound + 65536, "it reads %" PRIu64 " bytes, not %" PRIu64, bad, sound);
	free(store);
}

/* Nobody waits for what is no file. */
void test_no_files(void)
{
	const char *store = strdup(path_of("store")), *to = strdup(path_of("restored"));
	const char *const commands[][8] = {
		{ program, "list", store },
		{ program, "list", "--json", store },
		{ program, "verify", store },
		{ program, "restore", "--ram-dir", to, store },
		{ program, "restore", "--epoch", "4", "--ram-dir", to, store },
	};
	const int status[] = { 0, 0, 1, 0, 1 };
	uint64_t end;
	size_t i;
	pid_t pid;
	int st;

	make_store(store, 3);
	CHECK(!mkfifo(epoch_path("store", 4), 0600), "mkfifo: %s", strerror(errno));
	CHECK(!symlink("/dev/zero", epoch_path("store", 5)), "symlink: %s", strerror(errno));
	CHECK(!mkdir(epoch_path("store", 6), 0700), "mkdir: %s", strerror(errno));
	for (i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
		remove_tree(to);
		pid = spawn(commands[i], 0);
		end = kc_now_us() + 20000000;
		while (!waitpid(pid, &st, WNOHANG)) {
			CHECK(kc_now_us() < end, "%s hangs", commands[i][1]);
			poll(NULL, 0, 5);
		}
		CHECK(WIFEXITED(st) && WEXITSTATUS(st) == status[i], "%s ends with %d",
		      commands[i][1], st);
	}
	CHECK(log_has("6 epochs, 3 of them lost; last sound epoch 3"), "it does not count them");
	CHECK(log_has("the file of epoch 4 is damaged"), "it does not say what is wrong");
	/* They are not in the way of who writes on. */
	kc_sink_close(must_open(store));
	CHECK(exists(path_of("store/damaged-epoch-00000000000000000004.kc")),
	      "the FIFO is left there");
}

/* What others can write to is no place for what a guest is to go on from. */
void test_open_store(void)
{
	make_store(path_of("store"), 2);
	CHECK(!chmod(path_of("store"), 0770), "chmod");
	must_refuse(path_of("store"), &opts, &guest, EPERM, "can be written by somebody else");
	CHECK(!chmod(path_of("store"), 0702), "chmod");
	must_refuse(path_of("store"), &opts, &guest, EPERM, "can be written by somebody else");
	CHECK(!chmod(path_of("store"), 0755), "chmod");
	kc_sink_close(must_open(path_of("store")));
	CHECK(!mkdir(path_of("new"), 0700) && !chmod(path_of("new"), 0777), "chmod");
	must_refuse(path_of("new"), &opts, &guest, EPERM, "can be written by somebody else");
	CHECK(!exists(path_of("new/lock")), "it wrote there nevertheless");
	if (geteuid())
		SKIP("only root can give a directory away");
	CHECK(!chown(path_of("store"), 12345, -1), "chown");
	must_refuse(path_of("store"), &opts, &guest, EPERM, "belongs to");
}

/* A full epoch that lacks some of a disk, or has but parts of it, is none. */
void test_disk_missing(void)
{
	unsigned int i, b, round;
	struct kc_sink *s;
	struct sim g;
	uint64_t p;

	guest.nr_disks = 1;
	sim_init(&g);
	sim_step(&g);
	for (round = 0; round < 3; round++) {
		remove_tree(path_of("store"));
		s = must_open(path_of("store"));
		OK(kc_epoch_begin(s, 1, KC_EPOCH_FULL, &err));
		for (b = 0; b < 2; b++) {
			for (p = 0; p < blocks[b].npages; p++)
				OK(kc_epoch_page(s, b, p, g.ram[b] + p * KC_PAGE_SIZE, &err));
		}
		for (i = 0; i < disks[0].npages; i++) {
			uint8_t *page = g.disk + i * KC_PAGE_SIZE;

			if (i == 7 && round == 1)
				continue;
			if (i == 7 && round == 2) {
				OK(kc_epoch_disk(s, 0, i * KC_PAGE_SIZE, page, 2048, &err));
				OK(kc_epoch_disk(s, 0, i * KC_PAGE_SIZE + 2048, page, 2048, &err));
				continue;
			}
			OK(kc_epoch_disk(s, 0, i * KC_PAGE_SIZE, page, KC_PAGE_SIZE, &err));
		}
		OK(kc_epoch_state(s, g.state, g.state_len, false, &err));
		OK(kc_epoch_commit(s, &err));
		kc_sink_close(s);
		unlink(path_of("log"));
		CHECK(run("verify", path_of("store"), NULL) == !!round, "round %u is sound, or not",
		      round);
		CHECK(!round || log_has("pages are missing"), "it does not say what is missing");
	}
	sim_free(&g);
}

/* Where a disk may be restored to, and what is left of it when that fails */
void test_restore_disk(void)
{
	char file[64];
	struct kc_sink *s;
	struct sim g;

	guest.nr_disks = 1;
	sim_init(&g);
	s = must_open(path_of("store"));
	sim_step(&g);
	OK(sim_send(&g, s, KC_EPOCH_FULL));
	sim_step(&g);
	OK(sim_send(&g, s, 0));
	kc_sink_close(s);
	CHECK(!run("list", path_of("store"), NULL) && log_has("disk0 vda, 0 MiB"), "list");
	CHECK(run("restore", "--ram-dir", path_of("out"), path_of("store"), NULL) == 1 &&
	      log_has("have 1 disks: say --disk PATH 1 times"), "restores without its disk");
	CHECK(run("restore", "--ram-dir", path_of("out"), "--disk", path_of("a"), "--disk",
		  path_of("b"), path_of("store"), NULL) == 1, "restores more disks than there are");
	CHECK(!exists(path_of("out")) && !exists(path_of("a")), "it leaves something");
	/* It may be somebody's. */
	write_text(path_of("image"), 0600, "mine");
	CHECK(run("restore", "--ram-dir", path_of("out"), "--disk", path_of("image"),
		  path_of("store"), NULL) == 1 && log_has("image exists"), "overwrites a file");
	CHECK(exists(path_of("image")) && !exists(path_of("out/ram0")), "it removes, or leaves");
	CHECK(run("restore", "--ram-dir", path_of("out"), "--disk", path_of("none/image"),
		  path_of("store"), NULL) == 1 && log_has("cannot write to"), "where there is none");
	/* Of a damaged epoch nothing is left. */
	snprintf(file, sizeof(file), "store/epoch-%020u.kc", 2);
	CHECK(!truncate(path_of(file), 5000), "cannot truncate");
	CHECK(run("restore", "--epoch", "2", "--ram-dir", path_of("out"), "--disk", path_of("new"),
		  path_of("store"), NULL) == 1, "restores half an epoch");
	CHECK(!exists(path_of("new")) && !exists(path_of("out/ram0")), "it leaves half an epoch");
	CHECK(!run("restore", "--ram-dir", path_of("out"), "--disk", path_of("new"),
		   path_of("store"), NULL) && log_has("disk vda 368640 /"), "does not restore");
	sim_goto(&g, 1);
	compare_disk(&g, path_of("new"));
	sim_free(&g);
}
