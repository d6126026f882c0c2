// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the cases need and a shell has not.
 *
 * usage: tool qmp SOCKET COMMAND...	gives QMP commands, prints what they return; 1 if one fails
 *	  tool guest SOCKET LINE [N]	says LINE to the guest and prints its answer; waits N seconds for it
 *	  tool gdb SOCKET PACKET...	tells QEMU's gdbstub, at once, and waits until the guest stops
 *	  tool clock SOCKET		the guest's answer to "time", after the time here
 *	  tool fence RAM OUT		succeeds, as a fence, and leaves somebody behind who writes to OUT when
 *					the guest whose memory is in RAM made its next step, and which
 *	  tool same FILE FILE [used [ADDRESS]...]
 *					compares page by page; only what the guest says that it uses, in the
 *					first table that it has, or in those at some addresses
 *	  tool tap NAME [queues]	makes a tap device that stays, of several queues, with the host's address of
 *					beats.h
 *	  tool beats OUT		hears the guest, and writes a line to OUT for each number of beats.h
 *	  tool disk FILE		makes the guest's disk
 *	  tool asks SOCKET [N]		asks QEMU for epochs on the socket of x-checkpoint-attach, and for
 *					what is none: N times what is at random, from a seed that it prints
 *
 * A command is a name, or a whole object.  An answer of the guest begins with the first word of what
 * it was told.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "beats.h"
#include "driver.h"
#include "ledger.h"

#define SECONDS 300	/* on any machine */

static char buf[1 << 20];

/* It may not be there yet, or have another client for a moment */
static int connect_to(const char *path)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	uint64_t until = now_us() + 5000000;
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);

	snprintf(sun.sun_path, sizeof(sun.sun_path), "%s", path);
	while (connect(fd, (struct sockaddr *)&sun, sizeof(sun))) {
		if (now_us() > until) {
			fprintf(stderr, "tool: nobody listens at %s\n", path);
			exit(3);
		}
		usleep(20000);
	}
	return fd;
}

static void say(int fd, const char *text)
{
	if (send(fd, text, strlen(text), MSG_NOSIGNAL) != (ssize_t)strlen(text))
		exit(3);
}

/* Events come in between.  False if the command failed. */
static bool execute(int fd, const char *command)
{
	bool object = *command == '{';
	char *line;

	say(fd, object ? command : "{'execute': '");
	say(fd, object ? "\n" : command);
	if (!object)
		say(fd, "'}\n");
	do {
		line = read_line(fd, buf, sizeof(buf), "{\"return\"", "{\"error\"", SECONDS);
	} while (line && strncmp(line, "{\"return\"", 9) && strncmp(line, "{\"error\"", 8));
	if (!line) {
		printf("no answer to %s\n", command);
		exit(3);
	}
	return line[2] == 'r';
}

static int qmp(int n, char **commands)
{
	int fd = connect_to(*commands), bad = 0;

	execute(fd, "qmp_capabilities");
	while (--n) {
		bad |= !execute(fd, *++commands);
		printf("%s\n", buf);
	}
	return bad;
}

static int guest(const char *path, const char *what, unsigned int seconds)
{
	int fd = connect_to(path);
	char *line;

	say(fd, what);
	say(fd, "\n");
	line = read_line(fd, buf, sizeof(buf), what, NULL, seconds);
	if (!line)
		return 1;
	printf("%s\n", strstr(line, what));
	return 0;
}

/*
 * All in one write, so that QEMU does all of it without looking elsewhere: to be connected stops the
 * guest, and nobody sees what is in between.
 */
