// SPDX-License-Identifier: GPL-2.0-only
/*
 * The receiver's side of an epoch: what may follow what, and whether it is whole.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "stream.h"

struct kc_rx {
	const struct kc_guest *guest;
	const struct kc_rx_ops *ops;
	void *ctx;
	struct kc_unpacker *up;
	XXH3_state_t *sum;

	bool open;
	struct kc_begin begin;
	uint64_t records, pages;
	/* Of each block and disk a bit for each page that a full epoch has brought, NULL in others. */
	uint64_t *seen[KC_MAX_INDEX];
	uint64_t nr_seen;

	/* Whole pages, the last one filled up with zeros. */
	uint8_t *state;
	struct kc_state announced;

	uint8_t page[KC_PAGE_SIZE], base[KC_PAGE_SIZE];
};

struct kc_rx *kc_rx_new(const struct kc_guest *guest, const struct kc_rx_ops *ops, void *ctx)
{
	struct kc_rx *rx = calloc(1, sizeof(*rx));

	if (!rx)
		return NULL;
	rx->guest = guest;
	rx->ops = ops;
	rx->ctx = ctx;
	rx->up = kc_unpacker_new();
	rx->sum = XXH3_createState();
	if (!rx->up || !rx->sum) {
		kc_rx_free(rx);
		return NULL;
	}
	return rx;
}

int kc_devices_keep(struct kc_devices *to, const struct kc_devices *from, struct kc_err *err)
{
	uint8_t *copy = malloc(from->len + 1);

	if (!copy)
		return kc_fail(err, ENOMEM, "out of memory");
	if (from->len)
		memcpy(copy, from->data, from->len);
	free(to->data);
	*to = *from;
	to->data = copy;
	return 0;
}

/* Forget what belongs to the open epoch. */
static void reset(struct kc_rx *rx)
{
	uint32_t i;

	for (i = 0; i < KC_MAX_INDEX; i++) {
		free(rx->seen[i]);
		rx->seen[i] = NULL;
	}
	free(rx->state);
	rx->state = NULL;
	rx->open = false;
}

void kc_rx_free(struct kc_rx *rx)
{
	if (!rx)
		return;
	if (rx->open)
		rx->ops->abort(rx->ctx);
	reset(rx);
	kc_unpacker_free(rx->up);
	XXH3_freeState(rx->sum);
	free(rx);
}

uint64_t kc_rx_pages(const struct kc_rx *rx)
{
	return rx->pages;
}

/* Of a full epoch nothing may be missing. */
static int expect_all(struct kc_rx *rx, struct kc_err *err)
{
	uint64_t npages;
	uint32_t i;

	for (i = 0; i < KC_MAX_INDEX; i++) {
		npages = kc_guest_block_pages(rx->guest, kc_block_of_index(i));
		if (!npages)
			continue;
		rx->seen[i] = calloc((npages + 63) / 64, 8);
		if (!rx->seen[i])
			return kc_fail(err, ENOMEM, "out of memory");
	}
	return 0;
}

static int begin(struct kc_rx *rx, const struct kc_rec *rec, struct kc_err *err)
{
	uint64_t last = rx->ops->last(rx->ctx);
	struct kc_begin *b = &rx->begin;
	int rc;

	rc = kc_get_begin(rec, b, err);
	if (rc)
		return rc;
	if (b->nr <= last)
		return kc_fail(err, EPROTO, "epoch %llu is announced, but the last one was %llu",
			       (unsigned long long)b->nr, (unsigned long long)last);
	if (b->flags != KC_EPOCH_FULL && b->base != last)
		return kc_fail(err, EPROTO,
			       "epoch %llu builds upon epoch %llu, but the last complete one is %llu",
			       (unsigned long long)b->nr, (unsigned long long)b->base,
			       (unsigned long long)last);
	if (b->flags == KC_EPOCH_FULL) {
		rc = expect_all(rx, err);
		if (rc)
			return rc;
	}
	rx->nr_seen = 0;
	rx->records = 0;
	rx->pages = 0;
	XXH3_128bits_reset(rx->sum);
	rc = rx->ops->begin(rx->ctx, b, err);
	rx->open = !rc;
	return rc;
}

static int check_place(struct kc_rx *rx, uint16_t block, uint64_t page, uint64_t n,
		       struct kc_err *err)
{
	uint64_t npages;

