// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the test programs share.
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ram.h"
#include "harness.h"

/* Nothing that hangs is waited for longer than that. */
#define LIMIT_S		300

jmp_buf out;
char reason[1024];
struct kc_err err;
const char *program, *programs[4], *dir;
uint64_t seed, rng_state;
char psk[PATH_MAX];
pid_t standby;
int port;

void leave(int how, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(reason, sizeof(reason), fmt, ap);
	va_end(ap);
	longjmp(out, how);
}

/* splitmix64 */
uint64_t rnd(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15ull;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	return z ^ z >> 31;
}

unsigned int below(unsigned int n)
{
	return rnd(&rng_state) % n;
}

char *path_of(const char *name)
{
	static char buf[8][PATH_MAX];
	static unsigned int n;
	char *p = buf[n++ % 8];

	snprintf(p, PATH_MAX, "%s/%s", dir, name);
	return p;
}

void remove_tree(const char *path)
{
	pid_t pid = fork();

	if (!pid) {
		execlp("rm", "rm", "-rf", "--", path, NULL);
		_exit(127);
	}
	waitpid(pid, NULL, 0);
}

void write_text(const char *path, mode_t mode, const char *text)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode);

	CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text), "cannot write %s",
	      path);
	close(fd);
}

void read_all(const char *path, uint8_t **buf, size_t *len)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat st;

	CHECK(fd >= 0 && !fstat(fd, &st), "%s: %s", path, strerror(errno));
	*len = st.st_size;
	*buf = malloc(*len + 1);
	CHECK(read(fd, *buf, *len) == (ssize_t)*len, "cannot read %s", path);
	close(fd);
}

bool exists(const char *path)
{
	return !access(path, F_OK);
}

bool wait_for(const char *path, unsigned int ms)
{
	uint64_t end = kc_now_us() + ms * 1000ull;

	while (!exists(path) && kc_now_us() < end)
		poll(NULL, 0, 5);
	return exists(path);
}

