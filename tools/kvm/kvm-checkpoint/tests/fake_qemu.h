/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A QEMU that is part of the test program: it answers to the commands that
 * qemu/qapi/checkpoint.json describes, has a guest that writes to its memory, and remembers what
 * that was at each epoch.  It also can do all that a QEMU should not do.
 */
#ifndef KC_TESTS_FAKE_QEMU_H
#define KC_TESTS_FAKE_QEMU_H

#include <json-c/json.h>

#include "harness.h"
#include "sink.h"

#define NR_BLOCKS	3
#define MAX_SNAPS	256
#define STATE_ROOM	30000u

#define ATTACH	"x-checkpoint-attach"
#define LAYOUT	"x-checkpoint-layout"
#define STOP	"x-checkpoint-stop"
#define COLLECT	"x-checkpoint-collect"
#define HINTS	"x-checkpoint-hints"
#define CONT	"x-checkpoint-cont"
#define LEASE	"x-checkpoint-lease"
#define TAKE	"x-checkpoint-take"
#define HOLD	"x-checkpoint-hold"
#define RELEASE	"x-checkpoint-release"
#define GUARD	"x-checkpoint-guard"

struct block {
	const char *name;
	uint64_t npages;
	bool shared;
	int fd;
	uint8_t *ram;
	bool *dirty;
};

/* The guest when its state was saved; the state begins with the index */
struct snap {
	uint8_t *ram[NR_BLOCKS], *state, *disk;
	bool *undefined;		/* pages of block 0 that may be anything, or NULL */
	size_t state_len;
	bool torn, stopped;
};

/* As x-checkpoint-collect writes it */
struct pages {
	uint32_t block, npages;
	uint64_t page;
};

enum tear { WHOLE, RESUMED, SCRIBBLED };

/* As x-checkpoint-take tells its client */
struct told {
	uint64_t what, generation, state_size, offset, runs, collect_us, packets, discarded;
	uint64_t states_block, states_page, states_nr;
};

enum { TOLD_STOPPED = 1, TOLD_SAVED, TOLD_ENDED };

/* The same when it was asked for on the socket, and what it is asked */
struct ended {
	uint64_t what, flags;
	char why[72];
};

enum { ENDED_TAKEN = 1, ENDED_CONSISTENT = 2, ENDED_RESUMED = 4, ENDED_FAILED = 8 };

struct asked {
	uint64_t what, limit_ms, flags, lease_us;
};

#define ASKED_TAKE	0x3145464154504b43ull

/* A disk, and the job that mirrors it */
struct fake_disk {
	uint64_t npages, copied, mirrored;	/* bytes that came to the server, or not */
	uint8_t *data;			/* NULL: there is none */
	bool *dirty;			/* pages that the server lacks */
	uint64_t nr_dirty;
	uint64_t marked;		/* how often one became dirty */
	uint64_t kept;			/* so many at its beginning disk_writes() leaves alone */
	int fd, next_fd;		/* one that was connected in the background */
	char path[200], text[400];
	bool node, job, ready, paused;
	unsigned int begun, resumed, errors;
};

