// SPDX-License-Identifier: GPL-2.0-only
/*
 * All slots in one call, with each back end and with a kernel that has slot rings but no log of
 * all memslots.
 */
#include <poll.h>
#include "env.h"

/* What a harvest of all slots handed out. */
struct vm_seen {
	struct seen slot[NR_SLOTS];
	uint32_t log[NR_SLOTS];		/* the newest */
	int calls;
	int refuse_at, stop_at;		/* this call, counted from 1 */
};

static int vm_take(const struct kvmdirty_vm_run *run, void *arg)
{
	struct kvmdirty_run part = { run->offset, run->npages };
	struct vm_seen *seen = arg;

	CHECK(run->slot < NR_SLOTS, "slot %u", run->slot);
	CHECK(run->log, "log 0");
	if (++seen->calls == seen->refuse_at)
		return -EIO;
	see(&seen->slot[run->slot], &part);
	seen->log[run->slot] = run->log;
	return seen->calls == seen->stop_at;
}

/* All that there is; KVMDIRTY_VM_LAYOUT if it was said. */
static uint32_t vm_harvest(struct kvmdirty *kd, struct vm_seen *seen)
{
	struct kvmdirty_vm_result result;
	uint64_t pages = seen->slot[SLOT_MAIN].pages + seen->slot[SLOT_ODD].pages;

	CHECK_EQ(kvmdirty_vm_harvest(kd, vm_take, seen, 0, 0, &result), 0);
	CHECK_EQ(seen->slot[SLOT_MAIN].pages + seen->slot[SLOT_ODD].pages - pages,
		 result.nr_pages);
	return result.flags;
}

static uint32_t log_of(struct kvmdirty_slot *slot)
{
	struct kvmdirty_info info;

	CHECK_EQ(kvmdirty_info(slot, &info, sizeof(info)), 0);
	return info.log;
}

static void test_vm_exact(const void *mode)
{
	struct env *env = setup(mode);
	struct vm_seen seen = { 0 };
	struct kvmdirty_stats stats;
	struct seen one;

	CHECK(log_of(env->main) != log_of(env->odd), "both are log %u", log_of(env->main));
	CHECK_EQ(vm_harvest(env->kd, &seen), KVMDIRTY_VM_LAYOUT);
	CHECK_EQ(seen.calls, 0);

	write_pages(env, SLOT_MAIN, 5, 100, 3);
	write_pages(env, SLOT_MAIN, 5, 100, 3);
	write_pages(env, SLOT_ODD, 1, 33, 3);
	CHECK_EQ(vm_harvest(env->kd, &seen), 0);
	expect(&seen.slot[SLOT_MAIN], 5, 100, 3);
	expect(&seen.slot[SLOT_ODD], 1, 33, 3);
	CHECK_EQ(seen.slot[SLOT_CODE].pages, 0);
	CHECK_EQ(seen.log[SLOT_MAIN], log_of(env->main));
	CHECK_EQ(seen.log[SLOT_ODD], log_of(env->odd));
	kvmdirty_stats(env->odd, &stats, sizeof(stats));
	CHECK(stats.pages >= 33 && stats.runs >= 33, "%lu pages, %lu runs",
	      (unsigned long)stats.pages, (unsigned long)stats.runs);

	memset(&seen, 0, sizeof(seen));
	CHECK_EQ(vm_harvest(env->kd, &seen), 0);
	CHECK_EQ(seen.calls, 0);
	/* By itself or with the others, a page comes once. */
	write_pages(env, SLOT_MAIN, 0, 50, 1);
	write_pages(env, SLOT_ODD, 0, 50, 1);
	one = harvest(env->odd);
	expect(&one, 0, 50, 1);
	CHECK_EQ(kvmdirty_mark(env->odd, &(struct kvmdirty_run){ 70, 2 }, 1), 0);
	vm_harvest(env->kd, &seen);
	expect(&seen.slot[SLOT_MAIN], 0, 50, 1);
	expect(&seen.slot[SLOT_ODD], 70, 2, 1);
}

