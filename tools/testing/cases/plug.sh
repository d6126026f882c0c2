# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2034 # SMP and MORE are for common
# WHAT: A vCPU and a PCI device are plugged while the guest is protected: its standby cannot load that.
. /bin/lib.sh
ended() { ! protects "$1"; }
SMP=1,maxcpus=2
pair a s
more_epochs a
qmp a "{'execute': 'device_add', 'arguments': {'driver': 'host-x86_64-cpu', 'id': 'more', 'socket-id': 0, 'core-id': 1, 'thread-id': 0}}" ||
	bad "no vCPU can be plugged"
say "--- it is plugged"
wait_for 60 ended a || bad "protect goes on"
grep -q "the guest's devices have been changed (new is" /tmp/a.protect.log || bad "it does not say what is new"
wait_for 5 grep -q 'ends the protection: detached' /tmp/s.standby.log || bad "the standby was not told"
sleep 8
grep 'failing over' /tmp/s.standby.log && bad "the standby takes over from a guest that lives"
state_is a running || bad "the guest does not run on"
say "--- with a standby that has it, too"
# Not "-smp 2": virtio devices have as many queues as there are CPUs from the start
MORE="-device host-x86_64-cpu,id=more,socket-id=0,core-id=1,thread-id=0"
standby t 7002 --timeout 0
rm /tmp/a.json
protect a tcp:127.0.0.1:7002
protected a
more_epochs a
equal a t

say "--- a PCI device"
SMP=1
MORE="-device pcie-root-port,id=rp,chassis=1"
# shellcheck disable=SC2086
boot b $MORE
up b
standby u 7003 --timeout 5s
protect b tcp:127.0.0.1:7003
protected b
more_epochs b
qmp b "{'execute': 'device_add', 'arguments': {'driver': 'virtio-rng-pci', 'id': 'more', 'bus': 'rp'}}" ||
	bad "no device can be plugged"
wait_for 60 ended b || bad "protect goes on"
grep -q "the guest's devices have been changed (new is .*virtio-rng" /tmp/b.protect.log ||
	bad "it does not say what is new"
sleep 8
grep 'failing over' /tmp/u.standby.log && bad "the standby takes over from a guest that lives"
state_is b running || bad "the guest does not run on"
good "they were noticed"
