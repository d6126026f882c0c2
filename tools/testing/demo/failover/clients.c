// SPDX-License-Identifier: GPL-2.0-only
/*
 * The guest with a database: its network, its disk, and its clients outside.
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
#include "clients.h"

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
	if (fd < 0 || ftruncate(fd, LEDGER_MB << 20) || close(fd))
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

struct client clients[CLIENTS];
static atomic_bool clients_end;
/* Others each time, as nobody knows where those before were interrupted */
static int nr_before;

FILE *ledger_open(void)
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
bool ledger_say(FILE *f, char *line, size_t size, const char *fmt, ...)
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
		if (!ledger_say(c->f, line, sizeof(line), "put %d %ld\n", c->nr, nr) || strcmp(line, want)) {
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

bool ledger_connect(void)
{
	int i;

	clients_end = false;
	for (i = 0; i < CLIENTS; i++) {
		struct client *c = &clients[i];

		*c = (struct client){ .nr = nr_before + i + 1 };
		c->f = ledger_open();
		if (!c->f)
			return fail("cannot connect to the guest: %s", strerror(errno));
		if (pthread_create(&c->thread, NULL, client_thread, c))
			fatal("pthread_create");
	}
	return true;
}


void ledger_disconnect(void)
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
bool ledger_goes_on(const long told[CLIENTS])
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
bool ledger_check(const long told[CLIENTS], long *lost)
{
	char line[200] = "";
	FILE *f = ledger_open();
	int i, nr;
	long count, different, last;
	bool ok = f;

	*lost = 0;
	for (i = 0; ok && i < CLIENTS; i++) {
		ok = ledger_say(f, line, sizeof(line), "have %d\n", clients[i].nr) &&
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
		ok = ledger_say(f, line, sizeof(line), "check\n") && !strcmp(line, "check ok\n");
		if (!ok)
			fail("the database says: %s", line);
	} else {
		fail("the database does not answer: %s", line);
	}
	if (f)
		fclose(f);
	return ok;
}

void ledger_told(long told[CLIENTS])
{
	int i;

	for (i = 0; i < CLIENTS; i++)
		told[i] = clients[i].told;
}

bool ledger_check_disk(void)
{
	bool ok = qmp(&vm, "stop");

	ok = ok && check_image(vm.gen);
	return qmp(&vm, "cont") && ok;
}

void ledger_end(void)
{
	leave(&vm);
	remove_ram(vm.ram);
	kill_now(&standby, true);
	guest_has_ledger = false;
}

bool ledger_boot(void)
{
	if (!if_nametoindex(BRIDGE) &&
	    (ioctl(any_socket(), SIOCBRADDBR, BRIDGE) || !bring_up(BRIDGE, LEDGER_HOST) ||
	     !bring_up("lo", "127.0.0.1")))
		fatal("a bridge");
	ledger_end();
	guest_has_ledger = true;
	return make_image(last_gen + 1) && boot(&vm);
}
