"""Guests for tests. These tests are run by `make test-kernel`; where no kernel was asked for they are left out."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.vm.lab import Lab, series
from tests.vm.machine import Machine

# What there is to test of a series as soon as it has patches.
OF_THE_CALLS = [
    "test_cross_engine.py",
    "test_fuzz.py",
    "test_mixed_kernels.py",
    "test_selftests.py",
    "test_walkthroughs.py",
]

# `make test` runs without any: building a kernel takes minutes, and needs packages that nothing else does.
collect_ignore_glob = [] if os.environ.get("MIGRATOR_TEST_KERNEL") else ["test_*.py"]
collect_ignore = [] if series() else OF_THE_CALLS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fuzzer first, which takes ten minutes on one processor: all others go on beside it."""
    items.sort(key=lambda item: item.path.name != "test_fuzz.py")


_FAILED = pytest.StashKey[bool]()


def pytest_report_header() -> str:
    if not os.environ.get("MIGRATOR_TEST_KERNEL"):
        return "kernel: left to `make test-kernel`"
    return f"kernel: {len(series())} patches" if series() else "kernel: no patches; the tests of the calls are left out"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
        if item.parent is not None:
            item.parent.stash[_FAILED] = True
    return report


def _kept(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A short path for sockets; the logs in it stay where a test failed, under build/vm."""
    folder = Path(tempfile.mkdtemp(prefix="vm-", dir="/tmp"))
    try:
        yield folder
    finally:
        if request.node.stash.get(_FAILED, False):
            target = Path(__file__).resolve().parents[2] / "build" / "vm" / request.node.name.replace("/", "_")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(folder, target, ignore=lambda where, names: [n for n in names if n.endswith(".lan")])
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    yield from _kept(request)


@pytest.fixture(scope="module")
def module_folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    yield from _kept(request)


@pytest.fixture(scope="module")
def guest(module_folder: Path) -> Iterator[Machine]:
    """One guest with the patched kernel, for all tests of a file."""
    with Lab(module_folder).guest() as machine:
        yield machine


@pytest.fixture(scope="module")
def pair(module_folder: Path) -> Iterator[tuple[Machine, Machine]]:
    """Two guests with the patched kernel and agents, for all tests of a file."""
    with Lab(module_folder).pair() as machines:
        yield machines
