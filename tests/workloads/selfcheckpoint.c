// SPDX-License-Identifier: Apache-2.0
/*
 * selfcheckpoint OUTFILE COMMAND: counts, and has itself saved on the way.
 *
 * At the count of 20 it starts COMMAND (for sh -c, with SELF_PID in the environment) outside of its
 * own tree and waits until that has ended; a line "checkpoint STATUS" follows. A copy restarted from
 * what COMMAND saved wakes in that wait, sees the answer, and counts on from 20.
 */
#define _GNU_SOURCE
#include <sys/stat.h>
#include <sys/wait.h>

#include "workload.h"

static void run_outside(const char *command, const char *answer)
{
	char pid[16], *whole;
	pid_t child;

	snprintf(pid, sizeof(pid), "%d", getpid());
	setenv("SELF_PID", pid, 1);
	CHECK(asprintf(&whole, "(%s); echo $? > '%s.part' && mv '%s.part' '%s'", command, answer, answer, answer) > 0,
	      "memory");
	child = TRY(fork());
	if (!child) {
		setsid();
		if (fork()) /* an orphan is nobody's descendant */
			_exit(0);
		execl("/bin/sh", "sh", "-c", whole, (char *)NULL);
		_exit(127);
	}
	free(whole);
	CHECK(waitpid(child, NULL, 0) == child, "%s", strerror(errno));
}

static void wait_for(const char *answer)
{
	char status[16] = "";
	int fd;

	while ((fd = open(answer, O_RDONLY | O_CLOEXEC)) < 0) {
		CHECK(errno == ENOENT && !wl_stopping, "%s: %s", answer, strerror(errno));
		wl_sleep_us(2000);
	}
	TRY(read(fd, status, sizeof(status) - 1));
	close(fd);
	wl_line("checkpoint %d", atoi(status));
	CHECK(atoi(status) == 0, "the command ended with %d", atoi(status));
}

int main(int argc, char **argv)
{
	double sum = 0.0;
	const char *answer;

	wl_start(argc, argv);
	CHECK(argc > 2, "usage: selfcheckpoint OUTFILE COMMAND");
	answer = wl_beside("answer");
	unlink(answer);
	wl_ready();
	for (long count = 1; !wl_stopping; count++) {
		sum += count * 0.5;
		CHECK(sum == count * (count + 1.0) * 0.25, "count %ld sum %.17g", count, sum);
		wl_line("tick %ld sum %.1f", count, sum);
		if (count == 20) {
			run_outside(argv[2], answer);
			wait_for(answer);
		}
		wl_sleep_us(10000);
	}
	wl_ok();
}
