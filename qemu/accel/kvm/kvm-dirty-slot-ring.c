/*
 * KVM dirty slot rings: dirty page logging slot by slot
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * KVM keeps a log of its own for each memslot that logs dirty pages and hands
 * it out as a file.  A slot's file is opened when it starts logging and closed
 * when it stops.  A harvest names the dirty pages and write-protects them again
 * before it returns.  From that follows:
 *
 * - Bits go into the dirty memory bitmaps after the pages they stand for were
 *   protected.  Whoever sees a bit, clears it and then reads the page, gets
 *   either what the guest has written or another bit later.
 *
 * - There is nothing left to do for log_clear, so manual dirty log protection
 *   stays off.  KVM_DIRTY_LOG_INITIALLY_SET in particular would make the first
 *   harvest list and protect the whole slot.
 *
 * - The work of a sync is proportional to what is dirty.
 *
 * The bitmap ioctls keep working on such a slot and each page goes to whoever
 * asks first; they are what remains if a log cannot be opened or harvested.
 *
 * There is also a file of all logs of the VM, which is for another process: it
 * needs no new file for a slot that comes, and is told in exchange which logs
 * there are and, as what they had may be found later, were.
 *
 * All of this runs with kvm_slots_lock() held.
 */

#include "qemu/osdep.h"
#include <sys/ioctl.h>

#include <linux/kvm.h>
#include <linux/kvm_dirty_slot_ring.h>

#include "qemu/error-report.h"
#include "qemu/slot-ring-compat.h"
#include "qemu/timer.h"
#include "exec/ram_addr.h"
#include COMPAT_KVM_INT_H
#include "trace.h"

/* Where harvests go, protected by kvm_slots_lock() */
static struct kvm_dirty_run dirty_runs[16384];

/* Protected by the BQL */
static unsigned int log_version;
static bool logs_held;
static GArray *gone_logs;       /* of KVMDirtySlotLog; NULL if nobody follows */

int kvm_dirty_slot_ring_init(KVMState *s)
{
    int ret;

    if (s->kvm_dirty_ring_size) {
        error_report("dirty-ring-size and dirty-slot-ring-size are mutually "
                     "exclusive, please set only one of them");
        return -EINVAL;
    }

    ret = kvm_vm_check_extension(s, KVM_CAP_DIRTY_SLOT_RING);
    if (ret <= 0) {
        warn_report("KVM dirty slot rings not available, using bitmap method");
        s->kvm_dirty_slot_ring_size = 0;
        return 0;
    }

    if (s->kvm_dirty_slot_ring_size > ret) {
        error_report("KVM dirty slot ring size %" PRIu32 " too big "
                     "(maximum is %d).  Please use a smaller value.",
                     s->kvm_dirty_slot_ring_size, ret);
        return -EINVAL;
    }

    ret = kvm_vm_enable_cap(s, KVM_CAP_DIRTY_SLOT_RING, 0,
                            s->kvm_dirty_slot_ring_size);
    if (ret) {
        error_report("Enabling of KVM dirty slot rings failed: %s",
                     strerror(-ret));
    }
    return ret;
}

static void kvm_dirty_slot_set_dirty(KVMSlot *slot, uint32_t nr_runs)
{
    uint8_t clients = tcg_enabled() ? DIRTY_CLIENTS_ALL : DIRTY_CLIENTS_NOCODE;
    uint64_t psize = qemu_real_host_page_size();
    uint32_t i;

    if (!global_dirty_tracking) {
        clients &= ~(1 << DIRTY_MEMORY_MIGRATION);
    }

    for (i = 0; i < nr_runs; i++) {
        cpu_physical_memory_set_dirty_range(slot->ram_start_offset +
                                            dirty_runs[i].offset * psize,
                                            dirty_runs[i].npages * psize,
                                            clients);
    }
}

/**
 * kvm_dirty_slot_log_harvest - Move a slot's dirty log to QEMU's dirty bitmaps
 *
 * Returns false if there is no log, or it cannot be harvested; then the slot's
 * bitmap has the pages.  A log that is left to another reader needs no care.
 */
