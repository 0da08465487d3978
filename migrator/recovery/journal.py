"""The durable record of one migration on one host: what an agent that starts again needs to settle it.

One file for each migration and role, append-only, one record a line:

    crc32 of the rest of the line, 8 hex digits · space · JSON

A record is on disk (fdatasync(2)) when the call that writes it returns, the file itself (fsync of its
directory) when it was created. What a crash cut off in the middle of a line fails its checksum and counts
as never written; nobody has acted upon it, because the call that wrote it has not returned.

The decision of a destination is the first record that holds one, whoever wrote it: two agents of a host may
both be asked, one over the old connection and one over the new. An append is atomic and ordered, so each
writes its own and then reads which came first.

A live agent locks its journals (flock(2)); the lock ends with it, however it ends. So a journal that can be
locked is one that nobody attends to.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
import zlib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

import msgspec

from migrator.errors import MigratorError, UsageError
from migrator.protocol.states import Recorded

DEFAULT_DIRECTORY = "/var/lib/migrator/journal"

MIGRATION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{7,63}")
_DECISIONS = (Recorded.RUNNING, Recorded.DISCARDED)
_MAX_FILE = 4 << 20


class JournalError(MigratorError):
    """A journal cannot be written or read. What it announces must not be done then."""

    exit_code = 10


class Role(Enum):
    SOURCE = "source"
    DESTINATION = "destination"


class JournalHeader(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is needed to settle a migration without the program that began it.

    peer:      how to reach the other host, as given on the command line; "" if it is the one who calls
    key:       of the host that it belongs to, as it logged in here; "" where it came by another way
    pids:      of the tasks here, with their start times (clock ticks since boot), which tell whether a pid
               still means the same task
    cgroup:    path or name of the freezer cgroup that holds the tasks
    boot_id:   of the kernel; after a reboot there are no tasks
    origins:   (pid, directory of the cgroup that it came from), the root first; none for a container
    moves:     of files, which resuming does: see `migrator.engine.base.Destination`
    locks:     that the copy must have before it runs: the fields of `migrator.engine.base.LateLock`
    """

    migration: str
    role: Role
    peer: str = ""
    key: str = ""
    pids: list[tuple[int, int]] = []
    cgroup: str = ""
    container: str = ""
    boot_id: str = ""
    started_at: float = 0.0  # seconds since the epoch
    origins: list[tuple[int, str]] = msgspec.field(default_factory=list, name="homes")  # so on disk since 0.1
    moves: list[tuple[str, str, str, str]] = []
    locks: list[tuple[int, int, int, int, int, int, str]] = []


class JournalRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    state: Recorded
    at: float  # seconds since the epoch
    reason: str = ""
    # In the first record, and where something became known.
    header: JournalHeader | None = msgspec.field(default=None, name="facts")


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(JournalRecord)


def journal_directory() -> Path:
    """`$MIGRATOR_JOURNAL_DIR`, or /var/lib/migrator/journal."""
    return Path(os.environ.get("MIGRATOR_JOURNAL_DIR") or DEFAULT_DIRECTORY)


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def check_migration_id(text: str) -> str:
    """The id itself; UsageError for one that could not be the name of a file."""
    if not MIGRATION_ID.fullmatch(text):
        raise UsageError(f"bad migration id {text[:80]!r}", hint="8 to 64 letters, digits, dots and dashes")
    return text


