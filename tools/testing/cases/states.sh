# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: The run states suspended, paused, shutdown and prelaunch: what the standby has can be loaded, and goes on as
# the manual says.
# STATES: suspended paused shutdown prelaunch
. /bin/lib.sh
# What the guest's ACPI writes to fall asleep, and to be off
sleeps() { hmp $name "o /w 0x604 0x2400"; }
is_off() { hmp $name "o /w 0x604 0x2000"; }
stops() { qmp $name stop; }
is_reset() { qmp $name stop "{'execute': 'set-action', 'arguments': {'reboot': 'reset'}}" system_reset; }

stays_in suspended sleeps; no_epochs; dies; goes_on
stays_in paused stops; has_epoch; dies; stays
QARGS=-no-shutdown
stays_in shutdown is_off; has_epoch; dies; stays
QARGS=
stays_in prelaunch is_reset; has_epoch; dies; stays
good "all of them"
