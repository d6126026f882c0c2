/*
 * Checkpoints of a running guest, taken by another process
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * A client of the monitor that maps the guest's RAM (memory back ends with
 * share=on) needs three things of QEMU to keep a copy of the guest: which pages
 * were written, the state of the devices, and that the guest stands still while
 * it copies.  The x-checkpoint-* commands give it these.
 *
 * Pages that vCPUs write.  With dirty slot rings the client harvests KVM's logs
 * by itself, through one file.  Otherwise they are synchronized here.
 *
 * Pages that QEMU writes: see checkpoint-ram.c.
 *
 * RAM that is not shared, such as firmware, is part of the device state, which
 * is a migration stream that any "-incoming" takes: see checkpoint-state.c.
 *
 * The client may die at any moment.  Then its socket is closed, dirty logging
 * ends and a guest that was stopped for it goes on.  It may also hang: it says
 * for how long the guest may stand still for it.
 *
 * Whatever else happens to the guest while it stands still spoils the
 * checkpoint, and comes first: see checkpoint-hold.c.
 *
 * All of this runs in the main loop, with the BQL held.
 */

#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "qemu/slot-ring-compat.h"
#include "qemu/timer.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-checkpoint.h"
#include "qapi/qapi-commands-run-state.h"
#include "qapi/qapi-events-checkpoint.h"
#include "block/block.h"
#include "cpu.h"
#include "migration/misc.h"
#include "migration/migration.h"
#include "monitor/monitor.h"
#include "checkpoint.h"

static struct {
    QIOChannelSocket *socket;   /* NULL if there is no client */
    guint watch;
    int buffer;
    Error *blocker;
    bool loadable;              /* What is saved can go on elsewhere */
} client;

static void client_gone(void)
{
    if (!client.socket) {
        return;
    }

    g_source_remove(client.watch);
    object_unref(OBJECT(client.socket));
    client.socket = NULL;
    close(client.buffer);
    checkpoint_resume_guest(NULL);
    checkpoint_packets_orphaned();
    checkpoint_ask_hints(CHECKPOINT_HINTS_ACTION_DONE, NULL);

    checkpoint_unfollow_logs();
    memory_global_dirty_log_stop(GLOBAL_DIRTY_CHECKPOINT);
    compat_unblock_migration(&client.blocker);
}

static gboolean client_event(QIOChannel *ioc, GIOCondition condition,
                             gpointer opaque)
{
    g_autoptr(CheckpointTaken) taken = NULL;
    CheckpointAsked asked;
    Error *err = NULL;
    bool gone = true;

    if (condition & (G_IO_HUP | G_IO_ERR) ||
        !checkpoint_hear(client.socket, &asked, &gone)) {
        if (gone) {
            client_gone();
        }
        return gone ? G_SOURCE_REMOVE : G_SOURCE_CONTINUE;
    }
    taken = qmp_x_checkpoint_take(MIN(asked.limit_ms, UINT32_MAX),
                                  asked.flags & CHECKPOINT_ASKED_LEASE,
                                  asked.lease_us, true,
                                  asked.flags & CHECKPOINT_ASKED_FIRST, &err);
    /* It may have gone meanwhile; or does not read, and will find out */
    if (client.socket) {
        checkpoint_tell_ended(client.socket, taken, err);
    }
    error_free(err);
    return client.socket ? G_SOURCE_CONTINUE : G_SOURCE_REMOVE;
}

static bool need_client(Error **errp)
{
    if (!client.socket) {
        error_setg(errp, "no client is attached, use x-checkpoint-attach");
        return false;
    }
    return true;
}

/*
 * Commands
 */

/*
 * Whether the guest can go on where its state is loaded in this run state,
 * which process_incoming_migration_bh() sets there
 */
