/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Waking the thread of a daemon that waits in poll(), by another thread or a signal.
 */
#ifndef KC_WAKE_H
#define KC_WAKE_H

/**
 * kc_wake_fd() - to poll() for POLLIN
 *
 * There is one for the process.  First to be called before there are threads or handlers of signals
 * that call kc_wake().
 *
 * Return: the file descriptor, or -1 and errno.
 */
int kc_wake_fd(void);

/** kc_wake() - from any thread, or a signal's handler: whoever waits, or would next, goes on. */
void kc_wake(void);

/** kc_wake_clear() - to be called before looking at what one may have been woken for. */
void kc_wake_clear(void);

#endif
