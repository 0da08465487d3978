"""What this host knows about its containers: one JSON file each, in `$MIGRATOR_STATE_DIR/containers`, for root alone.

The files say what was set up; whether it still lives is always asked of the kernel. A pid alone is no
identity, so the start time of process 1 is kept with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from migrator.container.spec import ContainerSpec
from migrator.errors import UsageError
from migrator.linux import procfs

DEFAULT_STATE_DIR = "/run/migrator"


def state_dir() -> Path:
    return Path(os.environ.get("MIGRATOR_STATE_DIR") or DEFAULT_STATE_DIR)


def private_directory(path: Path) -> Path:
    """Make it where there is none. Only root may look in: what is in there has the environment of programs."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)
    return path


def host_name() -> str:
    """The name of this host as listings show it: `$MIGRATOR_HOST`, or the node's own."""
    return os.environ.get("MIGRATOR_HOST") or os.uname().nodename


def cgroup_name(name: str) -> str:
    """The cgroup of a container. Two agents on one machine (with state directories of their own) may have a
    container of the same name while it moves from one to the other."""
    where = str(state_dir())
    if where == DEFAULT_STATE_DIR:
        return f"ct-{name}"
    return f"ct-{name}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, slots=True)
class Container:
    """One container on this host.

    init_pid:   its process 1, as this host numbers it
    start_time: of process 1, in clock ticks since boot
    cgroup:     path of its freezer cgroup
    ifindex:    of the host's end of its veth pair; 0 without a bridge
    created:    seconds since the epoch
    arriving:   it is being restored here and does not run yet
    inherited:  (path, device) of the mounts that it had of this host when it was set up; None where that is not known
    """

    spec: ContainerSpec
    init_pid: int
    start_time: int
    cgroup: str
    ifindex: int
    created: float
    arriving: bool = False
    inherited: tuple[tuple[str, str], ...] | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def alive(self) -> bool:
        """Whether process 1 exists and is no zombie."""
        return is_alive(self.init_pid, self.start_time)

    def save(self) -> None:
        """Write the file, whole or not at all."""
        path = _path(self.name)
        folder = private_directory(path.parent)
        value = asdict(self) | {"spec": self.spec.to_dict()}
        fd, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)  # of mode 0600
        try:
            with open(fd, "w") as file:
                json.dump(value, file, indent=1)
            os.replace(fresh, path)
        except BaseException:
            os.unlink(fresh)
            raise

    def settled(self) -> Container:
        """Note that the container has arrived and runs here."""
        here = replace(self, arriving=False)
        here.save()
        return here

    @property
    def message_ledger(self) -> Path:
        """The file for messages that are taken out of its queues (migrator.linux.message_ledger)."""
        return _path(self.name).with_suffix(".messages")

    @property
    def lock_file(self) -> Path:
        """See `migrator.container.attention`."""
        return _path(self.name).with_name(f".{self.name}.lock")

    def forget(self) -> None:
        _path(self.name).unlink(missing_ok=True)
        self.message_ledger.unlink(missing_ok=True)
        self.lock_file.unlink(missing_ok=True)


def get(name: str) -> Container:
    """Raises UsageError if this host has no container of that name."""
    try:
        text = _path(name).read_text()
    except (FileNotFoundError, ValueError):
        raise UsageError(f"no container {name!r} on this host", hint="`migrator ps` lists them") from None
    return _parse(text, name)


def find(name: str) -> Container | None:
    try:
        return get(name)
    except UsageError:
        return None


def of_pid(pid: int) -> Container | None:
    """The container whose pid namespace a process lives in, if it is one of ours."""
    try:
        mine = os.stat(f"/proc/{pid}/ns/pid").st_ino
    except FileNotFoundError:
        return None
    for container in list_containers():
        try:
            if container.alive and os.stat(f"/proc/{container.init_pid}/ns/pid").st_ino == mine:
                return container
        except FileNotFoundError:
            continue
    return None


def list_containers() -> list[Container]:
    """All containers of this host, also those that have exited, by name."""
    folder = state_dir() / "containers"
    found = []
    for path in sorted(folder.glob("[!.]*.json")):
        container = find(path.stem)
        if container is not None:
            found.append(container)
    return found


def is_alive(pid: int, start_time: int) -> bool:
    try:
        fields = procfs.stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields[3] not in "ZX" and int(fields[22]) == start_time


def now() -> float:
    return time.time()


def _path(name: str) -> Path:
    if not name or "/" in name or name.startswith("."):
        raise UsageError(f"bad container name {name!r}")
    return state_dir() / "containers" / f"{name}.json"


def _parse(text: str, name: str) -> Container:
    try:
        value: dict[str, Any] = json.loads(text)
        spec = ContainerSpec.from_dict(value.pop("spec"))
        inherited = value.pop("inherited", None)
        if inherited is not None:
            inherited = tuple((str(path), str(device)) for path, device in inherited)
        return Container(spec=spec, inherited=inherited, **value)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the state of container {name!r} is damaged: {error}",
            hint=f"if nothing of it runs any more, remove {_path(name)}",
        ) from None
