/*
 * selves OUTFILE [SEED]: processes and threads that come, go and change what they are at random, and know it.
 *
 * Of each thread its name, priority, policy, processors, mask, alternate stack, slack and what is queued for it; of each
 * process its actions, limits, umask, directory, credentials, group, timers and more. Whatever is not as it was left is
 * a FAIL.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <sys/fsuid.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include "workload.h"

#define THREADS 4
#define CHILDREN 3
#define TIMERS 6
#define ACTIONS 8
#define FIRST_RT (SIGRTMIN + 4) /* of those whose actions are set */
#define QUEUED (SIGRTMAX - 3)   /* is blocked by all, and waited for by who has queued it */

struct thread {
	uint64_t state;
	char name[16];
	int nice, policy, ioprio;
	unsigned long slack;
	cpu_set_t cpus;
	sigset_t mask;
	stack_t stack;
	char space[16384];
	int queued, taken; /* numbers of what it has sent itself */
	pthread_t id;
};

static struct process {
	mode_t umask;
	int directory;
	struct rlimit files, core;
	gid_t egid, fsgid;
	int subreaper, dumpable, keepcaps, thp, leads;
	unsigned long personality;
	struct sigaction actions[ACTIONS];
	timer_t timers[TIMERS];
	long intervals[TIMERS]; /* seconds; -1: there is none */
	long real;              /* the interval of ITIMER_VIRTUAL, in microseconds */
} self;

static struct thread *others[THREADS];
static volatile int asked; /* the threads are to end */
static cpu_set_t all_cpus;

static unsigned long pick(struct thread *t, unsigned long n)
{
	t->state += 0x9e3779b97f4a7c15ULL;
	return wl_mix(t->state) % n;
}

static void on_signal(int sig)
{
	(void)sig;
}

static void on_another(int sig)
{
	(void)sig;
}

static const char *directory(int which)
{
	static char path[4200];

	snprintf(path, sizeof(path), "%s.d%d", wl_path, which);
	return path;
}

/* ---------------------------------------------------------------- threads */

static void check_thread(struct thread *t)
{
	char name[16];
	cpu_set_t cpus;
	sigset_t mask, pending;
	stack_t stack;

	TRY(prctl(PR_GET_NAME, name));
	CHECK(!strcmp(name, t->name), "%s, not %s", name, t->name);
	errno = 0;
	CHECK(getpriority(PRIO_PROCESS, 0) == t->nice, "nice %d, not %d", getpriority(PRIO_PROCESS, 0), t->nice);
	CHECK(sched_getscheduler(0) == t->policy, "policy %d, not %d", sched_getscheduler(0), t->policy);
	CHECK(syscall(SYS_ioprio_get, 1, 0) == t->ioprio, "ioprio %lx, not %x", syscall(SYS_ioprio_get, 1, 0), t->ioprio);
	CHECK((unsigned long)prctl(PR_GET_TIMERSLACK) == t->slack, "slack %d, not %lu", prctl(PR_GET_TIMERSLACK), t->slack);
	TRY(sched_getaffinity(0, sizeof(cpus), &cpus));
	CHECK(CPU_EQUAL(&cpus, &t->cpus), "other processors");
	pthread_sigmask(SIG_BLOCK, NULL, &mask);
	for (int sig = 1; sig < 65; sig++)
		CHECK(sigismember(&mask, sig) == sigismember(&t->mask, sig), "signal %d", sig);
	TRY(sigaltstack(NULL, &stack));
	CHECK(stack.ss_flags == t->stack.ss_flags && (stack.ss_flags == SS_DISABLE || stack.ss_sp == t->stack.ss_sp),
	      "another stack");
	TRY(sigpending(&pending));
	CHECK(sigismember(&pending, QUEUED) == (t->queued > t->taken), "%d were sent, %d taken", t->queued, t->taken);
}

