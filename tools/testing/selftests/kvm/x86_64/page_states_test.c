// SPDX-License-Identifier: GPL-2.0-only
/*
 * MSR_KVM_PAGE_STATES: what it takes and what it refuses, by guests and by userspace.
 * KVM itself never looks at the table that it points to.
 */
#include <asm/kvm_para.h>
#include <linux/kvm_para.h>
#include <stddef.h>

#include "apic.h"
#include "kvm_test_harness.h"
#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#define X86_FEATURE_KVM_PAGE_STATES \
	KVM_X86_CPU_FEATURE(KVM_CPUID_FEATURES, 0, EAX, KVM_FEATURE_PAGE_STATES)

#define MSR	MSR_KVM_PAGE_STATES
#define ON	((uint64_t)KVM_MSR_ENABLED)

/* In memslot 0. */
#define TABLE	0x10000ul
#define TABLE_2	0x20000ul
/* In no memslot of these VMs, and well below any MAXPHYADDR. */
#define NOWHERE	0xd0000000ul

static_assert(sizeof(struct kvm_page_states) == 4096, "the table follows on the next page");
static_assert(offsetof(struct kvm_page_states, version) == 4, "layout");
static_assert(offsetof(struct kvm_page_states, nr) == 8, "layout");
static_assert(KVM_FEATURE_PAGE_STATES == 19 && MSR_KVM_PAGE_STATES == 0x4b564d09, "numbers");

/* One step of a guest: a write if there is a value, and always a read. */
struct step {
	bool write;
	bool gp;		/* both are to get #GP */
	uint64_t value;
	uint64_t then;		/* what is read after it */
};

static struct step step;

static void guest_steps(void)
{
	uint64_t value = ~0ull;
	uint8_t vector;

	for (;;) {
		if (step.write) {
			vector = wrmsr_safe(MSR, step.value);
			__GUEST_ASSERT(vector == (step.gp ? GP_VECTOR : 0),
				       "writing %#lx: vector %u", step.value, vector);
		}
		vector = rdmsr_safe(MSR, &value);
		__GUEST_ASSERT(vector == (step.gp && step.then == ~0ull ? GP_VECTOR : 0),
			       "reading: vector %u", vector);
		if (!vector)
			GUEST_ASSERT_EQ(value, step.then);
		GUEST_SYNC(0);
	}
}

static void run(struct kvm_vcpu *vcpu, struct step s)
{
	struct ucall uc;

	step = s;
	sync_global_to_guest(vcpu->vm, step);
	vcpu_run(vcpu);
	TEST_ASSERT_KVM_EXIT_REASON(vcpu, KVM_EXIT_IO);
	switch (get_ucall(vcpu, &uc)) {
	case UCALL_SYNC:
		break;
	case UCALL_ABORT:
		REPORT_GUEST_ASSERT(uc);
		break;
	default:
		TEST_FAIL("unexpected ucall %lu", uc.cmd);
	}
}

static void guest_writes(struct kvm_vcpu *vcpu, uint64_t value)
{
	run(vcpu, (struct step){ .write = true, .value = value, .then = value });
}

static void guest_reads(struct kvm_vcpu *vcpu, uint64_t value)
{
	run(vcpu, (struct step){ .then = value });
}

static void guest_is_refused(struct kvm_vcpu *vcpu, uint64_t value, uint64_t then)
{
	run(vcpu, (struct step){ .write = true, .gp = true, .value = value, .then = then });
}

static void host_writes(struct kvm_vcpu *vcpu, uint64_t value)
{
	TEST_ASSERT_EQ(_vcpu_set_msr(vcpu, MSR, value), 1);
	TEST_ASSERT_EQ(vcpu_get_msr(vcpu, MSR), value);
}

static void host_is_refused(struct kvm_vcpu *vcpu, uint64_t value)
{
	uint64_t was = vcpu_get_msr(vcpu, MSR);

	TEST_ASSERT(_vcpu_set_msr(vcpu, MSR, value) == 0, "%#lx was taken", value);
	TEST_ASSERT_EQ(vcpu_get_msr(vcpu, MSR), was);
}

