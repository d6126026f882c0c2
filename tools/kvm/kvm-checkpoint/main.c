// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvm-checkpoint: the sub-commands that are no daemons, and how all of them are called.
 */
#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <json-c/json.h>

#include "launch.h"
#include "status.h"
#include "store.h"

#ifndef KC_PROGRAM_VERSION
#define KC_PROGRAM_VERSION "1"
#endif

static int fail(const struct kc_err *err)
{
	kc_log(KC_LOG_ERROR, "%s", err->text);
	return 1;
}

/* @why: NULL if that has been said. */
static int bad_usage(const char *command, const char *why)
{
	if (why)
		fprintf(stderr, "kvm-checkpoint: %s: %s\n", command, why);
	fprintf(stderr, "Try: kvm-checkpoint %s --help\n", command);
	return 2;
}

/* What is left on the command line of one that takes a directory, or why not. */
static const char *not_one_directory(int argc, char **argv)
{
	static char why[256];

	if (argc - optind == 1)
		return NULL;
	if (argc == optind)
		return "DIR is missing: which directory?";
	snprintf(why, sizeof(why), "there is an argument too many: %.200s", argv[optind + 1]);
	return why;
}

static int bad_argument(const char *command, const char *option, const char *arg)
{
	char why[256];

	snprintf(why, sizeof(why), "--%s does not take %.200s", option, arg);
	return bad_usage(command, why);
}

static bool parse_epoch(const char *s, uint64_t *nr)
{
	char *end;

	errno = 0;
	*nr = strtoull(s, &end, 10);
	return *s >= '1' && *s <= '9' && !*end && !errno;
}

/* So often is a directory looked at anew if files vanish that it had. */
#define MAX_LOOKS 30

/* What was done with a directory returned @rc: is it to be looked at and done again? */
static bool look_again(int rc, unsigned int *looks, struct kc_err *err)
{
	if (rc != -ESTALE)
		return false;
	if (++*looks < MAX_LOOKS) {
		kc_log(KC_LOG_INFO, "%s: looking again", err->text);
		return true;
	}
	kc_fail(err, EBUSY, "%s: looked %u times, but the directory changes too quickly; try later",
		err->text, *looks);
	return false;
}

/* --- list ----------------------------------------------------------------- */

static const char *kind(const struct kc_store_file *f)
{
	if (f->damaged)
		return "damaged";
	if (f->flags == KC_EPOCH_FULL)
		return "full";
	return f->flags == KC_EPOCH_RESYNC ? "resync" : "increment";
}

static void add_size(struct json_object *list, const char *name, uint64_t npages)
{
	struct json_object *o = json_object_new_object();

	json_object_object_add(o, "name", json_object_new_string(name));
	json_object_object_add(o, "bytes", json_object_new_uint64(npages * KC_PAGE_SIZE));
	json_object_array_add(list, o);
}

static void list_json(const struct kc_store *st)
{
	struct json_object *o = json_object_new_object(), *files = json_object_new_array(), *f;
	struct json_object *blocks = json_object_new_array(), *disks = json_object_new_array();
	char uuid[37];
	size_t i;

	if (st->has_guest) {
		kc_uuid_text(st->guest.uuid, uuid);
		json_object_object_add(o, "uuid", json_object_new_string(uuid));
		json_object_object_add(o, "name", json_object_new_string(st->guest.name));
	}
	for (i = 0; i < st->guest.nr_blocks; i++)
		add_size(blocks, st->guest.blocks[i].name, st->guest.blocks[i].npages);
	json_object_object_add(o, "blocks", blocks);
	for (i = 0; i < st->guest.nr_disks; i++)
		add_size(disks, st->guest.disks[i].name, st->guest.disks[i].npages);
	json_object_object_add(o, "disks", disks);
	for (i = 0; i < st->nr_files; i++) {
		const struct kc_store_file *s = &st->files[i];

		f = json_object_new_object();
		json_object_object_add(f, "epoch", json_object_new_uint64(s->nr));
		json_object_object_add(f, "kind", json_object_new_string(kind(s)));
		json_object_object_add(f, "base", json_object_new_uint64(s->base));
		json_object_object_add(f, "bytes", json_object_new_uint64(s->bytes));
		json_object_object_add(f, "time", json_object_new_int64(s->mtime));
		json_object_array_add(files, f);
	}
	json_object_object_add(o, "epochs", files);
	printf("%s\n", json_object_to_json_string_ext(o, JSON_C_TO_STRING_PRETTY));
	json_object_put(o);
}

