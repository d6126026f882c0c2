/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the parts of the failover driver share.
 */
#ifndef FAILOVER_H
#define FAILOVER_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "../driver.h"

#define ARRAY_SIZE(a)	(sizeof(a) / sizeof((a)[0]))

#define GUEST_MB	64
/* What its two writers write, of that */
#define WORK_MB		8
/*
 * What nobody writes.  Of a guest that gives hints less: virtio_balloon takes all that is free, 4 MiB at a
 * time, and the one that it has just taken it cannot give back when memory runs out.
 */
#define STILL_MB	8
#define HINTS_STILL_MB	2
/* Of the disk with a database */
#define LEDGER_MB	16
#define DISK_FILE	"/dev/shm/guest-disk"
#define HOLDER_FILE	"/dev/shm/guest-holder"
#define PSK_FILE	"/tmp/psk"

/* Seconds, and so many that only what hangs reaches them: a busy machine is slow */
#define BOOT_TIMEOUT	900
#define SYNC_TIMEOUT	600
#define FAILOVER_TIMEOUT 600
#define ANSWER_TIMEOUT	300

#define MAX_EPOCHS	65536

extern const char *qemu, *firmware, *kernel, *initrd, *checkpoint, *self;
extern const char *accel;
extern bool tls;
/* The guest's shape; an old build to measure beside this one, or NULL */
extern const char *guest_cpus;
extern unsigned int guest_rate;
extern unsigned int guest_mb, guest_work_mb;
/* What "measure" was asked for, 0 for what it does else */
struct measured {
	const char *cpus;
	unsigned int rate, mb, work_mb, interval_ms;
	unsigned int logs;		/* how many ways to log */
	bool instructions;		/* the clock counts them */
};
extern struct measured measured;
/* It says which pages it does not use, and allocates and frees all the time; 2: also by hints */
extern unsigned int guest_tells;
/* The kernel has the card of who has a database, and has to hold what it sends */
extern unsigned int guest_has_vhost;
/* Where it goes on its disk is a qcow2 image, on top of that of the epoch */
extern unsigned int guest_has_overlay;
/* For "protect", in place of checkpoint, or NULL */
extern const char *protect_with;
extern bool guest_has_net;
/* It has a database on a disk of its own, and clients; what is said of its network, NULL for nothing */
extern bool guest_has_ledger;
extern const char *net_option;
extern bool packet_epochs;
extern const char *interval;	/* of epochs, but for tests that say so */
extern const char *old_qemu, *old_checkpoint;
extern const char *max_dirty;	/* argument of --max-dirty, or NULL */
extern const char *chain;	/* directory for epochs, or NULL to send them to a standby */
extern uint64_t started, seed;
/* Several drivers at once, each with files and ports of its own: which, and of how many */
extern unsigned int lane, nr_lanes;
extern unsigned int last_gen;

/* --- util.c --------------------------------------------------------------- */

