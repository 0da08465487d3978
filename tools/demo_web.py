"""A web server whose clients open a connection for each request moves between two hosts, there and back.

Two hosts are two network namespaces of this machine on one switch, with an agent each. nginx runs in a container on
host a; clients on a third host ask for a file over and over (HTTP/1.0, a connection each) and check what they get,
while `migrator migrate` moves the container to host b and back.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console

from migrator.model import MigrationResult
from migrator.testing.picture import Bar, downtime_svg, longest_wait, read_samples
from migrator.testing.servers import nginx_command
from migrator.testing.stage import Stage, require_root
from migrator.testing.webclient import Tally

ADDRESS, PORT = "10.77.0.51", 80
BODY = bytes(range(256)) * 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--delay", type=float, default=0.0, help="half of the clients' round trip, in ms")
    parser.add_argument("--picture", type=Path, default=Path("build/demo-web.svg"), help="where the picture goes")
    options = parser.parse_args()
    require_root()
    show = Console(highlight=False, soft_wrap=True)
    with Stage(tag="demo", delay=options.delay / 1000) as stage:
        stage.folder.chmod(0o755)
        argv = nginx_command(stage.folder / "web", PORT, workers=2)
        (stage.folder / "web" / "www" / "file").write_bytes(BODY)
        pid = stage.start_container("web", argv, address=ADDRESS)
        show.print(f"[bold]migrator run --name web --ip {ADDRESS}/24 -- nginx …[/]   (pid {pid} on host a)")
        samples_file = stage.folder / "samples"
        client = stage.client.popen(
            [
                *(sys.executable, "-m", "migrator.testing.webclient", ADDRESS, str(PORT), "/file"),
                *(hashlib.sha256(BODY).hexdigest(), "--clients", str(options.clients), "--pause", "0.004"),
                *("--samples", str(samples_file)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        time.sleep(1.5)
        started = time.monotonic_ns()
        show.print(f"\n[bold]migrator migrate web root@{stage.b.address}[/]")
        sys.stdout.flush()
        there = msgspec.convert(stage.migrate("web", stage.a, stage.b, show=True), MigrationResult)
        time.sleep(0.5)
        moved = time.monotonic_ns()
        time.sleep(0.5)
        show.print(f"\n[bold]migrator migrate web root@{stage.a.address}[/]   (and back)")
        sys.stdout.flush()
        back = msgspec.convert(stage.migrate("web", stage.b, stage.a, show=True), MigrationResult)
        time.sleep(1)
        out, _ = client.communicate("", timeout=60)
        tally = msgspec.json.decode(out, type=Tally)
        samples = read_samples(samples_file)
        stage.a.run(["migrator", "stop", "web"])
    assert there.timeline is not None
    bars = [Bar(p.name, p.start, p.end, p.where.value) for p in there.timeline.phases]
    gap = longest_wait(samples, started, moved)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    options.picture.write_text(
        downtime_svg(
            [one for one in samples if started - 10**9 < one[1] < moved],
            bars,
            title="A web server moves to another host",
            claim="nobody waits longer than {}",
            subtitle=f"{tally.requests} requests, a connection each, every answer checked",
        )
    )
    served = there.connections_served + back.connections_served
    show.print(
        f"\n{options.clients} clients: {tally.requests} requests answered, a connection each;"
        f" {len(tally.failures)} failed; {served} connections that nginx had closed were served from the old place;"
        f" longest wait [bold]{(gap[1] - gap[0]) / 1e6:.1f} ms[/].\nPicture: {options.picture}"
    )
    if tally.failures:
        raise SystemExit("a client noticed: " + "; ".join(tally.failures[:5]))


if __name__ == "__main__":
    main()
