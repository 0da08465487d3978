"""A copy that is not what was saved never runs: the second look finds it. Every other test here runs it too."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from migrator.engine.base import AfterCheckpoint, CheckpointFlags, DestinationOptions, RestartFlags
from migrator.engine.user.dump.source import UserSource
from migrator.engine.user.engine import UserEngine
from migrator.engine.user.restore.stub import Stub
from migrator.engine.user.restore.tasks import TaskRestore
from migrator.errors import RestartFailed
from migrator.linux import procfs, sys
from migrator.testing.workloads import Workload

pytestmark = pytest.mark.root


def saved(workload: Workload, path: Path) -> Path:
    with path.open("wb") as image:
        UserEngine().checkpoint(workload.pid, image.fileno(), CheckpointFlags.SUBTREE, after=AfterCheckpoint.KILL)
    return path


def restart(path: Path, *, verify: bool) -> int:
    with path.open("rb") as image:
        return UserEngine().restart(image.fileno(), RestartFlags(0), options=DestinationOptions(verify=verify))


def forgets_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = TaskRestore.finish

    def careless(self: TaskRestore, stubs: Sequence[Stub]) -> None:
        self.tasks[stubs[0].vpid].task.blocked ^= 1 << (signal.SIGUSR2 - 1)
        finish(self, stubs)
        self.tasks[stubs[0].vpid].task.blocked ^= 1 << (signal.SIGUSR2 - 1)

    monkeypatch.setattr(TaskRestore, "finish", careless)


def spoils_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = TaskRestore.finish

    def careless(self: TaskRestore, stubs: Sequence[Stub]) -> None:
        finish(self, stubs)
        data = next(vma for vma in procfs.maps(stubs[0].pid) if vma.write and not vma.path)
        stubs[0].mem.write(data.start, b"spoilt")

    monkeypatch.setattr(TaskRestore, "finish", careless)


@pytest.mark.parametrize(("spoil", "where"), [(forgets_a_mask, "blocked"), (spoils_a_page, "page 0x")])
def test_a_copy_that_differs_is_discarded_before_it_runs(
    spoil: Any, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Workload("counter", tmp_path) as counter:
        image = saved(counter, tmp_path / "image")
        count = counter.ticks()
        spoil(monkeypatch)
        with pytest.raises(RestartFailed, match=f"differs from what was saved: .*{where}"):
            restart(image, verify=True)
        assert not os.path.exists(f"/proc/{counter.pid}")
        assert counter.ticks() == count
        monkeypatch.undo()
        pid = restart(image, verify=True)
        counter.adopt(pid)
        counter.check_alive_and_progressing()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def spoils_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = TaskRestore.finish

    def careless(self: TaskRestore, stubs: Sequence[Stub]) -> None:
        finish(self, stubs)
        shared = next(vma for vma in procfs.maps(stubs[0].pid) if vma.shared and vma.path == "/dev/zero (deleted)")
        stubs[0].mem.write(shared.start + 4096, b"spoilt")

    monkeypatch.setattr(TaskRestore, "finish", careless)


def test_shared_memory_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Workload("memory", tmp_path, 4) as memory:
        image = saved(memory, tmp_path / "image")
        spoils_shared_memory(monkeypatch)
        with pytest.raises(RestartFailed, match=r"differs from what was saved: .*page 0x1000:"):
            restart(image, verify=True)
        assert not os.path.exists(f"/proc/{memory.pid}")


def test_a_copy_ignores_no_signal_that_its_maker_ignores(tmp_path: Path) -> None:
    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN  # as in every Python
    with Workload("counter", tmp_path) as counter:
        before = procfs.status(counter.pid)["SigIgn"]
        pid = restart(saved(counter, tmp_path / "image"), verify=False)
        counter.adopt(pid)
        assert procfs.status(pid)["SigIgn"] == before
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("whole", [True, False], ids=["process", "thread"])
def test_a_stop_that_comes_in_the_freeze_is_not_lost(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = UserSource.final

    def stopped_meanwhile(self: UserSource, *args: Any) -> None:
        os.kill(self.pid, signal.SIGSTOP) if whole else sys.libc("tgkill", self.pid, self.pid, signal.SIGSTOP)
        final(self, *args)

    with Workload("counter", tmp_path) as counter:
        counter.check_alive_and_progressing()
        monkeypatch.setattr(UserSource, "final", stopped_meanwhile)
        path = saved(counter, tmp_path / "image")
        counter.adopt(pid := restart(path, verify=True))
        deadline = time.monotonic() + 10
        while procfs.stat(pid)[3] != "T":
            assert time.monotonic() < deadline, procfs.stat(pid)[3]
            time.sleep(0.01)
        os.kill(pid, signal.SIGCONT)
        counter.check_alive_and_progressing()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
