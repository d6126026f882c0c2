// SPDX-License-Identifier: GPL-2.0-only
/*
 * Records of the stream: packing and unpacking, and nothing else.
 */
#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <xxhash.h>

#include "stream.h"

static const char magic[8] = { 'K', 'V', 'M', 'C', 'K', 'P', 'T', '\n' };

/* --- Packing -------------------------------------------------------------- */

static uint8_t *put16(uint8_t *p, uint16_t v)
{
	v = htole16(v);
	memcpy(p, &v, 2);
	return p + 2;
}

static uint8_t *put32(uint8_t *p, uint32_t v)
{
	v = htole32(v);
	memcpy(p, &v, 4);
	return p + 4;
}

static uint8_t *put64(uint8_t *p, uint64_t v)
{
	v = htole64(v);
	memcpy(p, &v, 8);
	return p + 8;
}

static uint8_t *put_bytes(uint8_t *p, const void *b, size_t n)
{
	memcpy(p, b, n);
	return p + n;
}

static uint8_t *put_string(uint8_t *p, const char *s)
{
	size_t n = strlen(s);

	return put_bytes(put16(p, n), s, n);
}

size_t kc_put_rec(uint8_t *out, uint16_t type, uint16_t flags, uint32_t len)
{
	put16(put16(put32(out, len), type), flags);
	return KC_REC_HDR;
}

/* The header of a record whose payload ends at @end. */
static size_t finish(uint8_t *out, uint16_t type, uint8_t *end)
{
	kc_put_rec(out, type, 0, end - out - KC_REC_HDR);
	return end - out;
}

size_t kc_put_hello(uint8_t *out, const struct kc_guest *guest, const uint8_t instance[16],
		    uint32_t flags)
{
	uint8_t *p = out + KC_REC_HDR;
	uint32_t i;

	/* KC_MAX_BLOCKS names of KC_NAME_SIZE fit. */
	_Static_assert((KC_MAX_BLOCKS + KC_MAX_DISKS) * (KC_NAME_SIZE + 10) + KC_HARDWARE_SIZE +
			       512 < KC_REC_MAX, "");
	p = put_bytes(p, magic, sizeof(magic));
	p = put16(p, KC_VERSION);
	p = put16(p, KC_VERSION);
	p = put32(p, flags);
	p = put_bytes(p, instance, 16);
	p = put_bytes(p, guest->uuid, sizeof(guest->uuid));
	p = put_bytes(p, guest->process, sizeof(guest->process));
	p = put_bytes(p, guest->fingerprint, sizeof(guest->fingerprint));
	p = put_string(p, guest->hardware);
	p = put32(p, guest->page_size);
	p = put32(p, guest->nr_blocks);
	p = put_string(p, guest->name);
	for (i = 0; i < guest->nr_blocks; i++) {
		p = put64(p, guest->blocks[i].npages);
		p = put_string(p, guest->blocks[i].name);
	}
	p = put32(p, guest->nr_disks);
	for (i = 0; i < guest->nr_disks; i++) {
		p = put64(p, guest->disks[i].npages);
		p = put_string(p, guest->disks[i].name);
	}
	/* In files there is nothing else that would notice another name. */
	p = put64(p, XXH3_64bits(out + KC_REC_HDR, p - out - KC_REC_HDR));
	return finish(out, KC_HELLO, p);
}

size_t kc_put_welcome(uint8_t *out, const struct kc_welcome *w)
{
	uint8_t *p = out + KC_REC_HDR;

	p = put16(p, w->version);
	p = put16(p, w->has_ram | w->same_sender << 1 | w->counts << 2);
	p = put32(put32(p, w->timeout_ms), w->fence_ms);
	p = put64(p, w->last_epoch);
	p = put_bytes(p, w->receiver, sizeof(w->receiver));
	return finish(out, KC_WELCOME, p);
}

