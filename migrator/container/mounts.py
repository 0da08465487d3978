"""The file systems that a container sees, set up from outside.

Everything here runs in a child process that has entered the container's mount and pid namespaces
(`migrator.linux.namespaces.run_in`): the container's own processes take no part, so the same code serves
a fresh container and one that is being restored around a process 1 that cannot run yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from migrator.container.spec import ContainerSpec, Tmpfs
from migrator.linux import sys

if TYPE_CHECKING:
    from migrator.container.state import Container

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
_NR_STATX, _AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _AT_NO_AUTOMOUNT = 332, -100, 0x100, 0x800
_MNT_ID_UNIQUE, _MNT_ID_AT = 0x4000, 0x90  # of struct statx (linux/stat.h)
_RESTRICTIONS = frozenset({"ro", "nosuid", "nodev", "noexec"})

SHM = Tmpfs("/dev/shm", "mode=1777")

_DEVICES = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
}
_LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx"}


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """mount(2)."""
    texts = os.fsencode(source), os.fsencode(target), kind.encode()
    sys.libc("mount", *texts, flags, options.encode(), about=f"{kind or source} at {target}")


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    sys.libc("umount2", os.fsencode(target), flags, about=target)


def pivot_root(root: str) -> None:
    """Make `root` the root of the mount namespace; every process whose root or working directory was the
    old one moves along (pivot_root(2))."""
    os.chdir(root)
    # Putting the old root under the new one at the same place needs no directory for it: it comes to lie
    # on top of the new root, and is taken away from there.
    sys.libc("pivot_root", b".", b".", about=root)
    umount(".", MNT_DETACH)
    os.chdir("/")


def set_up(spec: ContainerSpec) -> tuple[tuple[str, str], ...]:
    """Build the container's view; (path, device) of what it has of the host. Runs inside its mount and pid namespaces.
    Raises OSError."""
    # Before anything else: until then a mount made here would show up on the host.
    mount("", "/", flags=MS_REC | MS_PRIVATE)
    inherited = below(spec.root)  # only now: until then what the host mounted came along
    if spec.root:
        mount(spec.root, spec.root, flags=MS_BIND | MS_REC)
        pivot_root(spec.root)
        _small_dev()
    os.makedirs("/proc", exist_ok=True)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for fs in (SHM, *spec.tmpfs):
        if fs is not SHM or not any(m.path == SHM.path for m in spec.tmpfs):
            os.makedirs(fs.path, exist_ok=True)
            mount("tmpfs", fs.path, "tmpfs", MS_NOSUID | MS_NODEV, fs.options)
    _touch_log(spec.effective_log)
    return inherited


def _small_dev() -> None:
    """/dev of a container with a root of its own."""
    os.makedirs("/dev", exist_ok=True)
    mount("tmpfs", "/dev", "tmpfs", MS_NOSUID, "mode=755,size=64k")
    before = os.umask(0)
    try:
        for name, (major, minor) in _DEVICES.items():
            os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
    finally:
        os.umask(before)
    for name, target in _LINKS.items():
        os.symlink(target, f"/dev/{name}")
    os.mkdir("/dev/pts")
    mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    os.mkdir("/dev/shm")


def _touch_log(path: str) -> None:
    """The log exists on every host that the container comes to, so that it can be opened again there."""
    with contextlib.suppress(FileExistsError):
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640))


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo, as far as it matters here."""

    path: str
    kind: str
    options: str  # of the file system
    device: str
    flags: frozenset[str] = frozenset()  # of this mount of it


def mounts(pid: int | str = "self") -> list[Mount]:
    """The mounts that a process sees, in the order of mounting (proc(5), /proc/PID/mountinfo).

    Raises FileNotFoundError or ProcessLookupError for one that has ended, or is about to."""
    try:
        file = open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    except OSError as error:
        if error.errno != errno.EINVAL:  # it has given up its namespaces already
            raise
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), error.filename) from None
    with file:
        found = []
        for line in file:
            head, _, tail = line.partition(" - ")
            words, rest = head.split(), tail.split()
            path = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), words[4])
            found.append(Mount(path, rest[0], rest[2], words[2], frozenset(words[5].split(","))))
        return found


