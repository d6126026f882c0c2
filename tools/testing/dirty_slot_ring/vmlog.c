// SPDX-License-Identifier: GPL-2.0-only
/*
 * The log of a whole VM: memslots come, change and go while vCPUs write to them, and
 * while the VM's file and those of memslots are harvested by several threads.
 *
 * In each case, again and again: let all of them run, stop them, take what is left,
 * then
 *
 *  - of each memslot that is there, the copy is the memory;
 *  - of each one that was deleted, the copy has all that had been written when its
 *    deletion began; and none of its pages is ever reported again.
 *
 * And while they run
 *
 *  - no page is reported more often than it was marked, for each log by itself;
 *  - no log is in an answer before the file has told of it.
 */

#include "stress.h"

#define STRIDE		256		/* pages of guest memory for each slot... */
#define MAX_LOGS	4096

struct vm_case {
	struct sim_config vm;
	unsigned int slots;		/* numbers that memslots can have */
	u32 capacity;			/* of a harvest's array */
	unsigned int harvesters;	/* of the VM, */
	unsigned int slot_harvesters;	/* of memslots, */
	bool one_file;			/* all by one file of the VM */
	bool wait;			/* harvest when poll() says so */
	bool sync;
	bool discard;			/* DISCARD and MARK */
	bool vcpus_come;
	unsigned int inject;		/* chance, in 256, of a fault or signal */
};

/* What the test knows of a log.  One for each that there ever was. */
struct record {
	int slot;
	unsigned long npages;
	bool deleted, finished;
	u32 marks[STRIDE], reports[STRIDE];
	u64 copy[STRIDE];		/* what readers got of each page */
	u64 written[STRIDE];		/* when its deletion began */
};

static const struct vm_case *test;
static struct record *records[MAX_LOGS];
static unsigned int nr_logs;		/* made so far, or being made */
static int vm_fd;
static u64 harvested, changes;

static void count_mark(const struct kvm_memory_slot *memslot, gfn_t gfn, int n)
{
	struct record *rec = memslot->test;

	__atomic_add_fetch(&rec->marks[gfn - memslot->base_gfn], n, __ATOMIC_RELAXED);
}

/*
 * Writers.
 */

static void *vcpu_thread(void *arg)
{
	struct kvm_vcpu *vcpu = arg;
	const gfn_t nr = test->slots * STRIDE;
	u64 rnd = 0x9e3779b97f4a7c15ULL * (vcpu->vcpu_idx + 1), val;
	gfn_t gfn = 0;
	u32 how;

	while (rounds_go_on(vcpu)) {
		how = random_u32(&rnd);
		gfn = how % 8 ? gfn - gfn % STRIDE + how / 8 % STRIDE : how / 8 % nr;
		how = random_u32(&rnd) % 64;
		if (how == 8) {
			sim_exit(vcpu);
			val = write_as_kvm(NULL, gfn);
		} else if (how < 8) {
			sim_exit(vcpu);
			val = write_as_vcpu(vcpu, gfn, (gfn + 100) % nr);
		} else {
			val = sim_write(vcpu, gfn);
		}
		if (!val)
			gfn = random_u32(&rnd) % nr;
		/* Now and then none of its rings has anything for a while. */
		if (how == 63) {
			sim_exit(vcpu);
			usleep(200);
		}
	}
	return NULL;
}

static void create(int id, u64 *rnd)
{
	struct record *rec = calloc(1, sizeof(*rec));
	gfn_t base = id * STRIDE;
	unsigned int nr = nr_logs + 1, i;
	int r;

	if (nr == MAX_LOGS)
		return;
	rec->slot = id;
	rec->npages = 1 + random_u32(rnd) % STRIDE;
	for (i = 0; i < rec->npages; i++) {
		/* Nobody can write to what is in no memslot. */
		rec->copy[i] = __atomic_load_n(&sim_memory[base + i], __ATOMIC_RELAXED);
		rec->marks[i] = test->vm.init_set;
	}
	__atomic_store_n(&records[nr], rec, __ATOMIC_RELEASE);
	__atomic_store_n(&nr_logs, nr, __ATOMIC_RELEASE);
	r = sim_create_slot(id, base, rec->npages, rec);
	if (r)
		fail("cannot create a memslot: %s", strerror(-r));
}

