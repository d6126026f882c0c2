// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings: the mapping, readers of it honest and hostile, poll(), and
 * exits of a vCPU whose ring is full.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "dirty_slot_ring_test.h"

/* -- the mapping ---------------------------------------------------------- */

TEST(map_reader)
{
	struct dsr *v = dsr_new(.entries = 256, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	uint8_t *want = set_new(v), *got;
	uint64_t c, n, total = 0;
	int i;

	CHECK_EQ(dsr_producer(&ring), 0);
	CHECK_EQ(dsr_consumer(&ring), 0);
	CHECK_EQ(dsr_reset_marker(&ring), 0);
	CHECK_EQ(dsr_overflowed(&ring), 0);
	set_add(want, 0, 100, 3);
	for (i = 0; i < 20; i++) {
		got = set_new(v);
		guest_write_step(v, 0, 0, 100, 3);
		markers_check(&ring);
		c = dsr_producer(&ring);
		set_add_entries(got, v->npages, &ring, dsr_consumer(&ring), c);
		set_check(v, got, want);
		/* In two steps: what is not collected is not reset. */
		n = dsr_consumer(&ring) + 10;
		dsr_set_consumer(&ring, n);
		total += dsr_reset(v->fd);
		CHECK_EQ(dsr_reset_marker(&ring), n);
		CHECK_EQ(dsr_consumer(&ring), n);
		dsr_set_consumer(&ring, c);
		total += dsr_reset(v->fd);
		CHECK_EQ(dsr_reset_marker(&ring), c);
		CHECK_EQ(total, 100 * (i + 1));
		CHECK_EQ(dsr_reset(v->fd), 0);
		CHECK_EQ(poll_log(v->fd, 0), 0);
		free(got);
	}
	expect_nothing(v);
	expect_armed(v, 0, v->npages);
	free(want);
	dsr_unmap(&ring);
	dsr_free(v);
}

/* A page that was collected but not reset is not armed: no second entry. */
TEST(map_collected_is_not_armed)
{
	struct dsr *v = dsr_new(.entries = 256, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);

	guest_write_step(v, 0, 0, 50, 2);
	dsr_set_consumer(&ring, dsr_producer(&ring));
	guest_write_step(v, 0, 0, 50, 2);
	CHECK_EQ(dsr_producer(&ring), dsr_consumer(&ring));
	CHECK_EQ(dsr_reset(v->fd), 50);
	guest_write_step(v, 0, 0, 50, 2);
	expect_step(v, 0, 50, 2);
	dsr_unmap(&ring);
	dsr_free(v);
}

TEST(map_harvest_does_not_repeat)
{
	struct dsr *v = dsr_new(.entries = 256, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	uint8_t *got = set_new(v), *want = set_new(v);

	guest_write_step(v, 0, 0, 100, 2);
	dsr_mark(v->fd, 400, 20);
	set_add(want, 0, 100, 2);
	set_add(want, 400, 20, 1);
	set_add_entries(got, v->npages, &ring, 0, 37);
	dsr_set_consumer(&ring, 37);
	harvest(v, got);
	set_check(v, got, want);
	CHECK_EQ(dsr_reset_marker(&ring), dsr_producer(&ring));
	CHECK_EQ(dsr_consumer(&ring), dsr_producer(&ring));
	expect_nothing(v);
	/* all of it collected */
	guest_write_step(v, 0, 0, 100, 2);
	dsr_set_consumer(&ring, dsr_producer(&ring));
	expect_nothing(v);
	expect_armed(v, 0, v->npages);
	dsr_unmap(&ring);
	free(got);
	free(want);
	dsr_free(v);
}

/* A reader that died half way is followed by one that starts again. */
TEST(map_consumer_moved_back)
{
	struct dsr *v = dsr_new(.entries = 256, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	uint64_t reset;

	guest_write_step(v, 0, 0, 60, 2);
	dsr_set_consumer(&ring, dsr_producer(&ring));
	dsr_reset(v->fd);

	reset = dsr_reset_marker(&ring);
	CHECK(reset, "reset did not move");
	guest_write_step(v, 0, 1, 100, 2);
	dsr_set_consumer(&ring, reset + 50);
	dsr_set_consumer(&ring, reset);
	CHECK_EQ(dsr_reset(v->fd), 0);
	CHECK_EQ(dsr_reset_marker(&ring), reset);
	expect_step(v, 1, 100, 2);
	dsr_unmap(&ring);
	dsr_free(v);
}

TEST(map_reset_tells_of_overflow)
{
	struct dsr *v = dsr_new(.entries = 2, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	struct kvm_dirty_slot_reset args;

	guest_write_step(v, 0, 0, 2, 2);
	CHECK_OK(__dsr_reset(v->fd, &args));
	CHECK_EQ(args.flags, 0);
	CHECK_EQ(dsr_overflowed(&ring), 0);

	guest_write_step(v, 0, 10, 5, 2);
	CHECK_EQ(dsr_overflowed(&ring), 5);
	dsr_set_consumer(&ring, 2);
	CHECK_OK(__dsr_reset(v->fd, &args));
	CHECK_EQ(args.flags, KVM_DIRTY_RESET_OVERFLOW);
	CHECK_EQ(args.nr_pages, 2);
	expect_step(v, 10, 5, 2);
	CHECK_OK(__dsr_reset(v->fd, &args));
	CHECK_EQ(args.flags, 0);
	CHECK_EQ(dsr_overflowed(&ring), 5);

	dsr_mark(v->fd, 1, 1);
	CHECK_OK(__dsr_reset(v->fd, &args));
	CHECK_EQ(args.flags, KVM_DIRTY_RESET_OVERFLOW);
	expect(v, 1, 1);
	expect_armed(v, 0, v->npages);
	dsr_unmap(&ring);
	dsr_free(v);
}

TEST(map_hostile_consumer)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 2);
	struct dsr_ring ring[2] = { dsr_map(v->fd, 0), dsr_map(v->fd, 1) };
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_slot_reset reset;
	struct kvm_dirty_run runs[8];
	uint8_t *want = set_new(v);
	uint64_t r[2], p[2], bad[9], good;
	int i, k;

	/* so that there is something below reset */
	guest_write(v, 0, 0, 30);
	guest_write(v, 1, 30, 30);
	expect(v, 0, 60);

	guest_write_step(v, 0, 0, 100, 2);
	guest_write_step(v, 1, 201, 40, 2);
	dsr_mark(v->fd, 400, 50);
	set_add(want, 0, 100, 2);
	set_add(want, 201, 40, 2);
	set_add(want, 400, 50, 1);
	for (k = 0; k < 2; k++) {
		p[k] = dsr_producer(&ring[k]);
		r[k] = dsr_reset_marker(&ring[k]);
	}
	for (k = 0; k < 2; k++) {
		good = dsr_consumer(&ring[k]);
		bad[0] = r[k] - 1;
		bad[1] = 0;
		bad[2] = p[k] + 1;
		bad[3] = p[k] + 64;
		bad[4] = p[k] + (1ull << 32);
		bad[5] = ~0ull;
		bad[6] = 1ull << 63;
		bad[7] = r[k] - 64;
		bad[8] = good + (1ull << 32);
		for (i = 0; i < ARRAY_SIZE(bad); i++) {
			dsr_set_consumer(&ring[k], bad[i]);
			CHECK_ERR(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, 8,
					     KVM_DIRTY_HARVEST_SYNC, &args), EINVAL);
			/* So that it can be made again, and means the same. */
			CHECK_EQ(args.nr_runs, 8);
			CHECK_EQ(args.flags, KVM_DIRTY_HARVEST_SYNC);
			CHECK_ERR(__dsr_reset(v->fd, &reset), EINVAL);
			CHECK_EQ(dsr_consumer(&ring[k]), bad[i]);
			CHECK_EQ(dsr_producer(&ring[0]), p[0]);
			CHECK_EQ(dsr_producer(&ring[1]), p[1]);
			CHECK_EQ(dsr_reset_marker(&ring[0]), r[0]);
			CHECK_EQ(dsr_reset_marker(&ring[1]), r[1]);
			/* The rest of the interface minds its own business. */
			dsr_info(v->fd);
			poll_log(v->fd, 0);
			CHECK_EQ(dsr_mark(v->fd, 400, 50), 0);
		}
		dsr_set_consumer(&ring[k], good);
	}
	expect_set(v, want);
	expect_armed(v, 0, v->npages);
	dsr_unmap(&ring[0]);
	dsr_unmap(&ring[1]);
	free(want);
	dsr_free(v);
}

TEST(map_hostile_consumer_loop)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	struct liar liar = { .ring = &ring };
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_slot_reset reset;
	struct kvm_dirty_run runs[16];
	uint8_t *got = set_new(v), *want = set_new(v);
	int i, ret, nr = rounds(2000);

	liar_start(&liar);
	for (i = 0; i < nr; i++) {
		if (!(i % 100))
			guest_write_step(v, 0, 0, 100, 2);
		ret = __dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, 16, 0, &args);
		CHECK(!ret || errno == EINVAL, "HARVEST gave %d", ret);
		if (!ret) {
			memset(got, 0, v->npages);
			runs_take(got, v->npages, runs, &args, 16);
		}
		ret = __dsr_reset(v->fd, &reset);
		CHECK(!ret || errno == EINVAL, "RESET gave %d", ret);
		CHECK(ret || !reset.nr_pages, "%llu pages that nobody collected", reset.nr_pages);
	}
	liar_stop(&liar);
	dsr_set_consumer(&ring, dsr_reset_marker(&ring));
	memset(got, 0, v->npages);
	harvest(v, got);

	/* The ring is as good as new. */
	guest_write_step(v, 0, 0, 100, 2);
	set_add(want, 0, 100, 2);
	expect_set(v, want);
	markers_check(&ring);
	expect_armed(v, 0, v->npages);
	dsr_unmap(&ring);
	free(got);
	free(want);
	dsr_free(v);
}