static void list_text(const struct kc_store *st)
{
	char uuid[37], when[32];
	struct tm tm;
	time_t t;
	size_t i;

	if (st->has_guest) {
		kc_uuid_text(st->guest.uuid, uuid);
		printf("guest %s %s, %" PRIu64 " MiB\n", uuid, st->guest.name,
		       kc_guest_pages(&st->guest) >> 8);
	}
	for (i = 0; i < st->guest.nr_disks; i++)
		printf("disk%zu %s, %" PRIu64 " MiB\n", i, st->guest.disks[i].name,
		       st->guest.disks[i].npages >> 8);
	if (st->nr_files)
		printf("%12s  %-9s  %12s  %12s  %s\n", "epoch", "kind", "base", "bytes", "time");
	for (i = 0; i < st->nr_files; i++) {
		t = st->files[i].mtime;
		strftime(when, sizeof(when), "%Y-%m-%d %H:%M:%S", localtime_r(&t, &tm));
		printf("%12" PRIu64 "  %-9s  %12" PRIu64 "  %12" PRIu64 "  %s\n", st->files[i].nr,
		       kind(&st->files[i]), st->files[i].base, st->files[i].bytes, when);
	}
}

int cmd_list(int argc, char **argv)
{
	static const struct option options[] = {
		{ "json", 0, NULL, 'j' }, { "help", 0, NULL, 'h' }, { NULL, 0, NULL, 0 }
	};
	const char *why;
	struct kc_store st;
	struct kc_err err;
	bool json = false;
	int o;

	while ((o = getopt_long(argc, argv, "h", options, NULL)) != -1) {
		switch (o) {
		case 'j':
			json = true;
			break;
		case 'h':
			printf("usage: kvm-checkpoint list [--json] DIR\n\nLists the epochs in a directory. It does not read all of them: see verify.\n");
			return 0;
		default:
			return bad_usage("list", NULL);
		}
	}
	why = not_one_directory(argc, argv);
	if (why)
		return bad_usage("list", why);
	if (kc_store_read(argv[optind], &st, &err))
		return fail(&err);
	if (json)
		list_json(&st);
	else
		list_text(&st);
	kc_store_free(&st);
	return 0;
}

/* --- verify --------------------------------------------------------------- */

int cmd_verify(int argc, char **argv)
{
	static const struct option options[] = {
		{ "help", 0, NULL, 'h' }, { NULL, 0, NULL, 0 }
	};
	unsigned int looks = 0;
	const char *why;
	struct kc_store st;
	struct kc_err err;
	uint64_t last;
	size_t n, lost;
	int o, rc;

	while ((o = getopt_long(argc, argv, "h", options, NULL)) != -1) {
		if (o != 'h')
			return bad_usage("verify", NULL);
		printf("usage: kvm-checkpoint verify DIR\n\nReads all epochs of a directory and checks each page and checksum.\n");
		return 0;
	}
	why = not_one_directory(argc, argv);
	if (why)
		return bad_usage("verify", why);
	do {
		if (kc_store_read(argv[optind], &st, &err))
			return fail(&err);
		rc = kc_store_verify(&st, &last, &lost, &err);
		n = st.nr_files;
		kc_store_free(&st);
	} while (look_again(rc, &looks, &err));
	if (rc)
		return fail(&err);
	printf("%zu epochs, %zu of them lost; last sound epoch %" PRIu64 "\n", n, lost, last);
	return lost || !last;
}

/* --- restore -------------------------------------------------------------- */

