// SPDX-License-Identifier: GPL-2.0-only
/*
 * The fuzzer of dirty slot rings: the files that have the logs of all memslots, one
 * call at a time.
 *
 * What a harvest gets to depends on turns that the model does not know.  Each ring
 * tells: if its reset has moved, the harvest was there.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "dirty_slot_ring_fuzz.h"

void all_open(struct mall *a)
{
	*a = (struct mall){ .fd = { -1, -1, -1, -1 }, .layout = NO };
	a->fd[EX_MAIN] = dsr_open(m.vm, KVM_DIRTY_SLOT_ALL);
	CHECK(fcntl(a->fd[EX_MAIN], F_GETFD) & FD_CLOEXEC, "not O_CLOEXEC");
}

void all_close(struct mall *a)
{
	int ex;

	for (ex = 0; ex < NR_EX; ex++)
		fd_close(a->fd, ex);
}

/* The next that is used after @l, or the first. */
static struct mlog *next_log(struct mlog *l)
{
	for (l = l ? l + 1 : m.log; l < m.log + NR_LOGS; l++) {
		if (l->used)
			return l;
	}
	return NULL;
}

/* What userspace had collected leaves the log where the harvest was. */
static unsigned int collect(struct mlog *l)
{
	struct kvm_dirty_run run;
	unsigned int n = 0;
	struct mring *r;
	uint64_t i;
	uint32_t p;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		if (dsr_reset_marker(&r->map) == r->reset ||
		    r->consumer - r->reset > r->producer - r->reset)
			continue;
		for (i = r->reset; i != r->consumer; i++) {
			run = dsr_entry(&r->map, i);
			for (p = run.offset; p < run.offset + run.npages; p++) {
				n += l->in[p] != NO;
				l->in[p] = NO;
			}
		}
	}
	return n;
}

/* A ring that the harvest was at is as it should be; others are as they were. */
static void moved(struct mlog *l)
{
	uint64_t reset, consumer;
	struct mring *r;

	for (r = l->ring; r < l->ring + l->nr_rings; r++) {
		reset = dsr_reset_marker(&r->map);
		consumer = dsr_consumer(&r->map);
		CHECK(dsr_producer(&r->map) == r->producer &&
		      dsr_overflowed(&r->map) == r->overflowed,
		      "producer %lu, was %lu", dsr_producer(&r->map), r->producer);
		CHECK((reset == r->reset && consumer == r->consumer) ||
		      (reset >= r->reset && reset <= consumer && consumer <= r->producer),
		      "was reset %lu, now reset %lu consumer %lu producer %lu", r->reset, reset,
		      consumer, r->producer);
		r->reset = reset;
	}
}

static void all_moved(bool nothing_left)
{
	struct mlog *l;

	for (l = next_log(NULL); l; l = next_log(l)) {
		moved(l);
		l->spill = !nothing_left;
		if (!nothing_left)
			continue;
		check_nothing_left(l);
		memset(l->in, NO, sizeof(l->in));
	}
}

/* The runs of one log follow one another. */
static void check_runs(const void *array, uint32_t nr, uint64_t nr_pages)
{
	struct kvm_dirty_vm_run run;
	struct kvm_dirty_run one;
	struct mlog *l, *last = NULL;
	bool seen[NR_LOGS] = { 0 };
	uint64_t sum = 0;
	uint32_t i;

	for (i = 0; i < nr; i++) {
		memcpy(&run, array + i * sizeof(run), sizeof(run));
		for (l = m.log; l < m.log + NR_LOGS; l++) {
			if (l->used && l->nr == run.log)
				break;
		}
		CHECK(l < m.log + NR_LOGS && run.slot == FIRST_SLOT + l->slot,
		      "run %u of slot %u, log %u", i, run.slot, run.log);
		CHECK(l == last || !seen[l - m.log], "run %u of log %u again", i, run.log);
		seen[l - m.log] = true;
		last = l;
		one = (struct kvm_dirty_run){ run.offset, run.npages };
		check_answer(l, &one, 1, run.npages);
		sum += run.npages;
	}
	CHECK(sum == nr_pages, "nr_pages is %lu, in the runs are %lu", nr_pages, sum);
}