void note(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
bool fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void fatal(const char *what);
/* From now on: if there are no notes for long, all processes are shown */
void watch_over_notes(void);
uint64_t number(const char *line, const char *name);

/* From the seed, so that another run does the same (as far as a machine can) */
unsigned int random_from(unsigned int from, unsigned int to);
void sleep_ms(unsigned int ms);

/* Starts a program that dies with us */
pid_t start(char **argv, int out, const char *err);
void kill_now(pid_t *pid, bool child);
/* The end of it */
void show_file(const char *path);
/* In how many lines of it is this? */
unsigned int count_lines(const char *path, const char *what);
/* How much room there is in a file system for others is up to @full */
bool fill_disk(const char *dir, bool full);
bool mount_small(const char *dir, unsigned int mb);

/* --- vm.c ----------------------------------------------------------------- */

/* A guest, in a QEMU that was started here or by a standby */
struct vm {
	unsigned int gen;
	pid_t pid;
	bool child;		/* ours */
	char ram[64], qmp[64];
	int ctl, mon;
	char buf[1024];
};

/* QEMU's command line; the standby's lacks what its own placeholders and options say */
struct args {
	char *v[96];
	int n;
	char text[24][256];
	int texts;
};

void arg(struct args *a, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* What it has of its memory for itself, if it has more */
unsigned int guest_used_mb(void);
void args_of_qemu(struct args *a, unsigned int gen, const char *ram);

char *ask(struct vm *vm, const char *what, unsigned int seconds);
bool get_steps(struct vm *vm, uint64_t steps[3]);
/* How often it has seen that somebody else wrote to what only one may hold */
bool get_foreign(struct vm *vm, uint64_t *foreign);
/* False also if QEMU refuses; events come in between */
bool qmp_args(struct vm *vm, const char *command, const char *args);
bool qmp(struct vm *vm, const char *command);
/* All that is known of a guest and of who has to do with it */
void show_all(struct vm *vm);
bool silent(struct vm *vm, const char *asked);
/* Connects to a QEMU that is there or will be; false if it does not come */
bool meet(struct vm *vm, unsigned int gen, const char *ram, unsigned int seconds);
/* Waits for QEMU to be in a state */
bool wait_status(struct vm *vm, const char *status, unsigned int seconds);
bool wait_running(struct vm *vm, unsigned int seconds);
void leave(struct vm *vm);
bool start_qemu(struct vm *vm);
bool wait_boot(struct vm *vm);
bool boot(struct vm *vm);
bool guest_goes_on(struct vm *vm);
void remove_ram(const char *path);

/* --- daemons.c ------------------------------------------------------------ */

/* What came out of kvm-checkpoint protect */
enum part { STOP, HARVEST, STATE, COPY, RESUME, PAUSE, PARTS };

struct epoch {
	uint64_t taken_us, done_us, pages, wire;
	uint64_t us[PARTS];
	bool was_running;
};

struct protect {
	pid_t pid;
	int out;
	pthread_t reader;
	uint64_t synced;	/* how many times */
	uint64_t differed;
	bool resync;
};

struct log {
	pthread_mutex_t lock;
	struct epoch epochs[MAX_EPOCHS];	/* by number */
	uint64_t acked, newest;
};

extern struct log log_;

/*
 * What keeps two copies from running when a primary that lives is silent for --timeout: its QEMU
 * stops the guest before, or the fence kills that QEMU.
 */
enum safe { NOBODY, LEASE, FENCE };

/* The daemons of both sides */
struct pair {
	unsigned int gen, port;
	pid_t standby;
	struct protect protect;
	char theirs[64];	/* the standby's RAM */

	unsigned int timeout_ms;	/* 0: the standby never takes over by itself */
	enum safe safe;
	unsigned int protects;	/* this generation's QEMU is protected */
	bool relayed;		/* the link goes through the relay */
	bool leaves;		/* its memory and its disk, on switchover, where the next pair's standby is */
	unsigned int disk_mb;	/* of a file system of its own for the standby, or 0 */
};

struct sample {
	uint64_t us;
	uint64_t steps[3];
};

pid_t start_standby(struct pair *x);
void start_protect(struct protect *p, struct vm *vm, struct pair *x, const char *interval,
		   unsigned int epochs);
/* Its end, whoever made it; all of its output has been read then */
int wait_protect(struct protect *p);
void kill_protect(struct protect *p);
bool protect_ended(const struct protect *p);
/* Waits until it has told so often that the standby has everything */
bool wait_synced(struct protect *p, struct vm *vm, uint64_t times);
void reset_log(void);
uint64_t last_acked(void);
/* Asks the guest how far it is, again and again */
bool watch_guest(struct vm *vm, unsigned int ms);
const struct sample *last_sample(void);
/* What the guest must know that goes on from an epoch */
const struct sample *promised(uint64_t epoch);
bool check_guest(struct vm *vm, const struct sample *least);
/* Its files and numbers */
void new_pair(struct pair *x);
/* How often the standby has said something */
unsigned int standby_said(const struct pair *x, const char *what);
bool wait_said(const struct pair *x, const char *what, unsigned int seconds);
/* Waits until it has taken over the guest */
bool wait_taken_over(const struct pair *x);
/* Which epoch that was */
uint64_t epoch_taken(const struct pair *x);
/* A command for the standby, or for protect if it @leaves */
bool tell_standby(const struct pair *x, const char *command);
bool tell_protect(const struct pair *x, const char *command);
bool begin(struct pair *x);
bool begin_with(struct pair *x, const char *every);
void end(struct pair *x);
/* The guest is at the standby now, and @next is it: forget who had it before */
void moved(struct pair *x, struct vm *next);
/* As a program: kills the QEMU whose process this file names */
int be_fence(const char *pidfile);

/* --- links.c -------------------------------------------------------------- */

enum link { LINK_PASSES, LINK_REFUSES, LINK_SWALLOWS };

/* From now on what comes to its port goes to the standby's */
unsigned int relay_to(unsigned int port);
void relay_set(enum link state);
/* The link breaks after so many bytes; how often it has */
void relay_cut(unsigned long after);
unsigned int relay_cuts(void);
/* The longest time in which nothing came from the primary since this was called last */
uint64_t relay_gap_us(void);
int tcp_socket(unsigned int port, bool listening);

/* --- threads.c ------------------------------------------------------------ */

/* Who had the CPU while the guest stood still, or from one epoch to the next */
enum who { BY_MAIN, BY_VCPUS, BY_QEMU, BY_PROTECT, BY_STANDBY, BY_REST, NR_WHO };

extern const char * const who_names[NR_WHO];

/* Notes from now on which thread runs when; false if this kernel cannot */
bool trace_begin(void);
/* A thread, and all that it starts from now on */
void trace_know(int tid, enum who who);
void trace_know_qemu(struct vm *vm);

struct traced {
	uint64_t from, to;		/* epochs of the log */
	bool pauses;			/* or all of the time from one to the next */
	uint64_t (*us)[NR_WHO];		/* of each of them */
};

/* False if there was more than could be kept */
bool trace_end(struct traced *t);

/* --- stale.c -------------------------------------------------------------- */

bool test_stale(unsigned int n);

/* --- ledger.c ------------------------------------------------------------- */

/* For a QEMU of this generation: its network, and the image of its disk */
void ledger_tap(unsigned int gen);
void ledger_image(unsigned int gen, char path[64]);
/* On top of it, if it has one; @size: in bytes */
void ledger_overlay(unsigned int gen, char path[64]);
void make_overlay(unsigned int gen, uint64_t size);
/* Its clients find all that they were told of, and go on; the guest did, elsewhere, if it @moved */
bool ledger_holds(bool moved);
/* What a guest that goes on gets in place of its disk, for a control; or NULL */
extern const char *wrong_disk;

/* --- kills.c -------------------------------------------------------------- */

/* One more kill of vm, with its daemon or alone; vm is the guest at the standby then */
bool kill_guest(bool with_daemon);

/* --- tests ---------------------------------------------------------------- */

extern struct vm vm;
extern pid_t standby;		/* the one that started vm's QEMU, or will start the next */

/* Stops the guest and waits for an epoch that has all of it */
bool stop_guest(void);
/* That, and the memory of both sides is the same */
bool compare_once(const char *theirs);

/* QEMU on top of an epoch of the directory "chain" */
/* The guest goes on from an epoch of the directory @chain, as generation @gen, and is checked */
bool go_on_from(unsigned int gen, uint64_t epoch);

bool test_kills(unsigned int n);
bool test_seconds(unsigned int n);
bool test_paused(unsigned int n);
bool test_equal(unsigned int n);
bool test_meddles(unsigned int n);
bool test_resets(unsigned int n);
bool test_daemons(unsigned int n);
bool test_chains(unsigned int n);
bool test_boot(unsigned int n);
bool test_links(unsigned int n);
bool test_early(unsigned int n);
bool test_measure(unsigned int n);
bool test_ledger(unsigned int n);
bool test_ledger_control(unsigned int n);
bool test_ledger_days(unsigned int n);
bool test_ledger_turns(unsigned int n);
bool test_copying(unsigned int n);
bool test_archives(unsigned int n);
bool test_archives_control(unsigned int n);
bool test_latency(unsigned int n);
bool test_switches(unsigned int n);
bool test_copies(unsigned int n);
bool test_faults(unsigned int n);
/* One kind of fault; NULL if there is none of that name */
const struct fault_kind *find_fault(const char *name, size_t len);
void list_faults(void);
bool test_fault(const struct fault_kind *kind, unsigned int n);

#endif
