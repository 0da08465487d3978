"""Two hosts that differ in their pids only: pid namespaces, each with a process 1 that runs an engine.

    with PidHost("a", tmp_path) as a, PidHost("b", tmp_path) as b, HostedWorkload(a, "counter", tmp_path) as w:
        moved = migrate(w, a, b)         # live, with rounds; the stream goes through a socket
        w.check_alive_and_progressing()

The source's tasks keep their pids while the destination's shells bear the same ones, as on two machines.
"""

from __future__ import annotations

import array
import contextlib
import copyreg
import hashlib
import itertools
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from migrator.engine.base import DestinationOptions, Phase, Round, SourceOptions, Survey
from migrator.engine.user.descriptors import fdinfo
from migrator.errors import Refused
from migrator.linux import cgroup, descriptors, file_locks, procfs
from migrator.linux.namespaces import CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, unshare
from migrator.testing.workloads import CACHE, CFLAGS, LIBS, SOURCES, Workload

_FIRST_PID = 3000
_serial = itertools.count()
copyreg.pickle(Refused, lambda error: (Refused, (error.reasons,)))


@dataclass
class Saved:
    """What came of the source's half of a migration."""

    survey: Survey
    rounds: list[Round]
    phases: list[Phase]
    cpu: float  # seconds of a processor, from freeze() to hold()


@dataclass
class Restored:
    root: int  # in the host's pid namespace
    phases: list[Phase]
    cpu: float  # seconds of a processor, from the end of the last round to hold()


@dataclass
class Moved:
    """One migration: phases in ms by name, the root's pid as the tests see it, and ms of processors for the freeze."""

    root: int
    rounds: list[Round]
    cpu: float = 0.0
    source: dict[str, float] = field(default_factory=dict)
    destination: dict[str, float] = field(default_factory=dict)


class Agent:
    """What runs inside a host: called by name from outside."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.source: Any = None
        self.destination: Any = None

    def start(self, command: list[str], stdout: str, stderr: str, first_pid: int) -> int:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(first_pid - 1))
        with open(stdout, "wb") as out, open(stderr, "wb") as err:
            self.child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        return self.child.pid

    def save(self, fd: int, pid: int, rounds: int, pause: float = 0.02) -> Saved:
        """Everything up to hold(); the stream is closed then."""
        from migrator.engine.user.dump.source import UserSource

        done = []
        options = SourceOptions(cgroup_name=f"{self.name}-{next(_serial)}")
        with UserSource(pid, fd, options) as source:
            survey = source.survey()
            source.instrument("user")
            for _ in range(rounds):
                done.append(source.round())
                time.sleep(pause)
            before = time.process_time()
            source.freeze()
            source.final()
            source.hold()
            cpu = time.process_time() - before
        os.close(fd)
        self.source = source
        return Saved(survey, done, source.phases, cpu)

    def release(self) -> None:
        self.source.release()
        # what the last restart of the tree left: nobody else knows this cgroup
        self.remove_cgroup()

    def thaw(self) -> None:
        self.source.thaw()

    def restore(self, fd: int) -> Restored:
        """build() and hold(): the tasks are complete, and frozen."""
        from migrator.engine.user.restore.destination import UserDestination

        options = DestinationOptions(cgroup_name=f"{self.name}-{next(_serial)}")
        before = time.process_time()

        def in_place(_number: int) -> None:
            nonlocal before
            before = time.process_time()

        try:
            with UserDestination(fd, options) as destination:
                destination.on_round = in_place
                root = destination.build()
                destination.hold()
                cpu = time.process_time() - before
        finally:
            os.close(fd)
        self.destination = destination
        return Restored(root, destination.phases, cpu)

    def resume(self) -> list[Phase]:
        self.destination.resume()
        shared = descriptions_shared_with(self.destination.pids)
        self.destination.tidy()
        assert not shared, f"what the copy closes does not end while it is open here: {shared[:5]}"
        return list(self.destination.phases)

    def settle(self) -> list[Phase]:
        """What another agent does if ours dies ahead of resume()."""
        from migrator import host
        from migrator.recovery import settle
        from migrator.recovery.journal import JournalHeader, Role

        made = self.destination
        facts = JournalHeader(migration="x", role=Role.DESTINATION, cgroup=made.cgroup, moves=made.moves)
        assert settle.thaw(facts, host.tools())
        made.tidy()
        return list(made.phases)

    def discard(self) -> None:
        self.destination.discard()

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of a test module in here."""
        return function(*args)

    def remove_cgroup(self) -> None:
        folder = cgroup.hierarchy().mountpoint / cgroup.PARENT
        for old in folder.glob(f"{self.name}-*"):
            with contextlib.suppress(OSError):
                old.rmdir()


