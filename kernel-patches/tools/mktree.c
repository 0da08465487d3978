// SPDX-License-Identifier: GPL-2.0
/*
 * mktree [-d] [-p PID:FD]... < IMAGE: restarts the tree that is in an image, under the pids that it had.
 *
 * Looks into the stream for the pid of the root without taking anything out of it, makes a child with that pid, and
 * lets it become the root; the kernel makes the others. Waits for the root and ends as it does; with -d prints its
 * pid and leaves it. Descriptor FD of process PID is that of mktree with this number (cradvise(2)).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "checkpoint.h"

#define TREE 102
#define LOOK_AHEAD 65536

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* The first bytes of standard input, which stay there. */
static size_t look_ahead(unsigned char *data, size_t size)
{
	size_t done = 0;
	int fds[2];
	ssize_t n;
	off_t at;

	at = lseek(STDIN_FILENO, 0, SEEK_CUR);
	if (at >= 0) {
		n = pread(STDIN_FILENO, data, size, at);
		if (n < 0)
			die("mktree: standard input");
		return n;
	}
	if (pipe(fds) < 0)
		die("mktree: pipe");
	/* What is there now is enough once the tree is in it. */
	n = tee(STDIN_FILENO, fds[1], size, 0);
	if (n < 0)
		die("mktree: standard input is neither a file nor a pipe");
	close(fds[1]);
	while (done < (size_t)n) {
		ssize_t got = read(fds[0], data + done, n - done);

		if (got <= 0)
			die("mktree: read");
		done += got;
	}
	close(fds[0]);
	return done;
}

/* The pid of the root, 0 if it is not there yet, -1 if this is no image. */
static pid_t find_root(const unsigned char *data, size_t len)
{
	int32_t type, size, pid;
	size_t at;

	for (at = 0; at + 8 <= len; at += size) {
		memcpy(&type, data + at, sizeof(type));
		memcpy(&size, data + at + 4, sizeof(size));
		if (size < 8 || size % 8)
			return -1;
		if (type != TREE)
			continue;
		/* generation, number of tasks, then the first of them, which begins with its pid */
		if (at + 20 > len)
			return 0;
		memcpy(&pid, data + at + 16, sizeof(pid));
		return pid > 0 ? pid : -1;
	}
	return 0;
}

static pid_t root_of_image(void)
{
	static unsigned char data[LOOK_AHEAD];
	size_t len = 0, before;
	pid_t pid;

	do {
		before = len;
		len = look_ahead(data, sizeof(data));
		pid = find_root(data, len);
		if (!pid && len == before)
			usleep(1000);
	} while (!pid && len && len < sizeof(data));
	if (pid <= 0) {
		fputs("mktree: this is not an image\n", stderr);
		exit(1);
	}
	return pid;
}

/* Tells what restart() did not like, in words. */
static void complain(void)
{
	char text[512];
	ssize_t n;
	int fd;

	perror("mktree: restart");
	fd = open("/proc/self/ckpt_error", O_RDONLY);
	n = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);
	if (n > 0) {
		text[n] = '\0';
		fprintf(stderr, "mktree: %s", text);
	}
}

static int usage(void)
{
	fputs("usage: mktree [-d] [-p PID:FD]... < IMAGE\n", stderr);
	return 2;
}

/* Presets are the task's that restarts. */
static int preset(const char *text)
{
	int pid, fd;

	sscanf(text, "%d:%d", &pid, &fd);
	if (!cradvise(CRADVISE_PRESET_FILE, pid, fd, fd))
		return 0;
	fprintf(stderr, "mktree: -p %s: %s\n", text, strerror(errno));
	return -1;
}

int main(int argc, char **argv)
{
	struct clone_args args = { .exit_signal = SIGCHLD, .set_tid_size = 1 };
	int fds[2], status, opt, detach = 0, bad = 0, one, two, end = 0;
	pid_t pid, child;
	char failed;

	while ((opt = getopt(argc, argv, "dp:")) != -1) {
		if (opt == 'p' && (sscanf(optarg, "%d:%d%n", &one, &two, &end) != 2 || optarg[end]))
			return usage();
		if (opt == '?')
			return usage();
		detach |= opt == 'd';
	}
	if (optind != argc)
		return usage();
	pid = root_of_image();
	args.set_tid = (uintptr_t)&pid;
	/* Closed without a byte once the child has become the root, which has other descriptors. */
	if (pipe2(fds, O_CLOEXEC) < 0)
		die("mktree: pipe");
	child = syscall(SYS_clone3, &args, sizeof(args));
	if (child < 0) {
		fprintf(stderr, "mktree: pid %d: %s\n", pid, strerror(errno));
		return 1;
	}
	if (!child) {
		if (detach)
			setsid();
		for (optind = 1; (opt = getopt(argc, argv, "dp:")) != -1;)
			if (opt == 'p')
				bad |= preset(optarg);
		if (!bad) {
			restart(getpid(), STDIN_FILENO, 0);
			complain();
		}
		if (write(fds[1], "", 1) != 1)
			_exit(2);
		_exit(1);
	}
	close(fds[1]);
	if (detach && read(fds[0], &failed, 1) == 0 && !waitpid(child, &status, WNOHANG)) {
		printf("%d\n", child);
		return 0;
	}
	if (waitpid(child, &status, 0) < 0)
		die("mktree: waitpid");
	if (WIFSIGNALED(status)) {
		signal(WTERMSIG(status), SIG_DFL);
		raise(WTERMSIG(status));
	}
	return WEXITSTATUS(status);
}