static void test_vm_bad_arguments(const void *mode)
{
	struct env *env = setup(mode);
	struct vm_seen seen = { 0 };
	struct kvmdirty *kd;
	int fd = kvmdirty_vm_fd(env->kd), slot_fd = kvmdirty_fd(env->main);

	CHECK_EQ(kvmdirty_vm_harvest(env->kd, NULL, NULL, 0, 0, NULL), -EINVAL);
	CHECK_EQ(kvmdirty_vm_harvest(env->kd, vm_take, &seen, 0, ~0U, NULL), -EINVAL);
	CHECK_EQ(kvmdirty_vm_attach(-1, &kd), -EBADF);
	CHECK_EQ(kvmdirty_vm_attach(env->vm.fd, &kd), -EINVAL);
	CHECK_EQ(kvmdirty_vm_attach(env->vm.kvm, &kd), -EINVAL);
	if (slot_fd >= 0)
		CHECK_EQ(kvmdirty_vm_attach(slot_fd, &kd), -EINVAL);
	if (env->mode->backend == KVMDIRTY_SLOT_RING && !env->mode->by_slot) {
		struct kvmdirty_slot *slot;

		CHECK(fd >= 0, "%d", fd);
		CHECK_EQ(kvmdirty_attach(fd, &slot), -EINVAL);
	} else {
		CHECK_EQ(fd, -EOPNOTSUPP);
	}
}

/* A budget at a time: nothing is lost, nothing comes twice, and no slot waits for ever. */
static void test_vm_budget(const void *mode)
{
	struct env *env = setup(mode);
	struct kvmdirty_vm_result result;
	struct vm_seen seen = { 0 };
	int r, calls = 0;

	write_pages(env, SLOT_MAIN, 0, 300, 1);
	write_pages(env, SLOT_ODD, 0, 50, 2);
	do {
		r = kvmdirty_vm_harvest(env->kd, vm_take, &seen, 7, 0, &result);
		CHECK(r >= 0, "%d", r);
		CHECK(result.nr_pages <= 7, "%lu", (unsigned long)result.nr_pages);
		calls++;
	} while (r);
	CHECK(calls >= 50, "%d calls", calls);
	expect(&seen.slot[SLOT_MAIN], 0, 300, 1);
	expect(&seen.slot[SLOT_ODD], 0, 50, 2);

	/* One keeps being written; the other gets its turn. */
	memset(&seen, 0, sizeof(seen));
	write_pages(env, SLOT_ODD, 0, 5, 1);
	for (calls = 0; calls < 200 && seen.slot[SLOT_ODD].pages < 5; calls++) {
		write_pages(env, SLOT_MAIN, 0, 20, 2);
		CHECK(kvmdirty_vm_harvest(env->kd, vm_take, &seen, 10, 0, NULL) >= 0, "?");
	}
	expect(&seen.slot[SLOT_ODD], 0, 5, 1);
}

static void test_vm_refuses(const void *mode)
{
	struct env *env = setup(mode);
	struct kvmdirty_vm_result result;
	struct vm_seen seen = { .refuse_at = 4 }, more = { 0 };
	struct seen main;
	uint32_t i;

	write_pages(env, SLOT_MAIN, 0, 20, 2);
	write_pages(env, SLOT_ODD, 0, 20, 2);
	CHECK_EQ(kvmdirty_vm_harvest(env->kd, vm_take, &seen, 0, 0, &result), -EIO);
	CHECK_EQ(result.nr_runs, 3);
	seen.stop_at = 6;
	CHECK_EQ(kvmdirty_vm_harvest(env->kd, vm_take, &seen, 0, 0, &result), 1);
	CHECK_EQ(result.nr_runs, 2);
	/* The rest, of one slot by itself, and of all that have some. */
	main = harvest(env->main);
	vm_harvest(env->kd, &more);
	CHECK_EQ(more.slot[SLOT_MAIN].pages, 0);
	for (i = 0; i < MAIN_PAGES; i++) {
		main.page[i] += seen.slot[SLOT_MAIN].page[i];
		more.slot[SLOT_ODD].page[i] += seen.slot[SLOT_ODD].page[i];
	}
	main.pages += seen.slot[SLOT_MAIN].pages;
	more.slot[SLOT_ODD].pages += seen.slot[SLOT_ODD].pages;
	expect(&main, 0, 20, 2);
	expect(&more.slot[SLOT_ODD], 0, 20, 2);
}

