// SPDX-License-Identifier: GPL-2.0-only
/*
 * Re-protection of pages for dirty slot rings, a batch at a time.
 *
 * A walk of its own: straight to each page table of stage 2, keeping the way there for
 * the next gfn.  It holds mmu_lock for read, as vCPUs do that fault, so that none of
 * them waits for it; see invariant 5 in virt/kvm/dirty_slot/log.h for why no write is
 * lost.  Entries are changed atomically: vCPUs that fault break them and make them anew,
 * and hardware sets their access flags, but never their dirty state, which KVM does not
 * let it manage at stage 2.
 *
 * A block is write-protected as a whole, not split, which would take memory; the next
 * write to it breaks it.
 */

#include <linux/kvm_host.h>

#include <asm/kvm_mmu.h>
#include <asm/kvm_nested.h>
#include <asm/kvm_pgtable.h>
#include <asm/pgtable-hwdef.h>

/* Masks between two looks at who waits for mmu_lock. */
#define LOOK_EVERY	16

/* Bits of a gfn that a page table is for, and those of the table above it. */
#define PT_SHIFT	(PAGE_SHIFT - 3)
#define PD_SHIFT	(2 * PT_SHIFT)

/* A walk: the page tables of stage 2, and of those the last that were met. */
struct walk {
	kvm_pte_t *top, *pd, *pt;
	int shift;		/* bits of a gfn below those that the top is for */
	gfn_t pd_at, pt_at;	/* what they are for */
};

static __always_inline void protect_leaf(kvm_pte_t *ptep)
{
	kvm_pte_t pte = READ_ONCE(*ptep);

	do {
		if (!kvm_pte_valid(pte) || !(pte & KVM_PTE_LEAF_ATTR_LO_S2_S2AP_W))
			return;
		/* The flush orders it before what the caller does with the pages. */
	} while (!try_cmpxchg_relaxed(ptep, &pte,
				      pte & ~KVM_PTE_LEAF_ATTR_LO_S2_S2AP_W));
}

/*
 * Down from a table whose entries have @shift bits of the gfn below theirs, to one that
 * has @end; NULL if there is none, or a block, which is protected then.  A table that
 * takes the place of the block meanwhile is empty, and what is installed in it is looked
 * after by who installs it.  Tables of the first level may be side by side.
 */
static kvm_pte_t *walk_down(kvm_pte_t *table, int shift, int end, gfn_t gfn)
{
	kvm_pte_t *ptep, pte;

	while (shift > end) {
		ptep = &table[gfn >> shift];
		pte = READ_ONCE(*ptep);
		if (!kvm_pte_valid(pte))
			return NULL;
		if ((pte & PMD_TYPE_MASK) != PMD_TYPE_TABLE) {
			protect_leaf(ptep);
			return NULL;
		}
		table = __va(kvm_pte_to_phys(pte));
		gfn &= BIT_ULL(shift) - 1;
		shift -= PT_SHIFT;
	}
	return &table[(gfn >> end) & ~(PTRS_PER_PTE - 1ULL)];
}

/* The page table of a gfn; NULL if there is none to look at any more. */
static __always_inline kvm_pte_t *walk_to(struct walk *w, gfn_t gfn)
{
	if (gfn >> PT_SHIFT == w->pt_at)
		return w->pt;
	if (gfn >> PD_SHIFT != w->pd_at) {
		w->pd_at = gfn >> PD_SHIFT;
		w->pd = walk_down(w->top, w->shift, PT_SHIFT, gfn);
	}
	w->pt_at = gfn >> PT_SHIFT;
	w->pt = w->pd ? walk_down(w->pd, PT_SHIFT, 0,
				  gfn & (BIT_ULL(PD_SHIFT) - 1)) : NULL;
	return w->pt;
}

/* Returns how many masks were done. */
static unsigned int protect_masks(struct kvm *kvm, struct kvm_pgtable *pgt,
				  gfn_t base_gfn,
				  const struct kvm_dirty_slot_mask *masks,
				  unsigned int nr)
{
	struct walk w = {
		.top = rcu_dereference(pgt->pgd),
		.shift = kvm_granule_shift(pgt->start_level) - PAGE_SHIFT,
		.pd_at = ~0ULL,
		.pt_at = ~0ULL,
	};
	unsigned int i = 0;
	unsigned long mask;
	kvm_pte_t *pt;
	gfn_t gfn;

	do {
		/* Who waits for mmu_lock for write keeps out who faults. */
		if (i && !(i % LOOK_EVERY) && kvm_dirty_slot_must_yield(kvm))
			break;
		for (mask = masks[i].mask; mask; mask &= mask - 1) {
			gfn = base_gfn + masks[i].offset + __ffs(mask);
			pt = walk_to(&w, gfn);
			if (pt)
				protect_leaf(&pt[gfn % PTRS_PER_PTE]);
		}
	} while (++i < nr);

	return i;
}

/*
 * What guests of the guest map is write-protected as a whole, as KVM_CLEAR_DIRTY_LOG
 * does it: there is no way from a page of the guest to where it is mapped.
 */
static void protect_nested(struct kvm *kvm)
{
	struct kvm_s2_mmu *mmu;
	int i;

	write_lock(&kvm->mmu_lock);
	kvm_nested_s2_wp(kvm);
	/* The caller flushes what has the guest's own VMID. */
	for (i = 0; i < kvm->arch.nested_mmus_size; i++) {
		mmu = kvm->arch.nested_mmus[i];
		if (kvm_s2_mmu_valid(mmu))
			kvm_call_hyp(__kvm_tlb_flush_vmid, mmu);
	}
	write_unlock(&kvm->mmu_lock);
}

unsigned int kvm_arch_dirty_slot_protect(struct kvm *kvm,
					 struct kvm_memory_slot *memslot,
					 const struct kvm_dirty_slot_mask *masks,
					 unsigned int nr)
{
	struct kvm_pgtable *pgt;

	read_lock(&kvm->mmu_lock);
	rcu_read_lock();
	/* It is NULL when the VM's memory is gone. */
	pgt = kvm->arch.mmu.pgt;
	if (pgt)
		nr = protect_masks(kvm, pgt, memslot->base_gfn, masks, nr);
	rcu_read_unlock();
	read_unlock(&kvm->mmu_lock);

	/* A vCPU that has one now looks at the pages' bits, as any that faults. */
	if (unlikely(READ_ONCE(kvm->arch.nested_mmus_size)))
		protect_nested(kvm);

	return nr;
}
