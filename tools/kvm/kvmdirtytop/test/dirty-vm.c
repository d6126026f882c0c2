// SPDX-License-Identifier: GPL-2.0-only
/*
 * A VM that dirties memory in a known way, and says what it did: the yardstick
 * that kvmdirtytop's figures are held against.
 *
 * In each round every vCPU writes PAGES pages of each slot, each STRIDE pages from
 * the last, then pages are marked and discarded, then all of the log is read.  With
 * dirty slot rings, KVM's own statistics are checked against that as well.  They are
 * read slot by slot, or with --all in one call.
 *
 * Standard output has one JSON object.  Exit status: 0 as it should be, 1 not so,
 * 2 usage, 4 the kernel lacks what was asked for.
 */
#include <err.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <linux/kvm.h>
#include <linux/kvm_dirty_slot_ring.h>
#include "../../testing/vcpu.h"

#define PAGE		((unsigned long)sysconf(_SC_PAGESIZE))
#define SKIP		4
#define MAX_VCPUS	16
#define MAX_SLOTS	8
#define CODE_SLOT	MAX_SLOTS
#define CODE_GPA	0UL
#define DATA_GPA	0x10000000UL
#define SLOT_GPA	0x10000000UL

enum mode { SLOT_RING, RING, BITMAP };

static struct {
	enum mode mode;
	unsigned int vcpus, slots, entries, array;
	unsigned long pages, stride, rounds, mark, discard, interval_ms;
	bool exit_on_full, reset, all;
} opt = {
	.vcpus = 1, .slots = 1, .entries = 0, .array = 512, .pages = 100,
	.stride = 1, .rounds = 10,
};

static struct vcpu {
	pthread_t thread;
	int fd;
	struct kvm_run *run;
	struct kvm_dirty_gfn *ring;
	unsigned int fetch;
	/* What it did. */
	unsigned long exits[MAX_SLOTS], all_exits, read[MAX_SLOTS];
} vcpus[MAX_VCPUS];

static struct slot {
	int log;
	unsigned long npages;
	__u8 *consumers, *rings;
	struct kvm_dirty_slot_log_info info;
	/* What was done. */
	unsigned long harvests, resets, runs, pages, collected, more, marked, discarded;
} slots[MAX_SLOTS], all_slots;

static int kvm, vm;
static unsigned long ring_resets;
/* Time in the guest and in reading the logs, after the first rounds warmed up. */
#define WARM_UP	2
static __u64 run_ns, read_ns;
static pthread_barrier_t barrier;
/* One vCPU with a full ring at a time empties it. */
static pthread_mutex_t read_lock = PTHREAD_MUTEX_INITIALIZER;

static __u64 now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static unsigned long vcpu_first_page(int n)
{
	return n * opt.pages * opt.stride;
}

/*
 * Reading the logs.
 */

/* Pages were read from the log: they belong to who writes there. */
static void account(struct slot *s, const struct kvm_dirty_run *run)
{
	unsigned long page, n;

	for (page = run->offset; page < run->offset + run->npages; page++) {
		n = page / (opt.pages * opt.stride);
		if (n < opt.vcpus)
			vcpus[n].read[s - slots]++;
	}
}

static void harvest_slot(struct slot *s)
{
	struct kvm_dirty_run runs[opt.array];
	struct kvm_dirty_slot_runs h;
	unsigned int i;

	do {
		memset(&h, 0, sizeof(h));
		h.runs = (uintptr_t)runs;
		h.nr_runs = opt.array;
		h.flags = KVM_DIRTY_HARVEST_SYNC;
		if (ioctl(s->log, KVM_DIRTY_SLOT_LOG_HARVEST, &h))
			err(1, "KVM_DIRTY_SLOT_LOG_HARVEST");
		for (i = 0; i < h.nr_runs; i++)
			account(s, &runs[i]);
		s->harvests++;
		s->runs += h.nr_runs;
		s->pages += h.nr_pages;
		s->more += !!(h.flags & KVM_DIRTY_HARVEST_MORE);
	} while (h.flags & KVM_DIRTY_HARVEST_MORE);
}

