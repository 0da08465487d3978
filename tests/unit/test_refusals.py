"""Whatever the freeze or the restart refuses is said by survey or preflight before, or is about what comes later."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path

ENGINE = Path(__file__).parents[2] / "migrator/engine/user"
SURVEY = (
    *(
        "descriptors/survey.py",
        "descriptors/survey_sockets.py",
        "descriptors/survey_links.py",
        "descriptors/sockets.py",
    ),
    *("dump/survey.py", "dump/survey_tasks.py", "dump/tmpfs.py", "dump/mqueues.py", "descriptors/classify.py"),
)
# What is refused in other words than those of the survey (given), or cannot be known by it (told why).
OTHERWISE = {
    "\0: \0": "survey: an Obstacle, of the same code",
    "\0: the pipe is \0 by a process outside of the tree": "survey: outside of the tree; start it with its input and",
    "\0: the other end of this unix socket is outside of the tree": "survey: a unix socket whose other end is held by",
    "\0: the kernel does not list this unix socket (CONFIG_UNIX_DIAG?)": "survey: the partners of unix sockets cannot",
    "pid \0: mapping \0 is \0, which cannot be carried": "survey: an obstacle, of the same code",
    "pid \0: mapping \0 is of System V memory of the host": "survey: is System V shared memory of the host",
    "pid \0 shares its address space with its parent": "survey:  shares ",
    "the main thread of pid \0 has ended while others run": "survey: its main thread has ended while others run",
    "\0: more than \0 files in tmpfs cannot be carried": "survey:  files lie in tmpfs, ",
    "pid \0: its thread \0 has system calls turned into signals (PR_SET_SYSCALL_USER_DISPATCH), "
    "which is not carried": "later: the kernel tells of a stopped thread alone",
    "passing": "survey: runs under seccomp, whose filters cannot be carried",
    "descriptors cannot be saved: \0": "later: a call that failed",
    "descriptors cannot be collected: \0": "later: a call that failed",
    "\0: a connection of \0 in TCP state \0": "later: states of a moment, of a socket that nobody accepted",
    "\0: \0 connections to \0 wait to be accepted": "later: they are accepted in a moment",
    "\0: \0 connections wait to be accepted": "later: they are accepted in a moment",
    "\0: urgent data (MSG_OOB) waits in this connection": "later: it is taken in a moment",
    "\0: a connection within this host: \0": "later: of the connection as it is then",
    "\0: packets keep coming in": "later: of the connection as it is then",
    "\0: \0 bytes wait in this connection and \0 are not acknowledged, but \0 and \0 could be read": "later: as above",
    "\0: \0 bytes wait in this connection": "later: as above",
    "\0: descriptors are on their way through this unix socket (SCM_RIGHTS)": "later: they are taken in a moment",
    "\0: credentials are on their way through this unix socket (SCM_CREDENTIALS)": "later: they are taken in a moment",
    "\0: a message of more than \0 bytes is on its way": "later: it is taken in a moment",
    "pid \0 has ended": "later: it ends when it likes",
    "pid \0 denies itself memory that can be executed (PR_SET_MDWE)": "later: before the freeze; the workload runs on",
    "pid \0: the page at \0 cannot be read: whoever touches it gets SIGBUS "
    "(a memory error, or UFFDIO_POISON), which is not carried": "later: when it is read, ahead of the freeze",
    "pid \0 (\0)\0 \0": "later: by Landlock, which no survey can see",
    "\0: this epoll instance polls busily (EPIOCSPARAMS), which is not carried": "later: of a descriptor of ours alone",
    "no process can be made beside pid \0: \0": "later: a call that failed",
    "no process can be made beside pid \0: it ended (\0)": "later: a call that failed",
    "pid \0: userfaultfd(2) fails inside it: \0": "later: before the freeze; the workload runs on",
    "pid \0: \0": "later: a call that failed",
    "pid \0 was stopped by signal \0 meanwhile, which is not carried": "later: it says so",
    "pid \0 (tid \0) does not stop within \0 s": "later: an uninterruptible sleep has no end that is known",
    "final() before instrument()": "later: a mistake of the caller's",
    "pid \0 is an ancestor of this very program": "later: before the freeze; the workload runs on",
    "a task ended while it was stopped: \0": "later: it was killed",
    "the POSIX message queue /\0 is used from outside of the tree": "later: by one that the survey has not found",
    "waits": "later: what is transient, as it is then",
    "pid \0 cannot be moved to a cgroup of its own: \0": "later: before the freeze; the workload runs on",
    "pid \0 cannot be traced (tid \0)": "later: a debugger has come meanwhile",
}

# What the restart refuses, by module. "survey", "preflight": said before, in these words, by the source or by the
# destination. "image": of an image that no source writes. "host": a call that failed, or a host that has too little of
# something just then. "later": of what changed since. "early": ahead of the first round, so nothing was stopped.
OF_RESTART = {
    "clocks: the clock of the tasks would go back by \0 s: the wall clocks of the hosts differ": "early: with Tree",
    "clocks: the clocks of the source differ by \0 s and cannot be set here: \0": "early: with Tree",
    "spawn: clone3(2) with pid \0: \0": "host: a call",
    "spawn: pid \0 is taken on this host": "preflight: is taken on ",
    "anonymous: timerfd \0: \0": "host: a call",
    "epolls: pid \0 fd \0: a duplicate cannot be waited for (\0)": "host: a call",
    "epolls: pid \0 fd \0: fd \0 cannot be waited for (errno \0)": "host: a call",
    "files: \0 is something else here (mode \0, was \0)": "preflight: is something else",
    "files: \0 has \0 bytes here, the program is at offset \0": "preflight: is older than the one that the workload",
    "files: \0 is another device here": "survey: is a device with a state of its own, which cannot be carried",
    "files: a deleted file, once \0, cannot be made again: \0": "host: no file can be made there",
    "files: \0 cannot be opened: \0": "preflight: is missing",
    "files: \0: \0": "host: a call",
    "files: a deleted file that was opened with O_NOFOLLOW: \0": "host: a call",
    "files: a deleted file of \0 bytes, once \0: \0": "host: a call",
    "inet_restore: the other end of \0 to \0, which was closed, cannot be made: \0": "host: a call",
    "inet_restore: the connection to \0, which was being made, cannot be begun anew: \0": "host: no route",
    "inet_restore: \0 to \0: the end of the connection cannot be told to it": "host: a filter on loopback",
    "inet_restore: \0: an ended connection cannot be made": "host: a filter on loopback",
    "inet_restore: the socket \0\0 cannot be made: \0": "host: the address is in use there",
    "inet_restore: cannot listen on \0: \0": "host: a call",
    "inet_restore: \0: congestion control \0 is not there: \0": "preflight: congestion control ",
    "inet_restore: \0 to \0: \0 bytes that were not sent yet do not go into the connection: \0": "host: a call",
    "inotify: \0 cannot be watched (inotify): \0": "preflight: is missing",
    "locks: \0 cannot be locked: \0": "host: a call",
    "locks: \0 is locked by somebody else here": "later: somebody on that host",
    "pipes: \0 (file \0): other data waits in this FIFO here": "later: somebody there writes to it",
    "pipes: file \0: the pipe does not take what was in it": "host: a call",
    "pipes: a pipe does not take what was in it": "host: a call",
    "pipes: file \0: a pipe of \0 bytes cannot be made: \0": "host: what pipes may take of memory there",
    "private_root: a unix socket is bound to \0, which is no name": "image: names are absolute",
    "private_root: \0 is no socket here, but a unix socket was bound to it": "later: somebody there made something",
    "restore: pid \0 fd \0: pid \0 cannot be made its owner": "survey: its owner for signals (F_SETOWN) is pid ",
    "restore: \0: \0": "host: a call",
    "restore: the image has a terminal (/dev/pts/\0), which this engine does not carry": (
        "later: the kernel engine has saved it, for a host that has only the other one"
    ),
    "unix_restore: the unix socket \0 cannot be bound: \0": "preflight: is missing",
    "unix_restore: socket \0 does not take what was on its way to it": "host: a call",
    "backing: \0 is no regular file on this host": "preflight: has mode ",
    "backing: \0 belongs to user \0 on this host, and to user \0 where it was saved": "host: whose it is there",
    "restore: \0 (file \0) belongs to user \0 here, and to user \0 where it was saved": "host: whose it is there",
    "backing: \0 differs on this host: \0 bytes, build id \0; saved with \0 bytes, build id \0": (
        "preflight: is another "
    ),
    "backing: \0: \0 on this host": "preflight: is missing",
    "destination: \0 (\0)": "host: a call",
    "destination: the copy differs from what was saved: \0\0": "later: a fault of ours, which --verify finds",
    "destination: this processor lacks extended state that the tasks use: features \0, \0 bytes saved, \0 here": (
        "preflight: bytes of extended state"
    ),
    "destination: this is the image of a container, and only plain trees are taken here": "image: the caller's mistake",
    "destination: the vdso of this kernel differs from the one that the tasks were saved under": "preflight: (vdso)",
    "late_locks: locks cannot be taken in the copy: \0": "later: somebody else has them by now",
    "mappings: pid \0: contents for memory that is not mapped (\0 bytes)": "image: Vmas come first",
    "mappings: pid \0: writing memory at \0: \0": "preflight: memory of ",
    "mappings: pid \0: there are contents for \0, which lies beyond the end of the file that is mapped there": (
        "preflight: is another file"
    ),
    "process_tree: pid \0 was cloned and cannot be found": "host: it was killed",
    "process_tree: the root task ended before the freeze": "later: it ends when it likes",
    "process_tree: pid \0 has ended, and its parent \0 is not in the tree": "image: such zombies are left out",
    "process_tree: pid \0: its parent \0 is not in the tree": "image: a parent comes before its children",
    "restart_blocks: tid \0 ended while its wait was begun anew": "host: it was killed",
    "restart_blocks: tid \0 stopped with \0 while its wait was begun anew": "host: it was killed",
    "shm: shared memory of \0 bytes\0: \0": "preflight: memory of ",
    "shm: \0: \0": "host: a call",
    "stub: tid \0 ended at birth (wait status \0)": "host: it was killed",
    "stub: the kernel's own mappings differ: here \0, saved \0": "preflight: (vdso)",
    "stub: pid \0: descriptors did not arrive": "host: a call",
    "stub: pid \0: only some of \0 descriptors arrived": "host: a limit of the agent's",
    "stub: pid \0: descriptors arrived as \0": "host: a call",
    "mqueues: \0: only a container has queues of its own": "image: only a container's source writes them",
    "mqueues: \0: \0": "host: a call",
    "mqueues: POSIX message queue /\0: \0": "host: a call",
    "netlink: the netlink socket of port \0 cannot be made: \0": "host: a call",
    "stub: pid \0: \0: \0": "host: a call",
    "stub: pid \0: descriptor number \0 is above the limit of open files here": "preflight: open files (fs.nr_open)",
    "stub: pid \0: the vdso cannot be moved: \0": "early: with the first Vmas",
    "sysv: \0: only a container has System V objects of its own": "image: only a container's source writes them",
    "sysv: \0: \0": "host: a call",
    "task_setup: tid \0 stopped with \0 while it was set up": "host: it was killed",
    "task_setup: pid \0: \0 bytes of signal actions": "image: there are 64",
    "task_setup: pid \0: its capability bounding set has \0, which nothing can have that is restarted here": (
        "preflight: may not give its copies "
    ),
    "task_setup: pid \0: it would be under \0 here, as the agent is": "preflight: , and so would be the copy",
    "task_setup: pid \0: its credentials do not fit: \0 bytes": "image: 65536 groups at most",
    "tasks: pid \0: every signal there is waits for it": "survey:  wait to be taken, one of which is needed",
    "tasks: tid \0: \0: \0": "host: a call",
    "tasks: pid \0: resource limit \0 cannot be set to \0/\0: \0": "preflight: open files (fs.nr_open)",
    "tasks: \0, a working directory, cannot be made again: \0": "host: a call",
    "tasks: tid \0: scheduling parameters: \0": "host: a call",
    "tasks: pid \0: POSIX timer \0 came out as \0": "host: a call",
    "tasks: tid \0: no registers in the image": "image: every living task has a Cpu",
    "tasks: tid \0: extended state of \0 bytes: \0": "preflight: bytes of extended state",
    "tmpfs: \0 is no tmpfs of the container's own here": "image: mounts are those of its specification",
    "tmpfs: \0 in the tmpfs at \0 refers to a file of another": "image: no source writes that",
    "tmpfs: \0 in the tmpfs at \0: \0": "host: a call",
    "tmpfs: attribute \0 of \0 in the tmpfs at \0: \0": "host: a call",
    "tmpfs: the tmpfs at \0: \0": "host: a call",
}
PREFLIGHT = ("preflight.py", "admission.py")


def text_of(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)


def refusals(error: str) -> Iterator[tuple[str, str]]:
    """(module, text) of all that is raised as this error."""
    for path in sorted((*ENGINE.rglob("*.py"), *ENGINE.parent.glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == error:
                yield path.stem, text_of(node.args[0])


def said(files: Iterable[Path]) -> list[str]:
    out = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant) and isinstance(text := text_of(node), str):
                out.append(text)
    return out


def said_by_the_survey() -> list[str]:
    return said(ENGINE / name for name in SURVEY)


def test_every_refusal_of_the_freeze_has_its_check_in_the_survey() -> None:
    said, there = said_by_the_survey(), {text for _, text in refusals("CheckpointFailed")}
    assert len(there) > 30
    for text in there - set(OTHERWISE):
        words = max(text.split("\0"), key=len)
        assert any(words in one or one in words for one in said if len(one) > 12), f"the survey does not know: {text!r}"
    for text, how in OTHERWISE.items():
        assert text in there, f"refused no more: {text!r}"
        kind, _, words = how.partition(": ")
        assert kind == "later" or words.startswith("an ") or any(words in one for one in said), (text, how)


def test_every_refusal_of_the_restart_is_said_before_or_cannot_be_known() -> None:
    session = ENGINE.parents[1] / "session"
    by = {
        "preflight": said(session / name for name in PREFLIGHT),
        "survey": [*said_by_the_survey(), *said([ENGINE / "descriptors/survey_links.py"])],
    }
    there = {f"{module}: {text}" for error in ("RestartFailed", "Locked") for module, text in refusals(error)}
    assert there == set(OF_RESTART)
    for text, how in OF_RESTART.items():
        kind, _, words = how.partition(": ")
        assert kind in {"preflight", "survey", "image", "host", "later", "early"} and words, (text, how)
        assert kind not in by or any(words in one for one in by[kind]), (text, how)


def test_a_refusal_that_nobody_has_thought_of_is_noticed() -> None:
    text = "\0: a file of a kind that was invented today"
    near = difflib.get_close_matches(text, said_by_the_survey(), cutoff=0.9)
    assert not near and text not in OTHERWISE
