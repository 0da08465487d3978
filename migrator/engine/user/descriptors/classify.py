"""What an open descriptor is, and whether it can be carried.

Only what /proc shows is looked at, so the same judgement serves the survey of a running tree and the
final collection of a stopped one.
"""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from migrator.engine.user.descriptors.fdinfo import FdInfo
from migrator.image.records_files import FileKind
from migrator.linux import descriptors, ipc, mqueue, namespaces
from migrator.linux.stat import Status

DELETED = " (deleted)"
_INSIDE = ("/secretmem", "/SYSV", "/anon_hugepage")  # files of the kernel's own
_MEMFD = "/memfd:"
_SYSCTLS = "/proc/sys/"
_PRESSURE = "/proc/pressure/"
_OF_CGROUPS = {0x63677270: "cgroup2", 0x27E0EB: "cgroup"}  # numbers: linux/magic.h
_STATEFUL = {
    0x64626720: "debugfs", 0x74726163: "tracefs", 0xF97CFF8C: "selinuxfs", 0x62656570: "configfs",
    0x6E667364: "nfsd", 0x67596969: "rpc_pipefs", 0x0187: "autofs",
}  # fmt: skip

_ANON = {
    "[eventfd]": FileKind.EVENTFD,
    "[eventpoll]": FileKind.EPOLL,
    "[timerfd]": FileKind.TIMERFD,
    "[signalfd]": FileKind.SIGNALFD,
    "[pidfd]": FileKind.PIDFD,
    "inotify": FileKind.INOTIFY,
}
_ANON_REFUSED = {
    "[io_uring]": "an io_uring instance",
    "[userfaultfd]": "a userfaultfd",
    "[perf_event]": "a performance counter (perf_event_open)",
    "[fanotify]": "a fanotify group",
    "bpf-map": "a BPF map",
    "bpf-prog": "a BPF program",
    "bpf_link": "a BPF link",
    "btf": "BPF type information",
    "[landlock-ruleset]": "a Landlock rule set",
    "seccomp notify": "a seccomp listener",
    "[fscontext]": "a mount being set up (fsopen)",
    "kvm-vm": "a KVM machine",
    "kvm-vcpu": "a KVM processor",
}
# /dev/null, zero, full, random, urandom: nothing is kept in them
_DEVICES = {os.makedev(1, minor) for minor in (3, 5, 7, 8, 9)}
_HUGE = 65536  # st_blksize is the page size on tmpfs, and the huge page's on hugetlbfs
_PTMX = os.makedev(5, 2)
_TTY_MAJORS = {4, 5, 136, 137, 138, 139, 140, 141, 142, 143, 204}


FileStatus = os.stat_result | Status


class Obstacle(Exception):
    """Why a descriptor cannot be carried: "an inotify instance cannot be carried; close it first"."""


