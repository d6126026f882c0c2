// SPDX-License-Identifier: GPL-2.0-only
/*
 * Transport of records: TCP with TLS and a pre-shared key, plain TCP on loopback, files, memory.
 */
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <gnutls/gnutls.h>

#include "peer.h"
#include "stream.h"

#define READ_SIZE (256u << 10)
#define WRITE_SIZE (64u << 10)

/* TLS 1.3, a pre-shared key and forward secrecy, nothing else. */
#define PRIORITY "NORMAL:-VERS-ALL:+VERS-TLS1.3:-KX-ALL:+ECDHE-PSK:+DHE-PSK"

struct kc_io {
	int fd;
	bool socket;
	unsigned int timeout_ms;
	gnutls_session_t tls;
	gnutls_psk_client_credentials_t client;
	gnutls_psk_server_credentials_t server;
	uint64_t offset;
	_Atomic uint64_t heard_us;
	/* Either READ_SIZE bytes of our own, or all there is. */
	uint8_t *buf;
	bool mem;
	size_t pos, end;
	uint8_t *out;
	size_t fill_out;
};

/* --- Keys ----------------------------------------------------------------- */

static int server_key(gnutls_session_t tls, const char *identity, gnutls_datum_t *key)
{
	const struct kc_sink_opts *o = gnutls_session_get_ptr(tls);
	gnutls_datum_t hex;
	struct kc_psk psk;
	int rc;

	/* The file is read each time, so that keys can be changed. */
	if (o->psk_identity && strcmp(identity, o->psk_identity))
		return -1;
	if (kc_read_psk(o, identity, &psk, NULL))
		return -1;
	hex.data = (unsigned char *)psk.hex;
	hex.size = strlen(psk.hex);
	rc = gnutls_hex_decode2(&hex, key);
	explicit_bzero(&psk, sizeof(psk));
	return rc ? -1 : 0;
}

/* --- Waiting -------------------------------------------------------------- */

/* 0, -ETIMEDOUT or another negative errno. */
static int wait_fd(int fd, short events, unsigned int timeout_ms)
{
	uint64_t end = kc_now_us() + timeout_ms * 1000ull, now;
	struct pollfd p = { .fd = fd, .events = events };
	int n;

	for (;;) {
		now = kc_now_us();
		n = poll(&p, 1, now < end ? (end - now + 999) / 1000 : 0);
		if (n > 0)
			return 0;
		if (!n)
			return -ETIMEDOUT;
		if (errno != EINTR)
			return -errno;
	}
}

/* What is left of the time until @end, by kc_now_us(). */
static unsigned int left_ms(uint64_t end)
{
	uint64_t now = kc_now_us();

	return now < end ? (end - now + 999) / 1000 : 0;
}

/* An error of GnuTLS as negative errno; -EAGAIN if it is none. */
static int tls_errno(int rc)
{
	switch (rc) {
	case GNUTLS_E_AGAIN:
	case GNUTLS_E_INTERRUPTED:
	case GNUTLS_E_REHANDSHAKE:
		return -EAGAIN;
	case GNUTLS_E_PULL_ERROR:
	case GNUTLS_E_PUSH_ERROR:
		return errno && errno != EAGAIN ? -errno : -ECONNRESET;
	case GNUTLS_E_PREMATURE_TERMINATION:
	case GNUTLS_E_INVALID_SESSION:
	case GNUTLS_E_SESSION_EOF:
		return -ECONNRESET;
	default:
		return gnutls_error_is_fatal(rc) ? -EPROTO : -EAGAIN;
	}
}

/* --- Making connections --------------------------------------------------- */

static struct kc_io *io_new(int fd)
{
	struct kc_io *io = calloc(1, sizeof(*io));

	if (!io)
		return NULL;
	io->fd = fd;
	io->heard_us = kc_now_us();
	io->buf = malloc(READ_SIZE);
	io->out = malloc(WRITE_SIZE);
	if (!io->buf || !io->out) {
		io->fd = -1;
		kc_io_close(io);
		return NULL;
	}
	return io;
}

struct kc_io *kc_io_file(int fd, const void *mem, size_t len)
{
	struct kc_io *io;

	if (fd >= 0)
		return io_new(fd);
	io = calloc(1, sizeof(*io));
	if (!io)
		return NULL;
	io->fd = -1;
	io->mem = true;
	io->buf = (uint8_t *)mem;
	io->end = len;
	return io;
}

