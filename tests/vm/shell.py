"""`make lab`: two guests with the patched kernel on one cable, and a shell in the first.

    python -m tests.vm.shell [--kernel VARIANT] [COMMAND...]

The guests are a (10.77.0.1) and b (10.77.0.2), each with an agent that the other may log in to; `ssh b` leads from
one to the other. They end with the shell. A COMMAND is run in a in place of the shell.
"""

from __future__ import annotations

import argparse
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.vm import image
from tests.vm.lab import Lab
from tests.vm.machine import Machine

WELCOME = """\
Two guests: a (this one, 10.77.0.1) and b (10.77.0.2). Another terminal may enter them, too:
    a: {a}
    b: {b}
To try: run a program that counts, and move it to b while it runs:
    setsid {counter} /tmp/count &
    migrator migrate $! root@b:7022 --copy-files; ssh b tail -f /tmp/count
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="A shell in two networked guests with the patched kernel.")
    parser.add_argument("--kernel", default="release", help="release, debug, stock or uncalled")
    parser.add_argument("command", nargs="*", help="to run in guest a, in place of a shell")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp") as folder:
        ports = free_ports(2)
        with Lab(Path(folder)).pair(arguments.kernel, arguments.kernel, ssh_ports=ports) as guests:
            for guest in guests:
                start_sshd(guest)
            enter = [ssh(port) for port in ports]
            print(f"lab: two guests after {time.monotonic() - started:.1f} s", file=sys.stderr)
            if not arguments.command:
                from migrator.testing.workloads import build

                print(WELCOME.format(a=shlex.join(enter[0]), b=shlex.join(enter[1]), counter=build("counter")))
            return subprocess.run([*enter[0], *arguments.command], check=False).returncode


def start_sshd(guest: Machine) -> None:
    """Let this machine log in: sshd, and an address on the interface that leads to it (QEMU's user network)."""
    guest.run("ip addr add 10.0.2.15/24 dev eth1; ip link set eth1 up; /usr/sbin/sshd -f /etc/sshd_config")


def ssh(port: int) -> list[str]:
    """The command that logs in. The guest is on this machine and new, so its key says nothing."""
    options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
    return ["ssh", "-F", "none", "-i", str(image.CACHE / "id_ed25519"), "-p", str(port),
            *(part for option in options for part in ("-o", option)), "root@127.0.0.1"]  # fmt: skip


def free_ports(count: int) -> tuple[int, ...]:
    """TCP ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return tuple(each.getsockname()[1] for each in sockets)
    finally:
        for each in sockets:
            each.close()


if __name__ == "__main__":
    sys.exit(main())
