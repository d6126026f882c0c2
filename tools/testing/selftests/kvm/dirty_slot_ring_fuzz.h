/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the files of the fuzzer of dirty slot rings know of each other, see
 * dirty_slot_ring_fuzz.c.
 */
#ifndef SELFTEST_KVM_DIRTY_SLOT_RING_FUZZ_H
#define SELFTEST_KVM_DIRTY_SLOT_RING_FUZZ_H

#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#include "dirty_slot_ring.h"
#include "dirty_slot_ring_check.h"
#include "dirty_slot_ring_guest.h"
#include "dirty_slot_ring_util.h"

#define MAX_VCPUS		4
#define MAX_PAGES		704u
#define NR_SLOTS		3
#define FIRST_SLOT		10
#define NR_LOGS			8
#define NR_ALL			2
#define CONSUMERS_PER_PAGE	(PG / KVM_DIRTY_SLOT_CONSUMER_STRIDE)
#define NR_WORDS		(MAX_PAGES / 64)

/* Each slot has two places to move between. */
#define WINDOW			0x400000ul
#define SLOT_GPA(s, place)	(0x10000000ul + ((s) * 2 + (place)) * WINDOW)
#define SLOT_GVA(s, place)	(0xc0000000ul + ((s) * 2 + (place)) * WINDOW)

#define HANG_SECONDS		240u

#define KERNEL_ADDRESS		0xffff888000000000ul

/* The least that a harvest copies out at a time, see the manual. */
#define BATCH_LEAST		469u

/* -- what all processes share, at the same addresses ---------------------- */

enum { EX_MAIN, EX_THREAD, EX_PEER, EX_PEER2, NR_EX };
enum { RPC_IOCTL, RPC_RECV, RPC_CLOSE, RPC_STORM };

struct rpc {
	sem_t call, answer;
	int what, fd, ret, err;
	unsigned long cmd;
	void *argp;
};

enum actor_kind {
	A_HARVEST, A_READER, A_MARK, A_DISCARD, A_MISC, A_SCRIBBLE, A_BITMAP, A_ALL, NR_ACTOR_KINDS,
};

struct actor {
	enum actor_kind kind;
	uint64_t seed;
	unsigned int n;
	int peer;			/* which one it is in; -1: main */
	int sock;			/* of a peer: new fds come here */
	int fd[NR_SLOTS + 1];		/* the last is that of the whole VM */
	pthread_t thread;		/* in main */
	unsigned int done;		/* of n */
};

struct storm {
	struct actor actor[8];
	int nr_actors;
	bool exact;			/* the sums can be compared */
	bool liars;			/* consumers may be out of bounds */
	bool faults;			/* arrays may be nowhere */
	bool stop;			/* guests shall end */
	uint64_t taken;			/* harvested, discarded, cleared by the bitmap */
	uint64_t init_set;		/* pages that logs began with */
	uint64_t ops;
};

struct op_note {
	uint64_t op;
	const char *what;
	uint64_t a, b, c, d;
	int ex, ret, err;
};

#define NR_NOTES	24

struct shared {
	uint64_t stamp;			/* what is written next, never the same twice */
	struct rpc rpc[NR_EX];
	struct storm storm;
	struct op_note notes[NR_NOTES];
	unsigned int nr_notes;
	uint64_t progress;
	pid_t main_pid, peer_pid[2];
	uint32_t npages[NR_SLOTS];
	/* Under page_lock: what was copied when the log named the page. */
	uint64_t copy[NR_SLOTS][MAX_PAGES][2];
	uint8_t page_lock[NR_SLOTS][MAX_PAGES];
	uint8_t pending[NR_SLOTS][MAX_PAGES];	/* read from a ring, not known re-armed */
};

extern struct shared *sh;

extern uint8_t *memory[NR_SLOTS];	/* of the guest */

/* For arguments: writable pages, then one that is not there; the same read-only. */
#define ARENA_PAGES	12ul
extern uint8_t *arena, *arena_ro;

/* -- command line and luck ------------------------------------------------ */

enum {
	BREAK_NOT, BREAK_LOSE, BREAK_TWICE, BREAK_ERRNO, BREAK_HANG,
	BREAK_VM_LOSE, BREAK_VM_TWICE, BREAK_VM_LOG, BREAK_VM_LAYOUT,
};

struct options {
	uint64_t seed, ops, first_round;
	unsigned int seconds;
	int how;			/* self-test: what kernel to pretend */
	bool storm_only, verbose;
};

extern struct options opt;

extern uint64_t round_nr, step_nr, nr_ops, nr_storm_ops, nr_guest_pages, nr_storms;
extern bool in_storm;

extern __thread uint64_t luck;

static inline uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ul;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ul;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebul;
	return x ^ (x >> 31);
}

static inline uint64_t rnd(void)
{
	return luck = mix(luck);
}

/* 0 to @n - 1 */
static inline uint64_t below(uint64_t n)
{
	return rnd() % n;
}

/* Once in @n times. */
static inline bool once_in(uint64_t n)
{
	return !below(n);
}

/* -- the guest ------------------------------------------------------------ */

enum guest_op {
	OP_NONE,
	OP_WRITE,	/* pages @first, @first + @step, ... modulo @npages */
	OP_READ,
	OP_RANDOM,	/* any pages of all slots, until @stop */
};