/* A memslot is stopped, deleted and made anew; its numbers tell which is which. */
static void test_vm_come_and_go(const void *mode)
{
	struct env *env = setup(mode);
	struct kvm_userspace_memory_region *odd = &env->vm.region[SLOT_ODD];
	struct kvm_userspace_memory_region gone = *odd;
	struct vm_seen seen = { 0 };
	uint32_t log = log_of(env->odd);

	CHECK_EQ(vm_harvest(env->kd, &seen), KVMDIRTY_VM_LAYOUT);
	write_pages(env, SLOT_ODD, 0, 40, 2);
	write_pages(env, SLOT_MAIN, 0, 10, 1);
	CHECK_EQ(kvmdirty_stop(env->odd, odd), 0);
	gone.memory_size = 0;
	CHECK_EQ(ioctl(env->vm.fd, KVM_SET_USER_MEMORY_REGION, &gone), 0);
	CHECK_EQ(vm_harvest(env->kd, &seen), 0);
	expect(&seen.slot[SLOT_ODD], 0, 40, 2);
	expect(&seen.slot[SLOT_MAIN], 0, 10, 1);
	CHECK_EQ(seen.log[SLOT_ODD], log);
	memset(&seen, 0, sizeof(seen));
	CHECK_EQ(vm_harvest(env->kd, &seen), 0);
	CHECK_EQ(seen.calls, 0);
	CHECK_EQ(kvmdirty_untrack(env->odd, 0), 0);
	CHECK_EQ(vm_harvest(env->kd, &seen), KVMDIRTY_VM_LAYOUT);

	odd->flags = 0;
	CHECK_EQ(ioctl(env->vm.fd, KVM_SET_USER_MEMORY_REGION, odd), 0);
	CHECK_EQ(kvmdirty_track(env->kd, odd, &env->odd), 0);
	CHECK(log_of(env->odd) != log, "log %u again", log);
	write_pages(env, SLOT_ODD, 0, ODD_PAGES, 1);
	CHECK_EQ(vm_harvest(env->kd, &seen), KVMDIRTY_VM_LAYOUT);
	memset(&seen, 0, sizeof(seen));
	write_pages(env, SLOT_ODD, 0, 30, 3);
	CHECK_EQ(vm_harvest(env->kd, &seen), 0);
	expect(&seen.slot[SLOT_ODD], 0, 30, 3);
	CHECK_EQ(seen.log[SLOT_ODD], log_of(env->odd));
}

/* What was logged, and stopped, before the first harvest of all slots. */
static void test_vm_stopped_before(const void *mode)
{
	struct env *env = setup(mode);
	struct vm_seen seen = { 0 };

	write_pages(env, SLOT_MAIN, 3, 600, 1);
	write_pages(env, SLOT_ODD, 0, 40, 2);
	CHECK_EQ(kvmdirty_stop(env->main, &env->vm.region[SLOT_MAIN]), 0);
	vm_harvest(env->kd, &seen);
	expect(&seen.slot[SLOT_MAIN], 3, 600, 1);
	expect(&seen.slot[SLOT_ODD], 0, 40, 2);
	CHECK_EQ(kvmdirty_harvest(env->main, &(struct kvmdirty_run){ 0 }, 1, 0, NULL), -ENODEV);
}

struct again {
	struct env *env;
	struct vm_seen seen;
	int calls;
};

static int vm_write_again(const struct kvmdirty_vm_run *run, void *arg)
{
	struct again *again = arg;

	if (!again->calls++)
		write_pages(again->env, run->slot, run->offset, run->npages, 1);
	return vm_take(run, &again->seen);
}

/* What the guest writes to a page that was handed out is in a later harvest. */
static void test_vm_rearmed(const void *mode)
{
	struct env *env = setup(mode);
	struct again again = { .env = env };
	struct vm_seen seen = { 0 };

	write_pages(env, SLOT_ODD, 20, 1, 1);
	CHECK(kvmdirty_vm_harvest(env->kd, vm_write_again, &again, 1, 0, NULL) >= 0, "?");
	CHECK_EQ(again.seen.slot[SLOT_ODD].page[20], 1);
	vm_harvest(env->kd, &seen);
	expect(&seen.slot[SLOT_ODD], 20, 1, 1);
}

struct calls_back {
	struct env *env;
	int calls, vm, untrack, other;
};

static int vm_call_back(const struct kvmdirty_vm_run *run, void *arg)
{
	struct calls_back *c = arg;
	bool main = run->slot == SLOT_MAIN;

	if (c->calls++)
		return 0;
	c->vm = kvmdirty_vm_harvest(c->env->kd, vm_call_back, c, 0, 0, NULL);
	c->untrack = kvmdirty_untrack(main ? c->env->main : c->env->odd, KVMDIRTY_UNTRACK_DROP);
	c->other = kvmdirty_untrack(main ? c->env->odd : c->env->main, KVMDIRTY_UNTRACK_DROP);
	return 0;
}

