"""The state of a fleet, typed, over any store. What cannot be read is an error; nothing is guessed or skipped.

state = await FleetState.open(store)
await state.register(host)
async with lead(store, "controller-1") as lock: ...
await state.begin(move, guard=lock)
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from migrator.errors import UsageError
from migrator.fleet import records as r
from migrator.fleet.store import Conflict, Entry, Lease, Lock, Store, StoreCorrupt, Write

R = TypeVar("R", bound=r.Record)

KEPT_HISTORY = 10_000
_FORGET = 90  # at once, in one transaction


@dataclass(frozen=True, slots=True)
class Stored(Generic[R]):
    """A record and the revision to expect when it is written again."""

    record: R
    revision: int


class Table(Generic[R]):
    """The records of one kind, below one prefix."""

    def __init__(self, store: Store, prefix: str, kind: type[R]) -> None:
        self._store = store
        self.prefix = prefix
        self.kind = kind

    async def get(self, name: str) -> Stored[R] | None:
        entry = await self._store.get(self.prefix + name)
        return self.decode(entry) if entry else None

    async def all(self) -> dict[str, Stored[R]]:
        """By name, in its order."""
        listing = await self._store.scan(self.prefix)
        return {entry.key.removeprefix(self.prefix): self.decode(entry) for entry in listing.entries}

    async def put(self, name: str, record: R, *, expected: int | None = None, guard: Lock | None = None) -> int:
        return await self._store.apply([self.write(name, record, expected=expected)], guard=guard)

    async def delete(self, name: str, *, expected: int | None = None, guard: Lock | None = None) -> None:
        await self._store.apply([Write(self.prefix + name, None, expected)], guard=guard)

    def write(self, name: str, record: R, *, expected: int | None = None, lease: Lease | None = None) -> Write:
        """The write of a record, for a transaction. Raises UsageError if it could not be read again."""
        value = msgspec.json.encode(record)
        try:
            msgspec.json.decode(value, type=self.kind)
        except msgspec.MsgspecError as error:
            raise UsageError(f"bad {self.kind.__name__} {name[:80]!r}: {error}") from None
        return Write(self.prefix + name, value, expected, lease)

    def decode(self, entry: Entry) -> Stored[R]:
        """Raises StoreCorrupt for what is no such record."""
        try:
            return Stored(msgspec.json.decode(entry.value, type=self.kind), entry.revision)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StoreCorrupt(
                f"{entry.key} in the fleet's store is no {self.kind.__name__}: {error}",
                hint="restore the store from a backup, or delete that key",
            ) from None


class FleetState:
    """The tables, and the transactions that concern more than one of them."""

    def __init__(self, store: Store, fleet: r.Fleet) -> None:
        """Use `open`."""
        self.store = store
        self.fleet = fleet
        self.hosts = Table(store, "hosts/", r.Host)
        self.alive = Table(store, "alive/", r.Alive)
        self.cordons = Table(store, "cordons/", r.Cordon)
        self.plans = Table(store, "plans/", r.Plan)
        self.moves = Table(store, "moves/", r.Move)
        self.history = Table(store, "history/", r.FinishedMove)
        self.schedules = Table(store, "schedules/", r.SnapshotSchedule)
        self.rules = Table(store, "rules/", r.Rule)
        self._settings = Table(store, "settings/", r.Settings)

    @classmethod
    async def open(cls, store: Store) -> FleetState:
        """The state in `store`; one that is empty becomes a new fleet."""
        table = Table(store, "fleet/", r.Fleet)
        found = await table.get("id")
        if found is None:
            made = r.Fleet(id=secrets.token_hex(8), made_at=time.time())
            try:
                await table.put("id", made, expected=0)
            except Conflict:  # another controller did the same
                pass
            found = await table.get("id")
        if found is None:
            raise StoreCorrupt("the fleet's id vanished as soon as it was written")
        return cls(store, found.record)

    async def register(self, host: r.Host) -> None:
        """Add a host, or replace what is known of it."""
        await self.hosts.put(host.name, host)

    async def beat(self, alive: r.Alive, lease: Lease) -> None:
        """Say that a host lives, for as long as `lease` does."""
        await self.store.apply([self.alive.write(alive.host, alive, lease=lease)])

    async def unregister(self, host: str, *, guard: Lock | None = None) -> None:
        """Forget a host. Raises UsageError while moves from or to it are under way."""
        busy = [
            m.record.workload
            for m in (await self.moves.all()).values()
            if host in (m.record.source, m.record.destination)
        ]
        if busy:
            raise UsageError(f"{host} is part of moves under way: {', '.join(busy)}")
        await self.store.apply(
            [Write(f"{table}{host}", None) for table in ("hosts/", "cordons/", "alive/")], guard=guard
        )

    async def settings(self) -> r.Settings:
        """Those that were set, or the defaults."""
        found = await self._settings.get("balance")
        return found.record if found else r.Settings()

    async def set_settings(self, settings: r.Settings) -> None:
        await self._settings.put("balance", settings)

    async def begin(self, move: r.Move, *, guard: Lock) -> int:
        """Claim a workload for a move, before it is begun. Its revision is what `end` needs.

        Raises Conflict if it is being moved already, NotHeld if another controller leads.
        """
        if move.token != guard.token:
            raise UsageError(f"the move of {move.workload} has token {move.token}, the lock {guard.token}")
        return await self.moves.put(move.workload, move, expected=0, guard=guard)

    async def end(self, finished: r.FinishedMove, *, expected: int, guard: Lock | None = None) -> None:
        """Put a move into the history; its workload can be moved again from the same instant on.

        Raises Conflict if the move is not the one with revision `expected` any more.
        """
        move = finished.move
        await self.store.apply(
            [
                Write(self.moves.prefix + move.workload, None, expected),
                self.history.write(f"{int(finished.ended_at * 1000):015d}.{move.migration}", finished, expected=0),
            ],
            guard=guard,
        )

    async def trim_history(self, keep: int = KEPT_HISTORY) -> int:
        """Forget the oldest of the history beyond `keep`; returns how many."""
        keys = [entry.key for entry in (await self.store.scan(self.history.prefix)).entries]
        old = keys[: max(len(keys) - keep, 0)]
        for start in range(0, len(old), _FORGET):
            await self.store.apply([Write(key, None) for key in old[start : start + _FORGET]])
        return len(old)
