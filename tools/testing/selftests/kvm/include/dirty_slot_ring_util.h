/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What tests of dirty slot rings do outside of guests: processes, signals,
 * memory that faults, counters, time.
 */
#ifndef SELFTEST_KVM_DIRTY_SLOT_RING_UTIL_H
#define SELFTEST_KVM_DIRTY_SLOT_RING_UTIL_H

#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Repeatable, and good enough to choose pages; guests use it as well. */
static inline uint64_t xorshift(uint64_t x)
{
	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return x;
}

void sleep_ms(unsigned int ms);
uint64_t now_ms(void);

/* For a short time that is never the same. */
void dither(int max);

/* What poll() says of a log, or 0 after @timeout_ms. */
int poll_log(int fd, int timeout_ms);

/* A poll() that has not come back by now sleeps on a log that is readable. */
#define WAKE_UP_MS	15000

/*
 * Who is told of changes alone, and of what was there at the start: a descriptor, to
 * be closed; and the wait for the next change, or longer than for WAKE_UP_MS.
 */
int edge_open(int fd);
void edge_wait(int ep);

/* The signal that reading or writing *@p brings, or 0. */
int probe(void *p, bool write);

/* The child ends, and well. */
void child_check(pid_t pid);

/* @n pages of memory, of which the last cannot be touched */
void *alloc_guarded(size_t n);

/* A descriptor over a socket, with a byte that says what it is for. */
void send_fd(int sock, char tag, int fd);

/* The descriptor, or -1 if there is none and @flags say not to wait; @tag may be NULL. */
int recv_fd(int sock, char *tag, int flags);

/* SIGALRM for this process, counted; 0 for no more. */
extern int nr_signals;
void signals_every_us(int us);

/* A counter of a VM's or a vCPU's statistics. */
uint64_t stat_of(int fd, const char *name);

#endif /* SELFTEST_KVM_DIRTY_SLOT_RING_UTIL_H */