static bool state_is_loadable(RunState state)
{
    switch (state) {
    case RUN_STATE_RUNNING:
    case RUN_STATE_PAUSED:
    case RUN_STATE_PRELAUNCH:
    case RUN_STATE_IO_ERROR:
    case RUN_STATE_WATCHDOG:
    case RUN_STATE_GUEST_PANICKED:
    case RUN_STATE_SHUTDOWN:
        return true;
    default:
        return false;
    }
}

/*
 * Its devices may come to have what is in no state, as a share that is mounted.
 * A dump blocks migration, too, but only as long as it takes.
 */
static bool is_blocked(Error **errp)
{
    return !qemu_system_dump_in_progress() &&
           migration_is_blocked_also(client.blocker, errp);
}

/* The state of a guest that cannot be migrated is of no use elsewhere */
static bool block_migration(Error **errp)
{
    if (runstate_check(RUN_STATE_INMIGRATE) ||
        migration_in_incoming_postcopy()) {
        error_setg(errp, "the guest is not here yet, a migration is incoming");
        return false;
    }
    if (runstate_check(RUN_STATE_FINISH_MIGRATE) ||
        runstate_check(RUN_STATE_POSTMIGRATE) ||
        runstate_check(RUN_STATE_COLO)) {
        error_setg(errp, "the guest has been migrated to somewhere else");
        return false;
    }
    if (migration_is_blocked_also(NULL, errp)) {
        return false;
    }
    error_setg(&client.blocker, "the guest is being checkpointed");
    /* It goes with the client, so that it is no matter of --only-migratable */
    return compat_block_migration(&client.blocker, errp);
}

CheckpointLayout *qmp_x_checkpoint_attach(const char *socket,
                                          const char *buffer, Error **errp)
{
    g_autoptr(GArray) pages = NULL;
    int socket_fd, buffer_fd, log_fd;
    QIOChannelSocket *sioc;
    bool sent;

    if (!kvm_enabled()) {
        error_setg(errp, "checkpoints need -accel kvm");
        return NULL;
    }
    if (client.socket) {
        error_setg(errp, "a client is attached already");
        return NULL;
    }

    socket_fd = monitor_get_fd(monitor_cur(), socket, errp);
    if (socket_fd < 0) {
        return NULL;
    }
    buffer_fd = monitor_get_fd(monitor_cur(), buffer, errp);
    if (buffer_fd < 0) {
        close(socket_fd);
        return NULL;
    }
    sioc = qio_channel_socket_new_fd(socket_fd, errp);
    if (!sioc) {
        close(socket_fd);
        close(buffer_fd);
        return NULL;
    }
    qio_channel_set_blocking(QIO_CHANNEL(sioc), false, NULL);

    if (!block_migration(errp)) {
        object_unref(OBJECT(sioc));
        close(buffer_fd);
        return NULL;
    }

    checkpoint_hold_init();
    checkpoint_follow_head();
    log_fd = checkpoint_follow_logs();
    if (!compat_dirty_log_start(GLOBAL_DIRTY_CHECKPOINT, errp)) {
        checkpoint_unfollow_logs();
        if (log_fd >= 0) {
            close(log_fd);
        }
        compat_unblock_migration(&client.blocker);
        object_unref(OBJECT(sioc));
        close(buffer_fd);
        return NULL;
    }
    client.socket = sioc;
    client.buffer = buffer_fd;
    checkpoint_hold.lost = NULL;
    checkpoint_hold.spoilt = false;
    checkpoint_hear_anew();
    client.watch = qio_channel_add_watch(QIO_CHANNEL(sioc), G_IO_IN | G_IO_HUP,
                                         client_event, NULL, NULL);

    /*
     * The client copies all pages after this, so what is dirty by now is not of
     * interest.  A bitmap starts with everything dirty and nothing protected.
     */
    pages = checkpoint_collect_pages();

    sent = checkpoint_send_files(sioc, log_fd, errp);
    if (log_fd >= 0) {
        close(log_fd);
    }
    if (!sent) {
        client_gone();
        return NULL;
    }
    return checkpoint_layout();
}

