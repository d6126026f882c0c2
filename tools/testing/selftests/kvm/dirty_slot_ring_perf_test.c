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
 */
#include <errno.h>
#include <getopt.h>
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

#define PG			4096ul
#define MAX_VCPUS		8
#define MAX_ITERATIONS		100

/* The slot under test.  Below it is room for the list and for slot 0. */
#define DATA_SLOT		10
#define DATA_GPA		0x100000000ul
#define DATA_GVA		0x8000000000ul

/* A slot of u32 page numbers, which does not log. */
#define LIST_SLOT		11
#define LIST_GPA		0x40000000ul
#define LIST_GVA		0x40000000ul

#define DONE_PORT		0x1001

/* What KVM_CLEAR_DIRTY_LOG is asked for at a time, if anything in it is dirty. */
#define CHUNK_WORDS		1024ul
#define WORD_PAGES		64ul

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

/* -- the guest ------------------------------------------------------------ */

/* The guest's copy is the one that both sides use. */
struct mailbox {
	uint64_t first;			/* of the list, and how many of it */
	uint64_t nr;
	uint64_t value;			/* what to write */
	uint64_t cycles;		/* by the guest: how long that took */
};

static struct mailbox mailboxes[MAX_VCPUS];

static void guest_main(uint64_t id)
{
	struct mailbox *mb = &mailboxes[id];
	const uint32_t *page, *end;
	uint64_t value, start;

	for (;;) {
		page = (const uint32_t *)LIST_GVA + READ_ONCE(mb->first);
		end = page + READ_ONCE(mb->nr);
		value = READ_ONCE(mb->value);

		start = rdtsc();
		for (; page < end; page++)
			WRITE_ONCE(*(uint64_t *)(DATA_GVA + *page * PG), value);
		WRITE_ONCE(mb->cycles, rdtsc() - start);

		asm volatile("outb %%al, %%dx" : : "a"(0), "d"(DONE_PORT) : "memory");
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
	unsigned long *expected;	/* one bit for each page of the slot */

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
	volatile uint32_t *flags;
	uint32_t n;
	int i;

	for (i = 0; i < r->p->nr_vcpus; i++) {
		vcpu_map_dirty_ring(r->vcpu[i]);
		for (n = 0; n < r->entries; n++) {
			flags = &r->vcpu[i]->dirty_gfns[n].flags;
			*flags;
		}
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
		/* An array that is full already tells what is wrong elsewhere. */
		ret = __dsr_runs(r->log_fd, KVM_DIRTY_SLOT_LOG_HARVEST, r->runs + r->nr_runs,
				 r->p->nr_dirty + 1 - r->nr_runs, 0, &args);
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
	uint64_t t0, t1;

	t0 = now_ns();
	r->mode->harvest(r);
	t1 = now_ns();
	r->now.harvest += t1 - t0;
	if (r->mode->reprotect) {
		r->mode->reprotect(r);
		r->now.reprotect += now_ns() - t1;
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

static bool expected_set(struct run *r, uint32_t page)
{
	unsigned long *word = &r->expected[page / WORD_PAGES];
	unsigned long bit = 1ul << page % WORD_PAGES;
	bool was = *word & bit;

	*word |= bit;
	return was;
}

static bool expected_clear(struct run *r, uint32_t page)
{
	unsigned long *word = &r->expected[page / WORD_PAGES];
	unsigned long bit = 1ul << page % WORD_PAGES;
	bool was = *word & bit;

	*word &= ~bit;
	return was;
}

/* nr_dirty different pages into the list. */
static void make_list(struct run *r)
{
	uint32_t i, j, page, *all, n = r->p->nr_dirty;
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
			while (expected_set(r, page));
			r->list[i] = page;
		}
		for (i = 0; i < n; i++)
			expected_clear(r, r->list[i]);
	}
}

static void check_page(struct run *r, uint64_t page, uint64_t value)
{
	uint64_t found;

	if (page >= r->npages)
		fail("%s: page %#lx reported, the slot has %#lx", r->mode->name, page, r->npages);
	if (!expected_clear(r, page))
		fail("%s: page %#lx reported, but not written or reported twice",
		     r->mode->name, page);
	found = READ_ONCE(*(uint64_t *)(r->data + page * PG));
	if (found != value)
		fail("%s: page %#lx holds %#lx, not %#lx", r->mode->name, page, found, value);
}

/* The first @n of the list were written, with @value, and nothing else was. */
static void check_reported(struct run *r, uint32_t n, uint64_t value)
{
	uint64_t i, j, reported = r->nr_pages;

	for (i = 0; i < n; i++)
		expected_set(r, r->list[i]);
	for (i = 0; i < r->nr_pages; i++)
		check_page(r, r->pages[i], value);
	for (i = 0; i < r->nr_runs; i++) {
		for (j = 0; j < r->runs[i].npages; j++)
			check_page(r, (uint64_t)r->runs[i].offset + j, value);
		reported += r->runs[i].npages;
	}
	if (reported != n)
		fail("%s: %lu pages written, %lu reported", r->mode->name, (uint64_t)n, reported);
	r->nr_pages = 0;
	r->nr_runs = 0;
}

/* -- running -------------------------------------------------------------- */

/* Runs a vCPU until it is done; returns the time that KVM_RUN took. */
static uint64_t run_vcpu(struct run *r, int i)
{
	struct kvm_run *run = r->vcpu[i]->run;
	uint64_t t0, ns = 0;
	struct ucall uc;

	for (;;) {
		t0 = now_ns();
		vcpu_run(r->vcpu[i]);
		ns += now_ns() - t0;

		if (run->exit_reason == KVM_EXIT_DIRTY_RING_FULL) {
			r->full_exits++;
			collect(r);
			continue;
		}
		if (run->exit_reason == KVM_EXIT_IO && run->io.port == DONE_PORT)
			return ns;
		if (get_ucall(r->vcpu[i], &uc) == UCALL_ABORT)
			REPORT_GUEST_ASSERT(uc);
		fail("%s: unexpected exit, %s", r->mode->name,
		     exit_reason_str(run->exit_reason));
	}
}

/* The vCPUs share the first @n of the list and write @value. */
static void dirty(struct run *r, uint32_t n, uint64_t value)
{
	int i, nr = r->p->nr_vcpus;
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

static void *big_alloc(size_t size, bool populate)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE |
		       (populate ? MAP_POPULATE : 0), -1, 0);

	TEST_ASSERT(p != MAP_FAILED, "mmap of %zu bytes, errno %d", size, errno);
	return p;
}

static void make_vm(struct run *r)
{
	const struct params *p = r->p;
	uint64_t list_pages = DIV_ROUND_UP(p->nr_dirty * sizeof(uint32_t), PG);
	int level = kvm_cpu_has(X86_FEATURE_GBPAGES) ? PG_LEVEL_1G : PG_LEVEL_2M;
	int i;

	/* Room for the page tables of the slot and the list. */
	r->vm = __vm_create(VM_SHAPE_DEFAULT, p->nr_vcpus,
			    2048 + p->size / PG_SIZE_1G + list_pages);
	r->mode->create(r);

	r->npages = p->size / PG;
	TEST_REQUIRE(DATA_GPA / PG + r->npages <= r->vm->max_gfn);
	r->data = big_alloc(p->size, false);
	TEST_ASSERT(!madvise(r->data, p->size, MADV_NOHUGEPAGE), "MADV_NOHUGEPAGE, errno %d", errno);
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

	/* One more than there should be, for a log that reports too much. */
	r->expected = big_alloc(DIV_ROUND_UP(r->npages, WORD_PAGES) * sizeof(long), false);
	r->pages = big_alloc((r->npages + 1) * sizeof(*r->pages), false);
	r->runs = big_alloc((r->npages + 1) * sizeof(*r->runs), false);
	memset(r->pages, 0xff, p->nr_dirty * sizeof(*r->pages));
	memset(r->runs, 0xff, p->nr_dirty * sizeof(*r->runs));
}

static void free_vm(struct run *r)
{
	kvm_vm_free(r->vm);
	munmap(r->data, r->p->size);
	munmap(r->expected, DIV_ROUND_UP(r->npages, WORD_PAGES) * sizeof(long));
	munmap(r->pages, (r->npages + 1) * sizeof(*r->pages));
	munmap(r->runs, (r->npages + 1) * sizeof(*r->runs));
}

static void measure(struct run *r)
{
	uint32_t n = r->p->nr_dirty;
	uint64_t t0, value = 1;
	int i;

	make_vm(r);
	make_list(r);

	/* First touch, before the slot logs, as in a VM that has been running. */
	dirty(r, n, value);
	r->populate = r->now.dirty;

	t0 = now_ns();
	set_logging(r, true);
	r->enable = now_ns() - t0;
	r->mode->start(r);

	/* The first round warms up: buffers, rings. */
	for (i = -1; i < r->p->iterations; i++) {
		dirty(r, n, ++value);
		collect(r);
		check_reported(r, n, value);
		if (i >= 0)
			r->samples[i] = r->now;
	}

	/* Nothing is dirty: what it costs to learn just that. */
	memset(&r->now, 0, sizeof(r->now));
	collect(r);
	check_reported(r, 0, 0);
	r->empty = r->now.harvest + r->now.reprotect;

	/* Another set: a log that tells what it told before fails. */
	dirty(r, (n + 1) / 2, ++value);
	collect(r);
	check_reported(r, (n + 1) / 2, value);

	r->mode->stop(r);
	set_logging(r, false);
	free_vm(r);
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

static void report_text(const struct run *r)
{
	struct spread s;
	int i;

	printf("%-8s", r->mode->name);
	for (i = 0; i < ARRAY_SIZE(phases); i++) {
		s = spread_of(r, phases[i].get);
		printf(" %10.1f", s.median);
	}
	printf(" %12lu %12lu %10lu %6u\n", r->enable, r->populate, r->empty, r->full_exits);
	fflush(stdout);
}

static void report_json(FILE *f, const struct run *r)
{
	struct utsname uts;
	struct spread s;
	int i;

	uname(&uts);
	fprintf(f, "{\"test\": \"dirty_slot_ring_perf_test\", \"kernel\": \"%s\", ", uts.release);
	fprintf(f, "\"mode\": \"%s\", \"slot_bytes\": %lu, \"slot_pages\": %lu, ",
		r->mode->name, r->p->size, r->npages);
	fprintf(f, "\"dirty_pages\": %u, \"order\": \"%s\", \"vcpus\": %d, \"ring_entries\": %u, ",
		r->p->nr_dirty, order_names[r->p->order], r->p->nr_vcpus, r->entries);
	fprintf(f, "\"seed\": %lu, \"iterations\": %d, ", r->p->seed, r->p->iterations);
	fprintf(f, "\"enable_ns\": %lu, \"populate_ns\": %lu, \"empty_ns\": %lu, \"full_exits\": %u, ",
		r->enable, r->populate, r->empty, r->full_exits);
	fprintf(f, "\"ns_per_page\": {");
	for (i = 0; i < ARRAY_SIZE(phases); i++) {
		s = spread_of(r, phases[i].get);
		fprintf(f, "%s\"%s\": {\"median\": %.1f, \"min\": %.1f, \"max\": %.1f}",
			i ? ", " : "", phases[i].name, s.median, s.min, s.max);
	}
	fprintf(f, "}, \"verified\": true}\n");
	fflush(f);
}

static void help(FILE *f, const char *name)
{
	fprintf(f,
"usage: %s [OPTION]...\n"
"\n"
"Measures what it costs to find the pages that a guest wrote and to re-arm them,\n"
"and checks that they are exactly the pages it wrote.\n"
"\n"
"  -m, --mode LIST       bitmap, upstream, slot, with commas between, or all,\n"
"                        which leaves out what the kernel lacks (default: all)\n"
"  -s, --size SIZE       of the memslot, 1M to 1000G (default: 64M)\n"
"  -n, --dirty N         pages to write in each iteration (default: 1000)\n"
"  -o, --order ORDER     random or in-order (default: random)\n"
"  -c, --vcpus N         they share the pages (default: 1, at most %d)\n"
"  -i, --iterations N    after one that warms up (default: 5, at most %d)\n"
"  -r, --ring-size N     entries of each ring (default: upstream %d, slot %d);\n"
"                        an upstream ring that fills is collected there and then\n"
"  -S, --seed N          of the random pages (default: 1)\n"
"  -j, --json[=FILE]     one line of JSON for each mode, appended to FILE or\n"
"                        among the text\n"
"  -h, --help\n"
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
"  populate   the first touch of the pages, without log\n"
"  empty      cost when nothing was written\n"
"  full       exits for a full ring\n"
"\n"
"Exit status: 0, 1 if a page was lost, invented or reported twice, 2 usage, 4 if\n"
"the kernel has none of the modes.\n",
		name, MAX_VCPUS, MAX_ITERATIONS, UPSTREAM_ENTRIES, DSR_DEFAULT_ENTRIES);
}

static void __noreturn __printf(2, 3) usage_error(const char *name, const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "%s: ", name);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fprintf(stderr, "; try %s --help\n", name);
	exit(2);
}

static const char *my_name;

static uint64_t number(const char *what, const char *s, uint64_t min, uint64_t max)
{
	unsigned long val;
	char *end;

	errno = 0;
	val = strtoul(s, &end, 0);
	if (errno || end == s || *end || *s == '-' || val < min || val > max)
		usage_error(my_name, "%s is \"%s\", not a number from %lu to %lu",
			    what, s, min, max);
	return val;
}

/* "64M": kvm's parse_size() aborts on what it does not like. */
static uint64_t size_of(const char *s)
{
	char *end;
	double val = strtod(s, &end);
	uint64_t unit = 1, size;

	switch (*end) {
	case 'k': case 'K': unit = 1ul << 10; end++; break;
	case 'm': case 'M': unit = 1ul << 20; end++; break;
	case 'g': case 'G': unit = 1ul << 30; end++; break;
	case 't': case 'T': unit = 1ul << 40; end++; break;
	}
	if (end == s || *end || !(val > 0) || val * unit > (1000ul << 30))
		usage_error(my_name, "--size is \"%s\", not a size like 64M, to 1000G", s);
	size = val * unit;
	if (size < (1ul << 20) || size % PG)
		usage_error(my_name, "--size is \"%s\", less than 1M or not whole pages", s);
	return size;
}

static unsigned int modes_of(const char *arg)
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
			usage_error(my_name, "no such mode: %s", name);
		mask |= 1u << i;
	}
	free(list);
	if (!mask)
		usage_error(my_name, "--mode names no mode");
	return mask;
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
		{ "help", no_argument, NULL, 'h' },
		{ }
	};
	struct params p = {
		.size = 64ul << 20,
		.nr_dirty = 1000,
		.nr_vcpus = 1,
		.iterations = 5,
		.seed = 1,
	};
	unsigned int want = 0, done = 0;
	static struct run r;
	FILE *json = NULL;
	int opt, i;

	my_name = argv[0];
	while ((opt = getopt_long(argc, argv, "m:s:n:o:c:i:r:S:j::h", options, NULL)) != -1) {
		switch (opt) {
		case 'm':
			want = strcmp(optarg, "all") ? modes_of(optarg) : 0;
			break;
		case 's':
			p.size = size_of(optarg);
			break;
		case 'n':
			p.nr_dirty = number("--dirty", optarg, 1, 1u << 28);
			break;
		case 'o':
			for (i = 0; i < ARRAY_SIZE(order_names); i++) {
				if (!strcmp(optarg, order_names[i]))
					break;
			}
			if (i == ARRAY_SIZE(order_names))
				usage_error(my_name, "no such order: %s", optarg);
			p.order = i;
			break;
		case 'c':
			p.nr_vcpus = number("--vcpus", optarg, 1, MAX_VCPUS);
			break;
		case 'i':
			p.iterations = number("--iterations", optarg, 1, MAX_ITERATIONS);
			break;
		case 'r':
			p.entries = number("--ring-size", optarg, 1, DSR_MAX_ENTRIES);
			if (p.entries & (p.entries - 1))
				usage_error(my_name, "--ring-size is %u, no power of two", p.entries);
			break;
		case 'S':
			p.seed = number("--seed", optarg, 0, UINT64_MAX);
			break;
		case 'j':
			json = optarg ? fopen(optarg, "a") : stdout;
			if (!json)
				usage_error(my_name, "cannot open %s: %s", optarg, strerror(errno));
			break;
		case 'h':
			help(stdout, my_name);
			return 0;
		default:
			return 2;
		}
	}
	if (optind < argc)
		usage_error(my_name, "what is \"%s\"?", argv[optind]);
	if (p.nr_dirty > p.size / PG)
		usage_error(my_name, "%u pages to write, the slot has %lu", p.nr_dirty, p.size / PG);

	printf("slot of %lu MiB, %u pages %s, %d vCPUs, %d iterations, seed %lu; ns per page and ns\n",
	       p.size >> 20, p.nr_dirty, order_names[p.order], p.nr_vcpus, p.iterations, p.seed);
	printf("%-8s", "mode");
	for (i = 0; i < ARRAY_SIZE(phases); i++)
		printf(" %10s", phases[i].name);
	printf(" %12s %12s %10s %6s\n", "enable", "populate", "empty", "full");

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
		measure(&r);
		report_text(&r);
		if (json)
			report_json(json, &r);
		done |= 1u << i;
	}
	if (json && json != stdout && fclose(json))
		fail("writing the JSON lines: %s", strerror(errno));
	if (!done || (want & ~done))
		return KSFT_SKIP;
	return 0;
}
