"""How loaded this host is, from /proc: processor time, memory, network, and pressure (PSI).

    signals = HostSignals()
    ...
    load = signals.read()      # of the time since the last read

The parsers take text and give values. See proc(5) and Documentation/accounting/psi.rst. Where a fleet has a
Prometheus already, `migrator.fleet.prometheus` asks that instead.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from migrator.errors import MigratorError
from migrator.fleet.records import Load

T = TypeVar("T")

_PRESSURE = re.compile(r"some avg10=([0-9.]+) avg60=([0-9.]+) avg300=([0-9.]+) total=([0-9]+)")
_IDLE, _IOWAIT, _STEAL = 3, 4, 7  # columns of the "cpu" line; guest time, after them, is in user time already
_LEAST = 0.05  # seconds between two reads that differ enough to be divided


class SignalsError(MigratorError):
    """The load cannot be told. Whoever decides by it waits."""

    exit_code = 16


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Clock ticks since boot, of all processors together, and how many processors are online."""

    busy: int
    total: int
    cpus: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. What is not available is used; caches are available."""

    total: int
    available: int

    @property
    def used(self) -> int:
        return max(self.total - self.available, 0)


def parse_stat(text: str) -> CpuTimes:
    """/proc/stat. Time stolen by a hypervisor counts as busy: it is not there for anybody."""
    columns: list[int] = []
    cpus = 0
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        if name == "cpu":
            columns = [int(word) for word in rest.split()]
        elif re.fullmatch(r"cpu[0-9]+", name):
            cpus += 1
    if len(columns) <= _STEAL or not cpus:
        raise ValueError("no line of all processors")
    total = sum(columns[: _STEAL + 1])
    return CpuTimes(total - columns[_IDLE] - columns[_IOWAIT], total, cpus)


def parse_meminfo(text: str) -> Memory:
    """/proc/meminfo, which counts in KiB whatever its "kB" says."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            found[name] = int(rest.split()[0]) * 1024
    try:
        return Memory(found["MemTotal"], found["MemAvailable"])
    except KeyError as error:
        raise ValueError(f"no {error.args[0]}") from None


def parse_pressure(text: str) -> float:
    """/proc/pressure/*: the share of the last minute in which some task waited, 0 to 1."""
    match = _PRESSURE.search(text)
    if match is None:
        raise ValueError("no line of some tasks")
    return min(float(match[2]) / 100, 1.0)


def parse_net_dev(text: str) -> dict[str, int]:
    """/proc/net/dev: the bytes that each interface has received and sent."""
    found = {}
    for line in text.splitlines()[2:]:
        name, colon, rest = line.partition(":")
        columns = rest.split()
        if not colon or len(columns) < 9:
            raise ValueError(f"no interface: {line[:40]!r}")
        found[name.strip()] = int(columns[0]) + int(columns[8])
    return found


class HostSignals:
    """This host, from the first read on. `proc` and `sys` are for tests."""

    def __init__(self, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> None:
        """Raises SignalsError, as every read does, where the kernel's files cannot be understood."""
        self._proc = proc
        self._sys = sys
        self._at = time.monotonic()
        self._cpu = self._stat()
        self._bytes = self._network()
        self._last = self._load(0.0, 0.0)

    def read(self) -> Load:
        """The load since the last read; the same again if that was just now."""
        now, cpu, network = time.monotonic(), self._stat(), self._network()
        seconds, ticks = now - self._at, cpu.total - self._cpu.total
        if seconds < _LEAST or ticks <= 0:
            return self._last
        # An interface that went away takes its bytes with it, one that is new has not been counted before.
        moved = sum(max(count - self._bytes.get(name, count), 0) for name, count in network.items())
        busy = min(max(cpu.busy - self._cpu.busy, 0) / ticks, 1.0)
        self._last = self._load(busy * cpu.cpus, moved / seconds)
        self._at, self._cpu, self._bytes = now, cpu, network
        return self._last

    def memory(self) -> Memory:
        return self._parse("meminfo", parse_meminfo)

    @property
    def cpus(self) -> int:
        """Processors that were online at the last read."""
        return self._cpu.cpus

    def _load(self, cpu: float, network: float) -> Load:
        return Load(
            cpu=cpu,
            memory=self.memory().used,
            network=network,
            cpu_pressure=self._pressure("cpu"),
            memory_pressure=self._pressure("memory"),
            io_pressure=self._pressure("io"),
        )

    def _stat(self) -> CpuTimes:
        return self._parse("stat", parse_stat)

    def _network(self) -> dict[str, int]:
        """Of the interfaces with hardware behind them: what crosses a bridge is not counted twice. Where there
        are none, of all but the loopback."""
        found = self._parse("net/dev", parse_net_dev)
        hardware = {
            name: count for name, count in found.items() if (self._sys / "class/net" / name / "device").exists()
        }
        return hardware or {name: count for name, count in found.items() if name != "lo"}

    def _pressure(self, kind: str) -> float | None:
        """None where the kernel has no PSI, or has it turned off (psi=0: the files cannot be read then)."""
        try:
            return parse_pressure((self._proc / "pressure" / kind).read_text())
        except OSError:
            return None
        except ValueError as error:
            raise SignalsError(f"cannot understand {self._proc}/pressure/{kind}: {error}") from None

    def _parse(self, name: str, parse: Callable[[str], T]) -> T:
        try:
            return parse((self._proc / name).read_text())
        except OSError as error:
            raise SignalsError(f"cannot read {self._proc}/{name}: {error.strerror}") from None
        except (ValueError, IndexError) as error:
            raise SignalsError(f"cannot understand {self._proc}/{name}: {error}") from None
