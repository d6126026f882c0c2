// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint protect: takes epochs of a running guest and hands them to a sink.
 *
 * One thread does it all, so that heartbeats stop when epochs do.  While a sink is slow the guest
 * runs, and the next epoch is longer; it is never paused for the sink.
 *
 * Whenever it is not known what the receiver holds (a lost link, this daemon was restarted, QEMU
 * refused something), all of the guest's memory is compared with it by digests and what differs is
 * sent.
 */
#include <errno.h>
#include <getopt.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "guest.h"
#include "sink.h"
#include "status.h"

/* The first copy is made while the guest runs, until so few pages are left or this many passes */
#define FEW_PAGES	2048
#define MAX_PASSES	5

/* Pages copied of the running guest at a time */
#define BATCH		256

/* How often in a row somebody may interfere with an epoch */
#define MAX_TRIES	50

#define TICK_MS		50
#define MAX_RETRY_MS	500

static const char usage_text[] =
"usage: kvm-checkpoint protect --qmp SOCKET --to tcp:HOST:PORT|DIR [OPTION]...\n"
"\n"
"Keeps a copy of a running QEMU/KVM guest at a standby or in a directory: all of its\n"
"memory first, then an epoch at each interval, for which the guest is paused as long as\n"
"it takes to copy what it has written.  QEMU has to be built with the project's patch and\n"
"started with\n"
"  -accel kvm,dirty-slot-ring-size=4096          (not necessary, but fast)\n"
"  -object memory-backend-memfd,id=ram0,size=SIZE,share=on -machine memory-backend=ram0\n"
"  -vga none -qmp unix:SOCKET,server=on,wait=off (a monitor for this program alone)\n"
"\n"
"  --qmp SOCKET          of QEMU's monitor\n"
"  --to WHERE            tcp:HOST:PORT of a standby, or a directory for a chain of epochs\n"
"  --interval TIME       from one epoch to the next (default 100ms)\n"
"  --max-dirty N         an epoch sooner, when N pages were written; only with slot rings,\n"
"                        and noticed when a ring is half full (default 8192, 0 for never)\n"
"  --disk external       the guest may have writable disks: storage is taken care of\n"
"  --control PATH        unix socket for status and detach\n"
"  --epochs N            end after N epochs; the guest runs on\n"
"  --json                progress, epochs and messages as JSON, one object a line\n";

static const char usage_end[] =
"\n"
"Needs no privileges but access to QEMU's socket: run it as QEMU's user, not as root.\n"
"Ends with 0 when it was told to (SIGTERM, SIGINT, SIGHUP, detach, --epochs) or the guest\n"
"was shut down, 1 after a failure, which it is too if the standby could not be told of\n"
"that, 2 for a mistake in the command line.\n";

struct protect {
	const char *qmp, *to, *control;
	unsigned int interval_ms;
	uint64_t max_dirty, max_epochs;
	bool external, json;
	struct kc_sink_opts opts;

	struct guest guest;
	struct guest_epoch epoch;
	struct kc_sink *sink;
	int lost;		/* what while_qemu_works() found out of it, and why */
	struct kc_err lost_err;
	struct kc_status *status;
	uint64_t nr;		/* of the newest epoch that was begun */
	uint64_t acked, epochs;
	bool was_acked;		/* the receiver once had a complete epoch */
	bool idle;		/* the guest is stopped, and its last epoch says all */
	bool tty;
	unsigned int unread;	/* lines that were not shown, as nobody reads them */
	uint64_t started_us, shown_us;
};

/* Who failed, with what errno */
enum where { OK, GUEST, SINK, STOPPED };

static atomic_bool stop_requested;

/*
 * A directory's epochs are all read when it is opened, which may take minutes.  Nothing is begun by
 * then, and there is nobody to say goodbye to.
 */
static volatile sig_atomic_t may_exit;

static void on_signal(int sig)
{
	(void)sig;
	stop_requested = true;
	if (may_exit)
		_exit(0);
}

static char *on_command(void *ctx, const char *line, bool *ok)
{
	(void)ctx;
	*ok = !strcmp(line, "detach");
	if (*ok)
		stop_requested = true;
	return strdup(*ok ? "the guest runs on, without protection" :
			    "no such command; there is: detach");
}

