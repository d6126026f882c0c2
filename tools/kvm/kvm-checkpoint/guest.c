// SPDX-License-Identifier: GPL-2.0-only
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guest.h"
#include "identity.h"

/* The tests have no such patience */
#ifndef QMP_TIMEOUT_MS
#define QMP_TIMEOUT_MS	10000
#endif

/*
 * Opening
 */

int guest_give_fd(struct guest *g, const char *name, int fd, struct kc_err *err)
{
	struct json_object *args = json_object_new_object();
	int rc;

	json_object_object_add(args, "fdname", json_object_new_string(name));
	rc = qmp_send(&g->qmp, "getfd", args, fd, err);
	return rc ? rc : qmp_receive(&g->qmp, "getfd", NULL, err);
}

static int begin_logging(struct guest *g, struct kc_err *err)
{
	struct json_object *args, *layout = NULL;
	uint64_t until = kc_now_us() + 2000000;
	struct kc_err why;
	int pair[2], rc;

	g->buffer = memfd_create("kvm-checkpoint", MFD_CLOEXEC);
	if (g->buffer < 0)
		return kc_fail(err, errno, "memfd_create: %s", strerror(errno));
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		return kc_fail(err, errno, "socketpair: %s", strerror(errno));
	g->sock = pair[0];

	do {
		rc = guest_give_fd(g, "kvm-checkpoint-socket", pair[1], err);
		if (!rc)
			rc = guest_give_fd(g, "kvm-checkpoint-buffer", g->buffer, err);
		if (rc)
			break;
		args = json_object_new_object();
		json_object_object_add(args, "socket",
				       json_object_new_string("kvm-checkpoint-socket"));
		json_object_object_add(args, "buffer",
				       json_object_new_string("kvm-checkpoint-buffer"));
		rc = qmp_call(&g->qmp, "x-checkpoint-attach", args, &layout, &why);
		if (!rc)
			break;
		/* One that was killed a moment ago may still be known to QEMU */
		if (strstr(why.text, "attached already") && kc_now_us() < until) {
			usleep(50000);
			if (g->qmp.idle)
				g->qmp.idle(g->qmp.idle_ctx);
			continue;
		}
		if (strstr(why.text, "has not been found"))
			kc_fail(&why, EOPNOTSUPP,
				"this QEMU has no x-checkpoint-attach: build it with the patch in qemu/");
		kc_fail(err, -rc, "%s", why.text);
		break;
	} while (1);
	close(pair[1]);
	if (rc)
		return rc;
	rc = guest_take_layout(g, layout, err);
	json_object_put(layout);
	return rc;
}

/* QEMU counts in the guest's pages, but the log of KVM, which is read here, in the host's */
static int check_host(struct kc_err *err)
{
	long size = sysconf(_SC_PAGESIZE);

	if (size == (long)KC_PAGE_SIZE)
		return 0;
	return kc_fail(err, EOPNOTSUPP,
		       "this host's pages are of %ld bytes, and KVM logs none that are smaller: a guest can be protected only where they are of %u",
		       size, KC_PAGE_SIZE);
}

static int open_guest(struct guest *g, const struct guest_opts *opts, bool again,
		      struct kc_err *err)
{
	/* QEMU was once what it should be, if "again": it needs only time */
	unsigned int timeout_ms = opts->qemu_timeout_ms;
	int rc;

	/* Else somebody else may be its client: that is to be told, but not sooner than was asked. */
	if (!again && timeout_ms < QMP_TIMEOUT_MS)
		timeout_ms = QMP_TIMEOUT_MS;

	memset(g, 0, sizeof(*g));
	g->opts = *opts;
	g->lease_us = GUEST_NO_LEASE;
	g->sock = -1;
	g->buffer = -1;
	g->packets_fd = -1;
	g->id.page_size = KC_PAGE_SIZE;
	g->id.blocks = g->block_ids;
	g->id.disks = g->disk_ids;
	g->qmp.fd = -1;