class Root:
    """The root directory of a tree, by the root of one of its processes. Close it, or leave the block."""

    def __init__(self, pid: int) -> None:
        self.fd = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_CLOEXEC)
        prefix = os.readlink(f"/proc/{pid}/root")
        self._prefix = "" if prefix == "/" else prefix
        self.known: dict[str, Status | None] = {}  # what stat() is to answer, looked up ahead
        self.pid = pid
        self._queues = -1
        self._filesystems: dict[int, int] = {}  # by device
        self._namespaces: tuple[str, ...] | None = None

    def inside(self, path: str) -> str | None:
        """A path as we see it, as the tree sees it; None if it is outside of the tree's root."""
        if not self._prefix:
            return path
        if path == self._prefix:
            return "/"
        if path.startswith(self._prefix + "/"):
            return path[len(self._prefix) :]
        return None

    def stat(self, path: str) -> Status | None:
        """lstat of a path of the tree, None if there is nothing."""
        if path in self.known:
            return self.known[path]
        if self.own_sysctl(path):
            return self.stat_inside([path])[0]
        return self._lstat(path)

    def own_sysctl(self, path: str) -> bool:
        """Whether it leads to what the tree sees there and we do not: /proc/sys has other files in other namespaces."""
        return path.startswith(_SYSCTLS) and self._own != ()

    def stat_inside(self, paths: Sequence[str]) -> list[Status | None]:
        """As stat(), by a process that is in the namespaces of the tree."""
        return namespaces.run_in(self.pid, self._own, lambda: [self._lstat(path) for path in paths])

    @property
    def _own(self) -> tuple[str, ...]:
        """The kinds of namespaces with sysctls that the tree has of its own."""
        if self._namespaces is None:
            self._namespaces = namespaces.of_its_own(self.pid, namespaces.WITH_SYSCTLS)
        return self._namespaces

    def _lstat(self, path: str) -> Status | None:
        try:
            return Status.of(os.stat(path.lstrip("/") or ".", dir_fd=self.fd, follow_symlinks=False))
        except OSError:
            return None

    def filesystem(self, path: str, device: int) -> int:
        """The magic number of the file system of a file (statfs(2)), 0 where that cannot be found out."""
        if device not in self._filesystems:
            inside = self.inside(path)
            try:
                fd = os.open((inside or "").lstrip("/") or ".", os.O_PATH | os.O_CLOEXEC, dir_fd=self.fd)
                try:
                    self._filesystems[device] = descriptors.filesystem_type(fd) if os.fstat(fd).st_dev == device else 0
                finally:
                    os.close(fd)
            except OSError:
                return 0
        return self._filesystems[device]

    @property
    def queues(self) -> int:
        """The device of the POSIX message queues of the tree's own IPC namespace; 0 if it has none of its own."""
        if self._queues < 0:
            own = os.readlink(f"/proc/{self.pid}/ns/ipc") != os.readlink("/proc/self/ns/ipc")
            self._queues = ipc.with_ipc_namespace(self.pid, mqueue.device) if own else 0
        return self._queues

    def close(self) -> None:
        os.close(self.fd)


@dataclass(slots=True, frozen=True)
class Classification:
    kind: FileKind
    path: str = ""  # inside the tree's root


def classify(link: str, status: FileStatus, info: FdInfo, root: Root) -> Classification:
    """What a descriptor is. `link` is where /proc/PID/fd/N points. Raises Obstacle."""
    if link.startswith("anon_inode:"):
        return _anon(link[len("anon_inode:") :], info)
    if info.flags & os.O_PATH:
        return Classification(FileKind.PATH, _path(link, status, root))
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFSOCK:
        return Classification(FileKind.SOCKET)
    if kind == stat.S_IFIFO:
        if link.startswith("pipe:[") or status.st_nlink == 0:
            return Classification(FileKind.PIPE)
        return Classification(FileKind.FIFO, _path(link, status, root))
    if kind == stat.S_IFCHR:
        return _device(link, status, root)
    if kind == stat.S_IFDIR:
        return Classification(FileKind.DIRECTORY, _path(link, status, root))
    if kind != stat.S_IFREG:
        raise Obstacle(f"{link} is a block device or unknown, which cannot be carried")
    return _regular(link, status, info, root)


def _anon(name: str, info: FdInfo) -> Classification:
    kind = _ANON.get(name)
    if kind is None:
        what = _ANON_REFUSED.get(name, f"a kernel object ({name})")
        raise Obstacle(f"{what} cannot be carried; the program must close it first")
    if kind == FileKind.PIDFD and int(info.fields.get("Pid", "0")) == 0:
        raise Obstacle("a pidfd of a process that this host does not see cannot be carried")
    if kind == FileKind.EVENTFD and "eventfd-semaphore" not in info.fields:
        raise Obstacle("this kernel does not tell whether an eventfd is a semaphore (Linux 6.5 does)")
    return Classification(kind)


