"""Redis under load, there and back: one connection, every acknowledged write verified."""

from __future__ import annotations

import json

import msgspec
import pytest

from migrator.model import MigrationResult
from migrator.testing.redisclient import fill, verify_fill
from migrator.testing.servers import redis_command
from migrator.testing.stage import Stage
from migrator.testing.workloads import Workload

ADDRESS, PORT = "10.77.0.50", 6379

pytestmark = pytest.mark.root


def test_redis_moves_there_and_back_and_its_client_never_notices(stage: Stage) -> None:
    stage.start_container("shop", redis_command(stage.folder, PORT), address=ADDRESS)
    with stage.client.inside():
        count = fill(ADDRESS, PORT, 64)
    client = Workload(
        "migrator.testing.redisclient", stage.folder, ADDRESS, PORT, "--rate", 2000, netns=stage.client.namespace
    )
    with client:
        hosts = [stage.a, stage.b]
        for _ in range(4):
            here, there = hosts
            result = stage.migrate("shop", here, there)
            assert result["outcome"] == "migrated"
            assert result["stream_bytes"] > 0
            assert 0 <= result["downtime"] - 0.002 < result["first_packet"]  # its client has been asking all the time
            assert json.loads(here.run(["migrator", "ps", "--json"]).stdout) == []
            (row,) = json.loads(there.run(["migrator", "ps", "--json"]).stdout)
            assert (row["name"], row["state"]) == ("shop", "running")
            client.check_alive_and_progressing()
            hosts.reverse()
        client.finish()
    report = json.loads(client.stdout.read_text().splitlines()[-1])
    assert report["replies"] > 1000
    assert (report["lost_replies"], report["wrong_replies"], report["reconnects"]) == (0, 0, 0)
    assert report["verified_keys"] > 0
    with stage.client.inside():
        verify_fill(ADDRESS, PORT, count, step=7)
    stage.a.run(["migrator", "stop", "shop"])


def test_the_timeline_adds_up_to_the_downtime(stage: Stage) -> None:
    stage.start_container("line", redis_command(stage.folder, PORT), address="10.77.0.51")
    result = stage.migrate("line", stage.a, stage.b)
    stage.b.run(["migrator", "stop", "line"])
    timeline = msgspec.convert(result, MigrationResult).timeline
    assert timeline is not None
    parts = timeline.downtime_parts()
    assert parts
    assert sum(p.end - p.start for p in parts) == timeline.resumed_at - timeline.frozen_at
    assert abs(result["downtime"] - sum(p.seconds for p in parts)) < 1e-6
