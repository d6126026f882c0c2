// SPDX-License-Identifier: GPL-2.0-only
/*
 * What stands in for arch/x86/kvm, for hardware and for the rest of the kernel.
 * The rules that the dirty log builds on are those of the TDP MMU:
 *
 *  - a fault marks the page, then installs the writable SPTE, under mmu_lock for
 *    read; the fast page fault does it the other way round and without a lock;
 *  - a vCPU may write through its TLB until it has been told to flush it;
 *  - with PML, hardware sets the D bit and buffers the page, and the buffer is
 *    marked some time after the vCPU has left the guest.
 */

#include <sys/mman.h>
#include <time.h>

#include "sim.h"

struct kvm *sim_kvm;
u64 *sim_memory;
__thread unsigned int shim_inject;
__thread bool shim_in_task = true;
__thread void (*shim_preempted)(void);
long shim_allocated;

static struct kvm_memslots sim_slots, sim_no_slots;
static struct kvm_memory_slot sim_slot;
static struct sim_vcpu *sim_vcpus[SIM_MAX_VCPUS];
static struct file sim_files[16];

void shim_warn(const char *what)
{
	fprintf(stderr, "FAIL: the kernel's code warns: %s\n", what);
	_exit(1);
}

static u32 shim_random(void)
{
	static __thread u64 state;

	if (!state)
		state = (uintptr_t)&state * 0x9e3779b97f4a7c15ULL | 1;
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state >> 32;
}

#ifdef SHIM_JITTER
void shim_jitter(void)
{
	void (*preempted)(void) = shim_preempted;
	u32 r = shim_random(), n;

	if (preempted && !(r % 16)) {
		shim_preempted = NULL;
		preempted();
		shim_preempted = preempted;
		return;
	}
	if (r % 64)
		return;
	r /= 64;
	if (!(r % 16)) {
		/* Long enough for others to do a whole call. */
		usleep(r / 16 % 64);
	} else if (!(r % 4)) {
		sched_yield();
	} else {
		for (n = r % 256; n; n--)
			barrier();
	}
}
#endif

bool shim_fails(void)
{
	return shim_inject && shim_random() % 256 < shim_inject;
}

void *shim_alloc(size_t size)
{
	void *p;

	/* Touched, as the kernel's would be: no page of zeroes behind it. */
	if (posix_memalign(&p, size < PAGE_SIZE ? 64 : PAGE_SIZE, size ?: 1)) {
		fprintf(stderr, "no memory for %zu MiB\n", size >> 20);
		exit(1);
	}
	memset(p, 0, size);
	__atomic_add_fetch(&shim_allocated, 1, __ATOMIC_RELAXED);
	return p;
}

void shim_free(const void *p)
{
	if (!p)
		return;
	__atomic_sub_fetch(&shim_allocated, 1, __ATOMIC_RELAXED);
	free((void *)p);
}

/*
 * Waiting.
 */

void init_waitqueue_head(wait_queue_head_t *w)
{
	pthread_mutex_init(&w->m, NULL);
	pthread_cond_init(&w->c, NULL);
	w->woken = 0;
}

void shim_poll_wait(struct file *file, wait_queue_head_t *w)
{
	file->wait = w;
}

void shim_wake_up(wait_queue_head_t *w)
{
	pthread_mutex_lock(&w->m);
	w->woken++;
	pthread_cond_broadcast(&w->c);
	pthread_mutex_unlock(&w->m);
}

static unsigned long woken(wait_queue_head_t *w)
{
	unsigned long n;

	pthread_mutex_lock(&w->m);
	n = w->woken;
	pthread_mutex_unlock(&w->m);
	return n;
}

static bool wait_woken(wait_queue_head_t *w, unsigned long seen, unsigned int ms)
{
	struct timespec t;
	bool r;

	clock_gettime(CLOCK_REALTIME, &t);
	t.tv_nsec += ms * 1000000L;
	t.tv_sec += t.tv_nsec / 1000000000L;
	t.tv_nsec %= 1000000000L;

	pthread_mutex_lock(&w->m);
	while (w->woken == seen && !pthread_cond_timedwait(&w->c, &w->m, &t))
		;
	r = w->woken != seen;
	pthread_mutex_unlock(&w->m);
	return r;
}

