// SPDX-License-Identifier: GPL-2.0-only
/*
 * Re-protection of pages for dirty slot rings, a batch at a time.
 *
 * For the TDP MMU a walk of its own: straight to each page table, keeping the way
 * there for the next gfn, without an iterator.  It holds mmu_lock for read, as vCPUs
 * do that fault, so that none of them waits for it; see invariant 5 in
 * virt/kvm/dirty_slot/log.h for why no write is lost.  It need not mark a pfn dirty as
 * long as the SPTE keeps its D bit.  Huge pages and the shadow MMU take the way that
 * they always took, under mmu_lock for write.
 */

#include <linux/kvm_host.h>
#include <linux/prefetch.h>
#include <linux/rculist.h>

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

/* Pages that a page table of 4 KiB pages is for, and those of the table above it. */
#define PT_SHIFT	SPTE_LEVEL_BITS
#define PD_SHIFT	(2 * SPTE_LEVEL_BITS)

/* A walk: the root's page tables, and of those the last that were met. */
struct walk {
	u64 *top, *pd, *pt;
	int shift;		/* bits of a gfn below those that the top is for */
	gfn_t pd_at, pt_at;	/* what they are for */
	bool huge;		/* it met a huge page, maybe of a mask further on */
};

/*
 * Down from a table whose entries have @shift bits of the gfn below theirs, to one that
 * has @end; NULL if there is none, or a huge page.
 */
static __always_inline u64 *walk_down(struct walk *w, u64 *table, int shift, int end,
				      gfn_t gfn)
{
	u64 spte;

	for (; shift > end; shift -= SPTE_LEVEL_BITS) {
		spte = READ_ONCE(table[(gfn >> shift) % SPTE_ENT_PER_PAGE]);
		if (unlikely(!is_shadow_present_pte(spte)))
			return NULL;
		if (unlikely(is_large_pte(spte))) {
			w->huge = true;
			return NULL;
		}
		table = __va(spte & SPTE_BASE_ADDR_MASK);
	}
	return table;
}

/* The page table of a gfn; NULL if there is none, or a huge page. */
static __always_inline u64 *walk_to(struct walk *w, gfn_t gfn)
{
	if (gfn >> PT_SHIFT == w->pt_at)
		return w->pt;
	if (gfn >> PD_SHIFT != w->pd_at) {
		w->pd_at = gfn >> PD_SHIFT;
		w->pd = walk_down(w, w->top, w->shift, PT_SHIFT, gfn);
	}
	w->pt_at = gfn >> PT_SHIFT;
	w->pt = w->pd ? walk_down(w, w->pd, PT_SHIFT, 0, gfn) : NULL;
	return w->pt;
}

/* The SPTEs of the first pages of masks, asked for; NULL where there is none. */
static noinline void look_ahead(struct walk *walk, gfn_t base_gfn,
				const struct kvm_dirty_slot_mask *masks,
				unsigned int nr, u64 **sptes)
{
	const struct kvm_dirty_slot_mask *end = masks + nr;
	struct walk w = *walk;
	gfn_t gfn;
	u64 *pt;

	for (; masks != end; masks++, sptes++) {
		gfn = base_gfn + masks->offset + __ffs(masks->mask);
		pt = walk_to(&w, gfn);
		*sptes = NULL;
		if (likely(pt)) {
			*sptes = &pt[gfn % SPTE_ENT_PER_PAGE];
			prefetchw(*sptes);
		}
	}
	*walk = w;
}

static __always_inline void protect_spte(struct kvm_mmu_page *root, u64 *sptep,
					 gfn_t gfn, u64 dbit, u64 keep)
{
	u64 spte = READ_ONCE(*sptep);

	/* Others, and hardware, may change it meanwhile, or take it away. */
	do {
		if (!(spte & dbit) || !is_shadow_present_pte(spte))
			return;
	} while (!try_cmpxchg64(sptep, &spte, spte & ~dbit));

	trace_kvm_tdp_mmu_spte_changed(kvm_mmu_page_as_id(root), gfn, PG_LEVEL_4K,
				       spte, spte & ~dbit);
	/* A D bit that stays tells it when the SPTE goes. */
	if (unlikely(!(spte & keep)) && !is_dirty_spte(spte & ~dbit))
		kvm_set_pfn_dirty(spte_to_pfn(spte));
}

