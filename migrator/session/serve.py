"""What a host does for whoever has connected, and how one asks it.

await serve(link, settings)      # on the host: until the other side is done
await ask_over(link, migration)  # from elsewhere: RUNNING or DISCARDED?
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable

from migrator import model
from migrator.errors import MigrationAborted, MigratorError, TransportError, UsageError
from migrator.model import OnEvent
from migrator.protocol import fleet
from migrator.protocol import messages as m
from migrator.protocol.states import Recorded
from migrator.recovery.journal import Journal, Role
from migrator.recovery.settle import answer, settle_destination
from migrator.session.destination import DestinationSession
from migrator.session.interfaces import Link
from migrator.session.settings import DestinationSettings

_LOCK_SECONDS = 10.0

log = logging.getLogger("migrator.session")


# What a controller may ask is answered by others: the answers, in order. Raises MigratorError.
Requests = Callable[[fleet.Request], AsyncIterator[fleet.Answer]]
ALL_RIGHTS = frozenset(("receive", "observe", "send"))


async def serve(
    link: Link,
    settings: DestinationSettings,
    *,
    rights: frozenset[str] = ALL_RIGHTS,
    requests: Requests | None = None,
    on_event: OnEvent = model.nobody,
) -> None:
    """Answer one link until it ends: take a workload in, say what became of one, answer a controller.

    rights:    what the peer may do: receive (bring workloads), observe, send (have workloads sent away)
    requests:  answers what a controller asks

    Returns when the link is done with; raises nothing for what the peer does. Unfinished journals must have
    been settled before (`settle.settle_all`).
    """
    told: list[str] = []  # migrations whose copy is to run, as we have said
    try:
        await link.send(m.encode(m.Hello([m.VERSION], "migrator", settings.host.host)))
        while True:
            message = m.decode(await link.receive())
            check_rights(message, rights, link.peer)
            if isinstance(message, m.Hello):
                m.common_version(message.versions)
            elif isinstance(message, m.Propose):
                known = Journal.find(settings.journal, message.migration, Role.DESTINATION)
                if known is not None:
                    known.close()
                    raise MigrationAborted(f"migration {message.migration} is already known here")
                await DestinationSession(settings, link, on_event=on_event).run(message)
                return
            elif isinstance(message, m.Ask | m.Commit):
                reply = await asyncio.to_thread(answer, settings.journal, message.migration, settings.tools)
                await link.send(m.encode(reply))
                if isinstance(reply, m.Running):
                    told.append(message.migration)
            elif isinstance(message, m.Done):
                await asyncio.to_thread(_done, settings, message.migration)
            elif isinstance(message, fleet.Request) and requests is not None:
                async for reply in requests(message):
                    await link.send(m.encode(reply))
            elif isinstance(message, m.Clock):
                await link.send(m.encode(m.Clock(message.asked, time.monotonic_ns())))
            elif not isinstance(message, m.Abort):
                raise m.MessageError(f"a {type(message).__name__} was not expected")
    except (MigratorError, OSError) as error:
        log.debug("%s: %s", link.peer, error)
        with contextlib.suppress(MigratorError, OSError):
            hint = error.hint if isinstance(error, MigratorError) else ""
            await link.send(m.encode(m.Failure(m.text(error), m.text(hint))))
    finally:
        for migration in told:
            await asyncio.to_thread(_finish, settings, migration)


def _finish(settings: DestinationSettings, migration: str) -> None:
    """A source that has just been told that the copy is to run gives up the locks that the copy waits for."""
    end = time.monotonic() + _LOCK_SECONDS
    while time.monotonic() < end:
        journal = Journal.find(settings.journal, migration, Role.DESTINATION)
        if journal is None:
            return
        with journal:
            if journal.settled or not journal.try_lock() or journal.settled:
                return  # done, or another attends to it
            settle_destination(journal, settings.tools)


def check_rights(message: m.AnyMessage, rights: frozenset[str], peer: str) -> None:
    """Raises UsageError for what the peer's key may not do."""
    needed = ""
    if isinstance(message, fleet.Request):
        needed = fleet.right(message)
    elif isinstance(message, m.Propose | m.Ask | m.Commit | m.Done):
        needed = "receive"
    if needed and needed not in rights:
        what = "to bring workloads here" if needed == "receive" else f"for a {type(message).__name__.lower()}"
        raise UsageError(f"the key of {peer} has no right {what}", hint=f'add "{needed}" to its migrator-rights there')


def _done(settings: DestinationSettings, migration: str) -> None:
    """The source knows that the copy runs: nobody will ask again."""
    journal = Journal.find(settings.journal, migration, Role.DESTINATION)
    if journal is None:
        return
    with journal:
        if journal.try_lock():
            if not journal.settled:
                settle_destination(journal, settings.tools)
            if journal.state is Recorded.RESUMED:
                journal.record(Recorded.CLOSED)


async def ask_over(link: Link, migration: str, *, timeout: float = 30.0) -> Recorded:
    """Ask the destination at the other end of `link` for its decision. Raises TransportError."""
    await link.send(m.encode(m.Hello([m.VERSION], "migrator", "")))
    await link.send(m.encode(m.Ask(migration)))
    end = time.monotonic() + timeout
    while True:
        message = m.decode(await link.receive(max(end - time.monotonic(), 0.01)))
        if isinstance(message, m.Running) and message.migration == migration:
            return Recorded.RUNNING
        if isinstance(message, m.Discarded) and message.migration == migration:
            return Recorded.DISCARDED
        if isinstance(message, m.Failure):
            raise TransportError(f"{link.peer}: {message.reason}", hint=message.hint)
        if not isinstance(message, m.Hello):
            raise m.MessageError(f"a {type(message).__name__} is no answer")