int sim_poll(int fd, unsigned int ms)
{
	struct file *file = &sim_files[fd];
	poll_table table = { 0 };
	unsigned long seen;
	__poll_t events;

	/* The first look also tells where it would wait. */
	events = file->f_op->poll(file, &table);
	if (events)
		return events;
	seen = woken(file->wait);
	events = file->f_op->poll(file, &table);
	if (events || wait_woken(file->wait, seen, ms))
		return events;

	events = file->f_op->poll(file, &table);
	/* Who made it readable just now may need a moment to say so. */
	if (events && !wait_woken(file->wait, seen, 1000))
		return -EDEADLK;
	return events;
}

/*
 * Files.
 */

int anon_inode_getfd(const char *name, const struct file_operations *fops, void *priv, int flags)
{
	unsigned int fd;

	(void)name;
	(void)flags;
	for (fd = 0; fd < ARRAY_SIZE(sim_files); fd++) {
		if (sim_files[fd].f_op)
			continue;
		sim_files[fd] = (struct file){ .private_data = priv, .f_op = fops };
		return fd;
	}
	return -EMFILE;
}

long sim_ioctl(int fd, unsigned int cmd, void *arg)
{
	return sim_files[fd].f_op->unlocked_ioctl(&sim_files[fd], cmd, (uintptr_t)arg);
}

/* Pages of a ring follow one another in memory as they do in the file. */
void *sim_mmap(int fd, unsigned long pgoff, bool writable)
{
	struct vm_area_struct vma = {
		.vm_pgoff = pgoff, .nr_pages = 1, .vm_file = &sim_files[fd],
		.vm_flags = VM_MAYSHARE | VM_MAYWRITE | (writable ? VM_WRITE : 0),
	};
	struct vm_fault fault = { .vma = &vma, .pgoff = pgoff };

	if (sim_files[fd].f_op->mmap(&sim_files[fd], &vma) || vma.vm_ops->fault(&fault))
		return NULL;
	return fault.page;
}

void sim_close(int fd)
{
	sim_files[fd].f_op->release(NULL, &sim_files[fd]);
	sim_files[fd].f_op = NULL;
}

/*
 * The page table.
 */

static u64 *sptep_of(struct kvm *kvm, int level, gfn_t gfn)
{
	return &kvm->spte[level][gfn >> (9 * level)];
}

/* A writable SPTE if @writable; never takes write access away. */
static void install_spte(struct kvm *kvm, gfn_t gfn, u64 spte)
{
	int level;

	for (level = SIM_LEVELS - 1; level > 0; level--) {
		if (!READ_ONCE(*sptep_of(kvm, level, gfn)))
			WRITE_ONCE(*sptep_of(kvm, level, gfn), SPTE_PRESENT);
	}
	__atomic_fetch_or(sptep_of(kvm, 0, gfn), spte, __ATOMIC_RELAXED);
}

void sim_map_page(gfn_t gfn)
{
	install_spte(sim_kvm, gfn, SPTE_PRESENT);
}

/*
 * One walk from the root for each leaf table, then from entry to entry up to the
 * last one of the mask, as the TDP MMU's iterator does.  Under mmu_lock.
 */
static void protect(struct kvm *kvm, struct kvm_memory_slot *slot, gfn_t gfn_offset,
		    unsigned long mask)
{
	gfn_t gfn = slot->base_gfn + gfn_offset + __ffs(mask);
	gfn_t end = slot->base_gfn + gfn_offset + __fls(mask) + 1;
	bool walk = true;
	u64 *sptep;
	int level;

	mask >>= __ffs(mask);
	for (; gfn < end; gfn++, mask >>= 1) {
		if (!(gfn % 512))
			walk = true;
		for (level = SIM_LEVELS - 1; walk && level > 0; level--) {
			if (!READ_ONCE(*sptep_of(kvm, level, gfn)))
				break;
		}
		if (walk && level)
			continue;
		walk = false;

		sptep = sptep_of(kvm, 0, gfn);
		if (READ_ONCE(*sptep) & kvm->log_mask && mask & 1)
			__atomic_fetch_and(sptep, ~kvm->log_mask, __ATOMIC_RELAXED);
	}
}

