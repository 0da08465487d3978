"""The files of a tree whose contents are not in the stream: the destination must have the same."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection

from migrator.engine.base import FileFact
from migrator.linux import elf, procfs


def mapped(pid: int, files: dict[str, FileFact], leave_out: Callable[[procfs.Vma], bool]) -> None:
    """Note the files that a process has mapped, but those whose contents the stream has."""
    for vma in procfs.maps(pid):
        if vma.path.startswith("/") and not leave_out(vma):
            writable = vma.shared and vma.write
            link = f"/proc/{pid}/map_files/{vma.start:x}-{vma.end:x}"
            _note(files, vma.path, link, writable)


def opened(pid: int, files: dict[str, FileFact], devices: Collection[int]) -> None:
    """Note the files that a process has open, but those on `devices`, whose contents the stream has."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        link = f"/proc/{pid}/fd/{fd}"
        try:
            path = os.readlink(link)
            if not path.startswith("/") or path.startswith(("/dev/", "/proc/", "/memfd:")):
                continue
            if path.endswith(" (deleted)") or os.stat(link).st_dev in devices:
                continue
            flags = int(procfs.read_text(f"/proc/{pid}/fdinfo/{fd}").split("flags:")[1].split()[0], 8)
            _note(files, path, link, bool(flags & 3))
        except (FileNotFoundError, ProcessLookupError, IndexError):
            continue


def directories(pid: int, files: dict[str, FileFact], devices: Collection[int]) -> None:
    """Note what else of the file system a process needs by name: its working directory and root, directories and FIFOs
    that it has open; but what is on `devices`, which the stream has."""
    for link in (
        f"/proc/{pid}/cwd",
        f"/proc/{pid}/root",
        *(f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")),
    ):
        try:
            path, status = os.readlink(link), os.stat(link)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it was closed
        if not path.startswith("/") or path == "/" or f"{path}/".startswith(("/dev/", "/proc/")):
            continue
        if path.endswith(" (deleted)") or status.st_dev in devices:
            continue
        if stat.S_ISDIR(status.st_mode) or stat.S_ISFIFO(status.st_mode):
            files.setdefault(path, FileFact(path, 0, status.st_mode, 0, "", False))


def _note(files: dict[str, FileFact], path: str, link: str, writable: bool) -> None:
    known = files.get(path)
    if known is not None and (known.writable or not writable):
        return
    try:
        status = os.stat(link)
    except OSError:
        return
    if status.st_mode & 0o170000 == 0o100000:
        build_id = elf.build_id(link) if not writable else ""
        files[path] = FileFact(path, status.st_size, status.st_mode, status.st_mtime_ns, build_id, writable)
