"""An agent dies at each named point while a workload moves that has locks on files which both hosts share.

The copy runs only once the source copy, which has the locks, is gone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_agents import Agents

from migrator.errors import Fate
from migrator.protocol.states import Recorded
from migrator.recovery.journal import Role
from migrator.runtime.fault_points import EXIT_CODE, POINTS

DECIDED = POINTS.index("destination.decided")


@pytest.fixture
def agents(tmp_path: Path) -> Agents:
    return Agents(tmp_path, locked=True)


def check(agents: Agents) -> tuple[str, str]:
    """The copy of the destination never ran while there was one on the source."""
    log = agents.world.log
    if "destination run" in log:
        assert "source none" in log[: log.index("destination run")], log
    return agents.world.check()


def test_the_source_copy_is_gone_before_the_other_runs(agents: Agents) -> None:
    assert agents.migrate() == (0, 0)
    assert check(agents) == ("none", "run")
    for role in Role:
        journal = agents.journal(role)
        assert journal is not None and journal.settled


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("first", ["source", "destination"])
async def test_once_both_agents_run_again_exactly_one_copy_does(agents: Agents, point: str, first: str) -> None:
    side = "source_fault" if point.startswith("source.") else "destination_fault"
    assert EXIT_CODE in agents.migrate(**{side: f"{point}:exit"}), "the point was never passed"
    check(agents)
    # An agent settles every few seconds: a copy that had to wait for the source is met again.
    for one in (first, "destination" if first == "source" else "source", "destination"):
        await (agents.restart_source() if one == "source" else agents.restart_destination())
        check(agents)
    assert check(agents) in (("run", "none"), ("none", "run"))
    for role in Role:
        journal = agents.journal(role)
        assert journal is None or journal.settled


async def test_a_copy_whose_locks_the_source_still_has_stays_frozen_and_says_so(agents: Agents) -> None:
    agents.migrate(destination_fault="destination.decided:exit")
    (settled,) = await agents.restart_destination()
    assert settled.fate is Fate.FROZEN and "locked" in settled.detail
    assert check(agents) == ("held", "held")
    journal = agents.journal(Role.DESTINATION)
    assert journal is not None and journal.state is Recorded.RUNNING
    await agents.restart_source()  # it asks, hears RUNNING and gives the locks up
    assert check(agents) == ("none", "run")
