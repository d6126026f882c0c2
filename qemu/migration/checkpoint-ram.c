/*
 * Checkpoints of a running guest: its memory
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * Pages that QEMU writes, and those that QEMU harvested itself, for a display
 * or before a slot is removed, are in the dirty bitmap of migration.  Nobody
 * else may clear it: migration is blocked while a client is attached.
 */

#include "qemu/osdep.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/rcu.h"
#include "qemu/slot-ring-compat.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "cpu.h"
#include "exec/address-spaces.h"
#include "exec/ram_addr.h"
#include "exec/target_page.h"
#include "hw/qdev-core.h"
#include "migration/savevm.h"
#include "page-states.h"
#include "ram.h"
#include "checkpoint.h"

/* What one message takes, see qio_channel_socket_writev() */
#define FDS_PER_MESSAGE 16

/* Words of the dirty bitmap with one bit in its summary: 128 MiB of the guest */
#define WORDS_AT_ONCE   (DIRTY_SUMMARY_PAGES / BITS_PER_LONG)

/* The layout that has this number; never the same number for two layouts */
static struct {
    bool client_harvests;       /* KVM's logs, all of them, by one file */
    uint64_t generation;
    uint32_t ram_version;
    unsigned int slots_version;
    unsigned int devices_version;
    unsigned int devices_plugged;
} known;

/* Also of devices that have no state of their own: the client judges them */
static unsigned int devices_plugged;

static void device_comes_or_goes(DeviceListener *listener, DeviceState *dev)
{
    devices_plugged++;
}

static DeviceListener device_listener = {
    .realize = device_comes_or_goes,
    .unrealize = device_comes_or_goes,
};

/* The client maps its file from the beginning on */
bool checkpoint_block_is_mapped(RAMBlock *rb)
{
    return qemu_ram_is_shared(rb) && rb->fd >= 0 && !compat_fd_offset(rb);
}

uint32_t checkpoint_block_number(const RAMBlock *of)
{
    uint32_t nr = 0;
    RAMBlock *rb;

    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        if (rb == of) {
            return checkpoint_block_is_mapped(rb) ? nr : CHECKPOINT_NO_BLOCK;
        }
        nr++;
    }
    return CHECKPOINT_NO_BLOCK;
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

typedef struct Summary {
    unsigned long words[BITS_TO_LONGS(DIRTY_SUMMARY_BITS)];
} Summary;

/*
 * Before what it is of: what is set while that is looked at is in it again.
 * What a block that was no matter before has left is not.
 */
static void take_summary(Summary *s)
{
    static uint64_t generation;
    bool anew = generation != checkpoint_generation();
    size_t i;

    generation = checkpoint_generation();
    for (i = 0; i < ARRAY_SIZE(s->words); i++) {
        unsigned long *word = &ram_list.dirty_summary[i];

        s->words[i] = qatomic_read(word) ? qatomic_xchg(word, 0) : 0;
        if (anew) {
            s->words[i] = ~0ul;
        }
    }
}

/* Whether there may be bits where this word is */
static bool is_worth_a_look(const Summary *s, uint64_t word)
{
    return test_bit(word / WORDS_AT_ONCE % DIRTY_SUMMARY_BITS, s->words);
}

/*
 * Moves the block's bits in the dirty bitmap to @pages, and write-protects the
 * pages again where that is not done yet.  Does not take what KVM logs.
 *
 * The guest waits, and QEMU writes to few pages of it: in a large guest, what
 * this costs is to find out that there is nothing.
 */
