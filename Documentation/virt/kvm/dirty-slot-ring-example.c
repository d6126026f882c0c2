// SPDX-License-Identifier: GPL-2.0-only
/*
 * A VMM of one vCPU and 16 pages that asks, epoch by epoch, which pages its
 * guest wrote: first with HARVEST, then from the mapped ring.
 *
 *	cc -O2 -Wall -I include/uapi dirty-slot-ring-example.c
 *
 * Exit status: 0 as it should be, 1 not so, 4 the kernel lacks the feature.
 */
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <linux/kvm.h>
#include <linux/kvm_dirty_slot_ring.h>

#define PAGE	4096UL
#define NPAGES	16
#define ENTRY	0x1000

/* Real mode: write to pages 4, 5 and 9, then halt. */
static const __u8 guest_code[] = {
	0xc6, 0x06, 0x00, 0x40, 0x01,	/* movb $1, 0x4000 */
	0xc6, 0x06, 0x23, 0x51, 0x02,	/* movb $2, 0x5123 */
	0xc6, 0x06, 0xff, 0x9f, 0x03,	/* movb $3, 0x9fff */
	0xf4,				/* hlt */
};

static void run_guest(int vcpu, struct kvm_run *run)
{
	struct kvm_regs regs = { .rip = ENTRY, .rflags = 2 };

	if (ioctl(vcpu, KVM_SET_REGS, &regs))
		err(1, "KVM_SET_REGS");
	if (ioctl(vcpu, KVM_RUN, 0))
		err(1, "KVM_RUN");
	if (run->exit_reason != KVM_EXIT_HLT)
		errx(1, "unexpected exit %u", run->exit_reason);
}

/* One bit for each page that was written since the last call. */
static unsigned int harvest(int log)
{
	struct kvm_dirty_run runs[4];
	struct kvm_dirty_slot_runs h;
	unsigned int dirty = 0, i, j;

	do {
		memset(&h, 0, sizeof(h));
		h.runs = (uintptr_t)runs;
		h.nr_runs = 4;
		/* The guest does not run, so that SYNC is not needed here. */
		if (ioctl(log, KVM_DIRTY_SLOT_LOG_HARVEST, &h))
			err(1, "KVM_DIRTY_SLOT_LOG_HARVEST");
		/* The pages are re-armed: from here on they can be copied. */
		for (i = 0; i < h.nr_runs; i++) {
			for (j = 0; j < runs[i].npages; j++)
				dirty |= 1U << (runs[i].offset + j);
		}
	} while (h.flags & KVM_DIRTY_HARVEST_MORE);
	return dirty;
}

/* The same from the mapping: collect, RESET, and only then copy. */
static unsigned int collect(int log, struct kvm_dirty_slot_ring_user *user,
			    const struct kvm_dirty_slot_ring_kern *kern,
			    const struct kvm_dirty_run *ring, __u32 entries)
{
	struct kvm_dirty_slot_reset reset = { 0 };
	__u64 producer, consumer = user->consumer;
	unsigned int dirty = 0, j;

	producer = __atomic_load_n(&kern->producer, __ATOMIC_ACQUIRE);
	for (; consumer != producer; consumer++) {
		struct kvm_dirty_run run = ring[consumer & (entries - 1)];

		for (j = 0; j < run.npages; j++)
			dirty |= 1U << (run.offset + j);
	}
	__atomic_store_n(&user->consumer, consumer, __ATOMIC_RELEASE);

	if (ioctl(log, KVM_DIRTY_SLOT_LOG_RESET, &reset))
		err(1, "KVM_DIRTY_SLOT_LOG_RESET");
	/* What found the ring full is not in it. */
	if (reset.flags & KVM_DIRTY_RESET_OVERFLOW)
		dirty |= harvest(log);
	return dirty;
}

static void expect(const char *how, unsigned int dirty)
{
	unsigned int wanted = 1 << 4 | 1 << 5 | 1 << 9;

	printf("%s: pages 0x%04x\n", how, dirty);
	if (dirty != wanted)
		errx(1, "%s: expected 0x%04x", how, wanted);
}

int main(void)
{
	struct kvm_enable_cap cap = { .cap = KVM_CAP_DIRTY_SLOT_RING };
	struct kvm_userspace_memory_region region = {
		.flags = KVM_MEM_LOG_DIRTY_PAGES,
		.memory_size = NPAGES * PAGE,
	};
	struct kvm_dirty_slot_log_fd open_log = { .slot = 0 };
	struct kvm_dirty_slot_log_info info;
	struct kvm_sregs sregs;
	struct kvm_run *run;
	int kvm, vm, vcpu, log;
	__u8 *mem, *consumers, *ring;

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		err(1, "/dev/kvm");
	if (ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_DIRTY_SLOT_RING) <= 0) {
		fprintf(stderr, "this kernel has no dirty slot rings\n");
		return 4;
	}
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		err(1, "KVM_CREATE_VM");
	/* Default size, no exits; before any memslot logs. */
	if (ioctl(vm, KVM_ENABLE_CAP, &cap))
		err(1, "KVM_CAP_DIRTY_SLOT_RING");

	mem = mmap(NULL, NPAGES * PAGE, PROT_READ | PROT_WRITE,
		   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (mem == MAP_FAILED)
		err(1, "guest memory");
	memcpy(mem + ENTRY, guest_code, sizeof(guest_code));
	region.userspace_addr = (uintptr_t)mem;
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
		err(1, "KVM_SET_USER_MEMORY_REGION");

	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0)
		err(1, "KVM_CREATE_VCPU");
	run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0),
		   PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED || ioctl(vcpu, KVM_GET_SREGS, &sregs))
		err(1, "vCPU");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs))
		err(1, "KVM_SET_SREGS");

	log = ioctl(vm, KVM_GET_DIRTY_SLOT_LOG_FD, &open_log);
	if (log < 0 || ioctl(log, KVM_DIRTY_SLOT_LOG_INFO, &info))
		err(1, "log");

	/*
	 * The first epoch has what was only read as well, as KVM maps a page
	 * writable when it is first touched.  A checkpoint copies everything at
	 * that point anyway.
	 */
	run_guest(vcpu, run);
	harvest(log);

	run_guest(vcpu, run);
	expect("harvest", harvest(log));

	/* Two mappings: the consumers of all rings, which may be written, and ring 0. */
	consumers = mmap(NULL, info.consumers_size, PROT_READ | PROT_WRITE, MAP_SHARED,
			 log, 0);
	ring = mmap(NULL, info.stride, PROT_READ, MAP_SHARED, log, info.rings_offset);
	if (consumers == MAP_FAILED || ring == MAP_FAILED)
		err(1, "ring");
	run_guest(vcpu, run);
	expect("mapping",
	       collect(log, (void *)(consumers + 0 * KVM_DIRTY_SLOT_CONSUMER_STRIDE),
		       (void *)(ring + KVM_DIRTY_SLOT_RING_KERN_PAGE * PAGE),
		       (void *)(ring + KVM_DIRTY_SLOT_RING_ENTRIES_PAGE * PAGE),
		       info.entries));
	return 0;
}
