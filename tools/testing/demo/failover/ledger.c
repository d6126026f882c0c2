// SPDX-License-Identifier: GPL-2.0-only
/*
 * A database in the guest, and clients of it outside who remember what they were told.
 *
 * The guest's disk and what it sends belong to epochs: whoever was told that an entry is committed
 * finds it after each failover, nothing is there twice, and connections go on as if nothing had
 * happened.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "../ledger.h"
#include "failover.h"

#define IMAGE_MB	16
#define CLIENTS		3
#define BRIDGE		"ledger"

/* --- The network between guests and us ------------------------------------ */

static int any_socket(void)
{
	static int s = -1;

	if (s < 0)
		s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	return s;
}

void ledger_tap(unsigned int gen)
{
	struct ifreq r = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR }, b = { 0 };
	int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);

	snprintf(r.ifr_name, sizeof(r.ifr_name), "tap%u", gen);
	if (if_nametoindex(r.ifr_name)) {
		close(fd);
		return;
	}
	snprintf(b.ifr_name, sizeof(b.ifr_name), BRIDGE);
	if (fd < 0 || ioctl(fd, TUNSETIFF, &r) || ioctl(fd, TUNSETPERSIST, 1))
		fatal(r.ifr_name);
	b.ifr_ifindex = if_nametoindex(r.ifr_name);
	if (ioctl(any_socket(), SIOCBRADDIF, &b) || !bring_up(r.ifr_name, NULL))
		fatal(r.ifr_name);
	close(fd);
}

/* --- Its disk ------------------------------------------------------------- */

void ledger_image(unsigned int gen, char path[64])
{
	snprintf(path, 64, "/dev/shm/ledger-%u.img", gen);
}

static int run_tool(char **argv)
{
	int status;
	pid_t pid = start(argv, -1, "/tmp/ledger-tools.log");

	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		return -1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

static bool make_image(unsigned int gen)
{
	char path[64], *argv[] = { "/bin/mke2fs", "-q", "-F", "-t", "ext4", path, NULL };
	int fd;

	ledger_image(gen, path);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, IMAGE_MB << 20) || close(fd))
		fatal(path);
	if (run_tool(argv)) {
		show_file("/tmp/ledger-tools.log");
		return fail("cannot make a file system");
	}
	return true;
}

/* As it is now, with the guest stopped: after its journal was replayed nothing is wrong with it */
static bool check_image(unsigned int gen)
{
	char path[64], copy[] = "/dev/shm/ledger-copy.img";
	char *cp[] = { "/bin/cp", path, copy, NULL };
	char *replay[] = { "/bin/e2fsck", "-p", copy, NULL };
	char *check[] = { "/bin/e2fsck", "-f", "-n", copy, NULL };
	int rc;

	ledger_image(gen, path);
	rc = run_tool(cp);
	if (!rc) {
		/* 1: as there was something to replay */
		rc = run_tool(replay);
		rc = rc == 1 ? 0 : rc;
	}
	if (!rc)
		rc = run_tool(check);
	unlink(copy);
	if (!rc)
		return true;
	show_file("/tmp/ledger-tools.log");
	return fail("the file system is damaged");
}

/* --- Clients -------------------------------------------------------------- */

struct client {
	int nr;
	FILE *f;
	pthread_t thread;
	atomic_long told;		/* that it is committed, by the guest */
	atomic_bool broken;
	uint64_t sum_us, longest_us;
};

static struct client clients[CLIENTS];
static atomic_bool clients_end;
/* Others each time, as nobody knows where those before were interrupted */
static int nr_before;

static FILE *connect_guest(void)
{
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_port = htons(LEDGER_PORT) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;

	inet_pton(AF_INET, LEDGER_GUEST, &sin.sin_addr);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	if (connect(fd, (struct sockaddr *)&sin, sizeof(sin))) {
		close(fd);
		return NULL;
	}
	return fdopen(fd, "r");
}

__attribute__((format(printf, 4, 5)))
static bool say(FILE *f, char *line, size_t size, const char *fmt, ...)
{
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vdprintf(fileno(f), fmt, ap);
	va_end(ap);
	return n > 0 && fgets(line, size, f);
}

