// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings: what only x86 has.  Writes by KVM and its emulator, SMM and
 * its address space, private memory, guests of the guest.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <asm/kvm_para.h>

#include "kvm_util.h"
#include "processor.h"
#include "svm_util.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfaultfd_util.h"
#include "vmx.h"

#include "dirty_slot_ring_test.h"

/* The emulator stores for the guest. */
TEST(write_by_emulator)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	uint8_t *mem = addr_gpa2hva(v->vm, TEST_GPA);
	int i;

	for (i = 0; i < 3; i++) {
		mem[123 * PG] = 0;
		guest_run(v, 0, (struct mailbox){ .op = OP_INS, .first = 123 });
		CHECK_EQ(mem[123 * PG], 0x5a);
		expect(v, 123, 1);
	}
	dsr_free(v);
}

/* vcpu_set_msr() reads it back, and has a variable v of its own */
static void set_msr(struct kvm_vcpu *vcpu, uint32_t msr, uint64_t value)
{
	CHECK(_vcpu_set_msr(vcpu, msr, value) == 1, "MSR %#x refuses %#lx", msr, value);
}

/* KVM's own pages in the guest, written with the vCPU running and without. */
TEST(write_by_kvm)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	uint32_t *mem = addr_gpa2hva(v->vm, TEST_GPA);
	uint8_t *got, *want = set_new(v);
	int i;

	for (i = 0; i < 3; i++) {
		/* right in the ioctl */
		mem[20 * PG / 4] = 0;
		set_msr(v->vcpu[0], MSR_KVM_WALL_CLOCK_NEW, TEST_GPA + 20 * PG);
		CHECK(mem[20 * PG / 4], "no wall clock written");
		expect(v, 20, 1);

		/* on the way into the guest */
		mem[30 * PG / 4] = 0;
		set_msr(v->vcpu[0], MSR_KVM_SYSTEM_TIME_NEW, TEST_GPA + 30 * PG + 1);
		guest_write(v, 0, 10, 1);
		CHECK(mem[30 * PG / 4], "no system time written");
		got = set_new(v);
		harvest(v, got);
		memset(want, 0, v->npages);
		set_add(want, 10, 1, 1);
		set_add(want, 30, 1, 1);
		set_check(v, got, want);
		free(got);
		set_msr(v->vcpu[0], MSR_KVM_SYSTEM_TIME_NEW, 0);
	}
	free(want);
	dsr_free(v);
}

/* Stolen time is written on the way in, and when the vCPU's thread is scheduled out. */
TEST(write_by_kvm_steal_time)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	uint64_t *mem = addr_gpa2hva(v->vm, TEST_GPA + 40 * PG), copy[8] = { 0 };
	uint8_t *got = set_new(v);
	int i, k;

	/* The feature bit is KVM's to check; without it the MSR is refused. */
	if (!guest_set_steal_time(v->vcpu[0], TEST_GPA + 40 * PG))
		SKIP(return, "no stolen time here");

	for (i = 0; i < rounds(100); i++) {
		guest_write(v, 0, 0, 5);
		memset(got, 0, v->npages);
		harvest(v, got);
		/* The copy is right whenever the log says nothing. */
		if (got[40])
			memcpy(copy, mem, sizeof(copy));
		CHECK(!memcmp(copy, mem, sizeof(copy)), "page written and not logged");
		for (k = 0; k < v->npages; k++)
			CHECK(got[k] == (k < 5) || k == 40, "page %d: %d times", k, got[k]);
	}
	CHECK(copy[1] & ~0ull >> 32, "no stolen time written");
	free(got);
	dsr_free(v);
}

#define SMRAM_GPA	0x1000000ul
#define SMRAM_SIZE	0x10000ul
#define SMI_HANDLER	0x8000

