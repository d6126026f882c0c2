// SPDX-License-Identifier: GPL-2.0-only
/*
 * Page states: a KVM guest tells its host which pages it does not use
 *
 * The page allocator's hooks, see asm/page_states.h, keep a table in guest memory that has
 * one byte for each page. The host reads it when all vCPUs stand still, and need not copy
 * what is free. Nothing is called and nothing exits. Documentation/virt/kvm/x86/page-states.rst
 * has the ABI, and what is promised to the host: what a page holds that is marked unused does
 * not matter, as it is written before it is read.
 *
 * That the table is true at each instant
 * --------------------------------------
 *
 * Whoever is stopped is stopped between two instructions, and x86 makes stores visible in
 * program order: the host sees all stores of each vCPU up to some point, and none after it.
 *
 *  - A page is marked unused in free_pages_prepare(), when its last user has let go of it and
 *    it is on no list of the allocator yet. Who allocates it next finds it on a list that a
 *    lock guards, hence after that store, and overwrites the byte. Nothing reads the page
 *    after the store: mm/page_alloc.c says so where it calls the hook.
 *
 *  - A page is marked used in post_alloc_hook(), before it is cleared, unpoisoned or given to
 *    whom it was allocated for, and so before any store to it, or the start of any DMA.
 *
 * Used is the safe side: the table begins with all pages used, and a page that the allocator
 * never got stays that way. What gets pages from the allocator or gives them back without these
 * hooks is:
 *
 *  - __isolate_free_page(): compaction calls post_alloc_hook() on what it takes,
 *    compaction_alloc() for pages to migrate to, release_free_list() before it frees the rest,
 *    and split_free_pages() for alloc_contig_range(), which with __GFP_COMP goes through
 *    prep_new_page(). compaction_free() calls free_pages_prepare() on what it puts back to its
 *    own list. CMA, gigantic pages and virtio-mem allocate with alloc_contig_range(), and
 *    free page by page. Page reporting and unset_migratetype_isolate() give pages back as they
 *    got them, without writing to them.
 *
 *  - alloc_pages_exact() and split_page(): all pages of the block are marked when it is
 *    allocated, and each one when it is freed.
 *
 *  - memblock_free_all(), deferred_init_memmap(), memblock_free_late(), free_reserved_page(),
 *    init_cma_reserved_pageblock() and generic_online_page() free pages that were not allocated.
 *    They do so with __free_pages_core() or __free_page(), hence through free_pages_prepare().
 *
 *  - take_page_off_buddy() takes a page with a hardware error, which is marked unused and stays
 *    that way: nobody uses it until put_page_back_buddy() or unpoison_memory() give it back.
 *
 *  - offline_pages() takes free pages: see kvm_page_states_notify().
 *
 *  - ZONE_DEVICE pages are never in the allocator, nor is what is unaccepted: this is off in
 *    guests that accept memory.
 *
 * What reads pages that may be free, such as get_freepointer_safe() of SLUB or /proc/kcore, makes
 * nothing of what it reads; page tables are freed when no CPU walks them any more.
 */

#define pr_fmt(fmt) "kvm-guest: " fmt

#include <linux/cc_platform.h>
#include <linux/cpu.h>
#include <linux/init.h>
#include <linux/jump_label.h>
#include <linux/kstrtox.h>
#include <linux/kvm_para.h>
#include <linux/memblock.h>
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/string.h>
#include <asm/msr.h>
#include <asm/page_states.h>

DEFINE_STATIC_KEY_FALSE(kvm_page_states_on);
unsigned long kvm_page_states_base __ro_after_init;

/* NULL if there is none. It is never freed: a hook may be on its way to it. */
static struct kvm_page_states *table __ro_after_init;

/* The host may be told of the table. */
static bool may_tell;

static bool switched_off __initdata;

static int __init parse_no_kvm_page_states(char *arg)
{
	switched_off = true;
	return 0;
}
early_param("no-kvm-page-states", parse_no_kvm_page_states);

/*
 * mm/mm_init.c keeps to itself what this says until it has set up static keys, which is after
 * setup_arch(). But a table that is not needed should not be allocated.
 */
static bool init_on_free_wanted __initdata = IS_ENABLED(CONFIG_INIT_ON_FREE_DEFAULT_ON);

static int __init parse_init_on_free(char *arg)
{
	return kstrtobool(arg, &init_on_free_wanted);
}
early_param("init_on_free", parse_init_on_free);

static u8 *state_of(unsigned long pfn)
{
	return (u8 *)(table + 1) + pfn;
}

/* The first one is marked already. */
void __kvm_page_states_set(unsigned long first, unsigned int order, int state)
{
	memset((void *)first, state, 1UL << order);
}

/* With any CPU: the MSR is that of the machine. */
static bool tell_host(u64 value)
{
	return !wrmsr_safe(MSR_KVM_PAGE_STATES, lower_32_bits(value),
			   upper_32_bits(value));
}

/*
 * From here on this kernel does not answer for all of memory:
 *
 *  - the next kernel, after kexec or a crash, is copied to pages that may be free here, and knows
 *    nothing of the table;
 *
 *  - so is the image of a hibernated kernel when it is resumed, and the table is among what it is
 *    copied over.
 *
 * A CPU that goes offline is none of these: the MSR is that of the machine. Nor is a reset, at
 * which the host forgets the table by itself.
 */