def descriptions_shared_with(pids: Sequence[int]) -> list[str]:
    """Open file descriptions of other processes, which may run, that this one has open as well."""
    ours: dict[tuple[int, int], list[int]] = {}
    for fd in fdinfo.numbers(os.getpid()):
        with contextlib.suppress(OSError):  # the directory that was listed
            status = os.fstat(fd)
            ours.setdefault((status.st_dev, status.st_ino), []).append(fd)
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended, or closed something
            for number in fdinfo.numbers(pid):
                status = os.stat(f"/proc/{pid}/fd/{number}")
                here = ours.get((status.st_dev, status.st_ino), [])
                if any(descriptors.same_file(os.getpid(), fd, pid, number) for fd in here):
                    found.append(f"pid {pid} fd {number}: {os.readlink(f'/proc/{pid}/fd/{number}')}")
    return found


class PidHost:
    """A process 1 with a /proc of its own, and what it starts. Leaving the block ends all of it.

    own_network: also a loopback device of its own, as on two machines."""

    def __init__(self, label: str, *, own_network: bool = False) -> None:
        self.label = label
        self.own_network = own_network
        self.name = f"pidhost-{label}-{os.getpid()}-{next(_serial)}"
        self.pid = 0

    def __enter__(self) -> PidHost:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)  # answers are one message each
        self._keeper = os.fork()
        if self._keeper == 0:
            try:
                self._socket.close()
                _die_with_parent()
                unshare(CLONE_NEWPID | CLONE_NEWNS | (CLONE_NEWNET if self.own_network else 0))
                inner = os.fork()
                if inner == 0:
                    if self.own_network:
                        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
                    _serve(theirs, Agent(self.name))
                os.waitpid(inner, 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        theirs.close()
        self.pid = self.call("run", _outer_pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        for folder in (cgroup.hierarchy().mountpoint / cgroup.PARENT).glob(f"{self.name}-*"):
            with contextlib.suppress(OSError), cgroup.Cgroup.at(folder) as left:
                left.thaw()  # frozen tasks may not die
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid or self._keeper, signal.SIGKILL)
        os.waitpid(self._keeper, 0)
        Agent(self.name).remove_cgroup()

    def begin(self, method: str, *args: Any, fd: int = -1) -> None:
        """Have `method` begin. A descriptor of ours goes along as its first argument; it is closed here."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        self._socket.sendmsg([pickle.dumps((method, args))], rights)
        if fd >= 0:
            os.close(fd)

    def result(self, seconds: float = 300.0) -> Any:
        if not select.select([self._socket], [], [], seconds)[0]:
            raise TimeoutError(f"host {self.label} is busy for {seconds} s")
        data = self._socket.recv(8 << 20)
        if not data:
            raise EOFError(f"host {self.label} is gone")
        good, value = pickle.loads(data)
        if not good:
            raise value
        return value

    def call(self, method: str, *args: Any, fd: int = -1) -> Any:
        self.begin(method, *args, fd=fd)
        return self.result()

    def outer(self, pid: int) -> int:
        """The pid that we see for one of the host's."""
        for child in procfs.descendants(self.pid):
            with contextlib.suppress(OSError):
                if procfs.ns_pid(procfs.status(child)) == pid:
                    return child
        raise ProcessLookupError(3, f"no pid {pid} on host {self.label}")

    def wait_until_empty(self, seconds: float = 60.0) -> None:
        """Until nothing is left but process 1, which reaps what was orphaned. Raises AssertionError."""
        deadline = time.monotonic() + seconds
        while len(left := procfs.descendants(self.pid)) > 1:
            assert time.monotonic() < deadline, f"on host {self.label}: {left}"
            time.sleep(0.01)

    def inner(self, pid: int) -> int:
        return procfs.ns_pid(procfs.status(pid))


def _outer_pid() -> int:
    # our own /proc is mounted already; the parent's namespace sees us through this file
    return int(os.environ["PIDHOST_OUTER"])


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def _serve(link: socket.socket, agent: Agent) -> None:
    """The life of process 1: answer calls, and reap what becomes ours."""
    import ctypes

    os.environ["PIDHOST_OUTER"] = os.readlink("/proc/self")
    libc = ctypes.CDLL(None, use_errno=True)
    # a host of its own is told of all its locks
    file_locks.PATH = f"/proc/self/fd/{os.open(file_locks.PATH, os.O_RDONLY)}"
    file_locks.complete = lambda: True
    libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE
    if libc.mount(b"proc", b"/proc", b"proc", 0, None):
        raise OSError(ctypes.get_errno(), "mounting /proc")
    os.setsid()
    while True:
        if not select.select([link], [], [], 0.02)[0]:
            _reap()
            continue
        try:
            data, control, _, _ = link.recvmsg(1 << 20, 64, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            data = b""
        if not data:
            os._exit(0)
        method, args = pickle.loads(data)
        if control:
            args = (array.array("i", control[0][2][:4])[0], *args)
        try:
            answer = (True, getattr(agent, method)(*args))
        except BaseException as error:
            error.add_note(f"on host {agent.name}:\n{traceback.format_exc()}")
            answer = (False, error)
        try:
            blob = pickle.dumps(answer)
        except Exception:
            blob = pickle.dumps((False, RuntimeError(f"{answer[1]!r}")))
        with contextlib.suppress(BrokenPipeError):
            link.send(blob)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


class HostedWorkload(Workload):
    """A workload that begins on a PidHost, with pids that are free on the other."""

    def __init__(self, host: PidHost, name: str, directory: Path, *arguments: object, **more: Any) -> None:
        super().__init__(name, directory, *arguments, **more)
        self.host = host
        self.first_pid = _FIRST_PID

    def __enter__(self) -> HostedWorkload:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.out.unlink(missing_ok=True)
        inner = self.host.call("start", self.command, str(self.stdout), str(self.stderr), self.first_pid)
        self.adopt(self.host.outer(inner))
        try:
            self.wait_for(lambda lines: any(line.startswith("ready ") for line in lines), seconds=30)
        except BaseException:
            self.kill()
            raise
        return self


class Program(HostedWorkload):
    """A small C program on a PidHost, from its source text; it behaves like a workload (workload.h)."""

    def __init__(self, host: PidHost, source: str, directory: Path, *arguments: object) -> None:
        super().__init__(host, "counter", directory, *arguments, label="program")
        text = f"#define _GNU_SOURCE\n{source}"
        program = CACHE / f"program-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if not program.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            command = ["gcc", *CFLAGS, f"-I{SOURCES}", "-xc", "-", "-o", str(program), *LIBS]
            subprocess.run(command, input=text, check=True, text=True)
        self.command = [str(program), str(self.out), *map(str, arguments)]


def migrate(workload: Workload, a: PidHost, b: PidHost, *, rounds: int = 3, last: str = "resume") -> Moved:
    """Move a workload live from `a` to `b`; `last` "settle": `b` leaves the last step to another agent."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    b.begin("restore", fd=theirs.detach())
    a.begin("save", a.inner(workload.pid), rounds, fd=ours.detach())
    try:
        saved: Saved = a.result()
    except BaseException as error:
        try:
            b.result()
        except BaseException as other:
            error.add_note(f"meanwhile on host {b.label}: {other}")
        raise
    try:
        restored: Restored = b.result()
    except BaseException:
        a.call("thaw")
        raise
    phases = b.call(last)
    a.call("release")
    outer = b.outer(restored.root)
    workload.adopt(outer)
    cpu = (saved.cpu + restored.cpu) * 1000
    return Moved(outer, saved.rounds, cpu, _times(saved.phases), _times(phases))


def tour(
    moving: Workload,
    here: PidHost,
    there: PidHost,
    rounds: Iterable[int],
    move: Callable[..., object] = migrate,
) -> None:
    """Move a workload to and fro, once for each number of rounds; it goes on after each."""
    for number in rounds:
        move(moving, here, there, rounds=number)
        moving.check_alive_and_progressing(ticks=1)
        here, there = there, here


def try_in_vain(workload: Workload, a: PidHost, b: PidHost) -> None:
    """All of a migration but its end: the copy is thrown away when it stands, and the workload runs on."""
    ours, theirs = socket.socketpair()
    b.begin("restore", fd=theirs.detach())
    a.begin("save", a.inner(workload.pid), 2, fd=ours.detach())
    a.result()
    b.result()
    b.call("discard")
    a.call("thaw")


def save_to_file(workload: Workload, a: PidHost, path: Path, *, rounds: int = 1) -> Saved:
    """Checkpoint a workload on `a` to a file; it is gone then."""
    saved: Saved = a.call(
        "save", a.inner(workload.pid), rounds, fd=os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    )
    a.call("release")
    return saved


def restore_from_file(workload: Workload, b: PidHost, path: Path) -> Moved:
    restored: Restored = b.call("restore", fd=os.open(path, os.O_RDONLY))
    phases = b.call("resume")
    outer = b.outer(restored.root)
    workload.adopt(outer)
    return Moved(outer, [], destination=_times(phases))


def _times(phases: list[Phase]) -> dict[str, float]:
    out: dict[str, float] = {}
    for phase in phases:
        out[phase.name] = out.get(phase.name, 0.0) + phase.seconds * 1000
    return out


if __name__ == "__main__":  # python tests/engines/pidhosts.py WORKLOAD ARG...: move it back and forth, print phases
    import tempfile

    with (
        tempfile.TemporaryDirectory() as folder,
        PidHost("a") as here,
        PidHost("b") as there,
        HostedWorkload(here, sys.argv[1], Path(folder), *sys.argv[2:]) as moving,
    ):
        for _ in range(int(os.environ.get("TIMES", "4"))):
            moved = migrate(moving, here, there)
            print({name: round(ms, 2) for name, ms in moved.source.items()})
            print("   ", {name: round(ms, 2) for name, ms in moved.destination.items()})
            moving.check_alive_and_progressing()
            here, there = there, here
        print(moving.finish()[-2:])