/* The same gfn in two address spaces is two pages, and two logs. */
TEST(smm_has_its_own_log)
{
	uint8_t handler[] = {
		0xb0, 0x5a,				/* mov $0x5a, %al */
		0x67, 0xa2, 0, 0, 0, 0,			/* mov %al, (32-bit address) */
		0x0f, 0xaa,				/* rsm */
	};
	const uint32_t addr = TEST_GPA + 33 * PG, slot = 1 << 16 | TEST_SLOT;
	struct kvm_vcpu_events events;
	struct dsr *v, smm;
	uint8_t *mem;
	void *smram;
	int i;

	if (!kvm_has_cap(KVM_CAP_X86_SMM) || kvm_check_cap(KVM_CAP_MULTI_ADDRESS_SPACE) < 2)
		SKIP(return, "no SMM");

	v = dsr_new(.entries = 64, .nr_vcpus = 1);
	mem = mmap(NULL, v->npages * PG, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	smram = mmap(NULL, SMRAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memcpy(&handler[4], &addr, 4);
	memcpy(smram + SMI_HANDLER, handler, sizeof(handler));
	vm_set_user_memory_region(v->vm, 1 << 16 | 1, 0, SMRAM_GPA, SMRAM_SIZE, smram);
	vm_set_user_memory_region(v->vm, slot, KVM_MEM_LOG_DIRTY_PAGES, TEST_GPA,
				  v->npages * PG, mem);
	smm = *v;
	smm.fd = dsr_open(v->vm, slot);
	CHECK_EQ(dsr_info(smm.fd).slot, slot);
	CHECK_EQ(dsr_info(smm.fd).base_gfn, TEST_GPA / PG);
	set_msr(v->vcpu[0], MSR_IA32_SMBASE, SMRAM_GPA);

	for (i = 0; i < 3; i++) {
		mem[33 * PG] = 0;
		vcpu_events_get(v->vcpu[0], &events);
		events.smi.pending = 1;
		events.flags |= KVM_VCPUEVENT_VALID_SMM;
		vcpu_events_set(v->vcpu[0], &events);
		guest_write(v, 0, 34, 2);
		CHECK_EQ(mem[33 * PG], 0x5a);
		expect(&smm, 33, 1);
		expect(v, 34, 2);

		CHECK_EQ(dsr_mark(smm.fd, 34, 1), 1);
		expect_nothing(v);
		expect(&smm, 34, 1);
	}
	vm_set_user_memory_region(v->vm, slot, 0, TEST_GPA, 0, mem);
	check_dead(&smm, 0, 0, 1);
	expect_armed(v, 0, v->npages);
	close(smm.fd);
	dsr_free(v);
}

/* Private memory cannot log dirty pages: no log, and no harm. */
TEST(guest_memfd_slot_is_refused)
{
	const uint64_t size = 16 * PG;
	struct kvm_vm *vm;
	void *mem;
	int gmem;

	if (!(kvm_check_cap(KVM_CAP_VM_TYPES) & BIT(KVM_X86_SW_PROTECTED_VM)))
		SKIP(return, "no VMs with private memory");

	vm = vm_create_barebones_type(KVM_X86_SW_PROTECTED_VM);
	mem = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(mem != MAP_FAILED, "no memory");
	gmem = vm_create_guest_memfd(vm, size, 0);
	dsr_enable(vm, 64, 0);

	CHECK_ERR(__vm_set_user_memory_region2(vm, TEST_SLOT,
					       KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES,
					       TEST_GPA, size, mem, gmem, 0), EINVAL);
	CHECK_OK(__vm_set_user_memory_region2(vm, TEST_SLOT, KVM_MEM_GUEST_MEMFD,
					      TEST_GPA, size, mem, gmem, 0));
	CHECK_ERR(__dsr_open(vm, TEST_SLOT), ENOENT);
	CHECK_ERR(__vm_set_user_memory_region2(vm, TEST_SLOT,
					       KVM_MEM_GUEST_MEMFD | KVM_MEM_LOG_DIRTY_PAGES,
					       TEST_GPA, size, mem, gmem, 0), EINVAL);
	CHECK_ERR(__dsr_open(vm, TEST_SLOT), ENOENT);

	/* The VM's other memory can. */
	CHECK_OK(__vm_set_user_memory_region(vm, OTHER_SLOT, KVM_MEM_LOG_DIRTY_PAGES,
					     OTHER_GPA, size, mem));
	close(dsr_open(vm, OTHER_SLOT));
	close(gmem);
	kvm_vm_free(vm);
}

/* -- guests of the guest -------------------------------------------------- */

/* A guest of the guest: KVM tracks its pages by rmap, and through shadow page tables. */
static void l2_svm_main(void)
{
	guest_do(&mailboxes[0]);
	vmmcall();
}

static void l2_vmx_main(void)
{
	guest_do(&mailboxes[0]);
	vmcall();
}

static uint64_t l2_stack[512];

static void l1_svm_main(struct svm_test_data *svm, uint64_t ncr3)
{
	for (;;) {
		generic_svm_setup(svm, l2_svm_main, &l2_stack[500]);
		svm->vmcb->control.nested_ctl = ncr3 ? SVM_NESTED_CTL_NP_ENABLE : 0;
		svm->vmcb->control.nested_cr3 = ncr3;
		run_guest(svm->vmcb, svm->vmcb_gpa);
		GUEST_ASSERT_EQ(svm->vmcb->control.exit_code, SVM_EXIT_VMMCALL);
		guest_exit();
	}
}

/* What else L1 gives L2. */
static struct {
	uint64_t apic_gpa;	/* a virtual-APIC page, for its TPR; 0 for none */
	bool shadow_vmcs;
} vmx_extras;

static void l1_vmx_main(struct vmx_pages *vmx)
{
	GUEST_ASSERT(prepare_for_vmx_operation(vmx));
	GUEST_ASSERT(load_vmcs(vmx));
	prepare_vmcs(vmx, l2_vmx_main, &l2_stack[500]);
	if (vmx_extras.apic_gpa) {
		vmwrite(CPU_BASED_VM_EXEC_CONTROL,
			vmreadz(CPU_BASED_VM_EXEC_CONTROL) | CPU_BASED_TPR_SHADOW);
		vmwrite(VIRTUAL_APIC_PAGE_ADDR, vmx_extras.apic_gpa);
	}
	if (vmx_extras.shadow_vmcs) {
		vmwrite(SECONDARY_VM_EXEC_CONTROL,
			vmreadz(SECONDARY_VM_EXEC_CONTROL) | SECONDARY_EXEC_SHADOW_VMCS);
		vmwrite(VMCS_LINK_POINTER, vmx->shadow_vmcs_gpa);
	}
	GUEST_ASSERT(!vmlaunch());
	for (;;) {
		GUEST_ASSERT_EQ(vmreadz(VM_EXIT_REASON), EXIT_REASON_VMCALL);
		guest_exit();
		GUEST_ASSERT(!vmwrite(GUEST_RIP, (u64)l2_vmx_main));
		GUEST_ASSERT(!vmwrite(GUEST_RSP, (u64)&l2_stack[500]));
		GUEST_ASSERT(!vmresume());
	}
}

/* An identity map of the first gigabyte, in pages of 2 MiB. */
static uint64_t make_npt(struct kvm_vm *vm)
{
	uint64_t gva = vm_vaddr_alloc_pages(vm, 3);
	uint64_t *pt = addr_gva2hva(vm, gva), i;
	uint64_t pa[3];

	for (i = 0; i < 3; i++)
		pa[i] = addr_gva2gpa(vm, gva + i * PG);
	memset(pt, 0, 3 * PG);
	*(uint64_t *)addr_gpa2hva(vm, pa[0]) = pa[1] | 0x67;
	*(uint64_t *)addr_gpa2hva(vm, pa[1]) = pa[2] | 0x67;
	pt = addr_gpa2hva(vm, pa[2]);
	for (i = 0; i < 512; i++)
		pt[i] = i << 21 | 0xe7;
	return pa[0];
}

/* What vCPU 0 is told to do, a guest of its own does.  L1's pages for VMX, or NULL. */
static struct vmx_pages *run_nested(struct dsr *v, bool two_dimensional, uint64_t other_gpa)
{
	struct vmx_pages *nested = NULL;
	uint64_t gva;

	if (kvm_cpu_has(X86_FEATURE_SVM)) {
		vcpu_alloc_svm(v->vm, &gva);
		vcpu_arch_set_entry_point(v->vcpu[0], l1_svm_main);
		vcpu_args_set(v->vcpu[0], 2, gva, two_dimensional ? make_npt(v->vm) : 0);
	} else {
		nested = vcpu_alloc_vmx(v->vm, &gva);
		if (two_dimensional) {
			prepare_eptp(nested, v->vm, 0);
			nested_map_memslot(nested, v->vm, 0);
			nested_map(nested, v->vm, TEST_GPA, TEST_GPA, v->npages * PG);
			if (other_gpa)
				nested_map(nested, v->vm, other_gpa, other_gpa, v->npages * PG);
		}
		vcpu_arch_set_entry_point(v->vcpu[0], l1_vmx_main);
		vcpu_args_set(v->vcpu[0], 1, gva);
		sync_global_to_guest(v->vm, vmx_extras);
	}
	return nested;
}

static void check_nested(bool two_dimensional)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct mailbox mb = { .op = OP_BATCHES, .npages = 50 };
	uint8_t *want = set_new(v);
	int i;

	run_nested(v, two_dimensional, 0);
	for (i = 0; i < 3; i++) {
		guest_write(v, 0, 0, 200);
		expect(v, 0, 200);
		guest_write_step(v, 0, 1, 30, 7);
		expect_step(v, 1, 30, 7);
		guest_write(v, 0, 9, 3);
		CHECK_EQ(dsr_discard(v->fd, 10, 1), 1);
		guest_write(v, 0, 10, 1);
		expect(v, 9, 3);
	}
	/* and while it stays inside */
	set_add(want, 0, 50, 1);
	guest_start(v, 0, mb);
	check_sync_batches(v, want, 50);
	guest_join(v, 0);
	free(want);
	dsr_free(v);
}

static bool nested_supported(void)
{
	return kvm_has_cap(KVM_CAP_NESTED_STATE) &&
	       (kvm_cpu_has(X86_FEATURE_SVM) || kvm_cpu_has(X86_FEATURE_VMX));
}

TEST(nested)
{
	if (!nested_supported())
		SKIP(return, "no nested virtualization");
	check_nested(false);
}

static bool nested_paging_supported(void)
{
	if (!nested_supported())
		return false;
	return kvm_cpu_has(X86_FEATURE_SVM) ? kvm_cpu_has(X86_FEATURE_NPT) : kvm_cpu_has_ept();
}

TEST(nested_two_dimensional)
{
	if (!nested_paging_supported())
		SKIP(return, "no nested paging");
	check_nested(true);
}

static bool tdp_mmu(void)
{
	return get_kvm_param_bool("tdp_mmu") &&
	       (host_cpu_is_intel ? get_kvm_intel_param_bool("ept") :
				    get_kvm_amd_param_bool("npt"));
}

/* within the gigabyte that make_npt() maps */
#define NEAR_GPA	0x20000000ul

/*
 * Two slots that start dirty, in huge pages, some of them mapped by shadow page
 * tables: the first harvest has to protect them all, and that of the other slot
 * does so at the same time.
 */
TEST(nested_huge_pages_initially_set)
{
	const uint32_t huge = 512;
	struct mailbox touch = {
		.op = OP_WRITE, .twin = OTHER_GVA, .npages = 4, .step = huge,
	};
	struct mailbox mb = { .op = OP_WRITE, .twin = OTHER_GVA, .first = 500, .npages = 100 };
	struct dsr *v, other, *slots[2];
	struct taker t[2];
	uint8_t *want;
	int i, k;

	if (!nested_paging_supported())
		SKIP(return, "no nested paging");
	if (!thp_configured())
		SKIP(return, "no transparent huge pages");

	v = dsr_new(.entries = 64, .nr_vcpus = 1, .no_log = true, .npages = 4 * huge,
		    .src = VM_MEM_SRC_ANONYMOUS_THP,
		    .manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
	vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS_THP, NEAR_GPA, OTHER_SLOT,
				    v->npages, 0);
	virt_map(v->vm, OTHER_GVA, NEAR_GPA, v->npages);
	want = set_new(v);
	set_add(want, 0, v->npages, 1);
	other = *v;
	slots[0] = v;
	slots[1] = &other;
	/* by the first level, then by the second */
	guest_run(v, 0, touch);
	run_nested(v, true, NEAR_GPA);

	for (i = 0; i < rounds(20); i++) {
		guest_run(v, 0, touch);
		dsr_log(v, true);
		vm_mem_region_set_flags(v->vm, OTHER_SLOT, KVM_MEM_LOG_DIRTY_PAGES);
		v->fd = dsr_open(v->vm, TEST_SLOT);
		other.fd = dsr_open(v->vm, OTHER_SLOT);
		for (k = 0; k < 2; k++) {
			t[k] = (struct taker){
				.v = slots[k], .got = set_new(v), .stop = true,
			};
			CHECK_OK(pthread_create(&t[k].thread, NULL, taker_thread, &t[k]));
		}
		for (k = 0; k < 2; k++) {
			CHECK_OK(pthread_join(t[k].thread, NULL));
			set_check(v, t[k].got, want);
			free(t[k].got);
		}
		guest_run(v, 0, mb);
		for (k = 0; k < 2; k++)
			expect(slots[k], mb.first, mb.npages);
		dsr_log(v, false);
		vm_mem_region_set_flags(v->vm, OTHER_SLOT, 0);
		for (k = 0; k < 2; k++) {
			close(slots[k]->fd);
			slots[k]->fd = -1;
		}
	}
	free(want);
	dsr_free(v);
}

/*
 * KVM_CLEAR_DIRTY_LOG holds slots_lock, and so splits the huge pages of the shadow MMU,
 * too, with slot rings or without.  A harvest does not; it protects them.
 */
static void check_nested_split(bool rings, bool clear)
{
	const uint32_t huge = 512, nr = 4;
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1, .no_cap = !rings, .no_log = true,
				.npages = nr * huge, .src = VM_MEM_SRC_ANONYMOUS_THP,
				.manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE |
					  KVM_DIRTY_LOG_INITIALLY_SET);
	uint64_t *bitmap = malloc(v->npages / 8), before;
	int fd = vm_get_stats_fd(v->vm);
	uint8_t *all = set_new(v);

	/* By the first level, then by the second: each page is mapped huge twice. */
	guest_write_step(v, 0, 0, nr, huge);
	run_nested(v, true, 0);
	guest_write_step(v, 0, 0, nr, huge);
	dsr_log(v, true);
	if (rings)
		dsr_reopen(v);
	before = stat_of(fd, "pages_2m");
	CHECK(before >= 2 * nr, "%lu huge pages", before);
	if (clear) {
		memset(bitmap, 0xff, v->npages / 8);
		kvm_vm_clear_dirty_log(v->vm, TEST_SLOT, bitmap, 0, v->npages);
		CHECK_EQ(stat_of(fd, "pages_2m"), before - 2 * nr);
	} else {
		set_add(all, 0, v->npages, 1);
		expect_set(v, all);
		CHECK_EQ(stat_of(fd, "pages_2m"), before);
	}
	/* Protected all the same. */
	guest_write_step(v, 0, 5, nr, huge);
	CHECK_EQ(bitmap_take(v, NULL), nr);
	if (rings) {
		expect_step(v, 5, nr, huge);
		expect_armed(v, huge - 3, 6);
	}
	free(all);
	free(bitmap);
	close(fd);
	dsr_free(v);
}

