"""The contract between an engine and whoever drives it.

An engine turns a process tree into a stream of records, and a stream of records into a process tree. `Engine` has
the two calls of the design, checkpoint() and restart(), and makes the objects of a live migration: a `Source` on
one host and a `Destination` on the other.

    with engine.source(pid, fd, options) as source:   # the workload runs
        source.survey()
        source.instrument()
        source.round()            # again and again
        source.seize()
        source.quiesce(0.1)
        source.freeze()           # stopped
        source.final(shut)        # saved to the trailer
        source.hold()             # frozen by its cgroup: survives the death of this program
        source.release()          # gone: only once the destination is known to run it
        source.thaw()             # at any point before release() instead: runs, as if nothing had been asked

    with engine.destination(fd, options) as destination:
        destination.build()       # reads to the trailer; the copy is complete and stopped
        destination.hold()        # frozen by its cgroup
        destination.resume()      # runs
        destination.tidy()
        destination.discard()     # at any point before resume() instead: killed, nothing left

All calls are synchronous. Those of one object come from one thread, the one that made it: ptrace(2) knows threads.
The exceptions are named. Errors are those of `migrator.errors`; each says where the workload is.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from migrator.linux.cgroup import Cgroup

# What is not the same after any move, by any engine; what is particular to a workload is in the notes of its survey.
TOLD_OF_ALL = "processor times and counters of use (getrusage, /proc/PID/io, page faults) will begin anew"


class CheckpointFlags(enum.IntFlag):
    SUBTREE = 0x1  # `pid` need not be the init task of a container


class RestartFlags(enum.IntFlag):
    FROZEN = 0x2  # leave the restarted tasks frozen


class AfterCheckpoint(enum.Enum):
    """What becomes of the tasks once they are saved."""

    KILL = "kill"
    RUN = "leave-running"
    STOP = "leave-stopped"


class Where(enum.Enum):
    SOURCE = "source"
    DESTINATION = "destination"
    BETWEEN = "between"  # on the wire, or waiting for the other


@dataclass(frozen=True)
class Phase:
    """One named stretch of time: `start` and `end` in ns of CLOCK_MONOTONIC, `pages` of 4096 bytes, `bytes` as
    written to the stream before compression. `where` is for sessions: an engine does not know which host it is."""

    name: str
    start: int
    end: int
    bytes: int = 0
    pages: int = 0
    where: Where = Where.SOURCE

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


@dataclass(frozen=True)
class Work:
    """How much there is of what takes time while the tasks are stopped. Descriptors count once in each table.

    files: descriptors of what has a path; pipes and sockets: their ends; others: descriptors of anything else"""

    processes: int = 0
    threads: int = 0
    mappings: int = 0
    files: int = 0
    pipes: int = 0
    sockets: int = 0
    others: int = 0


@dataclass(frozen=True)
class Round:
    """One sweep of pre-copy.

    number:      1 for the first
    pages:       pages of 4096 bytes sent with their contents
    zero_pages:  pages announced as zero or dropped, without contents
    bytes:       bytes written to the stream in this round
    start, end:  ns of CLOCK_MONOTONIC
    dirty_rate:  pages per second dirtied since the previous round (0.0 in the first)
    remaining:   pages known to be dirty when the round ended, or -1 if not measured
    work:        what there was when it ended; None if the engine does not count
    """

    number: int
    pages: int
    zero_pages: int
    bytes: int
    start: int
    end: int
    dirty_rate: float
    remaining: int = -1
    work: Work | None = None


@dataclass(frozen=True)
class Capability:
    """One thing an engine can or cannot do on this host, found out by trying."""

    name: str
    available: bool
    detail: str


@dataclass(frozen=True)
class Survey:
    """What preflight learns about a workload without stopping it.

    files: (path, size, mode, digest-or-build-id) of every mapped and open regular file whose content
           is not carried in the stream; directories and FIFOs that must be there by name have no size
    cap_bounding: what any of its tasks has in its capability bounding set
    most_files: how many descriptors any of its tasks may have open (the hard RLIMIT_NOFILE)
    congestion: the congestion controls of its sockets
    work:  how much there is, None if the engine does not count
    notes: (what it is about, what will not be quite the same on the destination)
    """

    pids: list[int]
    threads: int
    rss_bytes: int
    files: list[FileFact]
    cpu_features: frozenset[str]
    xstate_size: int
    tracker: str  # "wp-async", "soft-dirty", "hash"
    tcp_connections: int
    wanted_pids: list[int]  # pids that must be free on the destination (empty: own pid namespace)
    notes: list[tuple[str, str]] = field(default_factory=list)
    cap_bounding: int = 0
    most_files: int = 0
    congestion: frozenset[str] = frozenset()
    work: Work | None = None


@dataclass(frozen=True)
class FileFact:
    path: str
    size: int
    mode: int  # st_mode
    mtime_ns: int
    build_id: str  # hex, "" if the file is no ELF file or has none
    writable: bool  # open for writing by the workload
    digest: str = ""  # sha256 hex, only where asked for


@dataclass
class SourceOptions:
    subtree: bool = True
    container: str = ""  # name of the container, "" for a plain subtree
    container_spec: str = ""  # JSON of its specification, carried in the image
    container_cgroup: str = ""  # path of the container's cgroup; its tasks are the tree
    tmpfs: Sequence[str] = ()  # where the container has tmpfs mounts of its own, whose contents go with it
    cgroup_name: str = ""  # the hold cgroup; derived from the pid where empty
    message_ledger: str = ""  # a file in memory for messages that are taken out of a queue to be read; "" for none
    checksums: bool = False  # of contents of pages: for an image that is kept; a link has its own
    surveyed: bool = False  # the same engine has just found nothing to refuse: see `select_for`


class Sandbox(Protocol):
    """What stands around the tasks of a container: namespaces, mounts, network, cgroup."""

    @property
    def cgroup(self) -> Cgroup: ...
    def settled(self) -> object:
        """The container runs here: note it."""

    def remove(self) -> None:
        """Kill what is inside and take everything down. Safe to call twice."""


SandboxFactory = Callable[[str, int], Sandbox]  # specification (JSON), pid of process 1 in its new namespaces


@dataclass
class DestinationOptions:
    """sandbox: makes what stands around a container; None: this caller takes no containers
    root:    a directory to use as root of the file system; "" for the host's
    cgroup_name: the hold cgroup of a plain subtree; derived from the pid where empty
    live:    the saved tasks stand stopped until the copy is to run, and may have locks on files of storage that both
             hosts have: see `Destination.late_locks`
    verify:  hold() takes a second look: it saves the copy again before it runs, and raises RestartFailed where that
             is not what was saved (migrator.image.compare). For people who want to be sure; it adds to the downtime"""

    sandbox: SandboxFactory | None = None
    root: str = ""
    cgroup_name: str = ""
    live: bool = False
    verify: bool = False


class LockKind(enum.IntEnum):
    FLOCK = 0  # flock(2): of an open file description, on the whole file
    PROCESS = 1  # fcntl(2), F_SETLK: on a range
    DESCRIPTION = 2  # fcntl(2), F_OFD_SETLK: on a range


class LateLock(NamedTuple):
    """A lock that the copy gets once the source's tasks are gone, before it runs.

    pid, fd:       one who has the file open, in the caller's pid namespace; of kind PROCESS its owner
    mode:          1 shared, 2 exclusive
    start, length: in bytes; length 0 is up to the end, however the file grows"""

    pid: int
    fd: int
    kind: int
    mode: int
    start: int
    length: int
    path: str

    def __str__(self) -> str:
        return f"the lock on {self.path} (pid {self.pid} fd {self.fd})"


Move = tuple[str, str, str, str]  # of a file, by resume(): directory, private directory, name there, name


class Source(Protocol):
    """A process tree on its way into a stream. Made by `Engine.source()`; the workload runs."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Before hold() and release(): as thaw(), and an error goes into the stream."""

    def survey(self) -> Survey:
        """Look at the tree. Runs before and after. Raises Refused with every obstacle."""

    def instrument(self, reader: str = "") -> None:
        """Begin to track writes, and write the header and the hierarchy. Runs before and after; each process stops
        for less than a millisecond. Raises CheckpointFailed.

        reader: the engine that restarts what is written, while it is written; "" if nobody knows"""

    def round(self) -> Round:
        """Write what has changed in memory since the last round; all of it, the first time. Runs before and after.
        Raises CheckpointFailed, and OSError of the stream."""

    def dirty_rate(self, seconds: float) -> float:
        """Bytes per second that the tree writes to its private memory, measured over `seconds`. Runs before and
        after; nothing is written but what instrument() writes. Raises CheckpointFailed."""

    def seize(self) -> None:
        """Attach to every task, ahead of the freeze. Runs before and after. Raises CheckpointFailed."""

    def quiesce(self, seconds: float) -> bool:
        """Wait until nothing is on its way that only running tasks can take, such as connections that wait to be
        accepted; at most this long. Whether it is so. Runs before and after."""

    def freeze(self) -> None:
        """Stop every task. Runs before, is stopped after; runs on if it raises CheckpointFailed.

        What is on its way (see quiesce()) cannot be saved: then the tasks run for a moment, and are stopped again,
        a number of times before it raises."""

    def final(self, silence: Callable[[], None] | None = None) -> None:
        """Write the last pages, the state of all tasks, and the trailer. Stopped before and after. `silence` is
        called before sockets are looked at, to shut the network. Raises CheckpointFailed, and OSError of the
        stream."""

    def hold(self) -> None:
        """Freeze the tasks by their cgroup and let go of them. Stopped before; after, they stay frozen whatever
        becomes of this program."""

    def release(self) -> None:
        """Kill the tasks, without a word to their peers. Held before, gone after."""

    def leave_stopped(self) -> None:
        """Let go of held tasks so that they are stopped as by SIGSTOP: SIGCONT lets them run on."""

    def thaw(self) -> None:
        """Let the workload run, as if nothing had been asked. From any state but gone; may be called twice."""

    @property
    def phases(self) -> list[Phase]:
        """What was done so far. Any thread."""

    @property
    def pids(self) -> list[int]:
        """The processes, root first, in the caller's pid namespace."""

    @property
    def cgroup(self) -> str:
        """The hold cgroup: its path, or before it is there its name."""

    @property
    def origins(self) -> list[tuple[int, str]]:
        """(pid, directory of the cgroup that it came from), root first: to go back to."""


