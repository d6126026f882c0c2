# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: How long it is from the fence's success to the guest's next step, for five failovers, one after another.
. /bin/lib.sh
here=a port=7000
boot a
up a
for there in b c d e f; do
	port=$((port + 1))
	# The fence is the last one who sees the guest's memory before it is used
	standby $there $port --fence "/bin/tool fence /dev/shm/$there.dir/ram0 /tmp/$there.step"
	protect $here tcp:127.0.0.1:$port
	protected $here
	more_epochs $here
	kill_host $here
	taken_over $there
	wait_for 60 test -s /tmp/$there.step || bad "the guest makes no step"
	sed -n 's/.*\(taken over at .*\)/\1/p' /tmp/$there.standby.log
	cat /tmp/$there.step
	verified $there
	here=$there
done
cat /tmp/?.step | sed 's/.*after //; s/ ms.*//' | sort -n | awk '{ t[NR] = $1 } END {
	printf "from the fence to the next step of the guest, ms: least %s, median %s, most %s\n", t[1], t[(NR + 1) / 2], t[NR] }'
good "it goes on with the step that comes next"
