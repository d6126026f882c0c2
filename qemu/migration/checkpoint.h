/*
 * Checkpoints of a running guest: what the files of it share
 *
 * SPDX-License-Identifier: GPL-2.0-only
 */

#ifndef MIGRATION_CHECKPOINT_H
#define MIGRATION_CHECKPOINT_H

#include "qapi/qapi-types-checkpoint.h"
#include "exec/ramblock.h"
#include "io/channel-socket.h"
#include "qemu/slot-ring-compat.h"
#include "qemu/timer.h"

/*
 * checkpoint-hold.c
 */

/* A guest that stands still for a client, even for one that is gone */
typedef struct CheckpointHold {
    bool owed;                  /* It is to run again */
    bool told;                  /* that it cannot, for now */
    bool leased;                /* It stands still as its lease is over */
    bool hidden;                /* It does not notice that it stood still */
    int64_t stopped_ns;         /* When that began */
    int64_t since_ns;           /* Up to when its clocks have gone on */
    QEMUTimer *limit;           /* When it has waited for long enough */
    QEMUTimer *again;
    VMChangeStateEntry *runs;
    const char *lost;           /* Why logs do not have all pages, or NULL */
    /* Why what was copied since x-checkpoint-stop is of no use, if it is */
    bool spoilt;
    CheckpointSpoilt spoilt_by;
} CheckpointHold;

extern CheckpointHold checkpoint_hold;

/* There is a client that may want it to stand still */
void checkpoint_hold_init(void);

/* What is copied is of no use; the first reason counts */
void checkpoint_spoil(CheckpointSpoilt by);

/* The clocks that stand still with the guest go on */
void checkpoint_hide_pause(void);

/*
 * Lets the guest run if it stands still for a client.  If something keeps it,
 * such as a dump that has begun meanwhile, it runs when that is over.
 */
bool checkpoint_resume_guest(Error **errp);

/* Its lease is over: it stands still until that is renewed */
void checkpoint_lease_ended(void);

/*
 * checkpoint-ram.c
 */

/* Whether the client can map the block; what it cannot is part of the state */
bool checkpoint_block_is_mapped(RAMBlock *rb);

#define CHECKPOINT_NO_BLOCK UINT32_MAX

/* The block's number for a client that can map it, or CHECKPOINT_NO_BLOCK */
uint32_t checkpoint_block_number(const RAMBlock *of);

/**
 * checkpoint_collect_pages - Take the pages that QEMU knows to be written
 *
 * Returns an array of CheckpointPages.  What KVM has in the logs of slots is
 * left to a client that harvests them.
 */
GArray *checkpoint_collect_pages(void);

/* Whether a page was written, or harvested by somebody else, since then */
bool checkpoint_memory_changed(void);

/* The number of the layout as it is now */
uint64_t checkpoint_generation(void);

/* Describes the layout; of logs that are gone it tells once */
CheckpointLayout *checkpoint_layout(void);

/* Where the guest says which pages it does not use; NULL: it does not */
CheckpointPageStates *checkpoint_page_states(void);

/*
 * Sends the file descriptors of blocks and, unless it is negative, of the logs
 */
bool checkpoint_send_files(QIOChannelSocket *to, int log, Error **errp);

/**
 * checkpoint_follow_logs - Leave KVM's logs of slots to the client
 *
 * Returns the file descriptor that it needs for that, or a negative errno: then
 * QEMU harvests them.
 */
int checkpoint_follow_logs(void);
void checkpoint_unfollow_logs(void);

/* What the client finds in its buffer */
typedef struct CheckpointPages {
    uint32_t block;
    uint32_t npages;
    uint64_t page;
} CheckpointPages;

/*
 * checkpoint-free.c
 */

/* Whether memory was given back to the host since it was taken last */
bool checkpoint_has_discarded(void);
bool checkpoint_take_discarded(void);

bool checkpoint_ask_hints(CheckpointHintsAction action, Error **errp);
/* Those that came since it was asked last, an array of CheckpointPages */
GArray *checkpoint_take_hints(void);

/*
 * checkpoint-state.c
 */

/**
 * checkpoint_save_state - Write the state of all devices, a migration stream
 * @fd: where to
 * @offset: where in it, moved on
 * @running: the guest is to run where the state is loaded, although it stands
 *           still now
 */
bool checkpoint_save_state(int fd, uint64_t *offset, bool running,
                           Error **errp);

/* What is in the client's buffer for the next state already */
uint64_t checkpoint_head_size(void);
/* Memory that the client cannot map was written */
void checkpoint_head_changed(void);
/* There is a client, with a buffer of its own */
void checkpoint_follow_head(void);