class Destination(Protocol):
    """A stream on its way to becoming a process tree. Made by `Engine.destination()`; there is nothing yet."""

    on_round: Callable[[int], None]  # called by build() when a pre-copy round is in place; its number

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Before hold(): as discard()."""

    def build(self) -> int:
        """Read to the trailer and build. The copy is complete and stopped after; the root's pid in the caller's pid
        namespace. Later steps depend only on the copy's own tasks. Raises ImageError or RestartFailed: then
        nothing of the copy is left."""

    def hold(self) -> None:
        """Freeze the copy by its cgroup and let go of it. Stopped before; frozen after, whatever becomes of this
        program. Raises RestartFailed."""

    def resume(self) -> None:
        """Let the copy run. Held before, runs after. Any thread, while no other call is under way."""

    def tidy(self) -> None:
        """Close what was needed to build. Runs before and after; may be called twice."""

    def leave_frozen(self) -> None:
        """Instead of resume(): complete, and frozen until its cgroup is thawed."""

    def discard(self) -> None:
        """Kill the copy; nothing is left of it. From any state but running; may be called twice."""

    @property
    def phases(self) -> list[Phase]:
        """What was done so far. Any thread."""

    @property
    def cgroup(self) -> str:
        """Path of the hold cgroup; "" before there is one."""

    @property
    def root_pid(self) -> int:
        """The root's pid in the caller's pid namespace; 0 before there is one. Any thread."""

    @property
    def late_locks(self) -> list[LateLock]:
        """Locks that the stopped source still has, and that the copy must have before it runs: for
        `Engine.take_locks()`, between hold() and resume(). None unless the copy is `live`."""

    @property
    def moves(self) -> list[Move]:
        """What resume() does to files, for whoever has to finish it: `Engine.finish_moves()`."""


class CheckpointHooks:
    """What the caller of checkpoint() does in between; here nothing. What a hook raises is an error of the call:
    the workload runs on, unless it is held already."""

    def surveyed(self, source: Source) -> None:
        """Runs; nothing has been touched."""

    def silence(self) -> None:
        """Stopped; the sockets are looked at next."""

    def saved(self) -> None:
        """Stopped; the image is complete."""

    def ending(self) -> None:
        """Held; about to be killed."""


class RestartHooks:
    """What the caller of restart() does in between; here nothing."""

    def built(self, root: int) -> None:
        """Complete and stopped; `root` is the root's pid. What it raises discards the copy."""

    def held(self, destination: Destination) -> None:
        """Frozen; about to run, or to be left frozen."""