bool kvm_dirty_slot_log_harvest(KVMSlot *slot)
{
    uint64_t slot_pages = slot->memory_size / qemu_real_host_page_size();
    uint64_t pages = 0, runs = 0;
    int64_t stamp = get_clock();
    struct kvm_dirty_slot_runs h;
    int ret;

    if (slot->dirty_log_fd < 0) {
        return false;
    }
    if (logs_held) {
        return true;
    }

    do {
        h = (struct kvm_dirty_slot_runs) {
            .runs = (uintptr_t)dirty_runs,
            .nr_runs = ARRAY_SIZE(dirty_runs),
            /*
             * Only the last sync of a migration needs this, and by then the
             * vCPUs are stopped and have handed over what hardware held.  But
             * it costs no more than KVM_GET_DIRTY_LOG, which always does it,
             * and other users ask for the dirty pages of a running guest.
             */
            .flags = KVM_DIRTY_HARVEST_SYNC,
        };

        ret = ioctl(slot->dirty_log_fd, KVM_DIRTY_SLOT_LOG_HARVEST, &h);
        if (ret < 0) {
            ret = -errno;
            if (ret == -EINTR) {
                continue;
            }
            break;
        }

        kvm_dirty_slot_set_dirty(slot, h.nr_runs);
        pages += h.nr_pages;
        runs += h.nr_runs;

        if (global_dirty_tracking & GLOBAL_DIRTY_DIRTY_RATE) {
            total_dirty_pages += h.nr_pages;
        }

        /*
         * A running guest can dirty pages as fast as we take them: having
         * seen as many as the slot has, leave the rest to the next sync.  For
         * a slot that is gone there is none, but no writer either.
         */
    } while (ret == -EINTR || ((h.flags & KVM_DIRTY_HARVEST_MORE) &&
                               (!slot_pages || pages < slot_pages)));

    trace_kvm_dirty_slot_log_harvest(slot->slot | (slot->as_id << 16), pages,
                                     runs, get_clock() - stamp);

    /* The slot stopped logging and all that it had logged is harvested */
    if (ret == -ENODEV) {
        ret = 0;
    }
    if (ret < 0) {
        error_report_once("%s: KVM_DIRTY_SLOT_LOG_HARVEST failed: %s",
                          __func__, strerror(-ret));
    }
    return ret == 0;
}

/* Its file knows more than a slot that is being removed: that has no size */
static KVMDirtySlotLog kvm_dirty_slot_log_of(const KVMSlot *slot)
{
    struct kvm_dirty_slot_log_info info = { 0 };

    if (ioctl(slot->dirty_log_fd, KVM_DIRTY_SLOT_LOG_INFO, &info) < 0) {
        error_report_once("%s: KVM_DIRTY_SLOT_LOG_INFO failed: %s",
                          __func__, strerror(errno));
    }
    return (KVMDirtySlotLog) {
        .slot = slot->slot | (slot->as_id << 16),
        .log = info.log,
        .start = slot->ram_start_offset,
        .size = info.npages * qemu_real_host_page_size(),
    };
}

/**
 * kvm_dirty_slot_log_update - Follow a change of the slot in the kernel
 *
 * @logging: whether the slot logs dirty pages now
 */
void kvm_dirty_slot_log_update(KVMState *s, KVMSlot *slot, bool logging)
{
    struct kvm_dirty_slot_log_fd arg = {
        .slot = slot->slot | (slot->as_id << 16),
    };
    int fd;

    if (!logging && slot->dirty_log_fd >= 0) {
        /* Pages dirtied since the last harvest outlive the slot in its log */
        kvm_dirty_slot_log_harvest(slot);
        if (gone_logs) {
            KVMDirtySlotLog log = kvm_dirty_slot_log_of(slot);

            g_array_append_val(gone_logs, log);
        }
        close(slot->dirty_log_fd);
        slot->dirty_log_fd = -1;
        log_version++;
    }

    if (logging && slot->dirty_log_fd < 0 && s->kvm_dirty_slot_ring_size) {
        fd = kvm_vm_ioctl(s, KVM_GET_DIRTY_SLOT_LOG_FD, &arg);
        if (fd < 0) {
            warn_report_once("KVM_GET_DIRTY_SLOT_LOG_FD failed: %s, using "
                             "bitmap method", strerror(-fd));
            return;
        }
        slot->dirty_log_fd = fd;
        log_version++;
    }
}