/* Set by a build with BREAK_PROTECT_FIRST. */
extern bool shim_protects_first;
bool shim_protects_first;

void kvm_arch_mmu_enable_log_dirty_pt_masked(struct kvm *kvm, struct kvm_memory_slot *slot,
					     gfn_t gfn_offset, unsigned long mask)
{
	if (!shim_protects_first)
		protect(kvm, slot, gfn_offset, mask);
}

/* What it calls before it clears bits. */
#undef shim_protect_word
void shim_protect_word(void *word, unsigned long mask);
void shim_protect_word(void *word, unsigned long mask)
{
	if (!mask)
		return;
	write_lock(&sim_kvm->mmu_lock);
	protect(sim_kvm, &sim_slot,
		((unsigned long *)word - sim_slot.dirty_bitmap) * BITS_PER_LONG, mask);
	write_unlock(&sim_kvm->mmu_lock);
	kvm_flush_remote_tlbs(sim_kvm);
}

/*
 * vCPUs.
 */

static struct sim_vcpu *to_sim(struct kvm_vcpu *vcpu)
{
	return container_of(vcpu, struct sim_vcpu, vcpu);
}

/* Comes back when no vCPU writes through what its TLB held before. */
void kvm_flush_remote_tlbs(struct kvm *kvm)
{
	u32 wanted[SIM_MAX_VCPUS];
	unsigned long i;
	struct kvm_vcpu *vcpu;
	struct sim_vcpu *s;

	kvm_for_each_vcpu(i, vcpu, kvm)
		wanted[i] = __atomic_add_fetch(&to_sim(vcpu)->flush_wanted, 1, __ATOMIC_SEQ_CST);
	smp_mb(); /* Pairs with enter(): it is seen there, or told there. */
	kvm_for_each_vcpu(i, vcpu, kvm) {
		s = to_sim(vcpu);
		while (__atomic_load_n(&s->in_guest, __ATOMIC_SEQ_CST)) {
			/* What it wrote through its old TLB comes before. */
			if ((s32)(smp_load_acquire(&s->flush_done) - wanted[i]) >= 0)
				break;
			sched_yield();
		}
	}
}

bool kvm_vcpu_kick(struct kvm_vcpu *vcpu)
{
	struct sim_vcpu *s = to_sim(vcpu);

	WRITE_ONCE(s->kicked, true);
	return true;
}

static void interrupts(struct sim_vcpu *s)
{
	u32 wanted = __atomic_load_n(&s->flush_wanted, __ATOMIC_SEQ_CST);

	if (wanted != s->flush_done) {
		s->tlb_time++;
		/* Pairs with kvm_flush_remote_tlbs(). */
		smp_store_release(&s->flush_done, wanted);
	}
}

/* False if the vCPU must leave to userspace instead. */
static bool enter(struct sim_vcpu *s)
{
	struct kvm *kvm = s->vcpu.kvm;
	int idx = srcu_read_lock(&kvm->srcu);
	bool leave = kvm_dirty_slot_ring_check_request(&s->vcpu);

	srcu_read_unlock(&kvm->srcu, idx);
	if (leave)
		return false;

	if (s->config->pml)
		kvm_dirty_slot_ring_hw_enter(&s->vcpu.dirty_slot_ring);
	__atomic_store_n(&s->in_guest, true, __ATOMIC_SEQ_CST);
	smp_mb(); /* Pairs with kvm_flush_remote_tlbs() and SYNC. */
	interrupts(s);
	return true;
}

