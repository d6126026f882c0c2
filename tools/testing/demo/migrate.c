// SPDX-License-Identifier: GPL-2.0-only
/*
 * Runs inside the rig: boots a guest in one QEMU, migrates it live to another,
 * asks it whether its memory is intact and goes on with the next way to track
 * dirty pages.  Ends with a table, and with a control: a page of the guest is
 * put back to what it was a while ago, which the guest has to notice.
 *
 * usage: migrate [--slow N] QEMU FIRMWARE-DIR KERNEL INITRD [MECHANISM]...
 *
 * On a kernel that takes N times as long, everything may take N times as long,
 * and the guest writes an Nth.
 *
 * Costs come from QEMU's own trace events, the same for all mechanisms.  Times
 * are wall-clock times of the machine that runs QEMU.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "driver.h"

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))

#define GUEST_MB	160
#define RAM_FILE	"/dev/shm/guest-ram"
#define DISK_FILE	"/dev/shm/guest-disk"
#define MIGRATION_SOCK	"/tmp/migration.sock"

/* Slow enough for a guest that writes 8 MB a second to need several passes */
#define MAX_BANDWIDTH		(20 << 20)	/* bytes in a second */
#define DOWNTIME_LIMIT		(60 * slow)	/* ms */

#define BOOT_TIMEOUT		(60 * slow)	/* seconds */
#define MIGRATION_TIMEOUT	(60 * slow)
#define ANSWER_TIMEOUT		(20 * slow)

#define GUEST_RATE		(1000 / slow)	/* pages in a second, each thread */

static int slow = 1;
static const char *qemu, *firmware, *kernel, *initrd;

static const struct mechanism {
	const char *name;
	const char *title;
	const char *accel;
} mechanisms[] = {
	{ "bitmap", "dirty bitmap", "kvm" },
	{ "ring", "dirty ring", "kvm,dirty-ring-size=4096" },
	{ "slot-ring", "dirty slot rings", "kvm,dirty-slot-ring-size=4096" },
	/* Nearly every page finds its ring full.  Only if asked for. */
	{ "tiny-slot-ring", "slot rings of 1", "kvm,dirty-slot-ring-size=1" },
};

#define NR_DEFAULT	3

#define NR_MECHANISMS	ARRAY_SIZE(mechanisms)

/* A QEMU that we started */
struct vm {
	const char *role;
	pid_t pid;
	int qmp, ctl;
	char trace[64];
	char qmp_buf[65536], ctl_buf[1024];
};

struct result {
	bool done, verified;
	uint64_t pages, ram_pages;	/* sent, and of the guest's RAM */
	uint64_t syncs, sync_us, sync_max_us, sync_median_us;
	uint64_t others, other_us;	/* clear ioctls, reaps between syncs */
	uint64_t reaps, harvests, harvested, harvest_runs, harvest_ns;
	uint64_t downtime_ms, total_ms;
	char why[256];
} results[NR_MECHANISMS];

static double now(void)
{
	return now_us() / 1e6;
}

static double started;

static void note(const char *fmt, ...)
{
	va_list ap;

	printf("[%5.1f] ", now() - started);
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf("\n");
	fflush(stdout);
}

static void fatal(const char *fmt, ...)
{
	va_list ap;

	printf("migrate: ");
	va_start(ap, fmt);
	vprintf(fmt, ap);
	va_end(ap);
	printf(": %s\n", strerror(errno));
	exit(1);
}

/*
 * Sends a QMP command with arguments, returns the line with its answer or NULL.
 * QEMU takes single quotes for double ones.
 */
static char *qmp(struct vm *vm, const char *name, const char *fmt, ...)
{
	char *answer, args[256], cmd[512];
	va_list ap;
	int len;

	va_start(ap, fmt);
	vsnprintf(args, sizeof(args), fmt, ap);
	va_end(ap);
	len = snprintf(cmd, sizeof(cmd), "{'execute': '%s', 'arguments': {%s}}\n", name, args);
	if (write(vm->qmp, cmd, len) != len) {
		note("%s: QMP %s -> QEMU is gone", vm->role, name);
		return NULL;
	}
	answer = read_line(vm->qmp, vm->qmp_buf, sizeof(vm->qmp_buf),
			   "{\"return\"", "{\"error\"", ANSWER_TIMEOUT);
	if (!answer || strstr(answer, "{\"error\"")) {
		note("%s: QMP %s -> %s", vm->role, cmd, answer ? answer : "no answer");
		return NULL;
	}
	return answer;
}

