// SPDX-License-Identifier: GPL-2.0-only
/*
 * Status of a daemon.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <json-c/json.h>

#include "status.h"

static const char * const part_names[KC_PAUSE_PARTS + 1] = {
	"stop", "harvest", "state", "copy", "resume", "total"
};

/* --- Histograms ----------------------------------------------------------- */

/* Eight buckets for each power of two: a quantile is at most an eighth too high. */
#define SUB_BITS 3
#define BUCKETS ((64 - SUB_BITS + 1) << SUB_BITS)

struct hist {
	uint64_t count, sum, max;
	uint32_t bucket[BUCKETS];
};

static unsigned int bucket_of(uint64_t v)
{
	unsigned int shift;

	if (v < 1u << SUB_BITS)
		return v;
	shift = 63 - __builtin_clzll(v) - SUB_BITS;
	return ((shift + 1) << SUB_BITS) + ((v >> shift) & ((1u << SUB_BITS) - 1));
}

/* The highest value of a bucket. */
static uint64_t bucket_end(unsigned int b)
{
	unsigned int shift;

	if (b < 1u << SUB_BITS)
		return b;
	shift = (b >> SUB_BITS) - 1;
	return ((((uint64_t)b & ((1u << SUB_BITS) - 1)) + (1u << SUB_BITS) + 1) << shift) - 1;
}

static void hist_add(struct hist *h, uint64_t v)
{
	h->count++;
	h->sum += v;
	if (v > h->max)
		h->max = v;
	h->bucket[bucket_of(v)]++;
}

static uint64_t hist_quantile(const struct hist *h, double q)
{
	uint64_t want = h->count * q, seen = 0, v;
	unsigned int b;

	for (b = 0; b < BUCKETS; b++) {
		seen += h->bucket[b];
		if (seen > want) {
			v = bucket_end(b);
			return v < h->max ? v : h->max;
		}
	}
	return h->max;
}

/* --- Status --------------------------------------------------------------- */

#define RECENT 256u

struct kc_status {
	pthread_mutex_t lock;
	char role[16], guest[KC_NAME_SIZE], phase[64], socket[128];
	char peer[300];
	char trouble[sizeof(((struct kc_err *)0)->text)];
	uint64_t started_us, done, total, resyncs;
	enum kc_output output;
	struct hist pause[KC_PAUSE_PARTS + 1];
	/* Of sinks that were closed, and of the one that is open. */
	struct kc_sink_stats closed, sink;
	/* When the last epochs were taken. */
	struct { uint64_t nr, us; } taken[RECENT];
	uint64_t epoch;
};

struct kc_status *kc_status_new(const char *role, const char *guest)
{
	struct kc_status *st = calloc(1, sizeof(*st));

	if (!st)
		return NULL;
	pthread_mutex_init(&st->lock, NULL);
	snprintf(st->role, sizeof(st->role), "%s", role);
	snprintf(st->guest, sizeof(st->guest), "%s", guest);
	snprintf(st->phase, sizeof(st->phase), "starting");
	st->started_us = kc_now_us();
	return st;
}

void kc_status_free(struct kc_status *st)
{
	if (st)
		pthread_mutex_destroy(&st->lock);
	free(st);
}

void kc_status_guest(struct kc_status *st, const char *guest)
{
	pthread_mutex_lock(&st->lock);
	snprintf(st->guest, sizeof(st->guest), "%s", guest);
	pthread_mutex_unlock(&st->lock);
}

void kc_status_socket(struct kc_status *st, const char *path)
{
	pthread_mutex_lock(&st->lock);
	snprintf(st->socket, sizeof(st->socket), "%s", path);
	pthread_mutex_unlock(&st->lock);
}

void kc_status_phase(struct kc_status *st, const char *phase)
{
	pthread_mutex_lock(&st->lock);
	snprintf(st->phase, sizeof(st->phase), "%s", phase);
	pthread_mutex_unlock(&st->lock);
}

void kc_status_peer(struct kc_status *st, const char *text)
{
	pthread_mutex_lock(&st->lock);
	snprintf(st->peer, sizeof(st->peer), "%s", text ? text : "");
	pthread_mutex_unlock(&st->lock);
}

