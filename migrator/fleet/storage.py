"""Checkpoints of containers on this host: taken, listed, restarted, and the oldest of them removed.

An image is a file `NAME@YYYYMMDDTHHMMSS.mmm.image` in one directory, whole and durable, or not there. One that ends in
`.increment` instead has what was new since the one before (`migrator.api.increments`).
"""

from __future__ import annotations

import asyncio
import logging
import re
from datetime import UTC, datetime
from pathlib import Path

import migrator
from migrator.api.increments import Room, read_header, write
from migrator.errors import ImageError, UsageError
from migrator.protocol.fleet import ImageReport, Saved

log = logging.getLogger("migrator.fleet")

DEFAULT_STORAGE = Path("/var/lib/migrator/saved")

_IMAGE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,127})@([0-9]{8}T[0-9]{6}\.[0-9]{3})\.(image|increment)")
_TIME = "%Y%m%dT%H%M%S.%f"
_LISTED = 4096


def check_container(name: str) -> None:
    """Raises UsageError for what could mean a process: a controller's orders are about containers."""
    if name.isdigit():
        raise UsageError(
            f"{name[:80]} could be a pid, and a controller's orders are about containers",
            hint="give the container another name, or move it by hand",
        )


class Storage:
    """The images below one directory. `bridge`: that of this host, for what is restarted."""

    def __init__(self, directory: Path = DEFAULT_STORAGE, *, bridge: str = "") -> None:
        self._directory = directory
        self._bridge = bridge

    async def save(self, workload: str, *, end: bool, keep: int = 0, whole_every: int = 1) -> Saved:
        """Checkpoint a container, which runs on unless `end`; as an increment to the one before, but for each
        `whole_every`-th. Only `keep` images of it stay then, if not 0, and those that they need.

        Raises UsageError, Refused or CheckpointFailed: the container runs on, and no image was added.
        """
        made = datetime.now(UTC).strftime(_TIME)[:-3]
        name = f"{workload}@{made}.image"
        if not _IMAGE.fullmatch(name):
            raise UsageError(f"{workload[:80]!r} is no name of a container")
        check_container(workload)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = self.images(workload)[:1]
        after = migrator.AfterCheckpoint.KILL if end else migrator.AfterCheckpoint.RUN
        await migrator.checkpoint(workload, self._directory / name, after=after)
        if before and whole_every > 1:
            name = await asyncio.to_thread(self._shrink, name, before[0].image, whole_every)
        size = (self._directory / name).stat().st_size
        if keep:
            await asyncio.to_thread(self._forget, workload, keep)
        return Saved(workload, name, size)

    def _shrink(self, name: str, before: str, whole_every: int) -> str:
        """Keep of a whole image what is new, where that is possible and pays; the name of what is there then."""
        increment = name.removesuffix(".image") + ".increment"
        try:
            if 1 + len(self._needs(before)) >= whole_every:
                return name
            with Room(self._directory, before) as room:
                if not write(self._directory / name, room, self._directory / increment):
                    return name
        except (ImageError, OSError) as error:
            log.warning("%s stays whole: %s", name, error)
            return name
        (self._directory / name).unlink()
        return increment

    def _needs(self, name: str) -> tuple[str, ...]:
        """The images that an increment is put together from, besides itself. Raises ImageError, OSError."""
        if name.endswith(".image"):
            return ()
        header = read_header(self._directory / name)
        return (header.base, *header.chain)

    def _forget(self, workload: str, keep: int) -> None:
        found = [one.image for one in self.images(workload)]
        needed = set(found[:keep])
        for name in found[:keep]:
            try:
                needed.update(self._needs(name))
            except (ImageError, OSError) as error:
                log.warning("no older images of %s are removed: %s", workload, error)
                return
        for name in found:
            if name not in needed:
                (self._directory / name).unlink(missing_ok=True)

    def images(self, workload: str = "") -> list[ImageReport]:
        """Of one workload, or all; the newest first."""
        found: dict[tuple[str, str], ImageReport] = {}
        for path in self._directory.iterdir() if self._directory.is_dir() else ():
            match = _IMAGE.fullmatch(path.name)
            if match is None or (workload and match[1] != workload):
                continue
            if match[3] == "increment" and path.with_suffix(".image").exists():
                continue  # the whole image of which it was made is still there
            try:
                at = datetime.strptime(match[2] + "000", _TIME).replace(tzinfo=UTC).timestamp()
                needs, size = self._needs(path.name), path.stat().st_size
            except (ImageError, OSError, ValueError) as error:
                log.warning("%s is left out: %s", path, error)
                continue
            found[match[1], match[2]] = ImageReport(
                workload=match[1], image=path.name, at=max(at, 0.0), bytes=size, base=needs[0] if needs else ""
            )
        return sorted(found.values(), key=lambda one: (-one.at, one.image))[:_LISTED]

    async def revive(self, image: str) -> int:
        """Restart a container from an image here; the pid of its process 1. Raises UsageError, ImageError or
        RestartFailed: nothing of it runs then."""
        path = self._directory / image
        if not _IMAGE.fullmatch(image) or not path.is_file():
            raise UsageError(f"there is no image {image[:160]!r} in {self._directory}")
        return (await migrator.restart(path, bridge=self._bridge)).pid
