"""Messages go there and back; nothing else is understood."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrator.engine.base import FileFact, Phase, Round, Survey
from migrator.protocol import facts, fleet, trees
from migrator.protocol import messages as m
from migrator.protocol.wire import FILE_CHUNK

HOST = m.HostFacts("a", "6.18", "x86_64", "GenuineIntel", "Xeon", frozenset({"avx2"}), 2696, "user")
FILE = FileFact("/usr/bin/redis-server", 1 << 20, 0o100755, 1, "ab" * 20, False)
SURVEY = Survey(
    [7, 8], 3, 1 << 30, [FILE], frozenset({"avx2"}), 2696, "wp-async", 2, [7, 8], [("fd 3", "will be another")]
)
ENTRY = trees.Entry(b"etc/caf\xe9", 0o100644, 7, -5, 1000, 1000, b"", b"etc/first", False, {"user.a": b"\0"})
ID = "web-0123456789"
EVERY: list[m.AnyMessage] = [
    m.Hello([1], "migrator 0.1", "a"),
    m.Propose(ID, HOST, facts.Survey.of(SURVEY), "web", "{}", True, False, [trees.SyncTree("/srv", [b"one"])]),
    m.Verdict(HOST, [m.Reason("/etc/hosts", "differs", "copy it", True)], ["/etc/hosts"]),
    m.Begin(ID, [trees.SyncTree("/etc", [b"hosts"])]),
    m.FilesSync(3),
    trees.TreeList(1, 0, b"etc", b"a", True, [ENTRY]),
    trees.TreeAnswer(1, [0], [b"left\xff"], False),
    trees.TreeOps(
        0,
        [
            trees.Put(ENTRY, b"content"),
            trees.Open(ENTRY, True),
            trees.Write(5, b"data"),
            trees.Close(),
            trees.Touch(ENTRY),
            trees.Join(b"a", b"b"),
            trees.Remove(b"old", True),
            trees.MoveAside(b"x", 1),
            trees.MoveBack(1, b"y"),
            trees.Drop(2),
        ],
    ),
    m.Standing("m-12345678", 3),
    m.Ready(ID, 5),
    m.Orphans(ID, [m.OrphanedConnection("10.0.0.1", 80, "fd00::1", 65535)]),
    m.Commit(ID),
    m.Running(ID, 6),
    m.Discarded(ID, "no memory"),
    m.Abort(ID, "cancelled"),
    m.Ask(ID),
    m.Done(ID),
    m.DestinationReport(ID, [facts.Phase.of(Phase("build", 1, 2, 3, 4))], 7, 9),
    m.Progress(facts.Round.of(Round(1, 2, 3, 4, 5, 6, 7.0, 8)), 0.01, 1e9, "freeze", "it fits"),
    m.Clock(1, 2),
    m.Failure("cannot", "try again"),
    fleet.Observe("f1", 7, "shop", 0.5),
    fleet.Observed(
        fleet.HostReport(name="a", boot_id="b", at=1.5, kernel="6.1", engine="user", cpus=2.0, memory=1 << 30),
        [fleet.WorkloadReport(name="shop", state="running", cpu=0.5, dirty_rate=None)],
        True,
    ),
    fleet.Depart(ID, "shop", "root@10.0.0.2:7022", "f1", 7, max_downtime=0.02),
    fleet.WatchDeparture(ID),
    fleet.Departing(ID, "precopy", 5, 0.01),
    fleet.Departed(ID, "migrated", "running on the destination", downtime=0.01),
    fleet.Save("shop", "f1", 7, True, 3),
    fleet.Saved("shop", "shop-1.image", 5),
    fleet.Images("shop"),
    fleet.ImageList([fleet.ImageReport(workload="shop", image="shop-1.image", at=1.0)]),
    fleet.Revive("shop-1.image", "f1", 7),
    fleet.Revived("shop-1.image", 5),
]


def test_the_list_above_is_complete() -> None:
    assert {type(message) for message in EVERY} == set(m.AnyMessage.__args__)


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: m.AnyMessage) -> None:
    assert m.decode(m.encode(message)) == message


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_a_truncated_message_is_refused(message: m.AnyMessage) -> None:
    data = m.encode(message)
    for cut in range(len(data)):
        with pytest.raises(m.MessageError):
            m.decode(data[:cut])


@given(st.binary(max_size=300))
def test_hostile_bytes_only_ever_raise_message_errors(data: bytes) -> None:
    look_at(data)


def look_at(data: bytes) -> None:
    """What a session does with anything that comes: it is refused, or all of it is within its bounds."""
    try:
        message = m.decode(data)
    except m.MessageError:
        return
    assert m.decode(m.encode(message)) == message
    if isinstance(message, m.Propose):
        message.survey.value()
    elif isinstance(message, m.Progress):
        made = message.round.value()
        assert made.bytes >= 0 and made.pages >= 0 and made.end >= made.start and made.dirty_rate >= 0
    elif isinstance(message, m.DestinationReport):
        assert all(phase.value().seconds >= 0 for phase in message.phases)


WILD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.sampled_from(["x" * 300, "x" * 5000, "x" * 70_000, b"x" * 256, b"x" * 70_000, "\x1b[2J", "../..", "/"]),
    st.lists(st.none() | st.integers() | st.text(max_size=3), max_size=3),
    st.sampled_from([[0] * 3000, [0] * 70_000, {str(n): n for n in range(300)}, {}]),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


def places(value: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a message something can be put."""
    yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*at, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*at, index))