void step_all_harvest(struct mall *a)
{
	static const uint32_t capacities[] = { 1, 1, 2, 3, 8, 64, 256, 400, 1000, 2000 };
	struct kvm_dirty_vm_harvest *good = (void *)arena, *args, out;
	uint32_t capacity = capacities[below(ARRAY_SIZE(capacities))], lo, hi, runs = 0;
	unsigned int yes = 0, maybe = 0, collected = 0;
	int where = some_header_place(), ex = some_ex(), ret;
	struct array array = some_array(once_in(2) ? 8 : 600, sizeof(struct kvm_dirty_vm_run));
	bool einval = false;
	struct bounds b;
	struct op_note *t;
	struct mlog *l;

	args = header_at(where, sizeof(*args));
	*good = (struct kvm_dirty_vm_harvest){
		.runs = (uintptr_t)array.runs, .nr_runs = capacity, .flags = below(8),
		.nr_pages = rnd(),
	};
	if (once_in(50))
		good->nr_runs = -1u - below(2);
	if (once_in(50)) {
		good->flags |= 8u << below(29);
		einval = true;
	}
	if (once_in(50)) {
		good->nr_runs = 0;
		einval = true;
	}
	if (spoil_reserved(good->reserved, 4))
		einval = true;

	capacity = good->nr_runs;
	for (l = next_log(NULL); l; l = next_log(l))
		log_bad_consumer(l);
	out = *good;
	t = note("VM_HARVEST file, capacity, flags, room", a - m.all, capacity, good->flags,
		 array.room);
	t->ex = ex;
	ret = fd_call(a->fd, ex, KVM_DIRTY_VM_LOG_HARVEST, args);
	t->ret = ret;
	t->err = errno;

	if (where != AT_GOOD || einval) {
		/* It cannot be read: found before what is wrong; not written: after that. */
		if (where != AT_GOOD && where != AT_READONLY)
			einval = false;
		CHECK(ret == -1 && errno == (einval ? EINVAL : EFAULT), "bad arguments gave %d",
		      ret);
		all_unchanged();
		return;
	}

	for (l = next_log(NULL); l; l = next_log(l)) {
		collected += collect(l);
		b = log_count(l);
		yes += b.yes;
		maybe += b.maybe;
		runs_bounds(l, 0, &lo, &hi);
		runs += hi;
	}
	if (ret && errno == EFAULT) {
		CHECK(array.room < min(runs, capacity), "room for %u of %u runs gave EFAULT",
		      array.room, runs);
		CHECK(good->nr_runs == out.nr_runs && good->flags == out.flags,
		      "an error changed the arguments: nr_runs %u, flags %#x", good->nr_runs,
		      good->flags);
		all_moved(false);
		return;
	}
	out = *good;
	if (ret)
		CHECK(errno == ENODEV && m.gone && !yes && !out.nr_runs,
		      "VM_HARVEST of %u pages gave %d", yes, ret);
	else
		CHECK(!m.gone || yes || maybe || collected, "the VM is gone, and all is taken");

	CHECK(!(out.flags & ~(KVM_DIRTY_HARVEST_MORE | KVM_DIRTY_HARVEST_LAYOUT)), "flags out %#x",
	      out.flags);
	CHECK(a->layout == MAYBE || !!(out.flags & KVM_DIRTY_HARVEST_LAYOUT) == a->layout,
	      "flags out %#x, layout changed: %d", out.flags, a->layout);
	a->layout = NO;
	CHECK(out.nr_runs <= capacity && out.nr_runs <= array.room,
	      "%u runs, capacity %u, room %u", out.nr_runs, capacity, array.room);
	check_runs(array.runs, out.nr_runs, out.nr_pages);
	if (out.flags & KVM_DIRTY_HARVEST_MORE)
		CHECK(out.nr_runs == capacity || array.room < runs,
		      "MORE, with %u runs for a capacity of %u", out.nr_runs, capacity);
	all_moved(!(out.flags & KVM_DIRTY_HARVEST_MORE));
}

