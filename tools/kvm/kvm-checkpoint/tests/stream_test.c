// SPDX-License-Identifier: GPL-2.0-only
/*
 * stream_test [-s SEED] [-t NAME]... KVM-CHECKPOINT
 * stream_test -c DIR	writes what the fuzzer starts from
 *
 * Everything behind the sink, without KVM: a guest whose memory and device state at each epoch
 * follow from a seed, so that who has the number of an epoch can tell whether what was kept of it
 * is right. Prints KTAP.
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <json-c/json.h>

#include "backend.h"
#include "launch.h"
#include "ram.h"
#include "status.h"
#include "store.h"
#include "harness.h"

/* --- A guest -------------------------------------------------------------- */

static struct kc_block blocks[2] = { { "pc.ram", 700 }, { "/objects/ram1", 61 } };
static struct kc_guest guest = {
	.uuid = { 1, 2, 3 }, .name = "test guest", .page_size = KC_PAGE_SIZE, .nr_blocks = 2,
	.blocks = blocks, .fingerprint = { 9 },
};

#define STATE_ROOM 60000u

struct sim {
	uint64_t rng, epoch;
	uint8_t *ram[2];
	bool *dirty[2];
	uint8_t state[STATE_ROOM];
	uint32_t state_len;
};

static void sim_write(struct sim *g)
{
	unsigned int b = rnd(&g->rng) % 8 ? 0 : 1, i;
	uint64_t page = rnd(&g->rng) % blocks[b].npages;
	uint8_t *p = g->ram[b] + page * KC_PAGE_SIZE;
	uint64_t v;

	g->dirty[b][page] = true;
	switch (rnd(&g->rng) % 6) {
	case 0:		/* freed */
		memset(p, 0, KC_PAGE_SIZE);
		break;
	case 1:		/* cannot be compressed */
		for (i = 0; i < KC_PAGE_SIZE; i += 8) {
			v = rnd(&g->rng);
			memcpy(p + i, &v, 8);
		}
		break;
	case 2:		/* compresses well */
		memset(p, rnd(&g->rng), KC_PAGE_SIZE);
		break;
	case 3:		/* written, but with what was there */
		break;
	default:	/* a few words of it */
		for (i = 0; i < 4; i++) {
			v = rnd(&g->rng);
			memcpy(p + rnd(&g->rng) % (KC_PAGE_SIZE / 8) * 8, &v, 8);
		}
	}
}

/* Not running when the epoch was taken. */
static bool sim_stopped(uint64_t epoch)
{
	return epoch % 3 == 2;
}

/* One epoch further; dirty says what it wrote. */
static void sim_step(struct sim *g)
{
	unsigned int i, n = rnd(&g->rng) % 60;
	uint64_t v;

	memset(g->dirty[0], 0, blocks[0].npages);
	memset(g->dirty[1], 0, blocks[1].npages);
	for (i = 0; i < n; i++)
		sim_write(g);
	/* The device state changes here and there, and sometimes its length. */
	for (i = 0; i < 5; i++) {
		v = rnd(&g->rng);
		memcpy(g->state + rnd(&g->rng) % (STATE_ROOM - 8), &v, 8);
	}
	if (!(rnd(&g->rng) % 5))
		g->state_len = rnd(&g->rng) % STATE_ROOM;
	g->epoch++;
}

static void sim_init(struct sim *g)
{
	unsigned int i;

	memset(g, 0, sizeof(*g));
	g->rng = seed;
	g->state_len = 40000;
	for (i = 0; i < 2; i++) {
		g->ram[i] = calloc(blocks[i].npages, KC_PAGE_SIZE);
		g->dirty[i] = calloc(blocks[i].npages, 1);
	}
	for (i = 0; i < 400; i++)
		sim_write(g);
}

static void sim_free(struct sim *g)
{
	free(g->ram[0]);
	free(g->ram[1]);
	free(g->dirty[0]);
	free(g->dirty[1]);
}

static void sim_goto(struct sim *g, uint64_t epoch)
{
	if (epoch < g->epoch) {
		sim_free(g);
		sim_init(g);
	}
	while (g->epoch < epoch)
		sim_step(g);
}

/* Hand over the epoch as it is: all of it, what differs, or what is dirty. */
static int sim_send(struct sim *g, struct kc_sink *s, unsigned int flags)
{
	uint8_t digests[KC_DIGESTS_CHUNK * KC_DIGEST_SIZE], own[KC_DIGEST_SIZE];
	uint64_t i;
	uint32_t b;
	int rc;

	rc = kc_epoch_begin(s, g->epoch, flags, &err);
	for (b = 0; b < 2 && !rc; b++) {
		if (flags == KC_EPOCH_RESYNC)
			rc = kc_sink_digests(s, b, 0, blocks[b].npages, digests, &err);
		for (i = 0; i < blocks[b].npages && !rc; i++) {
			const uint8_t *p = g->ram[b] + i * KC_PAGE_SIZE;

			if (flags == KC_EPOCH_RESYNC) {
				kc_page_digest(p, own);
				if (!memcmp(own, digests + i * KC_DIGEST_SIZE, sizeof(own)))
					continue;
			} else if (!flags && !g->dirty[b][i]) {
				continue;
			}
			rc = kc_epoch_page(s, b, i, p, &err);
		}
	}
	if (!rc)
		rc = kc_epoch_state(s, g->state, g->state_len, sim_stopped(g->epoch), &err);
	return rc ? rc : kc_epoch_commit(s, &err);
}

/* The files hold the guest as it is in @g. */
static void compare(struct sim *g, const char *where, const char *state_name)
{
	char path[PATH_MAX];
	uint8_t *buf;
	size_t len;
	uint64_t i;
	int b;

	for (b = 0; b < 2; b++) {
		snprintf(path, sizeof(path), "%s/ram%d", where, b);
		read_all(path, &buf, &len);
		CHECK(len == blocks[b].npages * KC_PAGE_SIZE, "%s has %zu bytes", path, len);
		for (i = 0; i < blocks[b].npages; i++)
			CHECK(!memcmp(buf + i * KC_PAGE_SIZE, g->ram[b] + i * KC_PAGE_SIZE,
				      KC_PAGE_SIZE),
			      "page %" PRIu64 " in %s is not that of epoch %" PRIu64, i, path,
			      g->epoch);
		free(buf);
	}
	snprintf(path, sizeof(path), "%s/%s", where, state_name);
	read_all(path, &buf, &len);
	CHECK(len == g->state_len && !memcmp(buf, g->state, len),
	      "%s is not the device state of epoch %" PRIu64, path, g->epoch);
	free(buf);
}

static void compare_standby(struct sim *g, const char *ram_dir)
{
	char name[32];

	snprintf(name, sizeof(name), "state-%" PRIu64, g->epoch);
	compare(g, ram_dir, name);
}

/* --- Sinks ---------------------------------------------------------------- */

static char other_psk[PATH_MAX];
static struct kc_sink_opts opts;

/* Until a standby has noticed that a primary before is gone, it may say that it is busy. */
static struct kc_sink *must_open(const char *to)
{
	uint64_t end = kc_now_us() + 10000000;
	struct kc_sink *s;

	while (!(s = kc_sink_open(to, &opts, &guest, &err)) && errno == EBUSY && kc_now_us() < end)
		poll(NULL, 0, 5);
	CHECK(s, "cannot open %s: %s", to, err.text);
	return s;
}

/* It has to fail like this. */
static void must_refuse(const char *to, const struct kc_sink_opts *o, const struct kc_guest *g,
			int error, const char *text)
{
	struct kc_sink *s = kc_sink_open(to, o, g, &err);
	int e = errno;

	if (s)
		kc_sink_close(s);
	CHECK(!s, "it was accepted, but should have been refused: %s", text);
	CHECK(e == error, "refused with %s (%s), not %s", strerror(e), err.text, strerror(error));
	CHECK(strstr(err.text, text), "refused with \"%s\", which does not say \"%s\"", err.text,
	      text);
}

/* --- Units ---------------------------------------------------------------- */

static int get_any(const struct kc_rec *rec)
{
	struct kc_digest_req dr;
	struct kc_hello hello;
	struct kc_welcome w;
	struct kc_begin b;
	struct kc_page p;
	struct kc_zero z;
	struct kc_state s;
	struct kc_commit c;
	uint64_t x, y;
	uint32_t v;
	int rc;

	switch (rec->type) {
	case KC_HELLO:
		rc = kc_get_hello(rec, &hello, &err);
		if (!rc) {
			rc = kc_guest_same(&guest, &hello.guest, &err);
			kc_guest_free(&hello.guest);
		}
		return rc;
	case KC_WELCOME:
		return kc_get_welcome(rec, &w, &err);
	case KC_BEGIN:
		return kc_get_begin(rec, &b, &err);
	case KC_PAGE:
		rc = kc_get_page(rec, &p, &err);
		return rc ? rc : p.page == 77 && p.block == 1 && p.len == 100 ? 0 : -1;
	case KC_ZERO:
		return kc_get_zero(rec, &z, &err);
	case KC_STATE:
		return kc_get_state(rec, &s, &err);
	case KC_COMMIT:
		return kc_get_commit(rec, &c, &err);
	case KC_ACK:
	case KC_ABORT:
		return kc_get_nr(rec, &x, &y, &err);
	case KC_END:
		return kc_get_end(rec, &v, &err);
	case KC_DIGEST_REQ:
	case KC_DIGESTS:
		return kc_get_digest_req(rec, &dr, &err);
	}
	return -1;
}

static void test_records(void)
{
	static uint8_t buf[KC_REC_HDR + KC_REC_MAX + 1];
	const struct kc_page page = { .page = 77, .block = 1, .len = 100, .enc = KC_ENC_LZ4 };
	const struct kc_digest_req req = { .first = 5, .n = 3, .block = 1 };
	uint8_t id[16] = { 1 };
	struct kc_rec rec;
	size_t n[16], i, len;
	ssize_t got;
	int k;

	for (k = 0; k < 12; k++) {
		memset(buf, 0xee, sizeof(buf));
		switch (k) {
		case 0:
			n[k] = kc_put_hello(buf, &guest, id);
			break;
		case 1:
			n[k] = kc_put_welcome(buf, &(struct kc_welcome){ 1, true, 5, 6 });
			break;
		case 2:
			n[k] = kc_put_begin(buf, &(struct kc_begin){ 7, 6, 0 });
			break;
		case 3:
			n[k] = kc_put_page(buf, &page) + page.len;
			break;
		case 4:
			n[k] = kc_put_zero(buf, &(struct kc_zero){ 1, 2, 1 });
			break;
		case 5:
			n[k] = kc_put_state(buf, &(struct kc_state){ 12, KC_STATE_STOPPED, 13 });
			break;
		case 6:
			n[k] = kc_put_commit(buf, &(struct kc_commit){ .nr = 7 });
			break;
		case 7:
			n[k] = kc_put_nr(buf, KC_ACK, 7, 8);
			break;
		case 8:
			n[k] = kc_put_nr(buf, KC_ABORT, 7, 8);
			break;
		case 9:
			n[k] = kc_put_end(buf, 1);
			break;
		case 10:
			n[k] = kc_put_digest_req(buf, KC_DIGEST_REQ, &req);
			break;
		default:
			n[k] = kc_put_digest_req(buf, KC_DIGESTS, &req) + 3 * KC_DIGEST_SIZE;
			break;
		}
		/* Whole, it can be read; a part is no record yet. */
		got = kc_get_rec(buf, n[k], &rec, &err);
		CHECK(got == (ssize_t)n[k], "record %d: %zd of %zu bytes", k, got, n[k]);
		CHECK(!get_any(&rec), "record %d cannot be read: %s", k, err.text);
		for (i = 0; i < n[k]; i++)
			CHECK(!kc_get_rec(buf, i, &rec, &err), "record %d: %zu bytes are enough", k,
			      i);
		/* Shorter or longer than it should be. */
		len = n[k] - KC_REC_HDR;
		kc_get_rec(buf, n[k], &rec, &err);
		for (i = 0; i <= len + 1; i++) {
			rec.len = i;
			if (i != len)
				CHECK(get_any(&rec),
				      "record %d with %zu instead of %zu bytes is taken", k, i,
				      len);
		}
	}
	kc_put_rec(buf, KC_PAGE, 0, KC_REC_MAX + 1);
	CHECK(kc_get_rec(buf, sizeof(buf), &rec, &err) == -EPROTO, "an overlong record is taken");
	kc_put_rec(buf, KC_PAGE, 2, 0);
	CHECK(kc_get_rec(buf, sizeof(buf), &rec, &err) == -EPROTO, "unknown flags are taken");
	len = kc_put_state(buf, &(struct kc_state){ 12, KC_STATE_STOPPED << 1, 13 });
	CHECK(kc_get_rec(buf, len, &rec, &err) == (ssize_t)len && get_any(&rec) == -EPROTO,
	      "unknown flags of a device state are taken");
}

