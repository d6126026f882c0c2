/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KVM_TESTING_VCPU_X86_H
#define KVM_TESTING_VCPU_X86_H

/* Included by vcpu.h: flat 32-bit mode, without paging. */

#define VCPU_CODE_SIZE	4096UL
#define VCPU_DONE	KVM_EXIT_HLT

/* %edi: address, %ecx: times, %edx: step, %eax: seed */
asm(".pushsection .rodata\n"
	".code32\n"
	"guest_writes:\n"
	"1:	mov	%eax, (%edi)\n"
	"	add	%edx, %edi\n"
	"	dec	%ecx\n"
	"	jnz	1b\n"
	"	hlt\n"
	"guest_random:\n"
	"1:	imul	$1664525, %eax, %eax\n"
	"	add	$1013904223, %eax\n"
	"	mov	%eax, %ebx\n"
	"	shr	$22, %ebx\n"
	"	shl	$12, %ebx\n"
	"	incl	(%ebx, %edi)\n"
	"	dec	%ecx\n"
	"	jnz	1b\n"
	"	hlt\n"
	"guest_end:\n"
	".code64\n"
	".popsection\n");

static inline void vcpu_load_code(void *mem, uint64_t gpa)
{
	(void)gpa;
	memcpy(mem, guest_writes, guest_end - guest_writes);
}

static inline void vcpu_init(int vm_fd, int vcpu_fd, uint64_t gpa)
{
	struct kvm_segment flat = {
		.limit = 0xffffffff, .present = 1, .s = 1, .g = 1, .db = 1,
	};
	struct kvm_sregs sregs;

	(void)vm_fd;
	(void)gpa;
	if (ioctl(vcpu_fd, KVM_GET_SREGS, &sregs))
		err(1, "KVM_GET_SREGS");
	flat.type = 3;
	flat.selector = 16;
	sregs.ds = flat;
	sregs.es = flat;
	sregs.ss = flat;
	flat.type = 11;
	flat.selector = 8;
	sregs.cs = flat;
	sregs.cr0 |= 1;
	if (ioctl(vcpu_fd, KVM_SET_SREGS, &sregs))
		err(1, "KVM_SET_SREGS");
}

static inline void vcpu_start(int vcpu_fd, uint64_t gpa, const struct vcpu_args *args)
{
	struct kvm_regs regs = {
		.rip = gpa + (args->program - guest_writes), .rflags = 2, .rdi = args->address,
		.rcx = args->times, .rdx = args->step, .rax = args->seed,
	};

	if (ioctl(vcpu_fd, KVM_SET_REGS, &regs))
		err(1, "KVM_SET_REGS");
}

#endif
