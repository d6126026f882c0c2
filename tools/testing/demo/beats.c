// SPDX-License-Identifier: GPL-2.0-only
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "beats.h"
#include "ledger.h"

static void *beat(void *arg)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(BEATS_PORT) };
	long us = (long)arg;
	uint64_t n;
	int s = socket(AF_INET, SOCK_DGRAM, 0), one = 1;
	cpu_set_t cpus;

	/* Of several queues each CPU has one, and between queues there is no order */
	CPU_ZERO(&cpus);
	CPU_SET(0, &cpus);
	pthread_setaffinity_np(pthread_self(), sizeof(cpus), &cpus);
	/* To all: who asks for an address first, and gets no answer for long, drops some by himself */
	to.sin_addr.s_addr = htonl(INADDR_BROADCAST);
	setsockopt(s, SOL_SOCKET, SO_BROADCAST, &one, sizeof(one));
	setsockopt(s, SOL_SOCKET, SO_BINDTODEVICE, "eth0", 5);
	/* What cannot be sent yet is sent once more */
	for (n = 1; ; usleep(us)) {
		if (sendto(s, &n, sizeof(n), 0, (struct sockaddr *)&to, sizeof(to)) == sizeof(n))
			n++;
	}
	return NULL;
}

const char *beats_start(long us)
{
	pthread_t thread;

	if (!bring_up("lo", "127.0.0.1") || !bring_up("eth0", BEATS_GUEST))
		return "network";
	return pthread_create(&thread, NULL, beat, (void *)us) ? "thread" : NULL;
}