TEST(nested_huge_pages_are_split_by_clear)
{
	if (!nested_paging_supported())
		SKIP(return, "no nested paging");
	/* L1's own tables have to be huge; those of the VMX library are not. */
	if (!kvm_cpu_has(X86_FEATURE_SVM))
		SKIP(return, "no nested SVM");
	if (!thp_configured())
		SKIP(return, "no transparent huge pages");
	if (!tdp_mmu() || !get_kvm_param_bool("eager_page_split"))
		SKIP(return, "nobody splits huge pages of the shadow MMU here");
	check_nested_split(false, true);
	check_nested_split(true, true);
	check_nested_split(true, false);
}

static bool nested_vmx_supported(void)
{
	return nested_supported() && kvm_cpu_has(X86_FEATURE_VMX);
}

/*
 * The CPU writes L2's TPR to a page of L1 by its physical address, which is
 * marked when L2 exits.  SYNC includes it, and so does the end of logging: with
 * one CPU in any case, as whoever harvests there has seen an exit before.
 */
TEST(nested_virtual_apic_page)
{
	uint8_t *want;
	struct dsr *v;
	int i;

	if (!nested_vmx_supported())
		SKIP(return, "no nested VMX");
	v = dsr_new(.entries = 64, .nr_vcpus = 1);
	want = set_new(v);
	set_add(want, 5, 1, 1);
	vmx_extras.apic_gpa = TEST_GPA + 5 * PG;
	run_nested(v, false, 0);
	guest_start(v, 0, (struct mailbox){ .op = OP_TPR });
	check_sync_batches(v, want, 100);
	for (i = 0; i < rounds(20); i++) {
		guest_batch(v, 0);
		dsr_log(v, false);
		check_dead(v, 5, 1, MANY_RUNS);
		dsr_log(v, true);
		dsr_reopen(v);
	}
	guest_join(v, 0);
	free(want);
	dsr_free(v);
}