static void restore_usage(FILE *f)
{
	fprintf(f,
		"usage: kvm-checkpoint restore [OPTION]... DIR [-- QEMU [ARG]...]\n"
		"\n"
		"Writes the RAM, device state and disks of an epoch to files, and starts QEMU on them if\n"
		"a command is given.\n"
		"\n"
		"  --epoch N            which (default: the last sound one)\n"
		"  --ram-dir DIR        where to; must not hold a checkpoint yet\n"
		"                       (default /dev/shm/kvm-restore)\n"
		"  --disk PATH          where a disk goes to: a file that is not there yet, or a block\n"
		"                       device of its size; once for each disk, as list shows them\n"
		"  --bare-exec          add nothing to QEMU's command: it loads {state} by itself\n"
		"  --capability NAME    migration capability to set before the state is loaded\n"
		"  --load-timeout TIME  for QEMU to have loaded the state (default 30s)\n"
		"\n"
		"In QEMU's command are replaced: {ramN} or {ram:NAME} by the path of a block of RAM,\n"
		"{sizeN} by its size, {diskN} by the path of a disk, {state} by that of the device\n"
		"state, {epoch} by its number.\n");
}

/* Start QEMU on what was restored and stay until it ends. */
static int run_restored(struct kc_launch *l)
{
	struct kc_qemu q = { .pid = 0 };
	struct kc_err err;
	int status;

	if (kc_launch(l, &q, &err))
		return fail(&err);
	qmp_close(&q.qmp);
	if (l->stopped)
		kc_log(KC_LOG_INFO,
		       "the guest is at epoch %" PRIu64 ", and stopped as it was when that was taken",
		       l->epoch);
	else
		kc_log(KC_LOG_INFO, "the guest runs from epoch %" PRIu64, l->epoch);
	while (waitpid(q.pid, &status, 0) < 0 && errno == EINTR)
		;
	return WIFEXITED(status) && !WEXITSTATUS(status) ? 0 : 1;
}

