# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# The series for one kernel, patches/linux-$KERNEL/, for those who source this after lib.sh.
#
# A patch has its message, lines for us ("New-files:" and "Alone:", see scripts/series), a line
# "---" and hunks.  One that says what that of another kernel says begins with "Message-of: FILE",
# and says after that only what is different; it has the other's New-files as well.  Hunks may
# be for a new file: they come on top of what is here.

SERIES=$TOP/patches/linux-$KERNEL

# The first SERIES_UPTO of the patches, for scripts/check; normally all.
patches() { find "$SERIES" -maxdepth 1 -name '*.patch' | sort | head -n "${SERIES_UPTO:-99}"; }

# header FILE: a patch without its hunks, or a cover letter.
header() {
	local of
	of=$(sed -n '1s/^Message-of: *//p' "$1")
	if [ -z "$of" ]; then
		sed '/^---$/,$d' "$1"
	else
		sed '/^---$/,$d' "$SERIES/$of"
		sed '1d; /^---$/,$d' "$1"
	fi
}

# of_header NAME FILE: what its lines of that name say, one a line.
of_header() { header "$2" | sed -n "s/^$1: *//p" | tr -s ' ' '\n'; }

new_files() {
	local p
	for p in $(patches); do of_header New-files "$p"; done
}

# there FILE: the name of a new file in this kernel's tree.
there() {
	case "$KERNEL" in
	6.12) echo "$1" ;;
	# Since 6.14 directories of selftests have the names that the kernel's own have.
	*) echo "$1" | sed 's,^\(tools/testing/selftests/kvm/.*\)\<x86_64/,\1x86/,
			    s,^\(tools/testing/selftests/kvm/.*\)\<aarch64/,\1arm64/,' ;;
	esac
}

# put_new_files FILE...: here, in the directories that they have in the kernel's tree.
put_new_files() {
	local f to
	for f; do
		to=$(there "$f")
		mkdir -p "$(dirname "$to")"
		cp "$TOP/$f" "$to"
	done
}
