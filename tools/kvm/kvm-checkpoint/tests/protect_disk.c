// SPDX-License-Identifier: GPL-2.0-only
/*
 * A guest with a disk: what it has written to it is in the epoch, all of it and no more.
 */
#include <fcntl.h>
#include <glob.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "protecting.h"
#include "protect_tests.h"

#define DISK_PAGES 300
/* More than there are pages of RAM: whether it was sent can be seen from how many were */
#define LARGE_DISK_PAGES 3000

/* What it says when the link is lost and there is too much to keep */
#define MORE "more was written to disks than can be kept"

static void with_standby(void)
{
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure", "--disk",
		      path_of("image"));
}

static void begin_with(const char *option, const char *value)
{
	/* Where the socket is: tests run side by side */
	setenv("XDG_RUNTIME_DIR", dir, 1);
	unsetenv("RUNTIME_DIRECTORY");
	start_disk(&qemu, DISK_PAGES);
	start_qemu(&qemu);
	with_standby();
	start_protect(CHECKED, spec(), "--interval", "5ms", option, value, NULL);
	serve_until_log("protected since");
	CHECK(!link(path_of("log"), path_of("protect.log")), "cannot link the log");
}

static void begin(void)
{
	begin_with(NULL, NULL);
}

/* RAM, state and disk are of one epoch */
static unsigned int of_one_epoch(void)
{
	unsigned int snap;

	/* Finishes what was complete */
	ram_epoch(path_of("ram"));
	snap = snap_of_standby(path_of("ram"));
	check_image(path_of("image"), snap);
	return snap;
}

static void finish(void)
{
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "it does not end as it was told to");
	stop_standby(SIGTERM);
	CHECK(of_one_epoch() == qemu.nr_snaps - 1, "the last epoch is missing");
	CHECK(!qemu.disk.job && !qemu.disk.node, "it leaves QEMU mirroring");
}

/* Where the disk is zero, the standby's image need not have any room */
void test_disk_sparse(void)
{
	struct stat st;

	setenv("XDG_RUNTIME_DIR", dir, 1);
	unsetenv("RUNTIME_DIRECTORY");
	start_disk(&qemu, 8000);
	memset(qemu.disk.data, 0, 8000 * KC_PAGE_SIZE);
	start_qemu(&qemu);
	with_standby();
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	serve_until_log("protected since");
	CHECK(!stat(path_of("image"), &st), "there is no image");
	CHECK(st.st_size == 8000l * KC_PAGE_SIZE && st.st_blocks < 6000 * 8,
	      "of 8000 pages of zeros the image has %ld", (long)st.st_blocks / 8);
	finish();
}

void test_disk(void)
{
	begin();
	be_qemu_for_epochs(30);
	CHECK(!qemu.disk.errors && qemu.disk.begun == 1, "%u errors", qemu.disk.errors);
	finish();
}

void test_disk_take(void)
{
	qemu.takes = true;
	begin();
	be_qemu_for_epochs(30);
	CHECK(qemu.nr_taken > 5, "%u epochs by one command", qemu.nr_taken);
	finish();
}

/* Each epoch of a directory has the disk of its moment, also of one that continues another's. */
void test_disk_store(void)
{
	unsigned int i, last, n;

	setenv("XDG_RUNTIME_DIR", dir, 1);
	unsetenv("RUNTIME_DIRECTORY");
	start_disk(&qemu, DISK_PAGES);
	start_qemu(&qemu);
	for (i = 0; i < 3; i++) {
		unlink(path_of("log"));
		write_text(path_of("log"), 0600, "");
		start_protect(CHECKED, path_of("store"), "--interval", "5ms", NULL);
		serve_until_log("protected since");
		be_qemu_for_epochs(8);
		kill(qemu.client, i == 1 ? SIGKILL : SIGTERM);
		if (i == 1)
			CHECK(waitpid(qemu.client, NULL, 0) == qemu.client, "it does not die");
		else
			CHECK(serve() == 0, "it does not end as it was told to");
		be_qemu_for(30);
	}
	n = check_store(&last);
	CHECK(n > 5, "only %u epochs", n);
	CHECK(!run("verify", path_of("store"), NULL), "verify finds something");
	printf("# %u epochs with their disks\n", n);
}

