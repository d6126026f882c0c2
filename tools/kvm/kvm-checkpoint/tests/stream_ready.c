// SPDX-License-Identifier: GPL-2.0-only
/*
 * A standby knows that its QEMU can load what it holds, and keeps what it could load until it knows
 * that of what came after.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ram.h"
#include "sim.h"
#include "status.h"
#include "stream_tests.h"
#include "vmstate.h"

/* --- Kinds of states ------------------------------------------------------ */

/* A stream with this description and run state; its length */
static size_t make_state(uint8_t *p, const char *run_state, const char *description)
{
	uint8_t *start = p, *desc;
	uint32_t n = strlen(description);

	memcpy(p, "QEVM\0\0\0\3\4\0\0\0\7\013globalstate\0\0\0\0\0\0\0\1\0\0\0\100", 37);
	memset(p + 37, 0, 100);
	memcpy(p + 37, run_state, strlen(run_state));
	p += 137;
	desc = p;
	desc[0] = 0;
	desc[1] = 6;
	desc[2] = n >> 24;
	desc[3] = n >> 16;
	desc[4] = n >> 8;
	desc[5] = n;
	memcpy(desc + 6, description, n);
	return desc + 6 + n - start;
}

#define DEVICE(name, instance, fields) \
	"{\"name\": \"" name "\", \"instance_id\": " instance ", \"fields\": " fields "}"
#define DEVICES(list) "{\"page_size\": 4096, \"devices\": [" list "]}"

static const char two[] = DEVICES(DEVICE("timer", "0", "[]") ", " DEVICE("cpu", "0", "[]"));

void test_kinds(void)
{
	static const char * const others[] = {
		DEVICES(DEVICE("timer", "0", "[]")),
		DEVICES(DEVICE("timer", "0", "[]") ", " DEVICE("cpu", "1", "[]")),
		DEVICES(DEVICE("timer", "0", "[]") ", " DEVICE("serial", "0", "[]")),
		"{\"devices\": 7}", "{\"devices\": [7, null]}", "{", "",
	};
	const char *same = DEVICES(DEVICE("timer", "0", "[{\"size\": 4}]") ", "
				   DEVICE("cpu", "0", "[{\"size\": 8}]"));
	struct kc_vmstate_memo memo = { 0 };
	uint8_t state[2000], junk[2000];
	uint64_t kind;
	size_t len, i;

	len = make_state(state, "running", two);
	kind = kc_vmstate_kind(state, len, &memo);
	CHECK(kind == kc_vmstate_kind(state, len, NULL), "the memo makes a difference");
	len = make_state(state, "running", same);
	CHECK(kind == kc_vmstate_kind(state, len, &memo), "fields make a difference");
	len = make_state(state, "save-vm", two);
	CHECK(kind != kc_vmstate_kind(state, len, &memo), "the run state makes none");
	for (i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
		len = make_state(state, "running", others[i]);
		CHECK(kind != kc_vmstate_kind(state, len, &memo), "%s makes none", others[i]);
	}
	/* It is found wherever it is now, and not where it was */
	for (i = 0; i < 200; i++) {
		len = make_state(state, below(2) ? "running" : "paused", below(2) ? two : same);
		kc_vmstate_kind(state, len, &memo);
		memmove(state + 8 + i, state + 8, len - 8);
		memset(state + 8, 0, i);
		CHECK(kc_vmstate_kind(state, len + i, &memo) == kc_vmstate_kind(state, len + i, NULL),
		      "the memo makes a difference to one that has moved");
		len = make_state(state, "running", "");
		CHECK(kc_vmstate_kind(state, len, &memo) == kc_vmstate_kind(state, len, NULL),
		      "the memo makes a difference to one without a description");
	}
	/* Whatever it is, it is looked at without harm. */
	for (i = 0; i < 20000; i++) {
		len = make_state(state, "running", two);
		memcpy(junk, state, len);
		junk[8 + below(len - 8)] ^= 1u << below(8);
		kc_vmstate_kind(junk, below(8) ? len : below(len), &memo);
	}
}

