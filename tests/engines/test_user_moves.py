"""Every workload moves there and back while it runs, and its own checks pass all the time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pidhosts import HostedWorkload, PidHost, migrate, restore_from_file, save_to_file, try_in_vain

pytestmark = pytest.mark.root

WORKLOADS = [
    ("counter",),
    ("memory", 8, 10, "plain"),
    ("memory", 8, 10, "all"),
    ("threads",),
    ("threads", 50),
    ("tree", 12),
    ("tree", 12, "churn"),
    ("signals",),
    ("fp",),
    ("creds",),
    ("heap.py", 8),
    ("pipeline.sh",),
]


@pytest.fixture
def hosts() -> Iterator[tuple[PidHost, PidHost]]:
    with PidHost("a") as a, PidHost("b") as b:
        yield a, b


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: " ".join(map(str, w)))
def test_a_workload_moves_live_there_and_back_several_times(
    workload: tuple[object, ...], hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    here, there = hosts
    name, *arguments = workload
    with HostedWorkload(here, str(name), tmp_path, *arguments) as moving:
        for _ in range(4):
            migrate(moving, here, there)
            moving.check_alive_and_progressing()
            here, there = there, here
        moving.finish()


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: " ".join(map(str, w)))
def test_a_workload_restarts_from_a_file_on_another_host(
    workload: tuple[object, ...], hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    name, *arguments = workload
    with HostedWorkload(hosts[0], str(name), tmp_path, *arguments) as moving:
        save_to_file(moving, hosts[0], tmp_path / "image")
        restore_from_file(moving, hosts[1], tmp_path / "image")
        moving.check_alive_and_progressing()
        moving.finish()


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: " ".join(map(str, w)))
def test_a_workload_whose_copy_is_thrown_away_runs_on_where_it_was(
    workload: tuple[object, ...], hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    name, *arguments = workload
    with HostedWorkload(hosts[0], str(name), tmp_path, *arguments) as staying:
        for _ in range(2):
            try_in_vain(staying, *hosts)
            hosts[1].wait_until_empty()
            staying.check_alive_and_progressing()
        staying.finish()