static void until_protected_again(unsigned int times, uint64_t end)
{
	while (times_in(path_of("protect.log"), "protected since") < times) {
		CHECK(kc_now_us() < end && !waitpid(qemu.client, NULL, WNOHANG),
		      "it is not protected again");
		step(&qemu, 1);
	}
}

/* The standby is killed at any moment: what it has is always of one epoch. */
void test_disk_blip(void)
{
	uint64_t end = kc_now_us() + 2 * LIMIT_US;
	unsigned int i, last = 0, now;

	begin();
	qemu.hook = kills_standby_later;
	for (i = 1; i <= 12; i++) {
		kill_in = 1 + below(9);
		while (kill_in) {
			CHECK(kc_now_us() < end, "there are no more epochs");
			step(&qemu, 1);
		}
		now = of_one_epoch();
		CHECK(now >= last, "epoch %u after %u", now, last);
		last = now;
		guest_writes(&qemu, i % 3 == 1 ? 3000 : 20);
		with_standby();
		until_protected_again(i + 1, end);
	}
	CHECK(qemu.disk.begun == 1, "the disk was copied %u times", qemu.disk.begun);
	finish();
}

/* A standby that comes back with an older epoch, and with its image of then: what it lacks is gone. */
void test_disk_set_back(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	char command[4 * PATH_MAX];
	unsigned int conts;

	begin();
	be_qemu_for(50);
	stop_standby(SIGKILL);
	snprintf(command, sizeof(command), "cp -a %s %s && cp -a %s %s", path_of("ram"),
		 path_of("old"), path_of("image"), path_of("old-image"));
	CHECK(!system(command), "cannot copy");
	with_standby();
	until_protected_again(2, end);
	for (conts = qemu.conts; qemu.conts < conts + 10;) {
		disk_writes(&qemu);
		step(&qemu, 1);
	}
	stop_standby(SIGKILL);
	remove_tree(path_of("ram"));
	CHECK(!rename(path_of("old"), path_of("ram")) &&
	      !rename(path_of("old-image"), path_of("image")), "cannot rename");
	with_standby();
	until_protected_again(3, end);
	CHECK(qemu.disk.begun == 2, "the disk was copied %u times", qemu.disk.begun);
	finish();
}

static void write_disk(uint64_t bytes)
{
	uint64_t end = kc_now_us() + LIMIT_US;

	while (qemu.disk.mirrored < bytes && !qemu.disk.paused && qemu.disk.job) {
		CHECK(kc_now_us() < end, "it takes too long to write");
		disk_writes(&qemu);
		disk_fills(&qemu, DISK_PAGES);
	}
}

/*
 * Until protect knows that the standby is gone a guest that writes too much has to wait, and in this
 * QEMU the monitor waits with it.
 */
static void lose_standby(int sig)
{
	const char *text = "the guest runs on";
	uint64_t end = kc_now_us() + 3000000;
	unsigned int told = times_in(path_of("protect.log"), text);

	stop_standby(sig);
	while (times_in(path_of("protect.log"), text) == told && kc_now_us() < end)
		step(&qemu, 1);
}

