// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint protect: where its epochs go.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "protect.h"

#define MAX_RETRY_MS	500
/* Where the link is not what fails */
#define MAX_PAUSE_MS	5000
#define TELL_US		60000000

/* QEMU is at work for somebody else if it does not answer for so long */
#define BUSY_MS		2000

int kc_link_poll(struct protect *p, struct kc_err *err)
{
	uint64_t acked = p->acked;
	int rc = kc_sink_poll(p->sink, &acked, err);

	if (acked > p->acked) {
		struct json_object *o = kc_show_event("acked");

		p->acked = acked;
		kc_sent_acked(p);
		kc_disks_acked(p);
		p->was_acked = true;
		p->pause_ms = 0;
		p->told = 0;
		kc_status_trouble(p->status, NULL);
		kc_show_add(o, "epoch", acked);
		kc_show_json(p, o);
		/*
		 * It has heard of us after that was sent, so it is silent for its --timeout before
		 * it takes over.
		 */
		guest_lease(&p->guest, p->lease_ms ? kc_sink_heard_us(p->sink) +
						     p->lease_ms * 1000ull : 0, false);
	}
	if (p->first.nr && p->acked >= p->first.nr && !p->unheld) {
		kc_show_protected(p, &p->first);
		kc_status_phase(p->status, "protected");
		p->first.nr = 0;
	}
	if (!rc) {
		struct kc_sink_stats stats;

		kc_sink_stats(p->sink, &stats);
		kc_status_sink(p->status, &stats);
	}
	return rc;
}

void kc_no_epochs(struct protect *p, const char *why)
{
	char phase[sizeof(p->no_epochs) + 20];

	if (!strcmp(why, p->no_epochs))
		return;
	snprintf(p->no_epochs, sizeof(p->no_epochs), "%s", why);
	snprintf(phase, sizeof(phase), "no epochs for now: %s", p->no_epochs);
	if (*why)
		kc_log(KC_LOG_WARN, "%s", phase);
	else
		kc_log(KC_LOG_INFO, "there are epochs again");
	kc_status_phase(p->status, *why ? phase : p->unheld ? "sent" : "protected");
	if (p->sink && !p->lost)
		p->lost = kc_sink_note(p->sink, p->no_epochs, &p->lost_err);
}

int kc_link_tick(void *ctx)
{
	struct protect *p = ctx;
	uint64_t asked = p->guest.qmp.asked_us;

	if (p->sink && !p->lost)
		p->lost = kc_link_poll(p, &p->lost_err);
	if (!asked || kc_now_us() - asked < BUSY_MS * 1000ull)
		return 0;
	/* Before there was an epoch, nobody expects one */
	if (p->nr)
		kc_no_epochs(p, "QEMU lives, but does not answer");
	return kc_stop_requested ? -ECANCELED : 0;
}

/*
 * Where nothing has ever arrived, a name, a key or a path is wrong, and that is the user's to know.
 * Once epochs have, all of it was right: a name server, a disk or what holds the keys may be in
 * trouble, as the link may, or the standby, or for some minutes another one listens there.  All of
 * that may pass, and who is not told to must not end the protection of a guest for it.
 */
static bool may_pass(const struct protect *p, int error)
{
	if (error == ESHUTDOWN)
		return false;
	/* Who says so is a standby, and was reached: its memory or its disk may have room later. */
	if (to_standby(p) && (error == ENOSPC || error == EREMOTEIO))
		return true;
	return p->was_acked || kc_sink_is_temporary(error);
}

/* Of the same kind of failure it is told once a minute, however often it comes. */
static void tell(struct protect *p, int error, const char *text, const char *what)
{
	uint64_t now = kc_now_us();

	kc_status_trouble(p->status, text);
	if (p->told == error && now - p->told_us < TELL_US)
		return;
	p->told = error;
	p->told_us = now;
	kc_log(KC_LOG_WARN, "%s; the guest runs on%s", text, what);
}

static void close_link(struct protect *p)
{
	if (p->sink)
		kc_net_unlinked(p);
	else
		kc_net_stuck(p);
	if (p->sink)
		kc_status_sink(p->status, NULL);
	kc_status_peer(p->status, NULL);
	kc_sink_close(p->sink);
	p->sink = NULL;
	p->lost = 0;
	*p->no_epochs = '\0';	/* the next one is to hear of it */
	p->first.nr = 0;
}

bool kc_link_failed(struct protect *p, int error, const struct kc_err *err)
{
	close_link(p);
	kc_disks_unlinked(p);
	if (!may_pass(p, error))
		return false;
	if (kc_sink_is_temporary(error)) {
		tell(p, error, err->text, "");
		kc_status_phase(p->status, "link lost");
		return true;
	}
	/* Not the link: whoever is in trouble there gets some time. */
	tell(p, error, err->text, ", trying again");
	kc_status_phase(p->status, "in trouble");
	p->pause_ms = !p->pause_ms ? 100 : p->pause_ms < MAX_PAUSE_MS / 2 ? 2 * p->pause_ms :
		      MAX_PAUSE_MS;
	return true;
}

