"""--max-downtime with workloads that have much of one thing: kept, or it is said that it was not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

import migrator
from migrator.testing.stage import AGENT_PORT, MIGRATOR, Stage
from migrator.testing.workloads import build

pytestmark = pytest.mark.root

NAME = "budget"
SIZES = {"connections": 1000, "files": 1000, "pipes": 1000, "threads": 200, "processes": 100, "mappings": 10_000}
AMPLE = 5.0  # seconds in which any of them fits, on a busy machine too
CASES = [(kind, limit) for limit in (0.05, AMPLE) for kind in SIZES]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage(tag="bu") as made:
        yield made


@pytest.mark.parametrize(("kind", "limit"), CASES)
def test_it_is_kept_or_the_report_says_so_or_the_workload_stays(
    stage: Stage, tmp_path: Path, kind: str, limit: float
) -> None:
    out = tmp_path / "out"
    stage.start_container(NAME, [str(build("many")), str(out), kind, str(SIZES[kind])], address="10.77.0.67")
    login = migrator.Login(stage.a.folder / "client_key", Path(stage.a.env["MIGRATOR_KNOWN_HOSTS"]))
    peer = f"root@{stage.b.address}:{AGENT_PORT}"
    settings = migrator.MigrateSettings(max_downtime=limit, timeout=30.0 if limit == AMPLE else 2.0)
    try:
        with stage.a.inside():
            try:
                result = asyncio.run(migrator.migrate(NAME, peer, settings=settings, login=login))
            except migrator.MigrationAborted as error:
                assert limit < AMPLE, "given up, and it would have fitted"
                assert "over the max downtime" in str(error) or "the timeout" in str(error)  # a busy machine
                assert error.fate is migrator.Fate.SOURCE
                assert stage.a.run([*MIGRATOR, "ps"]).stdout.count(NAME) == 1
                return
        assert result.outcome is migrator.Outcome.MIGRATED
        assert 0 < result.predicted_downtime <= limit  # else it had not begun
        over = [warning for warning in result.warnings if "is over the max downtime" in warning]
        assert bool(over) == (result.downtime > limit)
        assert result.prediction_error == pytest.approx(result.downtime - result.predicted_downtime)
    finally:
        for host in (stage.a, stage.b):
            host.run([*MIGRATOR, "stop", NAME], check=False)
    assert "FAIL" not in out.read_text()
