// SPDX-License-Identifier: GPL-2.0-only
/*
 * Free pages that a balloon tells of when it is asked (free-page-hint): a first copy does without.
 *
 * The guest is asked after its pages are logged.  What it names was free at a moment after that, so
 * that whatever is in it later was written later, and is in a log.  A hint is worth nothing for a
 * page that is dirty: the guest may have taken the page back before the hint is read here.
 *
 * The guest does not wait for any of this, and who has no such balloon says nothing.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "guest.h"

/* It takes the guest some time to begin, and to come to an end */
#define BEGIN_US	200000
#define PAUSE_US	10000
#define END_US		1000000

static int ask(struct guest *g, const char *action, uint64_t *nr, uint64_t *offset,
	       struct kc_err *err)
{
	struct json_object *args = json_object_new_object(), *o = NULL;
	int rc;

	json_object_object_add(args, "action", json_object_new_string(action));
	rc = qmp_call(&g->qmp, "x-checkpoint-hints", args, &o, err);
	if (rc)
		return rc;
	*nr = qmp_u64(o, "runs");
	*offset = qmp_u64(o, "offset");
	json_object_put(o);
	return 0;
}

static void set_bits(uint64_t *bits, uint64_t page, uint64_t n)
{
	while (n) {
		uint64_t first = page % 64, here = 64 - first < n ? 64 - first : n;

		bits[page / 64] |= kc_word_mask(first, here);
		page += here;
		n -= here;
	}
}

/* What it has said since the last time: how many runs, or a negative errno */
static int take(struct guest *g, const char *action, struct kc_err *err)
{
	uint64_t nr, offset, i;
	struct qemu_run run;
	int rc = ask(g, action, &nr, &offset, err);

	for (i = 0; i < nr && !rc; i++) {
		int block;

		rc = guest_read_buffer(g, &run, sizeof(run), offset + i * sizeof(run), err);
		if (rc)
			break;
		block = guest_block_of(g, run.block);
		if (block < 0 || run.page > g->block_ids[block].npages ||
		    run.npages > g->block_ids[block].npages - run.page)
			return kc_fail(err, ESTALE,
				       "QEMU has hints of memory that was not there before: protect the guest anew");
		set_bits(g->hinted[block], run.page, run.npages);
		/* Who says a lot must not keep the standby from hearing of us */
		if (!(i % 1024) && g->qmp.idle && g->qmp.idle(g->qmp.idle_ctx))
			break;
	}
	return rc ? rc : nr > 0;
}

/* Nothing of what it has said counts any more */
static void forget(struct guest *g)
{
	guest_free_bits(g->hinted);
}

int guest_begin_hints(struct guest *g, struct kc_err *err)
{
	uint64_t begun = kc_now_us(), last = 0, nr, offset;
	int rc;

	forget(g);
	if (!g->has_balloon)
		return 0;
	if (guest_new_bits(g, g->hinted))
		return kc_fail(err, ENOMEM, "no memory for the list of free pages");
	rc = ask(g, "start", &nr, &offset, err);
	if (rc) {
		/* A balloon that cannot be asked, or a QEMU */
		forget(g);
		return rc == -EREMOTEIO ? 0 : rc;
	}
	g->hints = true;
	for (;;) {
		uint64_t now = kc_now_us();

		rc = take(g, "get", err);
		if (rc < 0)
			return rc;
		if (rc)
			last = now;
		if (last ? now - last > 2 * PAUSE_US || now - begun > END_US :
		    now - begun > BEGIN_US)
			break;
		if (g->qmp.idle && g->qmp.idle(g->qmp.idle_ctx))
			break;
		usleep(PAUSE_US);
	}
	/* It need not go on */
	rc = take(g, "stop", err);
	return rc < 0 ? rc : 0;
}

bool guest_is_hinted(const struct guest *g, uint32_t block, uint64_t page)
{
	return g->hinted[block] && g->hinted[block][page / 64] & 1ull << page % 64;
}

int guest_end_hints(struct guest *g, struct kc_err *err)
{
	uint64_t nr, offset;
	int rc = 0;

	/* Before the first pause: its memory is not free while it is hinted at */
	if (g->hints)
		rc = ask(g, "done", &nr, &offset, err);
	g->hints = false;
	forget(g);
	return rc;
}

void guest_close_hints(struct guest *g)
{
	g->hints = false;
	forget(g);
}