void kc_io_close(struct kc_io *io)
{
	if (!io)
		return;
	if (io->tls) {
		gnutls_bye(io->tls, GNUTLS_SHUT_WR);
		gnutls_deinit(io->tls);
	}
	if (io->client)
		gnutls_psk_free_client_credentials(io->client);
	if (io->server)
		gnutls_psk_free_server_credentials(io->server);
	if (io->fd >= 0)
		close(io->fd);
	if (!io->mem)
		free(io->buf);
	free(io->out);
	free(io);
}

int kc_io_fd(const struct kc_io *io)
{
	return io->fd;
}

/*
 * No TCP_USER_TIMEOUT: it would also end a connection to a peer that is there and takes nothing for
 * now.  That nothing comes back is noticed here.
 */
static void tune(int fd)
{
	int one = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
}

static int handshake(struct kc_io *io, uint64_t end, struct kc_err *err)
{
	int rc;

	for (;;) {
		rc = gnutls_handshake(io->tls);
		if (rc == GNUTLS_E_SUCCESS)
			return 0;
		if (rc != GNUTLS_E_AGAIN && rc != GNUTLS_E_INTERRUPTED &&
		    gnutls_error_is_fatal(rc)) {
			int e = tls_errno(rc);

			/* So that the peer knows that it was not the link. */
			if (rc != GNUTLS_E_FATAL_ALERT_RECEIVED && e == -EPROTO)
				gnutls_alert_send_appropriate(io->tls, rc);
			/*
			 * A server without the identity and one with another key both end it here.
			 */
			if (rc == GNUTLS_E_FATAL_ALERT_RECEIVED || e == -EPROTO)
				return kc_fail(err, EACCES,
					       "the TLS handshake failed (%s): both sides need the same identity and key in their --psk-file",
					       gnutls_strerror(rc));
			return kc_fail(err, -e, "the TLS handshake failed: %s",
				       gnutls_strerror(rc));
		}
		if (rc != GNUTLS_E_AGAIN)
			continue;
		rc = wait_fd(io->fd, gnutls_record_get_direction(io->tls) ? POLLOUT : POLLIN,
			     left_ms(end));
		if (rc == -ETIMEDOUT)
			return kc_fail(err, ETIMEDOUT,
				       "the peer does not answer the TLS handshake (does it use --insecure?)");
		if (rc)
			return kc_fail(err, -rc, "%s", strerror(-rc));
	}
}

static int start_tls(struct kc_io *io, bool client, const struct kc_sink_opts *o, uint64_t end,
		     struct kc_err *err)
{
	gnutls_datum_t key;
	struct kc_psk psk;
	int rc;

	rc = gnutls_init(&io->tls, (client ? GNUTLS_CLIENT : GNUTLS_SERVER) | GNUTLS_NONBLOCK |
			 GNUTLS_NO_SIGNAL);
	if (!rc)
		rc = gnutls_priority_set_direct(io->tls, PRIORITY, NULL);
	if (!rc && client) {
		rc = kc_read_psk(o, o->psk_identity, &psk, err);
		if (rc)
			return rc;
		key.data = (unsigned char *)psk.hex;
		key.size = strlen(psk.hex);
		rc = gnutls_psk_allocate_client_credentials(&io->client);
		if (!rc)
			rc = gnutls_psk_set_client_credentials(io->client, psk.identity, &key,
							       GNUTLS_PSK_KEY_HEX);
		explicit_bzero(&psk, sizeof(psk));
		if (!rc)
			rc = gnutls_credentials_set(io->tls, GNUTLS_CRD_PSK, io->client);
	} else if (!rc) {
		rc = gnutls_psk_allocate_server_credentials(&io->server);
		if (!rc) {
			gnutls_psk_set_server_credentials_function(io->server, server_key);
			gnutls_session_set_ptr(io->tls, (void *)o);
			rc = gnutls_credentials_set(io->tls, GNUTLS_CRD_PSK, io->server);
		}
	}
	if (rc)
		return kc_fail(err, EPROTO, "TLS: %s", gnutls_strerror(rc));
	gnutls_transport_set_int(io->tls, io->fd);
	return handshake(io, end, err);
}

static int start(int fd, bool client, const struct kc_sink_opts *o, uint64_t end,
		 struct kc_io **out, struct kc_err *err)
{
	struct kc_io *io = io_new(fd);
	int rc;

