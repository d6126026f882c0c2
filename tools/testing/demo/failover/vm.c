// SPDX-License-Identifier: GPL-2.0-only
/*
 * Guests and their QEMUs.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "failover.h"

static int connect_unix(const char *path)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(sun.sun_path, sizeof(sun.sun_path), "%s", path);
	if (connect(fd, (struct sockaddr *)&sun, sizeof(sun))) {
		close(fd);
		return -1;
	}
	return fd;
}

char *ask(struct vm *vm, const char *what, unsigned int seconds)
{
	char *answer;
	char cmd[32];
	int len = snprintf(cmd, sizeof(cmd), "%s\n", what);

	if (send(vm->ctl, cmd, len, MSG_NOSIGNAL) != len)
		return NULL;
	answer = read_line(vm->ctl, vm->buf, sizeof(vm->buf), what, NULL, seconds);
	return answer ? strstr(answer, what) : NULL;
}

bool get_steps(struct vm *vm, uint64_t steps[3])
{
	char *answer = ask(vm, "status", ANSWER_TIMEOUT);

	return answer && sscanf(answer, "status %lu %lu %lu", &steps[0], &steps[1],
				&steps[2]) == 3;
}

bool qmp_args(struct vm *vm, const char *command, const char *args)
{
	char cmd[256], *line;
	int len = snprintf(cmd, sizeof(cmd), "{'execute': '%s', 'arguments': {%s}}\n", command,
			   args);

	if (send(vm->mon, cmd, len, MSG_NOSIGNAL) != len)
		return false;
	do {
		line = read_line(vm->mon, vm->buf, sizeof(vm->buf), "{\"return\"", "{\"error\"",
				 ANSWER_TIMEOUT);
	} while (line && strncmp(line, "{\"return\"", 9) && strncmp(line, "{\"error\"", 8));
	return line && line[2] == 'r';
}

bool qmp(struct vm *vm, const char *command)
{
	return qmp_args(vm, command, "");
}

bool get_foreign(struct vm *vm, uint64_t *foreign)
{
	char *answer = ask(vm, "holder", ANSWER_TIMEOUT);

	return answer && sscanf(answer, "holder %lu", foreign) == 1;
}

/* What QEMU knows of a guest that says nothing */
static void interrogate(struct vm *vm)
{
	static const char * const questions[] = {
		"info status", "info registers -a", "info lapic", "info pic", "info irq",
		"info chardev",
	};
	static char answer[65536];
	char cmd[256], *p, *end;
	size_t i;
	int len;

	if (vm->mon < 0)
		return;
	for (i = 0; i < ARRAY_SIZE(questions); i++) {
		len = snprintf(cmd, sizeof(cmd),
			       "{'execute': 'human-monitor-command', 'arguments': {'command-line': '%s'}}\n",
			       questions[i]);
		if (send(vm->mon, cmd, len, MSG_NOSIGNAL) != len ||
		    !read_line(vm->mon, answer, sizeof(answer), "{\"return\"", "{\"error\"", 10)) {
			printf("        QEMU does not answer\n");
			return;
		}
		printf("        %s\n", questions[i]);
		for (p = answer; p; p = end) {
			end = strstr(p, "\\r\\n");
			if (end) {
				*end = '\0';
				end += 4;
			}
			printf("        | %s\n", p);
		}
	}
}

void show_all(struct vm *vm)
{
	static const char * const names[] = {
		"/tmp/%u.console", "/tmp/%u.err", "/tmp/standby-%u.err", "/tmp/protect-%u.err",
	};
	char path[64];
	size_t i;

	for (i = 0; i < ARRAY_SIZE(names); i++) {
		snprintf(path, sizeof(path), names[i], vm->gen);
		show_file(path);
	}
	interrogate(vm);
}

void arg(struct args *a, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(a->text[a->texts], sizeof(a->text[0]), fmt, ap);
	va_end(ap);
	a->v[a->n++] = a->text[a->texts++];
}

unsigned int guest_used_mb(void)
{
	return GUEST_MB + guest_work_mb - WORK_MB;
}

