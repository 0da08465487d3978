// SPDX-License-Identifier: GPL-2.0
/*
 * ckptfuzz SECONDS SEED IMAGE...: gives restart() images in which something is a lie.
 *
 * Each image is changed in one to four places: words of a record, or records left out, doubled, exchanged, cut, or
 * taken from another image. A child of its own becomes it, as nobody every other time, and is killed soon after. What
 * is looked for is not here but in the kernel's log: a splat of KASAN, lockdep or a WARN. The line "ckptfuzz: N" in
 * the log says which one it was: SEED and N make it again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

#include "checkpoint.h"

#define MAX_IMAGES 64
#define MAX_RECORDS 65536
#define TREE 102
#define PAGES 403
#define NOBODY 65534

struct image {
	const char *name;
	unsigned char *data;
	size_t len;
	size_t nr;
	uint32_t *at;	/* offset of each record */
	pid_t pid;	/* of its root */
};

static struct image images[MAX_IMAGES];
static int nr_images;
static uint64_t state;

static uint64_t chance(uint64_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (state * 0x2545f4914f6cdd1dULL >> 16) % below;
}

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static uint32_t word(const unsigned char *p)
{
	uint32_t value;

	memcpy(&value, p, sizeof(value));
	return value;
}

static void load(struct image *image, const char *name)
{
	struct stat st;
	size_t at;
	int fd;

	fd = open(name, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st) < 0)
		die(name);
	image->name = name;
	image->len = st.st_size;
	image->data = malloc(image->len + 1);
	image->at = calloc(MAX_RECORDS, sizeof(*image->at));
	if (!image->data || !image->at || read(fd, image->data, image->len) != (ssize_t)image->len)
		die(name);
	close(fd);
	for (at = 0; at + 8 <= image->len && image->nr < MAX_RECORDS; at += word(image->data + at + 4)) {
		if (word(image->data + at + 4) < 8)
			break;
		/* generation, number of tasks, and then the first one, which begins with its pid */
		if (!image->pid && word(image->data + at) == TREE && at + 20 <= image->len)
			image->pid = word(image->data + at + 16);
		image->at[image->nr++] = at;
	}
	if (!image->nr) {
		fprintf(stderr, "ckptfuzz: %s is not an image\n", name);
		exit(2);
	}
}

static uint32_t lie(uint32_t truth)
{
	static const uint32_t odd[] = { 0, 1, 0x7fffffff, 0x80000000, 0xffffffff, 0xfffff000, 4095, 4097, 8 };

	switch (chance(5)) {
	case 0:
		return odd[chance(sizeof(odd) / sizeof(*odd))];
	case 1:
		return truth + 1 - 2 * chance(2);
	case 2:
		return truth ^ 1u << chance(32);
	case 3:
		return chance(64);
	default:
		return chance(1ULL << 32);
	}
}

/* Changes one place of the image in @out, which has room for twice its length; returns the new length. */
static size_t mutate(const struct image *image, unsigned char *out, size_t len)
{
	const struct image *other = &images[chance(nr_images)];
	size_t which = chance(image->nr), at = image->at[which], size, from;

	if (at + 8 > len)
		return len;
	size = word(out + at + 4);
	if (size < 8 || at + size > len)
		return len;
	switch (chance(12)) {
	case 0:		/* left out */
		memmove(out + at, out + at + size, len - at - size);
		return len - size;
	case 1:		/* cut */
		return at + chance(size);
	case 2:		/* doubled */
		if (len + size > image->len * 2)
			return len;
		memmove(out + at + size, out + at, len - at);
		return len + size;
	case 3:		/* taken from another */
		from = other->at[chance(other->nr)];
		size = word(other->data + from + 4);
		if (from + size > other->len || len + size > image->len * 2)
			return len;
		memmove(out + at + size, out + at, len - at);
		memcpy(out + at, other->data + from, size);
		return len + size;
	case 4: {	/* its own head */
		uint32_t value;

		at += 4 * chance(2);
		value = lie(word(out + at));
		memcpy(out + at, &value, sizeof(value));
		return len;
	}
	default: {	/* a word of it; of pages only what says where they go */
		uint32_t value;

		if (word(out + at) == PAGES && size > 64)
			size = 64;
		if (size < 12)
			return len;
		at += 8 + chance((size - 8) / 4) * 4;
		value = lie(word(out + at));
		memcpy(out + at, &value, sizeof(value));
		return len;
	}
	}
}

