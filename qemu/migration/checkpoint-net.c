/*
 * Checkpoints of a running guest: what it sends
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * Who has got a packet of the guest knows something of it.  A guest that goes
 * on from a checkpoint must not know less.  So packets are held back until the
 * client says that the checkpoint which has them sent is where it is safe.
 *
 * A packet has the number of the state that is saved next.  Between packets and
 * states there is nothing else: both are the main loop's, and a guest that
 * stands still sends nothing.
 *
 * A client that comes later has to know whether there was a break: then somebody
 * knows more than the checkpoints of before, which must not be gone on from.
 * Where these are the client names, as they may be for another one in between.
 *
 * A tap device whose packets do not come by here, as of a card with vhost or with
 * several queues, is the client's to hold.  Somebody else has to know when that
 * ends, as the client may be dead by then: that is told on a socket of its own.
 *
 * The client may die, and a packet must not be held for ever.  But as long as
 * somebody may go on with the guest who does not know of it, it must not leave:
 * the client has said how long that is.  With a lease that is over the guest
 * stands still, for the same reason, and its packets stay as well.
 */

#include "qemu/osdep.h"
#include <glib-unix.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include "qemu/error-report.h"
#include "qemu/iov.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-checkpoint.h"
#include "migration/misc.h"
#include "monitor/monitor.h"
#include "net/filter.h"
#include "net/net.h"
#include "net/tap.h"
#include "checkpoint.h"

/*
 * Of all cards together: a guest that sends more loses some, as with any queue
 */
#define MAX_BYTES   (256 * MiB)

#define TYPE_CHECKPOINT_FILTER "checkpoint-filter"

OBJECT_DECLARE_SIMPLE_TYPE(CheckpointFilter, CHECKPOINT_FILTER)

/* What is told to who is the client's guard, as its documentation says */
#define CHECKPOINT_GUARD_RELEASE 'r'
#define CHECKPOINT_GUARD_DROP    'd'
#define CHECKPOINT_GUARD_KEEP    'k'
#define CHECKPOINT_GUARD_BEGIN   'g'

typedef struct Packet {
    QSIMPLEQ_ENTRY(Packet) next;
    uint64_t nr;                /* of the first state that has it sent */
    unsigned flags;
    size_t size;
    uint8_t data[];
} Packet;

struct CheckpointFilter {
    NetFilterState parent_obj;

    QLIST_ENTRY(CheckpointFilter) next;
    QSIMPLEQ_HEAD(, Packet) packets;
};

static struct {
    QLIST_HEAD(, CheckpointFilter) filters;
    bool wanted;                /* From the next state on */
    bool holds;
    char *held_for;             /* Since it holds, or will; or NULL */
    uint64_t nr;                /* Of the state that is saved next */
    uint32_t limit_ms;          /* When the client is gone */
    QEMUTimer *limit;
    CheckpointPackets stats;
    int notify;                 /* When there is one to hold, or -1 */
    bool notified;              /* since the last state */
    int guard;                  /* Who is told when it ends, or -1 */
} net = { .nr = 1, .notify = -1, .guard = -1 };

static void forget(CheckpointFilter *f, Packet *p)
{
    QSIMPLEQ_REMOVE_HEAD(&f->packets, next);
    net.stats.held--;
    net.stats.bytes -= p->size;
    g_free(p);
}

/* Those that are sent in the state with this number.  Or they are dropped. */
static void release(CheckpointFilter *f, uint64_t nr, bool drop)
{
    NetFilterState *nf = NETFILTER(f);
    Packet *p;

    while ((p = QSIMPLEQ_FIRST(&f->packets)) && p->nr <= nr) {
        struct iovec iov = { p->data, p->size };

        /* Its card may be gone meanwhile */
        if (!drop && nf->netdev->peer) {
            qemu_netfilter_pass_to_next(nf->netdev->peer, p->flags, &iov, 1,
                                        nf);
        }
        net.stats.dropped += drop;
        forget(f, p);
    }
}

static void release_all(uint64_t nr, bool drop)
{
    CheckpointFilter *f;

    QLIST_FOREACH(f, &net.filters, next) {
        release(f, nr, drop);
    }
}

/* The client wants to know that there is something which waits for a state */
static void notify_client(void)
{
    const uint64_t one = 1;

    if (net.notify >= 0 && !net.notified) {
        net.notified = true;
        /* It has an eventfd there: what cannot be written is there already */
        if (write(net.notify, &one, sizeof(one)) < 0 && errno != EAGAIN) {
            error_report_once("checkpoint: a client cannot be notified of "
                              "packets: %s", strerror(errno));
        }
    }
}

static void forget_client(void)
{
    if (net.notify >= 0) {
        close(net.notify);
    }
    net.notify = -1;
}

