// SPDX-License-Identifier: GPL-2.0-only
/*
 * The perf test of dirty slot rings: the guest, the pages that it writes, and the
 * three measurements: cost, stall and memory.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <linux/sizes.h>

#include "dirty_slot_ring_perf.h"

void fail(const char *fmt, ...)
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

enum caches { CACHES_GUEST = 1, CACHES_COLLECT, CACHES_NEITHER, CACHES_FORGET, CACHES_REPORT };

/*
 * Says what comes next to a model of caches, if there is one: a plug-in of the emulator
 * that this runs in.  An instruction that does nothing everywhere else.
 */
static __always_inline void tell_caches(const enum caches what)
{
#ifdef __x86_64__
	asm volatile("nopl %c0(%%rax)" : : "i" (0x4b436100 + what) : "memory");
#endif
}

/* -- the guest ------------------------------------------------------------ */

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

/* Find the pages and re-arm them, both timed. */
static void collect(struct run *r)
{
	uint64_t t0;

	tell_caches(CACHES_COLLECT);
	t0 = now_ns();
	r->mode->harvest(r);
	r->now.harvest += ns_since(t0);
	if (r->mode->reprotect) {
		t0 = now_ns();
		r->mode->reprotect(r);
		r->now.reprotect += ns_since(t0);
	}
	tell_caches(CACHES_NEITHER);
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
		tell_caches(CACHES_GUEST);
		t0 = now_ns();
		vcpu_run(r->vcpu[i]);
		ns += now_ns() - t0;
		tell_caches(CACHES_NEITHER);

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
	int i;

	/* Room for the page tables of the slot and the list. */
	r->vm = __vm_create(VM_SHAPE_DEFAULT, p->nr_vcpus,
			    2048 + p->size / SZ_1G + list_pages);
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
	guest_map(r->vm, DATA_GVA, DATA_GPA, align_up(p->size, SZ_1G));

	vm_userspace_mem_region_add(r->vm, VM_MEM_SRC_ANONYMOUS, LIST_GPA, LIST_SLOT,
				    list_pages, 0);
	virt_map(r->vm, LIST_GVA, LIST_GPA, list_pages);
	r->list = addr_gpa2hva(r->vm, LIST_GPA);

	for (i = 0; i < p->nr_vcpus; i++) {
		r->vcpu[i] = vm_vcpu_add(r->vm, i, guest_main);
		vcpu_args_set(r->vcpu[i], 1, i);
		r->mb[i] = (struct mailbox *)addr_gva2hva(r->vm, (uintptr_t)mailboxes) + i;
	}
	r->tsc_khz = guest_cycles_khz(r->vcpu[0]);

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

void measure(struct run *r)
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
		if (!i)
			tell_caches(CACHES_FORGET);
		dirty(r, nr, ++last_value);
		collect(r);
		check_reported(r, nr, last_value);
		if (i >= 0)
			r->samples[i] = r->now;
	}

	tell_caches(CACHES_REPORT);

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

void stall(struct run *r)
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
	uint64_t gap = align_up(r->p->size, SZ_1G);
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
void measure_memory(struct run *r)
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