/* The guest's copy is what both sides use. */
struct mailbox {
	uint64_t op;
	uint64_t gva[NR_SLOTS * 2];
	uint64_t npages;
	uint64_t first;
	uint64_t count;
	uint64_t step;
	uint64_t value;
	uint64_t stop;
	uint64_t done;		/* by the guest: pages */
};

void add_vcpu(void);
bool run_vcpu(int v);
void print_guests(void);

/* -- the model ------------------------------------------------------------ */

enum { NO, YES, MAYBE };

/* What the checker last saw of a ring, through mappings of its own. */
struct mring {
	struct dsr_ring map;
	uint64_t producer, reset, overflowed;
	uint64_t consumer;		/* before a call that looks at it */
};

struct mlog {
	bool used, dead, spill;		/* spill: the overflow log may hold something */
	int slot;
	uint32_t npages, nr_rings;
	uint32_t entries, nr;		/* of each ring; its number in the VM */
	uint64_t base_gfn, stride, area;
	int fd[NR_EX];
	uint8_t in[MAX_PAGES];
	struct mring ring[MAX_VCPUS];
};

/* A file of all logs. */
struct mall {
	int fd[NR_EX];
	int layout;			/* shall it tell that logs came or went? */
};

struct mslot {
	bool exists;
	int place;
	uint32_t npages;
	struct mlog *log;		/* if it logs */
};

struct model {
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu[MAX_VCPUS];
	struct mailbox *mb[MAX_VCPUS];
	pthread_t thread[MAX_VCPUS];
	int stats[MAX_VCPUS];		/* opened early: a vCPU that runs answers no calls */
	pthread_t runner[MAX_VCPUS];	/* in KVM_RUN, if... */
	bool runs[MAX_VCPUS];
	uint64_t returns[MAX_VCPUS];	/* from KVM_RUN */
	int nr_vcpus;
	uint32_t entries;		/* as the capability was told */
	uint32_t nr_logs;		/* the number of the newest */
	bool exit_on_full;
	uint64_t manual;
	struct mslot slot[NR_SLOTS];
	struct mlog log[NR_LOGS];
	struct mall all[NR_ALL];
	bool gone;			/* the VM is */
	int sock[2];			/* to the peers */
};

extern struct model m;

struct bounds {
	unsigned int yes, maybe;
};

void ring_look(struct mring *r);
bool log_bad_consumer(struct mlog *l);
void log_unchanged(const struct mlog *l);
void all_unchanged(void);
void log_moved(struct mlog *l, bool all);
struct bounds log_count(const struct mlog *l);
struct bounds log_collect(struct mlog *l);
bool log_must_overflow(const struct mlog *l);
void log_heal(struct mlog *l);
void runs_bounds(const struct mlog *l, uint32_t capacity, uint32_t *lo, uint32_t *hi);
void check_answer(struct mlog *l, const struct kvm_dirty_run *runs, uint32_t nr,
		  uint64_t nr_pages);
void check_nothing_left(const struct mlog *l);
void model_touch(struct mlog *l, struct mring *r, const struct mailbox *mb, uint64_t from,
		 uint64_t to, bool one_more);
void check_full(int v);

int open_log(int s);
void log_add_rings(struct mlog *l, int nr);
void log_forget(struct mlog *l);
void set_slot(int s, bool log);
void model_log_dies(struct mslot *slot);
void model_log_open(int s);
void model_log_new(int s);
uint32_t some_size(void);

/* -- calls by whom --------------------------------------------------------- */

int call(int fd, unsigned long cmd, void *argp);
void sem_down(sem_t *sem);
int ask(int ex, int what, int fd, unsigned long cmd, void *argp);
int some_ex(void);
int fd_call(int *fds, int ex, unsigned long cmd, void *argp);
void fd_close(int *fds, int ex);
void *thread_main(void *unused);
void start_peers(void);
void stop_peers(void);

/* -- steps and storms ------------------------------------------------------ */

enum { AT_GOOD, AT_NULL, AT_READONLY, AT_END, AT_NONE, AT_KERNEL };

struct array {
	struct kvm_dirty_run *runs;	/* as the call gets it */
	uint32_t room;			/* runs that can be accessed there */
	bool good;			/* all that can be asked for */
};

void *header_at(int where, size_t size);
int some_header_place(void);
struct array some_array(uint32_t want, size_t size);
bool spoil_reserved(__u64 *reserved, int n);
void harvest_all(struct mlog *l);
void step_harvest(struct mlog *l);
void step_reset(struct mlog *l);
void step_runs(struct mlog *l, bool mark);
void step_info(struct mlog *l);
void step_garbage(struct mlog *l);
void step_poll(struct mlog *l);
void step_consumer(struct mlog *l);
void all_open(struct mall *a);
void all_close(struct mall *a);
void step_all_harvest(struct mall *a);
void step_all(struct mall *a, bool vm);
void step(bool vm);
void *act(void *arg);
void run_storm(void);

/* -- failing -------------------------------------------------------------- */

/* Set when all is lost: vCPUs that come back after all say from where. */
extern bool hang_found;

struct op_note *note(const char *what, uint64_t a, uint64_t b, uint64_t c, uint64_t d);
void report_failure(const char *what);
void on_term(int sig);
void print_stats(unsigned int seconds);
void *watch(void *unused);

#endif /* SELFTEST_KVM_DIRTY_SLOT_RING_FUZZ_H */
