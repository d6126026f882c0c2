/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The guest with a database, and its clients outside who remember what they were told.
 */
#ifndef CLIENTS_H
#define CLIENTS_H

#include "failover.h"

#define CLIENTS		3

struct client {
	int nr;
	FILE *f;
	pthread_t thread;
	atomic_long told;		/* that it is committed, by the guest */
	atomic_bool broken;
	uint64_t sum_us, longest_us;
};

extern struct client clients[CLIENTS];

/* Its own guest, in place of any other */
bool ledger_boot(void);
void ledger_end(void);

bool ledger_connect(void);
void ledger_disconnect(void);
/* How many entries of each client are committed, for all they know */
void ledger_told(long told[CLIENTS]);
/* Their connections go on */
bool ledger_goes_on(const long told[CLIENTS]);
/* All that they were told of is there, once; *@lost: or how many entries are not */
bool ledger_check(const long told[CLIENTS], long *lost);
/* The file system of the guest's disk, as it is when the guest is stopped for that */
bool ledger_check_disk(void);

/* One more connection, to ask something over it */
FILE *ledger_open(void);
__attribute__((format(printf, 4, 5)))
bool ledger_say(FILE *f, char *line, size_t size, const char *fmt, ...);

#endif
