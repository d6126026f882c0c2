/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Running protect against the fake QEMU, and what is kept of its guest.
 */
#ifndef KC_TESTS_PROTECTING_H
#define KC_TESTS_PROTECTING_H

#include "fake_qemu.h"

/* The program built with sanitizers, and the one that waits only seconds for QEMU. */
#define CHECKED		programs[1]
#define IMPATIENT	programs[2]

/* Nothing that protect does takes so long */
#define LIMIT_US	60000000ull

/* The keys for it, if any */
extern const char *key_file;

void start_protect(const char *which, const char *to, ...);
/* Be QEMU until it says this */
void serve_until_log(const char *text);
/* Be QEMU until protect ends, and then what it leaves is tidied up; its exit status */
int serve(void);
/* protect in one go: its exit status */
#define protect(which, to, ...) (start_protect(which, to, ##__VA_ARGS__, NULL), serve())

/* That many epochs, as fast as they come, without a failure */
void protect_epochs(const char *to, const char *epochs);
void must_fail(int status, const char *text);

/* Be QEMU for so long */
void be_qemu_for(unsigned int ms);
void be_qemu_for_epochs(unsigned int n);
void be_qemu_until_asleep(pid_t pid);
/* A command that leaves the file "fenced" behind */
const char *fence(void);

/* The files hold a guest as it was when it was whole; which of these */
unsigned int which_snap(const char *where, const char *state, bool stopped);
unsigned int snap_of_standby(const char *ram_dir);
/* Each block of RAM that a standby has, with what a directory has of it */
void each_ram(const char *where, void (*fn)(struct block *b, const uint8_t *ram));
/* The disk as it was at that epoch */
void check_image(const char *path, unsigned int snap);
/* All epochs in the directory; how many, and the last one's snap in @last */
unsigned int check_store(unsigned int *last);

/* How often a file or the log has this text */
unsigned int times_in(const char *path, const char *text);
unsigned int times_in_log(const char *text);

/* Hooks: somebody resumes or changes the guest in an epoch; the standby stops. */
const char *meddles(struct qemu *q, const char *command);
const char *stops_standby(struct qemu *q, const char *command);
/* The standby is killed at any moment of an epoch: after so many commands */
extern unsigned int kill_in;
const char *kills_standby_later(struct qemu *q, const char *command);

#endif
