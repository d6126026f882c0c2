// SPDX-License-Identifier: GPL-2.0-only
/*
 * protect_test [-s SEED] [-t NAME]... KVM-CHECKPOINT CHECKED IMPATIENT
 *
 * kvm-checkpoint protect against a QEMU that is part of this program: it answers to the commands
 * that qemu/dirty-slot-ring.patch describes, has a guest that writes to its memory, and remembers
 * what that was at each epoch.  It also can do all that a QEMU should not do.  Prints KTAP.
 *
 * CHECKED is the program built with sanitizers, IMPATIENT as well, and waits only seconds for QEMU.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <json-c/json.h>

#include "sink.h"
#include "store.h"
#include "harness.h"

#define CHECKED		programs[1]
#define IMPATIENT	programs[2]

#define NR_BLOCKS	3
#define MAX_SNAPS	256
#define STATE_ROOM	30000u

/* Nothing that protect does takes so long */
#define LIMIT_US	60000000ull

#define ATTACH	"x-checkpoint-attach"
#define LAYOUT	"x-checkpoint-layout"
#define STOP	"x-checkpoint-stop"
#define COLLECT	"x-checkpoint-collect"
#define CONT	"x-checkpoint-cont"

/* --- QEMU ----------------------------------------------------------------- */

struct block {
	const char *name;
	uint64_t npages;
	bool shared;
	int fd;
	uint8_t *ram;
	bool *dirty;
};

/* The guest when its state was saved; the state begins with the index */
struct snap {
	uint8_t *ram[NR_BLOCKS], *state;
	size_t state_len;
	bool torn, stopped;
};

/* As x-checkpoint-collect writes it */
struct pages {
	uint32_t block, npages;
	uint64_t page;
};

enum tear { WHOLE, RESUMED, SCRIBBLED };

static struct qemu {
	struct block blocks[NR_BLOCKS];
	int listener, monitor, sock, buffer;
	int sent_fd, got_socket, got_buffer;
	struct json_tokener *tok;
	bool attached, running, stopped, mute;
	uint64_t generation;
	const char *disks;		/* what query-block returns */
	const char *layout, *new_layout;	/* what attach and layout say, but for the truth */
	enum tear tear;			/* what happens to the next epoch */
	struct snap snaps[MAX_SNAPS];
	unsigned int nr_snaps;

	/* What came so far, looks are collects of a running guest */
	unsigned int attaches, stops, looks, collects, conts, layouts;

	/*
	 * Asked before a command is obeyed: NULL, or what to say instead, or one of these.  After
	 * dies_after the answer is given and then everything closed.
	 */
	const char *(*hook)(struct qemu *q, const char *command);
	bool dies_after;
	const char *last_words;		/* before it dies */
	pid_t client;
} qemu = {
	.blocks = {
		{ .name = "pc.ram", .npages = 1024, .shared = true },
		{ .name = "pc.bios", .npages = 64 },
		{ .name = "/objects/ram1", .npages = 77, .shared = true },
	},
	.disks = "[]",
};

static const char silent[] = "silent", dead[] = "dead";	/* from now on, and at once */

/* Writes some words, or nothing, or zeros */
static void write_page(struct block *b, uint64_t page)
{
	uint8_t *p = b->ram + page * KC_PAGE_SIZE;
	unsigned int i;
	uint64_t v;

	b->dirty[page] = true;
	switch (below(6)) {
	case 0:
		memset(p, 0, KC_PAGE_SIZE);
		break;
	case 1:
		break;
	case 2:
		for (i = 0; i < KC_PAGE_SIZE; i += 8) {
			v = rnd(&rng_state);
			memcpy(p + i, &v, 8);
		}
		break;
	default:
		v = rnd(&rng_state);
		memcpy(p + below(KC_PAGE_SIZE / 8) * 8, &v, 8);
	}
}

static void guest_writes(struct qemu *q, unsigned int n)
{
	while (n--) {
		struct block *b = &q->blocks[below(8) ? 0 : 2];

		write_page(b, below(b->npages));
	}
}

static void start_qemu(struct qemu *q)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	unsigned int i;

	for (i = 0; i < NR_BLOCKS; i++) {
		struct block *b = &q->blocks[i];

		if (!b->shared)
			continue;
		b->fd = memfd_create(b->name + (*b->name == '/'), MFD_CLOEXEC);
		CHECK(b->fd >= 0 && !ftruncate(b->fd, b->npages * KC_PAGE_SIZE), "no memory");
		b->ram = mmap(NULL, b->npages * KC_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED,
			      b->fd, 0);
		b->dirty = calloc(b->npages, sizeof(*b->dirty));
		CHECK(b->ram != MAP_FAILED && b->dirty, "no memory");
	}
	/* The others are holes. */
	guest_writes(q, 500);
	q->monitor = -1;
	q->sock = -1;
	q->buffer = -1;
	q->sent_fd = -1;
	q->got_socket = -1;
	q->got_buffer = -1;
	q->running = true;
	q->tok = json_tokener_new();
	q->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	snprintf(sun.sun_path, sizeof(sun.sun_path), "%s/qmp", dir);
	CHECK(!bind(q->listener, (struct sockaddr *)&sun, sizeof(sun)) && !listen(q->listener, 5),
	      "cannot listen on %s: %s", sun.sun_path, strerror(errno));
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

static void close_monitor(struct qemu *q)
{
	close_fd(&q->monitor);
	close_fd(&q->sent_fd);
	close_fd(&q->got_socket);
	close_fd(&q->got_buffer);
	json_tokener_reset(q->tok);
	q->mute = false;
}

/* The client has closed its socket */
static void detach(struct qemu *q)
{
	if (q->stopped)
		q->running = true;
	q->stopped = false;
	q->attached = false;
	close_fd(&q->sock);
	close_fd(&q->buffer);
}

static void die(struct qemu *q)
{
	close_monitor(q);
	close_fd(&q->sock);
	close_fd(&q->buffer);
	close_fd(&q->listener);
	q->running = false;
	q->stopped = false;
}

/* The client may be gone: then this does nothing */
static void say_bytes(struct qemu *q, const char *text, size_t len)
{
	ssize_t n;

	for (; q->monitor >= 0 && len; len -= n, text += n) {
		n = send(q->monitor, text, len, MSG_NOSIGNAL);
		if (n < 0)
			return;
	}
}

static void say(struct qemu *q, const char *text)
{
	say_bytes(q, text, strlen(text));
}

__attribute__((format(printf, 2, 3)))
static void answer(struct qemu *q, const char *fmt, ...)
{
	char text[2000];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	say(q, "{\"return\": ");
	say(q, text);
	say(q, "}\r\n");
}

static void refuse(struct qemu *q, const char *why)
{
	say(q, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"");
	say(q, why);
	say(q, "\"}}\r\n");
}

static void send_event(struct qemu *q, const char *name)
{
	char text[200];

	snprintf(text, sizeof(text),
		 "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"%s\"}\r\n",
		 name);
	say(q, text);
}

static void send_fds(struct qemu *q)
{
	union {
		char buf[CMSG_SPACE(NR_BLOCKS * sizeof(int))];
		struct cmsghdr align;
	} control = { 0 };
	struct iovec iov = { "", 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf,
	};
	int fds[NR_BLOCKS], n = 0, i;
	struct cmsghdr *c;

	for (i = 0; i < NR_BLOCKS; i++) {
		if (q->blocks[i].shared)
			fds[n++] = q->blocks[i].fd;
	}
	msg.msg_controllen = CMSG_SPACE(n * sizeof(int));
	c = CMSG_FIRSTHDR(&msg);
	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(n * sizeof(int));
	memcpy(CMSG_DATA(c), fds, n * sizeof(int));
	CHECK(sendmsg(q->sock, &msg, MSG_NOSIGNAL) == 1, "cannot send memory: %s", strerror(errno));
}

