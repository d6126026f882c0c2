/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A kernel that holds back what one tap device gets from the guest, for net_plug.h: in a file that
 * the test and all processes of the program share.
 */
#ifndef KC_TESTS_FAKE_PLUG_H
#define KC_TESTS_FAKE_PLUG_H

#include <stdbool.h>
#include <stdint.h>

/* In the environment: the file's name.  Without it the kernel is the true one. */
#define FAKE_PLUG	"KC_FAKE_PLUG"

struct fake_plug {
	unsigned int first, next;	/* these IFB devices there are, but for the last */
	unsigned int adds, releases, removed, dropped;
	/* Packets: the guest's, those before the mark, and those that have left */
	uint64_t sent, marked, left;
	bool has_mark, misused;
	int add_fails, mark_fails, remove_fails;	/* an errno, of the next one */
	unsigned int remove_ms;		/* so long does it take */
};

#endif
