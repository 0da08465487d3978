"""Sysctls of a container's own namespaces (IPC, UTS, network): those that are not as in new ones go along.

Only what the kernel keeps for each namespace is looked at; /proc/sys shows that of whoever reads it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from glob import glob

from migrator.linux.namespaces import CLONE_NEWIPC, CLONE_NEWNET, run_in, unshare

KINDS = frozenset({"ipc", "uts", "net"})
MOST, LONGEST = 512, 4096  # of a specification: sysctls, and bytes of one
_SYS = "/proc/sys"
_NAMES = (
    *(f"kernel/{name}" for name in ("shmmax", "shmall", "shmmni", "shm_rmid_forced", "msgmax", "msgmni", "msgmnb")),
    *("kernel/sem", "kernel/domainname"),
    *(f"fs/mqueue/{name}" for name in ("queues_max", "msg_max", "msgsize_max", "msg_default", "msgsize_default")),
)
LINK = "eth0"  # the one that is made for a container
_OF_NETWORKS = tuple(f"net/{family}/*" for family in ("core", "unix", "ipv4", "ipv6")) + tuple(
    f"net/{family}/conf/{which}/*" for family in ("ipv4", "ipv6") for which in ("all", "default")
)
_OF_LINKS = tuple(
    f"net/{family}/{what}/{link}/*"
    for family in ("ipv4", "ipv6")
    for what in ("conf", "neigh")
    for link in ("lo", LINK)
)
_NETWORK_NAME = re.compile(
    r"net/(core|unix|ipv4|ipv6|(ipv4|ipv6)/conf/(all|default)|(ipv4|ipv6)/(conf|neigh)/(lo|eth0))/[a-z0-9_]+"
)


def carried(name: str) -> bool:
    """Whether this is a sysctl that may come with a specification."""
    return name in _NAMES or _NETWORK_NAME.fullmatch(name) is not None


def changed(pid: int) -> dict[str, str]:
    """The sysctls of the namespaces of `pid` that differ from those of new ones, and its domain name, by name below
    /proc/sys."""
    return run_in(pid, KINDS, _changed_here)


def put(pid: int, values: Mapping[str, str], *, link: bool = False) -> None:
    """Set sysctls of the namespaces of `pid`: those of its network link, or all others. Raises OSError for one that
    this kernel has not, or does not take."""
    chosen = {name: value for name, value in values.items() if _is_of_link(name) == link}
    if chosen:
        run_in(pid, KINDS, lambda: _put_here(chosen))


def _is_of_link(name: str) -> bool:
    return name.split("/")[3:4] == [LINK]


def _changed_here() -> dict[str, str]:
    theirs = _read_here(_names_here())
    unshare(CLONE_NEWIPC | CLONE_NEWNET)
    new = _read_here(theirs) | {"kernel/domainname": ""}  # a new one has that of whoever makes it
    return {name: value for name, value in theirs.items() if _without(name, theirs, new) != value}


def _without(name: str, theirs: Mapping[str, str], new: Mapping[str, str]) -> str | None:
    """What a copy would have without being told. A link begins with what is the default when it is made."""
    if _is_of_link(name) and "/conf/" in name:
        return theirs.get(name.replace(f"/{LINK}/", "/default/"))
    return new.get(name.replace(f"/{LINK}/", "/lo/") if _is_of_link(name) else name)


def _names_here() -> list[str]:
    return [*_NAMES, *(path[len(_SYS) + 1 :] for how in (*_OF_NETWORKS, *_OF_LINKS) for path in glob(f"{_SYS}/{how}"))]


def _read_here(names: Iterable[str]) -> dict[str, str]:
    """Those that can be set. Several hundred files: no more calls for each than it takes."""
    found = {}
    for name in names:
        try:
            fd = os.open(f"{_SYS}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                settable = os.fstat(fd).st_mode & 0o200
                value = os.read(fd, LONGEST + 2).removesuffix(b"\n").decode("ascii") if settable else ""
            finally:
                os.close(fd)
        except (OSError, UnicodeDecodeError):
            continue  # a directory, or this kernel has it not, or does not tell
        if settable and len(value) <= LONGEST:
            found[name] = value
    return found


def _put_here(values: Mapping[str, str]) -> None:
    for name, value in sorted(values.items()):
        with open(f"{_SYS}/{name}", "r+", encoding="ascii") as file:
            if file.read() != f"{value}\n":  # some do more than what they say, written or not
                file.seek(0)
                file.write(f"{value}\n")
