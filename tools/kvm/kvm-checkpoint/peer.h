/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Who is at the other end of a connection: addresses and keys.
 */
#ifndef KC_PEER_H
#define KC_PEER_H

#include <netdb.h>

#include "sink.h"

struct kc_psk {
	char identity[128];
	char hex[260];
};

/* The line of @identity in the file of the options, or the first one. */
int kc_read_psk(const struct kc_sink_opts *o, const char *identity, struct kc_psk *psk,
		struct kc_err *err);

/* "HOST:PORT" into addresses. */
int kc_resolve(const char *hostport, bool passive, struct addrinfo **ai, struct kc_err *err);

/* May one speak with this address as the options have it? */
int kc_check_security(const struct sockaddr *sa, const struct kc_sink_opts *o, struct kc_err *err);

/**
 * kc_check_peer() - is there a mistake in an address, or in the key for it, that shows at once?
 * @passive: it is to listen there.
 *
 * Return: 0 or a negative errno.
 */
int kc_check_peer(const char *hostport, bool passive, const struct kc_sink_opts *o,
		  struct kc_err *err);

#endif
