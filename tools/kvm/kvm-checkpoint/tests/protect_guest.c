// SPDX-License-Identifier: GPL-2.0-only
/*
 * What is done to the guest: it must not stand still for us, and its memory is nobody's business.
 */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "protecting.h"
#include "protect_tests.h"

/* --- It does not stand still ---------------------------------------------- */

/* In the middle of an epoch */
static const char *freezes(struct qemu *q, const char *command)
{
	if (!strcmp(command, COLLECT) && q->collects == 4)
		kill(q->client, SIGSTOP);
	return NULL;
}

void test_frozen(void)
{
	uint64_t end = kc_now_us() + LIMIT_US;
	unsigned int last;

	qemu.hook = freezes;
	start_qemu(&qemu);
	start_protect(CHECKED, path_of("store"), "--epochs", "8", "--interval", "1ms",
		      "--pause-limit", "3s", NULL);
	while (!qemu.spoilt_by) {
		CHECK(kc_now_us() < end, "the guest stands still");
		step(&qemu, 1);
	}
	CHECK(qemu.running && qemu.stops == 4, "the guest stands still, or was never stopped");
	kill(qemu.client, SIGCONT);
	CHECK(serve() == 0, "protect fails");
	CHECK(times_in(path_of("log"), "took longer than the 3000 ms of --pause-limit") == 1,
	      "it does not say what happened");
	CHECK(check_store(&last) == 9 && last == 9, "epochs are missing");
}

/* Somebody has begun to dump the guest, until some epochs later. */
static const char *dumps(struct qemu *q, const char *command)
{
	if (!strcmp(command, CONT))
		q->waits_for = q->conts >= 4 && q->conts < 7 ? "There is a dump in process" : NULL;
	return NULL;
}

void test_waits(void)
{
	unsigned int last;

	qemu.hook = dumps;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "9");
	CHECK(times_in_log("has to wait until it can run: There is a dump in process") == 1,
	      "it does not say once what the guest waits for");
	CHECK(times_in_log("the guest runs again") == 1, "it does not say once that it is over");
	CHECK(check_store(&last) == 10 && last == 9, "epochs are missing");
	CHECK(!qemu.snaps[5].stopped, "the guest would stand still where it is restored");
}

/* --- There are no epochs for now ------------------------------------------ */

/* A standby that takes over after 2 s, and must not, as it is told why there are no epochs */
static void start_watching_standby(void)
{
	start_standby(path_of("ram"), "--no-fence", "--timeout", "2s", "--insecure");
}

static void must_have_waited_for(const char *why)
{
	char text[200];

	snprintf(text, sizeof(text), "no epochs for now: %s", why);
	CHECK(times_in_log(text) == 1, "it does not say once: %s", text);
	snprintf(text, sizeof(text), "the primary says: %s", why);
	CHECK(times_in_log(text) == 1, "the standby is not told once: %s", text);
}

static void must_have_ended_well(void)
{
	CHECK(times_in_log("the primary says: there are epochs again") == 1,
	      "the standby is not told once that there are epochs again");
	wait_log("ends the protection: detached");
	CHECK(!log_has("failing over"), "the standby takes over from a guest that lives");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == qemu.nr_snaps - 1, "the last epoch is missing");
}

static void must_have_waited(const char *why)
{
	must_have_waited_for(why);
	must_have_ended_well();
}

static uint64_t since_us;

/* Its memory is dumped, for 4 s. */
static const char *is_dumped(struct qemu *q, const char *command)
{
	if (strcmp(command, STOP) || q->stops < 4)
		return NULL;
	if (!since_us)
		since_us = kc_now_us();
	q->run_state = kc_now_us() - since_us < 4000000 ? "save-vm" : NULL;
	q->running = !q->run_state;
	return NULL;
}

void test_run_states(void)
{
	qemu.hook = is_dumped;
	start_qemu(&qemu);
	start_watching_standby();
	protect_epochs(spec(), "9");
	CHECK(qemu.nr_snaps == 10, "%u epochs were taken", qemu.nr_snaps);
	must_have_waited("the guest's run state is save-vm");
}

/*
 * STATES: restore-vm finish-migrate colo internal-error
 * There is no case in the rig of these: QEMU does not show the first while its monitor answers, it
 * refuses to migrate a guest that is protected, and nothing makes every KVM fail.
 */
static const char * const no_epochs_of[] = { "restore-vm", "finish-migrate", "colo",
					     "internal-error" };