static void harvest_all(void)
{
	struct kvm_dirty_vm_run runs[opt.array];
	struct kvm_dirty_vm_harvest h;
	unsigned int i;

	do {
		memset(&h, 0, sizeof(h));
		h.runs = (uintptr_t)runs;
		h.nr_runs = opt.array;
		h.flags = KVM_DIRTY_HARVEST_SYNC;
		if (ioctl(all_slots.log, KVM_DIRTY_VM_LOG_HARVEST, &h))
			err(1, "KVM_DIRTY_VM_LOG_HARVEST");
		for (i = 0; i < h.nr_runs; i++) {
			struct slot *s = &slots[runs[i].slot];

			if (runs[i].slot >= opt.slots || runs[i].log != s->info.log)
				errx(1, "a run of slot %u, log %u", runs[i].slot, runs[i].log);
			account(s, &(struct kvm_dirty_run) { runs[i].offset, runs[i].npages });
			s->pages += runs[i].npages;
		}
		all_slots.harvests++;
		all_slots.runs += h.nr_runs;
		all_slots.pages += h.nr_pages;
		all_slots.more += !!(h.flags & KVM_DIRTY_HARVEST_MORE);
	} while (h.flags & KVM_DIRTY_HARVEST_MORE);
}

static struct kvm_dirty_slot_ring_kern *kern_page(struct slot *s, int n)
{
	return (void *)(s->rings + n * s->info.stride +
			KVM_DIRTY_SLOT_RING_KERN_PAGE * PAGE);
}

/* Read all that is in the mapping, and say so. */
static void reset_slot(struct slot *s)
{
	struct kvm_dirty_slot_reset reset = { 0 };
	unsigned int n;

	for (n = 0; n < opt.vcpus; n++) {
		__u8 *base = s->rings + n * s->info.stride;
		struct kvm_dirty_slot_ring_user *user =
			(void *)(s->consumers + n * KVM_DIRTY_SLOT_CONSUMER_STRIDE);
		const struct kvm_dirty_run *ring =
			(void *)(base + KVM_DIRTY_SLOT_RING_ENTRIES_PAGE * PAGE);
		__u64 i, end = __atomic_load_n(&kern_page(s, n)->producer,
					       __ATOMIC_ACQUIRE);

		for (i = user->consumer; i != end; i++)
			account(s, &ring[i % s->info.entries]);
		__atomic_store_n(&user->consumer, end, __ATOMIC_RELEASE);
	}
	if (ioctl(s->log, KVM_DIRTY_SLOT_LOG_RESET, &reset))
		err(1, "KVM_DIRTY_SLOT_LOG_RESET");
	s->resets++;
	s->collected += reset.nr_pages;
	if (reset.flags & KVM_DIRTY_RESET_OVERFLOW)
		harvest_slot(s);
}

static void read_ring(void)
{
	unsigned int n;

	for (n = 0; n < opt.vcpus; n++) {
		struct vcpu *v = &vcpus[n];

		for (;;) {
			struct kvm_dirty_gfn *e = &v->ring[v->fetch % opt.entries];

			if (!(__atomic_load_n(&e->flags, __ATOMIC_ACQUIRE) &
			      KVM_DIRTY_GFN_F_DIRTY))
				break;
			v->read[e->slot]++;
			slots[e->slot].pages++;
			__atomic_store_n(&e->flags, KVM_DIRTY_GFN_F_RESET,
					 __ATOMIC_RELEASE);
			v->fetch++;
		}
	}
	if (ioctl(vm, KVM_RESET_DIRTY_RINGS, 0) < 0)
		err(1, "KVM_RESET_DIRTY_RINGS");
	ring_resets += opt.vcpus;
}

static void read_bitmap(unsigned int n)
{
	unsigned long words = (slots[n].npages + 63) / 64, i;
	__u64 *bitmap = calloc(words, 8);
	struct kvm_dirty_log log = { .slot = n, .dirty_bitmap = bitmap };

	if (!bitmap || ioctl(vm, KVM_GET_DIRTY_LOG, &log))
		err(1, "KVM_GET_DIRTY_LOG");
	for (i = 0; i < words * 64; i++) {
		if (!(bitmap[i / 64] >> i % 64 & 1))
			continue;
		slots[n].pages++;
		account(&slots[n], &(struct kvm_dirty_run) { i, 1 });
	}
	free(bitmap);
}

