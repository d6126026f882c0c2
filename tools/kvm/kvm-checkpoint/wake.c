// SPDX-License-Identifier: GPL-2.0-only
/*
 * Waking the thread of a daemon that waits in poll().
 */
#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "wake.h"

static int fd = -1;

int kc_wake_fd(void)
{
	if (fd < 0)
		fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	return fd;
}

void kc_wake(void)
{
	int e = errno;

	/* EAGAIN: it is as awake as can be. */
	if (fd >= 0)
		eventfd_write(fd, 1);
	errno = e;
}

void kc_wake_clear(void)
{
	eventfd_t n;

	if (fd >= 0)
		eventfd_read(fd, &n);
}
