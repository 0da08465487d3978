"""A host never accepts a lower token than it has accepted before, whatever happens to it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.errors import UsageError
from migrator.fleet import fencing
from migrator.fleet.fencing import MAX_TOKEN, Fence, FencingError, TokenRefused


@given(tokens=st.lists(st.integers(1, 20), max_size=30))
def test_a_token_is_refused_exactly_if_a_higher_one_was_accepted(
    tokens: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fence")
    highest = 0
    for token in tokens:
        fence = Fence("f1", folder)  # as after a restart
        if token < highest:
            with pytest.raises(TokenRefused) as caught:
                fence.check(token)
            assert (caught.value.token, caught.value.seen) == (token, highest)
        else:
            fence.check(token)
            highest = token
        assert fence.seen() == highest


def test_each_fleet_has_its_own_tokens(tmp_path: Path) -> None:
    Fence("one", tmp_path).check(10)
    Fence("other", tmp_path).check(1)
    assert (Fence("one", tmp_path).seen(), Fence("other", tmp_path).seen()) == (10, 1)


@pytest.mark.parametrize("fleet", ["", "../x", "a/b", "a" * 65, "a\n", ".hidden", "a\0"])
def test_an_id_that_is_no_file_name_is_refused(fleet: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Fence(fleet, tmp_path)


@pytest.mark.parametrize("token", [0, -1, MAX_TOKEN + 1])
def test_a_number_that_is_no_token_is_refused(token: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Fence("f", tmp_path).check(token)
    assert Fence("f", tmp_path).seen() == 0


def test_a_disk_is_not_filled_with_fleets_that_nobody_has(tmp_path: Path) -> None:
    for number in range(fencing.MOST_FLEETS):
        Fence(f"f{number}", tmp_path).check(1)
    with pytest.raises(FencingError, match="no room for another"):
        Fence("another", tmp_path).check(1)
    Fence("f0", tmp_path).check(2)
    with pytest.raises(TokenRefused):
        Fence("f0", tmp_path).check(1)
    (tmp_path / "f1.token").unlink()
    Fence("another", tmp_path).check(1)


def test_the_largest_token_is_taken(tmp_path: Path) -> None:
    Fence("f", tmp_path).check(MAX_TOKEN)
    assert Fence("f", tmp_path).seen() == MAX_TOKEN


@pytest.mark.parametrize("cut", range(len(b"12345 00000000\n")))
def test_a_truncated_record_is_an_error_and_not_a_new_beginning(cut: int, tmp_path: Path) -> None:
    fence = Fence("f", tmp_path)
    fence.check(12345)
    os.truncate(fence.path, cut)
    with pytest.raises(FencingError, match="damaged"):
        fence.seen()
    with pytest.raises(FencingError, match="damaged"):
        fence.check(99999)


@pytest.mark.parametrize("position", range(len(b"12345 00000000\n")))
def test_a_changed_byte_is_an_error(position: int, tmp_path: Path) -> None:
    fence = Fence("f", tmp_path)
    fence.check(12345)
    data = bytearray(fence.path.read_bytes())
    data[position] ^= 1
    fence.path.write_bytes(data)
    with pytest.raises(FencingError, match="damaged"):
        fence.check(99999)


def test_the_record_of_another_fleet_is_none_of_ours(tmp_path: Path) -> None:
    Fence("one", tmp_path).check(5)
    shutil.copy(tmp_path / "one.token", tmp_path / "other.token")
    with pytest.raises(FencingError):
        Fence("other", tmp_path).check(9)


def test_a_full_disk_accepts_nothing(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=True)
    try:
        Fence("f", tmp_path).check(5)
        with (tmp_path / "rest").open("wb", buffering=0) as rest, pytest.raises(OSError, match="No space"):
            while True:
                rest.write(b"\0" * 4096)
        with pytest.raises(FencingError, match="No space"):
            Fence("f", tmp_path).check(6)
        (tmp_path / "rest").unlink()
        assert Fence("f", tmp_path).seen() == 5
        Fence("f", tmp_path).check(6)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def _check_and_die(folder: Path, name: str, nth: int) -> None:
    """Accept token 6 in a program that dies just before its nth call of os.`name`."""
    real = getattr(os, name)
    count = 0

    def crash(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count > nth:
            os._exit(9)
        return real(*args, **kwargs)

    setattr(fencing.os, name, crash)
    Fence("f", folder).check(6)
    os._exit(0)


@pytest.mark.parametrize("name", ["open", "write", "fsync", "close", "replace"])
def test_a_crash_at_any_step_leaves_the_old_token_or_the_new(name: str, tmp_path: Path) -> None:
    died = 0
    for nth in range(5):
        folder = tmp_path / f"{name}{nth}"
        Fence("f", folder).check(5)
        child = os.fork()
        if not child:
            _check_and_die(folder, name, nth)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        died += status == 9
        assert Fence("f", folder).seen() in ((5, 6) if status else (6,))
        Fence("f", folder).check(6)
    assert 0 < died < 5


def _climb(folder: str, start: int) -> None:
    for token in range(start, 300, 3):
        try:
            Fence("f", Path(folder)).check(token)
        except TokenRefused as refused:
            assert refused.seen > token


def test_processes_that_check_at_once_end_at_the_highest(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_climb, args=(str(tmp_path), start)) for start in (1, 2, 3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert Fence("f", tmp_path).seen() == 299


def test_a_fence_that_cannot_be_written_lets_nothing_through() -> None:
    with pytest.raises(FencingError):
        Fence("f", Path("/proc/fencing")).check(1)
