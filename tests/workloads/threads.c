// SPDX-License-Identifier: Apache-2.0
/*
 * threads OUTFILE [THREADS]: threads with everything that belongs to a thread.
 *
 * A token goes round a ring of threads by mutex and condition variable. Each thread, when it has
 * the token, looks at what is its own: thread-local data, name, thread id, signal mask, alternate
 * stack, restartable-sequence area. Beside the ring: timed waits that must time out and never be
 * interrupted, and owners of a robust mutex who die holding it.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/syscall.h>

#include "workload.h"

static long threads;
static pthread_mutex_t ring_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t *ring_cond;
static long ring_holder;
static unsigned long ring_count;
static __thread uint64_t own_pattern[64];
static __thread long own_index = -1;
static pthread_mutex_t robust;
static pthread_mutex_t quiet_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t quiet;
static unsigned long timeouts, deaths;

struct own {
	pid_t tid;
	void *altstack;
	char name[16];
};

static void own_build(struct own *own, long index)
{
	stack_t ss = { .ss_size = 32768, .ss_sp = malloc(32768) };
	sigset_t set;

	own->tid = gettid();
	own->altstack = ss.ss_sp;
	own_index = index;
	for (int i = 0; i < 64; i++)
		own_pattern[i] = wl_mix(index * 64 + i);
	snprintf(own->name, sizeof(own->name), "ring-%ld", index);
	TRY(prctl(PR_SET_NAME, own->name));
	TRY(sigaltstack(&ss, NULL));
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1 + index % 20);
	CHECK(pthread_sigmask(SIG_SETMASK, &set, NULL) == 0, "mask");
}

static void own_check_rseq(void)
{
	const struct rseq *area = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
	cpu_set_t before, one;
	unsigned cpu, node;

	if (!__rseq_size)
		return;
	/* Pinned, the cpu cannot change between asking the kernel and looking. */
	TRY(sched_getaffinity(0, sizeof(before), &before));
	TRY(syscall(SYS_getcpu, &cpu, &node, NULL));
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	if (sched_setaffinity(0, sizeof(one), &one) < 0)
		return;
	TRY(syscall(SYS_getcpu, &cpu, &node, NULL));
	CHECK(*(volatile uint32_t *)&area->cpu_id == cpu, "rseq says %u, not %u", area->cpu_id, cpu);
	TRY(sched_setaffinity(0, sizeof(before), &before));
}

static void own_check(struct own *own, long index, unsigned long turn)
{
	sigset_t set;
	stack_t ss;
	char name[16];

	CHECK(own_index == index, "index %ld is %ld", index, own_index);
	for (int i = 0; i < 64; i++)
		CHECK(own_pattern[i] == wl_mix(index * 64 + i), "thread %ld word %d", index, i);
	CHECK(gettid() == own->tid, "tid %d, was %d", gettid(), own->tid);
	TRY(prctl(PR_GET_NAME, name));
	CHECK(!strcmp(name, own->name), "name %s, was %s", name, own->name);
	TRY(sigaltstack(NULL, &ss));
	CHECK(ss.ss_sp == own->altstack && ss.ss_size == 32768, "altstack %p", ss.ss_sp);
	CHECK(pthread_sigmask(SIG_SETMASK, NULL, &set) == 0, "mask");
	for (int sig = SIGRTMIN + 1; sig < SIGRTMIN + 21; sig++)
		CHECK(sigismember(&set, sig) == (sig == SIGRTMIN + 1 + index % 20), "signal %d", sig);
	if (turn % 64 == 0)
		own_check_rseq();
}

static void *ring_member(void *arg)
{
	long index = (long)arg;
	unsigned long turn = 0;
	struct own own;

	own_build(&own, index);
	for (;;) {
		pthread_mutex_lock(&ring_lock);
		while (ring_holder != index)
			pthread_cond_wait(&ring_cond[index], &ring_lock);
		CHECK(ring_count % threads == (unsigned long)index, "token %lu at %ld", ring_count, index);
		ring_count++;
		ring_holder = (index + 1) % threads;
		pthread_cond_signal(&ring_cond[ring_holder]);
		pthread_mutex_unlock(&ring_lock);
		own_check(&own, index, turn++);
		if (index == 0)
			wl_sleep_us(2000);
	}
	return NULL;
}

