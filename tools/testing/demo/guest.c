// SPDX-License-Identifier: GPL-2.0-only
/*
 * Process 1 of the guest that the demo migrates: it keeps writing memory and
 * can tell whether all of it is what it should be.
 *
 * Every page of its memory says which page it is and in which step of which
 * writer it was written last, and the rest of the page follows from these two.
 * Which page a step writes follows from the step's number alone.  A check thus
 * needs nothing but how many steps were made: it plays them through again and
 * knows what has to be in every page.  A page that a migration left at an older
 * version is consistent in itself, but it is found, and that is the mistake a
 * dirty log that loses pages would make.
 *
 * Three kinds of memory: pages that vCPUs write (two threads), pages that a
 * device writes (reads from a disk; KVM does not see these), and pages that
 * nobody writes any more.
 *
 * It is talked to over ttyS1, in lines:
 *	status	-> "status STEPS STEPS STEPS", steps of each writer so far
 *	verify	-> "verify ok PAGES" or "verify bad COUNT of PAGES, first: ..."
 *	holder	-> "holder TIMES WRITES", how often somebody else had written to the second disk, if
 *		   there is one, where this guest alone may write, and how often it did itself
 *	time	-> "time REALTIME MONOTONIC CLOCKSOURCE", in microseconds
 *	slots	-> "slots TIMES", after the host bridge was told as often to show the firmware's
 *		   shadow as RAM or as ROM, so that the VMM has to lay out all memory anew
 *	start N US	-> "start N US ok": churn_start(), see churn.h
 *	churn	-> "churn ROUNDS BAD"
 *	lie WHAT	-> "lie WHAT: ok", "lie WHAT: refused": lies_tell(), see lies.h
 *	table	-> "table ADDRESS", in hex, of what it tells of its pages; 0: nothing
 *	kexec	-> "kexec begun": the kernel in /other takes over; "kexec crash": in a panic
 *	hibernate	-> "hibernate ok", after it was hibernated to a third disk and is back
 *	mem	-> "mem TOTAL FREE", in MiB
 *	once N	-> "once N ok", after N MiB were written and given back; "once N file": of files
 *	cost	-> "cost PAGES FAULTS FORK", see cost.h; the writers wait
 *	broken	-> "broken begun" and, when told again, whether block 256 of a second disk, which has
 *		   what the first one has, is read by now: "broken begun", "broken ok", "broken bad"
 *
 * usage: kernel parameters demo.work= and demo.still= (MiB), demo.rate= (pages
 * written in a second by each thread), demo.ledger=1 (a database on a third disk, see ledger.h),
 * demo.beats= (microseconds from one datagram to the next, see beats.h),
 * demo.churn= and demo.churn_us= (see churn.h: pages of a round, and the pause after it), demo.lies=1
 * (it can be told to lie)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/sysinfo.h>
#include <sys/stat.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "beats.h"
#include "churn.h"
#include "cost.h"
#include "kernels.h"
#include "ledger.h"
#include "lies.h"
#include "pattern.h"

#define WRITERS		3
#define DISK_WRITER	2	/* its "steps" are reads from the disk */
#define BROKEN_BLOCK	256	/* of the second disk */

struct writer {
	uint64_t *pages;
	uint64_t id;
	uint64_t npages;
	uint64_t rate;			/* steps in a second */
	atomic_ulong steps;
	atomic_bool idle;
};

static struct writer writers[WRITERS];

static uint64_t *still;
static uint64_t still_pages;
static atomic_bool hold;
static int disk = -1;
static FILE *ctl;

static void die(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	fprintf(stderr, "demo guest: ");
	vfprintf(stderr, fmt, ap);
	fprintf(stderr, ": %s\n", strerror(errno));
	if (ctl) {
		fprintf(ctl, "error ");
		va_start(ap, fmt);
		vfprintf(ctl, fmt, ap);
		fprintf(ctl, "\n");
	}
	va_end(ap);
	sleep(1);
	reboot(RB_POWER_OFF);
	exit(1);
}

static uint64_t param(const char *name, uint64_t def)
{
	char line[2048] = "", *p;
	FILE *f = fopen("/proc/cmdline", "r");

	if (!f || !fgets(line, sizeof(line), f))
		die("/proc/cmdline");
	fclose(f);
	p = strstr(line, name);
	return p ? strtoull(p + strlen(name), NULL, 10) : def;
}

static uint64_t *alloc_pages(uint64_t n)
{
	void *p = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		die("%lu pages", n);
	return p;
}

