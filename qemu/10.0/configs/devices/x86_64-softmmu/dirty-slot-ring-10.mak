# SPDX-License-Identifier: GPL-2.0-only
#
# What an ordinary command line of a guest has, and no more.

include dirty-slot-ring.mak

# In 7.2 these come with what is there already
CONFIG_FDC_ISA=y
CONFIG_PCI_BRIDGE=y
CONFIG_PCIE_PCI_BRIDGE=y
CONFIG_USB_HID=y
CONFIG_USB_HUB=y
