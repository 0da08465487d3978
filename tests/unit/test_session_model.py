"""The timeline adds up to the downtime, whatever the phases are."""

from __future__ import annotations

import itertools

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from migrator.engine.base import Phase
from migrator.model import (
    ClockOffset,
    MigrationResult,
    Outcome,
    Timeline,
    Where,
    phases_here,
    to_json,
)

S, D = Where.SOURCE, Where.DESTINATION
SPANS = st.tuples(st.sampled_from("abc"), st.sampled_from([S, D]), st.integers(0, 100), st.integers(0, 50))
WAYS = st.tuples(st.integers(0, 999), st.integers(0, 999))


def test_parts_name_what_happened_and_where_nothing_did_it_was_between_the_hosts() -> None:
    timeline = Timeline(
        [Phase("final", 10, 40, where=S), Phase("memory", 20, 30, where=S), Phase("restore", 50, 70, where=D)],
        frozen_at=10,
        resumed_at=80,
    )
    assert [(p.name, p.start, p.end) for p in timeline.downtime_parts()] == [
        ("final", 10, 20),
        ("memory", 20, 30),
        ("final", 30, 40),
        ("wait", 40, 50),
        ("restore", 50, 70),
        ("wait", 70, 80),
    ]


@given(
    st.lists(SPANS),
    st.integers(0, 100),
    st.integers(1, 100),
)
def test_the_parts_always_add_up_to_the_downtime(
    raw: list[tuple[str, Where, int, int]], frozen_at: int, length: int
) -> None:
    spans = [Phase(name, start, start + size, where=where) for name, where, start, size in raw]
    timeline = Timeline(spans, frozen_at=frozen_at, resumed_at=frozen_at + length)
    parts = timeline.downtime_parts()
    assert parts[0].start == frozen_at and parts[-1].end == frozen_at + length
    assert all(a.end == b.start for a, b in itertools.pairwise(parts))
    assert sum(p.end - p.start for p in parts) / 1e9 == timeline.downtime


def test_a_migration_that_never_froze_has_no_downtime() -> None:
    assert Timeline([Phase("round", 1, 9, where=S)]).downtime_parts() == []
    assert Timeline([]).downtime == 0.0


def test_the_quickest_exchange_sets_the_clock() -> None:
    clock = ClockOffset()
    clock.sample(asked=1000, answered=501_300, heard=1400)
    clock.sample(asked=2000, answered=502_005, heard=2010)
    clock.sample(asked=3000, answered=503_900, heard=4000)
    assert clock.to_here(502_005) == 2005
    assert clock.error <= 6


@given(st.integers(-(10**15), 10**15), st.lists(WAYS, min_size=1))
def test_the_clock_is_never_more_wrong_than_it_says(offset: int, ways: list[tuple[int, int]]) -> None:
    clock, now = ClockOffset(), 0
    for there, back in ways:
        clock.sample(now, now + there + offset, now + there + back)
        now += 10_000
    assert abs(clock.offset - offset) <= clock.error


def test_phases_of_the_destination_are_shown_on_the_clock_of_the_source() -> None:
    clock = ClockOffset()
    clock.sample(asked=0, answered=1_000_000, heard=0)
    (span,) = phases_here([Phase("restore", 1_000_010, 1_000_030, 5, 6)], D, clock)
    assert (span.start, span.end, span.bytes, span.pages) == (10, 30, 5, 6)


def test_a_result_is_json() -> None:
    result = MigrationResult(
        migration="m-0000001", outcome=Outcome.MIGRATED, fate="x", timeline=Timeline([Phase("a", 1, 2, where=S)])
    )
    assert msgspec.json.decode(to_json(result), type=MigrationResult) == result