static void send_layout(struct qemu *q, const char *instead)
{
	char text[1000] = "";
	size_t n = 0;
	int i;

	send_fds(q);
	if (instead) {
		say(q, instead);
		return;
	}
	for (i = 0; i < NR_BLOCKS; i++)
		n += snprintf(text + n, sizeof(text) - n,
			      "%s{\"name\": \"%s\", \"pages\": %" PRIu64 ", \"shared\": %s}",
			      i ? ", " : "", q->blocks[i].name, q->blocks[i].npages,
			      q->blocks[i].shared ? "true" : "false");
	answer(q,
	       "{\"generation\": %" PRIu64 ", \"page-size\": 4096, \"dirty-log\": \"bitmap\", "
	       "\"blocks\": [%s], \"slots\": []}",
	       q->generation, text);
}

static void do_attach(struct qemu *q)
{
	int i;

	if (q->attached) {
		refuse(q, "a client is attached already");
		return;
	}
	CHECK(q->got_socket >= 0 && q->got_buffer >= 0, "attaches without sending a socket");
	q->sock = q->got_socket;
	q->buffer = q->got_buffer;
	q->got_socket = -1;
	q->got_buffer = -1;
	q->attached = true;
	q->generation++;
	for (i = 0; i < NR_BLOCKS; i++) {
		if (q->blocks[i].shared)
			memset(q->blocks[i].dirty, 0, q->blocks[i].npages);
	}
	send_layout(q, q->layout);
}

static void do_stop(struct qemu *q)
{
	bool ran = q->running;

	if (ran) {
		guest_writes(q, below(40));
		send_event(q, "STOP");
	}
	q->stopped = ran;
	q->running = false;
	answer(q, "{\"running\": %s, \"status\": \"paused\"}", ran ? "true" : "false");
}

/* The guest as it is now; its state says which of these it is */
static struct snap *take_snap(struct qemu *q)
{
	uint64_t nr = q->nr_snaps;
	struct snap *s;
	size_t i;

	CHECK(nr < MAX_SNAPS, "this goes on for ever");
	s = &q->snaps[q->nr_snaps++];
	for (i = 0; i < NR_BLOCKS; i++) {
		size_t size = q->blocks[i].npages * KC_PAGE_SIZE;

		if (q->blocks[i].shared) {
			s->ram[i] = malloc(size);
			memcpy(s->ram[i], q->blocks[i].ram, size);
		}
	}
	s->state_len = 1000 + below(STATE_ROOM);
	s->state = malloc(s->state_len);
	for (i = 0; i < s->state_len; i++)
		s->state[i] = i % 100 ? i : rnd(&rng_state);
	memcpy(s->state, &nr, sizeof(nr));
	s->stopped = !q->stopped;
	s->torn = q->tear != WHOLE;
	return s;
}

static void write_buffer(struct qemu *q, const void *data, size_t len, uint64_t at)
{
	CHECK(pwrite(q->buffer, data, len, at) == (ssize_t)len, "cannot write to the buffer");
}

/* Tells runs of dirty pages from this place in the buffer on; how many */
static unsigned int write_runs(struct qemu *q, uint64_t at)
{
	unsigned int n = 0, i;
	uint64_t page;

	for (i = 0; i < NR_BLOCKS; i++) {
		struct block *b = &q->blocks[i];
		struct pages run = { .block = i };

		for (page = 0; b->shared && page <= b->npages; page++) {
			if (page < b->npages && b->dirty[page]) {
				if (!run.npages++)
					run.page = page;
				b->dirty[page] = false;
			} else if (run.npages) {
				write_buffer(q, &run, sizeof(run), at + n++ * sizeof(run));
				run.npages = 0;
			}
		}
	}
	return n;
}

static void do_collect(struct qemu *q, bool state)
{
	uint64_t at = 0, runs;
	unsigned int n;

	if (state && q->tear == RESUMED) {
		q->running = true;
		q->stopped = false;
		send_event(q, "RESUME");
	}
	if (state && !q->running) {
		struct snap *s;

		/* Devices flush what they have */
		if (q->stopped)
			guest_writes(q, below(3));
		s = take_snap(q);
		write_buffer(q, s->state, s->state_len, 0);
		at = s->state_len;
	}
	runs = (at + 15) / 16 * 16;
	n = write_runs(q, runs);
	if (state && q->tear != WHOLE)
		guest_writes(q, 20);
	answer(q,
	       "{\"generation\": %" PRIu64 ", \"state-size\": %" PRIu64 ", \"offset\": %" PRIu64
	       ", \"runs\": %u, \"collect-us\": 3}",
	       q->generation, at, runs, n);
}

static void do_cont(struct qemu *q)
{
	if (q->stopped) {
		q->running = true;
		q->stopped = false;
		send_event(q, "RESUME");
	}
	answer(q, "{\"resumed\": %s, \"consistent\": %s}", q->running ? "true" : "false",
	       q->tear == WHOLE ? "true" : "false");
	q->tear = WHOLE;
}

static void do_getfd(struct qemu *q, const char *name)
{
	int *fd = strstr(name, "socket") ? &q->got_socket : &q->got_buffer;

	CHECK(q->sent_fd >= 0, "getfd without a file descriptor");
	close_fd(fd);
	*fd = q->sent_fd;
	q->sent_fd = -1;
	answer(q, "{}");
}

static void obey(struct qemu *q, const char *command, struct json_object *args)
{
	struct json_object *o;

	if (!strcmp(command, ATTACH))
		do_attach(q);
	else if (!strcmp(command, LAYOUT))
		send_layout(q, q->new_layout);
	else if (!strcmp(command, STOP))
		do_stop(q);
	else if (!strcmp(command, COLLECT))
		do_collect(q, json_object_object_get_ex(args, "state", &o) &&
			      json_object_get_boolean(o));
	else if (!strcmp(command, CONT))
		do_cont(q);
	else if (!strcmp(command, "getfd"))
		do_getfd(q, json_object_object_get_ex(args, "fdname", &o) ?
			    json_object_get_string(o) : "");
	else if (!strcmp(command, "qmp_capabilities"))
		answer(q, "{}");
	else if (!strcmp(command, "query-block"))
		answer(q, "%s", q->disks);
	else if (!strcmp(command, "query-uuid"))
		answer(q, "{\"UUID\": \"550e8400-e29b-41d4-a716-446655440000\"}");
	else if (!strcmp(command, "query-name"))
		answer(q, "{\"name\": \"sham\"}");
	else if (!strcmp(command, "query-version"))
		answer(q, "{\"qemu\": {\"micro\": 1, \"minor\": 2, \"major\": 7}, \"package\": \"\"}");
	else if (!strcmp(command, "qom-get"))
		answer(q, "\"pc-i440fx-7.2-machine\"");
	else if (!strcmp(command, "query-cpus-fast"))
		answer(q, "[{\"cpu-index\": 0}, {\"cpu-index\": 1}]");
	else
		FAIL("QEMU is asked for %s", command);
}