void kc_status_trouble(struct kc_status *st, const char *text)
{
	pthread_mutex_lock(&st->lock);
	snprintf(st->trouble, sizeof(st->trouble), "%s", text ? text : "");
	pthread_mutex_unlock(&st->lock);
}

void kc_status_progress(struct kc_status *st, uint64_t done, uint64_t total)
{
	pthread_mutex_lock(&st->lock);
	st->done = done;
	st->total = total;
	pthread_mutex_unlock(&st->lock);
}

void kc_status_pause(struct kc_status *st, const uint64_t us[KC_PAUSE_PARTS])
{
	uint64_t total = 0;
	unsigned int i;

	pthread_mutex_lock(&st->lock);
	for (i = 0; i < KC_PAUSE_PARTS; i++) {
		hist_add(&st->pause[i], us[i]);
		total += us[i];
	}
	hist_add(&st->pause[KC_PAUSE_PARTS], total);
	pthread_mutex_unlock(&st->lock);
}

void kc_status_epoch(struct kc_status *st, uint64_t nr, uint64_t taken_us)
{
	pthread_mutex_lock(&st->lock);
	st->epoch = nr;
	st->taken[nr % RECENT].nr = nr;
	st->taken[nr % RECENT].us = taken_us;
	pthread_mutex_unlock(&st->lock);
}

static void add_stats(struct kc_sink_stats *to, const struct kc_sink_stats *s)
{
	if (s->epoch_sent)
		to->epoch_sent = s->epoch_sent;
	if (s->epoch_acked)
		to->epoch_acked = s->epoch_acked;
	to->epochs += s->epochs;
	to->pages += s->pages;
	to->zero_pages += s->zero_pages;
	to->delta_pages += s->delta_pages;
	to->state_bytes += s->state_bytes;
	to->disk_bytes += s->disk_bytes;
	to->wire_bytes += s->wire_bytes;
	to->pack_us += s->pack_us;
	to->io_us += s->io_us;
	if (s->ack_us)
		to->ack_us = s->ack_us;
}

void kc_status_sink(struct kc_status *st, const struct kc_sink_stats *stats)
{
	pthread_mutex_lock(&st->lock);
	if (stats) {
		st->sink = *stats;
	} else {
		add_stats(&st->closed, &st->sink);
		memset(&st->sink, 0, sizeof(st->sink));
	}
	pthread_mutex_unlock(&st->lock);
}

void kc_status_output(struct kc_status *st, enum kc_output output)
{
	pthread_mutex_lock(&st->lock);
	st->output = output;
	pthread_mutex_unlock(&st->lock);
}

void kc_status_resync(struct kc_status *st)
{
	pthread_mutex_lock(&st->lock);
	st->resyncs++;
	pthread_mutex_unlock(&st->lock);
}

/* What there is to tell, computed under the lock. */
struct report {
	struct kc_sink_stats s;
	double uptime, lag, ratio;
	uint64_t raw_bytes;
};

static void make_report(const struct kc_status *st, struct report *r)
{
	uint64_t now = kc_now_us(), nr;

	r->s = st->closed;
	add_stats(&r->s, &st->sink);
	r->uptime = (now - st->started_us) / 1e6;
	r->raw_bytes = r->s.pages * KC_PAGE_SIZE + r->s.state_bytes + r->s.disk_bytes;
	r->ratio = r->s.wire_bytes ? (double)r->raw_bytes / r->s.wire_bytes : 0;
	nr = r->s.epoch_acked;
	r->lag = -1;
	if (nr && st->taken[nr % RECENT].nr == nr)
		r->lag = (now - st->taken[nr % RECENT].us) / 1e6;
	else if (nr && st->epoch >= nr + RECENT)
		r->lag = (now - st->taken[(st->epoch + 1) % RECENT].us) / 1e6;
}

