"""The top directory of a tree on the destination: the only way to what is below it.

Paths are opened below the top only, through no symbolic link and over no mount point (openat2(2)).
"""

from __future__ import annotations

import errno
import os

from migrator.filesync.paths import FileError, shown
from migrator.linux.openat2 import open_beneath
from migrator.protocol.trees import SyncTree
from migrator.protocol.wire import MessageError


class TreeTop:
    """`path` is where the tree is here; nothing is opened or made before `open()`."""

    def __init__(self, tree: SyncTree, path: str) -> None:
        self.tree = tree
        self.path = path.rstrip("/") or "/"
        self.only = frozenset(tree.only)
        self.fd = -1
        self._parent: tuple[bytes, int] | None = None

    def open(self, *, make: bool = False) -> None:
        """Raises OSError; with `make` the directory is made where there is none."""
        if self.fd < 0:
            if make:
                os.makedirs(self.path, exist_ok=True)
            self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def place(self, path: bytes) -> tuple[int, bytes]:
        """The directory that `path` is in, opened, and its last component. Good until the next move. Raises OSError."""
        head, _, name = path.rpartition(b"/")
        if not head:
            return self.fd, name
        if self._parent is None or self._parent[0] != head:
            self.forget_parent()
            self._parent = head, open_beneath(self.fd, head, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        return self._parent[1], name

    def forget_parent(self) -> None:
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None

    def failed(self, path: bytes, error: OSError, act: str) -> FileError:
        """`path` cannot be read or written, in the words of whoever has to do something about it."""
        where = os.path.join(self.tree.path, shown(path)) if path else self.tree.path
        if error.errno == errno.EXDEV:
            why = "another file system is mounted there here"
        elif error.errno in (errno.ELOOP, errno.ENOTDIR):
            why = "a directory of that path is something else here, and links are not followed"
        else:
            why = os.strerror(error.errno) if error.errno and error.errno != errno.ESTALE else str(error.args[-1])
        return FileError(f"{where} cannot be {act}: {why}", hint="is there room, and is it writable?")

    def close(self) -> None:
        self.forget_parent()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def top_of(tree: SyncTree, root: str) -> str:
    """Where a tree is here, below `root` ("" for the host's). Links lead to it only where the host's own administrator
    has made them. Raises MessageError, FileError."""
    if not tree.path.startswith("/") or ".." in tree.path.split("/") or "\0" in tree.path:
        raise MessageError(f"not the path of a tree: {tree.path!r}")
    if not root or root == "/":
        if not tree.only and os.path.normpath(tree.path).strip("/") == "":
            raise MessageError("the root of this host is nobody's to replace")
        return os.path.realpath(tree.path)
    base = os.path.realpath(root)
    top = os.path.normpath(os.path.join(base, tree.path.lstrip("/")))
    if os.path.realpath(top) != top:
        raise FileError(f"{top} leads over a symbolic link here", hint="make it a directory there")
    return top
