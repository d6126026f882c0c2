/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Of the demo's guest: what it tells its host of its pages, true or not.
 */
#ifndef LIES_H
#define LIES_H

#include <stdint.h>

/* Before memory is in pieces */
_Bool lies_init(void);

/* What the MSR has */
uint64_t lies_truth(void);

/**
 * lies_tell() - say something else from now on
 * @what: nothing; all (pages are unused, also those of the table); magic, version: a header that is
 *	  wrong; long, wraps: more pages than there can be; restless: anything, all the time; end MIB:
 *	  a header in the last page of so much memory; at ADDRESS: this as it is; or truth.
 *
 * Return: "ok", "refused" if the CPU does not take it, or what else went wrong.
 */
const char *lies_tell(const char *what);

#endif
