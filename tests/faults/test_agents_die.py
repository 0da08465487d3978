"""An agent dies, or fails, at each named point of a migration. Both are started again; one copy runs."""

from __future__ import annotations

import pytest
from fault_agents import Agents

from migrator.errors import Fate
from migrator.protocol.states import Recorded
from migrator.recovery.journal import Role
from migrator.testing.faults import EXIT_CODE, POINTS

SOURCE_POINTS = [point for point in POINTS if point.startswith("source.")]
DESTINATION_POINTS = [point for point in POINTS if point.startswith("destination.")]

# From this point on the destination's decision is RUNNING.
DECIDED = POINTS.index("destination.decided")


def faults_of(point: str, action: str) -> dict[str, str]:
    side = "source_fault" if point in SOURCE_POINTS else "destination_fault"
    return {side: f"{point}:{action}"}


@pytest.mark.parametrize("action", ["exit", "raise"])
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("first", ["source", "destination"])
async def test_once_both_agents_run_again_exactly_one_copy_does(
    agents: Agents, point: str, action: str, first: str
) -> None:
    source, destination = agents.migrate(**faults_of(point, action))
    if action == "exit":
        assert EXIT_CODE in (source, destination), "the point was never passed"
    agents.world.check()
    for side in (first, "destination" if first == "source" else "source"):
        settled = await (agents.restart_source() if side == "source" else agents.restart_destination())
        assert all(one.fate is not Fate.FROZEN for one in settled), settled
        agents.world.check()
    assert agents.world.check() in (("run", "none"), ("none", "run"))
    for role in Role:
        journal = agents.journal(role)
        assert journal is None or journal.settled


@pytest.mark.parametrize("point", SOURCE_POINTS)
async def test_a_source_alone_runs_its_copy_or_says_that_it_is_frozen(agents: Agents, point: str) -> None:
    agents.migrate(source_fault=f"{point}:exit")
    journal = agents.journal(Role.SOURCE)
    before = journal.state if journal is not None else None
    settled = await agents.restart_source_alone()
    here, _ = agents.world.check()
    if before is Recorded.COMMITTING:
        (frozen,) = settled
        assert frozen.fate is Fate.FROZEN and "--here" in frozen.detail
        # Where it was held before the agent died it still is; else ptrace has let it go, before COMMIT.
        assert here in ("held", "run")
        assert here == "held" or POINTS.index(point) < POINTS.index("source.saved")
    else:
        assert all(one.fate is not Fate.FROZEN for one in settled)
        assert here in ("run", "none")


@pytest.mark.parametrize("point", DESTINATION_POINTS)
async def test_a_destination_alone_keeps_nothing_frozen(agents: Agents, point: str) -> None:
    agents.migrate(destination_fault=f"{point}:exit")
    await agents.restart_destination()
    _, there = agents.world.check()
    assert there in ("none", "run")
    assert (there == "run") == (POINTS.index(point) >= DECIDED)


@pytest.mark.parametrize("point", ["source.committed", "destination.decided", "destination.resumed"])
async def test_settling_twice_changes_nothing(agents: Agents, point: str) -> None:
    agents.migrate(**faults_of(point, "exit"))
    await agents.restart_source()
    await agents.restart_destination()
    log = agents.world.log
    assert await agents.restart_source() == [] and await agents.restart_destination() == []
    assert agents.world.log == log


async def test_without_a_fault_nothing_is_left_to_settle(agents: Agents) -> None:
    assert agents.migrate() == (0, 0)
    assert agents.world.check() == ("none", "run")
    assert await agents.restart_source() == [] and await agents.restart_destination() == []
