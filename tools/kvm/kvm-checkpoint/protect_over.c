// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint protect: the guest goes on elsewhere.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "protect.h"

#define STOP_TIMEOUT_MS	5000

/* By a connection of its own if the one that there was is of no use; -ENOENT if QEMU is gone. */
static int stop_guest(struct protect *p, struct kc_err *err)
{
	struct json_object *o = NULL;
	bool running;
	int rc = 0;

	if (p->guest.qmp.fd < 0)
		rc = qmp_open(&p->guest.qmp, p->qmp, STOP_TIMEOUT_MS, NULL, NULL, err);
	if (rc == -ECONNREFUSED || rc == -ENOENT)
		return -ENOENT;
	if (!rc)
		rc = qmp_call(&p->guest.qmp, "stop", NULL, NULL, err);
	if (!rc)
		rc = qmp_call(&p->guest.qmp, "query-status", NULL, &o, err);
	if (rc)
		return rc;
	running = qmp_bool(o, "running");
	json_object_put(o);
	return running ? kc_fail(err, EAGAIN, "somebody else resumes it") : 0;
}

int kc_guest_is_elsewhere(struct protect *p, const char *why)
{
	struct json_object *o;
	struct kc_err err;
	bool told = false;
	int rc;

	kc_log(KC_LOG_ERROR, "%s: stopping the guest here", why);
	kc_status_trouble(p->status, why);
	kc_status_phase(p->status, "taken over by the standby");
	while ((rc = stop_guest(p, &err)) && rc != -ENOENT) {
		if (!told)
			kc_log(KC_LOG_ERROR, "the guest cannot be stopped: %s; trying again",
			       err.text);
		told = true;
		if (kc_stop_requested) {
			kc_log(KC_LOG_ERROR, "THE GUEST RUNS TWICE: stop its QEMU here");
			return 1;
		}
		guest_close(&p->guest);
		usleep(200000);
	}
	kc_log(KC_LOG_ERROR, rc ? "QEMU is gone: the guest is at the standby" :
	       "the guest is stopped here, as it is at the standby: end this QEMU, and never resume the guest in it");
	o = kc_show_event("taken_over");
	kc_show_add(o, "epoch", p->acked);
	kc_show_json(p, o);
	return 1;
}
