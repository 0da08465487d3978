"""Freezing with control groups (cgroups(7); kernel documentation: cgroup-v2.rst, freezer-subsystem.rst).

A cgroup holds processes still without anyone attending to them: tasks stay frozen when the agent that
froze them dies, and when a tracer that had stopped them detaches. The freezer of version 2 is preferred,
the one of version 1 serves where the hierarchy of version 2 is not mounted or its freezer is missing.

    group = Cgroup.create("web")
    group.attach(pid)
    group.freeze()
    ...
    group.thaw()      # one write(2) on a descriptor that is already open

No controller is ever enabled, so limits that processes had in version 1 hierarchies stay as they were.
Our cgroups live below `migrator/` in the root of the hierarchy.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import select
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from migrator.errors import MigratorError, UsageError
from migrator.linux import procfs

PARENT = "migrator"

_FREEZER = "freezer"


def unique_name(what: str, pid: int) -> str:
    """A name for a cgroup that nobody else has: the pid alone is given out in each pid namespace anew."""
    return f"{what}-{pid}-{secrets.token_hex(4)}"


class CgroupError(MigratorError):
    """A cgroup did not reach the state asked for. The workload is in the state that the message tells."""


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """A mounted cgroup hierarchy that can freeze. `root` is the cgroup that is mounted at `mountpoint`."""

    version: int
    mountpoint: Path
    root: str = "/"

    @property
    def state_file(self) -> str:
        return "cgroup.freeze" if self.version == 2 else "freezer.state"

    @property
    def around_us(self) -> bool:
        """Whether we are in a cgroup namespace, and what is mounted reaches above its root."""
        return self.root.startswith("/..")

    @property
    def words(self) -> tuple[bytes, bytes]:
        """What to write into `state_file` to freeze and to thaw."""
        return (b"1", b"0") if self.version == 2 else (b"FROZEN", b"THAWED")


def hierarchies(mountinfo: str) -> list[Hierarchy]:
    """The freezing hierarchies in the text of /proc/PID/mountinfo (proc(5)), version 2 first."""
    found = []
    for line in mountinfo.splitlines():
        fields, dash, tail = line.partition(" - ")
        words, rest = fields.split(), tail.split()
        if not dash or len(words) < 5 or len(rest) < 3:
            continue
        where, root = Path(_unescape(words[4])), _unescape(words[3])
        if rest[0] == "cgroup2":
            found.append(Hierarchy(2, where, root))
        elif rest[0] == "cgroup" and _FREEZER in rest[2].split(","):
            found.append(Hierarchy(1, where, root))
    return sorted(found, key=lambda h: -h.version)


def _unescape(text: str) -> str:
    """Undo the octal escapes of mountinfo: space, tab, newline, backslash."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


@functools.cache
def hierarchy(version: int | None = None) -> Hierarchy:
    """The hierarchy to freeze with, found by trying: version 2 if it can freeze, else version 1.

    `version` asks for one of them. Raises UsageError where there is none.
    """
    for candidate in hierarchies(procfs.read_text("/proc/self/mountinfo")):
        if version in (None, candidate.version) and _can_freeze(candidate):
            return candidate
    kind = f"version {version}" if version else "version 2 or 1"
    raise UsageError(
        f"no cgroup hierarchy of {kind} that can freeze is mounted and writable",
        hint="mount one: mount -t cgroup2 none /sys/fs/cgroup",
    )


def _can_freeze(candidate: Hierarchy) -> bool:
    # The root cgroup has no freezer files, so only a cgroup below it tells.
    parent = candidate.mountpoint / PARENT
    try:
        parent.mkdir(exist_ok=True)
    except OSError:
        return False
    return os.access(parent / candidate.state_file, os.W_OK)


def path_in(cgroup_file: str, version: int) -> str:
    """The path of a process in a hierarchy, from the text of /proc/PID/cgroup; raises LookupError."""
    for line in cgroup_file.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if version == 2 and number == "0" and not controllers:
            return path
        if version == 1 and _FREEZER in controllers.split(","):
            return path
    raise LookupError(f"no cgroup of version {version}")


