// SPDX-License-Identifier: Apache-2.0
/*
 * signals OUTFILE: handlers, masks, pending and queued signals, timers, sleeps.
 *
 * The root is under a rain of timer signals and keeps signals pending. Three children without any
 * handler sit in system calls that the kernel restarts by itself (nanosleep, poll, read): none may
 * return early or with EINTR.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/time.h>
#include <sys/wait.h>

#include "workload.h"

#define SIG_QUEUED (SIGRTMIN + 1)
#define SIG_TIMER (SIGRTMIN + 2)
#define SIG_NEVER (SIGRTMIN + 3)
#define ALTSTACK 65536

static volatile unsigned long alarms, prof_alarms, timer_ticks;
static unsigned char *altstack;

static void on_alarm(int sig)
{
	char here;

	(void)sig;
	if ((unsigned char *)&here < altstack || (unsigned char *)&here >= altstack + ALTSTACK)
		wl_fail("handler at %p, not on the alternate stack %p", (void *)&here, (void *)altstack);
	alarms++;
}

static void on_prof(int sig)
{
	(void)sig;
	prof_alarms++;
}

static void on_timer(int sig, siginfo_t *info, void *context)
{
	(void)context;
	if (sig != SIG_TIMER || info->si_code != SI_TIMER || info->si_value.sival_int != 4711)
		wl_fail("signal %d code %d value %d", sig, info->si_code, info->si_value.sival_int);
	timer_ticks += 1 + info->si_overrun;
}

static void queue_values(unsigned long period)
{
	for (int i = 0; i < 3; i++)
		TRY(sigqueue(getpid(), SIG_QUEUED, (union sigval){ .sival_int = period * 3 + i }));
	TRY(raise(SIGUSR2));
}

static void take_values(unsigned long period)
{
	struct timespec none = { 0, 0 };
	sigset_t set;
	siginfo_t info;

	sigemptyset(&set);
	sigaddset(&set, SIG_QUEUED);
	for (int i = 0; i < 3; i++) {
		CHECK(sigtimedwait(&set, &info, &none) == SIG_QUEUED, "value %d: %s", i, strerror(errno));
		CHECK(info.si_code == SI_QUEUE && info.si_pid == getpid() &&
			      info.si_value.sival_int == (int)(period * 3 + i),
		      "code %d pid %d value %d", info.si_code, info.si_pid, info.si_value.sival_int);
	}
	CHECK(sigtimedwait(&set, &info, &none) < 0 && errno == EAGAIN, "one value too many");
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	CHECK(sigtimedwait(&set, &info, &none) == SIGUSR2, "%s", strerror(errno));
	CHECK(info.si_code == SI_USER && info.si_pid == getpid(), "code %d pid %d", info.si_code, info.si_pid);
}

static void check_actions(void)
{
	struct sigaction sa;
	struct itimerval itimer;
	sigset_t set;
	stack_t ss;

	TRY(sigaction(SIGALRM, NULL, &sa));
	CHECK(sa.sa_handler == on_alarm && sa.sa_flags & SA_ONSTACK && sa.sa_flags & SA_RESTART &&
		      sigismember(&sa.sa_mask, SIGUSR1),
	      "SIGALRM's action changed");
	TRY(sigaction(SIGUSR1, NULL, &sa));
	CHECK(sa.sa_handler == SIG_IGN, "SIGUSR1 is not ignored");
	TRY(sigaltstack(NULL, &ss));
	CHECK(ss.ss_sp == altstack && ss.ss_size == ALTSTACK, "altstack %p", ss.ss_sp);
	TRY(sigprocmask(SIG_SETMASK, NULL, &set));
	for (int sig = 1; sig < SIGRTMIN; sig++)
		CHECK(sig == 32 || sig == 33 || sigismember(&set, sig) == (sig == SIGUSR2), "mask %d", sig);
	CHECK(sigismember(&set, SIG_QUEUED) && sigismember(&set, SIG_NEVER), "mask of queued signals");
	TRY(sigpending(&set));
	CHECK(sigismember(&set, SIGUSR2) && sigismember(&set, SIG_QUEUED) && !sigismember(&set, SIG_NEVER),
	      "pending signals changed");
	TRY(getitimer(ITIMER_REAL, &itimer));
	CHECK(itimer.it_interval.tv_usec == 20000, "interval %ld us", (long)itimer.it_interval.tv_usec);
}

static pid_t child(void (*body)(unsigned long *), unsigned long *count, const char *name)
{
	pid_t pid = TRY(fork());

	if (pid)
		return pid;
	prctl(PR_SET_NAME, name);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGTERM, SIG_DFL);
	signal(SIGALRM, SIG_IGN);
	for (;;) {
		body(count);
		(*count)++;
	}
}

static void sleeper(unsigned long *count)
{
	struct timespec ts = { 0, 300000000 };
	int64_t before = now_ns(), slept;

	(void)count;
	CHECK(nanosleep(&ts, NULL) == 0, "nanosleep: %s", strerror(errno));
	slept = now_ns() - before;
	CHECK(slept >= 300000000, "slept %ld ns", (long)slept);
	if (slept > 350000000)
		wl_line("note sleeper slept %ld us instead of 300000", (long)slept / 1000);
}

static int quiet_pipe[2], busy_pipe[2];

static void poller(unsigned long *count)
{
	struct pollfd pfd = { .fd = quiet_pipe[0], .events = POLLIN };
	int64_t before = now_ns(), waited;

	(void)count;
	CHECK(poll(&pfd, 1, 250) == 0, "poll: %s", strerror(errno));
	waited = now_ns() - before;
	CHECK(waited >= 249000000, "waited %ld ns", (long)waited);
}

static void reader(unsigned long *count)
{
	unsigned long value;

	CHECK(read(busy_pipe[0], &value, sizeof(value)) == sizeof(value), "read: %s", strerror(errno));
	CHECK(value == *count, "read %lu, not %lu", value, *count);
}

int main(int argc, char **argv)
{
	struct sigaction alarm_action = { .sa_handler = on_alarm, .sa_flags = SA_ONSTACK | SA_RESTART };
	struct sigaction prof_action = { .sa_handler = on_prof, .sa_flags = SA_RESTART };
	struct sigaction timer_action = { .sa_sigaction = on_timer, .sa_flags = SA_SIGINFO | SA_RESTART };
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL,
				  .sigev_signo = SIG_TIMER,
				  .sigev_value.sival_int = 4711 };
	struct itimerspec every = { { 0, 10000000 }, { 0, 10000000 } }, idle = { { 3600, 0 }, { 3600, 0 } };
	struct itimerval real = { { 0, 20000 }, { 0, 20000 } }, prof = { { 0, 50000 }, { 0, 50000 } };
	unsigned long *counts, alarms_before, ticks_before, sent = 0;
	timer_t timer, idle_timer;
	pid_t children[3];
	sigset_t set;
	stack_t ss;

	wl_start(argc, argv);
	counts = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	altstack = malloc(ALTSTACK);
	ss = (stack_t){ .ss_sp = altstack, .ss_size = ALTSTACK };
	TRY(sigaltstack(&ss, NULL));
	TRY(pipe2(quiet_pipe, O_CLOEXEC));
	TRY(pipe2(busy_pipe, O_CLOEXEC));
	signal(SIGUSR1, SIG_IGN);
	children[0] = child(sleeper, &counts[0], "sleeper");
	children[1] = child(poller, &counts[1], "poller");
	children[2] = child(reader, &counts[2], "reader");

	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	sigaddset(&set, SIG_QUEUED);
	sigaddset(&set, SIG_NEVER);
	TRY(sigprocmask(SIG_SETMASK, &set, NULL));
	sigaddset(&alarm_action.sa_mask, SIGUSR1);
	TRY(sigaction(SIGALRM, &alarm_action, NULL));
	TRY(sigaction(SIGPROF, &prof_action, NULL));
	TRY(sigaction(SIG_TIMER, &timer_action, NULL));
	TRY(timer_create(CLOCK_MONOTONIC, &event, &timer));
	TRY(timer_settime(timer, 0, &every, NULL));
	event.sigev_signo = SIG_NEVER;
	TRY(timer_create(CLOCK_REALTIME, &event, &idle_timer));
	TRY(timer_settime(idle_timer, 0, &idle, NULL));
	TRY(setitimer(ITIMER_REAL, &real, NULL));
	TRY(setitimer(ITIMER_PROF, &prof, NULL));
	wl_ready();

	for (unsigned long period = 0; !wl_stopping; period++) {
		struct itimerspec left;

		alarms_before = alarms;
		ticks_before = timer_ticks;
		queue_values(period);
		for (int i = 0; i < 10; i++) {
			wl_sleep_us(10000);
			check_actions();
			TRY(write(busy_pipe[1], &sent, sizeof(sent)));
			sent++;
		}
		take_values(period);
		CHECK(alarms > alarms_before, "the interval timer is silent");
		CHECK(timer_ticks > ticks_before, "the POSIX timer is silent");
		TRY(timer_gettime(idle_timer, &left));
		CHECK(left.it_value.tv_sec > 0 && left.it_value.tv_sec < 3600 && left.it_interval.tv_sec == 3600,
		      "idle timer has %ld s left", left.it_value.tv_sec);
		for (int i = 0; i < 3; i++)
			CHECK(waitpid(children[i], NULL, WNOHANG) == 0, "child %d is gone", i);
		wl_line("tick %lu alarms %lu timer %lu sleeps %lu polls %lu reads %lu", period + 1, alarms,
			timer_ticks, counts[0], counts[1], counts[2]);
	}
	for (int i = 0; i < 3; i++) {
		kill(children[i], SIGTERM);
		waitpid(children[i], NULL, 0);
	}
	wl_ok();
}
