# SPDX-License-Identifier: GPL-2.0-only
#
# Reads a kernel's console and prints what should not be there, one line each:
# the test it appeared in ("-" if none), a tab, the line number, a tab, the text.
#
# emulator=qemu|bochs chooses the allowlist: splats at boot that belong to the
# emulator and not to the kernel.  Each names the one line that it allows.

BEGIN {
	test = "-"
	splat = "WARNING: |BUG: |Oops|general protection|KASAN|KCSAN|UBSAN|" \
		"possible circular|possible recursive|possible irq lock|inconsistent lock state|" \
		"suspicious RCU|bad unlock balance|held lock|nested lock|sleeping function|" \
		"INFO: rcu|INFO: task|INFO: lockdep|rcu:.*(stall|self-detected)|" \
		"Call Trace:|hung task|blocked for more than|unable to handle|refcount_t|" \
		"leaked|kmemleak: [1-9]|Kernel panic|invalid opcode|stack-protector|" \
		"soft lockup|hard LOCKUP|double fault|list_(add|del) corruption|Bad page|" \
		"Out of memory|oom-kill|VFS: Busy"

	if (emulator == "bochs") {
		# Its skylake_x has a CPUID topology that contradicts itself.
		allow[1] = "WARNING: .*parse_legacy"
		# Its CPUID leaf 0xd gives another XSAVE size than its features add up to.
		allow[2] = "WARNING: .*arch/x86/kernel/fpu/xstate\\.c"
		# The same, in words, just before it.
		allow[3] = "XSAVE consistency problem"
	}
}

function allowed(text,    i)
{
	# Only while booting: what a test provokes is never the emulator's.
	if (booted)
		return 0
	for (i in allow)
		if (text ~ allow[i])
			return 1
	return 0
}

function report(line, text)
{
	print test "\t" line "\t" text
}

/rig: BEGIN /	{ booted = 1; test = $NF; next }
/rig: END /	{ test = "-"; next }

# A WARN comes as a block; one that is allowed is allowed as a whole.
/-\[ cut here \]-/ { block = NR; ok = 0; next }
block && allowed($0) { ok = 1 }
block && ok {
	if (/---\[ end trace/)
		block = 0
	next
}
/---\[ end trace/ { block = 0; next }

$0 ~ splat && !allowed($0) { report(NR, $0) }
