"""What is in a container's own tmpfs mounts, /dev/shm among them, as an archive.

A tmpfs has no path on the other host: its files travel as a tar archive (PAX, with owners, modes, times
in nanoseconds and extended attributes). The archive comes from the peer and is hostile:
nothing in it may land outside of the mount, and only files, directories, links and FIFOs are made.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import PurePosixPath

from migrator.errors import ImageError, MigratorError
from migrator.linux.namespaces import run_in

LIMIT = 1 << 30  # bytes of one archive

_XATTR = "SCHILY.xattr."


class TmpfsTooLarge(MigratorError):
    """A tmpfs holds more than is carried as files. Nothing has been changed."""

    exit_code = 3


def save_tmpfs(pid: int, mountpoint: str, *, limit: int = LIMIT) -> bytes:
    """The contents of a tmpfs as `pid` sees it, as a tar archive. Only reads.

    Sockets are left out: they are made by who binds them. Raises TmpfsTooLarge beyond `limit` bytes,
    FileNotFoundError if there is no such directory.
    """
    return run_in(pid, {"mnt"}, lambda: _pack(mountpoint, limit))


def load_tmpfs(pid: int, mountpoint: str, archive: bytes) -> None:
    """Unpack into the tmpfs as `pid` sees it. Raises ImageError for an archive that `save_tmpfs` would not
    have made; what had been unpacked until then stays."""
    run_in(pid, {"mnt"}, lambda: _unpack(mountpoint, archive))


def files(pid: int, mountpoint: str) -> list[tuple[str, int]]:
    """(path, size in bytes) of the regular files in a tmpfs, by path."""
    return run_in(pid, {"mnt"}, lambda: _list(mountpoint))


def _list(mountpoint: str) -> list[tuple[str, int]]:
    found = []
    for folder, _, names in os.walk(mountpoint):
        for name in names:
            path = os.path.join(folder, name)
            about = os.lstat(path)
            if stat.S_ISREG(about.st_mode):
                found.append((path, about.st_size))
    return sorted(found)


def _pack(mountpoint: str, limit: int) -> bytes:
    # Names of users are the container's business: looking them up would load its libraries into us.
    setattr(tarfile, "pwd", None)  # noqa: B010
    setattr(tarfile, "grp", None)  # noqa: B010
    device = os.stat(mountpoint).st_dev
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for folder, folders, names in os.walk(mountpoint):
            # Another file system mounted below is another's business.
            folders[:] = sorted(d for d in folders if os.lstat(os.path.join(folder, d)).st_dev == device)
            for name in [".", *sorted(names), *(d for d in folders if os.path.islink(f"{folder}/{d}"))]:
                _add(tar, os.path.normpath(os.path.join(folder, name)), mountpoint)
                if out.tell() > limit:
                    raise TmpfsTooLarge(
                        f"the tmpfs at {mountpoint} holds more than {limit >> 20} MiB",
                        hint="keep large data in a file system that both hosts have",
                    )
    return out.getvalue()


def _add(tar: tarfile.TarFile, path: str, mountpoint: str) -> None:
    info = tar.gettarinfo(path, arcname=os.path.relpath(path, mountpoint))
    if info is None:  # a socket
        return
    # A float of tarfile loses nanoseconds; a PAX header of our own does not.
    about = os.lstat(path)
    info.pax_headers = {"mtime": f"{about.st_mtime_ns // 10**9}.{about.st_mtime_ns % 10**9:09d}"}
    info.mtime = int(about.st_mtime)
    for key in os.listxattr(path, follow_symlinks=False):
        value = os.getxattr(path, key, follow_symlinks=False)
        info.pax_headers[_XATTR + key] = value.decode("utf-8", "surrogateescape")
    if info.isreg():
        with open(path, "rb") as file:
            tar.addfile(info, file)
    else:
        tar.addfile(info)


def _unpack(mountpoint: str, archive: bytes) -> None:
    os.umask(0)
    # From here on absolute and climbing paths end inside the mount, whatever the archive says.
    os.chroot(mountpoint)
    os.chdir("/")
    later: list[tuple[tarfile.TarInfo, str]] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for info in tar:
                path = _safe(info.name)
                _make(tar, info, path)
                later.append((info, path))
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise ImageError(f"the archive of the tmpfs at {mountpoint} is damaged: {error}") from None
    # Directories get their times last: making something in one changes them.
    for info, path in reversed(later):
        _finish(info, path)


def _safe(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ImageError(f"the archive of a tmpfs has the path {name!r}")
    return str(path)


def _make(tar: tarfile.TarFile, info: tarfile.TarInfo, path: str) -> None:
    if info.isdir():
        if path != ".":
            os.mkdir(path, 0o700)
    elif info.isreg():
        source = tar.extractfile(info)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(fd, "wb") as file:
            while source is not None and (part := source.read(1 << 20)):
                file.write(part)
            file.truncate(info.size)
    elif info.issym():
        os.symlink(info.linkname, path)
    elif info.islnk():
        os.link(_safe(info.linkname), path, follow_symlinks=False)
    elif info.isfifo():
        os.mkfifo(path, 0o600)
    else:
        raise ImageError(f"the archive of a tmpfs has a file of a kind that is not carried: {info.name!r}")


def _finish(info: tarfile.TarInfo, path: str) -> None:
    os.chown(path, info.uid, info.gid, follow_symlinks=False)
    if not info.issym():
        os.chmod(path, info.mode & 0o7777)
    for key, value in info.pax_headers.items():
        if key.startswith(_XATTR + "user."):
            name = key.removeprefix(_XATTR)
            os.setxattr(path, name, value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
    seconds, _, fraction = info.pax_headers.get("mtime", str(int(info.mtime))).partition(".")
    when = int(seconds) * 10**9 + int(fraction.ljust(9, "0")[:9] or "0")
    os.utime(path, ns=(when, when), follow_symlinks=False)
