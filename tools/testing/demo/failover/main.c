// SPDX-License-Identifier: GPL-2.0-only
/*
 * Runs inside the rig: protects a guest with kvm-checkpoint, kills what can be killed, and asks the
 * guest that goes on elsewhere whether its memory is what it should be and how far it had come.
 *
 * usage: failover QEMU FIRMWARE KERNEL INITRD KVM-CHECKPOINT TEST...
 *
 * scripts/failover says which tests there are.
 *
 * What an acknowledged epoch promises: the guest has been asked for its step counts all the time,
 * so it is known that it had come at least so far when the epoch was taken.  The one that goes on
 * must not know less.
 *
 * That there is one copy: the guest keeps writing to a disk that all copies of it have in common,
 * and reads back what it wrote.  Who takes over may see one write of another, the last one of who
 * had it before; whoever sees more is not alone.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "failover.h"

const char *qemu, *firmware, *kernel, *initrd, *checkpoint, *self = "/bin/failover";
/* Small rings, so that they get full */
const char *accel = "kvm,dirty-slot-ring-size=512";
bool tls;
const char *guest_cpus = "2";
unsigned int guest_rate = 400;
unsigned int guest_mb = GUEST_MB, guest_work_mb = WORK_MB;
struct measured measured;
unsigned int guest_tells;
unsigned int guest_has_vhost;
bool guest_has_net, guest_has_ledger;
const char *net_option;
bool packet_epochs;
const char *interval = "50ms";
const char *old_qemu, *old_checkpoint, *protect_with;
const char *max_dirty, *chain;
uint64_t started, seed;
unsigned int last_gen, lane, nr_lanes = 1;
struct vm vm;
pid_t standby;

#define MAX_LANES	4

/* How many lanes have passed each argument */
static atomic_uint *passed;

static void make_files(void)
{
	uint64_t n;
	FILE *f;

	if (!make_disk(DISK_FILE))
		fatal(DISK_FILE);
	f = fopen(HOLDER_FILE, "w");
	if (!f || ftruncate(fileno(f), 1 << 20) || fclose(f))
		fatal(HOLDER_FILE);
	umask(077);
	f = fopen(PSK_FILE, "w");
	if (!f)
		fatal(PSK_FILE);
	fprintf(f, "demo:");
	for (n = 0; n < 4; n++)
		fprintf(f, "%016lx", mix(now_us() + n));
	fprintf(f, "\n");
	if (fclose(f))
		fatal(PSK_FILE);
}

static const struct test {
	const char *name;
	bool (*run)(unsigned int n);
	bool own_guests;		/* boots what it needs */
} tests[] = {
	{ "kills", test_kills, false },
	{ "seconds", test_seconds, false },
	{ "paused", test_paused, false },
	{ "equal", test_equal, false },
	{ "meddles", test_meddles, false },
	{ "resets", test_resets, false },
	{ "daemons", test_daemons, false },
	{ "chains", test_chains, false },
	{ "early", test_early, false },
	{ "boots", test_boot, true },
	{ "links", test_links, false },
	{ "measure", test_measure, true },
	{ "switches", test_switches, false },
	{ "copies", test_copies, false },
	{ "faults", test_faults, false },
	{ "ledger", test_ledger, true },
	{ "lies", test_ledger_control, true },
	{ "days", test_ledger_days, true },
	{ "turns", test_ledger_turns, true },
	{ "copying", test_copying, true },
	{ "archives", test_archives, true },
	{ "wrong", test_archives_control, true },
	{ "latency", test_latency, true },
	{ "stale", test_stale, true },
};

/* The -accel of the guest that is there, NULL if there is none */
static const char *booted;

static bool new_guest(void)
{
	leave(&vm);
	remove_ram(vm.ram);
	kill_now(&standby, true);
	booted = accel;
	return boot(&vm);
}

static bool run_test(const struct test *t, const struct fault_kind *kind, unsigned int n)
{
	bool own = t && t->own_guests, ok = own || booted == accel || new_guest();

	ok = ok && (t ? t->run(n) : test_fault(kind, n));
	if (own)
		booted = NULL;
	return ok;
}

/* What it says is what was asked for, for who repeats it */
static void set_seed(uint64_t n)
{
	seed = n;
	note("seed=%lu", seed);
}

/* What guests are like, for what follows: "measure", or all */
static bool set_shape(const char *arg, size_t len, const char *value, unsigned int n)
{
	static const struct {
		const char *name;
		unsigned int *to;
		bool boots;		/* one that runs is not like that */
	} numbers[] = {
		{ "rate", &measured.rate, true }, { "unused", &guest_tells, true },
		{ "vhost", &guest_has_vhost, true }, { "overlay", &guest_has_overlay, true },
		{ "ram", &measured.mb, false },
		{ "work", &measured.work_mb, false }, { "logs", &measured.logs, false },
		{ "interval", &measured.interval_ms, false },
	};
	size_t k;

	if (len == 4 && !strncmp(arg, "cpus", len)) {
		guest_cpus = value;
		measured.cpus = value;
		booted = NULL;
		return true;
	}
	for (k = 0; k < ARRAY_SIZE(numbers); k++) {
		if (strlen(numbers[k].name) != len || strncmp(arg, numbers[k].name, len))
			continue;
		*numbers[k].to = n;
		if (numbers[k].to == &measured.rate)
			guest_rate = n;
		if (numbers[k].boots)
			booted = NULL;
		return true;
	}
	return false;
}

