// SPDX-License-Identifier: GPL-2.0-only
/*
 * QEMU on top of a checkpoint.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "launch.h"
#include "process.h"

/* What is added to the command, at most */
#define MORE_ARGS 8

static char **make_argv(const struct kc_launch *l, bool trial, int monitor, struct kc_err *err)
{
	char **argv, *s;
	int n, k;

	for (n = 0; l->argv[n]; n++)
		;
	argv = calloc(n + MORE_ARGS + 1, sizeof(*argv));
	if (!argv)
		goto no_memory;
	for (n = 0; l->argv[n]; n++) {
		argv[n] = kc_expand(l, l->argv[n], err);
		if (!argv[n]) {
			kc_free_argv(argv);
			return NULL;
		}
		if (trial) {
			s = kc_make_private(argv[n]);
			free(argv[n]);
			argv[n] = s;
			if (!s)
				goto no_memory;
		}
	}
	if (monitor < 0)
		return argv;
	k = n;
	argv[k++] = strdup("-S");
	argv[k++] = strdup("-incoming");
	argv[k++] = strdup("defer");
	argv[k++] = strdup("-chardev");
	if (asprintf(&argv[k++], "socket,id=kvm-checkpoint,fd=%d", monitor) < 0)
		argv[k - 1] = NULL;
	argv[k++] = strdup("-mon");
	argv[k++] = strdup("chardev=kvm-checkpoint,mode=control");
	while (n < k && argv[n])
		n++;
	if (n == k)
		return argv;
no_memory:
	kc_fail(err, ENOMEM, "out of memory");
	kc_free_argv(argv);
	return NULL;
}

/* What it said before it ended: the last lines for @err, and all of it for our log */
static void explain(struct kc_qemu *q, struct kc_err *err)
{
	char text[4096] = "", all[4096] = "", *line;
	size_t len = 0;
	ssize_t n;

	if (q->errors < 0)
		return;
	n = pread(q->errors, text, sizeof(text) - 1, 0);
	text[n > 0 ? n : 0] = '\0';
	for (line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
		kc_log(KC_LOG_WARN, "QEMU says: %.300s", line);
		len += snprintf(all + len, sizeof(all) - len, "%s%s", len ? "; " : "", line);
		if (len >= sizeof(all))
			len = sizeof(all) - 1;
	}
	if (len)
		kc_fail(err, EIO, "%s%s", len > 350 ? "..." : "", all + (len > 350 ? len - 350 : 0));
}

static int call(struct kc_qemu *q, const char *command, struct json_object *args,
		struct kc_err *err)
{
	return qmp_call(&q->qmp, command, args, NULL, err);
}

static int set_capabilities(struct kc_qemu *q, char **caps, bool trial, struct kc_err *err)
{
	/* With that and -S disks are left to whom they belong. */
	static char * const only_trial[] = { "late-block-activate", NULL };
	struct json_object *args, *list = json_object_new_array(), *cap;
	char * const *sets[] = { caps, trial ? only_trial : NULL };
	unsigned int i;

	for (i = 0; i < 2; i++) {
		char * const *c;

		for (c = sets[i]; c && *c; c++) {
			cap = json_object_new_object();
			json_object_object_add(cap, "capability", json_object_new_string(*c));
			json_object_object_add(cap, "state", json_object_new_boolean(true));
			json_object_array_add(list, cap);
		}
	}
	if (!json_object_array_length(list)) {
		json_object_put(list);
		return 0;
	}
	args = json_object_new_object();
	json_object_object_add(args, "capabilities", list);
	return call(q, "migrate-set-capabilities", args, err);
}

/* A switch that heard where the guest is would send its packets there. */
static int be_quiet(struct kc_qemu *q, struct kc_err *err)
{
	struct json_object *args = json_object_new_object();

	json_object_object_add(args, "announce-rounds", json_object_new_int(0));
	return call(q, "migrate-set-parameters", args, err);
}

int kc_qemu_start(const struct kc_launch *l, bool trial, struct kc_qemu *q, struct kc_err *err)
{
	int rc = 0, sv[2] = { -1, -1 };
	char **argv = NULL;

	*q = (struct kc_qemu){ .errors = -1, .guard = -1, .qmp.fd = -1 };
	if (!l->bare && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sv))
		return kc_fail(err, errno, "cannot make a socket: %s", strerror(errno));
	if (trial)
		q->errors = memfd_create("kvm-checkpoint", MFD_CLOEXEC);
	argv = make_argv(l, trial, sv[1], err);
	if (!argv)
		rc = -EINVAL;
	if (!rc)
		/* One that waits holds memory and files: it must not be left when we are gone */
		rc = l->committed || trial ?
		     kc_start(argv, sv[1], q->errors, OWN_SESSION, l->bare ? NULL : &q->guard,
			      &q->pid, err) :
		     kc_start(argv, sv[1], q->errors, WITH_US, NULL, &q->pid, err);
	kc_free_argv(argv);
	if (sv[1] >= 0)
		close(sv[1]);
	if (rc) {
		q->pid = 0;
		q->guard = -1;
		if (sv[0] >= 0)
			close(sv[0]);
		kc_qemu_kill(q);
		return rc;
	}
	if (l->bare)
		return 0;
	rc = qmp_adopt(&q->qmp, sv[0], l->timeout_ms, l->idle, l->idle_ctx, err);
	if (!rc)
		rc = set_capabilities(q, l->capabilities, trial, err);
	if (!rc && trial)
		rc = be_quiet(q, err);
	if (rc) {
		explain(q, err);
		kc_qemu_kill(q);
	}
	return rc;
}