static void test_pages(void)
{
	static uint8_t page[KC_PAGE_SIZE], old[KC_PAGE_SIZE], got[KC_PAGE_SIZE], data[KC_PAGE_SIZE];
	struct kc_unpacker *up = kc_unpacker_new();
	struct kc_packer *pk;
	unsigned int codec, i, n, deltas = 0;
	struct kc_page p;
	uint64_t epoch;
	bool same;

	for (codec = KC_CODEC_NONE; codec <= KC_CODEC_ZSTD; codec++) {
		pk = kc_packer_new(codec, 3, 100 << 10);
		memset(page, 0, sizeof(page));
		for (epoch = 1; epoch < 300; epoch++) {
			memcpy(old, page, sizeof(old));
			n = below(4) ? below(20) : below(KC_PAGE_SIZE);
			for (i = 0; i < n; i++)
				page[below(KC_PAGE_SIZE)] = rnd(&rng_state);
			p = (struct kc_page){ .block = 0, .page = 5 };
			same = kc_pack(pk, epoch, &p, page);
			CHECK(!same || !memcmp(old, page, sizeof(old)),
			      "a changed page is left out");
			if (same)
				continue;
			deltas += !!(p.enc & KC_ENC_DELTA);
			CHECK(p.len <= KC_PAGE_SIZE, "a page of %u bytes", p.len);
			OK(kc_unpack(up, &p, old, got, &err));
			CHECK(!memcmp(got, page, sizeof(got)), "a page does not survive");
			if (p.enc & KC_ENC_DELTA) {
				CHECK(kc_unpack(up, &p, NULL, got, NULL),
				      "a delta without base is taken");
				old[below(KC_PAGE_SIZE)] ^= 1;
				CHECK(kc_unpack(up, &p, old, got, NULL),
				      "a delta with a wrong base is taken");
			}
			/* Damage is noticed wherever it is. */
			memcpy(data, p.data, p.len);
			data[below(p.len)] ^= 1u << below(8);
			p.data = data;
			CHECK(kc_unpack(up, &p, old, got, NULL) || !memcmp(got, page, sizeof(got)),
			      "a damaged page is taken");
			p.len = below(p.len);
			CHECK(kc_unpack(up, &p, old, got, NULL), "a part of a page is taken");
		}
		/* Never a delta against a version of the same epoch. */
		page[1]++;
		p = (struct kc_page){ .page = 6 };
		kc_pack(pk, 400, &p, page);
		page[2]++;
		kc_pack(pk, 400, &p, page);
		CHECK(!(p.enc & KC_ENC_DELTA), "a delta within an epoch");
		page[2]++;
		kc_pack(pk, 401, &p, page);
		kc_packer_forget(pk, 401);
		page[2]++;
		kc_pack(pk, 402, &p, page);
		CHECK(!(p.enc & KC_ENC_DELTA), "a delta against an epoch that never was");
		kc_packer_free(pk);
	}
	kc_unpacker_free(up);
	CHECK(deltas > 100, "only %u deltas", deltas);
}

static void test_commands(void)
{
	char *ram[] = { "/r/ram0", "/r/ram1" };
	struct kc_launch l = { .guest = &guest, .ram = ram, .state = "/r/state", .epoch = 12 };
	char *good[] = { "a={ram0},b={ram:/objects/ram1}", "{size1}{epoch}", "{state}",
			 "{\"x\": {}}", NULL };
	char *bad[] = { "{ram2}", NULL }, *worse[] = { "{rom0}", NULL };
	char **argv;

	argv = kc_split(" a 'b  \"c' \"d 'e\\\"\" f\\ g '' $HOME;`x` ");
	CHECK(argv && argv[0] && argv[1] && argv[2] && argv[3] && argv[4] && argv[5] && !argv[6],
	      "a command is split wrongly");
	CHECK(!strcmp(argv[0], "a") && !strcmp(argv[1], "b  \"c") && !strcmp(argv[2], "d 'e\"") &&
	      !strcmp(argv[3], "f g") && !strcmp(argv[4], "") && !strcmp(argv[5], "$HOME;`x`"),
	      "a command is split wrongly");
	kc_free_argv(argv);
	CHECK(!kc_split("a 'b") && !kc_split("  "), "a wrong command is taken");
	l.argv = good;
	OK(kc_launch_check(&l, &err));
	l.argv = bad;
	CHECK(kc_launch_check(&l, &err), "a block that is not there is taken");
	l.guest = NULL;
	OK(kc_launch_check(&l, &err));
	l.argv = worse;
	CHECK(kc_launch_check(&l, &err), "an unknown placeholder is taken");
}

/* --- Over the wire -------------------------------------------------------- */

static void epochs_with(const char *what, unsigned int n)
{
	struct kc_sink_stats stats;
	struct sim g;
	struct kc_sink *s;
	unsigned int i;

	remove_tree(path_of("ram"));
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	s = must_open(spec());
	CHECK(kc_sink_start(s) == KC_EPOCH_FULL, "a new standby wants no full epoch");
	sim_init(&g);
	for (i = 0; i < n; i++) {
		sim_step(&g);
		if (sim_send(&g, s, i ? 0 : KC_EPOCH_FULL))
			FAIL("%s, epoch %" PRIu64 ": %s", what, g.epoch, err.text);
		OK(kc_sink_wait(s, g.epoch, 10000, &err));
		compare_standby(&g, path_of("ram"));
	}
	kc_sink_poll(s, NULL, &err);
	kc_sink_stats(s, &stats);
	CHECK(stats.epochs == n && stats.epoch_acked == g.epoch, "%s: wrong statistics", what);
	if (opts.delta_cache && opts.codec)
		CHECK(stats.delta_pages > (opts.delta_cache >> 20 ? n : 0),
		      "%s: only %" PRIu64 " deltas", what, stats.delta_pages);
	printf("# %s: %" PRIu64 " pages and %" PRIu64 " bytes of state as %" PRIu64 " bytes, %" PRIu64
	       " deltas\n", what, stats.pages, stats.state_bytes, stats.wire_bytes, stats.delta_pages);
	kc_sink_end(s, KC_END_DETACH);
	kc_sink_close(s);
	stop_standby(SIGTERM);
	sim_free(&g);
}

static void test_tcp(void)
{
	epochs_with("lz4", 60);
	opts.delta_cache = 20 * KC_PAGE_SIZE;
	epochs_with("lz4, tiny delta cache", 30);
	opts.codec = KC_CODEC_ZSTD;
	epochs_with("zstd", 30);
	opts.delta_cache = 0;
	epochs_with("zstd, no deltas", 20);
	opts.codec = KC_CODEC_NONE;
	epochs_with("no compression", 20);
}

/* A page several times in an epoch, empty epochs, aborted ones, a full one in between. */
static void test_epochs(void)
{
	uint8_t junk[KC_PAGE_SIZE], d[KC_DIGEST_SIZE], own[KC_DIGEST_SIZE];
	struct kc_sink *s;
	struct sim g;
	uint64_t i;
	uint32_t b;

	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	s = must_open(spec());
	sim_init(&g);
	sim_step(&g);
	/* Aborted before there was any. */
	memset(junk, 0x5a, sizeof(junk));
	OK(kc_epoch_begin(s, g.epoch, KC_EPOCH_FULL, &err));
	OK(kc_epoch_page(s, 0, 3, junk, &err));
	OK(kc_epoch_abort(s, &err));
	CHECK(kc_epoch_begin(s, g.epoch, 0, &err) == -EINVAL,
	      "the first epoch may be an increment");
	OK(sim_send(&g, s, KC_EPOCH_FULL));
	OK(kc_sink_wait(s, g.epoch, 10000, &err));
	compare_standby(&g, path_of("ram"));
	for (i = 0; i < 30; i++) {
		/* An aborted epoch's pages must not become the base of anything. */
		if (i % 3 == 0) {
			OK(kc_epoch_begin(s, g.epoch + 1, 0, &err));
			for (b = 0; b < 100; b++)
				OK(kc_epoch_page(s, 0, b, junk, &err));
			OK(kc_epoch_state(s, junk, 100, false, &err));
			OK(kc_epoch_abort(s, &err));
		}
		sim_step(&g);
		OK(kc_epoch_begin(s, g.epoch, i == 20 ? KC_EPOCH_FULL : 0, &err));
		for (b = 0; b < 2; b++) {
			uint64_t n;

			for (n = 0; n < blocks[b].npages; n++) {
				if (i != 20 && !g.dirty[b][n])
					continue;
				OK(kc_epoch_page(s, b, n, junk, &err));
				OK(kc_sink_poll(s, NULL, &err));
				OK(kc_epoch_page(s, b, n, g.ram[b] + n * KC_PAGE_SIZE, &err));
				if (n % 4)
					continue;
				OK(kc_sink_digests(s, b, n, 1, d, &err));
				kc_page_digest(g.ram[b] + n * KC_PAGE_SIZE, own);
				CHECK(!memcmp(d, own, sizeof(d)),
				      "digest of a page of the open epoch");
			}
		}
		OK(kc_epoch_state(s, g.state, g.state_len, sim_stopped(g.epoch), &err));
		CHECK(kc_epoch_state(s, g.state, 1, false, &err) == -EINVAL, "two device states");
		OK(kc_epoch_commit(s, &err));
		OK(kc_sink_wait(s, g.epoch, 10000, &err));
		compare_standby(&g, path_of("ram"));
	}
	CHECK(kc_epoch_begin(s, g.epoch, 0, &err) == -EINVAL, "an epoch twice");
	OK(kc_epoch_begin(s, g.epoch + 1, 0, &err));
	CHECK(kc_epoch_page(s, 0, blocks[0].npages, junk, &err) == -EINVAL,
	      "a page beyond the end");
	CHECK(kc_epoch_page(s, 2, 0, junk, &err) == -EINVAL, "a block that is not there");
	CHECK(kc_epoch_commit(s, &err) == -EINVAL, "an epoch without device state");
	kc_sink_close(s);
	sim_free(&g);
}

static void resync(const char *to)
{
	struct kc_sink_stats stats;
	struct kc_sink *s;
	struct sim g;

	s = must_open(to);
	sim_init(&g);
	sim_step(&g);
	OK(sim_send(&g, s, KC_EPOCH_FULL));
	sim_step(&g);
	OK(sim_send(&g, s, 0));
	OK(kc_sink_wait(s, g.epoch, 10000, &err));
	/* Half an epoch, then the link breaks; the guest runs on. */
	sim_step(&g);
	OK(kc_epoch_begin(s, g.epoch, 0, &err));
	OK(kc_epoch_page(s, 0, 0, g.ram[0], &err));
	kc_sink_close(s);
	sim_step(&g);
	s = must_open(to);
	CHECK(kc_sink_last_epoch(s) == 2, "last epoch is %" PRIu64, kc_sink_last_epoch(s));
	CHECK(kc_sink_start(s) == KC_EPOCH_RESYNC, "no resync");
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, g.epoch, 10000, &err));
	kc_sink_poll(s, NULL, &err);
	kc_sink_stats(s, &stats);
	CHECK(stats.pages && stats.pages < 130, "%" PRIu64 " pages were sent", stats.pages);
	sim_step(&g);
	OK(sim_send(&g, s, 0));
	OK(kc_sink_wait(s, g.epoch, 10000, &err));
	kc_sink_close(s);
	sim_free(&g);
}

