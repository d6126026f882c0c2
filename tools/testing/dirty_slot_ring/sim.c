// SPDX-License-Identifier: GPL-2.0-only
/*
 * What stands in for arch/x86/kvm, for hardware and for the rest of the kernel.
 * The rules that the dirty log builds on are those of the TDP MMU:
 *
 *  - a fault marks the page, then installs the writable SPTE and looks at the page's
 *    bit again, under mmu_lock for read; the fast page fault installs, then marks, and
 *    without a lock;
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
struct shim_pool shim_pool;
__thread unsigned int *shim_warnings;

__thread void (*shim_before_copy)(void);
__thread bool shim_calm, shim_step_locks, shim_step_spins;
__thread unsigned int shim_steps;
__thread void (*shim_at_step)(void);
__thread int shim_spinlocks, shim_mutexes;
__thread int shim_reading;
bool tdp_mmu_enabled = true;
struct shim_x86_ops kvm_x86_ops;

static struct sim_vcpu *sim_vcpus[SIM_MAX_VCPUS];
static const struct sim_config *sim_config;
static unsigned long sim_nr_gfns;
static struct file sim_files[32];
static pthread_mutex_t sim_files_lock = PTHREAD_MUTEX_INITIALIZER;

void shim_warn(const char *what)
{
	if (shim_warnings) {
		++*shim_warnings;
		return;
	}
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
	u32 r, n;

	if (shim_calm) {
		if (!shim_steps || (shim_spinlocks && !shim_step_spins) ||
		    (shim_step_locks && shim_mutexes))
			return;
		if (!--shim_steps)
			shim_at_step();
		return;
	}
	r = shim_random();
	if (preempted && !shim_spinlocks && !(r % 16)) {
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

bool shim_signal;

bool shim_fails(void)
{
	return shim_inject && shim_random() % 256 < shim_inject;
}

/* Whole pages from its end, which need not be touched; the rest side by side. */
static void *pool_alloc(size_t size)
{
	bool pages = size >= PAGE_SIZE;
	char *p;

	size = round_up(size, pages ? PAGE_SIZE : 64);
	if (size > (size_t)(shim_pool.last - shim_pool.next)) {
		fprintf(stderr, "no room for %zu bytes in the pool\n", size);
		exit(1);
	}
	if (pages) {
		shim_pool.last -= size;
		p = shim_pool.last;
	} else {
		p = shim_pool.next;
		shim_pool.next += size;
	}
	__atomic_add_fetch(&shim_allocated, 1, __ATOMIC_RELAXED);
	return p;
}

void *shim_alloc(size_t size)
{
	void *p;

	if (shim_pool.start)
		return pool_alloc(size);
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
	if ((char *)p < shim_pool.start || (char *)p >= shim_pool.end)
		free((void *)p);
}

/*
 * SRCU.
 */

static int shim_nr_threads;
static __thread int shim_thread = -1;

void init_srcu_struct(struct srcu_struct *s)
{
	s->gp = 1;
}

int srcu_read_lock(struct srcu_struct *s)
{
	if (shim_reading++)
		return 0;
	if (shim_thread < 0) {
		shim_thread = __atomic_fetch_add(&shim_nr_threads, 1, __ATOMIC_SEQ_CST);
		if (shim_thread >= SHIM_MAX_THREADS)
			shim_warn("more threads than SHIM_MAX_THREADS");
	}
	/* An addition, for ThreadSanitizer: see what was before this grace period. */
	__atomic_store_n(&s->reader[shim_thread].since,
			 __atomic_fetch_add(&s->gp, 0, __ATOMIC_SEQ_CST), __ATOMIC_SEQ_CST);
	smp_mb();
	return 0;
}

void srcu_read_unlock(struct srcu_struct *s, int idx)
{
	(void)idx;
	if (--shim_reading)
		return;
	shim_jitter();
	__atomic_store_n(&s->reader[shim_thread].since, 0, __ATOMIC_SEQ_CST);
}

