// SPDX-License-Identifier: GPL-2.0-only
/*
 * The guest, the VM and the exact sets of pages of tests of dirty slot rings,
 * see dirty_slot_ring_vm.h.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/userfaultfd.h>

#include "kvm_util.h"
#include "processor.h"
#include "test_util.h"
#include "ucall_common.h"
#include "userfaultfd_util.h"

#include "dirty_slot_ring_vm.h"

bool quick;

int rounds(int n)
{
	return quick ? (n + 9) / 10 : n;
}

int dsr_options(int argc, char *argv[])
{
	bool list = false;
	int i, n = 1;

	for (i = 1; i < argc; i++) {
		list |= !strcmp(argv[i], "-l");
		if (!strcmp(argv[i], "-q"))
			quick = true;
		else
			argv[n++] = argv[i];
	}
	argv[n] = NULL;

	/* What there is can be listed anywhere. */
	if (!list)
		TEST_REQUIRE(kvm_has_cap(KVM_CAP_DIRTY_SLOT_RING));
	return n;
}

/* -- the guest ------------------------------------------------------------ */

struct mailbox mailboxes[MAX_VCPUS];

static void guest_store(struct mailbox *mb, uint64_t page, uint64_t value)
{
	WRITE_ONCE(*(uint64_t *)(mb->gva + page * PG), value);
	if (mb->twin)
		WRITE_ONCE(*(uint64_t *)(mb->twin + page * PG), value);
}

/* Each time @go moves on the pages are written, and @then is done. */
static void guest_batches(struct mailbox *mb, void (*then)(uint64_t batch))
{
	uint64_t i, x;

	while (!READ_ONCE(mb->stop)) {
		x = __atomic_load_n(&mb->go, __ATOMIC_ACQUIRE);
		if (x == mb->done) {
			guest_relax();
			continue;
		}
		for (i = 0; i < mb->npages; i++)
			guest_store(mb, mb->first + i * mb->step, mb->value + x);
		if (then)
			then(x);
		__atomic_store_n(&mb->done, x, __ATOMIC_RELEASE);
	}
}

void guest_do(struct mailbox *mb)
{
	uint64_t i, x;

	guest_enable_interrupts();

	switch (READ_ONCE(mb->op)) {
	case OP_WRITE:
		for (i = 0; i < mb->npages; i++) {
			guest_store(mb, mb->first + i * mb->step, mb->value);
			WRITE_ONCE(mb->done, i + 1);
		}
		break;
	case OP_BATCHES:
		guest_batches(mb, NULL);
		break;
#ifdef __x86_64__
	case OP_TPR:
		guest_batches(mb, guest_write_tpr);
		break;
	case OP_INS:
		guest_ins((void *)(mb->gva + mb->first * PG));
		break;
#endif
	case OP_RANDOM:
		for (i = 1, x = mb->value | 1; !READ_ONCE(mb->stop); i++) {
			x = xorshift(x);
			guest_store(mb, x % mb->npages, mb->value + i);
			WRITE_ONCE(mb->done, i);
		}
		break;
	}
}

static void guest_main(uint64_t id)
{
	for (;;) {
		guest_do(&mailboxes[id]);
		guest_exit();
	}
}

/* -- the VM --------------------------------------------------------------- */

void __dsr_add_vcpu(struct dsr *v, int index, uint32_t id)
{
	v->vcpu[index] = vm_vcpu_add(v->vm, id, guest_main);
	vcpu_args_set(v->vcpu[index], 1, index);
	v->mb[index] = &((struct mailbox *)addr_gva2hva(v->vm, (uintptr_t)mailboxes))[index];
}

void dsr_free(struct dsr *v)
{
	if (v->fd >= 0)
		close(v->fd);
	kvm_vm_free(v->vm);
	free(v);
}

void dsr_log(struct dsr *v, bool on)
{
	vm_mem_region_set_flags(v->vm, TEST_SLOT, on ? KVM_MEM_LOG_DIRTY_PAGES : 0);
}

void dsr_reopen(struct dsr *v)
{
	if (v->fd >= 0)
		close(v->fd);
	v->fd = dsr_open(v->vm, TEST_SLOT);
}

