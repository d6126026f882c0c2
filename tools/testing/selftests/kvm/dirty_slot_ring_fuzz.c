// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings: random programs against a model.
 *
 * A run is a row of rounds.  Each makes a VM with random rings, slots and vCPUs,
 * two more processes that get log fds over SCM_RIGHTS, and alternates between
 *
 * steps	one operation at a time, by any thread or process: calls with
 *		good, tiny, faulting and garbage arguments, guest writes, consumer
 *		stores honest and hostile, mappings, forks, slot and vCPU changes.
 *		The model knows for each page of each log whether it is in it, so
 *		each answer and each errno is known in advance;
 * storms	all at once.  Who is told of a page copies it, and in the end the
 *		copy must be the memory: vCPUs and the host write ever new values.
 *		And marks must be as many as pages taken.
 *
 * Step i of round r of seed s draws from a generator seeded with (s, r, i), so
 * that it repeats whatever the steps before it did.  A storm's actors repeat,
 * their timing does not.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#include "dirty_slot_ring.h"
#include "dirty_slot_ring_check.h"

#define PG			4096ul
#define MAX_VCPUS		4
#define MAX_PAGES		704u
#define NR_SLOTS		3
#define FIRST_SLOT		10
#define NR_LOGS			8
#define NR_WORDS		(MAX_PAGES / 64)

/* Each slot has two places to move between. */
#define WINDOW			0x400000ul
#define SLOT_GPA(s, place)	(0x10000000ul + ((s) * 2 + (place)) * WINDOW)
#define SLOT_GVA(s, place)	(0xc0000000ul + ((s) * 2 + (place)) * WINDOW)

#define DONE_PORT		0x1001
#define HANG_SECONDS		240u

#define KERNEL_ADDRESS		0xffff888000000000ul

/* What a harvest copies out at a time, and the least of it, see the manual. */
#define BATCH			500u
#define BATCH_LEAST		469u

/* -- what all processes share, at the same addresses ---------------------- */

enum { EX_MAIN, EX_THREAD, EX_PEER, EX_PEER2, NR_EX };
enum { RPC_IOCTL, RPC_RECV, RPC_CLOSE, RPC_STORM };

struct rpc {
	sem_t call, answer;
	int what, fd, ret, err;
	unsigned long cmd;
	void *argp;
};

enum actor_kind {
	A_HARVEST, A_READER, A_MARK, A_DISCARD, A_MISC, A_SCRIBBLE, A_BITMAP, NR_ACTOR_KINDS,
};

struct actor {
	enum actor_kind kind;
	uint64_t seed;
	unsigned int n;
	int peer;			/* which one it is in; -1: main */
	int sock;			/* of a peer: new fds come here */
	int fd[NR_SLOTS];
	pthread_t thread;		/* in main */
	unsigned int done;		/* of n */
};

struct storm {
	struct actor actor[8];
	int nr_actors;
	bool exact;			/* the sums can be compared */
	bool liars;			/* consumers may be out of bounds */
	bool faults;			/* arrays may be nowhere */
	bool stop;			/* guests shall end */
	uint64_t taken;			/* harvested, discarded, cleared by the bitmap */
	uint64_t init_set;		/* pages that logs began with */
	uint64_t ops;
};

struct op_note {
	uint64_t op;
	const char *what;
	uint64_t a, b, c, d;
	int ex, ret, err;
};

#define NR_NOTES	24

static struct shared {
	uint64_t stamp;			/* what is written next, never the same twice */
	struct rpc rpc[NR_EX];
	struct storm storm;
	struct op_note notes[NR_NOTES];
	unsigned int nr_notes;
	uint64_t progress;
	pid_t main_pid, peer_pid[2];
	uint32_t npages[NR_SLOTS];
	/* Under page_lock: what was copied when the log named the page. */
	uint64_t copy[NR_SLOTS][MAX_PAGES][2];
	uint8_t page_lock[NR_SLOTS][MAX_PAGES];
	uint8_t pending[NR_SLOTS][MAX_PAGES];	/* read from a ring, not known re-armed */
} *sh;

static uint8_t *memory[NR_SLOTS];	/* of the guest */

/* For arguments: writable pages, then one that is not there; the same read-only. */
#define ARENA_PAGES	12ul
static uint8_t *arena, *arena_ro;

/* -- command line and luck ------------------------------------------------ */

enum { BREAK_NOT, BREAK_LOSE, BREAK_TWICE, BREAK_ERRNO, BREAK_HANG };

static struct {
	uint64_t seed, ops, first_round;
	unsigned int seconds;
	int how;			/* self-test: what kernel to pretend */
	bool storm_only, verbose;
} opt = { .ops = 100000 };

static uint64_t round_nr, step_nr, nr_ops, nr_storm_ops, nr_guest_pages, nr_storms;
static time_t start_time;
static bool in_storm;

static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ul;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ul;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebul;
	return x ^ (x >> 31);
}

static __thread uint64_t luck;

static uint64_t rnd(void)
{
	return luck = mix(luck);
}

/* 0 to @n - 1 */
static uint64_t below(uint64_t n)
{
	return rnd() % n;
}

/* Once in @n times. */
static bool once_in(uint64_t n)
{
	return !below(n);
}

/* -- failing -------------------------------------------------------------- */

static void print_notes(void)
{
	unsigned int i, n = sh->nr_notes;
	struct op_note *t;

	fprintf(stderr, "# the last steps (by whom 0-3; four arguments; result):\n");
	for (i = n < NR_NOTES ? 0 : n - NR_NOTES; i < n; i++) {
		t = &sh->notes[i % NR_NOTES];
		fprintf(stderr, "#   op %lu by %d: %s %#lx %#lx %#lx %#lx = %d%s%s\n", t->op,
			t->ex, t->what ?: "?", t->a, t->b, t->c, t->d, t->ret,
			t->ret < 0 ? " " : "", t->ret < 0 ? strerror(t->err) : "");
	}
	for (i = 0; in_storm && i < sh->storm.nr_actors; i++)
		fprintf(stderr, "#   actor of kind %d in peer %d: %u of %u done\n",
			sh->storm.actor[i].kind, sh->storm.actor[i].peer,
			sh->storm.actor[i].done, sh->storm.actor[i].n);
}

static void print_guests(void);

static void print_replay(void)
{
	print_guests();
	fprintf(stderr, "# seed %lu, round %lu, op %lu (%s)\n", opt.seed, round_nr, step_nr,
		in_storm ? "storm: it may take several tries to see it again" : "step");
	fprintf(stderr, "# again: dirty_slot_ring_fuzz -s %lu -r %lu -n %lu\n", opt.seed, round_nr,
		nr_ops + 200000);
}

/* What a failed CHECK() adds; the main process speaks for all. */
static void report_failure(const char *what)
{
	if (getpid() != sh->main_pid) {
		kill(sh->main_pid, SIGTERM);
		return;
	}
	print_notes();
	print_replay();
	printf("not ok - %s\n", what);
	fflush(stdout);
}

static void on_term(int sig)
{
	print_notes();
	print_replay();
	printf("not ok - another process failed\n");
	fflush(stdout);
	_exit(KSFT_FAIL);
}

static void on_usr1(int sig)
{
}

static struct op_note *note(const char *what, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
	struct op_note *t = &sh->notes[sh->nr_notes++ % NR_NOTES];

	*t = (struct op_note){ .op = step_nr, .what = what, .a = a, .b = b, .c = c, .d = d };
	return t;
}

/* -- the kernel's answers, and those of a kernel that errs ---------------- */

/*
 * The self-test: what a broken kernel would say, now and then, so that it can
 * be seen that the checks below notice.
 */
static int call_broken(int fd, unsigned long cmd, void *argp, int ret)
{
	static struct kvm_dirty_run before;
	static int before_fd;
	struct kvm_dirty_slot_runs *args = argp;
	struct kvm_dirty_run *runs, *last;

	if (opt.storm_only != in_storm)
		return ret;
	if (opt.how == BREAK_ERRNO && ret == -1 && errno == EINVAL)
		return 0;
	if (cmd != KVM_DIRTY_SLOT_LOG_HARVEST || ret || !args->nr_runs || !once_in(8) ||
	    args->runs == (uintptr_t)argp)
		return ret;

	runs = (void *)(uintptr_t)args->runs;
	last = &runs[args->nr_runs - 1];
	if (opt.how == BREAK_LOSE) {
		args->nr_pages--;
		if (!--last->npages)
			args->nr_runs--;
	} else if (opt.how == BREAK_TWICE) {
		if (before.npages && before_fd == fd && runs[0].npages == 1) {
			runs[0] = before;
			args->nr_pages += before.npages - 1;
		}
		before = *last;
		before_fd = fd;
	}
	return ret;
}

static int call(int fd, unsigned long cmd, void *argp)
{
	int ret = ioctl(fd, cmd, argp);

	return unlikely(opt.how) ? call_broken(fd, cmd, argp, ret) : ret;
}

/* -- descriptors between processes ---------------------------------------- */

static void send_fd(int sock, char tag, int fd)
{
	char buf[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { .iov_base = &tag, .iov_len = 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = buf, .msg_controllen = sizeof(buf),
	};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
	int n;

	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(cmsg), &fd, sizeof(int));
	do
		n = sendmsg(sock, &msg, 0);
	while (n < 0 && errno == EINTR);
	CHECK(n == 1, "sendmsg gave %d", n);
}

