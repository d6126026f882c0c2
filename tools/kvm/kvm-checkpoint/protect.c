// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint protect: takes epochs of a running guest and hands them to a sink.
 *
 * One thread does it all, so that heartbeats stop when epochs do.  While a sink is slow the guest
 * runs, and the next epoch is longer; it is never paused for the sink.
 *
 * Whenever it is not known what the receiver lacks (this daemon was restarted, QEMU refused
 * something), all of the guest's memory is compared with it by digests and what differs is sent.
 */
#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "protect.h"

static const char usage_text[] =
"usage: kvm-checkpoint protect --qmp SOCKET --to tcp:HOST:PORT|DIR [OPTION]...\n"
"\n"
"Keeps a copy of a running QEMU/KVM guest at a standby or in a directory: all of its\n"
"memory first, then an epoch at each interval, for which the guest is paused as long as\n"
"it takes to copy what it has written.  QEMU has to be built with the project's patch and\n"
"started with\n"
"  -accel kvm,dirty-slot-ring-size=4096          (not necessary, but fast)\n"
"  -object memory-backend-memfd,id=ram0,size=SIZE,share=on -machine memory-backend=ram0\n"
"  -vga none -qmp unix:SOCKET,server=on,wait=off (a monitor for this program alone)\n"
"\n"
"  --qmp SOCKET          of QEMU's monitor\n"
"  --to WHERE            tcp:HOST:PORT of a standby, or a directory for a chain of epochs\n"
"  --interval TIME       from one epoch to the next (default 100ms)\n"
"  --max-dirty N         an epoch sooner, when N pages were written; only with slot rings,\n"
"                        and noticed when a ring is half full (default 8192, 0 for never)\n"
"  --pause-limit TIME    let the guest go on, without an epoch, if one takes longer, be it\n"
"                        because this program hangs (default 2s, 0 for no limit)\n"
"  --qemu-timeout TIME   give up a QEMU that lives but does not answer for so long, and leave\n"
"                        the guest to the standby (default 0: never)\n"
"  --lease TIME          the guest runs only while an epoch that was sent less than that ago\n"
"                        is acknowledged; QEMU stops it otherwise (default: it runs on)\n"
"  --net commit|pass     what the guest sends is held back until the epoch that knows of it\n"
"                        is acknowledged, or leaves at once (default commit with a\n"
"                        standby, pass with a directory)\n"
"  --packet-epochs       an epoch as soon as something is held back, if all before is\n"
"                        acknowledged: shorter answers, more pauses\n"
"  --net-limit TIME      for how long, if nothing is acknowledged (default: until the standby\n"
"                        would have taken over, by its time limit and its fence's)\n"
"  --disk replicate      writable disks are part of epochs (default)\n"
"  --disk node=NAME      this one is, and storage of the others is taken care of; may be\n"
"                        said several times\n"
"  --disk external       none is: storage is taken care of\n"
"  --trust-device TYPE   such a device has no state but what QEMU migrates; may be said\n"
"                        several times\n"
"  --control PATH        unix socket for status, detach and switchover\n"
"  --leave-ram DIR       where a switchover leaves the guest's memory, for a standby here\n"
"  --epochs N            end after N epochs; the guest runs on\n"
"  --json                progress, epochs and messages as JSON, one object a line\n";

static const char usage_end[] =
"\n"
"Needs no privileges but access to QEMU's socket: run it as QEMU's user, not as root.  To\n"
"hold back what network cards with vhost or several queues send it needs CAP_NET_ADMIN.\n"
"Ends with 0 when it was told to (SIGTERM, SIGINT, SIGHUP, detach, --epochs) or the guest\n"
"was shut down, 1 after a failure, which it is too if the standby could not be told of\n"
"that, 2 for a mistake in the command line.\n";

atomic_bool kc_stop_requested, kc_switch_requested;
volatile sig_atomic_t kc_may_exit;

static void on_signal(int sig)
{
	(void)sig;
	kc_stop_requested = true;
	if (kc_may_exit)
		_exit(0);
	kc_wake();
}