static void read_logs(void)
{
	unsigned int n;

	pthread_mutex_lock(&read_lock);
	if (opt.mode == RING)
		read_ring();
	if (opt.mode == SLOT_RING && opt.all)
		harvest_all();
	for (n = 0; n < opt.slots && !opt.all; n++) {
		if (opt.mode == BITMAP)
			read_bitmap(n);
		else if (opt.mode == SLOT_RING && opt.reset)
			reset_slot(&slots[n]);
		else if (opt.mode == SLOT_RING)
			harvest_slot(&slots[n]);
	}
	pthread_mutex_unlock(&read_lock);
}

/*
 * The VM.
 */

static void make_vcpu(unsigned int n)
{
	struct vcpu *v = &vcpus[n];

	v->fd = ioctl(vm, KVM_CREATE_VCPU, n);
	if (v->fd < 0)
		err(1, "KVM_CREATE_VCPU");
	v->run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0),
		      PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
	if (v->run == MAP_FAILED)
		err(1, "vCPU");
	vcpu_init(vm, v->fd, CODE_GPA);
	if (opt.mode == RING) {
		v->ring = mmap(NULL, opt.entries * sizeof(*v->ring),
			       PROT_READ | PROT_WRITE, MAP_SHARED, v->fd,
			       VCPU_RING_OFFSET * PAGE);
		if (v->ring == MAP_FAILED)
			err(1, "dirty ring");
	}
}

static void set_slot(unsigned int n, unsigned long gpa, void *mem,
		     unsigned long size, __u32 flags)
{
	struct kvm_userspace_memory_region region = {
		.slot = n, .flags = flags, .guest_phys_addr = gpa,
		.memory_size = size, .userspace_addr = (uintptr_t)mem,
	};

	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
		err(1, "KVM_SET_USER_MEMORY_REGION");
}

static void *guest_memory(unsigned long size)
{
	void *mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (mem == MAP_FAILED)
		err(1, "guest memory");
	/* In small pages, as dirty logging would make them anyway. */
	madvise(mem, size, MADV_NOHUGEPAGE);
	return mem;
}

static void open_log(unsigned int n)
{
	struct kvm_dirty_slot_log_fd arg = { .slot = n };
	struct slot *s = &slots[n];

	s->log = ioctl(vm, KVM_GET_DIRTY_SLOT_LOG_FD, &arg);
	if (s->log < 0 || ioctl(s->log, KVM_DIRTY_SLOT_LOG_INFO, &s->info))
		err(1, "log of slot %u", n);
	s->consumers = mmap(NULL, s->info.consumers_size, PROT_READ | PROT_WRITE,
			    MAP_SHARED, s->log, 0);
	s->rings = mmap(NULL, opt.vcpus * s->info.stride, PROT_READ, MAP_SHARED,
			s->log, s->info.rings_offset);
	if (s->consumers == MAP_FAILED || s->rings == MAP_FAILED)
		err(1, "rings of slot %u", n);
}

