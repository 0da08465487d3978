"""The destination's side of a tree that is carried along: hands that do what the source says, below one
directory and nowhere else.

Paths are opened below the top of the tree only, through no symbolic link and over no mount point (openat2(2)).
What is being written lies in a work directory beside the tree, and is moved into place (rename(2)) when it is
whole. What is removed is moved out of the way and deleted at the end; what was only here is kept.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
from collections.abc import Iterator

from migrator.filesync.attributes import WORK, Held, carried, dress, dress_name, mount_of, write_all
from migrator.filesync.files import FileError
from migrator.linux.openat2 import open_beneath
from migrator.protocol.messages import (
    LISTED,
    Close,
    Drop,
    Entry,
    Join,
    MessageError,
    Open,
    Put,
    Remove,
    Stash,
    SyncTree,
    Touch,
    TreeAnswer,
    TreeList,
    TreeOp,
    TreeOps,
    Write,
)

_O_PATH = os.O_PATH | os.O_NOFOLLOW
_SHARED_NS = 60 * 10**9  # how long ago the source may have looked
_MOST_STASHED = 1 << 20


class TreeTarget:
    """One tree on the destination: `top` is where it is here, `name` is for the work directory.

    Nothing is written before the first operation.
    """

    def __init__(self, tree: SyncTree, top: str, name: str) -> None:
        self.tree = tree
        self.top = top.rstrip("/") or "/"
        self.bytes = 0
        self._name = os.fsencode(name)
        self._top_fd = self._work_fd = -1
        self._work = b""
        self._number = 0
        self._stashed: dict[int, bytes] = {}
        self._parent: tuple[bytes, int] | None = None
        self._names: tuple[bytes, list[bytes]] | None = None  # of the directory that was listed last
        self._file: Open | None = None
        self._fd = -1
        self._staged = b""
        self._held: Held | None = None

    # Comparing

    @property
    def shared(self) -> bool:
        """Whether this seems to be the very directory that the source sees, as on shared storage."""
        try:
            status = os.stat(self.top)
        except OSError:
            return False
        since = status.st_ctime_ns - self.tree.changed_ns
        return status.st_ino & ((1 << 63) - 1) == self.tree.inode and 0 <= since < _SHARED_NS

    def compare(self, listed: TreeList) -> list[TreeAnswer]:
        """What is not the same here. Only reads. Raises MessageError for what no source would ask."""
        _check(listed.directory)
        names = [entry.path for entry in listed.entries]
        for name in names:
            _check(name, component=True)
        if sorted(set(names)) != names or (names and names[0] <= listed.after != b""):
            raise MessageError(f"{_shown(listed.directory)}: a list out of order")
        differing, surplus = list(range(len(names))), []
        try:
            with self._listing(listed.directory) as fd:
                if fd is not None:
                    differing = [n for n, entry in enumerate(listed.entries) if self._differs(fd, entry)]
                    upto = None if listed.last else (names[-1] if names else b"")
                    surplus = self._surplus(listed.directory, fd, set(names), listed.after, upto)
        except OSError as error:
            raise self._failed(listed.directory, error, "read") from error
        if self.tree.only:
            surplus = []
        parts = [surplus[at : at + LISTED] for at in range(0, len(surplus), LISTED)] or [[]]
        return [
            TreeAnswer(listed.number, differing if n == 0 else [], part, n == len(parts) - 1)
            for n, part in enumerate(parts)
        ]

    @contextlib.contextmanager
    def _listing(self, directory: bytes) -> Iterator[int | None]:
        """The directory of that path, opened; None if there is none here."""
        fd = None
        try:
            if self._top_fd < 0:
                self._top_fd = os.open(self.top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fd = open_beneath(self._top_fd, directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
        try:
            yield fd
        finally:
            if fd is not None:
                os.close(fd)

    def _surplus(self, directory: bytes, fd: int, there: set[bytes], after: bytes, upto: bytes | None) -> list[bytes]:
        if self._names is None or self._names[0] != directory:
            self._names = (directory, sorted(os.fsencode(name) for name in os.listdir(fd)))
        return [
            name
            for name in self._names[1]
            if name > after
            and (upto is None or name <= upto)
            and name not in there
            and not (not directory and name.startswith(WORK))
        ]

    def _differs(self, fd: int, entry: Entry) -> bool:
        try:
            status = os.stat(entry.path, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return carried(entry.mode)
        if not carried(entry.mode):
            return False
        if stat.S_IFMT(status.st_mode) != stat.S_IFMT(entry.mode):
            return True
        if entry.mount:
            return False
        if (status.st_uid, status.st_gid) != (entry.uid, entry.gid):
            return True
        if stat.S_ISLNK(entry.mode):
            return os.readlink(entry.path, dir_fd=fd) != entry.target
        if status.st_mode != entry.mode:
            return True
        if stat.S_ISREG(entry.mode) and (status.st_size, status.st_mtime_ns) != (entry.size, entry.mtime_ns):
            return True
        return bool(entry.link) and not self._joined(status, entry.link)

    def _joined(self, status: os.stat_result, link: bytes) -> bool:
        _check(link)
        try:
            fd = open_beneath(self._top_fd, link, _O_PATH)
        except OSError:
            return False
        try:
            other = os.fstat(fd)
        finally:
            os.close(fd)
        return (other.st_dev, other.st_ino) == (status.st_dev, status.st_ino)

    # Writing

    def apply(self, ops: list[TreeOp]) -> None:
        """Do these. Raises MessageError for what is not below the tree or out of order, FileError with the path of
        what cannot be done; what was whole by then is in place."""
        self._begin()
        for op in ops:
            path = _path_of(op) or (self._file.entry.path if self._file is not None else b"")
            try:
                self._apply(op, path)
            except OSError as error:
                raise self._failed(path, error, "written") from error

    def close(self, kept: bool) -> str:
        """The end: `kept` if the workload runs here now. Deletes what was removed, and puts back what was set aside
        if the migration came to nothing. Returns where something was set aside, or ""."""
        self._drop_file()
        self._forget_parent()
        left = ""
        with contextlib.suppress(OSError):
            if self._work_fd >= 0:
                for number, path in self._stashed.items():
                    self._move_back(b"old/%d" % number, path)
                self._forget_parent()
                if not kept:
                    self._put_back(b"aside", b"")
                if kept and os.listdir(self._dir(b"aside")):
                    for name in ("new", "old"):
                        shutil.rmtree(self._dir(name.encode()), ignore_errors=True)
                    left = os.fsdecode(self._dir(b"aside"))
                else:
                    shutil.rmtree(self._work, ignore_errors=True)
        for fd in (self._top_fd, self._work_fd):
            if fd >= 0:
                os.close(fd)
        self._top_fd = self._work_fd = -1
        return left

    def _begin(self) -> None:
        """Make the top and the work directory, if that was not done yet."""
        if self._work_fd >= 0:
            return
        try:
            if self._top_fd < 0:
                os.makedirs(self.top, exist_ok=True)
                self._top_fd = os.open(self.top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            top = os.fsencode(self.top)
            places = [os.path.join(top, WORK + self._name)]
            head, tail = os.path.split(top)
            if tail and not self.tree.only:
                places.insert(0, os.path.join(head, b"." + tail[:100] + WORK + self._name))
            for place in places:
                os.mkdir(place, 0o700)
                if mount_of(place) == mount_of(top):
                    break
                os.rmdir(place)  # nothing can be renamed from there
            self._work = place
            self._work_fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for name in ("new", "old", "aside"):
                os.mkdir(name, 0o700, dir_fd=self._work_fd)
        except OSError as error:
            raise self._failed(b"", error, "written") from error

    def _apply(self, op: TreeOp, path: bytes) -> None:
        if isinstance(op, Write | Close):
            if self._file is None:
                raise MessageError("contents of a file that was not opened")
            self._write(op) if isinstance(op, Write) else self._close()
            return
        if self._file is not None:
            raise MessageError(f"{_shown(path)} before the last file was complete")
        if isinstance(op, Drop):
            self._unstashed(op.number, path)
            return
        self._check_agreed(path, top=isinstance(op, Put | Touch))
        if isinstance(op, Put):
            self._put(op)
        elif isinstance(op, Open):
            self._open(op)
        elif isinstance(op, Touch):
            self._touch(op.entry)
        elif isinstance(op, Join):
            self._join(op)
        elif isinstance(op, Remove):
            self._remove(path, op.aside)
        elif isinstance(op, Stash):
            if op.number in self._stashed or len(self._stashed) >= _MOST_STASHED:
                raise MessageError(f"{_shown(path)} is moved out of the way under a number that is taken")
            self._stashed[op.number] = path
            self._move_in(path, b"old/%d" % op.number)
        else:
            self._unstashed(op.number, path)
            self._clear(path, self._lstat(b"old/%d" % op.number))
            self._move_out(b"old/%d" % op.number, path)

    def _unstashed(self, number: int, path: bytes) -> None:
        if self._stashed.pop(number, None) is None:
            raise MessageError(f"{_shown(path)} was not moved out of the way before")

    def _check_agreed(self, path: bytes, *, top: bool) -> None:
        _check(path, empty=top)
        if self.tree.only and path != self.tree.only:
            raise MessageError(f"{_shown(path)} was not agreed upon")
        if path.split(b"/", 1)[0].startswith(WORK):
            raise MessageError(f"{_shown(path)} is not carried")

    def _put(self, op: Put) -> None:
        entry = op.entry
        kind = stat.S_IFMT(entry.mode)
        if not carried(entry.mode):
            raise MessageError(f"{_shown(entry.path)} is of a kind that is not carried")
        if kind == stat.S_IFDIR:
            return self._put_directory(entry)
        if kind == stat.S_IFREG:
            fd, staged = self._stage()
            try:
                write_all(fd, op.data, 0)
                self.bytes += len(op.data)
                dress(fd, entry)
            finally:
                os.close(fd)
        else:
            staged = self._next()
            if kind == stat.S_IFLNK:
                os.symlink(entry.target, staged, dir_fd=self._work_fd)
            else:
                os.mkfifo(staged, 0o600, dir_fd=self._work_fd)
            dress_name(self._work_fd, staged, entry)
        self._clear(entry.path, None)
        self._move_out(staged, entry.path)

    def _put_directory(self, entry: Entry) -> None:
        if entry.path:
            folder, name = self._place(entry.path)
            try:
                os.mkdir(name, 0o700, dir_fd=folder)
            except FileExistsError:
                if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    self._remove(entry.path, False)
                    os.mkdir(name, 0o700, dir_fd=self._place(entry.path)[0])
                elif entry.mount:
                    return
        self._touch(entry)

    def _touch(self, entry: Entry) -> None:
        kind = stat.S_IFMT(entry.mode)
        if kind == stat.S_IFLNK or kind == stat.S_IFIFO:
            folder, name = self._place(entry.path)
            if stat.S_IFMT(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode) != kind:
                raise OSError(errno.ESTALE, "is another file by now")
            return dress_name(folder, name, entry)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_DIRECTORY if kind == stat.S_IFDIR else 0)
        fd = open_beneath(self._top_fd, entry.path, flags)
        try:
            if stat.S_IFMT(os.fstat(fd).st_mode) != kind:
                raise OSError(errno.ESTALE, "is another file by now")
            dress(fd, entry)
        finally:
            os.close(fd)

    def _join(self, op: Join) -> None:
        self._check_agreed(op.to, top=False)
        folder, name = self._place(op.to)
        staged = self._next()
        os.link(name, staged, src_dir_fd=folder, dst_dir_fd=self._work_fd, follow_symlinks=False)
        self._clear(op.path, None)
        self._move_out(staged, op.path)
        with contextlib.suppress(FileNotFoundError):  # it was a name of the same file already
            os.unlink(staged, dir_fd=self._work_fd)

    def _remove(self, path: bytes, aside: bool) -> None:
        place = self._next(b"old")
        if aside:
            place = b"aside/" + path
            os.makedirs(os.path.join(self._work, os.path.dirname(place)), mode=0o700, exist_ok=True)
        try:
            self._move_in(path, place)
        except FileNotFoundError:
            pass  # what is wanted is that it is not there

    def _clear(self, path: bytes, coming: os.stat_result | None) -> None:
        """Make way at `path` where rename(2) would not."""
        folder, name = self._place(path)
        try:
            here = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(here.st_mode) or (coming is not None and stat.S_ISDIR(coming.st_mode)):
            self._remove(path, False)

    # A file in parts

    def _open(self, op: Open) -> None:
        if not stat.S_ISREG(op.entry.mode):
            raise MessageError(f"{_shown(op.entry.path)} is no regular file")
        if op.in_place:
            fd = open_beneath(self._top_fd, op.entry.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise OSError(errno.ESTALE, "is another file by now")
            self._fd = fd
            self._held = Held(os.fsdecode(self._dir(b"new")))
        else:
            self._fd, self._staged = self._stage()
        self._file = op

    def _write(self, op: Write) -> None:
        self.bytes += len(op.data)
        if self._held is not None:
            self._held.write(op.data, op.offset)
        else:
            write_all(self._fd, op.data, op.offset)

    def _close(self) -> None:
        assert self._file is not None
        entry = self._file.entry
        if self._held is not None:
            self._held.apply(self._fd)
        os.ftruncate(self._fd, entry.size)
        dress(self._fd, entry)
        if self._held is None:
            self._clear(entry.path, None)
            self._move_out(self._staged, entry.path)
        self._drop_file()

    def _drop_file(self) -> None:
        if self._held is not None:
            self._held.close()
        elif self._file is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._staged, dir_fd=self._work_fd)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._file, self._held = -1, None, None

    # Places

    def _next(self, folder: bytes = b"new") -> bytes:
        self._number += 1
        return folder + b"/n%d" % self._number

    def _stage(self) -> tuple[int, bytes]:
        name = self._next()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(name, flags, 0o600, dir_fd=self._work_fd), name

    def _place(self, path: bytes) -> tuple[int, bytes]:
        """The directory that `path` is in, opened, and its last component. Good until the next move."""
        head, _, name = path.rpartition(b"/")
        if self._parent is None or self._parent[0] != head:
            self._forget_parent()
            fd = open_beneath(self._top_fd, head, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
            self._parent = (head, fd)
        return self._parent[1], name

    def _forget_parent(self) -> None:
        if self._parent is not None:
            os.close(self._parent[1])
            self._parent = None

    def _move_out(self, staged: bytes, path: bytes) -> None:
        folder, name = self._place(path)
        os.rename(staged, name, src_dir_fd=self._work_fd, dst_dir_fd=folder)

    def _move_in(self, path: bytes, place: bytes) -> None:
        folder, name = self._place(path)
        os.rename(name, place, src_dir_fd=folder, dst_dir_fd=self._work_fd)
        self._forget_parent()  # it may have been in there

    def _lstat(self, place: bytes) -> os.stat_result:
        return os.stat(place, dir_fd=self._work_fd, follow_symlinks=False)

    def _dir(self, name: bytes) -> bytes:
        return os.path.join(self._work, name)

    def _put_back(self, place: bytes, path: bytes) -> None:
        """Move what was set aside to where it was."""
        for item in os.listdir(self._dir(place)):
            name = os.fsencode(item)
            inner, back = place + b"/" + name, path + b"/" + name if path else name
            if not self._move_back(inner, back) and stat.S_ISDIR(self._lstat(inner).st_mode):
                self._put_back(inner, back)

    def _move_back(self, place: bytes, path: bytes) -> bool:
        """Move it to `path`, unless there is something by now."""
        try:
            folder, name = self._place(path)
            with contextlib.suppress(FileNotFoundError):
                os.stat(name, dir_fd=folder, follow_symlinks=False)
                return False
            self._move_out(place, path)
        except OSError:
            return False
        return True

    def _failed(self, path: bytes, error: OSError, act: str) -> FileError:
        where = os.path.join(self.tree.path, _shown(path)) if path else self.tree.path
        if error.errno == errno.EXDEV:
            why = "another file system is mounted there here"
        elif error.errno in (errno.ELOOP, errno.ENOTDIR):
            why = "a directory of that path is something else here, and links are not followed"
        else:
            why = os.strerror(error.errno) if error.errno and error.errno != errno.ESTALE else str(error.args[-1])
        return FileError(f"{where} cannot be {act}: {why}", hint="is there room, and is it writable?")


class TreeTargets:
    """All trees of one proposal, below `root` ("" for the host's). Nothing is written unless `accepted`. What comes
    after `close` is refused, and what is being done then is finished first: they may be called from several
    threads."""

    def __init__(self, trees: list[SyncTree], root: str, name: str) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self.accepted = False
        self._trees = [TreeTarget(tree, _top_of(tree, root), name) for tree in trees]

    def compare(self, listed: TreeList) -> list[TreeAnswer]:
        with self._lock:
            return self._at(listed.tree).compare(listed)

    def apply(self, message: TreeOps) -> None:
        with self._lock:
            tree = self._at(message.tree)
            if not self.accepted:
                raise MessageError("files of a workload that was not accepted")
            tree.apply(message.ops)

    def shared(self) -> list[SyncTree]:
        """Those which are the same directory on both hosts: there is nothing to carry, and much to break."""
        return [target.tree for target in self._trees if target.shared]

    def close(self, kept: bool) -> list[str]:
        """See `TreeTarget.close`."""
        with self._lock:
            self._closed = True
            return [left for tree in self._trees if (left := tree.close(kept))]

    def _at(self, number: int) -> TreeTarget:
        if number >= len(self._trees) or self._closed:
            raise MessageError(f"tree {number} was not agreed upon")
        return self._trees[number]


def _top_of(tree: SyncTree, root: str) -> str:
    """Where the tree is here. Links lead to it only where the host's own administrator has made them."""
    if ".." in tree.path.split("/") or "\0" in tree.path:
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


def _path_of(op: TreeOp) -> bytes:
    if isinstance(op, Put | Open | Touch):
        return op.entry.path
    return b"" if isinstance(op, Write | Close | Drop) else op.path


def _check(path: bytes, *, empty: bool = True, component: bool = False) -> None:
    parts = path.split(b"/")
    bad = any(part in (b"", b".", b"..") for part in parts) if path else not empty or component
    if bad or b"\0" in path or (component and len(parts) > 1):
        raise MessageError(f"not a path in a tree: {path[:200]!r}")


def _shown(path: bytes) -> str:
    return path.decode(errors="backslashreplace")