static void count(struct qemu *q, const char *command, struct json_object *args)
{
	struct json_object *o;

	q->attaches += !strcmp(command, ATTACH);
	q->stops += !strcmp(command, STOP);
	q->conts += !strcmp(command, CONT);
	q->layouts += !strcmp(command, LAYOUT);
	if (!strcmp(command, COLLECT)) {
		CHECK(json_object_object_get_ex(args, "state", &o), "collects without saying what");
		if (json_object_get_boolean(o))
			q->collects++;
		else
			q->looks++;
	}
}

static void execute(struct qemu *q, struct json_object *o)
{
	struct json_object *execute, *args = NULL;
	const char *command, *instead;

	CHECK(json_object_object_get_ex(o, "execute", &execute), "sends %s",
	      json_object_to_json_string(o));
	json_object_object_get_ex(o, "arguments", &args);
	command = json_object_get_string(execute);
	count(q, command, args);
	instead = q->hook ? q->hook(q, command) : NULL;
	if (instead == dead) {
		q->dies_after = true;
	} else if (instead == silent) {
		q->mute = true;
	} else if (instead) {
		say(q, instead);
	} else {
		CHECK(strncmp(command, "x-", 2) || q->attached || !strcmp(command, ATTACH),
		      "%s before it is attached", command);
		obey(q, command, args);
	}
	if (q->dies_after) {
		if (q->last_words)
			say(q, q->last_words);
		die(q);
	}
}

/* Commands come without newlines, several at a time */
static void hear(struct qemu *q, const char *buf, size_t len)
{
	while (len && q->monitor >= 0 && !q->mute) {
		struct json_object *o = json_tokener_parse_ex(q->tok, buf, len);
		size_t n = json_tokener_get_parse_end(q->tok);

		if (!o) {
			CHECK(json_tokener_get_error(q->tok) == json_tokener_continue,
			      "what it sends is no JSON: %.*s", (int)len, buf);
			return;
		}
		buf += n;
		len -= n;
		execute(q, o);
		json_object_put(o);
	}
}

static void read_monitor(struct qemu *q)
{
	union {
		char buf[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	char buf[4096];
	struct iovec iov = { buf, sizeof(buf) };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf,
		.msg_controllen = sizeof(control.buf),
	};
	ssize_t n = recvmsg(q->monitor, &msg, MSG_CMSG_CLOEXEC);
	struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&msg) : NULL;

	if (c) {
		close_fd(&q->sent_fd);
		memcpy(&q->sent_fd, CMSG_DATA(c), sizeof(int));
	}
	if (n > 0)
		hear(q, buf, n);
	else
		close_monitor(q);
}

/* What comes within some milliseconds; a running guest writes meanwhile */
static void step(struct qemu *q, int ms)
{
	struct pollfd p[] = {
		{ .fd = q->monitor, .events = POLLIN },
		{ .fd = q->sock, .events = POLLIN },
		/* One at a time, as QEMU does it */
		{ .fd = q->monitor < 0 ? q->listener : -1, .events = POLLIN },
	};
	const char *instead;

	if (poll(p, 3, ms) <= 0) {
		if (q->running)
			guest_writes(q, 2);
		return;
	}
	if (p[0].revents) {
		read_monitor(q);
	} else if (p[1].revents) {
		detach(q);
	} else if (p[2].revents) {
		q->monitor = accept4(q->listener, NULL, NULL, SOCK_CLOEXEC);
		instead = q->hook ? q->hook(q, "greeting") : NULL;
		if (!instead)
			instead = "{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n";
		if (instead != silent)
			say(q, instead);
	}
}

/* --- Protecting it -------------------------------------------------------- */

/* The keys for it, if any */
static const char *key_file;

static void start_protect(const char *which, const char *to, ...)
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
static void serve_until_log(const char *text)
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
static int serve(void)
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

/* protect in one go: its exit status */
#define protect(which, to, ...) (start_protect(which, to, ##__VA_ARGS__, NULL), serve())

/* That many epochs, as fast as they come, without a failure */
static void protect_epochs(const char *to, const char *epochs)
{
	CHECK(protect(CHECKED, to, "--epochs", epochs, "--interval", "1ms") == 0, "protect fails");
}

static void must_fail(int status, const char *text)
{
	CHECK(status == 1, "it ends with %d, and should say \"%s\"", status, text);
	CHECK(log_has(text), "it does not say \"%s\"", text);
}

/* --- What was kept -------------------------------------------------------- */

/* The files hold a guest as it was when it was whole; which of these */
static unsigned int which_snap(const char *where, const char *state, bool stopped)
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
			CHECK(!memcmp(buf + page * KC_PAGE_SIZE, s->ram[i] + page * KC_PAGE_SIZE,
				      KC_PAGE_SIZE),
			      "page %" PRIu64 " in %s is not that of epoch %" PRIu64, page, path, nr);
		free(buf);
	}
	return nr;
}

static unsigned int snap_of_standby(const char *ram_dir)
{
	char name[32];

	snprintf(name, sizeof(name), "state-%" PRIu64, ram_epoch(ram_dir));
	return which_snap(ram_dir, name, log_has("\nstopped\n"));
}

/* All epochs in the directory; how many, and the last one's snap in @last */
static unsigned int check_store(unsigned int *last)
{
	char *store = strdup(path_of("store"));
	unsigned int snap, n;
	struct kc_store st;
	char nr[32];
	size_t i;

	OK(kc_store_read(store, &st, &err));
	for (i = 0; i < st.nr_files; i++) {
		snprintf(nr, sizeof(nr), "%" PRIu64, st.files[i].nr);
		remove_tree(path_of("restored"));
		unlink(path_of("log"));
		CHECK(!run("restore", "--epoch", nr, "--ram-dir", path_of("restored"), store, NULL),
		      "cannot restore epoch %s", nr);
		snap = which_snap(path_of("restored"), "state", log_has("\nstopped\n"));
		CHECK(!i || snap > *last, "epoch %s is older than the one before", nr);
		*last = snap;
	}
	n = st.nr_files;
	kc_store_free(&st);
	free(store);
	return n;
}

/* --- A good life ---------------------------------------------------------- */

static void test_directory(void)
{
	unsigned int last;

	start_qemu(&qemu);
	protect_epochs(path_of("store"), "20");
	/* The first copy is one more. */
	CHECK(qemu.nr_snaps == 21 && qemu.conts == 21, "%u epochs were taken", qemu.nr_snaps);
	CHECK(check_store(&last) == 21 && last == 20, "epochs are missing");
	/* What was written since is found by comparing. */
	protect_epochs(path_of("store"), "3");
	CHECK(log_has("pages differed"), "everything was copied once more");
	CHECK(check_store(&last) == 25 && last == 24, "epochs are missing");
}

static void test_standby(void)
{
	unsigned int i;

	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	for (i = 1; i < 4; i++) {
		protect_epochs(spec(), "20");
		wait_log("ends the protection: detached");
		stop_standby(SIGTERM);
		CHECK(snap_of_standby(path_of("ram")) == 21 * i - 1, "the last epoch is missing");
		start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	}
}

/* Writes more than what is left for the pause, and less each time */
static const char *writes_much(struct qemu *q, const char *command)
{
	static const unsigned int pages[] = { 3500, 3000, 2500, 2100, 700 };
	unsigned int i;

	if (!strcmp(command, COLLECT) && q->running && q->looks <= 5) {
		for (i = 0; i < pages[q->looks - 1]; i++)
			write_page(&q->blocks[0], i);
	}
	return NULL;
}