static uint64_t beyond_maxphyaddr(void)
{
	return 1ull << kvm_cpu_property(X86_PROPERTY_MAX_PHY_ADDR);
}

KVM_ONE_VCPU_TEST_SUITE(page_states);

TEST(offered)
{
	const struct kvm_msr_list *list = kvm_get_msr_index_list();
	bool found = false;
	uint32_t i;

	TEST_ASSERT(kvm_cpu_has(X86_FEATURE_KVM_PAGE_STATES), "not in KVM_GET_SUPPORTED_CPUID");
	for (i = 0; i < list->nmsrs; i++)
		found |= list->indices[i] == MSR;
	TEST_ASSERT(found, "not in KVM_GET_MSR_INDEX_LIST");
}

/* One value for all vCPUs, and for userspace whichever it asks. */
TEST(one_for_all_vcpus)
{
	struct kvm_vcpu *vcpu[2];
	struct kvm_vm *vm = vm_create_with_vcpus(2, guest_steps, vcpu);
	int i;

	for (i = 0; i < 2; i++)
		guest_reads(vcpu[i], 0);

	guest_writes(vcpu[0], TABLE | ON);
	guest_reads(vcpu[1], TABLE | ON);
	guest_writes(vcpu[1], TABLE_2 | ON);
	guest_reads(vcpu[0], TABLE_2 | ON);
	for (i = 0; i < 2; i++)
		TEST_ASSERT_EQ(vcpu_get_msr(vcpu[i], MSR), TABLE_2 | ON);

	guest_writes(vcpu[0], 0);
	guest_reads(vcpu[1], 0);

	host_writes(vcpu[1], TABLE | ON);
	guest_reads(vcpu[0], TABLE | ON);
	TEST_ASSERT_EQ(vcpu_get_msr(vcpu[0], MSR), TABLE | ON);
	host_writes(vcpu[0], 0);
	guest_reads(vcpu[1], 0);

	kvm_vm_free(vm);
}

/* The first page is as good as any. */
KVM_ONE_VCPU_TEST(page_states, page_zero, guest_steps)
{
	guest_writes(vcpu, ON);
	guest_writes(vcpu, 0);
}

KVM_ONE_VCPU_TEST(page_states, refused, guest_steps)
{
	const uint64_t good[] = { 0, TABLE | ON };
	uint64_t max = beyond_maxphyaddr();
	int i, bit;

	for (i = 0; i < ARRAY_SIZE(good); i++) {
		host_writes(vcpu, good[i]);

		/* reserved bits, with and without an address, enabled or not */
		for (bit = 1; bit < 12; bit++) {
			guest_is_refused(vcpu, BIT_ULL(bit), good[i]);
			guest_is_refused(vcpu, BIT_ULL(bit) | ON, good[i]);
			guest_is_refused(vcpu, TABLE_2 | BIT_ULL(bit) | ON, good[i]);
			host_is_refused(vcpu, TABLE_2 | BIT_ULL(bit) | ON);
		}

		/* an address, but not enabled */
		guest_is_refused(vcpu, TABLE_2, good[i]);
		host_is_refused(vcpu, TABLE_2);

		/* an address that there cannot be */
		guest_is_refused(vcpu, max | ON, good[i]);
		guest_is_refused(vcpu, max | TABLE_2 | ON, good[i]);
		guest_is_refused(vcpu, BIT_ULL(63) | ON, good[i]);
		host_is_refused(vcpu, max | ON);
		host_is_refused(vcpu, BIT_ULL(63) | ON);

		/* one that there could be, but without memory, or with KVM's own */
		guest_is_refused(vcpu, NOWHERE | ON, good[i]);
		guest_is_refused(vcpu, APIC_DEFAULT_GPA | ON, good[i]);
		guest_is_refused(vcpu, (max - 4096) | ON, good[i]);

		guest_reads(vcpu, good[i]);
	}
}

