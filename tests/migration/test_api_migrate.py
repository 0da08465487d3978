"""migrate() and check() by the API, in the network namespace of a host: events, cancelling, results."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import migrator
from migrator import model
from migrator.engine.base import SourceOptions
from migrator.engine.select import CANDIDATES
from migrator.engine.user.dump.source import UserSource
from migrator.engine.user.engine import UserEngine
from migrator.errors import CheckpointFailed
from migrator.testing.hosts import Host
from migrator.testing.stage import AGENT_PORT, MIGRATOR, Stage
from migrator.testing.workloads import build

pytestmark = pytest.mark.root

NAME = "apishop"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage(tag="am") as made:
        yield made


@pytest.fixture
def ticks(stage: Stage, tmp_path: Path) -> Iterator[Path]:
    """A container on host a that counts into a file."""
    out = tmp_path / "out"
    stage.start_container(NAME, [str(build("counter")), str(out), "5"], address="10.77.0.66")
    yield out
    for host in (stage.a, stage.b):
        host.run([*MIGRATOR, "stop", NAME], check=False)
    counted = [int(line.split()[1]) for line in out.read_text().splitlines() if line.startswith("tick ")]
    assert counted == list(range(1, len(counted) + 1))


def states(host: Host) -> list[str]:
    return [row["state"] for row in json.loads(host.run([*MIGRATOR, "ps", "--json"]).stdout)]


def arguments(stage: Stage) -> dict[str, Any]:
    key, known = stage.a.folder / "client_key", Path(stage.a.env["MIGRATOR_KNOWN_HOSTS"])
    return {"peer": f"root@{stage.b.address}:{AGENT_PORT}", "login": migrator.Login(key, known)}


def test_events_come_in_order_on_the_loop_and_the_last_has_the_result(stage: Stage, ticks: Path) -> None:
    events: list[model.Event] = []

    async def main() -> migrator.MigrationResult:
        loop = asyncio.get_running_loop()

        def tell(event: model.Event) -> None:
            assert asyncio.get_running_loop() is loop
            events.append(event)

        found = await migrator.check(NAME, **arguments(stage))
        assert (found.processes, found.result.outcome) == (1, migrator.Outcome.DRY_RUN)
        assert found.files > 0
        assert found.predicted_downtime > 0
        assert "processor times and counters of use" in found.notes[-1]
        assert states(stage.b) == []
        return await migrator.migrate(NAME, **arguments(stage), on_event=tell)

    with stage.a.inside():
        result = asyncio.run(main())
    assert (states(stage.a), states(stage.b)) == ([], ["running"])
    assert (result.outcome, result.fate) == (migrator.Outcome.MIGRATED, migrator.Fate.DESTINATION.value)
    assert (result.engine, bool(result.engine_reason)) == ("user", True)
    assert result.downtime > 0
    assert isinstance(events[0], model.Started)
    assert isinstance(events[-1], model.Ended)
    assert not any("counters of use" in note for note in result.warnings)  # what is true of each move is told by check
    assert events[-1].result == result
    rounds = [event.round.number for event in events if isinstance(event, model.RoundDone)]
    assert rounds == [made.number for made in result.rounds][: len(rounds)] == list(range(1, len(rounds) + 1))


@pytest.mark.parametrize("moment", [model.Started, model.RoundDone])
def test_cancelled_before_commit_it_runs_on_here_and_nothing_is_there(
    stage: Stage, ticks: Path, moment: type[model.Event]
) -> None:
    async def main() -> None:
        def tell(event: model.Event) -> None:
            if isinstance(event, moment):
                task.cancel()

        settings = migrator.MigrateSettings(max_downtime=1e-6, timeout=60.0)
        task = asyncio.create_task(migrator.migrate(NAME, **arguments(stage), settings=settings, on_event=tell))
        with pytest.raises(asyncio.CancelledError):
            await task

    with stage.a.inside():
        asyncio.run(main())
    assert (states(stage.a), states(stage.b)) == (["running"], [])


def test_a_limit_that_cannot_be_kept_is_an_error_with_its_fate(stage: Stage, ticks: Path) -> None:
    settings = migrator.MigrateSettings(max_downtime=1e-6, timeout=0.5)
    with stage.a.inside(), pytest.raises(migrator.MigrationAborted) as raised:
        asyncio.run(migrator.migrate(NAME, **arguments(stage), settings=settings))
    assert (raised.value.fate, raised.value.exit_code) == (migrator.Fate.SOURCE, 8)
    assert states(stage.a) == ["running"]


def test_what_is_not_there_and_who_cannot_be_reached_are_errors_of_their_kinds(stage: Stage, ticks: Path) -> None:
    asked = arguments(stage)
    with stage.a.inside():
        with pytest.raises(migrator.UsageError, match="no container 'nothing'"):
            asyncio.run(migrator.migrate("nothing", **asked))
        with pytest.raises(migrator.UsageError, match="No such file"):
            asyncio.run(migrator.check(NAME, **asked, settings=migrator.MigrateSettings(copy_paths=("/no/such",))))
        with pytest.raises(migrator.TransportError) as raised:
            asyncio.run(migrator.check(NAME, **{**asked, "peer": "root@10.77.0.2:7023"}))
    assert raised.value.fate is migrator.Fate.SOURCE
    assert states(stage.a) == ["running"]


class Partial(UserEngine):
    """Refuses nothing, and fails where it is to save the state of the tasks."""

    name = "partial"
    carries_less = True

    def source(self, pid: int, fd: int, options: SourceOptions) -> UserSource:
        class Failing(UserSource):
            def final(self, silence: Callable[[], None] | None = None) -> None:
                raise CheckpointFailed("pid 7: a piece that is not carried")

        return Failing(pid, fd, options)


def test_what_an_engine_fails_at_that_carries_less_another_does(
    stage: Stage, ticks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("migrator.engine.select.CANDIDATES", {"partial": Partial, **CANDIDATES})
    events: list[model.Event] = []
    with stage.a.inside():
        assert asyncio.run(migrator.check(NAME, **arguments(stage))).result.engine == "partial"
        result = asyncio.run(migrator.migrate(NAME, **arguments(stage), on_event=events.append))
        assert (states(stage.a), states(stage.b)) == ([], ["running"])
    assert (result.engine, result.engine_reason) == ("user", "engine partial: pid 7: a piece that is not carried")
    assert [event.reason for event in events if isinstance(event, model.Waiting)] == [result.engine_reason]


def test_an_engine_that_was_asked_for_fails_alone(stage: Stage, ticks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrator.engine.select.CANDIDATES", {"partial": Partial, **CANDIDATES})
    settings = migrator.MigrateSettings(engine="partial")
    with stage.a.inside(), pytest.raises(CheckpointFailed, match="pid 7: a piece that is not carried") as raised:
        asyncio.run(migrator.migrate(NAME, **arguments(stage), settings=settings))
    assert raised.value.fate is migrator.Fate.SOURCE
    assert (states(stage.a), states(stage.b)) == (["running"], [])
