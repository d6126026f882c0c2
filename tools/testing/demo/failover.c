// SPDX-License-Identifier: GPL-2.0-only
/*
 * Runs inside the rig: protects a guest with kvm-checkpoint, kills what can be killed, and asks the
 * guest that goes on elsewhere whether its memory is what it should be and how far it had come.
 *
 * usage: failover QEMU FIRMWARE KERNEL INITRD KVM-CHECKPOINT TEST...
 *
 *	accel=ARG	of -accel for the tests that follow (default: kvm,dirty-slot-ring-size=512)
 *	tls=0|1		with a key, or without on loopback (default: 0, as encryption is slow
 *			when it is emulated)
 *	kills=N		the primary is killed N times at random moments: QEMU alone, or with its
 *			daemon, as if the host had died.  The guest goes on at the standby, which
 *			is the next primary.
 *	seconds=N	the same, for so long
 *	paused=N	N times the guest is stopped, and killed when an epoch of that has been
 *			acknowledged: it must not run at the standby before it is told to
 *	meddles=N	N times somebody else resumes the guest and asks for its dirty rate in the
 *			midst of epochs; they are torn and must not count: memory is compared
 *	resets=N	N times the guest is reset, and until one reset came in the midst of an
 *			epoch: that one is torn, too; memory is compared
 *	equal=N		N times the guest is stopped, and the memory of both sides compared
 *	daemons=N	the daemons are killed N times, each in turn, and started again
 *	chains=N	N epochs go to a directory; the guest is killed and started again from one
 *			in the middle
 *	early=N		N epochs that do not wait for the interval, as so much is written
 *	boots=N		the guest is protected from its first instruction on
 *	links=N		the link is cut N times in the middle of an epoch
 *	measure=N	N epochs at 10 a second, and N as fast as it goes, with each way to log
 *			dirty pages: a table
 *
 * What an acknowledged epoch promises: the guest has been asked for its step counts all the time,
 * so it is known that it had come at least so far when the epoch was taken.  The one that goes on
 * must not know less.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "driver.h"

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))

#define GUEST_MB	96
#define DISK_FILE	"/dev/shm/guest-disk"
#define PSK_FILE	"/tmp/psk"

#define BOOT_TIMEOUT	240	/* seconds */
#define SYNC_TIMEOUT	180
#define FAILOVER_TIMEOUT 120
#define ANSWER_TIMEOUT	60

#define MAX_RESETS	1000
#define MAX_EPOCHS	65536
#define MAX_SAMPLES	4096

static const char *qemu, *firmware, *kernel, *initrd, *checkpoint;
/* Small rings, so that they get full */
static const char *accel = "kvm,dirty-slot-ring-size=512";
static bool tls;
static const char *max_dirty;	/* argument of --max-dirty, or NULL */
static const char *chain;	/* directory for epochs, or NULL to send them to a standby */
static uint64_t started;

/* A guest, in a QEMU that was started here or by a standby */
struct vm {
	unsigned int gen;
	pid_t pid;
	bool child;		/* ours */
	char ram[64], qmp[64];
	int ctl, mon;
	char buf[1024];
};

/* What came out of kvm-checkpoint protect */
enum part { STOP, HARVEST, STATE, COPY, RESUME, PAUSE, PARTS };
static const char * const part_names[] = {
	"stop_us", "harvest_us", "state_us", "copy_us", "resume_us", "pause_us",
};

struct epoch {
	uint64_t taken_us, done_us, pages, wire;
	uint64_t us[PARTS];
	bool was_running;
};

struct protect {
	pid_t pid;
	int out;
	pthread_t reader;
	uint64_t synced;	/* how many times */
	uint64_t differed;
	bool resync;
};

static struct {
	pthread_mutex_t lock;
	struct epoch epochs[MAX_EPOCHS];	/* by number */
	uint64_t acked, newest;
} log_ = { .lock = PTHREAD_MUTEX_INITIALIZER };

struct sample {
	uint64_t us;
	uint64_t steps[3];
};

static struct sample samples[MAX_SAMPLES];
static unsigned int nr_samples;

static void note(const char *fmt, ...)
{
	char text[1024];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	printf("[%5.1f] %s\n", (now_us() - started) / 1e6, text);
	fflush(stdout);
}

