/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A guest that counts aloud: datagrams with numbers, one after the other, to all.
 */
#ifndef DEMO_BEATS_H
#define DEMO_BEATS_H

#define BEATS_GUEST	"10.18.0.2"
#define BEATS_HOST	"10.18.0.1"
#define BEATS_PORT	7018

/* In the guest: one every @us microseconds; NULL or what went wrong */
const char *beats_start(long us);

#endif
