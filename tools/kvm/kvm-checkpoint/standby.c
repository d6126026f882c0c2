// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint standby: receives epochs, and goes on with the guest when the primary is gone.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "standby.h"

#define TICK_MS 50u
#define RETRY_MS 5000u

static char *command(void *ctx, const char *line, bool *ok)
{
	struct standby *sb = ctx;
	const char *text;

	*ok = false;
	pthread_mutex_lock(&sb->lock);
	if (strcmp(line, "promote")) {
		text = "unknown command; there are: status, promote";
	} else if (sb->mode != SERVING) {
		text = "it is failing over or has done so";
	} else if (!kc_ram_epoch(sb->ram)) {
		text = "there is no complete epoch to go on from";
	} else {
		sb->promote = "told to";
		text = "failing over";
		*ok = true;
	}
	pthread_mutex_unlock(&sb->lock);
	return strdup(text);
}

/*
 * How long the primary has been silent.  In ticks of which none counts for more than it should be:
 * when this host was suspended or this process stopped, it is not the primary who was silent.
 */
struct silence {
	uint64_t last_us, heard_us;
	unsigned int ms;
};

static bool is_silent(struct standby *sb, struct silence *q)
{
	uint64_t now = kc_now_us(), heard;
	unsigned int gap = (now - q->last_us) / 1000;

	pthread_mutex_lock(&sb->lock);
	heard = sb->heard_us;
	if (sb->active && sb->active->io)
		heard = sb->active->busy ? now : kc_io_heard_us(sb->active->io);
	pthread_mutex_unlock(&sb->lock);
	q->last_us = now;
	if (heard > q->heard_us) {
		q->heard_us = heard;
		q->ms = 0;
	} else {
		q->ms += gap < 4 * TICK_MS ? gap : 4 * TICK_MS;
	}
	return sb->timeout_ms && q->ms > sb->timeout_ms && kc_ram_epoch(sb->ram) &&
	       !(kc_ram_flags(sb->ram) & KC_RAM_ENDED);
}

