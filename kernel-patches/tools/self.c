// SPDX-License-Identifier: GPL-2.0
/*
 * self > IMAGE: counts in a file as test does, and saves itself after the count of 2.
 *
 * Like fork(), checkpoint() comes back twice: here with the identifier of the checkpoint, and in the copy with 0.
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoint.h"

#define OUTFILE "/tmp/cr-test.out"

int main(void)
{
	FILE *file;
	float sum;
	long ret;
	int i;

	close(STDIN_FILENO);
	close(STDERR_FILENO);
	unlink(OUTFILE);
	file = fopen(OUTFILE, "w+");
	if (!file)
		exit(1);

	sum = sqrtf(getpid() * 2.1f);
	fprintf(file, "hello, world (%.2f)!\n", sum);
	fflush(file);
	for (i = 0; i < 1000; i++) {
		sleep(1);
		sum = sqrtf(sum * sum + 2 * sum * (i / 10.0f) + i * i / 100.0f);
		fprintf(file, "count %d (%.2f)!\n", i, sum);
		fflush(file);
		if (i != 2)
			continue;
		ret = checkpoint(getpid(), STDOUT_FILENO, CHECKPOINT_SUBTREE);
		if (ret < 0) {
			fprintf(file, "checkpoint: %s\n", strerror(errno));
			exit(2);
		}
		fprintf(file, "checkpoint ret: %ld\n", ret);
		fflush(file);
	}
	return 0;
}
