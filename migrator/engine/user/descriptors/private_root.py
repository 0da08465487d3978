"""Binding a socket to a name of the file system without touching what has that name.

A unix socket keeps its address as the text given to bind(2), and its file as an inode: a thread whose root
is a directory of ours binds to the text, and the file made there is moved to its place later, at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable
from typing import TypeVar

from migrator.engine.user.descriptors import calls
from migrator.errors import RestartFailed

T = TypeVar("T")


class PrivateRoot:
    """A directory that a thread sees as its root, on the file system of the socket's future place.

    place: O_PATH descriptor of the directory that the file will be moved to, which is taken over."""

    def __init__(self, place: int) -> None:
        self._place = place
        try:
            self._folder = tempfile.mkdtemp(prefix=".migrator-", dir=f"/proc/self/fd/{place}")
        except OSError:
            os.close(place)
            raise
        self.fd = os.open(self._folder, calls.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._moves: list[tuple[str, str]] = []

    def run(self, function: Callable[[], T]) -> T:
        """Run `function` in a thread whose root and working directory are this one."""
        result: list[T] = []
        failure: list[BaseException] = []

        def inside() -> None:
            try:
                calls.unshare_fs()
                os.fchdir(self.fd)
                os.chroot(".")
                result.append(function())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=inside, name="private root")
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return result[0]

    def prepare(self, address: bytes) -> str:
        """Make the directories that binding to `address` needs; the path of the file, inside."""
        path = os.path.normpath("/" + os.fsdecode(address)).lstrip("/")
        if not path or path == "." or "\0" in path:
            raise RestartFailed(f"a unix socket is bound to {os.fsdecode(address)!r}, which is no name")
        folder = os.path.dirname(path)
        if folder:
            os.makedirs(f"/proc/self/fd/{self.fd}/{folder}", mode=0o700, exist_ok=True)
        return path

    def moves(self, path: str, name: str, mode: int, uid: int, gid: int) -> None:
        """The file at `path` inside becomes `name` in its place, by commit(), unless a file is there."""
        if not self._free(name):
            raise RestartFailed(
                f"{name} is no socket here, but a unix socket was bound to it", hint="move it out of the way"
            )
        os.chown(path, uid, gid, dir_fd=self.fd)
        os.chmod(f"/proc/self/fd/{self.fd}/{path}", mode & 0o7777)
        self._moves.append((path, name))

    def remove(self, path: str) -> None:
        """The file at `path` inside is not needed any more."""
        with contextlib.suppress(OSError):
            os.unlink(path, dir_fd=self.fd)

    def _free(self, name: str) -> bool:
        """Whether nothing is in that place, or a socket: another one's, or that of the saved program."""
        try:
            return stat.S_ISSOCK(os.lstat(name, dir_fd=self._place).st_mode)
        except FileNotFoundError:
            return True

    def commit(self) -> None:
        """Move the files to their places, over what is there."""
        for path, name in self._moves:
            with contextlib.suppress(OSError):
                if not self._free(name):
                    continue
                os.rename(path, name, src_dir_fd=self.fd, dst_dir_fd=self._place)
        self._moves.clear()

    def close(self) -> None:
        """Remove the directory with what was not committed."""
        if self.fd >= 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self.fd)
            os.close(self._place)
            self.fd = -1