TEST(map_forbidden)
{
	struct dsr *v = dsr_new(.entries = 1024, .nr_vcpus = 2);
	const uint64_t area = dsr_info(v->fd).consumers_size / PG;
	const uint64_t pages = dsr_info(v->fd).stride / PG;
	const struct {
		uint64_t off;		/* in pages */
		uint64_t len;
		int prot;
		int flags;
		int err;		/* 0: allowed */
	} t[] = {
		/* the consumers: all of them, or pages of them */
		{ 0, area, PROT_READ | PROT_WRITE, MAP_SHARED, 0 },
		{ 0, 1, PROT_READ | PROT_WRITE, MAP_SHARED, 0 },
		{ 0, 1, PROT_READ, MAP_SHARED, 0 },
		{ 0, 1, PROT_WRITE, MAP_SHARED, 0 },
		{ 1, area - 1, PROT_READ | PROT_WRITE, MAP_SHARED, 0 },
		{ area / 2, 2, PROT_READ | PROT_WRITE, MAP_SHARED, 0 },
		{ area - 1, 1, PROT_READ | PROT_WRITE, MAP_SHARED, 0 },
		/* anything, to read it */
		{ area, 1, PROT_READ, MAP_SHARED, 0 },
		{ area + 1, 2, PROT_READ, MAP_SHARED, 0 },
		{ area - 1, 2, PROT_READ, MAP_SHARED, 0 },
		{ 0, area + 2 * pages, PROT_READ, MAP_SHARED, 0 },
		/* nothing else, to write it */
		{ area, 1, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ area, 1, PROT_WRITE, MAP_SHARED, EPERM },
		{ area + 1, 1, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ area + 1, 2, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ area, pages, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ area + pages, 1, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		/* begins in the area and ends beyond it */
		{ 0, area + 1, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ area - 1, 2, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ area - 1, 2, PROT_WRITE, MAP_SHARED, EPERM },
		{ 1, area, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ 0, area + 2 * pages, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		/* so far away that a sum may overflow */
		{ (1ull << 51) - 1, 1, PROT_READ | PROT_WRITE, MAP_SHARED, EPERM },
		{ 0, 1, PROT_READ | PROT_EXEC, MAP_SHARED, EPERM },
		{ area, 1, PROT_READ | PROT_EXEC, MAP_SHARED, EPERM },
		{ area + 1, 1, PROT_EXEC, MAP_SHARED, EPERM },
		{ 0, 1, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED, EPERM },
		{ 0, 1, PROT_READ | PROT_WRITE, MAP_PRIVATE, EINVAL },
		{ 0, 1, PROT_READ, MAP_PRIVATE, EINVAL },
		{ area, 1, PROT_READ, MAP_PRIVATE, EINVAL },
		{ area, 1, PROT_READ | PROT_WRITE, MAP_PRIVATE, EINVAL },
		{ area + 1, 1, PROT_READ, MAP_PRIVATE, EINVAL },
	};
	void *p;
	int i;

	for (i = 0; i < ARRAY_SIZE(t); i++) {
		errno = 0;
		p = mmap(NULL, t[i].len * PG, t[i].prot, t[i].flags, v->fd, t[i].off * PG);
		CHECK(t[i].err ? p == MAP_FAILED && errno == t[i].err : p != MAP_FAILED,
		      "row %d gave %p, expected %s", i, p, strerror(t[i].err));
		if (p != MAP_FAILED)
			munmap(p, t[i].len * PG);
	}
	dsr_free(v);
}

/* What cannot be mapped so cannot become so. */
TEST(map_cannot_be_changed)
{
	struct dsr *v = dsr_new(.entries = 1024, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	void *kern = (void *)ring.kern, *runs = (void *)ring.runs, *all, *last, *p;
	struct kvm_dirty_slot_log_info info = dsr_info(v->fd);
	size_t area = info.consumers_size, len = area + info.stride;
	uint64_t producer, x = 12345;
	int fd;

	guest_write_step(v, 0, 0, 50, 2);
	producer = dsr_producer(&ring);
	all = mmap(NULL, len, PROT_READ, MAP_SHARED, v->fd, 0);
	CHECK(all != MAP_FAILED, "no mapping");
	/* the last page of the area: what comes after it is the kernel page */
	last = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, area - PG);
	CHECK(last != MAP_FAILED, "no mapping");

	CHECK_ERR(mprotect(kern, PG, PROT_READ | PROT_WRITE), EACCES);
	CHECK_ERR(mprotect(runs, PG, PROT_READ | PROT_WRITE), EACCES);
	CHECK_ERR(mprotect(kern, ring.size, PROT_WRITE), EACCES);
	CHECK_ERR(mprotect(all, len, PROT_READ | PROT_WRITE), EACCES);
	CHECK_ERR(mprotect(all, PG, PROT_READ | PROT_WRITE), EACCES);
	CHECK_ERR(mprotect(all + area, PG, PROT_READ | PROT_WRITE), EACCES);
	CHECK_ERR(mprotect(kern, PG, PROT_READ | PROT_EXEC), EACCES);
	CHECK_ERR(mprotect(ring.area, PG, PROT_READ | PROT_EXEC), EACCES);
	CHECK_ERR(mprotect(ring.area, area, PROT_READ | PROT_WRITE | PROT_EXEC), EACCES);
	/* A consumer may be made read-only, and writable again. */
	CHECK_OK(mprotect(ring.area, PG, PROT_READ));
	CHECK_EQ(probe(ring.user, true), SIGSEGV);
	CHECK_OK(mprotect(ring.area, PG, PROT_READ | PROT_WRITE));

	CHECK_ERR((long)mremap(ring.area, area, area + PG, MREMAP_MAYMOVE), EFAULT);
	CHECK_ERR((long)mremap(ring.area, PG, area + PG, MREMAP_MAYMOVE), EFAULT);
	CHECK_ERR((long)mremap(last, PG, 2 * PG, MREMAP_MAYMOVE), EFAULT);
	CHECK_ERR((long)mremap(last, PG, 4 * PG, 0), EFAULT);
	/* a length of 0 asks for a second mapping of the same pages */
	p = mremap(last, 0, 2 * PG, MREMAP_MAYMOVE);
	CHECK(p == MAP_FAILED, "a second and longer mapping");

	CHECK_EQ(probe(kern, true), SIGSEGV);
	CHECK_EQ(probe(runs, true), SIGSEGV);
	CHECK_EQ(probe(all, true), SIGSEGV);
	CHECK_EQ(probe(all + area, true), SIGSEGV);

	/* by ways that do not ask the page tables */
	fd = open("/proc/self/mem", O_RDWR);
	CHECK(fd >= 0, "no /proc/self/mem");
	CHECK(pwrite(fd, &x, 8, (off_t)(uintptr_t)kern) == -1, "kernel page written");
	CHECK(pwrite(fd, &x, 8, (off_t)(uintptr_t)runs) == -1, "entries written");
	CHECK(pwrite(fd, &x, 8, (off_t)(uintptr_t)all) == -1, "read-only consumer written");
	close(fd);
	fd = open("/dev/zero", O_RDONLY);
	CHECK(fd >= 0, "no /dev/zero");
	CHECK_ERR(read(fd, kern, 8), EFAULT);
	CHECK_ERR(read(fd, runs, 8), EFAULT);
	close(fd);

	CHECK_EQ(dsr_producer(&ring), producer);
	CHECK(READ_ONCE(*(uint64_t *)(all + area)) == producer, "another kernel page");

	/* This moves a writable mapping on to the kernel page, if it may. */
	CHECK(syscall(SYS_remap_file_pages, last, PG, 0, area / PG, 0),
	      "remapped to kernel page");
	munmap(last, PG);
	markers_check(&ring);
	CHECK_EQ(dsr_producer(&ring), producer);
	expect_step(v, 0, 50, 2);
	munmap(all, len);
	dsr_unmap(&ring);
	dsr_free(v);
}

/* What lies between consumers, or is of rings that do not exist, is nobody's. */
TEST(map_garbage_in_area)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 2, .max_vcpus = 3);
	struct dsr_ring ring = dsr_map(v->fd, 0), late;
	uint64_t *area = ring.area;
	uint8_t *want = set_new(v);
	int i, round;

	set_add(want, 0, 30, 2);
	set_add(want, 101, 30, 2);
	for (round = 0; round < 2; round++) {
		guest_write_step(v, 0, 0, 30, 2);
		guest_write_step(v, 1, 101, 30, 2);
		for (i = 0; i < PG / 8; i++) {
			/* all but the counters of the two, later three */
			if (i % 8 || i / 8 >= 2 + round)
				WRITE_ONCE(area[i], ~0ull - i);
		}
		CHECK_EQ(dsr_reset(v->fd), 0);
		expect_set(v, want);
		if (!round) {
			/* A vCPU that comes finds its counter where it has to be. */
			dsr_add_vcpu(v, 2);
			late = dsr_map(v->fd, 2);
			CHECK_EQ(dsr_consumer(&late), 0);
		}
	}
	guest_write_step(v, 2, 200, 30, 2);
	markers_check(&late);
	CHECK_EQ(dsr_producer(&late), 30);
	expect_step(v, 200, 30, 2);
	markers_check(&late);
	dsr_unmap(&late);
	dsr_unmap(&ring);
	free(want);
	dsr_free(v);
}