static void make_vm(void)
{
	struct kvm_enable_cap cap = { 0 };
	void *mem = guest_memory(VCPU_CODE_SIZE);
	unsigned int n;

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		err(1, "/dev/kvm");
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm < 0)
		err(1, "KVM_CREATE_VM");
	if (opt.mode == SLOT_RING) {
		cap.cap = KVM_CAP_DIRTY_SLOT_RING;
		cap.args[0] = opt.entries;
		cap.args[1] = opt.exit_on_full ? KVM_DIRTY_SLOT_RING_EXIT_ON_FULL : 0;
	} else if (opt.mode == RING) {
		cap.cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL;
		cap.args[0] = opt.entries * sizeof(struct kvm_dirty_gfn);
	}
	if (cap.cap) {
		if (ioctl(kvm, KVM_CHECK_EXTENSION, cap.cap) <= 0) {
			fprintf(stderr, "dirty-vm: this kernel has no such log\n");
			exit(SKIP);
		}
		if (ioctl(vm, KVM_ENABLE_CAP, &cap))
			err(1, "KVM_ENABLE_CAP");
	}

	vcpu_load_code(mem, CODE_GPA);
	set_slot(CODE_SLOT, CODE_GPA, mem, VCPU_CODE_SIZE, 0);
	for (n = 0; n < opt.vcpus; n++)
		make_vcpu(n);
	for (n = 0; n < opt.slots; n++) {
		slots[n].npages = vcpu_first_page(opt.vcpus) + opt.mark;
		set_slot(n, DATA_GPA + n * SLOT_GPA,
			 guest_memory(slots[n].npages * PAGE),
			 slots[n].npages * PAGE, KVM_MEM_LOG_DIRTY_PAGES);
		if (opt.mode == SLOT_RING)
			open_log(n);
	}
	if (opt.all) {
		struct kvm_dirty_slot_log_fd arg = { .slot = KVM_DIRTY_SLOT_ALL };

		all_slots.log = ioctl(vm, KVM_GET_DIRTY_SLOT_LOG_FD, &arg);
		if (all_slots.log < 0)
			err(1, "log of all slots");
	}
}

static void run_vcpu(unsigned int n, unsigned int slot)
{
	static __u64 value;
	const struct vcpu_args args = {
		.program = guest_writes, .times = opt.pages, .step = opt.stride * PAGE,
		.seed = __atomic_add_fetch(&value, 1, __ATOMIC_RELAXED),
		.address = DATA_GPA + slot * SLOT_GPA + vcpu_first_page(n) * PAGE,
	};
	struct vcpu *v = &vcpus[n];

	vcpu_start(v->fd, CODE_GPA, &args);
	for (;;) {
		if (ioctl(v->fd, KVM_RUN, 0))
			err(1, "KVM_RUN");
		switch (v->run->exit_reason) {
		case VCPU_DONE:
			return;
		case KVM_EXIT_DIRTY_RING_FULL:
			v->all_exits++;
			read_logs();
			break;
		case KVM_EXIT_DIRTY_SLOT_RING_FULL: {
			/* Debian's kvm_run does not name it. */
			struct kvm_dirty_slot_ring_exit *e = (void *)&v->run->hw;

			v->exits[e->slot]++;
			read_logs();
			break;
		}
		default:
			errx(1, "vCPU %u: unexpected exit %u", n, v->run->exit_reason);
		}
	}
}

static void *vcpu_thread(void *arg)
{
	unsigned int n = (struct vcpu *)arg - vcpus, slot;
	unsigned long round;
	__u64 begin;

	for (round = 0; round < opt.rounds; round++) {
		pthread_barrier_wait(&barrier);
		begin = now_ns();
		for (slot = 0; slot < opt.slots; slot++)
			run_vcpu(n, slot);
		if (round >= WARM_UP)
			__atomic_add_fetch(&run_ns, now_ns() - begin, __ATOMIC_RELAXED);
		pthread_barrier_wait(&barrier);
	}
	return NULL;
}

static unsigned long apply(struct slot *s, unsigned long call, __u32 offset, __u32 npages)
{
	struct kvm_dirty_run run = { .offset = offset, .npages = npages };
	struct kvm_dirty_slot_runs arg = { .runs = (uintptr_t)&run, .nr_runs = 1 };

	if (!npages)
		return 0;
	if (ioctl(s->log, call, &arg))
		err(1, "MARK or DISCARD");
	return arg.nr_pages;
}

/*
 * KVM's statistics.
 */

