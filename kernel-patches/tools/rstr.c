// SPDX-License-Identifier: GPL-2.0
/*
 * rstr < IMAGE: becomes the one process that is in an image.
 *
 * The process that calls restart() is the one that is rebuilt, so it has the pid that rstr has. mktree restarts
 * trees, under the pids that they had.
 */
#include <stdio.h>

#include "checkpoint.h"

int main(void)
{
	if (restart(getpid(), STDIN_FILENO, 0) < 0) {
		perror("rstr: restart");
		return 1;
	}
	fputs("rstr: restart() came back without an error\n", stderr);
	return 1;
}
