/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A client of QEMU's monitor, QMP.
 *
 * Commands may be sent ahead: QEMU executes them in order, and qmp_receive() gives the answers in
 * that order.  One thread only.
 */
#ifndef KC_QMP_H
#define KC_QMP_H

#include <json-c/json.h>

#include "util.h"

/* How the block jobs of this program are called */
#define JOB_NAME	"kvm-checkpoint-"

struct qmp {
	int fd;
	unsigned int timeout_ms;
	uint64_t asked_us;	/* since when an answer is awaited, 0 if none is */
	bool shutdown;		/* the event came: the guest or its owner ended it */
	char why_shutdown[32];	/* as QEMU says, such as "guest-reset", or empty */
	/* Events of that, and of their errors, of jobs that are called JOB_NAME... */
	unsigned int jobs_ended, jobs_failed;
	int (*idle)(void *ctx);
	void *idle_ctx;
	char *buf;
	size_t len, size;
	struct json_tokener *tok;
	struct json_object *answer;	/* that came while something else was awaited */
};

/**
 * qmp_open() - connect and negotiate
 * @q: filled in; needs qmp_close() only if this succeeds.
 * @path: of QEMU's socket.
 * @timeout_ms: how long any answer may take; 0: as long as QEMU lives.
 * @idle: called now and then while an answer is awaited, from here on; or NULL.  If it returns a
 *	negative errno, the answer is awaited no more and the connection of no use.
 * @idle_ctx: for @idle.
 * @err: why not.
 *
 * Return: 0; -ENOENT or -ECONNREFUSED if nobody listens, -EPIPE if it goes before it greets, -EPROTO if
 * it is not QMP, -ETIMEDOUT if nothing comes: QEMU serves one client of a socket at a time.
 */
int qmp_open(struct qmp *q, const char *path, unsigned int timeout_ms, int (*idle)(void *ctx),
	     void *idle_ctx, struct kc_err *err);

/**
 * qmp_adopt() - the same with a socket that is connected already
 * @fd: which is closed by qmp_close(), and if this fails.
 *
 * Return: as qmp_open().
 */
int qmp_adopt(struct qmp *q, int fd, unsigned int timeout_ms, int (*idle)(void *ctx),
	      void *idle_ctx, struct kc_err *err);
void qmp_close(struct qmp *q);

/**
 * qmp_send() - send a command
 * @q: the connection.
 * @command: its name.
 * @args: its arguments; the reference is taken over.  NULL for none.
 * @fd: a file descriptor to send along (for getfd), or -1.
 * @err: why not.
 *
 * Return: 0; -EPIPE if QEMU is gone; -ETIMEDOUT.
 */
int qmp_send(struct qmp *q, const char *command, struct json_object *args, int fd,
	     struct kc_err *err);

/**
 * qmp_receive() - the answer to the oldest command that has none yet
 * @q: the connection.
 * @command: its name, for messages.
 * @ret: where to store what it returned, to be json_object_put(); or NULL.
 * @err: why not.
 *
 * Return: 0; -EREMOTEIO if the command failed; -EPIPE if QEMU is gone; -ETIMEDOUT; -EPROTO; or what
 * idle() returned.
 */
int qmp_receive(struct qmp *q, const char *command, struct json_object **ret, struct kc_err *err);

/**
 * qmp_answered() - whether qmp_receive() has something to return, without waiting
 *
 * Also when it would fail.  Events that have come are taken.
 */
bool qmp_answered(struct qmp *q);

/** qmp_call() - qmp_send() and qmp_receive() */
int qmp_call(struct qmp *q, const char *command, struct json_object *args,
	     struct json_object **ret, struct kc_err *err);

/**
 * qmp_poll() - take events that have come, without waiting; no command may be under way
 *
 * Return: 0, or -EPIPE if QEMU is gone.
 */
int qmp_poll(struct qmp *q, struct kc_err *err);

/**
 * qmp_wait() - wait for a file descriptor as for an answer
 * @q: the connection, whose idle() is called.
 * @fd: any.
 * @events: as for poll().
 * @until_us: of kc_now_us().
 *
 * Return: 0, -ETIMEDOUT, or what idle() returned.
 */
int qmp_wait(struct qmp *q, int fd, short events, uint64_t until_us);

/* Members of an answer; a missing one is 0, false, "" */
uint64_t qmp_u64(struct json_object *o, const char *name);
bool qmp_bool(struct json_object *o, const char *name);
const char *qmp_str(struct json_object *o, const char *name);

#endif
