"""Machines with a systemd of their own, for tests of what is installed on a host.

    with TwoHosts() as hosts, Machine(hosts.a, package) as a:
        a.run(["systemctl", "start", "migrator-agent"])

A machine is this system as an overlay that is thrown away, with systemd as process 1 of a pid, mount, cgroup, IPC
and UTS namespace, on the network of a host of `migrator.testing.hosts`. It has this machine's kernel and
capabilities, and no devices. Needs root, systemd and a cgroup v2 hierarchy.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from migrator.linux import procfs
from migrator.linux.cgroup import Cgroup
from migrator.testing.hosts import Host

SYSTEMD = "/lib/systemd/systemd"
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
}
_TARGET = """[Unit]
Description=a machine without what it has no devices for
Requires=basic.target dbus.socket
After=basic.target
AllowIsolate=yes
"""

# In the cgroup that is to be the machine's own, in namespaces of its own: $1 a directory, $2 the name, $3 the package
_BOOT = """
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" "$1/root"
cd "$1/root"
rm -rf etc/migrator var/lib/migrator var/log/migrator root/.ssh root/.config/migrator
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do
    : > dev/$device
    mount --bind /dev/$device dev/$device
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
hostname "$2"
echo "$2" > etc/hostname
: > etc/machine-id
for unit in systemd-udevd.service systemd-udev-trigger.service systemd-udevd-kernel.socket; do
    ln -sf /dev/null etc/systemd/system/$unit  # the devices are the real machine's, and their network names ours
done
printf '%s' "$4" > etc/systemd/system/machine.target
cp "$3" migrator.deb
pivot_root . mnt
umount -l /mnt
dpkg --force-unsafe-io -i /migrator.deb  # a machine that is thrown away needs nothing on the disk
exec env -i container=other PATH="$PATH" "$5" --log-target=console --unit=machine.target
"""


class Machine:
    """Context manager: `host` with a systemd of its own and migrator from a Debian package."""

    def __init__(self, host: Host, package: Path) -> None:
        self.host = host
        self.label, self.address = host.label, host.address
        self._package = package
        self._name = host.namespace
        self._cgroup: Path | None = None
        self._boot: subprocess.Popen[bytes] | None = None
        self.pid = 0  # of its process 1

    def __enter__(self) -> Self:
        try:
            self._start()
            state = self.run(["systemctl", "is-system-running", "--wait"], check=False).stdout.strip()
            if state != "running":
                raise AssertionError(f"machine {self.label} is {state}\n{self.console()}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        group = Cgroup.create(self._name, version=2)
        self._cgroup = group.path
        group.close()
        self._session.mkdir()
        enter = 'echo $$ > "$0/cgroup.procs"; exec "$@"'
        spaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--cgroup"]
        folder = tempfile.mkdtemp(dir=self.host.folder)
        boot = ["sh", "-eu", "-c", _BOOT, "boot", folder, self.label, str(self._package), _TARGET, SYSTEMD]
        with open(self._console, "wb") as console:
            self._boot = subprocess.Popen(
                ["nsenter", f"--net={self.host.netns_path}", "sh", "-c", enter, str(self._cgroup), *spaces, *boot],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=ENVIRONMENT,
            )  # fmt: skip
        end = time.monotonic() + 120
        while not self._answers():
            if time.monotonic() > end:
                raise AssertionError(f"machine {self.label} does not start\n{self.console()}")
            if self._boot.poll() is not None:
                raise AssertionError(f"machine {self.label} has ended\n{self.console()}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        """Whether its process 1 is systemd already, and its manager can be spoken to."""
        assert self._boot is not None
        try:
            self.pid = procfs.children(self._boot.pid)[0]
            comm = Path(f"/proc/{self.pid}/comm").read_text().strip()
            return comm == "systemd" and self.path("/run/systemd/private").exists()
        except (OSError, IndexError):
            return False

    def argv(self, command: Sequence[str]) -> list[str]:
        """What runs a command in this machine, in the cgroup of a session."""
        enter = 'echo $$ > "$0/cgroup.procs"; exec "$@"'
        within = ["nsenter", f"--target={self.pid}", "--all", "--"]
        return ["sh", "-c", enter, str(self._session), *within, *command]

    def run(
        self, command: Sequence[str], *, check: bool = True, env: Mapping[str, str] | None = None, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in this machine to its end; see `Host.run`."""
        options = {"text": True, "timeout": 120, "capture_output": True, "stdin": subprocess.DEVNULL, **more}
        done = subprocess.run(self.argv(command), env={**ENVIRONMENT, **(env or {})}, **options)
        if check and done.returncode:
            error = subprocess.CalledProcessError(done.returncode, list(command), done.stdout, done.stderr)
            error.add_note(f"stdout: {done.stdout}\nstderr: {done.stderr}")
            raise error
        return done

    def path(self, inside: str) -> Path:
        """Where a file of this machine is reached from outside."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def journal(self, unit: str) -> str:
        """The last lines of the journal of a unit."""
        return self.run(["journalctl", "--no-pager", "-q", "-n", "60", "-u", unit], check=False).stdout

    def console(self) -> str:
        return self._console.read_text(errors="replace")[-4000:]

    @property
    def _session(self) -> Path:
        assert self._cgroup is not None
        return self._cgroup / "session"

    @property
    def _console(self) -> Path:
        return self.host.folder / "console.log"

    def close(self) -> None:
        if self._boot is not None:
            self._boot.kill()  # and with it, everything in its pid namespace
            self._boot.wait()
        if self._cgroup is not None and self._cgroup.exists():
            with Cgroup.at(self._cgroup) as group:
                group.kill()
                group.remove(timeout=30)