static void test_passes(void)
{
	unsigned int last;

	qemu.blocks[0].npages = 4096;
	qemu.hook = writes_much;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "2");
	CHECK(qemu.looks == 5, "it copied the running guest %u times", qemu.looks);
	CHECK(check_store(&last) == 3 && last == 2, "epochs are missing");
}

/* Its owner stops the guest before epoch 5, and lets it go on before epoch 10. */
static const char *owner_stops(struct qemu *q, const char *command)
{
	if (!strcmp(command, STOP) && q->stops == 5)
		q->running = false;
	if (!strcmp(command, STOP) && q->stops == 10)
		q->running = true;
	return NULL;
}

static void test_paused(void)
{
	unsigned int last;

	qemu.hook = owner_stops;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "10");
	/* One of them says that it is stopped; those after it would say nothing. */
	CHECK(check_store(&last) == 11, "idle epochs are kept");
	CHECK(qemu.nr_snaps == 15 && last == 14, "%u epochs were taken", qemu.nr_snaps);
}

/* The layout gets another generation, but is the same. */
static const char *layout_again(struct qemu *q, const char *command)
{
	if (!strcmp(command, COLLECT) && (q->collects == 3 || q->looks == 1))
		q->generation++;
	return NULL;
}

static void test_generation(void)
{
	unsigned int last;

	qemu.hook = layout_again;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "8");
	CHECK(qemu.layouts >= 2, "it did not ask for the new layout");
	CHECK(check_store(&last) == 9 && last == 8, "epochs are missing");
}

/* --- Others meddle -------------------------------------------------------- */

static const char *meddles(struct qemu *q, const char *command)
{
	if (!strcmp(command, STOP) && q->stops % 3 == 1)
		q->tear = q->stops % 2 ? RESUMED : SCRIBBLED;
	return NULL;
}

static unsigned int times_in(const char *path, const char *text)
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

static unsigned int times_in_log(const char *text)
{
	return times_in(path_of("log"), text);
}

static void test_torn(void)
{
	unsigned int last;

	qemu.hook = meddles;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "20");
	CHECK(qemu.stops == 32, "%u epochs were taken", qemu.stops);
	CHECK(times_in_log("taking another") == 11, "a torn epoch is taken for a whole one");
	CHECK(check_store(&last) == 21 && last == qemu.nr_snaps - 1,
	      "epochs are missing");
}

static const char *meddles_for_ever(struct qemu *q, const char *command)
{
	if (!strcmp(command, STOP) && q->stops > 3)
		q->tear = RESUMED;
	return NULL;
}

static void test_torn_for_ever(void)
{
	qemu.hook = meddles_for_ever;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	must_fail(protect(CHECKED, spec(), "--interval", "1ms"),
		  "during a checkpoint; the guest is without protection");
	CHECK(qemu.stops == 203 && qemu.attaches == 4, "%u attempts, attached %u times", qemu.stops,
	      qemu.attaches);
	CHECK(times_in_log("connecting to QEMU again") == 3, "it did not try again");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == 2, "the last epoch is missing");
}

/* --- QEMU is silent, or dies ---------------------------------------------- */

static const char *victim;
static unsigned int victim_nr;

/* Is it the command that the test is about? */
static bool is_victim(struct qemu *q, const char *command)
{
	unsigned int nr = !strcmp(command, STOP) ? q->stops :
			  !strcmp(command, CONT) ? q->conts :
			  !strcmp(command, COLLECT) ? q->collects : victim_nr;

	return !strcmp(command, victim) && nr == victim_nr;
}

static const char *is_silent(struct qemu *q, const char *command)
{
	return is_victim(q, command) ? silent : NULL;
}

static void silent_at(const char *command)
{
	char text[100];

	victim = command;
	victim_nr = 3;
	qemu.hook = is_silent;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	snprintf(text, sizeof(text), strcmp(command, "greeting") ?
		 "error: QEMU does not answer to %s" :
		 "does not answer: is another client connected?", command);
	must_fail(protect(IMPATIENT, spec(), "--interval", "1ms"), text);
	/* It may live: that is for the standby to find out. */
	stop_standby(SIGTERM);
	CHECK(!log_has("ends the protection") && !log_has("guest died"),
	      "the standby was told something");
	CHECK(qemu.running, "the guest is left stopped");
}

static void test_silent_greeting(void)
{
	silent_at("greeting");
}

/* Clients that have given up are in the queue of its monitor, and nobody takes them out. */
static void fill_queue(void)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	unsigned int i;
	int fd;

	snprintf(sun.sun_path, sizeof(sun.sun_path), "%s/qmp", dir);
	for (i = 0; i < 100; i++) {
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		CHECK(fd >= 0, "no socket");
		if (!connect(fd, (struct sockaddr *)&sun, sizeof(sun)))
			continue;
		CHECK(errno == EAGAIN, "cannot connect to %s: %s", sun.sun_path, strerror(errno));
		close(fd);
		return;
	}
	FAIL("its queue is never full");
}

static void test_full_queue(void)
{
	uint64_t end;
	int status;

	start_qemu(&qemu);
	fill_queue();
	start_protect(IMPATIENT, path_of("store"), NULL);
	end = kc_now_us() + LIMIT_US;
	while (waitpid(qemu.client, &status, WNOHANG) != qemu.client) {
		CHECK(kc_now_us() < end, "protect hangs");
		poll(NULL, 0, 10);
	}
	CHECK(WIFEXITED(status), "protect dies of signal %d", WTERMSIG(status));
	must_fail(WEXITSTATUS(status), "does not answer: is another client connected?");
}

static void test_silent_attach(void)
{
	silent_at(ATTACH);
}

static void test_silent_stop(void)
{
	silent_at(STOP);
}

static void test_silent_collect(void)
{
	silent_at(COLLECT);
}

static void test_silent_cont(void)
{
	silent_at(CONT);
}

static const char *dies(struct qemu *q, const char *command)
{
	return is_victim(q, command) ? dead : NULL;
}

static const char *dies_after(struct qemu *q, const char *command)
{
	q->dies_after = is_victim(q, command);
	return NULL;
}

/* A standby takes over when QEMU dies of a command: at which snap */
static unsigned int snap_after(const char *(*hook)(struct qemu *q, const char *command),
			       const char *command, unsigned int nr)
{
	victim = command;
	victim_nr = nr;
	qemu.hook = hook;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	must_fail(protect(CHECKED, spec(), "--interval", "1ms"),
		  "QEMU is gone; the last epoch that counts is");
	CHECK(reap(&standby) == 0 && log_has("the primary's guest died"),
	      "the standby does not take over");
	return snap_of_standby(path_of("ram"));
}

static void test_dies_in_collect(void)
{
	CHECK(snap_after(dies, COLLECT, 6) == 4, "the last epoch is missing");
}

static void test_dies_in_stop(void)
{
	CHECK(snap_after(dies, STOP, 3) == 1, "the last epoch is missing");
}

/* The epoch that was taken last is sent before it is noticed. */
static void test_dies_between(void)
{
	CHECK(snap_after(dies_after, CONT, 5) == 4, "the last epoch is missing");
}

/* While the first epoch is on its way: stops the standby, so that it cannot have arrived */
static const char *stops_standby(struct qemu *q, const char *command)
{
	if (!strcmp(command, COLLECT) && q->running)
		kill(standby, SIGSTOP);
	return NULL;
}

