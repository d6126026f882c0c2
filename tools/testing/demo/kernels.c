// SPDX-License-Identifier: GPL-2.0-only
/*
 * Of the demo's guest: other kernels in its memory, and its own one that comes back to it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kexec.h>
#include <linux/reboot.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "kernels.h"
#include "pattern.h"

#define KERNEL	"/other/bzImage"
#define INITRD	"/other/initrd"
#define SWAP	"/dev/vdc"

static bool write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);
	bool ok;

	if (fd < 0)
		return false;
	ok = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
	close(fd);
	return ok;
}

/* What it is to do is what this one does, but of what is there twice the first counts */
static long load(unsigned long flags, const char *first)
{
	int kernel = open(KERNEL, O_RDONLY), initrd = open(INITRD, O_RDONLY);
	char line[2048], own[1900] = "";
	FILE *f = fopen("/proc/cmdline", "r");
	long rc;

	if (kernel < 0 || initrd < 0 || !f || !fgets(own, sizeof(own), f))
		return -1;
	fclose(f);
	own[strcspn(own, "\n")] = '\0';
	snprintf(line, sizeof(line), "%s%s", first, own);
	rc = syscall(SYS_kexec_file_load, kernel, initrd, strlen(line) + 1, line, flags);
	close(kernel);
	close(initrd);
	return rc;
}

const char *kernels_load(bool crash)
{
	/* It has less memory, and one CPU is brought up by who crashed on it */
	if (crash ? load(KEXEC_FILE_ON_CRASH, "demo.work=4 demo.still=4 demo.churn=50 nr_cpus=1 ") :
		    load(0, ""))
		return strerror(errno);
	return NULL;
}

void kernels_go(bool crash)
{
	if (crash)
		write_file("/proc/sysrq-trigger", "c");
	else
		syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2,
			LINUX_REBOOT_CMD_KEXEC, NULL);
}

/* As mkswap does */
static bool make_swap(void)
{
	static uint8_t page[PAGE];
	uint32_t version = 1, last;
	int fd = open(SWAP, O_RDWR);
	off_t size = fd < 0 ? 0 : lseek(fd, 0, SEEK_END);
	bool ok;

	last = size / PAGE - 1;
	memcpy(page + 1024, &version, 4);
	memcpy(page + 1028, &last, 4);
	memcpy(page + PAGE - 10, "SWAPSPACE2", 10);
	ok = size && pwrite(fd, page, PAGE, 0) == PAGE && !fsync(fd);
	close(fd);
	return ok;
}

const char *kernels_hibernate(void)
{
	struct stat st;
	char dev[32];

	if (stat(SWAP, &st) || !make_swap() || swapon(SWAP, 0))
		return strerror(errno);
	snprintf(dev, sizeof(dev), "%u:%u", major(st.st_rdev), minor(st.st_rdev));
	/* The image is written, read again, and this goes on from what was read */
	if (!write_file("/sys/power/resume", dev) || !write_file("/sys/power/disk", "test_resume") ||
	    !write_file("/sys/power/state", "disk"))
		return strerror(errno);
	return swapoff(SWAP) ? strerror(errno) : "ok";
}
