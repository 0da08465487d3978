"""Many system calls in one go answer as each alone would."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.linux import batch
from migrator.linux import x86_64 as arch
from migrator.linux.batch import Area, Iovecs, Table, differing, each, raise_first

NR = arch.NR


@pytest.fixture(params=["in one go", "one by one"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory cannot be made executable, the same comes out."""
    if request.param == "one by one":
        monkeypatch.setattr(batch, "_walkers", lambda: (batch.one_by_one, batch.one_by_one))


@pytest.fixture
def fds(tmp_path: Path) -> Iterator[list[int]]:
    out = []
    for i in range(20):
        (tmp_path / str(i)).write_text("x" * i)
        out.append(os.open(tmp_path / str(i), os.O_RDWR | (os.O_APPEND if i % 2 else 0)))
    yield out
    for fd in out:
        os.close(fd)


def test_each_item_has_the_results_of_its_own_calls(fds: list[int]) -> None:
    ends, flags = each(len(fds), (NR["lseek"], fds, 0, os.SEEK_END), (NR["fcntl"], fds, 3))
    assert ends == list(range(20))
    assert [bool(value & os.O_APPEND) for value in flags] == [bool(i % 2) for i in range(20)]


def test_what_the_kernel_writes_is_where_it_was_sent(fds: list[int]) -> None:
    areas = Area(144, len(fds))
    (results,) = each(len(fds), (5, fds, areas.addresses))  # fstat
    assert not any(results)
    assert [int.from_bytes(areas.get(i, 56)[48:56], "little") for i in range(20)] == list(range(20))


def test_vectors_lead_to_the_areas(fds: list[int]) -> None:
    areas = Area(32, len(fds))
    vectors = Iovecs(areas.addresses, [i or 1 for i in range(20)])
    (got,) = each(len(fds), (NR["readv"], fds, vectors.addresses, 1))
    assert got == list(range(20))
    assert [areas.get(i, i) for i in range(20)] == [b"x" * i for i in range(20)]


def test_an_error_is_the_result_of_its_item_and_stops_none_of_the_others(fds: list[int]) -> None:
    (results,) = each(3, (NR["lseek"], [fds[0], 99999, fds[1]], 0, os.SEEK_END))
    assert results == [0, -errno.EBADF, 1]
    with pytest.raises(OSError, match="lseek") as caught:
        raise_first(results, "lseek", ["a", "b", "c"])
    assert (caught.value.errno, caught.value.filename) == (errno.EBADF, "b")
    raise_first([0, 1], "lseek", ["a", "b"])


def test_negative_arguments_are_passed_as_they_are(fds: list[int]) -> None:
    os.lseek(fds[5], 0, os.SEEK_END)
    (results,) = each(1, (NR["lseek"], [fds[5]], -2, os.SEEK_CUR))
    assert results == [3]


def test_nothing_is_done_for_no_items() -> None:
    assert each(0, (NR["getpid"],), (NR["getpid"],)) == [[], []]
    assert batch.Strings([]).addresses == []
    assert Area(8, 0).view.cast("i").tolist()[0:0] == []


def test_strings_lie_where_they_are_said_to(tmp_path: Path) -> None:
    names = [str(tmp_path / name).encode() for name in ("a", "longer", "ä")]
    for name in names[1:]:
        os.close(os.open(name, os.O_CREAT))
    strings = batch.Strings(names)
    results, _ = each(3, (NR["openat"], -100, strings.addresses, os.O_RDONLY), (NR["getpid"],))
    assert results[0] == -errno.ENOENT
    assert [os.readlink(f"/proc/self/fd/{fd}").encode() for fd in results[1:]] == names[1:]
    assert each(3, (NR["close"], results)) == [[-errno.EBADF, 0, 0]]


def test_a_call_that_waits_lets_others_go_on() -> None:
    pid = os.fork()
    if not pid:
        os._exit(3)
    status = Area(4, 1)
    assert each(1, (NR["wait4"], [pid], status.addresses, 0, 0), blocking=True) == [[pid]]
    assert os.waitstatus_to_exitcode(int.from_bytes(status.get(0, 4), "little")) == 3


def test_a_table_takes_arguments_when_it_is_there_already(fds: list[int]) -> None:
    table = Table(len(fds), (NR["lseek"], 0, 0, os.SEEK_END), (NR["lseek"], 0, 0, os.SEEK_SET))
    again = Table(len(fds), (NR["lseek"], 0, 1, os.SEEK_SET))
    copies = Table(len(fds), (NR["fcntl"], fds, fcntl.F_DUPFD, 0))
    copies.walk()
    for place in range(2):
        table.put(place, 1, copies.results(0))
    table.walk()
    assert table.results(0).tolist() == [os.fstat(fd).st_size for fd in fds]
    assert table.results(1).tolist() == [0] * len(fds)
    again.put(0, 1, fds[2])
    again.put(0, 2, 5)
    again.walk()
    assert again.results(0).tolist() == [5] * len(fds)
    for fd in copies.results(0):
        os.close(fd)


def test_a_table_of_nothing_can_be_walked() -> None:
    table = Table(0, (NR["close"], 0))
    table.put(0, 1, 7)
    table.walk()
    assert table.results(0).tolist() == []


def test_the_items_that_differ_in_any_column_are_found() -> None:
    pairs = list(itertools.product(range(2), repeat=2))
    for found in itertools.product(pairs, repeat=3):
        for wanted in itertools.product(pairs, repeat=3):
            words = memoryview(array("q", [a for a, _ in found]))
            halves = memoryview(array("i", [value for _, b in found for value in (b, 9)]))[::2]
            expected = [array("q", [a for a, _ in wanted]).tobytes(), array("i", [b for _, b in wanted]).tobytes()]
            differ = {at for at in range(3) if found[at] != wanted[at]}
            assert differing([words, halves], expected) == differ