static void delete(int id)
{
	struct record *rec = sim_slot(id)->test;
	unsigned int i;

	for (i = 0; i < rec->npages; i++)
		rec->written[i] = __atomic_load_n(&sim_memory[id * STRIDE + i], __ATOMIC_RELAXED);
	rec->deleted = true;
	sim_delete_slot(id);
}

static void *manager_thread(void *arg)
{
	unsigned int more = test->vcpus_come ? 4 : 0;
	u64 rnd = 4711;
	int id;

	(void)arg;
	while (rounds_go_on(NULL)) {
		id = random_u32(&rnd) % test->slots;
		if (!sim_slot(id))
			create(id, &rnd);
		else if (random_u32(&rnd) % 3)
			sim_change_slot(id);
		else
			delete(id);
		changes++;
		if (more && !(random_u32(&rnd) % 32)) {
			more--;
			if (sim_add_vcpu())
				fail("a vCPU cannot come");
		}
		usleep(random_u32(&rnd) % 1024);
	}
	return NULL;
}

/*
 * Consumers.
 */

static struct record *record_of(u32 log)
{
	struct record *rec = NULL;

	if (log && log < MAX_LOGS)
		rec = __atomic_load_n(&records[log], __ATOMIC_ACQUIRE);
	if (!rec)
		fail("there is no log %u", log);
	return rec;
}

static void copy_page(struct record *rec, u32 page)
{
	u64 val = __atomic_load_n(&sim_memory[rec->slot * STRIDE + page], __ATOMIC_RELAXED);
	u64 old = __atomic_load_n(&rec->copy[page], __ATOMIC_RELAXED);

	while (old < val && !__atomic_compare_exchange_n(&rec->copy[page], &old, val, false,
							 __ATOMIC_RELAXED, __ATOMIC_RELAXED))
		;
}

static void take_page(struct record *rec, u32 page)
{
	u32 n;

	if (page >= rec->npages)
		fail("page %u of a memslot of %lu", page, rec->npages);
	if (READ_ONCE(rec->finished))
		fail("a page of a memslot that is gone, long after it was");
	n = __atomic_add_fetch(&rec->reports[page], 1, __ATOMIC_RELAXED);
	if (n > __atomic_load_n(&rec->marks[page], __ATOMIC_RELAXED))
		fail("page %u of slot %d reported %u times, more often than marked", page,
		     rec->slot, n);
	copy_page(rec, page);
}

struct reader {
	int fd;
	unsigned int known;		/* logs that its file has told of */
	struct kvm_dirty_vm_run *runs;
};

/* 0, KVM_DIRTY_HARVEST_MORE or an error. */
static int harvest_once(struct reader *r, u64 *nr_pages)
{
	struct kvm_dirty_vm_harvest args = {
		.runs = (uintptr_t)r->runs, .nr_runs = test->capacity,
		.flags = test->sync ? KVM_DIRTY_HARVEST_SYNC : 0,
	};
	struct record *rec;
	u32 i, j;
	u64 n = 0;
	int ret;

	ret = sim_ioctl(r->fd, KVM_DIRTY_VM_LOG_HARVEST, &args);
	if (ret)
		return ret;
	if (args.nr_runs > test->capacity)
		fail("%u runs in an array of %u", args.nr_runs, test->capacity);
	if (args.flags & KVM_DIRTY_HARVEST_LAYOUT)
		r->known = __atomic_load_n(&nr_logs, __ATOMIC_ACQUIRE);
	for (i = 0; i < args.nr_runs; i++) {
		rec = record_of(r->runs[i].log);
		if (!test->one_file && r->runs[i].log > r->known)
			fail("log %u, and the file has not told of it", r->runs[i].log);
		if (r->runs[i].slot != (u32)rec->slot || !r->runs[i].npages)
			fail("a run of slot %u, log %u", r->runs[i].slot, r->runs[i].log);
		n += r->runs[i].npages;
		for (j = 0; j < r->runs[i].npages; j++)
			take_page(rec, r->runs[i].offset + j);
	}
	if (n != args.nr_pages)
		fail("%llu pages in the runs, nr_pages %llu", n, args.nr_pages);
	__atomic_add_fetch(&harvested, n, __ATOMIC_RELAXED);
	*nr_pages += n;
	return args.flags & KVM_DIRTY_HARVEST_MORE;
}