void args_of_qemu(struct args *a, unsigned int gen, const char *ram)
{
	const char * const fixed[] = {
		qemu, "-nodefaults", "-no-user-config", "-display", "none", "-L", firmware,
		"-accel", accel, "-cpu", guest_tells ? "host,kvm-page-states=on" : "host",
		"-smp", guest_cpus, "-no-reboot",
		"-name", "counter",
		"-machine", "q35,memory-backend=ram0", "-kernel", kernel, "-initrd", initrd,
		"-drive", "if=virtio,format=raw,readonly=on,file=" DISK_FILE,
		/* Nothing but the guest itself may notice that there are two of it */
		"-drive", "if=virtio,format=raw,file.locking=off,file=" HOLDER_FILE,
	};
	char limit[32] = "";
	size_t i;

	for (i = 0; i < ARRAY_SIZE(fixed); i++)
		a->v[a->n++] = (char *)fixed[i];
	/* The rest is there, but nobody writes it, not even to note that it is free */
	if (guest_mb > guest_used_mb())
		snprintf(limit, sizeof(limit), " mem=%uM", guest_used_mb());
	a->v[a->n++] = "-append";
	arg(a, "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check rcupdate.rcu_expedited=1 demo.work=%u demo.still=%u demo.rate=%u demo.ledger=%d demo.churn=%d demo.churn_us=20000%s%s",
	    guest_work_mb, guest_tells > 1 ? HINTS_STILL_MB : STILL_MB, guest_rate, guest_has_ledger,
	    guest_tells ? 300 : 0, guest_tells ? " init_on_alloc=1" : "", limit);
	if (guest_tells) {
		if (guest_tells > 1) {
			a->v[a->n++] = "-object";
			a->v[a->n++] = "iothread,id=io0";
		}
		a->v[a->n++] = "-device";
		a->v[a->n++] = guest_tells > 1 ?
			"virtio-balloon-pci,id=b0,free-page-reporting=on,free-page-hint=on,iothread=io0" :
			"virtio-balloon-pci,id=b0,free-page-reporting=on";
	}
	if (guest_has_ledger) {
		char path[64];

		ledger_tap(gen);
		a->v[a->n++] = "-drive";
		if (guest_has_overlay && *ram == '{') {
			ledger_overlay(gen, path);
			arg(a, "if=virtio,format=qcow2,file=%s,backing.driver=raw,backing.file.driver=file,backing.file.filename={disk0}",
			    path);
		} else {
			ledger_image(gen, path);
			arg(a, "if=virtio,format=raw,file=%s",
			    *ram != '{' ? path : wrong_disk ? wrong_disk : "{disk0}");
		}
		a->v[a->n++] = "-netdev";
		arg(a, "tap,id=net0,ifname=tap%u,script=no,downscript=no,vhost=%s", gen,
		    guest_has_vhost ? "on" : "off");
		a->v[a->n++] = "-device";
		a->v[a->n++] = "virtio-net-pci,netdev=net0,romfile=,mac=52:54:00:99:00:02";
	}
	if (guest_has_net) {
		a->v[a->n++] = "-netdev";
		a->v[a->n++] = "hubport,id=net0,hubid=0";
		a->v[a->n++] = "-device";
		a->v[a->n++] = "virtio-net-pci,netdev=net0,romfile=";
	}
	a->v[a->n++] = "-object";
	arg(a, "memory-backend-file,id=ram0,size=%uM,share=on,mem-path=%s", guest_mb, ram);
	a->v[a->n++] = "-qmp";
	arg(a, "unix:/tmp/%u.qmp,server=on,wait=off", gen);
	a->v[a->n++] = "-qmp";
	arg(a, "unix:/tmp/%u.mon,server=on,wait=off", gen);
	a->v[a->n++] = "-serial";
	arg(a, "file:/tmp/%u.console", gen);
	a->v[a->n++] = "-serial";
	arg(a, "unix:/tmp/%u.ctl,server=on,wait=off", gen);
	a->v[a->n++] = "-pidfile";
	arg(a, "/tmp/%u.pid", gen);
}

bool meet(struct vm *vm, unsigned int gen, const char *ram, unsigned int seconds)
{
	uint64_t until = now_us() + seconds * 1000000ull;
	char path[64];
	FILE *f;
	int pid;

	memset(vm, 0, sizeof(*vm));
	vm->gen = gen;
	vm->ctl = -1;
	vm->mon = -1;
	snprintf(vm->ram, sizeof(vm->ram), "%s", ram);
	snprintf(vm->qmp, sizeof(vm->qmp), "/tmp/%u.qmp", gen);
	while (vm->ctl < 0 || vm->mon < 0) {
		if (now_us() > until)
			return false;
		usleep(10000);
		snprintf(path, sizeof(path), "/tmp/%u.ctl", gen);
		if (vm->ctl < 0)
			vm->ctl = connect_unix(path);
		snprintf(path, sizeof(path), "/tmp/%u.mon", gen);
		if (vm->mon < 0)
			vm->mon = connect_unix(path);
	}
	snprintf(path, sizeof(path), "/tmp/%u.pid", gen);
	f = fopen(path, "r");
	if (!f || fscanf(f, "%d", &pid) != 1)
		return false;
	fclose(f);
	vm->pid = pid;
	return qmp(vm, "qmp_capabilities");
}

