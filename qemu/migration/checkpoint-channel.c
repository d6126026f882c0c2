/*
 * Checkpoints of a running guest: the file that a state is written to
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * What is saved goes to the client's buffer as it comes.  To gather it in
 * memory first would be to copy all of it once more, into pages that have to be
 * cleared, while the guest waits.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "io/channel.h"
#include "qom/object.h"
#include "migration/qemu-file.h"
#include "checkpoint.h"

#define TYPE_CHECKPOINT_CHANNEL "checkpoint-channel"
OBJECT_DECLARE_SIMPLE_TYPE(CheckpointChannel, CHECKPOINT_CHANNEL)

struct CheckpointChannel {
    QIOChannel parent;
    CheckpointPlace *place;
};

static ssize_t channel_writev(QIOChannel *ioc, const struct iovec *iov,
                              size_t niov, int *fds, size_t nfds, int flags,
                              Error **errp)
{
    CheckpointPlace *place = CHECKPOINT_CHANNEL(ioc)->place;
    ssize_t n;

    if (place->skip && niov) {
        n = MIN(place->skip, iov[0].iov_len);
        place->skip -= n;
        return n;
    }
    do {
        n = pwritev(place->fd, iov, niov, place->offset);
    } while (n < 0 && errno == EINTR);
    if (n <= 0) {
        error_setg_errno(errp, n ? errno : ENOSPC,
                         "cannot write to the client's buffer");
        return -1;
    }
    place->offset += n;
    return n;
}

/* The client's buffer stays open */
static int channel_close(QIOChannel *ioc, Error **errp)
{
    return 0;
}

static int channel_set_blocking(QIOChannel *ioc, bool enabled, Error **errp)
{
    return 0;
}

static void channel_class_init(ObjectClass *klass, void *data)
{
    QIOChannelClass *ioc_klass = QIO_CHANNEL_CLASS(klass);

    ioc_klass->io_writev = channel_writev;
    ioc_klass->io_close = channel_close;
    ioc_klass->io_set_blocking = channel_set_blocking;
}

static const TypeInfo channel_info = {
    .parent = TYPE_QIO_CHANNEL,
    .name = TYPE_CHECKPOINT_CHANNEL,
    .instance_size = sizeof(CheckpointChannel),
    .class_init = channel_class_init,
};

static void channel_register_types(void)
{
    type_register_static(&channel_info);
}

type_init(channel_register_types);

QEMUFile *checkpoint_file(CheckpointPlace *place)
{
    Object *obj = object_new(TYPE_CHECKPOINT_CHANNEL);
    QEMUFile *f;

    CHECKPOINT_CHANNEL(obj)->place = place;
    f = qemu_file_new_output(QIO_CHANNEL(obj));
    object_unref(obj);
    return f;
}
