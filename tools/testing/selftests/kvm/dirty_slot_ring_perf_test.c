// SPDX-License-Identifier: GPL-2.0-only
/*
 * What it costs to find the pages a guest wrote and to re-arm them: the dirty
 * bitmap, the upstream dirty ring and dirty slot rings, in the same VM, with the
 * same pages, phase by phase.
 *
 * The guest writes one word to each page of a list that the host made, so that
 * its own share of the time is the write and nothing else.  All vCPUs run on one
 * thread, one after the other: no wake-up and no waiting is measured.  After each
 * harvest, outside of what is timed, the pages reported must be the pages
 * written, each once, with what was written in them.
 *
 * Under an emulator that counts one nanosecond for an instruction, all times are
 * instruction counts.  See Documentation/virt/kvm/dirty-slot-ring-performance.rst.
 *
 * Two more questions have their own options, as they need other VMs: how long a
 * vCPU is held up by a harvest (--stall), and what memory the log takes
 * (--memory).
 */
#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"

#include "dirty_slot_ring.h"
#include "dirty_slot_ring_guest.h"

#define MAX_VCPUS		8
#define MAX_ITERATIONS		100
#define MAX_SLOTS		64

/* The slot under test.  Below it is room for the list and for slot 0. */
#define DATA_SLOT		10
#define DATA_GPA		0x100000000ul
#define DATA_GVA		0x8000000000ul

/* A slot of u32 page numbers, which does not log. */
#define LIST_SLOT		11
#define LIST_GPA		0x40000000ul
#define LIST_GVA		0x40000000ul

/* What KVM_CLEAR_DIRTY_LOG is asked for at a time, if anything in it is dirty. */
#define CHUNK_WORDS		1024ul
#define WORD_PAGES		64ul

/* --stall: pages that the second vCPU may write at most, and what it writes. */
#define MAX_PROBES		60000
#define PROBE_VALUE		0x70726f6265ul

/* The most that the upstream ring can have, so that it rarely fills. */
#define UPSTREAM_ENTRIES	65536

static void __noreturn __printf(1, 2) fail(const char *fmt, ...)
{
	va_list ap;

	fputs("FAIL: ", stderr);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	exit(KSFT_FAIL);
}

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * NSEC_PER_SEC + ts.tv_nsec;
}

/* What it takes to ask the clock. */
static uint64_t clock_overhead(void)
{
	uint64_t t, least = UINT64_MAX;
	int i;

	for (i = 0; i < 100; i++) {
		t = now_ns();
		least = min(now_ns() - t, least);
	}
	return least;
}

/*
 * From @t0 until now.  Without the overhead, as a mode with two steps asks once
 * more than a mode with one, which shows where few pages are dirty.
 */
static uint64_t ns_since(uint64_t t0)
{
	static uint64_t overhead;
	uint64_t ns = now_ns() - t0;

	if (!overhead)
		overhead = clock_overhead();
	return ns > overhead ? ns - overhead : 0;
}

/* -- the guest ------------------------------------------------------------ */

/* The guest's copy is the one that both sides use. */
struct mailbox {
	uint64_t first;			/* of the list, and how many of it */
	uint64_t nr;
	uint64_t value;			/* what to write */
	uint64_t cycles;		/* by the guest: how long that took */
	uint64_t done;			/* by the guest, if @one_by_one: written so far */
	uint64_t one_by_one;		/* time each write, in place of its list entry... */
	uint64_t armed;			/* ...while this is set... */
	uint64_t stop;			/* ...until this is */
};

static struct mailbox mailboxes[MAX_VCPUS];

/* The list is used up by this: each entry becomes the cycles of its write. */
static void guest_one_by_one(struct mailbox *mb, uint32_t *page, uint32_t *end, uint64_t value)
{
	uint64_t start, *p;

	for (; page < end && !READ_ONCE(mb->stop); page++) {
		while (!READ_ONCE(mb->armed)) {
			if (READ_ONCE(mb->stop))
				return;
			guest_relax();
		}
		p = (uint64_t *)(DATA_GVA + *page * PG);
		start = guest_cycles();
		WRITE_ONCE(*p, value);
		*page = min(guest_cycles() - start, (uint64_t)UINT32_MAX);
		WRITE_ONCE(mb->done, mb->done + 1);
	}
}

static void guest_main(uint64_t id)
{
	struct mailbox *mb = &mailboxes[id];
	uint64_t value, start;
	uint32_t *page, *end;

	for (;;) {
		page = (uint32_t *)LIST_GVA + READ_ONCE(mb->first);
		end = page + READ_ONCE(mb->nr);
		value = READ_ONCE(mb->value);

		start = guest_cycles();
		if (READ_ONCE(mb->one_by_one))
			guest_one_by_one(mb, page, end, value);
		else
			for (; page < end; page++)
				WRITE_ONCE(*(uint64_t *)(DATA_GVA + *page * PG), value);
		WRITE_ONCE(mb->cycles, guest_cycles() - start);

		guest_exit();
	}
}

/* -- one run -------------------------------------------------------------- */

enum order { ORDER_RANDOM, ORDER_IN_ORDER };

static const char * const order_names[] = { "random", "in-order" };

struct params {
	uint64_t size;			/* of the slot, in bytes */
	uint32_t nr_dirty;		/* pages that each iteration writes */
	enum order order;
	int nr_vcpus;
	int iterations;
	int nr_slots;			/* for --memory; the first is the one that is written */
	uint32_t nr_probes;		/* for --stall: pages after the nr_dirty in the list */
	uint32_t entries;		/* of each ring; 0: see --help */
	uint64_t seed;
};

