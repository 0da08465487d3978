"""Two agents that really die: processes of their own with a link between them and a fake workload.

Run as a program it forks agents on request. pytest must not do that itself: it has threads by then, and a
fork copies their locks but not them.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from migrator.engine.base import LateLock
from migrator.errors import Fate, MigratorError, TransportError
from migrator.protocol import messages as m
from migrator.protocol.states import Recorded
from migrator.recovery.hooks import Tools
from migrator.recovery.journal import Journal, JournalHeader, Role
from migrator.recovery.settle import Settlement, settle_all
from migrator.runtime import fault_points
from migrator.session.serve import ask_over, serve
from migrator.session.settings import DestinationSettings, Prepared, SourceSettings
from migrator.session.source import SourceSession
from migrator.testing.fakeengine import FakeDestination, FakeLocks, FakeSource, FakeWorld, Script
from transport.link import Link
from transport.wire import link_socket

ID = "fault-0000001"


def host(name: str) -> m.HostFacts:
    return m.HostFacts(name, "6.18", "x86_64", "v", "m", frozenset(), 2696, "fake")


class Agents:
    """The agents of both hosts. What outlives them is in `path`: journals and the workload."""

    def __init__(self, path: Path, *, locked: bool = False) -> None:
        """`locked`: the workload has locks on files that both hosts share."""
        self.path = path
        self.locked = locked
        (path / "world").mkdir(exist_ok=True)
        self.world = FakeWorld(path / "world")

    def tools(self, side: str) -> Tools:
        return Tools(self.world.groups(side), FakeLocks(self.world))

    def taking(self) -> DestinationSettings:
        script = Script(late_locks=[LateLock(1, 3, 0, 2, 0, 0, "/srv/db")] if self.locked else [])
        return DestinationSettings(
            host=host("b"),
            prepare=lambda proposal: Prepared(lambda fd: FakeDestination(self.world, fd, script), "fake"),
            journal=self.path / "b",
            tools=self.tools("destination"),
        )

    def migrate(self, *, source_fault: str = "", destination_fault: str = "") -> tuple[int, int]:
        """Migrate with both agents in processes of their own; their exit codes. A fault is `point:action`."""
        request = json.dumps([str(self.path), self.locked, source_fault, destination_fault])
        program = nursery()
        assert program.stdin is not None and program.stdout is not None
        program.stdin.write(request + "\n")
        program.stdin.flush()
        source, destination = json.loads(program.stdout.readline())
        return source, destination

    def run_both(self, source_fault: str, destination_fault: str) -> tuple[int, int]:
        ours, theirs = socket.socketpair()
        source = fork(lambda: self._source(ours), source_fault, theirs)
        destination = fork(lambda: self._destination(theirs), destination_fault, ours)
        ours.close()
        theirs.close()
        return wait(source), wait(destination)

    async def _source(self, sock: socket.socket) -> None:
        async def gone() -> Link:
            raise TransportError("no route to host")

        await SourceSession(
            SourceSettings(migration=ID, peer="b", journal=self.path / "a", ask_for=0.3),
            lambda fd: FakeSource(self.world, fd, Script(rounds=[20, 2, 1])),
            await link_socket(sock, "b"),
            host("a"),
            reconnect=gone,
        ).run()

    async def _destination(self, sock: socket.socket) -> None:
        async with await link_socket(sock, "a") as link:
            await serve(link, self.taking())

    async def restart_source(self) -> list[Settlement]:
        """A new agent on the source, which can reach the destination."""

        servers = []

        async def ask(facts: JournalHeader) -> Recorded:
            ours, theirs = socket.socketpair()
            servers.append(asyncio.create_task(self._destination(theirs)))
            async with await link_socket(ours, "b") as link:
                return await ask_over(link, facts.migration)

        settled = await settle_all(self.path / "a", self.tools("source"), ask)
        await asyncio.gather(*servers)
        return settled

    async def restart_source_alone(self) -> list[Settlement]:
        """A new agent on the source, which cannot reach the destination."""

        async def ask(facts: JournalHeader) -> Recorded:
            raise TransportError("no route to host")

        return await settle_all(self.path / "a", self.tools("source"), ask)

    async def restart_destination(self) -> list[Settlement]:
        async def ask(facts: JournalHeader) -> Recorded:
            raise AssertionError("a destination asks nobody")

        return await settle_all(self.path / "b", self.tools("destination"), ask)

    def journal(self, role: Role) -> Journal | None:
        return Journal.find(self.path / ("a" if role is Role.SOURCE else "b"), ID, role)


def fork(main: Callable[[], Coroutine[Any, Any, None]], fault: str, not_ours: socket.socket) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        not_ours.close()
        if fault:
            fault_points.armed.point, action = fault_points.parse(fault)
            fault_points.armed.action = fault_points.ACTIONS[action]
        asyncio.run(main())
        code = 0
    except MigratorError as error:
        code = 50 + list(Fate).index(error.fate)
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@functools.cache
def nursery() -> subprocess.Popen[str]:
    """The one program that forks agents; ends with its standard input."""
    return subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def main() -> None:
    for line in sys.stdin:
        path, locked, source_fault, destination_fault = json.loads(line)
        agents = Agents(Path(path), locked=locked)
        print(json.dumps(agents.run_both(source_fault, destination_fault)), flush=True)


if __name__ == "__main__":
    main()
