// SPDX-License-Identifier: GPL-2.0-only
/*
 * Does the emulator deliver an interrupt that KVM injects once, and only where the guest takes
 * interrupts?  See scripts/rig for what becomes of guests where it does not.
 *
 * Its guest, in real mode, exits where it takes interrupts and gets one each time.  The
 * handler counts it, and stays for longer than a tick of the host, which the guest does
 * not take part in.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define VECTOR	0x20
#define CODE	0x1000
#define HANDLER	0x1100
#define COUNT	0x1200
#define SIZE	0x2000
#define ROUNDS	100

static const uint8_t code[] = {
	0xfb,			/*	sti, which counts after the next one */
	0x90,			/*	nop */
	0xe6, 0x10,		/* 1:	out %al, $0x10 */
	0xeb, 0xfc,		/*	jmp 1b */
};

static const uint8_t handler[] = {
	0x51,			/*	push %cx */
	0x52,			/*	push %dx */
	0xff, 0x06, COUNT & 0xff, COUNT >> 8,
				/*	incw COUNT */
	0xba, 0x64, 0x00,	/*	mov $100, %dx */
	0xb9, 0x00, 0x00,	/* 1:	mov $0, %cx */
	0xe2, 0xfe,		/* 2:	loop 2b */
	0x4a,			/*	dec %dx */
	0x75, 0xf8,		/*	jnz 1b */
	0x5a,			/*	pop %dx */
	0x59,			/*	pop %cx */
	0xcf,			/*	iret */
};

int main(void)
{
	struct kvm_userspace_memory_region slot = { .memory_size = SIZE };
	struct kvm_irqchip pic = { .chip_id = KVM_IRQCHIP_PIC_MASTER };
	struct kvm_regs regs = { .rip = CODE, .rsp = 0x1000, .rflags = 2 };
	struct kvm_sregs sregs;
	struct kvm_run *run;
	int kvm, vm, vcpu, i, level;
	uint8_t *mem;
	uint16_t n;

	mem = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	vm = kvm < 0 ? -1 : ioctl(kvm, KVM_CREATE_VM, 0);
	if (mem == MAP_FAILED || vm < 0)
		err(1, "cannot make a VM");
	memcpy(mem + CODE, code, sizeof(code));
	memcpy(mem + HANDLER, handler, sizeof(handler));
	memcpy(mem + 4 * VECTOR, &(uint16_t){ HANDLER }, sizeof(uint16_t));
	slot.userspace_addr = (uintptr_t)mem;
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot))
		err(1, "cannot give it memory");
	/* An interrupt is over as soon as it is taken */
	pic.chip.pic.irq_base = VECTOR;
	pic.chip.pic.auto_eoi = 1;
	pic.chip.pic.init4 = 1;
	if (ioctl(vm, KVM_CREATE_IRQCHIP, 0) || ioctl(vm, KVM_SET_IRQCHIP, &pic))
		err(1, "cannot give it a PIC");
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED,
		   vcpu, 0);
	if (vcpu < 0 || run == MAP_FAILED || ioctl(vcpu, KVM_GET_SREGS, &sregs))
		err(1, "cannot make a vCPU");
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs) || ioctl(vcpu, KVM_SET_REGS, &regs))
		err(1, "cannot set registers");

	for (i = 0; i <= ROUNDS; i++) {
		if (ioctl(vcpu, KVM_RUN, 0))
			err(1, "KVM_RUN");
		if (run->exit_reason != KVM_EXIT_IO)
			errx(1, "exit reason %u", run->exit_reason);
		for (level = 1; i < ROUNDS && level >= 0; level--) {
			if (ioctl(vm, KVM_IRQ_LINE, &(struct kvm_irq_level){ .level = level }))
				err(1, "KVM_IRQ_LINE");
		}
	}
	memcpy(&n, mem + COUNT, sizeof(n));
	printf("%u interrupts were injected, %u delivered\n", ROUNDS, n);
	return n != ROUNDS;
}
