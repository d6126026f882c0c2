# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: Each process is stopped in turn: with --lease the guest never runs at both sides.
. /bin/lib.sh
stop() { kill -STOP "$(cat "$1")"; }
go_on() { kill -CONT "$(cat "$1")"; }

# leases_over NAME: how often it was so; more_over NAME N; for epochs it stands still as well
leases_over() { grep -c 'the lease is over, the guest stands still' "/tmp/$1.log"; }
more_over() { [ "$(leases_over "$1")" -gt "$2" ]; }
# stands_still NAME N: its lease is over once more than N times, and it does
stands_still() {
	wait_for 20 more_over "$1" "$2" || bad "the lease of guest $1 is not over"
	for _ in 1 2 3 4 5; do
		state_is "$1" paused || bad "guest $1 runs without a lease"
		sleep 0.5
	done
}
taken_from() { wait_for 30 grep -q 'failing over' "/tmp/$1.standby.log" || bad "the standby does not take over"; }

boot a
up a
standby s 7001 --timeout 10s
protect a tcp:127.0.0.1:7001 --lease 6s
protected a
more_epochs a

say "--- the standby is stopped, and goes on"
n=$(leases_over a)
stop /tmp/s.standby
stands_still a "$n"
go_on /tmp/s.standby
wait_for 30 state_is a running || bad "the guest does not go on"
more_epochs a

say "--- QEMU is stopped, and goes on"
stop /tmp/a.pid
sleep 12
go_on /tmp/a.pid
grep 'failing over' /tmp/s.standby.log && bad "the standby takes over although protect lives"
wait_for 30 state_is a running || bad "the guest does not go on"
more_epochs a
equal a s

say "--- protect is stopped: the standby takes over"
more_epochs a
stop /tmp/a.protect
taken_from s
state_is a paused || bad "two guests run"
taken_over s
state_is a paused || bad "two guests run"
go_on /tmp/a.protect
sleep 8
state_is a running && bad "two guests run"
verified s
kill_host a

say "--- protect and QEMU are stopped, and go on when it is too late"
standby t 7002 --timeout 10s
protect s tcp:127.0.0.1:7002 --lease 6s
protected s
more_epochs s
before=$(ask s status)
stop /tmp/s.protect
stop /tmp/s.pid
taken_from t
taken_over t
go_on /tmp/s.pid
# Not even for a moment: its lease was over long ago
wait_for 5 state_is s paused || bad "two guests run"
go_on /tmp/s.protect
sleep 8
state_is s running && bad "two guests run"
verified t
echo "$before, then it was stopped"
good "there was one that ran at any time, or none"
