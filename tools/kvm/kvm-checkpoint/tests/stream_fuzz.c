// SPDX-License-Identifier: GPL-2.0-only
/*
 * libFuzzer target: whatever comes from a peer or out of a file.  The first byte says on which way
 * in, the rest is what comes.  Checksums are always right in this build.
 */
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "launch.h"
#include "ram.h"
#include "status.h"
#include "store_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

static char dir[64], sub[96], file[160];

/*
 * A guest that would take all memory is refused for want of it, which is not what is sought here.
 */
#define MAX_PAGES 256u

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st;
	(void)type;
	return ftw->level ? remove(path) : 0;
}

static void clean(void)
{
	if (nftw(dir, remove_one, 8, FTW_DEPTH | FTW_PHYS))
		abort();
}

static void finish(void)
{
	clean();
	rmdir(dir);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
	(void)argc;
	(void)argv;
	kc_log_max = KC_LOG_ERROR;
	snprintf(dir, sizeof(dir), "%s/stream_fuzz.XXXXXX",
		 access("/dev/shm", W_OK) ? "/tmp" : "/dev/shm");
	if (!mkdtemp(dir))
		return 1;
	atexit(finish);
	return 0;
}

/* --- RAM in memory -------------------------------------------------------- */

struct mem {
	const struct kc_guest *guest;
	uint64_t last;
	uint8_t *pages[KC_MAX_INDEX];	/* by kc_block_index() */
	struct kc_devices state;
	bool open;
};

static uint64_t mem_last(void *ctx)
{
	return ((struct mem *)ctx)->last;
}

static int mem_begin(void *ctx, const struct kc_begin *b, struct kc_err *err)
{
	struct mem *m = ctx;

	(void)b;
	(void)err;
	if (m->open)
		abort();
	m->open = true;
	return 0;
}

static const void *mem_base(void *ctx, uint16_t block, uint64_t page)
{
	return ((struct mem *)ctx)->pages[kc_block_index(block)] + page * KC_PAGE_SIZE;
}

static const struct kc_devices *mem_base_state(void *ctx)
{
	return &((struct mem *)ctx)->state;
}

static int mem_page(void *ctx, uint16_t block, uint64_t page, const void *data, struct kc_err *err)
{
	struct mem *m = ctx;

	(void)err;
	if (!m->open)
		abort();
	memcpy(m->pages[kc_block_index(block)] + page * KC_PAGE_SIZE, data, KC_PAGE_SIZE);
	return 0;
}

static int mem_zero(void *ctx, const struct kc_zero *z, struct kc_err *err)
{
	struct mem *m = ctx;

	(void)err;
	if (!m->open)
		abort();
	memset(m->pages[kc_block_index(z->block)] + z->page * KC_PAGE_SIZE, 0,
	       z->npages * KC_PAGE_SIZE);
	return 0;
}

static int mem_part(void *ctx, const struct kc_part *p, struct kc_err *err)
{
	struct mem *m = ctx;

	(void)err;
	if (!m->open)
		abort();
	memcpy(m->pages[kc_block_index(p->block)] + p->page * KC_PAGE_SIZE + p->offset, p->data,
	       p->len);
	return 0;
}

static int mem_commit(void *ctx, uint64_t nr, const struct kc_devices *state, struct kc_err *err)
{
	struct mem *m = ctx;

	if (!m->open || nr <= m->last)
		abort();
	if (kc_devices_keep(&m->state, state, err))
		abort();
	m->last = nr;
	m->open = false;
	return 0;
}

static void mem_abort(void *ctx)
{
	struct mem *m = ctx;

	if (!m->open)
		abort();
	m->open = false;
}

static const struct kc_rx_ops mem_ops = {
	.last = mem_last, .begin = mem_begin, .base = mem_base, .base_state = mem_base_state,
	.page = mem_page, .zero = mem_zero, .part = mem_part, .commit = mem_commit,
	.abort = mem_abort,
};

/* --- Ways in -------------------------------------------------------------- */

