/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What can be told of a device state without loading it.
 */
#ifndef KC_VMSTATE_H
#define KC_VMSTATE_H

#include <stddef.h>
#include <stdint.h>

/*
 * What was found out last, and where, as most of a state hardly ever changes: to look for the
 * description and the run state byte by byte costs more than all else that is done to one.
 */
struct kc_vmstate_memo {
	uint64_t text, sections;
	uint32_t description;	/* its length */
	size_t run_state;	/* its section's place */
};

/**
 * kc_vmstate_kind() - which states can be loaded if this one can
 * @data: a migration stream of QEMU, or anything.
 * @len: its length.
 * @memo: zeroed before the first call; or NULL.
 *
 * Return: a hash of its sections and of the guest's run state.  What is no such stream is all of
 * one kind.
 */
uint64_t kc_vmstate_kind(const uint8_t *data, size_t len, struct kc_vmstate_memo *memo);

#endif
