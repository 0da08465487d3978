"""Kernels, images and guests put together: what tests ask for.

    with Lab(tmp_path).guest() as guest: ...
    with Lab(tmp_path).pair() as (a, b): ...

Guests start from snapshots, which takes a third of a second; they are made once for a kernel and its images. Of two
on one cable, a is 10.77.0.1 and b is 10.77.0.2, on br0, whose uplink is eth0; their agents run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.vm import image
from tests.vm.machine import CommandFailed, Machine

AGENT_PORT = 7022
MEMORY_MIB = 1024
PLACES = ("a", "b")


@cache
def kernel(variant: str = "release") -> Path:
    """The bzImage of a variant (kernel-patches/scripts/build), built if that has not been done."""
    script = image.KERNEL_PATCHES / "scripts" / "build"
    built = subprocess.run([str(script), variant], stdout=subprocess.PIPE, text=True, check=True)
    return Path(built.stdout.strip()) / "bzImage"


def series() -> list[str]:
    """The patches that `build` applies, in their order (kernel-patches/scripts/common.sh)."""
    patches = Path(os.environ.get("KERNEL_PATCHES") or image.KERNEL_PATCHES / "patches")
    try:
        lines = (patches / "series").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [name for line in lines if (name := line.partition("#")[0].strip())]


@cache
def drives() -> tuple[Path, Path]:
    """The images of a guest: the base, and the project with its tools."""
    programs = image.ROOT / "build" / "guest"
    with image.locked(programs):
        subprocess.run([str(image.KERNEL_PATCHES / "scripts" / "tools"), str(programs)], check=True)
        return image.base_image(), image.project_image(programs)


@dataclass(frozen=True, slots=True)
class Lab:
    """Guests of one test, with their consoles and sockets in `folder`.

    Unix socket paths are short (108 bytes), so `folder` must be, too.
    """

    folder: Path
    memory_mib: int = MEMORY_MIB

    def guest(self, variant: str = "release", *, name: str = "guest") -> Machine:
        """One guest, with nobody on its cable."""
        return self._machine(variant, "guest", name=name)

    @contextlib.contextmanager
    def pair(
        self, first: str = "release", second: str = "release", *, ssh_ports: tuple[int, ...] = (0, 0)
    ) -> Iterator[tuple[Machine, Machine]]:
        """Two guests on one cable, with an agent each that the other may log in to."""
        ends = self.folder / "a.lan", self.folder / "b.lan"
        with (
            self._machine(first, "a", lan=ends, ssh_port=ssh_ports[0]) as a,
            self._machine(second, "b", lan=(ends[1], ends[0]), ssh_port=ssh_ports[1]) as b,
        ):
            yield a, b

    def _machine(
        self, variant: str, role: str, *, name: str = "", lan: tuple[Path, Path] | None = None, ssh_port: int = 0
    ) -> Machine:
        return Machine(
            kernel(variant), drives(), folder=self.folder, name=name or role, memory_mib=self.memory_mib,
            snapshot=snapshot(variant, self.memory_mib, role), lan=lan, ssh_port=ssh_port,
        )  # fmt: skip


@cache
def snapshot(variant: str, memory_mib: int, role: str) -> Path:
    """A guest that has booted, as a file: "a" and "b" have their place on the cable and an agent."""
    parts = [str(kernel(variant).parent), *map(str, drives()), str(memory_mib)]
    for name in ("machine.py", "lab.py"):
        parts.append((Path(__file__).parent / name).read_text())
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    target = image.CACHE / f"snapshot-{role}-{digest}"
    with image.locked(image.CACHE / f"snapshot-{role}"):
        if target.exists():
            os.utime(target)
            return target
        partial = target.with_name(f"{target.name}.new")
        booted = Machine(
            kernel(variant), drives(), folder=image.CACHE / "boot", name=role, memory_mib=memory_mib,
            boot_seconds=60 if variant in ("release", "uncalled") else 180,
        )  # fmt: skip
        with booted as guest:
            guest.run("migrator checkpoint --help", seconds=120)  # so that it need not be read from the disk again
            if role in PLACES:
                plug_in(guest, PLACES.index(role) + 1)
                start_agent(guest)
            guest.save(partial)
        partial.rename(target)
        image.forget_old(image.CACHE, f"snapshot-{role}-*", keep=4)
    return target


def plug_in(guest: Machine, number: int) -> None:
    """Give a guest its place on the cable, a bridge for containers, and pids that no other guest gives out."""
    address = f"10.77.0.{number}"
    guest.run(
        f"ip link set eth0 address 52:54:00:77:00:{number:02x}\n"
        "ip link add br0 type bridge forward_delay 0 stp_state 0\n"
        "ip link set eth0 master br0 && ip link set eth0 up && ip link set br0 up\n"
        f"ip addr add {address}/24 dev br0\n"
        f"echo 'export MIGRATOR_HOST={guest.name}' >> /var/root/.profile\n"
        f"echo {number * 10000} > /proc/sys/kernel/ns_last_pid"  # of some 30000: a copy's are free on the other one
    )


def start_agent(guest: Machine, *options: str) -> None:
    """Start the agent of a guest; returns once it listens. Five minutes, as guests may share a processor with much."""
    pid = guest.spawn(
        f"migrator agent --listen 0.0.0.0:{AGENT_PORT} --host-key /var/root/.ssh/host_key "
        "--authorized-keys /var/root/.ssh/authorized_keys --metrics '' --identity /var/root/.ssh/id_ed25519 "
        f"{' '.join(options)} -v > /tmp/agent.log 2>&1"
    )
    guest.run(
        f"until (exec 3<> /dev/tcp/127.0.0.1/{AGENT_PORT}) 2> /dev/null; do\n"
        f"[ -e /proc/{pid} ] || {{ cat /tmp/agent.log >&2; exit 1; }}\nsleep 0.1\ndone",
        seconds=300,
    )


def restart_agent(guest: Machine, *options: str) -> None:
    """Another agent with these options in place of the one of the snapshot."""
    guest.run("pkill -f 'migrator agent'; while pgrep -f 'migrator agent'; do sleep 0.1; done")
    start_agent(guest, *options)


def migrate(workload: object, source: Machine, destination: Machine, *options: str) -> dict[str, Any]:
    """`migrator migrate` from one guest to the other; its result."""
    for guest in (source, destination):
        guest.set_clock()
    done = source.run(
        f"migrator migrate {workload} root@{destination.name}:{AGENT_PORT} --identity /var/root/.ssh/id_ed25519 "
        f"--json {' '.join(options)}",
        seconds=180, status=None,
    )  # fmt: skip
    if done.status:
        log = destination.run("tail -n 30 /tmp/agent.log").stdout
        raise CommandFailed(f"{source.name} to {destination.name}: {done.status}\n{done.stdout}{done.stderr}\n{log}")
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["outcome"] == "migrated"
    return result