static void test_resync(void)
{
	struct sim g;
	struct kc_sink *s;

	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	resync(spec());
	sim_init(&g);
	sim_goto(&g, 5);
	compare_standby(&g, path_of("ram"));
	/* And after a restart of the standby. */
	stop_standby(SIGKILL);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	compare_standby(&g, path_of("ram"));
	s = must_open(spec());
	CHECK(kc_sink_last_epoch(s) == 5, "last epoch is %" PRIu64, kc_sink_last_epoch(s));
	sim_goto(&g, 9);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, 9, 10000, &err));
	compare_standby(&g, path_of("ram"));
	kc_sink_close(s);
	sim_free(&g);
}

static void restore_and_compare(const char *store, uint64_t epoch, struct sim *g)
{
	char nr[32];

	snprintf(nr, sizeof(nr), "%" PRIu64, epoch);
	remove_tree(path_of("restored"));
	unlink(path_of("log"));
	CHECK(!run("restore", "--epoch", nr, "--ram-dir", path_of("restored"), store, NULL),
	      "cannot restore epoch %s", nr);
	CHECK(log_has("\nstopped\n") == sim_stopped(epoch),
	      "does not know whether the guest was stopped at epoch %s", nr);
	sim_goto(g, epoch);
	compare(g, path_of("restored"), "state");
}

static void test_resync_directory(void)
{
	struct sim g;

	resync(path_of("store"));
	sim_init(&g);
	restore_and_compare(path_of("store"), 1, &g);
	restore_and_compare(path_of("store"), 2, &g);
	restore_and_compare(path_of("store"), 4, &g);
	restore_and_compare(path_of("store"), 5, &g);
	sim_free(&g);
}

/* --- Kills ---------------------------------------------------------------- */

/*
 * A primary in a process of its own: epochs from @first on, and each acknowledged one as a number
 * in
 * @shared.  Comes again when the receiver is gone, if it is told to.  @shared[3]: milliseconds
 * between epochs.
 */
static pid_t start_primary(const char *to, uint64_t first, volatile uint64_t *shared, bool again)
{
	pid_t pid = fork();
	struct kc_sink *s = NULL;
	unsigned int flags;
	uint64_t acked;
	struct sim g;

	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	kc_log_max = KC_LOG_ERROR;
	sim_init(&g);
	sim_goto(&g, first);
	for (;;) {
		s = kc_sink_open(to, &opts, &guest, &err);
		if (!s) {
			if (!again || !kc_sink_is_temporary(errno))
				_exit(3);
			poll(NULL, 0, 5);
			continue;
		}
		/* What was acknowledged is never lost. */
		if (kc_sink_last_epoch(s) < shared[0])
			_exit(4);
		shared[1]++;
		flags = kc_sink_start(s);
		do {
			poll(NULL, 0, shared[3]);
			sim_step(&g);
			shared[2] = g.epoch;
			if (sim_send(&g, s, flags) || kc_sink_poll(s, &acked, &err))
				break;
			flags = 0;
			if (acked > shared[0])
				shared[0] = acked;
			/* Not more than a few epochs ahead. */
		} while (g.epoch < acked + 3 || !kc_sink_wait(s, g.epoch - 2, 10000, &err));
		kc_sink_poll(s, &acked, &err);
		if (acked > shared[0])
			shared[0] = acked;
		kc_sink_close(s);
		if (!again)
			_exit(5);
	}
}

static volatile uint64_t *shared_numbers(void)
{
	uint64_t *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED, "out of memory");
	return p;
}

/* Every other round some epochs come before the kill, however slow the machine is. */
static void let_run(unsigned int round, volatile uint64_t *n, unsigned int ms)
{
	uint64_t end = kc_now_us() + 30000000, want = n[0] + 1 + below(12);

	while (round % 2 && n[0] < want) {
		CHECK(kc_now_us() < end, "no epoch is acknowledged any more");
		poll(NULL, 0, 1);
	}
	poll(NULL, 0, 1 + below(ms));
}

static void test_kill_standby(void)
{
	volatile uint64_t *n = shared_numbers();
	unsigned int round, complete = 0;
	uint64_t nr, last = 0;
	pid_t primary;
	struct sim g;

	sim_init(&g);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	primary = start_primary(spec(), 0, n, true);
	for (round = 0; round < 60; round++) {
		let_run(round, n, 60);
		stop_standby(SIGKILL);
		/* The primary may have read an acknowledgement just now, and not yet said so. */
		nr = ram_epoch(path_of("ram"));
		CHECK(nr >= n[0],
		      "round %u: epoch %" PRIu64 " was acknowledged, but the last is %" PRIu64,
		      round, n[0], nr);
		CHECK(nr >= last, "round %u: epoch %" PRIu64 " after %" PRIu64, round, nr, last);
		if (nr) {
			sim_goto(&g, nr);
			compare_standby(&g, path_of("ram"));
		}
		complete += nr > last;
		last = nr;
		start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	}
	CHECK(waitpid(primary, NULL, WNOHANG) == 0, "the primary gave up");
	kill(primary, SIGKILL);
	reap(&primary);
	CHECK(complete >= round / 2, "only %u of %u rounds had a new epoch", complete, round);
	printf("# %u kills, %u with new epochs, %" PRIu64 " epochs, %" PRIu64 " connections\n", round,
	       complete, last, n[1]);
	sim_free(&g);
}

static void test_kill_primary(void)
{
	volatile uint64_t *n = shared_numbers();
	unsigned int round;
	pid_t primary;
	uint64_t nr;
	struct sim g;

	sim_init(&g);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	for (round = 0; round < 40; round++) {
		primary = start_primary(spec(), n[2], n, true);
		let_run(round, n, 80);
		kill(primary, SIGKILL);
		CHECK(reap(&primary) == -SIGKILL, "the primary ended by itself");
		if (round % 4)
			continue;
		/* Let the standby finish what is on its way, then look at what it has. */
		stop_standby(SIGTERM);
		nr = ram_epoch(path_of("ram"));
		CHECK(nr >= n[0], "epoch %" PRIu64 " was acknowledged, but the last is %" PRIu64,
		      n[0], nr);
		if (nr) {
			sim_goto(&g, nr);
			compare_standby(&g, path_of("ram"));
		}
		start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	}
	CHECK(n[0] >= round / 2, "only %" PRIu64 " epochs in %u rounds", n[0], round);
	printf("# %u kills, %" PRIu64 " epochs acknowledged\n", round, n[0]);
	sim_free(&g);
}

static void test_kill_directory(void)
{
	volatile uint64_t *n = shared_numbers();
	unsigned int round, merged = 0;
	struct kc_store st;
	pid_t primary;
	struct sim g;
	size_t i;

	sim_init(&g);
	opts.keep = 5;
	for (round = 0; round < 24; round++) {
		primary = start_primary(path_of("store"), n[2], n, false);
		let_run(round, n, 100);
		kill(primary, SIGKILL);
		CHECK(reap(&primary) == -SIGKILL, "the primary ended by itself");
		if (!n[0])
			continue;
		OK(kc_store_read(path_of("store"), &st, &err));
		CHECK(st.nr_files && st.files[st.nr_files - 1].nr >= n[0],
		      "epoch %" PRIu64 " was acknowledged, but is not there", n[0]);
		merged += st.files[0].nr > 1;
		restore_and_compare(path_of("store"), st.files[st.nr_files - 1].nr, &g);
		/* And any that is still there since the last full one. */
		for (i = st.nr_files - 1; i && st.files[i].flags != KC_EPOCH_FULL; i--)
			;
		i += below(st.nr_files - i);
		restore_and_compare(path_of("store"), st.files[i].nr, &g);
		kc_store_free(&st);
	}
	CHECK(!run("verify", path_of("store"), NULL), "verify finds something");
	CHECK(merged > 5, "only %u rounds had merged epochs", merged);
	printf("# %u kills, %u with merged epochs, %" PRIu64 " epochs\n", round, merged, n[0]);
	sim_free(&g);
}

/* --- Damage --------------------------------------------------------------- */

