/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Of the demo's guest: other kernels in its memory, and its own one that comes back to it.
 */
#ifndef KERNELS_H
#define KERNELS_H

/**
 * kernels_load() - load the kernel in /other, with the command line of this one
 * @crash: to be gone to in a panic; else with kernels_go().
 *
 * Return: NULL, or why it cannot be.
 */
const char *kernels_load(_Bool crash);
/* To it, by kexec or by a panic; returns if that is not possible */
void kernels_go(_Bool crash);

/* To a third disk and back again: "ok", or what went wrong */
const char *kernels_hibernate(void);

#endif
