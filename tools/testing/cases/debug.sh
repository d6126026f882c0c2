# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2034,SC2086,SC2154 # QARGS is for lib.sh, name and port from there
# WHAT: The run states debug and internal-error, of which there are no epochs, and migrations, which are refused.
# STATES: debug internal-error
. /bin/lib.sh
gdb() { tool gdb "/tmp/$name.gdb" "$@"; }

# It stands still for the debugger first, of which there may be an epoch or not
steps() { gdb s; }
QARGS="-gdb unix:/tmp/g7001.gdb,server=on,wait=off"
stays_in debug steps
no_epochs
say "--- it is migrated"
qmp $name "{'execute': 'migrate', 'arguments': {'uri': 'unix:/tmp/nobody'}}" | grep 'the guest is being checkpointed' ||
	bad "a protected guest can be migrated"
dies
state_is s$port running || continued
goes_on

# Before its first instruction, it is sent to where there is no memory: KVM cannot go on there
port=7002 name=g7002 state=internal-error
strays() { gdb P12=00a00000 P10=0000000000000000 c; }
say "--- $state"
boot $name -S -gdb unix:/tmp/$name.gdb,server=on,wait=off
standby s$port $port --timeout 5s
protect $name tcp:127.0.0.1:$port
protected $name
gets_into strays
no_epochs
dies
state=prelaunch
is_there
continued
up s$port
goes_on
good "the guest goes on from the epoch before"
