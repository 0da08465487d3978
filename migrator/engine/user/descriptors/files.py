"""Regular files, directories, devices and files without a name."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator

from migrator.engine.user.descriptors.description import Description
from migrator.errors import ImageError, RestartFailed
from migrator.image.records_files import MAX_CHUNK, DeletedFile, File, FileData, FileKind
from migrator.linux import descriptors
from migrator.linux.openat2 import open_in_root

# flags that act once, when a file is opened
_ONCE = os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_NOCTTY | descriptors.O_TMPFILE_BIT
_KNOWN = 0o37777777  # all flags up to O_TMPFILE's
_FORMATS = {
    FileKind.REGULAR: (stat.S_IFREG,),
    FileKind.DIRECTORY: (stat.S_IFDIR,),
    FileKind.DEVICE: (stat.S_IFCHR,),
}
_FALLBACKS = ("tmp", "dev/shm", "")


def save_deleted(objref: int, description: Description) -> Iterator[DeletedFile | FileData]:
    """The records of a file without a name: holes are left out. Nothing of the description moves."""
    status = os.fstat(description.fd)
    mode = stat.S_IMODE(status.st_mode)
    yield DeletedFile(objref, mode, status.st_size, status.st_uid, status.st_gid, description.path)
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
            f"{where} cannot be opened: {os.strerror(error.errno or 0)}",
            hint="the file must be at the same path on this host: see --copy-files",
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


def still_there(fd: int, rec: File, root_fd: int) -> bool:
    """Whether the path of `rec` still leads to what was opened for it, opened in the same way."""
    try:
        place = open_in_root(root_fd, rec.path.lstrip("/") or ".", os.O_PATH)
    except OSError:
        return False
    try:
        ours, there = os.fstat(fd), os.fstat(place)
    finally:
        os.close(place)
    how = os.O_ACCMODE | os.O_SYNC | os.O_PATH
    same_way = fcntl.fcntl(fd, fcntl.F_GETFL) & how == rec.flags & how
    return same_way and (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


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


class DeletedRestore:
    """A file without a name: made again without one, where it was if that directory is there."""

    def __init__(self, rec: DeletedFile, root_fd: int) -> None:
        self.size = rec.size
        self._fd, self._place = self._make(rec, root_fd)
        try:
            os.fchown(self._fd, rec.uid, rec.gid)
            os.fchmod(self._fd, stat.S_IMODE(rec.mode))
            os.ftruncate(self._fd, rec.size)
        except (OSError, OverflowError) as error:
            self.close()
            raise RestartFailed(f"a deleted file of {rec.size} bytes, once {rec.path}: {error}") from error

    @staticmethod
    def _make(rec: DeletedFile, root_fd: int) -> tuple[int, int]:
        failure: OSError | None = None
        for directory in (os.path.dirname(rec.path).lstrip("/"), *_FALLBACKS):
            try:
                return _open_tmpfile(root_fd, directory or ".", os.O_TMPFILE | os.O_RDWR)
            except OSError as error:
                failure = failure or error
        raise RestartFailed(f"a deleted file, once {rec.path}, cannot be made again: {failure}")

    def add(self, rec: FileData) -> None:
        if rec.offset + len(rec.data) > self.size:
            raise ImageError(f"data at {rec.offset} of a deleted file of {self.size} bytes")
        view = memoryview(rec.data)
        offset = rec.offset
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    def open(self, rec: File) -> int:
        """A new description, at offset 0. All contents have come: the file was changed last when it was."""
        os.utime(self._fd, ns=(max(0, os.fstat(self._fd).st_atime_ns), rec.mtime))
        flags = rec.flags & ~_ONCE & ~os.O_DIRECTORY
        return self._open_by_name(flags) if flags & os.O_NOFOLLOW else descriptors.reopen(self._fd, flags)

    def _open_by_name(self, flags: int) -> int:
        """The way through /proc is a link, which O_NOFOLLOW forbids: the file has a name for a moment."""
        try:
            with tempfile.TemporaryDirectory(prefix=".migrator-", dir=f"/proc/self/fd/{self._place}") as folder:
                name = f"{folder}/file"
                os.link(f"/proc/self/fd/{self._fd}", name, src_dir_fd=self._place)  # linkat(AT_SYMLINK_FOLLOW)
                try:
                    return os.open(name, flags | os.O_CLOEXEC)
                finally:
                    os.unlink(name)
        except OSError as error:
            raise RestartFailed(f"a deleted file that was opened with O_NOFOLLOW: {error}") from error

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            os.close(self._place)
            self._fd = -1


def _open_tmpfile(root_fd: int, directory: str, flags: int) -> tuple[int, int]:
    """(the file, its directory)."""
    place = open_in_root(root_fd, directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return os.open(f"/proc/self/fd/{place}", flags | os.O_CLOEXEC, 0o600), place
    except OSError:
        os.close(place)
        raise
