"""The store in one file, for a fleet with a single controller host: SQLite, on a thread of its own.

Several processes of the host may have it open. Leases are measured by CLOCK_BOOTTIME, which all of them share
and nobody sets; those of an earlier boot have ended. The file must be on a local file system: SQLite's
write-ahead log needs shared memory (https://sqlite.org/wal.html).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sqlite3
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from migrator.errors import UsageError
from migrator.fleet.store import (
    Change,
    Compacted,
    Conflict,
    Entry,
    Lease,
    Listing,
    Lock,
    NotHeld,
    Store,
    StoreCorrupt,
    StoreUnavailable,
    Write,
    check_key,
    check_prefix,
    check_writes,
    now,
)
from migrator.runtime.thread import OwnThread

T = TypeVar("T")

APPLICATION_ID = 0x6D696772  # "migr", in the header of the file
SCHEMA_VERSION = 1
KEPT_CHANGES = 10_000
_BUSY = 5.0  # seconds to wait for another process that writes
_POLL = 0.1  # seconds between looks at what others have written

_SCHEMA = """
CREATE TABLE entries (
    key TEXT PRIMARY KEY, value BLOB NOT NULL, crc INTEGER NOT NULL, revision INTEGER NOT NULL, lease INTEGER
) WITHOUT ROWID;
CREATE INDEX entries_by_lease ON entries (lease) WHERE lease IS NOT NULL;
CREATE TABLE leases (id INTEGER PRIMARY KEY, ttl REAL NOT NULL, ends REAL NOT NULL, boot TEXT NOT NULL);
CREATE TABLE changes (
    revision INTEGER NOT NULL, key TEXT NOT NULL, value BLOB, PRIMARY KEY (revision, key)
) WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counters VALUES ('revision', 1), ('compacted', 0);
"""


class SqliteStore(Store):
    """See `migrator.fleet.store.Store`."""

    def __init__(self, path: Path, thread: OwnThread) -> None:
        """Use `open`."""
        self._path = path
        self._thread = thread
        self._closed = False
        self._database: sqlite3.Connection | None = None
        self._inode = (0, 0)
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    @classmethod
    async def open(cls, path: str | os.PathLike[str]) -> SqliteStore:
        """Open the file, or make it, mode 0600, and check the whole of it.

        Raises StoreCorrupt if it is damaged, not ours or of a later version, StoreUnavailable if it cannot be
        opened at all.
        """
        store = cls(Path(path).absolute(), OwnThread("fleet store"))
        try:
            await store._run(store._open)
        except BaseException:
            await store.close()
            raise
        return store

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        return await self._run(self._get, key)

    async def scan(self, prefix: str) -> Listing:
        check_prefix(prefix)
        return await self._run(self._scan, prefix)

    async def apply(self, writes: Sequence[Write], *, guard: Lock | None = None) -> int:
        check_writes(writes)
        return await self._run(self._apply, tuple(writes), guard)

    async def watch(self, prefix: str, *, after: int) -> AsyncIterator[tuple[Change, ...]]:
        check_prefix(prefix)
        while True:
            found, after = await self._run(self._changes, prefix, after)
            for batch in found:
                yield batch
            await asyncio.sleep(_POLL)

    async def grant(self, ttl: float) -> Lease:
        if not 0 < ttl <= 86400:
            raise UsageError(f"a lease lasts up to a day, not {ttl} s")
        return await self._run(self._grant, ttl)

    async def renew(self, lease: Lease) -> None:
        await self._run(self._renew, lease)

    async def revoke(self, lease: Lease) -> None:
        await self._run(self._end_leases, [lease.id])

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._thread.run(self._close)
            await self._thread.close()

    async def _run(self, call: Callable[..., T], *args: object) -> T:
        def checked() -> T:
            with self._errors():
                self._check_file()
                return call(*args)

        if self._closed:
            raise StoreUnavailable(f"{self._path} is closed")
        return await self._thread.run(checked)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's errors as ours (https://sqlite.org/rescode.html)."""
        try:
            yield
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
                raise StoreCorrupt(
                    f"{self._path} is damaged: {error}", hint="move it away and restore it from a backup"
                ) from None
            hint = {"SQLITE_FULL": "the disk is full", "SQLITE_BUSY": "another process is writing for too long"}
            raise StoreUnavailable(f"cannot use {self._path}: {error}", hint=hint.get(name, "")) from None
        except OSError as error:
            raise StoreUnavailable(f"cannot use {self._path}: {error.strerror}") from None

    def _check_file(self) -> None:
        """SQLite would go on writing to a file that has been deleted or replaced, and nobody would read it."""
        if self._database is None:
            return
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self._inode:
            raise StoreUnavailable(
                f"{self._path} was deleted or replaced while in use",
                hint="restore it, and start again whatever uses it",
            )

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        database = sqlite3.connect(self._path, timeout=_BUSY, isolation_level=None)
        try:
            status = os.stat(self._path)
            self._inode = status.st_dev, status.st_ino
            _write_ahead(database)
            database.execute("PRAGMA synchronous=FULL")
            self._check(database)
        except BaseException:
            database.close()
            raise
        self._database = database

    def _check(self, database: sqlite3.Connection) -> None:
        """Our schema, whole; made where there is none yet, by one of those who open it at the same time."""
        with _transaction(database):
            (application,) = database.execute("PRAGMA application_id").fetchone()
            (version,) = database.execute("PRAGMA user_version").fetchone()
            (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if (application, version, tables) == (0, 0, 0):
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    database.execute(statement)
                database.execute(f"PRAGMA application_id={APPLICATION_ID}")
                database.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
                return
            if application != APPLICATION_ID:
                raise StoreCorrupt(f"{self._path} is some other program's database", hint="name another file")
            if version != SCHEMA_VERSION:
                raise StoreCorrupt(
                    f"{self._path} has version {version}; this program knows {SCHEMA_VERSION}",
                    hint="use the program that wrote it",
                )
        (verdict,) = database.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise StoreCorrupt(f"{self._path} is damaged: {verdict}", hint="move it away and restore it from a backup")
        for row in database.execute("SELECT key, value, crc, revision FROM entries"):
            self._entry(row)

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _entry(self, row: tuple[str, bytes, int, int]) -> Entry:
        """SQLite checks its structures, but not the values in them."""
        key, value, crc, revision = row
        if _crc(key, value) != crc:
            raise StoreCorrupt(f"{key} in {self._path} is damaged", hint="restore the file from a backup")
        return Entry(key, value, revision)

    @property
    def _db(self) -> sqlite3.Connection:
        if self._database is None:
            raise StoreUnavailable(f"{self._path} is closed")
        return self._database

    def _get(self, key: str) -> Entry | None:
        self._sweep()
        row = self._db.execute("SELECT key, value, crc, revision FROM entries WHERE key = ?", (key,)).fetchone()
        return self._entry(row) if row else None

    def _scan(self, prefix: str) -> Listing:
        self._sweep()
        with _transaction(self._db, "DEFERRED"):
            rows = self._db.execute(
                "SELECT key, value, crc, revision FROM entries WHERE key >= ? AND key < ? ORDER BY key", _range(prefix)
            ).fetchall()
            return Listing(tuple(self._entry(row) for row in rows), self._counter("revision"))

    def _apply(self, writes: tuple[Write, ...], guard: Lock | None) -> int:
        with _transaction(self._db):
            self._end_expired()
            if guard is not None and self._revision_of(guard.key) != guard.token:
                raise NotHeld(f"the lock {guard.name!r} is not ours any more (token {guard.token})")
            for write in writes:
                self._check_write(write)
            revision = self._counter("revision") + 1
            for write in writes:
                self._write(write, revision)
            self._end_write(revision)
        return revision

    def _check_write(self, write: Write) -> None:
        if write.expected is not None and (there := self._revision_of(write.key)) != write.expected:
            raise Conflict(f"{write.key} has revision {there}, not {write.expected}")
        if write.lease is not None:
            alive = self._db.execute("SELECT 1 FROM leases WHERE id = ?", (write.lease.id,)).fetchone()
            if alive is None:
                raise NotHeld(f"the lease of {write.key} has ended")

    def _write(self, write: Write, revision: int) -> None:
        if write.value is None:
            if not self._db.execute("DELETE FROM entries WHERE key = ?", (write.key,)).rowcount:
                return
        else:
            self._db.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)",
                (
                    write.key,
                    write.value,
                    _crc(write.key, write.value),
                    revision,
                    write.lease.id if write.lease else None,
                ),
            )
        self._db.execute("INSERT INTO changes VALUES (?, ?, ?)", (revision, write.key, write.value))

    def _end_write(self, revision: int) -> None:
        """Count the transaction, and forget changes that are too old for a watcher."""
        self._db.execute("UPDATE counters SET value = ? WHERE name = 'revision'", (revision,))
        if revision % 100 == 0 and revision > KEPT_CHANGES:
            self._db.execute("DELETE FROM changes WHERE revision <= ?", (revision - KEPT_CHANGES,))
            self._db.execute("UPDATE counters SET value = ? WHERE name = 'compacted'", (revision - KEPT_CHANGES,))

    def _changes(self, prefix: str, after: int) -> tuple[list[tuple[Change, ...]], int]:
        self._sweep()
        with _transaction(self._db, "DEFERRED"):
            if after < self._counter("compacted"):
                raise Compacted(f"the changes after revision {after} are not kept any more")
            rows = self._db.execute(
                "SELECT key, value, revision FROM changes WHERE revision > ? AND key >= ? AND key < ?"
                " ORDER BY revision, key",
                (after, *_range(prefix)),
            ).fetchall()
            batches: dict[int, list[Change]] = {}
            for row in rows:
                batches.setdefault(row[2], []).append(Change(*row))
            return [tuple(batch) for batch in batches.values()], max(after, self._counter("revision"))

    def _grant(self, ttl: float) -> Lease:
        lease = Lease(secrets.randbits(62), ttl, now())
        with _transaction(self._db):
            self._db.execute("INSERT INTO leases VALUES (?, ?, ?, ?)", (lease.id, ttl, now() + ttl, self._boot))
        return lease

    def _renew(self, lease: Lease) -> None:
        with _transaction(self._db):
            self._end_expired()
            renewed = self._db.execute("UPDATE leases SET ends = ? WHERE id = ?", (now() + lease.ttl, lease.id))
            if not renewed.rowcount:
                raise NotHeld("the lease has ended")

    def _sweep(self) -> None:
        """End the leases whose time has come, so that no reader sees their keys; writes nothing if there are none."""
        if self._expired():
            with _transaction(self._db):
                self._end_expired()

    def _end_expired(self) -> None:
        if expired := self._expired():
            self._end(expired)

    def _expired(self) -> list[int]:
        rows = self._db.execute("SELECT id FROM leases WHERE ends <= ? OR boot != ?", (now(), self._boot)).fetchall()
        return [row[0] for row in rows]

    def _end_leases(self, ids: list[int]) -> None:
        with _transaction(self._db):
            self._end(ids)

    def _end(self, ids: list[int]) -> None:
        gone = []
        for lease in ids:
            gone += self._db.execute("SELECT key FROM entries WHERE lease = ?", (lease,)).fetchall()
            self._db.execute("DELETE FROM leases WHERE id = ?", (lease,))
        if gone:
            revision = self._counter("revision") + 1
            for (key,) in gone:
                self._write(Write(key, None), revision)
            self._end_write(revision)

    def _revision_of(self, key: str) -> int:
        row = self._db.execute("SELECT revision FROM entries WHERE key = ?", (key,)).fetchone()
        return int(row[0]) if row else 0

    def _counter(self, name: str) -> int:
        row = self._db.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise StoreCorrupt(f"{self._path} has lost its {name}", hint="restore it from a backup")
        return int(row[0])


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    database.execute(f"BEGIN {kind}")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _write_ahead(database: sqlite3.Connection) -> None:
    """Turn on the write-ahead log. SQLite does not wait here for another who does the same, so we do."""
    deadline = now() + _BUSY
    while True:
        try:
            database.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_BUSY" or now() > deadline:
                raise
            time.sleep(0.01)


def _crc(key: str, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key.encode()))


def _range(prefix: str) -> tuple[str, str]:
    """From and to for the keys below a prefix, "" for all: keys are ASCII."""
    return (prefix, prefix + "\x7f") if prefix else ("", "\x7f")
