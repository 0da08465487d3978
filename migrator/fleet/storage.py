"""Checkpoints of containers on this host: taken, listed, restarted, and the oldest of them removed.

An image is a file `NAME@YYYYMMDDTHHMMSS.mmm.image` in one directory, whole and durable, or not there.
"""

from __future__ import annotations

import contextlib
import re
import time
from datetime import UTC, datetime
from pathlib import Path

import migrator
from migrator.errors import UsageError
from migrator.protocol.fleet import ImageReport, Saved

DEFAULT_STORAGE = Path("/var/lib/migrator/saved")

_IMAGE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,127})@([0-9]{8}T[0-9]{6}\.[0-9]{3})\.image")
_TIME = "%Y%m%dT%H%M%S.%f"
_LISTED = 4096


class Storage:
    """The images below one directory. `bridge`: that of this host, for what is restarted."""

    def __init__(self, directory: Path = DEFAULT_STORAGE, *, bridge: str = "") -> None:
        self._directory = directory
        self._bridge = bridge

    async def save(self, workload: str, *, end: bool, keep: int = 0) -> Saved:
        """Checkpoint a container, which runs on unless `end`. Only `keep` images of it stay then, if not 0.

        Raises UsageError, Refused or CheckpointFailed: the container runs on, and no image was added.
        """
        made = datetime.now(UTC).strftime(_TIME)[:-3]
        name = f"{workload}@{made}.image"
        if not _IMAGE.fullmatch(name):
            raise UsageError(f"{workload[:80]!r} is no name of a container")
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        after = migrator.AfterCheckpoint.KILL if end else migrator.AfterCheckpoint.RUN
        await migrator.checkpoint(workload, self._directory / name, after=after)
        size = (self._directory / name).stat().st_size
        if keep:
            for old in self.images(workload)[keep:]:
                (self._directory / old.image).unlink(missing_ok=True)
        return Saved(workload, name, size)

    def images(self, workload: str = "") -> list[ImageReport]:
        """Of one workload, or all; the newest first."""
        found = []
        for path in self._directory.iterdir() if self._directory.is_dir() else ():
            match = _IMAGE.fullmatch(path.name)
            if match is None or (workload and match[1] != workload):
                continue
            with contextlib.suppress(ValueError, FileNotFoundError):  # no date, or it has gone while we look
                at = datetime.strptime(match[2] + "000", _TIME).replace(tzinfo=UTC).timestamp()
                size = path.stat().st_size
                found.append(ImageReport(workload=match[1], image=path.name, at=max(at, 0.0), bytes=size))
        return sorted(found, key=lambda one: (-one.at, one.image))[:_LISTED]

    async def revive(self, image: str) -> int:
        """Restart a container from an image here; the pid of its process 1. Raises UsageError, ImageError or
        RestartFailed: nothing of it runs then."""
        if not _IMAGE.fullmatch(image) or not (self._directory / image).is_file():
            raise UsageError(f"there is no image {image[:160]!r} in {self._directory}")
        made = await migrator.restart(self._directory / image, bridge=self._bridge)
        return made.pid


def age(report: ImageReport) -> float:
    """Seconds."""
    return max(time.time() - report.at, 0.0)
