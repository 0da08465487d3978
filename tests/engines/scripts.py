"""Programs in Python that say in a log how far they are: started, saved, restarted, and ended with their copies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cli import migrator, sweep


class Script:
    """`child`: the program itself. `log`: what it and its copy say."""

    def __init__(self, child: subprocess.Popen[bytes], log: Path) -> None:
        self.child, self.log = child, log
        self.pid = child.pid
        self._copies: list[int] = []

    def await_text(self, text: str) -> str:
        """All that was said, once that is part of it."""
        deadline = time.monotonic() + 30
        while text not in (said := self.log.read_text()):
            ended = self.child.poll() is not None and not self._copies
            assert time.monotonic() < deadline and not ended and "Traceback" not in said, said[-2000:]
            time.sleep(0.01)
        return said

    def save(self, image: Path) -> None:
        """It has ended then."""
        migrator("checkpoint", self.pid, "--kill", "-o", image)
        self.child.wait()

    def restart(self, image: Path, *options: str, within: Sequence[str] = ()) -> None:
        """`within`: a command that runs its arguments."""
        self._copies.append(int(migrator("restart", "-d", "-i", image, *options, within=within).stdout))

    def end(self) -> None:
        for pid in (*self._copies, *([self.pid] if self.child.poll() is None else ())):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.child.wait()
        for pid in self._copies:
            sweep(pid)


@contextmanager
def script(
    folder: Path, code: str, *arguments: object, within: Sequence[str] = (), ready: str = "ready"
) -> Iterator[Script]:
    """It runs, and has said `ready`. `within`: a command that runs its arguments."""
    log = folder / "log"
    argv = [*within, sys.executable, "-c", code, *map(str, arguments)]
    with log.open("wb") as out:
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    running = Script(child, log)
    try:
        running.await_text(ready)
        yield running
    finally:
        running.end()
