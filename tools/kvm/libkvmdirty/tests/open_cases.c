// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which back end it is, sets of pages, and what needs no KVM.
 */
#include <poll.h>
#include "env.h"
#include "../src/pageset.c"	/* the library does not export it */

static int try_open(struct minivm *vm, uint32_t backend, uint32_t flags, uint32_t entries,
		    const char **reason)
{
	struct kvmdirty_options options = {
		.size = sizeof(options), .backend = backend, .flags = flags,
		.ring_entries = entries,
	};
	struct kvmdirty *kd;
	int r;

	r = kvmdirty_open(vm->fd, &options, &kd);
	*reason = options.reason ? options.reason : "";
	CHECK(!r == !options.reason, "%d but %s", r, *reason);
	if (r < 0)
		return r;
	r = kvmdirty_backend(kd);
	kvmdirty_close(kd);
	return r;
}

#define CHECK_REASON(r, error, text) do {				\
	CHECK_EQ(r, error);						\
	CHECK(strstr(reason, text), "%s", reason);			\
} while (0)

static void test_missing(const void *mode)
{
	const struct mode *m = mode;
	const char *reason;
	struct minivm vm;

	if (m->backend == KVMDIRTY_BITMAP)
		return;		/* never missing */
	CHECK_EQ(minivm_create(&vm), 0);
	hidden_caps[0] = KVM_CAP_DIRTY_SLOT_RING;
	hidden_caps[1] = KVM_CAP_DIRTY_LOG_RING;
	hidden_caps[2] = KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
	CHECK_EQ(kvmdirty_probe(vm.fd), 1 << KVMDIRTY_BITMAP);
	CHECK_REASON(try_open(&vm, m->backend, 0, 0, &reason), -EOPNOTSUPP,
		     m->backend == KVMDIRTY_RING ? "KVM_CAP_DIRTY_LOG_RING" :
						   "KVM_CAP_DIRTY_SLOT_RING");
	CHECK_EQ(try_open(&vm, KVMDIRTY_AUTO, 0, 0, &reason), KVMDIRTY_BITMAP);
}

static void test_too_late(const void *mode)
{
	const struct mode *m = mode;
	const char *reason;
	struct minivm vm;

	if (m->backend == KVMDIRTY_BITMAP)
		return;		/* never too late */
	CHECK_EQ(minivm_create(&vm), 0);
	minivm_add_vcpu(&vm);
	vm.region[SLOT_MAIN].flags = KVM_MEM_LOG_DIRTY_PAGES;
	CHECK_EQ(ioctl(vm.fd, KVM_SET_USER_MEMORY_REGION, &vm.region[SLOT_MAIN]), 0);
	CHECK_REASON(try_open(&vm, m->backend, 0, 0, &reason), -EBUSY, "too late");
	CHECK_EQ(try_open(&vm, KVMDIRTY_AUTO, 0, 0, &reason), KVMDIRTY_BITMAP);
}

static void test_bad_options(const void *mode)
{
	const struct mode *m = mode;
	struct kvmdirty_options options = { .size = 4 };
	const char *reason;
	struct kvmdirty *kd;
	struct minivm vm;

	CHECK_EQ(minivm_create(&vm), 0);
	CHECK_EQ(kvmdirty_open(vm.fd, &options, &kd), -EINVAL);
	CHECK_EQ(kvmdirty_open(vm.kvm, NULL, &kd), -ENOTTY);
	CHECK_EQ(kvmdirty_open(-1, NULL, &kd), -EBADF);
	CHECK_REASON(try_open(&vm, 99, 0, 0, &reason), -EINVAL, "back end");
	CHECK_REASON(try_open(&vm, m->backend, ~0U, 0, &reason), -EINVAL, "flag");
	CHECK_REASON(try_open(&vm, m->backend, 0, 1000, &reason), -EINVAL, "power of two");
	CHECK_REASON(try_open(&vm, KVMDIRTY_RING, KVMDIRTY_OPEN_NO_EXITS, 0, &reason), -EINVAL,
		     "exit");
	if (m->backend != KVMDIRTY_BITMAP)
		CHECK_REASON(try_open(&vm, m->backend, 0, 1U << 31, &reason), -EINVAL,
			     "ring_entries");
	/* None of that enabled anything. */
	CHECK_EQ(try_open(&vm, m->backend, m->flags, 0, &reason), m->backend);
	if (m->backend == KVMDIRTY_RING)
		CHECK_REASON(try_open(&vm, KVMDIRTY_BITMAP, 0, 0, &reason), -EBUSY, "ring");
}