bool run_vcpu(struct kvm_vcpu *vcpu)
{
	struct kvm_run *run = vcpu->run;
	struct ucall uc;
	int ret;

	for (;;) {
		do
			ret = __vcpu_run(vcpu);
		while (ret == -1 && errno == EINTR);
		CHECK(!ret, "KVM_RUN gave %d", ret);

		if (run->exit_reason == KVM_EXIT_DIRTY_SLOT_RING_FULL)
			return false;
		if (guest_is_done(run))
			return true;
#ifdef __x86_64__
		if (guest_supply_ins(run, 0x5a))
			continue;
#endif
		CHECK(get_ucall(vcpu, &uc), "exit %s", exit_reason_str(run->exit_reason));
		CHECK(false, "guest failed: %s", uc.buffer);
	}
}

void guest_set(struct dsr *v, int cpu, struct mailbox mb)
{
	mb.gva = mb.gva ?: TEST_GVA;
	mb.step = mb.step ?: 1;
	*v->mb[cpu] = mb;
}

void guest_run(struct dsr *v, int cpu, struct mailbox mb)
{
	guest_set(v, cpu, mb);
	CHECK(run_vcpu(v->vcpu[cpu]), "exit on a full ring nobody asked for");
}

struct dsr *__dsr_new(const struct dsr_params *p)
{
	int i, nr = max(p->nr_vcpus, p->max_vcpus);
	struct dsr *v = calloc(1, sizeof(*v));

	CHECK(v, "no memory");
	v->npages = p->npages ?: DEFAULT_NPAGES;
	v->fd = -1;
	v->vm = nr ? __vm_create(VM_SHAPE_DEFAULT, nr, 4 * v->npages) : vm_create_barebones();

	if (!p->no_cap)
		dsr_enable(v->vm, p->entries, p->flags);
	if (p->manual)
		vm_enable_cap(v->vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, p->manual);

	vm_userspace_mem_region_add(v->vm, p->src, TEST_GPA, TEST_SLOT, v->npages,
				    p->no_log ? 0 : KVM_MEM_LOG_DIRTY_PAGES);
	if (nr)
		virt_map(v->vm, TEST_GVA, TEST_GPA, v->npages);
	for (i = 0; i < p->nr_vcpus; i++)
		dsr_add_vcpu(v, i);
	/*
	 * Map what vCPUs have in common in slot 0 before they run at the same
	 * time.  Two that fault on one page leave its D bit clear, and then
	 * there are emulators whose PML logs the address and not the page,
	 * which KVM warns about.
	 */
	for (i = 0; p->nr_vcpus > 1 && i < p->nr_vcpus; i++)
		guest_run(v, i, (struct mailbox){ .op = OP_NONE });

	if (!p->no_cap && !p->no_log)
		v->fd = dsr_open(v->vm, TEST_SLOT);
	return v;
}

void guest_write_step(struct dsr *v, int cpu, uint64_t first, uint64_t n, uint64_t step)
{
	static uint64_t value;
	struct mailbox mb = {
		.op = OP_WRITE, .first = first, .npages = n, .step = step, .value = ++value,
	};

	guest_run(v, cpu, mb);
}

void guest_write(struct dsr *v, int cpu, uint64_t first, uint64_t n)
{
	guest_write_step(v, cpu, first, n, 1);
}

static void *vcpu_thread(void *vcpu)
{
	CHECK(run_vcpu(vcpu), "exit on a full ring nobody asked for");
	return NULL;
}

void guest_start(struct dsr *v, int cpu, struct mailbox mb)
{
	guest_set(v, cpu, mb);
	CHECK_OK(pthread_create(&v->thread[cpu], NULL, vcpu_thread, v->vcpu[cpu]));
}

void guest_join(struct dsr *v, int cpu)
{
	WRITE_ONCE(v->mb[cpu]->stop, 1);
	CHECK_OK(pthread_join(v->thread[cpu], NULL));
}

