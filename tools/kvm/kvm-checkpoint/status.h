/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a daemon tells about itself on its control socket, as text, JSON and Prometheus text format,
 * and the commands that it takes there.
 */
#ifndef KC_STATUS_H
#define KC_STATUS_H

#include <stdio.h>

#include "sink.h"

enum kc_pause_part {
	KC_PAUSE_STOP, KC_PAUSE_HARVEST, KC_PAUSE_STATE, KC_PAUSE_COPY, KC_PAUSE_RESUME,
	KC_PAUSE_PARTS
};

struct kc_status;

/**
 * kc_status_new() - the status of a daemon
 * @role: "protect" or "standby".
 * @guest: name of the guest, for people.
 *
 * All functions on it are for any thread.
 */
struct kc_status *kc_status_new(const char *role, const char *guest);
void kc_status_free(struct kc_status *st);

/** kc_status_guest() - set or change the guest's name. */
void kc_status_guest(struct kc_status *st, const char *guest);

/** kc_status_socket() - where the status is asked for; tells one daemon of a host from another. */
void kc_status_socket(struct kc_status *st, const char *path);

/** kc_status_phase() - a word or two for people: "full copy", "running", "link lost", ... */
void kc_status_phase(struct kc_status *st, const char *phase);

/** kc_status_peer() - who protects whom: "to" or "from" whom; NULL for nobody. */
void kc_status_peer(struct kc_status *st, const char *text);

/** kc_status_trouble() - why there is no protection now, in a sentence; NULL: there is. */
void kc_status_trouble(struct kc_status *st, const char *text);

/** kc_status_progress() - of a long phase, in pages; @total 0 when there is none. */
void kc_status_progress(struct kc_status *st, uint64_t done, uint64_t total);

/** kc_status_pause() - one pause of the guest and its parts, in microseconds. */
void kc_status_pause(struct kc_status *st, const uint64_t us[KC_PAUSE_PARTS]);

/**
 * kc_status_epoch() - an epoch was taken of the guest
 * @nr: number of the epoch.
 * @taken_us: kc_now_us() when the guest was stopped for it.  The lag is the age of the last
 *	acknowledged epoch by this.
 */
void kc_status_epoch(struct kc_status *st, uint64_t nr, uint64_t taken_us);

/**
 * kc_status_sink() - take over a sink's numbers
 * @stats: of the sink that is open now, or NULL to say that it was closed: its sums are then kept
 *	and the next sink's added to them.
 */
void kc_status_sink(struct kc_status *st, const struct kc_sink_stats *stats);

/* What becomes of what the guest sends, if it has a network */
enum kc_output { KC_OUTPUT_UNKNOWN, KC_OUTPUT_PASSES, KC_OUTPUT_HELD };

/** kc_status_output() - what does */
void kc_status_output(struct kc_status *st, enum kc_output output);

/** kc_status_resync() - count one resynchronization. */
void kc_status_resync(struct kc_status *st);

/*
 * What Prometheus gets has the labels role, guest and socket at each series, so that those of all
 * daemons of a host differ.
 */
enum kc_status_format { KC_STATUS_TEXT, KC_STATUS_JSON, KC_STATUS_PROMETHEUS };

/** kc_status_print() - as malloc()ed text, NULL if memory is short. */
char *kc_status_print(struct kc_status *st, enum kc_status_format format);

struct kc_ctl;

/**
 * kc_ctl_start() - serve a control socket in a thread of its own, all clients at once
 * @path: of the unix socket; a stale one is replaced, one in use is an error.  Made with mode 0600.
 * @st: what "status" prints.
 * @command: called in the control thread, so it must not wait, for other commands ("promote",
 *	"detach", ...), returns malloc()ed text to answer (without final newline) and sets *@ok;
 *	NULL if there are none.
 * @ctx: for @command.
 * @err: why not.
 *
 * The protocol is one line of request, then the answer until end of file: "status
 * [json|prometheus]" or a command of the daemon.  The first line of an answer is "ok" or "error".
 *
 * Return: the server, or NULL with errno set.
 */
struct kc_ctl *kc_ctl_start(const char *path, struct kc_status *st,
			    char *(*command)(void *ctx, const char *line, bool *ok), void *ctx,
			    struct kc_err *err);

/** kc_ctl_stop() - end the thread and remove the socket. NULL is fine. */
void kc_ctl_stop(struct kc_ctl *ctl);

/**
 * kc_ctl_request() - what the sub-command status does
 * @answer: malloc()ed text on success.
 *
 * Return: 0, or a negative errno (-EREMOTEIO when the daemon answered "error").
 */
int kc_ctl_request(const char *path, const char *line, char **answer, struct kc_err *err);

/**
 * kc_prometheus_merge() - what several daemons say as one text
 * @texts: as of "status prometheus"; they are changed.
 * @n: how many.
 * @f: where to.
 *
 * The series of a metric have to follow each other, after one HELP and one TYPE.
 */
void kc_prometheus_merge(char **texts, size_t n, FILE *f);

/* The sub-commands, argv[0] being their name.  They return the exit status. */
int cmd_protect(int argc, char **argv);		/* protect.c */
int cmd_standby(int argc, char **argv);
int cmd_unplug(int argc, char **argv);		/* net_unplug.c */
int cmd_restore(int argc, char **argv);
int cmd_verify(int argc, char **argv);
int cmd_list(int argc, char **argv);
int cmd_status(int argc, char **argv);

#endif
