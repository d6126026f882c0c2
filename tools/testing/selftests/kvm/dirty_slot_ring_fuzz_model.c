// SPDX-License-Identifier: GPL-2.0-only
/*
 * The fuzzer of dirty slot rings: the model, which knows for each page of each log
 * whether it is in it.
 */
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>

#include "dirty_slot_ring_fuzz.h"

struct model m;

/* -- rings as the checker sees them ---------------------------------------- */

void ring_look(struct mring *r)
{
	r->producer = dsr_producer(&r->map);
	r->reset = dsr_reset_marker(&r->map);
	r->overflowed = dsr_overflowed(&r->map);
}

static void ring_map(struct mlog *l, uint32_t n)
{
	const struct kvm_dirty_slot_log_info info = {
		.entries = l->entries, .stride = l->stride,
		.consumers_size = l->area, .rings_offset = l->area,
	};

	CHECK_OK(__dsr_map(l->fd[EX_MAIN], &info, n, &l->ring[n].map));
	ring_look(&l->ring[n]);
}

/* To be asked before each call that looks at consumers. */
bool log_bad_consumer(struct mlog *l)
{
	struct mring *r;
	bool bad = false;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		r->consumer = dsr_consumer(&r->map);
		bad |= r->consumer - r->reset > r->producer - r->reset;
	}
	return bad;
}

/* Nothing happened since the checker last looked, but to consumer. */
void log_unchanged(const struct mlog *l)
{
	const struct mring *r;
	struct mring now;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		now.map = r->map;
		ring_look(&now);
		CHECK(now.producer == r->producer && now.reset == r->reset &&
		      now.overflowed == r->overflowed,
		      "slot %d ring %ld: producer %lu reset %lu overflowed %lu, were %lu %lu %lu",
		      l->slot, r - l->ring, now.producer, now.reset, now.overflowed,
		      r->producer, r->reset, r->overflowed);
	}
}

void all_unchanged(void)
{
	struct mlog *l;

	for (l = m.log; l < m.log + NR_LOGS; l++) {
		if (l->used)
			log_unchanged(l);
	}
}

/* After a call that may have moved reset and consumer. */
void log_moved(struct mlog *l, bool all)
{
	struct mring *r;
	uint64_t reset, consumer;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		reset = dsr_reset_marker(&r->map);
		consumer = dsr_consumer(&r->map);
		CHECK(dsr_producer(&r->map) == r->producer &&
		      dsr_overflowed(&r->map) == r->overflowed,
		      "producer %lu, was %lu", dsr_producer(&r->map), r->producer);
		CHECK(reset >= r->reset && reset <= consumer && consumer <= r->producer,
		      "was reset %lu, now reset %lu consumer %lu producer %lu", r->reset, reset,
		      consumer, r->producer);
		CHECK(!all || reset == r->producer, "reset %lu producer %lu", reset, r->producer);
		r->reset = reset;
	}
}

struct bounds log_count(const struct mlog *l)
{
	struct bounds b = { 0 };
	unsigned int i;

	for (i = 0; i < l->npages; i++) {
		b.yes += l->in[i] == YES;
		b.maybe += l->in[i] == MAYBE;
	}
	return b;
}

/* What the mapping's reader collected leaves the log. */
struct bounds log_collect(struct mlog *l)
{
	struct bounds b = { 0 };
	struct kvm_dirty_run run;
	struct mring *r;
	uint64_t i;
	uint32_t p;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		for (i = r->reset; i != r->consumer; i++) {
			run = dsr_entry(&r->map, i);
			for (p = run.offset; p < run.offset + run.npages; p++) {
				b.yes += l->in[p] == YES;
				b.maybe += l->in[p] == MAYBE;
				l->in[p] = NO;
			}
		}
	}
	return b;
}

/* Is a page in the log that no entry between reset and producer names? */
bool log_must_overflow(const struct mlog *l)
{
	uint8_t indexed[MAX_PAGES] = { 0 };
	struct kvm_dirty_run run;
	const struct mring *r;
	uint64_t i;
	uint32_t p;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		for (i = r->reset; i != r->producer; i++) {
			run = dsr_entry(&r->map, i);
			memset(indexed + run.offset, 1, run.npages);
		}
	}
	for (p = 0; p < l->npages; p++) {
		if (l->in[p] == YES && !indexed[p])
			return true;
	}
	return false;
}

void log_heal(struct mlog *l)
{
	struct mring *r;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		if (dsr_consumer(&r->map) - r->reset > r->producer - r->reset)
			dsr_set_consumer(&r->map, r->reset);
	}
}