/*
 * What is shown
 */

/*
 * Whoever reads this may be slow, or have stopped; a primary that waits for them looks dead to its
 * standby.
 */
static void show(struct protect *p, const char *text, const char *end)
{
	if (!kc_can_write(STDOUT_FILENO)) {
		p->unread++;
		return;
	}
	if (p->unread && p->json)
		printf("{\"event\":\"lost\",\"lines\":%u}\n", p->unread);
	else if (p->unread)
		printf("(%u lines that nobody has read are left out)\n", p->unread);
	p->unread = 0;
	fputs(text, stdout);
	fputs(end, stdout);
	fflush(stdout);
}

static void __attribute__((format(printf, 2, 3))) showf(struct protect *p, const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	show(p, text, "");
}

static void show_json(struct protect *p, struct json_object *o)
{
	if (p->json)
		show(p, json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN), "\n");
	json_object_put(o);
}

static void add(struct json_object *o, const char *name, uint64_t value)
{
	json_object_object_add(o, name, json_object_new_uint64(value));
}

static struct json_object *event(const char *name)
{
	struct json_object *o = json_object_new_object();

	json_object_object_add(o, "event", json_object_new_string(name));
	return o;
}

static void show_progress(struct protect *p, const char *what, uint64_t done, uint64_t total)
{
	uint64_t now = kc_now_us(), spent = now - p->started_us, rate, left;
	bool end = done == total;

	kc_status_progress(p->status, done, end ? 0 : total);
	if (now - p->shown_us < (p->tty || p->json ? 200000 : 5000000) && !end)
		return;
	p->shown_us = now;
	rate = spent ? done * 1000000 / spent : 0;
	left = rate ? (total - done) / rate : 0;
	if (p->json) {
		struct json_object *o = event("progress");

		json_object_object_add(o, "phase", json_object_new_string(what));
		add(o, "pages", done);
		add(o, "total", total);
		add(o, "pages_per_second", rate);
		add(o, "seconds_left", left);
		show_json(p, o);
		return;
	}
	showf(p, "%s%s: %3lu%% of %lu MiB, %lu MiB/s, %lu s left%s", p->tty ? "\r\033[K" : "", what,
	      total ? done * 100 / total : 100, total >> 8, rate >> 8, left,
	      p->tty && !end ? "" : "\n");
}

static void show_epoch(struct protect *p)
{
	static const char * const parts[] = {
		[KC_PAUSE_STOP] = "stop_us",
		[KC_PAUSE_HARVEST] = "harvest_us",
		[KC_PAUSE_STATE] = "state_us",
		[KC_PAUSE_COPY] = "copy_us",
		[KC_PAUSE_RESUME] = "resume_us",
	};
	struct guest_epoch *e = &p->epoch;
	struct kc_sink_stats stats;
	struct json_object *o;
	uint64_t sum = 0;
	int i;

	if (!p->json)
		return;
	kc_sink_stats(p->sink, &stats);
	o = event("epoch");
	add(o, "epoch", p->nr);
	add(o, "taken_us", e->taken_us);
	add(o, "pages", e->copy.nr);
	add(o, "state_bytes", e->state_len);
	add(o, "wire_bytes", stats.wire_bytes);
	for (i = 0; i < KC_PAUSE_PARTS; i++) {
		add(o, parts[i], e->us[i]);
		sum += e->us[i];
	}
	add(o, "pause_us", sum);
	add(o, "done_us", kc_now_us());
	json_object_object_add(o, "was_running", json_object_new_boolean(e->was_running));
	show_json(p, o);
}

/*
 * Between epochs
 */

static int poll_sink(struct protect *p, struct kc_err *err)
{
	uint64_t acked = p->acked;
	int rc = kc_sink_poll(p->sink, &acked, err);

	if (acked > p->acked) {
		struct json_object *o = event("acked");

		p->acked = acked;
		p->was_acked = true;
		add(o, "epoch", acked);
		show_json(p, o);
	}
	if (!rc) {
		struct kc_sink_stats stats;

		kc_sink_stats(p->sink, &stats);
		kc_status_sink(p->status, &stats);
	}
	return rc;
}

