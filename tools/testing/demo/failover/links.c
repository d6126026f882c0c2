// SPDX-License-Identifier: GPL-2.0-only
/*
 * The link: everything goes through a relay, which cuts it, closes it or lets nothing through.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <sys/socket.h>

#include "failover.h"

#define RELAY_PORT	9000

static struct {
	bool runs;
	atomic_uint to;
	atomic_int state;
	atomic_bool cut;		/* set: cut after the next so many bytes */
	atomic_ulong after;
	atomic_uint cuts;
	/* When something came from the primary, and the longest time between two such */
	atomic_ulong last_us, gap_us;
} relay;

int tcp_socket(unsigned int port, bool listening)
{
	struct sockaddr_in sin = {
		.sin_family = AF_INET,
		.sin_port = htons(port),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (listening ? bind(fd, (struct sockaddr *)&sin, sizeof(sin)) || listen(fd, 4) :
			connect(fd, (struct sockaddr *)&sin, sizeof(sin))) {
		close(fd);
		return -1;
	}
	return fd;
}

static void heard(void)
{
	uint64_t now = now_us(), gap = now - relay.last_us;

	relay.last_us = now;
	if (gap > relay.gap_us)
		relay.gap_us = gap;
}

static void relay_bytes(int a, int b)
{
	struct pollfd p[2] = { { .fd = a, .events = POLLIN }, { .fd = b, .events = POLLIN } };
	char buf[16384];
	ssize_t n;
	int i;

	while (relay.state != LINK_REFUSES) {
		if (relay.state == LINK_SWALLOWS) {
			usleep(10000);
			continue;
		}
		if (poll(p, 2, 20) < 0)
			return;
		for (i = 0; i < 2; i++) {
			if (!p[i].revents)
				continue;
			n = read(p[i].fd, buf, sizeof(buf));
			if (n <= 0)
				return;
			if (!i)
				heard();
			if (relay.cut && i == 0) {
				if (relay.after < (uint64_t)n) {
					/* A part of it still arrives */
					send(b, buf, relay.after, MSG_NOSIGNAL);
					relay.cut = false;
					relay.cuts++;
					return;
				}
				relay.after -= n;
			}
			if (send(p[!i].fd, buf, n, MSG_NOSIGNAL) != n)
				return;
		}
	}
}

static void *relay_thread(void *arg)
{
	int listening = tcp_socket(RELAY_PORT + lane, true), a, b;

	(void)arg;
	if (listening < 0)
		fatal("the relay's port");
	for (;;) {
		a = accept4(listening, NULL, NULL, SOCK_CLOEXEC);
		b = tcp_socket(relay.to, false);
		if (a >= 0 && b >= 0)
			relay_bytes(a, b);
		close(a);
		close(b);
	}
	return NULL;
}

unsigned int relay_to(unsigned int port)
{
	pthread_t thread;

	relay.to = port;
	relay.last_us = now_us();
	if (!relay.runs && pthread_create(&thread, NULL, relay_thread, NULL))
		fatal("pthread_create");
	relay.runs = true;
	return RELAY_PORT + lane;
}

void relay_set(enum link state)
{
	relay.state = state;
}

void relay_cut(unsigned long after)
{
	relay.after = after;
	relay.cut = after;
}

unsigned int relay_cuts(void)
{
	return relay.cuts;
}

uint64_t relay_gap_us(void)
{
	uint64_t now = now_us() - relay.last_us, gap = relay.gap_us;

	relay.gap_us = 0;
	return gap > now ? gap : now;
}

bool test_links(unsigned int times)
{
	struct pair x = { .relayed = true };
	struct protect *p = &x.protect;
	unsigned int n, cuts;
	uint64_t until;
	bool ok;

	ok = begin(&x);
	for (n = 0; ok && n < times; n++) {
		uint64_t synced = p->synced;

		/* Somewhere in the epochs of the next second */
		cuts = relay_cuts();
		relay_cut(random_from(1, 400) * 1000);
		until = now_us() + SYNC_TIMEOUT * 1000000ull;
		while (relay_cuts() == cuts && now_us() < until)
			usleep(5000);
		if (relay_cuts() == cuts)
			ok = fail("nothing went over the link");
		ok = ok && guest_goes_on(&vm) && wait_synced(p, &vm, synced + 1);
		if (ok && !p->resync)
			ok = fail("all pages were sent again");
		ok = ok && compare_once(x.theirs);
		if (ok)
			note("link cut: the guest ran on, %lu pages differed, memory is equal",
			     p->differed);
	}
	end(&x);
	return ok;
}