/* How many runs HARVEST can make of what is in the log. */
void runs_bounds(const struct mlog *l, uint32_t capacity, uint32_t *lo, uint32_t *hi)
{
	struct bounds b = log_count(l);
	bool maybe = false;
	uint32_t i;

	*lo = *hi = 0;
	for (i = 0; i < l->npages; i++) {
		if (l->in[i] == MAYBE)
			maybe = true;
		if (l->in[i] == NO)
			continue;
		if (!i || !l->in[i - 1])
			++*lo;
		if (!i || !l->in[i - 1] || !(i % 64))
			++*hi;
	}
	if (maybe)
		*lo = !!b.yes;
	/*
	 * A page that a vCPU marked last may be in flight for all a harvest knows, and is
	 * taken by itself, maybe out of the midst of others that were marked without it.
	 */
	*hi = min(*hi + 2 * m.nr_vcpus, b.yes + b.maybe);
	/* With room for fewer runs than a word can have, neighbours are not taken together. */
	if (maybe || *hi + 32 > capacity)
		*hi = b.yes + b.maybe;
}

void check_answer(struct mlog *l, const struct kvm_dirty_run *runs, uint32_t nr,
		  uint64_t nr_pages)
{
	struct kvm_dirty_run run;
	uint64_t sum = 0;
	uint32_t i, p;

	for (i = 0; i < nr; i++) {
		memcpy(&run, &runs[i], sizeof(run));	/* it may stand anywhere */
		CHECK(run.npages && (uint64_t)run.offset + run.npages <= l->npages,
		      "run %u is %u + %u of %u pages", i, run.offset, run.npages, l->npages);
		for (p = run.offset; p < run.offset + run.npages; p++) {
			CHECK(l->in[p] != NO,
			      "slot %d: page %u was reported (run %u of %u: %u + %u) and is not in the log, or twice",
			      l->slot, p, i, nr, run.offset, run.npages);
			l->in[p] = NO;
		}
		sum += run.npages;
	}
	CHECK(sum == nr_pages, "nr_pages is %lu, in the runs are %lu", nr_pages, sum);
}

void check_nothing_left(const struct mlog *l)
{
	uint32_t p;

	for (p = 0; p < l->npages; p++)
		CHECK(l->in[p] != YES, "slot %d: page %u was lost", l->slot, p);
}

/* -- logs and slots that come and go --------------------------------------- */

/* A ring holds no more than its slot has pages. */
static uint32_t ring_entries(uint32_t npages)
{
	uint32_t n = 1;

	while (n < npages && n < m.entries)
		n *= 2;
	return n;
}

int open_log(int s)
{
	int fd = dsr_open(m.vm, FIRST_SLOT + s);

	CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC, "not O_CLOEXEC");
	return fd;
}

void log_add_rings(struct mlog *l, int nr)
{
	for (; l->nr_rings < nr; l->nr_rings++)
		ring_map(l, l->nr_rings);
}

void log_forget(struct mlog *l)
{
	uint32_t i;
	int ex;

	/* Files of all logs would have what is left of a dead one. */
	if (l->dead)
		harvest_all(l);
	for (i = 0; i < l->nr_rings; i++)
		dsr_unmap(&l->ring[i].map);
	for (ex = 0; ex < NR_EX; ex++)
		fd_close(l->fd, ex);
	l->used = false;
}

void set_slot(int s, bool log)
{
	struct mslot *slot = &m.slot[s];

	CHECK_OK(__vm_set_user_memory_region(m.vm, FIRST_SLOT + s,
					     log ? KVM_MEM_LOG_DIRTY_PAGES : 0,
					     SLOT_GPA(s, slot->place),
					     slot->exists ? slot->npages * PG : 0, memory[s]));
}

static void layout_changes(void)
{
	int i;

	for (i = 0; i < NR_ALL; i++)
		m.all[i].layout = YES;
}

void model_log_dies(struct mslot *slot)
{
	if (slot->log) {
		slot->log->dead = true;
		layout_changes();
	}
	slot->log = NULL;
}