static int gdb(int n, char **packets)
{
	int fd = connect_to(*packets);
	uint64_t until = now_us() + SECONDS * 1000000ull;
	size_t len = 0;

	while (--n) {
		const char *p = *++packets;
		unsigned int sum = 0;

		len += snprintf(buf + len, sizeof(buf) - len, "$%s", p);
		while (*p)
			sum += (uint8_t)*p++;
		len += snprintf(buf + len, sizeof(buf) - len, "#%02x", sum % 256);
	}
	say(fd, buf);
	/* What stops it is a packet that begins with T; others are the answers to ours */
	*buf = '\0';
	for (len = 0; now_us() < until && len < sizeof(buf) - 1;) {
		struct pollfd p = { .fd = fd, .events = POLLIN };

		if (poll(&p, 1, 100) <= 0)
			continue;
		if (read(fd, buf + len, 1) != 1)
			break;
		buf[++len] = '\0';
		if (strstr(buf, "$T") && strchr(strstr(buf, "$T"), '#')) {
			printf("%s\n", buf);
			return 0;
		}
	}
	printf("the guest does not stop: %s\n", buf);
	return 1;
}

/* Of some answers the one that took least, which says best when it was given */
static int clock_of_guest(const char *path)
{
	uint64_t before, after, at = 0, least = ~0ull;
	static char best[256];
	int fd = connect_to(path), i;
	char *line;

	for (i = 0; i < 20; i++) {
		before = now_us();
		say(fd, "time\n");
		line = read_line(fd, buf, sizeof(buf), "time", NULL, SECONDS);
		after = now_us();
		if (!line)
			return 1;
		if (after - before >= least)
			continue;
		least = after - before;
		at = before + least / 2;
		snprintf(best, sizeof(best), "%s", strstr(line, "time"));
	}
	printf("%lu %s\n", at, best);
	return 0;
}

#define WRITER		0
#define MAX_PAGES	8192
#define MAX_COPIES	8

/*
 * The guest's first writer has made "last" steps.  Which page the next one writes follows from its
 * number, so that nothing else has to be looked at; but there may be copies of it, which the guest's
 * kernel has left where it moved pages away from.
 */
static int next_step(const char *ram, const char *out)
{
	uint64_t n, i, pages, npages = 0, last = 0, made = 0, copies = 0, fenced, next;
	volatile uint64_t *copy[MAX_COPIES];
	int fd = open(ram, O_RDONLY);
	struct stat st;
	uint64_t *map;
	FILE *f;

	if (fd < 0 || fstat(fd, &st))
		return 1;
	map = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		return 1;
	pages = st.st_size / PAGE;
	for (n = 0; n < pages; n++) {
		uint64_t *p = map + n * PAGE_WORDS, nr = page_number(p);

		if (*p != page_tag(WRITER, nr) || nr >= MAX_PAGES)
			continue;
		if (page_step(p) > last)
			last = page_step(p);
		if (nr >= npages)
			npages = nr + 1;
	}
	next = npages ? page_tag(WRITER, step_page(WRITER, last + 1, npages)) : 0;
	for (n = 0; next && n < pages && copies < MAX_COPIES; n++) {
		if (map[n * PAGE_WORDS] == next)
			copy[copies++] = map + n * PAGE_WORDS;
	}
	if (!copies) {
		printf("this is no memory of the guest\n");
		return 1;
	}
	fenced = now_us();
	if (fork())
		return 0;
	setsid();
	while (!made && now_us() - fenced < SECONDS * 1000000ull) {
		for (i = 0; i < copies; i++)
			made = *copy[i] == next && copy[i][1] > last ? copy[i][1] : made;
		usleep(100);
	}
	n = now_us() - fenced;
	f = fopen(out, "w");
	if (f && made)
		fprintf(f, "step %lu, which comes after %lu, after %.1f ms\n", made, last, n / 1e3);
	return f ? fclose(f) : 1;
}

/* By which holes stay holes; NULL: the file has no such page */
static uint8_t *read_page(int fd, uint64_t page, uint8_t *to)
{
	return pread(fd, to, PAGE, page * PAGE) == (ssize_t)PAGE ? to : NULL;
}

/* What the guest says of its pages; NULL: nothing */
static uint8_t *find_states(int fd, uint64_t npages, const char *address)
{
	uint64_t at = address ? strtoull(address, NULL, 16) / PAGE : 0, nr;
	static uint8_t page[PAGE];
	uint8_t *states;

	for (; read_page(fd, at, page); at++) {
		nr = has_page_states(page, npages);
		states = nr ? calloc(npages, 1) : NULL;
		if (states && pread(fd, states, nr, (at + 1) * PAGE) == (ssize_t)nr)
			return states;
		free(states);
		if (address)
			break;
	}
	return NULL;
}