CheckpointLayout *qmp_x_checkpoint_layout(Error **errp)
{
    return need_client(errp) ? checkpoint_layout() : NULL;
}

void qmp_x_checkpoint_lease(uint64_t until_us, Error **errp)
{
    checkpoint_lease_until(until_us, errp);
}

static bool renew(bool has_lease_us, uint64_t lease_us, bool first,
                  Error **errp)
{
    return !has_lease_us || (first && checkpoint_has_lease()) ||
           checkpoint_lease_until(lease_us, errp);
}

CheckpointStopped *qmp_x_checkpoint_stop(bool has_limit_ms, uint32_t limit_ms,
                                         bool has_lease_us, uint64_t lease_us,
                                         bool has_first, bool first,
                                         Error **errp)
{
    g_autoptr(StatusInfo) status = NULL;
    CheckpointStopped *stopped;
    Error *err = NULL;

    if (!need_client(errp) || !renew(has_lease_us, lease_us, first, errp)) {
        return NULL;
    }
    stopped = g_new0(CheckpointStopped, 1);
    checkpoint_hold.spoilt = false;
    checkpoint_hold.leased = false;
    if (runstate_is_running() && !checkpoint_hold.lost) {
        checkpoint_hold.stopped_ns = checkpoint_hold.since_ns = get_clock();
        checkpoint_hold.owed = true;
        if (vm_stop(RUN_STATE_PAUSED) < 0) {
            checkpoint_spoil(CHECKPOINT_SPOILT_FLUSH);
        }
    } else {
        /* As its lease is over, it may be about to be stopped just now */
        bdrv_drain_all();
    }
    timer_del(checkpoint_hold.again);   /* x-checkpoint-cont is it */
    if (checkpoint_hold.owed && has_limit_ms && limit_ms) {
        timer_mod(checkpoint_hold.limit,
                  qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + limit_ms);
    }
    stopped->running = checkpoint_hold.owed;
    status = qmp_query_status(&error_abort);
    stopped->status = status->status;
    client.loadable = state_is_loadable(status->status);
    if (client.loadable && is_blocked(&err)) {
        client.loadable = false;
        compat_set_optional(stopped, blocked,
                            g_strdup(error_get_pretty(err)));
        error_free(err);
    }
    stopped->loadable = client.loadable;
    compat_set_optional(stopped, page_states, checkpoint_page_states());
    stopped->discarded = checkpoint_has_discarded();
    compat_set_optional(stopped, lost, g_strdup(checkpoint_hold.lost));
    return stopped;
}

/*
 * Writes the state of the devices, if it is wanted, and then the pages: saving
 * may write to the guest's memory.  @running: as for checkpoint_save_state()
 */
static CheckpointPagesInfo *write_buffer(bool state, bool running, Error **errp)
{
    CheckpointPagesInfo *info = g_new0(CheckpointPagesInfo, 1);
    g_autoptr(GArray) pages = NULL;
    uint64_t offset = 0;
    int64_t stamp;

    info->generation = checkpoint_generation();
    if (state &&
        !checkpoint_save_state(client.buffer, &offset, running, errp)) {
        goto fail;
    }
    if (state) {
        info->packets = checkpoint_packets_mark();
    }
    info->state_size = offset;
    /* What will be the beginning of the next state is not written over */
    offset = ROUND_UP(offset ?: checkpoint_head_size(),
                      sizeof(CheckpointPages));
    info->offset = offset;
    stamp = get_clock();
    pages = checkpoint_collect_pages();
    info->collect_us = (get_clock() - stamp) / SCALE_US;
    info->runs = pages->len;
    /*
     * After they were collected, or it would be told of some that are not there
     * yet
     */
    info->discarded = checkpoint_take_discarded();
    if (checkpoint_write(client.buffer, pages->data,
                         (size_t)pages->len * sizeof(CheckpointPages),
                         &offset, errp)) {
        return info;
    }

fail:
    qapi_free_CheckpointPagesInfo(info);
    return NULL;
}

