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
OBJCOPY ?= objcopy

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