static void test_vm_calls_back(const void *mode)
{
	struct env *env = setup(mode);
	struct calls_back c = { .env = env };

	write_pages(env, SLOT_MAIN, 0, 10, 2);
	write_pages(env, SLOT_ODD, 0, 10, 2);
	CHECK_EQ(kvmdirty_vm_harvest(env->kd, vm_call_back, &c, 0, 0, NULL), 0);
	CHECK_EQ(c.vm, -EDEADLK);
	CHECK_EQ(c.untrack, -EDEADLK);
	/* The other is gone in the midst of it, with its pages. */
	CHECK_EQ(c.other, 0);
	CHECK_EQ(c.calls, 10);
}

struct untracker {
	struct kvmdirty_slot *slot;
	bool begun, done;
	pthread_t thread;
};

static void *untrack_thread(void *arg)
{
	struct untracker *u = arg;

	CHECK_EQ(kvmdirty_untrack(u->slot, KVMDIRTY_UNTRACK_DROP), 0);
	__atomic_store_n(&u->done, true, __ATOMIC_RELEASE);
	return NULL;
}

/* With a slot in the library's hands, another thread frees it, which has to wait. */
static int vm_untrack_meanwhile(const struct kvmdirty_vm_run *run, void *arg)
{
	struct untracker *u = arg;

	(void)run;
	if (!u->begun) {
		u->begun = true;
		CHECK_EQ(pthread_create(&u->thread, NULL, untrack_thread, u), 0);
		poll(NULL, 0, 100);
	}
	CHECK(!__atomic_load_n(&u->done, __ATOMIC_ACQUIRE), "freed in the midst of a harvest");
	return 0;
}

static void test_vm_untracked_meanwhile(const void *mode)
{
	struct env *env = setup(mode);
	struct untracker u = { .slot = env->main };
	struct vm_seen seen = { 0 };

	write_pages(env, SLOT_MAIN, 0, 10, 2);
	CHECK(kvmdirty_vm_harvest(env->kd, vm_untrack_meanwhile, &u, 5, 0, NULL) >= 0, "?");
	CHECK_EQ(pthread_join(u.thread, NULL), 0);
	write_pages(env, SLOT_ODD, 0, 10, 2);
	vm_harvest(env->kd, &seen);
	CHECK_EQ(seen.slot[SLOT_MAIN].pages, 0);
	expect(&seen.slot[SLOT_ODD], 0, 10, 2);
}

/* A page goes to one of two who harvest at once. */
struct harvester {
	struct env *env;
	struct vm_seen seen;
	int go, done;		/* rounds */
};

#define HARVEST_ROUNDS	20

static void *by_slot_thread(void *arg)
{
	struct harvester *h = arg;
	int round;

	for (round = 1; round <= HARVEST_ROUNDS; round++) {
		while (__atomic_load_n(&h->go, __ATOMIC_ACQUIRE) < round)
			poll(NULL, 0, 1);
		CHECK_EQ(harvest_some(h->env->main, &h->seen.slot[SLOT_MAIN], 3), 0);
		__atomic_store_n(&h->done, round, __ATOMIC_RELEASE);
	}
	return NULL;
}

static void test_vm_two_harvesters(const void *mode)
{
	struct env *env = setup(mode);
	struct harvester h = { .env = env };
	struct vm_seen seen = { 0 };
	pthread_t thread;
	uint32_t i;
	int round;

	CHECK_EQ(pthread_create(&thread, NULL, by_slot_thread, &h), 0);
	for (round = 1; round <= HARVEST_ROUNDS; round++) {
		write_pages(env, SLOT_MAIN, 0, 200, 5);
		write_pages(env, SLOT_ODD, 0, 20, 5);
		/* Nobody writes now: what is re-armed before it is written comes twice. */
		__atomic_store_n(&h.go, round, __ATOMIC_RELEASE);
		vm_harvest(env->kd, &seen);
		while (__atomic_load_n(&h.done, __ATOMIC_ACQUIRE) < round)
			poll(NULL, 0, 1);
	}
	CHECK_EQ(pthread_join(thread, NULL), 0);
	for (i = 0; i < MAIN_PAGES; i++)
		CHECK_EQ(seen.slot[SLOT_MAIN].page[i] + h.seen.slot[SLOT_MAIN].page[i],
			 i % 5 || i >= 1000 ? 0 : HARVEST_ROUNDS);
	for (i = 0; i < ODD_PAGES; i++)
		CHECK_EQ(seen.slot[SLOT_ODD].page[i], i % 5 ? 0 : HARVEST_ROUNDS);
}

struct vm_copier {
	const struct env *env;
	uint8_t *copy;
};

static int vm_copy(const struct kvmdirty_vm_run *run, void *arg)
{
	struct vm_copier *c = arg;

	if (run->slot == SLOT_MAIN)
		memcpy(c->copy + run->offset * PAGE, c->env->vm.mem[SLOT_MAIN] + run->offset * PAGE,
		       run->npages * PAGE);
	return 0;
}

