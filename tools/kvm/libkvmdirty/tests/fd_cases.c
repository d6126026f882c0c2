// SPDX-License-Identifier: GPL-2.0-only
/*
 * Log fds: another process harvests, and poll().
 */
#include <poll.h>
#include "env.h"

/* The other process: for each byte, harvest and answer with what was seen. */
static void attached(int sock)
{
	struct kvmdirty_run run = { 900, 1 };
	struct kvmdirty_slot *slot;
	struct kvmdirty_info info;
	struct seen seen;
	char byte;
	int fd;

	fd = receive_fd(sock);
	CHECK_EQ(kvmdirty_attach(fd, &slot), 0);
	close(fd);	/* the library has its own */
	CHECK_EQ(kvmdirty_info(slot, &info, sizeof(info)), 0);
	CHECK_EQ(info.npages, MAIN_PAGES);
	CHECK_EQ(info.base_gfn, MAIN_GPA / PAGE);
	CHECK_EQ(info.flags, KVMDIRTY_INFO_ATTACHED);
	CHECK_EQ(kvmdirty_stop(slot, NULL), -EOPNOTSUPP);
	while (read(sock, &byte, 1) == 1) {
		if (byte == 'm') {
			CHECK_EQ(kvmdirty_mark(slot, &run, 1), 0);
		} else if (byte == 'r') {
			struct taker taker = { .refuse_at = 2 };

			CHECK_EQ(kvmdirty_harvest_each(slot, take, &taker, 0, 0, NULL), -EIO);
			CHECK_EQ(kvmdirty_untrack(slot, 0), 0);
			CHECK_EQ(write(sock, &taker.seen, sizeof(seen)), sizeof(seen));
			return;
		}
		seen = harvest(slot);
		CHECK_EQ(write(sock, &seen, sizeof(seen)), sizeof(seen));
	}
}

static struct seen ask_seen(int sock, char byte)
{
	struct seen seen;

	ask(sock, byte, &seen, sizeof(seen));
	return seen;
}

static void test_attach(const void *mode)
{
	struct env *env = setup(mode);
	struct kvmdirty_slot *slot;
	uint32_t i;
	int sock;
	struct seen seen, rest;
	pid_t pid;

	CHECK_EQ(kvmdirty_attach(-1, &slot), -EBADF);
	CHECK_EQ(kvmdirty_attach(env->vm.fd, &slot), -EINVAL);
	CHECK_EQ(kvmdirty_attach(env->vm.kvm, &slot), -EINVAL);
	if (env->mode->backend != KVMDIRTY_SLOT_RING) {
		CHECK_EQ(kvmdirty_fd(env->main), -EOPNOTSUPP);
		return;
	}

	sock = other_process(attached, &pid);
	send_fd(sock, kvmdirty_fd(env->main));
	write_pages(env, SLOT_MAIN, 7, 30, 9);
	seen = ask_seen(sock, 'h');
	expect(&seen, 7, 30, 9);
	write_pages(env, SLOT_MAIN, 7, 1, 1);
	seen = ask_seen(sock, 'm');
	CHECK_EQ(seen.pages, 2);
	CHECK(seen.page[7] == 1 && seen.page[900] == 1, "wrong pages");

	/* What it refused and then left comes to us. */
	write_pages(env, SLOT_MAIN, 7, 30, 9);
	seen = ask_seen(sock, 'r');
	CHECK_EQ(seen.pages, 1);
	end_of(pid);
	rest = harvest(env->main);
	for (i = 0; i < MAIN_PAGES; i++)
		rest.page[i] += seen.page[i];
	rest.pages += seen.pages;
	expect(&rest, 7, 30, 9);
}

static void test_poll(const void *mode)
{
	bool slot_ring = ((const struct mode *)mode)->backend == KVMDIRTY_SLOT_RING;
	struct env *env = setup_entries(mode, slot_ring ? FEW_ENTRIES : MANY_ENTRIES);
	struct pollfd p = { .fd = kvmdirty_fd(env->main), .events = POLLIN };

	if (!slot_ring) {
		CHECK_EQ(p.fd, -EOPNOTSUPP);
		return;
	}
	write_pages(env, SLOT_MAIN, 0, 10, 1);
	CHECK_EQ(poll(&p, 1, 0), 0);
	write_pages(env, SLOT_MAIN, 0, 600, 1);
	CHECK_EQ(poll(&p, 1, 5000), 1);
	CHECK_EQ(p.revents, POLLIN);
	harvest(env->main);
	CHECK_EQ(poll(&p, 1, 0), 0);
	CHECK_EQ(kvmdirty_stop(env->main, &env->vm.region[SLOT_MAIN]), 0);
	CHECK_EQ(poll(&p, 1, 5000), 1);
	CHECK_EQ(p.revents, POLLHUP);
}

const struct test_case fd_cases[] = {
	{ .name = "attach", .fn = test_attach },
	{ .name = "poll", .fn = test_poll },
	{ .name = NULL },
};