static __u64 stat_of(int fd, const char *name)
{
	struct kvm_stats_header head;
	struct kvm_stats_desc *desc;
	size_t size, i;
	char *buf;
	__u64 value;
	int stats;

	stats = ioctl(fd, KVM_GET_STATS_FD, 0);
	if (stats < 0)
		err(1, "KVM_GET_STATS_FD");
	if (pread(stats, &head, sizeof(head), 0) != sizeof(head))
		err(1, "statistics");
	size = sizeof(*desc) + head.name_size;
	buf = malloc(size * head.num_desc);
	if (!buf || pread(stats, buf, size * head.num_desc, head.desc_offset) !=
		    (ssize_t)(size * head.num_desc))
		err(1, "statistics");
	for (i = 0; i < head.num_desc; i++) {
		desc = (void *)(buf + i * size);
		if (strcmp(desc->name, name))
			continue;
		if ((desc->flags & KVM_STATS_TYPE_MASK) != KVM_STATS_TYPE_CUMULATIVE ||
		    desc->size != 1)
			errx(1, "%s is not a counter", name);
		if (pread(stats, &value, 8, head.data_offset + desc->offset) != 8)
			err(1, "statistics");
		free(buf);
		close(stats);
		return value;
	}
	errx(1, "KVM has no statistic %s", name);
}

static __u64 vcpu_stats(const char *name)
{
	unsigned int n;
	__u64 sum = 0;

	for (n = 0; n < opt.vcpus; n++)
		sum += stat_of(vcpus[n].fd, name);
	return sum;
}

static void expect(const char *what, __u64 got, __u64 want)
{
	if (got != want)
		errx(1, "%s: %llu, but %llu were expected", what, got, want);
}

/*
 * What came into the logs must have left them or be in them still: @pending, with
 * all that was marked in this round.
 */
static void check_stats(unsigned long pending)
{
	unsigned long harvests = all_slots.harvests, resets = 0, pages = 0, collected = 0;
	unsigned long marked = 0, discarded = 0, exits = 0, read = 0;
	unsigned int i, n;
	__u64 in, out;

	for (i = 0; i < opt.slots; i++) {
		harvests += slots[i].harvests;
		resets += slots[i].resets;
		pages += slots[i].pages;
		collected += slots[i].collected;
		marked += slots[i].marked;
		discarded += slots[i].discarded;
		for (n = 0; n < opt.vcpus; n++) {
			exits += vcpus[n].exits[i];
			read += vcpus[n].read[i];
		}
	}
	in = vcpu_stats("dirty_slot_ring_pushed") +
	     vcpu_stats("dirty_slot_ring_overflowed");
	expect("pushed + overflowed", in,
	       read + discarded + pending - (pending ? opt.slots * opt.mark : 0));
	in += stat_of(vm, "dirty_slot_log_marked_pages");
	out = stat_of(vm, "dirty_slot_log_harvested_pages") +
	      stat_of(vm, "dirty_slot_log_reset_pages") +
	      stat_of(vm, "dirty_slot_log_discarded_pages");
	expect("pushed + overflowed + marked - harvested - reset - discarded",
	       in - out, pending);
	expect("harvests", stat_of(vm, "dirty_slot_log_harvests"), harvests);
	expect("harvested pages", stat_of(vm, "dirty_slot_log_harvested_pages"), pages);
	expect("resets", stat_of(vm, "dirty_slot_log_resets"), resets);
	expect("reset pages", stat_of(vm, "dirty_slot_log_reset_pages"), collected);
	expect("marked pages", stat_of(vm, "dirty_slot_log_marked_pages"), marked);
	expect("discarded pages", stat_of(vm, "dirty_slot_log_discarded_pages"), discarded);
	expect("exits", vcpu_stats("dirty_slot_ring_full_exits"), exits);
}

/* The calls on a slot's log, or on the one of all slots. */
static void report_calls(const struct slot *s, const char *name)
{
	printf("{\"slot\":%s,\"harvests\":%lu,\"resets\":%lu,\"failed\":0", name, s->harvests,
	       s->resets);
	printf(",\"more\":%lu,\"runs\":%lu,\"pages\":%lu,\"collected\":%lu}", s->more, s->runs,
	       s->pages, s->collected);
}