static void *client_thread(void *arg)
{
	struct client *c = arg;
	char line[200], want[64];
	uint64_t t;
	long nr;

	while (!clients_end) {
		nr = c->told + 1;
		snprintf(want, sizeof(want), "ok %d %ld\n", c->nr, nr);
		t = now_us();
		if (!say(c->f, line, sizeof(line), "put %d %ld\n", c->nr, nr) || strcmp(line, want)) {
			if (!clients_end)
				note("client %d: %s", c->nr, errno ? strerror(errno) : line);
			c->broken = true;
			break;
		}
		t = now_us() - t;
		c->sum_us += t;
		if (t > c->longest_us)
			c->longest_us = t;
		c->told = nr;
	}
	return NULL;
}

static bool start_clients(void)
{
	int i;

	clients_end = false;
	for (i = 0; i < CLIENTS; i++) {
		struct client *c = &clients[i];

		*c = (struct client){ .nr = nr_before + i + 1 };
		c->f = connect_guest();
		if (!c->f)
			return fail("cannot connect to the guest: %s", strerror(errno));
		if (pthread_create(&c->thread, NULL, client_thread, c))
			fatal("pthread_create");
	}
	return true;
}

static void end_clients(void)
{
	int i;

	clients_end = true;
	nr_before += CLIENTS;
	for (i = 0; i < CLIENTS; i++) {
		if (!clients[i].f)
			continue;
		shutdown(fileno(clients[i].f), SHUT_RDWR);
		pthread_join(clients[i].thread, NULL);
		fclose(clients[i].f);
		clients[i].f = NULL;
	}
}

/* Their connections go on */
static bool clients_go_on(const long told[CLIENTS])
{
	uint64_t until = now_us() + ANSWER_TIMEOUT * 1000000ull;
	int i;

	for (i = 0; i < CLIENTS; i++) {
		while (clients[i].told < told[i] + 3) {
			if (clients[i].broken)
				return fail("the connection of client %d is broken", clients[i].nr);
			if (now_us() > until)
				return fail("client %d does not get an answer", clients[i].nr);
			usleep(10000);
		}
	}
	return true;
}

/* All that they were told of is there, once; *@lost: or how many entries are not */
static bool check_ledger(const long told[CLIENTS], long *lost)
{
	char line[200] = "";
	FILE *f = connect_guest();
	int i, nr;
	long count, different, last;
	bool ok = f;

	*lost = 0;
	for (i = 0; ok && i < CLIENTS; i++) {
		ok = say(f, line, sizeof(line), "have %d\n", clients[i].nr) &&
		     sscanf(line, "have %d %ld %ld %ld", &nr, &count, &different, &last) == 4;
		if (!ok)
			break;
		if (count != different || different != last)
			ok = fail("client %d has %ld entries, %ld different ones, and %ld is the last",
				  nr, count, different, last);
		else if (last < told[i])
			*lost += told[i] - last;
	}
	if (ok && *lost) {
		note("%ld entries that were committed are not there", *lost);
		ok = false;
	} else if (ok) {
		ok = say(f, line, sizeof(line), "check\n") && !strcmp(line, "check ok\n");
		if (!ok)
			fail("the database says: %s", line);
	} else {
		fail("the database does not answer: %s", line);
	}
	if (f)
		fclose(f);
	return ok;
}

static void what_they_know(long told[CLIENTS])
{
	int i;

	for (i = 0; i < CLIENTS; i++)
		told[i] = clients[i].told;
}

static bool check_disk(void)
{
	bool ok = qmp(&vm, "stop");

	ok = ok && check_image(vm.gen);
	return qmp(&vm, "cont") && ok;
}

static bool one_kill(unsigned int n)
{
	long told[CLIENTS], lost;

	if (!kill_guest(n & 1))
		return false;
	/* What came in since then came from the guest at the standby, and is there as well */
	what_they_know(told);
	return clients_go_on(told) && check_ledger(told, &lost) && check_disk();
}

static void end_guest(void)
{
	leave(&vm);
	remove_ram(vm.ram);
	kill_now(&standby, true);
	guest_has_ledger = false;
}

