// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint protect: taking epochs and handing them to the sink.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "protect.h"

/* The first copy is made while the guest runs, until so few pages are left or this many passes */
#define FEW_PAGES	2048
#define MAX_PASSES	5

/* How soon after it was found that there can be no epoch it is tried again */
#define AGAIN_US	50000
/* How often QEMU is asked how far it is with disks */
#define READY_US	20000

/* How often in a row somebody may interfere with an epoch */
#define MAX_TRIES	50

/* What a standby may need to try to load an epoch, on top of what sending it may take */
#define LOAD_MS		30000

enum where kc_epoch_wait(struct protect *p, uint64_t until_us, int *rc, struct kc_err *err)
{
	struct guest *g = &p->guest;
	bool watch = p->max_dirty && g->log;
	enum where where;

	for (;;) {
		uint64_t now = kc_now_us();
		bool ready, full, soon, another;

		where = kc_link_look(p, rc, err);
		if (where != OK)
			return where;
		/*
		 * Who waits for packets waits for all epochs before them, and one more is in the
		 * way.  So it is of the first one that may be taken over from, but disks do not
		 * wait.
		 */
		another = p->unheld ? kc_disks_full(p) : g->packets_fd < 0 || !g->holds;
		ready = p->acked + another >= p->nr;
		p->packets_wait = p->packets_wait || guest_packets_wait(g);
		soon = p->packets_wait || kc_net_proved(p);
		full = (watch && g->dirty.pages >= p->max_dirty) || kc_disks_full(p);
		if (p->acked >= p->nr && kc_switch_requested)
			return SWITCH;
		if (ready && !kc_switch_requested && (now >= until_us || full || soon))
			return OK;

		/* When it is due, it waits for an acknowledgement. */
		if (kc_sleep(p, now < until_us ? until_us : UINT64_MAX,
			     watch && !full ? g->log_fd : -1)) {
			*rc = guest_harvest(g, err);
			if (*rc)
				return GUEST;
		}
	}
}

/*
 * Epochs
 */

static int send_pages(struct protect *p, struct kc_err *err)
{
	struct copy *c = &p->epoch.copy;
	int rc = 0;
	size_t i;

	/* Before pages: what was copied of them was written to later */
	for (i = 0; i < c->nr_holes && !rc; i++)
		rc = kc_epoch_zeros(p->sink, c->holes[i].block, c->holes[i].page, c->holes[i].n,
				    true, err);
	if (rc)
		return rc;
	for (i = 0; i < c->nr; i++) {
		rc = kc_epoch_page(p->sink, c->pages[i].block, c->pages[i].page,
				   c->data + c->pages[i].at * KC_PAGE_SIZE, err);
		if (!rc && !(i % BATCH))
			rc = kc_link_poll(p, err);
		if (rc)
			return rc;
	}
	return 0;
}

/* What was taken goes to the sink; the epoch is open already */
static int send_epoch(struct protect *p, struct kc_err *err)
{
	int rc = send_pages(p, err);

	if (!rc)
		rc = kc_disks_send(p, err);
	if (!rc)
		rc = kc_epoch_state(p->sink, p->epoch.state, p->epoch.state_len,
				    (p->epoch.was_running ? 0 : KC_STATE_STOPPED) |
				    (p->taken_unheld ? KC_STATE_UNHELD : 0), err);
	if (!rc)
		rc = kc_epoch_commit(p->sink, err);
	if (rc)
		return rc;
	kc_net_sent(p);
	kc_status_epoch(p->status, p->nr, p->epoch.taken_us);
	if (p->epoch.was_running)
		kc_status_pause(p->status, p->epoch.us);
	kc_show_epoch(p);
	return kc_link_poll(p, err);
}

/* Once when it begins, and once when it is over */
static void tell_waiting(struct protect *p)
{
	const char *what = p->epoch.waits_for;

	if (*what && !p->waiting)
		kc_log(KC_LOG_WARN, "the guest has to wait until it can run: %s", what);
	else if (!*what && p->waiting)
		kc_log(KC_LOG_INFO, "the guest runs again");
	p->waiting = *what;
}

static enum where take_epoch(struct protect *p, int *rc, struct kc_err *err)
{
	unsigned int tries = 0;