static void records(struct kc_io *io, struct kc_rx *rx, struct kc_ram *ram)
{
	uint8_t out[KC_DIGESTS_CHUNK * KC_DIGEST_SIZE];
	struct kc_digest_req req;
	struct kc_rec rec;
	struct kc_err err;
	uint32_t reason;
	int rc;

	while (!kc_io_record(io, 0, &rec, &err)) {
		rc = kc_rx_record(rx, &rec, &err);
		if (rc < 0)
			return;
		if (rc == KC_DIGEST_REQ && !kc_get_digest_req(&rec, &req, &err) && ram)
			kc_ram_digests(ram, req.block, req.first, req.n, out, &err);
		if (rc == KC_END)
			kc_get_end(&rec, &reason, &err);
	}
}

/* Images beside the RAM */
static int give_disks(struct kc_ram *ram, const struct kc_guest *guest)
{
	const char *paths[KC_MAX_DISKS];
	static char names[KC_MAX_DISKS][128];
	struct kc_err err;
	uint32_t i;

	for (i = 0; i < guest->nr_disks; i++) {
		snprintf(names[i], sizeof(names[i]), "%s/image%u", sub, i);
		paths[i] = names[i];
	}
	return kc_ram_set_disks(ram, paths, guest->nr_disks, &err);
}

static void receive(const uint8_t *data, size_t size, bool with_files)
{
	struct kc_io *io = kc_io_file(-1, data, size);
	struct kc_ram *ram = NULL;
	struct kc_hello hello;
	struct mem m = { 0 };
	struct kc_rec rec;
	struct kc_err err;
	struct kc_rx *rx;
	uint32_t i;

	if (kc_io_record(io, 0, &rec, &err) || kc_get_hello(&rec, &hello, &err)) {
		kc_io_close(io);
		return;
	}
	if (kc_guest_pages(&hello.guest) + kc_guest_disk_pages(&hello.guest) > MAX_PAGES)
		goto out;
	if (with_files) {
		snprintf(sub, sizeof(sub), "%s/ram", dir);
		if (kc_ram_open(sub, false, &ram, &err) || give_disks(ram, &hello.guest) ||
		    kc_ram_create(ram, &hello.guest, NULL, NULL, &err))
			abort();
		rx = kc_rx_new(kc_ram_guest(ram), &kc_ram_ops, ram);
	} else {
		for (i = 0; i < KC_MAX_INDEX; i++)
			m.pages[i] = calloc(kc_guest_block_pages(&hello.guest, kc_block_of_index(i)),
					    KC_PAGE_SIZE);
		m.guest = &hello.guest;
		rx = kc_rx_new(&hello.guest, &mem_ops, &m);
	}
	records(io, rx, ram);
	kc_rx_free(rx);
	if (m.open)
		abort();
	for (i = 0; i < KC_MAX_INDEX; i++)
		free(m.pages[i]);
	free(m.state.data);
	if (ram) {
		uint64_t nr = kc_ram_epoch(ram);

		/* What was kept can be found again. */
		kc_ram_close(ram);
		if (kc_ram_open(sub, false, &ram, &err) || kc_ram_epoch(ram) != nr)
			abort();
		kc_ram_close(ram);
		clean();
	}
out:
	kc_guest_free(&hello.guest);
	kc_io_close(io);
}

