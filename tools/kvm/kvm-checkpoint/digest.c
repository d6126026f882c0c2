// SPDX-License-Identifier: GPL-2.0-only
/*
 * Digests of pages, which a resynchronization computes for all of the guest's memory.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <gnutls/crypto.h>
#include <gnutls/gnutls.h>

#include "stream.h"

#define MAX_THREADS 8u
/* To start a thread has to be worth it */
#define PAGES_PER_THREAD 128u

static uint8_t zero_digest[KC_DIGEST_SIZE];
static pthread_once_t zero_once = PTHREAD_ONCE_INIT;

static void digest(const void *data, uint8_t *out)
{
	uint8_t sha[32];

	/* Cannot fail for an algorithm that is there; if it is not, pages must not look equal. */
	if (gnutls_hash_fast(GNUTLS_DIG_SHA256, data, KC_PAGE_SIZE, sha))
		abort();
	memcpy(out, sha, KC_DIGEST_SIZE);
}

static void make_zero_digest(void)
{
	static const uint8_t zeros[KC_PAGE_SIZE];

	digest(zeros, zero_digest);
}

void kc_page_digest(const void *data, uint8_t *out)
{
	/* Of most guests, most of what is compared. */
	if (kc_is_zero_page(data)) {
		pthread_once(&zero_once, make_zero_digest);
		memcpy(out, zero_digest, KC_DIGEST_SIZE);
	} else {
		digest(data, out);
	}
}

struct share {
	const uint8_t *const *pages;
	uint32_t n;
	uint8_t *out;
};

static void *compute(void *arg)
{
	struct share *s = arg;
	uint32_t i;

	for (i = 0; i < s->n; i++)
		kc_page_digest(s->pages[i], s->out + (size_t)i * KC_DIGEST_SIZE);
	return NULL;
}

void kc_page_digests(const uint8_t *const *pages, uint32_t n, uint8_t *out)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	uint32_t nr = n / PAGES_PER_THREAD, i, done = 0;
	struct share shares[MAX_THREADS];
	pthread_t threads[MAX_THREADS];
	bool started[MAX_THREADS];

	if (cpus > 0 && nr > cpus)
		nr = cpus;
	nr = nr > MAX_THREADS ? MAX_THREADS : nr ? nr : 1;
	for (i = 0; i < nr; i++) {
		shares[i] = (struct share){ .pages = pages + done, .n = (n - done) / (nr - i),
					    .out = out + (size_t)done * KC_DIGEST_SIZE };
		done += shares[i].n;
		/* The last share is ours, and any for which there is no thread. */
		started[i] = i + 1 < nr && !pthread_create(&threads[i], NULL, compute, &shares[i]);
		if (!started[i])
			compute(&shares[i]);
	}
	for (i = 0; i < nr; i++) {
		if (started[i])
			pthread_join(threads[i], NULL);
	}
}
