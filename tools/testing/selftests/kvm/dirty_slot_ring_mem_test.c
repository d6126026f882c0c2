// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings over memory of other kinds: huge pages, read-only memory,
 * memory that userspace supplies, and pages that the host merges.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "processor.h"
#include "test_util.h"
#include "userfaultfd_util.h"

#include "dirty_slot_ring_test.h"

TEST(huge_pages_are_split)
{
	const uint32_t huge = 512;
	struct dsr *v;
	int i;

	if (!thp_configured())
		SKIP(return, "no transparent huge pages");

	v = dsr_new(.entries = 64, .nr_vcpus = 1, .no_log = true, .npages = 4 * huge,
		    .src = VM_MEM_SRC_ANONYMOUS_THP);
	for (i = 0; i < 3; i++) {
		/* map them huge, then start to log */
		guest_write_step(v, 0, 0, 4, huge);
		dsr_log(v, true);
		dsr_reopen(v);
		expect_nothing(v);
		guest_write_step(v, 0, 5, 4, huge);
		expect_step(v, 5, 4, huge);
		guest_write(v, 0, 0, v->npages);
		expect(v, 0, v->npages);
		expect_armed(v, huge - 3, 6);
		dsr_log(v, false);
	}
	dsr_free(v);
}

/* What the guest writes to read-only memory is not written, and not logged. */
TEST(readonly_slot)
{
	struct mailbox mb = { .op = OP_WRITE, .gva = OTHER_GVA, .npages = 20, .value = 7 };
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1), rom;
	struct kvm_run *run = v->vcpu[0]->run;
	uint64_t *mem, exits = 0;

	if (!kvm_has_cap(KVM_CAP_READONLY_MEM))
		SKIP(return, "no read-only memory");

	vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, OTHER_GPA, OTHER_SLOT, v->npages,
				    KVM_MEM_READONLY | KVM_MEM_LOG_DIRTY_PAGES);
	virt_map(v->vm, OTHER_GVA, OTHER_GPA, v->npages);
	mem = addr_gpa2hva(v->vm, OTHER_GPA);
	rom = *v;
	rom.fd = dsr_open(v->vm, OTHER_SLOT);

	guest_set(v, 0, mb);
	for (;;) {
		/* vcpu_run() would take what a guest says by MMIO for a ucall. */
		CHECK_EQ(__vcpu_run(v->vcpu[0]), 0);
		if (run->exit_reason != KVM_EXIT_MMIO || guest_is_done(run))
			break;
		CHECK(run->mmio.is_write, "a read");
		CHECK_EQ(run->mmio.phys_addr, OTHER_GPA + exits * PG);
		CHECK_EQ(mem[exits * PG / 8], 0);
		exits++;
	}
	CHECK(guest_is_done(run), "exit %s", exit_reason_str(run->exit_reason));
	CHECK_EQ(exits, mb.npages);
	expect_nothing(&rom);

	/* The VMM may well write it, and says so. */
	mem[7 * PG / 8] = 1;
	CHECK_EQ(dsr_mark(rom.fd, 7, 2), 2);
	expect(&rom, 7, 2);
	CHECK_EQ(dsr_mark(rom.fd, 7, 2), 2);
	CHECK_EQ(dsr_discard(rom.fd, 0, v->npages), 2);
	expect_nothing(&rom);
	expect_armed(v, 0, v->npages);
	close(rom.fd);
	dsr_free(v);
}

/* A vCPU that waits for memory from userspace holds up no harvest. */
TEST(userfaultfd_slot)
{
	struct mailbox mb = { .op = OP_WRITE, .first = 1, .npages = 100, .step = 2 };
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 2);
	void *mem = addr_gpa2hva(v->vm, TEST_GPA);
	struct uffd_desc *uffd;
	int i;

	if (!have_uffd())
		SKIP(return, "no userfaultfd");

	for (i = 0; i < 3; i++) {
		CHECK_OK(madvise(mem, v->npages * PG, MADV_DONTNEED));
		uffd = uffd_setup_demand_paging(UFFDIO_REGISTER_MODE_MISSING, 0, mem,
						v->npages * PG, 1, gate_handler);
		WRITE_ONCE(gate.open, true);
		guest_write(v, 1, 300, 10);

		WRITE_ONCE(gate.open, false);
		WRITE_ONCE(gate.waiting, false);
		guest_start(v, 0, mb);
		while (!READ_ONCE(gate.waiting))
			sched_yield();
		/* What it has not got, it has not written. */
		expect(v, 300, 10);
		CHECK_EQ(dsr_mark(v->fd, 400, 3), 3);
		CHECK_EQ(dsr_discard(v->fd, 401, 1), 1);
		CHECK_EQ(dsr_reset(v->fd), 0);
		expect_step(v, 400, 2, 2);

		WRITE_ONCE(gate.open, true);
		guest_join(v, 0);
		expect_step(v, mb.first, mb.npages, mb.step);
		expect_armed(v, 0, v->npages);
		uffd_stop_demand_paging(uffd);
	}
	dsr_free(v);
}

