# SPDX-License-Identifier: GPL-2.0-only
#
# What the Makefiles of the tools share; they include it first.

# of the repository
TOP := $(abspath $(dir $(lastword $(MAKEFILE_LIST)))/../..)
TOOLS_OUT ?= $(TOP)/out/tools
O ?= $(TOOLS_OUT)/$(notdir $(CURDIR))

PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
MANDIR ?= $(PREFIX)/share/man
COMPLETIONDIR ?= $(PREFIX)/share/bash-completion/completions
INSTALL ?= install
PKG_CONFIG ?= pkg-config

# For another machine, as in the kernel: CROSS_COMPILE=aarch64-linux-gnu- and an O of its own.
# SYSROOT=DIR is where that machine's headers and libraries are, if not where the compiler and
# pkg-config look; PKG_CONFIG_LIBDIR and PKG_CONFIG_SYSROOT_DIR say so to the latter, and are
# made from it if they are not set.
CROSS_COMPILE ?=
SYSROOT ?=
tool = $(if $(filter default undefined,$(origin $(1))),$(eval $(1) := $(CROSS_COMPILE)$(2)))
$(call tool,AR,ar)
$(call tool,LD,ld)
$(call tool,OBJCOPY,objcopy)
$(if $(CROSS_COMPILE),$(call tool,CC,gcc))
ifneq ($(SYSROOT),)
override CC += --sysroot=$(SYSROOT)
endif
machine := $(firstword $(subst -, ,$(shell $(CC) -dumpmachine)))
# Debian's name of it, in paths; others have none.
multiarch := $(shell $(CC) -print-multiarch 2>/dev/null)
ifneq ($(CROSS_COMPILE)$(SYSROOT),)
PKG_CONFIG_SYSROOT_DIR ?= $(SYSROOT)
PKG_CONFIG_LIBDIR ?= $(SYSROOT)/usr/lib/$(if $(multiarch),$(multiarch)/)pkgconfig:$(SYSROOT)/usr/share/pkgconfig
# $(shell) does not get what is exported.
override PKG_CONFIG := PKG_CONFIG_SYSROOT_DIR=$(PKG_CONFIG_SYSROOT_DIR) \
		       PKG_CONFIG_LIBDIR=$(PKG_CONFIG_LIBDIR) $(PKG_CONFIG)
endif

CFLAGS ?= -O2 -g
# Warnings are errors here; a packager with a newer compiler sets WERROR=
WERROR ?= -Werror
KVM_CFLAGS := -std=gnu11 -Wall -Wextra -Wshadow -Wstrict-prototypes -Wmissing-prototypes \
	      -Wpointer-arith $(WERROR) -D_GNU_SOURCE -I$(TOP)/include/uapi

# make V=1 shows the commands
ifeq ($(V),1)
Q :=
say = @:
else
Q := @
say = @printf '  %-8s%s\n'
endif
