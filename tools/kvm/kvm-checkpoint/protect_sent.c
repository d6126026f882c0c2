// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint protect: which pages are in epochs that are not acknowledged yet.
 *
 * When the link was lost, the receiver has all epochs up to one of these.  What it lacks is in the
 * later ones, or was written since: no need to compare all of memory.
 */
#include <stdlib.h>
#include <string.h>

#include "protect.h"

static void drop(struct sent_epoch *e)
{
	free(e->pages);
	*e = (struct sent_epoch){ .nr = 0 };
}

void kc_sent_forget(struct protect *p)
{
	unsigned int i;

	for (i = 0; i < KC_SENT; i++)
		drop(&p->sent[i]);
	p->known_from = 0;
}

void kc_sent_acked(struct protect *p)
{
	unsigned int i;

	for (i = 0; i < KC_SENT; i++) {
		if (p->sent[i].nr && p->sent[i].nr <= p->acked)
			drop(&p->sent[i]);
	}
	/* A receiver whose disk was set back has an older one, and what that lacks is gone. */
	if (p->known_from && p->acked > p->known_from)
		p->known_from = p->acked;
}

void kc_sent_note(struct protect *p, uint64_t nr)
{
	const struct copy *c = &p->epoch.copy;
	struct sent_epoch *e = NULL, *unused = NULL;
	struct sent_page *pages;
	unsigned int i;
	size_t k;

	if (!p->known_from)
		return;
	for (i = 0; i < KC_SENT; i++) {
		if (p->sent[i].nr == nr)
			e = &p->sent[i];
		else if (!p->sent[i].nr)
			unused = &p->sent[i];
	}
	e = e ? e : unused;
	pages = e ? realloc(e->pages, (e->nr_pages + c->nr + c->nr_holes + 1) * sizeof(*pages)) : NULL;
	if (!pages) {
		/* Then all is compared. */
		kc_sent_forget(p);
		return;
	}
	e->nr = nr;
	e->pages = pages;
	for (k = 0; k < c->nr; k++)
		pages[e->nr_pages++] =
			(struct sent_page){ c->pages[k].page, 1, c->pages[k].block };
	for (k = 0; k < c->nr_holes; k++)
		pages[e->nr_pages++] =
			(struct sent_page){ c->holes[k].page, c->holes[k].n, c->holes[k].block };
}

bool kc_sent_again(struct protect *p)
{
	uint64_t last = kc_sink_last_epoch(p->sink);
	unsigned int i;
	size_t k;

	if (!p->known_from || last < p->known_from || last > p->nr ||
	    !kc_sink_continues(p->sink)) {
		kc_sent_forget(p);
		return false;
	}
	for (i = 0; i < KC_SENT; i++) {
		struct sent_epoch *e = &p->sent[i];

		for (k = 0; e->nr > last && k < e->nr_pages; k++) {
			p->guest.dirty.has_holes = true;
			if (dirty_add(&p->guest.dirty, e->pages[k].block, e->pages[k].page,
				      e->pages[k].n)) {
				kc_sent_forget(p);
				return false;
			}
		}
		drop(e);
	}
	return true;
}
