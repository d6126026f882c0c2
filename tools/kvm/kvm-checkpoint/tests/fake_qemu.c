// SPDX-License-Identifier: GPL-2.0-only
/*
 * A QEMU that is part of the test program; see fake_qemu.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "fake_qemu.h"

struct qemu qemu = {
	.blocks = {
		{ .name = "pc.ram", .npages = 1024, .shared = true },
		{ .name = "pc.bios", .npages = 64 },
		{ .name = "/objects/ram1", .npages = 77, .shared = true },
	},
	.disks = "[]",
	.devices = "[]",
	.cards = "[]",
	.uuid = "550e8400-e29b-41d4-a716-446655440000",
	.name = "sham",
};

const char silent[] = "silent", dead[] = "dead";

/* Writes some words, or nothing, or zeros */
void write_page(struct block *b, uint64_t page)
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

void guest_writes(struct qemu *q, unsigned int n)
{
	while (n--) {
		struct block *b = &q->blocks[below(8) ? 0 : 2];
		uint64_t page = below(b->npages);

		/* Not the table, nor what is free */
		if (b == q->blocks && !q->lies && is_free(q, page))
			continue;
		write_page(b, page);
		if (b == q->blocks && q->undefined && !q->lies)
			q->undefined[page] = false;
		if (!below(10))
			disk_writes(q);
	}
}

void give_back(struct qemu *q, uint64_t page, uint64_t n)
{
	struct block *b = &q->blocks[0];

	CHECK(!fallocate(b->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page * KC_PAGE_SIZE,
			 n * KC_PAGE_SIZE), "cannot punch a hole");
	memset(b->dirty + page, 1, n);
	q->discarded = true;
}

void start_qemu(struct qemu *q)
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
	q->got_notify = -1;
	q->got_guard = -1;
	q->guard = -1;
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