static bool boot_ledger(void)
{
	if (!if_nametoindex(BRIDGE) &&
	    (ioctl(any_socket(), SIOCBRADDBR, BRIDGE) || !bring_up(BRIDGE, LEDGER_HOST) ||
	     !bring_up("lo", "127.0.0.1")))
		fatal("a bridge");
	end_guest();
	guest_has_ledger = true;
	return make_image(last_gen + 1) && boot(&vm);
}

/* Where nothing is held back, what clients were told is lost now and then */
bool test_ledger_control(unsigned int times)
{
	long told[CLIENTS], lost = 0;
	unsigned int n;
	bool ok = boot_ledger();

	net_option = "pass";
	/* So that there is something to lose */
	interval = "500ms";
	for (n = 0; ok && !lost && n < times; n++) {
		ok = start_clients() && kill_guest(n & 1);
		if (!ok)
			break;
		what_they_know(told);
		ok = check_ledger(told, &lost) || lost;
		end_clients();
	}
	net_option = NULL;
	interval = "50ms";
	end_guest();
	if (ok && !lost)
		return fail("with --net pass nothing was lost in %u kills: this test would not notice", n);
	if (ok)
		note("with --net pass %ld entries are lost at kill %u, as is to be expected", lost, n);
	return ok;
}

/* --- Epochs of a directory ------------------------------------------------- */

const char *wrong_disk;

static void remove_image(unsigned int gen)
{
	char path[64];

	ledger_image(gen, path);
	unlink(path);
}

/* Until so many more are there */
static bool wait_epochs(unsigned int n)
{
	uint64_t want = last_acked() + n;
	bool ok = true;

	while (ok && last_acked() < want)
		ok = watch_guest(&vm, 50);
	return ok;
}

/*
 * It goes on from an epoch of a directory, on the disk of that epoch: all is there that clients were
 * told of before the epoch was taken, nothing twice, and the file system is sound.
 */
static bool one_archive(uint64_t *epoch)
{
	unsigned int gen = ++last_gen, before = vm.gen;
	char dir[64], all[70], dead[64];
	struct pair x = { .timeout_ms = 0 };
	long told[CLIENTS], lost;
	uint64_t newest;
	struct protect p;
	bool ok;

	reset_log();
	snprintf(dir, sizeof(dir), "/dev/shm/standby-chain-%u", gen);
	chain = dir;
	start_protect(&p, &vm, &x, interval, 0);
	ok = wait_synced(&p, &vm, 1) && start_clients() && wait_epochs(10);
	what_they_know(told);
	/* The next two may have been taken already. */
	newest = last_acked();
	*epoch = newest + random_from(3, 7);
	ok = ok && wait_epochs(random_from(10, 20));
	leave(&vm);
	remove_ram(vm.ram);
	kill_now(&standby, true);
	wait_protect(&p);
	end_clients();
	if (wrong_disk) {
		ledger_image(before, dead);
		wrong_disk = dead;
	}
	ok = ok && go_on_from(gen, *epoch) && check_ledger(told, &lost) &&
	     (wrong_disk || check_disk());
	remove_image(before);
	chain = NULL;
	snprintf(all, sizeof(all), "%s/all", dir);
	remove_ram(all);
	return ok;
}

bool test_archives(unsigned int times)
{
	uint64_t epoch;
	unsigned int n;
	bool ok = boot_ledger();

	for (n = 0; ok && n < times; n++) {
		ok = one_archive(&epoch);
		if (ok)
			note("goes on from epoch %lu of a directory: memory, database and file system are sound",
			     epoch);
	}
	remove_image(vm.gen);
	end_guest();
	return ok;
}

/* The disk that the guest leaves behind when it dies is of another moment than its memory. */
bool test_archives_control(unsigned int times)
{
	uint64_t epoch;
	unsigned int n;
	bool ok = true;

	for (n = 0; ok && n < times; n++) {
		if (!boot_ledger())
			return false;
		wrong_disk = "";
		ok = one_archive(&epoch);
		wrong_disk = NULL;
		remove_image(vm.gen);
		end_guest();
	}
	if (ok)
		return fail("on the disk of a dead primary %u guests went on as if nothing was wrong", n);
	note("on the disk of a dead primary guest %u does not go on, as is to be expected", n);
	return true;
}