static void change_thread(struct thread *t)
{
	struct sched_param none = { 0 };
	siginfo_t info = { .si_code = SI_QUEUE };
	struct timespec no_time = { 0 };
	sigset_t queued;
	int sig;

	switch (pick(t, 9)) {
	case 0:
		snprintf(t->name, sizeof(t->name), "self %lu", pick(t, 1000));
		TRY(prctl(PR_SET_NAME, t->name));
		return;
	case 1:
		t->nice += pick(t, 2) && t->nice < 15 ? 1 : t->nice > -10 ? -1 : 0;
		TRY(setpriority(PRIO_PROCESS, 0, t->nice));
		return;
	case 2:
		t->policy = (int[]){ SCHED_OTHER, SCHED_BATCH }[pick(t, 2)];
		TRY(sched_setscheduler(0, t->policy, &none));
		return;
	case 3:
		CPU_ZERO(&t->cpus);
		if (pick(t, 2))
			t->cpus = all_cpus;
		else
			for (int cpu = pick(t, CPU_SETSIZE);; cpu = (cpu + 1) % CPU_SETSIZE)
				if (CPU_ISSET(cpu, &all_cpus)) {
					CPU_SET(cpu, &t->cpus);
					break;
				}
		TRY(sched_setaffinity(0, sizeof(t->cpus), &t->cpus));
		return;
	case 4:
		sig = FIRST_RT + pick(t, ACTIONS);
		(pick(t, 2) ? sigaddset : sigdelset)(&t->mask, sig);
		pthread_sigmask(SIG_SETMASK, &t->mask, NULL);
		return;
	case 5:
		t->stack.ss_sp = t->space;
		t->stack.ss_size = sizeof(t->space);
		t->stack.ss_flags = pick(t, 2) ? SS_DISABLE : 0;
		TRY(sigaltstack(&t->stack, NULL));
		return;
	case 6:
		t->slack = 1000 + pick(t, 100000);
		TRY(prctl(PR_SET_TIMERSLACK, t->slack));
		return;
	case 7:
		t->ioprio = 2 << 13 | pick(t, 8);
		TRY(syscall(SYS_ioprio_set, 1, 0, t->ioprio));
		return;
	default:
		if (pick(t, 2) && t->queued - t->taken < 20) {
			info.si_value.sival_int = t->queued++;
			TRY(syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), QUEUED, &info));
		} else if (t->queued > t->taken) {
			sigemptyset(&queued);
			sigaddset(&queued, QUEUED);
			while ((sig = sigtimedwait(&queued, &info, &no_time)) < 0)
				CHECK(errno == EINTR, "%s", strerror(errno));
			CHECK(info.si_value.sival_int == t->taken, "%d came, not %d", info.si_value.sival_int, t->taken);
			t->taken++;
		}
	}
}

static void know(struct thread *t)
{
	TRY(prctl(PR_GET_NAME, t->name));
	t->nice = getpriority(PRIO_PROCESS, 0);
	t->policy = TRY(sched_getscheduler(0));
	t->ioprio = TRY(syscall(SYS_ioprio_get, 1, 0));
	t->slack = TRY(prctl(PR_GET_TIMERSLACK));
	TRY(sched_getaffinity(0, sizeof(t->cpus), &t->cpus));
	pthread_sigmask(SIG_BLOCK, NULL, &t->mask);
	TRY(sigaltstack(NULL, &t->stack));
	t->queued = t->taken = 0;
}

static void *run(void *argument)
{
	struct thread *t = argument;

	know(t);
	while (!asked && !wl_stopping && pick(t, 300)) {
		change_thread(t);
		check_thread(t);
		if (!pick(t, 4))
			wl_sleep_us(1 + pick(t, 3000));
	}
	return NULL;
}

/* ---------------------------------------------------------------- processes */

