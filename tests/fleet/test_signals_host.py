"""The load of this host: what the kernel's files say, and that it is what really happens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.fleet.signals import (
    CpuTimes,
    HostSignals,
    Memory,
    SignalsError,
    parse_meminfo,
    parse_net_dev,
    parse_pressure,
    parse_stat,
)

STAT = (
    "cpu  100 20 30 800 50 5 5 10 7 3\n"
    "cpu0 50 10 15 400 25 2 3 5 7 3\n"
    "cpu1 50 10 15 400 25 3 2 5 0 0\nintr 1 2\nctxt 5\n"
)
NET = (
    "Inter-|   Receive                                                |  Transmit\n"
    " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier\n"
    "    lo: 1000 1 0 0 0 0 0 0 1000 1 0 0 0 0 0 0\n"
    "  eth0: 5000 9 0 0 0 0 0 0 700 4 0 0 0 0 0 0\n"
)


def test_the_processor_line_tells_busy_and_idle_time_and_steal_is_busy() -> None:
    assert parse_stat(STAT) == CpuTimes(busy=170, total=1020, cpus=2)


def test_memory_that_is_not_available_is_used() -> None:
    memory = parse_meminfo("MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    600 kB\n")
    assert memory == Memory(1000 * 1024, 600 * 1024)
    assert memory.used == 400 * 1024


def test_pressure_is_a_share() -> None:
    text = (
        "some avg10=82.12 avg60=60.50 avg300=32.07 total=2477737303\nfull avg10=0.00 avg60=1.00 avg300=0.00 total=0\n"
    )
    assert parse_pressure(text) == pytest.approx(0.605)


def test_interfaces_count_both_ways() -> None:
    assert parse_net_dev(NET) == {"lo": 2000, "eth0": 5700}


@pytest.mark.parametrize("parse", [parse_stat, parse_meminfo, parse_pressure])
@given(text=st.text(max_size=200))
def test_other_text_is_an_error_of_value_and_nothing_else(parse: object, text: str) -> None:
    with pytest.raises((ValueError, IndexError)):
        parse(text)  # type: ignore[operator]


def copied(tmp_path: Path) -> tuple[Path, Path]:
    """The kernel's files of this moment, to be changed at will."""
    proc, sysfs = tmp_path / "proc", tmp_path / "sys"
    (proc / "net").mkdir(parents=True)
    (proc / "stat").write_text(STAT)
    (proc / "meminfo").write_text(Path("/proc/meminfo").read_text())
    (proc / "net/dev").write_text(NET)
    shutil.copytree("/proc/pressure", proc / "pressure")
    return proc, sysfs


def test_the_load_is_of_the_time_between_two_reads(tmp_path: Path) -> None:
    proc, sysfs = copied(tmp_path)
    signals = HostSignals(proc, sysfs)
    (proc / "stat").write_text(STAT.replace("cpu  100 20 30 800", "cpu  200 20 30 1000"))
    (proc / "net/dev").write_text(NET.replace("5000", "105000"))
    time.sleep(0.1)
    load = signals.read()
    assert load.cpu == pytest.approx(2 * 100 / 300)
    assert 0 < load.network <= 1_000_000


def test_counters_that_go_back_or_interfaces_that_come_and_go_give_no_nonsense(tmp_path: Path) -> None:
    proc, sysfs = copied(tmp_path)
    signals = HostSignals(proc, sysfs)
    (proc / "stat").write_text(STAT.replace("cpu  100 20 30 800", "cpu  50 20 30 1000"))
    (proc / "net/dev").write_text(NET.replace("eth0", "eth7").replace("5000", "10"))
    time.sleep(0.1)
    load = signals.read()
    assert load.cpu == 0
    assert load.network == 0


def test_only_interfaces_with_hardware_count_where_there_are_some(tmp_path: Path) -> None:
    proc, sysfs = copied(tmp_path)
    (sysfs / "class/net/eth0/device").mkdir(parents=True)
    (proc / "net/dev").write_text(NET + NET.splitlines()[3].replace("eth0", "br0") + "\n")
    assert set(HostSignals(proc, sysfs)._network()) == {"eth0"}


def test_a_kernel_without_pressure_says_none_and_not_zero(tmp_path: Path) -> None:
    proc, sysfs = copied(tmp_path)
    shutil.rmtree(proc / "pressure")
    load = HostSignals(proc, sysfs).read()
    assert (load.cpu_pressure, load.memory_pressure, load.io_pressure) == (None, None, None)


@pytest.mark.parametrize("name", ["stat", "meminfo", "net/dev", "pressure/cpu"])
def test_a_file_that_makes_no_sense_is_named(tmp_path: Path, name: str) -> None:
    proc, sysfs = copied(tmp_path)
    (proc / name).write_text("header\nheader\nnonsense\n")
    with pytest.raises(SignalsError, match=name):
        HostSignals(proc, sysfs)


def test_the_real_host_is_seen_to_work() -> None:
    signals = HostSignals()
    signals.read()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            time.sleep(1.5)
            load = signals.read()
        finally:
            busy.kill()
    assert signals.cpus == os.sysconf("SC_NPROCESSORS_ONLN")
    assert 0.3 < load.cpu <= signals.cpus
    assert 0 < load.memory < signals.memory().total
    assert load.cpu_pressure is not None and 0 <= load.cpu_pressure <= 1


def test_memory_that_a_program_takes_is_seen() -> None:
    size = 300 << 20
    before = HostSignals().memory()
    taken = bytearray(os.urandom(1 << 20) * (size >> 20))
    after = HostSignals().memory()
    assert len(taken) == size
    assert after.total == before.total
    assert after.used - before.used > size // 3
