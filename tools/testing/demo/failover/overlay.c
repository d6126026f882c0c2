// SPDX-License-Identifier: GPL-2.0-only
/*
 * A guest that goes on at a standby on an overlay: what the epochs brought stays as it is.
 *
 * The image of a standby is raw.  QEMU gets it there as the backing file of a qcow2 image, which is
 * empty to begin with, and what the guest writes from then on is in that.  To the next standby goes
 * what both of them have together.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <fcntl.h>
#include <unistd.h>

#include "clients.h"

unsigned int guest_has_overlay;

#define CLUSTER	65536

/* Of version 3; all of it is big-endian.  QEMU's docs/interop/qcow2.txt has what it means. */
struct header {
	uint32_t magic, version;
	uint64_t backing_name;
	uint32_t backing_name_len, cluster_bits;
	uint64_t size;
	uint32_t crypt, l1_size;
	uint64_t l1, refcounts;
	uint32_t refcount_clusters, snapshots;
	uint64_t snapshot_table, incompatible, compatible, autoclear;
	uint32_t refcount_order, header_len;
};

void ledger_overlay(unsigned int gen, char path[64])
{
	snprintf(path, 64, "/dev/shm/ledger-%u.qcow2", gen);
}

/* Clusters: the header, where reference counts are, they themselves, the first table */
void make_overlay(unsigned int gen, uint64_t size)
{
	const struct header h = {
		.magic = htobe32(0x514649fb), .version = htobe32(3),
		.cluster_bits = htobe32(16), .size = htobe64(size), .l1_size = htobe32(1),
		.l1 = htobe64(3 * CLUSTER), .refcounts = htobe64(CLUSTER),
		.refcount_clusters = htobe32(1), .refcount_order = htobe32(4),
		.header_len = htobe32(sizeof(h)),
	};
	const uint64_t at = htobe64(2 * CLUSTER);
	const uint16_t one = htobe16(1), counts[4] = { one, one, one, one };
	char path[64];
	int fd;

	ledger_overlay(gen, path);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, 4 * CLUSTER) || pwrite(fd, &h, sizeof(h), 0) != sizeof(h) ||
	    pwrite(fd, &at, sizeof(at), CLUSTER) != sizeof(at) ||
	    pwrite(fd, counts, sizeof(counts), 2 * CLUSTER) != sizeof(counts) || close(fd))
		fatal(path);
}
