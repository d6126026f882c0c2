// SPDX-License-Identifier: GPL-2.0-only
/*
 * Writes to disks into records: whole pages as those of RAM, and parts of pages.
 */
#include <errno.h>

#include "backend.h"

static int put_part(struct kc_sink *s, const struct kc_part *p, struct kc_err *err)
{
	uint8_t rec[KC_REC_HDR + KC_PART_HDR];
	int rc = kc_sink_flush_zeros(s, err);

	if (rc)
		return rc;
	kc_pack_zero(s->packer, p->block, p->page);
	kc_put_part(rec, p);
	return kc_sink_emit(s, rec, sizeof(rec), p->data, p->len, err);
}

int kc_epoch_disk(struct kc_sink *s, uint32_t disk, uint64_t offset, const void *data, size_t len,
		  struct kc_err *err)
{
	static const uint8_t zeros[KC_PAGE_SIZE];
	const uint8_t *from = data;
	uint64_t size;
	int rc;

	rc = kc_sink_usable(s, true, err);
	if (rc)
		return rc;
	size = kc_guest_block_pages(&s->guest, KC_DISK_BLOCK + disk) * KC_PAGE_SIZE;
	if (offset > size || len > size - offset)
		return kc_fail(err, EINVAL, "the guest has no %zu bytes at %llu of disk %u", len,
			       (unsigned long long)offset, disk);
	s->stats.disk_bytes += len;
	while (len && !rc) {
		struct kc_part p = { .page = offset / KC_PAGE_SIZE,
				     .offset = offset % KC_PAGE_SIZE,
				     .block = KC_DISK_BLOCK + disk };

		p.len = len < KC_PAGE_SIZE - p.offset ? len : KC_PAGE_SIZE - p.offset;
		p.data = from ? from : zeros;
		if (p.block == s->ahead.block && p.page - s->ahead.first < s->ahead.n)
			s->ahead_stale = true;
		if (p.len == KC_PAGE_SIZE) {
			rc = kc_sink_put_page(s, p.block, p.page, p.data, err);
		} else {
			p.xxh = XXH3_64bits(p.data, p.len);
			rc = put_part(s, &p, err);
		}
		offset += p.len;
		len -= p.len;
		from = from ? from + p.len : NULL;
	}
	return kc_sink_broken(s, rc);
}