/* Once, not for each back end: sets of pages, against an array of flags. */
static void test_pageset(const void *unused)
{
	static const uint64_t sizes[] = { 1, 63, 64, 65, 4096, 4097, 300000 };
	static uint8_t flags[300000];
	struct pageset set;
	uint64_t n, i, pos, len;
	size_t s;
	int step;

	(void)unused;
	srandom(1);
	for (s = 0; s < ARRAY_SIZE(sizes); s++) {
		n = sizes[s];
		memset(flags, 0, sizeof(flags));
		CHECK_EQ(pageset_init(&set, n), 0);
		for (step = 0; step < 300; step++) {
			pos = random() % n;
			len = random() % (step % 3 ? 100 : n) + 1;
			if (len > n - pos)
				len = n - pos;
			memset(flags + pos, step % 2, len);
			if (step % 2)
				pageset_add(&set, pos, len);
			else
				pageset_del(&set, pos, len);
			if (step % 10)
				continue;
			/* All runs, and nothing between them. */
			for (i = 0; i < n; i = pos + len) {
				pos = pageset_next(&set, i);
				CHECK((pos == UINT64_MAX ? n : pos) - i ==
				      (uint64_t)((uint8_t *)(memchr(flags + i, 1, n - i) ?:
							     flags + n) - (flags + i)),
				      "next from %lu of %lu", (unsigned long)i, (unsigned long)n);
				if (pos == UINT64_MAX)
					break;
				len = pageset_run(&set, pos, n);
				CHECK(pos + len <= n && !memchr(flags + pos, 0, len) &&
				      (pos + len == n || !flags[pos + len]),
				      "run of %lu at %lu of %lu", (unsigned long)len,
				      (unsigned long)pos, (unsigned long)n);
				CHECK_EQ(pageset_run(&set, pos, (len + 1) / 2), (len + 1) / 2);
			}
			CHECK_EQ(pageset_empty(&set), !memchr(flags, 1, n));
		}
		pageset_destroy(&set);
	}
}

/* Once, without KVM: what a callback calls meets the library's locks before KVM. */
static void test_calls_back_fake(const void *unused)
{
	struct kvm_userspace_memory_region region = {
		.slot = SLOT_MAIN, .memory_size = MAIN_PAGES * PAGE,
	};
	struct taker taker = { .attached = true };
	struct kvmdirty *kd;
	int fd;

	(void)unused;
	fake_kvm = true;
	fd = dup(STDOUT_FILENO);
	CHECK_EQ(kvmdirty_attach(fd, &taker.slot), 0);
	CHECK_EQ(kvmdirty_harvest_each(taker.slot, reenter, &taker, 0, 0, NULL), 0);
	CHECK_EQ(taker.reentry, -EDEADLK);
	CHECK_EQ(taker.seen.page[50], 1);
	CHECK_EQ(kvmdirty_untrack(taker.slot, 0), 0);

	memset(&taker, 0, sizeof(taker));
	CHECK_EQ(kvmdirty_open(fd, NULL, &kd), 0);
	CHECK_EQ(kvmdirty_track(kd, &region, &taker.slot), 0);
	CHECK_EQ(kvmdirty_harvest_each(taker.slot, reenter, &taker, 0, 0, NULL), 0);
	CHECK_EQ(taker.reentry, -EDEADLK);
	CHECK_EQ(taker.seen.page[50], 1);
	CHECK_EQ(kvmdirty_untrack(taker.slot, 0), -EBUSY);
	CHECK_EQ(kvmdirty_untrack(taker.slot, KVMDIRTY_UNTRACK_DROP), 0);
	kvmdirty_close(kd);
}

struct full {
	struct kvmdirty *kd;
	int vcpu, other;
	bool begun;
	pthread_t thread;
	int ret, added;
};

static void *full_thread(void *arg)
{
	struct kvm_run run = { .exit_reason = KVM_EXIT_DIRTY_SLOT_RING_FULL };
	struct kvm_dirty_slot_ring_exit details = { .slot = SLOT_MAIN };
	struct full *f = arg;

	memcpy(&run.hw, &details, sizeof(details));
	f->ret = kvmdirty_vcpu_full(f->kd, f->vcpu, &run);
	return NULL;
}

/* A vCPU's ring gets full while a callback runs, which does something with the VM. */
static int full_meanwhile(const struct kvmdirty_run *run, void *arg)
{
	struct full *f = arg;

	(void)run;
	if (!f->begun) {
		f->begun = true;
		CHECK_EQ(pthread_create(&f->thread, NULL, full_thread, f), 0);
		poll(NULL, 0, 200);
		f->added = kvmdirty_add_vcpu(f->kd, f->other);
	}
	return 0;
}