size_t kc_put_error(uint8_t *out, uint32_t code, const char *text)
{
	uint8_t *p = put32(out + KC_REC_HDR, code);

	return finish(out, KC_ERROR, put_bytes(p, text, strlen(text)));
}

size_t kc_put_note(uint8_t *out, const char *text)
{
	size_t n = strnlen(text, KC_NOTE_MAX);

	kc_put_rec(out, KC_NOTE, KC_REC_OPTIONAL, n);
	memcpy(out + KC_REC_HDR, text, n);
	return KC_REC_HDR + n;
}

size_t kc_put_begin(uint8_t *out, const struct kc_begin *b)
{
	uint8_t *p = out + KC_REC_HDR;

	p = put32(put32(put64(put64(p, b->nr), b->base), b->flags), 0);
	return finish(out, KC_BEGIN, p);
}

size_t kc_put_page(uint8_t *out, const struct kc_page *g)
{
	uint8_t *p = out + kc_put_rec(out, KC_PAGE, 0, KC_PAGE_HDR + g->len);

	p = put16(put64(put64(p, g->page), g->xxh), g->block);
	*p++ = g->enc;
	*p++ = 0;
	p = put32(p, 0);
	return p - out;
}

size_t kc_put_part(uint8_t *out, const struct kc_part *g)
{
	uint8_t *p = out + kc_put_rec(out, KC_PART, 0, KC_PART_HDR + g->len);

	p = put16(put16(put64(put64(p, g->page), g->xxh), g->block), g->offset);
	return put32(p, 0) - out;
}

size_t kc_put_zero(uint8_t *out, const struct kc_zero *z)
{
	uint8_t *p = out + KC_REC_HDR;

	p = put64(put64(p, z->page), z->npages);
	p = put32(put16(put16(p, z->block), z->flags), 0);
	return finish(out, KC_ZERO, p);
}

size_t kc_put_state(uint8_t *out, const struct kc_state *s)
{
	uint8_t *p = out + KC_REC_HDR;

	return finish(out, KC_STATE, put64(put32(put32(p, s->len), s->flags), s->xxh));
}

size_t kc_put_commit(uint8_t *out, const struct kc_commit *c)
{
	uint8_t *p = out + KC_REC_HDR;

	p = put64(put64(put64(p, c->nr), c->records), c->pages);
	return finish(out, KC_COMMIT, put_bytes(p, c->sum, sizeof(c->sum)));
}

size_t kc_put_nr(uint8_t *out, uint16_t type, uint64_t nr, uint64_t us)
{
	return finish(out, type, put64(put64(out + KC_REC_HDR, nr), us));
}

size_t kc_put_heartbeat(uint8_t *out, uint64_t us)
{
	return finish(out, KC_HEARTBEAT, put64(out + KC_REC_HDR, us));
}

size_t kc_put_end(uint8_t *out, uint32_t reason)
{
	return finish(out, KC_END, put32(out + KC_REC_HDR, reason));
}

size_t kc_put_digest_req(uint8_t *out, uint16_t type, const struct kc_digest_req *r)
{
	uint8_t *p = out + KC_REC_HDR;
	uint32_t more = type == KC_DIGESTS ? r->n * KC_DIGEST_SIZE : 0;

	p = put16(put16(put32(put64(p, r->first), r->n), r->block), 0);
	kc_put_rec(out, type, 0, p - out - KC_REC_HDR + more);
	return p - out;
}

/* --- Unpacking ------------------------------------------------------------ */

/*
 * What is left of a payload.  After the first read beyond its end all reads give 0 and bad is set.
 */
struct in {
	const uint8_t *p;
	size_t left;
	bool bad;
};

static struct in in_rec(const struct kc_rec *rec)
{
	return (struct in){ .p = rec->payload, .left = rec->len };
}