/* vCPUs write at random; the copy is complete when they have stopped. */
static void test_vm_running(const void *mode)
{
	struct env *env = setup(mode);
	struct vm_copier c = { .env = env, .copy = malloc(MAIN_PAGES * PAGE) };
	pthread_t thread[2];
	int i, r;

	add_vcpu(env);
	memcpy(c.copy, env->vm.mem[SLOT_MAIN], MAIN_PAGES * PAGE);
	start_random(env, thread, 2);
	for (i = 0; i < 200; i++) {
		r = kvmdirty_vm_harvest(env->kd, vm_copy, &c, i % 3 ? 0 : 100, 0, NULL);
		CHECK(r >= 0 || r == -EINTR, "%d", r);
	}
	stop_random(env, thread, 2);
	do {
		r = kvmdirty_vm_harvest(env->kd, vm_copy, &c, 0, 0, NULL);
	} while (r > 0);
	CHECK_EQ(r, 0);
	CHECK(!memcmp(c.copy, env->vm.mem[SLOT_MAIN], MAIN_PAGES * PAGE), "the copy differs");
}

/* An error of KVM's comes to the caller, and loses nothing. */
static void test_vm_failing_ioctls(const void *mode)
{
	static const int errors[] = { EINTR, ENOMEM };
	struct env *env = setup(mode);
	struct vm_seen seen = { 0 };
	unsigned long request;
	size_t i;
	int r;

	request = env->mode->backend == KVMDIRTY_RING ? KVM_RESET_DIRTY_RINGS :
		  env->mode->backend == KVMDIRTY_BITMAP ? KVM_GET_DIRTY_LOG :
		  env->mode->by_slot ? KVM_DIRTY_SLOT_LOG_HARVEST : KVM_DIRTY_VM_LOG_HARVEST;
	for (i = 0; i < ARRAY_SIZE(errors); i++) {
		memset(&seen, 0, sizeof(seen));
		write_pages(env, SLOT_MAIN, 0, 700, 1);
		write_pages(env, SLOT_ODD, 0, 20, 1);
		fail_ioctl(request, 0, 1, errors[i]);
		r = kvmdirty_vm_harvest(env->kd, vm_take, &seen, 0, 0, NULL);
		CHECK_EQ(r, -errors[i]);
		vm_harvest(env->kd, &seen);
		expect(&seen.slot[SLOT_MAIN], 0, 700, 1);
		expect(&seen.slot[SLOT_ODD], 0, 20, 1);
	}
	/* The log of all memslots cannot be opened: it is said, and tried again. */
	if (env->mode->backend == KVMDIRTY_SLOT_RING && !env->mode->by_slot) {
		env = setup(mode);
		fail_ioctl(KVM_GET_DIRTY_SLOT_LOG_FD, 0, 1, EMFILE);
		CHECK_EQ(kvmdirty_vm_harvest(env->kd, vm_take, &seen, 0, 0, NULL), -EMFILE);
		CHECK(kvmdirty_vm_fd(env->kd) >= 0, "?");
	}
}

/* Memslots that the library does not know do not come; one system call is enough. */
static void test_vm_one_call(const void *mode)
{
	struct env *env = setup(mode);
	bool vm_log = env->mode->backend == KVMDIRTY_SLOT_RING && !env->mode->by_slot;
	struct kvmdirty_vm_stats before, after;
	struct kvmdirty_stats main, main_after;
	struct vm_seen seen = { 0 };

	vm_harvest(env->kd, &seen);
	write_pages(env, SLOT_MAIN, 0, 100, 1);
	write_pages(env, SLOT_ODD, 0, 20, 1);
	kvmdirty_stats(env->main, &main, sizeof(main));
	kvmdirty_vm_stats(env->kd, &before, sizeof(before));
	vm_harvest(env->kd, &seen);
	kvmdirty_vm_stats(env->kd, &after, sizeof(after));
	kvmdirty_stats(env->main, &main_after, sizeof(main_after));
	CHECK_EQ(after.harvests - before.harvests, 1);
	CHECK_EQ(after.ioctls - before.ioctls, vm_log);
	CHECK_EQ(main_after.pages - main.pages, 100);
	if (vm_log)
		CHECK_EQ(main_after.ioctls, main.ioctls);

	/* Of a slot that is not tracked any more: stray, with slot rings and the ring. */
	CHECK_EQ(kvmdirty_untrack(env->odd, KVMDIRTY_UNTRACK_DROP), 0);
	memset(&seen, 0, sizeof(seen));
	write_pages(env, SLOT_ODD, 0, 20, 1);
	write_pages(env, SLOT_MAIN, 0, 10, 1);
	vm_harvest(env->kd, &seen);
	expect(&seen.slot[SLOT_MAIN], 0, 10, 1);
	CHECK_EQ(seen.slot[SLOT_ODD].pages, 0);
	kvmdirty_vm_stats(env->kd, &after, sizeof(after));
	if (vm_log || env->mode->backend == KVMDIRTY_RING)
		CHECK_EQ(after.stray - before.stray, 20);
}

