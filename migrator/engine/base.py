"""The contract between an engine and whoever drives it.

An engine turns a process tree into a stream of records and a stream of records into a
process tree. Everything here is synchronous and must be called from one OS thread per
object (ptrace knows threads): a session gives each object a thread of its own.

The life of the source side, and where the workload is after each call:

    with engine.source(pid, writer, options) as source:   # running, untouched
        source.survey()      # running; refusals raised here, as `Refused`
        source.arm()         # running; dirty tracking armed, header and tree written
        source.round()       # running; one pre-copy round written (repeat)
        source.seize()       # running; attached to
        source.freeze()      # every task in a ptrace stop
        source.final()       # tasks' state, last pages and trailer written; still stopped
        source.hold()        # frozen by the cgroup freezer: survives the death of the agent
        source.release()     # killed and reaped: only after the destination is RUNNING
        source.thaw()        # at any point instead: running, as if nothing had been asked
    # leaving the block before release() or hold() thaws

and of the destination side:

    with engine.destination(reader, options) as destination:
        destination.build()    # reads to the trailer, building as it reads; tasks stopped. What is left
                               # after it can be refused by nobody
        destination.hold()     # complete, frozen by the cgroup freezer, no longer traced
        destination.resume()   # running
        destination.tidy()     # soon after: closes what was needed to build
        destination.discard()  # at any point before resume(): killed, nothing left
    # leaving the block before hold() discards
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class CheckpointFlags(enum.IntFlag):
    SUBTREE = 0x1  # `pid` need not be the init task of a container


class RestartFlags(enum.IntFlag):
    FROZEN = 0x2  # leave the restarted tasks frozen


class AfterCheckpoint(enum.Enum):
    """What becomes of the tasks once they are saved."""

    KILL = "kill"
    RUN = "leave-running"
    STOP = "leave-stopped"


@dataclass(frozen=True)
class Phase:
    """One named stretch of time: `start` and `end` in ns of CLOCK_MONOTONIC, `pages` of 4096 bytes,
    `bytes` as written to the stream before compression."""

    name: str
    start: int
    end: int
    bytes: int = 0
    pages: int = 0

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


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
    """

    number: int
    pages: int
    zero_pages: int
    bytes: int
    start: int
    end: int
    dirty_rate: float
    remaining: int = -1


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
           is not carried in the stream
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
    after: AfterCheckpoint = AfterCheckpoint.KILL
    tcp_established: bool = True
    cgroup_name: str = ""  # the hold cgroup; derived from the pid where empty
    progress: Callable[[str, int, int], None] | None = None  # phase, bytes, pages


@dataclass
class DestinationOptions:
    container: str = ""  # restore into a container of this name; "" for a plain subtree
    root: str = ""  # a directory to use as root of the file system; "" for the host's
    cgroup_name: str = ""
    detach: bool = True
    bridge: str = ""  # the bridge of this host for a container, if it is called otherwise than on the source


class Source(Protocol):
    def survey(self) -> Survey: ...
    def arm(self) -> None: ...
    def round(self) -> Round: ...
    def seize(self) -> None: ...
    def freeze(self) -> None: ...
    def final(self) -> None: ...
    def hold(self) -> None: ...
    def release(self) -> None: ...
    def thaw(self) -> None: ...
    @property
    def phases(self) -> list[Phase]: ...
    @property
    def pids(self) -> list[int]: ...
    @property
    def cgroup(self) -> str: ...  # a path, or a name; "" where there will be none
    @property
    def homes(self) -> list[tuple[int, str]]: ...  # (pid, directory of its cgroup), root first, to go back to


class Destination(Protocol):
    on_round: Callable[[int], None]  # called when a pre-copy round has ended: all of it is in place

    def build(self) -> int: ...  # the root's pid in the caller's pid namespace
    def hold(self) -> None: ...
    def resume(self) -> None: ...
    def tidy(self) -> None: ...
    def discard(self) -> None: ...
    @property
    def phases(self) -> list[Phase]: ...
    @property
    def cgroup(self) -> str: ...
    @property
    def moves(self) -> list[tuple[str, str, str, str]]: ...  # of files, by resume(): for who finishes it