/* Unused is what one of the tables at so many addresses says is unused */
static uint8_t *find_all_states(int fd, uint64_t npages, char **address, int n)
{
	uint8_t *all = find_states(fd, npages, n ? address[0] : NULL), *more;
	uint64_t page;
	int i;

	for (i = 1; all && i < n; i++) {
		more = find_states(fd, npages, address[i]);
		if (!more)
			return NULL;
		for (page = 0; page < npages; page++)
			all[page] |= more[page] == 1;
		free(more);
	}
	return all;
}

static int same(const char *a, const char *b, bool but_unused, char **address, int n_addresses)
{
	int fd[2] = { open(a, O_RDONLY), open(b, O_RDONLY) };
	static uint8_t left[PAGE], right[PAGE];
	uint64_t page, n, bad = 0, unused = 0;
	uint8_t *states = NULL;
	struct stat st[2];
	int i;

	for (i = 0; i < 2; i++) {
		if (fd[i] < 0 || fstat(fd[i], &st[i])) {
			printf("cannot open both files\n");
			return 3;
		}
	}
	n = st[0].st_size / PAGE;
	if (but_unused)
		states = find_all_states(fd[0], n, address, n_addresses);
	if (but_unused && !states) {
		printf("there are no page states\n");
		return 3;
	}
	for (page = 0; page < n && st[0].st_size == st[1].st_size; page++) {
		if (states && states[page] == 1)
			unused++;
		else
			bad += !read_page(fd[0], page, left) || !read_page(fd[1], page, right) ||
			       memcmp(left, right, PAGE);
	}
	printf("%lu of %lu pages differ, of %lu that are used\n", bad, n, n - unused);
	return bad || st[0].st_size != st[1].st_size;
}

/* --- x-checkpoint-take on the client's socket ------------------------------- */

struct asked {
	uint64_t what, limit_ms, flags, lease_us;
};

#define ASKED_TAKE	0x3145464154504b43ull

/* Both of what it is told are as long */
struct told {
	uint64_t what, flags;
	char why[72];
};

enum { STOPPED = 1, SAVED, ENDED };
enum { TAKEN = 1, CONSISTENT = 2, RESUMED = 4, FAILED = 8 };

/* Of an attached client */
static int asks_fd;

