# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2034,SC2086,SC2154 # MORE and QARGS are for lib.sh, name and port from there
# WHAT: The run states io-error, watchdog and guest-panicked: the standby has the guest as it was, and lets it go on.
# STATES: running io-error watchdog guest-panicked
. /bin/lib.sh
DRIVE="-device virtio-blk-pci,drive=second,rerror=stop"

# One block of its second disk cannot be read here, and at the standby it can.  That it is read is
# no longer on its way when the guest is there: it is tried again.
reads() { ask $name broken; }
has_read() { ask s$port broken | grep -q 'broken ok'; }
QARGS="-blockdev driver=blkdebug,node-name=second,read-only=on,image.driver=file,image.filename=/dev/shm/disk,image.read-only=on"
QARGS="$QARGS,inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.sector=2048 $DRIVE"
MORE="-blockdev driver=file,node-name=second,read-only=on,filename=/dev/shm/disk $DRIVE"
stays_in io-error reads
has_epoch
dies
is_there
continued
wait_for 20 has_read || { ask s$port broken; bad "what could not be read here is not read there"; }
goes_on
MORE=

# ib700: 2 s, and nobody comes
barks() { hmp $name "o /b 0x443 0xe"; }
QARGS="-device ib700 -action watchdog=pause" MORE=$QARGS
stays_in watchdog barks; has_epoch; dies; is_there; continued; goes_on

# A guest cannot write to it while it stands still for an epoch; the monitor can, and then it is forgotten
panics() {
	until state_is $name guest-panicked; do
		hmp $name "o /b 0x505 1"
		sleep 0.2
	done
}
QARGS="-device pvpanic -action panic=pause" MORE=$QARGS
stays_in guest-panicked panics; has_epoch; dies; is_there; continued; goes_on
good "all of them"