static char *on_command(void *ctx, const char *line, bool *ok)
{
	struct protect *p = ctx;

	*ok = true;
	if (!strcmp(line, "detach")) {
		kc_stop_requested = true;
		return strdup("the guest runs on, without protection");
	}
	if (!strcmp(line, "switchover") && to_standby(p)) {
		kc_switch_requested = true;
		return strdup("the guest goes on at the standby as soon as that has all of it");
	}
	*ok = false;
	return strdup(strcmp(line, "switchover") ? "no such command; there are: detach, switchover" :
		      "only a standby can go on with a guest, and this one goes to a directory");
}

bool kc_sleep(struct protect *p, uint64_t until_us, int log_fd)
{
	struct pollfd fds[] = {
		{ .fd = kc_wake_fd(), .events = POLLIN },
		{ .fd = p->guest.qmp.fd, .events = POLLIN },
		{ .fd = p->sink ? kc_sink_fd(p->sink) : -1, .events = POLLIN },
		{ .fd = log_fd, .events = POLLIN },
		/* Once it is known it is not waited for */
		{ .fd = p->packets_wait ? -1 : p->guest.packets_fd, .events = POLLIN },
	};
	uint64_t now = kc_now_us(), due = p->sink ? kc_sink_due_us(p->sink) : UINT64_MAX;
	int n;

	if (due > until_us)
		due = until_us;
	if (due > now + MAX_SLEEP_MS * 1000)
		due = now + MAX_SLEEP_MS * 1000;
	n = poll(fds, 5, due > now ? (due - now + 999) / 1000 : 0);
	/* Before anybody looks for what it was: what comes after that wakes again. */
	kc_wake_clear();
	return n > 0 && fds[3].revents & POLLIN;
}

/* The guest stands still */
static void cut(void *ctx)
{
	kc_plugs_cut(ctx);
	kc_disks_cut(ctx);
}

/* Until something fails or ends it */
static enum where run(struct protect *p, int *rc, struct kc_err *err)
{
	enum where where = kc_link_open(p, rc, err);
	uint64_t due;

	if (where == OK)
		where = kc_epoch_first(p, rc, err);
	due = kc_now_us();
	while (where == OK) {
		if (p->max_epochs && p->epochs >= p->max_epochs) {
			/* All of them are to count */
			*rc = kc_sink_wait(p->sink, p->nr, p->opts.io_timeout_ms, err);
			if (!*rc)
				*rc = kc_link_poll(p, err);
			return *rc ? SINK : STOPPED;
		}
		due += p->interval_ms * 1000ull;
		if (due < kc_now_us())
			due = kc_now_us();	/* late: don't catch up */
		where = kc_epoch_wait(p, due, rc, err);
		if (where != OK)
			break;
		if (kc_now_us() < due)
			due = kc_now_us();
		where = kc_epoch_next(p, rc, err);
	}
	return where;
}

/*
 * Ends the protection of a guest that lives: it runs on without a lease, unless its standby does not
 * know that, or runs it.
 */
static bool detach(struct protect *p)
{
	bool told = kc_link_end(p, KC_END_DETACH);
	struct kc_err err;

	if (p->is_elsewhere)
		return told;
	if (told)
		kc_net_end(p, false);
	guest_close(&p->guest);
	if (told && p->lease_ms && guest_end_lease(&p->guest_opts, &err))
		kc_log(KC_LOG_ERROR,
		       "%s: the guest will stand still as its lease is not renewed; tell QEMU \"cont\"",
		       err.text);
	return told;
}