bool wait_status(struct vm *vm, const char *status, unsigned int seconds)
{
	uint64_t until = now_us() + seconds * 1000000ull;
	char want[64];

	snprintf(want, sizeof(want), "\"status\": \"%s\"", status);
	while (qmp(vm, "query-status")) {
		if (strstr(vm->buf, want))
			return true;
		if (now_us() > until)
			break;
		usleep(10000);
	}
	return false;
}

/*
 * Waits until a guest that was started from an epoch runs.  Before its state is loaded the serial
 * line swallows what it is sent, and after it, there may be half a line from the time of the epoch.
 */
bool wait_running(struct vm *vm, unsigned int seconds)
{
	return wait_status(vm, "running", seconds) && send(vm->ctl, "\n", 1, MSG_NOSIGNAL) == 1;
}

void leave(struct vm *vm)
{
	kill_now(&vm->pid, vm->child);
	if (vm->ctl >= 0)
		close(vm->ctl);
	if (vm->mon >= 0)
		close(vm->mon);
	vm->ctl = -1;
	vm->mon = -1;
}

bool start_qemu(struct vm *vm)
{
	unsigned int gen = ++last_gen;
	struct args a = { .n = 0 };
	char ram[64], err[64];
	pid_t pid;

	snprintf(ram, sizeof(ram), "/dev/shm/ram-%u", gen);
	snprintf(err, sizeof(err), "/tmp/%u.err", gen);
	args_of_qemu(&a, gen, ram);
	a.v[a.n] = NULL;
	pid = start(a.v, -1, err);
	if (!meet(vm, gen, ram, ANSWER_TIMEOUT)) {
		show_file(err);
		return fail("QEMU did not start");
	}
	vm->pid = pid;
	vm->child = true;
	return true;
}

bool wait_boot(struct vm *vm)
{
	char path[64];

	if (!read_line(vm->ctl, vm->buf, sizeof(vm->buf), "ready", NULL, BOOT_TIMEOUT)) {
		snprintf(path, sizeof(path), "/tmp/%u.console", vm->gen);
		show_file(path);
		return fail("the guest did not boot");
	}
	note("the guest is up, %s", accel);
	return true;
}

bool boot(struct vm *vm)
{
	return start_qemu(vm) && wait_boot(vm);
}

bool silent(struct vm *vm, const char *asked)
{
	bool known = qmp(vm, "query-status");
	char path[64];

	fail("no word from the guest%s", asked);
	note("its QEMU says: %s", known ? vm->buf : "nothing");
	snprintf(path, sizeof(path), "/tmp/protect-%u.err", vm->gen);
	show_file(path);
	snprintf(path, sizeof(path), "/tmp/%u.err", vm->gen);
	show_file(path);
	snprintf(path, sizeof(path), "/tmp/%u.console", vm->gen);
	show_file(path);
	return false;
}

bool guest_goes_on(struct vm *vm)
{
	uint64_t before[3], after[3];
	uint64_t until = now_us() + ANSWER_TIMEOUT * 1000000ull;

	if (!get_steps(vm, before))
		return silent(vm, "");
	while (now_us() < until) {
		usleep(20000);
		if (!get_steps(vm, after))
			return silent(vm, "");
		if (after[0] > before[0] + 10 && after[1] > before[1] + 10)
			return true;
	}
	return fail("the guest stands still");
}

void remove_ram(const char *path)
{
	char dir[64], *slash;
	struct dirent *d;
	DIR *dp;

	snprintf(dir, sizeof(dir), "%s", path);
	slash = strrchr(dir, '/');
	if (slash && strstr(dir, "/standby-"))
		*slash = '\0';
	unlink(path);
	dp = opendir(dir);
	while (strstr(dir, "/standby-") && dp && (d = readdir(dp)))
		unlinkat(dirfd(dp), d->d_name, 0);
	if (dp)
		closedir(dp);
	umount2(dir, MNT_DETACH);
	rmdir(dir);
}