static void check_process(void)
{
	char here[4200], wanted[4200];
	struct sigaction action;
	struct itimerspec left;
	struct itimerval real;
	struct rlimit limit;
	mode_t mask = umask(077);

	umask(mask);
	CHECK(mask == self.umask, "umask %o, not %o", mask, self.umask);
	CHECK(getcwd(here, sizeof(here)) && realpath(directory(self.directory), wanted) && !strcmp(here, wanted),
	      "in %s, not in %d", here, self.directory);
	TRY(getrlimit(RLIMIT_NOFILE, &limit));
	CHECK(limit.rlim_cur == self.files.rlim_cur, "%lu files", (long)limit.rlim_cur);
	TRY(getrlimit(RLIMIT_CORE, &limit));
	CHECK(limit.rlim_cur == self.core.rlim_cur, "%lu of core", (long)limit.rlim_cur);
	CHECK(getegid() == self.egid, "egid %d, not %d", getegid(), self.egid);
	CHECK((gid_t)setfsgid(-1) == self.fsgid, "fsgid %d, not %d", setfsgid(-1), self.fsgid);
	int subreaper;
	TRY(prctl(PR_GET_CHILD_SUBREAPER, &subreaper));
	CHECK(subreaper == self.subreaper, "subreaper %d", subreaper);
	CHECK(prctl(PR_GET_KEEPCAPS) == self.keepcaps, "keepcaps %d", prctl(PR_GET_KEEPCAPS));
	CHECK(prctl(PR_GET_DUMPABLE) == self.dumpable, "dumpable %d, not %d", prctl(PR_GET_DUMPABLE), self.dumpable);
	CHECK(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == self.thp, "thp %d", prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0));
	CHECK((unsigned long)personality(~0UL) == self.personality, "personality %x", personality(~0UL));
	CHECK((getpgid(0) == getpid()) == self.leads, "group %d", getpgid(0));
	for (int i = 0; i < ACTIONS; i++) {
		TRY(sigaction(FIRST_RT + i, NULL, &action));
		CHECK(action.sa_handler == self.actions[i].sa_handler && action.sa_flags == self.actions[i].sa_flags,
		      "action %d", i);
		for (int sig = 1; sig < 65; sig++)
			CHECK(sigismember(&action.sa_mask, sig) == sigismember(&self.actions[i].sa_mask, sig), "%d", sig);
	}
	for (int i = 0; i < TIMERS; i++)
		if (self.intervals[i] >= 0) {
			TRY(timer_gettime(self.timers[i], &left));
			CHECK(left.it_interval.tv_sec == self.intervals[i], "timer %d: %ld", i, (long)left.it_interval.tv_sec);
		}
	TRY(getitimer(ITIMER_VIRTUAL, &real));
	CHECK(real.it_interval.tv_sec == self.real, "%ld s, not %ld", (long)real.it_interval.tv_sec, self.real);
}

static void change_process(struct thread *t)
{
	struct sigaction *action;
	struct sigevent event = { .sigev_notify = SIGEV_NONE };
	struct itimerspec spec = { 0 };
	struct itimerval real = { 0 };
	int i;

	switch (pick(t, 13)) {
	case 0: self.umask = pick(t, 512); umask(self.umask); return;
	case 1: TRY(chdir(directory(self.directory = pick(t, 3)))); return;
	case 2: self.files.rlim_cur = 100 + pick(t, 500); TRY(setrlimit(RLIMIT_NOFILE, &self.files)); return;
	case 3: self.core.rlim_cur = pick(t, 1000) * 4096; TRY(setrlimit(RLIMIT_CORE, &self.core)); return;
	case 4:
		/* of this thread alone, as the library would ask all of them */
		if (pick(t, 2)) {
			TRY(syscall(SYS_setresgid, -1, self.egid = pick(t, 3) * 1234, -1));
			self.fsgid = self.egid;
		} else {
			setfsgid(self.fsgid = pick(t, 3) * 1000);
		}
		self.dumpable = prctl(PR_GET_DUMPABLE);
		return;
	case 5: TRY(prctl(PR_SET_CHILD_SUBREAPER, self.subreaper ^= 1)); return;
	case 6: TRY(prctl(PR_SET_KEEPCAPS, self.keepcaps ^= 1)); return;
	case 7: TRY(prctl(PR_SET_DUMPABLE, self.dumpable = pick(t, 2))); return;
	case 8: TRY(prctl(PR_SET_THP_DISABLE, self.thp ^= 1, 0, 0, 0)); return;
	case 9: TRY(personality(self.personality ^= ADDR_NO_RANDOMIZE)); return;
	case 10:
		i = pick(t, ACTIONS);
		action = &self.actions[i];
		action->sa_handler = (void (*[])(int)){ SIG_IGN, SIG_DFL, on_signal, on_another }[pick(t, 4)];
		action->sa_flags = (pick(t, 2) ? SA_RESTART : 0) | (pick(t, 2) ? SA_ONSTACK : 0) | (pick(t, 2) ? SA_NODEFER : 0);
		sigemptyset(&action->sa_mask);
		for (int n = pick(t, 4); n; n--)
			sigaddset(&action->sa_mask, 1 + pick(t, 30));
		sigdelset(&action->sa_mask, SIGKILL);
		sigdelset(&action->sa_mask, SIGSTOP);
		TRY(sigaction(FIRST_RT + i, action, NULL));
		TRY(sigaction(FIRST_RT + i, NULL, action));
		return;
	case 11:
		i = pick(t, TIMERS);
		if (self.intervals[i] < 0) {
			TRY(timer_create(pick(t, 2) ? CLOCK_MONOTONIC : CLOCK_REALTIME, &event, &self.timers[i]));
			self.intervals[i] = 0;
		} else if (pick(t, 3)) {
			spec.it_interval.tv_sec = self.intervals[i] = pick(t, 5000);
			spec.it_value.tv_sec = 100 + pick(t, 100);
			TRY(timer_settime(self.timers[i], 0, &spec, NULL));
		} else {
			TRY(timer_delete(self.timers[i]));
			self.intervals[i] = -1;
		}
		return;
	default:
		real.it_interval.tv_sec = self.real = pick(t, 9);
		real.it_value.tv_sec = 1000;
		TRY(setitimer(ITIMER_VIRTUAL, &real, NULL));
	}
}