/* The descriptor, or -1 if there is none and @flags say not to wait. */
static int recv_fd(int sock, char *tag, int flags)
{
	char buf[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { .iov_base = tag, .iov_len = 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = buf, .msg_controllen = sizeof(buf),
	};
	struct cmsghdr *cmsg;
	int fd, n;

	do
		n = recvmsg(sock, &msg, flags | MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0 && errno == EAGAIN)
		return -1;
	CHECK(n == 1, "recvmsg gave %d", n);
	cmsg = CMSG_FIRSTHDR(&msg);
	CHECK(cmsg, "no descriptor came");
	memcpy(&fd, CMSG_DATA(cmsg), sizeof(int));
	return fd;
}

static void sem_down(sem_t *sem)
{
	while (sem_wait(sem))
		CHECK(errno == EINTR, "sem_wait");
}

/* -- the guest ------------------------------------------------------------ */

enum guest_op {
	OP_NONE,
	OP_WRITE,	/* pages @first, @first + @step, ... modulo @npages */
	OP_READ,
	OP_RANDOM,	/* any pages of all slots, until @stop */
};

/* The guest's copy is what both sides use. */
struct mailbox {
	uint64_t op;
	uint64_t gva[NR_SLOTS * 2];
	uint64_t npages;
	uint64_t first;
	uint64_t count;
	uint64_t step;
	uint64_t value;
	uint64_t stop;
	uint64_t done;		/* by the guest: pages */
};

static struct mailbox mailboxes[MAX_VCPUS];

static void guest_random(struct mailbox *mb)
{
	uint64_t i, x = mb->first | 1, *p;

	for (i = 1; !READ_ONCE(mb->stop); i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		p = (uint64_t *)(mb->gva[(x >> 40) % (NR_SLOTS * 2)] +
				 (x >> 8) % mb->npages * PG);
		if (x & 0xf)
			WRITE_ONCE(*p, mb->value + i);
		else
			READ_ONCE(*p);
		WRITE_ONCE(mb->done, i);
	}
}

static void guest_do(struct mailbox *mb)
{
	uint64_t i, page, *p;

	/* For emulators that keep the host's interrupts from a guest without. */
	asm volatile("sti");

	switch (READ_ONCE(mb->op)) {
	case OP_WRITE:
	case OP_READ:
		for (i = 0; i < mb->count; i++) {
			page = (mb->first + i * mb->step) % mb->npages;
			p = (uint64_t *)(mb->gva[0] + page * PG);
			if (mb->op == OP_WRITE)
				WRITE_ONCE(*p, mb->value);
			else
				READ_ONCE(*p);
			WRITE_ONCE(mb->done, i + 1);
		}
		break;
	case OP_RANDOM:
		guest_random(mb);
		/* Only for the self-test. */
		while (READ_ONCE(mb->count))
			;
		break;
	}
}

static void guest_main(uint64_t id)
{
	for (;;) {
		guest_do(&mailboxes[id]);
		asm volatile("outb %%al, %%dx" : : "a"(0), "d"(DONE_PORT) : "memory");
	}
}

/* -- the model ------------------------------------------------------------ */

enum { NO, YES, MAYBE };

/* What the checker last saw of a ring, through mappings of its own. */
struct mring {
	struct kvm_dirty_slot_ring_user *user;
	const struct kvm_dirty_slot_ring_kern *kern;
	const struct kvm_dirty_run *runs;
	size_t size;
	uint64_t producer, reset, overflowed;
	uint64_t consumer;		/* before a call that looks at it */
};

struct mlog {
	bool used, dead, spill;		/* spill: the overflow log may hold something */
	int slot;
	uint32_t npages, nr_rings;
	uint64_t base_gfn, stride;
	int fd[NR_EX];
	uint8_t in[MAX_PAGES];
	struct mring ring[MAX_VCPUS];
};

struct mslot {
	bool exists;
	int place;
	uint32_t npages;
	struct mlog *log;		/* if it logs */
};

static struct {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu[MAX_VCPUS];
	struct mailbox *mb[MAX_VCPUS];
	pthread_t thread[MAX_VCPUS];
	int stats[MAX_VCPUS];		/* opened early: a vCPU that runs answers no calls */
	pthread_t runner[MAX_VCPUS];	/* in KVM_RUN, if... */
	bool runs[MAX_VCPUS];
	uint64_t returns[MAX_VCPUS];	/* from KVM_RUN */
	int nr_vcpus;
	uint32_t entries;
	bool exit_on_full;
	uint64_t manual;
	struct mslot slot[NR_SLOTS];
	struct mlog log[NR_LOGS];
	int sock[2];			/* to the peers */
} m;

static void print_guests(void)
{
	struct mailbox *mb;
	int v;

	for (v = 0; v < m.nr_vcpus; v++) {
		mb = m.mb[v];
		fprintf(stderr, "#   vCPU %d: op %lu, done %lu of %lu, stop %lu, exit %u\n", v,
			mb->op, mb->done, mb->count, mb->stop, m.vcpu[v]->run->exit_reason);
	}
}

/* -- hangs ---------------------------------------------------------------- */

/* Set when all is lost: vCPUs that come back after all say from where. */
static bool hang_found;

static void print_file(const char *dir, const char *name, const char *only)
{
	char path[300], line[300];
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	f = fopen(path, "r");
	if (!f) {
		fprintf(stderr, "#     %s: %s\n", name, strerror(errno));
		return;
	}
	while (fgets(line, sizeof(line), f)) {
		line[strcspn(line, "\n")] = 0;
		if (!only || strstr(line, only))
			fprintf(stderr, "#     %s: %s\n", name, line);
	}
	fclose(f);
}

/* Calls @show for each entry of a directory of /proc that is a number. */
static void each_number(const char *dir, void (*show)(const char *path, int n))
{
	struct dirent *d;
	char path[300];
	DIR *all = opendir(dir);

	while (all && (d = readdir(all))) {
		if (d->d_name[0] < '1' || d->d_name[0] > '9')
			continue;
		snprintf(path, sizeof(path), "%.200s/%.20s", dir, d->d_name);
		show(path, atoi(d->d_name));
	}
	if (all)
		closedir(all);
}

static void print_thread(const char *path, int tid)
{
	fprintf(stderr, "#   thread %d of %s\n", tid, path);
	print_file(path, "comm", NULL);
	print_file(path, "status", "State");
	print_file(path, "status", "ctxt_switches");
	print_file(path, "stat", NULL);		/* 14, 15, 43: user, system, guest */
	print_file(path, "wchan", NULL);
	print_file(path, "stack", NULL);
}

static void print_process(const char *path, int pid)
{
	char task[300];

	if (getpgid(pid) != getpgrp())
		return;
	snprintf(task, sizeof(task), "%.280s/task", path);
	each_number(task, print_thread);
}

/* Counters that are not 0, and by how much they grew. */
static void print_stats(unsigned int seconds)
{
	uint64_t before[MAX_VCPUS + 1][256] = { 0 }, now;
	struct kvm_stats_header header;
	struct kvm_stats_desc *all, *desc;
	int fds[MAX_VCPUS + 1], n = m.nr_vcpus + 1, i, k, pass;

	fds[0] = vm_get_stats_fd(m.vm);
	memcpy(fds + 1, m.stats, sizeof(m.stats));
	for (pass = 0; pass < 2; pass++) {
		for (k = 0; k < n; k++) {
			read_stats_header(fds[k], &header);
			all = read_stats_descriptors(fds[k], &header);
			if (pass)
				fprintf(stderr, "#   counters of %s %d, +growth in %u s:",
					k ? "vCPU" : "VM", k ? k - 1 : 0, seconds);
			for (i = 0; i < header.num_desc && i < 256; i++) {
				desc = get_stats_descriptor(all, i, &header);
				if (desc->size != 1)
					continue;
				read_stat_data(fds[k], &header, desc, &now, 1);
				if (!pass)
					before[k][i] = now;
				else if (now)
					fprintf(stderr, " %s %lu+%ld", desc->name, now,
						(long)(now - before[k][i]));
			}
			if (pass)
				fprintf(stderr, "\n");
			free(all);
		}
		if (!pass)
			sleep(seconds);
	}
	close(fds[0]);
}

#define TRACE		"/sys/kernel/tracing/instances/dirty_slot_ring_fuzz"
#define TRACE_LINES	80

static bool set_trace(const char *name, const char *value)
{
	char path[200];
	FILE *f;

	snprintf(path, sizeof(path), "%s/%s", TRACE, name);
	f = fopen(path, "w");
	return f && fputs(value, f) >= 0 && !fclose(f);
}

/* What KVM does.  In a buffer of its own, so that nobody else's is disturbed. */
static void print_trace(void)
{
	static char lines[TRACE_LINES][200];
	unsigned int n = 0, i;
	FILE *f;

	fprintf(stderr, "# what KVM does:\n");
	/* If it is there, another one that hangs uses it. */
	if (mkdir(TRACE, 0700)) {
		fprintf(stderr, "#   cannot trace it: %s\n", strerror(errno));
		return;
	}
	if (!set_trace("events/kvm/enable", "1"))
		fprintf(stderr, "#   cannot trace it: %s\n", strerror(errno));
	sleep(1);
	set_trace("tracing_on", "0");
	f = fopen(TRACE "/trace", "r");
	while (f && fgets(lines[n % TRACE_LINES], sizeof(lines[0]), f))
		n++;
	for (i = n < TRACE_LINES ? 0 : n - TRACE_LINES; i < n; i++)
		fprintf(stderr, "#   %.150s\n", strtok(lines[i % TRACE_LINES], "\n") ?: "");
	if (f)
		fclose(f);
	rmdir(TRACE);
}

/* May a signal help?  Then a kick was lost. */
static void poke_vcpus(void)
{
	uint64_t returns[MAX_VCPUS], done[MAX_VCPUS];
	bool runs[MAX_VCPUS];
	int v;

	for (v = 0; v < m.nr_vcpus; v++) {
		runs[v] = READ_ONCE(m.runs[v]);
		returns[v] = READ_ONCE(m.returns[v]);
		done[v] = READ_ONCE(m.mb[v]->done);
		if (runs[v])
			pthread_kill(m.runner[v], SIGUSR1);
	}
	sleep(5);
	for (v = 0; v < m.nr_vcpus; v++) {
		if (!runs[v])
			fprintf(stderr, "#   vCPU %d was not in KVM_RUN\n", v);
		else
			fprintf(stderr,
				"#   vCPU %d, 5 s after a signal: KVM_RUN returned %lu times, is %s, the guest did %lu more\n",
				v, READ_ONCE(m.returns[v]) - returns[v],
				READ_ONCE(m.runs[v]) ? "under way" : "not under way",
				READ_ONCE(m.mb[v]->done) - done[v]);
	}
}

/*
 * What tells apart a guest that faults for ever (its exits grow, its work does
 * not), one that the emulator does not get on with (neither grows, and it has
 * the CPU), a thread that nobody wakes (its stack) and a lost kick (a signal
 * helps).
 */
static void __noreturn report_hang(unsigned int seconds)
{
	fprintf(stderr, "# nothing has happened for %u s\n", seconds);
	print_notes();
	fprintf(stderr, "# all threads:\n");
	each_number("/proc", print_process);
	/* What follows may get stuck itself. */
	print_replay();
	if (m.nr_vcpus)
		print_stats(5);
	print_trace();
	fprintf(stderr, "# all threads, later:\n");
	each_number("/proc", print_process);
	WRITE_ONCE(hang_found, true);
	poke_vcpus();
	printf("not ok - nothing happens any more\n");
	fflush(stdout);
	_exit(KSFT_FAIL);
}

/* A thread, as it shall not matter what the others are stuck in. */
static void *watch(void *unused)
{
	unsigned int limit = opt.how == BREAK_HANG ? 20 : HANG_SECONDS, idle = 0;
	uint64_t seen = 0, now;

	for (;;) {
		sleep(2);
		now = __atomic_load_n(&sh->progress, __ATOMIC_RELAXED);
		idle = now == seen ? idle + 2 : 0;
		seen = now;
		if (idle >= limit)
			report_hang(idle);
	}
	return NULL;
}

/* -- rings as the checker sees them --------------------------------------- */

static uint64_t ring_consumer(const struct mring *r)
{
	return __atomic_load_n(&r->user->consumer, __ATOMIC_RELAXED);
}

static uint64_t ring_producer(const struct mring *r)
{
	return __atomic_load_n(&r->kern->producer, __ATOMIC_ACQUIRE);
}

static uint64_t ring_reset(const struct mring *r)
{
	return __atomic_load_n(&r->kern->reset, __ATOMIC_ACQUIRE);
}

static uint64_t ring_overflowed(const struct mring *r)
{
	return __atomic_load_n(&r->kern->overflowed, __ATOMIC_RELAXED);
}

static struct kvm_dirty_run ring_entry(const struct mring *r, uint64_t i)
{
	return r->runs[i & (m.entries - 1)];
}

static void ring_look(struct mring *r)
{
	r->producer = ring_producer(r);
	r->reset = ring_reset(r);
	r->overflowed = ring_overflowed(r);
}

static void ring_map(struct mring *r, int fd, uint64_t stride, uint32_t n)
{
	size_t size = stride - PG;
	void *p;

	p = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_SHARED, fd, n * stride);
	CHECK(p != MAP_FAILED, "mapping a consumer page");
	r->user = p;
	p = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, n * stride + PG);
	CHECK(p != MAP_FAILED, "mapping a ring");
	r->kern = p;
	r->runs = p + PG;
	r->size = size;
	ring_look(r);
}

static void ring_unmap(struct mring *r)
{
	munmap(r->user, PG);
	munmap((void *)r->kern, r->size);
}

/* To be asked before each call that looks at consumers. */
static bool log_bad_consumer(struct mlog *l)
{
	struct mring *r;
	bool bad = false;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		r->consumer = ring_consumer(r);
		bad |= r->consumer - r->reset > r->producer - r->reset;
	}
	return bad;
}

/* Nothing happened since the checker last looked, but to consumer. */
static void log_unchanged(const struct mlog *l)
{
	const struct mring *r;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		CHECK(ring_producer(r) == r->producer && ring_reset(r) == r->reset &&
		      ring_overflowed(r) == r->overflowed,
		      "slot %d ring %ld: producer %lu reset %lu overflowed %lu, were %lu %lu %lu",
		      l->slot, r - l->ring, ring_producer(r), ring_reset(r), ring_overflowed(r),
		      r->producer, r->reset, r->overflowed);
	}
}

static void all_unchanged(void)
{
	struct mlog *l;

	for (l = m.log; l < m.log + NR_LOGS; l++) {
		if (l->used)
			log_unchanged(l);
	}
}

/* After a call that may have moved reset and consumer. */
static void log_moved(struct mlog *l, bool all)
{
	struct mring *r;
	uint64_t reset, consumer;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		reset = ring_reset(r);
		consumer = ring_consumer(r);
		CHECK(ring_producer(r) == r->producer && ring_overflowed(r) == r->overflowed,
		      "producer %lu, was %lu", ring_producer(r), r->producer);
		CHECK(reset >= r->reset && reset <= consumer && consumer <= r->producer,
		      "was reset %lu, now reset %lu consumer %lu producer %lu", r->reset, reset,
		      consumer, r->producer);
		CHECK(!all || reset == r->producer, "reset %lu producer %lu", reset, r->producer);
		r->reset = reset;
	}
}

struct bounds {
	unsigned int yes, maybe;
};

static struct bounds log_count(const struct mlog *l)
{
	struct bounds b = { 0 };
	unsigned int i;

	for (i = 0; i < l->npages; i++) {
		b.yes += l->in[i] == YES;
		b.maybe += l->in[i] == MAYBE;
	}
	return b;
}

/* What the mapping's reader collected leaves the log. */
static struct bounds log_collect(struct mlog *l)
{
	struct bounds b = { 0 };
	struct kvm_dirty_run run;
	struct mring *r;
	uint64_t i;
	uint32_t p;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		for (i = r->reset; i != r->consumer; i++) {
			run = ring_entry(r, i);
			for (p = run.offset; p < run.offset + run.npages; p++) {
				b.yes += l->in[p] == YES;
				b.maybe += l->in[p] == MAYBE;
				l->in[p] = NO;
			}
		}
	}
	return b;
}

/* Is a page in the log that no entry between reset and producer names? */
static bool log_must_overflow(const struct mlog *l)
{
	uint8_t indexed[MAX_PAGES] = { 0 };
	struct kvm_dirty_run run;
	const struct mring *r;
	uint64_t i;
	uint32_t p;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		for (i = r->reset; i != r->producer; i++) {
			run = ring_entry(r, i);
			memset(indexed + run.offset, 1, run.npages);
		}
	}
	for (p = 0; p < l->npages; p++) {
		if (l->in[p] == YES && !indexed[p])
			return true;
	}
	return false;
}

static void log_heal(struct mlog *l)
{
	struct mring *r;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		if (ring_consumer(r) - r->reset > r->producer - r->reset)
			__atomic_store_n(&r->user->consumer, r->reset, __ATOMIC_RELEASE);
	}
}

/* -- calls by whom -------------------------------------------------------- */

static int ask(int ex, int what, int fd, unsigned long cmd, void *argp)
{
	struct rpc *rpc = &sh->rpc[ex];

	rpc->what = what;
	rpc->fd = fd;
	rpc->cmd = cmd;
	rpc->argp = argp;
	sem_post(&rpc->call);
	sem_down(&rpc->answer);
	errno = rpc->err;
	return rpc->ret;
}

