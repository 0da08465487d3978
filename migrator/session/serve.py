"""What a host does for whoever has connected, and how one asks it.

await serve(link, settings)      # on the host: until the other side is done
await ask_over(link, migration)  # from elsewhere: RUNNING or DISCARDED?
"""

from __future__ import annotations

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
from migrator.recovery.retention import check_asker, make_room
from migrator.recovery.settle import answer, settle_destination
from migrator.runtime.thread import OwnThread
from migrator.session.destination import DestinationSession
from migrator.session.interfaces import Link
from migrator.session.settings import DestinationSettings

_LOCK_SECONDS = 10.0

log = logging.getLogger("migrator.session")


# What a controller may ask is answered by others: the answers, in order. Raises MigratorError.
Requests = Callable[[fleet.Request], AsyncIterator[fleet.Answer]]
_RIGHTS = {"receive": "to bring workloads here", "observe": "to look at this host", "send": "to have it act"}
ALL_RIGHTS = frozenset(_RIGHTS)


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
    async with OwnThread("link") as thread:
        answers = Answers(link, settings, thread, rights, requests)
        try:
            await link.send(m.encode(m.Hello([m.VERSION], "migrator", settings.host.host)))
            proposal = await answers.until_proposal()
            await thread.run(_admit, settings, proposal.migration, link.key)
            await DestinationSession(settings, link, on_event=on_event).run(proposal)
        except (MigratorError, OSError) as error:
            log.debug("%s: %s", link.peer, error)
            with contextlib.suppress(MigratorError, OSError):
                hint = error.hint if isinstance(error, MigratorError) else ""
                await link.send(m.encode(m.Failure(m.text(error), m.text(hint))))
        finally:
            await answers.close()


class Answers:
    """What one peer hears outside of a migration. Reading and writing of journals is done on `thread`, so that a peer
    which asks for much keeps only itself waiting."""

    def __init__(
        self,
        link: Link,
        settings: DestinationSettings,
        thread: OwnThread,
        rights: frozenset[str],
        requests: Requests | None,
    ) -> None:
        self._link, self._settings, self._thread = link, settings, thread
        self._rights, self._requests = rights, requests
        self._told: set[str] = set()  # migrations whose copy is to run, as we have said

    async def until_proposal(self) -> m.Propose:
        """Answer until a workload is proposed. Raises TransportError at the end of the link, MessageError for what is
        not for an agent, UsageError without the right for it, JournalError for a migration of another peer."""
        while True:
            message = m.decode(await self._link.receive())
            check_rights(message, self._rights, self._link.peer)
            if isinstance(message, m.Propose):
                return message
            await self._heard(message)

    async def _heard(self, message: m.AnyMessage) -> None:
        settings, link = self._settings, self._link
        if isinstance(message, m.Hello):
            m.common_version(message.versions)
        elif isinstance(message, m.Ask | m.Commit):
            reply = await self._thread.run(answer, settings.journal, message.migration, settings.tools, link.key)
            await link.send(m.encode(reply))
            if isinstance(reply, m.Running):
                self._told.add(message.migration)
        elif isinstance(message, m.Done):
            await self._thread.run(_done, settings, message.migration, link.key)
        elif isinstance(message, fleet.Request) and self._requests is not None:
            async for said in self._requests(message):
                await link.send(m.encode(said))
        elif isinstance(message, m.Clock):
            await link.send(m.encode(m.Clock(message.asked, time.monotonic_ns())))
        elif not isinstance(message, m.Abort):
            raise m.MessageError(f"a {type(message).__name__} was not expected")

    async def close(self) -> None:
        """A source that was just told that the copy is to run gives up the locks that the copy waits for."""
        end = time.monotonic() + _LOCK_SECONDS
        for migration in self._told:
            await self._thread.run(_finish, self._settings, migration, end)


def _admit(settings: DestinationSettings, migration: str, key: str) -> None:
    known = Journal.find(settings.journal, migration, Role.DESTINATION)
    if known is not None:
        known.close()
        raise MigrationAborted(f"migration {migration} is already known here")
    make_room(settings.journal, key)


def _finish(settings: DestinationSettings, migration: str, end: float) -> None:
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
        raise UsageError(
            f"the key of {peer} has no right {_RIGHTS[needed]}", hint=f'add "{needed}" to its migrator-rights there'
        )


def _done(settings: DestinationSettings, migration: str, key: str) -> None:
    """The source knows that the copy runs: nobody will ask again."""
    journal = Journal.find(settings.journal, migration, Role.DESTINATION)
    if journal is None:
        return
    with journal:
        check_asker(journal, key)
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