/* Returns the exit status */
static int protect(struct protect *p)
{
	unsigned int reopened = 0;
	bool may_be_dead;
	struct kc_err err;
	int rc;

	rc = guest_open(&p->guest, &p->guest_opts, &err);
	if (rc) {
		kc_log(KC_LOG_ERROR, "%s", err.text);
		return 1;
	}

	for (;;) {
		uint64_t began = kc_now_us();

		kc_status_guest(p->status, p->guest.id.name);
		rc = 0;
		switch (run(p, &rc, &err)) {
		case STOPPED:
			rc = detach(p) ? 0 : 1;
			if (p->is_elsewhere)
				return kc_guest_is_elsewhere(p, "the standby has taken over");
			return rc;
		case SWITCH:
			if (kc_switch_over(p, &rc))
				return rc;
			continue;
		case SINK:
			if (p->lost) {
				rc = p->lost;
				err = p->lost_err;
			}
			if (kc_link_failed(p, -rc, &err))
				continue;
			if (rc == -ESHUTDOWN)
				return kc_guest_is_elsewhere(p, err.text);
			kc_log(KC_LOG_ERROR, "%s; the guest runs on, without protection",
			       err.text);
			detach(p);
			return 1;
		default:
			break;
		}

		/* The guest's side */
		if (rc == -EPIPE && p->guest.qmp.shutdown) {
			const char *why = p->guest.qmp.why_shutdown;

			kc_log(KC_LOG_INFO, "the guest was shut down%s%s%s", *why ? " (" : "",
			       why, *why ? ")" : "");
			return kc_link_end(p, KC_END_GUEST_SHUTDOWN) ? 0 : 1;
		}
		if (rc == -EPIPE && guest_died(&p->guest)) {
			kc_log(KC_LOG_ERROR, "%s; the last epoch that counts is %lu", err.text,
			       p->acked);
			kc_link_end(p, KC_END_GUEST_DIED);
			return 1;
		}
		if (rc == -ECANCELED)
			return detach(p) ? 0 : 1;
		if (rc == -ETIMEDOUT) {
			/* It may live again: its standby's --timeout and fence decide. */
			kc_log(KC_LOG_ERROR, "%s; the last epoch that counts is %lu", err.text,
			       p->acked);
			kc_link_close(p);
			return 1;
		}
		kc_sent_forget(p);
		may_be_dead = false;
		if (kc_now_us() - began > 60000000)
			reopened = 0;
		/* What others do to the guest, they may do often */
		if (rc == -EUCLEAN)
			reopened = 0;
		if (rc != -ESTALE && reopened++ < 3) {
			struct kc_err again;

			kc_log(KC_LOG_WARN, "%s; connecting to QEMU again", err.text);
			rc = guest_reopen(&p->guest, &again);
			if (!rc) {
				kc_link_close(p);
				continue;
			}
			err = again;
			may_be_dead = rc == -ECONNREFUSED || rc == -ENOENT || rc == -EPIPE ||
				      rc == -ETIMEDOUT;
		}
		/* While QEMU can be told */
		kc_disks_lost(p);
		guest_close(&p->guest);
		kc_log(KC_LOG_ERROR, "%s; the guest is without protection", err.text);
		/* Where nobody listens or answers any more: that is for the standby. */
		if (may_be_dead)
			kc_link_close(p);
		else
			detach(p);
		return 1;
	}
}

/* @text: NULL if getopt_long() has said it. */
static int usage_error(const char *text)
{
	if (text)
		fprintf(stderr, "kvm-checkpoint: protect: %s\n", text);
	fputs("Try: kvm-checkpoint protect --help\n", stderr);
	return 2;
}

static int parse_count(const char *s, uint64_t *n)
{
	char *end;

	errno = 0;
	*n = strtoull(s, &end, 10);
	return errno || end == s || *end || *s == '-' ? -EINVAL : 0;
}

