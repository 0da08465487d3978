"""Source agents that are killed between any two steps of saving connections.

Run as a program it forks one for each line it reads: a JSON list of a pid, the directory of journals, and the
number of the step to be killed at. It answers with the name of that step, or "" once there is none.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from ctypes import c_int, c_uint64
from pathlib import Path
from typing import Any

from migrator.engine.base import SourceOptions
from migrator.engine.user.descriptors import tcp
from migrator.engine.user.dump.process_tree import ProcessTree
from migrator.engine.user.dump.source import UserSource
from migrator.linux import batch, procfs, repair
from migrator.linux import x86_64 as arch
from migrator.linux.cgroup import Cgroup
from migrator.recovery.journal import Journal, JournalHeader, Role, boot_id

STEPS: list[tuple[Any, str]] = [
    (Cgroup, "freeze"),
    (Cgroup, "thaw"),
    (ProcessTree, "detach"),
    (repair, "repair"),
    (repair, "reuse_address"),
    (repair, "leave"),
    (tcp, "save"),
]


def killed_at(number: int, told: int) -> None:
    """Let the step of that number, and what follows, never happen."""
    count = 0

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            if count == number:
                os.write(told, name.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*arguments, **named)

        return step

    for owner, name in STEPS:
        setattr(owner, name, counting(name, getattr(owner, name)))

    def walk(address: int, count: int, *, blocking: bool = False) -> None:
        """One call of the table after the other; those that change a socket are steps as well."""
        for entry in range(address, address + count * arch.BATCH_ENTRY, arch.BATCH_ENTRY):
            call, _, level, option, value = (c_uint64 * 5).from_address(entry)
            if call == arch.NR["setsockopt"] and (level, option) == (socket.IPPROTO_TCP, repair.TCP_REPAIR):
                name = "repair" if c_int.from_address(value).value == 1 else "leave"
            elif call == arch.NR["setsockopt"] and (level, option) == (socket.SOL_SOCKET, socket.SO_REUSEADDR):
                name = "reuse_address"
            else:
                batch.one_by_one(entry, 1)
                continue
            counting(name, batch.one_by_one)(entry, 1)

    batch.walk = walk


def agent(pid: int, journals: Path, number: int, told: int) -> None:
    sink = os.open("/dev/null", os.O_WRONLY)
    with UserSource(pid, sink, SourceOptions()) as source:
        source.survey()
        facts = JournalHeader(
            migration=f"killed-{time.time_ns()}",
            role=Role.SOURCE,
            pids=[(p, procfs.start_time(p)) for p in source.pids],
            cgroup=source.cgroup,
            boot_id=boot_id(),
            origins=source.origins,
        )
        Journal.create(journals, facts)
        source.instrument("user")
        killed_at(number, told)
        source.freeze()
        source.final()
        source.hold()
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    for line in sys.stdin:
        pid, journals, number = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                agent(pid, Path(journals), number, writer)
            finally:
                os._exit(1)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        name = os.read(reader, 100).decode() if os.WIFSIGNALED(status) else f"ended with {status}"
        os.close(reader)
        print(json.dumps(name), flush=True)


if __name__ == "__main__":
    main()
