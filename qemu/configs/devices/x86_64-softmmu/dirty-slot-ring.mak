# The smallest machine that can show dirty slot rings at work: virtio disks
# write guest memory behind KVM's back, a display is a logged slot of its own.

CONFIG_Q35=y
CONFIG_VGA_PCI=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_BLK=y