static void tell_guard(char what)
{
    if (write(net.guard, &what, 1) != 1) {
        warn_report("checkpoint: nobody is there to let go packets of tap "
                    "devices");
    }
}

/* What becomes of what the client holds; if QEMU dies nobody is told */
static void end_guard(char what)
{
    if (net.guard >= 0) {
        tell_guard(what);
        close(net.guard);
    }
    net.guard = -1;
}

static void end_holding(bool drop)
{
    end_guard(drop ? CHECKPOINT_GUARD_DROP : CHECKPOINT_GUARD_RELEASE);
    net.wanted = false;
    net.holds = false;
    g_clear_pointer(&net.held_for, g_free);
    if (net.limit) {
        timer_del(net.limit);
    }
    release_all(UINT64_MAX, drop);
}

static ssize_t receive(NetFilterState *nf, NetClientState *sender,
                       unsigned flags, const struct iovec *iov, int iovcnt,
                       NetPacketSent *sent_cb)
{
    CheckpointFilter *f = CHECKPOINT_FILTER(nf);
    size_t size = iov_size(iov, iovcnt);
    Packet *p;

    if (!net.holds) {
        return 0;
    }
    if (size > MAX_BYTES - net.stats.bytes) {
        net.stats.dropped++;
        return size;
    }
    p = g_malloc(sizeof(*p) + size);
    p->nr = net.nr;
    p->flags = flags;
    p->size = size;
    iov_to_buf(iov, iovcnt, 0, p->data, size);
    QSIMPLEQ_INSERT_TAIL(&f->packets, p, next);
    net.stats.held++;
    net.stats.bytes += size;
    notify_client();
    return size;
}

static void setup(NetFilterState *nf, Error **errp)
{
    CheckpointFilter *f = CHECKPOINT_FILTER(nf);

    QSIMPLEQ_INIT(&f->packets);
    QLIST_INSERT_HEAD(&net.filters, f, next);
}

/*
 * The back end goes: there is nowhere to send to.  Or it was never set up, as the
 * back end takes no filters.
 */
static void cleanup(NetFilterState *nf)
{
    CheckpointFilter *f = CHECKPOINT_FILTER(nf);

    release(f, UINT64_MAX, true);
    QLIST_SAFE_REMOVE(f, next);
}

static void filter_class_init(ObjectClass *oc, void *data)
{
    NetFilterClass *nfc = NETFILTER_CLASS(oc);

    nfc->setup = setup;
    nfc->cleanup = cleanup;
    nfc->receive_iov = receive;
}

static const TypeInfo filter_info = {
    .name = TYPE_CHECKPOINT_FILTER,
    .parent = TYPE_NETFILTER,
    .class_init = filter_class_init,
    .instance_size = sizeof(CheckpointFilter),
};

static void register_types(void)
{
    type_register_static(&filter_info);
}

type_init(register_types);

/*
 * Cards
 */

typedef struct Cards {
    strList **tail;
    CheckpointTapList **taps;   /* NULL: the client cannot hold any */
    Error *err;
} Cards;

/* Is it a tap device, for the client to hold? */
static bool hold_tap(NetClientState *peer, const char *card, const char *why,
                     Cards *cards)
{
    struct ifreq name = {}, addr = {};
    const uint8_t *a = (const uint8_t *)addr.ifr_hwaddr.sa_data;
    CheckpointTap *tap;
    int fd;

    if (!cards->taps || peer->info->type != NET_CLIENT_DRIVER_TAP) {
        return false;
    }
    fd = tap_get_fd(peer);
    /* Both are asked of the device itself, which may have come as a file */
    if (ioctl(fd, TUNGETIFF, &name) || ioctl(fd, SIOCGIFHWADDR, &addr)) {
        return false;
    }
    tap = g_new0(CheckpointTap, 1);
    tap->card = g_strdup(card);
    tap->ifname = g_strndup(name.ifr_name, IFNAMSIZ);
    tap->mac = g_strdup_printf("%02x:%02x:%02x:%02x:%02x:%02x", a[0], a[1], a[2],
                               a[3], a[4], a[5]);
    tap->why = g_strdup(why);
    QAPI_LIST_APPEND(cards->taps, tap);
    return true;
}

