// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint at both sides, and what it has promised.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "failover.h"

#define MAX_SAMPLES	4096

static const char * const part_names[] = {
	"stop_us", "harvest_us", "state_us", "copy_us", "resume_us", "pause_us",
};

struct log log_ = { .lock = PTHREAD_MUTEX_INITIALIZER };

static struct sample samples[MAX_SAMPLES];
static unsigned int nr_samples;

static void err_file(const struct pair *x, char path[64])
{
	snprintf(path, 64, "/tmp/standby-%u.err", x->gen);
}

pid_t start_standby(struct pair *x)
{
	struct args a = { .n = 0 };
	char err[64];

	a.v[a.n++] = (char *)checkpoint;
	a.v[a.n++] = "standby";
	a.v[a.n++] = "--listen";
	arg(&a, "127.0.0.1:%u", x->port);
	if (tls) {
		a.v[a.n++] = "--psk-file";
		a.v[a.n++] = PSK_FILE;
	} else {
		a.v[a.n++] = "--insecure";
	}
	a.v[a.n++] = "--timeout";
	arg(&a, "%u", x->timeout_ms);
	if (x->safe == FENCE) {
		a.v[a.n++] = "--fence";
		arg(&a, "%s fence /tmp/%u.pid", self, x->protects);
	} else {
		a.v[a.n++] = "--no-fence";
	}
	/* A busy machine may be slow, and that is no fault */
	a.v[a.n++] = "--io-timeout";
	a.v[a.n++] = "300s";
	a.v[a.n++] = "--load-timeout";
	a.v[a.n++] = "600s";
	a.v[a.n++] = "--control";
	arg(&a, "/tmp/standby-%u.ctl", x->gen);
	a.v[a.n++] = "--ram-dir";
	arg(&a, "/dev/shm/standby-%u", x->gen);
	if (guest_has_ledger) {
		char path[64];

		ledger_image(x->gen, path);
		a.v[a.n++] = "--disk";
		arg(&a, "%s", path);
		if (guest_has_overlay)
			make_overlay(x->gen, (uint64_t)LEDGER_MB << 20);
	}
	a.v[a.n++] = "--";
	args_of_qemu(&a, x->gen, "{ram0}");
	a.v[a.n] = NULL;
	err_file(x, err);
	return start(a.v, -1, err);
}

/*
 * The QEMU may be a child that nobody waits for, and then stays as a zombie.  It is not enough to
 * have killed it: a thread of it may still be on its way out of KVM.
 */
int be_fence(const char *pidfile)
{
	char path[64], name[64], state;
	FILE *f = fopen(pidfile, "r");
	int pid, other;

	if (!f || fscanf(f, "%d", &pid) != 1)
		return 1;
	fclose(f);
	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	for (;; usleep(5000)) {
		f = fopen(path, "r");
		if (!f)
			return 0;
		if (fscanf(f, "%d (%63[^)]) %c", &other, name, &state) != 3)
			state = 'X';
		fclose(f);
		if (state == 'Z' || state == 'X' || !strstr(name, "qemu"))
			return 0;
		kill(pid, SIGKILL);
	}
}

unsigned int standby_said(const struct pair *x, const char *what)
{
	char path[64];

	err_file(x, path);
	return count_lines(path, what);
}

bool wait_said(const struct pair *x, const char *what, unsigned int seconds)
{
	uint64_t until = now_us() + seconds * 1000000ull;

	while (!standby_said(x, what)) {
		if (now_us() > until)
			return false;
		usleep(20000);
	}
	return true;
}

bool wait_taken_over(const struct pair *x)
{
	return wait_said(x, "taken over at epoch", FAILOVER_TIMEOUT) ||
	       fail("the standby does not take over");
}

uint64_t epoch_taken(const struct pair *x)
{
	char path[64], line[1024], *p;
	uint64_t epoch = 0;
	FILE *f;

	err_file(x, path);
	f = fopen(path, "r");
	while (f && fgets(line, sizeof(line), f)) {
		p = strstr(line, "taken over at epoch ");
		if (p)
			epoch = strtoull(p + strlen("taken over at epoch "), NULL, 10);
	}
	if (f)
		fclose(f);
	return epoch;
}

static bool tell(const struct pair *x, const char *whom, const char *command)
{
	char socket[64], *argv[] = {
		(char *)checkpoint, "status", socket, (char *)command, NULL
	};
	char path[64];
	int status;
	pid_t pid;

	snprintf(socket, sizeof(socket), "/tmp/%s-%u.ctl", whom, x->gen);
	err_file(x, path);
	pid = start(argv, -1, path);
	return waitpid(pid, &status, 0) == pid && !status;
}

bool tell_standby(const struct pair *x, const char *command)
{
	return tell(x, "standby", command);
}

