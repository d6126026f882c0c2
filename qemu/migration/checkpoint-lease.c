/*
 * Checkpoints of a running guest: for how long it may run
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * Whoever holds the checkpoints goes on with the guest if the client says
 * nothing for some time.  So that there are never two of it, the client gives
 * it a lease that ends before, and renews it.  When it is over the guest stands
 * still, whatever the client does, and goes on when the lease is renewed.
 *
 * This must not depend on the main loop, which may be at work for somebody: a
 * thread makes vCPUs leave KVM, and they look at the clock before they enter
 * it.  So they do not run either when all of QEMU was stopped until after the
 * end.  The run state follows when the main loop has time.
 *
 * The clock is CLOCK_BOOTTIME: it goes on while the host is suspended.
 */

#include "qemu/osdep.h"
#include <sys/timerfd.h>
#include "qemu/atomic.h"
#include "qemu/main-loop.h"
#include "qemu/rcu.h"
#include "qemu/thread.h"
#include "qapi/error.h"
#include "cpu.h"
#include "hw/core/cpu.h"
#include "migration/misc.h"
#include "checkpoint.h"

static struct {
    int64_t until_ns;           /* 0: for ever */
    int timer;                  /* -1 until there was a lease */
    QEMUBH *bh;                 /* When it begins or ends */
    QemuThread thread;
} lease = { .timer = -1 };

static int64_t boottime_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_BOOTTIME, &ts);
    return ts.tv_sec * INT64_C(1000000000) + ts.tv_nsec;
}

/* For any thread */
bool checkpoint_lease_is_over(void)
{
    int64_t until = qatomic_read__nocheck(&lease.until_ns);

    return until && boottime_ns() >= until;
}

bool checkpoint_has_lease(void)
{
    return qatomic_read__nocheck(&lease.until_ns);
}

static void *lease_thread(void *opaque)
{
    uint64_t times;
    CPUState *cpu;

    rcu_register_thread();
    for (;;) {
        if (read(lease.timer, &times, sizeof(times)) != sizeof(times) ||
            !checkpoint_lease_is_over()) {
            continue;
        }
        WITH_RCU_READ_LOCK_GUARD() {
            CPU_FOREACH(cpu) {
                qemu_cpu_kick(cpu);
            }
        }
        qemu_bh_schedule(lease.bh);
    }
    return NULL;
}

bool checkpoint_lease_until(uint64_t until_us, Error **errp)
{
    struct itimerspec at = {
        .it_value.tv_sec = until_us / 1000000,
        .it_value.tv_nsec = until_us % 1000000 * 1000,
    };
    bool was_over;

    if (lease.timer < 0 && !until_us) {
        return true;
    }
    if (lease.timer < 0) {
        lease.timer = timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC);
        if (lease.timer < 0) {
            error_setg_errno(errp, errno, "no timer for the lease");
            return false;
        }
        lease.bh = qemu_bh_new(checkpoint_lease_changed, NULL);
        qemu_thread_create(&lease.thread, "checkpoint-lease", lease_thread,
                           NULL, QEMU_THREAD_DETACHED);
    }
    was_over = checkpoint_lease_is_over();
    qatomic_set__nocheck(&lease.until_ns, (int64_t)until_us * 1000);
    timerfd_settime(lease.timer, TFD_TIMER_ABSTIME, &at, NULL);
    if (was_over || checkpoint_lease_is_over()) {
        qemu_bh_schedule(lease.bh);
    }
    return true;
}
