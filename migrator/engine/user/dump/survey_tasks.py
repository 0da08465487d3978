"""What of the processes of a running tree cannot be carried: one sentence each, before anything is stopped."""

from __future__ import annotations

import functools
import itertools
import os
import signal
from collections.abc import Collection, Iterator

from migrator.engine.spawn import LOW_END
from migrator.engine.user.dump.mappings import obstacle
from migrator.engine.user.dump.parasite import is_left_over
from migrator.engine.user.dump.process import Process
from migrator.engine.user.dump.process_tree import ProcessTree
from migrator.linux import confinement, procfs, sys
from migrator.linux.namespaces import of_its_own
from migrator.linux.remote import BATCH_SIGNALS

NAMESPACES = ("mnt", "pid", "net", "ipc", "uts", "user", "cgroup")
SHARED = {
    sys.KCMP_VM: "its address space (vfork in progress?)",
    sys.KCMP_FILES: "its table of descriptors (CLONE_FILES)",
    sys.KCMP_FS: "its working directory (CLONE_FS)",
    sys.KCMP_SIGHAND: "its signal handlers (CLONE_SIGHAND)",
    sys.KCMP_IO: "its I/O context (CLONE_IO)",
}
_SHARED_BY_THREADS = {sys.KCMP_FS: "a working directory", sys.KCMP_FILES: "a table of descriptors"}
_MADE_SHARED = (sys.KCMP_FILES, sys.KCMP_FS, sys.KCMP_SIGHAND)  # by clone(2), and of no task by mere chance
_IOPRIO_CLASS_SHIFT = 13
_IO_FLUSHER = 0x00180000  # PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE
_SPECULATION_DENIED = (
    "thread mitigated",
    "thread force mitigated",
    "conditional disabled",
    "conditional force disabled",
)
_ORDER = {0: 0, 1: -1, 2: 1, 3: 1}
_GONE = (FileNotFoundError, ProcessLookupError)


def of_tree(tree: ProcessTree, *, container: bool) -> Iterator[str]:
    """What is wrong with the tree as a whole. `container`: the namespaces of its root are carried with it."""
    if not container:
        yield from _strange_namespaces(tree.root)
    yield from _shared(tree)
    for process in tree.processes.values():
        if process.pid != tree.root:
            yield from _exit_signal(tree, process)


def _strange_namespaces(root: int) -> Iterator[str]:
    """A plain tree is restarted in the namespaces of the host: one that is isolated would lose that in silence."""
    try:
        other = of_its_own(root, NAMESPACES)
    except _GONE:
        return
    if other:
        yield (
            f"pid {root} is in {', '.join(other)} namespaces of its own, which only a container of `migrator run`"
            " takes along"
        )


def _shared(tree: ProcessTree) -> Iterator[str]:
    """What processes share that is each one's own after a restart."""
    pids = [p.pid for p in tree.living]
    for resource, what in SHARED.items():
        users = pids if resource != sys.KCMP_IO else [pid for pid in pids if _has_io_context(pid)]
        try:
            ordered = sorted(users, key=functools.cmp_to_key(functools.partial(_compare, resource)))
            pairs = [(a, b) for a, b in itertools.pairwise(ordered) if not _compare(resource, a, b)]
        except OSError:
            continue  # one has ended: the next look tells
        for pair in pairs:
            a, b = sorted(pair)
            yield f"pid {b} shares {what} with pid {a}"


def of_born(tree: ProcessTree, process: Process) -> Iterator[str]:
    """What is wrong with one that was born since the tree was looked at as a whole, and how it was."""
    yield from _exit_signal(tree, process)
    try:
        parent = tree.processes.get(int(procfs.stat(process.pid)[4]))
        if parent is None or parent.zombie:
            return
        for resource in _MADE_SHARED:
            if sys.same(process.pid, parent.pid, resource):
                yield f"pid {process.pid} shares {SHARED[resource]} with pid {parent.pid}"
    except OSError:
        return  # one has ended


def _compare(resource: int, a: int, b: int) -> int:
    return _ORDER[sys.kcmp(a, b, resource)]


def _has_io_context(pid: int) -> bool:
    """Whether a process certainly has one: those that have none count as the same to kcmp(2)."""
    try:
        return bool(sys.ioprio_get(pid) >> _IOPRIO_CLASS_SHIFT)
    except OSError:
        return False


def _exit_signal(tree: ProcessTree, process: Process) -> Iterator[str]:
    try:
        fields = procfs.stat(process.pid)
    except _GONE:
        return
    number = int(fields[38])
    if number not in (-1, signal.SIGCHLD) and int(fields[4]) in tree.processes:
        yield f"pid {process.pid} tells its parent of its end by signal {number} and not SIGCHLD (clone(2))"


NUMA_POLICY = "has a NUMA policy (set_mempolicy(2), mbind(2)), which is not carried"
SCHED_DEADLINE = 6
UNDER_DEADLINE = "runs under SCHED_DEADLINE (sched(7)), whose times are not carried"
UNDER_SECCOMP = "runs under seccomp, whose filters cannot be carried"
CONFINED = "is confined by a security module as {} and migrator is not, so that its copy would not be"