/* Once, without KVM: that is no deadlock. */
static void test_full_fake(const void *unused)
{
	struct kvm_userspace_memory_region region = {
		.slot = SLOT_MAIN, .memory_size = MAIN_PAGES * PAGE,
	};
	struct full f = { .vcpu = memfd_create("vcpu", 0), .other = memfd_create("other", 0) };
	struct kvmdirty_slot *slot;

	(void)unused;
	alarm(60);
	fake_kvm = true;
	CHECK_EQ(kvmdirty_open(dup(STDOUT_FILENO), NULL, &f.kd), 0);
	CHECK_EQ(kvmdirty_add_vcpu(f.kd, f.vcpu), 0);
	CHECK_EQ(kvmdirty_track(f.kd, &region, &slot), 0);
	CHECK_EQ(kvmdirty_harvest_each(slot, full_meanwhile, &f, 0, 0, NULL), 0);
	CHECK_EQ(pthread_join(f.thread, NULL), 0);
	CHECK_EQ(f.added, 0);
	CHECK_EQ(f.ret, 1);
	CHECK_EQ(kvmdirty_untrack(slot, KVMDIRTY_UNTRACK_DROP), 0);
	full_thread(&f);
	CHECK_EQ(f.ret, -ENXIO);
	kvmdirty_close(f.kd);
}

/* Once, without KVM: the ring is where KVM has it, in pages of the host. */
static void test_ring_fake(const void *unused)
{
	struct kvm_userspace_memory_region region = {
		.slot = SLOT_MAIN, .memory_size = MAIN_PAGES * PAGE,
	};
	struct kvmdirty_options options = {
		.size = sizeof(options), .backend = KVMDIRTY_RING, .ring_entries = FAKE_ENTRIES,
	};
	off_t size = FAKE_ENTRIES * sizeof(*fake_ring), at = 64 * PAGE;
	int vcpu = memfd_create("vcpu", 0);
	struct kvmdirty_slot *slot;
	struct kvmdirty_run run;
	struct kvmdirty *kd;

	(void)unused;
	CHECK_EQ(ftruncate(vcpu, at + size), 0);
	fake_ring = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, at);
	CHECK(fake_ring != MAP_FAILED, "mmap");
	fake_ring[0] = (struct kvm_dirty_gfn){ KVM_DIRTY_GFN_F_DIRTY, SLOT_MAIN, 77 };
	fake_kvm = true;
	CHECK_EQ(kvmdirty_open(dup(STDOUT_FILENO), &options, &kd), 0);
	CHECK_EQ(kvmdirty_add_vcpu(kd, vcpu), 0);
	CHECK_EQ(kvmdirty_track(kd, &region, &slot), 0);
	CHECK_EQ(kvmdirty_harvest(slot, &run, 1, 0, NULL), 0);
	CHECK(run.offset == 77 && run.npages == 1, "%u + %u", run.offset, run.npages);
	CHECK_EQ(fake_ring[0].flags, 0);
	kvmdirty_close(kd);
}

/* Once, not for each back end: the best of those that the kernel has. */
static void test_best(const void *unused)
{
	const char *reason;
	struct minivm vm;
	int mask, best;

	(void)unused;
	CHECK_EQ(minivm_create(&vm), 0);
	mask = kvmdirty_probe(vm.kvm);
	CHECK_EQ(mask, kvmdirty_probe(vm.fd));
	best = mask & 1 << KVMDIRTY_SLOT_RING ? KVMDIRTY_SLOT_RING :
	       mask & 1 << KVMDIRTY_RING ? KVMDIRTY_RING : KVMDIRTY_BITMAP;
	printf("# the best here: %s\n", kvmdirty_backend_name(best));
	CHECK_EQ(try_open(&vm, KVMDIRTY_AUTO, 0, 0, &reason), best);

	/* The next best, each time with a new VM. */
	hidden_caps[0] = KVM_CAP_DIRTY_SLOT_RING;
	CHECK_EQ(minivm_create(&vm), 0);
	CHECK_EQ(try_open(&vm, KVMDIRTY_AUTO, KVMDIRTY_OPEN_NO_EXITS, 0, &reason),
		 KVMDIRTY_BITMAP);
	CHECK_EQ(minivm_create(&vm), 0);
	CHECK_EQ(try_open(&vm, KVMDIRTY_AUTO, 0, 0, &reason),
		 mask & 1 << KVMDIRTY_RING ? KVMDIRTY_RING : KVMDIRTY_BITMAP);
	hidden_caps[0] = 0;
	CHECK_EQ(kvmdirty_probe(open("/dev/null", O_RDONLY)), -ENOTTY);
	CHECK(!strcmp(kvmdirty_backend_name(77), "unknown"), "77");
	CHECK(!strcmp(kvmdirty_version(), "1.0"), "%s", kvmdirty_version());
}

const struct test_case open_cases[] = {
	{ .name = "missing", .fn = test_missing, .always = true },
	{ .name = "too_late", .fn = test_too_late },
	{ .name = "bad_options", .fn = test_bad_options },
	{ .name = NULL },
};

const struct test_case once_cases[] = {
	{ .name = "best", .fn = test_best, .needs_kvm = true },
	{ .name = "pageset", .fn = test_pageset },
	{ .name = "calls_back_fake", .fn = test_calls_back_fake },
	{ .name = "full_fake", .fn = test_full_fake },
	{ .name = "ring_fake", .fn = test_ring_fake },
	{ .name = NULL },
};
