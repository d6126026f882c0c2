# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2034 # MB and SMP are for common
# WHAT: set-vcpu-dirty-limit with slot rings: the guest writes less until it is cancelled, and stops at once.
. /bin/lib.sh
MB=256
SMP=1
APPEND="$APPEND demo.work=160 demo.rate=100000"
FREE=4		# MB/s that a vCPU must write, so that a limit of 1 can be seen

limit() { qmp g "{'execute': 'set-vcpu-dirty-limit', 'arguments': {'dirty-rate': $1}}" >/dev/null || bad "no limit can be set"; }
# steps a second, of both writers, in some seconds
speed() {
	local s0 t0

	s0=$(ask g status | awk '{ print $2 + $3 }'); read -r t0 _ </proc/uptime
	sleep "$1"
	echo "$s0 $(ask g status) $t0 $(cat /proc/uptime)" | awk '{ print int(($3 + $4 - $1) / ($7 - $6)) }'
}
# rate: as QEMU sees it, which has a moment to do so
rate() { qmp g query-vcpu-dirty-limit | sed 's/.*"current-rate": \([0-9]*\).*/\1/'; }
below() { [ "$(rate)" -le "$1" ]; }

boot g
up g
# With a limit that is never met, its thread measures
limit 100000
sleep 4
free=$(rate) free_steps=$(speed 4)
say "without a limit that matters: $free MB/s, $free_steps steps a second"
[ "$free" -ge $FREE ] || { say "SKIP: the guest writes too slowly, no limit would matter"; exit 4; }

limit 1
wait_for 30 below 2 || bad "it goes on writing $(rate) MB/s"
sleep 2
slow=$(rate) slow_steps=$(speed 4)
say "with a limit of 1 MB/s: $slow MB/s, $slow_steps steps a second"
[ $((slow_steps * 2)) -le "$free_steps" ] || bad "the guest is hardly slower"

# It sleeps most of the time; a pause must not wait for it
n=0 t=0
while [ $n -lt 10 ]; do
	t0=$(tr -d . </proc/uptime | cut -d' ' -f1)
	qmp g stop >/dev/null
	t1=$(tr -d . </proc/uptime | cut -d' ' -f1)
	qmp g cont >/dev/null
	sleep 0.$((n * 7 % 10))
	t=$((t + t1 - t0)) n=$((n + 1))
done
say "ten pauses began after ${t}0 ms"
[ $t -le 300 ] || bad "pauses wait for a vCPU that sleeps"

qmp g cancel-vcpu-dirty-limit >/dev/null || bad "the limit cannot be cancelled"
[ "$(qmp g query-vcpu-dirty-limit | grep -c limit-rate)" = 0 ] || bad "the limit is still there"
sleep 2
again=$(speed 4)
say "after that: $again steps a second"
[ $((again * 3)) -ge $((free_steps * 2)) ] || bad "the guest stays slow"
# And once more, by its number, with a thread that has come and gone
qmp g "{'execute': 'set-vcpu-dirty-limit', 'arguments': {'cpu-index': 0, 'dirty-rate': 1}}" >/dev/null || bad "no limit again"
sleep 5
wait_for 30 below 2 || bad "it goes on writing $(rate) MB/s"
limit 0
verified g
good "a limit is kept, and goes"
