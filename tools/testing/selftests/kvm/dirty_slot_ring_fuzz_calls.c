// SPDX-License-Identifier: GPL-2.0-only
/*
 * The fuzzer of dirty slot rings: calls on a log, with arguments good and bad, and
 * stores to consumers, one at a time.
 */
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>

#include "dirty_slot_ring_fuzz.h"

/* -- where arguments are -------------------------------------------------- */

/* The header is in the first page; others are odd places for it. */
void *header_at(int where, size_t size)
{
	switch (where) {
	case AT_NULL:
		return NULL;
	case AT_READONLY:
		return arena_ro;
	case AT_END:	/* all but its last bytes */
		return arena + ARENA_PAGES * PG - size + 1 + below(size - 1);
	case AT_NONE:
		return arena + ARENA_PAGES * PG;
	case AT_KERNEL:
		return (void *)KERNEL_ADDRESS;
	default:
		return arena;
	}
}

int some_header_place(void)
{
	return once_in(40) ? below(AT_KERNEL + 1) : AT_GOOD;
}

#define ARENA_RUNS	((ARENA_PAGES - 1) * PG / sizeof(struct kvm_dirty_run))

/* An array of up to @want accessible runs, each of @size. */
struct array some_array(uint32_t want, size_t size)
{
	struct array a = { (void *)(arena + PG), (ARENA_PAGES - 1) * PG / size, true };

	if (!once_in(8))
		return a;
	a.good = false;
	switch (below(6)) {
	case 0:
		a.runs = NULL;
		a.room = 0;
		break;
	case 1:
		a.runs = (void *)KERNEL_ADDRESS;
		a.room = 0;
		break;
	case 2:
		a.runs = (void *)(arena + PG + 1 + below(7));
		a.room--;
		break;
	default:
		a.room = below(want + 1);
		a.runs = (void *)(arena + ARENA_PAGES * PG) - a.room * size - below(size);
	}
	return a;
}

/* Garbage in a header, now and then; true if it makes the call fail. */
bool spoil_reserved(__u64 *reserved, int n)
{
	if (!once_in(50))
		return false;
	reserved[below(n)] = once_in(2) ? rnd() | 1 : 1ul << below(64);
	return true;
}

/* -- steps: the calls ----------------------------------------------------- */

struct harvest {
	struct array array;
	uint32_t capacity, flags;
	int where;
	bool einval, overlap;
	__u64 reserved[2];
};

/* A call that failed can be made again as it was; an array may be over it. */
static void harvest_unchanged(const struct harvest *h, const struct kvm_dirty_slot_runs *args)
{
	CHECK(h->overlap || (args->nr_runs == h->capacity && args->flags == h->flags),
	      "an error changed the arguments: nr_runs %u, flags %#x", args->nr_runs, args->flags);
}