static void report(void)
{
	unsigned long overflowed, left, want, pages;
	unsigned int i, n;

	printf("{\"vm\":%d,\"vcpus\":[", getpid());
	for (i = 0; i < opt.slots; i++) {
		for (n = 0; n < opt.vcpus; n++) {
			printf("%s{\"slot\":%u,\"vcpu\":%u,\"pages\":%lu", i + n ? "," : "",
			       i, n, vcpus[n].read[i] + (n ? 0 : slots[i].discarded));
			if (opt.mode == SLOT_RING) {
				overflowed = kern_page(&slots[i], n)->overflowed;
				printf(",\"overflowed\":%lu,\"exits\":%lu",
				       overflowed, vcpus[n].exits[i]);
			}
			/* Unless a page was logged twice, see below. */
			if (!opt.exit_on_full && opt.mode != RING)
				printf(",\"runs\":%lu", opt.rounds *
				       (opt.stride == 1 ? 1 : opt.pages));
			putchar('}');
		}
		if (slots[i].marked)
			printf(",{\"slot\":%u,\"vcpu\":-1,\"pages\":%lu,\"overflowed\":%lu}", i,
			       slots[i].marked, slots[i].marked);
	}
	for (n = 0; opt.mode == RING && n < opt.vcpus; n++) {
		if (vcpus[n].all_exits)
			printf(",{\"slot\":null,\"vcpu\":%u,\"pages\":0,\"exits\":%lu}",
			       n, vcpus[n].all_exits);
	}
	printf("],\"slots\":[");
	if (opt.all)
		report_calls(&all_slots, "null");
	for (i = 0; opt.mode == SLOT_RING && !opt.all && i < opt.slots; i++) {
		char name[12];

		snprintf(name, sizeof(name), "%u", i);
		printf("%s", i ? "," : "");
		report_calls(&slots[i], name);
	}
	if (opt.mode == RING)
		printf("{\"slot\":null,\"harvests\":0,\"resets\":%lu}", ring_resets);
	pages = (opt.rounds - WARM_UP) * opt.vcpus * opt.slots * opt.pages;
	if (opt.rounds > WARM_UP)
		printf("],\"run_ns_per_page\":%.1f,\"read_ns_per_page\":%.1f}\n",
		       (double)run_ns / pages, (double)read_ns / pages);
	else
		puts("]}");

	/*
	 * Each page once for each round.  More often if the log was read while a
	 * vCPU wrote: its page can be logged, read and protected before it is
	 * written, and then is logged again.
	 */
	for (i = 0; i < opt.slots; i++) {
		left = slots[i].pages + slots[i].collected + slots[i].discarded;
		want = opt.rounds * (opt.pages * opt.vcpus + opt.mark);
		if (!(opt.mode == RING || opt.exit_on_full) || left < want)
			expect("pages read and discarded", left, want);
	}
}

static void usage(FILE *f)
{
	fputs("usage: dirty-vm [OPTION]...\n"
	      "  --mode slot-ring|ring|bitmap  what logs (slot-ring)\n"
	      "  --vcpus N, --slots N          (1)\n"
	      "  --pages N, --stride N         written by each vCPU in each slot and round (100, 1)\n"
	      "  --rounds N                    (10)\n"
	      "  --interval MS                 between two rounds (0)\n"
	      "  --entries N                   of each ring, a power of two (default of the log)\n"
	      "  --exit                        exit when a ring is full\n"
	      "  --reset                       read the mapping and RESET instead of HARVEST\n"
	      "  --all                         HARVEST all slots in one call\n"
	      "  --array N                     runs in the array of HARVEST (512)\n"
	      "  --mark N, --discard N         pages of each slot and round (0)\n", f);
}

static unsigned long number(const char *s)
{
	char *end;
	unsigned long n = strtoul(s, &end, 0);

	if (!*s || *end) {
		fprintf(stderr, "dirty-vm: '%s' is not a number\n", s);
		exit(2);
	}
	return n;
}

