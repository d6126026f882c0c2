// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the cases of all topics share.  Linked with --wrap=ioctl, so that ioctls can be
 * counted, and made to fail.
 */
#include <poll.h>
#include <sys/socket.h>
#include "env.h"

/* --- What ioctl() is made to do --------------------------------------------- */

static struct {
	unsigned long request;	/* this one... */
	int skip;		/* ...after so many of it... */
	int nr;			/* ...so many times... */
	int error;		/* ...fails with this; 0: does nothing and returns 0 */
} fault;

unsigned int hidden_caps[4];
bool hide_vm_log;

void (*before_reset)(void *arg);
void *before_reset_arg;

bool fake_kvm;
struct kvm_dirty_vm_run fake_vm_runs[16];
unsigned int nr_fake_vm_runs, fake_vm_flags;
struct kvm_dirty_gfn *fake_ring;
static uint32_t fake_slot[64];	/* by fd */

static int fake_vm_harvest(struct kvm_dirty_vm_harvest *h)
{
	unsigned int i, n = nr_fake_vm_runs;

	if (!h) {
		errno = EFAULT;
		return -1;
	}
	if (n > h->nr_runs)
		n = h->nr_runs;
	memcpy((void *)(uintptr_t)h->runs, fake_vm_runs, n * sizeof(fake_vm_runs[0]));
	for (i = 0, h->nr_pages = 0; i < n; i++)
		h->nr_pages += fake_vm_runs[i].npages;
	nr_fake_vm_runs -= n;
	memmove(fake_vm_runs, fake_vm_runs + n, nr_fake_vm_runs * sizeof(fake_vm_runs[0]));
	h->nr_runs = n;
	h->flags = fake_vm_flags | (nr_fake_vm_runs ? KVM_DIRTY_HARVEST_MORE : 0);
	fake_vm_flags = 0;
	return 0;
}

static int fake_reset(void)
{
	int i, n = 0;

	for (i = 0; i < FAKE_ENTRIES; i++) {
		n += !!(fake_ring[i].flags & KVM_DIRTY_GFN_F_RESET);
		if (fake_ring[i].flags & KVM_DIRTY_GFN_F_RESET)
			fake_ring[i].flags = 0;
	}
	return n;
}

static int fake_ioctl(int fd, unsigned long request, void *arg)
{
	struct kvm_dirty_slot_log_info *info = arg;
	struct kvm_dirty_slot_runs *runs = arg;

	switch (request) {
	case KVM_CHECK_EXTENSION:
		return (uintptr_t)arg == KVM_CAP_DIRTY_LOG_RING_ACQ_REL ?
		       (int)(FAKE_ENTRIES * sizeof(*fake_ring)) : 1;
	case KVM_RESET_DIRTY_RINGS:
		return fake_reset();
	case KVM_ENABLE_CAP:
	case KVM_SET_USER_MEMORY_REGION:
	case KVM_DIRTY_SLOT_LOG_MARK:
		return 0;
	case KVM_GET_DIRTY_SLOT_LOG_FD:
		fd = dup(STDOUT_FILENO);
		CHECK(fd >= 0 && fd < (int)ARRAY_SIZE(fake_slot), "%d", fd);
		fake_slot[fd] = *(uint32_t *)arg;
		return fd;
	case KVM_DIRTY_SLOT_LOG_INFO:
		info->slot = fake_slot[fd] ? fake_slot[fd] : SLOT_MAIN;
		info->log = FAKE_LOG + info->slot;
		info->npages = info->slot == SLOT_ODD ? ODD_PAGES : MAIN_PAGES;
		return 0;
	case KVM_DIRTY_SLOT_LOG_HARVEST:
		*(struct kvm_dirty_run *)(uintptr_t)runs->runs =
			(struct kvm_dirty_run){ .offset = 50, .npages = 1 };
		runs->nr_runs = 1;
		runs->nr_pages = 1;
		return 0;
	case KVM_DIRTY_VM_LOG_HARVEST:
		return fake_vm_harvest(arg);
	}
	errno = ENOTTY;
	return -1;
}

int __real_ioctl(int fd, unsigned long request, void *arg);
int __wrap_ioctl(int fd, unsigned long request, void *arg);

int __wrap_ioctl(int fd, unsigned long request, void *arg)
{
	size_t i;

	if (fake_kvm)
		return fake_ioctl(fd, request, arg);
	if (request == KVM_CHECK_EXTENSION) {
		for (i = 0; i < ARRAY_SIZE(hidden_caps); i++) {
			if (hidden_caps[i] && hidden_caps[i] == (uintptr_t)arg)
				return 0;
		}
	}
	if (request == KVM_GET_DIRTY_SLOT_LOG_FD && hide_vm_log &&
	    *(uint32_t *)arg == KVM_DIRTY_SLOT_ALL) {
		errno = EINVAL;
		return -1;
	}
	if (request == KVM_RESET_DIRTY_RINGS && before_reset) {
		void (*fn)(void *arg) = before_reset;

		before_reset = NULL;
		fn(before_reset_arg);
	}
	if (request == fault.request && fault.nr && fault.skip-- <= 0) {
		fault.nr--;
		errno = fault.error;
		return fault.error ? -1 : 0;
	}
	return __real_ioctl(fd, request, arg);
}