/* A number out of a QMP answer; "after" narrows it to a member of an object */
static uint64_t number(const char *answer, const char *after, const char *name)
{
	const char *p = answer;
	char key[64];

	if (after)
		p = strstr(p, after);
	snprintf(key, sizeof(key), "\"%s\": ", name);
	if (p)
		p = strstr(p, key);
	return p ? strtoull(p + strlen(key), NULL, 10) : 0;
}

/* Asks the guest, returns its answer or NULL */
static char *ask(struct vm *vm, const char *what)
{
	char cmd[32];
	int len = snprintf(cmd, sizeof(cmd), "%s\n", what);

	if (write(vm->ctl, cmd, len) != len)
		return NULL;
	return read_line(vm->ctl, vm->ctl_buf, sizeof(vm->ctl_buf), what, "error ",
			 ANSWER_TIMEOUT);
}

static bool get_steps(struct vm *vm, uint64_t steps[3])
{
	char *answer = ask(vm, "status");

	return answer && sscanf(answer, "status %lu %lu %lu", &steps[0], &steps[1],
				&steps[2]) == 3;
}

static void stop_vm(struct vm *vm)
{
	if (vm->pid <= 0)
		return;
	kill(vm->pid, SIGKILL);
	waitpid(vm->pid, NULL, 0);
	close(vm->qmp);
	close(vm->ctl);
	vm->pid = 0;
}

static bool start_vm(struct vm *vm, const struct mechanism *m, const char *role)
{
	bool incoming = !strcmp(role, "destination");
	char qmp_arg[64], ctl_arg[64], console[96], ram[128], err[96], append[192];
	int qmp_fd[2], ctl_fd[2];
	pid_t parent = getpid();

	memset(vm, 0, sizeof(*vm));
	vm->role = role;
	snprintf(vm->trace, sizeof(vm->trace), "/tmp/%s.%s.trace", m->name, role);
	snprintf(console, sizeof(console), "file:/tmp/%s.%s.console", m->name, role);
	snprintf(err, sizeof(err), "/tmp/%s.%s.err", m->name, role);
	if (incoming)	/* where the control reaches it */
		snprintf(ram, sizeof(ram),
			 "memory-backend-file,id=pc.ram,size=%dM,mem-path=%s,share=on",
			 GUEST_MB, RAM_FILE);
	else
		snprintf(ram, sizeof(ram), "memory-backend-ram,id=pc.ram,size=%dM", GUEST_MB);
	snprintf(append, sizeof(append),
		 "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check rcupdate.rcu_expedited=1 demo.work=24 demo.still=32 demo.rate=%d",
		 GUEST_RATE);

	if (socketpair(AF_UNIX, SOCK_STREAM, 0, qmp_fd) ||
	    socketpair(AF_UNIX, SOCK_STREAM, 0, ctl_fd))
		fatal("socketpair");
	snprintf(qmp_arg, sizeof(qmp_arg), "socket,id=qmp,fd=%d", qmp_fd[1]);
	snprintf(ctl_arg, sizeof(ctl_arg), "socket,id=ctl,fd=%d", ctl_fd[1]);

	vm->pid = fork();
	if (vm->pid < 0)
		fatal("fork");
	if (!vm->pid) {
		int fd = open(err, O_WRONLY | O_CREAT | O_TRUNC, 0644);

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(1);
		dup2(fd, 1);
		dup2(fd, 2);
		close(qmp_fd[0]);
		close(ctl_fd[0]);
		execl(qemu, qemu, "-nodefaults", "-no-user-config", "-display", "none",
		      "-L", firmware, "-accel", m->accel, "-cpu", "host",
		      "-machine", "q35,memory-backend=pc.ram", "-object", ram,
		      "-smp", "2", "-no-reboot",
		      "-kernel", kernel, "-initrd", initrd, "-append", append,
		      "-drive", "if=virtio,format=raw,readonly=on,file=" DISK_FILE,
		      "-chardev", qmp_arg, "-mon", "chardev=qmp,mode=control",
		      "-serial", console, "-chardev", ctl_arg, "-serial", "chardev:ctl",
		      "-D", vm->trace, "-msg", "timestamp=on",
		      incoming ? "-incoming" : NULL, "unix:" MIGRATION_SOCK, NULL);
		_exit(127);
	}
	close(qmp_fd[1]);
	close(ctl_fd[1]);
	vm->qmp = qmp_fd[0];
	vm->ctl = ctl_fd[0];
	fcntl(vm->qmp, F_SETFD, FD_CLOEXEC);
	fcntl(vm->ctl, F_SETFD, FD_CLOEXEC);

	if (!read_line(vm->qmp, vm->qmp_buf, sizeof(vm->qmp_buf), "{\"QMP\"", NULL,
		       ANSWER_TIMEOUT) ||
	    !qmp(vm, "qmp_capabilities", ""))
		return false;
	return true;
}

