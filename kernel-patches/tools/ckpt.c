// SPDX-License-Identifier: GPL-2.0
/*
 * ckpt [-c] [-x FD]... PID > IMAGE: saves a process tree whose tasks are stopped or frozen.
 *
 * PID is the root of any tree; with -c it must be the init of a container, and whatever the container shares with
 * the outside is an error. The open files that PID has as its descriptors FD are left out (cradvise(2)).
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint.h"

#define MAX_LEFT_OUT 64

static int usage(void)
{
	fputs("usage: ckpt [-c] [-x FD]... PID > IMAGE\n", stderr);
	return 2;
}

/* A duplicate of a descriptor of another process: the mark is on the open file. */
static int mark(int pidfd, int fd, int advice)
{
	int own = syscall(SYS_pidfd_getfd, pidfd, fd, 0);

	if (own < 0 || cradvise(advice, own, 0, 0) < 0) {
		fprintf(stderr, "ckpt: descriptor %d: %s\n", fd, strerror(errno));
		return -1;
	}
	close(own);
	return 0;
}

static int mark_all(long pid, const int *fds, int nr, int advice)
{
	int pidfd = nr ? syscall(SYS_pidfd_open, pid, 0) : -1, i;

	if (nr && pidfd < 0) {
		fprintf(stderr, "ckpt: %ld: %s\n", pid, strerror(errno));
		return -1;
	}
	for (i = 0; i < nr; i++)
		if (mark(pidfd, fds[i], advice))
			return -1;
	if (nr)
		close(pidfd);
	return 0;
}

int main(int argc, char **argv)
{
	unsigned long flags = CHECKPOINT_SUBTREE;
	int left_out[MAX_LEFT_OUT], nr = 0, opt, err;
	char *end;
	long pid, id;

	while ((opt = getopt(argc, argv, "cx:")) != -1) {
		switch (opt) {
		case 'c':
			flags = 0;
			break;
		case 'x':
			left_out[nr] = strtol(optarg, &end, 10);
			if (*end || nr + 1 == MAX_LEFT_OUT)
				return usage();
			nr++;
			break;
		default:
			return usage();
		}
	}
	if (optind != argc - 1)
		return usage();
	pid = strtol(argv[optind], &end, 10);
	if (*end || pid <= 0 || pid > 4194304)
		return usage();
	if (isatty(STDOUT_FILENO)) {
		fputs("ckpt: an image is not for a terminal; redirect standard output\n", stderr);
		return 2;
	}

	if (mark_all(pid, left_out, nr, CRADVISE_SKIP_FILE))
		return 1;
	id = checkpoint(pid, STDOUT_FILENO, flags);
	err = errno;
	mark_all(pid, left_out, nr, CRADVISE_SAVE_FILE);
	if (id < 0) {
		fprintf(stderr, "ckpt: %ld: %s (ckptinfo shows the reason in the image)\n", pid, strerror(err));
		return 1;
	}
	fprintf(stderr, "checkpoint id %ld\n", id);
	return 0;
}
