// SPDX-License-Identifier: GPL-2.0-only
/*
 * The limit of what is sent in a second.
 */
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sim.h"
#include "stream_tests.h"

/* Two epochs of memory that cannot be compressed; how long they took at least, in us. */
static uint64_t send_junk(struct kc_sink *s, uint64_t *bytes)
{
	struct kc_sink_stats stats;
	uint64_t t = kc_now_us(), junk[KC_PAGE_SIZE / 8], i, j;
	unsigned int epoch;

	for (epoch = 1; epoch <= 2; epoch++) {
		OK(kc_epoch_begin(s, epoch, epoch == 1 ? KC_EPOCH_FULL : 0, &err));
		for (i = 0; i < blocks[0].npages; i++) {
			for (j = 0; j < KC_PAGE_SIZE / 8; j++)
				junk[j] = rnd(&rng_state);
			OK(kc_epoch_page(s, 0, i, junk, &err));
		}
		memset(junk, 0, sizeof(junk));
		for (i = 0; i < blocks[1].npages; i++)
			OK(kc_epoch_page(s, 1, i, junk, &err));
		OK(kc_epoch_state(s, junk, sizeof(junk), false, &err));
		OK(kc_epoch_commit(s, &err));
	}
	t = kc_now_us() - t;
	OK(kc_sink_poll(s, NULL, &err));
	kc_sink_stats(s, &stats);
	*bytes = stats.wire_bytes;
	return t;
}

/* What is sent is what a second has room for, but for the tenth of a second that may be made up. */
static void limited(const char *to, uint64_t bandwidth)
{
	uint64_t bytes, us, least;
	struct kc_sink *s;

	opts.bandwidth = bandwidth;
	s = must_open(to);
	us = send_junk(s, &bytes);
	least = (bytes - bandwidth / 10) * 1000000 / bandwidth;
	CHECK(us + 20000 >= least, "%" PRIu64 " bytes took %" PRIu64 " us, and not %" PRIu64,
	      bytes, us, least);
	/* It hears of us often enough. */
	CHECK(!standby || (!waitpid(standby, NULL, WNOHANG) && !log_has("failing over") &&
			   !log_has("lost the primary")), "the standby thinks that we are gone");
	kc_sink_close(s);
}

void test_bandwidth(void)
{
	blocks[0].npages = 200;
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0");
	limited(spec(), 1 << 20);
	stop_standby(SIGTERM);
	CHECK(ram_epoch(path_of("ram")) == 2, "the epochs are not there");
	limited(path_of("store"), 2 << 20);
	/* At the lowest, where what is sent at once takes longer than the standby waits. */
	blocks[0].npages = 40;
	start_standby(path_of("ram2"), "--no-fence", "--timeout", "800ms");
	limited(spec(), 64 << 10);
	stop_standby(SIGTERM);
	CHECK(kc_sink_parse_option(&opts, "bandwidth", "65535", &err) == -EINVAL &&
	      kc_sink_parse_option(&opts, "bandwidth", "x", &err) == -EINVAL &&
	      kc_sink_parse_option(&opts, "bandwidth", "0", &err) == -EINVAL,
	      "takes a limit at which nothing can be sent");
	CHECK(kc_sink_parse_option(&opts, "bandwidth", "10M", &err) == 1 &&
	      opts.bandwidth == 10 << 20, "does not take 10M");
}
