# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2034 # MB, CPU and APPEND are for common
# WHAT: QEMU's own migration leaves out what the guest does not use: free page hints and page states, with the bitmap too.
. /bin/lib.sh
MB=160
BASE=$APPEND
RINGS=kvm,dirty-slot-ring-size=512
completed() { qmp "$1" query-migrate | grep -q '"status": "completed"'; }
# migrates NAME WHAT [ARG]...: a guest that has used most of its memory once goes to another QEMU, and all of it
# is there.  The pages that were sent: $pages
migrates() {
	local name=$1

	shift
	APPEND="$BASE $1"
	shift
	boot "$name" "$@"
	up "$name"
	ask "$name" "once 70" | grep -q ok || bad "the guest has no memory"
	# shellcheck disable=SC2046
	$QEMU $(common "$name-to" "/dev/shm/$name-to.ram") -append "$APPEND" "$@" -incoming "unix:/tmp/$name.sock" \
		>"/tmp/$name-to.log" 2>&1 &
	sleep 1
	qmp "$name" "{'execute': 'migrate-set-parameters', 'arguments': {'max-bandwidth': 20971520, 'downtime-limit': 1000}}" \
		"{'execute': 'migrate', 'arguments': {'uri': 'unix:/tmp/$name.sock'}}" >/dev/null || bad "it does not migrate"
	wait_for 100 completed "$name" || { qmp "$name" query-migrate; bad "the migration does not end"; }
	pages=$(qmp "$name" query-migrate | sed 's/.*"normal": //; s/[,}].*//')
	kill -9 "$(cat "/tmp/$name.pid")"
	wait_for 30 state_is "$name-to" running || bad "the guest does not go on"
	verified "$name-to"
	[ "$(ask "$name-to" churn | sed 's/.* //')" = 0 ] || bad "what was written again and again is not whole"
	kill -9 "$(cat "/tmp/$name-to.pid")"
	rm -f "/dev/shm/$name.ram" "/dev/shm/$name-to.ram"
	say "$name, $ACCEL$CPU: $pages pages of contents were sent"
}
HINTS="-object iothread,id=io -device virtio-balloon-pci,id=b0,free-page-hint=on,iothread=io"

ACCEL=$RINGS
migrates a ""
all=$pages
for ACCEL in $RINGS kvm; do
	# shellcheck disable=SC2086
	migrates "h${#ACCEL}" "" $HINTS
	[ "$pages" -lt $((all * 2 / 3)) ] || bad "with $ACCEL hints are not taken: $pages pages, without $all"
done
CPU=,kvm-page-states=on
CHURN="demo.churn=500 demo.churn_us=20000"
for ACCEL in $RINGS kvm; do
	migrates "s${#ACCEL}" ""
	[ "$pages" -lt $((all * 2 / 3)) ] || bad "with $ACCEL page states are not looked at: $pages pages, without $all"
	migrates "c${#ACCEL}" "$CHURN"
done
CPU=
good "what is not used is not sent"