def of_process(
    tree: ProcessTree, process: Process, state: dict[str, str], devices: Collection[int] | None = ()
) -> Iterator[str]:
    """What is wrong with one process; `devices`: of tmpfs mounts of the container's own, None to leave its mappings
    out, as of one that is tracked already. Raises FileNotFoundError, ProcessLookupError if it has ended."""
    pid = process.pid
    who = f"pid {pid} ({state['Name']})"
    if state["State"][0] == "Z":
        if int(state["Threads"]) > 1:
            yield f"{who}: its main thread has ended while others run, which is not carried yet"
        return
    if state.get("TracerPid", "0") != "0":
        yield f"{who} is traced by pid {state['TracerPid']}: detach the debugger first"
    if state["State"][0] == "T":
        number = int(procfs.stat(pid)[52])
        if number not in (0, signal.SIGSTOP):
            yield f"{who} {stopped_by(number)}"
    for kind in NAMESPACES:
        if os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/{tree.root}/ns/{kind}"):
            yield f"{who} is in another {kind} namespace than the root task {tree.root}"
    for kind in ("time", "pid"):
        if os.readlink(f"/proc/{pid}/ns/{kind}") != _for_children(pid, kind):
            yield f"{who}: its children will be in another {kind} namespace (unshare(2)), which is not carried"
    if os.readlink(f"/proc/{pid}/ns/time") != os.readlink(f"/proc/{tree.root}/ns/time"):
        yield f"{who} is in another time namespace than the root task {tree.root}"
    with open(f"/proc/{pid}/exe", "rb") as file:
        if file.read(5)[4:5] != b"\x02":
            yield f"{who} is a 32-bit program, which is not carried yet"
    yield from _threads(pid, who, state)
    if devices is not None:
        yield from _mappings(pid, who, devices)


def _for_children(pid: int, kind: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}_for_children")
    except FileNotFoundError:
        return ""  # a pid namespace that nobody is in yet: not its own, at any rate


def stopped_by(number: int) -> str:
    """What to say of a process that is stopped by another signal than SIGSTOP."""
    name = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
    return f"is stopped by {name}, which is not carried: let it go on (SIGCONT), or stop it by SIGSTOP"


def _threads(pid: int, who: str, state: dict[str, str]) -> Iterator[str]:
    shared = int(state["ShdPnd"], 16)
    for tid in procfs.tids(pid):
        try:
            own = procfs.status(pid, tid) if tid != pid else state
            yield from _thread(pid, tid, who, own, shared)
        except _GONE:
            if tid == pid:
                raise
            continue  # only this thread has ended


def _thread(pid: int, tid: int, who: str, own: dict[str, str], shared: int) -> Iterator[str]:
    thread = f"{who}: its thread {tid}" if tid != pid else who
    if own.get("Seccomp", "0") != "0":
        yield f"{thread} {UNDER_SECCOMP}"
    if label := confinement.other_label(tid):
        yield f"{thread} {CONFINED.format(label)}"
    for key in ("Speculation_Store_Bypass", "SpeculationIndirectBranch"):
        if own.get(key, "") in _SPECULATION_DENIED:
            yield f"{thread} has {key} switched off (PR_SET_SPECULATION_CTRL), which is not carried"
    if os.sched_getscheduler(tid) & ~os.SCHED_RESET_ON_FORK == SCHED_DEADLINE:
        yield f"{thread} {UNDER_DEADLINE}"
    if int(procfs.stat(pid, tid)[9]) & _IO_FLUSHER == _IO_FLUSHER:
        yield f"{thread} is there to write out memory (PR_SET_IO_FLUSHER), which is not carried"
    waiting = shared | int(own["SigPnd"], 16)
    if all(waiting >> (number - 1) & 1 for number in BATCH_SIGNALS):
        names = ", ".join(signal.Signals(number).name for number in BATCH_SIGNALS)
        yield f"{thread}: all of {names} wait to be taken, one of which is needed for saving it"
    if tid == pid:
        return
    for resource, what in _SHARED_BY_THREADS.items():
        if not sys.same(pid, tid, resource):
            yield f"{thread} has {what} of its own (unshare(2)), which is not carried"
    for kind in NAMESPACES:
        if os.readlink(f"/proc/{pid}/task/{tid}/ns/{kind}") != os.readlink(f"/proc/{pid}/ns/{kind}"):
            yield f"{thread} is in another {kind} namespace than its process"


def _mappings(pid: int, who: str, devices: Collection[int]) -> Iterator[str]:
    if any(policy != "default" for policy in procfs.numa_policies(pid)):
        yield f"{who} {NUMA_POLICY}"
    flags = procfs.vm_flags(pid)
    vmas = procfs.maps(pid)
    for vma in vmas:
        reason = obstacle(pid, vma, flags.get(vma.start, frozenset()), devices)
        if reason:
            yield f"{who}: mapping {vma.start:#x}-{vma.end:#x} is {reason}, which cannot be carried"
        if vma.start < LOW_END and vma.path != "[vsyscall]" and not is_left_over(pid, vma.start, vma.end):
            yield f"{who}: mapping {vma.start:#x} lies where the restarting code must stand (below 4 MiB)"
