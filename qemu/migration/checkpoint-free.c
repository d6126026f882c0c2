/*
 * Checkpoints of a running guest: memory that it does not use
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * What is given back to the host (a balloon, reports of free pages, virtio-mem)
 * is noted as dirty by who does it, and the client told that there is some: it
 * finds holes where it was.
 *
 * Hints (virtio-balloon's free-page-hint) are of the first copy alone.  A page
 * that is hinted at was free at a moment after logging began, so that whatever
 * it is used for later is in a log.  They are never taken from what is dirty:
 * the guest may have the page back before its hint is read.
 */

#include "qemu/osdep.h"
#include "qemu/lockable.h"
#include "qemu/rcu.h"
#include "qapi/error.h"
#include "cpu.h"
#include "exec/cpu-common.h"
#include "exec/target_page.h"
#include "migration/misc.h"
#include "ram.h"
#include "checkpoint.h"

/* A guest that names pages again and again is not listened to any more */
#define MAX_HINTS   (1 << 20)

static bool discarded;

static struct {
    QemuMutex lock;
    bool wanted;
    GArray *pages;              /* of CheckpointPages */
} hints;

void checkpoint_memory_discarded(void)
{
    discarded = true;
}

bool checkpoint_has_discarded(void)
{
    return discarded;
}

bool checkpoint_take_discarded(void)
{
    bool ret = discarded;

    discarded = false;
    return ret;
}

/*
 * Hints
 */

/* By a thread of the balloon's */
bool checkpoint_free_page_hint(void *addr, size_t len)
{
    ram_addr_t offset;
    CheckpointPages run;
    RAMBlock *rb;

    if (!qatomic_read(&hints.wanted)) {
        return false;
    }
    RCU_READ_LOCK_GUARD();
    rb = qemu_ram_block_from_host(addr, false, &offset);
    if (!rb || offset >= rb->used_length) {
        return true;
    }
    run.block = checkpoint_block_number(rb);
    if (run.block == CHECKPOINT_NO_BLOCK) {
        return true;
    }
    /* Whole pages, all of them in it */
    len = MIN(len, rb->used_length - offset);
    run.page = DIV_ROUND_UP(offset, TARGET_PAGE_SIZE);
    run.npages = ((offset + len) >> TARGET_PAGE_BITS) - run.page;
    if (offset + len < (run.page + 1) << TARGET_PAGE_BITS) {
        return true;
    }

    QEMU_LOCK_GUARD(&hints.lock);
    if (hints.pages && hints.pages->len < MAX_HINTS) {
        g_array_append_val(hints.pages, run);
    }
    return true;
}

GArray *checkpoint_take_hints(void)
{
    GArray *pages;

    QEMU_LOCK_GUARD(&hints.lock);
    pages = hints.pages ?: g_array_new(false, false, sizeof(CheckpointPages));
    hints.pages = g_array_new(false, false, sizeof(CheckpointPages));
    return pages;
}

static void forget_hints(void)
{
    QEMU_LOCK_GUARD(&hints.lock);
    if (hints.pages) {
        g_array_free(hints.pages, true);
        hints.pages = NULL;
    }
}

bool checkpoint_ask_hints(CheckpointHintsAction action, Error **errp)
{
    static bool is_init;

    if (!is_init) {
        qemu_mutex_init(&hints.lock);
        is_init = true;
    }
    switch (action) {
    case CHECKPOINT_HINTS_ACTION_START:
        g_array_free(checkpoint_take_hints(), true);
        qatomic_set(&hints.wanted, true);
        if (precopy_notify(PRECOPY_NOTIFY_AFTER_BITMAP_SYNC, errp)) {
            qatomic_set(&hints.wanted, false);
            return false;
        }
        return true;
    case CHECKPOINT_HINTS_ACTION_STOP:
        /* When this returns nobody is in the midst of one */
        return !precopy_notify(PRECOPY_NOTIFY_BEFORE_BITMAP_SYNC, errp);
    case CHECKPOINT_HINTS_ACTION_DONE:
        if (!hints.wanted) {
            return true;
        }
        qatomic_set(&hints.wanted, false);
        forget_hints();
        /* The guest may use all of them again */
        return !precopy_notify(PRECOPY_NOTIFY_CLEANUP, errp);
    default:
        return true;
    }
}
