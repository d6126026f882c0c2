/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A VM with a slot that logs, whose guest writes pages of it on command, and
 * exact sets of pages to compare what the log says with.
 *
 * The guest's code, stack and page tables are in memslot 0, which does not log.
 */
#ifndef SELFTEST_KVM_DIRTY_SLOT_RING_VM_H
#define SELFTEST_KVM_DIRTY_SLOT_RING_VM_H

#include <pthread.h>

#include "kvm_util.h"

#include "dirty_slot_ring.h"
#include "dirty_slot_ring_check.h"
#include "dirty_slot_ring_guest.h"
#include "dirty_slot_ring_util.h"

#define MAX_VCPUS		64

#define TEST_SLOT		10
#define TEST_GPA		0x10000000ul
#define TEST_GVA		0xc0000000ul

#define OTHER_SLOT		11
#define OTHER_GPA		0x80000000ul
#define OTHER_GVA		0x140000000ul

/* where TEST_SLOT goes when a test moves it */
#define MOVED_GPA		0x40000000ul
#define MOVED_GVA		0x100000000ul

/* Not a multiple of the 64 pages in a word of the bitmap. */
#define DEFAULT_NPAGES		515u

/* The size of a PML buffer, and more. */
#define MANY_RUNS		1024u

/* -q: fewer rounds and smaller sizes, for emulators. */
extern bool quick;

/* Takes what the harness does not know; returns what is left of argc. */
int dsr_options(int argc, char *argv[]);

/* How often to repeat what depends on timing. */
int rounds(int n);

/* -- the guest ------------------------------------------------------------ */

enum guest_op {
	OP_NONE,
	OP_WRITE,	/* write @npages pages from @first, @step apart, exit */
	OP_BATCHES,	/* the same each time @go moves on, never exiting */
	OP_TPR,		/* x86: and write the task priority register with each batch */
	OP_RANDOM,	/* write random ones of the first @npages, until @stop */
	OP_INS,		/* x86: have KVM's emulator store one byte in page @first */
};

/* The guest's copy is the one that both sides use, see dsr_add_vcpu(). */
struct mailbox {
	uint64_t op;
	uint64_t gva;
	uint64_t twin;		/* every other write is at this address; or 0 */
	uint64_t first;
	uint64_t npages;
	uint64_t step;
	uint64_t value;
	uint64_t go;
	uint64_t stop;
	uint64_t done;		/* by the guest: pages written, batches done */
};

extern struct mailbox mailboxes[MAX_VCPUS];

/* In the guest: what the mailbox says, once.  For guests of the guest, too. */
void guest_do(struct mailbox *mb);

/* -- the VM --------------------------------------------------------------- */

struct dsr_params {
	uint32_t npages;		/* 0: DEFAULT_NPAGES */
	uint32_t entries;		/* of each ring; 0: the default */
	uint64_t flags;			/* KVM_DIRTY_SLOT_RING_* */
	int nr_vcpus;			/* 0: no guest at all, and no rings */
	int max_vcpus;			/* more may be added later */
	uint64_t manual;		/* for KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 */
	enum vm_mem_backing_src_type src;
	bool no_cap;			/* leave the capability off */
	bool no_log;			/* the slot does not log yet */
};

struct dsr {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu[MAX_VCPUS];
	pthread_t thread[MAX_VCPUS];
	struct mailbox *mb[MAX_VCPUS];
	uint32_t npages;
	int fd;				/* the log of TEST_SLOT */
};

struct dsr *__dsr_new(const struct dsr_params *p);

#define dsr_new(...)	__dsr_new(&(struct dsr_params){ __VA_ARGS__ })

void dsr_free(struct dsr *v);

/* KVM knows the new vCPU as @id, its place here and its mailbox are @index. */
void __dsr_add_vcpu(struct dsr *v, int index, uint32_t id);

static inline void dsr_add_vcpu(struct dsr *v, int id)
{
	__dsr_add_vcpu(v, id, id);
}

void dsr_log(struct dsr *v, bool on);
void dsr_reopen(struct dsr *v);

/* Runs until the guest is done (true) or its ring is full (false). */
bool run_vcpu(struct kvm_vcpu *vcpu);

void guest_set(struct dsr *v, int cpu, struct mailbox mb);
void guest_run(struct dsr *v, int cpu, struct mailbox mb);
void guest_write_step(struct dsr *v, int cpu, uint64_t first, uint64_t n, uint64_t step);
void guest_write(struct dsr *v, int cpu, uint64_t first, uint64_t n);

/* In a thread of its own, until it is told to stop. */
void guest_start(struct dsr *v, int cpu, struct mailbox mb);
void guest_join(struct dsr *v, int cpu);

/* One batch of a guest that runs OP_BATCHES. */
void guest_batch(struct dsr *v, int cpu);

