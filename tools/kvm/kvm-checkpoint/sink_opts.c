// SPDX-License-Identifier: GPL-2.0-only
/*
 * Options of a sink, as they are in command lines.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "peer.h"
#include "sink.h"

/* At less, a page would take so long that the receiver thinks that we are gone. */
#define MIN_BANDWIDTH	(64u << 10)

const char kc_sink_options_help[] =
	"  --psk-file FILE       TLS key, IDENTITY:HEX as psktool makes it; only you may read it\n"
	"  --psk-identity NAME   which line of it (default: the first)\n"
	"  --insecure            neither encrypted nor authenticated; on loopback only\n"
	"  --compress CODEC      lz4 (default), zstd, zstd:LEVEL (1 to 19) or none\n"
	"  --delta-cache SIZE    memory for last versions of pages, to send differences\n"
	"                        (default 64M, 0 for none; not used for a directory)\n"
	"  --io-timeout TIME     give up a peer or disk that takes nothing for so long\n"
	"                        (default 10s)\n"
	"  --bandwidth SIZE      so many bytes a second at most are sent or written, at least 64k\n"
	"                        (default: as many as possible)\n"
	"  --keep N              a directory keeps N epochs to go back to (default 100)\n";

void kc_sink_defaults(struct kc_sink_opts *opts)
{
	*opts = (struct kc_sink_opts){
		.codec = KC_CODEC_LZ4,
		.level = 1,
		.delta_cache = 64 << 20,
		.io_timeout_ms = 10000,
		.connect_timeout_ms = 5000,
		.keep = 100,
	};
}

int kc_sink_parse_option(struct kc_sink_opts *o, const char *name, const char *arg,
			 struct kc_err *err)
{
	unsigned long n;
	char *end;

	if (!strcmp(name, "insecure")) {
		o->insecure = true;
		return 1;
	}
	if (!strcmp(name, "psk-file")) {
		o->psk_file = arg;
		return 1;
	}
	if (!strcmp(name, "psk-identity")) {
		o->psk_identity = arg;
		return 1;
	}
	if (!strcmp(name, "compress")) {
		if (!strcmp(arg, "none")) {
			o->codec = KC_CODEC_NONE;
		} else if (!strcmp(arg, "lz4")) {
			o->codec = KC_CODEC_LZ4;
		} else if (!strncmp(arg, "zstd", 4) && (!arg[4] || arg[4] == ':')) {
			n = arg[4] ? strtoul(arg + 5, &end, 10) : 1;
			if (arg[4] && (!arg[5] || *end || n < 1 || n > 19))
				goto bad;
			o->codec = KC_CODEC_ZSTD;
			o->level = n;
		} else {
			goto bad;
		}
		return 1;
	}
	if (!strcmp(name, "delta-cache")) {
		if (kc_parse_size(arg, &o->delta_cache))
			goto bad;
		return 1;
	}
	if (!strcmp(name, "bandwidth")) {
		if (kc_parse_size(arg, &o->bandwidth) || o->bandwidth < MIN_BANDWIDTH)
			goto bad;
		return 1;
	}
	if (!strcmp(name, "io-timeout")) {
		if (kc_parse_ms(arg, &o->io_timeout_ms) || !o->io_timeout_ms)
			goto bad;
		return 1;
	}
	if (!strcmp(name, "keep")) {
		n = strtoul(arg, &end, 10);
		if (*arg < '1' || *arg > '9' || *end || n > 1000000)
			goto bad;
		o->keep = n;
		return 1;
	}
	return 0;
bad:
	return kc_fail(err, EINVAL, "--%s does not take %s", name, arg);
}

int kc_sink_check(const char *spec, const struct kc_sink_opts *opts, struct kc_err *err)
{
	return strncmp(spec, "tcp:", 4) ? 0 : kc_check_peer(spec + 4, false, opts, err);
}
