// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint protect: the disks of the guest.
 *
 * QEMU mirrors each to a server in this process (nbd.c), in a way that a write of the guest is not
 * done before it is here.  So when the guest stands still and its disks are at rest, what has come
 * is what it has written: that belongs to the epoch which is taken just then.  The initial copy
 * comes the same way, while the guest runs, and goes into the first epoch; of a standby that has an
 * older copy only what differs does, found by digests.
 *
 * The guest does not depend on it: if anything is wrong here, writes fail towards the mirror job
 * alone, and the guest runs on.  The job stops then, and keeps account of what is not here.  With
 * the next connection to the standby it copies that alone, as in a first copy: until it has, there
 * is no epoch, and the standby keeps the last one.  What was here, and is not known to be at the
 * standby, is kept; only if that is too much, or the job has ended, is one begun again.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "protect.h"

/* Data that waits for its epoch; half of it, and there is one soon */
#define MAX_BYTES	(256ull << 20)

/* How often QEMU's job may stop, or not be connected, when it is to go on: some seconds */
#define MAX_ATTEMPTS	250

static bool has_disks(const struct protect *p)
{
	return p->guest.id.nr_disks;
}

static void free_writes(struct nbd_write *w)
{
	while (w) {
		struct nbd_write *next = w->next;

		free(w);
		w = next;
	}
}

static void drop_cut(struct protect *p)
{
	free_writes(p->disks.cut);
	p->disks.cut = NULL;
	p->disks.cut_end = &p->disks.cut;
	p->disks.cut_bytes = 0;
}

static void drop_kept(struct protect *p)
{
	free_writes(p->disks.kept);
	p->disks.kept = NULL;
	p->disks.kept_end = &p->disks.kept;
	p->disks.kept_bytes = 0;
}

static uint64_t bytes_of(const struct nbd_write *w)
{
	return sizeof(*w) + (w->zeros ? 0 : w->len);
}

/* All of a list, to what was cut */
static void append_cut(struct protect *p, struct nbd_write *w)
{
	struct disks *d = &p->disks;

	*d->cut_end = w;
	for (; w; w = w->next) {
		d->cut_bytes += bytes_of(w);
		d->cut_end = &w->next;
	}
}

/* One that was sent, or was to be: until its epoch is acknowledged it may have to be once more. */
static void keep(struct protect *p, struct nbd_write *w)
{
	struct disks *d = &p->disks;

	if (!d->keeps) {
		free(w);
		return;
	}
	w->next = NULL;
	w->epoch = p->nr;
	*d->kept_end = w;
	d->kept_end = &w->next;
	d->kept_bytes += bytes_of(w);
	if (d->kept_bytes < MAX_BYTES)
		return;
	/* A receiver that has this epoch has all that is dropped. */
	drop_kept(p);
	d->kept_from = p->nr;
}

void kc_disks_acked(struct protect *p)
{
	struct disks *d = &p->disks;
	struct nbd_write *w;

	while ((w = d->kept) && w->epoch <= p->acked) {
		d->kept = w->next;
		d->kept_bytes -= bytes_of(w);
		free(w);
	}
	if (!d->kept)
		d->kept_end = &d->kept;
	/* What a receiver that was set back to an older one lacks is gone. */
	if (p->acked > d->kept_from)
		d->kept_from = p->acked;
}

/* --- Beginning and losing the mirror ---------------------------------------- */

int kc_disks_begin(struct protect *p, bool compare, struct kc_err *err)
{
	struct guest *g = &p->guest;
	uint64_t sizes[KC_MAX_DISKS];
	unsigned int i;
	int rc;

	if (!has_disks(p))
		return 0;
	if (!p->disks.nbd) {
		for (i = 0; i < g->id.nr_disks; i++)
			sizes[i] = g->disk_ids[i].npages * KC_PAGE_SIZE;
		p->disks.nbd = nbd_start(sizes, g->id.nr_disks, MAX_BYTES, p->disks.guard,
					 p->guest_opts.pause_limit_ms, err);
		if (!p->disks.nbd)
			return -errno;
	}
	drop_cut(p);
	drop_kept(p);
	/* Nobody could keep all of a disk: if this epoch is lost it is copied again. */
	p->disks.kept_from = p->nr;
	p->disks.keeps = false;
	nbd_accept(p->disks.nbd, false);
	rc = kc_mirror_end(p, err);
	if (rc)
		return rc;
	nbd_accept(p->disks.nbd, true);
	nbd_hurry(p->disks.nbd, false);
	p->disks.jobs_ended = g->qmp.jobs_ended;
	p->disks.jobs_failed = g->qmp.jobs_failed;
	p->disks.resumes = false;
	p->disks.known.n = 0;
	p->disks.compare = compare;
	/* Also if not all are: those that are end with the sink */
	p->disks.mirrored = true;
	rc = kc_mirror_begin(p, err);
	/* Not of this guest: another one's job, a name that is not unique */
	return rc == -EREMOTEIO ? -ESTALE : rc;
}

