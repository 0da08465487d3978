"""inotify instances (inotify(7)): what they watch, under which numbers.

The kernel tells of each watch its number, its mask and a handle of the inode. Opened, the handle has a path as long as
the kernel remembers one (open_by_handle_at(2)). It is looked up while the tasks run, and only compared when they are
stopped. What has happened and was not read yet only the running program can take: see `transients`.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import re
import struct
import termios
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import NamedTuple

from migrator.engine.user.descriptors.classify import FileStatus, Obstacle, Root
from migrator.errors import ImageError, RestartFailed
from migrator.image.records_files import Inotify, InotifyWatch
from migrator.linux import openat2, procfs, sys

_WATCH = re.compile(r"inotify wd:(\w+) ino:(\w+) sdev:(\w+) mask:(\w+) .*fhandle-type:(\w+) f_handle:(\w+)")
_ADD_WATCH, _INIT, _OPEN_BY_HANDLE_AT = 254, 294, 304
_SET_NEXT_WD = 0x40044900  # INOTIFY_IOC_SETNEXTWD
_KEPT = 0x84000FFF  # IN_ALL_EVENTS, IN_EXCL_UNLINK, IN_ONESHOT
_MINOR_BITS = 20  # of the kernel's dev_t
_HINT = "it must be at the same path on this host; fs.inotify.max_user_watches bounds how many there may be"
_EXCL_UNLINK, _DELETE_SELF = 0x04000000, 1 << 10

Key = tuple[int, int, str]  # device, inode, handle
Paths = MutableMapping[Key, str]


class Watch(NamedTuple):
    wd: int
    mask: int
    device: int  # as stat(2) has it, of most file systems
    inode: int
    handle_type: int
    handle: bytes

    @property
    def key(self) -> Key:
        return self.device, self.inode, self.handle.hex()


def watches(lines: Sequence[str]) -> list[Watch]:
    """Those of an instance, by number; `lines` of its fdinfo. Raises Obstacle where the kernel does not tell all."""
    if lines and not _tells_masks():
        raise Obstacle("this kernel does not tell all of what an inotify instance watches for")
    out = []
    for line in lines:
        found = _WATCH.match(line)
        if found is None:
            raise Obstacle(
                "an inotify instance watches in a file system that gives no handles, which cannot be carried"
            )
        wd, inode, sdev, mask, kind = (int(found[n], 16) for n in range(1, 6))
        device = os.makedev(sdev >> _MINOR_BITS, sdev & (1 << _MINOR_BITS) - 1)
        out.append(Watch(wd, mask & _KEPT, device, inode, kind, bytes.fromhex(found[6])))
    return sorted(out)


def resolve(root: Root, found: Sequence[Watch], known: Paths) -> None:
    """Note in `known` where what is watched lies in the tree. Raises Obstacle naming what has no path there."""
    unknown = [watch for watch in found if not _is_there(root, watch, known)]
    if not unknown:
        return
    mounts = _Mounts(root, {watch.inode for watch in found})
    try:
        for watch in unknown:
            path = mounts.path(watch)
            if path is None:
                known.pop(watch.key, None)
                raise Obstacle(
                    f"an inotify instance watches inode {watch.inode} of device {os.major(watch.device)}:"
                    f"{os.minor(watch.device)}, which has no path in the tree"
                )
            known[watch.key] = path
    finally:
        mounts.close()


def _is_there(root: Root, watch: Watch, known: Paths) -> bool:
    path = known.get(watch.key)
    status = root.stat(path) if path is not None else None
    return status is not None and _is_of(status, watch)


def _is_of(status: FileStatus, watch: Watch) -> bool:
    return status.st_ino == watch.inode and status.st_dev == watch.device


class _Mounts:
    """Directories of a tree through which handles can be opened. `watched`: inodes that are not to be opened, as
    whoever watches would be told."""

    def __init__(self, root: Root, watched: set[int]) -> None:
        self._root = root
        self._watched = watched
        self._points: dict[int, list[str]] = {}  # by device
        for line in procfs.read_text(f"/proc/{root.pid}/mountinfo").splitlines():
            words = line.split()
            major, minor = words[2].split(":")
            point = words[4].encode().decode("unicode_escape")
            self._points.setdefault(os.makedev(int(major), int(minor)), []).append(point)
        self._fds: dict[str, int] = {}

    def path(self, watch: Watch) -> str | None:
        for point in self._points.get(watch.device, ()):
            if (path := self._through(point, watch)) is not None:
                return path
        return None

    def _through(self, point: str, watch: Watch) -> str | None:
        try:
            fd = _open_handle(self._open(point, watch.device), watch)
        except OSError:
            return None
        try:
            link = os.readlink(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
        path = self._root.inside(link)
        status = self._root.stat(path) if path is not None else None
        return path if status is not None and _is_of(status, watch) else None

    def _open(self, point: str, device: int) -> int:
        fd = self._fds.get(point, -1)
        if fd < 0:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            for name in (".", *_NAMES):
                place = os.path.join(point.lstrip("/") or ".", name)
                try:
                    status = os.stat(place, dir_fd=self._root.fd, follow_symlinks=False)
                except OSError:
                    continue
                if status.st_dev == device and status.st_ino not in self._watched:
                    break
            else:
                place = point.lstrip("/") or "."
            fd = self._fds[point] = openat2.open_in_root(self._root.fd, place, flags, links=False)
        return fd

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


_NAMES = ("usr", "etc", "var", "opt", "srv", "lib", "share")  # a directory in a watched one that may be opened instead


def _open_handle(mount: int, watch: Watch) -> int:
    """An O_PATH descriptor: nobody is told of it."""
    handle = struct.pack("<Ii", len(watch.handle), watch.handle_type) + watch.handle
    buffer = ctypes.create_string_buffer(handle, len(handle))
    flags = os.O_PATH | os.O_CLOEXEC
    return sys.call(_OPEN_BY_HANDLE_AT, mount, ctypes.addressof(buffer), flags, name="open_by_handle_at")


def events(fd: int) -> int:
    """Bytes of events that wait to be read."""
    return int(struct.unpack("<i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0])


def save(objref: int, found: Iterable[Watch], known: Paths) -> Iterator[Inotify | InotifyWatch]:
    yield Inotify(objref, 0)
    for watch in found:
        yield InotifyWatch(objref, watch.wd, watch.mask, 0, known[watch.key])


# ---------------------------------------------------------------------- made again


def make() -> int:
    return sys.call(_INIT, os.O_CLOEXEC, name="inotify_init1", about="fs.inotify.max_user_instances bounds them")


def watch(fd: int, rec: InotifyWatch, root_fd: int) -> None:
    """Begin to watch, under the same number. Raises RestartFailed."""
    if rec.mask & ~_KEPT or rec.wd < 1:
        raise ImageError(f"inotify watch {rec.wd}: unknown mask {rec.mask:#x}, or an impossible number")
    try:
        place = openat2.open_in_root(root_fd, rec.path, os.O_PATH | os.O_NOFOLLOW)
        try:
            fcntl.ioctl(fd, _SET_NEXT_WD, rec.wd)
            path = ctypes.create_string_buffer(b"/proc/self/fd/%d" % place)
            made = sys.call(_ADD_WATCH, fd, ctypes.addressof(path), rec.mask, name="inotify_add_watch")
        finally:
            os.close(place)
    except OSError as error:
        raise RestartFailed(
            f"{rec.path} cannot be watched (inotify): {openat2.reason(error)}",
            hint=openat2.LINK_HINT if isinstance(error, openat2.UntrustedLink) else _HINT,
        ) from error
    if made != rec.wd:
        raise ImageError(f"inotify watch {rec.wd} of {rec.path} came out as {made}")


def forget_events(fd: int) -> None:
    """What making the copy has done to what it watches."""
    while waiting := events(fd):
        os.read(fd, waiting)


@functools.cache
def _tells_masks() -> bool:
    """Whether fdinfo has all flags of a mask; asked of an instance of ours."""
    fd = make()
    try:
        path = ctypes.create_string_buffer(b"/proc/self/root")
        sys.call(_ADD_WATCH, fd, ctypes.addressof(path), _EXCL_UNLINK | _DELETE_SELF, name="inotify_add_watch")
        return "mask:4000400 " in procfs.read_text(f"/proc/self/fdinfo/{fd}")
    finally:
        os.close(fd)
