/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A database in the guest, and what its clients and it say to each other.
 *
 * By TCP, in lines:
 *	put CLIENT NUMBER	-> "ok CLIENT NUMBER" when that is committed
 *	have CLIENT		-> "have CLIENT COUNT DIFFERENT LAST": entries, different ones, and the
 *				   last one's number
 *	check			-> "check ok", or what SQLite finds wrong
 */
#ifndef DEMO_LEDGER_H
#define DEMO_LEDGER_H

#define LEDGER_GUEST	"10.99.0.2"
#define LEDGER_HOST	"10.99.0.1"
#define LEDGER_PORT	5000
#define LEDGER_DISK	"/dev/vdc"

/* In the guest: brings up the network, mounts the disk, and serves; NULL or what went wrong */
const char *ledger_start(void);

#endif
