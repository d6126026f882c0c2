// SPDX-License-Identifier: GPL-2.0-only
/*
 * A peer, or a file, that lies about runs of pages: how long they are, where, and whether they overlap.
 * All checksums are right, as they would be with who writes them on purpose.
 */
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ram_internal.h"
#include "sim.h"
#include "stream_tests.h"

#define STATE_LEN 5000u

/* --- A stream, record by record ------------------------------------------- */

/* What the standby has to hold, and who receives */
static struct kc_ram *ram;
static struct kc_rx *rx;
static uint8_t *model[2];
static uint8_t device_state[2 * KC_PAGE_SIZE];

/* The open epoch */
static XXH3_state_t *sum;
static uint64_t nr, records, pages;

static uint8_t rec_buf[KC_REC_HDR + KC_REC_MAX];

/* The record in rec_buf: what the receiver says of it */
static int give(size_t len)
{
	struct kc_rec rec;

	CHECK(kc_get_rec(rec_buf, len, &rec, &err) == (ssize_t)len, "the test makes no record");
	if (rec.type != KC_COMMIT) {
		XXH3_128bits_update(sum, rec_buf, len);
		records++;
	}
	return kc_rx_record(rx, &rec, &err);
}

static int give_begin(unsigned int flags)
{
	struct kc_begin b = { .nr = nr + 1, .base = flags ? 0 : nr, .flags = flags };

	if (!sum)
		sum = XXH3_createState();
	XXH3_128bits_reset(sum);
	records = pages = 0;
	return give(kc_put_begin(rec_buf, &b));
}

static int give_zeros(uint32_t block, uint64_t page, uint64_t npages, unsigned int flags)
{
	struct kc_zero z = { .page = page, .npages = npages, .block = block, .flags = flags };

	pages += block == KC_STATE_BLOCK ? 0 : npages;
	return give(kc_put_zero(rec_buf, &z));
}

static int give_page(uint32_t block, uint64_t page, const uint8_t *data)
{
	struct kc_page p = { .page = page, .block = block, .xxh = XXH3_64bits(data, KC_PAGE_SIZE),
			     .enc = KC_ENC_RAW, .len = KC_PAGE_SIZE };
	size_t n = kc_put_page(rec_buf, &p);

	memcpy(rec_buf + n, data, KC_PAGE_SIZE);
	pages += block == KC_STATE_BLOCK ? 0 : 1;
	return give(n + KC_PAGE_SIZE);
}

static int give_state(void)
{
	struct kc_state s = { STATE_LEN, 0, XXH3_64bits(device_state, STATE_LEN) };
	int rc = give(kc_put_state(rec_buf, &s));

	if (!rc)
		rc = give_page(KC_STATE_BLOCK, 0, device_state);
	return rc ? rc : give_page(KC_STATE_BLOCK, 1, device_state + KC_PAGE_SIZE);
}

/* KC_COMMIT if it is taken */
static int give_commit(void)
{
	struct kc_commit c = { nr + 1, records, pages, { 0 } };
	XXH128_canonical_t canonical;
	int rc;

	XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(sum));
	memcpy(c.sum, canonical.digest, sizeof(c.sum));
	rc = give(kc_put_commit(rec_buf, &c));
	nr += rc == KC_COMMIT;
	return rc;
}

/* --- What is there -------------------------------------------------------- */

static void fill(uint8_t *page)
{
	unsigned int i;
	uint64_t v;

	for (i = 0; i < KC_PAGE_SIZE; i += 8) {
		v = rnd(&rng_state);
		memcpy(page + i, &v, 8);
	}
}

static void open_ram(const struct kc_ram_trial *trial)
{
	OK(kc_ram_open(path_of("ram"), false, &ram, &err));
	if (trial)
		kc_ram_set_trial(ram, trial);
	if (!kc_ram_guest(ram))
		OK(kc_ram_create(ram, &guest, NULL, NULL, &err));
	rx = kc_rx_new(kc_ram_guest(ram), &kc_ram_ops, ram);
	CHECK(rx, "out of memory");
}

