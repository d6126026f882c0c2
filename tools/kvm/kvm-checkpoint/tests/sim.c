// SPDX-License-Identifier: GPL-2.0-only
/*
 * A guest without KVM, and primaries that hand over its epochs.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>
#include <xxhash.h>

#include "sim.h"
#include "stream.h"

struct kc_block blocks[2] = { { "pc.ram", 700 }, { "/objects/ram1", 61 } };
struct kc_disk disks[1] = { { "vda", 90 } };
struct kc_guest guest = {
	.uuid = { 1, 2, 3 }, .name = "test guest", .page_size = KC_PAGE_SIZE, .nr_blocks = 2,
	.blocks = blocks, .disks = disks, .fingerprint = { 9 },
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

static void forget_writes(struct sim *g)
{
	while (g->nr_writes)
		free(g->writes[--g->nr_writes].data);
}

/* Some sectors here and there, some in the same places; sometimes much, sometimes what is zero. */
static void sim_write_disk(struct sim *g)
{
	uint64_t size = disks[0].npages * KC_PAGE_SIZE;
	struct sim_write *w = &g->writes[g->nr_writes++];
	uint64_t kind = rnd(&g->disk_rng) % 8;
	uint32_t i;

	w->offset = rnd(&g->disk_rng) % (kind < 4 ? 16 : size / 512) * 512;
	w->len = (1 + rnd(&g->disk_rng) % (kind == 7 ? 100 : 9)) * 512;
	if (kind == 6) {
		w->offset -= w->offset % KC_PAGE_SIZE;
		w->len = KC_PAGE_SIZE;
	}
	if (w->len > size - w->offset)
		w->len = size - w->offset;
	w->data = rnd(&g->disk_rng) % 5 ? malloc(w->len) : NULL;
	for (i = 0; w->data && i < w->len; i += 512) {
		memset(w->data + i, rnd(&g->disk_rng), 512);
		w->data[i + rnd(&g->disk_rng) % 512] = rnd(&g->disk_rng);
	}
	if (w->data)
		memcpy(g->disk + w->offset, w->data, w->len);
	else
		memset(g->disk + w->offset, 0, w->len);
}

/* Not running when the epoch was taken. */
bool sim_stopped(uint64_t epoch)
{
	return epoch % 3 == 2;
}

/* One epoch further; dirty says what it wrote. */
void sim_step(struct sim *g)
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
	forget_writes(g);
	for (i = rnd(&g->disk_rng) % MAX_WRITES; guest.nr_disks && i; i--)
		sim_write_disk(g);
	g->epoch++;
}

void sim_init(struct sim *g)
{
	unsigned int i;

	memset(g, 0, sizeof(*g));
	g->rng = g->disk_rng = seed;
	g->disk = guest.nr_disks ? calloc(disks[0].npages, KC_PAGE_SIZE) : NULL;
	g->state_len = 40000;
	for (i = 0; i < 2; i++) {
		g->ram[i] = calloc(blocks[i].npages, KC_PAGE_SIZE);
		g->dirty[i] = calloc(blocks[i].npages, 1);
	}
	for (i = 0; i < 400; i++)
		sim_write(g);
}

void sim_free(struct sim *g)
{
	forget_writes(g);
	free(g->disk);
	free(g->ram[0]);
	free(g->ram[1]);
	free(g->dirty[0]);
	free(g->dirty[1]);
}

void sim_goto(struct sim *g, uint64_t epoch)
{
	if (epoch < g->epoch) {
		sim_free(g);
		sim_init(g);
	}
	while (g->epoch < epoch)
		sim_step(g);
}

/* What of it differs, and then it is as it is */
static int resync_disk(struct sim *g, struct kc_sink *s)
{
	uint8_t digests[KC_DIGESTS_CHUNK * KC_DIGEST_SIZE], own[KC_DIGEST_SIZE];
	uint64_t i;
	int rc;

	rc = kc_sink_digests(s, KC_DISK_BLOCK, 0, disks[0].npages, digests, &err);
	for (i = 0; i < disks[0].npages && !rc; i++) {
		const uint8_t *p = g->disk + i * KC_PAGE_SIZE;

		kc_page_digest(p, own);
		if (memcmp(own, digests + i * KC_DIGEST_SIZE, sizeof(own)))
			rc = kc_epoch_disk(s, 0, i * KC_PAGE_SIZE, p, KC_PAGE_SIZE, &err);
	}
	return rc;
}

/* Its first copy is that of any moment, the writes since then follow */
static int send_disk(struct sim *g, struct kc_sink *s, unsigned int flags)
{
	unsigned int i;
	int rc = 0;

	if (!guest.nr_disks)
		return 0;
	if (flags == KC_EPOCH_RESYNC)
		return resync_disk(g, s);
	if (flags)
		rc = kc_epoch_disk(s, 0, 0, g->disk, disks[0].npages * KC_PAGE_SIZE, &err);
	for (i = 0; i < g->nr_writes && !rc; i++)
		rc = kc_epoch_disk(s, 0, g->writes[i].offset, g->writes[i].data, g->writes[i].len,
				   &err);
	return rc;
}

