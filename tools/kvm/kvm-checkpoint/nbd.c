// SPDX-License-Identifier: GPL-2.0-only
/*
 * An NBD server that stores nothing: see nbd.h.
 *
 * Of the protocol (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md) what QEMU's
 * client needs to write: fixed newstyle, NBD_OPT_GO, simple replies.
 */
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "nbd.h"
#include "wake.h"

#define MAGIC		0x4e42444d41474943ull
#define OPT_MAGIC	0x49484156454f5054ull
#define OPT_REPLY	0x0003e889045565a9ull
#define REQUEST		0x25609513u
#define REPLY		0x67446698u

enum { FIXED_NEWSTYLE = 1, NO_ZEROES = 2 };
enum { OPT_ABORT = 2, OPT_INFO = 6, OPT_GO = 7 };
enum { REP_ACK = 1, REP_INFO = 3 };
#define REP_ERR_UNSUP	0x80000001u
#define REP_ERR_INVALID	0x80000003u
#define REP_ERR_UNKNOWN	0x80000006u
enum { INFO_EXPORT = 0, INFO_BLOCK_SIZE = 3 };
enum { HAS_FLAGS = 1, SEND_FLUSH = 4, SEND_FUA = 8, SEND_WRITE_ZEROES = 64 };
enum { CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_WRITE_ZEROES = 6 };
enum { NBD_EIO = 5, NBD_EINVAL = 22 };

#define MAX_OPTION	4096u
#define MIN_BLOCK	512u
#define MAX_REQUEST	(32u << 20)

struct conn {
	struct conn *next;
	struct nbd *n;
	pthread_t thread;
	int fd;
	int disk;		/* -1: none yet */
	unsigned int round;	/* of nbd_accept(), when it came */
};

struct nbd {
	char dir[92], path[100];	/* of what a socket's address has room for */
	int listener;
	pthread_t acceptor;
	uint64_t sizes[NBD_MAX_DISKS];
	unsigned int nr;
	uint64_t limit;
	int guard, pulse_ms;

	pthread_mutex_t lock;
	pthread_cond_t room;
	bool accepts, hurry, never_waits, stopping, failed;
	unsigned int round;
	struct nbd_write *first, **last;
	uint64_t bytes;
	struct conn *conns;
	unsigned int nr_conns;
};

/* --- Bytes ---------------------------------------------------------------- */

static bool get(int fd, void *buf, size_t len)
{
	while (len) {
		ssize_t r = recv(fd, buf, len, 0);

		if (r < 0 && errno == EINTR)
			continue;
		if (r <= 0)
			return false;
		buf = (char *)buf + r;
		len -= r;
	}
	return true;
}

static bool put(int fd, const void *buf, size_t len)
{
	while (len) {
		ssize_t r = send(fd, buf, len, MSG_NOSIGNAL);

		if (r < 0 && errno == EINTR)
			continue;
		if (r <= 0)
			return false;
		buf = (const char *)buf + r;
		len -= r;
	}
	return true;
}

static uint32_t get_be32(const uint8_t *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof(v));
	return be32toh(v);
}

static uint64_t get_be64(const uint8_t *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return be64toh(v);
}

static uint8_t *put_be(uint8_t *p, uint64_t v, unsigned int bytes)
{
	while (bytes--)
		*p++ = v >> 8 * bytes;
	return p;
}

/* --- Negotiation ---------------------------------------------------------- */

static bool reply_option(int fd, uint32_t option, uint32_t type, const void *data, uint32_t len)
{
	uint8_t buf[20];

	put_be(put_be(put_be(put_be(buf, OPT_REPLY, 8), option, 4), type, 4), len, 4);
	return put(fd, buf, sizeof(buf)) && put(fd, data, len);
}

/* Which disk is asked for by NBD_OPT_GO; -1 if there is none, -2 if that makes no sense */
static int asked_for(const struct nbd *n, const uint8_t *data, uint32_t len)
{
	uint32_t name_len;
	char name[8], *end;
	unsigned long i;

	if (len < 6)
		return -2;
	name_len = get_be32(data);
	if (name_len > len - 6)
		return -2;
	if (!name_len || name_len >= sizeof(name))
		return -1;
	memcpy(name, data + 4, name_len);
	name[name_len] = '\0';
	i = strtoul(name, &end, 10);
	return *end || name[0] < '0' || name[0] > '9' || i >= n->nr ? -1 : (int)i;
}

