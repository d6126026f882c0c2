// SPDX-License-Identifier: GPL-2.0-only
/*
 * The disk of the fake QEMU: its guest writes to it, and a mirror job takes it to an NBD server.
 */
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "fake_qemu.h"

#define CHUNK	(64u << 10)

static bool get(int fd, void *buf, size_t len)
{
	return !len || recv(fd, buf, len, MSG_WAITALL) == (ssize_t)len;
}

static bool put(int fd, const void *buf, size_t len)
{
	return send(fd, buf, len, MSG_NOSIGNAL) == (ssize_t)len;
}

static uint8_t *be(uint8_t *p, uint64_t v, unsigned int bytes)
{
	while (bytes--)
		*p++ = v >> 8 * bytes;
	return p;
}

int nbd_connect_to(const char *path)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	snprintf(sun.sun_path, sizeof(sun.sun_path), "%s", path);
	if (!connect(fd, (struct sockaddr *)&sun, sizeof(sun)))
		return fd;
	close(fd);
	return -1;
}

/* As QEMU does it, with an option that is not known before */
bool nbd_negotiate(int fd, const char *export)
{
	uint8_t buf[64], *p;
	uint32_t type, len;

	if (!get(fd, buf, 18) || memcmp(buf, "NBDMAGICIHAVEOPT", 16))
		return false;
	p = be(buf, 3, 4);
	p = be(be(be(p, 0x49484156454F5054ull, 8), 8, 4), 0, 4);
	if (!put(fd, buf, p - buf) || !get(fd, buf, 20))
		return false;
	memcpy(&type, buf + 12, 4);
	CHECK(be32toh(type) == 0x80000001u, "structured replies are said to be known");
	p = be(be(be(buf, 0x49484156454F5054ull, 8), 7, 4), 6 + strlen(export), 4);
	p = be(p, strlen(export), 4);
	memcpy(p, export, strlen(export));
	p = be(p + strlen(export), 0, 2);
	if (!put(fd, buf, p - buf))
		return false;
	do {
		if (!get(fd, buf, 20))
			return false;
		memcpy(&type, buf + 12, 4);
		memcpy(&len, buf + 16, 4);
		type = be32toh(type);
		if (be32toh(len) > sizeof(buf) || !get(fd, buf, be32toh(len)))
			return false;
	} while (type == 3);
	return type == 1;
}

/* 0, the server's error, or -1 */
int nbd_request(int fd, unsigned int type, uint64_t offset, uint32_t len, const void *data)
{
	uint8_t buf[28], reply[16];
	uint32_t error;
	uint64_t handle = rnd(&rng_state);

	be(be(be(be(be(be(buf, 0x25609513, 4), 0, 2), type, 2), handle, 8), offset, 8), len, 4);
	if (!put(fd, buf, sizeof(buf)) || (data && !put(fd, data, len)) ||
	    !get(fd, reply, sizeof(reply)))
		return -1;
	CHECK(!memcmp(reply + 8, buf + 8, 8), "the answer is to another request");
	memcpy(&error, reply + 4, 4);
	return be32toh(error);
}

static void lose(struct qemu *q)
{
	if (q->disk.fd >= 0)
		close(q->disk.fd);
	q->disk.fd = -1;
}

static void lose_all(struct qemu *q)
{
	lose(q);
	q->disk.fd = q->disk.next_fd;
	q->disk.next_fd = -1;
	lose(q);
}

/* As QEMU does it before a request; the first of these fails, as it does not wait */
static void connect_again(struct fake_disk *d)
{
	struct pollfd p = { .events = POLLIN };

	if (d->fd >= 0)
		return;
	d->fd = d->next_fd;
	d->next_fd = -1;
	if (d->fd >= 0)
		return;
	d->next_fd = p.fd = nbd_connect_to(d->path);
	/* Nor is a server waited for that is stopped */
	if (p.fd >= 0 && (poll(&p, 1, 20) != 1 || !nbd_negotiate(p.fd, "0"))) {
		close(p.fd);
		d->next_fd = -1;
	}
}

