"""Processes and threads that come, go and change what they are at random all the time: each is what it was left as."""

from __future__ import annotations

from pathlib import Path

import pytest
from pidhosts import HostedWorkload, PidHost, tour

pytestmark = pytest.mark.root


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_tasks_do_to_themselves_each_is_what_it_was_left_as(tmp_path: Path, seed: int) -> None:
    with PidHost("a") as a, PidHost("b") as b, HostedWorkload(a, "selves", tmp_path, seed) as moving:
        tour(moving, a, b, (0, 1, 2, 3, 8, 3, 1, 5))
        moving.finish()