CheckpointPagesInfo *qmp_x_checkpoint_collect(bool state, Error **errp)
{
    CheckpointPagesInfo *info;

    if (!need_client(errp)) {
        return NULL;
    }

    /*
     * What has begun is in no state yet: the guest would not know how it ends
     */
    if (state && qemu_runstate_change_requested()) {
        checkpoint_spoil(CHECKPOINT_SPOILT_RUN_STATE);
    }
    state = state && !checkpoint_hold.spoilt && client.loadable &&
            !checkpoint_hold.lost && !runstate_is_running();
    info = write_buffer(state, checkpoint_hold.owed, errp);
    /* After what was written before was taken: see page-states.c */
    if (info && runstate_is_running()) {
        compat_set_optional(info, page_states, checkpoint_page_states());
    }
    return info;
}

CheckpointHints *qmp_x_checkpoint_hints(CheckpointHintsAction action,
                                        Error **errp)
{
    g_autoptr(GArray) pages = NULL;
    CheckpointHints *hints;
    uint64_t offset;

    if (!need_client(errp) || !checkpoint_ask_hints(action, errp)) {
        return NULL;
    }
    hints = g_new0(CheckpointHints, 1);
    if (action == CHECKPOINT_HINTS_ACTION_GET ||
        action == CHECKPOINT_HINTS_ACTION_STOP) {
        pages = checkpoint_take_hints();
        /* As in write_buffer() */
        offset = ROUND_UP(checkpoint_head_size(), sizeof(CheckpointPages));
        hints->runs = pages->len;
        hints->offset = offset;
        if (!checkpoint_write(client.buffer, pages->data,
                              (size_t)pages->len * sizeof(CheckpointPages),
                              &offset, errp)) {
            qapi_free_CheckpointHints(hints);
            return NULL;
        }
    }
    return hints;
}

CheckpointResumed *qmp_x_checkpoint_cont(Error **errp)
{
    CheckpointResumed *resumed;
    Error *err = NULL;

    if (!need_client(errp)) {
        return NULL;
    }
    /*
     * A reset writes to memory and leaves another state behind.  Reports of
     * pages that were written or harvested come too late for this checkpoint.
     */
    if (checkpoint_hold.owed && !runstate_check(RUN_STATE_PAUSED)) {
        checkpoint_spoil(CHECKPOINT_SPOILT_RESET);
    }
    if (checkpoint_memory_changed()) {
        checkpoint_spoil(CHECKPOINT_SPOILT_WRITTEN);
    }
    resumed = g_new0(CheckpointResumed, 1);
    resumed->consistent = !checkpoint_hold.spoilt;
    resumed->has_spoilt_by = checkpoint_hold.spoilt;
    resumed->spoilt_by = checkpoint_hold.spoilt_by;
    if (!checkpoint_resume_guest(&err)) {
        compat_set_optional(resumed, waits_for,
                            g_strdup(error_get_pretty(err)));
        error_free(err);
    }
    resumed->resumed = runstate_is_running();
    return resumed;
}

/* What is copied is in the buffer, and the client told where */
static bool save_and_tell(Error **errp)
{
    g_autoptr(CheckpointPagesInfo) info = write_buffer(true, true, errp);
    CheckpointTold told = { .what = CHECKPOINT_TOLD_SAVED };

    if (!info) {
        return false;
    }
    told.generation = info->generation;
    told.state_size = info->state_size;
    told.offset = info->offset;
    told.runs = info->runs;
    told.collect_us = info->collect_us;
    told.packets = info->packets;
    told.discarded = info->discarded;
    if (!checkpoint_tell(client.socket, &told)) {
        error_setg(errp, "the client does not read its socket");
        return false;
    }
    return true;
}

