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
 * by itself, through their files.  Otherwise they are synchronized here.
 *
 * Pages that QEMU writes, and those that QEMU harvested itself, for a display
 * or before a slot is removed.  They are in the dirty bitmap of migration.
 * Nobody else may clear it: migration is blocked while a client is attached.
 *
 * RAM that is not shared, such as firmware, is part of the device state, which
 * is a migration stream that any "-incoming" takes.
 *
 * The client may die at any moment.  Then its socket is closed, dirty logging
 * ends and a guest that was stopped for it goes on.
 *
 * All of this runs in the main loop, with the BQL held.
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/rcu.h"
#include "qemu/timer.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-migration.h"
#include "qapi/qapi-commands-misc.h"
#include "qapi/qapi-commands-run-state.h"
#include "cpu.h"
#include "exec/memory.h"
#include "exec/ram_addr.h"
#include "exec/target_page.h"
#include "hw/boards.h"
#include "io/channel-buffer.h"
#include "io/channel-socket.h"
#include "migration/blocker.h"
#include "migration/global_state.h"
#include "migration/misc.h"
#include "migration/migration.h"
#include "migration/qemu-file.h"
#include "migration/savevm.h"
#include "monitor/monitor.h"
#include "sysemu/kvm.h"
#include "sysemu/runstate.h"
#include "ram.h"

/* What one message takes, see qio_channel_socket_writev() */
#define FDS_PER_MESSAGE 16

/* Of the section in the stream; those of real sections count up from 0 */
#define RAM_SECTION_ID  0x7fffffff

/* Of its records, see ram_load_precopy() */
#define RAM_SAVE_FLAG_ZERO      0x02
#define RAM_SAVE_FLAG_MEM_SIZE  0x04
#define RAM_SAVE_FLAG_PAGE      0x08
#define RAM_SAVE_FLAG_EOS       0x10
#define RAM_SAVE_FLAG_CONTINUE  0x20

/* What the client finds in its buffer */
typedef struct CheckpointPages {
    uint32_t block;
    uint32_t npages;
    uint64_t page;
} CheckpointPages;

static struct {
    QIOChannelSocket *socket;   /* NULL if there is no client */
    guint watch;
    int buffer;
    Error *blocker;
    VMChangeStateEntry *runs;
    bool stopped;               /* The guest stands still, and for the client */
    bool ran;                   /* since the client stopped it, or found it so */
    /* Of the layout that the client knows */
    uint64_t generation;
    uint32_t ram_version;
    unsigned int slots_version;
} client;

/* Never the same for two layouts, even if these are for different clients */
static uint64_t last_generation;

static bool block_is_mapped(RAMBlock *rb)
{
    return qemu_ram_is_shared(rb) && rb->fd >= 0;
}

static void client_gone(void)
{
    if (!client.socket) {
        return;
    }

    g_source_remove(client.watch);
    object_unref(OBJECT(client.socket));
    client.socket = NULL;
    close(client.buffer);

    qemu_del_vm_change_state_handler(client.runs);
    if (client.stopped) {
        Error *err = NULL;

        client.stopped = false;
        if (runstate_check(RUN_STATE_PAUSED) ||
            runstate_check(RUN_STATE_PRELAUNCH)) {
            qmp_cont(&err);
        }
        if (err) {
            error_reportf_err(err, "checkpoint: the guest stays stopped: ");
        }
    }

    memory_global_dirty_log_stop(GLOBAL_DIRTY_CHECKPOINT);
    migrate_del_blocker(client.blocker);
    error_free(client.blocker);
    client.blocker = NULL;
}

static gboolean client_event(QIOChannel *ioc, GIOCondition condition,
                             gpointer opaque)
{
    char buf[64];

    /* It has nothing to say: what can be read is the end */
    if (!(condition & (G_IO_HUP | G_IO_ERR)) &&
        qio_channel_read(ioc, buf, sizeof(buf), NULL) != 0) {
        return G_SOURCE_CONTINUE;
    }
    client_gone();
    return G_SOURCE_REMOVE;
}