void kvm_page_states_suspend(void)
{
	if (may_tell)
		tell_host(0);
}

/*
 * After suspend to RAM, or a snapshot, all is as it was. If memory comes from a hibernation
 * image, then that has the table and the allocator as they were at one and the same instant:
 * when it was made nothing else ran. It does not have what free pages held, as it need not.
 * The host may be another one.
 */
void kvm_page_states_resume(void)
{
	if (may_tell && !tell_host(__pa(table) | KVM_MSR_ENABLED)) {
		may_tell = false;
		pr_warn("page states off: this host does not know them\n");
	}
}

/*
 * For good, and first of all for the host. The caller has cpus_read_lock(). A hook that is on
 * its way still finds the table.
 */
static void page_states_off(const char *why)
{
	kvm_page_states_suspend();
	may_tell = false;
	static_branch_disable_cpuslocked(&kvm_page_states_on);
	pr_info("page states off: %s\n", why);
}

/* Why the contents of free pages matter, or the host cannot read the table. */
static const char * __init why_not(void)
{
	if (switched_off)
		return "no-kvm-page-states";
	if (cc_platform_has(CC_ATTR_MEM_ENCRYPT))
		return "memory is encrypted";
	/* Pages are not cleared when they are allocated, as they are known to hold zeros. */
	if (init_on_free_wanted)
		return "init_on_free";
	/*
	 * Pages are checked for the pattern when they are allocated. debug_pagealloc only
	 * unmaps them, and KASAN, as x86 has it, poisons nothing but its shadow.
	 */
	if (page_poisoning_enabled())
		return "page_poison";
	return NULL;
}

/*
 * memblock still has all of memory: what it gives to the page allocator later, in mem_init(),
 * passes the hooks, so that all that is ever free is marked.
 */
void __init kvm_page_states_init(void)
{
	unsigned long nr = max_t(unsigned long, max_pfn, max_possible_pfn);
	const char *why;

	/*
	 * What could be plugged in may be far more than there is: no more than 1/64 of memory for
	 * a table. Without room for it, this is off from when it is plugged in.
	 */
	if (nr / (PAGE_SIZE / 64) > max_pfn)
		nr = max_pfn;

	if (!kvm_para_has_feature(KVM_FEATURE_PAGE_STATES))
		return;

	why = why_not();
	if (!why) {
		/* Zeroed: all pages are used. */
		table = memblock_alloc(sizeof(*table) + PAGE_ALIGN(nr), PAGE_SIZE);
		if (!table)
			why = "no memory for the table";
	}
	if (why) {
		pr_info("page states off: %s\n", why);
		return;
	}

	BUILD_BUG_ON(sizeof(*table) != PAGE_SIZE);
	BUILD_BUG_ON(KVM_PAGE_USED != 0 || KVM_PAGE_UNUSED != 1);
	table->magic = KVM_PAGE_STATES_MAGIC;
	table->version = KVM_PAGE_STATES_VERSION;
	table->nr = nr;

	kvm_page_states_base = (unsigned long)state_of(0) -
			       (unsigned long)vmemmap / sizeof(struct page);
	static_branch_enable(&kvm_page_states_on);
}

static bool all_in_table(const struct memory_notify *mem)
{
	return mem->start_pfn + mem->nr_pages <= table->nr;
}

static int kvm_page_states_notify(struct notifier_block *nb, unsigned long action, void *arg)
{
	const struct memory_notify *mem = arg;

	switch (action) {
	case MEM_GOING_ONLINE:
		/*
		 * The hooks do not look where the table ends. It has room for all that firmware
		 * said could be plugged in. No page of what is new is in the allocator yet, and
		 * mem_hotplug_begin() has taken cpus_read_lock().
		 */
		if (static_key_enabled(&kvm_page_states_on) && !all_in_table(mem))
			page_states_off("memory was added that the table has no room for");
		break;
	case MEM_OFFLINE:
		/*
		 * These pages left the allocator while they were free. They may come back as
		 * something that it never knows of, and until then nobody uses them.
		 */
		if (all_in_table(mem))
			memset(state_of(mem->start_pfn), KVM_PAGE_USED, mem->nr_pages);
		break;
	}
	return NOTIFY_OK;
}

static struct notifier_block kvm_page_states_nb = {
	.notifier_call = kvm_page_states_notify,
};

/*
 * The table is true since the allocator has pages. Tell the host only now, when it is certain
 * what free pages are expected to hold, and before any memory can be plugged in.
 */
static int __init kvm_page_states_tell(void)
{
	const char *why = NULL;

	if (!table)
		return 0;

	if (WARN_ON_ONCE(want_init_on_free() || page_poisoning_enabled_static()))
		why = "free pages are not expected to change";
	else if (register_memory_notifier(&kvm_page_states_nb))
		why = "no notifier of memory hot-plug";
	else if (!tell_host(__pa(table) | KVM_MSR_ENABLED))
		why = "the host refuses the table";

	if (why) {
		cpus_read_lock();
		page_states_off(why);
		cpus_read_unlock();
		return 0;
	}

	may_tell = true;
	pr_info("page states on, %llu pages\n", table->nr);
	return 0;
}
arch_initcall(kvm_page_states_tell);
