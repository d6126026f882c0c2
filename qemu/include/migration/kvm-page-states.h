/*
 * Pages of which the guest says that it does not use them: what KVM says of it
 *
 * SPDX-License-Identifier: GPL-2.0-only
 *
 * For asm/kvm_para.h, from which QEMU takes such definitions when Linux has
 * them.
 */

#ifndef MIGRATION_KVM_PAGE_STATES_H
#define MIGRATION_KVM_PAGE_STATES_H

#define KVM_FEATURE_PAGE_STATES     19
#define MSR_KVM_PAGE_STATES         0x4b564d09

/*
 * What MSR_KVM_PAGE_STATES points to.  Behind it are nr bytes, one for each
 * page of guest physical memory, from the first one on.
 */
#define KVM_PAGE_STATES_MAGIC       0x7374504b
#define KVM_PAGE_STATES_VERSION     1

struct kvm_page_states {
    uint32_t magic;
    uint32_t version;
    uint64_t nr;
    uint8_t  reserved[4080];
};

/* Any other value is as good as KVM_PAGE_USED. */
#define KVM_PAGE_USED               0
#define KVM_PAGE_UNUSED             1

#endif
