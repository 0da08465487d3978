"""What this process may not do, and what a process that it makes will therefore never do either.

Three restrictions pass from parent to child and cannot be taken off again: a capability that is not in the
bounding set (capabilities(7)), no_new_privs, and filters of system calls (seccomp(2)). A copy that is made under
one of them has it as well, whether or not its original had: so an agent must know what confines it. A mount namespace
passes on too: what is restored from one of a service's own has other files than the rest of the host.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Iterable, Mapping

from migrator.linux import procfs, sys

_CAPSET = 126
_VERSION_3 = 0x20080522

# capabilities(7), by number
NAMES = tuple(
    """
    chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable net_bind_service
    net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot sys_ptrace sys_pacct sys_admin
    sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease audit_write audit_control setfcap mac_override
    mac_admin syslog wake_alarm block_suspend audit_read perfmon bpf checkpoint_restore
    """.split()  # noqa: SIM905 (as they are read)
)

# What the agent itself does nothing with. Its copies may have them all the same: the stub that a copy is made of is
# executed as root, which gives it whatever is in the bounding set.
UNUSED = frozenset(
    """
    audit_control audit_read audit_write mac_admin mac_override net_broadcast perfmon sys_boot sys_module sys_pacct
    sys_rawio sys_tty_config syslog
    """.split()  # noqa: SIM905
)


def names(capabilities: int) -> list[str]:
    """The names of a set, as `cap_sys_admin`; of those that have none yet, the number."""
    known = dict(enumerate(NAMES))
    return [f"cap_{known.get(n, n)}" for n in range(capabilities.bit_length()) if capabilities >> n & 1]


def own_status() -> dict[str, str]:
    """/proc/PID/status of this thread."""
    return procfs.status(os.getpid(), threading.get_native_id())


def bounding(status: Mapping[str, str]) -> int:
    """The capability bounding set in a /proc/PID/status."""
    return int(status["CapBnd"], 16)


def inherited(status: Mapping[str, str]) -> list[str]:
    """The restrictions that whoever has this /proc/PID/status passes on, besides the bounding set: for people."""
    reasons = []
    if status.get("NoNewPrivs", "0") != "0":
        reasons.append("no_new_privs (of a unit with NoNewPrivileges= or a setting that implies it)")
    if status.get("Seccomp", "0") != "0":
        reasons.append("a filter of system calls (of a unit with SystemCallFilter= or Restrict…=, or of a container)")
    return reasons


def other_label(tid: int) -> str:
    """How SELinux, AppArmor or Smack labels a task (/proc/PID/attr/current), "" where it is as it labels us: a process
    that we make has our label."""
    ours = _own_label()
    if not ours:
        return ""  # there is no such module
    theirs = _label(tid)
    return "" if theirs == ours else theirs


@functools.cache
def _own_label() -> str:
    return _label(os.getpid())


def _label(tid: int) -> str:
    try:
        return procfs.read_text(f"/proc/{tid}/attr/current").rstrip("\0\n")
    except OSError:
        return ""


def give_up(unused: Iterable[str] = UNUSED) -> None:
    """Take capabilities from this thread, and from those it starts, but not from what it executes as root."""
    drop = sum(1 << NAMES.index(name) for name in unused)
    status = own_status()
    effective, permitted, inheritable = (int(status[key], 16) & ~drop for key in ("CapEff", "CapPrm", "CapInh"))
    header = ctypes.create_string_buffer(struct.pack("<Ii", _VERSION_3, 0))
    sets = (effective, permitted, inheritable)
    data = ctypes.create_string_buffer(struct.pack("<6I", *[s & 0xFFFFFFFF for s in sets], *[s >> 32 for s in sets]))
    sys.call(_CAPSET, ctypes.addressof(header), ctypes.addressof(data), name="capset")


def own_mounts() -> list[str] | None:
    """Of a service whose mount namespace is not that of the manager that has started it: the mount points that
    differ (there may be none yet). None if it is the same, or if somebody else has started this process, who may
    have meant just that."""
    if os.getppid() != 1:
        return None
    return differing(*(procfs.read_text(f"/proc/{pid}/mountinfo") for pid in (1, os.getpid())))


def differing(one: str, other: str) -> list[str] | None:
    """Where the mount namespaces differ that two texts of /proc/PID/mountinfo are of: mount points, as they are
    escaped there. None if it is one namespace: a mount has its id in no other. Reading ns/mnt of process 1 would
    need all capabilities that it has."""
    if {line.split()[0] for line in one.splitlines()} & {line.split()[0] for line in other.splitlines()}:
        return None
    return sorted({mount[2] for mount in _mounts(one) ^ _mounts(other)})


def _mounts(mountinfo: str) -> set[tuple[str, ...]]:
    """Device, root, mount point, options, and file system of each mount; not its ids and peers (proc(5))."""
    found = set()
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        found.add((*before.split()[2:6], *after.split()[:2]))
    return found
