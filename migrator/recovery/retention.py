"""How long journals are kept, how many of one peer, and who may ask about them.

A peer is known by the key that it has logged in with. One that came by another way ("" for its key) has logged in as
root on this host and may ask about every migration.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from migrator.protocol.states import Recorded
from migrator.recovery.journal import Journal, JournalError, Role

RETENTION = 7 * 86400.0  # seconds for which a settled journal goes on answering
MOST_OF_ONE_PEER = 1000  # journals


def forget_old(directory: Path, *, now: float, retention: float = RETENTION) -> int:
    """Delete settled journals older than `retention` seconds; returns how many.

    Their answers are not needed any more: a source that still waits has asked within that time, or an
    operator has decided for it.
    """
    count = 0
    for path in directory.glob("*.journal") if directory.is_dir() else ():
        with contextlib.suppress(OSError, JournalError), Journal.open(path) as journal:
            if journal.settled and journal.records[-1].at < now - retention and journal.try_lock():
                path.unlink()
                count += 1
    return count


def make_room(directory: Path, key: str) -> None:
    """Before a journal is made that the peer with this key asks for: where it has as many as it may, forget the older
    half of those that are closed. Nobody asks about them again. Raises JournalError where that is not enough."""
    paths = list(directory.glob(f"*.{Role.DESTINATION.value}.journal")) if directory.is_dir() else []
    if len(paths) < MOST_OF_ONE_PEER:
        return
    count, closed = 0, list[tuple[float, Path]]()
    for path in paths:
        with contextlib.suppress(OSError, JournalError), Journal.open(path) as journal:
            if journal.header.key == key:
                count += 1
                if journal.state is Recorded.CLOSED:
                    closed.append((journal.records[-1].at, path))
    if count < MOST_OF_ONE_PEER:
        return
    for _, path in sorted(closed)[: max(len(closed) // 2, 1)]:
        path.unlink(missing_ok=True)
        count -= 1
    if count >= MOST_OF_ONE_PEER:
        raise JournalError(
            f"{count} migrations of this peer are not settled here",
            hint="let their sources ask for them, or run `migrator settle` on both hosts",
        )


def check_asker(journal: Journal, key: str) -> None:
    """Raises JournalError unless the peer with this key is the one that the migration belongs to."""
    if key and journal.header.key != key:
        raise JournalError(
            f"migration {journal.header.migration} was not begun here with the key that asks: "
            "`migrator settle --identity KEY` asks with another",
            hint="ask with that key; where it is gone: `migrator settle --here` or `--away` on the source",
        )
