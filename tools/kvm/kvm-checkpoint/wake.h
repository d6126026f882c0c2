/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Waking the thread of a daemon that waits in poll(), by another thread or a signal.
 *
 * A daemon's main thread waits in one place for all that is timed or decided: protect in
 * kc_sleep(), the standby in serve(), and attend() once it has taken over.  What may block for long
 * by no fault of its own has a thread, so that nothing that is timed waits for it: a connection, with
 * its handshake and its disk, and the clients of the control socket.  While an answer of QEMU is
 * awaited, there is nothing else to decide; qmp.c calls its owner back meanwhile.
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
