"""The cgroup in which a tree is held: a container's own, or one that is made for the time.

adoption = Adoption(pid, options)
adoption.adopt()          # the tree is in it; its children are born in it
adoption.cgroup.freeze()
...
adoption.move_back()      # or, once the tree is killed, remove()
"""

from __future__ import annotations

import contextlib
import os

from migrator.engine.base import SourceOptions
from migrator.errors import CheckpointFailed
from migrator.linux import procfs
from migrator.linux.cgroup import Cgroup, directory_of, remove_empty, unique_name


class Adoption:
    """`cgroup` is None until adopt() has made it; a container has it from the beginning.

    own:        whether it was made for this
    came_from:  pid -> directory of the cgroup that it was moved from, the root first"""

    def __init__(self, pid: int, options: SourceOptions) -> None:
        self.pid = pid
        self.own = not options.container_cgroup
        self.cgroup = Cgroup.at(options.container_cgroup) if options.container_cgroup else None
        self.came_from: dict[int, str] = {}
        self._name = options.cgroup_name or unique_name("migrate", pid)

    @property
    def path(self) -> str:
        """Of the cgroup; before there is one, its name."""
        return str(self.cgroup.path) if self.cgroup is not None else self._name

    def origins(self, pids: list[int]) -> list[tuple[int, str]]:
        """(pid, directory of the cgroup) of the tasks that adopt() moves, or has moved; the root first."""
        if not self.own or self.cgroup is not None:
            return list(self.came_from.items())
        origins = []
        for pid in pids:
            with contextlib.suppress(OSError, LookupError):
                origins.append((pid, directory_of(pid)))
        return origins

    def adopt(self) -> Cgroup:
        """Put the tree into a cgroup of its own: new children are found in it, and it can be held frozen."""
        if self.cgroup is not None:
            return self.cgroup
        self.cgroup = Cgroup.create(self._name)
        while True:
            new = [p for p in procfs.descendants(self.pid) if p not in self.came_from]
            if not new:
                return self.cgroup
            for pid in new:
                try:
                    self.came_from[pid] = directory_of(pid)
                    self.cgroup.attach(pid)
                except (FileNotFoundError, ProcessLookupError, OSError) as error:
                    if os.path.exists(f"/proc/{pid}") and procfs.stat(pid)[3] != "Z":
                        raise CheckpointFailed(
                            f"pid {pid} cannot be moved to a cgroup of its own: {error}",
                            hint="the workload runs on; is cgroup2 or the freezer hierarchy mounted?",
                        ) from error
                    self.came_from.setdefault(pid, "")

    def pids(self) -> list[int]:
        """The tree below the root, and what else was born in the cgroup."""
        below = procfs.descendants(self.pid)
        if self.cgroup is not None:
            known = set(below)
            below += [p for p in self.cgroup.pids() if p not in known]
        return below

    def move_back(self) -> None:
        """The tasks go back to where they were, and what was made for them goes."""
        if self.own and self.cgroup is not None:
            self.cgroup.move_back(self.came_from)

    def remove(self) -> None:
        """The tasks are gone: so is the cgroup. A container's stays, with what stands around it."""
        if self.own and self.cgroup is not None:
            self.cgroup.remove()
            # what a restart of this tree made: nobody else knows that it is empty now
            remove_empty(set(self.came_from.values()))

    def close(self) -> None:
        """Forget a container's cgroup; one of our own is closed by its end."""
        if self.cgroup is not None and not self.own:
            self.cgroup.close()