static void close_ram(void)
{
	kc_rx_free(rx);
	kc_ram_close(ram);
}

/* A full epoch of a guest that has something in each page */
static void start(const struct kc_ram_trial *trial)
{
	uint64_t page;
	uint32_t b;

	fill(device_state);
	memset(device_state + STATE_LEN, 0, sizeof(device_state) - STATE_LEN);
	open_ram(trial);
	OK(give_begin(KC_EPOCH_FULL));
	for (b = 0; b < 2; b++) {
		model[b] = malloc(blocks[b].npages * KC_PAGE_SIZE);
		for (page = 0; page < blocks[b].npages; page++) {
			fill(model[b] + page * KC_PAGE_SIZE);
			OK(give_page(b, page, model[b] + page * KC_PAGE_SIZE));
		}
	}
	OK(give_state());
	CHECK(give_commit() == KC_COMMIT, "the first epoch is refused: %s", err.text);
}

static void check_files(void)
{
	uint64_t page;
	uint8_t *buf;
	char name[16];
	size_t len;
	uint32_t b;

	CHECK(kc_ram_epoch(ram) == nr, "it has epoch %" PRIu64 ", not %" PRIu64, kc_ram_epoch(ram),
	      nr);
	for (b = 0; b < 2; b++) {
		snprintf(name, sizeof(name), "ram/ram%u", b);
		read_all(path_of(name), &buf, &len);
		CHECK(len == blocks[b].npages * KC_PAGE_SIZE, "block %u has %zu bytes", b, len);
		for (page = 0; page < blocks[b].npages; page++)
			CHECK(!memcmp(buf + page * KC_PAGE_SIZE, model[b] + page * KC_PAGE_SIZE,
				      KC_PAGE_SIZE), "page %" PRIu64 " of block %u is another one",
			      page, b);
		free(buf);
	}
}

/* --- Runs that there cannot be -------------------------------------------- */

struct lie {
	const char *what;
	uint32_t block;
	uint64_t page, npages;
	unsigned int flags;
};

/* Of blocks with 700 and 61 pages */
static const struct lie lies[] = {
	{ "the page behind the last one", 0, 700, 1, 0 },
	{ "one page more than there are", 0, 0, 701, 0 },
	{ "one more than are left", 0, 699, 2, KC_ZERO_HOLE },
	{ "those of the other block", 1, 0, 700, KC_ZERO_HOLE },
	{ "none", 0, 5, 0, 0 },
	{ "none, behind the last one", 0, 700, 0, KC_ZERO_HOLE },
	{ "all that a number can say", 0, 0, UINT64_MAX, KC_ZERO_HOLE },
	{ "an end at 2^64", 0, UINT64_MAX, 1, 0 },
	{ "an end beyond 2^64, which comes out as 0", 0, 1, UINT64_MAX, KC_ZERO_HOLE },
	{ "an end beyond 2^64, which comes out as 5", 0, UINT64_MAX - 4, 10, 0 },
	{ "bytes that come out as 0", 0, 1ull << 52, 1, KC_ZERO_HOLE },
	{ "bytes of which there are too many for a number", 0, 0, 1ull << 52, 0 },
	{ "2^32 and some", 0, 0, (1ull << 32) + 5, KC_ZERO_HOLE },
	{ "a page of 2^32 and some", 0, (1ull << 32) + 5, 5, 0 },
	{ "a block that is not there", 2, 0, 1, 0 },
	{ "as many blocks as there can be", KC_MAX_BLOCKS, 0, 1, KC_ZERO_HOLE },
	{ "a disk that is not there", KC_DISK_BLOCK, 0, 1, 0 },
	{ "the disk behind the last one that there can be", KC_DISK_BLOCK + KC_MAX_DISKS, 0, 1, 0 },
	{ "the device state before it is announced", KC_STATE_BLOCK, 0, 1, 0 },
	{ "flags that there are not", 0, 0, 1, KC_ZERO_HOLE << 1 },
	{ "all flags", 0, 0, 1, 0xffff },
};

