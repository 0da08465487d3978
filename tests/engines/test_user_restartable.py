"""States that were accepted and saved, and of which no restart came: an image that is whole restarts.

Each program builds its state, goes through a file onto another host, and checks what it can see of itself there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pidhosts import PidHost, Program, restore_from_file, save_to_file

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[PidHost, PidHost]]:
    with PidHost("a") as a, PidHost("b") as b:
        yield a, b


def restarted(
    source: str, hosts: tuple[PidHost, PidHost], folder: Path, *arguments: object, rounds: int = 2, back: bool = True
) -> None:
    """Save and kill, restart elsewhere, and back: the program must run on and end by saying that all was well."""
    a, b = hosts
    with Program(a, source, folder, *arguments) as moving:
        for here, there in ((a, b), (b, a))[: 1 + back]:
            save_to_file(moving, here, folder / "image", rounds=rounds)
            here.wait_until_empty()
            restore_from_file(moving, there, folder / "image")
            moving.check_alive_and_progressing(ticks=1)
        moving.finish()


TICKING = r"""
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		check();
		wl_line("tick %ld", n);
		wl_sleep_us(20000);
	}
	wl_ok();
}
"""


DELETED_NOFOLLOW = r"""
#include <sys/stat.h>
#include "workload.h"
static int fd, plain, dated;
static void check(void)
{
	char text[8] = "";
	struct stat status;

	CHECK(pread(fd, text, 8, 0) == 4 && !strcmp(text, "abc"), "%s", text);
	CHECK(fcntl(fd, F_GETFL) & O_NOFOLLOW, "flags %o", fcntl(fd, F_GETFL));
	TRY(pwrite(plain, "a", 1, 0));
	CHECK(lseek(fd, 0, SEEK_CUR) == 4, "offset");
	TRY(fstat(dated, &status));
	CHECK(status.st_mtim.tv_sec == 1234567 && status.st_mtim.tv_nsec == 89, "changed at %ld", status.st_mtim.tv_sec);
}
int main(int argc, char **argv)
{
	struct timespec times[2] = { { 1, 0 }, { 1234567, 89 } };
	char *name;

	wl_start(argc, argv);
	TRY(asprintf(&name, "%s.gone", argv[1]));
	fd = TRY(open(name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0640)); /* as Python's tempfile does */
	plain = TRY(open(name, O_RDWR));
	TRY(unlink(name));
	TRY(write(fd, "abc", 4));
	dated = TRY(open(name, O_RDWR | O_CREAT, 0600));
	TRY(unlink(name));
	TRY(write(dated, "abc", 4));
	TRY(futimens(dated, times));
"""


DELETED_DIRECTORY = r"""
#include <sys/stat.h>
#include "workload.h"
static void check(void)
{
	char name[4096];

	CHECK(!getcwd(name, sizeof(name)) && errno == ENOENT, "the directory has a name");
	CHECK(open("new", O_CREAT | O_WRONLY, 0600) < 0 && errno == ENOENT, "something can be made in it");
}
int main(int argc, char **argv)
{
	char *name;

	wl_start(argc, argv);
	TRY(asprintf(&name, "%s.folder", argv[1]));
	TRY(mkdir(name, 0700));
	TRY(chdir(name));
	TRY(rmdir(name));
"""


ZOMBIES = r"""
#include <sys/wait.h>
#include "workload.h"
static pid_t killed, ended;
static void check(void)
{
	siginfo_t info = { 0 };

	TRY(waitid(P_PID, killed, &info, WEXITED | WNOWAIT));
	CHECK(info.si_code == CLD_KILLED && info.si_status == SIGTERM, "%d %d", info.si_code, info.si_status);
	CHECK(getpgid(killed) == killed && getsid(killed) == killed, "group %d", getpgid(killed));
	TRY(waitid(P_PID, ended, &info, WEXITED | WNOWAIT));
	CHECK(info.si_code == CLD_EXITED && info.si_status == 7, "%d %d", info.si_code, info.si_status);
	CHECK(getpgid(ended) == ended && getsid(ended) == getsid(0), "group %d", getpgid(ended));
}
int main(int argc, char **argv)
{
	wl_start(argc, argv);
	killed = fork();
	if (!killed) {
		TRY(setsid());
		signal(SIGTERM, SIG_DFL);
		raise(SIGTERM);
	}
	ended = fork();
	if (!ended) {
		TRY(setpgid(0, 0));
		_exit(7);
	}
	wl_sleep_us(30000);
"""


CAPABILITIES = r"""
#include <grp.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/fsuid.h>
#include <sys/syscall.h>
#include <linux/capability.h>
#include <linux/securebits.h>
#include "workload.h"
#define BIT(n) (1U << (n))
static volatile int built;
static void caps(unsigned *effective, unsigned *permitted, unsigned *inheritable)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2] = { 0 };

	TRY(syscall(SYS_capget, &header, data));
	*effective = data[0].effective, *permitted = data[0].permitted, *inheritable = data[0].inheritable;
}
static void seen(void)
{
	unsigned e, p, i, bind = BIT(CAP_NET_BIND_SERVICE);

	caps(&e, &p, &i);
	CHECK(e == bind && p == (bind | BIT(CAP_CHOWN)) && i == bind, "capabilities %x %x %x", e, p, i);
	CHECK(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, CAP_NET_BIND_SERVICE, 0, 0) == 1, "ambient");
	CHECK(prctl(PR_GET_SECUREBITS) == (SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_NOROOT),
		"securebits %x", prctl(PR_GET_SECUREBITS));
	CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1, "no new privileges");
	CHECK(prctl(PR_CAPBSET_READ, CAP_SYS_BOOT) == 0, "bounding set");
}
static void drop(void) /* of this thread only: past the C library, which would do it for all */
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	unsigned bind = BIT(CAP_NET_BIND_SERVICE);
	struct __user_cap_data_struct data[2] = {
		{ bind, bind | BIT(CAP_CHOWN), bind }, { 0, 0, 0 },
	};

	TRY(prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED | SECBIT_NOROOT));
	TRY(prctl(PR_CAPBSET_DROP, CAP_SYS_BOOT));
	TRY(syscall(SYS_setresgid, 1234, 1234, 1234));
	TRY(syscall(SYS_setresuid, 1234, 1234, 1234));
	TRY(syscall(SYS_capset, &header, data));
	TRY(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_BIND_SERVICE, 0, 0));
	TRY(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
}
static void *run(void *unused)
{
	(void)unused;
	drop();
	built = 1;
	while (!wl_stopping) {
		seen();
		wl_sleep_us(5000);
	}
	return NULL;
}
static void check(void)
{
	CHECK(getuid() == 0 && !prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), "the main thread");
	CHECK(!prctl(PR_GET_SECUREBITS) && prctl(PR_CAPBSET_READ, CAP_SYS_BOOT) == 1, "the main thread");
	CHECK(setfsuid(-1) == 77 && setfsgid(-1) == 78, "fsuid %d fsgid %d", setfsuid(-1), setfsgid(-1));
}
int main(int argc, char **argv)
{
	pthread_t thread;

	wl_start(argc, argv);
	pthread_create(&thread, NULL, run, NULL);
	while (!built)
		usleep(1000);
	setfsgid(78);
	setfsuid(77);
"""


ENDED_CONNECTION = r"""
#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include "workload.h"
static int a, b;
static void check(void)
{
	struct pollfd poll_fd = { a, POLLIN | POLLRDHUP, 0 };
	char text[8] = "";

	CHECK(poll(&poll_fd, 1, 0) == 1 && poll_fd.revents & POLLRDHUP, "events %x", poll_fd.revents);
	CHECK(recv(a, text, 8, MSG_PEEK) == 4 && !strcmp(text, "abc"), "%s", text);
}
int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int listener;

	wl_start(argc, argv);
	listener = TRY(socket(AF_INET, SOCK_STREAM, 0));
	TRY(bind(listener, (void *)&address, length));
	TRY(listen(listener, 1));
	TRY(getsockname(listener, (void *)&address, &length));
	a = TRY(socket(AF_INET, SOCK_STREAM, 0));
	TRY(connect(a, (void *)&address, length));
	b = TRY(accept(listener, NULL, NULL));
	TRY(write(b, "abc", 4));
	TRY(shutdown(b, SHUT_WR));
	wl_sleep_us(10000);
	TRY(shutdown(a, SHUT_WR));
	close(b);
	close(listener);
	wl_sleep_us(30000);
"""


SHUT_FOR_READING = r"""
#include <arpa/inet.h>
#include <sys/socket.h>
#include "workload.h"
static int ends[2];
static void check(void)
{
	char byte;

	CHECK(recv(ends[1], &byte, 1, MSG_DONTWAIT) == 0, "%m"); /* the end, although the peer has not said it */
	CHECK(send(ends[1], "x", 1, 0) == 1 && recv(ends[0], &byte, 1, 0) == 1, "%m");
}
int main(int argc, char **argv)
{
	struct sockaddr_in6 any = { .sin6_family = AF_INET6 };
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(any);
	int listener;

	wl_start(argc, argv);
	listener = TRY(socket(AF_INET6, SOCK_STREAM, 0)); /* which sees its peer as ::ffff:127.0.0.1 */
	TRY(bind(listener, (struct sockaddr *)&any, length));
	TRY(listen(listener, 1));
	TRY(getsockname(listener, (struct sockaddr *)&any, &length));
	address.sin_port = any.sin6_port;
	ends[0] = TRY(socket(AF_INET, SOCK_STREAM, 0));
	TRY(connect(ends[0], (struct sockaddr *)&address, sizeof(address)));
	ends[1] = TRY(accept(listener, NULL, NULL));
	TRY(shutdown(ends[1], SHUT_RD));
"""


REUSEPORT = r"""
#include <arpa/inet.h>
#include <sys/socket.h>
#include "workload.h"
static int listener[2], datagrams[2];
static int flag(int fd, int name)
{
	int value = -1;
	socklen_t length = sizeof(value);

	TRY(getsockopt(fd, SOL_SOCKET, name, &value, &length));
	return value;
}
static void check(void)
{
	CHECK(!flag(listener[0], SO_REUSEPORT) && flag(listener[1], SO_REUSEPORT), "listeners");
	CHECK(flag(datagrams[0], SO_REUSEADDR) && !flag(datagrams[1], SO_REUSEADDR), "datagram sockets");
}
static void both(int fds[2], int kind, int name)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int one = 1;

	for (int i = 0; i < 2; i++) {
		fds[i] = TRY(socket(AF_INET, kind, 0));
		TRY(setsockopt(fds[i], SOL_SOCKET, name, &one, sizeof(one)));
		TRY(bind(fds[i], (void *)&address, length));
		TRY(getsockname(fds[i], (void *)&address, &length));
		if (kind == SOCK_STREAM)
			TRY(listen(fds[i], 3));
	}
}
int main(int argc, char **argv)
{
	int zero = 0;

	wl_start(argc, argv);
	both(listener, SOCK_STREAM, SO_REUSEPORT);
	both(datagrams, SOCK_DGRAM, SO_REUSEADDR);
	TRY(setsockopt(listener[0], SOL_SOCKET, SO_REUSEPORT, &zero, sizeof(zero)));
	TRY(setsockopt(datagrams[1], SOL_SOCKET, SO_REUSEADDR, &zero, sizeof(zero)));
"""


SELF_CONNECTED = r"""
#include <sys/socket.h>
#include <sys/un.h>
#include "workload.h"
static int fd;
static void check(void)
{
	char text[8] = "";

	CHECK(recv(fd, text, 8, 0) == 4 && !strcmp(text, "abc"), "%s", text);
	CHECK(send(fd, "abc", 4, 0) == 4, "%s", strerror(errno));
}
int main(int argc, char **argv)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int length;

	wl_start(argc, argv);
	length = snprintf(address.sun_path + 1, 90, "self-%d", getpid()) + 3;
	fd = TRY(socket(AF_UNIX, SOCK_DGRAM, 0));
	TRY(bind(fd, (void *)&address, length));
	TRY(connect(fd, (void *)&address, length));
	TRY(send(fd, "abc", 4, 0));
"""


PENDING = r"""
#include <pthread.h>
#include <sys/syscall.h>
#include "workload.h"
static const int signals[] = { SIGTRAP, SIGURG, SIGWINCH, SIGFPE, SIGUSR1, SIGSYS, SIGSEGV, 0, 0 };
static sigset_t all;
static volatile int built;
static pid_t tid;
static int number(int i)
{
	return signals[i] ? signals[i] : SIGRTMIN + 3;
}
static void queue(void)
{
	for (int i = 0; i < 9; i++) {
		union sigval value = { .sival_int = 100 + i };

		TRY(i & 1 || i > 6 ? sigqueue(getpid(), number(i), value) : kill(getpid(), number(i)));
	}
}
static void seen(pid_t sender, int code)
{
	struct timespec none = { 0, 0 };
	siginfo_t info;

	for (int i = 0; i < 9; i++) { /* not by the C library, which folds SI_TKILL */
		sigset_t one;

		sigemptyset(&one);
		sigaddset(&one, number(i));
		CHECK(syscall(SYS_rt_sigtimedwait, &one, &info, &none, 8) == number(i), "signal %d does not wait", number(i));
		CHECK(info.si_pid == sender && info.si_uid == getuid(), "of %d", info.si_pid);
		if (code)
			CHECK(info.si_code == code, "code %d of signal %d", info.si_code, info.si_signo);
		else if (i & 1 || i > 6)
			CHECK(info.si_code == SI_QUEUE && info.si_value.sival_int == 100 + i, "value");
		else
			CHECK(info.si_code == SI_USER, "code %d", info.si_code);
	}
}
static void own(void)
{
	for (int i = 0; i < 9; i++)
		TRY(syscall(SYS_tgkill, getpid(), tid, number(i)));
}
static void *run(void *unused)
{
	(void)unused;
	tid = syscall(SYS_gettid);
	own();
	built = 1;
	while (!wl_stopping)
		wl_sleep_us(5000);
	seen(getpid(), SI_TKILL);
	return NULL;
}
int main(int argc, char **argv)
{
	pthread_t thread;

	wl_start(argc, argv);
	sigfillset(&all);
	sigdelset(&all, SIGTERM);
	sigdelset(&all, SIGALRM);
	pthread_sigmask(SIG_BLOCK, &all, NULL);
	pthread_create(&thread, NULL, run, NULL);
	while (!built)
		usleep(1000);
	queue();
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		wl_line("tick %ld", n);
		usleep(20000);
	}
	pthread_join(thread, NULL);
	seen(getpid(), 0);
	wl_ok();
}
"""


MEMBARRIER = r"""
#include <sys/syscall.h>
#include "workload.h"
#define COMMANDS (1 << 4 | 1 << 8) /* private, rseq */
static void check(void)
{
	CHECK(syscall(SYS_membarrier, 1 << 9, 0, 0) == COMMANDS, "%lx", syscall(SYS_membarrier, 1 << 9, 0, 0));
	TRY(syscall(SYS_membarrier, 1 << 3, 0, 0));
}
int main(int argc, char **argv)
{
	wl_start(argc, argv);
	TRY(syscall(SYS_membarrier, 1 << 4, 0, 0));
	TRY(syscall(SYS_membarrier, 1 << 8, 0, 0));
"""


FORBIDDEN = r"""
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include "workload.h"
#define THREADS 40
static void *sleeper(void *policy)
{
	int late = *(int *)policy, tsc;

	if (late)
		TRY(prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_LATE, 0, 0));
	else
		TRY(prctl(PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0));
	while (!wl_stopping) {
		TRY(prctl(PR_GET_TSC, &tsc, 0, 0, 0));
		CHECK(tsc == (late ? PR_TSC_ENABLE : PR_TSC_SIGSEGV), "tsc %d", tsc);
		CHECK(TRY(prctl(PR_MCE_KILL_GET, 0, 0, 0, 0)) == (late ? 0 : 2), "late %d", late);
		usleep(1000);
	}
	return NULL;
}
static void check(void)
{
	int tsc, status;
	pid_t child;

	TRY(prctl(PR_GET_TSC, &tsc, 0, 0, 0));
	CHECK(tsc == PR_TSC_SIGSEGV, "tsc %d", tsc);
	CHECK(TRY(prctl(PR_MCE_KILL_GET, 0, 0, 0, 0)) == PR_MCE_KILL_EARLY, "mce");
	CHECK(TRY(prctl(68 /* PR_GET_MEMORY_MERGE */, 0, 0, 0, 0)) == 1, "merge");
	child = TRY(fork());
	if (!child) {
		__builtin_ia32_rdtsc();
		_exit(0);
	}
	TRY(waitpid(child, &status, 0));
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV, "status %x", status);
}
int main(int argc, char **argv)
{
	static int policies[2] = { 0, 1 };
	pthread_t thread;

	wl_start(argc, argv);
	TRY(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0));
	for (int i = 0; i < THREADS; i++)
		pthread_create(&thread, NULL, sleeper, &policies[i % 2]);
	TRY(prctl(PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0));
	TRY(prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0));
	TRY(prctl(67 /* PR_SET_MEMORY_MERGE */, 1, 0, 0, 0));
