"""asyncssh, imported in less time: `from transport.library import asyncssh`.

While it is imported it looks for libraries with ciphers that nobody here offers (UMAC, sntrup761). Each search is some
processes of ldconfig, gcc and ld, which together take longer than all the rest of the import.
"""

from __future__ import annotations

import ctypes.util

_find = ctypes.util.find_library


def _find_none(name: str) -> str | None:
    return None


ctypes.util.find_library = _find_none
try:
    import asyncssh as asyncssh
finally:
    ctypes.util.find_library = _find