/* It is refused, and what it came with has changed nothing */
void test_lying_runs(void)
{
	uint8_t junk[KC_PAGE_SIZE];
	size_t i;
	int rc;

	start(NULL);
	fill(junk);
	for (i = 0; i < sizeof(lies) / sizeof(lies[0]); i++) {
		const struct lie *l = &lies[i];

		OK(give_begin(0));
		/* So that there would be something to be torn */
		OK(give_page(0, 3, junk));
		OK(give_zeros(0, 100, 500, KC_ZERO_HOLE));
		rc = give_zeros(l->block, l->page, l->npages, l->flags);
		CHECK(rc == -EPROTO, "%s: %d", l->what, rc);
		close_ram();
		open_ram(NULL);
		check_files();
	}
	/* Of the device state: beyond what was announced */
	OK(give_begin(0));
	OK(give_state());
	CHECK(give_zeros(KC_STATE_BLOCK, 1, 2, 0) == -EPROTO, "zeros behind the device state");
	close_ram();
	open_ram(NULL);
	/* It says that there were more pages than there were, by as much as a number can hold */
	OK(give_begin(0));
	OK(give_zeros(0, 0, 10, 0));
	OK(give_state());
	pages--;
	CHECK(give_commit() == -EPROTO, "a wrong number of pages is taken");
	close_ram();
	open_ram(NULL);
	check_files();
	/* And what tells the truth is still taken */
	OK(give_begin(0));
	OK(give_zeros(0, 0, 700, KC_ZERO_HOLE));
	memset(model[0], 0, 700 * KC_PAGE_SIZE);
	OK(give_state());
	CHECK(give_commit() == KC_COMMIT, "the truth is refused: %s", err.text);
	check_files();
	close_ram();
}

/* --- Runs that overlap ---------------------------------------------------- */

static unsigned int untried, refused;

static bool some_are_needed(void *ctx, const struct kc_devices *state)
{
	(void)ctx;
	(void)state;
	return untried++ % 3;
}

static int some_are_bad(void *ctx, struct kc_err *e)
{
	(void)ctx;
	return untried % 4 ? 0 : kc_fail(e, EINVAL, "QEMU does not like it");
}

static const struct kc_ram_trial trials = { .needed = some_are_needed, .run = some_are_bad };

/* Zeros and contents over each other, however they come: the last one counts */
static void give_anything(uint8_t *next[2])
{
	unsigned int b = below(3) ? 0 : 1, kind = below(4);
	uint64_t page = below(blocks[b].npages), n;
	uint8_t data[KC_PAGE_SIZE];

	if (kind < 2) {
		fill(data);
		OK(give_page(b, page, data));
		memcpy(next[b] + page * KC_PAGE_SIZE, data, KC_PAGE_SIZE);
		return;
	}
	n = 1 + below(below(3) ? 5 : blocks[b].npages);
	n = n < blocks[b].npages - page ? n : blocks[b].npages - page;
	OK(give_zeros(b, page, n, kind == 2 ? 0 : KC_ZERO_HOLE));
	memset(next[b] + page * KC_PAGE_SIZE, 0, n * KC_PAGE_SIZE);
}

static void overlapping(const struct kc_ram_trial *trial)
{
	unsigned int round, i, b, n;
	uint8_t *next[2];
	int rc;

	start(trial);
	for (round = 0; round < 60; round++) {
		for (b = 0; b < 2; b++) {
			next[b] = malloc(blocks[b].npages * KC_PAGE_SIZE);
			memcpy(next[b], model[b], blocks[b].npages * KC_PAGE_SIZE);
		}
		OK(give_begin(0));
		for (i = 0, n = below(below(4) ? 40 : 1500); i < n; i++)
			give_anything(next);
		OK(give_state());
		rc = give_commit();
		CHECK(rc == KC_COMMIT || (rc == -EINVAL && trial), "round %u: %d: %s", round, rc,
		      err.text);
		refused += rc != KC_COMMIT;
		for (b = 0; b < 2; b++) {
			free(rc == KC_COMMIT ? model[b] : next[b]);
			model[b] = rc == KC_COMMIT ? next[b] : model[b];
		}
		check_files();
		if (rc != KC_COMMIT || !below(5)) {
			close_ram();
			open_ram(trial);
			check_files();
		}
	}
	close_ram();
}

