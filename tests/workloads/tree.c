// SPDX-License-Identifier: Apache-2.0
/*
 * tree OUTFILE [PROCESSES [churn]]: a tree of processes with a token going round through pipes.
 *
 * Process i has the children 3i+1, 3i+2, 3i+3. Some lead sessions, some process groups, every
 * fourth keeps a zombie. Each looks at its own identity, its inherited memory and its zombie
 * whenever the token passes. With "churn" the root forks short-lived children all the time.
 */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "workload.h"

#define COW_WORDS 8192 /* 64 KiB, inherited by all, half of it rewritten by each */

struct identity {
	pid_t pid, ppid, pgrp, session, zombie;
};

static long processes;
static int (*pipes)[2]; /* process i reads from pipe i and writes to pipe i + 1 */
static uint64_t *cow;

static struct identity identity_of(void)
{
	return (struct identity){ getpid(), getppid(), getpgrp(), getsid(0), 0 };
}

static void identity_check(const struct identity *was, long index)
{
	struct identity is = identity_of();

	CHECK(is.pid == was->pid, "process %ld: pid %d, was %d", index, is.pid, was->pid);
	/* The root's parent is whoever started it, on this host or the next. */
	CHECK(!index || is.ppid == was->ppid, "process %ld: ppid %d, was %d", index, is.ppid, was->ppid);
	CHECK(is.pgrp == was->pgrp, "process %ld: pgrp %d, was %d", index, is.pgrp, was->pgrp);
	CHECK(is.session == was->session, "process %ld: session %d, was %d", index, is.session,
	      was->session);
	if (was->zombie) {
		siginfo_t info = { 0 };

		TRY(waitid(P_PID, was->zombie, &info, WEXITED | WNOHANG | WNOWAIT));
		CHECK(info.si_pid == was->zombie && info.si_code == CLD_EXITED && info.si_status == 7,
		      "process %ld: zombie %d code %d status %d", index, info.si_pid, info.si_code,
		      info.si_status);
	}
}

static void cow_build(long index)
{
	for (int i = COW_WORDS / 2; i < COW_WORDS; i++)
		cow[i] = wl_mix(index * COW_WORDS + i);
}

static void cow_check(long index)
{
	for (int i = 0; i < COW_WORDS; i++)
		CHECK(cow[i] == wl_mix((i < COW_WORDS / 2 ? 0 : index * COW_WORDS) + i),
		      "process %ld: inherited word %d", index, i);
}

static pid_t zombie_make(void)
{
	pid_t pid = TRY(fork());
	siginfo_t info;

	if (!pid)
		_exit(7);
	TRY(waitid(P_PID, pid, &info, WEXITED | WNOWAIT));
	return pid;
}

static void reap_children(void)
{
	int status;
	pid_t pid;

	while ((pid = wait(&status)) > 0 || errno == EINTR) {
		if (pid <= 0)
			continue;
		CHECK(WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 7),
		      "child %d ended with %#x", pid, status);
	}
}

static void grow(long index);

static void member(long index)
{
	struct identity self = identity_of();
	int in = pipes[index][0], out = pipes[(index + 1) % processes][1];
	uint64_t token;
	ssize_t n;

	for (long i = 0; i < processes; i++) {
		if (pipes[i][0] != in)
			close(pipes[i][0]);
		if (pipes[i][1] != out)
			close(pipes[i][1]);
	}
	if (index % 4 == 3)
		self.zombie = zombie_make();
	cow_build(index);
	while ((n = read(in, &token, sizeof(token))) != 0) {
		if (n < 0 && errno == EINTR)
			continue;
		CHECK(n == sizeof(token), "process %ld: read %zd: %s", index, n, strerror(errno));
		identity_check(&self, index);
		cow_check(index);
		CHECK(token % processes == (uint64_t)index, "process %ld: token %lu", index, token);
		token++;
		CHECK(write(out, &token, sizeof(token)) == sizeof(token), "process %ld: write: %s", index,
		      strerror(errno));
	}
	close(out);
	reap_children();
	_exit(0);
}

/* Forks the children of `index`, each of which forks its own before it begins. */
static void grow(long index)
{
	for (long child = 3 * index + 1; child <= 3 * index + 3 && child < processes; child++) {
		if (TRY(fork()))
			continue;
		signal(SIGTERM, SIG_IGN); /* they end when the root closes the ring */
		if (child % 7 == 3)
			TRY(setsid());
		else if (child % 5 == 2)
			TRY(setpgid(0, 0));
		grow(child);
		member(child);
	}
}

static void churn(unsigned long turn)
{
	pid_t pid = TRY(fork());
	int status;

	if (!pid) {
		cow[turn % COW_WORDS] ^= turn;
		_exit(turn % 200);
	}
	while (waitpid(pid, &status, 0) < 0)
		CHECK(errno == EINTR, "waitpid: %s", strerror(errno));
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == (int)(turn % 200), "status %#x", status);
}

int main(int argc, char **argv)
{
	struct rlimit files = { 4096, 4096 };
	struct identity self;
	unsigned long round, ticks = 0;
	int64_t last = 0;
	int in, out, churning;

	wl_start(argc, argv);
	processes = wl_arg(argc, argv, 2, 8);
	churning = argc > 3 && !strcmp(argv[3], "churn");
	setrlimit(RLIMIT_NOFILE, &files);
	pipes = calloc(processes, sizeof(*pipes));
	cow = mmap(NULL, COW_WORDS * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(processes >= 2 && cow != MAP_FAILED, "%ld processes", processes);
	cow_build(0);
	for (int i = 0; i < COW_WORDS / 2; i++)
		cow[i] = wl_mix(i);
	for (long i = 0; i < processes; i++)
		TRY(pipe2(pipes[i], O_CLOEXEC));
	grow(0);
	in = pipes[0][0];
	out = pipes[1][1];
	for (long i = 0; i < processes; i++) {
		if (pipes[i][0] != in)
			close(pipes[i][0]);
		if (pipes[i][1] != out)
			close(pipes[i][1]);
	}
	self = identity_of();
	self.zombie = zombie_make();

	for (round = 0; !wl_stopping; round++) {
		uint64_t token = round * processes + 1;
		ssize_t n;

		CHECK(write(out, &token, sizeof(token)) == sizeof(token), "write: %s", strerror(errno));
		do
			n = read(in, &token, sizeof(token));
		while (n < 0 && errno == EINTR);
		CHECK(n == sizeof(token) && token == (round + 1) * processes, "round %lu: read %zd, token %lu",
		      round, n, token);
		identity_check(&self, 0);
		cow_check(0);
		if (round == 0)
			wl_ready(); /* the token went round once: all stand */
		if (churning)
			churn(round);
		if (now_ns() - last > 100000000) {
			wl_line("tick %lu round %lu", ++ticks, round);
			last = now_ns();
		}
		wl_sleep_us(2000);
	}
	close(out);
	CHECK(waitpid(self.zombie, NULL, 0) == self.zombie, "zombie");
	reap_children();
	wl_ok();
}