/* The log's descriptor there; peers get theirs when they first need it. */
static int log_fd(struct mlog *l, int ex)
{
	if (ex == EX_THREAD)
		ex = EX_MAIN;
	if (l->fd[ex] < 0) {
		send_fd(m.sock[ex - EX_PEER], 0, l->fd[EX_MAIN]);
		l->fd[ex] = ask(ex, RPC_RECV, 0, 0, NULL);
		CHECK(l->fd[ex] >= 0, "no descriptor");
	}
	return l->fd[ex];
}

/* Most calls are made right here, as that is fastest. */
static int some_ex(void)
{
	return once_in(12) ? 1 + below(NR_EX - 1) : EX_MAIN;
}

static int log_call(struct mlog *l, int ex, unsigned long cmd, void *argp)
{
	int fd = log_fd(l, ex), ret;

	nr_ops++;
	errno = 0;
	if (ex == EX_MAIN)
		ret = ioctl(fd, cmd, argp);
	else
		ret = ask(ex, RPC_IOCTL, fd, cmd, argp);
	return unlikely(opt.how) ? call_broken(fd, cmd, argp, ret) : ret;
}

static void log_close(struct mlog *l, int ex)
{
	if (l->fd[ex] < 0)
		return;
	if (ex == EX_MAIN && once_in(2))
		ask(EX_THREAD, RPC_CLOSE, l->fd[ex], 0, NULL);
	else if (ex == EX_MAIN)
		CHECK_OK(close(l->fd[ex]));
	else
		ask(ex, RPC_CLOSE, l->fd[ex], 0, NULL);
	l->fd[ex] = -1;
}

static void log_forget(struct mlog *l)
{
	uint32_t i;
	int ex;

	for (i = 0; i < l->nr_rings; i++)
		ring_unmap(&l->ring[i]);
	for (ex = 0; ex < NR_EX; ex++)
		log_close(l, ex);
	l->used = false;
}

static void log_add_rings(struct mlog *l, int nr)
{
	for (; l->nr_rings < nr; l->nr_rings++)
		ring_map(&l->ring[l->nr_rings], l->fd[EX_MAIN], l->stride, l->nr_rings);
}

static int open_log(int s)
{
	int fd = dsr_open(m.vm, FIRST_SLOT + s);

	CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC, "not O_CLOEXEC");
	return fd;
}

/* -- where arguments are -------------------------------------------------- */

enum { AT_GOOD, AT_NULL, AT_READONLY, AT_END, AT_NONE, AT_KERNEL };

/* The header is in the first page; others are odd places for it. */
static void *header_at(int where, size_t size)
{
	switch (where) {
	case AT_NULL:
		return NULL;
	case AT_READONLY:
		return arena_ro;
	case AT_END:	/* all but its last bytes */
		return arena + ARENA_PAGES * PG - size + 1 + below(size - 1);
	case AT_NONE:
		return arena + ARENA_PAGES * PG;
	case AT_KERNEL:
		return (void *)KERNEL_ADDRESS;
	default:
		return arena;
	}
}

static int some_header_place(void)
{
	return once_in(40) ? below(AT_KERNEL + 1) : AT_GOOD;
}

struct array {
	struct kvm_dirty_run *runs;	/* as the call gets it */
	uint32_t room;			/* runs that can be accessed there */
	bool good;			/* all that can be asked for */
};

#define ARENA_RUNS	((ARENA_PAGES - 1) * PG / sizeof(struct kvm_dirty_run))

/* An array of up to @want accessible runs. */
static struct array some_array(uint32_t want)
{
	struct array a = { (void *)(arena + PG), ARENA_RUNS, true };

	if (!once_in(8))
		return a;
	a.good = false;
	switch (below(6)) {
	case 0:
		a.runs = NULL;
		a.room = 0;
		break;
	case 1:
		a.runs = (void *)KERNEL_ADDRESS;
		a.room = 0;
		break;
	case 2:
		a.runs = (void *)(arena + PG + 1 + below(7));
		a.room--;
		break;
	default:
		a.room = below(want + 1);
		a.runs = (void *)(arena + ARENA_PAGES * PG) - a.room * sizeof(*a.runs) -
			 below(sizeof(*a.runs));
	}
	return a;
}

/* Garbage in a header, now and then; true if it makes the call fail. */
static bool spoil_reserved(__u64 *reserved)
{
	if (!once_in(50))
		return false;
	reserved[below(2)] = once_in(2) ? rnd() | 1 : 1ul << below(64);
	return true;
}

/* -- steps: the calls ----------------------------------------------------- */

/* How many runs HARVEST can make of what is in the log. */
static void runs_bounds(const struct mlog *l, uint32_t *lo, uint32_t *hi)
{
	bool maybe = false;
	uint32_t i;

	*lo = *hi = 0;
	for (i = 0; i < l->npages; i++) {
		if (l->in[i] == MAYBE)
			maybe = true;
		if (l->in[i] == NO)
			continue;
		if (!i || !l->in[i - 1])
			++*lo;
		if (!i || !l->in[i - 1] || !(i % 64))
			++*hi;
	}
	if (maybe) {
		struct bounds b = log_count(l);

		*lo = !!b.yes;
		*hi = b.yes + b.maybe;
	}
}

static void check_answer(struct mlog *l, const struct kvm_dirty_run *runs, uint32_t nr,
			 uint64_t nr_pages)
{
	struct kvm_dirty_run run;
	uint64_t sum = 0;
	uint32_t i, p;

	for (i = 0; i < nr; i++) {
		memcpy(&run, &runs[i], sizeof(run));	/* it may stand anywhere */
		CHECK(run.npages && (uint64_t)run.offset + run.npages <= l->npages,
		      "run %u is %u + %u of %u pages", i, run.offset, run.npages, l->npages);
		for (p = run.offset; p < run.offset + run.npages; p++) {
			CHECK(l->in[p] != NO,
			      "slot %d: page %u was reported (run %u of %u: %u + %u) and is not in the log, or twice",
			      l->slot, p, i, nr, run.offset, run.npages);
			l->in[p] = NO;
		}
		sum += run.npages;
	}
	CHECK(sum == nr_pages, "nr_pages is %lu, in the runs are %lu", nr_pages, sum);
}

static void check_nothing_left(const struct mlog *l)
{
	uint32_t p;

	for (p = 0; p < l->npages; p++)
		CHECK(l->in[p] != YES, "slot %d: page %u was lost", l->slot, p);
}

struct harvest {
	struct array array;
	uint32_t capacity, flags;
	int where;
	bool einval, overlap;
	__u64 reserved[2];
};

/* A call that failed can be made again as it was; an array may be over it. */
static void harvest_unchanged(const struct harvest *h, const struct kvm_dirty_slot_runs *args)
{
	CHECK(h->overlap || (args->nr_runs == h->capacity && args->flags == h->flags),
	      "an error changed the arguments: nr_runs %u, flags %#x", args->nr_runs, args->flags);
}

static void harvest(struct mlog *l, int ex, const struct harvest *h)
{
	struct kvm_dirty_slot_runs *good = (void *)arena, *args, out;
	struct bounds collected, b;
	struct op_note *t;
	uint32_t lo, hi;
	bool bad;
	int ret;

	args = header_at(h->where, sizeof(*args));
	*good = (struct kvm_dirty_slot_runs){
		.runs = (uintptr_t)(h->overlap ? (void *)args : h->array.runs),
		.nr_runs = h->capacity,
		.flags = h->flags,
		.nr_pages = rnd(),
		.reserved = { h->reserved[0], h->reserved[1] },
	};
	bad = log_bad_consumer(l);
	t = note("HARVEST log, capacity, flags, room", l - m.log, h->capacity, h->flags,
		 h->array.room);
	t->ex = ex;
	ret = log_call(l, ex, KVM_DIRTY_SLOT_LOG_HARVEST, args);
	t->ret = ret;
	t->err = errno;
	out = *good;

	if (h->where != AT_GOOD && h->where != AT_READONLY) {
		CHECK(ret == -1 && errno == EFAULT, "a header that is not there gave %d", ret);
		log_unchanged(l);
		return;
	}
	if (h->einval) {
		CHECK(ret == -1 && errno == EINVAL, "a bad field gave %d", ret);
		log_unchanged(l);
		return;
	}
	if (h->where == AT_READONLY) {
		CHECK(ret == -1 && errno == EFAULT, "a read-only header gave %d", ret);
		log_unchanged(l);
		return;
	}
	if (bad) {
		CHECK(ret == -1 && errno == EINVAL, "a bad consumer gave %d", ret);
		harvest_unchanged(h, &out);
		log_unchanged(l);
		return;
	}

	collected = log_collect(l);
	b = log_count(l);
	runs_bounds(l, &lo, &hi);
	if (ret && errno == ENODEV) {
		CHECK(l->dead && !b.yes && !collected.yes,
		      "%u pages left, %u collected, dead %d", b.yes, collected.yes, l->dead);
		check_nothing_left(l);
		memset(l->in, NO, sizeof(l->in));
		l->spill = false;
		log_moved(l, true);
		return;
	}
	if (ret) {
		CHECK(errno == EFAULT && !h->overlap && h->array.room < min(hi, h->capacity),
		      "HARVEST of %u pages in %u to %u runs gave %d", b.yes, lo, hi, ret);
		harvest_unchanged(h, &out);
		l->spill = true;
		log_moved(l, false);
		return;
	}
	CHECK(!l->dead || b.yes || b.maybe || collected.yes || collected.maybe,
	      "the log is dead and empty, but HARVEST worked");
	if (h->overlap) {
		/* It was told, but cannot be read. */
		for (lo = 0; lo < l->npages; lo++)
			l->in[lo] = l->in[lo] ? MAYBE : NO;
		l->spill = true;
		log_moved(l, false);
		return;
	}
	CHECK(h->array.room >= min(min(lo, h->capacity), BATCH_LEAST),
	      "at least %u runs, room for %u, and no EFAULT", lo, h->array.room);
	CHECK(out.nr_runs <= h->capacity && out.nr_runs <= h->array.room,
	      "%u runs, capacity %u, room %u", out.nr_runs, h->capacity, h->array.room);
	CHECK(!(out.flags & ~KVM_DIRTY_HARVEST_MORE) && !out.reserved[0] && !out.reserved[1],
	      "flags out %#x", out.flags);
	check_answer(l, h->array.runs, out.nr_runs, out.nr_pages);
	b = log_count(l);
	if (out.flags & KVM_DIRTY_HARVEST_MORE) {
		CHECK(b.yes + b.maybe, "MORE, but there is no more");
		CHECK(out.nr_runs == h->capacity || h->array.room < hi,
		      "MORE, with %u runs for a capacity of %u", out.nr_runs, h->capacity);
		l->spill = true;
		log_moved(l, false);
		return;
	}
	check_nothing_left(l);
	memset(l->in, NO, sizeof(l->in));
	l->spill = false;
	log_moved(l, true);
}

static void harvest_all(struct mlog *l)
{
	struct harvest h = {
		.array = { (void *)(arena + PG), ARENA_RUNS, true }, .capacity = ARENA_RUNS,
	};

	log_heal(l);
	harvest(l, EX_MAIN, &h);
}

static void step_harvest(struct mlog *l)
{
	static const uint32_t capacities[] = { 1, 1, 2, 3, 8, 64, 256, 499, 500, 501, 1000, 4000 };
	struct harvest h = {
		.capacity = capacities[below(ARRAY_SIZE(capacities))],
		.where = some_header_place(),
	};

	if (once_in(50))
		h.capacity = -1u - below(2);
	h.array = some_array(once_in(2) ? 8 : 600);
	/* Room is what can be had, whatever the capacity is. */
	h.flags = below(4);
	if (once_in(50)) {
		h.flags |= 4u << below(30);
		h.einval = true;
	}
	if (once_in(50)) {
		h.capacity = 0;
		h.einval = true;
	}
	if (spoil_reserved(h.reserved))
		h.einval = true;
	h.overlap = h.where == AT_GOOD && once_in(100);
	harvest(l, some_ex(), &h);
}

static void step_reset(struct mlog *l)
{
	struct kvm_dirty_slot_reset *good = (void *)arena, *args, out;
	int ret, ex = some_ex(), where = some_header_place();
	bool bad, einval = false, empty = true, spill = l->spill;
	struct bounds b;
	struct op_note *t;
	struct mring *r;

	args = header_at(where, sizeof(*args));
	*good = (struct kvm_dirty_slot_reset){
		.nr_pages = rnd(), .flags = once_in(4) ? KVM_DIRTY_RESET_OVERFLOW : 0,
	};
	if (once_in(30)) {
		good->flags |= 2u << below(31);
		einval = true;
	}
	if (once_in(50)) {
		good->pad = 1u << below(32);
		einval = true;
	}
	if (spoil_reserved(good->reserved))
		einval = true;
	bad = log_bad_consumer(l);
	for (r = l->ring; r < l->ring + l->nr_rings; r++)
		empty &= r->reset == r->producer;
	t = note("RESET log", l - m.log, where, good->flags, 0);
	t->ex = ex;
	ret = log_call(l, ex, KVM_DIRTY_SLOT_LOG_RESET, args);
	t->ret = ret;
	t->err = errno;
	out = *good;

	if (where != AT_GOOD || einval || bad) {
		if (where != AT_GOOD && where != AT_READONLY)
			einval = false;
		else if (!einval && where == AT_GOOD)
			einval = true;
		CHECK(ret == -1 && errno == (einval ? EINVAL : EFAULT), "bad RESET gave %d", ret);
		log_unchanged(l);
		return;
	}

	b = log_collect(l);
	if (ret) {
		CHECK(errno == ENODEV && l->dead && empty, "RESET gave %d", ret);
		check_nothing_left(l);
		memset(l->in, NO, sizeof(l->in));
		return;
	}
	CHECK(!l->dead || !empty || spill, "the log is dead and empty, but RESET worked");
	CHECK(out.nr_pages >= b.yes && out.nr_pages <= b.yes + b.maybe,
	      "RESET of %llu pages, should be %u to %u", out.nr_pages, b.yes, b.yes + b.maybe);
	CHECK(!(out.flags & ~KVM_DIRTY_RESET_OVERFLOW), "flags out %#x", out.flags);
	log_moved(l, false);
	for (r = l->ring; r < l->ring + l->nr_rings; r++)
		CHECK(r->reset == ring_consumer(r), "reset %lu consumer %lu", r->reset,
		      ring_consumer(r));
	CHECK(l->spill || !out.flags, "OVERFLOW, but nothing overflowed");
	CHECK(out.flags || !l->spill || !log_must_overflow(l), "no OVERFLOW, but there is");
}

