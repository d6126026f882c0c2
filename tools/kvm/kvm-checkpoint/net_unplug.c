// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint unplug: ends what protect has the kernel hold back of tap devices.
 *
 * With --guard FD, which users have no need to know, it is a small process that protect starts and
 * that outlives it, if it has to: QEMU, which knows when nobody takes over any more, tells it what
 * becomes of what is held.  If QEMU dies, that must not leave, as another one goes on from before it
 * was sent.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <netlink/socket.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "net_plug.h"
#include "protect.h"

static const char usage_text[] =
"usage: kvm-checkpoint unplug [--drop] TAP...\n"
"\n"
"Lets go what protect has the kernel hold back of tap devices, and removes what it has made\n"
"for that, in case that who has to do that was killed as well.  Needs CAP_NET_ADMIN.\n"
"\n"
"  --drop      what is held is dropped, as the guest goes on elsewhere\n";

static int usage_error(const char *text)
{
	if (text)
		fprintf(stderr, "kvm-checkpoint: unplug: %s\n", text);
	fputs("Try: kvm-checkpoint unplug --help\n", stderr);
	return 2;
}

/* Until QEMU says what becomes of it: false if it is not ours any more */
static bool wait_for_word(int fd, bool *drop)
{
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	bool begun = false;
	sigset_t all;
	ssize_t n;
	char c;

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	prctl(PR_SET_NAME, "kc-net-guard");
	/* Neither its terminal nor its pipes are ours to keep */
	dup2(null, 0);
	dup2(null, 1);
	dup2(null, 2);
	do
		n = read(fd, &c, 1);
	while ((n < 0 && errno == EINTR) || (n == 1 && c == 'g' && (begun = true)));
	*drop = n != 1 || c != 'r';
	return begun && (n != 1 || c != 'k');
}

int cmd_unplug(int argc, char **argv)
{
	static const struct option options[] = {
		{ "drop", no_argument, NULL, 'd' },
		{ "guard", required_argument, NULL, 'g' },
		{ "help", no_argument, NULL, 'h' },
		{ NULL, 0, NULL, 0 }
	};
	bool drop = false;
	int c, i, rc, status = 0, guard = -1;
	struct nl_sock *sk;
	struct kc_err err;
	char *end;

	optind = 1;
	while ((c = getopt_long(argc, argv, "h", options, NULL)) != -1) {
		switch (c) {
		case 'd':
			drop = true;
			break;
		case 'g':
			guard = strtol(optarg, &end, 10);
			if (*end || end == optarg || guard < 3 || fcntl(guard, F_GETFD) < 0)
				return usage_error("--guard needs a file descriptor");
			break;
		case 'h':
			printf("%s", usage_text);
			return 0;
		default:
			return usage_error(NULL);
		}
	}
	if (optind == argc)
		return usage_error("of which tap device?");
	if (guard >= 0 && !wait_for_word(guard, &drop))
		return 0;
	if (kc_plug_connect(&sk, &err)) {
		kc_log(KC_LOG_ERROR, "%s", err.text);
		return 1;
	}
	for (i = optind; i < argc; i++) {
		struct kc_plug p = { .newest = UINT_MAX };

		snprintf(p.ifname, sizeof(p.ifname), "%s", argv[i]);
		/* The tap device may be gone by now: ours is said by that of IFB */
		rc = guard < 0 ? kc_plug_find(sk, argv[i], NULL, &p, &err) :
		     sscanf(argv[i], KC_IFB_NAME, &p.tap, &p.newest) != 2 ?
		     kc_fail(&err, EINVAL, "%s is no IFB device of this program", argv[i]) : 0;
		if (!rc)
			rc = kc_plug_remove(sk, &p, drop, &err);
		if (rc)
			kc_log(KC_LOG_ERROR, "%s", err.text);
		status = rc ? 1 : status;
	}
	nl_socket_free(sk);
	return status;
}
