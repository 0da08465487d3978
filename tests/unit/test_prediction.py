"""Costs are learnt by what a workload has much of, and each pair of hosts has its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.engine.base import Work
from migrator.session.prediction import MEASURED, Costs, latest, learn, load

SMALL = Work(processes=1, threads=1, mappings=25, files=3)
SOCKETS = Work(processes=1, threads=4, mappings=60, files=3, sockets=1000)
TREE = Work(processes=300, threads=300, mappings=6000, files=900)


def test_what_there_is_more_of_takes_longer() -> None:
    costs = Costs()
    for field in dataclasses.fields(Work):
        more = dataclasses.replace(SMALL, **{field.name: 1000})
        grown = 1000 - getattr(SMALL, field.name)
        assert costs.seconds(more) - costs.seconds(SMALL) == pytest.approx(MEASURED[field.name] * grown)


@pytest.mark.parametrize("work", [SMALL, SOCKETS, TREE], ids=["small", "sockets", "tree"])
@pytest.mark.parametrize("times", [0.3, 2.5])
def test_the_prediction_comes_to_what_it_takes_on_these_hosts(work: Work, times: float, tmp_path: Path) -> None:
    takes = times * Costs().seconds(work)
    for _ in range(20):
        learn(tmp_path, "b", work, takes)
    assert load(tmp_path, "b").seconds(work) == pytest.approx(takes, rel=0.02)
    assert load(tmp_path, "b").moves == 20


def test_a_workload_with_many_sockets_does_not_spoil_what_is_known_of_small_ones(tmp_path: Path) -> None:
    before = Costs().seconds(SMALL)
    for _ in range(20):
        learn(tmp_path, "b", SOCKETS, 2 * Costs().seconds(SOCKETS))
    assert load(tmp_path, "b").seconds(SMALL) == pytest.approx(before, rel=0.1)


def test_workloads_of_different_kinds_are_all_predicted_after_a_while(tmp_path: Path) -> None:
    true = Costs({**MEASURED, "base": 0.012, "sockets": 0.00005, "processes": 0.002})
    for _ in range(60):
        for work in (SMALL, SOCKETS, TREE):
            learn(tmp_path, "b", work, true.seconds(work))
    known = load(tmp_path, "b")
    for work in (SMALL, SOCKETS, TREE):
        assert known.seconds(work) == pytest.approx(true.seconds(work), rel=0.05)
    assert known.error < 0.001


def test_each_destination_has_its_own_costs_and_a_new_one_begins_with_those_of_all(tmp_path: Path) -> None:
    for _ in range(20):
        learn(tmp_path, "slow", SMALL, 0.05, throughput=1e8)
    for _ in range(20):
        learn(tmp_path, "quick", SMALL, 0.005, throughput=1e9)
    assert load(tmp_path, "slow").seconds(SMALL) == pytest.approx(0.05, rel=0.02)
    assert load(tmp_path, "quick").seconds(SMALL) == pytest.approx(0.005, rel=0.1)
    assert load(tmp_path, "slow").throughput == pytest.approx(1e8)
    assert load(tmp_path, "new").moves == 40


def test_one_move_on_a_busy_machine_is_not_taken_for_what_it_always_takes() -> None:
    usual = Costs().seconds(SMALL)
    assert Costs().corrected(SMALL, 5.0).seconds(SMALL) < 2.3 * usual
    assert Costs(moves=9).corrected(SMALL, 5.0).seconds(SMALL) < 1.7 * usual


def test_most_is_learnt_from_the_first_move_between_two_hosts() -> None:
    usual = Costs().seconds(SMALL)
    first = Costs().corrected(SMALL, 2 * usual)
    assert first.seconds(SMALL) == pytest.approx(1.6 * usual)
    later = Costs(moves=9).corrected(SMALL, 2 * usual)
    assert later.seconds(SMALL) == pytest.approx(1.3 * usual)


@given(
    st.lists(
        st.tuples(st.builds(Work, *[st.integers(0, 100_000)] * 7), st.floats(0, 1e6), st.floats(0, 1e12)), max_size=20
    )
)
def test_costs_stay_within_reason_whatever_is_learnt(moves: list[tuple[Work, float, float]]) -> None:
    costs = Costs()
    for work, seconds, throughput in moves:
        costs = costs.corrected(work, seconds, throughput)
        assert all(MEASURED[name] / 21 < cost < MEASURED[name] * 21 for name, cost in costs.each.items())


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '{"b": 1}', '{"b": {"each": {"base": -1}}}', '{"b": {"each": {"base": "x"}}}', "{"]
)
def test_a_broken_file_does_no_harm_and_is_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text(text)
    assert load(tmp_path, "b").seconds(SMALL) == Costs().seconds(SMALL)
    assert learn(tmp_path, "b", SMALL, 0.02) == load(tmp_path, "b")


def test_costs_that_an_older_file_lacks_are_those_measured(tmp_path: Path) -> None:
    (tmp_path / "costs.json").write_text('{"b": {"each": {"base": 1.0, "more": 2.0}}}')
    assert load(tmp_path, "b").seconds(Work(processes=1)) == 1.0 + MEASURED["processes"]


def test_a_place_that_cannot_be_written_is_no_error() -> None:
    assert learn(Path("/proc/nowhere"), "b", SMALL, 0.02).moves == 1


def test_destinations_not_used_for_long_are_forgotten(tmp_path: Path) -> None:
    for n in range(205):
        learn(tmp_path, f"host{n}", SMALL, 0.02)
    known = json.loads((tmp_path / "costs.json").read_text())
    assert len(known) == 200 and "host204" in known and "host5" not in known
    assert "" in known  # what was learnt of all of them


def test_what_counts_as_overrun_is_a_quarter_more_and_at_least_20_ms() -> None:
    assert latest(0.2) == pytest.approx(0.25)
    assert latest(0.01) == pytest.approx(0.03)