void guest_batch(struct dsr *v, int cpu)
{
	struct mailbox *mb = v->mb[cpu];
	uint64_t next = mb->go + 1;

	__atomic_store_n(&mb->go, next, __ATOMIC_RELEASE);
	while (__atomic_load_n(&mb->done, __ATOMIC_ACQUIRE) != next)
		sched_yield();
}

/* -- sets of pages, as often as they were reported ------------------------ */

uint8_t *set_new(struct dsr *v)
{
	uint8_t *set = calloc(1, v->npages);

	CHECK(set, "no memory");
	return set;
}

void set_add(uint8_t *set, uint64_t first, uint64_t n, uint64_t step)
{
	for (; n--; first += step)
		if (set[first] < UINT8_MAX)
			set[first]++;
}

void set_add_entries(uint8_t *set, uint32_t npages, const struct dsr_ring *ring, uint64_t from,
		     uint64_t to)
{
	struct kvm_dirty_run run;

	for (; from < to; from++) {
		run = dsr_entry(ring, from);
		CHECK(run.npages && run.offset < npages && run.npages <= npages - run.offset,
		      "entry %lu is %u+%u", from, run.offset, run.npages);
		set_add(set, run.offset, run.npages, 1);
	}
}

/* Saturates, as set_add() does: 256 times is not never. */
void set_join(struct dsr *v, uint8_t *set, const uint8_t *more)
{
	uint64_t i;

	for (i = 0; i < v->npages; i++)
		set[i] = min(set[i] + more[i], UINT8_MAX);
}

/*
 * The guest is at it while the log is harvested: a page is logged before it is
 * written, and if it was re-protected in between the write faults again, and is
 * logged again.  So what the guest writes now may come more than once, what it
 * wrote before and what the VMM marks comes exactly once.
 */
void set_limit(uint8_t *set, uint32_t first, uint32_t n)
{
	for (; n--; first++)
		set[first] = !!set[first];
}

void __set_check(struct dsr *v, const uint8_t *got, const uint8_t *want, const char *file,
		 int line)
{
	unsigned int i, bad = 0, nr = 0;
	char where[256] = "";
	int len = 0;

	for (i = 0; i < v->npages; i++) {
		nr += got[i];
		if (got[i] == want[i])
			continue;
		if (bad++ < 8)
			len += snprintf(where + len, sizeof(where) - len, " %u:%u/%u",
					i, got[i], want[i]);
	}
	if (bad)
		check_failed(file, line, "pages in the log", 0,
			     "%u of %u pages wrong, %u reported in all (page:times/expected)%s",
			     bad, v->npages, nr, where);
}

void runs_take(uint8_t *got, uint32_t npages, const struct kvm_dirty_run *runs,
	       const struct kvm_dirty_slot_runs *args, uint32_t cap)
{
	uint64_t pages = 0;
	uint32_t i;

	CHECK(args->nr_runs <= cap, "%u runs in an array of %u", args->nr_runs, cap);
	CHECK(!(args->flags & ~KVM_DIRTY_HARVEST_MORE), "flags %#x", args->flags);
	CHECK(!args->reserved[0] && !args->reserved[1], "reserved fields written");
	for (i = 0; i < args->nr_runs; i++) {
		CHECK(runs[i].npages && runs[i].offset < npages &&
		      runs[i].npages <= npages - runs[i].offset,
		      "run %u+%u in a slot of %u", runs[i].offset, runs[i].npages, npages);
		set_add(got, runs[i].offset, runs[i].npages, 1);
		pages += runs[i].npages;
	}
	CHECK(pages == args->nr_pages, "%lu pages in the runs, nr_pages %llu",
	      pages, args->nr_pages);
}

uint64_t harvest_cap(int fd, uint8_t *got, uint32_t npages, uint32_t flags, uint32_t cap)
{
	struct kvm_dirty_run *runs = calloc(cap, sizeof(*runs));
	struct kvm_dirty_slot_runs args;
	uint64_t pages = 0;
	int ret;

	do {
		ret = __dsr_runs(fd, KVM_DIRTY_SLOT_LOG_HARVEST, runs, cap, flags, &args);
		CHECK(!ret, "HARVEST gave %d", ret);
		runs_take(got, npages, runs, &args, cap);
		CHECK(!(args.flags & KVM_DIRTY_HARVEST_MORE) || args.nr_runs == cap,
		      "MORE after %u runs in an array of %u", args.nr_runs, cap);
		pages += args.nr_pages;
	} while (args.flags & KVM_DIRTY_HARVEST_MORE);
	free(runs);
	return pages;
}

