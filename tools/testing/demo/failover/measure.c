// SPDX-License-Identifier: GPL-2.0-only
/*
 * What epochs cost.
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdlib.h>
#include <sys/mount.h>

#include "failover.h"

static int compare_u64(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

static uint64_t percentile(uint64_t *v, unsigned int n, unsigned int percent)
{
	unsigned int i = n * percent / 100;

	qsort(v, n, sizeof(*v), compare_u64);
	return n ? v[i < n ? i : n - 1] : 0;
}

struct row {
	uint64_t pages, bytes;
	double rate;
};

/* What QEMU tells it in a pause it would hear at once, on another CPU: where there is one, as well */
static bool hears_at_once(pid_t protect)
{
	return !sched_setscheduler(protect, SCHED_FIFO,
				   &(struct sched_param){ .sched_priority = 1 });
}

/*
 * The standby tries to load the first epoch, which takes a QEMU longer than many epochs.  Two may be
 * under way, so the fourth is only taken when that is over.
 */
#define BEFORE	4

#define MOST_STANDBY_MB	1024

/*
 * One run; the rate is that of @n epochs after the first ones.  @v: where the
 * parts of their pauses go, or NULL; @who: where goes who had the CPU in each of them, in its
 * pause if there is @v and else until the next one; or NULL.
 */
static bool run_epochs(const char *interval, unsigned int n, struct row *r, uint64_t *v[PARTS],
		       uint64_t (*who)[NR_WHO])
{
	struct traced traced = { .from = BEFORE + 1, .to = BEFORE + n, .pauses = v, .us = who };
	struct pair x = { .timeout_ms = 0 };
	uint64_t first, pages = 0;
	bool all_traced = true;
	bool to_dir = measured.mb > MOST_STANDBY_MB;
	char dir[32];
	unsigned int i, part;
	int status;

	new_pair(&x);
	/* A standby has all of the memory that a guest may use some day, and here is not so much */
	if (to_dir) {
		snprintf(dir, sizeof(dir), "/dev/shm/measured-%u", x.gen);
		snprintf(x.theirs, sizeof(x.theirs), "%s/all", dir);
	}
	if (who && !trace_begin())
		return fail("the scheduler cannot be traced");
	if (who)
		trace_know_qemu(&vm);
	if (!to_dir)
		x.standby = start_standby(&x);
	trace_know(x.standby, BY_STANDBY);
	/* It would be on another host, and all that it starts: they have what the CPUs have left */
	if (!to_dir && sched_setscheduler(x.standby, SCHED_IDLE, &(struct sched_param){ 0 }))
		return fail("the scheduler does not do what it is asked to");
	chain = to_dir ? dir : NULL;
	start_protect(&x.protect, &vm, &x, interval, BEFORE - 1 + n);
	chain = NULL;
	trace_know(x.protect.pid, BY_PROTECT);
	if (!wait_synced(&x.protect, &vm, 1))
		return false;
	if (measured.instructions && !hears_at_once(x.protect.pid))
		return fail("the scheduler does not do what it is asked to");
	status = wait_protect(&x.protect);
	if (who)
		all_traced = trace_end(&traced);
	kill_now(&x.standby, true);
	remove_ram(x.theirs);
	if (status || log_.newest != BEFORE + n)
		return fail("protect ended with %d at epoch %lu of %u", status, log_.newest,
			    BEFORE + n);
	if (!all_traced)
		return fail("the kernel's trace has no room for so many epochs");

	first = log_.epochs[BEFORE].done_us;
	r->rate = n / ((log_.epochs[BEFORE + n].done_us - first) / 1e6);
	for (i = BEFORE + 1; i <= BEFORE + n; i++) {
		for (part = 0; v && part < PARTS; part++)
			*v[part]++ = log_.epochs[i].us[part];
		pages += log_.epochs[i].pages;
	}
	r->pages = pages / n;
	r->bytes = (log_.epochs[BEFORE + n].wire - log_.epochs[BEFORE].wire) / n;
	return true;
}

bool test_early(unsigned int epochs)
{
	struct row r;
	bool ok;

	memset(&r, 0, sizeof(r));
	max_dirty = "400";
	ok = run_epochs("60m", epochs, &r, NULL, NULL);
	max_dirty = NULL;
	if (ok && r.pages < 400)
		ok = fail("epochs of %lu pages were taken before 400 were dirty", r.pages);
	if (ok)
		note("%u epochs of %lu pages long before the interval was over", epochs, r.pages);
	return ok;
}

/*
 * What is compared: the ways to log, with this build and perhaps an old one.  Each has a guest of
 * its own, which is stopped when it is not its turn.
 */
