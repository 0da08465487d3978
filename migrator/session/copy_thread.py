"""The engine's half of a destination: everything that touches the copy, on the engine's own thread.

`CopyThread` knows nothing of the protocol; `migrator.session.destination` calls it when the tables say so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable

from migrator.engine.base import Destination, LateLock, Move, Phase
from migrator.errors import MigratorError, ReaderGone
from migrator.protocol import facts
from migrator.protocol import messages as m
from migrator.recovery.hooks import Tools
from migrator.recovery.journal import JournalHeader
from migrator.recovery.settle import kill, thaw, waiting_locks
from migrator.runtime.fault_points import fault
from migrator.runtime.latency import LatencyGuard, yield_processor
from migrator.runtime.pump import Pump
from migrator.runtime.thread import OwnThread
from migrator.session.arrival import Arrival
from migrator.session.interfaces import Link
from migrator.session.phases import PhaseLog
from migrator.session.settings import Prepared

log = logging.getLogger("migrator.session")

_LOCK_SECONDS = 0.2  # of one attempt
_PATIENCE = 2.0  # seconds after which it is logged what the copy waits for


class CopyThread:
    """One copy, from the proposal to its first instruction.

    The stream goes `link.pump_out` -> pipe -> engine. When the work is stopped or the link fails, the pipe's writing
    end is closed, so that an engine that is reading finds the end of the stream.
    """

    def __init__(self, link: Link, tools: Tools) -> None:
        self.thread = OwnThread("engine")
        self.network = Arrival(link)
        self.guard = LatencyGuard()
        self.log = PhaseLog()
        self.prepared: Prepared | None = None
        self.pid = 0
        self.resumed_at = 0  # ns of CLOCK_MONOTONIC
        self._link, self._tools = link, tools
        self._engine: Destination | None = None
        self._pump: Pump | None = None
        self._held = asyncio.Event()  # the copy is held, or never will be
        self._awaited = False
        self._error: BaseException | None = None
        self._tidied = False

    async def prepare(self, prepare: Callable[[m.Propose], Prepared], proposal: m.Propose) -> None:
        """Check that the workload fits, and make ready for it. Raises Refused."""
        self.prepared = await self.thread.run(prepare, proposal)

    # Until it is held

    async def build(self, standing: Callable[[int], None], built: Callable[[], None]) -> None:
        """Read the stream, build the copy and hold it. `standing` is called with the number of each round that is in
        place, `built` when nothing is left that could fail but the holding. Raises why it could not be built; but an
        error that held() waits for is what that raises."""
        assert self.prepared is not None
        read_fd, write_fd = os.pipe()
        pump = self._pump = Pump(self._link.pump_out, write_fd)
        loop = asyncio.get_running_loop()
        try:
            await self.thread.run(self._build, self.prepared, read_fd, _on(loop, standing), _on(loop, built), loop)
        except Exception as error:
            # A stream that was cut off is the symptom; why it was cut off is the cause. But an engine that fails
            # stops reading, which the pump may notice first.
            cut = pump.error
            self._error = error if cut is None or isinstance(cut, ReaderGone) else cut
            if not isinstance(self._error, MigratorError | OSError):
                log.exception("building failed")
            if not self._awaited:
                raise self._error from None
        finally:
            self._held.set()

    def _build(
        self,
        prepared: Prepared,
        read_fd: int,
        standing: Callable[[int], None],
        built: Callable[[], None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        try:
            engine = self._engine = prepared.factory(read_fd)
            engine.on_round = standing
            self.pid = engine.build()
            fault("destination.built")
            # Told from here: what follows has the time of a round trip.
            built()
            yield_processor()
            engine.hold()
            fault("destination.held")
        finally:
            os.close(read_fd)
        loop.call_soon_threadsafe(self._held.set)
        self.network.prepare(prepared.network)

    async def held(self) -> BaseException | None:
        """Wait until the copy is held by its cgroup; why it could not be, if so."""
        self._awaited = True
        if self._pump is not None:
            await self._held.wait()
        return self._error

    async def stop(self) -> None:
        """End the stream where it is, and wait until the engine has noticed."""
        await self._stop_pump()
        await self.thread.idle()

    async def _stop_pump(self) -> None:
        if self._pump is not None:
            await self._pump.stop()

    # Once it is decided

    async def take_locks(self, header: JournalHeader) -> None:
        """Wait until the copy has the locks of `header`, which the source's has until it is killed. Raises OSError,
        MigratorError where that is not possible; the copy stays frozen then."""
        said, begun = False, time.monotonic()
        with self.log.phase("locks"):
            while waits := await self.thread.run(waiting_locks, header, self._tools, _LOCK_SECONDS):
                if not said and time.monotonic() - begun > _PATIENCE:
                    log.warning("%s: the copy stays frozen until it has %s", header.migration, waits)
                    said = True

    async def resume(self, header: JournalHeader) -> None:
        """Let the copy run: by the engine, or where that fails by the cgroup of `header`."""
        fault("destination.locked")
        loop = asyncio.get_running_loop()
        if self.network.prepared:  # what is left to do takes less time than a thread costs
            self._resume(header, loop)
        else:
            await self.thread.run(self._resume, header, loop)

    def _resume(self, header: JournalHeader, loop: asyncio.AbstractEventLoop) -> None:
        assert self._engine is not None and self.prepared is not None
        self.network.prepare(self.prepared.network)
        self.network.open(loop)
        self.guard.leave()  # else the copy would wait for a processor behind this program
        try:
            self._engine.resume()
        except Exception:
            if not thaw(header, self._tools):
                raise
        finally:
            self.network.runs()
        ends = [phase.end for phase in self._engine.phases if phase.name == "resume"]
        self.resumed_at = max(ends, default=time.monotonic_ns())
        fault("destination.resumed")

    async def report(self, migration: str, phases: Iterable[Phase]) -> m.DestinationReport:
        """What only this side knows, once it is known when the copy was heard again; `phases` beside ours."""
        first = await self.network.first_packet(self.resumed_at)
        told = [facts.Phase.of(phase) for phase in [*phases, *self.phases][-200:]]
        return m.DestinationReport(migration, told, self.pid, first)

    async def tidy(self) -> None:
        """Close what was needed to build, once. A failure is logged."""
        if self._engine is not None and not self._tidied:
            self._tidied = True
            try:
                await self.thread.run(self._engine.tidy)
            except Exception as error:
                log.warning("%s", error)

    async def discard(self, header: JournalHeader) -> None:
        """Kill what was built: by the engine, or where that fails by the cgroup of `header`."""
        await self.stop()
        try:
            if self._engine is not None:
                await self.thread.run(self._engine.discard)
        except Exception as error:
            log.warning("the engine could not discard the copy (%s): killing it by its cgroup", error)
            await self.thread.run(kill, header, self._tools)

    @property
    def root_pid(self) -> int:
        """Of the copy; 0 where there is none."""
        return self._engine.root_pid if self._engine is not None else 0

    @property
    def moves(self) -> list[Move]:
        """See `migrator.engine.base.Destination`."""
        return self._engine.moves if self._engine is not None else []

    @property
    def late_locks(self) -> list[LateLock]:
        """See `migrator.engine.base.Destination`."""
        return self._engine.late_locks if self._engine is not None else []

    @property
    def phases(self) -> list[Phase]:
        """Of network and engine."""
        return [*self.network.phases, *self.log.phases, *(self._engine.phases if self._engine is not None else [])]

    async def close(self) -> None:
        """Close what is open. Leaves the copy as it is."""
        self.guard.leave()
        await self._stop_pump()
        await self.thread.close()
        await self.network.close()


def _on(loop: asyncio.AbstractEventLoop, call: Callable[..., None]) -> Callable[..., None]:
    """`call`, done on the loop; nothing once that has ended."""

    def there(*arguments: int) -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(call, *arguments)

    return there
