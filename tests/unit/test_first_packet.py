"""Which frames show that a program speaks, and which only that its kernel does."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.container.first_packet import Flow, spoken
from migrator.engine.user.descriptors import addresses, packet

HERE, PEER = ("10.0.0.1", 7000), ("10.0.0.2", 41000)
HERE6, PEER6 = ("fd77::1", 7000, 0, 0), ("fd77::2", 41000, 0, 0)


def frame(flags: int = packet.ACK, data: bytes = b"", *, six: bool = False) -> bytes:
    """What leaves HERE for PEER."""
    family = socket.AF_INET6 if six else socket.AF_INET
    source, to = (HERE6, PEER6) if six else (HERE, PEER)
    raw = packet.segment(addresses.pack(family, to), addresses.pack(family, source), flags, 1, 2, data=data)
    return bytes(12) + struct.pack("!H", 0x86DD if six else 0x0800) + raw


FLOW = Flow(7000, socket.inet_aton("10.0.0.2"), 41000)
FLOW6 = Flow(7000, socket.inet_pton(socket.AF_INET6, "fd77::2"), 41000)


@pytest.mark.parametrize(
    ("sent", "flow"),
    [
        (frame(packet.ACK), None),
        (frame(packet.PSH | packet.ACK, b"x"), FLOW),
        (frame(packet.FIN | packet.ACK), FLOW),
        (frame(packet.RST), FLOW),
        (frame(packet.PSH | packet.ACK, b"x" * 1400)[:128], FLOW),
        (frame(packet.ACK, six=True), None),
        (frame(packet.ACK, b"x", six=True), FLOW6),
        (bytes(12) + b"\x08\x06" + bytes(46), None),  # ARP
        (b"", None),
    ],
    ids=["ack", "data", "fin", "rst", "cut", "ack6", "data6", "arp", "empty"],
)
def test_acknowledgements_tell_nothing_of_the_program(sent: bytes, flow: Flow | None) -> None:
    assert spoken(sent) == flow


def test_a_short_frame_is_padded_by_the_device_and_that_is_no_data() -> None:
    assert spoken(frame(packet.ACK) + bytes(20)) is None


def test_a_later_fragment_has_no_ports() -> None:
    whole = bytearray(frame(packet.ACK, b"x" * 100))
    whole[20:22] = b"\x00\x10"
    assert spoken(bytes(whole)) is None


@given(st.binary(max_size=80))
def test_hostile_frames_are_just_not_counted(rest: bytes) -> None:
    for kind in (b"\x08\x00", b"\x86\xdd"):
        found = spoken(bytes(12) + kind + rest)
        assert found is None or len(found.peer) in (4, 16)
