// SPDX-License-Identifier: GPL-2.0-only
/*
 * An epoch by one command of QEMU, which stays in it for as long as the guest stands still: it says
 * on the socket how far it is, and goes on when it is told there that all is copied.  It is also
 * asked for it there if it can be, as its monitor takes long to read a command.
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

/* As long, the last one if it was asked on the socket */
struct ended {
	uint64_t what, flags;
	char why[72];
};

union heard {
	uint64_t what;
	struct told told;
	struct ended ended;
};

enum { STOPPED = 1, SAVED = 2, ENDED = 3 };
enum { TAKEN = 1, CONSISTENT = 2, RESUMED = 4, FAILED = 8 };

/* As it is asked */
struct asked {
	uint64_t what, limit_ms, flags, lease_us;
};

#define ASKED_TAKE	0x3145464154504b43ull
#define ASKED_LEASE	1
#define ASKED_FIRST	2

/* -ECANCELED: that it has ended comes instead; if @heard has it, on the socket */
static int await(struct guest *g, uint64_t what, union heard *heard, struct kc_err *err)
{
	uint64_t until = g->qmp.timeout_ms ? kc_now_us() + g->qmp.timeout_ms * 1000ull : UINT64_MAX;
	size_t got = 0;
	ssize_t n;
	int rc;

	_Static_assert(sizeof(heard->told) == sizeof(heard->ended), "QEMU sends as much");
	heard->what = 0;
	while (got < sizeof(*heard)) {
		struct pollfd p[] = {
			{ .fd = g->sock, .events = POLLIN }, { .fd = g->qmp.fd, .events = POLLIN },
		};

		n = recv(g->sock, (char *)heard + got, sizeof(*heard) - got, MSG_DONTWAIT);
		if (n > 0) {
			got += n;
			continue;
		}
		if (n < 0 && errno == EINTR)
			continue;
		if (!n || errno != EAGAIN || qmp_answered(&g->qmp)) {
			heard->what = 0;
			return -ECANCELED;
		}
		if (kc_now_us() >= until)
			return kc_fail(err, ETIMEDOUT, "QEMU does not answer to " TAKE);
		if (poll(p, 2, 50) == 0 && g->qmp.idle) {
			rc = g->qmp.idle(g->qmp.idle_ctx);
			if (rc)
				return kc_fail(err, -rc, "QEMU has not answered to " TAKE " yet");
		}
	}
	if (heard->what == ENDED && what != ENDED && g->hears)
		return -ECANCELED;
	return heard->what == what ? 0 :
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
		union heard *heard, struct kc_err *err)
{
	const struct told *told = &heard->told;
	int rc;

	rc = harvest(g, stale, err);
	if (!rc)
		rc = guest_check_skipped(g, err);
	t[2] = kc_now_us();
	if (!rc)
		rc = copy_pages(g, e, err);
	t[3] = kc_now_us();
	if (!rc)
		rc = await(g, SAVED, heard, err);
	t[4] = kc_now_us();
	if (!rc)
		g->dirty.has_holes |= !!told->discarded;
	if (!rc)
		rc = guest_take_runs(g, told->offset, told->runs, err);
	/* Once more: pages that were written while the state was saved */
	if (!rc)
		rc = harvest(g, stale, err);
	t[5] = kc_now_us();
	if (!rc)
		rc = copy_pages(g, e, err);
	t[6] = kc_now_us();
	if (rc)
		return rc;
	*stale |= told->generation != g->generation;
	e->state_len = told->state_size;
	e->packets = told->packets;
	/* QEMU saves the state and then looks for pages; the latter is a harvest */
	t[4] -= told->collect_us < t[4] - t[3] ? told->collect_us : t[4] - t[3];
	return 0;
}

/* What came of it */
struct outcome {
	bool taken, consistent, resumed;
	char why[80];
};

static int command_ended(struct guest *g, struct outcome *out, struct kc_err *err)
{
	struct json_object *o = NULL;
	int rc;

	rc = qmp_receive(&g->qmp, TAKE, &o, err);
	if (rc)
		return rc;
	out->taken = qmp_bool(o, "taken");
	out->consistent = qmp_bool(o, "consistent");
	out->resumed = qmp_bool(o, "resumed");
	snprintf(out->why, sizeof(out->why), "%s", qmp_str(o, "spoilt-by"));
	json_object_put(o);
	return 0;
}

