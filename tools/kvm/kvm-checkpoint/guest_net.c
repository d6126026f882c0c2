// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the guest sends: QEMU holds it back and lets it go.
 */
#include <errno.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "guest.h"

static int take_taps(struct guest *g, struct json_object *list, struct kc_err *err)
{
	size_t i, n = json_object_is_type(list, json_type_array) ? json_object_array_length(list) : 0;

	g->nr_taps = 0;
	if (n > GUEST_MAX_TAPS)
		return kc_fail(err, EOPNOTSUPP,
			       "packets of %zu tap devices would have to be held back by the kernel, and %u can be",
			       n, GUEST_MAX_TAPS);
	for (i = 0; i < n; i++) {
		struct json_object *o = json_object_array_get_idx(list, i);
		struct guest_tap *t = &g->taps[g->nr_taps++];

		snprintf(t->card, sizeof(t->card), "%s", qmp_str(o, "card"));
		snprintf(t->ifname, sizeof(t->ifname), "%s", qmp_str(o, "ifname"));
		snprintf(t->mac, sizeof(t->mac), "%s", qmp_str(o, "mac"));
		snprintf(t->why, sizeof(t->why), "%s", qmp_str(o, "why"));
	}
	return 0;
}

int guest_hold(struct guest *g, unsigned int limit_ms, const char *checkpoints, bool anew,
	       struct kc_err *err)
{
	struct json_object *args, *o = NULL, *cards, *taps;
	int rc;

	if (g->opts.watch_packets && g->packets_fd < 0)
		g->packets_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (g->packets_fd >= 0) {
		rc = guest_give_fd(g, "kvm-checkpoint-packets", g->packets_fd, err);
		if (rc)
			return rc;
	}
	args = json_object_new_object();
	json_object_object_add(args, "limit-ms", json_object_new_int64(limit_ms));
	json_object_object_add(args, "taps", json_object_new_boolean(true));
	if (*checkpoints)
		json_object_object_add(args, "checkpoints", json_object_new_string(checkpoints));
	if (anew)
		json_object_object_add(args, "anew", json_object_new_boolean(true));
	if (g->packets_fd >= 0)
		json_object_object_add(args, "notify",
				       json_object_new_string("kvm-checkpoint-packets"));
	rc = qmp_call(&g->qmp, "x-checkpoint-hold", args, &o, err);
	g->holds = !rc && json_object_object_get_ex(o, "cards", &cards) &&
		   json_object_is_type(cards, json_type_array) && json_object_array_length(cards);
	g->unbroken = qmp_bool(o, "unbroken");
	if (!rc && json_object_object_get_ex(o, "taps", &taps))
		rc = take_taps(g, taps, err);
	g->holds |= !rc && g->nr_taps;
	json_object_put(o);
	return rc == -EREMOTEIO ? -EOPNOTSUPP : rc;
}

int guest_guard(struct guest *g, int fd, struct kc_err *err)
{
	struct json_object *args = json_object_new_object();
	int rc = guest_give_fd(g, "kvm-checkpoint-guard", fd, err);

	json_object_object_add(args, "socket", json_object_new_string("kvm-checkpoint-guard"));
	if (!rc)
		return qmp_call(&g->qmp, "x-checkpoint-guard", args, NULL, err);
	json_object_put(args);
	return rc;
}

bool guest_packets_wait(struct guest *g)
{
	uint64_t n;

	return g->packets_fd >= 0 && read(g->packets_fd, &n, sizeof(n)) == sizeof(n);
}

int guest_release(struct guest *g, uint64_t packets, bool drop, struct kc_err *err)
{
	struct json_object *args = json_object_new_object();

	if (packets)
		json_object_object_add(args, "packets", json_object_new_uint64(packets));
	json_object_object_add(args, "drop", json_object_new_boolean(drop));
	g->holds = g->holds && packets;
	return qmp_call(&g->qmp, "x-checkpoint-release", args, NULL, err);
}
