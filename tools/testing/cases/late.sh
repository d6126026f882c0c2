# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: After a failover and after a restore the guest's clock is late by what has passed, as the manual says, and its
# RTC is right.
. /bin/lib.sh
LATE=8

# rtc NAME, host: a time of day in seconds
rtc() {
	d=$(qmp "$1" "{'execute': 'qom-get', 'arguments': {'path': '/machine', 'property': 'rtc-time'}}" |
		tr -d ' "{}\r' | tr ',' '\n')
	of() { echo "$d" | sed "s/^return://; s/^tm_$1:\([0-9]*\)\$/\1/p; d"; }
	date -u -d "$((1900 + $(of year)))-$(($(of mon) + 1))-$(of mday) $(of hour):$(of min):$(of sec)" +%s
}
# Seconds of another clock from the first line on to the second, which are of "tool clock"
behind() { echo "$1 $2" | awk '{ printf "%d", (($6 - $1) - ($8 - $3)) / 1e6 }'; }

# is_late NAME SECONDS: its clock, by at least so much; not its RTC
is_late() {
	now=$(tool clock "/tmp/$1.ctl")
	late=$(behind "$first" "$now")
	r=$(rtc "$1") h=$(date -u +%s)
	say "guest $1: the clock is late by $late s, the RTC by $((h - r)) s"
	[ "$late" -ge "$2" ] || bad "it is not late by the time that it did not run"
	# It has seconds, and the host's may have gone on
	[ $((h - r)) -ge -1 ] && [ $((h - r)) -le 3 ] || bad "the RTC is not right"
}
boot a
up a
first=$(tool clock /tmp/a.ctl)
[ "$(behind "$first" "$(tool clock /tmp/a.ctl)")" = 0 ] || bad "its clock is not the host's at first"
standby s 7001 --fence "/bin/sleep $LATE"
protect a tcp:127.0.0.1:7001
protected a
more_epochs a
kill_host a
taken_over s
up s
is_late s $LATE

protect s /dev/shm/s.chain
protected s
more_epochs s
kill_host s
wait "$(cat /tmp/s.protect)"
sleep $LATE
# shellcheck disable=SC2046
kvm-checkpoint restore --ram-dir /dev/shm/r.dir /dev/shm/s.chain -- $QEMU $(common r "{ram0}") -append "$APPEND" \
	>/tmp/r.log 2>&1 &
up r
is_late r $((2 * LATE))
verified r
good "it is as the manual says"