/* One iteration, in ns. */
struct sample {
	uint64_t dirty;			/* KVM_RUN, by the host's clock */
	uint64_t guest;			/* the loop in the guest, by its clock */
	uint64_t harvest;		/* until userspace has the pages */
	uint64_t reprotect;		/* until they are armed again */
};

struct run {
	const struct params *p;
	const struct mode *mode;
	struct kvm_vm *vm;
	struct kvm_vcpu *vcpu[MAX_VCPUS];
	struct mailbox *mb[MAX_VCPUS];
	uint64_t tsc_khz;

	uint64_t npages;
	uint8_t *data;			/* the slot's memory */
	uint32_t *list;			/* what LIST_SLOT holds */
	unsigned long *expected;	/* one bit for each page of the slot: to be reported */
	unsigned long *probes;		/* likewise: of the second vCPU of --stall */

	/* What the mode reported: pages, or runs if it has those. */
	uint32_t *pages;
	uint64_t nr_pages;
	struct kvm_dirty_run *runs;
	uint64_t nr_runs;

	/* Of the modes. */
	unsigned long *bitmap;
	bool *dirty_chunk;
	int log_fd;
	uint32_t entries;

	struct sample now, samples[MAX_ITERATIONS];
	uint64_t enable, populate, empty;
	unsigned int full_exits;
	unsigned int may_repeat;	/* so many pages may be reported twice */

	/* --stall: what a write took in ns, next to a harvest and without one */
	struct stall *stall;

	/* --memory: bytes that the log took, as the kernel accounts for them */
	struct memory {
		int64_t vmalloc, slab, free;
	} memory;
};

/*
 * A mode reports pages in two timed steps, harvest() and then reprotect(), which
 * is NULL if the former does all.  Both may be called at any time.
 */
struct mode {
	const char *name;
	bool (*supported)(void);
	void (*create)(struct run *r);		/* no vCPU exists yet */
	void (*start)(struct run *r);		/* the slot logs */
	void (*stop)(struct run *r);
	void (*harvest)(struct run *r);
	void (*reprotect)(struct run *r);
};

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

	TEST_ASSERT(ret >= 0, KVM_IOCTL_ERROR(KVM_RESET_DIRTY_RINGS, ret));
}

/* Dirty slot rings: one call does all. */

static bool slot_supported(void)
{
	return kvm_check_cap(KVM_CAP_DIRTY_SLOT_RING) > 0;
}

static void slot_create(struct run *r)
{
	r->entries = r->p->entries ?: DSR_DEFAULT_ENTRIES;
	dsr_enable(r->vm, r->entries, 0);
}

static void slot_start(struct run *r)
{
	r->log_fd = dsr_open(r->vm, DATA_SLOT);
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
		TEST_ASSERT(!ret, KVM_IOCTL_ERROR(KVM_DIRTY_SLOT_LOG_HARVEST, ret));
		r->nr_runs += args.nr_runs;
	} while (args.flags & KVM_DIRTY_HARVEST_MORE);
}

