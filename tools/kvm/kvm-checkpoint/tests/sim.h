/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A guest without KVM: its memory and device state at each epoch follow from the seed, so that who
 * has the number of an epoch can tell whether what was kept of it is right.
 */
#ifndef KC_TESTS_SIM_H
#define KC_TESTS_SIM_H

#include "harness.h"
#include "sink.h"

#define STATE_ROOM 60000u

/* What the guest wrote to its disk, and with which contents; NULL: zeros */
struct sim_write {
	uint64_t offset;
	uint32_t len;
	uint8_t *data;
};

#define MAX_WRITES 16u

struct sim {
	uint64_t rng, disk_rng, epoch;
	uint8_t *disk;			/* if guest.nr_disks is 1 */
	struct sim_write writes[MAX_WRITES];
	unsigned int nr_writes;
	uint8_t *ram[2];
	bool *dirty[2];
	uint8_t state[STATE_ROOM];
	uint32_t state_len;
};

extern struct kc_block blocks[2];
/* Part of the guest if a test says guest.nr_disks = 1, before all else */
extern struct kc_disk disks[1];
extern struct kc_guest guest;

/* Before its first epoch. */
void sim_init(struct sim *g);
void sim_free(struct sim *g);
/* One epoch further; dirty says what it wrote. */
void sim_step(struct sim *g);
void sim_goto(struct sim *g, uint64_t epoch);
/* Not running when the epoch was taken. */
bool sim_stopped(uint64_t epoch);

/* Hand over the epoch as it is: all of it, what differs, or what is dirty. */
int sim_send(struct sim *g, struct kc_sink *s, unsigned int flags);

/* The files hold the guest as it is in @g. */
void compare(struct sim *g, const char *where, const char *state_name);
/* The image holds the guest's disk as it is in @g. */
void compare_disk(struct sim *g, const char *image);
void compare_standby(struct sim *g, const char *ram_dir);
void restore_and_compare(const char *store, uint64_t epoch, struct sim *g);

/* What a standby keeps as "meta", changed by a test: a checksum is at its end. */
void write_meta(const char *path, uint8_t *buf, size_t len);

/* --- Sinks ---------------------------------------------------------------- */

/* A key that the standby does not know, and how sinks are opened. */
extern char other_psk[PATH_MAX];
extern struct kc_sink_opts opts;

struct kc_sink *must_open(const char *to);
/* It has to fail like this. */
void must_refuse(const char *to, const struct kc_sink_opts *o, const struct kc_guest *g, int error,
		 const char *text);

/* --- Primaries ------------------------------------------------------------ */

/*
 * One in a process of its own: epochs from @first on, the last acknowledged one in @shared[0], the
 * number of connections in @shared[1], its epoch in @shared[2], and milliseconds between epochs
 * taken from @shared[3].  Comes again when the receiver is gone, if it is told to.
 */
pid_t start_primary(const char *to, uint64_t first, volatile uint64_t *shared, bool again);
volatile uint64_t *shared_numbers(void);
/* Every other round some epochs come before it returns, however slow the machine is. */
void let_run(unsigned int round, volatile uint64_t *n, unsigned int ms);

/* --- What many tests begin with ------------------------------------------- */

/* Epochs 1 to 5, between which the link breaks. */
void resync(const char *to);
/* An epoch is there, the primary is connected. */
struct kc_sink *protected_guest(struct sim *g);

#endif