unsigned long start_poll_synchronize_srcu(struct srcu_struct *s)
{
	return __atomic_add_fetch(&s->gp, 1, __ATOMIC_SEQ_CST);
}

/* Who began to read since the grace period did sees all that was before. */
bool poll_state_synchronize_srcu(struct srcu_struct *s, unsigned long cookie)
{
	unsigned long since;
	int i;

	smp_mb();
	for (i = 0; i < min(__atomic_load_n(&shim_nr_threads, __ATOMIC_SEQ_CST),
			    SHIM_MAX_THREADS); i++) {
		since = __atomic_load_n(&s->reader[i].since, __ATOMIC_SEQ_CST);
		if (since && since < cookie)
			return false;
	}
	smp_mb();
	return true;
}

void synchronize_srcu(struct srcu_struct *s)
{
	unsigned long cookie = start_poll_synchronize_srcu(s);

	while (!poll_state_synchronize_srcu(s, cookie))
		sched_yield();
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
	if (events || !ms)
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

unsigned long sim_edge(int fd)
{
	poll_table table = { 0 };

	if (!sim_files[fd].wait)
		sim_files[fd].f_op->poll(&sim_files[fd], &table);
	return woken(sim_files[fd].wait);
}

bool sim_wait_edge(int fd, unsigned long seen, unsigned int ms)
{
	return wait_woken(sim_files[fd].wait, seen, ms);
}

/*
 * Files.
 */

int anon_inode_getfd(const char *name, const struct file_operations *fops, void *priv, int flags)
{
	unsigned int fd;

	(void)name;
	(void)flags;
	pthread_mutex_lock(&sim_files_lock);
	for (fd = 0; fd < ARRAY_SIZE(sim_files) && sim_files[fd].f_op; fd++)
		;
	if (fd < ARRAY_SIZE(sim_files))
		sim_files[fd] = (struct file){ .private_data = priv, .f_op = fops };
	pthread_mutex_unlock(&sim_files_lock);
	return fd < ARRAY_SIZE(sim_files) ? (int)fd : -EMFILE;
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
	pthread_mutex_lock(&sim_files_lock);
	sim_files[fd].f_op = NULL;
	pthread_mutex_unlock(&sim_files_lock);
}

/*
 * The page tables.  Under mmu_lock, or as the fast page fault does it, without: no
 * table goes before the VM does.
 */

#define SPTE_LEAF	(SPTE_MMU_PRESENT_MASK)

static struct kvm_mmu_page sim_root, sim_old_root;

static u64 gfn_spte(gfn_t gfn, u64 bits)
{
	return gfn << PAGE_SHIFT | SPTE_LEAF | bits;
}

static u64 *table_of(u64 spte)
{
	return __va(spte & SPTE_BASE_ADDR_MASK);
}

/*
 * Where page tables come from that shall not cost misses of this machine's TLB which
 * the kernel's do not have: it maps its memory by huge pages.  One thread at a time.
 */
#define ARENA_CHUNK	(16UL << 20)

static struct {
	char *chunk[4096];
	unsigned int nr_chunks;
	unsigned long used;	/* of the last one */
} arena;

static void *arena_alloc(void)
{
	void *p;

	if (!arena.nr_chunks || arena.used == ARENA_CHUNK) {
		if (arena.nr_chunks == ARRAY_SIZE(arena.chunk) ||
		    posix_memalign(&p, 2UL << 20, ARENA_CHUNK)) {
			fprintf(stderr, "no memory for page tables\n");
			exit(1);
		}
		madvise(p, ARENA_CHUNK, MADV_HUGEPAGE);
		memset(p, 0, ARENA_CHUNK);
		arena.chunk[arena.nr_chunks++] = p;
		arena.used = 0;
	}
	p = arena.chunk[arena.nr_chunks - 1] + arena.used;
	arena.used += PAGE_SIZE;
	return p;
}

static void arena_free(void)
{
	while (arena.nr_chunks)
		free(arena.chunk[--arena.nr_chunks]);
}

static void *table_alloc(void)
{
	return sim_config->huge_tables ? arena_alloc() : shim_alloc(PAGE_SIZE);
}

static void table_free(void *table)
{
	if (!sim_config->huge_tables)
		shim_free(table);
}

/* The entry of @gfn at @level; NULL if there is no table, and shall be none. */
static u64 *sptep_of(gfn_t gfn, int level, bool make)
{
	u64 *pt = sim_root.spt, *sptep, *new, spte;
	int l, i;

	for (l = sim_root.role.level;; l--) {
		sptep = &pt[gfn >> (SPTE_LEVEL_BITS * (l - 1)) & (SPTE_ENT_PER_PAGE - 1)];
		if (l == level)
			return sptep;
		/* The kernel counts on the dependency. */
		spte = smp_load_acquire(sptep);
		if (is_shadow_present_pte(spte) && !is_large_pte(spte)) {
			pt = table_of(spte);
			continue;
		}
		if (!make)
			return NULL;
		new = table_alloc();
		/* A huge page is split: its pages are as writable as it is. */
		for (i = 0; is_large_pte(spte) && i < SPTE_ENT_PER_PAGE; i++)
			new[i] = gfn_spte(round_down(gfn, SPTE_ENT_PER_PAGE) + i,
					  spte & (PT_WRITABLE_MASK | shadow_dirty_mask));
		if (cmpxchg(sptep, spte, (uintptr_t)new | SPTE_MMU_PRESENT_MASK) != spte)
			table_free(new);
		pt = table_of(smp_load_acquire(sptep));
	}
}

static u64 leaf(gfn_t gfn)
{
	u64 *sptep = sptep_of(gfn, PG_LEVEL_4K, false);

	if (!sptep)
		sptep = sptep_of(gfn, PG_LEVEL_2M, false);
	return sptep ? READ_ONCE(*sptep) : 0;
}

/* Never takes write access away. */
static void install_spte(gfn_t gfn, u64 bits)
{
	__atomic_fetch_or(sptep_of(gfn, PG_LEVEL_4K, true), gfn_spte(gfn, bits),
			  __ATOMIC_RELAXED);
}

void sim_map_page(gfn_t gfn)
{
	install_spte(gfn, 0);
}

u64 *sim_sptep(gfn_t gfn)
{
	return sptep_of(gfn, PG_LEVEL_4K, false);
}

static u64 dbit(void)
{
	return kvm_x86_ops.cpu_dirty_log_size ? shadow_dirty_mask : PT_WRITABLE_MASK;
}

bool sim_unlogged(gfn_t gfn)
{
	return leaf(gfn) & dbit();
}

static void free_tables(u64 *pt, int level)
{
	int i;

	for (i = 0; level > PG_LEVEL_4K && i < SPTE_ENT_PER_PAGE; i++) {
		if (is_shadow_present_pte(pt[i]) && !is_large_pte(pt[i]))
			free_tables(table_of(pt[i]), level - 1);
	}
	table_free(pt);
}

/* As it was before there was a memslot. */
static void zap(struct kvm *kvm, const struct kvm_memory_slot *slot)
{
	unsigned long i;
	u64 *sptep;

	write_lock(&kvm->mmu_lock);
	for (i = 0; i < slot->npages; i++) {
		sptep = sptep_of(slot->base_gfn + i, PG_LEVEL_4K, false);
		if (sptep)
			WRITE_ONCE(*sptep, 0);
	}
	write_unlock(&kvm->mmu_lock);
	kvm_flush_remote_tlbs(kvm);
}

/*
 * A memslot that logs has its huge pages protected as a whole, unless all of its
 * pages start out dirty.
 */
static void map_huge(struct kvm *kvm, const struct kvm_memory_slot *slot)
{
	unsigned long i;

	read_lock(&kvm->mmu_lock);
	for (i = 0; i + SPTE_ENT_PER_PAGE <= slot->npages; i += SPTE_ENT_PER_PAGE)
		__atomic_store_n(sptep_of(slot->base_gfn + i, PG_LEVEL_2M, true),
				 gfn_spte(slot->base_gfn + i, PT_PAGE_SIZE_MASK |
					  (kvm->init_set ? PT_WRITABLE_MASK : 0)),
				 __ATOMIC_RELEASE);
	read_unlock(&kvm->mmu_lock);
}

/*
 * clear_dirty_pt_masked() of the TDP MMU: down from the root once for each page
 * table, then from entry to entry, until all pages of the mask are done.
 */
static void clear_dirty_pt_masked(gfn_t gfn, unsigned long mask)
{
	gfn_t at = gfn + __ffs(mask), end = gfn + BITS_PER_LONG;
	u64 *pt = NULL, spte;
	int level;

	for (; mask && at < end; at++) {
		if (!pt || !(at % SPTE_ENT_PER_PAGE)) {
			pt = sim_root.spt;
			for (level = sim_root.role.level; pt && level > PG_LEVEL_4K; level--) {
				spte = smp_load_acquire(&pt[at >> (SPTE_LEVEL_BITS * (level - 1)) &
							    (SPTE_ENT_PER_PAGE - 1)]);
				if (is_large_pte(spte))
					__atomic_fetch_and(&pt[at >> (SPTE_LEVEL_BITS * (level - 1)) &
							       (SPTE_ENT_PER_PAGE - 1)],
							   ~PT_WRITABLE_MASK, __ATOMIC_SEQ_CST);
				pt = NULL;
				if (is_shadow_present_pte(spte) && !is_large_pte(spte))
					pt = table_of(spte);
			}
			if (!pt)
				break;
		}
		if (!(mask & BIT(at - gfn)))
			continue;
		mask &= ~BIT(at - gfn);
		spte = READ_ONCE(pt[at % SPTE_ENT_PER_PAGE]);
		if (!is_shadow_present_pte(spte) || !(spte & dbit()))
			continue;
		spte = __atomic_fetch_and(&pt[at % SPTE_ENT_PER_PAGE], ~dbit(), __ATOMIC_SEQ_CST);
		kvm_set_pfn_dirty(spte_to_pfn(spte));
	}
}

void kvm_mmu_enable_log_dirty_pt_masked(struct kvm *kvm, struct kvm_memory_slot *slot,
					gfn_t gfn_offset, unsigned long mask, bool may_split)
{
	(void)kvm;
	(void)may_split;
	clear_dirty_pt_masked(slot->base_gfn + gfn_offset, mask);
}

/* What a build with BREAK_PROTECT_FIRST calls before it clears bits. */
#undef shim_protect_word
void shim_protect_word(void *word, unsigned long mask);
void shim_protect_word(void *word, unsigned long mask)
{
	struct kvm_memory_slot *slot;
	unsigned long *p = word;
	int i, bkt;

	kvm_for_each_memslot(slot, bkt, __kvm_memslots(sim_kvm, 0)) {
		if (!mask || p < slot->dirty_bitmap ||
		    p >= slot->dirty_bitmap + BITS_TO_LONGS(slot->npages))
			continue;
		i = p - slot->dirty_bitmap;
		write_lock(&sim_kvm->mmu_lock);
		clear_dirty_pt_masked(slot->base_gfn + i * BITS_PER_LONG, mask);
		write_unlock(&sim_kvm->mmu_lock);
		kvm_flush_remote_tlbs(sim_kvm);
	}
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
	static __thread u32 wanted[SIM_MAX_VCPUS];
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
	struct kvm *kvm = vcpu->kvm;
	unsigned int i;
	int idx;

	if (!s->in_guest)
		return;
	WRITE_ONCE(s->kicked, false);
	__atomic_store_n(&s->in_guest, false, __ATOMIC_SEQ_CST);
	shim_jitter();
	idx = srcu_read_lock(&kvm->srcu);
	for (i = 0; i < s->nr_pml; i++)
		mark_page_dirty_in_slot(kvm, sim_slot_of(kvm, s->pml[i]), vcpu, s->pml[i]);
	srcu_read_unlock(&kvm->srcu, idx);
	s->nr_pml = 0;
	kvm_dirty_slot_ring_hw_flushed(&vcpu->dirty_slot_ring);
}

bool sim_fault(struct kvm_vcpu *vcpu, gfn_t gfn)
{
	struct kvm *kvm = vcpu->kvm;
	const struct kvm_memory_slot *memslot = sim_slot_of(kvm, gfn);
	u64 *sptep, old = 0;

	if (!memslot || memslot->invalid)
		return false;

	sptep = to_sim(vcpu)->config->fast_fault ? sptep_of(gfn, PG_LEVEL_4K, false) : NULL;
	if (sptep)
		old = READ_ONCE(*sptep);
	if (is_shadow_present_pte(old)) {
		/* As fast_pf_fix_direct_spte(). */
		if (kvm_dirty_slot_ring_enabled(kvm))
			kvm_dirty_slot_ring_hw_enter(&vcpu->dirty_slot_ring);
		if (!(old & PT_WRITABLE_MASK) &&
		    cmpxchg(sptep, old, old | PT_WRITABLE_MASK) == old) {
			shim_jitter();
			mark_page_dirty_in_slot(kvm, memslot, vcpu, gfn);
		}
		kvm_dirty_slot_ring_hw_flushed(&vcpu->dirty_slot_ring);
	} else {
		/* As make_spte(), then tdp_mmu_install_spte(). */
		read_lock(&kvm->mmu_lock);
		mark_page_dirty_in_slot(kvm, memslot, vcpu, gfn);
		shim_jitter();
		if (memslot->dirty_slot_log)
			kvm_dirty_slot_ring_hw_enter(&vcpu->dirty_slot_ring);
		install_spte(gfn, PT_WRITABLE_MASK | shadow_dirty_mask);
		shim_jitter();
		if (memslot->dirty_slot_log)
			sim_look_again(memslot, vcpu, gfn);
		kvm_dirty_slot_ring_hw_flushed(&vcpu->dirty_slot_ring);
		read_unlock(&kvm->mmu_lock);
	}
	return true;
}

u64 sim_write(struct kvm_vcpu *vcpu, gfn_t gfn)
{
	struct sim_vcpu *s = to_sim(vcpu);
	u64 *sptep, old;
	bool there;
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
		old = leaf(gfn);
		if (!(old & PT_WRITABLE_MASK)) {
			sim_exit(vcpu);
			idx = srcu_read_lock(&vcpu->kvm->srcu);
			there = sim_fault(vcpu, gfn);
			srcu_read_unlock(&vcpu->kvm->srcu, idx);
			if (!there)
				return 0;
			continue;
		}
		if (s->config->pml && !(old & shadow_dirty_mask)) {
			if (s->nr_pml == ARRAY_SIZE(s->pml)) {
				sim_exit(vcpu);
				continue;
			}
			sptep = sptep_of(gfn, PG_LEVEL_4K, false);
			if (!sptep || cmpxchg(sptep, old, old | shadow_dirty_mask) != old)
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
 * Helpers of what follows.
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

/*
 * Memslots.  A change makes a new set of them; who was in a read side section when
 * it came may still use the old one.
 */

static const struct kvm_memslots no_slots;

struct kvm_memory_slot *sim_slot(int id)
{
	return id_to_memslot(__kvm_memslots(sim_kvm, 0), id);
}

struct kvm_memory_slot *sim_slot_of(struct kvm *kvm, gfn_t gfn)
{
	struct kvm_memory_slot *slot;
	int bkt;

	kvm_for_each_memslot(slot, bkt, __kvm_memslots(kvm, 0)) {
		if (gfn >= slot->base_gfn && gfn - slot->base_gfn < slot->npages)
			return slot;
	}
	return NULL;
}

/* Under slots_lock.  Returns the memslot that was there, for nobody to use. */
static struct kvm_memory_slot *replace(struct kvm *kvm, int id, struct kvm_memory_slot *slot)
{
	struct kvm_memslots *old = kvm->memslots, *new = shim_alloc(sizeof(*new));
	struct kvm_memory_slot *was = old->slot[id];

	*new = *old;
	new->slot[id] = slot;
	__atomic_store_n(&kvm->memslots, new, __ATOMIC_RELEASE);
	synchronize_srcu(&kvm->srcu);
	if (old != &no_slots)
		shim_free(old);
	return was;
}

static struct kvm_memory_slot *copy_of(const struct kvm_memory_slot *slot)
{
	struct kvm_memory_slot *copy = shim_alloc(sizeof(*copy));

	*copy = *slot;
	return copy;
}

int sim_create_slot(int id, gfn_t base_gfn, unsigned long npages, void *test)
{
	struct kvm *kvm = sim_kvm;
	struct kvm_memory_slot *slot = shim_alloc(sizeof(*slot));
	unsigned long i;
	int r = 0;

	*slot = (struct kvm_memory_slot){
		.id = id, .base_gfn = base_gfn, .npages = npages, .test = test,
	};
	mutex_lock(&kvm->slots_lock);
	if (kvm_dirty_slot_ring_enabled(kvm)) {
		r = kvm_dirty_slot_log_create(kvm, slot);
		shim_jitter();
		/* As kvm_prepare_memory_region() does it. */
		for (i = 0; !r && kvm->init_set && i < npages; i++)
			set_bit(i, slot->dirty_bitmap);
		shim_jitter();
	}
	if (!r) {
		if (sim_config->huge)
			map_huge(kvm, slot);
		replace(kvm, id, slot);
		atomic_inc(&kvm->nr_memslots_dirty_logging);
		kvm_dirty_slot_log_start(slot);
	} else {
		shim_free(slot);
	}
	mutex_unlock(&kvm->slots_lock);
	return r;
}

void sim_change_slot(int id)
{
	struct kvm *kvm = sim_kvm;
	struct kvm_memory_slot *old;

	mutex_lock(&kvm->slots_lock);
	old = kvm->memslots->slot[id];
	kvm_dirty_slot_log_stop(kvm, old);
	shim_free(replace(kvm, id, copy_of(old)));
	mutex_unlock(&kvm->slots_lock);
}

/* Detach what it logs with, as kvm_free_memslot() does. */
static void free_slot(struct kvm *kvm, struct kvm_memory_slot *slot)
{
	kvm_dirty_slot_log_release(slot);
	atomic_dec(&kvm->nr_memslots_dirty_logging);
	shim_free(slot);
}

void sim_delete_slot(int id)
{
	struct kvm *kvm = sim_kvm;
	struct kvm_memory_slot *old, *invalid;

	mutex_lock(&kvm->slots_lock);
	old = kvm->memslots->slot[id];
	kvm_dirty_slot_log_stop(kvm, old);
	/* In two steps, for nobody to map its pages once they have been unmapped. */
	invalid = copy_of(old);
	invalid->invalid = true;
	replace(kvm, id, invalid);
	zap(kvm, old);
	shim_free(old);
	free_slot(kvm, replace(kvm, id, NULL));
	mutex_unlock(&kvm->slots_lock);
}

/*
 * The VM.
 */

int sim_add_vcpu(void)
{
	struct kvm *kvm = sim_kvm;
	unsigned int i = atomic_read(&kvm->online_vcpus);
	struct sim_vcpu *s = shim_alloc(sizeof(*s));
	int r;

	sim_vcpus[i] = s;
	s->config = sim_config;
	s->tlb_time = 1;
	if (sim_config->memory)
		s->tlb = reserve(sim_nr_gfns * sizeof(*s->tlb));
	s->vcpu.kvm = kvm;
	s->vcpu.vcpu_id = i;
	s->vcpu.vcpu_idx = i;
	s->vcpu.run = &s->run;
	s->vcpu.sim = s;
	mutex_lock(&kvm->lock);
	r = kvm_dirty_slot_ring_add_vcpu(&s->vcpu);
	kvm->vcpus[i] = &s->vcpu;
	/* Pairs with kvm_for_each_vcpu(), by the dependency on the index. */
	__atomic_add_fetch(&kvm->online_vcpus.counter, 1, __ATOMIC_RELEASE);
	mutex_unlock(&kvm->lock);
	return r;
}

struct kvm *sim_create(const struct sim_config *config)
{
	struct kvm_enable_cap cap = {
		.cap = KVM_CAP_DIRTY_SLOT_RING,
		.args = { config->entries == SIM_BY_SLOT ? 0 : config->entries, config->flags },
	};
	struct kvm *kvm = shim_alloc(sizeof(*kvm));
	unsigned int i;
	int r = 0;

	sim_kvm = kvm;
	sim_config = config;
	sim_nr_gfns = config->nr_gfns ?: config->npages;
	/* Faults shall not starve a harvest, which the kernel's lock sees to. */
	init_rwlock(&kvm->mmu_lock.l, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	init_srcu_struct(&kvm->srcu);
	mutex_init(&kvm->lock);
	mutex_init(&kvm->slots_lock);
	atomic_set(&kvm->users_count, 1);
	kvm->max_vcpus = SIM_MAX_VCPUS;
	kvm->init_set = config->init_set;
	kvm->memslots = (struct kvm_memslots *)&no_slots;
	kvm_x86_ops.cpu_dirty_log_size = config->pml ? ARRAY_SIZE(((struct sim_vcpu *)0)->pml) : 0;

	/* One root is in use, another one is not any more. */
	INIT_LIST_HEAD(&kvm->arch.tdp_mmu_roots);
	sim_old_root = (struct kvm_mmu_page){ .role = { .level = 4, .invalid = true } };
	sim_root = (struct kvm_mmu_page){
		.role = { .level = PT64_ROOT_4LEVEL }, .spt = table_alloc(),
	};
	list_add_tail(&sim_old_root.link, &kvm->arch.tdp_mmu_roots);
	list_add_tail(&sim_root.link, &kvm->arch.tdp_mmu_roots);
	if (config->memory)
		sim_memory = reserve(sim_nr_gfns * sizeof(u64));

	if (config->entries)
		r = kvm_dirty_slot_ring_enable(kvm, &cap);
	/* Half of the vCPUs are there before the log, half come after it. */
	for (i = 0; i < config->nr_vcpus; i++) {
		if (i == config->nr_vcpus / 2 && config->npages)
			r = r ?: sim_create_slot(0, 0, config->npages, NULL);
		r = r ?: sim_add_vcpu();
	}
	if (r) {
		fprintf(stderr, "FAIL: cannot create the log: %s\n", strerror(-r));
		exit(1);
	}
	return kvm;
}

void shim_destroy_vm(struct kvm *kvm)
{
	unsigned int i;

	for (i = 0; i < SIM_MAX_SLOTS; i++) {
		if (kvm->memslots->slot[i])
			free_slot(kvm, kvm->memslots->slot[i]);
	}
	kvm_dirty_slot_ring_destroy(kvm);
	if (kvm->memslots != &no_slots)
		shim_free(kvm->memslots);
	for (i = 0; i < (unsigned int)atomic_read(&kvm->online_vcpus); i++) {
		if (sim_vcpus[i]->tlb)
			munmap(sim_vcpus[i]->tlb, sim_nr_gfns * sizeof(u32));
		shim_free(sim_vcpus[i]);
	}
	if (sim_memory)
		munmap(sim_memory, sim_nr_gfns * sizeof(u64));
	sim_memory = NULL;
	free_tables(sim_root.spt, sim_root.role.level);
	arena_free();
	shim_free(kvm);
}

void sim_destroy(void)
{
	kvm_put_kvm(sim_kvm);
}
