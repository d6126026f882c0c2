// SPDX-License-Identifier: GPL-2.0-only
/*
 * Marks that should not be made: the code warns of each, and the page is not lost.
 */

#include "stress.h"

#define NPAGES		64

static int fd;

static u64 produced(unsigned int ring)
{
	struct kvm_dirty_slot_log_info info;
	struct kvm_dirty_slot_ring_kern *kern;

	if (sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info))
		fail("INFO");
	kern = sim_mmap(fd, (info.rings_offset + ring * info.stride) / PAGE_SIZE, false);
	return kern->producer;
}

/* The page is in the log, once, and nothing else is. */
static void expect_page(const char *what, u32 page)
{
	struct kvm_dirty_run run;
	struct kvm_dirty_slot_runs args = { .runs = (uintptr_t)&run, .nr_runs = 1 };
	int r = sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_HARVEST, &args);

	if (r || args.nr_pages != 1 || args.flags || run.offset != page)
		fail("%s: HARVEST gave %s and %llu pages", what, strerror(-r), args.nr_pages);
}

static void mark(const char *what, struct kvm_vcpu *vcpu, gfn_t gfn, unsigned int warnings)
{
	int idx = srcu_read_lock(&sim_kvm->srcu);
	unsigned int n = 0;

	shim_warnings = &n;
	mark_page_dirty_in_slot(sim_kvm, sim_slot(0), vcpu, gfn);
	shim_warnings = NULL;
	srcu_read_unlock(&sim_kvm->srcu, idx);
	if (n != warnings)
		fail("%s: %u warnings, not %u", what, n, warnings);
	expect_page(what, gfn);
}

static void run_strange(unsigned int ms)
{
	static const struct sim_config c = { .npages = NPAGES, .nr_vcpus = 2, .entries = NPAGES };
	struct kvm_dirty_slot_log_fd arg = { 0 };
	struct kvm_vcpu embryo, stranger;
	static struct kvm other;

	(void)ms;
	shim_calm = true;
	sim_create(&c);
	fd = kvm_vm_ioctl_get_dirty_slot_log_fd(sim_kvm, &arg);
	if (fd < 0)
		fail("no file descriptor: %s", strerror(-fd));
	mark("a vCPU", sim_kvm->vcpus[1], 2, 0);
	mark("a vCPU", sim_kvm->vcpus[0], 1, 0);

	/*
	 * Within kvm_arch_vcpu_create(): loaded, but without a number, which is 0 as that
	 * of the first vCPU is.  Its ring is another thread's.
	 */
	embryo = (struct kvm_vcpu){ .kvm = sim_kvm, .vcpu_id = 2 };
	mark("a vCPU that is being created", &embryo, 5, 1);
	/* Of another VM, with rings there. */
	stranger = (struct kvm_vcpu){ .kvm = &other, .dirty_slot_ring.nr = 1 };
	mark("another VM's vCPU", &stranger, 6, 1);
	if (produced(0) != 1 || produced(1) != 1)
		fail("rings 0 and 1 got %llu and %llu entries, not one each of their vCPUs",
		     produced(0), produced(1));
	mark("a vCPU", sim_kvm->vcpus[0], 5, 0);

	sim_close(fd);
	sim_destroy();
	shim_calm = false;
}

const struct stress_case strange_cases[] = {
	{ "strange", "marks by vCPUs that are being created, and of other VMs", run_strange },
	{ }
};
