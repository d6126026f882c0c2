# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: While a guest is still on its way to this QEMU, it cannot be protected; when it is here, it can.
# STATES: inmigrate postmigrate
. /bin/lib.sh
boot a
up a
boot b -incoming unix:/tmp/b.in
standby s 7001
wait_for 30 test -S /tmp/b.in || bad "the other QEMU does not listen"
qmp a "{'execute': 'migrate-set-parameters', 'arguments': {'max-bandwidth': 2000000}}" >/dev/null
qmp a "{'execute': 'migrate', 'arguments': {'uri': 'unix:/tmp/b.in'}}" >/dev/null
sleep 1
protect b tcp:127.0.0.1:7001
wait "$(cat /tmp/b.protect)" && bad "protect has something to protect"
grep -q 'the guest is not here yet, a migration is incoming' /tmp/b.protect.log || bad "it does not say why"
qmp a "{'execute': 'migrate-set-parameters', 'arguments': {'max-bandwidth': 1000000000}}" >/dev/null
wait_for 60 state_is b running || bad "the guest was not migrated"

protect a /dev/shm/chain
wait "$(cat /tmp/a.protect)" && bad "protect protects the one that was left behind"
grep -q 'has been migrated to somewhere else' /tmp/a.protect.log || bad "it does not say why not that one"

protect b tcp:127.0.0.1:7001
protected b
more_epochs b
equal b s
good "it was refused, and then protected"
