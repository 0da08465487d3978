"""What an engine takes for a workload, measured inside of a guest: `tests/vm/bench.py` runs this there.

    python -m tests.vm.measure ENGINE WORKLOAD REPEAT

Prints one line of JSON for each repetition, in seconds:

    checkpoint   the whole of a checkpoint without pre-copy, the tasks killed in the end
    freeze       how long the tasks stand still on the source where two rounds of pre-copy went before
    restart      from the image to running tasks
    steps        of the freeze, by name
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from migrator.engine.base import (
    AfterCheckpoint,
    CheckpointFlags,
    DestinationOptions,
    Engine,
    RestartFlags,
    SourceOptions,
)
from migrator.engine.select import select
from migrator.testing.servers import redis_server
from migrator.testing.workloads import Workload

FILES = """
import os, sys, time
files = [open(f"{sys.argv[1]}.{n}", "w+") for n in range(1000)]
for number, file in enumerate(files):
    file.write(str(number)); file.flush()
with open(sys.argv[1], "w") as out:
    out.write("ready pid=%d\\n" % os.getpid())
while True:
    time.sleep(1)
"""
WORKLOADS = ("small", "256 MiB", "50 threads", "100 processes", "1000 files", "Redis 64 MiB")


@contextmanager
def running(name: str, folder: Path) -> Iterator[int]:
    """Start a workload; its root's pid."""
    arguments: dict[str, tuple[str, tuple[object, ...]]] = {
        "small": ("counter", (10,)),
        "256 MiB": ("memory", (256, 5, "plain")),
        "50 threads": ("threads", (50,)),
        "100 processes": ("tree", (100,)),
    }
    if name == "Redis 64 MiB":
        with redis_server(folder, 6399) as redis:
            subprocess.run(
                ["redis-cli", "-p", "6399", "debug", "populate", "16384", "key", "4000"],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            yield redis.pid
    elif name == "1000 files":
        out = folder / "files.out"
        program = [os.path.realpath(sys.executable), "-S", "-c", FILES, str(out)]
        child = subprocess.Popen(program, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            while not out.exists() or "ready" not in out.read_text():
                time.sleep(0.05)
            yield child.pid
        finally:
            child.kill()
            child.wait()
    else:
        workload, rest = arguments[name]
        with Workload(workload, folder, *rest) as counting:
            counting.check_alive_and_progressing(seconds=120)
            yield counting.pid


def cold(engine: Engine, name: str, folder: Path) -> float:
    """Seconds of a checkpoint that ends with the tasks gone."""
    with running(name, folder) as pid, (folder / "image").open("w+b") as image:
        began = time.monotonic()
        engine.checkpoint(pid, image.fileno(), CheckpointFlags.SUBTREE, after=AfterCheckpoint.KILL)
        return time.monotonic() - began


def live(engine: Engine, name: str, folder: Path) -> tuple[float, float, dict[str, float]]:
    """(seconds of standing still, after two rounds where the engine has any; seconds of the restart; seconds of the
    steps while it stands still, by name)."""
    with running(name, folder) as pid, (folder / "image").open("w+b") as image:
        with engine.source(pid, image.fileno(), SourceOptions()) as source:
            source.survey()
            source.instrument()
            for _ in range(2 if engine.precopies else 0):
                source.round()
            source.seize()
            source.quiesce(0.1)
            before = len(source.phases)
            began = time.monotonic()
            source.freeze()
            source.final()
            source.hold()
            freeze = time.monotonic() - began
            steps = {phase.name: (phase.end - phase.start) / 1e9 for phase in source.phases[before:]}
            source.release()
        await_gone(pid)
        image.seek(0)
        began = time.monotonic()
        root = engine.restart(image.fileno(), RestartFlags(0), options=DestinationOptions())
        restart = time.monotonic() - began
        end(root)
        return freeze, restart, steps


def await_gone(pid: int) -> None:
    """The original is our child, so its pid is free once it has been waited for."""
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.01)


def end(root: int) -> None:
    """Kill a restarted tree by its cgroup, which has nobody else."""
    group = Path("/sys/fs/cgroup") / Path(f"/proc/{root}/cgroup").read_text().strip().rpartition("::/")[2]
    (group / "cgroup.kill").write_text("1")
    for pid in (int(line) for line in (group / "cgroup.procs").read_text().split()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    await_gone(root)


def main() -> None:
    engine_name, name, repeat = sys.argv[1], sys.argv[2], int(sys.argv[3])
    engine = select(engine_name).engine
    for _ in range(repeat):
        with tempfile.TemporaryDirectory(prefix="measure-", dir="/tmp") as folder:
            (Path(folder) / "cold").mkdir()
            (Path(folder) / "live").mkdir()
            checkpoint = cold(engine, name, Path(folder) / "cold")
            freeze, restart, steps = live(engine, name, Path(folder) / "live")
        print(json.dumps({"checkpoint": checkpoint, "freeze": freeze, "restart": restart, "steps": steps}), flush=True)


if __name__ == "__main__":
    main()
