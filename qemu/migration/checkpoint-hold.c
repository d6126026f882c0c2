/*
 * Checkpoints of a running guest: a guest that stands still for one
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * It is owed to it that it runs again, whatever becomes of the client.
 * Whatever else happens to it meanwhile spoils the checkpoint, and comes first.
 *
 * All of this runs in the main loop, with the BQL held.
 */

#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "qemu/slot-ring-compat.h"
#include "qemu/timer.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-misc.h"
#include "qapi/qapi-events-checkpoint.h"
#include "migration/misc.h"
#include "checkpoint.h"

/* How long until a guest that something keeps from running is tried again */
#define AGAIN_MS    100

CheckpointHold checkpoint_hold;

void checkpoint_spoil(CheckpointSpoilt by)
{
    if (!checkpoint_hold.spoilt) {
        checkpoint_hold.spoilt = true;
        checkpoint_hold.spoilt_by = by;
    }
}

void checkpoint_hide_pause(void)
{
    int64_t now = get_clock();

    if (checkpoint_hold.hidden) {
        cpu_clock_skip(now - checkpoint_hold.since_ns);
        checkpoint_hold.since_ns = now;
    }
}

int64_t checkpoint_hidden_pause_ns(void)
{
    if (!checkpoint_hold.hidden) {
        return -1;
    }
    return get_clock() - checkpoint_hold.stopped_ns;
}

bool checkpoint_resume_guest(Error **errp)
{
    Error *err = NULL;

    timer_del(checkpoint_hold.limit);
    timer_del(checkpoint_hold.again);
    if (!checkpoint_hold.owed) {
        return true;
    }
    if (!runstate_check(RUN_STATE_PAUSED) &&
        !runstate_check(RUN_STATE_PRELAUNCH)) {
        /* Somebody else has taken it over */
        checkpoint_hold.owed = false;
        return true;
    }
    if (checkpoint_lease_is_over()) {
        error_setg(errp, "the lease is over, somebody else may run the guest");
        return false;
    }
    if (qemu_runstate_change_requested()) {
        /* The main loop comes to that before it comes to the timer */
        timer_mod(checkpoint_hold.again,
                  qemu_clock_get_ms(QEMU_CLOCK_REALTIME));
        return true;
    }

    /* Unless there is another state than the one that it was stopped with */
    checkpoint_hold.hidden = runstate_check(RUN_STATE_PAUSED) &&
                             !checkpoint_hold.lost;
    checkpoint_hide_pause();
    qmp_cont(&err);
    checkpoint_hold.hidden = false;
    if (!err) {
        if (checkpoint_hold.told) {
            info_report("checkpoint: the guest runs again");
        }
        checkpoint_hold.owed = false;
        checkpoint_hold.told = false;
        return true;
    }

    if (!checkpoint_hold.told) {
        warn_report("checkpoint: the guest has to wait until it can run: %s",
                    error_get_pretty(err));
    }
    checkpoint_hold.told = true;
    timer_mod(checkpoint_hold.again,
              qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + AGAIN_MS);
    error_propagate(errp, err);
    return false;
}

static void resume_again(void *opaque)
{
    checkpoint_resume_guest(NULL);
}

static void client_is_late(void *opaque)
{
    if (!checkpoint_hold.owed) {
        return;
    }
    warn_report("checkpoint: the guest has stood still for long enough, "
                "it goes on without a checkpoint");
    checkpoint_spoil(CHECKPOINT_SPOILT_LATE);
    qapi_event_send_checkpoint_late();
    checkpoint_resume_guest(NULL);
}

/* Whoever resumes the guest: it does not stand still for the client any more */
static void guest_runs(void *opaque, bool running, RunState state)
{
    if (checkpoint_is_brief()) {
        return;
    }
    if (running) {
        checkpoint_hold.owed = false;
        checkpoint_spoil(CHECKPOINT_SPOILT_RESUMED);
    }
    /* Not we: then it is somebody who knows that nobody else runs it */
    if (running && checkpoint_lease_is_over()) {
        warn_report("checkpoint: the guest runs without a lease from now on");
        checkpoint_lease_until(0, NULL);
    }
}

void checkpoint_lease_ended(void)
{
    checkpoint_hold.leased = true;
    if (runstate_is_running()) {
        /* First: a command may be executed while requests are drained */
        checkpoint_hold.stopped_ns = checkpoint_hold.since_ns = get_clock();
        checkpoint_hold.owed = true;
        vm_stop(RUN_STATE_PAUSED);
    }
    warn_report("checkpoint: the lease is over, the guest stands still");
    qapi_event_send_checkpoint_lease_over();
}

void checkpoint_lease_changed(void *opaque)
{
    if (!checkpoint_lease_is_over()) {
        /* Unless it stands still for the client just now, which resumes it */
        if (checkpoint_hold.leased) {
            checkpoint_hold.leased = false;
            checkpoint_resume_guest(NULL);
        } else if (runstate_is_running()) {
            /* vCPUs may have noticed before this did */
            resume_all_vcpus();
        }
    } else if (!checkpoint_hold.leased &&
               (checkpoint_hold.owed || runstate_is_running())) {
        checkpoint_lease_ended();
    }
}

void checkpoint_hold_init(void)
{
    if (!checkpoint_hold.runs) {
        checkpoint_hold.runs = qemu_add_vm_change_state_handler(guest_runs,
                                                                NULL);
        checkpoint_hold.limit = timer_new_ms(QEMU_CLOCK_REALTIME,
                                             client_is_late, NULL);
        checkpoint_hold.again = timer_new_ms(QEMU_CLOCK_REALTIME,
                                             resume_again, NULL);
    }
}

/* Somebody has stopped the guest */
void checkpoint_keep_stopped(void)
{
    checkpoint_hold.owed = false;
    checkpoint_hold.told = false;
    checkpoint_hold.leased = false;
}

void checkpoint_give_way(void)
{
    RunState requested;
    bool more;

    if (!checkpoint_hold.owed || !runstate_check(RUN_STATE_PAUSED)) {
        return;
    }
    timer_del(checkpoint_hold.limit);
    timer_del(checkpoint_hold.again);
    /* vm_prepare_start() forgets it */
    more = qemu_vmstop_requested(&requested);
    checkpoint_hold.hidden = !checkpoint_hold.lost;
    checkpoint_hide_pause();
    vm_prepare_start(false);
    checkpoint_hold.hidden = false;
    if (more) {
        qemu_system_vmstop_request_prepare();
        qemu_system_vmstop_request(requested);
    }
}