void close_monitor(struct qemu *q)
{
	close_fd(&q->monitor);
	close_fd(&q->sent_fd);
	close_fd(&q->got_socket);
	close_fd(&q->got_buffer);
	close_fd(&q->got_notify);
	close_fd(&q->got_guard);
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

void die(struct qemu *q)
{
	close_monitor(q);
	close_fd(&q->sock);
	close_fd(&q->buffer);
	close_fd(&q->listener);
	close_fd(&q->guard);
	q->running = false;
	q->stopped = false;
}

/* The client may be gone: then this does nothing */
void say_bytes(struct qemu *q, const char *text, size_t len)
{
	ssize_t n;

	for (; q->monitor >= 0 && len; len -= n, text += n) {
		n = send(q->monitor, text, len, MSG_NOSIGNAL);
		if (n < 0)
			return;
	}
}

void say(struct qemu *q, const char *text)
{
	say_bytes(q, text, strlen(text));
}

__attribute__((format(printf, 2, 3)))
void answer(struct qemu *q, const char *fmt, ...)
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

void refuse(struct qemu *q, const char *why)
{
	say(q, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"");
	say(q, why);
	say(q, "\"}}\r\n");
}

static void say_event(struct qemu *q, const char *name, const char *more)
{
	char text[200];

	snprintf(text, sizeof(text),
		 "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"%s\"%s}\r\n",
		 name, more);
	say(q, text);
}

void send_event(struct qemu *q, const char *name)
{
	say_event(q, name, "");
}

void send_job_event(struct qemu *q, const char *name)
{
	say_event(q, name, ", \"data\": {\"device\": \"kvm-checkpoint-0\"}");
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

void send_layout(struct qemu *q, const char *instead)
{
	char text[1000] = "";
	size_t n = 0;
	int i;

	if (instead) {
		say(q, instead);
		return;
	}
	for (i = 0; i < NR_BLOCKS; i++) {
		struct stat st = { 0 };

		CHECK(!q->blocks[i].shared || !fstat(q->blocks[i].fd, &st), "no memory");
		n += snprintf(text + n, sizeof(text) - n,
			      "%s{\"name\": \"%s\", \"pages\": %" PRIu64 ", \"shared\": %s, \"inode\": %lu}",
			      i ? ", " : "", q->blocks[i].name, q->blocks[i].npages,
			      q->blocks[i].shared ? "true" : "false", st.st_ino);
	}
	answer(q,
	       "{\"generation\": %" PRIu64 ", \"page-size\": 4096, \"dirty-log\": \"bitmap\", "
	       "\"blocks\": [%s], \"vm-log\": false, \"hears\": %s, \"slots\": [], \"devices\": [\"cpu 0 1\", \"apic 0 3\"%s], "
	       "\"ranges\": [%s]}",
	       q->generation, text, q->takes && !q->deaf ? "true" : "false", q->plugged ? q->plugged : "", ranges_text(q));
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
	q->lost = NULL;
	q->attached = true;
	q->generation++;
	for (i = 0; i < NR_BLOCKS; i++) {
		if (q->blocks[i].shared)
			memset(q->blocks[i].dirty, 0, q->blocks[i].npages);
	}
	send_fds(q);
	send_layout(q, q->layout);
}

static const char *states_text(struct qemu *q)
{
	static char text[100];

	snprintf(text, sizeof(text), q->states_nr ? ", \"page-states\": {\"block\": 0, \"page\": %"
		 PRIu64 ", \"count\": %" PRIu64 "}" : "", q->states_page, q->states_nr);
	return text;
}

static void do_stop(struct qemu *q, unsigned int limit_ms)
{
	char lost[100] = "", blocked[100] = "";
	/* One that could not be resumed would run */
	bool ran = q->running || q->stopped;

	if (q->lost)
		snprintf(lost, sizeof(lost), ", \"lost\": \"%s\"", q->lost);
	if (q->blocked)
		snprintf(blocked, sizeof(blocked), ", \"blocked\": \"%s\"", q->blocked);
	if (q->run_state || q->lost) {
		q->stopped = false;
		answer(q, "{\"running\": false, \"status\": \"%s\", \"loadable\": false%s}",
		       q->run_state ? q->run_state : "running", lost);
		return;
	}
	if (ran) {
		states_change(q);
		guest_writes(q, below(40));
		send_event(q, "STOP");
	}
	q->stopped = ran;
	q->running = false;
	q->spoilt_by = NULL;
	q->snaps_before = q->nr_snaps;
	q->limit_us = ran && limit_ms ? kc_now_us() + limit_ms * 1000ull : 0;
	answer(q, "{\"running\": %s, \"status\": \"%s\", \"loadable\": %s, \"discarded\": %s%s%s}",
	       ran ? "true" : "false", q->stopped_as ? q->stopped_as : "paused",
	       q->blocked ? "false" : "true", q->discarded ? "true" : "false", blocked, states_text(q));
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
			/* By which holes stay holes */
			CHECK(pread(q->blocks[i].fd, s->ram[i], size, 0) == (ssize_t)size,
			      "cannot read the guest's memory");
		}
	}
	if (q->undefined) {
		s->undefined = malloc(q->blocks[0].npages);
		memcpy(s->undefined, q->undefined, q->blocks[0].npages);
	}
	if (q->disk.data) {
		s->disk = malloc(q->disk.npages * KC_PAGE_SIZE);
		memcpy(s->disk, q->disk.data, q->disk.npages * KC_PAGE_SIZE);
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

void write_buffer(struct qemu *q, const void *data, size_t len, uint64_t at)
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

static void save(struct qemu *q, struct told *told)
{
	struct snap *s = take_snap(q);

	write_buffer(q, s->state, s->state_len, 0);
	told->state_size = s->state_len;
	told->packets = q->holds ? ++q->packets : 0;
}

/* Where the runs of pages begin, and how many they are */
static void tell_pages(struct qemu *q, struct told *told)
{
	told->generation = q->generation;
	told->offset = (told->state_size + 15) / 16 * 16;
	told->runs = write_runs(q, told->offset);
	told->collect_us = 3;
	told->discarded = q->discarded;
	q->discarded = false;
}

uint64_t append_run(struct qemu *q, const struct told *told, uint32_t block, uint64_t page,
		    uint64_t n)
{
	struct pages run = { .block = block, .npages = n, .page = page };

	write_buffer(q, &run, sizeof(run), told->offset + told->runs * sizeof(run));
	memset(q->blocks[block].dirty + page, 0, n);
	return told->runs + 1;
}

static void do_collect(struct qemu *q, bool state)
{
	struct told told = { 0 };

	if (state && q->tear == RESUMED) {
		q->running = true;
		q->stopped = false;
		send_event(q, "RESUME");
	}
	if (state && !q->running && !q->run_state && !q->lost && !q->blocked) {
		/* Devices flush what they have */
		if (q->stopped)
			guest_writes(q, below(3));
		save(q, &told);
	}
	tell_pages(q, &told);
	if (state && q->tear != WHOLE)
		guest_writes(q, 20);
	answer(q,
	       "{\"generation\": %" PRIu64 ", \"state-size\": %" PRIu64 ", \"offset\": %" PRIu64
	       ", \"runs\": %" PRIu64 ", \"collect-us\": 3, \"packets\": %" PRIu64
	       ", \"discarded\": %s%s}",
	       told.generation, told.state_size, told.offset, told.runs, told.packets,
	       told.discarded ? "true" : "false", q->running ? states_text(q) : "");
	if (q->running)
		states_change(q);
}

static void resume(struct qemu *q)
{
	q->running = true;
	q->stopped = false;
	q->limit_us = 0;
	send_event(q, "RESUME");
}

/* It has stood still for long enough: what was saved is of no use */
static void look_at_the_clock(struct qemu *q)
{
	if (!q->limit_us || kc_now_us() < q->limit_us)
		return;
	send_event(q, "CHECKPOINT_LATE");
	resume(q);
	q->spoilt_by = "late";
	if (q->nr_snaps > q->snaps_before)
		q->snaps[q->nr_snaps - 1].torn = true;
}

static void do_cont(struct qemu *q)
{
	char more[200] = "";

	q->limit_us = 0;
	if (q->stopped && q->waits_for)
		snprintf(more, sizeof(more), ", \"waits-for\": \"%s\"", q->waits_for);
	else if (q->stopped)
		resume(q);
	if (q->tear != WHOLE)
		q->spoilt_by = q->tear == RESUMED ? "resumed" : "written";
	if (q->spoilt_by)
		snprintf(more, sizeof(more), ", \"spoilt-by\": \"%s\"", q->spoilt_by);
	answer(q, "{\"resumed\": %s, \"consistent\": %s%s}", q->running ? "true" : "false",
	       q->spoilt_by ? "false" : "true", more);
	q->tear = WHOLE;
}

static void tell(struct qemu *q, struct told *told)
{
	if (q->sock >= 0 && (!q->tells || q->tells(q, told)))
		CHECK(send(q->sock, told, sizeof(*told), MSG_NOSIGNAL) == sizeof(*told),
		      "the client is gone");
}

/* Until the client has copied all; false if it has not, in time */
static bool is_copied(struct qemu *q, uint64_t until_us)
{
	struct pollfd p = { .fd = q->sock, .events = POLLIN };
	char byte;

	while (q->sock >= 0 && kc_now_us() < until_us) {
		if (poll(&p, 1, 10) != 1)
			continue;
		if (recv(q->sock, &byte, 1, MSG_DONTWAIT) == 1)
			return true;
		break;
	}
	return false;
}

static void tell_ended(struct qemu *q, uint64_t flags, const char *why)
{
	struct ended ended = { .what = TOLD_ENDED, .flags = flags };

	snprintf(ended.why, sizeof(ended.why), "%s", why);
	/* It may be gone */
	if (q->sock >= 0 && (!q->ends || q->ends(q, &ended)))
		send(q->sock, &ended, sizeof(ended), MSG_NOSIGNAL);
}

/* All in one, and nothing else happens meanwhile */
static void do_take(struct qemu *q, unsigned int limit_ms, bool asked)
{
	struct told told = { .what = TOLD_STOPPED, .states_page = q->states_page,
			     .states_nr = q->states_nr, .discarded = q->discarded };
	uint64_t until = kc_now_us() + limit_ms * 1000ull;
	char more[200] = "";
	bool copied;

	if (!q->takes) {
		say(q, "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"The command " TAKE
		    " has not been found\"}}\r\n");
		return;
	}
	CHECK(limit_ms, "the main loop would stand still for ever");
	if (!q->running || q->run_state || q->lost || q->blocked) {
		if (asked)
			tell_ended(q, 0, "");
		else
			answer(q, "{\"taken\": false, \"consistent\": false, \"resumed\": false}");
		return;
	}
	while (recv(q->sock, more, sizeof(more), MSG_DONTWAIT) > 0)
		;
	more[0] = '\0';
	states_change(q);
	guest_writes(q, below(40));
	q->running = false;
	q->stopped = true;
	q->spoilt_by = NULL;
	tell(q, &told);
	if (q->sock < 0)
		return;
	guest_writes(q, below(3));
	told.what = TOLD_SAVED;
	save(q, &told);
	tell_pages(q, &told);
	tell(q, &told);
	copied = is_copied(q, until);
	if (!copied && !q->spoilt_by)
		q->spoilt_by = "late";
	q->nr_taken += copied && !q->spoilt_by;
	if (q->spoilt_by) {
		q->snaps[q->nr_snaps - 1].torn = true;
		snprintf(more, sizeof(more), ", \"spoilt-by\": \"%s\"", q->spoilt_by);
	}
	q->running = true;
	q->stopped = false;
	if (asked) {
		tell_ended(q, ENDED_TAKEN | ENDED_RESUMED | (q->spoilt_by ? 0 : ENDED_CONSISTENT),
			   q->spoilt_by ? q->spoilt_by : "");
		return;
	}
	answer(q, "{\"taken\": true, \"consistent\": %s, \"resumed\": true%s}",
	       q->spoilt_by ? "false" : "true", more);
}

/* It may be gone */
static void end_guard(struct qemu *q, char what)
{
	if (q->guard >= 0)
		send(q->guard, &what, 1, MSG_NOSIGNAL);
	close_fd(&q->guard);
}

static void end_holding(struct qemu *q, bool drop)
{
	end_guard(q, drop ? 'd' : 'r');
	q->holds = false;
	q->held_for[0] = '\0';
}

void let_go(struct qemu *q)
{
	end_holding(q, false);
}

static void do_guard(struct qemu *q)
{
	CHECK(q->got_guard >= 0 && q->holds, "there is nothing to guard");
	end_guard(q, 'k');
	q->guard = q->got_guard;
	q->got_guard = -1;
	send(q->guard, "g", 1, MSG_NOSIGNAL);
	answer(q, "{}");
}

static void do_hold(struct qemu *q, unsigned int limit_ms, struct json_object *args)
{
	struct json_object *o;
	const char *name = json_object_object_get_ex(args, "checkpoints", &o) ?
			   json_object_get_string(o) : "";
	bool anew = json_object_object_get_ex(args, "anew", &o) && json_object_get_boolean(o);
	bool unbroken = q->holds && *name && !strcmp(name, q->held_for);

	if (q->not_held) {
		refuse(q, q->not_held);
		return;
	}
	if (!unbroken)
		snprintf(q->held_for, sizeof(q->held_for), "%s", anew ? name : "");
	q->holds = strcmp(q->cards, "[]") || q->taps;
	q->limit_ms = limit_ms;
	q->holds_begun++;
	answer(q, "{\"cards\": %s, \"taps\": %s, \"unbroken\": %s}", q->cards,
	       q->taps ? q->taps : "[]", unbroken ? "true" : "false");
}

static void do_release(struct qemu *q, struct json_object *args)
{
	struct json_object *o;
	bool drop = json_object_object_get_ex(args, "drop", &o) && json_object_get_boolean(o);

	if (json_object_object_get_ex(args, "packets", &o)) {
		CHECK(json_object_get_uint64(o) > q->released && !drop,
		      "releases %" PRIu64 " after %" PRIu64, json_object_get_uint64(o), q->released);
		q->released = json_object_get_uint64(o);
		CHECK(q->released <= q->packets, "releases what is in no state");
	} else {
		end_holding(q, drop);
		q->released_all += !drop;
		q->dropped_all += drop;
	}
	answer(q, "{\"held\": 0, \"bytes\": 0, \"dropped\": 0}");
}

static void do_lease(struct qemu *q, struct json_object *args, const char *name)
{
	struct json_object *o;

	if (q->lease_us && json_object_object_get_ex(args, "lease-first", &o))
		return;
	if (json_object_object_get_ex(args, name, &o))
		q->lease_us = json_object_get_uint64(o);
	if (!strcmp(name, "until-us"))
		answer(q, "{}");
}

/* The owner's; nothing that an epoch does resumes it then */
static void do_qmp_stop(struct qemu *q)
{
	q->running = false;
	q->stopped = false;
	answer(q, "{}");
}

static void end_it(struct qemu *q)
{
	answer(q, "{}");
	q->dies_after = true;
}

static void do_qmp_cont(struct qemu *q)
{
	q->running = true;
	send_event(q, "RESUME");
	answer(q, "{}");
}

static void do_getfd(struct qemu *q, const char *name)
{
	int *fd = strstr(name, "socket") ? &q->got_socket :
		  strstr(name, "packets") ? &q->got_notify :
		  strstr(name, "guard") ? &q->got_guard : &q->got_buffer;

	CHECK(q->sent_fd >= 0, "getfd without a file descriptor");
	close_fd(fd);
	*fd = q->sent_fd;
	q->sent_fd = -1;
	answer(q, "{}");
}

static void do_qom_list(struct qemu *q, const char *path)
{
	if (!strcmp(path, "/machine/peripheral"))
		answer(q, "%s", q->devices);
	else
		answer(q, "[{\"name\": \"type\", \"type\": \"string\"}%s]",
		       q->peripheral ? q->peripheral : "");
}

static void obey(struct qemu *q, const char *command, struct json_object *args)
{
	struct json_object *o;

	if (!strcmp(command, ATTACH))
		do_attach(q);
	else if (!strcmp(command, LAYOUT))
		send_layout(q, q->new_layout);
	else if (!strcmp(command, LEASE))
		do_lease(q, args, "until-us");
	else if (!strcmp(command, STOP))
		do_stop(q, json_object_object_get_ex(args, "limit-ms", &o) ?
			   json_object_get_int(o) : 0);
	else if (!strcmp(command, COLLECT))
		do_collect(q, json_object_object_get_ex(args, "state", &o) &&
			      json_object_get_boolean(o));
	else if (!strcmp(command, CONT))
		do_cont(q);
	else if (!strcmp(command, TAKE))
		do_take(q, json_object_object_get_ex(args, "limit-ms", &o) ?
			   json_object_get_int(o) : 0, false);
	else if (!strcmp(command, HOLD))
		do_hold(q, json_object_object_get_ex(args, "limit-ms", &o) ?
			   json_object_get_int(o) : 0, args);
	else if (!strcmp(command, RELEASE))
		do_release(q, args);
	else if (!strcmp(command, GUARD))
		do_guard(q);
	else if (!strcmp(command, HINTS) && json_object_object_get_ex(args, "action", &o))
		do_hints(q, json_object_get_string(o));
	else if (!strcmp(command, "getfd"))
		do_getfd(q, json_object_object_get_ex(args, "fdname", &o) ?
			    json_object_get_string(o) : "");
	else if (!strcmp(command, "qmp_capabilities"))
		answer(q, "{}");
	else if (!strcmp(command, "stop"))
		do_qmp_stop(q);
	else if (!strcmp(command, "cont"))
		do_qmp_cont(q);
	else if (!strcmp(command, "quit"))
		end_it(q);
	else if (!strcmp(command, "query-status"))
		answer(q, "{\"running\": %s}", q->running ? "true" : "false");
	else if (!strcmp(command, "query-block"))
		answer(q, "%s", disk_says(q));
	else if (!strcmp(command, "query-uuid"))
		answer(q, "{\"UUID\": \"%s\"}", q->uuid);
	else if (!strcmp(command, "query-name"))
		answer(q, "{\"name\": \"%s\"}", q->name);
	else if (!strcmp(command, "query-version"))
		answer(q, "{\"qemu\": {\"micro\": 1, \"minor\": 2, \"major\": 7}, \"package\": \"\"}");
	else if (!strcmp(command, "qom-get"))
		answer(q, "\"pc-i440fx-7.2-machine\"");
	else if (!strcmp(command, "qom-list"))
		do_qom_list(q, json_object_object_get_ex(args, "path", &o) ?
			       json_object_get_string(o) : "");
	else if (!strcmp(command, "query-cpus-fast"))
		answer(q, "[{\"cpu-index\": 0}, {\"cpu-index\": 1}]");
	else if (!disk_obeys(q, command, args))
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
		if (!strcmp(command, STOP) || (!strcmp(command, TAKE) && q->takes))
			do_lease(q, args, "lease-us");
		CHECK(strncmp(command, "x-", 2) || q->attached || !strcmp(command, ATTACH) ||
		      !strcmp(command, LEASE) || !strcmp(command, RELEASE) ||
		      !strcmp(command, HINTS),
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

/* Asked for an epoch on the socket, by something that begins with what it has to */
static void be_asked(struct qemu *q)
{
	const char *instead;

	q->nr_asked = 0;
	q->times_asked++;
	if (q->asked.flags & 1)
		q->lease_us = q->asked.flags & 2 && q->lease_us ? q->lease_us : q->asked.lease_us;
	instead = q->hook ? q->hook(q, TAKE) : NULL;
	if (instead == dead) {
		die(q);
		return;
	}
	CHECK(!instead, "this cannot be said on a socket");
	do_take(q, q->asked.limit_ms, true);
	if (q->dies_after)
		die(q);
}

static void read_socket(struct qemu *q)
{
	const uint64_t what = ASKED_TAKE;
	char *to = (char *)&q->asked;
	ssize_t n = recv(q->sock, to + q->nr_asked, sizeof(q->asked) - q->nr_asked, MSG_DONTWAIT);

	if (n <= 0) {
		detach(q);
		return;
	}
	/* That all is copied may come too late */
	for (q->nr_asked += n; q->nr_asked; q->nr_asked--) {
		if (!memcmp(to, &what, q->nr_asked < sizeof(what) ? q->nr_asked : sizeof(what)))
			break;
		CHECK(!*to, "what it says on the socket makes no sense");
		memmove(to, to + 1, q->nr_asked - 1);
	}
	if (q->nr_asked == sizeof(q->asked))
		be_asked(q);
}

/* What comes within some milliseconds; a running guest writes meanwhile */
void step(struct qemu *q, int ms)
{
	struct pollfd p[] = {
		{ .fd = q->monitor, .events = POLLIN },
		{ .fd = q->sock, .events = POLLIN },
		/* One at a time, as QEMU does it */
		{ .fd = q->monitor < 0 ? q->listener : -1, .events = POLLIN },
	};
	const char *instead;

	look_at_the_clock(q);
	disk_copies(q);
	if (poll(p, 3, ms) <= 0) {
		if (q->running)
			guest_writes(q, 2);
		return;
	}
	if (p[0].revents) {
		read_monitor(q);
	} else if (p[1].revents) {
		read_socket(q);
	} else if (p[2].revents) {
		q->monitor = accept4(q->listener, NULL, NULL, SOCK_CLOEXEC);
		instead = q->hook ? q->hook(q, "greeting") : NULL;
		if (!instead)
			instead = "{\"QMP\": {\"version\": {}, \"capabilities\": [\"oob\"]}}\r\n";
		if (instead != silent)
			say(q, instead);
	}
}
