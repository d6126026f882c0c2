// SPDX-License-Identifier: GPL-2.0-only
/*
 * What daemons tell about themselves, and the socket on which they do.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <json-c/json.h>

#include "harness.h"
#include "status.h"
#include "stream_tests.h"

void test_status(void)
{
	const uint64_t us[KC_PAUSE_PARTS] = { 10, 200, 3000, 400, 50 };
	const uint64_t longest[KC_PAUSE_PARTS] = { 1000, 0, 0, 0, 0 };
	struct kc_sink_stats stats = {
		.epoch_sent = 3, .epoch_acked = 2, .pages = 100, .wire_bytes = 4096
	};
	struct kc_status *st = kc_status_new("protect", "a \"guest\"");
	struct json_object *o, *v, *w;
	struct kc_ctl *ctl;
	char *text, *p;
	unsigned int i;

	for (i = 0; i < 100; i++)
		kc_status_pause(st, us);
	kc_status_pause(st, longest);
	kc_status_epoch(st, 2, kc_now_us());
	kc_status_epoch(st, 3, kc_now_us());
	kc_status_sink(st, &stats);
	kc_status_sink(st, NULL);
	kc_status_sink(st, &stats);
	ctl = kc_ctl_start(path_of("ctl"), st, NULL, NULL, &err);
	CHECK(ctl, "%s", err.text);
	CHECK(!kc_ctl_start(path_of("ctl"), st, NULL, NULL, &err), "two daemons at one socket");
	OK(kc_ctl_request(path_of("ctl"), "status json", &text, &err));
	o = json_tokener_parse(text);
	CHECK(o, "no JSON: %s", text);
	CHECK(json_object_object_get_ex(o, "pages", &v) && json_object_get_int(v) == 200,
	      "pages: %s", text);
	CHECK(json_object_object_get_ex(o, "lag_s", &v) && json_object_get_double(v) >= 0,
	      "lag: %s", text);
	CHECK(json_object_object_get_ex(o, "pause", &v) &&
		      json_object_object_get_ex(v, "state", &w) &&
		      json_object_object_get_ex(w, "p50_us", &v),
	      "pause: %s", text);
	CHECK(json_object_get_int(v) >= 3000 && json_object_get_int(v) <= 3375, "p50 is %s",
	      json_object_get_string(v));
	json_object_put(o);
	free(text);
	OK(kc_ctl_request(path_of("ctl"), "status", &text, &err));
	CHECK(strstr(text, "harvest") && strstr(text, "acknowledged 2"), "text: %s", text);
	free(text);
	OK(kc_ctl_request(path_of("ctl"), "status prometheus", &text, &err));
	CHECK(strstr(text, "guest=\"a \\\"guest\\\"\"") &&
		      strstr(text, "kvm_checkpoint_pages_total 200\n"),
	      "prometheus: %s", text);
	/* Each line is a comment or a name, perhaps labels, and a number. */
	for (p = strtok(text, "\n"); p; p = strtok(NULL, "\n")) {
		char *end, *space = strrchr(p, ' ');

		if (*p == '#')
			continue;
		CHECK(space && !strncmp(p, "kvm_checkpoint_", 15), "line \"%s\"", p);
		strtod(space + 1, &end);
		CHECK(!*end, "line \"%s\"", p);
	}
	free(text);
	kc_ctl_stop(ctl);
	kc_status_free(st);
	CHECK(run("status", path_of("ctl"), NULL) == 1, "a daemon that is gone has a status");
}

/* A daemon that does not get round to its clients: neither is it waited for, nor replaced. */
void test_full_queue(void)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	struct kc_status *st = kc_status_new("protect", "guest");
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), fd = -1, rc = 0;
	char *text;

	snprintf(sun.sun_path, sizeof(sun.sun_path), "%s/ctl", dir);
	CHECK(listener >= 0 && !bind(listener, (struct sockaddr *)&sun, sizeof(sun)) &&
	      !listen(listener, 1), "cannot listen on %s: %s", sun.sun_path, strerror(errno));
	while (!rc) {
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		CHECK(fd >= 0, "its queue is never full");
		rc = connect(fd, (struct sockaddr *)&sun, sizeof(sun));
	}
	CHECK(errno == EAGAIN, "cannot fill its queue: %s", strerror(errno));
	close(fd);
	rc = kc_ctl_request(sun.sun_path, "status", &text, &err);
	CHECK(rc == -ETIMEDOUT && strstr(err.text, "does not answer"), "%d: %s", rc, err.text);
	CHECK(!kc_ctl_start(sun.sun_path, st, NULL, NULL, &err), "two daemons at one socket");
	CHECK(strstr(err.text, "another daemon listens there"), "it says \"%s\"", err.text);
	CHECK(exists(sun.sun_path), "it removed the other's socket");
	kc_status_free(st);
	close(listener);
}