static const uint8_t *get_bytes(struct in *in, size_t n)
{
	const uint8_t *p = in->p;

	if (n > in->left) {
		in->bad = true;
		in->left = 0;
		return NULL;
	}
	in->p += n;
	in->left -= n;
	return p;
}

static void get_copy(struct in *in, void *to, size_t n)
{
	const uint8_t *p = get_bytes(in, n);

	if (p)
		memcpy(to, p, n);
	else
		memset(to, 0, n);
}

static uint16_t get16(struct in *in)
{
	uint16_t v;

	get_copy(in, &v, 2);
	return le16toh(v);
}

static uint32_t get32(struct in *in)
{
	uint32_t v;

	get_copy(in, &v, 4);
	return le32toh(v);
}

static uint64_t get64(struct in *in)
{
	uint64_t v;

	get_copy(in, &v, 8);
	return le64toh(v);
}

/* A string without NUL or control characters, perhaps of lines: it will be shown to people. */
static void get_text(struct in *in, char *to, size_t size, bool lines)
{
	uint16_t n = get16(in);
	const uint8_t *p = get_bytes(in, n);
	size_t i;

	*to = '\0';
	if (!p)
		return;
	if (n >= size) {
		in->bad = true;
		return;
	}
	for (i = 0; i < n; i++) {
		if ((p[i] < 0x20 && !(lines && p[i] == '\n')) || p[i] == 0x7f)
			in->bad = true;
	}
	memcpy(to, p, n);
	to[n] = '\0';
}

static void get_string(struct in *in, char *to, size_t size)
{
	get_text(in, to, size, false);
}

static void get_reserved(struct in *in, size_t n)
{
	const uint8_t *p = get_bytes(in, n);

	while (p && n--) {
		if (*p++)
			in->bad = true;
	}
}

static int done(const struct in *in, const char *what, struct kc_err *err)
{
	if (in->bad || in->left)
		return kc_fail(err, EPROTO, "the stream is corrupt: a %s record is malformed",
			       what);
	return 0;
}

ssize_t kc_get_rec(const uint8_t *buf, size_t len, struct kc_rec *rec, struct kc_err *err)
{
	struct in in = { .p = buf, .left = len };

	if (len < KC_REC_HDR)
		return 0;
	rec->len = get32(&in);
	rec->type = get16(&in);
	rec->flags = get16(&in);
	rec->payload = in.p;
	rec->raw = buf;
	if (rec->len > KC_REC_MAX || (rec->flags & ~KC_REC_OPTIONAL))
		return kc_fail(err, EPROTO,
			       "the stream is corrupt, or the peer is no kvm-checkpoint: a record of type %u has length %u and flags %#x",
			       rec->type, rec->len, rec->flags);
	return in.left < rec->len ? 0 : (ssize_t)(KC_REC_HDR + rec->len);
}

