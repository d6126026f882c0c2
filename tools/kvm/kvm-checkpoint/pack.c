// SPDX-License-Identifier: GPL-2.0-only
/*
 * Encoding and decoding of pages.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <lz4.h>
#include <zstd.h>

#include "stream.h"

bool kc_is_zero_page(const void *data)
{
	const char *p = data;

	return !p[0] && !p[KC_PAGE_SIZE - 1] && !memcmp(p, p + 1, KC_PAGE_SIZE - 1);
}

/* --- The sender's side ---------------------------------------------------- */

/* For what is worth sending instead of the page */
#define ROOM (KC_PAGE_SIZE - KC_PAGE_SIZE / 16)

/* The last version of a page, in a cache where each page has one place to be. */
struct entry {
	uint64_t page, epoch;
	uint32_t block;
	bool used;
};

/*
 * What is encrypted or compressed already does not compress, and to find that out costs more than all
 * else of a page.  Where so many pages in a row did not, only one of some more is tried.
 */
#define IN_A_ROW 16
#define ONE_OF 8

struct tries {
	unsigned int failed, skipped;
};

struct kc_packer {
	enum kc_codec codec;
	int level;
	ZSTD_CCtx *zstd;
	void *lz4;
	LZ4_stream_t *lz4_deltas;
	struct tries deltas, pages;
	size_t nr_entries;
	struct entry *entries;
	uint8_t *versions;
	uint8_t delta[KC_PAGE_SIZE];
	/* Compressed, as delta and not. */
	uint8_t out[2][KC_PAGE_SIZE];
};

struct kc_packer *kc_packer_new(enum kc_codec codec, int level, uint64_t delta_cache)
{
	struct kc_packer *pk = calloc(1, sizeof(*pk));

