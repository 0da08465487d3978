// SPDX-License-Identifier: GPL-2.0
/*
 * ckpt [-c] PID > IMAGE: saves a process tree whose tasks are stopped or frozen.
 *
 * PID is the root of any tree; with -c it must be the init of a container, and whatever the container shares with
 * the outside is an error.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoint.h"

static int usage(void)
{
	fputs("usage: ckpt [-c] PID > IMAGE\n", stderr);
	return 2;
}

int main(int argc, char **argv)
{
	unsigned long flags = CHECKPOINT_SUBTREE;
	char *end;
	long pid, id;
	int opt;

	while ((opt = getopt(argc, argv, "c")) != -1) {
		if (opt != 'c')
			return usage();
		flags = 0;
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

	id = checkpoint(pid, STDOUT_FILENO, flags);
	if (id < 0) {
		fprintf(stderr, "ckpt: %ld: %s (ckptinfo shows the reason in the image)\n", pid, strerror(errno));
		return 1;
	}
	fprintf(stderr, "checkpoint id %ld\n", id);
	return 0;
}
