// SPDX-License-Identifier: Apache-2.0
/*
 * terminals OUTFILE: pseudo-terminals, as a program has them that runs others in a terminal.
 *
 * A child leads a session on a terminal of its own, in the foreground, and answers each line that the root types. On
 * another terminal lines and output wait that nobody reads for a while, and a third one is raw and nearly full. No
 * signal may come that nobody has sent.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <termios.h>

#include "workload.h"

#define RAW_BYTES 7000

struct terminal {
	int master, slave;
	char name[32];
};

static void on_unwanted(int sig)
{
	wl_fail("signal %d (%s)", sig, strsignal(sig));
}

static void set_modes(int fd, tcflag_t lflags, tcflag_t oflags)
{
	struct termios t;

	TRY(tcgetattr(fd, &t));
	t.c_lflag = lflags;
	t.c_oflag = oflags;
	if (!(lflags & ICANON))
		t.c_iflag = 0;
	t.c_cc[VQUIT] = 'q' - '`';
	TRY(tcsetattr(fd, TCSANOW, &t));
}

static void check_modes(const struct terminal *t, tcflag_t lflags, tcflag_t oflags)
{
	struct termios now;
	char name[32];

	TRY(tcgetattr(t->slave, &now));
	CHECK(now.c_lflag == lflags && now.c_oflag == oflags && now.c_cc[VQUIT] == 'q' - '`', "%s: %x %x", t->name,
	      now.c_lflag, now.c_oflag);
	CHECK(!ptsname_r(t->master, name, sizeof(name)) && !strcmp(name, t->name), "%s, not %s", name, t->name);
	CHECK(!ttyname_r(t->slave, name, sizeof(name)) && !strcmp(name, t->name), "%s, not %s", name, t->name);
}

static void open_terminal(struct terminal *t)
{
	t->master = TRY(posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
	TRY(grantpt(t->master));
	TRY(unlockpt(t->master));
	CHECK(!ptsname_r(t->master, t->name, sizeof(t->name)), "ptsname_r");
	t->slave = TRY(open(t->name, O_RDWR | O_NOCTTY | O_CLOEXEC));
}

static void read_all(int fd, char *to, size_t len)
{
	size_t at = 0;
	ssize_t n;

	while (at < len) {
		n = read(fd, to + at, len - at);
		if (n < 0 && errno == EINTR)
			continue;
		CHECK(n > 0, "%zd after %zu of %zu: %s", n, at, len, strerror(errno));
		at += n;
	}
}

static void expect(int fd, const char *wanted)
{
	char got[256] = {};

	read_all(fd, got, strlen(wanted));
	CHECK(!memcmp(got, wanted, strlen(wanted)), "\"%s\", not \"%s\"", got, wanted);
}

static void type(int fd, const char *text)
{
	CHECK(write(fd, text, strlen(text)) == (ssize_t)strlen(text), "%s", strerror(errno));
}

/* Answers each line. Its terminal, session and size are what they are said to be. */
static void answer(const struct terminal *t)
{
	struct winsize size;
	char line[128], reply[192];
	ssize_t n;
	int fd;

	for (;;) {
		n = read(0, line, sizeof(line) - 1);
		if (n < 0 && errno == EINTR)
			continue;
		CHECK(n > 0, "%zd: %s", n, strerror(errno));
		line[n] = '\0';
		CHECK(tcgetsid(0) == getpid() && tcgetpgrp(0) == getpid() && getsid(0) == getpid(), "session %d, group %d",
		      tcgetsid(0), tcgetpgrp(0));
		fd = TRY(open("/dev/tty", O_RDWR | O_CLOEXEC));
		TRY(ioctl(fd, TIOCGWINSZ, &size));
		CHECK(!strcmp(ttyname(0), t->name), "%s, not %s", ttyname(0), t->name);
		n = snprintf(reply, sizeof(reply), "%d:%s", size.ws_col, line);
		CHECK(write(fd, reply, n) == n, "%s", strerror(errno));
		close(fd);
	}
}