bool kvm_dirty_slot_ring_enabled(void)
{
    return kvm_enabled() && kvm_state->kvm_dirty_slot_ring_size;
}

unsigned int kvm_dirty_slot_log_version(void)
{
    return log_version;
}

/* The BQL is enough: slots change with it held, besides their own lock */
void kvm_dirty_slot_log_foreach(void (*fn)(const KVMDirtySlotLog *log,
                                           void *opaque), void *opaque)
{
    KVMState *s = kvm_state;
    unsigned int i, j;

    for (i = 0; i < s->nr_as; i++) {
        KVMMemoryListener *kml = s->as[i].ml;

        for (j = 0; kml && j < kml->nr_slots_allocated; j++) {
            KVMSlot *slot = &kml->slots[j];

            if (slot->memory_size && slot->dirty_log_fd >= 0) {
                KVMDirtySlotLog log = kvm_dirty_slot_log_of(slot);

                fn(&log, opaque);
            }
        }
    }

    for (i = 0; gone_logs && i < gone_logs->len; i++) {
        fn(&g_array_index(gone_logs, KVMDirtySlotLog, i), opaque);
    }
    if (gone_logs) {
        g_array_set_size(gone_logs, 0);
    }
}

/*
 * Whoever calls this has other means by which the pages are looked at once
 * more.  A log that cannot do it has them still, which does no harm.
 */
static void discard_from_slot(KVMSlot *slot, ram_addr_t start, uint64_t size)
{
    ram_addr_t from = MAX(start, slot->ram_start_offset);
    ram_addr_t to = MIN(start + size,
                        slot->ram_start_offset + slot->memory_size);
    uint64_t psize = qemu_real_host_page_size();
    struct kvm_dirty_run run;
    struct kvm_dirty_slot_runs arg = {
        .runs = (uintptr_t)&run,
        .nr_runs = 1,
    };

    if (slot->dirty_log_fd < 0 || from >= to) {
        return;
    }
    run.offset = (from - slot->ram_start_offset) / psize;
    run.npages = (to - from) / psize;
    if (run.npages &&
        ioctl(slot->dirty_log_fd, KVM_DIRTY_SLOT_LOG_DISCARD, &arg) < 0) {
        error_report_once("%s: KVM_DIRTY_SLOT_LOG_DISCARD failed: %s",
                          __func__, strerror(errno));
    }
}

void kvm_dirty_slot_log_discard(ram_addr_t start, uint64_t size)
{
    KVMState *s = kvm_state;
    unsigned int i, j;

    if (!kvm_dirty_slot_ring_enabled()) {
        return;
    }
    for (i = 0; i < s->nr_as; i++) {
        KVMMemoryListener *kml = s->as[i].ml;

        for (j = 0; kml && j < kml->nr_slots_allocated; j++) {
            if (kml->slots[j].memory_size) {
                discard_from_slot(&kml->slots[j], start, size);
            }
        }
    }
}

int kvm_dirty_slot_vm_log_follow(void)
{
    struct kvm_dirty_slot_log_fd arg = { .slot = KVM_DIRTY_SLOT_ALL };
    int fd;

    if (!kvm_dirty_slot_ring_enabled()) {
        return -EOPNOTSUPP;
    }
    fd = kvm_vm_ioctl(kvm_state, KVM_GET_DIRTY_SLOT_LOG_FD, &arg);
    if (fd >= 0) {
        gone_logs = g_array_new(false, false, sizeof(KVMDirtySlotLog));
    }
    return fd;
}

void kvm_dirty_slot_vm_log_unfollow(void)
{
    if (gone_logs) {
        g_array_free(gone_logs, true);
        gone_logs = NULL;
    }
}

void kvm_dirty_slot_log_hold(bool hold)
{
    logs_held = hold;
}
