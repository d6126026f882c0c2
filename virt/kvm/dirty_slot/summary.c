// SPDX-License-Identifier: GPL-2.0-only
/*
 * A tree of bits over many things: which of them may have something, found without
 * looking at those that have nothing.
 *
 * Bits are set by anybody, in any context, without a lock; cleared, and looked
 * for, under a lock of the caller's: a bit above one that is set may be cleared for
 * a moment.  Without that lock kvm_dirty_summary_peek() looks, and may overlook
 * what is there.
 *
 * The rule for whoever has something to announce: first make it visible, then
 * kvm_dirty_summary_set().  For whoever looks: first kvm_dirty_summary_clear(),
 * then look at the thing itself, and set the bit again if there is something left.
 * So no thing with something is without its bit, but for those whose _set() has
 * not ended.
 */

#include <linux/bitmap.h>
#include <linux/bitops.h>
#include <linux/mm.h>

#include "log.h"

/**
 * kvm_dirty_summary_init - make a tree, with nothing in it
 * @s: zeroed
 * @bits: the things, at least one and at most 64 ^ SUMMARY_LEVELS
 *
 * Context: may sleep.
 * Return: 0 or -ENOMEM.
 */
int kvm_dirty_summary_init(struct kvm_dirty_summary *s, unsigned long bits)
{
	unsigned long longs = 0, *p;
	int i;

	do {
		s->bits[s->nr_levels++] = bits;
		bits = BITS_TO_LONGS(bits);
		longs += bits;
	} while (bits > 1);

	p = kvcalloc(longs, sizeof(long), GFP_KERNEL_ACCOUNT);
	if (!p)
		return -ENOMEM;
	for (i = 0; i < s->nr_levels; i++) {
		s->level[i] = p;
		p += BITS_TO_LONGS(s->bits[i]);
	}
	return 0;
}

/**
 * kvm_dirty_summary_free - the opposite
 * @s: also one that could not be made
 */
void kvm_dirty_summary_free(struct kvm_dirty_summary *s)
{
	kvfree(s->level[0]);
}

/**
 * kvm_dirty_summary_fill - all things have something
 * @s: nobody else can reach it
 */
void kvm_dirty_summary_fill(struct kvm_dirty_summary *s)
{
	int i;

	for (i = 0; i < s->nr_levels; i++)
		bitmap_set(s->level[i], 0, s->bits[i]);
}

static bool set_from(struct kvm_dirty_summary *s, int level, unsigned long bit)
{
	unsigned long *p, mask;
	bool first = false;

	/*
	 * All the way up, also where a bit is set already: whoever set it may
	 * not have got any further yet.
	 */
	for (; level < s->nr_levels; level++, bit /= BITS_PER_LONG) {
		p = s->level[level] + BIT_WORD(bit);
		mask = BIT_MASK(bit);
		if (READ_ONCE(*p) & mask) {
			smp_mb(); /* D */
			first = false;
			continue;
		}
		first = !atomic_long_fetch_or(mask, (atomic_long_t *)p); /* D */
	}
	return first;
}

/**
 * kvm_dirty_summary_set - a thing may have something
 * @s: the tree
 * @bit: the thing; what made it have something was, or was followed by, a full
 *	barrier
 *
 * Context: any.
 * Return: true if there was nothing in the tree before.
 */
bool kvm_dirty_summary_set(struct kvm_dirty_summary *s, unsigned long bit)
{
	return set_from(s, 0, bit);
}

static void clear_from(struct kvm_dirty_summary *s, int level, unsigned long bit)
{
	for (;;) {
		clear_bit(bit, s->level[level]);
		smp_mb__after_atomic(); /* D */

		/* The caller looks below level 0, that is, at the thing. */
		if (level && READ_ONCE(s->level[level - 1][bit])) {
			set_from(s, level, bit);
			return;
		}

		bit /= BITS_PER_LONG;
		if (READ_ONCE(s->level[level][bit]) || ++level == s->nr_levels)
			return;
	}
}

/**
 * kvm_dirty_summary_clear - a thing is about to be looked at
 * @s: the tree
 * @bit: the thing, which the caller looks at afterwards: this is a full barrier
 *
 * Context: any; see the top for the lock.
 */
void kvm_dirty_summary_clear(struct kvm_dirty_summary *s, unsigned long bit)
{
	clear_from(s, 0, bit);
}

/* Clears, on its way, bits above longs that are zero, if it shall. */
static unsigned long find_next(struct kvm_dirty_summary *s, unsigned long bit,
			       bool clear)
{
	unsigned long i, val;
	int level = 0;

	for (;;) {
		i = bit / BITS_PER_LONG;
		val = 0;
		if (bit < s->bits[level])
			val = READ_ONCE(s->level[level][i]) &
			      (~0UL << (bit % BITS_PER_LONG));
		if (val) {
			bit = i * BITS_PER_LONG + __ffs(val);
			if (!level--)
				return bit;
			bit *= BITS_PER_LONG;
			continue;
		}

		if (level + 1 == s->nr_levels)
			return s->bits[0];

		/*
		 * A bit above an empty long: its _set() was overtaken by the
		 * _clear() of what it had set below.
		 */
		if (clear && bit < s->bits[level] && !(bit % BITS_PER_LONG) &&
		    test_bit(i, s->level[level + 1]))
			clear_from(s, level + 1, i);
		bit = i + 1;
		level++;
	}
}

/**
 * kvm_dirty_summary_next - the next thing that may have something
 * @s: the tree
 * @bit: where to begin, this thing included; may be beyond the last
 *
 * Context: any; see the top for the lock.
 * Return: the thing; the number of things, if there is none.
 */
unsigned long kvm_dirty_summary_next(struct kvm_dirty_summary *s,
				     unsigned long bit)
{
	return find_next(s, bit, true);
}

/**
 * kvm_dirty_summary_peek - kvm_dirty_summary_next() for who does not hold the lock
 * @s: the tree
 * @bit: where to begin
 *
 * Context: any.
 * Return: as above; but what it does not find may be there all the same.
 */
unsigned long kvm_dirty_summary_peek(struct kvm_dirty_summary *s,
				     unsigned long bit)
{
	return find_next(s, bit, false);
}
