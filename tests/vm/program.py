"""A workload in a guest: what migrator.testing.workloads is on this machine.

with Program(guest, "counter", 5) as counter:
    guest.run(f"migrator checkpoint {counter.pid} --kill -o /tmp/image")
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from types import TracebackType

from migrator.testing.workloads import SOURCES, build
from tests.vm.machine import CommandFailed, Machine

_serial = itertools.count()


class Program:
    """One of tests/workloads, started in a guest; a context manager. It appends lines to `out` (workload.h).

    `guest` and `pid` say where it is; whoever moves it sets them.
    """

    def __init__(self, guest: Machine, name: str, *arguments: object) -> None:
        self.guest = guest
        self.name = name
        self.out = f"/tmp/{name.removesuffix('.py').removesuffix('.sh').rpartition('.')[2]}-{next(_serial)}.out"
        self.pid = 0
        self._command = " ".join([*self._program(), self.out, *map(str, arguments)])
        self._started_on = guest

    def _program(self) -> list[str]:
        if self.name.endswith(".py"):
            return [os.path.realpath(sys.executable), str(SOURCES / self.name)]
        if self.name.endswith(".sh"):
            return ["/usr/bin/bash", str(SOURCES / self.name)]
        if "." in self.name:
            return [sys.executable, "-m", self.name]
        return [str(build(self.name))]

    def __enter__(self) -> Program:
        self.pid = self.guest.spawn(f"{self._command} < /dev/null > {self.out}.stdout 2> {self.out}.stderr")
        self.await_lines("", 1)  # "ready" of those that say so, else what they say while they run
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # By the output file in its command line: a copy has another pid where it was moved.
        for guest in {self.guest.name: self.guest, self._started_on.name: self._started_on}.values():
            guest.run(f"pkill -KILL -f {self.out}; rm -f {self.out}*", status=None)

    def lines(self) -> list[str]:
        """All whole lines so far. `CommandFailed` where the program has found its state wrong."""
        text = self.guest.run(f"cat {self.out} 2> /dev/null", status=None).stdout
        lines = text[: text.rfind("\n") + 1].splitlines()
        if failed := [line for line in lines if line.startswith("FAIL")]:
            raise CommandFailed(f"{self.name} in {self.guest.name}: {failed[0]}")
        return lines

    def ticks(self) -> list[str]:
        return [line for line in self.lines() if line.startswith("tick ")]

    def await_lines(self, start: str, count: int, *, seconds: float = 180.0) -> list[str]:
        """The lines that begin so, once there are `count`."""
        deadline = time.monotonic() + seconds
        while len(found := [line for line in self.lines() if line.startswith(start)]) < count:
            if time.monotonic() > deadline:
                state = self.guest.run(f"ps ax | grep -F {self.out} | grep -v grep; dmesg | tail -n 20", status=None)
                raise CommandFailed(
                    f"{self.name} in {self.guest.name}: {len(found)} of {count} lines {start!r} after {seconds} s; "
                    f"it wrote {self.lines()[-3:]}\n{state.stdout}"
                )
            time.sleep(0.05)
        return found

    def check_progress(self, more: int = 3) -> None:
        """Returns once it has reported `more` times from now on that its state is right."""
        self.await_lines("tick ", len(self.ticks()) + more)

    def await_end(self) -> None:
        """Returns when there is no such process any more, nor its zombie; a minute at most."""
        self.guest.run(f"for i in {{1..600}}; do [ -e /proc/{self.pid} ] || exit 0; sleep 0.1; done; exit 1")

    def finish(self) -> list[str]:
        """Ask it to stop; its last line must be "ok". Returns its lines."""
        self.guest.run(f"kill -TERM {self.pid}")
        self.await_lines("ok", 1)
        return self.lines()


def numbers(lines: list[str]) -> list[int]:
    """The counts of a counter, which are 1, 2, 3, ... if no step was lost or made twice."""
    return [int(line.split()[1]) for line in lines if line.startswith("tick ")]