	if (!pk)
		return NULL;
	pk->codec = codec;
	pk->level = level;
	pk->nr_entries = codec == KC_CODEC_NONE ? 0 :
			 delta_cache / (KC_PAGE_SIZE + sizeof(struct entry));
	if (codec == KC_CODEC_LZ4) {
		pk->lz4 = malloc(LZ4_sizeofState());
		pk->lz4_deltas = LZ4_createStream();
		if (!pk->lz4 || !pk->lz4_deltas)
			goto fail;
	}
	if (codec == KC_CODEC_ZSTD) {
		pk->zstd = ZSTD_createCCtx();
		if (!pk->zstd)
			goto fail;
	}
	if (pk->nr_entries) {
		pk->entries = calloc(pk->nr_entries, sizeof(*pk->entries));
		/* Not touched, not used: a guest that writes little needs little. */
		pk->versions = mmap(NULL, pk->nr_entries * KC_PAGE_SIZE, PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (pk->versions == MAP_FAILED)
			pk->versions = NULL;
		if (!pk->entries || !pk->versions)
			goto fail;
	}
	return pk;
fail:
	kc_packer_free(pk);
	return NULL;
}

void kc_packer_free(struct kc_packer *pk)
{
	if (!pk)
		return;
	ZSTD_freeCCtx(pk->zstd);
	free(pk->lz4);
	LZ4_freeStream(pk->lz4_deltas);
	free(pk->entries);
	if (pk->versions)
		munmap(pk->versions, pk->nr_entries * KC_PAGE_SIZE);
	free(pk);
}

static struct entry *find(struct kc_packer *pk, uint16_t block, uint64_t page)
{
	if (!pk->nr_entries)
		return NULL;
	/* Neighbours are often written together and must not push each other out. */
	return &pk->entries[(page + block * 0x9e3779b1ull) % pk->nr_entries];
}

static bool holds(const struct entry *e, uint16_t block, uint64_t page)
{
	return e && e->used && e->block == block && e->page == page;
}

static bool is_worth_a_try(struct tries *t)
{
	return t->failed < IN_A_ROW || !(t->skipped++ % ONE_OF);
}

static size_t note_try(struct tries *t, size_t n)
{
	t->failed = n ? 0 : t->failed + 1;
	return n;
}

/* Compress to less than @room bytes; 0 if it does not fit. */
static size_t compress_page(struct kc_packer *pk, const void *data, uint8_t *out, size_t room)
{
	size_t n;

	switch (pk->codec) {
	case KC_CODEC_LZ4:
		return LZ4_compress_fast_extState(pk->lz4, data, (char *)out, KC_PAGE_SIZE, room,
						  1);
	case KC_CODEC_ZSTD:
		n = ZSTD_compressCCtx(pk->zstd, out, room, data, KC_PAGE_SIZE, pk->level);
		return ZSTD_isError(n) ? 0 : n;
	default:
		return 0;
	}
}

/*
 * The same for a delta, which is zero almost everywhere: to clear 16 KiB of hash table for it, as above,
 * would be most of the work.  A stream that begins again can do without; its blocks stand alone, too.
 */
static size_t compress_delta(struct kc_packer *pk, size_t room)
{
	size_t n;

	if (pk->codec != KC_CODEC_LZ4)
		return compress_page(pk, pk->delta, pk->out[0], room);
	LZ4_resetStream_fast(pk->lz4_deltas);
	n = LZ4_compress_fast_continue(pk->lz4_deltas, (const char *)pk->delta, (char *)pk->out[0],
				       KC_PAGE_SIZE, room, 1);
	/* What is in it after a failure is not defined */
	if (!n)
		LZ4_initStream(pk->lz4_deltas, sizeof(*pk->lz4_deltas));
	return n;
}

/* @out may be @a */
static void xor_pages(uint8_t *out, const uint8_t *a, const uint8_t *b)
{
	typedef uint8_t vector __attribute__((vector_size(32), aligned(1), may_alias));
	size_t i;

	for (i = 0; i < KC_PAGE_SIZE; i += sizeof(vector))
		*(vector *)(out + i) = *(const vector *)(a + i) ^ *(const vector *)(b + i);
}

bool kc_pack(struct kc_packer *pk, uint64_t epoch, struct kc_page *p, const void *data)
{
	struct entry *e = find(pk, p->block, p->page);
	uint8_t *version = e ? pk->versions + (e - pk->entries) * KC_PAGE_SIZE : NULL;
	size_t room = ROOM, n = 0;

	if (holds(e, p->block, p->page) && !memcmp(version, data, KC_PAGE_SIZE))
		return true;

	p->xxh = XXH3_64bits(data, KC_PAGE_SIZE);
	p->enc = KC_ENC_RAW;
	p->data = data;
	p->len = KC_PAGE_SIZE;
	if (holds(e, p->block, p->page) && e->epoch != epoch && is_worth_a_try(&pk->deltas)) {
		xor_pages(pk->delta, version, data);
		n = note_try(&pk->deltas, compress_delta(pk, room));
		if (n) {
			p->enc = KC_ENC_DELTA | pk->codec;
			p->data = pk->out[0];
			p->len = room = n;
		}
	}
	/* A small delta is good enough: do not try the other way. */
	if (n ? n > KC_PAGE_SIZE / 4 : is_worth_a_try(&pk->pages)) {
		n = compress_page(pk, data, pk->out[1], room);
		/* Not less than a delta has is no failure */
		if (room == ROOM)
			note_try(&pk->pages, n);
		if (n) {
			p->enc = pk->codec;
			p->data = pk->out[1];
			p->len = n;
		}
	}
	if (e) {
		*e = (struct entry){
			.page = p->page, .epoch = epoch, .block = p->block, .used = true,
		};
		memcpy(version, data, KC_PAGE_SIZE);
	}
	return false;
}

void kc_pack_zero(struct kc_packer *pk, uint16_t block, uint64_t page)
{
	struct entry *e = find(pk, block, page);

	if (holds(e, block, page))
		e->used = false;
}

void kc_pack_zeros(struct kc_packer *pk, uint16_t block, uint64_t page, uint64_t n)
{
	size_t i;

	if (n < pk->nr_entries) {
		while (n--)
			kc_pack_zero(pk, block, page++);
		return;
	}
	for (i = 0; i < pk->nr_entries; i++) {
		if (pk->entries[i].block == block && pk->entries[i].page >= page &&
		    pk->entries[i].page - page < n)
			pk->entries[i].used = false;
	}
}

void kc_packer_forget(struct kc_packer *pk, uint64_t epoch)
{
	size_t i;

	for (i = 0; i < pk->nr_entries; i++) {
		if (!epoch || pk->entries[i].epoch == epoch)
			pk->entries[i].used = false;
	}
}

/* --- The receiver's side -------------------------------------------------- */

struct kc_unpacker {
	ZSTD_DCtx *zstd;
};

struct kc_unpacker *kc_unpacker_new(void)
{
	struct kc_unpacker *up = calloc(1, sizeof(*up));

	if (up)
		up->zstd = ZSTD_createDCtx();
	if (up && !up->zstd) {
		free(up);
		up = NULL;
	}
	return up;
}

void kc_unpacker_free(struct kc_unpacker *up)
{
	if (up)
		ZSTD_freeDCtx(up->zstd);
	free(up);
}

int kc_unpack(struct kc_unpacker *up, const struct kc_page *p, const void *base, void *out,
	      struct kc_err *err)
{
	bool ok = false;

	switch (p->enc & ~KC_ENC_DELTA) {
	case KC_ENC_RAW:
		ok = p->len == KC_PAGE_SIZE;
		if (ok)
			memcpy(out, p->data, KC_PAGE_SIZE);
		break;
	case KC_ENC_LZ4:
		ok = LZ4_decompress_safe((const char *)p->data, out, p->len, KC_PAGE_SIZE) ==
		     (int)KC_PAGE_SIZE;
		break;
	case KC_ENC_ZSTD:
		ok = ZSTD_decompressDCtx(up->zstd, out, KC_PAGE_SIZE, p->data, p->len) ==
		     KC_PAGE_SIZE;
		break;
	}
	if (ok && (p->enc & KC_ENC_DELTA)) {
		ok = base;
		if (ok)
			xor_pages(out, out, base);
	}
	if (!ok || !kc_sum_is(XXH3_64bits(out, KC_PAGE_SIZE) == p->xxh))
		return kc_fail(err, EPROTO,
			       "the stream is corrupt: page %llu of block %u does not decode to what was packed",
			       (unsigned long long)p->page, p->block);
	return 0;
}