/* --- A standby with a QEMU ------------------------------------------------ */

static char self[PATH_MAX], pid_file[PATH_MAX - 10];

static void start_ready_standby(const char *timeout)
{
	/* QEMU is to be found again when the standby is gone. */
	CHECK(!prctl(PR_SET_CHILD_SUBREAPER, 1), "cannot adopt");
	memset(self, 0, sizeof(self));
	CHECK(readlink("/proc/self/exe", self, sizeof(self) - 1) > 0, "where is this program?");
	snprintf(pid_file, sizeof(pid_file), "%s/qemu", dir);
	start_standby(path_of("ram"), "--no-fence", "--timeout", timeout, "--", self, "--be-qemu",
		      "running", pid_file, "share=on,mem-path={ram0}", "{ram1}");
}

static unsigned int times(const char *line)
{
	unsigned int n = 0;
	uint8_t *buf;
	size_t len;
	char *p;

	if (!exists(path_of("qemu.log")))
		return 0;
	read_all(path_of("qemu.log"), &buf, &len);
	buf[len] = '\0';
	for (p = (char *)buf; (p = strstr(p, line)); p++)
		n++;
	free(buf);
	return n;
}

static void wait_times(const char *line, unsigned int n)
{
	uint64_t end = kc_now_us() + 20000000;

	for (; times(line) < n; poll(NULL, 0, 5))
		CHECK(kc_now_us() < end, "there were %u times \"%s\"", times(line), line);
}

/* The next epoch, with a state of this kind; how that ends */
static int send_kind(struct sim *g, struct kc_sink *s, unsigned int flags, const char *run_state)
{
	int rc;

	sim_step(g);
	g->state_len = make_state(g->state, run_state, two);
	rc = sim_send(g, s, flags);
	return rc ? rc : kc_sink_wait(s, g->epoch, 20000, &err);
}

/* The standby holds this one, to the byte. */
static void compare_kind(uint64_t epoch, const char *run_state)
{
	struct sim g;

	sim_init(&g);
	sim_goto(&g, epoch);
	g.state_len = make_state(g.state, run_state, two);
	compare_standby(&g, path_of("ram"));
	sim_free(&g);
}

static void must_not_load(int rc, const char *text)
{
	CHECK(rc == -EREMOTEIO && strstr(err.text, text), "%d: %s", rc, err.text);
}

static pid_t pid_in(const char *path)
{
	uint8_t *buf;
	size_t len;
	pid_t pid;

	read_all(path, &buf, &len);
	buf[len] = '\0';
	pid = atoi((char *)buf);
	free(buf);
	return pid;
}

/* QEMU is there, and not with the standby; and now it is not. */
static void must_have_qemu(void)
{
	pid_t pid = pid_in(pid_file);

	CHECK(!kill(pid, SIGKILL), "QEMU ends with the standby");
	waitpid(pid, NULL, 0);
}

/* The one that was started last is gone, or is about to. */
static void must_not_have_qemu(void)
{
	pid_t pid = pid_in(path_of("qemu.started"));
	uint64_t end = kc_now_us() + 20000000;

	while (!waitpid(pid, NULL, WNOHANG)) {
		CHECK(kc_now_us() < end, "QEMU is left when the standby is gone");
		poll(NULL, 0, 5);
	}
}

