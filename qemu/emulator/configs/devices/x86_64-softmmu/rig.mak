# SPDX-License-Identifier: GPL-2.0-only
#
# What scripts/rig has the machine have: two serial lines.
CONFIG_I440FX=y
