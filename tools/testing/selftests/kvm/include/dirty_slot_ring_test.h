/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * For tests of dirty slot rings that are made of TEST()s: the harness, and all
 * that the library has.  Each of them has
 *
 * -t NAME	for one test (-l lists them), and
 * -q		for fewer rounds and smaller sizes, for emulators.
 */
#ifndef SELFTEST_KVM_DIRTY_SLOT_RING_TEST_H
#define SELFTEST_KVM_DIRTY_SLOT_RING_TEST_H

#include "kvm_test_harness.h"

#include "dirty_slot_ring_vm.h"

/* An emulator is slow; what hangs, hangs for good. */
#undef TEST_TIMEOUT_DEFAULT
#define TEST_TIMEOUT_DEFAULT	240

static inline int dsr_test_main(int argc, char *argv[])
{
	return test_harness_run(dsr_options(argc, argv), argv);
}

#endif /* SELFTEST_KVM_DIRTY_SLOT_RING_TEST_H */
