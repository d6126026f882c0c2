// SPDX-License-Identifier: GPL-2.0-only
/*
 * Merging a chain of epochs into one full epoch.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "store_internal.h"

/* A record into the merged file, summed up unless it is HELLO or COMMIT. */
static int merge_put(FILE *f, XXH3_state_t *sum, uint64_t *records, const void *data, size_t len)
{
	if (records) {
		XXH3_128bits_update(sum, data, len);
		++*records;
	}
	return fwrite(data, 1, len, f) == len ? 0 : -1;
}

/* A page of @p's block and number into a record; returns its length. */
static size_t put_page(struct kc_packer *pk, struct kc_page *p, const uint8_t *data, uint8_t *buf)
{
	struct kc_zero z = { .block = p->block, .page = p->page, .npages = 1 };
	size_t len;

	if (p->block != KC_STATE_BLOCK && kc_is_zero_page(data))
		return kc_put_zero(buf, &z);
	kc_pack(pk, 1, p, data);
	len = kc_put_page(buf, p);
	memcpy(buf + len, p->data, p->len);
	return len + p->len;
}

/* The record of a page that is not zero; returns its length, or a negative errno. */
static ssize_t merge_page(struct kc_place *pl, const struct kc_store *st, const size_t *chain,
			  uint16_t block, uint64_t page, struct kc_packer *pk,
			  uint8_t buf[KC_PAGE_REC_MAX], struct kc_err *err)
{
	struct kc_page p = { .block = block, .page = page };
	uint64_t at = kc_place_at(pl, block, page);
	uint8_t whole[KC_PAGE_SIZE];
	struct kc_rec rec;
	int rc;

	if (at & KC_AT_PARTS) {
		rc = kc_place_get(pl, st, chain, block, page, whole, err);
		return rc ? rc : (ssize_t)put_page(pk, &p, whole, buf);
	}
	rc = kc_place_read(pl, st, chain, at, KC_PAGE, buf, &rec, err);
	return rc ? rc : (ssize_t)(KC_REC_HDR + rec.len);
}

static int merge_block(struct kc_place *pl, const struct kc_store *st, const size_t *chain,
		       uint16_t block, struct kc_packer *pk, FILE *f, XXH3_state_t *sum,
		       uint64_t *records, struct kc_err *err)
{
	uint64_t page, n, npages = kc_guest_block_pages(pl->guest, block);
	struct kc_zero z = { .block = block };
	uint8_t buf[KC_PAGE_REC_MAX];
	ssize_t len;

	for (page = 0; page < npages; page += n) {
		if (!kc_place_at(pl, block, page))
			return kc_fail(err, EPROTO, "a page is nowhere");
		n = 1;
		if (kc_place_at(pl, block, page) == KC_AT_ZERO) {
			while (page + n < npages && kc_place_at(pl, block, page + n) == KC_AT_ZERO)
				n++;
			z.page = page;
			z.npages = n;
			len = kc_put_zero(buf, &z);
		} else {
			len = merge_page(pl, st, chain, block, page, pk, buf, err);
			if (len < 0)
				return len;
		}
		if (merge_put(f, sum, records, buf, len))
			return kc_fail(err, errno, "cannot write: %s", strerror(errno));
	}
	return 0;
}

static int merge_state(struct kc_place *pl, struct kc_packer *pk, FILE *f, XXH3_state_t *sum,
		       uint64_t *records, struct kc_err *err)
{
	struct kc_state state = { .len = pl->state.len,
				  .flags = pl->state.stopped ? KC_STATE_STOPPED : 0,
				  .xxh = XXH3_64bits(pl->state.data, pl->state.len) };
	uint8_t buf[KC_PAGE_REC_MAX], page[KC_PAGE_SIZE];
	struct kc_page p = { .block = KC_STATE_BLOCK };
	size_t len, n;
	int rc;

	len = kc_put_state(buf, &state);
	rc = merge_put(f, sum, records, buf, len);
	for (p.page = 0; p.page < KC_STATE_PAGES(pl->state.len) && !rc; p.page++) {
		n = pl->state.len - p.page * KC_PAGE_SIZE;
		memset(page, 0, sizeof(page));
		memcpy(page, pl->state.data + p.page * KC_PAGE_SIZE,
		       n < KC_PAGE_SIZE ? n : KC_PAGE_SIZE);
		len = put_page(pk, &p, page, buf);
		rc = merge_put(f, sum, records, buf, len);
	}
	return rc ? kc_fail(err, errno, "cannot write: %s", strerror(errno)) : 0;
}

