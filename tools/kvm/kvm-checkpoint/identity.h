/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Which guest it is that a QEMU runs.
 */
#ifndef KC_IDENTITY_H
#define KC_IDENTITY_H

#include "qmp.h"
#include "sink.h"

/**
 * kc_identify() - ask QEMU for all of a struct kc_guest but its RAM
 * @q: its monitor.
 * @id: filled in: UUID, name, fingerprint, hardware and process.
 * @err: why not.
 *
 * Return: 0 or a negative errno.
 */
int kc_identify(struct qmp *q, struct kc_guest *id, struct kc_err *err);

#endif