void test_trial(void)
{
	struct kc_sink *s;
	struct sim g;
	char *answer;

	start_ready_standby("0");
	sim_init(&g);
	s = must_open(spec());
	/* One that cannot be loaded is none. */
	write_text(path_of("qemu.refuse"), 0600, "starting\nUnknown savevm section 'serial' 1\n");
	must_not_load(send_kind(&g, s, KC_EPOCH_FULL, "running"),
		      "cannot load epoch 1: qemu: starting; qemu: Unknown savevm section");
	kc_sink_close(s);
	CHECK(kc_ctl_request(path_of("ctl"), "promote", &answer, &err) == -EREMOTEIO,
	      "it would take over");
	unlink(path_of("qemu.refuse"));
	s = must_open(spec());
	CHECK(!kc_sink_last_epoch(s), "it says that it has epoch %" PRIu64, kc_sink_last_epoch(s));
	OK(send_kind(&g, s, KC_EPOCH_FULL, "running"));
	OK(send_kind(&g, s, 0, "running"));
	compare_kind(3, "running");
	wait_times("start shared", 1);
	CHECK(times("load private") == 1 && times("start private") == 2, "it tries them all");
	/* Another kind. */
	OK(send_kind(&g, s, 0, "paused"));
	CHECK(times("load private") == 2, "it does not try another kind");
	OK(send_kind(&g, s, 0, "running"));
	CHECK(times("load private") == 2, "it tries the same kind again");
	/* And one that cannot be loaded: what was before stays. */
	write_text(path_of("qemu.refuse"), 0600, "Unexpected run state\n");
	must_not_load(send_kind(&g, s, 0, "save-vm"),
		      "cannot load epoch 6: qemu: Unexpected run state");
	kc_sink_close(s);
	wait_log("lost the primary");
	compare_kind(5, "running");
	s = must_open(spec());
	CHECK(kc_sink_last_epoch(s) == 5, "it says that it has epoch %" PRIu64,
	      kc_sink_last_epoch(s));
	unlink(path_of("qemu.refuse"));
	OK(send_kind(&g, s, KC_EPOCH_RESYNC, "save-vm"));
	compare_kind(7, "save-vm");
	wait_times("start shared", 3);
	/* QEMU that waits takes over, and no other one. */
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	wait_log("taken over at epoch 7");
	CHECK(times("load shared") == 1 && times("start shared") == 3 && times("start private") == 5,
	      "another QEMU was started");
	CHECK(!log_has("no QEMU has been started ahead"), "none was ready");
	stop_standby(SIGTERM);
	must_have_qemu();
	sim_free(&g);
}

/* It takes longer than a peer may be silent, while the primary has more than fits into the link. */
void test_slow_trial(void)
{
	struct kc_sink_opts o = opts;
	struct kc_sink *s;
	struct sim g;
	pid_t pid;

	/* A third of what the trial takes, and more than a busy machine does */
	o.io_timeout_ms = 1000;
	start_ready_standby("1s");
	write_text(path_of("qemu.slow"), 0600, "");
	sim_init(&g);
	s = kc_sink_open(spec(), &o, &guest, &err);
	CHECK(s, "%s", err.text);
	sim_step(&g);
	g.state_len = make_state(g.state, "running", two);
	OK(sim_send(&g, s, KC_EPOCH_FULL));
	wait_times("take private", 1);
	pid = fork();
	if (!pid) {
		poll(NULL, 0, 3000);
		unlink(path_of("qemu.slow"));
		_exit(0);
	}
	while (exists(path_of("qemu.slow"))) {
		sim_step(&g);
		g.state_len = make_state(g.state, "running", two);
		OK(sim_send(&g, s, KC_EPOCH_FULL));
	}
	waitpid(pid, NULL, 0);
	OK(kc_sink_wait(s, g.epoch, 20000, &err));
	CHECK(!log_has("failing over") && !log_has("lost the primary"), "the link was lost");
	kc_sink_end(s, KC_END_DETACH);
	kc_sink_close(s);
	stop_standby(SIGTERM);
	sim_free(&g);
}

/* The standby is killed while it does not know. */
void test_trial_killed(void)
{
	struct kc_sink *s;
	struct sim g;
	unsigned int i;

	start_ready_standby("0");
	sim_init(&g);
	s = must_open(spec());
	for (i = 0; i < 3; i++)
		OK(send_kind(&g, s, i ? 0 : KC_EPOCH_FULL, "running"));
	write_text(path_of("qemu.slow"), 0600, "");
	sim_step(&g);
	g.state_len = make_state(g.state, "save-vm", two);
	OK(sim_send(&g, s, 0));
	wait_times("take private", 2);
	stop_standby(SIGKILL);
	kc_sink_close(s);
	must_not_have_qemu();
	/* The others were ended by it. */
	CHECK(ram_epoch(path_of("ram")) == 3, "the last epoch is %" PRIu64,
	      ram_epoch(path_of("ram")));
	compare_kind(3, "running");
	start_ready_standby("0");
	unlink(path_of("qemu.slow"));
	s = must_open(spec());
	OK(send_kind(&g, s, KC_EPOCH_RESYNC, "running"));
	compare_kind(5, "running");
	kc_sink_close(s);
	wait_times("start shared", 2);
	stop_standby(SIGTERM);
	sim_free(&g);
}

