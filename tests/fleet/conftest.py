"""Both stores, for one suite: what one promises, the other does."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from migrator.fleet.store import Store, open_store
from migrator.testing.etcd import EtcdCluster

Opener = Callable[[], Awaitable[Store]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Debian package of this checkout; it is built once, whatever runs beside us."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "deb"
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if built := list(shared.glob("*.deb")):
            return built[0]
        done = subprocess.run(
            [ROOT / "deploy/debian/build.sh", shared],
            env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "COMPRESS": "none"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """One member, for all tests that break nothing."""
    with EtcdCluster(tmp_path_factory.mktemp("etcd"), members=1) as cluster:
        yield cluster


@pytest.fixture(params=["sqlite", "etcd"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a store that is empty."""
    if request.param == "sqlite":
        return f"sqlite:{tmp_path}/fleet.db"
    cluster: EtcdCluster = request.getfixturevalue("etcd")
    return f"{cluster.url}?prefix={tmp_path.name}"


@pytest.fixture
async def opener(store_url: str) -> AsyncIterator[Opener]:
    """Opens the same store again, as another program would."""
    opened = []

    async def again() -> Store:
        store = await open_store(store_url)
        opened.append(store)
        return store

    yield again
    for store in opened:
        await store.close()


@pytest.fixture
async def store(opener: Opener) -> Store:
    return await opener()