static const struct mode modes[] = {
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

/* Find the pages and re-arm them, both timed. */
static void collect(struct run *r)
{
	uint64_t t0;

	t0 = now_ns();
	r->mode->harvest(r);
	r->now.harvest += ns_since(t0);
	if (r->mode->reprotect) {
		t0 = now_ns();
		r->mode->reprotect(r);
		r->now.reprotect += ns_since(t0);
	}
}

/* -- the pages that are written ------------------------------------------- */

/* splitmix64: the same seed gives the same pages everywhere. */
static uint64_t next_random(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15ul;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ul;
	z = (z ^ z >> 27) * 0x94d049bb133111ebul;
	return z ^ z >> 31;
}

static bool get_page(const unsigned long *bits, uint32_t page)
{
	return bits[page / WORD_PAGES] & 1ul << page % WORD_PAGES;
}

/* Both return what it was before. */
static bool set_page(unsigned long *bits, uint32_t page)
{
	bool was = get_page(bits, page);

	bits[page / WORD_PAGES] |= 1ul << page % WORD_PAGES;
	return was;
}

static bool clear_page(unsigned long *bits, uint32_t page)
{
	bool was = get_page(bits, page);

	bits[page / WORD_PAGES] &= ~(1ul << page % WORD_PAGES);
	return was;
}

/* Different pages into the list: nr_dirty, then nr_probes. */
static void make_list(struct run *r)
{
	uint32_t i, j, page, *all, n = r->p->nr_dirty + r->p->nr_probes;
	uint64_t state = r->p->seed;

	if (r->p->order == ORDER_IN_ORDER) {
		for (i = 0; i < n; i++)
			r->list[i] = i;
	} else if (n > r->npages / 2) {
		all = malloc(r->npages * sizeof(*all));
		TEST_ASSERT(all, "no memory for %lu page numbers", r->npages);
		for (i = 0; i < r->npages; i++)
			all[i] = i;
		for (i = 0; i < n; i++) {
			j = i + next_random(&state) % (r->npages - i);
			page = all[j];
			all[j] = all[i];
			r->list[i] = page;
		}
		free(all);
	} else {
		for (i = 0; i < n; i++) {
			do
				page = next_random(&state) % r->npages;
			while (set_page(r->expected, page));
			r->list[i] = page;
		}
		for (i = 0; i < n; i++)
			clear_page(r->expected, r->list[i]);
	}
}

struct stall {
	pthread_t thread;
	bool own_cpu, ready, stop;
	uint64_t armed;
	uint32_t used;			/* of the pages for probes */
	uint32_t nr[2];
	uint32_t ns[2][MAX_PROBES];	/* [0] without, [1] with a harvest beside */
};

/* Returns how many of the pages that were to be reported this is. */
static uint32_t check_page(struct run *r, uint64_t page, uint64_t value)
{
	uint64_t found;

	if (page >= r->npages)
		fail("%s: page %#lx reported, the slot has %#lx", r->mode->name, page, r->npages);
	/*
	 * A page that is being written while it is reported may come twice: once
	 * before the write retires, which then faults again, and once after it.
	 */
	if (r->stall && get_page(r->probes, page)) {
		clear_page(r->expected, page);
		return 0;
	}
	found = READ_ONCE(*(uint64_t *)(r->data + page * PG));
	if (!clear_page(r->expected, page)) {
		if (found != value || !r->may_repeat--)
			fail("%s: page %#lx reported, but not written or reported twice",
			     r->mode->name, page);
		return 0;
	}
	if (found != value)
		fail("%s: page %#lx holds %#lx, not %#lx", r->mode->name, page, found, value);
	return 1;
}

/* The first @n of the list were written, with @value, and nothing else was. */
static void check_reported(struct run *r, uint32_t n, uint64_t value)
{
	uint64_t i, j, reported = 0;

	for (i = 0; i < n; i++)
		set_page(r->expected, r->list[i]);
	for (i = 0; i < r->nr_pages; i++)
		reported += check_page(r, r->pages[i], value);
	for (i = 0; i < r->nr_runs; i++) {
		for (j = 0; j < r->runs[i].npages; j++)
			reported += check_page(r, (uint64_t)r->runs[i].offset + j, value);
	}
	if (reported != n)
		fail("%s: %lu pages written, %lu reported", r->mode->name, (uint64_t)n, reported);
	r->nr_pages = 0;
	r->nr_runs = 0;
	r->may_repeat = 0;
}

/* Of the pages for probes, those that were used were reported, and no others. */
static void check_probes(struct run *r, const uint32_t *pages)
{
	uint32_t i;
	bool used;

	for (i = 0; i < r->p->nr_probes; i++) {
		used = i < r->stall->used;
		if (get_page(r->expected, pages[i]) == used)
			fail("%s: page %#x, by the second vCPU, was %s", r->mode->name, pages[i],
			     used ? "not reported" : "reported, but not written");
	}
}

/* -- running -------------------------------------------------------------- */

/* KVM_RUN returned for another reason than a full ring. */
static void check_exit(struct run *r, int i)
{
	struct kvm_run *run = r->vcpu[i]->run;
	struct ucall uc;

	if (guest_is_done(run))
		return;
	if (get_ucall(r->vcpu[i], &uc) == UCALL_ABORT)
		REPORT_GUEST_ASSERT(uc);
	fail("%s: unexpected exit, %s", r->mode->name, exit_reason_str(run->exit_reason));
}

/* Runs a vCPU until it is done; returns the time that KVM_RUN took. */
static uint64_t run_vcpu(struct run *r, int i)
{
	uint64_t t0, ns = 0;

	for (;;) {
		t0 = now_ns();
		vcpu_run(r->vcpu[i]);
		ns += now_ns() - t0;

		if (r->vcpu[i]->run->exit_reason != KVM_EXIT_DIRTY_RING_FULL)
			break;
		r->full_exits++;
		collect(r);
		/* The write that filled the ring was logged and is yet to be done. */
		r->may_repeat++;
	}
	check_exit(r, i);
	return ns;
}

/* The vCPUs, but for the second one of --stall, write @value to @n of the list. */
static void dirty(struct run *r, uint32_t n, uint64_t value)
{
	int i, nr = r->stall ? 1 : r->p->nr_vcpus;
	uint64_t first, end;

	memset(&r->now, 0, sizeof(r->now));
	for (i = 0; i < nr; i++) {
		first = (uint64_t)n * i / nr;
		end = (uint64_t)n * (i + 1) / nr;
		*r->mb[i] = (struct mailbox) {
			.first = first, .nr = end - first, .value = value,
		};
		r->now.dirty += run_vcpu(r, i);
		r->now.guest += r->mb[i]->cycles * 1000000 / r->tsc_khz;
	}
}

static void set_logging(struct run *r, bool on)
{
	vm_set_user_memory_region(r->vm, DATA_SLOT, on ? KVM_MEM_LOG_DIRTY_PAGES : 0,
				  DATA_GPA, r->p->size, r->data);
}

/*
 * The slot's memory, the same for one mode after the other.  A page that one of
 * them wrote need not be given to this process again, which takes most of the
 * time where there are many.  Values written go up, so that none is seen twice.
 */
static uint8_t *data_memory;
static uint64_t last_value;

static void *big_alloc(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	TEST_ASSERT(p != MAP_FAILED, "mmap of %zu bytes, errno %d", size, errno);
	return p;
}

static void make_vm(struct run *r)
{
	const struct params *p = r->p;
	uint64_t list_pages = DIV_ROUND_UP((p->nr_dirty + p->nr_probes) * sizeof(uint32_t), PG);
	int level = kvm_cpu_has(X86_FEATURE_GBPAGES) ? PG_LEVEL_1G : PG_LEVEL_2M;
	int i;

	/* Room for the page tables of the slot and the list. */
	r->vm = __vm_create(VM_SHAPE_DEFAULT, p->nr_vcpus,
			    2048 + p->size / PG_SIZE_1G + list_pages);
	r->mode->create(r);

	r->npages = p->size / PG;
	TEST_REQUIRE(DATA_GPA / PG + r->npages <= r->vm->max_gfn);
	if (!data_memory) {
		data_memory = big_alloc(p->size);
		TEST_ASSERT(!madvise(data_memory, p->size, MADV_NOHUGEPAGE),
			    "MADV_NOHUGEPAGE, errno %d", errno);
	}
	r->data = data_memory;
	set_logging(r, false);
	virt_map_level(r->vm, DATA_GVA, DATA_GPA, align_up(p->size, PG_LEVEL_SIZE(level)), level);

	vm_userspace_mem_region_add(r->vm, VM_MEM_SRC_ANONYMOUS, LIST_GPA, LIST_SLOT,
				    list_pages, 0);
	virt_map(r->vm, LIST_GVA, LIST_GPA, list_pages);
	r->list = addr_gpa2hva(r->vm, LIST_GPA);

	for (i = 0; i < p->nr_vcpus; i++) {
		r->vcpu[i] = vm_vcpu_add(r->vm, i, guest_main);
		vcpu_args_set(r->vcpu[i], 1, i);
		r->mb[i] = (struct mailbox *)addr_gva2hva(r->vm, (vm_vaddr_t)mailboxes) + i;
	}
	r->tsc_khz = __vcpu_ioctl(r->vcpu[0], KVM_GET_TSC_KHZ, NULL);

	r->expected = big_alloc(DIV_ROUND_UP(r->npages, WORD_PAGES) * sizeof(long));
	r->probes = big_alloc(DIV_ROUND_UP(r->npages, WORD_PAGES) * sizeof(long));
	/* Twice what there should be, for a log that reports too much. */
	r->pages = big_alloc(2 * r->npages * sizeof(*r->pages));
	r->runs = big_alloc(2 * r->npages * sizeof(*r->runs));
	memset(r->pages, 0xff, p->nr_dirty * sizeof(*r->pages));
	memset(r->runs, 0xff, p->nr_dirty * sizeof(*r->runs));
}

static void free_vm(struct run *r)
{
	kvm_vm_free(r->vm);
	munmap(r->expected, DIV_ROUND_UP(r->npages, WORD_PAGES) * sizeof(long));
	munmap(r->probes, DIV_ROUND_UP(r->npages, WORD_PAGES) * sizeof(long));
	munmap(r->pages, 2 * r->npages * sizeof(*r->pages));
	munmap(r->runs, 2 * r->npages * sizeof(*r->runs));
}

static void measure(struct run *r)
{
	uint32_t n = r->p->nr_dirty;
	uint32_t nr, other = min((n + 1) / 2, 4096u);
	uint64_t t0;
	int i;

	make_vm(r);
	make_list(r);

	/* First touch, before the slot logs, as in a VM that has been running. */
	dirty(r, n, ++last_value);
	r->populate = r->now.dirty;

	t0 = now_ns();
	set_logging(r, true);
	r->enable = now_ns() - t0;
	r->mode->start(r);

	/* The first round warms up; some of the pages are enough for that. */
	for (i = -1; i < r->p->iterations; i++) {
		nr = i < 0 ? min(n, 4096u) : n;
		dirty(r, nr, ++last_value);
		collect(r);
		check_reported(r, nr, last_value);
		if (i >= 0)
			r->samples[i] = r->now;
	}

	/* Nothing is dirty: what it costs to learn just that. */
	memset(&r->now, 0, sizeof(r->now));
	collect(r);
	check_reported(r, 0, 0);
	r->empty = r->now.harvest + r->now.reprotect;

	/* Another set: a log that tells what it told before fails. */
	dirty(r, other, ++last_value);
	collect(r);
	check_reported(r, other, last_value);

	r->mode->stop(r);
	set_logging(r, false);
	free_vm(r);
}

/* -- how long a harvest holds up a vCPU ----------------------------------- */

/*
 * One CPU: the vCPU's thread, of real-time priority, wakes up at random moments
 * and wants to write a page that the vCPU has not touched yet, which takes
 * mmu_lock.  What it takes from the moment the timer was set for until the page is
 * written shows the longest stretch in which the thread that harvests could not be
 * preempted, as when it holds mmu_lock.
 */
static void probe_when_woken(struct run *r)
{
	struct stall *s = r->stall;
	struct timespec ts;
	uint64_t t, armed, now = now_ns(), seed = r->p->seed;

	WRITE_ONCE(s->ready, true);
	while (!READ_ONCE(s->stop) && s->used < r->p->nr_probes) {
		t = now + 30000 + next_random(&seed) % 40000;
		ts.tv_sec = t / NSEC_PER_SEC;
		ts.tv_nsec = t % NSEC_PER_SEC;
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);

		armed = READ_ONCE(s->armed);
		if (!armed) {
			now = now_ns();
			continue;
		}
		*r->mb[1] = (struct mailbox) {
			.first = r->p->nr_dirty + s->used++, .nr = 1, .value = PROBE_VALUE,
		};
		vcpu_run(r->vcpu[1]);
		now = now_ns();
		check_exit(r, 1);
		s->ns[armed - 1][s->nr[armed - 1]++] = min(now - t, (uint64_t)UINT32_MAX);
	}
}