static int status_is(struct kc_qemu *q, const char *status, bool *is, struct kc_err *err)
{
	struct json_object *o = NULL;
	int rc = qmp_call(&q->qmp, "query-status", NULL, &o, err);

	if (!rc)
		*is = !strcmp(qmp_str(o, "status"), status);
	json_object_put(o);
	return rc;
}

static int load(struct kc_qemu *q, const struct kc_launch *l, struct kc_err *err)
{
	uint64_t until = kc_now_us() + l->timeout_ms * 1000ull;
	struct json_object *args;
	bool is = true;
	int fd, rc;

	fd = open(l->state, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return kc_fail(err, errno, "cannot open %s: %s", l->state, strerror(errno));
	args = json_object_new_object();
	json_object_object_add(args, "fdname", json_object_new_string("kvm-checkpoint"));
	rc = qmp_send(&q->qmp, "getfd", args, fd, err);
	if (!rc)
		rc = qmp_receive(&q->qmp, "getfd", NULL, err);
	close(fd);
	if (rc)
		return rc;
	args = json_object_new_object();
	json_object_object_add(args, "uri", json_object_new_string("fd:kvm-checkpoint"));
	rc = call(q, "migrate-incoming", args, err);
	while (!rc) {
		rc = status_is(q, "inmigrate", &is, err);
		if (rc || !is)
			break;
		if (kc_now_us() > until)
			return kc_fail(err, ETIMEDOUT, "QEMU did not load the state in time");
		poll(NULL, 0, 2);
	}
	return rc;
}

int kc_qemu_load(struct kc_qemu *q, const struct kc_launch *l, struct kc_err *err)
{
	int rc;

	/* It may have been started for another caller. */
	q->qmp.timeout_ms = l->timeout_ms;
	q->qmp.idle = l->idle;
	q->qmp.idle_ctx = l->idle_ctx;
	rc = load(q, l, err);
	if (rc)
		explain(q, err);
	return rc;
}

bool kc_qemu_lives(struct kc_qemu *q)
{
	if (q->pid && waitpid(q->pid, NULL, WNOHANG)) {
		q->pid = 0;
		kc_qemu_kill(q);
	}
	return q->pid;
}

void kc_qemu_kill(struct kc_qemu *q)
{
	qmp_close(&q->qmp);
	if (q->errors >= 0)
		close(q->errors);
	if (q->pid)
		kc_kill_child(q->pid);
	if (q->guard >= 0)
		close(q->guard);
	*q = (struct kc_qemu){ .errors = -1, .guard = -1, .qmp.fd = -1 };
}

static int let_run(struct kc_qemu *q, const struct kc_launch *l, struct kc_err *err)
{
	bool is = false;
	int rc;

	q->qmp.timeout_ms = l->timeout_ms;
	rc = call(q, "cont", NULL, err);
	if (!rc)
		rc = status_is(q, "running", &is, err);
	if (!rc && !is)
		rc = kc_fail(err, EIO, "its status is not \"running\"");
	if (!rc)
		return 0;
	kc_fail(err, -rc, "QEMU loaded the state, but the guest does not run: %s", err->text);
	/* There is no other copy of it any more, and what keeps it, as its disk, may be mended. */
	return l->committed ? 1 : rc;
}

int kc_launch(const struct kc_launch *l, struct kc_qemu *q, struct kc_err *err)
{
	int rc = 0;

	/* Once the command has the files, they are its own. */
	if (l->bare && l->committed)
		rc = l->committed(l->ctx, err);
	if (!rc && !q->pid)
		rc = kc_qemu_start(l, false, q, err);
	if (rc || l->bare)
		return rc;
	rc = kc_qemu_load(q, l, err);
	/* Until here the guest has not run, because of -S, and the RAM is as it was. */
	if (!rc && l->committed) {
		kc_guard_release(q->guard);
		q->guard = -1;
		rc = l->committed(l->ctx, err);
	}
	if (!rc && !l->stopped)
		rc = let_run(q, l, err);
	if (rc < 0)
		kc_qemu_kill(q);
	return rc;
}
