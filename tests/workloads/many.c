// SPDX-License-Identifier: Apache-2.0
/*
 * many OUTFILE KIND N: much of one kind of state, and little of anything else.
 *
 * KIND: threads, processes, files, pipes, connections (over loopback, both ends of each held) or mappings (of one
 * page each, none that merges with its neighbours). A part of it is looked at in every turn. Each time in which the program did not run for 2 ms or more is told as "gap FROM TO", in
 * ns of CLOCK_MONOTONIC.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "workload.h"

#define PART 16	  /* pieces that are looked at in one turn */
#define WAIT 1500 /* bytes that wait in each pipe and connection */

static long n;
static int *fds; /* files: one each; pipes, connections: two each */
static unsigned char pattern[WAIT];

static void *sleeper(void *arg)
{
	pthread_mutex_t *lock = arg;

	pthread_mutex_lock(lock); /* held by the main thread for good */
	return NULL;
}

static void threads_build(void)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	pthread_attr_t attr;
	pthread_t thread;

	pthread_mutex_lock(&lock);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 65536);
	for (long i = 0; i < n; i++)
		CHECK(pthread_create(&thread, &attr, sleeper, &lock) == 0, "thread %ld", i);
}

static void processes_build(void)
{
	int start[2];
	char byte;

	fds = calloc(n, sizeof(*fds)); /* pids */
	TRY(pipe2(start, O_CLOEXEC));
	for (long i = 0; i < n; i++) {
		fds[i] = TRY(fork());
		if (fds[i])
			continue;
		signal(SIGTERM, SIG_DFL);
		close(start[1]);
		while (read(start[0], &byte, 1) < 0 && errno == EINTR)
			; /* until the parent ends */
		_exit(0);
	}
}

static void files_build(void)
{
	TRY(mkdir(wl_beside("d"), 0700));
	for (long i = 0; i < n; i++) {
		char name[64];

		snprintf(name, sizeof(name), "d/%ld", i);
		fds[i] = TRY(open(wl_beside(name), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
		CHECK(write(fds[i], pattern, 1 + i % WAIT) == 1 + i % WAIT, "file %ld", i);
	}
}

static void pipes_build(void)
{
	for (long i = 0; i < n; i++) {
		TRY(pipe2(fds + 2 * i, O_CLOEXEC));
		CHECK(write(fds[2 * i + 1], pattern, WAIT) == WAIT, "pipe %ld", i);
	}
}

static void connections_build(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t size = sizeof(address);
	int listener = TRY(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));

	TRY(bind(listener, (void *)&address, size));
	TRY(listen(listener, 16));
	TRY(getsockname(listener, (void *)&address, &size));
	for (long i = 0; i < n; i++) {
		fds[2 * i + 1] = TRY(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
		TRY(connect(fds[2 * i + 1], (void *)&address, size));
		fds[2 * i] = TRY(accept4(listener, NULL, NULL, SOCK_CLOEXEC));
		CHECK(write(fds[2 * i + 1], pattern, WAIT) == WAIT, "connection %ld", i);
	}
}

static long *pages; /* mappings: 4096 bytes each, every second one can only be read */

static void mappings_build(void)
{
	pages = mmap(NULL, n * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK((void *)pages != MAP_FAILED, "%s", strerror(errno));
	for (long i = 0; i < n; i++) {
		pages[512 * i] = i + 1;
		if (i % 2)
			TRY(mprotect(pages + 512 * i, 4096, PROT_READ));
	}
}

static void one_check(const char *kind, long i)
{
	unsigned char seen[WAIT];
	struct stat status;

	switch (kind[0] + kind[1]) {
	case 'p' + 'r':
		TRY(kill(fds[i], 0));
		CHECK(waitpid(fds[i], NULL, WNOHANG) == 0, "process %ld has ended", i);
		break;
	case 'm' + 'a':
		CHECK(pages[512 * i] == i + 1, "mapping %ld", i);
		if (!(i % 2))
			pages[512 * i + 1]++;
		break;
	case 'f' + 'i':
		TRY(fstat(fds[i], &status));
		CHECK(status.st_size == 1 + i % WAIT && lseek(fds[i], 0, SEEK_CUR) == status.st_size, "file %ld", i);
		break;
	case 'p' + 'i':
	case 'c' + 'o': /* what waits is taken out and put in again */
		CHECK(read(fds[2 * i], seen, WAIT) == WAIT && !memcmp(seen, pattern, WAIT), "%s %ld: other data", kind, i);
		CHECK(write(fds[2 * i + 1], pattern, WAIT) == WAIT, "%s %ld", kind, i);
		break;
	}
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*build)(void);
	} kinds[] = { { "threads", threads_build },
		      { "processes", processes_build },
		      { "files", files_build },
		      { "pipes", pipes_build },
		      { "connections", connections_build },
		      { "mappings", mappings_build } };
	struct rlimit files;
	const char *kind = argc > 2 ? argv[2] : "threads";
	int64_t last, last_tick = 0;
	unsigned long ticks = 0;
	int built = 0;

	wl_start(argc, argv);
	n = wl_arg(argc, argv, 3, 20);
	TRY(getrlimit(RLIMIT_NOFILE, &files));
	files.rlim_cur = files.rlim_max;
	TRY(setrlimit(RLIMIT_NOFILE, &files));
	for (int i = 0; i < WAIT; i++)
		pattern[i] = wl_mix(i);
	fds = calloc(2 * n, sizeof(*fds));
	for (size_t k = 0; k < sizeof(kinds) / sizeof(kinds[0]); k++)
		if (!strcmp(kinds[k].name, kind)) {
			kinds[k].build();
			built = 1;
		}
	CHECK(built, "unknown kind %s", kind);
	wl_ready();
	last = now_ns();
	for (unsigned long at = 0; !wl_stopping; at += PART) {
		int64_t now;

		for (int i = 0; i < PART && i < n; i++)
			one_check(kind, (at + i) % n);
		wl_sleep_us(500);
		now = now_ns();
		if (now - last >= 2000000)
			wl_line("gap %ld %ld", (long)last, (long)now);
		last = now;
		if (now - last_tick > 100000000) {
			wl_line("tick %lu", ++ticks);
			last_tick = now;
		}
	}
	if (built && kind[1] == 'r')
		for (long i = 0; i < n; i++)
			kill(fds[i], SIGTERM);
	wl_ok();
}
