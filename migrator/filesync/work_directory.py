"""Where a tree on the destination is written: a directory beside it, on the same mount.

new/    what is being written, moved into place (rename(2)) when it is whole
old/    what was removed or is moved aside, deleted at the end
aside/  what only this host had, kept
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat

from migrator.filesync.paths import WORK
from migrator.filesync.top import TreeTop


class WorkDirectory:
    """That of one tree; `name` tells it from those of others. It does not exist before `make()`.

    Places in it are paths below it, such as b"new/n7"; paths are those of the tree.
    """

    def __init__(self, top: TreeTop, name: str) -> None:
        self._top = top
        self._name = os.fsencode(name)
        self._path = b""
        self._number = 0
        self.fd = -1

    def make(self) -> None:
        """Make it and the top of the tree, if that was not done yet. Raises OSError."""
        if self.fd >= 0:
            return
        self._top.open(make=True)
        top = os.fsencode(self._top.path)
        places = [os.path.join(top, WORK + self._name)]
        head, tail = os.path.split(top)
        if tail and not self._top.only:
            places.insert(0, os.path.join(head, b"." + tail[:100] + WORK + self._name))
        for place in places:
            os.mkdir(place, 0o700)
            if _mount_of(place) == _mount_of(top):
                break
            os.rmdir(place)  # nothing can be renamed from there
        self._path = place
        self.fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in ("new", "old", "aside"):
            os.mkdir(name, 0o700, dir_fd=self.fd)

    def path(self, place: bytes) -> bytes:
        return os.path.join(self._path, place)

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
        self._top.forget_parent()  # it may have been in there

    def set_aside(self, path: bytes) -> None:
        """Take it out of the tree and keep it. Raises OSError."""
        place = b"aside/" + path
        os.makedirs(os.path.join(self._path, os.path.dirname(place)), mode=0o700, exist_ok=True)
        self.move_in(path, place)

    def move_back(self, place: bytes, path: bytes) -> bool:
        """Put it to `path`, unless there is something by now."""
        try:
            folder, name = self._top.place(path)
            with contextlib.suppress(FileNotFoundError):
                os.stat(name, dir_fd=folder, follow_symlinks=False)
                return False
            self.move_out(place, path)
        except OSError:
            return False
        return True

    def remove(self, *, keep_aside: bool) -> str:
        """Delete it; returns where it keeps what was set aside, or "". Without `keep_aside` that is put back first."""
        left = ""
        with contextlib.suppress(OSError):
            if self.fd >= 0:
                self._top.forget_parent()
                if not keep_aside:
                    self._put_back(b"aside", b"")
                if keep_aside and os.listdir(self.path(b"aside")):
                    for name in (b"new", b"old"):
                        shutil.rmtree(self.path(name), ignore_errors=True)
                    left = os.fsdecode(self.path(b"aside"))
                else:
                    shutil.rmtree(self._path, ignore_errors=True)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        return left

    def _put_back(self, place: bytes, path: bytes) -> None:
        """Move what was set aside to where it was."""
        for item in os.listdir(self.path(place)):
            name = os.fsencode(item)
            inner, back = place + b"/" + name, path + b"/" + name if path else name
            if not self.move_back(inner, back) and stat.S_ISDIR(self.lstat(inner).st_mode):
                self._put_back(inner, back)


def _mount_of(path: bytes) -> str:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        with open(f"/proc/self/fdinfo/{fd}") as file:
            return next(line for line in file if line.startswith("mnt_id"))
    finally:
        os.close(fd)
