// SPDX-License-Identifier: Apache-2.0
/*
 * selfcheckpoint OUTFILE COMMAND: counts, and has itself saved on the way.
 *
 * At the count of 20 it runs COMMAND (for sh -c, with SELF_PID in the environment) and waits for it; a
 * line "checkpoint STATUS" follows. A copy restarted from what COMMAND saved wakes in that wait, sees
 * that its child has ended well, and counts on from 20.
 */
#define _GNU_SOURCE
#include <sys/stat.h>
#include <sys/wait.h>

#include "workload.h"

static int run(const char *command)
{
	char pid[16];
	pid_t child;
	int status;

	snprintf(pid, sizeof(pid), "%d", getpid());
	setenv("SELF_PID", pid, 1);
	child = TRY(fork());
	if (!child) {
		execl("/bin/sh", "sh", "-c", command, (char *)NULL);
		_exit(127);
	}
	while (waitpid(child, &status, 0) != child)
		CHECK(errno == EINTR, "%s", strerror(errno));
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

int main(int argc, char **argv)
{
	double sum = 0.0;
	int status;

	wl_start(argc, argv);
	CHECK(argc > 2, "usage: selfcheckpoint OUTFILE COMMAND");
	wl_ready();
	for (long count = 1; !wl_stopping; count++) {
		sum += count * 0.5;
		CHECK(sum == count * (count + 1.0) * 0.25, "count %ld sum %.17g", count, sum);
		wl_line("tick %ld sum %.1f", count, sum);
		if (count == 20) {
			status = run(argv[2]);
			wl_line("checkpoint %d", status);
			CHECK(status == 0, "the command ended with %d", status);
		}
		wl_sleep_us(10000);
	}
	wl_ok();
}
