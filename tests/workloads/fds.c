// SPDX-License-Identifier: Apache-2.0
/*
 * fds OUTFILE [KIND,KIND...]: open files of every kind, with data in flight.
 *
 * Every kind has a way to build it and a check that runs each turn. Between two turns each channel
 * holds data: a check takes out what the last turn left and puts in the next. Without a list, all
 * kinds are built.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "workload.h"

#define IN_FLIGHT 3000

struct kind {
	const char *name;
	void (*build)(struct kind *k);
	void (*check)(struct kind *k, unsigned long turn);
	int fd[4], flags[4]; /* flags as F_GETFL and F_GETFD gave them */
	unsigned long last; /* the turn before this one */
	uint64_t memory;
};

static void pattern(unsigned char *to, size_t n, unsigned long seed)
{
	for (size_t i = 0; i < n; i++)
		to[i] = wl_mix(seed * 65536 + i);
}

static void put(struct kind *k, int fd, unsigned long turn, size_t n)
{
	unsigned char data[IN_FLIGHT];
	ssize_t done;

	pattern(data, n, turn);
	done = write(fd, data, n);
	CHECK(done == (ssize_t)n, "%s: wrote %zd of %zu: %s", k->name, done, n, strerror(errno));
}

static void take(struct kind *k, int fd, unsigned long turn, size_t n)
{
	unsigned char data[IN_FLIGHT], wanted[IN_FLIGHT];
	size_t done = 0;

	pattern(wanted, n, turn);
	while (done < n) {
		ssize_t more = read(fd, data + done, n - done);

		if (more < 0 && errno == EINTR)
			continue;
		CHECK(more > 0, "%s: read %zu of %zu: %s", k->name, done, n, more ? strerror(errno) : "end");
		done += more;
	}
	CHECK(!memcmp(data, wanted, n), "%s: other bytes than those of turn %lu", k->name, turn);
}

/* A file without a name has another number in a copy, which may begin between two looks. */
static void same_inode(struct kind *k, int a, int b)
{
	struct stat x, y;
	int looks = 0;

	do {
		TRY(fstat(a, &x));
		TRY(fstat(b, &y));
	} while ((x.st_ino != y.st_ino || x.st_dev != y.st_dev) && ++looks < 3);
	CHECK(x.st_ino == y.st_ino && x.st_dev == y.st_dev, "%s: two inodes", k->name);
}

/* ---- regular files ---- */

static void file_build(struct kind *k)
{
	k->fd[0] = TRY(open(wl_beside("file"), O_RDWR | O_CREAT | O_TRUNC, 0640));
	k->fd[1] = TRY(open(wl_beside("file"), O_RDONLY | O_CLOEXEC | O_NOATIME));
}

/* One description writes on, another follows at a distance of one record. */
static void file_check(struct kind *k, unsigned long turn)
{
	CHECK(lseek(k->fd[0], 0, SEEK_CUR) == (off_t)(turn * 100), "offset %ld", (long)lseek(k->fd[0], 0, SEEK_CUR));
	put(k, k->fd[0], turn, 100);
	if (turn)
		take(k, k->fd[1], k->last, 100);
	same_inode(k, k->fd[0], k->fd[1]);
}

static void shared_build(struct kind *k)
{
	int request[2], reply[2];
	char byte;

	k->fd[0] = TRY(open(wl_beside("offset"), O_RDWR | O_CREAT | O_TRUNC, 0600));
	k->fd[1] = TRY(dup(k->fd[0]));
	TRY(pipe2(request, O_CLOEXEC));
	TRY(pipe2(reply, O_CLOEXEC));
	k->memory = TRY(fork());
	if (!k->memory) { /* moves the shared offset on each byte it is sent */
		signal(SIGTERM, SIG_IGN);
		close(request[1]);
		close(reply[0]);
		for (;;) {
			ssize_t n = read(request[0], &byte, 1);

			if (n < 0 && errno == EINTR)
				continue;
			if (n <= 0)
				_exit(0);
			TRY(lseek(k->fd[0], 7, SEEK_CUR));
			TRY(write(reply[1], &byte, 1));
		}
	}
	close(request[0]);
	close(reply[1]);
	k->fd[2] = request[1];
	k->fd[3] = reply[0];
}