/* The pages of a mask, or what is left of them; false if it met a huge page. */
static __always_inline bool protect_pages(struct walk *w,
					  struct kvm_mmu_page *root, gfn_t first,
					  unsigned long mask, u64 dbit, u64 keep)
{
	gfn_t gfn;
	u64 *pt;

	for (; mask; mask &= mask - 1) {
		gfn = first + __ffs(mask);
		pt = walk_to(w, gfn);
		if (likely(pt))
			protect_spte(root, &pt[gfn % SPTE_ENT_PER_PAGE], gfn,
				     dbit, keep);
		else if (unlikely(w->huge))
			return false;
	}
	return true;
}

/* Many masks, some of them ahead; returns how many were done. */
static noinline unsigned int protect_masks(struct kvm *kvm,
					   struct kvm_mmu_page *root,
					   struct walk w, gfn_t base_gfn,
					   const struct kvm_dirty_slot_mask *masks,
					   unsigned int nr, u64 dbit)
{
	u64 *sptes[WALK_AHEAD], *sptep, keep = shadow_dirty_mask & ~dbit;
	unsigned int i = 0;
	unsigned long mask;
	gfn_t first;

	do {
		if (!(i % WALK_AHEAD)) {
			/* Who waits for mmu_lock for write keeps out who faults. */
			if (i && kvm_dirty_slot_must_yield(kvm))
				break;
			look_ahead(&w, base_gfn, masks + i,
				   min(nr - i, WALK_AHEAD), sptes);
		}
		sptep = sptes[i % WALK_AHEAD];
		first = base_gfn + masks[i].offset;
		mask = masks[i].mask;
		if (likely(sptep)) {
			protect_spte(root, sptep, first + __ffs(mask), dbit,
				     keep);
			mask &= mask - 1;
		}
		if (!protect_pages(&w, root, first, mask, dbit, keep))
			break;
	} while (++i < nr);

	return i;
}

/*
 * No iterator, but straight to each page table.  It may be unlinked meanwhile, and is
 * freed after a grace period of RCU; what is installed in its place is looked after by
 * who installs it, as are roots that are made meanwhile.
 */
static unsigned int protect_root(struct kvm *kvm, struct kvm_mmu_page *root,
				 gfn_t base_gfn,
				 const struct kvm_dirty_slot_mask *masks,
				 unsigned int nr, u64 dbit)
{
	struct walk w = {
		.top = root->spt,
		.shift = (root->role.level - 1) * SPTE_LEVEL_BITS,
		.pd_at = ~0ULL,
		.pt_at = ~0ULL,
	};

	/* A single one overlaps with nothing. */
	if (nr == 1)
		return protect_pages(&w, root, base_gfn + masks->offset,
				     masks->mask, dbit, shadow_dirty_mask & ~dbit);
	return protect_masks(kvm, root, w, base_gfn, masks, nr, dbit);
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

	lockdep_assert_held_read(&kvm->mmu_lock);

	list_for_each_entry_rcu(root, &kvm->arch.tdp_mmu_roots, link) {
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

	/*
	 * The shadow MMU installs SPTEs under mmu_lock for write, and there are rmaps
	 * before it does: without them there are none but those that are yet to be
	 * marked.
	 */
	if (tdp_mmu_enabled && !kvm_memslots_have_rmaps(kvm)) {
		read_lock(&kvm->mmu_lock);
		rcu_read_lock();
		done = protect_roots(kvm, memslot, masks, nr);
		rcu_read_unlock();
		read_unlock(&kvm->mmu_lock);
	}
	if (done)
		return done;

	/*
	 * The shadow MMU, or a huge page, which is not split here: that takes
	 * memory, of whomever, and for the shadow MMU slots_lock.  It is
	 * write-protected, and the next write splits it.
	 */
	write_lock(&kvm->mmu_lock);
	kvm_mmu_enable_log_dirty_pt_masked(kvm, memslot, masks->offset,
					   masks->mask, false);
	write_unlock(&kvm->mmu_lock);
	return 1;
}