	*rc = kc_net_hold(p, err);
	if (*rc)
		return GUEST;
	/* Before it is taken: what comes after that is of another, and is told of again */
	guest_packets_wait(&p->guest);
	p->packets_wait = false;
	do {
		*rc = guest_take(&p->guest, &p->epoch, err);
		if (!*rc || *rc == -EAGAIN)
			tell_waiting(p);
		if (*rc == -EAGAIN) {
			kc_log(KC_LOG_WARN, "%s: taking another", err->text);
			/* Not as fast as can be, and the standby must hear of us. */
			usleep(20000);
			kc_link_tick(p);
		}
	} while (*rc == -EAGAIN && !kc_stop_requested && ++tries < MAX_TRIES);
	/* Whatever does this to the guest, it does it all the time. */
	if (*rc == -EAGAIN && !kc_stop_requested)
		*rc = -EBUSY;
	if (*rc == -ENODATA) {
		kc_no_epochs(p, err->text);
		if (p->epoch.was_running)
			kc_net_stuck(p);
	} else if (!*rc) {
		kc_no_epochs(p, "");
	}
	return *rc == -EAGAIN ? STOPPED : *rc == -ENODATA ? NOT_NOW : *rc ? GUEST : OK;
}

enum where kc_epoch_next(struct protect *p, int *rc, struct kc_err *err)
{
	enum where where = take_epoch(p, rc, err);

	/* The last one stays what it is worth */
	if (where == NOT_NOW) {
		/* Nor must the guest wait for it with its disks */
		if (kc_disks_full(p))
			kc_disks_lost(p);
		return OK;
	}
	if (where != OK)
		return where;
	/* Nothing can have changed since */
	if (p->idle && !p->epoch.was_running && !p->epoch.copy.nr &&
	    !p->epoch.copy.nr_holes && !p->lease_ms && p->sent_unheld == p->taken_unheld &&
	    !kc_plugs_are_behind(p))
		return OK;
	p->idle = !p->epoch.was_running;

	kc_sent_note(p, p->nr + 1);
	*rc = kc_disks_check(p, err);
	if (!*rc)
		*rc = kc_epoch_begin(p->sink, p->nr + 1, 0, err);
	if (*rc)
		return SINK;
	p->nr++;
	*rc = send_epoch(p, err);
	p->epochs++;
	return *rc ? SINK : OK;
}

/*
 * The first epoch: all pages, or all that differ
 */

/*
 * Which of these pages the receiver lacks.  What is written meanwhile may be found to be the same
 * or not: it gets dirty, too.
 */
static int compare_chunk(struct protect *p, unsigned int b, uint64_t first, uint32_t n,
			 struct guest_holes *holes, bool *differs, struct kc_err *err)
{
	static uint8_t theirs[KC_DIGESTS_CHUNK * KC_DIGEST_SIZE];
	static uint8_t ours[KC_DIGESTS_CHUNK * KC_DIGEST_SIZE];
	static const uint8_t *pages[KC_DIGESTS_CHUNK];
	const struct guest_block *block = &p->guest.blocks[b];
	static const uint8_t zeros[KC_PAGE_SIZE];
	uint32_t i;
	int rc;

	rc = kc_sink_digests(p->sink, b, first, n, theirs, err);
	if (rc)
		return rc;
	for (i = 0; i < n; i++)
		pages[i] = guest_is_hole(holes, block->fd, first + i) ? zeros :
			   block->map + (first + i) * KC_PAGE_SIZE;
	kc_page_digests(pages, n, ours);
	for (i = 0; i < n; i++)
		differs[i] = memcmp(ours + i * KC_DIGEST_SIZE, theirs + i * KC_DIGEST_SIZE,
				    KC_DIGEST_SIZE);
	return 0;
}

static enum where copy_block(struct protect *p, unsigned int b, bool compare, uint64_t done,
			     uint64_t total, uint64_t *sent, uint64_t *unused, int *rc,
			     struct kc_err *err)
{
	static uint8_t page[KC_PAGE_SIZE];
	static bool differs[KC_DIGESTS_CHUNK];
	const struct guest_block *block = &p->guest.blocks[b];
	struct guest_holes holes = { 0, 0 }, compared = { 0, 0 };
	uint64_t npages = p->guest.block_ids[b].npages, i;
	enum where where;

