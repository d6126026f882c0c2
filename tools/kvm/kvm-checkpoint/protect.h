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
#include <string.h>

#include "guest.h"
#include "nbd.h"
#include "net_plug.h"
#include "sink.h"
#include "status.h"
#include "wake.h"

/* Pages that are copied of the running guest, or sent, at a time */
#define BATCH		256

/* However little there is to do, it is looked after so often */
#define MAX_SLEEP_MS	1000

/* The first epoch of a sink, until it is acknowledged */
struct first {
	uint64_t nr, sent, unused, differed;
	bool compared, continued;
};

/* An epoch that is not acknowledged: which pages are in it */
struct sent_page {
	uint64_t page, n;
	uint32_t block;
};

struct sent_epoch {
	uint64_t nr;		/* 0: unused */
	struct sent_page *pages;
	size_t nr_pages;
};

#define KC_SENT 8u

/* What becomes of what the guest sends */
enum net { NET_AUTO, NET_COMMIT, NET_PASS };

#define NET_LIMIT_UNSET	UINT32_MAX

/* The guest_epoch.packets of an epoch */
struct net_mark {
	uint64_t nr, packets;
};

/* What the kernel holds back of tap devices, see protect_plug.c */
struct plugs {
	struct nl_sock *sk;
	struct kc_plug taps[GUEST_MAX_TAPS];
	unsigned int nr;
	pid_t guard;		/* 0: there is none, */
	pid_t stray;		/* or one that QEMU has not taken, or not said so */
	bool marked;		/* and this is the first epoch that it is of; 0: none was sent yet */
	uint64_t marked_for;
	bool fresh;		/* it was made for the epoch that was taken last */
	bool behind;		/* the last that was sent knows of more than the last mark */
	int failed;		/* somebody interferes */
	struct kc_err why;
};

/* What the standby said that it has of a part of a disk, but for pages that were sent since */
struct known {
	unsigned int disk;
	uint64_t first, n;
	bool stale[KC_DIGESTS_CHUNK];
	uint8_t digests[KC_DIGESTS_CHUNK * KC_DIGEST_SIZE];
};

struct disks {
	struct nbd *nbd;
	int guard;		/* see nbd_guard_start(), or -1 */
	bool mirrored;		/* QEMU's jobs were begun, or some of them */
	bool compare;		/* only what differs is sent */
	/* Of the QMP connection: when they were begun, and when all of them went on */
	unsigned int jobs_ended, jobs_failed;
	bool resumes;		/* they have something to copy that was not mirrored, */
	unsigned int attempts;	/* and did not go on so often */
	bool told;		/* while there is no link */
	/* Of the epoch that was taken last, or all that is to be sent once more */
	struct nbd_write *cut, **cut_end;
	uint64_t cut_bytes;
	/* Sent, and not acknowledged, by epochs; all of them since the one that is kept_from */
	struct nbd_write *kept, **kept_end;
	uint64_t kept_bytes, kept_from;
	bool keeps;
	struct known known;
};

struct protect {
	const char *to, *control, *leave_ram;
	unsigned int interval_ms, lease_ms;
	uint64_t max_dirty, max_epochs;
	bool json;
	enum net net;
	unsigned int net_limit_ms;
	struct kc_sink_opts opts;
	struct guest_opts guest_opts;

	struct guest guest;
	struct disks disks;
	struct guest_epoch epoch;
	struct kc_sink *sink;
	int lost;		/* what kc_link_tick() found out of it, and why */
	struct kc_err lost_err;
	struct kc_status *status;
	uint64_t nr;		/* of the newest epoch that was begun */
	uint64_t acked, epochs;
	struct sent_epoch sent[KC_SENT];
	uint64_t known_from;	/* all that was sent after this epoch is in sent; 0: it is not */
	struct first first;
	uint8_t receiver[16];	/* kc_sink_receiver() of the last sink */
	bool was_acked;		/* the receiver once had a complete epoch */
	unsigned int pause_ms;	/* before another attempt, until something is acknowledged */
	int told;		/* the last failure that was told, since something was */
	uint64_t told_us;
	bool is_elsewhere;	/* the standby was to be told the end, and has taken over */
	bool idle;		/* the guest is stopped, and its last epoch says all */
	bool waiting;		/* the guest cannot be resumed, for now */
	uint64_t left_out;	/* pages of which the guest said so, up to the last epoch */
	bool no_cards;		/* it has no network */
	bool packets_wait;	/* something is held back for the next epoch */
	/*
	 * Nothing is held back on purpose, as the standby has no epoch that it may take over from:
	 * the first one that was sent since, and whether it is known of the last that it is one.
	 */
	bool unheld;
	uint64_t unheld_from, unheld_told_us;
	bool taken_unheld;	/* that was so when the epoch was taken, */
	bool sent_unheld;	/* or the last one that was sent */
	struct net_mark marks[KC_SENT];
	struct plugs plugs;
	uint64_t released;	/* packets of which state are */
	uint8_t held_for[16];	/* kc_sink_receiver() of the sink that they are held for */
	unsigned int net_ms;	/* for how long they are held without an acknowledgement, */
	uint64_t net_stuck_us;	/* since then; 0: there is no reason that there is none */
	char no_epochs[200];	/* why there are none for now, or empty */
	bool tty;
	unsigned int unread;	/* lines that were not shown, as nobody reads them */
	uint64_t started_us, shown_us;
};

