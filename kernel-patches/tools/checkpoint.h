/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The calls, until a C library has them. Numbers are those of x86-64.
 */
#ifndef TOOLS_CHECKPOINT_H
#define TOOLS_CHECKPOINT_H

#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#ifndef __NR_checkpoint
#define __NR_checkpoint 548
#define __NR_restart 549
#endif

#ifndef __NR_cradvise
#define __NR_cradvise 550
#endif

#ifndef CHECKPOINT_SUBTREE
#define CHECKPOINT_SUBTREE 1UL
#endif

#ifndef RESTART_FROZEN
#define RESTART_FROZEN 2UL
#endif

#ifndef CRADVISE_SKIP_FILE
#define CRADVISE_SKIP_FILE 3
#define CRADVISE_SAVE_FILE 4
#define CRADVISE_PRESET_FILE 5
#endif

/* A checkpoint identifier; 0 in a copy that has saved itself and comes to life here; -1 with errno. */
static inline long checkpoint(pid_t pid, int fd, unsigned long flags)
{
	return syscall(__NR_checkpoint, pid, fd, flags);
}

/* Comes back only with -1 and errno, unless what it restarts has saved itself. */
static inline long restart(pid_t pid, int fd, unsigned long flags)
{
	return syscall(__NR_restart, pid, fd, flags);
}

static inline int cradvise(int advice, unsigned long arg1, unsigned long arg2, unsigned long arg3)
{
	return syscall(__NR_cradvise, advice, arg1, arg2, arg3);
}

#endif
