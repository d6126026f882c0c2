# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: QEMU refuses commands of a client that make no sense, and says why; the guest runs on, and is protected after that.
. /bin/lib.sh
# says TEXT COMMAND [ARGUMENTS]
says() {
	answer=$(qmp a "{'execute': '$2', 'arguments': {${3:-}}}") && bad "$2 succeeds: $answer"
	case $answer in *"$1"*) say "$2: $answer" ;; *) bad "$2 says something else: $answer" ;; esac
}
# shellcheck disable=SC2034 # for lib.sh
MORE="-netdev user,id=n0 -device virtio-net-pci,netdev=n0,romfile="
# shellcheck disable=SC2086
boot a $MORE
up a
says "nobody" x-checkpoint-hold "'limit-ms': 1000, 'notify': 'nobody'"
says "limit-ms" x-checkpoint-hold "'notify': 'nobody'"
says "nobody" x-checkpoint-guard "'socket': 'nobody'"
says "no client is attached" x-checkpoint-hints "'action': 'start'"
says "no client is attached" x-checkpoint-hints "'action': 'get'"
says "hurry" x-checkpoint-hints "'action': 'hurry'"
verified a
standby s 7001 --timeout 5s
protect a tcp:127.0.0.1:7001
protected a
more_epochs a
protects a || bad "protect has ended"
good "all of them"