/* The log of a slot, as if it were new. */
void model_log_open(int s)
{
	struct mslot *slot = &m.slot[s];
	struct kvm_dirty_slot_log_info info;
	struct mlog *l;

	/* Room: the oldest is as good as any. */
	for (l = m.log; l < m.log + NR_LOGS && l->used; l++)
		;
	if (l == m.log + NR_LOGS) {
		do
			l = &m.log[below(NR_LOGS)];
		while (!l->dead);
		log_forget(l);
	}

	*l = (struct mlog){
		.used = true, .slot = s, .npages = slot->npages,
		.base_gfn = SLOT_GPA(s, slot->place) / PG,
		.fd = { -1, -1, -1, -1 },
	};
	l->fd[EX_MAIN] = open_log(s);
	CHECK_OK(ioctl(l->fd[EX_MAIN], KVM_DIRTY_SLOT_LOG_INFO, &info));
	CHECK(info.npages == l->npages && info.nr_rings == m.nr_vcpus, "%llu pages, %u rings",
	      info.npages, info.nr_rings);
	CHECK(info.consumers_size == info.rings_offset && !(info.rings_offset % PG) &&
	      info.rings_offset >= MAX_VCPUS * KVM_DIRTY_SLOT_CONSUMER_STRIDE,
	      "%llu bytes of consumers, rings at %llu", info.consumers_size, info.rings_offset);
	m.nr_logs = max(m.nr_logs, info.log);
	l->nr = info.log;
	l->stride = info.stride;
	l->area = info.consumers_size;
	l->entries = ring_entries(l->npages);
	if (m.manual & KVM_DIRTY_LOG_INITIALLY_SET) {
		memset(l->in, YES, l->npages);
		l->spill = true;
	}
	log_add_rings(l, m.nr_vcpus);
	slot->log = l;
}

/* A slot begins to log. */
void model_log_new(int s)
{
	uint32_t nr = m.nr_logs;

	layout_changes();
	model_log_open(s);
	/* They count up, whatever slot they are of. */
	CHECK(m.slot[s].log->nr == nr + 1, "log %u after %u", m.slot[s].log->nr, nr);
}

uint32_t some_size(void)
{
	static const uint32_t sizes[] = { 1, 2, 63, 64, 65, 127, 200, 515, 700 };

	return sizes[below(ARRAY_SIZE(sizes))];
}

/* -- what guests do to it ------------------------------------------------- */

/*
 * The guest's pages from @from to @to (of its walk) were written or read, and
 * maybe @one_more.  That one is where the next part begins: if the write was
 * done before the vCPU left, as it can be with PML, it is not done again.
 */
void model_touch(struct mlog *l, struct mring *r, const struct mailbox *mb, uint64_t from,
		 uint64_t to, bool one_more)
{
	uint64_t sure = from + !!from;
	uint64_t pushed, over, i, p, lo = 0, hi, producer = dsr_producer(&r->map);
	bool read = mb->op == OP_READ;
	uint8_t fresh[MAX_PAGES] = { 0 };
	struct kvm_dirty_run run;
	bool late = false;

	pushed = producer - r->producer;
	over = dsr_overflowed(&r->map) - r->overflowed;
	for (i = from, hi = 0; i < to + one_more && i < mb->count; i++) {
		p = (mb->first + i * mb->step) % mb->npages;
		if (l->in[p] == YES || fresh[p])
			continue;
		fresh[p] = 1;
		hi++;
		if (l->in[p] == NO && !read && i >= sure && i < to)
			lo++;
		else
			late = true;	/* or not, see below */
	}
	CHECK(pushed + over >= lo && pushed + over <= hi,
	      "%lu pages pushed, %lu overflowed, should be %lu to %lu", pushed, over, lo, hi);
	CHECK(producer - r->reset <= l->entries, "producer %lu reset %lu", producer, r->reset);

	for (i = r->producer; i != producer; i++) {
		run = dsr_entry(&r->map, i);
		for (p = run.offset; p < (uint64_t)run.offset + run.npages; p++) {
			CHECK(p < l->npages && fresh[p],
			      "entry %lu names page %lu, which is not new", i, p);
			fresh[p] = 0;
			l->in[p] = YES;
		}
	}
	/* What is left overflowed, all of it if the numbers say so. */
	for (p = 0; p < l->npages; p++) {
		if (!fresh[p])
			continue;
		if (!late || over == hi - pushed)
			l->in[p] = YES;
		else if (over || l->in[p] == MAYBE)
			l->in[p] = MAYBE;
	}
	/* Those that were surely written. */
	for (i = sure; !read && i < to; i++)
		l->in[(mb->first + i * mb->step) % mb->npages] = YES;
	if (over)
		l->spill = true;
	ring_look(r);
}

void check_full(int v)
{
	uint32_t id = m.vcpu[v]->run->dirty_slot_ring.slot, s = id - FIRST_SLOT;
	struct mring *r;

	CHECK(s < NR_SLOTS && m.slot[s].log, "full ring in slot %u", id);
	r = &m.slot[s].log->ring[v];
	CHECK(dsr_producer(&r->map) - dsr_reset_marker(&r->map) == m.slot[s].log->entries,
	      "full ring with producer %lu and reset %lu", dsr_producer(&r->map),
	      dsr_reset_marker(&r->map));
}
