"""Migrations that a controller has asked this host for.

Each is a task of its own: it goes on if whoever asked goes away, and its end is remembered for the next who asks.
What an agent that was started anew does not know any more, its journals have settled; then the controller looks where
the workload runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from pathlib import Path

import migrator
from migrator import model
from migrator.errors import Fate, MigratorError, Refused, Undecided, UsageError
from migrator.fleet.fencing import Fence, FencingError, TokenRefused
from migrator.fleet.storage import check_container
from migrator.host import Login
from migrator.protocol.fleet import Depart, Departed, Departing

log = logging.getLogger("migrator.fleet")

_REMEMBERED = 1000  # migrations that have ended
_EVERY = 0.2  # seconds between two words about one that is under way


class Departure:
    """One migration; `now` is what can be said about it at the moment."""

    def __init__(self, order: Depart) -> None:
        self.order = order
        self.now: Departing | Departed = Departing(order.migration, "connecting")
        self.task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def tell(self, now: Departing | Departed) -> None:
        self.now = now
        self._changed.set()

    def observe(self, event: model.Event) -> None:
        """For `on_event` of the migration."""
        known = self.now if isinstance(self.now, Departing) else Departing(self.order.migration)
        match event:
            case model.PhaseStarted():
                self.tell(Departing(self.order.migration, event.name, known.bytes, known.predicted_downtime))
            case model.Transferred():
                self.tell(Departing(self.order.migration, event.phase, event.bytes, known.predicted_downtime))
            case model.RoundDone():
                sent = known.bytes + event.round.bytes
                self.tell(Departing(self.order.migration, known.phase, sent, event.predicted_downtime))
            case _:
                pass

    async def follow(self) -> AsyncIterator[Departing | Departed]:
        """What is to be said, until it is over."""
        while True:
            self._changed.clear()
            yield self.now
            if isinstance(self.now, Departed):
                return
            await self._changed.wait()
            if not isinstance(self.now, Departed):
                await asyncio.sleep(_EVERY)


class Departures:
    """Those of one agent."""

    def __init__(self, login: Login, fences: Path) -> None:
        self._login = login
        self._fences = fences
        self._known: OrderedDict[str, Departure] = OrderedDict()

    def find(self, migration: str) -> Departure | None:
        return self._known.get(migration)

    def moving(self) -> set[str]:
        """Names of the workloads that are on their way."""
        return {one.order.workload for one in self._known.values() if isinstance(one.now, Departing)}

    async def begin(self, order: Depart) -> Departure:
        """Begin it, or find it begun. Raises TokenRefused, FencingError or UsageError; nothing was touched then."""
        await asyncio.to_thread(Fence(order.fleet, self._fences).check, order.token)
        known = self._known.get(order.migration)
        if known is not None:
            return known
        check_container(order.workload)
        if order.workload in self.moving():
            raise UsageError(f"container {order.workload!r} is being moved already", hint="wait for that to end")
        made = self._known[order.migration] = Departure(order)
        made.task = asyncio.create_task(self._run(made), name=f"departure of {order.workload}")
        self._forget()
        return made

    async def _run(self, departure: Departure) -> None:
        order = departure.order
        log.info("%s goes to %s, migration %s, as the controller wants", order.workload, order.peer, order.migration)
        try:
            result = await migrator.migrate(
                order.workload,
                order.peer,
                settings=migrator.MigrateSettings(
                    max_downtime=order.max_downtime,
                    timeout=order.timeout,
                    bandwidth=order.bandwidth,
                    copy_files=order.copy_files,
                    migration=order.migration,
                    fleet=order.fleet,
                    token=order.token,
                ),
                login=self._login,
                on_event=departure.observe,
            )
        except MigratorError as error:
            log.warning("%s did not go to %s: %s", order.workload, order.peer, error)
            departure.tell(failed(order.migration, error))
        except asyncio.CancelledError:
            departure.tell(Departed(order.migration, "aborted", Fate.SOURCE.value, "the agent is being stopped"))
            raise
        except Exception as error:
            log.exception("%s did not go to %s", order.workload, order.peer)
            departure.tell(Departed(order.migration, "unknown", "", f"the agent failed: {error}"[:4000]))
        else:
            departure.tell(
                Departed(
                    order.migration,
                    result.outcome.value,
                    result.fate,
                    result.reason,
                    downtime=result.downtime,
                    predicted_downtime=max(result.predicted_downtime, 0.0),
                    seconds=result.total,
                    bytes=result.wire_bytes,
                )
            )

    def _forget(self) -> None:
        ended = [name for name, one in self._known.items() if isinstance(one.now, Departed)]
        for name in ended[: max(len(ended) - _REMEMBERED, 0)]:
            del self._known[name]

    async def close(self) -> None:
        """Abort those that can still be aborted, and wait for the others."""
        tasks = [one.task for one in self._known.values() if one.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def failed(migration: str, error: MigratorError) -> Departed:
    """What is to be said about one that did not come about."""
    outcome = "aborted"
    if isinstance(error, Undecided):
        outcome = "undecided"
    elif isinstance(error, Refused | UsageError | TokenRefused | FencingError):
        outcome = "refused"
    fate = Fate.SOURCE if error.fate is Fate.UNTOUCHED else error.fate
    return Departed(migration, outcome, fate.value, str(error)[:4000], error.hint[:4000])
