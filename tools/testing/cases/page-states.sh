# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# shellcheck disable=SC2034 # MB, CPU, SAME and APPEND are for common
# WHAT: A guest that says which pages it does not use (KVM_FEATURE_PAGE_STATES), and allocates all the time.
. /bin/lib.sh
MB=160
CPU=,kvm-page-states=on
SAME=used
# What is allocated is written at once: else what is used and was not written yet may be anything
APPEND="$APPEND demo.churn=800 demo.churn_us=5000 init_on_alloc=1"
sum() { grep '"event":"epoch"' "/tmp/$1.json" | sed "s/.*\"$2\"://; s/,.*//" | { t=0; while read -r n; do t=$((t + n)); done; echo $t; }; }
boot a
up a
standby s 7001 --timeout 5s
protect a tcp:127.0.0.1:7001
protected a
unused=$(grep '"event":"synced"' /tmp/a.json | sed 's/.*"unused"://; s/[,}].*//')
[ "$unused" -gt 1000 ] || bad "of the first copy $unused pages are left out"
for i in 1 2 3 4 5; do
	more_epochs a
	more_epochs a
	equal a s
done
[ "$(sum a unused_pages)" -gt 1000 ] || bad "epochs leave out $(sum a unused_pages) pages"
say "first copy: $unused pages left out; epochs: $(sum a pages) pages sent, $(sum a unused_pages) left out"
verified a
kill_host a
taken_over s
verified s
sleep 3
verified s
rounds=$(ask s churn) || bad "the guest does not go on"
say "$rounds"
good "nothing that is used was left out"