/* --- From another process --------------------------------------------------- */

/* What it does for a byte, and answers with what was seen. */
enum { ASK_HARVEST = 'h', ASK_REFUSE = 'r', ASK_END = 'e' };

struct answer {
	struct vm_seen seen;
	int ret;
	uint32_t flags;
};

static void attached(int sock)
{
	struct kvm_userspace_memory_region region = { .memory_size = PAGE };
	struct kvmdirty_vm_result result;
	struct kvmdirty_slot *slot;
	struct answer answer;
	struct kvmdirty *kd;
	char byte;
	int fd;

	fd = receive_fd(sock);
	CHECK_EQ(kvmdirty_vm_attach(fd, &kd), 0);
	close(fd);	/* the library has its own */
	CHECK_EQ(kvmdirty_backend(kd), KVMDIRTY_SLOT_RING);
	CHECK_EQ(kvmdirty_track(kd, &region, &slot), -EOPNOTSUPP);
	CHECK_EQ(kvmdirty_add_vcpu(kd, sock), -EOPNOTSUPP);
	CHECK(kvmdirty_vm_fd(kd) >= 0, "?");
	while (read(sock, &byte, 1) == 1 && byte != ASK_END) {
		memset(&answer, 0, sizeof(answer));
		if (byte == ASK_REFUSE)
			answer.seen.refuse_at = 3;
		answer.ret = kvmdirty_vm_harvest(kd, vm_take, &answer.seen, 0, 0, &result);
		answer.flags = result.flags;
		CHECK_EQ(write(sock, &answer, sizeof(answer)), sizeof(answer));
	}
	kvmdirty_close(kd);
}

static struct answer vm_ask(int sock, char byte)
{
	struct answer answer;

	ask(sock, byte, &answer, sizeof(answer));
	return answer;
}

static void test_vm_attach(const void *mode)
{
	struct env *env = setup(mode);
	struct kvm_userspace_memory_region *odd = &env->vm.region[SLOT_ODD];
	struct kvm_userspace_memory_region gone = *odd;
	int sock, fd = kvmdirty_vm_fd(env->kd);
	struct answer a, b;
	uint32_t i, log;
	pid_t pid;

	if (env->mode->backend != KVMDIRTY_SLOT_RING || env->mode->by_slot) {
		CHECK_EQ(fd, -EOPNOTSUPP);
		return;
	}
	sock = other_process(attached, &pid);
	send_fd(sock, fd);
	write_pages(env, SLOT_MAIN, 7, 30, 9);
	write_pages(env, SLOT_ODD, 0, 20, 4);
	a = vm_ask(sock, ASK_HARVEST);
	CHECK_EQ(a.ret, 0);
	CHECK_EQ(a.flags, KVMDIRTY_VM_LAYOUT);
	expect(&a.seen.slot[SLOT_MAIN], 7, 30, 9);
	expect(&a.seen.slot[SLOT_ODD], 0, 20, 4);
	CHECK_EQ(a.seen.log[SLOT_ODD], log_of(env->odd));
	a = vm_ask(sock, ASK_HARVEST);
	CHECK_EQ(a.ret, 0);
	CHECK_EQ(a.flags, 0);
	CHECK_EQ(a.seen.calls, 0);

	/* What it refused comes to it again. */
	write_pages(env, SLOT_MAIN, 7, 30, 9);
	a = vm_ask(sock, ASK_REFUSE);
	CHECK_EQ(a.ret, -EIO);
	b = vm_ask(sock, ASK_HARVEST);
	CHECK_EQ(b.ret, 0);
	for (i = 0; i < MAIN_PAGES; i++)
		b.seen.slot[SLOT_MAIN].page[i] += a.seen.slot[SLOT_MAIN].page[i];
	b.seen.slot[SLOT_MAIN].pages += a.seen.slot[SLOT_MAIN].pages;
	CHECK_EQ(a.seen.slot[SLOT_MAIN].pages, 2);
	expect(&b.seen.slot[SLOT_MAIN], 7, 30, 9);

	/* A memslot is deleted with what it has, and made anew. */
	log = log_of(env->odd);
	write_pages(env, SLOT_ODD, 0, 20, 4);
	gone.memory_size = 0;
	CHECK_EQ(ioctl(env->vm.fd, KVM_SET_USER_MEMORY_REGION, &gone), 0);
	a = vm_ask(sock, ASK_HARVEST);
	CHECK_EQ(a.ret, 0);
	CHECK_EQ(a.flags, KVMDIRTY_VM_LAYOUT);
	expect(&a.seen.slot[SLOT_ODD], 0, 20, 4);
	CHECK_EQ(a.seen.log[SLOT_ODD], log);
	CHECK_EQ(kvmdirty_untrack(env->odd, KVMDIRTY_UNTRACK_DROP), 0);
	odd->flags = KVM_MEM_LOG_DIRTY_PAGES;
	CHECK_EQ(ioctl(env->vm.fd, KVM_SET_USER_MEMORY_REGION, odd), 0);
	write_pages(env, SLOT_ODD, 0, 20, 4);
	a = vm_ask(sock, ASK_HARVEST);
	CHECK_EQ(a.flags, KVMDIRTY_VM_LAYOUT);
	CHECK(a.seen.log[SLOT_ODD] > log, "log %u after %u", a.seen.log[SLOT_ODD], log);
	for (i = 0; i < 80; i += 4)
		CHECK_EQ(a.seen.slot[SLOT_ODD].page[i], 1);
	CHECK_EQ(write(sock, &(char){ ASK_END }, 1), 1);
	end_of(pid);
}