/* One mapping has the consumers of all rings, and pieces of it are the same. */
TEST(map_area_in_pieces)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 2);
	struct dsr_ring ring[2] = { dsr_map(v->fd, 0), dsr_map(v->fd, 1) };
	uint64_t *page = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
	uint64_t *last, size = dsr_info(v->fd).consumers_size;
	uint8_t *want = set_new(v);

	CHECK(page != MAP_FAILED, "no mapping");
	guest_write_step(v, 0, 0, 20, 2);
	guest_write_step(v, 1, 101, 30, 2);
	page[0] = 20;
	ring[1].user->consumer = 10;
	CHECK_EQ(dsr_consumer(&ring[0]), 20);
	CHECK_EQ(page[KVM_DIRTY_SLOT_CONSUMER_STRIDE / 8], 10);
	CHECK(ring[0].area != ring[1].area && (void *)page != ring[0].area, "one mapping");
	CHECK_EQ(*(uint64_t *)(ring[0].area + KVM_DIRTY_SLOT_CONSUMER_STRIDE), 10);
	CHECK_EQ(dsr_reset(v->fd), 30);
	set_add(want, 121, 20, 2);
	expect_set(v, want);
	CHECK_EQ(page[0], 20);
	CHECK_EQ(page[KVM_DIRTY_SLOT_CONSUMER_STRIDE / 8], 30);

	/* Where no vCPU has a place yet nothing is. */
	last = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, size - PG);
	CHECK(last != MAP_FAILED, "no mapping");
	CHECK(size > PG, "an area of one page");
	CHECK_EQ(probe(last, false), SIGBUS);
	CHECK_EQ(probe(last, true), SIGBUS);
	CHECK_EQ(probe(ring[0].area + PG, true), SIGBUS);
	munmap(last, PG);
	munmap(page, PG);
	dsr_unmap(&ring[0]);
	dsr_unmap(&ring[1]);
	free(want);
	dsr_free(v);
}

