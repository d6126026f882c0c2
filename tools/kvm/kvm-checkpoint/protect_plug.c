// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint protect: what the guest sends and QEMU cannot hold back, as it does not come by
 * there: that of tap devices with vhost or with several queues.  The kernel does: see net_plug.h.
 *
 * The mark of an epoch is made in its pause.  The guest stands still then, and vhost was stopped
 * when it was: what it had taken from its rings by then the tap device has got, and so the plug.  A
 * packet that came later, by another CPU's backlog, would leave with the next epoch.  There is one
 * mark, so an epoch that is taken while that is not acknowledged has none, and what was sent since
 * leaves with the next one that has.  If an epoch comes to nothing its mark is the next one's: what
 * was sent before it is in that, too.
 *
 * When all is to be let go, or dropped, QEMU knows, also if this process is dead: it tells a guard,
 * see net_unplug.c.
 */
#include <errno.h>
#include <fcntl.h>
#include <netlink/socket.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "process.h"
#include "protect.h"

/* Who has been told its word has some packets to send, and devices to remove */
#define GUARD_MS	20000u

static void disconnect(struct plugs *plugs)
{
	if (plugs->sk)
		nl_socket_free(plugs->sk);
	plugs->sk = NULL;
	plugs->nr = 0;
	plugs->marked = false;
	plugs->marked_for = 0;
	plugs->behind = false;
	plugs->failed = 0;
}

/* It has been told.  The standby hears of us meanwhile: the kernel may take its time. */
static void reap(struct protect *p)
{
	uint64_t until = kc_now_us() + GUARD_MS * 1000ull;
	pid_t guard = p->plugs.guard, ended = guard;
	int status = 0;

	while (guard > 0 && !(ended = waitpid(guard, &status, WNOHANG)) && kc_now_us() <= until) {
		poll(NULL, 0, 1);
		kc_link_tick(p);
	}
	if (!ended && guard)
		p->plugs.stray = guard;
	if (guard && (!ended || status))
		kc_log(KC_LOG_WARN,
		       "packets may be held back still: see to it by kvm-checkpoint unplug");
	p->plugs.guard = 0;
}

/* QEMU was told that nothing is held, or was not: then it tells the guard later */
static void let_go(struct protect *p)
{
	if (!guest_release(&p->guest, 0, false, NULL))
		reap(p);
	disconnect(&p->plugs);
}

/* With this on, guest memory that a packet has is not copied when it is sent, but when it leaves */
static bool shares_memory(void)
{
	FILE *f = fopen("/sys/module/vhost_net/parameters/experimental_zcopytx", "re");
	int c = f ? fgetc(f) : EOF;

	if (f)
		fclose(f);
	return c != EOF && c != '0';
}

static int refuse(const struct guest_tap *tap, const struct kc_err *why, struct kc_err *err)
{
	return kc_fail(err, EOPNOTSUPP,
		       "packets of network card %s (tap device %s) cannot be held back: by QEMU as %s; by the kernel as %s",
		       tap->card, tap->ifname, tap->why, why->text);
}

static int find(struct plugs *plugs, const struct guest_tap *tap, struct kc_err *err)
{
	struct kc_plug *plug = &plugs->taps[plugs->nr];
	struct kc_err why;
	int rc;

	if (shares_memory())
		rc = kc_fail(&why, EOPNOTSUPP, "the module vhost_net has experimental_zcopytx=1");
	else
		rc = kc_plug_find(plugs->sk, tap->ifname, tap->mac, plug, &why);
	if (rc)
		return refuse(tap, &why, err);
	plugs->nr++;
	/* What there is of it, and what is about to be */
	plug->newest = plug->nr_ifbs ? plug->ifbs[plug->nr_ifbs - 1].nr + 1 : 0;
	return 0;
}

