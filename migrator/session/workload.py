"""The engine's half of a source: everything that touches the workload, on the engine's own thread.

`WorkloadThread` knows nothing of the protocol; `migrator.session.source` calls it when the tables say so.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import dataclasses
import fcntl
import os
import termios
import time
from collections.abc import Awaitable, Callable

import msgspec

from migrator.engine.base import Round, Source, Survey
from migrator.errors import MigrationAborted, MigratorError, WorkloadEnded
from migrator.linux import procfs
from migrator.protocol.states import Recorded
from migrator.recovery.journal import Journal, JournalHeader
from migrator.runtime.fault_points import fault
from migrator.runtime.latency import LatencyGuard, yield_processor
from migrator.runtime.pump import Pump
from migrator.runtime.thread import OwnThread
from migrator.session.interfaces import Connection, Link, NetworkLock, SourceFactory
from migrator.session.phases import PhaseLog

FORWARD_SECONDS = 1.0  # how long frames that still come to the old place are passed on
_FORWARD_EVERY = 0.002
_HANDSHAKE_SECONDS = 0.5  # a peer that has not answered by then may never do so
_HANDSHAKE_PAUSE = 0.001
_PASSING_SECONDS = 2.0  # for processes that come and go and cannot be carried
_ACCEPT_SECONDS = 3.0  # for a program that accepts one connection after the other
_ORPHAN_SECONDS = 30.0  # how long connections that stayed behind are served
_AHEAD = range(128, 4097)  # pages of the last round for which one more is worth its while
_LOOK_EVERY = 0.5  # seconds
_STALLED = 10.0  # seconds without a byte taken
_STANDING_SECONDS = 60.0  # from the last byte taken until all of it is in place


class WorkloadThread:
    """One workload being copied away.

    The stream goes engine -> pipe -> `link.pump_in`. If the link fails or the work is stopped, the pipe's
    reading end is closed, so that an engine that is writing gets EPIPE instead of waiting for ever.
    """

    def __init__(self, factory: SourceFactory, link: Link, network: NetworkLock | None, root: int = 0) -> None:
        """`root`: the pid of its root process, to find out whether it has ended; 0 if nobody knows."""
        self._factory = factory
        self._root, self._root_start = root, 0
        self._link = link
        self.network = network
        self.thread = OwnThread("engine")
        self.journal_thread = OwnThread("journal")
        self.source: Source | None = None
        self.pump: Pump | None = None
        self._read_fd, self._write_fd = -1, -1
        self.rounds: list[Round] = []
        self.log = PhaseLog()  # our own phases, beside those of the engine
        self.frozen_at = self.thawed_at = 0  # ns of CLOCK_MONOTONIC
        self._released = False
        self._in_place = 0  # the last round that the destination has in place
        self._placed = asyncio.Event()
        self.ahead: Round | None = None  # a last one, of which no word was awaited
        self._guard = LatencyGuard()
        self.orphans: list[Connection] = []  # that stay behind
        self.orphans_lost = 0  # of them, those that had not ended when they were given up

    # While the workload runs

    async def survey(self) -> Survey:
        """Make the engine's object and let it look. Raises Refused; the workload runs on."""
        self._guard.prepare()
        if self._root:
            with contextlib.suppress(OSError):  # it is just ending, which the engine tells
                self._root_start = procfs.start_time(self._root)
        self._read_fd, self._write_fd = os.pipe()
        os.set_inheritable(self._write_fd, False)
        self.source = await self.thread.run(self._factory, self._write_fd)
        return await self.thread.run(self.source.survey)

    def start_pump(self, lost: Callable[[BaseException], None]) -> None:
        """Begin to send what the engine writes; `lost` is called if that fails."""
        read_fd, self._read_fd = self._read_fd, -1
        pump = self.pump = Pump(self._link.pump_in, read_fd)

        def ended(_: object) -> None:
            if pump.error is not None:
                lost(pump.error)

        pump.task.add_done_callback(ended)

    async def instrument(self, reader: str) -> None:
        """`reader`: the engine of the destination."""
        await self.thread.run(self._source.instrument, reader)
        if self.network is not None:
            await self.thread.run(self.network.prepare)

    async def round(self) -> Round:
        """One round, ended when the destination has all of it in place: what is on its way would have to be
        waited for when frozen, so it belongs to the round."""
        made = await self.thread.run(self._source.round)
        with self.log.phase("drain"):
            await self._drain(made.number)
        made = dataclasses.replace(made, end=time.monotonic_ns())
        self.rounds.append(made)
        fault("source.round")
        return made

    @property
    def all_rounds(self) -> list[Round]:
        """With the one just before the freeze, whose end is only that of its writing."""
        return [*self.rounds, self.ahead] if self.ahead is not None else self.rounds

    def standing(self, number: int) -> None:
        """The destination has said that it has all up to this round in place."""
        self._in_place = max(self._in_place, number)
        self._placed.set()

    async def _drain(self, number: int) -> None:
        least, since = float("inf"), time.monotonic()
        while self._in_place < number and self.pump is not None and not self.pump.done:
            self._placed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY):
                    await self._placed.wait()
            left = self._unread() + self._link.in_flight
            if left < least:
                least, since = left, time.monotonic()
            elif left and time.monotonic() - since > _STALLED:
                raise MigrationAborted(
                    f"{self._link.peer} has taken nothing for {_STALLED:g} s; {left} bytes are on their way",
                    hint="look at the agent there: its log says what it waits for",
                )
            elif time.monotonic() - since > _STANDING_SECONDS:
                raise MigrationAborted(
                    f"{self._link.peer} has not built up round {number} after {_STANDING_SECONDS:g} s",
                    hint="is that host overloaded, or short of memory?",
                )

    def _unread(self) -> int:
        """Bytes in the pipe."""
        count = array.array("i", [0])
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._write_fd, termios.FIONREAD, count)
        return count[0]

    def ended(self, seconds: float = 0.0) -> WorkloadEnded | None:
        """What to say if the root process has ended by itself; one that is just ending is given so many seconds."""
        if self._root_start and procfs.has_ended(self._root, self._root_start, seconds):
            return WorkloadEnded(self._root)
        return None

    def pids(self) -> list[int]:
        return self._source.pids

    def stood(self) -> float:
        """Seconds since the workload was stopped, until it was thawed; 0.0 while it was not stopped."""
        return ((self.thawed_at or time.monotonic_ns()) - self.frozen_at) / 1e9 if self.frozen_at else 0.0

    def header(self, header: JournalHeader) -> JournalHeader:
        """`header` with the tasks and their cgroup as they are now. Slow: to be called before the freeze."""
        pids = []
        for pid in self._source.pids:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pids.append((pid, procfs.start_time(pid)))
        return msgspec.structs.replace(header, pids=pids, cgroup=self._source.cgroup, origins=self._source.origins)

    # From the freeze to the thaw

    async def save(
        self, journal: Journal, header: JournalHeader, late_files: Callable[[], Awaitable[None]] | None
    ) -> None:
        """Freeze, save and hold. On return the image is written to its trailer, the tasks are frozen by their
        cgroup, and COMMITTING is durable. On failure they are stopped or run: `thaw()` puts it right."""
        loop = asyncio.get_running_loop()
        self._link.uncap()
        self._guard.enter()
        await self.thread.run(self._save, journal, header, late_files, loop)

    def _save(
        self,
        journal: Journal,
        header: JournalHeader,
        late_files: Callable[[], Awaitable[None]] | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        with self.log.phase("quiesce"):
            self._source.quiesce(_PASSING_SECONDS)
        if self.rounds and self.rounds[-1].pages in _AHEAD:
            # What was written since the last round took as long as that round did; this takes a part of it. Nobody
            # waits for it: at the worst it is on its way when what is left would be.
            self.ahead = self._source.round()
        self._source.seize()
        self._quiesce()
        self.frozen_at = time.monotonic_ns()
        self._source.freeze()
        fault("source.frozen")
        # The disk works while we do; hold() must find the record durable, nothing earlier needs it.
        committing = self.journal_thread.submit(journal.record, Recorded.COMMITTING, header=header)
        if late_files is not None:
            with self.log.phase("changed files"):
                asyncio.run_coroutine_threadsafe(_awaited(late_files), loop).result()
        self._source.final(self._shut_network)
        self.close_stream()
        yield_processor()  # the last of the image is to be sent
        if self.network is not None:
            self.orphans = list(self.network.orphans())
        with self.log.phase("journal"):
            committing.result()
        fault("source.committing")
        self._source.hold()
        fault("source.saved")

    def _quiesce(self) -> None:
        """Hold back new connections, and let those that have begun be established and accepted: a connection that
        no descriptor names cannot be saved. The workload runs."""
        if self.network is None:
            return
        with self.log.phase("quiesce"):
            self.network.hold()
            begun = time.monotonic()
            while self.network.handshakes() and time.monotonic() - begun < _HANDSHAKE_SECONDS:
                time.sleep(_HANDSHAKE_PAUSE)
            self._source.quiesce(_ACCEPT_SECONDS)

    def _shut_network(self) -> None:
        if self.network is not None:
            with self.log.phase("network lock"):
                self.network.lock()

    def close_stream(self) -> None:
        """No more will be written."""
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1

    async def stop(self) -> None:
        """End the stream where it is, and wait until the engine has noticed."""
        if self.pump is not None:
            await self.pump.stop()
        elif self._read_fd >= 0:
            os.close(self._read_fd)
            self._read_fd = -1
        await self.thread.idle()

    async def thaw(self) -> None:
        """The workload runs on the source, as if nothing had been asked."""
        await self.stop()
        if self.source is not None:
            await self.thread.run(self.source.thaw)
            self.thawed_at = time.monotonic_ns()
        if self.network is not None:
            await self.thread.run(self.network.unlock)

    # After COMMIT

    async def forward(self, link: Link, arrived: asyncio.Event) -> None:
        """Pass on frames that come to the old place, until they come to the new one; and those of connections that
        stay behind, both ways."""
        if self.network is None:
            return
        taking = asyncio.create_task(self._take_frames(link)) if self.orphans else None
        try:
            end = float("inf")
            while time.monotonic() < end and not (arrived.is_set() and self.network.moved):
                frames = await self.thread.run(self.network.captured)
                await self._pass_on(link, frames)
                if arrived.is_set() and end == float("inf"):
                    end = time.monotonic() + FORWARD_SECONDS
                await asyncio.sleep(_FORWARD_EVERY)
        finally:
            if taking is not None:
                taking.cancel()

    async def serve_orphans(self, link: Link) -> None:
        """Pass on the frames of connections that stay behind, until they have ended or their time is over. The
        source copy is gone."""
        if self.network is None or not self.orphans:
            return
        taking = asyncio.create_task(self._take_frames(link))
        end = time.monotonic() + _ORPHAN_SECONDS
        try:
            while left := await self.thread.run(self.network.orphans_living):
                if time.monotonic() > end or taking.done():
                    self.orphans_lost = left
                    return
                look_again = time.monotonic() + _LOOK_EVERY / 10
                while time.monotonic() < look_again:
                    await self._pass_on(link, [])
                    await asyncio.sleep(_FORWARD_EVERY)
        finally:
            taking.cancel()

    async def _pass_on(self, link: Link, frames: list[bytes]) -> None:
        assert self.network is not None
        if self.orphans:
            frames = frames + await self.thread.run(self.network.outgoing)
        if frames:
            await link.send_packets(frames)

    async def _take_frames(self, link: Link) -> None:
        assert self.network is not None
        with contextlib.suppress(MigratorError, OSError):
            while True:
                await self.thread.run(self.network.deliver, await link.receive_packets())

    def end_switchover(self) -> None:
        """The copy runs: nothing is urgent any more."""
        self._guard.leave()

    async def release(self) -> None:
        """Kill the source copy: it was decided that the destination's runs. May be called twice."""
        if not self._released:
            await self.thread.run(self._source.release)
            self._released = True

    async def release_network(self) -> None:
        """After release(): the network of the source copy stays for what is left of it, or goes."""
        if self.network is not None:
            await self.thread.run(self.network.set_aside if self.orphans else self.network.release)

    async def close(self) -> None:
        """Close what is open. Leaves the workload as it is."""
        self._guard.leave()
        if self.pump is not None and not self.pump.done:
            await self.pump.stop()
        await self.thread.close()
        await self.journal_thread.close()
        self.close_stream()
        if self._read_fd >= 0:
            os.close(self._read_fd)
            self._read_fd = -1
        if self.network is not None:
            self.network.close()

    @property
    def _source(self) -> Source:
        assert self.source is not None
        return self.source


async def _awaited(call: Callable[[], Awaitable[None]]) -> None:
    await call()