/* What a primary sends, caught by a receiver that says yes to everything. */
static uint8_t *catch_stream(struct sim *g, unsigned int epochs, size_t *len)
{
	int fds[2], i;
	struct kc_welcome w = { .version = KC_VERSION };
	uint8_t rec[64], *buf = malloc(32 << 20);
	struct sockaddr_in sa = { .sin_family = AF_INET,
				  .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct kc_sink_opts o = opts;
	socklen_t sl = sizeof(sa);
	struct kc_sink *s;
	char to[64];
	ssize_t n;
	pid_t pid;

	fds[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(!bind(fds[0], (struct sockaddr *)&sa, sl) && !listen(fds[0], 1) &&
	      !getsockname(fds[0], (struct sockaddr *)&sa, &sl), "cannot listen");
	snprintf(to, sizeof(to), "tcp:127.0.0.1:%d", ntohs(sa.sin_port));
	pid = fork();
	if (!pid) {
		o.insecure = true;
		s = kc_sink_open(to, &o, &guest, &err);
		for (i = 0; s && i < (int)epochs; i++) {
			sim_step(g);
			if (sim_send(g, s, i ? 0 : KC_EPOCH_FULL))
				_exit(1);
		}
		kc_sink_close(s);
		_exit(!s);
	}
	fds[1] = accept(fds[0], NULL, NULL);
	w.timeout_ms = 0;
	n = kc_put_welcome(rec, &w);
	CHECK(write(fds[1], rec, n) == n, "cannot write");
	for (*len = 0; (n = read(fds[1], buf + *len, (32 << 20) - *len)) > 0; *len += n)
		;
	close(fds[0]);
	close(fds[1]);
	CHECK(!reap(&pid) && *len > 10000, "no stream was caught");
	return buf;
}

/* Feed a stream to the receiver's side with RAM in a directory; what it said. */
static int feed(const char *ram_dir, const uint8_t *buf, size_t len)
{
	struct kc_io *io = kc_io_file(-1, buf, len);
	struct kc_hello hello;
	struct kc_rx *rx = NULL;
	struct kc_ram *ram;
	struct kc_rec rec;
	int rc;

	remove_tree(ram_dir);
	CHECK(!kc_ram_open(ram_dir, false, &ram, &err), "%s", err.text);
	rc = kc_io_record(io, 0, &rec, &err);
	if (!rc)
		rc = kc_get_hello(&rec, &hello, &err);
	if (!rc) {
		rc = kc_guest_same(&guest, &hello.guest, &err);
		if (!rc)
			rc = kc_ram_create(ram, &hello.guest, NULL, NULL, &err);
		kc_guest_free(&hello.guest);
	}
	if (!rc)
		rx = kc_rx_new(kc_ram_guest(ram), &kc_ram_ops, ram);
	while (!rc) {
		rc = kc_io_record(io, 0, &rec, &err);
		if (!rc)
			rc = kc_rx_record(rx, &rec, &err);
		if (rc > 0)
			rc = 0;
	}
	kc_rx_free(rx);
	kc_ram_close(ram);
	kc_io_close(io);
	return rc;
}

static void test_damage(void)
{
	struct sim g, check;
	struct kc_rec rec;
	size_t len, at, ends[4] = { 0 }, n = 0, cut, i;
	unsigned int commits = 0, tried = 0;
	uint8_t *buf, *copy;
	uint64_t nr;
	ssize_t r;
	int rc;

	/* Small, so that each record can have its turn. */
	blocks[0].npages = 40;
	blocks[1].npages = 6;
	sim_init(&g);
	sim_init(&check);
	buf = catch_stream(&g, 3, &len);
	copy = malloc(len);
	for (at = 0; at < len; at += r, n++) {
		r = kc_get_rec(buf + at, len - at, &rec, &err);
		CHECK(r > 0, "the stream that was caught is no stream");
		if (rec.type == KC_COMMIT)
			ends[++commits] = at + r;
	}
	CHECK(commits == 3, "%u epochs were caught", commits);
	rc = feed(path_of("ram"), buf, len);
	CHECK(rc == -ENODATA && ram_epoch(path_of("ram")) == 3, "the whole stream is not taken: %s",
	      err.text);
	for (at = 0; at < len; at += r) {
		r = kc_get_rec(buf + at, len - at, &rec, &err);
		for (i = 0; i < 4; i++) {
			/* Cut at the boundary and within; one bit flipped in header and payload. */
			memcpy(copy, buf, len);
			cut = len;
			if (i < 2)
				cut = at + (i ? 1 + below(r - 1) : 0);
			else
				copy[at + (i == 2 ? below(KC_REC_HDR) : below(r))] ^= 1u
										      << below(8);
			rc = feed(path_of("ram"), copy, cut);
			nr = exists(path_of("ram/meta")) ? ram_epoch(path_of("ram")) : 0;
			/*
			 * Epochs that were whole before the damage, or all if it does no harm (in a
			 * name).
			 */
			commits = (at >= ends[1]) + (at >= ends[2]);
			if (i < 2)
				commits = (cut >= ends[1]) + (cut >= ends[2]) + (cut >= ends[3]);
			else if (rc == -ENODATA)
				commits = 3;
			CHECK(nr == commits, "%s at %zu: epoch %" PRIu64 " instead of %u (%d: %s)",
			      i < 2 ? "cut" : "bit flipped", i < 2 ? cut : at, nr, commits, rc,
			      err.text);
			if (nr) {
				sim_goto(&check, nr);
				compare_standby(&check, path_of("ram"));
			}
			tried++;
		}
	}
	printf("# %zu records, %u damaged streams\n", n, tried);
	free(buf);
	free(copy);
	sim_free(&g);
	sim_free(&check);
}

static void test_damage_directory(void)
{
	char file[64], nr[32];
	uint8_t *buf, *copy;
	struct kc_sink *s;
	struct sim g;
	size_t len, at;
	unsigned int i, e;
	int rc;

	blocks[0].npages = 40;
	blocks[1].npages = 6;
	sim_init(&g);
	s = must_open(path_of("store"));
	for (i = 0; i < 4; i++) {
		sim_step(&g);
		OK(sim_send(&g, s, i ? 0 : KC_EPOCH_FULL));
	}
	kc_sink_close(s);
	CHECK(!run("verify", path_of("store"), NULL), "verify finds something");
	for (i = 0; i < 24; i++) {
		e = 1 + i % 4;
		snprintf(file, sizeof(file), "store/epoch-%020u.kc", e);
		read_all(path_of(file), &buf, &len);
		copy = malloc(len);
		memcpy(copy, buf, len);
		at = below(len);
		/* Flipped in the last byte of the name, nothing but the name changes. */
		if (i % 2 && at > 140)
			copy[at] ^= 1u << below(8);
		else
			rc = truncate(path_of(file), at);
		if (i % 2 && at > 140) {
			int fd = open(path_of(file), O_WRONLY | O_TRUNC);

			CHECK(write(fd, copy, len) == (ssize_t)len, "cannot write");
			close(fd);
		} else {
			CHECK(!rc, "cannot truncate");
		}
		CHECK(run("verify", path_of("store"), NULL) == 1,
		      "verify finds nothing, at %zu of epoch %u", at, e);
		remove_tree(path_of("restored"));
		snprintf(nr, sizeof(nr), "%u", e);
		CHECK(run("restore", "--epoch", nr, "--ram-dir", path_of("restored"),
			  path_of("store"), NULL) == 1 &&
			      !exists(path_of("restored/ram0")),
		      "a damaged epoch is restored");
		/* Without a number it is the last sound one. */
		rc = run("restore", "--ram-dir", path_of("restored"), path_of("store"), NULL);
		if (e == 1) {
			CHECK(rc == 1, "something is restored without a full epoch");
		} else {
			CHECK(!rc, "the last sound epoch is not restored");
			sim_goto(&g, e - 1);
			compare(&g, path_of("restored"), "state");
		}
		rc = open(path_of(file), O_WRONLY | O_TRUNC);
		CHECK(write(rc, buf, len) == (ssize_t)len, "cannot write");
		close(rc);
		free(buf);
		free(copy);
	}
	CHECK(!run("verify", path_of("store"), NULL), "verify finds something");
	/* One that writes on: from the last sound epoch, and nothing is removed. */
	CHECK(!truncate(path_of("store/epoch-00000000000000000003.kc"), 1000), "cannot truncate");
	s = must_open(path_of("store"));
	CHECK(kc_sink_last_epoch(s) == 2, "goes on from epoch %" PRIu64, kc_sink_last_epoch(s));
	sim_goto(&g, 6);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	kc_sink_close(s);
	CHECK(exists(path_of("store/damaged-epoch-00000000000000000003.kc")),
	      "the damaged epoch is gone");
	restore_and_compare(path_of("store"), 6, &g);
	sim_free(&g);
}

/* --- Directories that change while they are read -------------------------- */

#define FIRST 11u
#define LAST 45u

static char *epoch_path(const char *where, unsigned int nr)
{
	char name[64];

	snprintf(name, sizeof(name), "%s/epoch-%020u.kc", where, nr);
	return path_of(name);
}

/* By rename, as a merger does. */
static void put_epoch(const char *from, unsigned int nr)
{
	const char *tmp = path_of("store/merge.tmp");
	uint8_t *buf;
	size_t len;
	int fd;

	read_all(epoch_path(from, nr), &buf, &len);
	fd = open(tmp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	CHECK(write(fd, buf, len) == (ssize_t)len && !close(fd) &&
		      !rename(tmp, epoch_path("store", nr)),
	      "cannot write");
	free(buf);
}

/* Whoever opens the epoch waits until this is closed. */
static int gate(unsigned int nr)
{
	int fd = open(epoch_path("store", nr), O_RDONLY | O_CLOEXEC);

	CHECK(fd >= 0, "no epoch %u", nr);
	if (fcntl(fd, F_SETLEASE, F_WRLCK))
		SKIP("no leases on files here: %s", strerror(errno));
	return fd;
}

/*
 * The exit status of the program, in whose way the directory comes: when it has listed all and
 * looks at epoch @at, the newest ones first, what is older than epoch @merge is merged into that
 * one, or epoch @lose is gone; so often, each time one epoch later.
 */
static int run_changing(const char *const *argv, unsigned int at, unsigned int merge,
			unsigned int lose, unsigned int times)
{
	unsigned int i, oldest = FIRST;
	int fd, next, status;
	pid_t pid;

	remove_tree(path_of("store"));
	CHECK(!mkdir(path_of("store"), 0700), "cannot make a directory");
	for (i = FIRST; i <= LAST; i++)
		put_epoch(i == FIRST ? "full" : "increments", i);
	unlink(path_of("log"));
	signal(SIGIO, SIG_IGN);
	fd = gate(at);
	pid = spawn(argv, 0);
	while (times--) {
		while (fcntl(fd, F_GETLEASE) == F_WRLCK) {
			if (waitpid(pid, &status, WNOHANG) == pid)
				FAIL("it ended with %d before the directory changed", status);
			poll(NULL, 0, 1);
		}
		if (lose)
			CHECK(!unlink(epoch_path("store", lose)), "cannot remove epoch %u", lose);
		else
			put_epoch("full", merge);
		for (i = merge; i-- > oldest; )
			CHECK(!unlink(epoch_path("store", i)), "cannot remove epoch %u", i);
		oldest = merge > oldest ? merge : oldest;
		merge++;
		next = times ? gate(++at) : -1;
		close(fd);
		fd = next;
	}
	return reap(&pid);
}

static void test_changing_directory(void)
{
	char *store = strdup(path_of("store")), *restored = strdup(path_of("restored"));
	const char *verify[] = { program, "verify", store, NULL };
	const char *restore[] = { program, "restore", "--ram-dir", restored, store, NULL };
	const char *restore_nr[] = { program, "restore", "--epoch", "20", "--ram-dir", restored,
				     store, NULL };
	struct sim g;
	struct kc_sink *full, *increments;
	unsigned int i;
	char text[80];

	blocks[0].npages = 40;
	blocks[1].npages = 6;
	opts.keep = 1000;
	sim_init(&g);
	full = must_open(path_of("full"));
	increments = must_open(path_of("increments"));
	for (sim_goto(&g, FIRST); g.epoch <= LAST; sim_step(&g)) {
		OK(sim_send(&g, full, KC_EPOCH_FULL));
		OK(sim_send(&g, increments, g.epoch == FIRST ? KC_EPOCH_FULL : 0));
	}
	kc_sink_close(full);
	kc_sink_close(increments);

	/* Gone before it is opened; or already when the list is made, but not what needs it. */
	for (i = 0; i < 2; i++) {
		unsigned int at = i ? 14 : 11, merge = i ? 14 : 12;

		CHECK(!run_changing(verify, at, merge, 0, 1), "verify finds something");
		CHECK(log_has("looking again") && !log_has("is lost"), "nothing changed");
		snprintf(text, sizeof(text), "%u epochs, 0 of them lost; last sound epoch %u",
			 LAST - merge + 1, LAST);
		CHECK(log_has(text), "it does not say \"%s\"", text);
		remove_tree(restored);
		CHECK(!run_changing(restore, at, merge, 0, 1), "nothing is restored");
		CHECK(log_has("looking again"), "nothing changed");
		sim_goto(&g, LAST);
		compare(&g, restored, "state");
		remove_tree(restored);
		restore_nr[3] = "20";
		CHECK(!run_changing(restore_nr, at, merge, 0, 1), "epoch 20 is not restored");
		sim_goto(&g, 20);
		compare(&g, restored, "state");
		remove_tree(restored);
		restore_nr[3] = "11";
		CHECK(run_changing(restore_nr, at, merge, 0, 1) == 1, "what is gone is restored");
		CHECK(log_has("has no epoch 11"), "it does not say why");
	}

	/* What is gone without a merge is lost, and all that needs it. */
	CHECK(run_changing(verify, FIRST, 0, 12, 1) == 1, "verify finds nothing");
	CHECK(log_has("looking again") &&
		      log_has("epoch 13 needs epoch 12, whose file is missing") &&
		      log_has("last sound epoch 11\n"),
	      "it does not say what is missing");
	CHECK(run("verify", store, NULL) == 1, "verify finds nothing");
	unlink(path_of("log"));
	CHECK(run("restore", "--epoch", "20", "--ram-dir", restored, store, NULL) == 1 &&
		      log_has("epoch 20 needs epoch 12, whose file is missing"),
	      "it does not say what is missing");
	CHECK(!run_changing(restore, FIRST, 0, 12, 1), "nothing is restored");
	sim_goto(&g, FIRST);
	compare(&g, restored, "state");

	/* For ever. */
	CHECK(run_changing(verify, FIRST, FIRST + 1, 0, 30) == 1, "it never gives up");
	CHECK(log_has("changes too quickly") && !log_has("is lost"), "it does not say why");
	remove_tree(restored);
	CHECK(run_changing(restore, FIRST, FIRST + 1, 0, 30) == 1, "it never gives up");
	CHECK(log_has("changes too quickly") && !exists(path_of("restored/ram0")),
	      "it does not say why");
	CHECK(!run_changing(verify, FIRST, FIRST + 1, 0, 29), "it gives up too early");
	free(store);
	free(restored);
	sim_free(&g);
}

/*
 * The same with a writer that merges all the time.  It is not as fast as it can be: a machine that
 * is busy might let it merge during each of the looks.
 */
static void test_read_while_merged(void)
{
	volatile uint64_t *n = shared_numbers();
	unsigned int round, again = 0;
	struct kc_store st;
	pid_t primary;
	struct sim g;
	uint8_t *log;
	size_t len;
	char *at;

	n[3] = 2;
	opts.keep = 2;
	sim_init(&g);
	primary = start_primary(path_of("store"), 0, n, false);
	for (round = 0; round < 30; round++) {
		let_run(1, n, 20);
		unlink(path_of("log"));
		CHECK(!run("verify", path_of("store"), NULL), "verify finds something");
		remove_tree(path_of("restored"));
		CHECK(!run("restore", "--ram-dir", path_of("restored"), path_of("store"), NULL),
		      "nothing is restored");
		read_all(path_of("log"), &log, &len);
		log[len] = '\0';
		CHECK(!strstr((char *)log, "is lost") && !strstr((char *)log, "warning"),
		      "something was lost");
		again += !!strstr((char *)log, "looking again");
		at = strstr((char *)log, "\nepoch ");
		CHECK(at, "it does not say which epoch it is");
		sim_goto(&g, strtoull(at + 7, NULL, 10));
		compare(&g, path_of("restored"), "state");
		free(log);
	}
	kill(primary, SIGKILL);
	CHECK(reap(&primary) == -SIGKILL, "the writer ended by itself");
	OK(kc_store_read(path_of("store"), &st, &err));
	CHECK(st.nr_files && st.files[0].nr > 1, "nothing was merged");
	kc_store_free(&st);
	printf("# %u rounds, %" PRIu64 " epochs, looked again in %u\n", round, n[0], again);
	sim_free(&g);
}

/* --- Full disks ----------------------------------------------------------- */

static void fill_directory(const char *store)
{
	struct kc_sink *s;
	uint64_t last;
	struct sim g;
	int rc = 0;

	sim_init(&g);
	s = must_open(store);
	opts.keep = 1000;
	for (last = 0; !rc && last < 5000; last = rc ? last : g.epoch) {
		sim_step(&g);
		rc = sim_send(&g, s, g.epoch == 1 ? KC_EPOCH_FULL : 0);
	}
	CHECK(rc == -ENOSPC || rc == -EFBIG, "%d: %s", rc, err.text);
	CHECK(strstr(err.text, "cannot write to"), "it says \"%s\"", err.text);
	CHECK(kc_sink_last_epoch(s) == last, "the last epoch is wrong");
	CHECK(kc_epoch_begin(s, g.epoch + 1, 0, &err) == -EINVAL, "the broken sink is used on");
	kc_sink_close(s);
	printf("# full after %" PRIu64 " epochs\n", last);
	CHECK(!run("verify", store, NULL), "verify finds something");
	restore_and_compare(store, last, &g);
	sim_free(&g);
}

static void mount_small(void)
{
	if (mkdir(path_of("full"), 0700) || unshare(CLONE_NEWNS) ||
	    mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("none", path_of("full"), "tmpfs", 0, "size=6m"))
		SKIP("cannot mount a small tmpfs: %s", strerror(errno));
}

static void test_full_directory(void)
{
	struct stat st;

	mount_small();
	fill_directory(path_of("full/store"));
	CHECK(!stat(path_of("full/store"), &st), "it is gone");
	umount(path_of("full"));
}

/* Up to the last byte. */
static void write_junk(const char *path)
{
	static const char junk[4096] = "junk";
	int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);

	CHECK(fd >= 0, "cannot make %s: %s", path, strerror(errno));
	while (write(fd, junk, sizeof(junk)) > 0)
		;
	CHECK(errno == ENOSPC, "%s", strerror(errno));
	close(fd);
}

/* A standby that has room for RAM, but not for an epoch with all of it. */
static void test_full_standby(void)
{
	struct kc_sink *s;
	struct sim g;
	unsigned int i;
	int rc;

	start_standby_fsize(path_of("ram"), blocks[0].npages * KC_PAGE_SIZE, "--no-fence",
			    "--timeout", "0", NULL);
	sim_init(&g);
	s = must_open(spec());
	for (i = 0; i < 5; i++) {
		sim_step(&g);
		OK(sim_send(&g, s, i ? 0 : KC_EPOCH_FULL));
	}
	OK(kc_sink_wait(s, 5, 10000, &err));
	/* Each page of it differs, so it needs more than RAM has. */
	OK(kc_epoch_begin(s, 6, KC_EPOCH_FULL, &err));
	for (i = 0, rc = 0; i < 3 * blocks[0].npages && !rc; i++) {
		uint64_t junk[KC_PAGE_SIZE / 8];
		unsigned int j;

		for (j = 0; j < KC_PAGE_SIZE / 8; j++)
			junk[j] = rnd(&rng_state);
		rc = kc_epoch_page(s, 0, i % blocks[0].npages, junk, &err);
	}
	while (!rc)
		rc = kc_sink_poll(s, NULL, &err);
	CHECK(rc == -ENOSPC, "%d: %s", rc, err.text);
	kc_sink_close(s);
	compare_standby(&g, path_of("ram"));
	/* It still serves. */
	s = must_open(spec());
	CHECK(kc_sink_last_epoch(s) == 5, "the last epoch is %" PRIu64, kc_sink_last_epoch(s));
	sim_goto(&g, 8);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, 8, 10000, &err));
	compare_standby(&g, path_of("ram"));
	kc_sink_close(s);
	stop_standby(SIGTERM);
	/* No room for the RAM itself. */
	start_standby_fsize(path_of("ram2"), 1 << 20, "--no-fence", "--timeout", "0", NULL);
	must_refuse(spec(), &opts, &guest, ENOSPC, "cannot allocate");
	CHECK(!exists(path_of("ram2/ram0")), "half of the RAM was left there");
	sim_free(&g);
}

