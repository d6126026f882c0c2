// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint protect: what the guest sends leaves when the epoch that has it sent is safe.
 *
 * QEMU holds packets back and numbers the states that it saves; an epoch's acknowledgement releases
 * what was sent before its state was saved.  (Output commit, as in Remus.)
 *
 * The rule, for both sides: no packet leaves that the epoch does not know of which the standby
 * would take over from.  So while the standby has none it would take over from, nothing is held:
 * the first epoch is far from being one, as it has to be sent, and loaded on trial.
 *
 * - Which epoch is the first that counts: one with which all before was sent, or is held, and after
 *   which all is.  QEMU begins to hold where a state is saved, so that is the first state after
 *   x-checkpoint-hold.  Epochs before it have KC_STATE_UNHELD.
 * - It begins when an epoch was acknowledged: then the standby can load what it gets, and the next
 *   one arrives at once.
 * - The standby does not take over by itself from an epoch with KC_STATE_UNHELD, and says in its
 *   WELCOME whether it has one without.  If so, that one may be gone on from at any time, and
 *   packets are held from the first epoch on, as they were before: by us or, for us, by QEMU, which
 *   is asked whether it has, for this standby, all the time.  If it has not, somebody may know more
 *   than that epoch does, and the standby is told that it counts no more.
 *
 * If there are no acknowledgements, since the link is lost or there can be no epochs, packets are
 * held for as long as the standby may take over from an epoch that does not know of them.  A
 * standby that is reached is told first that what it has counts no more, and has stored that when
 * it answers.  One that is not reached has missed us since it last heard of us, for its time limit
 * and then its fence's: who has not been fenced by then runs on alone, without protection, and its
 * packets leave.  That is the first thing that the standby hears when it is reached again, before
 * it takes our silence for anything.  With a lease the guest stands still by then, and if the
 * standby has no fence it may well run there: they are held until that is known.  A guest that
 * stands still sends nothing, so what it has sent can wait.
 */
#include <errno.h>

#include "protect.h"

/* For the standby to notice, and for this host to die */
#define MARGIN_MS	1000u
/* A standby that takes over only when told to, or a directory, says nothing of a time limit */
#define UNKNOWN_MS	30000u

static unsigned int limit_ms(const struct protect *p)
{
	unsigned int takeover_ms;

	if (p->net_limit_ms != NET_LIMIT_UNSET)
		return p->net_limit_ms;
	takeover_ms = p->sink ? kc_sink_takeover_ms(p->sink) : 0;
	return takeover_ms ? takeover_ms + kc_sink_fence_ms(p->sink) + MARGIN_MS : UNKNOWN_MS;
}

static bool is_wanted(const struct protect *p)
{
	return p->net == NET_COMMIT || (p->net == NET_AUTO && to_standby(p));
}

/* It is held for the standby that there is, or for a directory, which nobody takes over from */
static bool is_for_sink(const struct protect *p)
{
	return !memcmp(p->held_for, kc_sink_receiver(p->sink), sizeof(p->held_for));
}

static int refuse(const struct kc_err *why, struct kc_err *err)
{
	return kc_fail(err, ESTALE,
		       "%s.  Say --net pass if clients may have seen what a guest that goes on elsewhere does not know of",
		       why->text);
}

/* All that is held, by whomever */
static int end(struct protect *p, bool drop, struct kc_err *err)
{
	int rc = guest_release(&p->guest, 0, drop, err);

	if (!rc)
		kc_plugs_ended(p);
	return rc;
}

/* @anew: that has no epoch that counts */
static int hold(struct protect *p, bool anew, struct kc_err *err)
{
	static const uint8_t nobody[sizeof(p->held_for)];
	char name[2 * sizeof(p->held_for) + 1] = "";
	bool held = p->guest.holds;
	struct kc_err why;
	unsigned int i;
	int rc;

	if (p->no_cards || !is_wanted(p) ||
	    (held && !anew && is_for_sink(p) && p->net_ms == limit_ms(p)))
		return 0;
	p->net_ms = limit_ms(p);
	memcpy(p->held_for, kc_sink_receiver(p->sink), sizeof(p->held_for));
	for (i = 0; i < sizeof(p->held_for) && memcmp(p->held_for, nobody, sizeof(nobody)); i++)
		sprintf(name + 2 * i, "%02x", p->held_for[i]);
	rc = guest_hold(&p->guest, p->net_ms, name, anew, &why);
	if (!rc && !held)
		rc = kc_plugs_begin(p, &why);
	if (rc == -EOPNOTSUPP)
		return refuse(&why, err);
	if (rc)
		return kc_fail(err, -rc, "%s", why.text);
	p->no_cards = !p->guest.holds;
	if (!p->no_cards)
		kc_status_output(p->status, KC_OUTPUT_HELD);
	if (!held)
		p->net_stuck_us = 0;
	return 0;
}

void kc_net_stuck(struct protect *p)
{
	uint64_t confirmed = p->sink ? kc_sink_confirmed_us(p->sink) : 0;

	if (!p->net_stuck_us)
		p->net_stuck_us = confirmed ? confirmed : kc_now_us();
}

