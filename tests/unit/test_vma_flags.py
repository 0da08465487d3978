"""Flags of mappings as the kernel's own words: the same mappings as in /proc/PID/maps, and what a word means."""

from __future__ import annotations

import mmap
import os
import signal
import time
from array import array
from collections.abc import Iterator

import pytest

from migrator.engine.user.dump.vma_flags import MappingFlags
from migrator.image.records import VmaFlag
from migrator.linux import btf, procfs
from migrator.linux.vma_flags import WORDS, VmaFlags

PAGES = 6000  # of which every second cannot be written to: more mappings than the kernel tells of at a time


@pytest.fixture(scope="module")
def child() -> Iterator[int]:
    ready, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        area = mmap.mmap(-1, PAGES * mmap.PAGESIZE)
        for at in range(0, PAGES, 2):
            area.madvise(mmap.MADV_DONTFORK, at * mmap.PAGESIZE, mmap.PAGESIZE)
        os.write(said, b"x")
        while True:
            time.sleep(1)
    os.read(ready, 1)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_protection_key_is_told_of_the_mapping_that_has_it() -> None:
    head = "7f0000000000-7f0000001000 rw-p 00000000 00:00 0\nRss: 4 kB\nProtectionKey:         {}\nVmFlags: rd wr mr mw"
    other = "7f0000001000-7f0000002000 rw-p 00000000 00:00 0\nRss: 4 kB\nProtectionKey:         0\nVmFlags: rd wr mr mw"
    found = procfs.parse_vm_flags(f"{head.format(3)}\n{other}\n")
    assert [("pk" in flags) for flags in found.values()] == [True, False]


def test_all_mappings_are_there_once_and_in_order(child: int) -> None:
    with VmaFlags() as reader:
        words = reader.read(child)
    assert words is not None, "bpf_iter_task_vma: Linux 6.1 with BTF, as root"
    spans = list(zip(words[0::WORDS], words[1::WORDS], strict=True))
    assert spans == [(vma.start, vma.end) for vma in procfs.maps(child) if vma.path != "[vsyscall]"]
    assert len(spans) > PAGES


def test_words_mean_what_smaps_says(child: int) -> None:
    vmas = procfs.maps(child)
    by_words = MappingFlags()
    first = by_words.look(child, 1, vmas, stopped=False)
    assert by_words.look(child, 1, vmas, stopped=True) is first
    others = by_words.look(child, 2, list(vmas), stopped=True)  # by what was learnt
    by_words.close()
    raw = procfs.vm_flags(child)
    for vma in vmas:
        meaning = others[(vma.start, vma.end, vma.path)]
        assert meaning is first[(vma.start, vma.end, vma.path)]
        assert bool(meaning.carried & VmaFlag.DONTFORK) == ("dc" in raw.get(vma.start, ()))
        assert bool(meaning.carried & VmaFlag.NORESERVE) == ("nr" in raw.get(vma.start, ()))


def test_a_word_that_has_meant_two_things_means_nothing(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, vmas = MappingFlags(), procfs.maps(child)
    flags.look(child, 1, vmas, stopped=False)
    flags._learn(array("Q", [1, 2, word := next(iter(flags._meanings))]), {1: frozenset({"lf", "dp"})})
    assert flags._meanings[word] is None
    asked = []
    of_smaps = procfs.vm_flags
    monkeypatch.setattr(procfs, "vm_flags", lambda pid: asked.append(pid) or of_smaps(pid))
    flags.look(child, 2, vmas, stopped=True)
    assert asked == [child]
    flags.close()


def test_a_process_that_has_ended_has_none() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    with VmaFlags() as reader:
        assert not reader.read(pid)


@pytest.mark.parametrize("size", [0, 24, 1000, 100_000])
def test_a_part_of_the_types_of_a_kernel_is_refused(size: int) -> None:
    with open(btf.VMLINUX, "rb") as file:
        raw = file.read(size)
    with pytest.raises(LookupError):
        btf.Kernel(raw).function("bpf_iter_task_vma")