NO_CHECKPOINT_HOOKS, NO_RESTART_HOOKS = CheckpointHooks(), RestartHooks()


class Engine(Protocol):
    """One way of saving and restoring process trees. Any thread may call these, but see `Source`."""

    @property
    def name(self) -> str: ...
    @property
    def precopies(self) -> bool:
        """Whether memory can be sent while the tasks run: `Source.round()`."""

    @property
    def carries_less(self) -> bool:
        """Whether it refuses what others carry: then its survey is asked before it is taken (`select_for`)."""

    def probe(self) -> list[Capability]:
        """What it can do on this host, found out by trying. Takes some milliseconds; touches no workload."""

    def xstate_size(self) -> int:
        """Bytes of extended processor state that it saves of a task of this host."""

    def source(self, pid: int, fd: int, options: SourceOptions) -> Source:
        """A source that writes the tree below `pid` to `fd`. The calling process may be in the tree: it is left
        out, and has ended with status 0 in the copy. Raises UsageError if there is no such process."""

    def destination(self, fd: int, options: DestinationOptions) -> Destination:
        """A destination that reads the stream `fd`."""

    def checkpoint(
        self,
        pid: int,
        fd: int,
        flags: CheckpointFlags,
        *,
        after: AfterCheckpoint = AfterCheckpoint.RUN,
        options: SourceOptions | None = None,
        hooks: CheckpointHooks = NO_CHECKPOINT_HOOKS,
    ) -> int:
        """Save the tree below `pid` to `fd`; a checkpoint id, greater than 0. Runs before; after, as `after` says.

        Without SUBTREE `pid` must be the init task of a container. On an error the tasks run on, and the stream
        ends with an error record. Raises UsageError, Refused, CheckpointFailed, and OSError of the stream."""

    def restart(
        self,
        fd: int,
        flags: RestartFlags,
        *,
        options: DestinationOptions | None = None,
        hooks: RestartHooks = NO_RESTART_HOOKS,
    ) -> int:
        """Restart the tree saved in `fd`; the root's pid. It runs after, or with FROZEN is frozen. On an error
        nothing is left of it. Raises ImageError or RestartFailed."""

    def finish_moves(self, root: int, moves: list[Move]) -> None:
        """Do what the `Destination.resume()` of a program that has died would have done to files. `root` is a
        descriptor of the tree's root directory. May be called twice."""

    def take_locks(self, cgroup: str, locks: list[LateLock], seconds: float) -> list[LateLock]:
        """Take these locks for the tasks held in `cgroup`, waiting at most so long for others to give them up; those
        that are not had yet. The tasks are held before and after. Those of a program that has died may run: they are
        stopped for it, and held after. May be called again with the same locks."""