uint64_t harvest(struct dsr *v, uint8_t *got)
{
	return harvest_cap(v->fd, got, v->npages, 0, MANY_RUNS);
}

uint64_t bitmap_take(struct dsr *v, uint8_t *got)
{
	unsigned long *bmap = calloc((v->npages + 63) / 64, 8);
	uint64_t i, nr = 0;

	kvm_vm_get_dirty_log(v->vm, TEST_SLOT, bmap);
	for (i = 0; i < v->npages; i++) {
		if (!(bmap[i / 64] >> (i % 64) & 1))
			continue;
		if (got)
			set_add(got, i, 1, 1);
		nr++;
	}
	free(bmap);
	return nr;
}

void __expect_set(struct dsr *v, const uint8_t *want, const char *file, int line)
{
	uint8_t *got = set_new(v);
	uint64_t again;

	harvest(v, got);
	__set_check(v, got, want, file, line);
	again = harvest(v, got);
	if (again)
		check_failed(file, line, "second harvest", 0, "%lu pages in an empty log",
			     again);
	free(got);
}

void __expect_step(struct dsr *v, uint64_t first, uint64_t n, uint64_t step, const char *file,
		   int line)
{
	uint8_t *want = set_new(v);

	set_add(want, first, n, step);
	__expect_set(v, want, file, line);
	free(want);
}

void __expect_armed(struct dsr *v, uint64_t first, uint64_t n, const char *file, int line)
{
	guest_write(v, 0, first, n);
	__expect_step(v, first, n, 1, file, line);
}

void markers_check(const struct dsr_ring *ring)
{
	uint64_t r = dsr_reset_marker(ring), c = dsr_consumer(ring), p = dsr_producer(ring);

	CHECK(r <= c && c <= p && p <= r + ring->entries,
	      "reset %lu consumer %lu producer %lu entries %u", r, c, p, ring->entries);
}

void check_dead(struct dsr *v, uint64_t first, uint64_t n, uint32_t cap)
{
	struct kvm_dirty_run run = { .offset = 0, .npages = 1 };
	uint8_t *got = set_new(v), *want = set_new(v);
	struct kvm_dirty_slot_log_info info;
	struct kvm_dirty_slot_reset reset;
	struct kvm_dirty_slot_runs args;

	info = dsr_info(v->fd);
	CHECK_EQ(info.flags, KVM_DIRTY_SLOT_LOG_DEAD);
	CHECK_EQ(info.npages, v->npages);
	CHECK_ERR(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_MARK, &run, 1, 0, &args), ENODEV);
	CHECK_ERR(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_DISCARD, &run, 1, 0, &args), ENODEV);
	if (n) {
		CHECK_EQ(poll_log(v->fd, 0), POLLIN | POLLHUP);
		set_add(want, first, n, 1);
		harvest_cap(v->fd, got, v->npages, 0, cap);
		set_check(v, got, want);
	}
	CHECK_EQ(poll_log(v->fd, 0), POLLHUP);
	CHECK_ERR(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, &run, 1, 0, &args), ENODEV);
	CHECK_ERR(__dsr_runs(v->fd, KVM_DIRTY_SLOT_LOG_HARVEST, &run, 1,
			     KVM_DIRTY_HARVEST_SYNC, &args), ENODEV);
	CHECK_ERR(__dsr_reset(v->fd, &reset), ENODEV);
	CHECK_EQ(dsr_info(v->fd).flags, KVM_DIRTY_SLOT_LOG_DEAD);
	free(got);
	free(want);
}

/* -- collectors ----------------------------------------------------------- */

