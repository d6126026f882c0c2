# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: protect hangs in the midst of an epoch: the guest goes on without it.
. /bin/lib.sh
# QEMU answers nobody else while the guest stands still: it is in its log that it was so
goes_on() { grep -c 'it goes on without a checkpoint' /tmp/a.log; }
is_met() { [ "$(goes_on)" -ge "$1" ]; }
boot a
up a
standby s 7001 --timeout 0
protect a tcp:127.0.0.1:7001 --pause-limit 1s
protected a
for i in 1 2 3; do
	catch a 1.5 is_met $i
	wait_for 3 state_is a running || bad "the guest stands still for protect"
	before=$(ask a status | cut -d' ' -f2)
	sleep 1
	[ "$(ask a status | cut -d' ' -f2)" -gt "$before" ] || bad "the guest does not go on"
	kill -CONT "$(cat /tmp/a.protect)"
	more_epochs a
done
[ "$(grep -c 'took longer than the 1000 ms of --pause-limit' /tmp/a.protect.log)" = $i ] ||
	bad "protect does not say what has happened"
[ "$(goes_on)" = $i ] || bad "QEMU does not say what has happened"
equal a s
verified a
good "it went on $i times, and all epochs are whole"
