"""A task that has restricted itself by Landlock, of which /proc says nothing, is refused; any other is not."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import contained
import pytest
from cli import migrator
from contained import NAME, own_directories  # noqa: F401 (a fixture)

from migrator.engine.base import SourceOptions
from migrator.engine.user.dump.bystander import RESTRICTED
from migrator.engine.user.dump.source import UserSource
from migrator.errors import CheckpointFailed
from migrator.linux import procfs

pytestmark = pytest.mark.root

PROGRAM = """
import contextlib, ctypes, os, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
os.chdir(sys.argv[1])
log = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def call(*args):
    result = libc.syscall(*map(ctypes.c_long, args))
    assert result >= 0, (args, ctypes.get_errno())
    return result
def restrict(fs=1 << 7, net=0, scoped=0):  # LANDLOCK_ACCESS_FS_MAKE_DIR
    rules = (ctypes.c_uint64 * 3)(fs, net, scoped)
    call(157, 38, 1, 0, 0, 0)  # no_new_privs
    made = call(444, ctypes.addressof(rules), 24, 0)
    call(446, made, 0)
    os.close(made)
def capabilities(*names):
    bits = sum(1 << n for n in names)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(bits, bits, bits, 0, 0, 0)
    call(126, ctypes.addressof(header), ctypes.addressof(sets))
def user(real, effective=None, saved=None):
    effective = real if effective is None else effective
    saved = effective if saved is None else saved
    os.setgroups([7, 8])
    os.setresgid(real, effective, saved)
    os.setresuid(real, effective, saved)
def in_thread(act):
    done = threading.Event()
    threading.Thread(target=lambda: (act(), done.set(), time.sleep(1000)), daemon=True).start()
    done.wait()
def on_signal(act):
    import signal
    signal.signal(signal.SIGUSR1, lambda *_: (act(), os.write(log, b"late\\n")))
def ticks():
    while True:
        try:
            os.rmdir("made") if os.path.isdir("made") else os.mkdir("made")
            os.write(log, b"free\\n")
        except PermissionError:
            os.write(log, b"restricted\\n")
        time.sleep(0.02)
{act}
os.write(log, b"ready\\n")
ticks()
"""


@contextlib.contextmanager
def program(folder: Path, act: str) -> Iterator[tuple[UserSource, int]]:
    folder.chmod(0o777)
    argv = [sys.executable, "-c", PROGRAM.replace("{act}", act), str(folder)]
    with tempfile.TemporaryFile() as image, subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as child:  # fmt: skip
        try:
            await_line(folder, "ready")
            options = SourceOptions(cgroup_name=f"landlock-{os.getpid()}")
            with UserSource(child.pid, image.fileno(), options) as source:
                source.survey()
                yield source, child.pid
        finally:
            os.killpg(child.pid, signal.SIGKILL)


def await_line(folder: Path, line: str, after: int = 0) -> None:
    deadline = time.monotonic() + 30
    while line not in lines(folder)[after:]:
        assert time.monotonic() < deadline, lines(folder)[-5:]
        time.sleep(0.01)


def lines(folder: Path) -> list[str]:
    path = folder / "said"
    return path.read_text().split("\n") if path.exists() else []


def runs_on(folder: Path, pid: int, how: str) -> None:
    """The program does; and of the processes that were made beside it none is left."""
    await_line(folder, how, len(lines(folder)) + 1)
    assert procfs.stat(pid)[3] in "SR"
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert all("T" not in procfs.stat(int(child))[3] for child in children)


@pytest.mark.parametrize(
    ("act", "thread", "how"),
    [
        ("restrict()", "", "restricted"),
        ("user(4321); restrict()", "", "restricted"),
        ("restrict(); user(4321)", "", "restricted"),
        ("restrict(fs=0, net=1)", "", "free"),
        ("restrict(fs=0, scoped=2)", "", "free"),
        ("in_thread(restrict)", r": its thread \d+", "free"),
        ("in_thread(lambda: (call(117, 4321, 4321, 4321), restrict()))", r": its thread \d+", "free"),
    ],
)
def test_a_task_that_has_restricted_itself_is_refused_before_the_freeze(
    tmp_path: Path, act: str, thread: str, how: str
) -> None:
    """`how`: whether its main thread may make directories, before as after."""
    with program(tmp_path, act) as (source, pid):
        source.instrument()
        with pytest.raises(CheckpointFailed, match=rf"\){thread} {re.escape(RESTRICTED)}"):
            source.round()
        source.thaw()
        runs_on(tmp_path, pid, how)


def test_one_that_does_so_later_is_refused_at_the_freeze(tmp_path: Path) -> None:
    with program(tmp_path, "on_signal(restrict)") as (source, pid):
        source.instrument()
        source.round()
        os.kill(pid, signal.SIGUSR1)
        await_line(tmp_path, "late")
        source.round()
        source.freeze()
        with pytest.raises(CheckpointFailed, match="has restricted itself by Landlock"):
            source.final()
        source.thaw()
        runs_on(tmp_path, pid, "restricted")


@pytest.mark.parametrize(
    "act",
    [
        "pass",
        "capabilities()",
        "call(157, 28, 0x2F, 0, 0, 0); capabilities(0, 5)",  # SECBIT_NOROOT and others
        "call(157, 24, 19, 0, 0, 0); call(157, 24, 21, 0, 0, 0)",  # out of the bounding set: sys_ptrace, sys_admin
        "user(4321)",
        "user(4321, 4322, 4323)",
        "user(0, 4321, 0)",
        "user(4321, 0, 0)",
        "user(4321); call(157, 4, 0, 0, 0, 0)",  # not dumpable
        "call(157, 8, 1, 0, 0, 0); user(4321); capabilities(10); call(157, 47, 2, 10, 0, 0)",  # ambient
        "in_thread(lambda: call(117, 4321, 4321, 4321))",
        "user(4321); call(157, 38, 1, 0, 0, 0)",  # no_new_privs
    ],
)
def test_no_credentials_are_taken_for_it(tmp_path: Path, act: str) -> None:
    with program(tmp_path, act) as (source, pid):
        source.instrument()
        source.round()
        source.freeze()
        source.final()
        source.thaw()
        runs_on(tmp_path, pid, "free")


@pytest.mark.parametrize(("act", "refused"), [("user(4321); restrict()", True), ("user(4321)", False)])
def test_it_is_found_in_a_container(tmp_path: Path, act: str, refused: bool) -> None:
    tmp_path.chmod(0o777)
    contained.run(tmp_path, PROGRAM.replace("{act}", f"{act}; print('ready', flush=True)"))
    done = migrator("checkpoint", NAME, "-o", tmp_path / "image", code=4 if refused else 0)
    assert ("has restricted itself by Landlock" in " ".join(done.stderr.split())) == refused
    await_line(tmp_path, "restricted" if refused else "free", len(lines(tmp_path)) + 1)
