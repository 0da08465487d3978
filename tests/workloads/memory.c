// SPDX-License-Identifier: Apache-2.0
/*
 * memory OUTFILE [SIZE_MIB [RATE_MB_S [plain|all]]]: memory of every kind, written and verified.
 *
 * Every page holds a pattern made from its address and its generation; the generations stand in a
 * table of their own. A page that is from another instant than its table entry is found, as is one
 * that is lost, stale, or in the wrong place. "plain" keeps to one anonymous mapping (for
 * measurements); "all" adds file, shared, dropped, moved, protected and growing memory.
 *
 * It also measures: once a second it prints the longest time in microseconds that passed between
 * two turns of its own loop (gap_us: this second, gap_ever_us: ever). A turn is about 1 ms. Of a gap
 * above 2 ms it also prints "gap FROM TO", in nanoseconds of CLOCK_MONOTONIC.
 */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <sys/stat.h>

#include "workload.h"

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define SMALL 64 /* pages of each of the small regions */

struct region {
	const char *name;
	unsigned char *base;
	unsigned long pages;
	uint32_t *generation; /* 0: never written, reads as zeros */
	uint64_t seed;
};

static uint64_t random_state = 88172645463325252ULL;

static uint64_t random_next(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return random_state;
}

/* Half of each word is random: compresses to about a half, as much real memory does. */
static uint64_t word_of(uint64_t seed, unsigned long page, uint32_t generation, unsigned long i)
{
	uint64_t key = wl_mix(seed ^ (page << 32) ^ generation);

	return (uint64_t)(uint32_t)(key * (2 * i + 1) ^ (key >> 29)) | ((uint64_t)page << 32);
}

static void page_write(struct region *r, unsigned long page)
{
	uint64_t *words = (uint64_t *)(r->base + page * PAGE);
	uint32_t generation = r->generation[page] + 1;

	if (!generation)
		generation = 1;
	for (unsigned long i = 0; i < WORDS; i++)
		words[i] = word_of(r->seed, page, generation, i);
	r->generation[page] = generation;
}

static void page_check(struct region *r, unsigned long page)
{
	uint64_t *words = (uint64_t *)(r->base + page * PAGE);
	uint32_t generation = r->generation[page];

	for (unsigned long i = 0; i < WORDS; i++) {
		uint64_t wanted = generation ? word_of(r->seed, page, generation, i) : 0;

		if (words[i] != wanted)
			wl_fail("%s page %lu at %p word %lu generation %u: %016lx, not %016lx", r->name,
				page, (void *)words, i, generation, (unsigned long)words[i],
				(unsigned long)wanted);
	}
}

static struct region region_of(const char *name, void *base, unsigned long pages)
{
	struct region r = { name, base, pages, NULL, wl_mix((uint64_t)name) };