static int merge_file(struct kc_place *pl, const struct kc_store *st, const size_t *chain,
		      uint64_t nr, FILE *f, struct kc_err *err)
{
	static const uint8_t nobody[16];
	struct kc_begin b = { .nr = nr, .flags = KC_EPOCH_FULL };
	struct kc_commit c = { .nr = nr, .pages = kc_guest_pages(&st->guest) +
						  kc_guest_disk_pages(&st->guest) };
	struct kc_packer *pk = kc_packer_new(KC_CODEC_LZ4, 1, 0);
	uint8_t *buf = malloc(KC_REC_HDR + KC_REC_MAX);
	XXH3_state_t *sum = XXH3_createState();
	XXH128_canonical_t canonical;
	uint32_t i;
	int rc = -ENOMEM;

	if (!buf || !sum || !pk) {
		kc_fail(err, ENOMEM, "out of memory");
		goto out;
	}
	XXH3_128bits_reset(sum);
	rc = merge_put(f, sum, NULL, buf, kc_put_hello(buf, &st->guest, nobody, 0));
	if (!rc)
		rc = merge_put(f, sum, &c.records, buf, kc_put_begin(buf, &b));
	if (rc)
		rc = kc_fail(err, errno, "cannot write: %s", strerror(errno));
	for (i = 0; i < KC_MAX_INDEX && !rc; i++)
		rc = merge_block(pl, st, chain, kc_block_of_index(i), pk, f, sum, &c.records, err);
	if (!rc)
		rc = merge_state(pl, pk, f, sum, &c.records, err);
	if (rc)
		goto out;
	XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(sum));
	memcpy(c.sum, canonical.digest, sizeof(c.sum));
	if (merge_put(f, sum, NULL, buf, kc_put_commit(buf, &c)) || fflush(f) ||
	    fdatasync(fileno(f)))
		rc = kc_fail(err, errno, "cannot write: %s", strerror(errno));
out:
	free(buf);
	XXH3_freeState(sum);
	kc_packer_free(pk);
	return rc;
}

/* All up to epoch @nr into one full epoch with its name. */
int kc_store_merge(const char *path, uint64_t nr, uint64_t *bytes, struct kc_err *err)
{
	struct kc_place pl = { 0 };
	struct kc_store st;
	size_t *chain = NULL;
	char name[40];
	FILE *f = NULL;
	ssize_t n;
	int fd, rc;

	rc = kc_store_read(path, &st, err);
	if (rc)
		return rc;
	n = kc_store_chain(&st, nr, &chain, err);
	rc = n < 0 ? n : kc_place_init(&pl, &st.guest, n, err);
	if (!rc)
		rc = kc_store_replay(&st, chain, n, &kc_place_ops, &pl, &pl.state, NULL, err);
	if (!rc) {
		fd = openat(st.dir, KC_STORE_MERGE_TMP,
			    O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
		f = fd < 0 ? NULL : fdopen(fd, "w");
		if (!f) {
			rc = kc_fail(err, errno, "cannot write to %s: %s", path, strerror(errno));
			if (fd >= 0)
				close(fd);
		} else {
			rc = merge_file(&pl, &st, chain, nr, f, err);
			*bytes = ftello(f);
			fclose(f);
		}
	}
	kc_store_file_name(name, nr);
	if (!rc && (renameat(st.dir, KC_STORE_MERGE_TMP, st.dir, name) || fsync(st.dir)))
		rc = kc_fail(err, errno, "cannot rename in %s: %s", path, strerror(errno));
	if (rc)
		unlinkat(st.dir, KC_STORE_MERGE_TMP, 0);
	kc_place_free(&pl);
	free(chain);
	kc_store_free(&st);
	return rc;
}
