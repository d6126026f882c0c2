// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint protect: what the guest sends leaves when the epoch that has it sent is safe.
 *
 * QEMU holds packets back and numbers the states that it saves; an epoch's acknowledgement releases
 * what was sent before its state was saved.  (Output commit, as in Remus.)
 *
 * If there are no acknowledgements, since the link is lost or there can be no epochs, packets are
 * held for as long as the standby may take over from an epoch that does not know of them: its time
 * limit, and its fence's.  Who has not been fenced by then runs on alone, without protection, and
 * its packets leave.  With a lease the guest stands still by then, and if the standby has no fence
 * it may well run there: they are held until that is known.
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

int kc_net_hold(struct protect *p, struct kc_err *err)
{
	bool held = p->guest.holds;
	struct kc_err why;
	int rc;

	if (p->no_cards || !is_wanted(p) || (held && p->net_ms == limit_ms(p)))
		return 0;
	p->net_ms = limit_ms(p);
	rc = guest_hold(&p->guest, p->net_ms, &why);
	if (rc == -EOPNOTSUPP)
		return kc_fail(err, ESTALE,
			       "%s.  Say --net pass if clients may have seen what a guest that goes on elsewhere does not know of",
			       why.text);
	if (rc)
		return kc_fail(err, -rc, "%s", why.text);
	p->no_cards = !p->guest.holds;
	if (!p->no_cards)
		kc_status_output(p->status, KC_OUTPUT_HELD);
	if (!held)
		p->net_stuck_us = 0;
	return 0;
}

void kc_net_sent(struct protect *p)
{
	struct net_mark *m = &p->marks[p->nr % KC_SENT];

	*m = (struct net_mark){ .nr = p->nr, .packets = p->epoch.packets };
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

void kc_net_stuck(struct protect *p)
{
	uint64_t confirmed = p->sink ? kc_sink_confirmed_us(p->sink) : 0;

	if (!p->net_stuck_us)
		p->net_stuck_us = confirmed ? confirmed : kc_now_us();
}

int kc_net_look(struct protect *p, struct kc_err *err)
{
	uint64_t packets;
	int rc = 0;

	if (!p->guest.holds)
		return 0;
	packets = safe_packets(p);
	if (packets > p->released) {
		rc = guest_release(&p->guest, packets, false, err);
		p->released = packets;
		/* If that was the last word before the link was lost, time goes on. */
		if (p->sink)
			p->net_stuck_us = 0;
	} else if (p->net_stuck_us && !p->lease_ms &&
		   kc_now_us() - p->net_stuck_us >= p->net_ms * 1000ull) {
		kc_log(KC_LOG_WARN,
		       "nothing was acknowledged for %u ms: what the guest sends is not held back any more, until there is a new epoch",
		       p->net_ms);
		kc_status_output(p->status, KC_OUTPUT_PASSES);
		rc = guest_release(&p->guest, 0, false, err);
	}
	return rc;
}

void kc_net_end(struct protect *p, bool drop)
{
	struct kc_err err;

	/* Also what was held for a daemon before us */
	if (is_wanted(p) && !p->no_cards && p->guest.qmp.fd >= 0 &&
	    guest_release(&p->guest, 0, drop, &err) && p->net_ms)
		kc_log(KC_LOG_WARN, "%s: what the guest has sent is held back for %u ms", err.text,
		       p->net_ms);
}
