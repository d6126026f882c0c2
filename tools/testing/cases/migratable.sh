# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: A guest that was started with -only-migratable can be migrated, so it can be protected.
. /bin/lib.sh
boot a -only-migratable
up a
protect a /dev/shm/chain
protected a
more_epochs a
good "it is protected"
