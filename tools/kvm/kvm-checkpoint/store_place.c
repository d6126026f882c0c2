// SPDX-License-Identifier: GPL-2.0-only
/*
 * Where in the files of a chain the last version of each page is.
 *
 * Of disks there are parts of pages: such a page is a list, from the newest part back to what was
 * there before all of them.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "store_internal.h"

/* Pages whose places are kept together */
#define GROUP 512u
#define NR_GROUPS(npages) (((npages) + GROUP - 1) / GROUP)

/* What a group of zeros has in place of memory */
static uint64_t all_zero[1];

int kc_place_init(struct kc_place *pl, const struct kc_guest *guest, size_t nr_files,
		  struct kc_err *err)
{
	uint64_t npages;
	uint32_t i;

	memset(pl, 0, sizeof(*pl));
	pl->guest = guest;
	pl->up = kc_unpacker_new();
	pl->fds = malloc((nr_files + 1) * sizeof(*pl->fds));
	if (!pl->up || !pl->fds)
		return kc_fail(err, ENOMEM, "out of memory");
	for (pl->nr_fds = 0; pl->nr_fds < nr_files; pl->nr_fds++)
		pl->fds[pl->nr_fds] = -1;
	for (i = 0; i < KC_MAX_INDEX; i++) {
		npages = kc_guest_block_pages(guest, kc_block_of_index(i));
		if (!npages)
			continue;
		pl->at[i] = calloc(NR_GROUPS(npages), sizeof(*pl->at[i]));
		if (!pl->at[i])
			return kc_fail(err, ENOMEM, "out of memory");
	}
	return 0;
}

void kc_place_free(struct kc_place *pl)
{
	uint64_t g, n;
	uint32_t i;

	while (pl->nr_fds--) {
		if (pl->fds[pl->nr_fds] >= 0)
			close(pl->fds[pl->nr_fds]);
	}
	for (i = 0; i < KC_MAX_INDEX; i++) {
		if (!pl->at[i])
			continue;
		n = NR_GROUPS(kc_guest_block_pages(pl->guest, kc_block_of_index(i)));
		for (g = 0; g < n; g++) {
			if (pl->at[i][g] != all_zero)
				free(pl->at[i][g]);
		}
		free(pl->at[i]);
	}
	free(pl->parts);
	free(pl->fds);
	free(pl->state.data);
	kc_unpacker_free(pl->up);
	memset(pl, 0, sizeof(*pl));
}

uint64_t kc_place_at(const struct kc_place *pl, uint16_t block, uint64_t page)
{
	const uint64_t *group = pl->at[kc_block_index(block)][page / GROUP];

	if (group == all_zero)
		return KC_AT_ZERO;
	return group ? group[page % GROUP] : 0;
}

static int set_at(struct kc_place *pl, uint16_t block, uint64_t page, uint64_t at,
		  struct kc_err *err)
{
	uint64_t **group = &pl->at[kc_block_index(block)][page / GROUP], *new;
	unsigned int i;

	if (!*group || *group == all_zero) {
		new = malloc(GROUP * sizeof(*new));
		if (!new)
			return kc_fail(err, ENOMEM, "out of memory");
		for (i = 0; i < GROUP; i++)
			new[i] = *group ? KC_AT_ZERO : 0;
		*group = new;
	}
	(*group)[page % GROUP] = at;
	return 0;
}

static int place_of(size_t file, uint64_t offset, uint64_t *at, struct kc_err *err)
{
	if (offset >> KC_AT_SHIFT || file + 1 >= KC_AT_PARTS >> KC_AT_SHIFT)
		return kc_fail(err, EFBIG, "the chain is too large");
	*at = (uint64_t)(file + 1) << KC_AT_SHIFT | offset;
	return 0;
}

int kc_place_page(void *ctx, size_t file, uint64_t offset, uint16_t block, uint64_t page,
		  const void *data, struct kc_err *err)
{
	uint64_t at = 0;
	int rc = place_of(file, offset, &at, err);

	(void)data;
	return rc ? rc : set_at(ctx, block, page, at, err);
}

int kc_place_zero(void *ctx, uint16_t block, uint64_t page, uint64_t n, struct kc_err *err)
{
	struct kc_place *pl = ctx;
	int rc = 0;

	while (n && !rc) {
		uint64_t **group = &pl->at[kc_block_index(block)][page / GROUP];
		uint64_t here = 1;

		if (!(page % GROUP) && n >= GROUP) {
			if (*group != all_zero)
				free(*group);
			*group = all_zero;
			here = GROUP;
		} else if (*group != all_zero) {
			rc = set_at(pl, block, page, KC_AT_ZERO, err);
		}
		page += here;
		n -= here;
	}
	return rc;
}