/* MARK and DISCARD. */
static void step_runs(struct mlog *l, bool mark)
{
	struct kvm_dirty_slot_runs *good = (void *)arena, *args;
	static const uint32_t counts[] = { 0, 1, 1, 1, 2, 3, 16, 31, 32, 33, 100 };
	uint32_t nr = counts[below(ARRAY_SIZE(counts))], i, p, npages;
	int where = some_header_place(), ret, ex = some_ex(), want = 0;
	bool einval = false, efault, bad_run = false;
	struct array a = some_array(nr);
	struct kvm_dirty_run run;
	struct bounds b = { 0 };
	struct op_note *t;
	uint8_t before;

	args = header_at(where, sizeof(*args));
	efault = a.room < nr;
	for (i = 0; i < min(nr, a.room); i++) {
		npages = once_in(8) ? 1 + below(l->npages) : 1 + below(min(l->npages, 4u));
		run.offset = below(l->npages - npages + 1);
		run.npages = npages;
		if (once_in(200)) {
			bad_run = true;
			switch (below(4)) {
			case 0:
				run.npages = 0;
				break;
			case 1:
				run.offset = l->npages - run.npages + 1 + below(3);
				break;
			case 2:
				run.npages = -1u - below(l->npages);
				break;
			case 3:
				run.offset = -run.npages;
				break;
			}
		}
		memcpy(&a.runs[i], &run, sizeof(run));
	}
	*good = (struct kvm_dirty_slot_runs){
		.runs = (uintptr_t)a.runs, .nr_runs = nr, .nr_pages = rnd(),
	};
	if (once_in(50)) {
		good->flags = 1u << below(32);
		einval = true;
	}
	if (spoil_reserved(good->reserved))
		einval = true;

	t = note(mark ? "MARK log, runs, room" : "DISCARD log, runs, room", l - m.log, nr, a.room,
		 nr && a.room ? (uint64_t)run.offset << 32 | run.npages : 0);
	t->ex = ex;
	ret = log_call(l, ex, mark ? KVM_DIRTY_SLOT_LOG_MARK : KVM_DIRTY_SLOT_LOG_DISCARD, args);
	t->ret = ret;
	t->err = errno;

	if (where != AT_GOOD && where != AT_READONLY)
		want = EFAULT;
	else if (einval)
		want = EINVAL;
	else if (where == AT_READONLY)
		want = EFAULT;
	else if (l->dead)
		want = ENODEV;
	if (want) {
		CHECK(ret == -1 && errno == want, "gave %d, not errno %d", ret, want);
		return;
	}
	if (bad_run || efault) {
		CHECK(ret == -1 && ((bad_run && errno == EINVAL) || (efault && errno == EFAULT)),
		      "bad run %d, bad array %d, gave %d", bad_run, efault, ret);
		CHECK(!good->nr_pages, "failed, but says %llu pages", good->nr_pages);
		return;
	}
	for (i = 0; i < nr; i++) {
		memcpy(&run, &a.runs[i], sizeof(run));
		for (p = run.offset; p < run.offset + run.npages; p++) {
			before = l->in[p];
			l->in[p] = mark ? YES : NO;
			b.yes += before == (mark ? NO : YES);
			b.maybe += before == MAYBE;
		}
	}
	CHECK(!ret && good->nr_pages >= b.yes && good->nr_pages <= b.yes + b.maybe,
	      "gave %d and %llu pages, should be %u to %u", ret, good->nr_pages, b.yes,
	      b.yes + b.maybe);
	if (mark && good->nr_pages)
		l->spill = true;
}

static void step_info(struct mlog *l)
{
	struct kvm_dirty_slot_log_info *info = (void *)arena, *args;
	int ex = some_ex(), where = some_header_place(), ret;
	struct op_note *t = note("INFO log", l - m.log, where, 0, 0);

	args = header_at(where, sizeof(*args));
	memset(info, 0xa5, sizeof(*info));
	t->ex = ex;
	ret = log_call(l, ex, KVM_DIRTY_SLOT_LOG_INFO, args);
	t->ret = ret;
	t->err = errno;
	if (where != AT_GOOD) {
		CHECK(ret == -1 && errno == EFAULT, "gave %d", ret);
		return;
	}
	CHECK(!ret && info->slot == FIRST_SLOT + l->slot && info->nr_rings == l->nr_rings &&
	      info->entries == m.entries && info->stride == l->stride &&
	      info->npages == l->npages && info->base_gfn == l->base_gfn &&
	      info->flags == (l->dead ? KVM_DIRTY_SLOT_LOG_DEAD : 0) &&
	      !info->reserved[0] && !info->reserved[3],
	      "gave %d: slot %u rings %u entries %u stride %llu npages %llu gfn %#llx flags %#x",
	      ret, info->slot, info->nr_rings, info->entries, info->stride, info->npages,
	      info->base_gfn, info->flags);
}

/* Calls that do not exist, with whatever argument. */
static void step_garbage(struct mlog *l)
{
	unsigned long cmd = once_in(2) ? rnd() :
			    KVM_DIRTY_SLOT_LOG_HARVEST ^ (1ul << below(32));
	int ex = some_ex(), ret;
	struct op_note *t;

	cmd &= 0xffffffff;
	switch (cmd) {
	case KVM_DIRTY_SLOT_LOG_INFO:
	case KVM_DIRTY_SLOT_LOG_HARVEST:
	case KVM_DIRTY_SLOT_LOG_RESET:
	case KVM_DIRTY_SLOT_LOG_MARK:
	case KVM_DIRTY_SLOT_LOG_DISCARD:
		return;
	}
	/* Those that the VFS has an answer to are not ours: FIOCLEX and so on. */
	if ((cmd >> 8 & 0xff) == 0x54 || (cmd >> 8 & 0xff) == 0x58 || cmd < 3)
		return;
	t = note("ioctl log, cmd", l - m.log, cmd, 0, 0);
	t->ex = ex;
	ret = log_call(l, ex, cmd, (void *)(once_in(2) ? rnd() : (uintptr_t)arena));
	t->ret = ret;
	t->err = errno;
	CHECK(ret == -1 && errno == ENOTTY, "ioctl %#lx gave %d", cmd, ret);
	log_unchanged(l);
}

static void step_poll(struct mlog *l)
{
	uint64_t level = l->dead ? 1 : DIV_ROUND_UP(m.entries, 2);
	struct pollfd pfd = { .fd = l->fd[EX_MAIN], .events = POLLIN };
	bool ring = false;
	struct mring *r;
	int ret;

	nr_ops++;
	for (r = l->ring; r < l->ring + l->nr_rings; r++)
		ring |= r->producer - r->reset >= level;
	ret = poll(&pfd, 1, 0);
	note("poll log, revents", l - m.log, pfd.revents, 0, 0)->ret = ret;
	CHECK(ret >= 0 && !!(pfd.revents & POLLHUP) == l->dead, "poll gave %d, %#x", ret,
	      pfd.revents);
	if (pfd.revents & POLLIN)
		CHECK(ring || l->spill, "readable, with nothing to read");
	else
		CHECK(!ring && (!l->spill || !log_must_overflow(l)), "not readable");
}

static void step_consumer(struct mlog *l)
{
	uint64_t consumer, value;
	struct mring *r;

	nr_ops++;
	if (!l->nr_rings)
		return;
	r = &l->ring[below(l->nr_rings)];
	consumer = ring_consumer(r);
	if (consumer - r->reset > r->producer - r->reset || once_in(4))
		value = r->reset + below(r->producer - r->reset + 1);
	else
		value = consumer + below(r->producer - consumer + 1);
	if (once_in(20)) {
		switch (below(5)) {
		case 0:
			value = r->reset - 1 - below(3);
			break;
		case 1:
			value = r->producer + 1 + below(3);
			break;
		case 2:
			value = r->producer + m.entries;
			break;
		case 3:
			value = 0;
			break;
		default:
			value = rnd();
		}
	}
	note("consumer log, ring, value, was", l - m.log, r - l->ring, value, consumer);
	__atomic_store_n(&r->user->consumer, value, __ATOMIC_RELEASE);
}

/* -- steps: mappings and processes ---------------------------------------- */

static sigjmp_buf probe_env;

static void probe_handler(int sig)
{
	siglongjmp(probe_env, sig);
}

/* The signal that reading *@p brings, or 0. */
static int probe(void *p)
{
	struct sigaction sa = { .sa_handler = probe_handler }, old[2];
	int sig;

	sigaction(SIGBUS, &sa, &old[0]);
	sigaction(SIGSEGV, &sa, &old[1]);
	sig = sigsetjmp(probe_env, 1);
	if (!sig)
		READ_ONCE(*(uint64_t *)p);
	sigaction(SIGBUS, &old[0], NULL);
	sigaction(SIGSEGV, &old[1], NULL);
	return sig;
}

static void step_map(struct mlog *l)
{
	uint64_t pages = l->stride / PG, first, n = 1 + below(4), i;
	bool shared = !once_in(6), consumer_page;
	int prot = once_in(3) ? below(8) : PROT_READ | (once_in(3) ? PROT_WRITE : 0), want = 0, ret;
	struct op_note *t;
	void *p, *q;

	nr_ops++;
	if (once_in(3))
		n = 1;
	first = below(l->nr_rings + 1) * pages + (once_in(2) ? below(3) : below(pages));
	if (once_in(30))
		first = below(1ul << 40);
	consumer_page = first % pages == KVM_DIRTY_SLOT_RING_USER_PAGE && n == 1;

	if (!shared)
		want = EINVAL;
	else if (prot & PROT_EXEC)
		want = EPERM;
	else if (prot & PROT_WRITE && !consumer_page)
		want = EPERM;
	p = mmap(NULL, n * PG, prot, shared ? MAP_SHARED : MAP_PRIVATE, l->fd[EX_MAIN],
		 first * PG);
	t = note("mmap log, page, pages, prot | private << 4", l - m.log, first, n,
		 prot | !shared << 4);
	t->err = errno;
	t->ret = p == MAP_FAILED ? -1 : 0;
	if (want) {
		CHECK(p == MAP_FAILED && errno == want, "should give errno %d", want);
		return;
	}
	CHECK(p != MAP_FAILED, "should work");

	for (i = 0; prot & PROT_READ && i < n; i++) {
		ret = probe(p + i * PG);
		CHECK(ret == ((first + i) / pages < l->nr_rings ? 0 : SIGBUS),
		      "page %lu, rings %u of %lu pages: signal %d", first + i, l->nr_rings, pages,
		      ret);
	}
	switch (below(5)) {
	case 0:
		ret = mprotect(p, n * PG, PROT_READ | PROT_WRITE);
		CHECK(consumer_page ? !ret : ret && errno == EACCES, "mprotect gave %d", ret);
		break;
	case 1:
		ret = mprotect(p, PG, PROT_READ | PROT_EXEC);
		CHECK(ret && errno == EACCES, "mprotect gave %d", ret);
		break;
	case 2:
		q = mremap(p, n * PG, (n + 1) * PG, MREMAP_MAYMOVE);
		CHECK(q == MAP_FAILED && errno == EFAULT, "mremap gave %p", q);
		break;
	case 3:
		q = mremap(p, n * PG, n * PG, MREMAP_MAYMOVE);
		CHECK(q != MAP_FAILED, "mremap");
		p = q;
		break;
	case 4:
		ret = madvise(p, n * PG, MADV_DONTNEED);
		CHECK(!ret, "madvise gave %d", ret);
		break;
	}
	if (n > 1 && once_in(2))
		CHECK_OK(munmap(p + PG, PG));
	CHECK_OK(munmap(p, n * PG));
}

static void step_fork(struct mlog *l)
{
	struct kvm_dirty_slot_log_info info;
	int status, fd = l->fd[EX_MAIN];
	pid_t pid;

	nr_ops++;
	note("fork log", l - m.log, 0, 0, 0);
	pid = fork();
	CHECK(pid >= 0, "fork");
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info) || info.npages != l->npages)
			_exit(1);
		if (l->nr_rings && probe((void *)l->ring[0].kern) != SIGSEGV)
			_exit(2);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && !status, "child ended with %#x", status);
	all_unchanged();
}

/* Descriptors come and go; the log stays. */
static void step_fds(struct mlog *l)
{
	int fd, ex = EX_PEER + below(2), sock[2];
	char tag;

	nr_ops++;
	note("descriptors log", l - m.log, 0, 0, 0);
	switch (below(4)) {
	case 0:
		log_close(l, ex);
		break;
	case 1:
		fd = dup(l->fd[EX_MAIN]);
		CHECK(fd >= 0, "dup");
		log_close(l, EX_MAIN);
		l->fd[EX_MAIN] = fd;
		break;
	case 2:
		if (l->dead)
			break;
		fd = open_log(l->slot);
		log_close(l, EX_MAIN);
		l->fd[EX_MAIN] = fd;
		break;
	case 3:	/* in flight while the last one here is closed */
		CHECK_OK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sock));
		send_fd(sock[0], 0, l->fd[EX_MAIN]);
		log_close(l, EX_MAIN);
		l->fd[EX_MAIN] = recv_fd(sock[1], &tag, 0);
		close(sock[0]);
		close(sock[1]);
		break;
	}
}