def replaced(value: Any, at: tuple[Any, ...], new: object) -> Any:
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = replaced(value[at[0]], at[1:], new)
    return copy


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
@settings(max_examples=60, suppress_health_check=[HealthCheck.differing_executors])
@given(data=st.data())
def test_a_message_with_anything_wild_in_it_only_ever_raises_message_errors(
    message: m.AnyMessage, data: st.DataObject
) -> None:
    body = msgspec.msgpack.decode(m.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        body = replaced(body, data.draw(st.sampled_from(list(places(body)))), data.draw(WILD))
        try:
            encoded = msgspec.msgpack.encode(body)
        except (ValueError, OverflowError, UnicodeEncodeError):  # no msgpack either
            return
        look_at(encoded)


PLAIN = {kind: msgspec.msgpack.decode(m.encode(message)) for message in EVERY if (kind := type(message).__name__)}
NUMBERS = {
    "Hello": [("versions", 0)],
    "Propose": [
        ("source", "xstate_size"), ("source", "memory_available"), ("source", "pid_max"),
        ("survey", 0, 0), ("survey", 1), ("survey", 2), ("survey", 3, 0, 1), ("survey", 3, 0, 2),
        ("survey", 5), ("survey", 7), ("survey", 8, 0), ("trees", 0, "inode"),
    ],
    "FilesSync": [("number",)],
    "TreeList": [("number",), ("tree",), ("entries", 0, 1), ("entries", 0, 2), ("entries", 0, 4), ("entries", 0, 5)],
    "TreeAnswer": [("number",), ("differing", 0)],
    "TreeOps": [("tree",), ("ops", 2, 1), ("ops", 7, 2), ("ops", 8, 1), ("ops", 9, 1)],
    "Standing": [("round",)],
    "Ready": [("built_at",)],
    "Orphans": [("connections", 0, 1), ("connections", 0, 3)],
    "Running": [("resumed_at",)],
    "Done": [("downtime",), ("stream_bytes",), ("wire_bytes",), ("compression_ratio",)],
    "DestinationReport": [("pid",), ("first_packet",), *(("phases", 0, n) for n in (1, 2, 3, 4))],
    "Progress": [("predicted_downtime",), ("throughput",), *(("round", n) for n in range(7))],
    "Clock": [("asked",), ("answered",)],
}  # fmt: skip
LISTS = {
    "Hello": [("versions",)],
    "Propose": [
        ("source", "cpu_features"), ("survey", 0), ("survey", 3), ("survey", 4), ("survey", 8), ("survey", 9),
        ("trees",), ("trees", 0, "only"),
    ],
    "Verdict": [("destination", "cpu_features"), ("reasons",), ("wanted",)],
    "Begin": [("trees",), ("trees", 0, "only")],
    "TreeList": [("entries",)],
    "TreeAnswer": [("differing",), ("surplus",)],
    "TreeOps": [("ops",)],
    "Orphans": [("connections",)],
    "DestinationReport": [("phases",)],
}  # fmt: skip


def with_defaults(kind: str, at: tuple[Any, ...]) -> Any:
    """The message with a value at that place, also where it was left out as the default."""
    body, inner = PLAIN[kind], PLAIN[kind]
    for depth, key in enumerate(at):
        if isinstance(inner, dict) and key not in inner:
            return replaced(body, at[:depth], {**inner, key: 0})
        inner = inner[key]
    return body


def cases(table: Mapping[str, Sequence[tuple[Any, ...]]]) -> list[Any]:
    return [
        pytest.param(kind, at, id=f"{kind} {' '.join(map(str, at))}") for kind, many in table.items() for at in many
    ]


@pytest.mark.parametrize(("kind", "at"), cases(NUMBERS))
@pytest.mark.parametrize("number", [-2, 1 << 64, "1", None, float("nan"), float("inf"), -1e300, 1e300])
def test_a_number_out_of_its_range_is_refused(kind: str, at: tuple[Any, ...], number: object) -> None:
    body = replaced(with_defaults(kind, at), at, number) if number != 1 << 64 else None
    data = msgspec.msgpack.encode(body) if body is not None else b"\xcf" + b"\xff" * 8
    with pytest.raises(m.MessageError):
        m.decode(data)


@pytest.mark.parametrize(("kind", "at"), cases(LISTS))
def test_a_list_that_is_too_long_is_refused(kind: str, at: tuple[Any, ...]) -> None:
    value: Any = with_defaults(kind, at)
    body = value
    for key in at:
        value = value[key]
    one = value[0] if value else "x"
    for count in (40, 300, 2_100, 5_000, 70_000):
        many = [f"{one}{n}" for n in range(count)] if "cpu_features" in at or at == ("survey", 4) else [one] * count
        data = msgspec.msgpack.encode(replaced(body, at, many))
        if len(data) > m.MAX_MESSAGE:
            break
        try:
            m.decode(data)
        except m.MessageError as error:
            assert "length" in str(error), error
            return
    with pytest.raises(m.MessageError):
        m.decode(data)


@pytest.mark.parametrize(
    "body",
    [
        {"type": "launch-missiles"},
        {"type": "commit"},
        {"type": "commit", "migration": ID, "force": True},
        {"type": "commit", "migration": "../../etc"},
        {"type": "commit", "migration": "x" * 65},
        {"type": "ready", "migration": ID, "built_at": -1},
        {"type": "discarded", "migration": ID, "reason": "x" * 5000},
        {"type": "report", "migration": ID, "phases": [["x" * 100_000, 1, 2]]},
        {"type": "report", "migration": ID, "phases": [["build", -5, 2]]},
        {"type": "report", "migration": ID, "phases": [["build", 3, 2]]},
        {"type": "report", "migration": ID, "phases": [["build", 1, 2, 3, 4, "more"]]},
        {"type": "report", "migration": ID, "phases": [{"name": "build", "start": 1, "end": 2, "colour": "red"}]},
        {"type": "tree-ops", "tree": 0, "ops": [["write", 1 << 63, b""]]},
        {"type": "tree-ops", "tree": 0, "ops": [["write", 0, b"x" * (FILE_CHUNK + 1)]]},
        {"type": "tree-ops", "tree": 0, "ops": [["close", "more"]]},
        {"type": "tree-ops", "tree": 0, "ops": [["run", b"/bin/sh"]]},
        {"type": "orphans", "migration": ID, "connections": [["10.0.0.1", 80, "example.org", 1]]},
        {"type": "result", "json": "x" * (1 << 20)},
        {"type": "query", "what": "x" * 300},
        {"type": "hello", "versions": ["one"]},
        {"type": "hello", "versions": []},
        ["commit", ID],
        7,
    ],
)
def test_what_is_not_in_the_protocol_is_refused(body: object) -> None:
    with pytest.raises(m.MessageError):
        m.decode(msgspec.msgpack.encode(body))


def test_deep_nesting_does_not_overflow_the_stack() -> None:
    with pytest.raises(m.MessageError):
        m.decode(b"\x91" * 200_000)


def test_a_message_that_no_peer_would_take_is_not_sent() -> None:
    files = [dataclasses.replace(FILE, path=f"/srv/{i:0200}") for i in range(6000)]
    with pytest.raises(m.MessageError):
        m.encode(m.Propose(ID, HOST, facts.Survey.of(dataclasses.replace(SURVEY, files=files))))


def test_peers_without_a_common_version_part_with_a_hint() -> None:
    assert m.common_version([m.VERSION - 1, m.VERSION]) == m.VERSION
    with pytest.raises(m.MessageError) as caught:
        m.common_version([m.VERSION - 1])
    assert "release" in caught.value.hint


def test_every_message_is_documented_and_only_those() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/protocol.md").read_text()
    rows = re.findall(r"^\| ((?:`[a-z-]+`(?:, )?)+) \| (?:source|destination|both|a tool)", text, re.M)
    documented = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)}
    assert documented == {kind.__struct_config__.tag for kind in m.AnyMessage.__args__}