static void step_all_poll(struct mall *a)
{
	struct pollfd pfd = { .fd = a->fd[EX_MAIN], .events = POLLIN };
	bool may = false, must = false, ring;
	uint64_t level;
	struct mring *r;
	struct mlog *l;
	int ret;

	nr_ops++;
	for (l = next_log(NULL); l; l = next_log(l)) {
		level = l->dead ? 1 : DIV_ROUND_UP(l->entries, 2);
		ring = false;
		for (r = l->ring; r < l->ring + l->nr_rings; r++)
			ring |= r->producer - r->reset >= level;
		may |= ring || l->spill;
		/* One that is dead is not looked at when there is nothing left in it. */
		must |= l->dead ? log_count(l).yes : ring || (l->spill && log_must_overflow(l));
	}
	ret = poll(&pfd, 1, 0);
	note("poll of all, revents", a - m.all, pfd.revents, 0, 0)->ret = ret;
	CHECK(ret >= 0 && !!(pfd.revents & POLLHUP) == m.gone, "poll gave %d, %#x", ret,
	      pfd.revents);
	CHECK(pfd.revents & POLLIN ? may : !must, "poll gave %#x: must %d, may %d", pfd.revents,
	      must, may);
}

/* What it does not do. */
static void step_all_garbage(struct mall *a)
{
	static const unsigned long cmds[] = {
		KVM_DIRTY_SLOT_LOG_INFO, KVM_DIRTY_SLOT_LOG_HARVEST, KVM_DIRTY_SLOT_LOG_RESET,
		KVM_DIRTY_SLOT_LOG_MARK, KVM_DIRTY_SLOT_LOG_DISCARD,
	};
	unsigned long cmd = once_in(2) ? cmds[below(ARRAY_SIZE(cmds))] :
					 KVM_DIRTY_VM_LOG_HARVEST ^ (1ul << below(32));
	int ret, ex = some_ex();
	struct op_note *t;
	void *p;

	/* The VFS's own, as in step_garbage(). */
	if ((cmd >> 8 & 0xff) == 0x54 || (cmd >> 8 & 0xff) == 0x58)
		return;
	t = note("ioctl of all, cmd", a - m.all, cmd, 0, 0);
	t->ex = ex;
	ret = fd_call(a->fd, ex, cmd, arena);
	t->ret = ret;
	t->err = errno;
	CHECK(ret == -1 && errno == ENOTTY, "ioctl %#lx gave %d", cmd, ret);
	p = mmap(NULL, PG << below(4), below(4), once_in(2) ? MAP_SHARED : MAP_PRIVATE,
		 a->fd[EX_MAIN], below(8) * PG);
	CHECK(p == MAP_FAILED && errno == ENODEV, "mmap gave %p", p);
	all_unchanged();
}

/* Descriptors and files come and go; there is always one, so that what dies is kept. */
static void step_all_fds(struct mall *a, bool vm)
{
	int fd;

	nr_ops++;
	note("descriptors of all", a - m.all, 0, 0, 0);
	switch (below(3)) {
	case 0:
		fd_close(a->fd, EX_PEER + below(2));
		break;
	case 1:
		fd = dup(a->fd[EX_MAIN]);
		CHECK(fd >= 0, "dup");
		fd_close(a->fd, EX_MAIN);
		a->fd[EX_MAIN] = fd;
		break;
	case 2:
		if (!vm)
			break;
		all_close(a);
		all_open(a);
		break;
	}
}

void step_all(struct mall *a, bool vm)
{
	int x = below(100);

	if (x < 70)
		step_all_harvest(a);
	else if (x < 84)
		step_all_poll(a);
	else if (x < 94)
		step_all_garbage(a);
	else
		step_all_fds(a, vm);
}