	CHECK(base != MAP_FAILED, "%s: %s", name, strerror(errno));
	r.generation = mmap(NULL, pages * sizeof(*r.generation), PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(r.generation != MAP_FAILED, "%s", name);
	return r;
}

static int file_of(const char *suffix, unsigned long pages)
{
	int fd = TRY(open(wl_beside(suffix), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));

	TRY(ftruncate(fd, pages * PAGE));
	return fd;
}

static void *map_anonymous(unsigned long pages, int flags)
{
	return mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
}

static struct region kinds[6];
static struct region moving;
static unsigned char *brk_base;
static unsigned long brk_pages;

static void kinds_build(void)
{
	int fd;

	kinds[0] = region_of("private anonymous", map_anonymous(SMALL, MAP_PRIVATE), SMALL);
	kinds[1] = region_of("shared anonymous", map_anonymous(SMALL, MAP_SHARED), SMALL);
	fd = file_of("private", SMALL);
	kinds[2] = region_of("private file",
			     mmap(NULL, SMALL * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0), SMALL);
	close(fd);
	fd = file_of("shared", SMALL);
	kinds[3] = region_of("shared file",
			     mmap(NULL, SMALL * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), SMALL);
	close(fd);
	kinds[4] = region_of("dropped", map_anonymous(SMALL, MAP_PRIVATE), SMALL);
	kinds[5] = region_of("protected", map_anonymous(SMALL, MAP_PRIVATE), SMALL);
	moving = region_of("moving", map_anonymous(4 * SMALL, MAP_PRIVATE), 4 * SMALL);
	brk_base = sbrk(0);
	if ((uintptr_t)brk_base % PAGE)
		brk_base = (unsigned char *)sbrk(PAGE - (uintptr_t)brk_base % PAGE) + PAGE -
			   (uintptr_t)brk_base % PAGE;
}

static void turn_dropped(struct region *r)
{
	unsigned long page = random_next() % r->pages;

	TRY(madvise(r->base + page * PAGE, PAGE, MADV_DONTNEED));
	r->generation[page] = 0;
	page_check(r, page);
}

static void turn_protected(struct region *r)
{
	unsigned long page = random_next() % r->pages;

	TRY(mprotect(r->base + page * PAGE, PAGE, PROT_READ));
	page_check(r, page);
	TRY(mprotect(r->base + page * PAGE, PAGE, PROT_READ | PROT_WRITE));
	page_write(r, page);
}

/* A hole in the middle, filled again with fresh zeros. */
static void turn_hole(struct region *r)
{
	unsigned long page = random_next() % r->pages;
	void *base;

	TRY(munmap(r->base + page * PAGE, PAGE));
	base = mmap(r->base + page * PAGE, PAGE, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	CHECK(base == r->base + page * PAGE, "%s", strerror(errno));
	r->generation[page] = 0;
}

/* Shrinks or grows, moving to a new address each time the kernel wants so. */
static void turn_moving(struct region *r)
{
	unsigned long pages = SMALL + random_next() % (3 * SMALL);
	unsigned char *base;

	if (random_next() % 2) {
		base = mremap(r->base, r->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
	} else { /* forced to move */
		void *target = map_anonymous(pages, MAP_PRIVATE);

		CHECK(target != MAP_FAILED, "%s", strerror(errno));
		base = mremap(r->base, r->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			      target);
	}
	CHECK(base != MAP_FAILED, "%s", strerror(errno));
	for (unsigned long page = r->pages; page < pages; page++)
		r->generation[page] = 0;
	r->base = base;
	r->pages = pages;
	page_check(r, pages - 1);
	page_write(r, random_next() % pages);
}

static void turn_brk(void)
{
	unsigned long pages = random_next() % 32;
	unsigned char *end = brk_base + brk_pages * PAGE;

	/* What malloc took in between is not ours to give back. */
	if ((unsigned char *)sbrk(0) != end)
		return;
	for (unsigned long i = 0; i < brk_pages; i++)
		CHECK(*(unsigned long *)(brk_base + i * PAGE) == wl_mix(i), "brk page %lu", i);
	TRY((long)sbrk(((long)pages - (long)brk_pages) * (long)PAGE));
	for (unsigned long i = brk_pages; i < pages; i++) {
		CHECK(*(unsigned long *)(brk_base + i * PAGE) == 0, "fresh brk page %lu", i);
		*(unsigned long *)(brk_base + i * PAGE) = wl_mix(i);
	}
	brk_pages = pages;
}

static __attribute__((noinline)) uint64_t stack_deep(unsigned long depth, uint64_t seed)
{
	volatile uint64_t frame[128];
	uint64_t sum = 0;

	for (int i = 0; i < 128; i++)
		frame[i] = wl_mix(seed + i);
	if (depth)
		sum = stack_deep(depth - 1, seed + 1000);
	else
		wl_sleep_us(200);
	for (int i = 0; i < 128; i++)
		CHECK(frame[i] == wl_mix(seed + i), "stack frame %lu word %d", depth, i);
	return sum + depth;
}

static void kinds_turn(unsigned long turn)
{
	for (unsigned k = 0; k < 6; k++) {
		page_write(&kinds[k], random_next() % SMALL);
		page_check(&kinds[k], random_next() % SMALL);
	}
	page_check(&moving, random_next() % moving.pages);
	if (turn % 8 == 0) {
		turn_dropped(&kinds[4]);
		turn_protected(&kinds[5]);
		turn_hole(&kinds[0]);
		turn_moving(&moving);
		turn_brk();
	}
	if (turn % 64 == 0)
		stack_deep(turn / 64 % 1024, turn);
}

int main(int argc, char **argv)
{
	unsigned long pages, per_turn, cursor = 0, turn, ticks = 0;
	int64_t last, second, gap_us = 0, gap_ever_us = 0, debt = 0;
	struct region large;
	double rate;
	int all;

	wl_start(argc, argv);
	pages = wl_arg(argc, argv, 2, 16) * (1UL << 20) / PAGE;
	rate = wl_arg(argc, argv, 3, 10) * 1e6;
	all = argc < 5 || strcmp(argv[4], "plain");
	large = region_of("large", map_anonymous(pages, MAP_PRIVATE), pages);
	for (unsigned long page = 0; page < pages; page++)
		page_write(&large, page);
	if (all)
		kinds_build();
	wl_ready();

	last = second = now_ns();
	for (turn = 0; !wl_stopping; turn++) {
		int64_t now;

		wl_sleep_us(1000);
		now = now_ns();
		if (now - last > 2000000)
			wl_line("gap %ld %ld", last, now);
		gap_us = (now - last) / 1000 > gap_us ? (now - last) / 1000 : gap_us;
		/* After a long gap the missed writes are not made up for: that would be a burst. */
		debt += rate * (now - last < 10000000 ? now - last : 10000000) / 1e9;
		last = now;
		per_turn = debt / PAGE;
		debt -= per_turn * PAGE;
		while (per_turn--)
			page_write(&large, random_next() % pages);
		for (int i = 0; i < 16; i++, cursor++)
			page_check(&large, cursor % pages);
		if (all)
			kinds_turn(turn);
		if (now - second >= 1000000000) {
			gap_ever_us = gap_us > gap_ever_us ? gap_us : gap_ever_us;
			wl_line("tick %lu turns %lu gap_us %ld gap_ever_us %ld", ++ticks, turn, gap_us,
				gap_ever_us);
			gap_us = 0;
			second = now;
		}
	}
	for (unsigned long page = 0; page < pages; page++)
		page_check(&large, page);
	wl_line("tick %lu turns %lu gap_us %ld gap_ever_us %ld", ++ticks, turn, gap_us,
		gap_us > gap_ever_us ? gap_us : gap_ever_us);
	wl_ok();
}
