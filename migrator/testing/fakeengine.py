"""An engine without processes: what a session does to a workload, written down.

The workload is a directory: `source` and `destination` hold the state of each copy, so that several
processes share them as they would share a host's tasks, and `log` has every change in order. States:

    run · stop PID (traced by that process: runs again, or is gone, when it dies) · held · none

    world = FakeWorld(directory)
    world.source_factory, world.destination_factory, world.groups   # for the sessions
    world.check()                                                   # never two at once, never none
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from migrator.engine.base import (
    Capability,
    Destination,
    DestinationOptions,
    FileFact,
    LateLock,
    Move,
    Phase,
    Round,
    Source,
    SourceOptions,
    Survey,
)
from migrator.engine.calls import EngineCalls, check_pid
from migrator.errors import ImageError, RestartFailed
from migrator.recovery.hooks import HoldGroup, NoHooks
from migrator.recovery.journal import JournalHeader

TRAILER = b"the trailer of a fake image"
TASK = 1  # any task that outlives the agents


class FakeWorld:
    """The two copies of one workload."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if not (directory / "log").exists():
            self.set("source", "run")
            self.set("destination", "none")

    def state(self, side: str) -> str:
        """As it is now: a copy whose tracer has died is not stopped any more."""
        text = (self.directory / side).read_text()
        word, _, tracer = text.partition(" ")
        if word == "stop" and not _lives(int(tracer)):
            self.set(side, "run" if side == "source" else "none")
            return self.state(side)
        return word

    def set(self, side: str, state: str) -> None:
        # Noted before it runs and after it has stopped, so that the log shows the worst case.
        path = self.directory / side
        stops = state != "run" and path.exists() and path.read_text() == "run"
        if not stops:
            self._log(side, state)
        fresh = self.directory / f".{side}.{os.getpid()}"
        fresh.write_text(state)
        os.replace(fresh, self.directory / side)
        if stops:
            self._log(side, state)

    def _log(self, side: str, state: str) -> None:
        with open(self.directory / "log", "a") as log:
            log.write(f"{side} {state}\n")

    @property
    def log(self) -> list[str]:
        return (self.directory / "log").read_text().splitlines()

    def check(self) -> tuple[str, str]:
        """The states of both copies. AssertionError if two ever ran at once, or none is left."""
        states = self.state("source"), self.state("destination")
        running = {"source": False, "destination": False}
        for line in self.log:
            side, state = line.split()[:2]
            running[side] = state == "run"
            assert not all(running.values()), "two copies ran:\n" + "\n".join(self.log)
        assert states != ("none", "none"), "no copy is left:\n" + "\n".join(self.log)
        return states

    def take_locks(self, locks: list[LateLock], seconds: float) -> list[LateLock]:
        """`Engine.take_locks()`: the source copy has them for as long as there is one."""
        end = time.monotonic() + seconds
        while locks and self.state("source") != "none":
            if time.monotonic() > end:
                return locks
            time.sleep(0.001)
        return []

    def groups(self, side: str) -> Callable[[str], HoldGroup | None]:
        """Cgroups of one host: `fake` holds its copy."""

        def find(reference: str) -> HoldGroup | None:
            return FakeGroup(self, side) if reference == "fake" and self.state(side) != "none" else None

        return find


@dataclass
class FakeLocks(NoHooks):
    """The hooks of a copy that has locks on files which both hosts share."""

    world: FakeWorld

    def take_locks(self, header: JournalHeader, seconds: float) -> list[str]:
        return [str(LateLock(*lock)) for lock in self.world.take_locks([LateLock(*x) for x in header.locks], seconds)]


@dataclass
class FakeGroup:
    world: FakeWorld
    side: str

    def thaw(self) -> None:
        if self.world.state(self.side) == "held":
            self.world.set(self.side, "run")

    def pids(self) -> list[int]:
        return [] if self.world.state(self.side) == "none" else [TASK]

    def kill(self) -> None:
        self.world.set(self.side, "none")

    def remove(self) -> None:
        pass

    def move_back(self, origins: Mapping[int, str]) -> None:
        pass


@dataclass
class Script:
    """How a fake engine behaves: `fail` names the call that raises, `rounds` has the pages of each round."""

    rounds: list[int] = field(default_factory=lambda: [1000, 100, 10, 1, 1, 1, 1, 1])
    fail: dict[str, Exception] = field(default_factory=dict)
    slow: dict[str, float] = field(default_factory=dict)  # seconds that a call takes longer
    files: list[FileFact] = field(default_factory=list)
    wanted_pids: list[int] = field(default_factory=list)
    late_locks: list[LateLock] = field(default_factory=list)  # that the source copy has while it is there

    def play(self, name: str) -> None:
        time.sleep(self.slow.get(name, 0))
        if name in self.fail:
            raise self.fail[name]


class _Phases:
    def __init__(self) -> None:
        self.phases: list[Phase] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic_ns()
        yield
        self.phases.append(Phase(name, start, time.monotonic_ns()))


