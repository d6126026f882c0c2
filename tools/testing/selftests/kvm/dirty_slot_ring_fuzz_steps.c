// SPDX-License-Identifier: GPL-2.0-only
/*
 * The fuzzer of dirty slot rings: one step, which is one operation at a time by
 * anyone; of them those on mappings, processes and the VM.
 */
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dirty_slot_ring_fuzz.h"

/* -- steps: mappings and processes ---------------------------------------- */

static void step_map(struct mlog *l)
{
	uint64_t pages = l->stride / PG, area = l->area / PG, first, n = 1 + below(4), i;
	bool shared = !once_in(6), consumers, there;
	int prot = once_in(3) ? below(8) : PROT_READ | (once_in(3) ? PROT_WRITE : 0), want = 0, ret;
	struct op_note *t;
	void *p, *q;

	nr_ops++;
	if (once_in(3))
		n = 1;
	switch (below(30)) {
	case 0:
		first = below(1ul << 40);
		break;
	case 1 ... 4:
		first = area - 1 - below(min(area, 3ul));
		break;
	case 5 ... 8:
		first = below(area);
		break;
	case 9 ... 14:
		first = 0;
		n = once_in(2) ? area - once_in(2) : n;
		break;
	default:
		first = area + below(l->nr_rings + 1) * pages + below(once_in(2) ? 2 : pages);
	}
	consumers = first + n <= area;

	if (!shared)
		want = EINVAL;
	else if (prot & PROT_EXEC)
		want = EPERM;
	else if (prot & PROT_WRITE && !consumers)
		want = EPERM;
	p = mmap(NULL, n * PG, prot, shared ? MAP_SHARED : MAP_PRIVATE, l->fd[EX_MAIN],
		 first * PG);
	t = note("mmap log, page, pages, prot | private << 4", l - m.log, first, n,
		 prot | !shared << 4);
	t->err = errno;
	t->ret = p == MAP_FAILED ? -1 : 0;
	if (want) {
		CHECK(p == MAP_FAILED && errno == want, "should give errno %d", want);
		return;
	}
	CHECK(p != MAP_FAILED, "should work");

	for (i = 0; prot & PROT_READ && i < n; i++) {
		ret = probe(p + i * PG, false);
		if (first + i < area)
			there = (first + i) * CONSUMERS_PER_PAGE < l->nr_rings;
		else
			there = (first + i - area) / pages < l->nr_rings;
		CHECK(ret == (there ? 0 : SIGBUS),
		      "page %lu, rings %u of %lu pages: signal %d", first + i, l->nr_rings, pages,
		      ret);
	}
	switch (below(5)) {
	case 0:
		ret = mprotect(p, n * PG, PROT_READ | PROT_WRITE);
		CHECK(consumers ? !ret : ret && errno == EACCES, "mprotect gave %d", ret);
		break;
	case 1:
		ret = mprotect(p, PG, PROT_READ | PROT_EXEC);
		CHECK(ret && errno == EACCES, "mprotect gave %d", ret);
		break;
	case 2:
		q = mremap(p, n * PG, (n + 1) * PG, MREMAP_MAYMOVE);
		CHECK(q == MAP_FAILED && errno == EFAULT, "mremap gave %p", q);
		break;
	case 3:
		q = mremap(p, n * PG, n * PG, MREMAP_MAYMOVE);
		CHECK(q != MAP_FAILED, "mremap");
		p = q;
		break;
	case 4:
		ret = madvise(p, n * PG, MADV_DONTNEED);
		CHECK(!ret, "madvise gave %d", ret);
		break;
	}
	if (n > 1 && once_in(2))
		CHECK_OK(munmap(p + PG, PG));
	CHECK_OK(munmap(p, n * PG));
}

static void step_fork(struct mlog *l)
{
	struct kvm_dirty_slot_log_info info;
	int status, fd = l->fd[EX_MAIN];
	pid_t pid;

	nr_ops++;
	note("fork log", l - m.log, 0, 0, 0);
	pid = fork();
	CHECK(pid >= 0, "fork");
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (ioctl(fd, KVM_DIRTY_SLOT_LOG_INFO, &info) || info.npages != l->npages)
			_exit(1);
		if (l->nr_rings && probe((void *)l->ring[0].map.kern, false) != SIGSEGV)
			_exit(2);
		_exit(0);
	}
	CHECK(waitpid(pid, &status, 0) == pid && !status, "child ended with %#x", status);
	all_unchanged();
}

/* Descriptors come and go; the log stays. */
static void step_fds(struct mlog *l)
{
	int fd, ex = EX_PEER + below(2), sock[2];
	char tag;

	nr_ops++;
	note("descriptors log", l - m.log, 0, 0, 0);
	switch (below(4)) {
	case 0:
		fd_close(l->fd, ex);
		break;
	case 1:
		fd = dup(l->fd[EX_MAIN]);
		CHECK(fd >= 0, "dup");
		fd_close(l->fd, EX_MAIN);
		l->fd[EX_MAIN] = fd;
		break;
	case 2:
		if (l->dead)
			break;
		fd = open_log(l->slot);
		fd_close(l->fd, EX_MAIN);
		l->fd[EX_MAIN] = fd;
		break;
	case 3:	/* in flight while the last one here is closed */
		CHECK_OK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sock));
		send_fd(sock[0], 0, l->fd[EX_MAIN]);
		fd_close(l->fd, EX_MAIN);
		l->fd[EX_MAIN] = recv_fd(sock[1], &tag, 0);
		close(sock[0]);
		close(sock[1]);
		break;
	}
}