	if (!io)
		return kc_fail(err, ENOMEM, "out of memory");
	io->socket = true;
	io->timeout_ms = o->io_timeout_ms;
	tune(fd);
	rc = o->insecure ? 0 : start_tls(io, client, o, end, err);
	if (rc) {
		/* The caller still owns the socket. */
		if (io->tls)
			gnutls_deinit(io->tls);
		io->tls = NULL;
		io->fd = -1;
		kc_io_close(io);
		return rc;
	}
	*out = io;
	return 0;
}

static int connect_one(const struct addrinfo *a, uint64_t end)
{
	socklen_t len = sizeof(int);
	int fd, rc = 0;

	fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return -errno;
	if (connect(fd, a->ai_addr, a->ai_addrlen)) {
		rc = -errno;
		if (rc == -EINPROGRESS)
			rc = wait_fd(fd, POLLOUT, left_ms(end));
		if (!rc && getsockopt(fd, SOL_SOCKET, SO_ERROR, &rc, &len))
			rc = errno;
		if (rc > 0)
			rc = -rc;
	}
	if (rc) {
		close(fd);
		return rc;
	}
	return fd;
}

int kc_io_connect(const char *hostport, const struct kc_sink_opts *o, struct kc_io **io,
		  struct kc_err *err)
{
	uint64_t end = kc_now_us() + o->connect_timeout_ms * 1000ull;
	struct addrinfo *ai, *a;
	int rc, fd = -1;

	rc = kc_resolve(hostport, false, &ai, err);
	if (rc)
		return rc;
	for (a = ai; a && fd < 0; a = a->ai_next) {
		rc = kc_check_security(a->ai_addr, o, err);
		if (rc)
			break;
		fd = connect_one(a, end);
		if (fd < 0)
			rc = kc_fail(err, -fd, "cannot connect to %s: %s", hostport, strerror(-fd));
	}
	freeaddrinfo(ai);
	if (fd < 0)
		return rc;
	rc = start(fd, true, o, end, io, err);
	if (rc)
		close(fd);
	return rc;
}

int kc_io_listen(const char *hostport, const struct kc_sink_opts *o, struct kc_err *err)
{
	struct addrinfo *ai;
	int fd, rc, one = 1;

	rc = kc_resolve(hostport, true, &ai, err);
	if (rc) {
		errno = -rc;
		return -1;
	}
	rc = kc_check_security(ai->ai_addr, o, err);
	if (!rc && !o->insecure) {
		struct kc_psk psk;

		/* Say now what is wrong with the keys, not when somebody comes. */
		rc = kc_read_psk(o, o->psk_identity, &psk, err);
		explicit_bzero(&psk, sizeof(psk));
	}
	if (rc) {
		freeaddrinfo(ai);
		errno = -rc;
		return -1;
	}
	fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd >= 0)
		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (fd < 0 || bind(fd, ai->ai_addr, ai->ai_addrlen) || listen(fd, SOMAXCONN)) {
		rc = errno;
		kc_fail(err, rc, "cannot listen on %s: %s", hostport, strerror(rc));
		if (fd >= 0)
			close(fd);
		fd = -1;
		errno = rc;
	}
	freeaddrinfo(ai);
	return fd;
}

int kc_io_accept(int fd, const struct kc_sink_opts *o, struct kc_io **io, struct kc_err *err)
{
	return start(fd, false, o, kc_now_us() + o->connect_timeout_ms * 1000ull, io, err);
}

/* --- Reading -------------------------------------------------------------- */

uint64_t kc_io_offset(const struct kc_io *io)
{
	return io->offset;
}

uint64_t kc_io_heard_us(const struct kc_io *io)
{
	return io->heard_us;
}

/* More bytes into the buffer: their number, 0 at the end, or a negative errno. */
static ssize_t fill(struct kc_io *io, unsigned int timeout_ms)
{
	ssize_t n;
	int rc;

	if (io->mem)
		return 0;
	for (;;) {
		if (io->tls) {
			n = gnutls_record_recv(io->tls, io->buf + io->end, READ_SIZE - io->end);
			if (n < 0)
				n = tls_errno(n);
		} else {
			n = read(io->fd, io->buf + io->end, READ_SIZE - io->end);
			if (n < 0)
				n = errno == EINTR ? -EAGAIN : -errno;
		}
		if (n != -EAGAIN)
			break;
		if (!timeout_ms) {
			/* TLS may have had something that was no data: look again at the socket. */
			rc = wait_fd(io->fd, POLLIN, 0);
			if (rc)
				return rc == -ETIMEDOUT ? -EAGAIN : rc;
			continue;
		}
		rc = wait_fd(io->fd, POLLIN, timeout_ms);
		if (rc)
			return rc;
	}
	if (n > 0) {
		io->end += n;
		if (io->socket)
			io->heard_us = kc_now_us();
	}
	return n;
}

