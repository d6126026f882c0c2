# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: A dump begins while the guest stands still for an epoch: it has to wait for that, and then it runs.
. /bin/lib.sh
boot a
up a
standby s 7001 --timeout 0
# Without a limit an epoch is taken by commands of which others may get in between
protect a tcp:127.0.0.1:7001 --pause-limit 0
protected a
for end in protect guest; do
	catch a 0.2 state_is a paused
	drain
	slow_dump a detach
	kill -CONT "$(cat /tmp/a.protect)"
	wait_for 5 grep -q 'has to wait until it can run: There is a dump in process' /tmp/a.protect.log ||
		bad "protect does not say that the guest has to wait"
	more_epochs a
	state_is a paused || bad "the guest runs while it is dumped"
	# When the dump is over protect may be there or not
	[ $end = guest ] || kill -9 "$(cat /tmp/a.protect)"
	touch /tmp/drain.fast
	wait_for 30 state_is a running || bad "the guest stands still for good"
	[ $end = guest ] || { rm /tmp/a.json; protect a tcp:127.0.0.1:7001 --pause-limit 0; protected a; }
done
wait_for 5 grep -q 'the guest runs again' /tmp/a.protect.log || bad "protect does not say that it runs again"
more_epochs a
equal a s
verified a
good "it went on when the dump was over"
