"""Regular files, directories, devices and files without a name."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from migrator.engine.user.descriptors.description import Description
from migrator.errors import ImageError, RestartFailed
from migrator.image.records_files import MAX_CHUNK, DeletedFile, File, FileData, FileKind
from migrator.linux import descriptors
from migrator.linux.batch import Area, Strings, each
from migrator.linux.openat2 import LINK_HINT, UntrustedLink, open_in_root, reason
from migrator.linux.own_directory import make_own_directory
from migrator.linux.stat import STAT_SIZE, fingerprints
from migrator.linux.x86_64 import NR

# flags that act once, when a file is opened
_ONCE = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY | descriptors.O_TMPFILE_BIT
_HOW = os.O_ACCMODE | os.O_SYNC | os.O_PATH  # what only opening decides
_KNOWN = 0o37777777  # all flags up to O_TMPFILE's
_FORMATS = {
    FileKind.REGULAR: (stat.S_IFREG,),
    FileKind.DIRECTORY: (stat.S_IFDIR,),
    FileKind.DEVICE: (stat.S_IFCHR,),
}
_HINT = "the file must be at the same path on this host: see --copy-files"
_FALLBACKS = ("tmp", "dev/shm", "")


def own_attributes(file: int | str) -> str:
    """Why a file without a name cannot be carried with its extended attributes, or "". Labels of a security module are
    a host's."""
    try:
        names = [name for name in os.listxattr(file) if not name.startswith("security.")]
    except OSError:
        return ""  # it was closed meanwhile, or its file system has none
    return f"a file without a name that has the attribute {names[0]} (xattr(7)) cannot be carried" if names else ""


def save_deleted(objref: int, description: Description) -> Iterator[DeletedFile | FileData]:
    """The records of a file without a name: holes are left out. Nothing of the description moves."""
    status = os.fstat(description.fd)
    yield DeletedFile(objref, status.st_mode, status.st_size, status.st_uid, status.st_gid, description.path)
    fd = descriptors.reopen(description.fd, os.O_RDONLY)
    try:
        end = 0
        while end < status.st_size:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = os.lseek(fd, start, os.SEEK_HOLE)
            for offset in range(start, end, MAX_CHUNK):
                data = os.pread(fd, min(MAX_CHUNK, end - offset), offset)
                if data:
                    yield FileData(objref, 0, offset, data)
    finally:
        os.close(fd)


def lasting(flags: int) -> int:
    """Flags to open a file again with: without those that act once. O_TMPFILE has O_DIRECTORY in it."""
    return flags & ~_ONCE & ~os.O_DIRECTORY


def open_path(rec: File, root_fd: int) -> int:
    """Open the file that `rec` is about by its path, at its offset, having checked that it is of its kind."""
    where = f"{rec.path} (file {rec.objref})"
    if not rec.path.startswith("/") or rec.flags & ~_KNOWN:
        raise ImageError(f"{where}: no absolute path, or unknown flags {rec.flags:#o}")
    path = rec.path.lstrip("/") or "."
    flags = rec.flags & ~_ONCE
    try:
        if rec.kind == FileKind.PATH:
            fd = open_in_root(root_fd, path, flags | os.O_PATH)
        else:
            # O_NONBLOCK: whatever stands there instead of the file must not make us wait
            flags |= os.O_NONBLOCK | os.O_NOCTTY
            fd = open_in_root(root_fd, path, flags)
    except OSError as error:
        raise RestartFailed(
            f"{where} cannot be opened: {reason(error)}",
            hint=LINK_HINT if isinstance(error, UntrustedLink) else _HINT,
        ) from error
    try:
        adjust(fd, rec)
    except BaseException:
        os.close(fd)
        raise
    return fd


def adjust(fd: int, rec: File) -> None:
    """Bring what was opened for `rec` to its offset and flags, having checked that it is of its kind."""
    where = f"{rec.path} (file {rec.objref})"
    try:
        _verify(fd, rec, where)
        if rec.kind == FileKind.PATH:
            return
        fcntl.fcntl(fd, fcntl.F_SETFL, rec.flags)
        os.lseek(fd, rec.pos, os.SEEK_SET)
    except OSError as error:
        raise RestartFailed(f"{where}: {error}") from error


class Opened(NamedTuple):
    """A file that was opened ahead of the freeze, what it is, and how it is open."""

    fd: int
    name: bytes  # the path from the root
    place: tuple[int, int]  # st_dev, st_ino
    how: int

    @classmethod
    def of(cls, fd: int, rec: File) -> Opened:
        status = os.fstat(fd)
        how = fcntl.fcntl(fd, fcntl.F_GETFL) & _HOW
        return cls(fd, os.fsencode(rec.path.lstrip("/") or "."), (status.st_dev, status.st_ino), how)


def still_there(opened: Sequence[tuple[Opened, File]], root_fd: int) -> list[bool]:
    """Of each whether the path of the record still leads to what was opened for it, opened in the same way."""
    names = Strings([file.name for file, _ in opened])
    there = Area(STAT_SIZE, len(opened))
    # an absolute link leads out of the root here: then it is another file, and asked again
    calls = NR["newfstatat"], root_fd, names.addresses, there.addresses, 0
    (found,) = each(len(opened), calls)
    out = [
        result == 0 and place[:2] == file.place and file.how == rec.flags & _HOW
        for result, place, (file, rec) in zip(found, fingerprints(there.view) if opened else (), opened, strict=True)
    ]
    for at, (file, rec) in enumerate(opened):
        if not out[at]:
            out[at] = _is_still_there(file.fd, rec, root_fd)
    return out


