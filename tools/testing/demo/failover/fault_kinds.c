// SPDX-License-Identifier: GPL-2.0-only
/*
 * What goes half wrong: links, daemons, disks, clocks.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "faults.h"

static bool cut_link(struct fault *f)
{
	unsigned int cuts = relay_cuts();
	uint64_t until = now_us() + SYNC_TIMEOUT * 1000000ull;

	(void)f;
	relay_cut(random_from(1, 200000));
	while (relay_cuts() == cuts && now_us() < until &&
	       !standby_said(&x, "taken over at epoch"))
		usleep(5000);
	return relay_cuts() != cuts || standby_said(&x, "taken over at epoch") ||
	       fail("nothing went over the link");
}

static bool nothing(struct fault *f)
{
	(void)f;
	return true;
}

static bool stop_link(struct fault *f)
{
	(void)f;
	relay_set(random_from(0, 1) ? LINK_REFUSES : LINK_SWALLOWS);
	return true;
}

static bool link_back(struct fault *f)
{
	bool ok = f->kind->outcome == STAYS || wait_taken_over(&x);

	relay_set(LINK_PASSES);
	return ok;
}

static bool kill_daemon(struct fault *f)
{
	(void)f;
	kill_protect(&x.protect);
	return true;
}

static bool daemon_back(struct fault *f)
{
	if (!f->killed)
		start_protect(&x.protect, &vm, &x, "50ms", 0);
	return true;
}

static bool kill_standby(struct fault *f)
{
	(void)f;
	kill_now(&x.standby, true);
	return true;
}

static bool standby_back(struct fault *f)
{
	/* Or it would hear that the guest died */
	if (f->killed) {
		wait_protect(&x.protect);
		f->unheard = true;
	}
	x.standby = start_standby(&x);
	return true;
}

/* It comes again when there is nobody to be heard */
static bool restart_standby(struct fault *f)
{
	(void)f;
	kill_protect(&x.protect);
	kill(x.standby, SIGTERM);
	waitpid(x.standby, NULL, 0);
	x.standby = start_standby(&x);
	return true;
}

static bool restarted(struct fault *f)
{
	f->unheard = f->killed;
	if (standby_said(&x, "taken over at epoch"))
		return fail("a standby that was restarted took over without having heard a primary");
	return daemon_back(f);
}

static bool stop_daemon(struct fault *f)
{
	(void)f;
	kill(x.protect.pid, SIGSTOP);
	return true;
}

static bool continue_daemon(struct fault *f)
{
	bool ok = f->kind->outcome == STAYS || wait_taken_over(&x);

	if (x.protect.pid)
		kill(x.protect.pid, SIGCONT);
	return ok;
}

static bool stop_standby(struct fault *f)
{
	(void)f;
	kill(x.standby, SIGSTOP);
	return true;
}

static bool continue_standby(struct fault *f)
{
	(void)f;
	kill(x.standby, SIGCONT);
	return true;
}

static bool stop_emulator(struct fault *f)
{
	(void)f;
	kill(vm.pid, SIGSTOP);
	return true;
}

static bool continue_emulator(struct fault *f)
{
	if (!f->killed)
		kill(vm.pid, SIGCONT);
	return true;
}

static bool fill_standby(struct fault *f)
{
	char dir[64];

	(void)f;
	snprintf(dir, sizeof(dir), "/dev/shm/standby-%u", x.gen);
	return fill_disk(dir, true) || fail("the disk is not full");
}

static bool free_standby(struct fault *f)
{
	char dir[64];

	(void)f;
	snprintf(dir, sizeof(dir), "/dev/shm/standby-%u", x.gen);
	return fill_disk(dir, false) || fail("the disk stays full");
}

static void jump(int seconds)
{
	struct timespec ts;

	clock_gettime(CLOCK_REALTIME, &ts);
	ts.tv_sec += seconds;
	if (clock_settime(CLOCK_REALTIME, &ts))
		fatal("clock_settime");
}