def directory_of(pid: int) -> str:
    """The directory of the cgroup that a process is in now, the root cgroup included; "" if out of sight."""
    chosen = hierarchy()
    if chosen.around_us:
        return _holding(pid, chosen)
    inside = path_in(procfs.read_text(f"/proc/{pid}/cgroup"), chosen.version)
    below = os.path.relpath(inside, chosen.root)
    return "" if below.startswith("..") else str(chosen.mountpoint / below)


def remove_empty(directories: Iterable[str]) -> None:
    """Remove those of our cgroups, below `migrator/`, that nobody is in any more."""
    for folder in directories:
        if os.path.basename(os.path.dirname(folder)) == PARENT:
            with contextlib.suppress(OSError):
                os.rmdir(folder)


def _holding(pid: int, chosen: Hierarchy) -> str:
    """The same from inside a cgroup namespace, whose root has no name there: the one that lists the process."""
    for folder, _, _ in os.walk(chosen.mountpoint):
        with contextlib.suppress(OSError):
            if str(pid) in Path(folder, "cgroup.procs").read_text().split():
                return folder
    return ""


def _parent(chosen: Hierarchy) -> Path:
    """Where our cgroups are made. In a container that is below its own cgroup: what freezes or ends the
    container means them too, and the same name in two containers is not the same cgroup."""
    own = _holding(1, chosen) if chosen.around_us else ""
    return Path(own) if own else chosen.mountpoint / PARENT