int kc_get_hello(const struct kc_rec *rec, struct kc_hello *h, struct kc_err *err)
{
	struct in in = in_rec(rec);
	struct kc_guest *g = &h->guest;
	char m[sizeof(magic)];
	uint32_t i;
	int rc;

	memset(h, 0, sizeof(*h));
	get_copy(&in, m, sizeof(m));
	if (rec->type != KC_HELLO || memcmp(m, magic, sizeof(m)))
		return kc_fail(err, EPROTO, "this is no stream of kvm-checkpoint");
	h->version = get16(&in);
	h->version_min = get16(&in);
	/* Of another version nothing further is understood. */
	if (h->version_min > KC_VERSION || h->version < KC_VERSION)
		return kc_fail(err, EPROTONOSUPPORT,
			       "the peer speaks versions %u to %u of the protocol, this program version %u: use the same kvm-checkpoint on both sides",
			       h->version_min, h->version, KC_VERSION);
	h->flags = get32(&in);
	if (rec->flags || h->flags & ~KC_HELLO_UNHELD)
		in.bad = true;
	get_copy(&in, h->instance, sizeof(h->instance));
	get_copy(&in, g->uuid, sizeof(g->uuid));
	get_copy(&in, g->process, sizeof(g->process));
	get_copy(&in, g->fingerprint, sizeof(g->fingerprint));
	get_text(&in, g->hardware, sizeof(g->hardware), true);
	g->page_size = get32(&in);
	g->nr_blocks = get32(&in);
	get_string(&in, g->name, sizeof(g->name));
	if (in.bad || !g->nr_blocks || g->nr_blocks > KC_MAX_BLOCKS)
		return kc_fail(err, EPROTO, "the stream is corrupt: a hello record is malformed");
	g->blocks = calloc(g->nr_blocks, sizeof(*g->blocks));
	if (!g->blocks)
		return kc_fail(err, ENOMEM, "out of memory");
	for (i = 0; i < g->nr_blocks; i++) {
		g->blocks[i].npages = get64(&in);
		get_string(&in, g->blocks[i].name, sizeof(g->blocks[i].name));
	}
	g->nr_disks = get32(&in);
	if (g->nr_disks > KC_MAX_DISKS) {
		in.bad = true;
		g->nr_disks = 0;
	}
	g->disks = g->nr_disks ? calloc(g->nr_disks, sizeof(*g->disks)) : NULL;
	if (g->nr_disks && !g->disks) {
		kc_guest_free(g);
		return kc_fail(err, ENOMEM, "out of memory");
	}
	for (i = 0; i < g->nr_disks; i++) {
		g->disks[i].npages = get64(&in);
		get_string(&in, g->disks[i].name, sizeof(g->disks[i].name));
	}
	if (!in.bad &&
	    (in.left != 8 || get64(&in) != XXH3_64bits(rec->payload, rec->len - 8)))
		in.bad = true;
	rc = done(&in, "hello", err);
	if (!rc)
		rc = kc_guest_check(g, err);
	if (rc)
		kc_guest_free(g);
	return rc;
}

int kc_get_welcome(const struct kc_rec *rec, struct kc_welcome *w, struct kc_err *err)
{
	struct in in = in_rec(rec);
	uint16_t flags;

	w->version = get16(&in);
	flags = get16(&in);
	w->has_ram = flags & 1;
	w->same_sender = flags & 2;
	w->counts = flags & 4;
	w->timeout_ms = get32(&in);
	w->fence_ms = get32(&in);
	w->last_epoch = get64(&in);
	get_copy(&in, w->receiver, sizeof(w->receiver));
	if (flags & ~7)
		in.bad = true;
	return done(&in, "welcome", err);
}

/* What is left is text for people */
static void get_words(struct in *in, char *text, size_t size)
{
	size_t i, n = in->left < size ? in->left : size - 1;

	for (i = 0; i < n; i++)
		text[i] = in->p[i] < 0x20 || in->p[i] == 0x7f ? '?' : in->p[i];
	text[n] = '\0';
}

int kc_get_error(const struct kc_rec *rec, uint32_t *code, char *text, size_t size)
{
	struct in in = in_rec(rec);

	*code = get32(&in);
	get_words(&in, text, size);
	return 0;
}

void kc_get_note(const struct kc_rec *rec, char *text, size_t size)
{
	struct in in = in_rec(rec);

	get_words(&in, text, size);
}

int kc_get_begin(const struct kc_rec *rec, struct kc_begin *b, struct kc_err *err)
{
	struct in in = in_rec(rec);

	b->nr = get64(&in);
	b->base = get64(&in);
	b->flags = get32(&in);
	get_reserved(&in, 4);
	if (!b->nr || b->base >= b->nr || (b->flags & ~(KC_EPOCH_FULL | KC_EPOCH_RESYNC)) ||
	    b->flags == (KC_EPOCH_FULL | KC_EPOCH_RESYNC) ||
	    (b->flags == KC_EPOCH_FULL && b->base) || (!b->flags && !b->base))
		in.bad = true;
	return done(&in, "begin", err);
}

