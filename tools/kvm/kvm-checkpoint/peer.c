// SPDX-License-Identifier: GPL-2.0-only
/*
 * Who is at the other end of a connection: addresses and keys.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "peer.h"

/* --- Keys ----------------------------------------------------------------- */

int kc_read_psk(const struct kc_sink_opts *o, const char *identity, struct kc_psk *psk,
		struct kc_err *err)
{
	char line[512];
	struct stat st;
	FILE *f;
	int rc;

	f = fopen(o->psk_file, "re");
	if (!f || fstat(fileno(f), &st)) {
		rc = kc_fail(err, errno, "cannot read %s: %s", o->psk_file, strerror(errno));
		if (f)
			fclose(f);
		return rc;
	}
	if (st.st_mode & 077) {
		fclose(f);
		return kc_fail(err, EACCES, "%s can be read by others: chmod 600 %s", o->psk_file,
			       o->psk_file);
	}
	rc = -ENOENT;
	while (rc && fgets(line, sizeof(line), f)) {
		char *colon;

		line[strcspn(line, "\r\n")] = '\0';
		if (!line[0] || line[0] == '#')
			continue;
		colon = strchr(line, ':');
		if (!colon || colon == line || colon - line >= (int)sizeof(psk->identity) ||
		    strlen(colon + 1) < 32 || strlen(colon + 1) >= sizeof(psk->hex) ||
		    strlen(colon + 1) % 2 ||
		    strspn(colon + 1, "0123456789abcdefABCDEF") != strlen(colon + 1)) {
			rc = kc_fail(err, EINVAL,
				     "%s has a line that is not IDENTITY:HEX with a key of at least 16 bytes; make one with: psktool -u kvm-checkpoint -p FILE",
				     o->psk_file);
			break;
		}
		*colon = '\0';
		if (identity && strcmp(identity, line))
			continue;
		strcpy(psk->identity, line);
		strcpy(psk->hex, colon + 1);
		rc = 0;
	}
	fclose(f);
	explicit_bzero(line, sizeof(line));
	if (rc == -ENOENT)
		kc_fail(err, ENOENT, "%s has no key%s%s", o->psk_file, identity ? " of " : "",
			identity ? identity : "");
	return rc;
}

/* --- Addresses ------------------------------------------------------------ */

/* @flags: of getaddrinfo(); its error, or -EINVAL and why. */
static int look_up(const char *hostport, bool passive, int flags, struct addrinfo **ai,
		   struct kc_err *err)
{
	struct addrinfo hints = {
		.ai_socktype = SOCK_STREAM,
		.ai_flags = flags | (passive ? AI_PASSIVE : 0),
	};
	const char *colon = strrchr(hostport, ':');
	char host[256] = "";
	size_t n;

	n = colon ? colon - hostport : 0;
	if (!colon || !colon[1] || n >= sizeof(host) || (!n && !passive))
		return kc_fail(err, EINVAL, "%s is not HOST:PORT", hostport);
	if (hostport[0] == '[' && n > 2 && hostport[n - 1] == ']')
		memcpy(host, hostport + 1, n - 2);
	else if (memchr(hostport, ':', n))
		return kc_fail(err, EINVAL,
			       "%s is not HOST:PORT (write IPv6 addresses in brackets)", hostport);
	else
		memcpy(host, hostport, n);
	/* It takes 70000 for 4464. */
	if (strspn(colon + 1, "0123456789") == strlen(colon + 1) &&
	    strtoul(colon + 1, NULL, 10) > 65535)
		return kc_fail(err, EINVAL, "%s: ports are numbers up to 65535", hostport);
	return getaddrinfo(n ? host : NULL, colon + 1, &hints, ai);
}

int kc_resolve(const char *hostport, bool passive, struct addrinfo **ai, struct kc_err *err)
{
	int rc = look_up(hostport, passive, 0, ai, err);

	if (!rc || rc == -EINVAL)
		return rc;
	return kc_fail(err, rc == EAI_AGAIN ? ETIMEDOUT : EDESTADDRREQ, "%s: %s", hostport,
		       gai_strerror(rc));
}

static bool is_loopback(const struct sockaddr *sa)
{
	if (sa->sa_family == AF_INET)
		return ntohl(((const struct sockaddr_in *)sa)->sin_addr.s_addr) >> 24 == 127;
	if (sa->sa_family == AF_INET6)
		return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)sa)->sin6_addr);
	return false;
}

int kc_check_security(const struct sockaddr *sa, const struct kc_sink_opts *o, struct kc_err *err)
{
	if (!o->insecure && !o->psk_file)
		return kc_fail(err, EINVAL,
			       "no key: make one with \"psktool -u kvm-checkpoint -p FILE\" and give both sides --psk-file FILE");
	if (o->insecure && !is_loopback(sa))
		return kc_fail(err, EINVAL,
			       "--insecure is only for loopback addresses: anybody could read and change the guest's memory");
	return 0;
}

int kc_check_peer(const char *hostport, bool passive, const struct kc_sink_opts *o,
		  struct kc_err *err)
{
	struct addrinfo *ai;
	struct kc_psk psk;
	int rc;

	/* Only what needs no name server: that may be there later. */
	rc = look_up(hostport, passive, AI_NUMERICHOST, &ai, err);
	if (rc == -EINVAL)
		return rc;
	if (rc == EAI_SERVICE)
		return kc_fail(err, EINVAL, "%s: no such port", hostport);
	if (!rc) {
		rc = kc_check_security(ai->ai_addr, o, err);
		freeaddrinfo(ai);
	} else {
		rc = o->insecure ? 0 : kc_check_security(NULL, o, err);
	}
	if (!rc && !o->insecure) {
		rc = kc_read_psk(o, o->psk_identity, &psk, err);
		explicit_bzero(&psk, sizeof(psk));
	}
	return rc;
}