/* Whoever resumes the guest: it is not stopped for the client any more */
static void guest_runs(void *opaque, bool running, RunState state)
{
    if (running) {
        client.stopped = false;
        client.ran = true;
    }
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
 * Dirty pages
 */

static void report_bits(GArray *pages, uint32_t nr, uint64_t first,
                        unsigned long bits)
{
    while (bits) {
        unsigned int start = ctzl(bits);
        unsigned int n = cto64(bits >> start);
        CheckpointPages *last = pages->len ?
            &g_array_index(pages, CheckpointPages, pages->len - 1) : NULL;

        if (last && last->block == nr && last->npages < UINT32_MAX - n &&
            last->page + last->npages == first + start) {
            last->npages += n;
        } else {
            CheckpointPages run = {
                .block = nr,
                .npages = n,
                .page = first + start,
            };

            g_array_append_val(pages, run);
        }
        bits &= n == BITS_PER_LONG ? 0 : ~(((1ul << n) - 1) << start);
    }
}

static void protect_again(RAMBlock *rb, uint64_t from, uint64_t to)
{
    memory_region_clear_dirty_bitmap(rb->mr, from << TARGET_PAGE_BITS,
                                     (to - from) << TARGET_PAGE_BITS);
}

/*
 * Moves the block's bits in the dirty bitmap to @pages, and write-protects the
 * pages again where that is not done yet.  Does not take what KVM logs.
 */
static void collect_block(RAMBlock *rb, uint32_t nr, GArray *pages)
{
    uint64_t npages = rb->used_length >> TARGET_PAGE_BITS;
    uint64_t page = rb->offset >> TARGET_PAGE_BITS;
    uint64_t i, from = UINT64_MAX;      /* of words in a row that had bits */
    DirtyMemoryBlocks *dirty;

    /* find_ram_offset() sees to it */
    assert(!(page % BITS_PER_LONG));

    dirty = qatomic_rcu_read(&ram_list.dirty_memory[DIRTY_MEMORY_MIGRATION]);
    for (i = 0; i < npages; i += BITS_PER_LONG) {
        uint64_t n = page + i;
        unsigned long *word = dirty->blocks[n / DIRTY_MEMORY_BLOCK_SIZE] +
                              BIT_WORD(n % DIRTY_MEMORY_BLOCK_SIZE);
        unsigned long bits = *word ? qatomic_xchg(word, 0) : 0;

        if (bits) {
            report_bits(pages, nr, i, bits);
            from = MIN(from, i);
        } else if (from != UINT64_MAX) {
            protect_again(rb, from, i);
            from = UINT64_MAX;
        }
    }
    if (from != UINT64_MAX) {
        protect_again(rb, from, npages);
    }
}

static GArray *collect_pages(void)
{
    GArray *pages = g_array_new(false, false, sizeof(CheckpointPages));
    uint32_t nr = 0;
    RAMBlock *rb;

    /* vhost and the like are asked; KVM's slot logs are left to the client */
    kvm_dirty_slot_log_hold(true);
    memory_global_dirty_log_sync();
    kvm_dirty_slot_log_hold(false);

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        guint len = pages->len;

        collect_block(rb, nr++, pages);
        if (!block_is_mapped(rb)) {
            /* It is in the state, whole */
            g_array_set_size(pages, len);
        }
    }
    return pages;
}

/*
 * Whether a page was written, or harvested by somebody else, since
 * collect_pages().  vCPUs stand still, so KVM need not be asked.
 */
static bool memory_changed(void)
{
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        if (cpu_physical_memory_get_dirty(rb->offset, rb->used_length,
                                          DIRTY_MEMORY_MIGRATION)) {
            return true;
        }
    }
    return false;
}

