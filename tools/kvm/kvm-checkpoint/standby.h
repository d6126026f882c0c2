/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * kvm-checkpoint standby: what its parts share.
 *
 * One thread for each connection (session.c).  Only the one that is "active" touches the RAM; the
 * main thread (standby.c), which notices that the primary is gone and fails over (takeover.c), does
 * so after it has seen to it that none is.
 */
#ifndef KC_STANDBY_H
#define KC_STANDBY_H

#include <pthread.h>
#include <stdatomic.h>

#include "launch.h"
#include "ram.h"
#include "status.h"
#include "vmstate.h"

/* So many kinds of state are known to be loadable */
#define KC_KINDS 64u

enum mode { SERVING, FAILING_OVER, TAKEN_OVER, STOPPING };

struct session {
	struct standby *sb;
	struct session *next;
	pthread_t thread;
	int fd;
	struct kc_io *io;
	uint8_t instance[16];
	/* Not waiting for the primary but at work for it. */
	atomic_bool busy;
	/* With the lock: it had a key, and said a guest; it is to end. */
	bool is_primary, kicked;
	/* Its primary has handed over the guest. */
	bool switches;
};

struct standby {
	struct kc_sink_opts opts;
	const char *listen, *ram_dir, *control;
	bool durable, keep_memory;
	unsigned int timeout_ms, fence_timeout_ms, load_timeout_ms;
	/* How old an epoch of an earlier run may be for failing over to it by ourselves. */
	unsigned int restart_age_ms;
	char **fence;
	bool no_fence, bare;
	char **exec;
	char *capabilities[8];
	const char *disks[KC_MAX_DISKS];
	unsigned int nr_disks;

	struct kc_ram *ram;
	/*
	 * Whoever may touch the RAM may touch these (ready.c): QEMU that waits for the guest and
	 * QEMU that tries to load it, if there are; the kinds of state that were loaded, and the
	 * one that is about to be.
	 */
	struct kc_qemu warm, trial;
	uint64_t warm_started_us, warm_not_before_us, warm_pause_us;
	struct kc_ram_trial ram_trial;
	struct kc_vmstate_memo memo;
	uint64_t loaded[KC_KINDS], kind;
	unsigned int nr_loaded;
	bool no_trial, cancelled, no_failover;
	struct kc_status *status;
	struct kc_sink_stats stats;

	pthread_mutex_t lock;
	pthread_cond_t changed;
	enum mode mode;
	struct session *sessions, *active;
	uint8_t instance[16];	/* of who was active last */
	unsigned int nr_sessions;
	/* By whom failing over was asked for, if it was. */
	const char *promote;
	bool anyway;		/* and from an epoch that clients may know more than */
	/* The primary has handed over the guest; why that did not work. */
	bool switches;
	struct kc_err why_not;
	/*
	 * A primary was heard in this run: its silence means something.  That of one that was never
	 * heard does not, as it may live and be protected elsewhere, or not at all.
	 */
	bool armed;
	/* Not to be forgotten when failing over fails, but when a primary comes again. */
	bool guest_died;
	/* When an active session that is gone was heard last. */
	uint64_t heard_us;
	/* Refusals that were told, or would have been, since then. */
	unsigned int nr_told;
	uint64_t told_us;
	uint64_t still_there_us;	/* when the active session said so last */
};

/* --- door.c --------------------------------------------------------------- */

/* Accept what came to the listener, and serve each in a thread of its own. */
void kc_session_take(struct standby *sb, int listener);

/* Somebody was; somebody could fill the log with that. */
void kc_session_refused(struct standby *sb, const char *whom, const char *why);

/* Now and then: how many refusals were not told. */
void kc_session_tell(struct standby *sb);

/* --- session.c ------------------------------------------------------------ */

/* The thread of a session, which it frees */
void *kc_session_run(void *arg);

/* End all connections, and wait for their threads. */
void kc_session_stop_all(struct standby *sb, enum mode mode);

/* With the lock: end it; its thread will notice. */
void kc_session_kick(struct session *s);

/* With the lock, which is not held meanwhile.  0, or -ETIMEDOUT. */
int kc_standby_wait(struct standby *sb, unsigned int ms);

/* In the active session's thread: tell the primary that we live, if that is due. */
void kc_session_still_there(struct standby *sb);

enum mode kc_standby_mode(struct standby *sb);

/* --- ready.c -------------------------------------------------------------- */

/* Once, when the RAM is open. */
void kc_ready_init(struct standby *sb);

/* Now and then: have a QEMU that waits. */
void kc_ready_wait(struct standby *sb);

/* It is not needed any more. */
void kc_ready_stop(struct standby *sb);

/* --- takeover.c ----------------------------------------------------------- */

/* What QEMU would be started with now */
int kc_make_launch(struct standby *sb, const struct kc_guest *g, struct kc_launch *l,
		   struct kc_err *err);
void kc_free_launch(struct kc_launch *l);

/* Would QEMU get all of the guest's memory?  0 or -EOPNOTSUPP. */
int kc_check_command(struct standby *sb, const struct kc_guest *guest, struct kc_err *err);

/* Is there an epoch to go on from, and one that clients do not know more than?  Else why not. */
int kc_check_epoch(struct standby *sb, struct kc_err *err);

/*
 * 0 if the guest runs here now (*pid > 0) or its files are given away (*pid is 0).  Without the
 * fence if the primary itself has handed it over.
 */
int kc_take_over(struct standby *sb, const char *reason, pid_t *pid, struct kc_err *err);

/* After that, without a command: for people or a script. */
void kc_print_checkpoint(struct standby *sb);

#endif
