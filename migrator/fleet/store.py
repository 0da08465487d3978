"""Where the state of a fleet lives: keys with revisions, leases and fencing tokens, behind one interface.

    store = await open_store("sqlite:/var/lib/migrator/fleet.db")
    lock = await store.acquire("leader", b"controller-1", ttl=10.0)
    await store.put("hosts/a", b"{...}", expected=0, guard=lock)

Two implementations promise the same: `migrator.fleet.sqlite` (one host, nothing to install) and
`migrator.fleet.etcd` (several controllers). Every write is one transaction: all of it is durable when the call
returns, or none of it ever is. The revision counts the writes of the whole store and never goes back, so the
revision at which a lock was taken is its fencing token: who takes it later has a higher one.

`migrator.fleet.state` puts typed records on top.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from migrator.errors import MigratorError, UsageError

DEFAULT_URL = "sqlite:/var/lib/migrator/fleet.db"
MAX_KEY = 512  # characters
MAX_VALUE = 1 << 20  # bytes in one transaction; etcd's own default limits are 1.5 MiB
MAX_WRITES = 100  # and 128 operations

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]*(/[A-Za-z0-9][A-Za-z0-9._:@+-]*)*")
_LOCKS = "locks/"
_RELEASE_WITHIN = 5.0  # seconds; after that the lease runs out by itself


class StoreUnavailable(MigratorError):
    """The store cannot be reached, or can take nothing more. A write that raised this may have been done or
    not, but wholly one or the other: read again before acting."""

    exit_code = 11


class StoreCorrupt(MigratorError):
    """What the store holds is not what was written, or not ours. Nothing is read from it or written to it."""

    exit_code = 12


class Conflict(MigratorError):
    """Another writer was first: the revision expected is not the one there is. Nothing was written."""

    exit_code = 13


class NotHeld(Conflict):
    """The lock that guards the write, or the lease, is not ours any more. Nothing was written."""


class Compacted(MigratorError):
    """The changes asked for are not kept any more: scan again, and watch from there."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A key, its value, and the revision of the write that put it there."""

    key: str
    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All entries below a prefix, by key, and the revision of the store at which they were there."""

    entries: tuple[Entry, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Change:
    """A write that was seen: the new value, None if the key was deleted or its lease has ended."""

    key: str
    value: bytes | None
    revision: int


@dataclass(frozen=True, slots=True)
class Lease:
    """Keys put under it vanish `ttl` seconds after its last renewal. It was asked for at `asked_at` (`now`)."""

    id: int
    ttl: float
    asked_at: float


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that is held as long as its lease lives. `token` is higher than that of every earlier holder."""

    name: str
    token: int
    lease: Lease

    @property
    def key(self) -> str:
        return _LOCKS + self.name


@dataclass(frozen=True, slots=True)
class Write:
    """One key to put, or to delete where `value` is None.

    expected: the revision that the key must have; 0 for "must not be there", None for any
    """

    key: str
    value: bytes | None
    expected: int | None = None
    lease: Lease | None = None


