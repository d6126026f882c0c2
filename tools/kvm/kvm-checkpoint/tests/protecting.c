// SPDX-License-Identifier: GPL-2.0-only
/*
 * Running protect against the fake QEMU, and what is kept of its guest.
 */
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "protecting.h"
#include "store.h"

/* The keys for it, if any */
const char *key_file;

void start_protect(const char *which, const char *to, ...)
{
	const char *argv[30] = {
		which, "protect", "--qmp", path_of("qmp"), "--to", to,
		key_file ? "--psk-file" : "--insecure", key_file,
	};
	va_list ap;

	va_start(ap, to);
	add_args(argv, key_file ? 8 : 7, ap);
	va_end(ap);
	qemu.client = spawn(argv, 0);
}

/* Be QEMU until it says this */
void serve_until_log(const char *text)
{
	uint64_t end = kc_now_us() + LIMIT_US;

	while (!log_has(text)) {
		siginfo_t si = { 0 };

		waitid(P_PID, qemu.client, &si, WEXITED | WNOHANG | WNOWAIT);
		CHECK(kc_now_us() < end && !si.si_pid, "\"%s\" never appeared in the log", text);
		step(&qemu, 1);
	}
}

/* Be QEMU until protect ends, and then what it leaves is tidied up; its exit status */
int serve(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	int status;

	while (waitpid(qemu.client, &status, WNOHANG) != qemu.client) {
		CHECK(kc_now_us() < end, "protect hangs");
		step(&qemu, 1);
	}
	while (qemu.listener >= 0 && (qemu.monitor >= 0 || qemu.sock >= 0)) {
		CHECK(kc_now_us() < end, "protect left something open");
		step(&qemu, 1);
	}
	CHECK(qemu.listener < 0 || !qemu.attached, "protect leaves QEMU attached");
	CHECK(!qemu.stopped, "protect leaves the guest stopped");
	CHECK(WIFEXITED(status), "protect dies of signal %d", WTERMSIG(status));
	/* What a sanitizer says */
	CHECK(!log_has("runtime error") && !log_has("Sanitizer"), "protect is wrong");
	return WEXITSTATUS(status);
}

/* That many epochs, as fast as they come, without a failure */
void protect_epochs(const char *to, const char *epochs)
{
	/* However busy the machine is, none of them is late and taken again */
	CHECK(protect(CHECKED, to, "--epochs", epochs, "--interval", "1ms", "--pause-limit", "60s") == 0,
	      "protect fails");
}

void must_fail(int status, const char *text)
{
	CHECK(status == 1, "it ends with %d, and should say \"%s\"", status, text);
	CHECK(log_has(text), "it does not say \"%s\"", text);
}

/* --- What was kept -------------------------------------------------------- */

void be_qemu_for(unsigned int ms)
{
	uint64_t end = kc_now_us() + ms * 1000ull;

	while (kc_now_us() < end)
		step(&qemu, 1);
}

/* Until that many epochs more are taken: on a busy machine, no time is long enough for that. */
void be_qemu_for_epochs(unsigned int n)
{
	uint64_t end = kc_now_us() + LIMIT_US;

	for (n += qemu.nr_snaps; qemu.nr_snaps < n; step(&qemu, 1))
		CHECK(kc_now_us() < end, "%u epochs, and no more", qemu.nr_snaps);
}

/*
 * Until a daemon has done what it can do for now.  On a busy machine it may want to run for long
 * before it does, so that no time is long enough for that either.
 */
void be_qemu_until_asleep(pid_t pid)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	unsigned int i;

	for (i = 0; i < 50; i = is_asleep(pid) ? i + 1 : 0) {
		CHECK(kc_now_us() < end, "it is never at rest");
		be_qemu_for(2);
	}
}

const char *fence(void)
{
	char text[PATH_MAX + 50];

	snprintf(text, sizeof(text), "#!/bin/sh\n>%s/fenced\n", dir);
	return script("fence", text);
}

/* The files hold a guest as it was when it was whole; which of these */
unsigned int which_snap(const char *where, const char *state, bool stopped)
{
	unsigned int files = 0, i;
	char path[PATH_MAX];
	struct snap *s;
	uint64_t nr;
	uint8_t *buf;
	size_t len;

	snprintf(path, sizeof(path), "%s/%s", where, state);
	read_all(path, &buf, &len);
	CHECK(len > sizeof(nr), "%s has %zu bytes", path, len);
	memcpy(&nr, buf, sizeof(nr));
	CHECK(nr < qemu.nr_snaps, "%s is no state of the guest", path);
	s = &qemu.snaps[nr];
	CHECK(!s->torn, "epoch %" PRIu64 " is torn", nr);
	CHECK(len == s->state_len && !memcmp(buf, s->state, len),
	      "%s is not the state of epoch %" PRIu64, path, nr);
	CHECK(stopped == s->stopped, "epoch %" PRIu64 ": was it stopped?", nr);
	free(buf);
	for (i = 0; i < NR_BLOCKS; i++) {
		uint64_t page;

		if (!qemu.blocks[i].shared)
			continue;
		snprintf(path, sizeof(path), "%s/ram%u", where, files++);
		read_all(path, &buf, &len);
		CHECK(len == qemu.blocks[i].npages * KC_PAGE_SIZE, "%s has %zu bytes", path, len);
		for (page = 0; page < qemu.blocks[i].npages; page++)
			CHECK((!i && s->undefined && s->undefined[page]) ||
			      !memcmp(buf + page * KC_PAGE_SIZE, s->ram[i] + page * KC_PAGE_SIZE,
				      KC_PAGE_SIZE),
			      "page %" PRIu64 " in %s is not that of epoch %" PRIu64, page, path, nr);
		free(buf);
	}
	return nr;
}

