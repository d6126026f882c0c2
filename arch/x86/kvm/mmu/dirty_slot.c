// SPDX-License-Identifier: GPL-2.0-only
/*
 * Re-protection of pages for dirty slot rings, a batch at a time.
 *
 * For the TDP MMU a walk of its own: straight to each page table, keeping the way
 * there for the next gfn, without an iterator.  It gives up mmu_lock whenever
 * somebody waits for it, so that no vCPU waits longer than one mask takes; and it
 * need not mark a pfn dirty as long as the SPTE keeps its D bit.  Huge pages and
 * the shadow MMU take the way that they always took.
 */

#include <linux/kvm_host.h>
#include <linux/prefetch.h>

#include "mmu.h"
#include "mmu_internal.h"
#include "spte.h"
#include "tdp_mmu.h"

#include <trace/events/kvm.h>
#include "mmutrace.h"

/*
 * The SPTEs of pages at random are in nobody's cache, or in that of the vCPU that
 * wrote them last.  So that their misses, and those of the level above, overlap
 * instead of waiting for each other, each mask is met three times: first its entry
 * in level 2 is asked for, then its SPTE, then it is done.
 */
#define AHEAD_PT	16
#define AHEAD_PD	(2 * AHEAD_PT)

/* The entry of a gfn in level 2; NULL if it is not that simple. */
static __always_inline u64 *find_pde(const struct kvm_mmu_page *root, gfn_t gfn)
{
	int shift = (root->role.level - 1) * SPTE_LEVEL_BITS;
	u64 *pt = root->spt, spte;

	for (; shift > SPTE_LEVEL_BITS; shift -= SPTE_LEVEL_BITS) {
		spte = READ_ONCE(pt[(gfn >> shift) % SPTE_ENT_PER_PAGE]);
		if (unlikely(!is_shadow_present_pte(spte) || is_large_pte(spte)))
			return NULL;
		pt = __va(spte & SPTE_BASE_ADDR_MASK);
	}
	return &pt[(gfn >> shift) % SPTE_ENT_PER_PAGE];
}

static __always_inline u64 *find_pt(const u64 *pde)
{
	u64 spte;

	if (unlikely(!pde))
		return NULL;
	spte = READ_ONCE(*pde);
	if (unlikely(!is_shadow_present_pte(spte) || is_large_pte(spte)))
		return NULL;
	return __va(spte & SPTE_BASE_ADDR_MASK);
}

/*
 * No iterator, but straight to each page table, which stays one as long as
 * mmu_lock is held for write, because it takes mmu_lock to unlink it.
 */
static unsigned int protect_root(struct kvm *kvm, struct kvm_mmu_page *root,
				 gfn_t base_gfn,
				 const struct kvm_dirty_slot_mask *masks,
				 unsigned int nr, u64 dbit)
{
	const int top = (root->role.level - 1) * SPTE_LEVEL_BITS;
	unsigned int i = 0, pds = 0, pts = 0;
	u64 *way[AHEAD_PD], *pt, *sptep, spte;
	gfn_t first, gfn, table;
	unsigned long mask;
	int shift;

	do {
		for (; pds < nr && pds < i + AHEAD_PD; pds++) {
			first = base_gfn + masks[pds].offset;
			gfn = first + __ffs(masks[pds].mask);
			sptep = find_pde(root, gfn);
			prefetch(sptep);
			way[pds % AHEAD_PD] = sptep;
		}
		for (; pts < nr && pts < i + AHEAD_PT; pts++) {
			first = base_gfn + masks[pts].offset;
			gfn = first + __ffs(masks[pts].mask);
			pt = find_pt(way[pts % AHEAD_PD]);
			if (likely(pt))
				prefetchw(&pt[gfn % SPTE_ENT_PER_PAGE]);
			way[pts % AHEAD_PD] = pt;
		}

		mask = masks[i].mask;
		first = base_gfn + masks[i].offset;
		pt = way[i % AHEAD_PD];
		table = pt ? (first + __ffs(mask)) >> SPTE_LEVEL_BITS : ~0ULL;
		for (; mask; mask &= mask - 1) {
			gfn = first + __ffs(mask);

			if (unlikely(gfn >> SPTE_LEVEL_BITS != table)) {
				table = gfn >> SPTE_LEVEL_BITS;
				pt = root->spt;
				for (shift = top; shift; shift -= SPTE_LEVEL_BITS) {
					spte = READ_ONCE(pt[(gfn >> shift) %
							    SPTE_ENT_PER_PAGE]);
					if (unlikely(!is_shadow_present_pte(spte))) {
						pt = NULL;
						break;
					}
					if (unlikely(is_large_pte(spte)))
						return i;
					pt = __va(spte & SPTE_BASE_ADDR_MASK);
				}
			}
			if (unlikely(!pt))
				continue;

			sptep = &pt[gfn % SPTE_ENT_PER_PAGE];
			spte = READ_ONCE(*sptep);
			if (!(spte & dbit) || !is_shadow_present_pte(spte))
				continue;

			/* Atomic, be it necessary or not: to find out takes longer. */
			spte = atomic64_fetch_and(~dbit, (atomic64_t *)sptep);
			trace_kvm_tdp_mmu_spte_changed(kvm_mmu_page_as_id(root),
						       gfn, PG_LEVEL_4K, spte,
						       spte & ~dbit);
			/* A D bit that stays tells it when the SPTE goes. */
			if (!is_dirty_spte(spte & ~dbit))
				kvm_set_pfn_dirty(spte_to_pfn(spte));
		}
	} while (++i < nr && !kvm_dirty_slot_must_yield(kvm));

	return i;
}

/* All valid roots of the address space; returns how many masks were done in all. */
static unsigned int protect_roots(struct kvm *kvm,
				  const struct kvm_memory_slot *memslot,
				  const struct kvm_dirty_slot_mask *masks,
				  unsigned int nr)
{
	bool wrprot = !kvm_x86_ops.cpu_dirty_log_size || !kvm_ad_enabled();
	struct kvm_mmu_page *root;
	u64 dbit;

	lockdep_assert_held_write(&kvm->mmu_lock);

	list_for_each_entry(root, &kvm->arch.tdp_mmu_roots, link) {
		if (kvm_mmu_page_as_id(root) != memslot->as_id ||
		    root->role.invalid)
			continue;
		dbit = wrprot || kvm_mmu_page_ad_need_write_protect(root) ?
		       PT_WRITABLE_MASK : shadow_dirty_mask;
		/* What one root did not get to, the next need not do. */
		nr = protect_root(kvm, root, memslot->base_gfn, masks, nr, dbit);
		if (!nr)
			break;
	}
	return nr;
}

unsigned int kvm_arch_dirty_slot_protect(struct kvm *kvm,
					 struct kvm_memory_slot *memslot,
					 const struct kvm_dirty_slot_mask *masks,
					 unsigned int nr)
{
	unsigned int done = 0;

	if (tdp_mmu_enabled && !kvm_memslots_have_rmaps(kvm))
		done = protect_roots(kvm, memslot, masks, nr);
	if (done)
		return done;

	/*
	 * The shadow MMU, or a huge page, which is not split here: that takes
	 * memory, of whomever, and for the shadow MMU slots_lock.  It is
	 * write-protected, and the next write splits it.
	 */
	kvm_mmu_enable_log_dirty_pt_masked(kvm, memslot, masks->offset,
					   masks->mask, false);
	return 1;
}
