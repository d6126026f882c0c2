# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: A protected guest gets what cannot be migrated: no epochs, no takeover, until that is gone.
. /bin/lib.sh
pair a s
more_epochs a
# An empty disk in a format of which each open image blocks migration: one track of 8 sectors
{ printf 'WithoutFreeSpace'; printf '\002\0\0\0\020\0\0\0\001\0\0\0\010\0\0\0\001\0\0\0\010\0\0\0\0\0\0\0'; } >/tmp/disk.hds
truncate -s 1M /tmp/disk.hds
qmp a "{'execute': 'blockdev-add', 'arguments': {'driver': 'parallels', 'node-name': 'p', 'file': {'driver': 'file', 'filename': '/tmp/disk.hds'}}}" ||
	bad "there is nothing that blocks migration"
say "--- it is there"
wait_for 10 grep -q 'no epochs for now: the guest cannot be migrated any more: .*arallels' /tmp/a.protect.log ||
	bad "there are epochs of a guest that cannot be loaded elsewhere"
wait_for 5 grep -q 'the primary says: the guest cannot be migrated' /tmp/s.standby.log ||
	bad "the standby is not told why"
sleep 8
grep 'failing over' /tmp/s.standby.log && bad "the standby takes over from a guest that lives"
state_is a running || bad "the guest does not run on"
qmp a "{'execute': 'blockdev-del', 'arguments': {'node-name': 'p'}}" || bad "it does not go"
say "--- it is gone"
more_epochs a
equal a s
# The last one has a guest that stands still
more_epochs a
kill_host a
taken_over s
verified s
good "it was noticed"