/* A standby has one epoch, and a QEMU that waits for the guest. */
static struct kc_sink *begin_waiting(struct sim *g)
{
	struct kc_sink *s;

	start_ready_standby("0");
	sim_init(g);
	s = must_open(spec());
	OK(send_kind(g, s, KC_EPOCH_FULL, "running"));
	wait_times("greet shared", 1);
	return s;
}

/* The standby is killed while it starts QEMU, and while that waits for the guest. */
void test_ahead_killed(void)
{
	struct kc_sink *s;
	struct sim g;

	s = begin_waiting(&g);
	stop_standby(SIGKILL);
	kc_sink_close(s);
	must_not_have_qemu();

	write_text(path_of("qemu.mute"), 0600, "");
	start_ready_standby("0");
	s = must_open(spec());
	sim_step(&g);
	g.state_len = make_state(g.state, "running", two);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	wait_times("start private", 2);
	stop_standby(SIGKILL);
	kc_sink_close(s);
	must_not_have_qemu();
	unlink(path_of("qemu.mute"));
	sim_free(&g);
}

/* A standby has one epoch, and tries to load the second one, which takes for ever. */
static struct kc_sink *begin_slow_trial(struct sim *g, const char *timeout)
{
	struct kc_sink *s;

	start_ready_standby(timeout);
	sim_init(g);
	s = must_open(spec());
	OK(send_kind(g, s, KC_EPOCH_FULL, "running"));
	write_text(path_of("qemu.slow"), 0600, "");
	sim_step(g);
	g->state_len = make_state(g->state, "save-vm", two);
	OK(sim_send(g, s, 0));
	wait_times("take private", 2);
	return s;
}

/* It is needed while it does not know: then as of what it knows. */
void test_trial_promoted(void)
{
	struct kc_sink *s;
	struct sim g;

	s = begin_slow_trial(&g, "0");
	CHECK(!run("status", path_of("ctl"), "promote", NULL), "promote failed");
	wait_log("failing over to epoch 1");
	unlink(path_of("qemu.slow"));
	kc_sink_close(s);
	wait_log("taken over at epoch 1");
	compare_kind(1, "running");
	stop_standby(SIGTERM);
	must_have_qemu();
	sim_free(&g);
}

/* The primary dies meanwhile, which is noticed although nobody reads what it sends. */
void test_trial_silence(void)
{
	struct kc_sink *s;
	struct sim g;
	unsigned int i;

	s = begin_slow_trial(&g, "2s");
	/* As long as it lives, there is time. */
	for (i = 0; i < 200; i++) {
		OK(kc_sink_poll(s, NULL, &err));
		poll(NULL, 0, 20);
	}
	CHECK(!log_has("failing over"), "the primary of a guest that lives is missed");
	kc_sink_close(s);
	wait_log("failing over to epoch 1: the primary has been silent");
	unlink(path_of("qemu.slow"));
	wait_log("taken over at epoch 1");
	stop_standby(SIGTERM);
	must_have_qemu();
	sim_free(&g);
}

/* QEMU that waits does not have to be there for ever. */
void test_warm_dies(void)
{
	struct kc_sink *s;
	struct sim g;

	s = begin_waiting(&g);
	kill(pid_in(path_of("qemu.started")), SIGKILL);
	while (times("start shared") < 2) {
		OK(send_kind(&g, s, 0, "running"));
		poll(NULL, 0, 20);
		CHECK(g.epoch < 1000, "no other QEMU is started");
	}
	CHECK(log_has("QEMU that waited for the guest has ended"), "it does not say so");
	kc_sink_close(s);
	stop_standby(SIGTERM);
	sim_free(&g);
}
