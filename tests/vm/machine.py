"""One guest: a QEMU that cannot outlive its block, and commands run in it.

    with Machine(kernel, drives, folder=tmp_path) as guest:
        guest.run("migrator --help")

QEMU emulates (TCG): a guest is about ten times slower than this machine, and needs no hardware for it.
Commands go over a virtio port to tests/vm/guest/commands.sh, one at a time; what shall go on in the meantime is
started with `spawn`. The serial console goes to FOLDER/NAME.console.
"""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.vm.qmp import Qmp

# What the kernel says when it has found a mistake of its own.
SPLAT = re.compile(
    r"BUG:|WARNING:|Oops|KASAN|UBSAN|general protection fault|INFO: (possible|task .* blocked|rcu)|Kernel panic|"
    r"unable to handle|bad unlock balance|refcount_t"
)
BOOT_SECONDS = 60
SLACK = 20.0


class MachineLost(RuntimeError):
    """The guest died, hangs or never came up. Says nothing about what was tested in it."""


class KernelSplat(RuntimeError):
    """The guest's kernel has reported a mistake of its own."""


class CommandFailed(AssertionError):
    """A command in a guest ended otherwise than it should have."""


@dataclass(frozen=True, slots=True)
class Completed:
    """How a script ended: exit status, and its two outputs."""

    status: int
    stdout: str
    stderr: str
    raw: bytes


