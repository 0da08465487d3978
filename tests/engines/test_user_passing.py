"""Processes that come and go under a filter of system calls, as those do by which sshd talks to whom it does not know
yet: no call of ours ends them, and a move waits for their end rather than failing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrator.engine.base import SourceOptions
from migrator.engine.user.dump.source import UserSource
from migrator.errors import CheckpointFailed, Refused

pytestmark = pytest.mark.root

# SIGUSR1: a child is born; SIGUSR2: it is told to go on, and confines itself, then ends.
PROGRAM = """
import ctypes, os, resource, signal, struct, time
def confine():
    calls = 323, 9, 11, 28, 157  # userfaultfd, mmap, munmap, madvise, prctl
    kill = [step for number in calls for step in ((0x15, 0, 1, number), (0x06, 0, 0, 0x80000000))]
    steps = [(0x20, 0, 0, 0), *kill, (0x06, 0, 0, 0x7fff0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(steps), ctypes.addressof(code)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
def born(*_):
    global pipe
    pipe, pid = os.pipe(), os.fork()
    if pid == 0:
        print("born", flush=True)
        os.read(pipe[0], 1)
        confine()
        os.write(1, b"confined\\n")
        os.read(pipe[0], 1)
        os._exit(7)
signal.signal(signal.SIGUSR1, born)
signal.signal(signal.SIGUSR2, lambda *_: os.write(pipe[1], b"x"))
print("up", flush=True)
while True:
    try:
        print("ended", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    except ChildProcessError:
        time.sleep(0.01)
"""
DISPATCHES = """
import ctypes, threading, time
allowed = ctypes.c_char(b"\\0")
def dispatch():
    assert ctypes.CDLL(None).prctl(59, 1, 0, 0, ctypes.byref(allowed)) == 0
    print("up", flush=True)
    time.sleep(100)
{act}
time.sleep(100)
"""


class Program:
    """`program`, which writes to a file in `folder`."""

    def __init__(self, program: str, folder: Path) -> None:
        self.out = folder / "out"
        with self.out.open("w") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.await_line("up")

    @property
    def pid(self) -> int:
        return self._process.pid

    def await_line(self, line: str) -> None:
        deadline = time.monotonic() + 30
        while not re.search(f"^{line}$", self.out.read_text(), re.M):
            assert time.monotonic() < deadline, self.out.read_text()
            time.sleep(0.005)

    def tell(self, number: signal.Signals, line: str) -> None:
        os.kill(self.pid, number)
        self.await_line(line)

    def end(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Program]:
    made = Program(PROGRAM, tmp_path)
    yield made
    made.end()


@contextmanager
def source_of(program: Program) -> Iterator[UserSource]:
    options = SourceOptions(cgroup_name=f"passing-{os.getpid()}")
    with tempfile.TemporaryFile() as image, UserSource(program.pid, image.fileno(), options) as made:
        yield made


@pytest.fixture
def source(server: Program) -> Iterator[UserSource]:
    with source_of(server) as made:
        yield made


def later(act: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(0.2, act)
    timer.start()
    return timer


def is_born(server: Program) -> None:
    server.tell(signal.SIGUSR1, "born")


def is_confined(server: Program) -> None:
    server.tell(signal.SIGUSR2, "confined")


def ends_by_itself(server: Program) -> None:
    server.tell(signal.SIGUSR2, "ended 7")


def test_rounds_do_not_end_a_confined_process(server: Program, source: UserSource) -> None:
    source.survey()
    is_born(server)
    is_confined(server)
    source.instrument()
    source.round()
    source.round()
    source.thaw()
    ends_by_itself(server)


@pytest.mark.parametrize("rounds", [0, 1])
def test_what_was_put_into_a_process_is_taken_out_of_a_confined_one(
    server: Program, source: UserSource, rounds: int
) -> None:
    source.survey()
    is_born(server)
    source.instrument()
    for _ in range(rounds):
        source.round()
    is_confined(server)
    source.thaw()
    ends_by_itself(server)


def test_a_freeze_waits_for_the_end_of_a_confined_process(server: Program, source: UserSource) -> None:
    source.survey()
    is_born(server)
    source.instrument()
    is_confined(server)
    source.seize()
    ending = later(lambda: ends_by_itself(server))
    source.freeze()
    source.final()
    source.thaw()
    ending.join()
    server.await_line("ended 7")


def test_a_wait_ahead_of_the_freeze_ends_with_the_confined_process(server: Program, source: UserSource) -> None:
    source.survey()
    is_born(server)
    is_confined(server)
    source.instrument()
    assert not source.quiesce(0.01)
    ending = later(lambda: ends_by_itself(server))
    assert source.quiesce(30)
    ending.join()


def test_a_confined_process_that_stays_is_refused_and_goes_on(server: Program, source: UserSource) -> None:
    source.survey()
    is_born(server)
    is_confined(server)
    source.instrument()
    with pytest.raises(CheckpointFailed, match="runs under seccomp"):
        source.freeze()
    source.thaw()
    ends_by_itself(server)


def test_the_survey_waits_for_a_confined_process_that_has_just_begun(server: Program, source: UserSource) -> None:
    is_born(server)
    is_confined(server)
    ending = later(lambda: ends_by_itself(server))
    source.survey()
    ending.join()


def test_the_survey_refuses_a_confined_process_that_stays(server: Program, source: UserSource) -> None:
    is_born(server)
    is_confined(server)
    with pytest.raises(Refused, match="runs under seccomp"):
        source.survey()
    ends_by_itself(server)


def test_a_program_whose_system_calls_are_turned_into_signals_is_refused(tmp_path: Path) -> None:
    program = Program(DISPATCHES.replace("{act}", "dispatch()"), tmp_path)
    try:
        what = f"its thread {program.pid} has system calls turned into signals"
        with source_of(program) as source, pytest.raises(CheckpointFailed, match=what):
            source.instrument()
    finally:
        program.end()


def test_a_thread_whose_system_calls_are_turned_into_signals_is_refused(tmp_path: Path) -> None:
    program = Program(DISPATCHES.replace("{act}", "threading.Thread(target=dispatch).start()"), tmp_path)
    try:
        with source_of(program) as source:
            source.instrument()
            with pytest.raises(CheckpointFailed, match="has system calls turned into signals"):
                source.freeze()
    finally:
        program.end()


CLONES = """
import ctypes, os, signal, time
def born(*_):
    if ctypes.CDLL(None).syscall(56, {flags}, 0, 0, 0, 0) == 0:
        print("born", flush=True)
        time.sleep(100)
signal.signal(signal.SIGUSR1, born)
print("up", flush=True)
while True:
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("signal.SIGUSR2", f"tells its parent of its end by signal {int(signal.SIGUSR2)} and not SIGCHLD"),
        ("0x400 | signal.SIGCHLD", r"shares its table of descriptors \(CLONE_FILES\) with pid"),
        ("0x200 | signal.SIGCHLD", r"shares its working directory \(CLONE_FS\) with pid"),
    ],
)
def test_a_child_that_was_born_otherwise_than_by_fork_is_refused_at_the_freeze(
    flags: str, reason: str, tmp_path: Path
) -> None:
    program = Program(CLONES.format(flags=flags), tmp_path)
    try:
        with pytest.raises(CheckpointFailed, match=reason), source_of(program) as source:
            source.survey()
            source.instrument("user")
            program.tell(signal.SIGUSR1, "born")
            source.round()
            source.freeze()
    finally:
        program.end()