static void test_dies_in_copy(void)
{
	/* More than what fits into sockets. */
	qemu.blocks[0].npages = 8192;
	qemu.hook = stops_standby;
	start_qemu(&qemu);
	guest_writes(&qemu, 30000);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--compress", "none", NULL);
	serve_until_log("full copy:   0%");
	die(&qemu);
	kill(standby, SIGCONT);
	must_fail(serve(), "QEMU is gone; the last epoch that counts is 0");
	/* There is nothing that it could take over. */
	wait_log("there is no complete epoch of it to go on from");
	CHECK(!waitpid(standby, NULL, WNOHANG), "the standby takes over nothing");
}

/* protect is killed when it has sent three epochs. */
static const char *kills_client(struct qemu *q, const char *command)
{
	if (!strcmp(command, STOP) && q->stops == 4)
		kill(q->client, SIGKILL);
	return NULL;
}

static void test_dies_in_resync(void)
{
	int status;

	qemu.hook = kills_client;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "1ms", NULL);
	while (waitpid(qemu.client, &status, WNOHANG) != qemu.client)
		step(&qemu, 1);
	while (qemu.attached || qemu.monitor >= 0)
		step(&qemu, 1);
	CHECK(qemu.running, "the guest is left stopped");
	wait_log("lost the primary");
	qemu.hook = stops_standby;
	qemu.looks = 0;
	start_protect(CHECKED, spec(), NULL);
	/* The standby does not say which pages it has. */
	while (!qemu.looks)
		step(&qemu, 1);
	die(&qemu);
	kill(standby, SIGCONT);
	must_fail(serve(), "QEMU is gone; the last epoch that counts is 3");
	CHECK(reap(&standby) == 0 && log_has("the primary's guest died"),
	      "the standby does not take over");
	CHECK(snap_of_standby(path_of("ram")) == 2, "it took over at another epoch");
}

/* Only the monitor's connection is lost. */
static const char *hangs_up(struct qemu *q, const char *command)
{
	if (strcmp(command, STOP) || q->stops != 4)
		return NULL;
	close_monitor(q);
	return "";
}

static void test_monitor_lost(void)
{
	unsigned int last;

	qemu.hook = hangs_up;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "8");
	CHECK(times_in_log("connecting to QEMU again") == 1 && qemu.attaches == 2,
	      "it does not connect again");
	CHECK(check_store(&last) == 10 && last == 9, "epochs are missing");
}

static const char *hangs_up_for_long(struct qemu *q, const char *command)
{
	if (!strcmp(command, "greeting") && q->stops == 4)
		poll(NULL, 0, 8000);
	return hangs_up(q, command);
}

/* However long that takes, the standby is to hear that this host lives. */
static void test_monitor_lost_for_long(void)
{
	char fence[PATH_MAX + 50];

	snprintf(fence, sizeof(fence), "#!/bin/sh\n>%s/fenced\n", dir);
	qemu.hook = hangs_up_for_long;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--fence", script("fence", fence), "--timeout", "6s",
		      "--insecure");
	protect_epochs(spec(), "8");
	CHECK(!exists(path_of("fenced")) && !log_has("failing over"),
	      "the host of a guest that runs is fenced");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "the last epoch is missing");
}

/* QEMU refuses something, and is no more when it is asked again. */
static const char *dies_attached_again(struct qemu *q, const char *command)
{
	if (!strcmp(command, COLLECT) && q->collects == 4)
		return "{\"error\": {\"desc\": \"no memory\"}}\n";
	return !strcmp(command, ATTACH) && q->attaches == 2 ? dead : NULL;
}

static void test_dies_attached_again(void)
{
	qemu.hook = dies_attached_again;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "6s", "--insecure");
	must_fail(protect(CHECKED, spec(), "--interval", "1ms"),
		  "QEMU is gone; the guest is without protection");
	wait_log("taken over at epoch 3");
	CHECK(reap(&standby) == 0, "the standby fails");
	CHECK(snap_of_standby(path_of("ram")) == 2, "the last epoch is missing");
}

/* --- The guest is shut down ----------------------------------------------- */

#define EVENT(name) "{\"event\": \"" name "\", \"data\": {\"guest\": true}}\r\n"

/* QEMU ends in its own way after some answer; the standby would wait so long for it */
static void shut_down(const char *command, unsigned int nr, const char *timeout)
{
	victim = command;
	victim_nr = nr;
	qemu.hook = dies_after;
	qemu.last_words = EVENT("SHUTDOWN");
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", timeout, "--insecure");
	CHECK(protect(CHECKED, spec(), "--interval", "1ms") == 0, "a shutdown is a failure");
	CHECK(log_has("the guest was shut down"), "it does not say so");
	wait_log("ends the protection: its guest shut down");
	if (strcmp(timeout, "0"))
		poll(NULL, 0, 2500);
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"),
	      "the standby goes on with a guest that was shut down");
	stop_standby(SIGTERM);
}

static void test_shutdown(void)
{
	shut_down(CONT, 4, "2s");
	CHECK(snap_of_standby(path_of("ram")) == 3, "the last epoch is missing");
}

/* In the middle of an epoch, of which nothing remains. */
static void test_shutdown_in_epoch(void)
{
	shut_down(COLLECT, 4, "0");
	CHECK(snap_of_standby(path_of("ram")) == 2, "the last epoch is missing");
}

static void test_shutdown_in_stop(void)
{
	shut_down(STOP, 4, "0");
	CHECK(snap_of_standby(path_of("ram")) == 2, "the last epoch is missing");
}

/* With -no-shutdown the guest may be reset, and run, and die. */
static void test_no_shutdown(void)
{
	qemu.last_words = EVENT("SHUTDOWN") EVENT("RESET") EVENT("RESUME");
	CHECK(snap_after(dies_after, CONT, 4) == 3, "the last epoch is missing");
}

/* --- QEMU refuses --------------------------------------------------------- */

#define ERROR(class, desc) "{\"error\": {\"class\": \"" class "\", \"desc\": \"" desc "\"}}\r\n"

static const char *attach_answer;

static const char *refuses_attach(struct qemu *q, const char *command)
{
	(void)q;
	return strcmp(command, ATTACH) ? NULL : attach_answer;
}

static const char *attached_twice(struct qemu *q, const char *command)
{
	if (!strcmp(command, ATTACH))
		q->attached = q->attaches < 3;
	return NULL;
}

static void test_refused(void)
{
	start_qemu(&qemu);
	qemu.hook = refuses_attach;
	attach_answer = ERROR("GenericError", "disk x has no migration");
	must_fail(protect(CHECKED, path_of("store")),
		  "QEMU refuses x-checkpoint-attach: disk x has no migration");
	attach_answer = ERROR("GenericError", "a client is attached already");
	must_fail(protect(CHECKED, path_of("store")),
		  "QEMU refuses x-checkpoint-attach: a client is attached already");
	CHECK(qemu.attaches > 2, "it does not wait for the other one's end");
	attach_answer = ERROR("CommandNotFound",
			      "The command x-checkpoint-attach has not been found");
	must_fail(protect(CHECKED, path_of("store")), "build it with the patch in qemu/");
	CHECK(!exists(path_of("store")), "it made a directory");
	/* The one before was killed a moment ago. */
	qemu.attaches = 0;
	qemu.hook = attached_twice;
	protect_epochs(path_of("store"), "1");
	CHECK(qemu.attaches == 3, "it attached %u times", qemu.attaches);
}

