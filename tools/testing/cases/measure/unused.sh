# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2034 # MB, CPU, MORE and APPEND are for common
# WHAT: What memory that the guest does not use costs: first copies, epochs and pauses, by how the host learns of it.
. /bin/lib.sh
MB=1024
SMP=1
# Its writers write to pages that are in use, which nothing can save: they are not what is measured here
APPEND="${APPEND%% demo.rate=*} demo.rate=10"
field() { sed "s/.*\"$1\"://; s/[,}].*//"; }
p50() { sort -n | { n=0; while read -r x; do n=$((n + 1)); eval "v$n=$x"; done; eval "echo \${v$(((n + 1) / 2))}"; }; }
total() { t=0; while read -r x; do t=$((t + x)); done; echo $t; }
mean() { t=0 n=0; while read -r x; do t=$((t + x)) n=$((n + 1)); done; [ $n = 0 ] || echo $((t / n)); }

# copied NAME PORT OPTION...: it is protected; pages and KiB of the first copy, and milliseconds
copied() {
	local name=$1 port=$2 begun

	shift 2
	# However busy the machine is
	standby "s$port" "$port" --timeout 0 --io-timeout 300s --load-timeout 300s
	rm -f "/tmp/$name.json"
	begun=$(cut -d. -f1 /proc/uptime)$(cut -d. -f2 /proc/uptime | cut -c1-2)
	protect "$name" "tcp:127.0.0.1:$port" --io-timeout 300s "$@"
	wait_for 300 grep -q '"event":"synced"' "/tmp/$name.json" || bad "guest $name is not protected"
	# What a copy has sent that was given up is not in these figures
	grep '"level":"warning"' "/tmp/$name.protect.log" >&2 && bad "the copy was interrupted"
	now=$(cut -d. -f1 /proc/uptime)$(cut -d. -f2 /proc/uptime | cut -c1-2)
	echo "$(grep '"event":"synced"' "/tmp/$name.json" | field pages) pages," \
	     "$(($(grep '"event":"epoch"' "/tmp/$name.json" | head -n 1 | field wire_bytes) / 1024)) KiB," \
	     "$(((now - begun) * 10)) ms"
}
ends() {
	kill "$(cat "/tmp/$1.protect")"
	while protects "$1"; do sleep 0.1; done
	kill -9 "$(cat "/tmp/s$2.standby")"
	sleep 1
	rm -rf "/dev/shm/s$2.dir"
}
epochs() {
	sleep 4
	grep '"event":"epoch"' "/tmp/$1.json" >/tmp/e
	sleep 12
	grep '"event":"epoch"' "/tmp/$1.json" | sed "1,$(wc -l </tmp/e)d" >/tmp/e
	echo "$(wc -l </tmp/e) epochs, mean $(field pages </tmp/e | mean) pages, $(field hole_pages </tmp/e | mean) given back," \
	     "$(field unused_pages </tmp/e | mean) left out; pause p50 $(field pause_us </tmp/e | p50) us"
}
rounds() { ask "$1" churn | sed 's/churn \([0-9]*\).*/\1/'; }

# row TITLE CPU-FLAGS [ARG]...
row() {
	local title=$1

	CPU=$2
	shift 2
	MORE="$*"
	boot g "$@"
	up g
	sleep 5
	say "$title: idle, guest has $(ask g mem) free"
	say "$title: idle: first copy $(copied g 7001)"
	say "$title: idle, 100 ms: $(epochs g)"
	ends g 7001
	ask g "once $((MB * 6 / 10)) file" >/dev/null
	sleep 10
	say "$title: file dropped, guest has $(ask g mem) free: first copy $(copied g 7002)"
	ends g 7002
	# Large pieces of memory, of which there is always one; small ones, that are gone when an epoch is taken
	for i in "2000 20000 100" "2000 20000 20" "100 1000 100"; do
		ask g "start ${i% *}" >/dev/null
		say "$title: churn ${i% *}, first copy $(copied g 7003 --interval "${i##* }ms")"
		r=$(rounds g)
		say "$title: churn ${i% *}, ${i##* } ms: $(epochs g); $(($(rounds g) - r)) rounds"
		ends g 7003
	done
	kill -9 "$(cat /tmp/g.pid)"
	sleep 1
	rm -f /dev/shm/g.ram /tmp/g.*
}
B="-device virtio-balloon-pci,id=b0"
# shellcheck disable=SC2086
{
	row "nothing" ""
	row "reporting" "" $B,free-page-reporting=on
	row "hinting" "" -object iothread,id=io $B,free-page-hint=on,iothread=io
	row "page states" ,kvm-page-states=on
}

say "--- a balloon takes 7/8 of the memory of a guest that has used all of it"
CPU='' MORE=$B
# shellcheck disable=SC2086
boot g $MORE
up g
ask g "once $((MB * 8 / 10))" >/dev/null
say "balloon: $(copied g 7004)"
a=$(date +%s)
qmp g "{'execute': 'balloon', 'arguments': {'value': $((MB / 8 * 1048576))}}" >/dev/null
wait_for 200 sh -c "tool qmp /tmp/g.mon \"{'execute': 'human-monitor-command', 'arguments': {'command-line': 'info balloon'}}\" | grep -q actual=$((MB / 8))"
say "balloon: $(($(date +%s) - a)) s; pages copied $(grep '"event":"epoch"' /tmp/g.json | sed 1d | field pages | total)," \
    "given back $(grep '"event":"epoch"' /tmp/g.json | sed 1d | field hole_pages | total)," \
    "KiB on the wire $((($(grep '"event":"epoch"' /tmp/g.json | tail -n 1 | field wire_bytes) - $(grep '"event":"epoch"' /tmp/g.json | head -n 1 | field wire_bytes)) / 1024))," \
    "pause p50 $(grep '"event":"epoch"' /tmp/g.json | field pause_us | p50) us, longest $(grep '"event":"epoch"' /tmp/g.json | field pause_us | sort -n | tail -n 1)"
ends g 7004
kill -9 "$(cat /tmp/g.pid)"
sleep 1
rm -f /dev/shm/g.ram /tmp/g.*
good "measured"
