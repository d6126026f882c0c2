# SPDX-License-Identifier: GPL-2.0-only
#
# What an ordinary command line of a guest has, and no more.

# Machines, and what is plugged into them
CONFIG_I440FX=y
CONFIG_Q35=y
CONFIG_PCIE_PORT=y
CONFIG_DIMM=y
CONFIG_NVDIMM=y

# A display is a logged slot of its own
CONFIG_VGA_PCI=y

# virtio devices write guest memory behind KVM's back
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_BALLOON=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_MEM=y
CONFIG_VIRTIO_NET=y
CONFIG_VIRTIO_RNG=y
CONFIG_VIRTIO_SCSI=y
CONFIG_VIRTIO_SERIAL=y
# and other processes may do so for them
CONFIG_VHOST_USER_BLK=y

# What -nic means by default
CONFIG_E1000E_PCI_EXPRESS=y
CONFIG_E1000_PCI=y

# What is there unless -nodefaults says otherwise, and what -usb means
CONFIG_PARALLEL=y
CONFIG_SCSI=y
CONFIG_USB_EHCI_PCI=y
CONFIG_USB_UHCI=y
CONFIG_USB_XHCI_PCI=y

CONFIG_TPM_CRB=y
CONFIG_TPM_TIS_ISA=y
CONFIG_TPM_EMULATOR=y

# Of these depends how a guest can stop
CONFIG_PVPANIC_ISA=y
CONFIG_PVPANIC_PCI=y
CONFIG_WDT_IB6300ESB=y
CONFIG_WDT_IB700=y
