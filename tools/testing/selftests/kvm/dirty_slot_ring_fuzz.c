// SPDX-License-Identifier: GPL-2.0-only
/*
 * Dirty slot rings: random programs against a model.
 *
 * A run is a row of rounds.  Each makes a VM with random rings, slots and vCPUs,
 * two more processes that get log fds over SCM_RIGHTS, and alternates between
 *
 * steps	one operation at a time, by any thread or process: calls with
 *		good, tiny, faulting and garbage arguments, guest writes, consumer
 *		stores honest and hostile, mappings, forks, slot and vCPU changes.
 *		The model knows for each page of each log whether it is in it, so
 *		each answer and each errno is known in advance;
 * storms	all at once.  Who is told of a page copies it, and in the end the
 *		copy must be the memory: vCPUs and the host write ever new values.
 *		And marks must be as many as pages taken.
 *
 * Step i of round r of seed s draws from a generator seeded with (s, r, i), so
 * that it repeats whatever the steps before it did.  A storm's actors repeat,
 * their timing does not.
 *
 * The model is in _model, the guest in _guest, the steps in _calls and _steps,
 * storms in _storm, other processes in _peers, what is said of a failure in
 * _report, harvests of all slots in _all; here are rounds and the command line.
 */
#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "dirty_slot_ring_fuzz.h"

struct shared *sh;

uint8_t *memory[NR_SLOTS];
uint8_t *arena, *arena_ro;

struct options opt = { .ops = 100000 };

uint64_t round_nr, step_nr, nr_ops, nr_storm_ops, nr_guest_pages, nr_storms;
bool in_storm;
__thread uint64_t luck;

static time_t start_time;

/* -- rounds --------------------------------------------------------------- */

static void tell(const char *what)
{
	if (opt.verbose)
		printf("# %ld s: round %lu, step %lu, %lu operations after %s\n",
		       time(NULL) - start_time, round_nr, step_nr, nr_ops, what);
}

static void run_round(void)
{
	static const uint32_t sizes[] = { 1, 2, 8, 64, 64, 256, 4096 };
	static const uint64_t manuals[] = {
		0, 0, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
		KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
	};
	static const unsigned int lengths[] = { 300, 1000, 3000, 10000 };
	int phases, s, v, nr_vcpus;
	unsigned int i, steps;
	struct mlog *l;

	memset(&m, 0, sizeof(m));
	step_nr = 0;
	start_peers();
	luck = mix(opt.seed ^ mix(round_nr));
	m.entries = sizes[below(ARRAY_SIZE(sizes))];
	/* A ring of one is full before the write that filled it is done. */
	m.exit_on_full = m.entries > 1 && once_in(3);
	m.manual = manuals[below(ARRAY_SIZE(manuals))];
	nr_vcpus = 1 + below(2);
	phases = 1 + below(4);
	note("round: entries, exit, manual, vCPUs", m.entries, m.exit_on_full, m.manual, nr_vcpus);

	m.vm = __vm_create(VM_SHAPE_DEFAULT, MAX_VCPUS, 0);
	dsr_enable(m.vm, m.entries, m.exit_on_full ? KVM_DIRTY_SLOT_RING_EXIT_ON_FULL : 0);
	if (m.manual)
		vm_enable_cap(m.vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, m.manual);
	for (i = 0; i < NR_ALL; i++)
		all_open(&m.all[i]);
	for (s = 0; s < NR_SLOTS * 2; s++)
		guest_map(m.vm, SLOT_GVA(s / 2, s % 2), SLOT_GPA(s / 2, s % 2), WINDOW);
	for (v = 0; v < nr_vcpus; v++) {
		add_vcpu();
		/*
		 * One by one they map what they have in common in slot 0: some
		 * emulators cannot do it at the same time.
		 */
		m.mb[v]->op = OP_NONE;
		CHECK(run_vcpu(v), "full ring");
	}
	for (s = 0; s < NR_SLOTS; s++) {
		m.slot[s].npages = some_size();
		m.slot[s].exists = true;
		set_slot(s, true);
		model_log_new(s);
	}

	for (; phases && nr_ops < opt.ops; phases--) {
		steps = lengths[below(ARRAY_SIZE(lengths))];
		for (i = 0; i < steps; i++)
			step(true);
		tell("steps");
		run_storm();
		tell("storm");
	}
	for (i = 0; i < 500; i++)
		step(true);

	/* The VM goes, its logs stay. */
	for (v = 0; v < m.nr_vcpus; v++)
		close(m.stats[v]);
	kvm_vm_free(m.vm);
	/* Whoever says that a check failed must not look for them any more. */
	m.nr_vcpus = 0;
	m.gone = true;
	for (s = 0; s < NR_SLOTS; s++)
		model_log_dies(&m.slot[s]);
	for (l = m.log; l < m.log + NR_LOGS; l++)
		l->dead = true;
	for (i = 0; i < 200; i++)
		step(false);
	for (l = m.log; l < m.log + NR_LOGS; l++) {
		if (!l->used)
			continue;
		harvest_all(l);
		if (log_count(l).yes)
			harvest_all(l);
		check_nothing_left(l);
		log_forget(l);
	}
	for (i = 0; i < NR_ALL; i++)
		all_close(&m.all[i]);
	stop_peers();
}

/* -- main ----------------------------------------------------------------- */

static void on_usr1(int sig)
{
}

static void *share(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	TEST_ASSERT(p != MAP_FAILED, "no memory");
	return p;
}