bool tell_protect(const struct pair *x, const char *command)
{
	return tell(x, "protect", command);
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

void start_protect(struct protect *p, struct vm *vm, struct pair *x, const char *interval,
		   unsigned int epochs)
{
	struct args a = { .n = 0 };
	char err[64];
	int out[2];

	memset(p, 0, sizeof(*p));
	a.v[a.n++] = (char *)(protect_with ? protect_with : checkpoint);
	a.v[a.n++] = "protect";
	a.v[a.n++] = "--qmp";
	a.v[a.n++] = vm->qmp;
	a.v[a.n++] = "--to";
	if (chain)
		arg(&a, "%s", chain);
	else
		arg(&a, "tcp:127.0.0.1:%u", x->relayed ? relay_to(x->port) : x->port);
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
	if (x->safe == LEASE && !chain) {
		a.v[a.n++] = "--lease";
		arg(&a, "%u", x->timeout_ms / 10 * 9);
	}
	a.v[a.n++] = "--io-timeout";
	a.v[a.n++] = "300s";
	a.v[a.n++] = "--qemu-timeout";
	a.v[a.n++] = "300s";
	a.v[a.n++] = "--disk";
	a.v[a.n++] = guest_has_ledger ? "node=virtio2" : "external";
	if (packet_epochs)
		a.v[a.n++] = "--packet-epochs";
	if (net_option) {
		a.v[a.n++] = "--net";
		a.v[a.n++] = (char *)net_option;
	}
	if (x->leaves) {
		a.v[a.n++] = "--control";
		arg(&a, "/tmp/protect-%u.ctl", x->gen);
		a.v[a.n++] = "--leave-ram";
		arg(&a, "/dev/shm/standby-%u", x->gen + 1);
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

int wait_protect(struct protect *p)
{
	int status = 0;

	if (!p->pid)
		return 0;
	waitpid(p->pid, &status, 0);
	p->pid = 0;
	pthread_join(p->reader, NULL);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

void kill_protect(struct protect *p)
{
	if (p->pid)
		kill(p->pid, SIGKILL);
	wait_protect(p);
}

/* It stays to be waited for */
bool protect_ended(const struct protect *p)
{
	siginfo_t info = { .si_pid = 0 };

	return waitid(P_PID, p->pid, &info, WEXITED | WNOHANG | WNOWAIT) || info.si_pid;
}

bool wait_synced(struct protect *p, struct vm *vm, uint64_t times)
{
	uint64_t until = now_us() + SYNC_TIMEOUT * 1000000ull, synced;

	do {
		usleep(20000);
		pthread_mutex_lock(&log_.lock);
		synced = p->synced;
		pthread_mutex_unlock(&log_.lock);
		if (synced >= times)
			return true;
	} while (now_us() < until && !protect_ended(p));
	show_all(vm);
	if (!protect_ended(p))
		return fail("the guest is not protected");
	return fail("the guest is not protected: protect ended with %d", wait_protect(p));
}

void reset_log(void)
{
	pthread_mutex_lock(&log_.lock);
	memset(log_.epochs, 0, sizeof(log_.epochs[0]) * (log_.newest % MAX_EPOCHS + 1));
	log_.acked = 0;
	log_.newest = 0;
	pthread_mutex_unlock(&log_.lock);
	nr_samples = 0;
}

uint64_t last_acked(void)
{
	uint64_t acked;

	pthread_mutex_lock(&log_.lock);
	acked = log_.acked;
	pthread_mutex_unlock(&log_.lock);
	return acked;
}

bool watch_guest(struct vm *vm, unsigned int ms)
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

const struct sample *last_sample(void)
{
	return nr_samples ? &samples[(nr_samples - 1) % MAX_SAMPLES] : NULL;
}

const struct sample *promised(uint64_t epoch)
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

bool check_guest(struct vm *vm, const struct sample *least)
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

void new_pair(struct pair *x)
{
	x->gen = ++last_gen;
	x->port = 10000 * (lane + 1) + x->gen;
	x->protects = vm.gen;
	snprintf(x->theirs, sizeof(x->theirs), "/dev/shm/standby-%u/ram0", x->gen);
	reset_log();
}

bool begin(struct pair *x)
{
	return begin_with(x, interval);
}

bool begin_with(struct pair *x, const char *every)
{
	char dir[64];

	new_pair(x);
	snprintf(dir, sizeof(dir), "/dev/shm/standby-%u", x->gen);
	if (x->disk_mb && !mount_small(dir, x->disk_mb))
		return false;
	x->standby = start_standby(x);
	start_protect(&x->protect, &vm, x, every, 0);
	return wait_synced(&x->protect, &vm, 1);
}

void end(struct pair *x)
{
	if (x->protect.pid)
		kill(x->protect.pid, SIGTERM);
	wait_protect(&x->protect);
	/* Not killed: the QEMU that waits in it would be left */
	if (x->standby > 0) {
		kill(x->standby, SIGTERM);
		waitpid(x->standby, NULL, 0);
		x->standby = 0;
	}
	remove_ram(x->theirs);
}

void moved(struct pair *x, struct vm *next)
{
	char image[64], left[64];

	leave(&vm);
	remove_ram(vm.ram);
	ledger_image(vm.gen, image);
	ledger_image(x->gen + 1, left);
	if (x->leaves && guest_has_ledger && rename(image, left))
		fatal(left);
	unlink(image);
	ledger_overlay(vm.gen, image);
	unlink(image);
	kill_now(&standby, true);
	standby = x->standby;
	x->standby = 0;
	vm = *next;
}