#define NR_STATES	(sizeof(no_epochs_of) / sizeof(no_epochs_of[0]))

static const char *changes_its_state(struct qemu *q, const char *command)
{
	uint64_t at;

	if (strcmp(command, STOP) || q->stops < 4)
		return NULL;
	if (!since_us)
		since_us = kc_now_us();
	at = (kc_now_us() - since_us) / 1500000;
	q->run_state = at < NR_STATES ? no_epochs_of[at] : NULL;
	q->running = !q->run_state;
	return NULL;
}

void test_other_run_states(void)
{
	char text[100];
	size_t i;

	qemu.hook = changes_its_state;
	start_qemu(&qemu);
	start_watching_standby();
	protect_epochs(spec(), "9");
	CHECK(qemu.nr_snaps == 10, "%u epochs were taken", qemu.nr_snaps);
	for (i = 0; i < NR_STATES; i++) {
		snprintf(text, sizeof(text), "the guest's run state is %s", no_epochs_of[i]);
		must_have_waited_for(text);
	}
	must_have_ended_well();
}

/* From the first epoch on */
static const char *is_dumped_at_first(struct qemu *q, const char *command)
{
	q->stops += !strcmp(command, STOP) && q->stops < 4 ? 4 : 0;
	return is_dumped(q, command);
}

void test_first_run_state(void)
{
	qemu.hook = is_dumped_at_first;
	start_qemu(&qemu);
	start_watching_standby();
	protect_epochs(spec(), "3");
	CHECK(qemu.nr_snaps == 4, "%u epochs were taken", qemu.nr_snaps);
	must_have_waited("the guest's run state is save-vm");
}

/* It gets something that is in no state, for a while: there is no epoch, and no takeover. */
static const char *cannot_migrate(struct qemu *q, const char *command)
{
	if (strcmp(command, STOP) || q->stops < 4)
		return NULL;
	if (!since_us)
		since_us = kc_now_us();
	q->blocked = kc_now_us() - since_us < 4000000 ? "a share is mounted" : NULL;
	return NULL;
}

void test_blocked(void)
{
	unsigned int i;

	qemu.hook = cannot_migrate;
	start_qemu(&qemu);
	start_watching_standby();
	protect_epochs(spec(), "9");
	CHECK(qemu.nr_snaps == 10, "%u epochs were taken", qemu.nr_snaps);
	for (i = 0; i < qemu.nr_snaps; i++)
		CHECK(!qemu.snaps[i].stopped, "the guest stands still");
	must_have_waited("the guest cannot be migrated any more: a share is mounted");
}

/* It is switched off, with -no-shutdown: QEMU lives on, and is killed later. */
static const char *is_switched_off(struct qemu *q, const char *command)
{
	if (!strcmp(command, STOP) && q->stops == 4) {
		q->running = false;
		q->stopped_as = "shutdown";
		send_event(q, "SHUTDOWN");
		send_event(q, "STOP");
	}
	return !strcmp(command, STOP) && q->stops == 8 ? dead : NULL;
}

void test_off(void)
{
	qemu.hook = is_switched_off;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "60s", "--insecure");
	must_fail(protect(CHECKED, spec(), "--interval", "1ms"), "QEMU is gone");
	wait_log("the primary says that its guest died");
	wait_log("taken over");
	stop_standby(SIGTERM);
}

/* It ends, and takes one more client on its way: that is for the standby to decide. */
static const char *goes_slowly(struct qemu *q, const char *command)
{
	if (!strcmp(command, STOP) && q->stops == 4) {
		close_monitor(q);
		return "";
	}
	if (strcmp(command, "greeting") || q->stops < 4)
		return NULL;
	die(q);
	return silent;
}

void test_goes_slowly(void)
{
	qemu.hook = goes_slowly;
	start_qemu(&qemu);
	start_watching_standby();
	must_fail(protect(CHECKED, spec(), "--interval", "1ms"), "QEMU is gone; the guest is without protection");
	wait_log("failing over to epoch");
	wait_log("taken over");
	CHECK(!log_has("ends the protection"), "the standby is told that the guest lives");
	stop_standby(SIGTERM);
}

/* Somebody loads a snapshot: no log has the pages. */
static const char *loads(struct qemu *q, const char *command)
{
	unsigned int i;

	if (strcmp(command, STOP) || q->stops % 5 != 4)
		return NULL;
	for (i = 0; i < 300; i++)
		write_page(&q->blocks[0], i);
	memset(q->blocks[0].dirty, 0, q->blocks[0].npages);
	q->lost = "a state was loaded";
	return NULL;
}

