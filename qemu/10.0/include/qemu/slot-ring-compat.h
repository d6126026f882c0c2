/*
 * What is elsewhere, or has another form, in other versions of QEMU
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * The files that dirty slot rings and checkpoints add are the same for all
 * versions, and use this.  Of 10.0.
 */

#ifndef QEMU_SLOT_RING_COMPAT_H
#define QEMU_SLOT_RING_COMPAT_H

#include "exec/memory.h"
#include "exec/ramblock.h"
#include "migration/blocker.h"
#include "qemu/main-loop.h"
#include "qapi/error.h"
#include "system/cpu-timers.h"
#include "system/cpus.h"
#include "system/kvm.h"
#include "system/reset.h"
#include "system/runstate.h"
#include "system/tcg.h"

#define COMPAT_DIRTYLIMIT_H "system/dirtylimit.h"
#define COMPAT_KVM_INT_H "system/kvm_int.h"
#define COMPAT_MIGRATION_OPTIONS_H "options.h"

/* Of commands: a string that may be missing, and is NULL then */
#define COMPAT_OPTIONAL_STR(name) const char *name

/* A member of an answer that is there unless the pointer is NULL */
#define compat_set_optional(obj, member, pointer) \
    ((obj)->member = (pointer))

/* Not into the description that a snapshot has left behind */
#define compat_savevm_state_header(f)                   \
    do {                                                \
        MigrationState *ms_ = migrate_get_current();    \
        JSONWriter *vmdesc_ = ms_->vmdesc;              \
                                                        \
        ms_->vmdesc = NULL;                             \
        qemu_savevm_state_header(f);                    \
        ms_->vmdesc = vmdesc_;                          \
    } while (0)

static inline bool compat_dirty_log_start(unsigned int flags, Error **errp)
{
    return memory_global_dirty_log_start(flags, errp);
}

/*
 * Some logs, as of interrupt controllers' tables, are read at the last one only
 */
static inline void compat_dirty_log_sync(void)
{
    memory_global_dirty_log_sync(!runstate_is_running());
}

static inline void compat_bql_timedwait(QemuCond *cond, int ms)
{
    qemu_cond_timedwait_bql(cond, ms);
}

/* The reason is freed, and set to NULL, by the second or if the first fails */
static inline bool compat_block_migration(Error **reason, Error **errp)
{
    return migrate_add_blocker_internal(reason, errp) == 0;
}

static inline void compat_unblock_migration(Error **reason)
{
    migrate_del_blocker(reason);
}

/* Where in its file a block of RAM begins */
static inline uint64_t compat_fd_offset(const RAMBlock *rb)
{
    return rb->fd_offset;
}

#endif
