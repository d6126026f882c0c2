// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which devices the guest has: its state can only be loaded where these are the same.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "guest.h"

static int compare_names(const void *a, const void *b)
{
	return strcmp(*(char * const *)a, *(char * const *)b);
}

/* The strings of a list in order, each with a newline; malloc()ed */
static char *sorted(struct json_object *list)
{
	size_t n = json_object_array_length(list), i, len;
	const char **names = calloc(n + 1, sizeof(*names));
	char *text = NULL;
	FILE *f = names ? open_memstream(&text, &len) : NULL;

	for (i = 0; f && i < n; i++) {
		names[i] = json_object_get_string(json_object_array_get_idx(list, i));
		if (!names[i])
			names[i] = "";
	}
	if (f)
		qsort(names, n, sizeof(*names), compare_names);
	for (i = 0; f && i < n; i++)
		fprintf(f, "%s\n", names[i]);
	free(names);
	if (f && fclose(f)) {
		free(text);
		text = NULL;
	}
	return text;
}

/* The first lines of one text that are not in the other: their names */
static void name_others(const char *text, const char *other, const char *what, char *out,
			size_t size)
{
	unsigned int n = 0;
	char line[300];
	size_t len;

	for (; *text; text += len) {
		len = strcspn(text, "\n") + 1;
		snprintf(line, sizeof(line), "\n%.*s", (int)len, text);
		/* Each line of it has a newline before it, but for the first */
		if (!strncmp(other, line + 1, strlen(line + 1)) || strstr(other, line))
			continue;
		line[strcspn(line + 1, " \n") + 1] = '\0';
		if (n++ < 3)
			snprintf(out + strlen(out), size - strlen(out), "%s%s %s", *out ? ", " : "",
				 what, line + 1);
	}
	if (n > 3)
		snprintf(out + strlen(out), size - strlen(out), " and %u more", n - 3);
}

int guest_check_devices(const struct guest *g, const char *before, struct kc_err *err)
{
	char what[300] = "";

	if (!strcmp(before, g->devices))
		return 0;
	name_others(g->devices, before, "new is", what, sizeof(what));
	name_others(before, g->devices, "gone is", what, sizeof(what));
	return kc_fail(err, ESTALE,
		       "the guest's devices have been changed (%s): start another standby, whose QEMU has the same, and protect the guest anew",
		       what);
}

int guest_take_devices(struct guest *g, struct json_object *list, struct kc_err *err)
{
	char *before = g->devices;
	int rc = 0;

	if (!json_object_is_type(list, json_type_array))
		return kc_fail(err, EPROTO,
			       "QEMU does not say which devices the guest has: is its patch another version's?");
	g->devices = sorted(list);
	if (!g->devices)
		rc = kc_fail(err, ENOMEM, "no memory for the list of devices");
	else if (before)
		rc = guest_check_devices(g, before, err);
	free(before);
	return rc;
}
