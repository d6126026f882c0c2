# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# Completion of kvm-checkpoint's command line in bash.  The options are those that the program
# itself names, so this need not follow them.

_kvm_checkpoint() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
	local program=${COMP_WORDS[0]} command=${COMP_WORDS[1]-} i

	COMPREPLY=()
	if [ "$COMP_CWORD" -eq 1 ]; then
		mapfile -t COMPREPLY < <(compgen -W "$("$program" --help 2>/dev/null |
			sed -n 's/^  \([a-z]*\)  *.*/\1/p') --help --version" -- "$cur")
		return
	fi
	# Behind "--" it is QEMU's.
	for ((i = 2; i < COMP_CWORD; i++)); do
		[ "${COMP_WORDS[i]}" = -- ] || continue
		if [ "$i" -eq $((COMP_CWORD - 1)) ]; then
			mapfile -t COMPREPLY < <(compgen -c -- "$cur")
		else
			mapfile -t COMPREPLY < <(compgen -f -- "$cur")
		fi
		return
	done
	case "$prev" in
	--ram-dir | --leave-ram)
		mapfile -t COMPREPLY < <(compgen -d -- "$cur") ;;
	--to)
		mapfile -t COMPREPLY < <(compgen -W tcp: -- "$cur"; compgen -d -- "$cur") ;;
	--psk-file | --qmp | --control)
		mapfile -t COMPREPLY < <(compgen -f -- "$cur") ;;
	--compress)
		mapfile -t COMPREPLY < <(compgen -W "lz4 zstd none" -- "$cur") ;;
	--disk)
		if [ "$command" = standby ]; then
			mapfile -t COMPREPLY < <(compgen -f -- "$cur")
		else
			mapfile -t COMPREPLY < <(compgen -W "replicate external node=" -- "$cur")
		fi ;;
	--net)
		mapfile -t COMPREPLY < <(compgen -W "commit pass" -- "$cur") ;;
	--capability)
		mapfile -t COMPREPLY < <(compgen -W x-ignore-shared -- "$cur") ;;
	--fence | --exec)
		mapfile -t COMPREPLY < <(compgen -c -- "$cur") ;;
	*)
		case "$command,$cur" in
		*,-*)
			mapfile -t COMPREPLY < <(compgen -W "$("$program" "$command" --help 2>/dev/null |
				grep -o -- '--[a-z][a-z-]*' | sort -u) --help" -- "$cur") ;;
		status,*)
			mapfile -t COMPREPLY < <(compgen -W "promote promote-anyway detach switchover" -- "$cur"; compgen -f -- "$cur") ;;
		unplug,*)
			mapfile -t COMPREPLY < <(compgen -W "$(ls /sys/class/net)" -- "$cur") ;;
		*)
			mapfile -t COMPREPLY < <(compgen -d -- "$cur") ;;
		esac ;;
	esac
}
complete -o filenames -F _kvm_checkpoint kvm-checkpoint
