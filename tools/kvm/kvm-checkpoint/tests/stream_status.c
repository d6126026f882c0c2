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
	char labels[PATH_MAX + 100], line[PATH_MAX + 200];
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
	snprintf(labels, sizeof(labels),
		 "{role=\"protect\",guest=\"a \\\"guest\\\"\",socket=\"%s\"", path_of("ctl"));
	snprintf(line, sizeof(line), "kvm_checkpoint_pages_total%s} 200\n", labels);
	CHECK(strstr(text, line), "prometheus: %s", text);
	/* Each line is a comment or a name, the daemon's labels, perhaps more, and a number. */
	for (p = strtok(text, "\n"); p; p = strtok(NULL, "\n")) {
		char *end, *space = strrchr(p, ' ');

		if (*p == '#')
			continue;
		CHECK(space && !strncmp(p, "kvm_checkpoint_", 15) && strstr(p, labels),
		      "line \"%s\"", p);
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

/* So many clients that say nothing are in nobody's way; nor one that does not take its answer. */
void test_idle_clients(void)
{
	struct sockaddr_un sun = { .sun_family = AF_UNIX };
	struct kc_status *st = kc_status_new("protect", "guest");
	int fds[40], i, n = sizeof(fds) / sizeof(fds[0]);
	struct kc_ctl *ctl;
	uint64_t t, least = UINT64_MAX;
	char *text, c;

	snprintf(sun.sun_path, sizeof(sun.sun_path), "%s/ctl", dir);
	ctl = kc_ctl_start(sun.sun_path, st, NULL, NULL, &err);
	CHECK(ctl, "%s", err.text);
	for (i = 0; i < n; i++) {
		fds[i] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		CHECK(fds[i] >= 0 && !connect(fds[i], (struct sockaddr *)&sun, sizeof(sun)),
		      "cannot connect: %s", strerror(errno));
		CHECK(i % 3 || write(fds[i], "sta", 3) == 3, "cannot write: %s", strerror(errno));
		CHECK(i % 3 != 1 || write(fds[i], "status json\n", 12) == 12, "cannot write: %s",
		      strerror(errno));
		t = kc_now_us();
		OK(kc_ctl_request(sun.sun_path, "status", &text, &err));
		t = kc_now_us() - t;
		if (i >= n / 2 && t < least)
			least = t;
		free(text);
	}
	/* Each of them would have cost each request two seconds; a busy machine does not all of them. */
	CHECK(least < 1500000, "a client waited for %" PRIu64 " us", least);
	/* They are not kept for ever. */
	for (i = 0; i < n; i++) {
		struct pollfd p = { .fd = fds[i], .events = POLLIN };

		while (poll(&p, 1, 20000) == 1 && read(fds[i], &c, 1) == 1)
			;
		CHECK(p.revents, "client %d is kept", i);
		close(fds[i]);
	}
	kc_ctl_stop(ctl);
	kc_status_free(st);
}

/* A text file collector takes what several daemons say, also of guests without a name. */
void test_prometheus(void)
{
	const char *names[] = { "web", "", "" }, *roles[] = { "protect", "protect", "standby" };
	char path[3][PATH_MAX], *text, *p, *end, seen[400][160];
	struct kc_status *st[3];
	struct kc_ctl *ctl[3];
	unsigned int i, n = 0, helps = 0, pages = 0;
	size_t len;

	for (i = 0; i < 3; i++) {
		snprintf(path[i], sizeof(path[i]), "%s/ctl%u", dir, i);
		st[i] = kc_status_new(roles[i], names[i]);
		ctl[i] = kc_ctl_start(path[i], st[i], NULL, NULL, &err);
		CHECK(ctl[i], "%s", err.text);
	}
	/* Only this one has a lag. */
	kc_status_epoch(st[2], 7, kc_now_us());
	kc_status_sink(st[2], &(struct kc_sink_stats){ .epoch_acked = 7, .epoch_sent = 7 });
	CHECK(!run("status", "--prometheus", path[0], path[1], path[2], NULL), "status fails");
	read_all(path_of("log"), (uint8_t **)&text, &len);
	text[len] = '\0';
	for (p = strtok(text, "\n"); p; p = strtok(NULL, "\n")) {
		/* A series or a comment: what is before the value, or behind the name. */
		if (!strncmp(p, "# HELP ", 7) || !strncmp(p, "# TYPE ", 7))
			end = strchr(p + 7, ' ');
		else
			end = strrchr(p, ' ');
		CHECK(end && end - p < (long)sizeof(seen[0]) && n < 400, "line \"%s\"", p);
		*end = '\0';
		for (i = 0; i < n; i++)
			CHECK(strcmp(seen[i], p), "\"%s\" is there twice", p);
		strcpy(seen[n++], p);
		helps += !strncmp(p, "# HELP ", 7);
		pages += !strncmp(p, "kvm_checkpoint_pages_total{", 27);
		/* A series stands behind the comment of its own metric. */
		if (*p == '#')
			continue;
		for (i = n; i-- > 0 && strncmp(seen[i], "# TYPE ", 7); )
			;
		CHECK(!strncmp(seen[i] + 7, p, strlen(seen[i] + 7)), "%s is behind %s", p, seen[i]);
	}
	CHECK(pages == 3 && helps > 10, "%u series of pages, %u metrics", pages, helps);
	CHECK(log_has("kvm_checkpoint_lag_seconds"), "the lag is missing");
	free(text);
	/* One that is gone takes nothing from the others. */
	kc_ctl_stop(ctl[1]);
	unlink(path_of("log"));
	CHECK(run("status", "--prometheus", path[0], path[1], path[2], NULL) == 1, "it fails not");
	CHECK(log_has("cannot reach a daemon") && log_has("guest=\"web\"") && log_has("ctl2"),
	      "what is there is not told");
	kc_ctl_stop(ctl[0]);
	kc_ctl_stop(ctl[2]);
	for (i = 0; i < 3; i++)
		kc_status_free(st[i]);
}