/* -- steps: the VM -------------------------------------------------------- */

static int enter_guest(int v)
{
	static int said;
	struct kvm_regs regs;
	int ret, err;

	m.runner[v] = pthread_self();
	WRITE_ONCE(m.runs[v], true);
	ret = __vcpu_run(m.vcpu[v]);
	err = errno;
	WRITE_ONCE(m.runs[v], false);
	WRITE_ONCE(m.returns[v], m.returns[v] + 1);
	if (unlikely(READ_ONCE(hang_found)) && said++ < 2 * MAX_VCPUS) {
		vcpu_regs_get(m.vcpu[v], &regs);
		fprintf(stderr, "#   vCPU %d came back: %d (%s), exit %u, rip %#llx, flags %#llx\n",
			v, ret, ret ? strerror(err) : "-", m.vcpu[v]->run->exit_reason, regs.rip,
			regs.rflags);
	}
	errno = err;
	return ret;
}

/* KVM_RUN until the guest is done (true) or a ring is full (false). */
static bool run_vcpu(int v)
{
	struct kvm_run *run = m.vcpu[v]->run;
	struct ucall uc;
	int ret;

	for (;;) {
		do
			ret = enter_guest(v);
		while (ret == -1 && errno == EINTR);
		CHECK(!ret, "KVM_RUN gave %d", ret);

		switch (run->exit_reason) {
		case KVM_EXIT_DIRTY_SLOT_RING_FULL:
			CHECK(m.exit_on_full, "a full ring, but nobody wants to know");
			return false;
		case KVM_EXIT_MMIO:	/* the slot is gone or elsewhere */
			CHECK(in_storm, "MMIO at %#llx", run->mmio.phys_addr);
			continue;
		case KVM_EXIT_IO:
			if (run->io.port == DONE_PORT)
				return true;
		}
		get_ucall(m.vcpu[v], &uc);
		/* Did KVM inject anything (pf_guest)?  Else the CPU did. */
		print_stats(0);
		CHECK(false, "guest failed: exit %s, %s", exit_reason_str(run->exit_reason),
		      uc.buffer);
	}
}

/*
 * The guest's pages from @from to @to (of its walk) were written or read, and
 * maybe @one_more.  That one is where the next part begins: if the write was
 * done before the vCPU left, as it can be with PML, it is not done again.
 */
static void model_touch(struct mlog *l, struct mring *r, const struct mailbox *mb, uint64_t from,
			uint64_t to, bool one_more)
{
	uint64_t sure = from + !!from;
	uint64_t pushed, over, i, p, lo = 0, hi, producer = ring_producer(r);
	bool read = mb->op == OP_READ;
	uint8_t fresh[MAX_PAGES] = { 0 };
	struct kvm_dirty_run run;
	bool late = false;

	pushed = producer - r->producer;
	over = ring_overflowed(r) - r->overflowed;
	for (i = from, hi = 0; i < to + one_more && i < mb->count; i++) {
		p = (mb->first + i * mb->step) % mb->npages;
		if (l->in[p] == YES || fresh[p])
			continue;
		fresh[p] = 1;
		hi++;
		if (l->in[p] == NO && !read && i >= sure && i < to)
			lo++;
		else
			late = true;	/* or not, see below */
	}
	CHECK(pushed + over >= lo && pushed + over <= hi,
	      "%lu pages pushed, %lu overflowed, should be %lu to %lu", pushed, over, lo, hi);
	CHECK(producer - r->reset <= m.entries, "producer %lu reset %lu", producer, r->reset);

	for (i = r->producer; i != producer; i++) {
		run = ring_entry(r, i);
		for (p = run.offset; p < (uint64_t)run.offset + run.npages; p++) {
			CHECK(p < l->npages && fresh[p],
			      "entry %lu names page %lu, which is not new", i, p);
			fresh[p] = 0;
			l->in[p] = YES;
		}
	}
	/* What is left overflowed, all of it if the numbers say so. */
	for (p = 0; p < l->npages; p++) {
		if (!fresh[p])
			continue;
		if (!late || over == hi - pushed)
			l->in[p] = YES;
		else if (over || l->in[p] == MAYBE)
			l->in[p] = MAYBE;
	}
	/* Those that were surely written. */
	for (i = sure; !read && i < to; i++)
		l->in[(mb->first + i * mb->step) % mb->npages] = YES;
	if (over)
		l->spill = true;
	ring_look(r);
}

static void check_full(int v)
{
	uint32_t id = m.vcpu[v]->run->dirty_slot_ring.slot, s = id - FIRST_SLOT;
	struct mring *r;

	CHECK(s < NR_SLOTS && m.slot[s].log, "full ring in slot %u", id);
	r = &m.slot[s].log->ring[v];
	CHECK(ring_producer(r) - ring_reset(r) == m.entries,
	      "full ring with producer %lu and reset %lu", ring_producer(r), ring_reset(r));
}

static void step_guest(int s)
{
	struct mslot *slot = &m.slot[s];
	struct mlog *l = slot->log;
	struct mailbox mb = { .op = once_in(10) ? OP_READ : OP_WRITE };
	static const uint32_t counts[] = { 1, 1, 2, 3, 8, 33, 100, 700 };
	static const uint32_t steps[] = { 1, 1, 1, 2, 3, 17, 64, 65 };
	int v = below(m.nr_vcpus);
	uint64_t from = 0, to;
	struct op_note *t;
	bool done;

	nr_ops++;
	if (!slot->exists)
		return;
	mb.gva[0] = SLOT_GVA(s, slot->place);
	mb.npages = slot->npages;
	mb.first = below(slot->npages);
	mb.count = counts[below(ARRAY_SIZE(counts))];
	mb.step = steps[below(ARRAY_SIZE(steps))];
	mb.value = ++sh->stamp;
	*m.mb[v] = mb;
	t = note("guest vCPU, slot, first << 32 | count, step | read << 32", v, s,
		 mb.first << 32 | mb.count, mb.step | (uint64_t)(mb.op == OP_READ) << 32);
	nr_guest_pages += mb.count;

	do {
		done = run_vcpu(v);
		t->ret++;
		to = READ_ONCE(m.mb[v]->done);
		CHECK(!done || to == mb.count, "%lu of %lu pages", to, mb.count);
		if (l)
			model_touch(l, &l->ring[v], &mb, from, to, !done);
		if (done)
			break;
		check_full(v);
		from = to;
		/* It must leave again, without getting anywhere. */
		if (once_in(4)) {
			CHECK(!run_vcpu(v), "the ring is full, but the vCPU runs");
			check_full(v);
			CHECK(m.mb[v]->done == to, "the ring is full, but the vCPU ran");
		}
		harvest_all(m.slot[m.vcpu[v]->run->dirty_slot_ring.slot - FIRST_SLOT].log);
	} while (true);
	if (once_in(8))
		all_unchanged();
}

/* KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG. */
static void step_bitmap(int s)
{
	struct mslot *slot = &m.slot[s];
	struct mlog *l = slot->log;
	uint64_t *bitmap = (void *)(arena + PG), words;
	struct kvm_dirty_log get = { .slot = FIRST_SLOT + s, .dirty_bitmap = bitmap };
	struct kvm_clear_dirty_log clear = { .slot = FIRST_SLOT + s, .dirty_bitmap = bitmap };
	bool bit, nowhere = once_in(20);
	uint32_t p;
	int ret;

	nr_ops++;
	if (nowhere)
		get.dirty_bitmap = arena + ARENA_PAGES * PG - 1;
	clear.dirty_bitmap = get.dirty_bitmap;
	if (once_in(2)) {
		ret = ioctl(m.vm->fd, KVM_GET_DIRTY_LOG, &get);
		note("GET_DIRTY_LOG slot", s, nowhere, 0, 0)->ret = ret;
		if (!l) {
			CHECK(ret && errno == ENOENT, "gave %d", ret);
			return;
		}
		CHECK(nowhere ? ret && errno == EFAULT : !ret, "gave %d", ret);
		for (p = 0; !nowhere && p < l->npages; p++) {
			bit = bitmap[p / 64] >> (p % 64) & 1;
			CHECK(l->in[p] == MAYBE || l->in[p] == bit,
			      "slot %d page %u: bit %d, should be %d", s, p, bit, l->in[p]);
			l->in[p] = bit;
		}
		if (!m.manual)
			memset(l->in, NO, sizeof(l->in));
		return;
	}

	words = DIV_ROUND_UP(slot->npages, 64);
	clear.first_page = below(words) * 64;
	clear.num_pages = min(slot->npages - (uint32_t)clear.first_page,
			      64 * (uint32_t)(1 + below(words)));
	for (p = 0; p < words; p++)
		bitmap[p] = rnd() & rnd();
	ret = ioctl(m.vm->fd, KVM_CLEAR_DIRTY_LOG, &clear);
	note("CLEAR_DIRTY_LOG slot, first, n", s, clear.first_page, clear.num_pages, 0)->ret = ret;
	if (!l || nowhere) {
		CHECK(ret && errno == (l ? EFAULT : ENOENT), "gave %d", ret);
		return;
	}
	CHECK(!ret, "gave %d", ret);
	for (p = 0; p < clear.num_pages; p++) {
		if (bitmap[p / 64] >> (p % 64) & 1)
			l->in[clear.first_page + p] = NO;
	}
}

static void set_slot(int s, bool log)
{
	struct mslot *slot = &m.slot[s];

	CHECK_OK(__vm_set_user_memory_region(m.vm, FIRST_SLOT + s,
					     log ? KVM_MEM_LOG_DIRTY_PAGES : 0,
					     SLOT_GPA(s, slot->place),
					     slot->exists ? slot->npages * PG : 0, memory[s]));
}

static void model_log_dies(struct mslot *slot)
{
	if (slot->log)
		slot->log->dead = true;
	slot->log = NULL;
}

static void model_log_new(int s)
{
	struct mslot *slot = &m.slot[s];
	struct kvm_dirty_slot_log_info info;
	struct mlog *l;

	/* Room: the oldest is as good as any. */
	for (l = m.log; l < m.log + NR_LOGS && l->used; l++)
		;
	if (l == m.log + NR_LOGS) {
		do
			l = &m.log[below(NR_LOGS)];
		while (!l->dead);
		log_forget(l);
	}

	*l = (struct mlog){
		.used = true, .slot = s, .npages = slot->npages,
		.base_gfn = SLOT_GPA(s, slot->place) / PG,
		.fd = { -1, -1, -1, -1 },
	};
	l->fd[EX_MAIN] = open_log(s);
	CHECK_OK(ioctl(l->fd[EX_MAIN], KVM_DIRTY_SLOT_LOG_INFO, &info));
	CHECK(info.npages == l->npages && info.nr_rings == m.nr_vcpus, "%llu pages, %u rings",
	      info.npages, info.nr_rings);
	l->stride = info.stride;
	if (m.manual & KVM_DIRTY_LOG_INITIALLY_SET) {
		memset(l->in, YES, l->npages);
		l->spill = true;
	}
	log_add_rings(l, m.nr_vcpus);
	slot->log = l;
}

static uint32_t some_size(void)
{
	static const uint32_t sizes[] = { 1, 2, 63, 64, 65, 127, 200, 515, 700 };

	return sizes[below(ARRAY_SIZE(sizes))];
}

static void step_slot(int s)
{
	struct mslot *slot = &m.slot[s];
	int what = below(4);

	nr_ops++;
	note("slot, what", s, what, slot->exists, 0);
	if (!slot->exists) {
		slot->exists = true;
		slot->npages = some_size();
		set_slot(s, what);
		if (what)
			model_log_new(s);
	} else if (what == 0) {
		slot->exists = false;
		set_slot(s, false);
		model_log_dies(slot);
	} else if (what == 1) {
		slot->place ^= 1;
		set_slot(s, slot->log);
		if (slot->log)
			slot->log->base_gfn = SLOT_GPA(s, slot->place) / PG;
	} else if (slot->log) {
		set_slot(s, false);
		model_log_dies(slot);
	} else {
		set_slot(s, true);
		model_log_new(s);
	}
	all_unchanged();
}

/* Opening a log, with good and bad arguments. */
static void step_open(int s)
{
	struct kvm_dirty_slot_log_fd arg = { .slot = FIRST_SLOT + s };
	int want = m.slot[s].log ? 0 : ENOENT, fd;
	struct op_note *t;
	void *argp = &arg;

	nr_ops++;
	switch (below(8)) {
	case 0:
		arg.flags = 1u << below(32);
		want = EINVAL;
		break;
	case 1:
		arg.slot = (2 + below(100)) << 16 | below(1 << 16);
		want = EINVAL;
		break;
	case 2:
		arg.slot = 1 << 16 | (FIRST_SLOT + below(20));
		want = ENOENT;
		break;
	case 3:
		arg.slot = 0xffff;
		want = EINVAL;
		break;
	case 4:
		argp = header_at(1 + below(AT_KERNEL), sizeof(arg));
		if (argp == arena_ro)
			argp = NULL;
		want = EFAULT;
		break;
	}
	fd = ioctl(m.vm->fd, KVM_GET_DIRTY_SLOT_LOG_FD, argp);
	t = note("GET_DIRTY_SLOT_LOG_FD slot, flags", arg.slot, arg.flags, 0, 0);
	t->ret = fd;
	t->err = errno;
	CHECK(want ? fd == -1 && errno == want : fd >= 0, "gave %d, should be errno %d", fd, want);
	if (fd >= 0)
		close(fd);
}

