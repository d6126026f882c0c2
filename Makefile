# SPDX-License-Identifier: GPL-2.0-only
#
# Everything here is a script under scripts/; this only names them.

.DEFAULT_GOAL := help
.PHONY: help deps kernel qemu test model demo patch check clean

help:
	@echo 'make demo     live-migrate a Linux guest with the bitmap, the dirty ring and slot rings'
	@echo 'make test     everything that can be tested here, as CI does'
	@echo
	@echo 'make deps     install the Debian packages that are missing'
	@echo 'make kernel   build the patched kernel'
	@echo 'make qemu     build the patched QEMU'
	@echo 'make model    check the models of the design exhaustively, the long form'
	@echo 'make patch    write the kernel series, for git am, to out/series/'
	@echo 'make check    checkpatch, sparse, and that each commit of the series builds'
	@echo 'make clean    remove what was built, here and in the cache'
	@echo
	@echo 'The first build takes long; what it makes is kept in'
	@echo '$${XDG_CACHE_HOME:-~/.cache}/kvm-dirty-slot-ring, outside of this directory.'

deps:
	@scripts/deps

kernel:
	@scripts/deps kernel
	@scripts/kernel patched

qemu:
	@scripts/deps qemu
	@scripts/qemu

test:
	@scripts/deps
	@scripts/test

model:
	@scripts/deps model
	@tools/testing/dirty_slot_ring/model/run --long

demo:
	@scripts/deps kernel rig qemu
	@scripts/kernel patched
	@scripts/demo

patch:
	@scripts/deps kernel
	@scripts/series out/series

check:
	@scripts/deps kernel check
	@scripts/check

clean:
	@rm -rf out
	@scripts/clean