void test_lost(void)
{
	unsigned int last, n;

	qemu.hook = loads;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "25");
	n = times_in_log("has been changed (a state was loaded); connecting to QEMU again");
	CHECK(n > 4 && qemu.attaches == n + 1, "attached %u times, told %u times", qemu.attaches, n);
	CHECK(check_store(&last) == qemu.nr_snaps && last == qemu.nr_snaps - 1,
	      "epochs are missing");
}

/* What it wrote to its disks cannot be flushed, for once. */
static const char *cannot_flush(struct qemu *q, const char *command)
{
	if (!strcmp(command, CONT) && q->conts == 4) {
		q->spoilt_by = "flush";
		q->snaps[q->nr_snaps - 1].torn = true;
	}
	return NULL;
}

void test_flush(void)
{
	unsigned int last;

	qemu.hook = cannot_flush;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "8");
	CHECK(times_in_log("could not be flushed for a checkpoint: taking another") == 1,
	      "an epoch without its disks counts");
	CHECK(check_store(&last) == 9 && last == 9, "epochs are missing");
}

/* A balloon gives memory back to the host; copying it must not take it again. */
static const char *discards(struct qemu *q, const char *command)
{
	struct block *b = &q->blocks[0];
	struct stat st;

	if (strcmp(command, COLLECT) || !q->running)
		return NULL;
	if (q->looks == 2) {
		give_back(q, 0, b->npages);
	}
	/* Of 4096 pages; the guest may have written to some */
	if (q->looks == 3)
		CHECK(!fstat(b->fd, &st) && st.st_blocks < 2000 * (KC_PAGE_SIZE / 512),
		      "memory that was given back is taken again");
	return NULL;
}

void test_discarded(void)
{
	unsigned int last;

	qemu.blocks[0].npages = 4096;
	qemu.hook = discards;
	start_qemu(&qemu);
	protect_epochs(path_of("store"), "3");
	CHECK(qemu.looks >= 3, "it was not copied while the guest ran");
	CHECK(check_store(&last) == 4 && last == 3, "epochs are missing");
}

/* It does something that takes 5 s. */
static const char *is_busy(struct qemu *q, const char *command)
{
	if (!strcmp(command, COLLECT) && q->collects == 4)
		poll(NULL, 0, 5000);
	return NULL;
}

void test_busy(void)
{
	qemu.hook = is_busy;
	start_qemu(&qemu);
	start_watching_standby();
	CHECK(protect(CHECKED, spec(), "--epochs", "9", "--interval", "1ms", "--pause-limit", "0") == 0,
	      "protect gives up");
	must_have_waited("QEMU lives, but does not answer");
}

/* And when it is told to end then, it does not wait for QEMU. */
static const char *hangs(struct qemu *q, const char *command)
{
	return !strcmp(command, COLLECT) && q->collects == 4 ? silent : NULL;
}

void test_busy_term(void)
{
	qemu.hook = hangs;
	start_qemu(&qemu);
	start_watching_standby();
	start_protect(CHECKED, spec(), "--interval", "1ms", NULL);
	serve_until_log("the primary says: QEMU lives, but does not answer");
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "protect does not end as it should");
	wait_log("ends the protection: detached");
	CHECK(qemu.running, "the guest is left stopped");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == 2, "the last epoch is missing");
}

/* The same before there is an epoch, in the midst of the first copy */
static const char *hangs_at_once(struct qemu *q, const char *command)
{
	return !strcmp(command, COLLECT) && q->looks == 1 ? silent : NULL;
}

void test_busy_term_early(void)
{
	qemu.hook = hangs_at_once;
	start_qemu(&qemu);
	start_watching_standby();
	start_protect(CHECKED, spec(), "--interval", "1ms", NULL);
	be_qemu_until_asleep(qemu.client);
	CHECK(!qemu.collects && qemu.looks == 1, "there are epochs: %u", qemu.collects);
	kill(qemu.client, SIGTERM);
	CHECK(serve() == 0, "protect does not end as it should");
	CHECK(qemu.running, "the guest is left stopped");
	stop_standby(SIGTERM);
}

/* --- Other devices -------------------------------------------------------- */

