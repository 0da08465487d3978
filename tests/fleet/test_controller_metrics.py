"""What a controller tells Prometheus."""

from __future__ import annotations

import pytest

from migrator.fleet import records as r
from migrator.fleet.controller_metrics import ControllerMetrics
from policies.model import HostState

MOVE = r.Move(
    workload="w",
    source="a",
    destination="b",
    migration="m-12345678",
    token=1,
    started_at=1.0,
    cause="drain",
    predicted_downtime=0.02,
    predicted_bytes=4000,
)


def finished(outcome: r.Outcome, downtime: float = 0.0) -> r.FinishedMove:
    return r.FinishedMove(move=MOVE, outcome=outcome, ended_at=2.0, downtime=downtime, bytes=1000)


@pytest.mark.parametrize("outcome", r.Outcome)
def test_moves_are_counted_by_cause_and_outcome(outcome: r.Outcome) -> None:
    metrics = ControllerMetrics()
    metrics.finished(finished(outcome))
    labels = {"cause": "drain", "outcome": outcome.value}
    assert metrics.registry.get_sample_value("migrator_fleet_moves_total", labels) == 1
    assert metrics.registry.get_sample_value("migrator_fleet_moved_bytes_total") == 1000


def test_what_was_predicted_is_held_against_what_was_achieved() -> None:
    metrics = ControllerMetrics()
    metrics.finished(finished(r.Outcome.MIGRATED, 0.03))
    metrics.finished(finished(r.Outcome.ABORTED))
    value = metrics.registry.get_sample_value
    assert value("migrator_fleet_move_downtime_seconds_sum", {"kind": "predicted"}) == pytest.approx(0.02)
    assert value("migrator_fleet_move_downtime_seconds_sum", {"kind": "achieved"}) == pytest.approx(0.03)
    assert value("migrator_fleet_move_downtime_ratio_sum") == pytest.approx(1.5)
    assert value("migrator_fleet_move_downtime_ratio_count") == 1
    assert value("migrator_fleet_move_bytes_ratio_sum") == pytest.approx(0.25)
    assert value("migrator_fleet_move_bytes_ratio_count") == 1


def test_every_series_is_there_before_anything_happened() -> None:
    registry = ControllerMetrics().registry
    for state in HostState:
        assert registry.get_sample_value("migrator_fleet_hosts", {"state": state.value}) == 0
    for outcome in r.Outcome:
        labels = {"cause": "balance", "outcome": outcome.value}
        assert registry.get_sample_value("migrator_fleet_moves_total", labels) == 0