/* What the standby has counts no more; if it cannot be told, the next one is asked anew */
static void disown(struct protect *p)
{
	/* Nor do those that are taken from now on. */
	p->unheld = true;
	p->unheld_from = 0;
	if (!p->lost)
		p->lost = kc_sink_unheld(p->sink, &p->lost_err);
	p->unheld_told_us = kc_now_us();
}

int kc_net_begin(struct protect *p, struct kc_err *err)
{
	bool held = p->guest.holds;
	int rc;

	/* If there was something to tell, it was told, and is stored there. */
	p->opts.unheld = p->unheld = false;
	p->unheld_from = p->unheld_told_us = 0;
	if (!to_standby(p) || !is_wanted(p) || p->no_cards)
		return 0;
	p->unheld = !kc_sink_counts(p->sink);
	if (held && is_for_sink(p))
		return 0;
	/* What this one has is no answer to what the one before was sent. */
	if (held) {
		memset(p->marks, 0, sizeof(p->marks));
		kc_plugs_not_sent(p);
	}
	/* Whether it can be held should be known before the first copy. */
	rc = hold(p, false, err);
	p->unheld = p->unheld && !p->no_cards;
	if (rc || p->no_cards)
		return rc;
	if (!p->unheld && !p->guest.unbroken) {
		kc_log(KC_LOG_WARN,
		       "what the guest sent was not held back for %s all the time since its last epoch, which is not to be failed over to",
		       p->to);
		disown(p);
	}
	/* It is held for another standby: until the limit */
	if (held)
		return 0;
	/* What QEMU may hold for who was here before is ours now, and so is the limit. */
	if (!p->unheld) {
		kc_net_stuck(p);
		return 0;
	}
	kc_status_output(p->status, KC_OUTPUT_PASSES);
	return end(p, false, err);
}

bool kc_net_proved(const struct protect *p)
{
	return p->unheld && p->unheld_from && p->acked >= p->unheld_from;
}

int kc_net_hold(struct protect *p, struct kc_err *err)
{
	bool anew = kc_net_proved(p);

	if (anew) {
		p->unheld = false;
		/* That is the one since which it is protected. */
		p->first.nr = p->nr + 1;
		/* Who takes over from it has heard of us later than now. */
		if (p->lease_ms)
			guest_lease(&p->guest, kc_boot_us() + p->lease_ms * 1000ull, false);
	}
	p->taken_unheld = p->unheld;
	return p->unheld ? 0 : hold(p, anew, err);
}

void kc_net_sent(struct protect *p)
{
	struct net_mark *m = &p->marks[p->nr % KC_SENT];

	if (p->taken_unheld && !p->unheld_from)
		p->unheld_from = p->nr;
	p->sent_unheld = p->taken_unheld;
	*m = (struct net_mark){ .nr = p->nr, .packets = p->epoch.packets };
	kc_plugs_sent(p);
}

/* Up to which state all is acknowledged */
static uint64_t safe_packets(const struct protect *p)
{
	uint64_t packets = 0;
	unsigned int i;

	for (i = 0; i < KC_SENT; i++) {
		const struct net_mark *m = &p->marks[i];

		if (m->nr && m->nr <= p->acked && m->packets > packets)
			packets = m->packets;
	}
	return packets;
}

void kc_net_unlinked(struct protect *p)
{
	/* It has heard of us until now. */
	p->net_stuck_us = 0;
	kc_net_stuck(p);
}

/* The limit is over */
static int let_go(struct protect *p, struct kc_err *err)
{
	if (p->sink && to_standby(p) && !p->unheld)
		disown(p);
	if (p->sink && p->unheld_told_us && kc_sink_confirmed_us(p->sink) <= p->unheld_told_us)
		return 0;
	kc_log(KC_LOG_WARN,
	       "nothing was acknowledged for %u ms: what the guest sends is not held back any more, until there is a new epoch",
	       p->net_ms);
	kc_status_output(p->status, KC_OUTPUT_PASSES);
	if (!p->sink)
		p->opts.unheld = true;
	return end(p, false, err);
}

int kc_net_look(struct protect *p, struct kc_err *err)
{
	uint64_t packets;
	int rc;

	if (!p->guest.holds)
		return 0;
	rc = kc_plugs_look(p, err);
	if (rc)
		return rc;
	packets = safe_packets(p);
	if (packets > p->released) {
		rc = guest_release(&p->guest, packets, false, err);
		p->released = packets;
		/* If that was the last word before the link was lost, time goes on. */
		if (p->sink)
			p->net_stuck_us = 0;
	} else if (p->net_stuck_us && !p->lease_ms &&
		   kc_now_us() - p->net_stuck_us >= p->net_ms * 1000ull) {
		rc = let_go(p, err);
	}
	return rc;
}

void kc_net_end(struct protect *p, bool drop)
{
	struct kc_err err;

	/* Also what was held for a daemon before us */
	if (is_wanted(p) && !p->no_cards && p->guest.qmp.fd >= 0 &&
	    end(p, drop, &err) && p->net_ms)
		kc_log(KC_LOG_WARN, "%s: what the guest has sent is held back for %u ms", err.text,
		       p->net_ms);
}
