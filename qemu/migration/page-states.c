/*
 * Pages of which the guest says that it does not use them
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * A guest with KVM_FEATURE_PAGE_STATES has a table in its memory, a byte for
 * each page, which it changes as it frees and allocates pages.  It promises for
 * any instant at which it stands still: what an unused page holds does not
 * matter, it will be written before it is read.
 *
 * Of a guest that runs the table says nothing that lasts: a moment later it may
 * be of a kernel that is gone.  Migration leaves out what is unused at a sync,
 * and at its last one, when the guest stands still, takes in again what it has
 * left out and is used by then.
 *
 * The table is the guest's.  Nothing that it says is used but to leave out
 * pages of its own, and nothing in it is trusted to be in RAM.
 */

#include "qemu/osdep.h"
#include "qemu/bitmap.h"
#include "qemu/bitops.h"
#include "qemu/rcu.h"
#include "qemu/slot-ring-compat.h"
#include "cpu.h"
#include "exec/address-spaces.h"
#include "exec/ramblock.h"
#include "exec/target_page.h"
#include "migration/misc.h"
#include "migration/kvm-page-states.h"
#include "standard-headers/asm-x86/kvm_para.h"
#include "migration.h"
#include COMPAT_MIGRATION_OPTIONS_H
#include "ram.h"
#include "page-states.h"

static bool has_states(CPUState *cpu)
{
#if defined(CONFIG_KVM) && defined(TARGET_I386)
    return kvm_enabled() && cpu && kvm_arch_has_page_states(cpu);
#else
    return false;
#endif
}

static uint64_t states_msr(CPUState *cpu)
{
#if defined(CONFIG_KVM) && defined(TARGET_I386)
    return kvm_arch_page_states(cpu);
#else
    return 0;
#endif
}

static void read_msr(CPUState *cpu, run_on_cpu_data data)
{
    *(uint64_t *)data.host_ptr = states_msr(cpu);
}

bool page_states_locate(PageStates *ps)
{
    struct kvm_page_states header;
    MemoryRegionSection section;
    uint64_t msr = 0;
    hwaddr gpa;

    ps->nr = 0;
    ps->stopped = !runstate_is_running();
    if (!has_states(first_cpu)) {
        return false;
    }
    /* A vCPU that runs has to come out for it */
    if (ps->stopped) {
        msr = states_msr(first_cpu);
    } else {
        run_on_cpu(first_cpu, read_msr, RUN_ON_CPU_HOST_PTR(&msr));
    }
    if (!(msr & KVM_MSR_ENABLED)) {
        return false;
    }
    gpa = msr & TARGET_PAGE_MASK;
    if (address_space_read(&address_space_memory, gpa, MEMTXATTRS_UNSPECIFIED,
                           &header, sizeof(header)) != MEMTX_OK ||
        le32_to_cpu(header.magic) != KVM_PAGE_STATES_MAGIC ||
        le32_to_cpu(header.version) != KVM_PAGE_STATES_VERSION) {
        return false;
    }

    gpa += sizeof(header);
    section = memory_region_find(get_system_memory(), gpa, 1);
    if (!section.mr) {
        return false;
    }
    if (memory_region_is_ram(section.mr) && section.mr->ram_block &&
        !memory_region_is_ram_device(section.mr)) {
        ps->block = section.mr->ram_block;
        ps->page = section.offset_within_region >> TARGET_PAGE_BITS;
        /* Guests' memory in a row may be two blocks: then this is the end */
        ps->nr = MIN(le64_to_cpu(header.nr), ps->block->used_length -
                     section.offset_within_region);
        ps->table = (uint8_t *)ps->block->host + section.offset_within_region;
    }
    memory_region_unref(section.mr);
    return ps->nr;
}

/*
 * Migration
 */

/*
 * Of a guest that runs; it may be of a while ago, which the last sync makes up
 * for
 */
static PageStates running;

typedef struct Filter {
    const PageStates *states;
    int64_t more;
} Filter;

void page_states_prepare(void)
{
    running.nr = 0;
    if (runstate_is_running()) {
        page_states_locate(&running);
    }
}

