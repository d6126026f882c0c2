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

#include <arpa/inet.h>
#include <net/if.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define LEDGER_GUEST	"10.99.0.2"
#define LEDGER_HOST	"10.99.0.1"
#define LEDGER_PORT	5000
#define LEDGER_DISK	"/dev/vdc"

/* Gives an interface an address, if it is to have one, and brings it up */
static inline bool bring_up(const char *name, const char *address)
{
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	struct sockaddr_in *sin;
	struct ifreq r = { 0 };
	bool ok = s >= 0;

	snprintf(r.ifr_name, sizeof(r.ifr_name), "%s", name);
	sin = (struct sockaddr_in *)&r.ifr_addr;
	sin->sin_family = AF_INET;
	if (address) {
		inet_pton(AF_INET, address, &sin->sin_addr);
		ok = ok && !ioctl(s, SIOCSIFADDR, &r);
		inet_pton(AF_INET, "255.255.255.0", &sin->sin_addr);
		ok = ok && !ioctl(s, SIOCSIFNETMASK, &r);
	}
	r.ifr_flags = IFF_UP | IFF_RUNNING;
	ok = ok && !ioctl(s, SIOCSIFFLAGS, &r);
	if (s >= 0)
		close(s);
	return ok;
}

/* In the guest: brings up the network, mounts the disk, and serves; NULL or what went wrong */
const char *ledger_start(void);

#endif
