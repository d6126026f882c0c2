# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2034 # MB, MORE and APPEND are for common
# WHAT: Memory that a guest gives back to its host, by a balloon and by reports of free pages.
. /bin/lib.sh
MB=192
APPEND="$APPEND demo.churn=500 demo.churn_us=20000"
# Without hints: where these are taken memory is not equal
MORE="-device virtio-balloon-pci,id=b0,free-page-reporting=on"
kib() { du -k "$1" | sed 's/[^0-9].*//'; }
# shrunk FILE KIB: it has become as small as that
shrunk() { [ "$(kib "$1")" -lt "$2" ]; }
actual() { hmp a "info balloon" | grep -q "actual=$1"; }
# shellcheck disable=SC2086
boot a $MORE
up a
# All of its memory was in use once
ask a "once 60" | grep -q ok || bad "the guest has no memory"
standby s 7001 --timeout 5s
protect a tcp:127.0.0.1:7001
protected a
more_epochs a
say "--- reports of free pages: $(kib /dev/shm/a.ram) KiB here, $(kib /dev/shm/s.dir/ram0) at the standby"
equal a s
verified a

say "--- the balloon is inflated"
qmp a "{'execute': 'balloon', 'arguments': {'value': 115343360}}" >/dev/null || bad "there is no balloon"
wait_for 60 actual 110 || bad "the balloon stays small: $(hmp a 'info balloon')"
more_epochs a
more_epochs a
grep -h hole_pages /tmp/a.json | sed 's/.*"hole_pages"://; s/,.*//' | sort -n | tail -n 1 | grep -qv '^0$' ||
	bad "no epoch has pages that were given back"
wait_for 10 shrunk /dev/shm/a.ram 150000 || bad "the guest has $(kib /dev/shm/a.ram) KiB"
wait_for 10 shrunk /dev/shm/s.dir/ram0 150000 || bad "the standby keeps $(kib /dev/shm/s.dir/ram0) KiB"
say "$(kib /dev/shm/a.ram) KiB here, $(kib /dev/shm/s.dir/ram0) at the standby"
equal a s
# What was compared is not there again
shrunk /dev/shm/a.ram 150000 || bad "the guest has $(kib /dev/shm/a.ram) KiB again"

say "--- and deflated, and all used again"
qmp a "{'execute': 'balloon', 'arguments': {'value': 201326592}}" >/dev/null
wait_for 60 actual 192 || bad "the balloon stays: $(hmp a 'info balloon')"
ask a "once 60" | grep -q ok || bad "the guest has no memory"
more_epochs a
equal a s
qmp a "{'execute': 'balloon', 'arguments': {'value': 136314880}}" >/dev/null
wait_for 60 actual 130 || bad "the balloon stays small"
more_epochs a
kill_host a
taken_over s
verified s
good "what was given back was given back on both sides, and nothing else was lost"