void sim_exit(struct kvm_vcpu *vcpu)
{
	struct sim_vcpu *s = to_sim(vcpu);
	unsigned int i;
	int idx;

	if (!s->in_guest)
		return;
	WRITE_ONCE(s->kicked, false);
	__atomic_store_n(&s->in_guest, false, __ATOMIC_SEQ_CST);
	shim_jitter();
	idx = srcu_read_lock(&vcpu->kvm->srcu);
	for (i = 0; i < s->nr_pml; i++)
		mark_page_dirty_in_slot(vcpu->kvm, vcpu->kvm->memslots->slot[0], vcpu, s->pml[i]);
	srcu_read_unlock(&vcpu->kvm->srcu, idx);
	s->nr_pml = 0;
	kvm_dirty_slot_ring_hw_flushed(&vcpu->dirty_slot_ring);
}

void sim_fault(struct kvm_vcpu *vcpu, gfn_t gfn)
{
	struct kvm *kvm = vcpu->kvm;
	const struct sim_config *config = to_sim(vcpu)->config;
	const struct kvm_memory_slot *memslot = kvm->memslots->slot[0];
	u64 *sptep = sptep_of(kvm, 0, gfn), old = READ_ONCE(*sptep);

	if (config->fast_fault && old & SPTE_PRESENT) {
		/* As fast_pf_fix_direct_spte(). */
		if (kvm_dirty_slot_ring_enabled(kvm))
			kvm_dirty_slot_ring_hw_enter(&vcpu->dirty_slot_ring);
		if (!(old & SPTE_WRITABLE) && cmpxchg(sptep, old, old | SPTE_WRITABLE) == old) {
			shim_jitter();
			mark_page_dirty_in_slot(kvm, memslot, vcpu, gfn);
		}
		kvm_dirty_slot_ring_hw_flushed(&vcpu->dirty_slot_ring);
	} else {
		/* As make_spte(), then tdp_mmu_map_handle_target_level(). */
		read_lock(&kvm->mmu_lock);
		mark_page_dirty_in_slot(kvm, memslot, vcpu, gfn);
		shim_jitter();
		install_spte(kvm, gfn, SPTE_PRESENT | SPTE_WRITABLE | SPTE_DIRTY);
		read_unlock(&kvm->mmu_lock);
	}
}

u64 sim_write(struct kvm_vcpu *vcpu, gfn_t gfn)
{
	struct sim_vcpu *s = to_sim(vcpu);
	u64 *sptep = sptep_of(vcpu->kvm, 0, gfn), old;
	int idx;

	for (;;) {
		if (!s->in_guest && !enter(s))
			return 0;
		interrupts(s);
		if (READ_ONCE(s->kicked)) {
			sim_exit(vcpu);
			continue;
		}
		if (s->tlb[gfn] == s->tlb_time)
			break;
		old = READ_ONCE(*sptep);
		if (!(old & SPTE_WRITABLE)) {
			sim_exit(vcpu);
			idx = srcu_read_lock(&vcpu->kvm->srcu);
			sim_fault(vcpu, gfn);
			srcu_read_unlock(&vcpu->kvm->srcu, idx);
			continue;
		}
		if (s->config->pml && !(old & SPTE_DIRTY)) {
			if (s->nr_pml == ARRAY_SIZE(s->pml)) {
				sim_exit(vcpu);
				continue;
			}
			if (cmpxchg(sptep, old, old | SPTE_DIRTY) != old)
				continue;
			s->pml[s->nr_pml++] = gfn;
		}
		s->tlb[gfn] = s->tlb_time;
		break;
	}
	/* Between the look at the TLB and the write there is no interrupt. */
	shim_jitter();
	return __atomic_add_fetch(&sim_memory[gfn], 1, __ATOMIC_RELAXED);
}

/*
 * The VM.
 */

static void init_rwlock(pthread_rwlock_t *l, int kind)
{
	pthread_rwlockattr_t attr;

	pthread_rwlockattr_init(&attr);
	pthread_rwlockattr_setkind_np(&attr, kind);
	pthread_rwlock_init(l, &attr);
}

static void *reserve(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED) {
		fprintf(stderr, "no %zu MiB of address space (%s): see ulimit -v\n",
			size >> 20, strerror(errno));
		exit(1);
	}
	/* As sparse as the kernel's page tables. */
	madvise(p, size, MADV_NOHUGEPAGE);
	return p;
}