/* --- Refusals ------------------------------------------------------------- */

static void test_security(void)
{
	struct kc_sink_opts o = opts;

	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	o.psk_file = other_psk;
	must_refuse(spec(), &o, &guest, EACCES, "same identity and key");
	o.psk_file = path_of("nobody.psk");
	write_text(o.psk_file, 0600, "nobody:00112233445566778899aabbccddeeff\n");
	must_refuse(spec(), &o, &guest, EACCES, "same identity and key");
	o.psk_file = path_of("open.psk");
	write_text(o.psk_file, 0644, "kvm:00112233445566778899aabbccddeeff\n");
	must_refuse(spec(), &o, &guest, EACCES, "can be read by others");
	o.psk_file = path_of("bad.psk");
	write_text(o.psk_file, 0600, "kvm:0011\n");
	must_refuse(spec(), &o, &guest, EINVAL, "IDENTITY:HEX");
	o.psk_file = path_of("none.psk");
	must_refuse(spec(), &o, &guest, ENOENT, "cannot read");
	o.psk_file = NULL;
	must_refuse(spec(), &o, &guest, EINVAL, "no key");
	o.insecure = true;
	must_refuse("tcp:192.0.2.1:9", &o, &guest, EINVAL, "only for loopback");
	/* In plain text to one that wants TLS. */
	o.connect_timeout_ms = 500;
	{
		struct kc_sink *s = kc_sink_open(spec(), &o, &guest, &err);

		CHECK(!s, "a standby with keys takes a plain connection");
	}
	o = opts;
	must_refuse("tcp:nowhere", &o, &guest, EINVAL, "not HOST:PORT");
	must_refuse("", &o, &guest, EINVAL, "neither");
	/* And it still works with the right key. */
	kc_sink_close(must_open(spec()));
	CHECK(run("standby", "--listen", "0.0.0.0:0", "--insecure", "--no-fence", "--ram-dir",
		  path_of("ram2"), NULL) == 1,
	      "--insecure listens to the world");
	CHECK(run("standby", "--listen", "127.0.0.1:0", "--no-fence", "--ram-dir", path_of("ram2"),
		  NULL) == 1,
	      "it listens without keys");
	CHECK(run("standby", "--listen", "127.0.0.1:0", "--insecure", NULL) == 2,
	      "neither fence nor --no-fence");
	CHECK(run("standby", "--bogus", NULL) == 2, "an unknown option");
	CHECK(run("bogus", NULL) == 2, "an unknown command");
}

static void test_two_primaries(void)
{
	volatile uint64_t *n = shared_numbers();
	pid_t first, second;
	struct kc_sink *s;
	uint64_t before;

	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	first = start_primary(spec(), 0, n, false);
	while (n[0] < 3)
		poll(NULL, 0, 1);
	must_refuse(spec(), &opts, &guest, EBUSY, "another primary is connected");
	before = n[0];
	while (n[0] < before + 5)
		CHECK(!waitpid(first, NULL, WNOHANG), "the first primary was thrown out");
	kill(first, SIGKILL);
	reap(&first);
	/* The same process again replaces a link of its own that is not known to be broken. */
	s = must_open(spec());
	kc_sink_close(must_open(spec()));
	kc_sink_close(s);
	/* A directory has a lock. */
	n[0] = 0;
	second = start_primary(path_of("store"), 0, n, false);
	while (n[0] < 2)
		poll(NULL, 0, 1);
	must_refuse(path_of("store"), &opts, &guest, EBUSY, "another kvm-checkpoint");
	kill(second, SIGKILL);
	reap(&second);
	CHECK(run("standby", "--listen", "127.0.0.1:0", "--no-fence", "--psk-file", psk,
		  "--ram-dir", path_of("ram"), NULL) == 1,
	      "two standbys in one directory");
}

static void refuse_others(const char *to)
{
	struct kc_block b[3] = { blocks[0], blocks[1], { "third", 1 } };
	struct kc_guest g = guest;
	struct kc_sink *s;
	struct sim sim;

	sim_init(&sim);
	sim_step(&sim);
	s = must_open(to);
	OK(sim_send(&sim, s, KC_EPOCH_FULL));
	OK(kc_sink_wait(s, 1, 10000, &err));
	kc_sink_close(s);
	sim_free(&sim);

	g.blocks = b;
	g.uuid[15] = 7;
	must_refuse(to, &opts, &g, EEXIST, "holds guest");
	g = guest;
	g.blocks = b;
	b[0].npages++;
	must_refuse(to, &opts, &g, EEXIST, "KiB of RAM");
	b[0].npages--;
	g.nr_blocks = 3;
	must_refuse(to, &opts, &g, EEXIST, "blocks of RAM");
	g.nr_blocks = 2;
	g.fingerprint[0]++;
	must_refuse(to, &opts, &g, EEXIST, "machine type");
	g = guest;
	strcpy(g.name, "another name is no matter");
	s = kc_sink_open(to, &opts, &g, &err);
	CHECK(s && kc_sink_last_epoch(s) == 1, "a new name is refused: %s", err.text);
	kc_sink_close(s);
	g.page_size = 65536;
	must_refuse(to, &opts, &g, EINVAL, "pages of 65536 bytes");
}

/* Bytes to a standby without TLS, and the text of its answer. */
static void raw(const uint8_t *bytes, size_t len, char *text, size_t size)
{
	struct sockaddr_in sa = { .sin_family = AF_INET, .sin_port = htons(port),
				  .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct timeval tv = { .tv_sec = 10 };
	uint8_t buf[1024];
	struct kc_rec rec;
	size_t have = 0;
	uint32_t code;
	ssize_t n;

	CHECK(!connect(fd, (struct sockaddr *)&sa, sizeof(sa)), "cannot connect");
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv));
	CHECK(write(fd, bytes, len) == (ssize_t)len, "cannot write");
	while ((n = read(fd, buf + have, sizeof(buf) - have)) > 0)
		have += n;
	close(fd);
	*text = '\0';
	if (kc_get_rec(buf, have, &rec, &err) > 0 && rec.type == KC_ERROR)
		kc_get_error(&rec, &code, text, size);
}

static void test_wrong_guest(void)
{
	uint8_t hello[KC_REC_HDR + KC_REC_MAX], id[16] = { 3 };
	char text[400];
	size_t n;

	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	refuse_others(spec());
	stop_standby(SIGTERM);
	refuse_others(path_of("store"));

	/* Of another version, and no kvm-checkpoint at all. */
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	n = kc_put_hello(hello, &guest, id);
	hello[KC_REC_HDR + 8] = hello[KC_REC_HDR + 10] = 9;
	raw(hello, n, text, sizeof(text));
	CHECK(strstr(text, "versions 9 to 9"), "it says \"%s\"", text);
	raw((const uint8_t *)"GET / HTTP/1.0\r\n\r\n", 18, text, sizeof(text));
	CHECK(strstr(text, "no kvm-checkpoint"), "it says \"%s\"", text);
	hello[KC_REC_HDR + 8] = hello[KC_REC_HDR + 10] = KC_VERSION;
	hello[KC_REC_HDR] ^= 1;
	raw(hello, n, text, sizeof(text));
	CHECK(strstr(text, "no stream of kvm-checkpoint"), "it says \"%s\"", text);
}

