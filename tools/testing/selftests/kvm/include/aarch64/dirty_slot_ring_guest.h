/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What tests of dirty slot rings need of the architecture, for arm64; see x86's.
 */
#ifndef SELFTEST_KVM_DIRTY_SLOT_RING_GUEST_H
#define SELFTEST_KVM_DIRTY_SLOT_RING_GUEST_H

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "arch_timer.h"
#include "kvm_util.h"
#include "processor.h"
#include "ucall.h"

/* For a memslot beyond what guests can address */
#define SLOT_TOO_HIGH_ERRNO	EFAULT

/* Nothing else that a guest writes where there is no memory. */
#define GUEST_DONE_VALUE	0x6b766d2d646f6e65ul

static inline void guest_relax(void)
{
	asm volatile("yield" ::: "memory");
}

/* The host's interrupts get through to it in any case. */
static inline void guest_enable_interrupts(void)
{
}

static inline uint64_t guest_cycles(void)
{
	return timer_get_cntct(VIRTUAL);
}

static inline uint64_t guest_cycles_khz(struct kvm_vcpu *vcpu)
{
	return timer_get_cntfrq() / 1000;
}

static inline void guest_exit(void)
{
	ucall_arch_do_ucall(GUEST_DONE_VALUE);
}

static inline bool guest_is_done(const struct kvm_run *run)
{
	uint64_t value;

	if (run->exit_reason != KVM_EXIT_MMIO || !run->mmio.is_write ||
	    run->mmio.len != sizeof(value))
		return false;
	memcpy(&value, run->mmio.data, sizeof(value));
	return value == GUEST_DONE_VALUE;
}

static inline void guest_print_registers(struct kvm_vcpu *vcpu, FILE *to)
{
	uint64_t pc, pstate;

	vcpu_get_reg(vcpu, ARM64_CORE_REG(regs.pc), &pc);
	vcpu_get_reg(vcpu, ARM64_CORE_REG(regs.pstate), &pstate);
	fprintf(to, "pc %#lx, pstate %#lx", pc, pstate);
}

/* Once for each vCPU; its 64 bytes are at the start of the page. */
static inline bool guest_set_steal_time(struct kvm_vcpu *vcpu, uint64_t gpa)
{
	struct kvm_device_attr attr = {
		.group = KVM_ARM_VCPU_PVTIME_CTRL,
		.attr = KVM_ARM_VCPU_PVTIME_IPA,
		.addr = (uintptr_t)&gpa,
	};

	return !__vcpu_ioctl(vcpu, KVM_SET_DEVICE_ATTR, &attr);
}

/* KVM does not let hardware keep dirty state of what it maps for guests. */
static inline bool guest_writes_are_buffered(void)
{
	return false;
}

/* The library maps pages only: a block is an entry one level further up. */
static inline void guest_map_block(struct kvm_vm *vm, uint64_t gva, uint64_t gpa)
{
	const uint64_t table_mask = GENMASK_ULL(47, 12), valid = 1, table = 2, af = 1 << 10;
	uint64_t *entry = (uint64_t *)addr_gpa2hva(vm, vm->pgd) + (gva >> 39) % 512;
	int shift;

	for (shift = 30; shift >= 21; shift -= 9) {
		if (!*entry)
			*entry = vm_alloc_page_table(vm) | table | valid;
		entry = (uint64_t *)addr_gpa2hva(vm, *entry & table_mask) + (gva >> shift) % 512;
	}
	*entry = gpa | MT_NORMAL << 2 | af | valid;
}

/* All of it, by few page tables; @size is rounded up. */
static inline void guest_map(struct kvm_vm *vm, uint64_t gva, uint64_t gpa, uint64_t size)
{
	uint64_t block = 2 << 20, at;

	/* Of others it is not known how their blocks look. */
	if (vm->page_size != 4096 || vm->pgtable_levels != 4 || vm->pa_bits > 48) {
		virt_map(vm, gva, gpa, align_up(size, vm->page_size) / vm->page_size);
		return;
	}
	for (at = 0; at < size; at += block)
		guest_map_block(vm, gva + at, gpa + at);
}

#endif /* SELFTEST_KVM_DIRTY_SLOT_RING_GUEST_H */