def _is_still_there(fd: int, rec: File, root_fd: int) -> bool:
    try:
        place = open_in_root(root_fd, rec.path.lstrip("/") or ".", os.O_PATH)
    except OSError:
        return False
    try:
        return os.path.sameopenfile(place, fd) and fcntl.fcntl(fd, fcntl.F_GETFL) & _HOW == rec.flags & _HOW
    finally:
        os.close(place)


def _verify(fd: int, rec: File, where: str) -> None:
    status = os.fstat(fd)
    if stat.S_IFMT(status.st_mode) != stat.S_IFMT(rec.mode) or (
        rec.kind in _FORMATS and stat.S_IFMT(status.st_mode) not in _FORMATS[FileKind(rec.kind)]
    ):
        raise RestartFailed(f"{where} is something else here (mode {status.st_mode:o}, was {rec.mode:o})")
    if rec.kind == FileKind.REGULAR and status.st_size < rec.pos <= rec.size:
        raise RestartFailed(
            f"{where} has {status.st_size} bytes here, the program is at offset {rec.pos}",
            hint="the file must be the same on both hosts: see --copy-files",
        )
    if rec.kind == FileKind.DEVICE and status.st_rdev != rec.rdev:
        raise RestartFailed(f"{where} is another device here")


class UnnamedFile:
    """A new file without a name, where `path` is if that directory is there. Raises RestartFailed.

    fd: ours, for reading and writing"""

    def __init__(self, root_fd: int, path: str) -> None:
        self._folder: tuple[bytes, int] | None = None
        failure: OSError | None = None
        for directory in (os.path.dirname(path).lstrip("/"), *_FALLBACKS):
            try:
                self.fd, self._place = _open_tmpfile(root_fd, directory or ".")
                return
            except OSError as error:
                failure = failure or error
        raise RestartFailed(f"a deleted file, once {path}, cannot be made again: {failure}")

    def open(self, flags: int) -> int:
        """A new description, at offset 0."""
        flags = lasting(flags)
        return self._open_by_name(flags) if flags & os.O_NOFOLLOW else descriptors.reopen(self.fd, flags)

    def _open_by_name(self, flags: int) -> int:
        """The way through /proc is a link, which O_NOFOLLOW forbids. A file can be given a name once: it is kept for
        others who want to open it."""
        try:
            if self._folder is None:
                self._folder = make_own_directory(self._place, ".migrator-")
                os.link(f"/proc/self/fd/{self.fd}", "file", dst_dir_fd=self._folder[1])  # linkat(AT_SYMLINK_FOLLOW)
            return os.open("file", flags | os.O_CLOEXEC, dir_fd=self._folder[1])
        except OSError as error:
            raise RestartFailed(f"a deleted file that was opened with O_NOFOLLOW: {error}") from error

    def settle(self) -> None:
        """It has been opened by all: its name goes."""
        if self._folder is not None:
            os.close(self._folder[1])
            shutil.rmtree(self._folder[0], ignore_errors=True, dir_fd=self._place)
            self._folder = None

    def close(self) -> None:
        if self.fd >= 0:
            self.settle()
            os.close(self.fd)
            os.close(self._place)
            self.fd = -1


class DeletedRestore:
    """A file without a name, as its records come."""

    def __init__(self, rec: DeletedFile, root_fd: int) -> None:
        self.size = rec.size
        self._file = UnnamedFile(root_fd, rec.path)
        fd = self._file.fd
        try:
            os.fchown(fd, rec.uid, rec.gid)
            os.fchmod(fd, stat.S_IMODE(rec.mode))
            os.ftruncate(fd, rec.size)
        except (OSError, OverflowError) as error:
            self.close()
            raise RestartFailed(f"a deleted file of {rec.size} bytes, once {rec.path}: {error}") from error

    def add(self, rec: FileData) -> None:
        if rec.offset + len(rec.data) > self.size:
            raise ImageError(f"data at {rec.offset} of a deleted file of {self.size} bytes")
        view = memoryview(rec.data)
        offset = rec.offset
        while view:
            done = os.pwrite(self._file.fd, view, offset)
            view, offset = view[done:], offset + done

    def open(self, rec: File) -> int:
        """A new description, at offset 0. All contents have come: the file was changed last when it was."""
        fd = self._file.open(rec.flags)
        status = os.fstat(self._file.fd)
        os.utime(self._file.fd, ns=(status.st_atime_ns, rec.mtime))
        return fd

    def settle(self) -> None:
        self._file.settle()

    def close(self) -> None:
        self._file.close()


def _open_tmpfile(root_fd: int, directory: str) -> tuple[int, int]:
    """(the file, its directory)."""
    place = open_in_root(root_fd, directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return os.open(f"/proc/self/fd/{place}", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), place
    except OSError:
        os.close(place)
        raise
