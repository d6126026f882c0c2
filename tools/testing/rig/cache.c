// SPDX-License-Identifier: GPL-2.0-only
/*
 * A model of the data caches of two cores, as a plug-in of QEMU: what instruction
 * counts do not show, where there is no hardware to ask.
 *
 * Each core has what a server's has today: L1d of 48 KiB and 12 ways, L2 of 2 MiB and
 * 16 ways, lines of 64 bytes, the least recently used one goes.  A write takes the
 * line away from the other core.  The emulated machine has one CPU; whose core it is
 * at a time, and what counts, the program says that measures: by an instruction that
 * does nothing, nopl with MARKER and one of these as its displacement.
 *
 *	1	a vCPU is about to run: on the first core, from here on it counts
 *	2	who collects is about to: on the second core, from here on it counts
 *	3	neither: on the second core, nothing counts
 *	4	forget what was counted
 *	5	tell it: a line of JSON into the file "out"
 *
 * Not in the model: fetches of instructions, the hardware's own walks of page tables,
 * its prefetching, and time: a prefetch instruction makes no access here, so that
 * a miss is one whether somebody waits for it or not.
 *
 *	-plugin cache.so,out=FILE
 */

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "plugin.h"

#define MARKER		0x4b436100u
#define LINE_SHIFT	6
#define CORES		2

struct level {
	unsigned int sets, ways;
	/* Most recently used first, of each set; the line's number plus 1, or 0. */
	uint64_t lines[2048 * 16];
};

struct count {
	uint64_t accesses, l1, l2;
};

enum { GUEST, COLLECT, NOTHING };

__attribute__((visibility("default"))) extern int qemu_plugin_version;
int qemu_plugin_version = 1;

static struct core {
	struct level l1, l2;
} cores[CORES];
static struct count counts[NOTHING];
static int doing = NOTHING;
static unsigned int nr_told;
static bool armed;
static FILE *out;

/* True if it was there; it is the most recent one now. */
static bool touch(struct level *c, uint64_t line)
{
	uint64_t *set = &c->lines[line % c->sets * c->ways];
	unsigned int i;

	for (i = 0; i < c->ways - 1 && set[i] != line + 1; i++)
		;
	if (set[i] == line + 1) {
		memmove(set + 1, set, i * sizeof(*set));
		set[0] = line + 1;
		return true;
	}
	memmove(set + 1, set, (c->ways - 1) * sizeof(*set));
	set[0] = line + 1;
	return false;
}

static void drop(struct level *c, uint64_t line)
{
	uint64_t *set = &c->lines[line % c->sets * c->ways];
	unsigned int i;

	for (i = 0; i < c->ways; i++) {
		if (set[i] == line + 1) {
			memmove(set + i, set + i + 1, (c->ways - 1 - i) * sizeof(*set));
			set[c->ways - 1] = 0;
			return;
		}
	}
}

static void on_access(unsigned int vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *data)
{
	struct qemu_plugin_hwaddr *addr;
	struct core *mine, *other;
	struct count *n;
	uint64_t line;

	(void)vcpu;
	(void)data;
	/* Nobody measures yet: the machine is booting. */
	if (!armed)
		return;
	addr = qemu_plugin_get_hwaddr(info, vaddr);
	if (!addr || qemu_plugin_hwaddr_is_io(addr))
		return;

	line = qemu_plugin_hwaddr_phys_addr(addr) >> LINE_SHIFT;
	mine = &cores[doing != GUEST];
	other = &cores[doing == GUEST];
	n = doing == NOTHING ? NULL : &counts[doing];
	if (n)
		n->accesses++;
	if (!touch(&mine->l1, line)) {
		if (n)
			n->l1++;
		if (!touch(&mine->l2, line) && n)
			n->l2++;
	}
	if (qemu_plugin_mem_is_store(info)) {
		drop(&other->l1, line);
		drop(&other->l2, line);
	}
}

static void tell(void)
{
	static const char * const names[] = { "guest", "collect" };
	int i;

	fprintf(out, "{\"cache\": %u", nr_told++);
	for (i = 0; i < NOTHING; i++)
		fprintf(out, ", \"%s_accesses\": %" PRIu64 ", \"%s_l1d_misses\": %" PRIu64
			", \"%s_l2_misses\": %" PRIu64, names[i], counts[i].accesses,
			names[i], counts[i].l1, names[i], counts[i].l2);
	fprintf(out, "}\n");
	fflush(out);
}

static void on_marker(unsigned int vcpu, void *data)
{
	(void)vcpu;
	armed = true;
	switch ((uintptr_t)data) {
	case 1:
		doing = GUEST;
		break;
	case 2:
		doing = COLLECT;
		break;
	case 3:
		doing = NOTHING;
		break;
	case 4:
		memset(counts, 0, sizeof(counts));
		break;
	case 5:
		tell();
		break;
	}
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	static const uint8_t nopl[] = { 0x0f, 0x1f, 0x80 };
	size_t i, n = qemu_plugin_tb_n_insns(tb);
	struct qemu_plugin_insn *insn;
	const uint8_t *code;
	uint32_t what;

	(void)id;
	for (i = 0; i < n; i++) {
		insn = qemu_plugin_tb_get_insn(tb, i);
		code = qemu_plugin_insn_data(insn);
		if (qemu_plugin_insn_size(insn) == 7 && !memcmp(code, nopl, sizeof(nopl))) {
			memcpy(&what, code + sizeof(nopl), sizeof(what));
			if ((what & ~0xffu) == MARKER)
				qemu_plugin_register_vcpu_insn_exec_cb(insn, on_marker,
					QEMU_PLUGIN_CB_NO_REGS, (void *)(uintptr_t)(what & 0xff));
		}
		qemu_plugin_register_vcpu_mem_cb(insn, on_access, QEMU_PLUGIN_CB_NO_REGS,
						 QEMU_PLUGIN_MEM_RW, NULL);
	}
}

__attribute__((visibility("default")))
int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info *info, int argc, char **argv);
int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info *info, int argc, char **argv)
{
	int i;

	(void)info;
	if (argc != 1 || strncmp(argv[0], "out=", 4)) {
		fprintf(stderr, "cache: want out=FILE\n");
		return -1;
	}
	out = fopen(argv[0] + 4, "w");
	if (!out) {
		perror(argv[0] + 4);
		return -1;
	}
	for (i = 0; i < CORES; i++) {
		cores[i].l1.sets = 64;
		cores[i].l1.ways = 12;
		cores[i].l2.sets = 2048;
		cores[i].l2.ways = 16;
	}
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
	return 0;
}
