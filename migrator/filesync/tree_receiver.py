"""The destination's side of a tree that is carried along: hands that do what the source says, below one directory
and nowhere else.

What is being written lies in a work directory beside the tree, and is moved into place when it is whole. What is
removed is moved aside and deleted at the end; what only this host had is kept.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any

from migrator.filesync.attributes import carried, set_attributes, set_attributes_at
from migrator.filesync.comparison import TreeComparison
from migrator.filesync.content import path_of
from migrator.filesync.paths import WORK, check, shown
from migrator.filesync.staging import StagedWrites, write_all
from migrator.filesync.top import TreeTop
from migrator.filesync.work_directory import WorkDirectory
from migrator.linux.openat2 import open_beneath
from migrator.protocol.trees import (
    Close,
    Drop,
    Entry,
    Join,
    MoveAside,
    MoveBack,
    Open,
    Put,
    Remove,
    Touch,
    TreeAnswer,
    TreeList,
    TreeOp,
    Write,
)
from migrator.protocol.wire import MessageError

_MOST_ASIDE = 1 << 20


class TreeReceiver:
    """One tree on the destination; `name` is for the work directory.

    Nothing is written before the first operation. `bytes` of files were written.
    """

    def __init__(self, top: TreeTop, name: str) -> None:
        self.tree = top.tree
        self.bytes = 0
        self._top = top
        self._work = WorkDirectory(self._top, name)
        self._comparison = TreeComparison(self._top)
        self._aside: dict[int, bytes] = {}  # where what is moved aside was
        self._file: Open | None = None
        self._fd = -1
        self._place = b""
        self._staged: StagedWrites | None = None
        self._hands: dict[type[TreeOp], Callable[[Any], None]] = {
            Put: self._put,
            Open: self._open,
            Touch: lambda op: self._touch(op.entry),
            Join: self._join,
            Remove: lambda op: self._remove(op.path, keep=op.keep),
            MoveAside: self._move_aside,
            MoveBack: self._move_back,
            Drop: lambda op: self._taken(op.number),
        }

    @property
    def shared(self) -> bool:
        """Whether this seems to be the very directory that the source sees, as on shared storage."""
        return self._comparison.shared

    def compare(self, listed: TreeList) -> list[TreeAnswer]:
        """What is not the same here. Only reads. Raises MessageError for what no source would ask, FileError."""
        return self._comparison.compare(listed)

    def apply(self, ops: list[TreeOp]) -> None:
        """Do these. Raises MessageError for what is not below the tree or out of order, FileError with the path of
        what cannot be done; what was whole by then is in place."""
        try:
            self._work.make()
        except OSError as error:
            raise self._top.failed(b"", error, "written") from error
        for op in ops:
            path = path_of(op) or (self._file.entry.path if self._file is not None else b"")
            try:
                self._apply(op, path)
            except OSError as error:
                raise self._top.failed(path, error, "written") from error

    def close(self, kept: bool) -> str:
        """The end: `kept` if the workload runs here now. Deletes what was removed, and puts back what was set aside
        if the migration came to nothing. Returns where something was set aside, or ""."""
        self._drop_file()
        self._top.forget_folder()
        for number, path in self._aside.items():
            self._work.move_back(b"old/%d" % number, path)
        left = self._work.remove(keep_aside=kept)
        self._top.close()
        return left

    def _apply(self, op: TreeOp, path: bytes) -> None:
        if isinstance(op, Write | Close):
            if self._file is None:
                raise MessageError("contents of a file that was not opened")
            self._write(op) if isinstance(op, Write) else self._close()
            return
        if self._file is not None:
            raise MessageError(f"{shown(path)} before the last file was complete")
        if not isinstance(op, Drop):
            self._check_agreed(path, top=isinstance(op, Put | Touch))
        self._hands[type(op)](op)

    def _check_agreed(self, path: bytes, *, top: bool) -> None:
        check(path, empty=top)
        if self._top.only and path not in self._top.only:
            raise MessageError(f"{shown(path)} was not agreed upon")
        if path.split(b"/", 1)[0].startswith(WORK):
            raise MessageError(f"{shown(path)} is not carried")

    # Whole files, and all that is not content

    def _put(self, op: Put) -> None:
        entry = op.entry
        kind = stat.S_IFMT(entry.mode)
        if not carried(entry.mode):
            raise MessageError(f"{shown(entry.path)} is of a kind that is not carried")
        if kind == stat.S_IFDIR:
            return self._put_directory(entry)
        if kind == stat.S_IFREG:
            fd, place = self._work.stage()
            try:
                write_all(fd, op.data, 0)
                self.bytes += len(op.data)
                set_attributes(fd, entry)
            finally:
                os.close(fd)
        else:
            place = self._work.next()
            if kind == stat.S_IFLNK:
                os.symlink(entry.target, place, dir_fd=self._work.fd)
            else:
                os.mkfifo(place, 0o600, dir_fd=self._work.fd)
            fd = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._work.fd)
            try:
                set_attributes_at(fd, entry)
            finally:
                os.close(fd)
        self._clear(entry.path, None)
        self._work.move_out(place, entry.path)

    def _put_directory(self, entry: Entry) -> None:
        if entry.path:
            folder, name = self._top.place(entry.path)
            try:
                os.mkdir(name, 0o700, dir_fd=folder)
            except FileExistsError:
                if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    self._remove(entry.path)
                    os.mkdir(name, 0o700, dir_fd=self._top.place(entry.path)[0])
                elif entry.mount:
                    return
        self._touch(entry)

    def _touch(self, entry: Entry) -> None:
        kind = stat.S_IFMT(entry.mode)
        closed = kind in (stat.S_IFLNK, stat.S_IFIFO)  # to be looked at only
        how = os.O_PATH if closed else os.O_RDONLY | os.O_NONBLOCK
        flags = how | os.O_NOFOLLOW | (os.O_DIRECTORY if kind == stat.S_IFDIR else 0)
        fd = open_beneath(self._top.fd, entry.path, flags)
        try:
            if stat.S_IFMT(os.fstat(fd).st_mode) != kind:
                raise OSError(errno.ESTALE, "is another file by now")
            if closed:
                set_attributes_at(fd, entry)
            else:
                set_attributes(fd, entry)
        finally:
            os.close(fd)

    # Names

    def _join(self, op: Join) -> None:
        self._check_agreed(op.to, top=False)
        folder, name = self._top.place(op.to)
        place = self._work.next()
        os.link(name, place, src_dir_fd=folder, dst_dir_fd=self._work.fd, follow_symlinks=False)
        self._clear(op.path, None)
        self._work.move_out(place, op.path)
        self._work.discard(place)  # it was a name of the same file already

    def _remove(self, path: bytes, *, keep: bool = False) -> None:
        try:
            if keep:
                self._work.set_aside(path)
            else:
                self._work.move_in(path, self._work.next(b"old"))
        except FileNotFoundError:
            pass  # what is wanted is that it is not there

    def _move_aside(self, op: MoveAside) -> None:
        if op.number in self._aside or len(self._aside) >= _MOST_ASIDE:
            raise MessageError(f"{shown(op.path)} is moved aside under a number that is taken")
        self._aside[op.number] = op.path
        self._work.move_in(op.path, b"old/%d" % op.number)

    def _move_back(self, op: MoveBack) -> None:
        self._taken(op.number)
        place = b"old/%d" % op.number
        self._clear(op.path, self._work.lstat(place))
        self._work.move_out(place, op.path)

    def _taken(self, number: int) -> None:
        if self._aside.pop(number, None) is None:
            raise MessageError(f"nothing was moved aside as {number}")

    def _clear(self, path: bytes, coming: os.stat_result | None) -> None:
        """Make way at `path` where rename(2) would not."""
        folder, name = self._top.place(path)
        try:
            here = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(here.st_mode) or (coming is not None and stat.S_ISDIR(coming.st_mode)):
            self._remove(path)

    # A file in parts

    def _open(self, op: Open) -> None:
        if not stat.S_ISREG(op.entry.mode):
            raise MessageError(f"{shown(op.entry.path)} is no regular file")
        if op.in_place:
            fd = open_beneath(self._top.fd, op.entry.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise OSError(errno.ESTALE, "is another file by now")
            self._fd = fd
            self._staged = StagedWrites(self._work.new_folder)
        else:
            self._fd, self._place = self._work.stage()
        self._file = op

    def _write(self, op: Write) -> None:
        self.bytes += len(op.data)
        if self._staged is not None:
            self._staged.write(op.data, op.offset)
        else:
            write_all(self._fd, op.data, op.offset)

    def _close(self) -> None:
        assert self._file is not None
        entry = self._file.entry
        if self._staged is not None:
            self._staged.apply(self._fd)
        os.ftruncate(self._fd, entry.size)
        set_attributes(self._fd, entry)
        if self._staged is None:
            self._clear(entry.path, None)
            self._work.move_out(self._place, entry.path)
        self._drop_file()

    def _drop_file(self) -> None:
        if self._staged is not None:
            self._staged.close()
        elif self._file is not None:
            self._work.discard(self._place)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._file, self._staged = -1, None, None
