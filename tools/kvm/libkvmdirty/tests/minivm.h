/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef MINIVM_H
#define MINIVM_H

/*
 * A VM of a few vCPUs in flat 32-bit mode that run one of two programs, and three
 * memslots: code, MAIN and ODD.  The latter two are for the library to track.
 */

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <linux/kvm.h>
#include "kvmdirty.h"

#define PAGE		4096UL
#define MAX_VCPUS	4
#define CODE_GPA	0x10000UL
#define MAIN_GPA	0x1000000UL
#define MAIN_PAGES	1024U		/* guest_random relies on both */
#define ODD_GPA		0x4000000UL
#define ODD_PAGES	100U		/* no multiple of 64 */

enum { SLOT_CODE, SLOT_MAIN, SLOT_ODD, NR_SLOTS };

extern const char guest_writes[], guest_random[], guest_end[];

/* guest_writes: ecx times, increment the word at edi and step by edx.
 * guest_random: ecx times, increment the word at edi + a random page of MAIN.
 */
asm(".pushsection .rodata\n"
	".code32\n"
	"guest_writes:\n"
	"1:	incl	(%edi)\n"
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

struct minivm;

struct minivcpu {
	struct minivm *vm;
	int fd;
	struct kvm_run *run;
	int result;		/* 0, or what kvmdirty_vcpu_full() said */
	unsigned int full;	/* exits that it served */
};

struct minivm {
	int kvm, fd;
	int run_size;
	struct kvm_userspace_memory_region region[NR_SLOTS];
	uint8_t *mem[NR_SLOTS];
	struct minivcpu vcpu[MAX_VCPUS];
	int nr_vcpus;
	struct kvmdirty *kd;	/* to serve exits with; may be NULL */
	bool stop;
};

static inline void minivm_add_slot(struct minivm *vm, int slot, uint64_t gpa, uint64_t npages)
{
	struct kvm_userspace_memory_region *region = &vm->region[slot];

	vm->mem[slot] = mmap(NULL, npages * PAGE, PROT_READ | PROT_WRITE,
			     MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (vm->mem[slot] == MAP_FAILED)
		err(1, "guest memory");
	region->slot = slot;
	region->guest_phys_addr = gpa;
	region->memory_size = npages * PAGE;
	region->userspace_addr = (uintptr_t)vm->mem[slot];
	if (ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, region))
		err(1, "KVM_SET_USER_MEMORY_REGION");
}

/* 0, or -errno if this machine cannot */
static inline int minivm_create(struct minivm *vm)
{
	memset(vm, 0, sizeof(*vm));
	vm->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (vm->kvm < 0)
		return -errno;
	vm->fd = ioctl(vm->kvm, KVM_CREATE_VM, 0);
	if (vm->fd < 0)
		return -errno;
	vm->run_size = ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	minivm_add_slot(vm, SLOT_CODE, CODE_GPA, 1);
	minivm_add_slot(vm, SLOT_MAIN, MAIN_GPA, MAIN_PAGES);
	minivm_add_slot(vm, SLOT_ODD, ODD_GPA, ODD_PAGES);
	memcpy(vm->mem[SLOT_CODE], guest_writes, guest_end - guest_writes);
	return 0;
}

static inline struct minivcpu *minivm_add_vcpu(struct minivm *vm)
{
	struct minivcpu *vcpu = &vm->vcpu[vm->nr_vcpus];
	struct kvm_segment flat = {
		.limit = 0xffffffff, .present = 1, .s = 1, .g = 1, .db = 1,
	};
	struct kvm_sregs sregs;

	vcpu->vm = vm;
	vcpu->fd = ioctl(vm->fd, KVM_CREATE_VCPU, vm->nr_vcpus++);
	if (vcpu->fd < 0)
		err(1, "KVM_CREATE_VCPU");
	vcpu->run = mmap(NULL, vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (vcpu->run == MAP_FAILED || ioctl(vcpu->fd, KVM_GET_SREGS, &sregs))
		err(1, "vCPU");
	flat.type = 3;
	flat.selector = 16;
	sregs.ds = flat;
	sregs.es = flat;
	sregs.ss = flat;
	flat.type = 11;
	flat.selector = 8;
	sregs.cs = flat;
	sregs.cr0 |= 1;
	if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs))
		err(1, "KVM_SET_SREGS");
	return vcpu;
}

/* Until it halts or vm->stop is set: 0, or what kvmdirty_vcpu_full() said. */
static inline int minivcpu_run(struct minivcpu *vcpu)
{
	for (;;) {
		int r;

		if (__atomic_load_n(&vcpu->vm->stop, __ATOMIC_ACQUIRE))
			return 0;
		if (ioctl(vcpu->fd, KVM_RUN, 0)) {
			if (errno == EINTR)
				continue;
			err(1, "KVM_RUN");
		}
		if (vcpu->run->exit_reason == KVM_EXIT_HLT)
			return 0;
		r = vcpu->vm->kd ? kvmdirty_vcpu_full(vcpu->vm->kd, vcpu->fd, vcpu->run) : 0;
		if (r == -EINTR)
			continue;
		if (r < 0)
			return r;
		if (!r)
			errx(1, "unexpected exit %u", vcpu->run->exit_reason);
		vcpu->full++;
	}
}

static inline void minivcpu_setup(struct minivcpu *vcpu, const char *program, uint64_t address,
				  uint64_t times, uint64_t step, uint64_t seed)
{
	struct kvm_regs regs = {
		.rip = CODE_GPA + (program - guest_writes),
		.rflags = 2, .rdi = address, .rcx = times, .rdx = step, .rax = seed,
	};

	if (ioctl(vcpu->fd, KVM_SET_REGS, &regs))
		err(1, "KVM_SET_REGS");
}

/* Let the guest write to every step-th page of a slot, npages of them. */
static inline int minivcpu_write(struct minivcpu *vcpu, int slot, uint32_t offset, uint32_t npages,
				 uint32_t step)
{
	minivcpu_setup(vcpu, guest_writes, vcpu->vm->region[slot].guest_phys_addr + offset * PAGE,
		       npages, step * PAGE, 0);
	return minivcpu_run(vcpu);
}

#endif