	for (i = 0; i < npages; i++) {
		if (!(i % BATCH)) {
			kc_show_progress(p, compare ? "resync" : "full copy", done + i, total);
			where = kc_link_look(p, rc, err);
			if (where != OK)
				return where;
			*rc = kc_disks_pump(p, err);
			if (*rc)
				return SINK;
		}
		if (compare && !(i % KC_DIGESTS_CHUNK)) {
			uint64_t n = npages - i < KC_DIGESTS_CHUNK ? npages - i : KC_DIGESTS_CHUNK;

			*rc = compare_chunk(p, b, i, n, &compared, differs, err);
			if (*rc)
				return SINK;
		}
		if (compare && !differs[i % KC_DIGESTS_CHUNK])
			continue;
		if (guest_is_hinted(&p->guest, b, i) || guest_skips(&p->guest, b, i)) {
			/* Who compares may leave there what is there */
			*rc = compare ? 0 : kc_epoch_zeros(p->sink, b, i, 1, false, err);
			if (*rc)
				return SINK;
			++*unused;
			continue;
		}
		if (guest_is_hole(&holes, block->fd, i)) {
			*rc = kc_epoch_zeros(p->sink, b, i, 1, false, err);
		} else {
			memcpy(page, block->map + i * KC_PAGE_SIZE, KC_PAGE_SIZE);
			*rc = kc_epoch_page(p->sink, b, i, page, err);
		}
		if (*rc)
			return SINK;
		++*sent;
	}
	return OK;
}

static enum where copy_all(struct protect *p, bool compare, uint64_t *sent, uint64_t *unused,
			   int *rc, struct kc_err *err)
{
	const char *what = compare ? "resync" : "full copy";
	uint64_t done = 0, total = 0;
	enum where where;
	unsigned int b;

	for (b = 0; b < p->guest.id.nr_blocks; b++)
		total += p->guest.block_ids[b].npages;
	kc_status_phase(p->status, what);
	p->started_us = kc_now_us();
	for (b = 0; b < p->guest.id.nr_blocks; b++) {
		where = copy_block(p, b, compare, done, total, sent, unused, rc, err);
		if (where != OK)
			return where;
		done += p->guest.block_ids[b].npages;
	}
	kc_show_progress(p, what, total, total);
	return OK;
}

/* What QEMU copies comes when it likes: until all of it has */
static enum where copy_disks(struct protect *p, int *rc, struct kc_err *err)
{
	uint64_t done, total;
	enum where where;
	bool ready;

	if (!p->guest.id.nr_disks)
		return OK;
	kc_status_phase(p->status, "copy of disks");
	p->started_us = kc_now_us();
	for (;;) {
		where = kc_link_look(p, rc, err);
		if (where != OK)
			return where;
		*rc = kc_disks_check(p, err);
		if (!*rc)
			*rc = kc_disks_pump(p, err);
		if (*rc)
			return SINK;
		*rc = kc_disks_ready(p, &ready, &done, &total, err);
		if (*rc)
			return GUEST;
		kc_show_progress(p, "copy of disks", ready ? total / KC_PAGE_SIZE :
				 done / KC_PAGE_SIZE, total / KC_PAGE_SIZE);
		if (ready)
			return OK;
		kc_sleep(p, kc_now_us() + READY_US, -1);
	}
}

/* An epoch is open, and what is written from now on is known; or was, if it goes on with an older one */
static enum where begin_first(struct protect *p, bool compare, bool again, int *rc,
			      struct kc_err *err)
{
	uint64_t last = kc_sink_last_epoch(p->sink);

	*rc = kc_net_begin(p, err);
	if (!*rc)
		*rc = guest_collect(&p->guest, err);
	if (*rc)
		return GUEST;
	/* What is dirty by now will be read after this */
	if (!again)
		dirty_forget(&p->guest.dirty);

	if (p->nr < last)
		p->nr = last;
	*rc = kc_epoch_begin(p->sink, p->nr + 1, kc_sink_start(p->sink), err);
	if (*rc)
		return SINK;
	p->nr++;
	*rc = guest_note_skipped(&p->guest, again, err);
	if (!*rc && !again)
		*rc = guest_begin_hints(&p->guest, err);
	if (!*rc && !kc_disks_again(p))
		*rc = kc_disks_begin(p, compare, err);
	return *rc ? GUEST : OK;
}

/* What was written meanwhile, until there is little of it, or no less than before */
static enum where copy_rest(struct protect *p, uint64_t *sent, int *rc, struct kc_err *err)
{
	uint64_t before = UINT64_MAX;
	unsigned int pass;