class Journal:
    """An open journal. Methods may be called from any thread, one at a time."""

    def __init__(self, path: Path, fd: int) -> None:
        """Use `create` or `open`."""
        self.path = path
        self._fd = fd
        self._records: list[JournalRecord] = []
        self._size = 0  # bytes of the file that they are from

    @classmethod
    def create(cls, directory: Path, header: JournalHeader, *, reason: str = "") -> Journal:
        """Begin the journal of a migration and lock it; durable on return.

        Raises FileExistsError if this host knows the migration already, JournalError if it cannot be
        written.
        """
        path = directory / f"{check_migration_id(header.migration)}.{header.role.value}.journal"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise
        except OSError as error:
            raise JournalError(
                f"cannot create {path}: {error.strerror}",
                hint="choose a writable place with MIGRATOR_JOURNAL_DIR; it must survive a restart",
            ) from error
        journal = cls(path, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            journal.record(Recorded.OPEN, header=header, reason=reason)
            _sync_directory(directory)
        except BaseException:
            journal.close()
            path.unlink(missing_ok=True)
            raise
        return journal

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open an existing journal, without the lock. Raises FileNotFoundError, JournalError."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise JournalError(f"cannot open {path}: {error.strerror}") from error
        journal = cls(path, fd)
        journal.reload()
        return journal

    @classmethod
    def find(cls, directory: Path, migration: str, role: Role) -> Journal | None:
        """The journal of a migration on this host, if there is one with a whole first record."""
        try:
            journal = cls.open(directory / f"{check_migration_id(migration)}.{role.value}.journal")
        except FileNotFoundError:
            return None
        if not journal.records:
            journal.close()
            return None
        return journal

    def try_lock(self) -> bool:
        """Whether the journal is ours now: no other living process attends to it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self.reload()
        return True

    def record(self, state: Recorded, *, header: JournalHeader | None = None, reason: str = "") -> None:
        """Append a record; durable on return. Raises JournalError: then what it says must not be done."""
        record = JournalRecord(state=state, at=time.time(), reason=reason[:2000], header=header)
        # A line that was cut off before ours must not swallow it.
        line = b"\n" + encode_line(record)
        try:
            done = os.write(self._fd, line)
            if done != len(line):
                raise OSError(28, "No space left on device")
            os.fdatasync(self._fd)
        except OSError as error:
            raise JournalError(f"cannot write {self.path}: {error.strerror}", hint="is the disk full?") from error
        if os.fstat(self._fd).st_size == self._size + len(line):  # nobody else has written meanwhile
            self._size += len(line)
            self._records.append(record)
        else:
            self.reload()

    def decide(self, decision: Recorded, *, reason: str = "", header: JournalHeader | None = None) -> Recorded:
        """Record RUNNING or DISCARDED unless one is there; the one that counts is returned, durable.

        The first record wins, also against another process that decides at the same time.
        """
        assert decision in _DECISIONS
        self.reload()
        if self.decision is None:
            self.record(decision, reason=reason, header=header)
            self.reload()
        else:
            os.fdatasync(self._fd)  # the one who wrote it may not have come to that
        assert self.decision is not None
        return self.decision

    def reload(self) -> None:
        """Read the file again: another process may have appended to it."""
        try:
            size = min(os.fstat(self._fd).st_size, _MAX_FILE)
            if size != self._size:
                self._records = list(decode_lines(os.pread(self._fd, size, 0)))
                self._size = size
        except OSError as error:
            raise JournalError(f"cannot read {self.path}: {error.strerror}") from error

    @property
    def records(self) -> list[JournalRecord]:
        return self._records

    @property
    def header(self) -> JournalHeader:
        """The latest header recorded. Raises JournalError if the first record is missing."""
        for record in reversed(self._records):
            if record.header is not None:
                return record.header
        raise JournalError(
            f"{self.path} does not say what it is about", hint="it was cut off when it was created: delete it"
        )

    @property
    def state(self) -> Recorded:
        """What was recorded last; a second decision counts for nothing."""
        decision = self.decision
        for record in reversed(self._records):
            if record.state not in _DECISIONS or record.state is decision:
                return record.state
        return Recorded.OPEN

    @property
    def decision(self) -> Recorded | None:
        """The first decision recorded, None before that."""
        return next((record.state for record in self._records if record.state in _DECISIONS), None)

    @property
    def reason(self) -> str:
        """Why it was decided so."""
        return next((record.reason for record in reversed(self._records) if record.reason), "")

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to do but to answer questions."""
        return self.state in (Recorded.CLOSED, Recorded.RESUMED)

    def close(self) -> None:
        """Close the file and give up the lock. The journal stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def encode_line(record: JournalRecord) -> bytes:
    body = _encoder.encode(record)
    return b"%08x %s\n" % (zlib.crc32(body), body)


def decode_lines(data: bytes) -> Iterator[JournalRecord]:
    """The whole records in a journal's bytes. What is torn or damaged was never written."""
    for line in data.split(b"\n"):
        if len(line) < 10 or line[8:9] != b" ":
            continue
        with contextlib.suppress(ValueError, msgspec.MsgspecError):
            if int(line[:8], 16) == zlib.crc32(line[9:]):
                yield _decoder.decode(line[9:])


def unattended(directory: Path) -> Iterator[Journal]:
    """The journals that need settling and that no living process attends to, each locked. Close them."""
    for journal in _all(directory):
        if not journal.settled and journal.try_lock() and not journal.settled and journal.records:
            yield journal
        else:
            journal.close()


def attended(directory: Path) -> list[str]:
    """The migrations on this host that are not settled and that a living process attends to."""
    found = []
    for journal in _all(directory):
        with journal:
            if journal.records and not journal.settled and not journal.try_lock():
                found.append(journal.header.migration)
    return found


def _all(directory: Path) -> Iterator[Journal]:
    """Every journal of this host, open. Close them."""
    for path in sorted(directory.glob("*.journal")) if directory.is_dir() else ():
        try:
            journal = Journal.open(path)
        except FileNotFoundError:
            continue
        yield journal


def _sync_directory(directory: Path) -> None:
    for folder in (directory, directory.parent):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
