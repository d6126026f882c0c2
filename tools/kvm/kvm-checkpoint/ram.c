// SPDX-License-Identifier: GPL-2.0-only
/*
 * The RAM that a standby holds: its directory, and its blocks.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ram_internal.h"

/* --- Blocks --------------------------------------------------------------- */

static uint64_t slots_of(const struct kc_ram *ram, unsigned int i)
{
	return kc_guest_block_pages(&ram->guest,
				    i < KC_MAX_BLOCKS ? i : KC_DISK_BLOCK + i - KC_MAX_BLOCKS);
}

static int map_slots(struct kc_ram *ram, struct kc_err *err)
{
	unsigned int i;

	for (i = 0; i < KC_MAX_BLOCKS + KC_MAX_DISKS; i++) {
		if (!slots_of(ram, i))
			continue;
		ram->slots[i] = mmap(NULL, slots_of(ram, i) * sizeof(uint32_t),
				     PROT_READ | PROT_WRITE,
				     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (ram->slots[i] == MAP_FAILED) {
			ram->slots[i] = NULL;
			return kc_fail(err, ENOMEM, "out of memory");
		}
	}
	return 0;
}

/* Map the blocks; make them if they are new. */
static int map_blocks(struct kc_ram *ram, bool create, void (*progress)(void *ctx), void *ctx,
		      struct kc_err *err)
{
	const uint64_t step = 256 << 20;
	uint64_t size, done, n;
	struct stat st;
	char name[32];
	uint32_t i;
	int fd, rc;

	for (i = 0; i < ram->guest.nr_blocks; i++) {
		size = ram->guest.blocks[i].npages * KC_PAGE_SIZE;
		snprintf(name, sizeof(name), "ram%u", i);
		fd = openat(ram->dir, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW |
			    (create ? O_CREAT | O_TRUNC : 0), 0600);
		if (fd < 0)
			return kc_ram_fail(err, ram,
					  create ? "make a block of RAM" : "open a block of RAM");
		/* All at once: running out of memory later would be a SIGBUS. */
		for (done = 0; create && done < size; done += n) {
			n = size - done < step ? size - done : step;
			rc = posix_fallocate(fd, done, n);
			if (rc) {
				close(fd);
				return kc_fail(err, rc,
					       "cannot allocate %" PRIu64
					       " MiB for block %s in %s: %s",
					       size >> 20, ram->guest.blocks[i].name, ram->path,
					       strerror(rc));
			}
			if (progress)
				progress(ctx);
		}
		if (fstat(fd, &st) || (uint64_t)st.st_size != size) {
			close(fd);
			return kc_fail(err, EPROTO,
				       "%s/%s has the wrong size: remove %s and start from nothing",
				       ram->path, name, ram->path);
		}
		ram->fd[i] = fd;
		ram->map[i] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (ram->map[i] == MAP_FAILED) {
			ram->map[i] = NULL;
			return kc_ram_fail(err, ram, "map a block of RAM");
		}
		kc_no_dump(ram->map[i], size);
		rc = kc_ram_find_holes(ram, i, create, err);
		if (rc)
			return rc;
	}
	return map_slots(ram, err);
}

static void unmap_blocks(struct kc_ram *ram)
{
	uint32_t i;

	for (i = 0; i < ram->guest.nr_blocks; i++) {
		if (ram->map[i])
			munmap(ram->map[i], ram->guest.blocks[i].npages * KC_PAGE_SIZE);
		ram->map[i] = NULL;
		if (ram->fd[i] >= 0)
			close(ram->fd[i]);
		ram->fd[i] = -1;
		free(ram->punched[i]);
		ram->punched[i] = NULL;
	}
	ram->nr_punched = 0;
	for (i = 0; i < KC_MAX_BLOCKS + KC_MAX_DISKS; i++) {
		if (ram->slots[i])
			munmap(ram->slots[i], slots_of(ram, i) * sizeof(uint32_t));
		ram->slots[i] = NULL;
	}
}

int kc_ram_create(struct kc_ram *ram, const struct kc_guest *guest, void (*progress)(void *ctx),
		  void *ctx, struct kc_err *err)
{
	char name[32];
	uint32_t i;
	int rc;

	if (getrandom(ram->id, sizeof(ram->id), 0) != sizeof(ram->id) ||
	    kc_guest_copy(&ram->guest, guest))
		return kc_fail(err, ENOMEM, "out of memory");
	rc = kc_ram_new_disks(ram, err);
	if (!rc)
		rc = map_blocks(ram, true, progress, ctx, err);
	if (!rc)
		rc = kc_ram_write_meta_tmp(ram, 0, 0, 0, false, err);
	if (!rc)
		rc = kc_ram_rename_meta(ram, err);
	if (rc) {
		for (i = 0; i < ram->guest.nr_blocks; i++) {
			snprintf(name, sizeof(name), "ram%u", i);
			unlinkat(ram->dir, name, 0);
		}
		unmap_blocks(ram);
		kc_ram_close_disks(ram);
		kc_guest_free(&ram->guest);
		return rc;
	}
	ram->has_guest = true;
	return kc_ram_sync_dir(ram, err);
}

int kc_ram_digests(struct kc_ram *ram, uint32_t block, uint64_t first, uint32_t n, uint8_t *out,
		   struct kc_err *err)
{
	static const uint8_t zeros[KC_PAGE_SIZE];
	const uint8_t *pages[KC_DIGESTS_CHUNK];
	uint8_t *copies[KC_DIGESTS_CHUNK];
	uint64_t npages = kc_guest_block_pages(&ram->guest, block);
	uint32_t i, slot, nr_copies = 0;
	int rc = 0;

	if (first > npages || n > npages - first || n > KC_DIGESTS_CHUNK)
		return kc_fail(err, EPROTO,
			       "the stream is corrupt: digests of pages that are not there");
	for (i = 0; i < n && !rc; i++) {
		slot = *kc_ram_slot(ram, block, first + i);
		pages[i] = zeros;
		if (slot == SLOT_ZERO || slot == SLOT_HOLE)
			continue;
		if (slot == SLOT_NONE && block < KC_DISK_BLOCK) {
			pages[i] = kc_ram_page(ram, block, first + i);
			continue;
		}
		copies[nr_copies] = malloc(KC_PAGE_SIZE);
		if (!copies[nr_copies]) {
			rc = kc_fail(err, ENOMEM, "out of memory");
			break;
		}
		pages[i] = copies[nr_copies];
		rc = kc_ram_read_open(ram, block, first + i, copies[nr_copies++], err);
	}
	if (!rc)
		kc_page_digests(pages, n, out);
	while (nr_copies)
		free(copies[--nr_copies]);
	return rc;
}

/* --- Opening -------------------------------------------------------------- */

/* Remove what was being received when the last process ended. */
static void remove_leftovers(struct kc_ram *ram)
{
	struct dirent *d;
	char keep[32];
	DIR *dir;
	int fd;

	fd = openat(ram->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	dir = fd < 0 ? NULL : fdopendir(fd);
	if (!dir)
		return;
	kc_ram_state_name(keep, ram->epoch);
	while ((d = readdir(dir))) {
		if (!strcmp(d->d_name, "redo") || !strcmp(d->d_name, "redo.tmp") ||
		    !strcmp(d->d_name, "undo") || !strcmp(d->d_name, "undo.tmp") ||
		    !strcmp(d->d_name, "state.tmp") ||
		    (!strncmp(d->d_name, "state-", 6) && strcmp(d->d_name, keep)))
			unlinkat(ram->dir, d->d_name, 0);
	}
	closedir(dir);
}

/*
 * The RAM files are about to be changed without forcing anything to the disk: after a crash of the
 * host they would be of no epoch, and what the disk says of them must not be that they are.
 */
static int no_longer_durable(struct kc_ram *ram, struct kc_err *err)
{
	int rc;

	ram->durable = true;
	rc = kc_ram_replace_meta(ram, ram->epoch, ram->flags, false, err);
	ram->durable = false;
	ram->on_disk = false;
	return rc;
}

int kc_ram_open(const char *path, bool durable, struct kc_ram **out, struct kc_err *err)
{
	struct kc_ram *ram = calloc(1, sizeof(*ram));
	int rc;

	if (!ram)
		return kc_fail(err, ENOMEM, "out of memory");
	ram->dir = ram->lock = ram->redo = -1;
	memset(ram->disk, -1, sizeof(ram->disk));
	memset(ram->fd, -1, sizeof(ram->fd));
	ram->durable = durable;
	ram->wbuf = malloc(WBUF_PAGES * KC_PAGE_SIZE);
	ram->path = strdup(path);
	if (!ram->path || !ram->wbuf) {
		rc = kc_fail(err, ENOMEM, "out of memory");
		goto fail;
	}
	if (mkdir(path, 0700) && errno != EEXIST) {
		rc = kc_ram_fail(err, ram, "make the directory");
		goto fail;
	}
	ram->dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	/* QEMU may have another working directory. */
	free(ram->path);
	ram->path = realpath(path, NULL);
	if (!ram->path) {
		rc = kc_fail(err, errno, "cannot open %s: %s", path, strerror(errno));
		goto fail;
	}
	if (ram->dir >= 0)
		ram->lock =
			openat(ram->dir, "lock", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
	if (ram->lock < 0) {
		rc = kc_ram_fail(err, ram, "open the directory");
		goto fail;
	}
	rc = kc_check_owner(ram->dir, path, err);
	if (rc)
		goto fail;
	if (!kc_lock(ram->lock, kc_try_flock)) {
		rc = kc_fail(err, EBUSY, "%s is in use by another kvm-checkpoint", path);
		goto fail;
	}
	rc = kc_ram_read_meta(ram, err);
	if (!rc && ram->on_disk && !durable)
		rc = no_longer_durable(ram, err);
	if (!rc && ram->has_guest) {
		rc = map_blocks(ram, false, NULL, NULL, err);
		/* Who has taken them over may use them */
		if (!rc && !(ram->flags & KC_RAM_TAKEN_OVER))
			rc = kc_ram_open_disks(ram, err);
		if (!rc)
			rc = kc_ram_redo_again(ram, err);
		/* Whoever was to try it is dead. */
		if (!rc && (ram->flags & KC_RAM_UNTRIED) && !(ram->flags & KC_RAM_TAKEN_OVER))
			rc = kc_ram_go_back(ram, err);
	}
	if (!rc && ram->epoch)
		rc = kc_ram_read_state(ram, err);
	if (rc)
		goto fail;
	remove_leftovers(ram);
	*out = ram;
	return 0;
fail:
	kc_ram_close(ram);
	return rc;
}

void kc_ram_close(struct kc_ram *ram)
{
	unsigned int i;

	if (!ram)
		return;
	kc_ram_drop(ram);
	if (ram->keeps_redo)
		unlinkat(ram->dir, "redo.tmp", 0);
	if (ram->has_guest && !ram->durable)
		unlinkat(ram->dir, "state.tmp", 0);
	kc_ram_close_redo(ram);
	unmap_blocks(ram);
	kc_ram_close_disks(ram);
	for (i = 0; i < KC_MAX_DISKS; i++)
		free(ram->disk_path[i]);
	kc_guest_free(&ram->guest);
	if (ram->lock >= 0)
		close(ram->lock);
	if (ram->dir >= 0)
		close(ram->dir);
	free(ram->state.data);
	free(ram->wbuf);
	free(ram->path);
	free(ram);
}

const struct kc_guest *kc_ram_guest(const struct kc_ram *ram)
{
	return ram->has_guest ? &ram->guest : NULL;
}

void kc_ram_set_trial(struct kc_ram *ram, const struct kc_ram_trial *trial)
{
	ram->trial = trial;
}

const uint8_t *kc_ram_id(const struct kc_ram *ram)
{
	return ram->id;
}

bool kc_ram_set_sender(struct kc_ram *ram, const uint8_t sender[16], const uint8_t process[16])
{
	bool same = !memcmp(ram->sender, sender, sizeof(ram->sender));

	memcpy(ram->guest.process, process, sizeof(ram->guest.process));
	memcpy(ram->sender, sender, sizeof(ram->sender));
	return same;
}

uint64_t kc_ram_epoch(const struct kc_ram *ram)
{
	return ram->epoch;
}

uint64_t kc_ram_age_ms(const struct kc_ram *ram)
{
	uint64_t now = kc_wall_ms();

	return ram->epoch && ram->time_ms <= now ? now - ram->time_ms : UINT64_MAX;
}

bool kc_ram_counts(const struct kc_ram *ram)
{
	return ram->epoch && !(ram->flags & (KC_RAM_ENDED | KC_RAM_UNHELD));
}

unsigned int kc_ram_flags(const struct kc_ram *ram)
{
	return ram->flags;
}

int kc_ram_set_flags(struct kc_ram *ram, unsigned int flags, struct kc_err *err)
{
	int rc;

	if (flags == ram->flags || !ram->has_guest)
		return 0;
	rc = kc_ram_replace_meta(ram, ram->epoch, flags, ram->on_disk, err);
	/* What cannot be written holds as long as we live; a takeover is tried again. */
	if (!rc || !(flags & KC_RAM_TAKEN_OVER))
		ram->flags = flags;
	return rc;
}

char *kc_ram_block_path(const struct kc_ram *ram, uint32_t block)
{
	char *p;

	return asprintf(&p, "%s/ram%u", ram->path, block) < 0 ? NULL : p;
}

char *kc_ram_state_path(const struct kc_ram *ram)
{
	char *p;

	return asprintf(&p, "%s/state-%" PRIu64, ram->path, ram->epoch) < 0 ? NULL : p;
}
