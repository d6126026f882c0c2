/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What all parts of kvm-checkpoint share: errors as texts, clocks, messages.
 */
#ifndef KC_UTIL_H
#define KC_UTIL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * struct kc_err - why something failed, in words for the user
 * @text: one sentence without newline; empty if nothing failed.
 *
 * Functions that take one return a negative errno (or NULL) on failure and then have set @text.
 * On success they leave it alone.  A caller that does not care may pass NULL.
 */
struct kc_err {
	char text[512];
};

/**
 * kc_fail() - say why and fail
 * @err: where to, or NULL.
 * @error: a positive errno.
 * @fmt: as for printf(); the text of @error is not added.
 *
 * Return: -@error, so that callers can say "return kc_fail(...)".
 */
__attribute__((format(printf, 3, 4)))
int kc_fail(struct kc_err *err, int error, const char *fmt, ...);

/**
 * kc_lock() - take a file's lock, as nobody else does
 * @fd: of the file.
 * @try: takes it, if nobody has it.
 *
 * One that was just killed may have it for some milliseconds more: as long as a process that it had
 * forked has not come to its exec().
 *
 * Return: false if somebody has had it for a second.
 */
bool kc_lock(int fd, bool (*try)(int fd));

/** kc_try_flock() - flock(), for kc_lock() */
bool kc_try_flock(int fd);

/** kc_now_us() - CLOCK_MONOTONIC in microseconds. */
uint64_t kc_now_us(void);

/** kc_boot_us() - CLOCK_BOOTTIME in microseconds: it goes on while the host is suspended. */
uint64_t kc_boot_us(void);

/** kc_wall_ms() - CLOCK_REALTIME in milliseconds, for what outlives the process. */
uint64_t kc_wall_ms(void);

enum kc_log_level { KC_LOG_ERROR, KC_LOG_WARN, KC_LOG_INFO, KC_LOG_DEBUG };

/* Messages above this level are not shown; KC_LOG_INFO by default. */
extern enum kc_log_level kc_log_max;

/* Messages are JSON objects, one a line, instead of text.  False by default. */
extern bool kc_log_json;

/*
 * Leave out messages that nobody reads, rather than wait for somebody.  For daemons; false by
 * default.
 */
extern bool kc_log_may_lose;

/* Would a line be taken at once?  A pipe takes 4 KiB then.  True also if writing fails. */
bool kc_can_write(int fd);

/**
 * kc_log() - one line for the user on stderr
 * @level: how bad.
 * @fmt: as for printf(), without newline.
 *
 * May be called from any thread; lines are never mixed.
 */
__attribute__((format(printf, 2, 3)))
void kc_log(enum kc_log_level level, const char *fmt, ...);

/**
 * kc_parse_size() - a size such as 4096, 64k, 2M or 1G
 * Return: 0 or -EINVAL.
 */
int kc_parse_size(const char *s, uint64_t *bytes);

/**
 * kc_parse_ms() - a time such as 100ms, 2s, 1m or 250 (milliseconds)
 * Return: 0 or -EINVAL.
 */
int kc_parse_ms(const char *s, unsigned int *ms);

/**
 * kc_check_owner() - is a directory fit to hold a guest's memory?
 * @dir: the directory.
 * @path: its name, for the message.
 * @err: what is wrong.
 *
 * Return: 0, or -EPERM if it belongs to or can be written by somebody else, who
 * could then put files of his own there.
 */
int kc_check_owner(int dir, const char *path, struct kc_err *err);

/** kc_no_dump() - a mapping of the guest's memory is no part of a core, whoever makes it */
void kc_no_dump(void *addr, size_t len);

/**
 * kc_core_without_memory() - if this process crashes, its core has registers and no memory
 *
 * A guest's memory and keys are in buffers everywhere.  kc_core_as_before() is for the programs that
 * we start.
 */
void kc_core_without_memory(void);
void kc_core_as_before(void);

/* In a map of bits: @n of them from @first on, all in one word; @n is 1 to 64 - @first */
static inline uint64_t kc_word_mask(unsigned int first, unsigned int n)
{
	return (n == 64 ? ~0ull : (1ull << n) - 1) << first;
}

#endif