int cmd_restore(int argc, char **argv)
{
	static const struct option options[] = {
		{ "epoch", 1, NULL, 'e' },
		{ "ram-dir", 1, NULL, 'r' },
		{ "disk", 1, NULL, 'd' },
		{ "bare-exec", 0, NULL, 'b' },
		{ "capability", 1, NULL, 'C' },
		{ "load-timeout", 1, NULL, 'L' },
		{ "help", 0, NULL, 'h' },
		{ NULL, 0, NULL, 0 }
	};
	char *ram[KC_MAX_BLOCKS + 1] = { NULL }, *disks[KC_MAX_DISKS] = { NULL };
	char *caps[8] = { NULL }, *state = NULL, *real;
	struct kc_launch l = { .capabilities = caps, .ram = ram, .timeout_ms = 30000 };
	const char *out = "/dev/shm/kvm-restore";
	const char *disk_args[KC_MAX_DISKS];
	unsigned int nr_caps = 0, nr_disks = 0, looks = 0;
	struct kc_store st;
	struct kc_err err;
	uint64_t want = 0, nr;
	uint32_t i;
	int o, rc;

	while ((o = getopt_long(argc, argv, "+h", options, NULL)) != -1) {
		switch (o) {
		case 'e':
			if (parse_epoch(optarg, &want))
				break;
			return bad_argument("restore", "epoch", optarg);
		case 'r':
			out = optarg;
			break;
		case 'd':
			if (nr_disks == KC_MAX_DISKS)
				return bad_usage("restore", "--disk: these are too many");
			disk_args[nr_disks++] = optarg;
			break;
		case 'b':
			l.bare = true;
			break;
		case 'C':
			if (nr_caps == 7)
				return bad_usage("restore", "--capability: these are too many");
			caps[nr_caps++] = optarg;
			break;
		case 'L':
			if (!kc_parse_ms(optarg, &l.timeout_ms) && l.timeout_ms)
				break;
			return bad_argument("restore", "load-timeout", optarg);
		case 'h':
			restore_usage(stdout);
			return 0;
		default:
			return bad_usage("restore", NULL);
		}
	}
	if (optind >= argc)
		return bad_usage("restore", "DIR is missing: which directory?");
	l.argv = argv + optind + 1;
	if (l.argv[0] && !strcmp(l.argv[0], "--"))
		l.argv++;
	if (kc_launch_check(&l, &err)) {
		fail(&err);
		return 2;
	}
	do {
		if (kc_store_read(argv[optind], &st, &err))
			return fail(&err);
		rc = kc_store_restore(&st, want, out, disk_args, nr_disks, &nr, &l.stopped, &err);
		if (rc == -ESTALE)
			kc_store_free(&st);
	} while (look_again(rc, &looks, &err));
	real = rc ? NULL : realpath(out, NULL);
	if (!rc && !real)
		rc = kc_fail(&err, errno, "cannot find %s: %s", out, strerror(errno));
	for (i = 0; i < st.guest.nr_blocks && !rc; i++) {
		if (asprintf(&ram[i], "%s/ram%u", real, i) < 0)
			rc = kc_fail(&err, ENOMEM, "out of memory");
	}
	for (i = 0; i < nr_disks && !rc; i++) {
		disks[i] = realpath(disk_args[i], NULL);
		l.disks[i] = disks[i];
		if (!disks[i])
			rc = kc_fail(&err, errno, "cannot find %s: %s", disk_args[i], strerror(errno));
	}
	if (!rc && asprintf(&state, "%s/state", real) < 0)
		rc = kc_fail(&err, ENOMEM, "out of memory");
	if (rc) {
		rc = fail(&err);
	} else if (l.argv[0]) {
		l.guest = &st.guest;
		l.state = state;
		l.epoch = nr;
		rc = run_restored(&l);
	} else {
		printf("epoch %" PRIu64 "\n", nr);
		for (i = 0; i < st.guest.nr_blocks; i++)
			printf("ram %s %" PRIu64 " %s\n", st.guest.blocks[i].name,
			       st.guest.blocks[i].npages * KC_PAGE_SIZE, ram[i]);
		for (i = 0; i < nr_disks; i++)
			printf("disk %s %" PRIu64 " %s\n", st.guest.disks[i].name,
			       st.guest.disks[i].npages * KC_PAGE_SIZE, disks[i]);
		printf("state %s\n", state);
		if (l.stopped)
			printf("stopped\n");
	}
	for (i = 0; i < KC_MAX_BLOCKS; i++)
		free(ram[i]);
	for (i = 0; i < nr_disks; i++)
		free(disks[i]);
	free(state);
	free(real);
	kc_store_free(&st);
	return rc;
}

/* --- status --------------------------------------------------------------- */

static void status_usage(FILE *f)
{
	fprintf(f,
		"usage: kvm-checkpoint status [--json] SOCKET\n"
		"       kvm-checkpoint status --prometheus SOCKET...\n"
		"       kvm-checkpoint status SOCKET COMMAND\n"
		"\n"
		"Asks a daemon at its --control socket for its status, or gives it a command: promote\n"
		"(to a standby: fail over now; promote-anyway does so from an epoch that clients may know\n"
		"more than) or what protect --help names.  What Prometheus reads may be\n"
		"that of several daemons.\n");
}

/* Those who do not answer are left out, and make it fail. */
static int status_prometheus(char **sockets, size_t n)
{
	char **texts = calloc(n, sizeof(*texts));
	struct kc_err err;
	size_t i, got = 0;

	if (!texts) {
		kc_log(KC_LOG_ERROR, "out of memory");
		return 1;
	}
	for (i = 0; i < n; i++) {
		if (kc_ctl_request(sockets[i], "status prometheus", &texts[got], &err))
			fail(&err);
		else
			got++;
	}
	kc_prometheus_merge(texts, got, stdout);
	for (i = 0; i < got; i++)
		free(texts[i]);
	free(texts);
	return got < n;
}

