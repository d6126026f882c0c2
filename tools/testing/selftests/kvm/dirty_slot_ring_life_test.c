// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings: slots, vCPUs, VMs, descriptors and processes that come and
 * go while there is a log.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dirty_slot_ring_test.h"

TEST(slot_deleted)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr old;

	guest_write(v, 0, 2, 150);
	vm_mem_region_delete(v->vm, TEST_SLOT);
	CHECK_ERR(__dsr_open(v->vm, TEST_SLOT), ENOENT);
	check_dead(v, 2, 150, MANY_RUNS);

	/* Made again it has a log of its own; the old one stays dead. */
	old = *v;
	vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, TEST_GPA, TEST_SLOT,
				    v->npages, KVM_MEM_LOG_DIRTY_PAGES);
	v->fd = dsr_open(v->vm, TEST_SLOT);
	CHECK_EQ(dsr_info(v->fd).flags, 0);
	guest_write(v, 0, 5, 100);
	check_dead(&old, 0, 0, 1);
	close(old.fd);
	expect(v, 5, 100);

	/* one run at a time, when dead */
	guest_write(v, 0, 5, 100);
	vm_mem_region_delete(v->vm, TEST_SLOT);
	check_dead(v, 5, 100, 1);
	dsr_free(v);
}

TEST(slot_deleted_empty)
{
	struct dsr *v = dsr_new(.nr_vcpus = 1);

	vm_mem_region_delete(v->vm, TEST_SLOT);
	check_dead(v, 0, 0, 1);
	dsr_free(v);
}

TEST(logging_off_and_on)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr old;
	int i;

	for (i = 0; i < 3; i++) {
		guest_write(v, 0, 10, 100);
		dsr_log(v, false);
		/* not logged by anyone */
		guest_write(v, 0, 0, v->npages);
		old = *v;
		v->fd = -1;
		dsr_log(v, true);
		dsr_reopen(v);
		guest_write(v, 0, 200, 30);
		check_dead(&old, 10, 100, MANY_RUNS);
		close(old.fd);
		expect(v, 200, 30);
	}
	dsr_free(v);
}

static void *manual_thread(void *arg)
{
	uint64_t both = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
	struct taker *t = arg;
	int i;

	for (i = 0; !READ_ONCE(t->stop); i++) {
		if (!__vm_enable_cap(t->v->vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, i % 2 ? both : 0))
			t->nr++;
		else
			CHECK(errno == EBUSY, "the capability cannot be changed");
	}
	return NULL;
}

/* All pages start dirty, or all are protected; never neither. */
TEST(logging_on_while_manual_protect_changes)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct taker t = { .v = v };
	pthread_t thread;
	uint8_t *got;
	int i, p;

	CHECK_OK(pthread_create(&thread, NULL, manual_thread, &t));
	for (i = 0; i < rounds(200); i++) {
		dsr_log(v, false);
		dsr_log(v, true);
		dsr_reopen(v);
		guest_write(v, 0, 7, 90);
		got = set_new(v);
		harvest_cap(v->fd, got, v->npages, 0, MANY_RUNS);
		for (p = 7; p < 97; p++)
			CHECK(got[p], "page %d is lost, the %dth time", p, i + 1);
		free(got);
	}
	WRITE_ONCE(t.stop, true);
	CHECK_OK(pthread_join(thread, NULL));
	TH_LOG("changed %lu times", t.nr);
	dsr_free(v);
}

/*
 * Pages that started dirty are not protected when logging begins: a change while
 * there is a log would have them taken for pages that were.
 */