/* While the link is lost much is written, or more than can be kept. */
void test_disk_long_blip(void)
{
	uint64_t end = kc_now_us() + 2 * LIMIT_US, much = 20ull << 20;
	unsigned int i;

	begin();
	be_qemu_for(50);
	for (i = 1; i <= 3; i++) {
		lose_standby(i == 2 ? SIGTERM : SIGKILL);
		be_qemu_for(20);
		qemu.disk.mirrored = 0;
		write_disk(i == 3 ? 400ull << 20 : much);
		CHECK(qemu.disk.paused == (i == 3), "it keeps %" PRIu64 " bytes", qemu.disk.mirrored);
		with_standby();
		until_protected_again(i + 1, end);
		be_qemu_for(50);
		CHECK(qemu.disk.begun == 1 && !qemu.disk.resumed == (i < 3),
		      "the disk was copied %u times, and %u times in part", qemu.disk.begun,
		      qemu.disk.resumed);
	}
	CHECK(times_in(path_of("protect.log"), MORE) == 1, "it does not say that it is too much");
	finish();
}

/* So much that nothing is taken any more, all of it in one place; then some more somewhere */
static void overflow(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	unsigned int i;

	while (!qemu.disk.paused) {
		CHECK(kc_now_us() < end, "it takes too long to write");
		disk_fills(&qemu, 16);
	}
	for (i = 0; i < 5; i++)
		disk_writes(&qemu);
}

/* What was not taken is copied when the standby is there again, and nothing else. */
void test_disk_resumed(void)
{
	unsigned int i;

	begin();
	/* What the guest writes again by itself need not be copied: not what overflow() leaves */
	qemu.disk.kept = 16;
	for (i = 1; i <= 2; i++) {
		be_qemu_for(60);
		lose_standby(SIGKILL);
		be_qemu_for(50);
		overflow();
		CHECK(qemu.disk.paused && qemu.disk.nr_dirty >= 16, "there is nothing to resume");
		qemu.disk.copied = 0;
		/* The guest goes on writing meanwhile, and the longer that takes the more */
		qemu.disk.marked = qemu.disk.nr_dirty;
		with_standby();
		until_protected_again(i + 1, kc_now_us() + LIMIT_US);
		CHECK(qemu.disk.begun == 1 && qemu.disk.resumed >= i,
		      "the disk was copied %u times, and %u times in part", qemu.disk.begun,
		      qemu.disk.resumed);
		CHECK(!qemu.disk.nr_dirty, "it is protected, and %" PRIu64 " pages are not",
		      qemu.disk.nr_dirty);
		CHECK(qemu.disk.copied >= 16 * KC_PAGE_SIZE &&
		      qemu.disk.copied <= qemu.disk.marked * KC_PAGE_SIZE,
		      "%" PRIu64 " bytes are copied, of %" PRIu64 " pages", qemu.disk.copied,
		      qemu.disk.marked);
	}
	finish();
}

/* The standby is killed again while that is under way: it keeps the epoch of before. */
void test_disk_resumed_killed(void)
{
	unsigned int i, before, n;

	begin();
	be_qemu_for(60);
	for (i = 0; i < 6; i++) {
		lose_standby(SIGKILL);
		before = of_one_epoch();
		be_qemu_for(20);
		/* Where a first copy is lost there is no job */
		qemu.disk.mirrored = 0;
		write_disk(400ull << 20);
		with_standby();
		be_qemu_for(below(60));
		stop_standby(SIGKILL);
		CHECK(of_one_epoch() >= before, "it has an older epoch than before");
		with_standby();
		be_qemu_for(below(100));
	}
	stop_standby(SIGKILL);
	n = times_in(path_of("protect.log"), "protected since");
	with_standby();
	until_protected_again(n + 1, kc_now_us() + LIMIT_US);
	finish();
}

/* It will not go on: then all of it is compared. */
static const char *stays_paused(struct qemu *q, const char *command)
{
	if (!strcmp(command, "block-job-resume"))
		return "{\"error\": {\"desc\": \"not now\"}}\n";
	(void)q;
	return NULL;
}

