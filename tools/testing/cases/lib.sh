# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=dash
#
# What the cases share; they run in the rig, each in a shell of its own, and scripts/cases says how.
# A guest has a name; of the guest NAME there are
#
#	/tmp/NAME.qmp	the monitor of kvm-checkpoint	/dev/shm/NAME.ram	its memory
#	/tmp/NAME.mon	another one			/tmp/NAME.pid		its QEMU
#	/tmp/NAME.ctl	its ttyS1			/tmp/NAME.log		what QEMU says
#
# and of what keeps it: NAME.protect, NAME.standby (process, .log, .ctl).  A case ends with good or
# bad; without either it fails.

PATH=/bin:$PATH
QEMU=/bin/qemu-system-x86_64
APPEND="console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check rcupdate.rcu_expedited=1"
APPEND="$APPEND demo.work=16 demo.still=16 demo.rate=1000"
MB=96

[ -e /run-list ] || { echo "this is for the rig"; exit 2; }
# What a case before this left, if it went wrong, would keep the memory of files that are deleted
for p in /proc/[0-9]*; do
	case $(readlink "$p/exe" || :) in
	*/qemu-system-x86_64|*/kvm-checkpoint) kill -9 "${p#/proc/}" ;;
	esac
done
rm -rf /dev/shm/* /tmp/*.*
tool disk /dev/shm/disk

say() { read -r up _ </proc/uptime; echo "[$up] $*"; }
good() { say "RIGHT: $*"; exit 0; }
bad() { say "WRONG: $*"; show /tmp/*.log; exit 1; }
show() { for f; do echo "--- $f"; tail -n 12 "$f"; done; }

# wait_for SECONDS COMMAND...: until it succeeds; twice at least, however long it takes.  SECONDS are those of a
# quiet machine.
uptime() { read -r up _ </proc/uptime; echo "${up%.*}"; }
wait_for() {
	local n=$(($(uptime) + 4 * $1))

	shift
	until "$@" >/dev/null 2>&1; do
		[ $n -gt 0 ] || return 1
		[ "$(uptime)" -le $n ] || n=0
		sleep 0.2
	done
}

# common NAME MEMORY: the arguments of its QEMU, at both sides
common() {
	set -- "$1" "$2"
	echo "-nodefaults -no-user-config -display none -L /share -accel ${ACCEL:-kvm,dirty-slot-ring-size=512}" \
	     "-cpu host${CPU:-} -smp ${SMP:-2} -no-reboot -name guest -machine q35,memory-backend=ram0" \
	     "-kernel /guest/bzImage -initrd ${INITRD:-/guest/initrd}" \
	     "-drive if=virtio,format=raw,readonly=on,file=/dev/shm/disk" \
	     "-object memory-backend-file,id=ram0,size=${MB}M,share=on,mem-path=$2" \
	     "-qmp unix:/tmp/$1.qmp,server=on,wait=off -qmp unix:/tmp/$1.mon,server=on,wait=off" \
	     "-serial file:/tmp/$1.console -serial unix:/tmp/$1.ctl,server=on,wait=off -pidfile /tmp/$1.pid"
}

# boot NAME [ARG]...: a guest with more arguments of QEMU
boot() {
	local name=$1

	shift
	# shellcheck disable=SC2046
	$QEMU $(common "$name" "/dev/shm/$name.ram") -append "$APPEND" "$@" >"/tmp/$name.log" 2>&1 &
}
# up NAME: it answers.  What it was told before it was ready may be lost.
up() {
	wait_for "${2:-100}" ask "$1" status 5 || { tail -n 3 "/tmp/$1.console"; qmp "$1" query-status; bad "guest $1 does not answer"; }
	say "guest $1 answers"
}
ask() { tool guest "/tmp/$1.ctl" "$2" ${3+"$3"}; }
qmp() { local name=$1; shift; tool qmp "/tmp/$name.mon" "$@"; }
hmp() { qmp "$1" "{'execute': 'human-monitor-command', 'arguments': {'command-line': '$2'}}"; }
state_is() { qmp "$1" query-status | grep -q "\"status\": \"$2\""; }

# standby NAME PORT [OPTION]...: the guest is called NAME when it has been taken over
standby() {
	local name=$1 port=$2

	shift 2
	case " $*" in *" --fence "*) ;; *) set -- --no-fence "$@" ;; esac
	# shellcheck disable=SC2046,SC2086
	kvm-checkpoint standby --listen "127.0.0.1:$port" --insecure --ram-dir "/dev/shm/$name.dir" \
		--control "/tmp/$name.standby.ctl" "$@" -- $QEMU $(common "$name" "{ram0}") $MORE \
		-append "$APPEND" >"/tmp/$name.standby.log" 2>&1 &
	echo $! >"/tmp/$name.standby"
	sleep 1
}

# protect NAME WHERE [OPTION]...
protect() {
	local name=$1 where=$2

	shift 2
	case $where in tcp:*) set -- --insecure "$@" ;; esac
	kvm-checkpoint protect --qmp "/tmp/$name.qmp" --to "$where" --interval 50ms --json \
		--control "/tmp/$name.protect.ctl" "$@" >"/tmp/$name.json" 2>"/tmp/$name.protect.log" &
	echo $! >"/tmp/$name.protect"
}
protected() {
	wait_for "${2:-100}" grep -q '"event":"synced"' "/tmp/$1.json" || bad "guest $1 is not protected"
	say "guest $1 is protected"
}
# Its end is there until somebody waits for it
protects() { grep -qs '^State:.*[RSDT] ' "/proc/$(cat "/tmp/$1.protect")/status"; }
acked() { grep '"event":"acked"' "/tmp/$1.json" | tail -n 1 | sed 's/.*"epoch"://; s/}.*//'; }