/* A CPU of its own: the vCPU writes without pause, by its own clock. */
static void probe_all_the_time(struct run *r)
{
	*r->mb[1] = (struct mailbox) {
		.first = r->p->nr_dirty, .nr = r->p->nr_probes, .value = PROBE_VALUE,
		.one_by_one = 1,
	};
	WRITE_ONCE(r->stall->ready, true);
	vcpu_run(r->vcpu[1]);
	check_exit(r, 1);
}

static void *stall_thread(void *arg)
{
	struct run *r = arg;

	/* The vCPU's first steps are not what is measured. */
	*r->mb[1] = (struct mailbox) { };
	run_vcpu(r, 1);

	if (r->stall->own_cpu)
		probe_all_the_time(r);
	else
		probe_when_woken(r);
	return NULL;
}

static void stall_arm(struct run *r, uint64_t armed)
{
	struct stall *s = r->stall;
	uint32_t i, done;

	if (!s->own_cpu) {
		WRITE_ONCE(s->armed, armed);
		return;
	}
	if (armed) {
		s->armed = armed;
		WRITE_ONCE(r->mb[1]->armed, 1);
		return;
	}
	WRITE_ONCE(r->mb[1]->armed, 0);
	/* The write under way, if there is one, belongs to what ends here. */
	do {
		done = READ_ONCE(r->mb[1]->done);
		usleep(2000);
	} while (READ_ONCE(r->mb[1]->done) != done);
	for (i = s->used; i < done; i++)
		s->ns[s->armed - 1][s->nr[s->armed - 1]++] =
			(uint64_t)r->list[r->p->nr_dirty + i] * 1000000 / r->tsc_khz;
	s->used = done;
}

