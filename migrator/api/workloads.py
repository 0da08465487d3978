"""What a user names: a pid or a container."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from migrator import container
from migrator.container.state import of_pid
from migrator.engine.base import SourceOptions
from migrator.errors import Refused, UsageError
from migrator.linux import procfs
from migrator.linux.cgroup import Cgroup
from migrator.linux.openat2 import open_in_root
from migrator.protocol.trees import SyncTree

_NO_FILES = frozenset(
    "proc sysfs devtmpfs devpts cgroup cgroup2 mqueue debugfs tracefs securityfs pstore bpf configfs".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Workload:
    """A process tree by its root's pid, and the container that it is, if it is one."""

    pid: int
    container: container.Container | None

    @property
    def name(self) -> str:
        return self.container.name if self.container is not None else str(self.pid)

    def source_options(self) -> SourceOptions:
        """What an engine must know of its container. Raises Refused for what would be lost silently."""
        found = self.container
        if found is None:
            return SourceOptions()
        reasons = container.obstacles(found)
        if reasons:
            raise Refused(reasons, hint="the container runs on")
        return SourceOptions(
            container=found.name,
            container_spec=container.describe(found).to_json(),
            container_cgroup=found.cgroup,
            tmpfs=container.tmpfs_paths(found),
            message_ledger=str(found.message_ledger),
        )


def trees(workload: Workload, copy_files: bool, paths: list[str]) -> tuple[SyncTree, ...]:
    """What `--copy-files` and `--copy-path` mean for a workload: all below the root of a container that has one
    of its own, and these paths, as the workload sees them. Raises UsageError."""
    chosen = [SyncTree("/")] if copy_files and own_root(workload) else []
    for path in paths:
        tree = _tree(workload, path)
        if tree not in chosen:
            chosen.append(tree)
    mounts = {mount.path for mount in container.mounts.mounts(workload.pid)}
    return tuple(tree for tree in chosen if not any(_within(tree, other, mounts) for other in chosen))


def own_root(workload: Workload) -> str:
    """The directory that is the root of a container, "" for the host's own root."""
    root = workload.container.spec.root if workload.container is not None else ""
    return "" if root == "/" else root


def _within(tree: SyncTree, other: SyncTree, mounts: set[str]) -> bool:
    """Whether `tree` is carried with `other` anyway: nothing is mounted on the way from there."""
    if tree == other or other.only:
        return False
    path = tree.path if not tree.only else os.path.join(tree.path, os.fsdecode(tree.only[0]))
    if os.path.commonpath([path, other.path]) != other.path:
        return False
    return not any(
        mount != other.path and os.path.commonpath([path, mount]) == mount and len(mount) > len(other.path)
        for mount in mounts
    )


def _tree(workload: Workload, path: str) -> SyncTree:
    what = f"--copy-path {path}"
    if not path.startswith("/") or ".." in path.split("/"):
        raise UsageError(f"{what}: not an absolute path", hint="name it as the workload sees it, such as /srv/data")
    path = os.path.normpath("/" + path.lstrip("/"))
    if path == "/" and not own_root(workload):
        raise UsageError(f"{what}: that is the whole host", hint="name what belongs to the workload")
    root = os.open(f"/proc/{workload.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = open_in_root(root, path, os.O_PATH | os.O_NOFOLLOW, links=False)
    except OSError as error:
        raise _no_tree(workload, what, path, error) from error
    finally:
        os.close(root)
    mode = os.fstat(fd).st_mode
    os.close(fd)
    _check_mount(workload, what, path)
    if stat.S_ISDIR(mode):
        return SyncTree(path)
    if stat.S_ISREG(mode):
        return SyncTree(os.path.dirname(path), [os.fsencode(os.path.basename(path))])
    raise UsageError(f"{what} is neither a file nor a directory")


def _no_tree(workload: Workload, what: str, path: str, error: OSError) -> UsageError:
    root = own_root(workload)
    if error.errno == errno.ELOOP:
        return UsageError(f"{what} leads over a symbolic link", hint="name what it leads to")
    if not root or error.errno != errno.ENOENT:
        return UsageError(f"{what}: {os.strerror(error.errno or 0)}")
    if os.path.commonpath([path, root]) == root:
        inside = path[len(root) :] or "/"
        return UsageError(
            f"{what}: {workload.name} has its own root, {root}", hint=f"as the workload sees it, that is {inside}"
        )
    if os.path.lexists(path):
        return UsageError(f"{what} is outside of the root of {workload.name}, {root}")
    return UsageError(f"{what}: there is no such file in the root of {workload.name}, {root}")


def _check_mount(workload: Workload, what: str, path: str) -> None:
    """What is no file system of files, or is the container's own, cannot be copied before the container is there."""
    own = {fs.path for fs in container.mounts.own_tmpfs(workload.container)} if workload.container else set()
    found = [m for m in container.mounts.mounts(workload.pid) if os.path.commonpath([path, m.path]) == m.path]
    last = max(found, key=lambda mount: len(mount.path), default=None)
    if last is None:
        return
    if last.kind in _NO_FILES or (last.kind == "tmpfs" and last.path in own):
        raise UsageError(f"{what} lies on a {last.kind}, which is made anew on every host")


def find_workload(target: str) -> Workload:
    """The workload that `target` names: a container's name first, then a pid. Raises UsageError."""
    found = container.find(target)
    if found is not None:
        if not found.alive:
            raise UsageError(f"container {target!r} has ended", hint="`migrator ps` lists those that run")
        return _movable(Workload(found.init_pid, found))
    if not target.isdigit():
        raise UsageError(
            f"there is no container {target!r} on this host", hint="`migrator ps` lists them; a pid works too"
        )
    pid = int(target)
    if pid <= 0 or not os.path.exists(f"/proc/{pid}"):
        raise UsageError(f"there is no process {pid} on this host")
    inside = of_pid(pid)
    if inside is not None and inside.init_pid == pid:
        return _movable(Workload(pid, inside))
    if inside is not None:
        raise UsageError(
            f"pid {pid} lives in container {inside.name!r}", hint=f"move the whole container: {inside.name}"
        )
    if not _has_memory(pid):
        raise UsageError(
            f"pid {pid} ({_name(pid)}) has no memory of its own: a thread of the kernel, or a process that has ended"
        )
    return _movable(Workload(pid, None))


def _movable(workload: Workload) -> Workload:
    """A frozen task cannot be stopped and asked, and why it is frozen is not ours to overrule."""
    try:
        with Cgroup.of(workload.pid) as group:
            frozen = group.frozen
    except (UsageError, OSError, LookupError):
        return workload
    if frozen:
        raise UsageError(
            f"{workload.name} is frozen, in {group.path}",
            hint=f"`migrator settle` if a migration was not decided, else `migrator thaw {workload.name}`",
        )
    return workload


def _has_memory(pid: int) -> bool:
    """Neither a thread of the kernel nor a zombie, which both have no size."""
    try:
        return "VmSize" in procfs.status(pid)
    except OSError:
        return False


def _name(pid: int) -> str:
    try:
        return procfs.status(pid).get("Name", "?")
    except OSError:
        return "?"