void *taker_thread(void *arg)
{
	struct taker *t = arg;

	do {
		if (t->bitmap)
			t->nr += bitmap_take(t->v, t->got);
		else
			t->nr += harvest_cap(t->v->fd, t->got, t->v->npages, 0, 16);
	} while (!READ_ONCE(t->stop));
	return NULL;
}

void check_sync_batches(struct dsr *v, const uint8_t *want, int n)
{
	uint8_t *got;

	for (n = rounds(n); n; n--) {
		got = set_new(v);
		guest_batch(v, 0);
		harvest_cap(v->fd, got, v->npages, KVM_DIRTY_HARVEST_SYNC, MANY_RUNS);
		set_check(v, got, want);
		free(got);
	}
}

static void *liar_thread(void *arg)
{
	struct liar *l = arg;
	uint64_t x = 88172645463325252ull;

	while (!READ_ONCE(l->stop)) {
		x = xorshift(x);
		/* Never a valid value: those would be a reader's word. */
		dsr_set_consumer(l->ring, x | 1ull << 40);
	}
	return NULL;
}

void liar_start(struct liar *l)
{
	CHECK_OK(pthread_create(&l->thread, NULL, liar_thread, l));
}

void liar_stop(struct liar *l)
{
	WRITE_ONCE(l->stop, true);
	CHECK_OK(pthread_join(l->thread, NULL));
}

uint64_t mark_for_poller(const struct marked_log *logs, int nr, int fd,
			 const uint64_t *harvested)
{
	uint64_t marked = 0, since, end = now_ms() + (quick ? 500 : 5000);
	const struct marked_log *log;
	int i;

	while (now_ms() < end) {
		for (i = random() % 4; i >= 0; i--) {
			log = &logs[random() % nr];
			marked += dsr_mark(log->fd, random() % log->npages, 1);
			dither(400);
		}
		since = now_ms();
		while (__atomic_load_n(harvested, __ATOMIC_ACQUIRE) != marked) {
			CHECK(now_ms() - since < WAKE_UP_MS,
			      "poll() sleeps: %lu marked, %lu harvested, readable: %d",
			      marked, *harvested, poll_log(fd, 0));
			sched_yield();
		}
	}
	CHECK(marked, "no page marked");
	return marked;
}

struct gate gate;

int gate_handler(int mode, int uffd, struct uffd_msg *msg)
{
	static char page[PG] __aligned(PG);
	struct uffdio_copy copy = {
		.src = (uintptr_t)page,
		.dst = msg->arg.pagefault.address & ~(PG - 1),
		.len = PG,
	};

	WRITE_ONCE(gate.waiting, true);
	while (!READ_ONCE(gate.open))
		sched_yield();
	return ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST ? -1 : 0;
}

bool have_uffd(void)
{
	int fd = syscall(__NR_userfaultfd, O_CLOEXEC);

	if (fd >= 0)
		close(fd);
	return fd >= 0;
}

static void *gated_thread(void *arg)
{
	struct gated_call *c = arg;

	if (c->cmd == KVM_DIRTY_VM_LOG_HARVEST)
		c->ret = __dsr_vm_harvest(c->fd, c->runs, c->nr_runs, c->flags, &c->vm_args);
	else
		c->ret = __dsr_runs(c->fd, c->cmd, c->runs, c->nr_runs, c->flags, &c->args);
	c->err = errno;
	return NULL;
}

void gated_start(struct gated_call *c)
{
	c->runs = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(c->runs != MAP_FAILED, "no memory");
	WRITE_ONCE(gate.open, false);
	WRITE_ONCE(gate.waiting, false);
	c->uffd = uffd_setup_demand_paging(UFFDIO_REGISTER_MODE_MISSING, 0, c->runs, PG, 1,
					   gate_handler);
	CHECK_OK(pthread_create(&c->thread, NULL, gated_thread, c));
	while (!READ_ONCE(gate.waiting))
		sched_yield();
}

void gated_end(struct gated_call *c)
{
	WRITE_ONCE(gate.open, true);
	CHECK_OK(pthread_join(c->thread, NULL));
	uffd_stop_demand_paging(c->uffd);
}
