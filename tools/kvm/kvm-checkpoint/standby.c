// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint standby: receives epochs, and goes on with the guest when the primary is gone.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "peer.h"
#include "standby.h"
#include "wake.h"

#define RETRY_MS 5000u
#define MAX_SLEEP_US 1000000ull
/* Nobody is late by so much for want of CPU alone, and uses none of it */
#define STOPPED_US 500000ull

static char *command(void *ctx, const char *line, bool *ok)
{
	bool anyway = !strcmp(line, "promote-anyway");
	struct standby *sb = ctx;
	struct kc_err err;
	const char *text;
	int rc;

	*ok = false;
	pthread_mutex_lock(&sb->lock);
	rc = kc_check_epoch(sb, &err);
	if (strcmp(line, "promote") && !anyway) {
		text = "unknown command; there are: status, promote, promote-anyway";
	} else if (sb->mode != SERVING) {
		text = "it is failing over or has done so";
	} else if (rc && (rc != -ESTALE || !anyway)) {
		text = err.text;
	} else {
		sb->promote = "told to";
		sb->anyway = anyway;
		text = "failing over";
		*ok = true;
	}
	pthread_mutex_unlock(&sb->lock);
	return strdup(text);
}

/*
 * How long the primary has been silent: in full, whatever else goes on here.  But when this host
 * was suspended or this process stopped, it is not the primary who was silent.
 */
struct silence {
	uint64_t since_us;	/* nothing before that counts */
	uint64_t looked_us, cpu_us, plan_us;
};

static uint64_t cpu_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
	return (uint64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

/* A process that is frozen is not told so; one that is busy with something takes the CPU. */
static void notice_stop(struct silence *q)
{
	uint64_t now = kc_now_us(), cpu = cpu_us(), late = now - q->looked_us;

	late = late > q->plan_us ? late - q->plan_us : 0;
	if (late > STOPPED_US && cpu - q->cpu_us < late / 20)
		q->since_us = now;
	q->looked_us = now;
	q->cpu_us = cpu;
}

/*
 * When we are at work for the primary, such as to try to load an epoch, nobody reads what it sends.
 * But its packets are seen.
 */
static uint64_t packet_us(const struct session *s, uint64_t now)
{
	struct tcp_info info = { .tcpi_last_data_recv = 0 };
	socklen_t len = sizeof(info);
	uint64_t ms;

	if (getsockopt(s->fd, IPPROTO_TCP, TCP_INFO, &info, &len))
		return now;
	ms = info.tcpi_last_data_recv < info.tcpi_last_ack_recv ? info.tcpi_last_data_recv :
								  info.tcpi_last_ack_recv;
	return now - ms * 1000;
}

static uint64_t silent_us(struct standby *sb, const struct silence *q)
{
	uint64_t now = kc_now_us(), heard;

	pthread_mutex_lock(&sb->lock);
	heard = sb->heard_us;
	if (sb->active && sb->active->io)
		heard = sb->active->busy ? packet_us(sb->active, now) :
					   kc_io_heard_us(sb->active->io);
	pthread_mutex_unlock(&sb->lock);
	if (heard < q->since_us)
		heard = q->since_us;
	return now > heard ? now - heard : 0;
}

static bool may_be_missed(struct standby *sb)
{
	bool armed;

	pthread_mutex_lock(&sb->lock);
	armed = sb->armed;
	pthread_mutex_unlock(&sb->lock);
	return armed && sb->timeout_ms && kc_ram_counts(sb->ram);
}

/* Until something may have to be done that nothing wakes us for */
static int plan_ms(struct standby *sb, struct silence *q, uint64_t not_before_us)
{
	uint64_t us = MAX_SLEEP_US, silent, now = kc_now_us();

	if (sb->timeout_ms) {
		silent = silent_us(sb, q);
		/* It may fall silent at any moment, and be at work until then. */
		us = sb->timeout_ms * 1000ull;
		us = silent >= us ? us : us - silent;
	}
	if (us > MAX_SLEEP_US)
		us = MAX_SLEEP_US;
	if (sb->guest_died && not_before_us > now && us > not_before_us - now)
		us = not_before_us - now;
	q->plan_us = us;
	return (us + 999) / 1000;
}

/*
 * After taking over: as long as QEMU lives, and whoever was the primary is told.  QEMU's status.
 */
static int attend(struct standby *sb, pid_t pid, int listener, int signals)
{
	struct pollfd p[2] = {
		{ .fd = listener, .events = POLLIN }, { .fd = signals, .events = POLLIN },
	};
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
		/* QEMU's end is a signal, too. */
		if (poll(p, 2, -1) <= 0)
			continue;
		if (p[0].revents)
			kc_session_take(sb, listener);
		while (read(signals, &si, sizeof(si)) == sizeof(si)) {
			if (si.ssi_signo == SIGCHLD || si.ssi_signo == SIGCONT)
				continue;
			kc_log(KC_LOG_INFO, "leaving QEMU (process %d) alone", pid);
			return 0;
		}
	}
}