int kc_io_record(struct kc_io *io, unsigned int timeout_ms, struct kc_rec *rec, struct kc_err *err)
{
	ssize_t n;

	for (;;) {
		n = kc_get_rec(io->buf + io->pos, io->end - io->pos, rec, err);
		if (n < 0)
			return n;
		if (n > 0) {
			io->pos += n;
			io->offset += n;
			return 0;
		}
		if (io->pos && !io->mem) {
			memmove(io->buf, io->buf + io->pos, io->end - io->pos);
			io->end -= io->pos;
			io->pos = 0;
		}
		n = fill(io, timeout_ms);
		if (n > 0)
			continue;
		if (!n && io->pos == io->end)
			return kc_fail(err, ENODATA, "the peer closed the connection");
		if (!n)
			return kc_fail(err, ECONNRESET, "it ends in the middle of a record");
		if (n == -ETIMEDOUT)
			return kc_fail(err, ETIMEDOUT, "the peer has been silent for %u ms",
				       timeout_ms);
		if (n != -EAGAIN)
			kc_fail(err, -n, "cannot receive: %s", strerror(-n));
		return n;
	}
}

/* --- Writing -------------------------------------------------------------- */

/*
 * Has more come from a peer that takes nothing?  It waits to be read, as we write.  A standby that
 * tries to load an epoch says that it lives, but reads only when it has done that.
 */
static bool speaks(struct kc_io *io, int *unread)
{
	int before = *unread;

	return !ioctl(io->fd, FIONREAD, unread) && *unread > before;
}

static int write_all(struct kc_io *io, const uint8_t *p, size_t len, struct kc_err *err)
{
	int rc, unread = 0;
	ssize_t n;

	while (len) {
		if (io->tls) {
			n = gnutls_record_send(io->tls, p, len);
			if (n < 0)
				n = tls_errno(n);
		} else {
			n = send(io->fd, p, len, MSG_NOSIGNAL);
			if (n < 0)
				n = errno == EINTR ? -EAGAIN : -errno;
		}
		if (n > 0) {
			p += n;
			len -= n;
			continue;
		}
		rc = n;
		if (n == -EAGAIN)
			rc = wait_fd(io->fd, POLLOUT, io->timeout_ms);
		if (rc == -ETIMEDOUT && speaks(io, &unread))
			continue;
		if (rc == -ETIMEDOUT)
			return kc_fail(err, ETIMEDOUT, "the peer has taken no data for %u ms",
				       io->timeout_ms);
		if (rc)
			return kc_fail(err, -rc, "cannot send: %s", strerror(-rc));
	}
	return 0;
}

int kc_io_flush(struct kc_io *io, struct kc_err *err)
{
	size_t n = io->fill_out;

	io->fill_out = 0;
	return n ? write_all(io, io->out, n, err) : 0;
}

int kc_io_write(struct kc_io *io, const void *buf, size_t len, struct kc_err *err)
{
	const uint8_t *p = buf;
	size_t n;
	int rc;

	while (len) {
		n = WRITE_SIZE - io->fill_out;
		if (n > len)
			n = len;
		memcpy(io->out + io->fill_out, p, n);
		io->fill_out += n;
		p += n;
		len -= n;
		if (io->fill_out == WRITE_SIZE) {
			rc = kc_io_flush(io, err);
			if (rc)
				return rc;
		}
	}
	return 0;
}

bool kc_io_linger(struct kc_io *io, unsigned int timeout_ms)
{
	uint64_t end = kc_now_us() + timeout_ms * 1000ull;
	ssize_t n;

	if (io->tls)
		gnutls_bye(io->tls, GNUTLS_SHUT_WR);
	shutdown(io->fd, SHUT_WR);
	/* Closing with unread data in the socket would reset it, and lose what we said last. */
	for (;;) {
		io->pos = io->end = 0;
		n = left_ms(end) ? fill(io, left_ms(end)) : -ETIMEDOUT;
		if (n <= 0)
			return n != -ETIMEDOUT;
	}
}