static int harvest_all(struct reader *r, u64 *nr_pages)
{
	int ret;

	*nr_pages = 0;
	do {
		ret = harvest_once(r, nr_pages);
		if (ret < 0 && ret != -ENODEV &&
		    !(shim_inject && (ret == -EINTR || ret == -EFAULT)))
			fail("HARVEST of the VM: %s", strerror(-ret));
	} while (ret && ret != -ENODEV);
	return ret;
}

static int open_vm(void)
{
	struct kvm_dirty_slot_log_fd arg = { .slot = KVM_DIRTY_SLOT_ALL };
	int fd;

	do
		fd = kvm_vm_ioctl_get_dirty_slot_log_fd(sim_kvm, &arg);
	while (shim_inject && fd == -EFAULT);
	if (fd < 0)
		fail("no file of the VM: %s", strerror(-fd));
	return fd;
}

static void *vm_thread(void *arg)
{
	struct reader r = { .runs = calloc(test->capacity, sizeof(*r.runs)) };
	u64 nr_pages;
	int ret;

	(void)arg;
	shim_inject = test->inject;
	r.known = __atomic_load_n(&nr_logs, __ATOMIC_ACQUIRE);
	r.fd = test->one_file ? vm_fd : open_vm();
	while (rounds_go_on(NULL)) {
		if (test->wait) {
			ret = sim_poll(r.fd, 3);
			if (ret < 0)
				fail("the VM's file became readable and woke nobody");
			if (!ret)
				continue;
		}
		harvest_all(&r, &nr_pages);
	}
	if (!test->one_file)
		sim_close(r.fd);
	free(r.runs);
	return NULL;
}

/* One memslot's own file, for a while or until its memslot has gone. */
static void harvest_slot(int fd, struct record *rec, struct kvm_dirty_run *runs, u64 *rnd)
{
	struct kvm_dirty_slot_runs args;
	struct kvm_dirty_run run;
	unsigned int calls = random_u32(rnd) % 64;
	bool nodev = false;
	u32 i, j;
	int r;

	while (calls-- && !round_ends()) {
		if (test->discard && !(random_u32(rnd) % 4)) {
			run.offset = random_u32(rnd) % rec->npages;
			run.npages = 1 + random_u32(rnd) % (rec->npages - run.offset);
			args = (struct kvm_dirty_slot_runs){
				.runs = (uintptr_t)&run, .nr_runs = 1,
			};
			if (random_u32(rnd) % 2) {
				for (j = 0; j < run.npages; j++)
					__atomic_add_fetch(&rec->marks[run.offset + j], 1,
							   __ATOMIC_RELAXED);
				r = sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_MARK, &args);
			} else {
				r = sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_DISCARD, &args);
				for (j = 0; j < run.npages; j++)
					copy_page(rec, run.offset + j);
			}
			if (r && r != -ENODEV && !(shim_inject && (r == -EINTR || r == -EFAULT)))
				fail("MARK or DISCARD: %s", strerror(-r));
			continue;
		}
		args = (struct kvm_dirty_slot_runs){
			.runs = (uintptr_t)runs, .nr_runs = test->capacity,
		};
		r = sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_HARVEST, &args);
		if (nodev && !r)
			fail("%u runs, flags %x after -ENODEV", args.nr_runs, args.flags);
		if (r) {
			if (r != -ENODEV && !(shim_inject && (r == -EINTR || r == -EFAULT)))
				fail("HARVEST: %s", strerror(-r));
			nodev |= r == -ENODEV;
			continue;
		}
		for (i = 0; i < args.nr_runs; i++)
			for (j = 0; j < runs[i].npages; j++)
				take_page(rec, runs[i].offset + j);
		__atomic_add_fetch(&harvested, args.nr_pages, __ATOMIC_RELAXED);
	}
}

