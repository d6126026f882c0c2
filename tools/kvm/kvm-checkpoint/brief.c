// SPDX-License-Identifier: GPL-2.0-only
/*
 * An epoch by one command of QEMU, which stays in it for as long as the guest stands still: it says
 * on the socket how far it is, and goes on when it is told there that all is copied.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>

#include "guest.h"

#define TAKE	"x-checkpoint-take"

/* As QEMU sends it */
struct told {
	uint64_t what, generation, state_size, offset, runs, collect_us, packets, discarded;
	uint64_t states_block, states_page, states_nr;
};

enum { STOPPED = 1, SAVED = 2 };

/* -ECANCELED: the command's answer comes instead */
static int await(struct guest *g, uint64_t what, struct told *told, struct kc_err *err)
{
	uint64_t until = g->qmp.timeout_ms ? kc_now_us() + g->qmp.timeout_ms * 1000ull : UINT64_MAX;
	size_t got = 0;
	ssize_t n;
	int rc;

	while (got < sizeof(*told)) {
		struct pollfd p[] = {
			{ .fd = g->sock, .events = POLLIN }, { .fd = g->qmp.fd, .events = POLLIN },
		};

		n = recv(g->sock, (char *)told + got, sizeof(*told) - got, MSG_DONTWAIT);
		if (n > 0) {
			got += n;
			continue;
		}
		if (n < 0 && errno == EINTR)
			continue;
		if (!n || errno != EAGAIN || qmp_answered(&g->qmp))
			return -ECANCELED;
		if (kc_now_us() >= until)
			return kc_fail(err, ETIMEDOUT, "QEMU does not answer to " TAKE);
		if (poll(p, 2, 50) == 0 && g->qmp.idle) {
			rc = g->qmp.idle(g->qmp.idle_ctx);
			if (rc)
				return kc_fail(err, -rc, "QEMU has not answered to " TAKE " yet");
		}
	}
	return told->what == what ? 0 :
	       kc_fail(err, EPROTO, "QEMU says nothing that makes sense: is its patch another version's?");
}

/* *@stale: there is something in logs that are not known, which QEMU has to be asked about */
static int harvest(struct guest *g, bool *stale, struct kc_err *err)
{
	int rc = guest_harvest_known(g, err);

	*stale |= rc == -ESTALE;
	return rc == -ESTALE ? 0 : rc;
}

static int copy_pages(struct guest *g, struct guest_epoch *e, struct kc_err *err)
{
	return guest_copy_dirty(g, &e->copy, UINT64_MAX) ?
	       kc_fail(err, ENOMEM, "no memory for copies of dirty pages") : 0;
}

/* Until all is copied; -ECANCELED as above */
static int take(struct guest *g, struct guest_epoch *e, uint64_t t[], bool *stale,
		struct kc_err *err)
{
	struct told told;
	int rc;

	rc = harvest(g, stale, err);
	if (!rc)
		rc = guest_check_skipped(g, err);
	t[2] = kc_now_us();
	if (!rc)
		rc = copy_pages(g, e, err);
	t[3] = kc_now_us();
	if (!rc)
		rc = await(g, SAVED, &told, err);
	t[4] = kc_now_us();
	if (!rc)
		g->dirty.has_holes |= !!told.discarded;
	if (!rc)
		rc = guest_take_runs(g, told.offset, told.runs, err);
	/* Once more: pages that were written while the state was saved */
	if (!rc)
		rc = harvest(g, stale, err);
	t[5] = kc_now_us();
	if (!rc)
		rc = copy_pages(g, e, err);
	t[6] = kc_now_us();
	if (rc)
		return rc;
	*stale |= told.generation != g->generation;
	e->state_len = told.state_size;
	e->packets = told.packets;
	/* QEMU saves the state and then looks for pages; the latter is a harvest */
	t[4] -= told.collect_us < t[4] - t[3] ? told.collect_us : t[4] - t[3];
	return 0;
}

/* The command has ended: what came of it */
static int end(struct guest *g, struct guest_epoch *e, bool done, struct kc_err *err)
{
	struct json_object *o = NULL;
	struct kc_err why;
	int rc;

	rc = qmp_receive(&g->qmp, TAKE, &o, err);
	if (rc)
		return rc;
	e->resumed = qmp_bool(o, "resumed");
	if (!done || !qmp_bool(o, "consistent"))
		rc = guest_spoilt(g, qmp_str(o, "spoilt-by"), &why);
	json_object_put(o);
	if (rc && guest_undo_copy(g, &e->copy))
		return kc_fail(err, ENOMEM, "no memory for the list of dirty pages");
	return rc ? kc_fail(err, -rc, "%s", why.text) : 0;
}

/* There is no such command, or nothing to take by it: 1 */
static int not_taken(struct guest *g, struct kc_err *err)
{
	struct json_object *o = NULL;
	bool taken;
	int rc;

	rc = qmp_receive(&g->qmp, TAKE, &o, err);
	if (rc == -EREMOTEIO && strstr(err->text, "has not been found")) {
		g->no_take = true;
		return 1;
	}
	if (rc)
		return rc;
	taken = qmp_bool(o, "taken");
	json_object_put(o);
	return taken ? kc_fail(err, EPROTO, "QEMU has taken an epoch without a word") : 1;
}

int guest_take_brief(struct guest *g, struct guest_epoch *e, struct kc_err *err)
{
	uint64_t t[8] = { 0 };
	bool stale = false, done;
	struct told told;
	int rc, failed;

	/* Who hangs would be waited for, and who is to stay stopped must not go on */
	if (g->no_take || e->last || !g->opts.pause_limit_ms)
		return 1;
	t[0] = kc_now_us();
	e->taken_us = t[0];
	if (g->opts.stopping)
		g->opts.stopping(g->opts.idle_ctx);
	rc = guest_send_stop(g, TAKE, err);
	if (!rc)
		rc = await(g, STOPPED, &told, err);
	if (rc)
		return rc == -ECANCELED ? not_taken(g, err) : rc;
	if (g->opts.stopped)
		g->opts.stopped(g->opts.idle_ctx);
	t[1] = kc_now_us();
	guest_take_states(g, told.states_block, told.states_page, told.states_nr);
	/* Before the first copy: to read what was given back would be to take it back */
	g->dirty.has_holes |= !!told.discarded;
	e->was_running = true;
	e->waits_for[0] = '\0';
	strcpy(e->status, "paused");

	failed = take(g, e, t, &stale, err);
	done = !failed && !stale;
	/* It goes on in any case */
	if (failed != -ECANCELED && send(g->sock, "", 1, MSG_NOSIGNAL | MSG_DONTWAIT) != 1)
		failed = failed ? failed : kc_fail(err, EPIPE, "QEMU is gone");
	if (failed && failed != -ECANCELED)
		return failed;
	rc = end(g, e, done, err);
	t[7] = kc_now_us();
	if (stale && (!rc || rc == -EAGAIN)) {
		rc = guest_refresh_layout(g, err);
		return rc ? rc : kc_fail(err, EAGAIN, "the guest's memory slots have been changed");
	}
	if (rc)
		return rc;

	return guest_finish(g, e, t, err);
}