static void harvest(struct mlog *l, int ex, const struct harvest *h)
{
	struct kvm_dirty_slot_runs *good = (void *)arena, *args, out;
	struct bounds collected, b;
	struct op_note *t;
	uint32_t lo, hi;
	bool bad;
	int ret;

	args = header_at(h->where, sizeof(*args));
	*good = (struct kvm_dirty_slot_runs){
		.runs = (uintptr_t)(h->overlap ? (void *)args : h->array.runs),
		.nr_runs = h->capacity,
		.flags = h->flags,
		.nr_pages = rnd(),
		.reserved = { h->reserved[0], h->reserved[1] },
	};
	bad = log_bad_consumer(l);
	t = note("HARVEST log, capacity, flags, room", l - m.log, h->capacity, h->flags,
		 h->array.room);
	t->ex = ex;
	ret = fd_call(l->fd, ex, KVM_DIRTY_SLOT_LOG_HARVEST, args);
	t->ret = ret;
	t->err = errno;
	out = *good;

	if (h->where != AT_GOOD && h->where != AT_READONLY) {
		CHECK(ret == -1 && errno == EFAULT, "a header that is not there gave %d", ret);
		log_unchanged(l);
		return;
	}
	if (h->einval) {
		CHECK(ret == -1 && errno == EINVAL, "a bad field gave %d", ret);
		log_unchanged(l);
		return;
	}
	if (h->where == AT_READONLY) {
		CHECK(ret == -1 && errno == EFAULT, "a read-only header gave %d", ret);
		log_unchanged(l);
		return;
	}
	if (bad) {
		CHECK(ret == -1 && errno == EINVAL, "a bad consumer gave %d", ret);
		harvest_unchanged(h, &out);
		log_unchanged(l);
		return;
	}

	collected = log_collect(l);
	b = log_count(l);
	runs_bounds(l, h->capacity, &lo, &hi);
	if (ret && errno == ENODEV) {
		CHECK(l->dead && !b.yes && !collected.yes,
		      "%u pages left, %u collected, dead %d", b.yes, collected.yes, l->dead);
		check_nothing_left(l);
		memset(l->in, NO, sizeof(l->in));
		l->spill = false;
		log_moved(l, true);
		return;
	}
	if (ret) {
		CHECK(errno == EFAULT && !h->overlap && h->array.room < min(hi, h->capacity),
		      "HARVEST of %u pages in %u to %u runs gave %d", b.yes, lo, hi, ret);
		harvest_unchanged(h, &out);
		l->spill = true;
		log_moved(l, false);
		return;
	}
	CHECK(!l->dead || b.yes || b.maybe || collected.yes || collected.maybe,
	      "the log is dead and empty, but HARVEST worked");
	if (h->overlap) {
		/* It was told, but cannot be read. */
		for (lo = 0; lo < l->npages; lo++)
			l->in[lo] = l->in[lo] ? MAYBE : NO;
		l->spill = true;
		log_moved(l, false);
		return;
	}
	CHECK(h->array.room >= min(min(lo, h->capacity), BATCH_LEAST),
	      "at least %u runs, room for %u, and no EFAULT", lo, h->array.room);
	CHECK(out.nr_runs <= h->capacity && out.nr_runs <= h->array.room,
	      "%u runs, capacity %u, room %u", out.nr_runs, h->capacity, h->array.room);
	CHECK(!(out.flags & ~KVM_DIRTY_HARVEST_MORE) && !out.reserved[0] && !out.reserved[1],
	      "flags out %#x", out.flags);
	check_answer(l, h->array.runs, out.nr_runs, out.nr_pages);
	b = log_count(l);
	if (out.flags & KVM_DIRTY_HARVEST_MORE) {
		CHECK(b.yes + b.maybe, "MORE, but there is no more");
		CHECK(out.nr_runs == h->capacity || h->array.room < hi,
		      "MORE, with %u runs for a capacity of %u", out.nr_runs, h->capacity);
		l->spill = true;
		log_moved(l, false);
		return;
	}
	check_nothing_left(l);
	memset(l->in, NO, sizeof(l->in));
	l->spill = false;
	log_moved(l, true);
}

void harvest_all(struct mlog *l)
{
	struct harvest h = {
		.array = { (void *)(arena + PG), ARENA_RUNS, true }, .capacity = ARENA_RUNS,
	};

	log_heal(l);
	harvest(l, EX_MAIN, &h);
}

void step_harvest(struct mlog *l)
{
	static const uint32_t capacities[] = { 1, 1, 2, 3, 8, 64, 256, 499, 500, 501, 1000, 4000 };
	struct harvest h = {
		.capacity = capacities[below(ARRAY_SIZE(capacities))],
		.where = some_header_place(),
	};

	if (once_in(50))
		h.capacity = -1u - below(2);
	h.array = some_array(once_in(2) ? 8 : 600, sizeof(struct kvm_dirty_run));
	/* Room is what can be had, whatever the capacity is. */
	h.flags = below(4);
	if (once_in(50)) {
		h.flags |= 4u << below(30);
		h.einval = true;
	}
	if (once_in(50)) {
		h.capacity = 0;
		h.einval = true;
	}
	if (spoil_reserved(h.reserved, 2))
		h.einval = true;
	h.overlap = h.where == AT_GOOD && once_in(100);
	harvest(l, some_ex(), &h);
}

void step_reset(struct mlog *l)
{
	struct kvm_dirty_slot_reset *good = (void *)arena, *args, out;
	int ret, ex = some_ex(), where = some_header_place();
	bool bad, einval = false, empty = true, spill = l->spill;
	struct bounds b;
	struct op_note *t;
	struct mring *r;

	args = header_at(where, sizeof(*args));
	*good = (struct kvm_dirty_slot_reset){
		.nr_pages = rnd(), .flags = once_in(4) ? KVM_DIRTY_RESET_OVERFLOW : 0,
	};
	if (once_in(30)) {
		good->flags |= 2u << below(31);
		einval = true;
	}
	if (once_in(50)) {
		good->pad = 1u << below(32);
		einval = true;
	}
	if (spoil_reserved(good->reserved, 2))
		einval = true;
	bad = log_bad_consumer(l);
	for (r = l->ring; r < l->ring + l->nr_rings; r++)
		empty &= r->reset == r->producer;
	t = note("RESET log", l - m.log, where, good->flags, 0);
	t->ex = ex;
	ret = fd_call(l->fd, ex, KVM_DIRTY_SLOT_LOG_RESET, args);
	t->ret = ret;
	t->err = errno;
	out = *good;

	if (where != AT_GOOD || einval || bad) {
		if (where != AT_GOOD && where != AT_READONLY)
			einval = false;
		else if (!einval && where == AT_GOOD)
			einval = true;
		CHECK(ret == -1 && errno == (einval ? EINVAL : EFAULT), "bad RESET gave %d", ret);
		log_unchanged(l);
		return;
	}

	b = log_collect(l);
	if (ret) {
		CHECK(errno == ENODEV && l->dead && empty, "RESET gave %d", ret);
		check_nothing_left(l);
		memset(l->in, NO, sizeof(l->in));
		return;
	}
	CHECK(!l->dead || !empty || spill, "the log is dead and empty, but RESET worked");
	CHECK(out.nr_pages >= b.yes && out.nr_pages <= b.yes + b.maybe,
	      "RESET of %llu pages, should be %u to %u", out.nr_pages, b.yes, b.yes + b.maybe);
	CHECK(!(out.flags & ~KVM_DIRTY_RESET_OVERFLOW), "flags out %#x", out.flags);
	log_moved(l, false);
	for (r = l->ring; r < l->ring + l->nr_rings; r++)
		CHECK(r->reset == dsr_consumer(&r->map), "reset %lu consumer %lu", r->reset,
		      dsr_consumer(&r->map));
	CHECK(l->spill || !out.flags, "OVERFLOW, but nothing overflowed");
	CHECK(out.flags || !l->spill || !log_must_overflow(l), "no OVERFLOW, but there is");
}

