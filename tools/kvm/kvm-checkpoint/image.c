// SPDX-License-Identifier: GPL-2.0-only
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "image.h"

/* Bytes of an image that QEMU (block/file-posix.c) locks: what it does with it, and lets nobody do */
static const unsigned char locks[] = {
	100, 101,	/* reads, writes */
	201, 203,	/* nobody else writes, nor changes its size */
};

static bool try_lock(int fd)
{
	size_t k;

	for (k = 0; k < sizeof(locks); k++) {
		struct flock l = { .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = locks[k],
				   .l_len = 1 };

		if (fcntl(fd, F_OFD_SETLK, &l) && (errno == EAGAIN || errno == EACCES))
			return false;
	}
	/* QEMU takes those that it does not share last, and looks for others' */
	for (k = 0; k < 2; k++) {
		struct flock l = { .l_type = F_WRLCK, .l_whence = SEEK_SET,
				   .l_start = k ? 201 : 101, .l_len = 1 };

		if (!fcntl(fd, F_OFD_GETLK, &l) && l.l_type != F_UNLCK)
			return false;
	}
	return true;
}

int kc_image_lock(int fd, const char *path, struct kc_err *err)
{
	return kc_lock(fd, try_lock) ? 0 :
	       kc_fail(err, EBUSY, "%s is in use by another program", path);
}

int64_t kc_image_size(int fd)
{
	struct stat st;
	uint64_t size;

	if (fstat(fd, &st))
		return -1;
	if (S_ISREG(st.st_mode))
		return st.st_size;
	return S_ISBLK(st.st_mode) && !ioctl(fd, BLKGETSIZE64, &size) ? (int64_t)size : -1;
}

bool kc_image_is_raw(int fd)
{
	static const char * const others[] = { "QFI\xfb", "QED", "vhdx", "conectix", "KDMV" };
	char head[8] = "";
	size_t i;

	if (pread(fd, head, sizeof(head), 0) < 0)
		return true;
	for (i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
		if (!memcmp(head, others[i], strlen(others[i])))
			return false;
	}
	return true;
}