TEST(manual_protect_cannot_change_while_logging)
{
	uint64_t both = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
	const uint64_t values[] = { 0, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, both };
	uint32_t cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1, .no_log = true);
	int i, k;

	for (i = 0; i < ARRAY_SIZE(values); i++) {
		CHECK_OK(__vm_enable_cap(v->vm, cap, values[i]));
		dsr_log(v, true);
		dsr_reopen(v);
		for (k = 0; k < ARRAY_SIZE(values); k++) {
			if (k != i)
				CHECK_ERR(__vm_enable_cap(v->vm, cap, values[k]), EBUSY);
		}
		/* What it is already, it may be told again; what is no value stays none. */
		CHECK_OK(__vm_enable_cap(v->vm, cap, values[i]));
		CHECK_ERR(__vm_enable_cap(v->vm, cap, 4), EINVAL);
		CHECK_ERR(__vm_enable_cap(v->vm, cap, KVM_DIRTY_LOG_INITIALLY_SET), EINVAL);
		if (values[i] == both)
			expect(v, 0, v->npages);
		expect_armed(v, 7, 90);
		dsr_log(v, false);
		for (k = 0; k < ARRAY_SIZE(values); k++)
			CHECK_OK(__vm_enable_cap(v->vm, cap, values[k]));
	}
	dsr_free(v);

	/* Without slot rings all is as ever. */
	v = dsr_new(.no_cap = true);
	for (k = 0; k < ARRAY_SIZE(values); k++)
		CHECK_OK(__vm_enable_cap(v->vm, cap, values[k]));
	dsr_free(v);
}

/* A dead log keeps what the reader of the mapping has not confirmed. */
TEST(slot_deleted_mapped)
{
	struct dsr *v = dsr_new(.entries = 256, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	uint8_t *got = set_new(v), *want = set_new(v);
	uint64_t i;

	guest_write_step(v, 0, 0, 100, 2);
	vm_mem_region_delete(v->vm, TEST_SLOT);
	set_add(want, 0, 100, 2);
	set_add_entries(got, v->npages, &ring, 0, dsr_producer(&ring));
	set_check(v, got, want);
	/* half of them by the mapping, the rest by HARVEST */
	i = dsr_producer(&ring) / 2;
	dsr_set_consumer(&ring, i);
	memset(got, 0, v->npages);
	set_add_entries(got, v->npages, &ring, 0, i);
	harvest(v, got);
	set_check(v, got, want);
	CHECK_EQ(poll_log(v->fd, 0), POLLHUP);
	dsr_unmap(&ring);
	free(got);
	free(want);
	dsr_free(v);
}

TEST(slot_moved)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct mailbox mb = { .op = OP_WRITE, .gva = MOVED_GVA, .first = 100, .npages = 200 };
	struct dsr_ring ring = dsr_map(v->fd, 0);

	virt_map(v->vm, MOVED_GVA, MOVED_GPA, v->npages);
	guest_write(v, 0, 0, 150);
	vm_mem_region_move(v->vm, TEST_SLOT, MOVED_GPA);
	CHECK_EQ(dsr_info(v->fd).base_gfn, MOVED_GPA / PG);
	CHECK_EQ(dsr_info(v->fd).flags, 0);
	guest_run(v, 0, mb);
	expect(v, 0, 300);
	guest_run(v, 0, mb);
	expect(v, 100, 200);
	markers_check(&ring);
	vm_mem_region_move(v->vm, TEST_SLOT, TEST_GPA);
	CHECK_EQ(dsr_info(v->fd).base_gfn, TEST_GPA / PG);
	expect_armed(v, 50, 400);
	dsr_unmap(&ring);
	dsr_free(v);
}

/* A dead log tells where its slot was last, though nobody asked meanwhile. */
TEST(slot_moved_then_deleted)
{
	struct dsr *v = dsr_new();
	int i;

	for (i = 0; i < 2; i++) {
		vm_mem_region_move(v->vm, TEST_SLOT, MOVED_GPA);
		if (i)
			dsr_log(v, false);
		else
			vm_mem_region_delete(v->vm, TEST_SLOT);
		CHECK_EQ(dsr_info(v->fd).base_gfn, MOVED_GPA / PG);
		check_dead(v, 0, 0, 1);
		if (i)
			break;
		vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, TEST_GPA, TEST_SLOT,
					    v->npages, KVM_MEM_LOG_DIRTY_PAGES);
		dsr_reopen(v);
		CHECK_EQ(dsr_info(v->fd).base_gfn, TEST_GPA / PG);
	}
	dsr_free(v);
}