/* It has ended, or will in a moment */
static int ended(struct guest *g, union heard *heard, struct outcome *out, struct kc_err *err)
{
	const struct ended *e = &heard->ended;
	int rc = 0;

	*out = (struct outcome){ .taken = false };
	if (!g->hears)
		return command_ended(g, out, err);
	if (heard->what != ENDED)
		rc = await(g, ENDED, heard, err);
	g->qmp.asked_us = 0;
	/* It is gone, or is not what it was: the monitor knows */
	if (rc == -ECANCELED)
		rc = qmp_call(&g->qmp, "x-checkpoint-cont", NULL, NULL, err) ? :
		     kc_fail(err, EPROTO, "QEMU does not say how " TAKE " has ended");
	if (rc)
		return rc;
	snprintf(out->why, sizeof(out->why), "%.*s", (int)sizeof(e->why), e->why);
	if (e->flags & FAILED)
		return kc_fail(err, EREMOTEIO, "QEMU refuses " TAKE ": %s", out->why);
	out->taken = e->flags & TAKEN;
	out->consistent = e->flags & CONSISTENT;
	out->resumed = e->flags & RESUMED;
	return 0;
}

/* After all was copied, or it was told that nothing will be: what came of it */
static int end(struct guest *g, struct guest_epoch *e, bool done, union heard *heard,
	       struct kc_err *err)
{
	struct outcome out;
	struct kc_err why;
	int rc;

	rc = ended(g, heard, &out, err);
	if (rc)
		return rc;
	e->resumed = out.resumed;
	if (!done || !out.consistent)
		rc = guest_spoilt(g, out.why, &why);
	if (rc && guest_undo_copy(g, &e->copy))
		return kc_fail(err, ENOMEM, "no memory for the list of dirty pages");
	return rc ? kc_fail(err, -rc, "%s", why.text) : 0;
}

/* There is no such command, or nothing to take by it: 1 */
static int not_taken(struct guest *g, union heard *heard, struct kc_err *err)
{
	struct outcome out;
	int rc;

	rc = ended(g, heard, &out, err);
	if (rc == -EREMOTEIO && strstr(err->text, "has not been found")) {
		g->no_take = true;
		return 1;
	}
	if (rc)
		return rc;
	return out.taken ? kc_fail(err, EPROTO, "QEMU has taken an epoch without a word") : 1;
}

static int ask(struct guest *g, struct kc_err *err)
{
	struct asked asked = { .what = ASKED_TAKE, .limit_ms = g->opts.pause_limit_ms };
	char old[256];

	if (!g->hears)
		return guest_send_stop(g, TAKE, err);
	/* Of one that came to nothing */
	while (recv(g->sock, old, sizeof(old), MSG_DONTWAIT) > 0)
		;
	if (g->lease_us != GUEST_NO_LEASE) {
		asked.flags = ASKED_LEASE | (g->lease_first ? ASKED_FIRST : 0);
		asked.lease_us = g->lease_us;
	}
	g->qmp.asked_us = kc_now_us();
	/* If it is gone the monitor is, too, and says so */
	return send(g->sock, &asked, sizeof(asked), MSG_NOSIGNAL | MSG_DONTWAIT) == sizeof(asked) ?
	       0 : -ECANCELED;
}

int guest_take_brief(struct guest *g, struct guest_epoch *e, struct kc_err *err)
{
	union heard heard = { .what = 0 };
	const struct told *told = &heard.told;
	uint64_t t[8] = { 0 };
	bool stale = false, done;
	int rc, failed;

	/* Who hangs would be waited for, and who is to stay stopped must not go on */
	if (g->no_take || e->last || !g->opts.pause_limit_ms)
		return 1;
	t[0] = kc_now_us();
	e->taken_us = t[0];
	if (g->opts.stopping)
		g->opts.stopping(g->opts.idle_ctx);
	rc = ask(g, err);
	if (!rc)
		rc = await(g, STOPPED, &heard, err);
	if (rc)
		return rc == -ECANCELED ? not_taken(g, &heard, err) : rc;
	if (g->opts.stopped)
		g->opts.stopped(g->opts.idle_ctx);
	t[1] = kc_now_us();
	guest_take_states(g, told->states_block, told->states_page, told->states_nr);
	/* Before the first copy: to read what was given back would be to take it back */
	g->dirty.has_holes |= !!told->discarded;
	e->was_running = true;
	e->waits_for[0] = '\0';
	strcpy(e->status, "paused");

	failed = take(g, e, t, &stale, &heard, err);
	done = !failed && !stale;
	/* It goes on in any case */
	if (failed != -ECANCELED && send(g->sock, "", 1, MSG_NOSIGNAL | MSG_DONTWAIT) != 1)
		failed = failed ? failed : kc_fail(err, EPIPE, "QEMU is gone");
	if (failed && failed != -ECANCELED)
		return failed;
	rc = end(g, e, done, &heard, err);
	t[7] = kc_now_us();
	if (stale && (!rc || rc == -EAGAIN)) {
		rc = guest_refresh_layout(g, err);
		return rc ? rc : kc_fail(err, EAGAIN, "the guest's memory slots have been changed");
	}
	if (rc)
		return rc;

	return guest_finish(g, e, t, err);
}
