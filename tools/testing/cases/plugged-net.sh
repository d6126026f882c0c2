# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2154 # name and port are for lib.sh
# WHAT: A card with vhost: packets leave when their epoch is acknowledged, all of them and in their order, also if protect
# dies; and those of a QEMU that died do not.
. /bin/lib.sh
APPEND="$APPEND demo.beats=2000"

heard() { wc -l </tmp/beats; }
more_than() { [ "$(heard)" -gt "$1" ]; }
hears_more() { wait_for 60 more_than $(($(heard) + 20)) || bad "nothing is heard of the guest: $1"; }
# The guest runs, and nothing comes any more; what was under way has come
is_silent() {
	n=$(heard)
	ask "$kind" status >/dev/null
	sleep 3
	ask "$kind" status >/dev/null
	[ "$(heard)" = "$n" ]
}
# Each number once, in its order, since it was heard well
in_order() {
	awk -v well="$well" 'NR <= well { n = $1 } NR > well && $1 != ++n { print "line " NR ": " $1 " instead of " n; exit 1 }' /tmp/beats ||
		bad "packets are missing, or out of order: $1"
}
is_plugged() { ls /sys/class/net | grep -q '^kc'; }
is_unplugged() { ! is_plugged; }
unplugged() { wait_for 20 is_unplugged || bad "an IFB device is left: $1"; }

quiet() { wait_for 30 is_silent || bad "the guest is heard, and nobody has acknowledged it: $1"; }

for kind in ${KIND:-vhost}; do
	say "--- $kind"
	rm -f /tmp/beats /tmp/*.log /tmp/*.json
	if [ $kind = vhost ]; then
		tool tap $kind || bad "there is no tap device"
		net="-netdev tap,id=n0,ifname=$kind,script=no,downscript=no,vhost=on -device virtio-net-pci,netdev=n0,romfile="
	else
		tool tap $kind queues || bad "there is no tap device"
		net="-netdev tap,id=n0,ifname=$kind,script=no,downscript=no,queues=2 -device virtio-net-pci,netdev=n0,mq=on,vectors=6,romfile="
	fi
	tool beats /tmp/beats &
	beats=$!
	# shellcheck disable=SC2086
	boot $kind $net
	up $kind
	hears_more "it has booted"
	well=$(heard)
	# Who cannot hold back what QEMU cannot is told of it
	answer=$(qmp $kind "{'execute': 'x-checkpoint-hold', 'arguments': {'limit-ms': 1000}}") &&
		bad "QEMU holds it back: $answer"
	case $answer in *"cannot be held back"*) ;; *) bad "QEMU says something else: $answer" ;; esac
	MORE="-netdev tap,id=n0,ifname=other,script=no,downscript=no$([ $kind = vhost ] && echo ,vhost=on || echo ,queues=2)"
	MORE="$MORE -device virtio-net-pci,netdev=n0,romfile=$([ $kind = vhost ] || echo ,mq=on,vectors=6)"
	standby s 7001 --timeout 0
	protect $kind tcp:127.0.0.1:7001 --net-limit 600s
	protected $kind
	is_plugged || bad "there is no IFB device: the packets are not held"
	hears_more "it is protected"
	more_epochs $kind
	in_order "it is protected"

	kill -STOP "$(cat /tmp/s.standby)"
	quiet "the standby stands still"
	kill -CONT "$(cat /tmp/s.standby)"
	hears_more "the standby goes on"
	in_order "the standby stood still"

	# Another protect: what is held for the one before leaves first
	kill -9 "$(cat /tmp/$kind.protect)"
	protect $kind tcp:127.0.0.1:7001 --net-limit 10s
	protected $kind
	hears_more "there is another protect"
	in_order "there is another protect"

	# None: QEMU's limit, and the guard
	kill -9 "$(cat /tmp/$kind.protect)"
	unplugged "protect is dead"
	hears_more "protect is dead, and so is the limit"
	in_order "protect was dead"

	# An end
	protect $kind tcp:127.0.0.1:7001 --net-limit 10s
	protected $kind
	hears_more "it is protected again"
	kill "$(cat /tmp/$kind.protect)"
	wait "$(cat /tmp/$kind.protect)"
	is_unplugged || bad "protect has ended, and has left an IFB device behind"
	hears_more "protect has ended"
	in_order "protect has ended"

	# QEMU dies: what it has sent nobody may hear
	kill "$(cat /tmp/s.standby)" 2>/dev/null
	wait "$(cat /tmp/s.standby)"
	rm -rf /dev/shm/s.dir
	standby s 7001 --timeout 0
	protect $kind tcp:127.0.0.1:7001 --net-limit 600s
	protected $kind
	hears_more "there is another standby"
	equal $kind s
	hears_more "it goes on"
	kill -STOP "$(cat /tmp/s.standby)"
	quiet "the standby stands still again"
	n=$(heard)
	kill -9 "$(cat /tmp/$kind.protect)"
	kill -9 "$(cat /tmp/$kind.pid)"
	unplugged "QEMU is dead"
	sleep 2
	[ "$(heard)" = "$n" ] || bad "packets leave that no epoch knows of"
	in_order "QEMU is dead"
	kill -9 "$(cat /tmp/s.standby)" "$beats"
	rm -rf /dev/shm/s.dir
	ip link set $kind down
	say "$n datagrams in order"
done
good "none left early, none is missing, none out of order"
