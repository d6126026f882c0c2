/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef DIRTY_SLOT_RING_SIM_H
#define DIRTY_SLOT_RING_SIM_H

/*
 * A virtual machine without a guest: vCPUs that write to pages through a page
 * table and a TLB, and that fault, exit and are kicked as arch/x86/kvm has it.
 */

#include "kernel.h"

#define SIM_BY_SLOT	U32_MAX		/* as many as KVM thinks best */

struct sim_config {
	unsigned long npages;	/* of memslot 0, at gfn 0, which logs from the start */
	unsigned long nr_gfns;	/* of the guest's memory; 0: npages */
	unsigned int nr_vcpus;
	u32 entries;		/* of each slot ring, or SIM_BY_SLOT; 0: the VM has none */
	u32 flags;		/* KVM_DIRTY_SLOT_RING_* */
	bool pml;		/* hardware sets D bits and buffers pages */
	bool fast_fault;	/* the lockless fast page fault */
	bool huge;		/* memslots start out mapped with huge pages */
	bool init_set;		/* KVM_DIRTY_LOG_INITIALLY_SET */
	bool memory;		/* there is memory behind the pages */
	bool huge_tables;	/* page tables are mapped as the kernel's are, by huge pages */
};

/* What a CPU keeps to itself. */
struct sim_vcpu {
	struct kvm_vcpu vcpu;
	struct shim_run run;
	const struct sim_config *config;
	bool in_guest;
	u32 flush_wanted, flush_done;
	bool kicked;
	u32 *tlb, tlb_time;	/* a page's entry is good if it is of this time */
	unsigned int nr_pml;
	u64 pml[512];
};

/* The only VM, its memory (a word for a page), its configuration. */
extern struct kvm *sim_kvm;
extern u64 *sim_memory;

/* One who creates a VM holds a reference to it, which sim_destroy() puts. */
struct kvm *sim_create(const struct sim_config *config);
void sim_destroy(void);

/* A vCPU more, in all logs. */
int sim_add_vcpu(void);

/*
 * KVM_SET_USER_MEMORY_REGION.  sim_create_slot() makes one that logs, @test is its
 * field of that name; sim_change_slot() replaces the memslot by a copy, as a change
 * of other flags does; sim_delete_slot() makes it go away.
 */
int sim_create_slot(int id, gfn_t base_gfn, unsigned long npages, void *test);
void sim_change_slot(int id);
void sim_delete_slot(int id);

/* The memslot of a number, or of a page: under kvm->srcu, or if it cannot go. */
struct kvm_memory_slot *sim_slot(int id);
struct kvm_memory_slot *sim_slot_of(struct kvm *kvm, gfn_t gfn);

/*
 * A write of the guest: adds one to the page's word, returns what it is then.
 * 0, and no write, if the vCPU has to leave to userspace: for a full ring, or
 * because there is no memslot.
 */
u64 sim_write(struct kvm_vcpu *vcpu, gfn_t gfn);
void sim_exit(struct kvm_vcpu *vcpu);

/*
 * The fault alone, of a write to a page that is not writable.  Under kvm->srcu.
 * False if there is no memslot.
 */
bool sim_fault(struct kvm_vcpu *vcpu, gfn_t gfn);

/* Make the page table know a page, read-only. */
void sim_map_page(gfn_t gfn);

/* Where its SPTE is; NULL if there is no page table. */
u64 *sim_sptep(gfn_t gfn);

/* Can the page be written without anybody knowing (with PML: is its D bit set)? */
bool sim_unlogged(gfn_t gfn);

/*
 * KVM's function of this name, for a page of a memslot; stress.c and race.c have
 * their own.
 */
void mark_page_dirty_in_slot(struct kvm *kvm, const struct kvm_memory_slot *memslot,
			     struct kvm_vcpu *vcpu, gfn_t gfn);
/* kvm_dirty_slot_log_look_again() for a page that has just been made writable. */
void sim_look_again(const struct kvm_memory_slot *memslot, struct kvm_vcpu *vcpu, gfn_t gfn);

/* File descriptors of anon_inode_getfd(). */
long sim_ioctl(int fd, unsigned int cmd, void *arg);
void *sim_mmap(int fd, unsigned long pgoff, bool writable);
void sim_close(int fd);

/*
 * Wait until it can be read, or for ms milliseconds.  Returns the events, or
 * -EDEADLK if it can be read and nobody said so.
 */
int sim_poll(int fd, unsigned int ms);

/*
 * What epoll_wait() with EPOLLET does: sim_edge() is how often the file was said to
 * have something, sim_wait_edge() waits for that to be another number than @seen.
 */
unsigned long sim_edge(int fd);
bool sim_wait_edge(int fd, unsigned long seen, unsigned int ms);

#endif /* DIRTY_SLOT_RING_SIM_H */
