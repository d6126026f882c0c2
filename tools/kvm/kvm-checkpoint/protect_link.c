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

/* QEMU is at work for somebody else if it does not answer for so long */
#define BUSY_MS		2000

int kc_link_poll(struct protect *p, struct kc_err *err)
{
	uint64_t acked = p->acked;
	int rc = kc_sink_poll(p->sink, &acked, err);

	if (acked > p->acked) {
		struct json_object *o = kc_show_event("acked");

		p->acked = acked;
		p->was_acked = true;
		kc_show_add(o, "epoch", acked);
		kc_show_json(p, o);
		/*
		 * It has heard of us after that was sent, so it is silent for its --timeout before
		 * it takes over.
		 */
		guest_lease(&p->guest, p->lease_ms ? kc_sink_heard_us(p->sink) +
						     p->lease_ms * 1000ull : 0);
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
	kc_status_phase(p->status, *why ? phase : "protected");
	if (p->sink && !p->lost)
		p->lost = kc_sink_note(p->sink, p->no_epochs, &p->lost_err);
}

int kc_link_tick(void *ctx)
{
	struct protect *p = ctx;
	uint64_t asked = p->guest.qmp.asked_us;

	if (p->sink && !p->lost)
		p->lost = kc_link_poll(p, &p->lost_err);
	/* Before there was an epoch, guest_open() says what is wrong */
	if (!p->nr || !asked || kc_now_us() - asked < BUSY_MS * 1000ull)
		return 0;
	kc_no_epochs(p, "QEMU lives, but does not answer");
	return kc_stop_requested ? -ECANCELED : 0;
}

/*
 * Where nothing has ever arrived, a name, a key or a path is wrong.  Once epochs have, these were
 * right: a name server or what holds the keys may be in trouble, as the link may, and what makes no
 * sense was damaged on its way.
 */
bool kc_link_may_pass(const struct protect *p, int error)
{
	if (kc_sink_is_temporary(error))
		return true;
	if (!p->was_acked || strncmp(p->to, "tcp:", 4))
		return false;
	switch (error) {
	case EDESTADDRREQ:
	case EACCES:
	case ENOENT:
	case EMFILE:
	case ENFILE:
	case ENOMEM:
	case ENOBUFS:
	case EPROTO:
		return true;
	default:
		return false;
	}
}

/*
 * The first time any failure is the user's to know, and what does not look as if it passed by
 * itself once more when it comes later.
 */
enum where kc_link_open(struct protect *p, int *rc, struct kc_err *err)
{
	unsigned int wait_ms = 100;
	int told = 0;

	while (!p->sink) {
		uint64_t until;

		kc_may_exit = strncmp(p->to, "tcp:", 4);
		p->sink = kc_stop_requested ? NULL :
			  kc_sink_open(p->to, &p->opts, &p->guest.id, err);
		kc_may_exit = 0;
		if (p->sink)
			break;
		if (kc_stop_requested)
			return STOPPED;
		*rc = -errno;
		if (!kc_link_may_pass(p, -*rc))
			return SINK;
		if (!told || (told != -*rc && !kc_sink_is_temporary(-*rc))) {
			told = -*rc;
			kc_log(KC_LOG_WARN, "%s; the guest runs on, trying again", err->text);
		}
		kc_status_phase(p->status, "link lost");
		for (until = kc_now_us() + wait_ms * 1000; kc_now_us() < until; usleep(20000)) {
			if (kc_stop_requested)
				return STOPPED;
			*rc = qmp_poll(&p->guest.qmp, err);
			if (*rc)
				return GUEST;
		}
		wait_ms = wait_ms * 2 > MAX_RETRY_MS ? MAX_RETRY_MS : wait_ms * 2;
	}
	if (told)
		kc_log(KC_LOG_INFO, "connected to %s", p->to);
	*rc = kc_link_check_lease(p, err);
	return *rc ? SINK : OK;
}

int kc_link_check_lease(const struct protect *p, struct kc_err *err)
{
	unsigned int takeover_ms = kc_sink_takeover_ms(p->sink);

	/* A tenth is more than clocks can differ, and for the time to stop the guest */
	if (!p->lease_ms || !takeover_ms || p->lease_ms <= takeover_ms / 10 * 9)
		return 0;
	return kc_fail(err, EINVAL,
		       "the standby takes over after %u ms: --lease can be %u ms at most", takeover_ms,
		       takeover_ms / 10 * 9);
}

void kc_link_close(struct protect *p)
{
	if (p->sink)
		kc_status_sink(p->status, NULL);
	kc_sink_close(p->sink);
	p->sink = NULL;
	p->lost = 0;
	*p->no_epochs = '\0';	/* the next one is to hear of it */
}

bool kc_link_end(struct protect *p, enum kc_end why)
{
	bool told = p->sink && kc_sink_end(p->sink, why);

	kc_link_close(p);
	/* Nobody has ever heard of this guest, or nobody waits for it */
	if (told || !p->nr || strncmp(p->to, "tcp:", 4))
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
	p->taken_over = !p->sink && told;
	kc_link_close(p);
	if (!told && why != KC_END_GUEST_DIED)
		kc_log(KC_LOG_ERROR,
		       "%s does not know that the protection has ended: stop it, or it takes over when its --timeout is up",
		       p->to);
	return told;
}