/* poll() wakes up for any slot, and says when the VM is gone. */
static void test_vm_poll(const void *mode)
{
	const struct mode *m = mode;
	struct env *env = setup_entries(mode, m->backend == KVMDIRTY_SLOT_RING ? FEW_ENTRIES :
					      MANY_ENTRIES);
	struct pollfd p = { .fd = kvmdirty_vm_fd(env->kd), .events = POLLIN };
	struct vm_seen seen = { 0 };

	if (m->backend != KVMDIRTY_SLOT_RING || m->by_slot) {
		CHECK_EQ(p.fd, -EOPNOTSUPP);
		return;
	}
	write_pages(env, SLOT_MAIN, 0, 10, 1);
	CHECK_EQ(poll(&p, 1, 0), 0);
	write_pages(env, SLOT_ODD, 0, ODD_PAGES, 1);
	CHECK_EQ(poll(&p, 1, 5000), 1);
	CHECK_EQ(p.revents, POLLIN);
	vm_harvest(env->kd, &seen);
	expect(&seen.slot[SLOT_MAIN], 0, 10, 1);
	expect(&seen.slot[SLOT_ODD], 0, ODD_PAGES, 1);
	CHECK_EQ(poll(&p, 1, 0), 0);
}

const struct test_case vm_cases[] = {
	{ .name = "vm_exact", .fn = test_vm_exact },
	{ .name = "vm_bad_arguments", .fn = test_vm_bad_arguments },
	{ .name = "vm_budget", .fn = test_vm_budget },
	{ .name = "vm_refuses", .fn = test_vm_refuses },
	{ .name = "vm_come_and_go", .fn = test_vm_come_and_go },
	{ .name = "vm_stopped_before", .fn = test_vm_stopped_before },
	{ .name = "vm_rearmed", .fn = test_vm_rearmed },
	{ .name = "vm_calls_back", .fn = test_vm_calls_back },
	{ .name = "vm_untracked_meanwhile", .fn = test_vm_untracked_meanwhile },
	{ .name = "vm_two_harvesters", .fn = test_vm_two_harvesters },
	{ .name = "vm_running", .fn = test_vm_running },
	{ .name = "vm_failing_ioctls", .fn = test_vm_failing_ioctls },
	{ .name = "vm_one_call", .fn = test_vm_one_call },
	{ .name = "vm_attach", .fn = test_vm_attach },
	{ .name = "vm_poll", .fn = test_vm_poll },
	{ .name = NULL },
};

/* --- Without KVM ------------------------------------------------------------ */

static void fake_run(uint32_t slot, uint32_t log, uint32_t offset, uint32_t npages)
{
	fake_vm_runs[nr_fake_vm_runs++] = (struct kvm_dirty_vm_run){ slot, log, offset, npages };
}