#define NR_LOGS		3
#define MAX_MACHINES	(2 * NR_LOGS)
#define ROUNDS		3
#define WARM_UP		5

/*
 * The guest.  Its pages are few and the interval is long enough for it to write all of them, so that
 * an epoch has as many of them whoever takes it, and for the standby to be done with the one before.
 * Time that nobody needs costs nothing where instructions are the clock.  Elsewhere it is
 * shorter, and there are more pages: 200 are written in it, of 2,048.
 */
static const struct shape {
	unsigned int rate, interval_ms, work_mb;
} counted = { 2000, 500, 1 }, timed = { 1000, 100, WORK_MB };

static const struct {
	const char *title, *accel;
} logs[NR_LOGS] = {
	{ "slot rings", "kvm,dirty-slot-ring-size=4096" },
	{ "dirty ring", "kvm,dirty-ring-size=4096" },
	{ "bitmap", "kvm" },
};

/* The whole pause: of these, in whatever order they had the CPU */
#define SUM		NR_WHO
static const bool in_sum[NR_WHO] = {
	[BY_MAIN] = true, [BY_VCPUS] = true, [BY_QEMU] = true, [BY_PROTECT] = true,
};

static struct machine {
	unsigned int log;
	bool old;
	struct vm vm;
	uint64_t *v[PARTS], *next[PARTS];
	uint64_t *paused[NR_WHO + 1];	/* of each epoch, in its pause, and the sum */
	uint64_t between[NR_WHO];	/* of all epochs that follow each other */
	double rounds[ROUNDS];		/* the median of the sum in each round */
	unsigned int n, fast;		/* epochs in all, and that followed each other */
	unsigned int round;
	uint64_t pages, bytes;
	double rate, fastest;
} machines[MAX_MACHINES];
static unsigned int nr_machines, builds;
static char slow_interval[16];

static const char *new_qemu, *new_checkpoint;

static void take_turn(struct machine *m)
{
	qemu = m->old ? old_qemu : new_qemu;
	checkpoint = m->old ? old_checkpoint : new_checkpoint;
	accel = logs[m->log].accel;
	vm = m->vm;
	if (vm.pid)
		qmp(&vm, "cont");
}

static void end_turn(struct machine *m)
{
	qmp(&vm, "stop");
	m->vm = vm;
	vm = (struct vm){ .ctl = -1, .mon = -1 };
}

static uint64_t *numbers(unsigned int n)
{
	uint64_t *p = calloc(n, sizeof(*p));

	if (!p)
		fatal("no memory");
	return p;
}

static bool prepare(struct machine *m, unsigned int log, bool old, unsigned int epochs)
{
	unsigned int i;
	struct row warm;
	bool ok;

	*m = (struct machine){ .log = log, .old = old, .vm = { .ctl = -1, .mon = -1 } };
	for (i = 0; i < PARTS; i++)
		m->next[i] = m->v[i] = numbers(epochs);
	for (i = 0; i <= SUM; i++)
		m->paused[i] = numbers(epochs);
	take_turn(m);
	ok = boot(&vm) && run_epochs("50ms", WARM_UP, &warm, NULL, NULL);
	end_turn(m);
	return ok;
}

/* One more round is known; what it was made of goes to the record */
static void add_round(struct machine *m, uint64_t (*who)[NR_WHO], unsigned int epochs)
{
	uint64_t *sorted = numbers(epochs);
	unsigned int i, k;

	printf("        %s%s, round %u: pages, pause, then by thread, 1,000 instructions or us:\n",
	       logs[m->log].title, m->old ? ", old" : "", m->round + 1);
	for (i = 0; i < epochs; i++) {
		printf("        %lu %lu", log_.epochs[BEFORE + 1 + i].pages,
		       log_.epochs[BEFORE + 1 + i].us[PAUSE]);
		for (k = 0; k < NR_WHO; k++) {
			m->paused[k][m->n + i] = who[i][k];
			m->paused[SUM][m->n + i] += in_sum[k] ? who[i][k] : 0;
			printf(" %lu", who[i][k]);
		}
		sorted[i] = m->paused[SUM][m->n + i];
		printf("\n");
	}
	m->n += epochs;
	m->rounds[m->round++] = percentile(sorted, epochs, 50);
	free(sorted);
}