TEST(map_beyond_is_sigbus)
{
	struct dsr *v = dsr_new(.entries = 512, .nr_vcpus = 2);
	uint64_t stride = dsr_info(v->fd).stride, area = dsr_info(v->fd).rings_offset, off;
	const uint64_t rings[] = { 2, 3, 8, 1000, 1 << 20, 1ull << 32 };
	void *p;
	int i, pg;

	/* All of what exists is there, */
	for (off = area; off < area + 2 * stride; off += PG) {
		p = mmap(NULL, PG, PROT_READ, MAP_SHARED, v->fd, off);
		CHECK(p != MAP_FAILED, "no mapping");
		CHECK_EQ(probe(p, false), 0);
		munmap(p, PG);
	}
	/* what does not is not. */
	for (i = 0; i < ARRAY_SIZE(rings); i++) {
		for (pg = 0; pg < 2; pg++) {
			p = mmap(NULL, PG, PROT_READ, MAP_SHARED, v->fd,
				 area + rings[i] * stride + pg * PG);
			if (p == MAP_FAILED)
				continue;
			CHECK_EQ(probe(p, false), SIGBUS);
			munmap(p, PG);
		}
	}
	/* one mapping of all, across the end */
	p = mmap(NULL, area + 3 * stride, PROT_READ, MAP_SHARED, v->fd, 0);
	CHECK(p != MAP_FAILED, "no mapping");
	CHECK_EQ(probe(p, false), 0);
	CHECK_EQ(probe(p + area - PG, false), SIGBUS);
	CHECK_EQ(probe(p + area, false), 0);
	CHECK_EQ(probe(p + area + 2 * stride - PG, false), 0);
	CHECK_EQ(probe(p + area + 2 * stride, false), SIGBUS);
	munmap(p, area + 3 * stride);
	dsr_free(v);
}