static int free_port(void)
{
	struct sockaddr_in sa = { .sin_family = AF_INET,
				  .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	socklen_t len = sizeof(sa);

	CHECK(!bind(fd, (struct sockaddr *)&sa, len) &&
		      !getsockname(fd, (struct sockaddr *)&sa, &len),
	      "no port is free");
	close(fd);
	return ntohs(sa.sin_port);
}

const char *spec(void)
{
	static char s[64];

	snprintf(s, sizeof(s), "tcp:127.0.0.1:%d", port);
	return s;
}

void add_args(const char **argv, int n, va_list ap)
{
	while ((argv[n] = va_arg(ap, const char *)))
		n++;
}

pid_t spawn(const char *const *argv, rlim_t fsize)
{
	pid_t pid = fork();
	int fd;

	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	fd = open(path_of("log"), O_WRONLY | O_CREAT | O_APPEND, 0600);
	dup2(fd, 1);
	dup2(fd, 2);
	if (fsize) {
		struct rlimit rl = { fsize, fsize };

		signal(SIGXFSZ, SIG_IGN);
		setrlimit(RLIMIT_FSIZE, &rl);
	}
	execv(argv[0], (char *const *)argv);
	_exit(127);
}

bool log_has(const char *text)
{
	char *buf;
	size_t len;
	bool has;

	if (!exists(path_of("log")))
		return false;
	read_all(path_of("log"), (uint8_t **)&buf, &len);
	buf[len] = '\0';
	has = strstr(buf, text);
	free(buf);
	return has;
}

void wait_log(const char *text)
{
	uint64_t end = kc_now_us() + 60000000;

	while (!log_has(text)) {
		CHECK(kc_now_us() < end, "\"%s\" never appeared in the log", text);
		poll(NULL, 0, 5);
	}
}

void start_standby_fsize(const char *ram_dir, rlim_t fsize, ...)
{
	char listen[64];
	const char *argv[40] = { program, "standby", "--listen", listen, "--ram-dir", ram_dir,
				 "--psk-file", psk, "--control", path_of("ctl") };
	va_list ap;

	va_start(ap, fsize);
	add_args(argv, 10, ap);
	va_end(ap);
	if (!port)
		port = free_port();
	snprintf(listen, sizeof(listen), "127.0.0.1:%d", port);
	unlink(path_of("log"));
	standby = spawn(argv, fsize);
	wait_log("listening on");
}

int reap(pid_t *pid)
{
	int status = 0;

	if (*pid > 0)
		waitpid(*pid, &status, 0);
	*pid = 0;
	return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

void freeze(pid_t pid)
{
	siginfo_t si;

	kill(pid, SIGSTOP);
	/* Left to be seen again, as it may be stopped already. */
	CHECK(!waitid(P_PID, pid, &si, WSTOPPED | WNOWAIT), "it cannot be stopped: %s", strerror(errno));
}

/* Does each of its threads wait for something? */
bool is_asleep(pid_t pid)
{
	char path[64], line[512], *p;
	bool asleep = true;
	struct dirent *d;
	DIR *dp;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dp = opendir(path);
	CHECK(dp, "%s: %s", path, strerror(errno));
	while ((d = readdir(dp))) {
		snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", pid, atoi(d->d_name));
		f = *d->d_name != '.' ? fopen(path, "r") : NULL;
		/* "NUMBER (NAME) STATE ..." */
		p = f && fgets(line, sizeof(line), f) ? strrchr(line, ')') : NULL;
		asleep = asleep && (!p || p[2] == 'S');
		if (f)
			fclose(f);
	}
	closedir(dp);
	return asleep;
}

void stop_standby(int sig)
{
	if (standby > 0)
		kill(standby, sig);
	reap(&standby);
}

int run(const char *first, ...)
{
	const char *argv[20] = { program, first };
	va_list ap;
	pid_t pid;

	va_start(ap, first);
	add_args(argv, 2, ap);
	va_end(ap);
	pid = spawn(argv, 0);
	return reap(&pid);
}

const char *script(const char *name, const char *text)
{
	const char *path = path_of(name);

	write_text(path, 0700, text);
	return path;
}

uint64_t ram_epoch(const char *path)
{
	struct kc_ram *ram;
	uint64_t nr;

	/* In this process, after the other is dead: this is what a new one would find. */
	OK(kc_ram_open(path, false, &ram, &err));
	nr = kc_ram_epoch(ram);
	kc_ram_close(ram);
	return nr;
}

static void print_log(void)
{
	char line[512];
	FILE *f = fopen(path_of("log"), "r");

	while (f && fgets(line, sizeof(line), f))
		printf("#   log: %s", line);
	if (f)
		fclose(f);
}

/* In a process of its own: 0 passed, 1 failed, 2 skipped. */
static int run_test(const struct test *t, void (*setup)(void))
{
	int how = setjmp(out);

	if (!how) {
		if (setup)
			setup();
		t->run();
	} else if (how == 1) {
		printf("# %s\n", reason);
		print_log();
	}
	if (how == 2)
		printf("SKIP %s\n", reason);
	fflush(stdout);
	if (standby > 0) {
		kill(standby, SIGCONT);
		kill(standby, SIGKILL);
	}
	return how;
}

/* A test in a process of its own */
struct job {
	const struct test *test;
	char dir[PATH_MAX];
	pid_t pid;
	int out;	/* what it prints */
};

static void start_job(struct job *j, const struct suite *suite, size_t nr)
{
	int p[2];

	j->test = &suite->tests[nr];
	/*
	 * In memory if it can be: here processes are killed, not hosts, and fsync() takes its time.
	 */
	snprintf(j->dir, sizeof(j->dir), "%s/kvm-checkpoint-test.XXXXXX",
		 getenv("TMPDIR")	  ? getenv("TMPDIR") :
		 access("/dev/shm", W_OK) ? "/tmp" :
					    "/dev/shm");
	dir = mkdtemp(j->dir);
	if (!dir || pipe2(p, O_CLOEXEC)) {
		perror(j->dir);
		exit(1);
	}
	rng_state = seed ^ nr;
	snprintf(psk, sizeof(psk), "%s/psk", dir);
	fflush(stdout);
	j->pid = fork();
	if (!j->pid) {
		/* A group, so that nothing is left of a test that hangs. */
		setpgid(0, 0);
		dup2(p[1], 1);
		signal(SIGPIPE, SIG_IGN);
		write_text(psk, 0600, "kvm:000102030405060708090a0b0c0d0e0f\n");
		alarm(LIMIT_S);
		_exit(run_test(j->test, suite->setup));
	}
	close(p[1]);
	j->out = p[0];
}

/* Waits for it and tells how it ended; did it fail? */
static bool finish_job(struct job *j, size_t nr)
{
	char *text = NULL, *skip;
	char buf[4096];
	size_t len;
	ssize_t n;
	int status;
	FILE *f;

	f = open_memstream(&text, &len);
	while ((n = read(j->out, buf, sizeof(buf))) > 0)
		fwrite(buf, 1, n, f);
	fclose(f);
	close(j->out);
	waitpid(j->pid, &status, 0);
	kill(-j->pid, SIGKILL);
	skip = strstr(text, "SKIP ");
	if (WIFEXITED(status) && WEXITSTATUS(status) == 2 && skip) {
		skip[strcspn(skip, "\n")] = '\0';
		printf("ok %zu %s # %s\n", nr, j->test->name, skip);
	} else {
		fputs(text, stdout);
		if (WIFSIGNALED(status))
			printf("# it died of signal %d%s\n", WTERMSIG(status),
			       WTERMSIG(status) == SIGALRM ? ": it hung" : "");
		printf("%sok %zu %s\n", status ? "not " : "", nr, j->test->name);
	}
	fflush(stdout);
	free(text);
	remove_tree(j->dir);
	return !WIFEXITED(status) || WEXITSTATUS(status) == 1;
}

/* Of the command line */
struct names {
	const char *name[32];
	size_t nr;
};

static bool is_among(const struct names *names, const char *name)
{
	size_t i;

	for (i = 0; i < names->nr; i++) {
		if (!strcmp(names->name[i], name))
			return true;
	}
	return false;
}

static bool add_name(struct names *names, const char *name, const struct suite *suite)
{
	size_t i;

	for (i = 0; i < suite->nr_tests && strcmp(suite->tests[i].name, name); i++)
		;
	if (i == suite->nr_tests || names->nr == 32) {
		fprintf(stderr, "%s: no such test, or too many of them\n", name);
		return false;
	}
	names->name[names->nr++] = name;
	return true;
}

int run_tests(const struct suite *suite, int argc, char **argv)
{
	struct names only = { .nr = 0 }, without = { .nr = 0 };
	size_t todo[suite->nr_tests], nr_todo = 0, i;
	struct job jobs[suite->jobs];
	bool failed = false;
	int o;

	if (getrandom(&seed, sizeof(seed), 0) != sizeof(seed))
		return 1;
	seed %= 1000000000;
	while ((o = getopt(argc, argv, "s:t:T:")) != -1) {
		if (o == 's')
			seed = strtoull(optarg, NULL, 0);
		else if ((o != 't' && o != 'T') ||
			 !add_name(o == 't' ? &only : &without, optarg, suite))
			return 2;
	}
	if (argc - optind != (int)suite->nr_programs) {
		fprintf(stderr, "usage: %s [-s SEED] [-t NAME]... [-T NAME]... %s\n", argv[0],
			suite->usage);
		return 2;
	}
	for (i = 0; i < suite->nr_programs; i++) {
		programs[i] = realpath(argv[optind + i], NULL);
		if (!programs[i]) {
			perror(argv[optind + i]);
			return 2;
		}
	}
	program = programs[0];
	for (i = 0; i < suite->nr_tests; i++) {
		if ((!only.nr || is_among(&only, suite->tests[i].name)) &&
		    !is_among(&without, suite->tests[i].name))
			todo[nr_todo++] = i;
	}
	printf("TAP version 13\n1..%zu\n# seed %" PRIu64 "\n", nr_todo, seed);
	for (i = 0; i < nr_todo + suite->jobs; i++) {
		struct job *job = &jobs[i % suite->jobs];

		/* They end in order, however long they take. */
		if (i >= suite->jobs && i - suite->jobs < nr_todo)
			failed |= finish_job(job, todo[i - suite->jobs] + 1);
		if (i < nr_todo)
			start_job(job, suite, todo[i]);
	}
	return failed;
}