	for (pass = 0; pass < MAX_PASSES; pass++) {
		*rc = guest_collect(&p->guest, err);
		/* What is used by now need not wait for the pause */
		if (!*rc)
			*rc = guest_check_skipped(&p->guest, err);
		if (*rc)
			return GUEST;
		if (p->guest.dirty.pages <= FEW_PAGES || p->guest.dirty.pages > before / 10 * 9)
			break;
		before = p->guest.dirty.pages;
		while (p->guest.dirty.pages) {
			if (kc_stop_requested)
				return STOPPED;
			*rc = guest_copy_running(&p->guest, &p->epoch, BATCH, err);
			if (*rc)
				return GUEST;
			kc_sent_note(p, p->nr);
			*rc = send_pages(p, err);
			if (*rc)
				return SINK;
			*sent += p->epoch.copy.nr;
			*rc = kc_disks_pump(p, err);
			if (*rc)
				return SINK;
		}
	}
	return OK;
}

/* As take_epoch(), until there can be one */
static enum where take_first(struct protect *p, int *rc, struct kc_err *err)
{
	enum where where;

	while ((where = take_epoch(p, rc, err)) == NOT_NOW) {
		where = kc_link_look(p, rc, err);
		if (where != OK)
			break;
		*rc = kc_disks_pump(p, err);
		if (*rc)
			return SINK;
		usleep(AGAIN_US);
	}
	return where;
}

enum where kc_epoch_first(struct protect *p, int *rc, struct kc_err *err)
{
	bool compare = kc_sink_start(p->sink) & KC_EPOCH_RESYNC;
	bool again = compare && kc_sent_again(p);
	uint64_t sent = 0, unused = 0, differed;
	enum where where;
	struct kc_err why;
	int ended;

	where = begin_first(p, compare, again, rc, err);
	if (where != OK)
		return where;
	if (!again)
		where = copy_all(p, compare, &sent, &unused, rc, err);
	/* Whatever comes of it, the guest gets its pages back */
	ended = guest_end_hints(&p->guest, where == OK ? err : &why);
	if (ended && where == OK) {
		*rc = ended;
		return GUEST;
	}
	if (where == OK)
		where = copy_disks(p, rc, err);
	if (where != OK)
		return where;
	differed = again ? p->guest.dirty.pages : sent;
	where = copy_rest(p, &sent, rc, err);
	if (where != OK)
		return where;

	/*
	 * That it has arrived may never be known here, and then it is taken over from.  If there is
	 * a lease already it ends when it has to.  One that is not taken over from needs none: the
	 * next one gets it when this one is acknowledged, which may take longer than a lease.
	 */
	if (p->lease_ms && !p->unheld)
		guest_lease(&p->guest, kc_boot_us() + p->lease_ms * 1000ull, true);
	where = take_first(p, rc, err);
	if (where != OK)
		return where;
	guest_forget_skipped(&p->guest);
	sent += p->epoch.copy.nr;
	/* What was taken is in no log any more, whatever comes of it */
	kc_sent_note(p, p->nr);
	*rc = kc_disks_check(p, err);
	if (!*rc)
		*rc = send_epoch(p, err);
	if (*rc)
		return SINK;
	p->disks.compare = false;
	p->disks.keeps = true;
	if (!again)
		p->known_from = p->nr;
	p->idle = !p->epoch.was_running;
	if (compare && !again)
		kc_status_resync(p->status);
	/* Protected means that the receiver says that it is of use. */
	p->first = (struct first){ .nr = p->nr, .sent = sent, .unused = unused, .differed = differed,
				   .compared = compare, .continued = again };
	kc_status_phase(p->status, "sent");
	*rc = kc_link_poll(p, err);
	return *rc ? SINK : OK;
}

enum where kc_epoch_last(struct protect *p, int *rc, struct kc_err *err)
{
	/* Whatever comes of it, what is written after that is of no epoch. */
	kc_sent_forget(p);
	p->epoch.last = true;
	p->taken_unheld = p->unheld;
	*rc = guest_take(&p->guest, &p->epoch, err);
	p->epoch.last = false;
	if (*rc)
		return GUEST;
	*rc = kc_disks_check(p, err);
	if (!*rc)
		*rc = kc_epoch_begin(p->sink, p->nr + 1, 0, err);
	if (*rc)
		return SINK;
	p->nr++;
	*rc = send_epoch(p, err);
	if (!*rc)
		*rc = kc_sink_wait(p->sink, p->nr, p->opts.io_timeout_ms + LOAD_MS, err);
	if (!*rc)
		*rc = kc_link_poll(p, err);
	return *rc ? SINK : OK;
}
