// SPDX-License-Identifier: GPL-2.0-only
/*
 * A VMM's loop with libkvmdirty: run the guest, harvest, copy, again.  It does
 * not care which of KVM's logs it has.
 *
 *	cc kvmdirty-vmm.c $(pkg-config --cflags --libs libkvmdirty)
 *	kvmdirty-vmm [auto|slot-ring|ring|bitmap [SOCKET [all]]]
 *
 * With SOCKET it leaves the harvests to kvmdirty-harvester, to which it gives the log
 * fd there: of its memslot, or with "all" of all memslots.
 *
 * Exit status: 0 the copy is the memory, 1 not so, 4 no KVM or back end.
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <linux/kvm.h>
#include <kvmdirty.h>

#define PAGE	4096UL
#define NPAGES	16
#define CODE	0x1000UL
#define EPOCHS	5

/* Real mode: add 1 to a byte of pages 4, 5 and 9, tell by a port, again. */
static const uint8_t guest_code[] = {
	0xfe, 0x06, 0x00, 0x40,		/* incb 0x4000 */
	0xfe, 0x06, 0x23, 0x51,		/* incb 0x5123 */
	0xfe, 0x06, 0xff, 0x9f,		/* incb 0x9fff */
	0xe6, 0x10,			/* out %al, $0x10 */
	0xeb, 0xf0,			/* jmp to the start */
};

struct vm {
	int fd, vcpu;
	struct kvm_run *run;
	struct kvmdirty *kd;
	struct kvmdirty_slot *slot;
	uint8_t *mem, *copy;
};

/* Run the guest until it says that it has done a round. */
static void run_guest(struct vm *vm)
{
	int r;

	for (;;) {
		if (ioctl(vm->vcpu, KVM_RUN, 0)) {
			if (errno == EINTR)
				continue;
			err(1, "KVM_RUN");
		}
		if (vm->run->exit_reason == KVM_EXIT_IO)
			return;
		/* Not one of ours: the library's?  Some logs fill up. */
		r = kvmdirty_vcpu_full(vm->kd, vm->vcpu, vm->run);
		if (r < 0 && r != -EINTR)
			errx(1, "dirty log: %s", strerror(-r));
		if (!r)
			errx(1, "unexpected exit %u", vm->run->exit_reason);
	}
}

/* Called with pages that are re-armed: what is written from now on comes again. */
static int copy_pages(const struct kvmdirty_run *run, void *arg)
{
	struct vm *vm = arg;

	printf(" %u", run->offset);
	if (run->npages > 1)
		printf("-%u", run->offset + run->npages - 1);
	memcpy(vm->copy + run->offset * PAGE, vm->mem + run->offset * PAGE, run->npages * PAGE);
	return 0;
}

static void harvest_and_check(struct vm *vm, int epoch)
{
	int r;

	printf("epoch %d: pages", epoch);
	do {
		r = kvmdirty_harvest_each(vm->slot, copy_pages, vm, 1000, 0, NULL);
		if (r < 0)
			errx(1, "harvest: %s", strerror(-r));
	} while (r);
	printf("\n");
	if (memcmp(vm->copy, vm->mem, NPAGES * PAGE))
		errx(1, "the copy differs from the memory");
}

/* A stream socket on which the harvester gets the fd, and then asks for epochs. */
static int give_fd(const char *path, int fd)
{
	char byte = 0, control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct sockaddr_un addr = { .sun_family = AF_UNIX };
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
	int server, sock;

	if (strlen(path) >= sizeof(addr.sun_path))
		errx(2, "%s: too long for a socket", path);
	memcpy(addr.sun_path, path, strlen(path) + 1);
	server = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (server < 0 || bind(server, (void *)&addr, sizeof(addr)) || listen(server, 1))
		err(1, "%s", path);
	sock = accept(server, NULL, NULL);
	if (sock < 0)
		err(1, "accept");
	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
	if (sendmsg(sock, &msg, 0) != 1)
		err(1, "sendmsg");
	close(server);
	unlink(path);
	return sock;
}

static void setup(struct vm *vm, struct kvmdirty_options *options)
{
	struct kvm_userspace_memory_region region = { .memory_size = NPAGES * PAGE };
	struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
	struct kvm_sregs sregs;
	int kvm, r;

	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	vm->fd = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
	if (vm->fd < 0) {
		warn("/dev/kvm");
		_exit(4);
	}
	/* Before there is a vCPU, and before a memslot logs. */
	r = kvmdirty_open(vm->fd, options, &vm->kd);
	if (r) {
		warnx("%s", options->reason ? options->reason : strerror(-r));
		_exit(4);
	}
	printf("log: %s\n", kvmdirty_backend_name(kvmdirty_backend(vm->kd)));

	vm->mem = mmap(NULL, NPAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
		       -1, 0);
	vm->copy = mmap(NULL, NPAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			-1, 0);
	if (vm->mem == MAP_FAILED || vm->copy == MAP_FAILED)
		err(1, "memory");
	memcpy(vm->mem + CODE, guest_code, sizeof(guest_code));
	region.userspace_addr = (uintptr_t)vm->mem;
	if (ioctl(vm->fd, KVM_SET_USER_MEMORY_REGION, &region))
		err(1, "KVM_SET_USER_MEMORY_REGION");
	vm->vcpu = ioctl(vm->fd, KVM_CREATE_VCPU, 0);
	if (vm->vcpu < 0)
		err(1, "KVM_CREATE_VCPU");
	vm->run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
		       MAP_SHARED, vm->vcpu, 0);
	if (vm->run == MAP_FAILED || ioctl(vm->vcpu, KVM_GET_SREGS, &sregs))
		err(1, "vCPU");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	if (ioctl(vm->vcpu, KVM_SET_SREGS, &sregs) || ioctl(vm->vcpu, KVM_SET_REGS, &regs))
		err(1, "registers");

	r = kvmdirty_add_vcpu(vm->kd, vm->vcpu);
	if (!r)
		r = kvmdirty_track(vm->kd, &region, &vm->slot);	/* turns logging on */
	if (r)
		errx(1, "cannot track the memslot: %s", strerror(-r));
}

int main(int argc, char **argv)
{
	struct kvmdirty_options options = { .size = sizeof(options) };
	struct vm vm = { 0 };
	unsigned int b = 0;
	int epoch, sock, fd;
	char byte;

	while (argc > 1 && strcmp(argv[1], kvmdirty_backend_name(b))) {
		if (++b > KVMDIRTY_BITMAP)
			errx(2, "usage: %s [auto|slot-ring|ring|bitmap [SOCKET [all]]]", argv[0]);
	}
	options.backend = b;
	setup(&vm, &options);
	/* First everything; from here on what changes. */
	memcpy(vm.copy, vm.mem, NPAGES * PAGE);

	if (argc > 2) {
		fd = argc > 3 ? kvmdirty_vm_fd(vm.kd) : kvmdirty_fd(vm.slot);
		if (fd < 0)
			errx(4, "only slot rings can be harvested by another process");
		sock = give_fd(argv[2], fd);
		/* It asks for an epoch, we run one and say that it is done. */
		while (read(sock, &byte, 1) == 1) {
			run_guest(&vm);
			if (write(sock, &byte, 1) != 1)
				break;
		}
	} else {
		for (epoch = 0; epoch < EPOCHS; epoch++) {
			run_guest(&vm);
			harvest_and_check(&vm, epoch);
		}
	}
	kvmdirty_close(vm.kd);
	return 0;
}
