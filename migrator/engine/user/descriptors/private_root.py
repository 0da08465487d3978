"""Binding a socket to a name of the file system without touching what has that name.

A unix socket keeps its address as the text given to bind(2), and its file as an inode: a thread whose root
is a directory of ours binds to the text, and the file made there is moved to its place later, at once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from migrator.errors import RestartFailed
from migrator.linux import descriptors
from migrator.linux.fresh_thread import in_fresh_thread
from migrator.linux.openat2 import open_in_root
from migrator.linux.own_directory import make_own_directory

T = TypeVar("T")
PREFIX = ".migrator-"

Move = tuple[str, str, str, str]  # folder, our directory in it, a file in that, its name in the folder


class PrivateRoot:
    """A directory that a thread sees as its root, on the file system of the socket's future place.

    place: O_PATH descriptor of the directory that the file will be moved to, which is taken over."""

    def __init__(self, place: int) -> None:
        self._place = place
        try:
            self._name, self.fd = make_own_directory(place, PREFIX)
        except OSError:
            os.close(place)
            raise
        self._moves: list[tuple[str, str]] = []

    def run(self, function: Callable[[], T]) -> T:
        """Run `function` in a thread whose root and working directory are this one."""

        def inside() -> T:
            descriptors.unshare_fs()
            os.fchdir(self.fd)
            os.chroot(".")
            return function()

        return in_fresh_thread("private root", inside)

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
        if not _free(self._place, name):
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

    def moves_in(self, folder: str) -> list[Move]:
        """What commit() will do, `folder` being the place: for `finish_moves()`."""
        return [(folder, os.fsdecode(self._name), path, name) for path, name in self._moves]

    def commit(self) -> None:
        """Move the files to their places, over what is there."""
        for path, name in self._moves:
            _move(self.fd, path, self._place, name)
        self._moves.clear()

    def close(self) -> None:
        """Remove the directory with what was not committed."""
        if self.fd >= 0:
            shutil.rmtree(self._name, ignore_errors=True, dir_fd=self._place)
            os.close(self.fd)
            os.close(self._place)
            self.fd = -1


def finish_moves(root: int, moves: Sequence[Move]) -> None:
    """The commit() and close() of an agent that has died; `root` is the root directory of the tree.

    What has been moved already is left alone."""
    for folder, private, path, name in moves:
        with (
            contextlib.suppress(OSError),
            _directory(root, folder) as place,
            _directory(place, private, links=False) as source,
        ):
            _move(source, path, place, name)
    for folder, private in {move[:2] for move in moves}:
        if private.startswith(PREFIX):
            with contextlib.suppress(OSError), _directory(root, folder) as place:
                shutil.rmtree(private, ignore_errors=True, dir_fd=place)


@contextlib.contextmanager
def _directory(root: int, path: str, *, links: bool = True) -> Iterator[int]:
    fd = open_in_root(root, path.lstrip("/") or ".", os.O_PATH | os.O_DIRECTORY, links=links)
    try:
        yield fd
    finally:
        os.close(fd)


def _move(source: int, path: str, place: int, name: str) -> None:
    with contextlib.suppress(OSError):
        if _free(place, name):
            os.rename(path, name, src_dir_fd=source, dst_dir_fd=place)


def _free(place: int, name: str) -> bool:
    """Whether nothing is in that place, or a socket: another one's, or that of the saved program."""
    try:
        return stat.S_ISSOCK(os.lstat(name, dir_fd=place).st_mode)
    except FileNotFoundError:
        return True