enum where kc_link_look(struct protect *p, int *rc, struct kc_err *err)
{
	if (kc_stop_requested)
		return STOPPED;
	*rc = qmp_poll(&p->guest.qmp, err);
	if (*rc)
		return GUEST;
	if (!p->sink)
		kc_disks_look(p);
	*rc = p->sink ? kc_link_poll(p, err) : 0;
	if (*rc)
		return SINK;
	*rc = kc_net_look(p, err);
	return *rc ? GUEST : OK;
}

/* In the meantime the standby is to hear of us, if it can. */
static enum where wait_ms(struct protect *p, unsigned int ms, int *rc, struct kc_err *err)
{
	uint64_t until = kc_now_us() + ms * 1000ull;

	enum where where = OK;

	for (; where == OK && kc_now_us() < until; kc_sleep(p, until, -1))
		where = kc_link_look(p, rc, err);
	return where;
}

/* One that took over from a standby that lives would be a second copy: that is worth a word. */
static void know(struct protect *p)
{
	static const uint8_t nobody[16];
	const uint8_t *now = kc_sink_receiver(p->sink);

	if (memcmp(p->receiver, nobody, 16) && memcmp(p->receiver, now, 16))
		kc_log(KC_LOG_WARN,
		       "%s is another standby than before, or has other files: see to it that the one before does not take over",
		       p->to);
	memcpy(p->receiver, now, 16);
}

/* Is the standby's time limit long enough for --lease? */
static int check_lease(const struct protect *p, struct kc_err *err)
{
	unsigned int takeover_ms = kc_sink_takeover_ms(p->sink);

	/* A tenth is more than clocks can differ, and for the time to stop the guest */
	if (!p->lease_ms || !takeover_ms || p->lease_ms <= takeover_ms / 10 * 9)
		return 0;
	return kc_fail(err, EINVAL,
		       "the standby takes over after %u ms: --lease can be %u ms at most", takeover_ms,
		       takeover_ms / 10 * 9);
}

enum where kc_link_open(struct protect *p, int *rc, struct kc_err *err)
{
	enum where where = OK;
	unsigned int ms = 100;
	char peer[300];
	bool tried = false;

	/* Opening a directory is to read all that is there. */
	if (!p->sink && !to_standby(p) && p->pause_ms)
		where = wait_ms(p, p->pause_ms, rc, err);
	while (where == OK && !p->sink) {
		kc_may_exit = !to_standby(p);
		p->sink = kc_stop_requested ? NULL :
			  kc_sink_open(p->to, &p->opts, &p->guest.id, err);
		*rc = p->sink ? 0 : -errno;
		kc_may_exit = 0;
		if (p->sink)
			break;
		if (kc_stop_requested)
			return STOPPED;
		if (!may_pass(p, -*rc))
			return SINK;
		tell(p, -*rc, err->text, ", trying again");
		kc_status_phase(p->status, "link lost");
		tried = true;
		where = wait_ms(p, ms, rc, err);
		ms = ms * 2 > MAX_RETRY_MS ? MAX_RETRY_MS : ms * 2;
	}
	if (where != OK)
		return where;
	if (tried)
		kc_log(KC_LOG_INFO, "connected to %s", p->to);
	know(p);
	snprintf(peer, sizeof(peer), "to %.290s", p->to);
	kc_status_peer(p->status, peer);
	/* What it has already is no answer to what it will be sent. */
	p->acked = kc_sink_last_epoch(p->sink);
	p->was_acked |= p->acked;
	*rc = check_lease(p, err);
	if (*rc)
		return SINK;
	return to_standby(p) && p->pause_ms ? wait_ms(p, p->pause_ms, rc, err) : OK;
}

void kc_link_close(struct protect *p)
{
	kc_disks_lost(p);
	close_link(p);
}

bool kc_link_end(struct protect *p, enum kc_end why)
{
	bool told = p->sink && kc_sink_end(p->sink, why);

	kc_link_close(p);
	/* Nobody has ever heard of this guest, or nobody waits for it */
	if (told || !p->nr || !to_standby(p))
		return true;
	/*
	 * Silence would be taken for death, and this host be fenced: if the link is lost, one more
	 * attempt.
	 */
	p->sink = kc_sink_open(p->to, &p->opts, &p->guest.id, NULL);
	if (p->sink)
		told = kc_sink_end(p->sink, why);
	else	/* It has taken over, or is there for another guest by now */
		told = errno == ESHUTDOWN || errno == EEXIST;
	p->is_elsewhere = !p->sink && errno == ESHUTDOWN;
	kc_link_close(p);
	if (!told && why != KC_END_GUEST_DIED)
		kc_log(KC_LOG_ERROR,
		       "%s does not know that the protection has ended: stop it, or it takes over when its --timeout is up",
		       p->to);
	return told;
}
