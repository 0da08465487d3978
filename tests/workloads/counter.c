// SPDX-License-Identifier: Apache-2.0
/*
 * counter OUTFILE [INTERVAL_MS]: counts into a file, with floating point on the way.
 *
 * Every line depends on all before it, so a lost, repeated or half-written step shows: in the
 * program's own check, and to whoever compares the file with that of an undisturbed run.
 */
#define _GNU_SOURCE
#include "workload.h"

int main(int argc, char **argv)
{
	long interval_ms, count;
	double sum = 0.0, product = 1.0;

	wl_start(argc, argv);
	interval_ms = wl_arg(argc, argv, 2, 10);
	wl_ready();
	for (count = 1; !wl_stopping; count++) {
		sum += count * 0.5;
		product = product * 1.0000001 + 1e-9;
		/* Exact while below 2^53: halves of integers. */
		CHECK(sum == count * (count + 1.0) * 0.25, "count %ld sum %.17g", count, sum);
		wl_line("tick %ld sum %.1f product %.17g", count, sum, product);
		wl_sleep_us(interval_ms * 1000);
	}
	wl_ok();
}
