// SPDX-License-Identifier: GPL-2.0-only
/*
 * Memory that the guest does not use: what it gives back, what it hints at, and what its table of
 * page states says.
 */
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "protecting.h"
#include "protect_tests.h"

static unsigned int last;

static uint64_t blocks_of(const char *path)
{
	struct stat st;

	CHECK(!stat(path, &st), "there is no %s", path);
	return st.st_blocks / (KC_PAGE_SIZE / 512);
}

/* --- Given back ------------------------------------------------------------ */

/* Most of it, again and again, and what else happens goes on */
static const char *balloons(struct qemu *q, const char *command)
{
	if (!strcmp(command, STOP) && q->stops % 4 == 2)
		give_back(q, 100 + below(50), 2000 + below(1800));
	return NULL;
}

/* Each epoch is what the guest was, and what was given back costs one record */
void test_holes(void)
{
	qemu.blocks[0].npages = 4096;
	qemu.hook = balloons;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "25");
	check_store(&last);
	CHECK(last == 25, "epochs are missing");
}

/* The same where it is one command, and memory goes after pages of it were copied */
static bool balloons_late(struct qemu *q, struct told *told)
{
	/* What comes to nothing is copied first of all in the next one */
	if (told->what == TOLD_SAVED && q->nr_snaps % 4 == 1)
		q->spoilt_by = "run-state";
	if (told->what == TOLD_SAVED && q->nr_snaps % 4 == 2) {
		uint64_t page = 100 + below(50), n = 2000 + below(1800);
		struct snap *s = &q->snaps[q->nr_snaps - 1];

		/* Before the runs of this epoch were written, by right */
		give_back(q, page, n);
		memset(s->ram[0] + page * KC_PAGE_SIZE, 0, n * KC_PAGE_SIZE);
		told->runs = append_run(q, told, 0, page, n);
		told->discarded = true;
	}
	return true;
}

void test_holes_late(void)
{
	qemu.blocks[0].npages = 4096;
	qemu.takes = true;
	qemu.tells = balloons_late;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "25");
	check_store(&last);
	CHECK(last > 25 && qemu.nr_taken == 26, "epochs are missing");
}

/* A standby gives it back, too, and has it again when it is written */
static uint64_t least;

static const char *balloons_once(struct qemu *q, const char *command)
{
	uint64_t now;

	if (strcmp(command, STOP))
		return NULL;
	if (q->stops == 4)
		give_back(q, 0, q->blocks[0].npages);
	if (q->stops > 4) {
		now = blocks_of(path_of("ram/ram0"));
		least = now < least ? now : least;
	}
	return NULL;
}

static void balloon_at_standby(const char *option)
{
	qemu.blocks[0].npages = 8192;
	qemu.hook = balloons_once;
	least = UINT64_MAX;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "2s", "--insecure", option);
	protect_epochs(spec(), "30");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "it has another epoch");
}

void test_holes_standby(void)
{
	balloon_at_standby(NULL);
	CHECK(least < 3000, "the standby keeps %lu of 8192 pages", least);
}

void test_holes_kept(void)
{
	balloon_at_standby("--keep-memory");
	CHECK(least >= 8192, "the standby keeps %lu of 8192 pages", least);
}

/* One that gave it back has it again when it is told to keep it */
void test_holes_kept_later(void)
{
	unsigned int snap;

	balloon_at_standby(NULL);
	snap = qemu.nr_snaps - 1;
	start_standby(path_of("ram"), "--no-fence", "--timeout", "2s", "--insecure", "--keep-memory");
	CHECK(blocks_of(path_of("ram/ram0")) >= 8192, "it has %lu of 8192 pages",
	      blocks_of(path_of("ram/ram0")));
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == snap, "it has another epoch");
}

/* --- Page states ------------------------------------------------------------ */

static void states_epochs(bool takes)
{
	bool left_out;

	qemu.blocks[0].npages = 3000;
	qemu.takes = takes;
	start_qemu(&qemu);
	start_states(&qemu, 1234);
	protect_epochs(path_of("store"), "40");
	left_out = log_has("pages are left out, as the guest does not use them");
	check_store(&last);
	CHECK(last == 40, "epochs are missing");
	CHECK(left_out, "nothing was left out");
}

void test_states(void)
{
	states_epochs(false);
}

void test_states_take(void)
{
	states_epochs(true);
}

/*
 * The guest went on while its table was looked at, and used pages of which it said that it does not
 * by then: nothing comes of that epoch, and the next one has them.
 */
