// SPDX-License-Identifier: GPL-2.0-only
/*
 * Descriptions of guests: whether they make sense, and whether two are of the same guest.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "stream.h"

/* Enough for any machine of today; keeps sums of pages far from overflow. */
#define MAX_PAGES (1ull << 36)

int kc_guest_check(const struct kc_guest *g, struct kc_err *err)
{
	uint64_t total = 0;
	uint32_t i, j;

	if (g->page_size != KC_PAGE_SIZE)
		return kc_fail(err, EPROTO, "pages of %u bytes: only %u are supported",
			       g->page_size, KC_PAGE_SIZE);
	if (!g->nr_blocks || g->nr_blocks > KC_MAX_BLOCKS)
		return kc_fail(err, EPROTO, "%u blocks of RAM: 1 to %u are supported", g->nr_blocks,
			       KC_MAX_BLOCKS);
	for (i = 0; i < g->nr_blocks; i++) {
		const struct kc_block *b = &g->blocks[i];

		if (!b->name[0] || !b->npages || b->npages > MAX_PAGES - total)
			return kc_fail(err, EPROTO, "RAM block %u has no name or an impossible size",
				       i);
		total += b->npages;
		for (j = 0; j < i; j++) {
			if (!strcmp(b->name, g->blocks[j].name))
				return kc_fail(err, EPROTO,
					       "two blocks of the guest's RAM have the name %s",
					       b->name);
		}
	}
	if (g->nr_disks > KC_MAX_DISKS)
		return kc_fail(err, EPROTO, "%u disks: up to %u are supported", g->nr_disks,
			       KC_MAX_DISKS);
	for (i = 0; i < g->nr_disks; i++) {
		if (!g->disks[i].name[0] || !g->disks[i].npages || g->disks[i].npages > MAX_PAGES)
			return kc_fail(err, EPROTO, "disk %u has no name or an impossible size", i);
	}
	return 0;
}

int kc_guest_copy(struct kc_guest *to, const struct kc_guest *from)
{
	struct kc_block *blocks = calloc(from->nr_blocks, sizeof(*blocks));
	struct kc_disk *disks = calloc(from->nr_disks + 1, sizeof(*disks));

	if (!blocks || !disks) {
		free(blocks);
		free(disks);
		return -ENOMEM;
	}
	memcpy(blocks, from->blocks, from->nr_blocks * sizeof(*blocks));
	if (from->nr_disks)
		memcpy(disks, from->disks, from->nr_disks * sizeof(*disks));
	*to = *from;
	to->blocks = blocks;
	to->disks = disks;
	return 0;
}

void kc_guest_free(struct kc_guest *g)
{
	free(g->blocks);
	free(g->disks);
	g->blocks = NULL;
	g->disks = NULL;
	g->nr_blocks = g->nr_disks = 0;
}

/* The first line of @of that @in has not, into @line. */
static bool missing_line(const char *of, const char *in, char line[100])
{
	const char *p, *q;
	size_t n;

	for (p = of; *p; p += n + (p[n] == '\n')) {
		n = strcspn(p, "\n");
		for (q = in; *q; q += strcspn(q, "\n"), q += *q == '\n') {
			if (!strncmp(p, q, n) && (q[n] == '\n' || !q[n]))
				break;
		}
		if (!*q && n) {
			snprintf(line, 100, "%.*s", (int)n, p);
			return true;
		}
	}
	return false;
}

static int same_hardware(const struct kc_guest *a, const struct kc_guest *b, const char *uuid,
			 struct kc_err *err)
{
	char x[100] = "", y[100] = "";

