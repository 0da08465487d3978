"""Specifications travel in images: what is read is what was written, and nothing else is believed."""

from __future__ import annotations

import ipaddress
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.container.announcement import announcement, checksum, mac_bytes
from migrator.container.bridge_port import message
from migrator.container.packet_socket import concerning
from migrator.container.spec import ContainerSpec, Neighbour, Route, Tmpfs, mac_of, spec_for, veth_of
from migrator.errors import UsageError

FULL = ContainerSpec(
    name="web-1",
    argv=("redis-server", "--port", "6379"),
    env={"LANG": "C.UTF-8"},
    cwd="/srv",
    hostname="web",
    bridge="br0",
    mac="02:00:00:00:00:01",
    addresses=("10.0.0.2/24", "fd00::2/64"),
    loopback=("10.9.9.9/32",),
    routes=(Route("default", "10.0.0.1", 5, "10.0.0.2"), Route("10.1.0.0/16")),
    neighbours=(Neighbour("10.0.0.1", "02:00:00:00:00:02"),),
    mtu=1400,
    tmpfs=(Tmpfs("/run", "size=1m,mode=755"),),
    log="/var/log/web.log",
)

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", fullmatch=True)


def test_a_spec_comes_back_as_it_was_written() -> None:
    assert ContainerSpec.from_json(FULL.to_json()) == FULL
    assert ContainerSpec.from_json(ContainerSpec(name="x").to_json()) == ContainerSpec(name="x")


@given(st.text())
def test_text_that_is_no_spec_is_refused_and_nothing_worse(text: str) -> None:
    with pytest.raises(UsageError):
        ContainerSpec.from_json(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("field", sorted(FULL.to_dict()))
@given(value=json_values)
def test_any_value_in_any_field_is_taken_whole_or_refused(field: str, value: object) -> None:
    try:
        read = ContainerSpec.from_json(json.dumps(FULL.to_dict() | {field: value}))
    except UsageError:
        return
    assert ContainerSpec.from_json(read.to_json()) == read


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../etc/passwd"},
        {"name": ""},
        {"name": "a\nb"},
        {"hostname": "a b"},
        {"root": "relative"},
        {"log": "/var/log/../../etc/passwd"},
        {"cwd": "/a\0b"},
        {"mac": "01:00:00:00:00:00"},
        {"addresses": ["10.0.0.2"]},
        {"addresses": ["10.0.0.2/99"]},
        {"routes": [{"destination": "default", "gateway": "nowhere"}]},
        {"routes": [{"destination": "default", "device": "eth9"}]},
        {"tmpfs": [{"path": "/x", "options": "mode=777 evil"}]},
        {"tmpfs": [{"path": "../x"}]},
        {"neighbours": [{"address": "10.0.0.1", "mac": "x"}]},
        {"bridge": "a-name-that-is-too-long-for-linux"},
        {"env": {"A=B": "c"}},
        {"mtu": 1},
        {"colour": "blue"},
    ],
)
def test_a_field_that_makes_no_sense_is_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ContainerSpec.from_dict(FULL.to_dict() | change)


@given(names)
def test_mac_addresses_are_unicast_and_locally_administered(name: str) -> None:
    first = mac_bytes(mac_of(name))[0]
    assert first & 1 == 0 and first & 2 == 2


@given(names, names)
def test_device_names_fit_and_differ_between_containers(one: str, other: str) -> None:
    assert len(veth_of(one)) <= 15
    assert (veth_of(one) == veth_of(other)) == (one == other)


def test_options_of_the_command_line_become_a_spec() -> None:
    spec = spec_for("web", ["sleep", "1"], ip=["10.0.0.2/24"], gateway="10.0.0.1", env=["A=b=c"], tmpfs=["/x:size=1m"])
    assert spec.routes == (Route("default", "10.0.0.1"),)
    assert spec.env == {"A": "b=c"}
    assert spec.tmpfs == (Tmpfs("/x", "size=1m"),)
    assert spec.bridge == "migrator0"
    with pytest.raises(UsageError, match="no command"):
        spec_for("web", [])


def test_an_announcement_has_arp_for_ipv4_and_advertisements_for_ipv6() -> None:
    mac = "02:aa:bb:cc:dd:ee"
    frames = announcement(mac, ["10.0.0.2/24", "fd00::2/64"])
    assert all(frame[6:12] == mac_bytes(mac) and len(frame) >= 60 for frame in frames)
    request, reply, global_na, local_na = frames
    assert request[12:14] == reply[12:14] == b"\x08\x06"
    assert request[28:32] == request[38:42] == ipaddress.ip_address("10.0.0.2").packed
    assert (request[21], reply[21]) == (1, 2)
    for na, address in ((global_na, "fd00::2"), (local_na, "fe80::aa:bbff:fecc:ddee")):
        packed = ipaddress.ip_address(address).packed
        assert na[22:38] == na[62:78] == packed
        assert na[54] == 136 and na[58] == 0x20
        pseudo = na[22:54] + (32).to_bytes(4, "big") + (58).to_bytes(4, "big")
        assert checksum(pseudo + na[54:86]) == 0


def test_a_container_without_addresses_still_tells_the_switches() -> None:
    (frame,) = announcement("02:aa:bb:cc:dd:ee", [])
    assert frame[12:14] == b"\x80\x35"


def run_filter(program: list[tuple[int, int, int, int]], frame: bytes) -> bool:
    """Classic BPF as linux/filter.h defines it, as far as it is used here."""
    accumulator = at = 0
    while True:
        code, yes, no, k = program[at]
        at += 1
        if code in (0x20, 0x28, 0x30):
            size = {0x20: 4, 0x28: 2, 0x30: 1}[code]
            accumulator = int.from_bytes(frame[k : k + size], "big")
        elif code == 0x15:
            at += yes if accumulator == k else no
        elif code == 0x45:
            at += yes if accumulator & k else no
        else:
            return bool(k)


@given(st.binary(min_size=6, max_size=6), st.binary(min_size=6, max_size=6))
def test_the_filter_passes_what_concerns_the_container(destination: bytes, source: bytes) -> None:
    mac = mac_bytes("02:aa:bb:cc:dd:ee")
    for to in (destination, mac, mac[:5] + b"\0", b"\xff" * 6):
        for by in (source, mac, b"\0" + mac[1:]):
            wanted = to == mac or (by == mac and to[0] & 1 == 1)
            assert run_filter(concerning(mac), to + by + bytes(50)) == wanted


def test_the_bridge_port_says_what_iproute_says() -> None:
    # As strace(1) shows it for "bridge link set dev … state 0", with IFLA_PROTINFO for the port.
    assert message(7, 3).hex() == (
        "2c000000130005000000000000000000070000000700000000000000000000000c000c800500010003000000"
    )
