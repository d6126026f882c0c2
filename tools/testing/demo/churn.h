/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Of the demo's guest: who allocates, fills, checks and frees memory all the time.
 */
#ifndef CHURN_H
#define CHURN_H

#include <stdint.h>

/**
 * churn_start() - begin, by a thread for each CPU, or go on otherwise than before
 * @npages: in each round of each thread.
 * @pause_us: after each round.
 *
 * Return: NULL, or why not.
 */
const char *churn_start(uint64_t npages, uint64_t pause_us);

/* How many rounds were made; of how many pages the contents were not what had just been written */
uint64_t churn_rounds(void);
uint64_t churn_bad(void);
/* What the first of these was */
const char *churn_first_bad(void);

/* Writes that many pages once, in files or not, and gives them back; false if there is no memory */
_Bool churn_once(uint64_t npages, _Bool file);

#endif
