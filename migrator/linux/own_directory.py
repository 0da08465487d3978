"""A directory of ours in one where others may write."""

from __future__ import annotations

import errno
import os
import secrets


def make_own_directory(place: int, prefix: str | bytes) -> tuple[bytes, int]:
    """Make one of mode 0700 in the directory `place`; (its name, the directory opened). Whoever may write in `place`
    can rename it, and put something else where it was, but not lead us there. Raises OSError."""
    name = os.fsencode(prefix) + secrets.token_hex(8).encode()
    os.mkdir(name, 0o700, dir_fd=place)
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or status.st_mode & 0o777 != 0o700:  # with the set-group-ID bit of `place`
        os.close(fd)
        raise OSError(errno.ESTALE, "another user has put a directory in the place of ours")
    return name, fd