void test_overlapping_runs(void)
{
	overlapping(NULL);
}

/* What is to be gone back from, too */
void test_overlapping_trial(void)
{
	overlapping(&trials);
	CHECK(refused > 5, "only %u epochs were refused", refused);
}

/* --- Runs without end ----------------------------------------------------- */

/*
 * Whoever says the same again and again, and never that this was it, costs no more memory than the
 * guest has pages.
 */
void test_endless_runs(void)
{
	uint64_t most = 2 * (blocks[0].npages + blocks[1].npages) + 2048;
	uint8_t data[KC_PAGE_SIZE];
	uint64_t i, page;

	start(NULL);
	OK(give_begin(0));
	fill(data);
	/* One run, of which only bits are left when pages are noted anew */
	OK(give_zeros(1, 0, 61, KC_ZERO_HOLE));
	OK(give_zeros(0, 0, 700, 0));
	for (i = 0; i < 6000; i++)
		OK(give_zeros(0, i % 350 * 2, 1, 0) || give_page(0, i % 350 * 2, data));
	CHECK(ram->nr_entries <= most, "%zu pages are kept", ram->nr_entries);
	for (i = 0; i < 200000; i++) {
		/* No two of them make one */
		page = i % 2 ? i / 2 % 300 : 699 - i / 2 % 300;
		OK(give_zeros(0, page, 1, i % 3 ? 0 : KC_ZERO_HOLE));
	}
	CHECK(ram->nr_zeros <= most && ram->zeros_room <= 2 * most, "%zu runs are kept of %" PRIu64,
	      ram->nr_zeros, i);
	for (page = 0; page < 700; page += 3)
		OK(give_page(0, page, data));
	OK(give_page(1, 7, data));
	OK(give_state());
	CHECK(give_commit() == KC_COMMIT, "it is refused: %s", err.text);
	/* All of it counted: of 300 to 399 only the first loop has said something */
	memset(model[1], 0, 61 * KC_PAGE_SIZE);
	memcpy(model[1] + 7 * KC_PAGE_SIZE, data, KC_PAGE_SIZE);
	memset(model[0], 0, 700 * KC_PAGE_SIZE);
	for (page = 0; page < 700; page++) {
		if (page % 3 == 0 || (page % 2 == 0 && page >= 300 && page < 400))
			memcpy(model[0] + page * KC_PAGE_SIZE, data, KC_PAGE_SIZE);
	}
	check_files();
	close_ram();
}

/* --- A file that lies ------------------------------------------------------ */

static const char redo_magic[8] = "KCREDO3";

/* As a standby leaves it that was killed when the epoch was complete; its one page is junk */
static void write_redo(const struct entry *entries, uint64_t n, uint64_t said)
{
	struct trailer t = { .epoch = nr + 1, .nr_slots = 1, .nr_entries = said };
	uint8_t junk[KC_PAGE_SIZE];
	char name[40];
	FILE *f;

	snprintf(name, sizeof(name), "ram/state-%" PRIu64, nr + 1);
	f = fopen(path_of(name), "w");
	CHECK(f && fwrite(device_state, STATE_LEN, 1, f) == 1 && !fclose(f), "cannot write %s", name);
	memset(junk, 0x77, sizeof(junk));
	memcpy(t.magic, redo_magic, sizeof(t.magic));
	t.xxh = XXH3_64bits_withSeed(entries, n * sizeof(*entries),
				     XXH3_64bits(&t, offsetof(struct trailer, xxh)));
	f = fopen(path_of("ram/redo"), "w");
	CHECK(f && fwrite(junk, sizeof(junk), 1, f) == 1 &&
	      fwrite(entries, sizeof(*entries), n, f) == n && fwrite(&t, sizeof(t), 1, f) == 1 &&
	      !fclose(f), "cannot write redo");
}

