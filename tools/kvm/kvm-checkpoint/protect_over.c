// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint protect: the guest goes on elsewhere.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "protect.h"
#include "ram.h"

#define STOP_TIMEOUT_MS	5000

/* By a connection of its own if the one that there was is of no use; -ENOENT if QEMU is gone. */
static int stop_guest(struct protect *p, struct kc_err *err)
{
	struct json_object *o = NULL;
	bool running;
	int rc = 0;

	if (p->guest.qmp.fd < 0)
		rc = qmp_open(&p->guest.qmp, p->guest_opts.qmp, STOP_TIMEOUT_MS, NULL, NULL, err);
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
	/* Nobody there knows of it */
	if (!rc)
		kc_net_end(p, true);
	kc_log(KC_LOG_ERROR, rc ? "QEMU is gone: the guest is at the standby" :
	       "the guest is stopped here, as it is at the standby: end this QEMU, and never resume the guest in it");
	o = kc_show_event("taken_over");
	kc_show_add(o, "epoch", p->acked);
	kc_show_json(p, o);
	return 1;
}

/* --- Planned -------------------------------------------------------------- */

/* It is certain that it does not run at the standby. */
static void resume(struct protect *p, const char *why)
{
	struct kc_err err;

	if (p->epoch.was_running && p->guest.qmp.fd >= 0 &&
	    qmp_call(&p->guest.qmp, "cont", NULL, NULL, &err))
		kc_log(KC_LOG_ERROR, "switchover failed: %s; the guest is stopped: %s", why, err.text);
	else
		kc_log(KC_LOG_ERROR, "switchover failed: %s; the guest runs on here", why);
}

/* The link was lost when the standby had been told: did it?  -EINTR if that is not known. */
static int ask(struct protect *p, const char *why)
{
	struct kc_sink *s;
	struct kc_err err;
	bool same;

	kc_log(KC_LOG_WARN, "%s; the guest is stopped until it is known whether it runs at the standby",
	       why);
	kc_status_trouble(p->status, why);
	for (;; usleep(200000)) {
		s = kc_sink_open(p->to, &p->opts, &p->guest.id, &err);
		if (!s && errno == ESHUTDOWN)
			return 0;
		/* Another one would not know. */
		same = s && !memcmp(kc_sink_receiver(s), p->receiver, sizeof(p->receiver));
		kc_sink_close(s);
		if (same)
			return -ECANCELED;
		if (kc_stop_requested)
			return -EINTR;
	}
}

/* Of no epoch, but what a standby here would have to get otherwise */
static int leave_ram(struct protect *p, struct kc_err *err)
{
	const struct kc_begin begin = { .nr = 1, .flags = KC_EPOCH_FULL };
	struct kc_ram *ram;
	unsigned int b;
	uint64_t i;
	int rc;

	rc = kc_ram_open(p->leave_ram, false, &ram, err);
	if (rc)
		return rc;
	if (kc_ram_guest(ram))
		rc = kc_fail(err, EEXIST, "%s holds a guest already", p->leave_ram);
	/* QEMU has their images still; and where a standby's are is up to who starts it */
	kc_ram_leave_disks_out(ram);
	if (!rc)
		rc = kc_ram_create(ram, &p->guest.id, NULL, NULL, err);
	if (!rc)
		rc = kc_ram_ops.begin(ram, &begin, err);
	for (b = 0; !rc && b < p->guest.id.nr_blocks; b++) {
		for (i = 0; !rc && i < p->guest.block_ids[b].npages; i++)
			rc = kc_ram_ops.page(ram, b, i,
					     p->guest.blocks[b].map + i * KC_PAGE_SIZE, err);
	}
	kc_ram_close(ram);
	return rc;
}

bool kc_switch_over(struct protect *p, int *status)
{
	uint64_t t = kc_now_us();
	struct json_object *o;
	struct kc_err err;
	int rc;

	kc_switch_requested = false;
	kc_log(KC_LOG_INFO, "switching over to %s", p->to);
	kc_status_phase(p->status, "switching over");
	if (kc_epoch_last(p, &rc, &err) != OK) {
		kc_link_close(p);
		resume(p, err.text);
		return false;
	}
	/* All of it is in that epoch */
	if (!kc_net_look(p, &err))
		rc = kc_sink_switch_over(p->sink, &err);
	else
		rc = -ECANCELED;
	kc_link_close(p);
	if (rc && rc != -ECANCELED)
		rc = ask(p, err.text);
	if (rc == -ECANCELED) {
		resume(p, err.text);
		return false;
	}
	*status = 1;
	if (rc) {
		kc_log(KC_LOG_ERROR,
		       "IT IS NOT KNOWN WHETHER THE GUEST RUNS AT THE STANDBY: look there; it is stopped here");
		return true;
	}
	kc_log(KC_LOG_INFO, "the guest is at the standby since epoch %lu, after %.3f s", p->nr,
	       (kc_now_us() - t) / 1e6);
	o = kc_show_event("switched_over");
	kc_show_add(o, "epoch", p->nr);
	kc_show_json(p, o);
	if (p->leave_ram && leave_ram(p, &err))
		kc_log(KC_LOG_WARN, "the guest's memory is not left for a standby here: %s", err.text);
	else if (p->leave_ram)
		kc_log(KC_LOG_INFO, "its memory is in %s, for a standby here", p->leave_ram);
	*status = 0;
	/* It is of no use any more, and must not be resumed. */
	rc = qmp_call(&p->guest.qmp, "quit", NULL, NULL, &err);
	if (rc && rc != -EPIPE)
		kc_log(KC_LOG_WARN, "end QEMU here: %s", err.text);
	return true;
}
