"""Descriptors that are opened, shared, changed and closed at random all the time: each is what it was left as."""

from __future__ import annotations

from pathlib import Path

import pytest
from pidhosts import HostedWorkload, PidHost, migrate, tour
from test_user_predump import take_for_many

from migrator.engine.user.descriptors import collection
from migrator.errors import CheckpointFailed

pytestmark = pytest.mark.root


def moved_in_the_end(moving: HostedWorkload, here: PidHost, there: PidHost, *, rounds: int) -> None:
    """A connection that waits to be accepted is refused; a moment later it has been."""
    for _ in range(20):
        try:
            migrate(moving, here, there, rounds=rounds)
            return
        except CheckpointFailed as error:
            if "to be accepted" not in error.message:
                raise
            moving.check_alive_and_progressing(ticks=1)
    raise AssertionError


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("least", [collection.MANY, 0], ids=["few", "as of many"])
def test_whatever_is_done_to_descriptors_each_is_what_it_was_left_as(tmp_path: Path, least: int, seed: int) -> None:
    with (
        PidHost("a", own_network=True) as here,
        PidHost("b", own_network=True) as there,
        HostedWorkload(here, "openings", tmp_path, seed) as moving,
    ):
        for host in (here, there):
            host.call("run", take_for_many, least)
        tour(moving, here, there, (0, 1, 2, 3, 8, 3, 1, 5), moved_in_the_end)
        moving.finish()