class FakeSource(_Phases):
    """`migrator.engine.base.Source`, without a workload."""

    def __init__(self, world: FakeWorld, fd: int, script: Script) -> None:
        super().__init__()
        self._world, self._fd, self._script = world, fd, script
        self._round = 0
        self._held = False
        self.calls: list[str] = []

    def _play(self, name: str) -> None:
        self.calls.append(name)
        self._script.play(name)

    @property
    def pids(self) -> list[int]:
        return [TASK]

    @property
    def cgroup(self) -> str:
        return "fake"

    @property
    def origins(self) -> list[tuple[int, str]]:
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._held:
            self.thaw()

    def survey(self) -> Survey:
        self._play("survey")
        wanted = self._script.wanted_pids
        return Survey([os.getpid()], 1, 1 << 20, self._script.files, frozenset(), 2696, "wp-async", 0, wanted)

    def instrument(self, reader: str = "") -> None:
        self._play("instrument")
        os.write(self._fd, b"header")

    def round(self) -> Round:
        self._play("round")
        start = time.monotonic_ns()
        pages = self._script.rounds[min(self._round, len(self._script.rounds) - 1)]
        self._round += 1
        _write(self._fd, bytes(4096) * pages)
        end = max(time.monotonic_ns(), start + 1000 * pages)
        return Round(self._round, pages, 0, pages * 4096, start, end, 0.0)

    def dirty_rate(self, seconds: float) -> float:
        self._play("dirty_rate")
        return 0.0

    def seize(self) -> None:
        """Nothing to attach to."""

    def quiesce(self, seconds: float) -> bool:
        self._play("quiesce")
        return True

    def freeze(self) -> None:
        with self.phase("freeze"):
            self._play("freeze")
            self._world.set("source", f"stop {os.getpid()}")

    def final(self, silence: Callable[[], None] | None = None) -> None:
        with self.phase("final"):
            self._play("final")
            if silence is not None:
                silence()
            _write(self._fd, b"state" + TRAILER)

    def hold(self) -> None:
        self._play("hold")
        self._world.set("source", "held")
        self._held = True

    def release(self) -> None:
        self._play("release")
        assert self._held
        self._world.set("source", "none")

    def leave_stopped(self) -> None:
        self._play("leave_stopped")
        assert self._held

    def thaw(self) -> None:
        self._play("thaw")
        if self._world.state("source") != "run":
            self._world.set("source", "run")


class FakeDestination(_Phases):
    """`migrator.engine.base.Destination`, without a workload."""

    def __init__(self, world: FakeWorld, fd: int, script: Script) -> None:
        super().__init__()
        self._world, self._fd, self._script = world, fd, script
        self.cgroup = "fake"
        self.moves: list[Move] = []
        self.late_locks: list[LateLock] = list(script.late_locks)
        self.root_pid = 0
        self.bytes = 0
        self.on_round: Callable[[int], None] = lambda _number: None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._world.state("destination") == "stop":
            self.discard()

    def build(self) -> int:
        tail = b""
        while not tail.endswith(TRAILER):
            data = os.read(self._fd, 1 << 16)
            if not data:
                raise ImageError("the stream ends without a trailer")
            self.bytes += len(data)
            self.on_round(1 << 20)
            tail = (tail + data)[-len(TRAILER) :]
        with self.phase("restore"):
            self._script.play("build")
            self._world.set("destination", f"stop {os.getpid()}")
        self.root_pid = 4242
        return self.root_pid

    def hold(self) -> None:
        self._script.play("hold")
        self._world.set("destination", "held")

    def resume(self) -> None:
        self._script.play("resume")
        if self._world.state("destination") != "held":
            raise RestartFailed("there is nothing to resume")
        self._world.set("destination", "run")

    def tidy(self) -> None:
        self._script.play("tidy")

    def leave_frozen(self) -> None:
        self._script.play("leave_frozen")

    def discard(self) -> None:
        self._script.play("discard")
        assert self._world.state("destination") != "run"
        self._world.set("destination", "none")


class FakeEngine(EngineCalls):
    """`migrator.engine.base.Engine` on a `FakeWorld`. `lacks` names an ability that it does not find on this host."""

    def __init__(
        self,
        world: FakeWorld,
        script: Script | None = None,
        *,
        name: str = "fake",
        lacks: str = "",
        carries_less: bool = False,
    ) -> None:
        self.name, self.precopies, self.carries_less = name, True, carries_less
        self._world, self._script, self._lacks = world, script or Script(), lacks
        self.sources: list[FakeSource] = []

    def probe(self) -> list[Capability]:
        found = [Capability("a directory", True, str(self._world.directory))]
        return [*found, Capability(self._lacks, False, "not on this host")] if self._lacks else found

    def xstate_size(self) -> int:
        return 2696

    def source(self, pid: int, fd: int, options: SourceOptions) -> Source:
        check_pid(pid)
        self.sources.append(FakeSource(self._world, fd, self._script))
        return self.sources[-1]

    def destination(self, fd: int, options: DestinationOptions) -> Destination:
        return FakeDestination(self._world, fd, self._script)

    def finish_moves(self, root: int, moves: list[Move]) -> None:
        self._script.play("finish_moves")

    def take_locks(self, cgroup: str, locks: list[LateLock], seconds: float) -> list[LateLock]:
        self._script.play("take_locks")
        return self._world.take_locks(locks, seconds)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