void fail_ioctl(unsigned long request, int skip, int nr, int error)
{
	fault.request = request;
	fault.skip = skip;
	fault.nr = nr;
	fault.error = error;
}

/* --- A VM whose log is tracked ---------------------------------------------- */

void see(struct seen *seen, const struct kvmdirty_run *run)
{
	uint32_t i;

	CHECK(run->npages, "an empty run");
	CHECK((uint64_t)run->offset + run->npages <= MAIN_PAGES, "%u + %u", run->offset,
	      run->npages);
	for (i = 0; i < run->npages; i++)
		seen->page[run->offset + i]++;
	seen->pages += run->npages;
	seen->runs++;
}

int harvest_some(struct kvmdirty_slot *slot, struct seen *seen, size_t nr)
{
	struct kvmdirty_run runs[512];
	struct kvmdirty_result result;
	uint64_t before;
	size_t i;
	int r;

	do {
		r = kvmdirty_harvest(slot, runs, nr, 0, &result);
		CHECK(result.nr_runs <= nr, "%lu runs", (unsigned long)result.nr_runs);
		CHECK(r >= 0 || !result.nr_runs, "%d with runs", r);
		before = seen->pages;
		for (i = 0; i < result.nr_runs; i++)
			see(seen, &runs[i]);
		CHECK_EQ(seen->pages - before, result.nr_pages);
	} while (r > 0);
	return r;
}

struct seen harvest_n(struct kvmdirty_slot *slot, size_t nr)
{
	struct seen seen;

	memset(&seen, 0, sizeof(seen));
	CHECK_EQ(harvest_some(slot, &seen, nr), 0);
	return seen;
}

struct seen harvest(struct kvmdirty_slot *slot)
{
	return harvest_n(slot, 512);
}

void expect(const struct seen *seen, uint32_t offset, uint32_t nr, uint32_t step)
{
	uint32_t i, wanted = 0;

	for (i = 0; i < MAIN_PAGES; i++) {
		bool want = nr && i >= offset && (i - offset) % step == 0 &&
			    (i - offset) / step < nr;

		CHECK(seen->page[i] == want, "page %u: %u times instead of %u", i, seen->page[i],
		      want);
		wanted += want;
	}
	CHECK_EQ(seen->pages, wanted);
}

void write_pages(struct env *env, int slot, uint32_t offset, uint32_t nr, uint32_t step)
{
	CHECK_EQ(minivcpu_write(&env->vm.vcpu[0], slot, offset, nr, step), 0);
}

void open_env(struct env *env, const struct mode *mode, uint32_t ring_entries)
{
	struct kvmdirty_options options = {
		.size = sizeof(options), .backend = mode->backend, .flags = mode->flags,
		.ring_entries = ring_entries,
	};
	int r;

	memset(env, 0, sizeof(*env));
	env->mode = mode;
	hide_vm_log = mode->by_slot;
	CHECK_EQ(minivm_create(&env->vm), 0);
	r = kvmdirty_open(env->vm.fd, &options, &env->kd);
	CHECK(!r, "%d: %s", r, options.reason);
	CHECK_EQ(kvmdirty_backend(env->kd), mode->backend);
	env->vm.kd = env->kd;
}

struct minivcpu *add_vcpu(struct env *env)
{
	struct minivcpu *vcpu = minivm_add_vcpu(&env->vm);

	CHECK_EQ(kvmdirty_add_vcpu(env->kd, vcpu->fd), 0);
	return vcpu;
}

void track(struct env *env)
{
	CHECK_EQ(kvmdirty_track(env->kd, &env->vm.region[SLOT_MAIN], &env->main), 0);
	CHECK_EQ(kvmdirty_track(env->kd, &env->vm.region[SLOT_ODD], &env->odd), 0);
}

void settle(struct env *env)
{
	write_pages(env, SLOT_MAIN, 0, MAIN_PAGES, 1);
	write_pages(env, SLOT_ODD, 0, ODD_PAGES, 1);
	harvest(env->main);
	harvest(env->odd);
}

struct env *setup_entries(const struct mode *mode, uint32_t ring_entries)
{
	static struct env env;

	open_env(&env, mode, ring_entries);
	add_vcpu(&env);
	track(&env);
	settle(&env);
	return &env;
}

struct env *setup(const void *mode)
{
	return setup_entries(mode, MANY_ENTRIES);
}

