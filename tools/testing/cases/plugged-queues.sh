# SPDX-License-Identifier: GPL-2.0-only
# shellcheck shell=sh
# WHAT: The same as plugged-net, of a card with several queues.
KIND=queues
. /bin/plugged-net.sh