/* -- sets of pages, as often as they were reported ------------------------ */

uint8_t *set_new(struct dsr *v);
void set_add(uint8_t *set, uint64_t first, uint64_t n, uint64_t step);

/* What the ring's entries from @from up to @to name, having looked at them. */
void set_add_entries(uint8_t *set, uint32_t npages, const struct dsr_ring *ring, uint64_t from,
		     uint64_t to);

void set_join(struct dsr *v, uint8_t *set, const uint8_t *more);

/* These pages may have been reported more than once. */
void set_limit(uint8_t *set, uint32_t first, uint32_t n);

void __set_check(struct dsr *v, const uint8_t *got, const uint8_t *want, const char *file,
		 int line);

#define set_check(v, got, want)	__set_check(v, got, want, __FILE__, __LINE__)

/* Adds the runs of one answer to @got, having looked at its form. */
void runs_take(uint8_t *got, uint32_t npages, const struct kvm_dirty_run *runs,
	       const struct kvm_dirty_slot_runs *args, uint32_t cap);

/* Everything in the log, @cap runs at a time.  Returns the number of pages. */
uint64_t harvest_cap(int fd, uint8_t *got, uint32_t npages, uint32_t flags, uint32_t cap);
uint64_t harvest(struct dsr *v, uint8_t *got);

/* KVM_GET_DIRTY_LOG; returns the number of pages. */
uint64_t bitmap_take(struct dsr *v, uint8_t *got);

/* The log holds @want and nothing else, and then nothing. */
void __expect_set(struct dsr *v, const uint8_t *want, const char *file, int line);
void __expect_step(struct dsr *v, uint64_t first, uint64_t n, uint64_t step, const char *file,
		   int line);

/* Written once more, these pages are logged once more. */
void __expect_armed(struct dsr *v, uint64_t first, uint64_t n, const char *file, int line);

#define expect_set(v, want)		__expect_set(v, want, __FILE__, __LINE__)
#define expect_step(v, first, n, step)	__expect_step(v, first, n, step, __FILE__, __LINE__)
#define expect(v, first, n)		__expect_step(v, first, n, 1, __FILE__, __LINE__)
#define expect_nothing(v)		__expect_step(v, 0, 0, 1, __FILE__, __LINE__)
#define expect_armed(v, first, n)	__expect_armed(v, first, n, __FILE__, __LINE__)

void markers_check(const struct dsr_ring *ring);

/* The slot of this log is gone, its log holds @first and @n. */
void check_dead(struct dsr *v, uint64_t first, uint64_t n, uint32_t cap);

/* -- collectors ----------------------------------------------------------- */

/* A thread that takes pages out of the log until it is told to stop. */
struct taker {
	struct dsr *v;
	uint8_t *got;
	bool stop;
	bool bitmap;
	uint64_t nr;
	pthread_t thread;
};

void *taker_thread(void *arg);

/* vCPU 0 stays in the guest; each SYNC has all of the batch that it has done. */
void check_sync_batches(struct dsr *v, const uint8_t *want, int n);

/* A thread that stores consumers that cannot be, as long as it may. */
struct liar {
	struct dsr_ring *ring;
	bool stop;
	pthread_t thread;
};

void liar_start(struct liar *l);
void liar_stop(struct liar *l);

/* A userfaultfd handler that lets faults through when told to. */
/* Logs in which mark_for_poller() marks pages. */
struct marked_log {
	int fd;
	uint64_t npages;
};

/*
 * A thread polls @fd, harvests and adds to *@harvested what it got.  Pages are marked
 * while the harvest that the page before them called for takes that one out.  Who of
 * the two has the poller woken is for the kernel to know: each page marked has to be
 * harvested, and no further mark comes to the rescue.  Returns how many there were.
 */
uint64_t mark_for_poller(const struct marked_log *logs, int nr, int fd,
			 const uint64_t *harvested);

struct gate {
	bool open, waiting;
};

extern struct gate gate;

struct uffd_msg;
int gate_handler(int mode, int uffd, struct uffd_msg *msg);
bool have_uffd(void);

/* A call in a thread of its own, whose array is not there until the gate opens. */
struct gated_call {
	int fd;
	unsigned long cmd;		/* of a memslot's log or the VM's */
	uint32_t nr_runs, flags;
	int ret, err;
	void *runs;			/* PG of them */
	union {
		struct kvm_dirty_slot_runs args;
		struct kvm_dirty_vm_harvest vm_args;
	};
	struct uffd_desc *uffd;
	pthread_t thread;
};

/* Until it waits for its array; and until it has returned. */
void gated_start(struct gated_call *c);
void gated_end(struct gated_call *c);

#endif /* SELFTEST_KVM_DIRTY_SLOT_RING_VM_H */