/* What restoring and merging do with epoch @i, which @chain leads to. */
static void out_of_directory(const struct kc_store *st, const size_t *chain, size_t n, size_t i)
{
	static char names[KC_MAX_DISKS][160];
	const char *disks[KC_MAX_DISKS];
	uint8_t page[KC_PAGE_SIZE];
	struct kc_place pl = { 0 };
	struct kc_err err;
	uint64_t got, k;
	uint32_t d;
	bool stopped;

	for (d = 0; d < st->guest.nr_disks; d++) {
		snprintf(names[d], sizeof(names[d]), "%s/disk%zu-%u", dir, i, d);
		disks[d] = names[d];
	}
	snprintf(file, sizeof(file), "%s/out%zu", dir, i);
	kc_store_restore(st, st->files[i].nr, file, disks, st->guest.nr_disks, &got, &stopped, &err);
	if (!kc_place_init(&pl, &st->guest, n, &err) &&
	    !kc_store_replay(st, chain, n, &kc_place_ops, &pl, NULL, NULL, &err)) {
		for (d = 0; d < KC_MAX_INDEX; d++) {
			uint32_t b = kc_block_of_index(d);

			for (k = 0; k < kc_guest_block_pages(&st->guest, b); k++)
				kc_place_get(&pl, st, chain, b, k, page, &err);
		}
	}
	kc_place_free(&pl);
}

/* All epochs of a stream as files of a directory. */
static void directory(const uint8_t *data, size_t size)
{
	size_t at = 0, hello = 0, begin, *chain, i;
	struct kc_store st;
	struct kc_err err;
	struct kc_rec rec;
	uint64_t nr = 0;
	ssize_t n;
	int fd;

	snprintf(sub, sizeof(sub), "%s/store", dir);
	mkdir(sub, 0700);
	n = kc_get_rec(data, size, &rec, &err);
	if (n > 0)
		hello = at = n;
	while (at < size && nr < 4) {
		for (begin = at; (n = kc_get_rec(data + at, size - at, &rec, &err)) > 0;) {
			at += n;
			if (rec.type == KC_COMMIT)
				break;
		}
		if (n <= 0)
			at = size;
		nr++;
		snprintf(file, sizeof(file), "%s/epoch-%020d.kc", sub, (int)nr);
		fd = open(file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
		if (write(fd, data, hello) != (ssize_t)hello ||
		    write(fd, data + begin, at - begin) != (ssize_t)(at - begin))
			abort();
		close(fd);
	}
	if (kc_store_read(sub, &st, &err))
		abort();
	for (i = 0; i < st.nr_files; i++) {
		n = kc_store_chain(&st, st.files[i].nr, &chain, &err);
		if (n < 0)
			continue;
		if (kc_guest_pages(&st.guest) + kc_guest_disk_pages(&st.guest) <= MAX_PAGES)
			out_of_directory(&st, chain, n, i);
		free(chain);
	}
	kc_store_free(&st);
	clean();
}

/* What a standby says. */
static void answers(const uint8_t *data, size_t size)
{
	struct kc_io *io = kc_io_file(-1, data, size);
	struct kc_digest_req req;
	struct kc_welcome w;
	struct kc_rec rec;
	struct kc_err err;
	uint64_t nr, us;
	char text[100];
	uint32_t code;

	while (!kc_io_record(io, 0, &rec, &err)) {
		kc_get_welcome(&rec, &w, &err);
		kc_get_nr(&rec, &nr, &us, &err);
		kc_get_error(&rec, &code, text, sizeof(text));
		if (strlen(text) >= sizeof(text))
			abort();
		if (!kc_get_digest_req(&rec, &req, &err) && rec.type == KC_DIGESTS) {
			uint8_t d[KC_DIGEST_SIZE];

			memcpy(d, req.digests + (req.n - 1) * KC_DIGEST_SIZE, sizeof(d));
		}
	}
	kc_io_close(io);
}

static void command(const uint8_t *data, size_t size)
{
	struct kc_launch l = { 0 };
	char *s = strndup((const char *)data, size);
	struct kc_err err;

	l.argv = kc_split(s);
	if (l.argv)
		kc_launch_check(&l, &err);
	kc_free_argv(l.argv);
	free(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (!size)
		return 0;
	switch (data[0] % 5) {
	case 0:
		receive(data + 1, size - 1, false);
		break;
	case 1:
		receive(data + 1, size - 1, true);
		break;
	case 2:
		directory(data + 1, size - 1);
		break;
	case 3:
		answers(data + 1, size - 1);
		break;
	case 4:
		command(data + 1, size - 1);
		break;
	}
	return 0;
}
