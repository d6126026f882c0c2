// SPDX-License-Identifier: GPL-2.0-only
/*
 * What KVM logs: one log of all memory slots, and which of QEMU's blocks they show.
 *
 * A run names the slot's log by a number that no other log of the VM has.  One that is not known is
 * of a slot that has come since the last layout: its pages are left to the library, and QEMU is
 * asked.  QEMU also tells of slots that went, since what they had may be harvested later; once a
 * harvest has found everything, they have nothing more.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "guest.h"

/* How often QEMU is asked for a slot that KVM has, before that is taken for an error */
#define MAX_ASKS	3

int guest_open_log(struct guest *g, int fd, struct kc_err *err)
{
	int rc = kvmdirty_vm_attach(fd, &g->log);

	if (rc)
		return kc_fail(err, -rc, "cannot use the dirty log: %s", strerror(-rc));
	g->log_fd = kvmdirty_vm_fd(g->log);
	return 0;
}

void guest_close_log(struct guest *g)
{
	kvmdirty_close(g->log);
	g->log = NULL;
	free(g->slots);
	g->slots = NULL;
	g->nr_slots = 0;
}

static struct guest_slot *find_slot(struct guest_slot *slots, unsigned int nr, uint32_t log)
{
	unsigned int i;

	for (i = 0; i < nr; i++) {
		if (slots[i].log == log)
			return &slots[i];
	}
	return NULL;
}

static int parse_slot(const struct guest *g, struct guest_slot *slot, struct json_object *o,
		      struct kc_err *err)
{
	struct json_object *block;

	slot->log = qmp_u64(o, "log");
	slot->page = qmp_u64(o, "page");
	slot->npages = qmp_u64(o, "pages");
	slot->block = -1;
	if (!json_object_object_get_ex(o, "block", &block))
		return 0;
	slot->block = guest_block_of(g, qmp_u64(o, "block"));
	if (slot->block < 0 || slot->page > g->block_ids[slot->block].npages ||
	    slot->npages > g->block_ids[slot->block].npages - slot->page)
		return kc_fail(err, EPROTO, "QEMU's memory slots are not in its memory");
	return 0;
}

int guest_take_slots(struct guest *g, struct json_object *list, struct kc_err *err)
{
	size_t n = json_object_array_length(list), i;
	struct guest_slot *slots;

	slots = calloc(n + g->nr_slots + 1, sizeof(*slots));
	if (!slots)
		return kc_fail(err, ENOMEM, "no memory");
	for (i = 0; i < n; i++) {
		int rc = parse_slot(g, &slots[i], json_object_array_get_idx(list, i), err);

		if (rc) {
			free(slots);
			return rc;
		}
	}
	for (i = 0; i < g->nr_slots; i++) {
		if (find_slot(slots, n, g->slots[i].log))
			continue;
		slots[n] = g->slots[i];
		slots[n++].gone = true;
	}
	free(g->slots);
	g->slots = slots;
	g->nr_slots = n;
	return 0;
}

static void forget_gone(struct guest *g)
{
	unsigned int i, n = 0;

	for (i = 0; i < g->nr_slots; i++) {
		if (!g->slots[i].gone)
			g->slots[n++] = g->slots[i];
	}
	g->nr_slots = n;
}

struct harvest {
	struct guest *g;
	const struct guest_slot *last;	/* runs of one log follow one another */
	uint64_t pages;
};

/* Pages are re-armed by now: what is written to them after the copy will be found again */
static int add_run(const struct kvmdirty_vm_run *run, void *arg)
{
	struct harvest *h = arg;
	const struct guest_slot *slot = h->last;

	if (!slot || slot->log != run->log)
		slot = find_slot(h->g->slots, h->g->nr_slots, run->log);
	if (!slot)
		return -ESTALE;
	h->last = slot;
	if (run->offset > slot->npages || run->npages > slot->npages - run->offset)
		return -ERANGE;
	h->pages += run->npages;
	/* What is not shared is in the state, whole. */
	if (slot->block < 0)
		return 0;
	return dirty_add(&h->g->dirty, slot->block, slot->page + run->offset, run->npages);
}

int guest_harvest_known(struct guest *g, struct kc_err *err)
{
	struct harvest h = { .g = g };
	uint64_t budget = 1;
	unsigned int i;
	int rc;

	if (!g->log)
		return 0;
	/* Of a guest that stands still, a log has a page once: this is no limit then */
	for (i = 0; i < g->nr_slots; i++)
		budget += 2 * g->slots[i].npages;
	/* The library takes a budget of 0 for none */
	do {
		rc = kvmdirty_vm_harvest(g->log, add_run, &h, budget - h.pages, 0, NULL);
	} while (h.pages < budget && (rc > 0 || rc == -EINTR));
	if (!rc)
		forget_gone(g);
	/* The VM is gone, as QEMU will be. */
	if (rc > 0 || rc == -EINTR || rc == -ENODEV)
		rc = 0;
	if (rc == -ESTALE)
		return rc;
	return rc ? kc_fail(err, -rc, "cannot harvest the dirty log: %s", strerror(-rc)) : 0;
}

int guest_harvest(struct guest *g, struct kc_err *err)
{
	unsigned int asks;
	int rc;

	for (asks = 0; ; asks++) {
		rc = guest_harvest_known(g, err);
		if (rc != -ESTALE)
			return rc;
		if (asks == MAX_ASKS)
			return kc_fail(err, EPROTO,
				       "KVM logs pages of a memory slot that QEMU does not tell of");
		rc = guest_refresh_layout(g, err);
		if (rc)
			return rc;
	}
}