static bool measure_once(struct machine *m, unsigned int epochs)
{
	uint64_t (*who)[NR_WHO] = calloc(epochs, sizeof(*who));
	struct row row;
	unsigned int i, k;
	bool ok;

	if (!who)
		fatal("no memory");
	take_turn(m);
	/* Which moves on where the next ones go */
	ok = run_epochs(slow_interval, epochs, &row, m->next, who);
	if (ok) {
		m->pages += row.pages;
		m->bytes += row.bytes;
		m->rate = row.rate;
		add_round(m, who, epochs);
	}
	/* Who counts instructions need not do it again */
	if (ok && (!measured.instructions || m->round == ROUNDS)) {
		ok = run_epochs("1ms", epochs, &row, NULL, who);
		for (i = 0; ok && i < epochs; i++) {
			for (k = 0; k < NR_WHO; k++)
				m->between[k] += who[i][k];
			m->fast++;
		}
		if (ok && row.rate > m->fastest)
			m->fastest = row.rate;
	}
	end_turn(m);
	free(who);
	return ok;
}

static void cell_title(struct machine *m, int arg)
{
	(void)arg;
	printf(!m->old ? " %s |" : builds == 1 ? " %s, old |" : " %s, old | old / new |",
	       logs[m->log].title);
}

static void cell_rule(struct machine *m, int arg)
{
	(void)arg;
	printf(m->old && builds > 1 ? "---|---|" : "---|");
}

static double median(struct machine *m, int part)
{
	return percentile(m->v[part], m->n, 50);
}

static void cell_part(struct machine *m, int part)
{
	printf(" %.0f / %lu |", median(m, part), percentile(m->v[part], m->n, 99));
}

static double in_pause(struct machine *m, int who)
{
	return percentile(m->paused[who], m->n, 50);
}

static void cell_in_pause(struct machine *m, int who)
{
	printf(" %.0f |", in_pause(m, who));
}

static void cell_rounds(struct machine *m, int arg)
{
	unsigned int i;

	(void)arg;
	for (i = 0; i < m->round; i++)
		printf("%s %.0f", i ? "," : "", m->rounds[i]);
	printf(" |");
}

static double mean_in_pause(struct machine *m, int who)
{
	double sum = 0;
	unsigned int i;

	for (i = 0; i < m->n; i++)
		sum += m->paused[who][i];
	return sum / m->n;
}

static void cell_mean(struct machine *m, int who)
{
	printf(" %.0f |", mean_in_pause(m, who));
}

static double in_epoch(struct machine *m, int who)
{
	return (double)m->between[who] / m->fast;
}

static void cell_in_epoch(struct machine *m, int who)
{
	printf(" %.0f |", in_epoch(m, who));
}

static double pages(struct machine *m, int arg)
{
	(void)arg;
	return (double)m->pages / m->round;
}

static void cell_pages(struct machine *m, int arg)
{
	printf(" %.0f |", pages(m, arg));
}

static double bytes(struct machine *m, int arg)
{
	(void)arg;
	return (double)m->bytes / m->round;
}

static void cell_bytes(struct machine *m, int arg)
{
	printf(" %.0f |", bytes(m, arg));
}

static double rate(struct machine *m, int fastest)
{
	return fastest ? m->fastest : m->rate;
}

static void cell_rate(struct machine *m, int fastest)
{
	printf(" %.1f |", rate(m, fastest));
}

/* @value: of which an old build and this one are compared, or NULL */
static void print_line(const char *what, const char *of, void (*cell)(struct machine *m, int arg),
		       double (*value)(struct machine *m, int arg), int arg)
{
	unsigned int i;
	double now;

	printf("| %s | %s |", what, of);
	for (i = 0; i < nr_machines; i++) {
		cell(&machines[i], arg);
		if (!value || !machines[i].old || builds == 1)
			continue;
		now = value(&machines[i - 1], arg);
		if (now > 0)
			printf(" %.2f |", value(&machines[i], arg) / now);
		else
			printf(" |");
	}
	printf("\n");
}

static void print_table(unsigned int epochs)
{
	static const char * const titles[] = {
		[PAUSE] = "pause", [STOP] = "stop", [HARVEST] = "harvest", [STATE] = "state",
		[COPY] = "copy", [RESUME] = "resume",
	};
	static const int order[] = { PAUSE, STOP, HARVEST, STATE, COPY, RESUME };
	/* With -icount a nanosecond of the clock is an instruction */
	const char *unit = measured.instructions ? "1,000 instructions" : "µs";
	char what[96], of[96];
	int i;

	snprintf(what, sizeof(what), "%u epochs each, %s vCPU, %u MiB", epochs, guest_cpus, guest_mb);
	printf("\nTABLE\n");
	print_line(what, "", cell_title, NULL, 0);
	print_line("---", "---", cell_rule, NULL, 0);
	snprintf(of, sizeof(of), "%s, p50 / p99", unit);
	for (i = 0; i < PARTS; i++)
		print_line(titles[order[i]], of, cell_part, median, order[i]);
	snprintf(of, sizeof(of), "%s of a pause, p50", unit);
	for (i = 0; i < NR_WHO; i++)
		print_line(who_names[i], of, cell_in_pause, in_pause, i);
	print_line("QEMU and protect", of, cell_in_pause, in_pause, SUM);
	print_line("", "each round", cell_rounds, NULL, 0);
	print_line("", "mean", cell_mean, mean_in_pause, SUM);
	snprintf(of, sizeof(of), "%s from one epoch to the next, --interval 1ms", unit);
	for (i = 0; i < NR_WHO; i++)
		print_line(who_names[i], of, cell_in_epoch, in_epoch, i);
	print_line("pages in an epoch", "mean", cell_pages, pages, 0);
	print_line("bytes sent for it", "mean", cell_bytes, bytes, 0);
	snprintf(of, sizeof(of), "--interval %s", slow_interval);
	print_line("epochs a second", of, cell_rate, rate, 0);
	print_line("", "--interval 1ms", cell_rate, rate, 1);
	printf("END\n");
}