	if (!memcmp(a->fingerprint, b->fingerprint, sizeof(a->fingerprint)))
		return 0;
	missing_line(a->hardware, b->hardware, x);
	missing_line(b->hardware, a->hardware, y);
	if (!x[0] && !y[0])
		return kc_fail(err, EEXIST,
			       "it holds guest %s (%s) with another machine type or other devices",
			       uuid, a->name);
	return kc_fail(err, EEXIST,
		       "it holds guest %s (%s) with another machine type or other devices: %s%s%s%s%s",
		       uuid, a->name, x[0] ? "with " : "", x, x[0] && y[0] ? ", " : "",
		       y[0] ? "without " : "", y);
}

/* Without UUID and name all guests of a kind look alike, but for the process. */
static bool is_anonymous(const struct kc_guest *g)
{
	static const uint8_t zero[16];

	return !g->name[0] && !memcmp(g->uuid, zero, sizeof(zero)) &&
	       memcmp(g->process, zero, sizeof(zero));
}

int kc_guest_same(const struct kc_guest *a, const struct kc_guest *b, struct kc_err *err)
{
	char ua[37], ub[37];
	uint32_t i;

	kc_uuid_text(a->uuid, ua);
	kc_uuid_text(b->uuid, ub);
	if (memcmp(a->uuid, b->uuid, sizeof(a->uuid)) || strcmp(a->name, b->name))
		return kc_fail(err, EEXIST, "it holds guest %s (%.100s), not %s (%.100s)", ua,
			       a->name, ub, b->name);
	if (is_anonymous(a) && is_anonymous(b) &&
	    memcmp(a->process, b->process, sizeof(a->process)))
		return kc_fail(err, EEXIST,
			       "it holds a guest of another QEMU process, and neither has a UUID or a name to tell whether they are the same: start QEMU with -uuid or -name");
	if (a->nr_blocks != b->nr_blocks)
		return kc_fail(err, EEXIST, "it holds guest %s with %u blocks of RAM, not %u", ua,
			       a->nr_blocks, b->nr_blocks);
	for (i = 0; i < a->nr_blocks; i++) {
		const struct kc_block *x = &a->blocks[i], *y = &b->blocks[i];

		if (strcmp(x->name, y->name) || x->npages != y->npages)
			return kc_fail(err, EEXIST,
				       "it holds guest %s with %llu KiB of RAM in %.80s, not %llu KiB in %.80s",
				       ua, (unsigned long long)x->npages * 4, x->name,
				       (unsigned long long)y->npages * 4, y->name);
	}
	if (a->nr_disks != b->nr_disks)
		return kc_fail(err, EEXIST, "it holds guest %s with %u disks, not %u", ua, a->nr_disks,
			       b->nr_disks);
	for (i = 0; i < a->nr_disks; i++) {
		const struct kc_disk *x = &a->disks[i], *y = &b->disks[i];

		if (strcmp(x->name, y->name) || x->npages != y->npages)
			return kc_fail(err, EEXIST,
				       "it holds guest %s with disk %.80s of %llu KiB, not %.80s of %llu KiB",
				       ua, x->name, (unsigned long long)x->npages * 4, y->name,
				       (unsigned long long)y->npages * 4);
	}
	return same_hardware(a, b, ua, err);
}

uint64_t kc_guest_block_pages(const struct kc_guest *g, uint32_t block)
{
	if (block < g->nr_blocks)
		return g->blocks[block].npages;
	if (block >= KC_DISK_BLOCK && block - KC_DISK_BLOCK < g->nr_disks)
		return g->disks[block - KC_DISK_BLOCK].npages;
	return 0;
}

uint64_t kc_guest_pages(const struct kc_guest *g)
{
	uint64_t n = 0;
	uint32_t i;

	for (i = 0; i < g->nr_blocks; i++)
		n += g->blocks[i].npages;
	return n;
}

uint64_t kc_guest_disk_pages(const struct kc_guest *g)
{
	uint64_t n = 0;
	uint32_t i;

	for (i = 0; i < g->nr_disks; i++)
		n += g->disks[i].npages;
	return n;
}

void kc_uuid_text(const uint8_t u[16], char out[37])
{
	snprintf(out, 37, "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
		 u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7],
		 u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
}
