/*
 * Checkpoints of a running guest: the state of its devices
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * It is a migration stream that any "-incoming" takes, with the memory mapped
 * from files.  RAM that the client cannot map, such as firmware, is in it.
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/rcu.h"
#include "qemu/slot-ring-compat.h"
#include "qapi/error.h"
#include "cpu.h"
#include "exec/ram_addr.h"
#include "exec/target_page.h"
#include "hw/boards.h"
#include "migration/global_state.h"
#include "migration/migration.h"
#include "migration/qemu-file.h"
#include "migration/savevm.h"
#include "ram.h"
#include "checkpoint.h"

/* Of the section in the stream; those of real sections count up from 0 */
#define RAM_SECTION_ID  0x7fffffff

/*
 * The first part, with memory that the client cannot map, stays in its buffer
 * for as long as it is the same: the size of that, or 0.
 */
static uint64_t head_size;
static uint64_t head_generation;

uint64_t checkpoint_head_size(void)
{
    return head_size;
}

void checkpoint_head_changed(void)
{
    head_size = 0;
}

/* ROMs are loaded again, which no dirty bit tells of */
static void on_reset(void *opaque)
{
    checkpoint_head_changed();
}

void checkpoint_follow_head(void)
{
    static bool follows;

    if (!follows) {
        qemu_register_reset(on_reset, NULL);
        follows = true;
    }
    checkpoint_head_changed();
}

/* Nobody but QEMU writes to it, and says so */
static bool is_rom(RAMBlock *rb)
{
    return rb->mr && memory_region_is_rom(rb->mr);
}

static bool head_can_stay(void)
{
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        if (!checkpoint_block_is_mapped(rb) && !is_rom(rb)) {
            return false;
        }
    }
    return true;
}

static bool head_is_the_same(void)
{
    RAMBlock *rb;

    if (!head_size || head_generation != checkpoint_generation()) {
        return false;
    }
    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        if (!checkpoint_block_is_mapped(rb) &&
            cpu_physical_memory_get_dirty(rb->offset, rb->used_length,
                                          DIRTY_MEMORY_MIGRATION)) {
            return false;
        }
    }
    return true;
}

/* The RAM that the client cannot map, as a section of its own */
static void save_unmapped_ram(QEMUFile *f)
{
    uint64_t total = 0, offset;
    RAMBlock *rb;

    qemu_put_byte(f, QEMU_VM_SECTION_FULL);
    qemu_put_be32(f, RAM_SECTION_ID);
    qemu_put_counted_string(f, "ram");
    qemu_put_be32(f, 0);    /* instance */
    qemu_put_be32(f, 4);    /* version, as in ram_mig_init() */

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        total += checkpoint_block_is_mapped(rb) ? 0 : rb->used_length;
    }
    qemu_put_be64(f, total | RAM_SAVE_FLAG_MEM_SIZE);
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        if (!checkpoint_block_is_mapped(rb)) {
            qemu_put_counted_string(f, rb->idstr);
            qemu_put_be64(f, rb->used_length);
        }
    }
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        if (checkpoint_block_is_mapped(rb)) {
            continue;
        }
        for (offset = 0; offset < rb->used_length; offset += TARGET_PAGE_SIZE) {
            bool zero = buffer_is_zero(rb->host + offset, TARGET_PAGE_SIZE);
            int cont = offset ? RAM_SAVE_FLAG_CONTINUE : 0;

            qemu_put_be64(f, offset | cont |
                          (zero ? RAM_SAVE_FLAG_ZERO : RAM_SAVE_FLAG_PAGE));
            if (!cont) {
                qemu_put_counted_string(f, rb->idstr);
            }
            if (zero) {
                qemu_put_byte(f, 0);
            } else {
                qemu_put_buffer(f, rb->host + offset, TARGET_PAGE_SIZE);
            }
        }
    }
    qemu_put_be64(f, RAM_SAVE_FLAG_EOS);

    if (migrate_get_current()->send_section_footer) {
        qemu_put_byte(f, QEMU_VM_SECTION_FOOTER);
        qemu_put_be32(f, RAM_SECTION_ID);
    }
}

bool checkpoint_write(int fd, const void *data, size_t size, uint64_t *offset,
                      Error **errp)
{
    while (size) {
        ssize_t n = pwrite(fd, data, size, *offset);

        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            error_setg_errno(errp, n ? errno : ENOSPC,
                             "cannot write to the client's buffer");
            return false;
        }
        data += n;
        size -= n;
        *offset += n;
    }
    return true;
}

static bool write_head(int fd, Error **errp)
{
    CheckpointPlace place = { .fd = fd };
    QEMUFile *f;
    int ret;

    if (head_is_the_same()) {
        return true;
    }
    head_size = 0;
    f = checkpoint_file(&place);
    compat_savevm_state_header(f);
    save_unmapped_ram(f);
    ret = qemu_fclose(f);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "cannot save memory");
        return false;
    }
    head_size = place.offset;
    head_generation = checkpoint_generation();
    return true;
}

bool checkpoint_save_state(int fd, uint64_t *offset, bool running,
                           Error **errp)
{
    bool vmdesc = !MACHINE(qdev_get_machine())->suppress_vmdesc;
    /* Its header, two words, is in the first part already */
    CheckpointPlace place = { .fd = fd, .skip = 8 };
    QEMUFile *df;
    int ret, failed;

    if (!write_head(fd, errp)) {
        return false;
    }
    place.offset = head_size;
    if (!head_can_stay()) {
        head_size = 0;
    }
    df = checkpoint_file(&place);

    /* How the guest is to go on where the state is loaded */
    if (running) {
        global_state_store_running();
    } else {
        global_state_store();
    }

    ret = qemu_save_device_state(df);
    if (!ret && vmdesc) {
        /* A description is expected, but it takes long: an empty one */
        qemu_put_byte(df, QEMU_VM_VMDESCRIPTION);
        qemu_put_be32(df, 0);
    }
    failed = qemu_fclose(df);
    if (!ret && failed < 0) {
        ret = failed;
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "cannot save the state of the devices");
        return false;
    }
    *offset = place.offset;
    return true;
}