static int start_guard(struct protect *p, struct kc_err *err)
{
	char fd[16], names[GUEST_MAX_TAPS][2 * IFNAMSIZ], *argv[GUEST_MAX_TAPS + 5] = {
		"/proc/self/exe", "unplug", "--guard", fd,
	};
	struct plugs *plugs = &p->plugs;
	int pair[2], rc;
	unsigned int i;
	pid_t pid;

	if (plugs->stray && waitpid(plugs->stray, NULL, WNOHANG))
		plugs->stray = 0;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		return kc_fail(err, errno, "cannot make a pair of sockets: %s", strerror(errno));
	snprintf(fd, sizeof(fd), "%d", pair[0]);
	for (i = 0; i < plugs->nr; i++) {
		snprintf(names[i], sizeof(names[i]), KC_IFB_NAME, plugs->taps[i].tap,
			 plugs->taps[i].newest);
		argv[4 + i] = names[i];
	}
	rc = kc_start(argv, pair[0], -1, OWN_SESSION, NULL, &pid, err);
	close(pair[0]);
	if (!rc) {
		rc = guest_guard(&p->guest, pair[1], err);
		close(pair[1]);
		/*
		 * The one before has had its word then.  Or this one has nothing to do, and ends
		 * when QEMU closes what it got; which may take it yet, if it only was too slow.
		 */
		if (!rc) {
			reap(p);
			plugs->guard = pid;
		} else {
			plugs->stray = pid;
		}
		return rc;
	}
	close(pair[1]);
	return rc;
}

int kc_plugs_begin(struct protect *p, struct kc_err *err)
{
	struct plugs *plugs = &p->plugs;
	struct kc_err why;
	unsigned int i;
	int rc;

	disconnect(plugs);
	if (!p->guest.nr_taps)
		return 0;
	rc = kc_plug_connect(&plugs->sk, &why);
	if (rc)
		rc = refuse(&p->guest.taps[0], &why, err);
	for (i = 0; i < p->guest.nr_taps && !rc; i++)
		rc = find(plugs, &p->guest.taps[i], err);
	/* First: who makes something may be killed at any moment */
	if (!rc)
		rc = start_guard(p, err);
	for (i = 0; i < plugs->nr && !rc; i++) {
		rc = kc_plug_add(plugs->sk, &plugs->taps[i], &why);
		if (rc)
			rc = refuse(&p->guest.taps[i], &why, err);
		/* Whatever QEMU has held, of this device what was sent has left */
		else if (plugs->taps[i].nr_ifbs == 1)
			p->guest.unbroken = false;
	}
	if (!rc)
		return 0;
	/*
	 * QEMU tells the guard.  But while the standby may go on from an epoch that does not know of
	 * what was held before us, that stays for as long as QEMU's limit says; as it does if QEMU
	 * does not answer.
	 */
	if (rc != -ETIMEDOUT && rc != -ECANCELED && (p->unheld || !p->guest.unbroken))
		let_go(p);
	else
		disconnect(plugs);
	return rc;
}

void kc_plugs_cut(void *ctx)
{
	struct protect *p = ctx;
	struct plugs *plugs = &p->plugs;
	unsigned int i;

	plugs->fresh = !plugs->marked;
	if (plugs->marked || plugs->failed)
		return;
	for (i = 0; i < plugs->nr && !plugs->failed; i++)
		plugs->failed = kc_plug_mark(plugs->sk, &plugs->taps[i], &plugs->why);
	plugs->marked = plugs->nr;
	plugs->marked_for = 0;
}

void kc_plugs_sent(struct protect *p)
{
	p->plugs.behind = p->plugs.marked && !p->plugs.fresh;
	if (p->plugs.marked && !p->plugs.marked_for)
		p->plugs.marked_for = p->nr;
}

void kc_plugs_not_sent(struct protect *p)
{
	p->plugs.marked_for = 0;
}

int kc_plugs_look(struct protect *p, struct kc_err *err)
{
	struct plugs *plugs = &p->plugs;
	unsigned int i;
	int rc;

	if (!plugs->failed && plugs->marked_for && p->acked >= plugs->marked_for) {
		plugs->marked = false;
		plugs->marked_for = 0;
		for (i = 0; i < plugs->nr && !plugs->failed; i++)
			plugs->failed = kc_plug_release(plugs->sk, &plugs->taps[i], &plugs->why);
	}
	if (!plugs->failed)
		return 0;
	/* Somebody has removed it: then packets have left, and QEMU has to know that there was a break */
	rc = kc_fail(err, -plugs->failed, "%s", plugs->why.text);
	let_go(p);
	return rc;
}

void kc_plugs_ended(struct protect *p)
{
	reap(p);
	disconnect(&p->plugs);
}
