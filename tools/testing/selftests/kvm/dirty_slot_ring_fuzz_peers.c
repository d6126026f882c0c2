// SPDX-License-Identifier: GPL-2.0-only
/*
 * The fuzzer of dirty slot rings: who makes a call, this thread or another, this
 * process or another; and what a kernel that errs would answer.
 */
#include <errno.h>
#include <semaphore.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dirty_slot_ring_fuzz.h"

/* -- the kernel's answers, and those of a kernel that errs ---------------- */

/*
 * The self-test: what a broken kernel would say, now and then, so that it can
 * be seen that the checks below notice.
 */
static int vm_call_broken(struct kvm_dirty_vm_harvest *args)
{
	static struct kvm_dirty_vm_run before;
	struct kvm_dirty_vm_run *runs = (void *)(uintptr_t)args->runs, *last, run, tmp;

	if (opt.how == BREAK_VM_LAYOUT)
		args->flags &= ~KVM_DIRTY_HARVEST_LAYOUT;
	if (!args->nr_runs || !once_in(8))
		return 0;
	last = &runs[args->nr_runs - 1];
	memcpy(&run, last, sizeof(run));
	switch (opt.how) {
	case BREAK_VM_LOSE:
		args->nr_pages--;
		if (!--run.npages)
			args->nr_runs--;
		break;
	case BREAK_VM_TWICE:
		/* of another slot's log, perhaps */
		if (before.npages && run.npages == 1) {
			args->nr_pages += before.npages - 1;
			tmp = before;
			before = run;
			run = tmp;
		} else {
			before = run;
		}
		break;
	case BREAK_VM_LOG:
		run.log++;
		break;
	}
	memcpy(last, &run, sizeof(run));
	return 0;
}

static int call_broken(int fd, unsigned long cmd, void *argp, int ret)
{
	static struct kvm_dirty_run before;
	static int before_fd;
	struct kvm_dirty_slot_runs *args = argp;
	struct kvm_dirty_run *runs, *last;

	if (opt.storm_only != in_storm)
		return ret;
	if (opt.how == BREAK_ERRNO && ret == -1 && errno == EINVAL)
		return 0;
	if (cmd == KVM_DIRTY_VM_LOG_HARVEST)
		return ret ?: vm_call_broken(argp);
	if (cmd != KVM_DIRTY_SLOT_LOG_HARVEST || ret || !args->nr_runs || !once_in(8))
		return ret;

	runs = (void *)(uintptr_t)args->runs;
	last = &runs[args->nr_runs - 1];
	if (opt.how == BREAK_LOSE) {
		args->nr_pages--;
		if (!--last->npages)
			args->nr_runs--;
	} else if (opt.how == BREAK_TWICE) {
		if (before.npages && before_fd == fd && runs[0].npages == 1) {
			runs[0] = before;
			args->nr_pages += before.npages - 1;
		}
		before = *last;
		before_fd = fd;
	}
	return ret;
}

/* What the kernel writes to the array is over the address of the array then. */
static bool runs_over_args(unsigned long cmd, const void *argp)
{
	const struct kvm_dirty_slot_runs *args = argp;

	return cmd == KVM_DIRTY_SLOT_LOG_HARVEST && argp == arena &&
	       args->runs == (uintptr_t)argp;
}

int call(int fd, unsigned long cmd, void *argp)
{
	int ret = ioctl(fd, cmd, argp);

	return unlikely(opt.how) ? call_broken(fd, cmd, argp, ret) : ret;
}

/* -- calls by whom --------------------------------------------------------- */

void sem_down(sem_t *sem)
{
	while (sem_wait(sem))
		CHECK(errno == EINTR, "sem_wait");
}

int ask(int ex, int what, int fd, unsigned long cmd, void *argp)
{
	struct rpc *rpc = &sh->rpc[ex];

	rpc->what = what;
	rpc->fd = fd;
	rpc->cmd = cmd;
	rpc->argp = argp;
	sem_post(&rpc->call);
	sem_down(&rpc->answer);
	errno = rpc->err;
	return rpc->ret;
}