static uint64_t *page_of(uint64_t *pages, uint64_t n)
{
	return pages + n * PAGE_WORDS;
}

/* One step: write the page that this step writes */
static void make_step(struct writer *w, uint64_t step)
{
	uint64_t n = step_page(w->id, step, w->npages);
	uint64_t *page = page_of(w->pages, n);

	if (w->id != DISK_WRITER) {
		fill_page(page, w->id, n, step);
		return;
	}

	/* The disk's blocks are filled by the driver, as if page 0 of it */
	n = step_block(step);
	if (pread(disk, page, PAGE, n * PAGE) != PAGE)
		die("read of disk block %lu", n);
}

static bool check_page(struct writer *w, uint64_t n, uint64_t step)
{
	uint64_t *page = page_of(w->pages, n);

	if (w->id == DISK_WRITER && step)
		return page_is(page, DISK_ID, step_block(step), 0);
	return page_is(page, w->id, n, step);
}

static void *writer_thread(void *arg)
{
	struct writer *w = arg;
	struct timespec now, next;
	uint64_t batch = w->rate / 100 ? : 1, i;
	uint64_t pause = 1000000000ull * batch / w->rate;

	clock_gettime(CLOCK_MONOTONIC, &next);
	for (;;) {
		for (i = 0; i < batch && !atomic_load(&hold); i++) {
			uint64_t step = atomic_load(&w->steps) + 1;

			make_step(w, step);
			atomic_store(&w->steps, step);
		}
		while (atomic_load(&hold)) {
			atomic_store(&w->idle, true);
			usleep(1000);
		}
		atomic_store(&w->idle, false);

		/* Late, be it by a slow machine or a migration: don't catch up */
		next.tv_nsec += pause;
		next.tv_sec += next.tv_nsec / 1000000000;
		next.tv_nsec %= 1000000000;
		clock_gettime(CLOCK_MONOTONIC, &now);
		if (now.tv_sec > next.tv_sec ||
		    (now.tv_sec == next.tv_sec && now.tv_nsec > next.tv_nsec))
			next = now;
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
	}
	return NULL;
}

/* Plays all steps again; the writers are held */
static void check_memory(void)
{
	uint64_t bad = 0, total = still_pages, n, s, steps, *last;
	char first[160] = "";
	int i;

	for (n = 0; n < still_pages; n++) {
		if (!page_is(page_of(still, n), STILL_ID, n, 0) && !bad++)
			snprintf(first, sizeof(first), "page %lu that nobody writes",
				 n);
	}

	for (i = 0; i < WRITERS; i++) {
		struct writer *w = &writers[i];

		steps = atomic_load(&w->steps);
		last = calloc(w->npages, sizeof(*last));
		if (!last)
			die("no memory");
		for (s = 1; s <= steps; s++)
			last[step_page(w->id, s, w->npages)] = s;
		for (n = 0; n < w->npages; n++) {
			uint64_t *page = page_of(w->pages, n);

			if (check_page(w, n, last[n]) || bad++)
				continue;
			snprintf(first, sizeof(first),
				 "page %lu of writer %d should be of step %lu of %lu, says it is page %lu of step %lu",
				 n, i, last[n],
				 steps,
				 page_number(page),
				 page_step(page));
		}
		total += w->npages;
		free(last);
	}

	if (bad)
		fprintf(ctl, "verify bad %lu of %lu, first: %s\n",
			bad, total, first);
	else if (churn_bad())
		fprintf(ctl, "verify bad %lu of those that were written again and again, first: %s\n",
			churn_bad(), churn_first_bad());
	else
		fprintf(ctl, "verify ok %lu\n", total);
}

/*
 * What only one may hold: the first block of a disk.  Each copy of this guest has all that is in its
 * memory in common with the others, so they all take themselves for the one, but a copy that runs
 * finds what another one wrote there.  Then it takes a new name, which another copy cannot have had
 * the same idea of: it would have to do so at the same tick of the TSC.  Who goes on from an
 * epoch finds the last write of who was there before, once.
 */
static struct {
	int disk;
	atomic_ulong foreign, writes;
} holder = { .disk = -1 };

static void *holder_thread(void *arg)
{
	static uint64_t mine[PAGE_WORDS] __attribute__((aligned(PAGE)));
	static uint64_t there[PAGE_WORDS] __attribute__((aligned(PAGE)));

	(void)arg;
	for (;; usleep(40000)) {
		if (mine[1]) {
			if (pread(holder.disk, there, PAGE, 0) != PAGE)
				die("read of the second disk");
			if (memcmp(mine, there, PAGE)) {
				holder.foreign++;
				mine[0] = mix(mine[0] + __builtin_ia32_rdtsc());
			}
		}
		mine[1]++;
		if (pwrite(holder.disk, mine, PAGE, 0) != PAGE)
			die("write to the second disk");
		holder.writes++;
	}
	return NULL;
}