/*
 * Who is in a call of the log when the VMM is killed puts the last reference to
 * the VM.  What KVM keeps of L1's memory for a vCPU in L2, a shadow VMCS, must
 * not be written to where that is in the VMM, but to nowhere.
 */
TEST(vmm_killed_in_nested_guest)
{
	struct gated_call h = { .cmd = KVM_DIRTY_SLOT_LOG_HARVEST, .nr_runs = 100 };
	struct vmx_pages *vmx;
	uint8_t *canary;
	struct dsr *v;
	void *hva;
	int sk[2];
	pid_t pid;
	int i;

	if (!nested_vmx_supported())
		SKIP(return, "no nested VMX");
	if (!have_uffd())
		SKIP(return, "no userfaultfd");

	CHECK_OK(socketpair(AF_UNIX, SOCK_STREAM, 0, sk));
	pid = fork();
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		v = dsr_new(.entries = 64, .nr_vcpus = 1);
		vmx_extras.shadow_vmcs = true;
		vmx = run_nested(v, false, 0);
		guest_start(v, 0, (struct mailbox){ .op = OP_BATCHES, .npages = 3 });
		guest_batch(v, 0);
		send_fd(sk[1], 0, v->fd);
		CHECK_EQ(write(sk[1], &vmx->shadow_vmcs_hva, sizeof(hva)), sizeof(hva));
		for (;;)
			pause();
	}
	h.fd = recv_fd(sk[0], NULL, 0);
	CHECK_EQ(read(sk[0], &hva, sizeof(hva)), sizeof(hva));
	canary = mmap(hva, PG, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	CHECK(canary == hva, "there is something at %p already", hva);
	memset(canary, 0xa5, PG);

	gated_start(&h);
	kill(pid, SIGKILL);
	CHECK_EQ(waitpid(pid, NULL, 0), pid);
	CHECK_EQ(dsr_info(h.fd).flags, 0);	/* the VM is still there */
	gated_end(&h);
	CHECK_EQ(h.ret, 0);
	CHECK_EQ(h.args.nr_pages, 3);
	CHECK(poll_log(h.fd, 10000) & POLLHUP, "no POLLHUP");
	for (i = 0; i < PG; i++)
		CHECK(canary[i] == 0xa5, "byte %d of another process was written", i);
	close(h.fd);
}