/* Hand over the epoch as it is: all of it, what differs, or what is dirty. */
int sim_send(struct sim *g, struct kc_sink *s, unsigned int flags)
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
			/* Of some of what is zero it has no memory */
			if (i % 3 && kc_is_zero_page(p))
				rc = kc_epoch_zeros(s, b, i, 1, i % 3 == 1, &err);
			else
				rc = kc_epoch_page(s, b, i, p, &err);
		}
	}
	if (!rc)
		rc = send_disk(g, s, flags);
	if (!rc)
		rc = kc_epoch_state(s, g->state, g->state_len, sim_stopped(g->epoch), &err);
	return rc ? rc : kc_epoch_commit(s, &err);
}

/* The files hold the guest as it is in @g. */
void compare(struct sim *g, const char *where, const char *state_name)
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

void compare_disk(struct sim *g, const char *image)
{
	uint8_t *buf;
	size_t len;
	uint64_t i;

	read_all(image, &buf, &len);
	CHECK(len == disks[0].npages * KC_PAGE_SIZE, "%s has %zu bytes", image, len);
	for (i = 0; i < disks[0].npages; i++)
		CHECK(!memcmp(buf + i * KC_PAGE_SIZE, g->disk + i * KC_PAGE_SIZE, KC_PAGE_SIZE),
		      "page %" PRIu64 " of %s is not that of epoch %" PRIu64, i, image, g->epoch);
	free(buf);
}

void compare_standby(struct sim *g, const char *ram_dir)
{
	char name[32];

	snprintf(name, sizeof(name), "state-%" PRIu64, g->epoch);
	compare(g, ram_dir, name);
}

void write_meta(const char *path, uint8_t *buf, size_t len)
{
	uint64_t xxh = XXH3_64bits(buf, len - sizeof(xxh));
	int fd = open(path, O_WRONLY | O_TRUNC | O_CLOEXEC);

	memcpy(buf + len - sizeof(xxh), &xxh, sizeof(xxh));
	CHECK(fd >= 0 && write(fd, buf, len) == (ssize_t)len, "cannot write %s", path);
	close(fd);
}

/* --- Sinks ---------------------------------------------------------------- */

char other_psk[PATH_MAX];
struct kc_sink_opts opts;

/* Until a standby has noticed that a primary before is gone, it may say that it is busy. */
struct kc_sink *must_open(const char *to)
{
	uint64_t end = kc_now_us() + 10000000;
	struct kc_sink *s;

	while (!(s = kc_sink_open(to, &opts, &guest, &err)) && errno == EBUSY && kc_now_us() < end)
		poll(NULL, 0, 5);
	CHECK(s, "cannot open %s: %s", to, err.text);
	return s;
}

/* It has to fail like this. */
void must_refuse(const char *to, const struct kc_sink_opts *o, const struct kc_guest *g,
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

void restore_and_compare(const char *store, uint64_t epoch, struct sim *g)
{
	char nr[32];

	snprintf(nr, sizeof(nr), "%" PRIu64, epoch);
	remove_tree(path_of("restored"));
	unlink(path_of("log"));
	unlink(path_of("restored-disk"));
	if (guest.nr_disks)
		CHECK(!run("restore", "--epoch", nr, "--ram-dir", path_of("restored"), "--disk",
			   path_of("restored-disk"), store, NULL), "cannot restore epoch %s", nr);
	else
		CHECK(!run("restore", "--epoch", nr, "--ram-dir", path_of("restored"), store, NULL),
		      "cannot restore epoch %s", nr);
	CHECK(log_has("\nstopped\n") == sim_stopped(epoch),
	      "does not know whether the guest was stopped at epoch %s", nr);
	sim_goto(g, epoch);
	compare(g, path_of("restored"), "state");
	if (guest.nr_disks)
		compare_disk(g, path_of("restored-disk"));
}

void resync(const char *to)
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

/* An epoch is there, the primary is connected. */
struct kc_sink *protected_guest(struct sim *g)
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

/* --- Primaries ------------------------------------------------------------ */

/*
 * A primary in a process of its own: epochs from @first on, and each acknowledged one as a number
 * in @shared.  Comes again when the receiver is gone, if it is told to.  @shared[3]: milliseconds
 * between epochs.
 */
pid_t start_primary(const char *to, uint64_t first, volatile uint64_t *shared, bool again)
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

volatile uint64_t *shared_numbers(void)
{
	uint64_t *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED, "out of memory");
	return p;
}

/* Every other round some epochs come before the kill, however slow the machine is. */
void let_run(unsigned int round, volatile uint64_t *n, unsigned int ms)
{
	uint64_t end = kc_now_us() + 30000000, want = n[0] + 1 + below(12);

	while (round % 2 && n[0] < want) {
		CHECK(kc_now_us() < end, "no epoch is acknowledged any more");
		poll(NULL, 0, 1);
	}
	poll(NULL, 0, 1 + below(ms));
}
