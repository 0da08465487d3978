"""What keeps a deposed controller from moving anything: each host remembers the highest token that it has seen.

A fencing token is the revision at which a controller took the lead (`migrator.fleet.store.Lock`). A host checks
the token of every move, on both sides, before it does anything for it. Whoever has a lower one than was seen before
has been deposed, whether it knows or not.

What was accepted is durable (fsync(2)) before the call returns: a host that crashes does not forget it. The record is
one small file for each fleet, replaced as a whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from migrator.errors import MigratorError, UsageError

DEFAULT_DIRECTORY = Path("/var/lib/migrator/fencing")
MAX_TOKEN = (1 << 63) - 1
MOST_FLEETS = 64  # that a host remembers

_FLEET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RECORD = re.compile(rb"([0-9]{1,19}) ([0-9a-f]{8})\n")


def fence_directory() -> Path:
    return Path(os.environ.get("MIGRATOR_FENCE_DIR") or DEFAULT_DIRECTORY)


class FencingError(MigratorError):
    """What was seen cannot be read or written: nothing may be moved for that fleet."""

    exit_code = 14


class TokenRefused(MigratorError):
    """The token is lower than one seen before: another controller leads. The workload is not touched."""

    exit_code = 15

    def __init__(self, fleet: str, token: int, seen: int) -> None:
        super().__init__(
            f"the controller of fleet {fleet} with token {token} was deposed: {seen} was seen here",
            hint="let it take the lead again; after restoring the store from a backup, see the notes on tokens",
        )
        self.token = token
        self.seen = seen


class Fence:
    """The highest token seen of one fleet, below `directory`. Safe for any number of processes of a host."""

    def __init__(self, fleet: str, directory: Path = DEFAULT_DIRECTORY) -> None:
        """Raises UsageError for a fleet's id that could not be the name of a file."""
        if not _FLEET.fullmatch(fleet):
            raise UsageError(f"bad fleet id {fleet[:80]!r}", hint="1 to 64 letters, digits, dots and dashes")
        self.fleet = fleet
        self.path = directory / f"{fleet}.token"

    def check(self, token: int) -> None:
        """Accept the token and remember it; durable on return.

        Raises TokenRefused for a lower one than was accepted before, FencingError if that cannot be told or
        remembered: then it is not accepted. The same token again is good.
        """
        if not 1 <= token <= MAX_TOKEN:
            raise UsageError(f"bad fencing token {token}")
        with self._errors(), self._locked():
            seen = self._read()
            if token < seen:
                raise TokenRefused(self.fleet, token, seen)
            if token > seen:
                if not seen:
                    self._check_room()
                self._write(token)

    def seen(self) -> int:
        """The highest token accepted, 0 before the first. Raises FencingError."""
        with self._errors():
            return self._read()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FencingError(
                f"cannot remember the fleet's token in {self.path}: {error.strerror}",
                hint="is the disk full or read-only?",
            ) from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Between reading and writing nobody else of this host does either (flock(2))."""
        folder = self.path.parent
        if not folder.is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _sync(folder.parent)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _read(self) -> int:
        try:
            with self.path.open("rb") as file:
                data = file.read(64)
        except FileNotFoundError:
            return 0
        match = _RECORD.fullmatch(data)
        if match is None or int(match[2], 16) != self._sum(match[1]):
            raise FencingError(
                f"{self.path} is damaged: which controller may move workloads here is not known",
                hint="make sure that a single controller runs, then delete that file",
            )
        return int(match[1])

    def _check_room(self) -> None:
        """Whoever may order something could else fill the disk with fleets that nobody has."""
        if not self.path.exists() and len(list(self.path.parent.glob("*.token"))) >= MOST_FLEETS:
            raise FencingError(
                f"{MOST_FLEETS} fleets have moved something here: there is no room for {self.fleet}",
                hint=f"delete the files of those in {self.path.parent} that are no more",
            )

    def _write(self, token: int) -> None:
        digits = b"%d" % token
        new = self.path.with_suffix(".new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            line = b"%s %08x\n" % (digits, self._sum(digits))
            if os.write(fd, line) != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(new, self.path)
        _sync(self.path.parent)

    def _sum(self, digits: bytes) -> int:
        """Of the fleet too: the file of another one, put here, is no token of ours."""
        return zlib.crc32(digits, zlib.crc32(self.fleet.encode()))


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
