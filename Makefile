# SPDX-License-Identifier: GPL-2.0-only
#
# Everything here is a script under scripts/; this only names them.

.DEFAULT_GOAL := help
MINUTES ?= 30

.PHONY: help deps kernel qemu test test-debug test-vmx test-checkpoint test-failover test-qemu10 test-kernel73 demo bench plots patch check clean
.PHONY: tools tools-install model soak test-all test-mutants test-arm64 test-pacemaker deb test-deb

help:
	@echo 'make demo     live-migrate a Linux guest with the bitmap, the dirty ring and slot rings'
	@echo 'make test     everything that can be tested here, as CI does'
	@echo 'make soak     all tests of ours at random for MINUTES=30; nothing may grow'
	@echo 'make test-debug   the kernel tests with KASAN, lockdep, kmemleak, UBSAN, faults; then with KCSAN'
	@echo 'make test-vmx     the kernel tests in Bochs with PML, without PML, without EPT; and other ways to run'
	@echo 'make test-arm64   the kernel tests on arm64, at full length, with VHE, without, and with protected KVM; the tools, without KVM'
	@echo 'make test-checkpoint   kvm-checkpoint, when others do something to its guest, its QEMU and its processes'
	@echo 'make test-failover     300 times its QEMU is killed, and on 300 bad days its links, daemons, disks and clocks fail'
	@echo 'make test-kernel73   the series for Linux 7.3: git am, checkpatch, and the kernel tests on it'
	@echo 'make test-qemu10   a migration and kills with QEMU 10.0; with QEMU=10.0 demo, qemu, test-checkpoint use it too'
	@echo 'make test-mutants   all deliberate errors that the code in userspace has to notice; make test runs most'
	@echo 'make test-deb     the packages: installed in a Debian of their own, which is booted with its own kernel'
	@echo 'make test-pacemaker   the resource agent in a cluster of three nodes: killed, split, back, protected again; and libvirt'
	@echo 'make test-all     all of these, some hours'
	@echo 'make bench    what it costs beside the bitmap and the upstream ring: tables and plots'
	@echo
	@echo 'make deps     install the Debian packages that are missing'
	@echo 'make kernel   build the patched kernel'
	@echo 'make qemu     build the patched QEMU: 7.2, or QEMU=10.0'
	@echo 'make plots    pictures of dirty rate, ring fill and pauses, drawn by kvmdirtyplot'
	@echo 'make tools    build the library and the tools under tools/kvm/ into out/tools/'
	@echo 'make tools-install   install them: DESTDIR, PREFIX (/usr/local), LIBDIR'
	@echo 'make deb      Debian packages of the modules, the tools and QEMU, into out/deb/'
	@echo 'make model    check the models of the design exhaustively, the long form'
	@echo 'make patch    write the kernel series, for git am, to out/series/, and that for 7.3 to out/series-7.3/'
	@echo 'make check    checkpatch, sparse, and that each commit of both series builds'
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

tools:
	@scripts/deps tools
	@$(MAKE) --no-print-directory -C tools/kvm

tools-install: tools
	@$(MAKE) --no-print-directory -C tools/kvm install

deb:
	@scripts/deps deb
	@scripts/deb

test-deb:
	@scripts/test deb-long

test:
	@scripts/deps
	@scripts/test

# One after the other, whatever fails; the last word is whether anything did.
test-all:
	@failed=; for t in test test-debug test-vmx test-arm64 test-kernel73 test-checkpoint test-failover test-qemu10 test-mutants test-pacemaker model soak bench; do \
		echo "==> make $$t"; TEST_LONG=1 $(MAKE) --no-print-directory $$t || failed="$$failed $$t"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

model:
	@scripts/deps model
	@tools/testing/dirty_slot_ring/model/run --long

soak:
	@scripts/deps kernel rig
	@scripts/soak $(MINUTES)

test-debug:
	@scripts/test debug kcsan

test-vmx:
	@scripts/test vmx ways

test-kernel73:
	@scripts/test kernel73

test-arm64:
	@scripts/test arm64-long arm64-tools

test-mutants:
	@scripts/test mutants

test-checkpoint:
	@scripts/test cases

test-failover:
	@scripts/test failover-long

test-qemu10:
	@scripts/test qemu10

test-pacemaker:
	@scripts/test pacemaker libvirt

demo:
	@scripts/deps kernel rig qemu tools
	@scripts/kernel patched
	@scripts/demo

bench:
	@scripts/bench

plots:
	@scripts/plots

patch:
	@scripts/deps kernel
	@scripts/series out/series
	@KERNEL=7.3 scripts/series out/series-7.3 || [ $$? = 4 ]	# 4: the mirrors have no such source

check:
	@scripts/deps kernel check
	@scripts/check
	@KERNEL=7.3 scripts/check

clean:
	@rm -rf out
	@scripts/clean