/* --- Slow and silent peers ------------------------------------------------ */

static void test_silent_peers(void)
{
	struct sockaddr_in sa = { .sin_family = AF_INET,
				  .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	struct kc_sink_opts o = opts;
	socklen_t sl = sizeof(sa);
	uint64_t t = kc_now_us();
	struct kc_sink *s;
	char to[64];
	struct sim g;
	int fd, rc;

	/* One that accepts and says nothing. */
	fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	CHECK(!bind(fd, (struct sockaddr *)&sa, sl) && !listen(fd, 5) &&
	      !getsockname(fd, (struct sockaddr *)&sa, &sl), "cannot listen");
	snprintf(to, sizeof(to), "tcp:127.0.0.1:%d", ntohs(sa.sin_port));
	o.connect_timeout_ms = 300;
	must_refuse(to, &o, &guest, ETIMEDOUT, "TLS handshake");
	o.insecure = true;
	must_refuse(to, &o, &guest, ETIMEDOUT, "silent");
	close(fd);
	o = opts;
	must_refuse(to, &o, &guest, ECONNREFUSED, "cannot connect");
	CHECK(kc_now_us() - t < 60000000, "that took too long");

	/* A standby that hangs: noticed when idle, and when its buffers are full. */
	o.io_timeout_ms = 400;
	start_standby(path_of("ram"), "--no-fence", "--timeout", "400ms", "--io-timeout", "2s");
	sim_init(&g);
	sim_step(&g);
	s = kc_sink_open(spec(), &o, &guest, &err);
	CHECK(s, "%s", err.text);
	OK(sim_send(&g, s, KC_EPOCH_FULL));
	OK(kc_sink_wait(s, 1, 10000, &err));
	CHECK(kc_sink_wait(s, 2, 100, &err) == -ETIMEDOUT,
	      "an epoch that was not sent is acknowledged");
	kill(standby, SIGSTOP);
	for (rc = 0; !rc; poll(NULL, 0, 10))
		rc = kc_sink_poll(s, NULL, &err);
	CHECK(rc == -ETIMEDOUT && strstr(err.text, "not answered"), "%d: %s", rc, err.text);
	kc_sink_close(s);
	kill(standby, SIGCONT);
	/* It was stopped for longer than its timeout, but it is not the primary who was silent. */
	for (s = NULL; !s; poll(NULL, 0, 10)) {
		s = kc_sink_open(spec(), &o, &guest, &err);
		CHECK(s || kc_sink_is_temporary(errno), "%s", err.text);
	}
	CHECK(kc_sink_last_epoch(s) == 1, "epoch 1 is lost");
	kill(standby, SIGSTOP);
	for (rc = 0; !rc;) {
		sim_step(&g);
		rc = sim_send(&g, s, KC_EPOCH_FULL);
	}
	CHECK(rc == -ETIMEDOUT && strstr(err.text, "taken no data"), "%d: %s", rc, err.text);
	kc_sink_close(s);
	kill(standby, SIGCONT);
	sim_free(&g);
}

/* --- Failing over --------------------------------------------------------- */

/* An epoch is there, the primary is connected. */
static struct kc_sink *protected_guest(struct sim *g)
{
	struct kc_sink *s = must_open(spec());

	sim_init(g);
	sim_step(g);
	OK(sim_send(g, s, kc_sink_start(s)));
	sim_step(g);
	OK(sim_send(g, s, 0));
	OK(kc_sink_wait(s, g->epoch, 10000, &err));
	return s;
}

static void test_failover(void)
{
	char fence[PATH_MAX], fence_text[2 * PATH_MAX], qemu[PATH_MAX], text[4 * PATH_MAX],
		want[PATH_MAX + 200];
	struct kc_sink *s;
	struct sim g;
	uint8_t *buf;
	size_t len;
	char *ans;

	/*
	 * The fence fails until it may not; QEMU says what it was called with, and that it was
	 * fenced.
	 */
	snprintf(fence_text, sizeof(fence_text),
		 "#!/bin/sh\n[ \"$1\" = 'a b' ] || exit 9\necho x >>%s/fences\n[ -e %s/may ] || exit 1\n>%s/fenced\n",
		 dir, dir, dir);
	snprintf(fence, sizeof(fence), "%s 'a b'", script("fence", fence_text));
	snprintf(text, sizeof(text),
		 "#!/bin/sh\n[ -e %s/fenced ] || exit 9\ncp %s/ram/ram0 %s/ram/ram1 \"$3\" %s/took/\nprintf '%%s|' \"$@\" >%s/args.tmp\nmv %s/args.tmp %s/args\n",
		 dir, dir, dir, dir, dir, dir, dir);
	snprintf(qemu, sizeof(qemu), "%s", script("qemu", text));
	CHECK(!mkdir(path_of("took"), 0700), "mkdir");
	start_standby(path_of("ram"), "--fence", fence, "--timeout", "500ms", "--bare-exec", "--",
		      qemu, "m={ram0},n={ram:/objects/ram1}", "$(touch x);{epoch},{size1}",
		      "{state}");
	s = protected_guest(&g);
	/* As long as there are heartbeats, nothing happens. */
	for (len = 0; len < 100; len++) {
		OK(kc_sink_poll(s, NULL, &err));
		poll(NULL, 0, 10);
	}
	CHECK(!exists(path_of("fences")), "fenced although the primary lives");
	kc_sink_close(s);
	CHECK(wait_for(path_of("fences"), 20000), "the fence did not run");
	wait_log("could not fail over");
	CHECK(!exists(path_of("args")), "QEMU was started although the fence failed");
	/* The primary was not dead after all. */
	s = must_open(spec());
	sim_step(&g);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, 3, 10000, &err));
	write_text(path_of("may"), 0600, "");
	kc_sink_close(s);
	CHECK(wait_for(path_of("args"), 20000), "QEMU was not started");
	CHECK(reap(&standby) == 0, "the standby failed");
	read_all(path_of("args"), &buf, &len);
	buf[len] = '\0';
	snprintf(want, sizeof(want), "m=%s/ram/ram0,n=%s/ram/ram1|$(touch x);3,%u|%s/ram/state-3|",
		 dir, dir, (unsigned int)blocks[1].npages * KC_PAGE_SIZE, dir);
	CHECK(!strcmp((char *)buf, want), "QEMU was called with \"%s\", not \"%s\"", buf, want);
	free(buf);
	compare(&g, path_of("took"), "state-3");
	/* These files are QEMU's now. */
	CHECK(run("standby", "--listen", "127.0.0.1:0", "--no-fence", "--psk-file", psk,
		  "--ram-dir", path_of("ram"), NULL) == 1,
	      "files that were given away are used again");
	CHECK(kc_ctl_request(path_of("ctl"), "status", &ans, &err), "it left its socket");
	sim_free(&g);
}

static void test_failover_reasons(void)
{
	struct kc_sink *s;
	struct sim g;
	char *ans;

	/* Detached: never, not even after a restart. */
	start_standby(path_of("ram"), "--no-fence", "--timeout", "300ms");
	s = protected_guest(&g);
	kc_sink_end(s, KC_END_DETACH);
	kc_sink_close(s);
	wait_log("ends the protection");
	poll(NULL, 0, 700);
	stop_standby(SIGKILL);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "300ms");
	poll(NULL, 0, 700);
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"),
	      "failed over after a detach");
	/* Nor when a primary came again and was lost before it had brought anything new. */
	s = must_open(spec());
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	kc_sink_close(must_open(spec()));
	poll(NULL, 0, 700);
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"),
	      "failed over to an old epoch");
	sim_free(&g);
	/* The guest died: at once, however long the timeout. */
	stop_standby(SIGTERM);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "1m");
	s = must_open(spec());
	sim_init(&g);
	sim_goto(&g, 5);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, 5, 10000, &err));
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	CHECK(reap(&standby) == 0 && log_has("taken over at epoch 5"), "did not fail over");
	compare_standby(&g, path_of("ram"));
	/* Told to; but not without an epoch. */
	remove_tree(path_of("ram"));
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	CHECK(kc_ctl_request(path_of("ctl"), "promote", &ans, &err) == -EREMOTEIO,
	      "promoted without an epoch");
	CHECK(kc_ctl_request(path_of("ctl"), "bogus", &ans, &err) == -EREMOTEIO,
	      "took a bogus command");
	s = protected_guest(&g);
	CHECK(!run("status", path_of("ctl"), "promote", NULL), "promote failed");
	CHECK(reap(&standby) == 0 && log_has("told to"), "did not fail over");
	CHECK(log_has("ram pc.ram 2867200 /") && log_has("state-2"),
	      "does not say where the checkpoint is");
	compare_standby(&g, path_of("ram"));
	CHECK(kc_sink_poll(s, NULL, &err) < 0, "the primary does not notice");
	kc_sink_close(s);
	sim_free(&g);
	/* A restart of the standby while the primary is dead. */
	remove_tree(path_of("ram"));
	start_standby(path_of("ram"), "--no-fence", "--timeout", "300ms");
	s = protected_guest(&g);
	stop_standby(SIGKILL);
	kc_sink_close(s);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "300ms");
	CHECK(reap(&standby) == 0 && log_has("taken over at epoch 2"), "did not fail over");
	CHECK(log_has("\nstopped\n"), "forgot that the guest was stopped");
	/* A fence that hangs is killed and has failed. */
	remove_tree(path_of("ram"));
	start_standby(path_of("ram"), "--fence", "sleep 100", "--fence-timeout", "200ms",
		      "--timeout", "300ms");
	sim_free(&g);
	s = protected_guest(&g);
	kc_sink_close(s);
	wait_log("did not end within 200 ms");
	CHECK(!log_has("taken over"), "took over without a fence");
	sim_free(&g);
}

/* What failed is tried again: by itself if the guest is dead, and nothing is given away before. */
static void test_failover_again(void)
{
	char fence[PATH_MAX], text[2 * PATH_MAX];
	struct kc_sink *s;
	struct sim g;

	/* However long the timeout, as it will be silent for ever. */
	snprintf(text, sizeof(text), "#!/bin/sh\n[ -e %s/tried ]; rc=$?\n>%s/tried\nexit $rc\n", dir,
		 dir);
	snprintf(fence, sizeof(fence), "%s", script("fence", text));
	start_standby(path_of("ram"), "--fence", fence, "--timeout", "0");
	s = protected_guest(&g);
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	wait_log("could not fail over");
	CHECK(reap(&standby) == 0 && log_has("taken over at epoch 2"), "did not try again");
	sim_free(&g);

	/* A command that cannot be started has not got the files. */
	remove_tree(path_of("ram"));
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--bare-exec", "--",
		      path_of("nothing"), "{state}");
	s = protected_guest(&g);
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	wait_log("could not fail over");
	CHECK(!waitpid(standby, NULL, WNOHANG), "it gave up");
	s = must_open(spec());
	CHECK(kc_sink_last_epoch(s) == 2, "the epoch is lost");
	sim_step(&g);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, 3, 10000, &err));
	kc_sink_close(s);
	stop_standby(SIGTERM);
	sim_free(&g);
}

