// SPDX-License-Identifier: GPL-2.0-only
/*
 * KUnit tests of the tree of bits, against a bitmap.  What happens when several use
 * one at once is for tools/testing/dirty_slot_ring/.
 */

#include <kunit/test.h>
#include <linux/bitmap.h>
#include <linux/prandom.h>

#include "log.h"

/* One level, just two, two, three, and a VM's. */
static const unsigned long sizes[] = { 1, 64, 65, 4096, 4097, 100000, VM_MAX_LOGS };

static void desc_size(const unsigned long *size, char *desc)
{
	snprintf(desc, KUNIT_PARAM_DESC_SIZE, "%lu things", *size);
}

KUNIT_ARRAY_PARAM(size, sizes, desc_size);

static int summary_init(struct kunit *test)
{
	test->priv = kunit_kzalloc(test, sizeof(struct kvm_dirty_summary), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, test->priv);
	return kvm_dirty_summary_init(test->priv, *(const unsigned long *)test->param_value);
}

static void summary_exit(struct kunit *test)
{
	if (test->priv)
		kvm_dirty_summary_free(test->priv);
}

/* From any place on, next() finds what the bitmap has, and above no more than that. */
static void expect_same(struct kunit *test, struct kvm_dirty_summary *s,
			const unsigned long *map, unsigned long n)
{
	unsigned long at, want;

	for (at = 0; at <= n; at = want + 1) {
		want = find_next_bit(map, n, at);
		if (kvm_dirty_summary_peek(s, at) != want ||
		    kvm_dirty_summary_next(s, at) != want) {
			KUNIT_FAIL(test, "from %lu on, the next is %lu, not %lu", at,
				   want, kvm_dirty_summary_next(s, at));
			return;
		}
	}
	KUNIT_EXPECT_EQ(test, kvm_dirty_summary_next(s, n + 1000), n);
	KUNIT_EXPECT_EQ(test, kvm_dirty_summary_empty(s), bitmap_empty(map, n));
}

static void test_empty(struct kunit *test)
{
	unsigned long n = *(const unsigned long *)test->param_value;
	struct kvm_dirty_summary *s = test->priv;

	KUNIT_EXPECT_TRUE(test, kvm_dirty_summary_empty(s));
	KUNIT_EXPECT_EQ(test, kvm_dirty_summary_next(s, 0), n);
	KUNIT_EXPECT_EQ(test, kvm_dirty_summary_next(s, n), n);
	kvm_dirty_summary_clear(s, n - 1);
	KUNIT_EXPECT_TRUE(test, kvm_dirty_summary_empty(s));
}

static void test_full(struct kunit *test)
{
	unsigned long n = *(const unsigned long *)test->param_value, i;
	struct kvm_dirty_summary *s = test->priv;

	kvm_dirty_summary_fill(s);
	for (i = 0; i < n; i++) {
		if (kvm_dirty_summary_next(s, 0) != i) {
			KUNIT_FAIL(test, "%lu is lost", i);
			return;
		}
		kvm_dirty_summary_clear(s, i);
	}
	KUNIT_EXPECT_TRUE(test, kvm_dirty_summary_empty(s));
}

/* set() says who was the first. */
static void test_first(struct kunit *test)
{
	unsigned long n = *(const unsigned long *)test->param_value;
	struct kvm_dirty_summary *s = test->priv;

	KUNIT_EXPECT_TRUE(test, kvm_dirty_summary_set(s, n - 1));
	KUNIT_EXPECT_FALSE(test, kvm_dirty_summary_set(s, n - 1));
	KUNIT_EXPECT_FALSE(test, kvm_dirty_summary_set(s, 0));
	kvm_dirty_summary_clear(s, n - 1);
	kvm_dirty_summary_clear(s, 0);
	KUNIT_EXPECT_TRUE(test, kvm_dirty_summary_set(s, 0));
}

/* A bit above nothing, as a set() leaves it that a clear() overtook, goes. */
static void test_stale(struct kunit *test)
{
	unsigned long n = *(const unsigned long *)test->param_value;
	struct kvm_dirty_summary *s = test->priv;
	int level;

	for (level = 1; level < s->nr_levels; level++)
		set_bit(0, s->level[level]);
	KUNIT_EXPECT_EQ(test, kvm_dirty_summary_peek(s, 0), n);
	KUNIT_EXPECT_EQ(test, kvm_dirty_summary_empty(s), s->nr_levels == 1);
	KUNIT_EXPECT_EQ(test, kvm_dirty_summary_next(s, 0), n);
	KUNIT_EXPECT_TRUE(test, kvm_dirty_summary_empty(s));
}

static void test_random(struct kunit *test)
{
	unsigned long n = *(const unsigned long *)test->param_value, bit;
	struct kvm_dirty_summary *s = test->priv;
	struct rnd_state rnd;
	unsigned long *map;
	int i, k;

	map = kunit_kzalloc(test, BITS_TO_LONGS(n) * sizeof(long), GFP_KERNEL);
	KUNIT_ASSERT_NOT_NULL(test, map);
	prandom_seed_state(&rnd, n);
	for (i = 0; i < 60; i++) {
		for (k = 0; k < 20; k++) {
			bit = prandom_u32_state(&rnd) % n;
			/* More sets, then more clears. */
			if (prandom_u32_state(&rnd) % 100 < (i < 30 ? 80 : 5)) {
				kvm_dirty_summary_set(s, bit);
				__set_bit(bit, map);
			} else {
				bit = kvm_dirty_summary_next(s, bit);
				if (bit == n)
					continue;
				kvm_dirty_summary_clear(s, bit);
				__clear_bit(bit, map);
			}
		}
		expect_same(test, s, map, n);
	}
}

static struct kunit_case summary_cases[] = {
	KUNIT_CASE_PARAM(test_empty, size_gen_params),
	KUNIT_CASE_PARAM(test_full, size_gen_params),
	KUNIT_CASE_PARAM(test_first, size_gen_params),
	KUNIT_CASE_PARAM(test_stale, size_gen_params),
	KUNIT_CASE_PARAM(test_random, size_gen_params),
	{ }
};

static struct kunit_suite summary_suite = {
	.name = "kvm_dirty_slot_summary",
	.init = summary_init,
	.exit = summary_exit,
	.test_cases = summary_cases,
};

kunit_test_suite(summary_suite);
