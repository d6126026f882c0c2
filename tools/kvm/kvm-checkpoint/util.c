// SPDX-License-Identifier: GPL-2.0-only
/*
 * What all parts of kvm-checkpoint share.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <json-c/json.h>

#include "util.h"

enum kc_log_level kc_log_max = KC_LOG_INFO;
bool kc_log_json;
bool kc_log_may_lose;

int kc_fail(struct kc_err *err, int error, const char *fmt, ...)
{
	/* Not directly into err->text: it may be an argument. */
	char text[sizeof(err->text)];
	va_list ap;

	if (!err)
		return -error;
	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	memcpy(err->text, text, sizeof(text));
	return -error;
}

bool kc_lock(int fd, bool (*try)(int fd))
{
	const uint64_t until = kc_now_us() + 1000000;

	while (!try(fd)) {
		if (kc_now_us() >= until)
			return false;
		poll(NULL, 0, 10);
	}
	return true;
}

bool kc_try_flock(int fd)
{
	return !flock(fd, LOCK_EX | LOCK_NB);
}

uint64_t kc_boot_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_BOOTTIME, &ts);
	return ts.tv_sec * 1000000ull + ts.tv_nsec / 1000;
}

uint64_t kc_now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

uint64_t kc_wall_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	return (uint64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

bool kc_can_write(int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLOUT };

	return poll(&p, 1, 0) != 0;
}

void kc_log(enum kc_log_level level, const char *fmt, ...)
{
	static const char * const names[] = { "error", "warning", "info", "debug" };
	char text[1024], line[1280];
	va_list ap;
	int n;

	if (level > kc_log_max)
		return;
	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);

	if (kc_log_json) {
		struct json_object *o = json_object_new_object();
		struct timespec ts;

		clock_gettime(CLOCK_REALTIME, &ts);
		json_object_object_add(o, "time",
				       json_object_new_double(ts.tv_sec + ts.tv_nsec / 1e9));
		json_object_object_add(o, "level", json_object_new_string(names[level]));
		json_object_object_add(o, "message", json_object_new_string(text));
		n = snprintf(line, sizeof(line), "%s\n",
			     json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN));
		json_object_put(o);
	} else {
		n = snprintf(line, sizeof(line), "kvm-checkpoint: %s%s%s\n",
			     level <= KC_LOG_WARN ? names[level] : "",
			     level <= KC_LOG_WARN ? ": " : "", text);
	}
	if (n >= (int)sizeof(line))
		line[sizeof(line) - 2] = '\n';
	/* One call, so that lines of several threads do not mix. */
	flockfile(stderr);
	if (!kc_log_may_lose || kc_can_write(STDERR_FILENO))
		fputs(line, stderr);
	funlockfile(stderr);
}

static int parse_number(const char *s, uint64_t *n, const char **end)
{
	char *e;

	if (*s < '0' || *s > '9')
		return -EINVAL;
	errno = 0;
	*n = strtoull(s, &e, 10);
	*end = e;
	return errno ? -EINVAL : 0;
}

int kc_parse_size(const char *s, uint64_t *bytes)
{
	static const char units[] = "kmgt";
	unsigned int shift = 0;
	const char *end, *u;
	uint64_t n;

	if (parse_number(s, &n, &end))
		return -EINVAL;
	if (*end) {
		u = strchr(units, *end | 0x20);
		if (!u || end[1])
			return -EINVAL;
		shift = 10 * (u - units + 1);
	}
	if (n >> (63 - shift))
		return -EINVAL;
	*bytes = n << shift;
	return 0;
}

int kc_parse_ms(const char *s, unsigned int *ms)
{
	unsigned int factor = 1;
	const char *end;
	uint64_t n;

	if (parse_number(s, &n, &end))
		return -EINVAL;
	if (!strcmp(end, "s"))
		factor = 1000;
	else if (!strcmp(end, "m"))
		factor = 60000;
	else if (*end && strcmp(end, "ms"))
		return -EINVAL;
	if (n > INT32_MAX / factor)
		return -EINVAL;
	*ms = n * factor;
	return 0;
}

int kc_check_owner(int dir, const char *path, struct kc_err *err)
{
	struct stat sb;

	if (fstat(dir, &sb))
		return kc_fail(err, errno, "cannot stat %s: %s", path, strerror(errno));
	if (sb.st_uid != geteuid() || sb.st_mode & 022)
		return kc_fail(err, EPERM,
			       "%s belongs to or can be written by somebody else: give a directory of your own",
			       path);
	return 0;
}

/* As it was, in the form in which it is written */
static char core_filter[16];

static void set_core_filter(const char *text)
{
	int fd = open("/proc/self/coredump_filter", O_WRONLY | O_CLOEXEC);

	/* It is there or the kernel makes no cores */
	if (fd < 0)
		return;
	if (write(fd, text, strlen(text)) < 0)
		kc_log(KC_LOG_WARN, "cannot set what a core has: %s", strerror(errno));
	close(fd);
}

void kc_core_without_memory(void)
{
	int fd = open("/proc/self/coredump_filter", O_RDONLY | O_CLOEXEC);
	char text[16] = "";

	if (fd < 0)
		return;
	if (read(fd, text, sizeof(text) - 1) > 0)
		snprintf(core_filter, sizeof(core_filter), "0x%lx", strtoul(text, NULL, 16));
	close(fd);
	set_core_filter("0");
}

void kc_core_as_before(void)
{
	if (*core_filter)
		set_core_filter(core_filter);
}

void kc_no_dump(void *addr, size_t len)
{
	madvise(addr, len, MADV_DONTDUMP);
}