int kc_place_part(void *ctx, size_t file, uint64_t offset, const struct kc_part *part,
		  struct kc_err *err)
{
	struct kc_place *pl = ctx;
	struct kc_place_part *p;
	int rc;

	if (pl->nr_parts == pl->room) {
		pl->room = pl->room ? 2 * pl->room : 1024;
		p = realloc(pl->parts, pl->room * sizeof(*p));
		if (!p) {
			pl->room = pl->nr_parts;
			return kc_fail(err, ENOMEM, "out of memory");
		}
		pl->parts = p;
	}
	p = &pl->parts[pl->nr_parts];
	rc = place_of(file, offset, &p->at, err);
	p->before = kc_place_at(pl, part->block, part->page);
	if (!rc)
		rc = set_at(pl, part->block, part->page, KC_AT_PARTS | pl->nr_parts, err);
	if (!rc)
		pl->nr_parts++;
	return rc;
}

const struct kc_store_ops kc_place_ops = {
	.page = kc_place_page,
	.zero = kc_place_zero,
	.part = kc_place_part,
};

int kc_place_read(struct kc_place *pl, const struct kc_store *st, const size_t *chain, uint64_t at,
		  uint16_t type, uint8_t buf[KC_PAGE_REC_MAX], struct kc_rec *rec,
		  struct kc_err *err)
{
	size_t file = (at >> KC_AT_SHIFT) - 1;
	ssize_t n;

	if (pl->fds[file] < 0)
		pl->fds[file] = kc_store_open_file(st, st->files[chain[file]].nr);
	n = pl->fds[file] < 0 ? -1 : pread(pl->fds[file], buf, KC_PAGE_REC_MAX,
					   at & ((1ull << KC_AT_SHIFT) - 1));
	if (n < 0)
		return kc_fail(err, errno, "cannot read %s: %s", st->path, strerror(errno));
	if (kc_get_rec(buf, n, rec, NULL) <= 0 || rec->type != type)
		return kc_fail(err, EPROTO, "an epoch in %s was changed while it was read",
			       st->path);
	return 0;
}

/* A page as it was before there were parts of it. */
static int get_whole(struct kc_place *pl, const struct kc_store *st, const size_t *chain,
		     uint64_t at, uint8_t *out, struct kc_err *err)
{
	uint8_t buf[KC_PAGE_REC_MAX];
	struct kc_page p;
	struct kc_rec rec;
	int rc;

	if (at <= KC_AT_ZERO) {
		memset(out, 0, KC_PAGE_SIZE);
		return 0;
	}
	rc = kc_place_read(pl, st, chain, at, KC_PAGE, buf, &rec, err);
	if (!rc)
		rc = kc_get_page(&rec, &p, err);
	return rc ? rc : kc_unpack(pl->up, &p, NULL, out, err);
}

static int get_part(struct kc_place *pl, const struct kc_store *st, const size_t *chain,
		    uint64_t at, uint8_t *out, struct kc_err *err)
{
	uint8_t buf[KC_PAGE_REC_MAX];
	struct kc_part p;
	struct kc_rec rec;
	int rc;

	rc = kc_place_read(pl, st, chain, at, KC_PART, buf, &rec, err);
	if (!rc)
		rc = kc_get_part(&rec, &p, err);
	if (rc)
		return rc;
	memcpy(out + p.offset, p.data, p.len);
	return 0;
}

int kc_place_get(struct kc_place *pl, const struct kc_store *st, const size_t *chain,
		 uint16_t block, uint64_t page, uint8_t out[KC_PAGE_SIZE], struct kc_err *err)
{
	uint64_t at = kc_place_at(pl, block, page), first = at, *list;
	size_t n = 0;
	int rc;

	for (; at & KC_AT_PARTS; at = pl->parts[at & ~KC_AT_PARTS].before)
		n++;
	rc = get_whole(pl, st, chain, at, out, err);
	if (rc || !n)
		return rc;
	/* They were written from the oldest to the newest. */
	list = malloc(n * sizeof(*list));
	if (!list)
		return kc_fail(err, ENOMEM, "out of memory");
	n = 0;
	for (at = first; at & KC_AT_PARTS; at = pl->parts[at & ~KC_AT_PARTS].before)
		list[n++] = pl->parts[at & ~KC_AT_PARTS].at;
	while (n-- && !rc)
		rc = get_part(pl, st, chain, list[n], out, err);
	free(list);
	return rc;
}