static bool tell_export(int fd, uint32_t option, uint64_t size)
{
	uint8_t buf[16], *p;

	p = put_be(put_be(buf, INFO_EXPORT, 2), size, 8);
	p = put_be(p, HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_WRITE_ZEROES, 2);
	if (!reply_option(fd, option, REP_INFO, buf, p - buf))
		return false;
	p = put_be(put_be(buf, INFO_BLOCK_SIZE, 2), MIN_BLOCK, 4);
	p = put_be(put_be(p, 4096, 4), MAX_REQUEST, 4);
	return reply_option(fd, option, REP_INFO, buf, p - buf) &&
	       reply_option(fd, option, REP_ACK, NULL, 0);
}

static bool negotiate(struct conn *c)
{
	uint8_t buf[18], data[MAX_OPTION];
	uint32_t option, len;

	put_be(put_be(put_be(buf, MAGIC, 8), OPT_MAGIC, 8), FIXED_NEWSTYLE | NO_ZEROES, 2);
	if (!put(c->fd, buf, sizeof(buf)) || !get(c->fd, buf, 4) ||
	    get_be32(buf) & ~(FIXED_NEWSTYLE | NO_ZEROES) || !(get_be32(buf) & FIXED_NEWSTYLE))
		return false;
	for (;;) {
		int disk;
		bool ok;

		if (!get(c->fd, buf, 16) || get_be64(buf) != OPT_MAGIC)
			return false;
		option = get_be32(buf + 8);
		len = get_be32(buf + 12);
		if (len > sizeof(data) || !get(c->fd, data, len))
			return false;
		if (option == OPT_ABORT) {
			reply_option(c->fd, option, REP_ACK, NULL, 0);
			return false;
		}
		if (option != OPT_GO && option != OPT_INFO) {
			if (!reply_option(c->fd, option, REP_ERR_UNSUP, NULL, 0))
				return false;
			continue;
		}
		disk = asked_for(c->n, data, len);
		if (disk >= 0)
			ok = tell_export(c->fd, option, c->n->sizes[disk]);
		else
			ok = reply_option(c->fd, option,
					  disk == -1 ? REP_ERR_UNKNOWN : REP_ERR_INVALID, NULL, 0);
		if (!ok)
			return false;
		if (disk >= 0 && option == OPT_GO) {
			c->disk = disk;
			return true;
		}
	}
}

/* --- Requests ------------------------------------------------------------- */

/* Takes the write over: 0, or NBD_EIO, and it is gone.  What is left of an earlier round is no loss. */
static uint32_t take_in(struct conn *c, struct nbd_write *w)
{
	struct nbd *n = c->n;
	bool wake;

	pthread_mutex_lock(&n->lock);
	while (n->accepts && c->round == n->round && !n->hurry && !n->stopping &&
	       !n->never_waits && n->bytes >= n->limit)
		pthread_cond_wait(&n->room, &n->lock);
	/* Once one has failed, those after it are of no use. */
	if (!n->accepts || n->stopping || c->round != n->round ||
	    (n->never_waits && (n->failed || n->bytes >= n->limit))) {
		n->failed |= c->round == n->round;
		pthread_mutex_unlock(&n->lock);
		free(w);
		return NBD_EIO;
	}
	*n->last = w;
	n->last = &w->next;
	wake = n->bytes < n->limit / 2;
	n->bytes += w->zeros ? 0 : w->len;
	wake = wake && n->bytes >= n->limit / 2;
	pthread_mutex_unlock(&n->lock);
	if (wake)
		kc_wake();
	return 0;
}

/* Its data have to be read in any case; false: the connection is of no use */
static bool request(struct conn *c)
{
	struct nbd *n = c->n;
	struct nbd_write *w = NULL;
	uint8_t head[28], reply[16];
	uint32_t error = 0, len;
	uint64_t offset;
	bool inside;
	uint16_t type;

	if (!get(c->fd, head, sizeof(head)) || get_be32(head) != REQUEST)
		return false;
	type = head[6] << 8 | head[7];
	offset = get_be64(head + 16);
	len = get_be32(head + 24);
	inside = offset <= n->sizes[c->disk] && len <= n->sizes[c->disk] - offset;
	switch (type) {
	case CMD_WRITE:
	case CMD_WRITE_ZEROES:
		if (type == CMD_WRITE && len > MAX_REQUEST)
			return false;
		w = malloc(sizeof(*w) + (type == CMD_WRITE ? len : 0));
		if (!w)
			return false;
		*w = (struct nbd_write){ .disk = c->disk, .offset = offset, .len = len,
					 .zeros = type == CMD_WRITE_ZEROES };
		if (type == CMD_WRITE && !get(c->fd, w->data, len)) {
			free(w);
			return false;
		}
		if (inside) {
			error = take_in(c, w);
		} else {
			free(w);
			error = NBD_EINVAL;
		}
		break;
	case CMD_FLUSH:
		/* Where this epoch's writes are safe is told by its acknowledgement */
		break;
	case CMD_DISC:
		return false;
	default:
		error = NBD_EINVAL;
	}
	put_be(put_be(reply, REPLY, 4), error, 4);
	memcpy(reply + 8, head + 8, 8);
	return put(c->fd, reply, sizeof(reply));
}

