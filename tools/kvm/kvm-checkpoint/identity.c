// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which guest it is that a QEMU runs.
 *
 * What of its hardware must be the same for an epoch to fit: QEMU's version, the machine, how many
 * CPUs, and the devices, those that the user asked for by what they are called and those that came
 * with the machine or with options such as -serial by how many of a type there are.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <xxhash.h>

#include "identity.h"
#include "process.h"

#define MAX_LINES 4096u

/* Lines of text; sorted, they do not depend on the order in which QEMU tells */
struct lines {
	char *line[MAX_LINES];
	size_t nr;
};

__attribute__((format(printf, 2, 3)))
static int add_line(struct lines *l, const char *fmt, ...)
{
	va_list ap;
	int n = -1;

	va_start(ap, fmt);
	if (l->nr < MAX_LINES)
		n = vasprintf(&l->line[l->nr], fmt, ap);
	va_end(ap);
	if (n < 0)
		return -ENOMEM;
	l->nr++;
	return 0;
}

static int by_text(const void *a, const void *b)
{
	return strcmp(*(char * const *)a, *(char * const *)b);
}

static struct json_object *path_args(const char *path, const char *property)
{
	struct json_object *args = json_object_new_object();

	json_object_object_add(args, "path", json_object_new_string(path));
	if (property)
		json_object_object_add(args, "property", json_object_new_string(property));
	return args;
}

/* What is in a container, by name too if its names mean something */
static int add_devices(struct qmp *q, struct lines *l, const char *path, bool named,
		       struct kc_err *err)
{
	struct json_object *o = NULL;
	size_t i;
	int rc;

	rc = qmp_call(q, "qom-list", path_args(path, NULL), &o, err);
	/* A container that is not there is empty. */
	if (rc)
		return rc == -EREMOTEIO ? 0 : rc;
	for (i = 0; !rc && json_object_is_type(o, json_type_array) &&
		    i < json_object_array_length(o); i++) {
		struct json_object *c = json_object_array_get_idx(o, i);
		const char *type = qmp_str(c, "type"), *name = qmp_str(c, "name");

		if (strncmp(type, "child<", 6) || (!named && strncmp(name, "device[", 7)))
			continue;
		type += 6;
		rc = add_line(l, "device %.*s%s%s", (int)strcspn(type, ">"), type,
			      named ? " " : "", named ? name : "");
	}
	json_object_put(o);
	return rc ? kc_fail(err, ENOMEM, "no memory for the list of devices") : 0;
}

static int add_machine(struct qmp *q, struct lines *l, struct kc_err *err)
{
	struct json_object *o = NULL, *qemu;
	int rc;

	rc = qmp_call(q, "query-version", NULL, &o, err);
	if (rc)
		return rc;
	if (json_object_object_get_ex(o, "qemu", &qemu))
		rc = add_line(l, "QEMU %lu.%lu", qmp_u64(qemu, "major"), qmp_u64(qemu, "minor"));
	json_object_put(o);

	o = NULL;
	if (!rc)
		rc = qmp_call(q, "qom-get", path_args("/machine", "type"), &o, err);
	if (rc)
		return rc;
	rc = add_line(l, "machine %.100s", json_object_get_string(o));
	json_object_put(o);

	o = NULL;
	if (!rc)
		rc = qmp_call(q, "query-cpus-fast", NULL, &o, err);
	if (rc)
		return rc;
	if (!json_object_is_type(o, json_type_array))
		rc = kc_fail(err, EPROTO, "QEMU's answer to query-cpus-fast makes no sense");
	else
		rc = add_line(l, "%zu CPUs", json_object_array_length(o));
	json_object_put(o);
	return rc;
}

/* The same line n times becomes one */
static void describe(struct lines *l, struct kc_guest *id)
{
	char *text = NULL, *end;
	size_t i, n, len;
	FILE *f = open_memstream(&text, &len);

	for (i = 0; f && i < l->nr; i += n) {
		for (n = 1; i + n < l->nr && !strcmp(l->line[i], l->line[i + n]); n++)
			;
		fprintf(f, n > 1 ? "%s, %zu times\n" : "%s\n", l->line[i], n);
	}
	if (!f || fclose(f)) {
		free(text);
		return;
	}
	for (i = 0; i < sizeof(id->fingerprint) / 16; i++) {
		XXH128_hash_t h = XXH3_128bits_withSeed(text, len, i);

		memcpy(id->fingerprint + 16 * i, &h, 16);
	}
	snprintf(id->hardware, sizeof(id->hardware), "%s", text);
	end = len < sizeof(id->hardware) ? NULL : strrchr(id->hardware, '\n');
	if (end)
		end[1] = '\0';
	/* It is shown to people, and sent. */
	for (end = id->hardware; *end; end++) {
		if ((*end < ' ' && *end != '\n') || *end == 0x7f)
			*end = '?';
	}
	free(text);
}

static void take_uuid(const char *text, uint8_t uuid[16])
{
	unsigned int i, byte;

	for (i = 0; i < 16; i++, text += 2) {
		if (*text == '-')
			text++;
		if (sscanf(text, "%2x", &byte) != 1)
			break;
		uuid[i] = byte;
	}
}

int kc_identify(struct qmp *q, struct kc_guest *id, struct kc_err *err)
{
	struct json_object *o = NULL;
	struct lines l = { .nr = 0 };
	struct ucred peer;
	socklen_t len = sizeof(peer);
	int rc;

	rc = qmp_call(q, "query-uuid", NULL, &o, err);
	if (rc)
		return rc;
	take_uuid(qmp_str(o, "UUID"), id->uuid);
	json_object_put(o);

	o = NULL;
	rc = qmp_call(q, "query-name", NULL, &o, err);
	if (rc)
		return rc;
	snprintf(id->name, sizeof(id->name), "%s", qmp_str(o, "name"));
	json_object_put(o);

	rc = add_machine(q, &l, err);
	if (!rc)
		rc = add_devices(q, &l, "/machine/peripheral", true, err);
	if (!rc)
		rc = add_devices(q, &l, "/machine/peripheral-anon", false, err);
	if (!rc)
		rc = add_devices(q, &l, "/machine/unattached", false, err);
	if (!rc) {
		qsort(l.line, l.nr, sizeof(l.line[0]), by_text);
		describe(&l, id);
		if (!getsockopt(q->fd, SOL_SOCKET, SO_PEERCRED, &peer, &len))
			kc_process_id(peer.pid, id->process);
	}
	while (l.nr)
		free(l.line[--l.nr]);
	return rc;
}
