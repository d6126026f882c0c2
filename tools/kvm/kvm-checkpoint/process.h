/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Starting programs and ending them.
 */
#ifndef KC_PROCESS_H
#define KC_PROCESS_H

#include <sys/types.h>

#include "util.h"

enum place {
	WITH_US,
	OWN_GROUP,	/* what it starts can be killed with it */
	OWN_SESSION,	/* and no terminal's Ctrl-C or end reaches it */
};

/**
 * kc_start() - start a program
 * @argv: its arguments, found along PATH.
 * @keep: a file descriptor that stays open in it, or -1.
 * @errors: becomes its stderr, or -1 for ours.
 * @place: where signals for us do not reach it.
 * @guard: where to put a file descriptor: when that is closed, by whatever ends us too, the program
 *	is killed; kc_guard_release() lets it live on without us.  Or NULL.
 * @pid: of it.
 * @err: why not.
 *
 * It is a small process that waits for the other end of @guard.
 *
 * Return: 0 when it runs, or a negative errno.
 */
int kc_start(char **argv, int keep, int errors, enum place place, int *guard, pid_t *pid,
	     struct kc_err *err);

/* What @guard of kc_start() is for is over: the program is not ours any more.  -1 is fine. */
void kc_guard_release(int guard);

/* With what it has started in its group; returns when it is gone. */
void kc_kill_child(pid_t pid);

/**
 * kc_run_fence() - run a command and wait until it is done
 * @argv: its output goes to ours.
 * @timeout_ms: then it is killed, with what it started.
 *
 * Return: 0 only if it exited with status 0.
 */
int kc_run_fence(char **argv, unsigned int timeout_ms, struct kc_err *err);

/**
 * kc_process_id() - tell a process from all others that there are or were, on any host
 * @pid: of it.
 * @id: filled in, with zeros if that is not known.
 */
void kc_process_id(pid_t pid, uint8_t id[16]);

#endif
