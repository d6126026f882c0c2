// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint standby: a QEMU that can load what arrives.
 *
 * Whether it can is found out before it is needed: a state of a kind that was not loaded yet is
 * loaded into a QEMU with private memory, which is then ended.  After that another one is started
 * with the guest's memory, which waits until it has to take over.  There is never more than one, as
 * they have sockets and files in common; and none when the standby is gone, however that ended.
 *
 * All of it is done by the thread of the active session, while it is that.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "process.h"
#include "standby.h"
#include "vmstate.h"

#define RESTART_US	1000000ull
#define MAX_RESTART_US	60000000ull

/* --- Trying --------------------------------------------------------------- */

static bool needed(void *ctx, const struct kc_devices *state)
{
	struct standby *sb = ctx;
	unsigned int i;

	if (!sb->exec || sb->bare || sb->no_trial)
		return false;
	sb->kind = kc_vmstate_kind(state->data, state->len, &sb->memo);
	for (i = 0; i < KC_KINDS; i++) {
		if (sb->loaded[i] == sb->kind)
			return false;
	}
	return true;
}

/* QEMU takes its time: the primary hears of us, and we do not wait when it is needed. */
static int meanwhile(void *ctx)
{
	struct standby *sb = ctx;

	kc_session_still_there(sb);
	if (kc_standby_mode(sb) == SERVING)
		return 0;
	/* What waits for it notices by that */
	sb->cancelled = true;
	if (sb->trial.pid || sb->warm.pid)
		kill(sb->trial.pid ? sb->trial.pid : sb->warm.pid, SIGKILL);
	return 0;
}

static int run(void *ctx, struct kc_err *err)
{
	struct standby *sb = ctx;
	struct kc_err why = { "" };
	uint64_t t = kc_now_us();
	struct kc_launch l;
	int rc;

	rc = kc_make_launch(sb, kc_ram_guest(sb->ram), &l, err);
	if (rc)
		return rc;
	l.idle = meanwhile;
	l.idle_ctx = sb;
	sb->cancelled = false;
	kc_status_phase(sb->status, "trying to load an epoch");
	kc_qemu_kill(&sb->warm);
	rc = kc_qemu_start(&l, true, &sb->trial, &why);
	if (!rc)
		rc = kc_qemu_load(&sb->trial, &l, &why);
	kc_qemu_kill(&sb->trial);
	kc_free_launch(&l);
	kc_status_phase(sb->status, "receiving");
	/* Soon, as it failed for the epoch and not by itself. */
	sb->warm_not_before_us = 0;
	if (rc && sb->cancelled)
		return kc_fail(err, ECANCELED, "there was no time to try to load it");
	if (rc)
		return kc_fail(err, EREMOTEIO,
			       "the standby's QEMU cannot load epoch %" PRIu64 ": %s; what it had before stays",
			       kc_ram_epoch(sb->ram), why.text);
	sb->loaded[sb->nr_loaded++ % KC_KINDS] = sb->kind;
	kc_log(KC_LOG_INFO, "epoch %" PRIu64 " can be loaded: QEMU did so in %.3f s",
	       kc_ram_epoch(sb->ram), (kc_now_us() - t) / 1e6);
	return 0;
}

void kc_ready_init(struct standby *sb)
{
	sb->warm = sb->trial = (struct kc_qemu){ .errors = -1, .guard = -1, .qmp.fd = -1 };
	sb->ram_trial = (struct kc_ram_trial){ .needed = needed, .run = run, .ctx = sb };
	kc_ram_set_trial(sb->ram, &sb->ram_trial);
}

/* --- Waiting -------------------------------------------------------------- */

void kc_ready_wait(struct standby *sb)
{
	struct kc_launch l = { .argv = sb->exec };
	uint64_t now = kc_now_us();
	bool died = sb->warm.pid;
	struct kc_err err;
	int rc;

	if (!sb->exec || sb->bare || kc_launch_names_epoch(&l))
		return;
	if (kc_qemu_lives(&sb->warm))
		return;
	if (died)
		kc_log(KC_LOG_WARN, "QEMU that waited for the guest has ended");
	if (now < sb->warm_not_before_us)
		return;
	rc = kc_make_launch(sb, kc_ram_guest(sb->ram), &l, &err);
	if (!rc) {
		l.idle = meanwhile;
		l.idle_ctx = sb;
		rc = kc_qemu_start(&l, false, &sb->warm, &err);
		kc_free_launch(&l);
	}
	/* Less and less often if it ends again and again. */
	sb->warm_pause_us = now - sb->warm_started_us > 4 * MAX_RESTART_US ? RESTART_US :
			    2 * sb->warm_pause_us < MAX_RESTART_US ? 2 * sb->warm_pause_us :
								     MAX_RESTART_US;
	sb->warm_started_us = now;
	sb->warm_not_before_us = now + sb->warm_pause_us;
	if (rc)
		kc_log(KC_LOG_WARN, "cannot start QEMU ahead: %s", err.text);
}

void kc_ready_stop(struct standby *sb)
{
	kc_qemu_kill(&sb->warm);
}