void test_disk_not_resumed(void)
{
	begin();
	be_qemu_for(60);
	qemu.hook = stays_paused;
	lose_standby(SIGKILL);
	be_qemu_for(50);
	write_disk(400ull << 20);
	with_standby();
	until_protected_again(2, kc_now_us() + LIMIT_US);
	CHECK(qemu.disk.begun == 2 && times_in(path_of("protect.log"), "does not go on: all of it"),
	      "the disk was copied %u times", qemu.disk.begun);
	finish();
}

/* The daemon is killed; the next one finds its job. */
void test_disk_killed(void)
{
	unsigned int i;

	begin();
	for (i = 0; i < 4; i++) {
		be_qemu_for(10 + below(100));
		kill(qemu.client, SIGKILL);
		CHECK(waitpid(qemu.client, NULL, 0) == qemu.client, "it does not die");
		be_qemu_for(50);
		unlink(path_of("log"));
		write_text(path_of("log"), 0600, "");
		start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
		serve_until_log("protected since");
	}
	CHECK(qemu.disk.begun == 5, "%u mirrors", qemu.disk.begun);
	finish();
}

/* Somebody ends the job: the guest writes what is in no epoch. */
void test_disk_job_ends(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	unsigned int i;

	begin();
	for (i = 1; i <= 3; i++) {
		be_qemu_for(60);
		end_job(&qemu);
		while (times_in(path_of("protect.log"), "protected since") <= i) {
			CHECK(kc_now_us() < end, "it does not begin again");
			step(&qemu, 1);
		}
	}
	CHECK(log_has("the mirror of a disk has ended"), "it does not say why");
	finish();
}

/* It ends just when the first epoch after a lost link is taken, of which no log has the pages then. */
static bool ends_next;

static const char *ends_in_epoch(struct qemu *q, const char *command)
{
	if (ends_next && !strcmp(command, COLLECT) && !q->running) {
		ends_next = false;
		end_job(q);
	}
	return NULL;
}

void test_disk_job_ends_again(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	unsigned int i;

	begin();
	qemu.hook = ends_in_epoch;
	for (i = 1; i <= 6; i++) {
		be_qemu_for(20);
		stop_standby(SIGKILL);
		guest_writes(&qemu, 100);
		ends_next = true;
		with_standby();
		while (ends_next || times_in(path_of("protect.log"), "protected since") <= i) {
			CHECK(kc_now_us() < end && !waitpid(qemu.client, NULL, WNOHANG),
			      "it is not protected again");
			step(&qemu, 1);
		}
		/* Killed in between */
		stop_standby(SIGKILL);
		of_one_epoch();
		with_standby();
		until_protected_again(i + 2, end);
		i++;
	}
	finish();
}

/* The connection to the mirror is lost */
void test_disk_fails(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;

	begin();
	be_qemu_for(60);
	close(qemu.disk.fd);
	qemu.disk.fd = -1;
	while (times_in(path_of("protect.log"), "protected since") < 2) {
		CHECK(kc_now_us() < end, "it does not begin again");
		step(&qemu, 1);
	}
	finish();
}

/* It is stopped for long: the guest, which writes to its disk, waits for it no longer than for an epoch */
void test_disk_frozen(void)
{
	uint64_t end = kc_now_us() + LIMIT_US, t;
	unsigned int i;

	begin_with("--pause-limit", "700ms");
	for (i = 1; i <= 3; i++) {
		be_qemu_for(60);
		freeze(qemu.client);
		t = kc_now_us();
		qemu.disk.errors = 0;
		/* Its guest writes, and waits. */
		while (!qemu.disk.errors) {
			CHECK(kc_now_us() < end, "QEMU does not notice");
			step(&qemu, 1);
		}
		t = kc_now_us() - t;
		CHECK(t > 350000, "it is cut off after %" PRIu64 " us", t);
		kill(qemu.client, SIGCONT);
		while (times_in(path_of("protect.log"), "protected since") <= i) {
			CHECK(kc_now_us() < end, "it does not begin again");
			step(&qemu, 1);
		}
	}
	CHECK(qemu.disk.begun == 1 && qemu.disk.resumed >= 3, "the disk was copied %u times",
	      qemu.disk.begun);
	finish();
}

