// SPDX-License-Identifier: GPL-2.0-only
/*
 * What can be told of a device state without loading it.
 *
 * A migration stream is "QEVM", a version, sections and an end.  The length of a section is not in
 * it, but after the end there is a description of all of them, in JSON, unless the machine has
 * suppress-vmdesc=on.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include <json-c/json.h>

#include "vmstate.h"

#define MAX_DESCRIPTION (4u << 20)

#define END		0
#define DESCRIPTION	6

static uint32_t be32(const uint8_t *p)
{
	return (uint32_t)p[0] << 24 | p[1] << 16 | p[2] << 8 | p[3];
}

static bool is_description(const uint8_t *data, size_t len, size_t n)
{
	const uint8_t *p;

	if (n + 6 > len)
		return false;
	p = data + len - n - 6;
	return p[6] == '{' && p[0] == END && p[1] == DESCRIPTION && be32(p + 2) == n;
}

/* The description, which is at the end: END, DESCRIPTION, its length and itself; @n: perhaps that is it */
static const uint8_t *find_description(const uint8_t *data, size_t len, uint32_t *n)
{
	static const uint8_t none[6] = { END, DESCRIPTION };
	size_t back;

	/* One of nothing, as x-checkpoint-take has it: what is saved is known from its layout */
	if (len >= sizeof(none) && !memcmp(data + len - sizeof(none), none, sizeof(none)))
		return NULL;
	if (*n && is_description(data, len, *n))
		return data + len - *n;
	for (back = 1; back + 6 <= len && back < MAX_DESCRIPTION; back++) {
		if (is_description(data, len, back)) {
			*n = back;
			return data + len - back;
		}
	}
	return NULL;
}

static uint64_t hash_sections(const uint8_t *text, uint32_t n)
{
	struct json_tokener *tok = json_tokener_new();
	struct json_object *o = NULL, *list, *d, *v;
	static const char * const members[] = { "name", "instance_id", "version" };
	uint64_t hash = 0;
	size_t i, j;

	if (tok)
		o = json_tokener_parse_ex(tok, (const char *)text, n);
	if (json_object_object_get_ex(o, "devices", &list) &&
	    json_object_is_type(list, json_type_array)) {
		for (i = 0; i < json_object_array_length(list); i++) {
			d = json_object_array_get_idx(list, i);
			for (j = 0; j < 3; j++) {
				const char *s = json_object_object_get_ex(d, members[j], &v) ?
						json_object_get_string(v) : "";

				hash = XXH3_64bits_withSeed(s, strlen(s), hash + j);
			}
		}
	}
	json_object_put(o);
	if (tok)
		json_tokener_free(tok);
	return hash;
}

/* What the guest was doing, as QEMU calls it; empty if it is not there; @at: perhaps it is there */
static const char *run_state(const uint8_t *data, size_t len, size_t *at, size_t *n)
{
	static const char name[] = "\013globalstate";
	/* Name, instance, version, length; then 100 bytes. */
	const size_t head = sizeof(name) - 1 + 12;
	const uint8_t *p = NULL;

	*n = 0;
	if (*at && *at <= len && len - *at >= head + 100)
		p = data + *at;
	if (!p || memcmp(p, name, sizeof(name) - 1))
		p = memmem(data, len, name, sizeof(name) - 1);
	if (!p || (size_t)(data + len - p) < head + 100)
		return "";
	*at = p - data;
	*n = strnlen((const char *)p + head, 100);
	return (const char *)p + head;
}

uint64_t kc_vmstate_kind(const uint8_t *data, size_t len, struct kc_vmstate_memo *memo)
{
	size_t state_len, at = memo ? memo->run_state : 0;
	uint32_t n = memo ? memo->description : 0;
	uint64_t text, sections = 0;
	const uint8_t *desc;
	const char *state;

	if (len < 8 || memcmp(data, "QEVM", 4))
		return 1;
	desc = find_description(data, len, &n);
	if (desc) {
		text = XXH3_64bits(desc, n);
		sections = memo && memo->text == text ? memo->sections : hash_sections(desc, n);
		if (memo) {
			memo->text = text;
			memo->sections = sections;
			memo->description = n;
		}
	}
	state = run_state(data, len, &at, &state_len);
	if (memo)
		memo->run_state = at;
	return XXH3_64bits_withSeed(state, state_len, sections);
}
