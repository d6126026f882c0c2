/*
 * What is elsewhere, or has another form, in other versions of QEMU
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * The files that dirty slot rings and checkpoints add are the same for all
 * versions, and use this.  Of 7.2.
 */

#ifndef QEMU_SLOT_RING_COMPAT_H
#define QEMU_SLOT_RING_COMPAT_H

#include "exec/memory.h"
#include "exec/ramblock.h"
#include "migration/blocker.h"
#include "qemu/main-loop.h"
#include "qapi/error.h"
#include "sysemu/cpu-timers.h"
#include "sysemu/cpus.h"
#include "sysemu/kvm.h"
#include "sysemu/reset.h"
#include "sysemu/runstate.h"
#include "sysemu/tcg.h"

#define COMPAT_DIRTYLIMIT_H "sysemu/dirtylimit.h"
#define COMPAT_KVM_INT_H "sysemu/kvm_int.h"
#define COMPAT_MIGRATION_OPTIONS_H "migration.h"

/* Of records of the section "ram", see ram_load_precopy() */
#define RAM_SAVE_FLAG_ZERO      0x02
#define RAM_SAVE_FLAG_MEM_SIZE  0x04
#define RAM_SAVE_FLAG_PAGE      0x08
#define RAM_SAVE_FLAG_EOS       0x10
#define RAM_SAVE_FLAG_CONTINUE  0x20

/* Of commands: a string that may be missing, and is NULL then */
#define COMPAT_OPTIONAL_STR(name) bool has_##name, const char *name

/* A member of an answer that is there unless the pointer is NULL */
#define compat_set_optional(obj, member, pointer) \
    ((obj)->has_##member = ((obj)->member = (pointer)))

#define compat_savevm_state_header(f) qemu_savevm_state_header(f)

static inline bool compat_dirty_log_start(unsigned int flags, Error **errp)
{
    memory_global_dirty_log_start(flags);
    return true;
}

static inline void compat_dirty_log_sync(void)
{
    memory_global_dirty_log_sync();
}

static inline void compat_bql_timedwait(QemuCond *cond, int ms)
{
    qemu_cond_timedwait_iothread(cond, ms);
}

/* The reason is freed, and set to NULL, by the second or if the first fails */
static inline bool compat_block_migration(Error **reason, Error **errp)
{
    if (migrate_add_blocker_internal(*reason, errp) < 0) {
        error_free(*reason);
        *reason = NULL;
        return false;
    }
    return true;
}

static inline void compat_unblock_migration(Error **reason)
{
    migrate_del_blocker(*reason);
    error_free(*reason);
    *reason = NULL;
}

/* Where in its file a block of RAM begins */
static inline uint64_t compat_fd_offset(const RAMBlock *rb)
{
    return 0;
}

#endif
