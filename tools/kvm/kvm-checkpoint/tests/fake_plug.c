// SPDX-License-Identifier: GPL-2.0-only
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netlink/socket.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "net_plug.h"
#include "tests/fake_plug.h"

#define TAP	7

int __real_kc_plug_connect(struct nl_sock **sk, struct kc_err *err);
int __real_kc_plug_find(struct nl_sock *sk, const char *ifname, const char *mac, struct kc_plug *p,
			struct kc_err *err);
int __real_kc_plug_add(struct nl_sock *sk, struct kc_plug *p, struct kc_err *err);
int __real_kc_plug_mark(struct nl_sock *sk, const struct kc_plug *p, struct kc_err *err);
int __real_kc_plug_release(struct nl_sock *sk, struct kc_plug *p, struct kc_err *err);
int __real_kc_plug_remove(struct nl_sock *sk, struct kc_plug *p, bool drop, struct kc_err *err);
int __wrap_kc_plug_connect(struct nl_sock **sk, struct kc_err *err);
int __wrap_kc_plug_find(struct nl_sock *sk, const char *ifname, const char *mac, struct kc_plug *p,
			struct kc_err *err);
int __wrap_kc_plug_add(struct nl_sock *sk, struct kc_plug *p, struct kc_err *err);
int __wrap_kc_plug_mark(struct nl_sock *sk, const struct kc_plug *p, struct kc_err *err);
int __wrap_kc_plug_release(struct nl_sock *sk, struct kc_plug *p, struct kc_err *err);
int __wrap_kc_plug_remove(struct nl_sock *sk, struct kc_plug *p, bool drop, struct kc_err *err);

static volatile struct fake_plug *fake(void)
{
	static struct fake_plug *f;
	int fd;

	if (f || !getenv(FAKE_PLUG))
		return f;
	fd = open(getenv(FAKE_PLUG), O_RDWR | O_CLOEXEC);
	f = mmap(NULL, sizeof(*f), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (f == MAP_FAILED)
		abort();
	close(fd);
	return f;
}

static void look(struct kc_plug *p)
{
	unsigned int i;

	p->nr_ifbs = 0;
	for (i = fake()->first; i < fake()->next && p->nr_ifbs < KC_MAX_IFBS; i++)
		p->ifbs[p->nr_ifbs++] = (struct kc_ifb){ .nr = i, .index = i };
}

int __wrap_kc_plug_connect(struct nl_sock **sk, struct kc_err *err)
{
	if (!fake())
		return __real_kc_plug_connect(sk, err);
	*sk = nl_socket_alloc();
	return *sk ? 0 : -ENOMEM;
}

int __wrap_kc_plug_find(struct nl_sock *sk, const char *ifname, const char *mac, struct kc_plug *p,
			struct kc_err *err)
{
	if (!fake())
		return __real_kc_plug_find(sk, ifname, mac, p, err);
	*p = (struct kc_plug){ .tap = TAP, .newest = UINT_MAX };
	look(p);
	return 0;
}

int __wrap_kc_plug_add(struct nl_sock *sk, struct kc_plug *p, struct kc_err *err)
{
	int error;

	if (!fake())
		return __real_kc_plug_add(sk, p, err);
	error = fake()->add_fails;
	fake()->add_fails = 0;
	if (error)
		return kc_fail(err, error, "the kernel is told to");
	p->newest = fake()->next++;
	fake()->adds++;
	/* What was held by the one before leaves before anything that is marked here */
	fake()->has_mark = false;
	look(p);
	return 0;
}

int __wrap_kc_plug_mark(struct nl_sock *sk, const struct kc_plug *p, struct kc_err *err)
{
	int error;

	if (!fake())
		return __real_kc_plug_mark(sk, p, err);
	error = fake()->mark_fails;
	fake()->mark_fails = 0;
	if (error)
		return kc_fail(err, error, "the kernel is told to");
	if (fake()->has_mark || p->newest + 1 != fake()->next)
		fake()->misused = true;
	fake()->has_mark = true;
	fake()->marked = fake()->sent;
	return 0;
}

int __wrap_kc_plug_release(struct nl_sock *sk, struct kc_plug *p, struct kc_err *err)
{
	if (!fake())
		return __real_kc_plug_release(sk, p, err);
	if (!fake()->has_mark || p->newest + 1 != fake()->next)
		fake()->misused = true;
	fake()->has_mark = false;
	fake()->first = p->newest;
	fake()->left = fake()->marked;
	fake()->releases++;
	return 0;
}

int __wrap_kc_plug_remove(struct nl_sock *sk, struct kc_plug *p, bool drop, struct kc_err *err)
{
	int error;

	if (!fake())
		return __real_kc_plug_remove(sk, p, drop, err);
	error = fake()->remove_fails;
	fake()->remove_fails = 0;
	if (error)
		return kc_fail(err, error, "the kernel is told to");
	if (p->tap != TAP)
		fake()->misused = true;
	usleep(fake()->remove_ms * 1000);
	if (p->newest >= fake()->next) {
		fake()->first = fake()->next;
	} else if (p->newest >= fake()->first) {
		fake()->first = p->newest + 1;
	}
	if (fake()->first == fake()->next) {
		fake()->left = drop ? fake()->left : fake()->sent;
		fake()->has_mark = false;
		fake()->first = 0;
		fake()->next = 0;
	}
	/* Last: a test waits for it */
	if (drop)
		fake()->dropped++;
	else
		fake()->removed++;
	return 0;
}