#define DEVICE(name, type)	", {\"name\": \"" name "\", \"type\": \"child<" type ">\"}"

void test_devices(void)
{
	start_qemu(&qemu);
	qemu.peripheral = DEVICE("net0", "virtio-net-pci") DEVICE("device[0]", "virtio-blk-pci")
			  DEVICE("device[1]", "host-x86_64-cpu") DEVICE("device[2]", "max-arm-cpu")
			  DEVICE("device[3]", "virtio-net-device");
	CHECK(protect(CHECKED, path_of("store"), "--epochs", "1") == 0, "what it knows is refused");
	qemu.attaches = 0;

	qemu.peripheral = DEVICE("net0", "virtio-net-pci") DEVICE("data", "vhost-user-blk-pci");
	must_fail(protect(CHECKED, path_of("store"), "--epochs", "1"),
		  "device data is a vhost-user-blk-pci: what it stores is not replicated");
	remove_tree(path_of("store"));
	CHECK(protect(CHECKED, path_of("store"), "--epochs", "1", "--disk", "external") == 0,
	      "--disk external does not help");

	qemu.peripheral = DEVICE("own", "frobnicator-pci");
	must_fail(protect(CHECKED, path_of("store"), "--epochs", "1", "--disk", "external"),
		  "device own is a frobnicator-pci, which may have a state that is not in an epoch");
	must_fail(protect(CHECKED, path_of("store"), "--epochs", "1", "--trust-device", "frob"),
		  "say --trust-device frobnicator-pci");
	remove_tree(path_of("store"));
	CHECK(protect(CHECKED, path_of("store"), "--epochs", "1", "--trust-device", "none",
		      "--trust-device", "frob*") == 0, "--trust-device does not help");
	CHECK(qemu.attaches == 2, "it attached first");
}

#define NIC	"0000:00:05.0/virtio-net"

/* A network card comes or goes, in the midst of an epoch. */
static const char *plugs(struct qemu *q, const char *command)
{
	if (!strcmp(command, COLLECT) && q->collects == 4) {
		q->plugged = q->plugged ? NULL : ", \"" NIC " 0 11\"";
		q->generation++;
	}
	return NULL;
}

static void must_end_changed(const char *text)
{
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "2s", "--insecure");
	must_fail(protect(CHECKED, spec(), "--interval", "1ms"), text);
	CHECK(log_has("start another standby, whose QEMU has the same"), "it does not say what to do");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == 2, "an epoch of other devices counts");
}

void test_plugged(void)
{
	qemu.hook = plugs;
	must_end_changed("the guest's devices have been changed (new is " NIC ")");
}

void test_unplugged(void)
{
	qemu.hook = plugs;
	qemu.plugged = ", \"" NIC " 0 11\"";
	must_end_changed("the guest's devices have been changed (gone is " NIC ")");
}

/* One without a state that QEMU knows of: no part of the state tells of it. */
static const char *plugs_unknown(struct qemu *q, const char *command)
{
	if (!strcmp(command, COLLECT) && q->collects == 4) {
		q->peripheral = DEVICE("own", "frobnicator-pci");
		q->generation++;
	}
	return NULL;
}

void test_plugged_unknown(void)
{
	qemu.hook = plugs_unknown;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "2s", "--insecure");
	must_fail(protect(CHECKED, spec(), "--interval", "1ms"),
		  "device own is a frobnicator-pci, which may have a state that is not in an epoch");
	wait_log("ends the protection: detached");
	stop_standby(SIGTERM);
	CHECK(snap_of_standby(path_of("ram")) == 2, "an epoch of another guest counts");
}

/* While nobody is attached. */
static const char *plugs_unseen(struct qemu *q, const char *command)
{
	if (strcmp(command, STOP) || q->stops != 4)
		return NULL;
	q->plugged = ", \"" NIC " 0 11\"";
	close_monitor(q);
	return "";
}

void test_plugged_unseen(void)
{
	qemu.hook = plugs_unseen;
	must_end_changed("the guest's devices have been changed (new is " NIC ")");
}

/* --- Leases --------------------------------------------------------------- */

static unsigned int leases;

/* It is given when an epoch was acknowledged, and ends a second after that was sent. */
static const char *leased(struct qemu *q, const char *command)
{
	static uint64_t before_us;
	uint64_t now = kc_boot_us();

	if (strcmp(command, CONT))
		return NULL;
	CHECK(q->lease_us, "the standby could take over, and the guest has no lease");
	leases++;
	CHECK(q->lease_us >= before_us, "the lease gets shorter");
	CHECK(q->lease_us < now + 1000000, "the lease is longer than an epoch was acknowledged");
	before_us = q->lease_us;
	return NULL;
}