static void test_disks(void)
{
	start_qemu(&qemu);
	qemu.disks = "[{\"device\": \"cd0\", \"inserted\": {\"ro\": true}}, {\"device\": \"floppy\"}]";
	CHECK(protect(CHECKED, path_of("store"), "--epochs", "1") == 0,
	      "disks that cannot be written are refused");
	qemu.disks = "[{\"device\": \"cd0\", \"inserted\": {\"ro\": true}}, "
		     "{\"device\": \"\", \"qdev\": \"vda\", \"inserted\": {\"ro\": false}}]";
	must_fail(protect(CHECKED, path_of("store"), "--epochs", "1"),
		  "disk vda is writable: its contents are not replicated");
	CHECK(qemu.attaches == 1, "it attached first");
	CHECK(protect(CHECKED, path_of("store"), "--epochs", "1", "--disk", "external") == 0,
	      "--disk external does not help");
}

/* --- A standby that is full ----------------------------------------------- */

static const char *writes_everything(struct qemu *q, const char *command)
{
	uint64_t page, i;

	if (strcmp(command, COLLECT) || q->running || q->collects != 4)
		return NULL;
	for (page = 0; page < q->blocks[0].npages; page++) {
		for (i = 0; i < KC_PAGE_SIZE; i += 8) {
			uint64_t v = rnd(&rng_state);

			memcpy(q->blocks[0].ram + page * KC_PAGE_SIZE + i, &v, 8);
		}
		q->blocks[0].dirty[page] = true;
	}
	return NULL;
}

static void test_full_standby(void)
{
	char fence[PATH_MAX + 50];

	snprintf(fence, sizeof(fence), "#!/bin/sh\n>%s/fenced\n", dir);
	qemu.hook = writes_everything;
	start_qemu(&qemu);
	start_standby_fsize(path_of("ram"), qemu.blocks[0].npages * KC_PAGE_SIZE, "--fence",
			    script("fence", fence), "--timeout", "6s", "--insecure", NULL);
	must_fail(protect(CHECKED, spec(), "--interval", "1ms"), "cannot write redo.tmp");
	CHECK(log_has("; the guest runs on, without protection"), "it does not say what that means");
	wait_log("ends the protection: detached");
	poll(NULL, 0, 7000);
	CHECK(!exists(path_of("fenced")) && !log_has("failing over"),
	      "the host of a guest that runs is fenced");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == 2, "the last epoch is lost");
}

/* --- Garbage -------------------------------------------------------------- */

#define LAID_OUT(size, blocks, slots) \
	"{\"return\": {\"generation\": 77, \"page-size\": " #size \
	", \"dirty-log\": \"bitmap\", \"blocks\": [" blocks "], \"slots\": [" slots "]}}\n"
#define BLOCK(name, pages, shared) \
	"{\"name\": \"" name "\", \"pages\": " #pages ", \"shared\": " #shared "}"
#define SLOT(block, page, pages) \
	"{\"slot\": 0, \"block\": " #block ", \"page\": " #page ", \"pages\": " #pages "}"
#define COLLECTED(size, at, runs) \
	"{\"return\": {\"generation\": 1, \"state-size\": " #size ", \"offset\": " #at \
	", \"runs\": " #runs ", \"collect-us\": 1}}\n"
#define CHANGED	"the guest's memory has been changed (plugged?)"

static const struct garbage {
	const char *command, *text, *message;
} garbage[] = {
	{ "greeting", "Hello.\n", "is not a QMP socket" },
	{ "greeting", "[ \"QMP\" ]\n", "is not a QMP socket" },
	{ "qmp_capabilities", "{\"error\": 7}\n", "QEMU refuses qmp_capabilities" },
	{ "query-block", "{\"return\": {}}\n", "QEMU's answer to query-block makes no sense" },
	{ "query-block", "{\"return\": null}\n", "QEMU's answer to query-block makes no sense" },
	{ "query-cpus-fast", "{\"return\": 7}\n", "QEMU's answer to query-cpus-fast makes no sense" },
	{ ATTACH, "{\"return\": {}}\n", "QEMU's layout makes no sense" },
	{ ATTACH, LAID_OUT(8192, BLOCK("a", 9, true), ""), "the guest's pages are not of 4096 bytes" },
	{ ATTACH, LAID_OUT(4096, "1, []", ""), "MiB of the guest's memory are not shared" },
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 9, true) "," BLOCK("b", 2000, false), ""),
	  "7 MiB of the guest's memory are not shared" },
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 9, true) "," BLOCK("b", 9, true), SLOT(0, 0, 9)),
	  "QEMU sent fewer file descriptors than it said" },
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 129, true), ""), "the file of a is smaller" },
	/* 1 page if only 64 bits of bytes are counted */
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 4503599627370497, true), ""), "the file of a is smaller" },
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 0, true), ""), "cannot map a" },
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 9, true) "," BLOCK("a", 9, true), ""), "two blocks" },
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 9, true), SLOT(1, 0, 1)), "slots are not in its memory" },
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 9, true), SLOT(0, 5, 5)), "slots are not in its memory" },
	{ ATTACH, LAID_OUT(4096, BLOCK("a", 9, true), SLOT(0, 0, 9)), "cannot use a dirty log" },
	{ LAYOUT, LAID_OUT(4096, BLOCK("pc.ram", 100, true) "," BLOCK("/objects/ram1", 77, true), ""),
	  CHANGED },
	{ LAYOUT, LAID_OUT(4096, BLOCK("pc.ram", 128, true) "," BLOCK("/objects/ram2", 77, true), ""),
	  CHANGED },
	{ LAYOUT, LAID_OUT(4096, BLOCK("pc.ram", 128, true), ""), CHANGED },
	{ LAYOUT, "{\"error\": {\"desc\": \"not now\"}}\n", "QEMU refuses x-checkpoint-layout: not now" },
	{ COLLECT, "{\"error\": {\"desc\": \"a full disk\"}}\n", COLLECT ": a full disk" },
	{ COLLECT, COLLECTED(16, 64, 1000000), "QEMU wrote less to the buffer than it said" },
	{ COLLECT, COLLECTED(16, 64, 18446744073709551615), "QEMU wrote less" },
	{ COLLECT, COLLECTED(16, 9223372036854775807, 1), "QEMU wrote less" },
	{ COLLECT, COLLECTED(16, 18446744073709551615, 1), "QEMU wrote less" },
	{ COLLECT, COLLECTED(10000000, 64, 0), "QEMU wrote less" },
	{ COLLECT, COLLECTED(100000000000, 64, 0), "QEMU saved 100000000000 bytes of device state" },
	{ COLLECT, COLLECTED(0, 64, 0), "QEMU saved 0 bytes of device state" },
	{ COLLECT, COLLECTED("x", 64, 0), "QEMU saved 0 bytes of device state" },
	{ COLLECT, "{\"return\": null}\n", "QEMU saved 0 bytes of device state" },
	{ STOP, "}{\n", "what QEMU answers to x-checkpoint-stop is no QMP" },
	{ STOP, "[ 1 ]\n", "what QEMU answers to x-checkpoint-stop is no QMP" },
	{ STOP, "{\"return\": {\n", "what QEMU answers to x-checkpoint-stop is no QMP" },
	{ STOP, "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\n", "is no QMP" },
	{ CONT, "null\n", "what QEMU answers to x-checkpoint-cont is no QMP" },
}, *now;

/* In the buffer at 64, unless it is empty */
static struct pages bad_run;

