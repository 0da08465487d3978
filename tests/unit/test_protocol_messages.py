"""Messages go there and back; nothing else is understood."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.engine.base import FileFact, Phase, Round, Survey
from migrator.protocol import messages as m

HOST = m.HostFacts("a", "6.18", "x86_64", "GenuineIntel", "Xeon", frozenset({"avx2"}), 2696, "user")
FILE = FileFact("/usr/bin/redis-server", 1 << 20, 0o100755, 1, "ab" * 20, False)
SURVEY = Survey([7, 8], 3, 1 << 30, [FILE], frozenset({"avx2"}), 2696, "wp-async", 2, [7, 8])
ENTRY = m.Entry(b"etc/caf\xe9", 0o100644, 7, -5, 1000, 1000, b"", b"etc/first", False, {"user.a": b"\0"})
ID = "web-0123456789"
EVERY: list[m.AnyMessage] = [
    m.Hello([1], "migrator 0.1", "a"),
    m.Propose(ID, HOST, SURVEY, "web", "{}", True, False, [m.SyncTree("/srv", [b"one"])]),
    m.Verdict(HOST, [m.Reason("/etc/hosts", "differs", "copy it", True)], ["/etc/hosts"]),
    m.Begin(ID, [m.SyncTree("/etc", [b"hosts"])]),
    m.FilesSync(3),
    m.TreeList(1, 0, b"etc", b"a", True, [ENTRY]),
    m.TreeAnswer(1, [0], [b"left\xff"], False),
    m.TreeOps(
        0,
        [
            m.Put(ENTRY, b"content"),
            m.Open(ENTRY, True),
            m.Write(5, b"data"),
            m.Close(),
            m.Touch(ENTRY),
            m.Join(b"a", b"b"),
            m.Remove(b"old", True),
            m.MoveAside(b"x", 1),
            m.MoveBack(1, b"y"),
            m.Drop(2),
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
    m.DestinationReport(ID, [Phase("build", 1, 2, 3, 4)], 7),
    m.Progress(Round(1, 2, 3, 4, 5, 6, 7.0, 8), 0.01, 1e9, "freeze", "it fits"),
    m.Clock(1, 2),
    m.Failure("cannot", "try again"),
    m.Query("containers"),
    m.Result("[]"),
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
    try:
        m.decode(data)
    except m.MessageError:
        pass


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
        {"type": "file-data", "offset": 1 << 63, "data": b""},
        {"type": "file-data", "offset": 0, "data": b"x" * (m.FILE_CHUNK + 1)},
        {"type": "hello", "versions": ["one"]},
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
        m.encode(m.Propose(ID, HOST, dataclasses.replace(SURVEY, files=files)))


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
