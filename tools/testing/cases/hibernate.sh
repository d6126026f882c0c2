# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2086 # MORE is several words
# WHAT: A guest that says which pages it does not use is hibernated, and comes back.
. /bin/lib.sh
tells_states
cp /dev/shm/disk /dev/shm/disk2
truncate -s 256M /dev/shm/swap
MORE="-drive if=virtio,format=raw,readonly=on,file=/dev/shm/disk2 -drive if=virtio,format=raw,file=/dev/shm/swap,file.locking=off"
boot a $MORE
up a
standby s 7001 --timeout 5s
protect a tcp:127.0.0.1:7001 --disk external
protected a
more_epochs a
answer=$(ask a hibernate)
[ "$answer" = "hibernate ok" ] || { show /tmp/a.console; bad "the guest is not back from hibernation: $answer"; }
say "the guest was hibernated, and is back"
survives a s
good "what it does not use is still that, and no more than that"