"""


LOCKED_LATER = r"""
#include <sys/mman.h>
#include "workload.h"
static int onfault;
static void check(void)
{
	unsigned char resident;
	char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(madvise(page, 4096, MADV_COLD) < 0 && errno == EINVAL, "a new page is not locked");
	TRY(mincore(page, 4096, &resident));
	CHECK((resident & 1) == !onfault, "a new page is %d", resident);
	TRY(munmap(page, 4096));
}
int main(int argc, char **argv)
{
	wl_start(argc, argv);
	onfault = argc > 2;
	TRY(mlockall(onfault ? MCL_FUTURE | MCL_ONFAULT : MCL_FUTURE));
"""


PROCESSOR = r"""
#include <arpa/inet.h>
#include <sys/socket.h>
#include "workload.h"
static int listener, datagrams;
static void check(void)
{
	int cpu, size = sizeof(cpu);

	TRY(getsockopt(listener, SOL_SOCKET, SO_INCOMING_CPU, &cpu, (socklen_t *)&size));
	CHECK(cpu == 1, "listener %d", cpu);
	TRY(getsockopt(datagrams, SOL_SOCKET, SO_INCOMING_CPU, &cpu, (socklen_t *)&size));
	CHECK(cpu == 7, "datagrams %d", cpu);
}
int main(int argc, char **argv)
{
	struct sockaddr_in here = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };

	wl_start(argc, argv);
	listener = TRY(socket(AF_INET, SOCK_STREAM, 0));
	TRY(setsockopt(listener, SOL_SOCKET, SO_INCOMING_CPU, &(int){ 1 }, sizeof(int)));
	TRY(bind(listener, (void *)&here, sizeof(here)));
	TRY(listen(listener, 1));
	datagrams = TRY(socket(AF_INET, SOCK_DGRAM, 0));
	TRY(bind(datagrams, (void *)&here, sizeof(here)));
	TRY(setsockopt(datagrams, SOL_SOCKET, SO_INCOMING_CPU, &(int){ 7 }, sizeof(int)));
"""


DATAGRAMS_SHUT = r"""
#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include "workload.h"
static int shut[3], stream;
static int flag(int fd, int name)
{
	int value = -1;
	socklen_t length = sizeof(value);

	TRY(getsockopt(fd, SOL_SOCKET, name, &value, &length));
	return value;
}
static void check(void)
{
	for (int how = 0; how < 3; how++) {
		struct pollfd poll_fd = { shut[how], POLLRDHUP, 0 };

		CHECK((send(shut[how], "a", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE) == (how != SHUT_RD), "%d: written", how);
		CHECK(poll(&poll_fd, 1, 0) >= 0 && !!(poll_fd.revents & POLLRDHUP) == (how != SHUT_WR), "%d: read", how);
		CHECK(flag(shut[how], SO_DONTROUTE) == 1, "route");
	}
	CHECK(flag(stream, SO_DONTROUTE) == 1, "route");
}
int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	int one = 1;

	wl_start(argc, argv);
	for (int how = 0; how < 3; how++) {
		shut[how] = TRY(socket(AF_INET, SOCK_DGRAM, 0));
		TRY(setsockopt(shut[how], SOL_SOCKET, SO_DONTROUTE, &one, sizeof(one)));
		address.sin_port = htons(9);
		TRY(connect(shut[how], (struct sockaddr *)&address, sizeof(address)));
		TRY(shutdown(shut[how], how));
	}
	stream = TRY(socket(AF_INET, SOCK_STREAM, 0));
	TRY(setsockopt(stream, SOL_SOCKET, SO_DONTROUTE, &one, sizeof(one)));
"""


LOCKS = r"""
#include <sys/mman.h>
#include "workload.h"
static int files[4], asked[2], told[2]; /* by name, opened again, without a name, a memfd */
static pid_t parent, child;
static void lock(int fd, int start, int kind)
{
	struct flock one = { .l_type = kind, .l_whence = SEEK_SET, .l_start = start, .l_len = 5 };

	TRY(fcntl(fd, F_SETLK, &one));
}
static void seen(int fd, int start, pid_t owner)
{
	struct flock one = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = start, .l_len = 1 };

	TRY(fcntl(fd, F_GETLK, &one));
	if (one.l_type == F_UNLCK)
		one.l_pid = 0;
	CHECK(one.l_pid == owner, "fd %d at %d: locked by %d, not by %d", fd, start, one.l_pid, owner);
}
static void others(void) /* of the child, which has the descriptors of its parent and no lock of its */
{
	char byte;

	for (int i = 0; i < 4; i++)
		if (i != 1)
			lock(files[i], 10, F_WRLCK);
	TRY(write(told[1], "x", 1));
	while (read(asked[0], &byte, 1) == 1) {
		for (int i = 0; i < 4; i++)
			seen(files[i], i == 1 ? 20 : 0, parent);
		TRY(write(told[1], "x", 1));
	}
	_exit(0);
}
static void check(void)
{
	char byte;

	for (int i = 0; i < 4; i++) {
		seen(files[i], 0, 0);
		seen(files[i], 10, child);
	}
	TRY(write(asked[1], "x", 1));
	TRY(read(told[0], &byte, 1));
}
int main(int argc, char **argv)
{
	char byte;

	wl_start(argc, argv);
	parent = getpid();
	files[0] = TRY(open(wl_beside("named"), O_RDWR | O_CREAT, 0600));
	files[1] = TRY(open(wl_beside("named"), O_RDWR));
	files[2] = TRY(open(wl_beside("gone"), O_RDWR | O_CREAT, 0600));
	TRY(unlink(wl_beside("gone")));
	files[3] = TRY(memfd_create("memory", 0));
	TRY(pipe(asked));
	TRY(pipe(told));
	for (int i = 0; i < 4; i++)
		lock(files[i], i == 1 ? 20 : 0, i == 1 ? F_RDLCK : F_WRLCK);
	child = fork();
	if (!child) {
		close(asked[1]);
		others();
	}
	TRY(read(told[0], &byte, 1));
"""


# argv[2] is how it was started last: each program of a memfd is started by another one
MEMFD_PROGRAM = r"""
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/wait.h>
#include "workload.h"
static int memory;
static void check(void)
{
	char *arguments[] = { "program", "none", "child", NULL };
	int status, fd = open("/proc/self/exe", O_WRONLY);

	CHECK(fd < 0 && errno == ETXTBSY, "its program can be written to: %d, %s", fd, strerror(errno));
	if (!fork()) {
		fexecve(memory, arguments, arguments + 3);
		_exit(errno);
	}
	TRY(wait(&status));
	CHECK(WEXITSTATUS(status) == 77, "started anew: %s", strerror(WEXITSTATUS(status)));
	TRY(pwrite(memory, "\177ELF", 4, 0)); /* by the descriptor that it was made with */
}
int main(int argc, char **argv)
{
	char *arguments[] = { argv[0], argv[1], "7", NULL };
	int from;

	if (argc > 2 && !strcmp(argv[2], "child"))
		return 77;
	if (argc > 2) {
		memory = atoi(argv[2]);
		wl_start(argc, argv);
	} else {
		from = open("/proc/self/exe", O_RDONLY);
		memory = dup2(memfd_create("program", 0), 7);
		while (sendfile(memory, from, NULL, 1 << 20) > 0)
			;
		close(from);
		fexecve(memory, arguments, arguments + 3);
		return 1;
	}
"""


# flag_is(): whether the mapping that begins there has a flag of smaps, or not (0); as smaps is another text in the
# copy, what was half read when it was saved tells nothing, and is read again
FLAGS = r"""
#include "workload.h"
static int flag_now(void *mapping, const char *flag)
{
	char line[256];
	unsigned long start = 0, at, end;
	int found = -1;
	FILE *file = fopen("/proc/self/smaps", "r");

	CHECK(file, "%m");
	while (fgets(line, sizeof(line), file)) {
		if (sscanf(line, "%lx-%lx ", &at, &end) == 2)
			start = at;
		if (start == (unsigned long)mapping && !strncmp(line, "VmFlags:", 8))
			found = !!strstr(line, flag);
	}
	fclose(file);
	return found;
}
static int flag_is(void *mapping, const char *flag, int expected)
{
	int as_expected = 0;

	for (int times = 0; times < 5 && !as_expected; times++)
		as_expected = flag_now(mapping, flag) == expected;
	return as_expected;
}
"""


DROPPABLE = (
    FLAGS
    + r"""
#include <sys/mman.h>
#define DROPPABLE 0x8 /* MAP_DROPPABLE, Linux 6.11 */
static char *memory;
static int known = 1;
static void check(void)
{
	CHECK(flag_is(memory, " dp", known), "droppable is not %d", known);
	CHECK(!*memory || *memory == 7, "contents");
}
int main(int argc, char **argv)
{
	wl_start(argc, argv);
	memory = mmap(NULL, 40960, PROT_READ | PROT_WRITE, DROPPABLE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED) { /* an older kernel */
		known = 0;
		memory = mmap(NULL, 40960, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	}
	*memory = 7;
"""
)


LOCKED_ONCE_TOUCHED = (
    FLAGS
    + r"""
#include <sys/mman.h>
#include <sys/prctl.h>
static char *memory;
static int huge_pages;
static void check(void)
{
	unsigned char there[10];

	CHECK(flag_is(memory, " lo", 1) && flag_is(memory, " lf", 1), "not locked once it is touched");
	TRY(mincore(memory, 40960, there));
	CHECK(there[0] & 1 && !(there[9] & 1), "all of it is there");
	CHECK(prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == huge_pages, "huge pages: not %d", huge_pages);
}
int main(int argc, char **argv)
{
	wl_start(argc, argv);
	memory = mmap(NULL, 40960, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	TRY(mlock2(memory, 40960, MLOCK_ONFAULT));
	*memory = 7;
	if (prctl(PR_SET_THP_DISABLE, 1, 2, 0, 0)) /* except where advised: Linux 6.18 */
		TRY(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	huge_pages = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
	CHECK(huge_pages > 0, "%m");
"""
)


LOOPBACK = r"""
#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include "workload.h"
#define LINE 3000
static unsigned long sent, received;
static int ends[2];
static char expected(unsigned long n)
{
	return n ^ n >> 7 ^ n >> 15;
}
static int waits(int fd, int events, int limit)
{
	struct pollfd one = { fd, events, 0 };

	return TRY(poll(&one, 1, limit));
}
static void fill(void)
{
	char line[LINE];
	long count;

	while (waits(ends[0], POLLOUT, 20)) {
		for (int i = 0; i < LINE; i++)
			line[i] = expected(sent + i);
		count = write(ends[0], line, LINE);
		CHECK(count > 0 || errno == EAGAIN, "%m");
		sent += count > 0 ? count : 0;
	}
}
static void drain(void)
{
	char data[LINE];
	long count;

	while (received < sent) {
		CHECK(waits(ends[1], POLLIN, 20000), "nothing comes any more: %lu of %lu", received, sent);
		count = TRY(read(ends[1], data, sizeof(data)));
		for (long i = 0; i < count; i++)
			CHECK(data[i] == expected(received + i), "byte %lu", received + i);
		received += count;
	}
}
int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int listener, size = argc > 2 ? atoi(argv[2]) : 0;

	wl_start(argc, argv);
	listener = TRY(socket(AF_INET, SOCK_STREAM, 0));
	if (size)
		TRY(setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size)));
	TRY(bind(listener, (void *)&address, length));
	TRY(listen(listener, 1));
	TRY(getsockname(listener, (void *)&address, &length));
	ends[0] = TRY(socket(AF_INET, SOCK_STREAM, 0));
	TRY(connect(ends[0], (void *)&address, length));
	ends[1] = TRY(accept(listener, NULL, NULL));
	TRY(fcntl(ends[0], F_SETFL, O_NONBLOCK));
	fill();
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		wl_line("tick %ld", n);
		wl_sleep_us(50000); /* full: it is saved here, most of the time */
		drain();
		fill();
	}
	wl_ok();
}
"""


GUARDS = r"""
#include <sys/mman.h>
#include <sys/wait.h>
#include "workload.h"
#define PAGE 4096L
#define INSTALL 102 /* MADV_GUARD_INSTALL, Linux 6.13 */
#define REMOVE 103
enum { SMALL, BIG, SHARED, LOCKED, AREAS };
static const long pages[AREAS] = { 64, 4096, 64, 64 };
static char *areas[AREAS];
static int ends[2], known = 1;
static long at;
static int is_guard(char *page)
{
	char byte;

	if (write(ends[1], page, 1) != 1)
		return 1;
	TRY(read(ends[0], &byte, 1));
	return 0;
}
static void advise(int area, long page, int advice)
{
	if (known && madvise(areas[area] + page * PAGE, PAGE, advice))
		known = 0;
}
static void look(void)
{
	for (int i = 0; i < AREAS; i++)
		for (long n = 0; n < pages[i]; n += i == BIG && n > 70 ? 61 : 1) {
			char *page = areas[i] + n * PAGE;
			int guarded = known && (n == 1 || (i != LOCKED && n == 8 + at % 50));

			CHECK(is_guard(page) == guarded, "area %d page %ld: %d", i, n, !guarded);
			if (!guarded)
				CHECK(*page == (n == 1 || (n > 7 && n <= 58) ? *page : 7), "area %d page %ld: %d", i, n, *page);
		}
}
static void check(void) /* one guard stays where it is, another goes on from page to page */
{
	look();
	for (int i = 0; i < LOCKED; i++) {
		long page = 8 + at % 50;

		advise(i, page, REMOVE);
		areas[i][page * PAGE] = 9; /* it was zeros, and is written to at once */
		advise(i, 8 + (at + 1) % 50, INSTALL);
	}
	at++;
	look();
	for (int i = 0; known && i < LOCKED; i++)
		CHECK(areas[i][(8 + (at - 1) % 50) * PAGE] == 9, "area %d: what was written after its guard was gone", i);
}
int main(int argc, char **argv)
{
	wl_start(argc, argv);
	TRY(pipe(ends));
	for (int i = 0; i < AREAS; i++) {
		int flags = i == SHARED ? MAP_SHARED | MAP_ANONYMOUS : MAP_PRIVATE | MAP_ANONYMOUS;

		areas[i] = mmap(NULL, pages[i] * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
		memset(areas[i], 7, pages[i] * PAGE);
		advise(i, 1, INSTALL);
		if (i != LOCKED)
			advise(i, 8, INSTALL);
	}
	mlock(areas[LOCKED], pages[LOCKED] * PAGE); /* which fails at the guard, and locks it all the same */
	if (!fork()) { /* and is a guard in a child that was born with it */
		for (long n = 0;; n++) {
			CHECK(is_guard(areas[BIG] + PAGE) == known, "in the child");
			CHECK(is_guard(areas[BIG] + 8 * PAGE) == known, "in the child");
			CHECK(areas[BIG][3 * PAGE] == 7, "contents in the child");
			usleep(3000);
			if (getppid() == 1)
				_exit(0);
		}
	}
"""


PEEKED = r"""
#include <netinet/in.h>
#include <sys/socket.h>
#include "workload.h"
#define LOCAL_PORT_RANGE 51 /* IP_LOCAL_PORT_RANGE, Linux 6.3 */
static int pair[2], datagrams, ranged;
static int option(int fd, int level, int name)
{
	int value = -7;
	socklen_t length = sizeof(value);

	getsockopt(fd, level, name, &value, &length);
	return value;
}
static void check(void)
{
	char text[8] = "";

	CHECK(option(pair[0], SOL_SOCKET, SO_PEEK_OFF) == 2, "%d", option(pair[0], SOL_SOCKET, SO_PEEK_OFF));
	CHECK(recv(pair[0], text, 2, MSG_PEEK) == 2 && !strcmp(text, "cd"), "%s", text);
	TRY(setsockopt(pair[0], SOL_SOCKET, SO_PEEK_OFF, &(int){ 2 }, sizeof(int)));
	CHECK(option(datagrams, SOL_SOCKET, SO_PEEK_OFF) == 0, "%d", option(datagrams, SOL_SOCKET, SO_PEEK_OFF));
	CHECK(option(datagrams, IPPROTO_IP, LOCAL_PORT_RANGE) == ranged, "ports");
}
int main(int argc, char **argv)
{
	unsigned int range = 30000 | 40000U << 16;
	char text[2];

	wl_start(argc, argv);
	TRY(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	TRY(write(pair[1], "abcdef", 6));
	TRY(setsockopt(pair[0], SOL_SOCKET, SO_PEEK_OFF, &(int){ 0 }, sizeof(int)));
	TRY(recv(pair[0], text, 2, MSG_PEEK));
	datagrams = TRY(socket(AF_INET, SOCK_DGRAM, 0));
	TRY(setsockopt(datagrams, SOL_SOCKET, SO_PEEK_OFF, &(int){ 0 }, sizeof(int)));
	setsockopt(datagrams, IPPROTO_IP, LOCAL_PORT_RANGE, &range, sizeof(range));
	ranged = option(datagrams, IPPROTO_IP, LOCAL_PORT_RANGE);
"""


UNLINKED_SOCKET = r"""
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include "workload.h"
#define PIDFD_THREAD O_EXCL /* Linux 6.9 */
static int listener, thread;
static void check(void)
{
	struct sockaddr_un name;
	socklen_t length = sizeof(name);

	TRY(getsockname(listener, (struct sockaddr *)&name, &length));
	CHECK(strstr(name.sun_path, ".socket"), "%s", name.sun_path);
	CHECK(access(name.sun_path, F_OK) && errno == ENOENT, "it has a name again");
	CHECK(thread < 0 || fcntl(thread, F_GETFL) & PIDFD_THREAD, "flags %x", fcntl(thread, F_GETFL));
}
int main(int argc, char **argv)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX };

	wl_start(argc, argv);
	*strrchr(argv[1], '/') = 0;
	TRY(chdir(argv[1])); /* its whole path is too long for a name */
	strcpy(name.sun_path, "its.socket");
	listener = TRY(socket(AF_UNIX, SOCK_STREAM, 0));
	TRY(bind(listener, (struct sockaddr *)&name, sizeof(name)));
	TRY(listen(listener, 3));
	TRY(unlink(name.sun_path));
	thread = syscall(SYS_pidfd_open, getpid(), PIDFD_THREAD);
"""


RENAMED_SOCKETS = r"""
#include <sys/socket.h>
#include <sys/un.h>
#include "workload.h"
static const char *const bound[] = { "linked.1", "renamed.1" }, *const there[] = { "linked", "renamed" };
static int listeners[2];
static void check(void)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	socklen_t length;
	int client;

	for (int i = 0; i < 2; i++) {
		length = sizeof(name);
		TRY(getsockname(listeners[i], (struct sockaddr *)&name, &length));
		CHECK(!strcmp(name.sun_path, bound[i]), "%s", name.sun_path);
		CHECK(access(bound[i], F_OK) && errno == ENOENT, "%s is there", bound[i]);
		strcpy(name.sun_path, there[i]);
		client = TRY(socket(AF_UNIX, SOCK_STREAM, 0));
		TRY(connect(client, (struct sockaddr *)&name, sizeof(name)));
		TRY(close(TRY(accept(listeners[i], NULL, NULL))));
		TRY(close(client));
	}
}
int main(int argc, char **argv)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX };

	wl_start(argc, argv);
	*strrchr(argv[1], '/') = 0;
	TRY(chdir(argv[1]));
	for (int i = 0; i < 2; i++) {
		strcpy(name.sun_path, bound[i]);
		listeners[i] = TRY(socket(AF_UNIX, SOCK_STREAM, 0));
		TRY(bind(listeners[i], (struct sockaddr *)&name, sizeof(name)));
		TRY(listen(listeners[i], 3));
	}
	TRY(link(bound[0], there[0])); /* as supervisord does */
	TRY(unlink(bound[0]));
	TRY(rename(bound[1], there[1]));
"""


POLL_OF_A_USER = (
    r"""
#include <grp.h>
#include <poll.h>
#include <pthread.h>
#include "workload.h"
static int ends[2], asked[2];
static void *wait_for(void *unused)
{
	struct pollfd one = { ends[0], POLLIN, 0 };
	char c;

	(void)unused;
	for (;;) {
		CHECK(poll(&one, 1, 60000) == 1 && one.revents == POLLIN, "%x", one.revents);
		TRY(read(ends[0], &c, 1));
		TRY(write(asked[1], &c, 1));
	}
	return NULL;
}
static void check(void)
{
	char c;

	TRY(write(ends[1], "x", 1));
	TRY(read(asked[0], &c, 1));
}
int main(int argc, char **argv)
{
	pthread_t thread;

	wl_start(argc, argv);
	TRY(pipe(ends));
	TRY(pipe(asked));
	TRY(setgroups(0, NULL));
	TRY(setresgid(65534, 65534, 65534));
	TRY(setresuid(65534, 65534, 65534));
	pthread_create(&thread, NULL, wait_for, NULL);
"""
    + TICKING
)

LISTENER_OF_A_USER = (
    r"""
#include <sys/socket.h>
#include <sys/un.h>
#include "workload.h"
static int listener;
static void check(void)
{
	struct ucred who;
	socklen_t size = sizeof(who);

	TRY(getsockopt(listener, SOL_SOCKET, SO_PEERCRED, &who, &size));
	CHECK(who.uid == 65534 && who.gid == 65533, "%u %u", who.uid, who.gid);
}
int main(int argc, char **argv)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX };

	wl_start(argc, argv);
	listener = TRY(socket(AF_UNIX, SOCK_STREAM, 0));
	sprintf(name.sun_path + 1, "listener-%d", getpid());
	TRY(bind(listener, (struct sockaddr *)&name, sizeof(name)));
	TRY(setresgid(-1, 65533, -1));
	TRY(setresuid(-1, 65534, -1));
	TRY(listen(listener, 1));
	TRY(setresuid(-1, 0, -1));
	TRY(setresgid(-1, 0, -1));
"""
    + TICKING
)

STATES = {
    "a deleted file opened with O_NOFOLLOW": DELETED_NOFOLLOW,
    "a working directory that was deleted": DELETED_DIRECTORY,
    "zombies that lead groups and were killed": ZOMBIES,
    "a thread that kept some capabilities": CAPABILITIES,
    "a connection that has ended": ENDED_CONNECTION,
    "a connection shut down for reading, of IPv4 at one end": SHUT_FOR_READING,
    "flags that were cleared after bind": REUSEPORT,
    "a datagram socket connected to itself": SELF_CONNECTED,
    "signals that wait": PENDING,
    "a process registered for membarrier": MEMBARRIER,
    "what the processor may not do, and memory failures": FORBIDDEN,
    "sockets that want what one processor gets": PROCESSOR,
    "datagram sockets that are shut down": DATAGRAMS_SHUT,
    "a thread of an ordinary user that waits in poll": POLL_OF_A_USER,
    "a unix socket that an ordinary user made listen": LISTENER_OF_A_USER,
    "locks of a process and of its child": LOCKS,
    "a program in a memfd, which can be executed": MEMFD_PROGRAM,
    "memory that the kernel may drop": DROPPABLE,
    "memory that is locked once it is touched": LOCKED_ONCE_TOUCHED,
    "guard regions that come and go": GUARDS,
    "a socket whose name was removed, and a descriptor of a thread": UNLINKED_SOCKET,
    "sockets under other names than they were bound to": RENAMED_SOCKETS,
    "an offset to peek at, and a range of ports": PEEKED,
}


@pytest.mark.parametrize("state", STATES)
def test_it_is_saved_killed_and_restarted(state: str, hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    restarted(STATES[state] + TICKING * ("wl_ok" not in STATES[state]), hosts, tmp_path)


@pytest.mark.parametrize("how", [(), ("onfault",)], ids=["at once", "once touched"])
def test_memory_that_is_mapped_later_is_locked(
    how: tuple[str, ...], hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    restarted(LOCKED_LATER + TICKING, hosts, tmp_path, *how)


@pytest.mark.parametrize("size", [0, 4000, 20000])
def test_a_connection_within_the_tree_with_full_buffers(
    size: int, hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    restarted(LOOPBACK, hosts, tmp_path, size)


CHAIN = r"""
#include "workload.h"
static void check(void) { }
static void link_of(char *self, char *out, int depth, char *report)
{
	char text[16], *args[] = { self, out, text, report, NULL };

	if (!depth)
		TRY(write(atoi(report), "x", 1));
	else if (!fork()) { /* a program of its own each, as with shells that start shells */
		snprintf(text, sizeof(text), "%d", depth - 1);
		execv(self, args);
		_exit(1);
	}
	for (;;)
		pause();
}
int main(int argc, char **argv)
{
	char byte, report[16];
	int ready[2];

	if (argc > 2)
		link_of(argv[0], argv[1], atoi(argv[2]), argv[3]);
	wl_start(argc, argv);
	TRY(pipe(ready));
	snprintf(report, sizeof(report), "%d", ready[1]);
	if (!fork())
		link_of(argv[0], argv[1], 1100, report);
	TRY(read(ready[0], &byte, 1));
"""


def test_a_long_chain_of_processes(tmp_path: Path) -> None:
    with PidHost("c") as a, PidHost("d") as b:  # what is left of the chain ends with its hosts
        restarted(CHAIN + TICKING, (a, b), tmp_path, rounds=1, back=False)


MAPPINGS = r"""
#include <sys/mman.h>
#include "workload.h"
#define COUNT 30000
static char *base;
static void check(void)
{
	static int at;

	for (int i = 0; i < COUNT; i++)
		CHECK(*(int *)(base + 8192L * i) == i, "mapping %d: %d", i, *(int *)(base + 8192L * i));
	at = (at + 7) % COUNT; /* a border goes, and comes back */
	TRY(mprotect(base + 8192L * at, 4096, PROT_READ));
	TRY(mprotect(base + 8192L * at, 4096, PROT_READ | PROT_WRITE));
}
int main(int argc, char **argv)
{
	wl_start(argc, argv);
	base = mmap(NULL, 8192L * COUNT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (int i = 0; i < COUNT; i++) {
		*(int *)(base + 8192L * i) = i;
		TRY(mprotect(base + 8192L * i + 4096, 4096, i & 1 ? PROT_NONE : PROT_READ));
	}
"""


def test_tens_of_thousands_of_mappings(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    restarted(MAPPINGS + TICKING, hosts, tmp_path, rounds=1)