/* MARK and DISCARD. */
void step_runs(struct mlog *l, bool mark)
{
	struct kvm_dirty_slot_runs *good = (void *)arena, *args;
	static const uint32_t counts[] = { 0, 1, 1, 1, 2, 3, 16, 31, 32, 33, 100 };
	uint32_t nr = counts[below(ARRAY_SIZE(counts))], i, p, npages;
	int where = some_header_place(), ret, ex = some_ex(), want = 0;
	bool einval = false, efault, bad_run = false;
	struct array a = some_array(nr, sizeof(struct kvm_dirty_run));
	struct kvm_dirty_run run;
	struct bounds b = { 0 };
	struct op_note *t;
	uint8_t before;

	args = header_at(where, sizeof(*args));
	efault = a.room < nr;
	for (i = 0; i < min(nr, a.room); i++) {
		npages = once_in(8) ? 1 + below(l->npages) : 1 + below(min(l->npages, 4u));
		run.offset = below(l->npages - npages + 1);
		run.npages = npages;
		if (once_in(200)) {
			bad_run = true;
			switch (below(4)) {
			case 0:
				run.npages = 0;
				break;
			case 1:
				run.offset = l->npages - run.npages + 1 + below(3);
				break;
			case 2:
				run.npages = -1u - below(l->npages);
				break;
			case 3:
				run.offset = -run.npages;
				break;
			}
		}
		memcpy(&a.runs[i], &run, sizeof(run));
	}
	*good = (struct kvm_dirty_slot_runs){
		.runs = (uintptr_t)a.runs, .nr_runs = nr, .nr_pages = rnd(),
	};
	if (once_in(50)) {
		good->flags = 1u << below(32);
		einval = true;
	}
	if (spoil_reserved(good->reserved, 2))
		einval = true;

	t = note(mark ? "MARK log, runs, room" : "DISCARD log, runs, room", l - m.log, nr, a.room,
		 nr && a.room ? (uint64_t)run.offset << 32 | run.npages : 0);
	t->ex = ex;
	ret = fd_call(l->fd, ex, mark ? KVM_DIRTY_SLOT_LOG_MARK : KVM_DIRTY_SLOT_LOG_DISCARD, args);
	t->ret = ret;
	t->err = errno;

	if (where != AT_GOOD && where != AT_READONLY)
		want = EFAULT;
	else if (einval)
		want = EINVAL;
	else if (where == AT_READONLY)
		want = EFAULT;
	else if (l->dead)
		want = ENODEV;
	if (want) {
		CHECK(ret == -1 && errno == want, "gave %d, not errno %d", ret, want);
		return;
	}
	if (bad_run || efault) {
		CHECK(ret == -1 && ((bad_run && errno == EINVAL) || (efault && errno == EFAULT)),
		      "bad run %d, bad array %d, gave %d", bad_run, efault, ret);
		CHECK(!good->nr_pages, "failed, but says %llu pages", good->nr_pages);
		return;
	}
	for (i = 0; i < nr; i++) {
		memcpy(&run, &a.runs[i], sizeof(run));
		for (p = run.offset; p < run.offset + run.npages; p++) {
			before = l->in[p];
			l->in[p] = mark ? YES : NO;
			b.yes += before == (mark ? NO : YES);
			b.maybe += before == MAYBE;
		}
	}
	CHECK(!ret && good->nr_pages >= b.yes && good->nr_pages <= b.yes + b.maybe,
	      "gave %d and %llu pages, should be %u to %u", ret, good->nr_pages, b.yes,
	      b.yes + b.maybe);
	if (mark && good->nr_pages)
		l->spill = true;
}

