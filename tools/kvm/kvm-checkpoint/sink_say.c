// SPDX-License-Identifier: GPL-2.0-only
/*
 * What a standby is told besides epochs.
 */
#include "backend.h"

/* To a standby alone, which is who has heartbeats */
static int say(struct kc_sink *s, const uint8_t *rec, size_t len, struct kc_err *err)
{
	int rc = kc_sink_usable(s, false, err);

	if (rc || !s->heartbeat_ms)
		return rc;
	return kc_sink_broken(s, kc_sink_emit(s, rec, len, NULL, 0, err));
}

int kc_sink_note(struct kc_sink *s, const char *text, struct kc_err *err)
{
	uint8_t rec[KC_REC_HDR + KC_NOTE_MAX];

	return say(s, rec, kc_put_note(rec, text), err);
}

int kc_sink_unheld(struct kc_sink *s, struct kc_err *err)
{
	uint8_t rec[KC_REC_HDR];
	int rc = say(s, rec, kc_put_rec(rec, KC_UNHELD, 0, 0), err);

	/* The answer to the next heartbeat is waited for. */
	s->beat_soon |= !rc && s->heartbeat_ms;
	return rc;
}
