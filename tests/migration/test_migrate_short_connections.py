"""A web server whose clients open a connection for each request moves there and back, and none of them waits."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import msgspec
import pytest

from migrator.testing.servers import nginx_command
from migrator.testing.stage import Stage
from migrator.testing.webclient import Tally

pytestmark = pytest.mark.root

ADDRESS, PORT = "10.77.0.70", 8080
BODY = bytes(range(256)) * 40
MOVES = 4


@contextlib.contextmanager
def web_clients(stage: Stage, count: int) -> Iterator[list[Tally]]:
    """Clients that ask all the time inside the block; what came of it is in the list afterwards."""
    argv = [
        sys.executable, "-m", "migrator.testing.webclient", ADDRESS, str(PORT), "/file",
        hashlib.sha256(BODY).hexdigest(), "--clients", str(count),
    ]  # fmt: skip
    child = stage.client.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    tallies: list[Tally] = []
    try:
        yield tallies
    finally:
        out, _ = child.communicate(input="", timeout=60)
    tallies.append(msgspec.json.decode(out, type=Tally))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("delay", [0.0, 0.025], ids=["no round trip", "50 ms of round trip"])
def test_no_client_of_short_connections_loses_one(delay: float) -> None:
    with Stage(delay=delay) as stage:
        command = nginx_command(stage.folder / "web", PORT, workers=2)
        (stage.folder / "web" / "www" / "file").write_bytes(BODY)
        for folder, _, _ in os.walk(stage.folder):
            os.chmod(folder, 0o755)
        stage.start_container("web", command, address=ADDRESS)
        time.sleep(0.5)
        results = []
        with web_clients(stage, 16) as tallies:
            time.sleep(0.5)
            here, there = stage.a, stage.b
            for _ in range(MOVES):
                results.append(stage.migrate("web", here, there))
                here, there = there, here
                time.sleep(0.3)
        (tally,) = tallies
        assert tally.failures == []
        assert tally.requests > 200
        assert all(result["outcome"] == "migrated" for result in results)
        print(tally, [(r["downtime"], r["connections_served"]) for r in results])
        stage.a.run(["migrator", "stop", "web"])
