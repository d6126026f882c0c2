# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2034,SC2086,SC2154 # QARGS is for lib.sh, name and port from there
# WHAT: The run state debug, of which there are no epochs, and migrations, which are refused.
# STATES: debug
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
good "the guest goes on from the epoch before"