void check_image(const char *path, unsigned int snap)
{
	uint64_t page;
	uint8_t *buf;
	size_t len;

	read_all(path, &buf, &len);
	CHECK(len == qemu.disk.npages * KC_PAGE_SIZE, "%s has %zu bytes", path, len);
	for (page = 0; page < qemu.disk.npages; page++)
		CHECK(!memcmp(buf + page * KC_PAGE_SIZE,
			      qemu.snaps[snap].disk + page * KC_PAGE_SIZE, KC_PAGE_SIZE),
		      "page %" PRIu64 " of the disk is not that of epoch %u", page, snap);
	free(buf);
}

unsigned int snap_of_standby(const char *ram_dir)
{
	char name[32];

	snprintf(name, sizeof(name), "state-%" PRIu64, ram_epoch(ram_dir));
	return which_snap(ram_dir, name, log_has("\nstopped\n"));
}

/* All epochs in the directory; how many, and the last one's snap in @last */
unsigned int check_store(unsigned int *last)
{
	char *store = strdup(path_of("store"));
	unsigned int snap, n;
	struct kc_store st;
	char nr[32];
	size_t i;
	int rc;

	OK(kc_store_read(store, &st, &err));
	for (i = 0; i < st.nr_files; i++) {
		snprintf(nr, sizeof(nr), "%" PRIu64, st.files[i].nr);
		remove_tree(path_of("restored"));
		unlink(path_of("log"));
		unlink(path_of("restored-disk"));
		if (qemu.disk.npages)
			rc = run("restore", "--epoch", nr, "--ram-dir", path_of("restored"),
				 "--disk", path_of("restored-disk"), store, NULL);
		else
			rc = run("restore", "--epoch", nr, "--ram-dir", path_of("restored"), store,
				 NULL);
		CHECK(!rc, "cannot restore epoch %s", nr);
		snap = which_snap(path_of("restored"), "state", log_has("\nstopped\n"));
		if (qemu.disk.npages)
			check_image(path_of("restored-disk"), snap);
		CHECK(!i || snap > *last, "epoch %s is older than the one before", nr);
		*last = snap;
	}
	n = st.nr_files;
	kc_store_free(&st);
	free(store);
	return n;
}

/* --- What several tests have happen to it ---------------------------------- */

const char *meddles(struct qemu *q, const char *command)
{
	if (!strcmp(command, STOP) && q->stops % 3 == 1)
		q->tear = q->stops % 2 ? RESUMED : SCRIBBLED;
	return NULL;
}

unsigned int times_in(const char *path, const char *text)
{
	unsigned int n = 0;
	uint8_t *buf;
	size_t len;
	char *p;

	read_all(path, &buf, &len);
	buf[len] = '\0';
	for (p = (char *)buf; (p = strstr(p, text)); p++)
		n++;
	free(buf);
	return n;
}

unsigned int times_in_log(const char *text)
{
	return times_in(path_of("log"), text);
}

const char *stops_standby(struct qemu *q, const char *command)
{
	if (!strcmp(command, COLLECT) && q->running)
		freeze(standby);
	return NULL;
}

unsigned int kill_in;

const char *kills_standby_later(struct qemu *q, const char *command)
{
	if (kill_in && !--kill_in)
		stop_standby(SIGKILL);
	(void)q;
	(void)command;
	return NULL;
}

void each_ram(const char *where, void (*fn)(struct block *b, const uint8_t *ram))
{
	unsigned int i, n = 0;
	char name[PATH_MAX];
	uint8_t *ram;
	size_t len;

	for (i = 0; i < NR_BLOCKS; i++) {
		struct block *b = &qemu.blocks[i];

		if (!b->shared)
			continue;
		snprintf(name, sizeof(name), "%s/ram%u", where, n++);
		read_all(name, &ram, &len);
		CHECK(len == b->npages * KC_PAGE_SIZE, "%s has another size", name);
		fn(b, ram);
		free(ram);
	}
}