	if (block == KC_STATE_BLOCK && rx->state)
		npages = KC_STATE_PAGES(rx->announced.len);
	else
		npages = kc_guest_block_pages(rx->guest, block);
	if (!npages)
		return kc_fail(err, EPROTO, "the stream is corrupt: block %u of %u", block,
			       rx->guest->nr_blocks);
	if (page >= npages || n > npages - page)
		return kc_fail(err, EPROTO,
			       "the stream is corrupt: pages %llu+%llu of a block with %llu",
			       (unsigned long long)page, (unsigned long long)n,
			       (unsigned long long)npages);
	return 0;
}

/* These pages are whole now, whatever they were before. */
static void note_seen(struct kc_rx *rx, uint16_t block, uint64_t page, uint64_t n)
{
	uint64_t *seen = rx->seen[kc_block_index(block)];

	while (seen && n) {
		uint64_t *word = &seen[page / 64], here = 64 - page % 64;
		uint64_t mask;

		here = here < n ? here : n;
		mask = kc_word_mask(page % 64, here);
		rx->nr_seen += __builtin_popcountll(mask & ~*word);
		*word |= mask;
		page += here;
		n -= here;
	}
}

/* A page of the device state as of the last complete epoch. */
static const void *base_state_page(struct kc_rx *rx, uint64_t page)
{
	const struct kc_devices *state = NULL;
	size_t n, offset = page * KC_PAGE_SIZE;

	if (rx->ops->base_state)
		state = rx->ops->base_state(rx->ctx);
	memset(rx->base, 0, KC_PAGE_SIZE);
	if (state && offset < state->len) {
		n = state->len - offset;
		memcpy(rx->base, state->data + offset, n < KC_PAGE_SIZE ? n : KC_PAGE_SIZE);
	}
	return rx->base;
}

static int take_page(struct kc_rx *rx, const struct kc_rec *rec, struct kc_err *err)
{
	const void *base = NULL;
	void *to = rx->page;
	struct kc_page p;
	int rc;

	rc = kc_get_page(rec, &p, err);
	if (!rc)
		rc = check_place(rx, p.block, p.page, 1, err);
	if (rc)
		return rc;
	if ((p.enc & KC_ENC_DELTA) && rx->begin.base && rx->ops->base)
		base = p.block == KC_STATE_BLOCK ? base_state_page(rx, p.page) :
		       rx->ops->base(rx->ctx, p.block, p.page);
	if (p.block == KC_STATE_BLOCK)
		to = rx->state + p.page * KC_PAGE_SIZE;
	else if (rx->ops->room)
		to = rx->ops->room(rx->ctx);
	/* What does not decode is the end of the stream, and of the epoch, whatever is there then */
	rc = kc_unpack(rx->up, &p, base, to, err);
	if (rc || p.block == KC_STATE_BLOCK)
		return rc;
	rx->pages++;
	note_seen(rx, p.block, p.page, 1);
	return rx->ops->page(rx->ctx, p.block, p.page, to, err);
}

static int take_zero(struct kc_rx *rx, const struct kc_rec *rec, struct kc_err *err)
{
	struct kc_zero z;
	int rc;

	rc = kc_get_zero(rec, &z, err);
	if (!rc)
		rc = check_place(rx, z.block, z.page, z.npages, err);
	if (rc)
		return rc;
	if (z.block == KC_STATE_BLOCK) {
		memset(rx->state + z.page * KC_PAGE_SIZE, 0, z.npages * KC_PAGE_SIZE);
		return 0;
	}
	rx->pages += z.npages;
	note_seen(rx, z.block, z.page, z.npages);
	return rx->ops->zero(rx->ctx, &z, err);
}

/* Less than a page: it is not counted as one */
static int take_part(struct kc_rx *rx, const struct kc_rec *rec, struct kc_err *err)
{
	struct kc_part p;
	int rc;

	rc = kc_get_part(rec, &p, err);
	if (!rc)
		rc = check_place(rx, p.block, p.page, 1, err);
	if (!rc && !kc_sum_is(XXH3_64bits(p.data, p.len) == p.xxh))
		rc = kc_fail(err, EPROTO, "the stream is corrupt: a part of a disk is not what was sent");
	return rc ? rc : rx->ops->part(rx->ctx, &p, err);
}