static void print_text(FILE *f, const struct kc_status *st, const struct report *r)
{
	unsigned int i;

	fprintf(f, "%s %s%s%s, up %.0f s\n", st->role, st->phase, st->guest[0] ? ": guest " : "",
		st->guest, r->uptime);
	if (st->peer[0])
		fprintf(f, "peer      %s\n", st->peer);
	if (st->trouble[0])
		fprintf(f, "trouble   %s\n", st->trouble);
	if (st->total)
		fprintf(f, "progress  %" PRIu64 " of %" PRIu64 " pages, %.1f %%\n", st->done,
			st->total, 100.0 * st->done / st->total);
	if (st->output != KC_OUTPUT_UNKNOWN)
		fprintf(f, "network   %s\n", st->output == KC_OUTPUT_HELD ?
			"held back until its epoch is acknowledged" : "not held back");
	fprintf(f, "epoch     %" PRIu64 ", acknowledged %" PRIu64, st->epoch, r->s.epoch_acked);
	if (r->lag >= 0)
		fprintf(f, ", %.3f s behind the guest", r->lag);
	fprintf(f, "\nepochs    %" PRIu64 ", resyncs %" PRIu64 "\n", r->s.epochs, st->resyncs);
	fprintf(f, "pages     %" PRIu64, r->s.pages);
	if (!strcmp(st->role, "protect"))
		fprintf(f, " (%" PRIu64 " zero, %" PRIu64 " as differences)", r->s.zero_pages,
			r->s.delta_pages);
	if (r->s.disk_bytes)
		fprintf(f, "\ndisks     %" PRIu64 " bytes", r->s.disk_bytes);
	fprintf(f, "\nbytes     %" PRIu64 " as %" PRIu64 ", ratio %.2f\n", r->raw_bytes,
		r->s.wire_bytes, r->ratio);
	if (!strcmp(st->role, "protect"))
		fprintf(f,
			"time      %.3f s packing, %.3f s sending, last acknowledged after %.3f ms\n",
			r->s.pack_us / 1e6, r->s.io_us / 1e6, r->s.ack_us / 1e3);
	else
		fprintf(f, "time      %.3f s applying, %.3f ms for the last epoch\n",
			r->s.io_us / 1e6, r->s.ack_us / 1e3);
	if (!st->pause[KC_PAUSE_PARTS].count)
		return;
	fprintf(f, "pause, ms      p50      p99      max\n");
	for (i = 0; i <= KC_PAUSE_PARTS; i++)
		fprintf(f, "  %-8s %7.3f  %7.3f  %7.3f\n", part_names[i],
			hist_quantile(&st->pause[i], 0.5) / 1e3,
			hist_quantile(&st->pause[i], 0.99) / 1e3, st->pause[i].max / 1e3);
}

static void add_u64(struct json_object *o, const char *key, uint64_t v)
{
	json_object_object_add(o, key, json_object_new_uint64(v));
}

static void print_json(FILE *f, const struct kc_status *st, const struct report *r)
{
	struct json_object *o = json_object_new_object(), *pause = json_object_new_object(), *p;
	unsigned int i;

	json_object_object_add(o, "role", json_object_new_string(st->role));
	json_object_object_add(o, "guest", json_object_new_string(st->guest));
	json_object_object_add(o, "phase", json_object_new_string(st->phase));
	json_object_object_add(o, "peer", st->peer[0] ? json_object_new_string(st->peer) : NULL);
	json_object_object_add(o, "trouble",
			       st->trouble[0] ? json_object_new_string(st->trouble) : NULL);
	json_object_object_add(o, "uptime_s", json_object_new_double(r->uptime));
	add_u64(o, "progress_pages", st->done);
	add_u64(o, "total_pages", st->total);
	add_u64(o, "epoch", st->epoch);
	add_u64(o, "epoch_acknowledged", r->s.epoch_acked);
	json_object_object_add(o, "lag_s", r->lag < 0 ? NULL : json_object_new_double(r->lag));
	add_u64(o, "epochs", r->s.epochs);
	add_u64(o, "resyncs", st->resyncs);
	add_u64(o, "pages", r->s.pages);
	add_u64(o, "zero_pages", r->s.zero_pages);
	add_u64(o, "delta_pages", r->s.delta_pages);
	add_u64(o, "state_bytes", r->s.state_bytes);
	add_u64(o, "disk_bytes", r->s.disk_bytes);
	if (st->output != KC_OUTPUT_UNKNOWN)
		json_object_object_add(o, "network_held",
				       json_object_new_boolean(st->output == KC_OUTPUT_HELD));
	add_u64(o, "raw_bytes", r->raw_bytes);
	add_u64(o, "wire_bytes", r->s.wire_bytes);
	json_object_object_add(o, "ratio", json_object_new_double(r->ratio));
	add_u64(o, "pack_us", r->s.pack_us);
	add_u64(o, "io_us", r->s.io_us);
	add_u64(o, "ack_us", r->s.ack_us);
	for (i = 0; i <= KC_PAUSE_PARTS; i++) {
		p = json_object_new_object();
		add_u64(p, "count", st->pause[i].count);
		add_u64(p, "p50_us", hist_quantile(&st->pause[i], 0.5));
		add_u64(p, "p99_us", hist_quantile(&st->pause[i], 0.99));
		add_u64(p, "max_us", st->pause[i].max);
		add_u64(p, "sum_us", st->pause[i].sum);
		json_object_object_add(pause, part_names[i], p);
	}
	json_object_object_add(o, "pause", pause);
	fprintf(f, "%s\n", json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY));
	json_object_put(o);
}