def mount_number(path: str) -> int:
    """The number of the mount that a path leads to, which is larger than those of all mounts made before (statx(2),
    STATX_MNT_ID_UNIQUE); 0 where the kernel does not tell, or if there is no such path."""
    answer = ctypes.create_string_buffer(256)  # struct statx
    name = ctypes.create_string_buffer(os.fsencode(path))
    flags = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT
    try:
        sys.call(
            _NR_STATX, _AT_FDCWD, ctypes.addressof(name), flags, _MNT_ID_UNIQUE, ctypes.addressof(answer),
            name="statx", about=path,
        )  # fmt: skip
    except OSError:
        return 0
    (mask,) = struct.unpack_from("<I", answer)
    return int(struct.unpack_from("<Q", answer, _MNT_ID_AT)[0]) if mask & _MNT_ID_UNIQUE else 0


def below(root: str, pid: int | str = "self") -> tuple[tuple[str, str], ...]:
    """(path, device) of the mounts that a process sees below the directory `root` ("" for all), by their path there."""
    return tuple((m.path, m.device) for m in _below(root, pid))


def _below(root: str, pid: int | str = "self") -> Iterator[Mount]:
    prefix = root.rstrip("/")
    for m in mounts(pid):
        if m.path == prefix or m.path.startswith(prefix + "/"):
            yield replace(m, path=m.path[len(prefix) :] or "/")


def own(container: Container) -> list[Mount]:
    """The mounts that are a container's own: neither had of the host that set it up, nor made by set_up() in the same
    way everywhere. A tmpfs is its own as well, in the order of mounting; but the root is of the host, whatever its file
    system, and mountinfo of the host does not show it where it is a directory further down in one."""
    root = container.spec.root
    host = set(container.inherited if container.inherited is not None else below(root))
    found = []
    for m in mounts(container.init_pid):
        if m.path == "/" or (m.path, m.device) in host:
            continue
        made = m.path == "/proc" or (root and m.path in ("/dev", "/dev/pts"))
        if m.kind == "tmpfs" or not made:
            found.append(m)
    return found


def narrowed(container: Container) -> Iterator[str]:
    """What a container has done to mounts that it had of the host, which the host still has: it was unmounted, or is
    under a restriction. Where it goes it would have them as that host has them.

    What the host has mounted anew since, as for a user who logs in again, the container never had: of the old one it
    has nothing as soon as the directory was removed. Linux before 6.8 does not tell that."""
    had = set(container.inherited or ())
    since = mount_number(f"/proc/{container.init_pid}/root/proc")
    host = {(m.path, m.device): m.flags for m in _below(container.spec.root)}
    now = {(m.path, m.device): m.flags for m in mounts(container.init_pid)}
    for key in sorted(had & host.keys()):
        if key not in now:
            done = f"that {key[0]!r} was unmounted"
        elif less := sorted((now[key] - host[key]) & _RESTRICTIONS):
            done = f"that {key[0]!r} was mounted {', '.join(less)}"
        else:
            continue
        if not since or mount_number(container.spec.root.rstrip("/") + key[0]) <= since:
            yield done


def own_tmpfs(container: Container) -> list[Tmpfs]:
    """The tmpfs mounts of a container's own: they are built again, and their contents carried, where it goes. /dev/shm
    is among them, and /dev of one with a root of its own."""
    found = {}
    for m in own(container):
        if m.kind == "tmpfs":
            kept = [o for o in m.options.split(",") if o.split("=")[0] in ("size", "mode", "nr_inodes", "uid", "gid")]
            found[m.path] = Tmpfs(m.path, ",".join(kept) or "mode=1777")
    return list(found.values())