/* Not a directory */
static inline bool to_standby(const struct protect *p)
{
	return p->to && !strncmp(p->to, "tcp:", 4);
}

/* Who failed, with what errno */
enum where { OK, GUEST, SINK, STOPPED, SWITCH, NOT_NOW };

extern atomic_bool kc_stop_requested, kc_switch_requested;

/*
 * A directory's epochs are all read when it is opened, which may take minutes.  Nothing is begun by
 * then, and there is nobody to say goodbye to.
 */
extern volatile sig_atomic_t kc_may_exit;

/*
 * Waits until then, or until something comes from QEMU or the sink, somebody wants something, or
 * one of the rings of @log_fd (-1: none) is half full: true.  All that the daemon waits for when
 * it is not in the midst of something is waited for here; the sink's heartbeats come in time.
 */
bool kc_sleep(struct protect *p, uint64_t until_us, int log_fd);

/* --- protect_show.c: what is shown ---------------------------------------- */

__attribute__((format(printf, 2, 3)))
void kc_showf(struct protect *p, const char *fmt, ...);

/* An event of --json, which kc_show_json() shows and frees. */
struct json_object *kc_show_event(const char *name);
void kc_show_add(struct json_object *o, const char *name, uint64_t value);
void kc_show_json(struct protect *p, struct json_object *o);

void kc_show_progress(struct protect *p, const char *what, uint64_t done, uint64_t total);
void kc_show_epoch(struct protect *p);
void kc_show_protected(struct protect *p, const struct first *f);

/* --- protect_link.c: the sink, found, lost and told the end --------------- */

int kc_link_poll(struct protect *p, struct kc_err *err);
/*
 * Heartbeats while QEMU works; an error is of interest when the sink is used next.  -ECANCELED if we
 * are to end and QEMU does not answer.
 */
int kc_link_tick(void *ctx);
/* Tells everybody why there are no epochs for now; if it is empty, that there are again */
void kc_no_epochs(struct protect *p, const char *why);
/* What has happened meanwhile, to whom */
enum where kc_link_look(struct protect *p, int *rc, struct kc_err *err);
/*
 * The sink failed, and is closed by this.  Is it to be opened again, as protection goes on?  If
 * not, that is the user's to know.
 */
bool kc_link_failed(struct protect *p, int error, const struct kc_err *err);
/* As long as that takes, and a while longer if the last failure was not that of the link */
enum where kc_link_open(struct protect *p, int *rc, struct kc_err *err);
void kc_link_close(struct protect *p);
/* False if the standby has not been told, and may well take over from a guest that lives */
bool kc_link_end(struct protect *p, enum kc_end why);

/* --- protect_over.c: the guest goes on elsewhere -------------------------- */

/*
 * The standby has taken over: stops the guest here, whatever it takes, unless told to end.  The
 * exit status.
 */
int kc_guest_is_elsewhere(struct protect *p, const char *why);

/* The guest goes on at the standby, and its QEMU ends here: true, with the exit status.  Or not. */
bool kc_switch_over(struct protect *p, int *status);

/* --- protect_sent.c: what is in epochs that are not acknowledged ---------- */

/* The pages in p->epoch are in this one, too. */
void kc_sent_note(struct protect *p, uint64_t nr);
void kc_sent_acked(struct protect *p);
/* Pages may have been lost, or nothing is known any more */
void kc_sent_forget(struct protect *p);
/* With a new sink: all that it lacks is dirty now.  False if that is not known. */
bool kc_sent_again(struct protect *p);

/* --- protect_net.c: what the guest sends ----------------------------------- */

/* With a new sink: is anything to be held for it?  -ESTALE if it cannot be. */
int kc_net_begin(struct protect *p, struct kc_err *err);
/*
 * Before an epoch is taken: what the guest sends after it is held back, if that is wanted, and of use
 * by now.
 */
