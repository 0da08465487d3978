"""Processes that end or become other programs at the worst moment: while the tree is being looked at."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrator.engine.base import SourceOptions
from migrator.engine.user.dump import instrument
from migrator.engine.user.dump.process_tree import ProcessTree
from migrator.engine.user.dump.source import UserSource
from migrator.linux import procfs
from migrator.linux.remote import Remote, RemoteError
from migrator.testing.workloads import Workload

pytestmark = pytest.mark.root

# Has two children end and reaps the first when told to; a grandchild is left to whoever adopts it.
PARENT = """
import os, sys, time
first, second = os.fork(), 0
if not first: os._exit(3)
second = os.fork()
if not second: os._exit(4)
print(first, second, flush=True)
sys.stdin.readline()
os.waitpid(first, 0)
print("reaped", flush=True)
time.sleep(60)
"""


@contextmanager
def parent() -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        first, second = map(int, process.stdout.readline().split())
        try:
            while any(procfs.stat(pid)[3] != "Z" for pid in (first, second)):
                time.sleep(0.001)
            yield process, first, second
        finally:
            process.kill()


def test_a_zombie_that_is_reaped_before_its_parent_is_stopped_is_no_part_of_the_tree() -> None:
    with parent() as (process, first, second):
        tree = ProcessTree(process.pid, lambda: procfs.descendants(process.pid))
        tree.seize()
        assert {p.pid for p in tree.processes.values() if p.zombie} == {first, second}
        assert process.stdin and process.stdout
        print("now", file=process.stdin, flush=True)
        assert process.stdout.readline() == "reaped\n"
        try:
            tree.stop()
            assert set(tree.processes) == {process.pid, second}
        finally:
            tree.detach()
            tree.close()


def test_a_zombie_whose_parent_is_not_in_the_tree_is_no_part_of_it_once_it_is_stopped() -> None:
    """Whoever adopted it may reap it at any time, and nobody at the destination ever would."""
    with parent() as (process, first, second), parent() as (_, other, _other):
        tree = ProcessTree(process.pid, lambda: [*procfs.descendants(process.pid), other])
        try:
            tree.seize()
            assert other in tree.processes
            tree.stop()
            assert set(tree.processes) == {process.pid, first, second}
        finally:
            tree.detach()
            tree.close()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EFAULT, "process_vm_readv: short read"),
        RemoteError(errno.ENOENT, "no syscall instruction in the vdso"),
    ],
    ids=str,
)
def test_a_process_that_becomes_another_program_while_it_is_armed_is_armed_later(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Remote):
        tries = 0

        def prepare(self) -> None:
            Late.tries += 1
            if Late.tries == 1:
                raise error
            super().prepare()

    monkeypatch.setattr(instrument, "Remote", Late)
    with Workload("counter", tmp_path) as counter, open(os.devnull, "wb") as sink:
        options = SourceOptions(cgroup_name=f"late-{os.getpid()}")
        with UserSource(counter.pid, sink.fileno(), options) as source:
            source.instrument("user")
            source.round()
            assert Late.tries == 2
            second = source.round()
            assert second.pages < 200  # it is tracked: only what it wrote since
            source.thaw()
        counter.check_alive_and_progressing()
        counter.finish()
