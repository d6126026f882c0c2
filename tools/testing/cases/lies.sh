# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2034 # MB, CPU, SAME and APPEND are for common
# WHAT: A guest that lies of which pages it uses: it hurts nobody but itself, and the truth counts again.
. /bin/lib.sh
MB=192
CPU=,kvm-page-states=on
SAME=used
APPEND="$APPEND demo.churn=800 demo.churn_us=5000 demo.lies=1 init_on_alloc=1"
# lie WHAT ANSWER
lie() {
	local answer

	answer=$(ask "$name" "lie $1") || bad "the guest says nothing any more after \"$1\""
	[ "$answer" = "lie $1: $2" ] || bad "the guest was to say \"$2\": $answer"
}
table() { ask "$name" table | sed 's/.* //'; }
has_table() { [ "$(table)" != 0 ]; }
completed() { qmp "$name" query-migrate | grep -q '"status": "completed"'; }
ends() {
	kill "$(cat /tmp/a.protect)"
	while protects a; do sleep 0.1; done
	kill -9 "$(cat "/tmp/$1.standby")"
}
name=a
boot a
up a
has_table || bad "the guest has no table"
standby s 7001 --timeout 5s
protect a tcp:127.0.0.1:7001
protected a
more_epochs a

say "--- what is no table: as if there were none"
for what in magic version "end $MB" "at a0001" "at ffff0001" nothing; do
	lie "$what" ok
	more_epochs a
	equal a s
done
say "--- what the CPU does not take"
lie truth ok
for what in "at 13" "at 1003" "at 1000" "at fee00001" "at 100000000001" "at 8000000000000001"; do
	lie "$what" refused
done
[ "$(table)" != 0 ] || bad "what was refused has changed something"
more_epochs a
equal a s

say "--- what is a table, and a lie"
for what in all long wraps restless; do
	lie "$what" ok
	more_epochs a
	more_epochs a
done
verified a
protects a || bad "protect has ended"

say "--- the truth, and a standby that has not been lied to"
lie truth ok
ends s
rm /tmp/a.json
standby t 7002 --timeout 5s
protect a tcp:127.0.0.1:7002
protected a
more_epochs a
equal a t

say "--- a reset ends any lie"
lie all ok
more_epochs a
qmp a "{'execute': 'set-action', 'arguments': {'reboot': 'reset'}}" system_reset >/dev/null || bad "it is not reset"
sleep 1
up a
wait_for 20 has_table || bad "the guest has no table after a reset"
more_epochs a
more_epochs a
kill_host a
taken_over t
verified t
name=t
ask t churn || bad "the guest does not go on"
verified t
kill -9 "$(cat /tmp/t.pid)"

say "--- QEMU's migration"
name=b
boot b
up b
for what in all restless; do
	lie "$what" ok
	qmp b "{'execute': 'migrate-set-parameters', 'arguments': {'max-bandwidth': 104857600, 'downtime-limit': 2000}}" \
		"{'execute': 'migrate', 'arguments': {'uri': 'exec:cat >/dev/null'}}" >/dev/null || bad "it does not migrate"
	wait_for 100 completed || { qmp b query-migrate; bad "the migration does not end"; }
	# Where it came from it is as it was
	qmp b cont >/dev/null
	verified b
done
good "lies have hurt nobody, and the truth was believed"