static const char *says_garbage(struct qemu *q, const char *command)
{
	if (!strcmp(now->command, LAYOUT) && !strcmp(command, COLLECT) && !q->running)
		q->generation++;
	/* Which come with file descriptors */
	if (!strcmp(command, ATTACH) || !strcmp(command, LAYOUT) || strcmp(command, now->command) ||
	    (!strcmp(command, COLLECT) && q->running))
		return NULL;
	if (bad_run.npages)
		write_buffer(q, &bad_run, sizeof(bad_run), 64);
	return now->text;
}

static void must_not_swallow(const struct garbage *g)
{
	now = g;
	qemu.layout = strcmp(now->command, ATTACH) ? NULL : now->text;
	qemu.new_layout = strcmp(now->command, LAYOUT) ? NULL : now->text;
	unlink(path_of("log"));
	remove_tree(path_of("store"));
	must_fail(protect(CHECKED, path_of("store"), "--interval", "1ms"), now->message);
}

static void start_little_qemu(void)
{
	qemu.blocks[0].npages = 128;
	qemu.hook = says_garbage;
	start_qemu(&qemu);
}

static void test_garbage(void)
{
	size_t i;

	start_little_qemu();
	for (i = 0; i < sizeof(garbage) / sizeof(garbage[0]); i++)
		must_not_swallow(&garbage[i]);
}

static void test_garbage_runs(void)
{
	static const struct garbage one_run = {
		COLLECT, COLLECTED(16, 64, 1), "pages of memory that was not there before"
	};
	static const struct pages runs[] = {
		{ 0, 2, 127 }, { 0, UINT32_MAX, 1 }, { 0, 1, UINT64_MAX }, { 1, 1, 0 }, { 3, 1, 0 },
	};
	size_t i;

	start_little_qemu();
	for (i = 0; i < sizeof(runs) / sizeof(runs[0]); i++) {
		bad_run = runs[i];
		must_not_swallow(&one_run);
	}
}

/* Until somebody has had enough of it */
static const char *talks_for_ever(struct qemu *q, const char *command)
{
	static char text[1 << 20];

	if (strcmp(command, STOP))
		return NULL;
	memset(text, ' ', sizeof(text));
	while (send(q->monitor, text, sizeof(text), MSG_NOSIGNAL) > 0)
		;
	return silent;
}

static void test_long_line(void)
{
	qemu.hook = talks_for_ever;
	start_qemu(&qemu);
	must_fail(protect(CHECKED, path_of("store")),
		  "what QEMU answers to x-checkpoint-stop is no QMP");
}

/* --- Told to end ---------------------------------------------------------- */

/* It ended well, and the standby does nothing */
static void must_detach(int status)
{
	CHECK(status == 0, "it ends with %d", status);
	CHECK(qemu.running, "the guest is left stopped");
	wait_log("ends the protection: detached");
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"), "the standby takes over");
	stop_standby(SIGTERM);
}

static int end_signal;

static const char *terminates(struct qemu *q, const char *command)
{
	if (!strcmp(command, CONT) && q->conts == 5)
		kill(q->client, end_signal);
	return NULL;
}

/* What was begun is brought to an end. */
static void end_in_epoch(int sig)
{
	end_signal = sig;
	qemu.hook = terminates;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	must_detach(protect(CHECKED, spec(), "--interval", "1ms"));
	CHECK(snap_of_standby(path_of("ram")) == 4, "the last epoch is missing");
}

static void test_term_in_epoch(void)
{
	end_in_epoch(SIGTERM);
}

/* The end of a terminal; the tests may be under nohup themselves. */
static void test_hup_in_epoch(void)
{
	signal(SIGHUP, SIG_DFL);
	end_in_epoch(SIGHUP);
}

/* Both of them are under nohup. */
static void test_nohup(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	unsigned int conts;

	signal(SIGHUP, SIG_IGN);
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "1ms", NULL);
	serve_until_log("protected since epoch 1");
	kill(qemu.client, SIGHUP);
	kill(standby, SIGHUP);
	conts = qemu.conts;
	while (qemu.conts < conts + 10) {
		CHECK(kc_now_us() < end, "there are no more epochs");
		step(&qemu, 1);
	}
	CHECK(!log_has("stopped; last complete epoch"), "the standby ends");
	kill(qemu.client, SIGTERM);
	must_detach(serve());
}

/* However long it is until the next one. */
static void test_term_between(void)
{
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "60m", NULL);
	serve_until_log("protected since epoch 1");
	kill(qemu.client, SIGTERM);
	must_detach(serve());
	CHECK(snap_of_standby(path_of("ram")) == 0, "the last epoch is missing");
	/* And by command. */
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "60m", "--control", path_of("pctl"), NULL);
	serve_until_log("protected since epoch 2");
	CHECK(!run("status", path_of("pctl"), "detach", NULL), "it cannot be told to detach");
	must_detach(serve());
}

static void test_term_in_copy(void)
{
	qemu.blocks[0].npages = 8192;
	qemu.hook = stops_standby;
	start_qemu(&qemu);
	guest_writes(&qemu, 30000);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--compress", "none", NULL);
	serve_until_log("full copy:   0%");
	kill(qemu.client, SIGTERM);
	kill(standby, SIGCONT);
	must_detach(serve());
	CHECK(!qemu.stops, "an epoch was taken");
}

/* It waits for a standby. */
static void test_term_alone(void)
{
	start_qemu(&qemu);
	/* A port that is free. */
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	stop_standby(SIGTERM);
	start_protect(CHECKED, spec(), NULL);
	serve_until_log("the guest runs on, trying again");
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "it does not end as it was told to");
}

/*
 * The end comes while the link to the standby is lost, and the standby is there again: it has to
 * be told.
 */
static void end_while_lost(bool term, const char *said)
{
	unsigned int i;

	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "1ms", NULL);
	while (qemu.conts < 3)
		step(&qemu, 1);
	stop_standby(SIGKILL);
	serve_until_log("the guest runs on, trying again");
	/* It tries less and less often. */
	for (i = 0; i < 1000; i++)
		step(&qemu, 1);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	if (term) {
		kill(qemu.client, SIGTERM);
	} else {
		send_event(&qemu, "SHUTDOWN");
		die(&qemu);
	}
	CHECK(serve() == 0, "it does not end as it should");
	wait_log(said);
	stop_standby(SIGTERM);
}

static void test_shutdown_lost(void)
{
	end_while_lost(false, "ends the protection: its guest shut down");
}

static void test_term_lost(void)
{
	end_while_lost(true, "ends the protection: detached");
}

/* Or nobody is there any more that could be told, which must not be taken for a good end. */
static void end_untold(int sig, const char *said)
{
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "1ms", "--io-timeout", "2s", NULL);
	while (qemu.conts < 3)
		step(&qemu, 1);
	kill(standby, sig);
	if (said)
		serve_until_log(said);
	kill(qemu.client, SIGTERM);
	must_fail(serve(), "does not know that the protection has ended");
	kill(standby, SIGKILL);
	reap(&standby);
}

static void test_term_untold(void)
{
	end_untold(SIGKILL, "the guest runs on, trying again");
}

/* The connection is there, but the standby hangs. */
static void test_term_unheard(void)
{
	end_untold(SIGSTOP, NULL);
}

/* The standby ends while QEMU does something that takes long. */
static const char *kills_standby(struct qemu *q, const char *command)
{
	if (!strcmp(command, CONT) && q->conts == 4) {
		stop_standby(SIGKILL);
		poll(NULL, 0, 1000);
	}
	return NULL;
}