static void parse(int argc, char **argv)
{
	static const struct option options[] = {
		{ "mode", 1, 0, 'm' }, { "vcpus", 1, 0, 'v' }, { "slots", 1, 0, 's' },
		{ "pages", 1, 0, 'p' }, { "stride", 1, 0, 't' }, { "rounds", 1, 0, 'r' },
		{ "interval", 1, 0, 'i' }, { "entries", 1, 0, 'e' }, { "exit", 0, 0, 'x' },
		{ "reset", 0, 0, 'R' }, { "array", 1, 0, 'a' }, { "all", 0, 0, 'A' },
		{ "mark", 1, 0, 'M' }, { "discard", 1, 0, 'D' }, { "help", 0, 0, 'h' }, { 0 }
	};
	int c;

	while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) {
		switch (c) {
		case 'm':
			if (!strcmp(optarg, "ring"))
				opt.mode = RING;
			else if (!strcmp(optarg, "bitmap"))
				opt.mode = BITMAP;
			else if (strcmp(optarg, "slot-ring"))
				goto bad;
			break;
		case 'v':
			opt.vcpus = number(optarg);
			break;
		case 's':
			opt.slots = number(optarg);
			break;
		case 'p':
			opt.pages = number(optarg);
			break;
		case 't':
			opt.stride = number(optarg);
			break;
		case 'r':
			opt.rounds = number(optarg);
			break;
		case 'i':
			opt.interval_ms = number(optarg);
			break;
		case 'e':
			opt.entries = number(optarg);
			break;
		case 'x':
			opt.exit_on_full = true;
			break;
		case 'R':
			opt.reset = true;
			break;
		case 'A':
			opt.all = true;
			break;
		case 'a':
			opt.array = number(optarg);
			break;
		case 'M':
			opt.mark = number(optarg);
			break;
		case 'D':
			opt.discard = number(optarg);
			break;
		case 'h':
			usage(stdout);
			exit(0);
		default:
			goto bad;
		}
	}
	if (opt.mode == RING && !opt.entries)
		opt.entries = 4096;
	if (optind == argc && opt.vcpus && opt.vcpus <= MAX_VCPUS && opt.slots &&
	    opt.slots <= MAX_SLOTS && opt.pages && opt.stride && opt.array &&
	    (opt.mode == SLOT_RING || !(opt.mark || opt.discard || opt.all)) &&
	    !(opt.all && opt.reset) &&
	    opt.discard <= opt.pages * opt.stride &&
	    (vcpu_first_page(opt.vcpus) + opt.mark) * PAGE <= SLOT_GPA)
		return;
bad:
	usage(stderr);
	exit(2);
}

int main(int argc, char **argv)
{
	unsigned long round, pending;
	unsigned int n, i;
	__u64 begin;

	parse(argc, argv);
	make_vm();
	pthread_barrier_init(&barrier, NULL, opt.vcpus + 1);
	for (n = 0; n < opt.vcpus; n++) {
		if (pthread_create(&vcpus[n].thread, NULL, vcpu_thread, &vcpus[n]))
			errx(1, "pthread_create");
	}
	for (round = 0; round < opt.rounds; round++) {
		pthread_barrier_wait(&barrier);
		pthread_barrier_wait(&barrier);
		for (i = 0; i < opt.slots; i++) {
			struct slot *s = &slots[i];

			if (!opt.mark && !opt.discard)
				break;
			s->marked += apply(s, KVM_DIRTY_SLOT_LOG_MARK,
					   vcpu_first_page(opt.vcpus), opt.mark);
			s->discarded += apply(s, KVM_DIRTY_SLOT_LOG_DISCARD, 0, opt.discard);
		}
		/* Before the last reading something is pending. */
		if (opt.mode == SLOT_RING && !opt.exit_on_full &&
		    round == opt.rounds - 1) {
			for (i = pending = 0; i < opt.slots; i++)
				pending += opt.rounds * (opt.pages * opt.vcpus + opt.mark) -
					   slots[i].pages - slots[i].collected -
					   slots[i].discarded;
			check_stats(pending);
		}
		begin = now_ns();
		read_logs();
		if (round >= WARM_UP)
			read_ns += now_ns() - begin;
		if (opt.interval_ms)
			nanosleep(&(struct timespec) {
				.tv_sec = opt.interval_ms / 1000,
				.tv_nsec = opt.interval_ms % 1000 * 1000000 }, NULL);
	}
	for (n = 0; n < opt.vcpus; n++)
		pthread_join(vcpus[n].thread, NULL);
	if (opt.mode == SLOT_RING)
		check_stats(0);
	report();
	return 0;
}