/* Not for ever, but for less than that: it is as if nothing had been */
void test_disk_frozen_shortly(void)
{
	unsigned int i;

	begin_with("--pause-limit", "20s");
	for (i = 0; i < 5; i++) {
		be_qemu_for(60);
		freeze(qemu.client);
		poll(NULL, 0, 200);
		kill(qemu.client, SIGCONT);
	}
	be_qemu_for(60);
	CHECK(!qemu.disk.errors && qemu.disk.begun == 1, "the mirror is lost");
	finish();
}

static unsigned int pages_that_differed(void)
{
	unsigned int differed = UINT32_MAX;
	FILE *f = fopen(path_of("log"), "r");
	char line[300];

	while (f && fgets(line, sizeof(line), f))
		sscanf(line, "protected since epoch %*u: %u pages differed", &differed);
	CHECK(f && !fclose(f), "there is no log");
	return differed;
}

/* What the guest had where it was, it has where it is */
static void bring(struct block *b, const uint8_t *ram)
{
	memcpy(b->ram, ram, b->npages * KC_PAGE_SIZE);
}

/* And the other way round: the image that it had here is the standby's, and is not sent again */
static void and_back(const char *left)
{
	FILE *f = fopen(path_of("own"), "w");
	char link[PATH_MAX];

	CHECK(f && fwrite(qemu.disk.data, KC_PAGE_SIZE, LARGE_DISK_PAGES, f) == LARGE_DISK_PAGES &&
	      !fclose(f), "cannot write the image");
	/* Some of it is written where the guest is now */
	memset(qemu.disk.data + 7 * KC_PAGE_SIZE, 0x77, 2 * KC_PAGE_SIZE);
	unlink(path_of("qmp"));
	qemu.dies_after = false;
	qemu.attached = false;
	start_qemu(&qemu);
	each_ram(left, bring);
	start_standby(left, "--no-fence", "--timeout", "0", "--insecure", "--disk", path_of("own"));
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	serve_until_log("pages differed");
	CHECK(pages_that_differed() < LARGE_DISK_PAGES / 2, "the disk was sent again: %u pages",
	      pages_that_differed());
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "it does not end as it was told to");
	stop_standby(SIGTERM);
	ram_epoch(left);
	check_image(path_of("own"), snap_of_standby(left));
	/* Now that it has epochs no other one will do */
	CHECK(run("standby", "--listen", "127.0.0.1:1", "--insecure", "--no-fence", "--ram-dir", left,
		  "--disk", path_of("other"), NULL) == 1, "it takes another disk");
	/* Nor if it is not known any more which it was: that is not what a switchover leaves */
	snprintf(link, sizeof(link), "%s/disk0", left);
	CHECK(!unlink(link), "there is no link to the image");
	CHECK(run("standby", "--listen", "127.0.0.1:1", "--insecure", "--no-fence", "--ram-dir", left,
		  "--disk", path_of("own"), NULL) == 1, "it takes any disk");
	CHECK(log_has("read the link to a disk image"), "it does not say why");
}

void test_disk_switchover(void)
{
	char *left = strdup(path_of("left"));

	start_disk(&qemu, LARGE_DISK_PAGES);
	start_qemu(&qemu);
	with_standby();
	start_protect(CHECKED, spec(), "--interval", "5ms", "--control", path_of("pctl"), "--leave-ram",
		      left, NULL);
	serve_until_log("protected since");
	be_qemu_for(200);
	CHECK(!run("status", path_of("pctl"), "switchover", NULL), "switchover failed");
	CHECK(serve() == 0, "it fails");
	/* Without a command the standby says where all of it is, and ends */
	CHECK(reap(&standby) == 0 && log_has("disk virtio0 12288000 "), "where is the disk?");
	check_image(path_of("image"), snap_of_standby(path_of("ram")));
	and_back(left);
	free(left);
}

