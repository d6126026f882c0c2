/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef DIRTY_SLOT_RING_KERNEL_H
#define DIRTY_SLOT_RING_KERNEL_H

/*
 * As much of the kernel as virt/kvm/dirty_slot/, arch/x86/kvm/mmu/dirty_slot.c and
 * the kernel's own virt/kvm/dirty_ring.c need, for userspace.  It comes before the
 * first line of the code (gcc -include); the headers that the code names are empty
 * files.
 *
 * Atomic operations and barriers are compiler builtins of the kernel's strength
 * and not more, so that ThreadSanitizer sees exactly the order that the code
 * asked for.  Locks are those of pthreads, which it knows as well.
 *
 * Macros named BREAK_* take one property away, for scripts that show that the
 * tests would notice; see the file mutants.
 */

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <linux/kvm.h>
#include <linux/types.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || __SIZEOF_LONG__ != 8
#error "64-bit and little endian only"
#endif

/*
 * What a test can make happen, in sim.c.
 */

/* Where threads may be held up: opens windows between the code's steps. */
#ifdef SHIM_JITTER
void shim_jitter(void);
#else
static inline void shim_jitter(void)
{
}
#endif

/* Per thread: chance, in 256, that access to user memory or a sleep fails. */
extern __thread unsigned int shim_inject;
/* There is a signal, all the time. */
extern bool shim_signal;
bool shim_fails(void);
extern __thread bool shim_in_task;

/* Per thread: what runs in it when it is preempted, or NULL. */
extern __thread void (*shim_preempted)(void);

/* Per thread: what runs before each write to user memory, or NULL. */
extern __thread void (*shim_before_copy)(void);

/*
 * Per thread: no delays, but shim_at_step() once, at the shim_steps'th place where one
 * could be; it is put off while the thread holds spinlocks, unless shim_step_spins, or
 * mutexes if it wants them itself.
 */
extern __thread bool shim_calm, shim_step_locks, shim_step_spins;
extern __thread unsigned int shim_steps;
extern __thread void (*shim_at_step)(void);
extern __thread int shim_spinlocks, shim_mutexes;	/* held */

/* Allocations not freed yet. */
extern long shim_allocated;
/* Where they are made, if there is one, and from where to where it is free: zeroes. */
extern struct shim_pool {
	char *start, *end, *next, *last;
} shim_pool;
void *shim_alloc(size_t size);
void shim_free(const void *p);

/* A failure; or counted, by the thread that expects it. */
void shim_warn(const char *what);
extern __thread unsigned int *shim_warnings;

/*
 * Types, compiler.
 */

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s32 s32;
typedef __s64 s64;
typedef u64 gfn_t;
typedef u64 kvm_pfn_t;
typedef unsigned int gfp_t;
typedef unsigned int vm_fault_t;

#define U8_MAX			((u8)~0U)
#define U16_MAX			((u16)~0U)
#define U32_MAX			((u32)~0U)
#define U64_MAX			((u64)~0ULL)
#define S32_MAX			((s32)(U32_MAX >> 1))
#define S64_MAX			((s64)(U64_MAX >> 1))

#define __user
#define __printf(a, b)		__attribute__((format(printf, a, b)))
#define __noreturn		__attribute__((noreturn))
#define __weak			__attribute__((weak))
#define __must_check		__attribute__((warn_unused_result))
#define noinline		__attribute__((noinline))
#ifndef __always_inline
#define __always_inline		inline __attribute__((always_inline))
#endif
#define __maybe_unused		__attribute__((unused))
#define fallthrough		__attribute__((fallthrough))
#define ____cacheline_aligned_in_smp	__attribute__((aligned(64)))
#define ____cacheline_aligned	__attribute__((aligned(64)))
#define L1_CACHE_BYTES		64
#define likely(x)		__builtin_expect(!!(x), 1)
#define unlikely(x)		__builtin_expect(!!(x), 0)
#define prefetch(p)		__builtin_prefetch(p)
/* Not __builtin_prefetch(p, 1), which makes a plain one if not told the CPU. */
#ifdef __x86_64__
#define prefetchw(p)		__asm__ __volatile__("prefetchw %0" : : "m" (*(const char *)(p)))
#else
#define prefetchw(p)		__builtin_prefetch(p, 1)
#endif
#define barrier()		__asm__ __volatile__("" : : : "memory")

#define ARRAY_SIZE(a)		(sizeof(a) / sizeof((a)[0]))
#define IS_ENABLED(option)	0
#define DIV_ROUND_UP(n, d)	(((n) + (d) - 1) / (d))
#define round_down(n, d)	((n) / (d) * (d))
#define round_up(n, d)		(DIV_ROUND_UP(n, d) * (d))
#define container_of(p, type, member) \
	((type *)((char *)(p) - offsetof(type, member)))
#define struct_size(p, member, n) \
	(sizeof(*(p)) + sizeof((p)->member[0]) * (n))
#define min_t(type, a, b) \
	({ type _a = (a), _b = (b); _a < _b ? _a : _b; })