static void collect_block(RAMBlock *rb, uint32_t nr, const Summary *summary,
                          GArray *pages)
{
    uint64_t npages = rb->used_length >> TARGET_PAGE_BITS;
    uint64_t nwords = DIV_ROUND_UP(npages, BITS_PER_LONG);
    uint64_t word = BIT_WORD(rb->offset >> TARGET_PAGE_BITS);
    const uint64_t per_block = DIRTY_MEMORY_BLOCK_SIZE / BITS_PER_LONG;
    uint64_t i, k, n;
    uint64_t from = UINT64_MAX;         /* of words in a row that had bits */
    DirtyMemoryBlocks *dirty;

    /* find_ram_offset() sees to it */
    assert(!((rb->offset >> TARGET_PAGE_BITS) % BITS_PER_LONG));

    dirty = qatomic_rcu_read(&ram_list.dirty_memory[DIRTY_MEMORY_MIGRATION]);
    for (i = 0; i < nwords; i += n) {
        unsigned long *words = dirty->blocks[(word + i) / per_block] +
                               (word + i) % per_block;

        /* Where one part of the bitmap ends, a bit of its summary does */
        n = MIN(nwords - i, WORDS_AT_ONCE - (word + i) % WORDS_AT_ONCE);
        if (from == UINT64_MAX &&
            (!is_worth_a_look(summary, word + i) ||
             buffer_is_zero(words, n * sizeof(*words)))) {
            continue;
        }
        for (k = 0; k < n; k++) {
            unsigned long bits = words[k] ? qatomic_xchg(&words[k], 0) : 0;

            if (bits) {
                report_bits(pages, nr, (i + k) * BITS_PER_LONG, bits);
                from = MIN(from, i + k);
            } else if (from != UINT64_MAX) {
                protect_again(rb, from * BITS_PER_LONG,
                              (i + k) * BITS_PER_LONG);
                from = UINT64_MAX;
            }
        }
    }
    if (from != UINT64_MAX) {
        protect_again(rb, from * BITS_PER_LONG, npages);
    }
}

/*
 * The client harvests all slots, those that are shown on a display as well, and
 * nobody else learns of their pages then: draw it all.
 */
static void redraw_displays(void)
{
    RAMBlock *rb;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH(rb) {
        if (rb->mr && memory_region_is_logging(rb->mr, DIRTY_MEMORY_VGA)) {
            cpu_physical_memory_set_dirty_range(rb->offset, rb->used_length,
                                                1 << DIRTY_MEMORY_VGA);
        }
    }
}

int checkpoint_follow_logs(void)
{
    int fd = kvm_dirty_slot_vm_log_follow();
    static bool listens;

    if (!listens) {
        device_listener_register(&device_listener);
        listens = true;
    }
    known.client_harvests = fd >= 0;
    if (fd < 0 && fd != -EOPNOTSUPP) {
        warn_report("checkpoint: KVM's dirty logs are harvested by QEMU, as "
                    "there is no file of all of them: %s", strerror(-fd));
    }
    return fd;
}

void checkpoint_unfollow_logs(void)
{
    if (known.client_harvests) {
        redraw_displays();
    }
    known.client_harvests = false;
    kvm_dirty_slot_vm_log_unfollow();
}

GArray *checkpoint_collect_pages(void)
{
    GArray *pages = g_array_new(false, false, sizeof(CheckpointPages));
    Summary summary;
    uint32_t nr = 0;
    RAMBlock *rb;

    /* vhost and the like are asked; KVM's slot logs are left to the client */
    kvm_dirty_slot_log_hold(known.client_harvests);
    compat_dirty_log_sync();
    kvm_dirty_slot_log_hold(false);
    if (known.client_harvests) {
        redraw_displays();
    }

    RCU_READ_LOCK_GUARD();
    take_summary(&summary);
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        guint len = pages->len;

        collect_block(rb, nr++, &summary, pages);
        if (!checkpoint_block_is_mapped(rb) && pages->len != len) {
            /* It is in the state, whole */
            g_array_set_size(pages, len);
            checkpoint_head_changed();
        }
    }
    return pages;
}

/* vCPUs stand still, so KVM need not be asked */
bool checkpoint_memory_changed(void)
{
    RAMBlock *rb;

    if (buffer_is_zero(ram_list.dirty_summary,
                       sizeof(ram_list.dirty_summary))) {
        return false;
    }
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
 * Layout
 */

/*
 * Also of memory that is part of the state, or gone: the client is to know it
 */
static void add_slot(const KVMDirtySlotLog *log, void *opaque)
{
    CheckpointSlotList ***tail = opaque;
    CheckpointSlot *slot = g_new0(CheckpointSlot, 1);
    int64_t nr = 0;
    RAMBlock *rb;

    slot->slot = log->slot;
    slot->log = log->log;
    slot->pages = log->size >> TARGET_PAGE_BITS;
    QAPI_LIST_APPEND(*tail, slot);

    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        if (checkpoint_block_is_mapped(rb) && log->start >= rb->offset &&
            log->start - rb->offset < rb->used_length &&
            log->size <= rb->used_length - (log->start - rb->offset)) {
            slot->has_block = true;
            slot->block = nr;
            slot->page = (log->start - rb->offset) >> TARGET_PAGE_BITS;
            return;
        }
        nr++;
    }
}

