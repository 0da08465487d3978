"""Asked and let go again, or left by an agent that was killed: the workload is as if nothing had been asked."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migrator.engine.base import SourceOptions
from migrator.engine.spawn import LOW_END
from migrator.engine.user.dump.source import UserSource
from migrator.errors import CheckpointFailed, MigratorError
from migrator.linux import cgroup, procfs, ptrace
from migrator.linux import x86_64 as arch
from migrator.testing.workloads import Workload, descendants

pytestmark = pytest.mark.root

XSTATE_BV = 512  # its place in the area that XSAVE writes
STAGES = ["survey", "instrument", "round", "freeze", "final", "hold"]
WORKLOADS = [("counter",), ("threads",), ("signals",), ("memory", 4, 10, "all"), ("tree", 8), ("heap.py", 2)]


def looks(pid: int) -> dict[str, Any]:
    """What can be seen of a process from outside that must not change by being looked at."""
    state = procfs.status(pid)
    kept = ("SigBlk", "SigIgn", "SigCgt", "Uid", "Gid", "Threads", "Seccomp", "TracerPid", "CapEff", "Umask")
    fds = sorted((fd, os.readlink(f"/proc/{pid}/fd/{fd}")) for fd in os.listdir(f"/proc/{pid}/fd"))
    maps = [v for v in procfs.maps(pid) if v.path not in ("[heap]", "[stack]")]
    where = Path(f"/proc/{pid}/cgroup").read_text()
    return {"fds": fds, "maps": maps, "cgroup": where, **{key: state[key] for key in kept}}


@pytest.mark.parametrize("last", STAGES)
def test_a_workload_that_is_thawed_is_as_it_was(last: str, tmp_path: Path) -> None:
    with Workload("counter", tmp_path) as counter, open(os.devnull, "wb") as sink:
        before = looks(counter.pid)
        with UserSource(counter.pid, sink.fileno(), SourceOptions(cgroup_name=f"untouched-{os.getpid()}")) as source:
            for stage in STAGES[: STAGES.index(last) + 1]:
                getattr(source, stage)()
            source.thaw()
        assert looks(counter.pid) == before
        counter.check_alive_and_progressing()
        counter.finish()


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: str(w[0]))
def test_a_workload_goes_on_after_being_thawed_at_every_stage(workload: tuple[Any, ...], tmp_path: Path) -> None:
    name, *arguments = workload
    with Workload(name, tmp_path, *arguments) as working, open(os.devnull, "wb") as sink:
        for count in range(1, len(STAGES) + 1):
            for _ in range(3):
                options = SourceOptions(cgroup_name=f"untouched-{os.getpid()}")
                with UserSource(working.pid, sink.fileno(), options) as source:
                    for stage in STAGES[:count]:
                        getattr(source, stage)()
                    source.thaw()
            working.check_alive_and_progressing(ticks=1)
        working.finish()


def test_a_remote_call_leaves_no_trace(tmp_path: Path) -> None:
    """Registers, extended state, masks and pending signals of every thread, after all that final() asks."""
    with Workload("threads", tmp_path) as threads, open(os.devnull, "wb") as sink:
        options = SourceOptions(cgroup_name=f"untouched-{os.getpid()}")
        with UserSource(threads.pid, sink.fileno(), options) as source:
            source.instrument("user")
            source.freeze()
            before = of_threads(source)
            for tid, thread in source.tree.living[0].threads.items():  # what the stop itself has to mend
                before[tid] = (bytes(thread.regs or b""), *before[tid][1:])
            source.final()
            assert of_threads(source) == before
            source.thaw()
        threads.check_alive_and_progressing()
        threads.finish()


def of_threads(source: UserSource) -> dict[int, tuple[Any, ...]]:
    """The extended state without XSTATE_BV: of a component that is all zero, the processor says as it likes
    whether it is in use, and the kernel fills in what is not."""
    (process,) = source.tree.living
    return {
        tid: (
            bytes(arch.get_regs(tid)),
            b"".join((state[:XSTATE_BV], state[XSTATE_BV + 8 :])),
            ptrace.get_sigmask(tid),
            ptrace.peek_siginfo(tid, shared=False),
            ptrace.peek_siginfo(tid, shared=True),
        )
        for tid in process.threads
        for state in [arch.get_xstate(tid)]
    }


def in_a_child(act: Callable[[], None]) -> int:
    """Run `act` in a child of ours that can be killed at any time; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(0)
    return pid


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: str(w[0]))
def test_a_workload_survives_its_agent_being_killed_at_any_moment(workload: tuple[Any, ...], tmp_path: Path) -> None:
    name, *arguments = workload
    chance = random.Random(name)
    group = f"untouched-{os.getpid()}"

    def save() -> None:
        options = SourceOptions(cgroup_name=group)
        with open(os.devnull, "wb") as sink, UserSource(working.pid, sink.fileno(), options) as source:
            for stage in STAGES:
                getattr(source, stage)()
            source.thaw()

    with Workload(name, tmp_path, *arguments) as working:
        begun = time.monotonic()
        os.waitpid(in_a_child(save), 0)
        whole = time.monotonic() - begun
        for _ in range(25):
            agent = in_a_child(save)
            time.sleep(chance.random() * whole * 1.1)
            os.kill(agent, signal.SIGKILL)
            os.waitpid(agent, 0)
            # what a journal would do: whoever finds the cgroup frozen thaws it
            folder = cgroup.hierarchy().mountpoint / cgroup.PARENT / group
            if folder.exists():
                with cgroup.Cgroup.at(folder) as left:
                    left.thaw()
            working.check_alive_and_progressing(ticks=1)
        options = SourceOptions(cgroup_name=f"{group}-last")
        with open(os.devnull, "wb") as sink, UserSource(working.pid, sink.fileno(), options) as source:
            source.instrument("user")  # one that is not killed takes out what others have left
            source.thaw()
        assert [
            v for pid in [working.pid, *descendants(working.pid)] for v in procfs.maps(pid) if v.start < LOW_END
        ] == []
        working.finish()
        for left_over in cgroup.hierarchy().mountpoint.glob(f"{cgroup.PARENT}/{group}"):
            with cgroup.Cgroup.at(left_over) as left:
                left.remove()


@pytest.mark.parametrize("last", ["instrument", "round", "freeze", "final"])
@pytest.mark.parametrize("victim", ["counter", "tree"])
def test_a_workload_killed_in_between_ends_the_attempt_and_nothing_else(last: str, victim: str, tmp_path: Path) -> None:
    with Workload(victim, tmp_path) as killed, open(os.devnull, "wb") as sink:
        group = f"untouched-{os.getpid()}"
        with (
            pytest.raises(MigratorError),
            UserSource(killed.pid, sink.fileno(), SourceOptions(cgroup_name=group)) as source,
        ):
            for stage in STAGES[: STAGES.index(last) + 1]:
                getattr(source, stage)()
            os.kill(killed.pid, signal.SIGKILL)
            deadline = time.monotonic() + 5
            while killed.alive() and time.monotonic() < deadline:
                time.sleep(0.005)
            for stage in STAGES[STAGES.index(last) + 1 :]:
                getattr(source, stage)()
            source.thaw()
            raise CheckpointFailed("held, and gone")
        assert not (cgroup.hierarchy().mountpoint / cgroup.PARENT / group).exists()
