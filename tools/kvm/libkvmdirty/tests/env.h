/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef ENV_H
#define ENV_H

/*
 * What the cases of all topics share: ioctls that fail or are made up, a VM whose log is
 * tracked, and counts of what was handed out.  A topic's file has a table of its cases.
 */

#include <linux/kvm_dirty_slot_ring.h>
#include "ktap.h"
#include "minivm.h"

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))

struct test_case {
	const char *name;
	void (*fn)(const void *mode);	/* of those that run once: NULL */
	bool needs_kvm;			/* of those that run once */
	bool always;			/* also if the kernel has not got the back end */
};

/* With each back end, and once */
extern const struct test_case slot_cases[], vm_cases[], fd_cases[], open_cases[], once_cases[],
			      vm_once_cases[];

/* --- What ioctl() is made to do --------------------------------------------- */

extern unsigned int hidden_caps[4];
/* As of a kernel that has slot rings, but no log of all memslots */
extern bool hide_vm_log;

/* Called once before the next KVM_RESET_DIRTY_RINGS */
extern void (*before_reset)(void *arg);
extern void *before_reset_arg;

/*
 * Instead of KVM, with any fd: slot rings whose log has page 50, whenever it is asked; the log of
 * a memslot has its number and FAKE_LOG.
 */
extern bool fake_kvm;
#define FAKE_LOG	100
/* What the log of all memslots has, once */
extern struct kvm_dirty_vm_run fake_vm_runs[16];
extern unsigned int nr_fake_vm_runs, fake_vm_flags;
/* And the ring of its only vCPU, if the dirty ring is asked for */
#define FAKE_ENTRIES	256
extern struct kvm_dirty_gfn *fake_ring;

/* This ioctl, after so many of it, so many times, fails with this; 0: does nothing, returns 0 */
void fail_ioctl(unsigned long request, int skip, int nr, int error);

/* --- A VM whose log is tracked ---------------------------------------------- */

struct mode {
	const char *name;
	enum kvmdirty_backend backend;
	uint32_t flags;
	bool by_slot;		/* slot rings, and for cases of the whole VM only */
};

struct env {
	const struct mode *mode;
	struct minivm vm;
	struct kvmdirty *kd;
	struct kvmdirty_slot *main, *odd;
};

/* How often each page of a slot was handed out. */
struct seen {
	uint8_t page[MAIN_PAGES];
	uint64_t pages, runs;
};

void see(struct seen *seen, const struct kvmdirty_run *run);

/* Harvest all there is with arrays of @nr runs, into *seen; what the last call said. */
int harvest_some(struct kvmdirty_slot *slot, struct seen *seen, size_t nr);
struct seen harvest_n(struct kvmdirty_slot *slot, size_t nr);
struct seen harvest(struct kvmdirty_slot *slot);

/* Exactly @nr pages from @offset on in steps of @step, once each. */
void expect(const struct seen *seen, uint32_t offset, uint32_t nr, uint32_t step);

void write_pages(struct env *env, int slot, uint32_t offset, uint32_t nr, uint32_t step);
void open_env(struct env *env, const struct mode *mode, uint32_t ring_entries);
struct minivcpu *add_vcpu(struct env *env);
void track(struct env *env);
/* KVM may report what is touched for the first time even if it is only read. */
void settle(struct env *env);
struct env *setup_entries(const struct mode *mode, uint32_t ring_entries);

/* More than any case writes: with the dirty ring, no vCPU exits. */
#define MANY_ENTRIES	8192

struct env *setup(const void *mode);

/* Few: with the dirty ring, vCPUs exit.  VMX keeps more of them in reserve. */
#define FEW_ENTRIES	(access("/sys/module/kvm_intel", F_OK) ? 256 : 1024)

void needs_full_exits(const struct mode *mode);
struct env *setup_few_entries(const void *mode);

/* Callbacks: one that takes, refuses or stops; one that calls the library again. */
struct taker {
	struct seen seen;
	int calls;
	int refuse_at, stop_at;		/* this call, counted from 1 */
	struct kvmdirty_slot *slot;
	bool attached;
	int reentry;
	struct env *env;
};

int take(const struct kvmdirty_run *run, void *arg);
int reenter(const struct kvmdirty_run *run, void *arg);

/* Several vCPUs that write random pages, each on a thread, until they are stopped. */
void start_random(struct env *env, pthread_t *thread, int nr);
void stop_random(struct env *env, pthread_t *thread, int nr);

/* Over a socket, or to another process */
void send_fd(int sock, int fd);
int receive_fd(int sock);

/* Run @fn, which answers to bytes, in another process: our end of its socket. */
int other_process(void (*fn)(int sock), pid_t *pid);
void ask(int sock, char byte, void *answer, size_t size);
/* It ends well. */
void end_of(pid_t pid);

#endif