static bool give(int fd, const char *name, int given)
{
	char text[96];
	struct iovec iov = { text, snprintf(text, sizeof(text),
		"{'execute': 'getfd', 'arguments': {'fdname': '%s'}}\n", name) };
	union {
		char buf[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = { 0 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf,
		.msg_controllen = sizeof(control.buf),
	};
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

	c->cmsg_level = SOL_SOCKET;
	c->cmsg_type = SCM_RIGHTS;
	c->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(c), &given, sizeof(int));
	return sendmsg(fd, &msg, MSG_NOSIGNAL) == (ssize_t)iov.iov_len &&
	       read_line(fd, buf, sizeof(buf), "{\"return\"", "{\"error\"", SECONDS) &&
	       !strstr(buf, "\"error\"");
}

static bool attach(int fd)
{
	int pair[2], memory = memfd_create("asks", 0);
	char byte;

	/* One that is gone may be known for a moment */
	for (int i = 0; i < 100; i++) {
		if (memory < 0 || socketpair(AF_UNIX, SOCK_STREAM, 0, pair) ||
		    !give(fd, "socket", pair[1]) || !give(fd, "buffer", memory))
			return false;
		close(pair[1]);
		if (execute(fd, "{'execute': 'x-checkpoint-attach', 'arguments': {'socket': 'socket', 'buffer': 'buffer'}}")) {
			if (!strstr(buf, "\"hears\": true"))
				return false;
			asks_fd = pair[0];
			close(memory);
			/* The files that came are closed as nobody takes them */
			while (recv(asks_fd, &byte, 1, MSG_DONTWAIT) == 1)
				;
			return true;
		}
		close(pair[0]);
		usleep(50000);
	}
	return false;
}

static bool send_all(const void *what, size_t len)
{
	return send(asks_fd, what, len, MSG_NOSIGNAL) == (ssize_t)len;
}

/* Whether it is told this next, and no more of it */
static bool hears(uint64_t what, uint64_t flags, const char *why)
{
	uint64_t until = now_us() + SECONDS * 1000000ull;
	struct pollfd p = { .fd = asks_fd, .events = POLLIN };
	struct told told;
	size_t got = 0;
	ssize_t n;

	while (got < sizeof(told) && now_us() < until) {
		if (poll(&p, 1, 100) <= 0)
			continue;
		n = recv(asks_fd, (char *)&told + got, sizeof(told) - got, 0);
		if (n <= 0)
			break;
		got += n;
	}
	if (got == sizeof(told) && told.what == what &&
	    (what != ENDED || (told.flags == flags && !strncmp(told.why, why, sizeof(told.why)))))
		return true;
	printf("of %lu, %lu it is told %zu bytes: %lu, %lu, %.72s\n", what, flags, got, told.what,
	       told.flags, told.what == ENDED ? told.why : "");
	return false;
}

/* Its end of one that is taken, and has been asked for */
static bool is_taken(void)
{
	return hears(STOPPED, 0, "") && hears(SAVED, 0, "") && send_all("", 1) &&
	       hears(ENDED, TAKEN | CONSISTENT | RESUMED, "");
}

static bool takes(void)
{
	struct asked asked = { ASKED_TAKE, 60000, 0, 0 };

	return send_all(&asked, sizeof(asked)) && is_taken();
}

/* In pieces, which come one after the other */
static bool takes_slowly(void)
{
	struct asked asked = { ASKED_TAKE, 60000, 0, 0 };
	size_t i;

	for (i = 0; i < sizeof(asked); i++) {
		if (!send_all((char *)&asked + i, 1))
			return false;
		usleep(5000);
	}
	return is_taken();
}

static bool refuses(uint64_t limit_ms)
{
	struct asked asked = { ASKED_TAKE, limit_ms, 0, 0 };

	return send_all(&asked, sizeof(asked)) && hears(ENDED, 0, "");
}

/* A byte that comes when it is over is no answer to the next one */
static bool is_late(void)
{
	struct asked asked = { ASKED_TAKE, 300, 0, 0 };

	return send_all(&asked, sizeof(asked)) && hears(STOPPED, 0, "") && hears(SAVED, 0, "") &&
	       hears(ENDED, TAKEN | RESUMED, "late") && send_all("", 1) &&
	       send_all(&asked, sizeof(asked)) && hears(STOPPED, 0, "") && hears(SAVED, 0, "") &&
	       hears(ENDED, TAKEN | RESUMED, "late");
}

/* Bytes of which none begins as a request does */
static bool takes_after_noise(uint64_t *seed)
{
	unsigned char noise[256];
	struct asked asked = { ASKED_TAKE, 60000, 0, 0 };
	size_t len, i;

	for (i = 0; i < sizeof(noise); i++) {
		*seed = mix(*seed + 0x9e3779b97f4a7c15ull);
		noise[i] = *seed >> 20;
	}
	/* Or its beginning, with something else behind it */
	len = *seed % (sizeof(noise) - 8);
	if (*seed >> 40 & 1)
		memcpy(noise + len, &asked, *seed >> 41 & 7);
	noise[len + 7] = 0;
	return send_all(noise, len + 8) && takes();
}

/* It goes in the midst of one: the guest goes on */
static bool goes(int fd, unsigned int when)
{
	struct asked asked = { ASKED_TAKE, 60000, 0, 0 };
	bool ok = send_all(&asked, when ? sizeof(asked) : 11);

	if (when > 1)
		ok = ok && hears(STOPPED, 0, "");
	if (when > 2)
		ok = ok && hears(SAVED, 0, "");
	close(asks_fd);
	return ok && attach(fd) && takes();
}

static int asks(const char *path, unsigned int times)
{
	uint64_t seed = mix(now_us()) % 1000000;
	int fd = connect_to(path);
	const char *what = "attaches";
	unsigned int i;
	bool ok;

	printf("seed %lu\n", seed);
	execute(fd, "qmp_capabilities");
	ok = attach(fd);
	for (i = 0; ok && i < 3; i++) {
		what = "takes one";
		ok = takes();
	}
	if (ok) {
		what = "takes one that is asked for slowly";
		ok = takes_slowly();
	}
	if (ok) {
		what = "refuses one without a limit, and knows when one is late";
		ok = refuses(0) && takes() && is_late() && takes();
	}
	for (i = 0; ok && i < times; i++) {
		what = "takes one after noise";
		ok = takes_after_noise(&seed);
	}
	for (i = 0; ok && i < 4; i++) {
		what = "takes one when a client has gone";
		ok = goes(fd, i);
	}
	if (ok) {
		what = "refuses one of a guest that is stopped";
		ok = execute(fd, "stop") && refuses(60000) && execute(fd, "cont") && takes();
	}
	printf("%s%s\n", ok ? "all of it" : "it does not do this: ", ok ? "" : what);
	return !ok;
}

static int make_tap(const char *name, bool queues)
{
	struct ifreq r = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR |
					(queues ? IFF_MULTI_QUEUE : 0) };
	int fd = open("/dev/net/tun", O_RDWR);

	snprintf(r.ifr_name, sizeof(r.ifr_name), "%s", name);
	if (fd < 0 || ioctl(fd, TUNSETIFF, &r) || ioctl(fd, TUNSETPERSIST, 1) ||
	    !bring_up(name, BEATS_HOST)) {
		fprintf(stderr, "tool: no tap device %s: %s\n", name, strerror(errno));
		return 1;
	}
	return 0;
}

