"""The downtime picture: well-formed, and it shows what it was given."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.testing.picture import Bar, downtime_svg, longest_wait, read_samples

MS = 1_000_000
START = 5_000_000 * MS


def a_migration(*, downtime_ms: float = 8.4, rounds: int = 5) -> tuple[list[tuple[int, int]], list[Bar]]:
    """A client at 1000 exchanges per second, pre-copy of 2.5 s, a freeze, a commit."""
    bars = [Bar("preflight", START - 300 * MS, START, "both")]
    at = START
    for number in range(1, rounds + 1):
        end = at + 1600 * MS // number**2
        bars.append(Bar(f"round {number}", at, end, "source"))
        at = end
    frozen = at
    step = int(downtime_ms * MS / 8)
    for name, share, where in (
        ("freeze", 1, "source"),
        ("final dump", 3, "source"),
        ("restore", 2, "destination"),
        ("commit", 1, "both"),
        ("resume", 1, "destination"),
    ):
        bars.append(Bar(name, at, at + share * step, where))
        at += share * step
    bars.append(Bar("release", at, at + 40 * MS, "source"))
    samples = []
    now = START - 700 * MS
    while now < at + 700 * MS:
        latency = 150_000 + now // 7 % 90_000
        if frozen <= now + latency and now < at:
            samples.append((now, at + 300_000))
            now = at + 1 * MS
            continue
        samples.append((now, now + latency))
        now += 1 * MS + now % 1000
    return samples, bars


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]


def test_the_title_states_the_downtime_that_the_client_saw() -> None:
    samples, bars = a_migration()
    svg = downtime_svg(samples, bars, title="Redis, 512 MiB", subtitle="sub")
    sent, received = longest_wait(samples)
    assert f"Redis, 512 MiB: {(received - sent) / MS:.1f} ms of downtime" in texts(svg)


def test_every_phase_near_the_longest_wait_is_named_with_its_length() -> None:
    samples, bars = a_migration(downtime_ms=80)
    words = texts(downtime_svg(samples, bars, title="t"))
    for name in ("preflight", "freeze", "final dump", "restore", "commit", "resume", "round ×5"):
        assert name in words
    assert "30.0 ms" in words


def test_a_wait_outside_the_migration_is_not_its_downtime() -> None:
    samples, bars = a_migration()
    before = min(bar.start for bar in bars) - 3000 * MS
    svg = downtime_svg([(before, before + 900 * MS), *samples], bars, title="t")
    assert not any("900 ms" in words for words in texts(svg))


def test_what_is_written_in_names_cannot_break_the_picture() -> None:
    samples, bars = a_migration()
    svg = downtime_svg(samples, [*bars, Bar('<&">', START, START + 900 * MS)], title="a < b & c", subtitle="<")
    assert any(words.startswith("a < b & c") for words in texts(svg))


def test_no_phases_or_no_exchange_is_an_error() -> None:
    samples, bars = a_migration()
    with pytest.raises(ValueError, match="phases"):
        downtime_svg(samples, [], title="t")
    with pytest.raises(ValueError, match="exchanged nothing"):
        downtime_svg([], bars, title="t")


@given(
    waits=st.lists(st.integers(1, 10**11), min_size=1, max_size=20),
    lengths=st.lists(st.integers(0, 10**11), min_size=1, max_size=10),
)
def test_any_lengths_make_a_well_formed_picture(waits: list[int], lengths: list[int]) -> None:
    samples, bars, at = [], [], START
    for wait in waits:
        samples.append((at, at + wait))
        at += wait + 1
    at = START
    for number, length in enumerate(lengths):
        bars.append(Bar(f"phase-{number}x", at, at + length))
        at += length
    ElementTree.fromstring(downtime_svg(samples, bars, title="t"))


def test_samples_come_back_from_the_clients_file(tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("1 2\n3 5\n")
    assert read_samples(tmp_path / "samples") == [(1, 2), (3, 5)]
    (tmp_path / "samples").write_text("1 2 3\n")
    with pytest.raises(ValueError):
        read_samples(tmp_path / "samples")


def test_a_renderer_accepts_it(tmp_path: Path) -> None:
    rsvg = shutil.which("rsvg-convert")
    assert rsvg, "librsvg2-bin is missing: make setup installs it"
    samples, bars = a_migration()
    (tmp_path / "picture.svg").write_text(downtime_svg(samples, bars, title="t"))
    subprocess.run([rsvg, tmp_path / "picture.svg", "-o", tmp_path / "picture.png"], check=True)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