static bool goes_on_too_early(struct qemu *q, struct told *told)
{
	uint8_t *table = q->blocks[0].ram + q->states_page * KC_PAGE_SIZE + gfn_of(q, 0);
	bool early = q->nr_snaps % 4 == 2;
	uint64_t i;

	for (i = 200; i < 260; i++) {
		if (told->what == TOLD_SAVED) {
			table[i] = q->nr_snaps % 4 == 3 ? 1 : table[i];
			continue;
		}
		table[i] = 0;
		if (early)
			write_page(&q->blocks[0], i);
		q->undefined[i] = q->undefined[i] && !early;
	}
	if (told->what == TOLD_SAVED && q->nr_snaps % 4 == 3)
		q->spoilt_by = "run-state";
	return true;
}

void test_states_spoilt(void)
{
	qemu.takes = true;
	qemu.tells = goes_on_too_early;
	qemu.blocks[0].npages = 1500;
	start_qemu(&qemu);
	start_states(&qemu, 1234);
	protect_epochs(path_of("store"), "25");
	check_store(&last);
	CHECK(last > 25 && qemu.nr_taken == 26, "epochs are missing");
}

/* What is free is given back, as reports of free pages do: also by the standby */
static const char *reports(struct qemu *q, const char *command)
{
	uint64_t now;

	if (strcmp(command, STOP))
		return NULL;
	if (q->stops == 4) {
		memset(q->blocks[0].ram + q->states_page * KC_PAGE_SIZE + gfn_of(q, 3000), 1, 2900);
		memset(q->undefined + 3000, 1, 2900);
		give_back(q, 3000, 2900);
	}
	now = blocks_of(path_of("ram/ram0"));
	least = now < least ? now : least;
	return NULL;
}

void test_states_reports(void)
{
	qemu.blocks[0].npages = 6000;
	qemu.hook = reports;
	least = UINT64_MAX;
	start_qemu(&qemu);
	start_states(&qemu, 5);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "2s", "--insecure");
	protect_epochs(spec(), "20");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "it has another epoch");
	CHECK(least < 5000, "the standby keeps %lu of 6000 pages", least);
}

/*
 * While it is copied another kernel takes the guest over, of whose pages the old table says that
 * they are not used, and which has none.
 */
static const char *kexecs(struct qemu *q, const char *command)
{
	uint8_t *table = q->blocks[0].ram + q->states_page * KC_PAGE_SIZE;

	/* Before it is copied, and after that */
	if (!strcmp(command, COLLECT) && q->running && q->looks < 3) {
		memset(table + gfn_of(q, q->looks == 1 ? 100 : 0), 1, 600);
		memset(q->undefined, 0, q->blocks[0].npages);
	}
	if (!strcmp(command, STOP) || !strcmp(command, "x-checkpoint-take"))
		q->states_nr = 0;
	return NULL;
}

void test_states_kexec(void)
{
	qemu.blocks[0].npages = 3000;
	qemu.hook = kexecs;
	start_qemu(&qemu);
	start_states(&qemu, 7);
	/* All of it was written before it was protected; no page is free */
	memset(qemu.blocks[0].ram + 7 * KC_PAGE_SIZE, 0, qemu.states_nr);
	protect_epochs(path_of("store"), "5");
	check_store(&last);
	CHECK(last == 5, "epochs are missing");
}

/*
 * A guest whose table is another one each time, says anything, also of itself, and goes on to change
 * while it is looked at: all that it does not speak of is copied as ever, and so is what it says that
 * it uses from the first copy on.
 */
static const char *lies(struct qemu *q, const char *command)
{
	uint8_t *table = q->blocks[0].ram + q->states_page * KC_PAGE_SIZE;
	uint64_t i;

	if (!q->attached)
		return NULL;
	if (!strcmp(command, STOP) || !strcmp(command, "x-checkpoint-take"))
		q->states_page = below(990);
	/* Behind its end, too, where it is not to be looked at */
	memset(table, 1, 2 * KC_PAGE_SIZE);
	for (i = 0; i < q->states_nr; i += 1 + below(20))
		table[i] = rnd(&rng_state);
	if (q->running)
		write_page(&q->blocks[0], 1000 + below(24));
	return NULL;
}

static bool lies_on(struct qemu *q, struct told *told)
{
	(void)told;
	lies(q, STOP);
	return true;
}