TEST(map_outlives_fd)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);

	close(v->fd);
	v->fd = -1;
	guest_write_step(v, 0, 0, 20, 2);
	CHECK(dsr_producer(&ring), "nothing came");
	/* The slot's log lives on without an open descriptor. */
	dsr_reopen(v);
	expect_step(v, 0, 20, 2);
	CHECK_EQ(dsr_consumer(&ring), dsr_producer(&ring));
	dsr_unmap(&ring);
	dsr_free(v);
}

/* -- exit on full --------------------------------------------------------- */

static void check_full_exit(struct dsr *v, struct dsr_ring *ring)
{
	struct kvm_run *run = v->vcpu[0]->run;

	CHECK_EQ(run->exit_reason, KVM_EXIT_DIRTY_SLOT_RING_FULL);
	CHECK_EQ(run->dirty_slot_ring.slot, TEST_SLOT);
	CHECK_EQ(run->dirty_slot_ring.pad, 0);
	/* for a VMM whose kvm.h knows no dirty_slot_ring */
	CHECK_EQ(*(uint32_t *)&run->hw, TEST_SLOT);
	CHECK_EQ(dsr_producer(ring) - dsr_reset_marker(ring), ring->entries);
}

static void check_exit_on_full(uint32_t entries, bool mapped)
{
	struct dsr *v = dsr_new(.entries = entries, .nr_vcpus = 1,
				.flags = KVM_DIRTY_SLOT_RING_EXIT_ON_FULL);
	struct mailbox mb = { .op = OP_WRITE, .npages = 200, .step = 2 };
	struct dsr_ring ring = dsr_map(v->fd, 0);
	uint8_t *want = set_new(v), *got;
	uint64_t done, producer, overflowed, i;
	struct kvm_dirty_slot_reset args;
	int exits = 0, round;

	set_add(want, 0, 200, 2);
	for (round = 0; round < 3; round++) {
		got = set_new(v);
		guest_set(v, 0, mb);
		for (; !run_vcpu(v->vcpu[0]); exits++) {
			check_full_exit(v, &ring);

			/* Full is full, however often one asks. */
			done = v->mb[0]->done;
			producer = dsr_producer(&ring);
			overflowed = dsr_overflowed(&ring);
			for (i = 0; i < 3; i++) {
				CHECK(!run_vcpu(v->vcpu[0]), "ran with a full ring");
				check_full_exit(v, &ring);
			}
			if (mapped) {
				/* collected is not reset */
				set_add_entries(got, v->npages, &ring, dsr_consumer(&ring),
						producer);
				dsr_set_consumer(&ring, producer);
				CHECK(!run_vcpu(v->vcpu[0]), "ran with a full ring");
			}
			CHECK_EQ(v->mb[0]->done, done);
			CHECK_EQ(dsr_producer(&ring), producer);
			CHECK_EQ(dsr_overflowed(&ring), overflowed);
			if (mapped) {
				CHECK_OK(__dsr_reset(v->fd, &args));
				CHECK(args.nr_pages <= entries, "%llu pages", args.nr_pages);
				if (args.flags & KVM_DIRTY_RESET_OVERFLOW)
					harvest(v, got);
			} else {
				harvest(v, got);
			}
		}
		/* Pages that hardware logs show at the last exit, or the next. */
		if (dsr_producer(&ring) - dsr_reset_marker(&ring) == entries) {
			CHECK(!run_vcpu(v->vcpu[0]), "ran with a full ring");
			check_full_exit(v, &ring);
			exits++;
		}
		harvest(v, got);
		/*
		 * The page that filled the ring is logged before it is written,
		 * so it may be logged again when the instruction is resumed.
		 */
		for (i = 0; i < v->npages; i++)
			CHECK(!got[i] == !want[i] && got[i] <= 2, "page %lu: %u times", i, got[i]);
		free(got);
		CHECK(exits > round, "never full in round %d", round);
	}
	free(want);
	dsr_unmap(&ring);
	dsr_free(v);
}

