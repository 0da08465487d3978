"""The kernel engine with its two system calls played by others: what it does around them, on any kernel.

`Checkpoint` stands for checkpoint(); a program of some bytes, which reads its stream to the end and tells what it is
to tell, for the process that calls restart(). With the calls themselves it is tested in guests (tests/vm).
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from select import poll

import pytest

from migrator.engine.base import (
    AfterCheckpoint,
    CheckpointFlags,
    CheckpointHooks,
    DestinationOptions,
    RestartFlags,
    SourceOptions,
)
from migrator.engine.kernel import calls
from migrator.engine.kernel.caller import Caller
from migrator.engine.kernel.engine import KernelEngine
from migrator.engine.select import select
from migrator.errors import CheckpointFailed, ImageError, Refused, RestartFailed, UsageError
from migrator.image import records as r
from migrator.linux import cgroup, procfs
from migrator.linux import x86_64 as arch
from migrator.testing.workloads import Workload
from tests.unit import image_samples

SUBTREE = CheckpointFlags.SUBTREE
HEAD = image_samples.header().encode() + image_samples.header_x86().encode()
PLAIN = DestinationOptions(verify=False)
IMAGE = HEAD + image_samples.tree().encode() + r.Trailer(r.TRAILER_MAGIC, 4).encode()

# Reads `stream` to its end. Then it writes `result` to `status`, or closes that if it is 0; and waits.
_FAKE_RESTART = (
    "4881ec0010000089df4889e6ba0010000031c00f0585c07fee48b8",
    "4885c074174889042489ef4889e6ba08000000b8010000000f05eb0989efb8030000000f05b8220000000f05ebf7",
)


def fake_restart(result: int) -> Callable[[int, int, int], bytes]:
    def code(stream: int, status: int, unshare: int) -> bytes:
        begin, rest = map(bytes.fromhex, _FAKE_RESTART)
        descriptors = struct.pack("<Bi", 0xBB, stream) + struct.pack("<Bi", 0xBD, status)
        return descriptors + begin + struct.pack("<q", result) + rest

    return code


class Checkpoint:
    """checkpoint() as it is played: each call takes the next of `plan`, what to write or an error, written too."""

    def __init__(self, *plan: Exception | bytes) -> None:
        self.plan = list(plan)
        self.frozen: list[bool] = []

    def __call__(self, pid: int, fd: int, flags: int) -> int:
        group = cgroup.Cgroup.of(pid)
        self.frozen.append(group.frozen)
        group.close()
        step = self.plan.pop(0)
        if isinstance(step, Exception):
            os.write(fd, r.Error(str(step)).encode())
            raise step
        os.write(fd, step)
        return 1


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Workload]:
    with Workload("counter", tmp_path) as counter:
        yield counter


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Checkpoint]:
    def play(*plan: Exception | bytes) -> Checkpoint:
        made = Checkpoint(*plan)
        monkeypatch.setattr(calls, "checkpoint", made)
        monkeypatch.setattr(calls, "mute", lambda _pid, _flags: 0)
        return made

    return play


def where(pid: int) -> str:
    return cgroup.directory_of(pid)


# ---------------------------------------------------------------------- saving


def test_a_tree_is_frozen_while_it_is_saved_and_runs_on_where_it_was(
    program: Workload, tmp_path: Path, played: Callable[..., Checkpoint]
) -> None:
    before, fake = where(program.pid), played(b"round", b"dry", IMAGE)
    with open(tmp_path / "image", "wb", buffering=0) as image:
        assert KernelEngine().checkpoint(program.pid, image.fileno(), SUBTREE) > 0
    assert (tmp_path / "image").read_bytes() == IMAGE, "the rehearsal goes nowhere"
    assert fake.frozen == [False, True, True], "its memory goes ahead of the rehearsal as well"
    assert where(program.pid) == before
    program.check_alive_and_progressing()


def test_with_kill_nothing_is_left_of_it(program: Workload, tmp_path: Path, played: Callable[..., Checkpoint]) -> None:
    played(b"round", b"dry", IMAGE)
    pid, seen = program.pid, []

    class Hooks(CheckpointHooks):
        def ending(self) -> None:
            seen.append(where(pid))

    with open(tmp_path / "image", "wb", buffering=0) as image:
        KernelEngine().checkpoint(pid, image.fileno(), SUBTREE, after=AfterCheckpoint.KILL, hooks=Hooks())
    assert not program.alive(pid)
    assert seen and not os.path.exists(seen[0])


def test_left_stopped_it_goes_on_by_sigcont(
    program: Workload, tmp_path: Path, played: Callable[..., Checkpoint]
) -> None:
    played(b"round", b"dry", IMAGE)
    with open(tmp_path / "image", "wb", buffering=0) as image:
        KernelEngine().checkpoint(program.pid, image.fileno(), SUBTREE, after=AfterCheckpoint.STOP)
    deadline = time.monotonic() + 10
    while procfs.stat(program.pid)[3] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(program.pid, signal.SIGCONT)
    program.check_alive_and_progressing()


def test_what_the_kernel_refuses_is_refused_by_the_survey_and_it_runs_on(
    program: Workload, played: Callable[..., Checkpoint]
) -> None:
    before = where(program.pid)
    fake = played(*[CheckpointFailed("task 7, descriptor 3: a device")] * 4)
    with (
        KernelEngine().source(program.pid, -1, SourceOptions()) as source,
        pytest.raises(Refused, match="task 7, descriptor 3: a device"),
    ):
        source.survey()
    assert fake.plan == []
    assert where(program.pid) == before
    program.check_alive_and_progressing()


@pytest.mark.parametrize(
    "moment",
    [
        calls.NotNow("a connection waits to be accepted"),
        CheckpointFailed("task 7, descriptor 8: /7/stat is about a task, and would be about another"),
    ],
    ids=["on its way", "open for a moment"],
)
def test_what_is_there_for_a_moment_is_asked_about_again(
    program: Workload, played: Callable[..., Checkpoint], moment: CheckpointFailed
) -> None:
    fake = played(b"round", moment, b"round", b"dry")
    with KernelEngine().source(program.pid, -1, SourceOptions()) as source:
        assert program.pid in source.survey().pids
    assert fake.plan == []
    program.check_alive_and_progressing()


def test_a_failure_in_the_freeze_lets_it_run_and_ends_the_stream_with_its_cause(
    program: Workload, tmp_path: Path, played: Callable[..., Checkpoint]
) -> None:
    before = where(program.pid)
    played(b"round", b"dry", CheckpointFailed("it ran"))
    with open(tmp_path / "image", "wb", buffering=0) as image, pytest.raises(CheckpointFailed, match="it ran"):
        KernelEngine().checkpoint(program.pid, image.fileno(), SUBTREE)
    assert (tmp_path / "image").read_bytes() == r.Error("it ran").encode()
    assert where(program.pid) == before
    program.check_alive_and_progressing()


def test_the_survey_counts_what_there_is(program: Workload, played: Callable[..., Checkpoint]) -> None:
    played(b"round", b"dry")
    with KernelEngine().source(program.pid, -1, SourceOptions()) as source:
        found = source.survey()
    assert (found.pids, found.threads, found.wanted_pids) == ([program.pid], 1, [program.pid])
    assert found.work is not None and found.work.processes == 1
    assert os.path.realpath(f"/proc/{program.pid}/exe") in [fact.path for fact in found.files]


def test_a_survey_that_is_killed_leaves_the_tree_running(program: Workload, tmp_path: Path) -> None:
    """The rehearsal has frozen it by then: who waits for our end thaws it."""
    script = (
        "import sys, time; from migrator.engine.kernel import calls; from migrator.engine.base import SourceOptions\n"
        "from migrator.engine.kernel.engine import KernelEngine\n"
        "def stay(pid, fd, flags):\n"
        "    if flags & calls.LAST: print('frozen', flush=True); time.sleep(60)\n"
        "calls.checkpoint = stay\n"
        "KernelEngine().source(int(sys.argv[1]), -1, SourceOptions()).survey()"
    )
    command = [sys.executable, "-c", script, str(program.pid)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "frozen\n"
        with cgroup.Cgroup.of(program.pid) as group:
            assert group.frozen
        child.kill()
    program.check_alive_and_progressing()
    left = where(program.pid)
    program.kill()
    os.rmdir(left)


def test_a_connection_that_would_stay_behind_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = (
            f"import socket, time; s = socket.create_connection(('127.0.0.1', {port})); "
            "print('x', flush=True); time.sleep(60)"
        )
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
            try:
                assert child.stdout is not None and child.stdout.readline()
                with (
                    KernelEngine().source(child.pid, -1, SourceOptions()) as source,
                    pytest.raises(Refused, match=f"to 127.0.0.1:{port} would stay behind"),
                ):
                    source.survey()
            finally:
                child.kill()


def test_a_connection_that_waits_to_be_accepted_is_waited_for_and_then_named(
    tmp_path: Path, played: Callable[..., Checkpoint]
) -> None:
    script = (
        "import signal, socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)\n"
        "signal.sigwait([signal.SIGUSR1]); s.accept(); print('accepted', flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [10])\n{script}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        try:
            with (
                socket.create_connection(("127.0.0.1", port)),
                KernelEngine().source(child.pid, -1, SourceOptions()) as source,
            ):
                assert not source.quiesce(0.01)
                with pytest.raises(calls.NotNow, match=rf"pid {child.pid} fd \d+: a connection waits to be accepted"):
                    source.freeze()
                child.send_signal(signal.SIGUSR1)
                assert child.stdout.readline() == "accepted\n"
                assert source.quiesce(5)
                source.freeze()
                source.thaw()
        finally:
            child.kill()


def test_a_child_that_has_the_memory_of_its_parent_is_waited_for_and_then_named(
    tmp_path: Path, played: Callable[..., Checkpoint]
) -> None:
    """Between vfork(2) and execve(2), as long as nobody writes to what it is to have as its standard input."""
    os.mkfifo(fifo := tmp_path / "fifo")
    script = (
        "import os, signal, sys; os.posix_spawn('/bin/sleep', ['sleep', '60'], {}, "
        "file_actions=[(os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)]); print('spawned', flush=True); "
        "signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(fifo)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        tree = [child.pid]
        try:
            while len(tree := procfs.descendants(child.pid)) < 2:
                time.sleep(0.01)
            with KernelEngine().source(child.pid, -1, SourceOptions()) as source:
                assert not source.quiesce(0.01)
                with pytest.raises(calls.NotNow, match=rf"pid {tree[1]} shares its memory with pid {child.pid}"):
                    source.freeze()
                with fifo.open("w"):
                    assert child.stdout.readline() == "spawned\n"
                    assert source.quiesce(5)
                    source.freeze()
                    source.thaw()
        finally:
            for pid in reversed(tree):
                os.kill(pid, signal.SIGKILL)


def test_a_program_cannot_have_the_kernel_save_the_tree_that_it_is_in() -> None:
    with pytest.raises(UsageError, match="cannot leave it out"):
        KernelEngine().source(os.getpid(), -1, SourceOptions())


# ---------------------------------------------------------------------- restarting


def free_pid() -> int:
    top = int(Path("/proc/sys/kernel/pid_max").read_text())
    return next(pid for pid in range(top - 2, 300, -1) if not os.path.exists(f"/proc/{pid}"))


def image_of(pid: int, path: Path) -> Path:
    tree = r.Tree(1, [r.TaskPids(pid, pid, 0, pid, pid, 0)])
    path.write_bytes(HEAD + tree.encode() + r.Trailer(r.TRAILER_MAGIC, 4).encode())
    return path


@pytest.fixture
def image(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """(descriptor of an image, the pid of its root)."""
    pid = free_pid()
    with open(image_of(pid, tmp_path / "image"), "rb", buffering=0) as file:
        yield file.fileno(), pid


def test_a_copy_is_complete_and_frozen_before_it_runs(image: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    fd, pid = image
    monkeypatch.setattr(arch, "caller_code", fake_restart(0))
    with KernelEngine().destination(fd, PLAIN) as destination:
        assert destination.build() == pid
        assert where(pid) == destination.cgroup
        destination.hold()
        with cgroup.Cgroup.at(destination.cgroup) as group:
            assert group.frozen
            destination.resume()
            assert not group.frozen
        destination.tidy()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.rmdir(destination.cgroup)


def test_restart_leaves_it_frozen_if_that_was_asked(image: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    fd, pid = image
    monkeypatch.setattr(arch, "caller_code", fake_restart(0))
    assert KernelEngine().restart(fd, RestartFlags.FROZEN, options=PLAIN) == pid
    with cgroup.Cgroup.of(pid) as group:
        assert group.frozen
        group.kill()
        os.waitpid(pid, 0)
        group.remove()


@pytest.mark.parametrize("held", [False, True])
def test_a_copy_that_is_discarded_leaves_nothing(
    image: tuple[int, int], monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    fd, pid = image
    monkeypatch.setattr(arch, "caller_code", fake_restart(0))
    with KernelEngine().destination(fd, PLAIN) as destination:
        destination.build()
        if held:
            destination.hold()
        destination.discard()
        destination.discard()
    assert not os.path.exists(f"/proc/{pid}")
    assert not os.path.exists(destination.cgroup)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EBADMSG, ImageError),
        (errno.ENODATA, ImageError),
        (errno.EEXIST, RestartFailed),
        (errno.EPERM, RestartFailed),
    ],
)
def test_an_error_of_restart_says_which_it_is_and_leaves_nothing(
    image: tuple[int, int], monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    fd, pid = image
    monkeypatch.setattr(arch, "caller_code", fake_restart(-number))
    with KernelEngine().destination(fd, PLAIN) as destination, pytest.raises(kind, match=os.strerror(number)):
        destination.build()
    assert not os.path.exists(f"/proc/{pid}")
    assert not os.path.exists(destination.cgroup)


def test_a_stream_that_ends_ahead_of_its_tree_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(HEAD)
    with (
        open(tmp_path / "cut", "rb", buffering=0) as cut,
        KernelEngine().destination(cut.fileno(), PLAIN) as destination,
        pytest.raises(ImageError, match="trailer"),
    ):
        destination.build()


def test_a_pid_that_is_taken_is_named(tmp_path: Path) -> None:
    with (
        open(image_of(os.getpid(), tmp_path / "image"), "rb", buffering=0) as file,
        KernelEngine().destination(file.fileno(), PLAIN) as destination,
        pytest.raises(RestartFailed, match=f"pid {os.getpid()} is taken"),
    ):
        destination.build()


def test_a_second_look_is_refused_and_not_left_out(image: tuple[int, int]) -> None:
    with (
        KernelEngine().destination(image[0], DestinationOptions(verify=True)) as destination,
        pytest.raises(RestartFailed, match="--verify"),
    ):
        destination.build()


@pytest.mark.skipif(calls.probe()[0].available, reason="this kernel has the calls")
@pytest.mark.parametrize("said", [False, True], ids=["before it is said", "after"])
def test_who_calls_restart_ends_when_nobody_asks_how_it_went(said: bool) -> None:
    caller = Caller.start(free_pid())
    caller.go()
    if said:
        waiting = poll()
        waiting.register(caller._status)
        waiting.poll()
    caller.close()
    end = os.waitpid(caller.pid, 0)[1]
    assert os.waitstatus_to_exitcode(end) == 1


# ---------------------------------------------------------------------- what there is


@pytest.mark.skipif(calls.probe()[0].available, reason="this kernel has the calls")
def test_on_a_stock_kernel_it_is_refused_with_the_reason() -> None:
    found = KernelEngine().probe()
    assert [one.available for one in found] == [False, False]
    assert all(os.strerror(errno.ENOSYS) in one.detail for one in found)
    with pytest.raises(Refused, match=r"engine kernel: no checkpoint\(\) \(system call 548"):
        select("kernel")
    chosen = select()
    assert (chosen.engine.name, "engine kernel: no checkpoint()" in chosen.reason) == ("user", True)