/* No file of the standby can become large enough, for a while: the epoch is not lost, nor is it torn. */
void test_disk_full(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	unsigned int last;

	begin();
	be_qemu_for(100);
	stop_standby(SIGKILL);
	last = of_one_epoch();
	/* Of RAM it can write all, and of the disk half */
	start_standby_fsize(path_of("ram"), DISK_PAGES / 2 * KC_PAGE_SIZE, "--no-fence", "--timeout",
			    "0", "--insecure", "--disk", path_of("image"), NULL);
	while (!times_in(path_of("protect.log"), "trying again")) {
		CHECK(kc_now_us() < end, "it does not fail");
		step(&qemu, 1);
	}
	be_qemu_for(300);
	stop_standby(SIGKILL);
	CHECK(of_one_epoch() >= last, "an older epoch");
	with_standby();
	end = kc_now_us() + LIMIT_US;
	until_protected_again(2, end);
	finish();
}

void test_disk_refused(void)
{
	start_disk(&qemu, DISK_PAGES);
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	must_fail(protect(CHECKED, spec()), "the standby was given 0 images by --disk PATH");
	stop_standby(SIGTERM);
	CHECK(protect(CHECKED, path_of("store"), "--epochs", "1", "--disk", "external") == 0,
	      "--disk external does not help");
	must_fail(protect(CHECKED, spec(), "--disk", "node=vdb"), "has only 0 of the 1 disks");
	qemu.disks = "[{\"device\": \"vda\", \"inserted\": {\"ro\": false, \"image\": {\"virtual-size\": 4097}}}]";
	must_fail(protect(CHECKED, spec()), "multiple of 4096");
	CHECK(!qemu.disk.begun, "it mirrors");
}

/* QEMU knows the server, and begins no job. */
static const char *begins_none(struct qemu *q, const char *command)
{
	(void)q;
	return strcmp(command, "blockdev-mirror") ? NULL :
	       "{\"error\": {\"desc\": \"somebody else has a job there\"}}\n";
}

void test_disk_no_job(void)
{
	start_disk(&qemu, DISK_PAGES);
	start_qemu(&qemu);
	qemu.hook = begins_none;
	with_standby();
	must_fail(protect(CHECKED, spec()), "somebody else has a job there");
	CHECK(!qemu.disk.node, "it leaves QEMU with what it has begun");
	stop_standby(SIGTERM);
}

/* What a standby must not take for the disk */
void test_disk_images(void)
{
	start_disk(&qemu, DISK_PAGES);
	start_qemu(&qemu);
	write_text(path_of("image"), 0600, "QFI\xfb and more");
	with_standby();
	must_fail(protect(CHECKED, spec()), "is not raw");
	stop_standby(SIGTERM);
	write_text(path_of("image"), 0600, "small");
	with_standby();
	must_fail(protect(CHECKED, spec()), "has 5 bytes, and the guest's disk virtio0 1228800");
	stop_standby(SIGTERM);
	unlink(path_of("image"));
	/* QEMU's command has to use it */
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure", "--disk",
		      path_of("image"), "--no-trial", "--exec", "/bin/false {ram0} {ram1}");
	must_fail(protect(CHECKED, spec()), "does not use disk virtio0 of the guest, by {disk0}");
	stop_standby(SIGTERM);
	CHECK(run("standby", "--listen", "127.0.0.1:1", "--insecure", "--no-fence", "--ram-dir",
		  path_of("ram2"), "--disk", "/nowhere/image", NULL) == 1, "there is no such file");
	/* Another one than before */
	with_standby();
	start_protect(CHECKED, spec(), "--interval", "5ms", NULL);
	serve_until_log("protected since");
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "it fails");
	stop_standby(SIGTERM);
	CHECK(run("standby", "--listen", "127.0.0.1:1", "--insecure", "--no-fence", "--ram-dir",
		  path_of("ram"), "--disk", path_of("other"), NULL) == 1, "it takes another disk");
	CHECK(run("standby", "--listen", "127.0.0.1:1", "--insecure", "--no-fence", "--ram-dir",
		  path_of("ram"), NULL) == 1, "it does without the disk");
}