static void *serve(void *arg)
{
	struct conn *c = arg, **p;
	struct nbd *n = c->n;

	if (negotiate(c)) {
		while (request(c))
			;
	}
	pthread_mutex_lock(&n->lock);
	/* A mirror that is gone lets the guest write without us */
	if (c->disk >= 0 && n->accepts && c->round == n->round)
		n->failed = true;
	for (p = &n->conns; *p != c; p = &(*p)->next)
		;
	*p = c->next;
	/* The guard has it, too */
	shutdown(c->fd, SHUT_RDWR);
	close(c->fd);
	n->nr_conns--;
	pthread_cond_broadcast(&n->room);
	pthread_mutex_unlock(&n->lock);
	free(c);
	return NULL;
}

/* The next connection, or -1 at the end; in the meantime the guard hears of us */
static int next_conn(struct nbd *n)
{
	struct pollfd p = { .fd = n->listener, .events = POLLIN };
	bool stopping;
	int fd = -1;

	do {
		/* One may be gone before it is accepted */
		if (poll(&p, 1, n->pulse_ms) > 0)
			fd = accept4(n->listener, NULL, NULL, SOCK_CLOEXEC);
		/* There may be no room for it just now */
		if (fd < 0)
			poll(NULL, 0, 1);
		nbd_guard_tell(n->guard, -1);
		pthread_mutex_lock(&n->lock);
		stopping = n->stopping;
		pthread_mutex_unlock(&n->lock);
	} while (fd < 0 && !stopping);
	return fd;
}

static void *accept_all(void *arg)
{
	struct nbd *n = arg;
	struct ucred peer;
	socklen_t len;
	struct conn *c;
	int fd;

	while ((fd = next_conn(n)) >= 0) {
		/* The directory is ours alone; this is for root, who may look into any */
		len = sizeof(peer);
		if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) ||
		    (peer.uid != geteuid() && peer.uid)) {
			close(fd);
			continue;
		}
		c = calloc(1, sizeof(*c));
		if (!c) {
			close(fd);
			continue;
		}
		*c = (struct conn){ .n = n, .fd = fd, .disk = -1 };
		pthread_mutex_lock(&n->lock);
		if (n->stopping || n->nr_conns >= 2 * NBD_MAX_DISKS ||
		    pthread_create(&c->thread, NULL, serve, c)) {
			close(fd);
			free(c);
		} else {
			nbd_guard_tell(n->guard, fd);
			pthread_detach(c->thread);
			c->round = n->round;
			c->next = n->conns;
			n->conns = c;
			n->nr_conns++;
		}
		pthread_mutex_unlock(&n->lock);
	}
	return NULL;
}

/* --- For the owner -------------------------------------------------------- */

static void forget(struct nbd *n)
{
	struct nbd_write *w;

	while ((w = n->first)) {
		n->first = w->next;
		free(w);
	}
	n->last = &n->first;
	n->bytes = 0;
}

/* Of a systemd unit, then of a user; the first of several */
static void choose_dir(struct nbd *n)
{
	static const char * const names[] = { "RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR" };
	const char *base = NULL;
	size_t i, len = 0;

	for (i = 0; !len && i < sizeof(names) / sizeof(names[0]); i++) {
		base = getenv(names[i]);
		len = base && *base == '/' ? strcspn(base, ":") : 0;
		if (len > sizeof(n->dir) - 30)
			len = 0;
	}
	if (!len) {
		base = "/tmp";
		len = strlen(base);
	}
	snprintf(n->dir, sizeof(n->dir), "%.*s/kvm-checkpoint.XXXXXX", (int)len, base);
}

static int listen_on(struct nbd *n, struct kc_err *err)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };

	choose_dir(n);
	if (!mkdtemp(n->dir)) {
		int rc = kc_fail(err, errno, "cannot make a directory %s for a socket: %s", n->dir,
				 strerror(errno));

		n->dir[0] = '\0';
		return rc;
	}
	snprintf(n->path, sizeof(n->path), "%s/nbd", n->dir);
	snprintf(sun.sun_path, sizeof(sun.sun_path), "%s", n->path);
	n->listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (n->listener < 0 || bind(n->listener, (struct sockaddr *)&sun, sizeof(sun)) ||
	    listen(n->listener, NBD_MAX_DISKS))
		return kc_fail(err, errno, "cannot listen on %s: %s", n->path, strerror(errno));
	return 0;
}

