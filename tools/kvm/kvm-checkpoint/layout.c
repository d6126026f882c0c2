// SPDX-License-Identifier: GPL-2.0-only
/*
 * How the guest's memory is laid out: its blocks are mapped, and KVM's log opened.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "guest.h"

/* RAM that is not shared is part of the state, each time */
#define MAX_UNSHARED	(4u << 20)

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
	kc_no_dump(map, id->npages * KC_PAGE_SIZE);
	g->blocks[nr].map = map;
	g->blocks[nr].fd = fd;
	g->blocks[nr].inode = st.st_ino;
	return 0;
}

int guest_block_of(const struct guest *g, uint64_t qemu_nr)
{
	unsigned int i;

	for (i = 0; i < g->id.nr_blocks; i++) {
		if (g->blocks[i].qemu_nr == qemu_nr)
			return i;
	}
	return -1;
}

int guest_take_layout(struct guest *g, struct json_object *layout, struct kc_err *err)
{
	struct json_object *blocks = NULL, *slots = NULL, *devices = NULL, *ranges = NULL, *o;
	size_t i, nr_blocks, nr_fds = 0, nr_shared = 0;
	uint64_t unshared = 0;
	bool first = !g->id.nr_blocks;
	int *fds = NULL, rc;

	json_object_object_get_ex(layout, "blocks", &blocks);
	json_object_object_get_ex(layout, "slots", &slots);
	json_object_object_get_ex(layout, "devices", &devices);
	json_object_object_get_ex(layout, "ranges", &ranges);
	if (!json_object_is_type(blocks, json_type_array) ||
	    !json_object_is_type(slots, json_type_array) ||
	    !json_object_is_type(ranges, json_type_array) || !qmp_u64(layout, "generation"))
		return kc_fail(err, EPROTO,
			       "QEMU's layout makes no sense: is its patch another version's?");
	if (qmp_u64(layout, "page-size") != KC_PAGE_SIZE)
		return kc_fail(err, EPROTO, "the guest's pages are not of %u bytes", KC_PAGE_SIZE);

	nr_blocks = json_object_array_length(blocks);
	for (i = 0; i < nr_blocks; i++) {
		o = json_object_array_get_idx(blocks, i);
		if (qmp_bool(o, "shared"))
			nr_shared++;
		else
			unshared += qmp_u64(o, "pages") * KC_PAGE_SIZE;
	}
	/* Files only come with the first one. */
	if (first)
		nr_fds = nr_shared + qmp_bool(layout, "vm-log");
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
		} else if (strcmp(id->name, name) || id->npages != qmp_u64(o, "pages") ||
			   g->blocks[nr_shared].inode != qmp_u64(o, "inode")) {
			goto changed;
		}
		nr_shared++;
	}

	rc = guest_take_slots(g, slots, err);
	if (!rc)
		rc = guest_take_ranges(g, ranges, err);
	if (!rc && nr_fds > nr_shared)
		rc = guest_open_log(g, fds[nr_shared], err);
	if (rc)
		goto fail;
	snprintf(g->dirty_log, sizeof(g->dirty_log), "%s", qmp_str(layout, "dirty-log"));
	g->generation = qmp_u64(layout, "generation");
	g->hears = qmp_bool(layout, "hears");
	rc = guest_take_devices(g, devices, err);
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