static void stall(struct run *r)
{
	struct sched_param prio = { .sched_priority = 50 };
	uint32_t n = r->p->nr_dirty, nr_probes = r->p->nr_probes, i;
	pthread_attr_t attr;
	uint32_t *pages;
	uint64_t t0, t;
	int round, err;

	r->stall = calloc(1, sizeof(*r->stall));
	TEST_ASSERT(r->stall, "no memory");
	r->stall->own_cpu = sysconf(_SC_NPROCESSORS_ONLN) > 1;

	make_vm(r);
	make_list(r);
	dirty(r, n, ++last_value);
	set_logging(r, true);
	r->mode->start(r);
	/* The guest overwrites its list. */
	pages = malloc(nr_probes * sizeof(*pages));
	TEST_ASSERT(pages, "no memory");
	memcpy(pages, r->list + n, nr_probes * sizeof(*pages));
	for (i = 0; i < nr_probes; i++) {
		/* Only KVM shall have something to do when the guest does. */
		WRITE_ONCE(*(uint64_t *)(r->data + pages[i] * PG), 0);
		set_page(r->expected, pages[i]);
		set_page(r->probes, pages[i]);
	}

	pthread_attr_init(&attr);
	pthread_attr_setinheritsched(&attr, PTHREAD_EXPLICIT_SCHED);
	pthread_attr_setschedpolicy(&attr, SCHED_FIFO);
	pthread_attr_setschedparam(&attr, &prio);
	err = pthread_create(&r->stall->thread, r->stall->own_cpu ? NULL : &attr,
			     stall_thread, r);
	TEST_ASSERT(!err, "pthread_create: %s", strerror(err));
	while (!READ_ONCE(r->stall->ready))
		usleep(1000);

	/* The harvests, each followed by as long without one. */
	for (round = 0; round < r->p->iterations; round++) {
		dirty(r, n, ++last_value);
		t0 = now_ns();
		stall_arm(r, 2);
		collect(r);
		stall_arm(r, 0);
		t = now_ns();
		check_reported(r, n, last_value);
		r->samples[round] = r->now;

		t += t - t0;
		t0 = now_ns();
		stall_arm(r, 1);
		while (now_ns() - t0 < r->now.harvest + r->now.reprotect)
			;
		stall_arm(r, 0);
	}

	WRITE_ONCE(r->stall->stop, true);
	WRITE_ONCE(r->mb[1]->stop, 1);
	pthread_join(r->stall->thread, NULL);
	/* One may have been written, or been under way for long, since. */
	if (r->stall->own_cpu)
		r->stall->used = r->mb[1]->done;
	collect(r);
	check_reported(r, 0, 0);
	check_probes(r, pages);
	free(pages);

	r->mode->stop(r);
	set_logging(r, false);
	free_vm(r);
}

/* -- what memory the log takes -------------------------------------------- */

static struct memory memory_now(void)
{
	struct memory m = { 0 };
	char line[128];
	uint64_t kb;
	FILE *f;

	/* What was freed before may still wait for a grace period. */
	usleep(300000);
	f = fopen("/proc/meminfo", "r");
	TEST_ASSERT(f, "/proc/meminfo, errno %d", errno);
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "VmallocUsed: %lu", &kb) == 1)
			m.vmalloc = kb << 10;
		else if (sscanf(line, "SUnreclaim: %lu", &kb) == 1)
			m.slab = kb << 10;
		else if (sscanf(line, "MemFree: %lu", &kb) == 1)
			m.free = kb << 10;
	}
	fclose(f);
	return m;
}

/* A VM that never runs. */
static struct memory memory_of_vm(struct run *r, bool log)
{
	uint64_t gap = align_up(r->p->size, PG_SIZE_1G);
	struct memory before, after;
	int i;

	before = memory_now();
	r->vm = ____vm_create(VM_SHAPE_DEFAULT);
	if (log)
		r->mode->create(r);
	TEST_REQUIRE((DATA_GPA + r->p->nr_slots * gap) / PG <= r->vm->max_gfn);
	for (i = 0; i < r->p->nr_slots; i++)
		vm_set_user_memory_region(r->vm, DATA_SLOT + i, log ? KVM_MEM_LOG_DIRTY_PAGES : 0,
					  DATA_GPA + i * gap, r->p->size, data_memory);
	for (i = 0; i < r->p->nr_vcpus; i++)
		__vm_vcpu_add(r->vm, i);
	after = memory_now();
	kvm_vm_free(r->vm);

	return (struct memory) {
		.vmalloc = after.vmalloc - before.vmalloc,
		.slab = after.slab - before.slab,
		.free = before.free - after.free,
	};
}

static int cmp_memory(const void *a, const void *b)
{
	const struct memory *x = a, *y = b;

	return x->vmalloc + x->slab < y->vmalloc + y->slab ? -1 :
	       x->vmalloc + x->slab > y->vmalloc + y->slab;
}