static void add_vcpu(void)
{
	int v = m.nr_vcpus;

	m.vcpu[v] = vm_vcpu_add(m.vm, v, guest_main);
	vcpu_args_set(m.vcpu[v], 1, v);
	m.stats[v] = vcpu_get_stats_fd(m.vcpu[v]);
	m.mb[v] = &((struct mailbox *)addr_gva2hva(m.vm, (vm_vaddr_t)mailboxes))[v];
	m.nr_vcpus++;
}

static void step_vcpu(void)
{
	int s;

	nr_ops++;
	if (m.nr_vcpus == MAX_VCPUS)
		return;
	note("new vCPU", m.nr_vcpus, 0, 0, 0);
	add_vcpu();
	for (s = 0; s < NR_SLOTS; s++) {
		if (m.slot[s].log)
			log_add_rings(m.slot[s].log, m.nr_vcpus);
	}
}

static void step_madvise(int s)
{
	uint64_t first = below(MAX_PAGES), n = 1 + below(MAX_PAGES - first);

	nr_ops++;
	note("DONTNEED slot, first, n", s, first, n, 0);
	CHECK_OK(madvise(memory[s] + first * PG, n * PG, MADV_DONTNEED));
}

static void step(bool vm)
{
	struct mlog *l = &m.log[below(NR_LOGS)];
	int s = below(NR_SLOTS), x = below(1000);
	int i;

	luck = mix(opt.seed ^ mix(round_nr ^ mix(++step_nr)));
	if (!(step_nr & 63))
		WRITE_ONCE(sh->progress, sh->progress + 1);
	for (i = 0; i < NR_LOGS && !l->used; i++)
		l = &m.log[(l - m.log + 1) % NR_LOGS];

	if (vm && x < 130) {
		step_guest(s);
		return;
	} else if (vm && x < 160) {
		step_bitmap(s);
		return;
	} else if (vm && x < 163) {
		step_slot(s);
		return;
	} else if (vm && x < 173) {
		step_open(s);
		return;
	} else if (vm && x < 174) {
		step_vcpu();
		return;
	} else if (vm && x < 178) {
		step_madvise(s);
		return;
	}

	if (!l->used) {
		nr_ops++;
		return;
	}
	if (x < 330)
		step_harvest(l);
	else if (x < 520)
		step_runs(l, true);
	else if (x < 600)
		step_runs(l, false);
	else if (x < 700)
		step_reset(l);
	else if (x < 830)
		step_consumer(l);
	else if (x < 870)
		step_info(l);
	else if (x < 920)
		step_garbage(l);
	else if (x < 960)
		step_poll(l);
	else if (x < 990)
		step_map(l);
	else if (x < 998)
		step_fds(l);
	else if (x < 999)
		step_fork(l);
	else
		all_unchanged();
}

/* -- storms --------------------------------------------------------------- */

/*
 * Copy a page that the log named.  In any order and as often as one likes, as
 * long as each time is after the page was re-armed.
 */
static void copy_page(int s, uint32_t p)
{
	uint64_t *page = (uint64_t *)(memory[s] + p * PG);

	while (__atomic_test_and_set(&sh->page_lock[s][p], __ATOMIC_ACQUIRE))
		sched_yield();
	sh->copy[s][p][0] = READ_ONCE(page[0]);
	sh->copy[s][p][1] = READ_ONCE(page[1]);
	__atomic_clear(&sh->page_lock[s][p], __ATOMIC_RELEASE);
}

static void copy_pages(int s, uint32_t first, uint32_t n)
{
	for (; n; first++, n--)
		copy_page(s, first);
}

static void add_taken(uint64_t n)
{
	__atomic_fetch_add(&sh->storm.taken, n, __ATOMIC_RELAXED);
}

static void pause_a_bit(void)
{
	if (once_in(16))
		usleep(below(300));
	else if (once_in(16))
		sched_yield();
}

/* Any process: consumers that are out of bounds (or all) go back to reset. */
static void heal(int fd, bool all)
{
	struct kvm_dirty_slot_log_info info;
	struct mring r;
	uint64_t reset;
	uint32_t i;

	CHECK_OK(ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info));
	for (i = 0; i < info.nr_rings; i++) {
		ring_map(&r, fd, info.stride, i);
		reset = ring_reset(&r);
		if (all || ring_consumer(&r) - reset > ring_producer(&r) - reset)
			__atomic_store_n(&r.user->consumer, reset, __ATOMIC_RELEASE);
		ring_unmap(&r);
	}
}

/* Harvests once and copies; false if the log is dead and empty. */
static bool take(int s, int fd, struct kvm_dirty_run *runs, uint32_t capacity, bool faults,
		 bool *more)
{
	struct kvm_dirty_slot_runs args = {
		.runs = (uintptr_t)runs, .nr_runs = capacity,
		.flags = once_in(3) ? KVM_DIRTY_HARVEST_SYNC : 0,
	};
	struct kvm_dirty_run run;
	uint64_t sum = 0;
	uint32_t i;

	*more = true;
	if (call(fd, KVM_DIRTY_SLOT_LOG_HARVEST, &args)) {
		if (errno == ENODEV)
			return false;
		CHECK(errno == EINTR || (errno == EFAULT && faults) ||
		      (errno == EINVAL && sh->storm.liars), "HARVEST failed");
		if (errno == EINVAL)
			heal(fd, false);
		return true;
	}
	for (i = 0; i < args.nr_runs; i++) {
		memcpy(&run, &runs[i], sizeof(run));
		CHECK(run.npages && (uint64_t)run.offset + run.npages <= sh->npages[s],
		      "run %u + %u of %u pages", run.offset, run.npages, sh->npages[s]);
		copy_pages(s, run.offset, run.npages);
		sum += run.npages;
	}
	CHECK(sum == args.nr_pages, "%llu pages, in runs %lu", args.nr_pages, sum);
	add_taken(sum);
	*more = args.flags & KVM_DIRTY_HARVEST_MORE;
	return true;
}

static void drain(int s, int fd)
{
	struct kvm_dirty_run runs[256];
	bool more;

	while (take(s, fd, runs, ARRAY_SIZE(runs), false, &more) && more)
		;
}

static void drain_dead(int s, int fd)
{
	struct kvm_dirty_run runs[256];
	bool more;

	while (take(s, fd, runs, ARRAY_SIZE(runs), false, &more))
		;
}

static void act_harvest(int s, int fd, void *edge)
{
	static const uint32_t capacities[] = { 1, 2, 7, 64, 512, 512 };
	struct kvm_dirty_run runs[512];
	uint32_t capacity = capacities[below(ARRAY_SIZE(capacities))];
	bool more;

	switch (sh->storm.faults ? below(16) : 2) {
	case 0:
		take(s, fd, (void *)KERNEL_ADDRESS, capacity, true, &more);
		break;
	case 1:
		take(s, fd, edge - below(64) * sizeof(runs[0]), capacity, true, &more);
		break;
	default:
		take(s, fd, runs, capacity, false, &more);
	}
}

/* Copies what was read from the mapping, once it is surely re-armed. */
static void copy_pending(int s)
{
	uint32_t p;

	for (p = 0; p < sh->npages[s]; p++) {
		if (sh->pending[s][p]) {
			sh->pending[s][p] = 0;
			copy_page(s, p);
		}
	}
}

static void act_reader(int s, int fd)
{
	struct kvm_dirty_slot_reset args = { 0 };
	struct kvm_dirty_slot_log_info info;
	uint64_t i, consumer, producer, reset;
	struct kvm_dirty_run run;
	struct mring r;
	uint32_t p;

	CHECK_OK(ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info));
	if (!info.nr_rings)
		return;
	ring_map(&r, fd, info.stride, below(info.nr_rings));
	reset = ring_reset(&r);
	consumer = ring_consumer(&r);
	producer = ring_producer(&r);
	if (consumer - reset > producer - reset) {
		__atomic_store_n(&r.user->consumer, ring_reset(&r), __ATOMIC_RELEASE);
	} else if (producer - consumer <= info.entries) {
		producer = consumer + below(producer - consumer + 1);
		for (i = consumer; i != producer; i++) {
			run = r.runs[i & (info.entries - 1)];
			CHECK((uint64_t)run.offset + run.npages <= sh->npages[s], "entry %u + %u",
			      run.offset, run.npages);
			for (p = 0; p < run.npages; p++)
				sh->pending[s][run.offset + p] = 1;
		}
		__atomic_store_n(&r.user->consumer, producer, __ATOMIC_RELEASE);
	}
	ring_unmap(&r);
	pause_a_bit();

	if (!ioctl(fd, KVM_DIRTY_SLOT_LOG_RESET, &args)) {
		copy_pending(s);
		return;
	}
	CHECK(errno == EINTR || errno == EINVAL || errno == ENODEV, "RESET failed");
	if (errno == EINVAL)
		heal(fd, false);
}

static void refresh(struct actor *a)
{
	char s;
	int fd;

	if (a->peer < 0)
		return;
	while ((fd = recv_fd(a->sock, &s, MSG_DONTWAIT)) >= 0) {
		CHECK(dup2(fd, a->fd[(int)s]) == a->fd[(int)s], "dup2");
		close(fd);
	}
}

/* The host writes, as a device would, and says so. */
static void act_mark(struct actor *a, int s)
{
	struct kvm_dirty_run runs[3];
	struct kvm_dirty_slot_runs args;
	uint32_t nr = 1 + below(3), i, p;
	int ret, tries;

	for (i = 0; i < nr; i++) {
		runs[i].npages = 1 + below(min(sh->npages[s], 6u));
		runs[i].offset = below(sh->npages[s] - runs[i].npages + 1);
		for (p = runs[i].offset; p < runs[i].offset + runs[i].npages; p++)
			WRITE_ONCE(((uint64_t *)(memory[s] + p * PG))[1],
				   __atomic_add_fetch(&sh->stamp, 1, __ATOMIC_RELAXED));
	}
	for (tries = 0; ; tries++) {
		ret = __dsr_runs(a->fd[s], KVM_DIRTY_SLOT_LOG_MARK, runs, nr, 0, &args);
		if (!ret)
			break;
		CHECK(errno == EINTR || errno == ENODEV, "MARK failed");
		CHECK(tries < 1000000, "no log comes to life");
		usleep(100);
		refresh(a);
	}
}

static void act_discard(int s, int fd)
{
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_run run;
	int ret;

	run.npages = 1 + below(min(sh->npages[s], 200u));
	run.offset = below(sh->npages[s] - run.npages + 1);
	ret = __dsr_runs(fd, KVM_DIRTY_SLOT_LOG_DISCARD, &run, 1, 0, &args);
	if (ret && errno == ENODEV)
		return;
	CHECK(!ret || errno == EINTR, "DISCARD failed");
	add_taken(args.nr_pages);
	/* Its contents may matter to us after all. */
	copy_pages(s, run.offset, run.npages);
}

static void act_misc(int s, int fd)
{
	struct kvm_dirty_slot_log_info info;
	struct kvm_dirty_slot_runs args = { 0 };
	struct pollfd pfd = { .fd = fd, .events = POLLIN };
	uint64_t pages;
	int ret, sock[2], other, n, i, status;
	pid_t pid;
	char tag;
	void *p;

	switch (below(10)) {
	case 0:
		ret = poll(&pfd, 1, below(3));
		CHECK(ret >= 0 || errno == EINTR, "poll failed");
		break;
	case 1:
		ret = call(fd, KVM_DIRTY_SLOT_LOG_HARVEST, &args);
		CHECK(ret && errno == EINVAL, "HARVEST without capacity gave %d", ret);
		break;
	case 2:
		ret = ioctl(fd, KVM_DIRTY_SLOT_LOG_HARVEST ^ 0x40, &args);
		CHECK(ret && errno == ENOTTY, "no call gave %d", ret);
		break;
	case 3:
		ret = ioctl(fd, KVM_DIRTY_SLOT_LOG_RESET, (void *)KERNEL_ADDRESS);
		CHECK(ret && errno == EFAULT, "RESET without argument gave %d", ret);
		break;
	case 4:
		args.nr_runs = 100;
		args.runs = KERNEL_ADDRESS;
		ret = ioctl(fd, KVM_DIRTY_SLOT_LOG_MARK + once_in(2), &args);
		CHECK(ret && (errno == EFAULT || errno == ENODEV), "no array gave %d", ret);
		break;
	case 5:
		other = dup(fd);
		CHECK(other >= 0 && !close(other), "dup");
		break;
	case 6:
		CHECK_OK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sock));
		send_fd(sock[0], 0, fd);
		if (once_in(2))
			close(recv_fd(sock[1], &tag, 0));
		close(sock[0]);
		close(sock[1]);
		break;
	case 7:
		if (!once_in(4))
			break;
		pid = fork();
		CHECK(pid >= 0, "fork");
		if (!pid)
			_exit(!!ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info));
		while (waitpid(pid, &status, 0) < 0)
			CHECK(errno == EINTR, "waitpid");
		CHECK(!status, "child ended with %#x", status);
		break;
	default:
		CHECK_OK(ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info));
		CHECK(info.slot == FIRST_SLOT + s && info.npages == sh->npages[s] &&
		      info.nr_rings <= MAX_VCPUS, "slot %u, %llu pages, %u rings", info.slot,
		      info.npages, info.nr_rings);
		pages = info.stride / PG * info.nr_rings;
		if (!pages)
			break;
		n = 1 + below(pages);
		p = mmap(NULL, n * PG, PROT_READ, MAP_SHARED, fd, below(pages - n + 1) * PG);
		CHECK(p != MAP_FAILED, "mmap of %d pages of %lu", n, pages);
		for (i = 0; i < n; i++)
			READ_ONCE(*(uint64_t *)(p + i * PG));
		CHECK_OK(munmap(p, n * PG));
	}
}

