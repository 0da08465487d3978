/*
 * openings OUTFILE [SEED [ALL]]: opens, duplicates, changes and closes descriptors of every kind at random, and knows
 * of each what it is.
 *
 * Files that are written to, renamed and removed, memfds, pipes, sockets of unix(7) and TCP, eventfds; with their
 * offsets, flags, owners and what waits in them. Descriptors share what is open or do not; children inherit all for a
 * while. Whatever is not as it was left is a FAIL. ALL 0: without owners of files (F_SETOWN) and connections of TCP,
 * which may have ended.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include "workload.h"

#define FIRST 40 /* number of the first descriptor */
#define SLOTS 48
#define FILES 6
#define MOST 6000 /* bytes that wait in one way */
#define CHANGEABLE (O_NONBLOCK | O_APPEND | O_ASYNC)

enum kind { NONE, NAMED, NAMELESS, READS, WRITES, SOCKET, EVENT };

struct description {
	enum kind kind;
	int refs;
	int flags;
	int is_owned;
	off_t pos;
	ino_t ino;
	off_t *size;          /* of the file */
	struct description *other;   /* end of a pipe or of a pair of sockets; NULL once that is closed */
	uint64_t said, heard; /* bytes that were sent from here, and received */
	int capacity;
	uint64_t count; /* of an eventfd */
};

static struct slot {
	struct description *it;
	int cloexec;
} slots[SLOTS];

static off_t sizes[FILES];
static ino_t inodes[FILES];
static uint64_t state;
static long all;

static unsigned long pick(unsigned long n)
{
	state += 0x9e3779b97f4a7c15ULL;
	return wl_mix(state) % n;
}

static int fd_of(int slot)
{
	return FIRST + slot;
}

static const char *path_of(int file)
{
	static char path[4200];

	snprintf(path, sizeof(path), "%s.%d", wl_path, file);
	return path;
}

static void release(struct description *it)
{
	if (--it->refs)
		return;
	if (it->other)
		it->other->other = NULL;
	if (it->kind == NAMELESS)
		free(it->size);
	free(it);
}

static void close_slot(int slot)
{
	if (!slots[slot].it)
		return;
	TRY(close(fd_of(slot)));
	release(slots[slot].it);
	slots[slot].it = NULL;
}

/* `fd` goes into the slot. */
static void put(int slot, int fd, struct description *it)
{
	int cloexec = pick(2);

	it->refs++;
	close_slot(slot);
	TRY(dup3(fd, fd_of(slot), cloexec ? O_CLOEXEC : 0));
	TRY(close(fd));
	slots[slot] = (struct slot){ it, cloexec };
}

static struct description *made(enum kind kind, int fd)
{
	struct description *it = calloc(1, sizeof(*it));
	struct stat status;

	TRY(fstat(fd, &status));
	it->kind = kind;
	it->ino = status.st_ino;
	it->flags = TRY(fcntl(fd, F_GETFL));
	if (kind == READS || kind == WRITES)
		it->capacity = TRY(fcntl(fd, F_GETPIPE_SZ));
	return it;
}

static void join(int a, int b, int fd_a, int fd_b, enum kind kind_a, enum kind kind_b)
{
	struct description *one = made(kind_a, fd_a), *other = made(kind_b, fd_b);

	one->other = other;
	other->other = one;
	put(a, fd_a, one);
	put(b, fd_b, other);
}

static void connect_both(int a, int b)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int listener = TRY(socket(AF_INET, SOCK_STREAM, 0)), client = TRY(socket(AF_INET, SOCK_STREAM, 0)), server;

	TRY(bind(listener, (struct sockaddr *)&address, length));
	TRY(listen(listener, 1));
	TRY(getsockname(listener, (struct sockaddr *)&address, &length));
	while (connect(client, (struct sockaddr *)&address, length) < 0)
		CHECK(errno == EINTR, "%s", strerror(errno));
	while ((server = accept(listener, NULL, NULL)) < 0)
		CHECK(errno == EINTR, "%s", strerror(errno));
	TRY(close(listener));
	join(a, b, client, server, SOCKET, SOCKET);
}

