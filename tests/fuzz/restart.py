"""Hostile images for the restart itself: built as far as they can be, never run, and nothing of them is left.

    python -m tests.fuzz.restart TAG SECONDS SEED IMAGE…

`TAG` is in the name of every cgroup and container of it, so that what others make on this machine is not taken for its
own. The program is in a pid namespace of its own, below an init that collects orphans, so that no pid of the machine is
in the way of an image, and what should be left of one ends with it. Images of real programs are made first, outside.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from migrator.container.sandbox import SandboxMaker
from migrator.engine.base import DestinationOptions
from migrator.engine.user.engine import UserEngine
from migrator.errors import MigratorError
from migrator.linux import ptrace
from migrator.testing.workloads import Workload, build
from tests.fuzz.counts import Counts
from tests.fuzz.mutation import Parts, cut, mutated

PROGRAMS: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("counter", (5,)), ("threads", (4,)), ("memory", (1, 1, "all")), ("tree", (4,)), ("signals", ()), ("fds", ()),
    ("creds", ()),
)  # fmt: skip
CONTAINED = "counter"
HANGS = 60  # seconds
MOST_MEMORY = 1 << 30  # bytes of this program, whatever an image claims


class Hang(BaseException):
    """It does not come to an end."""


def fuzz(seconds: float, seed: int) -> Counts:
    """Make images of real programs and restart hostile ones of them for `seconds`."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, contextlib.ExitStack() as stack:
        images = []
        for name, arguments in PROGRAMS:
            program = stack.enter_context(Workload(name, Path(folder) / name, *arguments))
            images.append(str(Path(folder) / f"{name}.image"))
            command = [sys.executable, "-m", "migrator", "checkpoint", str(program.pid), "-o", images[-1]]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        images.append(str(Path(folder) / "container.image"))
        stack.enter_context(_container(Path(folder), images[-1]))
        spaces = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        inside = [*spaces, "sh", "-c", '"$@"; exit $?', "init"]
        command = [sys.executable, "-m", __name__, _tag(), str(seconds), str(seed), *images]
        environment = {**os.environ, "MIGRATOR_STATE_DIR": f"{folder}/inside"}
        done = subprocess.run(
            [*inside, *command], env=environment, capture_output=True, text=True, timeout=seconds + 600
        )
        if done.returncode:
            return Counts(found=[f"restart {seed}: the program has ended by {done.returncode}: {done.stderr[-3000:]}"])
        return Counts.of(done.stdout.splitlines()[-1])


def _tag() -> str:
    return f"fuzz-{os.getpid()}"


@contextlib.contextmanager
def _container(folder: Path, image: str) -> Iterator[None]:
    """One that runs for as long as the block takes, and its image."""
    environment = {**os.environ, "MIGRATOR_STATE_DIR": str(folder / "outside")}
    fill = 'echo x > /srv/file; ln /srv/file /srv/name; ln -s file /srv/link; mkdir /srv/dir; exec "$@"'
    program = ["sh", "-c", fill, "sh", str(build(CONTAINED)), str(folder / "container.out"), "5"]
    name = _tag()

    def migrator(*words: str) -> None:
        command = [sys.executable, "-m", "migrator", *words]
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)

    migrator("run", "-d", "--name", name, "--bridge", "", "--tmpfs", "/srv", "--", *program)
    try:
        migrator("checkpoint", name, "-o", image)
        yield
    finally:
        migrator("stop", name)


def inside(tag: str, seconds: float, seed: int, seeds: list[Parts]) -> Counts:
    counts, end = Counts(), time.monotonic() + seconds
    _attempt(tag, b"", "nothing", 0, counts)  # what is made once only is made now
    while time.monotonic() < end:
        rng = random.Random(seed)
        image, made = mutated(rng, seeds)
        _attempt(tag, image, made, seed, counts)
        seed += 1
    if (most := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) > MOST_MEMORY:
        counts.found.append(f"restart: it had {most >> 20} MiB of memory")
    return counts


def _attempt(tag: str, image: bytes, made: str, seed: int, counts: Counts) -> None:
    before = Around.now(tag)
    about = f"restart {seed} ({made})"
    with _opened(image) as fd:
        options = DestinationOptions(
            cgroup_name=f"{tag}-{seed}", sandbox=SandboxMaker(), verify=seed % 4 == 0, live=seed % 3 == 0
        )
        try:
            with _bounded(), UserEngine().destination(fd, options) as destination:
                try:
                    destination.build()
                    destination.hold()
                finally:
                    destination.discard()
            counts.note("restarted")
        except MigratorError as error:
            counts.note(type(error).__name__)
        except Hang:
            counts.found.append(f"{about}: no end after {HANGS} s: {traceback.format_exc()}")
        except Exception:
            counts.found.append(f"{about}: {traceback.format_exc()}")
    end = time.monotonic() + 2  # orphans are collected by somebody else
    while (changed := Around.now(tag).changed(before)) and time.monotonic() < end:
        time.sleep(0.01)
    if changed:
        counts.found.append(f"{about}: something is left: {'; '.join(changed)}")
        _end_children()


@dataclass(frozen=True)
class Around:
    """What must be the same afterwards."""

    descriptors: Counter[str]
    processes: Counter[str]
    cgroups: Counter[str]
    mounts: Counter[str]
    states: Counter[str]

    @classmethod
    def now(cls, tag: str) -> Around:
        return cls(
            Counter(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)),
            Counter(name for name in os.listdir("/proc") if name.isdigit()),
            Counter(
                str(path) for below in ("", "/*") for path in Path("/").glob(f"sys/fs/cgroup{below}/migrator/*{tag}*")
            ),
            Counter(Path("/proc/self/mountinfo").read_text().splitlines()),
            Counter(path.name for path in Path(os.environ["MIGRATOR_STATE_DIR"]).rglob("*") if path.is_file()),
        )

    def changed(self, before: Around) -> list[str]:
        """What there is more and less of. A mount whose directory somebody removes is taken away in every namespace
        (rmdir(2) since Linux 3.18): that is nobody's doing here."""
        changes = []
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(before, field.name)
            more, less = sorted((here - there).elements()), sorted((there - here).elements())
            if field.name == "mounts":
                less = [line for line in less if os.path.lexists(line.split()[4])]
            if more or less:
                changes.append(f"{field.name}: {more} more, {less} less")
        return changes


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def _end_children() -> None:
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in (1, os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(name), signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, ptrace.WALL)


@contextlib.contextmanager
def _opened(image: bytes) -> Iterator[int]:
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        os.write(fd, image)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    images = [cut(Path(path).read_bytes()) for path in sys.argv[4:]]
    print(inside(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), images).json())