void kc_disks_lost(struct protect *p)
{
	struct kc_err err;

	if (!p->disks.mirrored)
		return;
	p->disks.mirrored = false;
	nbd_accept(p->disks.nbd, false);
	drop_cut(p);
	drop_kept(p);
	/* Whoever begins them again tries this again, too */
	if (p->guest.qmp.fd >= 0 && !p->guest.qmp.asked_us)
		kc_mirror_end(p, &err);
}

/* There is nothing that could go on */
static bool has_ended(const struct protect *p)
{
	return !p->disks.mirrored || p->disks.jobs_ended != p->guest.qmp.jobs_ended;
}

/* Did a write fail?  QEMU's jobs keep account of these. */
static bool has_failed(const struct protect *p)
{
	return nbd_failed(p->disks.nbd) || p->disks.jobs_failed != p->guest.qmp.jobs_failed;
}

void kc_disks_unlinked(struct protect *p)
{
	p->disks.told = false;
	/* A first copy that was not complete is known to nobody. */
	if (has_ended(p) || !p->disks.keeps)
		kc_disks_lost(p);
	else
		nbd_never_wait(p->disks.nbd, true);
}

void kc_disks_look(struct protect *p)
{
	if (!p->disks.mirrored)
		return;
	if (has_ended(p)) {
		kc_disks_lost(p);
	} else if (!p->disks.told && has_failed(p)) {
		p->disks.told = true;
		kc_log(KC_LOG_INFO,
		       "more was written to disks than can be kept while the link is lost: QEMU keeps account of what it is");
	}
}

/*
 * What the sink lacks: what was sent after its last epoch, then what was cut for one that was not
 * sent, or not all of it, then what has come since.  A write that it has already may be among
 * these if all after it are, too.
 */
bool kc_disks_again(struct protect *p)
{
	uint64_t last = kc_sink_last_epoch(p->sink);
	struct disks *d = &p->disks;
	struct nbd_write *cut = d->cut;

	if (!has_disks(p))
		return true;
	/* The first epoch may have arrived, or not. */
	if (has_ended(p) || !d->keeps || !kc_sink_continues(p->sink) || last < d->kept_from)
		return false;
	while (d->kept && d->kept->epoch <= last) {
		struct nbd_write *w = d->kept;

		d->kept = w->next;
		free(w);
	}
	d->cut = NULL;
	d->cut_end = &d->cut;
	d->cut_bytes = 0;
	append_cut(p, d->kept);
	append_cut(p, cut);
	d->kept = NULL;
	d->kept_end = &d->kept;
	d->kept_bytes = 0;
	d->compare = false;
	/* Or it had not gone on with the last sink */
	d->resumes |= d->jobs_failed != p->guest.qmp.jobs_failed;
	d->resumes |= nbd_again(d->nbd);
	d->attempts = 0;
	nbd_never_wait(d->nbd, false);
	return true;
}

void kc_disks_free(struct protect *p)
{
	if (p->disks.nbd)
		nbd_accept(p->disks.nbd, false);
	drop_cut(p);
	drop_kept(p);
	nbd_stop(p->disks.nbd);
	p->disks.nbd = NULL;
}

int kc_disks_check(struct protect *p, struct kc_err *err)
{
	/* What fails until it has gone on is no news. */
	if (!has_disks(p) || (!has_ended(p) && (p->disks.resumes || !has_failed(p))))
		return 0;
	return kc_fail(err, ECONNRESET, "the mirror of a disk has ended, or failed");
}

int kc_disks_ready(struct protect *p, bool *ready, uint64_t *done, uint64_t *total,
		   struct kc_err *err)
{
	struct disks *d = &p->disks;
	struct mirror m;
	int rc;

	/* What fails from now on is known when this is over. */
	if (d->resumes)
		nbd_again(d->nbd);
	rc = kc_mirror_look(p, &m, err);
	if (rc)
		return rc;
	*done = m.done;
	*total = m.total;
	*ready = m.ready;
	if (!d->resumes)
		return 0;
	/*
	 * Each write of the guest is mirrored before it is done.  So once QEMU has taken up all
	 * that was not, it stays like that until something fails; and what is under way will be
	 * here in the pause.
	 */
	d->jobs_failed = p->guest.qmp.jobs_failed;
	if (!m.paused && m.ready) {
		rc = kc_mirror_is_clean(p, ready, err);
		if (rc)
			return rc;
	}
	*ready = *ready && !m.paused && nbd_connected(d->nbd);
	if (*ready) {
		d->resumes = false;
		return 0;
	}
	/* It connects again when it writes, which fails until it has: so this takes some attempts. */
	if (!m.paused && nbd_connected(d->nbd))
		return 0;
	if (++d->attempts < MAX_ATTEMPTS)
		return m.paused ? kc_mirror_resume(p, err) : 0;
	kc_log(KC_LOG_WARN, "QEMU's mirror of a disk does not go on: all of it is compared");
	kc_disks_lost(p);
	return 0;
}