#define max_t(type, a, b) \
	({ type _a = (a), _b = (b); _a > _b ? _a : _b; })
#define clamp_t(type, v, lo, hi)	min_t(type, max_t(type, v, lo), hi)
#define min(a, b)		min_t(__typeof__(a), a, b)
#define max(a, b)		max_t(__typeof__(a), a, b)
#define swap(a, b) \
	({ __typeof__(a) _t = (a); (a) = (b); (b) = _t; })
#define BUILD_BUG_ON(c)		_Static_assert(!(c), #c)
#define static_assert		_Static_assert

#define PAGE_SHIFT		12
#define PAGE_SIZE		(1UL << PAGE_SHIFT)

/* A warning of the kernel's is a failure here. */
#define WARN_ON_ONCE(c) \
	({ bool _c = (c); if (unlikely(_c)) shim_warn(#c); _c; })
#define WARN_ON(c)		WARN_ON_ONCE(c)
#define KVM_BUG_ON(c, kvm)	WARN_ON_ONCE(c)

#define RCU_LOCKDEP_WARN(c, what)	do { if (c) shim_warn(what); } while (0)

#define lockdep_assert_held(l)		do { } while (0)
#define lockdep_assert_held_read(l)	do { } while (0)
#define might_sleep()			do { } while (0)
#define EXPORT_SYMBOL_GPL(s)
#define array_index_nospec(i, n)	(i)

/*
 * Memory order.
 */

#ifdef SHIM_DEPENDENCY
/* What is read is an address, and what is there comes after it: TSan has no word for it. */
#define READ_ONCE(x)		__atomic_load_n(&(x), __ATOMIC_ACQUIRE)
#else
#define READ_ONCE(x)		__atomic_load_n(&(x), __ATOMIC_RELAXED)
#endif
#define WRITE_ONCE(x, v)	__atomic_store_n(&(x), v, __ATOMIC_RELAXED)

#ifdef BREAK_ACQUIRE
#define smp_load_acquire(p)	READ_ONCE(*(p))
#else
#define smp_load_acquire(p) \
	({ shim_jitter(); __atomic_load_n(p, __ATOMIC_ACQUIRE); })
#endif

#ifdef BREAK_RELEASE
#define SHIM_RELEASE		__ATOMIC_RELAXED
#else
#define SHIM_RELEASE		__ATOMIC_RELEASE
#endif
#define smp_store_release(p, v)	\
	({ shim_jitter(); shim_jitter(); __atomic_store_n(p, v, SHIM_RELEASE); })

/*
 * ThreadSanitizer does not know fences.  An atomic operation on a variable of
 * the thread's own is as strong for the CPU, and tells ThreadSanitizer nothing.
 */
static inline void smp_mb(void)
{
	shim_jitter();
#ifdef __SANITIZE_THREAD__
	static __thread int own;

	__atomic_fetch_add(&own, 0, __ATOMIC_SEQ_CST);
#else
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

#ifdef __SANITIZE_THREAD__
#define smp_rmb()		smp_mb()
#define smp_wmb()		smp_mb()
#else
#define smp_rmb()		__atomic_thread_fence(__ATOMIC_ACQUIRE)
#define smp_wmb()		__atomic_thread_fence(__ATOMIC_RELEASE)
#endif
#define smp_mb__before_atomic()	smp_mb()
#define smp_mb__after_atomic()	smp_mb()
#define smp_store_mb(x, v)	do { WRITE_ONCE(x, v); smp_mb(); } while (0)

/* The thread that is waited for may want this CPU. */
#define smp_cond_load_acquire(p, cond)					\
	({								\
		__typeof__(*(p)) VAL;					\
		while (VAL = smp_load_acquire(p), !(cond))		\
			sched_yield();					\
		VAL;							\
	})
#define cpu_relax()		sched_yield()

/*
 * Bits.
 */

#define BITS_PER_BYTE		8
#define BITS_PER_LONG		64
#define BITS_TO_LONGS(n)	DIV_ROUND_UP(n, BITS_PER_LONG)
#define BIT(n)			(1UL << (n))
#define BIT_ULL(n)		(1ULL << (n))
#define BIT_MASK(n)		(1UL << ((n) % BITS_PER_LONG))
#define BIT_WORD(n)		((n) / BITS_PER_LONG)
#define GENMASK(h, l)		((~0UL << (l)) & (~0UL >> (BITS_PER_LONG - 1 - (h))))
#define hweight_long(x)		((unsigned int)__builtin_popcountl(x))
#define hweight64(x)		((unsigned int)__builtin_popcountll(x))
#define for_each_set_bit(bit, addr, size) \
	for ((bit) = find_next_bit(addr, size, 0); (bit) < (size); \
	     (bit) = find_next_bit(addr, size, (bit) + 1))

static inline unsigned long __ffs(unsigned long x)
{
	return __builtin_ctzl(x);
}

static inline unsigned long __fls(unsigned long x)
{
	return BITS_PER_LONG - 1 - __builtin_clzl(x);
}

static inline unsigned long ffz(unsigned long x)
{
	return __ffs(~x);
}

static inline bool is_power_of_2(unsigned long n)
{
	return n && !(n & (n - 1));
}

static inline unsigned long roundup_pow_of_two(unsigned long n)
{
	return n > 1 ? 1UL << (BITS_PER_LONG - __builtin_clzl(n - 1)) : 1;
}

static inline unsigned int ilog2(unsigned long n)
{
	return __fls(n);
}

static inline unsigned long find_next_bit(const unsigned long *addr, unsigned long size,
					  unsigned long bit)
{
	unsigned long val;

	while (bit < size) {
		val = READ_ONCE(addr[BIT_WORD(bit)]) & (~0UL << (bit % BITS_PER_LONG));
		if (val)
			return min_t(unsigned long, size,
				     round_down(bit, BITS_PER_LONG) + __ffs(val));
		bit = round_down(bit, BITS_PER_LONG) + BITS_PER_LONG;
	}
	return size;
}

/*
 * Atomic operations: those that return a value are full barriers.
 */

typedef struct {
	int counter;
} atomic_t;

typedef struct {
	s64 counter;
} atomic64_t;

typedef struct {
	long counter;
} atomic_long_t;

#define ATOMIC_INIT(i)		{ (i) }
#define atomic_read(v)		READ_ONCE((v)->counter)
#define atomic_set(v, i)	WRITE_ONCE((v)->counter, i)
#define atomic_inc(v)		((void)__atomic_add_fetch(&(v)->counter, 1, __ATOMIC_RELAXED))
#define atomic_inc_return(v)	__atomic_add_fetch(&(v)->counter, 1, __ATOMIC_SEQ_CST)
#define atomic_dec(v)		((void)__atomic_sub_fetch(&(v)->counter, 1, __ATOMIC_RELAXED))
#define atomic_dec_and_test(v)	(!__atomic_sub_fetch(&(v)->counter, 1, __ATOMIC_SEQ_CST))
#define atomic64_read(v)	READ_ONCE((v)->counter)
#define atomic64_set(v, i)	WRITE_ONCE((v)->counter, i)
#define atomic64_add(i, v)	((void)__atomic_add_fetch(&(v)->counter, i, __ATOMIC_RELAXED))
#define atomic64_inc(v)		atomic64_add(1, v)
#define atomic_long_read(v)	((unsigned long)READ_ONCE((v)->counter))

static inline unsigned long atomic_long_fetch_or(unsigned long mask, atomic_long_t *v)
{
	shim_jitter();
	return __atomic_fetch_or(&v->counter, mask, __ATOMIC_SEQ_CST);
}

/* Pages are about to leave the log: wrong to protect them now, and not later. */
#ifdef BREAK_PROTECT_FIRST
void shim_protect_word(void *word, unsigned long mask);
#else
#define shim_protect_word(word, mask)	do { } while (0)
#endif

static inline unsigned long atomic_long_fetch_andnot(unsigned long mask, atomic_long_t *v)
{
	unsigned long old;

	shim_protect_word(v, mask);
	shim_jitter();
	old = __atomic_fetch_and(&v->counter, ~mask, __ATOMIC_SEQ_CST);
	shim_jitter();
	return old;
}

static inline u64 atomic64_fetch_and(u64 mask, atomic64_t *v)
{
	return __atomic_fetch_and(&v->counter, mask, __ATOMIC_SEQ_CST);
}

static inline void atomic_long_or(unsigned long mask, atomic_long_t *v)
{
	__atomic_fetch_or(&v->counter, mask, __ATOMIC_RELAXED);
}

static inline void atomic_long_andnot(unsigned long mask, atomic_long_t *v)
{
	__atomic_fetch_and(&v->counter, ~mask, __ATOMIC_RELAXED);
}

#define xchg(p, v) \
	({ __typeof__(*(p)) _v; \
	   shim_protect_word(p, (unsigned long)READ_ONCE(*(p))); \
	   shim_jitter(); \
	   _v = __atomic_exchange_n(p, (__typeof__(_v))(v), __ATOMIC_SEQ_CST); \
	   shim_jitter(); \
	   _v; })
#define cmpxchg(p, o, n) \
	({ __typeof__(*(p)) _o = (o); \
	   __atomic_compare_exchange_n(p, &_o, n, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
	   _o; })

#define try_cmpxchg64	try_cmpxchg
#define try_cmpxchg(p, o, n) \
	__atomic_compare_exchange_n(p, o, n, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)

static inline void clear_bit(unsigned long n, unsigned long *addr)
{
	shim_jitter();
	__atomic_fetch_and(&addr[BIT_WORD(n)], ~BIT_MASK(n), __ATOMIC_RELAXED);
}

static inline void set_bit(unsigned long n, unsigned long *addr)
{
	__atomic_fetch_or(&addr[BIT_WORD(n)], BIT_MASK(n), __ATOMIC_RELAXED);
}

static inline bool test_bit(unsigned long n, const unsigned long *addr)
{
	return READ_ONCE(addr[BIT_WORD(n)]) & BIT_MASK(n);
}

static inline bool test_and_set_bit(unsigned long n, unsigned long *addr)
{
	bool old;

	shim_jitter();
#ifdef BREAK_TEST_AND_SET
	old = test_bit(n, addr);
	shim_jitter();
	shim_jitter();
	WRITE_ONCE(addr[BIT_WORD(n)], READ_ONCE(addr[BIT_WORD(n)]) | BIT_MASK(n));
#else
	old = __atomic_fetch_or(&addr[BIT_WORD(n)], BIT_MASK(n), __ATOMIC_SEQ_CST) & BIT_MASK(n);
#endif
	/* Here a mark is in flight. */
	shim_jitter();
	return old;
}

#define set_bit_le		set_bit
#define clear_bit_le		clear_bit
#define test_bit_le		test_bit
#define test_and_set_bit_le	test_and_set_bit

static inline void bitmap_set(unsigned long *map, unsigned long start, unsigned long n)
{
	for (; n; start++, n--)
		map[BIT_WORD(start)] |= BIT_MASK(start);
}

typedef atomic_t refcount_t;

#define refcount_read(r)	((unsigned int)atomic_read(r))

static inline bool refcount_inc_not_zero(refcount_t *r)
{
	int old = atomic_read(r);

	while (old && !try_cmpxchg(&r->counter, &old, old + 1))
		;
	return old;
}

struct kref {
	atomic_t refcount;
};

static inline void kref_init(struct kref *ref)
{
	atomic_set(&ref->refcount, 1);
}

static inline void kref_get(struct kref *ref)
{
	atomic_inc(&ref->refcount);
}

static inline int kref_put(struct kref *ref, void (*release)(struct kref *ref))
{
	if (!atomic_dec_and_test(&ref->refcount))
		return 0;
	release(ref);
	return 1;
}

/*
 * Locks.
 */

typedef struct {
	pthread_mutex_t m;
} spinlock_t;

typedef spinlock_t raw_spinlock_t;

struct mutex {
	pthread_mutex_t m;
};

/* Who waits for it counts himself, for rwlock_needbreak(). */
typedef struct {
	pthread_rwlock_t l;
	int waiters;
} rwlock_t;

/*
 * Sleepable RCU as it is promised and no better: a grace period waits for those
 * readers that came before it and for no others, and is over as soon as they are.
 */
#define SHIM_MAX_THREADS	512	/* that ever read */

struct srcu_struct {
	unsigned long gp;	/* counts grace periods, from 1 on */
	struct {
		unsigned long since;	/* gp when it began to read, or 0 */
	} ____cacheline_aligned reader[SHIM_MAX_THREADS];
};

extern __thread int shim_reading;	/* depth; there is one srcu_struct at a time */

void init_srcu_struct(struct srcu_struct *s);
int srcu_read_lock(struct srcu_struct *s);
void srcu_read_unlock(struct srcu_struct *s, int idx);
unsigned long start_poll_synchronize_srcu(struct srcu_struct *s);
bool poll_state_synchronize_srcu(struct srcu_struct *s, unsigned long cookie);
void synchronize_srcu(struct srcu_struct *s);
#define srcu_read_lock_held(s)	(shim_reading > 0)

#define spin_lock_init(l)	pthread_mutex_init(&(l)->m, NULL)
#define spin_lock(l) \
	(shim_jitter(), pthread_mutex_lock(&(l)->m), (void)++shim_spinlocks)
#define spin_unlock(l) \
	(--shim_spinlocks, (void)pthread_mutex_unlock(&(l)->m))
#define raw_spin_lock_init(l)	spin_lock_init(l)
#define raw_spin_lock(l)	spin_lock(l)
#define raw_spin_unlock(l)	spin_unlock(l)
#define raw_spin_lock_irq(l)	spin_lock(l)
#define raw_spin_unlock_irq(l)	spin_unlock(l)
#define raw_spin_lock_irqsave(l, flags)	do { (flags) = 0; spin_lock(l); } while (0)
#define raw_spin_unlock_irqrestore(l, flags)	do { (void)(flags); spin_unlock(l); } while (0)

#define mutex_init(l)		pthread_mutex_init(&(l)->m, NULL)
#define mutex_lock(l) \
	(shim_jitter(), pthread_mutex_lock(&(l)->m), (void)++shim_mutexes)
#define mutex_unlock(l) \
	(--shim_mutexes, pthread_mutex_unlock(&(l)->m), shim_jitter())

static inline int mutex_lock_interruptible(struct mutex *l)
{
	if (shim_fails())
		return -EINTR;
	mutex_lock(l);
	return 0;
}

static inline void read_lock(rwlock_t *l)
{
	shim_spinlocks++;
	if (!pthread_rwlock_tryrdlock(&l->l))
		return;
	__atomic_add_fetch(&l->waiters, 1, __ATOMIC_RELAXED);
	pthread_rwlock_rdlock(&l->l);
	__atomic_sub_fetch(&l->waiters, 1, __ATOMIC_RELAXED);
}

static inline void read_unlock(rwlock_t *l)
{
	shim_spinlocks--;
	pthread_rwlock_unlock(&l->l);
}

static inline void write_lock(rwlock_t *l)
{
	shim_spinlocks++;
	if (!pthread_rwlock_trywrlock(&l->l))
		return;
	__atomic_add_fetch(&l->waiters, 1, __ATOMIC_RELAXED);
	pthread_rwlock_wrlock(&l->l);
	__atomic_sub_fetch(&l->waiters, 1, __ATOMIC_RELAXED);
}

static inline void write_unlock(rwlock_t *l)
{
	read_unlock(l);
}

static inline bool rwlock_needbreak(rwlock_t *l)
{
	return READ_ONCE(l->waiters);
}

#define rwlock_is_contended(l)	rwlock_needbreak(l)

static inline u64 ktime_get_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

#define rcu_read_lock()		do { } while (0)
#define rcu_read_unlock()	do { } while (0)
#define preempt_disable()	do { } while (0)
#define preempt_enable()	do { } while (0)
#define in_task()		(shim_in_task)
#define need_resched()		false
#define cond_resched()		shim_jitter()
#define current			NULL
#define signal_pending(task)	((void)(task), shim_signal || shim_fails())
#define usleep_range(lo, hi)	usleep(lo)

/*
 * Memory.
 */

#define GFP_KERNEL		0
#define GFP_KERNEL_ACCOUNT	0
#define __GFP_ZERO		0
#define kzalloc(size, gfp)	shim_alloc(size)
#define kcalloc(n, size, gfp)	shim_alloc((size_t)(n) * (size))
#define kmalloc(size, gfp)	shim_alloc(size)
#define kvzalloc(size, gfp)	shim_alloc(size)
#define kvmalloc(size, gfp)	shim_alloc(size)
#define kvcalloc(n, size, gfp)	shim_alloc((size_t)(n) * (size))
#define kvmalloc_array(n, size, gfp)	shim_alloc((size_t)(n) * (size))
#define __vmalloc(size, gfp)	shim_alloc(size)
#define __vcalloc(n, size, gfp)	shim_alloc((size_t)(n) * (size))
#define vzalloc(size)		shim_alloc(size)
#define get_zeroed_page(gfp)	((unsigned long)shim_alloc(PAGE_SIZE))
#define free_page(addr)		shim_free((void *)(addr))
#define kfree(p)		shim_free(p)
#define kvfree(p)		shim_free(p)
#define vfree(p)		shim_free(p)

#define u64_to_user_ptr(x)	((void *)(uintptr_t)(x))

static inline unsigned long copy_to_user(void *to, const void *from, unsigned long n)
{
	if (shim_before_copy)
		shim_before_copy();
	if (shim_fails())
		return n;
	memcpy(to, from, n);
	return 0;
}

static inline unsigned long copy_from_user(void *to, const void *from, unsigned long n)
{
	if (shim_fails())
		return n;
	memcpy(to, from, n);
	return 0;
}

/* What copy_to_user() meets, here before all of it. */
static inline bool user_write_access_begin(const void *to, unsigned long n)
{
	(void)to;
	(void)n;
	if (shim_before_copy)
		shim_before_copy();
	return !shim_fails();
}

#define user_write_access_end()		((void)0)
#define unsafe_put_user(x, p, label)	do { if (0) goto label; *(p) = (x); } while (0)

/*
 * Lists, and a table of pointers by number.
 */

struct list_head {
	struct list_head *next, *prev;
};

#define INIT_LIST_HEAD(h)	((h)->next = (h)->prev = (h))
#define list_for_each_entry(p, head, member)				\
	for ((p) = container_of((head)->next, __typeof__(*(p)), member);	\
	     &(p)->member != (head);					\
	     (p) = container_of((p)->member.next, __typeof__(*(p)), member))

#define list_for_each_entry_rcu	list_for_each_entry

static inline void list_add_tail(struct list_head *entry, struct list_head *head)
{
	entry->next = head;
	entry->prev = head->prev;
	head->prev->next = entry;
	head->prev = entry;
}

#define SHIM_XA_ENTRIES		4096

struct xarray {
	spinlock_t lock;
	void *entry[SHIM_XA_ENTRIES];
};

struct xa_limit {
	u32 max, min;
};

#define XA_LIMIT(from, to)	((struct xa_limit){ .min = (from), .max = (to) })
#define XA_FLAGS_ALLOC		0
#define XA_FLAGS_ACCOUNT	0
#define XA_PRESENT		0
#define xa_init_flags(xa, flags)	spin_lock_init(&(xa)->lock)
#define xa_destroy(xa)		((void)(xa))
#define xa_lock(xa)		spin_lock(&(xa)->lock)
#define xa_unlock(xa)		spin_unlock(&(xa)->lock)

static inline void *xa_load(struct xarray *xa, unsigned long i)
{
	return i < SHIM_XA_ENTRIES ? __atomic_load_n(&xa->entry[i], __ATOMIC_ACQUIRE) : NULL;
}

static inline void *xa_find(struct xarray *xa, unsigned long *i, unsigned long max, int filter)
{
	void *entry;

	(void)filter;
	for (; *i <= max && *i < SHIM_XA_ENTRIES; ++*i) {
		entry = xa_load(xa, *i);
		if (entry)
			return entry;
	}
	return NULL;
}

#define xa_for_each(xa, i, p)						\
	for ((i) = 0; ((p) = xa_find(xa, &(i), ULONG_MAX, XA_PRESENT)); (i)++)

static inline int __xa_alloc(struct xarray *xa, u32 *id, void *entry, struct xa_limit limit,
			     gfp_t gfp)
{
	u32 i;

	(void)gfp;
	for (i = limit.min; i <= limit.max && i < SHIM_XA_ENTRIES; i++) {
		if (xa_load(xa, i))
			continue;
		*id = i;
		__atomic_store_n(&xa->entry[i], entry, __ATOMIC_RELEASE);
		return 0;
	}
	return -EBUSY;
}

static inline void *__xa_erase(struct xarray *xa, unsigned long i)
{
	return __atomic_exchange_n(&xa->entry[i], NULL, __ATOMIC_SEQ_CST);
}

/*
 * Files, waiting.
 */

struct file;
struct inode;
struct module;
struct vm_area_struct;

#define THIS_MODULE		NULL
#define __module_get(m)		((void)(m))
#define module_put(m)		((void)(m))

#define EPOLLIN			0x001
#define EPOLLERR		0x008
#define EPOLLHUP		0x010
#define EPOLLRDNORM		0x040

typedef struct {
	int unused;
} poll_table;

/* Counts wake-ups, so that one between looking and sleeping is not missed. */
typedef struct {
	pthread_mutex_t m;
	pthread_cond_t c;
	unsigned long woken;
} wait_queue_head_t;

void shim_poll_wait(struct file *file, wait_queue_head_t *w);
void shim_wake_up(wait_queue_head_t *w);
void init_waitqueue_head(wait_queue_head_t *w);

#define poll_wait(file, w, table)	((void)(table), shim_poll_wait(file, w))
#define wake_up_poll(w, events)		shim_wake_up(w)
/* Who polls may come at any time: there is one always. */
#define wq_has_sleeper(w)		({ (void)(w); smp_mb(); true; })
#define waitqueue_active(w)		({ (void)(w); true; })

struct irq_work {
	void (*func)(struct irq_work *work);
};

static inline void init_irq_work(struct irq_work *work, void (*func)(struct irq_work *))
{
	work->func = func;
}

/* At once: an interrupt of this CPU comes no later than preemption is enabled. */
static inline bool irq_work_queue(struct irq_work *work)
{
	work->func(work);
	return true;
}

static inline void irq_work_sync(struct irq_work *work)
{
	(void)work;
}

struct file_operations {
	struct module *owner;
	int (*release)(struct inode *inode, struct file *file);
	long (*unlocked_ioctl)(struct file *file, unsigned int cmd, unsigned long arg);
	long (*compat_ioctl)(struct file *file, unsigned int cmd, unsigned long arg);
	__poll_t (*poll)(struct file *file, poll_table *wait);
	int (*mmap)(struct file *file, struct vm_area_struct *vma);
	loff_t (*llseek)(struct file *file, loff_t offset, int whence);
};

struct file {
	void *private_data;
	const struct file_operations *f_op;
	wait_queue_head_t *wait;
};

#define compat_ptr_ioctl	NULL
#define noop_llseek		NULL

int anon_inode_getfd(const char *name, const struct file_operations *fops, void *priv, int flags);

/* A page is known by its address. */
struct page;

struct vm_fault {
	struct vm_area_struct *vma;
	unsigned long pgoff;
	struct page *page;
};

struct vm_operations_struct {
	vm_fault_t (*fault)(struct vm_fault *vmf);
};

struct vm_area_struct {
	unsigned long vm_pgoff, vm_flags, nr_pages;
	const struct vm_operations_struct *vm_ops;
	struct file *vm_file;
};

#define VM_WRITE		0x02
#define VM_EXEC			0x04
#define VM_MAYWRITE		0x20
#define VM_MAYEXEC		0x40
#define VM_MAYSHARE		0x80
#define VM_DONTCOPY		0x00020000
#define VM_DONTEXPAND		0x00040000
#define VM_DONTDUMP		0x04000000
#define VM_FAULT_SIGBUS		2

static inline unsigned long vma_pages(const struct vm_area_struct *vma)
{
	return vma->nr_pages;
}

static inline void vm_flags_mod(struct vm_area_struct *vma, unsigned long set, unsigned long clear)
{
	vma->vm_flags = (vma->vm_flags | set) & ~clear;
}

static inline void vm_flags_clear(struct vm_area_struct *vma, unsigned long clear)
{
	vm_flags_mod(vma, 0, clear);
}

#define virt_to_page(addr)	((struct page *)(uintptr_t)(addr))

static inline struct page *vmalloc_to_page(const void *addr)
{
	return (struct page *)(uintptr_t)addr;
}

static inline void get_page(struct page *page)
{
	(void)page;
}

/*
 * Tracepoints: their arguments are evaluated and checked.
 */

#define TP_PROTO(...)		__VA_ARGS__
#define TP_ARGS(...)		__VA_ARGS__
#define TRACE_EVENT(name, proto, ...)					\
	static inline void __maybe_unused trace_##name(proto)		\
	{								\
	}								\
	static inline bool __maybe_unused trace_##name##_enabled(void)	\
	{								\
		return false;						\
	}								\
	struct shim_trace_##name

#define trace_kvm_dirty_ring_push(ring, slot, offset)	do { } while (0)
#define trace_kvm_dirty_ring_reset(ring)		do { } while (0)
#define trace_kvm_dirty_ring_exit(vcpu)			do { } while (0)

/*
 * KVM.
 */

#define CONFIG_HAVE_KVM_DIRTY_SLOT_RING
/* What the code is to do does not depend on this one. */
#ifdef SHIM_UPSTREAM_RING
#define CONFIG_HAVE_KVM_DIRTY_RING
#endif
#define KVM_HAVE_MMU_RWLOCK

#define KVM_REQ_DIRTY_RING_SOFT_FULL	3
#define KVM_REQ_DIRTY_SLOT_RING_FULL	4
#define KVM_USER_MEM_SLOTS		32764
#define KVM_DIRTY_RING_RSVD_ENTRIES	64

#ifndef KVM_EXIT_DIRTY_RING_FULL
#define KVM_EXIT_DIRTY_RING_FULL	31
#endif

#include <linux/kvm_dirty_slot_ring.h>
#ifdef SHIM_UPSTREAM_RING
#include SHIM_UPSTREAM_RING
#endif

#define SIM_MAX_VCPUS			1024
#define SIM_MAX_SLOTS			16

struct kvm_memory_slot {
	gfn_t base_gfn;
	unsigned long npages;
	unsigned long *dirty_bitmap;
	struct kvm_dirty_slot_log *dirty_slot_log;
	u16 as_id;
	short id;
	bool invalid;		/* KVM_MEMSLOT_INVALID: it is about to go */
	void *test;		/* whatever who runs the test makes of it */
};

struct kvm_memslots {
	struct kvm_memory_slot *slot[SIM_MAX_SLOTS];
};

struct kvm_vcpu_stat_generic {
	u64 dirty_slot_ring_pushed;
	u64 dirty_slot_ring_overflowed;
	u64 dirty_slot_ring_full_exits;
};

struct kvm_vm_stat_generic {
	atomic64_t dirty_slot_log_harvests;
	atomic64_t dirty_slot_log_harvested_pages;
	atomic64_t dirty_slot_log_resets;
	atomic64_t dirty_slot_log_reset_pages;
	atomic64_t dirty_slot_log_marked_pages;
	atomic64_t dirty_slot_log_discarded_pages;
};

/* The part of struct kvm_run that the code writes. */
struct shim_run {
	u32 exit_reason;
	struct kvm_dirty_slot_ring_exit dirty_slot_ring;
};

/* A CPU's side of a simulated vCPU, in sim.c. */
struct sim_vcpu;

struct kvm_vcpu {
	struct kvm *kvm;
	int vcpu_id, vcpu_idx;
	bool scheduled_out;
	struct shim_run *run;
	struct { struct kvm_vcpu_stat_generic generic; } stat;
	struct kvm_dirty_slot_ring_vcpu dirty_slot_ring;
#ifdef SHIM_UPSTREAM_RING
	struct kvm_dirty_ring dirty_ring;
#endif
	u64 requests;
	struct sim_vcpu *sim;
};

struct kvm {
	rwlock_t mmu_lock;
	struct mutex lock, slots_lock;
	struct srcu_struct srcu;
	struct kvm_memslots *memslots;
	struct kvm_vcpu *vcpus[SIM_MAX_VCPUS];
	refcount_t users_count;
	atomic_t online_vcpus, nr_memslots_dirty_logging;
	int max_vcpus, userspace_pid;
	u32 dirty_ring_size;
	bool dirty_ring_with_bitmap, init_set, vm_dead;
	struct kvm_dirty_slot_ring_vm dirty_slot_ring;
	struct { struct kvm_vm_stat_generic generic; } stat;
	struct { struct list_head tdp_mmu_roots; } arch;
};

static inline bool kvm_dirty_slot_ring_enabled(struct kvm *kvm)
{
	return READ_ONCE(kvm->dirty_slot_ring.entries);
}

static inline bool kvm_dirty_log_manual_protect_and_init_set(struct kvm *kvm)
{
	return kvm->init_set;
}

static inline int kvm_arch_nr_memslot_as_ids(struct kvm *kvm)
{
	(void)kvm;
	return 1;
}

static inline struct kvm_memslots *__kvm_memslots(struct kvm *kvm, int as_id)
{
	(void)as_id;
	/* The kernel counts on the dependency. */
	return __atomic_load_n(&kvm->memslots, __ATOMIC_ACQUIRE);
}

static inline struct kvm_memory_slot *id_to_memslot(struct kvm_memslots *slots, int id)
{
	return id < SIM_MAX_SLOTS ? slots->slot[id] : NULL;
}

#define kvm_for_each_memslot(memslot, bkt, slots)			\
	for ((bkt) = 0; (bkt) < SIM_MAX_SLOTS; (bkt)++)			\
		if (!((memslot) = (slots)->slot[bkt])) { } else

#define kvm_for_each_vcpu(i, vcpu, kvm)					\
	for ((i) = 0; (i) < (unsigned long)__atomic_load_n(&(kvm)->online_vcpus.counter, \
	     __ATOMIC_ACQUIRE) && \
	     ((vcpu) = (kvm)->vcpus[i], true); (i)++)

/* The last reference is gone; in sim.c. */
void shim_destroy_vm(struct kvm *kvm);

static inline bool kvm_get_kvm_safe(struct kvm *kvm)
{
	return refcount_inc_not_zero(&kvm->users_count);
}

static inline void kvm_put_kvm(struct kvm *kvm)
{
	if (atomic_dec_and_test(&kvm->users_count))
		shim_destroy_vm(kvm);
}

static inline void kvm_make_request(int req, struct kvm_vcpu *vcpu)
{
	__atomic_fetch_or(&vcpu->requests, BIT_ULL(req), __ATOMIC_RELEASE);
}

static inline bool kvm_check_request(int req, struct kvm_vcpu *vcpu)
{
	return READ_ONCE(vcpu->requests) & BIT_ULL(req) &&
	       __atomic_fetch_and(&vcpu->requests, ~BIT_ULL(req), __ATOMIC_SEQ_CST) & BIT_ULL(req);
}

void kvm_flush_remote_tlbs(struct kvm *kvm);
bool kvm_vcpu_kick(struct kvm_vcpu *vcpu);

/* Not when arch/x86/kvm/mmu/dirty_slot.c is compiled, which has one. */
#ifdef BREAK_PROTECT_FIRST
#define kvm_arch_dirty_slot_protect(kvm, memslot, masks, nr) \
	((void)(kvm), (void)(memslot), (void)(masks), (unsigned int)(nr))
#endif

#ifdef BREAK_FLUSH
#define kvm_flush_remote_tlbs(kvm)	((void)(kvm))
#endif

/*
 * The TDP MMU's page tables, for arch/x86/kvm/mmu/dirty_slot.c and for sim.c: a
 * physical address is a pointer here, and a frame has its gfn for a number.
 */

#define PT_WRITABLE_MASK		BIT_ULL(1)
#define PT_PAGE_SIZE_MASK		BIT_ULL(7)
#define SPTE_MMU_PRESENT_MASK		BIT_ULL(11)
#define SPTE_BASE_ADDR_MASK		(((1ULL << 52) - 1) & ~(u64)(PAGE_SIZE - 1))
#define SPTE_LEVEL_BITS			9
#define SPTE_ENT_PER_PAGE		(1 << SPTE_LEVEL_BITS)
#define PT64_ROOT_4LEVEL		4
#define PG_LEVEL_4K			1
#define PG_LEVEL_2M			2
#define shadow_dirty_mask		BIT_ULL(6)

struct kvm_mmu_page {
	struct list_head link;
	u64 *spt;
	struct {
		int level, as_id;
		bool invalid, write_protect;
	} role;
};

extern bool tdp_mmu_enabled;
extern struct shim_x86_ops {
	int cpu_dirty_log_size;
} kvm_x86_ops;

#define __va(pa)			((void *)(uintptr_t)(pa))
#define kvm_ad_enabled()		true
#define kvm_memslots_have_rmaps(kvm)	((void)(kvm), false)
#define kvm_mmu_page_as_id(sp)		((sp)->role.as_id)
#define kvm_mmu_page_ad_need_write_protect(sp)	((sp)->role.write_protect)
#define is_shadow_present_pte(spte)	((spte) & SPTE_MMU_PRESENT_MASK)
#define is_large_pte(spte)		((spte) & PT_PAGE_SIZE_MASK)
#define is_dirty_spte(spte)		((spte) & shadow_dirty_mask)
#define spte_to_pfn(spte)		(((spte) & SPTE_BASE_ADDR_MASK) >> PAGE_SHIFT)
#define kvm_set_pfn_dirty(pfn)		((void)(pfn))
#define trace_kvm_tdp_mmu_spte_changed(as_id, gfn, level, old, new) \
	((void)(as_id), (void)(gfn), (void)(old), (void)(new))

void kvm_mmu_enable_log_dirty_pt_masked(struct kvm *kvm, struct kvm_memory_slot *slot,
					gfn_t gfn_offset, unsigned long mask, bool may_split);

/* What race.c's peers call: with locks that this one may count on, as it may split. */
static inline void
kvm_arch_mmu_enable_log_dirty_pt_masked(struct kvm *kvm, struct kvm_memory_slot *slot,
					gfn_t gfn_offset, unsigned long mask)
{
	kvm_mmu_enable_log_dirty_pt_masked(kvm, slot, gfn_offset, mask, true);
}

#endif /* DIRTY_SLOT_RING_KERNEL_H */
