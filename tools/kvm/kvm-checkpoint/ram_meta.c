// SPDX-License-Identifier: GPL-2.0-only
/*
 * The RAM that a standby holds: small files, and "meta", which says what the others are.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ram_internal.h"

static const char meta_magic[8] = "KCRAM 3";

int kc_ram_fail(struct kc_err *err, const struct kc_ram *ram, const char *what)
{
	int e = errno;

	return kc_fail(err, e, "cannot %s in %s: %s", what, ram->path, strerror(e));
}

int kc_ram_write_full(int fd, const void *buf, size_t len)
{
	const char *p = buf;
	ssize_t n;

	while (len) {
		n = write(fd, p, len);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return -1;
		p += n;
		len -= n;
	}
	return 0;
}

int kc_ram_write_file(struct kc_ram *ram, const char *name, const void *a, size_t a_len,
		      const void *b, size_t b_len, struct kc_err *err)
{
	/* What is there is written over, as that takes no space. */
	int fd = openat(ram->dir, name, O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	int rc;

	if (fd < 0)
		return kc_ram_fail(err, ram, "make a file");
	if (kc_ram_write_full(fd, a, a_len) || kc_ram_write_full(fd, b, b_len) ||
	    ftruncate(fd, a_len + b_len) || (ram->durable && fdatasync(fd))) {
		rc = kc_ram_fail(err, ram, "write a file");
		close(fd);
		unlinkat(ram->dir, name, 0);
		return rc;
	}
	close(fd);
	return 0;
}

int kc_ram_read_file(struct kc_ram *ram, const char *name, uint8_t **buf, size_t *len)
{
	int fd = openat(ram->dir, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
	struct stat st;
	ssize_t n;

	*buf = NULL;
	if (fd < 0)
		return -errno;
	if (!fstat(fd, &st) && st.st_size <= (off_t)(KC_STATE_MAX + KC_REC_MAX))
		*buf = malloc(st.st_size + 1);
	if (!*buf) {
		close(fd);
		return -ENOMEM;
	}
	n = pread(fd, *buf, st.st_size, 0);
	close(fd);
	if (n != st.st_size) {
		free(*buf);
		*buf = NULL;
		return -EIO;
	}
	*len = n;
	return 0;
}

int kc_ram_sync_dir(struct kc_ram *ram, struct kc_err *err)
{
	if (ram->durable && fsync(ram->dir))
		return kc_ram_fail(err, ram, "fsync");
	return 0;
}

void kc_ram_state_name(char name[32], uint64_t epoch)
{
	snprintf(name, 32, "state-%" PRIu64, epoch);
}

static void boot_id(char id[40])
{
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);

	memset(id, 0, 40);
	if (fd < 0)
		return;
	if (read(fd, id, 36) != 36)
		memset(id, 0, 40);
	close(fd);
}

/* --- meta ----------------------------------------------------------------- */

int kc_ram_write_meta_tmp(struct kc_ram *ram, uint64_t epoch, uint64_t time_ms,
			  unsigned int flags, bool on_disk, struct kc_err *err)
{
	static const uint8_t nobody[16];
	struct meta m = { .flags = flags, .epoch = epoch, .time_ms = time_ms,
			  .durable = on_disk };
	uint8_t *buf = malloc(sizeof(m) + KC_REC_HDR + KC_REC_MAX);
	uint64_t xxh;
	int rc;

	if (!buf)
		return kc_fail(err, ENOMEM, "out of memory");
	memcpy(m.magic, meta_magic, sizeof(m.magic));
	memcpy(m.id, ram->id, sizeof(m.id));
	memcpy(m.sender, ram->sender, sizeof(m.sender));
	boot_id(m.boot_id);
	m.hello_len = kc_put_hello(buf + sizeof(m), &ram->guest, nobody, 0);
	memcpy(buf, &m, sizeof(m));
	xxh = XXH3_64bits(buf, sizeof(m) + m.hello_len);
	rc = kc_ram_write_file(ram, "meta.tmp", buf, sizeof(m) + m.hello_len, &xxh, sizeof(xxh), err);
	free(buf);
	return rc;
}

/*
 * The old one stays, as the next "meta.tmp": to say that the protection ended or that the guest was
 * taken over takes no space then, which others may have used up.
 */
int kc_ram_rename_meta(struct kc_ram *ram, struct kc_err *err)
{
	if (renameat2(ram->dir, "meta.tmp", ram->dir, "meta", RENAME_EXCHANGE) &&
	    renameat(ram->dir, "meta.tmp", ram->dir, "meta"))
		return kc_ram_fail(err, ram, "rename meta.tmp");
	return 0;
}

int kc_ram_replace_meta(struct kc_ram *ram, uint64_t epoch, unsigned int flags, bool on_disk,
			struct kc_err *err)
{
	int rc = kc_ram_write_meta_tmp(ram, epoch, ram->time_ms, flags, on_disk, err);

	if (!rc)
		rc = kc_ram_rename_meta(ram, err);
	return rc ? rc : kc_ram_sync_dir(ram, err);
}

int kc_ram_read_meta(struct kc_ram *ram, struct kc_err *err)
{
	struct kc_hello hello;
	struct kc_rec rec;
	struct meta m;
	uint64_t xxh;
	uint8_t *buf;
	char id[40];
	size_t len;
	int rc;

	rc = kc_ram_read_file(ram, "meta", &buf, &len);
	if (rc == -ENOENT)
		return 0;
	if (rc)
		return kc_fail(err, -rc, "cannot read %s/meta: %s", ram->path, strerror(-rc));
	if (len > sizeof(m) && !memcmp(buf, meta_magic, 6) && memcmp(buf, meta_magic, 8)) {
		free(buf);
		return kc_fail(err, EPROTO,
			       "%s was written by another version of kvm-checkpoint: remove it and start from nothing",
			       ram->path);
	}
	rc = -EPROTO;
	if (len < sizeof(m) + sizeof(xxh))
		goto out;
	memcpy(&m, buf, sizeof(m));
	memcpy(&xxh, buf + len - sizeof(xxh), sizeof(xxh));
	if (memcmp(m.magic, meta_magic, sizeof(m.magic)) ||
	    len - sizeof(m) - sizeof(xxh) != m.hello_len ||
	    XXH3_64bits(buf, len - sizeof(xxh)) != xxh ||
	    kc_get_rec(buf + sizeof(m), m.hello_len, &rec, NULL) != (ssize_t)m.hello_len)
		goto out;
	rc = kc_get_hello(&rec, &hello, err);
	if (rc)
		goto out;
	ram->guest = hello.guest;
	ram->has_guest = true;
	ram->flags = m.flags;
	boot_id(id);
	ram->on_disk = m.durable;
	if (memcmp(id, m.boot_id, sizeof(id)) && !m.durable)
		kc_log(KC_LOG_WARN,
		       "%s was written before this host was booted: its pages serve for a resynchronization only",
		       ram->path);
	else
		ram->epoch = m.epoch;
	ram->time_ms = m.time_ms;
	memcpy(ram->id, m.id, sizeof(ram->id));
	memcpy(ram->sender, m.sender, sizeof(ram->sender));
out:
	if (rc)
		kc_fail(err, EPROTO, "%s/meta is damaged: remove %s and start from nothing",
			ram->path, ram->path);
	free(buf);
	return rc;
}
