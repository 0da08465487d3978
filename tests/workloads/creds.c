// SPDX-License-Identifier: Apache-2.0
/*
 * creds OUTFILE [UID GID]: everything a process is, apart from what it holds.
 *
 * Takes on unusual values for ids, groups, umask, limits, directory, name, nice value, scheduling,
 * affinity, personality and prctl(2) settings, then watches that none of them changes.
 */
#define _GNU_SOURCE
#include <grp.h>
#include <sched.h>
#include <sys/auxv.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "workload.h"

struct creds {
	uid_t uid[3];
	gid_t gid[3], groups[8];
	int ngroups, umask, nice, policy, personality, subreaper, no_new_privs, dumpable, ioprio;
	int keepcaps, pdeathsig, thp_disable;
	long timerslack;
	unsigned long auxv[4];
	struct rlimit limits[RLIM_NLIMITS];
	char cwd[1024], name[16], exe[1024], cmdline[1024], environ[2048], oom_score_adj[16];
	char caps[512];
	cpu_set_t affinity;
};

static void slurp(const char *path, char *to, size_t size)
{
	int fd = TRY(open(path, O_RDONLY | O_CLOEXEC));
	ssize_t n = TRY(read(fd, to, size - 1));

	to[n] = 0;
	close(fd);
}

static struct creds creds_now(void)
{
	static struct creds c;
	char status[4096], *line, *to = c.caps;

	memset(&c, 0, sizeof(c));
	TRY(getresuid(&c.uid[0], &c.uid[1], &c.uid[2]));
	TRY(getresgid(&c.gid[0], &c.gid[1], &c.gid[2]));
	c.ngroups = TRY(getgroups(8, c.groups));
	c.umask = umask(0);
	umask(c.umask);
	errno = 0;
	c.nice = getpriority(PRIO_PROCESS, 0);
	c.policy = sched_getscheduler(0);
	c.personality = personality(0xffffffff);
	TRY(prctl(PR_GET_CHILD_SUBREAPER, &c.subreaper));
	TRY(prctl(PR_GET_PDEATHSIG, &c.pdeathsig));
	c.no_new_privs = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0);
	c.dumpable = prctl(PR_GET_DUMPABLE);
	c.keepcaps = prctl(PR_GET_KEEPCAPS);
	c.thp_disable = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);
	c.timerslack = prctl(PR_GET_TIMERSLACK);
	c.ioprio = syscall(SYS_ioprio_get, 1, 0);
	c.auxv[0] = getauxval(AT_PHDR);
	c.auxv[1] = getauxval(AT_ENTRY);
	c.auxv[2] = getauxval(AT_RANDOM);
	c.auxv[3] = getauxval(AT_BASE);
	for (int i = 0; i < RLIM_NLIMITS; i++)
		TRY(getrlimit(i, &c.limits[i]));
	CHECK(getcwd(c.cwd, sizeof(c.cwd)), "%s", strerror(errno));
	TRY(prctl(PR_GET_NAME, c.name));
	TRY(readlink("/proc/self/exe", c.exe, sizeof(c.exe) - 1));
	slurp("/proc/self/cmdline", c.cmdline, sizeof(c.cmdline));
	slurp("/proc/self/environ", c.environ, sizeof(c.environ));
	slurp("/proc/self/oom_score_adj", c.oom_score_adj, sizeof(c.oom_score_adj));
	TRY(sched_getaffinity(0, sizeof(c.affinity), &c.affinity));
	slurp("/proc/self/status", status, sizeof(status));
	for (line = strtok(status, "\n"); line; line = strtok(NULL, "\n"))
		if (!strncmp(line, "Cap", 3))
			to += sprintf(to, "%s ", line);
	return c;
}

#define SAME(field)                                                                          \
	CHECK(!memcmp(&is->field, &was->field, sizeof(is->field)), #field " changed: %.60s, was %.60s", \
	      (const char *)&is->field, (const char *)&was->field)
