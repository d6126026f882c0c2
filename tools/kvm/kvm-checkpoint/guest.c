// SPDX-License-Identifier: GPL-2.0-only
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest.h"
#include "identity.h"

/* The tests have no such patience */
#ifndef QMP_TIMEOUT_MS
#define QMP_TIMEOUT_MS	10000
#endif

/* RAM that is not shared is part of the state, each time */
#define MAX_UNSHARED	(4u << 20)

/* What x-checkpoint-collect writes to the buffer */
struct qemu_run {
	uint32_t block;
	uint32_t npages;
	uint64_t page;
};

/*
 * Dirty pages
 */

int dirty_add(struct dirty *d, uint32_t block, uint64_t page, uint64_t n)
{
	while (n) {
		uint64_t word = page / 64, first = page % 64;
		uint64_t here = 64 - first < n ? 64 - first : n;
		uint64_t mask = (here == 64 ? ~0ull : (1ull << here) - 1) << first;
		uint64_t *bits = &d->bits[block][word];

		if (!*bits) {
			if (d->nr_words == d->max_words) {
				size_t max = d->max_words ? d->max_words * 2 : 1024;
				struct dirty_word *w = realloc(d->words, max * sizeof(*w));

				if (!w)
					return -ENOMEM;
				d->words = w;
				d->max_words = max;
			}
			d->words[d->nr_words++] = (struct dirty_word){ block, word };
		}
		d->pages += __builtin_popcountll(mask & ~*bits);
		*bits |= mask;
		page += here;
		n -= here;
	}
	return 0;
}

void dirty_forget(struct dirty *d)
{
	size_t i;

	for (i = 0; i < d->nr_words; i++)
		d->bits[d->words[i].block][d->words[i].word] = 0;
	d->nr_words = 0;
	d->pages = 0;
}

/* Room for n pages; what is there stays */
static int copy_reserve(struct copy *c, size_t n)
{
	size_t max = c->max ? c->max : 2048;
	struct copied_page *pages;
	void *data;

	if (n <= c->max)
		return 0;
	while (max < n)
		max *= 2;
	pages = realloc(c->pages, max * sizeof(*pages));
	if (!pages)
		return -ENOMEM;
	c->pages = pages;
	/* Populated, so that the first copies do not fault while the guest is paused */
	if (c->data)
		data = mremap(c->data, c->max * KC_PAGE_SIZE, max * KC_PAGE_SIZE, MREMAP_MAYMOVE);
	else
		data = mmap(NULL, max * KC_PAGE_SIZE, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (data == MAP_FAILED)
		return -ENOMEM;
	c->data = data;
	c->max = max;
	return 0;
}

/* Moves dirty pages, at most max of them, to the copy */
static int copy_dirty(struct guest *g, struct copy *c, uint64_t max)
{
	struct dirty *d = &g->dirty;

	if (max > d->pages)
		max = d->pages;
	if (copy_reserve(c, c->nr + max))
		return -ENOMEM;
	while (d->nr_words && max) {
		struct dirty_word *w = &d->words[d->nr_words - 1];
		uint64_t *bits = &d->bits[w->block][w->word];

		while (*bits && max) {
			uint64_t page = w->word * 64 + __builtin_ctzll(*bits);

			c->pages[c->nr] = (struct copied_page){ w->block, page, c->nr };
			memcpy(c->data + c->nr * KC_PAGE_SIZE,
			       g->blocks[w->block].map + page * KC_PAGE_SIZE, KC_PAGE_SIZE);
			c->nr++;
			*bits &= *bits - 1;
			d->pages--;
			max--;
		}
		if (!*bits)
			d->nr_words--;
	}
	return 0;
}

/* Ascending; of two copies of a page the later one comes later */
static int compare_pages(const void *a, const void *b)
{
	const struct copied_page *x = a, *y = b;

	if (x->block != y->block)
		return x->block < y->block ? -1 : 1;
	if (x->page != y->page)
		return x->page < y->page ? -1 : 1;
	return x->at < y->at ? -1 : 1;
}

static void copy_sort(struct copy *c)
{
	if (c->nr)
		qsort(c->pages, c->nr, sizeof(*c->pages), compare_pages);
}

/*
 * Layout
 */

static void forget_logs(struct guest *g)
{
	unsigned int i;

	for (i = 0; i < g->nr_logs; i++)
		kvmdirty_untrack(g->logs[i].slot, 0);
	free(g->logs);
	g->logs = NULL;
	g->nr_logs = 0;
}

/* File descriptors arrive some at a time, each time with one byte */
static int receive_fds(int sock, int *fds, unsigned int n, struct kc_err *err)
{
	unsigned int got = 0;

	while (got < n) {
		union {
			char buf[CMSG_SPACE(253 * sizeof(int))];
			struct cmsghdr align;
		} control;
		char byte;
		struct iovec iov = { &byte, 1 };
		struct msghdr msg = {
			.msg_iov = &iov,
			.msg_iovlen = 1,
			.msg_control = control.buf,
			.msg_controllen = sizeof(control.buf),
		};
		struct cmsghdr *c;
		unsigned int k;

		if (recvmsg(sock, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) != 1)
			break;
		for (c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
			if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
				continue;
			for (k = 0; k < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int); k++) {
				int fd;

				memcpy(&fd, CMSG_DATA(c) + k * sizeof(int), sizeof(int));
				if (got < n)
					fds[got++] = fd;
				else
					close(fd);
			}
		}
		if (msg.msg_flags & MSG_CTRUNC)
			break;
	}
	if (got == n)
		return 0;
	while (got)
		close(fds[--got]);
	return kc_fail(err, EPROTO,
		       "QEMU sent fewer file descriptors than it said: is the limit (ulimit -n) too low?");
}

