# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: The host dies while the guest's memory is dumped, in the run state save-vm: the epoch that is left can
# be loaded.
# STATES: save-vm
. /bin/lib.sh
pair a s
more_epochs a
drain
slow_dump a detach
state_is a save-vm || bad "the guest is not dumped"
sleep 8
grep -q "no epochs for now: the guest's run state is save-vm" /tmp/a.protect.log || bad "protect does not say so"
grep -q "the primary says: the guest's run state is save-vm" /tmp/s.standby.log || bad "the standby does not know"
grep 'failing over' /tmp/s.standby.log && bad "the standby takes over from a guest that lives"
kill_host a
taken_over s
verified s
good "the guest goes on"
