/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every workload shares: an output file of lines, a way to fail, a clock.
 *
 * A workload is started as "prog OUTFILE ARG...". It appends whole lines to OUTFILE:
 *
 *	ready pid=N		its state stands
 *	tick N ...		it is alive, and its state was right until now
 *	FAIL pid=N text		its state was wrong; it exits with 1
 *	ok			it was asked to stop (SIGTERM) and its state was right to the end
 *
 * No workload knows that it may be moved.
 */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *wl_path;
static int wl_out = -1;
static volatile sig_atomic_t wl_stopping;

static inline int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

/* One write(2) to a file opened with O_APPEND: lines of several processes never mix. */
__attribute__((format(printf, 1, 2))) static inline void wl_line(const char *fmt, ...)
{
	char line[1024];
	va_list ap;
	int n;

	va_start(ap, fmt);
	n = vsnprintf(line, sizeof(line) - 1, fmt, ap);
	va_end(ap);
	if (n > (int)sizeof(line) - 2)
		n = sizeof(line) - 2;
	line[n++] = '\n';
	if (write(wl_out, line, n) != n)
		_exit(2);
}

#define wl_fail(fmt, ...)                                                                    \
	do {                                                                                 \
		wl_line("FAIL pid=%d %s:%d: " fmt, getpid(), __FILE__, __LINE__,             \
			##__VA_ARGS__);                                                      \
		fprintf(stderr, "%s:%d: " fmt "\n", __FILE__, __LINE__, ##__VA_ARGS__);      \
		_exit(1);                                                                    \
	} while (0)

#define CHECK(cond, fmt, ...)                                                                \
	do {                                                                                 \
		if (!(cond))                                                                 \
			wl_fail("%s: " fmt, #cond, ##__VA_ARGS__);                           \
	} while (0)

/* A call that must not fail, with the errno of the one that did. */
#define TRY(call)                                                                            \
	({                                                                                   \
		__auto_type _ret = (call);                                                   \
		if (_ret == (__typeof__(_ret))-1)                                            \
			wl_fail("%s: %s", #call, strerror(errno));                           \
		_ret;                                                                        \
	})

static void wl_on_term(int sig)
{
	(void)sig;
	wl_stopping = 1;
}

static inline void wl_start(int argc, char **argv)
{
	struct sigaction sa = { .sa_handler = wl_on_term };

	if (argc < 2) {
		fprintf(stderr, "usage: %s OUTFILE [ARG...]\n", argv[0]);
		exit(2);
	}
	wl_path = argv[1];
	wl_out = open(wl_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (wl_out < 0) {
		perror(wl_path);
		exit(2);
	}
	sigaction(SIGTERM, &sa, NULL);
}

static inline void wl_ready(void)
{
	wl_line("ready pid=%d", getpid());
}

static inline void wl_ok(void)
{
	wl_line("ok");
	_exit(0);
}

/* Sleeps the whole time whatever signals come, except when asked to stop. */
static inline void wl_sleep_us(long us)
{
	struct timespec ts = { us / 1000000, us % 1000000 * 1000 };

	while (nanosleep(&ts, &ts) < 0 && errno == EINTR && !wl_stopping)
		;
}

static inline long wl_arg(int argc, char **argv, int i, long otherwise)
{
	return argc > i ? strtol(argv[i], NULL, 0) : otherwise;
}

/* "OUTFILE.suffix": where a workload keeps the files that are part of its state. */
static inline const char *wl_beside(const char *suffix)
{
	char *path;

	if (asprintf(&path, "%s.%s", wl_path, suffix) < 0)
		exit(2);
	return path;
}

static inline uint64_t wl_mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ULL;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

#endif
