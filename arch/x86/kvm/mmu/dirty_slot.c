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
 * wrote them last.  So the ways to those of many masks are gone first, one as
 * independent of the other as the CPU likes them, and the SPTEs asked for; only then
 * comes the first atomic operation, behind which nothing overlaps.
 */
#define WALK_AHEAD	16

/*
 * The page table of a gfn, from the top one on, whose entries have so many bits of the
 * gfn below theirs; NULL if there is none, or a huge page (then @huge).
 */
static __always_inline u64 *find_pt(u64 *pt, int shift, gfn_t gfn, bool *huge)
{
	u64 spte;

	for (; shift; shift -= SPTE_LEVEL_BITS) {
		spte = READ_ONCE(pt[(gfn >> shift) % SPTE_ENT_PER_PAGE]);
		if (unlikely(!is_shadow_present_pte(spte)))
			return NULL;
		if (unlikely(is_large_pte(spte))) {
			*huge = true;
			return NULL;
		}
		pt = __va(spte & SPTE_BASE_ADDR_MASK);
	}
	return pt;
}

static noinline void look_ahead(u64 *top, int shift, gfn_t base_gfn,
				const struct kvm_dirty_slot_mask *masks,
				unsigned int nr, u64 **pts)
{
	gfn_t gfn, table = ~0ULL;
	u64 *pt = NULL;
	unsigned int i;
	bool huge;

	for (i = 0; i < nr; i++) {
		gfn = base_gfn + masks[i].offset + __ffs(masks[i].mask);
		if (gfn >> SPTE_LEVEL_BITS != table) {
			table = gfn >> SPTE_LEVEL_BITS;
			pt = find_pt(top, shift, gfn, &huge);
		}
		pts[i] = pt;
		if (likely(pt))
			prefetchw(&pt[gfn % SPTE_ENT_PER_PAGE]);
	}
}

static __always_inline void protect_gfn(struct kvm *kvm,
					struct kvm_mmu_page *root, u64 *pt,
					gfn_t gfn, u64 dbit)
{
	u64 *sptep = &pt[gfn % SPTE_ENT_PER_PAGE], spte = READ_ONCE(*sptep);

	if (!(spte & dbit) || !is_shadow_present_pte(spte))
		return;

	/* Atomic, be it necessary or not: to find out takes longer. */
	spte = atomic64_fetch_and(~dbit, (atomic64_t *)sptep);
	trace_kvm_tdp_mmu_spte_changed(kvm_mmu_page_as_id(root), gfn, PG_LEVEL_4K,
				       spte, spte & ~dbit);
	/* A D bit that stays tells it when the SPTE goes. */
	if (!is_dirty_spte(spte & ~dbit))
		kvm_set_pfn_dirty(spte_to_pfn(spte));
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
	const int shift = (root->role.level - 1) * SPTE_LEVEL_BITS;
	u64 *pts[WALK_AHEAD], *top = root->spt, *pt;
	gfn_t first, gfn, known;
	unsigned int i = 0;
	unsigned long mask;
	bool huge = false;

	do {
		if (!(i % WALK_AHEAD))
			look_ahead(top, shift, base_gfn, masks + i,
				   min(nr - i, WALK_AHEAD), pts);
		pt = pts[i % WALK_AHEAD];

		first = base_gfn + masks[i].offset;
		mask = masks[i].mask;
		known = first + __ffs(mask);
		for (; mask; mask &= mask - 1) {
			gfn = first + __ffs(mask);

			/* A memslot may begin in the midst of a page table. */
			if (unlikely(!pt || (gfn ^ known) >> SPTE_LEVEL_BITS)) {
				known = gfn;
				pt = find_pt(top, shift, gfn, &huge);
				if (unlikely(huge))
					return i;
				if (!pt)
					continue;
			}
			protect_gfn(kvm, root, pt, gfn, dbit);
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
