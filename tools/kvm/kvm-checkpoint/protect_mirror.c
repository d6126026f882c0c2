// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint protect: QEMU's jobs that mirror the guest's disks.
 */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "protect.h"

/* A job and its target have the same name */
static void add_name(struct json_object *o, const char *key, unsigned int disk)
{
	char name[sizeof(JOB_NAME) + 12];

	snprintf(name, sizeof(name), JOB_NAME "%u", disk);
	json_object_object_add(o, key, json_object_new_string(name));
}

static struct json_object *named(const char *key, unsigned int disk)
{
	struct json_object *o = json_object_new_object();

	add_name(o, key, disk);
	return o;
}

int kc_mirror_end(struct protect *p, struct kc_err *err)
{
	struct guest *g = &p->guest;
	uint64_t until = kc_now_us() + 5000000;
	struct json_object *o;
	unsigned int i;
	int rc = 0;

	for (i = 0; i < g->id.nr_disks; i++) {
		o = named("device", i);
		json_object_object_add(o, "force", json_object_new_boolean(true));
		rc = qmp_call(&g->qmp, "block-job-cancel", o, NULL, err);
		/* There is none, mostly */
		if (rc && rc != -EREMOTEIO)
			return rc;
		do {
			rc = qmp_call(&g->qmp, "blockdev-del", named("node-name", i), NULL, err);
			if (rc != -EREMOTEIO || !strstr(err->text, "in use"))
				break;
			usleep(10000);
		} while (kc_now_us() < until);
		if (rc && (rc != -EREMOTEIO || strstr(err->text, "in use")))
			return rc;
	}
	return 0;
}

static int begin_job(struct protect *p, unsigned int i, struct kc_err *err)
{
	struct guest *g = &p->guest;
	struct json_object *o = named("node-name", i), *server = json_object_new_object();
	char export[12];
	int rc;

	snprintf(export, sizeof(export), "%u", i);
	json_object_object_add(server, "type", json_object_new_string("unix"));
	json_object_object_add(server, "path", json_object_new_string(nbd_path(p->disks.nbd)));
	json_object_object_add(o, "driver", json_object_new_string("nbd"));
	json_object_object_add(o, "server", server);
	json_object_object_add(o, "export", json_object_new_string(export));
	rc = qmp_call(&g->qmp, "blockdev-add", o, NULL, err);
	if (rc)
		return rc;
	o = named("job-id", i);
	json_object_object_add(o, "device", json_object_new_string(g->disk_nodes[i]));
	add_name(o, "target", i);
	json_object_object_add(o, "sync", json_object_new_string("full"));
	json_object_object_add(o, "copy-mode", json_object_new_string("write-blocking"));
	json_object_object_add(o, "on-target-error", json_object_new_string("stop"));
	json_object_object_add(o, "granularity", json_object_new_int(KC_PAGE_SIZE));
	return qmp_call(&g->qmp, "blockdev-mirror", o, NULL, err);
}

/* With the guest stopped, or a write that is under way would be neither copied nor mirrored */
int kc_mirror_begin(struct protect *p, struct kc_err *err)
{
	struct guest *g = &p->guest;
	struct kc_err why;
	unsigned int i;
	int rc, cont;

	rc = guest_send_stop(g, "x-checkpoint-stop", err);
	if (!rc)
		rc = qmp_receive(&g->qmp, "x-checkpoint-stop", NULL, err);
	if (rc)
		return rc;
	for (i = 0; i < g->id.nr_disks && !rc; i++)
		rc = begin_job(p, i, err);
	cont = qmp_call(&g->qmp, "x-checkpoint-cont", NULL, NULL, &why);
	if (!rc && cont)
		return kc_fail(err, -cont, "%s", why.text);
	return rc;
}

int kc_mirror_look(struct protect *p, struct mirror *m, struct kc_err *err)
{
	struct json_object *jobs = NULL;
	unsigned int nr = 0;
	size_t i;
	int rc;

	*m = (struct mirror){ .ready = true };
	rc = guest_call_list(&p->guest, "query-block-jobs", &jobs, err);
	if (rc)
		return rc;
	for (i = 0; i < json_object_array_length(jobs); i++) {
		struct json_object *j = json_object_array_get_idx(jobs, i);

		if (strncmp(qmp_str(j, "device"), JOB_NAME, strlen(JOB_NAME)))
			continue;
		nr++;
		m->ready = m->ready && qmp_bool(j, "ready");
		m->paused = m->paused || qmp_bool(j, "paused");
		m->done += qmp_u64(j, "offset");
		m->total += qmp_u64(j, "len");
	}
	json_object_put(jobs);
	m->ready = m->ready && nr == p->guest.id.nr_disks;
	return 0;
}

/* That of a job has no name */
static uint64_t dirty_bytes(struct json_object *node)
{
	struct json_object *list, *name;
	uint64_t bytes = 0;
	size_t i;

	if (!json_object_object_get_ex(node, "dirty-bitmaps", &list) ||
	    !json_object_is_type(list, json_type_array))
		return 0;
	for (i = 0; i < json_object_array_length(list); i++) {
		struct json_object *b = json_object_array_get_idx(list, i);

		if (!json_object_object_get_ex(b, "name", &name))
			bytes += qmp_u64(b, "count");
	}
	return bytes;
}

int kc_mirror_is_clean(struct protect *p, bool *clean, struct kc_err *err)
{
	struct json_object *list = NULL, *inserted;
	struct guest *g = &p->guest;
	unsigned int found = 0, d;
	size_t i;
	int rc;

	*clean = false;
	rc = guest_call_list(g, "query-block", &list, err);
	if (rc)
		return rc;
	for (i = 0; i < json_object_array_length(list); i++) {
		struct json_object *o = json_object_array_get_idx(list, i);
		const char *name = qmp_str(o, "device");

		/* The job's own node is left out of this: it is the disk, which has the bitmap */
		if (!json_object_object_get_ex(o, "inserted", &inserted))
			continue;
		name = *name ? name : qmp_str(inserted, "node-name");
		for (d = 0; d < g->id.nr_disks; d++) {
			if (!strcmp(name, g->disk_nodes[d]))
				found += !dirty_bytes(inserted);
		}
	}
	json_object_put(list);
	*clean = found == g->id.nr_disks;
	return 0;
}

int kc_mirror_resume(struct protect *p, struct kc_err *err)
{
	unsigned int i;
	int rc;

	for (i = 0; i < p->guest.id.nr_disks; i++) {
		rc = qmp_call(&p->guest.qmp, "block-job-resume", named("device", i), NULL, err);
		/* It goes on already */
		if (rc && rc != -EREMOTEIO)
			return rc;
	}
	return 0;
}
