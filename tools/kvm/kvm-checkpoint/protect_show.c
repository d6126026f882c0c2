// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint protect: what it shows of its epochs, for people or as JSON.
 */
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include "protect.h"

/*
 * Whoever reads this may be slow, or have stopped; a primary that waits for them looks dead to its
 * standby.
 */
static void show(struct protect *p, const char *text, const char *end)
{
	if (!kc_can_write(STDOUT_FILENO)) {
		p->unread++;
		return;
	}
	if (p->unread && p->json)
		printf("{\"event\":\"lost\",\"lines\":%u}\n", p->unread);
	else if (p->unread)
		printf("(%u lines that nobody has read are left out)\n", p->unread);
	p->unread = 0;
	fputs(text, stdout);
	fputs(end, stdout);
	fflush(stdout);
}

void kc_showf(struct protect *p, const char *fmt, ...)
{
	char text[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	show(p, text, "");
}

void kc_show_json(struct protect *p, struct json_object *o)
{
	if (p->json)
		show(p, json_object_to_json_string_ext(o, JSON_C_TO_STRING_PLAIN), "\n");
	json_object_put(o);
}

void kc_show_add(struct json_object *o, const char *name, uint64_t value)
{
	json_object_object_add(o, name, json_object_new_uint64(value));
}

struct json_object *kc_show_event(const char *name)
{
	struct json_object *o = json_object_new_object();

	json_object_object_add(o, "event", json_object_new_string(name));
	return o;
}

void kc_show_progress(struct protect *p, const char *what, uint64_t done, uint64_t total)
{
	uint64_t now = kc_now_us(), spent = now - p->started_us, rate, left;
	bool end = done == total;

	kc_status_progress(p->status, done, end ? 0 : total);
	if (now - p->shown_us < (p->tty || p->json ? 200000 : 5000000) && !end)
		return;
	p->shown_us = now;
	rate = spent ? done * 1000000 / spent : 0;
	left = rate ? (total - done) / rate : 0;
	if (p->json) {
		struct json_object *o = kc_show_event("progress");

		json_object_object_add(o, "phase", json_object_new_string(what));
		kc_show_add(o, "pages", done);
		kc_show_add(o, "total", total);
		kc_show_add(o, "pages_per_second", rate);
		kc_show_add(o, "seconds_left", left);
		kc_show_json(p, o);
		return;
	}
	kc_showf(p, "%s%s: %3lu%% of %lu MiB, %lu MiB/s, %lu s left%s", p->tty ? "\r\033[K" : "", what,
	      total ? done * 100 / total : 100, total >> 8, rate >> 8, left,
	      p->tty && !end ? "" : "\n");
}

void kc_show_epoch(struct protect *p)
{
	static const char * const parts[] = {
		[KC_PAUSE_STOP] = "stop_us",
		[KC_PAUSE_HARVEST] = "harvest_us",
		[KC_PAUSE_STATE] = "state_us",
		[KC_PAUSE_COPY] = "copy_us",
		[KC_PAUSE_RESUME] = "resume_us",
	};
	struct guest_epoch *e = &p->epoch;
	struct kc_sink_stats stats;
	struct json_object *o;
	uint64_t sum = 0, holes = 0;
	size_t k;
	int i;

	if (!p->json)
		return;
	kc_sink_stats(p->sink, &stats);
	o = kc_show_event("epoch");
	kc_show_add(o, "epoch", p->nr);
	kc_show_add(o, "taken_us", e->taken_us);
	kc_show_add(o, "pages", e->copy.nr);
	for (k = 0; k < e->copy.nr_holes; k++)
		holes += e->copy.holes[k].n;
	kc_show_add(o, "hole_pages", holes);
	kc_show_add(o, "unused_pages", p->guest.states.left_out - p->left_out);
	p->left_out = p->guest.states.left_out;
	kc_show_add(o, "state_bytes", e->state_len);
	kc_show_add(o, "wire_bytes", stats.wire_bytes);
	for (i = 0; i < KC_PAUSE_PARTS; i++) {
		kc_show_add(o, parts[i], e->us[i]);
		sum += e->us[i];
	}
	kc_show_add(o, "pause_us", sum);
	kc_show_add(o, "done_us", kc_now_us());
	json_object_object_add(o, "was_running", json_object_new_boolean(e->was_running));
	kc_show_json(p, o);
}

void kc_show_protected(struct protect *p, const struct first *f)
{
	struct json_object *o = kc_show_event("synced");

	kc_show_add(o, "epoch", f->nr);
	kc_show_add(o, "pages", f->sent);
	kc_show_add(o, "unused", f->unused);
	if (f->compared)
		kc_show_add(o, "differed", f->differed);
	json_object_object_add(o, "resync", json_object_new_boolean(f->compared));
	json_object_object_add(o, "continued", json_object_new_boolean(f->continued));
	kc_show_json(p, o);
	if (!p->json && f->continued)
		kc_showf(p, "protected since epoch %lu: %lu pages were sent again\n", f->nr, f->sent);
	else if (!p->json && f->compared)
		kc_showf(p, "protected since epoch %lu: %lu pages differed, %lu were sent\n", f->nr,
			 f->differed, f->sent);
	else if (!p->json)
		kc_showf(p, "protected since epoch %lu: %lu pages were sent\n", f->nr, f->sent);
	if (!p->json && f->unused)
		kc_showf(p, "%lu pages are left out, as the guest does not use them\n", f->unused);
}