static bool own_files(void)
{
	return !unshare(CLONE_NEWNS) && !mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) &&
	       !mount("tmpfs", "/tmp", "tmpfs", 0, NULL) &&
	       !mount("tmpfs", "/dev/shm", "tmpfs", 0, NULL);
}

/* Who waits for the lanes does not come back from this, each of them does */
static void split(unsigned int n)
{
	pid_t parent = getpid();
	unsigned int i;
	int status, rc = 0;

	nr_lanes = n;
	for (i = 0; i < n; i++) {
		pid_t pid = fork();

		if (pid < 0)
			fatal("fork");
		if (pid)
			continue;
		lane = i;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() != parent)
			_exit(1);
		if (!own_files())
			fatal("files of its own for each lane");
		return;
	}
	for (i = 0; i < n; i++) {
		wait(&status);
		if (!WIFEXITED(status) || WEXITSTATUS(status))
			rc = WIFEXITED(status) ? WEXITSTATUS(status) : 1;
	}
	exit(rc);
}

int main(int argc, char **argv)
{
	int i, first = 6;
	uint64_t chance;
	bool ok = true;
	size_t k;

	if (argc == 3 && !strcmp(argv[1], "fence"))
		return be_fence(argv[2]);
	if (argc == 2 && !strcmp(argv[1], "list")) {
		for (k = 0; k < ARRAY_SIZE(tests); k++)
			printf("%s\n", tests[k].name);
		list_faults();
		return 0;
	}
	if (argc < 7) {
		fprintf(stderr,
			"usage: failover QEMU FIRMWARE KERNEL INITRD KVM-CHECKPOINT TEST...\n");
		return 2;
	}
	qemu = argv[1];
	firmware = argv[2];
	kernel = argv[3];
	initrd = argv[4];
	checkpoint = argv[5];
	started = now_us();
	measured.instructions = getenv("COUNTS_INSTRUCTIONS");
	signal(SIGPIPE, SIG_IGN);
	vm.ctl = -1;
	vm.mon = -1;
	passed = mmap(NULL, argc * sizeof(*passed), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (passed == MAP_FAILED)
		fatal("mmap");
	chance = mix(now_us() ^ time(NULL)) % 1000000;
	if (!strncmp(argv[first], "lanes=", 6)) {
		unsigned long n = strtoul(argv[first++] + 6, NULL, 10);

		if (!n || n > MAX_LANES || first == argc) {
			fprintf(stderr, "failover: 1 to %u lanes, and a test\n", MAX_LANES);
			return 2;
		}
		if (n > 1)
			split(n);
	}
	watch_over_notes();
	make_files();
	if (strncmp(argv[first], "seed=", 5))
		set_seed(chance + lane);

	for (i = first; i < argc && ok; i++) {
		char *value = strchr(argv[i], '=');
		size_t len = value ? value - argv[i] : 0;
		uint64_t n = value ? strtoull(value + 1, NULL, 10) : 0;
		const struct fault_kind *kind = find_fault(argv[i], len);

		if (!strncmp(argv[i], "accel=", 6)) {
			accel = value + 1;
			continue;
		}
		if (set_shape(argv[i], len, value + 1, n))
			continue;
		if (!strncmp(argv[i], "old=", 4)) {
			old_qemu = "/old/qemu-system-x86_64";
			old_checkpoint = "/old/kvm-checkpoint";
			continue;
		}
		if (!strncmp(argv[i], "tls=", 4)) {
			tls = n;
			continue;
		}
		if (!strncmp(argv[i], "seed=", 5)) {
			set_seed(n + lane);
			continue;
		}
		for (k = 0; k < ARRAY_SIZE(tests); k++) {
			if (strlen(tests[k].name) == len && !strncmp(tests[k].name, argv[i], len))
				break;
		}
		if (!n || (k == ARRAY_SIZE(tests) && !kind)) {
			fprintf(stderr, "failover: %s: not TEST=NUMBER\n", argv[i]);
			return 2;
		}
		/* Its share */
		n = n / nr_lanes + (lane < n % nr_lanes);
		ok = !n || run_test(kind ? NULL : &tests[k], kind, n);
		if (!ok || ++passed[i] == nr_lanes)
			printf("%s %s\n", ok ? "PASSED" : "FAILED", argv[i]);
		fflush(stdout);
	}
	leave(&vm);
	kill_now(&standby, true);
	return ok ? 0 : 1;
}