static pid_t start_child(const struct terminal *t)
{
	pid_t pid = TRY(fork());

	if (pid)
		return pid;
	TRY(prctl(PR_SET_PDEATHSIG, SIGKILL));
	signal(SIGWINCH, SIG_DFL);
	TRY(setsid());
	TRY(ioctl(t->slave, TIOCSCTTY, 0));
	for (int fd = 0; fd < 3; fd++)
		TRY(dup2(t->slave, fd));
	close(t->slave);
	close(t->master);
	answer(t);
	_exit(1);
}

static char raw[2][RAW_BYTES];

static void fill_raw(const struct terminal *t, unsigned long period)
{
	for (int i = 0; i < RAW_BYTES; i++) {
		raw[0][i] = wl_mix(period + i);
		raw[1][i] = wl_mix(period * 3 + i);
	}
	for (int at = 0; at < RAW_BYTES; at += 500) {
		CHECK(write(t->master, raw[0] + at, 500) == 500, "%s", strerror(errno));
		CHECK(write(t->slave, raw[1] + at, 500) == 500, "%s", strerror(errno));
	}
}

static void take_raw(const struct terminal *t)
{
	static char got[RAW_BYTES];

	read_all(t->slave, got, RAW_BYTES);
	CHECK(!memcmp(got, raw[0], RAW_BYTES), "input differs");
	read_all(t->master, got, RAW_BYTES);
	CHECK(!memcmp(got, raw[1], RAW_BYTES), "output differs");
}

int main(int argc, char **argv)
{
	static const int unwanted[] = { SIGHUP, SIGINT, SIGQUIT, SIGTTIN, SIGTTOU, SIGWINCH };
	struct terminal session, waits, full;
	struct winsize size = { .ws_row = 25 };
	char line[128];
	pid_t child;
	int status;

	wl_start(argc, argv);
	for (size_t i = 0; i < sizeof(unwanted) / sizeof(*unwanted); i++)
		signal(unwanted[i], on_unwanted);
	open_terminal(&session);
	open_terminal(&waits);
	open_terminal(&full);
	set_modes(session.slave, ICANON | ISIG | IEXTEN, 0);
	set_modes(waits.slave, ICANON | ECHO | ISIG | IEXTEN, OPOST | ONLCR);
	set_modes(full.slave, 0, 0);
	child = start_child(&session);
	wl_ready();
	for (unsigned long period = 1; !wl_stopping; period++) {
		type(waits.master, "one\ntwo\nthre");
		type(waits.slave, "shown\n");
		fill_raw(&full, period);
		for (int i = 0; i < 5; i++) {
			size.ws_col = period % 500 + 1;
			TRY(ioctl(session.master, TIOCSWINSZ, &size));
			snprintf(line, sizeof(line), "line %lu of %d\n", period, i);
			type(session.master, line);
			snprintf(line, sizeof(line), "%d:line %lu of %d\n", size.ws_col, period, i);
			expect(session.master, line);
			wl_sleep_us(20000);
		}
		type(waits.master, "e\n");
		expect(waits.slave, "one\n");
		expect(waits.slave, "two\n");
		expect(waits.slave, "three\n");
		/* What was typed is shown; where between it the output is depends on who came first. */
		read_all(waits.master, line, strlen("one\r\ntwo\r\nthree\r\nshown\r\n"));
		take_raw(&full);
		check_modes(&session, ICANON | ISIG | IEXTEN, 0);
		check_modes(&waits, ICANON | ECHO | ISIG | IEXTEN, OPOST | ONLCR);
		check_modes(&full, 0, 0);
		CHECK(waitpid(child, &status, WNOHANG) == 0, "the child ended: %x", status);
		wl_line("tick %lu", period);
	}
	kill(child, SIGKILL);
	TRY(waitpid(child, &status, 0));
	wl_ok();
}