/* A label; in its value backslash, quote and newline have to be escaped. */
static void print_label(FILE *f, const char *name, const char *s)
{
	fprintf(f, "%s=\"", name);
	for (; *s; s++) {
		if (*s == '\\' || *s == '"')
			fputc('\\', f);
		if (*s == '\n')
			fputs("\\n", f);
		else
			fputc(*s, f);
	}
	fputc('"', f);
}

/* Those that tell this daemon from all others of its host. */
static void print_labels(FILE *f, const struct kc_status *st)
{
	print_label(f, "role", st->role);
	print_label(f, ",guest", st->guest);
	print_label(f, ",socket", st->socket);
}

/* A series up to its value; @more: labels of its own, or NULL. */
static void series(FILE *f, const struct kc_status *st, const char *name, const char *more)
{
	fprintf(f, "kvm_checkpoint_%s{", name);
	print_labels(f, st);
	fprintf(f, "%s%s} ", more ? "," : "", more ? more : "");
}

static void metric(FILE *f, const char *name, const char *type, const char *help)
{
	fprintf(f, "# HELP kvm_checkpoint_%s %s\n# TYPE kvm_checkpoint_%s %s\n", name, help, name,
		type);
}

static void print_prometheus(FILE *f, const struct kc_status *st, const struct report *r)
{
	const struct { const char *name, *type, *help; double value;
	} simple[] = {
		{ "epoch", "gauge", "Last epoch taken.", st->epoch },
		{ "epoch_acknowledged", "gauge", "Last epoch that the receiver holds.",
		  r->s.epoch_acked },
		{ "epochs_total", "counter", "Epochs handed over.", r->s.epochs },
		{ "resyncs_total", "counter", "Resynchronizations.", st->resyncs },
		{ "pages_total", "counter", "Pages handed over.", r->s.pages },
		{ "zero_pages_total", "counter", "Pages that were zero.", r->s.zero_pages },
		{ "delta_pages_total", "counter", "Pages sent as differences.", r->s.delta_pages },
		{ "disk_bytes_total", "counter", "Bytes written to disks.", r->s.disk_bytes },
		{ "network_held", "gauge",
		  "1 while what the guest sends is held back until it is acknowledged.",
		  st->output == KC_OUTPUT_HELD },
		{ "raw_bytes_total", "counter", "Bytes of pages, disks and device state.",
		  r->raw_bytes },
		{ "wire_bytes_total", "counter", "Bytes sent or written.", r->s.wire_bytes },
		{ "pack_seconds_total", "counter", "Time spent compressing.", r->s.pack_us / 1e6 },
		{ "io_seconds_total", "counter", "Time spent sending or writing.",
		  r->s.io_us / 1e6 },
		{ "ack_seconds", "gauge", "Time from commit to acknowledgement of the last epoch.",
		  r->s.ack_us / 1e6 },
		{ "trouble", "gauge", "1 while something keeps epochs from being kept.",
		  st->trouble[0] != 0 },
		{ "uptime_seconds", "gauge", "Age of the daemon.", r->uptime },
	};
	static const double quantiles[] = { 0.5, 0.99 };
	unsigned int i, j;
	char labels[64];

	metric(f, "info", "gauge", "Phase of the daemon.");
	fprintf(f, "kvm_checkpoint_info{");
	print_labels(f, st);
	print_label(f, ",phase", st->phase);
	fprintf(f, "} 1\n");
	for (i = 0; i < sizeof(simple) / sizeof(simple[0]); i++) {
		metric(f, simple[i].name, simple[i].type, simple[i].help);
		series(f, st, simple[i].name, NULL);
		fprintf(f, "%.17g\n", simple[i].value);
	}
	if (r->lag >= 0) {
		metric(f, "lag_seconds", "gauge", "Age of the last acknowledged epoch.");
		series(f, st, "lag_seconds", NULL);
		fprintf(f, "%.6f\n", r->lag);
	}
	metric(f, "pause_seconds", "summary", "Pauses of the guest and their parts.");
	for (i = 0; i <= KC_PAUSE_PARTS; i++) {
		for (j = 0; j < 2; j++) {
			snprintf(labels, sizeof(labels), "part=\"%s\",quantile=\"%g\"",
				 part_names[i], quantiles[j]);
			series(f, st, "pause_seconds", labels);
			fprintf(f, "%.6f\n", hist_quantile(&st->pause[i], quantiles[j]) / 1e6);
		}
		snprintf(labels, sizeof(labels), "part=\"%s\"", part_names[i]);
		series(f, st, "pause_seconds_sum", labels);
		fprintf(f, "%.6f\n", st->pause[i].sum / 1e6);
		series(f, st, "pause_seconds_count", labels);
		fprintf(f, "%" PRIu64 "\n", st->pause[i].count);
	}
	metric(f, "pause_max_seconds", "gauge", "Longest pause of the guest.");
	for (i = 0; i <= KC_PAUSE_PARTS; i++) {
		snprintf(labels, sizeof(labels), "part=\"%s\"", part_names[i]);
		series(f, st, "pause_max_seconds", labels);
		fprintf(f, "%.6f\n", st->pause[i].max / 1e6);
	}
}

