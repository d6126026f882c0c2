// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where in the files of a chain the last version of each page is.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "store_internal.h"

int kc_place_init(struct kc_place *pl, const struct kc_guest *guest, size_t nr_files,
		  struct kc_err *err)
{
	uint32_t i;

	memset(pl, 0, sizeof(*pl));
	pl->guest = guest;
	pl->up = kc_unpacker_new();
	pl->fds = malloc((nr_files + 1) * sizeof(*pl->fds));
	if (!pl->up || !pl->fds)
		return kc_fail(err, ENOMEM, "out of memory");
	for (pl->nr_fds = 0; pl->nr_fds < nr_files; pl->nr_fds++)
		pl->fds[pl->nr_fds] = -1;
	for (i = 0; i < guest->nr_blocks; i++) {
		pl->at[i] = calloc(guest->blocks[i].npages, sizeof(uint64_t));
		if (!pl->at[i])
			return kc_fail(err, ENOMEM, "out of memory");
	}
	return 0;
}

void kc_place_free(struct kc_place *pl)
{
	uint32_t i;

	while (pl->nr_fds--) {
		if (pl->fds[pl->nr_fds] >= 0)
			close(pl->fds[pl->nr_fds]);
	}
	for (i = 0; i < KC_MAX_BLOCKS; i++)
		free(pl->at[i]);
	free(pl->fds);
	free(pl->state.data);
	kc_unpacker_free(pl->up);
	memset(pl, 0, sizeof(*pl));
}

int kc_place_page(void *ctx, size_t file, uint64_t offset, uint16_t block, uint64_t page,
		  const void *data, struct kc_err *err)
{
	struct kc_place *pl = ctx;

	(void)data;
	if (offset >> KC_AT_SHIFT || file >> (63 - KC_AT_SHIFT))
		return kc_fail(err, EFBIG, "the chain is too large");
	pl->at[block][page] = (uint64_t)(file + 1) << KC_AT_SHIFT | offset;
	return 0;
}

int kc_place_zero(void *ctx, uint16_t block, uint64_t page, uint64_t n, struct kc_err *err)
{
	struct kc_place *pl = ctx;

	(void)err;
	while (n--)
		pl->at[block][page++] = KC_AT_ZERO;
	return 0;
}

const struct kc_store_ops kc_place_ops = {
	.page = kc_place_page,
	.zero = kc_place_zero,
};

/* Read the PAGE record at a place into @buf. */
int kc_place_read(struct kc_place *pl, const struct kc_store *st, const size_t *chain, uint64_t at,
		  uint8_t buf[KC_REC_HDR + KC_PAGE_HDR + KC_PAGE_SIZE], struct kc_rec *rec,
		  struct kc_err *err)
{
	size_t file = (at >> KC_AT_SHIFT) - 1;
	ssize_t n;

	if (pl->fds[file] < 0)
		pl->fds[file] = kc_store_open_file(st, st->files[chain[file]].nr);
	n = pl->fds[file] < 0 ? -1 :
				pread(pl->fds[file], buf, KC_REC_HDR + KC_PAGE_HDR + KC_PAGE_SIZE,
				      at & ((1ull << KC_AT_SHIFT) - 1));
	if (n < 0)
		return kc_fail(err, errno, "cannot read %s: %s", st->path, strerror(errno));
	if (kc_get_rec(buf, n, rec, NULL) <= 0 || rec->type != KC_PAGE)
		return kc_fail(err, EPROTO, "an epoch in %s was changed while it was read",
			       st->path);
	return 0;
}