int cmd_status(int argc, char **argv)
{
	static const struct option options[] = {
		{ "json", 0, NULL, 'j' }, { "prometheus", 0, NULL, 'p' }, { "help", 0, NULL, 'h' },
		{ NULL, 0, NULL, 0 }
	};
	const char *line = NULL;
	struct kc_err err;
	int o, n;
	char *text;

	while ((o = getopt_long(argc, argv, "h", options, NULL)) != -1) {
		switch (o) {
		case 'j':
			line = "status json";
			break;
		case 'p':
			line = "status prometheus";
			break;
		case 'h':
			status_usage(stdout);
			return 0;
		default:
			return bad_usage("status", NULL);
		}
	}
	n = argc - optind;
	if (n && line && !strcmp(line, "status prometheus"))
		return status_prometheus(argv + optind, n);
	if (n == 2 && !line && argv[optind + 1][0])
		line = argv[optind + 1];
	else if (n != 1)
		return bad_usage("status", n ? "one SOCKET, and a command only without --json" :
				 "SOCKET is missing: what was the daemon's --control?");
	if (kc_ctl_request(argv[optind], line ? line : "status", &text, &err))
		return fail(&err);
	fputs(text, stdout);
	free(text);
	return 0;
}

/* --- All of them ---------------------------------------------------------- */

/* Where protect.c is not built in. */
__attribute__((weak)) int cmd_protect(int argc, char **argv)
{
	(void)argc;
	(void)argv;
	kc_log(KC_LOG_ERROR, "this kvm-checkpoint was built without protect");
	return 1;
}

static void usage(FILE *f)
{
	fprintf(f,
		"usage: kvm-checkpoint COMMAND [OPTION]... [ARG]...\n"
		"\n"
		"Keeps a copy of a running QEMU/KVM guest up to date, elsewhere.\n"
		"\n"
		"  protect   take epochs of a guest and hand them to a standby or a directory\n"
		"  standby   receive them, and go on with the guest when its primary is gone\n"
		"  restore   get an epoch out of a directory, and start QEMU on it\n"
		"  verify    check all epochs of a directory\n"
		"  list      list them\n"
		"  status    ask a daemon how it is, or give it a command\n"
		"  unplug    let go what is held back of tap devices, if nobody else does\n"
		"\n"
		"Each has --help; the manual is kvm-checkpoint(8). --version tells the version.\n");
}

int main(int argc, char **argv)
{
	static const struct { const char *name; int (*run)(int argc, char **argv); } commands[] = {
		{ "protect", cmd_protect }, { "standby", cmd_standby }, { "restore", cmd_restore },
		{ "verify", cmd_verify }, { "list", cmd_list }, { "status", cmd_status },
		{ "unplug", cmd_unplug },
	};
	struct rlimit rl;
	size_t i;

	if (argc < 2) {
		usage(stderr);
		return 2;
	}
	if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h")) {
		usage(stdout);
		return 0;
	}
	if (!strcmp(argv[1], "--version")) {
		printf("kvm-checkpoint %s, protocol %d\n", KC_PROGRAM_VERSION, KC_VERSION);
		return 0;
	}
	signal(SIGPIPE, SIG_IGN);
	kc_store_progress = isatty(STDERR_FILENO) && (!strcmp(argv[1], "verify") ||
						      !strcmp(argv[1], "restore"));
	/* A long chain of epochs is many files. */
	if (!getrlimit(RLIMIT_NOFILE, &rl)) {
		rl.rlim_cur = rl.rlim_max < 65536 ? rl.rlim_max : 65536;
		setrlimit(RLIMIT_NOFILE, &rl);
	}
	for (i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
		if (strcmp(argv[1], commands[i].name))
			continue;
		/* getopt_long() begins its messages with this. */
		if (asprintf(&argv[1], "kvm-checkpoint: %s", commands[i].name) < 0)
			return 1;
		return commands[i].run(argc - 1, argv + 1);
	}
	kc_log(KC_LOG_ERROR, "there is no command %s", argv[1]);
	fprintf(stderr, "Try: kvm-checkpoint --help\n");
	return 2;
}