/*
 * Slots come, move and go while another thread harvests.  Each generation's
 * pages are in that generation's log, once.
 */
struct churn {
	struct dsr *v;
	uint8_t *got;
	int fd;			/* -1: none, -2: finish */
	uint64_t calls;
};

static void *churn_thread(void *arg)
{
	struct churn *c = arg;
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_run runs[8];
	int fd, ret;

	while ((fd = __atomic_load_n(&c->fd, __ATOMIC_ACQUIRE)) != -2) {
		if (fd == -1) {
			sched_yield();
			continue;
		}
		ret = __dsr_runs(fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, ARRAY_SIZE(runs), 0, &args);
		c->calls++;
		if (!ret) {
			runs_take(c->got, c->v->npages, runs, &args, ARRAY_SIZE(runs));
			continue;
		}
		CHECK(errno == ENODEV, "HARVEST gave %d", ret);
		__atomic_store_n(&c->fd, -1, __ATOMIC_RELEASE);
	}
	return NULL;
}

TEST(slot_churn)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct mailbox mb = { .op = OP_WRITE, .gva = MOVED_GVA, .first = 300, .npages = 150 };
	struct churn c = { .v = v, .fd = -1, .got = set_new(v) };
	uint8_t *want = set_new(v);
	pthread_t thread;
	int i;

	virt_map(v->vm, MOVED_GVA, MOVED_GPA, v->npages);
	set_add(want, 0, 450, 1);
	CHECK_OK(pthread_create(&thread, NULL, churn_thread, &c));
	for (i = 0; i < rounds(60); i++) {
		__atomic_store_n(&c.fd, v->fd, __ATOMIC_RELEASE);
		guest_write(v, 0, 0, 150);
		CHECK_EQ(dsr_mark(v->fd, 150, 150), 150);
		if (i % 3) {
			vm_mem_region_move(v->vm, TEST_SLOT, MOVED_GPA);
			guest_run(v, 0, mb);
		} else {
			guest_write(v, 0, 300, 150);
		}
		if (i % 2)
			vm_mem_region_delete(v->vm, TEST_SLOT);
		else
			dsr_log(v, false);
		while (__atomic_load_n(&c.fd, __ATOMIC_ACQUIRE) != -1)
			sched_yield();
		set_limit(c.got, 0, 150);
		set_limit(c.got, 300, 150);
		set_check(v, c.got, want);
		memset(c.got, 0, v->npages);
		close(v->fd);
		if (i % 2) {
			vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, TEST_GPA,
						    TEST_SLOT, v->npages, KVM_MEM_LOG_DIRTY_PAGES);
		} else {
			vm_mem_region_move(v->vm, TEST_SLOT, TEST_GPA);
			dsr_log(v, true);
		}
		v->fd = dsr_open(v->vm, TEST_SLOT);
	}
	__atomic_store_n(&c.fd, -2, __ATOMIC_RELEASE);
	CHECK_OK(pthread_join(thread, NULL));
	CHECK(c.calls, "never harvested");
	free(c.got);
	free(want);
	dsr_free(v);
}

