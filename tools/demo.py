"""The main job, shown: a Redis under load moves between two hosts and its client does not notice.

Two hosts are two network namespaces of this machine on one switch, with an agent each. Redis runs in a
container on host a, filled with data; a client on a third host keeps one connection and checks every reply
while `migrator migrate` moves the container to host b.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from migrator.testing.picture import Bar, downtime_svg, longest_wait, read_samples
from migrator.testing.redisclient import fill, verify_fill
from migrator.testing.servers import redis_command
from migrator.testing.stage import Stage, require_root
from migrator.testing.workloads import Workload

ADDRESS, PORT = "10.77.0.50", 6379


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mib", type=int, default=512, help="data in Redis, MiB")
    parser.add_argument("--rate", type=float, default=1000.0, help="exchanges per second of the client")
    parser.add_argument("--picture", type=Path, default=Path("build/demo.svg"), help="where the picture goes")
    options = parser.parse_args()
    require_root()
    show = Console(highlight=False, soft_wrap=True)
    with Stage(tag="demo") as stage:
        show.print(f"[dim]two hosts stand: a {stage.a.address}, b {stage.b.address}; a client on a third[/]")
        argv = redis_command(stage.folder, PORT)
        pid = stage.start_container("shop", argv, address=ADDRESS)
        show.print(f"[bold]migrator run --name shop --ip {ADDRESS}/24 -- redis-server …[/]   (pid {pid} on host a)")
        with stage.client.inside():
            count = fill(ADDRESS, PORT, options.mib)
        show.print(f"[dim]filled with {options.mib} MiB in {count} keys; the client begins to write and check[/]")
        client = Workload(
            "migrator.testing.redisclient",
            stage.folder,
            ADDRESS,
            PORT,
            "--rate",
            options.rate,
            netns=stage.client.namespace,
        )
        with client:
            time.sleep(2)
            show.print(f"\n[bold]migrator migrate shop root@{stage.b.address}[/]")
            sys.stdout.flush()
            started = time.monotonic_ns()
            result = stage.migrate("shop", stage.a, stage.b, show=True)
            time.sleep(2)
            client.finish()
        report = json.loads(client.stdout.read_text().splitlines()[-1])
        with stage.client.inside():
            verify_fill(ADDRESS, PORT, count, step=max(1, count // 2000))
        samples = read_samples(client.out.with_name(client.out.name + ".samples"))
        where = stage.b.run(["migrator", "ps"]).stdout
    show.print(f"\n[dim]on host b now:[/]\n{where}", end="")
    gap = longest_wait(samples, started)
    gap_ms = (gap[1] - gap[0]) / 1e6
    bars = [Bar(s["name"], s["start"], s["end"], s["where"]) for s in result["timeline"]["phases"]]
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    options.picture.write_text(
        downtime_svg(
            samples,
            bars,
            title=f"Redis with {options.mib} MiB moves to another host",
            subtitle=f"{report['replies']} replies, every one checked; one connection",
        )
    )
    show.print(
        f"\nThe client, on its one connection: {report['replies']} replies checked, {report['lost_replies']} lost,"
        f" {report['wrong_replies']} wrong, {report['reconnects']} reconnects;"
        f" longest wait [bold]{gap_ms:.1f} ms[/] during the migration.\nPicture: {options.picture}"
    )
    if report["lost_replies"] or report["wrong_replies"] or report["reconnects"]:
        raise SystemExit("the client noticed: that is a failure")


if __name__ == "__main__":
    main()