/* -- steps: the VM -------------------------------------------------------- */

static void step_guest(int s)
{
	struct mslot *slot = &m.slot[s];
	struct mlog *l = slot->log;
	struct mailbox mb = { .op = once_in(10) ? OP_READ : OP_WRITE };
	static const uint32_t counts[] = { 1, 1, 2, 3, 8, 33, 100, 700 };
	static const uint32_t steps[] = { 1, 1, 1, 2, 3, 17, 64, 65 };
	int v = below(m.nr_vcpus);
	uint64_t from = 0, to;
	struct op_note *t;
	bool done;

	nr_ops++;
	if (!slot->exists)
		return;
	mb.gva[0] = SLOT_GVA(s, slot->place);
	mb.npages = slot->npages;
	mb.first = below(slot->npages);
	mb.count = counts[below(ARRAY_SIZE(counts))];
	mb.step = steps[below(ARRAY_SIZE(steps))];
	mb.value = ++sh->stamp;
	*m.mb[v] = mb;
	t = note("guest vCPU, slot, first << 32 | count, step | read << 32", v, s,
		 mb.first << 32 | mb.count, mb.step | (uint64_t)(mb.op == OP_READ) << 32);
	nr_guest_pages += mb.count;

	do {
		done = run_vcpu(v);
		t->ret++;
		to = READ_ONCE(m.mb[v]->done);
		CHECK(!done || to == mb.count, "%lu of %lu pages", to, mb.count);
		if (l)
			model_touch(l, &l->ring[v], &mb, from, to, !done);
		if (done)
			break;
		check_full(v);
		from = to;
		/* It must leave again, without getting anywhere. */
		if (once_in(4)) {
			CHECK(!run_vcpu(v), "the ring is full, but the vCPU runs");
			check_full(v);
			CHECK(m.mb[v]->done == to, "the ring is full, but the vCPU ran");
		}
		harvest_all(m.slot[m.vcpu[v]->run->dirty_slot_ring.slot - FIRST_SLOT].log);
	} while (true);
	if (once_in(8))
		all_unchanged();
}

/* KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG. */
static void step_bitmap(int s)
{
	struct mslot *slot = &m.slot[s];
	struct mlog *l = slot->log;
	uint64_t *bitmap = (void *)(arena + PG), words;
	struct kvm_dirty_log get = { .slot = FIRST_SLOT + s, .dirty_bitmap = bitmap };
	struct kvm_clear_dirty_log clear = { .slot = FIRST_SLOT + s, .dirty_bitmap = bitmap };
	bool bit, nowhere = once_in(20);
	uint32_t p;
	int ret;

	nr_ops++;
	if (nowhere)
		get.dirty_bitmap = arena + ARENA_PAGES * PG - 1;
	clear.dirty_bitmap = get.dirty_bitmap;
	if (once_in(2)) {
		ret = ioctl(m.vm->fd, KVM_GET_DIRTY_LOG, &get);
		note("GET_DIRTY_LOG slot", s, nowhere, 0, 0)->ret = ret;
		if (!l) {
			CHECK(ret && errno == ENOENT, "gave %d", ret);
			return;
		}
		CHECK(nowhere ? ret && errno == EFAULT : !ret, "gave %d", ret);
		for (p = 0; !nowhere && p < l->npages; p++) {
			bit = bitmap[p / 64] >> (p % 64) & 1;
			CHECK(l->in[p] == MAYBE || l->in[p] == bit,
			      "slot %d page %u: bit %d, should be %d", s, p, bit, l->in[p]);
			l->in[p] = bit;
		}
		if (!m.manual)
			memset(l->in, NO, sizeof(l->in));
		return;
	}

	words = DIV_ROUND_UP(slot->npages, 64);
	clear.first_page = below(words) * 64;
	clear.num_pages = min(slot->npages - (uint32_t)clear.first_page,
			      64 * (uint32_t)(1 + below(words)));
	for (p = 0; p < words; p++)
		bitmap[p] = rnd() & rnd();
	ret = ioctl(m.vm->fd, KVM_CLEAR_DIRTY_LOG, &clear);
	note("CLEAR_DIRTY_LOG slot, first, n", s, clear.first_page, clear.num_pages, 0)->ret = ret;
	if (!l || nowhere) {
		CHECK(ret && errno == (l ? EFAULT : ENOENT), "gave %d", ret);
		return;
	}
	CHECK(!ret, "gave %d", ret);
	for (p = 0; p < clear.num_pages; p++) {
		if (bitmap[p / 64] >> (p % 64) & 1)
			l->in[clear.first_page + p] = NO;
	}
}