static void set_up(void)
{
	struct sigaction sa = { .sa_handler = on_term, .sa_flags = SA_RESTART };
	sigset_t all, before;
	pthread_t thread;
	int i, fd;

	sh = share(sizeof(*sh));
	sh->main_pid = getpid();
	check_report = report_failure;
	for (i = 0; i < NR_SLOTS; i++)
		memory[i] = share(MAX_PAGES * PG);

	fd = kvm_memfd_alloc(ARENA_PAGES * PG, false);
	arena = mmap(NULL, (ARENA_PAGES + 1) * PG, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TEST_ASSERT(arena != MAP_FAILED, "no memory");
	arena = mmap(arena, ARENA_PAGES * PG, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
		     fd, 0);
	arena_ro = mmap(NULL, ARENA_PAGES * PG, PROT_READ, MAP_SHARED, fd, 0);
	TEST_ASSERT(arena != MAP_FAILED && arena_ro != MAP_FAILED, "no memory");
	close(fd);

	sigaction(SIGTERM, &sa, NULL);
	/* Without SA_RESTART: it is there to interrupt system calls. */
	sa = (struct sigaction){ .sa_handler = on_usr1 };
	sigaction(SIGUSR1, &sa, NULL);

	sigfillset(&all);
	CHECK_OK(pthread_sigmask(SIG_SETMASK, &all, &before));
	CHECK_OK(pthread_create(&thread, NULL, watch, NULL));
	CHECK_OK(pthread_sigmask(SIG_SETMASK, &before, NULL));

	CHECK_OK(sem_init(&sh->rpc[EX_THREAD].call, 1, 0));
	CHECK_OK(sem_init(&sh->rpc[EX_THREAD].answer, 1, 0));
	CHECK_OK(pthread_create(&thread, NULL, thread_main, NULL));
}

static void help(FILE *to)
{
	fprintf(to,
		"usage: dirty_slot_ring_fuzz [-s SEED] [-n OPS] [-r ROUND] [-t SECONDS] [-B HOW] [-v]\n"
		"\n"
		"Random programs of calls on dirty slot rings, checked against a model.\n"
		"\n"
		"-s SEED     the same program again (default: a new one, printed)\n"
		"-n OPS      end after the round that reaches so many operations (default 100000)\n"
		"-r ROUND    begin with this round\n"
		"-t SECONDS  end after the round that takes so long, whatever -n says\n"
		"-v          a line for each round\n"
		"-B HOW      self-test: pretend a kernel that errs, and be sure to fail.\n"
		"            lose: HARVEST withholds a page; twice: it reports one again;\n"
		"            vm-lose, vm-twice, vm-log, vm-layout: the harvest of all slots\n"
		"            does so, names a wrong log, or says nothing of logs that came;\n"
		"            errno: EINVAL becomes success; lose-storm, twice-storm, ...: only\n"
		"            where many work at once; hang: a vCPU never comes back, and 20 s\n"
		"            are enough to say so\n");
}

static uint64_t parse_u64(const char *s, char opt_char)
{
	char *end;
	uint64_t n;

	errno = 0;
	n = strtoull(s, &end, 0);
	if (errno || !*s || *end || *s == '-') {
		fprintf(stderr, "dirty_slot_ring_fuzz: -%c needs a number, not \"%s\"\n",
			opt_char, s);
		exit(2);
	}
	return n;
}

static void set_broken(char *how)
{
	static const char * const names[] = {
		[BREAK_LOSE] = "lose", [BREAK_TWICE] = "twice", [BREAK_ERRNO] = "errno",
		[BREAK_HANG] = "hang", [BREAK_VM_LOSE] = "vm-lose", [BREAK_VM_TWICE] = "vm-twice",
		[BREAK_VM_LOG] = "vm-log", [BREAK_VM_LAYOUT] = "vm-layout",
	};
	char *dash = strrchr(how, '-');
	int i;

	if (dash && !strcmp(dash, "-storm")) {
		opt.storm_only = true;
		*dash = 0;
	}
	for (i = 1; i < ARRAY_SIZE(names); i++) {
		if (!strcmp(how, names[i]))
			opt.how = i;
	}
	if (!opt.how) {
		fprintf(stderr, "dirty_slot_ring_fuzz: -B %s? try -h\n", how);
		exit(2);
	}
}

int main(int argc, char *argv[])
{
	bool seeded = false;
	int c;

	while ((c = getopt(argc, argv, "s:n:r:t:B:vh")) != -1) {
		switch (c) {
		case 's':
			opt.seed = parse_u64(optarg, c);
			seeded = true;
			break;
		case 'n':
			opt.ops = parse_u64(optarg, c);
			break;
		case 'r':
			opt.first_round = parse_u64(optarg, c);
			break;
		case 't':
			opt.seconds = parse_u64(optarg, c);
			break;
		case 'B':
			set_broken(optarg);
			break;
		case 'v':
			opt.verbose = true;
			break;
		case 'h':
			help(stdout);
			return 0;
		default:
			help(stderr);
			return 2;
		}
	}
	if (optind != argc) {
		help(stderr);
		return 2;
	}
	TEST_REQUIRE(kvm_has_cap(KVM_CAP_DIRTY_SLOT_RING));

	if (!seeded) {
		TEST_ASSERT(getrandom(&opt.seed, 4, 0) == 4, "getrandom");
		opt.seed &= 0xffffffff;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	start_time = time(NULL);
	printf("# seed %lu\n", opt.seed);
	set_up();

	for (round_nr = opt.first_round; nr_ops < opt.ops; round_nr++) {
		run_round();
		tell("the round");
		if (opt.seconds && time(NULL) - start_time >= opt.seconds)
			break;
	}
	printf("ok - seed %lu: %lu operations, %lu of them in %lu storms, ", opt.seed, nr_ops,
	       nr_storm_ops, nr_storms);
	printf("%lu guest accesses, %ld s\n", nr_guest_pages, time(NULL) - start_time);
	return 0;
}