bool checkpoint_write(int fd, const void *data, size_t size, uint64_t *offset,
                      Error **errp);

/*
 * checkpoint-channel.c
 */

typedef struct CheckpointPlace {
    int fd;
    uint64_t offset;    /* where the next byte goes to */
    size_t skip;        /* so many are left out before */
} CheckpointPlace;

/* A stream to @place, which must be there until it is closed */
QEMUFile *checkpoint_file(CheckpointPlace *place);

/*
 * checkpoint-take.c
 */

/* What the client is told on its socket, in this order */
#define CHECKPOINT_TOLD_STOPPED 1
#define CHECKPOINT_TOLD_SAVED   2

typedef struct CheckpointTold {
    uint64_t what;
    /* As in CheckpointPagesInfo, when it is saved */
    uint64_t generation;
    uint64_t state_size;
    uint64_t offset;
    uint64_t runs;
    uint64_t collect_us;
    uint64_t packets;
    uint64_t discarded;
    /*
     * As in CheckpointPageStates, when it is stopped; 0 of them: there are none
     */
    uint64_t states_block;
    uint64_t states_page;
    uint64_t states_nr;
} CheckpointTold;

/* It asked on its socket, and that is over; as long as a CheckpointTold */
#define CHECKPOINT_TOLD_ENDED   3

typedef struct CheckpointEnded {
    uint64_t what;
    uint64_t flags;
#define CHECKPOINT_ENDED_TAKEN      1   /* As in CheckpointTaken */
#define CHECKPOINT_ENDED_CONSISTENT 2
#define CHECKPOINT_ENDED_RESUMED    4
#define CHECKPOINT_ENDED_FAILED     8   /* @why: the reason */
    char why[72];               /* What spoilt it, if something has */
} CheckpointEnded;

QEMU_BUILD_BUG_ON(sizeof(CheckpointEnded) != sizeof(CheckpointTold));

/*
 * x-checkpoint-take as the client asks for it on its socket: the monitor reads
 * a command byte by byte
 */
#define CHECKPOINT_ASKED_TAKE   0x3145464154504b43ull

typedef struct CheckpointAsked {
    uint64_t what;
    uint64_t limit_ms;
    uint64_t flags;
#define CHECKPOINT_ASKED_LEASE  1       /* There is a lease_us */
#define CHECKPOINT_ASKED_FIRST  2       /* It is lease-first */
    uint64_t lease_us;
} CheckpointAsked;

typedef enum CheckpointAnswer {
    CHECKPOINT_ANSWER_DONE,
    CHECKPOINT_ANSWER_NONE,     /* in time */
    CHECKPOINT_ANSWER_GONE,
} CheckpointAnswer;

/*
 * Stops a guest that runs, until checkpoint_brief_end() in the same visit of
 * the main loop; after that vCPUs still stand still
 */
void checkpoint_brief_stop(void);
void checkpoint_brief_end(void);

/*
 * Are there other loops than the main loop that do what a guest asks them to?
 */
bool checkpoint_has_busy_iothread(void);

bool checkpoint_tell(QIOChannelSocket *to, const CheckpointTold *told);
bool checkpoint_tell_ended(QIOChannelSocket *to, const CheckpointTaken *taken,
                           Error *err);
/*
 * Whether all of what the client asks for has come; what makes no sense is left
 * out.  *@gone: there is no client.
 */
bool checkpoint_hear(QIOChannelSocket *from, CheckpointAsked *asked,
                     bool *gone);
/* What was heard in part is forgotten */
void checkpoint_hear_anew(void);
void checkpoint_forget_bytes(QIOChannelSocket *from);
CheckpointAnswer checkpoint_await(QIOChannelSocket *from, int64_t until_ns);

/*
 * checkpoint-net.c
 */

/*
 * A state is saved, which has all packets sent up to now.  Its number for
 * x-checkpoint-release, or 0 if packets are not held back.
 */
uint64_t checkpoint_packets_mark(void);

/* The client is gone */
void checkpoint_packets_orphaned(void);

/*
 * checkpoint-lease.c
 */

/**
 * checkpoint_lease_until - Let the guest run until then, and no longer
 * @until_us: of CLOCK_BOOTTIME; 0: for ever
 */
bool checkpoint_lease_until(uint64_t until_us, Error **errp);

/* Is there one, be it over? */
bool checkpoint_has_lease(void);

/* checkpoint-hold.c: a lease was renewed, or is over */
void checkpoint_lease_changed(void *opaque);

#endif
