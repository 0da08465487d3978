"""Files of the tree as this host has them: what mappings and tasks refer to by path."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from migrator.engine.user.restore.shm import SharedObjects
from migrator.engine.user.vma_item import writes_through
from migrator.errors import RestartFailed
from migrator.image.records import MappedFile, VmaFlag, VmaItem, VmaKind
from migrator.linux import elf, openat2

_HINT = "the same path must be there on both hosts, or be copied along (--copy-files)"


class Program(NamedTuple):
    """What a task runs. `open` gives a descriptor of ours, or raises RestartFailed."""

    path: str
    open: Callable[[], int]


class Backing:
    """Opens files below `root_fd`, a directory that has to be set before the first is opened."""

    def __init__(self, shared: SharedObjects) -> None:
        self.root_fd = -1
        self.mapped: dict[int, MappedFile] = {}  # by objref
        self.owners: dict[int, int] = {}  # by objref: whose they must be, if not root's
        self._shared = shared

    def open_path(self, path: str, flags: int) -> int:
        """A descriptor of ours for `path` in the tree's own file system."""
        try:
            return openat2.open_in_root(self.root_fd, path, flags)
        except OSError as error:
            raise RestartFailed(
                f"{path}: {openat2.reason(error)} on this host",
                hint=openat2.LINK_HINT if isinstance(error, openat2.UntrustedLink) else _HINT,
            ) from error

    def only_root_leads_to(self, path: str) -> bool:
        """Whether nobody else than root can make a directory's path lead elsewhere. Raises OSError."""
        return openat2.only_root_leads_to(self.root_fd, path)

    def open_backing(self, item: VmaItem) -> int:
        """A descriptor of ours for the file or shared memory behind a mapping. Raises RestartFailed where the file is
        another one on this host."""
        writable = writes_through(item)
        if item.kind == VmaKind.SHM:
            return self._shared.open(item.objref, writable=writable)
        file = self.mapped[item.objref]
        shared = bool(item.flags & VmaFlag.SHARED)
        fd = self.open_path(file.path, os.O_RDWR if writable else os.O_RDONLY)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise RestartFailed(f"{file.path} is no regular file on this host")
        if (owner := self.owners.get(item.objref)) is not None and status.st_uid != owner:
            os.close(fd)
            raise RestartFailed(
                f"{file.path} belongs to user {status.st_uid} on this host, and to user {owner} where it was saved",
                hint=_HINT,
            )
        build_id = elf.build_id(f"/proc/self/fd/{fd}") if file.build_id else ""
        if (not shared and status.st_size != file.size) or build_id != file.build_id:
            os.close(fd)
            raise RestartFailed(
                f"{file.path} differs on this host: {status.st_size} bytes, build id {build_id or 'none'};"
                f" saved with {file.size} bytes, build id {file.build_id or 'none'}",
                hint="install the same package on both hosts",
            )
        return fd

    def segment_of(self, item: VmaItem) -> int:
        """The number of the System V segment that is mapped, or -1."""
        return self._shared.segment_of(item.objref) if item.kind == VmaKind.SHM else -1

    def program(self, objref: int) -> Program:
        file = self.mapped.get(objref)
        if file is None:
            return Program(f"the deleted program {objref}", lambda: self._shared.open(objref, writable=False))
        return Program(file.path, lambda: self.open_path(file.path, os.O_RDONLY))

    def close(self) -> None:
        if self.root_fd >= 0:
            os.close(self.root_fd)
            self.root_fd = -1