static void step_slot(int s)
{
	struct mslot *slot = &m.slot[s];
	int what = below(4);

	nr_ops++;
	note("slot, what", s, what, slot->exists, 0);
	if (!slot->exists) {
		slot->exists = true;
		slot->npages = some_size();
		set_slot(s, what);
		if (what)
			model_log_new(s);
	} else if (what == 0) {
		slot->exists = false;
		set_slot(s, false);
		model_log_dies(slot);
	} else if (what == 1) {
		slot->place ^= 1;
		set_slot(s, slot->log);
		if (slot->log)
			slot->log->base_gfn = SLOT_GPA(s, slot->place) / PG;
	} else if (slot->log) {
		set_slot(s, false);
		model_log_dies(slot);
	} else {
		set_slot(s, true);
		model_log_new(s);
	}
	all_unchanged();
}

/* Opening a log, with good and bad arguments. */
static void step_open(int s)
{
	struct kvm_dirty_slot_log_fd arg = { .slot = FIRST_SLOT + s };
	int want = m.slot[s].log ? 0 : ENOENT, fd;
	struct op_note *t;
	void *argp = &arg;

	nr_ops++;
	switch (below(8)) {
	case 0:
		arg.flags = 1u << below(32);
		want = EINVAL;
		break;
	case 1:
		arg.slot = (2 + below(100)) << 16 | below(1 << 16);
		want = EINVAL;
		break;
	case 2:
		/* There is not, or not everywhere, a second address space. */
		arg.slot = 1 << 16 | (FIRST_SLOT + below(20));
		want = kvm_check_cap(KVM_CAP_MULTI_ADDRESS_SPACE) > 1 ? ENOENT : EINVAL;
		break;
	case 3:
		arg.slot = 0xffff;
		want = EINVAL;
		break;
	case 5:
		arg.slot = KVM_DIRTY_SLOT_ALL;
		want = 0;
		break;
	case 4:
		argp = header_at(1 + below(AT_KERNEL), sizeof(arg));
		if (argp == arena_ro)
			argp = NULL;
		want = EFAULT;
		break;
	}
	fd = ioctl(m.vm->fd, KVM_GET_DIRTY_SLOT_LOG_FD, argp);
	t = note("GET_DIRTY_SLOT_LOG_FD slot, flags", arg.slot, arg.flags, 0, 0);
	t->ret = fd;
	t->err = errno;
	CHECK(want ? fd == -1 && errno == want : fd >= 0, "gave %d, should be errno %d", fd, want);
	if (fd >= 0)
		close(fd);
}

static void step_vcpu(void)
{
	int s;

	nr_ops++;
	if (m.nr_vcpus == MAX_VCPUS)
		return;
	note("new vCPU", m.nr_vcpus, 0, 0, 0);
	add_vcpu();
	for (s = 0; s < NR_SLOTS; s++) {
		if (m.slot[s].log)
			log_add_rings(m.slot[s].log, m.nr_vcpus);
	}
}

static void step_madvise(int s)
{
	uint64_t first = below(MAX_PAGES), n = 1 + below(MAX_PAGES - first);

	nr_ops++;
	note("DONTNEED slot, first, n", s, first, n, 0);
	CHECK_OK(madvise(memory[s] + first * PG, n * PG, MADV_DONTNEED));
}

/* -- which ---------------------------------------------------------------- */

void step(bool vm)
{
	struct mlog *l = &m.log[below(NR_LOGS)];
	int s = below(NR_SLOTS), x = below(1000);
	int i;

	luck = mix(opt.seed ^ mix(round_nr ^ mix(++step_nr)));
	if (!(step_nr & 63))
		WRITE_ONCE(sh->progress, sh->progress + 1);
	for (i = 0; i < NR_LOGS && !l->used; i++)
		l = &m.log[(l - m.log + 1) % NR_LOGS];

	if (vm && x < 130) {
		step_guest(s);
		return;
	} else if (vm && x < 160) {
		step_bitmap(s);
		return;
	} else if (vm && x < 163) {
		step_slot(s);
		return;
	} else if (vm && x < 173) {
		step_open(s);
		return;
	} else if (vm && x < 174) {
		step_vcpu();
		return;
	} else if (vm && x < 178) {
		step_madvise(s);
		return;
	}

	if (x < 230) {
		step_all(&m.all[below(NR_ALL)], vm);
		return;
	}
	if (!l->used) {
		nr_ops++;
		return;
	}
	if (x < 360)
		step_harvest(l);
	else if (x < 520)
		step_runs(l, true);
	else if (x < 600)
		step_runs(l, false);
	else if (x < 700)
		step_reset(l);
	else if (x < 830)
		step_consumer(l);
	else if (x < 870)
		step_info(l);
	else if (x < 920)
		step_garbage(l);
	else if (x < 960)
		step_poll(l);
	else if (x < 990)
		step_map(l);
	else if (x < 998)
		step_fds(l);
	else if (x < 999)
		step_fork(l);
	else
		all_unchanged();
}
