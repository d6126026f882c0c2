/*
 * Checkpoints of a running guest: a stop that is as short as can be
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * vCPUs and devices stop as ever, and the block layer is drained; but all
 * within one visit of the main loop, which the client ends by a byte on its
 * socket.  No handler runs meanwhile, so that what only keeps handlers from
 * running can be left out: ioeventfds stay where they are, and kicks wait in
 * them.  Nothing is flushed: that is no matter of the guest, but of where its
 * disks' epochs live.  Registers that were only read need not be written back.
 * No events are sent.
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/cutils.h"
#include "qemu/slot-ring-compat.h"
#include "qapi/error.h"
#include "block/block.h"
#include "hw/core/cpu.h"
#include "io/channel-socket.h"
#include "qom/object.h"
#include "migration/misc.h"
#include "checkpoint.h"

static bool brief;

/* CPUs, by their order, whose registers were the kernel's */
static unsigned long *not_ours;

typedef struct IOThreadUsers {
    Object *of;
    unsigned int balloons, others;
} IOThreadUsers;

static int count_user(Object *obj, void *opaque)
{
    IOThreadUsers *users = opaque;

    if (object_property_find(obj, "iothread") &&
        object_property_get_link(obj, "iothread", NULL) == users->of) {
        /* One that is plugged has a device in it, and both have the property */
        if (object_dynamic_cast(obj, "virtio-balloon-device") ||
            object_dynamic_cast(obj, "virtio-balloon-pci-base")) {
            users->balloons++;
        } else {
            users->others++;
        }
    }
    return 0;
}

/*
 * Does what goes on there go on while the main loop stands still?  A balloon
 * takes hints there, which it asks for by the main loop, and not while epochs
 * are taken.
 */
static int is_busy_iothread(Object *obj, void *opaque)
{
    IOThreadUsers users = { .of = obj };

    if (!object_dynamic_cast(obj, "iothread")) {
        return 0;
    }
    object_child_foreach_recursive(object_get_root(), count_user, &users);
    return users.others || !users.balloons;
}

/* It takes a walk through all objects; not again until something changes */
bool checkpoint_has_busy_iothread(void)
{
    static uint64_t generation;
    static bool busy;

    if (generation != checkpoint_generation()) {
        generation = checkpoint_generation();
        busy = object_child_foreach(object_get_objects_root(),
                                    is_busy_iothread, NULL);
    }
    return busy;
}

bool checkpoint_is_brief(void)
{
    return brief;
}

void checkpoint_brief_stop(void)
{
    long n = 0;
    CPUState *cpu;

    runstate_set(RUN_STATE_PAUSED);
    cpu_disable_ticks();
    pause_all_vcpus();
    brief = true;
    vm_state_notify(false, RUN_STATE_PAUSED);
    bdrv_drain_all_begin();

    CPU_FOREACH(cpu) {
        n++;
    }
    not_ours = bitmap_new(n);
    n = 0;
    CPU_FOREACH(cpu) {
        if (!cpu->vcpu_dirty) {
            set_bit(n, not_ours);
        }
        n++;
    }
}

void checkpoint_brief_end(void)
{
    long n = 0;
    CPUState *cpu;

    /* A state that is saved reads them, and changes none */
    CPU_FOREACH(cpu) {
        if (test_bit(n++, not_ours)) {
            cpu->vcpu_dirty = false;
        }
    }
    g_free(not_ours);

    cpu_enable_ticks();
    bdrv_drain_all_end();
    runstate_set(RUN_STATE_RUNNING);
    vm_state_notify(true, RUN_STATE_RUNNING);
    brief = false;
}

bool checkpoint_tell(QIOChannelSocket *to, const CheckpointTold *told)
{
    return qio_channel_write(QIO_CHANNEL(to), (const char *)told,
                             sizeof(*told), NULL) == sizeof(*told);
}

bool checkpoint_tell_ended(QIOChannelSocket *to, const CheckpointTaken *taken,
                           Error *err)
{
    CheckpointEnded ended = { .what = CHECKPOINT_TOLD_ENDED };
    const char *why = "";

    if (err) {
        ended.flags = CHECKPOINT_ENDED_FAILED;
        why = error_get_pretty(err);
    } else {
        ended.flags = (taken->taken ? CHECKPOINT_ENDED_TAKEN : 0) |
                      (taken->consistent ? CHECKPOINT_ENDED_CONSISTENT : 0) |
                      (taken->resumed ? CHECKPOINT_ENDED_RESUMED : 0);
        if (taken->has_spoilt_by) {
            why = CheckpointSpoilt_str(taken->spoilt_by);
        }
    }
    pstrcpy(ended.why, sizeof(ended.why), why);
    return qio_channel_write(QIO_CHANNEL(to), (const char *)&ended,
                             sizeof(ended), NULL) == sizeof(ended);
}

/* What has come of a request */
static CheckpointAsked heard;
static size_t nr_heard;

void checkpoint_hear_anew(void)
{
    nr_heard = 0;
}

bool checkpoint_hear(QIOChannelSocket *from, CheckpointAsked *asked,
                     bool *gone)
{
    const uint64_t what = CHECKPOINT_ASKED_TAKE;
    char *to = (char *)&heard;
    ssize_t n;

    n = qio_channel_read(QIO_CHANNEL(from), to + nr_heard,
                         sizeof(heard) - nr_heard, NULL);
    *gone = !n;
    if (n <= 0) {
        return false;
    }
    nr_heard += n;
    /* A byte of one that it took for late, say */
    while (nr_heard && memcmp(to, &what, MIN(nr_heard, sizeof(what)))) {
        nr_heard--;
        memmove(to, to + 1, nr_heard);
    }
    if (nr_heard < sizeof(heard)) {
        return false;
    }
    nr_heard = 0;
    *asked = heard;
    return true;
}

/* What it said too late is no answer to what it is asked next */
void checkpoint_forget_bytes(QIOChannelSocket *from)
{
    char buf[64];

    while (qio_channel_read(QIO_CHANNEL(from), buf, sizeof(buf), NULL) > 0) {
        ;
    }
}

CheckpointAnswer checkpoint_await(QIOChannelSocket *from, int64_t until_ns)
{
    for (;;) {
        GPollFD fd = { .fd = from->fd, .events = G_IO_IN | G_IO_HUP };
        int64_t left = until_ns - get_clock();
        char byte;

        if (left <= 0) {
            return CHECKPOINT_ANSWER_NONE;
        }
        qemu_poll_ns(&fd, 1, left);
        switch (qio_channel_read(QIO_CHANNEL(from), &byte, 1, NULL)) {
        case 1:
            return CHECKPOINT_ANSWER_DONE;
        case QIO_CHANNEL_ERR_BLOCK:
            continue;
        default:
            return CHECKPOINT_ANSWER_GONE;
        }
    }
}