	rc = check_host(err);
	if (!rc)
		rc = qmp_open(&g->qmp, opts->qmp, timeout_ms, opts->idle, opts->idle_ctx, err);
	if (!rc)
		rc = guest_check_attached(g, err);
	if (!rc)
		rc = kc_identify(&g->qmp, &g->id, err);
	if (!rc)
		rc = begin_logging(g, err);
	if (!rc)
		g->qmp.timeout_ms = opts->qemu_timeout_ms;
	return rc;
}

int guest_open(struct guest *g, const struct guest_opts *opts, struct kc_err *err)
{
	return open_guest(g, opts, false, err);
}

int guest_reopen(struct guest *g, struct kc_err *err)
{
	struct guest_opts opts = g->opts;
	char *before = g->devices;
	int rc;

	g->devices = NULL;
	guest_close(g);
	rc = open_guest(g, &opts, true, err);
	if (!rc && before)
		rc = guest_check_devices(g, before, err);
	free(before);
	return rc;
}

void guest_close(struct guest *g)
{
	unsigned int i;

	guest_close_log(g);
	guest_close_states(g);
	guest_close_hints(g);
	for (i = 0; i < g->id.nr_blocks; i++) {
		if (g->blocks[i].map) {
			munmap((void *)g->blocks[i].map, g->block_ids[i].npages * KC_PAGE_SIZE);
			close(g->blocks[i].fd);
		}
		free(g->dirty.bits[i]);
	}
	free(g->dirty.words);
	free(g->devices);
	if (g->sock >= 0)
		close(g->sock);
	if (g->buffer >= 0)
		close(g->buffer);
	if (g->packets_fd >= 0)
		close(g->packets_fd);
	qmp_close(&g->qmp);
	memset(g, 0, sizeof(*g));
	g->sock = -1;
	g->buffer = -1;
	g->packets_fd = -1;
	g->qmp.fd = -1;
}

/*
 * Collecting
 */

