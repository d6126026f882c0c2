# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: The lease is over again and again, as it is short: no epoch takes the guest for one that its owner has stopped.
. /bin/lib.sh
boot a
up a
standby s 7001 --timeout 0
# As long as an epoch takes here, so that they meet in all ways
protect a tcp:127.0.0.1:7001 --interval 20ms --lease 80ms
protected a
n=$(acked a)
wait_for 100 newer a $((n + 300)) || bad "there are no more epochs after $(acked a)"
over=$(grep -c 'the lease is over, the guest stands still' /tmp/a.log)
say "$over times the lease was over in 300 epochs"
[ "$over" -gt 0 ] || bad "the lease was never over"
[ "$(grep '"event":"epoch"' /tmp/a.json | grep -c '"was_running":false')" = 0 ] ||
	bad "an epoch says that the guest was stopped"
kill "$(cat /tmp/a.protect)"
wait "$(cat /tmp/a.protect)"
good "the guest is to run in all of them"