TEST(exit_on_full_harvest)
{
	check_exit_on_full(64, false);
	check_exit_on_full(16, false);
}

TEST(exit_on_full_reset)
{
	check_exit_on_full(64, true);
}

TEST(exit_on_full_not_full)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1,
				.flags = KVM_DIRTY_SLOT_RING_EXIT_ON_FULL);
	int i;

	/* Never full, never out; and MARK fills no ring. */
	for (i = 0; i < 10; i++) {
		guest_write(v, 0, i * 10, 63);
		expect(v, i * 10, 63);
	}
	dsr_mark(v->fd, 0, v->npages);
	guest_write(v, 0, 0, v->npages);
	expect(v, 0, v->npages);
	dsr_free(v);
}

static bool ring_full(const struct dsr_ring *ring)
{
	return dsr_producer(ring) - dsr_reset_marker(ring) == ring->entries;
}

/*
 * Two slots, and hardware that hands over pages by the hundred may fill the
 * rings of both at once: a vCPU runs when neither is full.
 */
TEST(exit_on_full_two_slots)
{
	struct dsr *v = dsr_new(.entries = 16, .nr_vcpus = 1,
				.flags = KVM_DIRTY_SLOT_RING_EXIT_ON_FULL);
	struct mailbox mb = { .op = OP_WRITE, .twin = OTHER_GVA, .npages = 40 };
	struct kvm_run *run = v->vcpu[0]->run;
	uint8_t *got[2] = { set_new(v), set_new(v) };
	struct dsr other = *v, *slots[2] = { v, &other };
	struct dsr_ring ring[2];
	int round, i, k, both = 0, exits = 0;
	bool done;

	vm_userspace_mem_region_add(v->vm, VM_MEM_SRC_ANONYMOUS, OTHER_GPA, OTHER_SLOT,
				    v->npages, KVM_MEM_LOG_DIRTY_PAGES);
	virt_map(v->vm, OTHER_GVA, OTHER_GPA, v->npages);
	other.fd = dsr_open(v->vm, OTHER_SLOT);
	ring[0] = dsr_map(v->fd, 0);
	ring[1] = dsr_map(other.fd, 0);

	/* The first time maps the pages, the others find them mapped. */
	for (round = 0; round < 4; round++) {
		guest_set(v, 0, mb);
		done = false;
		while (!done || ring_full(&ring[0]) || ring_full(&ring[1])) {
			k = ring_full(&ring[0]) || ring_full(&ring[1]);
			both += ring_full(&ring[0]) && ring_full(&ring[1]);
			if (run_vcpu(v->vcpu[0])) {
				CHECK(!k, "ran with a full ring");
				done = true;
				continue;
			}
			exits++;
			k = run->dirty_slot_ring.slot == OTHER_SLOT;
			CHECK(k || run->dirty_slot_ring.slot == TEST_SLOT,
			      "slot %u", run->dirty_slot_ring.slot);
			CHECK(ring_full(&ring[k]), "slot %u is not full",
			      run->dirty_slot_ring.slot);
			/* Only what it names is emptied. */
			harvest(slots[k], got[k]);
		}
		harvest(v, got[0]);
		harvest(&other, got[1]);
	}
	CHECK(exits, "never full");
	for (k = 0; k < 2; k++)
		for (i = 0; i < v->npages; i++)
			CHECK(i < 40 ? got[k][i] >= round : !got[k][i], "slot %d page %d: %d times",
			      k, i, got[k][i]);
	TH_LOG("%d exits, %d times both were full", exits, both);
	dsr_unmap(&ring[0]);
	dsr_unmap(&ring[1]);
	close(other.fd);
	dsr_free(v);
}

