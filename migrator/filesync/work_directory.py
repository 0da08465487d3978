"""Where a tree on the destination is written: a directory beside it, on the same mount.

new/    what is being written, moved into place (rename(2)) when it is whole
old/    what was removed or is moved aside, deleted at the end
aside/  what only this host had, kept
"""

from __future__ import annotations

import contextlib
import os
import shutil

from migrator.filesync.paths import DIRECTORY, WORK
from migrator.filesync.top import TreeTop
from migrator.linux.openat2 import open_beneath
from migrator.linux.own_directory import make_own_directory


class WorkDirectory:
    """That of one tree; `name` tells it from those of others, and no other user can guess all of it. It does not exist
    before `make()`.

    Places in it are paths below it, such as b"new/n7"; paths are those of the tree.
    """

    def __init__(self, top: TreeTop, name: str) -> None:
        self._top = top
        self._prefix = WORK + os.fsencode(name) + b"-"
        self._folder, self._name = -1, b""  # the directory that it is in, and its name there
        self._path = ""  # for people
        self._number = 0
        self.fd = -1

    def make(self) -> None:
        """Make it and the top of the tree, if that was not done yet. Raises OSError."""
        if self.fd >= 0:
            return
        top = self._top
        top.open(make=True)
        places = [(top.fd, self._prefix, top.path)]
        if top.parent >= 0 and not top.only:
            places.insert(0, (top.parent, b"." + top.name[:100] + self._prefix, os.path.dirname(top.path)))
        for folder, prefix, where in places:
            name, fd = make_own_directory(folder, prefix)
            self._folder, self._name, self._path = folder, name, os.path.join(where, os.fsdecode(name))
            if _mount_of(fd) == _mount_of(top.fd):
                break
            os.close(fd)
            os.rmdir(name, dir_fd=folder)  # nothing can be renamed from there
        self.fd = fd
        for part in ("new", "old", "aside"):
            os.mkdir(part, 0o700, dir_fd=self.fd)

    @property
    def new_folder(self) -> str:
        """A path to new/ that nobody else can lead elsewhere. Good while this is open."""
        return f"/proc/self/fd/{self.fd}/new"

    def next(self, folder: bytes = b"new") -> bytes:
        """A place that nothing has."""
        self._number += 1
        return folder + b"/n%d" % self._number

    def stage(self) -> tuple[int, bytes]:
        """A new file, opened for writing, and its place. Raises OSError."""
        place = self.next()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(place, flags, 0o600, dir_fd=self.fd), place

    def discard(self, place: bytes) -> None:
        """Delete what is at a place, if anything is."""
        with contextlib.suppress(OSError):
            os.unlink(place, dir_fd=self.fd)

    def lstat(self, place: bytes) -> os.stat_result:
        return os.stat(place, dir_fd=self.fd, follow_symlinks=False)

    def move_out(self, place: bytes, path: bytes) -> None:
        """Put it into the tree, in place of a file that has its name. Raises OSError."""
        folder, name = self._top.place(path)
        os.rename(place, name, src_dir_fd=self.fd, dst_dir_fd=folder)

    def move_in(self, path: bytes, place: bytes) -> None:
        """Take it out of the tree. Raises OSError."""
        folder, name = self._top.place(path)
        os.rename(name, place, src_dir_fd=folder, dst_dir_fd=self.fd)
        self._top.forget_folder()  # it may have been in there

    def set_aside(self, path: bytes) -> None:
        """Take it out of the tree and keep it. Raises OSError."""
        head, _, name = path.rpartition(b"/")
        inside = self._made(b"aside/" + head if head else b"aside")
        try:
            folder, there = self._top.place(path)
            os.rename(there, name, src_dir_fd=folder, dst_dir_fd=inside)
        finally:
            os.close(inside)
        self._top.forget_folder()

    def _made(self, place: bytes) -> int:
        """A directory in it, opened; it is made where there is none. What is in there may be another user's."""
        fd, at = os.dup(self.fd), b""
        for part in place.split(b"/"):
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=fd)
                at = at + b"/" + part if at else part
                inner = open_beneath(self.fd, at, DIRECTORY)
            finally:
                os.close(fd)
            fd = inner
        return fd

    def move_back(self, place: bytes, path: bytes) -> bool:
        """Put it to `path`, unless there is something by now."""
        head, _, name = place.rpartition(b"/")
        try:
            inside = open_beneath(self.fd, head, DIRECTORY)
        except OSError:
            return False
        try:
            return self._back(inside, name, path)
        finally:
            os.close(inside)

    def _back(self, inside: int, name: bytes, path: bytes) -> bool:
        try:
            folder, there = self._top.place(path)
            with contextlib.suppress(FileNotFoundError):
                os.stat(there, dir_fd=folder, follow_symlinks=False)
                return False
            os.rename(name, there, src_dir_fd=inside, dst_dir_fd=folder)
        except OSError:
            return False
        return True

    def remove(self, *, keep_aside: bool) -> str:
        """Delete it; returns where it keeps what was set aside, or "". Without `keep_aside` that is put back first."""
        if self.fd < 0:
            return ""
        left = ""
        with contextlib.suppress(OSError):
            self._top.forget_folder()
            if not keep_aside:
                self._put_back(b"aside", b"")
            for name in ("new", "old"):
                shutil.rmtree(name, ignore_errors=True, dir_fd=self.fd)
            aside = open_beneath(self.fd, b"aside", DIRECTORY)
            try:
                if keep_aside and os.listdir(aside):
                    left = os.path.join(self._path, "aside")
            finally:
                os.close(aside)
            if not left:
                shutil.rmtree("aside", ignore_errors=True, dir_fd=self.fd)
                os.rmdir(self._name, dir_fd=self._folder)
        os.close(self.fd)
        self.fd = -1
        return left

    def _put_back(self, place: bytes, path: bytes) -> None:
        """Move what was set aside to where it was."""
        inside = open_beneath(self.fd, place, DIRECTORY)
        try:
            for item in os.listdir(inside):
                name = os.fsencode(item)
                back = path + b"/" + name if path else name
                if not self._back(inside, name, back):
                    with contextlib.suppress(OSError):  # no directory
                        self._put_back(place + b"/" + name, back)
        finally:
            os.close(inside)


def _mount_of(fd: int) -> str:
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return next(line for line in file if line.startswith("mnt_id"))
