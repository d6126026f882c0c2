# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: Memory slots come and go while epochs are taken: no page is lost, and no new file is needed.
. /bin/lib.sh
# QEMU takes all memory away for a moment: another vCPU must not run then.
SMP=1
boot a -trace kvm_set_user_memory
up a
standby s 7001 --timeout 5s
protect a tcp:127.0.0.1:7001
protected a
more_epochs a
changes() { grep -c kvm_set_user_memory /tmp/a.log; }
files() { find "/proc/$(cat /tmp/a.protect)/fd" -type l | wc -l; }
for round in 1 2 3; do
	before=$(changes) fds=$(files)
	ask a slots | grep slots || bad "the guest does not change its slots"
	[ $(($(changes) - before)) -ge 120 ] || bad "only $(($(changes) - before)) slots came and went"
	protects a || bad "protect ends"
	more_epochs a
	[ "$(files)" = "$fds" ] || bad "protect had $fds files open, and now $(files)"
	equal a s
	echo "round $round: $(($(changes) - before)) changes of slots"
done
grep -i 'connecting to QEMU again\|error' /tmp/a.protect.log && bad "protect has begun anew"
# The last epoch is of the guest that "equal" stopped
more_epochs a
kill_host a
taken_over s
up s
verified s
good "nothing was lost"