TEST(vcpu_added_later)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1, .max_vcpus = 2);
	struct kvm_dirty_slot_log_info info = dsr_info(v->fd);
	uint8_t *want = set_new(v), *got = set_new(v);
	struct dsr_ring ring;

	/*
	 * The ring may be mapped before it exists, but not touched.  Its consumer is in
	 * a page with those that are there; what is stored there does not matter.
	 */
	ring = dsr_map(v->fd, 1);
	CHECK_EQ(probe(ring.user, false), 0);
	dsr_set_consumer(&ring, 12345);
	CHECK_EQ(probe((void *)ring.kern, false), SIGBUS);
	CHECK_EQ(probe((void *)ring.runs, false), SIGBUS);

	guest_write(v, 0, 0, 30);
	dsr_add_vcpu(v, 1);
	CHECK_EQ(dsr_info(v->fd).nr_rings, 2);
	CHECK_EQ(dsr_info(v->fd).stride, info.stride);
	CHECK_EQ(dsr_producer(&ring), 0);
	CHECK_EQ(dsr_consumer(&ring), 0);
	guest_write(v, 1, 20, 50);
	set_add(want, 30, 40, 1);
	set_add_entries(got, v->npages, &ring, 0, dsr_producer(&ring));
	set_check(v, got, want);
	expect(v, 0, 70);
	guest_write(v, 1, 0, v->npages);
	expect(v, 0, v->npages);
	markers_check(&ring);
	dsr_unmap(&ring);
	free(got);
	free(want);
	dsr_free(v);
}

/* The new vCPU starts to write while someone harvests without a pause. */
TEST(vcpu_added_during_harvest)
{
	uint8_t *got, *want;
	struct taker t;
	struct dsr *v;
	int i;

	for (i = 0; i < rounds(20); i++) {
		v = dsr_new(.entries = 64, .nr_vcpus = 1, .max_vcpus = 2);
		got = set_new(v);
		want = set_new(v);
		t = (struct taker) { .v = v, .got = set_new(v) };
		CHECK_OK(pthread_create(&t.thread, NULL, taker_thread, &t));
		dsr_add_vcpu(v, 1);
		guest_write(v, 1, 0, 100);
		guest_write(v, 0, 200, 100);
		WRITE_ONCE(t.stop, true);
		CHECK_OK(pthread_join(t.thread, NULL));
		harvest(v, got);
		set_add(want, 0, 100, 1);
		set_add(want, 200, 100, 1);
		set_join(v, got, t.got);
		set_limit(got, 0, v->npages);
		set_check(v, got, want);
		free(t.got);
		free(got);
		free(want);
		dsr_free(v);
	}
}

TEST(vm_gone_before_log)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	int sig;

	guest_write(v, 0, 2, 150);
	kvm_vm_free(v->vm);
	CHECK(dsr_producer(&ring), "the ring went with the VM");
	sig = probe(ring.user, false);
	CHECK(!sig, "signal %d", sig);
	check_dead(v, 2, 150, MANY_RUNS);
	dsr_unmap(&ring);
	close(v->fd);
	free(v);
}

/* The same without anyone deleting the slots first, as when a VMM is killed. */
TEST(vmm_killed_before_log)
{
	struct dsr log = { .npages = DEFAULT_NPAGES };
	struct dsr *v;
	int sk[2];
	pid_t pid;

	CHECK_OK(socketpair(AF_UNIX, SOCK_STREAM, 0, sk));
	pid = fork();
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		v = dsr_new(.entries = 64, .nr_vcpus = 1);
		guest_write(v, 0, 2, 150);
		send_fd(sk[1], 0, v->fd);
		for (;;)
			pause();
	}
	log.fd = recv_fd(sk[0], NULL, 0);
	CHECK_EQ(dsr_info(log.fd).flags, 0);
	kill(pid, SIGKILL);
	CHECK_EQ(waitpid(pid, NULL, 0), pid);
	CHECK(poll_log(log.fd, 10000) & POLLHUP, "no POLLHUP");
	check_dead(&log, 2, 150, 8);
	close(log.fd);
}

static void *close_thread(void *arg)
{
	struct taker *t = arg;
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_run runs[4];
	int ret;

	for (;;) {
		ret = __dsr_runs(t->v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, 4, 0, &args);
		if (ret)
			break;
		runs_take(t->got, t->v->npages, runs, &args, 4);
	}
	CHECK(errno == EBADF, "HARVEST gave %d", ret);
	return NULL;
}