extern struct qemu {
	struct block blocks[NR_BLOCKS];
	int listener, monitor, sock, buffer;
	int sent_fd, got_socket, got_buffer, got_notify, got_guard;
	struct json_tokener *tok;
	bool attached, running, stopped, mute;
	uint64_t generation;
	const char *disks;		/* what query-block returns */
	const char *peripheral;		/* more in /machine/peripheral-anon, or NULL */
	const char *devices;		/* in /machine/peripheral */
	const char *uuid, *name;
	const char *layout, *new_layout;	/* what attach and layout say, but for the truth */
	enum tear tear;			/* what happens to the next epoch */
	const char *waits_for;		/* why it cannot be resumed, or NULL */
	uint64_t limit_us;		/* when it is resumed, whoever stopped it, or 0 */
	const char *spoilt_by;		/* why what was taken is of no use, or NULL */
	const char *run_state;		/* one of which there are no epochs, or NULL */
	const char *stopped_as;		/* its status when it does not run, or NULL: paused */
	uint64_t lease_us;		/* as it was given last, 0 for none */
	const char *plugged;		/* ", \"NAME\"" for one more device, or NULL */
	const char *lost;		/* why its logs do not have all pages, or NULL */
	const char *blocked;		/* why it cannot be migrated any more, or NULL */
	struct snap snaps[MAX_SNAPS];
	unsigned int nr_snaps, snaps_before;	/* in all, and when it was stopped */

	/* What came so far, looks are collects of a running guest */
	unsigned int attaches, stops, looks, collects, conts, layouts;

	/*
	 * Asked before a command is obeyed: NULL, or what to say instead, or one of these.  After
	 * dies_after the answer is given and then everything closed.
	 */
	const char *(*hook)(struct qemu *q, const char *command);
	bool dies_after;
	const char *last_words;		/* before it dies */

	/* It has x-checkpoint-take; asked before the client is told something: false, it is not */
	bool takes;
	bool deaf;			/* it cannot be asked for that on the socket */
	struct asked asked;		/* what has come of that */
	size_t nr_asked;
	unsigned int times_asked;
	/* Asked before it says how that has ended: false, it is not */
	bool (*ends)(struct qemu *q, struct ended *ended);
	bool (*tells)(struct qemu *q, struct told *told);
	unsigned int nr_taken;

	struct fake_disk disk;

	/* Network cards, a list; why one's packets cannot be held, or NULL */
	const char *cards, *not_held;
	const char *taps;		/* of those that QEMU cannot hold, or NULL */
	int guard;			/* who is told what becomes of their packets, or -1 */
	bool holds;
	char held_for[64];
	unsigned int limit_ms, holds_begun;
	/* Of the last state; up to which was released, if not all; how often all was, and dropped */
	bool discarded;			/* memory was given back since the client was told */
	/* Where its block 0 has a table of page states, what the client is told, and 0: nowhere */
	uint64_t states_page, states_nr;
	bool *undefined;		/* as in struct snap */
	bool lies;			/* the table does: a test says what is undefined */
	const char *ranges;		/* instead of the truth, or NULL */
	/* What became of hints; pages that are named by the next one */
	unsigned int hints_begun, hints_ended;
	bool hinting;
	uint64_t hint_page, hint_pages;
	uint32_t hint_block;
	/* So many more, and so much further on in the buffer, than is true */
	uint64_t hint_more, hint_offset;
	uint64_t packets, released;
	unsigned int released_all, dropped_all;
	unsigned int notified;		/* how often the client was told that there are some */
	pid_t client;
} qemu;

/* What a hook may return: from now on, and at once */
extern const char silent[], dead[];

void start_qemu(struct qemu *q);
/* Pages of block 0 go back to the host, and are dirty */
/* One more run of dirty pages, behind those that the client is about to be told of */
uint64_t append_run(struct qemu *q, const struct told *told, uint32_t block, uint64_t page,
		    uint64_t n);
void give_back(struct qemu *q, uint64_t page, uint64_t n);

/* fake_free.c: a guest that tells which pages of block 0 it does not use */

/* After start_qemu(): it has a table, from a page on, and some pages are free */
void start_states(struct qemu *q, uint64_t page);
uint64_t gfn_of(const struct qemu *q, uint64_t page);
/* Pages are freed and allocated, and some of these written */
void states_change(struct qemu *q);
bool is_free(const struct qemu *q, uint64_t page);
const char *ranges_text(const struct qemu *q);
void do_hints(struct qemu *q, const char *action);
/* Before that: it has a disk */
void start_disk(struct qemu *q, uint64_t npages);
/* What query-block says */
const char *disk_says(struct qemu *q);
void disk_writes(struct qemu *q);
/* So many pages from the first one on, with one byte */
void disk_fills(struct qemu *q, uint64_t npages);
void disk_copies(struct qemu *q);
bool disk_obeys(struct qemu *q, const char *command, struct json_object *args);
/* Somebody cancels it */
void end_job(struct qemu *q);
void send_job_event(struct qemu *q, const char *name);
void refuse(struct qemu *q, const char *why);

/* A client of NBD */
int nbd_connect_to(const char *path);
bool nbd_negotiate(int fd, const char *export);
int nbd_request(int fd, unsigned int type, uint64_t offset, uint32_t len, const void *data);

/* What comes within some milliseconds; a running guest writes meanwhile */
void step(struct qemu *q, int ms);

/* Writes some words, or nothing, or zeros; to so many pages */
void write_page(struct block *b, uint64_t page);
void guest_writes(struct qemu *q, unsigned int n);
void close_monitor(struct qemu *q);
void die(struct qemu *q);
/* What it has held, as the client was gone for too long */
void let_go(struct qemu *q);

/* The client may be gone: then these do nothing */
void say_bytes(struct qemu *q, const char *text, size_t len);
void say(struct qemu *q, const char *text);
__attribute__((format(printf, 2, 3)))
void answer(struct qemu *q, const char *fmt, ...);
void send_event(struct qemu *q, const char *name);
void send_layout(struct qemu *q, const char *instead);
void write_buffer(struct qemu *q, const void *data, size_t len, uint64_t at);

#endif
