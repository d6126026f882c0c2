# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: A client asks for epochs on its socket, and says what makes no sense there: QEMU takes what it is asked for and
# nothing else, and the guest goes on.
. /bin/lib.sh

boot a
up a
tool asks /tmp/a.mon 200 || bad "QEMU does not do what it is asked for"
up a
verified a
state_is a running || bad "the guest does not run"
# The next client is heard, too
protect a /dev/shm/a.chain
protected a
more_epochs a
verified a
good "it does what it is asked for, and nothing else"
