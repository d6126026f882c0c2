/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What tests of dirty slot rings need of the architecture: all that a port of
 * the tests that are not of one has to supply.
 *
 * guest_*() run in the guest, but for those that have a vCPU or its kvm_run.
 */
#ifndef SELFTEST_KVM_DIRTY_SLOT_RING_GUEST_H
#define SELFTEST_KVM_DIRTY_SLOT_RING_GUEST_H

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include <asm/kvm_para.h>

#include "kvm_util.h"
#include "processor.h"

/* For a memslot beyond what guests can address */
#define SLOT_TOO_HIGH_ERRNO	EINVAL

#define GUEST_DONE_PORT		0x1001
#define GUEST_INS_PORT		0x1002

/* In a loop that waits; also for the host. */
static inline void guest_relax(void)
{
	asm volatile("pause" ::: "memory");
}

/*
 * Nobody interrupts these guests.  It is for emulators of virtualization
 * extensions that do not let the host's interrupts through to a vCPU that has
 * them disabled, and so would never get out of a loop.
 */
static inline void guest_enable_interrupts(void)
{
	asm volatile("sti");
}

static inline uint64_t guest_cycles(void)
{
	return rdtsc();
}

static inline uint64_t guest_cycles_khz(struct kvm_vcpu *vcpu)
{
	return __vcpu_ioctl(vcpu, KVM_GET_TSC_KHZ, NULL);
}

/* Tell the host that what it asked for is done. */
static inline void guest_exit(void)
{
	asm volatile("outb %%al, %%dx" : : "a"(0), "d"(GUEST_DONE_PORT) : "memory");
}

static inline bool guest_is_done(const struct kvm_run *run)
{
	return run->exit_reason == KVM_EXIT_IO && run->io.port == GUEST_DONE_PORT;
}

/* For whoever wonders where a guest is. */
static inline void guest_print_registers(struct kvm_vcpu *vcpu, FILE *to)
{
	struct kvm_regs regs;

	vcpu_regs_get(vcpu, &regs);
	fprintf(to, "rip %#llx, flags %#llx", regs.rip, regs.rflags);
}

/* KVM writes stolen time to @gpa from now on; false if it cannot. */
static inline bool guest_set_steal_time(struct kvm_vcpu *vcpu, uint64_t gpa)
{
	return _vcpu_set_msr(vcpu, MSR_KVM_STEAL_TIME, gpa | KVM_MSR_ENABLED);
}

/* Does hardware hold back what it logs until the vCPU exits? */
static inline bool guest_writes_are_buffered(void)
{
	return host_cpu_is_intel && get_kvm_intel_param_bool("pml");
}

/* All of it, by few page tables; @size is rounded up. */
static inline void guest_map(struct kvm_vm *vm, uint64_t gva, uint64_t gpa, uint64_t size)
{
	bool big = !(size % PG_SIZE_1G) && kvm_cpu_has(X86_FEATURE_GBPAGES);
	int level = big ? PG_LEVEL_1G : PG_LEVEL_2M;

	virt_map_level(vm, gva, gpa, align_up(size, PG_LEVEL_SIZE(level)), level);
}

/* x86 only: what OP_TPR and OP_INS are made of. */

static inline void guest_write_tpr(uint64_t value)
{
	asm volatile("mov %0, %%cr8" : : "r"(value & 1) : "memory");
}

/* Has KVM's emulator store a byte, which the host supplies. */
static inline void guest_ins(void *dst)
{
	asm volatile("insb" : "+D"(dst) : "d"(GUEST_INS_PORT) : "memory");
}

/* Supplies the byte, if that is what the vCPU left for. */
static inline bool guest_supply_ins(struct kvm_run *run, uint8_t byte)
{
	if (run->exit_reason != KVM_EXIT_IO || run->io.port != GUEST_INS_PORT)
		return false;
	memset((void *)run + run->io.data_offset, byte, run->io.size * run->io.count);
	return true;
}

#endif /* SELFTEST_KVM_DIRTY_SLOT_RING_GUEST_H */
