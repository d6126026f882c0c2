/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * How a test of dirty slot rings that runs in a process of its own fails.
 *
 * TEST_ASSERT() turns a failure into a skip when errno happens to be EACCES,
 * which some of them expect.
 */
#ifndef SELFTEST_KVM_DIRTY_SLOT_RING_CHECK_H
#define SELFTEST_KVM_DIRTY_SLOT_RING_CHECK_H

#include <errno.h>
#include <stdint.h>
#include <string.h>

#include <linux/compiler.h>

/* What else a test says of a failure, and does, before it ends; NULL for nothing. */
extern void (*check_report)(const char *what);

void __noreturn __printf(5, 6)
check_failed(const char *file, int line, const char *what, int err, const char *fmt, ...);

#define CHECK(cond, fmt, ...)							\
do {										\
	if (!(cond))								\
		check_failed(__FILE__, __LINE__, #cond, errno, fmt, ##__VA_ARGS__);	\
} while (0)

#define CHECK_EQ(a, b)								\
do {										\
	uint64_t __a = (a), __b = (b);						\
										\
	CHECK(__a == __b, "%s is %#lx, %s is %#lx", #a, __a, #b, __b);		\
} while (0)

/* @call must fail, with this errno. */
#define CHECK_ERR(call, err)							\
do {										\
	long __ret, __err = (err);						\
										\
	errno = 0;								\
	__ret = (long)(call);							\
	CHECK(__ret == -1 && errno == __err, "%s gave %ld, not -1 and %s",	\
	      #call, __ret, strerror(__err));					\
} while (0)

#define CHECK_OK(call)								\
do {										\
	long __ret = (long)(call);						\
										\
	CHECK(!__ret, "%s gave %ld", #call, __ret);				\
} while (0)

#endif