/* Others fill the file system of a standby: what it has to remember is little, and counts. */
static void test_full_ram_dir(void)
{
	struct kc_sink *s;
	struct sim g;

	mount_small();
	start_standby(path_of("full/ram"), "--no-fence", "--timeout", "300ms");
	s = protected_guest(&g);
	write_junk(path_of("full/junk"));
	kc_sink_end(s, KC_END_DETACH);
	kc_sink_close(s);
	wait_log("ends the protection: detached");
	poll(NULL, 0, 1000);
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"),
	      "failed over after a detach");
	stop_standby(SIGKILL);
	start_standby(path_of("full/ram"), "--no-fence", "--timeout", "300ms");
	poll(NULL, 0, 1000);
	CHECK(!waitpid(standby, NULL, WNOHANG) && !log_has("failing over"),
	      "failed over after a detach and a restart");
	unlink(path_of("full/junk"));
	s = must_open(spec());
	sim_step(&g);
	OK(sim_send(&g, s, kc_sink_start(s)));
	OK(kc_sink_wait(s, 3, 10000, &err));
	write_junk(path_of("full/junk"));
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	CHECK(reap(&standby) == 0 && log_has("taken over at epoch 3"), "did not fail over");
	/* Which it has stored. */
	CHECK(run("standby", "--listen", "127.0.0.1:0", "--no-fence", "--psk-file", psk,
		  "--ram-dir", path_of("full/ram"), NULL) == 1 && log_has("was taken over"),
	      "files that were given away are used again");
	umount(path_of("full"));
	sim_free(&g);
}

/* meta as if it had been written before this host was booted. */
static void other_boot(const char *ram)
{
	char path[PATH_MAX], id[37] = "", *at;
	int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
	uint64_t xxh;
	uint8_t *buf;
	size_t len;

	CHECK(fd >= 0 && read(fd, id, 36) == 36, "no boot ID");
	close(fd);
	snprintf(path, sizeof(path), "%s/meta", ram);
	read_all(path, &buf, &len);
	at = memmem(buf, len, id, 36);
	CHECK(at, "the boot ID is not in meta");
	*at ^= 1;
	xxh = XXH3_64bits(buf, len - sizeof(xxh));
	memcpy(buf + len - sizeof(xxh), &xxh, sizeof(xxh));
	fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);
	CHECK(fd >= 0 && write(fd, buf, len) == (ssize_t)len, "cannot write %s", path);
	close(fd);
	free(buf);
}

/* A standby has an epoch, is killed, and its host boots; what counts of it then? */
static uint64_t after_boot(struct sim *g, const char *first, const char *second, const char *third)
{
	struct kc_sink *s;
	uint64_t last;

	remove_tree(path_of("ram"));
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", first);
	s = protected_guest(g);
	kc_sink_close(s);
	stop_standby(SIGKILL);
	if (second) {
		start_standby(path_of("ram"), "--no-fence", "--timeout", "0", second);
		stop_standby(SIGKILL);
	}
	other_boot(path_of("ram"));
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", third);
	s = must_open(spec());
	last = kc_sink_last_epoch(s);
	if (last)
		compare_standby(g, path_of("ram"));
	/* In any case its pages are of use. */
	CHECK(kc_sink_start(s) == KC_EPOCH_RESYNC, "all pages would be sent");
	kc_sink_close(s);
	stop_standby(SIGTERM);
	sim_free(g);
	return last;
}

static void test_reboot(void)
{
	static const char * const durable = "--durable", * const not = "--json";
	struct sim g;

	CHECK(after_boot(&g, durable, NULL, durable) == 2, "a durable epoch is lost");
	CHECK(after_boot(&g, durable, NULL, not) == 2, "a durable epoch is lost without --durable");
	CHECK(after_boot(&g, not, NULL, not) == 0, "what was not forced to the disk is trusted");
	CHECK(after_boot(&g, not, NULL, durable) == 0,
	      "what was not forced to the disk is trusted with --durable");
	CHECK(after_boot(&g, durable, not, durable) == 0,
	      "what may have been changed without --durable is trusted");
}

/* What others may write to is no place for a guest's memory. */
static void test_foreign_directory(void)
{
	if (geteuid())
		SKIP("only root can give a directory away");
	CHECK(!mkdir(path_of("theirs"), 0700) && !chown(path_of("theirs"), 12345, 12345), "chown");
	CHECK(run("standby", "--listen", "127.0.0.1:0", "--no-fence", "--psk-file", psk,
		  "--ram-dir", path_of("theirs"), NULL) == 1,
	      "took a directory of somebody else for RAM");
	CHECK(!exists(path_of("theirs/meta")), "wrote to it");
	CHECK(!mkdir(path_of("open"), 0700) && !chmod(path_of("open"), 0777), "chmod");
	CHECK(run("standby", "--listen", "127.0.0.1:0", "--no-fence", "--psk-file", psk,
		  "--ram-dir", path_of("open"), NULL) == 1,
	      "took a directory for RAM that all may write to");
}

/* --- With a real QEMU, which emulates ------------------------------------- */

static int qmp_connect(const char *path)
{
	struct kc_ctl *unused = NULL;
	char cmd[64];
	int fd, i;

	(void)unused;
	(void)cmd;
	for (i = 0; i < 1000; i++) {
		struct sockaddr_storage ss = { .ss_family = AF_UNIX };

		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		strcpy((char *)&ss + 2, path);
		if (!connect(fd, (struct sockaddr *)&ss, 2 + strlen(path) + 1))
			return fd;
		close(fd);
		poll(NULL, 0, 20);
	}
	FAIL("QEMU does not come up");
}

/* Send a line, wait for a line with @want. */
static void qmp(int fd, const char *line, const char *want)
{
	uint64_t end = kc_now_us() + 30000000;
	static char buf[65536];
	size_t n = 0;
	ssize_t r;

	if (line)
		CHECK(write(fd, line, strlen(line)) == (ssize_t)strlen(line), "QEMU is gone");
	while (kc_now_us() < end && n < sizeof(buf) - 1) {
		struct pollfd p = { .fd = fd, .events = POLLIN };

		if (poll(&p, 1, 100) <= 0)
			continue;
		r = read(fd, buf + n, sizeof(buf) - 1 - n);
		CHECK(r > 0, "QEMU is gone");
		n += r;
		buf[n] = '\0';
		if (strstr(buf, want) && buf[n - 1] == '\n')
			return;
		CHECK(!strstr(buf, "\"error\""), "QEMU says %s", buf);
	}
	FAIL("QEMU does not say %s, but %s", want, buf);
}

/*
 * The guest's firmware runs; it is stopped, saved, sent, and goes on in another QEMU, or stands
 * still there if that is what the epoch says.
 */
static void qemu_takes_over(bool stopped)
{
	static struct kc_block one = { "ram0", 32 << 8 };
	struct kc_guest g = { .page_size = KC_PAGE_SIZE, .nr_blocks = 1, .blocks = &one };
	char mem[PATH_MAX + 100], sock[PATH_MAX + 100], line[PATH_MAX + 200], sock2[PATH_MAX + 100];
	const char *qemu = "/usr/bin/qemu-system-x86_64";
	const char *argv[] = { qemu,
			       "-accel",
			       "tcg",
			       "-m",
			       "32M",
			       "-machine",
			       "pc,memory-backend=ram0",
			       "-object",
			       mem,
			       "-nodefaults",
			       "-display",
			       "none",
			       "-vga",
			       "none",
			       "-qmp",
			       sock,
			       NULL };
	struct kc_sink *s;
	uint8_t *ram, *state;
	size_t len, state_len, i;
	pid_t primary;
	int fd;

	if (!exists(qemu))
		SKIP("there is no %s", qemu);
	snprintf(mem, sizeof(mem),
		 "memory-backend-file,id=ram0,size=32M,share=on,mem-path=%s/primary", dir);
	snprintf(sock, sizeof(sock), "unix:%s/qmp,server=on,wait=off", dir);
	primary = spawn(argv, 0);
	fd = qmp_connect(path_of("qmp"));
	qmp(fd, "{\"execute\":\"qmp_capabilities\"}\n", "return");
	qmp(fd,
	    "{\"execute\":\"migrate-set-capabilities\",\"arguments\":{\"capabilities\":[{\"capability\":\"x-ignore-shared\",\"state\":true}]}}\n",
	    "return");
	poll(NULL, 0, 500);
	qmp(fd, "{\"execute\":\"stop\"}\n", "return");
	snprintf(line, sizeof(line),
		 "{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"exec:cat >%s/saved\"}}\n", dir);
	qmp(fd, line, "return");
	for (i = 0; i < 500; i++) {
		poll(NULL, 0, 20);
		qmp(fd, "{\"execute\":\"query-migrate\"}\n", "status");
		if (exists(path_of("saved")) && i > 10)
			break;
	}
	read_all(path_of("primary"), &ram, &len);
	read_all(path_of("saved"), &state, &state_len);
	CHECK(len == 32 << 20 && state_len > 1000, "%zu bytes of RAM, %zu of state", len,
	      state_len);

	/* The standby starts a QEMU that is told the same, but for the memory and the monitor. */
	snprintf(sock2, sizeof(sock2), "unix:%s/qmp2,server=on,wait=off", dir);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--capability",
		      "x-ignore-shared", "--", qemu, "-accel", "tcg", "-m", "32M", "-machine",
		      "pc,memory-backend=ram0", "-object",
		      "memory-backend-file,id=ram0,size={size0},share=on,mem-path={ram:ram0}",
		      "-nodefaults", "-display", "none", "-vga", "none", "-qmp", sock2);
	s = kc_sink_open(spec(), &opts, &g, &err);
	CHECK(s, "%s", err.text);
	OK(kc_epoch_begin(s, 1, KC_EPOCH_FULL, &err));
	for (i = 0; i < len / KC_PAGE_SIZE; i++)
		OK(kc_epoch_page(s, 0, i, ram + i * KC_PAGE_SIZE, &err));
	OK(kc_epoch_state(s, state, state_len, stopped, &err));
	OK(kc_epoch_commit(s, &err));
	OK(kc_sink_wait(s, 1, 10000, &err));
	kill(primary, SIGKILL);
	reap(&primary);
	close(fd);
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	wait_log(stopped ? "stopped as it was" : "the guest runs here");
	fd = qmp_connect(path_of("qmp2"));
	qmp(fd, "{\"execute\":\"qmp_capabilities\"}\n", "return");
	qmp(fd, "{\"execute\":\"query-status\"}\n",
	    stopped ? "\"running\": false" : "\"running\": true");
	qmp(fd, "{\"execute\":\"quit\"}\n", "return");
	CHECK(reap(&standby) == 0, "the standby failed");
	close(fd);
	free(ram);
	free(state);
}

static void test_qemu(void)
{
	qemu_takes_over(false);
}

static void test_qemu_stopped(void)
{
	qemu_takes_over(true);
}

/* --- With something that speaks as QEMU does ------------------------------ */

/*
 * This program as the standby's QEMU: --be-qemu STATUS PID-FILE ...  Whatever it is told, it says
 * that it did it, and that the guest's status is this one once it was told to run it; "silent":
 * nothing any more.
 */
static int be_qemu(int argc, char **argv)
{
	const char *status = "paused", *prefix = "socket,id=kvm-checkpoint,fd=";
	char *line = NULL, pid[20];
	int fd = -1, i;
	size_t room = 0;
	FILE *f;

	/* If the test forgets it. */
	alarm(60);
	for (i = 4; i < argc; i++) {
		if (!strncmp(argv[i], prefix, strlen(prefix)))
			fd = atoi(argv[i] + strlen(prefix));
	}
	f = fdopen(fd, "r");
	if (!f)
		return 1;
	dprintf(fd, "{\"QMP\": {}}\n");
	while (getline(&line, &room, f) > 0) {
		if (strstr(line, "\"cont\"")) {
			snprintf(pid, sizeof(pid), "%d", getpid());
			write_text(argv[3], 0600, pid);
			status = argv[2];
		}
		if (!strcmp(status, "silent"))
			break;
		if (strstr(line, "\"query-status\""))
			dprintf(fd, "{\"return\": {\"status\": \"%s\"}}\n", status);
		else
			dprintf(fd, "{\"return\": {}}\n");
	}
	for (;;)
		pause();
}

static void nothing(int sig)
{
	(void)sig;
}