/* None of 8 pages is unused, or is known to be left out */
static bool is_plain(const PageStates *ps, uint64_t gfn, RAMBlock *rb,
                     uint64_t page)
{
    return gfn + 8 <= ps->nr && !ldq_he_p(ps->table + gfn) &&
           find_next_bit(rb->left_out, page + 8, page) == page + 8;
}

/*
 * All of the RAM block that the guest has at these addresses.  A page that is
 * left out stays noted until it is dirty and used: then it is sent after KVM
 * has been told to protect it again (clear_bmap).  Before that its bit in KVM's
 * log may be set already, and tell of nothing new.
 */
static bool filter_range(Int128 start, Int128 len, const MemoryRegion *mr,
                         hwaddr offset_in_region, void *opaque)
{
    uint64_t gfn = int128_get64(start) >> TARGET_PAGE_BITS;
    uint64_t n = int128_get64(len) >> TARGET_PAGE_BITS, i;
    uint64_t page = offset_in_region >> TARGET_PAGE_BITS;
    RAMBlock *rb = mr->ram ? mr->ram_block : NULL;
    Filter *f = opaque;
    const PageStates *ps = f->states;

    if (!rb || !rb->bmap || !rb->left_out) {
        return false;
    }
    for (i = 0; i < n; i++) {
        if (i + 8 <= n && is_plain(ps, gfn + i, rb, page + i)) {
            i += 7;
            continue;
        }
        if (gfn + i < ps->nr &&
            qatomic_read(&ps->table[gfn + i]) == KVM_PAGE_UNUSED) {
            if (test_and_clear_bit(page + i, rb->bmap)) {
                f->more--;
            }
            set_bit(page + i, rb->left_out);
            if (rb->now_used) {
                clear_bit(page + i, rb->now_used);
            }
        } else if (test_bit(page + i, rb->bmap)) {
            clear_bit(page + i, rb->left_out);
        }
    }
    return false;
}

/* The guest stands still: what was left out and is used has to be sent */
static void take_in(RAMBlock *rb, Filter *f)
{
    uint64_t npages = rb->used_length >> TARGET_PAGE_BITS, page;

    for (page = find_first_bit(rb->now_used, npages); page < npages;
         page = find_next_bit(rb->now_used, npages, page + 1)) {
        clear_bit(page, rb->left_out);
        if (!test_and_set_bit(page, rb->bmap)) {
            f->more++;
        }
    }
    g_free(rb->now_used);
    rb->now_used = NULL;
}

/* Its block may have been unplugged since it was located */
static bool is_there(const PageStates *ps)
{
    RAMBlock *rb;

    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        if (rb == ps->block) {
            return true;
        }
    }
    return false;
}

int64_t page_states_filter(void)
{
    PageStates now = { .stopped = !runstate_is_running() };
    Filter f = { .states = &now };
    RAMBlock *rb;

    /* Who asks for a page that was left out would wait for ever */
    if (migrate_postcopy_ram()) {
        return 0;
    }
    if (now.stopped) {
        page_states_locate(&now);
    } else {
        now = running;
    }
    if (now.nr && !is_there(&now)) {
        now.nr = 0;
    }
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        uint64_t max = rb->max_length >> TARGET_PAGE_BITS;

        if (rb->bmap && !rb->left_out && now.nr) {
            rb->left_out = bitmap_new(max);
        }
        if (rb->bmap && rb->left_out && now.stopped) {
            /* Unless the table says otherwise */
            rb->now_used = bitmap_new(max);
            bitmap_copy(rb->now_used, rb->left_out, max);
        }
    }
    if (now.nr) {
        FlatView *view = address_space_to_flatview(&address_space_memory);

        flatview_for_each_range(view, filter_range, &f);
    }
    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        if (rb->now_used) {
            take_in(rb, &f);
        }
    }
    return f.more;
}

void page_states_cleanup(void)
{
    RAMBlock *rb;

    RAMBLOCK_FOREACH_MIGRATABLE(rb) {
        g_free(rb->left_out);
        rb->left_out = NULL;
    }
}