static void end_threads(void)
{
	asked = 1;
	for (int i = 0; i < THREADS; i++)
		if (others[i]) {
			pthread_join(others[i]->id, NULL);
			free(others[i]);
			others[i] = NULL;
		}
	asked = 0;
}

static void begin_thread(struct thread *t)
{
	int i = pick(t, THREADS);

	if (others[i]) {
		if (pthread_tryjoin_np(others[i]->id, NULL))
			return;
		free(others[i]);
	}
	others[i] = calloc(1, sizeof(struct thread));
	others[i]->state = pick(t, 1L << 62);
	CHECK(!pthread_create(&others[i]->id, NULL, run, others[i]), "no thread");
}

static void live(struct thread *t, int child)
{
	int children = 0, status;

	for (long n = 1; !wl_stopping && !(child && n > 250); n++) {
		change_thread(t);
		check_thread(t);
		change_process(t);
		check_process();
		if (!pick(t, 10))
			begin_thread(t);
		if (!pick(t, 3))
			wl_sleep_us(1 + pick(t, 4000));
		if (child)
			continue;
		if (n % 50 == 0)
			wl_line("tick %ld", n / 50);
		while (waitpid(-1, &status, WNOHANG) > 0) {
			children--;
			CHECK(!status, "a child ended with %x", status);
		}
		if (children < CHILDREN && !pick(t, 20)) {
			end_threads(); /* one that has threads is not to be forked: others may hold a lock of malloc() */
			children++;
			if (!TRY(fork())) {
				prctl(PR_SET_PDEATHSIG, SIGKILL);
				t->state = wl_mix(t->state + getpid());
				if (pick(t, 2))
					TRY(setpgid(0, 0));
				self.leads = getpgid(0) == getpid();
				self.subreaper = self.keepcaps = 0; /* neither goes to children, or to threads */
				TRY(prctl(PR_SET_KEEPCAPS, 0));
				for (int i = 0; i < TIMERS; i++)
					self.intervals[i] = -1;
				self.real = 0;
				know(t);
				self.dumpable = prctl(PR_GET_DUMPABLE);
				live(t, 1);
				end_threads();
				_exit(0);
			}
		}
	}
}

int main(int argc, char **argv)
{
	static struct thread first;
	int status;

	wl_start(argc, argv);
	first.state = wl_arg(argc, argv, 2, 1);
	sigset_t queued;
	sigemptyset(&queued);
	sigaddset(&queued, QUEUED);
	pthread_sigmask(SIG_BLOCK, &queued, NULL);
	TRY(sched_getaffinity(0, sizeof(all_cpus), &all_cpus));
	umask(0);
	for (int i = 0; i < 3; i++)
		CHECK(!mkdir(directory(i), 0777) || errno == EEXIST, "%s", strerror(errno));
	TRY(chdir(directory(0)));
	self.umask = umask(022);
	self.umask = 022;
	TRY(getrlimit(RLIMIT_NOFILE, &self.files));
	TRY(getrlimit(RLIMIT_CORE, &self.core));
	self.core.rlim_cur = 0;
	TRY(setrlimit(RLIMIT_CORE, &self.core));
	self.dumpable = prctl(PR_GET_DUMPABLE);
	self.thp = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
	self.personality = personality(~0UL);
	self.leads = getpgid(0) == getpid();
	for (int i = 0; i < ACTIONS; i++)
		TRY(sigaction(FIRST_RT + i, NULL, &self.actions[i]));
	for (int i = 0; i < TIMERS; i++)
		self.intervals[i] = -1;
	know(&first);
	wl_ready();
	live(&first, 0);
	end_threads();
	while (wait(&status) > 0)
		CHECK(!status, "a child ended with %x", status);
	check_process();
	wl_ok();
}
