"""A fleet on one machine: an uneven load is evened out, and a host is emptied, while clients write and check.

Four hosts are network namespaces of this machine on one switch, each with a real agent; workloads are small Redis
servers, each with a client that keeps one connection and checks every reply, and programs that only use memory and
time. Everything is done by the commands that a person would use.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from rich.console import Console

from migrator.linux.namespaces import entered
from migrator.testing.fleet import FleetStage, busy
from migrator.testing.servers import redis_command
from migrator.testing.stage import MIGRATOR, require_root
from migrator.testing.workloads import Workload

PORT = 6379
PAGES = (9742, 9743)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shops", type=int, default=3, help="Redis servers with a client each")
    parser.add_argument("--rate", type=float, default=100.0, help="exchanges per second of each client")
    parser.add_argument("--page", type=float, default=0.0, help="seconds that the web page stays at the end")
    options = parser.parse_args()
    require_root()
    show = Console(highlight=False, soft_wrap=True)
    began = time.monotonic()
    with FleetStage("abcd", tag="demofleet") as fleet, contextlib.ExitStack() as clients:
        addresses = ", ".join(f"{host.label} {host.address}" for host in fleet.hosts.values())
        show.print(f"[dim]four hosts stand, each with an agent: {addresses}[/]")
        run(show, fleet, "join", *(f"{host.address}:7022" for host in fleet.hosts.values()))
        first, second = (f"controller-{port}" for port in PAGES)
        leader = fleet.controller("--ttl", "4", "--web", f"{fleet.client.address}:{PAGES[0]}", name=first)
        while f"{first} leads" not in (fleet.lan.folder / f"{first}.log").read_text():
            if leader.poll() is not None:
                raise SystemExit((fleet.lan.folder / f"{first}.log").read_text())
            time.sleep(0.1)
        fleet.controller("--ttl", "4", "--web", f"{fleet.client.address}:{PAGES[1]}", name=second)
        url = clients.enter_context(page(fleet, PAGES))
        fleet.command("balance", "--mode", "off", "--every", "2s")  # it looks often, and leaves the deciding to us
        show.print(f"[dim]two controllers run, of which one leads; the page is {url}[/]\n")
        checkers = []
        for number in range(options.shops):
            address = f"10.77.0.{50 + number}"
            argv = redis_command(fleet.lan.folder, PORT)
            fleet.run("a", f"shop{number}", argv, address=address)
            client = Workload(
                "migrator.testing.redisclient", fleet.lan.folder, address, PORT, "--rate", options.rate,
                netns=fleet.client.namespace, label=f"client{number}",
            )  # fmt: skip
            checkers.append(clients.enter_context(client))
        for number, size in enumerate((160, 100, 60)):
            fleet.run("a", f"batch{number}", busy(size, 0.1))
        time.sleep(2)
        show.print("[bold]1. Everything is on one host[/]")
        run(show, fleet, "hosts")
        show.print("[bold]2. It is evened out[/]")
        run(show, fleet, "balance", "--now")
        run(show, fleet, "hosts")
        fullest = max(fleet.where().items(), key=lambda one: len(one[1]))[0]
        show.print(
            f"[bold]3. Host {fullest} is emptied for maintenance; the controller that leads is killed meanwhile[/]"
        )
        run(show, fleet, "drain", fullest, "--dry-run")
        run(show, fleet, "drain", fullest, "--detach")
        time.sleep(1)
        leader.kill()
        run(show, fleet, "drain", fullest)
        run(show, fleet, "hosts")
        show.print("[bold]4. It gets back what it had[/]")
        run(show, fleet, "uncordon", fullest, "--bring-back")
        run(show, fleet, "ps", "--all")
        lost = 0
        for number, client in enumerate(checkers):
            client.finish()
            report = json.loads(client.stdout.read_text().splitlines()[-1])
            bad = report["lost_replies"] + report["wrong_replies"] + report["reconnects"]
            lost += bad
            show.print(
                f"client of shop{number}: {report['replies']} replies checked on one connection, "
                f"{report['lost_replies']} lost, {report['wrong_replies']} wrong"
            )
        time.sleep(options.page)
    show.print(f"\n[dim]{time.monotonic() - began:.0f} s in all[/]")
    if lost:
        raise SystemExit("a client noticed: that is a failure")


@contextlib.contextmanager
def page(fleet: FleetStage, ports: Sequence[int]) -> Iterator[str]:
    """The URL, on this machine, of the page of whichever controller of the fleet's network lives."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_forward, args=(listener, fleet, ports), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        listener.shutdown(socket.SHUT_RDWR)


def _forward(listener: socket.socket, fleet: FleetStage, ports: Sequence[int]) -> None:
    while True:
        try:
            near, _ = listener.accept()
        except OSError:  # it is over
            return
        threading.Thread(target=_connect, args=(near, fleet, ports), daemon=True).start()


def _connect(near: socket.socket, fleet: FleetStage, ports: Sequence[int]) -> None:
    with near, contextlib.suppress(OSError):
        for port in ports:
            with contextlib.suppress(ConnectionRefusedError), entered(fleet.client.netns_path):
                far = socket.create_connection((fleet.client.address, port))
                break
        else:
            return
        with far:
            other = threading.Thread(target=_pump, args=(far, near), daemon=True)
            other.start()
            _pump(near, far)
            other.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def run(show: Console, fleet: FleetStage, *argv: str) -> None:
    """A command as it is typed, and what it says."""
    show.print(f"[green]$[/] migrator {' '.join(argv)}")
    sys.stdout.flush()
    done = fleet.client.run([*MIGRATOR, *argv], check=False, stdout=None, stderr=None)
    print()
    if done.returncode:
        raise SystemExit(f"migrator {' '.join(argv)} exited with {done.returncode}")


if __name__ == "__main__":
    main()
