/*
 * Pages of which the guest says that it does not use them
 *
 * SPDX-License-Identifier: GPL-2.0-only
 */

#ifndef MIGRATION_PAGE_STATES_H
#define MIGRATION_PAGE_STATES_H

#include "exec/ramblock.h"

typedef struct PageStates {
    RAMBlock *block;        /* where the table is */
    uint64_t page;          /* of it, its first */
    const uint8_t *table;
    uint64_t nr;            /* of bytes in it, one for each gfn; 0: none */
    bool stopped;           /* the guest stood still when it was located */
} PageStates;

/**
 * page_states_locate - Where is the guest's table now?
 *
 * With the BQL held, which it releases meanwhile if the guest runs: so with no
 * other lock, nor in a critical section of RCU.  Returns false, and 0 as
 * @ps->nr, if there is none.
 */
bool page_states_locate(PageStates *ps);

/**
 * page_states_prepare - Before a sync of migration, with no lock but the BQL
 *
 * Locates the table of a guest that runs, for page_states_filter().
 */
void page_states_prepare(void);

/**
 * page_states_filter - Leave unused pages out of what migration will send
 *
 * After a sync, with the bitmap's lock held, and in a critical section of RCU.
 * What was left out and is used when the guest stands still is taken in again.
 * Returns by how much the number of dirty pages has changed.
 */
int64_t page_states_filter(void);

/* Migration is over */
void page_states_cleanup(void);

#endif
