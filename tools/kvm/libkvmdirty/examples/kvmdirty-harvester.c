// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which pages does the guest of another process write?  Needs nothing of that process
 * but a log fd, which kvmdirty-vmm gives on a socket; no right to its memory.
 *
 *	cc kvmdirty-harvester.c $(pkg-config --cflags --libs libkvmdirty)
 *	kvmdirty-vmm slot-ring /tmp/log & kvmdirty-harvester /tmp/log
 *	kvmdirty-vmm slot-ring /tmp/log all & kvmdirty-harvester /tmp/log
 *
 * Of one memslot, or of all that the VM has.
 *
 * Exit status: 0 the guest wrote what it should, 1 not so.
 */
#include <err.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <kvmdirty.h>

#define EPOCHS	5

static int connect_to(const char *path)
{
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	int sock, i;

	if (strlen(path) >= sizeof(addr.sun_path))
		errx(2, "%s: too long for a socket", path);
	memcpy(addr.sun_path, path, strlen(path) + 1);
	sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (sock < 0)
		err(1, "socket");
	/* It may not be there yet. */
	for (i = 0; i < 100; i++) {
		if (!connect(sock, (void *)&addr, sizeof(addr)))
			return sock;
		usleep(100000);
	}
	err(1, "%s", path);
}

static int receive_fd(int sock)
{
	char byte, control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	struct cmsghdr *cmsg;
	int fd;

	if (recvmsg(sock, &msg, MSG_CMSG_CLOEXEC) != 1)
		err(1, "recvmsg");
	cmsg = CMSG_FIRSTHDR(&msg);
	if (!cmsg || cmsg->cmsg_type != SCM_RIGHTS)
		errx(1, "no file descriptor came");
	memcpy(&fd, CMSG_DATA(cmsg), sizeof(fd));
	return fd;
}

/* The runs of one memslot, into an array. */
static unsigned int harvest_slot(struct kvmdirty_slot *slot)
{
	struct kvmdirty_result result;
	struct kvmdirty_run runs[4];
	unsigned int i, j, dirty = 0;
	int r;

	do {
		r = kvmdirty_harvest(slot, runs, 4, 0, &result);
		if (r < 0)
			errx(1, "harvest: %s", strerror(-r));
		for (i = 0; i < result.nr_runs; i++) {
			for (j = 0; j < runs[i].npages; j++)
				dirty |= 1U << (runs[i].offset + j);
		}
	} while (r);
	return dirty;
}

/* This VM has one memslot.  With several, the VMM has to tell what a new log is of. */
static int take_run(const struct kvmdirty_vm_run *run, void *arg)
{
	unsigned int *dirty = arg, j;

	for (j = 0; j < run->npages; j++)
		*dirty |= 1U << (run->offset + j);
	return 0;
}

static unsigned int harvest_all(struct kvmdirty *vm)
{
	struct kvmdirty_vm_result result;
	unsigned int dirty = 0;
	int r;

	do {
		r = kvmdirty_vm_harvest(vm, take_run, &dirty, 0, 0, &result);
		if (r < 0)
			errx(1, "harvest: %s", strerror(-r));
		if (result.flags & KVMDIRTY_VM_LAYOUT)
			printf("memslots have come or gone\n");
	} while (r);
	return dirty;
}

int main(int argc, char **argv)
{
	unsigned int dirty, wanted = 1 << 4 | 1 << 5 | 1 << 9;
	struct kvmdirty_slot *slot = NULL;
	struct kvmdirty *vm = NULL;
	struct kvmdirty_info info;
	int sock, fd, epoch, r;
	char byte = 0;

	if (argc != 2)
		errx(2, "usage: %s SOCKET", argv[0]);
	sock = connect_to(argv[1]);
	fd = receive_fd(sock);
	r = kvmdirty_vm_attach(fd, &vm);
	if (r == -EINVAL)
		r = kvmdirty_attach(fd, &slot);
	close(fd);
	if (!r && slot)
		r = kvmdirty_info(slot, &info, sizeof(info));
	if (r)
		errx(1, "not a log: %s", strerror(-r));
	if (slot)
		printf("memslot %u: %llu pages\n", info.slot, (unsigned long long)info.npages);
	else
		printf("all memslots\n");

	for (epoch = 0; epoch < EPOCHS; epoch++) {
		if (write(sock, &byte, 1) != 1 || read(sock, &byte, 1) != 1)
			errx(1, "the VMM is gone");
		dirty = slot ? harvest_slot(slot) : harvest_all(vm);
		printf("epoch %d: pages 0x%04x\n", epoch, dirty);
		/* The first has what was only touched, too. */
		if (epoch ? dirty != wanted : (dirty & wanted) != wanted)
			errx(1, "expected 0x%04x", wanted);
	}
	kvmdirty_untrack(slot, 0);
	kvmdirty_close(vm);
	return 0;
}