/*
 * Where there is no hardware virtualization, x86's KVM may run code such as ours in an
 * emulator that looks too seldom whether a ring is full, and lose pages.  That is
 * not what is tested here.
 */
void needs_full_exits(const struct mode *mode)
{
#ifdef __x86_64__
	if (mode->backend != KVMDIRTY_RING || !access("/sys/module/kvm_amd", F_OK) ||
	    !access("/sys/module/kvm_intel", F_OK))
		return;
	ktap_skip("neither kvm_amd nor kvm_intel: this KVM may overrun its dirty ring");
#else
	(void)mode;
#endif
}

struct env *setup_few_entries(const void *mode)
{
	const struct mode *m = mode;
	uint32_t entries = FEW_ENTRIES;

	needs_full_exits(mode);
	/* A page at least, but for slot rings; and some are kept in reserve */
	if (m->backend == KVMDIRTY_RING && entries < PAGE / sizeof(struct kvm_dirty_gfn))
		entries = PAGE / sizeof(struct kvm_dirty_gfn);
	if (entries > MAIN_PAGES)
		ktap_skip("no dirty ring is smaller than the memslot on a host with such pages");
	return setup_entries(mode, entries);
}

int take(const struct kvmdirty_run *run, void *arg)
{
	struct taker *taker = arg;

	taker->calls++;
	if (taker->calls == taker->refuse_at)
		return -EIO;
	see(&taker->seen, run);
	return taker->calls == taker->stop_at;
}

int reenter(const struct kvmdirty_run *run, void *arg)
{
	struct taker *taker = arg;
	struct kvmdirty_run other = { .offset = 1, .npages = 1 };

	if (!taker->calls++) {
		taker->reentry = kvmdirty_harvest(taker->slot, &other, 1, 0, NULL);
		CHECK_EQ(kvmdirty_stop(taker->slot, NULL),
			 taker->attached ? -EOPNOTSUPP : -EDEADLK);
		CHECK_EQ(kvmdirty_untrack(taker->slot, ~0U), -EINVAL);
		CHECK_EQ(kvmdirty_untrack(taker->slot, 0), -EDEADLK);
		CHECK_EQ(kvmdirty_untrack(taker->slot, KVMDIRTY_UNTRACK_DROP), -EDEADLK);
		CHECK_EQ(kvmdirty_mark(taker->slot, &other, 1), 0);
		CHECK_EQ(kvmdirty_discard(taker->slot, &other, 1), -EDEADLK);
	}
	see(&taker->seen, run);
	return 0;
}

static void *vcpu_thread(void *arg)
{
	struct minivcpu *vcpu = arg;

	vcpu->result = minivcpu_run(vcpu);
	return NULL;
}

static void wake(int sig)
{
	(void)sig;
}

void start_random(struct env *env, pthread_t *thread, int nr)
{
	int i;

	signal(SIGUSR1, wake);
	for (i = 0; i < nr; i++) {
		minivcpu_setup(&env->vm.vcpu[i], guest_random, MAIN_GPA + 4 * i, 0xffffffff, 0,
			       i * 7919 + getpid());
		CHECK_EQ(pthread_create(&thread[i], NULL, vcpu_thread, &env->vm.vcpu[i]), 0);
	}
}

void stop_random(struct env *env, pthread_t *thread, int nr)
{
	int i;

	__atomic_store_n(&env->vm.stop, true, __ATOMIC_RELEASE);
	for (i = 0; i < nr; i++) {
		env->vm.vcpu[i].run->immediate_exit = 1;
		pthread_kill(thread[i], SIGUSR1);
		pthread_join(thread[i], NULL);
		CHECK_EQ(env->vm.vcpu[i].result, 0);
		env->vm.vcpu[i].run->immediate_exit = 0;
	}
	env->vm.stop = false;
}

void send_fd(int sock, int fd)
{
	char byte = 0, control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
	CHECK_EQ(sendmsg(sock, &msg, 0), 1);
}

int receive_fd(int sock)
{
	char byte, control[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { &byte, 1 };
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	int fd;

	CHECK_EQ(recvmsg(sock, &msg, MSG_CMSG_CLOEXEC), 1);
	CHECK(CMSG_FIRSTHDR(&msg), "no fd");
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(fd));
	return fd;
}

int other_process(void (*fn)(int sock), pid_t *pid)
{
	int sock[2];

	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, sock), 0);
	*pid = fork();
	if (!*pid) {
		close(sock[0]);
		fn(sock[1]);
		_exit(0);
	}
	close(sock[1]);
	return sock[0];
}

void ask(int sock, char byte, void *answer, size_t size)
{
	size_t got = 0;
	ssize_t n;

	CHECK_EQ(write(sock, &byte, 1), 1);
	for (; got < size; got += n) {
		n = read(sock, (char *)answer + got, size - got);
		CHECK(n > 0, "the other process is gone");
	}
}

void end_of(pid_t pid)
{
	int status;

	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
}