static int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/*
 * The trace: "PID@SECONDS.MICROS:EVENT ARGS".  The cost of a sync is from its
 * start until the last memory listener has handed over its dirty pages (what
 * follows, moving bits between QEMU's own bitmaps, is the same for all).  What
 * a mechanism does apart from that is counted too: KVM_CLEAR_DIRTY_LOG, which
 * the bitmap needs to protect pages again, and harvests of the dirty ring
 * between syncs.
 */
static void read_trace(const char *path, struct result *r)
{
	static uint64_t took[1000];
	char line[512], event[64], clear[32];
	uint64_t start = 0, last = 0, ioctl_at = 0, t;
	bool in_sync = false, in_clear = false;
	FILE *f = fopen(path, "r");

	if (!f)
		return;
	/* KVM_CLEAR_DIRTY_LOG as QEMU prints it, a signed number */
	snprintf(clear, sizeof(clear), "type 0x%x,", 0xc018aec0);
	while (fgets(line, sizeof(line), f)) {
		uint64_t sec, us, a, b, c;
		unsigned int slot;
		char *args;

		if (sscanf(line, "%*u@%lu.%lu:%63s", &sec, &us, event) != 3)
			continue;
		t = sec * 1000000 + us;
		args = strstr(line, event) + strlen(event);

		if (!strcmp(event, "migration_bitmap_sync_start")) {
			start = t;
			last = t;
			in_sync = true;
		} else if (!strcmp(event, "memory_region_sync_dirty")) {
			last = t;
		} else if (!strcmp(event, "migration_bitmap_sync_end") && in_sync) {
			if (r->syncs < ARRAY_SIZE(took))
				took[r->syncs++] = last - start;
			r->sync_us += last - start;
			in_sync = false;
		} else if (!strcmp(event, "kvm_vm_ioctl")) {
			in_clear = strstr(args, clear);
			ioctl_at = t;
		} else if (!strcmp(event, "kvm_clear_dirty_log") && in_clear) {
			r->others++;
			r->other_us += t - ioctl_at;
			in_clear = false;
		} else if (!strcmp(event, "kvm_dirty_ring_reap") &&
			   sscanf(args, " reaped %lu pages (took %lu us)", &a, &b) == 2) {
			r->reaps++;
			if (in_sync)
				continue;
			r->others++;
			r->other_us += b;
		} else if (!strcmp(event, "kvm_dirty_slot_log_harvest") &&
			   sscanf(args, " slot 0x%x: %lu pages in %lu runs (took %lu ns)",
				  &slot, &a, &b, &c) == 4) {
			r->harvests++;
			r->harvested += a;
			r->harvest_runs += b;
			r->harvest_ns += c;
		}
	}
	fclose(f);

	if (r->syncs) {
		qsort(took, r->syncs, sizeof(took[0]), compare);
		r->sync_median_us = took[r->syncs / 2];
		r->sync_max_us = took[r->syncs - 1];
	}
}

static void show_file(const char *fmt, ...)
{
	char path[128], line[256];
	va_list ap;
	FILE *f;
	int n = 0;

	va_start(ap, fmt);
	vsnprintf(path, sizeof(path), fmt, ap);
	va_end(ap);
	f = fopen(path, "r");
	if (!f)
		return;
	while (fgets(line, sizeof(line), f) && n++ < 20)
		printf("        %s: %s", path, line);
	fclose(f);
}

static bool fail(struct result *r, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(r->why, sizeof(r->why), fmt, ap);
	va_end(ap);
	note("FAILED: %s", r->why);
	return false;
}

/* Boots, migrates and checks.  The destination is left running. */
static bool run_mechanism(const struct mechanism *m, struct result *r,
			  struct vm *src, struct vm *dst)
{
	static const char * const events[] = {
		"migration_bitmap_sync_start", "migration_bitmap_sync_end",
		"memory_region_sync_dirty", "kvm_vm_ioctl", "kvm_clear_dirty_log",
		"kvm_dirty_ring_reap", "kvm_dirty_slot_log_harvest",
	};
	uint64_t before[3], after[3], later[3];
	char *answer;
	bool patient = true;
	double end;
	size_t i;

