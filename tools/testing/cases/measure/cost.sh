# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2034 # SMP, CPU and APPEND are for common
# WHAT: What it costs a guest to tell which pages it does not use: instructions for a page, a page fault, a fork (--icount).
. /bin/lib.sh
[ -n "${COUNTS_INSTRUCTIONS:-}" ] || bad "only with --icount is a tick an instruction"
SMP=1
PAGES=256	# COST_PAGES
# More, for a page of order 0 that is allocated or freed.  Six are the hook's; the rig's kernel has no jump
# labels, and gcc makes two ways of what comes after the hook in post_alloc_hook(), one of which is two longer.
MOST=7
# Its writers wait; what else it does is what a guest does
APPEND="${APPEND%% demo.rate=*} demo.rate=10"

# per PAGES TICKS: with two decimals
per() { echo "$(($2 / $1)).$(printf %02d $(($2 * 100 / $1 % 100)))"; }

# row TITLE CPU-FLAGS [ARG]...: $pages, $faults and $fork have what it costs
row() {
	local title=$1

	CPU=$2
	shift 2
	boot g "$@"
	up g
	# shellcheck disable=SC2046
	set -- $(ask g cost 100)
	[ "$1" = cost ] && [ $# = 4 ] || bad "$title: the guest says: $*"
	pages=$2 faults=$3 fork=$4
	say "$title: $(per $PAGES "$pages") a page allocated, cleared and freed; $(per $PAGES "$faults") with a page fault; $fork for a fork"
	kill -9 "$(cat /tmp/g.pid)"
	sleep 1
	rm -f /dev/shm/g.ram /tmp/g.*
}

row "nothing" ""
before=$pages
row "reporting" "" -device virtio-balloon-pci,id=b0,free-page-reporting=on
row "page states" ,kvm-page-states=on
[ "$pages" -gt "$before" ] || bad "page states cost nothing, so they are not kept: $pages and $before"
more=$((pages - before))
# Whole instructions: what else a round needs, such as pages for page tables, differs by a few in all
[ $((more / PAGES)) -le $((2 * MOST)) ] ||
	bad "page states cost $(per $PAGES $more) more to allocate and free a page, and not $((2 * MOST))"
good "page states cost $(per $PAGES $more) more to allocate and free a page"
