/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Starting programs: the fence, and QEMU on top of a checkpoint.  Never through a shell.
 */
#ifndef KC_LAUNCH_H
#define KC_LAUNCH_H

#include <sys/types.h>

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
 * kc_run_fence() - run a command and wait until it is done
 * @argv: its output goes to ours.
 * @timeout_ms: then it is killed, with what it started.
 *
 * Return: 0 only if it exited with status 0.
 */
int kc_run_fence(char **argv, unsigned int timeout_ms, struct kc_err *err);

/**
 * struct kc_launch - QEMU on top of a checkpoint
 * @argv: its command, in which placeholders are replaced: {ramN} or {ram:NAME} path of a block,
 *	{sizeN} its size in bytes, {state} path of the device state, {epoch} its number.
 * @bare: do not add "-S -incoming defer" and a QMP monitor of our own and do not load the state:
 *	the command does all of it.
 * @capabilities: of migration, to be set before the state is loaded; NULL terminated or NULL.
 * @guest, @ram, @state, @epoch: the checkpoint.
 * @stopped: the guest was not running when it was taken, so load it and leave it as it was.
 * @timeout_ms: for QEMU to have loaded the state.
 * @committed: called right before the guest runs and changes the RAM; an error stops it.  QEMU
 *	is in a session of its own then, as it is to live longer than we do.
 */
struct kc_launch {
	char **argv;
	bool bare;
	char **capabilities;
	const struct kc_guest *guest;
	char **ram;
	const char *state;
	uint64_t epoch;
	bool stopped;
	unsigned int timeout_ms;
	int (*committed)(void *ctx, struct kc_err *err);
	void *ctx;
};

/*
 * Would all placeholders be known? For checking when only the template is there, @guest may be
 * NULL.
 */
int kc_launch_check(const struct kc_launch *l, struct kc_err *err);

/* An argument with its placeholders replaced; malloc()ed. */
char *kc_expand(const struct kc_launch *l, const char *arg, struct kc_err *err);

/* Is a path of RAM in it at all?  Of which guest is not known yet. */
bool kc_launch_has_ram(const struct kc_launch *l);

/* Are all blocks of the guest in it?  Else it would run without what they hold. */
int kc_launch_check_blocks(const struct kc_launch *l, struct kc_err *err);

/* Is there such a program, and may it be run?  0, or a negative errno. */
int kc_can_run(const char *file, struct kc_err *err);

/**
 * kc_launch() - start QEMU, load the state, let the guest run unless it was stopped
 * @pid: of QEMU, a child of ours.
 * @qmp: its monitor, to be closed by the caller whenever it wants; -1 if @bare.
 *
 * Return: 0; 1 if @committed was called and the guest does not seem to run, which @err explains; or
 * a negative errno and then QEMU is gone.
 */
int kc_launch(const struct kc_launch *l, pid_t *pid, int *qmp, struct kc_err *err);

#endif
