// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which epochs of a directory are sound, with each file read once however many build upon it.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "store_internal.h"

/*
 * What is known of a file: nothing yet, or that its epoch is sound, or that it is lost because of
 * a file, whose index this is without the LOST.
 */
#define UNKNOWN 0u
#define SOUND 1u
#define LOST 2u

struct survey {
	const struct kc_store *st;
	size_t *of, *path;
	char **why;		/* of the file that others are lost by */
};

static void survey_end(struct survey *sv)
{
	size_t i;

	for (i = 0; sv->why && i < sv->st->nr_files; i++)
		free(sv->why[i]);
	free(sv->why);
	free(sv->of);
	free(sv->path);
}

static int survey_begin(struct survey *sv, const struct kc_store *st, struct kc_err *err)
{
	*sv = (struct survey){
		.st = st,
		.of = calloc(st->nr_files + 1, sizeof(*sv->of)),
		.path = calloc(st->nr_files + 1, sizeof(*sv->path)),
		.why = calloc(st->nr_files + 1, sizeof(*sv->why)),
	};
	if (sv->of && sv->path && sv->why)
		return 0;
	survey_end(sv);
	return kc_fail(err, ENOMEM, "out of memory");
}

/* From @i down to what it needs first, or to what is lost: the number of files in sv->path. */
static size_t walk(struct survey *sv, size_t i, bool *complete)
{
	const struct kc_store *st = sv->st;
	size_t n = 0;
	ssize_t base;

	for (;;) {
		sv->path[n++] = i;
		*complete = !st->files[i].damaged && st->files[i].flags == KC_EPOCH_FULL;
		if (*complete || st->files[i].damaged || sv->of[i] >= LOST)
			return n;
		base = kc_store_find(st, st->files[i].base);
		if (base < 0)
			return n;
		i = base;
	}
}

static int lose(struct survey *sv, size_t root, const char *why, struct kc_err *err)
{
	sv->of[root] = LOST + root;
	sv->why[root] = strdup(why);
	return sv->why[root] ? 0 : kc_fail(err, ENOMEM, "out of memory");
}

/* Find out about a file and all that it needs. */
static int look(struct survey *sv, size_t i, struct kc_err *err)
{
	const struct kc_store *st = sv->st;
	size_t n, k, root, *chain, sound = 0;
	struct kc_err why = { "" };
	bool complete;
	ssize_t len;
	int rc;

	if (sv->of[i] != UNKNOWN)
		return 0;
	n = walk(sv, i, &complete);
	root = sv->path[n - 1];
	if (complete && sv->of[root] < LOST) {
		len = kc_store_chain(st, st->files[i].nr, &chain, err);
		if (len < 0)
			return len;
		rc = kc_store_replay(st, chain, len, NULL, NULL, NULL, &sound, &why);
		for (k = 0; k < sound; k++)
			sv->of[chain[k]] = SOUND;
		if (rc && rc != -ESTALE && rc != -ENOMEM) {
			root = chain[sound];
			rc = lose(sv, root, why.text, err);
			for (k = sound; k < (size_t)len; k++)
				sv->of[chain[k]] = LOST + root;
		} else if (rc) {
			kc_fail(err, -rc, "%s", why.text);
		}
		free(chain);
		return rc;
	}
	if (sv->of[root] < LOST) {
		/* This says whether it is really missing, and why. */
		len = kc_store_chain(st, st->files[root].nr, &chain, &why);
		if (len >= 0) {
			free(chain);
			len = kc_fail(&why, ESTALE, "%s was changed while it was read", st->path);
		}
		if (len == -ESTALE)
			return kc_fail(err, ESTALE, "%s", why.text);
		rc = lose(sv, root, why.text, err);
		if (rc)
			return rc;
	}
	for (k = 0; k < n; k++)
		sv->of[sv->path[k]] = sv->of[root];
	return 0;
}

/* From the newest one on: all, or until one is sound. */
static int survey(const struct kc_store *st, bool all, uint64_t *last, size_t *lost,
		  struct kc_err *err)
{
	struct survey sv;
	bool known;
	size_t i;
	int rc;

	*last = 0;
	*lost = 0;
	rc = survey_begin(&sv, st, err);
	if (rc)
		return rc;
	for (i = st->nr_files; i-- > 0 && !rc && (all || !*last);) {
		known = sv.of[i] != UNKNOWN;
		rc = look(&sv, i, err);
		if (rc)
			break;
		if (sv.of[i] == SOUND) {
			if (!*last)
				*last = st->files[i].nr;
			continue;
		}
		++*lost;
		if (all)
			kc_log(KC_LOG_ERROR, "epoch %" PRIu64 " is lost: %s", st->files[i].nr,
			       sv.why[sv.of[i] - LOST]);
		else if (!known)
			kc_log(KC_LOG_WARN, "%s", sv.why[sv.of[i] - LOST]);
	}
	survey_end(&sv);
	return rc;
}

int kc_store_last_sound(const struct kc_store *st, uint64_t *nr, struct kc_err *err)
{
	size_t lost;

	return survey(st, false, nr, &lost, err);
}

int kc_store_verify(const struct kc_store *st, uint64_t *last, size_t *lost, struct kc_err *err)
{
	return survey(st, true, last, lost, err);
}