class Cgroup:
    """One cgroup with a freezer. Closing it forgets it; `remove()` removes it."""

    def __init__(self, path: Path, hierarchy: Hierarchy) -> None:
        """Open an existing cgroup; raises FileNotFoundError if there is none."""
        self.path = path
        self.hierarchy = hierarchy
        self._fd = os.open(path / hierarchy.state_file, os.O_RDWR | os.O_CLOEXEC)

    @classmethod
    def create(cls, name: str, *, version: int | None = None, under: Path | None = None) -> Cgroup:
        """The cgroup `migrator/NAME`, made if it does not exist.

        `under` puts it below another cgroup instead, so that a process moved into it keeps the limits
        that it has there.
        """
        if not name or "/" in name or name.startswith("."):
            raise UsageError(f"bad cgroup name {name!r}", hint="a name has no slash and does not begin with a dot")
        chosen = hierarchy(version)
        path = (under or _parent(chosen)) / name
        path.mkdir(parents=True, exist_ok=True)
        return cls(path, chosen)

    @classmethod
    def open(cls, name: str, *, version: int | None = None) -> Cgroup:
        """The existing cgroup `migrator/NAME`; raises FileNotFoundError if there is none."""
        chosen = hierarchy(version)
        return cls(_parent(chosen) / name, chosen)

    @classmethod
    def at(cls, path: str | Path) -> Cgroup:
        """The existing cgroup at a path, of the version that its files show."""
        path = Path(path)
        version = 2 if (path / "cgroup.freeze").exists() else 1
        return cls(path, hierarchy(version))

    @classmethod
    def of(cls, pid: int, *, version: int | None = None) -> Cgroup:
        """The cgroup that a process is in now; UsageError for the root cgroup, which has no freezer."""
        chosen = hierarchy(version)
        if chosen.around_us and (folder := _holding(pid, chosen)):
            return cls(Path(folder), chosen)
        inside = path_in(procfs.read_text(f"/proc/{pid}/cgroup"), chosen.version)
        below = os.path.relpath(inside, chosen.root)
        if below == "." or below.startswith(".."):
            raise UsageError(f"pid {pid} is in cgroup {inside}, which cannot be frozen from here")
        return cls(chosen.mountpoint / below, chosen)

    def __enter__(self) -> Cgroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Cgroup({str(self.path)!r}, version {self.hierarchy.version})"

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def name(self) -> str:
        return self.path.name

    def attach(self, pid: int) -> None:
        """Move a process, with all its threads, into this cgroup. A frozen cgroup freezes it."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def move_back(self, origins: Mapping[int, str]) -> None:
        """Move every process to the cgroup whose directory `origins` names, one born here to the first of them, and
        remove this one. A process whose cgroup is gone stays, and runs on here."""
        first = next((origin for origin in origins.values() if origin), "")
        stay: set[int] = set()
        while left := [pid for pid in self.pids() if pid not in stay]:  # more are born while we move some
            for pid in left:
                try:
                    Path(origins.get(pid) or first, "cgroup.procs").write_text(str(pid))
                except OSError:
                    stay.add(pid)
        if not stay & set(self.pids()):
            self.remove()

    def pids(self) -> list[int]:
        """The processes in this cgroup (not below it), as this pid namespace numbers them."""
        return sorted({int(word) for word in (self.path / "cgroup.procs").read_text().split()} - {0})

    @property
    def has_nested(self) -> bool:
        """Whether there are cgroups below it, or may be: version 1 does not tell."""
        try:
            return "nr_descendants 0\n" not in (self.path / "cgroup.stat").read_text()
        except FileNotFoundError:
            return True

    @property
    def frozen(self) -> bool:
        """Whether every task in the cgroup has come to rest. False while freezing is under way."""
        if self.hierarchy.version == 2:
            return "frozen 1" in (self.path / "cgroup.events").read_text()
        return os.pread(self._fd, 32, 0).strip() == b"FROZEN"

    def freeze(self, *, wait: bool = True, timeout: float = 5.0) -> None:
        """Freeze everything inside; with `wait`, return once it has come to rest.

        Raises CgroupError after `timeout` seconds; the cgroup is then thawed again.
        """
        os.pwrite(self._fd, self.hierarchy.words[0], 0)
        if wait and not self._wait_frozen(timeout):
            self.thaw()
            raise CgroupError(
                f"cgroup {self.path} did not freeze within {timeout:g} s",
                hint="a task may be in an uninterruptible sleep (state D), as on a dead network file system",
            )

    def thaw(self) -> None:
        """Let everything inside run: one system call, returns at once."""
        os.pwrite(self._fd, self.hierarchy.words[1], 0)

    @property
    def release(self) -> tuple[int, bytes]:
        """(descriptor, text): written to it, it thaws; for whoever has to do it in our stead."""
        return self._fd, self.hierarchy.words[1]

    def _wait_frozen(self, timeout: float) -> bool:
        end = time.monotonic() + timeout
        if self.hierarchy.version == 1:
            # Version 1 announces nothing: reading the state is what brings it up to date.
            pause = 0.00005
            while not self.frozen:
                if time.monotonic() > end:
                    return False
                time.sleep(pause)
                pause = min(pause * 2, 0.005)
            return True
        with open(self.path / "cgroup.events", "rb", buffering=0) as events:
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            while b"frozen 1" not in os.pread(events.fileno(), 256, 0):
                left = end - time.monotonic()
                if left <= 0:
                    return False
                poll.poll(left * 1000)
        return True

    def kill(self, *, timeout: float = 5.0) -> None:
        """Kill every process inside, frozen or not, and wait until none is left or only zombies are.

        No instruction of a frozen task is run on the way. Raises CgroupError after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        whole = self.path / "cgroup.kill"
        while alive := self._living():
            if whole.exists():
                whole.write_text("1")
            else:
                for pid in alive:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                # Tasks frozen by version 1 do not even die. With SIGKILL pending, thawing runs none of
                # their code; a child forked just before its parent was hit is caught by the next turn.
                self.thaw()
            if time.monotonic() > end:
                raise CgroupError(
                    f"processes {alive} in cgroup {self.path} do not die",
                    hint="a task in an uninterruptible sleep (state D) dies when its I/O returns",
                )
            time.sleep(0.001)

    def _living(self) -> list[int]:
        alive = []
        for pid in self.pids():
            try:
                state = procfs.read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if state not in "ZX":
                alive.append(pid)
        return alive

    def remove(self, *, timeout: float = 2.0) -> None:
        """Remove the cgroup, and cgroups that processes made below it. None of them may hold a process.

        Waits for what is dying. Raises CgroupError after `timeout` seconds.
        """
        self.close()
        end = time.monotonic() + timeout
        while True:
            try:
                for folder, _, _ in os.walk(self.path, topdown=False):
                    os.rmdir(folder)
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise CgroupError(
                        f"cgroup {self.path} cannot be removed: {error.strerror}",
                        hint="it still holds processes",
                    ) from error
            time.sleep(0.002)