/* Heartbeats while QEMU works; an error is of interest when the sink is used next */
static void while_qemu_works(void *ctx)
{
	struct protect *p = ctx;

	if (p->sink && !p->lost)
		p->lost = poll_sink(p, &p->lost_err);
}

/*
 * Waits until the next epoch is due: the time has come, or enough is dirty, and the last epoch but
 * one has been acknowledged.
 */
static enum where wait_for_epoch(struct protect *p, uint64_t until_us, int *rc, struct kc_err *err)
{
	struct guest *g = &p->guest;
	bool watch = p->max_dirty && g->nr_logs;
	struct pollfd fds[2 + g->nr_logs];
	unsigned int i;

	for (;;) {
		uint64_t now = kc_now_us();
		bool ready = p->acked + 1 >= p->nr, full = false;
		int ms;

		if (stop_requested)
			return STOPPED;
		*rc = qmp_poll(&g->qmp, err);
		if (*rc)
			return GUEST;
		*rc = poll_sink(p, err);
		if (*rc)
			return SINK;
		full = watch && g->dirty.pages >= p->max_dirty;
		if (ready && (now >= until_us || full))
			return OK;

		fds[0] = (struct pollfd){ .fd = g->qmp.fd, .events = POLLIN };
		fds[1] = (struct pollfd){ .fd = kc_sink_fd(p->sink), .events = POLLIN };
		for (i = 0; i < g->nr_logs; i++)
			fds[2 + i] = (struct pollfd){ .fd = g->logs[i].fd, .events = POLLIN };
		ms = now < until_us ? (until_us - now + 999) / 1000 : TICK_MS;
		if (ms > TICK_MS)
			ms = TICK_MS;
		if (poll(fds, watch && !full ? 2 + g->nr_logs : 2, ms) <= 0)
			continue;
		for (i = 0; watch && !full && i < g->nr_logs; i++) {
			if (!(fds[2 + i].revents & POLLIN))
				continue;
			*rc = guest_harvest(g, err);
			if (*rc)
				return GUEST;
			break;
		}
	}
}

/*
 * Epochs
 */