static void lying_table(bool takes)
{
	static bool undefined[1024];

	/* Of block 0, but for what is behind the table's end */
	memset(undefined, 1, 1000);
	qemu.lies = true;
	qemu.takes = takes;
	qemu.hook = lies;
	qemu.tells = lies_on;
	qemu.ranges = "{\"gfn\": 0, \"pages\": 1000, \"block\": 0, \"page\": 0}, "
		      "{\"gfn\": 5000, \"pages\": 24, \"block\": 0, \"page\": 1000}";
	start_qemu(&qemu);
	qemu.undefined = undefined;
	qemu.states_page = 3;
	qemu.states_nr = 5000;
	start_standby(path_of("ram"), "--no-fence", "--timeout", "2s", "--insecure");
	protect_epochs(spec(), "30");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "it has another epoch");
}

void test_states_lies(void)
{
	lying_table(false);
}

void test_states_lies_take(void)
{
	lying_table(true);
}

/* What it says of its table makes no sense: it is not looked at */
static void garbage(uint64_t page, uint64_t nr, const char *ranges)
{
	qemu.ranges = ranges;
	start_qemu(&qemu);
	/* Bytes of which each says that a page is not used, and the guest means none of it */
	memset(qemu.blocks[0].ram, 1, 64 * KC_PAGE_SIZE);
	qemu.states_page = page;
	qemu.states_nr = nr;
	protect_epochs(path_of("store"), "10");
	check_store(&last);
	CHECK(last == 10, "epochs are missing");
}

void test_states_outside(void)
{
	garbage(1023, KC_PAGE_SIZE + 1, NULL);
}

void test_states_nowhere(void)
{
	garbage(UINT64_MAX, UINT64_MAX, NULL);
}

void test_states_ranges(void)
{
	garbage(0, 1024, "{\"gfn\": 18446744073709551615, \"pages\": 18446744073709551615, \"block\": 0, "
		"\"page\": 18446744073709551615}, {\"gfn\": 0, \"pages\": 5, \"block\": 77, \"page\": 0}, "
		"{\"gfn\": \"x\"}, 3");
}

/* --- Hints ------------------------------------------------------------------- */

static void hint_at(uint64_t page, uint64_t n)
{
	qemu.devices = "[{\"name\": \"b0\", \"type\": \"child<virtio-balloon-pci>\"}]";
	qemu.hint_page = page;
	qemu.hint_pages = n;
}

/* A page that was hinted at and is written after that is in the log */
static const char *reuses(struct qemu *q, const char *command)
{
	uint64_t i;

	if (strcmp(command, COLLECT) || !q->running || q->looks != 2)
		return NULL;
	for (i = 100; i < 800; i += 3) {
		write_page(&q->blocks[0], i);
		q->undefined[i] = false;
	}
	return NULL;
}

void test_hints(void)
{
	static bool undefined[1024];

	hint_at(100, 700);
	qemu.hook = reuses;
	start_qemu(&qemu);
	qemu.undefined = undefined;
	protect_epochs(path_of("store"), "8");
	CHECK(qemu.hints_begun == 1 && qemu.hints_ended == 1, "its pages are hinted at for ever");
	check_store(&last);
	CHECK(last == 8, "epochs are missing");
}

/* Hints of what is not there */
static void lying_hint(uint32_t block, uint64_t page, uint64_t n, const char *text)
{
	hint_at(page, n);
	qemu.hint_block = block;
	start_qemu(&qemu);
	must_fail(protect(CHECKED, path_of("store"), NULL), text);
	CHECK(!exists(path_of("store/epoch-00000000000000000001.kc")), "there is an epoch");
}

static const char nowhere[] = "QEMU has hints of memory that was not there before";

void test_hints_garbage(void)
{
	lying_hint(0, 1000, 30, nowhere);
}

void test_hints_long(void)
{
	lying_hint(0, 0, UINT32_MAX, nowhere);
}

void test_hints_wrap(void)
{
	lying_hint(0, UINT64_MAX, 2, nowhere);
}

void test_hints_block(void)
{
	lying_hint(77, 0, 2, nowhere);
}

/* That may be a QEMU that was in the midst of something: nothing comes of it, and it is tried again */
static void short_hints(void)
{
	hint_at(0, 900);
	start_qemu(&qemu);
	CHECK(!protect(CHECKED, path_of("store"), "--epochs", "5", "--interval", "10ms"),
	      "it gives up");
	CHECK(log_has("QEMU wrote less to the buffer than it said; connecting to QEMU again"),
	      "it says nothing of it");
	CHECK(qemu.hints_begun == 2 && qemu.hints_ended == 1, "it is not asked again");
	check_store(&last);
	CHECK(last > 1, "epochs are missing");
}

void test_hints_more(void)
{
	qemu.hint_more = 1ull << 40;
	short_hints();
}

void test_hints_offset(void)
{
	qemu.hint_offset = INT64_MAX - 3;
	short_hints();
}
