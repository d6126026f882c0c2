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
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "backend.h"
#include "launch.h"
#include "ram.h"
#include "sim.h"
#include "stream_tests.h"

/* --- Units ---------------------------------------------------------------- */

static int get_any(const struct kc_rec *rec)
{
	struct kc_digest_req dr;
	struct kc_hello hello;
	struct kc_welcome w;
	struct kc_begin b;
	struct kc_page p;
	struct kc_part d;
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
	case KC_PART:
		rc = kc_get_part(rec, &d, &err);
		return rc ? rc : d.page == 78 && d.block == KC_DISK_BLOCK + 1 && d.offset == 4000 &&
		       d.len == 96 ? 0 : -1;
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
	const struct kc_part part = { .page = 78, .block = KC_DISK_BLOCK + 1, .offset = 4000,
				      .len = 96 };
	const struct kc_digest_req req = { .first = 5, .n = 3, .block = 1 };
	const struct kc_welcome welcome = { 1, true, true, true, 5, 8, 6, { 7 } };
	uint8_t id[16] = { 1 };
	struct kc_rec rec;
	size_t n[16], i, len;
	ssize_t got;
	int k;

	for (k = 0; k < 13; k++) {
		memset(buf, 0xee, sizeof(buf));
		switch (k) {
		case 0:
			n[k] = kc_put_hello(buf, &guest, id, KC_HELLO_UNHELD);
			break;
		case 1:
			n[k] = kc_put_welcome(buf, &welcome);
			break;
		case 2:
			n[k] = kc_put_begin(buf, &(struct kc_begin){ 7, 6, 0 });
			break;
		case 3:
			n[k] = kc_put_page(buf, &page) + page.len;
			break;
		case 4:
			n[k] = kc_put_zero(buf, &(struct kc_zero){ 1, 2, 1, KC_ZERO_HOLE });
			break;
		case 5:
			n[k] = kc_put_state(buf, &(struct kc_state){ 12, KC_STATE_STOPPED | KC_STATE_UNHELD, 13 });
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
		case 11:
			n[k] = kc_put_part(buf, &part) + part.len;
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
	len = kc_put_state(buf, &(struct kc_state){ 12, KC_STATE_UNHELD << 1, 13 });
	CHECK(kc_get_rec(buf, len, &rec, &err) == (ssize_t)len && get_any(&rec) == -EPROTO,
	      "unknown flags of a device state are taken");
	len = kc_put_zero(buf, &(struct kc_zero){ 1, 2, 1, KC_ZERO_HOLE << 1 });
	CHECK(kc_get_rec(buf, len, &rec, &err) == (ssize_t)len && get_any(&rec) == -EPROTO,
	      "unknown flags of zeros are taken");
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

static void pack_page(struct kc_packer *pk, uint64_t epoch, uint64_t page, const void *data,
		      struct kc_page *p)
{
	struct kc_unpacker *up = kc_unpacker_new();
	uint8_t got[KC_PAGE_SIZE];

	*p = (struct kc_page){ .page = page };
	CHECK(!kc_pack(pk, epoch, p, data), "a page is left out");
	if (!(p->enc & KC_ENC_DELTA)) {
		OK(kc_unpack(up, p, NULL, got, &err));
		CHECK(!memcmp(got, data, sizeof(got)), "a page does not survive");
	}
	kc_unpacker_free(up);
}

static void fill_junk(uint8_t page[KC_PAGE_SIZE])
{
	unsigned int i;

	for (i = 0; i < KC_PAGE_SIZE; i++)
		page[i] = rnd(&rng_state);
}

/* After many pages that do not compress few are tried; when one does again, all are */
static void test_tries(void)
{
	static uint8_t junk[60][KC_PAGE_SIZE], text[KC_PAGE_SIZE] = "text";
	unsigned int codec, i, raw;
	struct kc_packer *pk;
	struct kc_page p;

	for (codec = KC_CODEC_LZ4; codec <= KC_CODEC_ZSTD; codec++) {
		pk = kc_packer_new(codec, 1, 1 << 20);
		for (i = 0; i < 60; i++) {
			fill_junk(junk[i]);
			pack_page(pk, 1, i, junk[i], &p);
			CHECK(p.enc == KC_ENC_RAW, "junk became less");
		}
		for (raw = 0; raw < 8; raw++) {
			pack_page(pk, 1, 100 + raw, text, &p);
			if (p.enc != KC_ENC_RAW)
				break;
		}
		CHECK(raw && raw < 8, "%u pages after junk were sent as they are", raw);
		pack_page(pk, 1, 120, text, &p);
		CHECK(p.enc == codec, "a page after one that compressed is sent as it is");
		/* The same of deltas, which are junk, and then little */
		for (i = 0; i < 60; i++) {
			fill_junk(junk[i]);
			pack_page(pk, 2, i, junk[i], &p);
		}
		for (raw = 0; raw < 8; raw++) {
			junk[raw][1]++;
			pack_page(pk, 3, raw, junk[raw], &p);
			if (p.enc != KC_ENC_RAW)
				break;
		}
		CHECK(raw && raw < 8 && (p.enc & KC_ENC_DELTA),
		      "%u deltas after junk were sent as they are", raw);
		junk[20][1]++;
		pack_page(pk, 3, 20, junk[20], &p);
		CHECK(p.enc & KC_ENC_DELTA, "no delta after one that was little");
		kc_packer_free(pk);
	}
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

/* A standby is asked for more than was asked for; what is sent meanwhile counts nevertheless. */
static void test_digests_ahead(void)
{
	static uint8_t digests[KC_DIGESTS_CHUNK * KC_DIGEST_SIZE], own[KC_DIGEST_SIZE];
	uint64_t junk[KC_PAGE_SIZE / 8] = { 1 }, n, first;
	struct kc_sink *s;
	struct sim g;

	blocks[0].npages = 3 * KC_DIGESTS_CHUNK - 100;
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	s = protected_guest(&g);
	OK(kc_epoch_begin(s, g.epoch + 1, 0, &err));
	for (first = 0; first < blocks[0].npages; first += KC_DIGESTS_CHUNK) {
		n = blocks[0].npages - first;
		n = n < KC_DIGESTS_CHUNK ? n : KC_DIGESTS_CHUNK;
		/* Answers come, and nobody waits for them. */
		poll(NULL, 0, 200);
		OK(kc_sink_poll(s, NULL, &err));
		if (first)
			OK(kc_epoch_page(s, 0, first + 7, junk, &err));
		if (!first || first > KC_DIGESTS_CHUNK)
			OK(kc_sink_digests(s, 0, first, n, digests, &err));
		else
			continue;
		kc_page_digest(first ? (void *)junk : g.ram[0] + 7 * KC_PAGE_SIZE, own);
		CHECK(!memcmp(own, digests + 7 * KC_DIGEST_SIZE, sizeof(own)), "a digest is of before");
		kc_page_digest(g.ram[0] + (first + n - 1) * KC_PAGE_SIZE, own);
		CHECK(!memcmp(own, digests + (n - 1) * KC_DIGEST_SIZE, sizeof(own)),
		      "the last digest is wrong");
	}
	/* One that was asked ahead and sent again */
	OK(kc_sink_digests(s, 0, 0, KC_DIGESTS_CHUNK, digests, &err));
	junk[0]++;
	OK(kc_epoch_page(s, 0, KC_DIGESTS_CHUNK + 7, junk, &err));
	OK(kc_sink_digests(s, 0, KC_DIGESTS_CHUNK, KC_DIGESTS_CHUNK, digests, &err));
	kc_page_digest(junk, own);
	CHECK(!memcmp(own, digests + 7 * KC_DIGEST_SIZE, sizeof(own)), "a digest is of before");
	/* And the end with an answer on its way. */
	CHECK(kc_sink_end(s, KC_END_DETACH), "it is not told");
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
		  path_of("ram2"), NULL) == 2,
	      "--insecure listens to the world");
	CHECK(run("standby", "--listen", "127.0.0.1:0", "--no-fence", "--ram-dir", path_of("ram2"),
		  NULL) == 2,
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
	/* Which of them, if that is known. */
	strcpy(g.hardware, "QEMU 7.2\ndevice virtio-net-pci net1\n");
	must_refuse(to, &opts, &g, EEXIST, "other devices: without QEMU 7.2");
	g = guest;
	strcpy(g.name, "web-frontend");
	must_refuse(to, &opts, &g, EEXIST, "(test guest), not 01020300");
	/* The same guest, started again. */
	g = guest;
	g.process[0]++;
	s = kc_sink_open(to, &opts, &g, &err);
	CHECK(s && kc_sink_last_epoch(s) == 1, "the same guest is refused: %s", err.text);
	kc_sink_close(s);
	g.page_size = 65536;
	must_refuse(to, &opts, &g, EINVAL, "pages of 65536 bytes");
}

/* Guests without UUID and name look all alike, but for which QEMU runs them. */
static void refuse_anonymous(const char *to)
{
	struct kc_guest g = guest;
	struct kc_sink *s;

	memset(g.uuid, 0, sizeof(g.uuid));
	g.name[0] = '\0';
	g.process[0] = 1;
	s = kc_sink_open(to, &opts, &g, &err);
	CHECK(s, "%s", err.text);
	OK(kc_epoch_begin(s, 1, KC_EPOCH_FULL, &err));
	kc_sink_close(s);
	s = kc_sink_open(to, &opts, &g, &err);
	CHECK(s, "the same one is refused: %s", err.text);
	kc_sink_close(s);
	g.process[0] = 2;
	must_refuse(to, &opts, &g, EEXIST, "start QEMU with -uuid or -name");
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
	start_standby(path_of("ram2"), "--no-fence", "--timeout", "0");
	refuse_anonymous(spec());
	stop_standby(SIGTERM);

	/* Of another version, and no kvm-checkpoint at all. */
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure");
	n = kc_put_hello(hello, &guest, id, 0);
	hello[KC_REC_HDR + 8] = hello[KC_REC_HDR + 10] = 9;
	raw(hello, n, text, sizeof(text));
	CHECK(strstr(text, "versions 9 to 9"), "it says \"%s\"", text);
	raw((const uint8_t *)"GET / HTTP/1.0\r\n\r\n", 18, text, sizeof(text));
	CHECK(strstr(text, "no kvm-checkpoint"), "it says \"%s\"", text);
	hello[KC_REC_HDR + 8] = hello[KC_REC_HDR + 10] = KC_VERSION;
	hello[n - 1] ^= 1;
	raw(hello, n, text, sizeof(text));
	CHECK(strstr(text, "malformed"), "it says \"%s\"", text);
	hello[n - 1] ^= 1;
	hello[KC_REC_HDR + 12] = 2;
	raw(hello, n, text, sizeof(text));
	CHECK(strstr(text, "malformed"), "it says \"%s\"", text);
	hello[KC_REC_HDR + 12] = 0;
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
	freeze(standby);
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
	freeze(standby);
	for (rc = 0; !rc;) {
		sim_step(&g);
		rc = sim_send(&g, s, KC_EPOCH_FULL);
	}
	CHECK(rc == -ETIMEDOUT && strstr(err.text, "taken no data"), "%d: %s", rc, err.text);
	kc_sink_close(s);
	kill(standby, SIGCONT);
	sim_free(&g);
}

/* --- Running them --------------------------------------------------------- */

static const struct test tests[] = {
	{ "records", test_records },
	{ "pages", test_pages },
	{ "tries", test_tries },
	{ "commands", test_commands },
	{ "usage", test_usage },
	{ "status", test_status },
	{ "full_queue", test_full_queue },
	{ "idle_clients", test_idle_clients },
	{ "prometheus", test_prometheus },
	{ "tcp", test_tcp },
	{ "epochs", test_epochs },
	{ "bandwidth", test_bandwidth },
	{ "resync", test_resync },
	{ "digests_ahead", test_digests_ahead },
	{ "resync_directory", test_resync_directory },
	{ "merging", test_merging },
	{ "store_disk", test_store_disk },
	{ "resync_disk", test_resync_disk },
	{ "restore_disk", test_restore_disk },
	{ "disk_missing", test_disk_missing },
	{ "damage", test_damage },
	{ "damage_directory", test_damage_directory },
	{ "lying_runs", test_lying_runs },
	{ "overlapping_runs", test_overlapping_runs },
	{ "overlapping_trial", test_overlapping_trial },
	{ "endless_runs", test_endless_runs },
	{ "lying_redo", test_lying_redo },
	{ "changing_directory", test_changing_directory },
	{ "read_while_merged", test_read_while_merged },
	{ "read_while_replaced", test_read_while_replaced },
	{ "verify_once", test_verify_once },
	{ "no_files", test_no_files },
	{ "open_store", test_open_store },
	{ "full_directory", test_full_directory },
	{ "full_standby", test_full_standby },
	{ "security", test_security },
	{ "two_primaries", test_two_primaries },
	{ "wrong_guest", test_wrong_guest },
	{ "silent_peers", test_silent_peers },
	{ "failover", test_failover },
	{ "failover_reasons", test_failover_reasons },
	{ "no_failover", test_no_failover },
	{ "failover_again", test_failover_again },
	{ "restarted", test_restarted },
	{ "restarted_age", test_restarted_age },
	{ "flood", test_flood },
	{ "standby_stopped", test_standby_stopped },
	{ "configuration", test_configuration },
	{ "taken_over", test_taken_over },
	{ "kinds", test_kinds },
	{ "trial", test_trial },
	{ "slow_trial", test_slow_trial },
	{ "trial_killed", test_trial_killed },
	{ "ahead_killed", test_ahead_killed },
	{ "trial_promoted", test_trial_promoted },
	{ "trial_silence", test_trial_silence },
	{ "warm_dies", test_warm_dies },
	{ "full_ram_dir", test_full_ram_dir },
	{ "full_holes", test_full_holes },
	{ "qemu", test_qemu },
	{ "qemu_stopped", test_qemu_stopped },
	{ "qemu_differs", test_qemu_differs },
	{ "io_error", test_io_error },
	{ "silent_qemu", test_silent_qemu },
	{ "reboot", test_reboot },
	{ "foreign_directory", test_foreign_directory },
	{ "killed_lock", test_killed_lock },
	{ "kill_standby", test_kill_standby },
	{ "kill_primary", test_kill_primary },
	{ "kill_directory", test_kill_directory },
	{ "kill_directory_disk", test_kill_directory_disk },
	{ "crash_standby", test_crash_standby },
	{ "crash_standby_trial", test_crash_standby_trial },
	{ "crash_standby_bad", test_crash_standby_bad },
	{ "crash_directory", test_crash_directory },
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
	disks[0].npages = 2;
	for (i = 0; i < 8; i++) {
		/* The second half with a disk */
		guest.nr_disks = i / 4;
		opts.codec = i % 2 ? KC_CODEC_ZSTD : KC_CODEC_LZ4;
		sim_init(&g);
		g.state_len = 5000;
		buf = catch_stream(&g, i == 2 ? 1 : 2, &len);
		snprintf(path, sizeof(path), "%s/stream-%s%d", to, i / 4 ? "disk-" : "", i % 4);
		f = fopen(path, "w");
		if (!f) {
			perror(path);
			return 1;
		}
		fputc(i % 4, f);
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