# newer NAME EPOCH; more_epochs NAME: wait until one is acknowledged that was taken after this.  One may be on its
# way, and another have been taken while it was.
newer() { [ "$(acked "$1")" -gt "$2" ]; }
more_epochs() {
	local e

	e=$(acked "$1")
	wait_for 30 newer "$1" $((e + 2)) || bad "there are no more epochs after $e"
}

# pair NAME STANDBY: a guest that is protected, and its standby, which takes over after 5 s
pair() {
	boot "$1"
	up "$1"
	standby "$2" 7001 --timeout 5s
	protect "$1" tcp:127.0.0.1:7001
	protected "$1"
}

# equal NAME STANDBY: stop the guest, and compare with the epoch that has all of it
stopped_epoch() { grep '"event":"epoch"' "/tmp/$1.json" | tail -n 1 | grep -q '"was_running":false'; }
equal() {
	qmp "$1" stop >/dev/null
	wait_for 30 stopped_epoch "$1" || bad "there is no epoch of the stopped guest"
	sleep 2
	# shellcheck disable=SC2086
	tool same "/dev/shm/$1.ram" "/dev/shm/$2.dir/ram0" $SAME || bad "the standby has other memory than the guest"
	qmp "$1" cont >/dev/null
}
# catch NAME SECONDS COMMAND...: stop protect in the midst of an epoch, which is so if COMMAND succeeds after SECONDS
catch() {
	local n=0 name=$1 seconds=$2

	shift 2
	while [ $n -lt 200 ]; do
		kill -STOP "$(cat "/tmp/$name.protect")"
		sleep "$seconds"
		"$@" && return 0
		kill -CONT "$(cat "/tmp/$name.protect")"
		sleep 0.0$((n % 7 + 1))
		n=$((n + 1))
	done
	bad "protect is never met in the midst of an epoch"
}

# slow_dump NAME detach|wait: dump its memory, into a pipe that is read as fast as drain says
slow_dump() {
	local d=false

	[ "$2" = wait ] || d=true
	qmp "$1" "{'execute': 'dump-guest-memory', 'arguments': {'paging': false, 'protocol': 'file:/tmp/dump.fifo', 'detach': $d}}"
}
drain() {
	rm -f /tmp/dump.fifo /tmp/drain.fast
	mkfifo /tmp/dump.fifo
	( while dd bs=4096 count=50 of=/dev/null 2>/dev/null; do
		if [ -e /tmp/drain.fast ]; then cat >/dev/null; else sleep 0.5; fi
	  done ) </tmp/dump.fifo &
}