static void put_away(struct machine *m)
{
	take_turn(m);
	leave(&vm);
	remove_ram(vm.ram);
	m->vm = (struct vm){ .ctl = -1, .mon = -1 };
}

/* What else the host does comes and goes: in turn, so that all have their share of it */
static bool measure_in_turn(unsigned int share)
{
	unsigned int i, round;
	bool ok = true;

	for (i = 0; i < nr_machines && ok; i++)
		ok = prepare(&machines[i], i / builds, i % builds, share * ROUNDS);
	for (round = 0; round < ROUNDS && ok; round++) {
		for (i = 0; i < nr_machines && ok; i++)
			ok = measure_once(&machines[i], share);
		if (ok)
			note("round %u of %u", round + 1, ROUNDS);
	}
	return ok;
}

/* Instructions are the same whenever they are counted: nobody else is there, nor was there */
static bool measure_alone(unsigned int share)
{
	unsigned int i, round;
	bool ok = true;

	for (i = 0; i < nr_machines && ok; i++) {
		ok = prepare(&machines[i], i, old_qemu, share * ROUNDS);
		for (round = 0; round < ROUNDS && ok; round++)
			ok = measure_once(&machines[i], share);
		if (ok)
			note("%s%s", logs[machines[i].log].title, machines[i].old ? ", old" : "");
		put_away(&machines[i]);
	}
	return ok;
}

/* Memory that nobody touches has room there, in so many copies as there can be */
static bool make_room(unsigned int mb)
{
	char size[32];

	snprintf(size, sizeof(size), "size=%uM", 2 * MAX_MACHINES * mb);
	return !mb || !mount(NULL, "/dev/shm", NULL, MS_REMOUNT, size);
}

bool test_measure(unsigned int epochs)
{
	const struct shape *shape = measured.instructions ? &counted : &timed;
	const char *was_accel = accel, *was_cpus = guest_cpus;
	unsigned int was_rate = guest_rate, i;
	unsigned int share = (epochs + ROUNDS - 1) / ROUNDS;
	bool ok;

	leave(&vm);
	remove_ram(vm.ram);
	kill_now(&standby, true);
	new_qemu = qemu;
	new_checkpoint = checkpoint;
	guest_cpus = measured.cpus ? measured.cpus : "1";
	guest_rate = measured.rate ? measured.rate : shape->rate;
	guest_work_mb = measured.work_mb ? measured.work_mb : shape->work_mb;
	guest_mb = guest_used_mb();
	if (measured.mb > guest_mb)
		guest_mb = measured.mb;
	guest_has_net = true;
	snprintf(slow_interval, sizeof(slow_interval), "%ums",
		 measured.interval_ms ? measured.interval_ms : shape->interval_ms);
	builds = old_qemu && !measured.instructions ? 2 : 1;
	nr_machines = builds * (measured.logs && measured.logs < NR_LOGS ? measured.logs : NR_LOGS);
	for (i = 0; i < nr_machines; i++)
		machines[i].vm = (struct vm){ .ctl = -1, .mon = -1 };
	ok = make_room(measured.mb) || fail("/dev/shm cannot be made larger");
	ok = ok && (measured.instructions ? measure_alone(share) : measure_in_turn(share));
	if (ok)
		print_table(share * ROUNDS);
	for (i = 0; i < nr_machines; i++)
		put_away(&machines[i]);
	qemu = new_qemu;
	checkpoint = new_checkpoint;
	accel = was_accel;
	guest_cpus = was_cpus;
	guest_rate = was_rate;
	guest_mb = GUEST_MB;
	guest_work_mb = WORK_MB;
	guest_has_net = false;
	return ok;
}
