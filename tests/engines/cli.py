"""The command line as a person uses it: real processes, real files."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from migrator.testing.workloads import Workload, build

MIGRATOR = [sys.executable, "-m", "migrator"]


def migrator(
    *arguments: object, code: int = 0, within: Sequence[str] = (), **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command of migrator to its end, which must be with exit status `code`. `within`: a command that runs its
    arguments."""
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([*within, *MIGRATOR, *map(str, arguments)], **{**options, **more})
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


class Orphan(Workload):
    """A workload that is nobody's child: init collects it when it dies, as for a daemon."""

    def __enter__(self) -> Orphan:
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.stdout.open("wb") as stdout, self.stderr.open("wb") as stderr:
            subprocess.run(
                ["setsid", "--fork", *self.command],
                stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, check=True,
            )  # fmt: skip
        deadline = time.monotonic() + 20
        while not (lines := self.lines()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.adopt(int(lines[0].removeprefix("ready pid=")))
        return self

    def is_gone(self) -> bool:
        return not os.path.exists(f"/proc/{self.pid}")

    def await_copy(self) -> None:
        deadline = time.monotonic() + 20
        while self.is_gone():
            assert time.monotonic() < deadline, "it does not come"
            time.sleep(0.01)

    def await_end(self) -> None:
        """Also of its zombie, whose pid is free only then."""
        deadline = time.monotonic() + 20
        while not self.is_gone():
            assert time.monotonic() < deadline, "it does not end"
            time.sleep(0.01)


@contextlib.contextmanager
def counter(folder: Path, interval_ms: int = 5, *, within: Sequence[str] = ()) -> Iterator[Orphan]:
    """`within`: a command that runs its arguments."""
    with Orphan("counter", folder, interval_ms, prefix=within) as running:
        try:
            yield running
        finally:
            running.kill()
            sweep(running.pid)


def sweep(pid: int) -> None:
    """The cgroup of a tree that was restarted with --detach is nobody's when it has ended."""
    for parent in ("/sys/fs/cgroup/unified/migrator", "/sys/fs/cgroup/migrator", "/sys/fs/cgroup/freezer/migrator"):
        for left in Path(parent).glob(f"restart-{pid}-*"):
            with contextlib.suppress(OSError):
                left.rmdir()


def state(pid: int) -> str:
    """The letter of proc(5), "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def leftovers(folder: Path) -> list[str]:
    """Files that a command has left unfinished."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def started(*arguments: object, **more: Any) -> subprocess.Popen[Any]:
    return subprocess.Popen([*MIGRATOR, *map(str, arguments)], **more)


def await_file(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.01)
    return path.read_text()


def end(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()


__all__ = [
    "MIGRATOR", "Orphan", "await_file", "build", "counter", "end", "leftovers", "migrator", "started", "state", "sweep",
]  # fmt: skip
