"""The top directory of a tree on the destination: the only way to what is below it.

Paths are opened below the top only, through no symbolic link and over no mount point (openat2(2)); the top itself as
`migrator.filesync.walk` says.
"""

from __future__ import annotations

import errno
import os

from migrator.filesync.paths import FileError, shown
from migrator.filesync.walk import walk
from migrator.linux.openat2 import open_beneath
from migrator.protocol.trees import SyncTree
from migrator.protocol.wire import MessageError


class TreeTop:
    """A tree is at `outer` here, or `inner` below it, where no link at all is followed: see `walk`. Nothing is opened
    or made before `open()`.

    fd, parent, name: the top, opened; the directory that it is in, -1 for none; its name there
    """

    def __init__(self, tree: SyncTree, outer: str, inner: str = "") -> None:
        self.tree = tree
        self.path = os.path.normpath(os.path.join(outer, inner)) if inner else os.path.normpath(outer)
        self.only = frozenset(tree.only)
        self.fd = self.parent = -1
        self.name = b""
        self._outer, self._inner = os.fsencode(outer), os.fsencode(inner)
        self._folder: tuple[bytes, int] | None = None  # the directory that was asked for last

    def open(self, *, make: bool = False) -> None:
        """Raises OSError; with `make` the directory is made where there is none."""
        if self.fd < 0:
            self.fd, self.parent, self.name = walk(self._outer, self._inner, make=make)

    def check(self) -> None:
        """Raises FileError if there is something in the way. That it is not there is no error."""
        try:
            self.open()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self.failed(b"", error, "reached") from error
        finally:
            self.close()

    def place(self, path: bytes) -> tuple[int, bytes]:
        """The directory that `path` is in, opened, and its last component. Good until the next move. Raises OSError."""
        head, _, name = path.rpartition(b"/")
        if not head:
            return self.fd, name
        if self._folder is None or self._folder[0] != head:
            self.forget_folder()
            self._folder = head, open_beneath(self.fd, head, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        return self._folder[1], name

    def forget_folder(self) -> None:
        """The directory that place() has opened last may be elsewhere by now."""
        if self._folder is not None:
            os.close(self._folder[1])
            self._folder = None

    def failed(self, path: bytes, error: OSError, act: str) -> FileError:
        """`path` cannot be read or written, in the words of whoever has to do something about it."""
        where = os.path.join(self.tree.path, shown(path)) if path else self.tree.path
        if error.errno == errno.EXDEV:
            why = "another file system is mounted there here"
        elif error.errno in (errno.ELOOP, errno.ENOTDIR):
            why = "a directory of that path is something else here, or a symbolic link that root has not made"
        else:
            why = os.strerror(error.errno) if error.errno and error.errno != errno.ESTALE else str(error.args[-1])
        return FileError(f"{where} cannot be {act}: {why}", hint="is there room, and is it writable?")

    def close(self) -> None:
        self.forget_folder()
        for fd in (self.fd, self.parent):
            if fd >= 0:
                os.close(fd)
        self.fd = self.parent = -1


def top_of(tree: SyncTree, root: str) -> TreeTop:
    """Where a tree is here, below `root` ("" for the host's). Raises MessageError, FileError."""
    if not tree.path.startswith("/") or ".." in tree.path.split("/") or "\0" in tree.path:
        raise MessageError(f"not the path of a tree: {tree.path!r}")
    if not root or root == "/":
        if not tree.only and os.path.normpath(tree.path).strip("/") == "":
            raise MessageError("the root of this host is nobody's to replace")
        top = TreeTop(tree, tree.path)
    else:
        top = TreeTop(tree, root, tree.path.lstrip("/") or ".")
    top.check()
    return top