TEST(closed_during_harvest)
{
	struct dsr *v = dsr_new(.entries = 64);
	uint8_t *want = set_new(v);
	struct taker t = { .v = v };
	int i, n, keep;

	set_add(want, 0, v->npages, 1);
	for (i = 0; i < rounds(100); i++) {
		t.got = set_new(v);
		keep = dsr_open(v->vm, TEST_SLOT);
		CHECK_OK(pthread_create(&t.thread, NULL, close_thread, &t));
		for (n = 0; n < v->npages; n++)
			dsr_mark(keep, n, 1);
		close(v->fd);
		CHECK_OK(pthread_join(t.thread, NULL));
		v->fd = keep;
		harvest(v, t.got);
		set_check(v, t.got, want);
		free(t.got);
	}
	free(want);
	dsr_free(v);
}

TEST(fork_shares_log_not_mapping)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	pid_t pid;

	guest_write(v, 0, 0, 100);
	pid = fork();
	if (!pid) {
		CHECK_EQ(probe((void *)ring.kern, false), SIGSEGV);
		CHECK_EQ(probe(ring.user, false), SIGSEGV);
		/* The VM is the parent's alone, the log is not. */
		CHECK_ERR(__dsr_open(v->vm, TEST_SLOT), EIO);
		ring = dsr_map(v->fd, 0);
		CHECK_EQ(dsr_producer(&ring), 64);
		expect(v, 0, 100);
		dsr_mark(v->fd, 200, 5);
		_exit(0);
	}
	child_check(pid);
	expect(v, 200, 5);
	CHECK_EQ(dsr_consumer(&ring), dsr_reset_marker(&ring));
	expect_armed(v, 0, 100);
	dsr_unmap(&ring);
	dsr_free(v);
}

/*
 * The holder of the descriptor need not have been there when the VM was made:
 * another process, with another mm and no VM descriptor.
 */
TEST(harvest_in_another_process)
{
	struct dsr remote = { .npages = DEFAULT_NPAGES };
	struct dsr_ring ring;
	uint8_t *got, *want;
	struct dsr *v;
	int sk[2];
	pid_t pid;
	char c;

	CHECK_OK(socketpair(AF_UNIX, SOCK_STREAM, 0, sk));
	got = mmap(NULL, DEFAULT_NPAGES, PROT_READ | PROT_WRITE,
		   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid = fork();
	if (!pid) {
		remote.fd = recv_fd(sk[1], NULL, 0);
		ring = dsr_map(remote.fd, 0);
		CHECK_EQ(dsr_info(remote.fd).slot, TEST_SLOT);
		CHECK(dsr_producer(&ring), "nothing in the ring");
		harvest_cap(remote.fd, got, remote.npages, KVM_DIRTY_HARVEST_SYNC, 10);
		CHECK_EQ(dsr_producer(&ring), dsr_consumer(&ring));
		CHECK_EQ(dsr_mark(remote.fd, 400, 10), 10);
		CHECK_EQ(dsr_mark(remote.fd, 300, 10), 10);
		CHECK_EQ(dsr_discard(remote.fd, 300, 10), 10);
		CHECK_EQ(dsr_reset(remote.fd), 0);
		CHECK_EQ(write(sk[1], "", 1), 1);
		_exit(0);
	}
	v = dsr_new(.entries = 64, .nr_vcpus = 1);
	want = set_new(v);
	guest_write(v, 0, 11, 200);
	set_add(want, 11, 200, 1);
	send_fd(sk[0], 0, v->fd);
	CHECK_EQ(read(sk[0], &c, 1), 1);
	child_check(pid);
	set_check(v, got, want);
	/* What the other one took is armed again. */
	guest_write(v, 0, 11, 200);
	set_add(want, 400, 10, 1);
	expect_set(v, want);
	free(want);
	dsr_free(v);
}

int main(int argc, char *argv[])
{
	return dsr_test_main(argc, argv);
}
