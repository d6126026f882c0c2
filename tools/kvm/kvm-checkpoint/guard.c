// SPDX-License-Identifier: GPL-2.0-only
/*
 * Guests that must not be protected, as what an epoch does not have would be lost.
 */
#include <errno.h>

#include "guest.h"

/* json-c does not ask twice */
int guest_call_list(struct guest *g, const char *command, struct json_object **list,
		     struct kc_err *err)
{
	int rc = qmp_call(&g->qmp, command, NULL, list, err);

	if (rc || json_object_is_type(*list, json_type_array))
		return rc;
	json_object_put(*list);
	return kc_fail(err, EPROTO, "QEMU's answer to %s makes no sense", command);
}

int guest_check_disks(struct guest *g, bool external, struct kc_err *err)
{
	struct json_object *disks = NULL, *inserted;
	size_t i;
	int rc;

	if (external)
		return 0;
	rc = guest_call_list(g, "query-block", &disks, err);
	if (rc)
		return rc;
	for (i = 0; !rc && i < json_object_array_length(disks); i++) {
		struct json_object *d = json_object_array_get_idx(disks, i);
		const char *name = qmp_str(d, "device");

		if (!json_object_object_get_ex(d, "inserted", &inserted) ||
		    qmp_bool(inserted, "ro"))
			continue;
		if (!*name)
			name = qmp_str(d, "qdev");
		rc = kc_fail(err, EOPNOTSUPP,
			     "disk %s is writable: its contents are not replicated, and a guest that is resumed from an epoch would find a disk of later.  Make it read-only, or say --disk external if storage goes back to the same epoch by other means",
			     name);
	}
	json_object_put(disks);
	return rc;
}