/* With the log less without; the median, as others allocate and free as well. */
static void measure_memory(struct run *r)
{
	struct memory m[MAX_ITERATIONS], with, without;
	int i, n = r->p->iterations;

	if (!data_memory)
		data_memory = big_alloc(r->p->size);
	memory_of_vm(r, true);
	for (i = 0; i < n; i++) {
		without = memory_of_vm(r, false);
		with = memory_of_vm(r, true);
		m[i] = (struct memory) {
			.vmalloc = with.vmalloc - without.vmalloc,
			.slab = with.slab - without.slab,
			.free = with.free - without.free,
		};
	}
	qsort(m, n, sizeof(*m), cmp_memory);
	r->memory = m[n / 2];
}

/* -- reporting ------------------------------------------------------------ */

static int cmp_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

struct spread {
	double median, min, max;	/* ns per dirty page */
};

static struct spread spread_of(const struct run *r, uint64_t (*get)(const struct sample *))
{
	int i, n = r->p->iterations;
	uint64_t v[MAX_ITERATIONS];
	double pages = r->p->nr_dirty;

	for (i = 0; i < n; i++)
		v[i] = get(&r->samples[i]);
	qsort(v, n, sizeof(*v), cmp_u64);
	return (struct spread) {
		.median = (v[(n - 1) / 2] + v[n / 2]) / 2.0 / pages,
		.min = v[0] / pages,
		.max = v[n - 1] / pages,
	};
}

static uint64_t get_dirty(const struct sample *s) { return s->dirty; }
static uint64_t get_guest(const struct sample *s) { return s->guest; }
static uint64_t get_harvest(const struct sample *s) { return s->harvest; }
static uint64_t get_reprotect(const struct sample *s) { return s->reprotect; }
static uint64_t get_cost(const struct sample *s) { return s->harvest + s->reprotect; }

static const struct phase {
	const char *name;
	uint64_t (*get)(const struct sample *s);
} phases[] = {
	{ "dirty", get_dirty },
	{ "guest", get_guest },
	{ "harvest", get_harvest },
	{ "reprotect", get_reprotect },
	{ "cost", get_cost },
};

static const char cost_heading[] =
	"mode         dirty     guest   harvest reprotect      cost     enable     empty  full";

static void report_cost(const struct run *r)
{
	struct spread s;
	int i;

	printf("%-8s", r->mode->name);
	for (i = 0; i < ARRAY_SIZE(phases); i++) {
		s = spread_of(r, phases[i].get);
		printf(" %9.1f", s.median);
	}
	printf(" %10lu %9lu %5u\n", r->enable, r->empty, r->full_exits);
}

static void json_cost(FILE *f, const struct run *r)
{
	struct spread s;
	int i;

	fprintf(f, "\"enable_ns\": %lu, \"populate_ns\": %lu, \"empty_ns\": %lu, ",
		r->enable, r->populate, r->empty);
	fprintf(f, "\"full_exits\": %u, \"ns_per_page\": {", r->full_exits);
	for (i = 0; i < ARRAY_SIZE(phases); i++) {
		s = spread_of(r, phases[i].get);
		fprintf(f, "%s\"%s\": {\"median\": %.1f, \"min\": %.1f, \"max\": %.1f}",
			i ? ", " : "", phases[i].name, s.median, s.min, s.max);
	}
	fprintf(f, "}");
}

static const char * const stall_names[] = { "alone", "harvest" };