static void fatal(const char *what)
{
	printf("failover: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t number(const char *line, const char *name)
{
	char key[64];
	const char *p;

	snprintf(key, sizeof(key), "\"%s\":", name);
	p = strstr(line, key);
	return p ? strtoull(p + strlen(key), NULL, 10) : 0;
}

static unsigned int random_ms(unsigned int from, unsigned int to)
{
	return from + (mix(now_us()) >> 20) % (to - from + 1);
}

/* Starts a program that dies with us */
static pid_t start(char **argv, int out, const char *err)
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

static void kill_now(pid_t *pid, bool child)
{
	if (*pid <= 0)
		return;
	kill(*pid, SIGKILL);
	if (child)
		waitpid(*pid, NULL, 0);
	*pid = 0;
}

/* The end of it */
static void show_file(const char *path)
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

static bool fail(const char *fmt, ...)
{
	char text[1024];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	note("FAILED: %s", text);
	return false;
}

/*
 * The guest
 */

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

static char *ask(struct vm *vm, const char *what, unsigned int seconds)
{
	char *answer;
	char cmd[32];
	int len = snprintf(cmd, sizeof(cmd), "%s\n", what);

	if (send(vm->ctl, cmd, len, MSG_NOSIGNAL) != len)
		return NULL;
	answer = read_line(vm->ctl, vm->buf, sizeof(vm->buf), what, NULL, seconds);
	return answer ? strstr(answer, what) : NULL;
}

static bool get_steps(struct vm *vm, uint64_t steps[3])
{
	char *answer = ask(vm, "status", ANSWER_TIMEOUT);

	return answer && sscanf(answer, "status %lu %lu %lu", &steps[0], &steps[1],
				&steps[2]) == 3;
}

/* False also if QEMU refuses; events come in between */
static bool qmp_args(struct vm *vm, const char *command, const char *args)
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

static bool qmp(struct vm *vm, const char *command)
{
	return qmp_args(vm, command, "");
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

/* All that is known of a guest and of who has to do with it */
static void show_all(struct vm *vm)
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

/* QEMU's command line; the standby's lacks what its own placeholders and options say */
struct args {
	char *v[64];
	int n;
	char text[16][256];
	int texts;
};

static void arg(struct args *a, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(a->text[a->texts], sizeof(a->text[0]), fmt, ap);
	va_end(ap);
	a->v[a->n++] = a->text[a->texts++];
}

static void args_of_qemu(struct args *a, unsigned int gen, const char *ram)
{
	const char * const fixed[] = {
		qemu, "-nodefaults", "-no-user-config", "-display", "none", "-L", firmware,
		"-accel", accel, "-cpu", "host", "-smp", "2", "-no-reboot", "-name", "counter",
		"-machine", "q35,memory-backend=ram0", "-kernel", kernel, "-initrd", initrd,
		"-append",
		"console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check rcupdate.rcu_expedited=1 demo.work=16 demo.still=16 demo.rate=1000",
		"-drive", "if=virtio,format=raw,readonly=on,file=" DISK_FILE,
	};
	size_t i;

	for (i = 0; i < ARRAY_SIZE(fixed); i++)
		a->v[a->n++] = (char *)fixed[i];
	a->v[a->n++] = "-object";
	arg(a, "memory-backend-file,id=ram0,size=%dM,share=on,mem-path=%s", GUEST_MB, ram);
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

/* Connects to a QEMU that is there or will be; false if it does not come */
static bool meet(struct vm *vm, unsigned int gen, const char *ram, unsigned int seconds)
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

/* Waits for QEMU to be in a state */
static bool wait_status(struct vm *vm, const char *status, unsigned int seconds)
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
static bool wait_running(struct vm *vm, unsigned int seconds)
{
	return wait_status(vm, "running", seconds) && send(vm->ctl, "\n", 1, MSG_NOSIGNAL) == 1;
}

static void leave(struct vm *vm)
{
	kill_now(&vm->pid, vm->child);
	if (vm->ctl >= 0)
		close(vm->ctl);
	if (vm->mon >= 0)
		close(vm->mon);
	vm->ctl = -1;
	vm->mon = -1;
}

static unsigned int last_gen;

static bool start_qemu(struct vm *vm)
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

static bool wait_boot(struct vm *vm)
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

static bool boot(struct vm *vm)
{
	return start_qemu(vm) && wait_boot(vm);
}

/*
 * The daemons
 */

/* It takes over by itself only where primaries are killed: a busy machine is silent for long */
static pid_t start_standby(unsigned int gen, unsigned int port, bool takes_over)
{
	struct args a = { .n = 0 };
	char err[64];

	a.v[a.n++] = (char *)checkpoint;
	a.v[a.n++] = "standby";
	a.v[a.n++] = "--listen";
	arg(&a, "127.0.0.1:%u", port);
	if (tls) {
		a.v[a.n++] = "--psk-file";
		a.v[a.n++] = PSK_FILE;
	} else {
		a.v[a.n++] = "--insecure";
	}
	a.v[a.n++] = "--timeout";
	a.v[a.n++] = takes_over ? "10s" : "0";
	a.v[a.n++] = "--no-fence";	/* the primaries are dead: we killed them */
	a.v[a.n++] = "--ram-dir";
	arg(&a, "/dev/shm/standby-%u", gen);
	a.v[a.n++] = "--";
	args_of_qemu(&a, gen, "{ram0}");
	a.v[a.n] = NULL;
	snprintf(err, sizeof(err), "/tmp/standby-%u.err", gen);
	return start(a.v, -1, err);
}

static void *read_protect(void *arg)
{
	struct protect *p = arg;
	char line[1024];
	FILE *f = fdopen(p->out, "r");
	int i;

	while (f && fgets(line, sizeof(line), f)) {
		uint64_t nr = number(line, "epoch");
		struct epoch *e = &log_.epochs[nr % MAX_EPOCHS];

		pthread_mutex_lock(&log_.lock);
		if (strstr(line, "\"event\":\"epoch\"")) {
			e->taken_us = number(line, "taken_us");
			e->done_us = number(line, "done_us");
			e->pages = number(line, "pages");
			e->wire = number(line, "wire_bytes");
			e->was_running = strstr(line, "\"was_running\":true");
			for (i = 0; i < PARTS; i++)
				e->us[i] = number(line, part_names[i]);
			log_.newest = nr;
		} else if (strstr(line, "\"event\":\"acked\"")) {
			log_.acked = nr;
		} else if (strstr(line, "\"event\":\"synced\"")) {
			p->synced++;
			p->differed = number(line, "differed");
			p->resync = strstr(line, "\"resync\":true");
		}
		pthread_mutex_unlock(&log_.lock);
	}
	if (f)
		fclose(f);
	return NULL;
}

static void start_protect(struct protect *p, struct vm *vm, unsigned int port,
			  const char *interval, unsigned int epochs)
{
	struct args a = { .n = 0 };
	char err[64];
	int out[2];

	memset(p, 0, sizeof(*p));
	a.v[a.n++] = (char *)checkpoint;
	a.v[a.n++] = "protect";
	a.v[a.n++] = "--qmp";
	a.v[a.n++] = vm->qmp;
	a.v[a.n++] = "--to";
	if (chain)
		arg(&a, "%s", chain);
	else
		arg(&a, "tcp:127.0.0.1:%u", port);
	if (tls && !chain) {
		a.v[a.n++] = "--psk-file";
		a.v[a.n++] = PSK_FILE;
	} else if (!chain) {
		a.v[a.n++] = "--insecure";
	}
	a.v[a.n++] = "--interval";
	a.v[a.n++] = (char *)interval;
	if (max_dirty) {
		a.v[a.n++] = "--max-dirty";
		a.v[a.n++] = (char *)max_dirty;
	}
	if (epochs) {
		a.v[a.n++] = "--epochs";
		arg(&a, "%u", epochs);
	}
	a.v[a.n++] = "--json";
	a.v[a.n] = NULL;
	if (pipe2(out, O_CLOEXEC))
		fatal("pipe");
	snprintf(err, sizeof(err), "/tmp/protect-%u.err", vm->gen);
	p->pid = start(a.v, out[1], err);
	close(out[1]);
	p->out = out[0];
	if (pthread_create(&p->reader, NULL, read_protect, p))
		fatal("pthread_create");
}

/* Its end, whoever made it; all of its output has been read then */
static int wait_protect(struct protect *p)
{
	int status = 0;

	if (!p->pid)
		return 0;
	waitpid(p->pid, &status, 0);
	p->pid = 0;
	pthread_join(p->reader, NULL);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

static void kill_protect(struct protect *p)
{
	if (p->pid)
		kill(p->pid, SIGKILL);
	wait_protect(p);
}

/* Waits until it has told so often that the standby has everything */
static bool wait_synced(struct protect *p, struct vm *vm, uint64_t times)
{
	uint64_t until = now_us() + SYNC_TIMEOUT * 1000000ull, synced;
	char path[64];

	do {
		usleep(20000);
		pthread_mutex_lock(&log_.lock);
		synced = p->synced;
		pthread_mutex_unlock(&log_.lock);
		if (synced >= times)
			return true;
	} while (now_us() < until && waitpid(p->pid, NULL, WNOHANG) == 0);
	snprintf(path, sizeof(path), "/tmp/protect-%u.err", vm->gen);
	show_file(path);
	return fail("the guest is not protected");
}

static void reset_log(void)
{
	pthread_mutex_lock(&log_.lock);
	memset(log_.epochs, 0, sizeof(log_.epochs));
	log_.acked = 0;
	log_.newest = 0;
	pthread_mutex_unlock(&log_.lock);
	nr_samples = 0;
}

/* All there is to say of a guest that does not answer */
static bool silent(struct vm *vm, const char *asked)
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

/* Asks the guest how far it is, again and again */
static bool watch_guest(struct vm *vm, unsigned int ms)
{
	uint64_t until = now_us() + ms * 1000ull;

	do {
		struct sample *s = &samples[nr_samples % MAX_SAMPLES];

		if (!get_steps(vm, s->steps))
			return silent(vm, "");
		s->us = now_us();
		nr_samples++;
		usleep(20000);
	} while (now_us() < until);
	return true;
}

/* What the guest must know that goes on from an epoch */
static const struct sample *promised(uint64_t epoch)
{
	const struct sample *best = NULL;
	unsigned int i, n = nr_samples < MAX_SAMPLES ? nr_samples : MAX_SAMPLES;
	uint64_t taken;

	pthread_mutex_lock(&log_.lock);
	taken = log_.epochs[epoch % MAX_EPOCHS].taken_us;
	pthread_mutex_unlock(&log_.lock);
	for (i = 0; i < n; i++) {
		if (samples[i].us < taken && (!best || samples[i].us > best->us))
			best = &samples[i];
	}
	return best;
}

static bool check_guest(struct vm *vm, const struct sample *least)
{
	uint64_t steps[3];
	char *answer;
	int i;

	if (!get_steps(vm, steps))
		return silent(vm, "");
	for (i = 0; least && i < 3; i++) {
		if (steps[i] < least->steps[i])
			return fail("writer %d is at step %lu, an acknowledged epoch had %lu", i,
				    steps[i], least->steps[i]);
	}
	answer = ask(vm, "verify", ANSWER_TIMEOUT);
	if (!answer)
		return silent(vm, ", asked to verify its memory");
	if (strncmp(answer, "verify ok", 9))
		return fail("the guest says: %s", answer);
	return true;
}

static void remove_ram(const char *path)
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
	rmdir(dir);
}

/*
 * Tests
 */

static struct vm vm;
static pid_t standby;		/* the one that started vm's QEMU, or will start the next */
static double longest_failover, sum_failover;
static unsigned int failovers;

/* The daemons of both sides */
struct pair {
	unsigned int gen, port;
	pid_t standby;
	struct protect protect;
	char theirs[64];	/* the standby's RAM */
};

static bool begin(struct pair *x, bool takes_over)
{
	x->gen = ++last_gen;
	x->port = 6000 + x->gen;
	snprintf(x->theirs, sizeof(x->theirs), "/dev/shm/standby-%u/ram0", x->gen);
	reset_log();
	x->standby = start_standby(x->gen, x->port, takes_over);
	start_protect(&x->protect, &vm, x->port, "50ms", 0);
	return wait_synced(&x->protect, &vm, 1);
}

static void end(struct pair *x)
{
	kill(x->protect.pid, SIGTERM);
	wait_protect(&x->protect);
	kill_now(&x->standby, true);
	remove_ram(x->theirs);
}

/* Stops the guest and waits for an epoch that has all of it */
static bool stop_guest(void)
{
	uint64_t before, until;
	bool there = false;
	char path[64];

	pthread_mutex_lock(&log_.lock);
	before = log_.newest;
	pthread_mutex_unlock(&log_.lock);
	if (!qmp(&vm, "stop"))
		return fail("QEMU does not stop the guest");
	until = now_us() + ANSWER_TIMEOUT * 1000000ull;
	while (!there && now_us() < until) {
		usleep(5000);
		pthread_mutex_lock(&log_.lock);
		there = log_.newest > before && log_.acked == log_.newest &&
			!log_.epochs[log_.newest % MAX_EPOCHS].was_running;
		pthread_mutex_unlock(&log_.lock);
	}
	if (there)
		return true;
	snprintf(path, sizeof(path), "/tmp/protect-%u.err", vm.gen);
	show_file(path);
	note("epoch %lu was acknowledged, %lu was taken", log_.acked, log_.newest);
	return fail("the stopped guest's epoch was not acknowledged");
}

/* It has to be told to go on, and it must not be told too early */
static bool go_on_when_told(struct vm *next)
{
	if (!wait_status(next, "paused", FAILOVER_TIMEOUT))
		return false;
	usleep(300000);
	if (!wait_status(next, "paused", 0))
		return fail("a guest that was stopped runs at the standby");
	return qmp(next, "cont");
}

enum victim { QEMU, HOST, PAUSED };

/* One kill; vm is the guest at the standby then */
static bool kill_once(enum victim victim)
{
	static const char * const names[] = {
		"QEMU", "QEMU and daemon", "QEMU of a stopped guest",
	};
	const struct sample *least;
	uint64_t killed, epoch, ms, steps[3];
	struct pair x;
	struct vm next;
	char path[64];
	bool ok;

	ok = begin(&x, true) && watch_guest(&vm, random_ms(200, 2500)) &&
	     (victim != PAUSED || stop_guest());
	snprintf(path, sizeof(path), "/tmp/standby-%u.err", x.gen);
	if (!ok) {
		show_all(&vm);
		show_file(path);
		kill_protect(&x.protect);
		kill_now(&x.standby, true);
		return false;
	}

	usleep(random_ms(0, 100) * 1000);
	killed = now_us();
	kill(vm.pid, SIGKILL);
	if (victim == HOST)
		kill_protect(&x.protect);
	else
		wait_protect(&x.protect);
	pthread_mutex_lock(&log_.lock);
	epoch = log_.acked;
	pthread_mutex_unlock(&log_.lock);
	least = promised(epoch);

	ok = meet(&next, x.gen, x.theirs, FAILOVER_TIMEOUT) &&
	     (victim != PAUSED || go_on_when_told(&next)) &&
	     wait_running(&next, FAILOVER_TIMEOUT) && get_steps(&next, steps);
	ms = (now_us() - killed) / 1000;
	leave(&vm);
	remove_ram(vm.ram);
	kill_now(&standby, true);
	standby = x.standby;
	vm = next;
	if (!ok) {
		show_all(&next);
		return fail("the standby did not take over");
	}
	failovers++;
	sum_failover += ms;
	if (ms > longest_failover)
		longest_failover = ms;
	if (!check_guest(&vm, least)) {
		show_all(&vm);
		return false;
	}
	note("%s killed at epoch %lu; on after %lu ms, memory verified, no acknowledged step lost",
	     names[victim], epoch, ms);
	return true;
}

static bool test_paused(unsigned int times)
{
	while (times--) {
		if (!kill_once(PAUSED))
			return false;
	}
	return true;
}

static bool kill_until(unsigned int kills, unsigned int seconds)
{
	uint64_t until = now_us() + seconds * 1000000ull;
	unsigned int n = 0;

	while (kills ? n < kills : now_us() < until) {
		if (!kill_once(n & 1 ? HOST : QEMU))
			return fail("kill %u", n + 1);
		n++;
	}
	note("%u kills, all verified; the guest was on after %.0f ms on average, %.0f at most", n,
	     sum_failover / failovers, longest_failover);
	return true;
}

static bool test_kills(unsigned int n)
{
	return kill_until(n, 0);
}

static bool test_seconds(unsigned int n)
{
	return kill_until(0, n);
}

static uint8_t *map_ram(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	void *p = mmap(NULL, (size_t)GUEST_MB << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (fd >= 0)
		close(fd);
	return fd < 0 || p == MAP_FAILED ? NULL : p;
}

static uint64_t different_pages(const uint8_t *a, const uint8_t *b, uint64_t *first)
{
	uint64_t n, bad = 0;

	for (n = 0; n < GUEST_MB * 256ull; n++) {
		if (memcmp(a + n * PAGE, b + n * PAGE, PAGE) && !bad++)
			*first = n;
	}
	return bad;
}

/* Stops the guest, waits for the epoch that has all of it and compares */
static bool compare_once(const char *theirs)
{
	uint8_t *a = map_ram(vm.ram), *b = map_ram(theirs);
	uint64_t before, bad = 0, first = 0, noticed = 0;
	bool there;

	if (!a || !b)
		return fail("cannot map the memory of both sides");
	there = stop_guest();
	if (there) {
		bad = different_pages(a, b, &first);
		/* The control: one bit */
		b[(GUEST_MB << 19) + 1234] ^= 1;
		noticed = different_pages(a, b, &before);
		b[(GUEST_MB << 19) + 1234] ^= 1;
	}
	munmap(a, (size_t)GUEST_MB << 20);
	munmap(b, (size_t)GUEST_MB << 20);
	if (!qmp(&vm, "cont"))
		return fail("QEMU does not resume the guest");
	if (!there)
		return false;
	if (bad)
		return fail("%lu pages differ, the first is page %lu", bad, first);
	if (noticed != 1)
		return fail("a bit that differs was not noticed");
	return true;
}

static bool test_equal(unsigned int times)
{
	struct pair x;
	unsigned int n;
	bool ok;

	ok = begin(&x, false);
	for (n = 0; ok && n < times; n++) {
		usleep(random_ms(0, 300) * 1000);
		ok = compare_once(x.theirs);
	}
	end(&x);
	if (ok)
		note("the memory of both sides was equal each of %u times, at epochs up to %lu", n,
		     log_.newest);
	return ok;
}

/* How often protect has noticed that an epoch was torn */
static unsigned int count_torn(unsigned int gen)
{
	char path[64], line[1024];
	unsigned int n = 0;
	FILE *f;

	snprintf(path, sizeof(path), "/tmp/protect-%u.err", gen);
	f = fopen(path, "r");
	while (f && fgets(line, sizeof(line), f))
		n += !!strstr(line, "taking another");
	if (f)
		fclose(f);
	return n;
}

/* What a management program may do at any time */
static bool test_meddles(unsigned int times)
{
	unsigned int n, i;
	struct pair x;
	bool ok;

	ok = begin(&x, false);
	for (n = 0; ok && n < times; n++) {
		/* One measurement at a time is allowed: it may be refused */
		qmp_args(&vm, "calc-dirty-rate", "'calc-time': 1, 'mode': 'dirty-bitmap'");
		for (i = 0; ok && i < 100; i++) {
			usleep(random_ms(0, 10) * 1000);
			ok = qmp(&vm, "cont");
		}
		ok = ok && compare_once(x.theirs);
	}
	end(&x);
	if (ok)
		note("%u times resumed by somebody else, %u epochs torn and taken again: all equal",
		     n * 100, count_torn(vm.gen));
	return ok;
}

/* So does a reset: it may come when the guest is stopped for an epoch, and stop being that */
static bool test_resets(unsigned int times)
{
	unsigned int n, torn = 0;
	struct pair x;
	bool ok;

	ok = begin(&x, false) && qmp_args(&vm, "set-action", "'reboot': 'reset'");
	for (n = 0; ok && n < MAX_RESETS && (n < times || !torn); n++) {
		usleep(random_ms(0, 60) * 1000);
		ok = qmp(&vm, "system_reset");
		torn = count_torn(vm.gen);
	}
	ok = ok && compare_once(x.theirs);
	end(&x);
	/* It boots sooner when nobody looks */
	ok = ok && wait_boot(&vm) && qmp_args(&vm, "set-action", "'reboot': 'shutdown'");
	if (ok && !torn)
		return fail("none of %u resets came in the midst of an epoch", n);
	if (ok)
		note("%u times reset, %u epochs torn and taken again: all equal", n, torn);
	return ok;
}

static bool guest_goes_on(void)
{
	uint64_t before[3], after[3];
	int i;

	for (i = 0; i < 50; i++) {
		if (!get_steps(&vm, i ? after : before))
			return silent(&vm, "");
		if (i && after[0] > before[0] + 10 && after[1] > before[1] + 10)
			return true;
		usleep(100000);
	}
	return fail("the guest stands still");
}

static bool test_daemons(unsigned int times)
{
	struct pair x;
	struct protect *p = &x.protect;
	unsigned int n;
	bool ok;

	ok = begin(&x, false);
	for (n = 0; ok && n < times; n++) {
		uint64_t synced = p->synced;

		usleep(random_ms(100, 600) * 1000);
		if (n & 1) {
			kill_now(&x.standby, true);
			ok = guest_goes_on();
			x.standby = start_standby(x.gen, x.port, false);
			ok = ok && wait_synced(p, &vm, synced + 1);
		} else {
			kill_protect(p);
			ok = guest_goes_on();
			start_protect(p, &vm, x.port, "50ms", 0);
			ok = ok && wait_synced(p, &vm, 1);
		}
		if (ok && !p->resync)
			ok = fail("all pages were sent again");
		ok = ok && compare_once(x.theirs);
		if (ok)
			note("%s killed and back: the guest ran on, %lu pages differed, all equal",
			     n & 1 ? "standby" : "protect", p->differed);
	}
	end(&x);
	return ok;
}

static pid_t start_restore(unsigned int gen, uint64_t epoch)
{
	struct args a = { .n = 0 };
	char err[64];

	a.v[a.n++] = (char *)checkpoint;
	a.v[a.n++] = "restore";
	a.v[a.n++] = "--epoch";
	arg(&a, "%lu", epoch);
	a.v[a.n++] = "--ram-dir";
	arg(&a, "/dev/shm/standby-%u", gen);
	a.v[a.n++] = (char *)chain;
	a.v[a.n++] = "--";
	args_of_qemu(&a, gen, "{ram0}");
	a.v[a.n] = NULL;
	snprintf(err, sizeof(err), "/tmp/standby-%u.err", gen);
	return start(a.v, -1, err);
}

static bool test_chains(unsigned int epochs)
{
	unsigned int gen = ++last_gen;
	char dir[64], ram[64], path[64];
	uint64_t newest = 0, epoch;
	struct protect p;
	struct vm next;
	pid_t restore;
	bool ok;

	reset_log();
	snprintf(dir, sizeof(dir), "/dev/shm/standby-chain-%u", gen);
	chain = dir;
	start_protect(&p, &vm, 0, "50ms", 0);
	ok = wait_synced(&p, &vm, 1);
	while (ok && newest < epochs) {
		ok = watch_guest(&vm, 50);
		pthread_mutex_lock(&log_.lock);
		newest = log_.acked;
		pthread_mutex_unlock(&log_.lock);
	}
	leave(&vm);
	remove_ram(vm.ram);
	kill_now(&standby, true);
	wait_protect(&p);
	epoch = newest - epochs / 2;
	restore = ok ? start_restore(gen, epoch) : 0;
	chain = NULL;
	snprintf(ram, sizeof(ram), "/dev/shm/standby-%u/ram0", gen);
	ok = ok && meet(&next, gen, ram, FAILOVER_TIMEOUT) &&
	     wait_running(&next, FAILOVER_TIMEOUT);
	if (ok) {
		vm = next;
		standby = restore;
		ok = check_guest(&vm, promised(epoch));
	} else {
		snprintf(path, sizeof(path), "/tmp/standby-%u.err", gen);
		show_file(path);
		fail("epoch %lu of %lu in a directory was not restored", epoch, newest);
		kill_now(&restore, true);
	}
	snprintf(ram, sizeof(ram), "/dev/shm/standby-chain-%u/all", gen);
	remove_ram(ram);
	if (ok)
		note("killed at epoch %lu of a directory: goes on from %lu, memory verified",
		     newest, epoch);
	return ok;
}

/* Protected from its first instruction on: firmware moves memory slots about */
static bool test_boot(unsigned int times)
{
	unsigned int n;
	bool ok = true;

	for (n = 0; ok && n < times; n++) {
		unsigned int gen = ++last_gen, port = 6000 + gen;
		struct protect p;
		char theirs[64];
		pid_t side;

		leave(&vm);
		remove_ram(vm.ram);
		kill_now(&standby, true);
		reset_log();
		side = start_standby(gen, port, false);
		ok = start_qemu(&vm);
		if (!ok)
			break;
		start_protect(&p, &vm, port, "50ms", 0);
		snprintf(theirs, sizeof(theirs), "/dev/shm/standby-%u/ram0", gen);
		ok = wait_boot(&vm) && wait_synced(&p, &vm, 1) && compare_once(theirs);
		kill(p.pid, SIGTERM);
		wait_protect(&p);
		kill_now(&side, true);
		remove_ram(theirs);
		if (ok)
			note("protected while it booted, %lu epochs: all equal",
			     log_.newest);
	}
	return ok;
}

/*
 * The link: everything goes through here, until it is cut
 */

static struct {
	unsigned int from, to;
	atomic_bool cut;		/* set: cut after the next so many bytes */
	atomic_ulong after;
	atomic_uint cuts;
} relay;

static int tcp_socket(unsigned int port, bool listening)
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

static void relay_bytes(int a, int b)
{
	struct pollfd p[2] = { { .fd = a, .events = POLLIN }, { .fd = b, .events = POLLIN } };
	char buf[16384];
	ssize_t n;
	int i;

	for (;;) {
		if (poll(p, 2, 1000) < 0)
			return;
		for (i = 0; i < 2; i++) {
			if (!p[i].revents)
				continue;
			n = read(p[i].fd, buf, sizeof(buf));
			if (n <= 0)
				return;
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
	int listening = tcp_socket(relay.from, true), a, b;

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

static bool test_links(unsigned int times)
{
	unsigned int gen = ++last_gen, n, cuts;
	struct protect p;
	pthread_t thread;
	char theirs[64];
	uint64_t until;
	pid_t side;
	bool ok;

	reset_log();
	relay.to = 6000 + gen;
	relay.from = 7000 + gen;
	side = start_standby(gen, relay.to, false);
	if (pthread_create(&thread, NULL, relay_thread, NULL))
		fatal("pthread_create");
	start_protect(&p, &vm, relay.from, "50ms", 0);
	snprintf(theirs, sizeof(theirs), "/dev/shm/standby-%u/ram0", gen);
	ok = wait_synced(&p, &vm, 1);
	for (n = 0; ok && n < times; n++) {
		uint64_t synced = p.synced;

		/* Somewhere in the epochs of the next second */
		cuts = relay.cuts;
		relay.after = random_ms(1, 400) * 1000;
		relay.cut = true;
		until = now_us() + 20000000;
		while (relay.cuts == cuts && now_us() < until)
			usleep(5000);
		if (relay.cuts == cuts)
			ok = fail("nothing went over the link");
		ok = ok && guest_goes_on() && wait_synced(&p, &vm, synced + 1);
		if (ok && !p.resync)
			ok = fail("all pages were sent again");
		ok = ok && compare_once(theirs);
		if (ok)
			note("link cut: the guest ran on, %lu pages differed, memory is equal",
			     p.differed);
	}
	kill(p.pid, SIGTERM);
	wait_protect(&p);
	kill_now(&side, true);
	remove_ram(theirs);
	return ok;
}

/*
 * Measurements
 */

static int compare_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static uint64_t percentile(uint64_t *v, unsigned int n, unsigned int percent)
{
	unsigned int i = n * percent / 100;

	qsort(v, n, sizeof(*v), compare_u64);
	return n ? v[i < n ? i : n - 1] : 0;
}

struct row {
	uint64_t p50[PARTS], p99[PARTS], max[PARTS];
	uint64_t pages, bytes;
	double rate, fastest;
};

/* One run; the rate is that of epochs after the first, which copied everything */
static bool run_epochs(const char *interval, unsigned int n, struct row *r, double *rate)
{
	unsigned int gen = ++last_gen, port = 6000 + gen, i, k = 0;
	uint64_t *v = calloc(n + 1, sizeof(*v)), first, part, pages = 0;
	struct protect p;
	char ram[64];
	pid_t side;
	int status;

	if (!v)
		fatal("no memory");
	reset_log();
	side = start_standby(gen, port, false);
	start_protect(&p, &vm, port, interval, n);
	if (!wait_synced(&p, &vm, 1))
		return false;
	status = wait_protect(&p);
	kill_now(&side, true);
	snprintf(ram, sizeof(ram), "/dev/shm/standby-%u/ram0", gen);
	remove_ram(ram);
	if (status || log_.newest != n + 1)
		return fail("protect ended with %d at epoch %lu of %u", status, log_.newest,
			    n + 1);

	first = log_.epochs[1].done_us;
	*rate = n / ((log_.epochs[n + 1].done_us - first) / 1e6);
	if (!r)
		goto out;
	for (part = 0; part < PARTS; part++) {
		for (k = 0, i = 2; i <= n + 1; i++)
			v[k++] = log_.epochs[i].us[part];
		r->p50[part] = percentile(v, k, 50);
		r->p99[part] = percentile(v, k, 99);
		r->max[part] = v[k - 1];
	}
	for (i = 2; i <= n + 1; i++)
		pages += log_.epochs[i].pages;
	r->pages = pages / n;
	r->bytes = (log_.epochs[n + 1].wire - log_.epochs[1].wire) / n;
out:
	free(v);
	return true;
}

static bool test_early(unsigned int epochs)
{
	struct row r;
	double rate;
	bool ok;

	memset(&r, 0, sizeof(r));
	max_dirty = "400";
	ok = run_epochs("60m", epochs, &r, &rate);
	max_dirty = NULL;
	if (ok && r.pages < 400)
		ok = fail("epochs of %lu pages were taken before 400 were dirty", r.pages);
	if (ok)
		note("%u epochs of %lu pages long before the interval was over", epochs, r.pages);
	return ok;
}

static bool test_measure(unsigned int epochs)
{
	static const struct {
		const char *title, *accel;
	} logs[] = {
		{ "dirty slot rings", "kvm,dirty-slot-ring-size=4096" },
		{ "dirty ring", "kvm,dirty-ring-size=4096" },
		{ "dirty bitmap", "kvm" },
	};
	static const char * const titles[] = {
		[PAUSE] = "pause", [STOP] = "stop", [HARVEST] = "harvest", [STATE] = "state",
		[COPY] = "copy", [RESUME] = "resume",
	};
	static const int order[] = { PAUSE, STOP, HARVEST, STATE, COPY, RESUME };
	struct row rows[3];
	const char *old = accel;
	size_t i, k;
	bool ok = true;

	memset(rows, 0, sizeof(rows));
	for (i = 0; i < 3 && ok; i++) {
		accel = logs[i].accel;
		leave(&vm);
		remove_ram(vm.ram);
		kill_now(&standby, true);
		ok = boot(&vm) && run_epochs("100ms", epochs, &rows[i], &rows[i].rate) &&
		     run_epochs("1ms", epochs, NULL, &rows[i].fastest);
	}
	accel = old;
	if (!ok)
		return false;

	printf("\nTABLE\n");
	printf("| %u epochs each | | %s | %s | %s |\n", epochs, logs[0].title, logs[1].title,
	       logs[2].title);
	printf("|---|---|---|---|---|\n");
	for (k = 0; k < PARTS; k++) {
		printf("| %s, µs | p50 / p99 / max |", titles[order[k]]);
		for (i = 0; i < 3; i++)
			printf(" %lu / %lu / %lu |", rows[i].p50[order[k]], rows[i].p99[order[k]],
			       rows[i].max[order[k]]);
		printf("\n");
	}
	printf("| pages in an epoch | mean |");
	for (i = 0; i < 3; i++)
		printf(" %lu |", rows[i].pages);
	printf("\n| bytes sent for it | mean |");
	for (i = 0; i < 3; i++)
		printf(" %lu |", rows[i].bytes);
	printf("\n| epochs a second | --interval 100ms |");
	for (i = 0; i < 3; i++)
		printf(" %.1f |", rows[i].rate);
	printf("\n| | --interval 1ms |");
	for (i = 0; i < 3; i++)
		printf(" %.1f |", rows[i].fastest);
	printf("\nEND\n");
	return true;
}

static void make_files(void)
{
	uint64_t n;
	FILE *f;

	if (!make_disk(DISK_FILE))
		fatal(DISK_FILE);
	umask(077);
	f = fopen(PSK_FILE, "w");
	if (!f)
		fatal(PSK_FILE);
	fprintf(f, "demo:");
	for (n = 0; n < 4; n++)
		fprintf(f, "%016lx", mix(now_us() + n));
	fprintf(f, "\n");
	if (fclose(f))
		fatal(PSK_FILE);
}

static const struct test {
	const char *name;
	bool (*run)(unsigned int n);
	bool own_guests;		/* boots what it needs */
} tests[] = {
	{ "kills", test_kills, false },
	{ "seconds", test_seconds, false },
	{ "paused", test_paused, false },
	{ "equal", test_equal, false },
	{ "meddles", test_meddles, false },
	{ "resets", test_resets, false },
	{ "daemons", test_daemons, false },
	{ "chains", test_chains, false },
	{ "early", test_early, false },
	{ "boots", test_boot, true },
	{ "links", test_links, false },
	{ "measure", test_measure, true },
};

/* The -accel of the guest that is there, NULL if there is none */
static const char *booted;

static bool new_guest(void)
{
	leave(&vm);
	remove_ram(vm.ram);
	kill_now(&standby, true);
	booted = accel;
	return boot(&vm);
}

static bool run_test(const struct test *t, unsigned int n)
{
	bool ok = t->own_guests || booted == accel || new_guest();

	ok = ok && t->run(n);
	if (t->own_guests)
		booted = NULL;
	return ok;
}

int main(int argc, char **argv)
{
	bool ok = true;
	size_t k;
	int i;

	if (argc < 7) {
		fprintf(stderr,
			"usage: failover QEMU FIRMWARE KERNEL INITRD KVM-CHECKPOINT TEST...\n");
		return 2;
	}
	qemu = argv[1];
	firmware = argv[2];
	kernel = argv[3];
	initrd = argv[4];
	checkpoint = argv[5];
	started = now_us();
	signal(SIGPIPE, SIG_IGN);
	vm.ctl = -1;
	vm.mon = -1;
	make_files();

	for (i = 6; i < argc && ok; i++) {
		char *value = strchr(argv[i], '=');
		size_t len = value ? value - argv[i] : 0;
		unsigned int n = value ? strtoul(value + 1, NULL, 10) : 0;

		if (!strncmp(argv[i], "accel=", 6)) {
			accel = value + 1;
			continue;
		}
		if (!strncmp(argv[i], "tls=", 4)) {
			tls = n;
			continue;
		}
		for (k = 0; k < ARRAY_SIZE(tests); k++) {
			if (strlen(tests[k].name) == len && !strncmp(tests[k].name, argv[i], len))
				break;
		}
		if (!n || k == ARRAY_SIZE(tests)) {
			fprintf(stderr, "failover: %s: not TEST=NUMBER\n", argv[i]);
			return 2;
		}
		ok = run_test(&tests[k], n);
		printf("%s %s\n", ok ? "PASSED" : "FAILED", argv[i]);
		fflush(stdout);
	}
	leave(&vm);
	kill_now(&standby, true);
	return ok ? 0 : 1;
}