/* Is not what the server has */
static void mark(struct fake_disk *d, uint64_t offset, uint32_t len, bool dirty)
{
	uint64_t first = offset / KC_PAGE_SIZE, end = (offset + len + KC_PAGE_SIZE - 1) / KC_PAGE_SIZE;

	if (!dirty) {
		first = (offset + KC_PAGE_SIZE - 1) / KC_PAGE_SIZE;
		end = (offset + len) / KC_PAGE_SIZE;
	}
	for (; first < end; first++) {
		d->marked += dirty && !d->dirty[first];
		d->nr_dirty += dirty - d->dirty[first];
		d->dirty[first] = dirty;
	}
}

static bool send_to_server(struct qemu *q, uint64_t offset, uint32_t len, bool zeros)
{
	struct fake_disk *d = &q->disk;
	int error;

	connect_again(d);
	mark(d, offset, len, false);
	error = d->fd < 0 ? -1 : nbd_request(d->fd, zeros ? 6 : 1, offset, len,
					     zeros ? NULL : d->data + offset);
	d->mirrored += len;
	if (!error)
		return true;
	if (error < 0)
		lose(q);
	mark(d, offset, len, true);
	d->paused = true;
	d->errors++;
	send_job_event(q, "BLOCK_JOB_ERROR");
	return false;
}

/* The guest does not notice.  What is less than a page of what is to be copied anyway is not sent. */
static void mirror(struct qemu *q, uint64_t offset, uint32_t len, bool zeros)
{
	struct fake_disk *d = &q->disk;
	uint64_t end = offset + len;

	if (!d->job)
		return;
	if (offset % KC_PAGE_SIZE && d->dirty[offset / KC_PAGE_SIZE])
		offset += KC_PAGE_SIZE - offset % KC_PAGE_SIZE;
	if (end % KC_PAGE_SIZE && d->dirty[end / KC_PAGE_SIZE])
		end -= end % KC_PAGE_SIZE;
	if (offset < end)
		send_to_server(q, offset, end - offset, zeros);
}

void disk_writes(struct qemu *q)
{
	struct fake_disk *d = &q->disk;
	uint64_t size = d->npages * KC_PAGE_SIZE, offset;
	uint32_t len, i;
	bool zeros = !below(8);

	/* When a guest stands still its disks are at rest */
	if (!d->data || !q->running)
		return;
	/* Mostly whole pages, as of a file system; or sectors */
	if (below(3)) {
		len = KC_PAGE_SIZE * (1 + below(8));
		offset = (uint64_t)below(d->npages) * KC_PAGE_SIZE;
	} else {
		len = 512 * (1 + below(20));
		offset = (uint64_t)below(size / 512) * 512;
	}
	if (offset < d->kept * KC_PAGE_SIZE)
		return;
	if (len > size - offset)
		len = size - offset;
	for (i = 0; i < len; i += 8) {
		uint64_t v = zeros ? 0 : rnd(&rng_state);

		memcpy(d->data + offset + i, &v, 8);
	}
	mirror(q, offset, len, zeros);
}

void disk_fills(struct qemu *q, uint64_t npages)
{
	uint64_t size = npages * KC_PAGE_SIZE;

	memset(q->disk.data, rnd(&rng_state), size);
	mirror(q, 0, size, false);
}

/* A part of what is to be copied */
void disk_copies(struct qemu *q)
{
	struct fake_disk *d = &q->disk;
	uint64_t first = 0, n = 0;

	if (!d->job || d->paused)
		return;
	while (first < d->npages && !d->dirty[first])
		first++;
	while (first + n < d->npages && n < CHUNK / KC_PAGE_SIZE && d->dirty[first + n])
		n++;
	if (n && !send_to_server(q, first * KC_PAGE_SIZE, n * KC_PAGE_SIZE, false))
		return;
	d->copied += n * KC_PAGE_SIZE;
	if (!d->nr_dirty && !d->ready) {
		d->ready = true;
		send_job_event(q, "BLOCK_JOB_READY");
	}
}