	if (!start_vm(src, m, "source"))
		return fail(r, "the source QEMU did not start");
	answer = read_line(src->ctl, src->ctl_buf, sizeof(src->ctl_buf), "ready", "error ",
			   BOOT_TIMEOUT);
	if (!answer || !strstr(answer, "ready"))
		return fail(r, "the guest did not boot: %s", answer ? answer : "no word from it");
	note("%s: the guest is up", m->title);

	unlink(MIGRATION_SOCK);
	if (!start_vm(dst, m, "destination"))
		return fail(r, "the destination QEMU did not start");
	for (i = 0; i < ARRAY_SIZE(events); i++) {
		if (!qmp(src, "trace-event-set-state", "'name': '%s', 'enable': true", events[i]))
			return fail(r, "no trace event %s", events[i]);
	}
	if (!qmp(src, "migrate-set-parameters", "'max-bandwidth': %d, 'downtime-limit': %d",
		 MAX_BANDWIDTH, DOWNTIME_LIMIT) ||
	    !get_steps(src, before) ||
	    !qmp(src, "migrate", "'uri': 'unix:%s'", MIGRATION_SOCK))
		return fail(r, "the migration did not start");

	end = now() + MIGRATION_TIMEOUT;
	for (;;) {
		usleep(100000);
		answer = qmp(src, "query-migrate", "");
		if (!answer)
			return fail(r, "the source QEMU is gone");
		if (strstr(answer, "\"status\": \"completed\""))
			break;
		if (strstr(answer, "\"status\": \"failed\""))
			return fail(r, "the migration failed: %s", answer);
		if (now() > end)
			return fail(r, "the migration takes too long: %s", answer);
		if (patient && now() > end - MIGRATION_TIMEOUT / 2) {
			patient = false;
			note("%s: this machine is slow, a longer downtime has to do", m->title);
			if (!qmp(src, "migrate-set-parameters", "'downtime-limit': %d",
				 DOWNTIME_LIMIT * 10))
				return fail(r, "no longer downtime");
		}
	}
	r->pages = number(answer, "\"ram\"", "normal") + number(answer, "\"ram\"", "duplicate");
	r->ram_pages = number(answer, "\"ram\"", "total") / PAGE;
	r->downtime_ms = number(answer, NULL, "downtime");
	r->total_ms = number(answer, NULL, "total-time");
	r->done = true;
	read_trace(src->trace, r);
	if (!r->syncs || (strstr(m->accel, "dirty-ring") && !r->reaps) ||
	    (strstr(m->accel, "dirty-slot-ring") && !r->harvested))
		return fail(r, "QEMU's trace shows no such syncs: did it use the bitmap?");
	note("%s: migrated in %lu ms, %lu syncs", m->title, r->total_ms, r->syncs);
	stop_vm(src);

	if (!get_steps(dst, after))
		return fail(r, "no word from the guest after the migration");
	answer = ask(dst, "verify");
	if (!answer || strncmp(answer, "verify ok", 9))
		return fail(r, "the guest says: %s", answer ? answer : "nothing");
	note("%s: %s", m->title, answer);
	sleep(1);
	if (!get_steps(dst, later))
		return fail(r, "no word from the guest after it checked its memory");
	for (i = 0; i < 3; i++) {
		if (after[i] < before[i])
			return fail(r, "writer %zu went back from step %lu to %lu", i,
				    before[i], after[i]);
		if (later[i] <= after[i])
			return fail(r, "writer %zu stands still at step %lu", i, later[i]);
	}
	note("%s: the guest goes on: steps %lu %lu %lu before, %lu %lu %lu now", m->title,
	     before[0], before[1], before[2], later[0], later[1], later[2]);
	r->verified = true;
	return true;
}

/*
 * What a lost dirty page would look like: one page, consistent in itself, of a
 * time before the last write to it.  The guest must notice.
 */
