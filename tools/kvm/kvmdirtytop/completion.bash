# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=bash
#
# Completion of kvmdirtytop's command line in bash.  The options are those that the program itself
# names.

_kvmdirtytop() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}

	COMPREPLY=()
	case "$prev,$cur" in
	-p,* | --pid,*)
		mapfile -t COMPREPLY < <(compgen -W "$(cd /proc && echo [0-9]*)" -- "$cur") ;;
	-s,* | --sort,*)
		mapfile -t COMPREPLY < <(compgen -W "pages runs len peak overflow exits harvests pause vm" -- "$cur") ;;
	*,-*)
		mapfile -t COMPREPLY < <(compgen -W "$("${COMP_WORDS[0]}" --help 2>/dev/null |
			grep -o -- '--[a-z][a-z-]*' | sort -u)" -- "$cur") ;;
	esac
}
complete -F _kvmdirtytop kvmdirtytop
