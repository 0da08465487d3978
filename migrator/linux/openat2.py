"""openat2(2): opening paths as the workload's own root shows them, or strictly below a directory.

We are root, and a user may have a hand in directories on the way. A symbolic link that root alone can have made is
followed anywhere. Another one leads only to what belongs to its owner, who could then as well open it without us.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct

from migrator.linux import sys

_NR_OPENAT2 = 437
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS = 0x01, 0x02, 0x04
_RESOLVE_BENEATH, _RESOLVE_IN_ROOT = 0x08, 0x10
_MOST_LINKS = 40  # as the kernel has it
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


LINK_HINT = "put the file itself there, or have root make the link, in a directory where only root writes"


class UntrustedLink(OSError):
    """A symbolic link that is not followed (ELOOP)."""


def open_in_root(root_fd: int, path: str, flags: int, *, links: bool = True) -> int:
    """Open `path` with `root_fd` as "/": absolute links and ".." stay inside; without `links` there may be none
    (ELOOP). Close-on-exec. Raises OSError: UntrustedLink for a link that is not to be followed."""
    resolve = _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS
    try:
        return _open(root_fd, path, flags, resolve)
    except OSError as error:
        # EACCES, too, stands for a link at the end of the path (fs.protected_symlinks)
        if not links or error.errno not in (errno.ELOOP, errno.EACCES):
            raise
    return _open_through_links(root_fd, path, flags)


def reason(error: OSError) -> str:
    """Why it could not be opened, for people."""
    return str(error.strerror) if isinstance(error, UntrustedLink) else os.strerror(error.errno or 0)


def made_by_root(folder: os.stat_result, link: os.stat_result) -> bool:
    """Whether root alone can have put this link into this directory."""
    ours = (0, os.geteuid())
    return link.st_uid in ours and folder.st_uid in ours and not folder.st_mode & _OTHERS_WRITE


def only_root_leads_to(root_fd: int, path: str) -> bool:
    """Whether `path`, with `root_fd` as "/", is that of a directory, over no symbolic link, and root alone can make it
    lead elsewhere. Raises OSError."""
    at = "."
    for part in [*path.split("/"), ""]:
        status = os.stat(at, dir_fd=root_fd, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode):
            return False
        if part in ("", "."):
            continue
        if part == ".." or status.st_uid != 0 or status.st_mode & _OTHERS_WRITE:
            return False
        at = os.path.join(at, part)
    return True


def _open_through_links(root_fd: int, path: str, flags: int) -> int:
    stack = [os.open(".", _PATH | os.O_DIRECTORY, dir_fd=root_fd)]
    try:
        waiting = os.fsencode(path).split(b"/")[::-1]
        owners: set[int] = set()  # of links that lead only to what is theirs
        followed = 0
        name = b"."
        while waiting:
            name = waiting.pop()
            if name in (b"", b"."):
                name = b"."
                continue
            if name == b"..":
                name = b"."
                if len(stack) > 1:
                    os.close(stack.pop())
                continue
            fd = os.open(name, _PATH, dir_fd=stack[-1])
            status = os.fstat(fd)
            last = not any(part not in (b"", b".") for part in waiting)
            if stat.S_ISDIR(status.st_mode):
                stack.append(fd)
                name = b"."
                continue
            try:
                if stat.S_ISLNK(status.st_mode) and not (last and flags & os.O_NOFOLLOW):
                    followed += 1
                    folder = os.fstat(stack[-1])
                    if followed > _MOST_LINKS:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                    if not made_by_root(folder, status):
                        _check_owner(folder, status, path)
                        owners.add(status.st_uid)
                    target = os.readlink(b"", dir_fd=fd)
                elif not last:
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
                else:
                    break
            finally:
                os.close(fd)
            if target.startswith(b"/"):
                while len(stack) > 1:
                    os.close(stack.pop())
            waiting += target.split(b"/")[::-1]
        return _open_theirs(stack[-1], name, flags, owners, path)
    finally:
        for fd in stack:
            os.close(fd)


def _check_owner(folder: os.stat_result, link: os.stat_result, path: str) -> None:
    """Raises UntrustedLink for a link that others than its owner and root can have put there."""
    if folder.st_uid not in (0, link.st_uid) or (folder.st_mode & _OTHERS_WRITE and not folder.st_mode & stat.S_ISVTX):
        raise UntrustedLink(errno.ELOOP, "a symbolic link on the way is in a directory where others write", path)


def _open_theirs(folder: int, name: bytes, flags: int, owners: set[int], path: str) -> int:
    """Open `name` if it belongs to all `owners`. It is looked at before: opening alone may do something to a device."""
    resolve = _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_SYMLINKS
    there = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if owners - {there.st_uid}:
        owner = next(iter(owners - {there.st_uid}))
        text = f"a symbolic link of user {owner} leads there, and it belongs to user {there.st_uid}"
        raise UntrustedLink(errno.ELOOP, text, path)
    fd = _open(folder, name, flags, resolve)
    if owners and not os.path.samestat(os.fstat(fd), there):
        os.close(fd)
        raise UntrustedLink(errno.ELOOP, "it was replaced while it was opened", path)
    return fd


def open_beneath(fd: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Open `path` below the directory `fd`: no symbolic link is followed, no mount point is crossed (EXDEV),
    nothing above is reached. b"" is the directory itself. Close-on-exec. Raises OSError."""
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_XDEV
    return _open(fd, path or b".", flags, resolve, mode)


def _open(fd: int, path: str | bytes, flags: int, resolve: int, mode: int = 0) -> int:
    how = ctypes.create_string_buffer(struct.pack("<QQQ", flags | os.O_CLOEXEC, mode, resolve), 24)
    name = ctypes.create_string_buffer(os.fsencode(path))
    return sys.call(
        _NR_OPENAT2,
        fd,
        ctypes.addressof(name),
        ctypes.addressof(how),
        24,
        name="openat2",
        about=os.fsdecode(path),
    )