static int cmp_u32(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

/* The value that @permille of the sorted samples do not exceed. */
static uint32_t quantile(const struct stall *s, int which, unsigned int permille)
{
	uint64_t nr = s->nr[which];

	return nr ? s->ns[which][(nr - 1) * permille / 1000] : 0;
}

static void report_stall(const struct run *r)
{
	struct stall *s = r->stall;
	int i;

	for (i = 0; i < 2; i++) {
		qsort(s->ns[i], s->nr[i], sizeof(**s->ns), cmp_u32);
		printf("%-8s %-8s %8u %10u %10u %10u %10u\n", r->mode->name, stall_names[i],
		       s->nr[i], quantile(s, i, 500), quantile(s, i, 990),
		       quantile(s, i, 999), quantile(s, i, 1000));
	}
}

/* Four bins to the octave, each as [from, samples]. */
static void json_histogram(FILE *f, const uint32_t *ns, uint32_t nr)
{
	uint64_t from, width;
	uint32_t i = 0, n;

	fprintf(f, "\"histogram\": [");
	while (i < nr) {
		width = max(1ul << (31 - __builtin_clz(ns[i] | 1)), 4ul) / 4;
		from = ns[i] / width * width;
		for (n = 0; i < nr && ns[i] < from + width; i++)
			n++;
		fprintf(f, "[%lu, %u]%s", from, n, i < nr ? ", " : "");
	}
	fprintf(f, "]");
}

static void json_stall(FILE *f, const struct run *r)
{
	const struct stall *s = r->stall;
	int i;

	fprintf(f, "\"clock\": \"%s\", \"ns\": {", s->own_cpu ? "guest" : "host");
	for (i = 0; i < 2; i++) {
		fprintf(f, "%s\"%s\": {\"samples\": %u, \"median\": %u, \"p99\": %u, ",
			i ? ", " : "", stall_names[i], s->nr[i], quantile(s, i, 500),
			quantile(s, i, 990));
		fprintf(f, "\"p999\": %u, \"max\": %u, ", quantile(s, i, 999),
			quantile(s, i, 1000));
		json_histogram(f, s->ns[i], s->nr[i]);
		fprintf(f, "}");
	}
	fprintf(f, "}, \"cost_ns_per_page\": %.1f", spread_of(r, get_cost).median);
}

static void report_memory(const struct run *r)
{
	printf("%-8s %12ld %12ld %12ld %12ld\n", r->mode->name,
	       r->memory.vmalloc + r->memory.slab, r->memory.vmalloc, r->memory.slab,
	       r->memory.free);
}

static void json_memory(FILE *f, const struct run *r)
{
	fprintf(f, "\"slots\": %d, \"bytes\": %ld, \"vmalloc\": %ld, \"slab\": %ld, \"free\": %ld",
		r->p->nr_slots, r->memory.vmalloc + r->memory.slab, r->memory.vmalloc,
		r->memory.slab, r->memory.free);
}

/* What can be asked for. */
static const struct question {
	const char *name, *heading;
	void (*measure)(struct run *r);
	void (*report)(const struct run *r);
	void (*json)(FILE *f, const struct run *r);
} questions[] = {
	{
		"cost", cost_heading,
		measure, report_cost, json_cost,
	}, {
		"stall",
		"mode     beside    samples     median        99%      99.9%    longest",
		stall, report_stall, json_stall,
	}, {
		"memory",
		"mode            bytes      vmalloc         slab   memory gone",
		measure_memory, report_memory, json_memory,
	},
};

static void report_json(FILE *f, const struct question *q, const struct run *r)
{
	struct utsname uts;

	uname(&uts);
	fprintf(f, "{\"test\": \"dirty_slot_ring_perf_test\", \"question\": \"%s\", ", q->name);
	fprintf(f, "\"kernel\": \"%s\", \"mode\": \"%s\", ", uts.release, r->mode->name);
	fprintf(f, "\"slot_bytes\": %lu, \"slot_pages\": %lu, ", r->p->size, r->p->size / PG);
	fprintf(f, "\"dirty_pages\": %u, \"order\": \"%s\", \"vcpus\": %d, \"ring_entries\": %u, ",
		r->p->nr_dirty, order_names[r->p->order], r->p->nr_vcpus, r->entries);
	fprintf(f, "\"seed\": %lu, \"iterations\": %d, ", r->p->seed, r->p->iterations);
	q->json(f, r);
	fprintf(f, "}\n");
	fflush(f);
}

static const char *my_name;

static void show_options(void)
{
	printf("usage: %s [OPTION]...\n", my_name);
	fputs("\n"
"Measures what it costs to find the pages that a guest wrote and to re-arm them,\n"
"and checks that they are exactly the pages it wrote.\n"
"\n"
"  -m, --mode LIST       bitmap, upstream, slot, with commas between, or all,\n"
"                        which leaves out what the kernel lacks (default: all)\n"
"  -s, --size SIZE       of the memslot, 1M to 1000G (default: 64M)\n"
"  -n, --dirty N         pages to write in each iteration (default: 1000)\n"
"  -o, --order ORDER     random or in-order, from the first (default: random)\n"
"  -c, --vcpus N         they share the pages (default: 1, at most 8)\n"
"  -i, --iterations N    after one that warms up (default: 5, at most 100)\n"
"  -r, --ring-size N     entries of each ring (default: upstream 65536, slot 4096);\n"
"                        an upstream ring that fills is collected there and then\n"
"  -S, --seed N          of the random pages (default: 1)\n"
"  -j, --json[=FILE]     one line of JSON for each mode, appended to FILE or\n"
"                        among the text\n"
"  -w, --stall           how long does a harvest hold up another vCPU?\n"
"  -M, --memory          what memory does the log take?\n"
"  -x, --slots N         --memory: memslots of that size (default: 1, at most 64)\n"
"  -h, --help            this\n"
"\n"
"Times are in ns: of the host's clock, but \"guest\", which is the guest's own for\n"
"its loop of writes.  The columns dirty to cost are medians, per page written:\n"
"  dirty      KVM_RUN: write, fault, log, and the exit at the end\n"
"  guest      write, fault and log\n"
"  harvest    until userspace has the pages; for slot, all of HARVEST\n"
"  reprotect  KVM_CLEAR_DIRTY_LOG, KVM_RESET_DIRTY_RINGS\n"
"  cost       harvest and reprotect, with the flush of TLBs\n"
"and per VM:\n"
"  enable     KVM_SET_USER_MEMORY_REGION, to log\n"
"  empty      cost when nothing was written\n"
"  full       exits for a full ring\n"
"The lines of JSON also have populate, the first touch of the pages, without log.\n"
"\n"
"--stall has one vCPU write the N pages, which are harvested while a second one\n"
"writes pages that it never touched before.  With one CPU, the second one's thread\n"
"is woken up at random moments, and the time is from then until the page is\n"
"written.  With more, it writes without pause, and the time is one write's, by the\n"
"guest's clock.  \"alone\" is the same for as long without a harvest.\n"
"\n"
"--memory compares VMs that log with VMs that do not, by /proc/meminfo; bytes is\n"
"vmalloc and slab together.\n"
"\n"
"Exit status: 0, 1 if a page was lost, invented or reported twice, 2 usage, 4 if\n"
"the kernel lacks a mode that was named, or all of them.\n", stdout);
}

static void __noreturn __printf(1, 2) usage_error(const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "%s: ", my_name);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "; try %s -h\n", my_name);
	exit(2);
}

static uint64_t parse_number(const char *what, const char *s, uint64_t min, uint64_t max)
{
	unsigned long val;
	char *end;

	errno = 0;
	val = strtoul(s, &end, 0);
	if (errno || end == s || *end || *s == '-' || val < min || val > max)
		usage_error("%s is \"%s\", which is not from %lu to %lu", what, s, min, max);
	return val;
}

