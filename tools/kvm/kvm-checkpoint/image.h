/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Images of disks: what a standby keeps and restore makes.
 */
#ifndef KC_IMAGE_H
#define KC_IMAGE_H

#include <stdint.h>

#include "util.h"

/**
 * kc_image_lock() - lock an image as QEMU locks one that it writes to
 * @fd: of the image; closing it, or all that it was duplicated to, unlocks.
 * @path: for the message.
 *
 * Return: 0; -EBUSY if somebody else, such as a QEMU, uses it.  File systems without locks are let pass.
 */
int kc_image_lock(int fd, const char *path, struct kc_err *err);

/* Bytes, of a file or a block device; -1 if it is neither. */
int64_t kc_image_size(int fd);

/* Nothing says that it is of another format that QEMU knows. */
bool kc_image_is_raw(int fd);

#endif
