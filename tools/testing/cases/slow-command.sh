# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: Somebody else gives QEMU a command that takes long: the guest lives, there is nothing to take over.
. /bin/lib.sh
pair a s
drain
( sleep 20; touch /tmp/drain.fast ) &
slow_dump a wait
grep 'failing over' /tmp/s.standby.log && bad "the standby takes over from a guest that lives"
grep -q 'no epochs for now: QEMU lives, but does not answer' /tmp/a.protect.log || bad "protect does not say so"
grep -q 'the primary says: QEMU lives, but does not answer' /tmp/s.standby.log || bad "the standby does not know"
protects a || bad "protect has given up"
more_epochs a
equal a s
verified a
good "it is protected on"
