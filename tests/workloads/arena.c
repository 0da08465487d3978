/*
 * arena OUTFILE [SEED]: changes the mappings of an arena in every way, at random, and knows what each page must hold.
 *
 * Memory without a file, private and shared mappings of a file and of a memfd, of any protection; written to, zeroed,
 * dropped, protected, moved, unmapped and mapped over, page by page and many at a time. Children inherit what is
 * private, do the same with it for a while and end. Whatever a page holds that it should not is a FAIL.
 */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include "workload.h"

#define PAGE 4096UL
#define PAGES 96UL /* of the arena */
#define FILE_PAGES 64UL
#define CHILDREN 3

enum kind { NONE, ANON, PRIVATE, SHARED, MEMFD };

struct page {
	enum kind kind;
	int prot;
	unsigned at; /* page of the file */
	int own;     /* of a private one: it has been written to */
	uint64_t value;
};

static char *arena;
static struct page pages[PAGES];
static uint64_t file[FILE_PAGES], shared[FILE_PAGES], memory[FILE_PAGES]; /* what they hold; `file` stays so */
static int fds[5] = { -1, -1, -1, -1, -1 };
static uint64_t state, serial;

static unsigned long pick(unsigned long n)
{
	state += 0x9e3779b97f4a7c15ULL;
	return wl_mix(state) % n;
}

static uint64_t *word(unsigned long page, int last)
{
	return (uint64_t *)(arena + page * PAGE + (last ? PAGE - 8 : 0));
}

static uint64_t wanted(struct page *page)
{
	switch (page->kind) {
	case PRIVATE: return page->own ? page->value : file[page->at];
	case SHARED: return shared[page->at];
	case MEMFD: return memory[page->at];
	default: return page->value;
	}
}

static void check(unsigned long i)
{
	struct page *page = &pages[i];
	uint64_t value = wanted(page);

	if (page->kind != NONE && page->prot & PROT_READ)
		CHECK(*word(i, 0) == value && *word(i, 1) == value, "page %lu (%p, kind %d, own %d) holds %lx and %lx, not %lx",
			i, (void *)word(i, 0), page->kind, page->own, *word(i, 0), *word(i, 1), value);
}

static void check_all(void)
{
	for (unsigned long i = 0; i < PAGES; i++)
		check(i);
}

static void fill(unsigned long i)
{
	struct page *page = &pages[i];
	uint64_t value = pick(4) ? ++serial * 1000003 + getpid() : 0;

	if (page->kind == NONE || (page->prot & (PROT_READ | PROT_WRITE)) != (PROT_READ | PROT_WRITE))
		return;
	if (!value)
		memset(word(i, 0), 0, PAGE);
	*word(i, 0) = *word(i, 1) = value;
	if (page->kind == SHARED)
		shared[page->at] = value;
	else if (page->kind == MEMFD)
		memory[page->at] = value;
	else
		page->own = 1, page->value = value;
}

static void map(unsigned long from, unsigned long count, int child)
{
	static const int prots[] = { PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE,
		PROT_READ | PROT_EXEC };
	enum kind kind = ANON + pick(child ? 2 : 4);
	int prot = prots[pick(5)], flags = kind <= PRIVATE ? MAP_PRIVATE : MAP_SHARED;
	unsigned long at = pick(FILE_PAGES - 1);

	if (kind != ANON && count > FILE_PAGES - at)
		count = FILE_PAGES - at;
	CHECK(mmap(arena + from * PAGE, count * PAGE, prot, flags | MAP_FIXED | (kind == ANON ? MAP_ANONYMOUS : 0),
		fds[kind], kind == ANON ? 0 : at * PAGE) != MAP_FAILED, "%s", strerror(errno));
	for (unsigned long i = 0; i < count; i++)
		pages[from + i] = (struct page){ kind, prot, at + i, 0, 0 };
}

static void protect(unsigned long from, unsigned long count)
{
	int prot = pick(3) ? PROT_READ | PROT_WRITE : pick(2) ? PROT_READ : PROT_NONE;

	for (unsigned long i = from; i < from + count; i++)
		if (pages[i].kind == NONE)
			return;
	TRY(mprotect(arena + from * PAGE, count * PAGE, prot));
	for (unsigned long i = from; i < from + count; i++)
		pages[i].prot = prot;
}