int guest_read_buffer(struct guest *g, void *to, size_t size, uint64_t offset, struct kc_err *err)
{
	while (size) {
		ssize_t n = pread(g->buffer, to, size, offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return kc_fail(err, EPROTO, "QEMU wrote less to the buffer than it said");
		to = (char *)to + n;
		size -= n;
		offset += n;
	}
	return 0;
}

static int send_collect(struct guest *g, bool state, struct kc_err *err)
{
	struct json_object *args = json_object_new_object();

	json_object_object_add(args, "state", json_object_new_boolean(state));
	return qmp_send(&g->qmp, "x-checkpoint-collect", args, -1, err);
}

int guest_refresh_layout(struct guest *g, struct kc_err *err)
{
	struct json_object *layout = NULL;
	int rc;

	rc = qmp_call(&g->qmp, "x-checkpoint-layout", NULL, &layout, err);
	if (!rc)
		rc = guest_take_layout(g, layout, err);
	json_object_put(layout);
	/* What is new may have no state that QEMU knows of, and one of its own */
	if (!rc)
		rc = guest_check_attached(g, err);
	return rc == -EOPNOTSUPP ? -ESTALE : rc;
}

int guest_take_runs(struct guest *g, uint64_t offset, uint64_t nr, struct kc_err *err)
{
	struct qemu_run runs[256];
	int rc;

	while (nr) {
		unsigned int i, n = nr < 256 ? nr : 256;

		rc = guest_read_buffer(g, runs, n * sizeof(*runs), offset, err);
		if (rc)
			return rc;
		for (i = 0; i < n; i++) {
			int block = guest_block_of(g, runs[i].block);

			if (block < 0 || runs[i].page > g->block_ids[block].npages ||
			    runs[i].npages > g->block_ids[block].npages - runs[i].page)
				return kc_fail(err, ESTALE,
					       "QEMU reports pages of memory that was not there before: protect the guest anew");
			rc = dirty_add(&g->dirty, block, runs[i].page, runs[i].npages);
			if (rc)
				return kc_fail(err, -rc, "no memory for the list of dirty pages");
		}
		nr -= n;
		offset += n * sizeof(*runs);
	}
	return 0;
}

/*
 * The answer to send_collect(): QEMU's pages become dirty, and new slots known.  @e: for what is said
 * of the state, or NULL
 */
static int finish_collect(struct guest *g, struct guest_epoch *e, uint64_t *collect_us,
			  struct kc_err *err)
{
	struct json_object *info = NULL;
	uint64_t nr, offset, generation;
	int rc;

	rc = qmp_receive(&g->qmp, "x-checkpoint-collect", &info, err);
	if (rc)
		return rc;
	nr = qmp_u64(info, "runs");
	offset = qmp_u64(info, "offset");
	generation = qmp_u64(info, "generation");
	if (e) {
		e->state_len = qmp_u64(info, "state-size");
		e->packets = qmp_u64(info, "packets");
		*collect_us = qmp_u64(info, "collect-us");
	}
	g->dirty.has_holes |= qmp_bool(info, "discarded");
	/* Of a guest that stands still it was told when it was stopped */
	if (!e)
		guest_read_states(g, info);
	json_object_put(info);

	rc = guest_take_runs(g, offset, nr, err);
	if (rc)
		return rc;
	return generation != g->generation ? guest_refresh_layout(g, err) : 0;
}

int guest_collect(struct guest *g, struct kc_err *err)
{
	int rc = send_collect(g, false, err);

	if (!rc)
		rc = finish_collect(g, NULL, NULL, err);
	return rc ? rc : guest_harvest(g, err);
}

int guest_copy_running(struct guest *g, struct guest_epoch *e, uint64_t max, struct kc_err *err)
{
	copy_reset(&e->copy);
	if (guest_copy_dirty(g, &e->copy, max))
		return kc_fail(err, ENOMEM, "no memory for copies of dirty pages");
	copy_sort(&e->copy);
	return 0;
}

int guest_undo_copy(struct guest *g, struct copy *c)
{
	int rc = 0;

	for (; c->nr && !rc; c->nr--)
		rc = dirty_add(&g->dirty, c->pages[c->nr - 1].block, c->pages[c->nr - 1].page, 1);
	for (; c->nr_holes && !rc; c->nr_holes--) {
		const struct copied_hole *h = &c->holes[c->nr_holes - 1];

		rc = dirty_add(&g->dirty, h->block, h->page, h->n);
		g->dirty.has_holes = true;
	}
	/* Whether the guest still stood still when they were left out is not known */
	for (; c->nr_dropped && !rc; c->nr_dropped--) {
		const struct dropped_word *w = &c->dropped[c->nr_dropped - 1];
		uint64_t left;

		for (left = w->bits; left && !rc; left &= left - 1)
			rc = dirty_add(&g->dirty, w->block, w->word * 64 + __builtin_ctzll(left), 1);
	}
	return rc;
}

static int take_paused(struct guest *g, struct guest_epoch *e, uint64_t t[], struct kc_err *err)
{
	uint64_t collect_us = 0;
	int rc;

	/* QEMU cannot be asked about slots that have come, as it works: they come below */
	rc = guest_harvest_known(g, err);
	if (rc && rc != -ESTALE)
		return rc;
	rc = guest_check_skipped(g, err);
	if (rc)
		return rc;
	t[2] = kc_now_us();
	if (guest_copy_dirty(g, &e->copy, UINT64_MAX))
		return kc_fail(err, ENOMEM, "no memory for copies of dirty pages");
	t[3] = kc_now_us();
	rc = finish_collect(g, e, &collect_us, err);
	t[4] = kc_now_us();
	/*
	 * Once more: pages that were written while the state was saved, and slots that are new.
	 * If a page is in both copies, the later one comes later.
	 */
	if (!rc)
		rc = guest_harvest(g, err);
	if (rc)
		return rc;
	t[5] = kc_now_us();
	if (guest_copy_dirty(g, &e->copy, UINT64_MAX))
		return kc_fail(err, ENOMEM, "no memory for copies of dirty pages");
	t[6] = kc_now_us();
	/* QEMU saves the state and then looks for pages; the latter is a harvest */
	t[4] -= collect_us < t[4] - t[3] ? collect_us : t[4] - t[3];
	return 0;
}

static int fetch_state(struct guest *g, struct guest_epoch *e, struct kc_err *err)
{
	if (!e->state_len || e->state_len > KC_STATE_MAX)
		return kc_fail(err, EPROTO, "QEMU saved %zu bytes of device state", e->state_len);
	if (e->state_len > e->state_max) {
		void *p = realloc(e->state, e->state_len + 65536);

		if (!p)
			return kc_fail(err, ENOMEM, "no memory for the device state");
		e->state = p;
		e->state_max = e->state_len + 65536;
	}
	return guest_read_buffer(g, e->state, e->state_len, 0, err);
}

int guest_finish(struct guest *g, struct guest_epoch *e, const uint64_t t[], struct kc_err *err)
{
	e->us[KC_PAUSE_STOP] = t[1] - t[0];
	e->us[KC_PAUSE_HARVEST] = t[2] - t[1] + t[5] - t[4];
	e->us[KC_PAUSE_COPY] = t[3] - t[2] + t[6] - t[5];
	e->us[KC_PAUSE_STATE] = t[4] - t[3];
	e->us[KC_PAUSE_RESUME] = t[7] - t[6];
	copy_sort(&e->copy);
	return fetch_state(g, e, err);
}

int guest_send_stop(struct guest *g, const char *command, struct kc_err *err)
{
	struct json_object *args = json_object_new_object();

	json_object_object_add(args, "limit-ms", json_object_new_int64(g->opts.pause_limit_ms));
	if (g->lease_us != GUEST_NO_LEASE)
		json_object_object_add(args, "lease-us", json_object_new_uint64(g->lease_us));
	if (g->lease_us != GUEST_NO_LEASE && g->lease_first)
		json_object_object_add(args, "lease-first", json_object_new_boolean(true));
	return qmp_send(&g->qmp, command, args, -1, err);
}

int guest_end_lease(const struct guest_opts *opts, struct kc_err *err)
{
	struct json_object *args;
	struct qmp q;
	int rc;

	rc = qmp_open(&q, opts->qmp, QMP_TIMEOUT_MS, NULL, NULL, err);
	if (rc)
		return rc;
	args = json_object_new_object();
	json_object_object_add(args, "until-us", json_object_new_uint64(0));
	rc = qmp_call(&q, "x-checkpoint-lease", args, NULL, err);
	qmp_close(&q);
	return rc;
}

int guest_spoilt(const struct guest *g, const char *by, struct kc_err *err)
{
	if (!strcmp(by, "late"))
		return kc_fail(err, EAGAIN,
			       "the checkpoint took longer than the %u ms of --pause-limit, and the guest went on",
			       g->opts.pause_limit_ms);
	if (!strcmp(by, "reset"))
		return kc_fail(err, EAGAIN, "the guest was reset during a checkpoint");
	if (!strcmp(by, "run-state"))
		return kc_fail(err, EAGAIN,
			       "the guest was about to stop or to be reset during a checkpoint");
	if (!strcmp(by, "flush"))
		return kc_fail(err, EAGAIN,
			       "what the guest wrote to its disks could not be flushed for a checkpoint");
	if (!strcmp(by, "written"))
		return kc_fail(err, EAGAIN,
			       "somebody else has written to the guest's memory during a checkpoint");
	return kc_fail(err, EAGAIN, "somebody else has resumed the guest during a checkpoint");
}

/* There is nothing to take.  Returns why, as guest_take() does. */
static int take_nothing(struct guest *g, const struct guest_epoch *e, const char *lost,
			const char *blocked, struct kc_err *err)
{
	int rc;

	rc = finish_collect(g, NULL, NULL, err);
	if (!rc)
		rc = qmp_call(&g->qmp, "x-checkpoint-cont", NULL, NULL, err);
	if (rc)
		return rc;
	if (*lost)
		return kc_fail(err, EUCLEAN, "the guest's memory has been changed (%s)", lost);
	if (*blocked)
		return kc_fail(err, ENODATA, "the guest cannot be migrated any more: %s", blocked);
	return kc_fail(err, ENODATA, "the guest's run state is %s", e->status);
}

int guest_take(struct guest *g, struct guest_epoch *e, struct kc_err *err)
{
	struct json_object *o = NULL;
	uint64_t t[8] = { 0 };
	bool consistent, loadable;
	struct kc_err why;
	char lost[200], blocked[200];
	int rc;

	guest_ready_copy(g, &e->copy);
	copy_reset(&e->copy);
	e->resumed = false;
	rc = guest_take_brief(g, e, err);
	if (rc <= 0)
		return rc;
	t[0] = kc_now_us();
	e->taken_us = t[0];
	if (g->opts.stopping)
		g->opts.stopping(g->opts.idle_ctx);
	rc = guest_send_stop(g, "x-checkpoint-stop", err);
	if (!rc)
		rc = send_collect(g, true, err);
	if (!rc)
		rc = qmp_receive(&g->qmp, "x-checkpoint-stop", &o, err);
	if (rc)
		return rc;
	if (g->opts.stopped)
		g->opts.stopped(g->opts.idle_ctx);
	t[1] = kc_now_us();
	e->was_running = qmp_bool(o, "running");
	snprintf(e->status, sizeof(e->status), "%s", qmp_str(o, "status"));
	/* With -no-shutdown QEMU lives on: if it goes, then that is not why */
	if (!strcmp(e->status, "shutdown"))
		g->qmp.shutdown = false;
	snprintf(lost, sizeof(lost), "%s", qmp_str(o, "lost"));
	snprintf(blocked, sizeof(blocked), "%s", qmp_str(o, "blocked"));
	loadable = qmp_bool(o, "loadable");
	guest_read_states(g, o);
	/* Before the first copy: to read what was given back would be to take it back */
	g->dirty.has_holes |= qmp_bool(o, "discarded");
	json_object_put(o);
	if (*lost || !loadable)
		return take_nothing(g, e, lost, blocked, err);

	rc = take_paused(g, e, t, err);
	if (rc)
		return rc;

	/* By its owner's command, which nothing that we do later undoes. */
	if (e->last) {
		rc = qmp_call(&g->qmp, "stop", NULL, NULL, err);
		if (rc)
			return rc;
	}
	o = NULL;
	rc = qmp_call(&g->qmp, "x-checkpoint-cont", NULL, &o, err);
	t[7] = kc_now_us();
	if (rc)
		return rc;
	e->resumed = qmp_bool(o, "resumed");
	snprintf(e->waits_for, sizeof(e->waits_for), "%s", qmp_str(o, "waits-for"));
	consistent = qmp_bool(o, "consistent");
	if (!consistent)
		guest_spoilt(g, qmp_str(o, "spoilt-by"), &why);
	json_object_put(o);
	if (!consistent && guest_undo_copy(g, &e->copy))
		return kc_fail(err, ENOMEM, "no memory for the list of dirty pages");
	if (!consistent)
		return kc_fail(err, EAGAIN, "%s", why.text);

	return guest_finish(g, e, t, err);
}

bool guest_died(struct guest *g)
{
	uint64_t until = kc_now_us() + 2000000;
	char buf[256];
	ssize_t n = 1;

	/* Only the end of QEMU's process closes its end of this one, after what it has said */
	while (n > 0 && g->sock >= 0 && !qmp_wait(&g->qmp, g->sock, POLLIN | POLLRDHUP, until))
		n = recv(g->sock, buf, sizeof(buf), MSG_DONTWAIT);
	return n == 0;
}
