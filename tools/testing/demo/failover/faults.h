/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A fault: what goes half wrong (fault_kinds.c, full_directory.c), and what has to come of it
 * (faults.c).
 */
#ifndef FAULTS_H
#define FAULTS_H

#include "failover.h"

#define TIMEOUT_MS	3000
#define STANDBY_MB	(GUEST_MB + 40)

enum victim { NONE, QEMU, HOST };

/* Without a victim */
enum outcome { STAYS, MOVES };

struct fault {
	const struct fault_kind *kind;
	enum victim victim;
	bool killed;
	/* The standby that is there has not heard a primary, and must not take over by itself */
	bool unheard;
	uint64_t foreign;
};

struct fault_kind {
	const char *name, *what;
	enum outcome outcome;
	unsigned int from_ms, to_ms;	/* how long it lasts */
	bool (*begin)(struct fault *f);
	bool (*end)(struct fault *f);
	bool (*whole)(struct fault *f);	/* instead, all of it */
};

extern const struct fault_kind fault_kinds[];
extern const unsigned int nr_fault_kinds;

extern struct pair x;
extern bool have;		/* x protects vm */

/* The link is a directory here, and who goes on is told to */
bool full_directory(struct fault *f);

#endif
