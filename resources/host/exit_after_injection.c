// SPDX-License-Identifier: GPL-2.0
/*
 * Has every guest exit right after an interrupt was injected into it.
 *
 * QEMU's emulation of SVM leaves an injected interrupt noted as an exception to be raised (exception_index in
 * svm_helper.c) until the next #VMEXIT. If the emulated processor is asked to leave its loop before that, which
 * counting instructions and other processors do all the time, the interrupt is delivered again, even to a guest that
 * has interrupts disabled: its handler then waits for a lock that it holds itself. An interrupt for the host that is
 * pending when the guest is entered brings the #VMEXIT at once.
 *
 * Both probed functions of kvm_amd run on the processor that enters the guest, the second with interrupts disabled.
 */
#include <linux/irq_work.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/percpu.h>

static DEFINE_PER_CPU(struct irq_work, interrupt);
static DEFINE_PER_CPU(bool, injecting);

static void nothing(struct irq_work *work)
{
}

static int on_injection(struct kprobe *probe, struct pt_regs *regs)
{
	this_cpu_write(injecting, true);
	return 0;
}

static int on_entry(struct kprobe *probe, struct pt_regs *regs)
{
	if (this_cpu_read(injecting)) {
		this_cpu_write(injecting, false);
		irq_work_queue(this_cpu_ptr(&interrupt));
	}
	return 0;
}

static struct kprobe injection = {
	.symbol_name = "svm_inject_irq",
	.pre_handler = on_injection,
};
static struct kprobe entry = {
	.symbol_name = "svm_vcpu_run",
	.pre_handler = on_entry,
};
static struct kprobe *probes[] = { &injection, &entry };

static int __init exit_after_injection_init(void)
{
	int cpu;

	for_each_possible_cpu(cpu)
		*per_cpu_ptr(&interrupt, cpu) = IRQ_WORK_INIT_HARD(nothing);
	return register_kprobes(probes, ARRAY_SIZE(probes));
}

static void __exit exit_after_injection_exit(void)
{
	unregister_kprobes(probes, ARRAY_SIZE(probes));
}

module_init(exit_after_injection_init);
module_exit(exit_after_injection_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Works around interrupts that QEMU's emulation of SVM delivers twice");
