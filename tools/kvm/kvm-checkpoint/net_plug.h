/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a guest sends by a tap device, held back by the kernel: what the device takes from the guest
 * goes through an IFB device with the queueing discipline "plug".
 *
 * IFB devices are called by the number of the tap device, and by how many there were before: a
 * process that comes after another one takes a new one, as nobody knows how much of what is in the
 * old one is marked.  That is released when all of it may be.
 */
#ifndef KC_NET_PLUG_H
#define KC_NET_PLUG_H

#include <net/if.h>

#include "util.h"

struct nl_sock;

#define KC_MAX_IFBS	8u

/* Of the tap device, and of this one */
#define KC_IFB_NAME	"kc%dp%u"

struct kc_ifb {
	unsigned int nr;
	int index;
};

struct kc_plug {
	char ifname[IFNAMSIZ];
	int tap;
	unsigned int newest;		/* IFB devices that are newer are not ours */
	/* By their age; after kc_plug_add() the last one is ours */
	struct kc_ifb ifbs[KC_MAX_IFBS];
	unsigned int nr_ifbs;
};

/** kc_plug_connect() - the kernel, to be told by the functions below; nl_socket_free() ends it */
int kc_plug_connect(struct nl_sock **sk, struct kc_err *err);

/**
 * kc_plug_find() - a tap device, and what is there of it already
 * @sk: the kernel.
 * @ifname: of the device.
 * @mac: its address, which it has to have; or NULL.
 * @p: filled in.
 * @err: why not.
 *
 * Return: 0; -ENODEV if there is no such device here; -EINVAL if it is no tap device, or another one;
 * another negative errno.
 */
int kc_plug_find(struct nl_sock *sk, const char *ifname, const char *mac, struct kc_plug *p,
		 struct kc_err *err);

/**
 * kc_plug_add() - from now on all is held back
 * @sk: the kernel.
 * @p: of kc_plug_find().
 * @err: why not.
 *
 * Return: 0, and with one IFB device nothing was held until now; -EBUSY if somebody else has to do
 * with what comes from the device; -EPERM without CAP_NET_ADMIN; another negative errno.  What there
 * is of it by then kc_plug_remove() removes.
 */
int kc_plug_add(struct nl_sock *sk, struct kc_plug *p, struct kc_err *err);

/**
 * kc_plug_mark() - what is held by now may leave at the next kc_plug_release()
 *
 * Not again before that: the kernel has one mark.
 */
int kc_plug_mark(struct nl_sock *sk, const struct kc_plug *p, struct kc_err *err);

/**
 * kc_plug_release() - let go what was marked, and before that all that older IFB devices have
 *
 * Return: 0; -ENOENT if not all is held any more, as somebody has changed what becomes of it; another
 * negative errno.
 */
int kc_plug_release(struct nl_sock *sk, struct kc_plug *p, struct kc_err *err);

/**
 * kc_plug_remove() - hold nothing any more
 * @sk: the kernel.
 * @p: of which tap and newest are used: the device may be gone.
 * @drop: what was held is dropped.
 * @err: why not.
 *
 * What others have added to the device stays.
 *
 * Return: 0, also if there is nothing; a negative errno.
 */
int kc_plug_remove(struct nl_sock *sk, struct kc_plug *p, bool drop, struct kc_err *err);

#endif