static void nothing(int sig)
{
	(void)sig;
}

/* fork(), with a pid that is wanted if it is free. */
static pid_t fork_as(pid_t pid)
{
	struct clone_args args = {
		.exit_signal = SIGCHLD,
		.set_tid = (uintptr_t)&pid,
		.set_tid_size = pid > 0,
	};
	long child = syscall(SYS_clone3, &args, sizeof(args));

	return child < 0 ? fork() : child;
}

/* The errno that restart() gave, 0 if what was restarted runs until it is killed, -1 if it died before. */
static int try(const unsigned char *data, size_t len, pid_t pid, int unprivileged)
{
	struct pollfd poll_fd;
	size_t done = 0;
	int fds[2], status;
	pid_t child;
	ssize_t n;
	int idle = 0;

	if (pipe2(fds, O_CLOEXEC) < 0)
		die("pipe2");
	child = fork_as(pid);
	if (child < 0)
		die("fork");
	if (!child) {
		signal(SIGPIPE, SIG_DFL);
		close(fds[1]);
		alarm(5);
		if (unprivileged && (setgid(NOBODY) || setuid(NOBODY)))
			_exit(255);
		restart(getpid(), fds[0], 0);
		_exit(errno);
	}
	close(fds[0]);
	fcntl(fds[1], F_SETFL, O_NONBLOCK);
	poll_fd = (struct pollfd){ .fd = fds[1], .events = POLLOUT };
	while (done < len) {
		n = write(fds[1], data + done, len - done);
		if (n > 0) {
			done += n;
			idle = 0;
		} else if (errno != EAGAIN || idle++ == 20) {
			break;
		} else {
			poll(&poll_fd, 1, 50);
		}
	}
	close(fds[1]);
	for (idle = 0; idle < 10; idle++) {
		if (waitpid(child, &status, WNOHANG) == child)
			return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
		poll(NULL, 0, 2);
	}
	kill(child, SIGKILL);
	if (waitpid(child, &status, 0) != child)
		die("waitpid");
	return 0;
}

int main(int argc, char **argv)
{
	static long outcome[256], ran, killed, total;
	struct image *image;
	unsigned char *buffer;
	size_t biggest = 0, len;
	uint64_t seed;
	time_t end;
	int log, result, i;

	if (argc < 4 || argc - 3 > MAX_IMAGES) {
		fprintf(stderr, "usage: ckptfuzz SECONDS SEED IMAGE...\n");
		return 2;
	}
	end = time(NULL) + atol(argv[1]);
	seed = strtoull(argv[2], NULL, 0);
	for (i = 3; i < argc; i++) {
		load(&images[nr_images], argv[i]);
		if (images[nr_images].len > biggest)
			biggest = images[nr_images].len;
		nr_images++;
	}
	buffer = malloc(biggest * 2);
	log = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);
	if (!buffer || log < 0)
		die("/dev/kmsg");
	signal(SIGPIPE, SIG_IGN);
	signal(SIGCHLD, nothing);

	for (total = 0; time(NULL) < end; total++) {
		/* Never zero, which this generator would not leave. */
		state = (seed + 1) * 0x9e3779b97f4a7c15ULL + total * 0xbf58476d1ce4e5b9ULL + 1;
		chance(2);
		image = &images[chance(nr_images)];
		len = image->len;
		memcpy(buffer, image->data, len);
		for (i = chance(4); i >= 0; i--)
			len = mutate(image, buffer, len);
		dprintf(log, "<4>ckptfuzz: %ld\n", total);
		result = try(buffer, len, image->pid, total & 1);
		if (result > 0)
			outcome[result & 255]++;
		else if (result == 0)
			ran++;
		else
			killed++;
	}
	printf("ckptfuzz: seed %llu: %ld images, %ld ran, %ld died", (unsigned long long)seed, total, ran, killed);
	for (i = 1; i < 256; i++)
		if (outcome[i])
			printf(", %ld %s", outcome[i], strerrorname_np(i) ? strerrorname_np(i) : "?");
	printf("\n");
	return 0;
}