static void *slot_thread(void *arg)
{
	struct kvm_dirty_run *runs = calloc(test->capacity, sizeof(*runs));
	struct kvm_dirty_slot_log_fd which = { 0 };
	struct kvm_dirty_slot_log_info info;
	u64 rnd = (uintptr_t)arg + 1;
	int fd;

	while (rounds_go_on(NULL)) {
		shim_inject = 0;
		which.slot = random_u32(&rnd) % test->slots;
		fd = kvm_vm_ioctl_get_dirty_slot_log_fd(sim_kvm, &which);
		if (fd == -ENOENT)
			continue;
		if (fd < 0 || sim_ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info))
			fail("a memslot's file: %s", strerror(-fd));
		shim_inject = test->inject;
		harvest_slot(fd, record_of(info.log), runs, &rnd);
		sim_close(fd);
	}
	free(runs);
	return NULL;
}

/*
 * Checks.
 */

static void check_record(struct record *rec)
{
	gfn_t base = rec->slot * STRIDE;
	unsigned int i;

	for (i = 0; i < rec->npages; i++) {
		if (rec->deleted ? rec->copy[i] < rec->written[i] :
				   rec->copy[i] != sim_memory[base + i])
			fail("page %u of slot %d%s lost: memory %llu, written %llu, copy %llu, "
			     "marks %u, reports %u", i, rec->slot,
			     rec->deleted ? ", which is gone," : "", sim_memory[base + i],
			     rec->written[i], rec->copy[i], rec->marks[i], rec->reports[i]);
		if (!rec->deleted && sim_unlogged(base + i))
			fail("page %u of slot %d is not in the log, and writes to it would not be",
			     i, rec->slot);
	}
}

/* All but the main thread wait. */
static void check_round(void *arg)
{
	struct reader *r = arg;
	u64 nr_pages;
	unsigned int i;

	harvest_all(r, &nr_pages);
	for (i = 1; i <= nr_logs; i++) {
		if (records[i]->finished)
			continue;
		check_record(records[i]);
		records[i]->finished = records[i]->deleted;
	}
	harvest_all(r, &nr_pages);
	if (nr_pages)
		fail("the logs were empty, and there are %llu pages", nr_pages);
}

/* The VM goes with its memslots, of which pages are dirty. */
static void check_end(struct reader *r)
{
	const gfn_t nr = test->slots * STRIDE;
	u64 *memory = calloc(nr, sizeof(*memory)), nr_pages;
	unsigned int i, j;

	for (i = 0; i < nr; i += 3)
		write_as_kvm(i % 2 ? sim_kvm->vcpus[0] : NULL, i);
	memcpy(memory, sim_memory, nr * sizeof(*memory));
	for (i = 1; i <= nr_logs; i++) {
		if (records[i]->finished)
			continue;
		records[i]->deleted = true;
		for (j = 0; j < records[i]->npages; j++)
			records[i]->written[j] = memory[records[i]->slot * STRIDE + j];
	}
	sim_destroy();
	/* It is unmapped, and readers copy. */
	sim_memory = memory;
	while (harvest_all(r, &nr_pages) != -ENODEV)
		;
	for (i = 1; i <= nr_logs; i++) {
		if (!records[i]->finished)
			check_record(records[i]);
		free(records[i]);
		records[i] = NULL;
	}
	sim_memory = NULL;
	free(memory);
	if (sim_poll(r->fd, 0) != EPOLLHUP)
		fail("poll() of a VM that is gone");
}