/* Userspace restores it before there is memory, and sets it to zero when it resets. */
TEST(host_before_memory)
{
	struct kvm_vm *vm = vm_create_barebones();
	struct kvm_vcpu *vcpu = __vm_vcpu_add(vm, 0);

	vcpu_init_cpuid(vcpu, kvm_get_supported_cpuid());
	TEST_ASSERT_EQ(vcpu_get_msr(vcpu, MSR), 0);
	host_writes(vcpu, TABLE | ON);
	host_writes(vcpu, NOWHERE | ON);
	host_writes(vcpu, (beyond_maxphyaddr() - 4096) | ON);
	host_is_refused(vcpu, beyond_maxphyaddr() | ON);
	host_writes(vcpu, 0);
	kvm_vm_free(vm);
}

/*
 * Only the header has to be in memory, and only when a guest says where it is: KVM never looks, so
 * there is nothing that it would have to check again.
 */
KVM_ONE_VCPU_TEST(page_states, memory_goes, guest_steps)
{
	const uint64_t pages = 4, last = NOWHERE + (pages - 1) * 4096;

	vm_userspace_mem_region_add(vcpu->vm, VM_MEM_SRC_ANONYMOUS, NOWHERE, 10, pages, 0);
	guest_writes(vcpu, NOWHERE | ON);
	guest_writes(vcpu, last | ON);
	guest_is_refused(vcpu, (last + 4096) | ON, last | ON);

	vm_mem_region_delete(vcpu->vm, 10);
	guest_reads(vcpu, last | ON);
	TEST_ASSERT_EQ(vcpu_get_msr(vcpu, MSR), last | ON);
	guest_is_refused(vcpu, NOWHERE | ON, last | ON);
	guest_writes(vcpu, 0);
}

/* By what userspace saves of any vCPU and restores in another VM; one that is new has none. */
TEST(migrates)
{
	struct kvm_x86_state *state;
	struct kvm_vcpu *vcpu;
	struct kvm_vm *vm = vm_create_with_one_vcpu(&vcpu, guest_steps);

	guest_writes(vcpu, TABLE | ON);
	state = vcpu_save_state(vcpu);
	kvm_vm_release(vm);

	vcpu = vm_recreate_with_one_vcpu(vm);
	TEST_ASSERT_EQ(vcpu_get_msr(vcpu, MSR), 0);
	vcpu_load_state(vcpu, state);
	kvm_x86_state_cleanup(state);
	guest_reads(vcpu, TABLE | ON);
	guest_writes(vcpu, TABLE_2 | ON);
	kvm_vm_free(vm);
}

/* A guest that was not offered it has no such MSR, but userspace always has. */
KVM_ONE_VCPU_TEST(page_states, not_offered, guest_steps)
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_ENFORCE_PV_FEATURE_CPUID));
	vcpu_clear_cpuid_feature(vcpu, X86_FEATURE_KVM_PAGE_STATES);

	/* Nobody enforces it. */
	guest_writes(vcpu, TABLE | ON);

	vcpu_enable_cap(vcpu, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1);
	guest_is_refused(vcpu, 0, ~0ull);
	guest_is_refused(vcpu, TABLE_2 | ON, ~0ull);
	TEST_ASSERT_EQ(vcpu_get_msr(vcpu, MSR), TABLE | ON);
	host_writes(vcpu, TABLE_2 | ON);
	host_writes(vcpu, 0);
}

KVM_ONE_VCPU_TEST(page_states, offered_and_enforced, guest_steps)
{
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_ENFORCE_PV_FEATURE_CPUID));
	vcpu_enable_cap(vcpu, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1);
	guest_writes(vcpu, TABLE | ON);
	guest_writes(vcpu, 0);
}

int main(int argc, char *argv[])
{
	return test_harness_run(argc, argv);
}