static int serve(struct standby *sb, int listener, int signals)
{
	struct pollfd p[3] = {
		{ .fd = listener, .events = POLLIN }, { .fd = signals, .events = POLLIN },
		{ .fd = kc_wake_fd(), .events = POLLIN },
	};
	struct silence q = { .looked_us = kc_now_us(), .since_us = kc_now_us() };
	uint64_t not_before_us = 0, silent;
	struct signalfd_siginfo si;
	char reason[80];
	struct kc_err err;
	const char *why;
	pid_t pid;
	int rc;

	for (;;) {
		if (poll(p, 3, plan_ms(sb, &q, not_before_us)) < 0 && errno != EINTR)
			return 1;
		notice_stop(&q);
		kc_wake_clear();
		if (p[0].revents)
			kc_session_take(sb, listener);
		kc_session_tell(sb);
		while (read(signals, &si, sizeof(si)) == sizeof(si)) {
			if (si.ssi_signo == SIGCONT) {
				q.since_us = kc_now_us();
			} else if (si.ssi_signo != SIGCHLD) {
				kc_log(KC_LOG_INFO, "stopped; last complete epoch %" PRIu64,
				       kc_ram_epoch(sb->ram));
				kc_session_stop_all(sb, STOPPING);
				return 0;
			}
		}
		pthread_mutex_lock(&sb->lock);
		why = sb->switches ? "the primary hands it over" : sb->promote;
		if (!why && sb->guest_died && !sb->no_failover && kc_now_us() >= not_before_us)
			why = "the primary's guest died";
		pthread_mutex_unlock(&sb->lock);
		silent = silent_us(sb, &q);
		if (!why && may_be_missed(sb) && silent >= sb->timeout_ms * 1000ull) {
			snprintf(reason, sizeof(reason),
				 "the primary has been silent for %" PRIu64 " ms", silent / 1000);
			why = reason;
		}
		if (!why)
			continue;
		rc = kc_take_over(sb, why, &pid, &err);
		if (!rc) {
			kc_session_stop_all(sb, TAKEN_OVER);
			if (pid)
				rc = attend(sb, pid, listener, signals);
			else
				kc_print_checkpoint(sb);
			close(listener);
			kc_session_stop_all(sb, STOPPING);
			return rc;
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
		sb->switches = false;
		sb->why_not = err;
		pthread_cond_broadcast(&sb->changed);
		pthread_mutex_unlock(&sb->lock);
		q = (struct silence){ .looked_us = kc_now_us(), .since_us = kc_now_us(),
				      .cpu_us = cpu_us() };
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
		"  --disk PATH           image of a disk of the guest, raw or a block device, for {diskN}\n"
		"                        in QEMU's command; once for each disk, in their order\n"
		"  --durable             force each epoch to the disk of --ram-dir\n"
		"  --keep-memory         all of the guest's memory stays allocated here, also what it\n"
		"                        gives back to its host (a balloon)\n"
		"  --timeout TIME        fail over if the primary is silent for so long (default 5s,\n"
		"                        0: only when told to)\n"
		"  --no-failover         only when told to, also if the primary says that its guest died\n"
		"  --failover-after-restart AGE\n"
		"                        a restarted standby fails over to an epoch that is not\n"
		"                        older, also if no primary was heard since the restart\n"
		"                        (default 0: never)\n"
		"  --fence COMMAND       must have succeeded before QEMU is started: it makes sure\n"
		"                        that the primary is dead\n"
		"  --no-fence            something else makes sure of that\n"
		"  --fence-timeout TIME  for that command (default 30s)\n"
		"  --exec COMMAND        QEMU's command in one argument, split at blanks, quotes as in\n"
		"                        a shell, but no shell; or as arguments after \"--\"\n"
		"  --bare-exec           add nothing to it: it loads {state} by itself\n"
		"  --capability NAME     migration capability to set before the state is loaded\n"
		"  --no-trial            do not try to load the guest's state before it is needed\n"
		"  --load-timeout TIME   for QEMU to have loaded the state (default 30s)\n"
		"  --control PATH        unix socket for status, promote, promote-anyway\n"
		"  --psk-file FILE, --psk-identity NAME, --insecure, --io-timeout TIME\n"
		"                        as for protect\n"
		"  --json                messages as JSON\n"
		"\n"
		"In QEMU's command are replaced: {ramN} or {ram:NAME} by the path of a block of RAM,\n"
		"{sizeN} by its size, {diskN} by the path of an image, {state} by that of the device\n"
		"state, {epoch} by its number.\n"
		"Without a command, prints these and ends.\n");
}

/* What is needed when it is too late to mend it is looked at now: -1, or the exit status. */
static int check(const struct standby *sb)
{
	struct kc_launch l = { .argv = sb->exec };
	struct kc_err err;

	if (sb->fence && kc_can_run(sb->fence[0], &err)) {
		kc_log(KC_LOG_ERROR, "--fence: %s", err.text);
		return 2;
	}
	if (!sb->exec)
		return -1;
	if (kc_launch_check(&l, &err) || kc_can_run(sb->exec[0], &err)) {
		kc_log(KC_LOG_ERROR, "%s", err.text);
		return 2;
	}
	if (!sb->bare && !kc_launch_has_ram(&l)) {
		kc_log(KC_LOG_ERROR, "QEMU's command has no {ramN} or {ram:NAME} in it: the guest would go on without its memory; give it -object memory-backend-file,id=ram0,size={size0},share=on,mem-path={ram0}");
		return 2;
	}
	return -1;
}

static int parse(struct standby *sb, int argc, char **argv)
{
	static const struct option options[] = {
		{ "listen", 1, NULL, 'l' },
		{ "ram-dir", 1, NULL, 'r' },
		{ "durable", 0, NULL, 'd' },
		{ "keep-memory", 0, NULL, 'K' },
		{ "disk", 1, NULL, 'D' },
		{ "timeout", 1, NULL, 't' },
		{ "no-failover", 0, NULL, 'n' },
		{ "failover-after-restart", 1, NULL, 'a' },
		{ "fence", 1, NULL, 'f' },
		{ "no-fence", 0, NULL, 'F' },
		{ "fence-timeout", 1, NULL, 'T' },
		{ "exec", 1, NULL, 'e' },
		{ "bare-exec", 0, NULL, 'b' },
		{ "capability", 1, NULL, 'C' },
		{ "no-trial", 0, NULL, 'N' },
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
		case 'K':
			sb->keep_memory = true;
			break;
		case 'D':
			ok = sb->nr_disks < KC_MAX_DISKS && *optarg;
			if (ok)
				sb->disks[sb->nr_disks++] = optarg;
			break;
		case 't':
			ok = !kc_parse_ms(optarg, &sb->timeout_ms);
			break;
		case 'n':
			sb->no_failover = true;
			break;
		case 'a':
			ok = !kc_parse_ms(optarg, &sb->restart_age_ms);
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
		case 'N':
			sb->no_trial = true;
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
			fprintf(stderr, "Try: kvm-checkpoint standby --help\n");
			return 2;
		}
		if (!ok) {
			kc_log(KC_LOG_ERROR, "--%s does not take %s", options[index].name, optarg);
			return 2;
		}
	}
	if (sb->no_failover)
		sb->timeout_ms = 0;
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
	if (kc_check_peer(sb->listen, true, &sb->opts, &err)) {
		kc_log(KC_LOG_ERROR, "%s", err.text);
		return 2;
	}
	return check(sb);
}