static int take_state(struct kc_rx *rx, const struct kc_rec *rec, struct kc_err *err)
{
	const struct kc_devices *old = NULL;
	size_t size;
	int rc;

	rc = kc_get_state(rec, &rx->announced, err);
	if (rc)
		return rc;
	if (rx->state)
		return kc_fail(err, EPROTO, "the stream is corrupt: a second device state");
	size = (size_t)KC_STATE_PAGES(rx->announced.len) * KC_PAGE_SIZE;
	rx->state = calloc(1, size ? size : 1);
	if (!rx->state)
		return kc_fail(err, ENOMEM, "out of memory");
	if (!rx->begin.flags && rx->ops->base_state)
		old = rx->ops->base_state(rx->ctx);
	if (old && old->len)
		memcpy(rx->state, old->data,
		       old->len < rx->announced.len ? old->len : rx->announced.len);
	return 0;
}

static int commit(struct kc_rx *rx, const struct kc_rec *rec, struct kc_err *err)
{
	XXH128_canonical_t sum;
	struct kc_commit c;
	const char *what = NULL;
	int rc;

	rc = kc_get_commit(rec, &c, err);
	if (rc)
		return rc;
	XXH128_canonicalFromHash(&sum, XXH3_128bits_digest(rx->sum));
	if (!kc_sum_is(!memcmp(sum.digest, c.sum, sizeof(c.sum))))
		what = "its checksum is wrong";
	else if (c.nr != rx->begin.nr)
		what = "another number is committed";
	else if (c.records != rx->records || c.pages != rx->pages)
		what = "records are missing";
	else if (!rx->state)
		what = "its device state is missing";
	else if (!kc_sum_is(XXH3_64bits(rx->state, rx->announced.len) == rx->announced.xxh))
		what = "its device state is not what was sent";
	else if (rx->begin.flags == KC_EPOCH_FULL &&
		 rx->nr_seen != kc_guest_pages(rx->guest) + kc_guest_disk_pages(rx->guest))
		what = "pages are missing";
	if (what)
		return kc_fail(err, EPROTO, "epoch %llu is not sound: %s",
			       (unsigned long long)rx->begin.nr, what);
	/* Whether that works or not, the epoch is no longer open. */
	rx->open = false;
	rc = rx->ops->commit(rx->ctx, c.nr, &(struct kc_devices){
			.data = rx->state,
			.len = rx->announced.len,
			.stopped = rx->announced.flags & KC_STATE_STOPPED,
			.unheld = rx->announced.flags & KC_STATE_UNHELD,
		}, err);
	reset(rx);
	return rc ? rc : KC_COMMIT;
}

int kc_rx_record(struct kc_rx *rx, const struct kc_rec *rec, struct kc_err *err)
{
	uint64_t nr, us;
	int rc;

	switch (rec->type) {
	case KC_BEGIN:
		if (rx->open)
			return kc_fail(err, EPROTO,
				       "the stream is corrupt: an epoch within an epoch");
		rc = begin(rx, rec, err);
		if (rc)
			return rc;
		break;
	case KC_PAGE:
	case KC_ZERO:
	case KC_PART:
	case KC_STATE:
	case KC_COMMIT:
	case KC_ABORT:
		if (!rx->open)
			return kc_fail(err, EPROTO,
				       "the stream is corrupt: a record of type %u outside of an epoch",
				       rec->type);
		break;
	}
	if (rec->type == KC_COMMIT)
		return commit(rx, rec, err);
	if (rx->open) {
		XXH3_128bits_update(rx->sum, rec->raw, KC_REC_HDR + rec->len);
		rx->records++;
	}

	switch (rec->type) {
	case KC_BEGIN:
		return 0;
	case KC_PAGE:
		return take_page(rx, rec, err);
	case KC_ZERO:
		return take_zero(rx, rec, err);
	case KC_PART:
		return take_part(rx, rec, err);
	case KC_STATE:
		return take_state(rx, rec, err);
	case KC_ABORT:
		rc = kc_get_nr(rec, &nr, &us, err);
		if (rc)
			return rc;
		rx->ops->abort(rx->ctx);
		reset(rx);
		return 0;
	case KC_HEARTBEAT:
		rc = kc_get_heartbeat(rec, &us, err);
		return rc ? rc : rec->type;
	case KC_END:
	case KC_DIGEST_REQ:
	case KC_NOTE:
	case KC_UNHELD:
		return rec->type;
	}
	if (rec->flags & KC_REC_OPTIONAL)
		return 0;
	return kc_fail(err, EPROTO,
		       "the stream has a record of type %u, which this version does not know", rec->type);
}
