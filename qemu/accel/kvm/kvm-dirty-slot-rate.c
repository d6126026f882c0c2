/*
 * KVM dirty slot rings: how fast each vCPU writes, and not too fast
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * Of each vCPU KVM counts the pages that it was the first to write since they
 * were protected.  That is what calc-dirty-rate and dirty-limit want to know.
 *
 * With the dirty ring, a vCPU that has a limit sleeps when its ring is full.
 * These rings are never full.  So it sleeps after a slice of time instead: it
 * is asked to, by a timer, like those that auto-converge slows down.  It is
 * woken when there is something else for it to do, such as to stop.
 */

#include "qemu/osdep.h"
#include <linux/kvm.h>

#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "qemu/slot-ring-compat.h"
#include "qemu/timer.h"
#include "hw/core/cpu.h"
#include COMPAT_DIRTYLIMIT_H
#include COMPAT_KVM_INT_H
#include "trace.h"

static const char *const counted[] = {
    "dirty_slot_ring_pushed",
    "dirty_slot_ring_overflowed",
};

typedef struct VCPUStats {
    int fd;                     /* -1: there is none */
    off_t at[ARRAY_SIZE(counted)];
    uint64_t pages;             /* When it was read last */
} VCPUStats;

/* By their index; vCPUs come and go, and rates are measured by other threads */
static struct {
    QemuMutex lock;
    GArray *stats;              /* of VCPUStats */
} vcpus;

static QEMUTimer *limit_timer;

/* By index, with the BQL held: is about to sleep, or does */
static bool *asleep;

static void __attribute__((__constructor__)) vcpus_init(void)
{
    qemu_mutex_init(&vcpus.lock);
}

static VCPUStats *stats_of(CPUState *cpu)
{
    const VCPUStats none = { .fd = -1 };

    if (!vcpus.stats) {
        vcpus.stats = g_array_new(false, false, sizeof(VCPUStats));
    }
    while (vcpus.stats->len <= cpu->cpu_index) {
        g_array_append_val(vcpus.stats, none);
    }
    return &g_array_index(vcpus.stats, VCPUStats, cpu->cpu_index);
}

/* Where the counters are in the file of the vCPU's statistics */
static bool locate(int fd, off_t *at)
{
    struct kvm_stats_header header;
    g_autofree struct kvm_stats_desc *desc = NULL;
    unsigned int found = 0, i, k;
    size_t size;

    if (pread(fd, &header, sizeof(header), 0) != sizeof(header)) {
        return false;
    }
    size = sizeof(*desc) + header.name_size;
    desc = g_malloc0(size);
    for (i = 0; i < header.num_desc; i++) {
        if (pread(fd, desc, size, header.desc_offset + i * size) != size) {
            return false;
        }
        for (k = 0; k < ARRAY_SIZE(counted); k++) {
            if (!strncmp(desc->name, counted[k], header.name_size)) {
                at[k] = header.data_offset + desc->offset;
                found++;
            }
        }
    }
    return found == ARRAY_SIZE(counted);
}

/* By the vCPU's thread, before it runs: KVM does not answer while it does */
void kvm_dirty_slot_vcpu_init(KVMState *s, CPUState *cpu)
{
    VCPUStats *stats;
    int fd;

    if (!s->kvm_dirty_slot_ring_size) {
        return;
    }
    if (asleep) {
        asleep[cpu->cpu_index] = false;
    }
    fd = kvm_vcpu_ioctl(cpu, KVM_GET_STATS_FD, NULL);
    QEMU_LOCK_GUARD(&vcpus.lock);
    stats = stats_of(cpu);
    stats->fd = fd;
    if (fd >= 0 && !locate(fd, stats->at)) {
        close(fd);
        stats->fd = -1;
    }
    if (stats->fd < 0) {
        warn_report_once("KVM does not say how many pages a vCPU has written, "
                         "dirty rates of vCPUs will be 0");
    }
}

void kvm_dirty_slot_vcpu_destroy(KVMState *s, CPUState *cpu)
{
    VCPUStats *stats;

    if (!s->kvm_dirty_slot_ring_size) {
        return;
    }
    QEMU_LOCK_GUARD(&vcpus.lock);
    stats = stats_of(cpu);
    if (stats->fd >= 0) {
        close(stats->fd);
        stats->fd = -1;
    }
}

uint64_t kvm_dirty_slot_vcpu_pages(CPUState *cpu)
{
    uint64_t pages = 0, n;
    VCPUStats *stats;
    unsigned int k;

    QEMU_LOCK_GUARD(&vcpus.lock);
    stats = stats_of(cpu);
    /* A count of before, so that it never goes back */
    if (stats->fd < 0) {
        return stats->pages;
    }
    for (k = 0; k < ARRAY_SIZE(counted); k++) {
        if (pread(stats->fd, &n, sizeof(n), stats->at[k]) != sizeof(n)) {
            return stats->pages;
        }
        pages += n;
    }
    stats->pages = pages;
    return pages;
}

/*
 * The limit
 */

static void sleep_a_while(CPUState *cpu, run_on_cpu_data us)
{
    int64_t until = get_clock() + us.host_ulong * SCALE_US, left;

    while ((left = until - get_clock()) > 0 && !cpu->stop && !cpu->stopped &&
           !cpu->unplug && QSIMPLEQ_EMPTY_ATOMIC(&cpu->work_list)) {
        compat_bql_timedwait(cpu->halt_cond, MAX(left / SCALE_MS, 1));
    }
    asleep[cpu->cpu_index] = false;
}

static void limit_tick(void *opaque)
{
    CPUState *cpu;

    CPU_FOREACH(cpu) {
        uint64_t us = dirtylimit_vcpu_sleep_us(cpu);

        if (us && !asleep[cpu->cpu_index] && runstate_is_running()) {
            trace_kvm_dirty_slot_limit_sleep(cpu->cpu_index, us);
            asleep[cpu->cpu_index] = true;
            async_run_on_cpu(cpu, sleep_a_while, RUN_ON_CPU_HOST_ULONG(us));
        }
    }
    timer_mod(limit_timer,
              get_clock() + KVM_DIRTY_SLOT_LIMIT_SLICE_US * SCALE_US);
}

void kvm_dirty_slot_limit(bool on, unsigned int max_cpus)
{
    if (!kvm_dirty_slot_ring_enabled()) {
        return;
    }
    if (!limit_timer) {
        asleep = g_new0(bool, max_cpus);
        limit_timer = timer_new_ns(QEMU_CLOCK_REALTIME, limit_tick, NULL);
    }
    if (on) {
        timer_mod(limit_timer, get_clock());
    } else {
        timer_del(limit_timer);
    }
}