/* As QEMU would find it, and as it finds QEMU's */
void test_disk_locked(void)
{
	struct flock writes = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 201, .l_len = 1 };
	struct flock lock = { .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 201, .l_len = 1 };
	int fd;

	begin();
	fd = open(path_of("image"), O_RDWR | O_CLOEXEC);
	CHECK(fd >= 0 && !fcntl(fd, F_OFD_GETLK, &writes) && writes.l_type == F_RDLCK,
	      "anybody may write to the image");
	finish();
	CHECK(!fcntl(fd, F_OFD_SETLK, &lock), "it is locked still");
	CHECK(run("standby", "--listen", "127.0.0.1:1", "--insecure", "--no-fence", "--ram-dir",
		  path_of("ram"), "--disk", path_of("image"), NULL) == 1 &&
	      log_has("is in use by another program"), "it takes an image that is in use");
	close(fd);
}

/* Whoever comes to the NBD server */
void test_disk_garbage(void)
{
	static uint8_t junk[5000];
	unsigned int i, k;
	glob_t found;
	char *path;
	int fd;

	begin();
	CHECK(!glob(path_of("kvm-checkpoint.*/nbd"), 0, NULL, &found) && found.gl_pathc == 1,
	      "where is its socket?");
	path = found.gl_pathv[0];
	for (i = 0; i < 60; i++) {
		fd = nbd_connect_to(path);
		CHECK(fd >= 0, "it does not listen");
		for (k = 0; k < sizeof(junk); k++)
			junk[k] = rnd(&rng_state);
		if (i % 3 == 0) {
			send(fd, junk, below(sizeof(junk)), MSG_NOSIGNAL);
		} else if (i % 3 == 1) {
			CHECK(!nbd_negotiate(fd, i % 2 ? "7" : "x"), "it has a disk like that");
		} else {
			/* Beyond the end of the disk, and what is no request */
			CHECK(nbd_negotiate(fd, "0"), "it does not know its disk");
			CHECK(nbd_request(fd, 1, DISK_PAGES * 4096ull - 512, 1024, junk) == 22 &&
			      nbd_request(fd, 6, -1ull, 1024, NULL) == 22 &&
			      nbd_request(fd, 6, 0, -1u, NULL) == 22 &&
			      nbd_request(fd, 0, 0, 512, NULL) == 22 &&
			      nbd_request(fd, 99, 0, 0, NULL) == 22 &&
			      nbd_request(fd, 3, 0, 0, NULL) == 0, "it takes it");
			send(fd, junk, below(sizeof(junk)), MSG_NOSIGNAL);
		}
		close(fd);
		step(&qemu, 1);
	}
	/* The mirror may be taken for lost, as a connection was; then there are epochs again */
	be_qemu_for(300);
	be_qemu_for_epochs(5);
	finish();
	globfree(&found);
}

void test_disk_usage(void)
{
	CHECK(run("protect", "--qmp", "x", "--to", "tcp:a:1", "--disk", "some", NULL) == 2 &&
	      run("protect", "--qmp", "x", "--to", "tcp:a:1", "--disk", "node=", NULL) == 2 &&
	      run("protect", "--qmp", "x", "--to", "tcp:a:1", "--disk", "replicate", "--disk",
		  "external", NULL) == 2, "it takes what makes no sense");
	CHECK(run("standby", "--listen", "127.0.0.1:1", "--insecure", "--no-fence", "--disk", "",
		  NULL) == 2, "a disk without a name");
}
