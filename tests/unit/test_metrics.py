"""Metrics say what the events said, under names that Prometheus would choose."""

from __future__ import annotations

import re
import socket
import urllib.request
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from migrator import model
from migrator.engine.base import Round
from migrator.errors import UsageError
from migrator.fleet.controller_metrics import ControllerMetrics
from migrator.metrics import Metrics, phases_of, reason_of, serve_metrics
from migrator.model import MigrationResult, Outcome, Phase, Where

ID = "metric-0001"
MS = 1_000_000


def result(outcome: Outcome = Outcome.MIGRATED, reason: str = "") -> MigrationResult:
    timeline = model.Timeline(
        [Phase("final", 0, 3 * MS, where=Where.SOURCE), Phase("restore", 4 * MS, 6 * MS, where=Where.DESTINATION)],
        frozen_at=0,
        resumed_at=7 * MS,
    )
    migrated = outcome is Outcome.MIGRATED
    return MigrationResult(
        migration=ID,
        outcome=outcome,
        fate="",
        reason=reason,
        downtime=timeline.downtime if migrated else 0.0,
        predicted_downtime=0.005,
        first_packet=0.009 if migrated else 0.0,
        total=2.5,
        stream_bytes=10_000_000,
        wire_bytes=4_000_000,
        compression_ratio=2.5,
        rounds=[Round(1, 5, 1, 20480, 0, 1, 0.0)],
        timeline=timeline if migrated else None,
    )


def play(metrics: Metrics, *events: model.Event, side: Where = Where.SOURCE) -> CollectorRegistry:
    for event in events:
        metrics.observe(event, side)
    return metrics.registry


def test_a_migration_is_in_flight_until_it_ends() -> None:
    metrics = Metrics()
    registry = play(metrics, model.Started(ID, "b", 0))
    assert registry.get_sample_value("migrator_migrations_in_flight") == 1
    play(metrics, model.Ended(ID, Where.SOURCE, result()))
    assert registry.get_sample_value("migrator_migrations_in_flight") == 0


def test_the_downtime_falls_into_its_bucket_and_its_parts_add_up() -> None:
    registry = play(Metrics(), model.Started(ID, "b", 0), model.Ended(ID, Where.SOURCE, result()))
    value = registry.get_sample_value
    assert value("migrator_downtime_seconds_bucket", {"side": "source", "le": "0.005"}) == 0
    assert value("migrator_downtime_seconds_bucket", {"side": "source", "le": "0.01"}) == 1
    assert value("migrator_first_packet_seconds_sum") == pytest.approx(0.009)
    parts = sum(
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "migrator_downtime_phase_seconds_sum"
    )
    assert parts == pytest.approx(0.007)
    assert phases_of(result().timeline or model.Timeline([]))[("wait", "between")] == pytest.approx(0.002)


def test_rounds_are_counted_by_kind_and_side() -> None:
    metrics = Metrics()
    for number in (1, 2, 3):
        made = Round(number, 10, 2, 41000, 0, MS, 1000.0)
        play(metrics, model.RoundDone(ID, made, 0.01, 1e9, "continue", ""), side=Where.DESTINATION)
    value = metrics.registry.get_sample_value
    assert value("migrator_round_bytes_total", {"side": "destination", "kind": "first"}) == 41000
    assert value("migrator_round_bytes_total", {"side": "destination", "kind": "repeated"}) == 82000
    pages = {"side": "destination", "kind": "repeated", "content": "zero"}
    assert value("migrator_round_pages_total", pages) == 4
    assert value("migrator_dirty_rate_bytes_per_second", {"side": "destination"}) == 4096000


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("cancelled", "cancelled"),
        ("60 s have passed and 31.0 ms predicted is still over the max downtime of 10.0 ms: ...", "downtime"),
        ("the destination was not ready within 30 s of the freeze", "timeout"),
        ("/usr/bin/redis-server: is missing on b (install the same version there)", "files"),
        ("pid 17: is taken on b", "pids"),
        ("b closed the connection", "link"),
        ("something nobody has thought of", "other"),
    ],
)
def test_a_reason_is_one_word_of_a_small_set(reason: str, word: str) -> None:
    assert reason_of(result(Outcome.ABORTED, reason)) == word
    labels = {"side": "source", "outcome": "aborted", "reason": word}
    registry = play(Metrics(), model.Ended(ID, Where.SOURCE, result(Outcome.ABORTED, reason)))
    assert registry.get_sample_value("migrator_migrations_total", labels) == 1


def test_a_migration_that_did_not_happen_has_no_downtime() -> None:
    registry = play(Metrics(), model.Ended(ID, Where.SOURCE, result(Outcome.ABORTED, "x")))
    assert registry.get_sample_value("migrator_downtime_seconds_count", {"side": "source"}) is None


def test_every_metric_is_documented_and_only_those() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text()
    documented = set(re.findall(r"^\| `(migrator_\w+)`", text, re.M))
    families = [*Metrics().registry.collect(), *ControllerMetrics().registry.collect()]
    real = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert documented == real


def test_a_command_leaves_its_metrics_in_a_file(tmp_path: Path) -> None:
    metrics = Metrics()
    play(metrics, model.Started(ID, "b", 0))
    metrics.write(tmp_path / "migrator.prom")
    assert "migrator_migrations_in_flight 1.0" in (tmp_path / "migrator.prom").read_text()


@pytest.mark.parametrize("address", ["", "localhost", "127.0.0.1:http", "127.0.0.1:99999"])
def test_an_address_that_cannot_be_listened_on_is_refused(address: str) -> None:
    with pytest.raises(UsageError):
        serve_metrics(address)


def test_an_agent_serves_what_its_sessions_tell() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    on_event = serve_metrics(f"127.0.0.1:{port}")
    on_event(model.Started(ID, "a", 0))
    on_event(model.Ended(ID, Where.DESTINATION, result()))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    assert 'migrator_migrations_total{outcome="migrated",reason="none",side="destination"} 1.0' in text


def test_phases_that_the_other_host_makes_up_make_no_end_of_labels() -> None:
    metrics = Metrics()
    for number in range(500):
        name = "".join(chr(ord("a") + int(digit)) for digit in str(number))
        phase = Phase(f"made up {name}", 4 * MS, 6 * MS, where=Where.DESTINATION)
        timeline = model.Timeline([phase], frozen_at=0, resumed_at=7 * MS)
        play(metrics, model.Ended(ID, Where.SOURCE, msgspec.structs.replace(result(), timeline=timeline)))
    phases = {
        sample.labels["phase"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "migrator_downtime_phase_seconds_sum"
    }
    assert len(phases) <= 65 and "other" in phases
