"""The files of a tree whose contents are not in the stream: the destination must have the same."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Collection

from migrator.engine.base import FileFact
from migrator.linux import elf, map_files, procfs


def mapped(pid: int, files: dict[str, FileFact], leave_out: Callable[[procfs.Vma], bool]) -> None:
    """Note the files that a process has mapped, but those whose contents the stream has."""
    for vma in procfs.maps(pid):
        if vma.path.startswith("/") and not leave_out(vma):
            writable = vma.shared and vma.write
            with contextlib.suppress(OSError):  # it has been unmapped
                fd = map_files.open_path(pid, vma)
                try:
                    _note(files, vma.path, f"/proc/self/fd/{fd}", writable)
                finally:
                    os.close(fd)


def opened(pid: int, files: dict[str, FileFact], devices: Collection[int], *, names: bool = False) -> None:
    """Note the files that a process has open, but those on `devices`, whose contents the stream has.

    `names`: note as well what else must be there by name: directories and FIFOs that it has open, its working directory
    and root."""
    links = [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    for link in (*links, f"/proc/{pid}/cwd", f"/proc/{pid}/root") if names else links:
        try:
            path = os.readlink(link)
            if not path.startswith("/") or f"{path}/".startswith(("/dev/", "/proc/", "/memfd:")):
                continue
            if path.endswith(" (deleted)") or (status := os.stat(link)).st_dev in devices:
                continue
            if stat.S_ISREG(status.st_mode):
                info = procfs.read_text(link.replace("/fd/", "/fdinfo/"))
                _note(files, path, link, bool(int(info.split("flags:")[1].split()[0], 8) & 3))
            elif names and path != "/" and (stat.S_ISDIR(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
                files.setdefault(path, FileFact(path, 0, status.st_mode, 0, "", False))
        except (FileNotFoundError, ProcessLookupError, IndexError):
            continue  # it was closed


def named(pid: int, paths: Collection[str], files: dict[str, FileFact], devices: Collection[int]) -> None:
    """Note what must be there by name, whatever is in it. `paths` are those of the root directory of `pid`."""
    for path in paths:
        try:
            status = os.lstat(f"/proc/{pid}/root{path}")
        except OSError:
            continue  # it was removed
        if status.st_dev not in devices and path != "/" and not f"{path}/".startswith(("/dev/", "/proc/")):
            files.setdefault(path, FileFact(path, 0, status.st_mode, 0, "", stat.S_ISREG(status.st_mode)))


def _note(files: dict[str, FileFact], path: str, link: str, writable: bool) -> None:
    known = files.get(path)
    if known is not None and (known.writable or not writable):
        return
    try:
        status = os.stat(link)
    except OSError:
        return
    if stat.S_ISREG(status.st_mode):
        build_id = elf.build_id(link) if not writable else ""
        files[path] = FileFact(path, status.st_size, status.st_mode, status.st_mtime_ns, build_id, writable)
