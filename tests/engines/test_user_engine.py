"""The two calls of the contract, checkpoint and restart, on the user engine."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from migrator.engine.base import AfterCheckpoint, CheckpointFlags, RestartFlags
from migrator.engine.user.dump.source import UserSource
from migrator.engine.user.engine import UserEngine
from migrator.errors import Fate, ImageError, MigratorError, RestartFailed, UsageError, WorkloadEnded
from migrator.linux import cgroup, procfs
from migrator.testing.workloads import Workload

pytestmark = pytest.mark.root

SUBTREE = CheckpointFlags.SUBTREE
RUNNING = RestartFlags(0)


def checkpoint(workload: Workload, path: Path, after: AfterCheckpoint) -> int:
    with path.open("wb") as image:
        return UserEngine().checkpoint(workload.pid, image.fileno(), SUBTREE, after=after)


def restart(path: Path, flags: RestartFlags = RUNNING) -> int:
    with path.open("rb") as image:
        return UserEngine().restart(image.fileno(), flags)


def end(workload: Workload, pid: int) -> None:
    """A restarted root is a child of ours: end it and reap it."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_program_runs_on_after_a_checkpoint(tmp_path: Path) -> None:
    with Workload("counter", tmp_path) as counter:
        assert checkpoint(counter, tmp_path / "image", AfterCheckpoint.RUN) > 0
        counter.check_alive_and_progressing()
        counter.finish()


def test_a_program_counts_on_from_where_it_was_killed(tmp_path: Path) -> None:
    with Workload("counter", tmp_path) as counter:
        counter.check_alive_and_progressing()
        checkpoint(counter, tmp_path / "image", AfterCheckpoint.KILL)
        assert not counter.alive()
        count = counter.ticks()
        pid = restart(tmp_path / "image")
        assert pid == counter.pid
        counter.adopt(pid)
        lines = counter.wait_for(lambda lines: len(lines) > count + 5)
        numbers = [int(line.split()[1]) for line in lines if line.startswith("tick")]
        assert numbers == list(range(1, len(numbers) + 1))
        end(counter, pid)


def test_a_program_left_stopped_goes_on_with_sigcont(tmp_path: Path) -> None:
    with Workload("counter", tmp_path) as counter:
        checkpoint(counter, tmp_path / "image", AfterCheckpoint.STOP)
        time.sleep(0.05)
        assert procfs.stat(counter.pid)[3] == "T"
        os.kill(counter.pid, signal.SIGCONT)
        counter.check_alive_and_progressing()


def test_a_program_restarted_frozen_runs_when_its_cgroup_is_thawed(tmp_path: Path) -> None:
    with Workload("counter", tmp_path) as counter:
        checkpoint(counter, tmp_path / "image", AfterCheckpoint.KILL)
        pid = restart(tmp_path / "image", RestartFlags.FROZEN)
        counter.adopt(pid)
        before = counter.ticks()
        time.sleep(0.1)
        assert counter.ticks() == before
        with cgroup.Cgroup.of(pid) as group:
            group.thaw()
            counter.check_alive_and_progressing()
            end(counter, pid)
            group.remove()


def test_the_same_image_restarts_as_often_as_one_likes(tmp_path: Path) -> None:
    with Workload("memory", tmp_path, 4, 10, "plain") as memory:
        checkpoint(memory, tmp_path / "image", AfterCheckpoint.KILL)
        for _ in range(3):
            pid = restart(tmp_path / "image")
            memory.adopt(pid)
            memory.check_alive_and_progressing(ticks=1)
            end(memory, pid)


def test_a_pid_that_is_taken_is_said_to_be(tmp_path: Path) -> None:
    with Workload("counter", tmp_path) as counter:
        checkpoint(counter, tmp_path / "image", AfterCheckpoint.RUN)
        with pytest.raises(RestartFailed, match=f"pid {counter.pid} is taken"):
            restart(tmp_path / "image")
        counter.check_alive_and_progressing()


@pytest.mark.parametrize("part", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_an_image_that_is_cut_short_restarts_nothing(part: float, tmp_path: Path) -> None:
    with Workload("threads", tmp_path) as threads:
        checkpoint(threads, tmp_path / "image", AfterCheckpoint.KILL)
        image = (tmp_path / "image").read_bytes()
        (tmp_path / "cut").write_bytes(image[: int(len(image) * part)])
        with pytest.raises(ImageError):
            restart(tmp_path / "cut")
        assert not os.path.exists(f"/proc/{threads.pid}")
        assert not list((cgroup.hierarchy().mountpoint / cgroup.PARENT).glob(f"restart-{threads.pid}-*"))


def test_a_program_that_is_no_container_needs_the_subtree_flag(tmp_path: Path) -> None:
    with Workload("counter", tmp_path) as counter, open(os.devnull, "wb") as sink:
        with pytest.raises(UsageError, match="not the init task of a container"):
            UserEngine().checkpoint(counter.pid, sink.fileno())
        counter.check_alive_and_progressing()


def test_there_must_be_such_a_process() -> None:
    with open(os.devnull, "wb") as sink, pytest.raises(UsageError, match="no process"):
        UserEngine().checkpoint(1 << 22, sink.fileno(), SUBTREE)


def test_a_stream_that_breaks_leaves_the_program_running(tmp_path: Path) -> None:
    with Workload("memory", tmp_path, 4) as memory:
        reader, writer = os.pipe()
        os.close(reader)
        with pytest.raises((OSError, MigratorError)):
            UserEngine().checkpoint(memory.pid, writer, SUBTREE)
        os.close(writer)
        memory.check_alive_and_progressing(ticks=1)
        memory.finish()


@pytest.mark.parametrize("step", ["survey", "instrument", "freeze"])
def test_a_program_that_ends_meanwhile_is_said_to_have_ended(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = getattr(UserSource, step)

    def and_killed(source: UserSource) -> object:
        result = plain(source)
        os.kill(source.pid, signal.SIGKILL)
        return result

    monkeypatch.setattr(UserSource, step, and_killed)
    with Workload("threads", tmp_path) as threads:
        with pytest.raises(WorkloadEnded, match=f"pid {threads.pid} ended by itself") as failed:
            checkpoint(threads, tmp_path / "image", AfterCheckpoint.RUN)
        assert failed.value.fate is Fate.ENDED


def test_everything_that_the_engine_needs_is_here() -> None:
    capabilities = {c.name: c for c in UserEngine().probe()}
    assert {"clone3", "ptrace", "xsave", "kcmp", "dirty tracking", "freezer cgroup"} <= capabilities.keys()
    assert all(c.available for c in capabilities.values()), capabilities