static int map_block(struct guest *g, unsigned int nr, int fd, struct kc_err *err)
{
	struct kc_block *id = &g->block_ids[nr];
	struct stat st;
	void *map;

	/* Before they are bytes, of which there may be too many for 64 bits */
	if (fstat(fd, &st) || (uint64_t)st.st_size / KC_PAGE_SIZE < id->npages)
		return kc_fail(err, EPROTO, "the file of %s is smaller than the block", id->name);
	g->dirty.bits[nr] = calloc(id->npages / 64 + 1, sizeof(uint64_t));
	if (!g->dirty.bits[nr])
		return kc_fail(err, ENOMEM, "no memory for the list of dirty pages");
	map = mmap(NULL, id->npages * KC_PAGE_SIZE, PROT_READ, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		return kc_fail(err, errno, "cannot map %s: %s", id->name, strerror(errno));
	g->blocks[nr].map = map;
	g->blocks[nr].fd = fd;
	return 0;
}

/* Ours for QEMU's block, or -1 if it is not shared */
static int block_of(const struct guest *g, uint64_t qemu_nr)
{
	unsigned int i;

	for (i = 0; i < g->id.nr_blocks; i++) {
		if (g->blocks[i].qemu_nr == qemu_nr)
			return i;
	}
	return -1;
}

/*
 * Takes in the layout and the fds that came with it.  Blocks are mapped the first time and must be
 * the same later.
 */
static int take_layout(struct guest *g, struct json_object *layout, struct kc_err *err)
{
	struct json_object *blocks = NULL, *slots = NULL, *o;
	size_t i, nr_blocks, nr_slots, nr_fds, nr_shared = 0;
	uint64_t unshared = 0;
	bool first = !g->id.nr_blocks;
	int *fds = NULL, rc;

	json_object_object_get_ex(layout, "blocks", &blocks);
	json_object_object_get_ex(layout, "slots", &slots);
	if (!json_object_is_type(blocks, json_type_array) ||
	    !json_object_is_type(slots, json_type_array) || !qmp_u64(layout, "generation"))
		return kc_fail(err, EPROTO,
			       "QEMU's layout makes no sense: is its patch another version's?");
	if (qmp_u64(layout, "page-size") != KC_PAGE_SIZE)
		return kc_fail(err, EPROTO, "the guest's pages are not of %u bytes", KC_PAGE_SIZE);

	nr_blocks = json_object_array_length(blocks);
	nr_slots = json_object_array_length(slots);
	for (i = 0; i < nr_blocks; i++) {
		o = json_object_array_get_idx(blocks, i);
		if (qmp_bool(o, "shared"))
			nr_shared++;
		else
			unshared += qmp_u64(o, "pages") * KC_PAGE_SIZE;
	}
	nr_fds = nr_shared + nr_slots;
	fds = calloc(nr_fds + 1, sizeof(int));
	if (!fds)
		return kc_fail(err, ENOMEM, "no memory");
	rc = receive_fds(g->sock, fds, nr_fds, err);
	if (rc) {
		free(fds);
		return rc;
	}

	if (unshared > MAX_UNSHARED || !nr_shared) {
		rc = kc_fail(err, EOPNOTSUPP,
			     "%lu MiB of the guest's memory are not shared: start QEMU with -object memory-backend-memfd,id=ram0,share=on,size=SIZE -machine memory-backend=ram0 (and with -vga none)",
			     unshared >> 20);
		goto fail;
	}
	if (nr_shared > KC_MAX_BLOCKS) {
		rc = kc_fail(err, EOPNOTSUPP, "the guest has over %u blocks of memory",
			     KC_MAX_BLOCKS);
		goto fail;
	}
	if (!first && nr_shared != g->id.nr_blocks)
		goto changed;
	for (i = 0, nr_shared = 0; i < nr_blocks; i++) {
		struct kc_block *id = &g->block_ids[nr_shared];
		const char *name;

		o = json_object_array_get_idx(blocks, i);
		if (!qmp_bool(o, "shared"))
			continue;
		name = qmp_str(o, "name");
		g->blocks[nr_shared].qemu_nr = i;
		if (first) {
			snprintf(id->name, sizeof(id->name), "%s", name);
			id->npages = qmp_u64(o, "pages");
			g->id.nr_blocks = nr_shared + 1;
			rc = map_block(g, nr_shared, fds[nr_shared], err);
			if (rc)
				goto fail;
			fds[nr_shared] = -1;
		} else if (strcmp(id->name, name) || id->npages != qmp_u64(o, "pages")) {
			goto changed;
		}
		nr_shared++;
	}

	forget_logs(g);
	g->logs = calloc(nr_slots + 1, sizeof(*g->logs));
	if (!g->logs) {
		rc = kc_fail(err, ENOMEM, "no memory");
		goto fail;
	}
	for (i = 0; i < nr_slots; i++) {
		struct guest_log *log = &g->logs[g->nr_logs];
		int block;

		o = json_object_array_get_idx(slots, i);
		block = block_of(g, qmp_u64(o, "block"));
		log->page = qmp_u64(o, "page");
		log->npages = qmp_u64(o, "pages");
		if (block < 0 || log->page > g->block_ids[block].npages ||
		    log->npages > g->block_ids[block].npages - log->page) {
			rc = kc_fail(err, EPROTO, "QEMU's memory slots are not in its memory");
			goto fail;
		}
		log->block = block;
		rc = kvmdirty_attach(fds[nr_shared + i], &log->slot);
		if (rc) {
			rc = kc_fail(err, -rc, "cannot use a dirty log: %s", strerror(-rc));
			goto fail;
		}
		log->fd = kvmdirty_fd(log->slot);
		g->nr_logs++;
	}
	snprintf(g->dirty_log, sizeof(g->dirty_log), "%s", qmp_str(layout, "dirty-log"));
	g->generation = qmp_u64(layout, "generation");
	rc = 0;
	goto out;
changed:
	rc = kc_fail(err, ESTALE,
		     "the guest's memory has been changed (plugged?): protect it anew, with another standby or directory");
fail:
out:
	for (i = 0; i < nr_fds; i++) {
		if (fds[i] > 0)
			close(fds[i]);
	}
	free(fds);
	return rc;
}

/*
 * Opening
 */

/* An answer that has to be a list, which json-c does not ask twice */
static int call_list(struct guest *g, const char *command, struct json_object **list,
		     struct kc_err *err)
{
	int rc = qmp_call(&g->qmp, command, NULL, list, err);

	if (rc || json_object_is_type(*list, json_type_array))
		return rc;
	json_object_put(*list);
	return kc_fail(err, EPROTO, "QEMU's answer to %s makes no sense", command);
}

static int check_disks(struct guest *g, bool external, struct kc_err *err)
{
	struct json_object *disks = NULL, *inserted;
	size_t i;
	int rc;

	if (external)
		return 0;
	rc = call_list(g, "query-block", &disks, err);
	if (rc)
		return rc;
	for (i = 0; !rc && i < json_object_array_length(disks); i++) {
		struct json_object *d = json_object_array_get_idx(disks, i);
		const char *name = qmp_str(d, "device");

		if (!json_object_object_get_ex(d, "inserted", &inserted) ||
		    qmp_bool(inserted, "ro"))
			continue;
		if (!*name)
			name = qmp_str(d, "qdev");
		rc = kc_fail(err, EOPNOTSUPP,
			     "disk %s is writable: its contents are not replicated, and a guest that is resumed from an epoch would find a disk of later.  Make it read-only, or say --disk external if storage goes back to the same epoch by other means",
			     name);
	}
	json_object_put(disks);
	return rc;
}

static int give_fd(struct guest *g, const char *name, int fd, struct kc_err *err)
{
	struct json_object *args = json_object_new_object();
	int rc;

	json_object_object_add(args, "fdname", json_object_new_string(name));
	rc = qmp_send(&g->qmp, "getfd", args, fd, err);
	return rc ? rc : qmp_receive(&g->qmp, "getfd", NULL, err);
}

static int begin_logging(struct guest *g, struct kc_err *err)
{
	struct json_object *args, *layout = NULL;
	uint64_t until = kc_now_us() + 2000000;
	struct kc_err why;
	int pair[2], rc;

	g->buffer = memfd_create("kvm-checkpoint", MFD_CLOEXEC);
	if (g->buffer < 0)
		return kc_fail(err, errno, "memfd_create: %s", strerror(errno));
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		return kc_fail(err, errno, "socketpair: %s", strerror(errno));
	g->sock = pair[0];

	do {
		rc = give_fd(g, "kvm-checkpoint-socket", pair[1], err);
		if (!rc)
			rc = give_fd(g, "kvm-checkpoint-buffer", g->buffer, err);
		if (rc)
			break;
		args = json_object_new_object();
		json_object_object_add(args, "socket",
				       json_object_new_string("kvm-checkpoint-socket"));
		json_object_object_add(args, "buffer",
				       json_object_new_string("kvm-checkpoint-buffer"));
		rc = qmp_call(&g->qmp, "x-checkpoint-attach", args, &layout, &why);
		if (!rc)
			break;
		/* One that was killed a moment ago may still be known to QEMU */
		if (strstr(why.text, "attached already") && kc_now_us() < until) {
			usleep(50000);
			if (g->qmp.idle)
				g->qmp.idle(g->qmp.idle_ctx);
			continue;
		}
		if (strstr(why.text, "has not been found"))
			kc_fail(&why, EOPNOTSUPP,
				"this QEMU has no x-checkpoint-attach: build it with the patch in qemu/");
		kc_fail(err, -rc, "%s", why.text);
		break;
	} while (1);
	close(pair[1]);
	if (rc)
		return rc;
	rc = take_layout(g, layout, err);
	json_object_put(layout);
	return rc;
}

int guest_open(struct guest *g, const char *path, bool external_disks, void (*idle)(void *ctx),
	       void *idle_ctx, struct kc_err *err)
{
	int rc;

	memset(g, 0, sizeof(*g));
	g->sock = -1;
	g->buffer = -1;
	g->id.page_size = KC_PAGE_SIZE;
	g->id.blocks = g->block_ids;

	rc = qmp_open(&g->qmp, path, QMP_TIMEOUT_MS, idle, idle_ctx, err);
	if (!rc)
		rc = check_disks(g, external_disks, err);
	if (!rc)
		rc = kc_identify(&g->qmp, &g->id, err);
	if (!rc)
		rc = begin_logging(g, err);
	return rc;
}

void guest_close(struct guest *g)
{
	unsigned int i;

	forget_logs(g);
	for (i = 0; i < g->id.nr_blocks; i++) {
		if (g->blocks[i].map) {
			munmap((void *)g->blocks[i].map, g->block_ids[i].npages * KC_PAGE_SIZE);
			close(g->blocks[i].fd);
		}
		free(g->dirty.bits[i]);
	}
	free(g->dirty.words);
	if (g->sock >= 0)
		close(g->sock);
	if (g->buffer >= 0)
		close(g->buffer);
	qmp_close(&g->qmp);
	memset(g, 0, sizeof(*g));
	g->sock = -1;
	g->buffer = -1;
	g->qmp.fd = -1;
}

/*
 * Collecting
 */

struct harvest {
	struct guest *g;
	const struct guest_log *log;
	uint64_t pages;
};

/* Pages are re-armed by now: what is written to them after the copy will be found again */
static int add_run(const struct kvmdirty_run *run, void *arg)
{
	struct harvest *h = arg;

	if (run->offset > h->log->npages || run->npages > h->log->npages - run->offset)
		return -ERANGE;
	h->pages += run->npages;
	return dirty_add(&h->g->dirty, h->log->block, h->log->page + run->offset, run->npages);
}

static int harvest_log(struct guest *g, struct guest_log *log, struct kc_err *err)
{
	struct harvest h = { .g = g, .log = log };
	/* Of a guest that stands still, a log has a page once: this is no limit then */
	uint64_t budget = 2 * log->npages;
	int rc;

	/* The library takes a budget of 0 for none */
	do {
		rc = kvmdirty_harvest_each(log->slot, add_run, &h, budget - h.pages, 0, NULL);
	} while (h.pages < budget && (rc > 0 || rc == -EINTR));
	if (rc > 0 || rc == -EINTR)
		rc = 0;
	/* The slot is gone.  The next layout is without it. */
	if (rc == -ENODEV)
		rc = 0;
	return rc ? kc_fail(err, -rc, "cannot harvest a dirty log: %s", strerror(-rc)) : 0;
}

int guest_harvest(struct guest *g, struct kc_err *err)
{
	unsigned int i;
	int rc = 0;

	for (i = 0; i < g->nr_logs && !rc; i++)
		rc = harvest_log(g, &g->logs[i], err);
	return rc;
}

static int read_buffer(struct guest *g, void *to, size_t size, uint64_t offset, struct kc_err *err)
{
	while (size) {
		ssize_t n = pread(g->buffer, to, size, offset);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return kc_fail(err, EPROTO, "QEMU wrote less to the buffer than it said");
		to = (char *)to + n;
		size -= n;
		offset += n;
	}
	return 0;
}

static int send_collect(struct guest *g, bool state, struct kc_err *err)
{
	struct json_object *args = json_object_new_object();

	json_object_object_add(args, "state", json_object_new_boolean(state));
	return qmp_send(&g->qmp, "x-checkpoint-collect", args, -1, err);
}

/* The answer to send_collect(): QEMU's pages become dirty, and new logs are opened */
static int finish_collect(struct guest *g, uint64_t *state_len, uint64_t *collect_us,
			  struct kc_err *err)
{
	struct json_object *info = NULL, *layout = NULL;
	struct qemu_run runs[256];
	uint64_t nr, offset, generation;
	int rc;

	rc = qmp_receive(&g->qmp, "x-checkpoint-collect", &info, err);
	if (rc)
		return rc;
	nr = qmp_u64(info, "runs");
	offset = qmp_u64(info, "offset");
	generation = qmp_u64(info, "generation");
	if (state_len)
		*state_len = qmp_u64(info, "state-size");
	if (collect_us)
		*collect_us = qmp_u64(info, "collect-us");
	json_object_put(info);

	while (nr) {
		unsigned int i, n = nr < 256 ? nr : 256;

		rc = read_buffer(g, runs, n * sizeof(*runs), offset, err);
		if (rc)
			return rc;
		for (i = 0; i < n; i++) {
			int block = block_of(g, runs[i].block);

			if (block < 0 || runs[i].page > g->block_ids[block].npages ||
			    runs[i].npages > g->block_ids[block].npages - runs[i].page)
				return kc_fail(err, ESTALE,
					       "QEMU reports pages of memory that was not there before: protect the guest anew");
			rc = dirty_add(&g->dirty, block, runs[i].page, runs[i].npages);
			if (rc)
				return kc_fail(err, -rc, "no memory for the list of dirty pages");
		}
		nr -= n;
		offset += n * sizeof(*runs);
	}

	if (generation != g->generation) {
		rc = qmp_call(&g->qmp, "x-checkpoint-layout", NULL, &layout, err);
		if (!rc)
			rc = take_layout(g, layout, err);
		json_object_put(layout);
	}
	return rc;
}

int guest_collect(struct guest *g, struct kc_err *err)
{
	int rc = send_collect(g, false, err);

	if (!rc)
		rc = finish_collect(g, NULL, NULL, err);
	return rc ? rc : guest_harvest(g, err);
}

int guest_copy_running(struct guest *g, struct guest_epoch *e, uint64_t max, struct kc_err *err)
{
	e->copy.nr = 0;
	if (copy_dirty(g, &e->copy, max))
		return kc_fail(err, ENOMEM, "no memory for copies of dirty pages");
	copy_sort(&e->copy);
	return 0;
}

/* Back to the dirty pages: the copies are of no use */
static int undo_copy(struct guest *g, struct copy *c)
{
	int rc = 0;

	for (; c->nr && !rc; c->nr--)
		rc = dirty_add(&g->dirty, c->pages[c->nr - 1].block, c->pages[c->nr - 1].page, 1);
	return rc;
}

static int take_paused(struct guest *g, struct guest_epoch *e, uint64_t t[], struct kc_err *err)
{
	uint64_t state_len = 0, collect_us = 0;
	int rc;

	rc = guest_harvest(g, err);
	if (rc)
		return rc;
	t[2] = kc_now_us();
	if (copy_dirty(g, &e->copy, UINT64_MAX))
		return kc_fail(err, ENOMEM, "no memory for copies of dirty pages");
	t[3] = kc_now_us();
	rc = finish_collect(g, &state_len, &collect_us, err);
	t[4] = kc_now_us();
	/*
	 * Once more: pages that were written while the state was saved, and logs of slots that are
	 * new.  If a page is in both copies, the later one comes later.
	 */
	if (!rc)
		rc = guest_harvest(g, err);
	if (rc)
		return rc;
	t[5] = kc_now_us();
	if (copy_dirty(g, &e->copy, UINT64_MAX))
		return kc_fail(err, ENOMEM, "no memory for copies of dirty pages");
	t[6] = kc_now_us();
	e->state_len = state_len;
	/* QEMU saves the state and then looks for pages; the latter is a harvest */
	t[4] -= collect_us < t[4] - t[3] ? collect_us : t[4] - t[3];
	return 0;
}

/* The buffer is QEMU's again with the next x-checkpoint-collect */
static int fetch_state(struct guest *g, struct guest_epoch *e, struct kc_err *err)
{
	if (!e->state_len || e->state_len > KC_STATE_MAX)
		return kc_fail(err, EPROTO, "QEMU saved %zu bytes of device state", e->state_len);
	if (e->state_len > e->state_max) {
		void *p = realloc(e->state, e->state_len + 65536);

		if (!p)
			return kc_fail(err, ENOMEM, "no memory for the device state");
		e->state = p;
		e->state_max = e->state_len + 65536;
	}
	return read_buffer(g, e->state, e->state_len, 0, err);
}

int guest_take(struct guest *g, struct guest_epoch *e, struct kc_err *err)
{
	struct json_object *o = NULL;
	uint64_t t[8] = { 0 };
	bool consistent;
	int rc;

	e->copy.nr = 0;
	e->resumed = false;
	t[0] = kc_now_us();
	e->taken_us = t[0];
	rc = qmp_send(&g->qmp, "x-checkpoint-stop", NULL, -1, err);
	if (!rc)
		rc = send_collect(g, true, err);
	if (!rc)
		rc = qmp_receive(&g->qmp, "x-checkpoint-stop", &o, err);
	if (rc)
		return rc;
	t[1] = kc_now_us();
	e->was_running = qmp_bool(o, "running");
	snprintf(e->status, sizeof(e->status), "%s", qmp_str(o, "status"));
	json_object_put(o);

	rc = take_paused(g, e, t, err);
	if (rc)
		return rc;

	/* By its owner's command, which nothing that we do later undoes. */
	if (e->last) {
		rc = qmp_call(&g->qmp, "stop", NULL, NULL, err);
		if (rc)
			return rc;
	}
	o = NULL;
	rc = qmp_call(&g->qmp, "x-checkpoint-cont", NULL, &o, err);
	t[7] = kc_now_us();
	if (rc)
		return rc;
	e->resumed = qmp_bool(o, "resumed");
	consistent = qmp_bool(o, "consistent");
	json_object_put(o);
	if (!consistent && undo_copy(g, &e->copy))
		return kc_fail(err, ENOMEM, "no memory for the list of dirty pages");
	if (!consistent)
		return kc_fail(err, EAGAIN,
			       "somebody else resumed the guest or changed its memory during a checkpoint");

	e->us[KC_PAUSE_STOP] = t[1] - t[0];
	e->us[KC_PAUSE_HARVEST] = t[2] - t[1] + t[5] - t[4];
	e->us[KC_PAUSE_COPY] = t[3] - t[2] + t[6] - t[5];
	e->us[KC_PAUSE_STATE] = t[4] - t[3];
	e->us[KC_PAUSE_RESUME] = t[7] - t[6];
	copy_sort(&e->copy);
	return fetch_state(g, e, err);
}

bool guest_died(struct guest *g)
{
	uint64_t until = kc_now_us() + 2000000;
	char byte;

	/* Only the end of QEMU's process closes its end of this one */
	return g->sock >= 0 && !qmp_wait(&g->qmp, g->sock, POLLIN | POLLRDHUP, until) &&
	       recv(g->sock, &byte, 1, MSG_DONTWAIT) == 0;
}