static int hear_beats(const char *to)
{
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_port = htons(BEATS_PORT) };
	int s = socket(AF_INET, SOCK_DGRAM, 0), room = 4 << 20;
	FILE *f = fopen(to, "w");
	uint64_t n;

	setsockopt(s, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room));
	if (!f || bind(s, (struct sockaddr *)&sin, sizeof(sin)))
		return 1;
	while (recv(s, &n, sizeof(n), 0) == sizeof(n)) {
		fprintf(f, "%lu\n", n);
		fflush(f);
	}
	return 1;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (!strcmp(what, "qmp") && argc > 3)
		return qmp(argc - 2, argv + 2);
	if (!strcmp(what, "guest") && (argc == 4 || argc == 5))
		return guest(argv[2], argv[3], argc == 5 ? atoi(argv[4]) : SECONDS);
	if (!strcmp(what, "gdb") && argc > 3)
		return gdb(argc - 2, argv + 2);
	if (!strcmp(what, "clock") && argc == 3)
		return clock_of_guest(argv[2]);
	if (!strcmp(what, "fence") && argc == 4)
		return next_step(argv[2], argv[3]);
	if (!strcmp(what, "same") && argc == 4)
		return same(argv[2], argv[3], false, NULL, 0);
	if (!strcmp(what, "same") && argc >= 5 && !strcmp(argv[4], "used"))
		return same(argv[2], argv[3], true, argv + 5, argc - 5);
	if (!strcmp(what, "tap") && (argc == 3 || argc == 4))
		return make_tap(argv[2], argc == 4);
	if (!strcmp(what, "beats") && argc == 3)
		return hear_beats(argv[2]);
	if (!strcmp(what, "disk") && argc == 3)
		return !make_disk(argv[2]);
	if (!strcmp(what, "asks") && (argc == 3 || argc == 4))
		return asks(argv[2], argc == 4 ? atoi(argv[3]) : 100);
	fprintf(stderr, "usage: tool asks|qmp|guest|gdb|clock|fence|same|tap|beats|disk ...\n");
	return 2;
}