def _regular(link: str, status: FileStatus, info: FdInfo, root: Root) -> Classification:
    if not link.startswith("/"):
        raise Obstacle(f"{link} is a namespace or another kernel object, which cannot be carried")
    check_locks(link, info)
    _check_filesystem(link, status, info, root)
    if (name := _queue(link, status, root)) is not None:
        return Classification(FileKind.MQUEUE, name)
    if status.st_nlink == 0 and link.endswith(DELETED):
        if link.startswith(_MEMFD):
            if status.st_blksize > _HUGE:
                raise Obstacle(f"{link} is memory of huge pages, which cannot be carried")
            return Classification(FileKind.MEMFD, link[len(_MEMFD) : -len(DELETED)])
        if link.startswith(_INSIDE):
            raise Obstacle(f"{link} is memory that cannot be carried")
        return Classification(FileKind.DELETED, root.inside(link[: -len(DELETED)]) or "/")
    return Classification(FileKind.REGULAR, _path(link, status, root))


def _check_filesystem(link: str, status: FileStatus, info: FdInfo, root: Root) -> None:
    """Raises Obstacle where the kernel keeps something with the opening itself, of which nothing can be seen."""
    if os.major(status.st_dev):
        return
    kind = root.filesystem(link, status.st_dev)
    written = info.flags & os.O_ACCMODE != os.O_RDONLY
    if written and (link.startswith(_PRESSURE) or (kind in _OF_CGROUPS and link.endswith(".pressure"))):
        raise Obstacle(f"{link} is open for writing, and may have a trigger of pressure that nobody can read; close it")
    if written and kind in _OF_CGROUPS:
        raise Obstacle(
            f"{link} is open for writing, and what may be written to it depends on who has opened it; close it"
        )
    if kind in _STATEFUL:
        raise Obstacle(f"{link} is a file of {_STATEFUL[kind]}, which keeps a state for each opening; close it")


def _queue(link: str, status: FileStatus, root: Root) -> str | None:
    """The name of a POSIX message queue, where this is one. It looks like a file in the root directory."""
    if link.find("/", 1) >= 0:
        return None
    there = root.stat(link)
    if there is not None and (there.st_ino, there.st_dev) == (status.st_ino, status.st_dev):
        return None
    if status.st_dev == root.queues:
        return link[1:].removesuffix(DELETED) if status.st_nlink == 0 else link[1:]
    if status.st_dev == _queues_of_host():
        raise Obstacle(f"{link} is a POSIX message queue of the host, which only a container has of its own")
    return None


@functools.cache
def _queues_of_host() -> int:
    return mqueue.device()


def check_locks(link: str, info: FdInfo) -> None:
    """Raises Obstacle for a lock on a file that cannot be carried."""
    for lock in info.locks:
        if lock.split()[1] not in ("FLOCK", "POSIX", "OFDLCK"):
            raise Obstacle(f"{link} has a lock that cannot be carried ({' '.join(lock.split()[1:4])})")


def _device(link: str, status: FileStatus, root: Root) -> Classification:
    if status.st_rdev in _DEVICES:
        return Classification(FileKind.DEVICE, _path(link, status, root))
    if status.st_rdev == _PTMX:
        raise Obstacle(
            f"{link} leads to a terminal that the program has made, as tmux, screen and sshd do, which cannot be"
            " carried; what runs in it has to end first"
        )
    if os.major(status.st_rdev) in _TTY_MAJORS:
        raise Obstacle(f"{link} is a terminal, which cannot be carried; start it with its input and output redirected")
    raise Obstacle(f"{link} is a device with a state of its own, which cannot be carried")


def _path(link: str, status: FileStatus, root: Root) -> str:
    """The path by which the same file can be opened again."""
    path = root.inside(link)
    if not link.startswith("/") or path is None:
        raise Obstacle(f"{link} lies outside of the root directory of the tree")
    there = root.stat(path)
    if there is None or (there.st_ino, there.st_dev) != (status.st_ino, status.st_dev):
        if link.endswith(DELETED) and stat.S_ISDIR(status.st_mode):
            raise Obstacle(f"{link} is a directory that was removed, which cannot be opened again")
        if link.startswith(_INSIDE):
            raise Obstacle(f"{link} is memory that cannot be carried")
        if link.endswith(DELETED):
            raise Obstacle(f"{link}: its name was removed, but it has others")
        raise Obstacle(f"{link} is not what its path leads to: on another mount, or replaced")
    return path