class Store(Protocol):
    """What both stores promise. Raises StoreUnavailable or StoreCorrupt everywhere.

    A call that is cancelled may have been done or not, as one that raised StoreUnavailable.
    """

    async def get(self, key: str) -> Entry | None: ...

    async def scan(self, prefix: str) -> Listing:
        """What is below `prefix`, which ends in a slash or is empty for everything."""
        ...

    async def apply(self, writes: Sequence[Write], *, guard: Lock | None = None) -> int:
        """Do all of the writes or none; returns their revision.

        Raises Conflict where a key has another revision than expected, NotHeld where `guard` or a lease is
        not alive any more.
        """
        ...

    def watch(self, prefix: str, *, after: int) -> AsyncIterator[tuple[Change, ...]]:
        """The changes below `prefix` with a revision above `after`, in order, for ever; those of one
        transaction together. Raises Compacted if they are not kept any more."""
        ...

    async def grant(self, ttl: float) -> Lease:
        """A lease of at least `ttl` seconds."""
        ...

    async def renew(self, lease: Lease) -> None:
        """Let the lease begin anew. Raises NotHeld if it has ended."""
        ...

    async def revoke(self, lease: Lease) -> None:
        """End the lease, and with it its keys. One that has ended already is none."""
        ...

    async def close(self) -> None: ...

    async def put(
        self,
        key: str,
        value: bytes,
        *,
        expected: int | None = None,
        lease: Lease | None = None,
        guard: Lock | None = None,
    ) -> int:
        """`apply` with one key to put."""
        return await self.apply([Write(key, value, expected, lease)], guard=guard)

    async def delete(self, key: str, *, expected: int | None = None, guard: Lock | None = None) -> int:
        """`apply` with one key to delete; deleting what is not there is no error unless it was expected."""
        return await self.apply([Write(key, None, expected)], guard=guard)

    async def acquire(self, name: str, owner: bytes, *, ttl: float) -> Lock | None:
        """Take the lock, or None if somebody has it. `owner` is there for all to read, under `Lock.key`."""
        lease = await self.grant(ttl)
        taken = None
        try:
            taken = await self.apply([Write(_LOCKS + name, owner, 0, lease)])
        except Conflict:
            return None
        finally:
            if taken is None:
                await self._give_up(lease)
        return Lock(name, taken, lease)

    async def holder(self, name: str) -> Entry | None:
        """Who has the lock: its owner's value, and the token as revision."""
        return await self.get(_LOCKS + name)

    async def release(self, lock: Lock) -> None:
        """Give the lock up now; if the store cannot be reached, its lease ends it."""
        await self._give_up(lock.lease)

    async def _give_up(self, lease: Lease) -> None:
        with contextlib.suppress(StoreUnavailable, TimeoutError):
            async with asyncio.timeout(_RELEASE_WITHIN):
                await self.revoke(lease)


async def open_store(url: str = DEFAULT_URL) -> Store:
    """`sqlite:/path/to/file`, or `etcd:http://a:2379,http://b:2379` (`https` with `?ca=FILE&cert=FILE&key=FILE`).

    Raises UsageError for another, StoreUnavailable, StoreCorrupt.
    """
    kind, _, rest = url.partition(":")
    if kind == "sqlite" and rest:
        from migrator.fleet.sqlite import SqliteStore

        return await SqliteStore.open(rest)
    if kind == "etcd" and rest:
        try:
            from migrator.fleet.etcd import EtcdStore
        except ImportError as error:
            raise UsageError(f"{error.name} is not installed", hint="pip install 'migrator[etcd]'") from None
        return await EtcdStore.open(rest)
    raise UsageError(f"{url!r} is no store", hint="such as sqlite:/var/lib/migrator/fleet.db or etcd:http://a:2379")


def check_writes(writes: Sequence[Write]) -> None:
    """Raises UsageError for what no store takes: bad or repeated keys, values or transactions that are too big."""
    if not 1 <= len(writes) <= MAX_WRITES:
        raise UsageError(f"a transaction has 1 to {MAX_WRITES} writes, not {len(writes)}")
    seen = set()
    total = sum(len(write.value) for write in writes if write.value is not None)
    if total > MAX_VALUE:
        raise UsageError(f"{total} bytes in one transaction; {MAX_VALUE} are the most")
    for write in writes:
        check_key(write.key)
        if write.key in seen:
            raise UsageError(f"{write.key} twice in one transaction")
        seen.add(write.key)


def check_key(key: str) -> None:
    if len(key) > MAX_KEY or not _KEY.fullmatch(key):
        raise UsageError(f"bad key {key[:80]!r}")


def check_prefix(prefix: str) -> None:
    if prefix:
        check_key(prefix.removesuffix("/"))
        if not prefix.endswith("/"):
            raise UsageError(f"bad prefix {prefix[:80]!r}", hint="it ends in a slash")


def now() -> float:
    """Seconds that nobody sets and that also pass while the host is suspended (CLOCK_BOOTTIME)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