void test_lease(void)
{
	qemu.hook = leased;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "2s", "--insecure");
	must_fail(protect(CHECKED, spec(), "--lease", "1900ms"), "--lease can be 1800 ms at most");
	CHECK(!qemu.lease_us, "a lease was given");
	stop_standby(SIGTERM);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "2s", "--insecure");
	CHECK(protect(CHECKED, spec(), "--interval", "1ms", "--epochs", "20", "--lease", "1s") == 0,
	      "protect fails");
	CHECK(leases == 21, "the guest was resumed %u times", leases);
	CHECK(!qemu.lease_us, "the guest will be stopped although the standby was told the end");
	stop_standby(SIGTERM);
	/* Another one without a lease ends that of the one before. */
	qemu.lease_us = kc_boot_us() + 1000000;
	qemu.hook = NULL;
	start_standby(path_of("ram"), "--no-fence", "--timeout", "2s", "--insecure");
	protect_epochs(spec(), "5");
	CHECK(!qemu.lease_us, "a lease is left that nobody renews");
	stop_standby(SIGTERM);
}

void test_lease_untold(void)
{
	qemu.hook = leased;
	start_qemu(&qemu);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "3s", "--insecure");
	start_protect(CHECKED, spec(), "--interval", "1ms", "--lease", "1s", "--io-timeout", "2s", NULL);
	while (!qemu.lease_us)
		step(&qemu, 1);
	kill(standby, SIGSTOP);
	kill(qemu.client, SIGTERM);
	must_fail(serve(), "does not know that the protection has ended");
	CHECK(qemu.lease_us, "the guest runs on, although the standby will take over");
	kill(standby, SIGKILL);
	reap(&standby);
}

/* --- Cores ---------------------------------------------------------------- */

/* How many mappings of a file with this name a process has; all of them are left out of cores */
static unsigned int check_maps(pid_t pid, const char *name)
{
	char path[64], line[1000];
	unsigned int n = 0;
	bool ours = false;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/smaps", pid);
	f = fopen(path, "r");
	CHECK(f, "cannot read %s", path);
	while (fgets(line, sizeof(line), f)) {
		if (strchr(line, '-') && strchr(line, '-') < strchr(line, ' ')) {
			ours = strstr(line, name);
			n += ours;
		} else if (ours && !strncmp(line, "VmFlags:", 8)) {
			CHECK(strstr(line, " dd"), "a core of process %d has %s in it", pid, name);
		}
	}
	fclose(f);
	return n;
}

static unsigned long core_filter(const char *pid)
{
	char path[64];
	unsigned long v = ~0ul;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%s/coredump_filter", pid);
	f = fopen(path, "r");
	CHECK(f && fscanf(f, "%lx", &v) == 1, "cannot read %s", path);
	fclose(f);
	return v;
}

static void check_core(pid_t pid, const char *file)
{
	char text[32];

	CHECK(check_maps(pid, file), "process %d does not map %s", pid, file);
	snprintf(text, sizeof(text), "%d", pid);
	CHECK(!core_filter(text), "a core of process %d has memory in it", pid);
}

void test_core(void)
{
	char text[3 * PATH_MAX];
	unsigned long theirs;
	FILE *f;

	start_qemu(&qemu);
	snprintf(text, sizeof(text), "#!/bin/sh\ncat /proc/self/coredump_filter >%s/filter\n", dir);
	start_standby(path_of("ram"), "--no-fence", "--timeout", "0", "--insecure", "--bare-exec",
		      "--exec", script("qemu", text));
	start_protect(CHECKED, spec(), "--interval", "1ms", NULL);
	serve_until_log("protected since epoch 1");
	check_core(qemu.client, "memfd:pc.ram");
	check_core(standby, "/ram/ram0");
	/* But QEMU's cores are its owner's. */
	die(&qemu);
	CHECK(serve() == 1, "protect does not notice");
	CHECK(reap(&standby) == 0, "the standby does not take over");
	f = fopen(path_of("filter"), "r");
	CHECK(f && fscanf(f, "%lx", &theirs) == 1 && theirs == core_filter("self"),
	      "QEMU makes other cores than it would have made");
	fclose(f);
}
