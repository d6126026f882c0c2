# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: A guest that says which pages it does not use crashes, and its crash kernel goes on.
. /bin/lib.sh
tells_states
APPEND="$APPEND crashkernel=96M"
pair a s
more_epochs a
# The crash kernel keeps it.  What it did not use the crash kernel does not use either, and has no need to say so.
BEFORE=$(table a)
[ "$(ask a "kexec crash")" = "kexec crash begun" ] || bad "the guest has no crash kernel"
sleep 3
up a
say "the guest's kernel is the one for crashes"
survives a s
good "the crash kernel uses what the one before did not"
