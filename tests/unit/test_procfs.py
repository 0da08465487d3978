"""Reading /proc."""

from __future__ import annotations

import os

from migrator.linux import procfs

MAPS = (
    "55d0c0000000-55d0c0001000 r-xp 00002000 fe:01 1234                       /usr/bin/some thing\\012x\n"
    "7f0000000000-7f0000010000 rw-s 00000000 00:01 77                         /memfd:buffer (deleted)\n"
    "7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]\n"
)


def test_a_line_of_maps_is_a_value() -> None:
    first, second, third = procfs.parse_maps(MAPS)
    assert first == procfs.Vma(
        0x55D0C0000000, 0x55D0C0001000, True, False, True, False, 0x2000, "fe:01", 1234, "/usr/bin/some thing\nx"
    )
    assert second.shared and second.write and second.path == "/memfd:buffer (deleted)"
    assert third.path == "[stack]" and not third.shared


def test_mappings_seen_twice_while_they_moved_are_taken_once() -> None:
    text = (
        "1000-5000 rw-p 00000000 00:00 0 \n"
        "3000-9000 rw-p 00000000 00:00 0 \n"
        "2000-3000 rw-p 00000000 00:00 0 \n"
        "9000-a000 rw-p 00000000 00:00 0 \n"
    )
    assert [(v.start, v.end) for v in procfs.parse_maps(text)] == [(0x1000, 0x5000), (0x9000, 0xA000)]


def test_lines_seen_before_are_the_same_values_and_those_gone_are_forgotten() -> None:
    lines: dict[str, procfs.Vma] = {}
    first, second, third = procfs.parse_maps(MAPS, lines)
    other = MAPS.replace("7f0000010000", "7f0000020000")
    again = procfs.parse_maps(other, lines)
    assert again[0] is first and again[2] is third
    assert again[1] != second and again[1].end == 0x7F0000020000
    assert list(lines.values()) == again == procfs.parse_maps(other)


def test_our_own_mappings_hold_this_program() -> None:
    paths = {v.path for v in procfs.maps(os.getpid())}
    assert os.path.realpath(f"/proc/{os.getpid()}/exe") in paths
    assert "[stack]" in paths


def test_a_name_with_parentheses_does_not_confuse_the_fields_of_stat() -> None:
    fields = procfs.stat(os.getpid())
    assert int(fields[1]) == os.getpid()
    assert int(fields[4]) == os.getppid()
    assert procfs.ns_pid(procfs.status(os.getpid())) == os.getpid()
