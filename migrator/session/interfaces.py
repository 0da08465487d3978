"""What a session needs from others, as protocols: it can be driven with fakes, and they without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from migrator.engine.base import Destination, Source
from migrator.linux.cgroup import Cgroup
from migrator.protocol.messages import OrphanedConnection
from migrator.recovery.journal import JournalHeader


class LinkCounters(Protocol):
    """Bytes that went out: of the stream before compression, and of all on the wire."""

    stream_sent: int
    wire_sent: int


class Link(Protocol):
    """The part of `transport.link.Link` that a session uses. See there."""

    @property
    def peer(self) -> str: ...
    async def send(self, message: bytes) -> None: ...
    async def receive(self, timeout: float | None = None) -> bytes: ...
    async def send_packets(self, packets: list[bytes]) -> None: ...
    async def receive_packets(self, timeout: float | None = None) -> list[bytes]: ...
    async def pump_in(self, fd: int) -> int: ...
    async def pump_out(self, fd: int) -> int: ...
    async def acquire_bandwidth(self, size: int) -> float: ...
    def set_cap(self, bandwidth: float) -> None: ...
    def uncap(self) -> None: ...
    @property
    def rtt(self) -> float: ...
    @property
    def stream_throughput(self) -> float: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def counters(self) -> LinkCounters: ...
    @property
    def compression_ratio(self) -> float: ...
    async def close(self) -> None: ...


class Connection(Protocol):
    """A TCP connection as its container sees it: `migrator.container.connection_filter`."""

    @property
    def local(self) -> str: ...
    @property
    def local_port(self) -> int: ...
    @property
    def peer(self) -> str: ...
    @property
    def peer_port(self) -> int: ...


class NetworkLock(Protocol):
    """The source's side of moving a container's network: `migrator.container.switchover`."""

    moved: bool

    def prepare(self) -> None: ...
    def hold(self) -> None: ...
    def handshakes(self) -> int: ...
    def lock(self) -> None: ...
    def captured(self) -> list[bytes]: ...
    def orphans(self) -> Sequence[Connection]: ...
    def orphans_left_out(self) -> int: ...
    def orphans_living(self) -> int: ...
    def outgoing(self) -> list[bytes]: ...
    def deliver(self, frames: Iterable[bytes]) -> None: ...
    def set_aside(self) -> None: ...
    def unlock(self) -> None: ...
    def release(self) -> None: ...
    def close(self) -> None: ...


class NetworkArrival(Protocol):
    """The destination's side."""

    def prepare(self) -> None: ...
    def divert(self, connections: Iterable[OrphanedConnection]) -> None: ...
    def diverted(self) -> list[bytes]: ...
    def is_outgoing(self, frame: bytes) -> bool: ...
    def emit(self, frames: Iterable[bytes]) -> None: ...
    def unlock(self) -> None: ...
    def inject(self, frames: Iterable[bytes]) -> None: ...
    def announce(self) -> None: ...
    def close(self) -> None: ...


class HoldGroup(Protocol):
    """A freezer cgroup: `migrator.linux.cgroup.Cgroup`."""

    def thaw(self) -> None: ...
    def pids(self) -> list[int]: ...
    def kill(self) -> None: ...
    def remove(self) -> None: ...
    def send_home(self, homes: Mapping[int, str]) -> None: ...


Groups = Callable[[str], HoldGroup | None]  # path or name of a cgroup -> it, None if there is none

SourceFactory = Callable[[int], Source]  # the descriptor to write the stream to -> an engine's source
DestinationFactory = Callable[[int], Destination]  # the descriptor to read the stream from


class Surroundings(Protocol):
    """What stands around held tasks, and what they have open, to be put right where an agent died half way.

    All must do nothing where there is nothing to do, and be callable twice.
    """

    def take_locks(self, facts: JournalHeader, seconds: float) -> list[str]:
        """Take the locks of a copy that is to run, waiting at most so long; what is not had yet, one text each."""

    def reopen(self, facts: JournalHeader) -> None:
        """Its tasks will run here: give them what they need for it, network and connections above all."""

    def remove(self, facts: JournalHeader) -> None:
        """Its tasks are gone: take down what stood around them."""


class NoSurroundings:
    """For fakes."""

    def take_locks(self, facts: JournalHeader, seconds: float) -> list[str]:
        return []

    def reopen(self, facts: JournalHeader) -> None:
        pass

    def remove(self, facts: JournalHeader) -> None:
        pass


class CgroupHold:
    """A `Cgroup` as a `HoldGroup`."""

    def __init__(self, group: Cgroup) -> None:
        self._group = group

    def thaw(self) -> None:
        self._group.thaw()

    def pids(self) -> list[int]:
        return self._group.pids()

    def kill(self) -> None:
        self._group.kill()

    def remove(self) -> None:
        self._group.remove()

    def send_home(self, homes: Mapping[int, str]) -> None:
        self._group.send_home(homes)


def open_group(reference: str) -> HoldGroup | None:
    """The cgroup of a journal, by its path or its name; None if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        if reference:
            return CgroupHold(Cgroup.at(reference) if reference.startswith("/") else Cgroup.open(reference))
    return None