int kc_net_hold(struct protect *p, struct kc_err *err);
/* Nothing is held back, and will be from the next epoch on: there should be one */
bool kc_net_proved(const struct protect *p);
/* Epoch p->nr was committed */
void kc_net_sent(struct protect *p);
/* There is a reason that nothing is acknowledged */
void kc_net_stuck(struct protect *p);
/* The link is lost, and was not until now */
void kc_net_unlinked(struct protect *p);
/* Lets go what may go; while no command of QEMU's is under way */
int kc_net_look(struct protect *p, struct kc_err *err);
/* Protection ends, and it is known who goes on with the guest */
void kc_net_end(struct protect *p, bool drop);

/* --- protect_plug.c: and QEMU cannot hold back ----------------------------- */

/*
 * After guest_hold(): what is new of tap devices is held.  If not, nothing is held any more, but for
 * what was held before us, of which the standby's epoch does not know.
 */
int kc_plugs_begin(struct protect *p, struct kc_err *err);
/* The guest stands still for an epoch */
void kc_plugs_cut(void *ctx);
/* Epoch p->nr was committed */
void kc_plugs_sent(struct protect *p);
/* Something is held that the last epoch knows of, and no mark does */
static inline bool kc_plugs_are_behind(const struct protect *p)
{
	return p->plugs.behind;
}

/* What was sent was not to who is there now */
void kc_plugs_not_sent(struct protect *p);
/* Lets go what may go */
int kc_plugs_look(struct protect *p, struct kc_err *err);
/* QEMU was told that nothing is held any more: waits until it is so */
void kc_plugs_ended(struct protect *p);

/* --- protect_disks.c: its disks -------------------------------------------- */

/* An epoch of a new sink is open: QEMU begins to mirror; @compare: only what differs is sent of that */
int kc_disks_begin(struct protect *p, bool compare, struct kc_err *err);
/*
 * With a new sink: what it lacks is sent once more, and QEMU's mirror goes on.  False if that cannot
 * be, and kc_disks_begin() is needed.
 */
bool kc_disks_again(struct protect *p);
/* The link is lost: what is written meanwhile is kept, as long as there is room for it */
void kc_disks_unlinked(struct protect *p);
/* There is no link: was it too much? */
void kc_disks_look(struct protect *p);
void kc_disks_acked(struct protect *p);
/* There is no mirror any more, and nothing is kept */
void kc_disks_lost(struct protect *p);
void kc_disks_free(struct protect *p);
/* -ECONNRESET if something was written that did not come here */
int kc_disks_check(struct protect *p, struct kc_err *err);
/* Is all of them copied?  Else how many bytes of how many. */
int kc_disks_ready(struct protect *p, bool *ready, uint64_t *done, uint64_t *total,
		   struct kc_err *err);
/* What has come goes to the open epoch, which is the first */
int kc_disks_pump(struct protect *p, struct kc_err *err);
/* For guest_opts: the guest is about to stop, has stopped; what has come is of this epoch */
void kc_disks_stopping(void *ctx);
void kc_disks_cut(void *ctx);
/* That goes to the open epoch */
int kc_disks_send(struct protect *p, struct kc_err *err);
/* So much waits for an epoch that there should be one */
bool kc_disks_full(struct protect *p);

/* --- protect_mirror.c: QEMU's jobs that mirror them ------------------------ */

/* Of all of them together; bytes that are copied, of how many */
struct mirror {
	bool ready, paused;
	uint64_t done, total;
};

int kc_mirror_begin(struct protect *p, struct kc_err *err);
/* Whatever there may be of them, also of a process before this one */
int kc_mirror_end(struct protect *p, struct kc_err *err);
int kc_mirror_look(struct protect *p, struct mirror *m, struct kc_err *err);
/* There is nothing that they would still have to begin to copy */
int kc_mirror_is_clean(struct protect *p, bool *clean, struct kc_err *err);
/* Those that have stopped after an error go on */
int kc_mirror_resume(struct protect *p, struct kc_err *err);

/* --- protect_epoch.c: epochs ---------------------------------------------- */

/* The first one: all pages, or all that differ */
enum where kc_epoch_first(struct protect *p, int *rc, struct kc_err *err);
/*
 * Waits until the next epoch is due: the time has come, or enough is dirty, and the last epoch but
 * one has been acknowledged.
 */
enum where kc_epoch_wait(struct protect *p, uint64_t until_us, int *rc, struct kc_err *err);
enum where kc_epoch_next(struct protect *p, int *rc, struct kc_err *err);
/* After which the guest does not run, and the sink has all of it; or not, if that fails */
enum where kc_epoch_last(struct protect *p, int *rc, struct kc_err *err);

#endif