#define SAME_INT(field) CHECK(is->field == was->field, "%ld, was %ld", (long)is->field, (long)was->field)

static void creds_compare(const struct creds *is, const struct creds *was)
{
	for (int i = 0; i < 3; i++) {
		SAME_INT(uid[i]);
		SAME_INT(gid[i]);
	}
	SAME_INT(ngroups);
	for (int i = 0; i < 8; i++)
		SAME_INT(groups[i]);
	SAME_INT(umask);
	SAME_INT(nice);
	SAME_INT(policy);
	SAME_INT(personality);
	SAME_INT(subreaper);
	SAME_INT(pdeathsig);
	SAME_INT(no_new_privs);
	SAME_INT(dumpable);
	SAME_INT(keepcaps);
	SAME_INT(thp_disable);
	SAME_INT(timerslack);
	SAME_INT(ioprio);
	for (int i = 0; i < 4; i++)
		SAME_INT(auxv[i]);
	for (int i = 0; i < RLIM_NLIMITS; i++) {
		CHECK(is->limits[i].rlim_cur == was->limits[i].rlim_cur, "limit %d: %lu, was %lu", i,
		      is->limits[i].rlim_cur, was->limits[i].rlim_cur);
		CHECK(is->limits[i].rlim_max == was->limits[i].rlim_max, "hard limit %d: %lu, was %lu", i,
		      is->limits[i].rlim_max, was->limits[i].rlim_max);
	}
	SAME(cwd);
	SAME(name);
	SAME(exe);
	SAME(cmdline);
	SAME(environ);
	SAME(oom_score_adj);
	SAME(caps);
	SAME(affinity);
}

int main(int argc, char **argv)
{
	struct rlimit files = { 777, 1234 }, core = { 0, 0 };
	gid_t groups[] = { 4242, 4243, 4244 };
	struct sched_param param = { 0 };
	struct creds was, is;
	const char *directory;
	cpu_set_t one;
	long uid, gid;

	wl_start(argc, argv);
	uid = wl_arg(argc, argv, 2, -1);
	gid = wl_arg(argc, argv, 3, uid);
	directory = wl_beside("directory");
	if (mkdir(directory, 0755) < 0)
		CHECK(errno == EEXIST, "%s: %s", directory, strerror(errno));
	TRY(chdir(directory));
	TRY(setrlimit(RLIMIT_NOFILE, &files));
	TRY(setrlimit(RLIMIT_CORE, &core));
	TRY(sched_setscheduler(0, SCHED_BATCH, &param));
	TRY(setpriority(PRIO_PROCESS, 0, 7));
	TRY(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 6));
	CPU_ZERO(&one);
	CPU_SET(sched_getcpu(), &one);
	TRY(sched_setaffinity(0, sizeof(one), &one));
	TRY(prctl(PR_SET_NAME, "odd (name) x"));
	TRY(prctl(PR_SET_TIMERSLACK, 123456));
	TRY(prctl(PR_SET_CHILD_SUBREAPER, 1));
	TRY(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0));
	TRY(personality(ADDR_NO_RANDOMIZE));
	umask(0137);
	int fd = TRY(open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC));
	TRY(write(fd, "321", 3));
	close(fd);
	if (uid >= 0) {
		TRY(setgroups(3, groups));
		TRY(setresgid(gid, gid, gid));
		TRY(setresuid(uid, uid, uid));
		TRY(prctl(PR_SET_DUMPABLE, 1));
		TRY(prctl(PR_SET_PDEATHSIG, SIGUSR1));
	}
	TRY(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	was = creds_now();
	wl_ready();
	for (unsigned long ticks = 1; !wl_stopping; ticks++) {
		is = creds_now();
		creds_compare(&is, &was);
		wl_line("tick %lu uid %d nice %d", ticks, is.uid[0], is.nice);
		wl_sleep_us(50000);
	}
	wl_ok();
}
