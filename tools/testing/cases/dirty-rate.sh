# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2034 # MB and ACCEL are for common
# WHAT: calc-dirty-rate with slot rings, in all modes: how much the guest writes, and which vCPU.
. /bin/lib.sh
MB=160
BASE="$APPEND demo.work=64 demo.rate=2500"
SECS=3

measured() { qmp "$1" query-dirty-rate | grep -q '"status": "measured"'; }
steps() { ask "$1" status | awk '{ print $2 + $3 }'; }
# rate NAME MODE [ARGUMENT]: $total of all in MB/s, $first and $second of vCPUs, and $expected by what the guest says: so many
# different pages are written in so many steps, which take 8,192 pages of each of two writers in a random order
rate() {
	local s0 s1 t0 t1 answer

	qmp "$1" "{'execute': 'calc-dirty-rate', 'arguments': {'calc-time': $SECS, 'mode': '$2'${3:+, $3}}}" >/dev/null ||
		bad "mode $2 is refused"
	s0=$(steps "$1"); read -r t0 _ </proc/uptime
	wait_for 60 measured "$1" || bad "mode $2 does not end"
	s1=$(steps "$1"); read -r t1 _ </proc/uptime
	answer=$(qmp "$1" query-dirty-rate)
	total=$(echo "$answer" | sed 's/\[[^]]*\]//; s/.*"dirty-rate": \([0-9]*\).*/\1/')
	first=$(vcpu 0) second=$(vcpu 1)
	expected=$(echo "$s0 $s1 $t0 $t1" | awk -v s=$SECS '{ left = 1
		for (n = ($2 - $1) / ($4 - $3) * s / 2; n > 0; n--) left *= 1 - 1 / 8192
		print int(2 * 8192 * (1 - left) / 256 / s + 0.5) }')
	say "$2: $total MB/s${first:+, of the vCPUs $first and $second}; the guest wrote about $expected"
}
# Of $answer: the members of its object may have any order
vcpu() {
	echo "$answer" | grep -o '{[^{}]*"id"[^{}]*}' | grep "\"id\": $1[,}]" | sed 's/.*"dirty-rate": \([0-9]*\).*/\1/'
}
# near A B: within a half, and 2 that rounding takes; a loaded machine is not even
near() { [ "$1" -le $(($2 * 2 + 2)) ] && [ "$2" -le $(($1 * 2 + 2)) ]; }
over() { kill -9 "$(cat "/tmp/$1.pid")"; rm -f "/dev/shm/$1.ram"; }

# The second vCPU is never started
APPEND="$BASE maxcpus=1"
boot one
up one
rate one dirty-ring
[ "$expected" -ge 3 ] || bad "the guest is too slow to tell anything"
near "$total" "$expected" || bad "that is not what the guest writes"
[ "$first" -ge $((total - 1)) ] && [ "$second" = 0 ] || bad "it is not the first vCPU that writes"
over one

APPEND=$BASE
boot two
up two
rate two dirty-ring
near "$total" "$expected" || bad "that is not what the guest writes"
near $((first + second)) "$expected" || bad "the vCPUs do not write that together"
[ "$second" -ge 1 ] || bad "the second vCPU writes nothing"
rate two dirty-bitmap
near "$total" "$expected" || bad "that is not what the guest writes"
rate two page-sampling "'sample-pages': 8192"
near "$total" "$expected" || bad "that is not what the guest writes"
over two

ACCEL=kvm
boot bitmap
up bitmap
qmp bitmap "{'execute': 'calc-dirty-rate', 'arguments': {'calc-time': 1, 'mode': 'dirty-ring'}}" >/dev/null 2>&1 &&
	bad "a bitmap knows no vCPUs"
rate bitmap dirty-bitmap
near "$total" "$expected" || bad "the bitmap has another rate: the test is wrong"
good "it is what the guest writes"
