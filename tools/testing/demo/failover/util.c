// SPDX-License-Identifier: GPL-2.0-only
/*
 * What all parts of the driver use.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "failover.h"

#define QUIET_US	100000000u

/* When the last note was made */
static _Atomic uint64_t noted_us;

void note(const char *fmt, ...)
{
	char text[1024];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	if (nr_lanes > 1)
		printf("[%5.1f] %u: %s\n", (now_us() - started) / 1e6, lane + 1, text);
	else
		printf("[%5.1f] %s\n", (now_us() - started) / 1e6, text);
	fflush(stdout);
	noted_us = now_us();
}

static void first_line(char *text, size_t size, const char *fmt, int pid, const char *tid)
{
	char path[64];
	FILE *f;

	snprintf(path, sizeof(path), fmt, pid, tid);
	f = fopen(path, "r");
	if (!f || !fgets(text, size, f))
		text[0] = '\0';
	text[strcspn(text, "\n")] = '\0';
	if (f)
		fclose(f);
}

/* What each thread of a process waits for */
static void show_process(int pid)
{
	char path[64], name[64], where[64], in[200];
	struct dirent *d;
	DIR *dir;

	first_line(name, sizeof(name), "/proc/%d/comm", pid, "");
	if (strncmp(name, "kvm-checkpoint", 14) && strncmp(name, "qemu", 4))
		return;
	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	while (dir && (d = readdir(dir))) {
		if (d->d_name[0] == '.')
			continue;
		first_line(name, sizeof(name), "/proc/%d/task/%s/comm", pid, d->d_name);
		first_line(where, sizeof(where), "/proc/%d/task/%s/wchan", pid, d->d_name);
		first_line(in, sizeof(in), "/proc/%d/task/%s/syscall", pid, d->d_name);
		printf("        %d/%s %s: %s, %s\n", pid, d->d_name, name, where, in);
	}
	if (dir)
		closedir(dir);
}

/* Whatever it is that takes so long: who reads this wants to know */
static void *watch_notes(void *arg)
{
	uint64_t told = 0;
	struct dirent *d;
	char path[64];
	DIR *dir;

	(void)arg;
	for (;;) {
		sleep(5);
		if (told == noted_us || now_us() - noted_us < QUIET_US)
			continue;
		told = noted_us;
		printf("        %u: nothing new for %u s:\n", lane + 1, QUIET_US / 1000000);
		dir = opendir("/proc");
		while (dir && (d = readdir(dir))) {
			if (atoi(d->d_name))
				show_process(atoi(d->d_name));
		}
		if (dir)
			closedir(dir);
		snprintf(path, sizeof(path), "/tmp/standby-%u.err", last_gen);
		show_file(path);
		fflush(stdout);
	}
	return NULL;
}

void watch_over_notes(void)
{
	pthread_t thread;

	noted_us = now_us();
	if (pthread_create(&thread, NULL, watch_notes, NULL))
		fatal("pthread_create");
}

void fatal(const char *what)
{
	printf("failover: %s: %s\n", what, strerror(errno));
	exit(1);
}

uint64_t number(const char *line, const char *name)
{
	char key[64];
	const char *p;

	snprintf(key, sizeof(key), "\"%s\":", name);
	p = strstr(line, key);
	return p ? strtoull(p + strlen(key), NULL, 10) : 0;
}

unsigned int random_from(unsigned int from, unsigned int to)
{
	static uint64_t draws;

	return from + (mix(seed + ++draws * 0x9e3779b97f4a7c15ull) >> 20) % (to - from + 1);
}

void sleep_ms(unsigned int ms)
{
	usleep(ms * 1000);
}

pid_t start(char **argv, int out, const char *err)
{
	pid_t parent = getpid(), pid = fork();
	int fd;

	if (pid < 0)
		fatal("fork");
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(1);
	fd = open(err, O_WRONLY | O_CREAT | O_APPEND, 0644);
	dup2(out >= 0 ? out : fd, 1);
	dup2(fd, 2);
	execv(argv[0], argv);
	_exit(127);
}

void kill_now(pid_t *pid, bool child)
{
	if (*pid <= 0)
		return;
	kill(*pid, SIGKILL);
	if (child)
		waitpid(*pid, NULL, 0);
	*pid = 0;
}

void show_file(const char *path)
{
	char line[256];
	FILE *f = fopen(path, "r");
	int n = 0, skip;

	while (f && fgets(line, sizeof(line), f))
		n++;
	skip = n - 40;
	if (f)
		rewind(f);
	while (f && fgets(line, sizeof(line), f)) {
		if (skip-- <= 0)
			printf("        %s: %s", path, line);
	}
	if (f)
		fclose(f);
}

bool fail(const char *fmt, ...)
{
	char text[1024];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	note("FAILED: %s", text);
	return false;
}

unsigned int count_lines(const char *path, const char *what)
{
	char line[1024];
	unsigned int n = 0;
	FILE *f = fopen(path, "r");

	while (f && fgets(line, sizeof(line), f))
		n += !!strstr(line, what);
	if (f)
		fclose(f);
	return n;
}

bool fill_disk(const char *dir, bool full)
{
	static uint8_t block[65536];
	char path[128];
	size_t size;
	int fd;

	snprintf(path, sizeof(path), "%s/full", dir);
	if (!full)
		return !unlink(path);
	fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	if (fd < 0)
		return false;
	/* To the last page of it */
	for (size = sizeof(block); size >= PAGE; size /= 2) {
		while (write(fd, block, size) == (ssize_t)size)
			;
	}
	close(fd);
	return errno == ENOSPC;
}

bool mount_small(const char *dir, unsigned int mb)
{
	char options[64];

	snprintf(options, sizeof(options), "size=%uM,mode=0700", mb);
	if ((mkdir(dir, 0700) && errno != EEXIST) || mount("tmpfs", dir, "tmpfs", 0, options))
		return fail("cannot mount a tmpfs at %s: %s", dir, strerror(errno));
	return true;
}
