# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: The run states that can be reached here: the last epoch that the standby has can be loaded and goes on.
. /bin/lib.sh
port=7000
# stays_in STATE COMMAND: a protected guest gets into the state by a command
stays_in() {
	state=$1; shift
	port=$((port + 1))
	name=g$port
	say "--- $state: $*"
	# shellcheck disable=SC2086
	boot $name $QARGS
	up $name
	standby s$port $port --timeout 3s
	protect $name tcp:127.0.0.1:$port
	protected $name
	more_epochs $name
	"$@"
	wait_for 10 state_is $name "$state" || { qmp $name query-status; bad "the guest is not $state"; }
}
no_epochs() {
	wait_for 10 grep -q "no epochs for now: the guest's run state is $state" "/tmp/$name.protect.log" ||
		bad "there are epochs of a guest that is $state"
	sleep 5
	grep 'failing over' "/tmp/s$port.standby.log" && bad "the standby takes over from a guest that lives"
	state_is $name "$state" || bad "the guest is not $state any more"
}
dies() {
	kill_host $name
	taken_over s$port
}
goes_on() {
	verified s$port
	kill -9 "$(cat "/tmp/s$port.pid")"
}
stays() {
	wait_for 20 state_is s$port "$state" || { qmp s$port query-status; bad "it is not $state at the standby"; }
	kill -9 "$(cat "/tmp/s$port.pid")"
}

# What the guest's ACPI writes to fall asleep, and to be off
sleeps() { hmp $name "o /w 0x604 0x2400"; }
is_off() { hmp $name "o /w 0x604 0x2000"; }
stops() { qmp $name stop; }
is_reset() { qmp $name stop "{'execute': 'set-action', 'arguments': {'reboot': 'reset'}}" system_reset; }

stays_in suspended sleeps; no_epochs; dies; goes_on
stays_in paused stops; sleep 3; dies; stays
QARGS=-no-shutdown
stays_in shutdown is_off; sleep 3; dies; stays
QARGS=
stays_in prelaunch is_reset; sleep 3; dies; stays
good "all of them"