static bool put_back_page(struct vm *vm)
{
	uint64_t old[PAGE_WORDS], *ram, *page = NULL, n;
	char *answer;
	int fd, i;

	fd = open(RAM_FILE, O_RDWR);
	ram = mmap(NULL, (size_t)GUEST_MB << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (fd < 0 || ram == MAP_FAILED)
		fatal(RAM_FILE);
	close(fd);

	/* While it stands still: a page of writer 0 */
	if (!qmp(vm, "stop", ""))
		return false;
	for (n = 0; n < ((uint64_t)GUEST_MB << 20) / PAGE; n++) {
		page = ram + n * PAGE_WORDS;
		if (page[0] == page_tag(0, 7) && page_is(page, 0, 7, page_step(page)))
			break;
	}
	if (n == ((uint64_t)GUEST_MB << 20) / PAGE) {
		note("control: page 7 of writer 0 is not in the guest's memory");
		return false;
	}
	memcpy(old, page, PAGE);
	if (!qmp(vm, "cont", ""))
		return false;

	/* ... is put back after it was written again */
	for (i = 0; i < 300 * slow; i++) {
		usleep(100000);
		if (page_step(page) != old[1])
			break;
	}
	if (!qmp(vm, "stop", ""))
		return false;
	note("control: page 7 of writer 0 goes back from step %lu to %lu", page_step(page), old[1]);
	if (page_step(page) == old[1])
		return false;
	memcpy(page, old, PAGE);
	if (!qmp(vm, "cont", ""))
		return false;
	answer = ask(vm, "verify");
	note("control: the guest says: %s", answer ? answer : "nothing");
	return answer && !strncmp(answer, "verify bad 1 of", 15);
}

static void table(void)
{
	size_t i;

	printf("\nTABLE\n");
	printf("%-17s %7s %7s %6s %8s %8s %6s %8s %8s %9s %9s\n", "mechanism", "pages",
	       "sent", "syncs", "median", "longest", "other", "took", "in all", "downtime",
	       "memory");
	printf("%-17s %7s %7s %6s %8s %8s %6s %8s %8s %9s %9s\n", "", "sent", "again", "",
	       "us", "us", "calls", "us", "us", "ms", "verified");
	for (i = 0; i < NR_MECHANISMS; i++) {
		struct result *r = &results[i];
		uint64_t again = r->pages > r->ram_pages ? r->pages - r->ram_pages : 0;

		if (!r->done) {
			if (r->why[0])
				printf("%-17s %s\n", mechanisms[i].title, r->why);
			continue;
		}
		printf("%-17s %7lu %7lu %6lu %8lu %8lu %6lu %8lu %8lu %9lu %9s\n",
		       mechanisms[i].title, r->pages, again, r->syncs, r->sync_median_us,
		       r->sync_max_us, r->others, r->other_us, r->sync_us + r->other_us,
		       r->downtime_ms, r->verified ? "yes" : "NO");
	}
	for (i = 0; i < NR_MECHANISMS; i++) {
		struct result *r = &results[i];

		if (r->harvests)
			printf("%s: %lu harvests, %lu pages in %lu runs, %lu us in all\n",
			       mechanisms[i].title, r->harvests, r->harvested,
			       r->harvest_runs, r->harvest_ns / 1000);
	}
	printf("END\n");
}

int main(int argc, char **argv)
{
	static struct vm src, dst;
	bool ok = true, ran = false, noticed = false;
	const char *last = NULL;
	size_t i;
	int j;

	if (argc > 2 && !strcmp(argv[1], "--slow")) {
		slow = atoi(argv[2]);
		argc -= 2;
		argv += 2;
	}
	if (argc < 5 || slow < 1 || slow > 100) {
		fprintf(stderr,
			"usage: migrate [--slow N] QEMU FIRMWARE-DIR KERNEL INITRD [MECHANISM]...\n");
		return 2;
	}
	qemu = argv[1];
	firmware = argv[2];
	kernel = argv[3];
	initrd = argv[4];
	started = now();
	signal(SIGPIPE, SIG_IGN);
	if (!make_disk(DISK_FILE))
		fatal(DISK_FILE);

	for (i = 0; i < NR_MECHANISMS; i++) {
		const struct mechanism *m = &mechanisms[i];
		bool good, wanted = argc == 5 && i < NR_DEFAULT;

		for (j = 5; j < argc; j++)
			wanted |= !strcmp(argv[j], m->name);
		if (!wanted)
			continue;

		stop_vm(&dst);
		last = m->name;
		good = run_mechanism(m, &results[i], &src, &dst);
		stop_vm(&src);
		show_file("/tmp/%s.source.err", m->name);
		show_file("/tmp/%s.destination.err", m->name);
		if (!good) {
			show_file("/tmp/%s.source.console", m->name);
			show_file("/tmp/%s.destination.console", m->name);
		}
		ok &= good;
		ran = true;
	}
	if (dst.pid > 0 && ok)
		noticed = put_back_page(&dst);
	stop_vm(&dst);
	if (ok && !noticed) {
		show_file("/tmp/%s.destination.err", last);
		show_file("/tmp/%s.destination.console", last);
	}

	table();
	printf("the guest's check notices a page of the past: %s\n", noticed ? "yes" : "NO");
	return ok && ran && noticed ? 0 : 1;
}