static void shared_check(struct kind *k, unsigned long turn)
{
	off_t before = lseek(k->fd[0], 0, SEEK_CUR);
	char byte = turn;
	ssize_t n;

	TRY(write(k->fd[2], &byte, 1));
	do
		n = read(k->fd[3], &byte, 1);
	while (n < 0 && errno == EINTR);
	CHECK(n == 1 && byte == (char)turn, "the child did not answer");
	CHECK(lseek(k->fd[1], 0, SEEK_CUR) == before + 7, "duplicates have offsets of their own");
	CHECK(before == (off_t)turn * 7, "offset %ld at turn %lu", (long)before, turn);
}

static void append_build(struct kind *k)
{
	k->fd[0] = TRY(open(wl_beside("append"), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600));
}

static void append_check(struct kind *k, unsigned long turn)
{
	struct stat st;

	TRY(lseek(k->fd[0], 0, SEEK_SET));
	put(k, k->fd[0], turn, 10);
	TRY(fstat(k->fd[0], &st));
	CHECK(st.st_size == (off_t)(turn + 1) * 10, "size %ld at turn %lu", (long)st.st_size, turn);
}

static void deleted_build(struct kind *k)
{
	k->fd[0] = TRY(open(wl_beside("deleted"), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
	k->fd[1] = TRY(open(wl_beside("deleted"), O_RDONLY | O_CLOEXEC));
	TRY(unlink(wl_beside("deleted")));
	TRY(ftruncate(k->fd[0], 100000));
}

static void deleted_check(struct kind *k, unsigned long turn)
{
	struct stat st;

	if (turn) {
		TRY(lseek(k->fd[1], 50000, SEEK_SET));
		take(k, k->fd[1], k->last, IN_FLIGHT);
	}
	TRY(lseek(k->fd[0], 50000, SEEK_SET));
	put(k, k->fd[0], turn, IN_FLIGHT);
	same_inode(k, k->fd[0], k->fd[1]);
	TRY(fstat(k->fd[0], &st));
	CHECK(st.st_size == 100000 && st.st_nlink == 0, "size %ld links %lu", (long)st.st_size, (long)st.st_nlink);
}

static void memfd_build(struct kind *k)
{
	k->fd[0] = TRY(memfd_create("workload", MFD_CLOEXEC | MFD_ALLOW_SEALING));
	TRY(ftruncate(k->fd[0], 8192));
	TRY(fcntl(k->fd[0], F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW));
	k->memory = (uintptr_t)mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, k->fd[0], 0);
	CHECK((void *)k->memory != MAP_FAILED, "%s", strerror(errno));
}

static void memfd_check(struct kind *k, unsigned long turn)
{
	if (turn) {
		TRY(lseek(k->fd[0], 0, SEEK_SET));
		take(k, k->fd[0], k->last, IN_FLIGHT);
	}
	pattern((unsigned char *)k->memory, IN_FLIGHT, turn);
	CHECK(fcntl(k->fd[0], F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW), "seals");
}

static void directory_build(struct kind *k)
{
	if (mkdir(wl_beside("dir"), 0700) < 0)
		CHECK(errno == EEXIST, "%s", strerror(errno));
	k->fd[0] = TRY(open(wl_beside("dir"), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
}

static void directory_check(struct kind *k, unsigned long turn)
{
	(void)turn;
	int fd = TRY(openat(k->fd[0], "inside", O_RDWR | O_CREAT | O_CLOEXEC, 0600));

	close(fd);
}

/* ---- pipes ---- */

static void pipe_build(struct kind *k)
{
	TRY(pipe2(k->fd, O_NONBLOCK | O_CLOEXEC));
	TRY(fcntl(k->fd[1], F_SETPIPE_SZ, 131072));
}

static void pipe_check(struct kind *k, unsigned long turn)
{
	if (turn)
		take(k, k->fd[0], k->last, IN_FLIGHT);
	put(k, k->fd[1], turn, IN_FLIGHT);
	CHECK(fcntl(k->fd[0], F_GETPIPE_SZ) == 131072, "size %d", fcntl(k->fd[0], F_GETPIPE_SZ));
}

static void fifo_build(struct kind *k)
{
	if (mkfifo(wl_beside("fifo"), 0600) < 0)
		CHECK(errno == EEXIST, "%s", strerror(errno));
	k->fd[0] = TRY(open(wl_beside("fifo"), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
	k->fd[1] = TRY(open(wl_beside("fifo"), O_WRONLY | O_CLOEXEC));
	TRY(fcntl(k->fd[0], F_SETFL, 0));
}

static void fifo_check(struct kind *k, unsigned long turn)
{
	if (turn)
		take(k, k->fd[0], k->last, IN_FLIGHT);
	put(k, k->fd[1], turn, IN_FLIGHT);
}

/* ---- anonymous inodes ---- */

static void eventfd_build(struct kind *k)
{
	k->fd[0] = TRY(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
	k->fd[1] = TRY(eventfd(3, EFD_SEMAPHORE));
}

static void eventfd_check(struct kind *k, unsigned long turn)
{
	uint64_t value;

	if (turn) {
		CHECK(read(k->fd[0], &value, 8) == 8 && value == k->last + 1, "counter");
		CHECK(read(k->fd[1], &value, 8) == 8 && value == 1, "semaphore");
		value = 1;
		TRY(write(k->fd[1], &value, 8));
	}
	value = turn + 1;
	TRY(write(k->fd[0], &value, 8));
}

static void epoll_build(struct kind *k)
{
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = 0x123456789abcdef0 };

	k->fd[0] = TRY(epoll_create1(EPOLL_CLOEXEC));
	TRY(pipe2(k->fd + 1, O_CLOEXEC | O_NONBLOCK));
	TRY(epoll_ctl(k->fd[0], EPOLL_CTL_ADD, k->fd[1], &event));
	event = (struct epoll_event){ .events = EPOLLOUT | EPOLLET | EPOLLONESHOT, .data.u64 = 77 };
	TRY(epoll_ctl(k->fd[0], EPOLL_CTL_ADD, k->fd[2], &event));
	CHECK(epoll_wait(k->fd[0], &event, 1, 0) == 1 && event.data.u64 == 77, "one shot");
}

/* The reading end becomes ready every other turn; the one shot is spent and must stay so. */
static void epoll_check(struct kind *k, unsigned long turn)
{
	struct epoll_event event[2];
	int n = epoll_wait(k->fd[0], event, 2, 0);

	if (turn % 2) {
		CHECK(n == 1 && event[0].data.u64 == 0x123456789abcdef0 && event[0].events == EPOLLIN,
		      "%d events, data %lx", n, (long)event[0].data.u64);
		take(k, k->fd[1], k->last, 20);
	} else {
		CHECK(n == 0, "%d events, data %lx events %x", n, (long)event[0].data.u64, event[0].events);
		put(k, k->fd[2], turn, 20);
	}
}

static void timerfd_build(struct kind *k)
{
	struct itimerspec often = { { 0, 5000000 }, { 0, 5000000 } }, late = { { 0, 0 }, { 7200, 0 } };

	k->fd[0] = TRY(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
	k->fd[1] = TRY(timerfd_create(CLOCK_REALTIME, TFD_CLOEXEC));
	TRY(timerfd_settime(k->fd[0], 0, &often, NULL));
	TRY(timerfd_settime(k->fd[1], 0, &late, NULL));
}

static void timerfd_check(struct kind *k, unsigned long turn)
{
	struct itimerspec left;
	uint64_t expired = 0;

	if (read(k->fd[0], &expired, 8) < 0)
		CHECK(errno == EAGAIN, "%s", strerror(errno));
	k->memory += expired;
	CHECK(turn < 4 || k->memory > 0, "the timer is silent");
	TRY(timerfd_gettime(k->fd[0], &left));
	CHECK(left.it_interval.tv_nsec == 5000000, "interval %ld", left.it_interval.tv_nsec);
	TRY(timerfd_gettime(k->fd[1], &left));
	CHECK(left.it_value.tv_sec > 0 && left.it_value.tv_sec < 7200, "%ld s left", left.it_value.tv_sec);
}

static void signalfd_build(struct kind *k)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 5);
	TRY(sigprocmask(SIG_BLOCK, &set, NULL));
	k->fd[0] = TRY(signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC));
}

static void signalfd_check(struct kind *k, unsigned long turn)
{
	struct signalfd_siginfo info;

	if (turn)
		CHECK(read(k->fd[0], &info, sizeof(info)) == sizeof(info) && info.ssi_int == (int)k->last &&
			      info.ssi_signo == (unsigned)SIGRTMIN + 5,
		      "%s", strerror(errno));
	TRY(sigqueue(getpid(), SIGRTMIN + 5, (union sigval){ .sival_int = turn }));
}

static void devices_build(struct kind *k)
{
	k->fd[0] = TRY(open("/dev/null", O_RDWR));
	k->fd[1] = TRY(open("/dev/zero", O_RDONLY | O_CLOEXEC));
	k->fd[2] = TRY(open("/dev/urandom", O_RDONLY | O_CLOEXEC));
	k->fd[3] = TRY(open("/dev/full", O_WRONLY | O_CLOEXEC));
}

static void devices_check(struct kind *k, unsigned long turn)
{
	uint64_t word = ~0ULL, other = 0;

	(void)turn;
	CHECK(write(k->fd[0], &word, 8) == 8 && read(k->fd[0], &word, 8) == 0, "/dev/null");
	CHECK(read(k->fd[1], &word, 8) == 8 && word == 0, "/dev/zero");
	CHECK(read(k->fd[2], &other, 8) == 8 && other != 0, "/dev/urandom");
	CHECK(write(k->fd[3], &word, 8) < 0 && errno == ENOSPC, "/dev/full");
}

/* ---- unix sockets ---- */

static void unixpair_build(struct kind *k)
{
	TRY(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, k->fd));
}

static void unixpair_check(struct kind *k, unsigned long turn)
{
	if (turn) {
		take(k, k->fd[0], k->last, IN_FLIGHT);
		take(k, k->fd[1], k->last + 1, 500);
	}
	put(k, k->fd[1], turn, IN_FLIGHT);
	put(k, k->fd[0], turn + 1, 500);
}

static void unixdgram_build(struct kind *k)
{
	TRY(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, k->fd));
	TRY(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, k->fd + 2));
}

