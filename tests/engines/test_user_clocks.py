"""The clocks that tasks see go on from where they stood, on a host that has been up for another time."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pidhosts import HostedWorkload, PidHost, migrate, restore_from_file, save_to_file

from migrator.engine.clocks import clock_offsets
from migrator.linux import procfs, sys

pytestmark = pytest.mark.root

AHEAD = 100_000  # seconds
OLDER_HOST = ("unshare", "--time", "--monotonic", str(AHEAD), "--boottime", str(AHEAD))


@pytest.fixture
def hosts() -> Iterator[tuple[PidHost, PidHost]]:
    with PidHost("a") as a, PidHost("b") as b:
        yield a, b


@pytest.mark.parametrize("workload", ["threads", "memory", "signals"])
def test_absolute_timeouts_hold_on_a_host_that_booted_later(
    workload: str, hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    here, there = hosts
    with HostedWorkload(here, workload, tmp_path, prefix=OLDER_HOST) as moving:
        for _ in range(2):
            migrate(moving, here, there)
            monotonic, boottime = clock_offsets(moving.pid)
            assert abs(monotonic - AHEAD * 10**9) < 10**8
            assert abs(boottime - AHEAD * 10**9) < 10**8
            moving.check_alive_and_progressing()
            here, there = there, here
        moving.finish()


def test_a_host_with_the_same_clocks_needs_no_time_namespace(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    with HostedWorkload(hosts[0], "counter", tmp_path) as moving:
        migrate(moving, *hosts)
        assert Path(f"/proc/{moving.pid}/ns/time").readlink() == Path("/proc/self/ns/time").readlink()
        moving.finish()


def test_from_a_file_the_clocks_go_on_from_the_checkpoint(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    with HostedWorkload(hosts[0], "threads", tmp_path) as moving:
        save_to_file(moving, hosts[0], tmp_path / "image")
        stopped = time.monotonic_ns()
        time.sleep(1.0)
        restore_from_file(moving, hosts[1], tmp_path / "image")
        monotonic, _ = clock_offsets(moving.pid)
        lag = time.monotonic_ns() - stopped
        assert -lag - 10**8 < monotonic < -(10**9) + 10**8
        moving.check_alive_and_progressing()
        moving.finish()


def test_an_agent_in_a_time_namespace_of_its_own_tells_the_time_of_the_tasks(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    """Inside of one, the host's clocks and the agent's differ: both sides must mean the same."""
    with HostedWorkload(hosts[0], "threads", tmp_path) as moving:
        before = time.monotonic_ns()
        save_to_file(moving, hosts[0], tmp_path / "image")
        hosts[1].call("run", enter_older_time)
        restore_from_file(moving, hosts[1], tmp_path / "image")
        monotonic, _ = clock_offsets(moving.pid)
        assert -(10**10) < time.monotonic_ns() + monotonic - before < 10**10
        moving.check_alive_and_progressing()
        moving.finish()


def enter_older_time() -> None:
    """Move this process to a time namespace whose clocks are AHEAD seconds older: by a child that holds it."""
    with subprocess.Popen([*OLDER_HOST, "sleep", "30"]) as child:
        try:
            while procfs.status(child.pid)["Name"] != "sleep":
                time.sleep(0.01)
            fd = os.open(f"/proc/{child.pid}/ns/time", os.O_RDONLY)
            sys.libc("setns", fd, 0x80)
            os.close(fd)
        finally:
            child.kill()
