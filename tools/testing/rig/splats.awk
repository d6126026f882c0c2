# SPDX-License-Identifier: GPL-2.0-only
#
# Reads a kernel's console and prints what should not be there, one line each:
# the test it appeared in ("-" if none), a tab, the line number, a tab, the text.
#
# emulator=qemu|bochs|arm64 chooses the allowlist: splats at boot that belong to the
# emulator and not to the kernel.  Each names the one line that it allows.

BEGIN {
	test = "-"
	splat = "WARNING: |BUG: |Oops|general protection|KASAN|KCSAN|UBSAN|" \
		"possible circular|possible recursive|possible irq lock|inconsistent lock state|" \
		"suspicious RCU|bad unlock balance|held lock|nested lock|sleeping function|" \
		"INFO: rcu|INFO: task|INFO: lockdep|rcu:.*(stall|self-detected)|" \
		"Call [Tt]race:|hung task|blocked for more than|[Uu]nable to handle|refcount_t|" \
		"Internal error|HYP panic|" \
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

# Is this line of a call trace one of ours?
function is_ours(text)
{
	return text ~ /dirty_slot|fast_pf_fix_logged/ ||
	       text ~ / (log|batch|summary|harvest|discard)_[a-z_]+[.+]/ ||
	       text ~ / (full_log|ring_(mark|push|push_wake|overflow|used|full))[.+]/
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

# KCSAN finds races all over a kernel.  Of interest are those where, on one side or
# the other, one of the last two calls was ours; but for KVM_GET_DIRTY_LOG, which
# has always read the bitmap without READ_ONCE() while vCPUs set bits in it: it may,
# if what it meets is one of our marked accesses.
/BUG: KCSAN: / {
	race = $0
	race_line = NR
	ours = plain = /assert/
	excused = 0
	depth = 2
	next
}
race && /(read|write)( \(.*\))? to 0x[0-9a-f]+ of [0-9]+ bytes by / {
	marked = /\(marked/
	depth = 0
	next
}
race && depth < 2 && /\+0x[0-9a-f]+\/0x[0-9a-f]+/ {
	# It counts without a lock how often it is called, whoever calls it.
	if (!depth++ && / kvm_flush_remote_tlbs[.+]/) {
		depth = 2
	} else if (is_ours($0)) {
		ours = 1
		plain = plain || !marked
	} else if (!marked &&
		   $0 ~ / (kvm_vm_ioctl(_get_dirty_log)?|kvm_get_dirty_log_protect)[.+]/) {
		excused = 1
	}
	next
}
race && /Reported by Kernel Concurrency Sanitizer/ {
	if (ours && (plain || !excused))
		report(race_line, race)
	race = ""
	next
}

# Who makes allocations fail is told so.
test ~ /fault/ && /vmalloc error: |page allocation failure: / { failed = NR; next }
failed && NR - failed < 8 && /Call [Tt]race:/ { failed = 0; next }

$0 ~ splat && !allowed($0) { report(NR, $0) }