static int jumped;

static bool clock_forth(struct fault *f)
{
	(void)f;
	jumped = random_from(10, 100000);
	if (random_from(0, 1))
		jumped = -jumped;
	jump(jumped);
	return true;
}

static bool clock_back(struct fault *f)
{
	(void)f;
	jump(-2 * jumped);
	sleep_ms(random_from(0, 300));
	jump(jumped);
	return true;
}

static atomic_bool flooding;
static pthread_t flooder;

/* Connections that say nothing, or nonsense, or half a greeting, and some that stay */
static void *flood(void *arg)
{
	int fds[96], n = 0, i;
	char junk[64];

	(void)arg;
	memset(fds, -1, sizeof(fds));
	while (flooding) {
		i = n++ % ARRAY_SIZE(fds);
		if (fds[i] >= 0)
			close(fds[i]);
		fds[i] = tcp_socket(x.port, false);
		memset(junk, n, sizeof(junk));
		if (fds[i] >= 0 && n % 3)
			send(fds[i], junk, n % sizeof(junk), MSG_NOSIGNAL | MSG_DONTWAIT);
		usleep(2000);
	}
	for (i = 0; i < (int)ARRAY_SIZE(fds); i++) {
		if (fds[i] >= 0)
			close(fds[i]);
	}
	return NULL;
}

static bool begin_flood(struct fault *f)
{
	(void)f;
	flooding = true;
	if (pthread_create(&flooder, NULL, flood, NULL))
		fatal("pthread_create");
	return true;
}

static bool end_flood(struct fault *f)
{
	(void)f;
	flooding = false;
	pthread_join(flooder, NULL);
	return true;
}

const struct fault_kind fault_kinds[] = {
	{ "cut", "the link cut in an epoch", STAYS, 0, 300, cut_link, nothing, NULL },
	{ "down", "the link down for a while", STAYS, 200, 1500, stop_link, link_back, NULL },
	{ "lost", "the link down for longer than the standby waits", MOVES, 0, TIMEOUT_MS,
	  stop_link, link_back, NULL },
	{ "daemon-killed", "protect killed and back", STAYS, 0, 800, kill_daemon, daemon_back,
	  NULL },
	{ "standby-killed", "the standby killed and back", STAYS, 0, 800, kill_standby,
	  standby_back, NULL },
	{ "restarted", "the standby restarted, and protect for longer than it waits", STAYS,
	  TIMEOUT_MS + 300, TIMEOUT_MS + 600, restart_standby, restarted, NULL },
	{ "daemon-stopped", "protect stopped for a while", STAYS, 200, 1500, stop_daemon,
	  continue_daemon, NULL },
	{ "daemon-frozen", "protect stopped for longer than the standby waits", MOVES, 0,
	  TIMEOUT_MS, stop_daemon, continue_daemon, NULL },
	{ "standby-stopped", "the standby stopped for a while", STAYS, 200, 1500, stop_standby,
	  continue_standby, NULL },
	{ "standby-frozen", "the standby stopped for longer than it waits", STAYS,
	  TIMEOUT_MS + 200, TIMEOUT_MS + 1000, stop_standby, continue_standby, NULL },
	{ "qemu-stopped", "QEMU stopped, perhaps for longer than the lease", STAYS, 200,
	  TIMEOUT_MS + 1000, stop_emulator, continue_emulator, NULL },
	{ "full", "the standby's disk full", STAYS, 300, 2000, fill_standby, free_standby, NULL },
	{ "directory-full", "the disk of a directory of epochs full", STAYS, 300, 1500, NULL, NULL,
	  full_directory },
	{ "clock", "the host's clock jumps", STAYS, 100, 800, clock_forth, clock_back, NULL },
	{ "flood", "a flood of connections", STAYS, 300, 2000, begin_flood, end_flood, NULL },
};

const unsigned int nr_fault_kinds = ARRAY_SIZE(fault_kinds);