static void hold_card(NICState *nic, void *opaque)
{
    NetClientState *peer = nic->conf->peers.ncs[0];
    const char *card = qemu_get_queue(nic)->name;
    Cards *cards = opaque;
    CheckpointFilter *f;
    Error *err = NULL;
    char id[64];
    static unsigned int nr;

    if (!peer || cards->err) {
        return;
    }
    QLIST_FOREACH(f, &net.filters, next) {
        if (NETFILTER(f)->netdev == peer) {
            QAPI_LIST_APPEND(cards->tail, g_strdup(card));
            return;
        }
    }
    /*
     * The last one before the back end: others see packets when they are sent
     */
    snprintf(id, sizeof(id), "checkpoint-filter%u", nr++);
    object_new_with_props(TYPE_CHECKPOINT_FILTER, object_get_objects_root(), id,
                          &err, "netdev", peer->name, "queue", "rx",
                          "position", "head", NULL);
    if (!err) {
        QAPI_LIST_APPEND(cards->tail, g_strdup(card));
    } else if (!hold_tap(peer, card, error_get_pretty(err), cards)) {
        error_setg(&cards->err, "packets of network card %s (back end %s) "
                   "cannot be held back: %s", card, peer->name,
                   error_get_pretty(err));
    }
    error_free(err);
}

/* False if there was a break since it was held for these checkpoints */
static bool hold_for(const char *checkpoints, bool anew)
{
    bool unbroken = net.holds && g_strcmp0(checkpoints, net.held_for) == 0 &&
                    checkpoints;

    if (!unbroken) {
        g_free(net.held_for);
        net.held_for = anew ? g_strdup(checkpoints) : NULL;
    }
    return unbroken;
}

CheckpointCards *qmp_x_checkpoint_hold(uint32_t limit_ms,
                                       COMPAT_OPTIONAL_STR(checkpoints),
                                       bool has_anew, bool anew,
                                       bool has_taps, bool taps,
                                       COMPAT_OPTIONAL_STR(notify),
                                       Error **errp)
{
    CheckpointCards *held;
    Cards cards = { NULL };
    int fd = -1;

    if (notify) {
        fd = monitor_get_fd(monitor_cur(), notify, errp);
        if (fd < 0) {
            return NULL;
        }
        /* Nothing here may wait for who reads it */
        if (!g_unix_set_fd_nonblocking(fd, true, NULL)) {
            error_setg(errp, "%s cannot be made not to block", notify);
            close(fd);
            return NULL;
        }
    }
    held = g_new0(CheckpointCards, 1);
    cards.tail = &held->cards;
    if (has_taps && taps) {
        cards.taps = &held->taps;
    }
    qemu_foreach_nic(hold_card, &cards);
    if (cards.err) {
        qapi_free_CheckpointCards(held);
        error_propagate(errp, cards.err);
        if (fd >= 0) {
            close(fd);
        }
        return NULL;
    }
    forget_client();
    net.notify = fd;
    net.notified = false;
    if (net.limit) {
        timer_del(net.limit);
    }
    net.wanted = held->cards || held->taps;
    net.limit_ms = limit_ms;
    held->unbroken = hold_for(checkpoints, has_anew && anew);
    return held;
}

void qmp_x_checkpoint_guard(const char *socket, Error **errp)
{
    int fd = monitor_get_fd(monitor_cur(), socket, errp);

    if (fd < 0) {
        return;
    }
    if (!net.wanted) {
        error_setg(errp, "nothing is held back");
        close(fd);
        return;
    }
    if (!g_unix_set_fd_nonblocking(fd, true, NULL)) {
        error_setg(errp, "%s cannot be made not to block", socket);
        close(fd);
        return;
    }
    end_guard(CHECKPOINT_GUARD_KEEP);
    net.guard = fd;
    tell_guard(CHECKPOINT_GUARD_BEGIN);
}

CheckpointPackets *qmp_x_checkpoint_release(bool has_packets, uint64_t packets,
                                            bool has_drop, bool drop,
                                            Error **errp)
{
    if (has_packets) {
        release_all(packets, has_drop && drop);
    } else {
        end_holding(has_drop && drop);
    }
    return g_memdup2(&net.stats, sizeof(net.stats));
}

uint64_t checkpoint_packets_mark(void)
{
    if (!net.wanted) {
        return 0;
    }
    net.holds = true;
    net.notified = false;
    return net.nr++;
}

/* Nobody has come who would know that it is safe */
static void nobody_comes(void *opaque)
{
    if (checkpoint_lease_is_over()) {
        timer_mod(net.limit,
                  qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + net.limit_ms);
        return;
    }
    warn_report("checkpoint: the client has been gone for %u ms, packets of "
                "the guest are not held back any more", net.limit_ms);
    end_holding(false);
}

void checkpoint_packets_orphaned(void)
{
    forget_client();
    if (!net.wanted) {
        return;
    }
    if (!net.limit) {
        net.limit = timer_new_ms(QEMU_CLOCK_REALTIME, nobody_comes, NULL);
    }
    timer_mod(net.limit,
              qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + net.limit_ms);
}