/* Five messages of different sizes: the borders between them are part of the state. */
static void unixdgram_check(struct kind *k, unsigned long turn)
{
	unsigned char data[IN_FLIGHT];

	for (int pair = 0; pair < 4; pair += 2) {
		for (int i = 1; turn && i <= 5; i++) {
			ssize_t n = recv(k->fd[pair], data, sizeof(data), MSG_PEEK);

			CHECK(n == i * 100, "message %d has %zd bytes: %s", i, n, strerror(errno));
			take(k, k->fd[pair], k->last + i, i * 100);
		}
		for (int i = 1; i <= 5; i++)
			put(k, k->fd[pair + 1], turn + i, i * 100);
	}
}

static struct sockaddr_un unix_address(const char *suffix)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	CHECK(strlen(wl_beside(suffix)) < sizeof(address.sun_path), "%s is too long", wl_beside(suffix));
	strcpy(address.sun_path, wl_beside(suffix));
	return address;
}

static void unixlisten_build(struct kind *k)
{
	struct sockaddr_un address = unix_address("socket");

	unlink(address.sun_path);
	k->fd[0] = TRY(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	TRY(bind(k->fd[0], (struct sockaddr *)&address, sizeof(address)));
	TRY(listen(k->fd[0], 5));
	k->fd[1] = TRY(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	TRY(connect(k->fd[1], (struct sockaddr *)&address, sizeof(address)));
	k->fd[2] = TRY(accept4(k->fd[0], NULL, NULL, SOCK_CLOEXEC));
}

static void unixlisten_check(struct kind *k, unsigned long turn)
{
	struct sockaddr_un address = unix_address("socket"), name = { 0 };
	socklen_t length = sizeof(name);
	int client, server;

	if (turn)
		take(k, k->fd[2], k->last, 200);
	put(k, k->fd[1], turn, 200);
	TRY(getpeername(k->fd[1], (struct sockaddr *)&name, &length));
	CHECK(!strcmp(name.sun_path, address.sun_path), "peer is %.100s", name.sun_path);
	client = TRY(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
	TRY(connect(client, (struct sockaddr *)&address, sizeof(address)));
	server = TRY(accept4(k->fd[0], NULL, NULL, SOCK_CLOEXEC));
	put(k, client, turn, 10);
	take(k, server, turn, 10);
	close(client);
	close(server);
}

/* ---- internet sockets, all within this process over loopback ---- */

static struct sockaddr_in loopback(int port)
{
	return (struct sockaddr_in){ AF_INET, htons(port), { htonl(INADDR_LOOPBACK) }, { 0 } };
}

static int local_port(int fd)
{
	struct sockaddr_in address;
	socklen_t length = sizeof(address);

	TRY(getsockname(fd, (struct sockaddr *)&address, &length));
	return ntohs(address.sin_port);
}

static void tcplisten_build(struct kind *k)
{
	struct sockaddr_in address = loopback(0);
	int one = 1;

	k->fd[0] = TRY(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	TRY(setsockopt(k->fd[0], SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)));
	TRY(bind(k->fd[0], (struct sockaddr *)&address, sizeof(address)));
	TRY(listen(k->fd[0], 5));
	k->memory = local_port(k->fd[0]);
}

static void tcplisten_check(struct kind *k, unsigned long turn)
{
	struct sockaddr_in address = loopback(k->memory);
	struct linger linger = { 1, 0 }; /* closed by a reset: leaves no TIME_WAIT behind */
	int client, server;

	CHECK(local_port(k->fd[0]) == (int)k->memory, "port %d", local_port(k->fd[0]));
	if (turn % 10)
		return;
	client = TRY(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	TRY(connect(client, (struct sockaddr *)&address, sizeof(address)));
	server = TRY(accept4(k->fd[0], NULL, NULL, SOCK_CLOEXEC));
	put(k, client, turn, 10);
	take(k, server, turn, 10);
	TRY(setsockopt(client, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)));
	close(client);
	close(server);
}

static void tcp_build(struct kind *k)
{
	int one = 1, size = 65536;

	tcplisten_build(k);
	struct sockaddr_in address = loopback(k->memory);

	k->fd[1] = TRY(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	TRY(setsockopt(k->fd[1], SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one)));
	TRY(setsockopt(k->fd[1], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)));
	TRY(setsockopt(k->fd[1], IPPROTO_TCP, 1 /* TCP_NODELAY */, &one, sizeof(one)));
	TRY(connect(k->fd[1], (struct sockaddr *)&address, sizeof(address)));
	k->fd[2] = TRY(accept4(k->fd[0], NULL, NULL, SOCK_CLOEXEC));
}

static void tcp_check(struct kind *k, unsigned long turn)
{
	int on = 0;
	socklen_t length = sizeof(on);

	if (turn) {
		take(k, k->fd[1], k->last, IN_FLIGHT);
		take(k, k->fd[2], k->last + 1, IN_FLIGHT);
	}
	put(k, k->fd[2], turn, IN_FLIGHT);
	put(k, k->fd[1], turn + 1, IN_FLIGHT);
	TRY(getsockopt(k->fd[1], SOL_SOCKET, SO_KEEPALIVE, &on, &length));
	CHECK(on == 1, "SO_KEEPALIVE was lost");
	on = 0;
	TRY(getsockopt(k->fd[1], IPPROTO_TCP, 1, &on, &length));
	CHECK(on == 1, "TCP_NODELAY was lost");
}

static void udp_build(struct kind *k)
{
	struct sockaddr_in address = loopback(0);

	for (int i = 0; i < 2; i++) {
		k->fd[i] = TRY(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
		TRY(bind(k->fd[i], (struct sockaddr *)&address, sizeof(address)));
	}
	address = loopback(local_port(k->fd[1]));
	TRY(connect(k->fd[0], (struct sockaddr *)&address, sizeof(address)));
	k->memory = local_port(k->fd[0]);
}

static void udp_check(struct kind *k, unsigned long turn)
{
	struct sockaddr_in from = { 0 };
	socklen_t length = sizeof(from);
	unsigned char byte = turn, got;

	TRY(send(k->fd[0], &byte, 1, 0));
	CHECK(recvfrom(k->fd[1], &got, 1, 0, (struct sockaddr *)&from, &length) == 1 && got == byte, "%s",
	      strerror(errno));
	CHECK(ntohs(from.sin_port) == k->memory, "from port %d, not %d", ntohs(from.sin_port), (int)k->memory);
}

#define KIND(name) { #name, name##_build, name##_check, { -1, -1, -1, -1 }, { 0 }, 0, 0 }

static struct kind kinds[] = {
	KIND(file),     KIND(shared),   KIND(append),    KIND(deleted),    KIND(memfd),     KIND(directory),
	KIND(pipe),     KIND(fifo),     KIND(eventfd),   KIND(epoll),      KIND(timerfd),   KIND(signalfd),
	KIND(devices),  KIND(unixpair), KIND(unixdgram), KIND(unixlisten), KIND(tcplisten), KIND(tcp),
	KIND(udp),
};

#define KINDS (sizeof(kinds) / sizeof(kinds[0]))

static int flags_of(int fd)
{
	return fcntl(fd, F_GETFL) << 1 | fcntl(fd, F_GETFD);
}

int main(int argc, char **argv)
{
	char wanted[1024];
	unsigned built = 0;

	wl_start(argc, argv);
	snprintf(wanted, sizeof(wanted), ",%s,", argc > 2 ? argv[2] : "");
	for (struct kind *k = kinds; k < kinds + KINDS; k++) {
		char word[64];

		snprintf(word, sizeof(word), ",%s,", k->name);
		if (argc > 2 && !strstr(wanted, word)) {
			k->build = NULL;
			continue;
		}
		k->build(k);
		built++;
		for (int i = 0; i < 4; i++)
			if (k->fd[i] >= 0)
				k->flags[i] = flags_of(k->fd[i]);
	}
	CHECK(built, "no kind in %s", wanted);
	wl_ready();
	for (unsigned long turn = 0; !wl_stopping; turn++) {
		for (struct kind *k = kinds; k < kinds + KINDS; k++) {
			if (!k->build)
				continue;
			k->check(k, turn);
			k->last = turn;
			for (int i = 0; i < 4; i++)
				if (k->fd[i] >= 0)
					CHECK(flags_of(k->fd[i]) == k->flags[i], "%s: fd %d flags %x, were %x",
					      k->name, k->fd[i], flags_of(k->fd[i]), k->flags[i]);
		}
		if (turn % 10 == 0)
			wl_line("tick %lu kinds %u", turn / 10 + 1, built);
		wl_sleep_us(10000);
	}
	wl_ok();
}