const char *disk_says(struct qemu *q)
{
	struct fake_disk *d = &q->disk;
	char bitmap[200] = "";

	/* Unless a test has something else to say */
	if (!d->data || (*d->text && q->disks != d->text))
		return q->disks;
	if (d->job)
		snprintf(bitmap, sizeof(bitmap),
			 ", \"dirty-bitmaps\": [{\"name\": \"mine\", \"count\": 4096}, {\"count\": %" PRIu64 ", \"granularity\": 4096}]",
			 d->nr_dirty * KC_PAGE_SIZE);
	snprintf(d->text, sizeof(d->text),
		 "[{\"device\": \"virtio0\", \"inserted\": {\"ro\": false, \"node-name\": \"#block1\", \"image\": {\"virtual-size\": %" PRIu64 "}%s}}]",
		 d->npages * KC_PAGE_SIZE, bitmap);
	q->disks = d->text;
	return q->disks;
}

void start_disk(struct qemu *q, uint64_t npages)
{
	struct fake_disk *d = &q->disk;

	d->npages = npages;
	d->data = calloc(npages, KC_PAGE_SIZE);
	/* And one behind its end */
	d->dirty = calloc(npages + 1, sizeof(*d->dirty));
	d->fd = d->next_fd = -1;
	CHECK(d->data && d->dirty, "no memory");
	disk_says(q);
}

static const char *text_of(struct json_object *args, const char *name)
{
	struct json_object *o;

	return json_object_object_get_ex(args, name, &o) ? json_object_get_string(o) : "";
}

void end_job(struct qemu *q)
{
	q->disk.job = false;
	send_job_event(q, "BLOCK_JOB_CANCELLED");
}

bool disk_obeys(struct qemu *q, const char *command, struct json_object *args)
{
	struct fake_disk *d = &q->disk;
	struct json_object *server;

	if (!strcmp(command, "blockdev-add")) {
		CHECK(!d->node, "the node is added twice");
		CHECK(json_object_object_get_ex(args, "server", &server), "where is the server?");
		snprintf(d->path, sizeof(d->path), "%s", text_of(server, "path"));
		d->fd = nbd_connect_to(d->path);
		if (d->fd < 0 || !nbd_negotiate(d->fd, text_of(args, "export"))) {
			lose(q);
			refuse(q, "cannot connect");
			return true;
		}
		d->node = true;
		answer(q, "{}");
	} else if (!strcmp(command, "blockdev-mirror")) {
		CHECK(d->node && !d->job && !strcmp(text_of(args, "device"), "virtio0") &&
		      !strcmp(text_of(args, "copy-mode"), "write-blocking"),
		      "a mirror of what?");
		CHECK(!q->running || q->run_state, "the guest writes when its mirror begins");
		d->job = true;
		d->ready = d->paused = false;
		d->copied = 0;
		mark(d, 0, d->npages * KC_PAGE_SIZE, true);
		d->begun++;
		answer(q, "{}");
	} else if (!strcmp(command, "block-job-cancel")) {
		if (d->job) {
			answer(q, "{}");
			end_job(q);
		} else {
			refuse(q, "Block job 'kvm-checkpoint-0' not found");
		}
	} else if (!strcmp(command, "blockdev-del")) {
		if (!d->node) {
			refuse(q, "Failed to find node with node-name='kvm-checkpoint-0'");
			return true;
		}
		CHECK(!d->job, "deletes what is in use");
		d->node = false;
		lose_all(q);
		answer(q, "{}");
	} else if (!strcmp(command, "block-job-resume")) {
		if (!d->job || !d->paused) {
			refuse(q, "Can't resume a job that was not paused");
			return true;
		}
		d->paused = false;
		d->resumed++;
		answer(q, "{}");
	} else if (!strcmp(command, "query-block-jobs")) {
		if (d->job)
			answer(q,
			       "[{\"device\": \"kvm-checkpoint-0\", \"ready\": %s, \"paused\": %s, \"offset\": %" PRIu64 ", \"len\": %" PRIu64 "}]",
			       d->ready ? "true" : "false", d->paused ? "true" : "false", d->copied,
			       d->copied + d->nr_dirty * KC_PAGE_SIZE);
		else
			answer(q, "[]");
	} else {
		return false;
	}
	return true;
}
