/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef KVM_TESTING_VCPU_H
#define KVM_TESTING_VCPU_H

/*
 * A vCPU without an operating system, that writes to memory and says when it is done:
 * what the VMs of the tests have of each architecture.  It has:
 *
 *	guest_writes	so many times, stores a word at an address and goes on by a step
 *	guest_random	so many times, increments the word at an address + a random page, of 1024
 *	VCPU_DONE	the exit reason when a program has ended
 *	VCPU_CODE_SIZE	of the memory for the programs, a multiple of the host's pages
 *
 * and these functions, all of which end the process if something fails:
 *
 *	vcpu_load_code(mem, gpa)	brings the programs to memory that the guest has at gpa,
 *					which is a multiple of 64 KiB
 *	vcpu_init(vm_fd, vcpu_fd, gpa)	makes a new vCPU one that can run them there
 *	vcpu_start(vcpu_fd, gpa, &args)	lets it run one of them, with its next KVM_RUN
 */

#include <err.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include <linux/kvm.h>

/* Each file has its own; "hidden" keeps arm64's compiler from looking for them in the GOT */
#define VCPU_CODE	extern const char __attribute__((visibility("hidden")))
VCPU_CODE guest_writes[], guest_random[], guest_end[];

/* Where a vCPU's dirty ring is mapped, in pages; not all headers know */
#define VCPU_RING_OFFSET	64

struct vcpu_args {
	const char *program;
	uint64_t address, times;
	uint64_t step;			/* guest_writes, in bytes */
	uint64_t seed;			/* guest_random; guest_writes: what it stores */
};

#if defined(__x86_64__)
#include "vcpu-x86.h"
#elif defined(__aarch64__)
#include "vcpu-arm64.h"
#else
#error "no guest code for this architecture"
#endif

#endif
