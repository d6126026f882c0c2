// SPDX-License-Identifier: GPL-2.0-only
/*
 * The perf test of dirty slot rings: the three mechanisms, each a mode with the same
 * steps.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dirty_slot_ring_perf.h"

/* What KVM_CLEAR_DIRTY_LOG is asked for at a time, if anything in it is dirty. */
#define CHUNK_WORDS		1024ul

/* The most that the upstream ring can have, so that it rarely fills. */
#define UPSTREAM_ENTRIES	65536

/* The dirty bitmap, with manual protection: get, scan, clear. */

static bool bitmap_supported(void)
{
	return kvm_check_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) &
	       KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
}

static uint64_t bitmap_words(struct run *r)
{
	return DIV_ROUND_UP(r->npages, WORD_PAGES);
}

static void bitmap_create(struct run *r)
{
	vm_enable_cap(r->vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
		      KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
}

static void bitmap_start(struct run *r)
{
	r->bitmap = calloc(bitmap_words(r), sizeof(*r->bitmap));
	r->dirty_chunk = calloc(DIV_ROUND_UP(bitmap_words(r), CHUNK_WORDS),
				sizeof(*r->dirty_chunk));
	TEST_ASSERT(r->bitmap && r->dirty_chunk, "no memory for the bitmap");
	/* Page faults on first use are not what is measured. */
	memset(r->bitmap, 0xff, bitmap_words(r) * sizeof(*r->bitmap));
}

static void bitmap_stop(struct run *r)
{
	free(r->bitmap);
	free(r->dirty_chunk);
}

static void bitmap_harvest(struct run *r)
{
	uint64_t chunk, w, end, words = bitmap_words(r);
	uint32_t *to = r->pages + r->nr_pages;
	const uint32_t *before;
	unsigned long word;

	kvm_vm_get_dirty_log(r->vm, DATA_SLOT, r->bitmap);

	for (chunk = 0, w = 0; w < words; chunk++) {
		before = to;
		for (end = min(w + CHUNK_WORDS, words); w < end; w++) {
			for (word = r->bitmap[w]; word; word &= word - 1)
				*to++ = w * WORD_PAGES + __builtin_ctzl(word);
		}
		r->dirty_chunk[chunk] = to != before;
	}
	r->nr_pages = to - r->pages;
}

static void bitmap_reprotect(struct run *r)
{
	uint64_t chunk, first;

	for (chunk = 0, first = 0; first < r->npages;
	     chunk++, first += CHUNK_WORDS * WORD_PAGES) {
		if (r->dirty_chunk[chunk])
			kvm_vm_clear_dirty_log(r->vm, DATA_SLOT,
					       r->bitmap + chunk * CHUNK_WORDS, first,
					       min(CHUNK_WORDS * WORD_PAGES,
						   r->npages - first));
	}
}

/* The upstream dirty ring: collect from the mapping, reset. */

static bool upstream_supported(void)
{
	return kvm_check_cap(KVM_CAP_DIRTY_LOG_RING_ACQ_REL) > 0;
}

static void upstream_create(struct run *r)
{
	r->entries = r->p->entries ?: UPSTREAM_ENTRIES;
	vm_enable_dirty_ring(r->vm, r->entries * sizeof(struct kvm_dirty_gfn));
}

static void upstream_start(struct run *r)
{
	uint32_t n;
	int i;

	for (i = 0; i < r->p->nr_vcpus; i++) {
		vcpu_map_dirty_ring(r->vcpu[i]);
		/* Page faults on first use are not what is measured. */
		for (n = 0; n < r->entries; n++)
			READ_ONCE(r->vcpu[i]->dirty_gfns[n].flags);
	}
}

static void upstream_stop(struct run *r)
{
}

static void upstream_harvest(struct run *r)
{
	uint32_t *to = r->pages + r->nr_pages, fetch, mask = r->entries - 1;
	struct kvm_dirty_gfn *gfns, *gfn;
	int i;

	for (i = 0; i < r->p->nr_vcpus; i++) {
		gfns = r->vcpu[i]->dirty_gfns;
		for (fetch = r->vcpu[i]->fetch_index;; fetch++) {
			gfn = &gfns[fetch & mask];
			/* Pairs with the push: offset is there. */
			if (__atomic_load_n(&gfn->flags, __ATOMIC_ACQUIRE) !=
			    KVM_DIRTY_GFN_F_DIRTY)
				break;
			*to++ = gfn->offset;
			/* Pairs with the reset: offset was read. */
			__atomic_store_n(&gfn->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
		}
		r->vcpu[i]->fetch_index = fetch;
	}
	r->nr_pages = to - r->pages;
}

static void upstream_reprotect(struct run *r)
{
	int ret = kvm_vm_reset_dirty_ring(r->vm);

	/* TEST_ASSERT() makes its message before it looks: 600 instructions. */
	if (ret < 0)
		TEST_FAIL(KVM_IOCTL_ERROR(KVM_RESET_DIRTY_RINGS, ret));
}

/* Dirty slot rings: one call does all. */

static bool slot_supported(void)
{
	return kvm_check_cap(KVM_CAP_DIRTY_SLOT_RING) > 0;
}

static void slot_create(struct run *r)
{
	dsr_enable(r->vm, r->p->entries, 0);
}

static void slot_start(struct run *r)
{
	r->log_fd = dsr_open(r->vm, DATA_SLOT);
	r->entries = dsr_info(r->log_fd).entries;
}

static void slot_stop(struct run *r)
{
	close(r->log_fd);
}

static void slot_harvest(struct run *r)
{
	struct kvm_dirty_slot_runs args;
	int ret;

	do {
		ret = __dsr_runs(r->log_fd, KVM_DIRTY_SLOT_LOG_HARVEST, r->runs + r->nr_runs,
				 2 * r->npages - r->nr_runs, 0, &args);
		if (ret)
			TEST_FAIL(KVM_IOCTL_ERROR(KVM_DIRTY_SLOT_LOG_HARVEST, ret));
		r->nr_runs += args.nr_runs;
	} while (args.flags & KVM_DIRTY_HARVEST_MORE);
}

const struct mode modes[NR_MODES] = {
	{
		.name = "bitmap",
		.supported = bitmap_supported,
		.create = bitmap_create,
		.start = bitmap_start,
		.stop = bitmap_stop,
		.harvest = bitmap_harvest,
		.reprotect = bitmap_reprotect,
	}, {
		.name = "upstream",
		.supported = upstream_supported,
		.create = upstream_create,
		.start = upstream_start,
		.stop = upstream_stop,
		.harvest = upstream_harvest,
		.reprotect = upstream_reprotect,
	}, {
		.name = "slot",
		.supported = slot_supported,
		.create = slot_create,
		.start = slot_start,
		.stop = slot_stop,
		.harvest = slot_harvest,
	},
};