/* The descriptor there; peers get theirs when they first need it. */
static int fd_of(int *fds, int ex)
{
	if (ex == EX_THREAD)
		ex = EX_MAIN;
	if (fds[ex] < 0) {
		send_fd(m.sock[ex - EX_PEER], 0, fds[EX_MAIN]);
		fds[ex] = ask(ex, RPC_RECV, 0, 0, NULL);
		CHECK(fds[ex] >= 0, "no descriptor");
	}
	return fds[ex];
}

/* Most calls are made right here, as that is fastest. */
int some_ex(void)
{
	return once_in(12) ? 1 + below(NR_EX - 1) : EX_MAIN;
}

int fd_call(int *fds, int ex, unsigned long cmd, void *argp)
{
	bool over = unlikely(opt.how) && runs_over_args(cmd, argp);
	int fd = fd_of(fds, ex), ret;

	nr_ops++;
	errno = 0;
	if (ex == EX_MAIN)
		ret = ioctl(fd, cmd, argp);
	else
		ret = ask(ex, RPC_IOCTL, fd, cmd, argp);
	return unlikely(opt.how) && !over ? call_broken(fd, cmd, argp, ret) : ret;
}

void fd_close(int *fds, int ex)
{
	if (fds[ex] < 0)
		return;
	if (ex == EX_MAIN && once_in(2))
		ask(EX_THREAD, RPC_CLOSE, fds[ex], 0, NULL);
	else if (ex == EX_MAIN)
		CHECK_OK(close(fds[ex]));
	else
		ask(ex, RPC_CLOSE, fds[ex], 0, NULL);
	fds[ex] = -1;
}

/* -- other threads and processes ------------------------------------------ */

static void serve(int ex, int sock)
{
	struct rpc *rpc = &sh->rpc[ex];
	struct actor *a;
	char tag;
	int fd;

	for (;;) {
		sem_down(&rpc->call);
		errno = 0;
		switch (rpc->what) {
		case RPC_IOCTL:
			rpc->ret = ioctl(rpc->fd, rpc->cmd, rpc->argp);
			break;
		case RPC_RECV:
			rpc->ret = recv_fd(sock, &tag, 0);
			break;
		case RPC_CLOSE:
			rpc->ret = close(rpc->fd);
			break;
		case RPC_STORM:
			a = rpc->argp;
			if (a) {
				a->sock = sock;
				act(a);
			} else {
				while ((fd = recv_fd(sock, &tag, MSG_DONTWAIT)) >= 0)
					close(fd);
			}
			break;
		}
		rpc->err = errno;
		sem_post(&rpc->answer);
	}
}

void *thread_main(void *unused)
{
	serve(EX_THREAD, -1);
	return NULL;
}

/* Before there is a VM, so that peers have no share in it. */
void start_peers(void)
{
	int i, sock[2];
	pid_t pid;

	for (i = 0; i < 2; i++) {
		CHECK_OK(sem_init(&sh->rpc[EX_PEER + i].call, 1, 0));
		CHECK_OK(sem_init(&sh->rpc[EX_PEER + i].answer, 1, 0));
		CHECK_OK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sock));
		fflush(NULL);
		pid = fork();
		CHECK(pid >= 0, "fork");
		if (!pid) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			signal(SIGTERM, SIG_DFL);
			close(sock[0]);
			serve(EX_PEER + i, sock[1]);
		}
		close(sock[1]);
		sh->peer_pid[i] = pid;
		m.sock[i] = sock[0];
	}
}

void stop_peers(void)
{
	int i;

	for (i = 0; i < 2; i++) {
		kill(sh->peer_pid[i], SIGKILL);
		CHECK(waitpid(sh->peer_pid[i], NULL, 0) == sh->peer_pid[i], "waitpid");
		close(m.sock[i]);
	}
}