class Machine:
    """A guest; a context manager.

    kernel:    bzImage; an `initrd` beside it is booted with it
    drives:    read-only images, /dev/vda first: the root, then the project
    folder:    for the console and the sockets; kept by whoever owns it
    snapshot:  start from this file, made by `save` of a machine with the same arguments, in place of booting
    lan:       (own, other) unix socket paths of a cable to another guest; its end here is eth0
    ssh_port:  a port of this machine that leads to the guest's port 22 (over eth1), 0 for none
    append:    parameters of the kernel, besides those that all guests have
    """

    def __init__(
        self,
        kernel: Path,
        drives: Sequence[Path],
        *,
        folder: Path,
        name: str = "guest",
        memory_mib: int = 1024,
        cpus: int = 1,
        snapshot: Path | None = None,
        lan: tuple[Path, Path] | None = None,
        ssh_port: int = 0,
        boot_seconds: float = BOOT_SECONDS,
        append: str = "",
    ) -> None:
        self.name = name
        self.folder = folder
        self.console = folder / f"{name}.console"
        self._boot_seconds = boot_seconds
        self._snapshot = snapshot
        self._process: subprocess.Popen[bytes] | None = None
        self._port: socket.socket | None = None
        self._monitor: socket.socket | None = None
        own, other = lan or (folder / f"{name}.lan", folder / f"{name}.nowhere")
        forward = f",hostfwd=tcp:127.0.0.1:{ssh_port}-:22" if ssh_port else ""
        # A guest must not outlive whoever started it, even when that is killed.
        self._argv = [
            "setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64",
            "-M", "q35", "-cpu", "max", "-smp", str(cpus), "-m", str(memory_mib),
            "-accel", "tcg,thread=multi", "-nodefaults", "-no-reboot", "-display", "none",
            "-kernel", str(kernel),
            "-append", "console=ttyS0 loglevel=5 panic=-1 tsc=reliable no_timer_check "
            f"random.trust_cpu=on root=/dev/vda ro rootfstype=erofs init=/bin/init {append}",
            "-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console",
            "-device", "virtio-serial-pci",
            "-chardev", f"socket,id=commands,path={self._path('commands')}",
            "-device", "virtserialport,chardev=commands,name=commands",
            "-qmp", f"unix:{self._path('qmp')}",
            "-netdev", f"dgram,id=lan,local.type=unix,local.path={own},remote.type=unix,remote.path={other}",
            "-device", "virtio-net-pci,netdev=lan,romfile=",
            "-netdev", f"user,id=user,restrict=on{forward}",
            "-device", "virtio-net-pci,netdev=user,romfile=",
        ]  # fmt: skip
        if (initrd := kernel.with_name("initrd")).exists():
            self._argv += ["-initrd", str(initrd)]
        for number, drive in enumerate(drives):
            self._argv += ["-drive", f"if=none,id=d{number},file={drive},format=raw,read-only=on",
                           "-device", f"virtio-blk-pci,drive=d{number}"]  # fmt: skip
        if snapshot:
            self._argv += ["-incoming", f"exec:cat '{snapshot}'"]

    def __enter__(self) -> Machine:
        self.folder.mkdir(parents=True, exist_ok=True)
        listeners = [self._listener("commands"), self._listener("qmp")]
        try:
            with (self.folder / f"{self.name}.qemu").open("wb") as log:
                self._process = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self._port, self._monitor = (self._accept(listener) for listener in listeners)
            if self._snapshot is None:
                self._await_ready()
            self.run(f"echo {self.name} > /proc/sys/kernel/hostname")
            self.set_clock()
        except BaseException:
            self.close()
            raise
        finally:
            for listener in listeners:
                listener.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None:
            self.check_console()

    def close(self) -> None:
        """End the guest, as by pulling its plug."""
        for connection in (self._port, self._monitor):
            if connection:
                connection.close()
        if self._process:
            self._process.kill()
            self._process.wait()
        for suffix in ("commands", "qmp", "lan"):
            Path(self._path(suffix)).unlink(missing_ok=True)

    def run(self, script: str, *, seconds: float = 180.0, status: int | None = 0) -> Completed:
        """Run a shell script to its end. `CommandFailed` unless it exits with `status` (None: with any);
        137 is what one exits with that was killed after `seconds`."""
        body = script.encode()
        done = self._request(f"run {int(seconds)} {len(body)}\n".encode() + body, seconds)
        if status is not None and done.status != status:
            raise CommandFailed(
                f"in {self.name}: {script}\nexit status {done.status}, not {status}\n{done.stdout}{done.stderr}"
            )
        return done

    def python(self, code: str) -> str:
        """Run Python code with this project importable; what it prints."""
        return self.run(f"$PYTHON -c {shlex.quote(code)}").stdout

    def spawn(self, script: str) -> int:
        """Start a shell script that goes on by itself, in a session of its own; its pid."""
        quoted = shlex.quote(f"exec {script}")
        return int(self.run(f"setsid bash -c {quoted} > /dev/null 2>&1 & echo $!").stdout)

    def put(self, path: str, content: bytes) -> None:
        """Write a file in the guest."""
        done = self._request(f"put {len(content)} {path}\n".encode() + content, 60.0)
        if done.status:
            raise CommandFailed(f"in {self.name}: cannot write {path}: {done.stderr}")

    def get(self, path: str) -> bytes:
        """Read a file of the guest."""
        return self.run(f"cat {shlex.quote(path)}").raw

    def save(self, path: Path) -> None:
        """Write the machine's state to a file, for later machines to start from. This one is of no use afterwards."""
        assert self._monitor is not None
        try:
            Qmp(self._monitor).save(str(path))
        except (OSError, ValueError, RuntimeError) as error:
            raise MachineLost(f"{self.name}: {error}{self._last_words()}") from error

    def set_clock(self) -> None:
        """Give the guest the time of this machine: its snapshot has another, and its clock does not go as ours does.

        Two hosts agree by theirs what time has passed. Measured after each change, since this machine may be busy."""
        for _ in range(10):
            began = time.time_ns()
            ahead = int(self.run("date +%s%N").stdout) - (began + time.time_ns()) // 2
            if abs(ahead) < 10_000_000:
                return
            self.run(f"now=$(($(date +%s%N) - {ahead})); date -s @${{now:0:-9}}.${{now: -9}}")

    def check_console(self) -> None:
        """`KernelSplat` if the kernel has reported a mistake of its own."""
        text = self.console.read_text(errors="replace")
        if found := SPLAT.search(text):
            start = text.rfind("\n", 0, found.start())
            raise KernelSplat(f"{self.name} ({self.console}):\n{text[start : start + 4000]}")

    # ------------------------------------------------------------------

    def _path(self, suffix: str) -> str:
        return str(self.folder / f"{self.name}.{suffix}")

    def _listener(self, suffix: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        Path(self._path(suffix)).unlink(missing_ok=True)
        listener.bind(self._path(suffix))
        listener.listen(1)
        listener.settimeout(0.5)
        return listener

    def _accept(self, listener: socket.socket) -> socket.socket:
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            try:
                return listener.accept()[0]
            except TimeoutError:
                self._check_alive()
                if time.monotonic() > deadline:
                    raise MachineLost(f"{self.name}: QEMU does not connect{self._last_words()}") from None

    def _await_ready(self) -> None:
        deadline = time.monotonic() + self._boot_seconds
        if self._line(deadline) != "READY":
            raise MachineLost(f"{self.name} did not boot{self._last_words()}")

    def _request(self, request: bytes, seconds: float) -> Completed:
        assert self._port is not None, "outside of its block"
        deadline = time.monotonic() + seconds + SLACK
        self._port.settimeout(SLACK)
        try:
            self._port.sendall(request)
        except OSError as error:
            raise MachineLost(f"{self.name} takes no request: {error}{self._last_words()}") from error
        status, out, err = map(int, self._line(deadline).split())
        raw = self._bytes(out, deadline)
        stderr = self._bytes(err, deadline)
        return Completed(status, raw.decode(errors="replace"), stderr.decode(errors="replace"), raw)

    def _line(self, deadline: float) -> str:
        line = b""
        while not line.endswith(b"\n"):
            line += self._bytes(1, deadline)
        return line.decode().strip()

    def _bytes(self, count: int, deadline: float) -> bytes:
        assert self._port is not None
        got = bytearray()
        while len(got) < count:
            self._port.settimeout(max(0.01, min(1.0, deadline - time.monotonic())))
            try:
                chunk = self._port.recv(min(count - len(got), 1 << 20))
            except TimeoutError:
                self._check_alive()
                if time.monotonic() > deadline:
                    raise MachineLost(f"{self.name} does not answer{self._last_words()}") from None
                continue
            except ConnectionError as error:
                raise MachineLost(f"{self.name} has ended: {error}{self._last_words()}") from error
            if not chunk:
                raise MachineLost(f"{self.name} has ended{self._last_words()}")
            got += chunk
        return bytes(got)

    def _check_alive(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise MachineLost(f"{self.name}: QEMU exited with {self._process.returncode}{self._last_words()}")

    def _last_words(self) -> str:
        words = ""
        for path in (self.folder / f"{self.name}.qemu", self.console):
            if path.exists() and (text := path.read_text(errors="replace")[-3000:].strip()):
                words += f"\n{path}:\n{text}"
        return words