/* A hostile reader's consumer: never one that could be taken for honest. */
static void act_scribble(int fd)
{
	struct kvm_dirty_slot_log_info info;
	struct mring r;

	CHECK_OK(ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info));
	if (!info.nr_rings)
		return;
	ring_map(&r, fd, info.stride, below(info.nr_rings));
	__atomic_store_n(&r.user->consumer, ring_producer(&r) + (1ul << (32 + below(31))),
			 __ATOMIC_RELEASE);
	usleep(below(100));
	ring_unmap(&r);
}

static void act_bitmap(int s)
{
	uint64_t bitmap[NR_WORDS] = { 0 };
	struct kvm_dirty_log get = { .slot = FIRST_SLOT + s, .dirty_bitmap = bitmap };
	struct kvm_clear_dirty_log clear = {
		.slot = FIRST_SLOT + s, .num_pages = sh->npages[s], .dirty_bitmap = bitmap,
	};
	uint64_t sum = 0;
	uint32_t p;

	if (ioctl(m.vm->fd, KVM_GET_DIRTY_LOG, &get) ||
	    (m.manual && ioctl(m.vm->fd, KVM_CLEAR_DIRTY_LOG, &clear))) {
		CHECK(errno == ENOENT || errno == EINTR, "bitmap ioctl failed");
		return;
	}
	for (p = 0; p < sh->npages[s]; p++) {
		if (bitmap[p / 64] >> (p % 64) & 1) {
			copy_page(s, p);
			sum++;
		}
	}
	if (!m.manual)
		add_taken(sum);
}

static void *act(void *arg)
{
	struct actor *a = arg;
	unsigned int i;
	void *edge;
	int s;

	luck = a->seed;
	edge = mmap(NULL, 2 * PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(edge != MAP_FAILED, "no memory");
	CHECK_OK(mprotect(edge + PG, PG, PROT_NONE));

	for (i = 0; i < a->n; i++) {
		refresh(a);
		s = below(NR_SLOTS);
		switch (a->kind) {
		case A_HARVEST:
			act_harvest(s, a->fd[s], edge + PG);
			break;
		case A_READER:
			act_reader(s, a->fd[s]);
			break;
		case A_MARK:
			act_mark(a, s);
			break;
		case A_DISCARD:
			act_discard(s, a->fd[s]);
			break;
		case A_MISC:
			act_misc(s, a->fd[s]);
			break;
		case A_SCRIBBLE:
			act_scribble(a->fd[s]);
			break;
		case A_BITMAP:
			act_bitmap(s);
			break;
		default:
			CHECK(false, "actor %d", a->kind);
		}
		a->done++;
		if (!(i & 15))
			__atomic_fetch_add(&sh->progress, 1, __ATOMIC_RELAXED);
		pause_a_bit();
	}
	munmap(edge, 2 * PG);
	return NULL;
}

static void *vcpu_thread(void *arg)
{
	int v = (intptr_t)arg;

	/* Guests never rest; on few CPUs the others would hardly run. */
	setpriority(PRIO_PROCESS, syscall(SYS_gettid), v % 2 ? 10 : 5);
	while (!run_vcpu(v) && !READ_ONCE(sh->storm.stop))
		usleep(100);
	return NULL;
}

static void start_vcpu(int v)
{
	struct mailbox mb = {
		.op = OP_RANDOM, .npages = sh->npages[0], .first = rnd(),
		.count = opt.how == BREAK_HANG && !v,
	};
	int i;

	for (i = 0; i < NR_SLOTS * 2; i++)
		mb.gva[i] = SLOT_GVA(i / 2, i % 2);
	for (i = 1; i < NR_SLOTS; i++)
		mb.npages = min_t(uint64_t, mb.npages, sh->npages[i]);
	mb.value = sh->stamp + ((uint64_t)(v + 1) << 40);
	*m.mb[v] = mb;
	CHECK_OK(pthread_create(&m.thread[v], NULL, vcpu_thread, (void *)(intptr_t)v));
}

static uint64_t stat_of(int fd, const char *name)
{
	struct kvm_stats_header header;
	struct kvm_stats_desc *all, *desc;
	uint64_t value = -1ul;
	int i;

	read_stats_header(fd, &header);
	all = read_stats_descriptors(fd, &header);
	for (i = 0; i < header.num_desc && value == -1ul; i++) {
		desc = get_stats_descriptor(all, i, &header);
		if (!strcmp(desc->name, name))
			read_stat_data(fd, &header, desc, &value, 1);
	}
	CHECK(value != -1ul, "no counter %s", name);
	free(all);
	return value;
}

/* Marks made less pages that RESET took. */
static uint64_t marks_left(void)
{
	int fd = vm_get_stats_fd(m.vm), v;
	uint64_t n;

	n = stat_of(fd, "dirty_slot_log_marked_pages") - stat_of(fd, "dirty_slot_log_reset_pages");
	close(fd);
	for (v = 0; v < m.nr_vcpus; v++) {
		n += stat_of(m.stats[v], "dirty_slot_ring_pushed");
		n += stat_of(m.stats[v], "dirty_slot_ring_overflowed");
	}
	return n;
}

#define MAX_CHANGES	12

/* What the main thread does to the VM meanwhile. */
static void change_slots(int *fds, int (*old)[2], int *nr_old)
{
	struct storm *st = &sh->storm;
	int s = below(NR_SLOTS), i, fd, what;
	struct mslot *slot = &m.slot[s];

	if (*nr_old == MAX_CHANGES)
		return;
	what = below(8);
	note("change slot, what, before", s, what, *nr_old, m.nr_vcpus);
	switch (what) {
	case 0:
		if (m.nr_vcpus < MAX_VCPUS) {
			add_vcpu();
			start_vcpu(m.nr_vcpus - 1);
		}
		return;
	case 1:
	case 2:
		slot->place ^= 1;
		set_slot(s, true);
		return;
	case 3:
		CHECK_OK(madvise(memory[s], MAX_PAGES * PG, MADV_DONTNEED));
		return;
	case 4:
		slot->exists = false;	/* for set_slot() to delete it */
		break;
	}

	fd = dup(fds[s]);
	CHECK(fd >= 0, "dup");
	set_slot(s, false);
	slot->exists = true;
	note("drain slot", s, 0, 0, 0);
	drain_dead(s, fd);
	/* Who was just marking when the slot stopped may do so still. */
	old[*nr_old][0] = s;
	old[(*nr_old)++][1] = fd;

	set_slot(s, true);
	if (m.manual & KVM_DIRTY_LOG_INITIALLY_SET)
		st->init_set += sh->npages[s];
	note("slot logs again", s, 0, 0, 0);
	fd = open_log(s);
	/* Nobody knows what was written in between. */
	copy_pages(s, 0, sh->npages[s]);
	CHECK(dup2(fd, fds[s]) == fds[s], "dup2");
	for (i = 0; i < 2; i++)
		send_fd(m.sock[i], s, fd);
	close(fd);
}

/* A process that does no good, and dies in the midst of it. */
static pid_t start_vandal(const int *fds)
{
	static const unsigned long calls[] = {
		KVM_DIRTY_SLOT_LOG_HARVEST, KVM_DIRTY_SLOT_LOG_RESET, KVM_DIRTY_SLOT_LOG_MARK,
		KVM_DIRTY_SLOT_LOG_DISCARD,
	};
	struct kvm_dirty_slot_runs args;
	pid_t pid = fork();
	void *p;
	int fd;

	CHECK(pid >= 0, "fork");
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGTERM, SIG_DFL);
	for (;;) {
		fd = fds[below(NR_SLOTS)];
		memset(&args, once_in(2) ? rnd() : 0, sizeof(args));
		/* RESET's pad, or an unknown flag: never anything that works. */
		args.flags = 1u << 31 | rnd();
		ioctl(fd, calls[below(ARRAY_SIZE(calls))], &args);
		ioctl(fd, rnd() | 0x100, rnd());
		p = mmap(NULL, PG << below(4), PROT_READ | below(8), MAP_SHARED, fd,
			 below(64) * PG);
		if (p != MAP_FAILED && once_in(2))
			madvise(p, PG, MADV_POPULATE_READ);
		if (p != MAP_FAILED && once_in(4))
			munmap(p, PG);
		usleep(below(200));
	}
}

static void storm_cast(struct storm *st, bool changes, unsigned int n)
{
	static const enum actor_kind kinds[] = { A_HARVEST, A_MARK };
	bool reader = false;
	struct actor *a;
	int i, peers = 0;

	st->nr_actors = 4 + below(3);
	/*
	 * What is put back after a fault may have been marked again meanwhile,
	 * and two marks are taken as one.
	 */
	st->faults = once_in(2);
	st->exact = !st->faults;
	for (i = 0; i < st->nr_actors; i++) {
		a = &st->actor[i];
		*a = (struct actor){
			.kind = i < 2 ? kinds[i] : below(NR_ACTOR_KINDS), .seed = rnd(), .n = n,
			.peer = -1,
		};
		if (a->kind == A_READER && reader)
			a->kind = A_HARVEST;
		/* The bitmap needs the VM; the others can be elsewhere. */
		if (a->kind != A_BITMAP && peers < 2 && once_in(2))
			a->peer = peers++;
		switch (a->kind) {
		case A_READER:
			reader = true;
			st->liars = true;
			/* What it collected of a slot that is gone nobody counts. */
			st->exact &= !changes;
			break;
		case A_SCRIBBLE:
			st->liars = true;
			break;
		case A_BITMAP:
			st->exact &= !m.manual;
			break;
		default:
			break;
		}
	}
}

static void run_storm(void)
{
	struct storm *st = &sh->storm;
	int fds[NR_SLOTS], old[MAX_CHANGES][2], nr_old = 0, i, s, v, ex;
	bool changes = once_in(2);
	uint64_t before, left;
	struct actor *a;
	struct mlog *l;
	uint32_t p, n;
	pid_t vandal = 0;

	luck = mix(opt.seed ^ mix(round_nr ^ mix(++step_nr)));
	nr_storms++;
	note("storm", changes, 0, 0, 0);

	/* All slots log, with nothing in any log. */
	for (s = 0; s < NR_SLOTS; s++) {
		struct mslot *slot = &m.slot[s];

		if (!slot->exists) {
			slot->exists = true;
			slot->npages = some_size();
			set_slot(s, false);
		}
		if (!slot->log) {
			set_slot(s, true);
			model_log_new(s);
		}
		harvest_all(slot->log);
		sh->npages[s] = slot->npages;
		fds[s] = dup(slot->log->fd[EX_MAIN]);
		slot->log = NULL;
	}
	for (l = m.log; l < m.log + NR_LOGS; l++) {
		if (l->used)
			log_forget(l);
	}
	memset(sh->pending, 0, sizeof(sh->pending));
	for (s = 0; s < NR_SLOTS; s++)
		copy_pages(s, 0, sh->npages[s]);
	before = marks_left();
	memset(st, 0, sizeof(*st));
	n = 20 + below(once_in(4) ? 500 : 150);
	storm_cast(st, changes, n);
	in_storm = true;

	if (once_in(3))
		vandal = start_vandal(fds);
	for (i = 0; i < st->nr_actors; i++) {
		a = &st->actor[i];
		memcpy(a->fd, fds, sizeof(fds));
		if (a->peer < 0)
			continue;
		ex = EX_PEER + a->peer;
		for (s = 0; s < NR_SLOTS; s++) {
			send_fd(m.sock[a->peer], 0, fds[s]);
			a->fd[s] = ask(ex, RPC_RECV, 0, 0, NULL);
		}
	}
	for (v = 0; v < m.nr_vcpus; v++)
		start_vcpu(v);
	for (i = 0; i < st->nr_actors; i++) {
		a = &st->actor[i];
		if (a->peer >= 0) {
			sh->rpc[EX_PEER + a->peer].what = RPC_STORM;
			sh->rpc[EX_PEER + a->peer].argp = a;
			sem_post(&sh->rpc[EX_PEER + a->peer].call);
		} else {
			CHECK_OK(pthread_create(&a->thread, NULL, act, a));
		}
	}

	note("storm: actors, each does, exact, liars", st->nr_actors, n, st->exact, st->liars);
	for (i = 0; i < n / 8; i++) {
		if (changes && once_in(3))
			change_slots(fds, old, &nr_old);
		a = &st->actor[below(st->nr_actors)];
		v = below(m.nr_vcpus);
		switch (below(3)) {
		case 0:
			if (a->peer >= 0)
				kill(sh->peer_pid[a->peer], SIGUSR1);
			else
				pthread_kill(a->thread, SIGUSR1);
			break;
		case 1:
			pthread_kill(m.thread[v], SIGUSR1);
			break;
		}
		usleep(below(2000));
	}

	note("storm: wait for actors, changes were", nr_old, 0, 0, 0);
	for (i = 0; i < st->nr_actors; i++) {
		a = &st->actor[i];
		if (a->peer < 0) {
			CHECK_OK(pthread_join(a->thread, NULL));
			continue;
		}
		sem_down(&sh->rpc[EX_PEER + a->peer].answer);
		for (s = 0; s < NR_SLOTS; s++)
			ask(EX_PEER + a->peer, RPC_CLOSE, a->fd[s], 0, NULL);
	}
	for (i = 0; i < 2; i++)
		ask(EX_PEER + i, RPC_STORM, 0, 0, NULL);
	if (vandal) {
		kill(vandal, SIGKILL);
		CHECK(waitpid(vandal, NULL, 0) == vandal, "waitpid");
	}
	note("storm: stop vCPUs", m.nr_vcpus, 0, 0, 0);
	WRITE_ONCE(st->stop, true);
	for (v = 0; v < m.nr_vcpus; v++)
		WRITE_ONCE(m.mb[v]->stop, 1);
	for (v = 0; v < m.nr_vcpus; v++) {
		CHECK_OK(pthread_join(m.thread[v], NULL));
		nr_guest_pages += m.mb[v]->done;
	}

	note("storm: see what is left", st->taken, 0, 0, 0);
	/* Guests that left because of a full ring come to their end first. */
	for (v = 0; v < m.nr_vcpus; v++) {
		while (!run_vcpu(v)) {
			for (s = 0; s < NR_SLOTS; s++)
				drain(s, fds[s]);
		}
		m.mb[v]->op = OP_NONE;
	}
	for (i = 0; i < nr_old; i++) {
		drain_dead(old[i][0], old[i][1]);
		close(old[i][1]);
	}
	for (s = 0; s < NR_SLOTS; s++) {
		heal(fds[s], true);
		drain(s, fds[s]);
		left = st->taken;
		drain(s, fds[s]);
		CHECK(st->taken == left, "slot %d: %lu pages left in the log", s,
		      st->taken - left);
		copy_pending(s);
		for (p = 0; p < sh->npages[s]; p++) {
			uint64_t *page = (uint64_t *)(memory[s] + p * PG);

			CHECK(sh->copy[s][p][0] == page[0] && sh->copy[s][p][1] == page[1],
			      "slot %d page %u was lost: the guest wrote %#lx, copied is %#lx; the host wrote %#lx, copied is %#lx",
			      s, p, page[0], sh->copy[s][p][0], page[1], sh->copy[s][p][1]);
		}
	}
	left = marks_left() - before + st->init_set;
	CHECK(st->taken <= left && (!st->exact || st->taken == left),
	      "%lu pages were marked, %lu taken", left, st->taken);
	in_storm = false;

	for (s = 0; s < NR_SLOTS; s++) {
		model_log_new(s);
		l = m.slot[s].log;
		memset(l->in, NO, sizeof(l->in));
		l->spill = false;
		close(fds[s]);
	}
	nr_ops += st->nr_actors * n;
	nr_storm_ops += st->nr_actors * n;
}

