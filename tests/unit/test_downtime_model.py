"""Predictions come nearer with each migration, and a broken file does no harm."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrator.engine.base import Round
from migrator.model import MigrationResult, Outcome
from migrator.session.downtime_model import learn, load, modelled


def result(downtime: float, outcome: Outcome = Outcome.MIGRATED) -> MigrationResult:
    return MigrationResult(
        migration="calib-0001",
        outcome=outcome,
        fate="",
        downtime=downtime,
        throughput=409.6e6,
        rtt=0.001,
        rounds=[Round(1, 100, 0, 409600, 0, 1000, 0.0, remaining=100)],
    )


def test_it_converges_to_what_this_host_takes(tmp_path: Path) -> None:
    fixed = 3 * sum(modelled(6))
    for _ in range(20):
        learn(tmp_path, 6, result(fixed + 0.001 + 0.0015))
    assert load(tmp_path) == pytest.approx(3.0, rel=0.01)


def test_more_tasks_take_longer() -> None:
    assert sum(modelled(100)) > sum(modelled(1))


@pytest.mark.parametrize("text", ["", "null", "[]", '{"factor": "x"}', '{"factor": 1e9}', '{"factor": -1}'])
def test_a_broken_file_does_no_harm(tmp_path: Path, text: str) -> None:
    (tmp_path / "calibration.json").write_text(text)
    assert 0.1 <= load(tmp_path) <= 20.0


def test_only_migrations_that_took_place_are_learned_from(tmp_path: Path) -> None:
    learn(tmp_path, 1, result(9.0, Outcome.ABORTED))
    assert load(tmp_path) == 1.0


def test_a_place_that_cannot_be_written_is_no_error() -> None:
    learn(Path("/proc/nowhere"), 1, result(0.1))