/* A full ring of a slot that is gone holds nobody up. */
TEST(exit_on_full_slot_deleted)
{
	struct dsr *v = dsr_new(.entries = 16, .nr_vcpus = 1,
				.flags = KVM_DIRTY_SLOT_RING_EXIT_ON_FULL);

	guest_set(v, 0, (struct mailbox){ .op = OP_WRITE, .npages = 100 });
	CHECK(!run_vcpu(v->vcpu[0]), "never full");
	dsr_log(v, false);
	CHECK(run_vcpu(v->vcpu[0]), "still full");
	CHECK_EQ(v->mb[0]->done, 100);
	dsr_free(v);
}

/*
 * A ring with room for all pages of its slot makes no vCPU leave.  Rings of one
 * entry that did, of a slot of one page, would have the vCPU never get on: full
 * with the page that it is about to write, which the harvest protects again.
 */
TEST(exit_on_full_small_slot)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1, .npages = 1,
				.flags = KVM_DIRTY_SLOT_RING_EXIT_ON_FULL);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	int i;

	CHECK_EQ(ring.entries, 1);
	for (i = 0; i < 5; i++) {
		guest_write(v, 0, 0, 1);	/* which does not take an exit */
		CHECK_EQ(dsr_producer(&ring) - dsr_reset_marker(&ring), 1);
		/* Nor does it leave for its full ring when it runs again. */
		guest_write(v, 0, 0, 1);
		CHECK_EQ(poll_log(v->fd, 0), POLLIN);
		expect(v, 0, 1);
	}
	dsr_unmap(&ring);
	dsr_free(v);
}

/* -- poll ----------------------------------------------------------------- */

TEST(poll_half_full)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	int i;

	for (i = 0; i < 3; i++) {
		CHECK_EQ(poll_log(v->fd, 0), 0);
		guest_write_step(v, 0, 0, 30, 2);
		CHECK_EQ(poll_log(v->fd, 0), 0);
		guest_write_step(v, 0, 100, 10, 2);
		CHECK_EQ(poll_log(v->fd, 0), POLLIN);
		harvest(v, set_new(v));
	}
	CHECK_EQ(poll_log(v->fd, 0), 0);
	dsr_free(v);
}

TEST(poll_overflow)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);

	CHECK_EQ(poll_log(v->fd, 0), 0);
	dsr_mark(v->fd, 77, 1);
	CHECK_EQ(poll_log(v->fd, 0), POLLIN);
	expect(v, 77, 1);
	CHECK_EQ(poll_log(v->fd, 0), 0);
	guest_write(v, 0, 0, 100);
	CHECK_EQ(poll_log(v->fd, 0), POLLIN);
	expect(v, 0, 100);
	CHECK_EQ(poll_log(v->fd, 0), 0);
	dsr_free(v);
}

static void *poll_thread(void *arg)
{
	struct taker *t = arg;

	t->nr = poll_log(t->v->fd, 60000);
	return NULL;
}

/* A poller that is asleep already wakes up, for each of the reasons. */
TEST(poll_wakes)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct taker t = { .v = v };
	int i;

	for (i = 0; i < 4; i++) {
		CHECK_EQ(poll_log(v->fd, 0), 0);
		t.nr = -1;
		CHECK_OK(pthread_create(&t.thread, NULL, poll_thread, &t));
		sleep_ms(50);
		CHECK_EQ((int)READ_ONCE(t.nr), -1);
		switch (i) {
		case 0:
			guest_write_step(v, 0, 0, 40, 2);
			break;
		case 1:
			dsr_mark(v->fd, 9, 1);
			break;
		case 2:
			guest_write(v, 0, 0, 70);
			break;
		case 3:
			dsr_log(v, false);
			break;
		}
		CHECK_OK(pthread_join(t.thread, NULL));
		CHECK_EQ(t.nr, i == 3 ? POLLHUP : POLLIN);
		if (i != 3)
			harvest(v, set_new(v));
	}
	dsr_free(v);
}

static void *poll_and_harvest_thread(void *arg)
{
	struct taker *t = arg;
	uint64_t n;

	while (!READ_ONCE(t->stop)) {
		poll_log(t->v->fd, 4 * WAKE_UP_MS);
		n = harvest_cap(t->v->fd, t->got, t->v->npages, 0, 64);
		__atomic_fetch_add(&t->nr, n, __ATOMIC_RELEASE);
	}
	return NULL;
}

/* Returns how many pages were marked. */
static uint64_t check_poll_for_marks(void *(*poller)(void *))
{
	/* the top of the overflow log is one word of 16 bits */
	struct dsr *v = dsr_new(.npages = 16 * 64 * 64);
	struct taker t = { .v = v, .got = set_new(v) };
	const struct marked_log log = { .fd = v->fd, .npages = v->npages };
	uint64_t marked;

	CHECK_OK(pthread_create(&t.thread, NULL, poller, &t));
	marked = mark_for_poller(&log, 1, v->fd, &t.nr);
	WRITE_ONCE(t.stop, true);
	dsr_mark(v->fd, 0, 1);
	CHECK_OK(pthread_join(t.thread, NULL));
	expect_nothing(v);
	free(t.got);
	dsr_free(v);
	return marked;
}

TEST(poll_wakes_for_marks)
{
	TH_LOG("%lu pages, each harvested", check_poll_for_marks(poll_and_harvest_thread));
}