/* -- what hardware holds, of a vCPU that waits for userspace ----------------- */

static struct {
	int fd, ret, calls;
	struct kvm_dirty_run runs[128];
	struct kvm_dirty_slot_runs args;
} sync_call;

/* Who supplies the guest's memory looks at the log first. */
static int sync_handler(int mode, int uffd, struct uffd_msg *msg)
{
	if (!sync_call.calls) {
		sync_call.ret = __dsr_runs(sync_call.fd, KVM_DIRTY_SLOT_LOG_HARVEST,
					   sync_call.runs, ARRAY_SIZE(sync_call.runs),
					   KVM_DIRTY_HARVEST_SYNC, &sync_call.args);
	}
	__atomic_store_n(&sync_call.calls, sync_call.calls + 1, __ATOMIC_RELEASE);
	return gate_handler(mode, uffd, msg);
}

/*
 * On its way out of the guest KVM reads the task priority from a page of the guest,
 * which may not be there, and sleeps.  What hardware holds it has to have handed over
 * by then: who would supply that page may be the one who waits for it, with SYNC.
 */
TEST(sync_while_vcpu_waits_for_vapic_page)
{
	struct mailbox mb = { .op = OP_BATCHES, .first = 3, .npages = 100, .step = 2 };
	struct kvm_vapic_addr vapic = { .vapic_addr = OTHER_GPA };
	struct uffd_desc *uffd;
	uint8_t *want, *got;
	struct dsr *v;
	void *page;
	int i;

	if (!have_uffd())
		SKIP(return, "no userfaultfd");
	v = dsr_new(.entries = 1024, .nr_vcpus = 1);
	want = set_new(v);
	set_add(want, mb.first, mb.npages, mb.step);
	vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, OTHER_GPA, OTHER_SLOT, 1, 0);
	page = addr_gpa2hva(v->vm, OTHER_GPA);
	memset(page, 0, PG);
	vcpu_ioctl(v->vcpu[0], KVM_SET_VAPIC_ADDR, &vapic);
	sync_call.fd = v->fd;
	WRITE_ONCE(gate.open, true);
	uffd = uffd_setup_demand_paging(UFFDIO_REGISTER_MODE_MISSING, 0, page, PG, 1,
					sync_handler);
	guest_start(v, 0, mb);
	for (i = 0; i < rounds(30); i++) {
		got = set_new(v);
		guest_batch(v, 0);
		__atomic_store_n(&sync_call.calls, 0, __ATOMIC_RELEASE);
		CHECK_OK(madvise(page, PG, MADV_DONTNEED));
		while (!__atomic_load_n(&sync_call.calls, __ATOMIC_ACQUIRE))
			sched_yield();
		CHECK_EQ(sync_call.ret, 0);
		CHECK_EQ(sync_call.args.flags, 0);
		runs_take(got, v->npages, sync_call.runs, &sync_call.args,
			  ARRAY_SIZE(sync_call.runs));
		set_check(v, got, want);
		free(got);
	}
	guest_join(v, 0);
	uffd_stop_demand_paging(uffd);
	expect_nothing(v);
	free(want);
	dsr_free(v);
}

