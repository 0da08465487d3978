"""An engine that lives in tests only is chosen, driven by a session and refused, by nothing but the contract."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator import host
from migrator.engine.base import (
    AfterCheckpoint,
    CheckpointFlags,
    DestinationOptions,
    Engine,
    RestartFlags,
    SourceOptions,
)
from migrator.engine.select import CANDIDATES, Choice, select, select_for, select_like
from migrator.errors import CheckpointFailed, Refused, RestartFailed, UsageError
from migrator.model import MigrationResult, Outcome
from migrator.recovery.hooks import Tools
from migrator.session.serve import serve
from migrator.session.settings import DestinationSettings, Prepared
from migrator.session.source import SourceSession, SourceSettings
from migrator.testing.fakeengine import TASK, FakeEngine, FakeWorld, Script
from transport.wire import link_pair


@pytest.fixture
def world(tmp_path: Path) -> FakeWorld:
    (tmp_path / "world").mkdir()
    return FakeWorld(tmp_path / "world")


def candidates(*engines: FakeEngine) -> dict[str, Callable[[], Engine]]:
    def made(engine: FakeEngine) -> Callable[[], Engine]:
        return lambda: engine

    return {engine.name: made(engine) for engine in engines}


async def migrate(choice: Choice, world: FakeWorld, path: Path) -> MigrationResult:
    """A whole migration from this host to itself, with the chosen engine on both sides."""
    engine = choice.engine
    here, there = await link_pair()
    taking = DestinationSettings(
        host=host.facts(choice),
        prepare=lambda _: Prepared(lambda fd: engine.destination(fd, DestinationOptions()), "fake"),
        journal=path / "b",
        tools=Tools(world.groups("destination")),
    )
    server = asyncio.create_task(serve(there, taking))
    try:
        session = SourceSession(
            SourceSettings(migration="stub-00000001", peer="b", journal=path / "a", ask_for=2.0),
            lambda fd: engine.source(TASK, fd, SourceOptions()),
            here,
            host.facts(choice),
        )
        result = await session.run()
        await server
        return result
    finally:
        server.cancel()
        await here.close()
        await there.close()


def test_the_first_engine_that_finds_all_it_needs_is_chosen(world: FakeWorld) -> None:
    choice = select(candidates=candidates(FakeEngine(world, name="first"), FakeEngine(world, name="second")))
    assert choice.engine.name == "first"
    assert list(choice.probes) == ["first"], "what is not needed is not probed"
    assert "first choice" in choice.reason
    assert [one.name for one in choice.abilities] == ["a directory"]


def test_the_reason_says_what_the_better_one_lacks(world: FakeWorld) -> None:
    better = FakeEngine(world, name="kernel", lacks="checkpoint(2)")
    choice = select(candidates=candidates(better, FakeEngine(world)))
    assert choice.engine.name == "fake"
    assert choice.reason == "engine kernel: no checkpoint(2) (not on this host)"
    assert set(choice.probes) == {"kernel", "fake"}


def test_an_engine_that_carries_less_is_taken_by_its_name_or_as_the_last_resort(world: FakeWorld) -> None:
    less = FakeEngine(world, name="kernel", carries_less=True)
    there = candidates(less, FakeEngine(world))
    choice = select(candidates=there)
    assert choice.engine.name == "fake"
    assert choice.reason == (
        "engine kernel: all that it needs is here, but it carries less than others (--engine kernel)"
    )
    assert select("kernel", there).engine is less
    alone = candidates(less, FakeEngine(world, lacks="ptrace"))
    assert select(candidates=alone).engine is less
    assert "engine fake: no ptrace" in select(candidates=alone).reason


def test_an_engine_that_was_asked_for_is_not_replaced_by_another(world: FakeWorld) -> None:
    there = candidates(FakeEngine(world, name="first", lacks="freezer"), FakeEngine(world, name="second"))
    with pytest.raises(Refused) as caught:
        select("first", there)
    assert caught.value.reasons == ["engine first: no freezer (not on this host)"]
    assert select("second", there).reason == "it was asked for"


def test_where_none_can_work_each_says_what_it_lacks(world: FakeWorld) -> None:
    lacking = [FakeEngine(world, name=name, lacks=what) for name, what in (("a", "ptrace"), ("b", "xsave"))]
    with pytest.raises(Refused) as caught:
        select(candidates=candidates(*lacking))
    assert caught.value.reasons == [
        "engine a: no ptrace (not on this host)",
        "engine b: no xsave (not on this host)",
    ]


def test_an_unknown_name_is_a_mistake_in_use() -> None:
    with pytest.raises(UsageError, match="no engine 'none'"):
        select("none")
    assert "user" in CANDIDATES


async def test_a_session_is_driven_by_an_engine_that_it_does_not_know(world: FakeWorld, tmp_path: Path) -> None:
    engine = FakeEngine(world, name="stub")
    choice = select(candidates=candidates(engine))
    result = await migrate(choice, world, tmp_path)
    assert result.outcome is Outcome.MIGRATED
    assert world.check() == ("none", "run")
    order = [call for call in engine.sources[0].calls if call in ("survey", "instrument", "freeze", "final", "release")]
    assert order == ["survey", "instrument", "freeze", "final", "release"]
    assert host.facts(choice).engine == "stub"


async def test_what_the_engine_refuses_is_refused_with_its_reasons(world: FakeWorld, tmp_path: Path) -> None:
    engine = FakeEngine(world, Script(fail={"survey": Refused(["pid 1 fd 3: cannot be carried"])}), name="stub")
    with pytest.raises(Refused) as caught:
        await migrate(select(candidates=candidates(engine)), world, tmp_path)
    assert caught.value.reasons == ["pid 1 fd 3: cannot be carried"]
    assert world.check() == ("run", "none")
    assert "freeze" not in engine.sources[0].calls


@pytest.mark.parametrize(
    ("after", "state"), [(AfterCheckpoint.RUN, "run"), (AfterCheckpoint.STOP, "held"), (AfterCheckpoint.KILL, "none")]
)
def test_a_checkpoint_restarts(world: FakeWorld, after: AfterCheckpoint, state: str, tmp_path: Path) -> None:
    engine = FakeEngine(world)
    with open(tmp_path / "image", "w+b") as image:
        assert engine.checkpoint(TASK, image.fileno(), CheckpointFlags.SUBTREE, after=after) > 0
        assert world.state("source") == state
        if after is AfterCheckpoint.KILL:
            os.lseek(image.fileno(), 0, os.SEEK_SET)
            assert engine.restart(image.fileno(), RestartFlags.FROZEN) == 4242
            assert world.state("destination") == "held"


@pytest.mark.parametrize("step", ["instrument", "freeze", "final", "hold"])
def test_a_checkpoint_that_fails_leaves_the_workload_running(world: FakeWorld, step: str, tmp_path: Path) -> None:
    engine = FakeEngine(world, Script(fail={step: CheckpointFailed("broken")}))
    with open(tmp_path / "image", "wb") as image, pytest.raises(CheckpointFailed):
        engine.checkpoint(TASK, image.fileno(), CheckpointFlags.SUBTREE, after=AfterCheckpoint.KILL)
    assert world.check() == ("run", "none")


@pytest.mark.parametrize("step", ["build", "hold"])
def test_a_restart_that_fails_leaves_nothing(world: FakeWorld, step: str, tmp_path: Path) -> None:
    with open(tmp_path / "image", "w+b") as image:
        FakeEngine(world).checkpoint(TASK, image.fileno(), CheckpointFlags.SUBTREE, after=AfterCheckpoint.STOP)
        os.lseek(image.fileno(), 0, os.SEEK_SET)
        with pytest.raises(RestartFailed):
            FakeEngine(world, Script(fail={step: RestartFailed("broken")})).restart(image.fileno(), RestartFlags(0))
    assert world.state("destination") == "none"


def test_only_a_container_is_saved_without_subtree(world: FakeWorld, tmp_path: Path) -> None:
    with open(tmp_path / "image", "wb") as image, pytest.raises(UsageError, match="init task of a container"):
        FakeEngine(world).checkpoint(os.getpid(), image.fileno(), CheckpointFlags(0))
    assert world.check() == ("run", "none")


# ---------------------------------------------------------------------- one workload


def refusing(world: FakeWorld, *reasons: str) -> FakeEngine:
    return FakeEngine(world, Script(fail={"survey": Refused(list(reasons))}), name="kernel", carries_less=True)


def test_an_engine_that_carries_less_is_taken_for_what_it_does_not_refuse(world: FakeWorld) -> None:
    less, options = FakeEngine(world, name="kernel", carries_less=True), SourceOptions()
    choice = select_for(TASK, options, candidates=candidates(less, FakeEngine(world)))
    assert choice.engine is less
    assert choice.reason == "the first choice, and it refuses nothing of this workload"
    assert options.surveyed, "its own survey need not try again"
    assert world.check() == ("run", "none")


def test_what_it_refuses_is_the_reason_for_another_one(world: FakeWorld) -> None:
    options, general = SourceOptions(), FakeEngine(world)
    choice = select_for(TASK, options, candidates=candidates(refusing(world, "pid 7: inotify", "and that"), general))
    assert choice.engine is general
    assert choice.reason == "engine kernel: pid 7: inotify, and 1 more"
    assert not options.surveyed
    assert general.sources == [], "whoever does the work looks itself"


def test_it_is_not_asked_where_it_does_not_matter(world: FakeWorld) -> None:
    lacking = FakeEngine(world, name="kernel", carries_less=True, lacks="checkpoint()")
    there = candidates(lacking, FakeEngine(world))
    assert select_for(TASK, SourceOptions(), candidates=there).engine.name == "fake"
    less = FakeEngine(world, name="kernel", carries_less=True)
    there = candidates(less, FakeEngine(world))
    assert select_for(TASK, SourceOptions(), "fake", there).reason == "it was asked for"
    assert select_for(TASK, SourceOptions(), candidates=there, general=True).engine.name == "fake"
    assert lacking.sources == less.sources == []


def test_alone_it_is_taken_all_the_same_and_says_itself_what_it_refuses(world: FakeWorld) -> None:
    less = refusing(world, "pid 7: inotify")
    choice = select_for(TASK, SourceOptions(), candidates=candidates(less, FakeEngine(world, lacks="ptrace")))
    assert (choice.engine, choice.reason) == (
        less,
        "engine kernel: pid 7: inotify; engine fake: no ptrace (not on this host)",
    )


def test_what_an_engine_has_saved_it_restarts(world: FakeWorld) -> None:
    less, general = FakeEngine(world, name="kernel", carries_less=True), FakeEngine(world)
    there = candidates(less, general)
    assert select_like("kernel", candidates=there).engine is less
    assert select_like("fake", candidates=there).engine is general
    assert select_like("fake", "kernel", there).reason == "it was asked for"
    for unknown in ("", "\n", "a name of somebody else"):
        assert select_like(unknown, candidates=there).engine is general
    lacking = FakeEngine(world, name="kernel", carries_less=True, lacks="restart()")
    choice = select_like("kernel", candidates=candidates(lacking, general))
    assert (choice.engine, choice.reason) == (general, "engine kernel: no restart() (not on this host)")
