/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * kvm-checkpoint protect: what its parts share.
 *
 * One thread does it all, so that heartbeats stop when epochs do.
 */
#ifndef KC_PROTECT_H
#define KC_PROTECT_H

#include <signal.h>
#include <stdatomic.h>

#include "guest.h"
#include "sink.h"
#include "status.h"

/* Pages that are copied of the running guest, or sent, at a time */
#define BATCH		256

#define TICK_MS		50

struct protect {
	const char *to, *control;
	unsigned int interval_ms, lease_ms;
	uint64_t max_dirty, max_epochs;
	bool json;
	struct kc_sink_opts opts;
	struct guest_opts guest_opts;

	struct guest guest;
	struct guest_epoch epoch;
	struct kc_sink *sink;
	int lost;		/* what kc_link_tick() found out of it, and why */
	struct kc_err lost_err;
	struct kc_status *status;
	uint64_t nr;		/* of the newest epoch that was begun */
	uint64_t acked, epochs;
	bool taken_over;	/* as the standby said when it was told the end */
	bool was_acked;		/* the receiver once had a complete epoch */
	bool idle;		/* the guest is stopped, and its last epoch says all */
	bool waiting;		/* the guest cannot be resumed, for now */
	char no_epochs[200];	/* why there are none for now, or empty */
	bool tty;
	unsigned int unread;	/* lines that were not shown, as nobody reads them */
	uint64_t started_us, shown_us;
};

/* Who failed, with what errno */
enum where { OK, GUEST, SINK, STOPPED, NOT_NOW };

extern atomic_bool kc_stop_requested;

/*
 * A directory's epochs are all read when it is opened, which may take minutes.  Nothing is begun by
 * then, and there is nobody to say goodbye to.
 */
extern volatile sig_atomic_t kc_may_exit;

/* --- protect_show.c: what is shown ---------------------------------------- */

__attribute__((format(printf, 2, 3)))
void kc_showf(struct protect *p, const char *fmt, ...);

/* An event of --json, which kc_show_json() shows and frees. */
struct json_object *kc_show_event(const char *name);
void kc_show_add(struct json_object *o, const char *name, uint64_t value);
void kc_show_json(struct protect *p, struct json_object *o);

void kc_show_progress(struct protect *p, const char *what, uint64_t done, uint64_t total);
void kc_show_epoch(struct protect *p);

/* --- protect_link.c: the sink, found, lost and told the end --------------- */

int kc_link_poll(struct protect *p, struct kc_err *err);
/*
 * Heartbeats while QEMU works; an error is of interest when the sink is used next.  -ECANCELED if we
 * are to end and QEMU does not answer.
 */
int kc_link_tick(void *ctx);
/* Tells everybody why there are no epochs for now; if it is empty, that there are again */
void kc_no_epochs(struct protect *p, const char *why);
bool kc_link_may_pass(const struct protect *p, int error);
enum where kc_link_open(struct protect *p, int *rc, struct kc_err *err);
void kc_link_close(struct protect *p);
/* Is the standby's time limit long enough for --lease? */
int kc_link_check_lease(const struct protect *p, struct kc_err *err);
/* False if the standby has not been told, and may well take over from a guest that lives */
bool kc_link_end(struct protect *p, enum kc_end why);

/* --- protect_epoch.c: epochs ---------------------------------------------- */

/* The first one: all pages, or all that differ */
enum where kc_epoch_first(struct protect *p, int *rc, struct kc_err *err);
/*
 * Waits until the next epoch is due: the time has come, or enough is dirty, and the last epoch but
 * one has been acknowledged.
 */
enum where kc_epoch_wait(struct protect *p, uint64_t until_us, int *rc, struct kc_err *err);
enum where kc_epoch_next(struct protect *p, int *rc, struct kc_err *err);

#endif