struct kvm *sim_create(const struct sim_config *config)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_DIRTY_SLOT_RING, .args = { config->entries, config->flags },
	};
	struct kvm *kvm = shim_alloc(sizeof(*kvm));
	struct sim_vcpu *s;
	unsigned int i;
	int r = 0;

	sim_kvm = kvm;
	/* Faults shall not starve a harvest, which the kernel's lock sees to. */
	init_rwlock(&kvm->mmu_lock.l, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	init_rwlock(&kvm->srcu.l, PTHREAD_RWLOCK_PREFER_READER_NP);
	mutex_init(&kvm->lock);
	mutex_init(&kvm->slots_lock);
	atomic_set(&kvm->users, 1);
	kvm->max_vcpus = SIM_MAX_VCPUS;
	kvm->init_set = config->init_set;
	kvm->log_mask = config->pml ? SPTE_DIRTY : SPTE_WRITABLE;
	for (i = 0; i < SIM_LEVELS; i++) {
		kvm->spte_size[i] = ((config->npages >> (9 * i)) + 1) * sizeof(u64);
		kvm->spte[i] = reserve(kvm->spte_size[i]);
	}
	if (config->memory)
		sim_memory = reserve(config->npages * sizeof(u64));

	sim_slot = (struct kvm_memory_slot){ .npages = config->npages };
	sim_slots.slot[0] = &sim_slot;
	kvm->memslots = &sim_slots;
	if (config->entries)
		r = kvm_dirty_slot_ring_enable(kvm, &cap);

	/* Half of the vCPUs are there before the log, half come after it. */
	for (i = 0; i < config->nr_vcpus; i++) {
		if (i == config->nr_vcpus / 2 && config->entries)
			r = r ?: kvm_dirty_slot_log_create(kvm, &sim_slot);
		s = shim_alloc(sizeof(*s));
		sim_vcpus[i] = s;
		s->config = config;
		s->tlb_time = 1;
		if (config->memory)
			s->tlb = reserve(config->npages * sizeof(*s->tlb));
		s->vcpu.kvm = kvm;
		s->vcpu.vcpu_id = i;
		s->vcpu.vcpu_idx = i;
		s->vcpu.run = &s->run;
		s->vcpu.sim = s;
		r = r ?: kvm_dirty_slot_ring_add_vcpu(&s->vcpu);
		kvm->vcpus[i] = &s->vcpu;
		atomic_inc(&kvm->online_vcpus);
	}
	if (r) {
		fprintf(stderr, "FAIL: cannot create the log: %s\n", strerror(-r));
		exit(1);
	}
	return kvm;
}

void sim_delete_slot(void)
{
	struct kvm *kvm = sim_kvm;

	mutex_lock(&kvm->slots_lock);
	kvm_dirty_slot_log_stop(kvm, &sim_slot);
	/* Readers of kvm->srcu are gone when it comes back. */
	pthread_rwlock_wrlock(&kvm->srcu.l);
	kvm->memslots = &sim_no_slots;
	pthread_rwlock_unlock(&kvm->srcu.l);
	kvm_dirty_slot_log_release(&sim_slot);
	mutex_unlock(&kvm->slots_lock);
}

void sim_destroy(void)
{
	struct kvm *kvm = sim_kvm;
	unsigned long npages = sim_slot.npages;
	unsigned int i;

	if (kvm->memslots == &sim_slots)
		sim_delete_slot();
	for (i = 0; i < (unsigned int)atomic_read(&kvm->online_vcpus); i++) {
		if (sim_vcpus[i]->tlb)
			munmap(sim_vcpus[i]->tlb, npages * sizeof(u32));
		shim_free(sim_vcpus[i]);
	}
	if (sim_memory)
		munmap(sim_memory, npages * sizeof(u64));
	sim_memory = NULL;
	for (i = 0; i < SIM_LEVELS; i++)
		munmap(kvm->spte[i], kvm->spte_size[i]);
	shim_free(kvm);
}
