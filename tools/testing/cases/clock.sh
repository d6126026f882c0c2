# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: The guest's clocks do not lose the pauses: 50 epochs a second, within 0.1%, or a millisecond a second.
. /bin/lib.sh
for source in kvm-clock tsc; do
	[ $source = kvm-clock ] || APPEND="$APPEND clocksource=tsc"
	boot $source
	up $source
	ask $source time | grep -q "$source" || bad "the guest has another clock: $(ask $source time)"
	protect $source /dev/shm/$source.chain --interval 20ms --compress none
	protected $source
	e1=$(acked $source) g1=$(tool clock /tmp/$source.ctl)
	sleep 30
	e2=$(acked $source) g2=$(tool clock /tmp/$source.ctl)
	echo "$g1 $g2 $e1 $e2" | awk '{ h = $6 - $1; r = $8 - $3; m = $9 - $4
		printf "%s: host %.3f s, CLOCK_REALTIME %+.3f%%, CLOCK_MONOTONIC %+.3f%%, %.1f epochs/s\n", $5, h / 1e6,
			(r - h) * 100 / h, (m - h) * 100 / h, ($12 - $11) * 1e6 / h
		d = r - h; if (d < 0) d = -d; f = m - h; if (f < 0) f = -f; exit d > h / 1000 || f > h / 1000 }' ||
		bad "the guest's clock loses time"
	kill "$(cat /tmp/$source.protect)"
	kill -9 "$(cat /tmp/$source.pid)"
	rm -rf /dev/shm/$source.*
done
good "its clocks are those of the host"
