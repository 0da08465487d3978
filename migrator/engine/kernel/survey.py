"""What is in a tree, looked at from outside while it runs; what the kernel does not carry, it says itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from migrator.engine import files, processor, work
from migrator.engine.base import FileFact, SourceOptions, Survey, Work
from migrator.linux import descriptors, ipc, mqueue, procfs

_GONE = (FileNotFoundError, ProcessLookupError)
_ESTABLISHED, _CLOSE_WAIT = 1, 8
_SHM = ("/dev/zero (deleted)", "/memfd:", "/SYSV")  # whose contents the stream has


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    vmas: Sequence[procfs.Vma] = ()


def count(pids: Sequence[int]) -> Work:
    """How much there is of what takes time while the tasks are stopped."""
    return work.count(_Process(pid) for pid in pids)


def look(root: int, pids: Sequence[int]) -> Survey:
    """The facts of a tree. Processes that end meanwhile are left out."""
    found: dict[str, FileFact] = {}
    living: list[_Process] = []
    wanted: list[int] = []
    threads = rss = cap_bounding = 0
    for pid in pids:
        try:
            wanted.append(pid)
            state = procfs.status(pid)
            if state["State"][0] in "ZX":
                continue
            threads += int(state["Threads"])
            rss += int(state.get("VmRSS", "0").split()[0]) * 1024
            cap_bounding |= int(state["CapBnd"], 16)
            wanted += procfs.tids(pid)
            files.mapped(pid, found, lambda vma: vma.path.startswith(_SHM))
            files.opened(pid, found, ())
            living.append(_Process(pid))
        except _GONE:
            continue
    own_pids = os.readlink(f"/proc/{root}/ns/pid") != os.readlink("/proc/self/ns/pid")
    return Survey(
        pids=list(pids),
        threads=threads,
        rss_bytes=rss,
        files=sorted(found.values(), key=lambda fact: fact.path),
        cpu_features=frozenset(processor.cpu_facts()["flags"].split()),
        xstate_size=processor.xstate_facts()[1],
        tracker="",
        tcp_connections=0,
        wanted_pids=[] if own_pids else sorted(set(wanted)),
        cap_bounding=cap_bounding,
        work=work.count(living),
    )


def obstacles(root: int, pids: Sequence[int], options: SourceOptions) -> Iterator[str]:
    """What the kernel would not miss, and the copy would: one sentence each."""
    if not options.container:
        yield from _connections(pids)
        return
    below = set(procfs.descendants(root))
    for pid in pids:
        if pid not in below:
            yield f"pid {pid} came into the container from outside (migrator exec), and is no descendant of its init"
    # objects of System V the calls carry, or name what of them they do not
    for what in ipc.with_ipc_namespace(root, _queues):
        yield f"container {options.container}: {what} is not carried by the kernel engine"
    for mount in options.tmpfs:
        try:
            names = os.listdir(f"/proc/{root}/root{mount}")
        except OSError:
            continue
        if names:
            name = os.path.join(mount, names[0])
            yield f"container {options.container}: {name}, on a tmpfs of its own, is not carried by the kernel engine"


def _queues() -> list[str]:
    return [f"the POSIX message queue /{name}" for name in mqueue.names()]


def _connections(pids: Sequence[int]) -> Iterator[str]:
    """Connections of TCP that lead out of the tree: their address would stay here."""
    found: dict[tuple[tuple[str, int], tuple[str, int]], str] = {}
    seen: set[str] = set()
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                link = os.readlink(f"/proc/{pid}/fd/{name}")
                if not link.startswith("socket:") or link in seen:
                    continue
                seen.add(link)
                with descriptors.fetch_socket(pidfd, int(name)) as sock:
                    if sock.proto == socket.IPPROTO_TCP and _connected(sock):
                        found[sock.getsockname()[:2], sock.getpeername()[:2]] = f"pid {pid} fd {name}"
        except OSError:
            continue  # it was closed meanwhile
        finally:
            os.close(pidfd)
    for (local, peer), who in found.items():
        if (peer, local) not in found:
            yield (
                f"{who}: the connection {_show(local)} to {_show(peer)} would stay behind with the address of this"
                " host; run the workload as a container with its own address (`migrator run`)"
            )


def waiting(root: int, pids: Sequence[int]) -> str:
    """Which of the listening sockets of TCP has a connection that waits to be accepted, in words; "" for none.

    What else may be on its way only the kernel sees, and checkpoint() says so."""
    crowded: set[str] = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = procfs.read_text(f"/proc/{root}/net/{table}").splitlines()[1:]
        except OSError:
            continue
        for line in lines:  # of a listener the second queue is how many wait (proc_net_tcp)
            fields = line.split()
            if fields[3] == "0A" and int(fields[4].split(":")[1], 16):
                crowded.add(f"socket:[{fields[9]}]")
    if not crowded:
        return ""
    for pid in pids:
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{name}") in crowded:
                    return f"pid {pid} fd {name}: a connection waits to be accepted"
        except OSError:
            continue
    return ""


def _connected(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] in (_ESTABLISHED, _CLOSE_WAIT)


def _show(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