/* An epoch of an earlier run is there: may silence of who made it be taken for death? */
static void look_at_stored(struct standby *sb)
{
	uint64_t age = kc_ram_age_ms(sb->ram);
	struct kc_err err;

	if (!kc_ram_epoch(sb->ram) || (kc_ram_flags(sb->ram) & KC_RAM_ENDED))
		return;
	if (!kc_ram_counts(sb->ram)) {
		kc_check_epoch(sb, &err);
		kc_log(KC_LOG_WARN, "%s", err.text);
		return;
	}
	sb->armed = sb->restart_age_ms && age <= sb->restart_age_ms;
	if (sb->armed && sb->timeout_ms)
		kc_log(KC_LOG_INFO,
		       "epoch %" PRIu64 " is %" PRIu64 " s old: failing over to it if no primary comes",
		       kc_ram_epoch(sb->ram), age / 1000);
	else if (age == UINT64_MAX)
		kc_log(KC_LOG_WARN,
		       "epoch %" PRIu64 " is of a time that is yet to come: this host's clock was set back; it is not failed over to before a primary was heard, unless told to",
		       kc_ram_epoch(sb->ram));
	else
		kc_log(KC_LOG_INFO,
		       "epoch %" PRIu64 " is %" PRIu64 " s old: it is not failed over to before a primary was heard, unless told to",
		       kc_ram_epoch(sb->ram), age / 1000);
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
	sigaddset(&set, SIGCONT);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);

	sb.status = kc_status_new("standby", "");
	if (signals < 0 || kc_wake_fd() < 0 || !sb.status ||
	    kc_ram_open(sb.ram_dir, sb.durable, &sb.ram, &err)) {
		kc_log(KC_LOG_ERROR, "%s", err.text[0] ? err.text : "out of memory");
		goto out;
	}
	if (sb.keep_memory && kc_ram_keep_memory(sb.ram, &err)) {
		kc_log(KC_LOG_ERROR, "%s", err.text);
		goto out;
	}
	g = kc_ram_guest(sb.ram);
	if (kc_ram_flags(sb.ram) & KC_RAM_TAKEN_OVER) {
		kc_log(KC_LOG_ERROR, "the guest in %s was taken over, its files are no checkpoint any more: when it needs them no more, remove %s",
		       sb.ram_dir, sb.ram_dir);
		goto out;
	}
	if (kc_ram_set_disks(sb.ram, sb.disks, sb.nr_disks, &err)) {
		kc_log(KC_LOG_ERROR, "%s", err.text);
		goto out;
	}
	kc_ready_init(&sb);
	sb.heard_us = sb.told_us = kc_now_us();
	listener = kc_io_listen(sb.listen, &sb.opts, &err);
	if (listener < 0) {
		kc_log(KC_LOG_ERROR, "%s", err.text);
		goto out;
	}
	/* Who says nothing does not even get here. */
	setsockopt(listener, IPPROTO_TCP, TCP_DEFER_ACCEPT, &(int){ 1 }, sizeof(int));
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
	look_at_stored(&sb);
	kc_log(KC_LOG_INFO, "listening on %s%s; last complete epoch %" PRIu64, sb.listen,
	       sb.opts.insecure ? " without encryption" : "", kc_ram_epoch(sb.ram));
	rc = serve(&sb, listener, signals);
	kc_ready_stop(&sb);
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
