// SPDX-License-Identifier: GPL-2.0-only
/*
 * The pages of an epoch: to copy them while the guest stands still, or to write-protect them with
 * userfaultfd and copy them when it runs.
 *
 * What is measured of the second is only what the guest would have to wait for before it goes on, one
 * call for each page, or for all memory at once. That nothing else maps the pages is to its advantage:
 * with KVM each call also zaps what KVM maps, and each of these pages faults once more, be it read or
 * written. Nor are the copies in it, nor who writes to a page before it was copied and waits for that.
 * Of each way it is the fastest of its rounds.
 */

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "measure.h"

#define PAGE	4096ul
#define RAM_MIB	1024ul
#define ROUNDS	10

static char *ram;
static int uffd;

static void least(double *of, double begun)
{
	double us = now_ns() / 1e3 - begun;

	if (!*of || us < *of)
		*of = us;
}

static void protect(char *from, size_t size, bool on)
{
	struct uffdio_writeprotect wp = {
		.range = { .start = (uintptr_t)from, .len = size },
		.mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0,
	};

	if (ioctl(uffd, UFFDIO_WRITEPROTECT, &wp))
		die("UFFDIO_WRITEPROTECT");
}

static void get_memory(void)
{
	int fd = memfd_create("ram", MFD_CLOEXEC);
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
	};
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_WP };

	if (fd < 0 || ftruncate(fd, RAM_MIB << 20))
		die("memory");
	ram = mmap(NULL, RAM_MIB << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	if (ram == MAP_FAILED)
		die("memory");
	uffd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		die("userfaultfd that write-protects shared memory");
	reg.range = (struct uffdio_range){ .start = (uintptr_t)ram, .len = RAM_MIB << 20 };
	if (ioctl(uffd, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");
}

static void measure(size_t pages)
{
	char *copy = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	double copied = 0, each = 0, all = 0, begun;
	size_t *which = calloc(pages, sizeof(*which)), i;
	int round;

	if (copy == MAP_FAILED || !which)
		die("memory");
	for (round = 0; round < ROUNDS; round++) {
		for (i = 0; i < pages; i++) {
			which[i] = random() % (RAM_MIB * 256) * PAGE;
			ram[which[i]]++;
		}
		begun = now_ns() / 1e3;
		for (i = 0; i < pages; i++)
			memcpy(copy + i * PAGE, ram + which[i], PAGE);
		least(&copied, begun);

		begun = now_ns() / 1e3;
		for (i = 0; i < pages; i++)
			protect(ram + which[i], PAGE, true);
		least(&each, begun);
		protect(ram, RAM_MIB << 20, false);

		begun = now_ns() / 1e3;
		protect(ram, RAM_MIB << 20, true);
		least(&all, begun);
		protect(ram, RAM_MIB << 20, false);
	}
	printf("%6zu pages of %lu MiB: copied in %.0f us, write-protected in %.0f (%.1f times), all memory in %.0f\n",
	       pages, RAM_MIB, copied, each, each / copied, all);
	munmap(copy, pages * PAGE);
	free(which);
}

int main(int argc, char **argv)
{
	(void)argv;
	if (argc > 1) {
		fprintf(stderr, "copy: it takes no arguments\n");
		return 2;
	}
	get_memory();
	measure(300);
	measure(5000);
	measure(50000);
	return 0;
}
