// SPDX-License-Identifier: GPL-2.0-only
/*
 * The fuzzer of dirty slot rings: what vCPUs run, and how they are run.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "dirty_slot_ring_fuzz.h"

static struct mailbox mailboxes[MAX_VCPUS];

static void guest_random(struct mailbox *mb)
{
	uint64_t i, x = mb->first | 1, *p;

	for (i = 1; !READ_ONCE(mb->stop); i++) {
		x = xorshift(x);
		p = (uint64_t *)(mb->gva[(x >> 40) % (NR_SLOTS * 2)] +
				 (x >> 8) % mb->npages * PG);
		if (x & 0xf)
			WRITE_ONCE(*p, mb->value + i);
		else
			READ_ONCE(*p);
		WRITE_ONCE(mb->done, i);
	}
}

static void guest_do(struct mailbox *mb)
{
	uint64_t i, page, *p;

	guest_enable_interrupts();

	switch (READ_ONCE(mb->op)) {
	case OP_WRITE:
	case OP_READ:
		for (i = 0; i < mb->count; i++) {
			page = (mb->first + i * mb->step) % mb->npages;
			p = (uint64_t *)(mb->gva[0] + page * PG);
			if (mb->op == OP_WRITE)
				WRITE_ONCE(*p, mb->value);
			else
				READ_ONCE(*p);
			WRITE_ONCE(mb->done, i + 1);
		}
		break;
	case OP_RANDOM:
		guest_random(mb);
		/* Only for the self-test. */
		while (READ_ONCE(mb->count))
			;
		break;
	}
}

static void guest_main(uint64_t id)
{
	for (;;) {
		guest_do(&mailboxes[id]);
		guest_exit();
	}
}

/* -- and the host --------------------------------------------------------- */

void add_vcpu(void)
{
	int v = m.nr_vcpus;

	m.vcpu[v] = vm_vcpu_add(m.vm, v, guest_main);
	vcpu_args_set(m.vcpu[v], 1, v);
	m.stats[v] = vcpu_get_stats_fd(m.vcpu[v]);
	m.mb[v] = &((struct mailbox *)addr_gva2hva(m.vm, (uintptr_t)mailboxes))[v];
	m.nr_vcpus++;
}

static int enter_guest(int v)
{
	static int said;
	int ret, err;

	m.runner[v] = pthread_self();
	WRITE_ONCE(m.runs[v], true);
	ret = __vcpu_run(m.vcpu[v]);
	err = errno;
	WRITE_ONCE(m.runs[v], false);
	WRITE_ONCE(m.returns[v], m.returns[v] + 1);
	if (unlikely(READ_ONCE(hang_found)) && said++ < 2 * MAX_VCPUS) {
		flockfile(stderr);
		fprintf(stderr, "#   vCPU %d came back: %d (%s), exit %u, ", v, ret,
			ret ? strerror(err) : "-", m.vcpu[v]->run->exit_reason);
		guest_print_registers(m.vcpu[v], stderr);
		fprintf(stderr, "\n");
		funlockfile(stderr);
	}
	errno = err;
	return ret;
}

/* KVM_RUN until the guest is done (true) or a ring is full (false). */
bool run_vcpu(int v)
{
	struct kvm_run *run = m.vcpu[v]->run;
	struct ucall uc;
	int ret;

	for (;;) {
		do
			ret = enter_guest(v);
		while (ret == -1 && errno == EINTR);
		CHECK(!ret, "KVM_RUN gave %d", ret);

		/* First, as that may be by MMIO, too. */
		if (guest_is_done(run))
			return true;
		switch (run->exit_reason) {
		case KVM_EXIT_DIRTY_SLOT_RING_FULL:
			CHECK(m.exit_on_full, "a full ring, but nobody wants to know");
			return false;
		case KVM_EXIT_MMIO:	/* the slot is gone or elsewhere */
			CHECK(in_storm, "MMIO at %#llx", run->mmio.phys_addr);
			continue;
		}
		get_ucall(m.vcpu[v], &uc);
		/* Did KVM inject anything (pf_guest)?  Else the CPU did. */
		print_stats(0);
		CHECK(false, "guest failed: exit %s, %s", exit_reason_str(run->exit_reason),
		      uc.buffer);
	}
}

void print_guests(void)
{
	struct mailbox *mb;
	int v;

	for (v = 0; v < m.nr_vcpus; v++) {
		mb = m.mb[v];
		fprintf(stderr, "#   vCPU %d: op %lu, done %lu of %lu, stop %lu, exit %u\n", v,
			mb->op, mb->done, mb->count, mb->stop, m.vcpu[v]->run->exit_reason);
	}
}