struct redo_lie {
	const char *what;
	struct entry entry;
};

static const struct redo_lie redo_lies[] = {
	{ "a page behind the last one", { 700, 0, 1, 1 } },
	{ "a run beyond the last one", { 699, 0, SLOT_HOLE, 2 } },
	{ "a run of nothing", { 3, 0, SLOT_ZERO, 0 } },
	{ "a run that ends at 0 again", { 1, 0, SLOT_HOLE, UINT64_MAX } },
	{ "a run from the last number on", { UINT64_MAX, 0, SLOT_ZERO, 1 } },
	{ "a run of too many bytes", { 0, 0, SLOT_HOLE, 1ull << 52 } },
	{ "a block that is not there", { 0, 2, SLOT_ZERO, 1 } },
	{ "a block that there cannot be", { 0, UINT32_MAX, SLOT_ZERO, 1 } },
	{ "a disk that is not there", { 0, KC_DISK_BLOCK, 1, 1 } },
	{ "the device state", { 0, KC_STATE_BLOCK, SLOT_ZERO, 1 } },
	{ "no page of the file", { 5, 0, SLOT_NONE, 1 } },
	{ "a page that the file does not have", { 5, 0, 2, 1 } },
	{ "the last number of a page that there is", { 5, 0, SLOT_HOLE - 1, 1 } },
	{ "a run with contents", { 5, 0, 1, 2 } },
};

void test_lying_redo(void)
{
	struct entry good[] = { { 5, 0, 1, 1 }, { 6, 0, SLOT_ZERO, 3 }, { 300, 0, SLOT_HOLE, 200 },
				{ 400, 0, SLOT_ZERO, 200 } };
	const uint64_t nr_good = sizeof(good) / sizeof(good[0]);
	const struct { uint64_t said; const char *what; } counts[] = {
		{ nr_good + 1, "an entry that is not there" }, { UINT64_MAX, "all entries" },
		{ 0, "no entry" },
		/* As bytes it comes out as what is there */
		{ (1ull << 63) / (sizeof(struct entry) / 2) + nr_good, "a number that wraps" },
	};
	struct entry two[2] = { good[0] };
	size_t i;
	int rc;

	start(NULL);
	close_ram();
	for (i = 0; i < sizeof(redo_lies) / sizeof(redo_lies[0]); i++) {
		/* The first one of it is right: it is not taken by halves */
		two[1] = redo_lies[i].entry;
		write_redo(two, 2, 2);
		rc = kc_ram_open(path_of("ram"), false, &ram, &err);
		CHECK(rc == -EPROTO && strstr(err.text, "redo is damaged"), "%s: %d: %s",
		      redo_lies[i].what, rc, rc ? err.text : "");
		CHECK(exists(path_of("ram/redo")), "%s: it is gone", redo_lies[i].what);
	}
	for (i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
		write_redo(good, nr_good, counts[i].said);
		rc = kc_ram_open(path_of("ram"), false, &ram, &err);
		CHECK(rc == -EPROTO, "%s: %d", counts[i].what, rc);
	}
	/* Nothing of all that has come to the RAM */
	unlink(path_of("ram/redo"));
	open_ram(NULL);
	check_files();
	close_ram();
	/* And what is right is taken: runs that overlap are no harm */
	write_redo(good, nr_good, nr_good);
	nr++;
	open_ram(NULL);
	memset(model[0] + 5 * KC_PAGE_SIZE, 0x77, KC_PAGE_SIZE);
	memset(model[0] + 6 * KC_PAGE_SIZE, 0, 3 * KC_PAGE_SIZE);
	memset(model[0] + 300 * KC_PAGE_SIZE, 0, 300 * KC_PAGE_SIZE);
	check_files();
	close_ram();
}
