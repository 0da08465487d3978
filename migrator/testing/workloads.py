"""Workloads for tests, benchmarks and demonstrations: built once, started, watched, ended.

A workload is one of the small programs of `tests/workloads`: it builds a state, keeps checking
it, and appends lines to a file (`tests/workloads/workload.h` says which). It knows nothing about
migration; after a move its copy appends to the same file, so whoever watches need not care where
it runs:

    with Workload("memory", tmp_path, 64, 50) as memory:
        move(memory.pid)
        memory.check_alive_and_progressing()
        memory.finish()            # asks it to stop; its last line must be "ok"

Leaving the block kills what is left of the tree, wherever it was restored on this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "workloads"
CACHE = ROOT / "build" / "workloads"
CFLAGS = ("-std=gnu11", "-O2", "-g", "-pthread", "-Wall", "-Wextra", "-Werror")
LIBS = ("-lm",)


class WorkloadFailed(AssertionError):
    """The workload found its own state wrong, died, or stands still."""


def names() -> list[str]:
    """All C workloads."""
    return sorted(source.stem for source in SOURCES.glob("*.c"))


def build(name: str) -> Path:
    """Compiles `tests/workloads/NAME.c` where that has not been done yet; returns the program's path.

    The path depends on the sources, so that an old program is never taken for a new one, and it is
    the same on every host that shares this directory. Raises `subprocess.CalledProcessError` with
    the compiler's output, `FileNotFoundError` for a workload that does not exist.
    """
    source = SOURCES / f"{name}.c"
    digest = hashlib.sha256(" ".join(CFLAGS).encode())
    for part in (source, *sorted(SOURCES.glob("*.h"))):
        digest.update(part.read_bytes())
    program = CACHE / f"{name}-{digest.hexdigest()[:12]}"
    if not program.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = program.with_name(f"{program.name}.{os.getpid()}")
        compile_ = ["gcc", *CFLAGS, "-o", str(partial), str(source), *LIBS]
        subprocess.run(compile_, check=True, capture_output=True, text=True)
        with contextlib.suppress(FileExistsError):  # somebody else was first, and may run it already
            program.hardlink_to(partial)
        partial.unlink()
    return program


def build_all() -> dict[str, Path]:
    return {name: build(name) for name in names()}


class Workload:
    """A running workload; a context manager.

    name:       a C workload, a script (`*.py`, `*.sh`) in tests/workloads, or a module of ours
                that behaves like one ("migrator.testing.redisclient")
    directory:  for its output and the files that are part of its state
    arguments:  after the output file
    netns:      name of the network namespace (ip-netns(8)) it starts in, "" for the caller's
    prefix:     a command that runs its arguments, such as ("migrator", "run", "--name", "x", "--")
    label:      base name of the output file where two workloads share a directory
    ready:      wait until its state stands (30 s at most)

    `pid` is the pid of the tree's root in the caller's pid namespace. Whoever restores the tree
    with another root pid must `adopt` it.
    """

    def __init__(
        self,
        name: str,
        directory: Path | str,
        *arguments: object,
        netns: str = "",
        prefix: Sequence[str] = (),
        label: str = "",
        ready: bool = True,
    ) -> None:
        self.name = name
        self.directory = Path(directory)
        label = label or name.removesuffix(".py").removesuffix(".sh").rpartition(".")[2]
        self.out = self.directory / f"{label}.out"
        self.stdout = self.directory / f"{label}.stdout"
        self.stderr = self.directory / f"{label}.stderr"
        enter = ["ip", "netns", "exec", netns] if netns else []
        self.command = [*enter, *prefix, *_program(name), str(self.out), *map(str, arguments)]
        self._wait_ready = ready
        self._process: subprocess.Popen[bytes] | None = None
        self._roots: list[int] = []

    @property
    def pid(self) -> int:
        return self._roots[-1]

    def __enter__(self) -> Workload:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.out.unlink(missing_ok=True)
        with self.stdout.open("wb") as stdout, self.stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                close_fds=True,
            )
        self._roots.append(self._process.pid)
        try:
            if self._wait_ready:
                self.wait_for(lambda lines: any(line.startswith("ready ") for line in lines), seconds=30)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def adopt(self, pid: int) -> None:
        """The tree's root is `pid` from now on, as after a restart under another pid."""
        self._roots.append(pid)

    def lines(self) -> list[str]:
        """All whole lines written so far. Raises `WorkloadFailed` where one says FAIL."""
        try:
            text = self.out.read_text()
        except FileNotFoundError:
            return []
        lines = text[: text.rfind("\n") + 1].splitlines()
        failed = [line for line in lines if line.startswith("FAIL")]
        if failed:
            raise WorkloadFailed(f"{self.name}: {failed[0]}")
        return lines

    def ticks(self) -> int:
        """How many times it has reported that its state is right."""
        return sum(line.startswith("tick ") for line in self.lines())

    def alive(self, pid: int | None = None) -> bool:
        """Whether the root exists and is not a zombie."""
        self._reap()
        try:
            stat = Path(f"/proc/{pid or self.pid}/stat").read_bytes()
        except OSError:
            return False
        return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")

    def wait_for(self, predicate: Callable[[list[str]], bool], *, seconds: float = 20.0) -> list[str]:
        """The lines, as soon as `predicate(lines)` holds.

        Raises `WorkloadFailed` with the last lines where it dies first or `seconds` have passed.
        """
        deadline = time.monotonic() + seconds
        while True:
            alive = self.alive()
            lines = self.lines()
            if predicate(lines):
                return lines
            if not alive or time.monotonic() > deadline:
                why = f"nothing in {seconds} s" if alive else "it is gone"
                raise WorkloadFailed(f"{self.name} pid {self.pid}: {why}; {self._last_words(lines)}")
            time.sleep(0.01)

    def check_alive_and_progressing(self, *, ticks: int = 2, seconds: float = 20.0) -> None:
        """Returns when it has reported `ticks` times more from now, so its state is right after now."""
        before = self.ticks()
        self.wait_for(lambda lines: sum(line.startswith("tick ") for line in lines) >= before + ticks, seconds=seconds)

    def finish(self, *, seconds: float = 30.0) -> list[str]:
        """Asks it to stop, waits until it has; returns its lines. The last must be "ok"."""
        os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() > deadline:
                raise WorkloadFailed(f"{self.name} pid {self.pid} does not stop; {self._last_words()}")
            time.sleep(0.01)
        lines = self.lines()
        if not lines or lines[-1] != "ok":
            raise WorkloadFailed(f"{self.name} pid {self.pid} did not end well; {self._last_words(lines)}")
        return lines

    def kill(self) -> None:
        """Kills the tree, original or restored; returns when it is gone (5 s at most, where it is frozen)."""
        killed: list[int] = []
        for root in self._roots:
            # What is stopped forks no more: a pass that finds nobody new has them all.
            while new := [p for p in (root, *descendants(root)) if p not in killed and self._ours(p)]:
                killed += new
                self._signal(new, signal.SIGSTOP)
        self._signal(killed, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while any(self.alive(pid) for pid in killed) and time.monotonic() < deadline:
            time.sleep(0.005)

    @staticmethod
    def _signal(pids: list[int], number: signal.Signals) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _ours(self, pid: int) -> bool:
        # A pid may have been given to somebody else since; our output file is in every command line.
        try:
            return os.fsencode(self.out) in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def _reap(self) -> None:
        if self._process is not None:
            self._process.poll()

    def _last_words(self, lines: list[str] | None = None) -> str:
        lines = self.lines() if lines is None else lines
        stderr = self.stderr.read_text(errors="replace")[-500:] if self.stderr.exists() else ""
        return f"last lines {lines[-2:]} stderr {stderr!r}"


def _program(name: str) -> list[str]:
    if name.endswith(".py"):
        # The real interpreter, not a launcher in front of it: what runs is what will be moved.
        return [os.path.realpath(sys.executable), str(SOURCES / name)]
    if name.endswith(".sh"):
        return [os.path.realpath("/bin/bash"), str(SOURCES / name)]
    if "." in name:
        return [sys.executable, "-m", name]
    return [str(build(name))]


def descendants(root: int) -> list[int]:
    """All descendants of `root`, parents before children (proc(5): field 4 of stat). Names are any bytes."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                ppid = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
                children.setdefault(ppid, []).append(int(entry.name))
    found: list[int] = []
    todo = [root]
    while todo:
        todo = [child for pid in todo for child in children.get(pid, [])]
        found += todo
    return found
