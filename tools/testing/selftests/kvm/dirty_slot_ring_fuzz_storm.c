// SPDX-License-Identifier: GPL-2.0-only
/*
 * The fuzzer of dirty slot rings: storms, when all are at it at once, and what must
 * be true when they are over.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dirty_slot_ring_fuzz.h"

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
	struct dsr_ring r;
	uint64_t reset;
	uint32_t i;

	CHECK_OK(ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info));
	for (i = 0; i < info.nr_rings; i++) {
		CHECK_OK(__dsr_map(fd, &info, i, &r));
		reset = dsr_reset_marker(&r);
		if (all || dsr_consumer(&r) - reset > dsr_producer(&r) - reset)
			dsr_set_consumer(&r, reset);
		dsr_unmap(&r);
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

/* The same of all slots: the pages, or -1 if it failed. */
static int64_t take_all(int fd, void *array, uint32_t capacity, bool faults, bool *more)
{
	struct kvm_dirty_vm_harvest args;
	struct kvm_dirty_vm_run run;
	uint64_t sum = 0;
	uint32_t i, s;

	args = (struct kvm_dirty_vm_harvest){
		.runs = (uintptr_t)array, .nr_runs = capacity,
		.flags = once_in(3) ? KVM_DIRTY_HARVEST_SYNC : 0,
	};
	*more = true;
	if (call(fd, KVM_DIRTY_VM_LOG_HARVEST, &args)) {
		/* Consumers that are out of bounds are no reason. */
		CHECK(errno == EINTR || (errno == EFAULT && faults), "VM_LOG_HARVEST failed");
		return -1;
	}
	for (i = 0; i < args.nr_runs; i++) {
		memcpy(&run, array + i * sizeof(run), sizeof(run));
		s = run.slot - FIRST_SLOT;
		CHECK(s < NR_SLOTS && run.npages &&
		      (uint64_t)run.offset + run.npages <= sh->npages[s],
		      "slot %u: run %u + %u", run.slot, run.offset, run.npages);
		copy_pages(s, run.offset, run.npages);
		sum += run.npages;
	}
	CHECK(sum == args.nr_pages, "%llu pages, in runs %lu", args.nr_pages, sum);
	add_taken(sum);
	*more = args.flags & KVM_DIRTY_HARVEST_MORE;
	return sum;
}

static void act_all(int fd, void *edge)
{
	static const uint32_t capacities[] = { 1, 2, 7, 64, 256, 256 };
	struct kvm_dirty_vm_run runs[256];
	uint32_t capacity = capacities[below(ARRAY_SIZE(capacities))];
	bool more;

	switch (sh->storm.faults ? below(16) : 2) {
	case 0:
		take_all(fd, (void *)KERNEL_ADDRESS, capacity, true, &more);
		break;
	case 1:
		take_all(fd, edge - below(64) * sizeof(runs[0]), capacity, true, &more);
		break;
	default:
		take_all(fd, runs, capacity, false, &more);
	}
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
	struct dsr_ring r;
	uint32_t p;

	CHECK_OK(ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info));
	if (!info.nr_rings)
		return;
	CHECK_OK(__dsr_map(fd, &info, below(info.nr_rings), &r));
	reset = dsr_reset_marker(&r);
	consumer = dsr_consumer(&r);
	producer = dsr_producer(&r);
	if (consumer - reset > producer - reset) {
		dsr_set_consumer(&r, dsr_reset_marker(&r));
	} else if (producer - consumer <= info.entries) {
		producer = consumer + below(producer - consumer + 1);
		for (i = consumer; i != producer; i++) {
			run = dsr_entry(&r, i);
			CHECK((uint64_t)run.offset + run.npages <= sh->npages[s], "entry %u + %u",
			      run.offset, run.npages);
			for (p = 0; p < run.npages; p++)
				sh->pending[s][run.offset + p] = 1;
		}
		dsr_set_consumer(&r, producer);
	}
	dsr_unmap(&r);
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
		p = mmap(NULL, n * PG, PROT_READ, MAP_SHARED, fd,
			 info.rings_offset + below(pages - n + 1) * PG);
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
	struct dsr_ring r;

	CHECK_OK(ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info));
	if (!info.nr_rings)
		return;
	CHECK_OK(__dsr_map(fd, &info, below(info.nr_rings), &r));
	dsr_set_consumer(&r, dsr_producer(&r) + (1ul << (32 + below(31))));
	usleep(below(100));
	dsr_unmap(&r);
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

void *act(void *arg)
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
		case A_ALL:
			act_all(a->fd[NR_SLOTS], edge + PG);
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
		KVM_DIRTY_SLOT_LOG_DISCARD, KVM_DIRTY_VM_LOG_HARVEST,
	};
	union {
		struct kvm_dirty_slot_runs runs;
		struct kvm_dirty_vm_harvest all;
	} args;
	pid_t pid = fork();
	void *p;
	int fd;

	CHECK(pid >= 0, "fork");
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGTERM, SIG_DFL);
	for (;;) {
		fd = fds[below(NR_SLOTS + 1)];
		memset(&args, once_in(2) ? rnd() : 0, sizeof(args));
		/* RESET's pad, or an unknown flag: never anything that works. */
		args.runs.flags = 1u << 31 | rnd();
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

void run_storm(void)
{
	struct storm *st = &sh->storm;
	int fds[NR_SLOTS + 1], old[MAX_CHANGES][2], nr_old = 0, i, s, v, ex;
	struct kvm_dirty_vm_run runs[256];
	bool changes = once_in(2);
	uint64_t before, left;
	bool more;
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
	fds[NR_SLOTS] = dup(m.all[0].fd[EX_MAIN]);
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
		for (s = 0; s <= NR_SLOTS; s++) {
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
		for (s = 0; s <= NR_SLOTS; s++)
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
	/* Nor is anything left for a file of all slots, of these or of others before. */
	do {
		left = take_all(fds[NR_SLOTS], runs, ARRAY_SIZE(runs), false, &more);
		CHECK(!left, "%lu pages left in the log of all slots", left);
	} while (more);
	close(fds[NR_SLOTS]);
	for (i = 0; i < NR_ALL; i++)
		m.all[i].layout = MAYBE;
	left = marks_left() - before + st->init_set;
	CHECK(st->taken <= left && (!st->exact || st->taken == left),
	      "%lu pages were marked, %lu taken", left, st->taken);
	in_storm = false;

	for (s = 0; s < NR_SLOTS; s++) {
		model_log_open(s);
		l = m.slot[s].log;
		memset(l->in, NO, sizeof(l->in));
		l->spill = false;
		close(fds[s]);
	}
	nr_ops += st->nr_actors * n;
	nr_storm_ops += st->nr_actors * n;
}
