# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: Another kernel takes over (kexec) in a guest that says which pages it does not use.
. /bin/lib.sh
tells_states
pair a s
more_epochs a
before=$(table a)
[ "$(ask a kexec)" = "kexec begun" ] || bad "the guest cannot do kexec"
sleep 3
up a
say "the guest's kernel is another one; the last one had its table at $before"
survives a s
good "what the kernel before did not use does not matter any more"