/* --- How long an answer takes ---------------------------------------------- */

static int compare_times(const void *a, const void *b)
{
	const uint64_t *x = a, *y = b;

	return (*x > *y) - (*x < *y);
}

/* Of a question that is not written to the disk; one after the other */
static bool ask_questions(unsigned int n, uint64_t *us)
{
	FILE *f = connect_guest();
	char line[200];
	unsigned int i;
	bool ok = f;

	for (i = 0; ok && i < n; i++) {
		us[i] = now_us();
		ok = say(f, line, sizeof(line), "have 1\n") && !strncmp(line, "have 1 ", 7);
		us[i] = now_us() - us[i];
	}
	if (f)
		fclose(f);
	qsort(us, i, sizeof(*us), compare_times);
	return ok || fail("the database does not answer");
}

/* Of the last epochs: how long the guest stood still, and from one to the next */
static void median_epoch(uint64_t *pause, uint64_t *every)
{
	uint64_t a[200], b[200], i, n = 0;

	pthread_mutex_lock(&log_.lock);
	for (i = log_.newest; i > 2 && n < ARRAY_SIZE(a); i--, n++) {
		a[n] = log_.epochs[i % MAX_EPOCHS].us[PAUSE];
		b[n] = log_.epochs[i % MAX_EPOCHS].taken_us -
		       log_.epochs[(i - 1) % MAX_EPOCHS].taken_us;
	}
	pthread_mutex_unlock(&log_.lock);
	qsort(a, n, sizeof(*a), compare_times);
	qsort(b, n, sizeof(*b), compare_times);
	/* Few tell nothing */
	*pause = n > 10 ? a[n / 2] : 0;
	*every = n > 10 ? b[n / 2] : 0;
}

bool test_latency(unsigned int n)
{
	static const char * const intervals[] = { "10ms", "25ms", "50ms", "100ms" };
	uint64_t *us = calloc(n, sizeof(*us)), pause, every;
	static const char * const ways[] = { "--net commit", "--packet-epochs", "--net pass" };
	unsigned int i;
	bool ok;

	ok = us && boot_ledger() && ask_questions(n, us);
	if (ok) {
		printf("TABLE\n%-26s %10s %10s %12s %12s\n", "us, a question's answer", "p50",
		       "p99", "pause p50", "epochs every");
		printf("%-26s %10lu %10lu\n", "not protected", us[n / 2], us[n * 99 / 100]);
	}
	for (i = 0; ok && i < 3 * ARRAY_SIZE(intervals); i++) {
		struct pair x = { .timeout_ms = 0, .safe = FENCE };
		char name[40];

		net_option = i % 3 == 2 ? "pass" : NULL;
		packet_epochs = i % 3 == 1;
		ok = begin_with(&x, intervals[i / 3]) && ask_questions(n, us);
		snprintf(name, sizeof(name), "%s, %s", intervals[i / 3], ways[i % 3]);
		median_epoch(&pause, &every);
		if (ok)
			printf("%-26s %10lu %10lu %12lu %12lu\n", name, us[n / 2],
			       us[n * 99 / 100], pause, every);
		end(&x);
	}
	net_option = NULL;
	packet_epochs = false;
	if (ok)
		printf("END\n");
	free(us);
	end_guest();
	return ok;
}

bool test_ledger(unsigned int times)
{
	uint64_t began, sum = 0, longest = 0;
	long entries = 0;
	unsigned int n;
	bool ok;
	int i;

	ok = boot_ledger() && start_clients();
	began = now_us();
	for (n = 0; ok && n < times; n++)
		ok = one_kill(n);
	for (i = 0; i < CLIENTS; i++) {
		entries += clients[i].told;
		sum += clients[i].sum_us;
		if (clients[i].longest_us > longest)
			longest = clients[i].longest_us;
	}
	if (ok)
		note("%u kills: %ld entries by %d clients, %.1f s each, no one lost, none twice; an answer after %.1f ms on average, %.1f s at most",
		     n, entries, CLIENTS, (now_us() - began) / 1e6 / n, sum / 1e3 / (entries ? entries : 1),
		     longest / 1e6);
	end_clients();
	end_guest();
	return ok;
}