/* --- Writes --------------------------------------------------------------- */

/*
 * The standby has an older copy: which of these pages it has already.  What was sent since it was
 * asked is not known any more.
 */
static int differs(struct protect *p, unsigned int disk, uint64_t page, const uint8_t *data,
		   bool *sent, struct kc_err *err)
{
	struct known *k = &p->disks.known;
	uint8_t ours[KC_DIGEST_SIZE];
	uint64_t npages = p->guest.disk_ids[disk].npages;
	int rc;

	if (disk != k->disk || page - k->first >= k->n) {
		k->disk = disk;
		k->first = page - page % KC_DIGESTS_CHUNK;
		k->n = npages - k->first < KC_DIGESTS_CHUNK ? npages - k->first : KC_DIGESTS_CHUNK;
		memset(k->stale, 0, sizeof(k->stale));
		rc = kc_sink_digests(p->sink, KC_DISK_BLOCK + disk, k->first, k->n, k->digests, err);
		if (rc) {
			k->n = 0;
			return rc;
		}
	}
	*sent = k->stale[page - k->first];
	if (*sent)
		return 0;
	kc_page_digest(data, ours);
	*sent = memcmp(ours, k->digests + (page - k->first) * KC_DIGEST_SIZE, KC_DIGEST_SIZE);
	k->stale[page - k->first] |= *sent;
	return 0;
}

/* A write that is not to be asked about makes what is known of its pages stale */
static void forget_known(struct protect *p, const struct nbd_write *w)
{
	struct known *k = &p->disks.known;
	uint64_t first = w->offset / KC_PAGE_SIZE, i;
	uint64_t last = (w->offset + w->len - 1) / KC_PAGE_SIZE;

	for (i = first; w->len && w->disk == k->disk && i <= last; i++) {
		if (i - k->first < k->n)
			k->stale[i - k->first] = true;
	}
}

static int send_write(struct protect *p, const struct nbd_write *w, struct kc_err *err)
{
	static const uint8_t zeros[KC_PAGE_SIZE];
	uint64_t at = 0;
	bool sent;
	int rc = 0;

	if (!p->disks.compare || w->offset % KC_PAGE_SIZE || w->len % KC_PAGE_SIZE) {
		forget_known(p, w);
		return kc_epoch_disk(p->sink, w->disk, w->offset, w->zeros ? NULL : w->data, w->len,
				     err);
	}
	for (; at < w->len && !rc; at += KC_PAGE_SIZE) {
		const uint8_t *data = w->zeros ? zeros : w->data + at;

		rc = differs(p, w->disk, (w->offset + at) / KC_PAGE_SIZE, data, &sent, err);
		if (!rc && sent)
			rc = kc_epoch_disk(p->sink, w->disk, w->offset + at, data, KC_PAGE_SIZE,
					   err);
	}
	return rc;
}

static int send_writes(struct protect *p, struct nbd_write *w, struct kc_err *err)
{
	unsigned int n = 0;
	int rc = 0;

	while (w) {
		struct nbd_write *next = w->next;

		/* Also what is not sent as the sink has failed is of this epoch, which is lost. */
		if (!rc)
			rc = send_write(p, w, err);
		if (!rc && !(++n % 64))
			rc = kc_link_poll(p, err);
		keep(p, w);
		w = next;
	}
	return rc;
}

/* What was cut is older than what has come since. */
int kc_disks_pump(struct protect *p, struct kc_err *err)
{
	if (!p->disks.mirrored)
		return 0;
	append_cut(p, nbd_take(p->disks.nbd));
	return kc_disks_send(p, err);
}

void kc_disks_stopping(void *ctx)
{
	struct protect *p = ctx;

	/* QEMU waits for our answers before it says that the guest stands still */
	if (p->disks.mirrored)
		nbd_hurry(p->disks.nbd, true);
}

void kc_disks_cut(void *ctx)
{
	struct protect *p = ctx;

	if (!p->disks.mirrored)
		return;
	append_cut(p, nbd_take(p->disks.nbd));
	nbd_hurry(p->disks.nbd, false);
}

int kc_disks_send(struct protect *p, struct kc_err *err)
{
	struct nbd_write *w = p->disks.cut;

	p->disks.cut = NULL;
	p->disks.cut_end = &p->disks.cut;
	p->disks.cut_bytes = 0;
	return send_writes(p, w, err);
}

bool kc_disks_full(struct protect *p)
{
	return p->disks.mirrored &&
	       nbd_bytes(p->disks.nbd) + p->disks.cut_bytes >= MAX_BYTES / 2;
}