static void open_some(int slot)
{
	int other = (slot + 1 + pick(SLOTS - 1)) % SLOTS, file = pick(FILES), ends[2], fd;
	int flags = (pick(3) ? 0 : O_APPEND) | (pick(3) ? 0 : O_NONBLOCK);
	struct description *it;

	switch (pick(7)) {
	case 0: case 1:
		fd = TRY(open(path_of(file), O_RDWR | flags));
		it = made(NAMED, fd);
		CHECK(it->ino == inodes[file], "another file");
		it->size = &sizes[file];
		break;
	case 2:
		fd = TRY(open(path_of(FILES), O_RDWR | O_CREAT | O_EXCL | flags, 0600));
		TRY(unlink(path_of(FILES)));
		it = made(NAMELESS, fd);
		it->size = calloc(1, sizeof(off_t));
		break;
	case 3:
		fd = TRY(memfd_create("opening", 0));
		it = made(NAMELESS, fd);
		it->size = calloc(1, sizeof(off_t));
		break;
	case 4:
		fd = TRY(eventfd(0, EFD_NONBLOCK));
		it = made(EVENT, fd);
		break;
	case 5:
		TRY(pipe2(ends, pick(3) ? 0 : O_NONBLOCK));
		join(slot, other, ends[0], ends[1], READS, WRITES);
		return;
	default:
		if (all && pick(2)) {
			connect_both(slot, other);
			return;
		}
		TRY(socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
		join(slot, other, ends[0], ends[1], SOCKET, SOCKET);
		return;
	}
	put(slot, fd, it);
}

static void say(int fd, struct description *it)
{
	char data[3000];
	size_t length = 1 + pick(sizeof(data));

	if (!it->other || it->said - it->other->heard + length > MOST)
		return;
	for (size_t i = 0; i < length; i++)
		data[i] = (char)(it->said + i);
	CHECK(write(fd, data, length) == (ssize_t)length, "%s", strerror(errno));
	it->said += length;
}

static void hear(int fd, struct description *it)
{
	char data[MOST];
	size_t length = it->other ? it->other->said - it->heard : 0, at = 0;

	length = length ? 1 + pick(length) : 0;
	while (at < length) {
		ssize_t got = read(fd, data + at, length - at);

		if (got < 0 && (errno == EINTR || errno == EAGAIN)) /* TCP may still bring it */
			continue;
		CHECK(got > 0, "%s", got ? strerror(errno) : "it has ended");
		at += got;
	}
	for (size_t i = 0; i < length; i++)
		CHECK(data[i] == (char)(it->heard + i), "byte %zu of what came", i);
	it->heard += length;
}

static void use(int slot)
{
	struct description *it = slots[slot].it;
	int fd = fd_of(slot);
	char data[100];
	uint64_t count;

	switch (it->kind) {
	case NAMED: case NAMELESS:
		if (pick(2)) {
			it->pos = pick(5000);
			CHECK(lseek(fd, it->pos, SEEK_SET) == it->pos, "%s", strerror(errno));
			return;
		}
		memset(data, 'x', sizeof(data));
		CHECK(write(fd, data, sizeof(data)) == sizeof(data), "%s", strerror(errno));
		it->pos = (it->flags & O_APPEND ? *it->size : it->pos) + sizeof(data);
		if (it->pos > *it->size)
			*it->size = it->pos;
		return;
	case WRITES: say(fd, it); return;
	case READS: hear(fd, it); return;
	case SOCKET: (pick(2) ? say : hear)(fd, it); return;
	default:
		count = 1 + pick(9);
		if (pick(3)) {
			CHECK(write(fd, &count, 8) == 8, "%s", strerror(errno));
			it->count += count;
		} else if (it->count) {
			CHECK(read(fd, &count, 8) == 8 && count == it->count, "%lu, not %lu", count, it->count);
			it->count = 0;
		}
	}
}

static void change(int slot)
{
	struct description *it = slots[slot].it;
	int fd = fd_of(slot), flag;

	switch (pick(4)) {
	case 0:
		slots[slot].cloexec ^= 1;
		TRY(fcntl(fd, F_SETFD, slots[slot].cloexec ? FD_CLOEXEC : 0));
		return;
	case 1:
		if (!all)
			return;
		it->is_owned ^= 1;
		TRY(fcntl(fd, F_SETOWN, it->is_owned ? getpid() : 0));
		return;
	case 2:
		if (it->kind != READS && it->kind != WRITES)
			return;
		it->capacity = TRY(fcntl(fd, F_SETPIPE_SZ, pick(2) ? 1 << 16 : 1 << 18));
		if (it->other)
			it->other->capacity = it->capacity;
		return;
	default:
		flag = it->kind == EVENT || it->kind > NAMELESS || pick(2) ? O_NONBLOCK : O_APPEND;
		if (it->kind == EVENT)
			return;
		it->flags ^= flag;
		TRY(fcntl(fd, F_SETFL, it->flags));
	}
}

static void check(int slot)
{
	struct description *it = slots[slot].it;
	int fd = fd_of(slot), waits = 0;
	struct stat status;
	long long limit;

	if (!it) {
		CHECK(fcntl(fd, F_GETFD) < 0 && errno == EBADF, "fd %d is open", fd);
		return;
	}
	CHECK(fcntl(fd, F_GETFD) == slots[slot].cloexec, "fd %d (kind %d) has %d", fd, it->kind, fcntl(fd, F_GETFD));
	CHECK(((fcntl(fd, F_GETFL) ^ it->flags) & (CHANGEABLE | O_ACCMODE)) == 0, "fd %d (kind %d): %x, not %x", fd,
		it->kind, fcntl(fd, F_GETFL), it->flags);
	CHECK(fcntl(fd, F_GETOWN) == (it->is_owned ? getpid() : 0), "fd %d (kind %d) tells %d", fd, it->kind,
		fcntl(fd, F_GETOWN));
	switch (it->kind) {
	case NAMED: case NAMELESS:
		TRY(fstat(fd, &status));
		CHECK(it->kind == NAMELESS || status.st_ino == it->ino, "fd %d is of another file", fd);
		CHECK(status.st_size == *it->size, "fd %d: %ld bytes, not %ld", fd, (long)status.st_size, (long)*it->size);
		CHECK(lseek(fd, 0, SEEK_CUR) == it->pos, "fd %d is at %ld, not %ld", fd, (long)lseek(fd, 0, SEEK_CUR),
			(long)it->pos);
		return;
	case READS: case WRITES:
		CHECK(fcntl(fd, F_GETPIPE_SZ) == it->capacity, "fd %d: %d", fd, fcntl(fd, F_GETPIPE_SZ));
		/* fallthrough */
	case SOCKET:
		if (!it->other || it->kind == WRITES)
			return;
		limit = now_ns() + 5000000000LL;
		do /* TCP takes its time */
			TRY(ioctl(fd, FIONREAD, &waits));
		while (waits != (int)(it->other->said - it->heard) && now_ns() < limit);
		CHECK(waits == (int)(it->other->said - it->heard), "in fd %d wait %d, not %ld", fd, waits,
			(long)(it->other->said - it->heard));
		return;
	default: return;
	}
}

static void rename_some(void)
{
	int a = pick(FILES), b = pick(FILES);
	char from[4200];
	off_t size;
	ino_t ino;

	if (a == b)
		return;
	strcpy(from, path_of(a));
	TRY(renameat2(AT_FDCWD, from, AT_FDCWD, path_of(b), RENAME_EXCHANGE));
	for (int i = 0; i < SLOTS; i++)
		if (slots[i].it && slots[i].it->kind == NAMED) {
			struct description *it = slots[i].it; /* once for each, however many slots it has */
			int met = 0;

			for (int j = 0; j < i; j++)
				met |= slots[j].it == it;
			if (!met && (it->size == &sizes[a] || it->size == &sizes[b]))
				it->size = it->size == &sizes[a] ? &sizes[b] : &sizes[a];
		}
	size = sizes[a], sizes[a] = sizes[b], sizes[b] = size;
	ino = inodes[a], inodes[a] = inodes[b], inodes[b] = ino;
}

static void step(void)
{
	int slot = pick(SLOTS), other = pick(SLOTS);

	switch (pick(10)) {
	case 0: open_some(slot); break;
	case 1: close_slot(slot); break;
	case 2:
		if (slots[slot].it && slot != other)
			put(other, TRY(dup(fd_of(slot))), slots[slot].it);
		break;
	case 3:
		if (slots[slot].it)
			change(slot);
		break;
	case 4:
		if (!pick(8))
			rename_some();
		break;
	default:
		if (slots[slot].it)
			use(slot);
	}
	check(slot);
	check(other);
}

int main(int argc, char **argv)
{
	int children = 0, status;

	wl_start(argc, argv);
	state = wl_arg(argc, argv, 2, 1);
	all = wl_arg(argc, argv, 3, 1);
	signal(SIGPIPE, SIG_IGN);
	for (int i = 0; i < FILES; i++) {
		struct stat made_of;
		int fd = TRY(open(path_of(i), O_RDWR | O_CREAT | O_TRUNC, 0600));

		TRY(fstat(fd, &made_of));
		inodes[i] = made_of.st_ino;
		TRY(close(fd));
	}
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		step();
		if (!pick(12))
			wl_sleep_us(1 + pick(3000));
		if (n % 200)
			continue;
		for (int i = 0; i < SLOTS; i++)
			check(i);
		wl_line("tick %ld", n / 200);
		while (waitpid(-1, &status, WNOHANG) > 0)
			{
			children--;
			CHECK(!status, "a child ended with %x", status);
		}
		if (children < 2 && children++ < 2) {
			pid_t pid = TRY(fork());

			if (!pid) { /* it holds all that was open, and says so in the end */
				prctl(PR_SET_PDEATHSIG, SIGKILL);
				wl_sleep_us(20000 + pick(200000));
				for (int i = 0; i < SLOTS; i++)
					CHECK(fcntl(fd_of(i), F_GETFD) == (slots[i].it ? slots[i].cloexec : -1), "fd %d", fd_of(i));
				_exit(0);
			}
		}
	}
	while (wait(&status) > 0)
		CHECK(!status, "a child ended with %x", status);
	for (int i = 0; i < SLOTS; i++)
		check(i);
	wl_ok();
}