/* As above, but it is told of changes alone, and of what was there at the start. */
static void *edge_thread(void *arg)
{
	struct taker *t = arg;
	int ep = edge_open(t->v->fd);
	uint64_t n;

	while (!READ_ONCE(t->stop)) {
		edge_wait(ep);
		/* until there is no MORE */
		n = harvest_cap(t->v->fd, t->got, t->v->npages, 0, 64);
		__atomic_fetch_add(&t->nr, n, __ATOMIC_RELEASE);
	}
	close(ep);
	return NULL;
}

/*
 * What makes the log readable while a harvest takes what did so before is an event
 * of its own, though the log was readable all the time.
 */
TEST(poll_edge_for_marks)
{
	TH_LOG("%lu pages, each harvested", check_poll_for_marks(edge_thread));
}

/*
 * The same for a ring.  A harvest takes what was in it when it began; the entries
 * that come meanwhile may leave it half full, and the vCPU that pushed them found it
 * fuller than that, and called nobody.
 */
TEST(poll_edge_for_ring)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	struct taker t = { .v = v, .got = set_new(v) };
	uint64_t since, end = now_ms() + (quick ? 500 : 5000), n = 0;
	int i;

	CHECK_OK(pthread_create(&t.thread, NULL, edge_thread, &t));
	guest_start(v, 0, (struct mailbox){ .op = OP_BATCHES, .npages = 45, .step = 2 });
	while (now_ms() < end) {
		for (i = random() % 3; i >= 0; i--, n++) {
			WRITE_ONCE(v->mb[0]->first, n * 91 % (v->npages - 90));
			guest_batch(v, 0);
			dither(400);
		}
		since = now_ms();
		while (dsr_producer(&ring) - dsr_reset_marker(&ring) >= ring.entries / 2) {
			CHECK(now_ms() - since < WAKE_UP_MS,
			      "no event: %lu entries, readable: %d",
			      dsr_producer(&ring) - dsr_reset_marker(&ring), poll_log(v->fd, 0));
			sched_yield();
		}
	}
	guest_join(v, 0);
	WRITE_ONCE(t.stop, true);
	dsr_mark(v->fd, v->npages - 1, 1);
	CHECK_OK(pthread_join(t.thread, NULL));
	CHECK(t.nr, "nothing harvested");
	TH_LOG("%lu batches, %lu pages harvested", n, t.nr);
	dsr_unmap(&ring);
	free(t.got);
	dsr_free(v);
}

/* Keeps the ring one entry below half full, which is when poll() sleeps. */
static void *poll_and_reset_thread(void *arg)
{
	struct taker *t = arg;
	struct dsr_ring ring = dsr_map(t->v->fd, 0);
	uint64_t keep = ring.entries / 2 - 1, reset, used;

	while (!READ_ONCE(t->stop)) {
		poll_log(t->v->fd, 4 * WAKE_UP_MS);
		reset = dsr_reset_marker(&ring);
		used = dsr_producer(&ring) - reset;
		if (used <= keep)
			continue;
		dsr_set_consumer(&ring, reset + used - keep);
		CHECK_EQ(dsr_reset(t->v->fd), used - keep);
		t->nr++;
	}
	dsr_unmap(&ring);
	return NULL;
}

/*
 * A vCPU pushes while RESET makes room, and poll() looks: the page that makes
 * the ring half full again wakes it, whichever of the three came first.
 */
TEST(poll_wakes_though_reset)
{
	struct dsr *v = dsr_new(.entries = 64, .nr_vcpus = 1);
	struct dsr_ring ring = dsr_map(v->fd, 0);
	struct taker t = { .v = v };
	uint64_t n = 0, since, end = now_ms() + (quick ? 500 : 5000);
	int i;

	CHECK_OK(pthread_create(&t.thread, NULL, poll_and_reset_thread, &t));
	guest_start(v, 0, (struct mailbox){ .op = OP_BATCHES, .npages = 1 });
	while (now_ms() < end) {
		for (i = random() % 4; i >= 0; i--) {
			/* long since reset, so that it is logged */
			WRITE_ONCE(v->mb[0]->first, n++ % v->npages);
			guest_batch(v, 0);
			dither(200);
		}
		since = now_ms();
		while (dsr_producer(&ring) - dsr_reset_marker(&ring) >= ring.entries / 2) {
			CHECK(now_ms() - since < WAKE_UP_MS,
			      "poll() sleeps: %lu entries, readable: %d",
			      dsr_producer(&ring) - dsr_reset_marker(&ring),
			      poll_log(v->fd, 0));
			sched_yield();
		}
	}
	guest_join(v, 0);
	CHECK_EQ(dsr_overflowed(&ring), 0);
	WRITE_ONCE(t.stop, true);
	dsr_mark(v->fd, 0, 1);
	CHECK_OK(pthread_join(t.thread, NULL));
	CHECK(quick || t.nr, "the ring was never half full");
	TH_LOG("%lu pages written, woken up %lu times", n, t.nr);
	dsr_unmap(&ring);
	dsr_free(v);
}

int main(int argc, char *argv[])
{
	return dsr_test_main(argc, argv);
}
