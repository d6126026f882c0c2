/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KVM_TESTING_VCPU_ARM64_H
#define KVM_TESTING_VCPU_ARM64_H

/*
 * Included by vcpu.h: EL1 with its MMU on, as accesses without it may go past the caches,
 * and the host would not see them.  Memory may be in the first 4 GiB; at 8 GiB there is
 * nothing, and a store to it makes KVM leave with KVM_EXIT_MMIO.
 */

/* The host's pages may be as large; the translation table is in the second half. */
#define VCPU_CODE_SIZE	0x10000UL
#define VCPU_TABLE	0x8000UL
#define VCPU_DONE	KVM_EXIT_MMIO
#define VCPU_DEVICE	0x200000000UL

/*
 * x0: seed, x1: times, x2: address, x3: step, x4: the device, x5: how far to shift a page's
 * number.  To the store that was the last program's end, KVM goes back to step over it: that
 * takes the first instruction of the next one.
 */
asm(".pushsection .rodata\n"
	".balign 8\n"
	"guest_writes:\n"
	"	nop\n"
	"1:	str	w0, [x2]\n"
	"	add	x2, x2, x3\n"
	"	subs	x1, x1, #1\n"
	"	b.ne	1b\n"
	"	str	wzr, [x4]\n"
	"guest_random:\n"
	"	nop\n"
	"	movz	w7, #0x660d\n"
	"	movk	w7, #0x19, lsl #16\n"
	"	movz	w8, #0xf35f\n"
	"	movk	w8, #0x3c6e, lsl #16\n"
	"1:	madd	w0, w0, w7, w8\n"
	"	lsr	w9, w0, #22\n"
	"	lsl	x9, x9, x5\n"
	"	ldr	w6, [x2, x9]\n"
	"	add	w6, w6, #1\n"
	"	str	w6, [x2, x9]\n"
	"	subs	x1, x1, #1\n"
	"	b.ne	1b\n"
	"	str	wzr, [x4]\n"
	"guest_end:\n"
	".popsection\n");

static inline void vcpu_set_reg(int vcpu_fd, uint64_t id, uint64_t value)
{
	struct kvm_one_reg reg = {
		.id = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | id, .addr = (uintptr_t)&value,
	};

	if (ioctl(vcpu_fd, KVM_SET_ONE_REG, &reg))
		err(1, "KVM_SET_ONE_REG %#lx", (unsigned long)id);
}

static inline uint64_t vcpu_get_reg(int vcpu_fd, uint64_t id)
{
	uint64_t value = 0;
	struct kvm_one_reg reg = {
		.id = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | id, .addr = (uintptr_t)&value,
	};

	if (ioctl(vcpu_fd, KVM_GET_ONE_REG, &reg))
		err(1, "KVM_GET_ONE_REG %#lx", (unsigned long)id);
	return value;
}

static inline void vcpu_set_core_reg(int vcpu_fd, size_t offset, uint64_t value)
{
	vcpu_set_reg(vcpu_fd, KVM_REG_ARM_CORE | offset / sizeof(uint32_t), value);
}

static inline void vcpu_load_code(void *mem, uint64_t gpa)
{
	/*
	 * Blocks of 1 GiB, accessed already, for EL1 alone: memory, shared by the vCPUs, of
	 * MAIR's attribute 0; and, not to be executed, a device, of attribute 1.
	 */
	uint64_t table[512] = { [VCPU_DEVICE >> 30] = VCPU_DEVICE | 0x60000000000405 };
	uint64_t i;

	(void)gpa;
	for (i = 0; i < 4; i++)
		table[i] = i << 30 | 0x701;
	memcpy(mem, guest_writes, guest_end - guest_writes);
	memcpy((char *)mem + VCPU_TABLE, table, sizeof(table));
	__builtin___clear_cache((char *)mem, (char *)mem + VCPU_CODE_SIZE);
}

static inline void vcpu_init(int vm_fd, int vcpu_fd, uint64_t gpa)
{
	/* EL1's */
	const uint64_t sctlr = ARM64_SYS_REG(3, 0, 1, 0, 0), ttbr0 = ARM64_SYS_REG(3, 0, 2, 0, 0),
		       tcr = ARM64_SYS_REG(3, 0, 2, 0, 2), mair = ARM64_SYS_REG(3, 0, 10, 2, 0);
	struct kvm_vcpu_init init;

	if (ioctl(vm_fd, KVM_ARM_PREFERRED_TARGET, &init))
		err(1, "KVM_ARM_PREFERRED_TARGET");
	if (ioctl(vcpu_fd, KVM_ARM_VCPU_INIT, &init))
		err(1, "KVM_ARM_VCPU_INIT");
	/* Write-back; nGnRnE */
	vcpu_set_reg(vcpu_fd, mair, 0x00ff);
	/* 39 bits in pages of 4 KiB, so that the table's entries are of 1 GiB; not the upper half */
	vcpu_set_reg(vcpu_fd, tcr, 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2ULL << 32);
	vcpu_set_reg(vcpu_fd, ttbr0, gpa + VCPU_TABLE);
	/* The MMU and both caches */
	vcpu_set_reg(vcpu_fd, sctlr, vcpu_get_reg(vcpu_fd, sctlr) | 1 << 0 | 1 << 2 | 1 << 12);
}

static inline void vcpu_start(int vcpu_fd, uint64_t gpa, const struct vcpu_args *args)
{
#define VCPU_REG(name)	offsetof(struct kvm_regs, regs.name)
	vcpu_set_core_reg(vcpu_fd, VCPU_REG(pc), gpa + (args->program - guest_writes));
	vcpu_set_core_reg(vcpu_fd, VCPU_REG(regs[0]), args->seed);
	vcpu_set_core_reg(vcpu_fd, VCPU_REG(regs[1]), args->times);
	vcpu_set_core_reg(vcpu_fd, VCPU_REG(regs[2]), args->address);
	vcpu_set_core_reg(vcpu_fd, VCPU_REG(regs[3]), args->step);
	vcpu_set_core_reg(vcpu_fd, VCPU_REG(regs[4]), VCPU_DEVICE);
	vcpu_set_core_reg(vcpu_fd, VCPU_REG(regs[5]), __builtin_ctzl(sysconf(_SC_PAGESIZE)));
#undef VCPU_REG
}

#endif
