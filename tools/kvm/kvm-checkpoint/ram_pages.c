// SPDX-License-Identifier: GPL-2.0-only
/*
 * The RAM that a standby holds: pages of its blocks and disks, and memory that is not there.
 *
 * All of the RAM is allocated when it is made, as a page that cannot be had when it is written would
 * be a SIGBUS.  What the guest gives back to its host while it is protected is given back here, too.
 * Such pages are known by a bit each: they are not read, which would allocate them again, and before
 * an epoch that writes to them is complete they are allocated, which may fail as any lack of space
 * may.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ram_internal.h"

static bool is_punched(const struct kc_ram *ram, uint32_t block, uint64_t page)
{
	return ram->nr_punched && block < KC_DISK_BLOCK && ram->punched[block] &&
	       ram->punched[block][page / 64] & 1ull << page % 64;
}

static void set_punched(struct kc_ram *ram, uint32_t block, uint64_t page, uint64_t n, bool on)
{
	uint64_t here, mask;

	for (; n; page += here, n -= here) {
		uint64_t *word = &ram->punched[block][page / 64];

		here = 64 - page % 64 < n ? 64 - page % 64 : n;
		mask = kc_word_mask(page % 64, here);
		ram->nr_punched -= __builtin_popcountll(*word & mask);
		*word &= ~mask;
		if (on) {
			ram->nr_punched += here;
			*word |= mask;
		}
	}
}

int kc_ram_find_holes(struct kc_ram *ram, uint32_t block, bool new, struct kc_err *err)
{
	off_t size = ram->guest.blocks[block].npages * KC_PAGE_SIZE, at, end;

	ram->punched[block] = calloc(ram->guest.blocks[block].npages / 64 + 1, sizeof(uint64_t));
	if (!ram->punched[block])
		return kc_fail(err, ENOMEM, "out of memory");
	/*
	 * A file system that knows of none has none.  Pages that are allocated and were never written
	 * look like holes, too, and cost a look when they are: so in a new file they are not looked for.
	 */
	for (at = 0; !new && at < size; at = end) {
		at = lseek(ram->fd[block], at, SEEK_HOLE);
		if (at < 0 || at >= size)
			break;
		end = lseek(ram->fd[block], at, SEEK_DATA);
		if (end < 0 || end > size)
			end = size;
		/* Whole pages: a part of one has data */
		at = (at + KC_PAGE_SIZE - 1) / KC_PAGE_SIZE * KC_PAGE_SIZE;
		if (at < end)
			set_punched(ram, block, at / KC_PAGE_SIZE, (end - at) / KC_PAGE_SIZE, true);
	}
	return 0;
}

static int allocate(struct kc_ram *ram, uint32_t block, uint64_t page, uint64_t n,
		    struct kc_err *err)
{
	int rc;

	do {
		rc = posix_fallocate(ram->fd[block], page * KC_PAGE_SIZE, n * KC_PAGE_SIZE);
	} while (rc == EINTR);
	if (rc)
		return kc_fail(err, rc, "cannot allocate memory of block %s in %s again: %s",
			       ram->guest.blocks[block].name, ram->path, strerror(rc));
	set_punched(ram, block, page, n, false);
	return 0;
}

int kc_ram_reserve(struct kc_ram *ram, uint32_t block, uint64_t page, struct kc_err *err)
{
	return is_punched(ram, block, page) ? allocate(ram, block, page, 1, err) : 0;
}

int kc_ram_keep_memory(struct kc_ram *ram, struct kc_err *err)
{
	uint32_t i;
	int rc = 0;

	ram->keeps_memory = true;
	for (i = 0; ram->has_guest && i < ram->guest.nr_blocks && !rc; i++)
		rc = allocate(ram, i, 0, ram->guest.blocks[i].npages, err);
	return rc;
}

const void *kc_ram_page(const struct kc_ram *ram, uint32_t block, uint64_t page)
{
	static const uint8_t zeros[KC_PAGE_SIZE];

	return is_punched(ram, block, page) ? zeros : ram->map[block] + page * KC_PAGE_SIZE;
}

int kc_ram_read_page(const struct kc_ram *ram, uint32_t block, uint64_t page, void *to,
		     struct kc_err *err)
{
	unsigned int disk = block - KC_DISK_BLOCK;

	if (block < KC_DISK_BLOCK) {
		memcpy(to, kc_ram_page(ram, block, page), KC_PAGE_SIZE);
		return 0;
	}
	if (pread(ram->disk[disk], to, KC_PAGE_SIZE, page * KC_PAGE_SIZE) == (ssize_t)KC_PAGE_SIZE)
		return 0;
	return kc_fail(err, EIO, "cannot read disk image %s: %s", ram->disk_path[disk],
		       strerror(errno));
}

int kc_ram_write_page(struct kc_ram *ram, uint32_t block, uint64_t page, const void *from,
		      struct kc_err *err)
{
	unsigned int disk = block - KC_DISK_BLOCK;
	ssize_t n;

	if (block < KC_DISK_BLOCK) {
		memcpy(ram->map[block] + page * KC_PAGE_SIZE, from, KC_PAGE_SIZE);
		return 0;
	}
	n = pwrite(ram->disk[disk], from, KC_PAGE_SIZE, page * KC_PAGE_SIZE);
	if (n == (ssize_t)KC_PAGE_SIZE)
		return 0;
	if (n >= 0)
		errno = ENOSPC;
	return kc_fail(err, errno, "cannot write to disk image %s: %s", ram->disk_path[disk],
		       strerror(errno));
}

int kc_ram_write_zeros(struct kc_ram *ram, uint32_t block, uint64_t page, uint64_t n,
		       struct kc_err *err)
{
	static const uint8_t zeros[KC_PAGE_SIZE];
	uint8_t old[KC_PAGE_SIZE];
	int rc = 0;

	for (; n && !rc; n--, page++) {
		/* What is zero already needs no memory, and no room on a disk. */
		if (is_punched(ram, block, page))
			continue;
		rc = kc_ram_read_page(ram, block, page, old, err);
		if (!rc && !kc_is_zero_page(old))
			rc = kc_ram_write_page(ram, block, page, zeros, err);
	}
	return rc;
}

int kc_ram_punch(struct kc_ram *ram, uint32_t block, uint64_t page, uint64_t n,
		 struct kc_err *err)
{
	if (ram->keeps_memory || n < MIN_PUNCH ||
	    fallocate(ram->fd[block], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
		      page * KC_PAGE_SIZE, n * KC_PAGE_SIZE))
		return kc_ram_write_zeros(ram, block, page, n, err);
	set_punched(ram, block, page, n, true);
	return 0;
}
