/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * QEMU on top of a checkpoint.  Never through a shell.
 */
#ifndef KC_LAUNCH_H
#define KC_LAUNCH_H

#include <sys/types.h>

#include "qmp.h"
#include "sink.h"

/**
 * kc_split() - a command in one string into arguments
 *
 * Blanks separate; '...' and "..." and backslashes quote, as a shell would have it; nothing else is
 * special.
 *
 * Return: NULL terminated array, kc_free_argv(); NULL if quotes do not match or it is empty.
 */
char **kc_split(const char *command);
void kc_free_argv(char **argv);

/**
 * struct kc_launch - QEMU on top of a checkpoint
 * @argv: its command, in which placeholders are replaced: {ramN} or {ram:NAME} path of a block,
 *	{sizeN} its size in bytes, {diskN} path of a disk's image, {state} path of the device state,
 *	{epoch} its number.
 * @bare: do not add "-S -incoming defer" and a QMP monitor of our own and do not load the state:
 *	the command does all of it.
 * @capabilities: of migration, to be set before the state is loaded; NULL terminated or NULL.
 * @guest, @ram, @disks, @state, @epoch: the checkpoint.
 * @stopped: the guest was not running when it was taken, so load it and leave it as it was.
 * @timeout_ms: for QEMU to have loaded the state.
 * @committed: called right before the guest runs and changes the RAM; an error stops it.  QEMU
 *	is in a session of its own then, as it is to live longer than we do; until then it ends
 *	when we do.
 * @idle: called now and then while QEMU is waited for, see qmp_open(); or NULL.
 */
struct kc_launch {
	char **argv;
	bool bare;
	char **capabilities;
	const struct kc_guest *guest;
	char **ram;
	const char *disks[KC_MAX_DISKS];
	const char *state;
	uint64_t epoch;
	bool stopped;
	unsigned int timeout_ms;
	int (*committed)(void *ctx, struct kc_err *err);
	void *ctx;
	int (*idle)(void *ctx);
	void *idle_ctx;
};

/*
 * Would all placeholders be known? For checking when only the template is there, @guest may be
 * NULL.
 */
int kc_launch_check(const struct kc_launch *l, struct kc_err *err);

/* An argument with its placeholders replaced; malloc()ed. */
char *kc_expand(const struct kc_launch *l, const char *arg, struct kc_err *err);

/*
 * The argument, malloc()ed, changed so that memory from files is not written to, nor all of it
 * filled in.
 */
char *kc_make_private(const char *arg);

/* Is the path of the state or the number of the epoch in it, which change all the time? */
bool kc_launch_names_epoch(const struct kc_launch *l);

/* Is a path of RAM in it at all?  Of which guest is not known yet. */
bool kc_launch_has_ram(const struct kc_launch *l);

/* Are all blocks and disks of the guest in it?  Else it would run without what they hold. */
int kc_launch_check_blocks(const struct kc_launch *l, struct kc_err *err);

/* Is there such a program, and may it be run?  0, or a negative errno. */
int kc_can_run(const char *file, struct kc_err *err);

/* A QEMU that was started for a checkpoint; pid 0: none */
struct kc_qemu {
	pid_t pid;
	struct qmp qmp;
	int errors;		/* what it says on stderr, or -1 */
	int guard;		/* of kc_start(), until it has the guest; or -1 */
};

/**
 * kc_qemu_start() - start QEMU so that it waits for a state
 * @trial: it is only to load it: its RAM is private, so that the files stay as they are, and it
 *	leaves disks and network alone.
 * @q: filled in; nothing is left of it on failure.
 */
int kc_qemu_start(const struct kc_launch *l, bool trial, struct kc_qemu *q, struct kc_err *err);

/* Load the state.  The guest has not run yet. */
int kc_qemu_load(struct kc_qemu *q, const struct kc_launch *l, struct kc_err *err);

/* Has it not ended by itself? */
bool kc_qemu_lives(struct kc_qemu *q);

void kc_qemu_kill(struct kc_qemu *q);

/**
 * kc_launch() - load the state into QEMU, let the guest run unless it was stopped
 * @q: of kc_qemu_start(), or one with pid 0, and then QEMU is started.  Not for @bare: there
 *	q->pid is all.
 *
 * Return: 0; 1 if @committed was called and the guest does not seem to run, which @err explains; or
 * a negative errno and then QEMU is gone.
 */
int kc_launch(const struct kc_launch *l, struct kc_qemu *q, struct kc_err *err);

#endif
