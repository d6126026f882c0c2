# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: A snapshot is loaded while the guest is protected: no log has the pages, all of them are compared.
. /bin/lib.sh
# An empty image that the guest does not see
mkdisk() {
	qmp a "{'execute': 'blockdev-create', 'arguments': {'job-id': 'f', 'options': {'driver': 'file', 'filename': '/dev/shm/vm.qcow2', 'size': 0}}}"
	sleep 1
	qmp a "{'execute': 'blockdev-add', 'arguments': {'driver': 'file', 'node-name': 'file0', 'filename': '/dev/shm/vm.qcow2'}}" \
		"{'execute': 'blockdev-create', 'arguments': {'job-id': 'q', 'options': {'driver': 'qcow2', 'file': 'file0', 'size': 268435456}}}"
	sleep 1
	qmp a "{'execute': 'blockdev-add', 'arguments': {'driver': 'qcow2', 'node-name': 'vm', 'file': 'file0'}}"
}
told() { [ "$(grep -c 'memory has been changed (a state was loaded)' /tmp/a.protect.log)" -ge "$1" ]; }
boot a
up a
mkdisk
snapshot() {
	qmp a "{'execute': 'snapshot-$1', 'arguments': {'job-id': '$1$2', 'tag': 'one', 'vmstate': 'vm', 'devices': ['vm']}}"
	wait_for 60 concluded "$1$2" || bad "snapshot-$1 does not end"
	qmp a query-jobs | grep '"error"' && bad "snapshot-$1 fails"
}
concluded() { qmp a query-jobs | grep -q "\"concluded\".*\"$1\"\|\"$1\".*\"concluded\""; }
snapshot save 1
standby s 7001 --timeout 0
protect a tcp:127.0.0.1:7001 --disk external
protected a
for i in 1 2; do
	more_epochs a
	snapshot load $i
	wait_for 30 state_is a running || bad "the guest does not run"
	wait_for 60 told $i || bad "protect does not notice"
	more_epochs a
done
equal a s
verified a
good "all pages were compared"