/* -- huge pages ------------------------------------------------------------ */

/*
 * Somebody else, who gets a log three times, and harvests all pages each time; @check:
 * after that, or NULL.
 */
static void __noreturn hold_log(int sk, uint64_t npages, void (*check)(void))
{
	uint8_t *got = calloc(1, npages);
	int i, log;

	for (i = 0; i < 3; i++) {
		log = recv_fd(sk, NULL, 0);
		CHECK_EQ(harvest_cap(log, got, npages, 0, 64), npages);
		close(log);
		if (check)
			check();
		CHECK_EQ(write(sk, "", 1), 1);
	}
	_exit(0);
}

/*
 * Starts them, in the group of who calls.  Before there is a VM: fork() write-protects,
 * and so unmaps, the guest's memory.  *@sock: where logs go; closed when they ended.
 */
static pid_t start_holder(int *sock, uint64_t npages, void (*check)(void))
{
	int sk[2];
	pid_t pid;

	CHECK_OK(socketpair(AF_UNIX, SOCK_STREAM, 0, sk));
	fflush(NULL);
	pid = fork();
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		hold_log(sk[1], npages, check);
	}
	close(sk[1]);
	*sock = sk[0];
	return pid;
}

/*
 * A harvest, which anybody may make who holds the log, splits no huge pages: that
 * takes memory.  The next write to one does.  KVM_CLEAR_DIRTY_LOG, which the VMM makes
 * for pages that it expects to be written, splits as ever.
 */