static void run_case(const struct vm_case *which, unsigned int ms)
{
	struct vm_case now = *which;
	struct reader own = { 0 };
	unsigned int i, rounds;

	test = &now;
	now.vm.memory = true;
	now.vm.nr_gfns = now.slots * STRIDE;
	harvested = 0;
	changes = 0;
	nr_logs = 0;
	on_mark = count_mark;
	sim_create(&now.vm);
	vm_fd = open_vm();
	own.fd = vm_fd;
	own.known = MAX_LOGS;
	own.runs = calloc(now.capacity, sizeof(*own.runs));

	rounds_begin(now.vm.nr_vcpus + 1 + now.harvesters + now.slot_harvesters);
	for (i = 0; i < now.vm.nr_vcpus; i++)
		rounds_start(vcpu_thread, sim_kvm->vcpus[i]);
	rounds_start(manager_thread, NULL);
	for (i = 0; i < now.harvesters; i++)
		rounds_start(vm_thread, NULL);
	for (i = 0; i < now.slot_harvesters; i++)
		rounds_start(slot_thread, (void *)(uintptr_t)i);

	rounds = rounds_run(ms, check_round, &own);
	check_round(&own);
	printf("# %s: %u rounds, %llu changes of memslots, %llu pages harvested\n", case_name,
	       rounds, changes, harvested);
	if (!harvested)
		fail("nothing was harvested");
	check_end(&own);

	on_mark = NULL;
	sim_close(vm_fd);
	free(own.runs);
}

static void run_vm(unsigned int ms)
{
	static const struct vm_case c = {
		.vm = { .nr_vcpus = 3, .entries = 64, .fast_fault = true },
		.slots = 6, .capacity = 64, .harvesters = 2, .slot_harvesters = 2,
		.vcpus_come = true,
	};

	run_case(&c, ms);
}

static void run_vm_small(unsigned int ms)
{
	static const struct vm_case c = {
		.vm = { .nr_vcpus = 2, .entries = 8, .init_set = true },
		.slots = 8, .capacity = 5, .harvesters = 3, .one_file = true,
	};

	run_case(&c, ms);
}

static void run_vm_faults(unsigned int ms)
{
	static const struct vm_case c = {
		.vm = { .nr_vcpus = 2, .entries = 32, .fast_fault = true },
		.slots = 4, .capacity = 40, .harvesters = 2, .slot_harvesters = 2,
		.discard = true, .inject = 16,
	};

	run_case(&c, ms);
}

static void run_vm_poll(unsigned int ms)
{
	static const struct vm_case c = {
		.vm = { .nr_vcpus = 2, .entries = 16, .init_set = true },
		.slots = 3, .capacity = 1000, .harvesters = 1, .wait = true,
	};

	run_case(&c, ms);
}

static void run_vm_pml(unsigned int ms)
{
	static const struct vm_case c = {
		.vm = { .nr_vcpus = 2, .entries = 256, .pml = true },
		.slots = 4, .capacity = 1000, .harvesters = 1, .slot_harvesters = 1,
		.sync = true, .discard = true,
	};

	run_case(&c, ms);
}

const struct stress_case vm_cases[] = {
	{ "vm", "memslots come and go, 2 harvest the VM and 2 its memslots", run_vm },
	{ "vm-small", "tiny arrays, 3 threads with one file, pages that start dirty", run_vm_small },
	{ "vm-faults", "arrays that cannot be written, signals, MARK and DISCARD", run_vm_faults },
	{ "vm-poll", "harvested when poll() says so", run_vm_poll },
	{ "vm-pml", "PML buffers, with SYNC", run_vm_pml },
	{ }
};