static int send_pages(struct protect *p, struct kc_err *err)
{
	struct copy *c = &p->epoch.copy;
	size_t i;
	int rc;

	for (i = 0; i < c->nr; i++) {
		rc = kc_epoch_page(p->sink, c->pages[i].block, c->pages[i].page,
				   c->data + c->pages[i].at * KC_PAGE_SIZE, err);
		if (!rc && !(i % BATCH))
			rc = poll_sink(p, err);
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
		rc = kc_epoch_state(p->sink, p->epoch.state, p->epoch.state_len,
				    !p->epoch.was_running, err);
	if (!rc)
		rc = kc_epoch_commit(p->sink, err);
	if (rc)
		return rc;
	kc_status_epoch(p->status, p->nr, p->epoch.taken_us);
	if (p->epoch.was_running)
		kc_status_pause(p->status, p->epoch.us);
	show_epoch(p);
	return poll_sink(p, err);
}

static enum where take_epoch(struct protect *p, int *rc, struct kc_err *err)
{
	unsigned int tries = 0;

	do {
		*rc = guest_take(&p->guest, &p->epoch, err);
		if (*rc == -EAGAIN) {
			kc_log(KC_LOG_WARN, "%s: taking another", err->text);
			/* Not as fast as can be, and the standby must hear of us. */
			usleep(20000);
			while_qemu_works(p);
		}
	} while (*rc == -EAGAIN && !stop_requested && ++tries < MAX_TRIES);
	/* Whatever does this to the guest, it does it all the time. */
	if (*rc == -EAGAIN && !stop_requested)
		*rc = -EBUSY;
	return *rc == -EAGAIN ? STOPPED : *rc ? GUEST : OK;
}

static enum where next_epoch(struct protect *p, int *rc, struct kc_err *err)
{
	enum where where = take_epoch(p, rc, err);

	if (where != OK)
		return where;
	/* Nothing can have changed since */
	if (p->idle && !p->epoch.was_running && !p->epoch.copy.nr)
		return OK;
	p->idle = !p->epoch.was_running;

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

/* Where a file has holes, asked once for each hole and what follows it */
struct holes {
	uint64_t hole_until, data_until;	/* pages */
};

static bool is_hole(struct holes *h, int fd, uint64_t page)
{
	off_t at = page * KC_PAGE_SIZE, next;

	if (page >= h->hole_until && page >= h->data_until) {
		next = lseek(fd, at, SEEK_DATA);
		if (next >= 0)
			h->hole_until = next / KC_PAGE_SIZE;
		else
			h->hole_until = errno == ENXIO ? UINT64_MAX : 0;
		if (page >= h->hole_until) {
			next = lseek(fd, at, SEEK_HOLE);
			h->data_until = next > at ? (uint64_t)next / KC_PAGE_SIZE : page + 1;
		}
	}
	return page < h->hole_until;
}

static enum where copy_all(struct protect *p, bool compare, uint64_t *sent, int *rc,
			   struct kc_err *err)
{
	static uint8_t digests[KC_DIGESTS_CHUNK * KC_DIGEST_SIZE], digest[KC_DIGEST_SIZE];
	static uint8_t page[KC_PAGE_SIZE];
	const char *what = compare ? "resync" : "full copy";
	uint64_t done = 0, total = 0, i;
	unsigned int b;

	for (b = 0; b < p->guest.id.nr_blocks; b++)
		total += p->guest.block_ids[b].npages;
	kc_status_phase(p->status, what);
	p->started_us = kc_now_us();

	for (b = 0; b < p->guest.id.nr_blocks; b++) {
		uint64_t npages = p->guest.block_ids[b].npages;
		const struct guest_block *block = &p->guest.blocks[b];
		struct holes holes = { 0, 0 };

		for (i = 0; i < npages; i++, done++) {
			if (compare && !(i % KC_DIGESTS_CHUNK)) {
				uint64_t left = npages - i;
				uint32_t n = left < KC_DIGESTS_CHUNK ? left : KC_DIGESTS_CHUNK;

				*rc = kc_sink_digests(p->sink, b, i, n, digests, err);
				if (*rc)
					return SINK;
			}
			if (!(i % BATCH)) {
				if (stop_requested)
					return STOPPED;
				show_progress(p, what, done, total);
				*rc = qmp_poll(&p->guest.qmp, err);
				if (*rc)
					return GUEST;
				*rc = poll_sink(p, err);
				if (*rc)
					return SINK;
			}
			/* Reading a hole would allocate memory */
			if (is_hole(&holes, block->fd, i))
				memset(page, 0, sizeof(page));
			else
				memcpy(page, block->map + i * KC_PAGE_SIZE, KC_PAGE_SIZE);
			if (compare) {
				kc_page_digest(page, digest);
				if (!memcmp(digest, digests + i % KC_DIGESTS_CHUNK * KC_DIGEST_SIZE,
					    KC_DIGEST_SIZE))
					continue;
			}
			*rc = kc_epoch_page(p->sink, b, i, page, err);
			if (*rc)
				return SINK;
			++*sent;
		}
	}
	show_progress(p, what, total, total);
	return OK;
}

static enum where sync_all(struct protect *p, int *rc, struct kc_err *err)
{
	unsigned int flags = kc_sink_start(p->sink), pass;
	bool compare = flags & KC_EPOCH_RESYNC;
	uint64_t sent = 0, differed, before = UINT64_MAX, last = kc_sink_last_epoch(p->sink);
	struct json_object *o;
	enum where where;

	/* What is dirty by now will be read after this */
	*rc = guest_collect(&p->guest, err);
	if (*rc)
		return GUEST;
	dirty_forget(&p->guest.dirty);

	if (p->nr < last)
		p->nr = last;
	p->acked = last;
	p->was_acked |= last;
	*rc = kc_epoch_begin(p->sink, p->nr + 1, flags, err);
	if (*rc)
		return SINK;
	p->nr++;
	where = copy_all(p, compare, &sent, rc, err);
	if (where != OK)
		return where;
	differed = sent;

	for (pass = 0; pass < MAX_PASSES; pass++) {
		*rc = guest_collect(&p->guest, err);
		if (*rc)
			return GUEST;
		if (p->guest.dirty.pages <= FEW_PAGES || p->guest.dirty.pages > before / 10 * 9)
			break;
		before = p->guest.dirty.pages;
		while (p->guest.dirty.pages) {
			if (stop_requested)
				return STOPPED;
			*rc = guest_copy_running(&p->guest, &p->epoch, BATCH, err);
			if (*rc)
				return GUEST;
			*rc = send_pages(p, err);
			if (*rc)
				return SINK;
			sent += p->epoch.copy.nr;
		}
	}

	where = take_epoch(p, rc, err);
	if (where != OK)
		return where;
	sent += p->epoch.copy.nr;
	*rc = send_epoch(p, err);
	if (*rc)
		return SINK;
	p->idle = !p->epoch.was_running;
	if (compare)
		kc_status_resync(p->status);
	kc_status_phase(p->status, "protected");
	o = event("synced");
	add(o, "epoch", p->nr);
	add(o, "pages", sent);
	if (compare)
		add(o, "differed", differed);
	json_object_object_add(o, "resync", json_object_new_boolean(compare));
	show_json(p, o);
	if (!p->json && compare)
		showf(p, "protected since epoch %lu: %lu pages differed, %lu were sent\n", p->nr,
		      differed, sent);
	else if (!p->json)
		showf(p, "protected since epoch %lu: %lu pages were sent\n", p->nr, sent);
	return OK;
}

/*
 * Life
 */

/*
 * Where nothing has ever arrived, a name, a key or a path is wrong.  Once epochs have, these were
 * right: a name server or what holds the keys may be in trouble, as the link may, and what makes no
 * sense was damaged on its way.
 */
static bool may_pass(const struct protect *p, int error)
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
static enum where open_sink(struct protect *p, int *rc, struct kc_err *err)
{
	unsigned int wait_ms = 100;
	int told = 0;

	while (!p->sink) {
		uint64_t until;

		may_exit = strncmp(p->to, "tcp:", 4);
		p->sink = stop_requested ? NULL :
			  kc_sink_open(p->to, &p->opts, &p->guest.id, err);
		may_exit = 0;
		if (p->sink)
			break;
		if (stop_requested)
			return STOPPED;
		*rc = -errno;
		if (!may_pass(p, -*rc))
			return SINK;
		if (!told || (told != -*rc && !kc_sink_is_temporary(-*rc))) {
			told = -*rc;
			kc_log(KC_LOG_WARN, "%s; the guest runs on, trying again", err->text);
		}
		kc_status_phase(p->status, "link lost");
		for (until = kc_now_us() + wait_ms * 1000; kc_now_us() < until; usleep(20000)) {
			if (stop_requested)
				return STOPPED;
			*rc = qmp_poll(&p->guest.qmp, err);
			if (*rc)
				return GUEST;
		}
		wait_ms = wait_ms * 2 > MAX_RETRY_MS ? MAX_RETRY_MS : wait_ms * 2;
	}
	if (told)
		kc_log(KC_LOG_INFO, "connected to %s", p->to);
	return OK;
}

static void close_sink(struct protect *p)
{
	if (p->sink)
		kc_status_sink(p->status, NULL);
	kc_sink_close(p->sink);
	p->sink = NULL;
	p->lost = 0;
}

/* Until something fails or ends it */
static enum where run(struct protect *p, int *rc, struct kc_err *err)
{
	enum where where = open_sink(p, rc, err);
	uint64_t due;

	if (where == OK)
		where = sync_all(p, rc, err);
	due = kc_now_us();
	while (where == OK) {
		if (p->max_epochs && p->epochs >= p->max_epochs) {
			/* All of them are to count */
			*rc = kc_sink_wait(p->sink, p->nr, p->opts.io_timeout_ms, err);
			if (!*rc)
				*rc = poll_sink(p, err);
			return *rc ? SINK : STOPPED;
		}
		due += p->interval_ms * 1000ull;
		if (due < kc_now_us())
			due = kc_now_us();	/* late: don't catch up */
		where = wait_for_epoch(p, due, rc, err);
		if (where != OK)
			break;
		if (kc_now_us() < due)
			due = kc_now_us();
		where = next_epoch(p, rc, err);
	}
	return where;
}

/* False if the standby has not been told, and may well take over from a guest that lives */
static bool end(struct protect *p, enum kc_end why)
{
	bool told = p->sink && kc_sink_end(p->sink, why);

	close_sink(p);
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
	close_sink(p);
	if (!told && why != KC_END_GUEST_DIED)
		kc_log(KC_LOG_ERROR,
		       "%s does not know that the protection has ended: stop it, or it takes over when its --timeout is up",
		       p->to);
	return told;
}

/* Returns the exit status */
static int protect(struct protect *p)
{
	unsigned int reopened = 0;
	bool may_be_dead;
	struct kc_err err;
	int rc;

	rc = guest_open(&p->guest, p->qmp, p->external, while_qemu_works, p, &err);
	if (rc) {
		kc_log(KC_LOG_ERROR, "%s", err.text);
		return 1;
	}

	for (;;) {
		uint64_t began = kc_now_us();

		kc_status_guest(p->status, p->guest.id.name);
		rc = 0;
		switch (run(p, &rc, &err)) {
		case STOPPED:
			return end(p, KC_END_DETACH) ? 0 : 1;
		case SINK:
			if (p->lost) {
				rc = p->lost;
				err = p->lost_err;
			}
			close_sink(p);
			if (!may_pass(p, -rc)) {
				kc_log(KC_LOG_ERROR, "%s; the guest runs on, without protection",
				       err.text);
				end(p, KC_END_DETACH);
				return 1;
			}
			kc_log(KC_LOG_WARN, "%s; the guest runs on", err.text);
			kc_status_phase(p->status, "link lost");
			continue;
		default:
			break;
		}

		/* The guest's side */
		if (rc == -EPIPE && p->guest.qmp.shutdown) {
			kc_log(KC_LOG_INFO, "the guest was shut down");
			return end(p, KC_END_GUEST_SHUTDOWN) ? 0 : 1;
		}
		if (rc == -EPIPE && guest_died(&p->guest)) {
			kc_log(KC_LOG_ERROR, "%s; the last epoch that counts is %lu", err.text,
			       p->acked);
			end(p, KC_END_GUEST_DIED);
			return 1;
		}
		if (rc == -ETIMEDOUT) {
			/* It may live again: its standby's --timeout and fence decide. */
			kc_log(KC_LOG_ERROR, "%s; the last epoch that counts is %lu", err.text,
			       p->acked);
			close_sink(p);
			return 1;
		}
		guest_close(&p->guest);
		may_be_dead = false;
		if (kc_now_us() - began > 60000000)
			reopened = 0;
		if (rc != -ESTALE && reopened++ < 3) {
			struct kc_err again;

			kc_log(KC_LOG_WARN, "%s; connecting to QEMU again", err.text);
			rc = guest_open(&p->guest, p->qmp, p->external, while_qemu_works, p,
					&again);
			if (!rc) {
				close_sink(p);
				continue;
			}
			err = again;
			may_be_dead = rc == -ECONNREFUSED || rc == -ENOENT || rc == -EPIPE ||
				      rc == -ETIMEDOUT;
		}
		kc_log(KC_LOG_ERROR, "%s; the guest is without protection", err.text);
		/* Where nobody listens or answers any more: that is for the standby. */
		if (may_be_dead)
			close_sink(p);
		else
			end(p, KC_END_DETACH);
		return 1;
	}
}

static int usage_error(const char *text)
{
	fprintf(stderr, "kvm-checkpoint protect: %s\nTry: kvm-checkpoint protect --help\n", text);
	return 2;
}

static int parse_count(const char *s, uint64_t *n)
{
	char *end;

	errno = 0;
	*n = strtoull(s, &end, 10);
	return errno || end == s || *end || *s == '-' ? -EINVAL : 0;
}

int cmd_protect(int argc, char **argv)
{
	enum { QMP = 256, TO, INTERVAL, MAX_DIRTY, DISK, CONTROL, EPOCHS, JSON, HELP, SINK_OPTION };
	static const struct option options[] = {
		{ "qmp", required_argument, NULL, QMP },
		{ "to", required_argument, NULL, TO },
		{ "interval", required_argument, NULL, INTERVAL },
		{ "max-dirty", required_argument, NULL, MAX_DIRTY },
		{ "disk", required_argument, NULL, DISK },
		{ "control", required_argument, NULL, CONTROL },
		{ "epochs", required_argument, NULL, EPOCHS },
		{ "json", no_argument, NULL, JSON },
		{ "help", no_argument, NULL, HELP },
		{ "compress", required_argument, NULL, SINK_OPTION },
		{ "delta-cache", required_argument, NULL, SINK_OPTION },
		{ "io-timeout", required_argument, NULL, SINK_OPTION },
		{ "psk-file", required_argument, NULL, SINK_OPTION },
		{ "psk-identity", required_argument, NULL, SINK_OPTION },
		{ "insecure", no_argument, NULL, SINK_OPTION },
		{ "keep", required_argument, NULL, SINK_OPTION },
		{ NULL, 0, NULL, 0 }
	};
	static struct protect p;
	struct sigaction sa = { .sa_handler = on_signal }, old;
	struct kc_ctl *ctl = NULL;
	struct kc_err err;
	int c, index, status;

	p.interval_ms = 100;
	p.max_dirty = 8192;
	p.guest.sock = -1;
	p.guest.buffer = -1;
	p.guest.qmp.fd = -1;
	kc_sink_defaults(&p.opts);

	optind = 1;
	while ((c = getopt_long(argc, argv, "h", options, &index)) != -1) {
		switch (c) {
		case QMP:
			p.qmp = optarg;
			break;
		case TO:
			p.to = optarg;
			break;
		case INTERVAL:
			if (kc_parse_ms(optarg, &p.interval_ms) || !p.interval_ms)
				return usage_error("--interval needs a time, such as 100ms");
			break;
		case MAX_DIRTY:
			if (parse_count(optarg, &p.max_dirty))
				return usage_error("--max-dirty needs a number of pages");
			break;
		case DISK:
			if (strcmp(optarg, "external"))
				return usage_error("--disk can only be external");
			p.external = true;
			break;
		case CONTROL:
			p.control = optarg;
			break;
		case EPOCHS:
			if (parse_count(optarg, &p.max_epochs) || !p.max_epochs)
				return usage_error("--epochs needs a number");
			break;
		case JSON:
			p.json = true;
			kc_log_json = true;
			break;
		case 'h':
		case HELP:
			printf("%s%s%s", usage_text, kc_sink_options_help, usage_end);
			return 0;
		case SINK_OPTION:
			if (kc_sink_parse_option(&p.opts, options[index].name, optarg, &err) != 1)
				return usage_error(err.text);
			break;
		default:
			return usage_error("see above");
		}
	}
	if (optind < argc)
		return usage_error("there is an argument too many");
	if (!p.qmp)
		return usage_error("--qmp is missing: where is QEMU's monitor?");
	if (!p.to)
		return usage_error("--to is missing: tcp:HOST:PORT of a standby, or a directory");

	p.tty = isatty(1) && !p.json;
	kc_log_may_lose = true;
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGINT, &sa, NULL);
	/* Its terminal was closed; under nohup that is nothing */
	if (!sigaction(SIGHUP, NULL, &old) && old.sa_handler != SIG_IGN)
		sigaction(SIGHUP, &sa, NULL);
	signal(SIGPIPE, SIG_IGN);

	p.status = kc_status_new("protect", "");
	if (!p.status) {
		kc_log(KC_LOG_ERROR, "no memory");
		return 1;
	}
	if (p.control) {
		ctl = kc_ctl_start(p.control, p.status, on_command, &p, &err);
		if (!ctl) {
			kc_log(KC_LOG_ERROR, "%s", err.text);
			return 1;
		}
	}
	status = protect(&p);
	kc_ctl_stop(ctl);
	guest_close(&p.guest);
	free(p.epoch.copy.pages);
	free(p.epoch.state);
	kc_status_free(p.status);
	return status;
}