/* Such as "64M"; the parse_size() of the library aborts on what it dislikes. */
static uint64_t parse_slot_size(const char *s)
{
	static const char units[] = "KMGT";
	const char *unit;
	uint64_t size;
	double val;
	char *end;

	val = strtod(s, &end);
	unit = *end ? strchr(units, *end) : NULL;
	if (unit) {
		val *= 1ul << 10 * (unit - units + 1);
		end++;
	}
	if (end == s || *end || !(val >= 1ul << 20 && val <= 1000ul << 30))
		usage_error("--size is \"%s\", which is not from 1M to 1000G", s);
	size = val;
	if (size % PG)
		usage_error("--size is \"%s\", which is not a number of pages", s);
	return size;
}

static unsigned int parse_modes(const char *arg)
{
	char *list = strdup(arg), *name, *save;
	unsigned int mask = 0;
	int i;

	for (name = strtok_r(list, ",", &save); name; name = strtok_r(NULL, ",", &save)) {
		for (i = 0; i < ARRAY_SIZE(modes); i++) {
			if (!strcmp(name, modes[i].name))
				break;
		}
		if (i == ARRAY_SIZE(modes))
			usage_error("there is no mode \"%s\"", name);
		mask |= 1u << i;
	}
	free(list);
	if (!mask)
		usage_error("--mode names no mode");
	return mask;
}

static enum order parse_order(const char *arg)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(order_names); i++) {
		if (!strcmp(arg, order_names[i]))
			return i;
	}
	usage_error("--order is \"%s\", which is not random or in-order", arg);
}

int main(int argc, char *argv[])
{
	static const struct option options[] = {
		{ "mode", required_argument, NULL, 'm' },
		{ "size", required_argument, NULL, 's' },
		{ "dirty", required_argument, NULL, 'n' },
		{ "order", required_argument, NULL, 'o' },
		{ "vcpus", required_argument, NULL, 'c' },
		{ "iterations", required_argument, NULL, 'i' },
		{ "ring-size", required_argument, NULL, 'r' },
		{ "seed", required_argument, NULL, 'S' },
		{ "json", optional_argument, NULL, 'j' },
		{ "stall", no_argument, NULL, 'w' },
		{ "memory", no_argument, NULL, 'M' },
		{ "slots", required_argument, NULL, 'x' },
		{ "help", no_argument, NULL, 'h' },
		{ }
	};
	struct params p = {
		.size = 64ul << 20,
		.nr_dirty = 1000,
		.nr_vcpus = 1,
		.nr_slots = 1,
		.iterations = 5,
		.seed = 1,
	};
	const struct question *q = &questions[0];
	unsigned int want = 0, done = 0;
	static struct run r;
	FILE *json = NULL;
	int opt, i;

	my_name = argv[0];
	while ((opt = getopt_long(argc, argv, "m:s:n:o:c:i:r:S:j::wMx:h", options, NULL)) != -1) {
		switch (opt) {
		case 'm':
			want = strcmp(optarg, "all") ? parse_modes(optarg) : 0;
			break;
		case 's':
			p.size = parse_slot_size(optarg);
			break;
		case 'n':
			p.nr_dirty = parse_number("--dirty", optarg, 1, 1u << 28);
			break;
		case 'o':
			p.order = parse_order(optarg);
			break;
		case 'c':
			p.nr_vcpus = parse_number("--vcpus", optarg, 1, MAX_VCPUS);
			break;
		case 'i':
			p.iterations = parse_number("--iterations", optarg, 1, MAX_ITERATIONS);
			break;
		case 'r':
			p.entries = parse_number("--ring-size", optarg, 1, DSR_MAX_ENTRIES);
			if (p.entries & (p.entries - 1))
				usage_error("--ring-size is %u, no power of two", p.entries);
			break;
		case 'S':
			p.seed = parse_number("--seed", optarg, 0, UINT64_MAX);
			break;
		case 'j':
			json = optarg ? fopen(optarg, "a") : stdout;
			if (!json)
				usage_error("cannot open %s: %s", optarg, strerror(errno));
			break;
		case 'w':
			q = &questions[1];
			break;
		case 'M':
			q = &questions[2];
			break;
		case 'x':
			p.nr_slots = parse_number("--slots", optarg, 1, MAX_SLOTS);
			break;
		case 'h':
			show_options();
			return 0;
		default:
			fprintf(stderr, "try %s -h\n", my_name);
			return 2;
		}
	}
	if (optind < argc)
		usage_error("what is \"%s\"?", argv[optind]);
	if (p.nr_dirty > p.size / PG)
		usage_error("--dirty is %u, but the slot has %lu pages", p.nr_dirty, p.size / PG);
	if (q->measure == stall) {
		p.nr_vcpus = 2;
		p.nr_probes = min(p.size / PG - p.nr_dirty, (uint64_t)MAX_PROBES);
	}

	printf("%s: %lu MiB, %u pages %s, %d vCPUs, %d iterations, seed %lu\n", q->name,
	       p.size >> 20, p.nr_dirty, order_names[p.order], p.nr_vcpus, p.iterations, p.seed);
	puts(q->heading);

	for (i = 0; i < ARRAY_SIZE(modes); i++) {
		if (want && !(want & 1u << i))
			continue;
		if (!modes[i].supported()) {
			printf("%-8s skipped: not in this kernel\n", modes[i].name);
			continue;
		}
		memset(&r, 0, sizeof(r));
		r.p = &p;
		r.mode = &modes[i];
		q->measure(&r);
		q->report(&r);
		fflush(stdout);
		if (json)
			report_json(json, q, &r);
		free(r.stall);
		done |= 1u << i;
	}
	if (json && json != stdout && fclose(json))
		fail("writing the JSON lines: %s", strerror(errno));
	return !done || want & ~done ? KSFT_SKIP : 0;
}
