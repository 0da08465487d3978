"""What commands that act on a fleet share: they lead for as long as they take, if nobody else does."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable

from rich.live import Live
from rich.table import Table

from migrator.cli.output import Console, err, table_of
from migrator.fleet import records as r
from migrator.fleet.controller import LEADER, Controller
from migrator.fleet.membership import Fleet
from migrator.fleet.store import Lease, Lock, StoreUnavailable
from migrator.text import duration, size

_LOOK_EVERY = 0.3  # seconds
_STAND_IN = 120.0  # seconds that a short order may take


@contextlib.asynccontextmanager
async def leading(fleet: Fleet) -> AsyncIterator[Controller]:
    """What is asked for in the block is done by the controller that leads; by this command where none does, or where
    it dies meanwhile."""
    controller = Controller(fleet, name=f"{os.uname().nodename}:{os.getpid()}", balances=False)
    running = asyncio.create_task(controller.run())
    try:
        yield controller
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@contextlib.asynccontextmanager
async def standing_in(fleet: Fleet) -> AsyncIterator[Lock]:
    """A lock whose token agents take, for something short that is no move: the leader's own where none leads, else
    one of its own, so that the leader goes on.

    Tokens of both are revisions of one store, and the leader's is raised by none: an order of ours carries the
    leader's token if there is one, and is refused like his if he is deposed meanwhile.
    """
    store = fleet.state.store
    lock = await store.acquire(LEADER, f"{os.uname().nodename}:{os.getpid()}".encode(), ttl=_STAND_IN)
    if lock is not None:
        try:
            yield lock
        finally:
            await store.release(lock)
        return
    holder = await store.holder(LEADER)
    if holder is None:
        raise StoreUnavailable("the lead changes just now", hint="try again")
    yield Lock(LEADER, holder.revision, Lease(0, 0.0, 0.0))


def whoami() -> str:
    """Who asks, for others to read."""
    with contextlib.suppress(OSError):
        return f"{os.getlogin()}@{os.uname().nodename}"
    return f"uid {os.getuid()}@{os.uname().nodename}"


async def followed(
    look: Callable[[], Awaitable[tuple[str, bool]]], controller: Controller, *, console: Console = err
) -> None:
    """Show how it goes until it is over: `look` gives a line about it, and whether it is. On a terminal in one place,
    with the moves below; else each line that is new."""
    last = ""
    live = Live(console=console.rich, auto_refresh=False, transient=True)
    with live if console.rich.is_terminal else contextlib.nullcontext():
        while True:
            line, over = await look()
            if console.rich.is_terminal:
                live.update(_with_moves(line, controller), refresh=True)
            elif line != last:
                console.say("{}", line)
            last = line
            if over:
                return
            await asyncio.sleep(_LOOK_EVERY)


def _with_moves(line: str, controller: Controller) -> Table:
    rows = []
    known = controller.observer.known.moves
    mover = controller.mover
    for name in sorted(mover.busy) if mover is not None else ():
        now, move = mover.progress.get(name) if mover is not None else None, known.get(name)
        rows.append(
            [
                f"  {name}",
                f"{move.source} to {move.destination}" if move is not None else "",
                now.phase if now is not None else "",
                size(now.bytes) if now is not None and now.bytes else "",
                f"would stop {duration(now.predicted_downtime)}"
                if now is not None and now.predicted_downtime is not None
                else "",
            ]
        )
    table = table_of([line, "", "", "", ""], rows)
    table.header_style = "bold"
    return table


def outcome_line(finished: r.FinishedMove) -> str:
    """One line about a move that has ended."""
    move = finished.move
    if finished.outcome is not r.Outcome.MIGRATED:
        return f"{move.workload} stays on {move.source}: {finished.why or finished.outcome.value}"
    stopped = f", stopped for {duration(finished.downtime)}" if finished.downtime else ""
    foretold = f" (predicted {duration(move.predicted_downtime)})" if finished.downtime else ""
    return f"{move.workload} went from {move.source} to {move.destination}{stopped}{foretold}, {size(finished.bytes)}"