static uint64_t clock_us(clockid_t id)
{
	struct timespec ts;

	clock_gettime(id, &ts);
	return ts.tv_sec * 1000000ull + ts.tv_nsec / 1000;
}

static void tell_time(void)
{
	char source[64] = "?";
	FILE *f = fopen("/sys/devices/system/clocksource/clocksource0/current_clocksource", "r");

	if (f && fgets(source, sizeof(source), f))
		source[strcspn(source, "\n")] = '\0';
	if (f)
		fclose(f);
	fprintf(ctl, "time %lu %lu %s\n", clock_us(CLOCK_REALTIME), clock_us(CLOCK_MONOTONIC),
		source);
}

static void tell_memory(void)
{
	struct sysinfo info;

	sysinfo(&info);
	fprintf(ctl, "mem %lu %lu\n", info.totalram * info.mem_unit >> 20,
		info.freeram * info.mem_unit >> 20);
}

static void tell_cost(void)
{
	struct cost cost;
	const char *failed = cost_of_memory(&cost);

	if (failed)
		fprintf(ctl, "cost: %s failed\n", failed);
	else
		fprintf(ctl, "cost %lu %lu %lu\n", cost.pages, cost.faults, cost.fork);
}

/* PAM0 of Q35 and i440FX: of 0xf0000 to 0xfffff, whether reads and writes go to RAM */
#define PAM0		0x90
#define PAM_RAM		0x30
#define PAM_ROM		0x10

static void change_slots(void)
{
	int fd = open("/sys/bus/pci/devices/0000:00:00.0/config", O_RDWR), times;
	unsigned char old, now;

	if (fd < 0 || pread(fd, &old, 1, PAM0) != 1)
		die("the host bridge");
	for (times = 0; times < 60; times++) {
		now = times % 2 ? PAM_ROM : PAM_RAM;
		if (pwrite(fd, &now, 1, PAM0) != 1)
			die("the host bridge");
		usleep(20000);
	}
	if (pwrite(fd, &old, 1, PAM0) != 1)
		die("the host bridge");
	close(fd);
	fprintf(ctl, "slots %d\n", times);
}

static _Atomic(const char *) broken;

static void *read_block(void *arg)
{
	uint64_t *page = arg;
	int fd = open("/dev/vdb", O_RDONLY | O_DIRECT);

	broken = fd >= 0 && pread(fd, page, PAGE, BROKEN_BLOCK * PAGE) == PAGE &&
		 page_is(page, DISK_ID, BROKEN_BLOCK, 0) ? "ok" : "bad";
	return NULL;
}

static void read_broken(void)
{
	pthread_t thread;

	if (!broken) {
		broken = "begun";
		if (pthread_create(&thread, NULL, read_block, alloc_pages(1)))
			die("pthread_create");
	}
	fprintf(ctl, "broken %s\n", broken);
}

static void hold_writers(void)
{
	int i;

	/* A stale "idle" of the last time must not count */
	for (i = 0; i < WRITERS; i++)
		atomic_store(&writers[i].idle, false);
	atomic_store(&hold, true);
	for (i = 0; i < WRITERS; i++) {
		while (!atomic_load(&writers[i].idle))
			usleep(1000);
	}
}