/*
 * Whether a guest that runs can be stopped, and go on, in one visit.  Not if
 * there are other loops than the main loop, which could go on with what guests
 * kick.
 */
static bool can_be_brief(uint32_t limit_ms)
{
    return limit_ms && runstate_is_running() && !checkpoint_hold.lost &&
           !checkpoint_lease_is_over() && !qemu_runstate_change_requested() &&
           !checkpoint_has_busy_iothread() &&
           !is_blocked(NULL);
}

CheckpointTaken *qmp_x_checkpoint_take(uint32_t limit_ms, bool has_lease_us,
                                       uint64_t lease_us, bool has_first,
                                       bool first, Error **errp)
{
    CheckpointTold told = { .what = CHECKPOINT_TOLD_STOPPED };
    CheckpointAnswer answer = CHECKPOINT_ANSWER_NONE;
    g_autoptr(CheckpointPageStates) states = NULL;
    CheckpointTaken *taken;
    Error *err = NULL;

    if (!need_client(errp) || !renew(has_lease_us, lease_us, first, errp)) {
        return NULL;
    }
    taken = g_new0(CheckpointTaken, 1);
    if (!can_be_brief(limit_ms)) {
        return taken;
    }
    taken->taken = true;
    checkpoint_hold.spoilt = false;
    checkpoint_hold.leased = false;
    checkpoint_hold.owed = false;
    checkpoint_forget_bytes(client.socket);

    checkpoint_hold.stopped_ns = checkpoint_hold.since_ns = get_clock();
    checkpoint_brief_stop();
    told.discarded = checkpoint_has_discarded();
    states = checkpoint_page_states();
    if (states) {
        told.states_block = states->block;
        told.states_page = states->page;
        told.states_nr = states->count;
    }
    if (!checkpoint_tell(client.socket, &told)) {
        error_setg(&err, "the client does not read its socket");
    } else if (qemu_runstate_change_requested()) {
        /* As in x-checkpoint-collect */
        checkpoint_spoil(CHECKPOINT_SPOILT_RUN_STATE);
    } else if (save_and_tell(&err)) {
        answer = checkpoint_await(client.socket, checkpoint_hold.stopped_ns +
                                  (int64_t)limit_ms * SCALE_MS);
        if (answer == CHECKPOINT_ANSWER_NONE) {
            checkpoint_spoil(CHECKPOINT_SPOILT_LATE);
        }
    }
    taken->consistent = !checkpoint_hold.spoilt &&
                        answer == CHECKPOINT_ANSWER_DONE;
    taken->has_spoilt_by = checkpoint_hold.spoilt;
    taken->spoilt_by = checkpoint_hold.spoilt_by;

    checkpoint_hold.hidden = true;
    checkpoint_hide_pause();
    checkpoint_brief_end();
    checkpoint_hold.hidden = false;
    if (checkpoint_lease_is_over()) {
        checkpoint_lease_ended();
    } else if (!qemu_runstate_change_requested()) {
        /*
         * Or vCPUs go on beyond a breakpoint: the main loop comes to that next
         */
        resume_all_vcpus();
    }
    taken->resumed = runstate_is_running();

    if (checkpoint_hold.spoilt &&
        checkpoint_hold.spoilt_by == CHECKPOINT_SPOILT_LATE) {
        warn_report("checkpoint: the guest has stood still for long enough, "
                    "it goes on without a checkpoint");
        qapi_event_send_checkpoint_late();
    }
    if (answer == CHECKPOINT_ANSWER_GONE) {
        client_gone();
    }
    if (err) {
        qapi_free_CheckpointTaken(taken);
        error_propagate(errp, err);
        return NULL;
    }
    return taken;
}

void checkpoint_memory_lost(const char *why)
{
    if (client.socket) {
        checkpoint_hold.lost = why;
        checkpoint_spoil(CHECKPOINT_SPOILT_WRITTEN);
    }
}