/* Waits on a condition that never comes: a futex wait with a timeout, interrupted or not. */
static void *timed_waiter(void *arg)
{
	(void)arg;
	for (;;) {
		int64_t before = now_ns();
		struct timespec until;
		int error;

		clock_gettime(CLOCK_MONOTONIC, &until);
		until.tv_nsec += 50000000;
		if (until.tv_nsec >= 1000000000) {
			until.tv_nsec -= 1000000000;
			until.tv_sec++;
		}
		pthread_mutex_lock(&quiet_lock);
		do
			error = pthread_cond_timedwait(&quiet, &quiet_lock, &until);
		while (error == 0); /* spurious wakeups are allowed */
		pthread_mutex_unlock(&quiet_lock);
		CHECK(error == ETIMEDOUT, "%s", strerror(error));
		CHECK(now_ns() - before >= 50000000, "woke after %ld ns", (long)(now_ns() - before));
		timeouts++;
	}
	return NULL;
}

static void *robust_owner(void *arg)
{
	int error = pthread_mutex_lock(&robust);

	CHECK(error == 0, "%s", strerror(error));
	*(volatile int *)arg = 1;
	wl_sleep_us(100000);
	return NULL; /* the lock is never given back: the kernel must tell the next owner */
}

static void *robust_heir(void *arg)
{
	(void)arg;
	for (;;) {
		volatile int held = 0;
		pthread_t owner;
		int error;

		CHECK(pthread_create(&owner, NULL, robust_owner, (void *)&held) == 0, "create");
		while (!held)
			wl_sleep_us(1000);
		error = pthread_mutex_lock(&robust);
		CHECK(error == EOWNERDEAD, "%s", error ? strerror(error) : "locked as if free");
		CHECK(pthread_mutex_consistent(&robust) == 0, "consistent");
		CHECK(pthread_mutex_unlock(&robust) == 0, "unlock");
		CHECK(pthread_join(owner, NULL) == 0, "join");
		deaths++;
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_mutexattr_t mutex_attr;
	pthread_condattr_t cond_attr;
	pthread_attr_t attr;
	unsigned long ticks, before = 0;
	pthread_t thread;

	wl_start(argc, argv);
	threads = wl_arg(argc, argv, 2, 8);
	ring_cond = calloc(threads, sizeof(*ring_cond));
	for (long i = 0; i < threads; i++)
		pthread_cond_init(&ring_cond[i], NULL);
	pthread_mutexattr_init(&mutex_attr);
	pthread_mutexattr_setrobust(&mutex_attr, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&robust, &mutex_attr);
	pthread_condattr_init(&cond_attr);
	pthread_condattr_setclock(&cond_attr, CLOCK_MONOTONIC);
	pthread_cond_init(&quiet, &cond_attr);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 256 << 10);
	for (long i = 0; i < threads; i++)
		CHECK(pthread_create(&thread, &attr, ring_member, (void *)i) == 0, "thread %ld", i);
	CHECK(pthread_create(&thread, &attr, timed_waiter, NULL) == 0, "waiter");
	CHECK(pthread_create(&thread, &attr, robust_heir, NULL) == 0, "heir");
	wl_ready();
	for (ticks = 1; !wl_stopping; ticks++) {
		int64_t until = now_ns() + 100000000;
		unsigned long count;

		do {
			wl_sleep_us(20000);
			count = *(volatile unsigned long *)&ring_count;
		} while (!wl_stopping && (now_ns() < until || count == before));
		wl_line("tick %lu ring %lu timeouts %lu deaths %lu", ticks, count, timeouts, deaths);
		before = count;
	}
	wl_ok();
}
