/*
 * A program that never leaves its files alone, and knows what has to be in each of them.
 *
 *     churn DIRECTORY PACE-in-us
 *
 * Files are created, replaced, appended to, cut, renamed and deleted, directories renamed; before
 * anything is done to a file, what is in it is compared with what was put there. One file is appended to through
 * a descriptor that stays open, one is written to through a mapping. When there is a file DIRECTORY/hold, it
 * writes down what it believes to DIRECTORY/belief, and waits until `hold` is gone.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 96
#define DIRS 6
#define MAP (256 << 10)
#define BIG 400000

static struct { int exists; size_t size; uint32_t seed; } slots[SLOTS];
static int turned[DIRS];
static uint64_t chance = 88172645463325252ull;
static unsigned char buffer[4 * BIG], there[4 * BIG];
static const char *top;

static void wrong(const char *what, const char *path)
{
	dprintf(2, "%s: %s: %s\n", path, what, strerror(errno));
	exit(1);
}

static uint64_t any(uint64_t below)
{
	chance ^= chance << 13;
	chance ^= chance >> 7;
	chance ^= chance << 17;
	return chance % below;
}

static const char *path_of(int slot)
{
	static char path[4][4096];
	static int turn;
	char *out = path[turn++ % 4];

	snprintf(out, 4096, "%s/d%d%s/f%d", top, slot % DIRS, turned[slot % DIRS] ? "-turned" : "", slot);
	return out;
}

static void fill(uint32_t seed, size_t size)
{
	for (size_t n = 0; n < size; n++)
		buffer[n] = (seed * 31 + n * 7 + (n >> 8)) & 0xff;
}

static void check(int slot)
{
	const char *path = path_of(slot);
	int fd = open(path, O_RDONLY);

	if (fd < 0)
		wrong("is gone", path);
	if (read(fd, there, sizeof(there)) != (ssize_t)slots[slot].size)
		wrong("has another size", path);
	fill(slots[slot].seed, slots[slot].size);
	if (memcmp(buffer, there, slots[slot].size))
		wrong("has other contents", path);
	close(fd);
}

static void put(int slot)
{
	char new[4096];
	int fd;

	slots[slot].exists = 1;
	slots[slot].size = any(8) ? any(3000) : any(BIG);
	slots[slot].seed = any(1 << 30);
	fill(slots[slot].seed, slots[slot].size);
	snprintf(new, sizeof(new), "%s/temporary", top);
	fd = open(new, O_WRONLY | O_CREAT | O_TRUNC, 0640);
	if (fd < 0 || write(fd, buffer, slots[slot].size) != (ssize_t)slots[slot].size || close(fd))
		wrong("cannot be written", new);
	if (rename(new, path_of(slot)))
		wrong("cannot be renamed", new);
}

static void change(int slot)
{
	int to = any(SLOTS), fd, dir;
	size_t size;
	char name[2][4096];

	if (!slots[slot].exists) {
		put(slot);
		return;
	}
	check(slot);
	switch (any(8)) {
	case 0:
		put(slot);
		break;
	case 1:
	case 2:
		size = slots[slot].size + any(5000);
		if (size > sizeof(buffer))
			break;
		fill(slots[slot].seed, size);
		fd = open(path_of(slot), O_WRONLY | O_APPEND);
		if (fd < 0 || write(fd, buffer + slots[slot].size, size - slots[slot].size) < 0 || close(fd))
			wrong("cannot be appended to", path_of(slot));
		slots[slot].size = size;
		break;
	case 3:
		slots[slot].size = any(slots[slot].size + 1);
		if (truncate(path_of(slot), slots[slot].size))
			wrong("cannot be cut", path_of(slot));
		break;
	case 4:
		if (to == slot)
			break;
		if (rename(path_of(slot), path_of(to)))
			wrong("cannot be renamed", path_of(slot));
		slots[to] = slots[slot];
		slots[slot].exists = 0;
		break;
	case 5:
		if (unlink(path_of(slot)))
			wrong("cannot be deleted", path_of(slot));
		slots[slot].exists = 0;
		break;
	case 6:
		dir = slot % DIRS;
		snprintf(name[0], 4096, "%s/d%d%s", top, dir, turned[dir] ? "-turned" : "");
		snprintf(name[1], 4096, "%s/d%d%s", top, dir, turned[dir] ? "" : "-turned");
		if (rename(name[0], name[1]))
			wrong("cannot be renamed", name[0]);
		turned[dir] = !turned[dir];
		break;
	default:
		if (chmod(path_of(slot), any(2) ? 0600 : 0644))
			wrong("cannot be changed", path_of(slot));
	}
}

static void hold(unsigned long lines)
{
	char wanted[4096], told[4096], new[4096];
	FILE *out;

	snprintf(wanted, sizeof(wanted), "%s/hold", top);
	if (access(wanted, F_OK))
		return;
	snprintf(told, sizeof(told), "%s/belief", top);
	snprintf(new, sizeof(new), "%s/belief.new", top);
	out = fopen(new, "w");
	for (int n = 0; n < SLOTS; n++)
		if (slots[n].exists)
			fprintf(out, "%s %zu %u\n", path_of(n) + strlen(top) + 1, slots[n].size, slots[n].seed);
	fprintf(out, "log %lu\n", lines);
	if (fclose(out) || rename(new, told))
		wrong("cannot be written", told);
	while (!access(wanted, F_OK))
		usleep(2000);
	unlink(told);
}

int main(int argc, char **argv)
{
	char path[4096];
	unsigned long *map, lines;
	int log, fd;

	top = argv[1];
	signal(SIGTERM, _exit);
	for (int n = 0; n < DIRS; n++) {
		snprintf(path, sizeof(path), "%s/d%d", top, n);
		mkdir(path, 0755);
	}
	snprintf(path, sizeof(path), "%s/log", top);
	log = open(path, O_WRONLY | O_CREAT | O_APPEND, 0644);
	snprintf(path, sizeof(path), "%s/map", top);
	fd = open(path, O_RDWR | O_CREAT, 0600);
	if (argc < 3 || log < 0 || fd < 0 || ftruncate(fd, MAP))
		wrong("cannot be opened", path);
	map = mmap(NULL, MAP, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	for (lines = 0;; lines++) {
		unsigned long word = lines * 4093 % (MAP / sizeof(*map));

		change(any(SLOTS));
		map[word] = lines;
		if (pread(fd, there, sizeof(*map), word * sizeof(*map)) < 0 || memcmp(there, &lines, sizeof(lines)))
			wrong("is not what is mapped", "map");
		dprintf(log, "line %lu\n", lines);
		hold(lines + 1);
		usleep(atoi(argv[2]));
	}
}
