/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Page states: the page allocator's hooks that keep the table which tells the host of
 * a KVM guest what pages are not used. See arch/x86/kernel/kvm_page_states.c.
 */
#ifndef _ASM_X86_PAGE_STATES_H
#define _ASM_X86_PAGE_STATES_H

#ifdef CONFIG_KVM_GUEST_PAGE_STATES

/*
 * All of this is macros, and nothing is included: asm/page.h includes this, and so does
 * nearly everything. Only mm/page_alloc.c, which knows static keys and struct page,
 * expands them.
 */
struct page;
struct static_key_false;

extern struct static_key_false kvm_page_states_on;

/* Where the byte of the page would be whose struct page is at address 0. */
extern unsigned long kvm_page_states_base;

void __kvm_page_states_set(unsigned long first, unsigned int order, int state);

/*
 * The index is the address of the struct page: memmap is one array, and so vmemmap,
 * and what is subtracted for it, is in the base already. There is no check of bounds,
 * the table covers each page that the allocator can ever get.
 *
 * The barrier is the compiler's: a page is marked unused before it can be had from the
 * allocator, and marked used before anybody writes to it. As no compiler can know that
 * a byte of the table is none of the page, it does not move one store past the other
 * anyway; the barrier says that it must not, and costs nothing. So is a call.
 *
 * For a page of order 0 these are six instructions, and the nop that became a jump.
 */
#define __kvm_page_states_hook(pg, order, state)					\
do {											\
	if (static_branch_unlikely(&kvm_page_states_on)) {				\
		unsigned long __first = kvm_page_states_base +				\
				(unsigned long)(pg) / sizeof(struct page);		\
		unsigned int __order = (order);						\
		unsigned char __state = (state);					\
											\
		WRITE_ONCE(*(unsigned char *)__first, __state);				\
		barrier();								\
		if (__order)								\
			__kvm_page_states_set(__first, __order, __state);		\
	}										\
} while (0)

#define HAVE_ARCH_FREE_PAGE
#define arch_free_page(page, order)	__kvm_page_states_hook(page, order, 1)

#define HAVE_ARCH_ALLOC_PAGE
#define arch_alloc_page(page, order)	__kvm_page_states_hook(page, order, 0)

/* For arch/x86/kernel/kvm.c */
void kvm_page_states_init(void);
void kvm_page_states_suspend(void);
void kvm_page_states_resume(void);

#else

static inline void kvm_page_states_init(void) { }
static inline void kvm_page_states_suspend(void) { }
static inline void kvm_page_states_resume(void) { }

#endif /* CONFIG_KVM_GUEST_PAGE_STATES */

#endif /* _ASM_X86_PAGE_STATES_H */