/* -- other threads and processes ------------------------------------------ */

static void serve(int ex, int sock)
{
	struct rpc *rpc = &sh->rpc[ex];
	struct actor *a;
	char tag;
	int fd;

	for (;;) {
		sem_down(&rpc->call);
		errno = 0;
		switch (rpc->what) {
		case RPC_IOCTL:
			rpc->ret = ioctl(rpc->fd, rpc->cmd, rpc->argp);
			break;
		case RPC_RECV:
			rpc->ret = recv_fd(sock, &tag, 0);
			break;
		case RPC_CLOSE:
			rpc->ret = close(rpc->fd);
			break;
		case RPC_STORM:
			a = rpc->argp;
			if (a) {
				a->sock = sock;
				act(a);
			} else {
				while ((fd = recv_fd(sock, &tag, MSG_DONTWAIT)) >= 0)
					close(fd);
			}
			break;
		}
		rpc->err = errno;
		sem_post(&rpc->answer);
	}
}

static void *thread_main(void *unused)
{
	serve(EX_THREAD, -1);
	return NULL;
}

/* Before there is a VM, so that peers have no share in it. */
static void start_peers(void)
{
	int i, sock[2];
	pid_t pid;

	for (i = 0; i < 2; i++) {
		CHECK_OK(sem_init(&sh->rpc[EX_PEER + i].call, 1, 0));
		CHECK_OK(sem_init(&sh->rpc[EX_PEER + i].answer, 1, 0));
		CHECK_OK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sock));
		fflush(NULL);
		pid = fork();
		CHECK(pid >= 0, "fork");
		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			signal(SIGTERM, SIG_DFL);
			close(sock[0]);
			serve(EX_PEER + i, sock[1]);
		}
		close(sock[1]);
		sh->peer_pid[i] = pid;
		m.sock[i] = sock[0];
	}
}

static void stop_peers(void)
{
	int i;

	for (i = 0; i < 2; i++) {
		kill(sh->peer_pid[i], SIGKILL);
		CHECK(waitpid(sh->peer_pid[i], NULL, 0) == sh->peer_pid[i], "waitpid");
		close(m.sock[i]);
	}
}

/* -- rounds --------------------------------------------------------------- */

static void tell(const char *what)
{
	if (opt.verbose)
		printf("# %ld s: round %lu, step %lu, %lu operations after %s\n",
		       time(NULL) - start_time, round_nr, step_nr, nr_ops, what);
}

static void run_round(void)
{
	static const uint32_t sizes[] = { 1, 2, 8, 64, 64, 256, 4096 };
	static const uint64_t manuals[] = {
		0, 0, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
		KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
	};
	static const unsigned int lengths[] = { 300, 1000, 3000, 10000 };
	int phases, s, v, nr_vcpus;
	unsigned int i, steps;
	struct mlog *l;

	memset(&m, 0, sizeof(m));
	step_nr = 0;
	start_peers();
	luck = mix(opt.seed ^ mix(round_nr));
	m.entries = sizes[below(ARRAY_SIZE(sizes))];
	/* A ring of one is full before the write that filled it is done. */
	m.exit_on_full = m.entries > 1 && once_in(3);
	m.manual = manuals[below(ARRAY_SIZE(manuals))];
	nr_vcpus = 1 + below(2);
	phases = 1 + below(4);
	note("round: entries, exit, manual, vCPUs", m.entries, m.exit_on_full, m.manual, nr_vcpus);

	m.vm = __vm_create(VM_SHAPE_DEFAULT, MAX_VCPUS, 0);
	dsr_enable(m.vm, m.entries, m.exit_on_full ? KVM_DIRTY_SLOT_RING_EXIT_ON_FULL : 0);
	if (m.manual)
		vm_enable_cap(m.vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, m.manual);
	for (s = 0; s < NR_SLOTS * 2; s++)
		virt_map_level(m.vm, SLOT_GVA(s / 2, s % 2), SLOT_GPA(s / 2, s % 2), WINDOW,
			       PG_LEVEL_2M);
	for (v = 0; v < nr_vcpus; v++) {
		add_vcpu();
		/*
		 * One by one they map what they have in common in slot 0: some
		 * emulators cannot do it at the same time.
		 */
		m.mb[v]->op = OP_NONE;
		CHECK(run_vcpu(v), "full ring");
	}
	for (s = 0; s < NR_SLOTS; s++) {
		m.slot[s].npages = some_size();
		m.slot[s].exists = true;
		set_slot(s, true);
		model_log_new(s);
	}

	for (; phases && nr_ops < opt.ops; phases--) {
		steps = lengths[below(ARRAY_SIZE(lengths))];
		for (i = 0; i < steps; i++)
			step(true);
		tell("steps");
		run_storm();
		tell("storm");
	}
	for (i = 0; i < 500; i++)
		step(true);

	/* The VM goes, its logs stay. */
	for (v = 0; v < m.nr_vcpus; v++)
		close(m.stats[v]);
	kvm_vm_free(m.vm);
	for (l = m.log; l < m.log + NR_LOGS; l++)
		l->dead = true;
	for (i = 0; i < 200; i++)
		step(false);
	for (l = m.log; l < m.log + NR_LOGS; l++) {
		if (!l->used)
			continue;
		harvest_all(l);
		if (log_count(l).yes)
			harvest_all(l);
		check_nothing_left(l);
		log_forget(l);
	}
	stop_peers();
}

/* -- main ----------------------------------------------------------------- */

static void *share(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	TEST_ASSERT(p != MAP_FAILED, "no memory");
	return p;
}

static void set_up(void)
{
	struct sigaction sa = { .sa_handler = on_term, .sa_flags = SA_RESTART };
	sigset_t all, before;
	pthread_t thread;
	int i, fd;

	sh = share(sizeof(*sh));
	sh->main_pid = getpid();
	check_report = report_failure;
	for (i = 0; i < NR_SLOTS; i++)
		memory[i] = share(MAX_PAGES * PG);

	fd = kvm_memfd_alloc(ARENA_PAGES * PG, false);
	arena = mmap(NULL, (ARENA_PAGES + 1) * PG, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(arena != MAP_FAILED, "no memory");
	arena = mmap(arena, ARENA_PAGES * PG, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		     fd, 0);
	arena_ro = mmap(NULL, ARENA_PAGES * PG, PROT_READ, MAP_SHARED, fd, 0);
	TEST_ASSERT(arena != MAP_FAILED && arena_ro != MAP_FAILED, "no memory");
	close(fd);

	sigaction(SIGTERM, &sa, NULL);
	/* Without SA_RESTART: it is there to interrupt system calls. */
	sa = (struct sigaction){ .sa_handler = on_usr1 };
	sigaction(SIGUSR1, &sa, NULL);

	sigfillset(&all);
	CHECK_OK(pthread_sigmask(SIG_SETMASK, &all, &before));
	CHECK_OK(pthread_create(&thread, NULL, watch, NULL));
	CHECK_OK(pthread_sigmask(SIG_SETMASK, &before, NULL));

	CHECK_OK(sem_init(&sh->rpc[EX_THREAD].call, 1, 0));
	CHECK_OK(sem_init(&sh->rpc[EX_THREAD].answer, 1, 0));
	CHECK_OK(pthread_create(&thread, NULL, thread_main, NULL));
}

static void help(FILE *to)
{
	fprintf(to,
		"usage: dirty_slot_ring_fuzz [-s SEED] [-n OPS] [-r ROUND] [-t SECONDS] [-B HOW] [-v]\n"
		"\n"
		"Random programs of calls on dirty slot rings, checked against a model.\n"
		"\n"
		"-s SEED     the same program again (default: a new one, printed)\n"
		"-n OPS      end after the round that reaches so many operations (default 100000)\n"
		"-r ROUND    begin with this round\n"
		"-t SECONDS  end after the round that takes so long, whatever -n says\n"
		"-v          a line for each round\n"
		"-B HOW      self-test: pretend a kernel that errs, and be sure to fail.\n"
		"            lose: HARVEST withholds a page; twice: it reports one again;\n"
		"            errno: EINVAL becomes success; lose-storm, twice-storm: only\n"
		"            where many work at once; hang: a vCPU never comes back, and 20 s\n"
		"            are enough to say so\n");
}

static uint64_t parse_u64(const char *s, char opt_char)
{
	char *end;
	uint64_t n;

	errno = 0;
	n = strtoull(s, &end, 0);
	if (errno || !*s || *end || *s == '-') {
		fprintf(stderr, "dirty_slot_ring_fuzz: -%c needs a number, not \"%s\"\n",
			opt_char, s);
		exit(2);
	}
	return n;
}

static void set_broken(char *how)
{
	static const char * const names[] = {
		[BREAK_LOSE] = "lose", [BREAK_TWICE] = "twice", [BREAK_ERRNO] = "errno",
		[BREAK_HANG] = "hang",
	};
	char *dash = strchr(how, '-');
	int i;

	if (dash && !strcmp(dash, "-storm")) {
		opt.storm_only = true;
		*dash = 0;
	}
	for (i = 1; i < ARRAY_SIZE(names); i++) {
		if (!strcmp(how, names[i]))
			opt.how = i;
	}
	if (!opt.how) {
		fprintf(stderr, "dirty_slot_ring_fuzz: -B %s? try -h\n", how);
		exit(2);
	}
}

int main(int argc, char *argv[])
{
	bool seeded = false;
	int c;

	while ((c = getopt(argc, argv, "s:n:r:t:B:vh")) != -1) {
		switch (c) {
		case 's':
			opt.seed = parse_u64(optarg, c);
			seeded = true;
			break;
		case 'n':
			opt.ops = parse_u64(optarg, c);
			break;
		case 'r':
			opt.first_round = parse_u64(optarg, c);
			break;
		case 't':
			opt.seconds = parse_u64(optarg, c);
			break;
		case 'B':
			set_broken(optarg);
			break;
		case 'v':
			opt.verbose = true;
			break;
		case 'h':
			help(stdout);
			return 0;
		default:
			help(stderr);
			return 2;
		}
	}
	if (optind != argc) {
		help(stderr);
		return 2;
	}
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_DIRTY_SLOT_RING));

	if (!seeded) {
		TEST_ASSERT(getrandom(&opt.seed, 4, 0) == 4, "getrandom");
		opt.seed &= 0xffffffff;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	start_time = time(NULL);
	printf("# seed %lu\n", opt.seed);
	set_up();

	for (round_nr = opt.first_round; nr_ops < opt.ops; round_nr++) {
		run_round();
		tell("the round");
		if (opt.seconds && time(NULL) - start_time >= opt.seconds)
			break;
	}
	printf("ok - seed %lu: %lu operations, %lu of them in %lu storms, ", opt.seed, nr_ops,
	       nr_storm_ops, nr_storms);
	printf("%lu guest accesses, %ld s\n", nr_guest_pages, time(NULL) - start_time);
	return 0;
}
