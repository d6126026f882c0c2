# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# What the scripts here share: where things are kept, how a long step shows
# that it lives, and how a failure is told.  Source it:
#
#	set -eu
#	. "$(dirname "$0")/lib.sh"
#
# It works without a terminal, with stdin closed and under "set -eu".

# Everything that takes minutes to make lives here, outside the checkout.
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/kvm-dirty-slot-ring
# Which kernel.  What is made of another than Debian 12's is apart from what is made of that.
KERNEL=${KERNEL:-6.12}
KCACHE=$CACHE
[ "$KERNEL" = 6.12 ] || KCACHE=$CACHE/$KERNEL
LOGDIR=$KCACHE/log
TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ME=${0##*/}
# Which of the patched QEMUs is built and run: 7.2 or 10.0.
# shellcheck disable=SC2034 # for those who source this
QEMU_VERSION=${QEMU:-7.2}
QEMU_BIN=$CACHE/out/qemu-system-x86_64
[ "$QEMU_VERSION" = 7.2 ] || QEMU_BIN=$QEMU_BIN-$QEMU_VERSION
[ -d "$TOP/patches/linux-$KERNEL" ] || {
	echo "$ME: KERNEL=$KERNEL: there is no patches/linux-$KERNEL" >&2
	exit 2
}

# A closed stdin would make the next opened file descriptor 0.
{ : <&0; } 2>/dev/null || exec </dev/null

mkdir -p "$LOGDIR" || {
	echo "$ME: cannot make $LOGDIR; set XDG_CACHE_HOME to a directory that can be written" >&2
	exit 1
}

# Locale-dependent sorting and messages would make logs differ by machine.
export LC_ALL=C

say() { printf '%s\n' "$*"; }
warn() { printf '%s: %s\n' "$ME" "$*" >&2; }
die() { warn "$*"; exit 1; }
usage_error() { warn "$*"; warn "try: $0 --help"; exit 2; }

# at_exit CMD...: run it when the script ends, however it ends.  Last come,
# first served, so that what was made last is removed first.
_AT_EXIT=()
at_exit() {
	_AT_EXIT+=("$(printf '%q ' "$@")")
	trap _run_at_exit EXIT
	trap 'exit 129' HUP
	trap 'exit 130' INT
	trap 'exit 143' TERM
}
_run_at_exit() {
	local rc=$? i
	trap - EXIT
	trap '' HUP INT TERM
	set +e
	for ((i = ${#_AT_EXIT[@]} - 1; i >= 0; i--)); do
		eval "${_AT_EXIT[i]}"
	done
	exit "$rc"
}

# tmpdir VAR: a private directory, gone when the script ends.
tmpdir() {
	local d
	d=$(mktemp -d "${TMPDIR:-/tmp}/dirty-slot-ring.XXXXXX") ||
		die "cannot make a temporary directory under ${TMPDIR:-/tmp}"
	at_exit rm -rf "$d"
	printf -v "$1" %s "$d"
}

# nice_time SECONDS: "8 s", "3 min 05 s"
nice_time() {
	if [ "$1" -lt 60 ]; then
		printf '%d s' "$1"
	else
		printf '%d min %02d s' $(($1 / 60)) $(($1 % 60))
	fi
}

# on_tty: is there somebody to show a moving line to?
on_tty() { [ -t 1 ] && [ -z "${CI:-}" ] && [ "${TERM:-dumb}" != dumb ]; }

# have CMD...: are all these commands there?
have() {
	local c
	for c; do command -v "$c" >/dev/null 2>&1 || return 1; done
}

# need FILE HINT: the file must exist; the hint says how to make it.
need() { [ -e "$1" ] || die "$1 is missing: $2"; }

# kill_group PID: SIGKILL a process group that we started.
kill_group() { kill -KILL -- "-$1" 2>/dev/null || :; }

# hash_of FILE...: one short hash of their contents, for cache keys.
hash_of() { sha256sum -- "$@" | cut -d' ' -f1 | sha256sum | cut -c1-16; }

# KVM's selftests of dirty slot rings that are made of TEST()s: -l lists them, -t
# picks one, -q is short.
# shellcheck disable=SC2034 # for those who source this
FUNCTIONAL_TESTS="dirty_slot_ring_test dirty_slot_ring_map_test dirty_slot_ring_vm_test \
dirty_slot_ring_life_test dirty_slot_ring_mark_test dirty_slot_ring_mem_test \
dirty_slot_ring_race_test dirty_slot_ring_x86_test"

# selftest NAME: where the binary of that name is, if it is anywhere.
SELFTESTS=$KCACHE/out/selftests
selftest() {
	local f
	for f in "$SELFTESTS/$1" "$SELFTESTS"/{x86_64,x86,aarch64,arm64}/"$1"; do
		[ ! -x "$f" ] || { echo "$f"; break; }
	done
}

# step WHAT EXPECTED CMD...
#
# Runs CMD (a program or a shell function) with its output in a log file.  Says
# what is done and how long that usually takes ("" if it is quick), shows that
# it moves, and on failure says what failed, how it ended, where the log is and
# what to do (STEP_HINT, if the caller knows something better than the log).
# (A function called from "if" or before "||" runs without "set -e", as ever.)
# STEP_LOG names the log file, by default made from WHAT.  Returns CMD's status.
step() {
	local what=$1 expected=$2 log pid rc=0 t0=$SECONDS t next=30 n
	shift 2
	n=$(printf %s "$what" | tr -c 'A-Za-z0-9._+-' '-' | tr -s '-' | cut -c1-60)
	log=${STEP_LOG:-$LOGDIR/${n%-}.log}
	mkdir -p "$(dirname "$log")"

	say "==> $what${expected:+ (about $expected)}"

	# A process group of its own: a failure or ^C must leave nothing behind.
	set -m
	( set +m; set -e; "$@" ) >"$log" 2>&1 </dev/null &
	pid=$!
	set +m
	_STEP_PID=$pid
	[ -n "${_STEP_TRAP:-}" ] || { _STEP_TRAP=1; at_exit _step_cleanup; }

	sleep 0.1
	while kill -0 "$pid" 2>/dev/null; do
		t=$((SECONDS - t0))
		if on_tty; then
			printf '\r\033[K    %s  %s' "$(nice_time $t)" \
			       "$(tail -n 1 "$log" 2>/dev/null | tr -d '\000-\037' | cut -c1-60)"
		elif [ "$t" -ge "$next" ]; then
			say "    ... $(nice_time $t), $(wc -l <"$log") lines of log"
			next=$((next + 30))
		fi
		if [ "$t" -lt 2 ]; then sleep 0.1; else sleep 1; fi
	done
	wait "$pid" || rc=$?
	_STEP_PID=
	if on_tty; then printf '\r\033[K'; fi
	t=$((SECONDS - t0))

	if [ "$rc" = 0 ]; then
		say "    done in $(nice_time $t)"
		return 0
	fi
	{
		say "FAILED after $(nice_time $t): $what (exit status $rc)"
		say "    the command was: $*"
		say "    its last lines:"
		tail -n 20 "$log" | sed 's/^/    | /'
		say "    the whole log: $log"
		say "    what to do: ${STEP_HINT:-mend what the log names, then run the same command again: finished steps are kept}"
	} >&2
	return "$rc"
}
_STEP_PID=
_step_cleanup() { [ -z "$_STEP_PID" ] || kill_group "$_STEP_PID"; }

# build_demo_guest OUT: process 1 of the guest that the demo, scripts/failover and scripts/cases run.
# What the linker says of dlopen() in static programs is about SQLite's extensions, which are not used.
build_demo_guest() {
	local src=$TOP/tools/testing/demo
	gcc -O2 -Wall -Wextra -static -pthread -Wl,--no-warnings -o "$1" "$src"/{guest,beats,churn,cost,kernels,ledger,lies}.c \
	    -lsqlite3 -lm
}