#define HELP "# HELP "

/* The metric after the one at which a text is. */
static char *next_metric(char *text)
{
	char *next = strstr(text, "\n" HELP);

	return next ? next + 1 : text + strlen(text);
}

/* Prints a metric, the first time with its HELP and TYPE, and takes it out of the text. */
static void move_metric(char *text, const char *name, size_t len, bool first, FILE *f)
{
	char *next, *p;
	size_t n;

	while (*text && strncmp(text, name, len))
		text = next_metric(text);
	next = next_metric(text);
	for (p = text; p < next; p += n) {
		n = strcspn(p, "\n");
		n += p[n] == '\n';
		if (*p != '#' || first)
			fwrite(p, 1, n, f);
	}
	memmove(text, next, strlen(next) + 1);
}

void kc_prometheus_merge(char **texts, size_t n, FILE *f)
{
	const size_t help = strlen(HELP);
	char name[128];
	size_t i, j, len;

	for (i = 0; i < n; i++) {
		while (!strncmp(texts[i], HELP, help)) {
			len = help + strcspn(texts[i] + help, " ") + 1;
			len = len < sizeof(name) ? len : sizeof(name);
			memcpy(name, texts[i], len);
			for (j = i; j < n; j++)
				move_metric(texts[j], name, len, j == i, f);
		}
	}
}

char *kc_status_print(struct kc_status *st, enum kc_status_format format)
{
	char *text = NULL;
	struct report r;
	size_t len;
	FILE *f = open_memstream(&text, &len);

	if (!f)
		return NULL;
	pthread_mutex_lock(&st->lock);
	make_report(st, &r);
	if (format == KC_STATUS_JSON)
		print_json(f, st, &r);
	else if (format == KC_STATUS_PROMETHEUS)
		print_prometheus(f, st, &r);
	else
		print_text(f, st, &r);
	pthread_mutex_unlock(&st->lock);
	if (fclose(f)) {
		free(text);
		return NULL;
	}
	return text;
}
