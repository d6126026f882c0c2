/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef MINIVM_H
#define MINIVM_H

/*
 * A VM of a few vCPUs that run one of two programs, and three memslots: code, MAIN and
 * ODD.  The latter two are for the library to track.
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
#include "../../testing/vcpu.h"

#define PAGE		((unsigned long)sysconf(_SC_PAGESIZE))
#define MAX_VCPUS	4
#define CODE_GPA	0x10000UL
#define MAIN_GPA	0x10000000UL
#define MAIN_PAGES	1024U		/* guest_random relies on it */
#define ODD_GPA		0x20000000UL
#define ODD_PAGES	100U		/* no multiple of 64 */

enum { SLOT_CODE, SLOT_MAIN, SLOT_ODD, NR_SLOTS };

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
	minivm_add_slot(vm, SLOT_CODE, CODE_GPA, VCPU_CODE_SIZE / PAGE);
	minivm_add_slot(vm, SLOT_MAIN, MAIN_GPA, MAIN_PAGES);
	minivm_add_slot(vm, SLOT_ODD, ODD_GPA, ODD_PAGES);
	vcpu_load_code(vm->mem[SLOT_CODE], CODE_GPA);
	return 0;
}

static inline struct minivcpu *minivm_add_vcpu(struct minivm *vm)
{
	struct minivcpu *vcpu = &vm->vcpu[vm->nr_vcpus];

	vcpu->vm = vm;
	vcpu->fd = ioctl(vm->fd, KVM_CREATE_VCPU, vm->nr_vcpus++);
	if (vcpu->fd < 0)
		err(1, "KVM_CREATE_VCPU");
	vcpu->run = mmap(NULL, vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
	if (vcpu->run == MAP_FAILED)
		err(1, "vCPU");
	vcpu_init(vm->fd, vcpu->fd, CODE_GPA);
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
		if (vcpu->run->exit_reason == VCPU_DONE)
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
	const struct vcpu_args args = {
		.program = program, .address = address, .times = times, .step = step, .seed = seed,
	};

	vcpu_start(vcpu->fd, CODE_GPA, &args);
}

/* Let the guest write to every step-th page of a slot, npages of them. */
static inline int minivcpu_write(struct minivcpu *vcpu, int slot, uint32_t offset, uint32_t npages,
				 uint32_t step)
{
	static uint32_t value;

	minivcpu_setup(vcpu, guest_writes, vcpu->vm->region[slot].guest_phys_addr + offset * PAGE,
		       npages, step * PAGE, __atomic_add_fetch(&value, 1, __ATOMIC_RELAXED));
	return minivcpu_run(vcpu);
}

#endif
