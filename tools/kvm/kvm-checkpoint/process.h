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
 * @place: where signals for us do not reach it.
 * @pid: of it.
 * @err: why not.
 *
 * Return: 0 when it runs, or a negative errno.
 */
int kc_start(char **argv, int keep, enum place place, pid_t *pid, struct kc_err *err);

/* With what it has started in its group; returns when it is gone. */
void kc_kill_child(pid_t pid);

#endif