/*
 * Device state
 */

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
        total += block_is_mapped(rb) ? 0 : rb->used_length;
    }
    qemu_put_be64(f, total | RAM_SAVE_FLAG_MEM_SIZE);
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        if (!block_is_mapped(rb)) {
            qemu_put_counted_string(f, rb->idstr);
            qemu_put_be64(f, rb->used_length);
        }
    }
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        if (block_is_mapped(rb)) {
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

/* A stream into memory, gone with its QEMUFile */
static QEMUFile *memory_file(size_t capacity, QIOChannelBuffer **bioc)
{
    QEMUFile *f;

    *bioc = qio_channel_buffer_new(capacity);
    f = qemu_file_new_output(QIO_CHANNEL(*bioc));
    object_unref(OBJECT(*bioc));
    return f;
}

static bool write_buffer(const void *data, size_t size, uint64_t *offset,
                         Error **errp)
{
    while (size) {
        ssize_t n = pwrite(client.buffer, data, size, *offset);

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

static bool save_state(uint64_t *offset, Error **errp)
{
    bool vmdesc = !MACHINE(qdev_get_machine())->suppress_vmdesc;
    QIOChannelBuffer *head, *tail;
    QEMUFile *hf = memory_file(1 << 20, &head);
    QEMUFile *df = memory_file(1 << 18, &tail);
    int ret;

    /* How the guest is to go on where the state is loaded */
    if (client.stopped) {
        global_state_store_running();
    } else {
        global_state_store();
    }

    qemu_savevm_state_header(hf);
    save_unmapped_ram(hf);
    qemu_fflush(hf);
    ret = qemu_file_get_error(hf);

    if (!ret) {
        ret = qemu_save_device_state(df);
    }
    if (!ret && vmdesc) {
        /* A description is expected, but it takes long: an empty one */
        qemu_put_byte(df, QEMU_VM_VMDESCRIPTION);
        qemu_put_be32(df, 0);
    }
    qemu_fflush(df);
    if (!ret) {
        ret = qemu_file_get_error(df);
    }
    if (ret < 0) {
        error_setg_errno(errp, -ret, "cannot save the state of the devices");
    } else {
        /* Its header, two words, is in the first part already */
        ret = write_buffer(head->data, head->usage, offset, errp) &&
              write_buffer(tail->data + 8, tail->usage - 8, offset, errp) ?
              0 : -1;
    }
    qemu_fclose(hf);
    qemu_fclose(df);
    return ret == 0;
}

/*
 * Layout
 */

typedef struct LayoutSlots {
    CheckpointSlotList **tail;
    GArray *fds;
} LayoutSlots;

static void add_slot(const KVMDirtySlotLog *log, void *opaque)
{
    LayoutSlots *slots = opaque;
    CheckpointSlot *slot;
    int64_t nr = 0;
    RAMBlock *rb;

    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        if (log->start >= rb->offset &&
            log->start - rb->offset < rb->used_length && block_is_mapped(rb)) {
            slot = g_new0(CheckpointSlot, 1);
            slot->slot = log->slot;
            slot->block = nr;
            slot->page = (log->start - rb->offset) >> TARGET_PAGE_BITS;
            slot->pages = log->size >> TARGET_PAGE_BITS;
            QAPI_LIST_APPEND(slots->tail, slot);
            g_array_append_val(slots->fds, log->fd);
            return;
        }
        nr++;
    }
}

static CheckpointLayout *send_layout(Error **errp)
{
    g_autoptr(GArray) fds = g_array_new(false, false, sizeof(int));
    CheckpointLayout *layout = g_new0(CheckpointLayout, 1);
    CheckpointBlockList **tail = &layout->blocks;
    LayoutSlots slots = { .tail = &layout->slots, .fds = fds };
    RAMBlock *rb;
    guint i;

    client.ram_version = ram_list.version;
    client.slots_version = kvm_dirty_slot_log_version();
    client.generation = ++last_generation;
    layout->generation = client.generation;
    layout->page_size = TARGET_PAGE_SIZE;
    layout->dirty_log = kvm_dirty_slot_ring_enabled() ?
                        CHECKPOINT_DIRTY_LOG_DIRTY_SLOT_RING :
                        kvm_dirty_ring_enabled() ?
                        CHECKPOINT_DIRTY_LOG_DIRTY_RING :
                        CHECKPOINT_DIRTY_LOG_BITMAP;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        CheckpointBlock *block = g_new0(CheckpointBlock, 1);

        block->name = g_strdup(rb->idstr);
        block->pages = rb->used_length >> TARGET_PAGE_BITS;
        block->shared = block_is_mapped(rb);
        QAPI_LIST_APPEND(tail, block);
        if (block->shared) {
            g_array_append_val(fds, rb->fd);
        }
    }
    kvm_dirty_slot_log_foreach(add_slot, &slots);

    for (i = 0; i < fds->len; i += FDS_PER_MESSAGE) {
        char byte = 0;
        struct iovec iov = { &byte, 1 };
        ssize_t n;

        n = qio_channel_writev_full(QIO_CHANNEL(client.socket), &iov, 1,
                                    &g_array_index(fds, int, i),
                                    MIN(fds->len - i, FDS_PER_MESSAGE), 0,
                                    errp);
        if (n != 1) {
            if (n == QIO_CHANNEL_ERR_BLOCK) {
                error_setg(errp, "the client does not read its socket");
            }
            qapi_free_CheckpointLayout(layout);
            return NULL;
        }
    }
    return layout;
}

/*
 * Commands
 */

CheckpointLayout *qmp_x_checkpoint_attach(const char *socket,
                                          const char *buffer, Error **errp)
{
    g_autoptr(GArray) pages = NULL;
    CheckpointLayout *layout;
    int socket_fd, buffer_fd;
    QIOChannelSocket *sioc;

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

    /* The state of a guest that cannot be migrated is of no use elsewhere. */
    if (migration_is_blocked(errp)) {
        object_unref(OBJECT(sioc));
        close(buffer_fd);
        return NULL;
    }
    error_setg(&client.blocker, "the guest is being checkpointed");
    if (migrate_add_blocker(client.blocker, errp) < 0) {
        error_free(client.blocker);
        client.blocker = NULL;
        object_unref(OBJECT(sioc));
        close(buffer_fd);
        return NULL;
    }

    memory_global_dirty_log_start(GLOBAL_DIRTY_CHECKPOINT);
    client.socket = sioc;
    client.buffer = buffer_fd;
    client.watch = qio_channel_add_watch(QIO_CHANNEL(sioc), G_IO_IN | G_IO_HUP,
                                         client_event, NULL, NULL);
    client.runs = qemu_add_vm_change_state_handler(guest_runs, NULL);

    /*
     * The client copies all pages after this, so what is dirty by now is not of
     * interest.  A bitmap starts with everything dirty and nothing protected.
     */
    pages = collect_pages();

    layout = send_layout(errp);
    if (!layout) {
        client_gone();
    }
    return layout;
}

CheckpointLayout *qmp_x_checkpoint_layout(Error **errp)
{
    return need_client(errp) ? send_layout(errp) : NULL;
}

CheckpointStopped *qmp_x_checkpoint_stop(Error **errp)
{
    g_autoptr(StatusInfo) status = NULL;
    CheckpointStopped *stopped;

    if (!need_client(errp)) {
        return NULL;
    }
    stopped = g_new0(CheckpointStopped, 1);
    if (runstate_is_running()) {
        client.stopped = true;
        vm_stop(RUN_STATE_PAUSED);
    }
    client.ran = false;
    stopped->running = client.stopped;
    status = qmp_query_status(&error_abort);
    stopped->status = status->status;
    return stopped;
}

CheckpointPagesInfo *qmp_x_checkpoint_collect(bool state, Error **errp)
{
    g_autoptr(GArray) pages = NULL;
    CheckpointPagesInfo *info;
    uint64_t offset = 0;
    int64_t stamp;

    if (!need_client(errp)) {
        return NULL;
    }
    if (client.ram_version != ram_list.version ||
        client.slots_version != kvm_dirty_slot_log_version()) {
        client.generation = ++last_generation;
        client.ram_version = ram_list.version;
        client.slots_version = kvm_dirty_slot_log_version();
    }

    info = g_new0(CheckpointPagesInfo, 1);
    /* Saving may write to the guest's memory, so pages come after it */
    if (state && !runstate_is_running() && !save_state(&offset, errp)) {
        goto fail;
    }
    info->state_size = offset;
    offset = ROUND_UP(offset, sizeof(CheckpointPages));
    info->offset = offset;
    stamp = get_clock();
    pages = collect_pages();
    info->collect_us = (get_clock() - stamp) / SCALE_US;
    info->runs = pages->len;
    info->generation = client.generation;
    if (!write_buffer(pages->data, (size_t)pages->len * sizeof(CheckpointPages),
                      &offset, errp)) {
        goto fail;
    }
    return info;

fail:
    qapi_free_CheckpointPagesInfo(info);
    return NULL;
}

CheckpointResumed *qmp_x_checkpoint_cont(Error **errp)
{
    CheckpointResumed *resumed;
    Error *err = NULL;
    bool consistent;

    if (!need_client(errp)) {
        return NULL;
    }
    /*
     * A reset writes to memory and leaves another state behind.  Reports of
     * pages that were written or harvested come too late for this checkpoint.
     */
    consistent = !client.ran && !memory_changed() &&
                 !(client.stopped && !runstate_check(RUN_STATE_PAUSED));
    if (client.stopped) {
        qmp_cont(&err);
        if (err) {
            error_propagate(errp, err);
            return NULL;
        }
    }
    resumed = g_new0(CheckpointResumed, 1);
    resumed->resumed = runstate_is_running();
    resumed->consistent = consistent;
    return resumed;
}

void checkpoint_keep_stopped(void)
{
    client.stopped = false;
}