# taken_over NAME
taken_over() {
	wait_for 60 grep -q 'taken over at epoch' "/tmp/$1.standby.log" || bad "the standby has not taken over"
	say "the guest is at standby $1"
}
kill_host() { kill -9 "$(cat "/tmp/$1.pid")"; kill -9 "$(cat "/tmp/$1.protect")" 2>/dev/null; }

# verified NAME: it runs and finds its memory whole
verified() {
	local answer

	answer=$(ask "$1" verify) || bad "guest $1 does not say how its memory is"
	say "guest $1: $answer"
	case "$answer" in *"verify ok"*) ;; *) bad "the guest's memory is not whole" ;; esac
}

# Run states.  stays_in STATE COMMAND...: a protected guest gets into the state by a command; it is
# called $name then, and its standby s$port.  Its QEMU has QARGS, and that of the standby MORE, too.
port=7000
stays_in() {
	state=$1; shift
	port=$((port + 1))
	name=g$port
	say "--- $state: $*"
	# shellcheck disable=SC2086
	boot "$name" $QARGS
	up "$name"
	standby s$port $port --timeout 5s
	protect "$name" tcp:127.0.0.1:$port
	protected "$name"
	more_epochs "$name"
	gets_into "$@"
}
gets_into() {
	"$@"
	wait_for 20 state_is "$name" "$state" || { qmp "$name" query-status; bad "the guest is not $state"; }
}
no_epochs() {
	wait_for 10 grep -q "no epochs for now: the guest's run state is $state" "/tmp/$name.protect.log" ||
		bad "there are epochs of a guest that is $state"
	sleep 8
	grep 'failing over' "/tmp/s$port.standby.log" && bad "the standby takes over from a guest that lives"
	state_is "$name" "$state" || bad "the guest is not $state any more"
}
# There is one that knows that the guest does not run; then there is nothing new
is_acked() { [ "$(acked "$1")" = "$(grep '"event":"epoch"' "/tmp/$1.json" | tail -n 1 | sed 's/.*"epoch"://; s/[,}].*//')" ]; }
has_epoch() {
	wait_for 30 stopped_epoch "$name" || bad "there is no epoch that knows that the guest is $state"
	wait_for 30 is_acked "$name" || bad "the standby cannot load a guest that is $state"
	state_is "$name" "$state" || bad "the guest is not $state any more"
}
dies() {
	kill_host "$name"
	taken_over s$port
}
goes_on() {
	verified s$port
	kill -9 "$(cat "/tmp/s$port.pid")"
}
# is_there: as it was here; and it goes on when it is told to
is_there() {
	wait_for 20 state_is s$port "$state" || { qmp s$port query-status; bad "it is not $state at the standby"; }
}
stays() {
	is_there
	kill -9 "$(cat "/tmp/s$port.pid")"
}
continued() {
	qmp s$port cont || bad "the guest cannot go on"
	wait_for 20 state_is s$port running || { qmp s$port query-status; bad "the guest does not go on"; }
}

# A guest that says which pages it does not use, has another kernel to go on with (kexec), and to which pages that are
# used and not written yet are none: what is allocated is written at once.
tells_states() {
	MB=256
	CPU=,kvm-page-states=on
	INITRD=/guest/initrd-kernels
	APPEND="$APPEND demo.churn=800 demo.churn_us=5000 init_on_alloc=1"
}
table() { ask "$1" table | sed 's/.* //'; }
# survives NAME STANDBY: what it says of its pages now is true, here and where it goes on.  There may be a table that an
# earlier kernel has left behind.
survives() {
	more_epochs "$1"
	more_epochs "$1"
	[ "$(table "$1")" != 0 ] || bad "the guest does not say any more which pages it uses"
	say "guest $1 has its table at $(table "$1")"
	SAME="used $(table "$1") $BEFORE"
	equal "$1" "$2"
	verified "$1"
	more_epochs "$1"
	protects "$1" || bad "protect has ended"
	kill_host "$1"
	taken_over "$2"
	verified "$2"
	sleep 3
	verified "$2"
	ask "$2" churn || bad "the guest does not go on"
}