static void test_link_lost(void)
{
	qemu.hook = kills_standby;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "1ms", "--epochs", "10", NULL);
	serve_until_log("the guest runs on, trying again");
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	CHECK(serve() == 0, "it does not go on with the standby");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "the last epoch is missing");
}

/* When a key has once been right, the one at the other end is that of somebody else for a while. */
static void test_other_key(void)
{
	static const char wrong[] = "kvm:100102030405060708090a0b0c0d0e0f\n";
	char own[PATH_MAX];
	uint64_t end;

	strcpy(own, psk);
	key_file = own;
	qemu.hook = kills_standby;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	start_protect(CHECKED, spec(), "--interval", "1ms", "--epochs", "10", NULL);
	serve_until_log("the guest runs on, trying again");
	/* The next standby begins another log, but not for protect. */
	CHECK(!link(path_of("log"), path_of("protect.log")), "cannot link the log");
	snprintf(psk, sizeof(psk), "%s/other.psk", dir);
	write_text(psk, 0600, wrong);
	start_standby(path_of("ram2"), "--no-fence", "--timeout", "0");
	end = kc_now_us() + LIMIT_US;
	while (times_in(path_of("protect.log"), "; the guest runs on, trying again") < 2 ||
	       times_in_log("refused a connection") < 3) {
		CHECK(kc_now_us() < end, "it does not try again");
		step(&qemu, 1);
	}
	CHECK(times_in(path_of("protect.log"), "same identity and key") == 1,
	      "it does not say once that the key is wrong");
	stop_standby(SIGTERM);
	strcpy(psk, own);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	CHECK(serve() == 0, "it does not go on with the standby");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "the last epoch is missing");
	/* But one that was never right is not. */
	qemu.hook = NULL;
	key_file = path_of("other.psk");
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	must_fail(protect(CHECKED, spec()), "; the guest runs on, without protection");
	CHECK(!log_has("trying again"), "it tries again");
	stop_standby(SIGTERM);
}

/* --- Nobody reads what it says -------------------------------------------- */

/* A pipe that is full, and protect writing to it what it would write to this one */
static const char *protect_into(const char *redirect, int *fifo)
{
	char text[3 * PATH_MAX], junk[4096];

	CHECK(!mkfifo(path_of("fifo"), 0600), "mkfifo");
	*fifo = open(path_of("fifo"), O_RDWR | O_NONBLOCK | O_CLOEXEC);
	CHECK(*fifo >= 0, "cannot open the pipe: %s", strerror(errno));
	memset(junk, '\n', sizeof(junk));
	while (write(*fifo, junk, sizeof(junk)) > 0)
		;
	CHECK(errno == EAGAIN, "the pipe is never full");
	snprintf(text, sizeof(text), "#!/bin/sh\nexec %s \"$@\" %s%s/fifo\n", CHECKED, redirect,
		 dir);
	/* For longer than other paths. */
	return strdup(script("protect", text));
}

static void test_unread_stdout(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	static char text[1 << 20];
	const char *program_into;
	size_t len = 0, junk;
	ssize_t n;
	int fifo;

	start_qemu(&qemu);
	program_into = protect_into(">", &fifo);
	CHECK(protect(program_into, path_of("store"), "--json", "--interval", "1ms", "--epochs",
		      "50") == 0, "protect fails");
	CHECK(qemu.conts == 51, "%u epochs were taken", qemu.conts);
	/* When somebody reads again, it says how much is missing. */
	start_protect(program_into, path_of("store"), "--json", "--interval", "1ms", NULL);
	while (qemu.conts < 60) {
		CHECK(kc_now_us() < end, "there are no more epochs");
		step(&qemu, 1);
	}
	while (!strstr(text, "{\"event\":\"lost\",\"lines\":") || !strstr(text, "\"epoch\",")) {
		CHECK(kc_now_us() < end && len < sizeof(text) - 1, "it does not say what is lost");
		n = read(fifo, text + len, sizeof(text) - 1 - len);
		if (n > 0)
			len += n;
		/* What it was filled with. */
		junk = strspn(text, "\n");
		len -= junk;
		memmove(text, text + junk, len + 1);
		step(&qemu, 1);
	}
	CHECK(!strncmp(text, "{\"event\":\"lost\"", 15), "it begins with %.40s", text);
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "protect fails");
}

static void test_unread_stderr(void)
{
	int fifo;

	/* Of which it tells. */
	qemu.hook = meddles;
	start_qemu(&qemu);
	CHECK(protect(protect_into("2>", &fifo), path_of("store"), "--interval", "1ms", "--epochs",
		      "20") == 0, "protect fails");
	CHECK(qemu.stops == 32, "%u epochs were taken", qemu.stops);
}

/* --- All of them ---------------------------------------------------------- */

static const struct test tests[] = {
	{ "protect_directory", test_directory },
	{ "protect_standby", test_standby },
	{ "protect_passes", test_passes },
	{ "protect_paused", test_paused },
	{ "protect_generation", test_generation },
	{ "protect_torn", test_torn },
	{ "protect_torn_for_ever", test_torn_for_ever },
	{ "protect_silent_greeting", test_silent_greeting },
	{ "protect_full_queue", test_full_queue },
	{ "protect_silent_attach", test_silent_attach },
	{ "protect_silent_stop", test_silent_stop },
	{ "protect_silent_collect", test_silent_collect },
	{ "protect_silent_cont", test_silent_cont },
	{ "protect_dies_in_collect", test_dies_in_collect },
	{ "protect_dies_in_stop", test_dies_in_stop },
	{ "protect_dies_between", test_dies_between },
	{ "protect_dies_in_copy", test_dies_in_copy },
	{ "protect_dies_in_resync", test_dies_in_resync },
	{ "protect_monitor_lost", test_monitor_lost },
	{ "protect_monitor_lost_for_long", test_monitor_lost_for_long },
	{ "protect_dies_attached_again", test_dies_attached_again },
	{ "protect_shutdown", test_shutdown },
	{ "protect_shutdown_in_epoch", test_shutdown_in_epoch },
	{ "protect_shutdown_in_stop", test_shutdown_in_stop },
	{ "protect_no_shutdown", test_no_shutdown },
	{ "protect_refused", test_refused },
	{ "protect_disks", test_disks },
	{ "protect_full_standby", test_full_standby },
	{ "protect_garbage", test_garbage },
	{ "protect_garbage_runs", test_garbage_runs },
	{ "protect_long_line", test_long_line },
	{ "protect_term_in_epoch", test_term_in_epoch },
	{ "protect_hup_in_epoch", test_hup_in_epoch },
	{ "protect_nohup", test_nohup },
	{ "protect_term_between", test_term_between },
	{ "protect_term_in_copy", test_term_in_copy },
	{ "protect_term_alone", test_term_alone },
	{ "protect_link_lost", test_link_lost },
	{ "protect_other_key", test_other_key },
	{ "protect_term_lost", test_term_lost },
	{ "protect_term_untold", test_term_untold },
	{ "protect_term_unheard", test_term_unheard },
	{ "protect_shutdown_lost", test_shutdown_lost },
	{ "protect_unread_stdout", test_unread_stdout },
	{ "protect_unread_stderr", test_unread_stderr },
};

int main(int argc, char **argv)
{
	static const struct suite suite = {
		.tests = tests, .nr_tests = sizeof(tests) / sizeof(tests[0]),
		.usage = "KVM-CHECKPOINT CHECKED IMPATIENT", .nr_programs = 3, .jobs = 4,
	};

	return run_tests(&suite, argc, argv);
}
