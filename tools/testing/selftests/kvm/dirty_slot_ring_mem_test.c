// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings over memory of other kinds: huge pages, read-only memory,
 * memory that userspace supplies, and pages that the host merges.
 */
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
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
		vcpu_run(v->vcpu[0]);
		if (run->exit_reason != KVM_EXIT_MMIO)
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
	int i, fd;

	fd = syscall(__NR_userfaultfd, O_CLOEXEC);
	if (fd < 0)
		SKIP(return, "no userfaultfd");
	close(fd);

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