/* After taking over: as long as QEMU lives. Its status. */
static int attend(struct standby *sb, pid_t pid, int signals)
{
	struct pollfd p = { .fd = signals, .events = POLLIN };
	struct signalfd_siginfo si;
	int status;

	for (;;) {
		if (waitpid(pid, &status, WNOHANG) == pid) {
			kc_status_phase(sb->status, "QEMU ended");
			kc_log(KC_LOG_INFO, "QEMU ended with %s %d",
			       WIFSIGNALED(status) ? "signal" : "status",
			       WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
			return WIFEXITED(status) && !WEXITSTATUS(status) ? 0 : 1;
		}
		if (poll(&p, 1, 1000) > 0 && read(signals, &si, sizeof(si)) == sizeof(si) &&
		    si.ssi_signo != SIGCHLD) {
			kc_log(KC_LOG_INFO, "leaving QEMU (process %d) alone", pid);
			return 0;
		}
	}
}

static int serve(struct standby *sb, int listener, int signals)
{
	struct pollfd p[2] = {
		{ .fd = listener, .events = POLLIN }, { .fd = signals, .events = POLLIN },
	};
	struct silence q = { .last_us = kc_now_us() };
	uint64_t not_before_us = 0;
	char reason[80];
	struct kc_err err;
	const char *why;
	pid_t pid;
	int rc;

	for (;;) {
		if (poll(p, 2, TICK_MS) < 0 && errno != EINTR)
			return 1;
		if (p[0].revents)
			kc_session_take(sb, listener);
		if (p[1].revents) {
			struct signalfd_siginfo si;

			if (read(signals, &si, sizeof(si)) == sizeof(si) &&
			    si.ssi_signo != SIGCHLD) {
				kc_log(KC_LOG_INFO, "stopped; last complete epoch %" PRIu64,
				       kc_ram_epoch(sb->ram));
				kc_session_stop_all(sb, STOPPING);
				return 0;
			}
		}
		pthread_mutex_lock(&sb->lock);
		why = sb->promote;
		if (!why && sb->guest_died && kc_now_us() >= not_before_us)
			why = "the primary's guest died";
		pthread_mutex_unlock(&sb->lock);
		if (is_silent(sb, &q) && !why) {
			snprintf(reason, sizeof(reason), "the primary has been silent for %u ms",
				 q.ms);
			why = reason;
		}
		if (!why)
			continue;
		rc = kc_take_over(sb, why, &pid, &err);
		if (!rc) {
			kc_session_stop_all(sb, TAKEN_OVER);
			close(listener);
			if (pid)
				return attend(sb, pid, signals);
			kc_print_checkpoint(sb);
			return 0;
		}
		kc_log(KC_LOG_ERROR, "could not fail over: %s", err.text);
		if (kc_ram_flags(sb->ram) & KC_RAM_TAKEN_OVER) {
			kc_session_stop_all(sb, TAKEN_OVER);
			return 1;
		}
		kc_log(KC_LOG_INFO, "waiting for the primary, and trying again if it stays silent");
		kc_status_phase(sb->status, "failing over failed");
		pthread_mutex_lock(&sb->lock);
		sb->mode = SERVING;
		pthread_mutex_unlock(&sb->lock);
		q = (struct silence){ .last_us = kc_now_us(), .heard_us = q.heard_us };
		not_before_us = kc_now_us() + RETRY_MS * 1000ull;
	}
}

static void usage(FILE *f)
{
	fprintf(f,
		"usage: kvm-checkpoint standby --listen HOST:PORT [OPTION]... [-- QEMU [ARG]...]\n"
		"\n"
		"Receives the epochs of a guest and, when its primary is gone, goes on with it in QEMU.\n"
		"\n"
		"  --listen HOST:PORT    where primaries connect to\n"
		"  --ram-dir DIR         where the guest's RAM and state are held, best in a tmpfs\n"
		"                        (default /dev/shm/kvm-checkpoint)\n"
		"  --durable             force each epoch to the disk of --ram-dir\n"
		"  --timeout TIME        fail over if the primary is silent for so long (default 5s,\n"
		"                        0: only when told to)\n"
		"  --fence COMMAND       must have succeeded before QEMU is started: it makes sure\n"
		"                        that the primary is dead\n"
		"  --no-fence            something else makes sure of that\n"
		"  --fence-timeout TIME  for that command (default 30s)\n"
		"  --exec COMMAND        QEMU's command in one argument, split at blanks, quotes as in\n"
		"                        a shell, but no shell; or as arguments after \"--\"\n"
		"  --bare-exec           add nothing to it: it loads {state} by itself\n"
		"  --capability NAME     migration capability to set before the state is loaded\n"
		"  --load-timeout TIME   for QEMU to have loaded the state (default 30s)\n"
		"  --control PATH        unix socket for status and promote\n"
		"  --psk-file FILE, --psk-identity NAME, --insecure, --io-timeout TIME\n"
		"                        as for protect\n"
		"  --json                messages as JSON\n"
		"\n"
		"In QEMU's command are replaced: {ramN} or {ram:NAME} by the path of a block of RAM,\n"
		"{sizeN} by its size, {state} by that of the device state, {epoch} by its number.\n"
		"Without a command, prints these and ends.\n");
}

static int parse(struct standby *sb, int argc, char **argv)
{
	static const struct option options[] = {
		{ "listen", 1, NULL, 'l' },
		{ "ram-dir", 1, NULL, 'r' },
		{ "durable", 0, NULL, 'd' },
		{ "timeout", 1, NULL, 't' },
		{ "fence", 1, NULL, 'f' },
		{ "no-fence", 0, NULL, 'F' },
		{ "fence-timeout", 1, NULL, 'T' },
		{ "exec", 1, NULL, 'e' },
		{ "bare-exec", 0, NULL, 'b' },
		{ "capability", 1, NULL, 'C' },
		{ "load-timeout", 1, NULL, 'L' },
		{ "control", 1, NULL, 'c' },
		{ "json", 0, NULL, 'j' },
		{ "psk-file", 1, NULL, 'S' },
		{ "psk-identity", 1, NULL, 'S' },
		{ "insecure", 0, NULL, 'S' },
		{ "io-timeout", 1, NULL, 'S' },
		{ "help", 0, NULL, 'h' },
		{ NULL, 0, NULL, 0 }
	};
	const char *fence = NULL, *exec = NULL;
	unsigned int nr_caps = 0;
	struct kc_launch l = { 0 };
	struct kc_err err;
	int o, i, index, rc;

	while ((o = getopt_long(argc, argv, "+h", options, &index)) != -1) {
		bool ok = true;

		switch (o) {
		case 'l':
			sb->listen = optarg;
			break;
		case 'r':
			sb->ram_dir = optarg;
			break;
		case 'd':
			sb->durable = true;
			break;
		case 't':
			ok = !kc_parse_ms(optarg, &sb->timeout_ms);
			break;
		case 'f':
			fence = optarg;
			break;
		case 'F':
			sb->no_fence = true;
			break;
		case 'T':
			ok = !kc_parse_ms(optarg, &sb->fence_timeout_ms) && sb->fence_timeout_ms;
			break;
		case 'e':
			exec = optarg;
			break;
		case 'b':
			sb->bare = true;
			break;
		case 'C':
			ok = nr_caps < 7;
			if (ok)
				sb->capabilities[nr_caps++] = optarg;
			break;
		case 'L':
			ok = !kc_parse_ms(optarg, &sb->load_timeout_ms) && sb->load_timeout_ms;
			break;
		case 'c':
			sb->control = optarg;
			break;
		case 'j':
			kc_log_json = true;
			break;
		case 'S':
			rc = kc_sink_parse_option(&sb->opts, options[index].name, optarg, &err);
			if (rc < 0) {
				kc_log(KC_LOG_ERROR, "%s", err.text);
				return 2;
			}
			break;
		case 'h':
			usage(stdout);
			return 0;
		default:
			fprintf(stderr, "try: kvm-checkpoint standby --help\n");
			return 2;
		}
		if (!ok) {
			kc_log(KC_LOG_ERROR, "--%s does not take %s", options[index].name, optarg);
			return 2;
		}
	}
	if (!sb->listen) {
		kc_log(KC_LOG_ERROR, "--listen HOST:PORT is missing; try: kvm-checkpoint standby --help");
		return 2;
	}
	if (!fence == !sb->no_fence) {
		kc_log(KC_LOG_ERROR, "give --fence COMMAND, which makes sure that the primary is dead before the guest runs here as well, or --no-fence if something else does");
		return 2;
	}
	if (fence) {
		sb->fence = kc_split(fence);
		if (!sb->fence) {
			kc_log(KC_LOG_ERROR, "--fence does not take %s: is a quote missing?", fence);
			return 2;
		}
	}
	if (exec && optind < argc) {
		kc_log(KC_LOG_ERROR, "give QEMU's command by --exec or after \"--\", not both");
		return 2;
	}
	if (exec) {
		sb->exec = kc_split(exec);
		if (!sb->exec) {
			kc_log(KC_LOG_ERROR, "--exec does not take %s: is a quote missing?", exec);
			return 2;
		}
	} else if (optind < argc) {
		sb->exec = calloc(argc - optind + 1, sizeof(char *));
		for (i = optind; sb->exec && i < argc; i++)
			sb->exec[i - optind] = strdup(argv[i]);
	}
	l.argv = sb->exec;
	if (sb->exec && kc_launch_check(&l, &err)) {
		kc_log(KC_LOG_ERROR, "%s", err.text);
		return 2;
	}
	return -1;
}

int cmd_standby(int argc, char **argv)
{
	struct standby sb = {
		.ram_dir = "/dev/shm/kvm-checkpoint", .timeout_ms = 5000, .fence_timeout_ms = 30000,
		.load_timeout_ms = 30000, .lock = PTHREAD_MUTEX_INITIALIZER,
	};
	const struct kc_guest *g;
	pthread_condattr_t attr;
	struct kc_ctl *ctl = NULL;
	struct sigaction sa;
	struct kc_err err = { "" };
	int listener, signals, rc;
	sigset_t set;

	kc_sink_defaults(&sb.opts);
	rc = parse(&sb, argc, argv);
	if (rc >= 0)
		goto out_args;
	rc = 1;
	kc_log_may_lose = true;
	kc_core_without_memory();
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&sb.changed, &attr);
	/* Before the first thread, so that all of them leave signals to signalfd. */
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGINT);
	/* Which signalfd would tell of under nohup, too. */
	if (!sigaction(SIGHUP, NULL, &sa) && sa.sa_handler != SIG_IGN)
		sigaddset(&set, SIGHUP);
	sigaddset(&set, SIGCHLD);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	signals = signalfd(-1, &set, SFD_CLOEXEC);

	sb.status = kc_status_new("standby", "");
	if (signals < 0 || !sb.status || kc_ram_open(sb.ram_dir, sb.durable, &sb.ram, &err)) {
		kc_log(KC_LOG_ERROR, "%s", err.text[0] ? err.text : "out of memory");
		goto out;
	}
	g = kc_ram_guest(sb.ram);
	if (kc_ram_flags(sb.ram) & KC_RAM_TAKEN_OVER) {
		kc_log(KC_LOG_ERROR, "the guest in %s was taken over, its files are no checkpoint any more: when it needs them no more, remove %s",
		       sb.ram_dir, sb.ram_dir);
		goto out;
	}
	sb.heard_us = kc_now_us();
	listener = kc_io_listen(sb.listen, &sb.opts, &err);
	if (listener < 0) {
		kc_log(KC_LOG_ERROR, "%s", err.text);
		goto out;
	}
	kc_status_phase(sb.status, "waiting for the primary");
	if (g)
		kc_status_guest(sb.status, g->name);
	if (kc_ram_epoch(sb.ram)) {
		sb.stats.epoch_sent = sb.stats.epoch_acked = kc_ram_epoch(sb.ram);
		kc_status_epoch(sb.status, kc_ram_epoch(sb.ram), kc_now_us());
		kc_status_sink(sb.status, &sb.stats);
	}
	if (sb.control) {
		ctl = kc_ctl_start(sb.control, sb.status, command, &sb, &err);
		if (!ctl) {
			kc_log(KC_LOG_ERROR, "%s", err.text);
			close(listener);
			goto out;
		}
	}
	kc_log(KC_LOG_INFO, "listening on %s%s; last complete epoch %" PRIu64, sb.listen,
	       sb.opts.insecure ? " without encryption" : "", kc_ram_epoch(sb.ram));
	rc = serve(&sb, listener, signals);
	kc_ctl_stop(ctl);
	/* A connection that does not end keeps what it uses; the process ends now anyway. */
	if (sb.nr_sessions)
		exit(rc);
out:
	kc_ram_close(sb.ram);
	kc_status_free(sb.status);
out_args:
	kc_free_argv(sb.fence);
	kc_free_argv(sb.exec);
	return rc;
}