void step_info(struct mlog *l)
{
	struct kvm_dirty_slot_log_info *info = (void *)arena, *args;
	int ex = some_ex(), where = some_header_place(), ret;
	struct op_note *t = note("INFO log", l - m.log, where, 0, 0);

	args = header_at(where, sizeof(*args));
	memset(info, 0xa5, sizeof(*info));
	t->ex = ex;
	ret = fd_call(l->fd, ex, KVM_DIRTY_SLOT_LOG_INFO, args);
	t->ret = ret;
	t->err = errno;
	if (where != AT_GOOD) {
		CHECK(ret == -1 && errno == EFAULT, "gave %d", ret);
		return;
	}
	CHECK(!ret && info->slot == FIRST_SLOT + l->slot && info->nr_rings == l->nr_rings &&
	      info->entries == l->entries && info->stride == l->stride &&
	      info->npages == l->npages && info->base_gfn == l->base_gfn &&
	      info->flags == (l->dead ? KVM_DIRTY_SLOT_LOG_DEAD : 0) &&
	      info->log == l->nr && info->consumers_size == l->area &&
	      info->rings_offset == l->area && !info->pad && !info->reserved,
	      "gave %d: slot %u rings %u entries %u stride %llu npages %llu gfn %#llx flags %#x",
	      ret, info->slot, info->nr_rings, info->entries, info->stride, info->npages,
	      info->base_gfn, info->flags);
}

/* Calls that do not exist, with whatever argument. */
void step_garbage(struct mlog *l)
{
	unsigned long cmd = once_in(2) ? rnd() :
			    KVM_DIRTY_SLOT_LOG_HARVEST ^ (1ul << below(32));
	int ex = some_ex(), ret;
	struct op_note *t;

	cmd &= 0xffffffff;
	switch (cmd) {
	case KVM_DIRTY_SLOT_LOG_INFO:
	case KVM_DIRTY_SLOT_LOG_HARVEST:
	case KVM_DIRTY_SLOT_LOG_RESET:
	case KVM_DIRTY_SLOT_LOG_MARK:
	case KVM_DIRTY_SLOT_LOG_DISCARD:
		return;
	}
	/* Those that the VFS has an answer to are not ours: FIOCLEX and so on. */
	if ((cmd >> 8 & 0xff) == 0x54 || (cmd >> 8 & 0xff) == 0x58 || cmd < 3)
		return;
	t = note("ioctl log, cmd", l - m.log, cmd, 0, 0);
	t->ex = ex;
	ret = fd_call(l->fd, ex, cmd, (void *)(once_in(2) ? rnd() : (uintptr_t)arena));
	t->ret = ret;
	t->err = errno;
	CHECK(ret == -1 && errno == ENOTTY, "ioctl %#lx gave %d", cmd, ret);
	log_unchanged(l);
}

void step_poll(struct mlog *l)
{
	uint64_t level = l->dead ? 1 : DIV_ROUND_UP(l->entries, 2);
	struct pollfd pfd = { .fd = l->fd[EX_MAIN], .events = POLLIN };
	bool ring = false;
	struct mring *r;
	int ret;

	nr_ops++;
	for (r = l->ring; r < l->ring + l->nr_rings; r++)
		ring |= r->producer - r->reset >= level;
	ret = poll(&pfd, 1, 0);
	note("poll log, revents", l - m.log, pfd.revents, 0, 0)->ret = ret;
	CHECK(ret >= 0 && !!(pfd.revents & POLLHUP) == l->dead, "poll gave %d, %#x", ret,
	      pfd.revents);
	if (pfd.revents & POLLIN)
		CHECK(ring || l->spill, "readable, with nothing to read");
	else
		CHECK(!ring && (!l->spill || !log_must_overflow(l)), "not readable");
}

void step_consumer(struct mlog *l)
{
	uint64_t consumer, value;
	struct mring *r;

	nr_ops++;
	if (!l->nr_rings)
		return;
	r = &l->ring[below(l->nr_rings)];
	consumer = dsr_consumer(&r->map);
	if (consumer - r->reset > r->producer - r->reset || once_in(4))
		value = r->reset + below(r->producer - r->reset + 1);
	else
		value = consumer + below(r->producer - consumer + 1);
	if (once_in(20)) {
		switch (below(5)) {
		case 0:
			value = r->reset - 1 - below(3);
			break;
		case 1:
			value = r->producer + 1 + below(3);
			break;
		case 2:
			value = r->producer + l->entries;
			break;
		case 3:
			value = 0;
			break;
		default:
			value = rnd();
		}
	}
	note("consumer log, ring, value, was", l - m.log, r - l->ring, value, consumer);
	dsr_set_consumer(&r->map, value);
}
