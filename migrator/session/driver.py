"""What both ends of a migration have in common: a queue of events, a `Machine`, and work beside it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from migrator.protocol.machine import Machine
from migrator.protocol.states import Action, Event, State

log = logging.getLogger("migrator.session")

T = TypeVar("T")


class Driver(Generic[State, Event, Action]):
    """Hands out the events of one session, one at a time, and has the actions done that its table names.

    name:       of the migration, for the log
    act:        does one action; an event that it returns is taken at once, before any other
    failed:     is told why an action failed; the actions after it are not done
    tolerated:  actions without which the outcome is the same: their failure is logged and no more
    """

    def __init__(
        self,
        machine: Machine[State, Event, Action],
        name: str,
        *,
        act: Callable[[Action], Awaitable[Event | None]],
        failed: Callable[[BaseException], None],
        tolerated: frozenset[Action],
    ) -> None:
        self.machine = machine
        self._name = name
        self._act, self._failed, self._tolerated = act, failed, tolerated
        self._events: asyncio.Queue[tuple[Event, BaseException | None]] = asyncio.Queue()
        self._work: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def post(self, event: Event, why: BaseException | None = None) -> None:
        """Queue an event. On the event loop's thread."""
        self._events.put_nowait((event, why))

    async def next(self) -> tuple[Event, BaseException | None]:
        """The next event, and what caused it."""
        return await self._events.get()

    async def take(self, event: Event) -> None:
        """Move on by an event, and do all that it asks for."""
        before = self.machine.state
        self.machine.take(event)
        log.debug("%s: %s, %s -> %s", self._name, before.value, event.value, self.machine.state.value)
        for action in self.machine:
            try:
                outcome = await self._act(action)
            except Exception as error:
                if action in self._tolerated:
                    log.warning("%s: %s: %s", self._name, action.value, error)
                    continue
                self.machine.drop()
                self._failed(error)
                return
            if outcome is not None:
                self.machine.take(outcome)

    def begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Begin a long action; there is one at a time."""
        self._work = asyncio.create_task(work, name=name)

    async def guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do what goes on beside the events; if it fails, that is told as of an action."""
        try:
            await work()
        except Exception as error:
            self._failed(error)

    @property
    def working(self) -> bool:
        return self._work is not None and not self._work.done()

    async def stop_work(self, interrupt: Callable[[], Awaitable[None]]) -> None:
        """End the long action where it is. `interrupt` makes threads notice that it waits for."""
        work, self._work = self._work, None
        if work is not None and not work.done():
            work.cancel()
            await interrupt()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do this beside everything else. close() cancels it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call this in some seconds, unless the session is over by then."""

        async def later() -> None:
            await asyncio.sleep(seconds)
            call()

        self.spawn(later())

    async def close(self) -> None:
        # Again, for what one of them has begun meanwhile.
        while left := [task for task in (self._work, *self._tasks) if task is not None and not task.done()]:
            for task in left:
                task.cancel()
            await asyncio.wait(left)


async def finish(work: Coroutine[Any, Any, T], name: str, cancel: Callable[[], None]) -> tuple[asyncio.Task[T], bool]:
    """Do `work` to its end: cancelling the caller only calls `cancel`. The ended task, and whether that was done."""
    whole = asyncio.create_task(work, name=name)
    cancelled = False
    while not whole.done():
        try:
            await asyncio.wait([whole])
        except asyncio.CancelledError:
            cancelled = True
            cancel()
    return whole, cancelled