/* -- arrays that are not there --------------------------------------------- */

/*
 * A harvest waits for the memory of its array, with pages of the log in its hands.
 * No call on that log, or on all of the VM's, waits for it, and the pages are its
 * own.  Were the log's mutex held meanwhile, this would hang.
 */
static void check_stuck_harvest(unsigned long cmd)
{
	bool vm_wide = cmd == KVM_DIRTY_VM_LOG_HARVEST;
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	int all = dsr_open(v->vm, KVM_DIRTY_SLOT_ALL), other, i, k;
	struct gated_call c = { .cmd = cmd, .nr_runs = 128 };
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_vm_harvest vm_args;
	struct kvm_dirty_vm_run vm_runs[8], *vm_run;
	uint8_t *got = set_new(v), *want = set_new(v);
	struct kvm_dirty_run run;

	c.fd = vm_wide ? all : v->fd;
	vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, OTHER_GPA, OTHER_SLOT,
				    v->npages, KVM_MEM_LOG_DIRTY_PAGES);
	other = dsr_open(v->vm, OTHER_SLOT);
	set_add(want, 0, 100, 2);
	for (i = 0; i < 3; i++) {
		guest_write_step(v, 0, 0, 100, 2);
		gated_start(&c);

		/* Those that it has are nobody else's, and are not readable any more. */
		CHECK_EQ(poll_log(v->fd, 0), 0);
		expect_nothing(v);
		/* A vCPU, the VMM, and who takes the pages. */
		guest_write_step(v, 0, 300, 50, 2);
		CHECK_EQ(dsr_mark(v->fd, 450, 4), 4);
		CHECK_EQ(dsr_discard(v->fd, 450, 4), 4);
		CHECK_EQ(dsr_reset(v->fd), 0);
		CHECK_EQ(bitmap_take(v, NULL), 50);
		guest_write_step(v, 0, 301, 50, 2);
		expect_step(v, 301, 50, 2);
		CHECK_EQ(dsr_mark(v->fd, 450, 4), 4);
		CHECK_EQ(dsr_mark(other, 7, 1), 1);
		CHECK_OK(__dsr_vm_harvest(all, vm_runs, 8, KVM_DIRTY_HARVEST_SYNC, &vm_args));
		CHECK_EQ(vm_args.nr_pages, 5);
		CHECK_EQ(vm_args.flags & KVM_DIRTY_HARVEST_MORE, 0);

		/* A slot that is gone has something left as long as somebody has it in hand. */
		if (i == 2) {
			dsr_log(v, false);
			CHECK_OK(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, &run, 1, 0, &args));
			CHECK_EQ(args.nr_runs, 0);
		}
		gated_end(&c);
		CHECK(!c.ret, "the call gave %d, errno %d", c.ret, c.err);
		memset(got, 0, v->npages);
		if (vm_wide) {
			for (vm_run = c.runs, k = 0; k < c.vm_args.nr_runs; k++, vm_run++) {
				CHECK_EQ(vm_run->slot, TEST_SLOT);
				set_add(got, vm_run->offset, vm_run->npages, 1);
			}
		} else {
			runs_take(got, v->npages, c.runs, &c.args, 128);
		}
		set_check(v, got, want);
		if (i < 2)
			expect_armed(v, 0, v->npages);
		else
			check_dead(v, 0, 0, 1);
	}
	free(got);
	free(want);
	close(other);
	close(all);
	dsr_free(v);
}

TEST(stuck_harvest_holds_up_nobody)
{
	if (!have_uffd())
		SKIP(return, "no userfaultfd");
	check_stuck_harvest(KVM_DIRTY_SLOT_LOG_HARVEST);
}

TEST(stuck_vm_harvest_holds_up_nobody)
{
	if (!have_uffd())
		SKIP(return, "no userfaultfd");
	check_stuck_harvest(KVM_DIRTY_VM_LOG_HARVEST);
}

/* MARK and DISCARD look at their array before anything else. */
TEST(stuck_mark_holds_up_nobody)
{
	const unsigned long cmds[] = { KVM_DIRTY_SLOT_LOG_MARK, KVM_DIRTY_SLOT_LOG_DISCARD };
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct gated_call c = { .fd = v->fd, .nr_runs = 128 };
	int i;

	if (!have_uffd())
		SKIP(return, "no userfaultfd");
	for (i = 0; i < 4; i++) {
		c.cmd = cmds[i & 1];
		gated_start(&c);
		guest_write_step(v, 0, 0, 100, 2);
		CHECK_EQ(dsr_mark(v->fd, 450, 4), 4);
		CHECK_EQ(dsr_discard(v->fd, 450, 4), 4);
		expect_step(v, 0, 100, 2);
		gated_end(&c);
		/* What came are zeroes: runs of no pages. */
		CHECK(c.ret == -1 && c.err == EINVAL, "gave %d, errno %d", c.ret, c.err);
		expect_nothing(v);
	}
	dsr_free(v);
}