struct nbd *nbd_start(const uint64_t *sizes, unsigned int nr, uint64_t limit, int guard,
		      unsigned int guard_ms, struct kc_err *err)
{
	struct nbd *n = calloc(1, sizeof(*n));
	int rc;

	if (!n) {
		kc_fail(err, ENOMEM, "out of memory");
		errno = ENOMEM;
		return NULL;
	}
	memcpy(n->sizes, sizes, nr * sizeof(*sizes));
	n->nr = nr;
	n->limit = limit;
	n->guard = guard;
	n->pulse_ms = guard < 0 ? -1 : (int)(guard_ms / 12 + 1);
	n->last = &n->first;
	n->listener = -1;
	pthread_mutex_init(&n->lock, NULL);
	pthread_cond_init(&n->room, NULL);
	rc = listen_on(n, err);
	if (!rc && pthread_create(&n->acceptor, NULL, accept_all, n)) {
		rc = kc_fail(err, EAGAIN, "cannot start a thread");
		close(n->listener);
		n->listener = -1;
	}
	if (!rc)
		return n;
	if (n->listener >= 0)
		close(n->listener);
	unlink(n->path);
	if (n->dir[0])
		rmdir(n->dir);
	free(n);
	errno = -rc;
	return NULL;
}

void nbd_stop(struct nbd *n)
{
	struct conn *c;

	if (!n)
		return;
	pthread_mutex_lock(&n->lock);
	n->stopping = true;
	for (c = n->conns; c; c = c->next)
		shutdown(c->fd, SHUT_RDWR);
	pthread_cond_broadcast(&n->room);
	pthread_mutex_unlock(&n->lock);
	shutdown(n->listener, SHUT_RDWR);
	pthread_join(n->acceptor, NULL);
	pthread_mutex_lock(&n->lock);
	while (n->nr_conns)
		pthread_cond_wait(&n->room, &n->lock);
	forget(n);
	pthread_mutex_unlock(&n->lock);
	close(n->listener);
	unlink(n->path);
	rmdir(n->dir);
	pthread_mutex_destroy(&n->lock);
	pthread_cond_destroy(&n->room);
	free(n);
}

const char *nbd_path(const struct nbd *n)
{
	return n->path;
}

void nbd_accept(struct nbd *n, bool accept)
{
	pthread_mutex_lock(&n->lock);
	forget(n);
	n->round++;
	n->accepts = accept;
	n->never_waits = false;
	n->failed = false;
	pthread_cond_broadcast(&n->room);
	pthread_mutex_unlock(&n->lock);
}

void nbd_hurry(struct nbd *n, bool hurry)
{
	pthread_mutex_lock(&n->lock);
	n->hurry = hurry;
	pthread_cond_broadcast(&n->room);
	pthread_mutex_unlock(&n->lock);
}

void nbd_never_wait(struct nbd *n, bool never)
{
	pthread_mutex_lock(&n->lock);
	n->never_waits = never;
	pthread_cond_broadcast(&n->room);
	pthread_mutex_unlock(&n->lock);
}

bool nbd_again(struct nbd *n)
{
	bool failed;

	pthread_mutex_lock(&n->lock);
	failed = n->failed;
	n->failed = false;
	pthread_mutex_unlock(&n->lock);
	return failed;
}

bool nbd_connected(struct nbd *n)
{
	uint32_t disks = 0;
	struct conn *c;

	pthread_mutex_lock(&n->lock);
	for (c = n->conns; c; c = c->next)
		disks |= c->disk >= 0 && c->round == n->round ? 1u << c->disk : 0;
	pthread_mutex_unlock(&n->lock);
	return disks == (1u << n->nr) - 1;
}

struct nbd_write *nbd_take(struct nbd *n)
{
	struct nbd_write *w;

	pthread_mutex_lock(&n->lock);
	w = n->first;
	n->first = NULL;
	n->last = &n->first;
	n->bytes = 0;
	pthread_cond_broadcast(&n->room);
	pthread_mutex_unlock(&n->lock);
	return w;
}

uint64_t nbd_bytes(struct nbd *n)
{
	uint64_t bytes;

	pthread_mutex_lock(&n->lock);
	bytes = n->bytes;
	pthread_mutex_unlock(&n->lock);
	return bytes;
}

bool nbd_failed(struct nbd *n)
{
	bool failed;

	pthread_mutex_lock(&n->lock);
	failed = n->failed;
	pthread_mutex_unlock(&n->lock);
	return failed;
}