TEST(harvest_does_not_split_huge_pages)
{
	const uint32_t huge = 512, nr = 4;
	uint64_t before, *bitmap;
	struct dsr *v;
	int fd, i, sock;
	pid_t pid;
	char c;

	if (!thp_configured())
		SKIP(return, "no transparent huge pages");

	pid = start_holder(&sock, nr * huge, NULL);
	v = dsr_new(.entries = 64, .nr_vcpus = 1, .no_log = true, .npages = nr * huge,
		    .src = VM_MEM_SRC_ANONYMOUS_THP,
		    .manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
	fd = vm_get_stats_fd(v->vm);
	bitmap = malloc(v->npages / 8);
	memset(bitmap, 0xff, v->npages / 8);
	for (i = 0; i < 3; i++) {
		/* Mapped huge, with the shadow MMU as the guest's own page tables say. */
		guest_write_step(v, 0, 0, nr, huge);
		dsr_log(v, true);
		dsr_reopen(v);
		before = stat_of(fd, "pages_2m");
		CHECK(before >= nr || !tdp_mmu(), "%lu huge pages", before);

		/* All pages are dirty, and are taken by somebody else. */
		send_fd(sock, 0, v->fd);
		CHECK_EQ(read(sock, &c, 1), 1);
		CHECK_EQ(stat_of(fd, "pages_2m"), before);
		/* They are protected, all the same. */
		guest_write_step(v, 0, 5, nr, huge);
		expect_step(v, 5, nr, huge);
		CHECK(!tdp_mmu() || stat_of(fd, "pages_2m") < before,
		      "huge pages that were written");
		guest_write(v, 0, 0, v->npages);
		expect(v, 0, v->npages);
		expect_armed(v, huge - 3, 6);
		dsr_log(v, false);

		/* and KVM_CLEAR_DIRTY_LOG */
		guest_write_step(v, 0, 0, nr, huge);
		dsr_log(v, true);
		dsr_reopen(v);
		before = stat_of(fd, "pages_2m");
		kvm_vm_clear_dirty_log(v->vm, TEST_SLOT, bitmap, 0, v->npages);
		if (tdp_mmu() && get_kvm_param_bool("eager_page_split")) {
			CHECK(before >= nr, "%lu huge pages", before);
			CHECK_EQ(stat_of(fd, "pages_2m"), before - nr);
		}
		expect_nothing(v);
		expect_armed(v, huge - 3, 6);
		dsr_log(v, false);
	}
	child_check(pid);
	close(sock);
	free(bitmap);
	close(fd);
	dsr_free(v);
}

/* -- who pays -------------------------------------------------------------- */

static struct {
	char root[32];		/* where all groups are */
	char vm[64], holder[64];
} groups = { .root = "/tmp/dsr-cgroup.XXXXXX" };

static void group_write(const char *dir, const char *file, const char *value)
{
	char name[128];
	int fd;

	snprintf(name, sizeof(name), "%s/%s", dir, file);
	fd = open(name, O_WRONLY);
	CHECK(fd >= 0, "cannot open %s", name);
	CHECK(write(fd, value, strlen(value)) == (int)strlen(value), "%s to %s", value, name);
	close(fd);
}

static void group_read(const char *dir, const char *file, char *buf, size_t size)
{
	char name[128];
	size_t len = 0;
	int fd, n;

	snprintf(name, sizeof(name), "%s/%s", dir, file);
	fd = open(name, O_RDONLY);
	CHECK(fd >= 0, "cannot open %s", name);
	while ((n = read(fd, buf + len, size - 1 - len)) > 0)
		len += n;
	CHECK(!n, "cannot read %s", name);
	buf[len] = 0;
	close(fd);
}

/* False if there are none. */
static bool groups_make(void)
{
	char buf[512];

	CHECK(mkdtemp(groups.root), "no directory");
	if (mount("none", groups.root, "cgroup2", 0, NULL)) {
		CHECK(errno == ENODEV, "mount");
		CHECK_OK(rmdir(groups.root));
		return false;
	}
	group_read(groups.root, "cgroup.controllers", buf, sizeof(buf));
	if (!strstr(buf, "memory")) {
		CHECK_OK(umount(groups.root));
		CHECK_OK(rmdir(groups.root));
		return false;
	}
	group_write(groups.root, "cgroup.subtree_control", "+memory");
	snprintf(groups.vm, sizeof(groups.vm), "%s/dsr-vm.%d", groups.root, getpid());
	snprintf(groups.holder, sizeof(groups.holder), "%s/dsr-holder.%d", groups.root, getpid());
	CHECK_OK(mkdir(groups.vm, 0755));
	CHECK_OK(mkdir(groups.holder, 0755));
	return true;
}

static void groups_remove(void)
{
	group_write(groups.root, "cgroup.procs", "0");
	CHECK_OK(rmdir(groups.vm));
	CHECK_OK(rmdir(groups.holder));
	CHECK_OK(umount(groups.root));
	CHECK_OK(rmdir(groups.root));
}

/* All of this process, and what it allocates from now on. */
static void group_enter(const char *dir)
{
	group_write(dir, "cgroup.procs", "0");
}

/*
 * Pages of page tables of guests that are charged to the group, which this process is
 * in.  The kernel counts on each CPU, and adds up if there is much to add up.
 */
static uint64_t group_page_tables(const char *dir)
{
	const size_t size = 4096 * PG;
	char buf[8192], *p;
	size_t i;

	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(p != MAP_FAILED, "no memory");
	for (i = 0; i < size; i += PG)
		p[i] = 1;
	CHECK_OK(munmap(p, size));
	group_read(dir, "memory.stat", buf, sizeof(buf));
	p = strstr(buf, "\nsec_pagetables ");
	CHECK(p, "no sec_pagetables in memory.stat");
	return strtoull(strchr(p, ' '), NULL, 10) / PG;
}

static void check_not_charged(void)
{
	CHECK_EQ(group_page_tables(groups.holder), 0);
}

/*
 * Who holds the log is another process, in another group.  Its harvest costs it no page
 * tables: it splits no huge page.  The next write does, and who runs the vCPU pays.
 */
TEST(harvest_charges_nobody_else)
{
	const uint32_t huge = 512, nr = 8;
	uint64_t *bitmap, before;
	struct dsr *v;
	int i, sock;
	pid_t pid;
	char c;

	if (!thp_configured())
		SKIP(return, "no transparent huge pages");
	if (!groups_make())
		SKIP(return, "no memory cgroups");

	group_enter(groups.holder);
	pid = start_holder(&sock, nr * huge, check_not_charged);
	group_enter(groups.vm);
	v = dsr_new(.entries = 64, .nr_vcpus = 1, .no_log = true, .npages = nr * huge,
		    .src = VM_MEM_SRC_ANONYMOUS_THP,
		    .manual = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
	for (i = 0; i < 3; i++) {
		guest_write_step(v, 0, 0, nr, huge);
		dsr_log(v, true);
		dsr_reopen(v);
		before = group_page_tables(groups.vm);
		CHECK(before, "no page tables of a guest that ran");
		send_fd(sock, 0, v->fd);
		CHECK_EQ(read(sock, &c, 1), 1);
		CHECK_EQ(group_page_tables(groups.vm), before);
		guest_write_step(v, 0, 5, nr, huge);
		CHECK(!tdp_mmu() || group_page_tables(groups.vm) >= before + nr,
		      "%lu pages of page tables, and then %lu", before,
		      group_page_tables(groups.vm));
		expect_step(v, 5, nr, huge);
		dsr_log(v, false);
	}
	child_check(pid);
	close(sock);

	/* Would it be seen?  Whoever clears the bitmap splits, and pays. */
	if (tdp_mmu() && get_kvm_param_bool("eager_page_split")) {
		bitmap = malloc(v->npages / 8);
		memset(bitmap, 0xff, v->npages / 8);
		guest_write_step(v, 0, 0, nr, huge);
		dsr_log(v, true);
		group_enter(groups.holder);
		kvm_vm_clear_dirty_log(v->vm, TEST_SLOT, bitmap, 0, v->npages);
		CHECK_EQ(group_page_tables(groups.holder), nr);
		free(bitmap);
	}
	dsr_free(v);
	groups_remove();
}

int main(int argc, char *argv[])
{
	return dsr_test_main(argc, argv);
}