static void drop(unsigned long from, unsigned long count)
{
	for (unsigned long i = from; i < from + count; i++)
		if (pages[i].kind == NONE)
			return;
	TRY(madvise(arena + from * PAGE, count * PAGE, MADV_DONTNEED));
	for (unsigned long i = from; i < from + count; i++)
		pages[i].own = 0, pages[i].value = 0;
}

static void move(unsigned long from, unsigned long to)
{
	if (from == to || pages[from].kind == NONE)
		return;
	CHECK(mremap(arena + from * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, arena + to * PAGE) != MAP_FAILED,
		"%s", strerror(errno));
	pages[to] = pages[from];
	pages[from] = (struct page){ 0 };
}

static void unmap(unsigned long from, unsigned long count)
{
	TRY(munmap(arena + from * PAGE, count * PAGE));
	for (unsigned long i = from; i < from + count; i++)
		pages[i] = (struct page){ 0 };
}

static void step(int child)
{
	unsigned long from = pick(PAGES), most = PAGES - from, count = 1 + pick(pick(3) ? 8 : 48);

	if (count > most)
		count = most;
	switch (pick(12)) {
	case 0: case 1: map(from, count, child); break;
	case 2: unmap(from, count); break;
	case 3: case 4: protect(from, count); break;
	case 5: drop(from, count); break;
	case 6: move(from, pick(PAGES)); break;
	default:
		for (unsigned long i = from; i < from + count; i++)
			fill(i);
	}
	for (int i = 0; i < 4; i++)
		check(pick(PAGES));
}

static void live(int child)
{
	for (unsigned long i = 0; child && i < PAGES; i++)
		if (pages[i].kind == SHARED || pages[i].kind == MEMFD)
			unmap(i, 1);
	check_all();
	for (long i = 0; child ? i < 400 : !wl_stopping; i++) {
		static long n;

		n++;
		step(child);
		if (!pick(8))
			wl_sleep_us(1 + pick(3000));
		if (n % 50 == 0)
			check_all();
		if (child)
			continue;
		if (n % 50 == 0)
			wl_line("tick %ld", n / 50);
		for (int status; n % 20 == 0 && waitpid(-1, &status, WNOHANG) > 0;) {
			CHECK(!status, "a child ended with %x", status);
			return;
		}
	}
}

int main(int argc, char **argv)
{
	int status;

	wl_start(argc, argv);
	state = wl_arg(argc, argv, 2, 1);
	fds[PRIVATE] = TRY(open(wl_beside("private"), O_RDWR | O_CREAT | O_TRUNC, 0600));
	fds[SHARED] = TRY(open(wl_beside("shared"), O_RDWR | O_CREAT | O_TRUNC, 0600));
	fds[MEMFD] = TRY(memfd_create("arena", 0));
	TRY(ftruncate(fds[SHARED], FILE_PAGES * PAGE));
	TRY(ftruncate(fds[MEMFD], FILE_PAGES * PAGE));
	for (unsigned long i = 0; i < FILE_PAGES; i++) {
		uint64_t page[PAGE / 8] = { 0 };

		page[0] = page[PAGE / 8 - 1] = file[i] = i % 5 ? wl_mix(i) : 0;
		CHECK(write(fds[PRIVATE], page, PAGE) == PAGE, "%s", strerror(errno));
	}
	arena = mmap(NULL, (PAGES + 2) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(arena != MAP_FAILED, "%s", strerror(errno));
	arena += PAGE;
	wl_ready();
	for (int children = 0; !wl_stopping; children--) {
		for (; children < CHILDREN; children++) {
			pid_t pid = TRY(fork());

			if (!pid) {
				state = wl_mix(state + getpid());
				prctl(PR_SET_PDEATHSIG, SIGKILL);
				live(1);
				_exit(0);
			}
		}
		live(0);
	}
	while (wait(&status) > 0)
		CHECK(!status, "a child ended with %x", status);
	check_all();
	wl_ok();
}