static void know_layout(void)
{
    known.generation++;
    known.ram_version = ram_list.version;
    known.slots_version = kvm_dirty_slot_log_version();
    known.devices_version = qemu_savevm_handlers_version();
    known.devices_plugged = devices_plugged;
}

uint64_t checkpoint_generation(void)
{
    if (known.ram_version != ram_list.version ||
        known.slots_version != kvm_dirty_slot_log_version() ||
        known.devices_version != qemu_savevm_handlers_version() ||
        known.devices_plugged != devices_plugged) {
        know_layout();
    }
    return known.generation;
}

static uint64_t block_inode(RAMBlock *rb)
{
    struct stat st;

    return fstat(rb->fd, &st) < 0 ? 0 : st.st_ino;
}

/* Firmware comes and goes in smaller ones, and has no pages that are free */
#define MIN_RANGE   (1 * MiB)

static bool add_range(Int128 start, Int128 len, const MemoryRegion *mr,
                      hwaddr offset_in_region, void *opaque)
{
    CheckpointRangeList ***tail = opaque;
    CheckpointRange *range;
    uint32_t nr;

    if (!mr->ram || !mr->ram_block || int128_get64(len) < MIN_RANGE) {
        return false;
    }
    nr = checkpoint_block_number(mr->ram_block);
    if (nr != CHECKPOINT_NO_BLOCK) {
        range = g_new0(CheckpointRange, 1);
        range->gfn = int128_get64(start) >> TARGET_PAGE_BITS;
        range->pages = int128_get64(len) >> TARGET_PAGE_BITS;
        range->block = nr;
        range->page = offset_in_region >> TARGET_PAGE_BITS;
        QAPI_LIST_APPEND(*tail, range);
    }
    return false;
}

CheckpointLayout *checkpoint_layout(void)
{
    CheckpointLayout *layout = g_new0(CheckpointLayout, 1);
    CheckpointBlockList **tail = &layout->blocks;
    CheckpointSlotList **slots = &layout->slots;
    CheckpointRangeList **ranges = &layout->ranges;
    RAMBlock *rb;

    know_layout();
    layout->generation = known.generation;
    layout->devices = qemu_savevm_handlers();
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
        block->shared = checkpoint_block_is_mapped(rb);
        block->inode = block->shared ? block_inode(rb) : 0;
        QAPI_LIST_APPEND(tail, block);
    }
    flatview_for_each_range(address_space_to_flatview(&address_space_memory),
                            add_range, &ranges);
    layout->vm_log = known.client_harvests;
    layout->hears = true;
    if (known.client_harvests) {
        kvm_dirty_slot_log_foreach(add_slot, &slots);
    }
    return layout;
}

CheckpointPageStates *checkpoint_page_states(void)
{
    CheckpointPageStates *states;
    PageStates ps;
    uint32_t nr;

    if (!page_states_locate(&ps)) {
        return NULL;
    }
    RCU_READ_LOCK_GUARD();
    nr = checkpoint_block_number(ps.block);
    if (nr == CHECKPOINT_NO_BLOCK) {
        return NULL;
    }
    states = g_new0(CheckpointPageStates, 1);
    states->block = nr;
    states->page = ps.page;
    states->count = ps.nr;
    return states;
}

bool checkpoint_send_files(QIOChannelSocket *to, int log, Error **errp)
{
    g_autoptr(GArray) fds = g_array_new(false, false, sizeof(int));
    RAMBlock *rb;
    guint i;

    RCU_READ_LOCK_GUARD();
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        if (checkpoint_block_is_mapped(rb)) {
            g_array_append_val(fds, rb->fd);
        }
    }
    if (log >= 0) {
        g_array_append_val(fds, log);
    }

    for (i = 0; i < fds->len; i += FDS_PER_MESSAGE) {
        char byte = 0;
        struct iovec iov = { &byte, 1 };
        ssize_t n;

        n = qio_channel_writev_full(QIO_CHANNEL(to), &iov, 1,
                                    &g_array_index(fds, int, i),
                                    MIN(fds->len - i, FDS_PER_MESSAGE), 0,
                                    errp);
        if (n != 1) {
            if (n == QIO_CHANNEL_ERR_BLOCK) {
                error_setg(errp, "the client does not read its socket");
            }
            return false;
        }
    }
    return true;
}