/* Runs go to the slots whose logs they name, also if they are not wanted at first. */
static void test_vm_fake(const void *unused)
{
	struct kvm_userspace_memory_region main = {
		.slot = SLOT_MAIN, .memory_size = MAIN_PAGES * PAGE,
	};
	struct kvm_userspace_memory_region odd = {
		.slot = SLOT_ODD, .memory_size = ODD_PAGES * PAGE,
	};
	struct kvmdirty_slot *main_slot, *odd_slot;
	struct vm_seen seen = { .refuse_at = 2 };
	struct kvmdirty_vm_stats stats;
	struct kvmdirty *kd;

	(void)unused;
	fake_kvm = true;
	CHECK_EQ(kvmdirty_open(dup(STDOUT_FILENO), NULL, &kd), 0);
	CHECK_EQ(kvmdirty_track(kd, &main, &main_slot), 0);
	CHECK_EQ(kvmdirty_track(kd, &odd, &odd_slot), 0);
	CHECK_EQ(log_of(odd_slot), FAKE_LOG + SLOT_ODD);
	fake_run(SLOT_MAIN, FAKE_LOG + SLOT_MAIN, 0, 3);
	fake_run(SLOT_MAIN, FAKE_LOG + SLOT_MAIN, 10, 5);
	fake_run(SLOT_ODD, FAKE_LOG - 1, 0, 7);		/* it had this one before */
	fake_run(SLOT_ODD, FAKE_LOG + SLOT_ODD, 20, 2);
	CHECK_EQ(kvmdirty_vm_harvest(kd, vm_take, &seen, 0, 0, NULL), -EIO);
	expect(&seen.slot[SLOT_MAIN], 0, 3, 1);
	CHECK_EQ(seen.slot[SLOT_ODD].pages, 0);
	memset(&seen, 0, sizeof(seen));
	CHECK_EQ(kvmdirty_vm_harvest(kd, vm_take, &seen, 6, 0, NULL), 1);
	CHECK_EQ(kvmdirty_vm_harvest(kd, vm_take, &seen, 0, 0, NULL), 0);
	expect(&seen.slot[SLOT_MAIN], 10, 5, 1);
	expect(&seen.slot[SLOT_ODD], 20, 2, 1);
	kvmdirty_vm_stats(kd, &stats, sizeof(stats));
	CHECK_EQ(stats.stray, 7);
	kvmdirty_close(kd);
}

/* Attached, with slots that come and go: what is refused comes again, in its order. */
static void test_vm_attach_fake(const void *unused)
{
	struct vm_seen seen = { .refuse_at = 2 };
	struct kvmdirty_vm_result result;
	struct kvmdirty *kd;

	(void)unused;
	fake_kvm = true;
	CHECK_EQ(kvmdirty_vm_attach(STDOUT_FILENO, &kd), 0);
	fake_vm_flags = KVM_DIRTY_HARVEST_LAYOUT;
	fake_run(SLOT_MAIN, 7, 0, 3);
	fake_run(SLOT_ODD, 8, 10, 5);
	fake_run(SLOT_ODD, 9, 30, 1);
	CHECK_EQ(kvmdirty_vm_harvest(kd, vm_take, &seen, 0, 0, &result), -EIO);
	CHECK_EQ(result.nr_pages, 3);
	CHECK_EQ(result.flags, KVMDIRTY_VM_LAYOUT);
	fake_vm_flags = KVM_DIRTY_HARVEST_LAYOUT;
	fake_run(SLOT_MAIN, 10, 99, 1);
	CHECK_EQ(kvmdirty_vm_harvest(kd, vm_take, &seen, 4, 0, &result), 1);
	CHECK_EQ(result.nr_pages, 4);
	CHECK_EQ(result.flags, 0);
	CHECK_EQ(seen.log[SLOT_ODD], 8);
	CHECK_EQ(kvmdirty_vm_harvest(kd, vm_take, &seen, 0, 0, &result), 0);
	CHECK_EQ(result.nr_pages, 3);
	CHECK_EQ(result.flags, KVMDIRTY_VM_LAYOUT);
	CHECK_EQ(seen.log[SLOT_ODD], 9);
	CHECK_EQ(seen.log[SLOT_MAIN], 10);
	CHECK_EQ(kvmdirty_vm_harvest(kd, vm_take, &seen, 0, 0, &result), 0);
	CHECK_EQ(result.nr_pages, 0);
	CHECK_EQ(result.flags, 0);
	kvmdirty_close(kd);
}

const struct test_case vm_once_cases[] = {
	{ .name = "vm_fake", .fn = test_vm_fake },
	{ .name = "vm_attach_fake", .fn = test_vm_attach_fake },
	{ .name = NULL },
};