int kc_get_page(const struct kc_rec *rec, struct kc_page *p, struct kc_err *err)
{
	struct in in = in_rec(rec);
	const uint8_t *enc;

	p->page = get64(&in);
	p->xxh = get64(&in);
	p->block = get16(&in);
	enc = get_bytes(&in, 1);
	get_reserved(&in, 1);
	get_reserved(&in, 4);
	p->len = in.left;
	p->data = get_bytes(&in, in.left);
	if (!in.bad) {
		p->enc = *enc;
		if (!p->len || p->len > KC_PAGE_SIZE)
			in.bad = true;
	}
	return done(&in, "page", err);
}

int kc_get_part(const struct kc_rec *rec, struct kc_part *p, struct kc_err *err)
{
	struct in in = in_rec(rec);

	p->page = get64(&in);
	p->xxh = get64(&in);
	p->block = get16(&in);
	p->offset = get16(&in);
	get_reserved(&in, 4);
	p->len = in.left;
	p->data = get_bytes(&in, in.left);
	if (p->block < KC_DISK_BLOCK || p->block == KC_STATE_BLOCK || !p->len ||
	    p->offset >= KC_PAGE_SIZE || p->len > KC_PAGE_SIZE - p->offset)
		in.bad = true;
	return done(&in, "part", err);
}

int kc_get_zero(const struct kc_rec *rec, struct kc_zero *z, struct kc_err *err)
{
	struct in in = in_rec(rec);

	z->page = get64(&in);
	z->npages = get64(&in);
	z->block = get16(&in);
	z->flags = get16(&in);
	get_reserved(&in, 4);
	if (!z->npages || (z->flags & ~KC_ZERO_HOLE))
		in.bad = true;
	return done(&in, "zero", err);
}

int kc_get_state(const struct kc_rec *rec, struct kc_state *s, struct kc_err *err)
{
	struct in in = in_rec(rec);

	s->len = get32(&in);
	s->flags = get32(&in);
	s->xxh = get64(&in);
	if (s->len > KC_STATE_MAX || s->flags & ~(KC_STATE_STOPPED | KC_STATE_UNHELD))
		in.bad = true;
	return done(&in, "state", err);
}

int kc_get_commit(const struct kc_rec *rec, struct kc_commit *c, struct kc_err *err)
{
	struct in in = in_rec(rec);

	c->nr = get64(&in);
	c->records = get64(&in);
	c->pages = get64(&in);
	get_copy(&in, c->sum, sizeof(c->sum));
	return done(&in, "commit", err);
}

int kc_get_nr(const struct kc_rec *rec, uint64_t *nr, uint64_t *us, struct kc_err *err)
{
	struct in in = in_rec(rec);

	*nr = get64(&in);
	*us = get64(&in);
	return done(&in, rec->type == KC_ACK ? "acknowledgement" : "abort", err);
}

int kc_get_heartbeat(const struct kc_rec *rec, uint64_t *us, struct kc_err *err)
{
	struct in in = in_rec(rec);

	*us = get64(&in);
	return done(&in, "heartbeat", err);
}

int kc_get_end(const struct kc_rec *rec, uint32_t *reason, struct kc_err *err)
{
	struct in in = in_rec(rec);

	*reason = get32(&in);
	return done(&in, "end", err);
}

int kc_get_digest_req(const struct kc_rec *rec, struct kc_digest_req *r, struct kc_err *err)
{
	struct in in = in_rec(rec);

	r->first = get64(&in);
	r->n = get32(&in);
	r->block = get16(&in);
	get_reserved(&in, 2);
	if (!r->n || r->n > KC_DIGESTS_CHUNK)
		in.bad = true;
	else if (rec->type == KC_DIGESTS)
		r->digests = get_bytes(&in, (size_t)r->n * KC_DIGEST_SIZE);
	return done(&in, "digest", err);
}
