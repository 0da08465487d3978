// SPDX-License-Identifier: GPL-2.0
/*
 * test: counts in a file, once a second, with floating point on the way. Something to save from outside.
 *
 * All state is in memory and in registers, and no terminal is open: a copy goes on where the original was.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define OUTFILE "/tmp/cr-test.out"

int main(void)
{
	FILE *file;
	float sum;
	int i;

	for (i = 0; i < 3; i++)
		close(i);
	unlink(OUTFILE);
	file = fopen(OUTFILE, "w+");
	if (!file)
		exit(1);

	sum = sqrtf(getpid() * 2.1f);
	fprintf(file, "hello, world (%.2f)!\n", sum);
	fflush(file);
	for (i = 0; i < 1000; i++) {
		sleep(1);
		/* A square, so that its root is sum + i / 10. */
		sum = sqrtf(sum * sum + 2 * sum * (i / 10.0f) + i * i / 100.0f);
		fprintf(file, "count %d (%.2f)!\n", i, sum);
		fflush(file);
	}
	fprintf(file, "world, hello (%.2f)!\n", sum);
	fclose(file);
	return 0;
}
