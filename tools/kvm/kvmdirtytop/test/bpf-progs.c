// SPDX-License-Identifier: GPL-2.0-only
/*
 * bpf-progs - how many BPF programs, links and maps the kernel holds
 *
 * What is attached holds its program: after a tool that was killed, none may be left.
 */
#include <err.h>
#include <errno.h>
#include <linux/bpf.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static unsigned int count(enum bpf_cmd get_next)
{
	union bpf_attr attr;
	unsigned int n = 0;

	memset(&attr, 0, sizeof(attr));
	while (!syscall(SYS_bpf, get_next, &attr, sizeof(attr))) {
		attr.start_id = attr.next_id;
		n++;
	}
	if (errno != ENOENT)
		err(1, "bpf");
	return n;
}

int main(void)
{
	printf("%u programs %u links %u maps\n", count(BPF_PROG_GET_NEXT_ID),
	       count(BPF_LINK_GET_NEXT_ID), count(BPF_MAP_GET_NEXT_ID));
	return 0;
}