int main(void)
{
	uint64_t rate, work, n;
	struct termios tio;
	int read_only = 0;
	pthread_t thread;
	char line[64];
	int fd, i;
	FILE *in;

	mkdir("/proc", 0755);
	mkdir("/dev", 0755);
	mkdir("/sys", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("dev", "/dev", "devtmpfs", 0, NULL);

	fd = open("/dev/ttyS1", O_RDWR | O_NOCTTY);
	if (fd < 0 || tcgetattr(fd, &tio))
		die("/dev/ttyS1");
	cfmakeraw(&tio);
	cfsetspeed(&tio, B115200);
	tcsetattr(fd, TCSANOW, &tio);
	in = fdopen(fd, "r");
	ctl = fdopen(dup(fd), "w");
	setvbuf(ctl, NULL, _IOLBF, 0);

	if (param("demo.lies=", 0) && !lies_init())
		die("no huge page");

	work = param("demo.work=", 24) * 256;
	still_pages = param("demo.still=", 48) * 256;
	rate = param("demo.rate=", 500);

	disk = open("/dev/vda", O_RDONLY | O_DIRECT);
	if (disk < 0)
		die("/dev/vda");

	still = alloc_pages(still_pages);
	for (n = 0; n < still_pages; n++)
		fill_page(page_of(still, n), STILL_ID, n, 0);

	for (i = 0; i < WRITERS; i++) {
		struct writer *w = &writers[i];

		w->id = i;
		w->npages = i == DISK_WRITER ? 512 : work / 2;
		w->rate = i == DISK_WRITER ? 50 : rate;
		w->pages = alloc_pages(w->npages);
		for (n = 0; n < w->npages; n++)
			fill_page(page_of(w->pages, n), w->id, n, 0);
	}
	for (i = 0; i < WRITERS; i++) {
		if (pthread_create(&thread, NULL, writer_thread, &writers[i]))
			die("pthread_create");
	}

	holder.disk = open("/dev/vdb", O_RDWR | O_DIRECT);
	/* Linux opens it also if nobody may write to it */
	if (holder.disk >= 0 && (ioctl(holder.disk, BLKROGET, &read_only) || read_only)) {
		close(holder.disk);
		holder.disk = -1;
	}
	if (holder.disk >= 0 && pthread_create(&thread, NULL, holder_thread, NULL))
		die("pthread_create");

	if (param("demo.ledger=", 0)) {
		const char *failed = ledger_start();

		if (failed)
			die("%s", failed);
	}

	if (param("demo.beats=", 0)) {
		const char *failed = beats_start(param("demo.beats=", 0));

		if (failed)
			die("%s", failed);
	}

	if (param("demo.churn=", 0)) {
		const char *failed = churn_start(param("demo.churn=", 0),
						 param("demo.churn_us=", 1000));

		if (failed)
			die("%s", failed);
	}

	fprintf(ctl, "ready\n");
	while (fgets(line, sizeof(line), in)) {
		if (!strncmp(line, "status", 6)) {
			fprintf(ctl, "status %lu %lu %lu\n",
				atomic_load(&writers[0].steps),
				atomic_load(&writers[1].steps),
				atomic_load(&writers[2].steps));
		} else if (!strncmp(line, "verify", 6)) {
			hold_writers();
			check_memory();
			atomic_store(&hold, false);
		} else if (!strncmp(line, "holder", 6)) {
			fprintf(ctl, "holder %lu %lu\n", atomic_load(&holder.foreign),
				atomic_load(&holder.writes));
		} else if (!strncmp(line, "time", 4)) {
			tell_time();
		} else if (!strncmp(line, "slots", 5)) {
			change_slots();
		} else if (sscanf(line, "start %lu %lu", &n, &rate) == 2) {
			fprintf(ctl, "start %lu %lu %s\n", n, rate, churn_start(n, rate) ?: "ok");
		} else if (!strncmp(line, "churn", 5)) {
			fprintf(ctl, "churn %lu %lu\n", churn_rounds(), churn_bad());
		} else if (!strncmp(line, "lie ", 4)) {
			line[strcspn(line, "\n")] = '\0';
			fprintf(ctl, "%s: %s\n", line, lies_tell(line + 4));
		} else if (!strncmp(line, "table", 5)) {
			fprintf(ctl, "table %lx\n", (unsigned long)(lies_truth() & ~(PAGE - 1ull)));
		} else if (!strncmp(line, "kexec", 5)) {
			const char *failed = kernels_load(strstr(line, "crash"));

			line[strcspn(line, "\n")] = '\0';
			fprintf(ctl, "%s %s\n", line, failed ?: "begun");
			/* It is to be read before */
			sleep(2);
			if (!failed)
				kernels_go(strstr(line, "crash"));
		} else if (!strncmp(line, "hibernate", 9)) {
			fprintf(ctl, "hibernate %s\n", kernels_hibernate());
		} else if (!strncmp(line, "mem", 3)) {
			tell_memory();
		} else if (!strncmp(line, "once ", 5)) {
			line[strcspn(line, "\n")] = '\0';
			fprintf(ctl, "%s %s\n", line,
				churn_once(strtoul(line + 5, NULL, 10) * 256, strstr(line, "file")) ?
				"ok" : "bad");
		} else if (!strncmp(line, "cost", 4)) {
			hold_writers();
			tell_cost();
			atomic_store(&hold, false);
		} else if (!strncmp(line, "broken", 6)) {
			read_broken();
		} else {
			fprintf(ctl, "error what? %s", line);
		}
	}
	die("ttyS1 was closed");
}