/*
 * The guest was given to QEMU, but does not run there: it is the only one by now.  It outlives the
 * standby, too, and what ends that by the keyboard.
 */
static void taken_over_by(const char *status, const char *why)
{
	char self[PATH_MAX] = "", *pid_file = strdup(path_of("qemu.pid"));
	struct kc_sink *s;
	struct sim g;
	uint8_t *buf;
	size_t len;
	pid_t pid;

	CHECK(readlink("/proc/self/exe", self, sizeof(self) - 1) > 0, "where is this program?");
	/* QEMU is to be found again when the standby is gone. */
	CHECK(!prctl(PR_SET_CHILD_SUBREAPER, 1), "cannot adopt");
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--load-timeout", "2s", "--",
		      self, "--be-qemu", status, pid_file);
	s = protected_guest(&g);
	/* It runs in this one. */
	sim_goto(&g, 6);
	OK(sim_send(&g, s, KC_EPOCH_RESYNC));
	OK(kc_sink_wait(s, 6, 10000, &err));
	kc_sink_end(s, KC_END_GUEST_DIED);
	kc_sink_close(s);
	wait_log("but the guest does not run");
	wait_log("taken over at epoch 6");
	CHECK(log_has(why), "it does not say why");
	read_all(pid_file, &buf, &len);
	buf[len] = '\0';
	pid = atoi((char *)buf);
	CHECK(pid > 1 && !kill(pid, 0), "QEMU was killed");
	CHECK(!waitpid(standby, NULL, WNOHANG), "the standby does not attend to QEMU");
	/* Ctrl-C, for all of the group. */
	signal(SIGINT, nothing);
	kill(0, SIGINT);
	CHECK(reap(&standby) == 0 && log_has("leaving QEMU"), "the standby does not end");
	CHECK(!waitpid(pid, NULL, WNOHANG), "QEMU ends with the standby");
	kill(pid, SIGKILL);
	CHECK(waitpid(pid, NULL, 0) == pid, "whose child is QEMU?");
	free(pid_file);
	free(buf);
	sim_free(&g);
}

static void test_io_error(void)
{
	taken_over_by("io-error", "its status is not");
}

static void test_silent_qemu(void)
{
	taken_over_by("silent", "does not answer in time");
}

/* --- The rest ------------------------------------------------------------- */

static void test_merging(void)
{
	struct kc_store st;
	struct kc_sink *s;
	struct sim g, check;
	uint64_t bytes = 0;
	unsigned int i;
	size_t f;

	opts.keep = 7;
	sim_init(&g);
	sim_init(&check);
	s = must_open(path_of("store"));
	for (i = 0; i < 150; i++) {
		sim_step(&g);
		OK(sim_send(&g, s, i ? 0 : KC_EPOCH_FULL));
	}
	kc_sink_close(s);
	/*
	 * Merging goes on beside it.  Closing waits for it, so that the next one begins with all
	 * there is.
	 */
	for (i = 0; i < 3; i++) {
		s = must_open(path_of("store"));
		sim_step(&g);
		OK(sim_send(&g, s, KC_EPOCH_RESYNC));
		kc_sink_close(s);
	}
	OK(kc_store_read(path_of("store"), &st, &err));
	CHECK(st.files[0].flags == KC_EPOCH_FULL && st.files[0].nr > 1, "nothing was merged");
	CHECK(st.nr_files >= opts.keep && st.nr_files < 100, "%zu epochs are left", st.nr_files);
	for (f = 0; f < st.nr_files; f++) {
		restore_and_compare(path_of("store"), st.files[f].nr, &check);
		bytes += st.files[f].bytes;
	}
	printf("# 153 epochs: %zu are left with %" PRIu64 " bytes\n", st.nr_files, bytes);
	kc_store_free(&st);
	CHECK(!run("list", path_of("store"), NULL) &&
		      !run("list", "--json", path_of("store"), NULL),
	      "list");
	CHECK(!run("verify", path_of("store"), NULL), "verify finds something");
	CHECK(run("list", path_of("nowhere"), NULL) == 1, "lists what is not there");
	CHECK(run("restore", "--epoch", "999", "--ram-dir", path_of("restored2"), path_of("store"),
		  NULL) == 1,
	      "restores what is not there");
	sim_free(&g);
	sim_free(&check);
}

static void test_status(void)
{
	const uint64_t us[KC_PAUSE_PARTS] = { 10, 200, 3000, 400, 50 };
	const uint64_t longest[KC_PAUSE_PARTS] = { 1000, 0, 0, 0, 0 };
	struct kc_sink_stats stats = {
		.epoch_sent = 3, .epoch_acked = 2, .pages = 100, .wire_bytes = 4096
	};
	struct kc_status *st = kc_status_new("protect", "a \"guest\"");
	struct json_object *o, *v, *w;
	struct kc_ctl *ctl;
	char *text, *p;
	unsigned int i;

	for (i = 0; i < 100; i++)
		kc_status_pause(st, us);
	kc_status_pause(st, longest);
	kc_status_epoch(st, 2, kc_now_us());
	kc_status_epoch(st, 3, kc_now_us());
	kc_status_sink(st, &stats);
	kc_status_sink(st, NULL);
	kc_status_sink(st, &stats);
	ctl = kc_ctl_start(path_of("ctl"), st, NULL, NULL, &err);
	CHECK(ctl, "%s", err.text);
	CHECK(!kc_ctl_start(path_of("ctl"), st, NULL, NULL, &err), "two daemons at one socket");
	OK(kc_ctl_request(path_of("ctl"), "status json", &text, &err));
	o = json_tokener_parse(text);
	CHECK(o, "no JSON: %s", text);
	CHECK(json_object_object_get_ex(o, "pages", &v) && json_object_get_int(v) == 200,
	      "pages: %s", text);
	CHECK(json_object_object_get_ex(o, "lag_s", &v) && json_object_get_double(v) >= 0,
	      "lag: %s", text);
	CHECK(json_object_object_get_ex(o, "pause", &v) &&
		      json_object_object_get_ex(v, "state", &w) &&
		      json_object_object_get_ex(w, "p50_us", &v),
	      "pause: %s", text);
	CHECK(json_object_get_int(v) >= 3000 && json_object_get_int(v) <= 3375, "p50 is %s",
	      json_object_get_string(v));
	json_object_put(o);
	free(text);
	OK(kc_ctl_request(path_of("ctl"), "status", &text, &err));
	CHECK(strstr(text, "harvest") && strstr(text, "acknowledged 2"), "text: %s", text);
	free(text);
	OK(kc_ctl_request(path_of("ctl"), "status prometheus", &text, &err));
	CHECK(strstr(text, "guest=\"a \\\"guest\\\"\"") &&
		      strstr(text, "kvm_checkpoint_pages_total 200\n"),
	      "prometheus: %s", text);
	/* Each line is a comment or a name, perhaps labels, and a number. */
	for (p = strtok(text, "\n"); p; p = strtok(NULL, "\n")) {
		char *end, *space = strrchr(p, ' ');

		if (*p == '#')
			continue;
		CHECK(space && !strncmp(p, "kvm_checkpoint_", 15), "line \"%s\"", p);
		strtod(space + 1, &end);
		CHECK(!*end, "line \"%s\"", p);
	}
	free(text);
	kc_ctl_stop(ctl);
	kc_status_free(st);
	CHECK(run("status", path_of("ctl"), NULL) == 1, "a daemon that is gone has a status");
}

/* A daemon that does not get round to its clients: neither is it waited for, nor replaced. */
static void test_full_queue(void)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	struct kc_status *st = kc_status_new("protect", "guest");
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), fd = -1, rc = 0;
	char *text;

	snprintf(sun.sun_path, sizeof(sun.sun_path), "%s/ctl", dir);
	CHECK(listener >= 0 && !bind(listener, (struct sockaddr *)&sun, sizeof(sun)) &&
	      !listen(listener, 1), "cannot listen on %s: %s", sun.sun_path, strerror(errno));
	while (!rc) {
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		CHECK(fd >= 0, "its queue is never full");
		rc = connect(fd, (struct sockaddr *)&sun, sizeof(sun));
	}
	CHECK(errno == EAGAIN, "cannot fill its queue: %s", strerror(errno));
	close(fd);
	rc = kc_ctl_request(sun.sun_path, "status", &text, &err);
	CHECK(rc == -ETIMEDOUT && strstr(err.text, "does not answer"), "%d: %s", rc, err.text);
	CHECK(!kc_ctl_start(sun.sun_path, st, NULL, NULL, &err), "two daemons at one socket");
	CHECK(strstr(err.text, "another daemon listens there"), "it says \"%s\"", err.text);
	CHECK(exists(sun.sun_path), "it removed the other's socket");
	kc_status_free(st);
	close(listener);
}

/* --- Running them --------------------------------------------------------- */

static const struct test tests[] = {
	{ "records", test_records },
	{ "pages", test_pages },
	{ "commands", test_commands },
	{ "status", test_status },
	{ "full_queue", test_full_queue },
	{ "tcp", test_tcp },
	{ "epochs", test_epochs },
	{ "resync", test_resync },
	{ "resync_directory", test_resync_directory },
	{ "merging", test_merging },
	{ "damage", test_damage },
	{ "damage_directory", test_damage_directory },
	{ "changing_directory", test_changing_directory },
	{ "read_while_merged", test_read_while_merged },
	{ "full_directory", test_full_directory },
	{ "full_standby", test_full_standby },
	{ "security", test_security },
	{ "two_primaries", test_two_primaries },
	{ "wrong_guest", test_wrong_guest },
	{ "silent_peers", test_silent_peers },
	{ "failover", test_failover },
	{ "failover_reasons", test_failover_reasons },
	{ "failover_again", test_failover_again },
	{ "full_ram_dir", test_full_ram_dir },
	{ "qemu", test_qemu },
	{ "qemu_stopped", test_qemu_stopped },
	{ "io_error", test_io_error },
	{ "silent_qemu", test_silent_qemu },
	{ "reboot", test_reboot },
	{ "foreign_directory", test_foreign_directory },
	{ "kill_standby", test_kill_standby },
	{ "kill_primary", test_kill_primary },
	{ "kill_directory", test_kill_directory },
};

static void setup(void)
{
	snprintf(other_psk, sizeof(other_psk), "%s/other.psk", dir);
	write_text(other_psk, 0600, "kvm:100102030405060708090a0b0c0d0e0f\n");
	kc_sink_defaults(&opts);
	opts.psk_file = psk;
}

/* What the fuzzer starts from: streams and files of a tiny guest, for each of its ways in. */
static int make_corpus(const char *to)
{
	char path[PATH_MAX];
	uint8_t *buf;
	size_t len;
	struct sim g;
	FILE *f;
	int i;

	if (setjmp(out)) {
		fprintf(stderr, "%s\n", reason);
		return 1;
	}
	seed = 1;
	blocks[0].npages = 3;
	blocks[1].npages = 1;
	kc_sink_defaults(&opts);
	for (i = 0; i < 4; i++) {
		opts.codec = i % 2 ? KC_CODEC_ZSTD : KC_CODEC_LZ4;
		sim_init(&g);
		g.state_len = 5000;
		buf = catch_stream(&g, i == 2 ? 1 : 2, &len);
		snprintf(path, sizeof(path), "%s/stream-%d", to, i);
		f = fopen(path, "w");
		if (!f) {
			perror(path);
			return 1;
		}
		fputc(i, f);
		fwrite(buf, 1, len, f);
		fclose(f);
		free(buf);
		sim_free(&g);
	}
	return 0;
}

int main(int argc, char **argv)
{
	static const struct suite suite = {
		.tests = tests, .nr_tests = sizeof(tests) / sizeof(tests[0]), .setup = setup,
		.usage = "KVM-CHECKPOINT", .nr_programs = 1, .jobs = 1,
	};

	if (argc > 4 && !strcmp(argv[1], "--be-qemu"))
		return be_qemu(argc, argv);
	if (argc == 3 && !strcmp(argv[1], "-c"))
		return make_corpus(argv[2]);
	return run_tests(&suite, argc, argv);
}