struct long_discard {
	int fd, ret, err;
	struct kvm_dirty_run *runs;
	struct kvm_dirty_slot_runs args;
	uint32_t nr;
	bool done;
	pthread_t thread;
};

static void *long_discard_thread(void *arg)
{
	struct long_discard *d = arg;

	d->ret = __dsr_runs(d->fd, KVM_DIRTY_SLOT_LOG_DISCARD, d->runs, d->nr, 0, &d->args);
	d->err = errno;
	__atomic_store_n(&d->done, true, __ATOMIC_RELEASE);
	return NULL;
}

/*
 * DISCARD of the whole slot, a million times over, takes long.  Harvests go on
 * meanwhile: none waits for its end, or the first of them would last as long.
 */
TEST(long_discard_holds_up_nobody)
{
	struct dsr *v = dsr_new(.npages = 1 << 18);
	struct long_discard d = { .fd = v->fd, .nr = 1 << 20 };
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_run run;
	int i;

	d.runs = malloc(d.nr * sizeof(*d.runs));
	for (i = 0; i < d.nr; i++)
		d.runs[i] = (struct kvm_dirty_run){ .offset = 0, .npages = v->npages };
	signals_every_us(0);	/* for its handler */
	CHECK_OK(pthread_create(&d.thread, NULL, long_discard_thread, &d));
	sleep_ms(20);
	for (i = 0; i < 50; i++) {
		dsr_mark(v->fd, i * 100, 3);
		CHECK_OK(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, &run, 1, 0, &args));
		CHECK(!args.nr_runs || (run.offset == i * 100 && run.npages <= 3), "%u + %u",
		      run.offset, run.npages);
	}
	CHECK(!__atomic_load_n(&d.done, __ATOMIC_ACQUIRE), "harvests, or the DISCARD was short");
	/* And it looks at signals. */
	CHECK_OK(pthread_kill(d.thread, SIGALRM));
	CHECK_OK(pthread_join(d.thread, NULL));
	CHECK(d.ret == -1 && d.err == EINTR, "DISCARD gave %d, errno %d", d.ret, d.err);
	expect_nothing(v);
	CHECK_EQ(dsr_mark(v->fd, 0, v->npages), v->npages);
	CHECK_EQ(dsr_discard(v->fd, 0, v->npages), v->npages);
	free(d.runs);
	dsr_free(v);
}

/* -- pages that the host merges -------------------------------------------- */

static void write_file(const char *name, const char *value)
{
	int fd = open(name, O_WRONLY);

	CHECK(fd >= 0 && write(fd, value, strlen(value)) == (int)strlen(value), "%s", name);
	close(fd);
}

static uint64_t read_file(const char *name)
{
	char buf[32] = "";
	int fd = open(name, O_RDONLY);

	CHECK(fd >= 0 && read(fd, buf, sizeof(buf) - 1) > 0, "%s", name);
	close(fd);
	return strtoull(buf, NULL, 10);
}

#define KSM "/sys/kernel/mm/ksm/"

/* Until most are merged. */
static void ksm_merge(uint64_t pages)
{
	uint64_t merged;
	int i;

	write_file(KSM "run", "1");
	for (i = 0; (merged = read_file(KSM "pages_sharing")) < pages; i++) {
		CHECK(i < 6000, "%lu pages merged in a minute", merged);
		sleep_ms(10);
	}
}

/* Pages that the host merges stay in the log, and a write to one is logged. */
TEST(ksm_merges_pages)
{
	struct dsr *v;
	void *mem;
	int i;

	if (access(KSM "run", W_OK))
		SKIP(return, "no KSM");

	v = dsr_new(.entries = 64, .nr_vcpus = 1);
	mem = addr_gpa2hva(v->vm, TEST_GPA);
	write_file(KSM "pages_to_scan", "5000");
	write_file(KSM "sleep_millisecs", "10");
	CHECK_OK(madvise(mem, v->npages * PG, MADV_MERGEABLE));
	for (i = 0; i < 3; i++) {
		guest_write(v, 0, 0, v->npages);
		if (i & 1)
			expect(v, 0, v->npages);
		ksm_merge(v->npages / 2);
		write_file(KSM "run", "2");	/* and all are on their own again */
		if (i & 1)
			expect_nothing(v);
		else
			expect(v, 0, v->npages);
		ksm_merge(v->npages / 2);
		guest_write_step(v, 0, 5, 100, 3);
		expect_step(v, 5, 100, 3);
		write_file(KSM "run", "0");
	}
	CHECK_OK(madvise(mem, v->npages * PG, MADV_UNMERGEABLE));
	dsr_free(v);
}

int main(int argc, char *argv[])
{
	return dsr_test_main(argc, argv);
}