int cmd_protect(int argc, char **argv)
{
	enum {
		QMP = 256, LEAVE_RAM, TO, INTERVAL, MAX_DIRTY, PAUSE_LIMIT, QEMU_TIMEOUT, LEASE, NET,
		NET_LIMIT, PACKET_EPOCHS, DISK, TRUST, CONTROL, EPOCHS, JSON, HELP, SINK_OPTION,
	};
	static const struct option options[] = {
		{ "qmp", required_argument, NULL, QMP },
		{ "to", required_argument, NULL, TO },
		{ "leave-ram", required_argument, NULL, LEAVE_RAM },
		{ "interval", required_argument, NULL, INTERVAL },
		{ "max-dirty", required_argument, NULL, MAX_DIRTY },
		{ "pause-limit", required_argument, NULL, PAUSE_LIMIT },
		{ "qemu-timeout", required_argument, NULL, QEMU_TIMEOUT },
		{ "lease", required_argument, NULL, LEASE },
		{ "net", required_argument, NULL, NET },
		{ "net-limit", required_argument, NULL, NET_LIMIT },
		{ "packet-epochs", no_argument, NULL, PACKET_EPOCHS },
		{ "disk", required_argument, NULL, DISK },
		{ "trust-device", required_argument, NULL, TRUST },
		{ "control", required_argument, NULL, CONTROL },
		{ "epochs", required_argument, NULL, EPOCHS },
		{ "json", no_argument, NULL, JSON },
		{ "help", no_argument, NULL, HELP },
		{ "compress", required_argument, NULL, SINK_OPTION },
		{ "delta-cache", required_argument, NULL, SINK_OPTION },
		{ "io-timeout", required_argument, NULL, SINK_OPTION },
		{ "psk-file", required_argument, NULL, SINK_OPTION },
		{ "psk-identity", required_argument, NULL, SINK_OPTION },
		{ "insecure", no_argument, NULL, SINK_OPTION },
		{ "bandwidth", required_argument, NULL, SINK_OPTION },
		{ "keep", required_argument, NULL, SINK_OPTION },
		{ NULL, 0, NULL, 0 }
	};
	static struct protect p;
	struct sigaction sa = { .sa_handler = on_signal }, old;
	struct kc_ctl *ctl = NULL;
	struct kc_err err;
	int c, index, status;
	bool replicate = false;

	p.interval_ms = 100;
	p.max_dirty = 8192;
	p.net_limit_ms = NET_LIMIT_UNSET;
	p.guest_opts.pause_limit_ms = 2000;
	p.guest_opts.idle = kc_link_tick;
	p.guest_opts.idle_ctx = &p;
	p.guest.sock = -1;
	p.guest.buffer = -1;
	p.guest.qmp.fd = -1;
	kc_sink_defaults(&p.opts);

	optind = 1;
	while ((c = getopt_long(argc, argv, "h", options, &index)) != -1) {
		switch (c) {
		case QMP:
			p.guest_opts.qmp = optarg;
			break;
		case TO:
			p.to = optarg;
			break;
		case LEAVE_RAM:
			p.leave_ram = optarg;
			break;
		case INTERVAL:
			if (kc_parse_ms(optarg, &p.interval_ms) || !p.interval_ms)
				return usage_error("--interval needs a time, such as 100ms");
			break;
		case MAX_DIRTY:
			if (parse_count(optarg, &p.max_dirty))
				return usage_error("--max-dirty needs a number of pages");
			break;
		case PAUSE_LIMIT:
			if (kc_parse_ms(optarg, &p.guest_opts.pause_limit_ms))
				return usage_error("--pause-limit needs a time, such as 2s");
			break;
		case QEMU_TIMEOUT:
			if (kc_parse_ms(optarg, &p.guest_opts.qemu_timeout_ms))
				return usage_error("--qemu-timeout needs a time, such as 1m");
			break;
		case LEASE:
			if (kc_parse_ms(optarg, &p.lease_ms) || !p.lease_ms)
				return usage_error("--lease needs a time, such as 3s");
			break;
		case NET:
			if (strcmp(optarg, "commit") && strcmp(optarg, "pass"))
				return usage_error("--net can be commit or pass");
			p.net = *optarg == 'c' ? NET_COMMIT : NET_PASS;
			break;
		case PACKET_EPOCHS:
			p.guest_opts.watch_packets = true;
			break;
		case NET_LIMIT:
			if (kc_parse_ms(optarg, &p.net_limit_ms))
				return usage_error("--net-limit needs a time, such as 10s");
			break;
		case DISK:
			if (!strncmp(optarg, "node=", 5) && optarg[5] &&
			    p.guest_opts.nr_disks < KC_MAX_DISKS)
				p.guest_opts.disks[p.guest_opts.nr_disks++] = optarg + 5;
			else if (!strcmp(optarg, "external"))
				p.guest_opts.external_disks = true;
			else if (strcmp(optarg, "replicate"))
				return usage_error("--disk can be external, replicate or node=NAME");
			replicate = replicate || strcmp(optarg, "external");
			break;
		case TRUST:
			if (p.guest_opts.nr_trusted_devices == 16)
				return usage_error("--trust-device can be said 16 times");
			p.guest_opts.trusted_devices[p.guest_opts.nr_trusted_devices++] = optarg;
			break;
		case CONTROL:
			p.control = optarg;
			break;
		case EPOCHS:
			if (parse_count(optarg, &p.max_epochs) || !p.max_epochs)
				return usage_error("--epochs needs a number");
			break;
		case JSON:
			p.json = true;
			kc_log_json = true;
			break;
		case 'h':
		case HELP:
			printf("%s%s%s", usage_text, kc_sink_options_help, usage_end);
			return 0;
		case SINK_OPTION:
			if (kc_sink_parse_option(&p.opts, options[index].name, optarg, &err) != 1)
				return usage_error(err.text);
			break;
		default:
			return usage_error(NULL);
		}
	}
	if (optind < argc)
		return usage_error("there is an argument too many");
	if (!p.guest_opts.qmp)
		return usage_error("--qmp is missing: where is QEMU's monitor?");
	if (p.lease_ms && p.to && !to_standby(&p))
		return usage_error("--lease is of use with a standby: --to tcp:HOST:PORT");
	if (p.lease_ms && p.lease_ms < 4 * p.interval_ms)
		return usage_error("--lease has to be four times --interval at least");
	if (replicate && p.guest_opts.external_disks)
		return usage_error("--disk external and other disks exclude each other");
	if (!p.to)
		return usage_error("--to is missing: tcp:HOST:PORT of a standby, or a directory");
	if (kc_sink_check(p.to, &p.opts, &err))
		return usage_error(err.text);

	p.guest_opts.stopping = kc_disks_stopping;
	p.guest_opts.stopped = cut;
	p.disks.cut_end = &p.disks.cut;
	p.disks.kept_end = &p.disks.kept;
	kc_core_without_memory();
	if (kc_wake_fd() < 0) {
		kc_log(KC_LOG_ERROR, "cannot make an eventfd: %s", strerror(errno));
		return 1;
	}
	p.tty = isatty(1) && !p.json;
	kc_log_may_lose = true;
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGINT, &sa, NULL);
	/* Its terminal was closed; under nohup that is nothing */
	if (!sigaction(SIGHUP, NULL, &old) && old.sa_handler != SIG_IGN)
		sigaction(SIGHUP, &sa, NULL);
	signal(SIGPIPE, SIG_IGN);

	/* Before there are threads, and the guest's memory */
	p.disks.guard = -1;
	if (!p.guest_opts.external_disks && p.guest_opts.pause_limit_ms) {
		p.disks.guard = nbd_guard_start(p.guest_opts.pause_limit_ms, &err);
		if (p.disks.guard < 0) {
			kc_log(KC_LOG_ERROR, "%s", err.text);
			return 1;
		}
	}
	p.status = kc_status_new("protect", "");
	if (!p.status) {
		kc_log(KC_LOG_ERROR, "no memory");
		return 1;
	}
	if (p.control) {
		ctl = kc_ctl_start(p.control, p.status, on_command, &p, &err);
		if (!ctl) {
			kc_log(KC_LOG_ERROR, "%s", err.text);
			return 1;
		}
	}
	status = protect(&p);
	kc_sent_forget(&p);
	kc_ctl_stop(ctl);
	guest_close(&p.guest);
	kc_disks_free(&p);
	if (p.disks.guard >= 0)
		close(p.disks.guard);
	free(p.epoch.copy.pages);
	free(p.epoch.copy.holes);
	free(p.epoch.copy.dropped);
	free(p.epoch.state);
	kc_status_free(p.status);
	return status;
}
